"""Builds a tiny random version of every model of the Z-Image family, in the folders of the real repositories.

In: an empty place on disk. Out: Z-Image/, Z-Image-Turbo/, Z-Image-Omni-Base/, Qwen3-VL-4B-Instruct/ and
siglip2-so400m-patch16-naflex/, which the loading code of the real weights reads unchanged. The weights are
random: this family is for testing plumbing, not for looking at pictures.

    python -m ztrain.mini.family --out DIR
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils import logging as transformers_logging

from ztrain.errors import InputError

Model = TypeVar("Model", bound=nn.Module)

FAMILY_VERSION = 1  # raise it when the same seed and sizes no longer give the same files
MARKER = "family.json"  # written last: a folder that holds it is complete

BASE, TURBO, OMNI = "Z-Image", "Z-Image-Turbo", "Z-Image-Omni-Base"
VISION_LANGUAGE, SIGLIP = "Qwen3-VL-4B-Instruct", "siglip2-so400m-patch16-naflex"

# The schedules that the two released checkpoints ship (zimage_facts.md 2); Omni-Base's is taken to be Base's.
SHIFTS = {BASE: 6.0, TURBO: 3.0, OMNI: 6.0}


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
    siglip_text_vocab: int = 64  # its text tower is shipped because the real repository has one; nothing reads it
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

# The real repository's preprocessor_config.json. Despite their names the two edges are pixel AREAS.
VISION_LANGUAGE_PROCESSOR: dict[str, object] = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}

# What the merges are learned from: captions of simple pictures, and the words that name their styles.
BPE_TEXT = """\
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
"""


def build_tokenizer(sizes: FamilySizes) -> Qwen2Tokenizer:
    """Returns a small byte-level BPE with Qwen's classes, special-token names and chat template."""
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
    trainable.train_from_iterator(BPE_TEXT.splitlines(), trainer)
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
    return _finished(Qwen3ForCausalLM(config))


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
    return _finished(Qwen3VLForConditionalGeneration(config))


