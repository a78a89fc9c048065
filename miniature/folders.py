"""Any folder of captioned pictures as a world to pretrain on: read once, cut square, split by contents.

In: one of three layouts.
- style folders: `images/<style>/<id>.png` and `contents.csv` with the columns id, prompt and, if wanted, split
  (train or val);
- a caption beside every picture: `cat.jpg` and `cat.txt`, in nested folders too;
- a table: `metadata.jsonl` or `metadata.csv` with `file_name` and one of `text`, `caption`, `prompt`; pictures that
  it does not name are left out.
Out: galleries. Only style folders know styles; elsewhere every picture is in a style of its own.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from miniature.gallery import Gallery, Split
from ztrain.data.csvs import cell, read_rows
from ztrain.data.rows import check_text, find_picture, listed
from ztrain.errors import InputError
from ztrain.images import Bucket, PictureFile, fit_target, open_image
from ztrain.io.files import read_text
from ztrain.io.forms import matched, one_form

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"})
"""Of files that count as pictures, in small letters."""

CONTENTS, TABLES = "contents.csv", ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")

_SALT = "miniature.folders 1"  # another one changes which pictures are held out of every folder
_BAR_FROM = 500  # pictures; fewer are read before a progress bar is of use


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One captioned picture that has been found but not opened."""

    file: PictureFile
    caption: str
    content: str
    """What its split is drawn by: the id in style folders, elsewhere the caption."""
    style: str
    """Its style folder, elsewhere its own path."""
    split: str | None
    """train or val; None where the folder says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FolderWorld:
    """The pictures of one folder, all in memory. A content is a caption; its number is the same in all splits."""

    name: str
    """The folder's own name and 12 hex digits of what was read, so that another content is another world."""
    size: int
    """Pixels of a side."""
    content_classes: dict[str, tuple[str, ...]]
    style_classes: dict[str, tuple[str, ...]]
    pictures: Gallery
    """All splits, on the CPU."""
    splits: dict[Split, Tensor]
    """Positions in `pictures`, ascending."""

    @classmethod
    def read(cls, folder: Path, size: int) -> "FolderWorld":
        """Finds and decodes every picture, the shorter side scaled to `size` pixels and the longer one cropped.

        Splits depend on the names of contents and styles only. unseen: the contents of split val, or a tenth of all
        where no split is given. held: a tenth of the other pairs of content and style, and no last picture of either;
        without styles a tenth of the pictures whose caption occurs again. Raises InputError.
        """
        folder = Path(folder)
        styled, entries = _find(folder)
        if not entries:
            raise InputError(f"{folder}: no pictures there; it needs files that end in {', '.join(sorted(SUFFIXES))}")
        splits = _assign(entries, styled, folder)
        contents = {name: number for number, name in enumerate(sorted({entry.caption for entry in entries}))}
        styles = {name: number for number, name in enumerate(sorted({entry.style for entry in entries}))}
        captions = [entry.caption for entry in entries]
        content = torch.tensor([contents[entry.caption] for entry in entries])
        style = torch.tensor([styles[entry.style] for entry in entries])
        pictures = Gallery(
            images=_decode([entry.file for entry in entries], size),
            captions=captions,
            clauses=[(caption,) for caption in captions],
            replies=[(caption, caption) for caption in captions],
            labels={"content": content, "style": style} if styled else {"content": content},
            styles=style,
        )
        return cls(
            name=f"{folder.resolve().name} {_digest(pictures, splits)}",
            size=size,
            content_classes={"content": tuple(contents)},
            style_classes={"style": tuple(styles)} if styled else {},
            pictures=pictures,
            splits=splits,
        )

    def gallery(self, split: Split, count: int | None, seed: int, device: torch.device | str) -> Gallery:
        """All pictures of a split, or `count` of them drawn by `seed`, fewer where the split has no more.

        all: train and unseen together; the held ones stay apart, so that it can be seen how good a judge is.
        """
        rows = torch.cat([self.splits["train"], self.splits["unseen"]]) if split == "all" else self.splits[split]
        if count is not None:
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]
        return self.pictures.select(rows).to(device)


