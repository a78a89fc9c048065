"""The inspect page: what it says is what the data hold. In a browser: test_inspect_browser.py."""

import json
import os
import re
import resource
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools import inspect, pack
from data_tools.charts import number_chart
from data_tools.survey import Row, choose, find_splits
from tests.triplets import ROOT, picture
from ztrain.data.rows import Triplet, clean
from ztrain.images import PictureFile, open_image

DRAWINGS = ROOT.parent / "shared/data/emoji_styles"
HOSTILE = [
    "</script><img src=x onerror=document.title='owned'>",
    "{{7*7}} {% raw %} ${7*7}",
    "<b>bold</b> &amp; &lt;",
    "<!-- <script> ]]> \u2028 \u2029 \\u003c",
    "\u202egnp.elif\u202c then left \u05e9\u05dc\u05d5\u05dd",
    "'\"><svg onload=document.title='owned'>",
    "very long " * 400 + "end",
]


def drawings() -> list[Image.Image]:
    """Real drawings where there are some."""
    names = ("1f34e", "1f436", "1f697")
    paths = [DRAWINGS / f"images/{style}/{name}.png" for style in ("noto", "blob") for name in names]
    if all(path.is_file() for path in paths):
        return [open_image(path) for path in paths]
    return [picture(seed) for seed in range(6)]


