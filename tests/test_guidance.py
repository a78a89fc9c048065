"""Guidance and windows: what each velocity leads away from, in closed form on a linear model and on tiny real ones."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.test_parity import (
    LORA,
    PROJECTOR,
    SETTINGS,
    SIGLIP,
    make_model,
    noise_like,
    picture,
    relative_error,
)
from tests.test_sampling import LISTS, STEPS
from ztrain.adapters.siglip import SiglipConfig
from ztrain.conditioning import Encoded, concatenate
from ztrain.config import SampleConfig, list_reads
from ztrain.errors import InputError
from ztrain.frozen.sources import BaseDefaults
from ztrain.frozen.states import Encoders
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.sampler import SampleSettings, released_or, sample

NEGATIVES = ("neither", "reference", "base")
OMNI = [SiglipConfig(feature_dim=32, init="checkpoint", layout="stock")]
AWAY = "a blurred photograph"


# --- closed forms -----------------------------------------------------------------------------------------------------

PROMPT, EMPTY, REFERENCE, LORAS = 2.0, 0.5, 8.0, 32.0
"""What each adds to the toy's velocity."""


class Toy:
    """A velocity is the sum of what is read and, unless it is the base's, of what the list adds. It notes each call:
    whose it is, its samples, and how many of them have a reference."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]:
        return self._sums("list", noisy, encoded, [LORAS + sum(map(float, grids)) for grids in encoded.siglip])

    def base_velocity(self, noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]:
        return self._sums("base", noisy, encoded, [0.0] * len(noisy))

    def _sums(self, name: str, noisy: Sequence[Tensor], encoded: Encoded, added: list[float]) -> list[Tensor]:
        self.calls.append((name, len(noisy), sum(encoded.with_reference)))
        return [torch.full_like(x, float(t) + a) for x, t, a in zip(noisy, encoded.text, added, strict=True)]


def toy_sample(has_reference: bool) -> Encoded:
    prompt = Encoded.of_prompts([torch.tensor(PROMPT)], torch.tensor(EMPTY))
    return replace(prompt, siglip=[[torch.full((1, 1, 1), REFERENCE)]]) if has_reference else prompt


@pytest.mark.parametrize(
    ("negative", "away", "calls"),
    [
        # What is subtracted with a reference and without one; the calls of a step.
        ("neither", (EMPTY + LORAS, EMPTY + LORAS), [("list", 6, 1)]),
        ("reference", (EMPTY + REFERENCE + LORAS, EMPTY + LORAS), [("list", 6, 2)]),
        ("base", (EMPTY, EMPTY), [("list", 4, 1), ("base", 2, 0)]),
    ],
)
def test_guidance_in_closed_form(negative: str, away: tuple[float, float], calls: list) -> None:
    """Samples with and without a reference in one batch, one step from noise: latents = noise - velocity."""
    text, image, noise = 3.0, 0.25, noise_like((2, 2), (2, 4))
    settings = SampleSettings(num_inference_steps=1, shift=3.0, guidance_scale=text, image_guidance_scale=image)
    settings = replace(settings, negative=negative)
    both = concatenate([toy_sample(True), toy_sample(False)])

    def velocities(change: dict, encoded: Encoded = both) -> list[float]:
        toy.calls.clear()
        found = sample(toy, encoded, noise, replace(settings, **change))
        return [float((n - x).mean()) for n, x in zip(noise, found, strict=True)]

    toy = Toy()
    positive = [PROMPT + LORAS + REFERENCE, PROMPT + LORAS]
    of_text = [text * (p - a) for p, a in zip(positive, away, strict=True)]
    of_image = [image * REFERENCE, 0.0]
    guided = [sum(parts) for parts in zip(positive, of_text, of_image, strict=True)]
    assert velocities({}) == pytest.approx(guided, rel=1e-5) and sorted(toy.calls) == sorted(calls)
    # Each number alone; guidance away from a reference that is not there costs nothing; nothing in an empty window.
    only_text = [p + t for p, t in zip(positive, of_text, strict=True)]
    assert velocities({"image_guidance_scale": 0.0}) == pytest.approx(only_text, rel=1e-5)
    assert velocities({"guidance_scale": 0.0}) == pytest.approx(
        [positive[0] + of_image[0], positive[1]], rel=1e-5
    ) and toy.calls == [("list", 4, 1)]
    bare = concatenate([toy_sample(False)] * 2)
    assert velocities({}, bare) == pytest.approx([only_text[1]] * 2, rel=1e-5)
    assert sum(count for _, count, _ in toy.calls) == 4
    assert velocities({"guidance_window": (0.5, 0.5)}) == pytest.approx(positive, rel=1e-5)
    assert toy.calls == [("list", 2, 1)]
    # Outside the list's window all is the base's, and one call.
    base = PROMPT + text * (PROMPT - EMPTY)
    assert velocities({"reference_window": (0.0, 0.5)}) == pytest.approx([base] * 2, rel=1e-5)
    assert toy.calls == [("base", 4, 0)]


def test_each_step_asks_for_what_its_sigma_needs() -> None:
    toy, one = Toy(), toy_sample(True)
    guided = replace(STEPS, guidance_scale=2.0, image_guidance_scale=1.5)
    # Steps begin at sigma 1, 0.9, 0.75 and 0.5.
    sample(toy, one, noise_like((2, 2)), replace(guided, reference_window=(0.0, 0.8), guidance_window=(0.6, 0.95)))
    assert toy.calls == [("base", 1, 0), ("base", 2, 0), ("list", 3, 1), ("list", 1, 1)]


# --- tiny real models -------------------------------------------------------------------------------------------------


def awake(family: Path, adapters: list, base: str = "Z-Image-Turbo") -> AdaptedDiT:
    """With weights that all do something: a LoRA's and a projector's last ones start at zero."""
    model = make_model(family, adapters, base)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "negative_prompt"), [("fused", ""), *((name, AWAY) for name in ["none", *LISTS, "lora", "omni"])]
)
def test_each_negative_is_read_from_its_own_prompt_and_references(
    family: Path, encoders: Encoders, name: str, negative_prompt: str
) -> None:
    """Each velocity of the formula from a call of its own, its inputs encoded for it alone, the base without a list."""
    adapters = {"none": [], "lora": [LORA], "omni": OMNI, **LISTS}[name]
    base = "Z-Image-Omni-Base" if name == "omni" else "Z-Image-Turbo"
    model, plain, noise, sigma = awake(family, adapters, base), make_model(family, [], base), noise_like((8, 8)), 1.0
    images = [picture(1), picture(2, 96, 160)]

    def encode(prompt: str, references: list, **more: str) -> Encoded:
        return encoders.encode([prompt], [references], list_reads(adapters), SETTINGS, **more)

    def velocity(of: AdaptedDiT, prompt: str, references: list) -> Tensor:
        return of(noise, torch.tensor([sigma]), encode(prompt, references))[0]

    negatives = {
        "neither": velocity(model, negative_prompt, []),
        "reference": velocity(model, negative_prompt, images),
        "base": velocity(plain, negative_prompt, []),
    }
    positive, no_image = (velocity(model, "a red fox", references) for references in (images, []))
    settings = SampleSettings(num_inference_steps=1, shift=3.0, guidance_scale=2.0, image_guidance_scale=1.5)
    given = encode("a red fox", images, negative_prompt=negative_prompt)
    for negative, away in negatives.items():
        found = sample(model, given, noise, replace(settings, negative=negative))[0]
        expected = noise[0] - (positive + 2.0 * (positive - away) + 1.5 * (positive - no_image))
        assert relative_error(found, expected) < 1e-4, negative
    assert (relative_error(negatives["reference"], negatives["neither"]) > 1e-3) == bool(list_reads(adapters))
    # diffusers' omni layout is not the plain one either, also without a reference.
    acts_alone = LORA in adapters or name == "omni"
    assert (relative_error(negatives["base"], negatives["neither"]) > 1e-3) == acts_alone


@torch.no_grad()
@pytest.mark.parametrize("adapters", [[SIGLIP, LORA], [LORA], [PROJECTOR]], ids=["siglip_lora", "lora", "projector"])
def test_outside_its_window_the_list_is_off(family: Path, encoders: Encoders, adapters: list) -> None:
    """Bit for bit the base with the prompt, also inside guidance; then the list, at the scales that it had."""
    model, plain, noise = awake(family, adapters), make_model(family, []), noise_like((8, 8))
    one = encoders.encode(["a red fox"], [[picture(1)]], list_reads(adapters), SETTINGS)
    scales = [0.7, 0.9][: len(adapters)]
    model.set_scales(scales)
    guided = replace(STEPS, guidance_scale=2.0, image_guidance_scale=1.5)
    of_base = sample(plain, one.without_reference(), noise, guided)[0]
    for guided in (replace(guided, negative=negative) for negative in NEGATIVES):
        for at in (0.0, 0.75, 1.0):
            off = sample(model, one, noise, replace(guided, reference_window=(at, at)))[0]
            assert torch.equal(off, of_base), "zero width"
    by_hand = noise
    for sigma, following in ((1.0, 0.9), (0.9, 0.75), (0.75, 0.5), (0.5, 0.0)):
        velocity = (model if sigma <= 0.8 else plain)(by_hand, torch.tensor([sigma]), one)[0]
        by_hand = [by_hand[0] + (following - sigma) * velocity]
    early = sample(model, one, noise, replace(STEPS, reference_window=(0.0, 0.8)))[0]
    assert relative_error(early, by_hand[0]) < 1e-5
    assert min(relative_error(early, sample(other, one, noise, STEPS)[0]) for other in (model, plain)) > 1e-3
    assert [adapter.scale for adapter in model.adapters] == scales


@torch.no_grad()
def test_a_window_of_zero_width_is_no_guidance_even_where_a_step_lies_on_it(family: Path, encoders: Encoders) -> None:
    model, noise = make_model(family, LISTS["splice"]), noise_like((8, 8))
    one = encoders.encode(["a red fox"], [[picture(1)]], model.adapters[0].config.reads, SETTINGS)
    plain = sample(model, one, noise, STEPS)[0]
    guided = replace(STEPS, guidance_scale=2.0, image_guidance_scale=1.5)
    assert relative_error(sample(model, one, noise, guided)[0], plain) > 1e-3
    on_steps = [3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5)]
    for at in (0.0, 0.3, *on_steps, float(torch.tensor(on_steps[1]))):
        assert torch.equal(sample(model, one, noise, replace(guided, guidance_window=(at, at)))[0], plain), at
    halves = [sample(model, one, noise, replace(guided, guidance_window=w))[0] for w in ((0.0, 0.6), (0.6, 1.0))]
    assert all(relative_error(half, plain) > 1e-3 for half in halves) and not torch.equal(*halves)


# --- settings and what names pictures ---------------------------------------------------------------------------------

TURBO, BASE = BaseDefaults("turbo", 3.0, 8, 0.0), BaseDefaults("base", 6.0, 50, 4.0)


def test_every_key_of_the_section_reaches_the_sampler() -> None:
    given = {
        "num_inference_steps": 9, "shift": 5.0, "guidance_scale": 1.5, "negative": "base", "negative_prompt": AWAY,
        "image_guidance_scale": 2.5, "guidance_normalization": 0.5, "guidance_window": (0.1, 0.9),
        "reference_window": (0.2, 0.8), "strength": 0.7,
    }  # fmt: skip
    assert asdict(released_or(SampleConfig(**given), TURBO)) == given
    assert released_or(SampleConfig(), TURBO) == SampleSettings(num_inference_steps=8, shift=3.0)
    assert released_or(SampleConfig(), BASE) == SampleSettings(num_inference_steps=50, shift=6.0, guidance_scale=4.0)
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match="shift"):
            SampleConfig(shift=wrong)


def test_a_negative_prompt_that_nothing_reads_is_refused() -> None:
    said = "negative_prompt is what text guidance leads away from, and guidance_scale is 0"
    with pytest.raises(InputError, match=f"{said}, as for every Turbo; set"):
        released_or(SampleConfig(negative_prompt=AWAY), TURBO)
    with pytest.raises(InputError, match=f"{said}; set sample.guidance_scale above 0, or leave out"):
        released_or(SampleConfig(negative_prompt=AWAY, guidance_scale=0.0), BASE)
    assert released_or(SampleConfig(negative_prompt=AWAY), BASE).negative_prompt == AWAY


def test_pictures_keep_their_names_where_nothing_changes_them_and_only_there() -> None:
    """Drawn before there was `negative`, without guidance: the very same keys. Everything else is drawn anew."""
    windows = {"guidance_window": (0.0, 1.0), "reference_window": (0.0, 1.0)}
    before = {
        "num_inference_steps": 8, "shift": 3.0, "guidance_scale": 0.0, "image_guidance_scale": 1.0,
        "guidance_normalization": 0.0, **windows, "strength": 1.0,
    }  # fmt: skip
    unguided = SampleSettings(num_inference_steps=8, shift=3.0, image_guidance_scale=1.0)
    for negative in NEGATIVES:
        assert replace(unguided, negative=negative).decided == before
    guided = replace(unguided, guidance_scale=4.0)
    others = [replace(guided, negative=negative) for negative in NEGATIVES]
    others += [replace(guided, negative_prompt=AWAY), replace(unguided, reference_window=(0.0, 0.8))]
    told = [each.decided for each in others]
    assert all(told.count(each) == 1 for each in told)
    for each, settings in zip(told, others, strict=True):
        kept = {name: value for name, value in asdict(settings).items() if not name.startswith("negative")}
        assert each != kept, "the keys of before, under which another picture was drawn"
