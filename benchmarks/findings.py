"""Trains, judges and writes the pages of docs/findings: tables from result files, pictures, nothing by hand.

    python -m benchmarks.findings [PAGE ...] [--jobs N] [--out out/findings]

Without a page, all of them. Out: benchmarks/results/findings/<page>.json, its picture and the table of
docs/findings/<page>.md between its two marks. Runs that several pages show are trained once; what is judged is kept in
`--out`. `--smoke`: few pictures, steps and seeds, and nothing is written outside `--out`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.drawings import StudySettings
from benchmarks.findings_book import BOOK, DROPOUTS, LISTS, PROJECTED, UNTRAINED, VARIANTS, WAYS
from benchmarks.laboratory import Laboratory
from benchmarks.pages import PAGES, RESULTS, cell, devices, write_page
from benchmarks.state_gaps import mean_gaps, state_gaps
from miniature.trials import exported_entry
from ztrain.terminal import program

PLAN = StudySettings(counts={"train": (512, 8), "test": (128, 2)}, steps=800, batch=16)
SMOKE = StudySettings(counts={"train": (6, 4), "test": (6, 2)}, steps=3, batch=4)
TIMED_STEPS = 40


@program
def main(arguments: Sequence[str] | None) -> None:
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
    seconds = measure(laboratory, names, range(options.seeds), places[0] / "seconds_per_step.json")
    for name in names if not options.measure else ():
        write(laboratory, name, range(options.seeds), seconds, *places)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(laboratory: Laboratory, pages: Sequence[str], seeds: Sequence[int], timing: Path) -> dict[str, float]:
    """Trains and judges what the pages need and is not there yet; seconds of a step for each list, or nothing."""
    due = dict.fromkeys(name for page in pages for name in BOOK[page].variants)
    variants = {name: VARIANTS[name] for name in due if name in VARIANTS}
    laboratory.prepare()
    seconds: dict[str, float] = {}
    if any(name not in VARIANTS for name in due):
        seconds = laboratory.seconds_per_step(timing, LISTS, min(TIMED_STEPS, laboratory.plan.steps))
        for name in LISTS:
            if f"{name}_seconds" in due:
                share = seconds["siglip"] / seconds[name]
                variants[f"{name}_seconds"] = replace(LISTS[name], share=share)
    runs = [(name, variant, seed) for seed in seeds for name, variant in variants.items()]
    laboratory.keep_truth()
    laboratory.carry_out(runs, {name: ("own", "guided", "blind", "promptless") for name in DROPOUTS})
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

        def gaps(name: str, seed: int, kind: int) -> dict[str, Any]:
            entry = exported_entry(name, laboratory.folder(name, seed) / "export", laboratory.config)
            return state_gaps(laboratory.config, laboratory.trials.cases, entry, kind)

        measured = {name: [gaps(name, seed, kind) for seed in seeds] for name, kind in PROJECTED.items()}
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
        "machines": laboratory.machines(run for of_row in runs.values() for run in of_row),
        "plan": {"steps": plan.steps, "batch": plan.batch, "counts": dict(plan.counts), "seeds": list(seeds)},
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
            cells.append(cell(figure) if known else "")
        cells.append(" ".join(f"{value:z.2f}" for value in row["style_cosine_by_seed"]))
        lines.append(f"| {' | '.join(cells)} |")
    plan = result["plan"]
    lines += [
        "",
        f"{result['triplets']} held-out triplets, {len(plan['seeds'])} seeds, {plan['steps']} steps of batch"
        f" {plan['batch']}; 95 % intervals over styles of the mean over seeds. Trained on"
        f" {devices(result['machines'])}.",
    ]
    return "\n".join([*lines, *_gap_lines(result)])


def _gap_lines(result: Mapping[str, Any]) -> list[str]:
    if not (gaps := result.get("gaps")):
        return []
    lines = ["", "| states of the reference | distance of means | spread |", "|---|---|---|"]
    for name, gap in gaps.items():
        spread = gap["spread"]
        told = f"{spread['median']:.2f} [{spread['low']:.2f}, {spread['high']:.2f}]"
        lines.append(f"| {name} | {gap['shift_rms']:.2f} | {told} |")
    told = "Both in standard deviations of prompts' states, for each dimension: the distance's root mean square, the"
    return [*lines, "", f"{told} spread's median [5 %, 95 %]."]


def write(
    laboratory: Laboratory, name: str, seeds: Sequence[int], seconds: Mapping[str, float], results: Path, pages: Path
) -> None:
    """Result file, picture and table of one page."""
    result = result_of(laboratory, name, seeds, seconds if name == "adapter_lists" else {})
    # Here, because a machine that only measures may lack matplotlib.
    from benchmarks.findings_pictures import draw_front, draw_sheet, draw_splice

    drawn = {"adapter_lists": draw_front, "splice_setting": draw_splice}.get(name)
    picture = pages / f"{name}{'.webp' if drawn is None else '.png'}"
    if name == "splice_setting":
        gaps = json.loads((laboratory.out / "scores" / "gaps.json").read_text(encoding="utf-8"))
        result["gaps"] = mean_gaps(gaps)
    for folder in (results, pages):
        folder.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if drawn is not None:
        drawn(picture, result)
    else:
        strips = {label: _runs_of(row, seeds)[0] for row, label in BOOK[name].rows.items()}
        draw_sheet(picture, {"reference": "reference"} | strips | {"target": "target"}, laboratory)
    write_page(pages / f"{name}.md", table(result))
    print(f"wrote {results / name}.json and {picture}")


if __name__ == "__main__":
    sys.exit(main())
