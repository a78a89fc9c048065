"""Pixels: pictures of every kind, awkward ones row by row from their own table, and targets cut to their buckets."""

import base64
import csv
import io
import itertools
import math
import os
import pickle
import re
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from ztrain import images
from ztrain.errors import InputError
from ztrain.images import (
    READ,
    Bucket,
    Part,
    PictureFile,
    Variants,
    check_reference,
    fit_target,
    image_size,
    open_image,
    pick_bucket,
    sniff,
    target_buckets,
)

PHOTOS = Path(__file__).parents[2] / "shared/data/photos"
AWKWARD_TABLE = PHOTOS / "awkward/manifest.csv"
AWKWARD = (
    list(csv.DictReader(AWKWARD_TABLE.read_text(encoding="utf-8").splitlines())) if AWKWARD_TABLE.is_file() else []
)
needs_photos = pytest.mark.skipif(not AWKWARD, reason=f"{PHOTOS} is absent")


def pixels(image: Image.Image) -> np.ndarray:
    """(height, width, 3) floats of 0..255."""
    assert image.mode == "RGB"
    return np.asarray(image).astype(float)


def distance(left: Image.Image, right: Image.Image) -> float:
    """Mean absolute difference of two pictures, 0..255, at the size of the first."""
    return float(np.abs(pixels(left) - pixels(right.resize(left.size))).mean())


# ---- awkward pictures


@needs_photos
@pytest.mark.parametrize("row", AWKWARD, ids=lambda row: row["file"])
def test_awkward_table(row: dict[str, str]) -> None:
    path = PHOTOS / "awkward" / row["file"]
    if row["decodes"] == "yes" or path.suffix == ".jpg" and row["decodes"] == "ignore":
        image = open_image(path)
        assert image.mode == "RGB"
        assert image.info == {}
        if row["size_after_orientation"]:
            assert "{}x{}".format(*image.size) == row["size_after_orientation"]
    else:
        with pytest.raises(InputError) as caught:
            open_image(path)
        assert str(path) in str(caught.value)
        assert ("too many pixels" in str(caught.value)) == (row["decodes"] == "refuse")


@needs_photos
@pytest.mark.parametrize(
    ("file", "original", "limit"),
    [
        ("cmyk.jpg", "flower.jpg", 15),
        ("icc_srgb.jpg", "flower.jpg", 4),
        ("icc_swapped_primaries.jpg", "flower.jpg", 6),
        ("exif_rotated_6.jpg", "rocket.jpg", 6),
        ("exif_mirrored_2.jpg", "text.jpg", 6),
        ("gray_16bit.png", "gravel.jpg", 8),
        ("gray_8bit.jpg", "camera.jpg", 6),
        ("photo.webp", "astronaut.jpg", 8),
        ("progressive.JPEG", "hubble_deep_field.jpg", 8),
    ],
)
def test_awkward_pictures_look_like_their_originals(file: str, original: str, limit: float) -> None:
    assert distance(open_image(PHOTOS / "awkward" / file), open_image(PHOTOS / original)) < limit


@needs_photos
def test_hidden_colour_does_not_show_through() -> None:
    image = pixels(open_image(PHOTOS / "awkward/rgba_hidden_magenta.png"))
    raw = np.asarray(Image.open(PHOTOS / "awkward/rgba_hidden_magenta.png"))
    assert (raw[raw[..., 3] == 0][:, :3] == (255, 0, 255)).all()  # the file is as awkward as it says
    assert (image[raw[..., 3] == 0] == images.ALPHA_BACKGROUND).all()


@needs_photos
def test_float_picture_is_scaled() -> None:
    image = open_image(PHOTOS / "awkward/float32.tif")
    values = np.asarray(Image.open(PHOTOS / "awkward/float32.tif"))
    assert np.abs(pixels(image)[..., 0] - values * 255).max() <= 0.5 + 1e-4


@needs_photos
def test_first_frame_of_several() -> None:
    path = PHOTOS / "awkward/animated.gif"
    with Image.open(path) as animation:
        first = animation.convert("RGB")
        animation.seek(3)
        later = animation.convert("RGB")
    assert distance(open_image(path), first) == 0
    assert distance(open_image(path), later) > 0


