"""Intervals against what they promise: coverage in simulated experiments, closed forms, one layout as another."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ztrain.errors import InputError
from ztrain.metrics import intervals
from ztrain.metrics.intervals import Interval, difference, interval

NAN = math.nan


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def width(found: Interval) -> float:
    return found.high - found.low


def test_bootstrap_is_the_normal_interval_where_that_holds() -> None:
    values = normal(0, 2000) * 3 + 5
    found = interval(values, resamples=4000)
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    assert found.mean == pytest.approx(float(values.mean())) and found.count == 2000
    assert [found.low, found.high] == pytest.approx([found.mean - half, found.mean + half], abs=0.1 * half)
    assert width(interval(values, resamples=4000, confidence=0.5)) == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.1)


@pytest.mark.parametrize("grouped", [False, True])
def test_95_of_100_intervals_hold_the_true_mean(grouped: bool) -> None:
    """Triplets of one group share half their variance: only the grouped interval may call itself 95 %."""
    held = held_without = 0
    for trial in range(200):
        values = normal(trial, 60) + 0.3
        groups = torch.arange(60)
        if grouped:
            groups = torch.arange(60) % 30
            values = values + normal(trial + 1000, 30)[groups]
        found = interval(values, [groups] if grouped else [], resamples=400)
        held += found.low <= 0.3 <= found.high
        found = interval(values, resamples=400)
        held_without += found.low <= 0.3 <= found.high
    assert 0.9 <= held / 200 <= 0.99
    assert held_without < held if grouped else held_without == held


def test_copies_of_triplets_narrow_nothing_when_grouped() -> None:
    values = normal(1, 100)
    names = [f"reference {i}" for i in range(100)]
    honest = interval(values)
    naive, grouped = interval(values.repeat(4)), interval(values.repeat(4), [names * 4])
    assert grouped.count == 400 and grouped.mean == pytest.approx(honest.mean)
    assert (grouped.low, grouped.high) == pytest.approx((honest.low, honest.high))
    assert width(naive) == pytest.approx(width(honest) / 2, rel=0.1)


def test_groups_of_one_change_nothing_and_uneven_groups_keep_the_mean_over_triplets() -> None:
    values = normal(2, 50)
    assert interval(values, [torch.arange(50)]) == interval(values)
    sizes = torch.tensor([9, 1] * 20)  # the large groups score 1, the small ones 0
    uneven = interval((sizes == 9).float().repeat_interleave(sizes), [torch.arange(40).repeat_interleave(sizes)])
    assert uneven.mean == pytest.approx(0.9) and 0.8 < uneven.low < 0.9 < uneven.high < 0.96


def test_paired_beats_unpaired_on_correlated_scores() -> None:
    common = normal(3, 300)
    theirs = common + 0.1 * normal(4, 300)
    ours = common + 0.1 * normal(5, 300) + 0.05
    found = interval(difference(ours, theirs))
    assert found.low > 0 and found.mean == pytest.approx(float((ours - theirs).mean()))
    assert width(found) < 0.3 * width(interval(ours))
    back = interval(difference(theirs, ours))
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert interval(difference(ours, ours)) == Interval(mean=0.0, low=0.0, high=0.0, count=300)


def test_draws_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(6, 40)
    first = interval(values, seed=7, resamples=500)
    torch.manual_seed(1)
    np.random.seed(1)
    assert interval(values, seed=7, resamples=500) == first != interval(values, seed=8, resamples=500)
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 7 * 40)  # chunks that do not divide 500
    assert interval(values, seed=7, resamples=500) == first


def test_triplets_that_cannot_tell_are_dropped_only_on_request() -> None:
    values = torch.tensor([0.0, NAN, 1.0, 1.0, NAN, 0.0])
    with pytest.raises(ValueError, match="2 of 6 values are NaN; drop_nan=True"):
        interval(values)
    told = values[~values.isnan()]
    assert interval(values, drop_nan=True) == interval(told) and interval(told).count == 4
    groups = ["a", "gone", "b", "b", "a", "c"]  # a group that lost all its triplets is no group
    assert interval(values, [groups], drop_nan=True) == interval(told, [["a", "b", "b", "c"]])
    theirs = torch.tensor([NAN, 0.0, 0.0, 1.0, 0.0, 1.0])
    assert interval(difference(values, theirs), drop_nan=True) == interval(torch.tensor([1.0, 0.0, -1.0]))


# Prompts and references both


def layouts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each triplet's prompt and reference."""
    chance = np.random.default_rng(0)
    crossed = np.divmod(np.arange(64), 8)
    uneven = [chance.choice(n, p=np.linspace(1, 6, n) / np.linspace(1, 6, n).sum(), size=64) for n in (16, 12)]
    return {
        "crossed 8 x 8": (crossed[0], crossed[1]),
        "2 seeds of 8 x 8": (np.repeat(crossed[0], 2), np.repeat(crossed[1], 2)),
        "crossed 16 x 4": np.divmod(np.arange(64), 4),
        "nested, 4 references of each of 16 prompts": (np.arange(64) // 4, np.arange(64)),
        "own pairs": (np.arange(64), np.arange(64)),
        "2 seeds of own pairs": (np.arange(64).repeat(2), np.arange(64).repeat(2)),
        "uneven": (uneven[0], uneven[1]),
    }


def experiment(seed: int, prompts: np.ndarray, references: np.ndarray, truth: float) -> tuple[Tensor, Tensor]:
    """Two lists' scores: what a prompt, a reference, and their pair do to the difference, and noise of each picture."""
    chance = np.random.default_rng(seed)
    _, pairs = np.unique(np.stack([prompts, references]), axis=1, return_inverse=True)
    difficulty = 3 * chance.normal(size=len(prompts))
    gain = truth + chance.normal(size=prompts.max() + 1)[prompts] + chance.normal(size=references.max() + 1)[references]
    gain += 0.5 * chance.normal(size=pairs.max() + 1)[pairs] + chance.normal(size=len(prompts))
    return torch.from_numpy(difficulty + gain), torch.from_numpy(difficulty)


@pytest.mark.parametrize("layout", layouts())
def test_a_95_percent_interval_covers_the_truth_in_91_to_98_of_100(layout: str) -> None:
    """500 simulated experiments each; one-way intervals by prompts, in the last line, do not."""
    prompts, references = layouts()[layout]
    held = held_one_way = 0
    for trial in range(500):
        ours, theirs = experiment(trial, prompts, references, truth=0.3)
        found = interval(difference(ours, theirs), [prompts.tolist(), references.tolist()], resamples=400, seed=trial)
        held += found.low <= 0.3 <= found.high
        if layout.startswith("crossed"):
            one_way = interval(difference(ours, theirs), [prompts.tolist()], resamples=400, seed=trial)
            held_one_way += one_way.low <= 0.3 <= one_way.high
    assert 0.91 <= held / 500 <= 0.98
    assert held_one_way / 500 < 0.85


def test_own_pairs_have_students_interval() -> None:
    """Not the square root of 3 wider, which drawing prompts and references at once gives."""
    values, own = normal(0, 64) * 2 + 1, torch.arange(64)
    found = interval(values, [own, own])
    half = 1.998 * float(values.std()) / 8  # Student's 97.5 % with 63 degrees of freedom
    assert [found.low, found.high] == pytest.approx([found.mean - half, found.mean + half], abs=0.06 * half)
    eight = interval(values[:8], [own[:8], own[:8]])
    assert width(eight) == pytest.approx(2 * 2.365 * float(values[:8].std()) / math.sqrt(8), rel=0.15)
    assert width(interval(values, [own, own], confidence=0.5)) == pytest.approx(2 * half * 0.678 / 1.998, rel=0.06)


def test_layouts_that_are_another_in_disguise() -> None:
    values = normal(1, 64)
    prompts, references = torch.arange(64) // 8, torch.arange(64) % 8
    crossed = interval(values, [prompts, references])
    assert interval(values, [references, prompts]) == crossed
    assert interval(values, [[f"p{int(i)}" for i in prompts], [f"r{int(i)}" for i in references]]) == crossed
    twice = interval(values.repeat(2), [prompts.repeat(2), references.repeat(2)])
    assert twice.count == 128 and (twice.low, twice.high) == pytest.approx((crossed.low, crossed.high))
    by_prompt = interval(values, [prompts, torch.zeros(64)])
    assert interval(values, [torch.zeros(64), prompts]) == by_prompt == interval(values, [prompts, prompts])
    assert width(by_prompt) > width(interval(values, [prompts]))  # eight groups deserve more doubt
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert width(interval(values[order], [prompts[order], references[order]])) == pytest.approx(width(crossed), rel=0.1)


def test_both_sides_count() -> None:
    """References that decide all widen the interval, whichever way triplets are listed."""
    prompts, references = np.divmod(np.arange(64), 8)
    by_reference = torch.from_numpy(np.random.default_rng(0).normal(size=8)[references])
    found = interval(by_reference, [prompts.tolist(), references.tolist()])
    half = 2.365 * float(by_reference.std()) * math.sqrt(64 / 63 * 7 / 8) / math.sqrt(7)
    assert width(found) == pytest.approx(2 * half, rel=0.2)
    assert width(interval(by_reference, [prompts.tolist()])) == pytest.approx(0, abs=1e-12)


def test_crossed_variances_add_and_what_pairs_share_counts_once() -> None:
    """On 16 x 16: noise alone as if each triplet were its own pair; effects of both sides, as a hypotenuse."""
    prompts, references = torch.arange(256) // 16, torch.arange(256) % 16
    noise = normal(4, 256)
    alone = 2 * 1.97 * float(noise.std()) / 16
    assert width(interval(noise, [prompts, references])) == pytest.approx(alone, rel=0.2)
    of_prompts, of_references = normal(5, 16)[prompts], normal(6, 16)[references]
    by_one = [width(interval(values, [prompts, references])) for values in (of_prompts, of_references)]
    both = width(interval(of_prompts + of_references, [prompts, references]))
    assert both == pytest.approx(math.hypot(*by_one), rel=0.1) and both > 1.2 * max(by_one)


def test_a_skewed_score_has_a_skewed_interval() -> None:
    rare = (torch.arange(64) % 8 == 3).double() + 0.01 * normal(7, 64)  # by one reference of eight
    found = interval(rare, [torch.arange(64) // 8, torch.arange(64) % 8])
    assert found.high - found.mean > 1.3 * (found.mean - found.low)
    mirrored = interval(-rare, [torch.arange(64) // 8, torch.arange(64) % 8])
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_two_way_pairs_and_drops_as_the_others_do() -> None:
    values, prompts, references = normal(2, 32), torch.arange(32) // 4, torch.arange(32) % 4
    theirs = normal(3, 32)
    found = interval(difference(values, theirs), [prompts, references])
    assert found == interval(values - theirs, [prompts, references])
    assert found.mean == pytest.approx(float((values - theirs).mean()))
    back = interval(difference(theirs, values), [prompts, references])
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert interval(difference(values, values), [prompts, references]).limits == (0.0, 0.0)
    lost = values.clone()
    lost[(prompts == 5) | (torch.arange(32) == 9)] = NAN
    kept = ~lost.isnan()
    dropped = interval(lost, [prompts, references], drop_nan=True)
    assert dropped == interval(values[kept], [prompts[kept], references[kept]]) and dropped.count == 27
    assert interval(values, [prompts, references], seed=1, resamples=300) != interval(values, [prompts, references])


@pytest.mark.parametrize(
    ("error", "complaint", "call"),
    [
        (ValueError, r"must be \(T,\)", lambda: interval(torch.zeros(3, 1))),
        (ValueError, "infinite", lambda: interval(torch.tensor([1.0, math.inf]))),
        (ValueError, "2 groups for 3 triplets", lambda: interval(torch.zeros(3), [[0, 1]])),
        (ValueError, r"groups must be \(T,\)", lambda: interval(torch.zeros(3), [torch.zeros(3, 1)])),
        (ValueError, "resamples 0", lambda: interval(torch.zeros(3), resamples=0)),
        (ValueError, "confidence 95", lambda: interval(torch.zeros(3), confidence=95)),
        (InputError, "at least 2 triplets", lambda: interval(torch.zeros(1))),
        (InputError, "at least 2 triplets", lambda: interval(torch.tensor([NAN, 1.0]), drop_nan=True)),
        (InputError, "at least 2 groups", lambda: interval(torch.zeros(3), [[0, 0, 0]])),
        (ValueError, "ours has 2 triplets and theirs 3", lambda: difference(torch.zeros(2), torch.zeros(3))),
        (ValueError, "1 of 3 values are NaN", lambda: interval(torch.tensor([0, 1, NAN]), [[0, 1, 2], [0, 1, 2]])),
        (InputError, "2 prompts or 2 references", lambda: interval(torch.zeros(3), [[0, 0, 0], [1, 1, 1]])),
    ],
)
def test_what_has_no_interval_is_refused(error: type, complaint: str, call) -> None:
    with pytest.raises(error, match=complaint):
        call()
