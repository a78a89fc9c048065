"""The parts of a miniature Z-Image family: sizes, tokenizer, and every model as its library initialises it.

In: sizes, and texts for the tokenizer. Out: untrained models in the classes in which the real weights are stored.
What happens to them then, and how they are written to disk, is family.py's.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from diffusers import AutoencoderKL, ZImageTransformer2DModel
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX


@dataclass(frozen=True, kw_only=True)
class FamilySizes:
    """Every size in which a miniature differs from the real models."""

    # Tokenizer: byte-level BPE, counted without special tokens.
    bpe_tokens: int = 448
    # Language models: the text encoder (Qwen3) and the language half of Qwen3-VL share all of these.
    lm_hidden: int = 48
    lm_mlp: int = 96
    lm_layers: int = 6
    lm_heads: int = 4
    lm_kv_heads: int = 2
    lm_head_dim: int = 16
    mrope_section: tuple[int, int, int] = (
        4,
        2,
        2,
    )  # frequencies of (time, height, width); sums to lm_head_dim / 2
    # Large beside Qwen's 0.02: at this width 0.02 would leave every layer close to the identity.
    lm_init_std: float = 0.1
    # Vision tower of Qwen3-VL; its patches are 16 px, merged 2 x 2 into one token of lm_hidden.
    vl_hidden: int = 32
    vl_mlp: int = 64
    vl_depth: int = 4
    vl_heads: int = 2
    vl_positions: int = 256  # a square grid of learned positions, interpolated to the image
    vl_deepstack: tuple[int, ...] = (0, 1, 2)  # blocks whose output is added behind the first LM layers
    # SigLIP2 NaFlex.
    siglip_hidden: int = 32
    siglip_mlp: int = 64
    siglip_layers: int = 2
    siglip_heads: int = 2
    siglip_patches: int = 256
    siglip_text_vocab: int = 64  # of the text tower, which is shipped because the real repository has one
    # Diffusion transformer.
    dit_dim: int = 64
    dit_layers: int = 2
    dit_refiner_layers: int = 2
    dit_heads: int = 2
    dit_axes_dims: tuple[int, int, int] = (8, 12, 12)  # sums to dit_dim / dit_heads
    dit_axes_lens: tuple[int, int, int] = (1536, 512, 512)  # as in the released checkpoints
    # VAE: one entry per level, each but the last halves the image: four levels are factor 8.
    vae_channels: tuple[int, ...] = (16, 16, 16, 16)
    vae_layers_per_block: int = 1
    vae_norm_groups: int = 8
    vae_latent_channels: int = 16


TINY = FamilySizes()

# Names and order as in Qwen3-VL. The thinking marks are ordinary added tokens there too, not special ones.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
THINKING_TOKENS = ("<think>", "</think>")

# Qwen3's meaning: enable_thinking=False writes an empty thinking block, everything else writes none.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# The real repository's preprocessor_config.json, less "size".
VISION_LANGUAGE_PROCESSOR: dict[str, object] = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}

# What the random family's merges are learned from: captions of simple pictures, and the words that name their styles.
BPE_TEXT = tuple(
    """\
user assistant a picture of the image shows one red circle in the top left corner on a plain white background
a photo of two blue squares and three green triangles in the middle of the picture on a striped background
a painting of a yellow star above a purple ring, drawn with thick black outlines and a soft grain of noise
an illustration of an orange heart below a brown cross to the right of a grey diamond, with checkers
three small pink arrows at the bottom right, a large cyan moon in the centre, and a dark gradient behind them
a watercolour sketch of a house by the river, a tree on the hill, a boat on the water, and a cat under the sun
the same object in another style: flat, pixelated, blurred, outlined, dotted, textured, bright, muted, dark
describe this image in detail, what is the colour of the background, how many objects are there, and where
draw a portrait of a woman with long hair wearing a warm winter coat, in front of an old stone building
a cinematic photograph of a mountain landscape at sunset, with soft light, high contrast and shallow depth
""".splitlines()
)


VISION_LANGUAGE_PIXELS = (65536, 16777216)  # the real Qwen3-VL's bounds


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A whole family in memory; its files hold the dtypes that the models have here."""

    tokenizer: Qwen2Tokenizer
    text_encoder: Qwen3ForCausalLM
    vision_language: Qwen3VLForConditionalGeneration
    siglip: Siglip2Model
    vae: AutoencoderKL
    transformers: dict[str, ZImageTransformer2DModel]
    """By repository (family.BASE, family.TURBO, family.OMNI); repositories that are not in it are not written."""
    shifts: dict[str, float]
    """The scheduler's shift for each repository in `transformers`."""
    siglip_patches: int
    """Most patches that SigLIP2's image processor makes of a picture."""
    vision_language_pixels: tuple[int, int] = VISION_LANGUAGE_PIXELS
    """Smallest and largest area in pixels that Qwen3-VL's image processor resizes a picture to."""


