"""Histograms of a data set as a page draws them: bars with words, ticks, and a sentence about each.

In: the numbers of all rows. Out: `Chart`, which knows nothing of pixels.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.likeness import COPY_SCORE
from data_tools.survey import Row

_BARS = 20  # of a histogram, about
STYLES = 24
"""With a bar of their own."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A histogram as the template draws it."""

    name: str
    title: str
    unit: str
    bars: list[tuple[str, int]]
    """Range in words, and how many values are in it; none where there is nothing to draw."""
    ticks: list[tuple[float, str]]
    """Place along the axis, in bars, and label."""
    note: str


def score_chart(scores: Sequence[float], rows: int) -> Chart:
    """rows: with and without a score."""
    counts = np.bincount([min(int(score * _BARS), _BARS - 1) for score in scores], minlength=_BARS).tolist()
    bars = [(f"{i / _BARS:.2f} to {(i + 1) / _BARS:.2f}", count) for i, count in enumerate(counts)] if scores else []
    ticks = [(place * _BARS / 4, f"{place / 4:g}") for place in range(5)]
    note = "no row has one"
    if scores:
        copies = sum(score >= COPY_SCORE for score in scores)
        note = f"highest {max(scores):.2f}; {copies:,} from {COPY_SCORE} on, where deduplication sees copies"
        note += f"; {rows - len(scores):,} rows without" if rows > len(scores) else ""
    return Chart("copy_score", "Copy score", "", bars, ticks, note)


def number_chart(name: str, title: str, unit: str, values: Sequence[int]) -> Chart:
    """Of whole numbers, in steps of 1, 2 or 5 times a power of ten; a long tail is put in the last bar."""
    if not values:
        return Chart(name, title, unit, [], [], "none can be read")
    array = np.asarray(values)
    low, high, most = int(array.min()), int(array.max()), float(np.percentile(array, 99))
    top = high if high <= 2 * most else most
    raw = max(1.0, (top - low) / _BARS)
    power = 10.0 ** np.floor(np.log10(raw))
    step = int(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw))
    start = low // step * step
    bars = int((top - start) // step) + 1
    if bars < 5:  # one bar alone would be a wall
        start, bars = max(start - (5 - bars) // 2 * step, 0), 5
    counts = np.bincount(np.minimum((array - start) // step, bars - 1), minlength=bars).tolist()
    edges = [start + place * step for place in range(bars)]
    labels = [f"{edge:,}" if step == 1 else f"{edge:,} to {edge + step - 1:,}" for edge in edges]
    if high >= edges[-1] + step:
        labels[-1] = f"{edges[-1]:,} and more"
    every = -(-bars // 5)
    middle = 0.5 if step == 1 else 0.0  # a bar of one value is named in its middle, a range at its beginning
    ticks = [(place + middle, f"{edges[place]:,}") for place in range(0, bars, every)]
    note = f"median {np.median(array):,.0f}, from {low:,} to {high:,}"
    return Chart(name, title, unit, list(zip(labels, counts, strict=True)), ticks, note)


def aspect_chart(sizes: Sequence[tuple[int, int]]) -> Chart:
    """Width to height in steps of a quarter octave; what is longer than 4 : 1 is in the outer bars."""
    places = [round(4 * float(np.log2(width / height))) for width, height in sizes]
    counts = np.bincount([min(max(place, -8), 8) + 8 for place in places], minlength=17).tolist()
    names = [f"{2 ** (place / 4):.2f} : 1" if place >= 0 else f"1 : {2 ** (-place / 4):.2f}" for place in range(-8, 9)]
    ticks = [(0.5, "1:4"), (4.5, "1:2"), (8.5, "1:1"), (12.5, "2:1"), (16.5, "4:1")]
    wide, high = sum(place > 0 for place in places), sum(place < 0 for place in places)
    note = f"{wide:,} wide, {high:,} tall, {len(places) - wide - high:,} about square" if sizes else "none can be read"
    return Chart("aspect", "Target aspect", "width : height", list(zip(names, counts, strict=True)) if sizes else [],
                 ticks, note)  # fmt: skip


def style_bars(rows: Sequence[Row], splits: Sequence[str]) -> list[tuple[str | None, list[int]]]:
    """Style and its rows in each split, the largest first; beyond a limit all others together."""
    counts = Counter((row.style, row.split) for row in rows)
    styles = [style for style, _ in Counter(row.style for row in rows).most_common()]
    bars = [(style, [counts[style, split] for split in splits]) for style in styles]
    if len(bars) > STYLES:
        rest = [sum(column) for column in zip(*(numbers for _, numbers in bars[STYLES:]), strict=True)]
        bars = [*bars[:STYLES], (f"{len(bars) - STYLES:,} other styles", rest)]
    return bars
