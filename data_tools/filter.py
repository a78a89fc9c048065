"""Thresholds on a table's columns: who falls below is refused with the number and the limit, nobody is deleted.

    python -m data_tools.filter --table work/scan --out work/filter --min-sharpness 4

In: a table of data_tools.scan. Out: the same rows; `refused` says which limit a picture did not meet. Without a limit
everything passes: the numbers are there for people to look at first.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pyarrow as pa
import pydantic

from data_tools.stages import Row, Run, Table, run_stage
from data_tools.step import main_of_options
from ztrain.errors import InputError
from ztrain.io.yamls import Strict


class FilterRules(Strict):
    """Limits; None sets none. See data_tools.quality for what the numbers mean."""

    min_pixels: Annotated[int, pydantic.Field(ge=1)] | None = None
    """Width times height."""
    min_sharpness: Annotated[float, pydantic.Field(ge=0)] | None = None
    """Levels of 255; 0 takes all."""
    min_entropy: Annotated[float, pydantic.Field(ge=0, le=8)] | None = None
    """Bits, 0 to 8."""
    max_border_share: Annotated[float, pydantic.Field(ge=0, le=1)] | None = None
    """0 takes no border at all, 1 blank pictures too."""

    min_scores: dict[str, float] = {}
    """Column -> smallest number, of any column: data_tools.embed --text makes such."""
    max_scores: dict[str, float] = {}
    """Column -> largest number."""

    @property
    def has_scores(self) -> bool:
        return bool(self.min_scores or self.max_scores)

    def fault(self, row: Mapping[str, Any]) -> str | None:
        """The first limit that a row does not meet, in words. Raises InputError where its numbers were not measured."""
        if row["sharpness"] is None:
            raise InputError(f"{row['name']}: has no sharpness; scan with --measures quality likeness")
        checks = (
            ("min_pixels", row["width"] * row["height"], -1),
            ("min_sharpness", row["sharpness"], -1),
            ("min_entropy", row["entropy"], -1),
            ("max_border_share", row["border_share"], 1),
        )
        for name, value, sign in checks:
            limit = getattr(self, name)
            if limit is not None and sign * value > sign * limit:
                what = name.partition("_")[2].replace("_", " ")
                return f"{what} {value:.4g} is {'above' if sign > 0 else 'below'} {name} {limit:g}"
        for limits, sign in ((self.min_scores, -1), (self.max_scores, 1)):
            for column, limit in limits.items():
                if not isinstance(value := row.get(column), int | float):
                    raise InputError(f"{row['name']}: has no number {column!r}; data_tools.embed --text makes one")
                if sign * value > sign * limit:
                    return f"{column} {value:.4g} is {'above' if sign > 0 else 'below'} {limit:g}"
        return None


class Filter:
    """Stage: applies limits to rows that are not refused already."""

    name: ClassVar[str] = "filter"
    rules: ClassVar[int] = 2
    adds = pa.schema([("refused", pa.string()), ("refused_by", pa.string())])

    def __init__(self, config: FilterRules) -> None:
        self.config, self.about = config, config.model_dump(mode="json")

    def __call__(self, rows: Sequence[Row]) -> Sequence[Row]:
        return [self._apply(row) for row in rows]

    def _apply(self, row: Row) -> Row:
        refused = row["refused"] if row["refused"] is not None else self.config.fault(row)
        return {"refused": refused, "refused_by": row["refused_by"] or (refused and self.name)}


def filter(source: Table, rules: FilterRules, out: Path, run: Run) -> Table:
    """Refuse pictures that do not meet limits. Raises InputError where what is limited was not measured."""
    return run_stage(Filter(rules), source, out, run)


def _say(table: Table, rules: FilterRules, source: Table) -> str:
    left, all_ = (each.read(["refused"])["refused"].null_count for each in (table, source))
    return f"{left} of {all_} pictures are left"


main = main_of_options(filter, FilterRules, _say)

if __name__ == "__main__":
    sys.exit(main())
