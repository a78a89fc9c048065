"""The objects of the painted world as polygons, and as signed distances that a batched painter can sample.

Legend: K kinds, A side of the atlas in cells.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Part:
    """A filled polygon of an object: `tone` 0 is the body, 1 the second colour, 2 a dark or light detail."""

    tone: int
    outline: tuple[Point, ...]
    """Corners in the object's own frame: x to the right, y down, both -1..1."""


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


REACH = 1.4
"""The atlas covers -REACH..REACH of the object's frame, so that outlines and glow outside the object are in it."""
_SIDE = 112
_FAR = 4.0


@functools.cache
def distance_atlas() -> Tensor:
    """(K, 3, A, A) float32 signed distances in the object's frame, negative inside: whole object, tone 1, tone 2.

    A tone's region is what of it is visible: later parts cover earlier ones. Exact for each polygon; where parts
    meet, the usual minimum and maximum of distances.
    """
    axis = (torch.arange(_SIDE) + 0.5) / _SIDE * 2 * REACH - REACH
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([x, y], dim=-1).view(-1, 2)  # (A A, 2)
    atlas = torch.full((len(KINDS), 3, _SIDE * _SIDE), _FAR)
    for kind, parts in enumerate(KINDS.values()):
        covered = torch.full((len(points),), _FAR)
        for part in reversed(parts):
            distance = polygon_distance(points, torch.tensor(part.outline, dtype=torch.float32))
            if part.tone:
                visible = torch.maximum(distance, -covered)
                atlas[kind, part.tone] = torch.minimum(atlas[kind, part.tone], visible)
            covered = torch.minimum(covered, distance)
        atlas[kind, 0] = covered
    return atlas.view(len(KINDS), 3, _SIDE, _SIDE)


def polygon_distance(points: Tensor, corners: Tensor) -> Tensor:
    """Signed distance of points (P, 2) to a closed polygon (C, 2), negative inside (even-odd rule)."""
    following = corners.roll(-1, 0)
    keep = (following - corners).square().sum(1) > 0  # closed outlines repeat their first corner
    start, edge = corners[keep], (following - corners)[keep]
    offset = points[:, None] - start  # (P, C, 2)
    along = ((offset * edge).sum(-1) / edge.square().sum(-1)).clamp(0, 1)
    distance = (offset - along[..., None] * edge).square().sum(-1).amin(1).sqrt()
    end = start + edge
    crosses = (start[:, 1] > points[:, 1:]) != (end[:, 1] > points[:, 1:])  # (P, C)
    slope = edge[:, 0] / torch.where(edge[:, 1] == 0, 1.0, edge[:, 1])
    left = points[:, :1] < start[:, 0] + (points[:, 1:] - start[:, 1]) * slope
    inside = (crosses & left).sum(1) % 2 == 1
    return torch.where(inside, -distance, distance)
