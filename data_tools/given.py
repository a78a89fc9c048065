"""Ways of labelling where somebody has already said what belongs together: a table of pairs, folders before and after.

In: the pictures of a table. Out: items that name their references.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pydantic

from data_tools.groups import check_split
from data_tools.likeness import COPY_SCORE
from data_tools.output import check_share
from data_tools.pictures import Captions, Counts, Pictures
from data_tools.triplets import PROMPTS, Item, Scanned
from ztrain.data.csvs import Row, read_table
from ztrain.data.rows import check_text
from ztrain.errors import InputError
from ztrain.io.forms import Matches, matched, one_form
from ztrain.io.yamls import PathText, Strict

_NEEDED, _SPLIT = ("reference", "target", "prompt"), "split"
_RESERVED = ("way", "copy_score")


class PairTable(Strict):
    """A table with one row per triplet: reference (several joined by "|"), target, prompt and perhaps split; CSV, or
    JSONL with the same keys (several references as a list). Paths may have the backslashes of Windows. Further columns
    travel with the row. Where no row names a split, data_tools.split divides them; where some do, the others are for
    train."""

    table: PathText
    """.csv, .tsv or .jsonl, relative to the config file. Pictures are named as in their source, or source/name."""
    max_reject_share: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Largest share of unusable rows to put up with: 0 fails on the first, 1 on none."""
    max_copy_score: float = pydantic.Field(default=COPY_SCORE, ge=0, le=1)
    """A row whose reference is more like its target is unusable; 1 takes edits of one picture too."""

    def tables(self, folder: Path) -> list[Path]:
        """Raises InputError where the table as a whole cannot be read."""
        path = folder / self.table
        for _ in read_table(path, _NEEDED, [_SPLIT]):
            pass
        return [path]

    def items(self, pictures: Pictures, folder: Path, told: Counts) -> Iterator[Item]:
        """Raises InputError where too many rows are unusable."""
        path = folder / self.table
        rows: list[tuple[str, Row]] = []
        rejected: dict[str, str] = {}
        for where, read in read_table(path, _NEEDED, [_SPLIT]):
            try:
                rows.append((where, read()))
            except InputError as error:
                rejected[where] = str(error)
        named = _Named.of(pictures, {name for _, row in rows for name in (*_references(row), row["target"])
                                     if isinstance(name, str)})  # fmt: skip
        items: list[Item] = []
        for where, row in rows:
            try:
                items.append(self._item(row, named, where=where))
            except InputError as error:
                rejected[where] = str(error)
        for where, reason in rejected.items():
            line = f"{path.name}:{where.rpartition(':')[2]}"
            told.leave_out("rows_rejected", line, "label", reason.removeprefix(f"{where}: "))
        limit = "max_reject_share", self.max_reject_share
        what = "rows {} cannot be used"
        check_share(list(rejected.values()), len(items) + len(rejected), limit, what, "mend or remove them")
        if not items:
            raise InputError(f"{path}: no row is left; give the table at least one usable pair")
        some = any(item.split is not None for item in items)
        yield from (replace(item, split="train") if some and item.split is None else item for item in items)

    def _item(self, row: Row, named: "_Named", *, where: str) -> Item:
        if not (names := _references(row)):
            raise InputError(f"{where}: 'reference' is missing; name at least one picture")
        references = tuple(named.find(name, "reference", where=where) for name in names)
        target = named.find(row["target"], "target", where=where)
        prompt = check_text(row["prompt"], "prompt", where=where)
        split = row.get(_SPLIT) or None
        row = {name: value for name, value in row.items() if name not in (*_NEEDED, _SPLIT)}
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
        if not isinstance(prompts := row.get(PROMPTS, []), list):
            raise InputError(f"{where}: {PROMPTS} must be a list of texts, as .jsonl has it; rename the column")
        for text in prompts:
            check_text(text, PROMPTS, where=where)
        if target.pixels in {reference.pixels for reference in references}:
            raise InputError(f"{where}: a reference has the same pixels as the target, which teaches to copy")
        return Item(picture=target, way="pairs", prompt=prompt, split=split, references=references, more=row,
                    max_copy_score=self.max_copy_score)  # fmt: skip


