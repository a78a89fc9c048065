"""The plot of docs/findings/diversity.md: diversity by layer, attention by layer, and what options trade."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.attention_mass import KINDS
from benchmarks.diversity_tables import BASES

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

_COLOURS = matplotlib.color_sequences["tab10"]
_WATCHED = {"text": "text only", "alone-5": "image alone, layer 5", "siglip_lora": "[siglip, lora]"}


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """One file with three panels."""
    figure, (by_layer, attention, options) = pyplot.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    _draw_layers(by_layer, result)
    _draw_attention(attention, result)
    _draw_options(options, result)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _draw_layers(axes: Any, result: Mapping[str, Any]) -> None:
    rows = {row["name"]: row["figures"]["structure_diversity"] for row in result["rows"]}
    for number, (kind, label) in enumerate({"alone": "image alone", "beside": "beside the prompt"}.items()):
        found = [(int(name.split("-")[1]), figure) for name, figure in rows.items() if name.startswith(f"{kind}-")]
        layers, figures = zip(*found, strict=True)
        means = [figure["mean"] for figure in figures]
        errors = [[f["mean"] - f["low"] for f in figures], [f["high"] - f["mean"] for f in figures]]
        axes.errorbar(layers, means, yerr=errors, fmt="o-", color=_COLOURS[number], label=f"splice, {label}")
    lines = {"text": "text only", "siglip_lora": "[siglip, lora]", "painter-one": "the painter, one style"}
    for number, (name, label) in enumerate(lines.items(), 2):
        axes.axhline(rows[name]["mean"], color=_COLOURS[number], linestyle="--", label=label)
    axes.set(
        xlabel="layer of the text encoder", ylabel="structure diversity over seeds", title="diversity", ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_attention(axes: Any, result: Mapping[str, Any]) -> None:
    """Bars side by side of what does not stay in the picture."""
    watched = {row["name"]: row["layers"] for row in result["attention"]}
    width = 0.8 / len(_WATCHED)
    for place, (name, label) in enumerate(_WATCHED.items()):
        for number, layer in enumerate(watched[name], 1):
            bottom, x = 0.0, number + (place - 1) * width
            for colour, kind in enumerate(KINDS[1:]):
                share = layer["from_picture"][kind]["mean"]
                is_first = place == 0 and number == 1
                axes.bar(x, share, width * 0.9, bottom, color=_COLOURS[colour], label=kind if is_first else None)
                bottom += share
            if number == 1:
                axes.text(x, bottom + 0.01, label, rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set(
        xlabel="layer of the transformer", ylabel="share of the picture's attention", title="attention", ylim=(0, 0.8)
    )
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)


def _draw_options(axes: Any, result: Mapping[str, Any]) -> None:
    """Filled where content is kept within what the rule allows."""
    for number, told in enumerate(result["options"]):
        content = BASES[told["name"]].content
        for row in told["rows"]:
            x, y = row["figures"]["style_cosine"], row["figures"]["structure_diversity"]
            is_plain, is_winner = row["name"] == "plain", row["name"] == told["winner"]
            axes.plot(
                x["mean"],
                y["mean"],
                "s" if is_plain else "*" if is_winner else "o",
                markersize=9 if is_plain else 13 if is_winner else 5,
                color=_COLOURS[number],
                fillstyle="full" if row["above_plain"][content]["mean"] >= -0.05 else "none",
                label=told["label"] if is_plain else None,
            )
    axes.set(
        xlabel="style cosine",
        ylabel="structure diversity over seeds",
        title="options (square: none, star: wins, hollow: content lost)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
