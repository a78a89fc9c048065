"""data_tools.scan: awkward files row by row, every kind of place alike, and runs that are killed or gone on with."""

import csv
import importlib.util
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools import cells, quality
from data_tools.names import reason_of
from data_tools.scan import main
from data_tools.sources import Reader, list_pictures
from data_tools.stages import Table
from ztrain.errors import InputError
from ztrain.images import open_image

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT.parent / "shared/data/photos"
MANIFEST = PHOTOS / "awkward/manifest.csv"
AWKWARD = list(csv.DictReader(MANIFEST.read_text(encoding="utf-8").splitlines())) if MANIFEST.is_file() else []
needs_photos = pytest.mark.skipif(not AWKWARD, reason=f"{PHOTOS} is absent")
REFUSED = {  # what the README calls small or wide; all others that decode are used
    "panorama_24to1.jpg": "24 times as long as wide, more than max_aspect 4",
    "tall_1to25.png": "too small",
    "one_pixel.png": "too small",
    "tiny_24x20.jpg": "too small",
}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = Table.open(folder).read().to_pylist()
    return rows


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("awkward") / "scan"
    words = ["--sources", str(PHOTOS / "awkward"), "--out", str(out), "--workers", "1"]
    assert main(words) == 2 and main([*words, "--max-refused-share", "0.5"]) == 0
    return out


@needs_photos
@pytest.mark.parametrize("row", AWKWARD, ids=lambda row: row["file"])
def test_awkward_files(awkward: Path, row: dict[str, str]) -> None:
    found = {each["name"]: each for each in rows_of(awkward)}
    if row["decodes"] == "ignore":
        assert found.get(row["file"], {"refused_by": "list"})["refused_by"] == "list"
        return
    picture = found[row["file"]]
    if row["decodes"] != "yes" or row["file"] in REFUSED:
        expected = {"refuse": "too many pixels", "no": "not a readable picture"}
        assert expected.get(row["decodes"], REFUSED.get(row["file"])) in picture["refused"]
        assert str(PHOTOS) not in picture["refused"] and picture["likeness"] is None
        return
    assert picture["refused"] is None
    size = row["size_after_orientation"] or "{}x{}".format(*open_image(PHOTOS / "awkward" / row["file"]).size)
    assert f"{picture['width']}x{picture['height']}" == size


@needs_photos
def test_the_awkward_table_is_whole(awkward: Path) -> None:
    found = {each["name"]: each for each in rows_of(awkward)}
    named = {name for name, row in found.items() if row["refused_by"] != "list"}
    assert named == {row["file"] for row in AWKWARD if row["decodes"] != "ignore"}
    assert Table.open(awkward).facts["ignored"] == {".csv": 1, ".txt": 1, "hidden": 1}
    for one, other, equal in (("dup_a.jpg", "dup_b.jpg", True), ("dup_pixels_a.png", "dup_pixels_b.png", False)):
        assert (found[one]["digest"] == found[other]["digest"]) is equal
        assert found[one]["pixels"] == found[other]["pixels"]
    assert found["blank_white.png"]["border_share"] == 1 and found["blank_white.png"]["sharpness"] == 0


def paint(folder: Path, count: int, *, seed: int = 0) -> None:
    """Pictures of noise and, for every third, a caption."""
    chance = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.repeat(np.repeat(chance.integers(0, 256, (8, 10, 3), np.uint8), 10, 0), 10, 1)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        if i % 3 == 0:
            (folder / f"{i:03}.txt").write_text(f" picture\n{i} ", encoding="utf-8")


def scan(*words: object, status: int = 0) -> None:
    assert main([str(word) for word in (*words, "--workers", "1")]) == status


def test_tars_and_tables_are_folders(tmp_path: Path) -> None:
    paint(tmp_path / "a/pictures", 7)
    files = sorted((tmp_path / "a/pictures").iterdir())
    (tmp_path / "b").mkdir()
    with tarfile.open(tmp_path / "b/pictures.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for path in files:
            tar.add(path, path.name)
    pictures = [path for path in files if path.suffix == ".png"]
    captions = [beside.read_text() if (beside := path.with_suffix(".txt")).exists() else None for path in pictures]
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in pictures]
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table({"image": cells, "text": captions}), tmp_path / "c/pictures.parquet", row_group_size=3)
    tables = []
    for kind in "abc":
        scan("--sources", tmp_path / kind, "--out", tmp_path / f"scan_{kind}")
        tables.append(rows_of(tmp_path / f"scan_{kind}"))
    same = [[{k: v for k, v in row.items() if k in ("digest", "pixels", "caption", "likeness")} for row in table]
            for table in tables]  # fmt: skip
    assert same[0] == same[1] == same[2] and len(same[0]) == 7
    assert [row["caption"] for row in same[0]][:4] == ["picture\n0", None, None, "picture\n3"]
    assert {row["caption_from"] for row in tables[2]} == {"column text", None}
    assert tables[2][5]["name"] == "pictures.parquet/image/005.png" and tables[1][0]["name"] == "pictures.tar/000.png"