def write_data(folder: Path, counts: dict[str, int], prompts: dict[int, str] | None = None) -> list[dict[str, Any]]:
    """A data set of rows that differ in style, way and score, and the rows, `split` among their keys."""
    images = drawings()
    rows = []
    for split, count in counts.items():
        (folder / split / "images").mkdir(parents=True)
        for number, image in enumerate(images):
            image.save(folder / split / f"images/{number}.png")
        for index in range(len(rows), len(rows) + count):
            several = 1 + (index % 7 == 0)
            row: dict[str, Any] = {
                "reference_file_names": [f"images/{(index + k) % 5}.png" for k in range(several)],
                "target_file_name": "images/5.png",
                "prompt": (prompts or {}).get(index, f"{'Apple dog car'.split()[index % 3]} number {index}").strip(),
                "style": ["noto", "blob", "</option><i>"][index % 3],
                "content": f"c{index}",
            }
            row |= {"way": ["styles", "clips"][index % 2]} if index % 5 else {}
            row |= {"copy_score": (index * 37 % 101) / 100} if index % 4 else {}
            rows.append(row | {"split": split})
        lines = [json.dumps({k: v for k, v in row.items() if k != "split"}) for row in rows if row["split"] == split]
        (folder / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return rows


class Page(HTMLParser):
    """Text of each element by id, tags in order, and the data of the script."""

    def __init__(self, raw: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text, self.script = "", ""
        self._inside = ""
        self.feed(raw.decode())
        self.payload = json.loads(self.script)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = dict(attributes).get("id") or tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "payload":
            self.script += data
        elif not self._inside:
            self.text += data


def page_of(data: Path, **options: Any) -> Page:
    return Page(inspect.make_page(inspect.Command(data=data, out=data.parent / "page.html", **options))[0])


def run(*words: object) -> int:
    return inspect.main([str(word) for word in words])


def test_all_three_layouts_give_the_same_page(tmp_path: Path) -> None:
    rows = write_data(tmp_path / "folder" / "set", {"train": 9, "validation": 4})
    pages = [page_of(tmp_path / "folder" / "set")]
    for layout in ("webdataset", "parquet"):
        out = tmp_path / layout / "set"
        assert pack.main(["--data", str(tmp_path / "folder" / "set"), "--out", str(out), "--format", layout]) == 0
        assert find_splits(out) == ["train", "validation"]
        pages.append(page_of(out))
    for page in pages:
        shown = page.payload["rows"]
        for key, name in (("prompt",) * 2, ("style",) * 2, ("split",) * 2, ("way",) * 2, ("copy_score", "score")):
            assert [row[name] for row in shown] == [row.get(key) for row in rows], key
        assert dict(shown[1]["columns"])["content"] == "c1"
        assert [len(row["references"]) for row in shown] == [len(row["reference_file_names"]) for row in rows]
    # Equal pictures are made once: six files in each split, one place each on the page.
    assert len(pages[0].payload["pictures"]) == 6
    assert pages[0].payload["pictures"] == pages[1].payload["pictures"] == pages[2].payload["pictures"]


def test_only_as_many_as_asked_for_and_the_page_says_so(tmp_path: Path) -> None:
    rows = write_data(tmp_path / "set", {"train": 60, "validation": 15})
    page = page_of(tmp_path / "set", max_triplets=20)
    assert "75 triplets in 3 styles, 2 splits. 20 are shown" in " ".join(page.text.split())
    assert "55 are left out. The 2 with the highest copy scores of all are among" in " ".join(page.text.split())
    best = sorted((row["copy_score"] for row in rows if "copy_score" in row), reverse=True)[:2]
    assert sorted((row["score"] or 0 for row in page.payload["rows"]), reverse=True)[:2] == best
    groups = Counter((row["split"], row["style"]) for row in page.payload["rows"])
    assert len(groups) == 6 and sum(groups.values()) == 20 and set(groups.values()) <= {3, 4, 5}
    # Histograms count all rows.
    assert "75 about square" in page.text and f"{drawings()[0].width} short side, pixels: 75" in page.text
    assert sum(map(int, re.findall(r"characters: (\d+)", page.text))) == 75
    bars = re.findall(r"0\.\d\d to [01]\.\d\d: (\d+)", page.text)
    assert len(bars) == 20 and sum(map(int, bars)) == sum("copy_score" in row for row in rows)


def test_choice_fills_up_from_large_groups_and_spreads_inside_them() -> None:
    def row(index: int, style: str) -> Row:
        image = PictureFile(Path("x.png"))
        triplet = Triplet(index=index, where="", prompt="x", references=(image,), target=image, columns={})
        return Row(triplet, "train", style, None, None)

    rows = [row(i, "large") for i in range(90)] + [row(90 + i, "small") for i in range(3)]
    chosen = choose(rows, 13)
    assert chosen == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 91, 92]
    assert len(choose(rows, 1)) == 1 and choose(rows, 93) == list(range(93)) == choose(rows, 1000)


def test_manifest_and_refused_files_are_told(tmp_path: Path) -> None:
    write_data(tmp_path / "set", {"train": 3, "validation": 2})
    manifest = {
        "fingerprint": "0123456789abcdef",
        "triplets": {"train": 4, "validation": 2},
        "counts": {"pictures_of_mice": 12345},
        "shared": {"train / validation": {"pictures": 0, "contents": 7}},
        "licences": ["LICENSE-<CC0>.txt"],
        "written_by": "something newer",
    }
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest))
    stages = ("dedup", "scan", "scan")
    lines = [{"name": f"<{i}>.png", "stage": stages[i % 3], "reason": f"too small & {i}"} for i in range(7)]
    (tmp_path / "set/left_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(tmp_path / "set", max_refused=5)
    text = " ".join(page.text.split())
    for told in (
        "0123456789abcdef", "pictures of mice", "12,345", "pictures none, contents 7", "LICENSE-<CC0>.txt",
        "manifest.json counts 4 triplets in train, but 3 can be read.", "7 in all: scan 4, dedup 3.",
        "The last 2 are left out of the table.",
    ):  # fmt: skip
        assert told in text, told
    assert page.payload["refused"] == [list(line.values()) for line in lines[:5]]


def test_what_cannot_be_read_is_counted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_data(tmp_path / "set", {"train": 8})
    images = tmp_path / "set/train/images"
    (images / "1.png").write_bytes(b"no picture")
    shutil.copyfile(images / "1.png", images / "bad-target.png")
    del rows[3]["split"]
    lines = (tmp_path / "set/train/metadata.jsonl").read_text().splitlines()
    lines[3] = json.dumps(rows[3] | {"target_file_name": "images/bad-target.png"})
    lines[6] = json.dumps({**json.loads(lines[6]), "target_file_name": "images/gone.png"})
    (tmp_path / "set/train/metadata.jsonl").write_text("\n".join(lines))
    assert run("--data", tmp_path / "set", "--out", tmp_path / "page.html") == 0
    page = Page((tmp_path / "page.html").read_bytes())
    assert "note: 3 rows or pictures cannot be read" in capsys.readouterr().err
    assert "3 rows or pictures cannot be read" in page.text and "6 about square" in page.text
    told = {name: reason for name, _, reason in page.payload["refused"]}
    assert set(told) == {"a row of train", "train/images/bad-target.png", "train/images/1.png"}
    assert told["a row of train"].startswith("train/metadata.jsonl:7: the picture 'images/gone.png' is not in train")
    assert len(page.payload["rows"]) == 7
    faults = [page.payload["pictures"][row["target"]].get("fault") for row in page.payload["rows"]]
    assert [place for place, fault in enumerate(faults) if fault] == [3]


def test_a_target_among_its_references_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path / "set", {"train": 3})
    lines = [json.loads(line) for line in (tmp_path / "set/train/metadata.jsonl").read_text().splitlines()]
    lines[1]["reference_file_names"] = [lines[1]["target_file_name"]]
    (tmp_path / "set/train/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("--data", tmp_path / "set", "--out", tmp_path / "page.html")
    assert run(*words) == 0 and "note: 1 rows or pictures cannot be read or used" in capsys.readouterr().err
    [[name, _, reason]] = Page((tmp_path / "page.html").read_bytes()).payload["refused"]
    assert name == "train/metadata.jsonl:2" and "its target is among its references" in reason
    assert run(*words, "--allow-reference-is-target") == 0 and "note" not in capsys.readouterr().err


def test_same_data_same_bytes_and_no_path_of_this_machine(tmp_path: Path) -> None:
    write_data(tmp_path / "one/set", {"train": 5})
    (tmp_path / "one/set/train/images/3.png").write_bytes(b"")
    shutil.copytree(tmp_path / "one/set", tmp_path / "two/set")
    pages = []
    for place in ("one", "two"):
        assert run("--data", tmp_path / place / "set", "--out", tmp_path / place / "out/page.html") == 0
        assert run("--data", tmp_path / place / "set", "--out", tmp_path / place / "out/page.html") == 0  # replaced
        assert os.listdir(tmp_path / place / "out") == ["page.html"]
        pages.append((tmp_path / place / "out/page.html").read_bytes())
    assert pages[0] == pages[1]
    assert str(tmp_path).encode() not in pages[0] and str(ROOT).encode() not in pages[0]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path / "set", {"train": 5})
    assert run("--data", tmp_path / "set", "--out", tmp_path / "page.html") == 0
    old = (tmp_path / "page.html").read_bytes()
    shutil.rmtree(tmp_path / "set")
    write_data(tmp_path / "set", {"train": 6})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # what a full disk does, too
    try:
        assert run("--data", tmp_path / "set", "--out", tmp_path / "page.html") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "page.html: cannot write it, the disk or its quota is full" in capsys.readouterr().err
    assert (tmp_path / "page.html").read_bytes() == old and sorted(os.listdir(tmp_path)) == ["page.html", "set"]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60))
