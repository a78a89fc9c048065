"""Any captioned folder becomes a world: what is read, what is held out, and what is refused."""

import csv
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from miniature.folders import FolderWorld
from miniature.gallery import World
from ztrain.errors import InputError

EMOJI = Path(__file__).resolve().parents[2] / "shared/data/emoji_styles"
SPLITS = ("train", "held", "unseen")
COLOURS = ("red", "green", "blue", "white", "black")


def paint(path: Path, colour: str, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def style_folders(folder: Path, contents: int = 20, split: Callable[[int], str] | None = None) -> Path:
    """Five styles, each of one colour; content 3 is drawn in the first of them only."""
    for style, colour in enumerate(COLOURS):
        for content in range(contents):
            if content != 3 or style == 0:
                paint(folder / "images" / f"in {colour}" / f"c{content:02}.png", colour)
    rows = [f"c{content:02},thing {content}" + (f",{split(content)}" if split else "") for content in range(contents)]
    (folder / "contents.csv").write_text("\n".join(["id,prompt" + (",split" if split else ""), *rows]) + "\n")
    return folder


def with_texts(folder: Path, captions: dict[str, str]) -> Path:
    for number, (name, caption) in enumerate(captions.items()):
        paint(folder / name, COLOURS[number % len(COLOURS)])
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder


def pairs_of(world: FolderWorld, split: str) -> set[tuple[str, int]]:
    """Caption and style number of every picture of a split."""
    gallery = world.gallery(split, None, 0, "cpu")  # type: ignore[arg-type]
    return set(zip(gallery.captions, gallery.styles.tolist(), strict=True))


def test_style_folders_are_split_by_content_and_by_pair(tmp_path: Path) -> None:
    world: World = FolderWorld.read(style_folders(tmp_path / "shapes", split=lambda n: "val" if n < 2 else "train"), 4)
    assert isinstance(world, FolderWorld)
    assert (world.name.split()[0], world.size) == ("shapes", 4)
    assert world.style_classes == {"style": tuple(sorted(f"in {colour}" for colour in COLOURS))}
    assert world.content_classes == {"content": tuple(sorted(f"thing {number}" for number in range(20)))}

    train, held, unseen = (pairs_of(world, split) for split in SPLITS)
    assert {caption for caption, _ in unseen} == {"thing 0", "thing 1"} and len(unseen) == 10
    assert len(train) + len(held) == 17 * 5 + 1 and not train & held
    assert len(held) == 17 * 5 // 10, "thing 3 can spare no picture, so it does not count"
    assert {caption for caption, _ in train} == {f"thing {number}" for number in range(2, 20)}
    assert {style for _, style in train} == set(range(5))

    for split in SPLITS:
        gallery = world.gallery(split, None, 0, "cpu")
        assert gallery.images.shape == (len(gallery), 3, 4, 4) and gallery.images.dtype == torch.uint8
        assert gallery.detailed == gallery.captions
        assert torch.equal(gallery.labels["style"], gallery.styles)
        for row, caption in enumerate(gallery.captions):
            assert world.content_classes["content"][gallery.labels["content"][row]] == caption
            colour = world.style_classes["style"][gallery.labels["style"][row]].removeprefix("in ")
            assert gallery.images[row, :, 2, 2].tolist() == list(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))


def test_what_is_held_out_depends_on_names_alone(tmp_path: Path) -> None:
    first, second = style_folders(tmp_path / "a"), style_folders(tmp_path / "b")
    table = second / "contents.csv"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([head, *reversed(rows)]))
    paint(second / "images/in red/c05.png", "yellow", (9, 5))
    worlds = FolderWorld.read(first, 2), FolderWorld.read(second, 3)
    for split in SPLITS:
        assert pairs_of(worlds[0], split) == pairs_of(worlds[1], split), split
    assert len({caption for caption, _ in pairs_of(worlds[0], "unseen")}) == 2, "no split column: a tenth of 20"


