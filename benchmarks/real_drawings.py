"""Real drawings: adapters of a family pretrained on style folders, judged on pairs that neither it nor they have seen.

    ztrain mini pretrain --data ../shared/data/emoji_styles --out out/emoji_miniature          (15 minutes on two H200)
    python -m benchmarks.real_drawings --family out/emoji_miniature/family [--data DIR] [--jobs N] [--out DIR]

Targets are pairs of content and style that the family's training left out; references show contents that no model has
seen, in the target's style. Every list is trained twice: on all styles, and without one of them, in which it is judged
all the same. Out: benchmarks/results/findings/real_drawings.json, the table and two contact sheets of
docs/findings/real_drawings.md. `--measure`: train and judge only. `--smoke`: writes to `--out` only.
"""

import argparse
import csv
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.drawings import StudySettings, Variant
from benchmarks.laboratory import Laboratory, Ways
from benchmarks.pages import PAGES, RESULTS, cell, devices, save_sheet, write_page
from miniature.family import BASE, MARKER, SIGLIP, VISION_LANGUAGE
from miniature.folders import FolderWorld
from miniature.gallery import Split
from miniature.trials import as_found, find_best_splice, splice, splices, text_only
from miniature.truth import Truth
from ztrain.compare.lineup import Entry
from ztrain.errors import InputError
from ztrain.sampling.sheet import draw_grid
from ztrain.terminal import program

NAME = "real_drawings"
DATA, SIZE = Path("../shared/data/emoji_styles"), 128
PLAN = StudySettings(counts={"train": (8, 4000), "validation": (8, 10), "test": (8, 48)}, steps=2000, batch=16)
SMOKE = StudySettings(counts={"train": (8, 12), "validation": (8, 2), "test": (8, 3)}, steps=2, batch=2)
LEFT_OUT = "emojitwo_line"
LAYERS, STRENGTHS = (4, 5, 6), (0.5, 1.0)
"""Of the splice that are compared on validation triplets."""
SHOWN = 40

UNGUIDED = {"sample": {"guidance_scale": 0.0}}
WAYS: Ways = {"own": UNGUIDED, "shuffled": {"is_shuffled": True} | UNGUIDED}
LISTS = {
    "siglip": Variant(label="[siglip]", experiment="siglip"),
    "siglip_lora": Variant(label="[siglip, lora]", experiment="siglip_lora"),
    "projector": Variant(label="[projector]", experiment="projector", options=("--adapters.0.hidden_dim", "512")),
    "splice_lora": Variant(label="[splice, lora]", experiment="splice_lora"),
}
WITHOUT = "_without"
COLUMNS = {"style right": "style_right", "content right": "prompt_content", "style cosine": "style_cosine"}


