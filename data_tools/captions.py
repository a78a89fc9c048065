"""Captions that somebody has written: which of the texts around a picture is its own.

In: what lies beside a picture, in the order in which it counts: `.txt`, `.caption`, `.json` with a key caption, text or
prompt, then the row of `metadata.jsonl` or `metadata.csv` (file_name and one of the same names) in its folder, or in
one above; of a picture in a Parquet file the cell beside it. Out: the caption and who says so, or why the picture
cannot be used.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.names import CAPTION_COLUMNS, CAPTION_TABLES, reason_of
from ztrain.data.csvs import Row, cell, read_table
from ztrain.data.rows import clean
from ztrain.errors import InputError
from ztrain.io.forms import folded, matched

GIVEN = ("sidecar ", "column ", *CAPTION_TABLES)
"""How `caption_from` begins where somebody has written the caption, and no model."""


def caption_of(
    texts: Iterable[tuple[str, bytes | InputError]], rows: Iterable[tuple[str, str]], counts: Counter[str]
) -> dict[str, Any]:
    """The columns caption and caption_from, or refused; nothing where nobody says anything.

    texts: who says it, as "sidecar .txt", and its bytes, or why there are none; rows: the same of tables, read already;
    counts: of captions that are given, and of those that another text contradicts.
    """
    said: list[tuple[str, str]] = []
    for whose, raw in texts:
        try:
            if isinstance(raw, InputError):
                raise raw
            said.append((whose, _text(raw, is_json=whose.endswith(".json"))))
        except ValueError as error:  # InputError is one
            return {"refused": f"its caption ({whose}) {error}, or remove it"}
    said = [(whose, text) for whose, text in (*said, *rows) if text]
    if not said:
        return {}
    counts["captions_given"] += 1
    joined = [text.replace("\n", " ") for _, text in said]
    counts["captions_that_another_file_contradicts"] += any(text != joined[0] for text in joined)
    return {"caption": said[0][1], "caption_from": said[0][0]}


def _text(raw: bytes, *, is_json: bool) -> str:
    """Raises ValueError, whose words follow the text's name."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8; save it as UTF-8") from error
    return _in_lines(clean(_of_json(text) if is_json else text))


def _in_lines(text: str) -> str:
    """Without empty lines, and without white space but single spaces: what lines are is for data_tools.label to say."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _of_json(text: str) -> str:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}); mend it") from error
    found = [document[name] for name in CAPTION_COLUMNS if document.get(name)] if isinstance(document, dict) else []
    if found and not isinstance(found[0], str):
        raise ValueError(f"must be text, not {type(found[0]).__name__}; mend it")
    if found and any("\ud800" <= letter <= "\udfff" for letter in found[0]):
        raise ValueError("has half of a surrogate pair in it; mend it")
    return found[0] if found else ""


class CaptionTable:
    """The captions of a folder and of those below it, by names of files."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.faults: list[tuple[str, str]] = []
        """Place and reason of what cannot be read: a row, or all of it."""
        self._captions: dict[str, str] = {}
        self._of_folder: dict[str, set[str]] = defaultdict(set)
        self._used: set[str] = set()
        try:
            for where, read in read_table(path, ["file_name"], CAPTION_COLUMNS):
                try:
                    self._add(read(), where)
                except InputError as error:
                    line = where.removeprefix(f"{path.parent}/")
                    self.faults.append((line, f"{str(error).removeprefix(f'{where}: ')}"))
        except InputError as error:
            self.faults.append((path.name, f"not read for captions: {reason_of(error, path)}"))

    def _add(self, row: Row, where: str) -> None:
        name = str(PurePosixPath(cell(row, "file_name", where=where).replace("\\", "/")))
        if not (columns := [column for column in CAPTION_COLUMNS if column in row]):
            raise InputError(f"{where}: has none of the columns {', '.join(CAPTION_COLUMNS)}")
        texts = (cell(row, column, where=where, optional=True) for column in columns)
        caption = next((_in_lines(text) for text in texts if text), "")
        if self._captions.setdefault(name, caption) != caption:
            raise InputError(f"{where}: the picture {name!r} stands twice with other words; the first row counts")
        self._of_folder[folded(name.rpartition("/")[0])].add(name)

    def of(self, folder: str, names: Sequence[str]) -> dict[str, str]:
        """Captions of pictures in `folder`, which is relative to the table's own, by their names in it."""
        path = {f"{folder}/{name}" if folder else name: name for name in names}
        found = matched(path.keys(), self._of_folder.get(folded(folder), set())).found
        self._used |= set(found.values())
        return {path[wanted]: self._captions[meant] for wanted, meant in found.items()}

    @property
    def without_picture(self) -> int:
        """Rows whose picture nobody has asked for."""
        return len(self._captions) - len(self._used)