def build_siglip(sizes: FamilySizes) -> Siglip2Model:
    """Returns SigLIP2 NaFlex with both towers; its `vision_model` is what Omni reads."""
    tower = {
        "hidden_size": sizes.siglip_hidden,
        "intermediate_size": sizes.siglip_mlp,
        "num_hidden_layers": sizes.siglip_layers,
        "num_attention_heads": sizes.siglip_heads,
    }
    config = Siglip2Config(
        text_config=tower
        | {
            "vocab_size": sizes.siglip_text_vocab,
            "max_position_embeddings": 64,
            "pad_token_id": 0,  # Gemma's ids, of which SigLIP2 uses the tokenizer
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        vision_config=tower | {"patch_size": 16, "num_patches": sizes.siglip_patches},
    )
    return _finished(Siglip2Model(config))


def build_transformer(sizes: FamilySizes, siglip: bool) -> ZImageTransformer2DModel:
    """Returns the diffusion transformer, with Omni's SigLIP parts if `siglip`."""
    transformer = ZImageTransformer2DModel(
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
    for final_layer in transformer.all_final_layer.values():
        # Tokens arrive with unit variance, and a velocity (noise - latents) has variance 2: torch's own start could
        # not reach a target's spread, so no adapter before this frozen layer could learn one.
        nn.init.normal_(final_layer.linear.weight, std=(2 / sizes.dit_dim) ** 0.5)
    return _finished(transformer)


def build_vae(sizes: FamilySizes) -> AutoencoderKL:
    """Returns an autoencoder like Flux's: no quant convolutions, latents normalised by shift and scale."""
    levels = len(sizes.vae_channels)
    vae = AutoencoderKL(
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
    return _finished(vae)


def build_family(folder: Path, *, seed: int = 0, sizes: FamilySizes = TINY) -> Path:
    """Builds the family in `folder` and returns it; does nothing if exactly this family is there already.

    The folder appears complete or not at all, and the caller's random state is left as it was.
    """
    folder = Path(folder).resolve()
    if is_complete(folder, seed=seed, sizes=sizes):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} is neither empty nor this miniature family (version {FAMILY_VERSION}, seed {seed}): "
            "remove it or name another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".unfinished", dir=folder.parent))
    try:
        with _quiet_progress_bars():
            _write_family(unfinished, seed, sizes)
        (unfinished / MARKER).write_text(_marker(seed, sizes))
        unfinished.chmod(0o755)  # mkdtemp makes it private
        try:
            os.replace(unfinished, folder)
        except OSError:
            # Another process may have finished the same family first: then its files are as good as ours.
            if not is_complete(folder, seed=seed, sizes=sizes):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def is_complete(folder: Path, *, seed: int = 0, sizes: FamilySizes = TINY) -> bool:
    """Tells whether `folder` holds all of the family that these arguments build."""
    path = Path(folder) / MARKER
    return path.is_file() and path.read_text() == _marker(seed, sizes)


def _write_family(folder: Path, seed: int, sizes: FamilySizes) -> None:
    tokenizer = build_tokenizer(sizes)
    with _seeded(seed, "text encoder"):
        text_encoder = build_text_encoder(sizes, tokenizer)
    with _seeded(seed, "vision-language"):
        vision_language = build_vision_language(sizes, tokenizer)
    with _seeded(seed, "siglip"):
        siglip = build_siglip(sizes)
    with _seeded(seed, "vae"):
        vae = build_vae(sizes)

    vision_language.save_pretrained(folder / VISION_LANGUAGE)
    tokenizer.save_pretrained(folder / VISION_LANGUAGE)
    described = json.dumps(VISION_LANGUAGE_PROCESSOR, indent=2) + "\n"
    (folder / VISION_LANGUAGE / "preprocessor_config.json").write_text(described)
    # Before the pipelines: saving Omni's copy of the vision tower writes into the configuration both share.
    siglip.save_pretrained(folder / SIGLIP)
    siglip_processor = Siglip2ImageProcessorPil()  # its defaults are NaFlex's: patch 16, at most 256 patches
    siglip_processor.save_pretrained(folder / SIGLIP)

    # The three repositories share everything but the transformer, as the released ones do.
    for name in (BASE, TURBO, OMNI):
        with _seeded(seed, name):
            transformer = build_transformer(sizes, siglip=name == OMNI)
        parts = {
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=SHIFTS[name]),
            "vae": vae,
            "text_encoder": text_encoder.model,
            "tokenizer": tokenizer,
            "transformer": transformer,
        }
        if name == OMNI:
            parts |= {"siglip": siglip.vision_model, "siglip_processor": siglip_processor}
            pipeline = ZImageOmniPipeline(**parts)
        else:
            pipeline = ZImagePipeline(**parts)
        pipeline.save_pretrained(folder / name)
        # The index names Qwen3Model, the class that is loaded; the folder holds Qwen3ForCausalLM.
        shutil.rmtree(folder / name / "text_encoder")
        text_encoder.save_pretrained(folder / name / "text_encoder")


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


@torch.no_grad()
def _finished(model: Model) -> Model:
    """Makes every parameter random that its library starts as a constant, and switches to evaluation.

    Zero pad tokens and biases and norm weights of one would hide that a piece of code forgets them.
    """
    for parameter in model.parameters():
        if (parameter == parameter.flatten()[0]).all():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Gives each model its own random stream, so that changing one leaves the others' weights alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        yield


@contextmanager
def _quiet_progress_bars() -> Iterator[None]:
    """Stops transformers from drawing a bar for every small file, only here."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _marker(seed: int, sizes: FamilySizes) -> str:
    return json.dumps({"version": FAMILY_VERSION, "seed": seed, "sizes": asdict(sizes)}, indent=2) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Builds the family where the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the tiny random Z-Image family.")
    parser.add_argument("--out", type=Path, required=True, help="folder to create; left alone if complete")
    out = parser.parse_args(arguments).out
    if is_complete(out):
        print(f"{out} holds a complete family of version {FAMILY_VERSION} already")
        return 0
    try:
        build_family(out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"built the Z-Image family in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
