"""The painted world: what is drawn is what its labels and captions say, and no split shows what another one hides."""

import colorsys
import csv
import hashlib
import itertools
import os
import re
import subprocess
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miniature import painter, style_folders
from miniature.painter import PaintedWorld, draw_poses, paint
from miniature.shapes import KINDS, REACH, distance_atlas, polygon_distance
from miniature.style_folders import STYLES, paint_many_styles, paint_style_folders, read_name
from miniature.world import (
    COUNT_NAMES,
    FILL_NAMES,
    FINISH_NAMES,
    HUE_NAMES,
    KIND_NAMES,
    NUM_CONTENTS,
    OUTLINE_NAMES,
    PATTERN_NAMES,
    PHRASINGS,
    PLACE_NAMES,
    SATURATION_NAMES,
    TONE_NAMES,
    Contents,
    Styles,
    contents_of,
    draw_contents,
    draw_styles,
    hue_class,
    is_held,
    is_unseen,
    labels_of,
    name_content,
    name_patterns,
    name_styles,
    outline_class,
    pick,
    tone_class,
)
from tests.forge import the_forge
from ztrain.errors import InputError
from ztrain.images import open_image

ROOT = Path(__file__).parents[1]
ONE_PIECE = ("star", "circle", "square", "triangle", "heart", "moon")
NUM_CONTENTS_PAINTED = 24


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def triples(*columns: Tensor) -> set[tuple[int, ...]]:
    return set(zip(*(column.tolist() for column in columns), strict=True))


# ---- splits


def test_no_split_shows_what_another_one_hides() -> None:
    styles = draw_styles(4000, seeded(0))
    drawn = {split: draw_contents(styles, split, seeded(1)) for split in ("train", "held", "unseen", "all")}
    contents = {split: triples(c.kind, c.count, c.place) for split, c in drawn.items()}
    manners = {split: triples(c.kind, styles.pattern, styles.fill) for split, c in drawn.items()}

    # Every content is either unseen or known, every manner of a kind either held or known, and all of them occur.
    assert len(contents["unseen"]) == len(KIND_NAMES) and len(contents["train"]) == NUM_CONTENTS - len(KIND_NAMES)
    assert {kind for kind, _, _ in contents["unseen"]} == set(range(len(KIND_NAMES))), "one of each kind"
    assert contents["held"] <= contents["train"] and not contents["train"] & contents["unseen"]
    assert contents["all"] == contents["train"] | contents["unseen"]
    assert not manners["train"] & manners["held"]
    assert manners["train"] | manners["held"] == manners["all"] == manners["unseen"]
    assert 0.08 < len(manners["held"]) / len(manners["all"]) < 0.12, "one in ten"

    train = contents["train"]
    for one, other, names in ((0, 1, COUNT_NAMES), (0, 2, PLACE_NAMES)):
        pairs = {(content[one], content[other]) for content in train}
        assert pairs == set(itertools.product(range(len(KIND_NAMES)), range(len(names))))
    assert {content[1:] for content in train} == set(itertools.product(range(3), range(5)))
    known = [manner[1:] for manner in manners["train"]]
    assert set(known) == set(itertools.product(range(len(PATTERN_NAMES)), range(len(FILL_NAMES))))

    # The two functions that say so by themselves agree with what was drawn.
    every = contents_of(torch.arange(NUM_CONTENTS))
    assert triples(*(getattr(pick(every, is_unseen(every)), f.name) for f in fields(Contents))) == contents["unseen"]
    assert [bool(is_held(drawn[s], styles).all()) for s in ("held", "train")] == [True, False]
    assert not is_held(drawn["train"], styles).any()


def test_every_kind_is_held_out_of_some_styles() -> None:
    """Otherwise a figure on the held split says nothing about that kind."""
    styles = draw_styles(4000, seeded(0))
    held = draw_contents(styles, "held", seeded(1))
    assert {KIND_NAMES[kind] for kind in held.kind.tolist()} == set(KIND_NAMES)


def test_contents_of_a_split_are_equally_likely() -> None:
    styles = draw_styles(8000, seeded(2))
    drawn = draw_contents(styles, "all", seeded(3))
    for column, names in ((drawn.kind, KIND_NAMES), (drawn.count, COUNT_NAMES), (drawn.place, PLACE_NAMES)):
        shares = torch.bincount(column, minlength=len(names)) / len(column)
        assert torch.allclose(shares, torch.tensor(1 / len(names)), atol=0.02)


