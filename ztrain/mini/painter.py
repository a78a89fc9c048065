"""Paints small style folders, so that the demo and the tests need no download.

    python -m ztrain.mini.painter --out DIR

Out: `<folder>/images/<style>/<id>.png` and `<folder>/contents.csv`, the layout that data_tools.build reads. A
content is an object, how many of it and where; a style is palette, background and the way of drawing.
Both are independent, and prompts name the content only.
"""

import argparse
import itertools
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

from ztrain.errors import InputError

SUPERSAMPLING = 4
"""Pictures are drawn this many times larger and scaled down, as ImageDraw has no anti-aliasing."""

Point = tuple[float, float]
Color = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """A filled polygon of an object: `tone` 0 is the body, 1 the second colour, 2 a dark or light detail."""

    tone: int
    outline: tuple[Point, ...]
    """Corners in the object's own frame: x to the right, y down, both -1..1."""


@dataclass(frozen=True, slots=True)
class Content:
    """What is drawn, in no style."""

    kind: str
    count: int
    place: str

    @property
    def name(self) -> str:
        """The id in the table, also the file name: star-2-left."""
        return f"{self.kind}-{self.count}-{self.place}"

    @property
    def prompt(self) -> str:
        """Two stars on the left."""
        number = {1: "a", 2: "two", 3: "three"}[self.count]
        noun = self.kind if self.count == 1 else PLURALS.get(self.kind, f"{self.kind}s")
        return f"{number} {noun}{PLACES[self.place][0]}"


PLURALS = {"fish": "fish"}

# The words for a place, then its centre, width and height as shares of the side.
PLACES = {
    "middle": ("", 0.5, 0.5, 0.86, 0.86),
    "left": (" on the left", 0.27, 0.5, 0.42, 0.9),
    "right": (" on the right", 0.73, 0.5, 0.42, 0.9),
    "top": (" at the top", 0.5, 0.27, 0.9, 0.42),
    "bottom": (" at the bottom", 0.5, 0.73, 0.9, 0.42),
}


