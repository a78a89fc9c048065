"""Checkpoints that are whole or not there: written beside, hashed, renamed, verified; only then are old ones removed.

In: tensors by file and a JSON state. Out: `<folder>/step-00000100/` with safetensors files, `state.json` and
`MANIFEST.json` (bytes and SHA-256 of each). Resuming takes the newest one whose hashes hold. No pickle anywhere; the
base model is referenced by its identity, never stored. What a run puts into one: `save` in train/run.py. Also: which
settings a resumed run may change.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from safetensors.torch import save_file
from torch import Tensor

from ztrain.adapters import as_saved
from ztrain.config import Config
from ztrain.errors import InputError
from ztrain.io import files
from ztrain.io.tensors import read_tensors
from ztrain.io.yamls import shorten_home

FORMAT_VERSION = 2
"""Runs whose first checkpoint is of format 1 (`began` in the state) go on as they were: run.py."""
MANIFEST = "MANIFEST.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")

FREE_ON_RESUME = (
    "output_dir",
    "resume_from_checkpoint",
    "models",  # may have moved; the identities of the models are compared instead
    "data.train_data_dir",  # may have moved; the samples' digest is compared instead
    "data.revision",
    "data.train_split",
    "data.text_only_data_dir",
    "data.text_only_split",
    "data.validation_split",
    "data.max_bad_share",
    "data.small_targets",
    "data.max_upscale",
    "data.allow_reference_is_target",
    "data.dataloader_num_workers",
    "cache",
    "train.train_batch_size",  # together: the global batch size is compared
    "train.gradient_accumulation_steps",
    "train.gradient_checkpointing",
    "train.compile",
    "memory",
    "train.max_train_steps",  # unless the learning rate depends on it
    "train.logging_steps",
    "train.hang_timeout_minutes",
    "train.checkpointing_steps",
    "train.checkpoints_total_limit",
    "validation",
    "tracking",
    "sample",
    "export",
    "judges",
    "compare",
    "sweep",
)
"""Keys, or sections, that a resumed run may change. Everything else decides what is trained."""

_BEFORE = {"train.group_by_tokens": False}
"""What runs did that began before a key existed, where its default does something else."""

BEST_NAME = "best.json"
"""In a run: which of its steps is best."""
_SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was read and whose hashes held. `tensors` by file name."""

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def publish(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> Path:
    """Writes one checkpoint whole or not at all, and reads its bytes back before it counts.

    Raises InputError where the disk does not take it; earlier checkpoints are then as they were.
    """
    final = folder / folder_name(step)
    needed = sum(tensor.nbytes for file in tensors.values() for tensor in file.values()) + (1 << 16)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder}: a checkpoint needs {needed:,} bytes and {free:,} are free; {KEPT}")
    try:
        with files.whole_folder(final, sync=True, replace=True) as writing:
            for name, content in tensors.items():
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in content.items()}, writing / name)
            _write(writing / STATE, {"format_version": FORMAT_VERSION, "step": step, **state})
            _write(writing / MANIFEST, {"files": {path.name: describe(path) for path in sorted(writing.iterdir())}})
    except InputError as error:
        said = error.__cause__ or error
        raise InputError(f"{final}: cannot write the checkpoint ({said}; it needs {needed:,} bytes); {KEPT}") from error
    check(final)
    return final


KEPT = "free some space or mend the folder, then resume: earlier checkpoints are untouched"


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}


