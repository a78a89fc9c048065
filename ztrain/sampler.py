"""The order in which training visits samples: pure functions of seed and step, the same for any number of processes.

Nothing is stored and nothing is replayed: a resumed run asks for the keys of its next step. Written by hand because no
loader's own state survives another number of workers or processes.

Where token counts are given, samples of one optimizer step have about as many: within `WINDOW` steps of an epoch they
are exchanged, so that no process waits for one with more to do. Samples of equal counts stay where they were.
"""

import bisect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ztrain.errors import InputError

ItemT = TypeVar("ItemT")
Integers: TypeAlias = NDArray[np.integer[Any]]

WINDOW = 32
"""Optimizer steps among which samples are exchanged: more make counts more equal and the order less random. A run's
order depends on it."""
_EPOCHS = 2  # kept for each data set: a step spans two, unless epochs are tiny


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Names one visit of one sample; every random draw of that visit is a function of these three numbers."""

    seed: int
    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """Two data sets in one order: `num_samples` triplets, and `num_text_only` others that make up `share` of it.

    Indices from `num_samples` on are of the second. Each has its own epochs; position p of the order belongs to the
    second where floor((p + 1) share) > floor(p share), so that any stretch of the order has its share of them. Position
    p of one data set is in its epoch p // count, and p % count looks up that epoch's permutation.

    `tokens`: (num_samples + num_text_only,) integers, tokens of each sample by its index; None: the plain order. With
    them each data set is grouped by its own (see `grouped`), and a step's samples are sorted by them, so that the
    micro-steps that it is cut into have equal samples too; of equal ones the first in the plain order comes first.
    """

    num_samples: int
    num_text_only: int = 0
    share: float = 0.0
    tokens: Integers | None = field(default=None, repr=False, compare=False)
    _orders: OrderedDict[tuple[int, ...], Integers] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def keys(self, step: int, *, global_batch_size: int, seed: int) -> list[SampleKey]:
        """Keys of the `global_batch_size` samples of one optimizer step (from 0), over all ranks, in order.

        A pure function: resuming needs no replay, slicing the list serves any number of ranks, and every epoch visits
        each sample exactly once. Raises InputError for numbers out of range.
        """
        if step < 0 or seed < 0 or global_batch_size < 1 or self.num_samples < 1:
            raise InputError(
                "step and seed must not be negative, global_batch_size and num_samples must be at least 1; got "
                f"step={step}, {seed=}, {global_batch_size=}, num_samples={self.num_samples}"
            )
        keys = []
        for position in range(step * global_batch_size, (step + 1) * global_batch_size):
            others = math.floor(position * self.share)
            is_other = math.floor((position + 1) * self.share) > others
            epoch, place = divmod(others if is_other else position - others, self._count(is_other))
            index = int(self._order(seed, epoch, is_other, global_batch_size)[place])
            keys.append(SampleKey(seed, epoch, index + self.num_samples * is_other))
        if (tokens := self.tokens) is not None:
            keys.sort(key=lambda key: tokens[key.index])
        return keys

    def _count(self, is_other: bool) -> int:
        return self.num_text_only if is_other else self.num_samples

    def _order(self, seed: int, epoch: int, is_other: bool, batch: int) -> Integers:
        """The order of one epoch of one of the two, (its count,), made once."""
        name = (seed, epoch, is_other, batch)
        if name not in self._orders:
            of_other = sum(other for _, _, other, _ in self._orders)
            if (of_other if is_other else len(self._orders) - of_other) >= _EPOCHS:
                del self._orders[next(known for known in self._orders if known[2] == is_other)]
            self._orders[name] = self._made(seed, epoch, is_other, batch)
        return self._orders[name]

    def _made(self, seed: int, epoch: int, is_other: bool, batch: int) -> Integers:
        count = self._count(is_other)
        plain: Integers = np.random.default_rng([seed, epoch]).permutation(count)
        if self.tokens is None:
            return plain
        own = self.tokens[self.num_samples :] if is_other else self.tokens[: self.num_samples]

        def begins(step: int) -> int:
            """Where this data set stands when a step begins."""
            others = math.floor(step * batch * self.share)
            return others if is_other else step * batch - others

        return grouped(plain, own, borders(begins, epoch * count, (epoch + 1) * count))


def borders(begins: Callable[[int], int], first: int, end: int) -> Integers:
    """Where optimizer steps begin within an epoch of positions `first` to `end`, counted from its first position.

    `begins`: the position at which a step begins, which grows with it. Steps that also have samples of another epoch
    lie outside the first and the last border.
    """
    step = bisect.bisect_left(range(1 << 62), first, key=begins)
    found = []
    while (position := begins(step)) <= end:
        found.append(position - first)
        step += 1
    return np.array(found, dtype=np.int64)


def grouped(plain: Integers, tokens: Integers, steps: Integers) -> Integers:
    """`plain`, the order of one epoch, with samples exchanged so that those of a step have about as many tokens.

    tokens: of each sample, by what `plain` holds; steps: `borders` of the epoch. Within each window of `WINDOW` steps
    the samples are sorted by tokens and cut into steps anew; these come in the order of their first samples in `plain`,
    and so do the samples of each. All with equal tokens stay where they are; so do those outside the borders.
    """
    sizes = np.diff(steps)  # (S,)
    if not sizes.sum():
        return plain
    first, end = steps[0], steps[-1]
    inside = plain[first:end]  # (P,)
    slots = np.arange(len(sizes))
    windows = slots // WINDOW
    by_tokens = np.lexsort((tokens[inside], np.repeat(windows, sizes)))  # (P,) places; a stable sort
    earliest = np.zeros_like(slots)
    earliest[sizes > 0] = np.minimum.reduceat(by_tokens, (steps[:-1] - first)[sizes > 0])
    # Steps of a mixture differ in size by one: each takes the place of one as large.
    places = np.empty_like(slots)
    places[np.lexsort((earliest, sizes, windows))] = np.lexsort((slots, sizes, windows))
    order = plain.copy()
    order[first:end] = inside[by_tokens[np.lexsort((by_tokens, np.repeat(places, sizes)))]]
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatches:
    """One process's keys of every micro-step from `first` to `last`, in order.

    The global batch of an optimizer step is the same for any number of processes that keeps device_batch_size x
    num_processes x accumulation: the micro-steps of all processes cut it into consecutive slices.
    """

    mixture: Mixture
    seed: int
    device_batch_size: int
    accumulation: int
    """Micro-steps of an optimizer step."""
    num_processes: int
    process_index: int
    first: int
    last: int

    def __iter__(self) -> Iterator[list[SampleKey]]:
        together, start = self.device_batch_size * self.num_processes, self.process_index * self.device_batch_size
        step, keys = -1, list[SampleKey]()
        for micro_step in range(self.first, self.last):
            of_step, part = divmod(micro_step, self.accumulation)
            if of_step != step:
                step = of_step
                keys = self.mixture.keys(step, global_batch_size=together * self.accumulation, seed=self.seed)
            place = part * together + start
            yield keys[place : place + self.device_batch_size]

    def __len__(self) -> int:
        return self.last - self.first


def spread(items: Sequence[ItemT], count: int) -> list[ItemT]:
    """At most `count` items, evenly spread over the sequence; the first and the last are among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in dict.fromkeys(places.tolist())]
