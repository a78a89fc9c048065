"""Pixels: any picture of any origin as 8-bit sRGB, and targets cut to the few sizes that have equal numbers of tokens.

In: the bytes of a picture, from a file, a tar or a table. Out: RGB images. Whatever is wrong with one is an
`InputError` that names it; nothing is repaired or half decoded in silence.
"""

import hashlib
import io
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from ztrain.errors import InputError
from ztrain.io import files
from ztrain.io.formats import DECODER_ERRORS, GRAY_RANGE, MAX_METADATA, opened, orientation_of
from ztrain.io.formats import HEAD as HEAD
from ztrain.io.formats import READ as READ
from ztrain.io.formats import sniff as sniff

IMAGE_MULTIPLE = 16
"""Pixels of a DiT patch: 8 of the VAE times 2 of the transformer; every side of a target is a multiple."""

ALPHA_BACKGROUND = (255, 255, 255)
"""8-bit sRGB colour that transparent pictures are laid on: white, as paper and as the shipped data."""

_AREA = (0.6, 1.0)
"""Share of a reference that a variant shows, between these."""
_STRETCH = 1.15
"""Most that a variant's aspect is longer or shorter than its reference's, times."""

_AT_ONCE = 1 << 20  # values of deep gray that are converted at a time


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
        """All bytes; OSError or InputError where they cannot be read."""


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
        return files.read_bytes(self.path, "picture")


def stamp_of(found: os.stat_result) -> str:
    """A text that differs whenever the bytes of the file may have changed."""
    # ctime too: copying tools restore mtime, nothing restores ctime.
    return f"{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"


def open_image(picture: Picture | Path, left_out: list[str] | None = None) -> Image.Image:
    """The picture as 8-bit sRGB (mode RGB, upright, fully decoded, no metadata); of several frames the first.

    EXIF orientation and ICC profile are applied, transparency is laid on `ALPHA_BACKGROUND`, 16-bit gray is
    divided by 257, float gray must lie in 0..1. Profiles and EXIF that are damaged, or a profile of other pixels, are
    passed by, and named in `left_out`, or else on stderr. Raises InputError naming the file where it is no picture of
    a known format, is damaged or cut short, or has more than `formats.MAX_PIXELS` (refused from the header).
    """
    source = PictureFile(picture) if isinstance(picture, Path) else picture
    return decode_image(read_picture(source), source.name, left_out)


def read_picture(picture: Picture) -> bytes:
    """The picture's bytes. Raises InputError where they are not to be had, which says nothing about what is in them."""
    try:
        return picture.read()
    except FileNotFoundError as error:
        raise InputError(f"{picture.name}: the picture does not exist; correct the path or restore it") from error
    except OSError as error:
        raise InputError(f"{picture.name}: cannot read the picture ({error.strerror or error})") from error


def decode_image(data: bytes, name: str, left_out: list[str] | None = None) -> Image.Image:
    """The picture in these bytes, as `open_image` gives it. Raises InputError starting with `name`."""
    notes: list[str] = [] if left_out is None else left_out
    with opened(data, name, notes) as image:
        image.load()
        rgb = _to_rgb(_upright(image, notes), name, notes)
    if left_out is None:
        _tell(name, notes)
    return rgb


_TOLD: set[str] = set()
_MOST_TOLD = 20  # pictures


