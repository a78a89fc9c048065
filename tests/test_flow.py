"""The path's algebra, the schedules against diffusers' scheduler, and the counter-based draws."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ztrain.cache.order import SampleKey
from ztrain.config import Config
from ztrain.model.flow import (
    LossWeight,
    Prior,
    SigmaDensity,
    draw_dropout,
    draw_noise,
    draw_sigma,
    draw_sigmas,
    euler_step,
    interpolate,
    loss,
    loss_weight,
    quantiles,
    resolution_shift,
    sampler_noise,
    shift_sigma,
    sigma_schedule,
    velocity_losses,
)
from ztrain.train.validate import fixed_sigmas

KEYS = [SampleKey(seed, epoch, index) for seed in (0, 1) for epoch in (0, 3) for index in (0, 1, 70000)]


def test_exact_velocity_has_zero_loss_and_euler_recovers_the_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, 3, 4, 5), generator=generator)
    velocity = noise - latents
    assert velocity_losses([velocity], [latents], [noise], torch.tensor([0.3])).item() == 0
    assert velocity_losses([-velocity], [latents], [noise], torch.tensor([0.3])).item() > 1
    schedule = sigma_schedule(8, 3.0)
    noisy = interpolate(latents, noise, 1.0)
    assert torch.equal(noisy, noise)
    for sigma, next_sigma in zip(schedule[:-1], schedule[1:], strict=True):
        assert torch.allclose(noisy, interpolate(latents, noise, float(sigma)), atol=1e-5)
        [noisy] = euler_step([noisy], [velocity], sigma, next_sigma)
    assert torch.allclose(noisy, latents, atol=1e-5)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "scheduler_table"])
@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_quantiles_are_those_of_the_draws(sampling: Any, shift: float) -> None:
    density = SigmaDensity(sampling, shift, logit_mean=0.3, logit_std=0.8)
    drawn = draw_sigmas(200_000, density, torch.Generator().manual_seed(0))
    for share in (0.003, 0.1, 0.5, 0.9, 0.999):
        below = float((drawn <= quantiles(density, torch.tensor(share)) + 1e-6).float().mean())
        # Five deviations of a share among so many draws, and an entry of the table.
        assert abs(below - share) < 5 * math.sqrt(share * (1 - share) / len(drawn)) + 1e-3 * (
            sampling == "scheduler_table"
        )


def test_validation_looks_where_the_run_trains() -> None:
    def fixed(density: SigmaDensity, sigmas: Any = "auto") -> list[float]:
        return fixed_sigmas(Config.model_validate({"validation": {"sigmas": sigmas}}), density)

    assert fixed(SigmaDensity("uniform", 1.0)) == [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    assert fixed(SigmaDensity("uniform", 6.0)) == [0.4, 0.72, 0.857, 0.933, 0.982, 1.0]  # Z-Image's own shift
    assert fixed(SigmaDensity("scheduler_table", 3.0)) == [0.25, 0.562, 0.75, 0.875, 0.964, 1.0]
    assert fixed(SigmaDensity("logit_normal", 6.0))[2] == 0.857
    assert fixed(SigmaDensity("uniform", 1e6)) == [1.0] and fixed(SigmaDensity("uniform", 1e-6))[0] == 0.001
    assert fixed(SigmaDensity("uniform", 6.0), (0.5, 0.2)) == [0.5, 0.2]
    with pytest.raises(ValidationError, match="must be auto, or one or more numbers above 0"):
        fixed(SigmaDensity(), (0.0, 0.5))


@pytest.mark.parametrize("shift", [3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 8, 50])
def test_schedule_is_the_pipelines(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist())
    assert torch.allclose(sigma_schedule(steps, shift), scheduler.sigmas, atol=1e-6)
    if steps == 8 and shift == 3.0:  # zimage_facts.md section 2
        expected = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
        assert sigma_schedule(8, 3.0).tolist() == pytest.approx(expected, abs=1e-4)


def test_scheduler_table_is_the_schedulers_training_table() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=6.0)
    density = SigmaDensity("scheduler_table", shift=6.0)
    drawn = draw_sigma([SampleKey(0, 0, i) for i in range(500)], density)
    distance = (drawn[:, None] - scheduler.sigmas[None, :]).abs().min(dim=1).values
    assert distance.max() < 1e-6 and len(drawn.unique()) > 300


def test_densities_against_closed_forms() -> None:
    keys = [SampleKey(0, 0, i) for i in range(4000)]
    uniform = draw_sigma(keys, SigmaDensity("uniform"))
    normal = draw_sigma(keys, SigmaDensity("logit_normal", logit_mean=0.5, logit_std=0.7))
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    assert torch.allclose(uniform.quantile(quantiles), quantiles, atol=0.025)
    expected = torch.sigmoid(0.5 + 0.7 * torch.distributions.Normal(0.0, 1.0).icdf(quantiles))
    assert torch.allclose(normal.quantile(quantiles), expected, atol=0.025)
    shifted = draw_sigma(keys, SigmaDensity("uniform", shift=6.0))
    assert torch.allclose(shifted, shift_sigma(uniform, 6.0))


def test_resolution_shift_is_diffusers() -> None:
    for tokens in (256, 1024, 4096, 6000):
        assert math.log(resolution_shift(tokens)) == pytest.approx(calculate_shift(tokens))


def test_bump_is_diffsynths_up_to_its_normalisation() -> None:
    sigma = torch.linspace(0, 1, 100001)
    weight = loss_weight("bump", None)(sigma)
    assert weight.mean().item() == pytest.approx(1, abs=1e-4)
    assert loss_weight("bump", SigmaDensity("uniform")).mean == pytest.approx(LossWeight("bump").mean, abs=1e-8)
    gaussian = torch.exp(-2 * (sigma - 0.5) ** 2)
    expected = gaussian - gaussian.min()
    assert torch.allclose(weight / weight.max(), expected / expected.max(), atol=1e-4)
    assert loss_weight("none", None)(sigma).eq(1).all()


@pytest.mark.parametrize(
    "density",
    [
        SigmaDensity("uniform", shift=6.0),
        SigmaDensity("scheduler_table", shift=3.0),
        SigmaDensity("logit_normal", logit_mean=0.8, logit_std=1.3),
        SigmaDensity("logit_normal", shift=6.0),
    ],
)
def test_the_mean_weight_of_what_a_run_draws_is_1(density: SigmaDensity) -> None:
    """So a weight changes what is learned and not how fast: over uniform sigma it would be 0.71 at Base's shift."""
    drawn = draw_sigmas(200_000, density, torch.Generator().manual_seed(0))
    assert loss_weight("bump", density)(drawn).mean().item() == pytest.approx(1, abs=0.01)
    if density == SigmaDensity("uniform", shift=6.0):
        assert loss_weight("bump", None)(drawn).mean().item() == pytest.approx(0.71, abs=0.01)
    shares = torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(quantiles(density, shares), drawn.quantile(shares), atol=0.01)


