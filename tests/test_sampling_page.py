"""docs/sampling.md: its commands run as they stand on the miniature, and its tables are true."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.pages import MARKS, RESULTS
from benchmarks.sample_memory import table
from tests.test_main_path import ROOT, named_files
from tests.test_parity import picture
from ztrain.cli import main
from ztrain.config import SampleConfig, load_config
from ztrain.sampling.aspects import ASPECTS, size_of

PAGE = (ROOT / "docs/sampling.md").read_text(encoding="utf-8")
SIZES = {"star.png": (64, 64), "both.png": (64, 64), "coherent.png": (64, 64), "windows.png": (64, 64),
         "small.png": (64, 64), "many/prompt2-16x9-seed1.png": (80, 48)}  # fmt: skip


def test_every_command_draws_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a project with the pictures that it names; two steps for twelve, and no guidance unless a line has it."""
    for name in ("configs", "miniature", "ztrain"):
        (tmp_path / name).symlink_to(ROOT / name)
    for seed, name in enumerate(("reference.png", "other.png", "collage.png")):
        picture(seed, 96, 64).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in
             block.replace("\\\n", " ").strip().splitlines()]  # fmt: skip
    for line in lines:
        program, *words = shlex.split(line)
        few = ["--sample.num_inference_steps", "2"]
        few += [] if "--sample.guidance_scale" in words else ["--sample.guidance_scale", "0"]
        assert program == "ztrain" and main([*words, *few]) == 0, line
    assert len(lines) == len(SIZES)
    for name, size in SIZES.items():
        with Image.open(Path("out") / name) as image:
            assert image.size == size, name
    assert len(os.listdir("out/many")) == 2 * 3 * 2 + 2


def test_the_memory_table_is_the_committed_result() -> None:
    result = json.loads((RESULTS.parent / "sample_memory_nvidia_h200.json").read_text(encoding="utf-8"))
    assert PAGE.split(MARKS[0])[1].split(MARKS[1])[0].strip() == table(result), "run: benchmarks.sample_memory --page"


def test_the_aspects_and_keys_of_the_page_are_those_there_are() -> None:
    told = dict(re.findall(r"\| (\d+:\d+) \| (\d+ x \d+) ", PAGE))
    told |= dict(re.findall(r"\| (\d+:\d+) \| (\d+ x \d+) \|$", PAGE, re.M))
    assert told == {aspect: "{1} x {0}".format(*size_of(aspect, 1024)) for aspect in ASPECTS}
    keys = re.findall(r"^\| `(\w+)` \|", PAGE, re.M)
    assert len(keys) == 8 and set(keys) <= set(SampleConfig.model_fields)


def test_the_file_of_the_page_is_an_experiment(tmp_path: Path) -> None:
    [(name, text)] = named_files(PAGE).items()
    (tmp_path / name).write_text(text)
    assert load_config([tmp_path / name]).models.transformer_file == "z_image_turbo-Q4_K_M.gguf"
