"""What makes big batches cheap changes no number: batches against singles, and how many operations they dispatch."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_parity import LORA, PROJECTOR, SIGLIP, encoded, make_model, noise_like, picture, relative_error
from ztrain.adapters.splice import SpliceConfig
from ztrain.cache.order import SampleKey
from ztrain.conditioning import Encoded
from ztrain.errors import InputError
from ztrain.frozen.states import Encoders
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.fast.blocks import use_fast_blocks
from ztrain.model.flow import LossWeight, SigmaDensity, draw_sigma, draw_sigmas, velocity_losses
from ztrain.model.sampler import SampleSettings, sample

__all__ = ["encoded"]  # fixtures
SIGMA = torch.tensor([0.9, 0.4, 0.65, 0.2, 0.7])


class Dispatched(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not function.is_view:
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def mixed(count: int = 5) -> Encoded:
    """Captions of 20, 32, 40, 64 and 7 tokens; no, one and two references of different grids."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    text = [normal(length, 48) for length in (20, 32, 40, 64, 7)]
    siglip = [[normal(4, 4, 32)], [], [normal(3, 5, 32), normal(8, 5, 32)], [normal(4, 8, 32)], [normal(1, 6, 32)]]
    absent: list = [None] * 5
    whole = Encoded(text=text, null_text=text[0], reference=absent, fused=absent, siglip=siglip)
    return whole.select(range(count))


def uniform(count: int, references: int) -> Encoded:
    generator = torch.Generator().manual_seed(2)
    text = list(torch.randn((count, 20, 48), generator=generator))
    grids = torch.randn((count, references, 4, 4, 32), generator=generator)
    absent: list = [None] * count
    siglip = [list(sample) for sample in grids]
    return Encoded(text=text, null_text=text[0], reference=absent, fused=absent, siglip=siglip)


def gradients(model: AdaptedDiT, noisy: list[Tensor], sigma: Tensor, states: Encoded) -> dict[str, Tensor | None]:
    """Of everything, base and pad tokens included, for a loss that tells samples apart."""
    model.zero_grad()
    velocity = model(noisy, sigma, states)
    noise = [torch.full_like(x, 0.5) for x in noisy]
    (velocity_losses(velocity, noisy, noise, sigma) * (1 + sigma)).sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_gradients_of_a_mixed_batch_are_the_sums_of_its_samples(family: Path, scale: float) -> None:
    model = make_model(family, [SIGLIP]).requires_grad_(True).double()
    model.set_scales([scale])
    states = _double(mixed())
    noisy = [x.double() for x in noise_like((8, 8), (8, 8), (12, 6), (4, 10), (8, 8))]
    together = gradients(model, noisy, SIGMA, states)
    singles = [gradients(model, [noisy[i]], SIGMA[i : i + 1], states.select([i])) for i in range(5)]
    for name, gradient in together.items():
        parts = [single[name] for single in singles if single[name] is not None]
        assert gradient is not None and parts, name
        assert torch.allclose(gradient, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-7), name


# Dynamo asks intermediate tensors for their gradient, which torch warns of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_real_rotary_products_are_diffusers_complex_ones(family: Path) -> None:
    """Gradients of mixed sizes, captions and references, and diffusers' own forward on the same models."""
    states, noisy = mixed(), noise_like((8, 8), (8, 8), (12, 6), (4, 10), (8, 8))
    models = [make_model(family, [SIGLIP]).requires_grad_(True) for _ in range(2)]
    use_fast_blocks(models[1].dit, backend="eager")
    expected, found = (gradients(model, noisy, SIGMA, states) for model in models)
    for name, gradient in expected.items():
        other = found[name]
        assert gradient is not None and other is not None
        assert (gradient - other).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    sizes = [x.unsqueeze(1) for x in noisy[:2]]
    with torch.no_grad():
        plain = [model.dit(sizes, SIGMA[:2], states.text[:2], return_dict=False)[0] for model in models]
        for one, other in zip(*plain, strict=True):
            assert relative_error(other, one) < 1e-6


