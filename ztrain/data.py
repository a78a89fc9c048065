"""Triplets wherever they lie: image folders, WebDataset tars, Parquet tables and data sets of the Hub.

In: a location and the name of a split. Out: a `Listing`: rows whose pictures have been found but not opened, and one
sentence for every row that cannot be used. Nothing is extracted, unpickled or run, and no name in a file becomes a path
outside its folder.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO

from ztrain.errors import InputError
from ztrain.images import Picture, PictureFile, stamp_of

if TYPE_CHECKING:
    import datasets

MANIFEST_NAME = "metadata.jsonl"
"""The name that `datasets` gives the table of an image folder, so that the same folder loads there too."""

PACK_REPORT_NAME = "pack_report.json"
"""Lies beside shards of data_tools.pack and says how many samples each of them had: what a damaged one has lost."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # key and field of a member, as WebDataset splits its name
_META = re.compile(r"__[^/]*__(/|$)")
_TARGET = re.compile(r"target\.[^.]+")
_REFERENCE = re.compile(r"reference(?:\.(\d+))?\.[^.]+")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_BLOCK = 512  # bytes, of a tar
# What tarfile raises on odd headers, found by flipping bytes.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Triplet:
    """One row: make `target` from `prompt` in the look of `references`."""

    index: int
    """Position among the usable rows of the split, from 0."""
    where: str
    """What messages call the row: file and line, archive and key, or number and table."""
    prompt: str
    """Not empty, without white space around it."""
    references: tuple[Picture, ...]
    """At least one; none where rows were read as text only."""
    target: Picture
    columns: dict[str, object]
    """The row's further keys as the file gave them, for example style and content."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The rows of one split in order."""

    triplets: list[Triplet]
    rejected: list[str]
    """One sentence, naming it, for each row or sample that cannot be used."""


@dataclass(frozen=True, slots=True)
class TarPicture:
    """A picture inside a plain tar."""

    path: Path
    offset: int
    """Of its first byte in the archive."""
    size: int
    """In bytes."""
    member: str
    state: str
    """Stamp of the archive when it was listed; another archive under this name is not read."""

    @property
    def name(self) -> str:
        return f"{self.path}: {self.member}"

    @property
    def stamp(self) -> str:
        return f"{self.state}-{self.offset}-{self.size}"

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            if stamp_of(os.fstat(file.fileno())) != self.state:
                raise OSError("the archive has changed since it was listed; start again")
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class CellPicture:
    """A picture inside a table of `datasets`, read from its Arrow file by row."""

    table: "datasets.Dataset" = field(repr=False, compare=False)
    row: int
    column: str
    position: int | None
    """Place in the cell's list of pictures; None where the cell is one picture."""
    name: str
    state: str
    """Changes with the Arrow files and the choice of rows."""

    @property
    def stamp(self) -> str:
        return f"{self.state}-{self.row}-{self.column}-{self.position}"

    def read(self) -> bytes:
        cell = self.table.data.column(self.column)[self.row]
        data: bytes = (cell if self.position is None else cell[self.position])["bytes"].as_py()
        return data


_Row = Callable[[int], Triplet]  # makes the triplet with this index, or raises InputError


def read_triplets(
    location: str, split: str, revision: str | None = None, *, text_only: bool = False, max_bad_share: float = 0.0
) -> Listing:
    """The triplets of a split, in any layout that `location` has: told apart by what is there.

    - a folder with `<split>/metadata.jsonl`: rows of `prompt`, `target_file_name` and either `reference_file_name` or
      `reference_file_names`, each one name or a list of them, relative to the manifest;
    - WebDataset: plain tars `<split>-000000.tar`, ... or `<split>/*.tar`; a sample is `<key>.json` with the prompt,
      `<key>.target.<ext>` and `<key>.reference.<ext>` or `<key>.reference.0.<ext>`, ...;
    - Parquet: `data/<split>-00000-of-00001.parquet`, ... or the same without `data/`, with the columns `prompt`,
      `target` (Image) and `reference` or `references` (Image or list of Image);
    - otherwise the id of a Hub data set with those columns, at `revision` (branch, tag or commit).

    `text_only` reads prompts and targets and ignores references. Rows that cannot be used are `rejected`, up to
    `max_bad_share` (0..1) of all. Raises InputError beyond it, where no row is left, and for the layout as a whole.
    """
    place, rows = _find(location, split, revision, text_only)
    triplets: list[Triplet] = []
    rejected: list[str] = []
    for read in rows:
        try:
            triplets.append(read(len(triplets)))
        except InputError as error:
            rejected.append(str(error))
    total = len(triplets) + len(rejected)
    if not total:
        raise InputError(f"{place}: there are no rows; give it at least one triplet")
    if not triplets or len(rejected) / total > max_bad_share:
        raise InputError(
            f"{place}: {len(rejected)} of {total} triplets cannot be used (at most max_bad_share {max_bad_share:g} is "
            f"allowed): {'; '.join(rejected[:3])}"
        )
    return Listing(triplets, rejected)


