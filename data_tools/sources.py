"""Where pictures lie: folders, plain tars, Parquet files and data sets of the Hub, as one list of rows.

In: places. Out: for each picture the place's label, a name in it, where its bytes are, and a caption that somebody has
already written (data_tools.captions); what is passed by and may be a picture or a folder is a row too, refused by
`list`, and the rest is counted. Pictures stay where they are; nothing is decoded here.

Source and name are one row's alone. Folders: data_tools.walk; tars: data_tools.members; Parquet: data_tools.cells.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from data_tools.captions import caption_of
from data_tools.cells import list_cells, read_cell
from data_tools.members import list_members
from data_tools.names import CAPTION_TABLES, SIDECARS, from_letters, in_letters, kind_of, reason_of
from data_tools.output import CALLED_PICTURES, fingerprint
from data_tools.stages import Table, scratch_folder, write_shard
from data_tools.walk import CONTAINERS, File, Found, Links, Passed, Walk
from ztrain.errors import InputError
from ztrain.images import READ
from ztrain.io.files import LIMITS, check_regular, expand, read_bytes

LISTING = pa.schema(
    [
        ("source", pa.string()),  # label of the place
        ("name", pa.string()),  # in it, unique, in letters: path, then member, or column and row
        ("part", pa.string()),  # file that the bytes are in, in letters
        ("offset", pa.int64()),  # of the first byte, or the row; -1: the file is the picture
        ("bytes", pa.int64()),  # length; -1 for a row
        ("column", pa.string()),  # of a row
        ("caption", pa.string()),
        ("caption_from", pa.string()),  # who says so: "sidecar KIND", "metadata.csv", or "column NAME"
        ("refused", pa.string()),  # why it cannot be used; null where it can
        ("refused_by", pa.string()),  # LISTED for what is passed by
    ]
)
LISTED = "list"
"""Who refuses what a listing passes by: it counts as no picture."""

_HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_LARGEST_SHARD = 4  # times the wanted one


def resolve(places: Iterable[str], folder: Path) -> dict[str, Path]:
    """Label -> folder or file of each place; `folder`: what relative ones are relative to. Raises InputError.

    `hub:owner/name@revision` is downloaded, or found where an earlier download lies.
    """
    roots: dict[str, Path] = {}
    for place in places:
        if match := _HUB.fullmatch(place):
            root, label = _download(match["id"], match["revision"]), match["id"].replace("/", "--")
        else:
            root, label = _local(folder / expand(place))
        unique, number = label, 2
        while unique in roots:
            unique, number = f"{label}-{number}", number + 1
        roots[unique] = root
    return roots


def _local(root: Path) -> tuple[Path, str]:
    """The place, and its own name. Raises InputError."""
    try:
        label = in_letters(root.resolve(strict=True).name)
    except FileNotFoundError as error:
        raise InputError(f"{root}: no such folder, tar or Parquet file; correct sources") from error
    except (OSError, RuntimeError, ValueError) as error:  # a path with a NUL in it, too long, in a circle of links
        raise InputError(f"{str(root)!r}: cannot be a place ({reason_of(error, root)}); correct sources") from error
    return root, label


def _download(location: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    kinds = [f"*{ending}" for extension in (*CALLED_PICTURES, *SIDECARS, *CAPTION_TABLES, *CONTAINERS)
             for ending in (extension, extension.upper())]  # fmt: skip
    try:
        return Path(snapshot_download(location, repo_type="dataset", revision=revision, allow_patterns=kinds))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"hub:{location}: cannot be had ({reason}); check id, revision, network and login") from error


def list_sources(
    places: Iterable[str], out: Path, folder: Path, rows_per_shard: int = 512, links: Links = "inside"
) -> Table:
    """The pictures of all places, as `list_pictures` lists them. Raises InputError where there is none."""
    if rows_per_shard < 1:
        raise InputError(f"rows_per_shard {rows_per_shard} must be at least 1")
    roots = resolve(map(expand, places), folder)
    listing = list_pictures(roots, out, rows_per_shard, links)
    if not listing.shards or listing.read(["refused_by"])["refused_by"].null_count == 0:
        kinds = ", ".join((*sorted(READ), *CONTAINERS))
        told = f"; ignored: {said}" if (said := passed_by(listing)) else ""
        raise InputError(f"{', '.join(roots)}: no picture there; these are read: {kinds}{told}")
    return listing


def passed_by(table: Table) -> str:
    """What the listing has passed by, by kind; empty for nothing."""
    return ", ".join(f"{number} {kind}" for kind, number in Counter(table.facts["ignored"]).most_common())


def list_pictures(roots: Mapping[str, Path], out: Path, rows_per_shard: int, links: Links = "inside") -> Table:
    """The pictures below `roots` as a table in `out`; facts: {"ignored": {kind: count}, "counts": of captions}.

    links: which links are followed (data_tools.walk). Where a shard ends is decided by names alone, so that a picture
    more changes one shard, not all that follow. Raises InputError where `out` lies inside a place, whose next listing
    would find it.
    """
    for root in roots.values():
        if root.resolve() in (place := out.resolve(), *place.parents):
            raise InputError(f"{out}: lies inside {root}, which is searched for pictures; choose another --out")
    found, shards = Found(), []
    with scratch_folder(out) as scratch:
        for rows, stamps in _chunks(_walk_all(roots, found, links), rows_per_shard):
            shard = fingerprint([list(row.values()) for row in rows], stamps)
            if not (path := out / f"{shard}.parquet").exists():
                write_shard(pa.Table.from_pylist(rows, LISTING), path, scratch)
            shards.append(shard)
    facts = {name: {what: count for what, count in sorted(counts.items()) if count}
             for name, counts in (("ignored", found.ignored), ("counts", found.counts))}  # fmt: skip
    table = Table(out, tuple(dict.fromkeys(shards)), roots, facts)
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


def _walk_all(roots: Mapping[str, Path], found: Found, links: Links) -> _Listed:
    walk = Walk(roots.values(), found, links)
    for label, root in roots.items():
        for each in walk.files(root):
            for row, stamp in [(_passed(each), "")] if isinstance(each, Passed) else _list_file(each, found):
                yield {name: None for name in LISTING.names} | {"source": label, **row}, stamp


def _passed(each: Passed) -> _Row:
    return {"name": each.name, "part": each.name, "refused": each.reason, "refused_by": LISTED}


def _list_file(file: File, found: Found) -> _Listed:
    name = in_letters(file.name)
    lister = {"": _list_picture, ".tar": _list_tar, ".parquet": _list_parquet}[file.kind]
    try:
        now = file.path.stat()
        check_regular(file.path)  # a pipe would be waited for
        # Not ctime, which changes when data_tools.pack links the picture; Reader.read_same sees what escapes this.
        stamp = f"{now.st_size}-{now.st_mtime_ns}"
        yield from (({"name": name, "part": name, **row}, stamp) for row in lister(file, name, found))
    except (OSError, InputError) as error:
        yield {"name": name, "part": name, "refused": f"cannot be read ({reason_of(error, file.path)})"}, ""


def _list_picture(file: File, name: str, found: Found) -> Iterator[_Row]:
    texts = [(f"sidecar {kind_of(path.name)}", _sidecar(path)) for path in file.texts]
    yield {"offset": -1, "bytes": file.path.stat().st_size, **caption_of(texts, file.rows, found.counts)}


def _sidecar(path: Path) -> bytes | InputError:
    try:
        return read_bytes(path, "json" if kind_of(path.name) == ".json" else "caption")
    except (InputError, OSError) as error:
        return InputError(f"cannot be read ({reason_of(error, path)}); mend it")


def _list_tar(file: File, name: str, found: Found) -> Iterator[_Row]:
    for member in list_members(file.path, found.ignored):
        row: _Row = {"name": f"{name}/{member.name}"}
        if member.fault:
            yield row | {"refused": member.fault, "refused_by": LISTED if member.is_passed else None}
        else:
            said = caption_of(member.texts, (), found.counts)
            yield row | {"offset": member.offset, "bytes": member.size} | said


def _list_parquet(file: File, name: str, found: Found) -> Iterator[_Row]:
    for cell in list_cells(file.path, found.ignored):
        row: _Row = {"name": f"{name}/{in_letters(cell.name)}", "offset": cell.row, "bytes": -1, "column": cell.column}
        texts = [(f"column {cell.told}", cell.caption)] if cell.caption else []
        yield row | caption_of(texts, (), found.counts)


def _too_large(size: int) -> str:
    return f"has {size:,} bytes, more than the {LIMITS['picture']:,} that a picture may have"


def _checked(data: bytes) -> bytes:
    if len(data) > LIMITS["picture"]:
        raise OSError(_too_large(len(data)))
    return data


class Reader:
    """The bytes of listed pictures. Picklable."""

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self.roots = dict(roots)

    def read(self, row: Mapping[str, Any]) -> bytes:
        """Raises InputError, starting with the picture's name."""
        path = self.path(row)
        try:
            check_regular(path)
            if row["column"] is not None:
                return _checked(read_cell(path, int(row["offset"]), row["column"]))
            if row["offset"] < 0:
                return read_bytes(path, "picture")
            if row["bytes"] > LIMITS["picture"]:
                raise OSError(_too_large(row["bytes"]))
            with path.open("rb") as file:
                file.seek(int(row["offset"]))
                return file.read(int(row["bytes"]))
        except (OSError, InputError, pa.ArrowException) as error:
            raise InputError(f"{row['name']}: cannot be read ({reason_of(error, path)})") from error

    def path(self, row: Mapping[str, Any]) -> Path:
        """The file that holds them."""
        root = self.roots[row["source"]]
        return root / from_letters(row["part"]) if root.is_dir() else root

    def read_same(self, row: Mapping[str, Any]) -> bytes:
        """As `read`, of a scanned picture: raises InputError too where its bytes are others than then."""
        data = self.read(row)
        if xxhash.xxh3_128_hexdigest(data) != row["digest"]:
            raise InputError(
                f"{row['name']}: has changed since it was scanned; scan again, and where that finds nothing new because"
                " size and time are what they were, delete the table's folder and scan again"
            )
        return data
