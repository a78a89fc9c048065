"""Pictures -> triplets that ztrain and `datasets` load: all steps of data_tools, one after the other.

    python -m data_tools.build --config configs/data/emoji_styles.yaml --out out/emoji_styles

In: a config (data_tools.config). Out: a data set (data_tools.pack), whole or not at all, and beside it `<out>.work`,
the tables of the steps: a build that was stopped, or whose config has changed, makes only what is missing.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow.compute as compute
import tyro
from pydantic import BaseModel

from data_tools.caption import caption
from data_tools.config import BuildConfig, read_config
from data_tools.dedup import dedup
from data_tools.embed import embed
from data_tools.filter import FilterRules, filter
from data_tools.label import label
from data_tools.pack import check_free, from_table, pack, summary
from data_tools.pair import pair
from data_tools.scan import check_refused, scan
from data_tools.sources import LISTED, list_sources, passed_by
from data_tools.split import split
from data_tools.stages import ENGINES, Run, Table
from data_tools.step import Step, read_words
from data_tools.triplets import LEFT_OUT_NAME
from ztrain.errors import InputError
from ztrain.io.files import given_path
from ztrain.io.overrides import lay_over
from ztrain.io.yamls import parse
from ztrain.terminal import program

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
    run: tyro.conf.OmitArgPrefixes[Run] = Run()


def build(command: Command) -> dict[str, int]:
    """Run the whole build; returns triplets per output split. Raises InputError."""
    run, out = command.run, command.out.resolve()
    config = command.build.at(run.folder)
    work = command.work or out.with_name(f"{out.name}.work")
    _check_places(config.sources, run.folder, out)
    tables = config.label.tables(run.folder)  # what is wrong with them is better known before hours of scanning
    table = list_sources(config.sources, work / "scan/listing", run.folder, command.rows_per_shard, config.links)
    table = scan(table, config.scan, work / "scan", run)
    check_refused(table, config.max_refused_share)
    _print_rows(table)
    _print_passed_by(table)
    for name, step, rules in steps(config):
        table = step(table, rules, work / name, run)
        _print_rows(table)
    given = from_table(table, config.told(), tables)
    triplets = pack(given, config.pack, out)
    for name, count in given.about["counts"].items():
        if name != "pictures":
            print(f"note: {name.replace('_', ' ')}: {count}", file=sys.stderr)
    print(f"what was left out, and why: {out / LEFT_OUT_NAME}", file=sys.stderr)
    return triplets


def steps(config: BuildConfig) -> Iterator[tuple[str, Step[Any], BaseModel]]:
    """All that is done with scanned pictures, in order: the folder of a step's table, the step, and its rules."""
    limits = config.filter
    if limits != FilterRules() and not limits.has_scores:
        yield "filter", filter, limits
    for column in config.embed:
        yield f"embed-{column.column}", embed, column
    if limits.has_scores:  # which embed has just made
        yield "filter", filter, limits
    if (copies := config.copies()) is not None:
        yield "dedup", dedup, copies
    for settings in config.caption:
        yield f"caption-{settings.column}", caption, settings
    yield "label", label, config.label
    yield "split", split, config.split
    yield "pair", pair, config.pair


def _check_places(sources: Sequence[str], folder: Path, out: Path) -> None:
    """Raises InputError for an `out` that is taken, or that the next scan would find."""
    check_free(out)
    for source in sources:
        place = folder / source
        if place.resolve() in (out, *out.parents):
            searched = f"{place}, which is searched for pictures"
            raise InputError(f"{out}: lies inside {searched}; choose another --out")


def _print_rows(table: Table) -> None:
    print(f"{table.folder.name}: {sum(table.lengths())} rows", file=sys.stderr)


def _print_passed_by(table: Table) -> None:
    """What the listing has passed by: all of it by kind, the first by name."""
    if said := passed_by(table):
        print(f"note: ignored: {said}", file=sys.stderr)
    rows = table.read(["name", "refused", "refused_by"])
    named = rows.filter(compute.equal(rows["refused_by"], LISTED))
    for row in named.slice(0, _NAMED).to_pylist():
        print(f"  {row['name']}: {row['refused']}", file=sys.stderr)
    if named.num_rows > _NAMED:
        print(f"  and {named.num_rows - _NAMED} more, in {LEFT_OUT_NAME}", file=sys.stderr)


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
    words = {name: value for name, value in vars(options).items() if value is not None}
    of_run = {name: words.pop(name) for name in ("engine", "workers") if name in words}
    return Command(build=config, run=Run(folder=options.config.parent, **of_run), **words)


@program
def main(arguments: Sequence[str] | None) -> str:
    """Exit status: 0 built or up to date, 2 something the user can mend."""
    command = read_command(sys.argv[1:] if arguments is None else arguments)
    return summary(command.out, build(command))


if __name__ == "__main__":
    sys.exit(main())
