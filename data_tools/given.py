"""Ways of labelling where somebody has already said what belongs together: a table of pairs, folders before and after.

In: the pictures of a table. Out: items that name their references.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pydantic

from data_tools.groups import check_header, check_split
from data_tools.likeness import COPY_SCORE
from data_tools.output import check_share
from data_tools.pictures import Pictures, Told, texts
from data_tools.triplets import Item, Scanned
from ztrain.errors import InputError
from ztrain.rows import check_text, parse_object, take_text
from ztrain.yamls import PathText

_RESERVED = ("way", "copy_score")


class PairTable(pydantic.BaseModel):
    """A table with one row per triplet: reference (several joined by "|"), target, prompt and perhaps split; CSV, or
    JSONL with the same keys (several references as a list). Further columns travel with the row. Where no row names a
    split, data_tools.split divides them; where some do, the others are for train."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    table: PathText
    """.csv or .jsonl, relative to the config file. Pictures are named as in their source, or source/name."""
    max_reject_share: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Largest share of unusable rows to put up with: 0 fails on the first, 1 on none."""
    max_copy_score: float = pydantic.Field(default=COPY_SCORE, ge=0, le=1)
    """A row whose reference is more like its target is unusable; 1 takes edits of one picture too."""

    def tables(self, folder: Path) -> list[Path]:
        """Raises InputError where the table as a whole cannot be read."""
        for _ in _read_table(folder / self.table):
            pass
        return [folder / self.table]

    def items(self, pictures: Pictures, folder: Path, told: Told) -> Iterator[Item]:
        """Raises InputError where too many rows are unusable."""
        known = {picture.key: picture for picture in pictures.usable}
        for picture in pictures.usable:
            known.setdefault(picture.name, picture)
        rejected: dict[str, str] = {}
        items: list[Item] = []
        for where, read in _read_table(folder / self.table):
            try:
                items.append(self._item(read(), known, pictures, where=where))
            except InputError as error:
                rejected[where] = str(error)
        for where, reason in rejected.items():
            row = f"{Path(self.table).name}:{where.rpartition(':')[2]}"
            told.leave_out("rows_rejected", row, "label", reason.removeprefix(f"{where}: "))
        check_share(rejected, len(items) + len(rejected), self.max_reject_share, "rows")
        if not items:
            raise InputError(f"{folder / self.table}: no row is left; give the table at least one usable pair")
        some = any(item.split is not None for item in items)
        yield from (replace(item, split="train") if some and item.split is None else item for item in items)

    def _item(self, row: dict[str, Any], known: Mapping[str, Scanned], pictures: Pictures, *, where: str) -> Item:
        given = row.pop("reference", [])
        names = given if isinstance(given, list) else [given]
        if not names:
            raise InputError(f"{where}: 'reference' is missing; name at least one picture")
        references = tuple(_find(name, "reference", known, pictures, where=where) for name in names)
        target = _find(row.pop("target", ""), "target", known, pictures, where=where)
        prompt = take_text(row, "prompt", where=where)
        split = row.pop("split", None) or None
        try:
            if split is not None:
                check_split(check_text(split, "split", where=where))
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        for column in row:
            if column.endswith(("file_name", "file_names")):
                raise InputError(f"{where}: `datasets` would take column {column!r} for pictures; rename it")
            if column in _RESERVED:
                raise InputError(f"{where}: the column {column!r} is written by data_tools itself; rename it")
        if target.pixels in {reference.pixels for reference in references}:
            raise InputError(f"{where}: a reference has the same pixels as the target, which teaches to copy")
        return Item(picture=target, way="pairs", prompt=prompt, split=split, references=references, more=row,
                    max_copy_score=self.max_copy_score)  # fmt: skip


class BeforeAfter(pydantic.BaseModel):
    """Two folders with pictures of the same names: what an edit was made of, and what came of it."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    before: str = "before"
    """Folder of the references, as names in a source begin."""
    after: str = "after"
    """Folder of the targets."""
    prompt: str | None = None
    """What all edits do; None: each has its own as the caption of the picture after it."""
    caption_column: str = "caption"
    """Column with prompts."""
    max_copy_score: float = pydantic.Field(default=1.0, ge=0, le=1)
    """A pair that is more alike is left out; 1 leaves out equal pixels alone: edits often change little."""

    def tables(self, folder: Path) -> list[Path]:
        return []

    def items(self, pictures: Pictures, folder: Path, told: Told) -> Iterator[Item]:
        """Raises InputError where there are no such folders."""
        prompts = dict(zip(pictures.usable, texts(pictures, self.caption_column), strict=True))
        before = self._below(self.before, pictures)
        after = self._below(self.after, pictures)
        for name in sorted(before.keys() ^ after.keys()):
            picture, why = (before.get(name) or after[name]).key, "no usable picture of its name on the other side"
            told.leave_out("pictures_without_partner", picture, "label", why)
        for name in sorted(before.keys() & after.keys()):
            target = after[name]
            yield Item(picture=target, way="before_after", content=target.key, whole=name, references=(before[name],),
                       prompt=self.prompt or prompts[target], max_copy_score=self.max_copy_score)  # fmt: skip

    def _below(self, folder: str, pictures: Pictures) -> dict[str, Scanned]:
        found: dict[str, Scanned] = {}
        for picture in pictures.usable:
            for name in (picture.name, picture.key):
                if name.startswith(f"{folder}/"):
                    stem = str(PurePosixPath(name.removeprefix(f"{folder}/")).with_suffix(""))
                    if stem in found:
                        raise InputError(f"{picture.key}: the same name as {found[stem].key}; keep one")
                    found[stem] = picture
                    break
        if not found:
            raise InputError(f"{folder}/: no pictures below it; set before and after to folders of the sources")
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
            check_header(header, path)
            for row in reader:
                yield f"{path}:{reader.line_num}", partial(_csv_columns, row, where=f"{path}:{reader.line_num}")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot read the table of pairs ({error}); it must be UTF-8") from error


def _csv_columns(row: dict[str, Any], *, where: str) -> dict[str, Any]:
    if None in row or None in row.values():  # DictReader's marks for a long and for a short row
        raise InputError(f"{where}: must have as many fields as the header")
    return row | {"reference": row["reference"].split("|")}


def _find(name: object, key: str, known: Mapping[str, Scanned], pictures: Pictures, *, where: str) -> Scanned:
    text = str(PurePosixPath(check_text(name, key, where=where)))
    if text in known:
        return known[text]
    for refused, (_, reason) in pictures.refused.items():
        if text in (refused, refused.partition("/")[2]):
            raise InputError(f"{where}: {text}: {reason}")
    raise InputError(f"{where}: the picture {text!r} is not in the sources; restore it or drop the row")
