"""The objective and the path, once: what sigma, noisy latents and velocity mean, for the loss and for the sampler.

    sigma in [0, 1], 1 = pure noise          noisy    = (1 - sigma) latents + sigma noise
    velocity = noise - latents               d noisy / d sigma = velocity

`loss` is what training, validation and pretraining measure; `euler_step` is what a sampler does. Nothing here knows
about Z-Image: the transformer's reversed time and sign live in adapted_dit.py. Every random draw but `draw_sigmas` is
counter-based, a pure function of (seed, epoch, sample index), so it does not depend on ranks, workers or resumes.

Legend: B batch, C latent channels, H and W latent height and width, N sampler steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ztrain.conditioning import Encoded, moved

SigmaSampling = Literal["uniform", "logit_normal", "scheduler_table"]

# Streams keep the draws of one sample independent of each other.
_NOISE_STREAM, _SIGMA_STREAM, _SAMPLER_STREAM, _DROPOUT_STREAM, _STEP_STREAM = 0, 1, 2, 3, 4

_BUMP_FLOOR = math.exp(-0.5)
_BUMP_MEAN = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - _BUMP_FLOOR  # of `_bump` over uniform sigma
_QUADRATURE = 20_000  # midpoints: the mean of a bump is exact to 1e-7 then

SIGMA_BINS = 10
"""Equal parts of [0, 1] by which losses are also given: the only loss curves of flow matching that can be compared."""
TABLE_SIZE = 1000
"""Entries of the schedulers' training table (num_train_timesteps of every released scheduler_config.json)."""


class Counter(Protocol):
    """What identifies one draw: the run's seed, the epoch, and the sample's index in the data set."""

    @property
    def seed(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def index(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SigmaDensity:
    """How training sigmas are drawn.

    `sampling`: uniform on (0, 1); logit_normal: sigmoid(normal(logit_mean, logit_std)) (Stable Diffusion 3, arXiv
    2403.03206, section 3.1); scheduler_table: one of the 1000 entries of the scheduler's own table, which is where
    diffusers' training scripts draw from. `shift` > 0 then moves all three towards noise (see `shift_sigma`);
    1 leaves them.
    """

    sampling: SigmaSampling = "logit_normal"
    shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """`shift sigma / (1 + (shift - 1) sigma)`: keeps 0 and 1, moves the middle towards noise when shift > 1.

    Source: Stable Diffusion 3, arXiv 2403.03206, equation 23; FlowMatchEulerDiscreteScheduler.set_timesteps.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_shift(
    num_image_tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_log_shift: float = 0.5,
    max_log_shift: float = 1.15,
) -> float:
    """The shift for an image of so many DiT tokens: exp of a line through (256, 0.5) and (4096, 1.15).

    Source: calculate_shift in diffusers' pipeline_z_image.py with the scheduler's default numbers; 1024 x 1024 pixels
    are 4096 tokens and give 3.16.
    """
    slope = (max_log_shift - base_log_shift) / (max_tokens - base_tokens)
    return math.exp(base_log_shift + slope * (num_image_tokens - base_tokens))


def counter_generator(counter: Counter, stream: int) -> torch.Generator:
    """A CPU generator that depends on nothing but the counter and the stream."""
    words = np.random.SeedSequence([counter.seed, counter.epoch, counter.index, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) & (2**63 - 1))


def draw_noise(counters: Sequence[Counter], latents: Sequence[Tensor]) -> list[Tensor]:
    """Standard normal noise like each sample's latents, B x (C, H, W); drawn in float32 on the CPU on every device."""
    drawn = []
    for counter, sample in zip(counters, latents, strict=True):
        generator = counter_generator(counter, _NOISE_STREAM)
        # Pinned, or the CPU would wait until the device has done all that it was asked for.
        noise = torch.randn(sample.shape, generator=generator, pin_memory=sample.is_cuda)
        drawn.append(noise.to(sample.device, non_blocking=True))
    return drawn


def draw_sigma(counters: Sequence[Counter], density: SigmaDensity) -> Tensor:
    """One sigma for each sample, (B,), float32 on the CPU."""
    return torch.stack([_sigma((), density, counter_generator(counter, _SIGMA_STREAM)) for counter in counters])


def draw_sigmas(num: int, density: SigmaDensity, generator: torch.Generator) -> Tensor:
    """A whole batch of sigmas, (num,), float32, from one generator and on its device; not counter-based."""
    return _sigma((num,), density, generator)


def _sigma(shape: tuple[int, ...], density: SigmaDensity, generator: torch.Generator) -> Tensor:
    device = generator.device
    match density.sampling:
        case "uniform":
            sigma = torch.rand(shape, generator=generator, device=device)
        case "logit_normal":
            normal = torch.randn(shape, generator=generator, device=device)
            sigma = torch.sigmoid(density.logit_mean + density.logit_std * normal)
        case "scheduler_table":
            sigma = torch.randint(1, TABLE_SIZE + 1, shape, generator=generator, device=device) / TABLE_SIZE
    return shift_sigma(sigma, density.shift)


def quantiles(density: SigmaDensity, shares: Tensor) -> Tensor:
    """The sigmas below which these shares of all draws lie, each in (0, 1); of the table the smallest entries that are
    enough."""
    match density.sampling:
        case "uniform":
            sigma = shares
        case "logit_normal":
            sigma = torch.sigmoid(density.logit_mean + density.logit_std * torch.special.ndtri(shares))
        case "scheduler_table":
            sigma = (shares * TABLE_SIZE).ceil() / TABLE_SIZE
    return shift_sigma(sigma, density.shift)


def draw_dropout(counter: Counter) -> float:
    """One number from [0, 1) that decides what a sample is trained without."""
    return float(torch.rand((), generator=counter_generator(counter, _DROPOUT_STREAM)))


def seed_micro_step(seed: int, micro_step: int, process_index: int) -> None:
    """Seeds torch's global generator, which only dropout inside LoRA layers uses, as a function of the counters."""
    words = np.random.SeedSequence([seed, micro_step, process_index, _STEP_STREAM]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]) & (2**63 - 1))


