"""Writes the model card of the shipped miniature from its recipe and its scorecards.

    ztrain mini measure miniature/weights --out out/card --parts vae text vl --count 384
    ztrain mini measure miniature/weights --out out/card_splice --parts splice --count 192
    python benchmarks/miniature_card.py

In: miniature/weights/recipe.json, and benchmarks/results/miniature/seed{0,1}_{text,splice}.json, which are the
scorecard.json of these commands, without line breaks, for the shipped family and for one of another seed. Out:
miniature/weights/README.md.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "miniature"
WEIGHTS = ROOT / "ztrain" / "mini" / "weights"

HEAD = """\
---
license: apache-2.0
---

# A miniature Z-Image

Every model of the Z-Image family with small numbers, pretrained by `ztrain mini pretrain` (seed 0) on painted pictures
of 64 pixels: twelve kinds of objects, one to three of them, at five places, in a continuous space of styles. The
folders are those of the real repositories, and ztrain, diffusers and transformers read them as they read the real ones.
It is for measuring how adapters learn, within minutes and on a laptop; it draws nothing else, and figures of it say
nothing about the real model's quality.

- `Z-Image/`: transformer, Qwen3 text encoder, tokenizer, VAE, scheduler (shift 3)
- `Qwen3-VL-4B-Instruct/`: visual part and a language model that has drifted from the text encoder
- `siglip2-so400m-patch16-naflex/`: the vision tower
- `judges/`: a classifier of content and style, and two style embeddings; they have seen every content
- `family.json`, `recipe.json`: what it was made from, and what each stage took

Use it with `--config configs/<list>.yaml configs/miniature.yaml`. How it is trained: `docs/miniature.md`.
"""


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def card() -> str:
    return "\n".join(lines()) + "\n"


def lines() -> Iterator[str]:
    recipe = json.loads((WEIGHTS / "recipe.json").read_text(encoding="utf-8"))
    text, splice = ([read(f"seed{seed}_{part}") for seed in (0, 1)] for part in ("text", "splice"))
    yield HEAD
    yield from ["## Recipe", "", "| stage | steps x batch | minutes | parameters |", "|---|---|---|---|"]
    total = 0.0
    for stage, report in recipe.items():
        fits = report["fits"]
        # A resumed stage's own clock began anew; its fits' did not.
        minutes = max(report["seconds"], sum(fit["seconds"] for fit in fits)) / 60
        total += minutes
        steps = ", ".join(f"{fit['steps']:,} x {fit['samples'] // fit['steps']:,}" for fit in fits)
        parameters = ", ".join(f"{name} {count:,}" for name, count in report["parameters"].items())
        yield f"| {stage} | {steps} | {minutes:.1f} | {parameters} |"
    machines = sorted({report["machine"] for report in recipe.values()})
    versions = sorted({report["torch"] for report in recipe.values()})
    yield ""
    yield (
        f"{total:.0f} minutes on one {' and '.join(machines)}, which two families shared in part, torch"
        f" {versions[-1]}."
        " Every stage resumes or ends within 8 minutes."
    )
    yield from figures(text, splice)
    yield from layers(splice[0])


def figures(text: list[dict[str, Any]], splice: list[dict[str, Any]]) -> Iterator[str]:
    yield from ["", "## Figures", ""]
    first = text[0]
    yield (
        f"`ztrain mini measure`, guidance {first['guidance_scale']:g}, {first['num_inference_steps']} steps, on"
        f" {first['machine']}: mean [95 % bootstrap interval], n. Held: known contents in combinations with styles that"
        " no model saw. Unseen: contents that no model saw, one of each kind. Triplets: references of unseen contents."
        " The second column is a family of another seed, which is not shipped."
    )
    yield from ["", "| figure | seed 0 | seed 1 | asked for |", "|---|---|---|---|"]
    for cards in (text, splice):
        for name, mine in cards[0]["figures"].items():
            other = cards[1]["figures"][name]
            yield f"| {name} | {value(mine)} | {value(other)} | {mine['threshold']:g} |"
    judges = first["judges"]["held"]
    named = ", ".join(f"{name} {judges[name]['mean']:.3f}" for name in ("kind", "count", "place", "style_cosine"))
    yield ""
    yield f"The judges themselves, on true held pictures: {named}."


def value(figure: dict[str, Any]) -> str:
    shared = f", {figure['groups']} {figure['groups_of']}" if figure["groups"] < figure["count"] else ""
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}], {figure['count']}{shared}"


def layers(scorecard: dict[str, Any]) -> Iterator[str]:
    """Layers x strengths beside the neutral prompt, and the layers alone."""
    splice = scorecard["splice"]
    yield from ["", "## The splice by layer and strength", ""]
    yield (
        f'Seed 0, prompt "a picture", image states after the prompt, {splice["table_count"]} triplets: style cosine /'
        " leak (the share of pictures that show the reference's kind of object). Layer 5 of 6 is the one that the"
        " transformer was trained on."
    )
    strengths = sorted({row["strength"] for row in splice["rows"] if row["prompt"] == "neutral" and row["strength"]})
    for tokens in ("text", "image", "all"):
        yield from ["", f"tokens: {tokens}", ""]
        yield "| layer | " + " | ".join(f"strength {strength:g}" for strength in strengths) + " |"
        yield "|---" * (1 + len(strengths)) + "|"
        for layer in sorted({row["hidden_index"] for row in splice["rows"] if row["hidden_index"]}):
            cells = [
                short(row["figures"], ("style_cosine", "leak"))
                for strength in strengths
                for row in splice["rows"]
                if (row["model"], row["prompt"], row["compose"], row["tokens"], row["hidden_index"], row["strength"])
                == ("splice", "neutral", "concatenate", tokens, layer, strength)
            ]
            yield f"| {layer} | " + " | ".join(cells) + " |"
    yield ""
    yield "Alone, no prompt, all tokens: style cosine / kind of the reference / share of high frequencies."
    yield from ["", "| layer | splice | raw VL |", "|---|---|---|"]
    alone = [
        row for row in splice["rows"] if row["prompt"] == "none" and row["tokens"] == "all" and row["hidden_index"]
    ]
    for layer in sorted({row["hidden_index"] for row in alone}):
        cells = [
            short(row["figures"], ("style_cosine", "reference_kind", "high_frequency"))
            for model in ("splice", "raw")
            for row in alone
            if (row["model"], row["hidden_index"]) == (model, layer)
        ]
        yield f"| {layer} | " + " | ".join(cells) + " |"


def short(figures: dict[str, Any], names: tuple[str, ...]) -> str:
    return " / ".join(f"{figures[name]['mean']:.2f}" for name in names)


if __name__ == "__main__":
    (WEIGHTS / "README.md").write_text(card(), encoding="utf-8")
    print(WEIGHTS.relative_to(ROOT) / "README.md")
