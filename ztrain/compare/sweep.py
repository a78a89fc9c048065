"""`ztrain sweep`: every combination of some settings of the splice, drawn and judged on the same rows and seeds.

In: `sweep.axes`, keys of `encoders.`, `splice.` (that is compare.splice) and `sample.` with their values. Out, in
`sweep.output_dir`: what a comparison writes, and `best_splice.yaml`, the best setting as a preset: for --config, and
for --compare.presets.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from ztrain.compare.command import ComparisonPlan, carry_out
from ztrain.compare.judging import TruthLoader
from ztrain.compare.lineup import Entry, check_entries, fitting, plain
from ztrain.compare.record import Comparison
from ztrain.config import Config
from ztrain.errors import InputError
from ztrain.io.files import write_text
from ztrain.io.yamls import dump_yaml, parse
from ztrain.privacy import public_config

BEST_NAME = "best_splice.yaml"
_SHORT = {"hidden_index": "layer", "text_hidden_index": "text layer", "guidance_scale": "guidance", "scales": "scale"}
_Section = TypeVar("_Section", bound=pydantic.BaseModel)


def sweep(config: Config, truth: TruthLoader | None = None) -> Comparison:
    """Draws, judges and writes all combinations. `truth`: what loads judges.truth. Raises InputError."""
    if not config.sweep.axes:
        raise InputError("sweep.axes is empty: give values by key, such as encoders.hidden_index: [20, 28, 35]")
    folder = Path(config.sweep.output_dir)
    entries = [plain(config), *settings_of(config)]
    check_entries(entries)
    found = carry_out(
        config,
        ComparisonPlan(
            kind="sweep",
            title="Settings of the splice",
            folder=folder,
            entries=entries,
            candidates=frozenset({"splice", "setting"}),
            axes={key: list(values) for key, values in config.sweep.axes.items()},
        ),
        truth,
    )
    if found.best.column is not None:
        write_preset(entries[found.best.column], found, folder / BEST_NAME)
    return found


def settings_of(config: Config) -> Iterator[Entry]:
    """The splice as configured, then one entry for each combination."""
    keys = list(config.sweep.axes)
    if empty := next((key for key in keys if not config.sweep.axes[key]), None):
        raise InputError(f"sweep.axes {empty} has no values")
    yield Entry(
        label="splice",
        role="splice",
        adapters=(config.compare.splice,),
        encoders=config.encoders,
        sample=fitting(config.sample, (config.compare.splice,)),
    )
    for values in itertools.product(*config.sweep.axes.values()):
        yield _setting(config, dict(zip(keys, values, strict=True)))


def _setting(config: Config, chosen: Mapping[str, Any]) -> Entry:
    sections = {"encoders": config.encoders, "splice": config.compare.splice, "sample": config.sample}
    changed: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        if section not in sections or name not in type(sections[section]).model_fields:
            known = ", ".join(f"{each}.{field}" for each, s in sections.items() for field in type(s).model_fields)
            raise InputError(f"sweep.axes {key!r} is no such key; there are {known}")
        changed[section][name] = value
    where = ", ".join(f"{key} {value}" for key, value in chosen.items())
    return Entry(
        label=" · ".join(f"{_short(key)} {_told(value)}" for key, value in public_config(chosen).items()),
        role="setting",
        adapters=(_with(config.compare.splice, changed["splice"], where),),
        encoders=_with(config.encoders, changed["encoders"], where),
        sample=fitting(_with(config.sample, changed["sample"], where), (config.compare.splice,)),
        settings=dict(chosen),
    )


def _with(section: _Section, changed: Mapping[str, Any], where: str) -> _Section:
    """The section with some values changed, checked again."""
    return parse(type(section), section.model_dump(mode="json") | dict(changed), f"sweep.axes ({where})")


def _short(key: str) -> str:
    name = key.partition(".")[2]
    return _SHORT.get(name, name.replace("_", " "))


def _told(value: Any) -> str:
    match value:
        case None:
            return "default"
        case bool():
            return "on" if value else "off"
        case float():
            return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)


def write_preset(entry: Entry, found: Comparison, path: Path) -> Path:
    """The setting as a file for --config or --compare.presets."""
    keys = {key.partition(".")[2] for key in entry.settings if key.startswith("sample.")}
    document: dict[str, Any] = {
        "encoders": entry.encoders.model_dump(mode="json"),
        "adapters": [adapter.model_dump(mode="json") for adapter in entry.adapters],
    }
    if keys:
        document["sample"] = entry.sample.model_dump(mode="json", include=keys)
    told = (f"The best setting of a sweep: {found.best.found}", found.best.rule)
    words = "".join(f"# {' '.join(line.split())}\n" for line in told)
    write_text(path, words + dump_yaml(document), sync=True)
    return path
