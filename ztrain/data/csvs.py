"""Tables that people write: CSV as any program saves it, or JSON lines, read strictly and named by line.

In: a .csv, .tsv or .jsonl file. Commas, semicolons and tabs divide cells, whichever makes the wanted columns appear;
capitals and white space in a header do not matter. Out: rows by the names that the caller gave the columns; further
columns keep their own.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ztrain.data.rows import check_text, listed, parse_object
from ztrain.errors import InputError
from ztrain.io.files import MAX_LINE, read_bytes, read_text
from ztrain.io.forms import folded

Row = dict[str, Any]
KINDS = (".csv", ".tsv", ".jsonl")
_DELIMITERS = (",", ";", "\t")


def read_table(path: Path, needed: Sequence[str], known: Sequence[str] = ()) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The place of each row (file:line) and what reads it; `known`: further columns whose names are put right.

    Raises InputError for the table as a whole, also where a needed column is not there; the readers raise it for a row.
    """
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _json_lines(path, needed, known)
        elif path.suffix.lower() in KINDS:
            yield from _csv_rows(path, needed, known)
        else:
            raise InputError(f"{path}: a table must be one of {', '.join(KINDS)}")
    except OSError as error:
        raise InputError(f"{path}: cannot read the table ({error.strerror or error}); correct its path") from error


def read_rows(path: Path, needed: Sequence[str], known: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """The same, where a row that cannot be read is as bad as the table."""
    for where, read in read_table(path, needed, known):
        yield where, read()


def cell(row: Mapping[str, Any], column: str, *, where: str, optional: bool = False) -> str:
    """The text of a cell; "" where there is none and it is optional. Raises InputError."""
    value = row.get(column)
    return check_text("" if value is None else value, column, where=where, optional=optional)


def _csv_rows(path: Path, needed: Sequence[str], known: Sequence[str]) -> Iterator[tuple[str, Callable[[], Row]]]:
    text = read_text(path, "table")
    header, delimiter = _header(path, text, needed, known)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        next(lines, None)
        for values in lines:
            if values:
                where = f"{path}:{lines.line_num}"
                yield where, partial(_csv_row, header, values, where=where)
    except csv.Error as error:
        raise InputError(f"{path}:{lines.line_num}: cannot read the table ({error}); mend its quotes") from error


def _header(path: Path, text: str, needed: Sequence[str], known: Sequence[str]) -> tuple[list[str], str]:
    """Names of the columns, and what divides them. Raises InputError."""
    first: list[str] = []
    fault = ""
    for delimiter in _DELIMITERS:
        try:
            found = next(csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter), [])
        except csv.Error as error:  # quotes that another delimiter makes right
            fault = fault or f"{path}:1: cannot read the table ({error}); mend its quotes"
            continue
        header = _named(found, needed, known, where=str(path))
        if set(needed) <= set(header):
            return header, delimiter
        first = header if len(header) > len(first) else first
    if not first and fault:
        raise InputError(fault)
    missing = next(name for name in needed if name not in first)
    raise InputError(f"{path}: no column {missing!r}; its columns are: {', '.join(first)}")


def _named(found: Sequence[str], needed: Sequence[str], known: Sequence[str], *, where: str) -> list[str]:
    """The columns by the names that the caller gave them. Raises InputError for one that stands twice, of which one
    would win unseen."""
    meant = {folded(name): name for name in (*known, *needed)}
    names = [name.strip() for name in found]
    exact = set(names)
    header = [name if name in (*needed, *known) or meant.get(folded(name)) in exact else meant.get(folded(name), name)
              for name in names]  # fmt: skip
    if twice := [name for name, times in Counter(header).items() if times > 1]:
        raise InputError(f"{where}: the column {twice[0]!r} stands {header.count(twice[0])} times; keep one")
    return header


def _csv_row(header: Sequence[str], values: Sequence[str], *, where: str) -> Row:
    if len(values) != len(header):
        raise InputError(f"{where}: must have {len(header)} fields, as many as the header, not {len(values)}")
    return dict(zip(header, values, strict=True))


def _json_lines(path: Path, needed: Sequence[str], known: Sequence[str]) -> Iterator[tuple[str, Callable[[], Row]]]:
    lines = read_bytes(path, "table").splitlines()  # of bytes: U+2028 inside a text is no line end
    for number, raw in enumerate(lines, start=1):
        if raw.strip():
            where = f"{path}:{number}"
            yield where, partial(_json_row, raw, needed, known, where=where)


def _json_row(raw: bytes, needed: Sequence[str], known: Sequence[str], *, where: str) -> Row:
    if len(raw) > MAX_LINE:
        raise InputError(f"{where}: has {len(raw):,} bytes, more than the {MAX_LINE:,} that a line may have")
    row = parse_object(raw, where=where)
    row = dict(zip(_named(list(row), needed, known, where=where), row.values(), strict=True))
    if missing := [name for name in needed if name not in row]:
        raise InputError(f"{where}: no column {missing[0]!r}; it has {listed(row)}")
    return row
