"""Options that may bring diversity back: changes to what a model reads, for a part of the steps or for each picture.

An option is settings of the sampler, another batch before sampling (`prepare`), another model that is called like the
first (`wrap`), or the adapters' scale; all of them work on any list of adapters. Random parts come from one generator
for all pictures, so that every one, and so every seed, gets its own. What is no setting of ztrain's is here to be
measured: benchmarks/diversity.py says whether it would be worth one.

Legend: L tokens, D text width, (h, w, S) SigLIP grid.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ztrain.adapters import Adapter, AdapterConfig
from ztrain.conditioning import Conditioning, Encoded, TokenStates
from ztrain.layout import padded
from ztrain.model import AdaptedDiT
from ztrain.sample import Model

Prepare = Callable[[Encoded, torch.Generator], Encoded]
Wrap = Callable[[AdaptedDiT, torch.Generator], Model]
Place = Callable[[int], slice]
"""Of a caption of so many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """`scale`: of every adapter; `settings`: changes to SampleSettings."""

    name: str
    label: str
    scale: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepare: Prepare = lambda encoded, generator: encoded
    wrap: Wrap = lambda model, generator: model


PLAIN = Option(name="plain", label="as it is")


# --- noise on what is read of the reference ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    """A model with another call in the place of its own."""

    model: AdaptedDiT
    ask: Callable[[Sequence[Tensor], Tensor, Encoded], list[Tensor]]

    def __call__(self, noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]:
        return self.ask(noisy, sigma, encoded)

    def base_velocity(self, noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]:
        return self.model.base_velocity(noisy, sigma, encoded)


def annealed(scale: float, low: float, high: float) -> Wrap:
    """Noise on the reference's states that fades as sigma falls, fresh at each step (CADS, arXiv 2310.17347, section 3:
    sqrt(gamma) y + scale sqrt(1 - gamma) n, then y's own mean and spread again).

    gamma is 0 where sigma >= high, 1 where sigma <= low, a line between. Unlike there, y's spread is that of each
    dimension over the batch's tokens, because a few dimensions of a language model are a thousand times the others.
    """

    def wrap(model: AdaptedDiT, generator: torch.Generator) -> Model:
        def ask(noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]:
            gamma = min(1.0, max(0.0, (high - float(sigma[0])) / (high - low)))
            if gamma == 1.0:
                return model(noisy, sigma, encoded)
            return model(noisy, sigma, _mixed(encoded, gamma**0.5, scale * (1 - gamma) ** 0.5, generator))

        return _Asked(model, ask)

    return wrap


def jittered(scale: float) -> Prepare:
    """Noise of so many standard deviations on the reference's states, one draw for each picture."""

    def prepare(encoded: Encoded, generator: torch.Generator) -> Encoded:
        return _mixed(encoded, 1.0, scale, generator)

    return prepare


def _mixed(encoded: Encoded, own: float, noise: float, generator: torch.Generator) -> Encoded:
    """Of the reference's states: their share and that of noise, at their own mean and spread."""

    def mixed(states: Sequence[Tensor]) -> list[Tensor]:
        """Any shapes but for the last axis, the dimensions."""
        if not states:
            return []
        rows = torch.cat([each.flatten(0, -2) for each in states])
        mean, spread = rows.mean(0), rows.std(0).clamp_min(1e-6)
        length = (own**2 + noise**2) ** 0.5
        changed = []
        for each in states:
            drawn = torch.randn(each.shape, generator=generator).to(each)
            changed.append((own * (each - mean) / spread + noise * drawn) / length * spread + mean)
        return changed

    references = iter(mixed([states.states for states in encoded.reference if states is not None]))
    grids = iter(mixed([grid for sample in encoded.siglip for grid in sample]))
    return replace(
        encoded,
        reference=[None if s is None else replace(s, states=next(references)) for s in encoded.reference],
        siglip=[[next(grids) for _ in sample] for sample in encoded.siglip],
    )


# --- fewer of the reference's tokens ----------------------------------------------------------------------------------


def some_tokens(share: float) -> Prepare:
    """For each picture its own share of the reference's tokens, drawn at random, at least one; of a SigLIP grid a
    window of that share of each side."""

    def some(states: TokenStates, generator: torch.Generator) -> TokenStates:
        count = max(1, round(share * len(states.kinds)))
        kept = torch.randperm(len(states.kinds), generator=generator)[:count].sort().values
        weights = None if states.weights is None else states.weights[kept]
        return TokenStates(states.states[kept.to(states.states.device)], states.kinds[kept], weights)

    def window(grid: Tensor, generator: torch.Generator) -> Tensor:
        sides = [max(1, round(share * side)) for side in grid.shape[:2]]
        top, left = (
            int(torch.randint(side - kept + 1, (), generator=generator))
            for side, kept in zip(grid.shape[:2], sides, strict=True)
        )
        return grid[top : top + sides[0], left : left + sides[1]]

    def prepare(encoded: Encoded, generator: torch.Generator) -> Encoded:
        return replace(
            encoded,
            reference=[None if states is None else some(states, generator) for states in encoded.reference],
            siglip=[[window(grid, generator) for grid in sample] for sample in encoded.siglip],
        )

    return prepare