def read_manifest(folder: Path, split: str) -> list[Triplet]:
    """All rows of a split, each of them usable; raises InputError as `read_triplets`."""
    return read_triplets(str(folder), split).triplets


def _find(location: str, split: str, revision: str | None, text_only: bool) -> tuple[str, Iterator[_Row]]:
    """What messages call the split, and its rows. Raises InputError where it is in no layout or in several."""
    root = Path(location)
    if not root.exists():
        if not _HUB_ID.fullmatch(location):
            raise InputError(f"{location}: no such folder, and not the id of a Hub data set (owner/name)")
        return f"{location}, split {split}", _hub_rows(location, split, revision, text_only)
    if revision is not None:
        raise InputError(f"{location}: a folder has no revision {revision!r}; leave revision out")
    if not re.fullmatch(r"[^/]*[^/.][^/]*", split):
        raise InputError(f"{location}: split {split!r} must be a plain name, without slashes")
    name = glob.escape(split)  # a digit after the hyphen, for train-extra is another split than train
    layouts: dict[str, Callable[..., Iterator[_Row]]] = {
        f"{name}/{MANIFEST_NAME}": _manifest_rows,
        f"{name}-[0-9]*.tar": _tar_rows,
        f"{name}/*.tar": _tar_rows,
        f"data/{name}-[0-9]*.parquet": _parquet_rows,
        f"{name}-[0-9]*.parquet": _parquet_rows,
    }
    found = {pattern: files for pattern in layouts if (files := sorted(root.glob(pattern)))}
    if len(found) > 1:
        raise InputError(f"{root}: holds split {split!r} several times, as {' and '.join(found)}; keep one of them")
    if not found:
        present = sorted(entry.name for entry in root.iterdir())[:8] if root.is_dir() else ["a file"]
        raise InputError(
            f"{root}: no split {split!r} there; expected one of {', '.join(layouts)}; found {_listed(present)}"
        )
    [(pattern, files)] = found.items()
    place = str(files[0]) if len(files) == 1 else str(root / pattern)
    return place, layouts[pattern](files, root, split, text_only)


# ---- rows, in every layout


def parse_object(raw: bytes, *, where: str) -> dict[str, Any]:
    """One JSON object, strictly: UTF-8, no key twice, no NaN. Raises InputError starting with `where`."""
    try:
        row = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
        if b"\\ud" in raw.lower():  # an escape may be half of a surrogate pair, which no file could hold
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a duplicate key, NaN, absurd nesting
        raise InputError(f"{where}: not a row of JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    return row


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict; ValueError where a key stands twice, as json would silently keep the last."""
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} stands twice in one object; keep one")
        result[key] = value
    return result


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON; write a number or null")


def take_text(row: dict[str, Any], key: str, *, where: str) -> str:
    """Take a string that says something out of the row, without white space around it. Raises InputError."""
    if key not in row:
        raise InputError(f"{where}: the key {key!r} is missing; the row has {_listed(row)}")
    return check_text(row.pop(key), key, where=where)


def check_text(value: object, key: str, *, where: str) -> str:
    """The string without white space around it. Raises InputError for other types and empty strings."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be text, not {value!r}")
    text = value.strip()
    if not text:
        raise InputError(f"{where}: {key} is empty; write it or drop the row")
    return text


