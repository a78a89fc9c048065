"""Trains, judges and collects the miniature's shipped adapters: one of each kind, and a LoRA that sees no reference.

    python -m benchmarks.shipped_adapters [--jobs N] [--out out/shipped]      (minutes on one GPU, hours on a laptop)

Out: miniature/adapters/<experiment>/ without the ComfyUI files, which hold the same LoRA once more, the table in
miniature/adapters/README.md, and benchmarks/results/shipped_adapters.json with every figure on held-out triplets.
`--measure` stops before that; the rest can then be done elsewhere from `--out`. `--smoke`: writes to `--out` only.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.drawings import StudySettings, Variant
from benchmarks.laboratory import Laboratory, Ways
from miniature.exam import RETRIEVAL_POOL
from miniature.trials import ADAPTERS, splice, text_only
from ztrain.adapters.lora import COMFYUI_FILE
from ztrain.terminal import program
from ztrain.weights.adapter_folder import CONFIG_FILE, sealed

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "shipped_adapters.json"
PLAN = StudySettings(counts={"train": (2500, 8), "test": (512, 2)}, steps=4000, batch=64, seed=1)
SMOKE = StudySettings(counts={"train": (6, 4), "test": (6, 2)}, steps=3, batch=4)

_TEXT = ("--adapters.0.tokens", "text")
_RANK = "16"
VARIANTS = {
    "siglip": Variant(label="[siglip]", experiment="siglip"),
    "siglip_lora": Variant(label="[siglip, lora]", experiment="siglip_lora", options=("--adapters.1.rank", _RANK)),
    "projector": Variant(
        label="[projector]", experiment="projector", options=(*_TEXT, "--adapters.0.hidden_dim", "512")
    ),
    "splice_lora": Variant(
        label="[splice, lora]", experiment="splice_lora", options=(*_TEXT, "--adapters.1.rank", _RANK)
    ),
    "lora": Variant(label="[lora], sees no reference", experiment="lora", options=("--adapters.0.rank", _RANK)),
}
"""By experiment of configs/."""
WAYS: Ways = {"own": {}, "shuffled": {"is_shuffled": True}, "unguided": {"sample": {"guidance_scale": 0.0}}}
"""The base's own guidance, 4, unless said otherwise."""
COLUMNS = {
    "style cosine": "style_cosine",
    f"style R@1 of {RETRIEVAL_POOL}": "style_retrieval",
    "content right": "prompt_content",
    "leak above chance": "leak_above_chance",
    "other style judge": "style_second_cosine",
}

HEAD = """\
---
license: apache-2.0
---

# Adapters of the miniature

One of each kind, trained on painted style folders with `python -m benchmarks.shipped_adapters`: batch {batch}, a cosine
schedule of {steps} steps; where the table names fewer, the machine's time was over before. bfloat16. To draw:

```bash
ztrain sample --config configs/<list>.yaml configs/miniature.yaml --adapter miniature/adapters/<list> \\
  --prompt "two stars on the left" --reference reference.png --out drawing.png
```

{count} held-out triplets (contents and styles that were not trained on), 95 % intervals over styles, drawn at guidance
{guidance:g}. "Shuffled": the same adapter with a reference of another style.

"""


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.shipped_adapters", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/shipped"))
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--measure", action="store_true", help="train and judge, collect nothing")
    parser.add_argument(
        "--as-far-as-trained", action="store_true", help="export and judge runs that were cut off, train nothing more"
    )
    parser.add_argument("--smoke", action="store_true", help="shows that everything runs")
    options = parser.parse_args(arguments)
    plan = SMOKE if options.smoke else PLAN
    laboratory = Laboratory(options.out, plan, options.jobs, WAYS, as_far_as_trained=options.as_far_as_trained)
    measure(laboratory)
    if not options.measure:
        places = (options.out / "adapters", options.out / RESULT.name) if options.smoke else (ADAPTERS, RESULT)
        collect(laboratory, *places)


def measure(laboratory: Laboratory) -> None:
    """Trains and judges what is not there yet."""
    runs = [(name, variant, 0) for name, variant in VARIANTS.items()]
    laboratory.prepare()
    laboratory.keep_truth()
    laboratory.carry_out(runs, {name: ("own", "unguided") if name == "lora" else tuple(WAYS) for name in VARIANTS})
    laboratory.judge("text", text_only(laboratory.config), ("own", "unguided"))
    laboratory.judge("splice", splice(laboratory.config, 5, "text"), tuple(WAYS))


def collect(laboratory: Laboratory, adapters: Path, result_file: Path) -> None:
    """Copies the exports and writes figures and their table."""
    for name in VARIANTS:
        exported, place = laboratory.folder(name, 0) / "export", adapters / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(exported, place, ignore=shutil.ignore_patterns(COMFYUI_FILE))
        document = json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))
        document["files"].pop(COMFYUI_FILE, None)
        (place / CONFIG_FILE).write_text(sealed(document), encoding="utf-8")
    result = result_of(laboratory)
    result_file.parent.mkdir(parents=True, exist_ok=True)
    result_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (adapters / "README.md").write_text(card(result), encoding="utf-8")
    print(card(result))


def result_of(laboratory: Laboratory) -> dict[str, Any]:
    """Figures by run and way, and paired differences of style to what each adapter must be better than."""
    clusters, plan = laboratory.clusters(), laboratory.plan
    rows, style = {}, {}
    runs = {"text": "text", "splice": "splice"} | {name: f"{name}-0" for name in VARIANTS}
    for name, run in runs.items():
        told = laboratory.read(run)
        ways = {way: laboratory.scores([run], way) for way in told["scores"]}
        style[name] = {way: scores["style_cosine"] for way, scores in ways.items()}
        rows[name] = {
            "label": told["label"],
            "weights": told["weights"],
            "steps": told.get("steps"),
            "figures": {
                way: {figure: clusters.figure(values, drop_nan=True) for figure, values in scores.items()}
                for way, scores in ways.items()
            },
        }
    for name, row in rows.items():
        if name in VARIANTS and "shuffled" in style[name]:
            others = {
                "shuffled": style[name]["shuffled"],
                "lora": style["lora"]["own"],
                "splice": style["splice"]["own"],
            }
            row["style_above"] = {
                other: clusters.figure(style[name]["own"], values) for other, values in others.items()
            }
    return {
        "machines": laboratory.machines(run for run in runs.values()),
        "plan": {
            "steps": plan.steps,
            "batch": plan.batch,
            "counts": dict(plan.counts),
            "seed": plan.seed,
            "guidance": laboratory.trials.studio.settings(text_only(laboratory.config)).guidance_scale,
        },
        "triplets": len(clusters.numbers),
        "rows": rows,
    }


def card(result: Mapping[str, Any]) -> str:
    """The README beside the adapters."""

    def cell(figure: Mapping[str, float]) -> str:
        return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"

    plan = result["plan"]
    head = HEAD.format(
        steps=plan["steps"], batch=plan["batch"], count=result["triplets"], guidance=plan.get("guidance", 0)
    )
    heads = [*COLUMNS, "style, shuffled", "style, no guidance", "steps", "weights"]
    lines = [f"| | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for row in result["rows"].values():
        figures = row["figures"]
        cells = [cell(figures["own"][figure]) for figure in COLUMNS.values()]
        cells += [cell(figures[way]["style_cosine"]) if way in figures else "" for way in ("shuffled", "unguided")]
        lines.append(f"| {row['label']} | {' | '.join(cells)} | {row['steps'] or ''} | {row['weights']:,} |")
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
