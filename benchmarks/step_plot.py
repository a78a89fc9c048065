"""A result of benchmarks/step.py as a figure: for each case, how long a step takes each way, and its memory.

    python -m benchmarks.step_plot RESULT.json

Out: RESULT.svg beside it, the same bytes from the same result. A bar is the median time, labelled with it and with the
peak memory; the mark across a case's bars is what the FLOPs that its step needs would take at the card's ceiling.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ztrain.errors import InputError
from ztrain.terminal import program

COLOURS = {"diffusers": "#E69F00", "diffusers_compiled": "#D55E00", "ztrain_eager": "#56B4E9", "ztrain": "#0072B2"}
"""Okabe and Ito's, told apart by colour-blind eyes: a hue for whose blocks, the darker where they are compiled."""
_UNKNOWN = "#999999"
_EDGE = withStroke(linewidth=3.5, foreground="white")
SETTINGS: Any = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "ztrain",  # ids from this, not from chance
    "text.parse_math": False,
}


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.step_plot", description=__doc__)
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="what benchmarks.step wrote")
    path: Path = parser.parse_args(arguments).result
    draw(path.with_suffix(".svg"), read(path))
    print(f"wrote {path.with_suffix('.svg')}")


def read(path: Path) -> dict[str, Any]:
    """A result with rows that can be drawn. Raises InputError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    rows = document.get("rows") if isinstance(document, dict) else None
    if not rows:
        raise InputError(f"{path} has no rows to draw; python -m benchmarks.step writes a file that has")
    for number, row in enumerate(rows):
        if missing := {"case", "way", "ms"} - set(row):
            raise InputError(f"{path}: row {number} lacks {', '.join(sorted(missing))}")
    if not any(row["ms"] for row in rows):
        raise InputError(f"{path} has no times to draw: no way of any case has ms")
    return document


def draw(path: Path, document: Mapping[str, Any]) -> None:
    rows = document["rows"]
    cases, found = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "way"))
    ways = [way for way in COLOURS if way in found] + [way for way in found if way not in COLOURS]
    groups = {case: [row for way in ways for row in rows if (row["case"], row["way"]) == (case, way)] for case in cases}
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 1.2 + 0.19 * (len(rows) + len(cases))), layout="constrained")
        axes = figure.add_subplot()
        centres, first = [], 0
        for group in groups.values():
            places = range(first, first + len(group))
            for place, row in zip(places, group, strict=True):
                end = row["ms"] or 0
                axes.barh(place, end, 0.86, color=COLOURS.get(row["way"], _UNKNOWN), label=row["way"])
                axes.annotate(_label(row), (end, place), (4, 0), textcoords="offset points", va="center")
            needed = [row["ms"] * row["mfu"] for row in group if row["ms"] and row.get("mfu")]
            if needed:
                # Of every way the same, but for rounding.
                mark = axes.vlines(statistics.median(needed), first - 0.5, places[-1] + 0.5, "black", linewidth=1.5)
                mark.set(label="needed FLOPs at measured ceiling", path_effects=[_EDGE])
            centres.append((places[0] + places[-1]) / 2)
            first = places[-1] + 2
        axes.set(xlim=(0, 1.25 * max(row["ms"] or 0 for row in rows)), ylim=(first - 1.2, -0.8))
        axes.set_yticks(centres, cases)
        axes.tick_params("y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        device = (document.get("machine") or {}).get("device", "an unnamed device")
        axes.set(
            xlabel="milliseconds of one training step, the median", title=f"{device}: time and peak memory of a step"
        )
        handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        named = [*ways, *(label for label in handles if label not in ways)]
        figure.legend(
            [handles[label] for label in named], named, loc="outside upper center", ncols=len(named), frameon=False
        )
        figure.savefig(path, metadata={"Creator": None, "Date": None})


def _label(row: Mapping[str, Any]) -> str:
    if not row["ms"]:
        return "no result"
    time = f"{row['ms']:,.{0 if row['ms'] >= 100 else 1}f} ms"
    return time if row.get("peak_gib") is None else f"{time}, {row['peak_gib']:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
