"""The report: what it says is what the record holds. In a browser: test_report_browser.py."""

import html
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.comparisons import make_comparison, make_run, make_sweep
from tests.test_inspect import HOSTILE, Page
from tests.triplets import ROOT
from ztrain.compare.command import table
from ztrain.compare.record import (
    Choice,
    Column,
    Comparison,
    Difference,
    Metric,
    write_best,
    write_comparison,
)
from ztrain.compare.report.caveats import caveats_of
from ztrain.compare.report.charts import (
    Box,
    front_of,
    place_labels,
    round_numbers,
    scale_of,
    smooth,
    text_width,
    thin_out,
)
from ztrain.compare.report.page import make_report
from ztrain.compare.report.words import answers_of, digits_of, number, split_answers
from ztrain.errors import InputError
from ztrain.io.yamls import dump_yaml
from ztrain.metrics.intervals import Interval


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("made") / "comparison"
    return folder, make_comparison(folder)


def page_of(place: Path, out: Path, **options: Any) -> Page:
    return Page(make_report(place, out, **options).read_bytes())


def words_of(page: Page) -> str:
    return " ".join(page.text.split())


def with_verdicts(found: Comparison, **verdicts: str) -> Comparison:
    """The same with other verdicts of the fourth column, metric by metric; `none` takes its interval as well."""

    def changed(difference: Difference | None, verdict: str) -> Difference:
        assert difference is not None
        limits = {"low": None, "high": None} if verdict == "none" else {}
        return difference.model_copy(update={"verdict": verdict, **limits})

    metrics = [
        metric.model_copy(
            update={"differences": [changed(d, verdicts[metric.name]) if i == 3 else d
                                    for i, d in enumerate(metric.differences)]}
        ) if metric.name in verdicts else metric
        for metric in found.metrics
    ]  # fmt: skip
    return found.model_copy(update={"metrics": metrics})


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_record_holds(made: tuple[Path, Comparison], tmp_path: Path) -> None:
    folder, found = made
    page = page_of(folder, tmp_path / "page.html")
    text = words_of(page)
    for metric in found.metrics:
        digits = digits_of(metric)
        for mean, difference in zip(metric.means, metric.differences, strict=True):
            if mean is not None and mean.low is not None and mean.high is not None:
                assert f"{number(mean.mean, digits)} [{number(mean.low, digits)}, {number(mean.high, digits)}]" in text
            if difference is not None:
                sign = {"better": "▲", "worse": "▼", "undecided": "≈", "none": "·"}[difference.verdict]
                assert f"{sign} {number(difference.mean, digits, signed=True)}" in text
        assert metric.title in text
    for told in (found.best.rule, found.best.found, "google/siglip2-so400m-patch16-naflex @ a1b2c3d4e5f6",
                 "load_adapter(pipe", "num_seeds: 2", "CC0-1.0", "Z-Image (miniature)", found.title):  # fmt: skip
        assert told in text, told
    raw = (tmp_path / "page.html").read_text()
    assert "Cosine between the picture and its prompt, by SigLIP2." in raw  # a definition, for the tip
    titles = re.findall(r'<th scope="col"><button[^>]*><bdi>([^<]*)', raw)
    assert titles[:2] == ["Style likeness", "Prompt adherence"] and len(titles) == 5
    payload = page.payload
    assert payload["metrics"][0]["values"] == found.metric("style").values
    assert payload["rows"][3]["prompt"] == found.rows[3].prompt
    # Each picture once, whatever shows it: equal bytes have one place.
    urls = [picture["url"] for picture in payload["pictures"]]
    assert len(urls) == len(set(urls)) and max(c for of in payload["drawn"] for row in of for c in row) < len(urls)
    assert payload["pictures"][payload["drawn"][3][2][1]]["width"] == 96