def check(path: Path) -> None:
    """Raises InputError that names what is wrong with a checkpoint's files."""
    try:
        listed = dict(json.loads(files.read_text(path / MANIFEST, "json"))["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: no whole checkpoint: cannot read {MANIFEST} ({error})") from error
    for name, expected in {STATE: None, **listed}.items():
        if not (path / name).is_file() or describe(path / name) != expected:
            raise InputError(f"{path / name} is missing or damaged: its SHA-256 is not the one in {MANIFEST}")


def read(path: Path) -> Checkpoint:
    """A checkpoint, after `check`. Raises InputError; one of a newer format is refused too."""
    check(path)
    state = _state(path / STATE)
    names = json.loads(files.read_text(path / MANIFEST, "json"))["files"]
    tensors = {
        name: read_tensors(path / name, "take an older checkpoint") for name in names if name.endswith(".safetensors")
    }
    return Checkpoint(path, state["step"], state, tensors)


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(files.read_text(path, "json"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); take an older checkpoint") from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if version not in (1, FORMAT_VERSION):
        raise InputError(f"{path}: checkpoint format {version!r} is not {FORMAT_VERSION}; update ztrain")
    if type(state.get("step")) is not int:
        raise InputError(f"{path}: says no step; take an older checkpoint")
    if isinstance(config := state.get("config"), dict) and isinstance(adapters := config.get("adapters"), list):
        config["adapters"] = [as_saved(settings) for settings in adapters]
    return {"began": 1, **state}


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first, by the step in their names; clocks and dates say nothing."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.name)


def find(wanted: str, folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that `resume_from_checkpoint` means, and why newer ones were passed over.

    none: None. latest: the newest of `folder` that is whole, None where there are none at all; InputError where there
    are some and all are damaged, as a fresh start would hide the loss. Otherwise the folder of one checkpoint.
    """
    if wanted == "none":
        return None, []
    if wanted != "latest":
        return read(Path(wanted)), []
    passed: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return read(path), passed
        except InputError as error:
            passed.append(str(error))
    if passed:
        raise InputError(f"{folder}: no checkpoint is whole: {'; '.join(passed)}")
    return None, []


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and the one of the run's best step, if best.json names one.

    `folder`: `<run>/checkpoints`. Call it after the newest has been verified.
    """
    best = best_step(folder.parent)
    for path in checkpoints(folder)[:-keep]:
        if _step_of(path) != best:
            files.remove(files.condemn(path))


def best_step(run: Path) -> int | None:
    """What best.json names. None where it is not there, not readable or names no step: it never ends a run."""
    try:
        told = json.loads(files.read_text(run / BEST_NAME, "json"))
    except (OSError, ValueError, RecursionError):
        return None
    step = told.get("step") if isinstance(told, dict) else None
    return step if type(step) is int else None


def set_aside(folder: Path, above: int) -> list[Path]:
    """Moves checkpoints beyond a step, which a run that resumes there leaves behind, to `<folder>/abandoned/`.

    Otherwise they would count as the newest: kept in the place of what the run saves, and resumed from next time.
    """
    moved = []
    for path in checkpoints(folder):
        if _step_of(path) > above:
            place = folder / "abandoned" / path.name
            place.parent.mkdir(exist_ok=True)
            files.remove(place)
            os.rename(path, place)
            moved.append(place)
    return moved


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps a second trainer out of a run's folder; the kernel gives it back when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / ".lock.owner"
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        who = owner.read_text(encoding="utf-8").strip() if owner.is_file() else "another process"
        raise InputError(
            f"{folder}: {who} is training into this folder; wait for it, or name another output_dir"
        ) from error
    try:
        files.write_text(owner, f"process {os.getpid()} on {os.uname().nodename}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def frozen_differences(before: dict[str, Any], config: Config) -> list[str]:
    """`key: was -> is` for every setting that a resumed run may not change.

    A key that `before`, the saved settings, lacks had not been thought of when that run began: it counts as its
    default.
    """
    old, new = leaves_of(_with_defaults(before, config)), leaves_of(config.model_dump(mode="json"))
    began_with = leaves_of(before)
    old |= {key: was for key, was in _BEFORE.items() if key not in began_with}
    free = list(FREE_ON_RESUME)
    if config.train.lr_scheduler not in _SCHEDULES_WITHOUT_END:
        free.remove("train.max_train_steps")
    changed = []
    for key in sorted(set(old) | set(new)):
        if any(key == name or key.startswith(f"{name}.") for name in free) or old.get(key) == new.get(key):
            continue
        changed.append(f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}")
    return changed


def _with_defaults(saved: Any, now: Any) -> Any:
    """`saved` with the defaults of the keys that it lacks; `now`: the settings that stand in its place."""
    if isinstance(saved, list) and isinstance(now, list):
        return [_with_defaults(*pair) for pair in zip(saved, now, strict=False)] + saved[len(now) :]
    if not isinstance(saved, dict) or not isinstance(now, BaseModel):
        return saved
    filled = dict(saved)
    for name, field in type(now).model_fields.items():
        if name in saved:
            filled[name] = _with_defaults(saved[name], getattr(now, name))
        elif not field.is_required():
            filled[name] = to_jsonable_python(field.get_default(call_default_factory=True))
    return filled


def leaves_of(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; lists count by position, the home folder is ~ (earlier runs wrote it out)."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if entries is None:
        return {prefix: shorten_home(value) if isinstance(value, str) else value}
    inside: dict[str, Any] = {}
    for key, entry in entries:
        inside |= leaves_of(entry, f"{prefix}.{key}" if prefix else str(key))
    return inside or {prefix: value}


def optimizer_tensors(stored: Mapping[int, Any], names: Sequence[str]) -> tuple[dict[str, Tensor], dict]:
    """An optimizer's state by place as `<what>.<parameter>` tensors, and the JSON of the rest; `names`: in its own
    order. What it does with groups of weights, config and schedule say.

    8-bit optimizers nest their state: `<what>` is then a path with slashes. Tensors that several weights share, as
    their quantisation tables, are copied, because a safetensors file cannot say so.
    """
    tensors: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    seen: set[int] = set()
    for index, state in stored.items():
        for what, value in _flattened(state):
            key = f"{what}.{names[index]}"
            if isinstance(value, Tensor):
                tensors[key] = value.clone() if value.data_ptr() in seen else value
                seen.add(value.data_ptr())
            else:
                numbers[key] = value
    return tensors, {"numbers": numbers}


def _flattened(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def optimizer_state(names: Sequence[str], tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> dict[int, Any]:
    """The inverse of `optimizer_tensors`, for an optimizer over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    places = {name: index for index, name in enumerate(names)}
    for key, value in {**tensors, **rest["numbers"]}.items():
        what, name = key.split(".", 1)
        if name not in places:
            raise InputError(f"the checkpoint's optimizer knows a weight {name} that this run does not train")
        *path, last = what.split("/")
        inside = state.setdefault(places[name], {})
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = value
    return state
