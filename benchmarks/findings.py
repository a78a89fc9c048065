"""Trains, judges and writes the pages of docs/findings: tables from result files, pictures, nothing by hand.

    python -m benchmarks.findings [PAGE ...] [--jobs N] [--out out/findings]

Without a page, all of them. Out: benchmarks/results/findings/<page>.json, docs/findings/<page>.png, and the table of
docs/findings/<page>.md between its two marks. Runs that several pages show are trained once; what is judged is kept in
`--out`. `--smoke`: few pictures, steps and seeds, and nothing is written outside `--out`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.laboratory import Laboratory, Plan, Variant
from benchmarks.state_gaps import mean_gaps, state_gaps
from ztrain.conditioning import IMAGE, TEXT
from ztrain.config import Config
from ztrain.errors import InputError
from ztrain.mini.trials import Method, splice_settings

ROOT = Path(__file__).parents[1]
RESULTS, PAGES = ROOT / "benchmarks" / "results" / "findings", ROOT / "docs" / "findings"
MARKS = ("<!-- benchmarks/findings.py writes this -->", "<!-- to here -->")
PLAN = Plan(painted={"train": (512, 8), "test": (128, 2)}, steps=800, batch=16)
SMOKE = Plan(painted={"train": (6, 4), "test": (6, 2)}, steps=3, batch=4)
TIMED_STEPS = 40

_SEEDED = ("--adapters.0.init_seed",)
_TEXT = ("--adapters.0.tokens", "text")
_PROJECTOR = ("--adapters.0.hidden_dim", "512")


def _siglip(label: str, *options: str) -> Variant:
    return Variant(label=label, experiment="siglip", options=options, seeded=_SEEDED)


def _dropout(label: str, **shares: float) -> Variant:
    options = tuple(word for name, share in shares.items() for word in (f"--train.dropout_{name}", f"{share:g}"))
    return Variant(label=label, experiment="siglip_lora", options=options, seeded=_SEEDED)


LISTS = {
    "siglip": _siglip("[siglip]"),
    "siglip_embedder": _siglip("[siglip], embedder only", "--adapters.0.trains", "embedder"),
    "siglip_lora": Variant(label="[siglip, lora]", experiment="siglip_lora", seeded=_SEEDED),
    "projector": Variant(label="[projector]", experiment="projector", options=(*_TEXT, *_PROJECTOR)),
    "splice_lora": Variant(label="[splice, lora]", experiment="splice_lora", options=_TEXT),
    "lora": Variant(label="[lora], sees no reference", experiment="lora"),
}
"""What is compared at equal steps and at equal seconds."""

VARIANTS = LISTS | {
    "stock_order": _siglip("stock order", "--adapters.0.token_order", "stock"),
    "stock_segments": _siglip(
        "three segments, blank latents",
        *("--adapters.0.layout", "stock_without_latents", "--adapters.0.token_order", "rows"),
    ),
    "stock_latents": _siglip(
        "three segments and the reference's latents",
        *("--adapters.0.layout", "stock", "--adapters.0.token_order", "rows"),
    ),
    "stock": _siglip("the same in stock token order", "--adapters.0.layout", "stock"),
    "init_random": _siglip("random", "--adapters.0.init", "random"),
    "init_statistics": _siglip("statistics_matched", "--adapters.0.init", "statistics_matched"),
    "init_slice": _siglip("cap_embedder_slice", "--adapters.0.init", "cap_embedder_slice"),
    "projector_all": Variant(
        label="[projector] on image and text tokens",
        experiment="projector",
        options=("--adapters.0.tokens", "all", *_PROJECTOR),
    ),
    "drop_none": _dropout("nothing dropped", reference=0.0),
    "drop_reference_20": _dropout("reference 0.20", reference=0.2),
    "drop_reference_50": _dropout("reference 0.50", reference=0.5),
    "drop_all_5": _dropout("each 0.05", reference=0.05, text=0.05, both=0.05),
    "drop_text_30": _dropout("reference 0.05, prompt 0.30", text=0.3),
}

WAYS: dict[str, dict[str, Any]] = {
    "own": {},
    "shuffled": {"sees": "shuffled"},
    "guided": {"image_guidance_scale": 1.0},
    "blind": {"sees": "none"},
    "promptless": {"has_prompt": False},
}
STRENGTHS = (0.25, 0.5, 1.0)


def _splice(config: Config, layer: int, tokens: str, strength: float) -> Method:
    [method] = [m for m in splice_settings(config, [layer], [strength]) if m.adapters[0].tokens == tokens]
    return method


UNTRAINED: dict[str, Callable[[Config], Method]] = {"text": lambda config: Method(label="text only")} | {
    f"splice-{layer}-{tokens}-{strength:g}": partial(_splice, layer=layer, tokens=tokens, strength=strength)
    for layer in range(1, 7)
    for tokens in ("text", "all")
    for strength in STRENGTHS
}
PROJECTED = {"projector": TEXT, "projector_all": IMAGE}
"""The kind of tokens of which the page says what the projector makes of them."""
DROPOUTS = ("siglip_lora", "drop_none", "drop_reference_20", "drop_reference_50", "drop_all_5", "drop_text_30")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One figure of a table. `way`: how the adapter was asked (WAYS); `against`: the same figure of the first row, or
    of another way of the same row, is subtracted, in pairs."""

    head: str
    figure: str
    way: str = "own"
    against: str | None = None


