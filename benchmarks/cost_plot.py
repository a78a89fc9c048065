"""The sweep of benchmarks/cost.py as a figure: a step's time over its FLOPs, and the model's line."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.step_plot import SETTINGS

RANK = 32
"""Of all rows but those that are about rank."""
_KINDS: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], bool]]] = {
    "512 to 1536 px, batch 1, rank 32": ("o", "#0072B2", lambda row: row["batch"] == 1 and row["rank"] == RANK),
    "batch, 1024 px": ("s", "#D55E00", lambda row: row["batch"] > 1),
    "rank, 1024 px": ("D", "#009E73", lambda row: row["rank"] != RANK),
}


def draw(path: Path, document: Mapping[str, Any]) -> None:
    """As SVG, the same bytes from the same result."""
    rows, rate = document["sweep"], document["rate_tflops"]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for label, (mark, colour, belongs) in _KINDS.items():
            if chosen := [row for row in rows if belongs(row)]:
                axes.plot(
                    [row["tflop"] for row in chosen], [row["ms"] for row in chosen], mark, color=colour, label=label
                )
        for row in rows:
            name = f"{row['side']} px" if row["batch"] == 1 else f"batch {row['batch']}"
            if row["rank"] == RANK:
                axes.annotate(name, (row["tflop"], row["ms"]), (6, -9), textcoords="offset points")
        most = 1.1 * max(row["tflop"] for row in rows)
        axes.plot([0, most], [0, most / rate * 1e3], "-", color="#999999", label=f"{rate:.4g} TFLOP/s", zorder=0)
        axes.set(xlabel="TFLOP that a step needs", ylabel="milliseconds", xlim=(0, most), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Creator": None, "Date": None})