def find_picture(folder: Path, name: str, *, where: str) -> PictureFile:
    """The existing file that a row names, inside `folder`. Raises InputError."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or PureWindowsPath(name).drive or ".." in pure.parts:
        raise InputError(f"{where}: {name!r} leaves the folder; give a path below {folder}")
    path = folder / pure
    if not os.path.isfile(path):  # unlike Path.is_file, also False for names too long for the file system
        raise InputError(f"{where}: the picture {name!r} is not in {folder}; restore it or drop the row")
    return PictureFile(path)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _refuse(sentence: str, index: int) -> Triplet:
    """A row that is known to be lost."""
    raise InputError(sentence)


# ---- folders


def _manifest_rows(files: list[Path], root: Path, split: str, text_only: bool) -> Iterator[_Row]:
    [path] = files
    try:
        lines = path.read_bytes().splitlines()  # of bytes: U+2028 inside a prompt is no line end
    except OSError as error:
        raise InputError(f"{path}: cannot read the manifest of split {split!r} ({error.strerror})") from error
    for number, raw in enumerate(lines, start=1):
        if raw.strip():
            yield partial(_read_line, raw, path.parent, f"{path}:{number}", text_only)


def _read_line(raw: bytes, folder: Path, where: str, text_only: bool, index: int) -> Triplet:
    row = parse_object(raw, where=where)
    names = _take_reference_names(row, text_only, where=where)
    target_name = take_text(row, "target_file_name", where=where)
    prompt = take_text(row, "prompt", where=where)
    return Triplet(
        index=index,
        where=where,
        prompt=prompt,
        references=tuple(find_picture(folder, name, where=where) for name in names),
        target=find_picture(folder, target_name, where=where),
        columns=row,  # the known keys have been taken out
    )


def _take_reference_names(row: dict[str, Any], text_only: bool, *, where: str) -> list[str]:
    """Take the names of the references out of the row, none if `text_only`. Raises InputError."""
    keys = ("reference_file_name", "reference_file_names")
    given = {key: value for key in keys if (value := row.pop(key, None)) is not None}
    if text_only:
        return []
    if not given:
        raise InputError(f"{where}: the key {keys[0]!r} is missing; the row has {_listed(row)}")
    if len(given) == 2:
        raise InputError(f"{where}: has both {keys[0]} and {keys[1]}; keep one")
    [(key, value)] = given.items()
    names = value if isinstance(value, list) else [value]
    if not names:
        raise InputError(f"{where}: {key} must hold at least one name")
    return [check_text(name, key, where=where) for name in names]


# ---- WebDataset tars


@dataclass(slots=True)
class _Archive:
    """What the headers of a tar say."""

    path: Path
    state: str
    samples: list[tuple[str, list[tarfile.TarInfo]]]
    """Key and members of each run of members with one key, which is a sample to WebDataset."""
    damage: str = ""
    """Why samples may be missing at the end; empty for a whole archive."""


def _tar_rows(files: list[Path], root: Path, split: str, text_only: bool) -> Iterator[_Row]:
    packed = _packed_samples(root, split)
    for path in files:
        archive = _index_tar(path)
        times = Counter(key for key, _ in archive.samples)
        for key, members in archive.samples:
            if times[key] == 1:
                yield partial(_read_sample, archive, key, members, text_only)
            else:
                fault = f"the key stands {times[key]} times; the members of a sample must lie side by side, and once"
                yield partial(_refuse, f"{path}: {_printable(key)}: {fault}")
        expected = packed.pop(path, None)
        if expected is None and archive.damage:
            yield partial(_refuse, f"{path}: {archive.damage}; how many samples it has lost is unknown; restore it")
        for number in range(len(archive.samples), expected or 0):
            reason = archive.damage or "the archive ends before it"
            yield partial(_refuse, f"{path}: sample {number + 1} of {expected} is lost: {reason}; restore the archive")
    for path, expected in packed.items():
        for number in range(expected):
            yield partial(_refuse, f"{path}: sample {number + 1} of {expected} is lost: the archive is missing")


def _packed_samples(root: Path, split: str) -> dict[Path, int]:
    """Archive -> number of samples that data_tools.pack put there; nothing for tars of others. Raises InputError."""
    path = root / PACK_REPORT_NAME
    if not path.exists():
        return {}
    try:
        shards = json.loads(path.read_bytes())["shards"].get(split, {})
        return {root / name: int(shard["samples"]) for name, shard in shards.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a report of data_tools.pack ({error}); restore it or remove it") from error


def _index_tar(path: Path) -> _Archive:
    """Reads the headers of a tar, to its end or as far as they can be trusted. Raises InputError."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            archive = _Archive(path, stamp_of(found), [])
            head, end = file.read(6), 0
            file.seek(0)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        if member.size < 0 or not end < tar.offset <= found.st_size:
                            raise tarfile.ReadError("the next member reaches backwards or beyond the end of the file")
                        end = tar.offset
                        _add_member(archive.samples, member)
                _check_end(file, end)
            except _TAR_ERRORS as error:
                if head.startswith(_COMPRESSED):
                    raise InputError(f"{path}: is compressed; random access needs a plain tar: unpack it") from error
                archive.damage = f"the archive is damaged at byte {end:,} ({error})"
                archive.samples = archive.samples[:-1]  # its last members may have stood behind the damage
    except OSError as error:
        raise InputError(f"{path}: cannot read the archive ({error.strerror or error})") from error
    return archive


