"""A table of pairs -> triplets: somebody has already said which picture shows the look and which one is drawn in it.

In: CSV with the columns reference (several joined by "|"), target, prompt and perhaps split, or JSONL with the same
keys (several references as a list). Out: rows to write; further columns travel with them.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pydantic
from tqdm import tqdm

from data_tools.output import Row, Source, check_share, digest_of, find_licences
from ztrain.errors import InputError
from ztrain.images import open_image
from ztrain.rows import check_text, find_picture, parse_object, take_text


class PairsConfig(pydantic.BaseModel):
    """Which table of pairs becomes triplets. Paths are relative to the config file."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    images: str
    """Folder that the paths in the table are relative to; relative to the config file."""
    pairs: str
    """Table with one row per triplet, .csv or .jsonl; relative to the config file."""
    max_reject_share: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Largest share of unusable rows to put up with: 0 fails on the first, 1 on none."""


@dataclass(frozen=True, slots=True)
class PairTable:
    """The rows of a table, their pictures found and hashed but not opened."""

    config: PairsConfig
    files: list[Path]
    """What decides the output besides the pictures: the table, and a LICENSES.md that travels with it."""
    rows: list[tuple[str, str, Row]]
    """Place in the table, split and row."""
    rejected: dict[str, str]
    """Place in the table -> why its row cannot be used."""

    def sources(self) -> list[Source]:
        return list(dict.fromkeys(source for _, _, row in self.rows for source in (row.target, *row.references)))

    def plan(self) -> tuple[dict[str, list[Row]], dict[str, Any]]:
        """Split -> rows in the order of the table, and the keys of the report. Raises InputError."""
        faults: dict[Source, str] = {}
        for source in tqdm(self.sources(), desc="decoding", unit="picture", disable=None):
            try:
                open_image(source.path)
            except InputError as error:
                faults[source] = str(error)
        rejected = dict(self.rejected)
        rows: dict[str, list[Row]] = {}
        for where, split, row in self.rows:
            found = [faults[source] for source in (row.target, *row.references) if source in faults]
            if row.target.digest in {reference.digest for reference in row.references}:
                found.append("a reference has the same bytes as the target, which teaches to copy")
            if found:
                rejected[where] = f"{where}: {found[0]}"
            else:
                rows.setdefault(split, []).append(row)
        check_share(rejected, len(self.rows) + len(self.rejected), self.config.max_reject_share, "rows")
        if not rows:
            raise InputError(f"{self.files[0]}: no row is left; give the table at least one usable pair")
        return rows, {"counts": {"rows_rejected": len(rejected)}, "rejected": rejected}


def read_pairs(config: PairsConfig, folder: Path) -> PairTable:
    """Reads the table and hashes the pictures that it names. Raises InputError for the table as a whole."""
    table, images = folder / config.pairs, folder / config.images
    found = PairTable(config, [table, *find_licences(table.parent, images.parent)], [], {})
    known: dict[str, Source] = {}
    for where, read in tqdm(_read_table(table), desc="reading pairs", unit="row", disable=None):
        try:
            found.rows.append((where, *_read_row(read(), images, known, where=where)))
        except InputError as error:
            found.rejected[where] = str(error)
    return found


def _read_table(path: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The place of each row and what reads its columns, raising InputError as this does for the whole table."""
    if path.suffix not in (".csv", ".jsonl"):
        raise InputError(f"{path}: pairs must be a .csv or a .jsonl table")
    try:
        if path.suffix == ".jsonl":
            for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
                if raw.strip():
                    yield f"{path}:{number}", partial(parse_object, raw, where=f"{path}:{number}")
            return
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or ()
            for column in (column for column in ("reference", "target", "prompt") if column not in header):
                raise InputError(f"{path}: no column {column!r}; its columns are: {', '.join(header)}")
            for row in reader:
                yield f"{path}:{reader.line_num}", partial(_csv_columns, row, where=f"{path}:{reader.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot read the table of pairs ({error}); it must be UTF-8") from error


def _csv_columns(row: dict[str, Any], *, where: str) -> dict[str, Any]:
    if None in row or None in row.values():  # DictReader's marks for a long and for a short row
        raise InputError(f"{where}: must have as many fields as the header")
    return row | {"reference": row["reference"].split("|")}


def _read_row(row: dict[str, Any], images: Path, known: dict[str, Source], *, where: str) -> tuple[str, Row]:
    """Split and row; `known` keeps every picture that was hashed. Raises InputError."""
    given = row.pop("reference", [])
    names = given if isinstance(given, list) else [given]
    if not names:
        raise InputError(f"{where}: 'reference' is missing; name at least one picture")
    references = tuple(_find(name, "reference", images, known, where=where) for name in names)
    target = _find(row.pop("target", ""), "target", images, known, where=where)
    prompt = take_text(row, "prompt", where=where)
    split = row.pop("split", "") or "train"
    if split != Path(str(split)).name or split.startswith("."):
        raise InputError(f"{where}: split {split!r} must be the plain name of a folder")
    for column in row:
        if column.endswith(("file_name", "file_names")):
            raise InputError(f"{where}: `datasets` would take column {column!r} for pictures; rename it")
    return split, Row(target=target, references=references, prompt=prompt, columns=row)


def _find(name: object, key: str, images: Path, known: dict[str, Source], *, where: str) -> Source:
    text = check_text(name, key, where=where)
    if text not in known:
        path = find_picture(images, text, where=where).path
        try:
            # The path below images/ stays, so that a/1.png and b/1.png cannot meet.
            known[text] = Source(path, f"images/{PurePosixPath(text)}", digest_of(path))
        except OSError as error:
            raise InputError(f"{path}: cannot read the picture ({error.strerror})") from error
    return known[text]
