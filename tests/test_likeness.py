"""data_tools.likeness: the algebra of the score, the search against brute force, and copies of real pictures."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from benchmarks.planted_copies import TRANSFORMS, originals, planted
from data_tools import likeness
from data_tools.likeness import BYTES, COPY_SCORE, Copies, copy_score, find_copies, fingerprint
from ztrain.errors import InputError
from ztrain.images import open_image

SHARED = Path(__file__).parents[2] / "shared/data"
AWKWARD = SHARED / "photos/awkward"
needs_photos = pytest.mark.skipif(not AWKWARD.is_dir(), reason="../shared/data/photos is absent")
needs_data = pytest.mark.skipif(
    not (AWKWARD.is_dir() and (SHARED / "emoji_styles").is_dir()), reason="../shared/data is absent"
)
seeds = st.integers(0, 10**6)


def painted(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A lopsided picture of coloured ellipses on a coloured ground."""
    random = Random(seed)
    image = Image.new("RGB", size, _colour(random))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = random.randint(-20, size[0]), random.randint(-20, size[1])
        draw.ellipse((x, y, x + random.randint(8, 60), y + random.randint(8, 60)), fill=_colour(random))
    return image


def _colour(random: Random) -> tuple[int, int, int]:
    return random.randint(0, 255), random.randint(0, 255), random.randint(0, 255)


def flat(*levels: int) -> bytes:
    return fingerprint(Image.new("RGB", (64, 48), levels))


def stacked(fingerprints: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(fingerprints), np.uint8).reshape(-1, BYTES)


def told(copies: Copies, fingerprints: Sequence[bytes]) -> list[tuple[bytes, bytes, float, bool]]:
    """The pairs by their fingerprints instead of their numbers."""
    rows = zip(copies.pairs.tolist(), copies.scores.tolist(), copies.mirrored.tolist(), strict=True)
    return sorted((*sorted((fingerprints[i], fingerprints[j])), score, flip) for (i, j), score, flip in rows)


@pytest.fixture(scope="module")
def heap() -> list[bytes]:
    """Pictures, copies of some, mirror images of others, equal ones, flat ones."""
    images = [painted(seed) for seed in range(10)]
    changes = [*TRANSFORMS.values(), *TRANSFORMS.values()]
    copies = [change(images[i % 6], Random(i)) for i, change in enumerate(changes)]
    prints = [fingerprint(image) for image in images + copies]
    return [*prints, prints[3], prints[3], prints[8], flat(255, 255, 255), flat(252, 252, 252), flat(20, 20, 20)]


def test_a_fingerprint_is_small_and_says_what_it_needs() -> None:
    assert len(fingerprint(painted(0))) == BYTES < 1024
    assert len(fingerprint(Image.new("RGB", (1, 1)))) == BYTES
    with pytest.raises(InputError, match="mode L"):
        fingerprint(Image.new("L", (40, 40)))
    with pytest.raises(InputError, match=str(BYTES)):
        copy_score(b"short", fingerprint(painted(0)))
    with pytest.raises(InputError, match="least_score"):
        find_copies(stacked([]), least_score=0.5)
    for wrong in (np.zeros((3, BYTES - 1), np.uint8), np.zeros((3, BYTES), np.int64), np.zeros(BYTES, np.uint8)):
        with pytest.raises(InputError, match=str(BYTES)):
            find_copies(wrong)


@settings(deadline=None, max_examples=25)
@given(seeds, seeds, st.booleans(), st.sampled_from(sorted(TRANSFORMS)))
def test_the_score_is_symmetric_and_one_for_itself(one: int, other: int, mirrored: bool, transform: str) -> None:
    first = fingerprint(painted(one))
    for second in (fingerprint(painted(other)), fingerprint(TRANSFORMS[transform](painted(one), Random(other)))):
        score = copy_score(first, second, mirrored=mirrored)
        assert score == copy_score(second, first, mirrored=mirrored)
        assert 0 <= copy_score(first, second) <= copy_score(first, second, mirrored=True) <= 1
    assert copy_score(first, first, mirrored=mirrored) == 1


