"""Manifests, pictures and sample order, on real files; awkward pictures row by row from their own table."""

import csv
import io
import json
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from ztrain import data
from ztrain.data import SampleKey, batch_keys, check_reference, fit_target, open_image, read_manifest
from ztrain.errors import InputError

PHOTOS = Path(__file__).parents[2] / "shared/data/photos"
EMOJI = Path(__file__).parents[2] / "shared/data/emoji_styles"
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
    assert (image[raw[..., 3] == 0] == data.ALPHA_BACKGROUND).all()


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
    for name in data.FORMATS:
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


# ---- what references and targets must be


def test_reference_limits() -> None:
    path = Path("a.png")
    check_reference(Image.new("RGB", (64, 128)), path, min_side=64, max_aspect=2)
    with pytest.raises(InputError, match=r"a\.png: 63 x 128 is too small"):
        check_reference(Image.new("RGB", (63, 128)), path, min_side=64, max_aspect=9)
    with pytest.raises(InputError, match=r"a\.png: 129 x 64 .* at most 2"):
        check_reference(Image.new("RGB", (129, 64)), path, min_side=64, max_aspect=2)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([16, 48, 64]))
@settings(max_examples=60, deadline=None)
def test_target_is_square_or_refused(width: int, height: int, resolution: int) -> None:
    image = Image.new("RGB", (width, height), (9, 8, 7))
    cut = 1 - min(width, height) / max(width, height)
    if cut <= 0.5:
        fitted = fit_target(image, Path("a.png"), resolution=resolution, max_crop=0.5)
        assert fitted.size == (resolution, resolution)
        assert (pixels(fitted) == (9, 8, 7)).all()
    else:
        with pytest.raises(InputError, match=r"a\.png.*max_crop"):
            fit_target(image, Path("a.png"), resolution=resolution, max_crop=0.5)


def test_target_keeps_the_middle() -> None:
    image = Image.new("RGB", (96, 32), (255, 0, 0))
    image.paste((0, 255, 0), (32, 0, 64, 32))
    fitted = fit_target(image, Path("a.png"), resolution=32, max_crop=1)
    assert (pixels(fitted) == (0, 255, 0)).all()


@pytest.mark.parametrize("resolution", [0, -16, 8, 100])
def test_resolution_must_fit_the_model(resolution: int) -> None:
    with pytest.raises(InputError, match=f"resolution {resolution} .* 16"):
        fit_target(Image.new("RGB", (64, 64)), Path("a.png"), resolution=resolution, max_crop=1)


# ---- manifests


