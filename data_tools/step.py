"""The command line that label, split and pair share: a table in, a section of a build's config, a table out."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pydantic
import tyro

from data_tools.stages import Table
from ztrain.errors import InputError
from ztrain.yamls import describe_errors, load_yaml


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One step of a build."""

    config: Path
    """YAML file of data_tools.build; the section with the step's name is read."""
    table: Path
    """Table of the step before it."""
    out: Path
    """Folder of the table to make."""


RulesT = TypeVar("RulesT", bound=pydantic.BaseModel)


def run_step(
    name: str,
    rules: type[RulesT],
    make: Callable[[Table, RulesT, Command], Table],
    say: Callable[[Table], str],
    arguments: Sequence[str] | None,
) -> int:
    """Exit status: 0 done, 2 something the user can mend."""
    try:
        command = tyro.cli(Command, args=arguments, prog=f"data_tools.{name}")
        section = load_yaml(command.config).get(name) or {}
        table = make(Table.open(command.table), rules.model_validate(section), command)
    except pydantic.ValidationError as error:
        print(f"error: {describe_errors(error, source=f'{command.config}: {name}', model=rules)}", file=sys.stderr)
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{table.folder}: {say(table)}")
    return 0


def count_splits(table: Table) -> str:
    """Rows of each split, the largest first."""
    rows = table.read(["split"])["split"].value_counts().to_pylist()
    return ", ".join(f"{row['values']} {row['counts']}" for row in sorted(rows, key=lambda row: -row["counts"]))
