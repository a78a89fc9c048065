"""Style folders with a contents table -> triplets that ztrain and `datasets` load.

    python -m data_tools.build --config configs/data/emoji_styles.yaml --out out/emoji_styles

In: `<images>/<style>/<id>.<extension>` and a CSV table (id, prompt, split). Out:
`<out>/<split>/metadata.jsonl` with the pictures that it names, and `build_report.json`. A target is one
content in one style; its references are other contents of the same style and split. The folder appears whole
or not at all.
"""

import argparse
import csv
import hashlib
import heapq
import json
import os
import random
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pydantic
import tyro
from tqdm import tqdm

from ztrain.data import MANIFEST_NAME, open_image, read_manifest
from ztrain.errors import InputError
from ztrain.yamls import describe_errors, load_yaml

REPORT_NAME = "build_report.json"
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"})
_RULES = 1  # part of the fingerprint: raise it when the same inputs come to give other triplets


class BuildConfig(pydantic.BaseModel):
    """Which pictures become triplets, and how many. Paths are relative to the config file."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    images: str
    """Folder with one sub-folder of pictures per style, relative to the config file."""
    contents: str
    """CSV table with one row per content, relative to the config file."""
    id_column: str = "id"
    """Column with the file name (without extension) that a content has in every style folder."""
    prompt_column: str = "prompt"
    """Column with the text that says what is drawn, without its style."""
    split_column: str = "split"
    """Column that says which split a content belongs to."""
    splits: Annotated[dict[str, str], pydantic.Field(min_length=1)] = {"train": "train", "val": "validation"}
    """Split in the table -> folder in the output; contents of other splits are left out."""
    styles: Annotated[list[str], pydantic.Field(min_length=1)] | None = None
    """Style folders to use; None takes all."""
    references_per_triplet: int = pydantic.Field(default=1, ge=1)
    """Reference pictures in each triplet."""
    triplets_per_target: int = pydantic.Field(default=1, ge=1)
    """Triplets made for each target, each with other references."""
    max_triplets_per_split: Annotated[int, pydantic.Field(ge=1)] | None = None
    """Cut each split to this many triplets, the styles evenly; None keeps all."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Decides references and row order."""
    max_reject_share: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Largest share of unreadable pictures to put up with: 0 fails on the first, 1 on none."""

    @pydantic.field_validator("splits")
    @classmethod
    def _folders_are_names(cls, splits: dict[str, str]) -> dict[str, str]:
        for folder in splits.values():
            if folder != Path(folder).name or folder.startswith("."):
                raise ValueError(f"{folder!r} must be the plain name of a folder")
        return splits


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Turn style folders with a contents table into training triplets."""

    config: Path
    """YAML file with the options below; an option on the command line wins."""
    out: Path
    """Folder to make. One that exists is refused, unless it holds exactly this build."""
    build: Annotated[BuildConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One content in one style."""

    style: str
    content: str
    prompt: str
    split: str
    """Name of the output folder."""
    path: Path
    digest: str
    """Hash of the file's bytes."""

    @property
    def file_name(self) -> str:
        """Where the picture lies in its split folder."""
        return f"images/{self.style}/{self.path.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A target with its references, one or more."""

    target: Picture
    references: tuple[Picture, ...]

    def row(self) -> dict[str, object]:
        """The manifest row, as `ztrain.data.read_manifest` takes it."""
        names = [reference.file_name for reference in self.references]
        contents = [reference.content for reference in self.references]
        single = len(names) == 1
        return {
            **({"reference_file_name": names[0]} if single else {"reference_file_names": names}),
            "target_file_name": self.target.file_name,
            "prompt": self.target.prompt,
            "style": self.target.style,
            "content": self.target.content,
            **({"reference_content": contents[0]} if single else {"reference_contents": contents}),
        }


def read_contents(path: Path, config: BuildConfig, counts: Counter[str]) -> dict[str, tuple[str, str]]:
    """Content id -> (prompt, output split); counts contents of other splits. Raises InputError."""
    contents: dict[str, tuple[str, str]] = {}
    columns = (config.id_column, config.prompt_column, config.split_column)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or ()
            for column in (column for column in columns if column not in header):
                raise InputError(f"{path}: no column {column!r}; its columns are: {', '.join(header)}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():  # DictReader's marks for a long and for a short row
                    raise InputError(f"{where}: must have {len(header)} fields, as many as the header")
                content, prompt, split = (row[column].strip() for column in columns)
                if not content or not prompt:
                    raise InputError(f"{where}: {columns[bool(content)]} is empty; fill it in")
                if content in contents:
                    raise InputError(f"{where}: the {config.id_column} {content!r} stands twice; keep one")
                contents[content] = (prompt, config.splits.get(split, ""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot read the contents table ({error}); it must be UTF-8 CSV") from error
    kept = {content: found for content, found in contents.items() if found[1]}
    counts["contents_of_other_splits"] = len(contents) - len(kept)
    return kept


def find_pictures(
    folder: Path, contents: dict[str, tuple[str, str]], config: BuildConfig, counts: Counter[str]
) -> list[Picture]:
    """Every picture of a known content, by style and name; counts the others. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; set images to the folder of the style folders")
    present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    styles = list(dict.fromkeys(config.styles or present))  # named twice is no more than once
    missing = [style for style in styles if style not in present]
    if missing or not styles:
        found = ", ".join(present) or "none"
        raise InputError(f"{folder}: no style folder {', '.join(missing) or 'at all'}; found: {found}")
    pictures: list[Picture] = []
    for style in tqdm(styles, desc="reading styles", unit="style", disable=None):
        of_style: dict[str, Picture] = {}
        for path in sorted((folder / style).iterdir()):
            if path.suffix.lower() not in EXTENSIONS or path.name[0] == "." or not path.is_file():
                continue
            if path.stem not in contents:
                counts["pictures_without_content"] += 1
                continue
            if path.stem in of_style:
                raise InputError(f"{path}: the same content as {of_style[path.stem].path.name}; keep one")
            prompt, split = contents[path.stem]
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            of_style[path.stem] = Picture(
                style=style, content=path.stem, prompt=prompt, split=split, path=path, digest=digest
            )
        if not of_style:
            raise InputError(f"{folder / style}: no picture of a content in the table; check ids and splits")
        pictures += of_style.values()
    return pictures


def drop_unreadable(pictures: list[Picture], max_share: float) -> tuple[list[Picture], dict[str, str]]:
    """The pictures that decode, and file -> reason for others. Raises InputError above `max_share` (0..1)."""
    readable: list[Picture] = []
    rejected: dict[str, str] = {}
    for picture in tqdm(pictures, desc="decoding", unit="picture", disable=None):
        try:
            open_image(picture.path)
        except InputError as error:
            rejected[f"{picture.style}/{picture.path.name}"] = str(error)
        else:
            readable.append(picture)
    share = len(rejected) / len(pictures)
    if share > max_share:
        first = "".join(f"\n  {reason}" for reason in list(rejected.values())[:10])
        raise InputError(
            f"{len(rejected)} of {len(pictures)} pictures ({share:.2%}) are unreadable, more than "
            f"max_reject_share {max_share:g} allows; mend or remove them, or raise it:{first}"
        )
    return readable, rejected


def make_pairs(pictures: list[Picture], config: BuildConfig, without_reference: Counter[str]) -> dict[str, list[Pair]]:
    """Output split -> its pairs in the order of the seed.

    Triplets that have no (further) reference are left out and counted in `without_reference` by split/style.
    Raises InputError for a split that comes out empty.
    """
    groups: dict[str, dict[str, list[Picture]]] = defaultdict(lambda: defaultdict(list))
    for picture in pictures:
        groups[picture.split][picture.style].append(picture)
    limit = config.max_triplets_per_split
    pairs = {}
    for split in dict.fromkeys(config.splits.values()):
        streams = [_pair_style(group, config, without_reference) for group in groups[split].values()]
        of_split: list[Pair] = []
        while streams and (limit is None or len(of_split) < limit):
            taken = [(stream, next(stream, None)) for stream in streams]  # one of each: a cut stays even
            streams = [stream for stream, pair in taken if pair]
            of_split += [pair for _, pair in taken if pair]
        if not of_split:
            raise InputError(
                f"split {split!r} gets no triplet: a style needs {config.references_per_triplet + 1} "
                "different pictures in it; check splits, the split column and the style folders"
            )
        of_split = of_split[:limit]
        random.Random(f"rows {config.seed} {split}").shuffle(of_split)
        pairs[split] = of_split
    return pairs


def _pair_style(pictures: list[Picture], config: BuildConfig, without_reference: Counter[str]) -> Iterator[Pair]:
    """Pairs of one style in one split: every target once, then every target again, in random order.

    A heap by use hands out the least used picture first, so that all are references about equally often.
    """
    name = f"{pictures[0].split}/{pictures[0].style}"
    chance = random.Random(f"references {config.seed} {name}")
    heap = sorted((0, chance.random(), position) for position in range(len(pictures)))
    seen = [{picture.digest} for picture in pictures]  # bytes that a target has met, first of all its own
    for _ in range(config.triplets_per_target):
        for target in chance.sample(range(len(pictures)), len(pictures)):
            passed, chosen = heap[:0], heap[:0]
            while heap and len(chosen) < config.references_per_triplet:
                entry = heapq.heappop(heap)
                digest = pictures[entry[2]].digest
                (passed if digest in seen[target] else chosen).append(entry)
                seen[target].add(digest)
            complete = len(chosen) == config.references_per_triplet
            for entry in passed:
                heapq.heappush(heap, entry)
            for uses, _order, position in chosen:
                heapq.heappush(heap, (uses + complete, chance.random(), position))
            if complete:
                references = tuple(pictures[position] for _uses, _order, position in chosen)
                yield Pair(target=pictures[target], references=references)
            else:
                without_reference[name] += 1


def fingerprint(config: BuildConfig, pictures: Sequence[Picture], files: Sequence[Path]) -> str:
    """Hash of all that decides the output: options, picture bytes and names, and the bytes of `files`."""
    inputs = [
        _RULES,
        config.model_dump(exclude={"images", "contents"}),  # where the inputs lie changes nothing
        [(picture.style, picture.path.name, picture.digest) for picture in pictures],
        [hashlib.blake2b(path.read_bytes()).hexdigest() for path in files],
    ]
    return hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()


def read_finished(out: Path, expected: str) -> dict[str, int] | None:
    """Triplets per split where `out` is this very build, None where `out` is free; else InputError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        report = json.loads((out / REPORT_NAME).read_bytes())
    except (OSError, ValueError):  # none, or none of ours
        report = None
    if not isinstance(report, dict) or report.get("fingerprint") != expected:
        raise InputError(
            f"{out}: already holds something else than this config and these inputs give; "
            "remove it or choose another --out"
        )
    return {split: len(read_manifest(out, split)) for split in report["triplets"]}


def write_build(out: Path, pairs: dict[str, list[Pair]], report: dict[str, object], licences: list[Path]) -> None:
    """Write all of the output beside `out` and rename it there, so that `out` is never seen half done."""
    building = out.with_name(f".{out.name}.{os.getpid()}.building")
    try:
        for split, of_split in pairs.items():
            folder = building / split
            used = {picture for pair in of_split for picture in (pair.target, *pair.references)}
            for picture in tqdm(used, desc=f"writing {split}", unit="picture", disable=None):
                place = folder / picture.file_name
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(picture.path.resolve(), place)  # resolved, for a link to a link would be no picture
                except OSError:  # another file system, or one without hard links
                    shutil.copyfile(picture.path, place)
            lines = "".join(json.dumps(pair.row(), ensure_ascii=False) + "\n" for pair in of_split)
            (folder / MANIFEST_NAME).write_text(lines, encoding="utf-8")
        for path in licences:
            shutil.copyfile(path, building / path.name)
        (building / REPORT_NAME).write_text(json.dumps(report, ensure_ascii=False, indent=2), encoding="utf-8")
        building.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot write it ({error}); free space or choose another --out") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)  # after the rename there is nothing left to remove


def build(command: Command) -> dict[str, int]:
    """Run the whole build; returns triplets per output split. Raises InputError."""
    config, out = command.build, command.out.resolve()
    table, images = (command.config.parent / given for given in (config.contents, config.images))
    counts: Counter[str] = Counter(contents_of_other_splits=0, pictures_without_content=0)
    pictures = find_pictures(images, read_contents(table, config, counts), config, counts)
    licences = [path for path in table.parent.glob("LICENSES.md") if path.is_file()]  # one or none
    made_from = fingerprint(config, pictures, [table, *licences])
    finished = read_finished(out, made_from)
    if finished:
        print(f"{out} is up to date")
        return finished
    readable, rejected = drop_unreadable(pictures, config.max_reject_share)
    without_reference: Counter[str] = Counter()
    pairs = make_pairs(readable, config, without_reference)
    counts["pictures_rejected"] = len(rejected)
    places = Counter(digest for digest, _split in {(picture.digest, picture.split) for picture in readable})
    counts["pictures_in_several_splits"] = sum(splits > 1 for splits in places.values())  # equal bytes
    counts["triplets_without_reference"] = without_reference.total()
    styles = {split: Counter(pair.target.style for pair in of_split) for split, of_split in pairs.items()}
    report = {
        "fingerprint": made_from,
        "config": config.model_dump(),
        "pictures": len(pictures),
        "triplets": {split: len(of_split) for split, of_split in pairs.items()},
        "triplets_per_style": styles,
        "counts": counts,
        "rejected": rejected,
        "without_reference": without_reference,
    }
    write_build(out, pairs, report, licences)
    for name, count in counts.items():
        if count:
            print(f"note: {name.replace('_', ' ')}: {count}, see {out / REPORT_NAME}", file=sys.stderr)
    return {split: len(of_split) for split, of_split in pairs.items()}


def read_command(arguments: Sequence[str]) -> Command:
    """The command line over the config file. Raises InputError; tyro exits with 2 on unknown options."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?", type=Path)  # "?" leaves the complaint over no value to tyro
    path = finder.parse_known_args(arguments)[0].config
    source = str(path)
    try:
        if path is None:  # tyro explains what is missing
            return tyro.cli(Command, args=arguments)
        config = BuildConfig.model_validate(load_yaml(path))
        source = "command line"
        return tyro.cli(Command, args=arguments, default=Command(config=path, out=tyro.MISSING, build=config))
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error, source=source, model=BuildConfig)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 built or up to date, 2 something the user can mend."""
    try:
        command = read_command(sys.argv[1:] if arguments is None else arguments)
        triplets = build(command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{command.out}: " + ", ".join(f"{split} {count}" for split, count in triplets.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
