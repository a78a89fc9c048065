"""Our one model call, sampler and splice against diffusers and transformers themselves, float32 on the CPU."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImageOmniPipeline, ZImagePipeline
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from ztrain.adapters import build_adapters
from ztrain.adapters.lora import LoraAdapterConfig
from ztrain.adapters.projector import ProjectorConfig
from ztrain.adapters.siglip import SiglipConfig, scramble, unscramble
from ztrain.adapters.splice import SpliceConfig
from ztrain.conditioning import TEXT, Encoded, TokenStates
from ztrain.config import Config, EncodersConfig, ModelConfig, ModelsConfig
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec, TextEncoder
from ztrain.frozen.sources import Source
from ztrain.frozen.states import VISION_LANGUAGE, Encoders
from ztrain.frozen.vision_language import SplicedModel
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import load_transformer
from ztrain.model.sampler import SampleSettings, sample

SETTINGS = EncodersConfig(min_reference_pixels=4096, max_reference_pixels=16384)
ALL_READS = frozenset({"reference", "fused", "siglip", "omni"})


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def family_config(family: Path, base: str = "Z-Image-Turbo") -> Config:
    def model(name: str) -> ModelConfig:
        return ModelConfig(pretrained_model_name_or_path=str(family / name))

    models = ModelsConfig(
        base=model(base),
        vision_language=model("Qwen3-VL-4B-Instruct"),
        siglip=model("siglip2-so400m-patch16-naflex"),
    )
    return Config(models=models, encoders=SETTINGS)


@pytest.fixture(scope="module")
def encoded(encoders: Encoders) -> Encoded:
    prompts = ["a red fox", "two green pears on a very long table " * 6, "a boat"]
    references = [[picture(1)], [picture(2, 96, 64), picture(3)], []]
    return encoders.encode(prompts, references, ALL_READS, SETTINGS)


def make_model(family: Path, adapters: list, base: str = "Z-Image-Turbo", seed: int = 0) -> AdaptedDiT:
    dit = load_transformer(Source(str(family / base)), torch.float32, "cpu")
    torch.manual_seed(seed)
    return AdaptedDiT(dit, build_adapters(adapters)).eval()


def noise_like(*sides: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn((16, *side), generator=generator) for side in sides]


SIGMA = torch.tensor([0.9, 0.4, 0.65])
PROJECTOR = ProjectorConfig(hidden_dim=64)
LORA = LoraAdapterConfig(rank=4)
SIGLIP = SiglipConfig(feature_dim=32)


@torch.no_grad()
def test_velocity_equals_diffusers_for_mixed_sizes_and_captions(family: Path, encoded: Encoded) -> None:
    model = make_model(family, [])
    noisy = noise_like((8, 8), (12, 6), (4, 10))
    ours = model(noisy, SIGMA, encoded)
    theirs = model.dit([x.unsqueeze(1) for x in noisy], 1 - SIGMA, encoded.text, return_dict=False)[0]
    for mine, stock in zip(ours, theirs, strict=True):
        assert relative_error(-mine, stock.squeeze(1)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "adapters",
    [[], [SpliceConfig()], [SpliceConfig(states="fused", compose="replace", tokens="all")], [PROJECTOR], [SIGLIP]],
    ids=["none", "splice", "fused", "projector", "siglip"],
)
def test_batch_equals_singles(family: Path, encoded: Encoded, adapters: list) -> None:
    """Also with a sample without references in the batch, which diffusers' omni mode silently gets wrong."""
    model = make_model(family, adapters)
    noisy = noise_like((8, 8), (12, 6), (4, 10))
    together = model(noisy, SIGMA, encoded)
    for i in range(3):
        alone = model([noisy[i]], SIGMA[i : i + 1], encoded.select([i]))[0]
        assert relative_error(together[i], alone) < 1e-5


