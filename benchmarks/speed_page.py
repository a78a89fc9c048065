"""Puts what was measured of training steps into docs/speed.md: its tables, and the picture beside it.

    python -m benchmarks.speed_page

In: step_nvidia_h200.json and step_miniature.json (benchmarks/step.py), train_real_size_nvidia_h200.json
(benchmarks/train_real_size.py), cost_nvidia_h200.json (benchmarks/cost.py), young_lora_nvidia_h200.json and
young_lora_cpu.json (of commit 8220e83), of benchmarks/results. Out: docs/speed.md between its marks,
docs/speed.svg, docs/cost.svg.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cost_plot, step_plot
from benchmarks.pages import ROOT, write_page

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
CASES = {
    "lora_1024_b1_full_recompute": "LoRA of rank 16 on attention, 1024 px, all computed again",
    "lora_1024_b1_costly_kept": "the same, attention and the last products kept",
    "lora_1024_b1_24gib": "the same, in 24 GiB",
    "lora_1024_b1_no_recompute": "the same, nothing computed again",
    "lora_512_b1": "the same, 512 px",
    "lora_default_1024_b1_24gib": "`[splice, lora]`, in 24 GiB",
    "siglip_1024_b1_24gib": "`[siglip]`, in 24 GiB",
    "siglip_lora_1024_b1_24gib": "`[siglip, lora]`, in 24 GiB",
    "projector_1024_b1_24gib": "`[projector]`, in 24 GiB",
    "lora_1024_b4": "LoRA of rank 16, batch of 4",
    "mixed_captions_b4": "the same, captions of 4 lengths",
    "siglip_miniature_b16": "`[siglip]`",
    "siglip_lora_miniature_b16": "`[siglip, lora]`",
    "splice_lora_miniature_b16": "`[splice, lora]`",
    "projector_miniature_b16": "`[projector]`",
}
WHOLE = {"splice_lora": "`[splice, lora]`", "siglip": "`[siglip]`", "siglip_lora": "`[siglip, lora]`",
         "projector": "`[projector]`", "lora": "`[lora]`"}  # fmt: skip
_WORDS = {"diffusers": "diffusers + peft", "diffusers_compiled": "the same, compiled"}


def _told(document: dict[str, Any]) -> str:
    """Machine, versions and date."""
    machine = document["machine"]
    versions = document.get("versions", {"torch": machine["torch"]})
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    device, date = machine.get("device") or machine["gpu"], document.get("date")
    return ", ".join([device, named, *([date] if date else [])])


def step_table(document: dict[str, Any]) -> str:
    """Milliseconds and peak memory of each way, ours over the faster other one, and where our time goes."""
    rows = document["rows"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    ours = next(way for way in ways if way.startswith("ztrain"))
    others = [way for way in ways if way != ours]
    has_peaks = any(row["peak_gib"] for row in rows)
    what = "milliseconds, GiB" if has_peaks else "milliseconds"
    heads = [*(_WORDS[way] for way in others), "ztrain", "of the faster", "needed FLOPs at the card's best"]
    lines = [f"| {what} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["way"]: row for row in rows if row["case"] == case}
        cells = [_time(found[way]) if way in found else "" for way in (*others, ours)]
        mine, beside = found[ours], [found[way]["ms"] for way in others if way in found]
        ratio = f"{mine['ms'] / min(beside):.2f}" if beside else ""
        lines.append(f"| {CASES[case]} | {' | '.join(cells)} | {ratio} | {_ms(mine['ms'] * mine['mfu'])} |")
    return "\n".join([*lines, "", f"Medians of 10 steps, and peaks; {_told(document)}."])


def _ms(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}"


def _time(row: dict[str, Any]) -> str:
    return _ms(row["ms"]) + (f", {row['peak_gib']:.1f}" if row["peak_gib"] else "")


def kernel_table(document: dict[str, Any]) -> str:
    """Where a step of ours spends its time, and what its blocks keep."""
    lines = [
        "| milliseconds | matrix products | attention | all else | idle | kernels | blocks keep | watts | MHz |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        if "kernels" in row:
            spent = dict(row["kernels"])
            products, attention = spent.pop("matrix products"), spent.pop("attention")
            launches, idle = spent.pop("launches"), spent.pop("idle")
            kept = ", ".join(f"{level} {count}" for level, count in row["kept"].items())
            cells = [*(f"{value:.1f}" for value in (products, attention, sum(spent.values()), idle)), f"{launches:.0f}"]
            lines.append(f"| {CASES[row['case']]} | {' | '.join(cells)} | {kept} | {' | '.join(_load(row))} |")
    best = ", ".join(f"{name.replace('_', ' ')} {rate:.0f}" for name, rate in document["ceilings_tflops"].items())
    return "\n".join([*lines, "", f"The card's best at these shapes, in TFLOP/s: {best}."])


def _load(row: dict[str, Any]) -> tuple[str, str]:
    """Power and clock, each of its limit."""
    if not (load := row.get("load")):
        return "", ""
    return f"{load['watts']:.0f} of {load['watts_limit']:.0f}", f"{load['mhz']:.0f} of {load['mhz_limit']:.0f}"


def whole_table(document: dict[str, Any]) -> str:
    """Peaks and step times of whole runs."""
    lines = [
        "| | steps | peak, GiB | reserved, GiB | milliseconds a step | memory was short, times |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in WHOLE.items():
        for row in document["rows"]:
            if row["list"] == name and "reserved_gib" in row:
                peaks = f"{row['peak_gib']:.1f} | {row['reserved_gib']:.1f}"
                short = sum("memory was short" in line for line in row["said"])
                lines.append(f"| {label} | {row['steps']} | {peaks} | {row['ms']:.0f} | {short} |")
    return "\n".join([*lines, "", f"{_told(document)}."])


def cost_table(document: dict[str, Any]) -> str:
    """Times of steps over size, batch and rank beside what their FLOPs would take at one rate."""
    lines = [
        "| px | batch | rank | tokens | TFLOP | milliseconds | TFLOP/s | over the line |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["sweep"]:
        sizes = " | ".join(str(row[key]) for key in ("side", "batch", "rank", "tokens"))
        speed = f"{row['tflop']:.1f} | {_ms(row['ms'])} | {row['tflops']:.0f} | {row['over_model'] - 1:+.0%}"
        lines.append(f"| {sizes} | {speed} |")
    told = f"The line: {document['rate_tflops']:.0f} TFLOP/s, the median of all rows of a megapixel and more"
    return "\n".join([*lines, "", f"{told}. {_told(document)}."])


def draws_table(document: dict[str, Any]) -> str:
    """Random batches inside random budgets."""
    lines = [
        "| blocks | draws | inside | refused | failed | memory was short | reserved, of the budget |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, label in {"draws": "eager", "draws_compiled": "compiled"}.items():
        if rows := document.get(part):
            run = [row for row in rows if "peak_gib" in row]
            inside, short = sum(row["is_inside"] for row in run), sum(row["short"] > 0 for row in run)
            refused, failed = (sum(word in row for row in rows) for word in ("refused", "failed"))
            shares = [row["peak_gib"] / row["budget_gib"] for row in run if set(row["kept"]) != {"everything"}]
            told = f"{min(shares):.0%} to {max(shares):.0%}" if shares else ""
            lines.append(f"| {label} | {len(rows)} | {inside} | {refused} | {failed} | {short} | {told} |")
    ranks = sorted({row["rank"] for part in ("draws", "draws_compiled") for row in document.get(part, ())})
    words = (
        f"512 to 1536 px, batches of 1, 2 and 4, captions of 8 to 399 tokens, ranks {', '.join(map(str, ranks))},"
        " budgets of 18 to 60 GiB. Short: less was kept then, and the step was computed again. Share: where not"
        " everything was kept."
    )
    return "\n".join([*lines, "", words])


def young_table(documents: Sequence[dict[str, Any]]) -> str:
    """What of a LoRA's first step a bfloat16 forward pass sees, on each machine."""
    devices = [document["machine"]["device"] for document in documents]
    lines = [
        f"| sees of a LoRA's first step, in bfloat16 | {' | '.join(devices)} |",
        "|---" * (len(devices) + 1) + "|",
    ]
    for way in documents[0]["seen"]:
        shares = [f"{document['seen'][way]:.0%}" for document in documents]
        lines.append(f"| {way} | {' | '.join(shares)} |")
    words = (
        "Share of what the loss falls by in float32; random weights. A first step of AdamW changes a product by less"
        " than half of its last bit in bfloat16: where a rounded product and the LoRA's part are rounded together, most"
        " of that is lost. With everything kept the compiler stores some sums before it reads them again."
    )
    told = [
        f"{_told(document)}: {size['layers']} layers, {size['dim']} wide, {size['side']} px."
        for document in documents
        for size in [document["size"]]
    ]
    return "\n".join([*lines, "", " ".join([words, *told])])