def _add_member(samples: list[tuple[str, list[tarfile.TarInfo]]], member: tarfile.TarInfo) -> None:
    name = _MEMBER.fullmatch(member.name)
    if member.isdir() or not name or _META.match(member.name):  # WebDataset skips these too
        return
    if not samples or samples[-1][0] != name[1]:
        samples.append((name[1], []))
    samples[-1][1].append(member)


def _check_end(file: BinaryIO, offset: int) -> None:
    """Raises ReadError unless zeros, at least one block of them, fill the archive from `offset` on."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError("its end mark is missing, so it was cut short or never closed")
    while block:
        if block.count(0) < len(block):
            raise tarfile.ReadError("neither a member nor the end of the archive")
        block = file.read(1 << 20)


def _read_sample(archive: _Archive, key: str, members: list[tarfile.TarInfo], text_only: bool, index: int) -> Triplet:
    where = f"{archive.path}: {_printable(key)}"
    fields: dict[str, TarPicture] = {}
    for member in members:
        name = member.name[len(key) + 1 :].lower()
        if name in fields:
            raise InputError(f"{where}: the member {name!r} stands twice; keep one")
        if not member.isreg() or member.issparse():
            raise InputError(f"{where}: the member {name!r} is a link or sparse; store it as a plain file")
        printable = _printable(member.name)
        fields[name] = TarPicture(archive.path, member.offset_data, member.size, printable, archive.state)
    targets = [picture for name, picture in fields.items() if _TARGET.fullmatch(name)]
    if "json" not in fields or len(targets) != 1:
        raise InputError(f"{where}: needs one member 'json' and one 'target.<ext>'; it has {_listed(fields)}")
    try:
        row = parse_object(fields["json"].read(), where=where)
    except OSError as error:
        raise InputError(f"{where}: cannot read its JSON ({error.strerror or error})") from error
    prompt = take_text(row, "prompt", where=where)
    references = () if text_only else _tar_references(fields, where=where)
    return Triplet(index=index, where=where, prompt=prompt, references=references, target=targets[0], columns=row)


def _tar_references(fields: dict[str, TarPicture], *, where: str) -> tuple[Picture, ...]:
    """`reference.<ext>`, or `reference.0.<ext>`, `reference.1.<ext>`, ... without a gap. Raises InputError."""
    matches = [(match, picture) for name, picture in fields.items() if (match := _REFERENCE.fullmatch(name))]
    numbered = sorted((int(match[1] or 0), picture.offset, picture) for match, picture in matches)
    if not numbered or [number for number, _, _ in numbered] != list(range(len(numbered))):
        raise InputError(
            f"{where}: needs one member 'reference.<ext>', or 'reference.0.<ext>', 'reference.1.<ext>' and so on; "
            f"it has {_listed(fields)}"
        )
    return tuple(picture for _, _, picture in numbered)


def _printable(name: str) -> str:
    """A member's name with bytes that are no UTF-8 written as escapes."""
    return name.encode(errors="backslashreplace").decode()


# ---- Parquet and the Hub


