"""Triplets wherever they lie: image folders, WebDataset tars, Parquet tables and data sets of the Hub.

In: a location and the name of a split. Out: a `Listing`: rows whose pictures have been found but not opened, and one
sentence for every row that cannot be used. Tars and tables: tars.py, tables.py.
"""

import glob
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ztrain.data.rows import (
    RowReader,
    Triplet,
    check_text,
    find_picture,
    listed,
    one_line,
    other_captions,
    parse_object,
    take_text,
)
from ztrain.data.tables import hub_rows, parquet_rows
from ztrain.data.tars import check_format, lost, packed_samples, tar_rows
from ztrain.errors import InputError
from ztrain.io.files import MAX_LINE, check_regular

MANIFEST_NAME = "metadata.jsonl"
"""The name that `datasets` gives the table of an image folder, so that the same folder loads there too."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Listing:
    """The rows of one split in order."""

    triplets: list[Triplet]
    rejected: list[str]
    """One sentence, naming it, for each row or sample that cannot be used."""


def read_triplets(
    location: str, split: str, revision: str | None = None, *, text_only: bool = False, max_bad_share: float = 0.0
) -> Listing:
    """The triplets of a split, in any layout that `location` has: told apart by what is there.

    - a folder with `<split>/metadata.jsonl`: rows of `prompt`, `target_file_name` and either `reference_file_name` or
      `reference_file_names`, each one name or a list of them, relative to the manifest;
    - WebDataset: plain tars `<split>-000000.tar`, ... or `<split>/*.tar`; a sample is `<key>.json` with the prompt,
      `<key>.target.<ext>` and `<key>.reference.<ext>` or `<key>.reference.0.<ext>`, ...;
    - Parquet: `data/<split>-00000-of-00001.parquet`, ... or the same without `data/`, with the columns `prompt`,
      `target` (Image) and `reference` or `references` (Image or list of Image);
    - otherwise the id of a Hub data set with those columns, at `revision` (branch, tag or commit).

    In each a row may have further captions in `prompts`, a list of texts. `text_only` reads prompts and targets and
    ignores references. Rows that cannot be used are `rejected`, up to `max_bad_share` (0..1) of all. Raises InputError
    beyond it, where no row is left, and for the layout as a whole.
    """
    place, rows = _find(location, split, revision, text_only)
    triplets: list[Triplet] = []
    rejected: list[str] = []
    for read in rows:
        try:
            triplets.append(read(len(triplets)))
        except InputError as error:
            rejected.append(one_line(str(error)))
    total = len(triplets) + len(rejected)
    if not total:
        raise InputError(f"{place}: there are no rows; give it at least one triplet")
    if not triplets or len(rejected) / total > max_bad_share:
        raise InputError(
            f"{place}: {len(rejected)} of {total} triplets cannot be used (at most max_bad_share {max_bad_share:g} is "
            f"allowed): {'; '.join(rejected[:3])}"
        )
    return Listing(triplets, rejected)


def _find(location: str, split: str, revision: str | None, text_only: bool) -> tuple[str, Iterator[RowReader]]:
    """What messages call the split, and its rows. Raises InputError where it is in no layout or in several."""
    root = Path(location)
    if not root.exists():
        if not _HUB_ID.fullmatch(location):
            raise InputError(f"{location}: no such folder, and not the id of a Hub data set (owner/name)")
        return f"{location}, split {split}", hub_rows(location, split, revision, text_only)
    if revision is not None:
        raise InputError(f"{location}: a folder has no revision {revision!r}; leave revision out")
    if not re.fullmatch(r"[^/]*[^/.][^/]*", split):
        raise InputError(f"{location}: split {split!r} must be a plain name, without slashes")
    name = glob.escape(split)  # a digit after the hyphen, for train-extra is another split than train
    layouts: dict[str, Callable[..., Iterator[RowReader]]] = {
        f"{name}/{MANIFEST_NAME}": _manifest_rows,
        f"{name}-[0-9]*.tar": tar_rows,
        f"{name}/*.tar": tar_rows,
        f"data/{name}-[0-9]*.parquet": parquet_rows,
        f"{name}-[0-9]*.parquet": parquet_rows,
    }
    found = {pattern: files for pattern in layouts if (files := sorted(root.glob(pattern)))}
    if len(found) > 1:
        raise InputError(f"{root}: holds split {split!r} several times, as {' and '.join(found)}; keep one of them")
    if not found:
        present = sorted(entry.name for entry in root.iterdir())[:8] if root.is_dir() else ["a file"]
        raise InputError(
            f"{root}: no split {split!r} there; expected one of {', '.join(layouts)}; found {listed(present)}"
        )
    check_format(root)
    [(pattern, files)] = found.items()
    place = str(files[0]) if len(files) == 1 else str(root / pattern)
    if pattern.endswith(MANIFEST_NAME):
        return place, _manifest_rows(files[0], text_only)
    packed = {path: count for path, count in packed_samples(root, split).items() if path.suffix == files[0].suffix}
    what = "archive" if files[0].suffix == ".tar" else "table"
    gone = [lost(path, f"the {what} is missing", count) for path, count in packed.items() if path not in files]
    return place, chain(layouts[pattern](files, root, split, text_only, packed), *gone)


def _manifest_rows(path: Path, text_only: bool) -> Iterator[RowReader]:
    try:
        for number, raw in enumerate(_lines(path), start=1):
            if raw.strip():
                yield partial(_read_line, raw, path.parent, f"{path}:{number}", text_only)
    except OSError as error:
        raise InputError(f"{path}: cannot read the manifest ({error.strerror})") from error


def _lines(path: Path) -> Iterator[bytes]:
    """Of a regular file, none beyond MAX_LINE, and never more than one in memory. Raises InputError, OSError."""
    check_regular(path)
    with path.open("rb") as file:
        number = 0
        while piece := file.readline(MAX_LINE + 1):
            if len(piece) > MAX_LINE:
                raise InputError(
                    f"{path}:{number + 1}: the line has more than {MAX_LINE:,} bytes; is it the right file?"
                )
            lines = piece.splitlines()  # of bytes: U+2028 inside a prompt is no line end
            number += len(lines)
            yield from lines


def _read_line(raw: bytes, folder: Path, where: str, text_only: bool, index: int) -> Triplet:
    row = parse_object(raw, where=where)
    names = _take_reference_names(row, text_only, where=where)
    target_name = take_text(row, "target_file_name", where=where)
    prompt = take_text(row, "prompt", where=where)
    return Triplet(
        index=index,
        where=where,
        prompt=prompt,
        captions=other_captions(row, prompt, where=where),
        references=tuple(find_picture(folder, name, where=where) for name in names),
        target=find_picture(folder, target_name, where=where),
        columns=row,  # the known keys have been taken out
    )


def _take_reference_names(row: dict[str, Any], text_only: bool, *, where: str) -> list[str]:
    """Take the names of the references out of the row, none if `text_only`. Raises InputError."""
    keys = ("reference_file_name", "reference_file_names")
    given = {key: value for key in keys if (value := row.pop(key, None)) is not None}
    if text_only:
        return []
    if not given:
        raise InputError(f"{where}: the key {keys[0]!r} is missing; the row has {listed(row)}")
    if len(given) == 2:
        raise InputError(f"{where}: has both {keys[0]} and {keys[1]}; keep one")
    [(key, value)] = given.items()
    names = value if isinstance(value, list) else [value]
    if not names:
        raise InputError(f"{where}: {key} must hold at least one name")
    return [check_text(name, key, where=where) for name in names]
