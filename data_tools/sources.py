"""Where pictures lie: folders, plain tars, Parquet files and data sets of the Hub, as one list of rows.

In: places. Out: for each picture the place's label, a name in it, where its bytes are, and a caption that somebody has
already written (a .txt beside it, a column). Pictures stay where they are; nothing is decoded here.

Source and name are one row's alone. Tars: data_tools.members; Parquet files: data_tools.cells.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from data_tools.cells import list_cells, read_cell
from data_tools.members import list_members
from data_tools.names import SIDECAR, kind_of, kind_said, printable, reason_of, stem_of, texts_by_stem
from data_tools.output import EXTENSIONS, fingerprint
from data_tools.stages import Table, scratch_folder, write_shard
from ztrain.errors import InputError

LISTING = pa.schema(
    [
        ("source", pa.string()),  # label of the place
        ("name", pa.string()),  # in it, unique: path, then member, or column and row
        ("part", pa.string()),  # file that the bytes are in
        ("offset", pa.int64()),  # of the first byte, or the row; -1: the file is the picture
        ("bytes", pa.int64()),  # length; -1 for a row
        ("column", pa.string()),  # of a row
        ("caption", pa.string()),
        ("caption_from", pa.string()),  # who says so: "sidecar", or "column NAME"
        ("refused", pa.string()),  # why it cannot be used; null where it can
    ]
)
_HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_LARGEST_SHARD = 4  # times the wanted one


@dataclass(slots=True)
class Found:
    """What a listing counts while it goes on."""

    ignored: Counter[str] = field(default_factory=Counter)
    """Files, members and columns that are no input, by kind: hidden, an extension, or what they are."""


def resolve(places: Iterable[str], folder: Path) -> dict[str, Path]:
    """Label -> folder or file of each place; `folder`: what relative ones are relative to. Raises InputError.

    `hub:owner/name@revision` is downloaded, or found where an earlier download lies.
    """
    roots: dict[str, Path] = {}
    for place in places:
        if match := _HUB.fullmatch(place):
            root, label = _download(match["id"], match["revision"]), match["id"].replace("/", "--")
        else:
            root, label = _local(folder / place)
        unique, number = label, 2
        while unique in roots:
            unique, number = f"{label}-{number}", number + 1
        roots[unique] = root
    return roots


def _local(root: Path) -> tuple[Path, str]:
    """The place, and its own name. Raises InputError."""
    try:
        label = root.resolve(strict=True).name
        label.encode()
    except FileNotFoundError as error:
        raise InputError(f"{root}: no such folder, tar or Parquet file; correct sources") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{os.fsencode(root)!r}: its name is not UTF-8; rename it") from error
    except (OSError, RuntimeError, ValueError) as error:  # a path with a NUL in it, too long, in a circle of links
        raise InputError(f"{str(root)!r}: cannot be a place ({reason_of(error, root)}); correct sources") from error
    return root, label


def _download(location: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    kinds = [f"*{ending}" for extension in (*EXTENSIONS, ".txt", ".tar", ".parquet")
             for ending in (extension, extension.upper())]  # fmt: skip
    try:
        return Path(snapshot_download(location, repo_type="dataset", revision=revision, allow_patterns=kinds))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"hub:{location}: cannot be had ({reason}); check id, revision, network and login") from error


def list_pictures(roots: Mapping[str, Path], out: Path, rows_per_shard: int) -> Table:
    """The pictures below `roots` as a table in `out`; facts: {"ignored": {kind: count}}.

    Hidden files and folders are ignored, and files of other kinds; links to folders are not followed. Where a shard
    ends is decided by names alone, so that a picture more changes one shard, not all that follow. Raises
    InputError where `out` lies inside a place, whose next listing would find it.
    """
    for root in roots.values():
        if root.resolve() in (place := out.resolve(), *place.parents):
            raise InputError(f"{out}: lies inside {root}, which is searched for pictures; choose another --out")
    found, shards = Found(), []
    with scratch_folder(out) as scratch:
        for rows, stamps in _chunks(_walk_all(roots, found), rows_per_shard):
            shard = fingerprint([list(row.values()) for row in rows], stamps)
            if not (path := out / f"{shard}.parquet").exists():
                write_shard(pa.Table.from_pylist(rows, LISTING), path, scratch)
            shards.append(shard)
    table = Table(out, tuple(dict.fromkeys(shards)), roots, {"ignored": dict(sorted(found.ignored.items()))})
    table.close()
    return table


_Row = dict[str, Any]
_Listed = Iterator[tuple[_Row, str]]  # with the stamp of what holds its bytes


@dataclass(frozen=True, slots=True)
class _File:
    """A file below a place."""

    path: Path
    name: str
    """In the place."""
    caption: Path | None
    """Sidecar, where there is one."""


def _chunks(listed: _Listed, rows_per_shard: int) -> Iterator[tuple[list[_Row], list[str]]]:
    rows: list[_Row] = []
    stamps: list[str] = []
    for row, stamp in listed:
        rows.append(row)
        stamps.append(stamp)
        is_end = xxhash.xxh3_64_intdigest(row["name"].encode()) % rows_per_shard == 0
        if is_end or len(rows) == _LARGEST_SHARD * rows_per_shard:
            yield rows, stamps
            rows, stamps = [], []
    if rows:
        yield rows, stamps


def _walk_all(roots: Mapping[str, Path], found: Found) -> _Listed:
    for label, root in roots.items():
        for file in _walk(root, "", found) if root.is_dir() else [_single(root)]:
            for row, stamp in _list_file(file, found):
                yield {name: None for name in LISTING.names} | {"source": label, **row}, stamp


def _walk(folder: Path, prefix: str, found: Found) -> Iterator[_File]:
    """Files in order of their names, without sidecars. Raises InputError."""
    entries = _entries(folder)
    folders = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    beside = _sidecars(folder, (entry.name for entry in entries if entry.name not in folders))
    used = set(beside.values())
    for entry in entries:
        if entry.name.startswith("."):
            found.ignored["hidden"] += 1
        elif entry.name in folders:
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", found)
        elif entry.name not in used:
            text = beside.get(entry.name)
            yield _File(Path(entry.path), prefix + entry.name, folder / text if text else None)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot read the folder ({error.strerror}); give access to it") from error


def _single(root: Path) -> _File:
    text = _sidecars(root.parent, (entry.name for entry in _entries(root.parent))).get(root.name)
    return _File(root, root.name, root.with_name(text) if text else None)


def _sidecars(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name of a picture -> name of the text beside it."""
    shown = [name for name in names if not name.startswith(".")]
    files = [name for name in shown if kind_of(name) != SIDECAR or os.path.isfile(folder / name)]
    texts = texts_by_stem(files)
    return {name: texts[stem] for name in files if kind_of(name) in EXTENSIONS and (stem := stem_of(name)) in texts}


