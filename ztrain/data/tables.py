"""Parquet files and data sets of the Hub as rows, through `datasets`: imported only here, and only when used."""

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ztrain.data.rows import RowReader, Triplet, check_size, find_picture, listed, other_captions, take_text
from ztrain.data.tars import lost
from ztrain.errors import InputError
from ztrain.images import Picture, stamp_of
from ztrain.io.files import check_regular

if TYPE_CHECKING:
    import datasets


_MAX_FOOTER = 1 << 28  # bytes; it is read whole, before a row is
# What `datasets` and pyarrow raise on odd schemas and values, found by trying them.
_TABLE_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


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
        value = (cell if self.position is None else cell[self.position])["bytes"]
        check_size(value.as_buffer().size, "picture", where=self.name)
        data: bytes = value.as_py()
        return data


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


def parquet_rows(
    files: list[Path], root: Path, split: str, text_only: bool, packed: Mapping[Path, int]
) -> Iterator[RowReader]:
    """packed: how many rows a table had, where that is known."""
    counts = {}
    for path in files:
        try:
            counts[path] = _count_rows(path)
        except InputError as error:
            if path not in packed:
                raise
            yield from lost(path, str(error).removeprefix(f"{path}: "), packed[path])
    filled = [path for path, count in counts.items() if count]  # `datasets` cannot load a file of no rows
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
    try:
        data = _load_table(choice, f"{place}: cannot load the tables", "restore the files")
    except InputError as error:
        for path in filled if "No space left" not in str(error) else []:
            _check_pages(path)
        raise
    if len(data) != sum(counts.values()):
        raise InputError(f"{place}: {sum(counts.values())} rows are promised, {len(data)} there; restore the files")
    yield from _table_rows(_Table(data, place, root), text_only)


def _count_rows(path: Path) -> int:
    """By the table's footer, which must fit into the file. Raises InputError."""
    import pyarrow.parquet

    if str(path).encode(errors="ignore").decode() != str(path):
        raise InputError(f"{path}: a table's path must be UTF-8; rename it, or give a link to its folder")
    with _explained(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length, mark = int.from_bytes(file.read(4), "little"), file.read(4)
        if mark != b"PAR1" or length > size - 12:
            raise ValueError(f"its {size:,} bytes do not end as a table does: it was cut off, or is none")
        if length > _MAX_FOOTER:
            raise ValueError(f"its footer claims {length:,} bytes")
        return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)


def _check_pages(path: Path) -> None:
    """Reads a table, as `datasets` does not say which of many is the damaged one. Raises InputError."""
    import pyarrow.parquet

    with _explained(path), path.open("rb") as file:
        for _ in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=64):
            pass


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What opening a table raises, as one sentence."""
    try:
        check_regular(path)
        yield
    except InputError:
        raise
    except _TABLE_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: not a readable Parquet file ({reason}); restore it") from error


def hub_rows(location: str, split: str, revision: str | None, text_only: bool) -> Iterator[RowReader]:
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
    except (datasets.exceptions.DatasetsError, *_TABLE_ERRORS) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = str(cause or error).partition("\n")[0]
        raise InputError(f"{fault} ({reason}); {advice}") from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def _table_rows(table: _Table, text_only: bool) -> Iterator[RowReader]:
    from datasets.features.features import require_decoding

    features = table.data.features
    names = [name for name in ("reference", "references") if name in features]
    if not {"prompt", "target"} <= set(features) or len(names) != 1 and not text_only:
        raise InputError(
            f"{table.place}: needs the columns 'prompt', 'target' and one of 'reference', 'references'; "
            f"it has {listed(features)}"
        )
    pictures = [_cells(table, name) for name in ("target", *([] if text_only else names))]
    kept = [
        name
        for name, feature in features.items()
        if name not in ("target", *names) and not require_decoding(feature)  # further pictures would fill the memory
    ]
    try:
        rows = table.data.select_columns(kept).data.to_pylist()
    except _TABLE_ERRORS as error:
        raise InputError(f"{table.place}: a column has values that Python has not ({error}); leave it out") from error
    state = table.state
    for row, columns in enumerate(rows):
        cells = [cell for of_column in pictures for cell in of_column[row]]
        yield partial(_read_cells, table, state, row, cells, columns, text_only)


def _cells(table: _Table, column: str) -> list[list[_Cell]]:
    """The pictures of each row in one column, without reading their bytes. Raises InputError."""
    import pyarrow as pa
    import pyarrow.compute as compute

    values = table.data.data.column(column)
    listed = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    kind = values.type.value_type if listed else values.type
    if not pa.types.is_struct(kind) or not _is_picture({field.name: field.type for field in kind}):
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


def _is_picture(fields: dict[str, Any]) -> bool:
    """Whether a struct is datasets.Image's: a column that is empty throughout may be of the type null."""
    import pyarrow.types as types

    tests = {"bytes": (types.is_binary, types.is_large_binary), "path": (types.is_string, types.is_large_string)}
    return fields.keys() == tests.keys() and all(
        types.is_null(kind) or any(test(kind) for test in tests[name]) for name, kind in fields.items()
    )


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
        index=index,
        where=where,
        prompt=prompt,
        captions=other_captions(columns, prompt, where=where),
        references=tuple(references),
        target=target,
        columns=columns,
    )