def sampler_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """The sampler's starting noise for one image, (C, H, W), float32 on the CPU: the same on every device."""
    words = np.random.SeedSequence([seed, _SAMPLER_STREAM]).generate_state(1, np.uint64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(words[0]) & (2**63 - 1)))


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """The noisy latents of one sample at sigma: `(1 - sigma) latents + sigma noise`, any shape."""
    return (1 - sigma) * latents + sigma * noise


@dataclass(frozen=True, slots=True)
class LossWeight:
    """Weight of a sample's squared error, by its sigma.

    bump: a Gaussian around sigma = 1/2, minus its value at the ends, as DiffSynth-Studio trains Z-Image
    (diffsynth/diffusion/flow_match.py, set_training_weight); `mean`: what it is divided by. 0 at sigma 0 and 1.
    """

    shape: Literal["none", "bump"] = "none"
    mean: float = _BUMP_MEAN

    def __call__(self, sigma: Tensor) -> Tensor:
        """(B,) for (B,)."""
        return torch.ones_like(sigma) if self.shape == "none" else _bump(sigma) / self.mean


def loss_weight(shape: Literal["none", "bump"], density: SigmaDensity | None) -> LossWeight:
    """That whose mean is 1 over the density that sigmas are drawn from: then it changes what is learned, and not how
    fast. None: over uniform sigma, whatever is drawn."""
    if density is None:
        return LossWeight(shape)
    middles = (torch.arange(_QUADRATURE, dtype=torch.float64) + 0.5) / _QUADRATURE
    return LossWeight(shape, float(_bump(quantiles(density, middles)).mean()))


def _bump(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma - 0.5) ** 2) - _BUMP_FLOOR


@dataclass(frozen=True, slots=True)
class Prior:
    """Keeps samples without a reference close to the frozen base: `share` of their loss, in (0, 1], is the distance to
    the base's own velocity.

    `base`: called as the model is; `on_all`: with every sample, as all processes must where they share the base.
    """

    base: Callable[[list[Tensor], Tensor, Encoded], Sequence[Tensor]]
    share: float
    on_all: bool = False

    def shares(self, encoded: Encoded) -> dict[int, float]:
        """Of each sample that the base computes."""
        samples = enumerate(encoded.with_reference)
        return {i: 0.0 if reads else self.share for i, reads in samples if self.on_all or not reads}


