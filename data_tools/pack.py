"""Triplet folders -> shards for storage that dislikes many small files: WebDataset tars or Parquet for the Hub.

    python -m data_tools.pack --data out/emoji_styles --out out/emoji_tars --format webdataset

In: a folder of data_tools.build. Out: every split in the same order, as `<out>/<split>-000000.tar`, ... or as
`<out>/data/<split>-00000-of-00001.parquet`, ..., and `pack_report.json`. Pictures are copied byte for byte, equal
inputs give equal shards, and the folder appears whole or not at all.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tqdm import tqdm

from data_tools.output import EXTENSIONS, digest_of, find_licences, fingerprint, read_report, whole_folder, write_report
from ztrain.data import MANIFEST_NAME, read_triplets
from ztrain.errors import InputError
from ztrain.images import Picture
from ztrain.rows import Triplet
from ztrain.tars import PACK_REPORT_NAME

if TYPE_CHECKING:
    import datasets

_RULES = 1  # part of the fingerprint: raise it when the same inputs come to give other shards
_ROWS_PER_GROUP = 100  # of Parquet, as `datasets` writes pictures: what a reader must load for one row
_BYTES_PER_GROUP = 256 << 20  # far from the 2 GiB that one Arrow array of pictures can hold
_Shards = dict[str, list[list[Triplet]]]  # split -> shards
_Files = dict[str, dict[str, dict[str, int]]]  # split -> file -> samples and bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Pack a folder of triplets into few large files."""

    data: Path
    """Folder with one sub-folder per split, each with its metadata.jsonl."""
    out: Path
    """Folder to make. One that exists is refused, unless it holds exactly these shards."""
    format: Literal["webdataset", "parquet"]
    """webdataset: tars of <key>.json, .reference.<n>.<ext> and .target.<ext>. parquet: tables with Image columns."""
    max_shard_mib: int = 256
    """Largest sum of pictures in one file, in MiB, at least 1; a single larger triplet gets a file of its own."""
    text_only: bool = False
    """Leave references out: pictures with prompts, for data.text_only_data_dir."""


def pack(command: Command) -> dict[str, int]:
    """Run the whole packing; returns triplets per split. Raises InputError."""
    data, out = command.data, command.out.resolve()
    if command.max_shard_mib < 1:
        raise InputError(f"max_shard_mib {command.max_shard_mib} must be at least 1")
    splits = {
        path.parent.name: read_triplets(str(data), path.parent.name, text_only=command.text_only).triplets
        for path in sorted(data.glob(f"*/{MANIFEST_NAME}"))
    }
    if not splits:
        raise InputError(f"{data}: no split with a {MANIFEST_NAME} there; build it with data_tools.build")
    licences = find_licences(data)
    known = _hash_pictures(triplet for of_split in splits.values() for triplet in of_split)
    rows = {split: [_identity(triplet, known) for triplet in of_split] for split, of_split in splits.items()}
    made_from = fingerprint(_RULES, command.format, command.max_shard_mib, rows, [digest_of(path) for path in licences])
    if report := read_report(out / PACK_REPORT_NAME, made_from):
        _check_shards(out, report)
        print(f"{out} is up to date")
        return report["triplets"]
    limit = command.max_shard_mib << 20
    shards = {split: list(_cut(of_split, known, limit)) for split, of_split in splits.items()}
    triplets = {split: len(of_split) for split, of_split in splits.items()}
    write = _write_tars if command.format == "webdataset" else _write_tables
    with whole_folder(out) as building:
        files = write(building, shards, known)
        for path in licences:
            shutil.copyfile(path, building / path.name)
        report = {"fingerprint": made_from, "format": command.format, "triplets": triplets, "shards": files}
        write_report(building / PACK_REPORT_NAME, report)
    return triplets


@dataclass(frozen=True, slots=True)
class _Known:
    """What the bytes of a picture are."""

    digest: str
    size: int
    """In bytes."""


def _hash_pictures(triplets: Iterable[Triplet]) -> dict[str, _Known]:
    """Name -> digest and size of every picture, each read once. Raises InputError."""
    known: dict[str, _Known] = {}
    for triplet in tqdm(triplets, desc="reading", unit="triplet", disable=None):
        for picture in (triplet.target, *triplet.references):
            if picture.name not in known:
                data = _read(picture)
                known[picture.name] = _Known(hashlib.blake2b(data, digest_size=16).hexdigest(), len(data))
    return known


def _read(picture: Picture) -> bytes:
    try:
        return picture.read()
    except OSError as error:
        raise InputError(f"{picture.name}: cannot read the picture ({error.strerror or error})") from error


