"""Command lines: paths of all programs here, and what label, split and pair share: a table in, a section of a build's
config, a table out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pydantic
import tyro

from data_tools.stages import Table
from ztrain.errors import InputError
from ztrain.files import expand
from ztrain.terminal import command
from ztrain.yamls import describe_errors, load_yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


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
CommandT = TypeVar("CommandT", bound="DataclassInstance")


def parse(kind: type[CommandT], arguments: Sequence[str] | None, program: str) -> CommandT:
    """A command of the words that a program was given. Raises InputError; tyro exits with 2 on unknown options."""
    return at_home(tyro.cli(kind, args=arguments, prog=program))


def at_home(command: CommandT) -> CommandT:
    """With ~ and $HOME in its paths, which no shell has seen in --out=~/made, as what they stand for."""
    paths = {each.name: value for each in fields(command) if isinstance(value := getattr(command, each.name), Path)}
    return replace(command, **{name: Path(expand(str(path))) for name, path in paths.items()})


def run_step(
    name: str,
    rules: type[RulesT],
    make: Callable[[Table, RulesT, Command], Table],
    say: Callable[[Table], str],
    arguments: Sequence[str] | None,
) -> int:
    """Exit status: 0 done, 2 something the user can mend."""

    def work() -> str:
        asked = parse(Command, arguments, f"data_tools.{name}")
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
