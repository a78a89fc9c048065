"""The order in which training visits samples: pure functions of seed and step, the same for any number of processes.

Nothing is stored and nothing is replayed: a resumed run asks for the keys of its next step. Written by hand because no
loader's own state survives another number of workers or processes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ztrain.errors import InputError


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


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_samples: int) -> Sequence[int]:
    """The order of one epoch, (num_samples,). A step spans two epochs at most unless epochs are tiny."""
    order = np.random.default_rng([seed, epoch]).permutation(num_samples)
    order.setflags(write=False)  # shared by all callers through the cache
    return order  # type: ignore[return-value]  # numpy arrays index like a Sequence
