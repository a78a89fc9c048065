"""The purpose of it all, for a few dozen steps: training the default list makes it look at the reference."""

import json
from pathlib import Path

import pytest

from data_tools.build import main as build
from miniature.style_folders import paint_many_styles
from tests.test_main_path import run
from ztrain.demo import BUILD_CONFIG, CONFIGS, DEFAULT

STEPS = 96


@pytest.mark.slow
@pytest.mark.usefixtures("forge")
def test_the_right_reference_lowers_the_loss_after_a_few_dozen_steps(tmp_path: Path) -> None:
    paint_many_styles(tmp_path / "paintings", {"train": (60, 6), "val": (24, 2), "test": (2, 2)})
    (tmp_path / "paintings" / "build.yaml").write_text(BUILD_CONFIG)
    out = tmp_path / "triplets"
    assert build(["--config", str(tmp_path / "paintings" / "build.yaml"), "--out", str(out)]) == 0
    words = (
        *("--config", str(CONFIGS / f"{DEFAULT}.yaml"), str(CONFIGS / "miniature.yaml")),
        *("--data.train_data_dir", str(out), "--output_dir", str(tmp_path / "run")),
        *("--cache.dir", str(tmp_path / "cache"), "--train.max_train_steps", str(STEPS)),
        *("--validation.validation_steps", str(STEPS), "--validation.num_samples", "48"),
        *("--validation.preview_steps", "0"),
    )
    for command in (("ztrain.cli", "cache"), ("ztrain.train",)):
        run(*command, *words)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row for row in rows if "val/loss" in row)
    assert after["val/image_use_low"] > 0, "the loss with the right reference is not below that with a shuffled one"
    assert before["val/image_use_low"] < 0, "it was so before training: the test cannot fail"