def _list_file(file: _File, found: Found) -> _Listed:
    lister = _LISTERS.get(kind_of(file.name))
    if lister is None:
        found.ignored[kind_said(file.name)] += 1
        return
    name = printable(file.name)
    if name != file.name:
        root = str(file.path)[: -len(file.name)]
        name += "#1" if os.path.lexists(root + name) else ""  # another file has the escaped name for its own
        yield {"name": name, "part": name, "refused": "its name is not UTF-8; rename it"}, ""
        return
    try:
        now = file.path.stat()
        if not stat.S_ISREG(now.st_mode):  # a pipe would be waited for
            raise OSError(_NO_FILE)
        # Not ctime, which changes when data_tools.pack links the picture; Reader.read_same sees what escapes this.
        stamp = f"{now.st_size}-{now.st_mtime_ns}"
        yield from ((row, stamp) for row in lister(file, found))
    except OSError as error:
        yield {"name": name, "part": name, "refused": f"cannot be read ({reason_of(error, file.path)})"}, ""


_NO_FILE = "is no file, but a pipe, a socket, a device or a link to a folder"


def _list_picture(file: _File, _: Found) -> Iterator[_Row]:
    row: _Row = {"name": file.name, "part": file.name, "offset": -1, "bytes": file.path.stat().st_size}
    yield row | (_caption(file.caption.read_bytes(), "sidecar") if file.caption else {})


def _caption(raw: bytes, whose: str) -> _Row:
    try:
        text = " ".join(raw.decode("utf-8-sig").split())
    except UnicodeDecodeError:
        return {"refused": f"its caption ({whose}) is not UTF-8; save it as UTF-8, or remove it"}
    return {"caption": text, "caption_from": whose} if text else {}


def _list_tar(file: _File, found: Found) -> Iterator[_Row]:
    try:
        for member in list_members(file.path, found.ignored):
            row: _Row = {"name": f"{file.name}/{member.name}", "part": file.name}
            if member.fault:
                yield row | {"refused": member.fault}
                continue
            said = _caption(member.caption, "sidecar") if member.caption else {}
            yield row | {"offset": member.offset, "bytes": member.size} | said
    except InputError as error:
        yield {"name": file.name, "part": file.name, "refused": str(error).removeprefix(f"{file.path}: ")}


def _list_parquet(file: _File, found: Found) -> Iterator[_Row]:
    try:
        for cell in list_cells(file.path, found.ignored):
            row: _Row = {"name": f"{file.name}/{cell.name}", "part": file.name, "offset": cell.row, "bytes": -1}
            said = _caption(cell.caption, f"column {cell.told}") if cell.caption else {}
            yield row | {"column": cell.column} | said
    except InputError as error:
        yield {"name": file.name, "part": file.name, "refused": str(error).removeprefix(f"{file.path}: ")}


_LISTERS = dict.fromkeys(EXTENSIONS, _list_picture) | {".tar": _list_tar, ".parquet": _list_parquet}
KINDS = frozenset(_LISTERS)
"""Extensions that are looked into, in small letters."""


class Reader:
    """The bytes of listed pictures. Picklable."""

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self.roots = dict(roots)

    def read(self, row: Mapping[str, Any]) -> bytes:
        """Raises InputError, starting with the picture's name."""
        path = self.path(row)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise OSError(_NO_FILE)
            if row["column"] is not None:
                return read_cell(path, int(row["offset"]), row["column"])
            with path.open("rb") as file:
                if row["offset"] < 0:
                    return file.read()
                file.seek(int(row["offset"]))
                return file.read(int(row["bytes"]))
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{row['name']}: cannot be read ({reason_of(error, path)})") from error

    def path(self, row: Mapping[str, Any]) -> Path:
        """The file that holds them."""
        root = self.roots[row["source"]]
        return root / row["part"] if root.is_dir() else root

    def read_same(self, row: Mapping[str, Any]) -> bytes:
        """As `read`, of a scanned picture: raises InputError too where its bytes are others than then."""
        data = self.read(row)
        if xxhash.xxh3_128_hexdigest(data) != row["digest"]:
            raise InputError(
                f"{row['name']}: has changed since it was scanned; scan again, and where that finds nothing new because"
                " size and time are what they were, delete the table's folder and scan again"
            )
        return data
