"""The order in which training visits samples: pure functions of seed and step, the same for any number of processes.

Nothing is stored and nothing is replayed: a resumed run asks for the keys of its next step. Written by hand because no
loader's own state survives another number of workers or processes.

Where token counts are given, samples of one optimizer step have about as many: within `WINDOW` steps of an epoch they
are exchanged, so that no process waits for one with more to do. Samples of equal counts stay where they were.

Where styles are given, all of them come equally often. Which caption and which variant of its references a visit takes
is decided here too, as the number of tokens depends on it.
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

CAPTION, VARIANT, _PLACE = 0, 1, 2
"""Streams of `turns`, and of the order within a style: their draws do not depend on each other."""


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Names one visit of one sample; every random draw of that visit is a function of these three numbers."""

    seed: int
    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class _Visits:
    """One epoch of a data set of N samples. indices: (N,); epochs: (N,), or () where it is the same for all."""

    indices: Integers
    epochs: Integers

    def rearranged(self, order: Integers) -> "_Visits":
        return _Visits(self.indices[order], self.epochs[order] if self.epochs.ndim else self.epochs)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Two data sets in one order: `num_samples` triplets, and `num_text_only` others that make up `share` of it.

    Indices from `num_samples` on are of the second. Each has its own epochs; position p of the order belongs to the
    second where floor((p + 1) share) > floor(p share), so that any stretch of the order has its share of them. Position
    p of one data set is in its epoch p // count, and p % count looks up that epoch's permutation.

    `tokens`: (num_samples + num_text_only,) integers, tokens of each sample by its index; or (.., C, V) where samples
    have up to C captions and V variants of their references: tokens with each, 0 where a sample has fewer. None: the
    plain order. With them each data set is grouped by its own (see `grouped`), and a step's samples are sorted by them,
    so that the micro-steps that it is cut into have equal samples too; of equal ones the first in the plain order comes
    first.

    `styles`: (num_samples,) integers from 0 without a gap, the style of each triplet: all come equally often (see
    `balanced`), and the epoch of a key is then the sample's own. None: every sample once an epoch.
    """

    num_samples: int
    num_text_only: int = 0
    share: float = 0.0
    tokens: Integers | None = field(default=None, repr=False, compare=False)
    styles: Integers | None = field(default=None, repr=False, compare=False)
    _orders: OrderedDict[tuple[int, ...], _Visits] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def keys(self, step: int, *, global_batch_size: int, seed: int) -> list[SampleKey]:
        """Keys of the `global_batch_size` samples of one optimizer step (from 0), over all ranks, in order.

        A pure function: resuming needs no replay, slicing the list serves any number of ranks, and no two keys are the
        same: every epoch visits each sample exactly once. Raises InputError for numbers out of range.
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
            visits = self._order(seed, epoch, is_other, global_batch_size)
            own_epoch = int(visits.epochs[place]) if visits.epochs.ndim else epoch
            keys.append(SampleKey(seed, own_epoch, int(visits.indices[place]) + self.num_samples * is_other))
        if self.tokens is not None:
            epochs, indices = np.array([(key.epoch, key.index) for key in keys]).T
            by_tokens = np.argsort(self._tokens(self.tokens, seed, epochs, indices), kind="stable")
            keys = [keys[place] for place in by_tokens]
        return keys

    def _count(self, is_other: bool) -> int:
        return self.num_text_only if is_other else self.num_samples

    def _order(self, seed: int, epoch: int, is_other: bool, batch: int) -> _Visits:
        """One epoch of one of the two, made once."""
        name = (seed, epoch, is_other, batch)
        if name not in self._orders:
            of_other = sum(other for _, _, other, _ in self._orders)
            if (of_other if is_other else len(self._orders) - of_other) >= _EPOCHS:
                del self._orders[next(known for known in self._orders if known[2] == is_other)]
            self._orders[name] = self._made(seed, epoch, is_other, batch)
        return self._orders[name]

    def _made(self, seed: int, epoch: int, is_other: bool, batch: int) -> _Visits:
        count = self._count(is_other)
        if is_other or self.styles is None:
            plain = _Visits(np.random.default_rng([seed, epoch]).permutation(count), np.array(epoch))
        else:
            plain = balanced(self.styles, seed, epoch)
        if self.tokens is None:
            return plain
        tokens = self._tokens(self.tokens, seed, plain.epochs, plain.indices + self.num_samples * is_other)

        def begins(step: int) -> int:
            """Where this data set stands when a step begins."""
            others = math.floor(step * batch * self.share)
            return others if is_other else step * batch - others

        return plain.rearranged(grouped(tokens, borders(begins, epoch * count, (epoch + 1) * count)))

    def _tokens(self, tokens: Integers, seed: int, epochs: Integers, indices: Integers) -> Integers:
        """Of each visit, with the caption and the variant that it takes, (len(indices),)."""
        found = tokens[indices]
        if found.ndim == 1:
            return found
        captions, variants = np.count_nonzero(found[:, :, 0], axis=1), np.count_nonzero(found[:, 0], axis=1)
        caption = turns(seed, epochs, indices, captions, CAPTION)
        variant = turns(seed, epochs, indices, variants, VARIANT)
        return found[np.arange(len(indices)), caption, variant]


