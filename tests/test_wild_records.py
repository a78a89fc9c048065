"""`ztrain report` on damaged and foreign records: a page that counts what it leaves out, or one sentence."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.comparisons import make_comparison, make_run, make_sweep
from tests.test_inspect import Page
from ztrain.compare.record import FILE_NAME, Choice, read_best, write_best
from ztrain.compare.report.charts import Series, line_chart, scale_of
from ztrain.compare.report.page import make_report
from ztrain.errors import InputError

_DEEP = "[" * 60 + "]" * 60
WILD = ["1e308", "-1e308", "1e400", "-1e400", "NaN", "-Infinity", "9" * 400, "9" * 5000, "1e-320", "5e-324"]
ODD = ['"a\\u0000b"', '"\\ud800"', '"\\u001b[2J\\u202e"', "[]", "{}", "null", "true", "-1", "0.5", '""', _DEEP]
YAML = [
    ".inf",
    "-.nan",
    "1e400",
    "9" * 400,
    '"a\\0b"',
    '"\\uD800"',
    "2020-01-01",
    "!!binary aGk=",
    "{1: 2}",
    "[]",
    "null",
]
_HOLE = "@@hole@@"


def leaves(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all values of JSON that hold no others, of lists the first two."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, (*at, key))
    elif isinstance(node, list) and node:
        for place, value in enumerate(node[:2]):
            yield from leaves(value, (*at, place))
    else:
        yield at


def with_hole(document: Any, place: tuple[Any, ...]) -> Any:
    document = json.loads(json.dumps(document))
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = _HOLE
    return document


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    make_comparison(folder / "set", rows=2, seeds=1)
    make_sweep(folder / "sweep", rows=1)
    run = make_run(folder / "run", steps=100, previews=(0, 100))
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:3] + rows[-1:]))
    write_best(run, Choice(column=1, rule="Most style.", found="step 100: 0.4."), 100, {"100": [0.4, 1.0]}, "digest")
    return folder


FILES = ["set/comparison.json", "sweep/comparison.json", "run/metrics.jsonl", "run/best.json", "run/env.json",
         "run/config.yaml", "run/samples/base/key.json"]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FILES), st.integers(0, 10**6), st.data())
def test_any_value_in_the_place_of_any_other_is_a_page_or_one_sentence(
    records: Path, name: str, chosen: int, data: st.DataObject
) -> None:
    file = records / name
    whole = file.read_text()
    if file.suffix == ".yaml":
        documents, values = [yaml.safe_load(whole)], YAML
    else:
        documents = [json.loads(line) for line in (whole.splitlines() if file.suffix == ".jsonl" else [whole])]
        values = WILD + ODD
    number, place = (places := [(n, at) for n, each in enumerate(documents) for at in leaves(each)])[
        chosen % len(places)
    ]
    value = data.draw(st.sampled_from(values))
    documents[number] = with_hole(documents[number], place)
    texts = [yaml.safe_dump(each) if file.suffix == ".yaml" else json.dumps(each) for each in documents]
    try:
        file.write_text("".join(f"{text}\n" for text in texts).replace(f'"{_HOLE}"', value).replace(_HOLE, value))
        page = make_report(records / name.split("/")[0], records / "page.html").read_text()
    except InputError as error:
        at_fault = str(records / name.split("/")[0])  # the record, or a picture that it names
        assert str(error).startswith(at_fault), error
        return
    finally:
        file.write_text(whole)
    Page(page.encode())
    assert not re.search(r'(?:x|y|width|cx|d)="[^"]*(?:inf|nan)', page), "a chart has a number that is none"


def test_wild_numbers_of_a_run_are_counted_and_shown_as_missing(records: Path, tmp_path: Path) -> None:
    shutil.copytree(records / "run", tmp_path / "run")
    file = tmp_path / "run/metrics.jsonl"
    file.write_text('{"step": 1, "train/loss": 0.5, "train/grad_norm": 1e308}\n'
                    f'{{"step": 2, "train/loss": 1e400, "train/grad_norm": {"9" * 400}}}\n')  # fmt: skip
    (tmp_path / "run/env.json").write_text('{"device": "cpu", "memory": 1e400}')
    text = " ".join(Page(make_report(tmp_path / "run").read_bytes()).text.split())
    assert (
        "metrics.jsonl: 3 numbers are beyond 1e+100 and shown as missing, the first at line 1, train/grad_norm." in text
    )
    assert "env.json: 1 number is beyond 1e+100 and shown as missing, the first at memory." in text
    assert "Training loss" in text and "Gradient norm" not in text
    file.write_text('{"step": 1e400, "train/loss": 0.5}\n')
    with pytest.raises(InputError, match="metrics.jsonl:1: step is no number of a step"):
        make_report(tmp_path / "run")


def test_a_wild_number_of_a_comparison_is_named_by_its_key(records: Path, tmp_path: Path) -> None:
    text = (records / "set" / FILE_NAME).read_text()
    (tmp_path / FILE_NAME).write_text(re.sub(r'("seconds": )[\d.]+', r"\g<1>1e308", text))
    with pytest.raises(InputError, match=r"comparison.json: seconds is a number beyond 1e\+100"):
        make_report(tmp_path)


def test_a_damaged_mark_of_the_best_step_counts_for_nothing(tmp_path: Path) -> None:
    file = tmp_path / "best.json"
    whole = {"step": 2, "rule": "r", "found": "f", "steps": {"2": [0.5, None]}, "by": "digest"}
    file.write_text(json.dumps(whole))
    assert read_best(file, "digest") == {"2": [0.5, None]} and read_best(file, "other") == {}
    for steps in ('{"2": 5}', '{"x": [0.5, 1]}', '{"2": [1e400, 1]}', '{"2": ["0.5", 1]}', "[1]", _DEEP, '{"2": [1]}'):
        file.write_text(json.dumps(whole | {"steps": _HOLE}).replace(f'"{_HOLE}"', steps))
        assert read_best(file, "digest") == {}, steps


sizes = st.floats(-1e100, 1e100) | st.sampled_from([0.0, 5e-324, 1e-320, 1e-300, 1.0, 1.0 + 2e-16, 1e100, -1e100])


@settings(max_examples=300)
@given(st.lists(sizes, min_size=1, max_size=4), st.sampled_from([0.0, 0.02, 0.06, 0.5]), st.integers(2, 8))
def test_an_axis_holds_any_numbers(values: list[float], margin: float, count: int) -> None:
    scale = scale_of(values, 10.0, 110.0, margin=margin)
    assert all(9.9 <= scale(value) <= 110.1 for value in values)
    assert 1 <= len(scale.ticks(count)) <= count + 3
    line_chart("t", [Series(name="s", x=[float(i) for i in range(len(values))], y=values)], x_title="x")