# ---- the same arguments, the same pictures


def rows_of(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def test_galleries_follow_from_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    world = PaintedWorld(size=32)
    first = {split: world.gallery(split, 96, 5, "cpu") for split in ("train", "held", "unseen")}
    monkeypatch.setattr(painter, "_CHUNK", 7)
    for split, gallery in first.items():
        again = world.gallery(split, 96, 5, "cpu")
        assert torch.equal(again.images, gallery.images), "painting in chunks of 7 differs"
        assert (again.captions, again.clauses) == (gallery.captions, gallery.clauses)
        assert torch.equal(again.styles, gallery.styles)
        assert {n: v.tolist() for n, v in again.labels.items()} == {n: v.tolist() for n, v in gallery.labels.items()}
        assert FINISH_NAMES.index("grainy") in gallery.labels["finish"], "grain must be among what is repeated"

    pictures = [row for gallery in first.values() for row in rows_of(gallery.images)]
    other = rows_of(world.gallery("train", 96, 6, "cpu").images)
    assert len(set(pictures + other)) == 4 * 96, "splits or seeds share a picture"


def test_a_gallery_has_eight_pictures_of_a_style() -> None:
    gallery = PaintedWorld(size=16).gallery("train", 60, 0, "cpu")
    assert gallery.styles.bincount().tolist() == [8] * 7 + [4] and len(gallery) == len(gallery.captions) == 60
    for label in ("background", "background_hue", "fill", "fill_hue", "outline", "finish"):
        assert len(triples(gallery.styles, gallery.labels[label])) == 8, "a style has one class of each label"
    assert len(PaintedWorld(size=16, train_count=9).gallery("train", None, 0, "cpu")) == 9


# ---- labels against pixels


def pieces(mask: np.ndarray) -> int:
    """Connected components of a mask; corners connect, as the tip of a star is a pixel wide."""
    left = set(zip(*(axis.tolist() for axis in mask.nonzero()), strict=True))
    number = 0
    while left:
        front, number = [left.pop()], number + 1
        while front:
            y, x = front.pop()
            near = left & {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
            left -= near
            front += near
    return number


def eroded(mask: np.ndarray) -> np.ndarray:
    """Without the pixels that have a neighbour outside, across corners too."""
    return np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (3, 3)).all((2, 3))


def rgb(color: Tensor) -> np.ndarray:
    hue, saturation, lightness = color.tolist()
    return 255 * np.array(colorsys.hls_to_rgb(hue, lightness, saturation))


# Of the centroid, as shares of the side: x and y.
WHERE = {
    "middle": ((0.38, 0.62), (0.38, 0.62)),
    "left": ((0.0, 0.38), (0.38, 0.62)),
    "right": ((0.62, 1.0), (0.38, 0.62)),
    "top": ((0.38, 0.62), (0.0, 0.38)),
    "bottom": ((0.38, 0.62), (0.62, 1.0)),
}


def test_pixels_show_what_the_labels_say() -> None:
    """Plain drawings of every content: place by the centroid, count by connected pieces, both colours exactly."""
    size = 112
    contents = contents_of(torch.arange(NUM_CONTENTS))
    zeros = torch.zeros(NUM_CONTENTS, dtype=torch.int64)
    styles = replace(
        draw_styles(NUM_CONTENTS, seeded(7)), pattern=zeros, fill=zeros, finish=zeros, outline=torch.zeros(NUM_CONTENTS)
    )
    images = paint(contents, styles, draw_poses(contents, seeded(8)), size)
    touching = 0
    for number, (kind, count, place) in enumerate(
        zip(contents.kind.tolist(), contents.count.tolist(), contents.place.tolist(), strict=True)
    ):
        what = name_content(kind, count, place)
        image = images[number].permute(1, 2, 0).numpy().astype(float)
        paper, body = rgb(styles.background[number]), rgb(styles.body[number])
        for corner in (image[0, 0], image[0, -1], image[-1, 0], image[-1, -1]):
            assert np.abs(corner - paper).max() <= 1, what
        mask = np.abs(image - paper).sum(-1) > np.abs(body - paper).sum() / 2  # covered by half at least
        y, x = ((axis.mean() + 0.5) / size for axis in mask.nonzero())
        (left, right), (top, bottom) = WHERE[PLACE_NAMES[place]]
        assert left < x < right and top < y < bottom, f"{what}: the centroid is at {x:.2f}, {y:.2f}"
        if KIND_NAMES[kind] in ONE_PIECE:
            touching += pieces(mask) != count + 1
            inside = image[eroded(eroded(mask))]
            assert len(inside) > 20 and np.abs(inside - body).max() <= 1, what
    assert touching <= 1, "two hearts may touch, rarely"


def test_three_objects_are_apart_in_nearly_every_pose() -> None:
    kinds, places, _ = zip(*itertools.product(ONE_PIECE, range(len(PLACE_NAMES)), range(8)), strict=True)
    number = len(kinds)
    kind = torch.tensor([KIND_NAMES.index(name) for name in kinds])
    contents = Contents(kind=kind, count=torch.full((number,), 2), place=torch.tensor(places))
    zeros = torch.zeros(number, dtype=torch.int64)
    styles = pick(draw_styles(1, seeded(3)), zeros)
    styles = replace(styles, pattern=zeros, fill=zeros, finish=zeros, outline=torch.zeros(number))
    images = paint(contents, styles, draw_poses(contents, seeded(9)), 112).numpy().astype(float)
    paper, body = rgb(styles.background[0]), rgb(styles.body[0])
    masks = np.abs(images - paper[:, None, None]).sum(1) > np.abs(body - paper).sum() / 2
    assert sum(pieces(mask) != 3 for mask in masks) <= number / 50


@pytest.mark.parametrize(
    ("field", "classes"), [("pattern", PATTERN_NAMES), ("fill", FILL_NAMES), ("finish", FINISH_NAMES)]
)
def test_every_class_of_a_style_looks_different(field: str, classes: tuple[str, ...]) -> None:
    number = len(classes)
    same = torch.zeros(number, dtype=torch.int64)
    contents = pick(contents_of(torch.tensor([0])), same)
    styles = replace(pick(draw_styles(1, seeded(4)), same), pattern=same, fill=same, finish=same)
    styles = replace(styles, outline=torch.full((number,), 0.03), **{field: torch.arange(number)})
    poses = pick(draw_poses(contents_of(torch.tensor([0])), seeded(5)), same)
    images = paint(contents, styles, poses, 64).float()
    for one, other in itertools.combinations(range(number), 2):
        share = ((images[one] - images[other]).abs().amax(0) > 4).float().mean()
        assert share > 0.011, (classes[one], classes[other])  # of the picture; the object fills a tenth
    if field == "pattern":  # it changes the background alone
        centre = images[:, :, 32, 32]
        assert (centre - centre[0]).abs().max() <= 1


def test_a_hollow_drawing_is_its_outline_as_thick_as_it_is_called() -> None:
    """Without fill there is nothing but the outline: it is never missing, and thin and thick differ."""
    styles = draw_styles(4000, seeded(6))
    hollow = (styles.fill == FILL_NAMES.index("hollow")).nonzero().squeeze(1)
    assert sorted(set(outline_class(pick(styles, hollow)).tolist())) == [1, 2]
    assert set(outline_class(styles).tolist()) == {0, 1, 2}
    two = replace(pick(styles, hollow[:1].repeat(2)), outline=torch.tensor([0.018, 0.04]), finish=torch.zeros(2).long())
    contents = contents_of(torch.zeros(2, dtype=torch.int64))
    poses = pick(draw_poses(contents, seeded(5)), torch.zeros(2, dtype=torch.int64))
    thin, thick = paint(contents, two, poses, 64).float()
    assert ((thin - thick).abs().amax(0) > 20).float().mean() > 0.02
    words = name_styles(pick(styles, hollow), torch.ones(len(hollow), 4, dtype=torch.bool))
    assert not [said for said in words if re.search(r"(dark|light) outlines", " ".join(said))], (
        "it has the objects' colour"
    )


def test_no_place_and_count_has_objects_larger_than_others_have() -> None:
    """Else a kind held out there has never been seen so large."""
    every = contents_of(torch.arange(NUM_CONTENTS).repeat(40))
    largest = draw_poses(every, seeded(1)).radius.amax(1)
    of_cell = torch.zeros(15).scatter_reduce(0, every.count * len(PLACE_NAMES) + every.place, largest, "amax")
    alone_in_the_middle = of_cell[PLACE_NAMES.index("middle")]
    others = of_cell[[cell for cell in range(10) if cell != PLACE_NAMES.index("middle")]]
    assert alone_in_the_middle < 1.02 * others.median()


# ---- words

STYLE_WORDS = {*PATTERN_NAMES, *FILL_NAMES, *OUTLINE_NAMES, *FINISH_NAMES, *HUE_NAMES, *TONE_NAMES, *SATURATION_NAMES}
CSS_COLORS = {
    "red": (255, 0, 0),
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "green": (0, 128, 0),
    "teal": (0, 128, 128),
    "blue": (0, 0, 255),
    "purple": (128, 0, 128),
    "pink": (255, 105, 180),  # hotpink: the one called pink is a pale red
}


def test_hues_are_called_as_in_css() -> None:
    assert tuple(CSS_COLORS) == HUE_NAMES
    for name, channels in CSS_COLORS.items():
        hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in channels))
        assert HUE_NAMES[hue_class(torch.tensor([[hue, saturation, lightness]])).item()] == name
    lightness = torch.tensor([[0.3, 0.7, value] for value in (0.1, 0.4, 0.6, 0.9)])
    assert [TONE_NAMES[i] for i in tone_class(lightness)] == ["dark", "deep", "light", "pale"]