def _double(states: Encoded) -> Encoded:
    return replace(
        states,
        text=[x.double() for x in states.text],
        siglip=[[grid.double() for grid in grids] for grids in states.siglip],
    )


@pytest.mark.parametrize("references", [0, 1, 2])
def test_pad_tokens_have_gradients_without_padding_and_nothing_is_masked(family: Path, references: int) -> None:
    """Captions of 32 tokens and 32 patches need none; masks would turn fast kernels off."""
    model = make_model(family, [SIGLIP] if references else []).requires_grad_(True)
    states = uniform(4, references)
    states = replace(states, text=[torch.cat([x, x[:12]]) for x in states.text])
    if references:
        states = replace(states, siglip=[[g.repeat(2, 1, 1) for g in grids] for grids in states.siglip])
    masks: list[Any] = []
    for block in [*model.dit.layers, *model.dit.noise_refiner, *model.dit.context_refiner]:
        block.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[1]))
    found = gradients(model, noise_like(*[(8, 16)] * 4), SIGMA[:4], states)
    assert masks and all(mask is None for mask in masks)
    pads = [gradient for name, gradient in found.items() if name.endswith("pad_token")]
    assert len(pads) == (3 if references else 2)
    assert all(gradient is not None and not gradient.any() for gradient in pads)


@pytest.mark.parametrize("references", [0, 1])
def test_operations_do_not_grow_with_an_even_batch(family: Path, references: int) -> None:
    """Forward, loss and backward; also with captions of different lengths."""
    model = make_model(family, [SIGLIP] if references else []).requires_grad_(True)

    def count(batch: int, uneven: bool) -> int:
        states = uniform(batch, references)
        if uneven:
            states = replace(states, text=[x[: 18 + i % 3] for i, x in enumerate(states.text)])
        noisy, sigma = noise_like(*[(8, 8)] * batch), torch.linspace(0.1, 0.9, batch)
        latents, noise = noise_like(*[(8, 8)] * batch), noise_like(*[(8, 8)] * batch)
        with Dispatched() as dispatched:
            velocity_losses(model(noisy, sigma, states), latents, noise, sigma).mean().backward()
        model.zero_grad()
        return sum(dispatched.counts.values())

    count(1, False)  # diffusers builds its rotary table in the first call
    for uneven in (False, True):
        assert count(64, uneven) == count(4, uneven)


@torch.no_grad()
def test_equal_neighbours_do_not_need_an_order(family: Path) -> None:
    """The same samples in any order give the same velocities, whatever stands next to what."""
    model, states = make_model(family, [SIGLIP]), mixed()
    noisy = noise_like((8, 8), (12, 6), (8, 8), (8, 8), (12, 6))
    output = model(noisy, SIGMA, states)
    order = [3, 1, 4, 0, 2]
    moved = model([noisy[i] for i in order], SIGMA[order], states.select(order))
    for place, i in enumerate(order):
        assert moved[place].shape == noisy[i].shape
        assert relative_error(moved[place], output[i]) < 1e-5


@torch.no_grad()
def test_any_input_dtype_is_cast_to_the_weights(family: Path, encoded: Encoded) -> None:
    for adapters in ([], [PROJECTOR], [SIGLIP], [SpliceConfig(), LORA]):
        model = make_model(family, adapters)
        noisy = [x.to(torch.bfloat16) for x in noise_like((8, 8), (12, 6), (4, 10))]
        exact = model([x.float() for x in noisy], SIGMA[:3], encoded)
        assert all(torch.equal(a, b) for a, b in zip(model(noisy, SIGMA[:3], encoded), exact, strict=True))


def test_losses_are_each_samples_own_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    sides = [(4, 4), (4, 4), (2, 6), (4, 4), (2, 6)]
    velocity, latents, noise = ([torch.randn((16, *s), generator=generator) for s in sides] for _ in range(3))
    bump = LossWeight("bump")
    losses = velocity_losses(velocity, latents, noise, SIGMA, bump)
    singles = zip(velocity, latents, noise, strict=True)
    expected = torch.stack([(v - (n - x)).square().mean() for v, x, n in singles]) * bump(SIGMA)
    assert torch.allclose(losses, expected, rtol=1e-6)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "scheduler_table"])
