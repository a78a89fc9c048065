"""Paints style folders, the layout that data_tools.build reads, for the demo and the tests.

    python -m miniature.style_folders --out DIR

Out: `<folder>/images/<style>/<id>.png` and `<folder>/contents.csv` with id, prompt and split. Ids say what is drawn
(star-2-left), prompts too; neither names a style. Two ways: few styles that share all contents, or many styles with a
few pictures each, where a style belongs to one split alone.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniature.painter import draw_poses, paint
from miniature.world import (
    COUNT_NAMES,
    FILL_NAMES,
    HOLLOW,
    KIND_NAMES,
    NUM_CONTENTS,
    PATTERN_NAMES,
    PLACE_NAMES,
    Styles,
    contents_of,
    draw_styles,
    is_held,
    is_unseen,
    name_content,
    pick,
)
from ztrain.errors import InputError
from ztrain.io.files import given_path, whole_file, workspace, write_text
from ztrain.terminal import program

_MOST_PICTURES = len(KIND_NAMES) - 2  # a style holds out one or two kinds of objects

STYLES = tuple(f"style{number}" for number in range(1, 7))
"""Names of the folders that `paint_style_folders` paints; prompts never name a style."""


def folder_styles(seed: int) -> Styles:
    """As many styles as STYLES, clearly apart: hues, patterns and fills in turn, the rest drawn."""
    number = torch.arange(len(STYLES))
    drawn = draw_styles(len(STYLES), torch.Generator().manual_seed(seed))
    background, second, body = drawn.background.clone(), drawn.second.clone(), drawn.body.clone()
    background[:, 0] = (background[0, 0] + number / len(STYLES)) % 1
    second[:, 0] = background[:, 0]
    body[:, 0] = (background[:, 0] + 0.45) % 1
    fill = number % len(FILL_NAMES)
    changed = {
        "pattern": number % len(PATTERN_NAMES),
        "fill": fill,
        "outline": torch.where(fill == HOLLOW, drawn.outline.clamp_min(0.03), drawn.outline),
        "background": background,
        "second": second,
        "body": body,
    }
    return Styles(**{f.name: changed.get(f.name, getattr(drawn, f.name)) for f in fields(Styles)})


@dataclass(frozen=True, slots=True)
class Drawing:
    """One content of a painted folder: its number among all contents, and its split."""

    number: int
    split: str

    @property
    def kind(self) -> int:
        return self._content[0]

    @property
    def name(self) -> str:
        """Of its file: star-2-left."""
        kind, count, place = self._content
        return f"{KIND_NAMES[kind]}-{count + 1}-{PLACE_NAMES[place]}"

    @property
    def prompt(self) -> str:
        return name_content(*self._content)

    @property
    def _content(self) -> tuple[int, int, int]:
        content = contents_of(torch.tensor(self.number))
        return int(content.kind), int(content.count), int(content.place)


def read_name(name: str) -> int:
    """The number of the content that a file of this name shows. Raises InputError."""
    match name.split("-"):
        case [kind, count, place] if kind in KIND_NAMES and place in PLACE_NAMES and count in ("1", "2", "3"):
            numbers = KIND_NAMES.index(kind), int(count) - 1, PLACE_NAMES.index(place)
            return (numbers[0] * len(COUNT_NAMES) + numbers[1]) * len(PLACE_NAMES) + numbers[2]
    raise InputError(f"{name!r} is no content of the painted world, which are called like {KIND_NAMES[0]}-2-left")


# Few styles that share all contents


def choose_contents(num_contents: int, seed: int) -> list[Drawing]:
    """Distinct contents, every kind about equally often, one in six in the split val, the others in train.

    Raises InputError for fewer than 6, or more than there are.
    """
    chance = random.Random(f"contents {seed}")
    if not 6 <= num_contents <= NUM_CONTENTS:
        raise InputError(f"num_contents {num_contents} must be from 6 to {NUM_CONTENTS}")
    of_kind = NUM_CONTENTS // len(KIND_NAMES)
    shuffled = [chance.sample(range(of_kind), of_kind) for _kind in KIND_NAMES]
    chosen = [kind * of_kind + cells[turn] for turn in range(of_kind) for kind, cells in enumerate(shuffled)]
    del chosen[num_contents:]
    held_out = set(chance.sample(chosen, max(2, round(num_contents / 6))))
    return [Drawing(number, "val" if number in held_out else "train") for number in chosen]


def paint_style_folders(folder: Path, *, seed: int = 0, size: int = 128, num_contents: int = 48) -> None:
    """Paint `num_contents` contents (6 to 180) in every style of STYLES, as PNG of `size` x `size` pixels.

    The same arguments give the same pictures. Painting again over the same contents is fine; raises
    InputError for a folder with anything else in it.
    """
    drawings = choose_contents(num_contents, seed)
    _begin(folder, drawings, STYLES, size)
    contents = contents_of(torch.tensor([drawing.number for drawing in drawings]))
    poses = draw_poses(contents, torch.Generator().manual_seed(seed))
    for index, style in enumerate(STYLES):
        styles = pick(folder_styles(seed), torch.full((num_contents,), index))
        _save(folder, [style] * num_contents, drawings, paint(contents, styles, poses, size, seed=seed))


# Many styles, each with a few contents of one split


def share_contents(splits: Sequence[str], seed: int) -> list[Drawing]:
    """Every content that models may see, in one split each: of every kind two in each split but the first, which has
    the other ones."""
    chance = random.Random(f"splits {seed}")
    known = (~is_unseen(contents_of(torch.arange(NUM_CONTENTS)))).nonzero().squeeze(1).tolist()
    drawings: list[Drawing] = []
    for _, of_kind in itertools.groupby(known, key=lambda number: number * len(KIND_NAMES) // NUM_CONTENTS):
        numbers = list(of_kind)
        chance.shuffle(numbers)
        places = [split for split in splits[1:] for _ in range(2)]
        places += [splits[0]] * (len(numbers) - len(places))
        drawings += map(Drawing, numbers, places)
    return drawings


def paint_many_styles(folder: Path, splits: Mapping[str, tuple[int, int]], *, seed: int = 0, size: int = 64) -> None:
    """Paint styles, so many for each split, each with so many (2 to 10) contents of different kinds.

    A style, and a content, is in one split alone. The first split has no picture of a content and style whose
    combination no model may see (`world.is_held`). Otherwise as `paint_style_folders`.
    """
    for split, (_, pictures) in splits.items():
        if not 2 <= pictures <= _MOST_PICTURES:
            raise InputError(f"{split}: {pictures} pictures of a style must be from 2 to {_MOST_PICTURES}")
    drawings = share_contents(list(splits), seed)
    folders = {split: [f"{split}-{number:04d}" for number in range(styles)] for split, (styles, _) in splits.items()}
    _begin(folder, drawings, [name for names in folders.values() for name in names], size)
    styles = draw_styles(sum(styles for styles, _ in splits.values()), torch.Generator().manual_seed(seed))
    chance = random.Random(f"drawings {seed}")
    names: list[str] = []
    rows: list[int] = []
    chosen: list[Drawing] = []
    row, first = 0, next(iter(splits))
    for split, (_, pictures) in splits.items():
        of_split = [drawing for drawing in drawings if drawing.split == split]
        contents = contents_of(torch.tensor([drawing.number for drawing in of_split]))
        for name in folders[split]:
            held = is_held(contents, pick(styles, torch.tensor([row]))) & (split == first)
            possible = [drawing for drawing, is_out in zip(of_split, held.tolist(), strict=True) if not is_out]
            chance.shuffle(possible)
            of_kind = {drawing.kind: drawing for drawing in possible}
            chosen += list(of_kind.values())[:pictures]
            names += [name] * pictures
            rows += [row] * pictures
            row += 1
    contents = contents_of(torch.tensor([drawing.number for drawing in chosen]))
    poses = draw_poses(contents, torch.Generator().manual_seed(seed))
    _save(folder, names, chosen, paint(contents, pick(styles, torch.tensor(rows)), poses, size, seed=seed))


def _begin(folder: Path, drawings: Iterable[Drawing], styles: Iterable[str], size: int) -> None:
    """Writes the table, in a folder that is new or has the same table and no other styles."""
    if size < 16:
        raise InputError(f"size {size} must be at least 16 pixels")
    text = "id,prompt,split\n"
    text += "".join(f"{drawing.name},{drawing.prompt},{drawing.split}\n" for drawing in drawings)
    table, images = folder / "contents.csv", folder / "images"
    found = table.read_text(encoding="utf-8") if table.is_file() else ""
    painted = {path.name for path in images.iterdir()} if images.is_dir() else set()
    if (found != text and folder.exists() and any(folder.iterdir())) or painted - set(styles):
        raise InputError(f"{folder}: holds something else already; remove it or choose another folder")
    write_text(table, text)  # first: painting again mends a folder left half painted


def _save(folder: Path, styles: Sequence[str], drawings: Sequence[Drawing], pictures: Tensor) -> None:
    with workspace(folder) as scratch:
        for style, drawing, picture in zip(styles, drawings, pictures, strict=True):
            path = folder / "images" / style / f"{drawing.name}.png"
            with whole_file(path, scratch=scratch) as building:
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(building)


@program
def main(arguments: Sequence[str] | None) -> str:
    """Exit status: 0 painted, 2 something the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m miniature.style_folders", description="Paint style folders.")
    parser.add_argument("--out", type=given_path, required=True, help="folder to paint into")
    for name, default, text in (
        ("--seed", 0, "decides styles, contents and splits"),
        ("--size", 128, "side of the pictures in pixels"),
        ("--num-contents", 48, "pictures per style"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{text} (default: {default})")
    options = parser.parse_args(arguments)
    paint_style_folders(options.out, seed=options.seed, size=options.size, num_contents=options.num_contents)
    return f"{options.out}: {options.num_contents} contents in {len(STYLES)} styles"


if __name__ == "__main__":
    sys.exit(main())
