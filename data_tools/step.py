"""One form for all steps of a build, `step(source, rules, out, run)`, and their command lines.

In: the table of the step before, a section of a build's config, the folder of the table to make, and how to run. Out:
that table. Alone a step is a program whose rules are options, or a section of a config file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pydantic
import tyro

from data_tools.stages import Run, Table
from ztrain.io.files import given_path
from ztrain.io.yamls import load_yaml, parse
from ztrain.terminal import program

RulesT = TypeVar("RulesT", bound=pydantic.BaseModel)
ContraRulesT = TypeVar("ContraRulesT", bound=pydantic.BaseModel, contravariant=True)
CommandT = TypeVar("CommandT")
Main = Callable[..., int]
Summary = Callable[[Table, RulesT, Table], str]
"""What a program says of the table that it has made, by these rules, of another."""
_REGISTRY = tyro.constructors.ConstructorRegistry()


class Step(Protocol[ContraRulesT]):
    """A function of this form; its name is the program's, and its first sentence what the program is said to do."""

    def __call__(self, source: Table, rules: ContraRulesT, out: Path, run: Run, /) -> Table:
        """Raises InputError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paths:
    table: Path
    """Table of the step before it."""
    out: Path
    """Folder of the table to make. One that is there is gone on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options(_Paths, Generic[RulesT]):
    rules: tyro.conf.OmitArgPrefixes[RulesT]


@dataclass(frozen=True, slots=True, kw_only=True)
class _StageOptions(_Options[RulesT]):
    run: tyro.conf.OmitArgPrefixes[Run] = Run()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section(_Paths):
    config: Path
    """YAML file of data_tools.build; the section with the step's name is read."""


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


def read_words(
    kind: type[CommandT], arguments: Sequence[str] | None, step: str, description: str | None = None
) -> CommandT:
    """The words of a step's command line as a `kind`; paths may begin with ~. tyro exits with 2 on unknown options."""
    return tyro.cli(kind, args=arguments, prog=f"data_tools.{step}", description=description, registry=_REGISTRY)


def _does(step: Callable[..., Table]) -> str:
    """The first sentence of its docstring."""
    return (step.__doc__ or "").partition(". ")[0] + "."


def main_of_options(
    step: Callable[..., Table], rules: type[RulesT], say: Summary[RulesT], *, is_stage: bool = True
) -> Main:
    """The program of a step whose rules are options; is_stage: whether it has engines and workers."""
    kind: Any = _StageOptions[rules] if is_stage else _Options[rules]  # type: ignore[valid-type]

    @program
    def main(arguments: Sequence[str] | None) -> str:
        options = read_words(kind, arguments, step.__name__, _does(step))
        source = Table.open(options.table)
        table = step(source, options.rules, options.out, options.run if is_stage else Run())
        return f"{table.folder}: {say(table, options.rules, source)}"

    return main


def main_of_section(step: Callable[..., Table], rules: type[RulesT], say: Callable[[Table], str]) -> Main:
    """The program of a step whose rules are a section of a build's config."""

    @program
    def main(arguments: Sequence[str] | None) -> str:
        options, name = read_words(_Section, arguments, step.__name__, _does(step)), step.__name__
        section = load_yaml(options.config).get(name)
        parsed = parse(rules, {} if section is None else section, f"{options.config}: {name}")
        table = step(Table.open(options.table), parsed, options.out, Run(folder=options.config.parent))
        return f"{table.folder}: {say(table)}"

    return main


def count_splits(table: Table) -> str:
    """Rows of each split, the largest first."""
    rows = table.read(["split"])["split"].value_counts().to_pylist()
    return ", ".join(f"{row['values']} {row['counts']}" for row in sorted(rows, key=lambda row: -row["counts"]))