@torch.no_grad()
def test_siglip_layout_is_basic_mode_plus_tokens_in_row_order(family: Path, encoded: Encoded) -> None:
    """Against diffusers' omni forward with its token scramble undone and its position grids made equal.

    At a caption length divisible by 32 omni mode's caption and image positions are the basic ones (fact 3.4 c); a
    1 x 1 SigLIP grid has the same position in both, so the two forwards must agree.
    """
    model = make_model(family, [SIGLIP])
    caption = torch.randn((32, 48), generator=torch.Generator().manual_seed(1))
    grid = torch.randn((1, 1, 32), generator=torch.Generator().manual_seed(2))
    single = replace(encoded.select([0]), text=[caption], siglip=[[grid]])
    noisy = noise_like((8, 8))
    ours = model(noisy, SIGMA[:1], single)[0]
    theirs = model.dit(
        [[noisy[0].unsqueeze(1)]],
        1 - SIGMA[:1],
        [[caption]],
        siglip_feats=[[grid]],
        image_noise_mask=[[1]],
        return_dict=False,
    )[0]
    assert relative_error(-ours, theirs[0].squeeze(1)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("layout", ["one_segment", "stock"])
def test_token_orders_are_diffusers_own_and_its_inverse(family: Path, encoded: Encoded, layout: str) -> None:
    """One adapter reads both orders; reading a grid in the other one is reading the scrambled grid in this one."""
    config = SiglipConfig(feature_dim=32, layout=layout)
    model = make_model(family, [config])
    noisy, one = noise_like((8, 8)), encoded.select([0])
    grid = torch.randn((2, 3, 32), generator=torch.Generator().manual_seed(2))
    as_diffusers_reads_it = grid.permute(2, 0, 1).reshape(2, 3, 32)

    def velocity(order: str | None, grid: Tensor) -> Tensor:
        model.adapters[0].config = config.model_copy(update={"token_order": order})
        return model(noisy, SIGMA[:1], replace(one, siglip=[[grid]]))[0]

    rows, stock = velocity("rows", grid), velocity("stock", grid)
    assert relative_error(rows, stock) > 1e-3
    if layout == "one_segment":
        assert torch.equal(velocity("rows", as_diffusers_reads_it), stock)
        assert torch.equal(velocity(None, grid), rows)
    else:
        assert torch.equal(velocity("stock", unscramble(grid)), rows)
        assert torch.equal(velocity("rows", scramble(grid)), stock)
        assert torch.equal(velocity(None, grid), stock)
    assert torch.equal(unscramble(scramble(grid)), grid) and torch.equal(scramble(grid), as_diffusers_reads_it)


@torch.no_grad()
def test_stock_without_latents_reads_the_reference_through_siglip_alone(family: Path, encoded: Encoded) -> None:
    model = make_model(family, [SiglipConfig(feature_dim=32, layout="stock_without_latents")])
    noisy, one = noise_like((8, 8)), encoded.select([0])
    other = replace(one, omni=[replace(one.omni[0], latents=[x + 1 for x in one.omni[0].latents])])
    assert torch.equal(model(noisy, SIGMA[:1], one)[0], model(noisy, SIGMA[:1], other)[0])
    changed = replace(one, siglip=[[grid + torch.randn_like(grid) for grid in one.siglip[0]]])
    assert relative_error(model(noisy, SIGMA[:1], changed)[0], model(noisy, SIGMA[:1], one)[0]) > 1e-3
    model.adapters[0].config = SiglipConfig(feature_dim=32, layout="stock")
    assert relative_error(model(noisy, SIGMA[:1], other)[0], model(noisy, SIGMA[:1], one)[0]) > 1e-3


@torch.no_grad()
def test_siglip_tokens_sit_where_their_patch_is(family: Path, encoded: Encoded) -> None:
    """Position ids of a 2 x 3 grid beside a 4 x 6 target: in row order, spread over the target's patches."""
    model = make_model(family, [SIGLIP])
    seen: list[Tensor] = []
    rope = model.dit.rope_embedder
    model.dit.rope_embedder = lambda ids: (seen.append(ids), rope(ids))[1]
    grid = torch.zeros((2, 3, 32))
    model(noise_like((8, 12)), SIGMA[:1], replace(encoded.select([0]), siglip=[[grid, grid]]))
    siglip_ids = seen[-3]  # the target's and the caption's come after
    start = 32 + 2  # a caption of up to 32 tokens, then the image
    assert siglip_ids[:6].tolist() == [[start, r, c] for r in (0, 3) for c in (0, 2, 5)]
    assert siglip_ids[32:38, 0].tolist() == [start + 1] * 6, "a second reference has its own place"
    assert siglip_ids[6:32].eq(0).all(), "padding sits at the origin"


@torch.no_grad()
@pytest.mark.parametrize(
    ("base", "shift", "steps", "guidance", "normalization", "negative_prompt"),
    [
        ("Z-Image", 6.0, 24, 4.0, 0.0, ""),
        ("Z-Image", 6.0, 24, 4.0, 1.0, "a blurred photograph"),
        ("Z-Image", 6.0, 8, 0.5, 0.0, ""),  # diffusers' number: 0.5 guides, where others' 1 is off
        ("Z-Image", 6.0, 8, 0.0, 1.0, ""),
        ("Z-Image-Turbo", 3.0, 8, 0.0, 0.0, ""),
    ],
)
def test_sampler_equals_zimage_pipeline(
    family: Path, base: str, shift: float, steps: int, guidance: float, normalization: float, negative_prompt: str
) -> None:
    """As Base and as Turbo were released, and between."""
    pipeline = ZImagePipeline.from_pretrained(family / base)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.shift == shift
    prompts = ["a red fox", "two pears, one plum and a very long description of the table below them"]
    noise = torch.randn((2, 16, 8, 12), generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        prompt=list(prompts),
        height=64,
        width=96,
        num_inference_steps=steps,
        guidance_scale=guidance,
        cfg_normalization=normalization,
        negative_prompt=[negative_prompt] * len(prompts),
        latents=noise.clone(),
        output_type="latent",
    ).images
    encoders = Encoders(TextEncoder(pipeline.text_encoder, pipeline.tokenizer, 512), LatentCodec(pipeline.vae))
    encoded = encoders.encode(prompts, [[], []], frozenset(), SETTINGS, negative_prompt=negative_prompt)
    settings = SampleSettings(
        num_inference_steps=steps, shift=shift, guidance_scale=guidance, guidance_normalization=normalization
    )
    ours = sample(AdaptedDiT(pipeline.transformer, []), encoded, list(noise), settings)
    assert relative_error(torch.stack(ours), theirs) < 1e-4


@torch.no_grad()
def test_sampler_window_equals_diffusers_truncation(family: Path) -> None:
    pipeline = ZImagePipeline.from_pretrained(family / "Z-Image-Turbo")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        prompt="a boat", height=64, width=64, num_inference_steps=8, guidance_scale=4.0, cfg_truncation=0.4,
        latents=noise.clone(), output_type="latent",
    ).images  # fmt: skip
    encoders = Encoders(TextEncoder(pipeline.text_encoder, pipeline.tokenizer, 512), LatentCodec(pipeline.vae))
    encoded = encoders.encode(["a boat"], [[]], frozenset(), SETTINGS)
    model = AdaptedDiT(pipeline.transformer, [])
    window = SampleSettings(num_inference_steps=8, shift=3.0, guidance_scale=4.0, guidance_window=(0.6, 1.0))
    assert relative_error(torch.stack(sample(model, encoded, list(noise), window)), theirs) < 1e-4
    everywhere = replace(window, guidance_window=(0.0, 1.0))
    assert relative_error(torch.stack(sample(model, encoded, list(noise), everywhere)), theirs) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_sampler_equals_img2img_pipeline(family: Path, strength: float, guidance: float) -> None:
    pipeline = ZImageImg2ImgPipeline.from_pretrained(family / "Z-Image-Turbo")
    pipeline.set_progress_bar_config(disable=True)
    encoders = Encoders(TextEncoder(pipeline.text_encoder, pipeline.tokenizer, 512), LatentCodec(pipeline.vae))
    start = encoders.codec.encode(picture(4))
    settings = SampleSettings(num_inference_steps=8, shift=3.0, guidance_scale=guidance, strength=strength)
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    encoded = encoders.encode(["a boat"], [[]], frozenset(), SETTINGS)
    ours = sample(AdaptedDiT(pipeline.transformer, []), encoded, list(noise), settings, start=[start])
    # The pipeline samples the posterior, so it gets the noised latents from its own scheduler's arithmetic.
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8).tolist())
    skipped = int(max(8 - min(8 * strength, 8), 0))
    timestep = pipeline.scheduler.timesteps[skipped : skipped + 1]
    theirs = pipeline(
        prompt="a boat", image=picture(4), strength=strength, height=64, width=64, num_inference_steps=8,
        guidance_scale=guidance, latents=pipeline.scheduler.scale_noise(start.unsqueeze(0), timestep, noise),
        output_type="latent",
    ).images  # fmt: skip
    assert relative_error(torch.stack(ours), theirs) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 2])