STYLE = Column(head="style cosine", figure="style_cosine")
COMMON = (
    STYLE,
    Column(head="above the first row", figure="style_cosine", against="first"),
    Column(head="content right", figure="prompt_content"),
    Column(head="leak above chance", figure="leak_above_chance"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """`rows`: label by variant, or by run for what is not trained."""

    rows: Mapping[str, str]
    columns: Sequence[Column] = COMMON
    extra: Sequence[str] = ()
    """Further variants that the page needs besides its rows."""

    @property
    def variants(self) -> list[str]:
        return [name for name in (*self.rows, *self.extra) if name.removesuffix("_seconds") in VARIANTS]


def _labels(*names: str, **first: str) -> dict[str, str]:
    return first | {name: VARIANTS[name].label for name in names if name not in first}


EQUAL_STEPS = {name: variant.label for name, variant in LISTS.items()}
EQUAL_SECONDS = {
    f"{name}_seconds": f"{variant.label}, equal seconds" for name, variant in LISTS.items() if name != "siglip"
}
BOOK: dict[str, Page] = {
    "token_order": Page(rows=_labels("stock_order", siglip="row order")),
    "caption_segments": Page(rows=_labels("stock_segments", "stock_latents", "stock", siglip="one segment")),
    "siglip_init": Page(rows=_labels("init_random", "init_statistics", "init_slice", siglip="context_refiner")),
    "adapter_lists": Page(
        rows=EQUAL_STEPS | EQUAL_SECONDS | {"splice-5-text-1": "the splice, untrained", "text": "text only"}
    ),
    "splice_setting": Page(
        rows={
            f"splice-{layer}-text-{s:g}": f"layer {layer}, strength {s:g}" for layer in range(1, 7) for s in STRENGTHS
        }
        | {f"splice-{layer}-all-1": f"layer {layer}, image tokens too" for layer in (4, 5, 6)}
        | {"projector": "[projector] at layer 5, trained", "text": "text only"},
        extra=("projector_all",),
    ),
    "dropout": Page(
        rows=_labels(*DROPOUTS[1:], siglip_lora="reference 0.05 (the miniature's default)"),
        columns=(
            *COMMON[:3],
            Column(head="image guidance adds", figure="style_cosine", way="guided", against="own"),
            Column(head="content then", figure="prompt_content", way="guided"),
            Column(head="without reference: content", figure="prompt_content", way="blind"),
            Column(head="without prompt: style", figure="style_cosine", way="promptless"),
            Column(head="... reference's kind", figure="reference_kind", way="promptless"),
        ),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.findings", description=__doc__)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(BOOK)}; all if none is named")
    parser.add_argument("--out", type=Path, default=Path("out/findings"))
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help="write no pages; they can be written from OUT/scores")
    parser.add_argument("--smoke", action="store_true", help="shows that everything runs")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.pages) - set(BOOK)):
        parser.error(f"no page {unknown[0]!r}; there are {', '.join(BOOK)}")
    names = options.pages or list(BOOK)
    plan, places = (SMOKE, (options.out, options.out)) if options.smoke else (PLAN, (RESULTS, PAGES))
    laboratory = Laboratory(options.out, plan, options.jobs, WAYS)
    try:
        seconds = measure(laboratory, names, range(options.seeds), places[0] / "seconds_per_step.json")
        for name in names if not options.measure else ():
            write(laboratory, name, range(options.seeds), seconds, *places)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(laboratory: Laboratory, pages: Sequence[str], seeds: Sequence[int], timing: Path) -> dict[str, float]:
    """Trains and judges what the pages need and is not there yet; seconds of a step for each list, or nothing."""
    due = dict.fromkeys(name for page in pages for name in BOOK[page].variants)
    variants = {name: VARIANTS[name] for name in due if name in VARIANTS}
    laboratory.prepare(variants.values())
    seconds: dict[str, float] = {}
    if any(name not in VARIANTS for name in due):
        seconds = laboratory.seconds_per_step(timing, LISTS, min(TIMED_STEPS, laboratory.plan.steps))
        for name in LISTS:
            if f"{name}_seconds" in due:
                share = seconds["siglip"] / seconds[name]
                variants[f"{name}_seconds"] = replace(LISTS[name], share=share)
    runs = [(name, variant, seed) for seed in seeds for name, variant in variants.items()]
    laboratory.train(runs)
    laboratory.keep_truth()
    ways = {name: ("own", "guided", "blind", "promptless") for name in DROPOUTS}
    laboratory.judge_runs(runs, ways)
    shown = {name for page in pages for name in BOOK[page].rows}
    for run in shown & set(UNTRAINED):
        laboratory.judge(run, UNTRAINED[run](laboratory.config))
    if "splice_setting" in pages:
        _measure_gaps(laboratory, seeds)
    return seconds


