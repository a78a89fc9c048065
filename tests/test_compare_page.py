"""docs/compare.md: its commands run as they stand, with miniature and tiny models behind the names of its files."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from miniature.style_folders import paint_style_folders
from tests.forge import the_forge
from tests.test_features import csd, csd_weights, tiny_siglip
from tests.test_judging import tiny_dino
from tests.test_main_path import ROOT, merged, named_files
from ztrain.compare.record import read_comparison

PAGE = (ROOT / "docs/compare.md").read_text(encoding="utf-8")
PROGRAMS = {"ztrain": ["ztrain.cli"], "python": []}

pytestmark = pytest.mark.usefixtures("forge")


def blocks(heading: str) -> list[str]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.S)


def run(project: Path, block: str) -> None:
    """Every line of a block, in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for line in block.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        words = words[1:] if program == "python" else words  # -m
        done = the_forge().run([*PROGRAMS[program], *words], environment, project)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


def prepared(tmp_path: Path) -> Path:
    """A user's folder: pictures, the page's files, and models in the place of those that they name."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("configs", "miniature", "ztrain"):
        (project / name).symlink_to(ROOT / name)
    files = {name: yaml.safe_load(text) for name, text in named_files(PAGE).items()}
    assert set(files) == {"judges.yaml", "axes.yaml"}
    models = {"siglip": tiny_siglip(tmp_path / "siglip", "fixed"), "dino": tiny_dino(tmp_path / "dino"),
              "style": csd(tmp_path / "csd", csd_weights())}  # fmt: skip
    for name, place in models.items():
        files["judges.yaml"]["judges"][name]["pretrained_model_name_or_path"] = str(place)
    axes = files["axes.yaml"]["sweep"]["axes"]
    assert axes["encoders.hidden_index"] == [24, 30, 35]
    axes["encoders.hidden_index"] = [4, 5]  # of 6
    small = yaml.safe_load((ROOT / "configs/miniature.yaml").read_text())
    del small["judges"]
    own = {
        "data": {"train_data_dir": "out/mine"},
        "sample": {"num_inference_steps": 1, "guidance_scale": 0},
        "train": {"max_train_steps": 2, "checkpointing_steps": 1, "train_batch_size": 2},
        "validation": {"validation_steps": 0, "preview_steps": 0},
    }
    files["my.yaml"] = merged(small, own)
    files["my_data.yaml"] = {"sources": ["images"], "label": {"styles": {"contents": "contents.csv"}}}
    for name, content in files.items():
        (project / name).write_text(yaml.safe_dump(content))
    paint_style_folders(tmp_path / "painted", size=64, num_contents=12)
    shutil.copytree(tmp_path / "painted/images", project / "images")
    shutil.copy(tmp_path / "painted/contents.csv", project / "contents.csv")
    (project / "looks").mkdir()
    for number, path in enumerate(sorted((project / "images").rglob("*.png"))[:24:12]):
        shutil.copy(path, project / f"looks/{number}.png")
    (project / "prompts.txt").write_text("two stars on the left\none fish in the middle\n")
    return project


def test_the_page_runs_as_written(tmp_path: Path) -> None:
    project = prepared(tmp_path)
    run(project, "python -m data_tools.build --config my_data.yaml --out out/mine --pair.max-triplets-per-split 4")
    for name in ("siglip", "projector"):
        run(project, f"python -m ztrain.train --config configs/{name}.yaml my.yaml --output_dir runs/{name}")
    headings = (
        "Compare adapters",
        "Find the splice's best setting",
        "Which checkpoint?",
        "The page, and asking people",
    )
    found = []
    for block in [block for heading in headings for block in blocks(heading)]:
        run(project, block)
        found.append(read_comparison(project / "out/compare"))
    assert [c.label for c in found[0].columns] == [
        "no image", "splice", "[siglip]", "[projector]", "splice, shuffled", "[siglip], shuffled",
        "[projector], shuffled",
    ]  # fmt: skip
    assert found[0].style is None and "judges" in found[0].best.found
    assert len(found[1].rows) == 4 and found[1].data == {"prompts": "prompts.txt", "references": "looks"}
    assert (found[2].style, found[2].adherence) == ("style_likeness", "adherence")
    assert [c.label for c in found[2].columns] == ["no image", "splice", "best splice", "[siglip]"]
    sweep = read_comparison(project / "out/sweep")
    assert len(sweep.columns) == 2 + 2 * 2 * 3 and sweep.best.column is not None
    assert [c.label for c in found[3].columns] == ["no image", "splice", "step 1", "step 2"]
    assert json.loads((project / "runs/siglip/best.json").read_text())["rule"].startswith("The largest Style")
    written = [project / name for name in ("out/compare/report.html", "runs/siglip/report.html", "blind.html")]
    for path in written:
        page = path.read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>") and str(tmp_path) not in page
