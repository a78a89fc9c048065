"""Pictures -> triplets that ztrain and `datasets` load: all steps of data_tools, one after the other.

    python -m data_tools.build --config configs/data/emoji_styles.yaml --out out/emoji_styles

In: a config (data_tools.config). Out: a data set (data_tools.pack), whole or not at all, and beside it `<out>.work`,
the tables of the steps: a build that was stopped, or whose config has changed, makes only what is missing.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pyarrow.compute as compute
import tyro

from data_tools import scan
from data_tools.caption import caption
from data_tools.config import BuildConfig, read_config
from data_tools.dedup import dedup
from data_tools.embed import embed
from data_tools.filter import Filter, FilterRules
from data_tools.label import label
from data_tools.pack import check_free, from_table, pack
from data_tools.pair import pair
from data_tools.sources import LISTED
from data_tools.split import split
from data_tools.stages import ENGINES, Table, run_stage
from data_tools.step import read_words
from data_tools.triplets import LEFT_OUT_NAME
from ztrain.errors import InputError
from ztrain.files import given_path
from ztrain.overrides import lay_over
from ztrain.terminal import command
from ztrain.yamls import parse

_NAMED = 10  # pictures and folders that are passed by, in what a build prints


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Turn pictures into training triplets."""

    config: Path
    """YAML file with the options below; an option on the command line wins."""
    out: Path
    """Folder to make. One that exists is refused, unless it holds exactly this build."""
    build: Annotated[BuildConfig, tyro.conf.arg(name="")]
    work: Path | None = None
    """Folder of the steps' tables; None: <out>.work. It may be deleted at any time."""
    rows_per_shard: int = 512
    """Pictures in a shard of the scan, about; changes no result. Millions of pictures want 10,000."""
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: Ray Data, on a cluster that shares the folders."""
    workers: int | None = None
    """Processes or actors; None takes as many as there are cores, and one where a model is held."""


def build(command: Command) -> dict[str, int]:
    """Run the whole build; returns triplets per output split. Raises InputError."""
    folder, out = command.config.parent, command.out.resolve()
    config = command.build.at(folder)
    work = command.work or out.with_name(f"{out.name}.work")
    _check_places(config.sources, folder, out)
    tables = config.label.tables(folder)  # what is wrong with them is better known before hours of scanning
    table = _look(command, config, work)
    table = _tell(label(table, config.label, folder, work / "label"))
    table = _tell(split(table, config.split, work / "split"))
    table = _tell(pair(table, config.pair, work / "pair"))
    given = from_table(table, config.told(), tables)
    triplets = pack(given, config.pack, out)
    for name, count in given.about["counts"].items():
        if name != "pictures":
            print(f"note: {name.replace('_', ' ')}: {count}", file=sys.stderr)
    print(f"what was left out, and why: {out / LEFT_OUT_NAME}", file=sys.stderr)
    return triplets


def _check_places(sources: Sequence[str], folder: Path, out: Path) -> None:
    """Raises InputError for an `out` that is taken, or that the next scan would find."""
    check_free(out)
    for source in sources:
        place = folder / source
        if place.resolve() in (out, *out.parents):
            searched = f"{place}, which is searched for pictures"
            raise InputError(f"{out}: lies inside {searched}; choose another --out")


def _look(command: Command, config: BuildConfig, work: Path) -> Table:
    """The steps that look at pictures: scan, filter, embed, dedup, caption."""
    engine = ENGINES[command.engine]
    table = scan.scan(
        scan.Command(
            sources=config.sources,
            out=work / "scan",
            rules=config.scan,
            max_refused_share=config.max_refused_share,
            rows_per_shard=command.rows_per_shard,
            engine=command.engine,
            workers=command.workers,
            folder=command.config.parent,
            links=config.links,
        )
    )
    _tell(table)
    _tell_passed_by(table)
    rules, workers = config.filter, command.workers
    if rules != FilterRules() and not rules.has_scores:
        table = _tell(run_stage(Filter(rules), table, work / "filter", engine=engine, workers=workers))
    for column in config.embed:
        table = _tell(embed(table, column, work / f"embed-{column.column}", engine=engine, workers=workers or 1))
    if rules.has_scores:  # which embed has just made
        table = _tell(run_stage(Filter(rules), table, work / "filter", engine=engine, workers=workers))
    if (copies := config.copies()) is not None:
        table = _tell(dedup(table, copies, work / "dedup"))
    for settings in config.caption:
        of_column = work / f"caption-{settings.column}"
        table = _tell(caption(table, settings, of_column, engine=engine, workers=workers or 1))
    return table


def _tell_passed_by(table: Table) -> None:
    """What the listing has passed by: all of it by kind, the first by name."""
    if said := scan.passed_by(table):
        print(f"note: ignored: {said}", file=sys.stderr)
    rows = table.read(["name", "refused", "refused_by"])
    named = rows.filter(compute.equal(rows["refused_by"], LISTED))
    for row in named.slice(0, _NAMED).to_pylist():
        print(f"  {row['name']}: {row['refused']}", file=sys.stderr)
    if named.num_rows > _NAMED:
        print(f"  and {named.num_rows - _NAMED} more, in {LEFT_OUT_NAME}", file=sys.stderr)


def _tell(table: Table) -> Table:
    rows = sum(table.lengths())
    print(f"{table.folder.name}: {rows} rows", file=sys.stderr)
    return table


def read_command(arguments: Sequence[str]) -> Command:
    """The command line over the config file. Raises InputError; argparse exits with 2 on values of the wrong kind."""
    if {"-h", "--help"} & set(arguments):
        read_words(Command, ["--help"], "build")
    parser = argparse.ArgumentParser(prog="data_tools.build", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=given_path, required=True)
    parser.add_argument("--out", type=given_path, required=True)
    parser.add_argument("--work", type=given_path)
    parser.add_argument("--rows-per-shard", "--rows_per_shard", type=int)
    parser.add_argument("--engine", choices=list(ENGINES))
    parser.add_argument("--workers", type=int)
    options, overrides = parser.parse_known_args(arguments)
    config = read_config(options.config)
    if overrides:
        settings = lay_over(BuildConfig, config.model_dump(mode="json"), overrides, list(vars(options)))
        config = parse(BuildConfig, settings, "command line")
    return Command(build=config, **{name: value for name, value in vars(options).items() if value is not None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 built or up to date, 2 something the user can mend."""

    def work() -> str:
        given = read_command(sys.argv[1:] if arguments is None else arguments)
        triplets = build(given)
        return f"{given.out}: " + ", ".join(f"{split} {count}" for split, count in triplets.items())

    return command(work)


if __name__ == "__main__":
    sys.exit(main())
