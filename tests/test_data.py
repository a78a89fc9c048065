"""Triplets in every layout: folders row by row, tars as others write them, odd tables, a Hub on localhost."""

import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ztrain.data.reading import Listing, read_triplets
from ztrain.data.tars import TarPicture
from ztrain.errors import InputError
from ztrain.images import PictureFile, open_image
from ztrain.io.files import LIMITS

ROOT = Path(__file__).parents[1]
EMOJI = ROOT.parent / "shared/data/emoji_styles"


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def bytes_of(listing: Listing) -> list[tuple[str, list[bytes], bytes]]:
    """Prompt, references and target of each triplet."""
    return [
        (triplet.prompt, [picture.read() for picture in triplet.references], triplet.target.read())
        for triplet in listing.triplets
    ]


# ---- folders


def manifest(folder: Path, *lines: str | dict[str, object]) -> Path:
    split = folder / "train"
    (split / "images").mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png", "images/c \u2028日本.png"):
        Image.new("RGB", (8, 8)).save(split / name)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    (split / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


ROW: dict[str, object] = {"reference_file_name": "a.png", "target_file_name": "b.png", "prompt": "a cat"}
PLAIN: dict[str, object] = {"target_file_name": "b.png", "prompt": "a"}


def test_manifest_rows(tmp_path: Path) -> None:
    several = {**PLAIN, "reference_file_names": ["a.png", "images/c \u2028日本.png"], "prompt": " a\u2028b "}
    listed = {**PLAIN, "reference_file_name": ["b.png", "a.png"], "reference_file_names": None}
    folder = manifest(tmp_path, {**ROW, "style": "ink", "n": [1]}, "", several, "", listed)
    first, second, third = read_triplets(str(folder), "train").triplets
    assert [triplet.index for triplet in (first, second, third)] == [0, 1, 2]
    assert [triplet.where for triplet in (first, third)] == [f"{folder}/train/metadata.jsonl:{n}" for n in (1, 5)]
    assert (first.prompt, second.prompt) == ("a cat", "a\u2028b")
    assert first.columns == {"style": "ink", "n": [1]} and second.columns == third.columns == {}
    assert first.captions == ()
    assert first.references == (PictureFile(folder / "train/a.png"),)
    assert first.target == PictureFile(folder / "train/b.png")
    assert [open_image(picture).size for picture in second.references] == [(8, 8)] * 2
    assert [Path(picture.name).name for picture in third.references] == ["b.png", "a.png"]
    assert read_triplets(str(folder), "train").triplets == [first, second, third]


BAD_ROWS: list[tuple[Any, str]] = [
    ("{", "not a row of JSON"),
    ("[1]", "must be a JSON object, not list"),
    ('{"prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
    ('{"columns": {"x": 1, "x": 2}}', "'x' stands twice"),
    ('{"x": NaN}', "NaN is not JSON"),
    ("[" * 100_000, "not a row of JSON"),
    (PLAIN, "'reference_file_name' is missing"),
    ({**PLAIN, "reference_file_name": None}, "'reference_file_name' is missing"),
    ({"reference_file_name": "a.png", "prompt": "a"}, "'target_file_name' is missing"),
    ({"reference_file_name": "a.png", "target_file_name": "b.png"}, "'prompt' is missing"),
    ({**ROW, "prompt": " \t"}, "prompt is empty"),
    ({**ROW, "prompt": 3}, "prompt must be text, not 3"),
    ({**ROW, "prompt": None}, "prompt must be text, not None"),
    ({**ROW, "prompts": "a dog"}, "prompts must be a list of texts, not 'a dog'"),
    ({**ROW, "prompts": ["a dog", " \u200b"]}, "prompts[1] is empty; write it or drop the row"),
    ({**ROW, "prompts": [None]}, "prompts[0] must be text, not None"),
    ('{"reference_file_name": "a.png", "target_file_name": "b.png", "prompt": "\\ud83d"}', "surrogate"),
    ('{"reference_file_name": "a.png", "target_file_name": "b.png", "prompt": "a", "x": ["\\uDE00"]}', "surrogate"),
    ({**ROW, "target_file_name": "c.png"}, "'c.png' is not in"),
    ({**ROW, "target_file_name": "images"}, "'images' is no regular file in"),
    ({**ROW, "target_file_name": "x" * 5000}, "is not in"),
    ({**ROW, "target_file_name": "../train/b.png"}, "leaves the folder"),
    ({**ROW, "target_file_name": "/etc/hostname"}, "leaves the folder"),
    ({**ROW, "target_file_name": ["b.png"]}, "must be text"),
    ({**ROW, "reference_file_name": ["a.png", 3]}, "must be text, not 3"),
    ({**ROW, "reference_file_names": ["a.png"]}, "has both"),
    ({**PLAIN, "reference_file_names": []}, "at least one name"),
]


def test_bad_rows_are_all_named_by_file_and_line(tmp_path: Path) -> None:
    folder = manifest(tmp_path, ROW, "", *(bad for bad, _ in BAD_ROWS), {**ROW, "prompt": "😀"})
    listing = read_triplets(str(folder), "train", max_bad_share=0.95)
    assert [(triplet.index, triplet.prompt) for triplet in listing.triplets] == [(0, "a cat"), (1, "😀")]
    for number, (sentence, (_, message)) in enumerate(zip(listing.rejected, BAD_ROWS, strict=True), start=3):
        assert sentence.startswith(f"{folder}/train/metadata.jsonl:{number}: ") and message in sentence
        assert "\n" not in sentence


def test_share_of_bad_rows(tmp_path: Path) -> None:
    folder = manifest(tmp_path, *[ROW] * 6, *[{**ROW, "prompt": ""}] * 4)
    assert len(read_triplets(str(folder), "train", max_bad_share=0.4).rejected) == 4  # the share itself is allowed
    with pytest.raises(InputError) as caught:
        read_triplets(str(folder), "train", max_bad_share=0.39)
    first = f"{folder}/train/metadata.jsonl"
    message = f"{first}: 4 of 10 triplets cannot be used (at most max_bad_share 0.39 is allowed): {first}:7: "
    assert str(caught.value).startswith(message) and str(caught.value).count("; write it") == 3
    with pytest.raises(InputError, match=r"1 of 1 triplets cannot be used"):
        read_triplets(str(manifest(tmp_path, "{")), "train", max_bad_share=1.0)
    with pytest.raises(InputError, match=r"train/metadata\.jsonl: there are no rows"):
        read_triplets(str(manifest(tmp_path, "", "  ")), "train")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    folder = manifest(tmp_path, ROW)
    (folder / "train/metadata.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(InputError, match=r"metadata\.jsonl:1: .*utf-8"):
        read_triplets(str(folder), "train")


def test_text_only_ignores_references(tmp_path: Path) -> None:
    gone = {**PLAIN, "reference_file_names": ["gone.png"], "n": 1}
    listing = read_triplets(str(manifest(tmp_path, PLAIN, ROW, gone)), "train", text_only=True)
    assert [triplet.references for triplet in listing.triplets] == [()] * 3
    assert [triplet.columns for triplet in listing.triplets] == [{}, {}, {"n": 1}]


def test_real_pictures_through_links(tmp_path: Path) -> None:
    style = EMOJI / "images/serenity"
    if not style.is_dir():
        pytest.skip(f"{EMOJI} is absent")
    (tmp_path / "val").mkdir()
    names = sorted(path.name for path in style.iterdir())[:6]
    for name in names:
        (tmp_path / "val" / name).symlink_to((style / name).resolve())
    rows = [{**ROW, "reference_file_name": a, "target_file_name": b} for a, b in zip(names, names[1:], strict=False)]
    (tmp_path / "val/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    triplets = read_triplets(str(tmp_path), "val").triplets
    assert [Path(triplet.target.name).name for triplet in triplets] == names[1:]
    assert {open_image(triplet.target).size for triplet in triplets} == {(128, 128)}


@pytest.mark.parametrize("number", [9, 11])
def test_a_share_of_cut_shards_is_counted_to_the_row(tmp_path: Path, number: int) -> None:
    """9 lost of 1000 are less than a hundredth, 11 are more; what is seen and what is bad make up the manifest."""
    shards = {f"train-{shard:06d}.tar": {"samples": 100, "bytes": 0} for shard in range(10)}
    for shard, name in enumerate(shards):
        tar(tmp_path / name, *(member for row in range(100) for member in sample(f"{shard:02d}{row:02d}")))
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": {"train": shards}}))
    path = tmp_path / "train-000003.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(f"03{100 - number + 1}.reference".encode())])  # the one before goes too
    if number == 9:
        listing = read_triplets(str(tmp_path), "train", max_bad_share=0.01)
        assert (len(listing.triplets), len(listing.rejected)) == (991, 9)
        for number, said in enumerate(listing.rejected, start=92):
            assert said.startswith(f"{path}: sample {number} of 100 is lost: the archive is damaged at byte ")
    else:
        with pytest.raises(InputError, match=r"11 of 1000 triplets cannot be used \(at most max_bad_share 0.01"):
            read_triplets(str(tmp_path), "train", max_bad_share=0.01)


@pytest.mark.parametrize("name", ["train-0.tar", "train-0.parquet", "train/metadata.jsonl"])
def test_data_cut_at_every_tenth_is_named(tmp_path: Path, name: str) -> None:
    """With and without the manifest of data_tools.pack, which says how many rows there were."""
    path = tmp_path / name
    if name.endswith(".tar"):
        tar(path, *(member for row in range(17) for member in sample(str(row))))
    elif name.endswith(".parquet"):
        rows = [{"target": cell(f"t{row}"), "reference": cell("r"), "prompt": f"p{row}"} for row in range(17)]
        table(path, {"target": IMAGE, "reference": IMAGE, "prompt": TEXT}, *rows)
    else:
        manifest(
            tmp_path, *[{**ROW, "prompt": f"a cat and {row} dogs"} for row in range(17)]
        )  # no cut is behind a line
    whole, prompts = path.read_bytes(), [triplet.prompt for triplet in read_triplets(str(tmp_path), "train").triplets]
    for packed in (False, True):
        if packed:
            report = {"shards": {"train": {name: {"samples": 17}}}}
            (tmp_path / "manifest.json").write_text(json.dumps(report))
        for tenth in range(10):
            path.write_bytes(whole[: len(whole) * tenth // 10])
            kept = []
            try:
                listing = read_triplets(str(tmp_path), "train", max_bad_share=0.99)
                kept = [triplet.prompt for triplet in listing.triplets]
                assert all(said.startswith(str(path)) for said in listing.rejected)
                assert listing.rejected or not whole[len(whole) * tenth // 10 :].strip(b"\0")  # only padding is gone
                assert not packed or name.endswith(".jsonl") or len(kept) + len(listing.rejected) == 17
            except InputError as error:
                assert str(error).startswith(str(path))
            assert kept == prompts[: len(kept)]


def test_damaged_tables_count_as_what_the_manifest_says(tmp_path: Path) -> None:
    features = {"target": IMAGE, "reference": IMAGE, "prompt": TEXT}
    row = {"target": cell("t"), "reference": cell("r"), "prompt": "p"}
    for number in range(2):
        table(tmp_path / f"train-{number}.parquet", features, *[row] * 4)
    shards = {f"train-{number}.parquet": {"samples": 4} for number in range(3)}
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": {"train": shards}}))
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1")
    listing = read_triplets(str(tmp_path), "train", max_bad_share=0.7)
    assert (len(listing.triplets), len(listing.rejected)) == (4, 8)
    told = f"{tmp_path}/train-{{}}.parquet: sample 1 of 4 is lost: "
    assert listing.rejected[0].startswith(told.format(1) + "not a readable Parquet file (its 4 bytes do not end as a")
    assert listing.rejected[4] == told.format(2) + "the table is missing"


# ---- what is no file, or too large a one


@pytest.mark.parametrize(
    "name", ["train-0.tar", "train-0.parquet", "train/metadata.jsonl", "manifest.json", "train/b.png"]
)
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path, name: str) -> None:
    folder = manifest(tmp_path, ROW)
    if "/" not in name:
        (folder / "train/metadata.jsonl").unlink()
        tar(tmp_path / "train-0.tar", *sample("0"))
    if name == "train-0.parquet":
        (tmp_path / "train-0.tar").unlink()
    path = tmp_path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    told = f"'b.png' is no regular file in {tmp_path}/train" if name.endswith("png") else f"{path}: is no regular file"
    for _ in range(2):
        with pytest.raises(InputError, match=re.escape(told)):
            read_triplets(str(tmp_path), "train")
        path.unlink()
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("train-0.tar", r"train-0.tar: the archive is damaged at byte 0 \(64,424,509,440 bytes stand behind its last"),
        ("train-0.parquet", r"train-0.parquet: not a readable Parquet file \(its 64,424,509,440 bytes do not end"),
        ("train/metadata.jsonl", r"metadata.jsonl:1: the line has more than 16,777,216 bytes"),
    ],
)
def test_files_of_many_gigabytes_of_nothing_are_not_read(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "train").mkdir()
    with (tmp_path / name).open("wb") as file:
        file.truncate(60 << 30)
    with pytest.raises(InputError, match=told):
        read_triplets(str(tmp_path), "train")


def test_claims_of_sizes_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member or a header that is gigabytes long in a sparse file, a footer likewise, a cell above the limit."""
    path = tar(tmp_path / "train-0.tar", *sample("0"), *sample("1"), *sample("2"))
    whole = path.read_bytes().rstrip(b"\0").ljust(512 * 18, b"\0")
    for kind, told in (
        (b"0", "'target.jpg': has 1,073,741,824 bytes, more than"),
        (b"L", "a header claims 1,073,741,824"),
    ):
        member = tarfile.TarInfo("3.target.jpg")
        member.type, member.size = kind, 1 << 30
        with path.open("wb") as file:
            file.write(whole + member.tobuf())
            file.truncate(len(whole) + 512 + (1 << 30) + 1024)
        assert told in "".join(read_triplets(str(tmp_path), "train", max_bad_share=0.9).rejected)
    path.unlink()
    features = {"target": IMAGE, "reference": IMAGE, "prompt": TEXT}
    path = table(
        tmp_path / "train-0.parquet", features, {"target": cell("t" * 99), "reference": cell("r"), "prompt": "p"}
    )
    [triplet] = read_triplets(str(tmp_path), "train").triplets
    monkeypatch.setitem(LIMITS, "picture", 98)
    with pytest.raises(
        InputError, match=r"row 0 of .*, target: has 99 bytes, more than the 98 that a picture may have"
    ):
        triplet.target.read()
    with path.open("r+b") as file:
        file.truncate(2 << 30)
        file.seek((2 << 30) - 8)
        file.write((1 << 30).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(InputError, match="its footer claims 1,073,741,824 bytes"):
        read_triplets(str(tmp_path), "train")


def test_a_hostile_tar_runs_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that leave the folder, links, devices and pickles: nothing is extracted, unpickled or run."""

    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path}/canary",))

    poison = pickle.dumps(Canary())
    members: list[Member] = []
    for key in ("../../canary", f"{tmp_path}/canary", "a/../../canary"):
        members += sample(key)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        key = f"link{kind.decode()}"
        members += [(f"{key}.target.png", link(kind)), *[each for each in sample(key) if "target" not in each[0]]]
    for field in ("pyd", "pkl", "pickle", "pth", "npy"):
        members += [*sample(f"with-{field}"), (f"with-{field}.{field}", poison)]
    members += [*sample("only")[:2], ("only.json", poison)]
    folder = tmp_path / "inside" / "data"
    tar(folder / "train-0.tar", *members)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    listing = read_triplets(str(folder), "train", max_bad_share=0.9)
    assert len(listing.triplets) == 8 and len(listing.rejected) == 6
    assert all(picture.startswith(b"") for _, references, _ in bytes_of(listing) for picture in references)
    assert ["is a link or sparse" in said for said in listing.rejected] == [True] * 5 + [False]
    assert "not a row of JSON" in listing.rejected[5] and sorted(tmp_path.rglob("*")) == before
    pickle.loads(poison)
    assert (tmp_path / "canary").exists()  # the canary sings


@pytest.mark.parametrize("number", ["1e400", "9" * 5000, "99999999999", "-1e400", "[]", "NaN"])
def test_wild_numbers_in_a_manifest_are_refused(tmp_path: Path, number: str) -> None:
    tar(tmp_path / "train-0.tar", *sample("0"))
    text = json.dumps({"shards": {"train": {"train-0.tar": {"samples": "?"}}}})
    (tmp_path / "manifest.json").write_text(text.replace('"?"', number))
    with pytest.raises(InputError, match=r"manifest\.json: not a manifest of data_tools\.pack \("):
        read_triplets(str(tmp_path), "train")


def test_names_cannot_break_a_sentence(tmp_path: Path) -> None:
    bad = "x\nerror: all is well\x1b[2J"
    tar(tmp_path / "tar" / "train-0.tar", *sample("0"), *sample(bad)[:1], (f"{bad}.json", b"{"))
    folder = manifest(tmp_path / "folder", ROW, {**ROW, "target_file_name": bad}, {bad: 1})
    for place in (tmp_path / "tar", folder):
        for said in read_triplets(str(place), "train", max_bad_share=0.9).rejected:
            assert "\n" not in said and "x\\nerror: all is well" in said


def test_data_at_a_place_that_is_no_utf8(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    assert len(read_triplets(str(manifest(odd / "folder", ROW)), "train").triplets) == 1
    tar(odd / "tar" / os.fsdecode(b"train-0\xe9.tar"), *sample("0"))
    assert bytes_of(read_triplets(str(odd / "tar"), "train"))[0][0] == "0"
    row = {"target": cell("t"), "reference": cell("r"), "prompt": "p"}
    table(odd / "t" / "train-0.parquet", {"target": IMAGE, "reference": IMAGE, "prompt": TEXT}, row)
    with pytest.raises(InputError, match="train-0.parquet: a table's path must be UTF-8; rename it, or give a link"):
        read_triplets(str(odd / "t"), "train")
    (tmp_path / "link").symlink_to(odd / "t")
    assert bytes_of(read_triplets(str(tmp_path / "link"), "train")) == [("p", [b"r"], b"t")]


# ---- which layout


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{}/none", "none: no such folder, and not the id of a Hub data set"),
        ("pipe:touch {}/canary", "pipe:touch .*: no such folder, and not the id"),
        ("https://example.com/train.tar", "https.*: no such folder, and not the id"),
        ("{}/file", "file: no split 'train' there; expected one of train/metadata.jsonl, train-.*found 'a file'"),
        ("{}/empty", "no split 'train' there.*found nothing"),
        ("{}/others", "no split 'train' there.*found 'train-extra-000000.tar', 'validation'"),
        ("{}/both", r"holds split 'train' several times, as train/metadata.jsonl and train-\[0-9\]\*.tar; keep one"),
    ],
)
def test_places_without_the_split(tmp_path: Path, location: str, message: str) -> None:
    for name in ("empty", "others/validation"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "others/train-extra-000000.tar").touch()
    (manifest(tmp_path / "both", ROW) / "train-000000.tar").touch()
    with pytest.raises(InputError, match=message):
        read_triplets(location.format(tmp_path), "train")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("split", ["", ".", "..", "../train", "/train", "a/b"])
def test_split_is_a_plain_name(tmp_path: Path, split: str) -> None:
    with pytest.raises(InputError, match="must be a plain name"):
        read_triplets(str(manifest(tmp_path, ROW)), split)


def test_revision_is_for_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no revision 'v1'"):
        read_triplets(str(manifest(tmp_path, ROW)), "train", "v1")


# ---- tars as others write them

Member = tuple[str, bytes | tarfile.TarInfo]


def sample(key: str, *, references: int = 1, prompt: str = "") -> list[Member]:
    """Members whose bytes name themselves."""
    pictures = [f"{key}.reference.{number}.png" for number in range(references)]
    members: list[Member] = [(name, name.encode()) for name in (*pictures, f"{key}.target.jpg")]
    return [*members, (f"{key}.json", json.dumps({"prompt": prompt or key, "key": key}).encode())]


def tar(path: Path, *members: Member, mode: Any = "w", format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(content, bytes) else content
            info.name = name
            info.size = len(content) if isinstance(content, bytes) else 0
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_samples(tmp_path: Path, format: int) -> None:
    folder = tarfile.TarInfo()
    folder.type = tarfile.DIRTYPE
    long = f"./{'long' * 20}/deep.er/1"
    ignored: list[Member] = [(".hidden", b"x"), ("README", b"x"), ("__meta__/a.json", b"x"), ("._1.json", b"x")]
    tar(tmp_path / "train-000000.tar", ("folder", folder), *ignored, *sample("0"), format=format)
    one = [(f"{long}.REFERENCE.Png", b"r"), (f"{long}.Target.PNG", b"t"), (f"{long}.json", b'{"prompt": "p"}')]
    tar(tmp_path / "train-000001.tar", *one, ("9.cls", b"3"), *sample("a", references=12), format=format)
    listing = read_triplets(str(tmp_path), "train", max_bad_share=0.5)
    assert bytes_of(listing) == [
        ("0", [b"0.reference.0.png"], b"0.target.jpg"),
        ("p", [b"r"], b"t"),
        ("a", [f"a.reference.{number}.png".encode() for number in range(12)], b"a.target.jpg"),
    ]
    assert [triplet.columns for triplet in listing.triplets] == [{"key": "0"}, {}, {"key": "a"}]
    assert listing.triplets[1].where == f"{tmp_path}/train-000001.tar: {long}"
    assert listing.triplets[0].target.name == f"{tmp_path}/train-000000.tar: 0.target.jpg"
    [rejected] = listing.rejected  # a sample that is none of ours is said, not skipped
    assert rejected.startswith(f"{tmp_path}/train-000001.tar: 9: needs one member 'json'")


def test_keys_that_look_like_something_else(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", *sample("BZh9"), *sample("__0"), *sample("__a__"))
    assert [triplet.prompt for triplet in read_triplets(str(tmp_path), "train").triplets] == ["BZh9", "__0", "__a__"]


def link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, "/etc/hostname"
    return info


BAD_SAMPLES: list[tuple[list[Member], str]] = [
    (sample("1")[:-1], "needs one member 'json'"),
    (sample("1")[1:], "needs one member 'reference.<ext>'"),
    ([*sample("1")[:1], *sample("1")[2:]], "one 'target.<ext>'; it has 'reference.0.png', 'json'"),
    ([*sample("1"), ("1.target.png", b"")], "one 'target.<ext>'"),
    ([*sample("1"), ("1.reference.2.png", b"")], "'reference.1.<ext>' and so on"),
    ([*sample("1"), ("1.reference.png", b"")], "'reference.1.<ext>' and so on"),
    ([*sample("1"), ("1.JSON", b"{}")], "the member 'json' stands twice"),
    ([*sample("1")[:-1], ("1.json", b"{")], "not a row of JSON"),
    ([*sample("1")[:-1], ("1.json.gz", b"")], "needs one member 'json'"),
    ([*sample("1")[:-1], ("1.json", b'{"prompt": " "}')], "prompt is empty"),
    ([("1.target.jpg", link(tarfile.SYMTYPE)), sample("1")[0], sample("1")[2]], "is a link or sparse"),
    ([("1.target.jpg", link(tarfile.LNKTYPE)), sample("1")[0], sample("1")[2]], "is a link or sparse"),
    ([("1.target.jpg", link(tarfile.FIFOTYPE)), sample("1")[0], sample("1")[2]], "is a link or sparse"),
    ([("1.target.jpg", link(tarfile.GNUTYPE_SPARSE)), sample("1")[0], sample("1")[2]], "is a link or sparse"),
]


@pytest.mark.parametrize(("members", "message"), BAD_SAMPLES)
def test_bad_samples_are_rejected_alone(tmp_path: Path, members: list[Member], message: str) -> None:
    tar(tmp_path / "train-000000.tar", *sample("0"), *members, *sample("2"))
    listing = read_triplets(str(tmp_path), "train", max_bad_share=0.4)
    assert [triplet.prompt for triplet in listing.triplets] == ["0", "2"]
    [rejected] = listing.rejected
    assert rejected.startswith(f"{tmp_path}/train-000000.tar: 1: ") and message in rejected


def test_keys_that_stand_twice(tmp_path: Path) -> None:
    """Either could be meant, so both go; the same key in another archive is another sample."""
    tar(tmp_path / "train/a.tar", *sample("0"), *sample("1"), *sample("0"))
    tar(tmp_path / "train/b.tar", *sample("0"))
    listing = read_triplets(str(tmp_path), "train", max_bad_share=0.5)
    places = [triplet.where.removeprefix(f"{tmp_path}/train/") for triplet in listing.triplets]
    assert places == ["a.tar: 1", "b.tar: 0"]
    assert len(listing.rejected) == 2 and all("a.tar: 0: the key stands 2 times" in each for each in listing.rejected)


def test_text_only_tar(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", *sample("0", references=0), *sample("1", references=2))
    triplets = read_triplets(str(tmp_path), "train", text_only=True).triplets
    assert [(triplet.prompt, triplet.references) for triplet in triplets] == [("0", ()), ("1", ())]


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_compressed_tar_is_refused(tmp_path: Path, compression: str) -> None:
    tar(tmp_path / "train-0.tar", *sample("0"), mode=f"w:{compression}")
    with pytest.raises(InputError, match=r"train-0\.tar: is compressed; .* unpack it"):
        read_triplets(str(tmp_path), "train", max_bad_share=0.9)


def test_joined_and_unfinished_tars_are_not_whole(tmp_path: Path) -> None:
    whole = tar(tmp_path / "train-0.tar", *sample("0"), *sample("1")).read_bytes()
    for damaged, message in ((whole * 2, "neither a member nor the end"), (whole.rstrip(b"\0"), "damaged at byte")):
        (tmp_path / "train-0.tar").write_bytes(damaged)
        listing = read_triplets(str(tmp_path), "train", max_bad_share=0.5)
        assert [triplet.prompt for triplet in listing.triplets] == ["0"]  # the last one could lack a member
        [rejected] = listing.rejected
        assert message in rejected and "how many samples it has lost is unknown" in rejected


@pytest.mark.parametrize(("size", "kind"), [(-1, b"0"), (-1024, b"0"), (-1024, b"S")])
def test_negative_sizes_neither_loop_nor_read_on(tmp_path: Path, size: int, kind: bytes) -> None:
    path = tar(tmp_path / "train-0.tar", *sample("0"), *sample("1"), *sample("2"))
    data = bytearray(path.read_bytes())
    header = data.index(b"1.target.jpg")
    data[header + 124 : header + 136] = size.to_bytes(12, signed=True)
    data[header + 156 : header + 157] = kind
    data[header + 483 : header + 495] = b"00000000012\0"  # a sparse file has its real size here
    fields = data[header : header + 148] + data[header + 156 : header + 512]
    data[header + 148 : header + 156] = b"%06o\0 " % (256 + sum(fields))
    path.write_bytes(data)
    listing = read_triplets(str(tmp_path), "train", max_bad_share=0.9)
    assert "the next member reaches backwards" in listing.rejected[-1]
    assert [triplet.prompt for triplet in listing.triplets] == ["0"]


def odd(kind: bytes, body: bytes, size: bytes = b"") -> bytes:
    """A member with a right checksum, whatever else it says."""
    header = bytearray(tarfile.TarInfo("odd").tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[156:157] = size or b"%011o\0" % len(body), kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + body + bytes(-len(body) % 512)


@pytest.mark.parametrize(
    "members",
    [
        odd(b"x", b"12 comment=a") * 2000,  # tarfile calls itself for each
        odd(b"x", b"20 GNU.sparse.size=\n") + odd(b"0", b""),
        odd(b"x", b"17 hdrcharset=\xff\xff\n") + odd(b"0", b""),
        odd(b"0", b"", size=b"\x80" + b"\xff" * 11),
        odd(b"x", b"", size=b"\x80" + b"\xff" * 11),
        odd(b"L", b"", size=b"\x80" + b"\xff" * 11),
        odd(b"0", b"", size=b"junk\0\0\0\0\0\0\0\0"),
    ],
)
def test_odd_headers_end_the_archive(tmp_path: Path, members: bytes) -> None:
    path = tar(tmp_path / "train-0.tar", *sample("0"), *sample("1"))
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(512 * 12, b"\0") + members + bytes(1024))
    listing = read_triplets(str(tmp_path), "train", max_bad_share=0.9)
    assert [triplet.prompt for triplet in listing.triplets] == ["0"]
    assert "the archive is damaged at byte 6,144 (" in listing.rejected[0]


WHOLE = [sample(str(number), references=1 + number % 2) for number in range(4)]


@pytest.fixture(scope="module", params=[tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def whole_tar(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    members = [member for members in WHOLE for member in members]
    return tar(tmp_path_factory.mktemp("whole") / "train-0.tar", *members, format=request.param)


@given(
    changes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=6),
    mend=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_damaged_headers_never_give_a_wrong_picture(
    whole_tar: Path, changes: list[tuple[int, int, int]], mend: bool
) -> None:
    """Bytes of headers changed, with `mend` under a right checksum: an error or fewer samples, at most."""
    damaged = bytearray(whole_tar.read_bytes())
    for block, place, value in changes:
        start = block * 512 % len(damaged)
        damaged[start + place] = value
        if mend:
            header = damaged[start : start + 512]
            damaged[start + 148 : start + 156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    (whole_tar.parent / "damaged").mkdir(exist_ok=True)
    path = whole_tar.parent / "damaged/train-0.tar"
    path.write_bytes(damaged)
    try:
        listing = read_triplets(str(path.parent), "train", max_bad_share=0.99)
    except InputError as error:
        assert str(path) in str(error)
        return
    known = places(read_triplets(str(whole_tar.parent), "train"))
    found = places(listing)
    assert all(offset + size <= len(damaged) for _, offset, size in found)
    assert mend or found <= known  # without the right checksum no header is believed


def places(listing: Listing) -> set[tuple[str, int, int]]:
    """Member, offset and size of each picture."""
    pictures = [picture for triplet in listing.triplets for picture in (triplet.target, *triplet.references)]
    assert all(isinstance(picture, TarPicture) for picture in pictures)
    return {(picture.member, picture.offset, picture.size) for picture in pictures if isinstance(picture, TarPicture)}


# ---- tables with odd cells

IMAGE = datasets.Image()


def table(path: Path, features: dict[str, Any], *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=datasets.Features(features).arrow_schema), file)
    return path


def cell(content: str | None = None, path: str | None = None) -> dict[str, object]:
    return {"bytes": None if content is None else content.encode(), "path": path}


TEXT = datasets.Value("string")
SINGLE = {"target": IMAGE, "reference": IMAGE, "prompt": TEXT, "note": TEXT, "thumbnail": IMAGE}


def test_table_of_several_files_and_odd_cells(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"file")
    good = {"target": cell("t0"), "reference": cell("r0"), "prompt": " p0 ", "note": "n", "thumbnail": cell("x")}
    inside = {**good, "target": cell(path="in/a.png"), "reference": cell(path=f"{tmp_path}/in/a.png"), "prompt": "p1"}
    bad = [
        ({**good, "target": None}, "row 2 of .*, target: the picture is missing"),
        ({**good, "reference": cell()}, "reference: the picture is missing"),
        ({**good, "target": cell(path="/etc/hostname")}, "leaves the folder"),
        ({**good, "target": cell(path="../a.png")}, "leaves the folder"),
        ({**good, "target": cell(path="https://example.com/a.png")}, "is not in"),
        ({**good, "prompt": None}, "row 7 of .*: prompt must be text, not None"),
    ]
    folder = tmp_path / "odd[1] name*"
    table(folder / "data/train-00000-of-00002.parquet", SINGLE, good, {**inside, "target": cell("t1")})
    table(folder / "data/train-00001-of-00002.parquet", SINGLE, *(row for row, _ in bad))
    table(folder / "data/validation-00000-of-00001.parquet", SINGLE, good)
    listing = read_triplets(str(folder), "train", max_bad_share=0.9)
    assert bytes_of(listing) == [("p0", [b"r0"], b"t0")]
    assert listing.triplets[0].columns == {"note": "n"}  # not the thumbnail
    for sentence, message in zip(listing.rejected[1:], (message for _, message in bad), strict=True):
        assert re.search(message, sentence), sentence
    table(tmp_path / "train-0.parquet", SINGLE, good, inside)
    assert bytes_of(read_triplets(str(tmp_path), "train"))[1] == ("p1", [b"file"], b"file")


def test_table_with_lists(tmp_path: Path) -> None:
    features = {"target": IMAGE, "references": datasets.List(IMAGE), "prompt": TEXT}
    rows = [
        {"target": cell(f"t{n}"), "references": [cell(f"r{n}{i}") for i in range(n)] or None, "prompt": f"p{n}"}
        for n in (2, 0, 1)
    ]
    table(tmp_path / "train-0.parquet", features, *rows)
    listing = read_triplets(str(tmp_path), "train", max_bad_share=0.4)
    assert bytes_of(listing) == [("p2", [b"r20", b"r21"], b"t2"), ("p1", [b"r10"], b"t1")]
    assert ["row 1 of" in each and "has no reference" in each for each in listing.rejected] == [True]
    assert [t.prompt for t in read_triplets(str(tmp_path), "train", text_only=True).triplets] == ["p2", "p0", "p1"]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"target": IMAGE, "prompt": TEXT}, "one of 'reference', 'references'; it has 'target', 'prompt'"),
        ({"target": IMAGE, "prompt": TEXT, "reference": IMAGE, "references": datasets.List(IMAGE)}, "one of"),
        ({"target": IMAGE, "reference": IMAGE}, "needs the columns 'prompt'"),
        ({"target": TEXT, "reference": IMAGE, "prompt": TEXT}, "'target' must hold pictures"),
        ({"target": IMAGE, "reference": datasets.List(TEXT), "prompt": TEXT}, "'reference' must hold pictures"),
        ({"target": datasets.List(IMAGE), "reference": IMAGE, "prompt": TEXT}, "'target' must hold one picture"),
    ],
)
def test_tables_that_hold_no_triplets(tmp_path: Path, features: dict[str, Any], message: str) -> None:
    table(tmp_path / "train-0.parquet", features, {})
    with pytest.raises(InputError, match=message):
        read_triplets(str(tmp_path), "train")


ODD_METADATA = [
    "null", "{", "[" * 100_000, '{"info": null}', '{"info": {"features": 3}}', '{"info": {"features": {"target": 3}}}',
    '{"info": {"features": {"target": {"_type": "os.system"}}}}',
    '{"info": {"features": {"target": {"_type": "List"}}}}', '{"info": {"features": {"target": {"_type": "Value"}}}}',
]  # fmt: skip


def test_odd_schemas_and_values_of_tables_are_one_sentence(tmp_path: Path) -> None:
    """What `datasets` makes of a foreign file's metadata ends in any kind of error, at times in values of another."""
    picture = pa.array([{"bytes": b"x", "path": "a"}])
    good = pa.table({"prompt": ["p"], "target": picture, "reference": picture})
    odd = [good.replace_schema_metadata({"huggingface": text}) for text in ODD_METADATA]
    for value in ({"bytes": "text", "path": "a"}, {"bytes": 3, "path": "a"}, {"bytes": b"x", "path": 3}):
        odd.append(good.set_column(1, "target", pa.array([value])))
    odd.append(good.append_column("day", pa.array([2**31 - 1], type=pa.date32())))
    odd.append(good.append_column("time", pa.array([2**60], type=pa.timestamp("us"))))
    for number, rows in enumerate(odd):
        (tmp_path / f"{number}").mkdir()
        pq.write_table(rows, tmp_path / f"{number}/train-0.parquet")
        with pytest.raises(InputError, match="cannot load the tables|must hold pictures|a column has values that"):
            read_triplets(str(tmp_path / f"{number}"), "train")


def test_tables_without_rows(tmp_path: Path) -> None:
    features = {"target": IMAGE, "reference": IMAGE, "prompt": TEXT}
    table(tmp_path / "train-0.parquet", features)
    with pytest.raises(InputError, match="there are no rows"):
        read_triplets(str(tmp_path), "train")
    table(tmp_path / "train-1.parquet", features, {"target": cell("t"), "reference": cell("r"), "prompt": "p"})
    assert bytes_of(read_triplets(str(tmp_path), "train")) == [("p", [b"r"], b"t")]


def test_damaged_tables(tmp_path: Path) -> None:
    features = {"target": IMAGE, "reference": IMAGE, "prompt": TEXT}
    row = {"target": cell("t" * 5000), "reference": cell("r" * 5000), "prompt": "p"}
    path = table(tmp_path / "train-0.parquet", features, row)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"train-0\.parquet: not a readable Parquet file"):
        read_triplets(str(tmp_path), "train")
    path.write_bytes(b"PAR1" + b"\xff" * 400 + whole[404:])
    table(tmp_path / "train-1.parquet", features, row)
    with pytest.raises(InputError, match=r"train-0\.parquet: not a readable Parquet file \("):  # which one
        read_triplets(str(tmp_path), "train")


def test_table_that_changed_under_the_same_name_size_and_time(tmp_path: Path) -> None:
    features = {"target": IMAGE, "reference": IMAGE, "prompt": TEXT}
    first = {"target": cell("t0"), "reference": cell("r0"), "prompt": "p0"}
    path = table(tmp_path / "train-0.parquet", features, first)
    before, times = read_triplets(str(tmp_path), "train"), path.stat()
    table(path, features, {"target": cell("t1"), "reference": cell("r1"), "prompt": "p1"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = read_triplets(str(tmp_path), "train")
    assert path.stat().st_size == times.st_size and path.stat().st_mtime_ns == times.st_mtime_ns
    assert bytes_of(after) == [("p1", [b"r1"], b"t1")] and bytes_of(before) == [("p0", [b"r0"], b"t0")]
    assert after.triplets[0].target.stamp != before.triplets[0].target.stamp


# ---- a Hub of a few files


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as `datasets` asks for, over `repositories` of folders."""

    repositories: dict[str, Path] = {}

    def do_GET(self) -> None:
        path, _, query = unquote(self.path).partition("?")
        kind, owner, name, *rest = (path.removeprefix("/api").strip("/") + "//").split("/")
        rest = [part for part in rest if part]
        root = self.repositories.get(f"{owner}/{name}")
        if kind != "datasets" or root is None:
            code = "GatedRepo" if owner == "gated" else "RepoNotFound"
            return self.answer(403 if owner == "gated" else 404, {"X-Error-Code": code})
        inside = root / "/".join(rest[2:])
        if rest[:1] == ["resolve"]:
            if not inside.is_file():
                return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            etag = hashlib.sha1(inside.read_bytes()).hexdigest()
            return self.answer(200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, inside.read_bytes())
        if rest[:1] == ["tree"]:
            if not inside.exists():
                return self.answer(404, {"X-Error-Code": "EntryNotFound"})
            entries = [
                {
                    "type": "directory" if path.is_dir() else "file",
                    "path": path.relative_to(root).as_posix(),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(str(path).encode()).hexdigest(),
                }
                for path in sorted(inside.rglob("*") if "recursive=true" in query else inside.iterdir())
            ]
            return self.answer(200, {}, json.dumps(entries).encode())
        about = {"id": f"{owner}/{name}", "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": []}
        return self.answer(200, {}, json.dumps(about).encode())

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


COMMIT = "c0ffee" + "0" * 34
CLIENT = """
import json, sys
from ztrain.data.reading import read_triplets
from ztrain.errors import InputError
assert not {"datasets", "pyarrow", "torch"} & set(sys.modules)  # they load where they are used
for location, split, revision in json.loads(sys.argv[1]):
    try:
        listing = read_triplets(location, split, revision, max_bad_share=0.5)
        rows = [[t.prompt, [p.read().decode() for p in (t.target, *t.references)]] for t in listing.triplets]
        stamps = [t.target.stamp for t in listing.triplets]
        print(json.dumps([rows, listing.rejected, stamps]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


def ask_hub(home: Path, *requests: tuple[str, str, str | None], **environment: str) -> list[Any]:
    """What read_triplets gives or says in a process of its own, where Hugging Face's settings can be changed."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(requests)],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Generating" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_data_sets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"target": cell("t"), "reference": cell("r"), "prompt": "p", "note": "", "thumbnail": None}
    evil = {**row, "target": cell(path="/etc/hostname")}
    table(tmp_path / "tables/data/train-00000-of-00001.parquet", SINGLE, row, evil)
    table(tmp_path / "tables/data/validation-00000-of-00001.parquet", SINGLE, row, {**row, "prompt": "q"})
    split = manifest(tmp_path / "folder", ROW) / "train"
    (split / "a.png").write_bytes(b"a")
    (split / "b.png").write_bytes(b"b")
    monkeypatch.setattr(Hub, "repositories", {"me/tables": tmp_path / "tables", "me/folder": tmp_path / "folder"})
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted/scripted.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    Hub.repositories["me/scripted"] = tmp_path / "scripted"
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tables, first, last, folder, gated, absent, split_absent, scripted = ask_hub(
            tmp_path / "home",
            ("me/tables", "train", "main"),
            ("me/tables", "validation[:1]", None),
            ("me/tables", "validation[1:]", None),
            ("me/folder", "train", None),
            ("gated/tables", "train", None),
            ("me/none", "train", None),
            ("me/folder", "test", None),
            ("me/scripted", "train", None),
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
            HF_HUB_OFFLINE="0",
        )
        server.shutdown()
    assert tables[0] == [["p", ["t", "r"]]]
    assert len(tables[1]) == 1 and "row 1 of me/tables, split train, target: " in tables[1][0]
    assert [first[0][0][0], last[0][0][0]] == ["p", "q"] and first[2] != last[2]  # both are row 0 of one Arrow file
    assert folder[:2] == [[["a cat", ["b", "a"]]], []]
    refusal = "{}: there is no such folder, and split {!r} does not come from the Hub ({}"
    assert gated.startswith(refusal.format("gated/tables", "train", "Dataset 'gated/tables' is a gated dataset"))
    assert absent.startswith(refusal.format("me/none", "train", "Dataset 'me/none' doesn't exist"))
    assert split_absent.startswith(refusal.format("me/folder", "test", 'Unknown split "test"'))
    assert scripted.startswith(refusal.format("me/scripted", "train", "Dataset scripts are no longer supported"))
    assert not (tmp_path / "canary").exists()
    [offline] = ask_hub(tmp_path / "other", ("me/tables", "train", None), HF_HUB_OFFLINE="1")
    assert offline.startswith(refusal.format("me/tables", "train", "Couldn't reach 'me/tables' on the Hub (Offline"))
    assert offline.endswith("; correct the path, or check id, revision, split, network and login (hf auth login)")