def _measure_gaps(laboratory: Laboratory, seeds: Sequence[int]) -> None:
    """How far each projector leaves the states that it reads from those of prompts."""
    path = laboratory.out / "scores" / "gaps.json"
    if not path.is_file():
        measured = {
            name: [
                state_gaps(laboratory.trials, Method.of_folder(name, laboratory.folder(name, seed) / "export"), kind)
                for seed in seeds
            ]
            for name, kind in PROJECTED.items()
        }
        path.write_text(json.dumps(measured) + "\n", encoding="utf-8")


# --- writing ----------------------------------------------------------------------------------------------------------


def result_of(laboratory: Laboratory, name: str, seeds: Sequence[int], seconds: Mapping[str, float]) -> dict[str, Any]:
    """All figures of a page, with intervals over styles; of trained rows the mean over seeds and each seed's own."""
    page, clusters = BOOK[name], laboratory.clusters()
    runs = {row: _runs_of(row, seeds) for row in page.rows}
    first = runs[next(iter(page.rows))]
    rows = []
    for row, label in page.rows.items():
        cells = []
        for column in page.columns:
            ours = laboratory.scores(runs[row], column.way)[column.figure]
            theirs = None
            if column.against is not None:
                other = (first, "own") if column.against == "first" else (runs[row], column.against)
                theirs = laboratory.scores(*other)[column.figure]
            cells.append(clusters.figure(ours, theirs, drop_nan=True))
        kept = [laboratory.read(run) for run in runs[row]]
        means = [torch.tensor(each["scores"]["own"]["style_cosine"]).mean().item() for each in kept]
        told = {"name": row, "label": label, "cells": cells, "weights": kept[0]["weights"]}
        told["style_cosine_by_seed"] = means if row.removesuffix("_seconds") in VARIANTS else []
        if seconds and (base := row.removesuffix("_seconds")) in seconds:
            share = seconds["siglip"] / seconds[base] if row != base else 1.0
            told |= {"steps": round(laboratory.plan.steps * share), "seconds_per_step": seconds[base]}
        rows.append(told)
    plan = laboratory.plan
    return {
        "page": name,
        "machine": laboratory.read(first[0])["machine"],
        "plan": {"steps": plan.steps, "batch": plan.batch, "painted": dict(plan.painted), "seeds": list(seeds)},
        "triplets": len(clusters.numbers),
        "columns": [column.head for column in page.columns],
        "rows": rows,
    }


