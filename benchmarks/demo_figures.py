"""Puts what `make demo` measured into the README: its table, its picture, and the result file that both come from.

    make demo
    python -m benchmarks.demo_figures

In: out/demo/result.json and out/demo/demo.png. Out: benchmarks/results/demo.json, docs/demo.png with three of the rows,
and README.md's table between its two marks.
"""

import json
from typing import Any

from PIL import Image

from benchmarks.pages import ROOT, write_page

RESULT = ROOT / "benchmarks" / "results" / "demo.json"
README = ROOT / "README.md"
MARKS = ("<!-- benchmarks/demo_figures.py writes this -->", "<!-- to here -->")
NAMES = {
    "text_only": "text only",
    "splice": "the splice where it carries most style",
    "splice_keeping_content": "the splice where it keeps the content",
    "adapter": "the adapter",
    "adapter_shuffled": "the adapter, another style's reference",
    "shipped": "the adapter as shipped: it knows most of these contents, none of the styles",
}
_HEADER = 24  # pixels of the labels, above the rows of which half are kept


def table(result: dict[str, Any]) -> str:
    """Style, content and verdict of a result.json, with 95 % intervals."""

    def cell(figure: dict[str, float]) -> str:
        return f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"

    lines = ["| | style cosine | content right | same kind as the reference |", "|---|---|---|---|"]
    for name, label in NAMES.items():
        if figures := result["figures"].get(name):
            cells = (figures[figure] for figure in ("style_cosine", "prompt_content", "leak"))
            lines.append(f"| {label} | {' | '.join(map(cell, cells))} |")
    cosine = result["style_cosine"]
    gain = {"mean": cosine["difference"], "low": cosine["difference_low"], "high": cosine["difference_high"]}
    lines += [
        "",
        f"Adapter minus splice: {cell(gain)} of style cosine. {result['triplets']} held-out triplets, {result['steps']}"
        f" steps, {result['seconds'] / 60:.0f} minutes in all; 95 % intervals over styles.",
    ]
    return "\n".join(lines)


def main() -> None:
    made = ROOT / "out" / "demo"
    text = (made / "result.json").read_text(encoding="utf-8")
    RESULT.write_text(text, encoding="utf-8")
    picture = Image.open(made / "demo.png")
    picture.crop((0, 0, picture.width, picture.height // 2 + _HEADER // 2)).save(ROOT / "docs" / "demo.png")
    write_page(README, table(json.loads(text)), MARKS)


if __name__ == "__main__":
    main()