def _tell(name: str, left_out: list[str]) -> None:
    """Says on stderr, once for each picture, what nobody collects."""
    if left_out and name not in _TOLD and len(_TOLD) < _MOST_TOLD:
        _TOLD.add(name)
        more = "; more such pictures are not named" if len(_TOLD) == _MOST_TOLD else ""
        print(f"note: {name}: {'; '.join(left_out)}{more}", file=sys.stderr)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) as `open_image` gives them, from the header of the picture's bytes; raises as `open_image`."""
    with opened(data, name, []) as image:
        width, height = image.size
        turned = orientation_of(image, []) in (5, 6, 7, 8)
        if isinstance(image, TiffImageFile) and ExifTags.Base.Orientation in image.tag_v2:
            turned = False  # Pillow has swapped the two already
        return (height, width) if turned else (width, height)


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture in memory as `open_image` would give it: orientation, profile, transparency and depth in the pixels."""
    name, notes = "the given picture", list[str]()
    rgb = _to_rgb(ImageOps.exif_transpose(image), name, notes)
    _tell(name, notes)
    return rgb


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the value of EXIF's orientation


def _upright(image: Image.Image, left_out: list[str]) -> Image.Image:
    # ImageOps.exif_transpose writes the other EXIF data again, which fails where one of them is damaged.
    turn = _TURNS.get(orientation_of(image, left_out))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, name: str, left_out: list[str]) -> Image.Image:
    """Any decoded picture as RGB, composited in sRGB: colours first, then transparency. Raises InputError."""
    profile = image.info.get("icc_profile")
    image, alpha = _split_alpha(image)
    if image.mode.startswith(("I", "F")):
        image = _scale_gray(image, name)
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("P", "YCbCr"):  # neither carries a profile of its own colour space
        image = image.convert("RGB")
    rgb = _to_srgb(image, profile, left_out) if profile else image.convert("RGB")
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
        return image, Image.fromarray((gray != image.info["transparency"]) * np.uint8(255))
    if image.mode in ("LA", "La"):
        gray_alpha = image.convert("LA")
        return gray_alpha.getchannel("L"), gray_alpha.getchannel("A")
    rgba = image.convert("RGBA")
    # A gray picture with one transparent gray stays gray, as its profile is one for gray.
    return image if image.mode == "L" else rgba.convert("RGB"), rgba.getchannel("A")


def _scale_gray(image: Image.Image, name: str) -> Image.Image:
    """Deep or float gray as an L image of 0..255, rounded. Raises InputError for values outside its range, as NaN."""
    black, white = image.info.get(GRAY_RANGE, (0, 1 if image.mode == "F" else 65535))
    low, high = sorted((black, white))
    values = np.asarray(image)
    gray = np.empty(values.size, np.uint8)
    for start in range(0, values.size, _AT_ONCE):  # as float64 all are eight times the picture
        some = values.reshape(-1)[start : start + _AT_ONCE].astype(np.float64)
        if not ((some >= low) & (some <= high)).all():  # written so that NaN fails too
            raise InputError(
                f"{name}: its {image.mode} pixels reach from {values.min():g} to {values.max():g}, "
                f"not inside {low}..{high}; store the picture with 8 bits per channel"
            )
        gray[start : start + _AT_ONCE] = np.round((some - black) * (255 / (white - black)))
    return Image.fromarray(gray.reshape(values.shape))


def _to_srgb(image: Image.Image, profile: bytes, left_out: list[str]) -> Image.Image:
    """A picture in the colours of an ICC profile as sRGB; as it is where the profile is damaged or of other pixels."""
    try:
        if len(profile) > MAX_METADATA:
            raise ValueError(f"it is larger than {MAX_METADATA:,} bytes")
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if image.mode == "L" and space == "RGB":  # gray that kept the profile of an RGB original
            image = image.convert("RGB")
        if image.mode == "RGB" and space == "GRAY" and _is_gray(image):  # a palette of grays
            image = image.getchannel("R")
        if {"L": "GRAY"}.get(image.mode, image.mode) != space:
            raise ValueError(f"it is for {space!r} but the pixels are {image.mode}")
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except DECODER_ERRORS as error:
        left_out.append(f"its ICC profile is left out ({error})")
        return image.convert("RGB")
    assert converted is not None  # None is only for in-place conversion
    return converted


def _is_gray(image: Image.Image) -> bool:
    red, green, blue = image.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


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
class Part:
    """A rectangle of an upright picture, in pixels from its upper left corner, and whether it is then mirrored."""

    left: int
    top: int
    width: int
    height: int
    mirrored: bool = False

    def of(self, image: Image.Image) -> Image.Image:
        part = image.crop((self.left, self.top, self.left + self.width, self.top + self.height))
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else part


@dataclass(frozen=True, slots=True, kw_only=True)
class Variants:
    """By which rule parts of a reference take its place in training; `count` with the whole one.

    mirror: whether half of them are mirrored; min_side, max_aspect: as `check_reference`, which each part passes if the
    whole does.
    """

    count: int = 1
    mirror: bool = False
    min_side: int = 1
    max_aspect: float = 8.0

    def part(self, digest: str, size: tuple[int, int], variant: int) -> Part | None:
        """Of a picture by the digest of its bytes, (width, height); None where it is the whole one, as variant 0 is.

        Share of the area, aspect and place are uniform, and a pure function of digest, size, variant and rule.
        """
        if variant == 0:
            return None
        words = struct.unpack("<5Q", hashlib.blake2b(f"{digest} {variant}".encode(), digest_size=40).digest())
        area, stretch, across, down, mirrored = ((word >> 11) / (1 << 53) for word in words)  # each in [0, 1)
        share, longer = _AREA[0] + (_AREA[1] - _AREA[0]) * area, _STRETCH ** (2 * stretch - 1)
        # A side that would be longer than the picture's is the picture's, and the other one keeps the area.
        longer = min(max(longer, share), 1 / share)
        least = max(self.min_side, IMAGE_MULTIPLE)
        width, height = (
            min(side, max(least, round(side * part)))
            for side, part in zip(size, ((share * longer) ** 0.5, (share / longer) ** 0.5), strict=True)
        )
        width, height = min(width, int(self.max_aspect * height)), min(height, int(self.max_aspect * width))
        left, top = int(across * (size[0] - width + 1)), int(down * (size[1] - height + 1))
        found = Part(left, top, width, height, self.mirror and mirrored < 0.5)
        return None if found == Part(0, 0, *size) else found


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
