"""A run of `ztrain train` as a report reads it: its settings, curves and previews, from the files of its folder.

In: config.yaml, env.json, metrics.jsonl, samples/, and where they are there best.json and export/. Out: `Run`, and its
previews as a `Comparison` whose columns are the base's and each step's. A folder that is still written to is read as
far as it is whole; what is left out, and numbers that nothing measured, are counted in `Run.warnings`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from ztrain.compare.record import LARGEST, Choice, Column, Comparison, Row, blank_wild, is_wild
from ztrain.data.rows import parse_object
from ztrain.errors import InputError
from ztrain.io.drawn import is_whole
from ztrain.io.files import read_bytes
from ztrain.io.yamls import Strict, describe_errors, dump_yaml, load_yaml
from ztrain.privacy import public_config, public_text
from ztrain.version import VERSION
from ztrain.weights.checkpoint import BEST_NAME

METRICS = "metrics.jsonl"
_BASE = {"no_image": ("no image", "none"), "splice": ("splice", "splice")}
_STEP = re.compile(r"step-([0-9]{8,15})")
_KEY = "key.json"

Scalar = bool | int | float | str | None


class _Part(Strict, extra="allow"):
    """What a report reads of a run's config.yaml, whatever version wrote it; the rest is only shown."""


class _Base(_Part):
    pretrained_model_name_or_path: str = ""


class _Models(_Part):
    base: _Base = _Base()


class _Settings(_Part):
    seed: int = 0
    data: dict[str, Any] = pydantic.Field(default_factory=dict)
    models: _Models = _Models()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the folder holds, without paths of this machine."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Scalar]
    rows: list[dict[str, float]]
    """metrics.jsonl: `step` and numbers."""
    best: Choice | None
    """What best.json says, without a column."""
    best_step: int | None
    is_exported: bool
    steps: list[int]
    """With whole previews."""
    base: list[str]
    """Of `no_image` and `splice` what is there."""
    prompts: list[str]
    """Of the previews' rows."""
    warnings: list[str]
    """What was left out, in sentences."""

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of the rows that have it."""
        found = [(row["step"], row[name]) for row in self.rows if name in row]
        return [step for step, _ in found], [value for _, value in found]

    def names(self) -> list[str]:
        return sorted({name for row in self.rows for name in row} - {"step"})


def is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file()


def read_run(folder: Path) -> Run:
    """Raises InputError naming the file at fault."""
    warnings: list[str] = []
    config = _read_config(folder / "config.yaml", warnings)
    rows = _read_rows(folder / METRICS, warnings)
    environment = _read_object(folder / "env.json", warnings)
    best, best_step = _read_best(folder / BEST_NAME, warnings)
    samples = folder / "samples"
    key = _key_of(samples / "base", warnings)
    prompts = _prompts(key, samples / "base" / _KEY)
    steps = _whole_steps(samples, key, len(prompts), warnings) if prompts else []
    base = [name for name in _BASE if prompts and (samples / "base" / f"{name}-0.png").is_file()]
    return Run(
        name=public_text(folder.resolve().name),
        config=config,
        environment=_flat(environment),
        rows=rows,
        best=best,
        best_step=best_step,
        is_exported=(folder / "export" / "adapter_config.json").is_file(),
        steps=steps,
        base=base,
        prompts=prompts,
        warnings=warnings,
    )


def _whole_steps(samples: Path, key: Mapping[str, Any], count: int, warnings: list[str]) -> list[int]:
    """Steps whose `count` previews are there, drawn for the same rows with the same settings as those of the base."""
    shared, steps = {name: value for name, value in key.items() if name != "splice"}, []
    for path in sorted(samples.glob("step-*")):
        if not (found := _STEP.fullmatch(path.name)) or not path.is_dir():
            continue
        if _key_of(path, warnings) not in (shared, {}):  # nothing: of a version that did not write it
            warnings.append(f"samples/{path.name}: drawn for other rows or with other settings; left out.")
        elif all(is_whole(path / f"{i}.png") for i in range(count)):
            steps.append(int(found[1]))
        else:
            warnings.append(f"samples/{path.name}: not all of its pictures are there and whole; left out.")
    return sorted(steps)


def _key_of(folder: Path, warnings: list[str]) -> dict[str, Any]:
    """What decided a set of previews; nothing where that is not there."""
    return _read_object(folder / _KEY, warnings) if (folder / _KEY).exists() else {}


def _tell_missing(name: str, keys: Sequence[str], warnings: list[str]) -> None:
    """Counts the numbers that `blank_wild` took away."""
    if keys:
        what = "1 number is" if len(keys) == 1 else f"{len(keys)} numbers are"
        warnings.append(f"{name}: {what} beyond {LARGEST:g} and shown as missing, the first at {keys[0]}.")


def _read_config(path: Path, warnings: list[str]) -> dict[str, Any]:
    """The run's settings without secrets and paths of this machine."""
    config = load_yaml(path)
    _tell_missing(path.name, blank_wild(config, str(path)), warnings)
    try:
        _Settings.model_validate(config)
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error, source=str(path), model=_Settings)) from error
    return public_config(config)