@pytest.mark.parametrize(
    ("style", "prompt", "verdict", "told"),
    [
        ("better", "worse", "trade", "is better than the free splice (splice) at Style likeness, +0."),
        ("better", "undecided", "better", "no price in Prompt adherence can be told"),
        ("better", "better", "better", "it also gains in Prompt adherence"),
        ("undecided", "worse", "undecided", "undecided, the interval holds 0; it pays in Prompt adherence"),
        ("worse", "better", "trade", "is worse than the free splice (splice) at"),
        ("none", "none", "none", "cannot be told from the free splice (splice)"),
    ],
)
def test_the_answer_follows_the_verdicts(
    made: tuple[Path, Comparison], style: str, prompt: str, verdict: str, told: str
) -> None:
    answers = answers_of(with_verdicts(made[1], style=style, prompt=prompt, copy="worse", diversity="undecided"))
    assert [answer.column for answer in answers] == [3, 2, 4]  # the best first; no control, no baseline
    assert answers[0].verdict == verdict and told in answers[0].sentence, answers[0].sentence
    assert "Also worse: Copy score" in answers[0].sentence and "Diversity" not in answers[0].sentence
    assert "may be better or worse" not in answers[0].sentence or verdict == "undecided"


def test_without_a_baseline_or_a_judge_nothing_is_claimed(made: tuple[Path, Comparison], tmp_path: Path) -> None:
    folder, found = made
    alone = [m.model_copy(update={"differences": [None] * len(m.means)}) for m in found.metrics]
    for update, told in (
        ({"baseline": None, "metrics": alone}, "There is no splice here to compare with"),
        ({"style": None, "adherence": None}, "No model judged likeness"),
        (
            {
                "columns": [
                    c.model_copy(update={"role": "control"}) if c.role == "adapter" else c for c in found.columns
                ]
            },
            "No adapter and no further setting",
        ),
    ):
        shutil.copytree(folder, at := tmp_path / told[:8])
        write_comparison(found.model_copy(update=update), at)
        text = words_of(page_of(at, tmp_path / "page.html"))
        assert told in text and "is better than" not in text
        assert ("Style against obedience" in text) == (update.get("style", "") == "")


def test_a_sweep_counts_its_settings_and_names_the_best(tmp_path: Path) -> None:
    found = make_sweep(tmp_path / "sweep")
    page = page_of(tmp_path / "sweep", tmp_path / "page.html")
    text = words_of(page)
    shown, more, tally = split_answers(found, answers_of(found))
    assert [answer.column for answer in shown] == [found.best.column] and len(more) == 29
    counted = [int(count) for count in re.findall(r"(?:: |, )(\d+) (?:better|worse|undecided|not)", tally)]
    assert sum(counted) == 30 and tally in text
    assert page.payload["axes"] == found.axes and page.payload["best"] == found.best.column
    raw = (tmp_path / "page.html").read_text()
    table = re.findall(r'<th scope="row">.*?<bdi>([^<]*)', raw, re.S)
    rest = [c for i, c in enumerate(found.columns) if c.role == "setting" and i != found.best.column]
    means = {c.label: mean.mean for c, mean in zip(found.columns, found.metric("style").means, strict=True) if mean}
    # What is talked about first, then the settings by style.
    assert set(table[:3]) == {"no image", "splice as configured", found.columns[found.best.column or 0].label}
    assert table[3:] == sorted((column.label for column in rest), key=lambda label: -means[label])
    wide = raw.split('class="only-wide"')[1].split("</svg>")[0]
    labels = re.findall(r'<text class="name(?: strong)?"[^>]*>([^<]*)', wide)
    assert sorted(labels) == sorted([found.columns[found.best.column or 0].label, "no image", "splice as configured"])
    assert wide.count("data-tip=") == 32  # all others have a tip
    # An axis alone: other settings as in the best.
    assert raw.count('<figure class="sheet chart">') == 6 and "encoders.hidden_index" in text