def test_a_batch_of_sigmas_has_the_same_density(sampling: str) -> None:
    density = SigmaDensity(sampling, shift=3.0, logit_mean=0.3, logit_std=0.8)  # type: ignore[arg-type]
    drawn = draw_sigmas(20000, density, torch.Generator().manual_seed(0))
    counted = draw_sigma([SampleKey(0, 0, i) for i in range(4000)], density)
    assert drawn.shape == (20000,) and drawn.dtype == torch.float32 and 0 < drawn.min() and drawn.max() <= 1
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    assert torch.allclose(drawn.quantile(quantiles), counted.quantile(quantiles), atol=0.03)
    assert torch.equal(drawn, draw_sigmas(20000, density, torch.Generator().manual_seed(0)))


def test_prompts_together_equal_prompts_alone(encoders: Encoders) -> None:
    prompts = ["a red fox", "", "two green pears on a very long table " * 6, "a boat"]
    together = encoders.text.encode_all(prompts)
    assert len({len(states) for states in together}) == 4
    for prompt, states in zip(prompts, together, strict=True):
        alone = encoders.text.encode(prompt)
        assert states.shape == alone.shape and relative_error(states, alone) < 1e-5
    with pytest.raises(InputError, match="shorten it"):
        encoders.text.encode_all(["a boat", "word " * 2000])


def test_pixels_together_equal_images_alone(encoders: Encoders) -> None:
    codec, images = encoders.codec, [picture(i, 64, 96) for i in range(3)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    latents = codec.encode_pixels(pixels)
    decoded = codec.decode_pixels(latents)
    assert latents.shape == (3, 16, 12, 8) and latents.dtype == torch.float32
    assert decoded.shape == pixels.shape and decoded.dtype == torch.float32 and decoded.abs().max() <= 1
    for i, image in enumerate(images):
        assert relative_error(latents[i], codec.encode(image)) < 1e-5
        levels = ((decoded[i] + 1) * 127.5).permute(1, 2, 0).numpy()
        assert np.abs(levels - np.asarray(codec.decode(latents[i]))).max() < 0.51


@torch.no_grad()
def test_sampling_together_equals_sampling_alone(family: Path, encoded: Encoded) -> None:
    model = make_model(family, [SIGLIP])
    noise = noise_like((8, 8), (8, 8), (4, 10))
    settings = SampleSettings(
        num_inference_steps=3, shift=3.0, guidance_scale=2.0, image_guidance_scale=1.0, guidance_normalization=1.0
    )
    together = sample(model, encoded, noise, settings)
    for i in range(3):
        alone = sample(model, encoded.select([i]), [noise[i]], settings)[0]
        assert relative_error(together[i], alone) < 1e-4


def test_one_tensor_is_a_list_of_equal_samples(family: Path) -> None:
    """The same numbers and gradients, without taking the batch apart."""
    model, states = make_model(family, []), uniform(4, 0)
    noisy = torch.randn((4, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    target, sigma = torch.roll(noisy, 1, 0), SIGMA[:4]
    model.dit.requires_grad_(True)
    results = []
    for samples, others in ((noisy, target), (list(noisy), list(target))):
        model.zero_grad()
        velocity = model(samples, sigma, states)
        losses = velocity_losses(velocity, samples, others, sigma)
        losses.sum().backward()
        gradients_of = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((torch.stack(list(velocity)), losses, gradients_of))
    assert isinstance(model(noisy, sigma, states), Tensor) and isinstance(model(list(noisy), sigma, states), list)
    (velocity, losses, grads), (of_list, list_losses, list_grads) = results
    torch.testing.assert_close(velocity, of_list, rtol=0, atol=0)
    torch.testing.assert_close(losses, list_losses, rtol=1e-6, atol=0)
    assert grads.keys() == list_grads.keys()
    for name, gradient in grads.items():
        assert relative_error(gradient, list_grads[name]) < 1e-5, name
