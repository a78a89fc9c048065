"""Pictures in the cells of Parquet files: which cells hold one, what it is called, and its bytes.

In: a Parquet file. Out: for each picture its row, column, name and the caption of a column beside it; and its bytes.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.names import CAPTION_COLUMNS, reason_of
from data_tools.output import arrow_file
from ztrain.errors import InputError

_NAME_COLUMN = "file_name"
_LARGEST_CACHE = 256 << 20  # bytes of decoded row groups that a process keeps


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell that is there for a picture."""

    name: str
    """Unique in the file: the column, then the row's number or what the file calls the picture."""
    row: int
    column: str
    caption: bytes | None
    """UTF-8, if the file is right."""
    told: str
    """Column of the caption."""


def list_cells(path: Path, ignored: Counter[str]) -> Iterator[Cell]:
    """Row by row; `ignored` counts columns that would say something, but not as text. Raises InputError.

    A picture's name is `<column>/<row>`. Where a column `file_name`, or the paths of the cells themselves, name every
    row once and without climbing, it is `<column>/<that path>`: the folders of style folders live on in tables.
    """
    try:
        with arrow_file(path) as source, pq.ParquetFile(source) as file:
            yield from _list_cells(file, path, ignored)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: names of columns
        raise InputError(f"{path}: not a readable Parquet file ({reason_of(error, path)})") from error


def _list_cells(file: pq.ParquetFile, path: Path, ignored: Counter[str]) -> Iterator[Cell]:
    schema = file.schema_arrow
    twice = [name for name, times in Counter(schema.names).items() if times > 1]
    if twice:
        raise InputError(f"{path}: has two columns {twice[0]!r}; rename one")
    pictures = [known.name for known in schema if _is_picture(known)]
    if not pictures:
        raise InputError(f"{path}: has no column of pictures (datasets.Image, or bytes)")
    told = _caption_column(schema, ignored)
    captions = _captions(file, told) if told else iter(())
    names = {column: _names(file, column, ignored) for column in pictures}
    # A slash inside a column's name would make of column "a/b" and of a path "b/..." in column "a" one name.
    folders = {column: column.replace("%", "%25").replace("/", "%2F") for column in pictures}
    for row in range(file.metadata.num_rows):
        caption = next(captions, None)
        for column in pictures:
            known = names[column]
            yield Cell(f"{folders[column]}/{known[row] if known else row}", row, column, caption, told)


def _is_picture(known: pa.Field) -> bool:
    """`datasets.Image`, or plain bytes that are not called a caption."""
    kind = known.type
    if pa.types.is_struct(kind):
        return {part.name for part in kind} == {"bytes", "path"} and _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind) and known.name not in CAPTION_COLUMNS


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain))


def _is_texts(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and _is_text(kind.value_type)


def _caption_column(schema: pa.Schema, ignored: Counter[str]) -> str:
    """The first that holds texts, or lists of them; empty where none does."""
    for name in CAPTION_COLUMNS:
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if _is_text(kind) or _is_texts(kind):
            return name
        if not (pa.types.is_struct(kind) and _is_picture(schema.field(name))):
            ignored[f"caption column {name} of {kind}"] += 1
    return ""


def _captions(file: pq.ParquetFile, column: str) -> Iterator[bytes | None]:
    """Of each row; of a list the first that is not empty."""
    for batch in file.iter_batches(columns=[column]):
        values = batch.column(column)
        if _is_text(values.type):
            yield from _raw(values)
            continue
        for row in values:
            yield next((text for text in _raw(row.values) if text and text.strip()), None) if row.is_valid else None


def _raw(values: pa.Array) -> list[Any]:
    """Bytes of texts: whether they are UTF-8 is for the reader to say."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return list(values.cast(pa.large_binary()).to_pylist())


def _names(file: pq.ParquetFile, column: str, ignored: Counter[str]) -> list[str] | None:
    """What the file calls the pictures of a column, row by row; None where that names not each of them, and once."""
    schema = file.schema_arrow
    places: list[tuple[str, str | None]] = [(_NAME_COLUMN, None)] if _NAME_COLUMN in schema.names else []
    if pa.types.is_struct(schema.field(column).type):
        places.append((column, "path"))
    for name, part in places:
        kind = schema.field(name).type
        kind = kind.field(part).type if part else kind
        where = f"{name}.{part}" if part else name
        if not _is_text(kind):
            if not pa.types.is_null(kind):
                ignored[f"file names in column {where} of {kind}"] += 1
            continue
        batches = (batch.column(name) for batch in file.iter_batches(columns=[where]))
        raw = [text for values in batches for text in _raw(values.field(part) if part else values)]
        paths = [_relative(text) for text in raw]
        if all(paths) and len(set(paths)) == len(paths):
            return [path for path in paths if path]
        if any(raw):
            ignored[f"file names in column {where}, which do not name each row once, and below the file"] += 1
    return None


def _relative(raw: bytes | None) -> str | None:
    """A path that goes down only, as its parts; None where it is another."""
    try:
        text = (raw or b"").decode()
    except UnicodeDecodeError:
        return None
    parts = [part for part in text.split("/") if part not in ("", ".")]
    climbs = text.startswith("/") or ".." in parts or "\\" in text or "\0" in text
    return None if climbs or not parts else "/".join(parts)


# --- the bytes of one cell --------------------------------------------------------------------------------------------


def read_cell(path: Path, row: int, column: str) -> bytes:
    """Raises OSError, or what Arrow raises, where it cannot be read."""
    found = path.stat()
    state = (found.st_mtime_ns, found.st_size)
    group, start = 0, 0
    sizes = _group_sizes(path, state)
    while group < len(sizes) and row >= start + sizes[group]:
        start += sizes[group]
        group += 1
    if group == len(sizes):
        raise OSError("the file has fewer rows than when it was listed")
    cell = _GROUPS.read(path, state, group, column)[row - start].as_py()
    data = cell["bytes"] if isinstance(cell, dict) else cell
    if data is None:
        raise OSError("the cell holds no bytes")
    if not isinstance(data, bytes):
        raise OSError(f"column {column} holds no bytes any more")
    return data


_State = tuple[int, int]  # time and size of a file: another file under its name is not taken for it


@lru_cache(maxsize=64)
def _group_sizes(path: Path, state: _State) -> tuple[int, ...]:
    with arrow_file(path) as source:
        metadata = pq.read_metadata(source)
    return tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


class _Groups:
    """Decoded columns of row groups, the last used ones: rows are asked for in any order, and decode as a group."""

    def __init__(self, limit: int) -> None:
        """limit: in bytes; one group is kept, whatever its size."""
        self.limit, self.size = limit, 0
        self.kept: OrderedDict[tuple[Path, _State, int, str], Any] = OrderedDict()

    def read(self, path: Path, state: _State, group: int, column: str) -> Any:
        key = (path, state, group, column)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        with arrow_file(path) as source, pq.ParquetFile(source) as file:
            if column not in file.schema_arrow.names:
                raise OSError(f"column {column} is not there any more")
            values = file.read_row_group(group, columns=[column]).column(column)
        self.kept[key] = values
        self.size += values.nbytes
        while self.size > self.limit and len(self.kept) > 1:
            _, dropped = self.kept.popitem(last=False)
            self.size -= dropped.nbytes
        return values


_GROUPS = _Groups(_LARGEST_CACHE)
