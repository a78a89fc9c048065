"""Pictures anywhere -> a table of what they are: every file opened once, decoded whole, measured, or refused by name.

    python -m data_tools.scan --sources photos more/shards.tar hub:owner/name --out work/scan

In: folders (with tars and Parquet files in them), single tars and Parquet files, data sets of the Hub. Out: a table
with one row per picture: where it is, hashes of its bytes and pixels, upright size, caption if somebody has written
one, quality (data_tools.quality), a perceptual fingerprint (data_tools.likeness), or the reason why it is refused.
Transparency is laid on white, and orientation, profiles and depths are applied, as training does (ztrain.images).
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as compute
import pydantic
import tyro
import xxhash
from PIL import Image

from data_tools import likeness, quality
from data_tools.sources import LISTED, Reader, list_pictures, resolve
from data_tools.stages import ENGINES, Batch, Table, run_stage
from data_tools.step import read_words
from data_tools.walk import CONTAINERS, Links
from ztrain.errors import InputError
from ztrain.files import expand
from ztrain.images import READ, decode_image
from ztrain.terminal import command


class ScanRules(pydantic.BaseModel):
    """What a picture must be to be used at all."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    min_side: int = pydantic.Field(default=64, ge=1)
    """Smallest short side in pixels, upright; 1 takes all."""
    max_aspect: float = pydantic.Field(default=4.0, ge=1)
    """Largest long side / short side: panoramas lose most of themselves in any crop."""
    measures: frozenset[Literal["quality", "likeness"]] = frozenset({"quality", "likeness"})
    """Columns that need the pixels besides their hash: for data_tools.filter, for data_tools.dedup."""

    @pydantic.field_validator("measures", mode="before")
    @classmethod
    def _from_list(cls, measures: object) -> object:
        return frozenset(measures) if isinstance(measures, list | tuple) else measures

    @pydantic.field_serializer("measures")
    def _in_order(self, measures: frozenset[str]) -> list[str]:
        return sorted(measures)


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

    def __call__(self, batch: Batch) -> dict[str, Sequence[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found = [self._scan(row) for row in rows]
        return {name: batch[name] for name in batch} | {name: [each[name] for each in found] for name in MEASURED.names}

    def _scan(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if row["refused"] is not None:
            return _NOTHING | {"refused": row["refused"], "refused_by": row["refused_by"] or self.name}
        found = self._measure(row)
        return found if found["refused"] is None else found | {"refused_by": self.name}

    def _measure(self, row: Mapping[str, Any]) -> dict[str, Any]:
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
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: Ray Data, on a cluster that shares the folders."""
    workers: int | None = None
    """Processes or actors; None takes as many as there are cores."""
    links: Links = "inside"
    """Which links are followed: those that lead to something inside the sources, or all."""
    folder: tyro.conf.Suppress[Path] = field(default=Path("."))
    """What relative sources are relative to."""


def scan(command: Command) -> Table:
    """Lists and measures. Raises InputError, also where too many pictures are refused; the table is whole then too."""
    if command.rows_per_shard < 1:
        raise InputError(f"rows_per_shard {command.rows_per_shard} must be at least 1")
    roots = resolve([expand(source) for source in command.sources], command.folder)
    listing = list_pictures(roots, command.out / "listing", command.rows_per_shard, command.links)
    if not listing.shards or listing.read(["refused_by"])["refused_by"].null_count == 0:
        kinds = ", ".join((*sorted(READ), *CONTAINERS))
        told = f"; ignored: {said}" if (said := passed_by(listing)) else ""
        raise InputError(f"{', '.join(roots)}: no picture there; these are read: {kinds}{told}")
    stage = Scan(command.rules, roots)
    table = run_stage(stage, listing, command.out, engine=ENGINES[command.engine], workers=command.workers)
    table = _count_left_out(table)
    check_refused(table, command.max_refused_share)
    return table


def _count_left_out(table: Table) -> Table:
    """The table with the number of pictures that lack damaged metadata among its facts."""
    column = table.read(["read_without"])["read_without"]
    counts = {**table.facts.get("counts", {}), "read_without_damaged_metadata": len(column) - column.null_count}
    table = replace(table, facts={**table.facts, "counts": {name: count for name, count in counts.items() if count}})
    table.close()
    return table


def check_refused(table: Table, max_share: float) -> None:
    """Raises InputError where more than `max_share` (0..1) of the rows is refused."""
    rows = table.read(["name", "refused", "refused_by"])
    rows = rows.filter(compute.not_equal(rows["refused_by"].fill_null(""), LISTED))
    refused = rows.filter(compute.is_valid(rows["refused"]))
    if refused.num_rows > max_share * rows.num_rows:
        first = "".join(f"\n  {row['name']}: {row['refused']}" for row in refused.slice(0, 10).to_pylist())
        raise InputError(
            f"{refused.num_rows} of {rows.num_rows} pictures ({refused.num_rows / rows.num_rows:.2%}) are refused, more"
            f" than max_refused_share {max_share:g} allows; mend or remove them, or raise it:{first}"
        )


def summary(table: Table) -> str:
    """Counts, for people."""
    refused_by = table.read(["refused_by"])["refused_by"]
    count = compute.sum(compute.not_equal(refused_by, LISTED)).as_py() or 0
    ignored = f"; ignored: {said}" if (said := passed_by(table)) else ""
    counts = "".join(f"; {name.replace('_', ' ')}: {number}" for name, number in table.facts["counts"].items())
    return f"{refused_by.null_count} pictures, {count} refused{counts}{ignored}"


def passed_by(table: Table) -> str:
    """What the listing has passed by, by kind; empty for nothing."""
    return ", ".join(f"{number} {kind}" for kind, number in Counter(table.facts["ignored"]).most_common())


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend."""

    def work() -> str:
        table = scan(read_words(Command, arguments, "scan"))
        return f"{table.folder}: {summary(table)}"

    return command(work)


if __name__ == "__main__":
    sys.exit(main())
