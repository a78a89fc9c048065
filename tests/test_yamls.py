"""YAML as people write it: what is read, what is refused, and the words for what pydantic finds wrong."""

import re
import tracemalloc
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ztrain.errors import InputError
from ztrain.io.yamls import PathText, describe_errors, dump_yaml, load_yaml

ROOT = Path(__file__).parents[1]
integers = st.integers(-(1 << 63), (1 << 63) - 1)
scalars = st.none() | st.booleans() | integers | st.floats(allow_nan=False) | st.text()
tricky = st.sampled_from(
    [
        "1e4",
        "1e-4",
        "-.5E3",
        "1.e5",
        ".5e-3",
        "1:30",
        "no",
        "~",
        "<<",
        "=",
        "2026-01-01",
        "0x1",
        "",
        "0o17",
        "0123",
        "089",
        "1_000",
        "0b1",
        "y",
        "on",
        ".inf",
        "+.5",
        "null",
        "TRUE",
        "-",
        "?",
        "- a",
        "a: b",
        "#",
        "*a",
        "&a",
        "!a",
    ]
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
    assert repr(yaml.safe_load(path.read_bytes())) == repr(document)  # and so do tools with the words of YAML 1.1


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=100, deadline=None)
def test_yaml_floats_as_python_writes_them(tmp_path_factory: pytest.TempPathFactory, number: float) -> None:
    path = tmp_path_factory.getbasetemp() / "float.yaml"
    path.write_text(f"a: {number!r}\nb: {number:e}\nc: {number:.17E}\n")
    assert load_yaml(path) == {"a": number, "b": float(f"{number:e}"), "c": number}
    assert all(type(value) is float for value in load_yaml(path).values())


def test_words_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    words = {
        **{word: word for word in ("16:9", "1:1", "12:30", "190:20:30", "no", "No", "off", "on", "yes", "y", "n")},
        **{word: word for word in ("1_000", "0b11", "2026-12-01", "2001-12-14t21:59:43.10-05:00", "2026-13-45", "=")},
        **{word: word for word in ("1.2.3", "1e", "0x", "nUll", "tRue", "..inf", "1__0", "0o8.", "0O17", "0o9")},
        **{"0123": 123, "-012": -12, "0o17": 15, "0x1F": 31, "+7": 7, "1.": 1.0, "+.5": 0.5, "-.INF": float("-inf")},
        **{"~": None, "Null": None, "": None, "TRUE": True, "false": False, "1e3": 1000.0, "6.": 6.0},
        **{"!!str 12": "12", "! 12": "12", "!!float 1": 1.0, "!!int '3'": 3, "'no'": "no"},
    }
    lines = [f"k{place}: {word}" for place, word in enumerate(words)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    loaded = load_yaml(tmp_path / "a.yaml")
    assert [repr(value) for value in loaded.values()] == [repr(value) for value in words.values()]


def test_yaml_scalars_that_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('a: 1e-4\nb: 5e6\nc: "1e-4"\nd: 12\ne: e5\nf: 1e\ng: +2E+3\n')
    loaded = load_yaml(tmp_path / "a.yaml")
    assert loaded == {"a": 0.0001, "b": 5e6, "c": "1e-4", "d": 12, "e": "e5", "f": "1e", "g": 2000.0}
    assert type(loaded["d"]) is int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "a.yaml:3: the key 'a' stands twice"),
        ("x:\n  - {b: 1, c: 2, b: 1}\n", "a.yaml:2: x.0: the key 'b' stands twice"),
        ("x: {<<: {}, <<: {}}\n", "a.yaml:1: x: the key '<<' stands twice"),
        ("a: 1\n'a': 2\n", "a.yaml:2: the key 'a' stands twice"),
        ("a: [1\nb: 2\n", "a.yaml:2: while parsing a flow sequence"),
        ("a:\n\t- 1\n", "a.yaml:2: "),
        ("a: !!python/object/apply:os.getcwd []\n", "a.yaml:1: a: the tag tag:yaml.org,2002:python/object/apply:os"),
        ("a: !!python/name:os.getcwd\n", "a.yaml:1: a: the tag"),
        ("a:\n  b: !!binary aGk=\n", "a.yaml:2: a.b: the tag tag:yaml.org,2002:binary of 'aGk=' is not read"),
        ("a: !!timestamp 2026-12-01\n", "a.yaml:1: a: the tag"),
        ("a: !!set {x, y}\n", "a.yaml:1: a: the tag"),
        ("a: !!int one\n", "a.yaml:1: a: the tag"),
        ("a: *b\n", "a.yaml:1: a: found undefined alias *b"),
        ("a: &a [*a]\n", "a.yaml:1: a.0: the alias *a is inside of what it stands for"),
        ("d: &a {x: *a}\n", "a.yaml:1: d.x: the alias *a is inside"),
        ("d: &a\n  <<: *a\n", "a.yaml:2: d.<<: the alias *a is inside"),
        ("a: {<<: 3}\n", "a.yaml:1: a: << takes a mapping"),
        ("? [1]\n: 2\n", "a.yaml:1: a key must be text"),
        ("a: &x y\n*x : 1\n", "a.yaml:2: a key must be text"),
        ("a: {1: x}\n", "a.yaml:1: a: the key '1' is a number, not text"),
        ("1.5: x\n", "the key '1.5' is a number"),
        ("~: x\n", "the key '~' is nothing"),
        ("true: x\n", "the key 'true' is a truth value"),
        ("!!binary aGk=: 1\n", "a.yaml:1: the tag tag:yaml.org,2002:binary"),
        ("!!int 2024: x\n", "the key '2024' is a number"),
        (f"seed: 0x{'f' * 5000}\n", "a.yaml:1: seed: the integer '0xfff"),
        (f"seed: {'9' * 5000}\n", "a.yaml:1: seed: the integer '999"),
        ("seed: -9223372036854775809\n", "is beyond 64 bits"),
        ('a: "\\ud800"\n', "a.yaml:1: a: an escape is half of a surrogate pair"),
        ('a: "\\Uffffffff"\n', "a.yaml: not readable as YAML"),
        ("a: " + "[" * 3000 + "\n", "a.yaml:1: a.0.0: lists and mappings lie more than 64 deep"),
        ("- " * 3000 + "\n", "more than 64 deep"),
        ("\n".join(" " * i + "a:" for i in range(100)), "a.yaml:66: a.a.a: lists and mappings lie more than 64 deep"),
        ("a: &a [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1 if i else ''}]\n" for i in range(99)), "64 deep"),
        ("- 1\n", "a.yaml: must hold a mapping of keys to values, but holds a list"),
        ("# nothing\n", "but holds nothing"),
        ("a: 1\n---\nb: 1\n", "a.yaml:2: "),
        ("a: \x07\n", "a.yaml: not readable as YAML"),
        ("[" * 5000, "a.yaml:1: 0.0.0: lists and mappings lie more than 64 deep"),
        ("\n" * (1 << 20) + "a: 1", "more than the 1,048,576 that a config may have"),
    ],
)
def test_yaml_mistakes_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_yaml(tmp_path / "a.yaml")
    assert f"{tmp_path}/a.yaml" in str(caught.value) and message in str(caught.value)