@example([1])
@example([5] * 300 + [9000])
def test_histograms_lose_no_value(values: list[int]) -> None:
    chart = number_chart("size", "Size", "pixels", values)
    assert sum(count for _, count in chart.bars) == len(values)
    assert 5 <= len(chart.bars) <= 22 and len({label for label, _ in chart.bars}) == len(chart.bars)
    first = [int(re.split(" ", label)[0].replace(",", "")) for label, _ in chart.bars]
    assert first[0] % (first[1] - first[0]) == 0  # edges are round numbers
    for start, (_, count), end in zip(first, chart.bars, [*first[1:], max(values) + 1], strict=True):
        assert count == sum(start <= value < end for value in values)


def test_odd_sets_have_pages_too(tmp_path: Path) -> None:
    split = os.fsdecode(b"tr\xffin")
    folder = tmp_path / "<set>" / split
    folder.mkdir(parents=True)
    picture(0, 16, 400).save(folder / "a.png")
    row = {"reference_file_name": "a.png", "target_file_name": "a.png", "prompt": "x"}
    row |= {"style": 3, "more": [1, {"a": None}]}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    (tmp_path / "<set>/left_out.jsonl").write_text("")
    page = page_of(tmp_path / "<set>")
    [card] = page.payload["rows"]
    assert (card["style"], card["way"], card["score"]) == ("3", None, None)
    assert card["columns"] == [["more", '[1, {"a": null}]']]
    assert "1 triplet in 1 style, 1 split." in " ".join(page.text.split())
    assert "no row has one" in page.text and "<set>" in page.text and "tr\\udcffin" in page.text
    text_only = {key: value for key, value in row.items() if key != "reference_file_name"}
    (folder / "metadata.jsonl").write_text(json.dumps(text_only))
    assert page_of(tmp_path / "<set>", text_only=True).payload["rows"][0]["references"] == []


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda at: (at / "page.html").write_text("<!doctype html><p>my notes"), "holds something else than a page"),
        (lambda at: (at / "page.html").mkdir(), "cannot be replaced"),
        (lambda at: shutil.rmtree(at / "set/train"), "no triplets there; expected"),
        (lambda at: shutil.rmtree(at / "set"), "cannot read the folder"),
        (lambda at: (at / "set/manifest.json").write_text('{"triplets": {"train": "3"}}'), "manifest.json: triplets"),
        (lambda at: (at / "set/manifest.json").write_text(""), "manifest.json: not a row of JSON"),
        (lambda at: (at / "set/left_out.jsonl").write_text('\n{"name": "a", "reason": "b"}'), "2: stage: is missing"),
        (lambda at: rewrite(at, copy_score=1.5), "copy_score must be a number from 0 to 1, not 1.5"),
        (lambda at: rewrite(at, copy_score=True), "copy_score must be a number from 0 to 1, not True"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], break_it: Any, complaint: str
) -> None:
    write_data(tmp_path / "set", {"train": 3})
    break_it(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run("--data", tmp_path / "set", "--out", tmp_path / "page.html") == 2
    assert complaint in (error := capsys.readouterr().err) and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def rewrite(at: Path, **keys: Any) -> None:
    path = at / "set/train/metadata.jsonl"
    path.write_text("\n".join(json.dumps(json.loads(line) | keys) for line in path.read_text().splitlines()))


@pytest.fixture(scope="module")
def one_row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "set"
    write_data(folder, {"train": 1})
    return folder


def _says_something(text: str) -> bool:
    return "\0" not in text and clean(text) != ""


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1).filter(_says_something), st.text(max_size=20))
@example(HOSTILE[0], HOSTILE[5])
@example(HOSTILE[3], "</title></h1>")
@example(HOSTILE[6], "")
def test_any_text_comes_back_as_it_was(one_row: Path, prompt: str, style: str) -> None:
    path = one_row / "train/metadata.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt": prompt, "style": style}))
    page = page_of(one_row)
    [row] = page.payload["rows"]
    assert (row["prompt"], row["style"]) == (clean(prompt), style)
    assert page.tags.count("script") == 2 and page.tags.count("img") == 0 and page.tags.count("svg") == 4
    assert style in page.text
