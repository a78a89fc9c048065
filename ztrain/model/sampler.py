"""The sampler: Euler steps over the released pipelines' own sigmas, with text and image guidance as two numbers.

Guidance is diffusers' number, 0 = off:

    velocity = positive + g_text (positive - negative) + g_image (positive - without reference)

The negative has the empty prompt, or one to lead away from; by `negative` it has no reference either, has it still, or
is the base with all adapters off. Outside `reference_window` every velocity is the base's.

Legend: B batch, C latent channels, H and W latent sides.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ztrain.conditioning import Encoded, concatenate
from ztrain.config import Negative, SampleConfig
from ztrain.errors import InputError
from ztrain.frozen.sources import BaseDefaults
from ztrain.model.flow import euler_step, interpolate, sampler_noise, sigma_schedule


class Model(Protocol):
    """What is sampled: AdaptedDiT. Velocities B x (C, H, W) of noisy latents of those shapes, sigma (B,) and what is
    read: of the call that training makes, and of the base with all adapters off."""

    def __call__(self, noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]: ...

    def base_velocity(self, noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """How one image is sampled.

    `shift` > 0 of the schedule; `guidance_scale` and `image_guidance_scale` >= 0, 0 = off; `negative`: see above, and
    `negative_prompt`: what Encoded's null states are of; `guidance_normalization`: the guided velocity's norm is at
    most this many times the positive one's, 0 = off (diffusers' cfg_normalization); `guidance_window`: guidance acts
    where low < sigma <= high; `reference_window`: the list acts where low < sigma <= high, elsewhere the base is alone
    with the prompt; `strength` in (0, 1] with a start image.

    Windows are open below: neighbours such as (0, 0.5) and (0.5, 1) share no step, one of zero width holds none, and
    (0, 1) holds all, because a step begins at its sigma and none begins at 0.
    """

    num_inference_steps: int
    shift: float
    guidance_scale: float = 0.0
    negative: Negative = "neither"
    negative_prompt: str = ""
    image_guidance_scale: float = 0.0
    guidance_normalization: float = 0.0
    guidance_window: tuple[float, float] = (0.0, 1.0)
    reference_window: tuple[float, float] = (0.0, 1.0)
    strength: float = 1.0

    @property
    def later(self) -> dict[str, Any]:
        """Of what decides a picture, what pictures came to hang on later, only where it acts: keys and names that are
        made of the rest and of this stay valid for pictures that are drawn as ever."""
        negative = {"negative": self.negative, "negative_prompt": self.negative_prompt} if self.guidance_scale else {}
        return negative | ({"outside_reference_window": "base"} if self.reference_window != (0.0, 1.0) else {})

    @property
    def decided(self) -> dict[str, Any]:
        """All that decides a picture, for names and keys."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("negative")} | self.later


def released_or(config: SampleConfig, defaults: BaseDefaults) -> SampleSettings:
    """The configured numbers, with what is left out as the base was released. Raises InputError for a negative prompt
    that nothing would read."""
    steps, shift, guidance = config.num_inference_steps, config.shift, config.guidance_scale
    guidance = defaults.guidance_scale if guidance is None else guidance
    if config.negative_prompt and not guidance:
        whose = f", as for every {defaults.variant.capitalize()}" if config.guidance_scale is None else ""
        raise InputError(
            f"sample.negative_prompt is what text guidance leads away from, and guidance_scale is 0{whose}; set "
            "sample.guidance_scale above 0, or leave out the negative prompt"
        )
    return SampleSettings(
        num_inference_steps=defaults.num_inference_steps if steps is None else steps,
        shift=defaults.shift if shift is None else shift,
        guidance_scale=guidance,
        negative=config.negative,
        negative_prompt=config.negative_prompt,
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

    for step in progress(range(len(schedule) - 1)):
        sigma, next_sigma = schedule[step], schedule[step + 1]
        velocities = _guided(model, noisy, sigma, encoded, settings)
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
    """Velocities in float32. Guidance away from a reference that nobody reads is none, and costs nothing."""
    is_base = not _holds(settings.reference_window, sigma)
    if is_base:
        encoded = encoded.without_reference()
    variants, scales = [(is_base, encoded)], []
    if _holds(settings.guidance_window, sigma):
        if settings.guidance_scale > 0:
            negative = encoded.without_text()
            negative = negative if settings.negative == "reference" else negative.without_reference()
            variants.append((is_base or settings.negative == "base", negative))
            scales.append(settings.guidance_scale)
        if settings.image_guidance_scale > 0 and any(encoded.with_reference):
            variants.append((is_base, encoded.without_reference()))
            scales.append(settings.image_guidance_scale)
    positive, *away = _velocities(model, noisy, sigma, variants)
    guided = positive
    for scale, negative_velocity in zip(scales, away, strict=True):
        difference = torch._foreach_sub(positive, negative_velocity)
        guided = list(torch._foreach_add(guided, torch._foreach_mul(difference, scale)))
    if guided is positive:
        return positive
    return [_limited(v, p, settings.guidance_normalization) for v, p in zip(guided, positive, strict=True)]


def _velocities(
    model: Model, noisy: Sequence[Tensor], sigma: Tensor, variants: Sequence[tuple[bool, Encoded]]
) -> list[list[Tensor]]:
    """Those of each variant, (whether of the base, what is read), in float32; variants of the same weights share one
    call."""
    found: list[list[Tensor]] = [[] for _ in variants]
    for is_base in dict.fromkeys(is_base for is_base, _ in variants):
        places = [place for place, (is_bases, _) in enumerate(variants) if is_bases == is_base]
        read = [variants[place][1] for place in places]
        call = model.base_velocity if is_base else model
        count = len(noisy) * len(read)
        output = call(list(noisy) * len(read), sigma.expand(count), concatenate(read) if len(read) > 1 else read[0])
        for turn, place in enumerate(places):
            found[place] = [v.float() for v in output[turn * len(noisy) : (turn + 1) * len(noisy)]]
    return found


def _limited(velocity: Tensor, positive: Tensor, factor: float) -> Tensor:
    """Shrinks the velocity of one sample so that its norm is at most `factor` times the positive one's; 0 leaves it."""
    if factor <= 0:
        return velocity
    limit, norm = factor * torch.linalg.vector_norm(positive), torch.linalg.vector_norm(velocity)
    return velocity * (limit / norm) if norm > limit else velocity
