"""Where pictures lie: folders, plain tars, Parquet files and data sets of the Hub, as one list of rows.

In: places. Out: for each picture the place's label, a name in it, where its bytes are, and a caption that somebody has
already written (a .txt beside it, a column). Pictures stay where they are; nothing is decoded here.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_tools.output import EXTENSIONS, fingerprint
from data_tools.stages import Table, scratch_folder, write_shard
from ztrain.errors import InputError
from ztrain.tars import Archive, index_tar

LISTING = pa.schema(
    [
        ("source", pa.string()),  # label of the place
        ("name", pa.string()),  # in it: path, then member or row
        ("part", pa.string()),  # file that the bytes are in
        ("offset", pa.int64()),  # of the first byte, or the row; -1: the file is the picture
        ("bytes", pa.int64()),  # length; -1 for a row
        ("column", pa.string()),  # of a row
        ("caption", pa.string()),
        ("caption_from", pa.string()),  # who says so: "sidecar", or "column NAME"
        ("refused", pa.string()),  # why it cannot be used; null where it can
    ]
)
CAPTION_COLUMNS = ("caption", "text", "prompt")
"""Of Parquet files and the Hub: the first that is there is taken for the caption."""
_HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_LARGEST_SHARD = 4  # times the wanted one


@dataclass(slots=True)
class Found:
    """What a listing counts while it goes on."""

    ignored: Counter[str] = field(default_factory=Counter)
    """Files that are no input, by kind: hidden, or an extension."""


def resolve(places: Iterable[str], folder: Path) -> dict[str, Path]:
    """Label -> folder or file of each place; `folder`: what relative ones are relative to. Raises InputError.

    `hub:owner/name@revision` is downloaded, or found where an earlier download lies.
    """
    roots: dict[str, Path] = {}
    for place in places:
        if match := _HUB.fullmatch(place):
            root, label = _download(match["id"], match["revision"]), match["id"].replace("/", "--")
        else:
            root = folder / place
            label = root.resolve().name
            if not root.exists():
                raise InputError(f"{root}: no such folder, tar or Parquet file; correct sources")
        unique, number = label, 2
        while unique in roots:
            unique, number = f"{label}-{number}", number + 1
        roots[unique] = root
    return roots


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
        files = _walk(root, "", found) if root.is_dir() else [(root, root.name)]
        for path, name in files:
            for row, stamp in _list_file(path, name, found):
                yield {name: None for name in LISTING.names} | {"source": label, **row}, stamp


def _walk(folder: Path, prefix: str, found: Found) -> Iterator[tuple[Path, str]]:
    """Files in order of their names, and what they are called below the root. Raises InputError."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot read the folder ({error.strerror}); give access to it") from error
    for entry in entries:
        if entry.name.startswith("."):
            found.ignored["hidden"] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", found)
        else:
            yield Path(entry.path), prefix + entry.name


def _list_file(path: Path, name: str, found: Found) -> _Listed:
    kind = path.suffix.lower()
    lister = _LISTERS.get(kind)
    if lister is None:
        if kind != ".txt" or not _is_sidecar(path):
            found.ignored[kind or "no extension"] += 1
        return
    try:
        name.encode()
    except UnicodeEncodeError:
        printable = os.fsencode(name).decode(errors="backslashreplace")
        yield {"name": printable, "part": printable, "refused": "its name is not UTF-8; rename it"}, ""
        return
    try:
        now = path.stat()
        # Not ctime, which changes when data_tools.pack links the picture; Reader.read_same sees what escapes this.
        stamp = f"{now.st_size}-{now.st_mtime_ns}"
        yield from ((row, stamp) for row in lister(path, name))
    except OSError as error:
        yield {"name": name, "part": name, "refused": f"cannot be read ({error.strerror or error})"}, ""


def _is_sidecar(path: Path) -> bool:
    """Whether a .txt lies beside a picture of its name."""
    return any(path.with_suffix(extension).exists() for extension in EXTENSIONS)


def _list_picture(path: Path, name: str) -> Iterator[_Row]:
    row: _Row = {"name": name, "part": name, "offset": -1, "bytes": path.stat().st_size}
    beside = path.with_suffix(".txt")
    if beside.is_file():
        row |= _caption(beside.read_bytes(), "sidecar")
    yield row


def _caption(raw: bytes, whose: str) -> _Row:
    try:
        text = " ".join(raw.decode("utf-8-sig").split())
    except UnicodeDecodeError:
        return {"refused": "its caption (.txt) is not UTF-8; save it as UTF-8, or remove it"}
    return {"caption": text, "caption_from": whose} if text else {}


