"""Style folders with a contents table -> triplets: the same things drawn in several styles.

In: `<images>/<style>/<id>.<extension>` and a CSV table (id, prompt, split). Out: rows to write. A target is one content
in one style; its references are other contents of the same style and split.
"""

import csv
import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
from tqdm import tqdm

from data_tools.output import EXTENSIONS, Row, Source, check_share, digest_of, find_licences
from ztrain.errors import InputError
from ztrain.images import open_image


class StylesConfig(pydantic.BaseModel):
    """Which drawings become triplets, and how many. Paths are relative to the config file."""

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
class Drawing:
    """One content in one style."""

    style: str
    content: str
    prompt: str
    split: str
    """Name of the output folder."""
    source: Source


@dataclass(frozen=True, slots=True)
class StyleFolders:
    """The drawings of known contents, found and hashed but not opened."""

    config: StylesConfig
    files: list[Path]
    """What decides the output besides the pictures: the table, and a LICENSES.md that travels with it."""
    drawings: list[Drawing]
    counts: Counter[str]

    def sources(self) -> list[Source]:
        return [drawing.source for drawing in self.drawings]

    def plan(self) -> tuple[dict[str, list[Row]], dict[str, Any]]:
        """Split -> rows in the order of the seed, and the keys of the report. Raises InputError."""
        readable, rejected = _drop_unreadable(self.drawings)
        check_share(rejected, len(self.drawings), self.config.max_reject_share, "pictures")
        without_reference: Counter[str] = Counter()
        rows = make_rows(readable, self.config, without_reference)
        places = {(drawing.source.digest, drawing.split) for drawing in readable}
        splits = Counter(digest for digest, _split in places)
        counts = {
            **self.counts,
            "pictures_rejected": len(rejected),
            "pictures_in_several_splits": sum(count > 1 for count in splits.values()),  # equal bytes
            "triplets_without_reference": without_reference.total(),
        }
        report = {
            "triplets_per_style": {
                split: Counter(row.columns["style"] for row in of_split) for split, of_split in rows.items()
            },
            "counts": counts,
            "rejected": rejected,
            "without_reference": without_reference,
        }
        return rows, report


def read_styles(config: StylesConfig, folder: Path) -> StyleFolders:
    """Reads the table and hashes the drawings of its contents. Raises InputError."""
    table, images = folder / config.contents, folder / config.images
    counts = Counter(contents_of_other_splits=0, pictures_without_content=0)
    drawings = find_drawings(images, read_contents(table, config, counts), config, counts)
    return StyleFolders(config, [table, *find_licences(table.parent)], drawings, counts)


def read_contents(path: Path, config: StylesConfig, counts: Counter[str]) -> dict[str, tuple[str, str]]:
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


