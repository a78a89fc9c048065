"""docs/speed.md and docs/data.md: tables and pictures are of the committed results, figures in words are true."""

import json
import re
from pathlib import Path

from benchmarks import data_page, speed_page, step
from benchmarks.pages import MARKS


def test_tables_and_picture_are_of_the_committed_results(tmp_path: Path) -> None:
    (tmp_path / "speed.md").write_text(_emptied((speed_page.DOCS / "speed.md").read_text("utf-8")), "utf-8")
    speed_page.main(tmp_path)
    for name in ("speed.md", "speed.svg", "cost.svg"):
        same = (tmp_path / name).read_bytes() == (speed_page.DOCS / name).read_bytes()
        assert same, "run: python -m benchmarks.speed_page"


def test_the_tables_of_the_data_page_are_too(tmp_path: Path) -> None:
    (tmp_path / "data.md").write_text(_emptied((data_page.DOCS / "data.md").read_text("utf-8")), "utf-8")
    data_page.main(tmp_path)
    same = (tmp_path / "data.md").read_bytes() == (data_page.DOCS / "data.md").read_bytes()
    assert same, "run: python -m benchmarks.data_page"


def _emptied(page: str) -> str:
    """Without what the command writes."""
    before, rest = page.split(MARKS[0])
    return before + MARKS[0] + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


def test_every_case_has_its_words() -> None:
    assert list(speed_page.CASES) == [*step.CASES, *step.MINIATURE_CASES]


def test_the_page_says_how_well_time_follows_flops() -> None:
    rows = json.loads((speed_page.RESULTS / "cost_nvidia_h200.json").read_text(encoding="utf-8"))["sweep"]
    farthest = max(abs(row["over_model"] - 1) for row in rows if row["side"] >= 1024)
    page = (speed_page.DOCS / "speed.md").read_text(encoding="utf-8")
    told = re.search(r"at a megapixel and more all within (\d+) % of one rate", page)
    assert told and farthest <= float(told[1]) / 100 < farthest + 0.01


def test_figures_in_the_readme_are_of_the_committed_results() -> None:
    rows = json.loads((speed_page.RESULTS / "step_nvidia_h200.json").read_text(encoding="utf-8"))["rows"]
    measured = {row["way"]: f"{row['ms']:.0f}" for row in rows if row["case"] == "lora_1024_b1_24gib"}
    readme = " ".join((speed_page.ROOT / "README.md").read_text(encoding="utf-8").split())
    told = re.search(r"inside 24 GiB a step at .* an H200 (\d+) ms,.* take (\d+) ms .* (\d+) ms compiled", readme)
    assert told and told.groups() == tuple(measured[way] for way in ("ztrain", "diffusers", "diffusers_compiled"))
