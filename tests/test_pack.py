"""Packing: tars and tables give back the folder they were made from, here and elsewhere, and say what damage took."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools import layouts
from data_tools.pack import main
from ztrain.data.reading import Listing, read_triplets
from ztrain.data.rows import Triplet
from ztrain.data.tars import PACK_MANIFEST_NAME
from ztrain.errors import InputError
from ztrain.images import Picture, PictureFile

SPLITS = {"train": 12, "validation": 3}
FORMATS = ["webdataset", "parquet"]


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture(scope="module", params=[1, 3], ids=["one reference", "up to three"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triplets with pictures of several kinds, each with bytes of its own; read it, never write into it."""
    return triplet_folder(tmp_path_factory.mktemp("triplets"), request.param)


def triplet_folder(root: Path, most_references: int) -> Path:
    suffixes = ["png", "JPG", "webp"]
    for split, count in SPLITS.items():
        (root / split / "images").mkdir(parents=True)
        rows = []
        for number in range(count):
            names = [f"images/{number}{letter}.{suffixes[number % 3]}" for letter in "tabc"][: most_references + 1]
            names = names[: 2 + number % 3]
            for place, name in enumerate(names):
                color = (number * 16, place * 60, 100 * (split == "train"))
                Image.new("RGB", (16, 16), color).save(root / split / name)
            references = (
                {"reference_file_names": names[1:]} if most_references > 1 else {"reference_file_name": names[1]}
            )
            row = {**references, "target_file_name": names[0], "prompt": f'日本 {number}\u2028"', "style": "ink"}
            row["prompts"] = [row["prompt"], f" other {number}", f"third {number}"][: number % 4]
            rows.append({**row, "weight": number / 8, "tags": ["a", "b"][: number % 3]})
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (root / split / "metadata.jsonl").write_text(lines, encoding="utf-8")
    (root / "LICENSES.md").write_text("by nobody")
    return root


def pack(folder: Path, out: Path, *options: object) -> Path:
    assert main(["--data", str(folder), "--out", str(out), *map(str, options)]) == 0
    return out


