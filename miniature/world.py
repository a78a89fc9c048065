"""The painted world on paper: what can be drawn, how, in which words, and which combinations nobody may train on.

Content: a kind of object, one to three of it, at one of five places. Style: palette, background, fill, outline and
finish, from a continuous space whose words are coarser than the space. Both are drawn independently, apart from the
combinations that are held out. Nothing here paints; painter.py does.

Legend: N pictures.
"""

import itertools
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from miniature.gallery import Split
from miniature.shapes import KINDS

WORLD_VERSION = 2  # raise it when the same seed no longer gives the same pictures and words

KIND_NAMES = tuple(KINDS)
PLURALS = {"fish": "fish"}
COUNT_NAMES = ("one", "two", "three")

# The words for a place, then its centre, width and height as shares of the side.
PLACES = {
    "middle": ("in the middle", 0.5, 0.5, 0.92, 0.92),
    "left": ("on the left", 0.27, 0.5, 0.46, 0.94),
    "right": ("on the right", 0.73, 0.5, 0.46, 0.94),
    "top": ("at the top", 0.5, 0.27, 0.94, 0.46),
    "bottom": ("at the bottom", 0.5, 0.73, 0.94, 0.46),
}
PLACE_NAMES = tuple(PLACES)

PATTERN_NAMES = ("plain", "shaded", "striped", "checkered", "dotted")
FILL_NAMES = ("solid", "glossy", "hatched", "hollow")
HOLLOW = FILL_NAMES.index("hollow")
OUTLINE_NAMES = ("no", "thin", "thick")
FINISH_NAMES = ("smooth", "grainy", "pixelated", "blurred")
HUE_NAMES = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
_HUE_STARTS = (0.0, 0.05, 0.12, 0.2, 0.44, 0.54, 0.72, 0.84, 0.95)  # where each name begins; red goes on past the last
TONE_NAMES = ("dark", "deep", "light", "pale")
SATURATION_NAMES = ("dull", "vivid")
PERIOD_NAMES = ("fine", "wide")
TILT_NAMES = ("upright", "rising", "level", "falling")
"""Of stripes and shades; squares and dots look alike after a quarter turn and are only straight or tilted."""

Record = TypeVar("Record", "Contents", "Styles")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What N pictures show, int64 (N,) each: indices into KIND_NAMES, COUNT_NAMES and PLACE_NAMES."""

    kind: Tensor
    count: Tensor
    place: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Styles:
    """How N pictures are drawn; (N,) each, colours (N, 3) as hue, saturation, lightness in [0, 1].

    Lengths are shares of the picture's side. `pattern`, `fill` and `finish` are int64 indices into their names.
    """

    pattern: Tensor
    background: Tensor
    """First colour of the background."""
    second: Tensor
    """Its other colour; a plain background has none of it."""
    period: Tensor
    """Distance of stripes, squares or dots, 0.14 .. 0.3."""
    angle: Tensor
    """Direction of the pattern in radians, 0 .. pi."""
    fill: Tensor
    body: Tensor
    """The objects' main colour."""
    accent_turn: Tensor
    """Hue of the objects' second colour against the first, 0.25 .. 0.75 of the circle."""
    light: Tensor
    """Where the light of a glossy fill comes from, and the direction of hatching, in radians."""
    outline: Tensor
    """Width of the outline, 0 .. 0.045; thinner than 0.008 is none, which no hollow object has."""
    ink: Tensor
    """Lightness of the outline: below 0.5 dark, above light. Hollow objects' has their main colour instead."""
    finish: Tensor
    amount: Tensor
    """How strong the finish is, 0.5 .. 1."""


def pick(record: Record, indices: Tensor) -> Record:
    """The entries at these positions, of contents or styles."""
    return type(record)(**{f.name: getattr(record, f.name)[indices] for f in fields(record)})


NUM_CONTENTS = len(KIND_NAMES) * len(COUNT_NAMES) * len(PLACE_NAMES)


