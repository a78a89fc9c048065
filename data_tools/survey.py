"""A data set as people survey it: the rows of all splits in any layout, what is known beside them, what is lost.

In: a folder of docs/data.md, with `manifest.json` and a list of refused files where there are some. Out: a `DataSet`,
the sizes of its targets, and a choice of rows that is small enough to look at.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pydantic
import xxhash
from tqdm import tqdm

from data_tools.triplets import LEFT_OUT_NAME
from ztrain.data.reading import MANIFEST_NAME, read_triplets
from ztrain.data.rows import Triplet, listed, parse_object
from ztrain.data.tars import PACK_MANIFEST_NAME
from ztrain.errors import InputError
from ztrain.images import Picture, image_size, read_picture
from ztrain.io.files import read_bytes
from ztrain.io.yamls import Strict, describe_errors

SUREST_SHARE = 0.1
"""Of the chosen rows: those with the highest copy scores of all."""
_Model = TypeVar("_Model", bound=pydantic.BaseModel)
_SPLITS = (  # in the order of ztrain.data.reading
    re.compile(rf"([^/]+)/{re.escape(MANIFEST_NAME)}"),
    re.compile(r"([^/]+?)-[0-9][^/]*\.tar"),
    re.compile(r"([^/]+)/[^/]+\.tar"),
    re.compile(r"(?:data/)?([^/]+?)-[0-9]+(?:-of-[0-9]+)?\.parquet"),
)


class Manifest(Strict, extra="ignore"):
    """What the page shows of `manifest.json`; its other keys are none of its business."""

    fingerprint: str | None = None
    """Of all that decides the data set."""
    triplets: dict[str, int] = {}
    """Split -> rows."""
    counts: dict[str, int] = {}
    """What was counted while it was made."""
    ignored: dict[str, int] = {}
    """Files and folders of the sources that were no input, by kind."""
    shared: dict[str, dict[str, int]] = {}
    """Two splits -> what they were compared by -> how much of it they share."""
    licences: list[str] | None = None
    """Names of files."""


class RefusedFile(Strict, extra="ignore"):
    """A row of `left_out.jsonl`, or something that cannot be read now."""

    name: str
    """Of the file, as its stage calls it."""
    stage: str
    """Which step refused it."""
    reason: str
    """A sentence."""


@dataclass(frozen=True, slots=True)
class Row:
    """A triplet and what it is sorted and filtered by."""

    triplet: Triplet
    split: str
    style: str | None
    way: str | None
    score: float | None
    """Likeness of the target and its most alike reference, 0..1."""


@dataclass(slots=True)
class DataSet:
    """All rows of all splits, and what is known beside them."""

    folder: Path
    """Without links and dots, so that it can be taken out of every sentence."""
    rows: list[Row] = field(default_factory=list)
    unusable: list[RefusedFile] = field(default_factory=list)
    """Rows and pictures that cannot be read now."""
    refused: list[RefusedFile] = field(default_factory=list)
    manifest: Manifest | None = None

    def shorten(self, text: str) -> str:
        """Without the path of this machine."""
        return text.replace(f"{self.folder}{os.sep}", "").replace(str(self.folder), self.folder.name)

    def lose(self, name: str, reason: object) -> None:
        self.unusable.append(RefusedFile(name=self.shorten(name), stage="inspect", reason=self.shorten(str(reason))))


def find_splits(folder: Path) -> list[str]:
    """Names of all splits, in any layout, in order. Raises InputError where there is none."""
    try:
        files = [path.relative_to(folder).as_posix() for pattern in ("*", "*/*") for path in folder.glob(pattern)]
        present = sorted(entry.name for entry in folder.iterdir())[:8]
    except OSError as error:
        raise InputError(f"{folder}: cannot read the folder ({error.strerror}); correct --data") from error
    matches = (pattern.fullmatch(file) for file in files if file[0] != "." for pattern in _SPLITS)
    found = sorted({match[1] for match in matches if match})
    if not found:
        raise InputError(
            f"{folder}: no triplets there; expected <split>/{MANIFEST_NAME}, <split>-000000.tar or "
            f"data/<split>-00000-of-00001.parquet; found {listed(present)}"
        )
    return found


def read_data_set(folder: Path, *, text_only: bool = False) -> DataSet:
    """Rows, manifest and refused files; pictures are not opened. Raises InputError."""
    data = DataSet(folder.resolve())
    for split in find_splits(data.folder):
        # All bad rows are put up with: this is the page that shows them.
        listing = read_triplets(str(data.folder), split, text_only=text_only, max_bad_share=1.0)
        for sentence in listing.rejected:
            data.lose(f"a row of {split}", sentence)
        for triplet in listing.triplets:
            label = {name: text_of(triplet.columns.get(name)) for name in ("style", "way")}
            data.rows.append(Row(triplet, split, label["style"], label["way"], _score(triplet)))
    path = data.folder / PACK_MANIFEST_NAME
    if (raw := _bytes_of(path)) is not None:
        data.manifest = _checked(Manifest, raw, str(path))
    path = data.folder / LEFT_OUT_NAME
    lines = enumerate((_bytes_of(path) or b"").splitlines(), start=1)
    data.refused += [_checked(RefusedFile, line, f"{path}:{number}") for number, line in lines if line.strip()]
    return data


def _bytes_of(path: Path) -> bytes | None:
    """None where there is no such file."""
    try:
        return read_bytes(path, "record")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); restore it or remove it") from error


def _checked(model: type[_Model], raw: bytes, where: str) -> _Model:
    try:
        return model.model_validate(parse_object(raw, where=where))
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error, source=where, model=model)) from error


def text_of(value: object) -> str | None:
    """A column of any kind for people; None where the row has none."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _score(triplet: Triplet) -> float | None:
    value = triplet.columns.get("copy_score")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{triplet.where}: copy_score must be a number from 0 to 1, not {value!r}")
    return float(value)


