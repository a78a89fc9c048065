"""The command line that label, split and pair share: a table in, a section of a build's config, a table out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pydantic
import tyro

from data_tools.stages import Table
from ztrain.errors import InputError
from ztrain.terminal import command
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

    def work() -> str:
        asked = tyro.cli(Command, args=arguments, prog=f"data_tools.{name}")
        try:
            section = rules.model_validate(load_yaml(asked.config).get(name) or {})
        except pydantic.ValidationError as error:
            raise InputError(describe_errors(error, source=f"{asked.config}: {name}", model=rules)) from error
        table = make(Table.open(asked.table), section, asked)
        return f"{table.folder}: {say(table)}"

    return command(work)


def count_splits(table: Table) -> str:
    """Rows of each split, the largest first."""
    rows = table.read(["split"])["split"].value_counts().to_pylist()
    return ", ".join(f"{row['values']} {row['counts']}" for row in sorted(rows, key=lambda row: -row["counts"]))
