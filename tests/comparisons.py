"""Small comparisons with pictures for tests of what reads them: drawn shapes, seeded scores, true intervals of those.

A prompt decides the shape, a reference the colours; a column shows how much of the colours it took over. Scores are
drawn from a seeded generator around a mean for each column, and intervals are the normal ones of those scores.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tests.triplets import ROOT
from ztrain.compare.record import Choice, Column, Comparison, Difference, Metric, Model, Row, write_comparison
from ztrain.config import TrackingConfig, load_config
from ztrain.io.yamls import dump_yaml
from ztrain.metrics.intervals import Interval
from ztrain.train.tracking import Record

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
STYLES = ("ember", "lagoon", "meadow", "orchid")
_PAPERS = ("#fbe3cf", "#d5eef2", "#e5f0cf", "#f0def2")
_INKS = ("#b8380b", "#0b5d78", "#3f6b12", "#7a2183")
_ACCENTS = ("#f2a33c", "#35b3b8", "#a6c13a", "#d178c9")
SIDE = 96  # pixels

SIGLIP = Model(name="google/siglip2-so400m-patch16-naflex", revision="a1b2c3d4e5f60718", weights="9c4e1f20aa")
DINO = Model(name="facebook/dinov2-small", revision=None, weights="77aa01bc2d")


def draw(shape: int, style: int, amount: float, seed: int) -> Image.Image:
    """A shape on paper. amount: 0 in greys, 1 in the style's colours; the seed moves it."""

    def mixed(colour: str, gray: int) -> tuple[int, int, int]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        red, green, blue = (round(amount * value + (1 - amount) * gray) for value in rgb)
        return red, green, blue

    paper, ink, accent = (
        mixed(colours[style], gray) for colours, gray in ((_PAPERS, 240), (_INKS, 70), (_ACCENTS, 160))
    )
    image = Image.new("RGB", (SIDE * 3, SIDE * 3), paper)
    pen = ImageDraw.Draw(image)
    generator = np.random.default_rng([shape, style, seed])
    x, y, r = (int(value) for value in generator.integers((120, 120, 70), (170, 170, 100)))
    pen.rectangle((0, 3 * SIDE - 50, 3 * SIDE, 3 * SIDE), fill=accent)
    box = (x - r, y - r, x + r, y + r)
    match SHAPES[shape]:
        case "circle":
            pen.ellipse(box, fill=ink)
        case "square":
            pen.rectangle(box, fill=ink)
        case "ring":
            pen.ellipse(box, outline=ink, width=30)
        case "cross":
            pen.line((x - r, y, x + r, y), fill=ink, width=36)
            pen.line((x, y - r, x, y + r), fill=ink, width=36)
        case name:
            points, inner = (3, 1.0) if name == "triangle" else (10, 0.45)
            angles = [2 * math.pi * k / points - math.pi / 2 for k in range(points)]
            radii = [r if k % 2 == 0 or name == "triangle" else r * inner for k in range(points)]
            pen.polygon([(x + s * math.cos(a), y + s * math.sin(a)) for a, s in zip(angles, radii, strict=True)], ink)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def interval_of(values: np.ndarray) -> dict[str, Any]:
    """Mean and normal 95 % interval of (T,) values."""
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "count": len(values)}
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "count": len(values)}


