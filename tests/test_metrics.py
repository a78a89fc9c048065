"""Scores against closed forms and brute force; intervals against what they promise."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ztrain import metrics
from ztrain.errors import InputError
from ztrain.metrics import (
    Interval,
    bootstrap,
    copy_score,
    correct,
    high_frequency_energy,
    leak,
    leak_by_chance,
    paired_bootstrap,
    psnr,
    retrieval_at_1,
    style_cosine,
    topk_correct,
)

NAN = math.nan


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def width(interval: Interval) -> float:
    return interval.high - interval.low


# Intervals


def test_an_interval_reads_and_is_written_plainly() -> None:
    interval = Interval(0.4119, 0.39, 0.4341, 256)
    assert str(interval) == "0.412 [0.390, 0.434]"
    assert Interval(**json.loads(json.dumps(interval.to_json()))) == interval


def test_bootstrap_is_the_normal_interval_where_that_holds() -> None:
    values = normal(0, 2000) * 3 + 5
    interval = bootstrap(values, resamples=4000)
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    assert interval.mean == pytest.approx(float(values.mean())) and interval.count == 2000
    assert [interval.low, interval.high] == pytest.approx([interval.mean - half, interval.mean + half], abs=0.1 * half)
    assert width(bootstrap(values, resamples=4000, confidence=0.5)) == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.1)


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
        interval = bootstrap(values, groups=groups if grouped else None, resamples=400)
        held += interval.low <= 0.3 <= interval.high
        interval = bootstrap(values, resamples=400)
        held_without += interval.low <= 0.3 <= interval.high
    assert 0.9 <= held / 200 <= 0.99
    assert held_without < held if grouped else held_without == held


def test_copies_of_triplets_narrow_nothing_when_grouped() -> None:
    values = normal(1, 100)
    names = [f"reference {i}" for i in range(100)]
    honest = bootstrap(values)
    naive, grouped = bootstrap(values.repeat(4)), bootstrap(values.repeat(4), groups=names * 4)
    assert grouped.count == 400 and grouped.mean == pytest.approx(honest.mean)
    assert (grouped.low, grouped.high) == pytest.approx((honest.low, honest.high))
    assert width(naive) == pytest.approx(width(honest) / 2, rel=0.1)


def test_groups_of_one_change_nothing_and_uneven_groups_keep_the_mean_over_triplets() -> None:
    values = normal(2, 50)
    assert bootstrap(values, groups=torch.arange(50)) == bootstrap(values)
    sizes = torch.tensor([9, 1] * 20)  # the large groups score 1, the small ones 0
    uneven = bootstrap((sizes == 9).float().repeat_interleave(sizes), groups=torch.arange(40).repeat_interleave(sizes))
    assert uneven.mean == pytest.approx(0.9) and 0.8 < uneven.low < 0.9 < uneven.high < 0.96


def test_paired_beats_unpaired_on_correlated_scores() -> None:
    common = normal(3, 300)
    theirs = common + 0.1 * normal(4, 300)
    ours = common + 0.1 * normal(5, 300) + 0.05
    difference = paired_bootstrap(ours, theirs)
    assert difference.low > 0 and difference.mean == pytest.approx(float((ours - theirs).mean()))
    assert width(difference) < 0.3 * width(bootstrap(ours))
    back = paired_bootstrap(theirs, ours)
    assert (back.low, back.high) == pytest.approx((-difference.high, -difference.low))
    assert paired_bootstrap(ours, ours) == Interval(0.0, 0.0, 0.0, 300)


def test_draws_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(6, 40)
    first = bootstrap(values, seed=7, resamples=500)
    torch.manual_seed(1)
    np.random.seed(1)
    assert bootstrap(values, seed=7, resamples=500) == first != bootstrap(values, seed=8, resamples=500)
    monkeypatch.setattr(metrics, "_DRAWS_AT_ONCE", 7 * 40)  # chunks that do not divide 500
    assert bootstrap(values, seed=7, resamples=500) == first


def test_triplets_that_cannot_tell_are_dropped_only_on_request() -> None:
    values = torch.tensor([0.0, NAN, 1.0, 1.0, NAN, 0.0])
    with pytest.raises(ValueError, match="2 of 6 values are NaN; drop_nan=True"):
        bootstrap(values)
    told = values[~values.isnan()]
    assert bootstrap(values, drop_nan=True) == bootstrap(told) and bootstrap(told).count == 4
    groups = ["a", "gone", "b", "b", "a", "c"]  # a group that lost all its triplets is no group
    assert bootstrap(values, groups=groups, drop_nan=True) == bootstrap(told, groups=["a", "b", "b", "c"])
    theirs = torch.tensor([NAN, 0.0, 0.0, 1.0, 0.0, 1.0])
    assert paired_bootstrap(values, theirs, drop_nan=True) == bootstrap(torch.tensor([1.0, 0.0, -1.0]))


@pytest.mark.parametrize(
    ("error", "complaint", "call"),
    [
        (ValueError, r"must be \(T,\)", lambda: bootstrap(torch.zeros(3, 1))),
        (ValueError, "infinite", lambda: bootstrap(torch.tensor([1.0, math.inf]))),
        (ValueError, "infinite", lambda: paired_bootstrap(*[torch.tensor([1.0, math.inf])] * 2, drop_nan=True)),
        (ValueError, "2 groups for 3 triplets", lambda: bootstrap(torch.zeros(3), groups=[0, 1])),
        (ValueError, r"groups must be \(T,\)", lambda: bootstrap(torch.zeros(3), groups=torch.zeros(3, 1))),
        (ValueError, "resamples 0", lambda: bootstrap(torch.zeros(3), resamples=0)),
        (ValueError, "confidence 95", lambda: bootstrap(torch.zeros(3), confidence=95)),
        (InputError, "at least 2 triplets", lambda: bootstrap(torch.zeros(1))),
        (InputError, "at least 2 triplets", lambda: bootstrap(torch.tensor([NAN, 1.0]), drop_nan=True)),
        (InputError, "at least 2 groups", lambda: bootstrap(torch.zeros(3), groups=[0, 0, 0])),
        (ValueError, "ours has 2 triplets and theirs 3", lambda: paired_bootstrap(torch.zeros(2), torch.zeros(3))),
        (ValueError, "of the same triplets", lambda: correct(torch.zeros(2).long(), torch.zeros(3).long())),
        (ValueError, "whole numbers", lambda: correct(torch.zeros(2), torch.zeros(2).long())),
        (ValueError, "k 4", lambda: topk_correct(torch.zeros(2, 3), torch.zeros(2).long(), 4)),
        (ValueError, "1 of 2 triplets are NaN", lambda: style_cosine(torch.tensor([[1.0], [NAN]]), torch.ones(2, 1))),
        (ValueError, "need the same", lambda: style_cosine(torch.ones(2, 3), torch.ones(2, 4))),
        (InputError, "choose 2 to that", lambda: retrieval_at_1(torch.ones(9, 2), torch.ones(9, 2))),
        (InputError, "2 different references", lambda: copy_score(torch.ones(3, 3, 16, 16), torch.ones(3, 3, 16, 16))),
        (ValueError, "at least 16 pixels", lambda: copy_score(torch.ones(3, 3, 8, 16), torch.ones(3, 3, 16, 16))),
        (ValueError, "floats of shape", lambda: high_frequency_energy(torch.ones(3, 3, 8, 8).byte())),
        (ValueError, r"in \[0, 1\], not \[-1", lambda: high_frequency_energy(-torch.ones(3, 3, 8, 8))),
        (ValueError, r"in \[0, 1\]", lambda: psnr(torch.full((3, 3, 8, 8), NAN), torch.ones(3, 3, 8, 8))),
        (ValueError, "and originals", lambda: psnr(torch.ones(1, 3, 8, 8), torch.ones(3, 3, 8, 8))),
    ],
)
def test_what_cannot_be_scored_is_refused(error: type, complaint: str, call) -> None:
    with pytest.raises(error, match=complaint):
        call()


# What a judge says


def test_correct_and_topk() -> None:
    true = torch.tensor([0, 1, 2, 2])
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [5.0, 5.0, 5.0]])
    assert correct(logits.argmax(dim=1), true).tolist() == [1, 0, 0, 0]
    assert topk_correct(logits, true, 1).tolist() == [1, 0, 0, 0]
    assert topk_correct(logits, true, 2).tolist() == [1, 1, 0, 0]  # equal logits do not hit
    assert topk_correct(logits, true, 3).tolist() == [1, 1, 1, 1]


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_topk_is_torchs(seed: int, k: int) -> None:
    logits, true = normal(seed, 20, 6), torch.arange(20) % 6
    assert torch.equal(topk_correct(logits, true, k), (logits.topk(k).indices == true[:, None]).any(dim=1).float())


def test_style_cosine() -> None:
    outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    targets = torch.tensor([[5.0, 0.0], [0.0, -3.0], [1.0, 0.0], [1.0, 0.0]])
    assert style_cosine(outputs, targets).tolist() == pytest.approx([1, -1, math.sqrt(0.5), 0])


@given(st.integers(0, 10_000), st.integers(2, 7))
@settings(max_examples=30, deadline=None)
def test_retrieval_is_the_mean_over_all_pools(seed: int, pool: int) -> None:
    targets = normal(seed, 7, 3)
    outputs = targets + normal(seed + 1, 7, 3)
    cosine = torch.nn.functional.cosine_similarity(outputs[:, None], targets[None], dim=2)
    expected = []
    for own in range(7):
        rivals = [cosine[own, list(drawn)].max() for drawn in combinations([i for i in range(7) if i != own], pool - 1)]
        expected.append(float(torch.stack([cosine[own, own] > rival for rival in rivals]).float().mean()))
    assert retrieval_at_1(outputs, targets, pool).tolist() == pytest.approx(expected, abs=1e-6)


def test_retrieval_over_random_pools_and_over_all() -> None:
    targets = normal(0, 1500, 6)  # more than one block of rows
    outputs = targets + normal(1, 1500, 6)
    cosine = torch.nn.functional.normalize(outputs, dim=1) @ torch.nn.functional.normalize(targets, dim=1).T
    plain = (cosine.argmax(dim=1) == torch.arange(1500)).float()
    assert torch.equal(retrieval_at_1(outputs, targets, 1500), plain)
    exact, generator = retrieval_at_1(outputs.float(), targets.float(), 64), torch.Generator().manual_seed(0)
    sampled = torch.zeros(1500)
    for chunk in [c for _ in range(8) for c in torch.randperm(1500, generator=generator).split(64)[:-1]]:
        sampled[chunk] += (cosine[chunk][:, chunk].argmax(dim=1) == torch.arange(64)) / 8
    assert plain.mean() < 0.2 < exact.mean()
    assert exact.mean() == pytest.approx(float(sampled.mean()), abs=0.03)


def test_retrieval_of_the_targets_themselves_by_chance_and_collapsed() -> None:
    targets = normal(2, 600, 16)
    assert retrieval_at_1(targets, targets, 256).min() == 1
    assert retrieval_at_1(normal(3, 600, 16), targets, 30).mean() == pytest.approx(1 / 30, abs=0.015)
    one = normal(4, 1, 16).float()
    assert retrieval_at_1(targets, one.repeat(600, 1).double(), 256).max() == 0
    assert retrieval_at_1(one.repeat(600, 1), one.repeat(600, 1), 256).max() == 0
    assert retrieval_at_1(one.double().repeat(600, 1), targets, 600).sum() == 1  # one target is nearest to them all


# Copies


def test_leak_counts_only_triplets_that_can_tell() -> None:
    reference = torch.tensor([0, 0, 1, 2, 2])
    prompt = torch.tensor([1, 1, 1, 0, 1])
    judged = torch.tensor([0, 1, 1, 1, 2])
    assert leak(judged, reference, prompt).tolist() == pytest.approx([1, 0, NAN, 0, 1], nan_ok=True)
    # References that are not 1: two 0 and two 2; that are not 0: one 1 and two 2.
    expected = [1 / 2, 0, NAN, 1 / 3, 1 / 2]
    assert leak_by_chance(judged, reference, prompt).tolist() == pytest.approx(expected, nan_ok=True)
    everywhere = torch.zeros(4, dtype=torch.long)
    assert leak_by_chance(everywhere, everywhere, everywhere).isnan().all()


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_chance_is_the_mean_over_all_references(seed: int) -> None:
    judged, reference, prompt = torch.randint(-1, 4, (3, 25), generator=torch.Generator().manual_seed(seed))
    chance = leak_by_chance(judged, reference, prompt).tolist()
    for i in range(25):
        dealt = [judged[i] == other for other in reference if other != prompt[i]]
        expected = NAN if reference[i] == prompt[i] else sum(map(float, dealt)) / len(dealt)
        assert chance[i] == pytest.approx(expected, nan_ok=True)


def test_a_copier_leaks_and_who_ignores_the_reference_does_not() -> None:
    """Uneven classes, so that chance is no 1 / K; the ignorer errs towards the common classes, as models do."""
    generator = np.random.default_rng(0)
    classes = torch.from_numpy(generator.choice(5, p=[0.5, 0.2, 0.15, 0.1, 0.05], size=(3, 20_000)))
    reference, prompt, guess = classes
    copied = leak(reference, reference, prompt)
    assert copied.nanmean() == 1
    obedient = paired_bootstrap(
        leak(prompt, reference, prompt), leak_by_chance(prompt, reference, prompt), drop_nan=True, resamples=200
    )
    assert (obedient.mean, obedient.count) == (0, int((reference != prompt).sum()))
    ignorer = torch.where(torch.from_numpy(generator.random(20_000) < 0.4), guess, prompt)
    scored, chance = leak(ignorer, reference, prompt), leak_by_chance(ignorer, reference, prompt)
    assert chance.nanmean() > 0.1
    assert scored.nanmean() == pytest.approx(float(chance.nanmean()), abs=0.01)
    half = torch.where(torch.from_numpy(generator.random(20_000) < 0.5), reference, ignorer)
    gained = leak(half, reference, prompt) - leak_by_chance(half, reference, prompt)
    assert 0.3 < gained.nanmean() < 0.5


def test_copy_score_of_copies_noise_and_negatives() -> None:
    references = uniform(0, 40, 3, 32, 48)
    assert copy_score(references, references).min() > 0.8
    assert copy_score(references, references).mean() > 0.9
    assert abs(copy_score(uniform(1, 40, 3, 32, 48), references).mean()) < 0.05
    assert copy_score(1 - references, references).mean() < -0.9
    assert copy_score(0.2 + 0.3 * references, references).mean() > 0.9  # paler is the same structure
    assert copy_score(torch.full((40, 3, 20, 20), 0.3), references).abs().max() == 0


def test_copy_score_is_the_difference_of_correlations() -> None:
    outputs, references = uniform(2, 20, 3, 32, 32), uniform(3, 20, 3, 32, 32)
    references[18:] = references[3]  # one picture, three triplets: no other picture to each other
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    drawn, shown = (
        (x * luma).sum(dim=1).unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(3, 4)).flatten(1).numpy()
        for x in (outputs, references)
    )
    correlation = np.corrcoef(drawn, shown)[:20, 20:]
    for i in range(20):
        others = [j for j in range(20) if not np.array_equal(shown[i], shown[j])]
        assert len(others) == (17 if i in (3, 18, 19) else 19)
        expected = correlation[i, i] - correlation[i, others].mean()
        assert float(copy_score(outputs, references)[i]) == pytest.approx(expected, abs=1e-5)


# Pictures alone


def test_high_frequency_energy_from_smooth_to_checkerboard() -> None:
    across = torch.arange(32).expand(32, 32)
    pictures = torch.stack(
        [
            torch.full((32, 32), 0.7),
            0.5 + 0.4 * torch.sin(across * 2 * math.pi * 3 / 32),  # 3 of 16 to Nyquist
            0.5 + 0.4 * torch.sin(across * 2 * math.pi * 9 / 32),
            ((across + across.T) % 2).float(),
            0.5 + 0.2 * torch.sin(across * 2 * math.pi * 3 / 32) + 0.2 * torch.sin(across.T * 2 * math.pi * 9 / 32),
        ]
    )
    images = pictures[:, None].expand(-1, 3, -1, -1)
    assert high_frequency_energy(images).tolist() == pytest.approx([0, 0, 1, 1, 0.5], abs=1e-5)
    many = images.repeat(8, 1, 1, 1)  # more than one block
    assert torch.allclose(high_frequency_energy(many), high_frequency_energy(images).repeat(8))
    noise = high_frequency_energy(uniform(0, 4, 3, 64, 64))
    assert noise.tolist() == pytest.approx([1 - math.pi / 16] * 4, abs=0.02)


def test_psnr_is_its_formula() -> None:
    originals = uniform(0, 3, 3, 8, 8) * 0.8
    off = torch.tensor([0.1, 0.01, 0.0])[:, None, None, None]
    assert psnr(originals + off, originals).tolist() == pytest.approx([20, 40, math.inf], abs=1e-3)


def test_scores_are_float32_one_for_each_triplet() -> None:
    images, rows, classes = uniform(0, 5, 3, 16, 16), uniform(1, 5, 4), torch.arange(5)
    scores = [
        correct(classes, classes),
        topk_correct(rows, classes % 4, 2),
        style_cosine(rows, rows),
        retrieval_at_1(rows.bfloat16(), rows.bfloat16(), 5),
        leak(classes, classes.flip(0), classes),
        leak_by_chance(classes, classes.flip(0), classes),
        copy_score(images, images),
        high_frequency_energy(images.bfloat16()),
        psnr(images.double(), images.double()),
    ]
    assert {(score.dtype, tuple(score.shape)) for score in scores} == {(torch.float32, (5,))}