def measure_targets(data: DataSet) -> list[tuple[int, int]]:
    """(width, height) of the targets of all rows, without those that cannot be read: they are added to `unusable`."""
    known: dict[str, tuple[int, int] | None] = {}
    sizes = []
    for row in tqdm(data.rows, desc="measuring", unit="triplet", disable=None):
        target = row.triplet.target
        if target.name not in known:
            try:
                known[target.name] = image_size(read_picture(target), target.name)
            except InputError as error:
                data.lose(target.name, error)
                known[target.name] = None
        if size := known[target.name]:
            sizes.append(size)
    return sizes


def look_for_copies(data: DataSet) -> None:
    """Adds rows whose target is among their references, byte for byte, to `unusable`: training refuses them."""
    digests: dict[str, str | None] = {}

    def digest_of(picture: Picture) -> str | None:
        if picture.name not in digests:
            try:
                digests[picture.name] = xxhash.xxh3_128_hexdigest(read_picture(picture))
            except InputError:  # counted where it is drawn or measured
                digests[picture.name] = None
        return digests[picture.name]

    for row in tqdm(data.rows, desc="comparing", unit="triplet", disable=None):
        target = digest_of(row.triplet.target) if row.triplet.references else None
        if target is not None and target in map(digest_of, row.triplet.references):
            data.lose(row.triplet.where, "its target is among its references, byte for byte; training refuses it")


def choose(rows: Sequence[Row], limit: int) -> list[int]:
    """Indices of at most `limit` rows in order: the surest copies of all, the rest evenly over splits and styles."""
    if len(rows) <= limit:
        return list(range(len(rows)))
    scored = sorted((-row.score, index) for index, row in enumerate(rows) if row.score is not None)
    chosen = {index for _, index in scored[: int(limit * SUREST_SHARE)]}
    groups: dict[tuple[str, str | None], list[int]] = {}
    for index, row in enumerate(rows):
        if index not in chosen:
            groups.setdefault((row.split, row.style), []).append(index)
    smallest_first = sorted(groups.values(), key=len)  # what a small group cannot use goes to the larger ones
    for place, group in enumerate(smallest_first):
        count = min(len(group), (limit - len(chosen)) // (len(smallest_first) - place))
        chosen |= {group[position * len(group) // count] for position in range(count)}
    return sorted(chosen)