def test_stock_layout_equals_omni_pipeline(family: Path, count: int) -> None:
    """The option for official weights: same segments, clean latents, token order and flags as the pipeline's, whose
    negative keeps the references."""
    pipeline = ZImageOmniPipeline.from_pretrained(family / "Z-Image-Omni-Base")
    pipeline.set_progress_bar_config(disable=True)
    # The pipeline feeds its VAE bfloat16 whatever the VAE's dtype is (fact 3.3).
    encode = pipeline.vae.encode
    pipeline.vae.encode = lambda x: encode(x.float())
    images = [picture(7, 80, 64), picture(8)][:count]
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        image=images or None, prompt="a boat", height=64, width=64, num_inference_steps=4, guidance_scale=2.0,
        negative_prompt="a blurred photograph", latents=noise.clone(), output_type="latent",
    ).images  # fmt: skip
    pipeline.vae.encode = encode
    config = family_config(family, "Z-Image-Omni-Base")
    adapter = SiglipConfig(feature_dim=32, init="checkpoint", layout="stock")
    encoders = Encoders.load(config, adapter.reads, torch.float32, "cpu")
    encoded = encoders.encode(["a boat"], [images], adapter.reads, SETTINGS, negative_prompt="a blurred photograph")
    settings = SampleSettings(num_inference_steps=4, shift=6.0, guidance_scale=2.0, negative="reference")
    model = make_model(family, [adapter], "Z-Image-Omni-Base")
    ours, neither = (
        torch.stack(sample(model, encoded, list(noise), each))
        for each in (settings, replace(settings, negative="neither"))
    )
    # The pipeline rounds references to bfloat16 before its VAE; ours does not, hence the wider bound with images.
    bound = 1e-4 if count == 0 else 1e-3
    assert relative_error(ours, theirs) < bound
    assert (relative_error(neither, theirs) < bound) == (count == 0)


