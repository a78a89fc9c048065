"""The order of samples: a permutation for each epoch, the same for any history, batching and number of processes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztrain import sampler
from ztrain.errors import InputError
from ztrain.sampler import MicroBatches, Mixture, SampleKey, batch_keys, spread

sizes = st.integers(1, 40)


@given(batch=sizes, num_samples=sizes, seed=st.integers(0, 2**40), epochs=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_every_epoch_is_a_permutation(batch: int, num_samples: int, seed: int, epochs: int) -> None:
    steps = -(-epochs * num_samples // batch)
    keys = [
        key
        for step in range(steps)
        for key in batch_keys(step, global_batch_size=batch, num_samples=num_samples, seed=seed)
    ]
    assert len(keys) == steps * batch
    for epoch in range(epochs):
        visited = keys[epoch * num_samples : (epoch + 1) * num_samples]
        assert {key.epoch for key in visited} == {epoch} and {key.seed for key in visited} == {seed}
        assert Counter(key.index for key in visited) == Counter(range(num_samples))


@given(
    step=st.integers(0, 10**6),
    num_samples=sizes,
    seed=st.integers(0, 9),
    ranks=st.sampled_from([1, 2, 3, 4, 6]),
)
@settings(max_examples=100, deadline=None)
def test_order_depends_on_neither_history_nor_batching(step: int, num_samples: int, seed: int, ranks: int) -> None:
    batch = 12
    whole = batch_keys(step, global_batch_size=batch, num_samples=num_samples, seed=seed)
    sampler._permutation.cache_clear()  # as in a process that resumes here
    assert batch_keys(step, global_batch_size=batch, num_samples=num_samples, seed=seed) == whole
    share = batch // ranks  # the same stream cut into smaller steps, as another number of ranks would
    parts = [
        batch_keys(step * ranks + rank, global_batch_size=share, num_samples=num_samples, seed=seed)
        for rank in range(ranks)
    ]
    assert [key for part in parts for key in part] == whole


def test_order_is_the_documented_one() -> None:
    keys = batch_keys(3, global_batch_size=4, num_samples=5, seed=7)  # positions 12..15: epochs 2, 2, 2, 3
    third, fourth = (np.random.default_rng([7, epoch]).permutation(5) for epoch in (2, 3))
    assert keys == [SampleKey(7, 2, int(third[place])) for place in (2, 3, 4)] + [SampleKey(7, 3, int(fourth[0]))]
    assert all(type(key.index) is int for key in keys)  # so that keys can go into JSON
    orders = {
        tuple(key.index for key in batch_keys(epoch, global_batch_size=50, num_samples=50, seed=seed))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


@pytest.mark.parametrize("wrong", [{"step": -1}, {"seed": -1}, {"global_batch_size": 0}, {"num_samples": 0}])
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    numbers = {"step": 0, "global_batch_size": 1, "num_samples": 1, "seed": 0, **wrong}
    with pytest.raises(InputError, match=next(iter(wrong))):
        batch_keys(numbers.pop("step"), **numbers)


@given(
    num_samples=sizes,
    num_text_only=sizes,
    share=st.floats(0.01, 0.95),
    batch=st.integers(1, 7),
    accumulation=st.integers(1, 3),
    ranks=st.sampled_from([1, 2, 3]),
)
@settings(max_examples=60, deadline=None)
def test_a_mixture_keeps_its_share_and_every_rank_its_slice(
    num_samples: int, num_text_only: int, share: float, batch: int, accumulation: int, ranks: int
) -> None:
    mixture, steps = Mixture(num_samples, num_text_only, share), 12
    size = batch * accumulation * ranks
    whole = [key for step in range(steps) for key in mixture.keys(step, global_batch_size=size, seed=3)]
    others = [key for key in whole if key.index >= num_samples]
    assert abs(len(others) - share * len(whole)) <= 1
    for keys, first, count in (
        ([k for k in whole if k.index < num_samples], 0, num_samples),
        (others, num_samples, num_text_only),
    ):
        for epoch in range(len(keys) // count):  # each data set in epochs of its own, every sample once in each
            visited = keys[epoch * count : (epoch + 1) * count]
            assert Counter(key.index - first for key in visited) == Counter(range(count))
            assert {key.epoch for key in visited} == {epoch}
    ordered = []
    orders = [
        MicroBatches(
            mixture=mixture, seed=3, device_batch_size=batch, num_processes=ranks, process_index=rank,
            first=0, last=steps * accumulation,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for of_micro_step in zip(*orders, strict=True):
        ordered += [key for keys in of_micro_step for key in keys]
    assert ordered == whole
    resumed = list(replace(orders[0], first=5))
    assert resumed == list(orders[0])[5:]


@given(items=st.lists(st.integers(), min_size=1, max_size=50, unique=True), count=st.integers(1, 60))
def test_spread_takes_first_and_last_and_nothing_twice(items: list[int], count: int) -> None:
    taken = spread(items, count)
    assert len(taken) == min(count, len(items)) == len(set(taken)) and taken[0] == items[0]
    assert count == 1 or taken[-1] == items[-1]
    assert [items.index(item) for item in taken] == sorted(items.index(item) for item in taken)
