"""docs/findings: every page's table is its result file's, every figure in its words too, and its command is real."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from benchmarks import compare_miniature, findings, guidance, real_drawings
from benchmarks.findings_book import BOOK
from benchmarks.pages import MARKS, PAGES, RESULTS, ROOT

TABLES: dict[str, Callable[[Any], str]] = dict.fromkeys(BOOK, findings.table) | {
    real_drawings.NAME: real_drawings.table,
    guidance.NAME: guidance.table,
    "layer_spectrum": compare_miniature.layers_table,
}
COMMANDS = {name: f"python -m benchmarks.findings {name}" for name in BOOK} | {
    real_drawings.NAME: "python -m benchmarks.real_drawings --family",
    guidance.NAME: "python -m benchmarks.guidance",
    "layer_spectrum": "python -m benchmarks.compare_miniature",
    "diversity": "python -m benchmarks.diversity` of commit 71e0d4f",
}


def _read(name: str) -> tuple[str, str, Any]:
    """Words and table of a page, and its result."""
    before, rest = (PAGES / f"{name}.md").read_text(encoding="utf-8").split(MARKS[0])
    table, after = rest.split(MARKS[1])
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return before + after, table.strip(), result


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_of_the_committed_result(name: str) -> None:
    _, table, result = _read(name)
    assert table == TABLES[name](result), f"run: {COMMANDS[name]}"


def test_the_comparison_of_the_shipped_adapters_is_the_committed_result() -> None:
    page = (ROOT / "docs/compare.md").read_text(encoding="utf-8").split(MARKS[0])[1].split(MARKS[1])[0]
    result = json.loads(compare_miniature.LISTS.read_text(encoding="utf-8"))
    assert page.strip() == compare_miniature.lists_table(result), "run: python -m benchmarks.compare_miniature"
    assert result["num_rows"] == 64 and result["num_seeds"] == 2
    assert {column["role"] for column in result["columns"]} >= {"none", "splice", "adapter", "control"}


@pytest.mark.parametrize("name", COMMANDS)
def test_figures_in_words_are_in_the_table(name: str) -> None:
    words, table, _ = _read(name)
    figure = r"(?<![\d.])\d\.\d+(?!\.?\d)"  # without its sign, and no version, which has three parts
    guessed = {"0.125"}  # one style of eight
    assert set(re.findall(figure, words)) <= set(re.findall(figure, table)) | guessed


@pytest.mark.parametrize("name", BOOK)
def test_findings_rest_on_enough(name: str) -> None:
    _, _, result = _read(name)
    assert result["triplets"] >= 256 and len(result["plan"]["seeds"]) >= 3
    assert [row["name"] for row in result["rows"]] == list(BOOK[name].rows)
    assert [row["label"] for row in result["rows"]] == list(BOOK[name].rows.values())
    plan = findings.PLAN
    assert (result["plan"]["steps"], result["plan"]["batch"]) == (plan.steps, plan.batch)


def test_every_page_has_its_pictures_and_its_command_and_is_in_the_index() -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in PAGES.glob("*.md")} == {*COMMANDS, "README"}
    shown = set()
    for name in COMMANDS:
        words, _, _ = _read(name)
        assert f"({name}.md)" in index
        assert COMMANDS[name] in words
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", words):
            Image.open(PAGES / picture).verify()
            shown.add(picture)
    assert shown == {path.name for path in PAGES.iterdir() if path.suffix != ".md"}
    assert "python -m benchmarks.findings --jobs" in index