def test_awkward_pictures_painted_here_have_their_outcomes(tmp_path: Path) -> None:
    """Promise 9, without the shared folder: what is read, and the sentence for what is not."""
    noise = Image.effect_noise((48, 32), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(tmp_path, noise, "plain.png")
    saved(tmp_path, noise.convert("CMYK"), "cmyk.jpg")
    saved(tmp_path, Image.fromarray(np.full((32, 48), 25700, np.uint16)), "deep.png")
    saved(tmp_path, noise, "turned.jpg", exif=exif)
    frames = [noise.convert("P"), Image.new("P", (48, 32))]
    saved(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:])
    saved(tmp_path, noise, "wrong.jpg", format="PNG")
    saved(tmp_path, noise, "a\nb \x1b[31m 日本.png")
    cut = [f"cut.{suffix}" for suffix in ("jpg", "png", "webp", "tif", "gif", "bmp", "tga")]
    for name in cut:
        path = saved(tmp_path, noise, name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("a text")
    (tmp_path / "huge.png").write_bytes(png_header(60_000, 60_000))
    (tmp_path / "folder.png").mkdir()
    for name, to in (("link.png", "plain.png"), ("lost.png", "nowhere"), ("circle.png", "circle.png")):
        (tmp_path / name).symlink_to(to)
    fault = {
        **dict.fromkeys(
            ["cut.jpg", "cut.png", "cut.webp", "cut.tif", "cut.gif", "cut.bmp", "cut.tga"], "replace it with"
        ),
        "empty.png": "the file is empty",
        "text.png": "no known format",
        "huge.png": "too many pixels (60000 x 60000",
        "folder.png": "is no regular file, but a folder",
        "lost.png": "does not exist",
        "circle.png": "cannot read the picture",
    }
    for path in tmp_path.iterdir():
        if path.name in fault:
            with pytest.raises(InputError) as caught:
                open_image(path)
            assert str(caught.value).startswith(f"{path}: ") and fault[path.name] in str(caught.value), path.name
        else:
            image = open_image(path)
            assert image.size == ((32, 48) if path.name == "turned.jpg" else (48, 32)) and image.info == {}
            assert path.name in ("cmyk.jpg", "deep.png", "turned.jpg", "moving.gif") or distance(image, noise) == 0
    assert (pixels(open_image(tmp_path / "deep.png")) == 100).all()
    assert distance(open_image(tmp_path / "moving.gif"), frames[0].convert("RGB")) == 0


# ---- what kind of file it is


@pytest.mark.parametrize(
    ("head", "name", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "web.jfif", "JPEG"),
        (b"\xff\xd8\xff\xe1", "no extension", "JPEG"),
        (b"II\x2a\0\x08\0\0\0", "a.tif", "TIFF"),
        (b"MM\0\x2b\0\x08\0\0", "a.png", "TIFF"),
        (b"II\x2a\0\x08\0\0\0", "a.DNG", "camera raw"),
        (b"II\x2a\0\x10\0\0\0CR\2\0", "a.tif", "camera raw"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "a", "camera raw"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a.png", "HEIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a.heic", "HEIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "a.heic", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "a.mp4", None),
        (b"\xff\x0a\xfa\x7f", "a.jxl", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "a", "JPEG XL"),
        (b"8BPS\0\1", "a.psd", "Photoshop"),
        (b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg xmlns=", "a.svg", "SVG"),
        (b"<?xml version='1.0'?>\n<notes>", "a.xml", None),
        (b"%PDF-1.7", "a", "PDF"),
        (b"PK\3\4" + bytes(26) + b"mimetypeapplication/x-krita", "a.kra", "Krita"),
        (b"BM is a brand of cars, said somebody", "a.txt", None),
        (bytes((0, 0, 2)) + bytes(9) + bytes((4, 0, 4, 0, 24, 0)), "a.TGA", "TGA"),
        (bytes((0, 0, 2)) + bytes(9) + bytes((4, 0, 4, 0, 24, 0)), "a.bin", None),
        (b"a text of twenty letters", "a.tga", None),
        (b"", "a.png", None),
    ],
)
def test_the_first_bytes_say_what_kind_of_picture_it_is(head: bytes, name: str, kind: str | None) -> None:
    assert sniff(head, name) == kind


# ---- what is read by content, by name, or not at all

# 96 x 64 pixels, red 220 on the left, green 200 above, turned by EXIF orientation 6; written by libheif and x265.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAaFtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAA"
    "ADRpbG9jAAAAAERAAAIAAQAAAAABxQABAAAAAAAAAMkAAgAAAAACjgABAAAAAAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAA"
    "AAABAABodmMxAAAAABVpbmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAAA4GlwcnAAAADAaXBjbwAAAHhodmNDAQNwAAAA"
    "kAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQArQgEBA3AAAAMAkAAAAwAAAwAeoDCBBZbq"
    "SSmubgIaDAgAAAMAyAAAAwAIQGIAAQAHRAHBcrAiQAAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABgAAAAQAAAABBw"
    "aXhpAAAAAAMICAgAAAAJaXJvdAMAAAAYaXBtYQAAAAAAAAABAAEFgQIDBIUAAAAaaXJlZgAAAAAAAAAOY2RzYwACAAEAAQAAAPVt"
    "ZGF0AAAAxSgBrwng4wucuq+v/uuX///CZDkPVjykglP/9L4Ed8frf/2kYaxZMpLKqQBBOCEims5xXzopkDf9BeaN7IF5atlhKUwj"
    "RalE7HPPuXl191m83BlT45PFNFwtLQ/dSuk82tx//765zj7+kZb7vrDbJWP/8w+UEY/9267lYJ4ysaDefJ2mZgw8zPn0ko70zma1"
    "v5NX2AWPZZu8f71ue/ZTFwq2yPcSussc/wVx2fw5FXYJcZlAk46Hrk/SP4oj8jH+ITAuhtbAAAAABkV4aWYAAE1NACoAAAAIAAEB"
    "EgADAAAAAQAGAAAAAAAA"
)


