"""What can be said of a picture without a model: how sharp it is, how much there is in it, how much of it is border.

In: an 8-bit RGB picture. Out: numbers, for people and thresholds to judge; nothing is decided here.
"""

import numpy as np
from PIL import Image

_LONGEST = 256
"""Pixels of the longer side that the numbers are taken at: of larger pictures whole factors are averaged away."""
_FLAT = 8
"""Of 255: rows and columns whose values differ by no more are border. JPEG noise of a flat area stays below."""
COLUMNS = ("sharpness", "entropy", "border_share")


def measure(image: Image.Image) -> dict[str, float]:
    """Of luminance, where the longer side has up to 511 pixels.

    sharpness: standard deviation of the Laplacian (after Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield
    microscopy"), in levels of 255; 0 is flat, half of the tests' photographs have more than 29. entropy: of the
    histogram, 0 to 8 bits; below 1 is all but one colour. border_share: 0 to 1, of the picture's area outside the
    smallest box that has all rows and columns with differing values; 1 where nothing differs.
    """
    luminance = image.convert("L")
    factor = max(image.size) // _LONGEST
    gray = np.asarray(luminance.reduce(factor) if factor > 1 else luminance)  # (H, W) uint8
    shares = np.bincount(gray.ravel(), minlength=256) / gray.size
    shares = shares[shares > 0]
    return {
        "sharpness": _sharpness(gray.astype(np.int16)),
        "entropy": float(-(shares * np.log2(shares)).sum()) + 0.0,  # not -0
        "border_share": _border_share(gray),
    }


def _sharpness(gray: np.ndarray) -> float:
    inner = gray[1:-1, 1:-1]
    if not inner.size:
        return 0.0
    return float((gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * inner).std())


def _border_share(gray: np.ndarray) -> float:
    sides = [np.flatnonzero(gray.max(axis) - gray.min(axis) > _FLAT) for axis in (1, 0)]
    if not len(sides[0]) or not len(sides[1]):
        return 1.0
    inside = [int(lines[-1] - lines[0]) + 1 for lines in sides]
    return 1.0 - inside[0] * inside[1] / gray.size
