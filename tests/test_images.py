"""Pixels: pictures of every kind, awkward ones row by row from their own table, and targets cut to their buckets."""

import csv
import io
import math
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from ztrain import images
from ztrain.errors import InputError
from ztrain.images import (
    Bucket,
    PictureFile,
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


@pytest.mark.parametrize(("mode", "profile"), [("RGB", b"junk"), ("CMYK", None)])
def test_profile_that_does_not_belong_is_refused(tmp_path: Path, mode: str, profile: bytes | None) -> None:
    profile = profile or ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path, Image.new(mode, (4, 4)), "a.jpg", icc_profile=profile)
    with pytest.raises(InputError, match=r"a\.jpg.*profile"):
        open_image(path)


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
    for name in images.FORMATS:
        buffer = io.BytesIO()
        image.convert("RGB" if name in ("JPEG", "BMP") else "RGBA").save(buffer, name)
        files.append(buffer.getvalue())
    return files


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
    path = tmp_path_factory.getbasetemp() / "damaged"
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
@settings(max_examples=300, deadline=None)
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
