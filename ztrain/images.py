"""Pixels: any picture of any origin as 8-bit sRGB, and targets cut to the few sizes that have equal numbers of tokens.

In: the bytes of a picture, from a file, a tar or a table. Out: RGB images. Whatever is wrong with one is an
`InputError` that names it; nothing is repaired or half decoded in silence.
"""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from ztrain.errors import InputError

IMAGE_MULTIPLE = 16
"""Pixels of a DiT patch: 8 of the VAE times 2 of the transformer; every side of a target is a multiple."""

MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused from the header. Pillow's own limit (Image.MAX_IMAGE_PIXELS, 89.5
million unless the process changed it) is an error here too, so the lower of the two holds."""

ALPHA_BACKGROUND = (255, 255, 255)
"""8-bit sRGB colour that transparent pictures are laid on: white, as paper and as the shipped data."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF") + (("AVIF",) if features.check("avif") else ())
"""Pillow decoders that may see a file; the others (PostScript, FITS, ...) never get untrusted bytes."""

# What Pillow's decoders raise on damaged files, found by flipping bytes; a MemoryError stays a MemoryError.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    ImageCms.PyCMSError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


SmallTargets = Literal["refuse", "leave_out", "upscale"]
"""What becomes of targets that are too small for their bucket."""


class Picture(Protocol):
    """The bytes of one picture, wherever they lie; small, and picklable for loader workers."""

    @property
    def name(self) -> str:
        """What messages call it: a path, or a place in an archive or a table."""

    @property
    def stamp(self) -> str:
        """Differs whenever the bytes may have changed since; equal stamps save reading them again."""

    def read(self) -> bytes:
        """All bytes; OSError where they cannot be read."""


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture in a file of its own."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def stamp(self) -> str:
        return stamp_of(os.stat(self.path))

    def read(self) -> bytes:
        return self.path.read_bytes()


def stamp_of(found: os.stat_result) -> str:
    """A text that differs whenever the bytes of the file may have changed."""
    # ctime too: copying tools restore mtime, nothing restores ctime.
    return f"{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"


def open_image(picture: Picture | Path) -> Image.Image:
    """The picture as 8-bit sRGB (mode RGB, upright, fully decoded, no metadata); of several frames the first.

    EXIF orientation and ICC profile are applied, transparency is laid on `ALPHA_BACKGROUND`, 16-bit gray is
    divided by 257, float gray must lie in 0..1. Raises InputError naming the file where it is no picture of a
    known format, is damaged or cut short, or has more than `MAX_PIXELS` pixels (refused from the header).
    """
    source = PictureFile(picture) if isinstance(picture, Path) else picture
    return decode_image(read_picture(source), source.name)


def read_picture(picture: Picture) -> bytes:
    """The picture's bytes. Raises InputError where they are not to be had, which says nothing about what is in them."""
    try:
        return picture.read()
    except FileNotFoundError as error:
        raise InputError(f"{picture.name}: the picture does not exist; correct the path or restore it") from error
    except OSError as error:
        raise InputError(f"{picture.name}: cannot read the picture ({error.strerror or error})") from error


def decode_image(data: bytes, name: str) -> Image.Image:
    """The picture in these bytes, as `open_image` gives it. Raises InputError starting with `name`."""
    with _opened(data, name) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # not a copy of what is upright already
        return _to_rgb(image, name)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) as `open_image` gives them, from the header of the picture's bytes; raises as `open_image`.

    Of PNG all is decoded: their orientation may stand behind the pixels.
    """
    with _opened(data, name) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        if isinstance(image, TiffImageFile) and ExifTags.Base.Orientation in image.tag_v2:
            turned = False  # Pillow has swapped the two already
        return (height, width) if turned else (width, height)


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The picture's header read, its size checked; what decoders raise inside becomes one sentence with `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(_too_many_pixels(name, f"{image.width} x {image.height}"))
                yield image
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(_too_many_pixels(name, str(error))) from error
    except _DECODER_ERRORS as error:
        raise InputError(
            f"{name}: not a readable picture ({_reason(data, error)}); "
            f"replace it with a whole file of one of {', '.join(FORMATS)}"
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture in memory as `open_image` would give it: orientation, profile, transparency and depth in the pixels."""
    return _to_rgb(ImageOps.exif_transpose(image), "the given picture")