def loss(
    model: Callable[..., Sequence[Tensor] | Tensor],
    latents: Sequence[Tensor] | Tensor,
    noise: Sequence[Tensor] | Tensor,
    sigma: Tensor,
    encoded: Encoded,
    weight: LossWeight = LossWeight(),
    prior: Prior | None = None,
) -> Tensor:
    """The flow matching loss of each sample, (B,) float32: how far the model's velocity is from `noise - latents`.

    `latents`, `noise`: B x (C, H, W), lists whose sizes may differ or two tensors; `sigma`: (B,), for lists on the CPU,
    interpolated in its own precision.
    """
    if isinstance(latents, Tensor) and isinstance(noise, Tensor):
        noisy: Any = interpolate(latents, noise, sigma[:, None, None, None])
    else:
        noisy = [interpolate(x, n, float(s)) for x, n, s in zip(latents, noise, sigma, strict=True)]
    sigma, device = sigma.float(), noisy[0].device
    shares = prior.shares(encoded) if prior else {}
    rows = list(shares)
    base_velocity = prior.base([noisy[i] for i in rows], sigma[rows], encoded.select(rows)) if prior and rows else []
    # On the device already: DDP and FSDP2 would move it there, and wait for all the work that the device has got.
    velocity = model(noisy, moved(sigma, device), encoded)
    losses = velocity_losses(velocity, latents, noise, sigma, weight)
    if rows:
        to_base = _mean_squares(lambda v, base: v - base, [velocity[i] for i in rows], base_velocity)
        to_base = to_base * weight(sigma[rows]).to(device, non_blocking=True)
        at, share = moved(torch.tensor(rows), device), torch.tensor(list(shares.values()))
        losses = losses.index_copy(0, at, torch.lerp(losses[at], to_base, share.to(losses, non_blocking=True)))
    return losses


def velocity_losses(
    velocity: Sequence[Tensor] | Tensor,
    latents: Sequence[Tensor] | Tensor,
    noise: Sequence[Tensor] | Tensor,
    sigma: Tensor,
    weight: LossWeight = LossWeight(),
) -> Tensor:
    """Weighted mean squared error to `noise - latents` for each sample, (B,), computed in float32.

    `velocity`, `latents`, `noise`: B x (C, H, W), lists whose sizes may differ or three tensors; `sigma`: (B,).
    """
    errors = _mean_squares(lambda v, x, n: v - (n - x), velocity, latents, noise)
    # A copy that waited would hold up the host until the forward pass is done.
    return errors * weight(sigma).to(velocity[0].device, non_blocking=True)


def _mean_squares(residual: Callable[..., Tensor], *lists: Sequence[Tensor] | Tensor) -> Tensor:
    """The residual's mean square of each sample, (B,), in float32; neighbours of one shape are computed together."""
    batches = [samples.float() for samples in lists if isinstance(samples, Tensor)]
    if len(batches) == len(lists):
        return residual(*batches).square().flatten(1).mean(1)
    means = []
    for _, run in groupby(zip(*lists, strict=True), key=lambda tensors: tensors[0].shape):
        stacked = [torch.stack(tensors).float() for tensors in zip(*run, strict=True)]  # each (b, C, H, W)
        means.append(residual(*stacked).square().flatten(1).mean(1))
    return torch.cat(means)


def sigma_schedule(num_inference_steps: int, shift: float, strength: float = 1.0) -> Tensor:
    """The sampler's sigmas, (N + 1,), from noise to 0; shorter when `strength` < 1 starts from an image.

    The released pipelines pass linspace(1, 1/N, N) to the scheduler, which shifts it (pipeline_z_image.py,
    get_default_z_image_sigmas); the scheduler's own default spacing differs. `strength` in (0, 1] keeps the last
    N * strength steps with ZImageImg2ImgPipeline's rounding; at least one is left.
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength {strength} must be above 0 and at most 1")
    sigmas = shift_sigma(torch.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps), shift)
    skipped = int(num_inference_steps - num_inference_steps * strength)
    return torch.cat([sigmas[skipped:], torch.zeros(1)])


def euler_step(noisy: Sequence[Tensor], velocity: Sequence[Tensor], sigma: Tensor, next_sigma: Tensor) -> list[Tensor]:
    """One Euler step of d noisy / d sigma = velocity for each sample, in float32; one sigma on the CPU for all."""
    return list(torch._foreach_add(noisy, torch._foreach_mul(velocity, float(next_sigma - sigma))))
