"""Triplets on disk: manifests, pictures and the order in which training visits them.

In: a folder with one sub-folder per split, each holding `metadata.jsonl` and the pictures it names.
Out: `Triplet` rows, 8-bit RGB pictures, and for any optimizer step the keys of its samples. Whatever is wrong
with a file is an `InputError` that names it; nothing is skipped, repaired or half decoded in silence.
"""

import functools
import io
import json
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features

from ztrain.errors import InputError

MANIFEST_NAME = "metadata.jsonl"
"""The name that `datasets` gives the table of an image folder, so that the same folder loads there too."""

MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused from the header. Pillow's own limit (Image.MAX_IMAGE_PIXELS, 89.5
million unless the process changed it) is an error here too, so the lower of the two holds."""

ALPHA_BACKGROUND = (255, 255, 255)
"""8-bit sRGB colour that transparent pictures are laid on: white, as paper and as the shipped data."""

LATENT_MULTIPLE = 16
"""Target sides are multiples of 16 pixels: 8 per VAE latent times 2 latents per transformer patch."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Triplet:
    """One row of a manifest: make `target` from `prompt` in the look of `references`."""

    index: int
    """Position among the rows of the manifest, from 0."""
    prompt: str
    """Not empty, without white space around it."""
    references: tuple[Path, ...]
    """At least one existing file."""
    target: Path
    """An existing file."""
    columns: dict[str, object]
    """The row's further keys as JSON gave them, for example style and content."""


def read_manifest(folder: Path, split: str) -> list[Triplet]:
    """Rows of `<folder>/<split>/metadata.jsonl` in file order; the pictures must exist but are not opened.

    A row is a JSON object with `prompt`, `target_file_name` and either `reference_file_name` or the list
    `reference_file_names`; paths are relative to the manifest and stay inside its folder. Blank lines are
    allowed. Raises InputError naming file and line for anything else.
    """
    path = folder / split / MANIFEST_NAME
    try:
        raw_lines = path.read_bytes().splitlines()  # of bytes: U+2028 inside a prompt is no line end
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the manifest of split {split!r} ({error.strerror}); "
            "build the folder with data_tools.build or correct the data folder and split name"
        ) from error
    triplets: list[Triplet] = []
    for number, raw in enumerate(raw_lines, start=1):
        if raw.strip():
            triplets.append(_parse_row(raw, len(triplets), path.parent, where=f"{path}:{number}"))
    if not triplets:
        raise InputError(f"{path}: the manifest has no rows; give it at least one triplet")
    return triplets


def _parse_row(raw: bytes, index: int, folder: Path, *, where: str) -> Triplet:
    """One manifest line as a Triplet; `where` is file:line for messages. Raises InputError."""
    try:
        row = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a duplicate key, NaN, absurd nesting
        raise InputError(f"{where}: not a row of JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    names = _reference_names(row, where=where)
    target_name = _take_text(row, "target_file_name", where=where)
    prompt = _take_text(row, "prompt", where=where)
    return Triplet(
        index=index,
        prompt=prompt,
        references=tuple(_resolve(folder, name, where=where) for name in names),
        target=_resolve(folder, target_name, where=where),
        columns=row,  # the known keys have been taken out
    )


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict; ValueError where a key stands twice, as json would silently keep the last."""
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} stands twice in one object; keep one")
        result[key] = value
    return result


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON; write a number or null")


def _reference_names(row: dict[str, object], *, where: str) -> list[str]:
    """Take the reference file names, one or more, out of the row. Raises InputError."""
    if "reference_file_names" not in row:
        return [_take_text(row, "reference_file_name", where=where)]
    if "reference_file_name" in row:
        raise InputError(f"{where}: has both reference_file_name and reference_file_names; keep one")
    names = row.pop("reference_file_names")
    if not isinstance(names, list) or not names:
        raise InputError(f"{where}: reference_file_names must be a list of at least one name, not {names!r}")
    return [_check_text(name, "reference_file_names", where=where) for name in names]


def _take_text(row: dict[str, object], key: str, *, where: str) -> str:
    """Take a string that says something out of the row. Raises InputError."""
    if key not in row:
        found = ", ".join(map(repr, row)) or "no keys"
        raise InputError(f"{where}: the key {key!r} is missing; the row has {found}")
    return _check_text(row.pop(key), key, where=where)


def _check_text(value: object, key: str, *, where: str) -> str:
    """The string without white space around it. Raises InputError for other types and empty strings."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be text, not {value!r}")
    text = value.strip()
    if not text:
        raise InputError(f"{where}: {key} is empty; write it or drop the row")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{where}: {key} holds half of a surrogate pair and is not text; write it as UTF-8")
    return text


