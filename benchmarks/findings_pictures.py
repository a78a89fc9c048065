"""The pictures of docs/findings: what the variants draw, and their figures as plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.laboratory import Laboratory
from benchmarks.pages import save_sheet
from ztrain.sampling.sheet import draw_grid

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

_COLOURS = matplotlib.color_sequences["tab10"]


def draw_sheet(path: Path, columns: Mapping[str, str], laboratory: Laboratory) -> None:
    """The first pictures of runs, by label."""
    drawn = [laboratory.pictures(run) for run in columns.values()]
    rows = [list(row) for row in zip(*drawn, strict=True)]
    save_sheet(draw_grid(list(columns), laboratory.truth["prompts"], rows), path)


def draw_front(path: Path, result: Mapping[str, Any]) -> None:
    """Style against content, with intervals: filled at equal steps, hollow at equal seconds."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    style, content = (result["columns"].index(head) for head in ("style cosine", "content right"))
    lists = list(dict.fromkeys(row["name"].removesuffix("_seconds") for row in result["rows"]))
    for row in result["rows"]:
        x, y = row["cells"][content], row["cells"][style]
        number, is_timed = lists.index(row["name"].removesuffix("_seconds")), row["name"].endswith("_seconds")
        axes.errorbar(
            x["mean"],
            y["mean"],
            xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
            yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]],
            fmt="o",
            color=_COLOURS[number % len(_COLOURS)],
            fillstyle="none" if is_timed else "full",
            label=None if is_timed else row["label"],
        )
    axes.set(xlabel="content right", ylabel="style cosine", title="filled: equal steps, hollow: equal seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_splice(path: Path, result: Mapping[str, Any]) -> None:
    """Left: every setting's style against its content. Right: how far each dimension's mean is from a prompt's."""
    figure, (settings, gaps) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    style, content = (result["columns"].index(head) for head in ("style cosine", "content right"))
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        point = (row["cells"][content]["mean"], row["cells"][style]["mean"])
        lines.setdefault(row["label"].split(", ")[0] if "strength" in row["label"] else row["label"], []).append(point)
    for number, (label, points) in enumerate(lines.items()):
        mark = "o-" if len(points) > 1 else "s"
        settings.plot(*zip(*points, strict=True), mark, color=_COLOURS[number % len(_COLOURS)], label=label)
    settings.set(xlabel="content right", ylabel="style cosine", title="splice by layer, along its strengths")
    for name, gap in result["gaps"].items():
        gaps.plot(gap["sorted_shift"], label=name)
    gaps.set(xlabel="dimension, sorted", ylabel="distance of means", yscale="log", title="from a prompt's states")
    for axes in (settings, gaps):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