TONES, HUES = "|".join(TONE_NAMES), "|".join(HUE_NAMES)
LIES = r"plain|(?:upright|rising|level|falling) shaded|(?:fine|wide) (?:upright|rising|level|falling) striped"
LIES += r"|(?:fine|wide) (?:straight|tilted) (?:checkered|dotted)"
WORDS = re.compile(
    rf"(?P<fill>{'|'.join(FILL_NAMES)}) (?P<tone>{TONES}) (?P<hue>{HUES})"
    rf" (?P<outline>no|thin|thick)( (?P<ink>dark|light))? outlines"
    rf" on a (?P<pattern>{LIES}) (?P<saturation>dull|vivid) (?P<back_tone>{TONES}) (?P<back_hue>{HUES}) background"
    rf" (?P<finish>{'|'.join(FINISH_NAMES)})"
)


@pytest.mark.parametrize(("turn", "name"), [(0.0, "upright"), (0.25, "rising"), (0.5, "level"), (0.75, "falling")])
def test_stripes_lie_as_they_are_called(turn: float, name: str) -> None:
    """y counts downwards: rising stripes go from the lower left to the upper right, where x + y is the same."""
    styles = pick(draw_styles(1, seeded(3)), torch.zeros(1, dtype=torch.int64))
    striped = torch.tensor([PATTERN_NAMES.index("striped")])
    styles = replace(
        styles, pattern=striped, angle=torch.tensor([turn * torch.pi]), finish=striped * 0, period=torch.tensor([0.3])
    )
    assert name_patterns(styles) == [f"wide {name} striped"]
    contents = contents_of(torch.tensor([0]))
    picture = paint(contents, styles, replace(draw_poses(contents, seeded(1)), radius=torch.zeros(1, 3)), 64).float()[0]
    along = {"upright": (1, 0), "level": (0, 1), "rising": (-1, 1), "falling": (1, 1)}  # rows down, columns right
    moved = {other: picture.roll(step, (1, 2))[:, 2:-2, 2:-2] for other, step in along.items()}
    changes = {other: float((there - picture[:, 2:-2, 2:-2]).abs().mean()) for other, there in moved.items()}
    assert min(changes, key=lambda other: changes[other]) == name and changes[name] < 0.5


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_words_of_a_style_are_its_classes(seed: int) -> None:
    styles = draw_styles(40, seeded(seed))
    contents = contents_of(torch.zeros(40, dtype=torch.int64))
    labels = labels_of(contents, styles)
    body_tone, back_tone = tone_class(styles.body), tone_class(styles.background)
    for row, clauses in enumerate(name_styles(styles, torch.ones(40, 4, dtype=torch.bool))):
        said = WORDS.fullmatch(" ".join(clauses))
        assert said and len(clauses) == 4, clauses
        assert said["fill"] == FILL_NAMES[labels["fill"][row]] and said["finish"] == FINISH_NAMES[labels["finish"][row]]
        assert said["hue"] == HUE_NAMES[labels["fill_hue"][row]]
        assert said["back_hue"] == HUE_NAMES[labels["background_hue"][row]]
        assert said["pattern"].split()[-1] == PATTERN_NAMES[labels["background"][row]]
        assert said["saturation"] == SATURATION_NAMES[int(styles.background[row, 1] > 0.62)]
        assert said["outline"] == OUTLINE_NAMES[labels["outline"][row]]
        bare = styles.outline[row] == 0 or styles.fill[row] == FILL_NAMES.index("hollow")
        assert (said["ink"] is None) == bool(bare)
        assert (said["tone"], said["back_tone"]) == (TONE_NAMES[body_tone[row]], TONE_NAMES[back_tone[row]])
        assert said["ink"] in (None, "dark" if styles.ink[row] < 0.5 else "light")
    assert name_styles(styles, torch.zeros(40, 4, dtype=torch.bool)) == [()] * 40


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_objects_stand_out_from_both_colours_of_the_background(seed: int) -> None:
    styles = draw_styles(200, seeded(seed))
    for paper in (styles.background, styles.second):
        assert (styles.body[:, 2] - paper[:, 2]).abs().min() > 0.1
    assert (hue_class(styles.background) < len(HUE_NAMES)).all()
    for f in fields(Styles):
        values = getattr(styles, f.name)
        assert values.isfinite().all() and (values >= 0).all(), f.name