def test_another_content_is_another_name(tmp_path: Path) -> None:
    """Each change leaves all else as it is: ids decide the splits, and only one pixel differs."""

    def folder(parent: str) -> Path:
        return style_folders(tmp_path / parent / "shapes", split=lambda number: "val" if number < 2 else "train")

    def rewritten(parent: str, old: str, new: str) -> Path:
        table = folder(parent) / "contents.csv"
        assert table.read_text().count(old) == 1
        table.write_text(table.read_text().replace(old, new))
        return table.parent

    same, touched = folder("a"), folder("b")
    with Image.open(touched / "images/in red/c07.png") as picture:
        picture.putpixel((3, 5), (254, 0, 0))
        picture.save(touched / "images/in red/c07.png")
    changed = [touched, rewritten("c", "thing 7,", "thing 7!,"), rewritten("d", "thing 7,train", "thing 7,val")]
    name = FolderWorld.read(same, 8).name
    assert re.fullmatch(r"shapes [0-9a-f]{12}", name)
    assert FolderWorld.read(same, 8).name == FolderWorld.read(folder("elsewhere"), 8).name == name
    assert len({name, *(FolderWorld.read(folder, 8).name for folder in changed)}) == 4


def test_contents_with_one_prompt_are_one_content(tmp_path: Path) -> None:
    folder = style_folders(tmp_path)
    text = (folder / "contents.csv").read_text()
    (folder / "contents.csv").write_text(text.replace("thing 7\n", "thing 8\n"))
    world = FolderWorld.read(folder, 2)
    assert len(world.content_classes["content"]) == 19
    assert sum(len(rows) for rows in world.splits.values()) == 96
    assert not pairs_of(world, "train") & pairs_of(world, "held"), "both pictures of a pair go one way"

    (folder / "contents.csv").write_text(
        text.replace("thing 7\n", "thing 8\n").replace("\n", ",train\n").replace("prompt,train", "prompt,split")
    )
    FolderWorld.read(folder, 2)
    mixed = (folder / "contents.csv").read_text().replace("c07,thing 8,train", "c07,thing 8,val")
    (folder / "contents.csv").write_text(mixed)
    with pytest.raises(InputError, match="'thing 8' is the prompt of 'c07'.*into one split"):
        FolderWorld.read(folder, 2)


def test_every_content_and_every_style_stays_in_training(tmp_path: Path) -> None:
    """Contents drawn only twice, some in a style of two drawings: a tenth by chance alone would take all of some."""
    for number in range(300):
        paint(tmp_path / "images" / "plain" / f"{number}.png", "red", (1, 1))
        paint(tmp_path / "images" / f"rare {number // 2}" / f"{number}.png", "blue", (1, 1))
    rows = "\n".join(f"{number},thing {number},train" for number in range(300))
    (tmp_path / "contents.csv").write_text(f"id,prompt,split\n{rows}\n")
    world = FolderWorld.read(tmp_path, 1)
    train = pairs_of(world, "train")
    assert len({caption for caption, _ in train}) == 300
    assert len({style for _, style in train}) == 151
    assert len(world.splits["held"]) == 60
    assert len(world.splits["unseen"]) == len(world.gallery("unseen", 5, 0, "cpu")) == 0


def test_counted_galleries_are_drawn_by_the_seed(tmp_path: Path) -> None:
    world = FolderWorld.read(style_folders(tmp_path), 1)

    def drawn(count: int | None, seed: int) -> list[tuple[str, int]]:
        gallery = world.gallery("train", count, seed, "cpu")
        return list(zip(gallery.captions, gallery.styles.tolist(), strict=True))

    assert drawn(10, 1) == drawn(10, 1) != drawn(10, 2)
    assert len(set(drawn(10, 1))) == 10 and set(drawn(10, 1)) <= set(drawn(None, 1))
    assert drawn(None, 1) == drawn(None, 2)
    assert sorted(drawn(1000, 1)) == sorted(drawn(None, 1)), "no more than there are"


