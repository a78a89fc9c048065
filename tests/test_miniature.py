"""The weights that come with ztrain: small, whole, read as the real ones are, and able to draw and to see."""

import json
import re
import runpy
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors import safe_open

from miniature.exam import Exam
from miniature.painter import PaintedWorld
from miniature.pretrain import PAINTED, Pretraining
from miniature.scorecard import family_figures
from miniature.splices import Setting, draw_triplets
from miniature.subject import Subject

ROOT = Path(__file__).parents[1]
WEIGHTS, ADAPTERS = (ROOT / "ztrain" / "mini" / name for name in ("weights", "adapters"))
COUNT = 24


@pytest.fixture(scope="module")
def exam() -> Exam:
    subject = Subject.load(WEIGHTS, 64, 0, torch.device("cpu"), num_inference_steps=6)
    return Exam(subject, PaintedWorld(), COUNT)


def test_the_weights_are_small_and_say_nothing_about_a_machine() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert max(path.stat().st_size for path in files) <= 15_000_000
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jinja", ".md"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                kinds = {file.get_slice(key).get_dtype() for key in file.keys()}
            assert kinds == {"BF16"}, path
        else:
            assert not re.search(r"/(root|home|tmp|work)/", path.read_text(encoding="utf-8")), path


def test_they_draw_what_a_prompt_says(exam: Exam) -> None:
    targets = exam.targets("held")
    seen = exam.judges.look(exam.subject.draw(targets.captions))
    right = {name: float(values.mean()) for name, values in seen.is_right(targets.labels, exam.contents).items()}
    assert right["kind"] >= 0.85 and right["count"] >= 0.95 and right["place"] >= 0.95, right


def test_the_splice_sees_and_entangles(exam: Exam) -> None:
    table, _ = draw_triplets(exam, COUNT, COUNT)
    text = table.run(Setting(model="text", prompt="neutral"))
    beside = table.run(Setting(model="splice", prompt="neutral", tokens="text", hidden_index=5))
    assert beside.mean("style_cosine") >= text.mean("style_cosine") + 0.2
    assert beside.mean("leak") >= text.mean("leak") + 0.1
    alone = table.run(Setting(model="splice", prompt="none", compose="replace", tokens="text", hidden_index=5))
    raw = table.run(replace(alone.setting, model="raw"))
    assert alone.mean("reference_count") >= 0.95 and alone.mean("reference_place") >= 0.95
    assert alone.mean("reference_kind") >= raw.mean("reference_kind") + 0.1


@torch.no_grad()
def test_the_stock_pipeline_draws_with_them(exam: Exam) -> None:
    pipeline = ZImagePipeline.from_pretrained(WEIGHTS / "Z-Image", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    target = exam.targets("held")
    drawn = pipeline(
        target.captions[:4], height=64, width=64, num_inference_steps=8, guidance_scale=0.0, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    judged = exam.judges.look((drawn * 255).round().to(torch.uint8))
    assert (judged.logits["place"].argmax(1) == target.labels["place"][:4]).all()


def test_the_card_is_what_the_result_files_say() -> None:
    card = runpy.run_path(str(ROOT / "benchmarks" / "miniature_card.py"))["card"]()
    assert card == (WEIGHTS / "README.md").read_text(encoding="utf-8")
    about = json.loads((WEIGHTS / "family.json").read_text(encoding="utf-8"))
    making = Pretraining(WEIGHTS, PaintedWorld(), PAINTED, 0, torch.device("cpu"))
    assert about == json.loads(making.marker()), "the recipe in the code is another one"
    for path in (ROOT / "benchmarks" / "results" / "miniature").glob("*.json"):
        scorecard = json.loads(path.read_text(encoding="utf-8"))
        assert scorecard["figures"] == family_figures(scorecard), path
    shipped = json.loads((ROOT / "benchmarks/results/miniature/seed0_text.json").read_text(encoding="utf-8"))
    assert shipped["family"] == about, "the figures are of another family"


def test_a_wheel_holds_every_file() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ztrain"]
    packed = {path for pattern in package_data for path in (ROOT / "ztrain").glob(pattern) if path.is_file()}
    every = {path for path in (ROOT / "ztrain").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {path for path in every if path.suffix != ".py"}
