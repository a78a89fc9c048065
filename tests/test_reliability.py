"""docs/reliability.md: every promise has its tests, and every test that it names exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE)
    missing = []
    for file, name in sorted(set(named)):
        path = ROOT / "tests" / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        machines = {ast.unparse(node.targets[0]) for node in ast.walk(tree) if isinstance(node, ast.Assign)}
        if name not in functions | machines:
            missing.append(f"{file}::{name}")
    assert not missing and "| ? |" not in PAGE


def test_the_promises_are_counted_and_readme_leads_to_them() -> None:
    assert re.findall(r"^\| (\d+) \|", PAGE, flags=re.MULTILINE) == [str(number) for number in range(1, 28)]
    assert "](docs/reliability.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