def test_names_do_not_matter_where_bytes_tell(tmp_path: Path) -> None:
    image = Image.effect_noise((16, 16), 60).convert("RGB")
    for form, name in (
        ("JPEG", "web.jfif"),
        ("JPEG", "old.jpe"),
        ("PNG", "no extension"),
        ("WEBP", "a.heic"),
        ("GIF", "a.tga"),
    ):
        assert open_image(saved(tmp_path, image, name, format=form)).size == (16, 16)


def test_heic_is_read_with_its_extra_and_named_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(HEIC)
    image = pixels(open_image(tmp_path / "a.jpg"))
    assert image.shape == (96, 64, 3) and image_size(HEIC, "a") == (64, 96)
    assert np.abs(image[5, 5] - (220, 30, 90)).max() < 8 and np.abs(image[90, 60] - (20, 200, 90)).max() < 8
    with pytest.raises(InputError, match=r"a: not a readable picture \(HEIF: "):
        images.decode_image(HEIC[:600], "a")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match=r"a\.jpg: .*pip install 'ztrain\[heif\]'"):
        open_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
def test_tga_is_read_by_its_name(tmp_path: Path, mode: str) -> None:
    image = Image.effect_noise((40, 30), 60).convert(mode)
    path = saved(tmp_path, image, "a.TGA", compression="tga_rle")
    assert distance(open_image(path), image.convert("RGB")) == 0
    data = path.read_bytes()
    assert (
        data.endswith(b"TRUEVISION-XFILE.\0") and distance(images.decode_image(data, "a cell"), open_image(path)) == 0
    )
    assert images.decode_image(data[:-26], "a.tga").size == (40, 30)
    with pytest.raises(InputError, match="no known format"):
        images.decode_image(data[:-26], "a cell")


def test_tga_has_no_transparency_where_its_header_gives_it_no_bits(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 30), (10, 200, 30, 0))
    path = saved(tmp_path, image, "a.tga")
    assert (pixels(open_image(path)) == 255).all()
    data = bytearray(path.read_bytes())
    data[17] &= 0xF0
    path.write_bytes(data)
    assert (pixels(open_image(path)) == (10, 200, 30)).all()


@pytest.mark.parametrize(
    ("head", "kind"), [(b"\xff\x0a", "JPEG XL"), (b"8BPS", "Photoshop"), (b"<svg/>", "SVG"), (b"%PDF-1.7", "PDF")]
)
def test_known_kinds_that_are_not_read_are_named(head: bytes, kind: str) -> None:
    with pytest.raises(InputError, match=f"^a.png: not a readable picture \\(it is a {kind} file"):
        images.decode_image(head + bytes(90), "a.png")


def test_foreign_pictures_are_opened_by_one_module() -> None:
    root = Path(images.__file__).parents[1]
    files = (*root.glob("ztrain/**/*.py"), *root.glob("data_tools/*.py"))
    asking = {path.stem for path in files if re.search(r"\bImage\.open\(", path.read_text("utf-8"))}
    assert asking == {"drawn", "command", "validate", "runs"}  # pictures of our own, and a page's example


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: is no regular file"):
        open_image(tmp_path / "a.png")


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(60 << 30)  # sparse
    with pytest.raises(InputError, match=r"a\.png: has 64,424,509,440 bytes, more than"):
        open_image(tmp_path / "a.png")


# ---- pictures made here