def _runs_of(row: str, seeds: Sequence[int]) -> list[str]:
    return [f"{row}-{seed}" for seed in seeds] if row.removesuffix("_seconds") in VARIANTS else [row]


def table(result: Mapping[str, Any]) -> str:
    """A result file as a page shows it."""
    timed = any("steps" in row for row in result["rows"])
    heads = ["", *(["steps", "seconds a step"] if timed else []), *result["columns"], "style by seed"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for place, row in enumerate(result["rows"]):
        cells = [row["label"]]
        if timed:
            cells += [str(row["steps"]), f"{row['seconds_per_step']:.3f}"] if "steps" in row else ["", ""]
        for head, figure in zip(result["columns"], row["cells"], strict=True):
            known = not (place == 0 and head == "above the first row")
            cells.append(f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]" if known else "")
        cells.append(" ".join(f"{value:.2f}" for value in row["style_cosine_by_seed"]))
        lines.append(f"| {' | '.join(cells)} |")
    plan, machine = result["plan"], result["machine"]
    lines += [
        "",
        f"{result['triplets']} held-out triplets, {len(plan['seeds'])} seeds, {plan['steps']} steps of batch"
        f" {plan['batch']}; 95 % intervals over styles of the mean over seeds. Trained on {machine['device']}, torch"
        f" {machine['torch']}.",
    ]
    return "\n".join([*lines, *_gap_lines(result)])


def _gap_lines(result: Mapping[str, Any]) -> list[str]:
    if not (gaps := result.get("gaps")):
        return []
    lines = ["", "| states of the reference | distance of means | spread |", "|---|---|---|"]
    for name, gap in gaps.items():
        spread = gap["spread"]
        cell = f"{spread['median']:.2f} [{spread['low']:.2f}, {spread['high']:.2f}]"
        lines.append(f"| {name} | {gap['shift_rms']:.2f} | {cell} |")
    told = "Both in standard deviations of prompts' states, for each dimension: the distance's root mean square, the"
    return [*lines, "", f"{told} spread's median [5 %, 95 %]."]


def write(
    laboratory: Laboratory, name: str, seeds: Sequence[int], seconds: Mapping[str, float], results: Path, pages: Path
) -> None:
    """Result file, picture and table of one page."""
    result = result_of(laboratory, name, seeds, seconds if name == "adapter_lists" else {})
    # Here, because a machine that only measures may lack matplotlib.
    from benchmarks.findings_pictures import draw_front, draw_sheet, draw_splice

    picture = pages / f"{name}.png"
    if name == "splice_setting":
        gaps = json.loads((laboratory.out / "scores" / "gaps.json").read_text(encoding="utf-8"))
        result["gaps"] = mean_gaps(gaps)
    for folder in (results, pages):
        folder.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    match name:
        case "adapter_lists":
            draw_front(picture, result)
        case "splice_setting":
            draw_splice(picture, result)
        case _:
            strips = {label: _runs_of(row, seeds)[0] for row, label in BOOK[name].rows.items()}
            draw_sheet(picture, {"reference": "reference"} | strips | {"target": "target"}, laboratory)
    page = pages / f"{name}.md"
    if page.is_file():
        written = f"{MARKS[0]}\n{table(result)}\n{MARKS[1]}"
        text = page.read_text(encoding="utf-8")
        page.write_text(
            re.sub(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", lambda _: written, text, flags=re.S), "utf-8"
        )
    print(f"wrote {results / name}.json and {picture}")


if __name__ == "__main__":
    sys.exit(main())