def test_captions_in_text_files(tmp_path: Path) -> None:
    names = [f"{'ab'[number % 2]}/{number:02}.{('jpg', 'webp')[number % 2]}" for number in range(30)]
    folder = with_texts(tmp_path, {name: f"picture {number}\n of it" for number, name in enumerate(names)})
    (folder / "README.txt").write_text("belongs to no picture")
    paint(folder / ".thumbnails" / "00.png", "red")
    world = FolderWorld.read(folder, 2)
    assert world.style_classes == {}
    assert len(world.content_classes["content"]) == 30 and "picture 7 of it" in world.content_classes["content"]
    assert {split: len(rows) for split, rows in world.splits.items()} == {"train": 27, "held": 0, "unseen": 3}
    gallery = world.gallery("train", None, 0, "cpu")
    assert set(gallery.labels) == {"content"}
    assert len(gallery.styles.unique()) == 27


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_captions_in_a_table(tmp_path: Path, kind: str, column: str) -> None:
    """Thirty contents of three pictures: a tenth of the contents is unseen, a tenth of the others' pictures held."""
    rows = [{"file_name": f"deep/{number}.png", column: f"content {number % 30}", "more": 1} for number in range(90)]
    for row in rows:
        paint(tmp_path / str(row["file_name"]), "red")
    paint(tmp_path / "not in the table.png", "red")
    with (tmp_path / kind).open("w", newline="") as file:
        if kind.endswith("csv"):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    world = FolderWorld.read(tmp_path, 1)
    assert world.style_classes == {}
    assert {split: len(of) for split, of in world.splits.items()} == {"train": 73, "held": 8, "unseen": 9}
    train, held, unseen = ({caption for caption, _ in pairs_of(world, split)} for split in SPLITS)
    assert held <= train and not unseen & train and len(train | unseen) == 30