def manifest(folder: Path, *lines: str | dict[str, object]) -> Path:
    split = folder / "train"
    (split / "images").mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png", "images/c \u2028日本.png"):
        Image.new("RGB", (8, 8)).save(split / name)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    (split / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


ROW: dict[str, object] = {"reference_file_name": "a.png", "target_file_name": "b.png", "prompt": "a cat"}


def test_manifest_rows(tmp_path: Path) -> None:
    several = {"reference_file_names": ["a.png", "images/c \u2028日本.png"], "target_file_name": "b.png"}
    folder = manifest(tmp_path, {**ROW, "style": "ink", "n": [1]}, "", {**several, "prompt": " a\u2028b "}, "")
    first, second = read_manifest(folder, "train")
    assert (first.index, second.index) == (0, 1)
    assert (first.prompt, second.prompt) == ("a cat", "a\u2028b")
    assert first.columns == {"style": "ink", "n": [1]} and second.columns == {}
    assert first.references == (folder / "train/a.png",) and first.target == folder / "train/b.png"
    assert [open_image(path).size for path in second.references] == [(8, 8)] * 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "not a row of JSON"),
        ("[1]", "must be a JSON object, not list"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
        ('{"columns": {"x": 1, "x": 2}}', "'x' stands twice"),
        ('{"x": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "not a row of JSON"),
        ({"target_file_name": "b.png", "prompt": "a"}, "'reference_file_name' is missing"),
        ({"reference_file_name": "a.png", "prompt": "a"}, "'target_file_name' is missing"),
        ({"reference_file_name": "a.png", "target_file_name": "b.png"}, "'prompt' is missing"),
        ({**ROW, "prompt": " \t"}, "prompt is empty"),
        ({**ROW, "prompt": 3}, "prompt must be text, not 3"),
        ({**ROW, "prompt": None}, "prompt must be text, not None"),
        ('{"reference_file_name": "a.png", "target_file_name": "b.png", "prompt": "\\ud83d"}', "surrogate"),
        ({**ROW, "target_file_name": "c.png"}, "'c.png' is not in"),
        ({**ROW, "target_file_name": "images"}, "'images' is not in"),
        ({**ROW, "target_file_name": "x" * 5000}, "is not in"),
        ({**ROW, "target_file_name": "../train/b.png"}, "leaves the split folder"),
        ({**ROW, "target_file_name": "/etc/hostname"}, "leaves the split folder"),
        ({**ROW, "reference_file_name": ["a.png"]}, "must be text"),
        ({**ROW, "reference_file_names": ["a.png"]}, "has both"),
        ({"reference_file_names": [], "target_file_name": "b.png", "prompt": "a"}, "at least one name"),
        (
            {"reference_file_names": "a.png", "target_file_name": "b.png", "prompt": "a"},
            "list of at least one",
        ),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path: Path, bad: Any, message: str) -> None:
    folder = manifest(tmp_path, ROW, "", bad)
    with pytest.raises(InputError) as caught:
        read_manifest(folder, "train")
    assert f"{folder}/train/metadata.jsonl:3: " in str(caught.value)
    assert message in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    folder = manifest(tmp_path, ROW)
    (folder / "train/metadata.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(InputError, match=r"metadata\.jsonl:1: .*utf-8"):
        read_manifest(folder, "train")


def test_missing_and_empty_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"test/metadata\.jsonl: cannot read the manifest of split 'test'"):
        read_manifest(manifest(tmp_path, ROW), "test")
    with pytest.raises(InputError, match=r"train/metadata\.jsonl: the manifest has no rows"):
        read_manifest(manifest(tmp_path, "", "  "), "train")


def test_row_round_trip_over_real_pictures(tmp_path: Path) -> None:
    style = EMOJI / "images/serenity"
    if not style.is_dir():
        pytest.skip(f"{EMOJI} is absent")
    (tmp_path / "val").mkdir()
    names = sorted(path.name for path in style.iterdir())[:6]
    for name in names:
        (tmp_path / "val" / name).symlink_to((style / name).resolve())
    rows = [{**ROW, "reference_file_name": a, "target_file_name": b} for a, b in zip(names, names[1:], strict=False)]
    (tmp_path / "val/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    triplets = read_manifest(tmp_path, "val")
    assert [triplet.target.name for triplet in triplets] == names[1:]
    assert {open_image(triplet.target).size for triplet in triplets} == {(128, 128)}


# ---- sample order

sizes = st.integers(1, 40)


@given(batch=sizes, num_samples=sizes, seed=st.integers(0, 2**40), epochs=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_every_epoch_is_a_permutation(batch: int, num_samples: int, seed: int, epochs: int) -> None:
    steps = -(-epochs * num_samples // batch)
    keys = [
        key
        for step in range(steps)
        for key in batch_keys(step, global_batch_size=batch, num_samples=num_samples, seed=seed)
    ]
    assert len(keys) == steps * batch
    for epoch in range(epochs):
        visited = keys[epoch * num_samples : (epoch + 1) * num_samples]
        assert {key.epoch for key in visited} == {epoch} and {key.seed for key in visited} == {seed}
        assert Counter(key.index for key in visited) == Counter(range(num_samples))


@given(
    step=st.integers(0, 10**6),
    num_samples=sizes,
    seed=st.integers(0, 9),
    ranks=st.sampled_from([1, 2, 3, 4, 6]),
)
@settings(max_examples=100, deadline=None)
def test_order_depends_on_neither_history_nor_batching(step: int, num_samples: int, seed: int, ranks: int) -> None:
    batch = 12
    whole = batch_keys(step, global_batch_size=batch, num_samples=num_samples, seed=seed)
    data._permutation.cache_clear()  # as in a process that resumes here
    assert batch_keys(step, global_batch_size=batch, num_samples=num_samples, seed=seed) == whole
    share = batch // ranks  # the same stream cut into smaller steps, as another number of ranks would
    parts = [
        batch_keys(step * ranks + rank, global_batch_size=share, num_samples=num_samples, seed=seed)
        for rank in range(ranks)
    ]
    assert [key for part in parts for key in part] == whole


def test_order_is_the_documented_one() -> None:
    keys = batch_keys(3, global_batch_size=4, num_samples=5, seed=7)  # positions 12..15: epochs 2, 2, 2, 3
    third, fourth = (np.random.default_rng([7, epoch]).permutation(5) for epoch in (2, 3))
    assert keys == [SampleKey(7, 2, int(third[place])) for place in (2, 3, 4)] + [SampleKey(7, 3, int(fourth[0]))]
    assert all(type(key.index) is int for key in keys)  # so that keys can go into JSON
    orders = {
        tuple(key.index for key in batch_keys(epoch, global_batch_size=50, num_samples=50, seed=seed))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


@pytest.mark.parametrize("wrong", [{"step": -1}, {"seed": -1}, {"global_batch_size": 0}, {"num_samples": 0}])
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    numbers = {"step": 0, "global_batch_size": 1, "num_samples": 1, "seed": 0, **wrong}
    with pytest.raises(InputError, match=next(iter(wrong))):
        batch_keys(numbers.pop("step"), **numbers)
