"""Triplets as files: a folder with metadata.jsonl, WebDataset tars, or Parquet tables for the Hub.

In: splits of triplets. Out: files below a folder, and how many samples and bytes are in each. Pictures are copied byte
for byte, or linked where the file system can; equal triplets give equal files.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from data_tools.output import EXTENSIONS, arrow_file
from ztrain.data.reading import MANIFEST_NAME
from ztrain.data.rows import Triplet
from ztrain.errors import InputError
from ztrain.images import Picture

if TYPE_CHECKING:
    import datasets

_ROWS_PER_GROUP = 100  # of Parquet, as `datasets` writes pictures: what a reader must load for one row
_BYTES_PER_GROUP = 256 << 20  # far from the 2 GiB that one Arrow array of pictures can hold


@dataclass(frozen=True, slots=True)
class Known:
    """What the bytes of a picture are."""

    digest: str
    size: int
    """In bytes."""
    path: Path | None = None
    """The file that is this picture, where there is one to link."""


@dataclass(frozen=True, slots=True)
class Content:
    """What is to be written."""

    splits: Mapping[str, Sequence[Triplet]]
    known: Mapping[str, Known]
    """Of each picture by its name."""
    link: bool
    """Whether pictures that are files are linked."""
    max_shard_bytes: int


Files = dict[str, dict[str, dict[str, int]]]
"""Split -> file -> samples and bytes."""


def read(picture: Picture) -> bytes:
    """Raises InputError where it cannot be read."""
    try:
        return picture.read()
    except OSError as error:
        raise InputError(f"{picture.name}: cannot read the picture ({error.strerror or error})") from error


def pictures_of(triplet: Triplet) -> tuple[Picture, ...]:
    return (triplet.target, *triplet.references)


def _cut(
    triplets: Iterable[Triplet], known: Mapping[str, Known], max_bytes: int, max_rows: int | None = None
) -> Iterator[list[Triplet]]:
    """Runs of triplets with at most `max_bytes` of pictures, unless one alone has more, and `max_rows` rows."""
    run: list[Triplet] = []
    filled = 0
    for triplet in triplets:
        size = sum(known[picture.name].size for picture in pictures_of(triplet))
        if run and (filled + size > max_bytes or len(run) == max_rows):
            yield run
            run, filled = [], 0
        run.append(triplet)
        filled += size
    yield run


# ---- a folder


def write_folder(folder: Path, content: Content) -> Files:
    """`<split>/metadata.jsonl` with the pictures that it names under `images/`. OSError passes through."""
    # One key for all, since `datasets` cannot read a manifest with both.
    several = any(len(row.references) > 1 for of_split in content.splits.values() for row in of_split)
    files: Files = {}
    for split, of_split in content.splits.items():
        pictures = {picture.name: picture for triplet in of_split for picture in pictures_of(triplet)}
        for name, picture in tqdm(pictures.items(), desc=f"writing {split}", unit="picture", disable=None):
            place = folder / split / PurePosixPath(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            _put(picture, place, content.known[name].path if content.link else None)
        lines = "".join(json.dumps(_row(row, several), ensure_ascii=False) + "\n" for row in of_split)
        path = folder / split / MANIFEST_NAME
        path.write_text(lines, encoding="utf-8")
        files[split] = {f"{split}/{MANIFEST_NAME}": {"samples": len(of_split), "bytes": path.stat().st_size}}
    return files


def _put(picture: Picture, place: Path, source: Path | None) -> None:
    data = read(picture)  # also where it is linked: it must be what was scanned
    if source is not None:
        try:
            os.link(source.resolve(), place)  # resolved, for a link to a link would be no picture
            return
        except OSError:  # another file system, or one without hard links
            pass
    place.write_bytes(data)


def _row(triplet: Triplet, several: bool) -> dict[str, Any]:
    """The row as `ztrain.data.reading.read_triplets` takes it."""
    names = [reference.name for reference in triplet.references]
    return {
        **({"reference_file_names": names} if several else {"reference_file_name": names[0]}),
        "target_file_name": triplet.target.name,
        "prompt": triplet.prompt,
        **triplet.columns,
    }


# ---- WebDataset


def safe_webdataset() -> ModuleType:
    """The library in its safe mode: it neither unpickles members nor runs `pipe:` addresses."""
    os.environ["WDS_SECURE"] = "1"  # read once, when it is imported
    import webdataset

    assert webdataset.utils.enforce_security, "something has imported webdataset without its safe mode"
    return webdataset


def write_tars(folder: Path, content: Content) -> Files:
    """`<split>-000000.tar`, ..."""
    webdataset = safe_webdataset()

    def write(path: Path, triplets: Sequence[Triplet]) -> None:
        # A file, since the safe mode opens no paths; fixed times and owners, for equal bytes.
        with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for triplet in triplets:
                tar.write(_members(triplet))

    return _write_shards(folder, content, "{split}-{number:06d}.tar", write)


def _write_shards(
    folder: Path, content: Content, pattern: str, write: Callable[[Path, Sequence[Triplet]], None]
) -> Files:
    """pattern: of a file's name, with its split, its number, and the count of the split's shards."""
    files: Files = {}
    for split, of_split in content.splits.items():
        files[split] = {}
        shards = list(_cut(of_split, content.known, content.max_shard_bytes))
        for number, triplets in enumerate(tqdm(shards, desc=f"packing {split}", unit="shard", disable=None)):
            name = pattern.format(split=split, number=number, count=len(shards))
            write(folder / name, triplets)
            files[split][name] = {"samples": len(triplets), "bytes": (folder / name).stat().st_size}
    return files


def _members(triplet: Triplet) -> dict[str, str | bytes]:
    """A sample as WebDataset calls it: field -> bytes."""
    row = {"prompt": triplet.prompt, **triplet.columns}
    members: dict[str, str | bytes] = {"__key__": f"{triplet.index:06d}", "json": json.dumps(row).encode()}
    pictures = {"target": triplet.target, **{f"reference.{n}": each for n, each in enumerate(triplet.references)}}
    for field, picture in pictures.items():
        suffix = PurePath(picture.name).suffix.lower()
        members[field + (suffix if suffix in EXTENSIONS else ".img")] = read(picture)
    return members


# ---- Parquet


def write_tables(folder: Path, content: Content) -> Files:
    """`data/<split>-00000-of-00001.parquet`, ... as the Hub names them."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = _features([triplet for of_split in content.splits.values() for triplet in of_split])
    schema, several = features.arrow_schema, not isinstance(features.get("reference"), datasets.Image)
    (folder / "data").mkdir()

    def write(path: Path, triplets: Sequence[Triplet]) -> None:
        with arrow_file(path, "w") as file, pq.ParquetWriter(file, schema) as writer:
            for rows in _cut(triplets, content.known, _BYTES_PER_GROUP, _ROWS_PER_GROUP):
                cells = [_cells(triplet, several=several) for triplet in rows]
                writer.write_table(pa.Table.from_pylist(cells, schema=schema))

    return _write_shards(folder, content, "data/{split}-{number:05d}-of-{count:05d}.parquet", write)