def saved(folder: Path, image: Image.Image, name: str, **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGBA", (3, 2), (200, 100, 0, 128)), "a.png")
    expected = np.array([200, 100, 0]) * 128 / 255 + 255 * 127 / 255
    assert np.abs(pixels(open_image(path)) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB", "P"])
def test_one_transparent_value_is_white(tmp_path: Path, mode: str) -> None:
    gray = Image.new("L", (2, 1))
    gray.putpixel((1, 0), 255)
    if mode == "I;16":
        image = Image.fromarray(np.array([[5000, 25700]], np.uint16))
        path = saved(tmp_path, image, "a.png", transparency=5000)
        assert np.asarray(open_image(path)).tolist() == [[[255] * 3, [100] * 3]]
    else:
        path = saved(tmp_path, gray.convert(mode), "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
        assert np.asarray(open_image(path)).tolist() == [[[255] * 3, [255] * 3]]
        opaque = saved(tmp_path, gray.convert(mode), "b.png")
        assert np.asarray(open_image(opaque)).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")])
def test_deep_gray_is_divided_by_257(tmp_path: Path, dtype: type, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.array([[0, 128, 129, 25700, 65535]], dtype)).save(path)
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 0, 1, 100, 255]


@pytest.mark.parametrize("values", [[-0.1, 1], [0, 1.01], [0, float("nan")], [0, 255]])
def test_float_outside_its_range_is_refused(tmp_path: Path, values: list[float]) -> None:
    path = saved(tmp_path, Image.fromarray(np.array([values], np.float32)), "a.tif")
    with pytest.raises(InputError, match=r"a\.tif.*not inside 0\.\.1"):
        open_image(path)


def test_deep_gray_outside_its_range_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.array([[0, 65536]], np.int32)), "a.tif")
    with pytest.raises(InputError, match="not inside 0..65535"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(tmp_path: Path, suffix: str, orientation: int) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    quarters = Image.new("RGB", (2, 2))  # all eight orientations differ: four colours
    quarters.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)])
    upright = quarters.resize((64, 32), Image.Resampling.NEAREST)
    undo = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = upright
    for transpose in undo:
        stored = stored.transpose(transpose)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, stored, f"a.{suffix}", exif=exif)
    assert open_image(path).size == upright.size
    assert distance(open_image(path), upright) < 12


def test_profile_survives_transparency(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGBA", (4, 4), (10, 200, 30, 255))
    image.putpixel((0, 0), (10, 200, 30, 0))
    opened = pixels(open_image(saved(tmp_path, image, "a.png", icc_profile=profile)))
    assert opened[0, 0].tolist() == [255, 255, 255]
    assert np.abs(opened[1:] - (10, 200, 30)).max() <= 1


# ---- TIFF beside a second decoder


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, metadata=None, **options)
    return file.getvalue()


