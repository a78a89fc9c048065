"""Where the tokens of a batch go: rows of one length for samples of any size, and rotary factors of their positions.

All of it follows from sizes alone, so `Layouts` makes it once for each: a step of known sizes moves none of it to its
device. Legend: B batch, N tokens, d model width.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from ztrain.conditioning import moved
from ztrain.model.fast.block import AttentionScope, Packing
from ztrain.model.fast.blocks import reads_real, rotary_factors

MULTIPLE = 32  # SEQ_MULTI_OF in diffusers' transformer_z_image.py: every part is padded to this many tokens
_LAYOUTS = 32  # of which a step has up to seven; no budget counts them: 4 MiB for a picture of 1024 x 1024
_PACKED = 8
"""Samples of different lengths, up to which each is attended to by itself; a mask of more costs less than the calls."""

Grid: TypeAlias = tuple[int, int, int, int, int]
"""Place on the first axis, height, width, and the sides that it is spread over."""
MadeT = TypeVar("MadeT")


def padded(length: int) -> int:
    return length + (-length) % MULTIPLE


class Sequencing(NamedTuple):
    """Parts of each sample one after the other, without gaps between them."""

    length: int
    places: Tensor | None
    """(B, length) of each token among its sample's parts as they lie side by side; None where they lie so already."""
    seen: AttentionScope | None


class Rows:
    """Rows of one length for samples of one or more pieces, each padded to a multiple of 32.

    This padding is attended to, as in the released model; what comes after a sample's last piece (`ends`) is not.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], device: torch.device) -> None:
        self.ends = [sum(padded(length) for length in pieces) for pieces in lengths]
        self.batch, self.length = len(lengths), max(self.ends)
        counts, shifts, total = [], [], 0
        for i, pieces in enumerate(lengths):
            start = i * self.length
            for count in pieces:
                counts.append(count)
                shifts.append(start - total)
                start, total = start + padded(count), total + count
        shift, count = _to([shifts, counts], device)
        self.places = torch.arange(total, device=device) + shift.repeat_interleave(count, output_size=total)
        self.seen = _seen(self.ends, device)
        # For attention among these rows alone: seeing nothing would be NaN.
        self.refined = _seen([end or self.length for end in self.ends], device) if 0 in self.ends else self.seen

    def fill(self, tokens: Tensor, pad_token: Tensor) -> Tensor:
        """All pieces one after the other, (total, d) -> (B, N, d). The pad token always gets a gradient, be it zero."""
        pads = pad_token.to(tokens.dtype).expand(self.batch * self.length, -1)
        return pads.index_copy(0, self.places, tokens).unflatten(0, (self.batch, self.length))


class Layouts:
    """The layouts of one transformer, the last used of them at hand."""

    def __init__(self, dit: Any) -> None:
        self._dit = dit
        self._made: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def rows(self, lengths: Sequence[Sequence[int]], device: torch.device) -> Rows:
        key = tuple(tuple(pieces) for pieces in lengths)
        return self._once(("rows", key, device), lambda: Rows(key, device))

    def sequence(self, parts: Sequence[Rows], device: torch.device) -> Sequencing:
        ends = list(zip(*(part.ends for part in parts), strict=True))  # B x parts
        lengths = tuple(part.length for part in parts)

        def make() -> Sequencing:
            totals = [sum(sample) for sample in ends]
            if all(sample[:-1] == lengths[:-1] for sample in ends):
                return Sequencing(sum(lengths), None, _seen(totals, device))
            starts = [sum(lengths[:i]) for i in range(len(lengths))]
            places = torch.zeros((len(ends), max(totals)), dtype=torch.int64)
            for row, sample, total in zip(places, ends, totals, strict=True):
                torch.cat([torch.arange(s, s + n) for s, n in zip(starts, sample, strict=True)], out=row[:total])
            return Sequencing(max(totals), moved(places, device), _seen(totals, device))

        return self._once(("sequence", tuple(ends), lengths, device), make)

    def line(self, length: int, device: torch.device) -> Tensor:
        """Rotary factors of captions, one row of blocks.py's: positions 1, 2, ... on the first axis, pads count on."""

        def make() -> Tensor:
            positions = torch.zeros((length, 3), dtype=torch.int64, device=device)
            positions[:, 0] = torch.arange(1, length + 1, device=device)
            return rotary_factors(self._dit, positions).unsqueeze(0)

        return self._once(("line", length, device), make)

    def grids(self, grids: Sequence[Sequence[Grid]], length: int, device: torch.device) -> Tensor:
        """Rotary factors of each sample's grids, B rows of blocks.py's, or one row if all have the same."""
        layouts = tuple(tuple(sample) for sample in grids)
        distinct = {layout: i for i, layout in enumerate(dict.fromkeys(layouts))}

        def make() -> Tensor:
            positions = torch.stack([_positions(layout, length) for layout in distinct])
            freqs = rotary_factors(self._dit, moved(positions.flatten(0, 1), device)).unflatten(
                0, (len(distinct), length)
            )
            return freqs if len(distinct) == 1 else freqs[_to([distinct[layout] for layout in layouts], device)]

        key = layouts if len(distinct) > 1 else layouts[:1]
        return self._once(("grids", key, length, device), make)

    def _once(self, key: tuple[Any, ...], make: Callable[[], MadeT]) -> MadeT:
        key = (*key, reads_real(self._dit))
        if key not in self._made:
            self._made[key] = make()
            if len(self._made) > _LAYOUTS:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]


def _seen(ends: Sequence[int], device: torch.device) -> AttentionScope | None:
    """Of rows that samples fill up to their `ends`; None where that is everything."""
    if len(set(ends)) == 1:
        return None
    packing, ends_there = None, _to(ends, device)
    if len(ends) <= _PACKED:
        total = sum(ends)
        samples = _to(range(len(ends)), device).repeat_interleave(ends_there, output_size=total)  # (S,)
        before = ends_there.cumsum(0) - ends_there - max(ends) * _to(range(len(ends)), device)
        packing = Packing(tuple(ends), torch.arange(total, device=device) - before[samples], samples)
    return AttentionScope(torch.arange(max(ends), device=device) < ends_there.unsqueeze(1), packing)


def _to(values: Sequence[Any], device: torch.device) -> Tensor:
    """Integers on the device, without waiting for it."""
    return moved(torch.tensor(list(values)), device)


def _positions(grids: Sequence[Grid], length: int) -> Tensor:
    """Positions of grids in row order, (length, 3), on the host; padding sits at the origin."""

    def axis(steps: int, target: int) -> Tensor:
        return (torch.arange(steps) * (target - 1) / max(steps - 1, 1)).round().long()

    positions, start = torch.zeros((length, 3), dtype=torch.int64), 0
    for place, height, width, to_height, to_width in grids:
        rows, columns = torch.meshgrid(axis(height, to_height), axis(width, to_width), indexing="ij")
        grid = torch.stack([torch.full_like(rows, place), rows, columns], dim=-1).flatten(0, 1)
        positions[start : start + len(grid)] = grid
        start += padded(len(grid))
    return positions
