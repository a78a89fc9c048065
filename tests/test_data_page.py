"""docs/data.md: its commands run as they stand, on painted pictures and the miniature under the real models' names."""

import json
import re
import shutil
from pathlib import Path

import pytest

from miniature.style_folders import paint_style_folders
from miniature.trials import WEIGHTS
from tests.test_main_path import ROOT, hub_cache, named_files, shell
from ztrain.data.reading import read_triplets

PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.usefixtures("forge")


def commands(heading: str) -> list[str]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.S)


def prepared(tmp_path: Path) -> Path:
    """A project folder with style folders of pictures, and the models of the page as downloads."""
    paint_style_folders(tmp_path / "painted", size=64, num_contents=24)
    (tmp_path / "project").mkdir()
    for style in ("style1", "style2", "style3"):
        shutil.copytree(tmp_path / "painted/images" / style, tmp_path / "project/pictures" / style)
    hub_cache(WEIGHTS, tmp_path / "hf")
    return tmp_path / "project"


def test_three_commands_from_a_folder_of_pictures_to_a_packed_data_set(tmp_path: Path) -> None:
    """As written, but for the question: the miniature understands one only."""
    project = prepared(tmp_path)
    [(name, text)] = [each for each in named_files(PAGE).items() if each[0] == "my_pictures.yaml"]
    model = "  - model: Qwen/Qwen3-VL-4B-Instruct"
    assert model in text
    (project / "drawn.txt").write_text("what is drawn?")
    small = "\n    template: drawn.txt\n    precision: float32\n    max_new_tokens: 24"
    (project / name).write_text(text.replace(text[text.index(model) :].split("\n")[0], model + small))
    [block] = commands("From a folder of pictures, in three commands")
    lines = block.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("python -m data_tools.") for line in lines)
    said = shell(tmp_path, block, HF_HOME=str(tmp_path / "hf"))
    found = {
        split: read_triplets(str(project / "out/mine_parquet"), split).triplets for split in ("train", "validation")
    }
    assert len(found["train"]) > 50 and len(found["validation"]) >= 6, said.stdout
    right = [str(row.columns["content"]).split("-")[0] in row.prompt for of_split in found.values() for row in of_split]
    print(f"prompts with the right kind: {sum(right)} of {len(right)}")
    assert sum(right) > 0.7 * len(right)
    manifest = json.loads((project / "out/mine/manifest.json").read_text())
    assert manifest["shared"]["train and validation"] == {"pictures": 0, "copies": 0, "contents": 0, "styles": 3}
    page = (project / "out/mine.html").read_text(encoding="utf-8")
    assert manifest["fingerprint"] in page and str(tmp_path) not in page


def test_captions_and_renderings_run_as_written(tmp_path: Path) -> None:
    project = prepared(tmp_path)
    scanned = "python -m data_tools.scan --sources pictures --out work/scan\n"
    scanned += "python -m data_tools.dedup --table work/scan --out work/dedup\n"
    asks = next(block for block in commands("Look at your pictures first") if "data_tools.caption" in block)
    [renders] = commands("Render pairs")
    (project / "styles.csv").write_text('id,prompt\nplain,"{content}"\nblue,"{content} on blue"\n')
    (project / "contents.csv").write_text("id,prompt,split\nstar,a star,train\ncat,a cat,train\n")
    little = " --precision float32 --max-new-tokens 2 --max-fault-share 1\n", " --height 64 --width 64 --steps 1\n"
    both = scanned + asks.rstrip() + little[0] + renders.rstrip() + little[1]
    shell(tmp_path, both, HF_HOME=str(tmp_path / "hf"))
    assert (project / "work/caption/table.json").is_file()
    assert len(list((project / "out/rendered/images").rglob("*.png"))) == 4
