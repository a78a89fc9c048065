"""The inspect page in a real Chromium: it works, asks the network for nothing and runs nothing that the data say.

The picture of the documentation: python -m tests.test_inspect_browser docs/inspect.png      (needs ../shared/data)
"""

import io
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.chromium import Browser, Tab, chromium
from tests.test_inspect import HOSTILE, run, write_data
from tests.triplets import ROOT

Shown = tuple[Tab, list[dict[str, Any]], Path]
"""A tab, the rows of its data set in order, and its file."""


@pytest.fixture(scope="module")
def opened(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A page of 140 triplets with hostile texts everywhere, opened from disk, and its rows."""
    folder = tmp_path_factory.mktemp("shown")
    rows = write_data(folder / "<set>", {"<val>": 60, "train": 80}, dict(enumerate(HOSTILE, start=3)))
    stages = ("scan", "dedup")
    refused = [{"name": f"{i} {HOSTILE[i % 7]}", "stage": stages[i % 2], "reason": HOSTILE[0]} for i in range(9)]
    (folder / "<set>/left_out.jsonl").write_text("\n".join(map(json.dumps, refused)))
    (folder / "<set>/manifest.json").write_text(json.dumps({"counts": {HOSTILE[0]: 1}, "fingerprint": HOSTILE[5]}))
    assert run("--data", folder / "<set>", "--out", folder / "page.html") == 0
    tab = Tab(browser)
    tab.open(folder / "page.html")
    return tab, rows, folder / "page.html"


@pytest.fixture
def shown(opened: Shown) -> Shown:
    """The same page, as it was at first."""
    opened[0].send("Page.bringToFront")  # hidden tabs wait a second for every timer
    opened[0].run("find('large').close()")
    opened[0].reset()
    return opened


def test_the_page_opens_from_disk_and_asks_for_nothing(shown: Shown) -> None:
    tab, rows, path = shown
    assert sorted(tab.numbers("card")) == list(range(len(rows)))
    assert tab.requests() == [path.resolve().as_uri()]
    assert tab.complaints() == []
    assert tab.load_images() >= 2 * len(rows)


def test_the_policy_stops_what_the_page_would_not_do(browser: Browser, shown: Shown) -> None:
    """And the detector of the other tests sees it."""
    tab = Tab(browser)
    tab.open(shown[2])
    assert {"img-src", "style-src-attr", "script-src-elem", "connect-src"} <= tab.broken_policies()
    assert tab.run("document.title") != "owned"
    assert tab.complaints()


def test_each_filter_shows_the_rows_that_fit(shown: Shown) -> None:
    tab, rows, _ = shown
    numbered = list(enumerate(rows))
    for key in ("style", "split", "way"):
        for value in {row.get(key) for row in rows}:
            tab.choose(key, "none" if value is None else f"={value}")
            assert sorted(tab.numbers("card")) == [i for i, row in numbered if row.get(key) == value], (key, value)
        tab.reset()
    for low, high in ((0.25, 0.75), (0.9, ""), ("", 0.1), (0, 1)):
        tab.choose("low", low)
        tab.choose("high", high)
        least, most = low or 0, 1 if high == "" else high
        fits = [i for i, row in numbered if "copy_score" in row and least <= row["copy_score"] <= most]
        assert sorted(tab.numbers("card")) == fits, (low, high)
    tab.reset()
    for text in ("dog NUMBER 1", "<b>", "שלום", "not there"):
        tab.choose("text", text)
        fits = [i for i, row in numbered if text.lower() in row["prompt"].lower()]
        assert sorted(tab.numbers("card")) == fits, text
        assert tab.run("find('count').textContent") == f"{len(fits)} of {len(rows)} shown"
    assert tab.run("find('nothing').hidden") is False
    tab.reset()
    tab.choose("text", "apple")
    tab.choose("split", "=train")
    tab.choose("low", 0.5)
    in_train = [(i, row) for i, row in numbered if "Apple" in row["prompt"] and row["split"] == "train"]
    fits = [i for i, row in in_train if row.get("copy_score", 0) >= 0.5]
    assert sorted(tab.numbers("card")) == fits and fits
    tab.reset()
    tab.run("document.querySelector('[data-style=\"1\"]').click()")
    most = Counter(row["style"] for row in rows).most_common()[1][0]
    assert {rows[i]["style"] for i in tab.numbers("card")} == {most}
    tab.reset()
    assert len(tab.numbers("card")) == len(rows)


def test_sorting_puts_rows_without_a_score_last(shown: Shown) -> None:
    tab, rows, _ = shown
    places = range(len(rows))
    without = [i for i in places if "copy_score" not in rows[i]]
    scored = [i for i in places if "copy_score" in rows[i]]
    assert (
        tab.numbers("card") == sorted(scored, key=lambda i: -rows[i]["copy_score"]) + without
    )  # the first thing one sees
    tab.choose("order", "lowest")
    assert tab.numbers("card") == sorted(scored, key=lambda i: rows[i]["copy_score"]) + without
    tab.choose("order", "data")
    assert tab.numbers("card") == list(places)
    tab.choose("order", "longest")
    # The script counts UTF-16 units; these prompts have one for each character.
    assert tab.numbers("card") == sorted(places, key=lambda i: -len(rows[i]["prompt"]))


def test_the_large_view_is_driven_by_keys(shown: Shown) -> None:
    tab, rows, _ = shown
    tab.choose("order", "data")
    tab.choose("split", "=train")

    def large() -> tuple[str, str]:
        return tab.run("find('words').textContent"), tab.run("find('at').textContent")

    tab.run("document.querySelector('.card').focus()")
    tab.press("Enter")
    assert tab.run("find('large').open") is True
    assert large() == (rows[60]["prompt"], "1 of 80")
    tab.press("ArrowLeft")
    assert large() == (rows[60]["prompt"], "1 of 80")
    for _ in range(9):
        tab.press("ArrowRight")
    assert large() == (rows[69]["prompt"], "10 of 80")
    tab.press("ArrowLeft")
    assert large() == (rows[68]["prompt"], "9 of 80")
    assert "c68" in tab.run("find('details').textContent")
    assert tab.run("document.querySelectorAll('#large-pair img').length") == 1 + len(rows[68]["reference_file_names"])
    for _ in range(75):
        tab.press("ArrowRight")
    assert large() == (rows[139]["prompt"], "80 of 80")  # beyond the first chunk of cards, and no further
    tab.press("Escape")
    assert tab.run("find('large').open") is False
    end = time.monotonic() + 10
    while tab.run("document.activeElement.dataset.row") != "139":  # a browser closes in a task of its own
        assert time.monotonic() < end, tab.run("document.activeElement.outerHTML")


def test_hostile_text_stays_text(shown: Shown) -> None:
    tab, rows, _ = shown
    tab.choose("order", "data")
    tab.numbers("card")
    prompts = tab.run("[...document.querySelectorAll('.card .prompt')].map((one) => one.textContent)")
    assert prompts == [row["prompt"] for row in rows]
    assert set(tab.run("[...find('style').options].map((one) => one.textContent)")) >= {"</option><i>"}
    names = tab.run("[...document.querySelectorAll('#refused-rows td:first-child')].map((one) => one.textContent)")
    assert names == [f"{i} {HOSTILE[i % 7]}" for i in range(9)]
    assert tab.run("document.querySelectorAll('b b, .prompt *, td img, td script, svg[onload]').length") == 0
    assert tab.run("document.title") == f"<set> – {len(rows)} triplets"
    assert tab.complaints() == []
    tab.choose("stage", "=dedup")
    assert tab.run("document.querySelectorAll('#refused-rows tr').length") == 4


def test_ten_thousand_triplets_stay_quick(browser: Browser, tmp_path: Path) -> None:
    rows = write_data(tmp_path / "set", {"train": 10_000})
    assert run("--data", tmp_path / "set", "--out", tmp_path / "page.html", "--max-triplets", 10_000) == 0
    tab = Tab(browser)
    start = time.monotonic()
    tab.open(tmp_path / "page.html")
    assert tab.run("find('count').textContent") == "10,000 of 10,000 shown"
    assert time.monotonic() - start < 10  # about 0.5 s
    assert tab.run("document.querySelectorAll('*').length") < 6000  # cards are made as one comes near them
    start = time.monotonic()
    tab.choose("text", "number 777")
    found = sum("number 777" in row["prompt"] for row in rows)
    assert tab.run("document.querySelectorAll('.card').length") == found == 11
    assert time.monotonic() - start < 2  # about 0.05 s


# --- the picture of the documentation ---------------------------------------------------------------------------------


def make_picture(out: Path) -> None:
    """The page over real drawings, as a screenshot 1400 pixels wide."""
    from data_tools import build

    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "emoji_styles"
        words = ["--config", str(ROOT / "configs/data/emoji_styles.yaml"), "--out", str(data)]
        assert build.main([*words, "--pair.max-triplets-per-split", "300"]) == 0
        assert run("--data", data, "--out", Path(place) / "page.html") == 0
        with chromium() as browser:
            tab = Tab(browser, 1400, 1340)
            tab.open(Path(place) / "page.html")
            tab.run("new Promise((done) => setTimeout(done, 300))")
            shot = tab.screenshot()
        Image.open(io.BytesIO(shot)).convert("RGB").save(out, optimize=True)


if __name__ == "__main__":
    make_picture(Path(sys.argv[1]))