@settings(deadline=None, max_examples=25)
@given(seeds, seeds)
def test_mirror_images_are_copies_only_when_asked(one: int, other: int) -> None:
    image = painted(one)
    upright, mirror = fingerprint(image), fingerprint(ImageOps.mirror(image))
    assert copy_score(upright, mirror, mirrored=True) > 0.99
    if one != other:
        strange = fingerprint(painted(other))
        assert max(copy_score(upright, strange, mirrored=True), copy_score(upright, mirror)) < COPY_SCORE


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_search_finds_what_brute_force_finds(
    heap: list[bytes], mirrored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    different = sorted(set(heap))
    expected = {}
    for i, j in combinations(range(len(different)), 2):
        score = copy_score(different[i], different[j], mirrored=mirrored)
        if score >= COPY_SCORE:
            expected[i, j] = score
    monkeypatch.setattr(likeness, "_BLOCK", 7)
    monkeypatch.setattr(likeness, "_CHUNK", 5)
    found = find_copies(stacked(different), mirrored=mirrored)
    assert [tuple(pair) for pair in found.pairs.tolist()] == sorted(expected)
    assert found.scores == pytest.approx([expected[pair] for pair in sorted(expected)], abs=1e-5)
    assert found.mirrored.any() == mirrored
    strict = find_copies(stacked(different), mirrored=mirrored, least_score=0.97)
    assert strict.pairs.tolist() == found.pairs[found.scores >= 0.97].tolist() and len(strict.pairs) < len(found.pairs)
    # Both ways in which pictures are alike occur, else nothing was compared.
    assert len(expected) > 20 and len(expected) < len(different) * (len(different) - 1) / 4


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_fingerprints_does_not_matter(heap: list[bytes], seed: int) -> None:
    shuffled = Random(seed).sample(heap, len(heap))
    assert shuffled != heap
    assert told(find_copies(stacked(shuffled), mirrored=True), shuffled) == told(
        find_copies(stacked(heap), mirrored=True), heap
    )


def test_the_first_of_equal_fingerprints_stands_for_all() -> None:
    blank, other, near = flat(255, 255, 255), flat(0, 0, 0), flat(254, 254, 254)
    found = find_copies(stacked([other, blank, near, blank, blank]))
    assert found.pairs.tolist() == [[1, 2], [1, 3], [1, 4]]
    assert found.scores[1:].tolist() == [1, 1] and COPY_SCORE <= found.scores[0] < 1
    assert found.pairs.dtype == np.int64 and found.scores.dtype == np.float32 and not found.mirrored.any()


@pytest.mark.parametrize("count", [0, 1])
def test_few_fingerprints_make_no_pairs(count: int) -> None:
    found = find_copies(stacked([flat(9, 9, 9)] * count), mirrored=True)
    assert found.pairs.shape == (0, 2) and found.scores.shape == (0,) and found.mirrored.shape == (0,)


def test_flat_pictures_match_flat_pictures_of_their_colour_only() -> None:
    white, cream, gray, red = flat(255, 255, 255), flat(252, 252, 248), flat(120, 120, 120), flat(200, 60, 60)
    assert copy_score(white, cream) >= COPY_SCORE
    luminance = flat(102, 102, 102)  # of the red
    for one, other in ((white, gray), (gray, red), (white, red), (red, luminance)):
        assert copy_score(one, other) < COPY_SCORE
    for seed in range(10):
        lively = painted(seed)
        faint = fingerprint(ImageEnhance.Contrast(lively).enhance(0.2))
        mean = tuple(round(float(level)) for level in np.asarray(lively).mean((0, 1)))
        for picture in (fingerprint(lively), faint):
            assert max(copy_score(picture, still) for still in (white, gray, red, flat(*mean))) < COPY_SCORE


def test_one_drawing_in_another_colour_is_no_copy() -> None:
    def heart(fill: tuple[int, int, int]) -> bytes:
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).polygon([(64, 118), (12, 50), (36, 20), (64, 40), (92, 20), (116, 50)], fill=fill)
        return fingerprint(image)

    red, darker, blue, green = heart((220, 40, 40)), heart((180, 30, 40)), heart((40, 60, 220)), heart((40, 160, 60))
    assert copy_score(red, darker) >= COPY_SCORE
    assert max(copy_score(red, blue), copy_score(red, green), copy_score(blue, green)) < COPY_SCORE


def test_a_turn_of_all_hues_costs_little() -> None:
    class Most(Random):
        def randint(self, a: int, b: int) -> int:
            return b

    images = [painted(seed) for seed in range(40)]
    scores = [copy_score(fingerprint(image), fingerprint(TRANSFORMS["hue"](image, Most()))) for image in images]
    assert np.mean(scores) > 0.905  # 0.89 where hues may not turn


@needs_photos
def test_near_duplicates_of_the_awkward_files() -> None:
    names = ["near_a.jpg", "near_b.jpg", "near_mirrored.jpg", "dup_pixels_a.png", "dup_pixels_b.png", "gray_8bit.jpg"]
    prints = stacked([fingerprint(open_image(AWKWARD / name)) for name in names])
    plain, both = find_copies(prints), find_copies(prints, mirrored=True)
    assert plain.pairs.tolist() == [[0, 1], [3, 4]]
    assert both.pairs.tolist() == [[0, 1], [0, 2], [1, 2], [3, 4]]
    assert both.mirrored.tolist() == [False, True, True, False]
    assert plain.scores[1] == 1


@needs_data
def test_planted_copies_of_real_pictures_are_found() -> None:
    everything = originals(SHARED)
    figures = planted(Random(1).sample(everything[:-29], 24) + everything[-29::3], SHARED)
    assert figures["pairs"] == 34 * len(TRANSFORMS)
    assert figures["recall"] >= 0.98 and figures["precision"] >= 0.98
    assert min(figures["by_transform"].values()) >= 0.9
    assert figures["near_a_near_b"]
    assert figures["lopsided_mirror_images_found_unasked_share"] <= 0.05 and figures["lopsided_pictures"] > 10
