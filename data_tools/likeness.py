"""Copies of pictures, found by their looks: recompressed, resized, cropped by a few percent, recoloured, mirrored.

In: RGB pictures, each turned into a fingerprint of `BYTES` bytes, which fits a fixed-size column of a table. Out: the
pairs of fingerprints that show one picture, each with a score. A fingerprint is a thumbnail; two of them are compared
after the small shift, stretch and change of tones that bring them closest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ztrain.errors import InputError

SIDE, COLOUR_SIDE = 24, 8
"""Cells along each side of the thumbnails: of luminance, and of the two colour differences."""

BYTES = SIDE**2 + 2 * COLOUR_SIDE**2
"""Length of a fingerprint: luminance, blue and red difference (YCbCr as in JPEG), each row by row from the top."""

COPY_SCORE = 0.88
"""Pairs with at least this `copy_score` are copies. In benchmarks/planted_copies.py 99.4 percent of 5,313 planted ones
reach it, no random pair does (the highest of 5,000 has 0.75), and 20 of the 570,846 pairs of one icon set do, most of
them one drawing in two colours. With 0.85 it would be 99.5 percent and 25 of these, with 0.94 97.5 percent and 10."""

# The letters of shapes: P pairs, N fingerprints, n cells along a side of a plane, r of the compared inner part.
Floats = NDArray[np.floating[Any]]
Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]

# What a change costs, as a share of the contrast that the two pictures have: low enough for brightness, contrast and
# colour casts of 20 percent and crops of 5, high enough to tell a red heart from a blue one. Chosen on
# benchmarks/planted_copies.py by hand, one at a time.
_GAIN_COST = 0.1
"""Per square of the relative change of contrast, and of the bend of the tone curve."""
_CROSS_COST = 0.05
"""Per square of the share of a colour difference that is added to luminance, as casts and turned hues do."""
_MOVE_COST = 0.4
"""Per square of a shift or stretch, as shares of half a side: 0.001 for 5 percent."""
_TURN_COST = 0.5
"""Per square radian of hue."""
_FADED_GAIN_COST = 0.25
"""Per square of the relative changes of saturation and of contrast, multiplied: a gray copy keeps its luminance."""
_OFFSET_COST = 0.02
"""Of the mean luminance and colour, per square 8-bit level."""
_FADED_OFFSET_COST = 0.002
"""The same for as much of the mean colour as a change of saturation explains."""
_PEAK_COST = 0.5
"""Per square 8-bit level of the largest difference that is one-sided over 3 x 3 cells."""
_FLOOR = 30.0
"""Square 8-bit levels added to the contrast: what differs by less is noise, and flat pictures match by mean colour."""

_FARTHEST = 0.1
"""Largest shift and stretch tried, as a share of half a side."""
_RING = 1
"""Outermost cells left out of the close comparison: after a shift one picture knows nothing about them."""

_LOW = 8
"""Frequencies along a side (half periods) that the search looks at: a shift of 5 percent turns higher ones around."""
_AXES = 24
_RADIUS = 10.0
"""Of the search, in standard deviations of a crop by 5 percent along each of the `_AXES`."""
_COARSE_COST = 0.35
"""Cost on the halved thumbnail above which the close comparison is spared."""
_BLOCK, _CHUNK = 2048, 128
"""Fingerprints, and pairs, that are worked on at a time: few enough for the processor's caches."""


