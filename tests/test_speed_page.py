"""docs/speed.md: its tables and picture are of the committed results, and figures in its words are true."""

import json
import re
from pathlib import Path

from benchmarks import speed_page, step, step_plot
from benchmarks.pages import MARKS

PAGE = speed_page.DOCS / "speed.md"


def test_tables_and_picture_are_of_the_committed_results(tmp_path: Path) -> None:
    _, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    table, _ = rest.split(MARKS[1])
    assert table.strip() == speed_page.tables(speed_page.RESULTS), "run: python -m benchmarks.speed_page"
    step_plot.draw(tmp_path / "speed.svg", step_plot.read(speed_page.RESULTS / "step_nvidia_h200.json"))
    assert (speed_page.DOCS / "speed.svg").read_bytes() == (tmp_path / "speed.svg").read_bytes()


def test_every_case_has_its_words() -> None:
    assert list(speed_page.CASES) == [*step.CASES, *step.MINIATURE_CASES]


def test_figures_in_the_readme_are_of_the_committed_results() -> None:
    rows = json.loads((speed_page.RESULTS / "step_nvidia_h200.json").read_text(encoding="utf-8"))["rows"]
    measured = {row["way"]: f"{row['ms']:.0f}" for row in rows if row["case"] == "lora_1024_b1_24gib"}
    readme = " ".join((speed_page.ROOT / "README.md").read_text(encoding="utf-8").split())
    told = re.search(r"inside 24 GiB a step at .* an H200 (\d+) ms,.* take (\d+) ms .* (\d+) ms compiled", readme)
    assert told and told.groups() == tuple(measured[way] for way in ("ztrain", "diffusers", "diffusers_compiled"))