def _list_tar(path: Path, name: str) -> Iterator[_Row]:
    try:
        archive = index_tar(path)
    except InputError as error:
        yield {"name": name, "part": name, "refused": str(error).removeprefix(f"{path}: ")}
        return
    for _, members in archive.samples:
        yield from _list_members(archive, members, name)
    if archive.damage:
        yield {"name": name, "part": name, "refused": f"{archive.damage}; what stands behind is lost"}


def _list_members(archive: Archive, members: list[Any], name: str) -> Iterator[_Row]:
    """Pictures among the members with one key; a caption is the member `<key>.txt`."""
    captions = [member for member in members if member.name.lower().endswith(".txt") and member.isreg()]
    caption: _Row = {}
    if captions:
        with archive.path.open("rb") as file:
            file.seek(captions[0].offset_data)
            caption = _caption(file.read(captions[0].size), "sidecar")
    for member in members:
        if os.path.splitext(member.name)[1].lower() not in EXTENSIONS or not member.isreg():
            continue
        inside = member.name.encode(errors="backslashreplace").decode()
        place = {"name": f"{name}/{inside}", "part": name, "offset": member.offset_data, "bytes": member.size}
        yield place | caption


def _list_parquet(path: Path, name: str) -> Iterator[_Row]:
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        yield {"name": name, "part": name, "refused": f"not a readable Parquet file ({str(error).splitlines()[0]})"}
        return
    pictures = [known.name for known in schema if _is_picture(known.type)]
    if not pictures:
        yield {"name": name, "part": name, "refused": "has no column of pictures (datasets.Image, or bytes)"}
        return
    told = next((column for column in CAPTION_COLUMNS if column in schema.names), None)
    captions = (value for batch in file.iter_batches(columns=[told] if told else [])
                for value in (batch.column(0).to_pylist() if told else [None] * batch.num_rows))  # fmt: skip
    for number in range(file.metadata.num_rows):
        text = next(captions, None) if told else None
        said = _caption(str(text).encode(), f"column {told}") if text else {}
        for column in pictures:
            place = {"name": f"{name}/{number}/{column}", "part": name, "offset": number, "bytes": -1, "column": column}
            yield place | said


def _is_picture(kind: pa.DataType) -> bool:
    """`datasets.Image`, or plain bytes."""
    if pa.types.is_struct(kind):
        return {part.name for part in kind} == {"bytes", "path"}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


_LISTERS = dict.fromkeys(EXTENSIONS, _list_picture) | {".tar": _list_tar, ".parquet": _list_parquet}
KINDS = frozenset(_LISTERS)
"""Extensions that are looked into, in small letters."""


class Reader:
    """The bytes of listed pictures. Picklable; keeps the last row group of a Parquet file."""

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self.roots = dict(roots)

    def read(self, row: Mapping[str, Any]) -> bytes:
        """Raises InputError, starting with the picture's name."""
        path = self.path(row)
        try:
            if row["column"] is not None:
                return _read_cell(path, int(row["offset"]), row["column"])
            with path.open("rb") as file:
                if row["offset"] < 0:
                    return file.read()
                file.seek(int(row["offset"]))
                return file.read(int(row["bytes"]))
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{row['name']}: cannot be read ({str(error).splitlines()[0]})") from error

    def path(self, row: Mapping[str, Any]) -> Path:
        """The file that holds them."""
        root = self.roots[row["source"]]
        return root / row["part"] if root.is_dir() else root

    def read_same(self, row: Mapping[str, Any]) -> bytes:
        """As `read`, of a scanned picture: raises InputError too where its bytes are others than then."""
        data = self.read(row)
        if xxhash.xxh3_128_hexdigest(data) != row["digest"]:
            raise InputError(f"{row['name']}: has changed since it was scanned; run data_tools.scan again")
        return data


def _read_cell(path: Path, number: int, column: str) -> bytes:
    group, start = 0, 0
    sizes = _group_sizes(path)
    while number >= start + sizes[group]:
        start += sizes[group]
        group += 1
    cell = _read_group(path, group, column)[number - start].as_py()
    data = cell["bytes"] if isinstance(cell, dict) else cell
    if data is None:
        raise OSError("the cell holds no bytes")
    return bytes(data)


@lru_cache(maxsize=64)
def _group_sizes(path: Path) -> tuple[int, ...]:
    metadata = pq.read_metadata(path)
    return tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


@lru_cache(maxsize=1)
def _read_group(path: Path, group: int, column: str) -> Any:
    return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(0)
