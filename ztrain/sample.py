"""The sampler: Euler steps over the released pipelines' own sigmas, with text and image guidance as two numbers.

`model` is anything that is called like AdaptedDiT: model(noisy, sigma, encoded) -> velocities, the call that training
makes. Guidance is diffusers' number, 0 = off:

    velocity = positive + g_text (positive - without text) + g_image (positive - without reference)

Legend: B batch, C latent channels, H and W latent sides.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ztrain.conditioning import Encoded, concatenate
from ztrain.config import SampleConfig
from ztrain.errors import InputError
from ztrain.flow import euler_step, interpolate, sampler_noise, sigma_schedule
from ztrain.models import BaseDefaults

Model = Callable[[Sequence[Tensor], Tensor, Encoded], list[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """How one image is sampled.

    `shift` > 0 of the schedule; `guidance_scale` and `image_guidance_scale` >= 0, 0 = off; `guidance_normalization`:
    the guided velocity's norm is at most this many times the positive one's, 0 = off (diffusers' cfg_normalization);
    `guidance_window`: guidance acts where low < sigma <= high; `reference_window`: the reference is read where low <
    sigma <= high, elsewhere the prompt is alone; `strength` in (0, 1] with a start image.

    Windows are open below: neighbours such as (0, 0.5) and (0.5, 1) share no step, one of zero width holds none, and
    (0, 1) holds all, because a step begins at its sigma and none begins at 0.
    """

    num_inference_steps: int
    shift: float
    guidance_scale: float = 0.0
    image_guidance_scale: float = 0.0
    guidance_normalization: float = 0.0
    guidance_window: tuple[float, float] = (0.0, 1.0)
    reference_window: tuple[float, float] = (0.0, 1.0)
    strength: float = 1.0


def released_or(config: SampleConfig, defaults: BaseDefaults) -> SampleSettings:
    """The configured numbers, with what is left out as the base was released."""
    steps, guidance = config.num_inference_steps, config.guidance_scale
    return SampleSettings(
        num_inference_steps=defaults.num_inference_steps if steps is None else steps,
        shift=defaults.shift,
        guidance_scale=defaults.guidance_scale if guidance is None else guidance,
        image_guidance_scale=config.image_guidance_scale,
        guidance_normalization=config.guidance_normalization,
        guidance_window=config.guidance_window,
        reference_window=config.reference_window,
        strength=config.strength,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture to sample: `row` of its prompt and references in the encoded batch, `seed` of its noise, `shape` of
    its latents (C, H, W), `start`: latents of that shape for `strength`, or None."""

    row: int
    seed: int
    shape: tuple[int, int, int]
    start: Tensor | None = None


def sample_all(
    model: Model,
    encoded: Encoded,
    pictures: Sequence[Picture],
    settings: SampleSettings,
    *,
    batch_size: int,
    device: torch.device,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Iterator[Tensor]:
    """Latents of each picture in order, `batch_size` sampled together whatever their sizes; `progress` over the steps
    of each batch."""
    for first in range(0, len(pictures), batch_size):
        some = pictures[first : first + batch_size]
        noise = [sampler_noise(picture.seed, picture.shape).to(device) for picture in some]
        starts = [picture.start for picture in some if picture.start is not None]
        rows = encoded.select([picture.row for picture in some]).to(device)
        yield from sample(model, rows, noise, settings, start=starts or None, progress=progress, first=first)


@torch.no_grad()
def sample(
    model: Model,
    encoded: Encoded,
    noise: Sequence[Tensor],
    settings: SampleSettings,
    *,
    start: Sequence[Tensor] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    first: int = 0,
) -> list[Tensor]:
    """Latents, B x (C, H, W) float32, from noise of that shape and, with `strength` < 1, start latents.

    Raises InputError where they are not finite; `first`: how many samples came before these, for its numbers.
    """
    schedule = sigma_schedule(settings.num_inference_steps, settings.shift, settings.strength)
    noisy = [sample.float() for sample in noise]
    if start is not None:
        noisy = [interpolate(x.to(n.device), n, float(schedule[0])) for x, n in zip(start, noisy, strict=True)]
    elif settings.strength != 1.0:
        raise ValueError(f"strength {settings.strength} needs a start image; without one it is 1")

    bare = encoded.without_reference()
    for step in progress(range(len(schedule) - 1)):
        sigma, next_sigma = schedule[step], schedule[step + 1]
        read = encoded if _holds(settings.reference_window, sigma) else bare
        velocities = _guided(model, noisy, sigma, read, settings)
        noisy = euler_step(noisy, velocities, sigma, next_sigma)
    _check_finite(noisy, first)
    return noisy


def _check_finite(latents: Sequence[Tensor], first: int) -> None:
    are_finite = torch.stack([each.isfinite().all() for each in latents]).tolist()
    if wrong := [str(first + i) for i, is_finite in enumerate(are_finite, start=1) if not is_finite]:
        raise InputError(
            f"sample{'s' if len(wrong) > 1 else ''} {', '.join(wrong)}: the latents are not finite: the list's weights "
            "or scales are damaged, or guidance is too strong"
        )


def _holds(window: tuple[float, float], sigma: Tensor) -> bool:
    low, high = window
    return low < float(sigma) <= high


def _guided(
    model: Model, noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded, settings: SampleSettings
) -> list[Tensor]:
    """Velocities in float32; positives and negatives share one call. Guidance away from a reference that nobody reads
    is none, and costs nothing."""
    scales = [settings.guidance_scale, settings.image_guidance_scale]
    if not _holds(settings.guidance_window, sigma):
        scales = [0.0, 0.0]
    variants = [encoded]
    if scales[0] > 0:
        variants.append(encoded.without_text())
    if scales[1] > 0 and any(encoded.with_reference):
        variants.append(encoded.without_reference())
    else:
        scales[1] = 0.0
    count = len(noisy)
    joined = concatenate(variants) if len(variants) > 1 else encoded
    output = [v.float() for v in model(list(noisy) * len(variants), sigma.expand(count * len(variants)), joined)]

    guided = positive = output[:count]
    for place, scale in enumerate((scale for scale in scales if scale > 0), start=1):
        difference = torch._foreach_sub(positive, output[place * count : (place + 1) * count])
        guided = list(torch._foreach_add(guided, torch._foreach_mul(difference, scale)))
    if guided is positive:
        return positive
    return [_limited(v, p, settings.guidance_normalization) for v, p in zip(guided, positive, strict=True)]


def _limited(velocity: Tensor, positive: Tensor, factor: float) -> Tensor:
    """Shrinks the velocity of one sample so that its norm is at most `factor` times the positive one's; 0 leaves it."""
    if factor <= 0:
        return velocity
    limit, norm = factor * torch.linalg.vector_norm(positive), torch.linalg.vector_norm(velocity)
    return velocity * (limit / norm) if norm > limit else velocity
