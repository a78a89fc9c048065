"""The order of samples: a permutation for each epoch, the same for any history, batching and number of processes; and
with token counts the same promises, and steps of equal samples."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from miniature.world import COUNT_NAMES, KIND_NAMES, PHRASINGS, PLACE_NAMES, name_content
from ztrain.cache.order import (
    CAPTION,
    VARIANT,
    WINDOW,
    Integers,
    MicroBatches,
    Mixture,
    SampleKey,
    spread,
    turn,
    turns,
)
from ztrain.errors import InputError
from ztrain.model.layout import padded

TOKENIZER = Path(__file__).parents[1] / "miniature/weights/Z-Image/tokenizer"

sizes = st.integers(1, 40)
shares = st.one_of(st.just(0.0), st.floats(0.01, 0.95))


def mixture_of(num_samples: int, num_text_only: int, share: float, chance: int, distinct: int) -> Mixture:
    """With token counts of `distinct` values; 0: without any."""
    others = num_text_only if share else 0
    tokens = np.random.default_rng(chance).integers(0, max(1, distinct), num_samples + others) * 32
    return Mixture(num_samples, others, share, tokens if distinct else None)


mixtures = st.builds(
    mixture_of,
    num_samples=st.integers(1, 300),
    num_text_only=sizes,
    share=shares,
    chance=st.integers(0, 99),
    distinct=st.integers(0, 12),
)


def whole_order(mixture: Mixture, steps: int, batch: int, seed: int = 3) -> list[list[SampleKey]]:
    return [mixture.keys(step, global_batch_size=batch, seed=seed) for step in range(steps)]


def plain(mixture: Mixture) -> Mixture:
    return replace(mixture, tokens=None)


@given(mixture=mixtures, batch=sizes, seed=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_every_epoch_visits_every_sample_once_and_a_mixture_keeps_its_share(
    mixture: Mixture, batch: int, seed: int
) -> None:
    steps = -(-3 * mixture.num_samples // batch)
    keys = [key for step in whole_order(mixture, steps, batch, seed) for key in step]
    assert len(keys) == steps * batch and {key.seed for key in keys} == {seed}
    for first, count in ((0, mixture.num_samples), (mixture.num_samples, mixture.num_text_only)):
        own = [key for key in keys if first <= key.index < first + count]
        epochs = Counter(key.epoch for key in own)
        for epoch in range(max(epochs, default=0)):  # the last one is not over
            visited = Counter(key.index - first for key in own if key.epoch == epoch)
            assert visited == Counter(range(count))
    # Each step has the share that the plain order gives it, whatever is exchanged.
    for grouped, ungrouped in zip(
        whole_order(mixture, steps, batch, seed), whole_order(plain(mixture), steps, batch, seed), strict=True
    ):
        kinds = [sorted(key.index >= mixture.num_samples for key in step) for step in (grouped, ungrouped)]
        assert kinds[0] == kinds[1]
        assert abs(sum(kinds[0]) - mixture.share * batch) <= 1


@given(
    mixture=mixtures,
    step=st.integers(0, 10**5),
    seed=st.integers(0, 9),
    split=st.sampled_from([(r, a) for r in (1, 2, 4, 8) for a in (1, 2, 4, 8) if 16 % (r * a) == 0]),
)
@settings(max_examples=100, deadline=None)
def test_a_step_depends_on_neither_history_nor_ranks_nor_accumulation(
    mixture: Mixture, step: int, seed: int, split: tuple[int, int]
) -> None:
    ranks, accumulation = split
    whole = mixture.keys(step, global_batch_size=16, seed=seed)
    fresh = replace(mixture)  # as in a process that resumes here
    orders = [
        MicroBatches(
            mixture=fresh, seed=seed, device_batch_size=16 // ranks // accumulation, accumulation=accumulation,
            num_processes=ranks, process_index=rank, first=step * accumulation, last=(step + 1) * accumulation,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    assert [len(order) for order in orders] == [accumulation] * ranks
    slices = [[key for keys in micro_step for key in keys] for micro_step in zip(*orders, strict=True)]
    assert [key for keys in slices for key in keys] == whole
    assert list(replace(orders[-1], first=orders[-1].last - 1)) == list(orders[-1])[-1:]
    if mixture.tokens is not None:  # micro-steps of all ranks are as equal as the step allows: sorted, then cut
        counts = [mixture.tokens[key.index] for key in whole]
        assert counts == sorted(counts)


@given(mixture=mixtures, batch=sizes)
@settings(max_examples=50, deadline=None)
def test_equal_samples_stay_where_the_plain_order_has_them(mixture: Mixture, batch: int) -> None:
    equal = replace(mixture, tokens=np.full(mixture.num_samples + mixture.num_text_only, 4160))
    assert whole_order(equal, 40, batch) == whole_order(plain(mixture), 40, batch)


@given(mixture=mixtures, batch=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_samples_move_within_their_window_and_borders_of_epochs_stay(mixture: Mixture, batch: int) -> None:
    steps = 3 * -(-mixture.num_samples // batch)
    before, after = (
        {(key.epoch, key.index): step for step, keys in enumerate(whole_order(order, steps, batch)) for key in keys}
        for order in (plain(mixture), mixture)
    )
    borders = {
        step
        for step, keys in enumerate(whole_order(plain(mixture), steps, batch))
        for is_other in (True, False)
        if len({key.epoch for key in keys if (key.index >= mixture.num_samples) == is_other}) > 1
    }
    for visit in before.keys() & after.keys():
        assert abs(after[visit] - before[visit]) < WINDOW
    if not mixture.num_text_only:
        for visit, step in before.items():
            assert (step not in borders) or after[visit] == step


def test_the_order_is_the_documented_one() -> None:
    keys = Mixture(5).keys(3, global_batch_size=4, seed=7)  # positions 12..15: epochs 2, 2, 2, 3
    third, fourth = (np.random.default_rng([7, epoch]).permutation(5) for epoch in (2, 3))
    assert keys == [SampleKey(7, 2, int(third[place])) for place in (2, 3, 4)] + [SampleKey(7, 3, int(fourth[0]))]
    assert all(type(key.index) is int for key in keys)  # so that keys can go into JSON
    orders = {
        tuple(key.index for key in Mixture(50).keys(epoch, global_batch_size=50, seed=seed))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


# ---- styles of unequal size


@st.composite
def styled(draw: st.DrawFn) -> tuple[Mixture, int]:
    """Styles of any sizes, with text-only samples or token counts or neither; and a batch of which an epoch holds a
    whole number where there are token counts, as samples are then exchanged inside epochs alone."""
    counts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=7))
    batch, tokens = draw(st.integers(1, 9)), None
    if is_grouped := draw(st.booleans()):
        counts[0] += -sum(counts) % batch
    chance = np.random.default_rng(draw(st.integers(0, 99)))
    styles = chance.permutation(np.repeat(np.arange(len(counts)), counts))
    if is_grouped:
        tokens = chance.integers(1, 5, len(styles)) * 32
        return Mixture(len(styles), tokens=tokens, styles=styles), batch
    share = draw(shares)
    return Mixture(len(styles), draw(sizes) if share else 0, share, styles=styles), batch


@given(made=styled(), seed=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_styles_come_equally_often_and_so_do_the_samples_of_each(made: tuple[Mixture, int], seed: int) -> None:
    """Of an epoch's visits, as many as there are samples, styles have as many but for one; through all epochs too."""
    mixture, batch = made
    assert mixture.styles is not None
    count, members = mixture.num_samples, np.bincount(mixture.styles)
    steps = -(-4 * count // batch)
    keys = [key for step in whole_order(mixture, steps, batch, seed) for key in step]
    assert len(set(keys)) == len(keys)  # so that no two visits share their noise
    own = np.array([key.index for key in keys if key.index < count])
    assert len(own) >= 4 * count or mixture.num_text_only
    for epoch in range(len(own) // count):
        for visits in (own[epoch * count : (epoch + 1) * count], own[: (epoch + 1) * count]):
            of_styles = np.bincount(mixture.styles[visits], minlength=len(members))
            assert np.ptp(of_styles) <= 1
        used = np.bincount(own[: (epoch + 1) * count], minlength=count)
        assert all(np.ptp(used[mixture.styles == style]) <= 1 for style in range(len(members)))
    # The epoch of a key is the sample's own: how often it has been visited before.
    seen = Counter[int]()
    for key in sorted(keys, key=lambda key: key.epoch):
        assert key.index >= count or key.epoch == seen[key.index]
        seen[key.index] += 1
    for step in (0, steps - 1):  # as in a process that resumes there
        assert replace(mixture).keys(step, global_batch_size=batch, seed=seed) == keys[step * batch :][:batch]


def test_equal_styles_are_each_sample_once_and_the_order_is_random() -> None:
    mixture = Mixture(600, styles=np.arange(600) % 3)
    epochs = [np.array([key.index for key in mixture.keys(e, global_batch_size=600, seed=1)]) for e in (0, 1)]
    assert all(sorted(epoch) == list(range(600)) for epoch in epochs)
    styles = epochs[0] % 3
    assert np.mean(styles[1:] == styles[:-1]) == pytest.approx(1 / 3, abs=0.07)
    places = [np.argsort(epoch) for epoch in epochs]
    assert abs(np.corrcoef(*places)[0, 1]) < 0.15 and abs(np.corrcoef(places[0], np.arange(600))[0, 1]) < 0.15
    # What a resumed run goes on with is what it was under any version of this package and of numpy.
    small = Mixture(5, styles=np.array([0, 0, 0, 0, 1]))
    assert [(key.epoch, key.index) for key in small.keys(0, global_batch_size=10, seed=7)] == [
        *((0, 1), (0, 0), (0, 3), (0, 4), (1, 4)),
        *((0, 2), (2, 4), (3, 4), (1, 0), (4, 4)),
    ]


# ---- captions and variants


def test_each_caption_and_variant_has_its_turn() -> None:
    """In every `count` epochs of a sample each of them once; whatever comes first in one of them is drawn anew."""
    indices, epochs = np.arange(3000), np.arange(12)[:, None]
    for count, stream in itertools.product((1, 3, 4), (CAPTION, VARIANT)):
        taken = turns(5, epochs, indices, np.array(count), stream)  # (12, 3000)
        for cycle in np.split(taken, 12 // count):
            assert (np.sort(cycle, axis=0) == np.arange(count)[:, None]).all()
            assert np.bincount(cycle[0], minlength=count) / 3000 == pytest.approx(1 / count, abs=0.05)
        assert [turn(SampleKey(5, 7, i), count, stream) for i in range(9)] == taken[7, :9].tolist()
    first = [turns(seed, np.array(0), indices, np.array(4), stream) for seed in (5, 6) for stream in (CAPTION, VARIANT)]
    for one, other in itertools.combinations(first, 2):
        assert np.mean(one == other) == pytest.approx(0.25, abs=0.04)
    assert first[0][:8].tolist() == [0, 0, 3, 0, 0, 3, 0, 0]


@given(balances=st.booleans(), share=st.sampled_from([0.0, 0.3]), chance=st.integers(0, 99), batch=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_steps_are_equal_by_the_tokens_of_what_is_taken(balances: bool, share: float, chance: int, batch: int) -> None:
    """The order is the one that a run would have if each epoch's samples had just the form that they take in it."""
    generator, num, others = np.random.default_rng(chance), 20 * batch, 15
    captions, variants = generator.integers(1, 4, num + others), np.array([3] * num + [1] * others)
    tokens = generator.integers(1, 6, (num + others, 3, 3)) * 32
    tokens *= (np.arange(3)[:, None] < captions[:, None, None]) & (np.arange(3) < variants[:, None, None])
    styles = np.sort(generator.integers(0, 2, num)) if balances else None
    styles = None if styles is None or np.ptp(styles) == 0 else styles
    order = Mixture(num, others, share, tokens, styles)
    if not share and styles is None:
        for epoch in range(2):
            now = [
                tokens[i, turn(SampleKey(3, epoch, i), captions[i], CAPTION), turn(SampleKey(3, epoch, i), 3, VARIANT)]
                for i in range(num)
            ]
            then = Mixture(num, tokens=np.array(now))
            for step in range(epoch * 20, epoch * 20 + 20):
                keys = order.keys(step, global_batch_size=batch, seed=3)
                assert keys == then.keys(step, global_batch_size=batch, seed=3)
    for keys in whole_order(order, 40, batch):
        taken = [
            tokens[
                key.index,
                turn(key, captions[key.index], CAPTION),
                turn(key, variants[key.index], VARIANT),
            ]
            for key in keys
        ]
        assert taken == sorted(taken) and min(taken) > 0


# ---- the order by tokens


def test_the_grouped_order_is_the_documented_one() -> None:
    """Worked by hand on the plain order of 8: two long and two short samples among the first four steps of two."""
    order = np.random.default_rng([0, 0]).permutation(8).tolist()
    a, b, c, d, e, f, g, h = order
    tokens = np.empty(8, dtype=np.int64)
    tokens[[a, c, e]], tokens[[b, f, g]], tokens[[d, h]] = 3, 1, 2
    # Sorted: b f | g d | h a | c e. By their first places: (h a) has a, then (b f), (c e), (g d); each in plain order.
    steps = [[key.index for key in keys] for keys in whole_order(Mixture(8, tokens=tokens), 4, 2, seed=0)]
    assert steps == [[h, a], [b, f], [c, e], [g, d]]  # in a step by tokens: h (2) before a (3), g (1) before d (2)


@pytest.mark.parametrize("wrong", [{"step": -1}, {"seed": -1}, {"global_batch_size": 0}, {"num_samples": 0}])
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    numbers = {"step": 0, "global_batch_size": 1, "num_samples": 1, "seed": 0, **wrong}
    with pytest.raises(InputError, match=next(iter(wrong))):
        Mixture(numbers.pop("num_samples")).keys(numbers.pop("step"), **numbers)


# ---- what it is for


def waiting(tokens: Integers, order: Mixture, ranks: int) -> float:
    """Share of the ranks' time that is lost waiting, at one sample each and time in proportion to tokens: what the
    longest sample of a step takes over the mean, less 1."""
    steps = whole_order(order, len(tokens) // ranks, ranks)
    counts = np.array([[tokens[key.index] for key in keys] for keys in steps])  # (steps, ranks)
    return float(counts.max(1).sum() / counts.mean(1).sum() - 1)


def painted_tokens(count: int) -> Integers:
    """Of painted triplets at 512 x 512: their own captions, and one to three references of 64 to 256 tokens each."""
    generator = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    contents = itertools.product(range(len(KIND_NAMES)), range(len(COUNT_NAMES)), range(len(PLACE_NAMES)))
    captions = [name_content(*content, phrasing) for content in contents for phrasing in range(PHRASINGS)]
    lengths = [len(ids) for ids in tokenizer(captions).input_ids]
    references = [generator.integers(64, 257, generator.integers(1, 4)).sum() + 2 for _ in range(count)]
    return np.array([32 * 32 + padded(lengths[i % len(lengths)] + int(extra)) for i, extra in enumerate(references)])


def test_eight_ranks_hardly_wait_for_each_other() -> None:
    tokens = painted_tokens(4000)
    assert len(set(tokens.tolist())) > 15
    mixture = Mixture(len(tokens), tokens=tokens)
    before, after = waiting(tokens, plain(mixture), ranks=8), waiting(tokens, mixture, ranks=8)
    assert before > 0.15 and after < 0.02 and after < before / 10


def test_steps_stay_random() -> None:
    """Long steps come no sooner than short ones, and every epoch makes other steps."""
    tokens = painted_tokens(4096)
    mixture = Mixture(len(tokens), tokens=tokens)
    steps = whole_order(mixture, 1024, 8)
    means = np.array([np.mean([tokens[key.index] for key in keys]) for keys in steps])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15
    places = np.arange(len(means)) % WINDOW
    assert abs(np.corrcoef(places, means)[0, 1]) < 0.15
    of_epochs = [{frozenset(key.index for key in keys) for keys in half} for half in (steps[:512], steps[512:])]
    assert len(of_epochs[0] & of_epochs[1]) < 10


@given(items=st.lists(st.integers(), min_size=1, max_size=50, unique=True), count=st.integers(1, 60))
def test_spread_takes_first_and_last_and_nothing_twice(items: list[int], count: int) -> None:
    taken = spread(items, count)
    assert len(taken) == min(count, len(items)) == len(set(taken)) and taken[0] == items[0]
    assert count == 1 or taken[-1] == items[-1]
    assert [items.index(item) for item in taken] == sorted(items.index(item) for item in taken)