def second_decoder(data: bytes) -> np.ndarray:
    """(H, W, 3) floats of 0..255 by tifffile and the rules of TIFF 6.0, on white where there is transparency."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        values, extra = page.asarray(), [tifffile.EXTRASAMPLE(each) for each in page.extrasamples]
        photometric, is_separate = page.photometric, page.planarconfig == 2 and page.samplesperpixel > 1
    top = {"f": 1, "u": 255 if values.dtype == np.uint8 else 65535, "i": 65535}[values.dtype.kind]
    planes = np.moveaxis(values, 0, -1) if is_separate else values if values.ndim == 3 else values[..., None]
    planes = planes.astype(float) / top
    colours, alpha = planes[..., : planes.shape[-1] - len(extra)], np.ones(planes.shape[:2])
    if extra and extra[0] != tifffile.EXTRASAMPLE.UNSPECIFIED:
        alpha = planes[..., colours.shape[-1]]
    if photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        colours = 1 - colours
    if photometric == tifffile.PHOTOMETRIC.SEPARATED:
        colours = (1 - colours[..., :3]) * (1 - colours[..., 3:])
    if tifffile.EXTRASAMPLE.ASSOCALPHA not in extra:
        colours = colours * alpha[..., None]
    return np.broadcast_to(255 * (colours + 1 - alpha[..., None]), (*alpha.shape, 3))


READ_TIFFS = {  # type of values, what a further sample means
    "minisblack": {("u1", None), ("u1", "assocalpha"), ("u1", "unassalpha"), ("u2", None), ("i2", None), ("f4", None)},
    "miniswhite": {("u1", None), ("u2", None), ("f4", None)},
    "rgb": set(itertools.product(["u1", "u2"], [None, "unspecified", "assocalpha", "unassalpha"])),
    "separated": {("u1", None), ("u2", None)},
}
TOPS = {"u1": 255, "i1": 127, "u2": 65535, "i2": 32767, "u4": 65535, "i4": 65535, "f2": 1, "f4": 1, "f8": 1}


@pytest.mark.parametrize("photometric", READ_TIFFS)
def test_tiff_has_the_pixels_of_a_second_decoder_or_is_refused(photometric: str) -> None:
    chance, refused = np.random.default_rng(0), set()
    count = {"rgb": 3, "separated": 4}.get(photometric, 1)
    extras, stored = (
        (None, "unspecified", "assocalpha", "unassalpha"),
        (("", None), ("zlib", (16, 32)), ("delta", None)),
    )
    for kind, extra, is_separate, order, (packed, tile) in itertools.product(TOPS, extras, (False, True), "<>", stored):
        planes = np.repeat(np.repeat(chance.random((6, 7, count + (extra is not None))), 5, 0), 6, 1)
        planes[..., :count] *= planes[..., count:] if extra == "assocalpha" else 1
        planes *= TOPS[kind]
        samples = np.moveaxis(planes, -1, 0) if is_separate else planes
        data = tiff(
            np.ascontiguousarray(samples if kind[0] == "f" else samples.round()).astype(kind).squeeze(),
            photometric=photometric,
            planarconfig=("separate" if is_separate else "contig") if planes.shape[-1] > 1 else None,
            byteorder=order,
            compression="zlib" if packed else None,
            predictor=2 if packed == "delta" and kind[0] != "f" else None,
            tile=tile,
            rowsperstrip=None if tile else 7,
            extrasamples=[extra] if extra else None,
        )
        try:
            found = pixels(images.decode_image(data, "a.tif"))
        except InputError as error:
            assert "save it as RGB with 8 bits" in str(error)
            if order == "<" and not is_separate:
                refused.add((kind, extra))
        else:
            assert np.abs(found - second_decoder(data)).max() < 3, (kind, extra, is_separate, order, packed)
    assert not refused & READ_TIFFS[photometric]


@pytest.mark.parametrize(
    "options",
    [
        {"photometric": "minisblack", "subfiletype": 1},  # a preview of another page
        {"photometric": "minisblack", "extratags": [(50706, 1, 4, (1, 4, 0, 0), True)]},  # DNG
        {"photometric": "separated", "extratags": [(332, 3, 1, 2, True)]},  # inks that are not CMYK
        {"photometric": "minisblack", "tile": (5120, 5120), "compression": "zlib"},  # memory
    ],
)
def test_tiff_that_would_come_out_otherwise_is_refused(options: dict[str, Any]) -> None:
    values = np.zeros((32, 32, 4) if options["photometric"] == "separated" else (32, 32), np.uint8)
    with pytest.raises(InputError, match=r"a\.tif: not a readable picture \(TIFF: .*save it as RGB"):
        images.decode_image(tiff(values, **options), "a.tif")


def test_tiff_with_a_colour_map_of_8_bits() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (3, 256))
    data = tiff(
        np.arange(256, dtype=np.uint8).reshape(16, 16), photometric="palette", colormap=colours.astype(np.uint16)
    )
    assert (pixels(images.decode_image(data, "a.tif")).reshape(256, 3) == colours.T).all()


def test_gray_of_12_bits_fills_the_range() -> None:
    file = io.BytesIO(tiff(np.array([[0x80, 0x0F, 0xFF]] * 2, np.uint8), photometric="minisblack"))  # 0x800, 0xFFF
    with tifffile.TiffFile(file, mode="r+b") as changed:
        for tag, value in (("ImageWidth", 2), ("BitsPerSample", 12)):
            changed.pages.first.tags[tag].overwrite(value)
    assert pixels(images.decode_image(file.getvalue(), "a.tif"))[..., 0].tolist() == [[128, 255]] * 2


# ---- metadata that are damaged, or belong to other pixels


def gray_profile() -> bytes:
    """An ICC profile for gray of gamma 2.2: LittleCMS makes none."""
    description = b"desc" + bytes(4) + struct.pack(">I", 5) + b"gray\0" + bytes(80)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 563) + bytes(2)
    tags = {b"desc": description, b"wtpt": white, b"kTRC": curve, b"cprt": b"text" + bytes(4) + b"CC0\0"}
    table, body, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, raw in tags.items():
        table, body = table + name + struct.pack(">II", at + len(body), len(raw)), body + raw + bytes(-len(raw) % 4)
    head = struct.pack(">I4xI", at + len(body), 0x02400000) + b"mntrGRAYXYZ " + struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
    head = head + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LONG_SRGB = struct.pack(">I", len(SRGB) + 2_000_000) + SRGB[4:] + bytes(2_000_000)


@pytest.mark.parametrize(
    ("mode", "suffix", "profile", "said"),
    [
        ("RGB", "jpg", b"no profile at all", "ICC profile is left out"),
        ("RGB", "png", SRGB[:300], "ICC profile is left out"),
        ("RGB", "webp", SRGB[:128] + bytes(900), "ICC profile is left out"),
        ("CMYK", "jpg", SRGB, "ICC profile is left out (it is for 'RGB' but the pixels are CMYK)"),
        ("RGB", "tif", gray_profile(), "ICC profile is left out (it is for 'GRAY' but the pixels are RGB)"),
        ("RGB", "png", LONG_SRGB, ""),
        ("RGB", "png", LONG_SRGB + bytes(images.MAX_METADATA), "ICC profile is left out"),
        ("1", "png", SRGB, ""),
        ("L", "png", SRGB, ""),
    ],
)
def test_a_profile_that_is_damaged_or_of_other_pixels_is_left_out_and_said(
    tmp_path: Path, mode: str, suffix: str, profile: bytes, said: str
) -> None:
    image = Image.effect_noise((40, 40), 60).convert(mode)
    if mode == "RGB":
        image.putpixel((0, 0), (9, 200, 30))  # no gray
    path, left_out = saved(tmp_path, image, f"a.{suffix}", icc_profile=profile), list[str]()
    plain = open_image(saved(tmp_path, image, f"plain.{suffix}"))
    assert np.abs(pixels(open_image(path, left_out)) - pixels(plain)).max() <= 1
    assert len(left_out) == bool(said) and all(said in note for note in left_out)


@pytest.mark.parametrize("mode", ["1", "P", "L"])
def test_a_profile_of_gray_is_used_for_all_grays(tmp_path: Path, mode: str) -> None:
    gray = Image.linear_gradient("L").resize((64, 64))
    path, left_out = saved(tmp_path, gray.convert(mode), "a.png", icc_profile=gray_profile()), list[str]()
    wanted = ImageCms.profileToProfile(
        gray.convert(mode).convert("L"), io.BytesIO(gray_profile()), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert distance(open_image(path, left_out), wanted) == 0 and left_out == []


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(png: bytes, chunks: bytes) -> bytes:
    """A PNG with chunks more behind its header."""
    return png[:33] + chunks + png[33:]


TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # EXIF: orientation 6
XMP, RAW_EXIF = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0\0"


@pytest.mark.parametrize(
    ("chunks", "is_turned", "said"),
    [
        (chunk(b"iTXt", XMP + b"\x01\0\0\0" + zlib.compress(b"y" * 2_000_000)), False, ""),
        (chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"z" * 2_000_000)), False, ""),
        (chunk(b"zTXt", b"workflow\0\x07nothing packed"), False, ""),
        (chunk(b"tEXt", b"transparency\0no number"), False, ""),
        (chunk(b"tEXt", b"icc_profile\0no profile"), False, ""),
        (chunk(b"tEXt", b"a text with a wrong sum\0")[:-1] + b"?", False, ""),
        (chunk(b"eXIf", TURNED), True, ""),
        (
            chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  32\n" + TURNED.hex().encode())),
            True,
            "",
        ),
        (chunk(b"iTXt", XMP + b"\0\0\0\0" + b" " * 2_000_000 + b'<x tiff:Orientation="6"/>'), True, ""),
        (chunk(b"eXIf", b"no EXIF"), False, "EXIF or XMP"),
        (chunk(b"eXIf", TURNED)[:-1] + b"?", False, "EXIF or XMP"),
        (chunk(b"iCCP", b"name\0\0nothing packed"), False, "ICC profile"),
        (chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(200_000_000), 1)), False, "ICC profile"),
        (20 * chunk(b"iTXt", XMP + b"\x01\0\0\0" + zlib.compress(bytes(200_000_000), 1)), False, "EXIF or XMP"),
    ],
    ids=range(14),
)
def test_png_metadata_never_make_a_whole_picture_unreadable(chunks: bytes, is_turned: bool, said: str) -> None:
    file, left_out = io.BytesIO(), list[str]()
    Image.effect_noise((64, 32), 60).convert("RGB").save(file, "PNG")
    plain = images.decode_image(file.getvalue(), "a.png")
    data = with_chunks(file.getvalue(), chunks)
    tracemalloc.start()
    try:
        found, size = images.decode_image(data, "a.png", left_out), image_size(data, "a.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == found.size == ((32, 64) if is_turned else (64, 32))
    assert distance(plain.transpose(Image.Transpose.ROTATE_270) if is_turned else plain, found) == 0
    assert len(left_out) == bool(said) and all(said in note for note in left_out)
    assert peak < 2 * images.MAX_METADATA + 4 * len(data), "a little file took much memory"


def test_damaged_exif_is_left_out_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, left_out = saved(tmp_path, Image.new("RGB", (8, 4)), "a.jpg", exif=b"Exif\0\0no EXIF"), list[str]()
    assert open_image(path, left_out).size == (8, 4) and "EXIF" in left_out[0]
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert open_image(path).size == (8, 4)  # nobody collects what is left out
    assert capsys.readouterr().err == f"note: {path}: {left_out[0]}\n"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one row's worth of nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    body = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [(9_500, 10_000), (10_001, 10_000), (13_000, 10_000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_from_the_header(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(png_header(*size))
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(InputError, match=r"a\.png: too many pixels"):
        open_image(tmp_path / "a.png")
    assert Image.MAX_IMAGE_PIXELS == before


def test_own_limit_holds_where_pillow_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.png").write_bytes(png_header(10_001, 10_000))
    with pytest.raises(InputError, match="10001 x 10000; at most 100,000,000"):
        open_image(tmp_path / "a.png")


def test_other_formats_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (4, 4)), "a.png", format="PPM")
    for wrong in (path, tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match=f"{wrong}: "):
            open_image(wrong)


def samples() -> list[bytes]:
    """One small file of each format, as bytes."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (24, 24, 4), np.uint8), "RGBA")
    files = []
    for name in sorted(READ - {"HEIF"}):
        buffer = io.BytesIO()
        image.convert("RGB" if name in ("JPEG", "BMP") else "RGBA").save(buffer, name)
        files.append(buffer.getvalue())
    return [*files, HEIC]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@given(
    file=st.sampled_from(samples()),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8),
    kept=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_damage_is_an_input_error_or_a_picture(
    file: bytes, changes: list[tuple[int, int]], kept: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(file)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.tga"
    path.write_bytes(damaged[: len(damaged) if kept > 0.5 else round(2 * kept * len(damaged))])
    try:
        image = open_image(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert image.mode == "RGB"


# ---- sizes, stamps


@needs_photos
def test_size_from_the_header_is_that_of_the_picture() -> None:
    measured = 0
    for path in sorted(path for path in PHOTOS.rglob("*") if path.is_file()):
        try:
            image = open_image(path)
        except InputError:
            continue
        assert image_size(path.read_bytes(), path.name) == image.size, path
        measured += 1
    assert measured > 50


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", [0, *range(1, 9), 9])
def test_size_follows_every_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    if suffix == "avif" and (not features.check("avif") or not 1 <= orientation <= 8):
        pytest.skip("this Pillow writes no such AVIF")
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.new("RGB", (64, 32)), f"a.{suffix}", exif=exif)
    assert image_size(path.read_bytes(), "a") == open_image(path).size
    assert open_image(path).size == ((32, 64) if orientation >= 5 and orientation != 9 else (64, 32))


def test_size_of_png_with_its_orientation_behind_the_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(tmp_path, Image.new("RGB", (64, 32)), "a.png", exif=exif).read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    moved = data[:start] + data[end : data.index(b"IEND") - 4] + data[start:end] + data[data.index(b"IEND") - 4 :]
    (tmp_path / "a.png").write_bytes(moved)
    assert image_size(moved, "a") == open_image(tmp_path / "a.png").size == (32, 64)


def test_picture_file_travels_and_its_stamp_follows_the_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (4, 4)), "a.png")
    picture: PictureFile = pickle.loads(pickle.dumps(PictureFile(path)))
    before, times = picture.stamp, path.stat()
    assert (picture.read(), picture.stamp, picture.name) == (path.read_bytes(), before, str(path))
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as copying tools do: same size, same mtime
    assert picture.stamp != before