@dataclass(frozen=True)
class RealDrawings:
    """Style folders, and the family that was pretrained on them. Raises InputError where these do not belong together.

    A plan's counts are of targets, at most.
    """

    family: Path
    data: Path
    left_out: str

    def __post_init__(self) -> None:
        marker = self.family / MARKER
        if not marker.is_file():
            raise InputError(f"{self.family} is no family: give the folder that `ztrain mini pretrain` names")
        worlds = {stage["world"] for stage in json.loads(marker.read_text(encoding="utf-8")).values()}
        if worlds != {self.world.name}:
            raise InputError(f"{self.family} was pretrained on {', '.join(worlds)}, {self.data} is {self.world.name}")
        if self.left_out not in self.styles:
            raise InputError(f"no style {self.left_out!r} in {self.data}; there are {', '.join(self.styles)}")

    @cached_property
    def world(self) -> FolderWorld:
        return FolderWorld.read(self.data, SIZE)

    @property
    def styles(self) -> tuple[str, ...]:
        return self.world.style_classes.get("style", ())

    @property
    def options(self) -> tuple[str, ...]:
        models = {"base": BASE, "vision_language": VISION_LANGUAGE, "siglip": SIGLIP}
        paths = [
            word
            for role, folder in models.items()
            for word in (f"--models.{role}.pretrained_model_name_or_path", str(self.family / folder))
        ]
        return (*paths, "--data.resolution", str(SIZE), "--judges.truth", str(self.family))

    @property
    def truth(self) -> Truth:
        classes = {name: number for number, name in enumerate(self.world.content_classes["content"])}
        return Truth(
            contents=("content",),
            classes=lambda names: {"content": torch.tensor([classes[name] for name in names])},
            style_classes=self.styles,
            drawn_by="content",
        )

    def lay_out(self, folder: Path, plan: StudySettings) -> None:
        """Splits train, train_without (the left-out style), validation and test: a table of pairs."""
        rows = [*self._pairs("train", "train", "train", plan, seed=0)]
        rows += [row | {"split": "train_without"} for row in rows if row["style"] != self.left_out]
        rows += self._pairs("validation", "train", "unseen", plan, seed=1)
        rows += self._pairs("test", "held", "unseen", plan, seed=2)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        used = sorted({row[end] for row in rows for end in ("reference", "target")})
        for name in used:
            path = folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self.world.pictures.images[int(path.stem)].permute(1, 2, 0).numpy()).save(path)
        text = "sources: [images]\nscan: {min_side: 16}\ndedup: null\nsplit: {apart: []}\n"
        text += "label: {pairs: {table: pairs.csv, max_copy_score: 1.0}}\n"
        (folder / "build.yaml").write_text(text, encoding="utf-8")

    def _pairs(self, name: str, targets: Split, references: Split, plan: StudySettings, *, seed: int) -> Iterator[dict]:
        """Rows of one split in rounds, in each of which a style occurs once at most; training's pairs come four times,
        with other references."""
        styles, drawings = plan.counts[name]
        chance = random.Random(f"{plan.seed} {seed}")
        of_style = {
            style: [self._of_style(split, style, chance) for split in (targets, references)]
            for style in self.styles[:styles]
        }
        for turn in range(drawings):
            for style, (wanted, shown) in of_style.items():
                for _ in range(4 if name == "train" else 1) if turn < len(wanted) else ():
                    target = wanted[turn]
                    others = [row for row in shown if self._content(row) != self._content(target)]
                    if not others:
                        raise InputError(f"{self.data}: {style} has no drawing of another content to refer to")
                    reference = chance.choice(others)
                    yield {
                        "reference": f"{style}/{reference}.png",
                        "target": f"{style}/{target}.png",
                        "prompt": self._content(target),
                        "split": name,
                        "style": style,
                        "content": self._content(target),
                        "reference_content": self._content(reference),
                    }

    def _of_style(self, split: Split, style: str, chance: random.Random) -> list[int]:
        """Positions in the world's pictures, shuffled."""
        number = self.styles.index(style)
        rows = [row for row in self.world.splits[split].tolist() if self.world.pictures.styles[row] == number]
        chance.shuffle(rows)
        return rows

    def _content(self, row: int) -> str:
        return self.world.pictures.captions[row]


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog=f"benchmarks.{NAME}", description=__doc__)
    parser.add_argument("--family", type=Path, required=True, help="as `ztrain mini pretrain --data` finished it")
    parser.add_argument("--data", type=Path, default=DATA, help="the style folders that it was pretrained on")
    parser.add_argument("--left-out", default=LEFT_OUT, metavar="STYLE", help="the style that half of the runs miss")
    parser.add_argument("--out", type=Path, default=Path("out/real_drawings"))
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--measure", action="store_true", help="write no page; it can be written from OUT/scores")
    parser.add_argument("--smoke", action="store_true", help="shows that everything runs")
    options = parser.parse_args(arguments)
    drawings = RealDrawings(options.family, options.data, options.left_out)
    plan = SMOKE if options.smoke else PLAN
    laboratory = Laboratory(options.out, plan, options.jobs, WAYS, drawings, SHOWN)
    settings = (LAYERS[-1:], STRENGTHS[-1:]) if options.smoke else (LAYERS, STRENGTHS)
    variants = measure(laboratory, drawings.left_out, *settings)
    if not options.measure:
        write(laboratory, variants, *((options.out, options.out) if options.smoke else (RESULTS, PAGES)))


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    laboratory: Laboratory, left_out: str, layers: Sequence[int], strengths: Sequence[float]
) -> dict[str, Variant]:
    """Trains and judges what is not there yet; the variants by name. Layers and strengths are the splice's, to choose
    from."""
    laboratory.prepare()
    laboratory.keep_truth()
    best = _best_splice(laboratory, layers, strengths)
    variants = {}
    for name, variant in LISTS.items():
        options = (*variant.options, *as_found(laboratory.config_of(variant), best))
        variants[name] = replace(variant, options=options)
        without = replace(variant, options=(*options, "--data.train_split", "train_without"))
        variants[name + WITHOUT] = replace(without, label=f"{variant.label}, not trained on {left_out}")
    laboratory.judge_targets("true", "true drawings")
    laboratory.judge("text", text_only(laboratory.config))
    laboratory.judge("splice", replace(best, label="the splice at its best"), tuple(WAYS))
    laboratory.carry_out(
        [(name, variant, 0) for name, variant in variants.items()], dict.fromkeys(variants, tuple(WAYS))
    )
    return variants


def _best_splice(laboratory: Laboratory, layers: Sequence[int], strengths: Sequence[float]) -> Entry:
    """The setting with the most style on validation triplets, searched once."""
    path = laboratory.out / "scores" / "splice_setting.json"
    if not path.is_file():
        config = laboratory.config
        sample = config.sample.model_copy(update=UNGUIDED["sample"])
        settings = splices(config.model_copy(update={"sample": sample}), layers, strengths)
        best = find_best_splice(laboratory.trials_of("validation"), settings)[0].entry
        told = {
            "label": best.label,
            "tokens": best.adapters[0].tokens,
            "scale": best.sample.scales,
            "hidden_index": best.encoders.hidden_index,
        }
        path.write_text(json.dumps(told) + "\n", encoding="utf-8")
    told = json.loads(path.read_text(encoding="utf-8"))
    return splice(laboratory.config, told["hidden_index"], told["tokens"], told["scale"])


