"""Between pictures and a data set: what a picture is there for, which pictures make a triplet, and what is left out.

In: rows of data_tools.dedup or of any stage before it. Out: `Item`, a picture with its style, content and prompt, and
`Pairing`, a target with its references; both as tables, from which any later step goes on, each with a list of what was
left out and why. A pairing reads as ztrain's `Triplet`, whose pictures are still where they were.
"""

import builtins
import io
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeAlias

import pyarrow as pa
from PIL import Image
from pydantic import BeforeValidator, TypeAdapter

from data_tools.output import EXTENSIONS, fingerprint
from data_tools.sources import Reader
from data_tools.stages import Table, scratch_folder, write_shard
from ztrain.data.rows import Triplet
from ztrain.errors import InputError
from ztrain.images import HEAD, decode_image, sniff
from ztrain.io.files import read_text, write_text
from ztrain.io.forms import folded

LEFT_OUT_NAME = "left_out.jsonl"
PROMPTS = "prompts"
"""Column of a row with further captions of its target, a list of texts; training takes one of all at a time."""
_ROWS_PER_SHARD = 100_000
_LONGEST_PART, _LONGEST_PATH = 200, 1000  # bytes; most file systems end at 255, and at 4096 for all of a path

_PICTURE = pa.struct(
    [
        ("source", pa.string()),
        ("name", pa.string()),
        ("part", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("column", pa.string()),
        ("digest", pa.string()),
        ("pixels", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("likeness", pa.binary()),
        ("cluster", pa.string()),
    ]
)
PICTURE_COLUMNS = tuple(_PICTURE.names)
Columns: TypeAlias = Annotated[dict[str, Any], BeforeValidator(json.loads)]
"""Further columns of a row, which others may not have; in a table they are JSON."""


@dataclass(frozen=True, slots=True)
class Scanned:
    """A picture of a table, with what data_tools.scan knows of it."""

    source: str
    name: str
    part: str
    offset: int
    bytes: int
    """Of its file or member; -1 in a Parquet file."""
    column: str | None
    digest: str
    pixels: str
    width: int
    height: int
    likeness: builtins.bytes | None
    cluster: str
    """Equal for copies."""

    @property
    def key(self) -> str:
        """What tables and messages call it."""
        return f"{self.source}/{self.name}"

    @property
    def row(self) -> dict[str, Any]:
        """As a table of data_tools.dedup holds it."""
        return {name: getattr(self, name) for name in PICTURE_COLUMNS}


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of a picture, in pixels, perhaps mirrored: the reference of a picture that has no other."""

    left: int
    top: int
    right: int
    bottom: int
    mirrored: bool


@dataclass(frozen=True, slots=True)
class Reference:
    """A picture, or a part of one."""

    picture: Scanned
    cut: Cut | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A picture with what it is there for."""

    picture: Scanned
    way: str
    """Which way of labelling made it."""
    group: str | None = None
    """References come from the same group, a style or a clip; None: from nowhere else."""
    content: str | None = None
    """What is drawn: a reference shows another content."""
    whole: str | None = None
    """Never in two splits: the content, or the clip; None where nothing is known."""
    prompt: str | None = None
    """None: a reference for others, never a target."""
    split: str | None = None
    order: int = 0
    """Place in a clip."""
    gap: tuple[int, int] | None = None
    """Fewest and most places between a target and its reference."""
    references: tuple[Scanned, ...] | None = None
    """Where somebody has named them."""
    max_copy_score: float | None = None
    """A reference that is more like the target than this is none; None leaves that to data_tools.pair."""
    more: Columns = field(default_factory=dict)
    """Further columns, which travel to the triplet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """A triplet to be."""

    split: str
    target: Scanned
    references: tuple[Reference, ...]
    prompt: str
    columns: Columns


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A picture or row that is not in the result."""

    name: str
    stage: str
    """The program that left it out."""
    reason: str


_CUT = pa.struct([*((side, pa.int32()) for side in ("left", "top", "right", "bottom")), ("mirrored", pa.bool_())])
ITEMS = pa.schema(
    [
        ("picture", _PICTURE),
        *((name, pa.string()) for name in ("way", "group", "content", "whole", "prompt", "split")),
        ("order", pa.int64()),
        ("gap", pa.list_(pa.int64())),
        ("references", pa.list_(_PICTURE)),
        ("max_copy_score", pa.float64()),
        ("more", pa.string()),  # JSON
    ]
)
PAIRINGS = pa.schema(
    [
        ("split", pa.string()),
        ("target", _PICTURE),
        ("references", pa.list_(pa.struct([("picture", _PICTURE), ("cut", _CUT)]))),
        ("prompt", pa.string()),
        ("columns", pa.string()),  # JSON
    ]
)


_SCHEMAS = {Item: ITEMS, Pairing: PAIRINGS}
_READ_ITEMS, _READ_PAIRINGS = TypeAdapter(list[Item]), TypeAdapter(list[Pairing])


def read_items(table: Table) -> list[Item]:
    """Raises InputError for a table of something else."""
    return _READ_ITEMS.validate_python(table.read(ITEMS.names).to_pylist())


def read_pairings(table: Table) -> dict[str, list[Pairing]]:
    """Split -> its pairings in order. Raises InputError for a table of something else."""
    splits: dict[str, list[Pairing]] = {}
    for each in _READ_PAIRINGS.validate_python(table.read(PAIRINGS.names).to_pylist()):
        splits.setdefault(each.split, []).append(each)
    return splits


def write_rows(
    kind: type[Item] | type[Pairing], rows: Sequence[Item] | Sequence[Pairing], out: Path, source: Table, about: Any,
    left_out: Sequence[LeftOut], counts: Mapping[str, int],
) -> Table:  # fmt: skip
    """A table that all rows of `source` decide, with the list of what was left out; about: what else decides it."""
    schema = _SCHEMAS[kind]
    further = schema.names[-1]
    given = fingerprint(*about, source.shards)
    starts = range(0, len(rows), _ROWS_PER_SHARD)
    table = source.derived(out, [fingerprint(given, number) for number in range(len(starts))], {"counts": counts})
    with scratch_folder(out) as scratch:
        for shard, start in zip(table.shards, starts, strict=True):
            some = [asdict(row) for row in rows[start : start + _ROWS_PER_SHARD]]
            some = [row | {further: json.dumps(row[further], ensure_ascii=False)} for row in some]
            write_shard(pa.Table.from_pylist(some, schema), table.path(shard), scratch)
        lines = "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in left_out)
        write_text(out / LEFT_OUT_NAME, lines)
    table.close()
    return table


def read_left_out(table: Table) -> list[LeftOut]:
    """What this step and those before it have left out; nothing for tables of pictures."""
    path = table.folder / LEFT_OUT_NAME
    try:
        lines = read_text(path, "record").split("\n")[:-1]
        return [LeftOut(**json.loads(line)) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete the folder and run its stage again") from error


# --- as triplets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TablePicture:
    """A picture of a pairing, read from where it lies."""

    name: str
    """Path in the data set."""
    reference: Reference
    reader: Reader

    @property
    def stamp(self) -> str:
        return f"{self.reference.picture.digest} {self.reference.cut}"

    @property
    def size(self) -> int:
        """In bytes; -1 where only reading tells."""
        return -1 if self.reference.cut else self.reference.picture.bytes

    @property
    def path(self) -> Path | None:
        """The file that is the picture, where there is one."""
        picture = self.reference.picture
        return self.reader.path(picture.row) if picture.offset < 0 and not self.reference.cut else None

    def read(self) -> bytes:
        """Raises InputError where it is other than when it was scanned, OSError where it is gone."""
        picture, cut = self.reference.picture, self.reference.cut
        data = self.reader.read_same(picture.row)
        if cut is None:
            return data
        part = decode_image(data, picture.key).crop((cut.left, cut.top, cut.right, cut.bottom))
        if cut.mirrored:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        file = io.BytesIO()
        part.save(file, "PNG", optimize=False)
        return file.getvalue()


def as_triplets(pairings: Mapping[str, Sequence[Pairing]], table: Table) -> dict[str, list[Triplet]]:
    """Split -> triplets whose pictures have the names that they get in a data set. Raises InputError."""
    reader = Reader(table.roots)
    pictures = {each for split in pairings.values() for one in split
                for each in (Reference(one.target), *one.references)}  # fmt: skip
    names = _Names(reader, several=len({each.picture.source for each in pictures}) > 1)
    order = sorted(pictures, key=lambda each: (each.picture.key, each.picture.digest, str(each.cut)))
    known = {each: TablePicture(names.of(each), each, reader) for each in order}
    return {
        split: [
            Triplet(
                index=index,
                where=f"{table.folder}: {one.target.key}",
                prompt=one.prompt,
                references=tuple(known[each] for each in one.references),
                target=known[Reference(one.target)],
                columns=one.columns,
            )
            for index, one in enumerate(of_split)
        ]
        for split, of_split in pairings.items()
    }


class _Names:
    """Names of pictures in a data set: below images/, each once on every file system, whatever sources call them."""

    def __init__(self, reader: Reader, *, several: bool) -> None:
        """several: whether there are several sources, so that their labels are part of the names."""
        self._reader, self._several = reader, several
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def of(self, reference: Reference) -> str:
        picture = reference.picture
        plain = self._named(PurePosixPath(picture.key if self._several else picture.name), reference)
        digest = fingerprint(picture.key, picture.digest, str(reference.cut))
        for path in (plain, plain.with_stem(f"{plain.stem}-{digest[:8]}"), PurePosixPath(f"{digest}{plain.suffix}")):
            if self._is_free(path) and _is_portable(path):
                self._files.add(_folded(path))
                self._folders |= {_folded(parent) for parent in path.parents}
                return f"images/{path}"
        raise AssertionError(f"{picture.key}: two pictures have one digest")

    def _named(self, path: PurePosixPath, reference: Reference) -> PurePosixPath:
        if cut := reference.cut:
            sides = "-".join(map(str, (cut.left, cut.top, cut.right, cut.bottom)))
            return path.with_name(f"{path.name}-{sides}{'-mirrored' if cut.mirrored else ''}.png")
        if path.suffix.lower() in EXTENSIONS:
            return path
        return path.with_name(path.name + _extension(self._reader, reference.picture))

    def _is_free(self, path: PurePosixPath) -> bool:
        name, folders = _folded(path), {_folded(parent) for parent in path.parents}
        return name not in self._files and name not in self._folders and folders.isdisjoint(self._files)


def _folded(path: PurePosixPath) -> str:
    """Equal for what some file systems take for one name."""
    return folded(str(path))


def _is_portable(path: PurePosixPath) -> bool:
    """Whether a file may be called so, below a folder and without leaving it."""
    if path.is_absolute() or ".." in path.parts or len(str(path).encode()) > _LONGEST_PATH:
        return False
    if any(len(part.encode()) > _LONGEST_PART for part in path.parts):
        return False
    return not any(unicodedata.category(letter)[0] == "C" or letter in "\\\u2028\u2029" for letter in str(path))


def _extension(reader: Reader, picture: Scanned) -> str:
    """Of a picture without a file name, by its first bytes."""
    data = reader.read_same(picture.row)
    kind = (sniff(data[:HEAD], picture.name) or "img").lower()
    return {"jpeg": ".jpg", "heif": ".heic"}.get(kind, f".{kind}")