def refuse(capsys: pytest.CaptureFixture[str], folder: Path, out: Path, *options: object) -> str:
    before = sorted(out.parent.rglob("*"))
    assert main(["--data", str(folder), "--out", str(out), *map(str, options)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and not printed.out
    assert sorted(out.parent.rglob("*")) == before
    return printed.err


def content(triplets: list[Triplet]) -> list[tuple[int, str, tuple[str, ...], list[bytes], bytes, dict[str, object]]]:
    return [
        (
            triplet.index,
            triplet.prompt,
            triplet.captions,
            [each.read() for each in triplet.references],
            triplet.target.read(),
            triplet.columns,
        )
        for triplet in triplets
    ]


def read(location: Path, split: str = "train", **options: Any) -> Listing:
    return read_triplets(str(location), split, **options)


def pictures(listing: Listing) -> list[Picture]:
    return [picture for triplet in listing.triplets for picture in (triplet.target, *triplet.references)]


# ---- the same triplets


@pytest.mark.parametrize("form", FORMATS)
def test_packed_triplets_are_those_of_the_folder(folder: Path, tmp_path: Path, form: str) -> None:
    packed = pack(folder, tmp_path / "deep/er", "--format", form)
    for split, count in SPLITS.items():
        triplets = read(folder, split).triplets
        assert len(triplets) == count
        own = [number for number in range(count) if number % 4 > 1]
        assert {t.index: t.captions for t in triplets if t.captions} == {
            number: (f"other {number}", f"third {number}")[: number % 4 - 1] for number in own
        }
        assert content(read(packed, split).triplets) == content(triplets)
        alone = read(packed, split, text_only=True).triplets
        assert [(row.references, row.target.read()) for row in alone] == [((), row.target.read()) for row in triplets]
    assert (packed / "LICENSES.md").read_text() == "by nobody"


@pytest.mark.parametrize("form", FORMATS)
def test_large_splits_become_several_shards(tmp_path: Path, form: str) -> None:
    folder = triplet_folder(tmp_path / "in", 1)
    for path in folder.glob("*/images/*"):
        path.write_bytes(path.read_bytes().ljust(200_000, b"\0"))  # 12 x 0.4 MB
    packed = pack(folder, tmp_path / "out", "--format", form, "--max-shard-mib", 1)
    report = json.loads((packed / PACK_MANIFEST_NAME).read_text())
    assert report["triplets"] == SPLITS
    files = [path for path in packed.rglob("*") if path.suffix in (".tar", ".parquet")]
    assert {path.relative_to(packed).as_posix() for path in files} == {
        name for of_split in report["shards"].values() for name in of_split
    }
    if form == "webdataset":
        assert sorted(report["shards"]["train"]) == [f"train-{number:06d}.tar" for number in range(6)]
    else:
        assert sorted(report["shards"]["train"]) == [f"data/train-{number:05d}-of-00006.parquet" for number in range(6)]
    assert all(path.stat().st_size < 1_100_000 for path in files)
    assert content(read(packed).triplets) == content(read(folder).triplets)


@pytest.mark.parametrize("form", FORMATS)
def test_equal_inputs_give_equal_shards(folder: Path, tmp_path: Path, form: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")  # other times, other place
    first, second = (
        pack(folder, tmp_path / "a", "--format", form),
        pack(tmp_path / "copy", tmp_path / "b", "--format", form),
    )
    for path in (path for path in first.rglob("*") if path.is_file()):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path.name


@pytest.mark.parametrize("form", FORMATS)
def test_text_only_rows(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = triplet_folder(tmp_path / "in", 1)
    manifest = folder / "train/metadata.jsonl"
    rows = [json.loads(line) for line in manifest.read_bytes().decode().split("\n")]
    for row in rows[1:]:
        del row["reference_file_name"]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    assert "'reference_file_name' is missing" in refuse(capsys, folder, tmp_path / "out", "--format", form)
    packed = pack(folder, tmp_path / "out", "--format", form, "--text-only")
    assert content(read(packed, text_only=True).triplets) == content(read(folder, text_only=True).triplets)
    with pytest.raises(InputError, match="reference"):
        read(packed)


# ---- other people's loaders


def test_webdataset_in_safe_mode_reads_our_tars(folder: Path, tmp_path: Path) -> None:
    packed = pack(folder, tmp_path / "out", "--format", "webdataset")
    webdataset = layouts.safe_webdataset()
    assert os.environ["WDS_SECURE"] == "1"
    path = packed / "train-000000.tar"
    with pytest.raises(ValueError, match="cannot open local files"):  # so pack hands it an open file
        webdataset.TarWriter(str(tmp_path / "new.tar"))
    with pytest.raises(ValueError, match="cannot open pipe"):
        webdataset.gopen(f"pipe:cat {path}")
    with path.open("rb") as file:
        members = webdataset.tariterators.tar_file_expander(iter([{"url": path.name, "stream": file}]))
        samples = list(webdataset.tariterators.group_by_keys(members))
    for sample, triplet in zip(samples, read(folder).triplets, strict=True):
        assert sample["__key__"] == f"{triplet.index:06d}"
        assert json.loads(sample["json"]) == {"prompt": triplet.prompt, **triplet.columns}
        suffix = Path(triplet.target.name).suffix.lower()
        fields = {f"target{suffix}": triplet.target}
        fields |= {f"reference.{n}{suffix}": each for n, each in enumerate(triplet.references)}
        assert {name for name in sample if not name.startswith("__")} == {"json", *fields}
        assert all(sample[name] == picture.read() for name, picture in fields.items())
        decoded = webdataset.autodecode.Decoder([webdataset.imagehandler("pil")])(sample)
        assert decoded[f"target{suffix}"].size == (16, 16)


def test_datasets_loads_folder_and_tables_alike(folder: Path, tmp_path: Path) -> None:
    packed = pack(folder, tmp_path / "out", "--format", "parquet")
    loaded = [datasets.load_dataset("imagefolder", data_dir=str(folder)), datasets.load_dataset(str(packed))]
    for split in SPLITS:
        ours, theirs = (list(of_all[split]) for of_all in loaded)
        assert len(ours) == SPLITS[split]
        for left, right in zip(ours, theirs, strict=True):
            assert set(left) == set(right)
            for key, value in left.items():
                images = value if isinstance(value, list) else [value]
                others = right[key] if isinstance(value, list) else [right[key]]
                for one, other in zip(images, others, strict=True):
                    assert one.tobytes() == other.tobytes() if isinstance(one, Image.Image) else one == other
    written = pq.read_table(packed / "data/train-00000-of-00001.parquet")
    assert written.column("target")[0]["path"].as_py() == "0t.png"  # the kind of picture, to those who go by names
    alone = datasets.load_dataset("parquet", data_files=str(packed / "data/train-*.parquet"), split="train")
    assert alone.features == loaded[1]["train"].features and isinstance(alone.features["target"], datasets.Image)


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(folder: Path, tmp_path: Path) -> None:
    poison, canary = pickle.dumps(Canary(tmp_path / "canary")), tmp_path / "canary"
    packed = pack(folder, tmp_path / "out", "--format", "webdataset")
    path = packed / "train-000000.tar"
    with tarfile.open(path) as whole:
        members = [(member, whole.extractfile(member).read()) for member in whole]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as poisoned:
        for member, data in members:
            poisoned.addfile(member, io.BytesIO(data))
            for field in ("pyd", "pkl", "pickle", "pth", "reference.npy"):
                if member.name.endswith(".json"):
                    extra = tarfile.TarInfo(f"{member.name.removesuffix('.json')}.{field}")
                    extra.size = len(poison)
                    poisoned.addfile(extra, io.BytesIO(poison))
    webdataset = layouts.safe_webdataset()
    with path.open("rb") as file:
        samples = webdataset.tariterators.tar_file_expander(iter([{"url": path.name, "stream": file}]))
        with pytest.raises(webdataset.autodecode.DecodingError) as caught:
            list(map(webdataset.autodecode.Decoder([]), webdataset.tariterators.group_by_keys(samples)))
    assert "is not allowed for security reasons" in str(caught.value.__cause__)
    with pytest.raises(InputError, match="12 of 12 triplets cannot be used.*'reference.0.<ext>'"):
        read(packed)  # reference.npy and reference.0.png are two first references
    assert content(read(packed, text_only=True).triplets) == content(read(folder, text_only=True).triplets)
    assert not canary.exists()
    pickle.loads(poison)
    assert canary.exists()  # the canary sings


# ---- damage


def packed_members(path: Path) -> list[tuple[str, int, int]]:
    """Key, offset of the header and end of the data, padding included, of each member."""
    with tarfile.open(path) as archive:
        return [(m.name.split(".")[0], m.offset, m.offset_data + -(-m.size // 512) * 512) for m in archive]


@pytest.mark.parametrize("reported", [True, False], ids=["with report", "without report"])
def test_cut_tar_accounts_for_every_row(folder: Path, tmp_path: Path, reported: bool) -> None:
    packed = pack(folder, tmp_path / "out", "--format", "webdataset")
    path = packed / "train-000000.tar"
    whole, expected = path.read_bytes(), content(read(packed).triplets)
    members = packed_members(path)
    if not reported:
        (packed / PACK_MANIFEST_NAME).unlink()
    ends = [end for _, _, end in members]
    places = {0, 1, 511, 512, len(whole) - 1, len(whole) - 512, ends[-1], ends[-1] + 512}
    places |= {place for end in ends for place in (end - 513, end - 1, end, end + 1, end + 300)}
    for place in sorted(place for place in places if place < len(whole)):
        path.write_bytes(whole[:place])
        try:
            listing = read(packed, max_bad_share=0.999)
        except InputError as error:
            assert str(path) in str(error)
            kept = []
            if reported:
                assert f"{len(expected)} of {len(expected)} triplets cannot be used" in str(error)
        else:
            kept = content(listing.triplets)
            if reported:
                assert len(kept) + len(listing.rejected) == len(expected)
            elif len(kept) < len(expected):
                assert ["how many samples it has lost is unknown" in each for each in listing.rejected] == [True]
        assert kept == expected[: len(kept)]  # none is wrong, and none but the last whole one is given up
        finished = sum(1 for number in range(len(expected)) if ends[last_member(members, number)] <= place)
        assert finished - 1 <= len(kept) <= finished, place
        if place >= ends[-1] + 512:
            assert len(kept) == len(expected)  # only padding is gone


def last_member(members: list[tuple[str, int, int]], number: int) -> int:
    return max(position for position, (key, _, _) in enumerate(members) if key == f"{number:06d}")


def test_zeroed_and_missing_archives(folder: Path, tmp_path: Path) -> None:
    packed = pack(folder, tmp_path / "out", "--format", "webdataset")
    path = packed / "train-000000.tar"
    whole, expected, members = path.read_bytes(), content(read(packed).triplets), packed_members(path)
    start = next(header for key, header, _ in members if key == "000006")
    path.write_bytes(whole[:start] + bytes(512) + whole[start + 512 :])  # would be the end of the archive
    listing = read(packed, max_bad_share=0.9)
    assert content(listing.triplets) == expected[:5]
    assert f"sample 6 of 12 is lost: the archive is damaged at byte {start:,} (neither" in listing.rejected[0]
    assert len(listing.rejected) == 7
    with pytest.raises(InputError, match="7 of 12 triplets cannot be used.*sample 6 of 12.*sample 8 of 12"):
        read(packed)
    path.write_bytes(whole)
    report = json.loads((packed / PACK_MANIFEST_NAME).read_text())
    report["shards"]["train"]["train-000001.tar"] = {"samples": 2, "bytes": 1}
    (packed / PACK_MANIFEST_NAME).write_text(json.dumps(report))
    listing = read(packed, max_bad_share=0.2)
    assert content(listing.triplets) == expected
    lost = f"{packed}/train-000001.tar: sample {{}} of 2 is lost: the archive is missing"
    assert listing.rejected == [lost.format(1), lost.format(2)]
    (packed / PACK_MANIFEST_NAME).write_text('{"shards": 3}')
    with pytest.raises(InputError, match=r"manifest\.json: not a manifest of data_tools\.pack"):
        read(packed)
    (packed / PACK_MANIFEST_NAME).write_text('{"name": "of another program"}')
    assert content(read(packed).triplets) == expected


# ---- pictures of every kind


@pytest.mark.parametrize("form", ["folder", *FORMATS])
def test_pictures_travel_and_their_stamps_follow_the_bytes(tmp_path: Path, form: str) -> None:
    folder = triplet_folder(tmp_path / "in", 3)
    packed = folder if form == "folder" else pack(folder, tmp_path / "out", "--format", form)
    before = read(packed)
    found = pictures(before)
    stamps = [picture.stamp for picture in found]
    assert len(set(stamps)) == len(stamps) and [picture.stamp for picture in pictures(read(packed))] == stamps
    for picture in found:
        travelled = pickle.dumps(picture)
        assert len(travelled) < 4000 and picture.read() not in travelled  # places, no pixels
        arrived: Picture = pickle.loads(travelled)
        assert (arrived.name, arrived.stamp, arrived.read()) == (picture.name, picture.stamp, picture.read())
    for path in [path for path in packed.rglob("*") if path.suffix in (".png", ".JPG", ".webp", ".tar", ".parquet")]:
        data, times = bytearray(path.read_bytes()), path.stat()
        data[-1] ^= form == "folder"  # of archives and tables new bytes would be refused as damage
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as copying tools do: same size, same time
    assert not {picture.stamp for picture in pictures(read(packed))} & set(stamps)
    if form == "webdataset":
        with pytest.raises(OSError, match="the archive has changed since it was listed; start again"):
            found[0].read()


# ---- again, and what cannot be packed


def test_again_and_over_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = triplet_folder(tmp_path / "in", 1), tmp_path / "out"
    (tmp_path / ".writing-1-killed/out").mkdir(parents=True)
    (tmp_path / ".writing-1-killed.lock").touch()
    pack(folder, out, "--format", "webdataset")
    assert not list(tmp_path.glob(".writing-*"))
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSES.md",
        "README.md",
        "SHA256SUMS",
        "left_out.jsonl",
        "manifest.json",
        "train-000000.tar",
        "validation-000000.tar",
    ]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    pack(folder, out, "--format", "webdataset")
    assert capsys.readouterr().out == f"{out} is up to date\n{out}: train 12, validation 3\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    for options in (("parquet",), ("webdataset", "--text-only"), ("webdataset", "--max-shard-mib", 2)):
        assert "already holds something else" in refuse(capsys, folder, out, "--format", *options)
    changes = {
        "train/images/0t.png": (b"", b"\0"),
        "LICENSES.md": (b"", b"!"),
        "train/metadata.jsonl": (b"ink", b"oil"),
    }
    for name, (old, new) in changes.items():
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole.replace(old, new) if old else whole + new)
        assert "already holds something else" in refuse(capsys, folder, out, "--format", "webdataset")
        (folder / name).write_bytes(whole)
    os.truncate(out / "validation-000000.tar", 512)
    assert "validation-000000.tar: is missing or damaged; remove" in refuse(
        capsys, folder, out, "--format", "webdataset"
    )


def test_what_cannot_be_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = triplet_folder(tmp_path / "in", 1)
    options = (tmp_path / "out", "--format", "parquet")
    assert "no split with a metadata.jsonl there" in refuse(capsys, folder / "train", *options)
    assert "no split with" in refuse(capsys, Path("pipe:touch canary"), *options)
    assert "lies inside" in refuse(capsys, folder, folder / "out", "--format", "parquet")
    (tmp_path / "file").touch()
    assert "cannot write it" in refuse(capsys, folder, tmp_path / "file/out", "--format", "parquet")
    manifest = folder / "train/metadata.jsonl"
    row = {"reference_file_name": "images/0a.png", "target_file_name": "images/0t.png", "prompt": "p"}
    for columns, message in (
        ([{"n": 1}, {"n": "x"}], "the key 'n' has values that one Parquet column cannot hold"),
        ([{"target": 1}], "metadata.jsonl:1: the key 'target' is the name of a picture column"),
    ):
        manifest.write_text("\n".join(json.dumps({**row, **further}) for further in columns))
        assert message in refuse(capsys, folder, *options)
    manifest.write_text(json.dumps({**row, "target_file_name": "images/none.png"}))
    assert "1 of 1 triplets cannot be used" in refuse(capsys, folder, *options)
    assert not Path("canary").exists()
    assert "imagefolder is made of a table" in refuse(capsys, folder, tmp_path / "out", "--format", "imagefolder")
    with pytest.raises(SystemExit) as caught:
        main(["--data", str(folder), "--out", str(tmp_path / "out"), "--format", "zip"])
    assert caught.value.code == 2


def test_a_target_among_its_references_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = triplet_folder(tmp_path / "in", 1)
    shutil.copyfile(folder / "train/images/1t.JPG", folder / "train/images/1a.JPG")
    options = (tmp_path / "out", "--format", "webdataset")
    said = refuse(capsys, folder, *options)
    assert f"1 of {sum(SPLITS.values())} triplets have their target among their references" in said
    assert "train/metadata.jsonl:2" in said
    assert len(read(pack(folder, *options, "--allow-reference-is-target")).triplets) == SPLITS["train"]


def test_tables_are_written_in_small_groups(tmp_path: Path) -> None:
    folder = triplet_folder(tmp_path / "in", 1)
    manifest = folder / "train/metadata.jsonl"
    first = manifest.read_bytes().splitlines()[0]
    manifest.write_bytes(b"\n".join([first] * 250))
    packed = pack(folder, tmp_path / "out", "--format", "parquet")
    about = pq.read_metadata(packed / "data/train-00000-of-00001.parquet")
    assert [about.row_group(number).num_rows for number in range(about.num_row_groups)] == [100, 100, 50]


def test_columns_that_only_some_rows_have(tmp_path: Path) -> None:
    folder = triplet_folder(tmp_path / "in", 1)
    row = {"reference_file_name": "images/0a.png", "target_file_name": "images/0t.png", "prompt": "p"}
    lines = [row, {**row, "n": 1}, {**row, "box": {"x": 1.5, "labels": ["a"]}}]
    (folder / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tars = pack(folder, tmp_path / "tars", "--format", "webdataset")
    tables = pack(folder, tmp_path / "tables", "--format", "parquet")
    assert [each.columns for each in read(tars).triplets] == [{}, {"n": 1}, {"box": {"x": 1.5, "labels": ["a"]}}]
    absent = {
        "style": None,
        "prompts": None,
        "weight": None,
        "tags": None,
    }  # of the other split: a table has all columns in all rows
    expected = [{"n": None, "box": None}, {"n": 1, "box": None}, {"n": None, "box": {"x": 1.5, "labels": ["a"]}}]
    assert [each.columns for each in read(tables).triplets] == [{**absent, **columns} for columns in expected]
    assert all(isinstance(picture, PictureFile) for picture in pictures(read(folder)))
    assert asdict(read(folder).triplets[0])["columns"] == {}
