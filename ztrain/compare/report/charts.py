"""Charts of a report as a template draws them: lines, bands, dots with error bars, bars; all places in pixels.

In: numbers. Out: `Chart`. Nothing here knows what is drawn, only how: axes with round ticks, labels that do not
overlap, a front of the best. Two widths are made where one would be unreadable on a telephone.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

_GLYPH = 6.3  # pixels of a usual letter at the 11.5 px of labels
_LABEL = 15.0  # height of a label
_DOT = 6.0
_LONGEST = 30  # letters of a label
_RADII = (9.0, 15.0, 24.0, 36.0, 52.0, 72.0, 96.0)  # distances at which a label may stand from its dot
_DIRECTIONS = (315, 225, 45, 135, 0, 180, 270, 90, 337, 22, 202, 157)
"""Degrees, clockwise from the right, in the order of preference: error bars lie at 0, 90, 180 and 270."""
_APART = 1e-9  # of the larger of two ends: nearer ones are one
_TINY = 1e-100  # smaller numbers are 0
_POINTS = 360
"""Of a curve: more cannot be told apart on a screen."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A round number on an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Curve:
    """An SVG path."""

    path: str
    tone: str
    shape: str = "line"
    """line, thin, dashed, band or front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A point with its error bars and, where there is room, its label: in the units of the axes until it is drawn."""

    x: float
    y: float
    across: tuple[float, float] | None = None
    """Ends of the horizontal error bar."""
    down: tuple[float, float] | None = None
    tone: str = "c0"
    hollow: bool = False
    ringed: bool = False
    tip: str = ""
    label: str = ""
    labelled: bool = True
    label_at: tuple[float, float, str] | None = None
    """x, y of the base line, and text-anchor."""
    leader: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar from `start` to `end`, the name above it."""

    name: str
    y: float
    start: float
    end: float
    across: tuple[float, float] | None
    tone: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing of width x height pixels with the frame (left, top, right, bottom) inside."""

    title: str
    note: str = ""
    width: float
    height: float
    frame: tuple[float, float, float, float]
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    x_title: str = ""
    y_title: str = ""
    curves: list[Curve] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    """Tone and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A named curve: x ascending, and a band around it where its limits are known."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    tone: str = "c0"
    shape: str = "line"
    named: bool = True
    """Whether the legend has it."""


@dataclass(frozen=True, slots=True)
class Scale:
    """From the numbers of an axis to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, count: int) -> list[Tick]:
        return [Tick(self(value), label) for value, label in round_numbers(self.low, self.high, count)]


def scale_of(values: Sequence[float], start: float, end: float, *, margin: float = 0.06) -> Scale:
    """An axis that holds all values and a margin, as a share of their range."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    reach, size = (0.0 if abs(value) < _TINY else value for value in (high - low, abs(high)))
    room = (reach * margin if reach > _APART * max(abs(low), size) else 0.0) or size * 0.1 or 1.0
    return Scale(low - room, high + room, start, end)


def round_numbers(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """About `count` round numbers within the limits, with their labels."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(place * step, tick_label(place * step, step)) for place in places]


def tick_label(value: float, step: float) -> str:
    """A number with as many digits as the step between ticks needs."""
    if value == 0:
        return "0"
    if step >= 1:
        return f"{round(value, 6):,g}".replace("-", "\N{MINUS SIGN}") if abs(value) < 1e6 else f"{value:.3g}"
    if step < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")
    digits = max(-math.floor(math.log10(step)), 1)
    if abs(step * 10**digits - round(step * 10**digits)) > 1e-6:  # a step of 0.25 needs one more
        digits += 1
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


