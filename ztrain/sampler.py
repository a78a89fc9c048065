"""The order in which training visits samples: pure functions of seed and step, the same for any number of processes.

Nothing is stored and nothing is replayed: a resumed run asks for the keys of its next step. Written by hand because no
loader's own state survives another number of workers or processes.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ztrain.errors import InputError

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Names one visit of one sample; every random draw of that visit is a function of these three numbers."""

    seed: int
    epoch: int
    index: int


def batch_keys(step: int, *, global_batch_size: int, num_samples: int, seed: int) -> list[SampleKey]:
    """Keys of the `global_batch_size` samples of one optimizer step (from 0), over all ranks, in order.

    Sample j of the step stands at position p = step * global_batch_size + j; its epoch is p // num_samples,
    and p % num_samples looks up that epoch's permutation. A pure function: resuming needs no replay, slicing
    the list serves any number of ranks, and every epoch visits each sample exactly once. Raises InputError
    for numbers out of range.
    """
    if step < 0 or seed < 0 or global_batch_size < 1 or num_samples < 1:
        raise InputError(
            "step and seed must not be negative, global_batch_size and num_samples must be at least 1; got "
            f"step={step}, {seed=}, {global_batch_size=}, {num_samples=}"
        )
    first = step * global_batch_size
    keys = []
    for position in range(first, first + global_batch_size):
        epoch, place = divmod(position, num_samples)
        keys.append(SampleKey(seed, epoch, int(_permutation(seed, epoch, num_samples)[place])))
    return keys


@dataclass(frozen=True, slots=True)
class Mixture:
    """Two data sets in one order: `num_samples` triplets, and `num_text_only` others that make up `share` of it.

    Indices from `num_samples` on are of the second. Each has its own epochs; position p of the order belongs to the
    second where floor((p + 1) share) > floor(p share), so that any stretch of the order has its share of them.
    """

    num_samples: int
    num_text_only: int = 0
    share: float = 0.0

    def keys(self, step: int, *, global_batch_size: int, seed: int) -> list[SampleKey]:
        """Keys of one step as `batch_keys` gives them, of both data sets."""
        keys = []
        for position in range(step * global_batch_size, (step + 1) * global_batch_size):
            others = math.floor(position * self.share)
            if math.floor((position + 1) * self.share) > others:
                [key] = batch_keys(others, global_batch_size=1, num_samples=self.num_text_only, seed=seed)
                keys.append(SampleKey(seed, key.epoch, self.num_samples + key.index))
            else:
                place = position - others
                keys += batch_keys(place, global_batch_size=1, num_samples=self.num_samples, seed=seed)
        return keys


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatches:
    """One process's keys of every micro-step from `first` to `last`, in order.

    The global batch of an optimizer step is the same for any number of processes that keeps device_batch_size x
    num_processes x accumulation: the micro-steps of all processes cut one order into consecutive slices.
    """

    mixture: Mixture
    seed: int
    device_batch_size: int
    num_processes: int
    process_index: int
    first: int
    last: int

    def __iter__(self) -> Iterator[list[SampleKey]]:
        size, start = self.device_batch_size * self.num_processes, self.process_index * self.device_batch_size
        for step in range(self.first, self.last):
            keys = self.mixture.keys(step, global_batch_size=size, seed=self.seed)
            yield keys[start : start + self.device_batch_size]

    def __len__(self) -> int:
        return self.last - self.first


def spread(items: Sequence[ItemT], count: int) -> list[ItemT]:
    """At most `count` items, evenly spread over the sequence; the first and the last are among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in dict.fromkeys(places.tolist())]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_samples: int) -> Sequence[int]:
    """The order of one epoch, (num_samples,). A step spans two epochs at most unless epochs are tiny."""
    order = np.random.default_rng([seed, epoch]).permutation(num_samples)
    order.setflags(write=False)  # shared by all callers through the cache
    return order  # type: ignore[return-value]  # numpy arrays index like a Sequence