def make_metric(
    name: str, title: str, means: Sequence[float | None], shape: tuple[int, int], *, seed: int, spread: float,
    direction: Any = "higher", baseline: int | None = 1, model: Model | None = None, high: float | None = 1.0,
    low: float | None = 0.0, definition: str = "", chance: float | None = None, untold: Sequence[int] = (),
) -> Metric:  # fmt: skip
    """Scores around each column's mean; None: the column has none. shape: (rows, seeds); rows `untold` have none."""
    told = [row for row in range(shape[0]) if row not in untold]
    generator = np.random.default_rng(seed)
    common = generator.normal(0, spread, shape)
    drawn = [None if mean is None else mean + common + generator.normal(0, spread / 2, shape) for mean in means]
    intervals = [None if table is None else Interval(**interval_of(table[told].mean(1))) for table in drawn]
    differences: list[Difference | None] = []
    base = None if baseline is None else drawn[baseline]
    for place, table in enumerate(drawn):
        if table is None or base is None or place == baseline:
            differences.append(None)
            continue
        found = interval_of((table - base)[told].mean(1))
        verdict = "none" if direction == "neither" or "low" not in found else "undecided"
        if verdict == "undecided" and not found["low"] <= 0 <= found["high"]:
            verdict = "better" if (found["mean"] > 0) == (direction == "higher") else "worse"
        differences.append(Difference(**found, verdict=verdict))  # type: ignore[arg-type]
    values = [
        [[None] * shape[1] if table is None or row in untold else np.round(table[row], 4).tolist()
         for row in range(shape[0])]
        for table in drawn
    ]  # fmt: skip
    return Metric(
        name=name, title=title, definition=definition or f"What {title} means, in a sentence.", low=low, high=high,
        direction=direction, model=model, chance=chance, values=values, means=intervals, differences=differences,
    )  # fmt: skip


COLUMNS = [
    (Column(name="none", label="no image", role="none", sees="none"), 0.08, 0.0, 0.33),
    (Column(name="splice", label="splice", role="splice", settings={}), 0.38, 0.45, 0.27),
    (Column(name="projector", label="projector", role="adapter", num_weights=49_408, step=600), 0.44, 0.55, 0.30),
    (Column(name="siglip_lora", label="siglip + lora", role="adapter", num_weights=812_544, step=1400,
            folder="siglip_lora"), 0.71, 0.95, 0.325),
    (Column(name="lora", label="lora, text only", role="adapter", num_weights=403_200, step=600), 0.09, 0.1, 0.34),
    (Column(name="siglip_lora-shuffled", label="siglip + lora, shuffled", role="control", sees="shuffled", of=3),
     0.1, 0.9, 0.32),
    (Column(name="splice-shuffled", label="splice, shuffled", role="control", sees="shuffled", of=1), 0.11, 0.4, 0.26),
]  # fmt: skip
"""Column, style mean, how much of the colours it takes over, adherence mean."""