# --- curves -----------------------------------------------------------------------------------------------------------


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_title: str,
    y_title: str = "",
    note: str = "",
    zero: bool = False,
    names: Sequence[str] | None = None,
) -> Chart:
    """Curves over common axes. `zero`: 0 is on the y axis, dashed. `names`: labels of x = 0, 1, 2 ... in place of
    numbers."""
    width, height, frame = 440.0, 236.0, (48.0, 12.0, 430.0, 198.0)
    left, top, right, bottom = frame
    xs = [x for each in series for x in each.x]
    ys = [y for each in series for y in _robust(each)] + ([0.0] if zero else [])
    x_scale = scale_of(xs, left, right, margin=0.02 if names is None else 0.08)
    y_scale = scale_of(ys, bottom, top)
    curves = [Curve(f"M{left} {y_scale(0)}H{right}", "axis", "dashed")] if zero else []
    for each in series:
        if each.low is not None and each.high is not None:
            curves.append(Curve(_band(each.x, each.low, each.high, x_scale, y_scale), each.tone, "band"))
        clipped = [min(max(y, y_scale.low), y_scale.high) for y in each.y]
        curves.append(Curve(_path(each.x, clipped, x_scale, y_scale), each.tone, each.shape))
    if names is None:
        x_ticks = x_scale.ticks(5)
    else:
        x_ticks = [Tick(x_scale(place), shorten(name, 12)) for place, name in enumerate(names)]
    few = [
        Dot(x=x_scale(x), y=y_scale(y), tone=each.tone, tip=f"{each.name}: {y:.4g} at {_at(x, names)}")
        for each in series
        if len(each.x) <= 24 and each.shape == "line"
        for x, y in zip(each.x, each.y, strict=True)
    ]
    legend = [(each.tone, each.name) for each in series if each.named] if len(series) > 1 else []
    return Chart(
        title=title, note=note, width=width, height=height, frame=frame, x_ticks=x_ticks, y_ticks=y_scale.ticks(4),
        x_title=x_title, y_title=y_title, curves=curves, dots=few, legend=legend,
    )  # fmt: skip


def _at(x: float, names: Sequence[str] | None) -> str:
    return names[round(x)] if names else f"{x:,g}"


def _robust(series: Series) -> list[float]:
    """The values that an axis must hold: of a raw curve without the highest and lowest percent, which are clipped."""
    values = sorted(series.y)
    if series.shape == "thin":
        cut = len(values) // 100
        values = values[cut : len(values) - cut]
    return [*values, *(series.low or ()), *(series.high or ())]


def _path(xs: Sequence[float], ys: Sequence[float], x_scale: Scale, y_scale: Scale) -> str:
    if len(xs) == 1:
        return ""
    return "M" + "L".join(f"{x_scale(x)} {y_scale(y)}" for x, y in zip(xs, ys, strict=True))