def test_draws_depend_on_nothing_but_the_counter() -> None:
    latents = [torch.zeros((16, 4, 4))] * len(KEYS)
    together = draw_noise(KEYS, latents)
    torch.manual_seed(123)
    alone = [draw_noise([key], latents[:1])[0] for key in reversed(KEYS)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    flat = torch.stack(together).flatten(1)
    correlation = np.corrcoef(flat.numpy())
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.3 and len({tuple(row[:3].tolist()) for row in flat}) == len(KEYS)
    density = SigmaDensity()
    sigma = draw_sigma(KEYS, density)
    assert torch.equal(sigma, torch.cat([draw_sigma([key], density) for key in KEYS]))
    assert len(sigma.unique()) == len(KEYS)
    assert torch.equal(sampler_noise(4, (2, 3)), sampler_noise(4, (2, 3)))
    assert not torch.equal(sampler_noise(4, (2, 3)), sampler_noise(5, (2, 3)))


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.floats(1.0, 8.0))
def test_strength_keeps_the_end_of_the_schedule(steps: int, strength: float, shift: float) -> None:
    whole = sigma_schedule(steps, shift)
    kept = steps - int(max(steps - min(steps * strength, steps), 0))  # ZImageImg2ImgPipeline.get_timesteps
    part = sigma_schedule(steps, shift, strength)
    assert len(part) == kept + 1 and torch.equal(part, whole[-kept - 1 :])
    for outside in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            sigma_schedule(steps, shift, outside)
    assert part[-1] == 0 and (part[1:] < part[:-1]).all() and part[0] <= 1 + 1e-6


def test_the_prior_is_the_distance_to_the_base_in_its_share() -> None:
    generator = torch.Generator().manual_seed(3)
    velocity, base, latents, noise = (
        [torch.randn((16, 2 + 2 * i, 4), generator=generator) for i in range(3)] for _ in range(4)
    )
    sigma = torch.tensor([0.2, 0.5, 0.8])
    bump = LossWeight("bump")
    losses = velocity_losses(velocity, latents, noise, sigma, bump)
    distance = torch.stack([(v - b).square().mean() for v, b in zip(velocity, base, strict=True)]) * bump(sigma)
    encoded: Any = SimpleNamespace(with_reference=[True, False, False], select=lambda rows: rows)
    for share, on_all in ((0.25, False), (0.25, True), (1.0, False)):
        prior = Prior(lambda noisy, sigma, rows: [base[i] for i in rows], share, on_all)
        mixed = loss(lambda *_: velocity, latents, noise, sigma, encoded, bump, prior)
        expected = torch.cat([losses[:1], (1 - share) * losses[1:] + share * distance[1:]])
        assert torch.allclose(mixed, expected, rtol=1e-6)
    assert torch.equal(loss(lambda *_: velocity, latents, noise, sigma, encoded, bump), losses)


def test_dropout_draws_are_uniform_and_independent_of_sigma() -> None:
    keys = [SampleKey(1, 2, i) for i in range(4000)]
    drawn = torch.tensor([draw_dropout(key) for key in keys])
    quantiles = torch.tensor([0.05, 0.1, 0.15, 0.5, 0.9])
    assert torch.allclose(drawn.quantile(quantiles), quantiles, atol=0.02) and drawn.max() < 1
    sigma = draw_sigma(keys, SigmaDensity("uniform"))
    assert abs(np.corrcoef(drawn.numpy(), sigma.numpy())[0, 1]) < 0.05
    assert [draw_dropout(key) for key in keys[:5]] == drawn[:5].tolist()