# --- writing ----------------------------------------------------------------------------------------------------------


def result_of(laboratory: Laboratory, variants: Mapping[str, Variant]) -> dict[str, Any]:
    """Of every way to draw, each figure over all triplets, over those in the left-out style, and over the others."""
    drawings, clusters, plan = laboratory.drawings, laboratory.clusters(), laboratory.plan
    assert isinstance(drawings, RealDrawings)
    is_left_out = torch.tensor([style == drawings.left_out for style in laboratory.truth["styles"]])
    parts = {"all": torch.ones_like(is_left_out), "left_out": is_left_out, "others": ~is_left_out}
    rows = {}
    for name, run in {**dict.fromkeys(("true", "text", "splice")), **{name: f"{name}-0" for name in variants}}.items():
        told = laboratory.read(run or name)
        for way in told["scores"]:
            scores = laboratory.scores([run or name], way)
            rows[name if way == "own" else f"{name}_{way}"] = {
                "label": told["label"] if way == "own" else f"{told['label']}, {way} reference",
                "weights": told["weights"],
                "figures": {
                    part: {
                        figure: clusters.select(chosen).figure(scores[figure][chosen], drop_nan=True)
                        for figure in COLUMNS.values()
                    }
                    for part, chosen in parts.items()
                },
            }
    setting = json.loads((laboratory.out / "scores" / "splice_setting.json").read_text(encoding="utf-8"))
    return {
        "machines": laboratory.machines(f"{name}-0" for name in variants),
        "plan": {"steps": plan.steps, "batch": plan.batch, "counts": dict(plan.counts), "seed": plan.seed},
        "left_out": drawings.left_out,
        "splice_setting": setting["label"],
        "triplets": {part: int(chosen.sum()) for part, chosen in parts.items()},
        "rows": rows,
    }


def table(result: Mapping[str, Any]) -> str:
    """A result as the page shows it: trained on all styles, then without one."""
    counts, left_out = result["triplets"], result["left_out"]
    head = [f"{column}, {counts['all']} triplets" for column in COLUMNS]
    lines = [f"| | {' | '.join(head)} |", "|" + "---|" * (len(head) + 1)]
    for name, row in result["rows"].items():
        if WITHOUT not in name:
            figures = row["figures"]["all"]
            lines.append(f"| {row['label']} | {' | '.join(cell(figures[figure]) for figure in COLUMNS.values())} |")
    head = [f"{left_out}: {column}" for column in COLUMNS] + ["the other styles: style right"]
    lines += ["", f"| | {' | '.join(head)} |", "|" + "---|" * (len(head) + 1)]
    for name, row in result["rows"].items():
        if not name.endswith("shuffled"):
            figures = [row["figures"]["left_out"][figure] for figure in COLUMNS.values()]
            figures.append(row["figures"]["others"]["style_right"])
            lines.append(f"| {row['label']} | {' | '.join(map(cell, figures))} |")
    plan = result["plan"]
    lines += [
        "",
        f"The splice at its best on validation triplets: {result['splice_setting']}. {plan['steps']} steps of batch"
        f" {plan['batch']}, one seed; {counts['left_out']} triplets are in {left_out}. 95 % intervals over contents."
        f" Trained on {devices(result['machines'])}.",
    ]
    return "\n".join(lines)


def write(laboratory: Laboratory, variants: Mapping[str, Variant], results: Path, pages: Path) -> None:
    """Result file, contact sheets and table."""
    result = result_of(laboratory, variants)
    for folder in (results, pages):
        folder.mkdir(parents=True, exist_ok=True)
    (results / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    styles = laboratory.truth["styles"][: laboratory.shown]
    one_each = [styles.index(style) for style in dict.fromkeys(styles)]
    left_out = [row for row, style in enumerate(styles) if style == result["left_out"]][: len(one_each)]
    whole = {"text only": "text", "splice": "splice"} | {LISTS[name].label: f"{name}-0" for name in LISTS}
    without = {"text only": "text"} | {f"{LISTS[name].label} without": f"{name}{WITHOUT}-0" for name in LISTS}
    for path, columns, rows in (
        (pages / f"{NAME}.webp", whole, one_each),
        (pages / f"{NAME}_left_out.webp", without, left_out),
    ):
        named = {"reference": "reference"} | columns | {"target": "target"}
        strips = [laboratory.pictures(run) for run in named.values()]
        prompts = [laboratory.truth["prompts"][row] for row in rows]
        save_sheet(draw_grid(list(named), prompts, [[strip[row] for strip in strips] for row in rows]), path)
    write_page(pages / f"{NAME}.md", table(result))
    print(table(result))


if __name__ == "__main__":
    sys.exit(main())