def test_captions_name_the_content_and_detailed_ones_the_style() -> None:
    gallery = PaintedWorld(size=16).gallery("train", 800, 0, "cpu")
    full, bare, said = 0, 0, Counter[str]()
    for row, (plain, detailed) in enumerate(zip(gallery.captions, gallery.detailed, strict=True)):
        content = [int(gallery.labels[name][row]) for name in ("kind", "count", "place")]
        phrasings = [name_content(*content, phrasing=phrasing) for phrasing in range(PHRASINGS)]
        noun = KIND_NAMES[content[0]] + ("s" if content[1] and KIND_NAMES[content[0]] != "fish" else "")
        for text in (plain, detailed):
            assert {noun, COUNT_NAMES[content[1]], PLACE_NAMES[content[2]]} <= set(text.split()), text
        assert plain in phrasings and not STYLE_WORDS & set(plain.split()), plain
        begun = [phrasing for phrasing in phrasings if detailed.startswith(phrasing)]
        style = detailed.removeprefix(max(begun, key=len)).strip()
        said.update(word for word in style.split() if word in STYLE_WORDS)
        bare += not style
        if match := WORDS.fullmatch(style):
            full += 1
            assert len(detailed.split()) <= 24, detailed
            assert match["hue"] == HUE_NAMES[gallery.labels["fill_hue"][row]]
        content_alone, everything = gallery.replies[row]
        assert content_alone == phrasings[0] and everything.startswith(content_alone)
        assert WORDS.fullmatch(everything.removeprefix(content_alone).strip()), everything
    assert full > 400 and bare < 40, "half name everything, hardly any nothing"
    assert set(said) == STYLE_WORDS, "every word of a style is said somewhere"
    assert len({phrase.split()[0] for phrase in gallery.captions}) >= 5, "all phrasings are used"


