"""Triplets -> a data set to train on or to pass on: a folder, WebDataset tars, or Parquet for the Hub.

    python -m data_tools.pack --data work/pair --out out/mine --format imagefolder
    python -m data_tools.pack --data out/mine --out out/tars --format webdataset

In: a table of data_tools.pair, or a folder of triplets. Out: every split in the same order, as
`<out>/<split>/metadata.jsonl` with its pictures, as `<out>/<split>-000000.tar`, ..., or as
`<out>/data/<split>-00000-of-00001.parquet`, ...; and beside them `manifest.json` (counts, licences, fingerprint, what
splits share), `SHA256SUMS`, `left_out.jsonl` and a data card. The folder appears whole or not at all.
"""

import hashlib
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import pydantic
import tyro
import xxhash
from tqdm import tqdm

from data_tools.card import card
from data_tools.layouts import LAYOUTS, Content, Files, Known, pictures_of, read
from data_tools.output import digest_of, fingerprint, read_manifest
from data_tools.sources import LISTED
from data_tools.split import shared
from data_tools.stages import TABLE_NAME, Table
from data_tools.step import read_words
from data_tools.triplets import LEFT_OUT_NAME, TablePicture, as_triplets, read_left_out, read_pairings
from ztrain.data.reading import MANIFEST_NAME, read_triplets
from ztrain.data.rows import Triplet
from ztrain.data.tars import FORMAT_VERSION, PACK_MANIFEST_NAME
from ztrain.errors import InputError
from ztrain.images import Picture
from ztrain.io.files import read_bytes, read_text, sha256_of, whole_folder
from ztrain.io.yamls import Strict
from ztrain.terminal import program

SUMS_NAME, CARD_NAME = "SHA256SUMS", "README.md"
_RULES = 3  # part of the fingerprint: raise it when the same inputs come to give other files
_NAMED = 100  # pictures and folders that were passed by, in a manifest; left_out.jsonl has all
_LICENCES = ("LICENSES.md", "LICENSE.md", "LICENSE.txt", "LICENSE")


class PackRules(Strict):
    """What the data set is written as."""

    format: Literal["imagefolder", "webdataset", "parquet"] = "imagefolder"
    """imagefolder: pictures and metadata.jsonl. webdataset: tars of <key>.json, .reference.<n>.<ext> and .target.<ext>.
    parquet: tables with Image columns."""
    max_shard_mib: int = pydantic.Field(default=256, ge=1)
    """Largest sum of pictures in one tar or table, in MiB; a single larger triplet gets a file of its own."""
    link: bool = True
    """imagefolder: pictures are hard links where the file system can, which take no room; what edits one in place edits
    the other too."""


class _Carried(pydantic.BaseModel):
    """What a manifest says that goes on with its triplets."""

    counts: dict[str, int]
    ignored: dict[str, int] = {}
    shared: dict[str, dict[str, int]]
    config: dict[str, Any]
    licences: list[Annotated[str, pydantic.Field(pattern=r"^LICENSE[\w.-]*$")]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """Triplets with all that is to be said of them."""

    splits: Mapping[str, Sequence[Triplet]]
    licences: Sequence[Path]
    left_out: str = ""
    """Lines of JSON."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest: counts, ignored, shared, config."""


def pack(given: Input, rules: PackRules, out: Path, *, allow_reference_is_target: bool = False) -> dict[str, int]:
    """Writes the data set, or finds it written; returns triplets per split. Raises InputError."""
    known: dict[str, Known] = {}
    every = [picture for of_split in given.splits.values() for triplet in of_split for picture in pictures_of(triplet)]
    for picture in tqdm(every, desc="reading", unit="picture", disable=None):
        if picture.name not in known:
            known[picture.name] = _known(picture)
    if not allow_reference_is_target:
        _check_references(given.splits, known)
    licences = _name_licences(given.licences)
    about = {"counts": {}, "ignored": {}, "shared": {}, "config": {}, **given.about}
    rows = {split: [_identity(triplet, known) for triplet in of_split] for split, of_split in given.splits.items()}
    digests = [(name, digest_of(path)) for name, path in licences.items()]
    # Files that are passed by decide no triplet: one more, which a file browser may leave there, changes nothing.
    lines = given.left_out.split("\n")
    left_out = [line for line in lines if f'"stage": "{LISTED}"' not in line]
    passed_by = [json.loads(line) for line in lines if f'"stage": "{LISTED}"' in line]
    counts = {name: count for name, count in about["counts"].items() if name != "passed_by"}
    made_from = fingerprint(_RULES, rules.model_dump(mode="json", exclude={"link"}), rows, digests, left_out,
                            {**about, "counts": counts, "ignored": None})  # fmt: skip
    if manifest := read_manifest(out / PACK_MANIFEST_NAME, made_from):
        _check_files(out, manifest)
        print(f"{out} is up to date")
        return dict(manifest["triplets"])
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": made_from,
        "format": rules.format,
        "triplets": {split: len(of_split) for split, of_split in given.splits.items()},
        "picture_files": len(known),
        "styles": _styles(given.splits),
        **about,
        "passed_by": {row["name"]: row["reason"] for row in passed_by[:_NAMED]},
        "licences": list(licences),
    }
    content = Content(given.splits, known, rules.link, rules.max_shard_mib << 20)
    with whole_folder(out) as building:
        files = LAYOUTS[rules.format](building, content)
        for name, path in licences.items():
            shutil.copyfile(path, building / name)
        (building / LEFT_OUT_NAME).write_text(given.left_out, encoding="utf-8")
        (building / CARD_NAME).write_text(card(manifest), encoding="utf-8")
        _finish(building, manifest, files)
    triplets: dict[str, int] = manifest["triplets"]
    return triplets


