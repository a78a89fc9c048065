"""The command lines of the steps; of label, split and pair: a table in, a section of a build's config, a table out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pydantic
import tyro

from data_tools.stages import Table
from ztrain.files import given_path
from ztrain.terminal import command
from ztrain.yamls import load_yaml, parse

if TYPE_CHECKING:
    pass


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
CommandT = TypeVar("CommandT")
_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _paths_begin_at_home(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: given_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def read_words(kind: type[CommandT], arguments: Sequence[str] | None, step: str) -> CommandT:
    """The words of a step's command line; paths may begin with ~. tyro exits with 2 on unknown options."""
    return tyro.cli(kind, args=arguments, prog=f"data_tools.{step}", registry=_REGISTRY)


def run_step(
    name: str,
    rules: type[RulesT],
    make: Callable[[Table, RulesT, Command], Table],
    say: Callable[[Table], str],
    arguments: Sequence[str] | None,
) -> int:
    """Exit status: 0 done, 2 something the user can mend."""

    def work() -> str:
        asked = read_words(Command, arguments, name)
        given = load_yaml(asked.config).get(name)
        section = parse(rules, {} if given is None else given, f"{asked.config}: {name}")
        table = make(Table.open(asked.table), section, asked)
        return f"{table.folder}: {say(table)}"

    return command(work)


def count_splits(table: Table) -> str:
    """Rows of each split, the largest first."""
    rows = table.read(["split"])["split"].value_counts().to_pylist()
    return ", ".join(f"{row['values']} {row['counts']}" for row in sorted(rows, key=lambda row: -row["counts"]))