# ---- distances


def around(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Turns of a closed polygon around each point: 0 outside."""
    offset = polygon[None] - points[:, None]
    angles = np.arctan2(offset[..., 1], offset[..., 0])
    steps = np.diff(np.concatenate([angles, angles[:, :1]], 1))
    return np.abs(np.round(((steps + np.pi) % (2 * np.pi) - np.pi).sum(1) / (2 * np.pi)))


@pytest.mark.parametrize("name", ["star", "heart", "moon", "triangle", "fish"])
def test_polygon_distance_by_brute_force(name: str) -> None:
    corners = np.array(KINDS[name][0].outline)
    points = np.random.default_rng(0).uniform(-1.4, 1.4, (500, 2))
    found = polygon_distance(torch.tensor(points), torch.tensor(corners)).numpy()
    share = np.linspace(0, 1, 400)[:, None, None]
    on_edge = (corners + share * (np.roll(corners, -1, 0) - corners)).reshape(-1, 2)
    nearest = np.concatenate(
        [np.linalg.norm(part[:, None] - on_edge, axis=-1).min(1) for part in np.array_split(points, 10)]
    )
    inside = around(corners, points) == 1
    assert inside.any() and (~inside).any()
    assert np.array_equal(found < 0, inside)
    assert np.abs(np.abs(found) - nearest).max() < 5e-3


def test_distances_of_a_circle_and_a_square_are_exact() -> None:
    points = torch.rand(2000, 2, dtype=torch.float64, generator=seeded(0)) * 2.8 - 1.4
    square = polygon_distance(points, torch.tensor(KINDS["square"][0].outline, dtype=torch.float64))
    beyond = points.abs() - 0.8
    exact = beyond.clamp_min(0).norm(dim=1) + beyond.amax(1).clamp_max(0)
    assert torch.allclose(square, exact, atol=1e-12)
    circle = polygon_distance(points, torch.tensor(KINDS["circle"][0].outline, dtype=torch.float64))
    polygon_error = 0.9 * (1 - np.cos(np.pi / 48))
    assert (circle - (points.norm(dim=1) - 0.9)).abs().max() <= polygon_error + 1e-9


def test_the_atlas_holds_every_kind_in_its_own_frame() -> None:
    atlas = distance_atlas()
    side = atlas.shape[-1]
    axis = (torch.arange(side) + 0.5) / side * 2 * REACH - REACH
    circle = (axis[:, None].square() + axis.square()).sqrt() - 0.9
    assert (atlas[KIND_NAMES.index("circle"), 0] - circle).abs().max() < 3e-3
    for kind, (name, parts) in enumerate(KINDS.items()):
        whole = atlas[kind, 0]
        assert (whole < 0).any() and (torch.cat([whole[0], whole[-1], whole[:, 0], whole[:, -1]]) > 0.3).all(), name
        for tone in (1, 2):
            within = atlas[kind, tone] < 0
            assert bool(within.any()) == any(part.tone == tone for part in parts), name
            assert (whole[within] < 0).all(), f"{name}: a tone reaches outside the object"
    triangle = atlas[KIND_NAMES.index("triangle"), 0]
    upper, lower = (triangle[: side // 2] < 0).sum(), (triangle[side // 2 :] < 0).sum()
    assert lower > 2 * upper, "y runs down"


# ---- style folders


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return the_forge().run(["miniature.style_folders", *map(str, arguments)], {**os.environ})


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Painted style folders that no test changes."""
    folder = tmp_path_factory.mktemp("painted")
    paint_style_folders(folder, size=32, num_contents=NUM_CONTENTS_PAINTED)
    return folder


@pytest.mark.usefixtures("forge")
def test_painting_is_deterministic_and_distinct(painted: Path, tmp_path: Path) -> None:
    done = run("--out", tmp_path / "again", "--size", 32, "--num-contents", NUM_CONTENTS_PAINTED)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "again") == digests(painted)
    assert len(set(digests(painted).values())) == len(STYLES) * NUM_CONTENTS_PAINTED + 1
    means = {}
    for style in STYLES:  # a style is nearer to itself than to any other, by its average picture
        stack = [np.asarray(open_image(path)).astype(float) for path in sorted((painted / "images" / style).iterdir())]
        means[style] = (np.mean(stack[::2], axis=0), np.mean(stack[1::2], axis=0))
    for style, (even, _) in means.items():
        gaps = {other: float(np.abs(even - odd).mean()) for other, (_, odd) in means.items()}
        assert min(gaps, key=gaps.__getitem__) == style
        assert sorted(gaps.values())[1] > 2 * gaps[style]
    paint_style_folders(tmp_path / "again", size=32, num_contents=NUM_CONTENTS_PAINTED)  # over itself
    assert digests(tmp_path / "again") == digests(painted)
    paint_style_folders(tmp_path / "other", size=32, num_contents=NUM_CONTENTS_PAINTED, seed=1)
    other = digests(tmp_path / "other")
    assert not set(other.values()) & set(digests(painted).values())