def check_free(out: Path) -> None:
    """Raises InputError where there is something that no data set of ours is: better known before hours of work."""
    if not out.resolve().name:
        raise InputError(f"{out}: cannot be a data set; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / PACK_MANIFEST_NAME).is_file() or out.is_file():
        raise InputError(f"{out}: already holds something else; remove it or choose another --out")


def _check_references(splits: Mapping[str, Sequence[Triplet]], known: Mapping[str, Known]) -> None:
    """Raises InputError where a target is among its own references, byte for byte."""
    every = [triplet for of_split in splits.values() for triplet in of_split]
    same = [
        triplet.where
        for triplet in every
        if known[triplet.target.name].digest in {known[picture.name].digest for picture in triplet.references}
    ]
    if same:
        raise InputError(
            f"{len(same)} of {len(every)} triplets have their target among their references, byte for byte, first: "
            f"{', '.join(same[:3])}; give other references, or --allow-reference-is-target to learn to reconstruct"
        )


def _known(picture: Picture) -> Known:
    """What was scanned, else by reading it."""
    if isinstance(picture, TablePicture):
        return Known(picture.stamp, picture.size if picture.size >= 0 else len(read(picture)), picture.path)
    data = read(picture)
    return Known(xxhash.xxh3_128_hexdigest(data), len(data))


def _finish(folder: Path, manifest: dict[str, Any], files: Files) -> None:
    """Writes the sums of all files, and the manifest with the sum of these."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = []
    for path in tqdm(paths, desc="hashing", unit="file", disable=None):
        lines.append(f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n")
    sums = "".join(lines).encode()
    (folder / SUMS_NAME).write_bytes(sums)
    manifest |= {"files": len(paths), "sha256": hashlib.sha256(sums).hexdigest(), "shards": files}
    text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    (folder / PACK_MANIFEST_NAME).write_text(text, encoding="utf-8")


def _identity(triplet: Triplet, known: Mapping[str, Known]) -> list[Any]:
    """All of a triplet that its files hold, for the fingerprint."""
    files = [(PurePath(picture.name).name, known[picture.name].digest) for picture in pictures_of(triplet)]
    return [triplet.prompt, triplet.columns, files]


def _styles(splits: Mapping[str, Sequence[Triplet]]) -> dict[str, dict[str, int]]:
    """Style -> split -> triplets, of rows that name their style."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for split, of_split in splits.items():
        for triplet in of_split:
            if isinstance(style := triplet.columns.get("style"), str):
                counts[style][split] += 1
    return {style: dict(of_style) for style, of_style in sorted(counts.items())}


def find_licences(folders: Iterable[Path]) -> list[Path]:
    """The licence file of each folder; or the LICENSES.md beside it, since a LICENSE there may be of something else."""
    found = []
    for folder in folders:
        beside = folder.parent / _LICENCES[0]
        paths = [path for path in (*(folder / name for name in _LICENCES), beside) if path.is_file()]
        found += paths[:1]
    return list(dict.fromkeys(found))


def _name_licences(paths: Iterable[Path]) -> dict[str, Path]:
    """Name in the data set -> file; equal files once."""
    named: dict[str, Path] = {}
    known: set[str] = set()
    for path in paths:
        if (digest := digest_of(path)) not in known:
            known.add(digest)
            name = path.name if path.name not in named else f"{path.stem}-{digest[:8]}{path.suffix}"
            named[name] = path
    return named


def _check_files(out: Path, manifest: dict[str, Any]) -> None:
    """Raises InputError where a file is missing or a shard has another size than it was given."""
    for of_split in manifest["shards"].values():
        for name, shard in of_split.items():
            path = out / name
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise InputError(f"{path}: is missing or damaged; remove {out} and pack again")
    try:
        names = [line.split("  ", 1)[1] for line in (out / SUMS_NAME).read_text(encoding="utf-8").split("\n")[:-1]]
    except (OSError, IndexError) as error:
        raise InputError(f"{out / SUMS_NAME}: is missing or damaged; remove {out} and pack again") from error
    for name in names:
        if not (out / name).is_file():
            raise InputError(f"{out / name}: is missing; remove {out} and pack again")


# --- where triplets come from -----------------------------------------------------------------------------------------


def from_table(table: Table, config: Mapping[str, Any], tables: Iterable[Path] = ()) -> Input:
    """Of a table of data_tools.pair. config: what the manifest says of it; tables: more files with licences beside."""
    left_out = "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in read_left_out(table))
    pairings = read_pairings(table)  # first: it refuses tables of anything else
    counts = {name: count for name, count in table.facts["counts"].items() if count}
    return Input(
        splits=as_triplets(pairings, table),
        licences=find_licences([*(path.parent for path in tables), *table.roots.values()]),
        left_out=left_out,
        about={
            "counts": counts,
            "ignored": dict(table.facts.get("ignored", {})),
            "shared": shared(pairings),
            "config": dict(config),
        },  # fmt: skip
    )


def from_folder(data: Path, text_only: bool) -> Input:
    """Of a folder of triplets. Raises InputError where there is none."""
    splits = {
        path.parent.name: read_triplets(str(data), path.parent.name, text_only=text_only).triplets
        for path in sorted(data.glob(f"*/{MANIFEST_NAME}"))
    }
    if not splits:
        raise InputError(f"{data}: no split with a {MANIFEST_NAME} there; build it with data_tools.build")
    about, left_out, licences = {}, "", [data / name for name in _LICENCES if (data / name).is_file()][:1]
    try:
        manifest = _Carried.model_validate_json(read_bytes(data / PACK_MANIFEST_NAME, "record"))
        about = manifest.model_dump(include={"counts", "ignored", "shared", "config"})
        licences = [data / name for name in manifest.licences]
        if strange := [path for path in licences if path.is_symlink() or not path.is_file()]:
            raise ValueError(f"{strange[0].name} is no file there")
        left_out = read_text(data / LEFT_OUT_NAME, "record")
    except FileNotFoundError:
        pass  # somebody's own folder has none
    except (OSError, ValueError) as error:
        raise InputError(f"{data / PACK_MANIFEST_NAME}: not a manifest of data_tools ({error}); remove it") from error
    return Input(splits=splits, licences=licences, left_out=left_out, about=about)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Write triplets as a data set."""

    data: Path
    """Table of data_tools.pair, or folder with one sub-folder per split, each with its metadata.jsonl."""
    out: Path
    """Folder to make. One that exists is refused, unless it holds exactly this data set."""
    rules: tyro.conf.OmitArgPrefixes[PackRules] = PackRules()
    text_only: bool = False
    """Leave references out: pictures with prompts, for data.text_only_data_dir. Of folders, to tars or Parquet."""
    allow_reference_is_target: bool = False
    """Take triplets whose target is among their references; training has data.allow_reference_is_target."""


@program
def main(arguments: Sequence[str] | None) -> str:
    """Exit status: 0 packed or up to date, 2 something the user can mend."""
    options = read_words(Command, arguments, "pack")
    data, out, is_table = options.data, options.out, (options.data / TABLE_NAME).exists()
    if options.text_only and is_table or options.rules.format == "imagefolder" and not is_table:
        raise InputError(
            f"{data}: imagefolder is made of a table of data_tools.pair, and text_only of a folder; choose"
            " --format webdataset or parquet for a folder"
        )
    check_free(out)
    if data.resolve() in out.resolve().parents:
        raise InputError(f"{out}: lies inside {data}; choose another --out")
    given = from_table(Table.open(data), {}) if is_table else from_folder(data, options.text_only)
    allowed = options.allow_reference_is_target
    return summary(out, pack(given, options.rules, out.resolve(), allow_reference_is_target=allowed))


def summary(out: Path, triplets: Mapping[str, int]) -> str:
    """Triplets of each split, for people."""
    return f"{out}: " + ", ".join(f"{split} {count}" for split, count in triplets.items())


if __name__ == "__main__":
    sys.exit(main())