def _too_many_pixels(name: str, found: str) -> str:
    return f"{name}: too many pixels ({found}; at most {MAX_PIXELS:,} are read); shrink the picture"


def _reason(data: bytes, error: Exception) -> str:
    """Why decoding failed, in words; Pillow names its own buffer for files that it does not know."""
    if isinstance(error, UnidentifiedImageError):
        return "its bytes are of no known format" if data else "the file is empty"
    return str(error) or type(error).__name__


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any decoded picture as RGB, composited in sRGB: colours first, then transparency. Raises InputError."""
    profile = image.info.get("icc_profile")
    image, alpha = _split_alpha(image)
    if image.mode.startswith("I"):
        image = _scale_gray(image, name, limit=65535)
    elif image.mode == "F":
        image = _scale_gray(image, name, limit=1)
    if image.mode in ("1", "P", "YCbCr"):  # none of these carries a profile of its own colour space
        image = image.convert("RGB")
    rgb = _to_srgb(image, profile, name) if profile else image.convert("RGB")
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, ALPHA_BACKGROUND), alpha)
    rgb.info = {}  # the profile and the orientation are in the pixels now: saved again they would count twice
    return rgb


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The picture without transparency, and its transparency as an L image (None where it has none)."""
    if not image.has_transparency_data:
        return image, None
    if image.mode.startswith("I"):  # Pillow compares the transparent gray after clipping to 8 bits
        gray = np.asarray(image)
        return image, Image.fromarray(np.where(gray == image.info["transparency"], 0, 255).astype(np.uint8))
    if image.mode in ("LA", "La"):
        gray_alpha = image.convert("LA")
        return gray_alpha.getchannel("L"), gray_alpha.getchannel("A")
    rgba = image.convert("RGBA")
    # A gray picture with one transparent gray stays gray, as its profile is one for gray.
    return image if image.mode == "L" else rgba.convert("RGB"), rgba.getchannel("A")