def _features(triplets: Sequence[Triplet]) -> "datasets.Features":
    """The columns of all tables, further ones by their values; one kind for all splits, as `datasets` wants it."""
    import datasets
    import pyarrow as pa

    image = datasets.Image()
    features: dict[str, Any] = {"target": image, "prompt": datasets.Value("string")}
    if any(triplet.references for triplet in triplets):
        several = any(len(triplet.references) > 1 for triplet in triplets)
        features = {"reference": datasets.List(image) if several else image, **features}
    for name in dict.fromkeys(name for triplet in triplets for name in triplet.columns):
        if name in ("reference", "references", "target"):
            raise InputError(f"{triplets[0].where}: the key {name!r} is the name of a picture column; rename it")
        try:
            values = pa.array([triplet.columns.get(name) for triplet in triplets])
        except (ValueError, TypeError, OverflowError, NotImplementedError) as error:
            raise InputError(f"the key {name!r} has values that one Parquet column cannot hold ({error})") from error
        features |= datasets.Features.from_arrow_schema(pa.schema({name: values.type}))
    return datasets.Features(features)


def _cells(triplet: Triplet, *, several: bool) -> dict[str, Any]:
    """A row of the table; absent keys become null. Not through Image.encode_example: it drops bytes by file name."""
    images = [_image(picture) for picture in triplet.references]
    reference = {"reference": images if several else images[0]} if images else {}
    return {**reference, "target": _image(triplet.target), "prompt": triplet.prompt, **triplet.columns}


def _image(picture: Picture) -> dict[str, Any]:
    return {"bytes": read(picture), "path": PurePath(picture.name).name}


LAYOUTS: Mapping[str, Callable[[Path, Content], Files]] = {
    "imagefolder": write_folder,
    "webdataset": write_tars,
    "parquet": write_tables,
}