def laughs(levels: int, each: str) -> str:
    """Each line nine times the one before."""
    lines = [f"a0: &a0 [{', '.join([each] * 9)}]"]
    return "\n".join([*lines, *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels))])


@pytest.mark.parametrize(
    "text",
    [
        laughs(9, "x"),
        laughs(9, "{}"),
        f"a: &a {'x' * 200_000}\nb: [{'*a, ' * 11}]",
        "a: [" + "x," * 21_000 + "]",
        "{" + ",".join(f"k{i}" for i in range(11_000)) + "}",
    ],
    ids=["texts", "mappings", "one long text", "many values", "many keys"],
)
def test_what_multiplies_itself_is_refused_before_it_grows(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"a\.yaml:\d+: .*the file has more than 20,000 values or"):
        load_yaml(tmp_path / "a.yaml")
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_only_one_module_reads_yaml() -> None:
    """No other door for aliases, tags and words of YAML 1.1."""
    files = [path for package in ("ztrain", "data_tools", "benchmarks") for path in (ROOT / package).rglob("*.py")]
    door = re.compile(r"^\s*(import|from)\s+(yaml|ruamel|omegaconf)\b|(import_module|__import__)\(.(yaml|ruamel)", re.M)
    importing = [path.name for path in files if door.search(path.read_text(encoding="utf-8"))]
    assert importing == ["yamls.py"]


class Places(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    place: PathText
    more: list[PathText] = []


def test_paths_begin_at_home_and_are_written_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    more = ["$HOME", "${HOME}/x", "a/~", "a/b", "/home/else"]
    given = Places(place="~/runs/a", more=more)
    assert given.place == "/home/somebody/runs/a"
    assert given.more == ["/home/somebody", "/home/somebody/x", "a/~", "a/b", "/home/else"]
    assert given.model_dump(mode="json") == {"place": "~/runs/a", "more": ["~", "~/x", "a/~", "a/b", "/home/else"]}
    assert Places.model_validate_json(given.model_dump_json()) == given
    monkeypatch.setenv("HOME", "/")  # a container without a home
    assert given.model_dump(mode="json")["place"] == "/home/somebody/runs/a"
    for wrong in ("~nobody_at_all/x", "$NO_SUCH_THING/x", "a\0b"):
        with pytest.raises(pydantic.ValidationError) as caught:
            Places(place=wrong)
        assert "place: " in describe_errors(caught.value, source="c.yaml", model=Places)


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
