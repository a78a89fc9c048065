"""Pictures -> triplets that ztrain and `datasets` load.

    python -m data_tools.build --config configs/data/emoji_styles.yaml --out out/emoji_styles

In: a config with `contents` (style folders, see data_tools.styles) or with `pairs` (a table that names reference and
target, see data_tools.pairs). Out: `<out>/<split>/metadata.jsonl` with the pictures that it names, and
`build_report.json`. The folder appears whole or not at all.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pydantic
import tyro

from data_tools.output import digest_of, fingerprint, read_report, whole_folder, write_report, write_triplets
from data_tools.pairs import PairsConfig, read_pairs
from data_tools.styles import StylesConfig, read_styles
from ztrain.data import read_triplets
from ztrain.errors import InputError
from ztrain.yamls import describe_errors, load_yaml

REPORT_NAME = "build_report.json"
_RULES = 2  # part of the fingerprint: raise it when the same inputs come to give other triplets


@dataclass(frozen=True, slots=True, kw_only=True)
class StylesCommand:
    """Turn style folders with a contents table into training triplets."""

    config: Path
    """YAML file with the options below; an option on the command line wins."""
    out: Path
    """Folder to make. One that exists is refused, unless it holds exactly this build."""
    build: Annotated[StylesConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsCommand:
    """Turn a table of pairs into training triplets."""

    config: Path
    """YAML file with the options below; an option on the command line wins."""
    out: Path
    """Folder to make. One that exists is refused, unless it holds exactly this build."""
    build: Annotated[PairsConfig, tyro.conf.arg(name="")]


def build(command: StylesCommand | PairsCommand) -> dict[str, int]:
    """Run the whole build; returns triplets per output split. Raises InputError."""
    config, out = command.build, command.out.resolve()
    folder = command.config.parent
    found = read_pairs(config, folder) if isinstance(config, PairsConfig) else read_styles(config, folder)
    made_from = fingerprint(
        _RULES,
        config.model_dump(exclude={"images", "contents", "pairs"}),  # where the inputs lie changes nothing
        [(source.file_name, source.digest) for source in found.sources()],
        [digest_of(path) for path in found.files],
    )
    if report := read_report(out / REPORT_NAME, made_from):
        triplets = {split: len(read_triplets(str(out), split).triplets) for split in report["triplets"]}
        print(f"{out} is up to date")
        return triplets
    rows, facts = found.plan()
    report = {
        "fingerprint": made_from,
        "config": config.model_dump(),
        "pictures": len(found.sources()),
        "triplets": {split: len(of_split) for split, of_split in rows.items()},
        **facts,
    }
    with whole_folder(out) as building:
        write_triplets(building, rows)
        for path in found.files[1:]:
            shutil.copyfile(path, building / path.name)
        write_report(building / REPORT_NAME, report)
    for name, count in facts["counts"].items():
        if count:
            print(f"note: {name.replace('_', ' ')}: {count}, see {out / REPORT_NAME}", file=sys.stderr)
    return report["triplets"]


def read_command(arguments: Sequence[str]) -> StylesCommand | PairsCommand:
    """The command line over the config file. Raises InputError; tyro exits with 2 on unknown options."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?", type=Path)  # "?" leaves the complaint over no value to tyro
    path = finder.parse_known_args(arguments)[0].config
    if path is None:  # tyro explains what is missing
        return tyro.cli(StylesCommand, args=arguments)
    document = load_yaml(path)
    source, model = str(path), PairsConfig if "pairs" in document else StylesConfig
    try:
        config = model.model_validate(document)
        source = "command line"
        if isinstance(config, PairsConfig):
            pairs = PairsCommand(config=path, out=tyro.MISSING, build=config)
            return tyro.cli(PairsCommand, args=arguments, default=pairs)
        styles = StylesCommand(config=path, out=tyro.MISSING, build=config)
        return tyro.cli(StylesCommand, args=arguments, default=styles)
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error, source=source, model=model)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 built or up to date, 2 something the user can mend."""
    try:
        command = read_command(sys.argv[1:] if arguments is None else arguments)
        triplets = build(command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{command.out}: " + ", ".join(f"{split} {count}" for split, count in triplets.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
