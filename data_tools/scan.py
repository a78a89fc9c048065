"""Pictures anywhere -> a table of what they are: every file opened once, decoded whole, measured, or refused by name.

    python -m data_tools.scan --sources photos more/shards.tar hub:owner/name --out work/scan

In: folders (with tars and Parquet files in them), single tars and Parquet files, data sets of the Hub. Out: a table
with one row per picture: where it is, hashes of its bytes and pixels, upright size, caption if somebody has written
one, quality (data_tools.quality), a perceptual fingerprint (data_tools.likeness), or the reason why it is refused.
Transparency is laid on white, and orientation, profiles and depths are applied, as training does (ztrain.images).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as compute
import pydantic
import tyro
import xxhash
from PIL import Image

from data_tools import likeness, quality
from data_tools.output import SortedSet, check_share
from data_tools.sources import LISTED, Reader, list_sources, passed_by
from data_tools.stages import Row, Run, Table, run_stage
from data_tools.step import read_words
from data_tools.walk import Links
from ztrain.errors import InputError
from ztrain.images import decode_image
from ztrain.io.yamls import Strict
from ztrain.terminal import program


class ScanRules(Strict):
    """What a picture must be to be used at all."""

    min_side: int = pydantic.Field(default=64, ge=1)
    """Smallest short side in pixels, upright; 1 takes all."""
    max_aspect: float = pydantic.Field(default=4.0, ge=1)
    """Largest long side / short side: panoramas lose most of themselves in any crop."""
    measures: SortedSet[Literal["quality", "likeness"]] = frozenset({"quality", "likeness"})
    """Columns that need the pixels besides their hash: for data_tools.filter, for data_tools.dedup."""


MEASURED = pa.schema(
    [
        ("refused", pa.string()),
        ("refused_by", pa.string()),
        ("digest", pa.string()),  # xxh3_128 of the bytes
        ("pixels", pa.string()),  # xxh3_128 of size and 8-bit RGB values
        ("width", pa.int32()),  # upright
        ("height", pa.int32()),
        *((name, pa.float32()) for name in quality.COLUMNS),
        ("likeness", pa.binary(likeness.BYTES)),
        ("read_without", pa.string()),  # what metadata were damaged and left out; null where none were
    ]
)
_NOTHING: dict[str, Any] = dict.fromkeys(MEASURED.names)


class Scan:
    """Stage: opens and measures listed pictures."""

    name: ClassVar[str] = "scan"
    rules: ClassVar[int] = 4
    adds = MEASURED

    def __init__(self, config: ScanRules, roots: Mapping[str, Path]) -> None:
        self.config, self.reader = config, Reader(roots)
        self.about = config.model_dump(mode="json")

    def __call__(self, rows: Sequence[Row]) -> Sequence[Row]:
        return [self._scan(row) for row in rows]

    def _scan(self, row: Row) -> dict[str, Any]:
        if row["refused"] is not None:
            return _NOTHING | {"refused": row["refused"], "refused_by": row["refused_by"] or self.name}
        found = self._measure(row)
        return found if found["refused"] is None else found | {"refused_by": self.name}

    def _measure(self, row: Row) -> dict[str, Any]:
        found: dict[str, Any] = dict(_NOTHING)
        try:
            data = self.reader.read(row)
            found["digest"] = xxhash.xxh3_128_hexdigest(data)
            left_out: list[str] = []
            image = decode_image(data, row["name"], left_out)
        except InputError as error:
            return found | {"refused": str(error).removeprefix(f"{row['name']}: ")}
        found |= {"width": image.width, "height": image.height, "pixels": digest_pixels(image)}
        found["read_without"] = "; ".join(left_out) or None
        if fault := self._fault(image.width, image.height):
            return found | {"refused": fault}
        if "quality" in self.config.measures:
            found |= quality.measure(image)
        if "likeness" in self.config.measures:
            found["likeness"] = likeness.fingerprint(image)
        return found

    def _fault(self, width: int, height: int) -> str:
        rules, (short, long) = self.config, sorted((width, height))
        if short < rules.min_side:
            return f"{width} x {height} is too small: its short side has less than min_side {rules.min_side} pixels"
        if long > rules.max_aspect * short:
            wide = f"{width} x {height} is {long / short:.3g} times as long as wide"
            return f"{wide}, more than max_aspect {rules.max_aspect:g}"
        return ""


def digest_pixels(image: Image.Image) -> str:
    """128 bits of an RGB picture's size and values, as 32 hex digits: equal for equal pixels in other files."""
    digest = xxhash.xxh3_128(f"{image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Open and measure pictures; name those that cannot be used."""

    sources: list[str]
    """Folders, tars, Parquet files, hub:owner/name@revision."""
    out: Path
    """Folder of the table. One that is there is gone on with."""
    rules: tyro.conf.OmitArgPrefixes[ScanRules] = ScanRules()
    max_refused_share: float = 0.05
    """Fails where a larger share of the pictures is refused: 0 on the first, 1 never."""
    rows_per_shard: int = 512
    """Pictures in a shard, about: what is done again after an interruption. Millions of pictures want 10,000."""
    run: tyro.conf.OmitArgPrefixes[Run] = Run()
    links: Links = "inside"
    """Which links are followed: those that lead to something inside the sources, or all."""


def scan(source: Table, rules: ScanRules, out: Path, run: Run) -> Table:
    """Measures listed pictures. Raises InputError."""
    table = run_stage(Scan(rules, source.roots), source, out, run)
    column = table.read(["read_without"])["read_without"]
    counts = {**table.facts["counts"], "read_without_damaged_metadata": len(column) - column.null_count}
    table = replace(table, facts={**table.facts, "counts": {name: count for name, count in counts.items() if count}})
    table.close()
    return table


def check_refused(table: Table, max_share: float) -> None:
    """Raises InputError where more than `max_share` (0..1) of the rows is refused."""
    rows = table.read(["name", "refused", "refused_by"])
    rows = rows.filter(compute.not_equal(rows["refused_by"].fill_null(""), LISTED))
    refused = [f"{row['name']}: {row['refused']}" for row in rows.to_pylist() if row["refused"] is not None]
    limit, what = ("max_refused_share", max_share), "pictures {} are refused"
    check_share(refused, rows.num_rows, limit, what, "mend or remove them")


def summary(table: Table) -> str:
    """Counts, for people."""
    refused_by = table.read(["refused_by"])["refused_by"]
    count = compute.sum(compute.not_equal(refused_by, LISTED)).as_py() or 0
    ignored = f"; ignored: {said}" if (said := passed_by(table)) else ""
    counts = "".join(f"; {name.replace('_', ' ')}: {number}" for name, number in table.facts["counts"].items())
    return f"{refused_by.null_count} pictures, {count} refused{counts}{ignored}"


@program
def main(arguments: Sequence[str] | None) -> str:
    """Exit status: 0 done, 2 something the user can mend."""
    options = read_words(Command, arguments, "scan")
    listing = list_sources(options.sources, options.out / "listing", options.run.folder, options.rows_per_shard,
                           options.links)  # fmt: skip
    table = scan(listing, options.rules, options.out, options.run)
    check_refused(table, options.max_refused_share)
    return f"{table.folder}: {summary(table)}"


if __name__ == "__main__":
    sys.exit(main())