def contents_of(numbers: Tensor) -> Contents:
    """Contents by their number 0 .. NUM_CONTENTS - 1: kinds change slowest, places fastest."""
    places, counts = len(PLACE_NAMES), len(COUNT_NAMES)
    return Contents(kind=numbers // (places * counts), count=numbers // places % counts, place=numbers % places)


def is_unseen(contents: Contents) -> Tensor:
    """Which contents no model may see drawn, (N,) bool: one of each kind's fifteen."""
    cell = contents.count * len(PLACE_NAMES) + contents.place
    return (cell - 4 * contents.kind) % 15 == 0


def is_held(contents: Contents, styles: Styles) -> Tensor:
    """Which known contents no model may see in which styles, (N,) bool: of each kind a tenth of pattern x fill."""
    return _held_out(contents.kind, styles)


def _held_out(kind: Tensor, styles: Styles) -> Tensor:
    return (kind + 4 * styles.pattern + styles.fill) % 10 == 0


def draw_contents(styles: Styles, split: Split, generator: torch.Generator) -> Contents:
    """One content of the split for each style, all possible ones equally likely."""
    every = contents_of(torch.arange(NUM_CONTENTS))
    unseen = is_unseen(every)  # (C,)
    held = _held_out(every.kind[:, None], styles).T  # (N, C)
    allowed = {
        "train": ~unseen & ~held,
        "held": ~unseen & held,
        "unseen": unseen.expand_as(held),
        "all": torch.ones_like(held),
    }[split]
    return contents_of(torch.multinomial(allowed.float(), 1, generator=generator).squeeze(1))


def draw_styles(count: int, generator: torch.Generator) -> Styles:
    """Styles from the whole space; objects and background always differ in lightness."""

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def choice(number: int) -> Tensor:
        return torch.randint(number, (count,), generator=generator)

    paper = torch.where(uniform() < 0.5, uniform(0.18, 0.4), uniform(0.62, 0.85))
    background = torch.stack([uniform(), uniform(0.35, 0.9), paper], 1)
    second = torch.stack(
        [
            (background[:, 0] + uniform(-0.08, 0.08)) % 1,
            background[:, 1],
            # Towards the middle, away from the objects' colour.
            paper + torch.where(paper > 0.5, -1.0, 1.0) * uniform(0.13, 0.2),
        ],
        1,
    )
    # Far enough from both colours of the background, on the side with more room.
    body_lightness = torch.where(paper > 0.5, uniform(0.12, 0.3), uniform(0.72, 0.88))
    body = torch.stack([uniform(), uniform(0.5, 1.0), body_lightness], 1)
    fill = choice(len(FILL_NAMES))
    thickness = choice(3)
    # A hollow object is nothing but its outline.
    thickness = torch.where((fill == HOLLOW) & (thickness == 0), 1 + choice(2), thickness)
    widths = torch.stack([torch.zeros(count), uniform(0.018, 0.024), uniform(0.03, 0.045)], 1)
    ink = torch.where(uniform() < 0.5, uniform(0.02, 0.15), uniform(0.85, 1.0))
    return Styles(
        pattern=choice(len(PATTERN_NAMES)),
        background=background,
        second=second,
        period=uniform(0.14, 0.3),
        angle=uniform(0.0, torch.pi),
        fill=fill,
        body=body,
        accent_turn=uniform(0.25, 0.75),
        light=uniform(0.0, 2 * torch.pi),
        outline=widths[torch.arange(count), thickness],
        ink=ink,
        finish=choice(len(FINISH_NAMES)),
        amount=uniform(0.5, 1.0),
    )


def hue_class(color: Tensor) -> Tensor:
    """(N, 3) hue, saturation, lightness -> (N,) index into HUE_NAMES."""
    return torch.bucketize(color[:, 0].contiguous(), torch.tensor(_HUE_STARTS[1:]), right=True) % len(HUE_NAMES)


def tone_class(color: Tensor) -> Tensor:
    """(N, 3) hue, saturation, lightness -> (N,) index into TONE_NAMES."""
    return torch.bucketize(color[:, 2].contiguous(), torch.tensor([0.27, 0.5, 0.76]))


def name_patterns(styles: Styles) -> list[str]:
    """How the background's pattern lies: its period and its direction, as far as it has them."""
    period = (styles.period > 0.22).long().tolist()
    eighths = (styles.angle / (torch.pi / 4)).round().long()
    tilt = (eighths % len(TILT_NAMES)).tolist()
    found: list[str] = []
    for index, pattern in enumerate(PATTERN_NAMES[i] for i in styles.pattern.tolist()):
        match pattern:
            case "plain":
                found.append(pattern)
            case "shaded":
                found.append(f"{TILT_NAMES[tilt[index]]} {pattern}")
            case "striped":
                found.append(f"{PERIOD_NAMES[period[index]]} {TILT_NAMES[tilt[index]]} {pattern}")
            case _:
                lies = ("straight", "tilted")[tilt[index] % 2]
                found.append(f"{PERIOD_NAMES[period[index]]} {lies} {pattern}")
    return found


def outline_class(styles: Styles) -> Tensor:
    """(N,) index into OUTLINE_NAMES."""
    return torch.bucketize(styles.outline, torch.tensor([0.008, 0.026]))


CONTENT_CLASSES: dict[str, tuple[str, ...]] = {"kind": KIND_NAMES, "count": COUNT_NAMES, "place": PLACE_NAMES}
STYLE_CLASSES: dict[str, tuple[str, ...]] = {
    "background": PATTERN_NAMES,
    "background_hue": HUE_NAMES,
    "fill": FILL_NAMES,
    "fill_hue": HUE_NAMES,
    "outline": OUTLINE_NAMES,
    "finish": FINISH_NAMES,
}


def labels_of(contents: Contents, styles: Styles) -> dict[str, Tensor]:
    """The classes of CONTENT_CLASSES and STYLE_CLASSES, each (N,)."""
    return {
        "kind": contents.kind,
        "count": contents.count,
        "place": contents.place,
        "background": styles.pattern,
        "background_hue": hue_class(styles.background),
        "fill": styles.fill,
        "fill_hue": hue_class(styles.body),
        "outline": outline_class(styles),
        "finish": styles.finish,
    }


def name_content(kind: int, count: int, place: int, phrasing: int = 0) -> str:
    """Two stars on the left; `phrasing` 0 .. 3 says it in other words."""
    number, where = COUNT_NAMES[count], PLACES[PLACE_NAMES[place]][0]
    name = KIND_NAMES[kind]
    noun = name if count == 0 else PLURALS.get(name, f"{name}s")
    return (
        f"{number} {noun} {where}",
        f"a picture of {number} {noun} {where}",
        f"{where} {number} {noun}",
        f"{number} {noun} drawn {where}",
    )[phrasing]


PHRASINGS = 4


def name_styles(styles: Styles, chosen: Tensor) -> list[tuple[str, ...]]:
    """The words of N styles, of each the clauses that `chosen` (N, 4) bool asks for; empty where it asks for none."""
    tables: list[list[str]] = [
        [TONE_NAMES[i] for i in tone_class(styles.body).tolist()],
        [HUE_NAMES[i] for i in hue_class(styles.body).tolist()],
        [FILL_NAMES[i] for i in styles.fill.tolist()],
        [OUTLINE_NAMES[i] for i in outline_class(styles).tolist()],
        ["dark" if i < 0.5 else "light" for i in styles.ink.tolist()],
        [TONE_NAMES[i] for i in tone_class(styles.background).tolist()],
        [HUE_NAMES[i] for i in hue_class(styles.background).tolist()],
        [SATURATION_NAMES[i] for i in (styles.background[:, 1] > 0.62).long().tolist()],
        name_patterns(styles),
        [FINISH_NAMES[i] for i in styles.finish.tolist()],
    ]
    texts = []
    for row, wanted in zip(zip(*tables, strict=True), chosen.tolist(), strict=True):
        tone, hue, fill, outline, ink, back_tone, back_hue, saturation, pattern, finish = row
        has_ink = outline != "no" and fill != FILL_NAMES[HOLLOW]
        edge = f"{outline} {ink} outlines" if has_ink else f"{outline} outlines"
        background = f"on a {pattern} {saturation} {back_tone} {back_hue} background"
        texts.append(tuple(itertools.compress((f"{fill} {tone} {hue}", edge, background, finish), wanted)))
    return texts