def _find(folder: Path) -> tuple[bool, list[_Entry]]:
    """Whether the folder knows styles, and its pictures in the order of their paths. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one with captioned pictures")
    tables = [name for name in (CONTENTS, *TABLES) if (folder / name).is_file()]
    if len(tables) > 1:
        raise InputError(f"{folder}: holds {' and '.join(tables)}, which are different layouts; keep one of them")
    if not tables:
        return False, _find_with_texts(folder)
    [name] = tables
    if name == CONTENTS:
        return True, _find_in_styles(folder / name)
    return False, _find_in_table(folder / name)


def _find_in_styles(table: Path) -> list[_Entry]:
    images = table.parent / "images"
    contents = _read_contents(table)
    entries: dict[tuple[str, str], _Entry] = {}
    missing: list[Path] = []
    paths = _pictures_below(images)
    meant = matched({path.stem for path in paths}, contents.keys(), shared=True).found
    for path in paths:
        inside = path.relative_to(images).parts
        if len(inside) != 2:
            raise InputError(f"{path}: not in a style folder; pictures must lie in {images}/<style>/")
        if path.stem not in meant:
            missing.append(path)
            continue
        style, content = inside[0], meant[path.stem]
        if (style, content) in entries:
            raise InputError(f"{path}: the same content as {entries[style, content].file.path.name}; keep one")
        caption, split = contents[content]
        entries[style, content] = _Entry(
            file=PictureFile(path), caption=caption, content=content, style=style, split=split
        )
    _refuse_missing(missing, len(missing) + len(entries), f"{table} has no row with their id")
    return list(entries.values())


def _read_contents(table: Path) -> dict[str, tuple[str, str | None]]:
    """Content id -> caption and split. Raises InputError."""
    contents: dict[str, tuple[str, str | None]] = {}
    for where, row in read_rows(table, ("id", "prompt"), ("split",)):
        content = one_form(cell(row, "id", where=where))
        if content in contents:
            raise InputError(f"{where}: the id {content!r} stands twice; keep one")
        split = cell(row, "split", where=where, optional=True) if "split" in row else None
        if split not in (None, "train", "val"):
            raise InputError(f"{where}: split must be train or val, not {split!r}")
        contents[content] = (_one_line(cell(row, "prompt", where=where)), split)
    return contents


def _find_with_texts(folder: Path) -> list[_Entry]:
    entries: list[_Entry] = []
    missing: list[Path] = []
    by_stem: dict[Path, Path] = {}
    pictures = _pictures_below(folder)
    texts = {str(path.with_suffix("")): path for path in _shown_below(folder) if path.suffix.lower() == ".txt"}
    own = matched({str(path.with_suffix("")) for path in pictures}, texts.keys()).found
    for path in pictures:
        stem = path.with_suffix("")
        if stem in by_stem:
            raise InputError(
                f"{path}: shares its caption {stem.name}.txt with {by_stem[stem].name}; rename or drop one"
            )
        by_stem[stem] = path
        if str(stem) not in own:
            missing.append(path)
            continue
        text = texts[own[str(stem)]]
        try:
            caption = _one_line(check_text(read_text(text, "caption"), "the caption", where=str(text)))
        except OSError as error:
            raise InputError(f"{text}: cannot read the caption ({error.strerror or error})") from error
        entries.append(_unstyled(PictureFile(path), folder, caption))
    _refuse_missing(missing, len(missing) + len(entries), "write it into a text file of the same name, as cat.txt")
    return entries


def _find_in_table(table: Path) -> list[_Entry]:
    folder = table.parent
    if not (rows := list(read_rows(table, ("file_name",), CAPTION_COLUMNS))):
        return []
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    captions = [column for column in CAPTION_COLUMNS if column in columns]
    if len(captions) != 1:
        raise InputError(
            f"{table}: needs exactly one of the columns {listed(CAPTION_COLUMNS)}; it has {listed(columns)}"
        )
    entries: dict[Path, _Entry] = {}
    missing: list[Path] = []
    for where, row in rows:
        file = find_picture(folder, check_text(row["file_name"], "file_name", where=where), where=where)
        if file.path in entries:
            raise InputError(f"{where}: the picture {row['file_name']!r} stands twice; keep one")
        if text := cell(row, captions[0], where=where, optional=True):
            entries[file.path] = _unstyled(file, folder, _one_line(text))
        else:
            missing.append(file.path)
    _refuse_missing(missing, len(rows), f"fill the column {captions[0]!r} of {table}")
    return [entries[path] for path in sorted(entries)]


def _unstyled(file: PictureFile, folder: Path, caption: str) -> _Entry:
    own = file.path.relative_to(folder).as_posix()
    return _Entry(file=file, caption=caption, content=caption, style=own, split=None)


def _pictures_below(folder: Path) -> list[Path]:
    """Pictures in the folder and in those inside it, in the order of their paths; nothing that is hidden."""
    return [path for path in _shown_below(folder) if path.suffix.lower() in SUFFIXES and path.is_file()]


def _shown_below(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _refuse_missing(missing: Sequence[Path], total: int, remedy: str) -> None:
    if missing:
        raise InputError(f"{len(missing)} of {total} pictures have no caption, for example {missing[0]}: {remedy}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _assign(entries: list[_Entry], styled: bool, folder: Path) -> dict[Split, Tensor]:
    """The positions of every split. Raises InputError where nothing is left to train on."""
    of_caption: dict[str, _Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.content):
        first = of_caption.setdefault(entry.caption, entry)  # several ids may have one caption: one content
        if first.split != entry.split:
            raise InputError(
                f"{folder}: {entry.caption!r} is the prompt of {first.content!r} ({first.split}) and of "
                f"{entry.content!r} ({entry.split}); put both into one split"
            )
    if any(first.split is not None for first in of_caption.values()):
        unseen = {caption for caption, first in of_caption.items() if first.split == "val"}
    else:
        drawn = sorted(of_caption, key=lambda caption: _chance(of_caption[caption].content))
        unseen = set(drawn[: len(drawn) // 10])
    held = _hold(
        {(entry.caption, entry.style) for entry in entries if entry.caption not in unseen},
        styled,
        lambda pair: _chance(of_caption[pair[0]].content, pair[1]),
    )
    rows: dict[Split, list[int]] = {"train": [], "held": [], "unseen": []}
    for row, entry in enumerate(entries):
        pair = (entry.caption, entry.style)
        rows["unseen" if entry.caption in unseen else "held" if pair in held else "train"].append(row)
    if not rows["train"]:
        raise InputError(f"{folder}: no picture is left for training; give some contents the split train")
    return {split: torch.tensor(of_split, dtype=torch.int64) for split, of_split in rows.items()}


def _hold(
    pairs: set[tuple[str, str]], styled: bool, chance: Callable[[tuple[str, str]], bytes]
) -> set[tuple[str, str]]:
    """A tenth of the pairs of caption and style of which both occur in other pairs too, and go on doing so."""
    captions, styles = Counter(caption for caption, _ in pairs), Counter(style for _, style in pairs)

    def spare(pair: tuple[str, str]) -> bool:
        return captions[pair[0]] > 1 and (not styled or styles[pair[1]] > 1)

    candidates = sorted(filter(spare, pairs), key=chance)
    wanted = len(candidates) // 10
    held: set[tuple[str, str]] = set()
    for pair in candidates:
        if len(held) < wanted and spare(pair):
            held.add(pair)
            captions[pair[0]] -= 1
            styles[pair[1]] -= 1
    return held


def _chance(*names: str) -> bytes:
    """A place in an order that looks random and is the same everywhere and for ever."""
    return hashlib.sha256("\0".join((_SALT, *names)).encode()).digest()


def _decode(files: list[PictureFile], size: int) -> Tensor:
    """(N, 3, S, S) uint8. Raises InputError for the first picture that cannot be opened."""
    images = np.empty((len(files), 3, size, size), np.uint8)

    def decode(row: int) -> None:
        picture = fit_target(open_image(files[row].path), Bucket(height=size, width=size))
        images[row] = np.asarray(picture).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        done = pool.map(decode, range(len(files)))
        for _ in tqdm(done, "reading pictures", len(files), unit="picture", disable=len(files) <= _BAR_FROM or None):
            pass
    return torch.from_numpy(images)


def _digest(pictures: Gallery, splits: dict[Split, Tensor]) -> str:
    """12 hex digits of all that models and judges get to see: captions, styles, splits and pixels."""
    of_split = {split: rows.tolist() for split, rows in splits.items()}
    digest = hashlib.sha256(json.dumps([pictures.captions, pictures.styles.tolist(), of_split]).encode())
    digest.update(pictures.images.flatten().numpy())
    return digest.hexdigest()[:12]
