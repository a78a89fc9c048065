"""The rows of a table of pictures as labels need them: usable ones, what was refused, and who is a copy of whom."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data_tools.sources import LISTED
from data_tools.stages import Table
from data_tools.triplets import PICTURE_COLUMNS, PROMPTS, LeftOut, Scanned
from ztrain.data.rows import clean

Lines = Literal["first", "all"]
"""Of a caption: the first alone counts, or each is a caption."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """All rows of a table."""

    table: Table
    usable: list[Scanned]
    """Not refused, in the order of the table."""
    rows: list[int]
    """Their places in the table."""
    refused: dict[str, tuple[str, str]]
    """Key -> the program that refused it, and why."""
    passed_by: dict[str, tuple[str, str]]
    """The same of what the listing named and did not take for a picture that can be used."""
    copies: dict[str, str]
    """Key -> why it is a copy, for usable ones that another picture stands for."""
    has_clusters: bool
    """Whether data_tools.dedup has looked for copies; if not, those with equal pixels are."""
    keep_copies: bool = False
    """Whether groups get copies too."""
    lines: Lines | None = None
    """What the lines of a caption are; None: one caption."""
    further: Sequence[str] = ()
    """Columns with further captions."""

    @classmethod
    def read(
        cls, table: Table, keep_copies: bool, lines: Lines | None = None, further: Sequence[str] = ()
    ) -> "Pictures":
        """Raises InputError for a table of something else."""
        names = set(table.columns)
        location = [name for name in PICTURE_COLUMNS if name != "cluster"]
        copies = [name for name in ("cluster", "copy_of", "copy_by", "copy_score") if name in names]
        found = table.read([*location, "refused", "refused_by", *copies])
        pictures = cls(table, [], [], {}, {}, {}, "cluster" in names, keep_copies, lines, further)
        for place, row in enumerate(found.to_pylist()):
            if row["refused"] is not None:
                lost = pictures.passed_by if row["refused_by"] == LISTED else pictures.refused
                lost[f"{row['source']}/{row['name']}"] = (row["refused_by"], row["refused"])
                continue
            known = {name: row[name] for name in location}
            cluster = row.get("cluster") or f"pixels {row['pixels']}"
            pictures.usable.append(Scanned(**known, cluster=cluster))
            pictures.rows.append(place)
            if row.get("copy_of") is not None:
                like = f"a copy of {row['copy_of']} (by {row['copy_by']}, score {row['copy_score']:.2f})"
                pictures.copies[pictures.usable[-1].key] = like
        return pictures

    def single(self, chosen: Sequence[Scanned], told: "Counts") -> list[Scanned]:
        """Of each cluster the one that stands for it, or the largest where that one is not among the chosen; the others
        are left out and counted."""
        if self.keep_copies:
            return list(chosen)
        told_before = {each.name for each in told.left_out if each.stage == "dedup"}  # by another way of labelling
        first: dict[str, Scanned] = {}
        for picture in sorted(chosen, key=self._rank):
            first.setdefault(picture.cluster, picture)
        for picture in chosen:
            stands = first[picture.cluster]
            if stands is not picture and picture.key not in told_before:
                reason = self.copies.get(picture.key)
                if reason is None or f"a copy of {stands.key} " not in reason:
                    reason = f"a copy of {stands.key}"
                told.leave_out("copies_left_out", picture.key, "dedup", reason)
        return [picture for picture in chosen if first[picture.cluster] is picture]

    def _rank(self, picture: Scanned) -> tuple[bool, int, str]:
        return picture.key in self.copies, -picture.width * picture.height, picture.key

    def column(self, name: str) -> list[Any]:
        """Values of the usable pictures. Raises InputError where the table has no such column."""
        values = self.table.read([name])[name].to_pylist()
        return [values[row] for row in self.rows]

    def captions(self, column: str) -> dict[Scanned, "Captions"]:
        """Of each usable picture what a column of texts and those of further ones say; nothing where there is no such
        column. Raises InputError for a further one that is not there."""
        columns = [self.column(column)] if column in self.table.columns else []
        columns += [self.column(name) for name in self.further]
        if not columns:
            return dict.fromkeys(self.usable, Captions())
        cells = zip(*columns, strict=True)
        texts = (dict.fromkeys(text for value in row for text in self._texts(value)) for row in cells)
        return dict(zip(self.usable, map(Captions, map(tuple, texts)), strict=True))

    def _texts(self, value: object) -> list[str]:
        """The captions that a cell holds."""
        if not isinstance(value, str):
            return []
        lines = value.splitlines() if self.lines else [" ".join(value.split("\n"))]
        texts = [text for text in map(clean, lines) if text]
        return texts[:1] if self.lines == "first" else texts


@dataclass(frozen=True, slots=True)
class Captions:
    """What is said of a picture, once each; the first is the prompt."""

    texts: tuple[str, ...] = ()

    @property
    def prompt(self) -> str | None:
        return self.texts[0] if self.texts else None

    @property
    def columns(self) -> dict[str, Any]:
        """The column that holds the further ones, where there are some."""
        return {PROMPTS: list(self.texts[1:])} if self.texts[1:] else {}


@dataclass(slots=True)
class Counts:
    """What ways of labelling and pairing count while they go on."""

    counts: Counter[str] = field(default_factory=Counter)
    left_out: list[LeftOut] = field(default_factory=list)

    def leave_out(self, what: str, name: str, stage: str, reason: str) -> None:
        """`what`: the name of the count."""
        self.counts[what] += 1
        self.left_out.append(LeftOut(name, stage, reason))