def make_rows(folder: Path, count: int, seeds: int, prompts: dict[int, str] | None = None) -> list[Row]:
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for i in range(count):
        shape, style = i % len(SHAPES), (i // 2) % len(STYLES)
        draw((shape + 3) % 6, style, 1.0, 10 * i).save(folder / f"pictures/reference-{i}.png")
        draw(shape, style, 1.0, 10 * i + 9).save(folder / f"pictures/target-{i}.png")
        rows.append(
            Row(
                prompt=(prompts or {}).get(i, f"a {SHAPES[shape]} above the floor, number {i}"), prompt_group=i,
                reference_group=style, where=f"validation {i}", references=[f"pictures/reference-{i}.png"],
                target=f"pictures/target-{i}.png", style=STYLES[style], seeds=[10 * i + s for s in range(seeds)],
            )
        )  # fmt: skip
    return rows


def draw_columns(folder: Path, names: Sequence[str], amounts: Sequence[float], rows: int, seeds: int) -> list[Any]:
    """C x R x S names of pictures, each drawn and written."""
    table = []
    for name, amount in zip(names, amounts, strict=True):
        (folder / name).mkdir()
        of_column = []
        for i in range(rows):
            names_of_row = [f"{name}/{i}-{s}.png" for s in range(seeds)]
            for s, place in enumerate(names_of_row):
                draw(i % len(SHAPES), (i // 2) % len(STYLES), amount, 10 * i + s).save(folder / place)
            of_column.append(names_of_row)
        table.append(of_column)
    return table


def make_comparison(
    folder: Path, *, rows: int = 12, seeds: int = 2, prompts: dict[int, str] | None = None,
    labels: dict[int, str] | None = None, title: str = "Adapters against the free splice",
) -> Comparison:  # fmt: skip
    """`comparison.json` of seven columns and its pictures in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [c.model_copy(update={"label": (labels or {}).get(i, c.label)}) for i, (c, *_) in enumerate(COLUMNS)]
    style, amounts, prompt = ([entry[k] for entry in COLUMNS] for k in (1, 2, 3))
    given = make_rows(folder, rows, seeds, prompts)
    size = (rows, seeds)
    copies: list[float | None] = [None, 0.21, 0.19, 0.12, None, 0.12, 0.2]
    metrics = [
        make_metric("diversity", "Diversity over seeds", [0.3, 0.24, 0.25, 0.27, 0.3, 0.27, 0.24], size, seed=3,
                    spread=0.03, model=DINO, definition="1 minus the mean cosine over seeds; 0: all alike."),
        make_metric("prompt", "Prompt adherence", prompt, size, seed=2, spread=0.04, model=SIGLIP, chance=0.02,
                    low=-1.0, definition="Cosine between the picture and its prompt, by SigLIP2."),
        make_metric("style", "Style likeness", style, size, seed=1, spread=0.08, model=SIGLIP, chance=0.1, low=-1.0,
                    definition="Cosine between the picture's and the reference's embedding, by SigLIP2."),
        make_metric("copy", "Copy score", copies, size, seed=4, spread=0.05, direction="lower",
                    untold=[4], definition="How much of the reference's own layout is in the picture; 1: a copy."),
        make_metric("energy", "Artefact energy", [0.031, 0.036, 0.033, 0.030, 0.031, 0.030, 0.036], size, seed=5,
                    spread=0.002, direction="neither", high=None, definition="Share of energy above half of Nyquist."),
    ]  # fmt: skip
    found = Comparison(
        ztrain_version="0.1.0",
        kind="compare",
        title=title,
        columns=columns,
        rows=given,
        pictures=draw_columns(folder, [c.name for c in columns], amounts, rows, seeds),
        metrics=metrics,
        baseline=1,
        style="style",
        adherence="prompt",
        best=Choice(
            column=3,
            rule="Most style among those that keep 95 % of the adherence that pictures without a reference have.",
            found="siglip + lora has 0.71 of style and keeps 98 % of the adherence.",
        ),
        best_splice=Choice(column=1, rule="The same rule among the splices.", found="There is one splice."),
        conditions={
            "base": "Z-Image (miniature)",
            "steps": 8,
            "size": "96 x 96",
            "precision": "float32",
            "machine": "cpu",
        },
        data={"name": "shapes", "split": "validation", "triplets": rows, "licence": "CC0-1.0"},
        config="seed: 0\nadapters:\n- kind: siglip\n- kind: lora\n  rank: 16\ncompare:\n  num_seeds: 2\n",
        loading='import ztrain\n\nadapted = ztrain.load_adapter(pipe, "siglip_lora")\nadapted("a circle", reference)\n',
        seconds=123.4,
    )
    write_comparison(found, folder)
    return found


AXES: dict[str, list[Any]] = {"encoders.hidden_index": [2, 3, 4, 5, 6], "splice.strength": [0.25, 0.5, 1.0],
                              "splice.tokens": ["image", "text"]}  # fmt: skip


def make_sweep(folder: Path, *, rows: int = 4) -> Comparison:
    """30 settings on three axes, none and the splice."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [{"encoders.hidden_index": k, "splice.strength": s, "splice.tokens": t}
             for k in (2, 3, 4, 5, 6) for s in (0.25, 0.5, 1.0) for t in ("image", "text")]  # fmt: skip
    columns = [COLUMNS[0][0], Column(name="splice", label="splice as configured", role="splice")]
    columns += [
        Column(name=f"cell-{i}", label="layer {}, {}, {}".format(*c.values()), role="setting", settings=c)
        for i, c in enumerate(cells)
    ]  # fmt: skip
    amounts = [0.0, 0.4, *(c["splice.strength"] * (1 - abs(c["encoders.hidden_index"] - 5) / 5) for c in cells)]
    style: list[float | None] = [0.08 + 0.6 * amount for amount in amounts]
    prompt: list[float | None] = [0.34 - 0.12 * amount**2 for amount in amounts]
    best = max(range(2, len(columns)), key=lambda i: style[i] or 0)
    size = (rows, 1)
    given = make_rows(folder, rows, 1)
    found = make_comparison(folder / "other", rows=2, seeds=1).model_copy(
        update={
            "kind": "sweep",
            "title": "Where the splice carries style",
            "columns": columns,
            "rows": given,
            "pictures": draw_columns(folder, [c.name for c in columns], amounts, rows, 1),
            "metrics": [
                make_metric("style", "Style likeness", style, size, seed=1, spread=0.05, model=SIGLIP),
                make_metric("prompt", "Prompt adherence", prompt, size, seed=2, spread=0.02, model=SIGLIP),
            ],
            "axes": AXES,
            "best": Choice(column=best, rule="Most style that keeps the prompt.", found="Layer 5 at full strength."),
            "loading": None,
        }
    )
    write_comparison(found, folder)
    return found


def make_run(folder: Path, *, steps: int = 300, previews: Sequence[int] = (0, 100, 200, 300), rows: int = 3) -> Path:
    """The folder of a run as training leaves it: the record through its own writer, drawn previews."""
    config = load_config([ROOT / "configs/projector.yaml", ROOT / "configs/tiny.yaml"], ["--seed", "5"])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    (folder / "env.json").write_text(json.dumps({"ztrain": "0.1.0", "device": "cpu", "num_processes": 1}))
    record = Record(folder, TrackingConfig(), {}, resumed_step=None)
    generator = np.random.default_rng(0)
    for step in range(steps + 1):
        loss = 0.2 + 0.5 * math.exp(-step / 60)
        values = {}
        if step > 0:
            values = {"train/loss": loss + float(generator.normal(0, 0.03)), "train/lr": 1e-3 * (1 - step / steps),
                      "train/grad_norm": loss, "perf/samples_per_second": 20.0, "perf/step_seconds": 0.4}  # fmt: skip
            values |= {f"train/loss_sigma/{k}": loss * (1 + abs(k - 5) / 5) for k in (step % 10, (step + 5) % 10)}
        if step % 100 == 0:
            values |= {"val/loss": loss, "val/loss_shuffled": loss + step / 3000, "val/loss_no_reference": loss + 0.01,
                       "val/image_use": step / 3000, "val/image_use_low": step / 3000 - 0.02,
                       "val/image_use_high": step / 3000 + 0.02, "val/loss_sigma_0.2": loss, "val/loss_sigma_0.8": loss,
                       "val/loss_shuffled_sigma_0.2": loss, "score/style": step / 500}  # fmt: skip
        record.log(step, values)
    record.close(failed=False)
    base = folder / "samples/base"
    base.mkdir(parents=True)
    prompts = [f"a {SHAPES[i]} in step {STYLES[i % 4]}" for i in range(rows)]
    (base / "key.json").write_text(json.dumps({"seed": 5, "rows": [[prompt, "digest", {}] for prompt in prompts]}))
    for i in range(rows):
        for name, amount, shape in (("reference", 1, i + 3), ("target", 1, i), ("no_image", 0, i), ("splice", 0.4, i)):
            draw(shape % 6, i % 4, amount, 0).save(base / f"{name}-{i}.png")
        for step in previews:
            (folder / f"samples/step-{step:08d}").mkdir(exist_ok=True)
            draw(i, i % 4, step / steps, 0).save(folder / f"samples/step-{step:08d}/{i}.png")
    (folder / "export").mkdir()
    (folder / "export/adapter_config.json").write_text("{}")
    return folder
