"""Scores against closed forms and brute force."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ztrain.errors import InputError
from ztrain.metrics.intervals import difference, interval
from ztrain.metrics.scores import (
    cmmd,
    copy_score,
    correct,
    cosine,
    diversity,
    high_frequency_energy,
    kid,
    leak,
    leak_by_chance,
    palette_error,
    psnr,
    retrieval_at_1,
    topk_correct,
)

NAN = math.nan


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("error", "complaint", "call"),
    [
        (ValueError, "infinite", lambda: difference(*[torch.tensor([1.0, math.inf])] * 2)),
        (ValueError, "of the same triplets", lambda: correct(torch.zeros(2).long(), torch.zeros(3).long())),
        (ValueError, "whole numbers", lambda: correct(torch.zeros(2), torch.zeros(2).long())),
        (ValueError, "k 4", lambda: topk_correct(torch.zeros(2, 3), torch.zeros(2).long(), 4)),
        (ValueError, "1 of 2 triplets are NaN", lambda: cosine(torch.tensor([[1.0], [NAN]]), torch.ones(2, 1))),
        (ValueError, "need the same", lambda: cosine(torch.ones(2, 3), torch.ones(2, 4))),
        (ValueError, r"must be \(T, S, D\)", lambda: diversity(torch.ones(2, 3))),
        (ValueError, "1 of 6 triplets are NaN", lambda: diversity(torch.tensor([1.0, 1, 1, 1, 1, NAN]).view(2, 3, 1))),
        (InputError, "at least 2 seeds", lambda: diversity(torch.ones(2, 1, 4))),
        (
            ValueError,
            "1 outputs and 2 references",
            lambda: palette_error(torch.ones(1, 3, 4, 4), [torch.ones(3, 4, 4)] * 2),
        ),
        (ValueError, r"references must lie in", lambda: palette_error(torch.ones(1, 3, 4, 4), [-torch.ones(3, 4, 4)])),
        (ValueError, "floats of shape", lambda: palette_error([torch.ones(4, 4)], [torch.ones(3, 4, 4)])),
        (ValueError, "x has 3 features and y 4", lambda: kid(torch.ones(2, 3), torch.ones(2, 4))),
        (ValueError, "size 1", lambda: kid(torch.ones(2, 3), torch.ones(2, 3), size=1)),
        (InputError, "at least 2 pictures of each, not 5 and 1", lambda: cmmd(torch.ones(5, 3), torch.ones(1, 3))),
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


def test_cosine_is_of_directions() -> None:
    outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    targets = torch.tensor([[5.0, 0.0], [0.0, -3.0], [1.0, 0.0], [1.0, 0.0]])
    assert cosine(outputs, targets).tolist() == pytest.approx([1, -1, math.sqrt(0.5), 0])


def test_diversity_is_the_mean_over_pairs() -> None:
    embeddings = normal(0, 5, 4, 7)
    expected = []
    for rows in embeddings:
        pairs = [torch.nn.functional.cosine_similarity(rows[a], rows[b], dim=0) for a, b in combinations(range(4), 2)]
        expected.append(1 - float(torch.stack(pairs).mean()))
    assert diversity(embeddings).tolist() == pytest.approx(expected, abs=1e-6)
    assert diversity(3 * embeddings[:, :1].repeat(1, 9, 1)).tolist() == pytest.approx([0] * 5, abs=1e-6)
    assert diversity(torch.eye(6)[None] * 0.1).item() == pytest.approx(1)
    assert diversity(torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]])).item() == pytest.approx(2)  # S / (S - 1)


# Colours


def rgb_of_lab(lab: Tensor) -> Tensor:
    """Written the other way round from CIE 15 and IEC 61966-2-1, with the matrix to four places of the latter."""
    light, a, b = lab.unbind(dim=-1)
    y = (light + 16) / 116
    bent = torch.stack([y + a / 500, y, y - b / 200], dim=-1)
    low = (bent - 16 / 116) / 7.787037
    xyz = torch.where(bent > 6 / 29, bent**3, low) * torch.tensor([0.95047, 1.0, 1.08883], dtype=lab.dtype)
    matrix = [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
    linear = (xyz @ torch.tensor(matrix, dtype=lab.dtype).T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def solid(*lab: float, height: int = 8, width: int = 8) -> Tensor:
    colour = rgb_of_lab(torch.tensor(lab, dtype=torch.float64))
    return colour[:, None, None].expand(3, height, width)


def test_palette_error_of_solid_colours_is_their_delta_e() -> None:
    """(Lightness, a, b) that sRGB can show; sizes do not matter."""
    pairs = [
        ((50, 0, 0), (60, 0, 0)),
        ((50, 20, -10), (55, -5, 15)),
        ((30, 10, 10), (80, 5, 40)),
        ((60, 3, 4), (60, 0, 0)),
    ]
    outputs = [solid(*ours, height=4, width=9) for ours, _ in pairs]
    found = palette_error(outputs, [solid(*theirs) for _, theirs in pairs])
    assert found.tolist() == pytest.approx([math.dist(*pair) for pair in pairs], rel=0.03)
    black_white = palette_error(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    assert black_white.item() == pytest.approx(100, rel=0.02)


def test_palette_error_asks_what_colours_not_where() -> None:
    picture = uniform(0, 3, 32, 48)
    order = torch.randperm(32 * 48, generator=torch.Generator().manual_seed(1))
    moved = picture.flatten(1)[:, order].view(3, 48, 32)
    assert palette_error([moved, picture.flip(2)], [picture, picture]).tolist() == [0, 0]
    doubled = picture.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    assert palette_error([doubled], [picture]).item() < 0.1
    halves = torch.cat([solid(40, 0, 0), solid(60, 0, 0)], dim=2)
    thirds = torch.cat([solid(40, 0, 0), solid(40, 0, 0), solid(60, 0, 0)], dim=2)
    assert palette_error([thirds], [halves]).item() == pytest.approx(20 / 6, rel=0.03)  # a sixth moves by 20
    channels = palette_error([picture[[1, 2, 0]] * torch.tensor([1, 0.5, 0.2])[:, None, None]], [picture])
    assert channels.item() > 10  # every channel's values count, and with each other


def test_palette_error_of_gaussian_clouds() -> None:
    """Shifted by a vector: its length. Of other spread: the half normal's mean, twice the slices' sqrt(2 / pi)."""
    cloud = normal(0, 200, 200, 3)
    middle, shift = torch.tensor([55.0, 0, 0]).double(), torch.tensor([4.0, -6, 3]).double()
    narrow, moved, wide = (
        rgb_of_lab(x).permute(2, 0, 1) for x in (middle + 2 * cloud, middle + shift + 2 * cloud, middle + 6 * cloud)
    )
    found = palette_error([moved, wide], [narrow, narrow])
    assert found.tolist() == pytest.approx([float(shift.norm()), 2 * 4 * math.sqrt(2 / math.pi)], rel=0.03)
    many = rgb_of_lab(middle + 6 * normal(1, 400, 400, 3)).permute(2, 0, 1)  # more pixels than are looked at
    assert palette_error([many], [wide]).item() < 0.25


# Sets


def by_loops(x: Tensor, y: Tensor, kernel) -> float:
    """The definition, a pair at a time."""
    total = 0.0
    for rows in (x, y):
        pairs = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        total += sum(pairs) / len(pairs)
    across = [kernel(a, b) for a in x for b in y]
    return total - 2 * sum(across) / len(across)


def test_distances_of_sets_are_their_definitions() -> None:
    x, y = normal(0, 6, 5), normal(1, 9, 5) + 0.3
    polynomial = by_loops(x, y, lambda a, b: float((a @ b / 5 + 1) ** 3))
    assert kid(x, y) == pytest.approx(polynomial, rel=1e-9)
    gaussian = by_loops(x, y, lambda a, b: math.exp(-float((a - b).square().sum()) / 200))
    assert cmmd(x, y) == pytest.approx(1000 * gaussian, rel=1e-9)
    assert cmmd(x.float(), y.float()) == pytest.approx(1000 * gaussian, rel=1e-5)


def test_kid_and_cmmd_of_gaussians_are_what_integration_gives() -> None:
    """N(0, I) against N(mean, I) in D dimensions, moments of the kernels worked out by hand."""
    width, count = 6, 4000
    mean = torch.tensor([1.0, -0.5, 0.8, 0, 0, 0.4]).double()
    squared = float(mean.square().sum())
    x, y = normal(0, count, width), normal(1, count, width) + mean
    second = (squared**2 + 2 * squared + width) / width**2
    third = (squared**3 + 6 * squared**2 + 3 * squared * width + 6 * squared) / width**3
    within = (1 + 3 / width) + (1 + 3 * squared / width + 3 * second + third)
    expected = within - 2 * (1 + 3 * (width + squared) / width**2)
    assert kid(x, y, size=count) == pytest.approx(expected, rel=0.05)
    assert kid(x, y, subsets=60, size=500, seed=1) == pytest.approx(expected, rel=0.1)
    spread = 10.0**2
    expected = 2000 * (spread / (spread + 2)) ** (width / 2) * (1 - math.exp(-squared / (2 * (spread + 2))))
    assert cmmd(x, y) == pytest.approx(expected, rel=0.05)


def test_sets_of_one_kind_are_at_no_distance_on_average() -> None:
    """Also where few pictures are, which a biased estimate would call apart."""
    apart = [
        (kid(normal(i, 8, 4), normal(i + 900, 8, 4)), cmmd(normal(i, 8, 4), normal(i + 900, 8, 4))) for i in range(300)
    ]
    mean, error = np.mean(apart, axis=0), np.std(apart, axis=0) / math.sqrt(300)
    assert (np.abs(mean) < 3 * error).all() and (np.min(apart, axis=0) < 0).all()


def test_subsets_of_kid_are_the_seeds() -> None:
    x, y = normal(2, 80, 4), normal(3, 90, 4) + 1
    once = kid(x, y, subsets=5, size=20, seed=4)
    torch.manual_seed(0)
    assert kid(x, y, subsets=5, size=20, seed=4) == once != kid(x, y, subsets=5, size=20, seed=5)
    assert kid(x, y, subsets=200, size=40) == pytest.approx(kid(x, y, size=90), rel=0.1)
    few, others = x[:6], y[:5]
    without = [kid(few[torch.arange(6) != i], others, size=5) for i in range(6)]
    assert any(kid(few, others, subsets=1, size=5) == pytest.approx(one, rel=1e-9) for one in without)


# What is found


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
    above = difference(leak(prompt, reference, prompt), leak_by_chance(prompt, reference, prompt))
    obedient = interval(above, drop_nan=True, resamples=200)
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
        cosine(rows, rows),
        diversity(rows[:, None].repeat(1, 3, 1)),
        palette_error(images.bfloat16(), images),
        retrieval_at_1(rows.bfloat16(), rows.bfloat16(), 5),
        leak(classes, classes.flip(0), classes),
        leak_by_chance(classes, classes.flip(0), classes),
        copy_score(images, images),
        high_frequency_energy(images.bfloat16()),
        psnr(images.double(), images.double()),
    ]
    assert {(score.dtype, tuple(score.shape)) for score in scores} == {(torch.float32, (5,))}
