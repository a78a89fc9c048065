"""docs/reliability.md: every promise has its tests, and every test that it names exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    missing = []
    for file, name in sorted(set(named)):
        path = ROOT / "tests" / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree)):
            missing.append(f"{file}::{name}")
    assert not missing and "| ? |" not in PAGE


def test_the_promises_are_counted_and_readme_leads_to_them() -> None:
    assert re.findall(r"^\| (\d+) \|", PAGE, flags=re.MULTILINE) == [str(number) for number in range(1, 28)]
    assert "](docs/reliability.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