def _resolve(folder: Path, name: str, *, where: str) -> Path:
    """The existing file that a manifest names, inside `folder`. Raises InputError."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or PureWindowsPath(name).drive or ".." in pure.parts:
        raise InputError(f"{where}: {name!r} leaves the split folder; give a path below {folder}")
    path = folder / pure
    if not os.path.isfile(path):  # unlike Path.is_file, also False for names too long for the file system
        raise InputError(f"{where}: the picture {name!r} is not in {folder}; restore it or drop the row")
    return path


def open_image(path: Path) -> Image.Image:
    """The picture as 8-bit sRGB (mode RGB, upright, fully decoded, no metadata); of several frames the first.

    EXIF orientation and ICC profile are applied, transparency is laid on `ALPHA_BACKGROUND`, 16-bit gray is
    divided by 257, float gray must lie in 0..1. Raises InputError naming the file where it is no picture of a
    known format, is damaged or cut short, or has more than `MAX_PIXELS` pixels (refused from the header).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(_too_many_pixels(path, f"{image.width} x {image.height}"))
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image), path)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: the picture does not exist; correct the path or restore it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(_too_many_pixels(path, str(error))) from error
    except _DECODER_ERRORS as error:
        raise InputError(
            f"{path}: not a readable picture ({_reason(path, error)}); "
            f"replace it with a whole file of one of {', '.join(FORMATS)}"
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture in memory as `open_image` would give it: orientation, profile, transparency and depth in the pixels."""
    return _to_rgb(ImageOps.exif_transpose(image), Path("the given picture"))


def _too_many_pixels(path: Path, found: str) -> str:
    return f"{path}: too many pixels ({found}; at most {MAX_PIXELS:,} are read); shrink the picture"


def _reason(path: Path, error: Exception) -> str:
    """Why decoding failed, in words; Pillow repeats the path for files that it does not know."""
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.isfile(path) and path.stat().st_size == 0
        return "the file is empty" if empty else "its bytes are of no known format"
    return str(error) or type(error).__name__


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Any decoded picture as RGB, composited in sRGB: colours first, then transparency. Raises InputError."""
    profile = image.info.get("icc_profile")
    image, alpha = _split_alpha(image)
    if image.mode.startswith("I"):
        image = _scale_gray(image, path, limit=65535)
    elif image.mode == "F":
        image = _scale_gray(image, path, limit=1)
    if image.mode in ("1", "P", "YCbCr"):  # none of these carries a profile of its own colour space
        image = image.convert("RGB")
    rgb = _to_srgb(image, profile, path) if profile else image.convert("RGB")
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


def _scale_gray(image: Image.Image, path: Path, *, limit: int) -> Image.Image:
    """Gray of values 0..limit as an L image of 0..255, rounded. Raises InputError for others, as NaN."""
    values = np.asarray(image).astype(np.float64)
    if not ((values >= 0) & (values <= limit)).all():  # written so that NaN fails too
        raise InputError(
            f"{path}: its {image.mode} pixels reach from {values.min():g} to {values.max():g}, "
            f"not inside 0..{limit}; store the picture with 8 bits per channel"
        )
    return Image.fromarray(np.round(values * (255 / limit)).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes, path: Path) -> Image.Image:
    """A picture in the colours of an ICC profile as sRGB. Raises InputError where the two do not match."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if image.mode == "L" and space == "RGB":  # gray that kept the profile of an RGB original
        image = image.convert("RGB")
    if {"L": "GRAY"}.get(image.mode, image.mode) != space:
        raise InputError(
            f"{path}: its ICC profile is for {space} but its pixels are {image.mode}; "
            "save the picture without the profile"
        )
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    assert converted is not None  # None is only for in-place conversion
    return converted


def check_reference(image: Image.Image, path: Path, *, min_side: int, max_aspect: float) -> None:
    """Refuse references that carry no look: `min_side` in pixels, `max_aspect` is long side / short side.

    Raises InputError naming `path`.
    """
    short, long = sorted(image.size)
    if short < min_side:
        raise InputError(
            f"{path}: {image.width} x {image.height} is too small for a reference; "
            f"its short side must have at least {min_side} pixels"
        )
    if long > max_aspect * short:
        raise InputError(
            f"{path}: {image.width} x {image.height} is {long / short:.3g} times as long as wide; "
            f"a reference may be at most {max_aspect:g}: crop it"
        )


def fit_target(image: Image.Image, path: Path, *, resolution: int, max_crop: float) -> Image.Image:
    """The picture resized to short side `resolution` (pixels, a multiple of 16), centre-cropped to a square.

    `max_crop` is the largest share of the picture that may be cut away: 0 takes squares only, 1 anything.
    Raises InputError naming `path` where more would go, and for a resolution that the model cannot take.
    """
    if resolution <= 0 or resolution % LATENT_MULTIPLE:
        raise InputError(f"resolution {resolution} must be a positive multiple of {LATENT_MULTIPLE}")
    short, long = sorted(image.size)
    cut = 1 - short / long
    if cut > max_crop:
        raise InputError(
            f"{path}: a square of {image.width} x {image.height} would cut away {cut:.1%} of the picture, "
            f"more than max_crop {max_crop:g}; crop the picture by hand or raise max_crop"
        )
    width, height = (max(resolution, round(side * resolution / short)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return resized.crop((left, top, left + resolution, top + resolution))


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Names one visit of one sample; every random draw of that visit is a function of these three numbers."""

    seed: int
    epoch: int
    index: int


def batch_keys(step: int, *, global_batch_size: int, num_samples: int, seed: int) -> list[SampleKey]:
    """Keys of the `global_batch_size` samples of one optimizer step (from 0), over all ranks, in order.

    Sample j of the step stands at position p = step * global_batch_size + j; its epoch is p // num_samples,
    and p % num_samples looks up that epoch's permutation. A pure function: resuming needs no replay, slicing
    the list serves any number of ranks, and every epoch visits each sample exactly once. Raises InputError
    for numbers out of range.
    """
    if step < 0 or seed < 0 or global_batch_size < 1 or num_samples < 1:
        raise InputError(
            "step and seed must not be negative, global_batch_size and num_samples must be at least 1; got "
            f"step={step}, {seed=}, {global_batch_size=}, {num_samples=}"
        )
    first = step * global_batch_size
    keys = []
    for position in range(first, first + global_batch_size):
        epoch, place = divmod(position, num_samples)
        keys.append(SampleKey(seed, epoch, int(_permutation(seed, epoch, num_samples)[place])))
    return keys


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_samples: int) -> Sequence[int]:
    """The order of one epoch, (num_samples,). A step spans two epochs at most unless epochs are tiny."""
    order = np.random.default_rng([seed, epoch]).permutation(num_samples)
    order.setflags(write=False)  # shared by all callers through the cache
    return order  # type: ignore[return-value]  # numpy arrays index like a Sequence