def _identity(triplet: Triplet, known: Mapping[str, _Known]) -> list[Any]:
    """All of a triplet that its shard holds, for the fingerprint."""
    pictures = (triplet.target, *triplet.references)
    files = [(PurePath(picture.name).name, known[picture.name].digest) for picture in pictures]
    return [triplet.prompt, triplet.columns, files]


def _cut(
    triplets: Iterable[Triplet], known: Mapping[str, _Known], max_bytes: int, max_rows: int | None = None
) -> Iterator[list[Triplet]]:
    """Runs of triplets with at most `max_bytes` of pictures, unless one alone has more, and `max_rows` rows."""
    run: list[Triplet] = []
    filled = 0
    for triplet in triplets:
        size = sum(known[picture.name].size for picture in (triplet.target, *triplet.references))
        if run and (filled + size > max_bytes or len(run) == max_rows):
            yield run
            run, filled = [], 0
        run.append(triplet)
        filled += size
    yield run


# ---- WebDataset


def _webdataset() -> ModuleType:
    """The library in its safe mode: it neither unpickles members nor runs `pipe:` addresses."""
    os.environ["WDS_SECURE"] = "1"  # read once, when it is imported
    import webdataset

    assert webdataset.utils.enforce_security, "something has imported webdataset without its safe mode"
    return webdataset


def _write_tars(folder: Path, shards: _Shards, known: Mapping[str, _Known]) -> _Files:
    """Writes `<split>-000000.tar`, ... and says what is in them."""
    webdataset = _webdataset()
    files: _Files = {}
    for split, of_split in shards.items():
        files[split] = {}
        for number, triplets in enumerate(tqdm(of_split, desc=f"packing {split}", unit="shard", disable=None)):
            path = folder / f"{split}-{number:06d}.tar"
            # A file, since the safe mode opens no paths; fixed times and owners, for equal bytes.
            with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
                for triplet in triplets:
                    tar.write(_members(triplet))
            files[split][path.name] = {"samples": len(triplets), "bytes": path.stat().st_size}
    return files


def _members(triplet: Triplet) -> dict[str, str | bytes]:
    """A sample as WebDataset calls it: field -> bytes."""
    row = {"prompt": triplet.prompt, **triplet.columns}
    members: dict[str, str | bytes] = {"__key__": f"{triplet.index:06d}", "json": json.dumps(row).encode()}
    pictures = {"target": triplet.target, **{f"reference.{n}": each for n, each in enumerate(triplet.references)}}
    for field, picture in pictures.items():
        suffix = PurePath(picture.name).suffix.lower()
        members[field + (suffix if suffix in EXTENSIONS else ".img")] = _read(picture)
    return members


# ---- Parquet


def _write_tables(folder: Path, shards: _Shards, known: Mapping[str, _Known]) -> _Files:
    """Writes `data/<split>-00000-of-00001.parquet`, ... as the Hub names them and says what is in them."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = _features([triplet for of_split in shards.values() for shard in of_split for triplet in shard])
    schema, several = features.arrow_schema, not isinstance(features.get("reference"), datasets.Image)
    (folder / "data").mkdir()
    files: _Files = {}
    for split, of_split in shards.items():
        files[split] = {}
        for number, triplets in enumerate(tqdm(of_split, desc=f"packing {split}", unit="shard", disable=None)):
            path = folder / f"data/{split}-{number:05d}-of-{len(of_split):05d}.parquet"
            with pq.ParquetWriter(path, schema) as writer:
                for rows in _cut(triplets, known, _BYTES_PER_GROUP, _ROWS_PER_GROUP):
                    cells = [_cells(triplet, several=several) for triplet in rows]
                    writer.write_table(pa.Table.from_pylist(cells, schema=schema))
            files[split][f"data/{path.name}"] = {"samples": len(triplets), "bytes": path.stat().st_size}
    return files


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
    return {"bytes": _read(picture), "path": PurePath(picture.name).name}


def _check_shards(out: Path, report: dict[str, Any]) -> None:
    """Raises InputError where a shard is missing or has another size than it was given."""
    for of_split in report["shards"].values():
        for name, shard in of_split.items():
            path = out / name
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise InputError(f"{path}: is missing or damaged; remove {out} and pack again")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 packed or up to date, 2 something the user can mend."""
    command = tyro.cli(Command, args=arguments)
    try:
        triplets = pack(command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{command.out}: " + ", ".join(f"{split} {count}" for split, count in triplets.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