def turn(key: SampleKey, count: int, stream: int) -> int:
    """Which of `count` captions or variants one visit takes: `turns` of a single one."""
    if count == 1:
        return 0
    epoch, index, of = (np.array([number]) for number in (key.epoch, key.index, count))
    return int(turns(key.seed, epoch, index, of, stream)[0])


def turns(seed: int, epochs: Integers, indices: Integers, counts: Integers, stream: int) -> Integers:
    """Which of its `counts` captions or variants, from 0, each visit takes; all arrays broadcast.

    In every `count` epochs of a sample each of them comes once, one after the other, from one that is drawn anew.
    """
    first = _drawn(seed, stream, epochs // counts, indices) % counts.astype(np.uint64)
    return (first.astype(np.int64) + epochs) % counts


def balanced(styles: Integers, seed: int, epoch: int) -> _Visits:
    """One epoch of N samples, (N,) by style, in which the numbers of visits of any two styles differ by at most one.

    Styles take turns through all epochs, and an epoch's turns are shuffled. Each style goes through its own samples by
    permutations, whose number is the epoch of the visit, and goes on with the next epoch where it had stopped: at any
    time each of its samples has been visited as often as any other of them, or once more.
    """
    count, kinds = len(styles), int(styles.max()) + 1
    start = epoch * count
    order = np.random.default_rng([seed, epoch]).permutation(count)
    kind_of = np.arange(start, start + count)[order] % kinds
    indices, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
    for kind, (own, places) in enumerate(zip(_by_kind(styles, kinds), _by_kind(kind_of, kinds), strict=True)):
        first = (start - kind + kinds - 1) // kinds  # turns that the style has had before
        passes = np.arange(first // len(own), (first + len(places) - 1) // len(own) + 1)  # (P,)
        permuted = own[np.argsort(_drawn(seed, _PLACE, passes[:, None], own), axis=1, kind="stable")]  # (P, len(own))
        taken = slice(first % len(own), first % len(own) + len(places))
        indices[places], epochs[places] = permuted.reshape(-1)[taken], np.repeat(passes, len(own))[taken]
    return _Visits(indices, epochs)


def _by_kind(values: Integers, kinds: int) -> list[Integers]:
    """The places of each value from 0 to `kinds` - 1, in order."""
    return np.split(np.argsort(values, kind="stable"), np.bincount(values, minlength=kinds).cumsum()[:-1])


def _drawn(*words: int | Integers) -> NDArray[np.uint64]:
    """64 random bits for each combination of the words, which broadcast: a pure function of them.

    SplitMix64's output function (Steele, Lea and Flood 2014) after each word, as numpy's generators take one at a time.
    """
    bits = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            bits = (bits ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


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


def grouped(tokens: Integers, steps: Integers) -> Integers:
    """Places in the plain order of an epoch, in an order in which visits of a step have about as many tokens, (N,).

    tokens: (N,) of each visit in the plain order; steps: `borders` of the epoch. Within each window of `WINDOW` steps
    the visits are sorted by tokens and cut into steps anew; these come in the order of their first visits in the plain
    one, and so do the visits of each. All with equal tokens stay where they are; so do those outside the borders.
    """
    order = np.arange(len(tokens))
    sizes = np.diff(steps)  # (S,)
    if not sizes.sum():
        return order
    first, end = steps[0], steps[-1]
    slots = np.arange(len(sizes))
    windows = slots // WINDOW
    by_tokens = np.lexsort((tokens[first:end], np.repeat(windows, sizes)))  # (P,) places; a stable sort
    earliest = np.zeros_like(slots)
    earliest[sizes > 0] = np.minimum.reduceat(by_tokens, (steps[:-1] - first)[sizes > 0])
    # Steps of a mixture differ in size by one: each takes the place of one as large.
    places = np.empty_like(slots)
    places[np.lexsort((earliest, sizes, windows))] = np.lexsort((slots, sizes, windows))
    order[first:end] = first + by_tokens[np.lexsort((by_tokens, np.repeat(places, sizes)))]
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