def test_checkpoints_are_shown_by_step(made: tuple[Path, Comparison], tmp_path: Path) -> None:
    folder, found = made
    shutil.copytree(folder, tmp_path / "set")
    steps = {2: 600, 3: 300, 4: 900}
    columns = [
        column.model_copy(
            update={"role": "checkpoint", "step": steps[i], "label": f"step {steps[i]}"} if i in steps else {}
        )
        for i, column in enumerate(found.columns)
    ]
    write_comparison(found.model_copy(update={"columns": columns, "kind": "checkpoints"}), tmp_path / "set")
    text = words_of(page_of(tmp_path / "set", tmp_path / "page.html"))
    assert "Checkpoints · 7 columns" in text and "Scores by step" in text and "Through the steps" in text
    raw = (tmp_path / "page.html").read_text().split("Scores by step")[1].split("</section>")[0]
    assert raw.count("<figure") == 5 and raw.count('class="dashed splice"') == 5  # each metric, over the baseline
    style = found.metric("style")
    told = [float(y) for y in re.findall(r"checkpoints: ([\d.]+) at", raw.split("</figure>")[0])]
    assert told == [float(f"{mean.mean:.4g}") for i in (3, 2, 4) if (mean := style.means[i]) is not None]
    assert "Through the steps" not in words_of(page_of(folder, tmp_path / "page.html"))  # steps of different runs


