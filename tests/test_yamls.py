"""YAML as people write it: what is read, what is refused, and the words for what pydantic finds wrong."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztrain.errors import InputError
from ztrain.yamls import describe_errors, dump_yaml, load_yaml

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
tricky = st.sampled_from(
    ["1e4", "1e-4", "-.5E3", "1.e5", ".5e-3", "1:30", "no", "~", "<<", "=", "2026-01-01", "0x1", ""]
)
values = st.recursive(
    scalars | tricky,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | tricky, inner, max_size=3),
)


@given(st.dictionaries(st.text() | tricky, values, max_size=4))
@settings(max_examples=100, deadline=None)
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump_yaml(document), encoding="utf-8")
    loaded = load_yaml(path)
    assert loaded == document and repr(loaded) == repr(document)  # repr: 1, 1.0 and True are equal


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=100, deadline=None)
def test_yaml_floats_as_python_writes_them(tmp_path_factory: pytest.TempPathFactory, number: float) -> None:
    path = tmp_path_factory.getbasetemp() / "float.yaml"
    path.write_text(f"a: {number!r}\nb: {number:e}\nc: {number:.17E}\n")
    assert load_yaml(path) == {"a": number, "b": float(f"{number:e}"), "c": number}
    assert all(type(value) is float for value in load_yaml(path).values())


def test_yaml_scalars_that_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('a: 1e-4\nb: 5e6\nc: "1e-4"\nd: 12\ne: e5\nf: 1e\ng: +2E+3\n')
    loaded = load_yaml(tmp_path / "a.yaml")
    assert loaded == {"a": 0.0001, "b": 5e6, "c": "1e-4", "d": 12, "e": "e5", "f": "1e", "g": 2000.0}
    assert type(loaded["d"]) is int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "a.yaml:3: the key 'a' stands twice"),
        ("x:\n  - {b: 1, c: 2, b: 1}\n", "a.yaml:2: the key 'b' stands twice"),
        ("a: 1\n'a': 2\n", "a.yaml:2: the key 'a' stands twice"),
        ("a: [1\nb: 2\n", "a.yaml:2: while parsing a flow sequence"),
        ("a:\n\t- 1\n", "a.yaml:2: "),
        ("a: !!python/object/apply:os.getcwd []\n", "a.yaml:1: could not determine a constructor"),
        ("a: *b\n", "a.yaml:1: found undefined alias"),
        ("? [1]\n: 2\n", "a.yaml:1: "),
        ("- 1\n", "a.yaml: must hold a mapping of keys to values, but holds a list"),
        ("# nothing\n", "but holds nothing"),
        ("a: 1\n---\nb: 1\n", "a.yaml:2: "),
        ("a: 2026-13-45\n", "a.yaml: not readable as YAML (month must be"),
        ("a: \x07\n", "a.yaml: not readable as YAML"),
        ("[" * 5000, "a.yaml: not readable as YAML"),
    ],
)
def test_yaml_mistakes_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_yaml(tmp_path / "a.yaml")
    assert f"{tmp_path}/a.yaml" in str(caught.value) and message in str(caught.value)


def test_yaml_merge_may_override(tmp_path: Path) -> None:
    text = "deep: {er: &mid {<<: &base {x: 1, y: 1}, x: 2}}\ntop: {<<: *mid, x: 3}\nlow: {<<: *base, y: 4}\n"
    (tmp_path / "a.yaml").write_text(text)
    loaded = load_yaml(tmp_path / "a.yaml")
    assert loaded["top"] == {"x": 3, "y": 1} and loaded["low"] == {"x": 1, "y": 4}


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Lora(Strict):
    kind: Literal["lora"] = "lora"
    rank: int = 8


class Projector(Strict):
    kind: Literal["projector"] = "projector"
    width: int = 8


class Train(Strict):
    learning_rate: float = pydantic.Field(default=1e-4, gt=0)


class Whole(Strict):
    train: Train
    adapters: list[Annotated[Lora | Projector, pydantic.Field(discriminator="kind")]] = []
    names: dict[str, Train] | None = None
    note: str | None = None

    @pydantic.model_validator(mode="after")
    def _note_is_kind(self) -> "Whole":
        if self.note == "rude":
            raise ValueError("note must be kind")
        return self


@pytest.mark.parametrize(
    ("given_values", "lines"),
    [
        ({"train": {"lrr": 3}}, ["c.yaml: train.lrr: unknown key (got 3); did you mean learning_rate?"]),
        ({"train": {"qqqq": 3}}, ["c.yaml: train.qqqq: unknown key (got 3); known keys: learning_rate"]),
        (
            {"train": {"learning_rate": 0.0}},
            ["c.yaml: train.learning_rate: Input should be greater than 0 (got 0.0)"],
        ),
        ({}, ["c.yaml: train: is missing; give it a value"]),
        (
            {"train": {}, "adapters": [{"kind": "lora"}, {"kind": "lora", "rankk": 1, "rank": "x"}]},
            [
                "c.yaml: adapters.1.rank: Input should be a valid integer (got 'x')",
                "c.yaml: adapters.1.rankk: unknown key (got 1); did you mean rank?",
            ],
        ),
        (
            {"train": {}, "names": {"a": {"rate": 1}}},
            ["names.a.rate: unknown key (got 1); did you mean learning_rate?"],
        ),
        ({"train": {}, "note": "rude"}, ["c.yaml: note must be kind"]),
        ({"train": {}, "note": ["x" * 200]}, ["c.yaml: note: Input should be a valid string (got ['xxx"]),
    ],
)
def test_validation_errors_in_words(given_values: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Whole.model_validate(given_values)
    described = describe_errors(caught.value, source="c.yaml", model=Whole).splitlines()
    assert len(described) == len(lines)
    assert all(part in whole and len(whole) < 160 for part, whole in zip(lines, described, strict=True))
    without_model = describe_errors(caught.value, source="c.yaml").splitlines()
    assert len(without_model) == len(lines) and not any("did you mean" in line for line in without_model)
