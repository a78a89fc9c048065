"""The two tables that say which pictures are to be made: how the styles are drawn, and what the contents show.

In: styles.csv (id, prompt with {content} in it, if wanted negative_prompt, lora and lora_scale) and contents.csv (id,
prompt, split; further columns are left out). Out: their rows, checked, with LoRAs found, downloaded if need be, and
hashed.
"""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from data_tools.output import digest_of
from ztrain.data.csvs import cell, read_rows
from ztrain.errors import InputError
from ztrain.frozen.sources import Source
from ztrain.io.files import expand
from ztrain.io.forms import folded
from ztrain.io.tensors import open_tensors

_LORA_NAME = "pytorch_lora_weights.safetensors"  # diffusers' own
_Row: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Lora:
    """Weights that a style is drawn with."""

    file: Path
    name: str
    """Its file, folder or Hub id, without the path of this machine."""
    digest: str
    scale: float
    """1 is as trained, 0 is without it."""


@dataclass(frozen=True, slots=True)
class Style:
    """One row of the styles."""

    id: str
    prompt: str
    """With {content} where the content's prompt goes."""
    negative_prompt: str
    """Empty for none."""
    lora: Lora | None

    def about(self) -> dict[str, Any]:
        """All that decides its pictures, as JSON holds it."""
        worn = self.lora and {"name": self.lora.name, "digest": self.lora.digest, "scale": self.lora.scale}
        return {"prompt": self.prompt, "negative_prompt": self.negative_prompt, "lora": worn}


@dataclass(frozen=True, slots=True)
class Content:
    """One row of the contents."""

    id: str
    prompt: str
    split: str


def read_contents(path: Path) -> list[Content]:
    """Raises InputError."""
    return [Content(row["id"], row["prompt"], row["split"]) for _, row in _read(path, ("id", "prompt", "split"), None)]


def as_csv(contents: Sequence[Content]) -> str:
    """The table that `read_contents` reads. A cell that a spreadsheet would take for a formula begins with a space,
    which all readers here take off."""
    table = io.StringIO()
    rows = [[f" {cell}" if cell[0] in "=+-@" else cell for cell in astuple(content)] for content in contents]
    csv.writer(table, lineterminator="\n").writerows([("id", "prompt", "split"), *rows])
    return table.getvalue()


def read_styles(path: Path) -> list[Style]:
    """Raises InputError."""
    rows = _read(path, ("id", "prompt"), ("negative_prompt", "lora", "lora_scale"))
    return [_read_style(row, where, path.parent) for where, row in rows]


def _read_style(row: _Row, where: str, folder: Path) -> Style:
    if row["prompt"].count("{content}") != 1:
        raise InputError(f"{where}: the prompt {row['prompt']!r} must have {{content}} in it, once")
    place, scale = row.get("lora", ""), row.get("lora_scale", "")
    if scale and not place:
        raise InputError(f"{where}: lora_scale {scale} has no lora; give one, or leave it empty")
    lora = _read_lora(expand(place), scale or "1", where, folder) if place else None
    return Style(row["id"], row["prompt"], row.get("negative_prompt", ""), lora)


def _read_lora(place: str, scale: str, where: str, folder: Path) -> Lora:
    try:
        strength = float(scale)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise InputError(f"{where}: lora_scale {scale!r} is not a number; 1 is as trained, 0 is without it")
    file, local = _find_lora(place, where, folder), folder / place
    return Lora(file, local.resolve().name if local.exists() else place, digest_of(file), strength)


def _find_lora(place: str, where: str, folder: Path) -> Path:
    """The safetensors file of a LoRA: a file, the one of a folder, or that of a Hub id. Raises InputError."""
    path = folder / expand(place)
    if not path.exists():
        if path.suffix == ".safetensors" or not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
            raise InputError(f"{where}: the lora {place!r} is neither there, relative to the table, nor a Hub id")
        path = Source(place).local("*.safetensors")
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        chosen = [file for file in files if file.name == _LORA_NAME] or files
        if len(chosen) != 1:
            raise InputError(f"{where}: the lora {place!r} has {len(files)} .safetensors files; name one")
        path = chosen[0]
    try:
        with open_tensors(path):
            return path
    except InputError as error:
        raise InputError(f"{where}: the lora {place!r} cannot be read: {error}") from error


def _read(path: Path, required: Sequence[str], optional: Sequence[str] | None) -> list[tuple[str, _Row]]:
    """(file:line, row) of every row, stripped; required columns are filled, ids are plain names and stand once.

    optional: None takes any other column, and leaves it out. Raises InputError.
    """
    rows: list[tuple[str, _Row]] = []
    seen: set[str] = set()
    for where, row in read_rows(path, required, optional or ()):
        known = row if optional is None else (*required, *optional)
        if unknown := [name for name in row if name not in known]:
            raise InputError(f"{path}: unknown column {unknown[0]!r}; it may have: {', '.join(known)}")
        found = {name: cell(row, name, where=where) for name in required}
        found |= {name: cell(row, name, where=where, optional=True) for name in optional or ()}
        _check_id(found["id"], where, seen)
        rows.append((where, found))
    if not rows:
        raise InputError(f"{path}: has no rows; add one at least")
    return rows


def _check_id(name: str, where: str, seen: set[str]) -> None:
    if name[0] == "." or re.search(r"[\x00-\x1f/\\:]", name) or len(name.encode()) > 200:
        raise InputError(f"{where}: the id {name!r} names a file; give it without / \\ : and without a leading dot")
    if folded(name) in seen:  # names that look the same, or differ in capitals alone, are one file on some disks
        raise InputError(f"{where}: the id {name!r} stands twice; keep one")
    seen.add(folded(name))
