"""Where result files and pages lie, and how a table gets into a page: between two marks, never by hand."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
RESULTS, PAGES = ROOT / "benchmarks" / "results" / "findings", ROOT / "docs" / "findings"
MARKS = ("<!-- a command writes this -->", "<!-- to here -->")


def cell(figure: Mapping[str, float]) -> str:
    """A figure with its interval."""
    mean, low, high = (f"{figure[name]:z.2f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def devices(machines: Sequence[Mapping[str, Any]]) -> str:
    """Machines in words."""
    return " and ".join(dict.fromkeys(f"{told['device']} (torch {told['torch']})" for told in machines))


def write_page(page: Path, table: str, marks: tuple[str, str] = MARKS) -> None:
    """Puts a table into a page, where the page is there. Raises SystemExit where it has no place for it."""
    if not page.is_file():
        return
    text, between = page.read_text(encoding="utf-8"), f"{re.escape(marks[0])}.*?{re.escape(marks[1])}"
    if not re.search(between, text, flags=re.DOTALL):
        raise SystemExit(f"{page.name} has no place for the table: put {marks[0]} and, below it, {marks[1]} there")
    marked = f"{marks[0]}\n{table}\n{marks[1]}"
    page.write_text(re.sub(between, lambda _: marked, text, count=1, flags=re.DOTALL), encoding="utf-8")


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Saves a contact sheet as WebP, a tenth of a PNG's bytes; a palette would change colours, and they are style."""
    sheet.save(path, quality=90, method=6)