def fingerprint(image: Image.Image) -> bytes:
    """The `BYTES` bytes that tell whether two pictures look alike, of an upright 8-bit RGB picture of any size.

    Raises InputError where the picture is not RGB.
    """
    if image.mode != "RGB":
        raise InputError(f"a picture of mode {image.mode} has no fingerprint; open it with ztrain.images.open_image")
    # A triangle filter and not a box: neighbouring cells overlap, so that a shift by part of a cell can be undone.
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0).convert("YCbCr")
    luma, *colours = small.split()
    return luma.tobytes() + b"".join(colour.reduce(SIDE // COLOUR_SIDE).tobytes() for colour in colours)


@dataclass(frozen=True, slots=True)
class Copies:
    """Pairs of fingerprints that show one picture."""

    pairs: Indices
    """(M, 2): indices of fingerprints, the smaller first, in ascending order."""
    scores: Floats
    """(M,): `copy_score` of each pair."""
    mirrored: NDArray[np.bool_]
    """(M,): whether one is closer to the other's mirror image than to the other."""


@dataclass(frozen=True, slots=True)
class _Thumbnails:
    """Fingerprints as numbers."""

    luma: Floats  # (N, SIDE, SIDE), 0..255
    colour: Floats  # (N, 2, COLOUR_SIDE, COLOUR_SIDE), -128..127

    @classmethod
    def of(cls, fingerprints: Bytes) -> "_Thumbnails":
        numbers = fingerprints.astype(np.float32)
        luma, colour = numbers[:, : SIDE**2], numbers[:, SIDE**2 :] - 128
        return cls(luma.reshape(-1, SIDE, SIDE), colour.reshape(-1, 2, COLOUR_SIDE, COLOUR_SIDE))

    def flipped(self) -> "_Thumbnails":
        return _Thumbnails(self.luma[..., ::-1], self.colour[..., ::-1])

    def contrast(self) -> Floats:
        """(N,): variance over the picture, of luminance and colour together."""
        count = len(self.luma)
        luma, colour = self.luma.reshape(count, -1), self.colour.reshape(count, 2, -1)
        contrast: Floats = luma.var(1) + colour.var(2).sum(1)
        return contrast


def copy_score(one: bytes, other: bytes, *, mirrored: bool = False) -> float:
    """How surely two fingerprints show one picture, 0..1: 1 = the same; from `COPY_SCORE` on they count as copies.

    It is one minus the share of the contrast that differs after the best small change of one into the other, plus the
    costs of that change; the order of the two does not matter. `mirrored`: of the other and its mirror, the closer.
    Raises InputError where a fingerprint has a wrong length.
    """
    return float(copy_scores([(one, other)], mirrored=mirrored)[0])


def copy_scores(pairs: Sequence[tuple[bytes, bytes]], *, mirrored: bool = False) -> Floats:
    """The `copy_score` of each pair, (P,) float32; many at a time cost a tenth of one by one."""
    # The mirror image is always made of the same one of the two, else rounding would depend on their order.
    ordered = [sorted(pair) for pair in pairs]
    scores = np.ones(len(pairs), np.float32)
    differ = [place for place, (one, other) in enumerate(ordered) if one != other]
    for one in {len(given) for pair in ordered for given in pair} - {BYTES}:
        raise InputError(f"a fingerprint has {BYTES} bytes, not {one}")
    for start in range(0, len(differ), _CHUNK):
        places = differ[start : start + _CHUNK]
        sides = (b"".join(ordered[place][side] for place in places) for side in (0, 1))
        ones, others = (_Thumbnails.of(np.frombuffer(side, np.uint8).reshape(-1, BYTES)) for side in sides)
        candidates = [others, others.flipped()] if mirrored else [others]
        scores[places] = np.max([_scores(ones, candidate, np.inf) for candidate in candidates], axis=0)
    return scores


def _checked(fingerprints: Bytes) -> Bytes:
    if fingerprints.dtype != np.uint8 or fingerprints.ndim != 2 or fingerprints.shape[1] != BYTES:
        given = f"{fingerprints.dtype} {fingerprints.shape}"
        raise InputError(f"fingerprints must be an array uint8 (N, {BYTES}), not {given}")
    return fingerprints


def find_copies(fingerprints: Bytes, *, mirrored: bool = False, least_score: float = COPY_SCORE) -> Copies:
    """The pairs of fingerprints, (N, BYTES) uint8, whose `copy_score` is at least `least_score` (0.8..1).

    Of equal fingerprints the first stands for all: the others are paired with it and with nothing else, so that a
    thousand blank pages make 999 pairs and not 499,500. Which pairs are found does not depend on the order. Time grows
    with the square of N: 100,000 take about a minute. The search looks at coarse layouts first and so overlooks a few
    copies in a thousand. `mirrored`: as in `copy_score`. Raises InputError where the array is none of fingerprints.
    """
    if not 0.8 <= least_score <= 1:
        raise InputError(f"least_score must lie in 0.8..1, below it the search overlooks pairs; not {least_score}")
    rows = np.ascontiguousarray(_checked(fingerprints)).view(f"V{BYTES}").ravel()
    # Sorted, so that rounding, too, is the same for any order of the input.
    unique, first, which = np.unique(rows, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(rows)))
    equal = np.stack([first[which[again]], again], 1)
    found = [(equal, np.ones(len(again), np.float32), np.zeros(len(again), bool))]
    for flip in (False, True) if mirrored else (False,):
        pairs, scores = _matches(unique.view(np.uint8).reshape(-1, BYTES), flip, least_score)
        found.append((first[pairs], scores, np.full(len(scores), flip)))
    pairs, scores, flips = (np.concatenate(parts) for parts in zip(*found, strict=True))
    pairs.sort(axis=1)
    order = np.lexsort((flips, -scores, pairs[:, 1], pairs[:, 0]))
    pairs, scores, flips = pairs[order], scores[order], flips[order]
    best = np.ones(len(pairs), bool)
    best[1:] = (pairs[1:] != pairs[:-1]).any(1)  # a pair may be a copy both ways
    return Copies(pairs[best].astype(np.int64), scores[best], flips[best])


def _matches(fingerprints: Bytes, flip: bool, least_score: float) -> tuple[Indices, Floats]:
    """Indices (M, 2), the first smaller, and scores (M,) of the copies; `flip`: against the second's mirror image."""
    pairs: list[Indices] = [np.zeros((0, 2), np.int64)]
    scores: list[Floats] = [np.zeros(0, np.float32)]
    for near in _near(_places(fingerprints, False), _places(fingerprints, flip)):
        for start in range(0, len(near), _CHUNK):
            chunk = near[start : start + _CHUNK]
            one, other = (_Thumbnails.of(fingerprints[side]) for side in chunk.T)
            score = _scores(one, other.flipped() if flip else other, _COARSE_COST)
            pairs.append(chunk[score >= least_score])
            scores.append(score[score >= least_score])
    return np.concatenate(pairs), np.concatenate(scores)


def _near(ones: Floats, others: Floats) -> Iterator[Indices]:
    """Yields (P, 2): indices i < j of places, (N, _AXES) each, that are at most `_RADIUS` apart."""
    # Half the square of the distance as one product: |a|^2 / 2 + |b|^2 / 2 - a b.
    half = [(places**2).sum(1, keepdims=True) / 2 for places in (ones, others)]
    left = np.concatenate([-ones, half[0], np.ones_like(half[0])], 1)
    right = np.concatenate([others, np.ones_like(half[1]), half[1]], 1)
    for i in range(0, len(ones), _BLOCK):
        found = []
        for j in range(i, len(others), _BLOCK):
            close = left[i : i + _BLOCK] @ right[j : j + _BLOCK].T <= _RADIUS**2 / 2
            row, column = np.divmod(np.flatnonzero(close), close.shape[1])
            found.append(np.stack([row + i, column + j], 1))
        pairs = np.concatenate(found)
        yield pairs[pairs[:, 0] < pairs[:, 1]]


def _places(fingerprints: Bytes, flip: bool) -> Floats:
    """(N, _AXES): where the search looks for them, or for their mirror images; a crop moves them by about one."""
    places: list[Floats] = [np.zeros((0, _AXES), np.float32)]
    for start in range(0, len(fingerprints), _BLOCK):
        thumbnails = _Thumbnails.of(fingerprints[start : start + _BLOCK])
        places.append(_frequencies((thumbnails.flipped() if flip else thumbnails).luma) @ _axes())
    return np.concatenate(places)


def _frequencies(luma: Floats) -> Floats:
    """(N, _LOW**2 - 1): the low frequencies of planes (N, SIDE, SIDE), without the mean, scaled to unit contrast."""
    waves = np.cos(np.pi * np.arange(_LOW, dtype=np.float32)[:, None] * (_centres(SIDE) + 1) / 2) * (2 / SIDE) ** 0.5
    low = (waves @ luma @ waves.T).reshape(-1, _LOW**2)[:, 1:]
    # Less than two levels of contrast stay near zero: noise has no direction.
    return low / np.sqrt((low**2).sum(1, keepdims=True) + 4 * SIDE**2)


@cache
def _axes() -> Floats:
    """(_LOW**2 - 1, _AXES): the directions in which pictures differ most, next to how much crops of one differ.

    Linear discriminant analysis over made-up pictures of overlapping discs ("dead leaves", Lee, Mumford and Huang 2001,
    whose statistics are close to those of photographs), so that the search depends on no data set.
    """
    leaves = _dead_leaves(1000)
    whole = _frequencies(leaves)
    crops = [np.array([x, -0.05, y, -0.05], np.float32) for x in (-0.05, 0, 0.05) for y in (-0.05, 0, 0.05)]
    changes = np.concatenate([_frequencies(_moved(leaves, crop[None], 0)) - whole for crop in crops])
    within = changes.T.astype(np.float64) @ changes / len(changes) + 1e-5 * np.eye(whole.shape[1])
    root = np.linalg.inv(np.linalg.cholesky(within))
    _, directions = np.linalg.eigh(root @ np.cov(whole.T) @ root.T)
    axes: Floats = (root.T @ directions[:, ::-1][:, :_AXES]).astype(np.float32)
    return axes


def _dead_leaves(count: int) -> Floats:
    """(count, SIDE, SIDE), 0..255: up to 40 discs of any gray, one over another, on white or on gray."""
    random = np.random.default_rng(0)
    each = (count, 1, 1)
    pictures = np.where(random.random(each) < 0.5, 255, random.uniform(0, 255, each)) * np.ones((SIDE, SIDE))
    discs = random.integers(1, 40, each)
    y, x = np.mgrid[:SIDE, :SIDE]
    for disc in range(40):
        radius = (1.5 * np.exp(random.exponential(0.9, each))).clip(1, 0.6 * SIDE)
        column, row = random.uniform(-2, SIDE + 2, (2, *each))
        aspect = np.exp(random.normal(0, 0.4, each))
        cover = (radius - np.hypot((x - column) * aspect, (y - row) / aspect) + 0.5).clip(0, 1) * (disc < discs)
        pictures += cover * (random.uniform(0, 255, each) - pictures)
    return pictures.astype(np.float32)


def _scores(ones: _Thumbnails, others: _Thumbnails, coarse_cost: float) -> Floats:
    """(P,), 0..1: the copy scores; 0 where the cost on halved thumbnails is above `coarse_cost`."""
    contrast: Floats = (ones.contrast() + others.contrast()) / 2 + _FLOOR
    move: Floats = np.zeros((len(contrast), 4), np.float32)
    hue: Floats = (ones.colour + others.colour) / 2
    halved = _halved(ones.luma), _halved(others.luma)
    offset: Floats = (halved[0] - halved[1]).reshape(len(contrast), -1).mean(1)
    move, gain, cost = _fitted(*halved, _widened(hue, SIDE // 2, 0), move, contrast, 0)
    fixed = _OFFSET_COST * offset**2 / contrast
    coarse = cost + fixed + _colour_cost(ones.colour, others.colour, move, gain, contrast)
    kept = np.flatnonzero(coarse <= coarse_cost)
    scores = np.zeros(len(contrast), np.float32)
    if not len(kept):
        return scores
    contrast, move = contrast[kept], move[kept]
    one, other = ones.luma[kept], others.luma[kept]
    hue = _widened(hue[kept], SIDE, _RING)
    for _ in range(2):
        halfway = _moved(one, move / 2, _RING), _moved(other, -move / 2, _RING)
        move, gain, cost = _fitted(*halfway, hue, move, contrast, _RING)
    cost += fixed[kept] + _colour_cost(ones.colour[kept], others.colour[kept], move, gain, contrast)
    scores[kept] = (1 - cost).clip(0, 1)
    return scores


def _halved(planes: Floats) -> Floats:
    rows = planes[:, ::2] + planes[:, 1::2]
    halved: Floats = (rows[:, :, ::2] + rows[:, :, 1::2]) / 4
    return halved


def _widened(planes: Floats, n: int, ring: int) -> Floats:
    """(P, 2, r, r): planes (P, 2, m, m) drawn out to n cells along a side, without the outermost `ring` of them."""
    m = planes.shape[-1]
    at = ((np.arange(ring, n - ring) + 0.5) * m / n - 0.5).clip(0, m - 1)
    weights = (1 - np.abs(at[:, None] - np.arange(m))).clip(0, None).astype(np.float32)
    widened: Floats = weights @ planes @ weights.T
    return widened


def _centres(n: int) -> Floats:
    """(n,): the middles of cells, where the edges of a picture are -1 and 1."""
    return ((2 * np.arange(n) + 1) / n - 1).astype(np.float32)


def _moved(planes: Floats, move: Floats, ring: int) -> Floats:
    """(P, r, r): planes (P, n, n) seen at x + shift + stretch * x, likewise y; without the outermost `ring` of cells.

    `move` (P, 4): shift and stretch along x, then y, as shares of half a side. Cubic convolution (Keys 1981).
    """
    n = planes.shape[-1]
    middles = _centres(n)[ring : n - ring]

    def weights(shift: Floats, stretch: Floats) -> Floats:
        at = ((middles + shift[:, None] + stretch[:, None] * middles + 1) * n - 1) / 2
        far = np.abs(at.clip(0, n - 1)[:, :, None] - np.arange(n, dtype=np.float32))
        outer = np.where(far < 2, ((-0.5 * far + 2.5) * far - 4) * far + 2, 0)
        kernel = np.where(far < 1, (1.5 * far - 2.5) * far * far + 1, outer)
        normed: Floats = kernel / kernel.sum(2, keepdims=True)
        return normed

    moved: Floats = weights(move[:, 2], move[:, 3]) @ planes @ weights(move[:, 0], move[:, 1]).transpose(0, 2, 1)
    return moved


def _slopes(planes: Floats, ring: int) -> Floats:
    """(P, 4, r * r): how planes (P, r, r) change with each of the four parts of a move."""
    n = planes.shape[-1] + 2 * ring
    x = _centres(n)[ring : n - ring]
    dy, dx = np.gradient(planes, 2 / n, axis=(1, 2))
    return np.stack([dx, dx * x, dy, dy * x[:, None]], 1).reshape(len(planes), 4, -1)


def _fitted(
    one: Floats, other: Floats, hue: Floats, move: Floats, contrast: Floats, ring: int
) -> tuple[Floats, Floats, Floats]:
    """The move (P, 4) of `one` (P, r, r) that brings it closest to `other`, the gain (P,), the cost (P,) that remains.

    Both are already moved by half of `move`. One step of least squares on the slopes of their mean, which is of second
    order and the same from both sides (ESM, Benhimane and Malis 2004), with the tone curve fitted alongside.
    """
    count, cells = len(one), one.shape[-1] ** 2
    mean = (one + other) / 2
    mean -= mean.reshape(count, cells).mean(1)[:, None, None]
    tones = mean.reshape(count, 1, cells)
    bend = tones**2 / np.sqrt((tones**2).mean(2, keepdims=True) + _FLOOR)
    basis = np.concatenate([tones, bend, hue.reshape(count, 2, cells), _slopes(mean, ring)], 1)
    basis -= basis.mean(2, keepdims=True)
    difference = (other - one).reshape(count, cells)
    difference -= difference.mean(1, keepdims=True)

    price = np.array([_GAIN_COST] * 2 + [_CROSS_COST] * 2 + [_MOVE_COST] * 4, np.float32) * contrast[:, None]
    normal = basis @ basis.transpose(0, 2, 1) / cells
    normal[:, np.arange(8), np.arange(8)] += price
    wanted = (basis @ difference[:, :, None])[:, :, 0] / cells
    wanted[:, 4:] -= price[:, 4:] * move
    step = np.linalg.solve(normal, wanted[:, :, None])[:, :, 0]
    reached = (move + step[:, 4:]).clip(-_FARTHEST, _FARTHEST)
    step[:, 4:] = reached - move
    rest = difference - (step[:, None] @ basis)[:, 0]

    cost = ((rest**2).mean(1) + _PEAK_COST * _peak(rest.reshape(one.shape))) / contrast
    changes = step[:, :4] ** 2 * np.array([_GAIN_COST] * 2 + [_CROSS_COST] * 2, np.float32)
    cost += changes.sum(1) + _MOVE_COST * (reached**2).sum(1)
    return reached, step[:, 0], cost


def _peak(rest: Floats) -> Floats:
    """(P,): the largest square of a mean over 3 x 3 cells of (P, r, r).

    A different mouth in the same face changes few cells in one direction; noise and edges out of place change many,
    up and down.
    """
    rows = rest[:, :-2] + rest[:, 1:-1] + rest[:, 2:]
    means = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9
    peak: Floats = (means**2).reshape(len(rest), -1).max(1)
    return peak


def _colour_cost(one: Floats, other: Floats, move: Floats, gain: Floats, contrast: Floats) -> Floats:
    """(P,): what differs between colour planes (P, 2, n, n) after the move, a change of saturation, hue and cast."""
    count, cells = len(one), one.shape[-1] ** 2
    mean, difference = (one + other) / 2, (other - one).reshape(count, 2, cells)
    slopes = np.stack([_slopes(mean[:, plane], 0) for plane in (0, 1)], 1)
    difference -= (move[:, None, None] @ slopes)[:, :, 0]
    flat = mean.reshape(count, 2, cells)
    colour, cast = flat.mean(2), difference.mean(2)
    flat, difference = flat - colour[:, :, None], difference - cast[:, :, None]

    def share(a: Floats, b: Floats, more: Floats | float) -> Floats:
        """How much of `b` is in `a`, both (P, ...)."""
        a, b = a.reshape(count, -1), b.reshape(count, -1)
        share: Floats = (a * b).sum(1) / ((b * b).sum(1) + more)
        return share

    turned = np.stack([-flat[:, 1], flat[:, 0]], 1)
    fade = share(difference, flat, cells).clip(-2, 2)  # 2 = the other is all gray
    turn = share(difference, turned, cells * _TURN_COST * contrast).clip(-0.5, 0.5)
    rest = difference - fade[:, None, None] * flat - turn[:, None, None] * turned
    faded = share(cast, colour, 1.0).clip(-2, 2)[:, None] * colour
    unlike = (rest**2).reshape(count, -1).sum(1) / cells
    shifted = _OFFSET_COST * ((cast - faded) ** 2).sum(1) + _FADED_OFFSET_COST * (faded**2).sum(1)
    changes: Floats = _TURN_COST * turn**2 + _FADED_GAIN_COST * (fade * gain) ** 2
    return changes + (unlike + shifted) / contrast