def build_tokenizer(sizes: FamilySizes, texts: Iterable[str] = BPE_TEXT) -> Qwen2Tokenizer:
    """Returns a small byte-level BPE, learned from `texts`, with Qwen's classes, special tokens and chat template."""
    trainable = Tokenizer(models.BPE())
    trainable.normalizer = normalizers.NFC()
    trainable.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.bpe_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trainable.train_from_iterator(texts, trainer)
    learned = json.loads(trainable.to_str())["model"]

    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token=None,
        eos_token="<|endoftext|>",  # replaced below: naming <|im_end|> first would reorder the ids
        pad_token="<|endoftext|>",
        model_max_length=131072,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        errors="replace",
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS[1:])})
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINKING_TOKENS])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def vocab_size(tokenizer: Qwen2Tokenizer) -> int:
    """Returns the rows of the models' embedding: the tokenizer's length rounded up to a multiple of 8."""
    return -(-len(tokenizer) // 8) * 8


def build_text_encoder(sizes: FamilySizes, tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """Returns Z-Image's text encoder with its language head, the class in which it is stored."""
    ids = tokenizer.get_vocab()
    config = Qwen3Config(
        **_language_sizes(sizes, tokenizer),
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        tie_word_embeddings=True,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return Qwen3ForCausalLM(config)


def build_vision_language(sizes: FamilySizes, tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    """Returns Qwen3-VL; its language model has the text encoder's shapes, another RoPE and other weights."""
    ids = tokenizer.get_vocab()
    config = Qwen3VLConfig(
        text_config=_language_sizes(sizes, tokenizer)
        | {
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": list(sizes.mrope_section),
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": sizes.vl_depth,
            "hidden_size": sizes.vl_hidden,
            "intermediate_size": sizes.vl_mlp,
            "num_heads": sizes.vl_heads,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": sizes.lm_hidden,
            "num_position_embeddings": sizes.vl_positions,
            "deepstack_visual_indexes": list(sizes.vl_deepstack),
            "initializer_range": sizes.lm_init_std,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config)


def build_siglip(sizes: FamilySizes, text_vocab: int | None = None) -> Siglip2Model:
    """Returns SigLIP2 NaFlex with both towers; its `vision_model` is what Omni reads.

    `text_vocab`: rows of the text tower's embedding, None for `sizes.siglip_text_vocab`.
    """
    tower = {
        "hidden_size": sizes.siglip_hidden,
        "intermediate_size": sizes.siglip_mlp,
        "num_hidden_layers": sizes.siglip_layers,
        "num_attention_heads": sizes.siglip_heads,
    }
    config = Siglip2Config(
        text_config=tower
        | {
            "vocab_size": sizes.siglip_text_vocab if text_vocab is None else text_vocab,
            "max_position_embeddings": 64,
            "pad_token_id": 0,  # Gemma's ids, of which SigLIP2 uses the tokenizer
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        vision_config=tower | {"patch_size": 16, "num_patches": sizes.siglip_patches},
    )
    return Siglip2Model(config)


def build_transformer(sizes: FamilySizes, siglip: bool) -> ZImageTransformer2DModel:
    """Returns the diffusion transformer, with Omni's SigLIP parts if `siglip`."""
    return ZImageTransformer2DModel(
        in_channels=sizes.vae_latent_channels,
        dim=sizes.dit_dim,
        n_layers=sizes.dit_layers,
        n_refiner_layers=sizes.dit_refiner_layers,
        n_heads=sizes.dit_heads,
        n_kv_heads=sizes.dit_heads,
        cap_feat_dim=sizes.lm_hidden,
        siglip_feat_dim=sizes.siglip_hidden if siglip else None,
        axes_dims=list(sizes.dit_axes_dims),
        axes_lens=list(sizes.dit_axes_lens),
    )


def build_vae(sizes: FamilySizes) -> AutoencoderKL:
    """Returns an autoencoder like Flux's: no quant convolutions, latents normalised by shift and scale."""
    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae_channels,
        layers_per_block=sizes.vae_layers_per_block,
        norm_num_groups=sizes.vae_norm_groups,
        latent_channels=sizes.vae_latent_channels,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _language_sizes(sizes: FamilySizes, tokenizer: Qwen2Tokenizer) -> dict[str, object]:
    """What the text encoder and the language half of Qwen3-VL have in common."""
    return {
        "vocab_size": vocab_size(tokenizer),
        "hidden_size": sizes.lm_hidden,
        "intermediate_size": sizes.lm_mlp,
        "num_hidden_layers": sizes.lm_layers,
        "num_attention_heads": sizes.lm_heads,
        "num_key_value_heads": sizes.lm_kv_heads,
        "head_dim": sizes.lm_head_dim,
        "initializer_range": sizes.lm_init_std,
        "pad_token_id": tokenizer.get_vocab()["<|endoftext|>"],
    }