@dataclass(frozen=True, slots=True)
class _Table:
    """A loaded table, what messages call it, and the folder that cells with only a path must point into."""

    data: "datasets.Dataset"
    place: str
    root: Path

    @property
    def state(self) -> str:
        """Changes with the Arrow files and the choice of rows."""
        stamps = [stamp_of(os.stat(file["filename"])) for file in self.data.cache_files]
        return hashlib.blake2b(" ".join([self.place, *stamps]).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class _Cell:
    """A picture in a row of a table."""

    column: str
    position: int | None
    has_bytes: bool
    path: str | None


def _parquet_rows(files: list[Path], root: Path, split: str, text_only: bool) -> Iterator[_Row]:
    import pyarrow.parquet

    filled = []  # `datasets` cannot load a file of no rows
    for path in files:
        try:
            filled += [path] * (pyarrow.parquet.read_metadata(path).num_rows > 0)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable Parquet file ({error}); restore it") from error
    if not filled:
        return
    # Without a name for their state `datasets` would find its cached copy by path and mtime only.
    states = " ".join(stamp_of(path.stat()) for path in filled)
    choice = {
        "path": "parquet",
        "name": hashlib.blake2b(states.encode(), digest_size=8).hexdigest(),
        "data_files": {"train": [glob.escape(str(path)) for path in filled]},
        "split": "train",
    }
    place = f"{root}, split {split}"
    data = _load_table(choice, f"{place}: cannot load the tables", "restore the files")
    yield from _table_rows(_Table(data, place, root), text_only)


def _hub_rows(location: str, split: str, revision: str | None, text_only: bool) -> Iterator[_Row]:
    from huggingface_hub import constants

    data = _load_table(
        {"path": location, "split": split, "revision": revision},
        f"{location}: there is no such folder, and split {split!r} does not come from the Hub",
        "correct the path, or check id, revision, split, network and login (hf auth login)",
    )
    # Where pictures that lie as files in the data set are downloaded to.
    root = Path(constants.HF_HUB_CACHE) / f"datasets--{location.replace('/', '--')}"
    yield from _table_rows(_Table(data, f"{location}, split {split}", root), text_only)


def _load_table(choice: dict[str, Any], fault: str, advice: str) -> "datasets.Dataset":
    """`datasets.load_dataset`, quietly. Raises InputError with the fault, the reason's first line and the advice."""
    import datasets

    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(**choice, keep_in_memory=False)  # in memory it would travel to every worker
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = str(cause or error).partition("\n")[0]
        raise InputError(f"{fault} ({reason}); {advice}") from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def _table_rows(table: _Table, text_only: bool) -> Iterator[_Row]:
    from datasets.features.features import require_decoding

    features = table.data.features
    names = [name for name in ("reference", "references") if name in features]
    if not {"prompt", "target"} <= set(features) or len(names) != 1 and not text_only:
        raise InputError(
            f"{table.place}: needs the columns 'prompt', 'target' and one of 'reference', 'references'; "
            f"it has {_listed(features)}"
        )
    pictures = [_cells(table, name) for name in ("target", *([] if text_only else names))]
    kept = [
        name
        for name, feature in features.items()
        if name not in ("target", *names) and not require_decoding(feature)  # further pictures would fill the memory
    ]
    state = table.state
    for row, columns in enumerate(table.data.select_columns(kept).data.to_pylist()):
        cells = [cell for of_column in pictures for cell in of_column[row]]
        yield partial(_read_cells, table, state, row, cells, columns, text_only)


def _cells(table: _Table, column: str) -> list[list[_Cell]]:
    """The pictures of each row in one column, without reading their bytes. Raises InputError."""
    import pyarrow as pa
    import pyarrow.compute as compute

    values = table.data.data.column(column)
    listed = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    kind = values.type.value_type if listed else values.type
    if not pa.types.is_struct(kind) or {field.name for field in kind} != {"bytes", "path"}:
        found = table.data.features[column]
        raise InputError(f"{table.place}: the column {column!r} must hold pictures (datasets.Image), not {found}")
    if listed and column == "target":
        raise InputError(f"{table.place}: the column 'target' must hold one picture, not a list of them")
    counts = compute.list_value_length(values).to_pylist() if listed else []
    values = compute.list_flatten(values) if listed else values
    has_bytes = compute.is_valid(compute.struct_field(values, "bytes")).to_pylist()
    held = zip(has_bytes, compute.struct_field(values, "path").to_pylist(), strict=True)
    if not listed:
        return [[_Cell(column, None, *each)] for each in held]
    return [[_Cell(column, position, *next(held)) for position in range(count or 0)] for count in counts]


def _read_cells(
    table: _Table, state: str, row: int, cells: list[_Cell], columns: dict[str, Any], text_only: bool, index: int
) -> Triplet:
    where = f"row {row} of {table.place}"
    pictures: list[Picture] = []
    for cell in cells:
        name = f"{where}, {cell.column}" + ("" if cell.position is None else f" {cell.position}")
        if cell.has_bytes:
            pictures.append(CellPicture(table.data, row, cell.column, cell.position, name, state))
        elif cell.path:
            path = os.path.relpath(cell.path, table.root) if os.path.isabs(cell.path) else cell.path
            pictures.append(find_picture(table.root, path, where=name))
        else:
            raise InputError(f"{name}: the picture is missing; fill it in or drop the row")
    target, *references = pictures
    if not references and not text_only:
        raise InputError(f"{where}: has no reference; fill it in or drop the row")
    prompt = take_text(columns, "prompt", where=where)
    return Triplet(
        index=index, where=where, prompt=prompt, references=tuple(references), target=target, columns=columns
    )