def _read_rows(path: Path, warnings: list[str]) -> list[dict[str, float]]:
    """The rows that are finished, without numbers that nothing measured."""
    try:
        lines = read_bytes(path, "record").split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); give the folder of a run") from error
    rows: list[dict[str, float]] = []
    missing: list[str] = []
    for number, line in enumerate(lines[:-1], start=1):
        row = parse_object(line, where=f"{path}:{number}")
        wrong = next((name for name, value in row.items() if type(value) not in (int, float)), None)
        if wrong is not None or type(row.get("step")) is not int or is_wild(row["step"]):
            what = f"{wrong} is no number" if wrong is not None else "step is no number of a step"
            raise InputError(f"{path}:{number}: {what}; restore the file or remove the line")
        wild = [name for name, value in row.items() if is_wild(value)]
        missing += [f"line {number}, {name}" for name in wild]
        row = {name: value for name, value in row.items() if name not in wild}
        if rows and row["step"] <= rows[-1]["step"]:
            raise InputError(
                f"{path}:{number}: step {row['step']} does not come after the one before; restore the file"
            )
        rows.append(row)
    _tell_missing(path.name, missing, warnings)
    if lines[-1]:
        warnings.append(f"{path.name}: the last line is not finished and left out.")
    return rows


def _read_object(path: Path, warnings: list[str]) -> dict[str, Any]:
    """With None in the place of numbers that nothing measured."""
    try:
        document = parse_object(read_bytes(path, "record"), where=str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); restore the run's file") from error
    _tell_missing(path.name, blank_wild(document, str(path)), warnings)
    return document


def _read_best(path: Path, warnings: list[str]) -> tuple[Choice | None, int | None]:
    """The choice and the step that it fell on; nothing where no step was scored."""
    if not path.exists():
        return None, None
    told = _read_object(path, warnings)
    step, rule, found = (told.get(key) for key in ("step", "rule", "found"))
    if not isinstance(rule, str) or not isinstance(found, str) or not (step is None or type(step) is int):
        raise InputError(f"{path}: has no step, rule and found; restore it, or remove it to report without a best step")
    return Choice(column=None, rule=public_text(rule), found=public_text(found)), step


def _flat(document: Mapping[str, Any], above: str = "") -> dict[str, Scalar]:
    """Scalars by dotted key; texts without paths of this machine, lists as JSON."""
    found: dict[str, Scalar] = {}
    for key, value in document.items():
        name = f"{above}{key}"
        match value:
            case dict():
                found |= _flat(value, f"{name}.")
            case str():
                found[name] = public_text(value)
            case list():
                found[name] = public_text(json.dumps(value, ensure_ascii=False))
            case _:
                found[name] = value
    return found


def _prompts(key: Mapping[str, Any], path: Path) -> list[str]:
    """Of the rows that are previewed; none where the run previews nothing."""
    if not key:
        return []
    rows = key.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, list) and row and isinstance(row[0], str) for row in rows):
        raise InputError(f"{path}: has no rows with prompts; restore it, or remove samples/ to report without previews")
    return [row[0] for row in rows]


def as_comparison(run: Run, kept: Sequence[int]) -> Comparison:
    """The previews: columns are those of the base and the `kept` steps; nothing is scored."""
    columns = [Column(name=name, label=_BASE[name][0], role=_role(name)) for name in run.base]
    columns += [Column(name=f"step-{step:08d}", label=f"step {step:,}", role="checkpoint", step=step) for step in kept]
    places = [f"samples/base/{name}-{{}}.png" for name in run.base]
    places += [f"samples/step-{step:08d}/{{}}.png" for step in kept]
    seed = run.config.get("seed", 0)
    rows = [
        Row(
            prompt=prompt, prompt_group=i, reference_group=i, where=f"preview {i}", seeds=[seed + i],
            references=[f"samples/base/reference-{i}.png"], target=f"samples/base/target-{i}.png",
        )
        for i, prompt in enumerate(run.prompts)
    ]  # fmt: skip
    nothing = Choice(column=None, rule="Nothing judged these previews.", found="There is no best column.")
    best = run.best or nothing
    if run.best_step is not None and run.best_step in kept:
        best = best.model_copy(update={"column": len(run.base) + list(kept).index(run.best_step)})
    return Comparison(
        ztrain_version=VERSION,
        kind="checkpoints",
        title=run.name,
        columns=columns,
        rows=rows,
        pictures=[[[place.format(i)] for i in range(len(rows))] for place in places],
        metrics=[],
        baseline=run.base.index("splice") if "splice" in run.base else None,
        style=None,
        adherence=None,
        best=best,
        best_splice=nothing,
        conditions=run.environment,
        data=_data_card(run.config),
        config=dump_yaml(run.config),
        loading=_loading(run) if run.is_exported else None,
        seconds=sum(row.get("perf/step_seconds", 0.0) for row in run.rows),
    )


def _role(name: str) -> Any:
    return _BASE[name][1]


def _data_card(config: Mapping[str, Any]) -> dict[str, Scalar]:
    return {key: value for key, value in config.get("data", {}).items() if not isinstance(value, dict | list)}


def _loading(run: Run) -> str:
    base = run.config.get("models", {}).get("base", {}).get("pretrained_model_name_or_path", "Tongyi-MAI/Z-Image")
    return f"""\
import torch
import ztrain
from diffusers import ZImagePipeline
from PIL import Image

pipe = ZImagePipeline.from_pretrained({base!r}, torch_dtype=torch.bfloat16).to("cuda")
adapted = ztrain.load_adapter(pipe, {run.name + "/export"!r})
images = adapted("a lighthouse", Image.open("reference.png"))
"""