def tables(results: Path) -> str:
    step, miniature, whole, cost, *young = (
        json.loads((results / name).read_text(encoding="utf-8"))
        for name in (
            "step_nvidia_h200.json",
            "step_miniature.json",
            "train_real_size_nvidia_h200.json",
            "cost_nvidia_h200.json",
            "young_lora_nvidia_h200.json",
            "young_lora_cpu.json",
        )
    )
    parts: Sequence[tuple[str, str]] = (
        ("One step", step_table(step)),
        ("Where it goes", kernel_table(step)),
        ("Whole runs in 24 GiB", whole_table(whole)),
        ("Random batches in random budgets", draws_table(cost)),
        ("Over size, batch and rank", "![time over FLOPs](cost.svg)\n\n" + cost_table(cost)),
        ("The miniature on a CPU", step_table(miniature)),
        ("What a young LoRA adds", young_table(young)),
    )
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts)


def main(docs: Path = DOCS) -> None:
    step_plot.draw(docs / "speed.svg", step_plot.read(RESULTS / "step_nvidia_h200.json"))
    cost_plot.draw(docs / "cost.svg", json.loads((RESULTS / "cost_nvidia_h200.json").read_text(encoding="utf-8")))
    write_page(docs / "speed.md", tables(RESULTS))


if __name__ == "__main__":
    main()