def _band(xs: Sequence[float], low: Sequence[float], high: Sequence[float], x_scale: Scale, y_scale: Scale) -> str:
    there = [f"{x_scale(x)} {y_scale(y)}" for x, y in zip(xs, high, strict=True)]
    back = [f"{x_scale(x)} {y_scale(y)}" for x, y in reversed(list(zip(xs, low, strict=True)))]
    return "M" + "L".join([*there, *back]) + "Z"


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Exponential moving average with a half life of `window` points, without the pull towards 0 at its beginning."""
    keep = 0.5 ** (1 / max(window, 1))
    total, weight, found = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def thin_out(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most about `_POINTS` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(xs) <= _POINTS:
        return list(xs), list(ys)
    stretch = math.ceil(2 * len(xs) / _POINTS)
    kept: list[int] = []
    for start in range(0, len(xs), stretch):
        part = range(start, min(start + stretch, len(xs)))
        kept += sorted({min(part, key=ys.__getitem__), max(part, key=ys.__getitem__)})
    return [xs[i] for i in kept], [ys[i] for i in kept]


# --- dots -------------------------------------------------------------------------------------------------------------


def scatter(points: Sequence[Dot], front: Sequence[tuple[float, float]], *, x_title: str, y_title: str,
            wide: bool) -> Chart:  # fmt: skip
    """Dots with error bars and labels, and a front through the given places."""
    width, height = (900.0, 470.0) if wide else (372.0, 400.0)
    frame = (58.0, 16.0, width - 14.0, height - 44.0)
    left, top, right, bottom = frame
    x_scale = scale_of([x for p in points for x in (p.x, *(p.across or ()))], left, right, margin=0.08)
    y_scale = scale_of([y for p in points for y in (p.y, *(p.down or ()))], bottom, top, margin=0.08)
    places = [(x_scale(p.x), y_scale(p.y)) for p in points]
    longest = _LONGEST if wide else 18
    texts = [shorten(p.label, longest) if p.labelled else "" for p in points]
    labels = place_labels(places, texts, frame)
    dots = [
        replace(
            p, x=x, y=y, across=_ends(p.across, x_scale), down=_ends(p.down, y_scale), label=text if at else "",
            label_at=at and at[:3], leader=bool(at and at[3]),
        )
        for p, (x, y), text, at in zip(points, places, texts, labels, strict=True)
    ]  # fmt: skip
    path = "M" + "L".join(f"{x_scale(x)} {y_scale(y)}" for x, y in front) if len(front) > 1 else ""
    return Chart(
        title="", width=width, height=height, frame=frame, x_ticks=x_scale.ticks(7 if wide else 4),
        y_ticks=y_scale.ticks(6), x_title=x_title, y_title=y_title,
        curves=[Curve(path, "front", "front")] if path else [], dots=dots,
    )  # fmt: skip


def _ends(limits: tuple[float, float] | None, scale: Scale) -> tuple[float, float] | None:
    return None if limits is None else (scale(limits[0]), scale(limits[1]))


def front_of(points: Sequence[tuple[float, float]], signs: tuple[float, float]) -> list[int]:
    """Places of the points that no other beats in both (Pareto), by rising x. `signs`: 1 where more is better, -1 where
    less is."""
    turned = [(x * signs[0], y * signs[1]) for x, y in points]
    best = [
        i
        for i, (x, y) in enumerate(turned)
        if not any((a >= x and b > y) or (a > x and b >= y) for a, b in turned)
    ]  # fmt: skip
    return sorted(best, key=lambda i: points[i])


Box = tuple[float, float, float, float]


def place_labels(
    dots: Sequence[tuple[float, float]], texts: Sequence[str], frame: Box
) -> list[tuple[float, float, str, bool] | None]:
    """For each text (x, y of the base line, text-anchor, whether it needs a leader) inside the frame, over no other
    label and no dot; None where it is empty or no such place is near."""
    taken: list[Box] = [(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in dots]
    found: list[tuple[float, float, str, bool] | None] = []
    for (x, y), text in zip(dots, texts, strict=True):
        free = (place for place in _places(x, y, text_width(text)) if _inside(place[0], frame))
        chosen = next((place for place in free if not any(_overlap(place[0], box) for box in taken)), None)
        if not text or chosen is None:
            found.append(None)
            continue
        box, anchor, leader = chosen
        taken.append(box)
        at = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
        found.append((round(at, 2), round(box[3] - 4, 2), anchor, leader))
    return found


def _places(x: float, y: float, width: float) -> list[tuple[Box, str, bool]]:
    """Boxes around a dot, the nearest first."""
    found: list[tuple[Box, str, bool]] = []
    for radius in _RADII:
        for degrees in _DIRECTIONS:
            across, down = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            middle_y = y + down * (radius + _LABEL / 2)
            anchor = "middle" if abs(across) < 0.1 else "start" if across > 0 else "end"
            at = x + across * radius
            start = {"start": at, "end": at - width, "middle": x - width / 2}[anchor]
            box = (start, middle_y - _LABEL / 2, start + width, middle_y + _LABEL / 2)
            found.append((box, anchor, radius > _RADII[1]))
    return found


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] + 8 and box[3] <= frame[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def text_width(text: str) -> float:
    """About how many pixels a label takes; wide letters count twice."""
    return sum(_GLYPH * (2 if unicodedata.east_asian_width(letter) in "WF" else 1) for letter in text) + 2


def shorten(text: str, longest: int) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= longest else f"{one_line[: longest - 1]}…"


# --- bars -------------------------------------------------------------------------------------------------------------


def bar_chart(title: str, bars: Sequence[tuple[str, float, tuple[float, float] | None, str, str]], *, note: str,
              reach: Sequence[float]) -> Chart:  # fmt: skip
    """Horizontal bars of (name, value, interval, tone, words). `reach`: what the axis must hold besides, for
    charts that share one."""
    width, left, right = 440.0, 8.0, 372.0
    scale = scale_of([0.0, *reach], left, right, margin=0.0)
    drawn = []
    for place, (name, value, limits, tone, text) in enumerate(bars):
        start, end = sorted((scale(0.0), scale(value)))
        drawn.append(Bar(name, 30.0 + 44.0 * place, start, end, _ends(limits, scale), tone, text))
    height = 24.0 + 44.0 * len(bars)
    return Chart(title=title, note=note, width=width, height=height, frame=(left, 8.0, right, height - 6.0),
                 x_ticks=[Tick(scale(0.0), "0")], bars=drawn)  # fmt: skip
