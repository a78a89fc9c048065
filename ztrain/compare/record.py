"""What a comparison found, as one file: columns x rows x seeds, their pictures, scores and differences.

`ztrain compare`, `ztrain sweep` and `--checkpoints` write a `Comparison` to `comparison.json`, beside the pictures it
names; `ztrain report` reads it. No absolute path is in it: names of pictures are relative to the file, models and data
are called by their public names.

Legend: C columns, R rows, S seeds, M metrics.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from ztrain.data.rows import parse_object
from ztrain.errors import InputError
from ztrain.io.files import read_bytes, write_json, write_text
from ztrain.io.yamls import Strict, describe_errors
from ztrain.metrics.intervals import Interval
from ztrain.weights.checkpoint import BEST_NAME

FILE_NAME = "comparison.json"

LARGEST = 1e100
"""Of numbers in records, either way: what lies beyond was measured by nobody, and no chart could hold it."""
_DEEPEST = 32  # levels of a record; ours have 6
_NUMBER = re.compile("[0-9]{1,15}")  # of a step

Direction = Literal["higher", "lower", "neither"]
Verdict = Literal["better", "worse", "undecided", "none"]
Role = Literal["none", "splice", "adapter", "control", "checkpoint", "setting"]


class Column(Strict):
    """A list of adapters and how it was sampled."""

    name: str
    """Short, unique, fit for a file name."""
    label: str
    """For people."""
    role: Role
    """none: no image; control: shuffled references, or a list that reads none; setting: a cell of a sweep."""
    adapters: list[dict[str, Any]] = []
    encoders: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    """Steps, guidance, shift, scales, strength."""
    settings: dict[str, bool | int | float | str | None] = {}
    """Of a sweep: what this cell has on each axis."""
    sees: Literal["own", "shuffled", "none"] = "own"
    of: int | None = None
    """Place of the column that this is the control of."""
    folder: str | None = None
    """Name of the exported adapter's folder."""
    step: int | None = None
    """Optimizer steps that it was trained for."""
    num_weights: int = 0
    """That were trained."""


class Row(Strict):
    """A prompt with its references."""

    prompt: str
    prompt_group: int
    """Rows with equal numbers share the prompt."""
    reference_group: int
    """Rows with equal numbers share the references."""
    where: str = ""
    """What messages call it."""
    references: list[str] = []
    """Pictures, relative to the file."""
    target: str | None = None
    style: str | None = None
    seeds: list[int]
    """S numbers: `ztrain sample --seed` starts from the same noise."""


class Model(Strict):
    """Who judged."""

    name: str
    revision: str | None = None
    weights: str
    """Hash of its weights."""


class Difference(Interval):
    """Paired, over the same rows."""

    verdict: Verdict
    """By the metric's direction, where the interval excludes 0; none: it has no direction, or no interval."""


class Metric(Strict):
    """One score of every picture (or of a whole column), with what it means."""

    name: str
    title: str
    definition: str
    low: float | None
    """Least possible value; None: unbounded."""
    high: float | None
    direction: Direction
    model: Model | None = None
    """None: pixels alone."""
    chance: float | None = None
    """What pictures get with another row's prompt or reference."""
    values: list[list[list[float | None]]] | None = None
    """C x R x S, null where a picture cannot tell; None: a score of whole columns."""
    means: list[Interval | None] = []
    """C: over rows, None where the column cannot be scored; empty until ranking.py has filled both."""
    differences: list[Difference | None] = []
    """C: to the baseline, whose own is None."""


class Choice(Strict):
    """The best column, by a rule that was fixed before."""

    column: int | None
    """None: no column fits the rule, or nothing judged."""
    rule: str
    """A sentence."""
    found: str
    """A sentence: what it has, or why there is none."""


class Comparison(Strict):
    """All of it."""

    format_version: Literal[1] = 1
    ztrain_version: str
    kind: Literal["compare", "sweep", "checkpoints"]
    title: str
    columns: list[Column]
    rows: list[Row]
    pictures: list[list[list[str]]]
    """C x R x S, relative to the file."""
    metrics: list[Metric]
    baseline: int | None
    """Place of the column that differences are taken to: the best of the splices. None: there is none."""
    style: str | None
    """Name of the metric that stands for likeness to the reference in headlines; None: nothing judged it."""
    adherence: str | None
    """The same for obedience to the prompt."""
    best: Choice
    best_splice: Choice
    axes: dict[str, list[bool | int | float | str | None]] = {}
    """Of a sweep."""
    conditions: dict[str, bool | int | float | str | None]
    """Base, steps, size, precision, machine, versions: in words and numbers, for a table."""
    data: dict[str, bool | int | float | str | None] = {}
    """The data set's own words: name, split, triplets, fingerprint, licence."""
    config: str
    """The resolved experiment as YAML, without paths of this machine."""
    loading: str | None = None
    """Python that loads the best adapter, or None."""
    seconds: float

    def metric(self, name: str) -> Metric:
        return next(metric for metric in self.metrics if metric.name == name)


def is_wild(value: object) -> bool:
    """Whether it is a number that no record of ours holds: NaN, infinite or beyond `LARGEST`."""
    return isinstance(value, int | float) and not -LARGEST <= value <= LARGEST