def _scale_gray(image: Image.Image, name: str, *, limit: int) -> Image.Image:
    """Gray of values 0..limit as an L image of 0..255, rounded. Raises InputError for others, as NaN."""
    values = np.asarray(image).astype(np.float64)
    if not ((values >= 0) & (values <= limit)).all():  # written so that NaN fails too
        raise InputError(
            f"{name}: its {image.mode} pixels reach from {values.min():g} to {values.max():g}, "
            f"not inside 0..{limit}; store the picture with 8 bits per channel"
        )
    return Image.fromarray(np.round(values * (255 / limit)).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """A picture in the colours of an ICC profile as sRGB. Raises InputError where the two do not match."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if image.mode == "L" and space == "RGB":  # gray that kept the profile of an RGB original
        image = image.convert("RGB")
    if {"L": "GRAY"}.get(image.mode, image.mode) != space:
        raise InputError(
            f"{name}: its ICC profile is for {space} but its pixels are {image.mode}; "
            "save the picture without the profile"
        )
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    assert converted is not None  # None is only for in-place conversion
    return converted


def check_reference(size: tuple[int, int], name: str, *, min_side: int, max_aspect: float) -> None:
    """Refuse references that carry no look.

    `size`: (width, height) in pixels, `min_side` in pixels, `max_aspect` is long side / short side. Raises InputError
    starting with `name`.
    """
    short, long = sorted(size)
    if short < min_side:
        raise InputError(
            f"{name}: {size[0]} x {size[1]} is too small for a reference; "
            f"its short side must have at least {min_side} pixels"
        )
    if long > max_aspect * short:
        raise InputError(
            f"{name}: {size[0]} x {size[1]} is {long / short:.3g} times as long as wide; "
            f"a reference may be at most {max_aspect:g}: crop it"
        )


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size of targets in pixels, both sides multiples of 16."""

    height: int
    width: int


def target_buckets(resolution: int, max_aspect: float, padded: Callable[[int], int]) -> tuple[Bucket, ...]:
    """Sizes with as many tokens as a square of side `resolution`, up to `max_aspect` (long side / short side, >= 1).

    Equal means equal for the transformer: `padded` maps a number of tokens to the length that it is padded to, so a
    micro-batch of any of these sizes needs no mask. At most 10 percent of a short sequence is padding.
    """
    side = resolution // IMAGE_MULTIPLE
    tokens = side * side
    found = {(side, side)}
    for height in range(1, tokens + 1):
        width = tokens // height
        equal = padded(height * width) == padded(tokens) and 10 * height * width >= 9 * tokens
        if equal and max(height, width) <= max_aspect * min(height, width):
            found |= {(height, width), (width, height)}
    return tuple(Bucket(height * IMAGE_MULTIPLE, width * IMAGE_MULTIPLE) for height, width in sorted(found))


def pick_bucket(size: tuple[int, int], buckets: Sequence[Bucket], max_crop: float, name: str) -> Bucket:
    """The bucket that cuts least from a picture of (width, height) pixels.

    `max_crop` is the largest share of the picture that may be cut away: 0 takes exact aspects only, 1 anything.
    Raises InputError starting with `name` where more would go.
    """
    bucket = min(buckets, key=lambda candidate: _cut(size, candidate))
    if (cut := _cut(size, bucket)) > max_crop:
        raise InputError(
            f"{name}: {size[0]} x {size[1]} as a target of {bucket.width} x {bucket.height} would lose {cut:.1%} of "
            f"the picture, more than data.max_crop {max_crop:g}; crop it by hand, or raise data.max_target_aspect or "
            "data.max_crop"
        )
    return bucket


def _cut(size: tuple[int, int], bucket: Bucket) -> float:
    """Share of a picture of (width, height) that lies outside the largest crop of the bucket's aspect."""
    across, down = size[0] * bucket.height, size[1] * bucket.width
    return 1 - min(across, down) / max(across, down)


def enlargement(size: tuple[int, int], bucket: Bucket) -> float:
    """How many times its own width and height a picture of (width, height) pixels has when it covers the bucket."""
    return max(bucket.width / size[0], bucket.height / size[1])


def describe_small(small: Mapping[str, float], total: int, rule: SmallTargets, max_upscale: float, section: str) -> str:
    """The sentence about targets (name -> enlargement) beyond `max_upscale`, of `total`; empty where there are none.

    `section`: of the config that has the rule. Raises InputError where the rule is to refuse them.
    """
    if not small:
        return ""
    shown = ", ".join(f"{name} ({times:.3g} times)" for name, times in list(small.items())[:3])
    found = (
        f"{len(small)} of {total} targets must be enlarged by more than {section}.max_upscale {max_upscale:g} to fill "
        f"their size, first: {shown}"
    )
    if rule == "refuse":
        raise InputError(
            f"{found}; use larger pictures or a lower {section}.resolution, or set {section}.small_targets to "
            "leave_out or upscale"
        )
    return f"{found}; they are {'left out' if rule == 'leave_out' else 'enlarged'}, as {section}.small_targets says"


def fit_target(image: Image.Image, bucket: Bucket) -> Image.Image:
    """The picture resized to cover the bucket, then centre-cropped to it."""
    factor = enlargement(image.size, bucket)
    width = max(bucket.width, round(image.width * factor))
    height = max(bucket.height, round(image.height * factor))
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - bucket.width) // 2, (height - bucket.height) // 2
    return resized.crop((left, top, left + bucket.width, top + bucket.height))
