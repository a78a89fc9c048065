"""What text guidance does to the reference: every list at 0 and at the base's 4, under each negative.

    python -m benchmarks.guidance [--jobs N] [--out out/guidance]      (minutes on one GPU, hours on two cores)

Lists are trained with three seeds on painted style folders and judged on held-out triplets; beside them, the ways to
train that the page compares: shares of samples without their reference, the prior, the projector's correction. Out:
benchmarks/results/findings/guidance.json, the table and picture of docs/findings/guidance.md. In the file, `rows` holds
one entry for each list, guidance, negative and seed: {"list", "guidance", "negative", "seed", "style", "style_low",
"style_high", "content", "leak", "clipped"}; `training` holds the means over seeds of each way to train. `--measure`:
train and judge only. `--smoke`: writes to `--out` only.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.drawings import StudySettings, Variant
from benchmarks.findings_book import LISTS, UNTRAINED
from benchmarks.laboratory import Laboratory, Ways
from benchmarks.pages import PAGES, RESULTS, cell, devices, write_page
from ztrain.terminal import program

NAME = "guidance"
PLAN = StudySettings(counts={"train": (512, 8), "test": (128, 2)}, steps=800, batch=16)
SMOKE = StudySettings(counts={"train": (6, 4), "test": (6, 2)}, steps=3, batch=4)
GUIDANCE = 4.0  # of the released Base
NEGATIVES = ("neither", "reference", "base")
WAYS: Ways = {"own": {"sample": {"guidance_scale": 0.0}}} | {
    name: {"sample": {"guidance_scale": GUIDANCE, "negative": name}} for name in NEGATIVES
}
SHIPPED = ("siglip", "siglip_lora", "projector", "splice_lora", "lora")
"""One run of each list that comes with ztrain."""
_FAST = ("--adapters.0.learning_rate", "3e-3")  # of the miniature's other lists, and of its projector before
_SHARES = ("dropout_text", "dropout_reference", "dropout_both", "prior_weight")


def _trained(name: str, label: str, *shares: float, also: Sequence[str] = ()) -> Variant:
    options = (word for key, share in zip(_SHARES, shares, strict=True) for word in (f"--train.{key}", f"{share:g}"))
    return replace(LISTS[name], label=label, options=(*LISTS[name].options, *options, *also))


TRAINING = {
    "siglip_dropped": _trained("siglip", "[siglip], each dropped 0.05", 0.05, 0.05, 0.05, 0.0),
    "projector_fast": _trained("projector", "[projector], rate 3e-3", 0.0, 0.0, 0.0, 0.0, also=_FAST),
    "projector_dropped": _trained(
        "projector", "[projector], rate 3e-3, each dropped 0.05", 0.05, 0.05, 0.05, 0.0, also=_FAST
    ),
    "projector_absolute": _trained(
        "projector",
        "[projector], absolute, rate 3e-3",
        0.0,
        0.0,
        0.0,
        0.0,
        also=("--adapters.0.correction", "absolute", *_FAST),
    ),
    "siglip_lora_none": _trained("siglip_lora", "[siglip, lora], nothing dropped", 0.0, 0.0, 0.0, 0.0),
    "siglip_lora_before": _trained("siglip_lora", "[siglip, lora], each dropped 0.05", 0.05, 0.05, 0.05, 0.0),
} | {
    f"{name}_prior_{prior:g}": _trained(
        name, f"{LISTS[name].label}, reference and both dropped 0.05, prior {prior:g}", 0.0, 0.05, 0.05, prior
    )
    for name in ("siglip_lora", "splice_lora")
    for prior in (0.0, 0.5)  # 1 is the default of both
}
"""Ways to train that the page compares with the lists under their defaults."""
VARIANTS = {name: LISTS[name] for name in SHIPPED if name in LISTS} | TRAINING
PAIRED = {
    "[siglip, lora], 4: the base minus neither": (("siglip_lora", "base"), ("siglip_lora", "neither")),
    "[splice, lora], 4: the base minus neither": (("splice_lora", "base"), ("splice_lora", "neither")),
    "[siglip, lora], 4, neither: prior 1 minus 0.5": (("siglip_lora", "neither"), ("siglip_lora_prior_0.5", "neither")),
    "[siglip, lora], 4, neither: prior 1 minus 0": (("siglip_lora", "neither"), ("siglip_lora_prior_0", "neither")),
    "[splice, lora], 4, neither: prior 1 minus 0": (("splice_lora", "neither"), ("splice_lora_prior_0", "neither")),
    "[siglip, lora], 4, neither: as it is minus each dropped 0.05": (
        ("siglip_lora", "neither"),
        ("siglip_lora_before", "neither"),
    ),
    "[siglip], 4, neither: nothing dropped minus each 0.05": (("siglip", "neither"), ("siglip_dropped", "neither")),
}
"""Differences of style over the same triplets that the page rests on: run and way, minus run and way."""
FIGURES = {"style": "style_cosine", "content": "prompt_content", "leak": "leak_above_chance", "clipped": "clipped"}


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.guidance", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/guidance"))
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help="write no page; it can be written from OUT/scores")
    parser.add_argument("--smoke", action="store_true", help="shows that everything runs")
    options = parser.parse_args(arguments)
    plan, places = (SMOKE, (options.out, options.out)) if options.smoke else (PLAN, (RESULTS, PAGES))
    laboratory = Laboratory(options.out, plan, options.jobs, WAYS)
    measure(laboratory, range(options.seeds))
    if not options.measure:
        write(laboratory, range(options.seeds), *places)


def _ways_of(name: str) -> tuple[str, ...]:
    return ("own", "neither") if name == "lora" else tuple(WAYS)


def measure(laboratory: Laboratory, seeds: Sequence[int]) -> None:
    """Trains and judges what is not there yet."""
    laboratory.prepare()
    laboratory.keep_truth()
    runs = [(name, variant, seed) for seed in seeds for name, variant in VARIANTS.items()]
    laboratory.carry_out(runs, {name: _ways_of(name) for name in VARIANTS})
    laboratory.judge("splice-5-text-1", UNTRAINED["splice-5-text-1"](laboratory.config), tuple(WAYS))
    laboratory.judge("text", UNTRAINED["text"](laboratory.config), ("own", "neither"))


def result_of(laboratory: Laboratory, seeds: Sequence[int]) -> dict[str, Any]:
    """All figures. Intervals are over styles: of one seed in `rows`, of the mean over seeds elsewhere."""
    clusters = laboratory.clusters()
    rows = []
    for name in SHIPPED:
        for way in _ways_of(name):
            for seed in seeds:
                scores = laboratory.scores([f"{name}-{seed}"], way)
                style = clusters.figure(scores["style_cosine"], None, drop_nan=True)
                told = {key: round(scores[score].nanmean().item(), 4) for key, score in FIGURES.items()}
                guidance, negative = (0.0, "neither") if way == "own" else (GUIDANCE, way)
                low, high = (round(style[bound], 4) for bound in ("low", "high"))
                row = {"list": VARIANTS[name].label.split("]")[0] + "]", "guidance": guidance, "negative": negative}
                rows.append(row | {"seed": seed, **told, "style_low": low, "style_high": high})
    runs = {name: [f"{name}-{seed}" for seed in seeds] for name in VARIANTS}
    training = {
        name: {
            "label": VARIANTS[name].label if name in VARIANTS else "the splice, untrained",
            "ways": {
                way: {
                    key: clusters.figure(laboratory.scores(of, way)[score], None, drop_nan=True)
                    for key, score in FIGURES.items()
                }
                for way in _ways_of(name)
            },
        }
        for name, of in (runs | {"splice": ["splice-5-text-1"]}).items()
    }
    styles = {
        (name, way): laboratory.scores(of, way)["style_cosine"] for name, of in runs.items() for way in _ways_of(name)
    }
    plan = laboratory.plan
    return {
        "machines": laboratory.machines(run for of in runs.values() for run in of),
        "plan": {"steps": plan.steps, "batch": plan.batch, "counts": dict(plan.counts), "seeds": list(seeds)},
        "triplets": len(clusters.numbers),
        "rows": rows,
        "training": training,
        "paired": {
            label: clusters.figure(styles[ours], styles[theirs], drop_nan=True)
            for label, (ours, theirs) in PAIRED.items()
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """A result file as the page shows it."""
    ways = ("no guidance", *(f"4, {name}" for name in NEGATIVES))
    heads = [*(f"{figure}: {way}" for figure in ("style", "content") for way in ways), f"clipped: {'; '.join(ways)}"]
    lines = [f"| | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for row in result["training"].values():
        cells = [cell(row["ways"][way][key]) if way in row["ways"] else ""
                 for key in ("style", "content") for way in WAYS]  # fmt: skip
        clipped = [f"{row['ways'][way]['clipped']['mean']:.3f}" for way in WAYS if way in row["ways"]]
        lines.append(f"| {row['label']} | {' | '.join(cells)} | {' '.join(clipped)} |")
    lines += ["", "| style, paired | difference |", "|---|---|"]
    for label, figure in result["paired"].items():
        mean, low, high = (f"{figure[name]:z.3f}" for name in ("mean", "low", "high"))
        lines.append(f"| {label} | {mean} [{low}, {high}] |")
    plan = result["plan"]
    told = (
        f"{result['triplets']} held-out triplets, {len(plan['seeds'])} seeds, {plan['steps']} steps of batch"
        f" {plan['batch']}; 95 % intervals over styles of the mean over seeds. Clipped: share of the pictures' values"
        f" that are 0 or 255. Trained on {devices(result['machines'])}."
    )
    return "\n".join([*lines, "", told])


def write(laboratory: Laboratory, seeds: Sequence[int], results: Path, pages: Path) -> None:
    """Result file, picture and table."""
    from benchmarks.findings_pictures import draw_sheet  # here: a machine that only measures may lack matplotlib

    result = result_of(laboratory, seeds)
    (results / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw_sheet(pages / f"{NAME}.webp", _strips(seeds[0]), laboratory)
    write_page(pages / f"{NAME}.md", table(result))
    print(f"wrote {results / NAME}.json and {pages / NAME}.webp")


def _strips(seed: int) -> dict[str, str]:
    """Runs of the picture by label."""
    ways = {"own": "0", **{name: f"4, {name}" for name in NEGATIVES}}
    runs = {way: f"siglip_lora-{seed}" + ("" if way == "own" else f".{way}") for way in ways}
    drawn = {f"guidance {told}": runs[way] for way, told in ways.items()}
    return {"reference": "reference"} | drawn | {"target": "target"}


if __name__ == "__main__":
    sys.exit(main())