def blank_wild(document: dict[str, Any], where: str) -> list[str]:
    """Puts None in the place of each wild number of a JSON object, and gives their dotted keys.

    Raises InputError starting with `where` for absurd nesting, which would end whatever walks through it.
    """
    blanked: list[str] = []
    waiting: list[tuple[str, int, Any]] = [("", 1, document)]
    while waiting:
        above, depth, holder = waiting.pop()
        if depth > _DEEPEST:
            raise InputError(f"{where}: {above[:40]} is nested more than {_DEEPEST} deep; is it the right file?")
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(value, dict | list):
                waiting.append((f"{above}{key}.", depth + 1, value))
            elif is_wild(value):
                holder[key] = None
                blanked.append(f"{above}{key}")
    return blanked


def write_comparison(found: Comparison, folder: Path) -> Path:
    """Writes the file whole or not at all. Raises InputError."""
    path = folder / FILE_NAME
    write_text(path, found.model_dump_json(indent=1) + "\n", sync=True)
    return path


def read_comparison(path: Path) -> Comparison:
    """The record of a folder or a file. Raises InputError, also where a picture that it names is not below it."""
    file = path / FILE_NAME if path.is_dir() else path
    try:
        raw = read_bytes(file, "record")
    except OSError as error:
        raise InputError(f"{file}: cannot read it ({error.strerror}); give the folder of a comparison") from error
    document = parse_object(raw, where=str(file))  # a key twice, NaN, bad UTF-8
    if wild := blank_wild(document, str(file)):
        raise InputError(f"{file}: {wild[0]} is a number beyond {LARGEST:g}, which nothing measured; write it again")
    try:
        found = Comparison.model_validate_json(raw)
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error, source=str(file), model=Comparison)) from error
    _check(found, file)
    return found


def _check(found: Comparison, file: Path) -> None:
    columns, rows = len(found.columns), len(found.rows)
    shapes = [("pictures", found.pictures), *((metric.name, metric.values) for metric in found.metrics)]
    for name, table in shapes:
        seeds = [len(row.seeds) for row in found.rows]
        if table is not None and not _has_shape(table, columns, seeds):
            raise InputError(f"{file}: {name} are not columns x rows x seeds, {columns} x {rows}; write it again")
    for metric in found.metrics:
        if len(metric.means) != columns or len(metric.differences) != columns:
            raise InputError(f"{file}: {metric.name} has not one mean and difference for each column; write it again")
        if found.baseline is None and any(difference is not None for difference in metric.differences):
            raise InputError(f"{file}: {metric.name} has differences, and there is no baseline; write it again")
    places = [found.baseline, found.best.column, found.best_splice.column, *(c.of for c in found.columns)]
    if any(place is not None and not 0 <= place < columns for place in places):
        raise InputError(f"{file}: a place among the columns is out of range; write it again")
    names = {metric.name for metric in found.metrics}
    if any(name is not None and name not in names for name in (found.style, found.adherence)):
        raise InputError(f"{file}: style or adherence is no metric of this file; write it again")
    root = file.parent.resolve()
    for name in pictures_of(found):
        try:
            is_inside = root in (root / name).resolve().parents
        except (ValueError, OSError, RuntimeError):  # a NUL, links that go round
            is_inside = False
        if not is_inside:
            raise InputError(f"{file}: the picture {name!r} is outside of its folder")


def _has_shape(table: Sequence[Sequence[Sequence[Any]]], columns: int, seeds: Sequence[int]) -> bool:
    return len(table) == columns and all([len(row) for row in of_column] == list(seeds) for of_column in table)


def pictures_of(found: Comparison) -> list[str]:
    """Names of all pictures, each once."""
    drawn = [name for column in found.pictures for row in column for name in row]
    given = [name for row in found.rows for name in (*row.references, *([row.target] if row.target else []))]
    return list(dict.fromkeys([*given, *drawn]))


def read_best(path: Path, by: str) -> dict[str, list[float | None]]:
    """What was seen of each step by the same rows and judges; nothing where the file is not there or is damaged: then
    steps are marked from here on."""
    try:
        told = parse_object(read_bytes(path, "record"), where=str(path))
    except (OSError, InputError):
        return {}
    steps = told.get("steps")
    return steps if told.get("by") == by and isinstance(steps, dict) and all(map(_is_seen, steps.items())) else {}


def _is_seen(step: tuple[str, Any]) -> bool:
    """Whether it is the number of a step, with a likeness and a share or None."""
    number, values = step
    is_pair = isinstance(values, list) and len(values) == 2
    return (
        bool(_NUMBER.fullmatch(number))
        and is_pair
        and all(value is None or (type(value) in (int, float) and not is_wild(value)) for value in values)
    )


def write_best(run: Path, best: Choice, step: int | None, steps: Mapping[str, Any], by: str) -> Path:
    """Writes whole which step of a run is best, by which rule, and what was seen of each: likeness and share of the
    prompt's adherence that is kept. `by`: digest of rows and judges; figures of different ones are never mixed."""
    path = run / BEST_NAME
    document = {"step": step, "rule": best.rule, "found": best.found, "steps": dict(steps), "by": by}
    write_json(path, document, sync=True)
    return path
