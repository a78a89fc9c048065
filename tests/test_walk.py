"""What a folder holds: every file is listed, named or counted; links end; and whose words are a picture's caption."""

import io
import json
import os
import socket
import sys
import tarfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.sources import LISTED, Reader, list_pictures, resolve
from ztrain.errors import InputError
from ztrain.io.files import LIMITS

JXL = b"\xff\x0a" + bytes(30)
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def png(path: Path, format: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, format)
    return path


def listed(place: Path, **options: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Rows by name, and facts."""
    table = list_pictures({"it": place}, place.parent / f"{place.name}.listing", 512, **options)
    rows = table.read().to_pylist()
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}, dict(table.facts)


def passed_by(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: row["refused"] for name, row in rows.items() if row["refused_by"] == LISTED}


@contextmanager
def nobody(folder: Path) -> Iterator[None]:
    """As a user whom modes concern, where this one is root."""
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == 0 and len(parent.parts) > 2:
            parent.chmod(parent.stat().st_mode | 0o055)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_everything_in_a_folder_is_listed_named_or_counted(tmp_path: Path) -> None:
    place = tmp_path / "in"
    for name in ("a/web.jfif", "a/old.jpe", "a/IMG.HEIC", "a/noextension", "a/new.jxl", "a/x.dat"):
        png(place / name, "JPEG")
    for name in ("a/._a.png", ".DS_Store", "a/Thumbs.db", "notes.pdf.txt", "a/film.mov", "empty"):
        (place / name).write_bytes(b"")
    for name, data in {"r.jxl": JXL, "s.svg": b"<svg/>", "t": JXL, "no.heic": b"text", ".hidden.webp": b"x"}.items():
        (place / name).write_bytes(data)
    png(place / ".thumbs/1.png")
    png(place / "a/.hidden")
    os.mkfifo(place / "a/pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(place / "a/socket"))
        rows, facts = listed(place)
    assert {name for name, row in rows.items() if row["refused"] is None} == {
        "a/web.jfif", "a/old.jpe", "a/IMG.HEIC", "a/noextension", "a/new.jxl", "a/x.dat"}  # fmt: skip
    assert all(Reader({"it": place}).read(row)[:3] == b"\xff\xd8\xff" for row in rows.values() if not row["refused"])
    reasons = passed_by(rows)
    assert set(reasons) == {"r.jxl", "s.svg", "t", "no.heic", ".hidden.webp", ".thumbs", "a/.hidden"}
    assert reasons["t"] == "is a picture of a format that is not read (JPEG XL); save it as PNG or JPEG"
    assert "is called a picture, and is none" in reasons["no.heic"] and "is hidden" in reasons[".thumbs"]
    assert facts["ignored"] == {
        "JPEG XL pictures": 2, "SVG pictures": 1, "unknown pictures": 1, "hidden": 3, "hidden folders": 1,
        "._ files of macOS": 1, ".db": 1, ".txt": 1, ".mov": 1, "no extension": 1, "pipes, sockets and devices": 2,
    }  # fmt: skip


def test_links_inside_the_sources_are_followed_and_others_named(tmp_path: Path) -> None:
    place = tmp_path / "in"
    png(place / "ink/a.png")
    png(place / ".store/oil/b.png")
    png(tmp_path / "else/c.png")
    for link, to in {"oil": ".store/oil", "out": "../else", "oil2": ".store/oil", "ink/up": "..", "ink/self": "self",
                     "ink/b.png": "../.store/oil/b.png", "ink/c.png": "../../else/c.png", "dead": "nowhere",
                     "back/to": "../ink", "near": "../in2"}.items():  # fmt: skip
        (place / link).parent.mkdir(exist_ok=True)
        (place / link).symlink_to(to)
    (tmp_path / "in2").mkdir()  # begins with the source's name, and is another folder
    rows, facts = listed(place)
    used = {name for name, row in rows.items() if row["refused"] is None}
    assert used == {"ink/a.png", "ink/b.png", "oil/b.png", "back/to/a.png", "back/to/b.png"}
    reasons = passed_by(rows)
    out = "is a link out of the sources; add what it leads to to the sources, or set links: all"
    assert {name for name, reason in reasons.items() if reason == out} == {"out", "near", "ink/c.png", "back/to/c.png"}
    assert reasons["oil2"] == "links have led to this folder before; once counts"
    assert "a folder that it lies in" in reasons["ink/up"] and "to nothing" in reasons["dead"]
    assert "to nothing" in reasons["ink/self"] and "to nothing" in reasons["back/to/self"]
    assert facts["ignored"] == {"links out of the sources": 4, "folders linked again": 1, "links in a circle": 2,
                                "links to nothing": 3, "hidden folders": 1}  # fmt: skip
    assert str(tmp_path) not in str(rows)
    every, _ = listed(place, links="all")
    assert {"out/c.png", "ink/c.png"} <= {name for name, row in every.items() if row["refused"] is None}
    table = list_pictures({"it": place, "else": tmp_path / "else"}, tmp_path / "both", 512)
    both = [(row["source"], row["name"]) for row in table.read().to_pylist() if row["refused"] is None]
    assert {("it", "out/c.png"), ("else", "c.png"), ("it", "ink/c.png")} <= set(both)


def test_links_among_many_folders_end_soon_and_deep_folders_are_named(tmp_path: Path) -> None:
    place = tmp_path / "in"
    for one in range(12):  # 12! ways to go through them
        png(place / f"{one}/a.png")
        for other in range(12):
            (place / f"{one}/to{other}").symlink_to(f"../{other}")
    png(place / Path(*["d"] * 150) / "a.png")
    rows, _ = listed(place)
    used = [name for name, row in rows.items() if row["refused"] is None]
    assert 12 <= len(used) <= 24
    assert passed_by(rows)["/".join(["d"] * 101)] == "lies more than 100 folders deep; move it up"


def test_snapshots_of_the_hub_are_links_to_blobs_beside_them(tmp_path: Path) -> None:
    repository = tmp_path / "hub/datasets--a--b"
    png(repository / "blobs/1")
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to("../../blobs/1")
    (snapshot / "b.png").symlink_to("../../../../other.png")
    png(tmp_path / "other.png")
    rows, _ = listed(snapshot)
    assert rows["a.png"]["refused"] is None and "out of the sources" in rows["b.png"]["refused"]


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="there are no users")
def test_folders_and_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    place = tmp_path / "in"
    for name in ("open/a.png", "shut/b.png"):
        png(place / name)
    (place / "open/data").write_bytes(JXL)
    (place / "shut").chmod(0)
    (place / "open/data").chmod(0)
    out = tmp_path / "in.listing"
    out.mkdir()
    out.chmod(0o777)
    with nobody(place):
        rows, facts = listed(place)
    (place / "shut").chmod(0o755)
    assert rows["open/a.png"]["refused"] is None
    assert passed_by(rows) == {"shut": "cannot be read (Permission denied)",
                               "open/data": "cannot be read (Permission denied)"}  # fmt: skip
    assert facts["ignored"] == {"folders that cannot be read": 1, "files that cannot be read": 1}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file systems elsewhere refuse such names")
def test_names_that_are_no_utf8_are_pictures_as_others(tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/in\xff"))
    for raw in (b"\xfe/\xff.png", b"\xfe/\\xff.png", b"x/a\n\x1b[31m.png"):
        png(Path(os.fsdecode(os.fsencode(place) + b"/" + raw)))
    Path(os.fsdecode(os.fsencode(place) + b"/\xfe/\xff.txt")).write_text("a box")
    with tarfile.open(place / "t\udcff.tar", "w") as tar:
        tar.add(place / "x/a\n\x1b[31m.png", "m\udcfe.png")
    pq.write_table(pa.table({"image": [png(tmp_path / "p.png").read_bytes()]}), tmp_path / "p")
    (tmp_path / "p").rename(place / "p\udcff.parquet")
    roots = resolve([str(place)], Path())
    assert set(roots) == {"in\\xff"}
    table = list_pictures(roots, tmp_path / "listing", 512)
    rows = {row["name"]: row for row in type(table).open(tmp_path / "listing").read().to_pylist()}
    assert set(rows) == {"\\xfe/\\xff.png", "\\xfe/\\\\xff.png", "x/a\n\x1b[31m.png", "t\\xff.tar/m\\xfe.png",
                         "p\\xff.parquet/image/0"}  # fmt: skip
    reader = Reader(type(table).open(tmp_path / "listing").roots)
    assert all(reader.read(row)[:4] == b"\x89PNG" for row in rows.values())
    assert rows["\\xfe/\\xff.png"]["caption"] == "a box" and rows["\\xfe/\\\\xff.png"]["caption"] is None


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_nearest_words_are_the_caption(tmp_path: Path) -> None:
    place = tmp_path / "in"
    for name in ("1", "2", "3", "4", "5", "6", NFD, "Cat", "none"):
        png(place / f"ink/{name}.png")
    png(place / "ink/deep/7.png")
    write(place / "metadata.jsonl", {"file_name": "ink\\6.png", "text": "6 by the table above"},
          {"file_name": "./ink/deep/7.png", "prompt": " 7 by\n the table above"},
          {"file_name": "gone.png", "text": "x"}, {"file_name": "ink/5.png", "caption": "farther"})  # fmt: skip
    write(place / "ink/metadata.jsonl", {"file_name": "5.png", "caption": "5 by the table", "text": "another column"},
          {"file_name": "4.png", "text": "contradicts"})  # fmt: skip
    (place / "ink/metadata.csv").write_text(f"File_Name;Text\n{NFC}.png;form\ncat.png;case\n5.png;by csv\n")
    for name, text in {"1.txt": " 1 by\ntext ", "1.caption": "1 by text", "1.json": '{"caption": "1 by text"}',
                       "2.txt": "\u200b", "2.caption": "2 by caption", "2.json": '{"caption": "contradicts"}',
                       "3.json": '{"tags": "x", "text": "", "prompt": "3 by json"}', "4.Caption": "4 by caption",
                       "none.json": '{"width": 8}'}.items():  # fmt: skip
        (place / "ink" / name).write_text(text)
    rows, facts = listed(place)
    assert {name: (row["caption"], row["caption_from"]) for name, row in rows.items()} == {
        "ink/1.png": ("1 by\ntext", "sidecar .txt"),
        "ink/2.png": ("2 by caption", "sidecar .caption"),
        "ink/3.png": ("3 by json", "sidecar .json"),
        "ink/4.png": ("4 by caption", "sidecar .caption"),
        "ink/5.png": ("5 by the table", "metadata.jsonl"),
        "ink/6.png": ("6 by the table above", "metadata.jsonl"),
        "ink/deep/7.png": ("7 by\nthe table above", "metadata.jsonl"),
        f"ink/{NFD}.png": ("form", "metadata.csv"),
        "ink/Cat.png": ("case", "metadata.csv"),
        "ink/none.png": (None, None),
    }
    assert facts["counts"] == {"captions_given": 9, "captions_that_another_file_contradicts": 3,
                               "captions_without_picture": 1}  # fmt: skip
    assert facts["ignored"] == {}


def test_words_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    place = tmp_path / "in"
    bad = {"a.txt": b"\xff", "b.txt": b"a\0b", "c.json": b"{", "d.json": b'{"caption": 5}',
           "e.caption": b"x" * (1 << 21), "f.json": b'{"caption": "\\ud800"}', "g.json": b'{"caption": "\\u0000"}',
           "h.json": b"[" * 100_000}  # fmt: skip
    for name, raw in bad.items():
        png(place / f"{name[0]}.png")
        (place / name).write_bytes(raw)
    png(place / "i.png")
    (place / "metadata.jsonl").write_text('{"file_name": "i.png", "text": "i"}\n{"file_name": "i.png", "text": "j"}\n'
                                          '{"file_name": 7, "text": "x"}\nnone\n{"file_name": "a.png"}\n'
                                          '{"file_name": "a.png", "text": "\\u0000"}\n')  # fmt: skip
    png(place / "sub/k.png")
    (place / "sub/metadata.csv").write_text("target_file_name,prompt\nk.png,x\n")
    rows, facts = listed(place)
    assert {name[0]: row["refused"].partition(") ")[2] for name, row in rows.items() if name[1:] == ".png"
            and row["refused"]} == {
        "a": "is not UTF-8; save it as UTF-8, or remove it",
        "b": "holds NULs, as text in UTF-16 does; save it as UTF-8, or remove it",
        "c": "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); mend it, or"
             " remove it",
        "d": "must be text, not int; mend it, or remove it",
        "e": "cannot be read (has 2,097,152 bytes, more than the 1,048,576 that a caption may have; is it the right"
             " file?); mend it, or remove it",
        "f": "has half of a surrogate pair in it; mend it, or remove it",
        "g": "holds NULs, as text in UTF-16 does; save it as UTF-8, or remove it",
        "h": rows["h.png"]["refused"].partition(") ")[2],
    }  # fmt: skip
    assert "is not JSON" in rows["h.png"]["refused"] and rows["i.png"]["caption"] == "i"
    reasons = passed_by(rows)
    assert set(reasons) == {*(f"metadata.jsonl:{line}" for line in (2, 3, 4, 5, 6)), "sub/metadata.csv"}
    assert "twice with other words" in reasons["metadata.jsonl:2"] and "must be text" in reasons["metadata.jsonl:3"]
    assert "none of the columns caption, text, prompt" in reasons["metadata.jsonl:5"]
    assert reasons["sub/metadata.csv"].startswith("not read for captions: no column 'file_name'")
    assert facts["counts"] == {"captions_given": 1} and str(tmp_path) not in str(rows)


def test_pictures_of_tars_are_known_by_content_and_captioned_from_beside(tmp_path: Path) -> None:
    place, picture = tmp_path / "in", png(tmp_path / "p.png").read_bytes()
    place.mkdir()
    members = {"a.dat": picture, "a.json": b'{"caption": "by json"}', "b.jpg": picture, "b.txt": b"\xe2\x80\x8b",
               "b.caption": b"by caption", "c.jxl": JXL, "d.hif": b"none", "e.cls": b"7", f"{NFD}.png": picture,
               f"{NFC}.txt": b"form", "g.png": picture, "g.caption": bytes((1 << 20) + 1)}  # fmt: skip
    with tarfile.open(place / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    rows, facts = listed(place)
    found = {name.removeprefix("t.tar/"): row["caption"] for name, row in rows.items() if not row["refused"]}
    assert found == {"a.dat": "by json", "b.jpg": "by caption", f"{NFD}.png": "form"}
    assert set(passed_by(rows)) == {"t.tar/c.jxl", "t.tar/d.hif"}
    assert "has 1,048,577 bytes, more than the 1,048,576 of a caption" in rows["t.tar/g.png"]["refused"]
    assert facts["ignored"] == {"JPEG XL pictures": 1, "unknown pictures": 1, ".cls": 1}


def test_what_is_too_large_for_a_picture_is_not_read(tmp_path: Path) -> None:
    place, size = tmp_path / "in", LIMITS["picture"] + 1
    place.mkdir()
    with (place / "a.png").open("wb") as file:
        file.truncate(60 << 30)
    with (place / "t.tar").open("wb") as file:  # a header and no more, on a disk that knows holes
        member = tarfile.TarInfo("b.png")
        member.size = size
        file.write(member.tobuf())
        file.truncate(512 + (size + 511) // 512 * 512 + 1024)
    rows, _ = listed(place)
    for name in ("a.png", "t.tar/b.png"):
        with pytest.raises(
            InputError, match=rf"^{name}: cannot be read \(has [0-9,]+ bytes, more than the 536,870,912"
        ):
            Reader({"it": place}).read(rows[name])