def find_drawings(
    folder: Path, contents: dict[str, tuple[str, str]], config: StylesConfig, counts: Counter[str]
) -> list[Drawing]:
    """Every picture of a known content, by style and name; counts the others. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; set images to the folder of the style folders")
    present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    styles = list(dict.fromkeys(config.styles or present))  # named twice is no more than once
    missing = [style for style in styles if style not in present]
    if missing or not styles:
        found = ", ".join(present) or "none"
        raise InputError(f"{folder}: no style folder {', '.join(missing) or 'at all'}; found: {found}")
    drawings: list[Drawing] = []
    for style in tqdm(styles, desc="reading styles", unit="style", disable=None):
        of_style: dict[str, Drawing] = {}
        for path in sorted((folder / style).iterdir()):
            if path.suffix.lower() not in EXTENSIONS or path.name[0] == "." or not path.is_file():
                continue
            if path.stem not in contents:
                counts["pictures_without_content"] += 1
                continue
            if path.stem in of_style:
                raise InputError(f"{path}: the same content as {of_style[path.stem].source.path.name}; keep one")
            prompt, split = contents[path.stem]
            source = Source(path, f"images/{style}/{path.name}", digest_of(path))
            of_style[path.stem] = Drawing(style=style, content=path.stem, prompt=prompt, split=split, source=source)
        if not of_style:
            raise InputError(f"{folder / style}: no picture of a content in the table; check ids and splits")
        drawings += of_style.values()
    return drawings


def _drop_unreadable(drawings: list[Drawing]) -> tuple[list[Drawing], dict[str, str]]:
    """The drawings that decode, and file -> reason for the others."""
    readable: list[Drawing] = []
    rejected: dict[str, str] = {}
    for drawing in tqdm(drawings, desc="decoding", unit="picture", disable=None):
        try:
            open_image(drawing.source.path)
        except InputError as error:
            rejected[f"{drawing.style}/{drawing.source.path.name}"] = str(error)
        else:
            readable.append(drawing)
    return readable, rejected


def make_rows(drawings: list[Drawing], config: StylesConfig, without_reference: Counter[str]) -> dict[str, list[Row]]:
    """Output split -> its rows in the order of the seed.

    Triplets that have no (further) reference are left out and counted in `without_reference` by split/style.
    Raises InputError for a split that comes out empty.
    """
    groups: dict[str, dict[str, list[Drawing]]] = defaultdict(lambda: defaultdict(list))
    for drawing in drawings:
        groups[drawing.split][drawing.style].append(drawing)
    limit = config.max_triplets_per_split
    rows = {}
    for split in dict.fromkeys(config.splits.values()):
        streams = [_pair_style(group, config, without_reference) for group in groups[split].values()]
        of_split: list[Row] = []
        while streams and (limit is None or len(of_split) < limit):
            taken = [(stream, next(stream, None)) for stream in streams]  # one of each: a cut stays even
            streams = [stream for stream, row in taken if row]
            of_split += [row for _, row in taken if row]
        if not of_split:
            raise InputError(
                f"split {split!r} gets no triplet: a style needs {config.references_per_triplet + 1} "
                "different pictures in it; check splits, the split column and the style folders"
            )
        of_split = of_split[:limit]
        random.Random(f"rows {config.seed} {split}").shuffle(of_split)
        rows[split] = of_split
    return rows


def _pair_style(drawings: list[Drawing], config: StylesConfig, without_reference: Counter[str]) -> Iterator[Row]:
    """Rows of one style in one split: every target once, then every target again, in random order.

    A heap by use hands out the least used picture first, so that all are references about equally often.
    """
    name = f"{drawings[0].split}/{drawings[0].style}"
    chance = random.Random(f"references {config.seed} {name}")
    heap = sorted((0, chance.random(), position) for position in range(len(drawings)))
    seen = [{drawing.source.digest} for drawing in drawings]  # bytes that a target has met, first of all its own
    for _ in range(config.triplets_per_target):
        for target in chance.sample(range(len(drawings)), len(drawings)):
            passed, chosen = heap[:0], heap[:0]
            while heap and len(chosen) < config.references_per_triplet:
                entry = heapq.heappop(heap)
                digest = drawings[entry[2]].source.digest
                (passed if digest in seen[target] else chosen).append(entry)
                seen[target].add(digest)
            complete = len(chosen) == config.references_per_triplet
            for entry in passed:
                heapq.heappush(heap, entry)
            for uses, _order, position in chosen:
                heapq.heappush(heap, (uses + complete, chance.random(), position))
            if complete:
                yield _row(drawings[target], [drawings[position] for _uses, _order, position in chosen])
            else:
                without_reference[name] += 1


def _row(target: Drawing, references: list[Drawing]) -> Row:
    contents = [reference.content for reference in references]
    return Row(
        target=target.source,
        references=tuple(reference.source for reference in references),
        prompt=target.prompt,
        columns={
            "style": target.style,
            "content": target.content,
            **({"reference_contents": contents} if len(contents) > 1 else {"reference_content": contents[0]}),
        },
    )