# --- attention to sinks -----------------------------------------------------------------------------------------------


class _Attention(Adapter[AdapterConfig]):
    """Multiplies the attention that some places of the caption get, after all other adapters, while it `acts`."""

    def __init__(self, factor: float, places: Sequence[Place]) -> None:
        super().__init__(AdapterConfig(kind="attention"))
        self.factor, self.places = factor, places
        self.acts = True

    def forward(self, conditioning: Conditioning, encoded: Encoded) -> Conditioning:
        if not self.acts:
            return conditioning
        scales: list[Tensor | None] = []
        for caption, scale in zip(conditioning.caption, conditioning.caption_scale, strict=True):
            # A scale longer than its caption goes on over the pads, which lie behind it.
            factors = torch.ones(padded(len(caption)), device=caption.device)
            if scale is not None:
                factors[: len(scale)] = scale
            for place in self.places:
                factors[place(len(caption))] *= self.factor
            scales.append(factors)
        return replace(conditioning, caption_scale=scales)


def pads(length: int) -> slice:
    """The caption's padding."""
    return slice(length, None)


def newline(_: int) -> slice:
    """The third token, the line break between the turn's role and what is said."""
    return slice(2, 3)


def reply(length: int) -> slice:
    """The third token from the end, which begins the reply's turn."""
    return slice(length - 3, length - 2)


def attended(factor: float, *places: Place, low: float = 0.0) -> Wrap:
    """The attention to these places of the caption times a factor, in every main layer, where sigma >= low."""

    def wrap(model: AdaptedDiT, _: torch.Generator) -> Model:
        attention = _Attention(factor, places)
        model.adapters.append(attention)

        def ask(noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]:
            attention.acts = float(sigma[0]) >= low
            return model(noisy, sigma, encoded)

        return _Asked(model, ask)

    return wrap


# --- all --------------------------------------------------------------------------------------------------------------


def _named(name: str, label: str, prepare: Prepare = PLAIN.prepare, wrap: Wrap = PLAIN.wrap) -> Option:
    return Option(name=name, label=label, prepare=prepare, wrap=wrap)


def _late(high: float, guidance: float) -> Option:
    """The reference is read at the later steps alone, with image guidance there."""
    name, label = f"late-{high:g}", f"reference read at sigma <= {high:g}"
    if guidance:
        name, label = f"{name}-guided-{guidance:g}", f"{label}, image guidance {guidance:g}"
    settings = {"reference_window": (0.0, high), "image_guidance_scale": guidance}
    return Option(name=name, label=label.replace("reference read at sigma <= 1, ", ""), settings=settings)


def _early(low: float) -> Option:
    return Option(
        name=f"early-{low:g}", label=f"reference read at sigma > {low:g}", settings={"reference_window": (low, 1.0)}
    )


_PLACES: dict[str, tuple[str, tuple[Place, ...]]] = {
    "pads": ("the caption's pads", (pads,)),
    "newline": ("the line break before the text", (newline,)),
    "reply": ("the start of the reply's turn", (reply,)),
    "sinks": ("all three", (pads, newline, reply)),
}
_LISTED = [
    PLAIN,
    *(_late(high, 0.0) for high in (0.98, 0.95, 0.92, 0.78)),
    *(_late(high, guidance) for guidance in (1.0, 2.0) for high in (1.0, 0.95, 0.92, 0.88, 0.78)),
    *(_early(low) for low in (0.45, 0.7)),
    *(replace(PLAIN, name=f"scale-{s:g}", label=f"adapters at scale {s:g}", scale=s) for s in (0.5, 0.25)),
    *(
        _named(f"annealed-{low:g}", f"noise on the reference, gone at sigma {low:g}", wrap=annealed(0.25, low, 1.0))
        for low in (0.9, 0.75)
    ),
    _named("noise-0.25", "noise of 0.25 on the reference, one draw a picture", jittered(0.25)),
    *(_named(f"tokens-{s:g}", f"{s:g} of the reference's tokens", some_tokens(s)) for s in (0.75, 0.5)),
    *(
        _named(f"{name}-{factor:g}", f"attention to {label} x {factor:g}", wrap=attended(factor, *places))
        for name, (label, places) in _PLACES.items()
        for factor in (0.0, 4.0)
    ),
    *(
        _named(
            f"pads-0-{s:g}", f"attention to the caption's pads x 0 at sigma >= {s:g}", wrap=attended(0.0, pads, low=s)
        )
        for s in (0.95, 0.92, 0.78)
    ),
]
OPTIONS = {option.name: option for option in _LISTED}
"""By name."""
