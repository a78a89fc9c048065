"""The rows of a table of pictures as labels need them: usable ones, what was refused, and who is a copy of whom."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.sources import LISTED
from data_tools.stages import Table
from data_tools.triplets import PICTURE_COLUMNS, LeftOut, Scanned
from ztrain.rows import clean


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
    keep_copies: bool = False
    """Whether groups get copies too."""

    @classmethod
    def read(cls, table: Table, keep_copies: bool) -> "Pictures":
        """Raises InputError for a table of something else."""
        names = set(table.columns)
        location = [name for name in PICTURE_COLUMNS if name != "cluster"]
        copies = [name for name in ("cluster", "copy_of", "copy_by", "copy_score") if name in names]
        found = table.read([*location, "refused", "refused_by", *copies])
        pictures = cls(table, [], [], {}, {}, {}, keep_copies)
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

    def single(self, chosen: Sequence[Scanned], told: "Told") -> list[Scanned]:
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


@dataclass(slots=True)
class Told:
    """What ways of labelling and pairing count while they go on."""

    counts: Counter[str] = field(default_factory=Counter)
    left_out: list[LeftOut] = field(default_factory=list)

    def leave_out(self, what: str, name: str, stage: str, reason: str) -> None:
        """`what`: the name of the count."""
        self.counts[what] += 1
        self.left_out.append(LeftOut(name, stage, reason))


def texts(pictures: Pictures, column: str) -> Sequence[str | None]:
    """A column of texts; none at all where the table does not have it."""
    values = pictures.column(column) if column in pictures.table.columns else [None] * len(pictures.usable)
    return [clean(value) or None if isinstance(value, str) else None for value in values]
