"""How large a picture of an aspect is: the eleven sizes of about one megapixel, and the same at other resolutions.

In: an aspect (width : height) and a resolution, or a whole config. Out: (height, width) in pixels, multiples of 16.
"""

from typing import get_args

from ztrain.config import Aspect, Config, SampleConfig
from ztrain.images import IMAGE_MULTIPLE

ASPECTS: tuple[Aspect, ...] = get_args(Aspect)

_TABLE_RESOLUTION = 1024
# Widths and heights at which Z-Image is known to compose well, about 1024 x 1024 pixels each; the portraits are these
# turned. Source: the aspect experiment of background text 002.
_LANDSCAPES: dict[Aspect, tuple[int, int]] = {
    "21:9": (1568, 672),
    "16:9": (1360, 768),
    "3:2": (1248, 832),
    "4:3": (1184, 880),
    "5:4": (1152, 912),
    "1:1": (1024, 1024),
}


def size_of(aspect: Aspect, resolution: int) -> tuple[int, int]:
    """(height, width) in pixels of about resolution x resolution: the released size at 1024, else that one scaled and
    each side rounded to a multiple of 16, at least 16. Small resolutions have few such sizes: aspects may meet there.
    """
    if aspect in _LANDSCAPES:
        width, height = _LANDSCAPES[aspect]
    else:
        first, second = aspect.split(":")
        height, width = next(size for name, size in _LANDSCAPES.items() if name == f"{second}:{first}")
    return _scaled(height, resolution), _scaled(width, resolution)


def _scaled(side: int, resolution: int) -> int:
    """In whole numbers, and a half goes up, so that a side never depends on rounding errors."""
    step = IMAGE_MULTIPLE * _TABLE_RESOLUTION
    return max(1, (2 * side * resolution + step) // (2 * step)) * IMAGE_MULTIPLE


def output_size(config: Config) -> tuple[int, int]:
    """(height, width) in pixels of what `config.sample` draws."""
    return size_in(config.sample, config.data.resolution)


def size_in(sample: SampleConfig, resolution: int) -> tuple[int, int]:
    """The same where the resolution is not a data set's."""
    if sample.aspect is not None:
        return size_of(sample.aspect, resolution)
    return sample.height or resolution, sample.width or resolution
