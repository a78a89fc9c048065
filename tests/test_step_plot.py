"""benchmarks/step_plot.py: all that a result holds is in its figure, and the same figure comes twice."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import step, step_plot

ROWS: list[dict[str, Any]] = [
    {"case": "lora_1024_b1", "way": "diffusers", "ms": 540.12, "peak_gib": 31.24, "mfu": 0.31, "hfu": 0.4},
    {"case": "lora_1024_b1", "way": "ztrain", "ms": 312.4, "peak_gib": 28.5, "mfu": 0.53597, "ratio": 0.58},
    {"case": "a<b & $c$_\"d\"", "way": "ztrain", "ms": 55.54, "peak_gib": None, "mfu": None, "slow_because": None},
    {"case": "a<b & $c$_\"d\"", "way": "next & best", "ms": None},
]  # fmt: skip


def written(folder: Path, document: Any) -> Path:
    path = folder / "step_some_gpu.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_a_figure_names_every_case_and_is_the_same_twice(tmp_path: Path) -> None:
    path = written(tmp_path, {"machine": {"device": "some GPU"}, "rows": ROWS})
    assert step_plot.main([str(path)]) == 0
    picture = path.with_suffix(".svg")
    first = picture.read_bytes()
    texts = {element.text for element in ElementTree.fromstring(first).iter("{http://www.w3.org/2000/svg}text")}
    assert {row[key] for row in ROWS for key in ("case", "way")} <= texts
    assert {"540 ms, 31.2 GiB", "312 ms, 28.5 GiB", "55.5 ms", "no result"} <= texts
    assert any("some GPU" in text for text in texts if text)
    # Another process: what hashes or the clock would change, changes there.
    subprocess.run([sys.executable, "-m", "benchmarks.step_plot", str(path)], check=True, capture_output=True)
    assert picture.read_bytes() == first


def test_the_ceiling_is_marked_only_where_it_is_known(tmp_path: Path) -> None:
    known, unknown = tmp_path / "known.svg", tmp_path / "unknown.svg"
    step_plot.draw(known, {"rows": ROWS})
    step_plot.draw(unknown, {"rows": [row | {"mfu": None} for row in ROWS]})
    assert "measured ceiling" in known.read_text(encoding="utf-8")
    assert "measured ceiling" not in unknown.read_text(encoding="utf-8")


def test_every_way_of_the_benchmark_has_its_colour() -> None:
    assert list(step_plot.COLOURS) == list(step.WAYS)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"machine": {}}, "no rows"),
        ({"rows": []}, "no rows"),
        ([1], "no rows"),
        ({"rows": [{"case": "a", "ms": 1.0}]}, "row 0 lacks way"),
        ({"rows": [{"case": "a", "way": "ztrain", "ms": None}]}, "no times"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_sentence(
    document: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, document)
    assert step_plot.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and str(path) in error and error.count("\n") == 1
    assert not path.with_suffix(".svg").exists()


def test_a_file_that_is_no_result_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step_plot.main([str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