@torch.no_grad()
def test_stock_layout_never_mixes_samples_with_and_without_references(family: Path, encoded: Encoded) -> None:
    adapter = SiglipConfig(feature_dim=32, init="checkpoint", layout="stock")
    model = make_model(family, [adapter], "Z-Image-Omni-Base")
    noisy = noise_like((8, 8), (8, 8), (8, 8))
    for order in ([0, 1, 2], [2, 1, 0]):
        together = model([noisy[i] for i in order], SIGMA[order], encoded.select(order))
        for place, i in enumerate(order):
            alone = model([noisy[i]], SIGMA[i : i + 1], encoded.select([i]))[0]
            assert relative_error(together[place], alone) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("index", [1, 3, 5, 6])
def test_spliced_model_on_text_is_the_text_encoder_bit_for_bit(encoders: Encoders, index: int) -> None:
    ids = encoders.text.tokenizer("a red fox jumps", return_tensors="pt").input_ids
    text = encoders.text.model
    reference = text(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[index][0]
    embeds = text.embed_tokens(ids)
    settings = SETTINGS.model_copy(update={"hidden_index": index})
    assert torch.equal(encoders[VISION_LANGUAGE].decode(embeds, settings), reference)
    three_axes = torch.arange(ids.shape[1]).expand(3, 1, -1)
    assert torch.equal(encoders[VISION_LANGUAGE].decode(embeds, settings, positions=three_axes), reference)
    other = settings.model_copy(update={"rope_theta": "vl"})
    assert not torch.equal(encoders[VISION_LANGUAGE].decode(embeds, other), reference)


@torch.no_grad()
@pytest.mark.parametrize("theta", ["text_encoder", "vl"])
def test_splice_equals_load_state_dict_on_the_stock_class(family: Path, encoders: Encoders, theta: str) -> None:
    """The splice as the background text writes it, on Qwen3VLForConditionalGeneration itself, image in the sequence."""
    stock = Qwen3VLForConditionalGeneration.from_pretrained(family / "Qwen3-VL-4B-Instruct").eval()
    stock.model.language_model.load_state_dict(encoders.text.model.state_dict(), strict=True)
    spliced = encoders[VISION_LANGUAGE]
    assert spliced is not None
    if theta == "text_encoder":
        rotary = stock.model.language_model.rotary_emb
        rotary.inv_freq = encoders.text.model.rotary_emb.inv_freq.clone()
    pixels, grid = spliced._pixels([picture(1, 96, 64)], SETTINGS)
    ids = spliced._ids([int(grid.prod()) // 4], "a boat", SETTINGS)
    types = (ids == spliced.ids["<|image_pad|>"]).int()
    theirs = stock(
        input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=types,
        output_hidden_states=True, use_cache=False,
    ).hidden_states  # fmt: skip
    for index in (4, 5, 6):  # 1 to 3 are captured before DeepStack is added (fact 4)
        settings = SETTINGS.model_copy(update={"rope_theta": theta, "hidden_index": index})
        ours = spliced.encode([picture(1, 96, 64)], "a boat", settings)
        assert relative_error(ours.states, theirs[index][0]) < 1e-5
        assert int((ours.kinds == 1).sum()) == int(types.sum())
        assert int((ours.kinds == 2).sum()) == 2


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [{"positions": "1d"}, {"deepstack": False}, {"marker_rows": "vl"}, {"rope_theta": "vl"}, {"hidden_index": 4},
     {"fused_order": "prompt_first"}, {"max_reference_pixels": 4096}, {"text_hidden_index": 3}],
    ids=str,
)  # fmt: skip
def test_every_encoder_setting_changes_the_states(encoders: Encoders, change: dict) -> None:
    before = encoders[VISION_LANGUAGE].encode([picture(1, 96, 96)], "a boat", SETTINGS)
    after = encoders[VISION_LANGUAGE].encode([picture(1, 96, 96)], "a boat", SETTINGS.model_copy(update=change))
    assert before is not None and after is not None
    assert before.states.shape != after.states.shape or relative_error(after.states, before.states) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("index", "of_text"), [(None, 2), (2, 6), (4, 3)])
def test_image_and_text_tokens_are_read_at_layers_of_their_own(
    encoders: Encoders, index: int | None, of_text: int
) -> None:
    """Each token is bit for bit what the whole sequence read at its layer has there."""

    def states(**layers: int | None) -> TokenStates:
        return encoders[VISION_LANGUAGE].encode([picture(1, 96, 64)], "a boat", SETTINGS.model_copy(update=layers))

    both = states(hidden_index=index, text_hidden_index=of_text)
    images, texts = states(hidden_index=index), states(hidden_index=of_text)
    is_text = both.kinds == TEXT
    assert int(is_text.sum()) > 5 and int((~is_text).sum()) == 6 + 2
    assert torch.equal(both.states[~is_text], images.states[~is_text])
    assert torch.equal(both.states[is_text], texts.states[is_text])
    assert not torch.equal(texts.states[is_text], images.states[is_text])
    same = states(hidden_index=of_text, text_hidden_index=of_text)
    assert torch.equal(same.states, texts.states)
    with pytest.raises(InputError, match="encoders.text_hidden_index is 7"):
        states(text_hidden_index=7)


@torch.no_grad()
def test_lists_that_start_at_the_splice_equal_it_bit_for_bit(family: Path, encoded: Encoded) -> None:
    noisy = noise_like((8, 8), (12, 6), (4, 10))
    splice = make_model(family, [SpliceConfig()])(noisy, SIGMA, encoded)
    for adapters in ([PROJECTOR], [SpliceConfig(), LORA]):
        other = make_model(family, adapters)(noisy, SIGMA, encoded)
        assert all(torch.equal(a, b) for a, b in zip(splice, other, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    ("adapters", "without"),
    [
        ([SpliceConfig()], []),
        ([SpliceConfig(compose="blend", states="fused", tokens="all")], []),
        ([PROJECTOR], []),
        ([SpliceConfig(), LORA], [SpliceConfig()]),
        ([SIGLIP], []),
        ([LORA.model_copy(update={"peft": {"use_dora": True}})], []),
    ],
    ids=["splice", "blend", "projector", "lora", "siglip", "dora"],
)
def test_scale_zero_is_absence_bit_for_bit_and_between_is_between(
    family: Path, encoded: Encoded, adapters: list, without: list
) -> None:
    noisy = noise_like((8, 8), (12, 6), (4, 10))
    model = make_model(family, adapters)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    absent = make_model(family, without)(noisy, SIGMA, encoded)
    full = model(noisy, SIGMA, encoded)
    scales = [1.0] * (len(adapters) - 1)
    model.set_scales([*scales, 0.5])
    half = model(noisy, SIGMA, encoded)
    model.set_scales([*scales, 0.0])
    zero = model(noisy, SIGMA, encoded)
    model.set_scales([*scales, 1.0])
    again = model(noisy, SIGMA, encoded)
    assert all(torch.equal(a, b) for a, b in zip(zero, absent, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again, full, strict=True))
    assert relative_error(half[0], full[0]) > 1e-4 and relative_error(half[0], absent[0]) > 1e-4
    if adapters != without:
        distances = [
            float((h - a).abs().mean() / (f - a).abs().mean()) for h, a, f in zip(half, absent, full, strict=True)
        ]
        assert 0.05 < distances[0] < 1.2


@torch.no_grad()
def test_attention_scale_near_zero_forgets_the_tokens(family: Path, encoded: Encoded) -> None:
    """The log-scale bias: at 1e-6 the main layers no longer see the reference, at 1 it is the plain model."""
    noisy = noise_like((8, 8), (12, 6), (4, 10))
    model = make_model(family, [SIGLIP])
    full = model(noisy, SIGMA, encoded)
    plain = make_model(family, [])(noisy, SIGMA, encoded)
    model.set_scales([1e-6])
    faint = model(noisy, SIGMA, encoded)
    assert relative_error(faint[0], plain[0]) < 1e-4 < relative_error(full[0], plain[0])


@pytest.mark.parametrize("adapters", [[PROJECTOR], [SpliceConfig(), LORA], [SIGLIP, LORA]], ids=["p", "l", "sl"])
def test_gradient_checkpointing_gives_the_same_gradients(family: Path, encoded: Encoded, adapters: list) -> None:
    noisy = noise_like((8, 8), (12, 6), (4, 10))
    gradients = []
    for checkpointing in (False, True):
        model = make_model(family, adapters).train()
        if checkpointing:
            model.dit.enable_gradient_checkpointing()
        sum(v.square().mean() for v in model(noisy, SIGMA, encoded)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@torch.no_grad()
@pytest.mark.parametrize("adapters", [[], [PROJECTOR], [SIGLIP], [SIGLIP, LORA]], ids=["none", "p", "s", "sl"])
def test_main_layers_stay_in_the_bases_precision(family: Path, encoded: Encoded, adapters: list) -> None:
    """Float32 adapter weights on a bf16 base must not promote the whole sequence to float32."""
    dit = load_transformer(Source(str(family / "Z-Image-Turbo")), torch.bfloat16, "cpu")
    model = AdaptedDiT(dit, build_adapters(adapters)).eval()
    seen: list[torch.dtype] = []
    for layer in dit.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    noisy = noise_like((8, 8), (12, 6), (4, 10))
    output = model(noisy, SIGMA, encoded)
    assert set(seen) == {torch.bfloat16} and output[0].dtype == torch.bfloat16
    exact = make_model(family, adapters)(noisy, SIGMA, encoded)
    assert relative_error(output[0].float(), exact[0]) < 0.1


@torch.no_grad()
def test_stock_segments_beyond_the_room_are_refused_on_the_host(family: Path, encoded: Encoded) -> None:
    adapter = SiglipConfig(feature_dim=32, init="checkpoint", layout="stock")
    model = make_model(family, [adapter], "Z-Image-Omni-Base")
    one = encoded.select([0])

    def with_segment(length: int) -> Encoded:
        first, _, last = one.omni[0].segments
        return replace(one, omni=[replace(one.omni[0], segments=[first, torch.zeros((length, 48)), last])])

    longest = (1536 - 1 - len(one.omni[0].segments[0]) - 2) // 32 * 32 - 32
    assert model(noise_like((8, 8)), SIGMA[:1], with_segment(longest))[0].isfinite().all()
    with pytest.raises(InputError, match="do not fit the DiT's 1536 positions"):
        model(noise_like((8, 8)), SIGMA[:1], with_segment(1542))


@torch.no_grad()
def test_splice_reads_a_sharded_checkpoint_and_only_what_it_needs(
    family: Path, encoders: Encoders, tmp_path: Path
) -> None:
    """As the real repository is stored: several shards and an index; shards of the language model stay untouched."""
    folder = family / "Qwen3-VL-4B-Instruct"
    stock = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    stock.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for key, file in index.items() if "visual." in key or key.endswith("embed_tokens.weight")}
    unneeded = set(index.values()) - needed
    assert len(needed) > 1 and unneeded
    for file in unneeded:
        (tmp_path / file).unlink()
    sharded = SplicedModel(Source(str(tmp_path)), encoders.text.model, encoders.text.tokenizer)
    settings = SETTINGS.model_copy(update={"marker_rows": "vl"})
    ours, reference = (
        sharded.encode([picture(1)], "a boat", settings),
        encoders[VISION_LANGUAGE].encode([picture(1)], "a boat", settings),
    )
    assert reference is not None and torch.equal(ours.states, reference.states)