# ---- what references must be


def test_reference_limits() -> None:
    check_reference((64, 128), "a.png", min_side=64, max_aspect=2)
    with pytest.raises(InputError, match=r"a\.png: 63 x 128 is too small"):
        check_reference((63, 128), "a.png", min_side=64, max_aspect=9)
    with pytest.raises(InputError, match=r"a\.png: 129 x 64 .* at most 2"):
        check_reference((129, 64), "a.png", min_side=64, max_aspect=2)


@given(
    size=st.tuples(st.integers(16, 3000), st.integers(16, 3000)).filter(lambda s: max(s) <= 8 * min(s)),
    digest=st.text("0123456789abcdef", min_size=4, max_size=4),
    variant=st.integers(1, 9),
    min_side=st.integers(1, 64),
    mirror=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_variants_are_parts_that_pass_as_references(
    size: tuple[int, int], digest: str, variant: int, min_side: int, mirror: bool
) -> None:
    """Inside, of 60 % of the area or more and of nearly the same aspect, but for limits that cut the longer side."""
    if min(size) < min_side:
        return
    rule = Variants(count=9, mirror=mirror, min_side=min_side)
    part = rule.part(digest, size, variant)
    assert rule.part(digest, size, 0) is None and part == rule.part(digest, size, variant)
    if part is None:  # too small for any other
        return
    assert 0 <= part.left <= size[0] - part.width and 0 <= part.top <= size[1] - part.height
    check_reference((part.width, part.height), "a.png", min_side=min_side, max_aspect=8.0)
    assert mirror or not part.mirrored
    rounding = 1 / min(part.width, part.height)
    stretch = part.width / part.height / (size[0] / size[1])
    if max(size) * 1.16 < 8 * min(size):
        assert part.width * part.height >= 0.6 * size[0] * size[1] * (1 - 2 * rounding)
    if min(part.width, part.height) > max(16, min_side):
        assert abs(math.log(stretch)) <= math.log(1.15) + 2 * rounding


def test_variants_differ_and_are_drawn_from_the_whole_range() -> None:
    """Area, place and mirroring as uniform draws; the same parts for ever, as caches are named by them."""
    rule = Variants(count=4001, mirror=True)
    parts = [rule.part("00ff", (1000, 500), variant) for variant in range(1, 4001)]
    assert sum(part is None for part in parts) < 20  # nearly the whole picture is the whole one
    shares = np.array([part.width * part.height / 500_000 for part in parts if part])
    places = np.array([part.left / (1000 - part.width) for part in parts if part and part.width < 950])
    for values, low, high in ((shares, 0.6, 1.0), (places, 0.0, 1.0)):
        quantiles = np.quantile((values - low) / (high - low), [0.1, 0.5, 0.9])
        assert quantiles == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
    assert np.mean([part.mirrored for part in parts if part]) == pytest.approx(0.5, abs=0.03)
    assert rule.part("00ff", (1000, 500), 1) == Part(39, 21, 955, 435, mirrored=True)


# ---- targets and their buckets


def padded(tokens: int) -> int:
    """As the transformer pads: to a multiple of 32."""
    return tokens + (-tokens) % 32


def aspects(buckets: tuple[Bucket, ...]) -> list[float]:
    return sorted(bucket.width / bucket.height for bucket in buckets)


@pytest.mark.parametrize("resolution", [64, 512, 1024])
@pytest.mark.parametrize("max_aspect", [1.0, 1.5, 2.0, 4.0])
def test_buckets_have_equal_tokens_and_bounded_aspects(resolution: int, max_aspect: float) -> None:
    buckets = target_buckets(resolution, max_aspect, padded)
    assert Bucket(resolution, resolution) in buckets and len(set(buckets)) == len(buckets)
    whole = (resolution // 16) ** 2
    for bucket in buckets:
        assert bucket.height % 16 == bucket.width % 16 == 0
        assert Bucket(bucket.width, bucket.height) in buckets  # portrait and landscape alike
        tokens = bucket.height // 16 * (bucket.width // 16)
        assert padded(tokens) == padded(whole) and 0.9 * whole <= tokens <= whole
        assert max(bucket.height, bucket.width) <= max_aspect * min(bucket.height, bucket.width)


# Largest share of a picture that the best bucket cuts, over all aspects up to 2: the middle of the widest gap
# between neighbouring aspects (at 64 pixels there are only 3 buckets, at 512 there are 19, at 1024 there are 27).
LARGEST_CUT = {64: 0.2255, 512: 0.0442, 1024: 0.0529}


@pytest.mark.parametrize("resolution", LARGEST_CUT)
def test_largest_cut_is_the_widest_gap(resolution: int) -> None:
    known = aspects(target_buckets(resolution, 2.0, padded))
    gaps = [1 - math.sqrt(low / high) for low, high in zip(known, known[1:], strict=False)]
    assert LARGEST_CUT[resolution] - 1e-4 < max(*gaps, 1 - known[-1] / 2) <= LARGEST_CUT[resolution]


@given(long=st.integers(64, 20_000), aspect=st.floats(1, 2), portrait=st.booleans(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_allowed_picture_loses_little(long: int, aspect: float, portrait: bool, data: st.DataObject) -> None:
    resolution = data.draw(st.sampled_from(sorted(LARGEST_CUT)))
    size = (math.ceil(long / aspect), long) if portrait else (long, math.ceil(long / aspect))
    bucket = pick_bucket(size, target_buckets(resolution, 2.0, padded), LARGEST_CUT[resolution], "a.png")
    # Measured on its own: the share of the picture's area that a crop of the bucket's aspect keeps.
    kept = min(size[0], size[1] * bucket.width / bucket.height) * min(size[1], size[0] * bucket.height / bucket.width)
    assert 1 - kept / (size[0] * size[1]) <= LARGEST_CUT[resolution]


def test_picture_that_would_lose_too_much_is_refused() -> None:
    buckets = target_buckets(64, 2.0, padded)
    assert pick_bucket((300, 100), buckets, 1.0, "a.png") == Bucket(48, 80)
    with pytest.raises(InputError, match=r"a\.png: 300 x 100 as a target of 80 x 48 would lose 44\.4%.*max_crop 0\.1"):
        pick_bucket((300, 100), buckets, 0.1, "a.png")
    assert pick_bucket((500, 500), buckets, 0.0, "a.png") == Bucket(64, 64)  # exact aspects pass at 0


@given(width=st.integers(8, 700), height=st.integers(8, 700), data=st.data())
@settings(max_examples=60, deadline=None)
def test_target_fills_its_bucket_from_the_middle(width: int, height: int, data: st.DataObject) -> None:
    bucket = data.draw(st.sampled_from(target_buckets(64, 4.0, padded)))
    across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    ramp = np.stack([across, down, np.full((height, width), 77.0)], 2).round().astype(np.uint8)
    fitted = fit_target(Image.fromarray(ramp), bucket)
    assert fitted.size == (bucket.width, bucket.height)
    cut = pixels(fitted)
    assert np.abs(cut[..., 2] - 77).max() <= 1  # covered: no border of another colour
    scale = max(bucket.width / width, bucket.height / height)
    for channel, side in ((0, width), (1, height)):  # a ramp's mean tells where the crop's centre is
        pixel = 255 / max(side * scale, 1)
        assert abs(cut[..., channel].mean() - 127.5) <= pixel + 1.5


def test_target_is_scaled_evenly() -> None:
    drawing = Image.new("RGB", (400, 200), "white")
    drawing.paste((0, 0, 0), (150, 50, 250, 150))  # a square of 100 pixels in the middle
    fitted = pixels(fit_target(drawing, Bucket(64, 64)))[..., 0] < 128
    assert abs(int(fitted.any(0).sum()) - 32) <= 1 and abs(int(fitted.any(1).sum()) - 32) <= 1
    assert np.array_equal(fitted, fitted[::-1]) and np.array_equal(fitted, fitted[:, ::-1])