def _ellipse(tone: int, x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> Part:
    """An ellipse, or the slice of it between two angles in degrees (clockwise from the right)."""
    angles = [math.radians(start + (end - start) * step / 48) for step in range(49)]
    return Part(tone, tuple((x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles))


def _polygon(tone: int, *corners: Point) -> Part:
    return Part(tone, corners)


def _box(tone: int, left: float, top: float, right: float, bottom: float) -> Part:
    return Part(tone, ((left, top), (right, top), (right, bottom), (left, bottom)))


def _star(points: int, inner: float) -> Part:
    """Corners in turn on the radii 1 and `inner`, the first one on top."""
    turns = [(math.pi * step / points, inner if step % 2 else 1) for step in range(2 * points)]
    return Part(0, tuple((radius * math.sin(angle), -radius * math.cos(angle)) for angle, radius in turns))


def _heart() -> Part:
    angles = [math.tau * step / 64 for step in range(64)]
    waves = ((1, 13), (2, -5), (3, -2), (4, -1))  # the usual heart curve, its height as sums of cosines
    heights = [sum(weight * math.cos(times * angle) for times, weight in waves) / 16 for angle in angles]
    return Part(0, tuple((math.sin(a) ** 3, -height) for a, height in zip(angles, heights, strict=True)))


def _moon() -> Part:
    """A crescent: the outer edge, then back along an inner one."""
    outer = _ellipse(0, 0.15, 0, 0.95, 0.95, 55, 305).outline
    return Part(0, outer + _ellipse(0, 0.5, 0, 0.72, 0.72, 290, 70).outline)


_PETALS = [(0.56 * math.cos(math.tau * turn / 6), 0.56 * math.sin(math.tau * turn / 6)) for turn in range(6)]

KINDS: dict[str, tuple[Part, ...]] = {
    "star": (_star(5, 0.45),),
    "circle": (_ellipse(0, 0, 0, 0.9, 0.9),),
    "square": (_box(0, -0.8, -0.8, 0.8, 0.8),),
    "triangle": (_polygon(0, (0, -0.9), (0.95, 0.75), (-0.95, 0.75)),),
    "heart": (_heart(),),
    "moon": (_moon(),),
    "flower": (*(_ellipse(0, x, y, 0.36, 0.36) for x, y in _PETALS), _ellipse(1, 0, 0, 0.36, 0.36)),
    "house": (
        _box(0, -0.68, -0.15, 0.68, 0.9),
        _polygon(1, (-0.95, -0.1), (0, -0.95), (0.95, -0.1)),
        _box(2, -0.18, 0.35, 0.18, 0.9),
    ),
    "tree": (
        _box(1, -0.16, 0.3, 0.16, 0.95),
        _polygon(0, (0, -0.2), (0.78, 0.62), (-0.78, 0.62)),
        _polygon(0, (0, -0.95), (0.6, 0.1), (-0.6, 0.1)),
    ),
    "fish": (
        _polygon(1, (0.35, 0), (0.98, -0.55), (0.82, 0), (0.98, 0.55)),
        _ellipse(0, -0.18, 0, 0.76, 0.5),
        _ellipse(2, -0.55, -0.1, 0.1, 0.1),
    ),
    "mushroom": (
        _polygon(1, (-0.26, 0), (0.26, 0), (0.36, 0.9), (-0.36, 0.9)),
        _ellipse(0, 0, 0.12, 0.95, 0.98, 180, 360),
        _ellipse(2, -0.42, -0.2, 0.17, 0.17),
        _ellipse(2, 0.2, -0.5, 0.17, 0.17),
        _ellipse(2, 0.55, -0.1, 0.13, 0.13),
    ),
    "boat": (
        _polygon(2, (-0.04, -0.9), (0.06, -0.9), (0.06, 0.3), (-0.04, 0.3)),
        _polygon(1, (0.12, -0.85), (0.78, 0.2), (0.12, 0.2)),
        _polygon(1, (-0.1, -0.6), (-0.1, 0.2), (-0.6, 0.2)),
        _polygon(0, (-0.95, 0.3), (0.95, 0.3), (0.6, 0.85), (-0.6, 0.85)),
    ),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A part of an object where it lies in the picture."""

    tone: int
    hue: int
    """Number of the object's kind: styles with several colours choose by it."""
    corners: tuple[Point, ...]
    """In pixels of the enlarged canvas."""


def _place_shapes(content: Content, side: int, chance: random.Random) -> list[Shape]:
    """The shapes of a content on a canvas of `side` pixels, back to front, each object slightly turned."""
    _words, center_x, center_y, width, height = PLACES[content.place]
    columns = content.count if width > height else 1 if height > width else min(content.count, 2)
    rows = math.ceil(content.count / columns)
    cell = min(width / columns, height / rows)
    shapes = []
    for number in range(content.count):
        row, column = divmod(number, columns)
        in_row = min(columns, content.count - row * columns)  # a lone last object stands in the middle
        x = center_x + (column - (in_row - 1) / 2) * min(width / columns, 1.15 * cell)
        y = center_y + (row - (rows - 1) / 2) * min(height / rows, 1.15 * cell)
        turn = math.radians(chance.uniform(-7, 7))
        radius = cell / 2 * 0.84
        stretch = side * radius * complex(math.cos(turn), math.sin(turn))
        for part in KINDS[content.kind]:
            points = [side * complex(x, y) + stretch * complex(*corner) for corner in part.outline]
            corners = tuple((point.real, point.imag) for point in points)
            shapes.append(Shape(part.tone, list(KINDS).index(content.kind), corners))
    return shapes


def _palette(*kinds: str) -> list[list[Color]]:
    """Hex colours as [kind][tone]; objects whose kinds are a multiple of the rows apart share a row."""
    return [[ImageColor.getrgb(f"#{color}")[:3] for color in tones.split()] for tones in kinds]


def _mask(side: int, shape: Shape) -> Image.Image:
    """L image, 255 inside the shape."""
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon(shape.corners, fill=255)
    return mask


def _stroke(image: Image.Image, shape: Shape, color: Color, width: float) -> None:
    """Draw the closed outline with round corners; `width` in pixels."""
    closed = [*shape.corners, *shape.corners[:2]]  # one edge more, for the joint where the outline closes
    ImageDraw.Draw(image).line(closed, fill=color, width=round(width), joint="curve")


def _gradient(side: int, top: Color, bottom: Color) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((side, side))
    return Image.composite(Image.new("RGB", ramp.size, bottom), Image.new("RGB", ramp.size, top), ramp)


def _stripes(side: int, gap: float, width: float, slant: int) -> Image.Image:
    """L image of diagonal lines; `slant` is 1 or -1, `gap` and `width` in pixels."""
    mask = Image.new("L", (side, side))
    for step in range(-math.ceil(side / gap), 2 * math.ceil(side / gap)):
        line = ((step * gap, 0), (step * gap + slant * side, side))
        ImageDraw.Draw(mask).line(line, fill=255, width=round(width))
    return mask


def _dots(side: int, gap: float) -> Image.Image:
    """L image of halftone dots that grow towards the lower right; `gap` in pixels."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    count = math.ceil(side / gap) + 1
    for row, column in itertools.product(range(2 * count), range(count)):
        x, y = (column + row % 2 / 2) * gap, row * gap / 2
        radius = gap * (0.06 + 0.32 * (x + y) / (2 * side))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def _ink(side: int, shapes: list[Shape]) -> Image.Image:
    """Pen on cream paper: hatched bodies, no colour."""
    pen, paper = (43, 38, 51), (250, 245, 232)
    image = Image.new("RGB", (side, side), paper)
    hatch = _stripes(side, side / 34, side / 150, -1)
    cross = ImageChops.lighter(_stripes(side, side / 48, side / 170, -1), _stripes(side, side / 48, side / 170, 1))
    for shape in shapes:
        mask = _mask(side, shape)
        image.paste(paper if shape.tone < 2 else pen, mask=mask)
        image.paste(pen, mask=ImageChops.multiply(mask, (hatch, cross, mask)[shape.tone]))
        _stroke(image, shape, pen, side / 75)
    return image


def _neon(side: int, shapes: list[Shape]) -> Image.Image:
    """Glowing tubes in the night."""
    colors = _palette("40ecff ff54be fff078", "ff5caa 78ffbe ffffff", "96ff6e ffaa3c 78dcff")
    tubes = Image.new("RGB", (side, side))
    for shape in shapes:
        tubes.paste((0, 0, 0), mask=_mask(side, shape))
        _stroke(tubes, shape, colors[shape.hue % 3][shape.tone], side / 50)
    glow, halo = (tubes.filter(ImageFilter.GaussianBlur(side / share)) for share in (28, 90))
    night = _gradient(side, (16, 10, 44), (52, 14, 74))
    for light in (glow, glow, halo, tubes):
        night = ImageChops.screen(night, light)
    return night


def _blueprint(side: int, shapes: list[Shape]) -> Image.Image:
    """Thin white lines on a blue grid."""
    image = Image.new("RGB", (side, side), (30, 82, 156))
    draw = ImageDraw.Draw(image)
    for step in range(17):
        position = round(step * side / 16)
        line, width = ((84, 132, 198), side / 128) if step % 4 == 0 else ((52, 104, 176), side / 190)
        draw.line(((position, 0), (position, side)), fill=line, width=round(width))
        draw.line(((0, position), (side, position)), fill=line, width=round(width))
    for shape in shapes:
        light = Image.new("RGB", (side, side), (196, 220, 250))
        image = Image.composite(Image.blend(image, light, (0.12, 0.3, 0.75)[shape.tone]), image, _mask(side, shape))
        _stroke(image, shape, (244, 249, 255), side / 100)
    return image


def _pixels(side: int, shapes: list[Shape]) -> Image.Image:
    """Coarse squares in few colours, on a lawn."""
    colors = _palette("ce3e46 ffcd56 fff4d6", "465cc4 ee8248 fff4d6", "f6a83c 964c96 402842")
    cells = 32
    image = Image.new("RGB", (side, side), (126, 190, 110))
    draw = ImageDraw.Draw(image)
    step = side / 8
    for row, column in itertools.product(range(8), range(8)):
        if (row + column) % 2:
            draw.rectangle((column * step, row * step, column * step + step, row * step + step), (140, 203, 120))
    for shape in shapes:
        _stroke(image, shape, (44, 34, 62), side / 16)
    for shape in shapes:
        draw.polygon(shape.corners, fill=colors[shape.hue % 3][shape.tone])
    coarse = image.resize((cells, cells), Image.Resampling.NEAREST)  # nearest keeps the colours few
    return coarse.resize((side, side), Image.Resampling.NEAREST)


def _papercut(side: int, shapes: list[Shape]) -> Image.Image:
    """Layers of pastel paper with soft shadows."""
    colors = _palette("e2705c faecd6 5c4a5c", "569296 f4c470 faf0e2", "f0b054 708660 fcf4e6")
    image = _gradient(side, (250, 226, 210), (240, 200, 188))
    offset = round(side / 60)
    for shape in shapes:
        mask = _mask(side, shape)
        shadow = ImageChops.offset(mask, offset, 2 * offset).filter(ImageFilter.GaussianBlur(side / 50))
        image.paste((112, 66, 74), mask=shadow.point([round(value * 0.55) for value in range(256)]))
        image.paste(colors[shape.hue % 3][shape.tone], mask=mask)
    return image


def _popart(side: int, shapes: list[Shape]) -> Image.Image:
    """Comic print: halftone dots, loud colours, fat black outlines."""
    colors = _palette("ec2234 ffffff 141418", "128ae2 ffffff ec2234", "ff4ea0 14c8be ffffff")
    image = Image.new("RGB", (side, side), (255, 222, 40))
    image.paste((255, 150, 24), mask=_dots(side, side / 16))
    for shape in shapes:
        mask, color = _mask(side, shape), colors[shape.hue % 3][shape.tone]
        image.paste(color, mask=mask)
        if shape.tone == 0:
            shade = tuple(round(0.72 * value) for value in color)
            image.paste(shade, mask=ImageChops.multiply(mask, _dots(side, side / 26)))
        _stroke(image, shape, (16, 14, 18), side / 42)
    return image


STYLES: dict[str, Callable[[int, list[Shape]], Image.Image]] = {
    "ink": _ink,
    "neon": _neon,
    "blueprint": _blueprint,
    "pixels": _pixels,
    "papercut": _papercut,
    "popart": _popart,
}


def choose_contents(num_contents: int, seed: int) -> list[tuple[Content, str]]:
    """Distinct contents with their split ("val" for 1 in 6, else "train"), every kind about equally often.

    Raises InputError for fewer than 6 contents, or more than there are.
    """
    chance = random.Random(f"contents {seed}")
    places = [(count, place) for count in (1, 2, 3) for place in PLACES]
    possible = len(KINDS) * len(places)
    if not 6 <= num_contents <= possible:
        raise InputError(f"num_contents {num_contents} must be from 6 to {possible}")
    of_kinds = [[Content(kind, *where) for where in chance.sample(places, len(places))] for kind in KINDS]
    chosen = [content for one_of_each in zip(*of_kinds, strict=True) for content in one_of_each]
    del chosen[num_contents:]
    held_out = set(chance.sample(chosen, max(2, round(num_contents / 6))))
    return [(content, "val" if content in held_out else "train") for content in chosen]


def paint_style_folders(folder: Path, *, seed: int = 0, size: int = 128, num_contents: int = 48) -> None:
    """Paint `num_contents` contents (6 to 180) in every style, as PNG of `size` x `size` pixels.

    The same arguments give the same pictures. Painting again over the same contents is fine; raises
    InputError for a folder with anything else in it.
    """
    contents = choose_contents(num_contents, seed)
    if size < 16:
        raise InputError(f"size {size} must be at least 16 pixels")
    text = "id,prompt,split\n"
    text += "".join(f"{content.name},{content.prompt},{split}\n" for content, split in contents)
    table = folder / "contents.csv"
    found = table.read_text(encoding="utf-8") if table.is_file() else ""
    if found != text and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds something else already; remove it or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    table.write_text(text, encoding="utf-8")  # first: painting again mends a folder left half painted
    side = size * SUPERSAMPLING
    for style, paint in STYLES.items():
        (folder / "images" / style).mkdir(parents=True, exist_ok=True)
        for content, _split in contents:
            shapes = _place_shapes(content, side, random.Random(f"turns {seed} {content.name}"))
            picture = paint(side, shapes).resize((size, size), Image.Resampling.BOX)
            picture.save(folder / "images" / style / f"{content.name}.png")


def main() -> int:
    """Exit status: 0 painted, 2 something the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m ztrain.mini.painter", description="Paint style folders.")
    parser.add_argument("--out", type=Path, required=True, help="folder to paint into")
    for name, default, text in (
        ("--seed", 0, "decides contents and splits"),
        ("--size", 128, "side of the pictures in pixels"),
        ("--num-contents", 48, "pictures per style"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{text} (default: {default})")
    given = parser.parse_args()
    try:
        paint_style_folders(given.out, seed=given.seed, size=given.size, num_contents=given.num_contents)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {given.num_contents} contents in {len(STYLES)} styles")
    return 0


if __name__ == "__main__":
    sys.exit(main())