def test_a_run_shows_its_curves_and_previews(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my-run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 301, "train/lo')  # as it is while training writes
    (run / "samples/step-00000400").mkdir()
    write_best(
        run, Choice(column=1, rule="Most style of all.", found="step 200: 0.4."), 200, {"200": [0.4, 1.0]}, "digest"
    )
    page = page_of(run, tmp_path / "page.html")
    text = words_of(page)
    for told in ("my-run", "300 steps", "Validation loss by reference", "Image use", "Training loss by σ",
                 "Validation loss at fixed σ", "Score: style", "Learning rate", "steps 1 to 60", "steps 241 to 300",
                 "the last line is not finished", "samples/step-00000400: not all", "step 200: 0.4.",
                 "Also in metrics.jsonl, not drawn: perf/step_seconds", "'my-run/export'"):  # fmt: skip
        assert told in text, told
    assert [column["label"] for column in page.payload["columns"]][-2:] == ["step 200", "step 300"]
    assert page.payload["best"] == 4 and page.payload["columns"][4]["tags"] == ["best"]
    assert page.payload["rows"][1]["seeds"] == [6] and page.payload["baseline"] == 1
    assert len(page.payload["drawn"]) == 6 and page.payload["metrics"] == []
    (tmp_path / "bare").mkdir()
    for name in ("config.yaml", "env.json"):
        shutil.copy(run / name, tmp_path / "bare" / name)
    (tmp_path / "bare/metrics.jsonl").write_text("")
    assert "metrics.jsonl has no row yet" in words_of(page_of(tmp_path / "bare", tmp_path / "page.html"))


def test_only_as_many_rows_as_asked_for_and_the_page_says_so(made: tuple[Path, Comparison], tmp_path: Path) -> None:
    folder, found = made
    page = page_of(folder, tmp_path / "page.html", max_rows=5)
    assert [row["number"] for row in page.payload["rows"]] == [0, 3, 6, 8, 11]
    assert "5 of 12 rows are shown, spread evenly; scores above count all." in words_of(page)
    values = found.metric("prompt").values
    assert values is not None and page.payload["metrics"][1]["values"][2][3] == values[2][8]


def test_same_input_same_bytes_and_no_path_of_this_machine(made: tuple[Path, Comparison], tmp_path: Path) -> None:
    for blind in (False, True):
        pages = []
        for name in ("one", "two"):
            shutil.copytree(made[0], tmp_path / name / "set", dirs_exist_ok=True)
            out = make_report(tmp_path / name / "set", blind=blind)
            assert out == tmp_path / name / "set" / ("blind.html" if blind else "report.html")
            pages.append(make_report(tmp_path / name / "set/comparison.json", blind=blind).read_bytes())  # replaced
        assert pages[0] == pages[1] and str(tmp_path).encode() not in pages[0] and str(ROOT).encode() not in pages[0]
    run = make_run(tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("cache:", f"cache:\n  extra_dir: {tmp_path}/secret-place", 1))
    assert str(tmp_path) not in make_report(run).read_text()


@pytest.mark.parametrize(
    ("place", "break_it", "complaint"),
    [
        ("set", lambda at: (at / "page.html").write_text("<!doctype html><p>mine"), "something else than a page of"),
        ("set", lambda at: (at / "page.html").mkdir(), "cannot be replaced"),
        ("set", lambda at: (at / "set/comparison.json").unlink(), "holds neither comparison.json of a comparison nor"),
        ("set", lambda at: (at / "set/comparison.json").write_text("{"), "not a row of JSON"),
        ("set", lambda at: (at / "set/splice/3-1.png").unlink(), "splice/3-1.png: the picture does not exist"),
        ("set", lambda at: (at / "set/splice/3-1.png").write_bytes(b"no"), "splice/3-1.png: not a readable picture"),
        ("set", lambda at: shutil.rmtree(at / "set"), "cannot read it"),
        ("run", lambda at: (at / "run/env.json").unlink(), "env.json: cannot read it"),
        ("run", lambda at: (at / "run/config.yaml").unlink(), "config.yaml: cannot read the file"),
        ("run", lambda at: (at / "run/config.yaml").write_text("data: [1]"), "config.yaml: data: "),
        ("run", lambda at: (at / "run/config.yaml").write_text("models: {base: x}"), "config.yaml: models.base: "),
        ("run", lambda at: (at / "run/config.yaml").write_text("models: {base: {}}\nseed: x"), "config.yaml: seed: "),
        ("run", lambda at: (at / "run/metrics.jsonl").write_text('{"step": 1, "a": "x"}\n'), "jsonl:1: a is no number"),
        ("run", lambda at: (at / "run/metrics.jsonl").write_text('{"step": 2}\n{"step": 2}\n'), "2: step 2 does not"),
        (
            "run",
            lambda at: (at / "run/best.json").write_text('{"step": "2"}'),
            "best.json: has no step, rule and found",
        ),
        ("run", lambda at: (at / "run/samples/base/key.json").write_text('{"rows": [1]}'), "key.json: has no rows"),
        ("run", lambda at: (at / "run/samples/base/target-1.png").unlink(), "target-1.png: the picture does not"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    made: tuple[Path, Comparison], tmp_path: Path, place: str, break_it: Any, complaint: str
) -> None:
    shutil.copytree(made[0], tmp_path / "set")
    make_run(tmp_path / "run", steps=100, previews=(0, 100))
    break_it(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as raised:
        make_report(tmp_path / place, tmp_path / "page.html")
    assert complaint in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_that_is_ours_is_replaced_and_numbers_out_of_range_are_refused(
    made: tuple[Path, Comparison], tmp_path: Path
) -> None:
    make_report(made[0], tmp_path / "page.html", blind=True)
    old = (tmp_path / "page.html").read_bytes()
    make_report(made[0], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() != old and os.listdir(tmp_path) == ["page.html"]
    options: dict[str, Any]
    for options in ({"max_rows": 0}, {"thumbnail_side": 16}, {"thumbnail_side": 4096}):
        with pytest.raises(InputError, match="max_rows must be at least 1, and thumbnail_side 32 to 1024"):
            make_report(made[0], tmp_path / "page.html", **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("small") / "comparison"
    found = make_comparison(folder, rows=2, seeds=1)
    for blind in (False, True):
        make_report(folder, folder / f"usual-{blind}.html", blind=blind)
    return folder, found


@settings(max_examples=15, deadline=None)
@given(st.text(min_size=1, max_size=60))
@example(HOSTILE[0])
@example("a | b\\| `c` \n\n# d\n")
def test_any_text_in_any_place_stays_text(small: tuple[Path, Comparison], text: str) -> None:
    check_texts(small, text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back_as_it_was(small: tuple[Path, Comparison], text: str) -> None:
    check_texts(small, text)


class Outline(HTMLParser):
    """Which elements with which attributes a page has."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.found: set[tuple[str, ...]] = set()
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.add((tag, *(name for name, _ in attributes)))


def foreign(node: Any, text: str, key: str = "") -> Any:
    """The record with `text` in the place of every text that is not one of our own words or the name of a picture."""
    if isinstance(node, dict):
        names = {name: text if key in ("conditions", "data") and name == next(iter(node)) else name for name in node}
        return {names[name]: foreign(value, text, name) for name, value in node.items()}
    if isinstance(node, list):
        return [foreign(value, text, key) for value in node]
    is_ours = key in ("role", "sees", "direction", "verdict", "kind", "pictures", "references", "target", "adherence")
    return text if isinstance(node, str) and not is_ours else node


def check_texts(small: tuple[Path, Comparison], text: str) -> None:
    folder, found = small
    document = foreign(found.model_dump(mode="json"), text)
    for metric, ours in zip(document["metrics"], found.metrics, strict=True):
        metric["name"] = ours.name
    document["style"] = found.style
    write_comparison(found, folder)
    usual = {
        blind: Outline(make_report(folder, folder / "page.html", blind=blind).read_bytes()) for blind in (False, True)
    }
    write_comparison(changed := Comparison.model_validate_json(json.dumps(document)), folder)
    for blind in (False, True):
        usual = Outline((folder / f"usual-{blind}.html").read_bytes())
        raw = make_report(folder, folder / "page.html", blind=blind).read_bytes()
        page = Page(raw)
        assert page.payload["rows"][0]["prompt"] == page.payload["rows"][0]["style"] == text
        assert page.payload["columns"][3]["label"] == page.payload["title"] == text
        assert page.tags.count("script") == 2 and page.tags.count("img") == (0 if blind else 2)
        assert page.tags.count("style") == 1 and Outline(raw).found <= usual.found
    # The table that a terminal gets: as many cells as there are, whatever the labels are.
    lines = table(changed).split("\n")
    assert len(lines) == 2 + len(found.columns) + 3
    for line in lines[: 2 + len(found.columns)]:
        assert len(re.findall(r"(?:[^\\|]|\\.)*\|", line)) == lines[1].count("|"), line


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_of_a_run_stays_text(tmp_path: Path, text: str) -> None:
    """Names of metrics, versions, settings and prompts, as another's run may have them."""
    run = make_run(tmp_path / "run", steps=100, previews=(0, 100))

    def write(word: str) -> None:
        names = ("train/loss", word, f"score/{word}", f"val/loss_sigma_{word}")
        rows = [{"step": step} | dict.fromkeys(names, 0.5 / step) for step in (1, 2, 3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "env.json").write_text(json.dumps({word: word}))
        config = {"data": {word: word}, "tracking": {"notes": word, word: [word]}}
        (run / "config.yaml").write_text(dump_yaml(config))
        (run / "samples/base/key.json").write_text(json.dumps({"rows": [[word], [word]]}))
        write_best(run, Choice(column=None, rule=word, found=word), 100, {}, "digest")

    write("word")
    usual = Outline(make_report(run, tmp_path / "usual.html").read_bytes())
    write(text)
    for blind in (False, True):
        raw = make_report(run, tmp_path / "page.html", blind=blind).read_bytes()
        page = Page(raw)
        assert page.payload["rows"][0]["prompt"] == text
        assert page.tags.count("script") == 2 and page.tags.count("img") == (0 if blind else 2)
        assert blind or Outline(raw).found <= usual.found


# --- charts -----------------------------------------------------------------------------------------------------------

FRAME: Box = (40.0, 10.0, 700.0, 400.0)
spots = st.tuples(st.floats(45, 695), st.floats(15, 395))


@given(st.lists(st.tuples(spots, st.text(min_size=1, max_size=24)), min_size=1, max_size=14))
def test_labels_stand_inside_over_no_other_and_no_dot(given_: list[tuple[tuple[float, float], str]]) -> None:
    dots, texts = [dot for dot, _ in given_], [text for _, text in given_]
    boxes: list[Box] = []
    for text, found in zip(texts, place_labels(dots, texts, FRAME), strict=True):
        if found is None:
            continue
        x, y, anchor, _ = found
        width = text_width(text)
        left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
        box = (left, y + 4 - 15, left + width, y + 4)
        assert box[0] >= FRAME[0] - 0.02 and box[2] <= FRAME[2] + 8.02 and FRAME[1] - 0.02 <= box[1] <= box[3]
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in dots)
        for other in boxes:
            apart = 0.02  # places are rounded to hundredths of a pixel
            assert (
                box[0] >= other[2] - apart or other[0] >= box[2] - apart
                or box[1] >= other[3] - apart or other[1] >= box[3] - apart
            )  # fmt: skip
        boxes.append(box)
    assert place_labels(dots[:1], ["a"], FRAME)[0] is not None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12), st.sampled_from([1.0, -1.0]))
def test_the_front_is_who_nobody_beats(points: list[tuple[int, int]], sign: float) -> None:
    front = front_of([(float(x), float(y)) for x, y in points], (1.0, sign))
    for place, (x, y) in enumerate(points):
        beaten = any(a >= x and sign * b >= sign * y and (a, b) != (x, y) for a, b in points)
        assert (place in front) == (not beaten)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4), st.integers(2, 8))
def test_ticks_are_round_and_within(low: float, width: float, count: int) -> None:
    ticks = round_numbers(low, low + width, count)
    assert 1 <= len(ticks) <= count + 2 and len({label for _, label in ticks}) == len(ticks)
    for value, label in ticks:
        assert low - 1e-6 * width <= value <= low + width * (1 + 1e-6)
        assert float(label.replace(",", "").replace("−", "-")) == pytest.approx(value, abs=width / count / 20, rel=5e-3)


def test_scales_curves_and_averages() -> None:
    scale = scale_of([2.0, 4.0], 100.0, 0.0, margin=0.5)
    assert (scale.low, scale.high, scale(1.0), scale(5.0), scale(3.0)) == (1.0, 5.0, 100.0, 0.0, 50.0)
    assert smooth([3.0] * 9, 4) == pytest.approx([3.0] * 9)  # no pull towards 0
    weights = [0.5 ** ((7 - k) / 2) for k in range(8)]
    values = [float(k * k) for k in range(8)]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert smooth(values, 2)[-1] == pytest.approx(expected)
    xs = [float(x) for x in range(10_000)]
    ys = [0.0] * 10_000
    ys[4321], ys[77] = 9.0, -3.0
    kept_x, kept_y = thin_out(xs, ys)
    assert len(kept_x) <= 400 and (max(kept_y), min(kept_y)) == (9.0, -3.0) and kept_x == sorted(kept_x)
    assert kept_x[kept_y.index(9.0)] == 4321.0 and thin_out([1.0], [2.0]) == ([1.0], [2.0])


@pytest.mark.parametrize(
    ("value", "digits", "signed", "told"),
    [(0.5, 2, False, "0.50"), (-0.001, 2, True, "0.00"), (0.25, 1, True, "+0.2"), (-12345.6, 0, False, "−12,346"),
     (0.0, 1, True, "0.0"), (-0.5, 1, True, "−0.5")],
)  # fmt: skip
def test_numbers_for_people(value: float, digits: int, signed: bool, told: str) -> None:
    assert number(value, digits, signed=signed) == told


# --- what makes an answer too sure ------------------------------------------------------------------------------------


def changed_columns(found: Comparison, **updates: dict[str, Any]) -> list[Column]:
    """The columns, those that are named with other values."""
    return [column.model_copy(update=updates.get(column.name, {})) for column in found.columns]


def caveats(found: Comparison) -> list[str]:
    return caveats_of(found, {answer.column for answer in answers_of(found)})


def answer_part(place: Path, out: Path) -> str:
    make_report(place, out)
    raw = out.read_text(encoding="utf-8").split('id="answer"')[1].split("</section>")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", raw)).split())


def test_what_was_chosen_on_these_rows_is_said_beside_the_answer(made: tuple[Path, Comparison], tmp_path: Path) -> None:
    found = make_sweep(tmp_path / "sweep")
    told = "The best was chosen among 31 settings on these same rows"  # 30 cells and the splice as configured
    assert told in answer_part(tmp_path / "sweep", tmp_path / "page.html")
    rough = {f"cell-{i}": {"sampling": {"strength": 0.5}} for i in range(10)}
    (said,) = caveats(found.model_copy(update={"columns": changed_columns(found, **rough)}))
    assert "chosen among 21 settings" in said  # those that start at the reference are no choice
    nobody = found.model_copy(update={"best": found.best.model_copy(update={"column": None})})
    assert caveats(nobody) == []
    steps = {name: {"role": "checkpoint"} for name in ("projector", "siglip_lora", "lora")}
    update = {"columns": changed_columns(made[1], **steps), "kind": "checkpoints"}
    (said,) = caveats(made[1].model_copy(update=update))
    assert "chosen among 3 checkpoints on these same rows" in said and "compare it on other rows" in said
    assert caveats(made[1]) == []  # one splice, and adapters that people named
    alike = [row.model_copy(update={"style": "ink"}) for row in made[1].rows]
    (said,) = caveats(made[1].model_copy(update={"rows": alike}))
    assert said.startswith("No two styles are named: shuffled references may be of the same style")


def test_a_baseline_of_little_style_is_not_the_whole_truth(made: tuple[Path, Comparison]) -> None:
    """The projector as a second splice: it has more style than the baseline, or is it."""
    columns = changed_columns(made[1], projector={"role": "splice", "label": "strong splice"})
    found = made[1].model_copy(update={"columns": columns})
    assert caveats(found) == ["The baseline, splice, is the best of 2 splices by the rule, on these same rows."]
    style, prompt = found.metric("style"), found.metric("prompt")

    def mean(metric: Metric, place: int) -> str:
        at = metric.means[place]
        assert at is not None
        return number(at.mean, digits_of(metric))

    for answer in answers_of(found):
        told = (
            f"The splice with most style, strong splice, has Style likeness {mean(style, 2)}, this has"
            f" {mean(style, answer.column)}; Prompt adherence {mean(prompt, 2)} and {mean(prompt, answer.column)}."
        )
        assert told in answer.sentence, answer.sentence
    strongest = found.model_copy(
        update={"baseline": 2, "best_splice": found.best_splice.model_copy(update={"column": 2})}
    )
    assert not any("splice with most style" in answer.sentence for answer in answers_of(strongest))
    assert not any("splice with most style" in answer.sentence for answer in answers_of(made[1]))
    chosen_by_nobody = found.model_copy(update={"best_splice": Choice(column=None, rule="None.", found="None.")})
    assert caveats(chosen_by_nobody) == []


def test_pictures_that_start_at_the_reference_are_said_to(made: tuple[Path, Comparison], tmp_path: Path) -> None:
    part = {"sampling": {"strength": 0.6}}
    columns = changed_columns(made[1], none={"sampling": {"strength": 1.0}}, splice=part, siglip_lora=part)
    shutil.copytree(made[0], tmp_path / "set")
    write_comparison(found := made[1].model_copy(update={"columns": columns}), tmp_path / "set")
    told = "start at the reference (strength 0.6), so their likeness to it is partly a copy."
    assert [told in answer.sentence for answer in answers_of(found)] == [True, False, False]
    assert caveats(found) == [f"The pictures of splice {told}"]  # it has no answer of its own
    # Style that is a copy is no measure for an adapter's.
    part = {"role": "splice", "sampling": {"strength": 0.6}}
    columns = changed_columns(made[1], projector=part, lora={"role": "splice"})
    copied = made[1].model_copy(update={"columns": columns})
    assert caveats(copied) == ["The baseline, splice, is the best of 2 splices by the rule, on these same rows."]
    assert not any("splice with most style" in answer.sentence for answer in answers_of(copied))
    assert answer_part(tmp_path / "set", tmp_path / "page.html").count(told) == 2
    payload = page_of(tmp_path / "set", tmp_path / "page.html").payload
    tagged = ["starts at the reference" in column["tags"] for column in payload["columns"]]
    assert tagged == [False, True, False, True, False, False, False]


def test_a_score_of_whole_columns_counts_no_rows(made: tuple[Path, Comparison], tmp_path: Path) -> None:
    means = [Interval(mean=0.1 * place, count=1) for place in range(7)]
    update = {"name": "kid", "title": "KID", "values": None, "means": means, "differences": [None] * 7}
    whole = made[1].metrics[0].model_copy(update=update)
    shutil.copytree(made[0], tmp_path / "set")
    found = made[1].model_copy(update={"metrics": [*made[1].metrics, whole]})
    write_comparison(found, tmp_path / "set")
    raw = make_report(tmp_path / "set", tmp_path / "page.html").read_text(encoding="utf-8")
    tips = re.findall(r'<td data-tip="([^"]*)"', raw)
    assert len([tip for tip in tips if "KID" in tip]) == 7 and not any("KID" in t and "row" in t for t in tips)
    assert any("Style likeness" in tip and "over 12 rows" in tip for tip in tips)