class BeforeAfter(Strict):
    """Two folders with pictures of the same names: what an edit was made of, and what came of it."""

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

    def items(self, pictures: Pictures, folder: Path, told: Counts) -> Iterator[Item]:
        """Raises InputError where there are no such folders."""
        captions = pictures.captions(self.caption_column)
        before = self._below(self.before, pictures)
        after = self._below(self.after, pictures)
        partners = matched(after.keys(), before.keys())
        found = set(partners.found.values())
        for name, picture in sorted([*((name, after[name]) for name in after.keys() - partners.found.keys()),
                                     *((name, before[name]) for name in before.keys() - found)],
                                    key=lambda each: (each[0], each[1].key)):  # fmt: skip
            why = f"no usable picture of its name on the other side{partners.why_not(name)}"
            told.leave_out("pictures_without_partner", picture.key, "label", why)
        for name, other in sorted(partners.found.items()):
            target = after[name]
            said = Captions((self.prompt,)) if self.prompt else captions[target]
            yield Item(picture=target, way="before_after", content=target.key, whole=name, references=(before[other],),
                       prompt=said.prompt, max_copy_score=self.max_copy_score, more=said.columns)  # fmt: skip

    def _below(self, folder: str, pictures: Pictures) -> dict[str, Scanned]:
        found: dict[str, Scanned] = {}
        for picture in pictures.usable:
            for name in (picture.name, picture.key):
                if one_form(name).startswith(f"{one_form(folder)}/"):
                    stem = str(PurePosixPath(*PurePosixPath(name).parts[folder.count("/") + 1 :]).with_suffix(""))
                    if stem in found:
                        raise InputError(f"{picture.key}: the same name as {found[stem].key}; keep one")
                    found[stem] = picture
                    break
        if not found:
            raise InputError(f"{folder}/: no pictures below it; set before and after to folders of the sources")
        return found


def _references(row: Row) -> list[Any]:
    """Names, of CSV joined by "|"; what is no text is for `_find` to refuse."""
    given = row["reference"]
    return given if isinstance(given, list) else given.split("|") if isinstance(given, str) else [given]


def _spellings(name: str) -> tuple[str, str]:
    """A name as tables of pictures have it, and the one that it has where it comes from Windows."""
    return str(PurePosixPath(name.strip())), str(PurePosixPath(name.strip().replace("\\", "/")))


@dataclass(frozen=True, slots=True)
class _Named:
    """Pictures by the names that a table gives them."""

    known: Mapping[str, Scanned]
    matches: Matches
    """Of all that the table names."""
    refused: Mapping[str, str]
    """Name -> why it cannot be used."""

    @classmethod
    def of(cls, pictures: Pictures, names: set[str]) -> "_Named":
        known = {picture.key: picture for picture in pictures.usable}
        for picture in pictures.usable:
            known.setdefault(picture.name, picture)
        matches = matched({each for name in names for each in _spellings(name)}, known.keys(), shared=True)
        lost = [*pictures.passed_by.items(), *pictures.refused.items()]
        refused = {name: why for key, (_, why) in lost for name in (key.partition("/")[2], key)}
        return cls(known, matches, refused)

    def find(self, name: object, key: str, *, where: str) -> Scanned:
        """Raises InputError."""
        spellings = _spellings(text := check_text(name, key, where=where))
        for each in spellings:
            if each in self.matches.found:
                return self.known[self.matches.found[each]]
        for each in spellings:
            if each in self.refused:
                raise InputError(f"{where}: {each}: {self.refused[each]}")
        why = self.matches.why_not(spellings[1])
        raise InputError(f"{where}: the picture {text!r} is not in the sources{why}; restore it or drop the row")
