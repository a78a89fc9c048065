"""Triplets on disk: manifests and the pictures that they name.

In: a folder with one sub-folder per split, each holding `metadata.jsonl` and the pictures it names.
Out: `Triplet` rows. Whatever is wrong with a row is an `InputError` that names it.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ztrain.errors import InputError
from ztrain.images import Picture, PictureFile

MANIFEST_NAME = "metadata.jsonl"
"""The name that `datasets` gives the table of an image folder, so that the same folder loads there too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Triplet:
    """One row of a manifest: make `target` from `prompt` in the look of `references`."""

    index: int
    """Position among the rows of the manifest, from 0."""
    prompt: str
    """Not empty, without white space around it."""
    references: tuple[Picture, ...]
    """At least one."""
    target: Picture
    columns: dict[str, object]
    """The row's further keys as JSON gave them, for example style and content."""


def read_manifest(folder: Path, split: str) -> list[Triplet]:
    """Rows of `<folder>/<split>/metadata.jsonl` in file order; the pictures must exist but are not opened.

    A row is a JSON object with `prompt`, `target_file_name` and either `reference_file_name` or the list
    `reference_file_names`; paths are relative to the manifest and stay inside its folder. Blank lines are
    allowed. Raises InputError naming file and line for anything else.
    """
    path = folder / split / MANIFEST_NAME
    try:
        raw_lines = path.read_bytes().splitlines()  # of bytes: U+2028 inside a prompt is no line end
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the manifest of split {split!r} ({error.strerror}); "
            "build the folder with data_tools.build or correct the data folder and split name"
        ) from error
    triplets: list[Triplet] = []
    for number, raw in enumerate(raw_lines, start=1):
        if raw.strip():
            triplets.append(_parse_row(raw, len(triplets), path.parent, where=f"{path}:{number}"))
    if not triplets:
        raise InputError(f"{path}: the manifest has no rows; give it at least one triplet")
    return triplets


def _parse_row(raw: bytes, index: int, folder: Path, *, where: str) -> Triplet:
    """One manifest line as a Triplet; `where` is file:line for messages. Raises InputError."""
    try:
        row = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a duplicate key, NaN, absurd nesting
        raise InputError(f"{where}: not a row of JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    names = _reference_names(row, where=where)
    target_name = _take_text(row, "target_file_name", where=where)
    prompt = _take_text(row, "prompt", where=where)
    return Triplet(
        index=index,
        prompt=prompt,
        references=tuple(_resolve(folder, name, where=where) for name in names),
        target=_resolve(folder, target_name, where=where),
        columns=row,  # the known keys have been taken out
    )


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict; ValueError where a key stands twice, as json would silently keep the last."""
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} stands twice in one object; keep one")
        result[key] = value
    return result


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON; write a number or null")


def _reference_names(row: dict[str, object], *, where: str) -> list[str]:
    """Take the reference file names, one or more, out of the row. Raises InputError."""
    if "reference_file_names" not in row:
        return [_take_text(row, "reference_file_name", where=where)]
    if "reference_file_name" in row:
        raise InputError(f"{where}: has both reference_file_name and reference_file_names; keep one")
    names = row.pop("reference_file_names")
    if not isinstance(names, list) or not names:
        raise InputError(f"{where}: reference_file_names must be a list of at least one name, not {names!r}")
    return [_check_text(name, "reference_file_names", where=where) for name in names]


def _take_text(row: dict[str, object], key: str, *, where: str) -> str:
    """Take a string that says something out of the row. Raises InputError."""
    if key not in row:
        found = ", ".join(map(repr, row)) or "no keys"
        raise InputError(f"{where}: the key {key!r} is missing; the row has {found}")
    return _check_text(row.pop(key), key, where=where)


def _check_text(value: object, key: str, *, where: str) -> str:
    """The string without white space around it. Raises InputError for other types and empty strings."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be text, not {value!r}")
    text = value.strip()
    if not text:
        raise InputError(f"{where}: {key} is empty; write it or drop the row")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{where}: {key} holds half of a surrogate pair and is not text; write it as UTF-8")
    return text


def _resolve(folder: Path, name: str, *, where: str) -> PictureFile:
    """The existing file that a manifest names, inside `folder`. Raises InputError."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or PureWindowsPath(name).drive or ".." in pure.parts:
        raise InputError(f"{where}: {name!r} leaves the split folder; give a path below {folder}")
    path = folder / pure
    if not os.path.isfile(path):  # unlike Path.is_file, also False for names too long for the file system
        raise InputError(f"{where}: the picture {name!r} is not in {folder}; restore it or drop the row")
    return PictureFile(path)