def test_what_is_wrong_with_a_place_is_said_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(tmp_path / "in", 4)
    (tmp_path / "in/broken.parquet").write_bytes(b"PAR1 no")
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for path in sorted((tmp_path / "in").glob("*.png")):
            tar.add(path, path.name)
    (tmp_path / "in/cut.tar").write_bytes(whole.getvalue()[:-12_000])
    (tmp_path / "in/000.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "in/hidden").symlink_to(tmp_path / "in", target_is_directory=True)
    os.mkdir(tmp_path / "in/.git")
    if sys.platform.startswith("linux"):
        shutil.copyfile(tmp_path / "in/001.png", os.fsencode(tmp_path / "in") + b"/\xff.png")
    scan("--sources", tmp_path / "in", "--out", tmp_path / "scan", "--max-refused-share", 1)
    refused = {row["name"]: row["refused"] for row in rows_of(tmp_path / "scan") if row["refused"]}
    assert "not UTF-8" in refused["000.png"] and "not a readable Parquet" in refused["broken.parquet"]
    assert "damaged" in refused["cut.tar"] and "\\xff.png" not in refused
    assert "ignored: " in (said := capsys.readouterr().out) and "1 hidden" in said
    scan("--sources", tmp_path / "in", "--out", tmp_path / "scan", "--max-refused-share", 0.1, status=2)
    assert "more than max_refused_share 0.1" in capsys.readouterr().err
    scan("--sources", tmp_path / "none", "--out", tmp_path / "scan", status=2)
    (tmp_path / "empty").mkdir()
    scan("--sources", tmp_path / "empty", "--out", tmp_path / "other", status=2)


def test_a_picture_read_without_its_damaged_profile_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(tmp_path / "in", 2)
    Image.open(tmp_path / "in/000.png").save(tmp_path / "in/003.jpg", icc_profile=b"no profile")
    scan("--sources", tmp_path / "in", "--out", tmp_path / "scan")
    rows = rows_of(tmp_path / "scan")
    assert [bool(row["read_without"]) for row in rows] == [False, False, True]
    assert "ICC profile" in rows[2]["read_without"] and rows[2]["refused"] is None
    assert Table.open(tmp_path / "scan").facts["counts"]["read_without_damaged_metadata"] == 1
    assert "read without damaged metadata: 1" in capsys.readouterr().out


Listed = tuple[dict[str, dict[str, Any]], dict[str, int]]


def listed(root: Path, out: Path) -> Listed:
    """Rows by name, and what was ignored; no two rows have one name, and none says where this machine keeps them."""
    table = list_pictures({"it": root}, out, 512)
    rows = table.read().to_pylist()
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        assert str(root.parent) not in str(row)
    return {row["name"]: row for row in rows}, dict(table.facts["ignored"])


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(data)
    tar.addfile(member, io.BytesIO(data) if data else None)


def test_every_member_of_a_tar_is_a_row_or_counted(tmp_path: Path) -> None:
    place = tmp_path / "in"
    place.mkdir()
    with tarfile.open(place / "t.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for text in (b"first", b"second"):
            add(tar, "c/a.png", text)
            add(tar, "c/a.txt", text)
            add(tar, "./c/a.b.TIFF", text)  # unpacked it is c/a.b.TIFF, and WebDataset's key is c/a
        add(tar, "c", kind=tarfile.DIRTYPE)
        add(tar, "c/hard.png", kind=tarfile.LNKTYPE, link="c/a.png")
        add(tar, "c/late.png", kind=tarfile.LNKTYPE, link="c/z.png")
        add(tar, "c/soft.png", kind=tarfile.SYMTYPE, link="a.png")
        add(tar, "c/pipe.png", kind=tarfile.FIFOTYPE)
        add(tar, "c/holes.png", kind=tarfile.GNUTYPE_SPARSE)
        add(tar, "c/A.png", b"third")
        add(tar, "c/A.TXT", b" a  caption\n")
        add(tar, "c/z.png", b"fourth")
        add(tar, "c/\udcff.png", b"fifth")
        add(tar, "c/\\xff.png", b"sixth")  # what the one before is called in letters
        for name in ("s/.5.png", "...png", "s/6", "s/.x/5.png", "__x__/7.png", "s/8.heic", "s/9.txt", "s/n\0.png"):
            add(tar, name, b"other")
        add(tar, "s/8.\udcff", b"other")
        add(tar, "d.x\ny/a.png", b"a line break")
        for name in ("k/a.png", "k/a.b.png", "k/a.txt", "k/a.b.txt"):
            add(tar, name, name.encode())
    rows, ignored = listed(place, tmp_path / "out")
    refused = {name.removeprefix("t.tar/"): row["refused"].partition(";")[0] for name, row in rows.items()
               if row["refused"]}  # fmt: skip
    again, link = (
        "stands again later in the archive, and unpacking it gives what stands last",
        "is a link in the archive",
    )
    assert refused == {
        "c/a.png#1": again, "c/a.b.TIFF#1": again, "c/late.png": link, "c/soft.png": link,
        "c/pipe.png": "is no file in the archive",
        "c/holes.png": "is stored with holes (sparse) in the archive",
        "s/8.heic": "is called a picture, and is none",
    }  # fmt: skip
    read = Reader({"it": place}).read
    found = {name.removeprefix("t.tar/"): (read(row), row["caption"]) for name, row in rows.items()
             if not row["refused"]}  # fmt: skip
    assert found == {
        "c/a.png": (b"second", "second"), "c/a.b.TIFF": (b"second", "second"), "c/hard.png": (b"second", None),
        "c/A.png": (b"third", "a caption"), "c/z.png": (b"fourth", None), "c/\\xff.png": (b"fifth", None),
        "c/\\\\xff.png": (b"sixth", None), "d.x\ny/a.png": (b"a line break", None),
        "k/a.png": (b"k/a.png", "k/a.txt"),
        "k/a.b.png": (b"k/a.b.png", "k/a.b.txt"),
    }  # fmt: skip
    # Two texts: one that stands again, one without a picture. Two without extension: a NUL ends a name.
    expected = {"hidden": 3, "no extension": 2, "unknown pictures": 1, ".txt": 2, ".\\xff": 1}
    assert ignored == {**expected, "__NAME__, no sample to WebDataset": 1}


def test_only_files_are_opened_and_reasons_name_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "in"
    paint(place, 1)
    shutil.copyfile(place / "000.png", place / "2.PNG")
    for name in ("1.png", "2.PNG"):
        shutil.copyfile(place / "000.png", place / name)
    for name, text in {"1.TXT": "large", "2.txt": "small", "2.Txt": "other", "3.TXT": "of none"}.items():
        (place / name).write_text(text)
    (place / "4.png").symlink_to("nowhere.png")
    (place / "5.png").symlink_to(tmp_path, target_is_directory=True)
    (place / "1.txt").symlink_to("nowhere.txt")
    pipes = [place / "pipe.png", place / "pipe.tar", place / "pipe.parquet"]
    is_over = threading.Event()

    def write_nothing(pipe: Path) -> None:  # to whoever reads, and would wait for ever otherwise
        while not is_over.is_set():
            pipe.write_bytes(b"")

    for pipe in pipes:
        os.mkfifo(pipe)
        threading.Thread(target=write_nothing, args=(pipe,), daemon=True).start()
    scan("--sources", place, pipes[1], "--out", tmp_path / "scan", "--max-refused-share", 1)
    table = Table.open(tmp_path / "scan")
    rows = table.read().to_pylist()
    assert str(tmp_path) not in str(rows)
    captions = {row["name"]: row["caption"] for row in rows if not row["refused"]}
    assert captions == {"000.png": "picture\n0", "1.png": "large", "2.PNG": "small"}
    assert table.facts["ignored"] == {".txt": 2, "links out of the sources": 1, "links to nothing": 1}
    refused = {f"{row['source']}/{row['name']}": row["refused"] for row in rows if row["refused"]}
    assert refused.pop("in/4.png") == "cannot be read (No such file or directory)"
    assert refused.pop("in/1.txt") == "is a link to nothing"
    assert "is a link out of the sources" in refused.pop("in/5.png")
    assert set(refused) == {"pipe.tar/pipe.tar", *(f"in/{pipe.name}" for pipe in pipes)}
    assert all("is no regular file, but a named pipe" in why for why in refused.values())
    is_over.set()
    for pipe in pipes:  # lets the writers go
        os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
    reader, [row] = Reader(table.roots), [row for row in rows if row["name"] == "1.png"]
    before = (place / "1.png").stat()
    (place / "1.png").write_bytes(reader.read_same(row)[::-1])
    os.utime(place / "1.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=r"^1.png: has changed since it was scanned.*delete the table's folder"):
        reader.read_same(row)
    (place / "1.png").unlink()
    for path in (place / "1.png", place / "1.parquet"):
        gone = {**row, "part": path.name, "column": "image" if path.suffix == ".parquet" else None, "offset": 0}
        with pytest.raises(InputError, match="No such file") as raised:
            reader.read(gone)
        assert str(tmp_path) not in str(raised.value)
    with pytest.raises(FileNotFoundError) as told:
        pq.read_metadata(place / "1.parquet")  # as between a look at the file and its reading
    assert "'1.parquet'" in (said := reason_of(told.value, place / "1.parquet")) and str(tmp_path) not in said
    capsys.readouterr()
    scan("--sources", "x\0y", "--out", tmp_path / "other", status=2)
    assert "cannot be a place" in capsys.readouterr().err


def test_rows_of_parquet_files_have_the_names_and_captions_that_are_meant(tmp_path: Path) -> None:
    def cell(number: int, path: str | None = None) -> dict[str, Any]:
        return {"bytes": str(number).encode(), "path": path}

    place = tmp_path / "in"
    place.mkdir()
    texts = pa.array([["", " a\nb"], None, ["c", "d"]], pa.large_list(pa.string()))
    pictures = [cell(0, "ink/cat.png"), cell(1, "./ink//dog.png"), cell(2, "oil/cat.png")]
    other = [b"10", b"11", b"12"]
    pq.write_table(
        pa.table({"image": pictures, "a/b": other, "caption": [{"x": 1}] * 3, "text": texts}), place / "a.parquet"
    )
    climbing = [cell(0, "a.png"), cell(1, "x/../a.png"), cell(2, "b.png")]
    said = pa.array([b"a", b"b", b"c"])
    pq.write_table(pa.table({"image": climbing, "prompt": said}), place / "b.parquet")
    named = pa.table({"image": [cell(0, "a"), cell(1, "a")], "file_name": ["ink/1.png", "ink/2.png"],
                      "caption": pa.array(["x", "y"]).dictionary_encode()})  # fmt: skip
    pq.write_table(named, place / "c.parquet")
    pq.write_table(pa.Table.from_arrays([said, said], names=["image", "image"]), place / "d.parquet")
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    pq.write_table(pa.table({"image": [b"0"], "text": latin}), place / "e.parquet")
    pq.write_table(pa.table({"image": [cell(0, "a"), cell(1, "a")]}), place / "f.parquet")
    rows, ignored = listed(place, tmp_path / "out")
    reader = Reader({"it": place})
    found = {name: (int(reader.read(row)), row["caption"]) for name, row in rows.items() if not row["refused"]}
    assert found == {
        "a.parquet/image/ink/cat.png": (0, "a\nb"), "a.parquet/a%2Fb/0": (10, "a\nb"),
        "a.parquet/image/ink/dog.png": (1, None), "a.parquet/a%2Fb/1": (11, None),
        "a.parquet/image/oil/cat.png": (2, "c"), "a.parquet/a%2Fb/2": (12, "c"),
        "b.parquet/image/0": (0, None), "b.parquet/image/1": (1, None), "b.parquet/image/2": (2, None),
        "f.parquet/image/0": (0, None),
        "f.parquet/image/1": (1, None),
        "c.parquet/image/ink/1.png": (0, "x"), "c.parquet/image/ink/2.png": (1, "y"),
    }  # fmt: skip
    assert "two columns 'image'" in rows["d.parquet"]["refused"] and "UTF-8" in rows["e.parquet/image/0"]["refused"]
    assert sorted(ignored) == [
        "caption column caption of struct<x: int64>", "caption column prompt of binary",
        "file names in column image.path, which do not name each row once, and below the file",
    ]  # fmt: skip
    # Written again in the same process, shorter and with other groups.
    pq.write_table(pa.table({"image": [cell(7), cell(8)]}), place / "b.parquet", row_group_size=1)
    assert reader.read(rows["b.parquet/image/1"]) == b"8"
    with pytest.raises(InputError, match=r"^b.parquet/image/2: .*fewer rows"):
        reader.read(rows["b.parquet/image/2"])


def test_small_row_groups_are_decoded_once_and_large_ones_do_not_pile_up(tmp_path: Path) -> None:
    path, chance = tmp_path / "a.parquet", np.random.default_rng(0)
    pq.write_table(pa.table({"image": [chance.bytes(1000) for _ in range(40)]}), path, row_group_size=10)
    groups, state = cells._Groups(25_000), (0, 0)
    first, second = groups.read(path, state, 0, "image"), groups.read(path, state, 1, "image")
    assert groups.read(path, state, 0, "image") is first
    groups.read(path, state, 2, "image")  # there is room for two
    assert groups.read(path, state, 0, "image") is first and groups.read(path, state, 1, "image") is not second
    assert groups.read(path, (1, 0), 0, "image") is not first, "another file under the name"
    assert groups.size == sum(kept.nbytes for kept in groups.kept.values()) <= groups.limit


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_picture_more_changes_one_shard(tmp_path: Path) -> None:
    paint(tmp_path / "in", 40)
    words = ("--sources", tmp_path / "in", "--out", tmp_path / "scan", "--rows-per-shard", 5)
    scan(*words)
    before, written = (
        contents(tmp_path / "scan"),
        {p: p.stat().st_mtime_ns for p in (tmp_path / "scan").glob("*.parq*")},
    )
    scan(*words)
    assert contents(tmp_path / "scan") == before
    assert written == {path: path.stat().st_mtime_ns for path in written}, "shards were written again"
    shutil.copyfile(tmp_path / "in/000.png", tmp_path / "in/0205.png")
    scan(*words)
    after = contents(tmp_path / "scan")
    assert len(written) > 4 and len(set(after) - set(before)) == 2, "a shard of the listing and one of the table"
    assert [row["name"] for row in rows_of(tmp_path / "scan")] == sorted(
        p.name for p in (tmp_path / "in").glob("*.png")
    )


def is_alive(group: int) -> bool:
    """Whether a process of this group is."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_killed_at_random_moments_it_gives_the_bytes_of_an_undisturbed_run(tmp_path: Path) -> None:
    paint(tmp_path / "in", 50)
    for path in sorted((tmp_path / "in").glob("*.png")):
        for copy in range(5):
            os.link(path, path.with_stem(f"{path.stem}-{copy}"))
    words, out = ["--sources", str(tmp_path / "in"), "--rows-per-shard", "4", "--out"], tmp_path / "killed"
    scan(*words, tmp_path / "whole")  # by one process, as the last run
    total, chance, made = len(list((tmp_path / "whole").glob("*.parquet"))), random.Random(0), 0
    for _ in range(3):
        command = [sys.executable, "-m", "data_tools.scan", *words, str(out), "--workers", "2"]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   start_new_session=True)  # fmt: skip
        wanted = made + chance.randrange(total // 8)
        while len(list(out.glob("*.parquet"))) < wanted:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)  # its workers want the cores
        process.send_signal(signal.SIGKILL)
        process.wait()
        made = len(list(out.glob("*.parquet")))
        assert made < total and not (out / "table.json").exists()
        deadline = time.monotonic() + 30  # its workers end with it
        while is_alive(process.pid):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.05)
    assert made
    scan(*words, out)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install 'ztrain[ray]')")
@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    paint(tmp_path / "in", 60)
    for engine in ("local", "ray"):
        command = [sys.executable, "-m", "data_tools.scan", "--sources", str(tmp_path / "in"), "--rows-per-shard", "5"]
        command += ["--out", str(tmp_path / engine), "--engine", engine, "--workers", "2"]
        subprocess.run(command, cwd=ROOT, check=True)
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")


def test_quality_numbers_follow_what_they_say() -> None:
    flat = Image.new("RGB", (80, 60), (10, 200, 30))
    assert quality.measure(flat) == {"sharpness": 0.0, "entropy": 0.0, "border_share": 1.0}
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    framed = Image.new("RGB", (80, 80), "white")
    framed.paste(noise, (10, 30))
    assert quality.measure(framed)["border_share"] == pytest.approx(1 - 40 * 40 / 6400)
    assert quality.measure(noise)["border_share"] == 0.0
    soft = noise.resize((20, 20)).resize((40, 40), Image.Resampling.BICUBIC)
    assert quality.measure(soft)["sharpness"] < 0.5 * quality.measure(noise)["sharpness"]
    assert quality.measure(noise)["entropy"] > 6
    # Larger pictures are measured at a size like that of others.
    large = framed.resize((1280, 1280), Image.Resampling.NEAREST)
    assert quality.measure(large)["border_share"] == pytest.approx(0.75, abs=0.01)
