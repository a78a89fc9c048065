"""What a batch of triplets looks like once encoded, and what the DiT reads: two frozen records of pure tensors.

`Encoded` holds every cached state by name; dropping a modality (guidance, dropout) picks among them and never encodes
again. Adapters turn an `Encoded` into a `Conditioning`: adapters/splice.py puts a reference into the caption,
adapters/siglip.py beside it, and model/dit.py embeds both. Nothing here knows a model.

Legend: B batch, R references of a sample (0 or more), L tokens, D text width, (h, w, S) SigLIP grid and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Kinds of tokens in a sequence of the vision-language model.
TEXT, IMAGE, MARKER = 0, 1, 2


@dataclass(frozen=True, slots=True)
class TokenStates:
    """Hidden states of one sequence with what each token is: `states` (L, D), `kinds` (L,) of TEXT, IMAGE, MARKER.

    `weights`: (L,) float32 > 0 or None: the attention to each token is multiplied by this; None = 1 for all.
    `kinds` and `weights` are on the host: how many tokens a selection leaves must be known there, and asking a device
    would wait for all the work it has been given.
    """

    states: Tensor
    kinds: Tensor
    weights: Tensor | None = None

    def select(self, kinds: Sequence[int]) -> "TokenStates":
        places = torch.isin(self.kinds, torch.tensor(list(kinds))).nonzero().squeeze(1)
        there = places.to(self.states.device, non_blocking=True)
        weights = None if self.weights is None else self.weights[places]
        return TokenStates(self.states.index_select(0, there), self.kinds[places], weights)


def weighted(sequences: Sequence[TokenStates], weights: Sequence[float]) -> TokenStates:
    """Sequences one after the other, the attention to all tokens of each multiplied by its weight > 0."""
    if len(sequences) == 1 and weights[0] == 1.0:
        return sequences[0]
    return TokenStates(
        torch.cat([sequence.states for sequence in sequences]),
        torch.cat([sequence.kinds for sequence in sequences]),
        torch.cat([torch.full((len(s.kinds),), weight) for s, weight in zip(sequences, weights, strict=True)]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StockOmni:
    """One sample's inputs in the layout of diffusers' ZImageOmniPipeline, for the official Omni weights.

    `segments`: R + 2 caption segments (1 without references), each (L, D); `latents`: R x (C, h, w) clean reference
    latents.
    """

    segments: list[Tensor]
    latents: list[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One encoded batch. Lists have one entry a sample; a state nobody reads stays empty.

    text: prompt alone, B x (L, D).          null_text: what is read without the prompt, (L, D): the empty one, or in
    sampling the negative one; so in every null_*.
    reference: image(s) alone through the spliced model, B x TokenStates or None.
    fused: image(s) and prompt in one sequence, B x TokenStates or None; null_fused: empty = `reference`, which is that
    of the empty prompt.
    siglip: B x R x (h, w, S).              siglip_weights: B x R factors on the attention to them; empty = all 1.
    omni, null_omni: B x StockOmni with the prompt and without it; bare_omni, null_bare_omni: the same two without
    references.
    """

    text: list[Tensor]
    null_text: Tensor
    # absent: what stands for a sample without references
    reference: list[TokenStates | None] = field(metadata={"absent": None})
    fused: list[TokenStates | None] = field(metadata={"absent": None})
    siglip: list[list[Tensor]] = field(metadata={"absent": []})
    null_fused: list[TokenStates | None] = field(default_factory=list)
    siglip_weights: list[list[float]] = field(default_factory=list)
    omni: list[StockOmni] = field(default_factory=list)
    null_omni: list[StockOmni] = field(default_factory=list)
    bare_omni: list[StockOmni] = field(default_factory=list)
    null_bare_omni: list[StockOmni] = field(default_factory=list)

    @classmethod
    def of_prompts(cls, text: list[Tensor], null_text: Tensor, **states: Any) -> "Encoded":
        """A batch that has prompts, the other states that are given, and no reference in the rest."""
        return cls(text=text, null_text=null_text, **{**cls._absent(len(text)), **states})

    @classmethod
    def _absent(cls, count: int) -> dict[str, Any]:
        """What is read of references, for samples that have none."""
        return {f.name: [f.metadata["absent"]] * count for f in fields(cls) if "absent" in f.metadata}

    def __len__(self) -> int:
        return len(self.text)

    def without_text(self) -> "Encoded":
        """The same references without the prompt. Image and empty prompt in one sequence is the image alone."""
        null_fused = self.null_fused or self.reference
        return replace(
            self,
            text=[self.null_text] * len(self),
            fused=[None if fused is None else null_fused[i] for i, fused in enumerate(self.fused)],
            omni=self.null_omni,
            bare_omni=self.null_bare_omni,
        )

    def without_reference(self) -> "Encoded":
        """The same prompts without any image."""
        return replace(
            self,
            **self._absent(len(self)),
            null_fused=[None] * len(self.null_fused),
            siglip_weights=[],
            omni=self.bare_omni,
            null_omni=self.null_bare_omni,
        )

    @property
    def siglip_factors(self) -> list[list[float]]:
        """`siglip_weights` written out, B x R."""
        return self.siglip_weights or [[1.0] * len(references) for references in self.siglip]

    @property
    def with_reference(self) -> list[bool]:
        """For each sample whether it still has a reference."""
        lists = [getattr(self, name) for name in self._absent(0)] + [[each.latents for each in self.omni]]
        return [any(values and values[i] for values in lists) for i in range(len(self))]

    def to(self, device: torch.device) -> "Encoded":
        """The same batch on another device. To a GPU from pinned memory, so that nobody waits for the copy."""
        return _moved(self, device)

    def select(self, indices: Sequence[int]) -> "Encoded":
        """The samples at these positions, in this order."""

        lists = {name: [values[i] for i in indices] for name, values in self._lists().items() if values}
        return replace(self, **lists)

    def _lists(self) -> dict[str, list[Any]]:
        """All that has one entry a sample."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "null_text"}


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _moved(value: Any, device: torch.device) -> Any:
    """Any nesting of lists and records of tensors, on `device`."""
    if isinstance(value, TokenStates):
        return replace(value, states=_moved(value.states, device))
    if isinstance(value, Tensor):
        return moved(value, device)
    if isinstance(value, list):
        return [_moved(entry, device) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """Shares of samples that lose their prompt, their reference, or both; they exclude each other."""

    text: float = 0.0
    reference: float = 0.0
    both: float = 0.0

    def apply(self, encoded: Encoded, uniform: float) -> Encoded:
        """`encoded` of one sample with what the draw from [0, 1) takes away."""
        if uniform < self.text:
            return encoded.without_text()
        if uniform < self.text + self.reference:
            return encoded.without_reference()
        if uniform < self.text + self.reference + self.both:
            return encoded.without_text().without_reference()
        return encoded


def concatenate(batches: Sequence[Encoded]) -> Encoded:
    """Batches with the same null text one after the other, as one batch."""
    if any(batch.siglip_weights for batch in batches):
        batches = [replace(batch, siglip_weights=batch.siglip_factors) for batch in batches]
    every = [batch._lists() for batch in batches]
    return replace(batches[0], **{name: [value for lists in every for value in lists[name]] for name in every[0]})


@dataclass(frozen=True, kw_only=True)  # no slots: DeepSpeed asks what modules return for its vars()
class Conditioning:
    """What the DiT reads for a batch.

    caption: B x (L, D) caption features.
    caption_scale: B x (L,) or None: attention to each caption token is multiplied by this before normalisation
    (1 = as it is, 0 = unseen).
    siglip: B x R x (h, w, S) grids, empty lists without references; siglip_scale: B x R, the same factor for each.
    omni: B x StockOmni when the stock Omni layout is asked for; it then replaces caption.
    """

    caption: list[Tensor]
    caption_scale: list[Tensor | None]
    siglip: list[list[Tensor]]
    siglip_scale: list[list[float]]
    omni: list[StockOmni] | None = None


def text_conditioning(encoded: Encoded) -> Conditioning:
    """Plain text-to-image: what every list of adapters starts from."""
    count = len(encoded)
    return Conditioning(
        caption=encoded.text,
        caption_scale=[None] * count,
        siglip=[[] for _ in range(count)],
        siglip_scale=[[] for _ in range(count)],
    )