def test_pictures_are_scaled_to_the_shorter_side_and_cropped_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (255, 0, 0)
    turned = Image.fromarray(wide.transpose(1, 0, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = with_texts(tmp_path, {"a.png": "wide", "b.png": "clear", "c.png": "small"})
    Image.fromarray(wide).save(folder / "a.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "b.png")
    Image.new("P", (2, 2), 0).save(folder / "c.png")
    gallery = FolderWorld.read(folder, 8).gallery("train", None, 0, "cpu")
    assert gallery.captions == ["wide", "clear", "small"]
    assert torch.equal(gallery.images[0], torch.tensor(wide[:, 8:16]).permute(2, 0, 1))
    assert gallery.images[1].eq(255).all(), "transparency is laid on white"
    assert gallery.images[2].eq(0).all()
    assert FolderWorld.read(folder, 4).gallery("train", None, 0, "cpu").images.shape == (3, 3, 4, 4)

    turned.save(folder / "a.png", exif=exif)
    assert FolderWorld.read(folder, 8).pictures.images[0, 0].float().mean() == 255, "EXIF orientation does not matter"


def test_reading_leaves_the_warning_filters_alone(tmp_path: Path) -> None:
    folder = style_folders(tmp_path)
    before = list(warnings.filters)
    FolderWorld.read(folder, 1)
    assert list(warnings.filters) == before


def spoil_styles(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(style_folders(folder))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: folder.rmdir(), "no such folder"),
        (lambda folder: None, "no pictures there"),
        (lambda folder: paint(folder / "a.png", "red"), "1 of 1 pictures have no caption, for example .*a.png"),
        (
            lambda folder: (with_texts(folder, {"a.png": "a"}), paint(folder / "a.jpg", "red")),
            "shares its caption a.txt with a.jpg",
        ),
        (lambda folder: with_texts(folder, {"a.png": "\n"}), "a.txt: the caption is empty"),
        (
            lambda folder: (with_texts(folder, {"a.png": "a"}), (folder / "a.txt").write_bytes(b"\xff")),
            "a.txt: is not UTF-8",
        ),
        (
            lambda folder: (with_texts(folder, {"a.png": "a"}), (folder / "a.png").write_bytes(b"no picture")),
            "a.png: not a readable picture",
        ),
        (
            spoil_styles(lambda folder: [paint(folder / f"images/in red/x{number}.png", "red") for number in (1, 2)]),
            "2 of 98 pictures have no caption, for example .*x1.png: .*contents.csv has no row with their id",
        ),
        (spoil_styles(lambda folder: paint(folder / "images/in red/c01.jpg", "red")), "same content as c01.jpg"),
        (spoil_styles(lambda folder: paint(folder / "images/c01.jpg", "red")), "c01.jpg: not in a style folder"),
        (spoil_styles(lambda folder: (folder / "metadata.csv").touch()), "contents.csv and metadata.csv"),
        (
            spoil_styles(lambda folder: (folder / "contents.csv").write_text("name,prompt\nc00,a\n")),
            "no column 'id'; its columns are: name, prompt",
        ),
        (
            spoil_styles(lambda folder: (folder / "contents.csv").write_text("id,prompt\nc00,a\nc00,b\n")),
            "contents.csv:3: the id 'c00' stands twice",
        ),
        (
            spoil_styles(lambda folder: (folder / "contents.csv").write_text("id,prompt,split\nc00,a,test\n")),
            "contents.csv:2: split must be train or val, not 'test'",
        ),
        (
            spoil_styles(lambda folder: (folder / "contents.csv").write_text("id,prompt\nc00,a,b\n")),
            "contents.csv:2: must have 2 fields",
        ),
        (lambda folder: style_folders(folder, split=lambda number: "val"), "no picture is left for training"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, spoil: Callable[[Path], object], complaint: str) -> None:
    spoil(tmp_path)
    with pytest.raises(InputError, match=complaint) as caught:
        FolderWorld.read(tmp_path, 2)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (
            '{"file_name": "a.png", "label": "a"}',
            "exactly one of .*'text', 'caption', 'prompt'.*has 'file_name', 'label'",
        ),
        ('{"file_name": "a.png", "text": "a", "prompt": "a"}', "needs exactly one of"),
        ('{"image": "a.png", "text": "a"}', "metadata.jsonl:1: no column 'file_name'; it has 'image', 'text'"),
        ('{"file_name": "a.png", "text": "a"}\n{"file_name": "a.png", "text": "b"}', "jsonl:2: .* stands twice"),
        ('{"file_name": "a.png", "text": "a"}\n{"file_name": "b.png", "text": " "}', "1 of 2 .*b.png: .*'text'"),
        ('{"file_name": "a.png", "text": 5}', "text must be text, not 5"),
        ('{"file_name": "../a.png", "text": "a"}', "leaves the folder"),
        ('{"file_name": "c.png", "text": "a"}', "the picture 'c.png' is not in"),
        ("a.png a cat", "metadata.jsonl:1: not a row of JSON"),
        ("", "no pictures there"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_in_one_sentence(tmp_path: Path, table: str, complaint: str) -> None:
    for name in ("a.png", "b.png"):
        paint(tmp_path / name, "red")
    (tmp_path / "metadata.jsonl").write_text(table)
    with pytest.raises(InputError, match=complaint):
        FolderWorld.read(tmp_path, 2)


@pytest.mark.skipif(not EMOJI.is_dir(), reason=f"the shared data set is not at {EMOJI}")
def test_emoji_styles() -> None:
    with (EMOJI / "contents.csv").open(encoding="utf-8") as file:
        split_of = {row["prompt"]: row["split"] for row in csv.DictReader(file)}
    world = FolderWorld.read(EMOJI, 16)
    assert len(world.content_classes["content"]) == 1069 and len(world.style_classes["style"]) == 8
    galleries = {split: world.gallery(split, None, 0, "cpu") for split in SPLITS}  # type: ignore[arg-type]
    assert {split: len(gallery) for split, gallery in galleries.items()} == {"train": 4092, "held": 454, "unseen": 583}
    for split, gallery in galleries.items():
        assert {split_of[caption] for caption in gallery.captions} == {"val" if split == "unseen" else "train"}
    assert set(galleries["held"].captions) <= set(galleries["train"].captions)
    of_style = Counter(galleries["held"].styles.tolist())
    assert len(of_style) == 8, "every style is asked for in a new combination"