def test_folders_hold_what_their_names_say(tmp_path: Path, painted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One content is posed alike in every style: with colours and manners taken away all folders are equal."""
    assert [path.name for path in sorted((painted / "images").iterdir())] == list(STYLES)
    with (painted / "contents.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        kind, count, place = row["id"].split("-")
        assert row["prompt"] == name_content(KIND_NAMES.index(kind), int(count) - 1, PLACE_NAMES.index(place))
    style = style_folders.folder_styles(0)
    one_style = pick(style, torch.zeros(len(STYLES), dtype=torch.int64))
    monkeypatch.setattr(style_folders, "folder_styles", lambda seed: one_style)
    paint_style_folders(tmp_path, size=32, num_contents=NUM_CONTENTS_PAINTED)
    for row in rows:
        names = [f"images/{style}/{row['id']}.png" for style in STYLES]
        assert len({(tmp_path / name).read_bytes() for name in names}) == 1
        assert len({(painted / name).read_bytes() for name in names}) == len(STYLES)


def test_prompts_name_the_content_only(tmp_path: Path) -> None:
    paint_style_folders(tmp_path, size=16, num_contents=NUM_CONTENTS)
    with (tmp_path / "contents.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == len({row["id"] for row in rows}) == NUM_CONTENTS
    assert {"one star in the middle", "two fish at the top", "three boats on the left"} <= set(prompts)
    assert not [prompt for prompt in prompts if (STYLE_WORDS | set(STYLES)) & set(prompt.split())]
    assert Counter(row["split"] for row in rows) == {"train": 150, "val": 30}


@pytest.mark.usefixtures("forge")
def test_painter_refusals(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(InputError, match="holds something else"):
        paint_style_folders(tmp_path, num_contents=6)
    with pytest.raises(InputError, match="num_contents 181"):
        paint_style_folders(tmp_path / "new", num_contents=181)
    done = run("--out", tmp_path / "new", "--size", 8)
    assert (done.returncode, done.stderr) == (2, "error: size 8 must be at least 16 pixels\n")
    assert not (tmp_path / "new").exists()


def test_many_styles_keep_styles_contents_and_what_is_held_apart(tmp_path: Path) -> None:
    paint_many_styles(tmp_path / "many", {"train": (30, 4), "val": (5, 4), "test": (7, 4)}, size=16)
    paint_many_styles(tmp_path / "ten", {"train": (40, 10)}, size=16)
    with (tmp_path / "many/contents.csv").open(encoding="utf-8") as file:
        split_of = {row["id"]: row["split"] for row in csv.DictReader(file)}
    assert Counter(split_of.values()) == {"train": 120, "val": 24, "test": 24}
    pictures = sorted((tmp_path / "many/images").rglob("*.png"))
    assert len(pictures) == 4 * 42 == len({path.read_bytes() for path in pictures})
    styles = style_folders.draw_styles(42, torch.Generator().manual_seed(0))
    for row, split in enumerate(["train"] * 30 + ["val"] * 5 + ["test"] * 7):
        number = row - {"train": 0, "val": 30, "test": 35}[split]
        names = [path.stem for path in (tmp_path / f"many/images/{split}-{number:04d}").iterdir()]
        assert {split_of[name] for name in names} == {split} and len({name.split("-")[0] for name in names}) == 4
        contents = contents_of(torch.tensor([read_name(name) for name in names]))
        assert [KIND_NAMES[kind] for kind in contents.kind] == [name.split("-")[0] for name in names]
        assert not is_unseen(contents).any()
        assert split != "train" or not is_held(contents, pick(styles, torch.full((4,), row))).any()
    before = digests(tmp_path / "many")
    paint_many_styles(tmp_path / "many", {"train": (30, 4), "val": (5, 4), "test": (7, 4)}, size=16)
    assert digests(tmp_path / "many") == before
    with pytest.raises(InputError, match="many: holds something else already"):  # train-0029 would stay
        paint_many_styles(tmp_path / "many", {"train": (29, 4), "val": (5, 4), "test": (7, 4)}, size=16)
    with pytest.raises(InputError, match="train: 11 pictures of a style must be from 2 to 10"):
        paint_many_styles(tmp_path / "more", {"train": (1, 11)})
    with pytest.raises(InputError, match="'cat-9-left' is no content of the painted world"):
        read_name("cat-9-left")
