"""Paints the world of world.py, whole batches at once.

Objects are signed distances sampled from an atlas (shapes.py), so that outlines, shading and soft edges are arithmetic
on a whole batch; pictures come out the same on every device up to rounding.

Legend: B pictures of a batch, S pixels of a side, O objects of a picture (3; missing ones lie far away).
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.gallery import Gallery, Split
from miniature.shapes import REACH, distance_atlas
from miniature.world import (
    CONTENT_CLASSES,
    COUNT_NAMES,
    HOLLOW,
    PHRASINGS,
    PLACE_NAMES,
    PLACES,
    STYLE_CLASSES,
    WORLD_VERSION,
    Contents,
    Styles,
    draw_contents,
    draw_styles,
    labels_of,
    name_content,
    name_styles,
    pick,
)

_CHUNK = 512  # pictures painted at once: about 1 GB of intermediate values at 128 pixels
_CONTENTS_OF_A_STYLE = 8
_LARGEST = 0.46  # share of the side that one object may fill


def _layout() -> Tensor:
    """(counts, places, O, 3): centre and radius of every object as shares of the side; radius 0 = not there."""
    table = torch.zeros(len(COUNT_NAMES), len(PLACE_NAMES), len(COUNT_NAMES), 3)
    for place, (_words, center_x, center_y, width, height) in enumerate(PLACES.values()):
        for number in range(1, len(COUNT_NAMES) + 1):
            columns = number if width > height else 1 if height > width else min(number, 2)
            rows = math.ceil(number / columns)
            cell = min(width / columns, height / rows, _LARGEST)
            for item in range(number):
                row, column = divmod(item, columns)
                in_row = min(columns, number - row * columns)  # a lone last object stands in the middle
                x = center_x + (column - (in_row - 1) / 2) * min(width / columns, 1.15 * cell)
                y = center_y + (row - (rows - 1) / 2) * min(height / rows, 1.15 * cell)
                table[number - 1, place, item] = torch.tensor([x, y, cell / 2 * 0.96])
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Poses:
    """Where the objects of N pictures lie: `center` (N, O, 2) and `radius` (N, O) as shares of the side, `turn` (N, O)
    in radians. An object with radius 0 is not there."""

    center: Tensor
    radius: Tensor
    turn: Tensor


def draw_poses(contents: Contents, generator: torch.Generator) -> Poses:
    """Every object moved, scaled and turned a little, and the group with it.

    Groups differ in size by a factor of 1.4, so that a size does not give count and place away, and a kind that is
    never drawn alone in the middle has still been seen as large as it would be there.
    """
    layout = _layout()[contents.count, contents.place]  # (N, O, 3)
    radius = layout[..., 2]

    def jitter(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    count, slots = radius.shape
    shrink = 1 - 0.15 * (1 + jitter(count, 1)) * (contents.count < 2)[:, None]
    return Poses(
        center=layout[..., :2] + 0.08 * radius[..., None] * jitter(count, slots, 2) + 0.02 * jitter(count, 1, 2),
        radius=radius * shrink * (0.95 + 0.05 * jitter(count, slots)),
        turn=math.radians(9) * jitter(count, slots),
    )


@torch.no_grad()
def paint(
    contents: Contents, styles: Styles, poses: Poses, size: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """N pictures, (N, 3, S, S) uint8 on `device`; `seed` decides the grain of grainy ones."""
    count = len(contents.kind)
    images = torch.empty((count, 3, size, size), dtype=torch.uint8, device=device)
    grain = torch.Generator().manual_seed(seed)
    for start in range(0, count, _CHUNK):
        rows = torch.arange(start, min(start + _CHUNK, count))
        kind = contents.kind[rows].to(device)
        chosen = [
            {f.name: getattr(record, f.name)[rows].to(device) for f in fields(record)} for record in (styles, poses)
        ]
        noise = torch.rand(len(rows), 1, 32, 32, generator=grain).to(device)
        picture = _paint(kind, Styles(**chosen[0]), Poses(**chosen[1]), noise, size)
        images[start : start + len(rows)] = (picture * 255).round().to(torch.uint8)
    return images


def _paint(kind: Tensor, styles: Styles, poses: Poses, noise: Tensor, size: int) -> Tensor:
    """(B, 3, S, S) in [0, 1]."""
    axis = (torch.arange(size, device=kind.device) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    image = _background(x, y, styles, size)
    objects = _objects(x, y, kind, poses)

    def inside(distance: Tensor) -> Tensor:
        """Coverage, (B, 1, S, S): distances are shares of the side, an edge is one pixel wide."""
        return (0.5 - distance * size).clamp(0, 1).unsqueeze(1)

    ink = styles.ink[:, None, None, None].expand(-1, 3, 1, 1)
    hollow = styles.fill == HOLLOW
    # A hollow drawing is its outline, in the objects' colour.
    line = torch.where(hollow[:, None, None, None], _rgb(styles.body)[..., None, None], ink)
    body = _fill(x, y, styles, objects, image, size)
    image = torch.lerp(image, body, inside(objects.whole))
    edges = [objects.whole, objects.second, objects.detail]
    distance = torch.stack([edge.abs() for edge in edges]).amin(0)
    width = styles.outline[:, None, None]
    outlined = inside(distance - width / 2) * (width > 0).unsqueeze(1)
    image = torch.lerp(image, line.expand_as(image), outlined)
    return _finish(image, styles, noise, size).clamp(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Objects:
    """Distances to all objects of each picture, (B, S, S) in shares of the side: to the whole, to its second colour and
    to its details; `across` (B, S, S, 2): the place inside the nearest object, -1..1."""

    whole: Tensor
    second: Tensor
    detail: Tensor
    across: Tensor


def _objects(x: Tensor, y: Tensor, kind: Tensor, poses: Poses) -> _Objects:
    atlas = distance_atlas().to(kind.device)[kind]  # (B, 3, A, A)
    count, slots = poses.radius.shape
    distances = torch.full((count, 3, *x.shape), 1.0, device=kind.device)
    across = torch.zeros((count, *x.shape, 2), device=kind.device)
    for slot in range(slots):
        radius = poses.radius[:, slot, None, None]
        present = radius > 0
        safe = torch.where(present, radius, 1.0)
        dx = (x - poses.center[:, slot, 0, None, None]) / safe  # (B, S, S)
        dy = (y - poses.center[:, slot, 1, None, None]) / safe
        cos, sin = poses.turn[:, slot, None, None].cos(), poses.turn[:, slot, None, None].sin()
        local = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], dim=-1)  # (B, S, S, 2)
        found = F.grid_sample(atlas, local / REACH, padding_mode="border", align_corners=False)  # (B, 3, S, S)
        found = torch.where(present[:, None], found * safe[:, None], 1.0)
        nearer = (found[:, 0] < distances[:, 0]).unsqueeze(-1)
        across = torch.where(nearer, local, across)
        distances = torch.minimum(distances, found)
    return _Objects(whole=distances[:, 0], second=distances[:, 1], detail=distances[:, 2], across=across)


def _background(x: Tensor, y: Tensor, styles: Styles, size: int) -> Tensor:
    angle, period = styles.angle[:, None, None], styles.period[:, None, None]
    along = (x - 0.5) * angle.cos() + (y - 0.5) * angle.sin()  # (B, S, S)
    across = (y - 0.5) * angle.cos() - (x - 0.5) * angle.sin()
    pixels = period * size  # of one period: what makes edges one pixel wide

    def square_wave(place: Tensor) -> Tensor:
        """0 and 1 in turn, each for half a period, with soft edges."""
        triangle = (((place / period) % 1) - 0.5).abs() - 0.25  # zero at the edges, slope 1 over a period
        return (0.5 + triangle * pixels).clamp(0, 1)

    def dots() -> Tensor:
        u, v = (along / period) % 1 - 0.5, (across / period) % 1 - 0.5
        return (0.5 + (0.3 - (u.square() + v.square()).sqrt()) * pixels).clamp(0, 1)

    stripes, others = square_wave(along), square_wave(across)
    checks = stripes + others - 2 * stripes * others
    shares = torch.stack([torch.zeros_like(along), (along / 1.2 + 0.5).clamp(0, 1), stripes, checks, dots()])
    share = shares[styles.pattern, torch.arange(len(angle), device=angle.device)].unsqueeze(1)  # (B, 1, S, S)
    return torch.lerp(_rgb(styles.background)[..., None, None], _rgb(styles.second)[..., None, None], share)


def _fill(x: Tensor, y: Tensor, styles: Styles, objects: _Objects, image: Tensor, size: int) -> Tensor:
    """Colour of the objects at every pixel, (B, 3, S, S)."""

    def shifted(turn: Tensor, lightness: Tensor) -> Tensor:
        color = torch.stack([(styles.body[:, 0] + turn) % 1, styles.body[:, 1], lightness], 1)
        return _rgb(color)[..., None, None]

    none = torch.zeros_like(styles.accent_turn)
    lightness = styles.body[:, 2]
    detail_lightness = torch.where(lightness > 0.5, lightness - 0.4, lightness + 0.45)
    base = shifted(none, lightness).expand_as(image)
    for distance, color in (
        (objects.second, shifted(styles.accent_turn, lightness)),
        (objects.detail, shifted(none, detail_lightness)),
    ):
        base = torch.lerp(base, color.expand_as(image), (0.5 - distance * size).clamp(0, 1).unsqueeze(1))

    light = styles.light[:, None, None]
    slope = (objects.across[..., 0] * light.cos() + objects.across[..., 1] * light.sin()).clamp(-1, 1).unsqueeze(1)
    glossy = base + 0.28 * slope
    along = x * light.cos() + y * light.sin()
    waves = (((along / 0.075) % 1) - 0.5).abs() - 0.25
    hatch = (0.5 + waves * 0.075 * size).clamp(0, 1).unsqueeze(1)
    hatched = torch.lerp(base, image, 0.65 * hatch)
    kinds = torch.stack([base, glossy, hatched, image])
    return kinds[styles.fill, torch.arange(len(image), device=image.device)]


def _finish(image: Tensor, styles: Styles, noise: Tensor, size: int) -> Tensor:
    amount = styles.amount[:, None, None, None]
    grain = F.interpolate(noise, size=(size, size), mode="nearest") - 0.5  # squares of S / 32 pixels
    grainy = image + 0.2 * amount * grain
    coarse = F.interpolate(F.adaptive_avg_pool2d(image, 32), size=(size, size), mode="nearest")
    # Two passes of a small box, mixed in as much as the amount says.
    reach = max(1, size // 32)
    soft = F.avg_pool2d(F.pad(image, [reach] * 4, mode="replicate"), 2 * reach + 1, stride=1)
    soft = F.avg_pool2d(F.pad(soft, [reach] * 4, mode="replicate"), 2 * reach + 1, stride=1)
    finished = torch.stack([image, grainy, coarse, torch.lerp(image, soft, amount)])
    return finished[styles.finish, torch.arange(len(image), device=image.device)]


def _rgb(color: Tensor) -> Tensor:
    """(B, 3) hue, saturation, lightness -> (B, 3) red, green, blue, all in [0, 1]."""
    hue, saturation, lightness = color.unbind(1)
    chroma = saturation * torch.minimum(lightness, 1 - lightness)
    sectors = torch.tensor([0.0, 8.0, 4.0], device=color.device)  # CSS Color 4, section 7.1: hsl to rgb
    k = (sectors + 12 * hue[:, None]) % 12
    ramp = torch.minimum(k - 3, 9 - k).clamp(-1, 1)
    return lightness[:, None] - chroma[:, None] * ramp


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintedWorld:
    """The painted world as pretraining reads it."""

    size: int = 64
    train_count: int = 160_000
    """Pictures of the train split when nobody says how many."""
    name: str = f"painted {WORLD_VERSION}"

    @property
    def content_classes(self) -> dict[str, tuple[str, ...]]:
        return CONTENT_CLASSES

    @property
    def style_classes(self) -> dict[str, tuple[str, ...]]:
        return STYLE_CLASSES

    def gallery(self, split: Split, count: int | None, seed: int, device: torch.device | str) -> Gallery:
        """Styles with eight contents each; the splits of one seed share no picture."""
        generator = torch.Generator().manual_seed(2 * seed + (split != "train"))
        total = self.train_count if count is None else count
        num_styles = -(-total // _CONTENTS_OF_A_STYLE)
        numbers = torch.arange(num_styles).repeat_interleave(_CONTENTS_OF_A_STYLE)[:total]
        styles = draw_styles(num_styles, generator)
        styles = pick(styles, numbers)
        contents = draw_contents(styles, split, generator)
        poses = draw_poses(contents, generator)
        images = paint(contents, styles, poses, self.size, seed=seed, device=device)
        plain, clauses = _captions(contents, styles, generator)
        replies = _replies(contents, styles)
        labels = {name: label.to(device) for name, label in labels_of(contents, styles).items()}
        return Gallery(
            images=images,
            captions=plain,
            clauses=clauses,
            replies=replies,
            labels=labels,
            styles=numbers.to(device),
        )


def _captions(
    contents: Contents, styles: Styles, generator: torch.Generator
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Captions without style, and the clauses of those with some or all of it; in all phrasings."""
    count = len(contents.kind)
    phrasing = torch.randint(PHRASINGS, (2, count), generator=generator).tolist()
    rows = _rows(contents)
    chosen = torch.rand(count, 4, generator=generator) < 0.7
    chosen |= torch.rand(count, 1, generator=generator) < 0.5  # half of them name everything
    words = name_styles(styles, chosen)
    plain = [name_content(*row, phrasing=said) for row, said in zip(rows, phrasing[0], strict=True)]
    again = [name_content(*row, phrasing=said) for row, said in zip(rows, phrasing[1], strict=True)]
    return plain, [(content, *style) for content, style in zip(again, words, strict=True)]


def _replies(contents: Contents, styles: Styles) -> list[tuple[str, str]]:
    """The content in its first phrasing, and with every clause of the style."""
    plain = [name_content(*row) for row in _rows(contents)]
    words = name_styles(styles, torch.ones(len(plain), 4, dtype=torch.bool))
    return [(content, " ".join((content, *style))) for content, style in zip(plain, words, strict=True)]


def _rows(contents: Contents) -> list[tuple[int, int, int]]:
    return list(zip(contents.kind.tolist(), contents.count.tolist(), contents.place.tolist(), strict=True))
