"""One row of a data set as a `Triplet`, whatever layout it comes from, and strict readers of its parts.

Whatever is wrong with a row is an `InputError` that starts with its place; no name in a row becomes a path outside its
folder.
"""

import json
import os
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ztrain.errors import InputError
from ztrain.images import Picture, PictureFile
from ztrain.io.files import LIMITS, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Triplet:
    """One row: make `target` from `prompt` in the look of `references`."""

    index: int
    """Position among the usable rows of the split, from 0."""
    where: str
    """What messages call the row: file and line, archive and key, or number and table."""
    prompt: str
    """Not empty, without white space around it."""
    captions: tuple[str, ...] = ()
    """Others in its place, from the column `prompts`, which stays among `columns`; each of them once."""
    references: tuple[Picture, ...]
    """At least one; none where rows were read as text only."""
    target: Picture
    columns: dict[str, object]
    """The row's further keys as the file gave them, for example style and content."""


_UNSEEN_ENDS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u2060\ufeff"
"""White space of any script, zero-width spaces and the byte order mark."""
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and symbols to Unicode, drawn as nothing."""

RowReader = Callable[[int], Triplet]
"""Makes the triplet with this index, or raises InputError: reading a bad row must not end the reading of others."""


def parse_object(raw: bytes, *, where: str) -> dict[str, Any]:
    """One JSON object, strictly: UTF-8, no key twice, no NaN. Raises InputError starting with `where`."""
    try:
        row = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
        if b"\\ud" in raw.lower():  # an escape may be half of a surrogate pair, which no file could hold
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a duplicate key, NaN, absurd nesting
        raise InputError(f"{where}: not a row of JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    return row


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


def take_text(row: dict[str, Any], key: str, *, where: str) -> str:
    """Take a string that says something out of the row, without white space around it. Raises InputError."""
    if key not in row:
        raise InputError(f"{where}: the key {key!r} is missing; the row has {listed(row)}")
    return check_text(row.pop(key), key, where=where)


def other_captions(row: dict[str, Any], prompt: str, *, where: str) -> tuple[str, ...]:
    """What the row's optional key `prompts`, a list of texts, says besides `prompt`. Raises InputError."""
    texts = row.get("prompts")
    if texts is None:
        return ()
    if not isinstance(texts, list):
        raise InputError(f"{where}: prompts must be a list of texts, not {texts!r}")
    found = dict.fromkeys(check_text(text, f"prompts[{i}]", where=where) for i, text in enumerate(texts))
    return tuple(text for text in found if text != prompt)


def check_text(value: object, key: str, *, where: str, optional: bool = False) -> str:
    """The string without white space around it. Raises InputError for other types, and for strings that say nothing
    unless they are optional."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be text, not {value!r}")
    try:
        text = clean(value)
    except ValueError as error:
        raise InputError(f"{where}: {key} {error}") from error
    if not text and not optional:
        raise InputError(f"{where}: {key} is empty; write it or drop the row")
    return text


def clean(text: str) -> str:
    """The text without white space around it, "" where none of its letters can be seen: zero-width ones, for example.

    Raises ValueError, whose words follow the text's name, for NULs, which no text has: UTF-16 read as UTF-8 does.
    """
    if "\0" in text:
        raise ValueError("holds NULs, as text in UTF-16 does; save it as UTF-8")
    text = text.strip(_UNSEEN_ENDS)
    return text if any(map(_is_seen, text)) else ""


def _is_seen(letter: str) -> bool:
    category = unicodedata.category(letter)
    return category[0] not in "ZM" and category not in ("Cc", "Cf", "Cs") and letter not in _BLANK_LETTERS


def find_picture(folder: Path, name: str, *, where: str) -> PictureFile:
    """The existing file that a row names, inside `folder`. Raises InputError."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or PureWindowsPath(name).drive or ".." in pure.parts:
        raise InputError(f"{where}: {name!r} leaves the folder; give a path below {folder}")
    path = folder / pure
    if not os.path.isfile(path):  # unlike Path.is_file, also False for names too long for the file system
        fault = "is no regular file" if os.path.exists(path) else "is not"
        raise InputError(f"{where}: the picture {name!r} {fault} in {folder}; restore it or drop the row")
    return PictureFile(path)


def check_size(size: int, kind: Kind, *, where: str) -> None:
    """Of what lies in an archive or a table, before it is read. Raises InputError beyond the limit of its kind."""
    if size > LIMITS[kind]:
        raise InputError(f"{where}: has {size:,} bytes, more than the {LIMITS[kind]:,} that a {kind} may have")


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names for a message."""
    shown = [repr(name) for name in names]
    more = [f"{len(shown) - most} more"] if len(shown) > most else []
    return ", ".join(shown[:most] + more) or "nothing"


def one_line(sentence: str) -> str:
    """A name inside may hold a line feed, after which it could say anything."""
    return sentence.replace("\n", "\\n")


def refuse(sentence: str, index: int) -> Triplet:
    """A row that is known to be lost."""
    raise InputError(sentence)
