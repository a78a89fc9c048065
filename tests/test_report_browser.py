"""The report in a real Chromium: filters, sliders, the blind vote; it asks for nothing and runs nothing of the data.

The pictures of the documentation: python -m tests.test_report_browser DESKTOP.png PHONE.png [PLACE]
PLACE is a comparison or a run; without one the drawn comparison of these tests is shown.
"""

import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy.stats import binomtest

from tests.chromium import Browser, Tab, chromium
from tests.comparisons import make_comparison, make_run, make_sweep
from tests.test_inspect import HOSTILE
from ztrain.compare.record import Comparison
from ztrain.compare.report.page import make_report

WIDTHS = (1440, 390)
TEXTS = [
    *HOSTILE[:6],
    "long " * 2000 + "end",
    "🦊🏳️‍🌈 émoji ★",
    "\u05e9\u05dc\u05d5\u05dd \u0639\u0631\u0628\u064a\u202e",
]


@dataclass(frozen=True, slots=True)
class Shown:
    """A page in a tab, and what it shows."""

    tab: Tab
    found: Comparison
    path: Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Comparison]]:
    """Hostile texts everywhere."""
    folder = tmp_path_factory.mktemp("pages")
    found = make_comparison(folder / "set", prompts=dict(enumerate(TEXTS)), labels={2: TEXTS[0], 4: TEXTS[4]},
                            title=f"<i>set</i> {TEXTS[5]}")  # fmt: skip
    sweep = make_sweep(folder / "sweep", rows=2)
    return {
        "report": (make_report(folder / "set", folder / "report.html"), found),
        "blind": (make_report(folder / "set", folder / "blind.html", blind=True), found),
        "sweep": (make_report(folder / "sweep", folder / "sweep.html"), sweep),
        "run": (make_report(make_run(folder / "run"), folder / "run.html"), found),
    }


def opened(browser: Browser, page: tuple[Path, Comparison], width: int = 1440) -> Shown:
    tab = Tab(browser, width, 900)
    tab.open(page[0])
    tab.send("Page.bringToFront")  # hidden tabs wait a second for every timer
    return Shown(tab, page[1], page[0])


@pytest.fixture(scope="module")
def tab_of_report(browser: Browser, pages: dict[str, tuple[Path, Comparison]]) -> Shown:
    return opened(browser, pages["report"])


@pytest.fixture
def shown(tab_of_report: Shown) -> Shown:
    """The report at 1440 pixels as it was at first."""
    tab_of_report.tab.send("Page.bringToFront")
    tab_of_report.tab.run("find('large').close()")
    tab_of_report.tab.reset()
    return tab_of_report


def press(tab: Tab, key: str) -> None:
    """A letter, a space, or a named key."""
    if len(key) > 1:
        return tab.press(key)
    code = ord(key.upper())
    for kind, text in (("keyDown", {"text": key}), ("keyUp", {})):
        tab.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)


def text(tab: Tab, name: str) -> str:
    return str(tab.run(f"find('{name}').textContent"))


def mouse(tab: Tab, kind: str, x: float, y: float) -> None:
    held = 0 if kind == "mouseReleased" else 1
    tab.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=held, clickCount=1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "sweep", "run", "blind"])
def test_pages_open_from_disk_fit_and_ask_for_nothing(
    browser: Browser, pages: dict[str, tuple[Path, Comparison]], name: str, width: int
) -> None:
    shown = opened(browser, pages[name], width)
    tab = shown.tab
    if name == "blind":
        tab.run("find('begin').click()")
    else:
        tab.numbers("row")
        tab.run("document.querySelectorAll('details').forEach((one) => { one.open = one.id !== 'columns' })")
    assert tab.load_images() >= 3
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.requests() == [shown.path.resolve().as_uri()]
    assert tab.complaints() == []
    assert tab.run("getComputedStyle(document.body).fontVariantNumeric") == "tabular-nums"  # the style is let through
    if name in ("report", "sweep"):
        drawn = "[...document.querySelectorAll('#front ~ .sheet > svg')].map((one) => one.clientWidth > 0)"
        assert tab.run(drawn) == [width == 1440, width == 390]


def test_the_policy_stops_what_the_page_would_not_do(
    browser: Browser, pages: dict[str, tuple[Path, Comparison]]
) -> None:
    """And the detector of the other tests sees it."""
    tab = opened(browser, pages["report"]).tab
    assert {"img-src", "style-src-attr", "script-src-elem", "connect-src"} <= tab.broken_policies()
    assert tab.run("document.title") != "owned" and tab.complaints()


def test_hostile_texts_stay_text(shown: Shown) -> None:
    tab, found = shown.tab, shown.found
    assert tab.numbers("row") == list(range(12))
    prompts = tab.run("[...document.querySelectorAll('.row .prompt')].map((one) => one.textContent)")
    assert prompts == [row.prompt for row in found.rows]
    labels = tab.run("[...document.querySelectorAll('.row')][0].querySelectorAll('.caption bdi').length")
    assert labels == 2 + 7
    told = tab.run("[...document.querySelectorAll('.scores tbody th bdi')].map((one) => one.textContent)")
    assert told == [column.label for column in found.columns]
    assert tab.run("document.querySelector('h1').textContent") == found.title
    assert tab.run("document.querySelectorAll('b b, .prompt *, td script, svg[onload], h1 *, bdi *').length") == 0
    assert tab.run("document.title") == f"{found.title} – ztrain report"
    assert tab.run("[...find('left').options].map((one) => one.textContent)")[4] == TEXTS[4]
    assert tab.complaints() == []


def test_filters_and_orders_show_the_rows_that_fit(shown: Shown) -> None:
    tab, found = shown.tab, shown.found
    for style in ("ember", "orchid"):
        tab.choose("style", f"={style}")
        assert tab.numbers("row") == [i for i, row in enumerate(found.rows) if row.style == style]
    tab.reset()
    for words in ("<b>", "שלום", "NUMBER 1", "not there"):
        tab.choose("text", words)
        fits = [i for i, row in enumerate(found.rows) if words.lower() in row.prompt.lower()]
        assert tab.numbers("row") == fits and text(tab, "count") == f"{len(fits)} of 12 rows"
    assert tab.run("find('nothing').hidden") is False
    tab.reset()
    style = found.metric("style").values
    copies = found.metric("copy").values
    assert style is not None and copies is not None

    def first(table: Any, column: int, row: int) -> float:
        return table[column][row][0]  # the page begins with the first seed

    tab.choose("order", "highest")
    tab.choose("one", 2)
    assert tab.numbers("row") == sorted(range(12), key=lambda i: -first(style, 2, i))
    tab.choose("order", "apart")
    tab.choose("one", 5)
    tab.choose("other", 2)
    assert tab.numbers("row") == sorted(range(12), key=lambda i: -abs(first(style, 2, i) - first(style, 5, i)))
    tab.choose("order", "gain")
    tab.choose("metric", 3)
    told = [i for i in range(12) if i != 4]  # of which no copy score can tell
    assert tab.numbers("row") == [*sorted(told, key=lambda i: -(first(copies, 5, i) - first(copies, 2, i))), 4]
    tab.choose("seed", "")
    means = {i: [sum(copies[column][i]) / 2 for column in (5, 2)] for i in told}
    assert tab.numbers("row") == [*sorted(told, key=lambda i: -(means[i][0] - means[i][1])), 4]
    tab.choose("order", "lowest")
    assert tab.numbers("row") == [*sorted(told, key=lambda i: means[i][0]), 4]
    assert tab.run("document.querySelectorAll('.row .shot').length") == 12 * 7 * 2
    tab.choose("one", 0)  # has no copy score: nothing to order by
    assert tab.numbers("row") == list(range(12))
    tab.reset()
    assert tab.run("document.querySelectorAll('.row .shot').length") == 12 * 7
    told = tab.run("[...document.querySelectorAll('.row')][2].querySelectorAll('.caption')[5].textContent")
    assert told == f"siglip + lora{first(style, 3, 2):.3f}"


def test_columns_can_be_left_out(shown: Shown) -> None:
    tab = shown.tab
    for place in (0, 4, 6):
        tab.run(f"find('column-list').querySelector('[value=\"{place}\"]').click()")
    shots = tab.run("[...document.querySelector('.row').querySelectorAll('.shot')].map((one) => one.dataset.at)")
    assert shots == ["1,0,0", "2,0,0", "3,0,0", "5,0,0"]
    tab.reset()
    assert tab.run("document.querySelectorAll('.row .shot').length") == 12 * 7


def test_the_large_view_is_driven_by_keys(shown: Shown) -> None:
    tab, found = shown.tab, shown.found
    tab.choose("style", "=ember")
    rows = tab.numbers("row")
    tab.run("document.querySelector('.shot').focus()")
    press(tab, "Enter")

    def large() -> tuple[str, str]:
        return text(tab, "words"), tab.run("find('large-name').querySelector('bdi').textContent")

    labels = [column.label for column in found.columns]
    assert tab.run("find('large').open") is True and large() == (found.rows[rows[0]].prompt, labels[0])
    press(tab, "ArrowLeft")
    press(tab, "ArrowUp")
    assert large() == (found.rows[rows[0]].prompt, labels[0])
    for _ in range(3):
        press(tab, "ArrowRight")
    press(tab, "ArrowDown")
    assert large() == (found.rows[rows[1]].prompt, labels[3])
    values = found.metric("style").values
    assert values is not None
    scores = tab.run("[...find('large-scores').querySelectorAll('dd')].map((one) => one.firstChild.textContent)")
    assert len(scores) == 5 and float(scores[0]) == pytest.approx(values[3][rows[1]][0], abs=6e-4)
    assert text(tab, "at") == f"row 2 of {len(rows)}" and f"seed {found.rows[rows[1]].seeds[0]}" in text(
        tab, "large-name"
    )
    for _ in range(9):
        press(tab, "ArrowDown")
        press(tab, "ArrowRight")
    assert large() == (found.rows[rows[-1]].prompt, labels[6])
    press(tab, "Escape")
    assert tab.run("find('large').open") is False
    end = time.monotonic() + 10
    while tab.run("document.activeElement.dataset.at") != f"6,{rows[-1]},0":  # a browser closes in a task of its own
        assert time.monotonic() < end, tab.run("document.activeElement.outerHTML")


def test_before_and_after_by_keys_and_by_dragging(shown: Shown) -> None:
    tab, found = shown.tab, shown.found
    assert (text(tab, "name-left"), text(tab, "name-right")) == ("splice", "siglip + lora")  # baseline, best
    clip = "find('wipe-left').style.clipPath"
    assert tab.run(clip) == "inset(0px 50% 0px 0px)"
    tab.run("find('cut').focus()")
    for _ in range(4):
        press(tab, "ArrowRight")
    assert tab.run(clip) == "inset(0px 48% 0px 0px)"
    tab.run("find('wipe').scrollIntoView({block: 'center'})")
    box = tab.run(
        "(() => { const b = find('wipe').getBoundingClientRect(); return [b.left, b.top, b.width, b.height] })()"
    )
    y = box[1] + box[3] / 2
    mouse(tab, "mousePressed", box[0] + 0.6 * box[2], y)
    mouse(tab, "mouseMoved", box[0] + 0.03 * box[2], y)
    mouse(tab, "mouseReleased", box[0] + 0.03 * box[2], y)
    left = float(tab.run("find('edge').style.left").removesuffix("%"))
    assert left == pytest.approx(3, abs=0.6)  # at the pointer, though a range has a thumb of its own
    press(tab, "ArrowDown")
    assert text(tab, "slide-words") == found.rows[1].prompt and tab.run("find('slide-row').value") == "1"
    tab.choose("left", 0)
    shown_url = tab.run("find('wipe-left').src === payload.pictures[drawn[0][1][0]].url")
    assert shown_url is True and text(tab, "name-left") == "no image"
    tab.choose("slide-row", 0)
    tab.choose("left", 1)


def test_tips_give_definitions(shown: Shown) -> None:
    tab, found = shown.tab, shown.found
    tab.run("new Promise((done) => { scrollTo(0, 0); setTimeout(done, 100) })")  # a tip goes when the page is scrolled
    tab.run("document.querySelector('.scores thead button').click()")
    told = text(tab, "tip")
    assert found.metric("style").definition in told and "Higher is better; range -1 to 1." in told
    assert "weights 9c4e1f20aa" in told and tab.run("find('tip').hidden") is False
    box = tab.run(
        "(() => { const b = find('tip').getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom] })()"
    )
    assert box[0] >= 0 and box[1] >= 0 and box[2] <= 1440
    tab.run("document.querySelector('h1').click()")
    assert tab.run("find('tip').hidden") is True


def test_the_map_of_a_sweep_shows_two_axes_at_the_chosen_rest(
    browser: Browser, pages: dict[str, tuple[Path, Comparison]]
) -> None:
    shown = opened(browser, pages["sweep"])
    tab, found = shown.tab, shown.found
    axes = list(found.axes)
    cells = "[...find('map').tBodies[0].rows].map((line) => [...line.querySelectorAll('td')].map((c) => c.textContent))"

    def expected(metric: str, x: str, y: str, held: dict[str, Any]) -> list[list[str]]:
        means = found.metric(metric).means
        table = []
        for down in found.axes[y]:
            places = [{**held, x: across, y: down} for across in found.axes[x]]
            told = [means[[c.settings for c in found.columns].index(place)] for place in places]
            table.append([f"{mean.mean:.3f}" for mean in told if mean is not None])
        return table

    best = found.columns[found.best.column or 0].settings
    assert tab.run(cells) == expected("style", axes[0], axes[1], {axes[2]: best[axes[2]]})
    assert tab.run("find('map').querySelectorAll('td.best').length") == 1
    tab.choose("map-x", axes[2])
    tab.choose("map-metric", 1)
    assert tab.run(cells) == expected("prompt", axes[2], axes[1], {axes[0]: best[axes[0]]})
    tab.choose("map-y", axes[2])  # the other gives way
    assert tab.run("find('map-x').value") == axes[0]
    assert tab.run("document.querySelectorAll('.scores tbody tr:not([hidden])').length") == 14
    tab.run("find('all-lines').click()")
    assert tab.run("document.querySelectorAll('.scores tbody tr:not([hidden])').length") == 32
    assert tab.complaints() == []


def test_previews_go_through_the_steps(browser: Browser, pages: dict[str, tuple[Path, Comparison]]) -> None:
    tab = opened(browser, pages["run"]).tab
    assert text(tab, "step-name") == "step 300" and tab.run("find('strip').children.length") == 3
    shown = "find('strip').querySelectorAll('img')[1].src === payload.pictures[drawn[{}][0][0]].url"
    assert tab.run(shown.format(5)) is True
    tab.choose("step", 1)
    assert text(tab, "step-name") == "step 100" and tab.run(shown.format(3)) is True
    tab.run("find('step').focus()")
    press(tab, "ArrowLeft")
    assert text(tab, "step-name") == "step 0"
    tab.run("find('play').click()")
    assert tab.run("new Promise((done) => setTimeout(() => done(find('step-name').textContent), 900))") == "step 100"
    tab.run("find('play').click()")
    tab.choose("step", 3)
    tab.run("find('play').click()")  # from the end it starts anew
    assert text(tab, "step-name") == "step 0"
    assert tab.run("document.querySelectorAll('.chart svg').length") >= 9


# --- the blind vote ---------------------------------------------------------------------------------------------------


def votes_of(tab: Tab) -> dict[str, Any]:
    """What the file holds that Save gives, caught on its way to the disk."""
    return json.loads(
        tab.run("""new Promise((done) => {
      const made = URL.createObjectURL;
      const click = HTMLAnchorElement.prototype.click;
      HTMLAnchorElement.prototype.click = function () {
        if (this.download !== "votes.json") throw new Error("no name");
      };
      URL.createObjectURL = (blob) => { blob.text().then(done); return made.call(URL, blob); };
      find("save").click();
      URL.createObjectURL = made;
      HTMLAnchorElement.prototype.click = click;
    })""")
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_a_blind_vote_from_first_to_last(
    browser: Browser, pages: dict[str, tuple[Path, Comparison]], width: int
) -> None:
    shown = opened(browser, pages["blind"], width)
    tab, found = shown.tab, shown.found
    tab.choose("seeds", "all")
    assert text(tab, "pairs") == "24 pairs"
    tab.run("find('begin').click()")
    sides = []
    for number in range(24):
        assert text(tab, "where") == f"{number + 1} of 24"
        visible = tab.run("find('ask').innerText + document.title + find('picture-a').innerHTML.slice(0, 40)")
        assert "splice" not in visible.replace(found.title, "") and "siglip" not in visible
        best_is_a = tab.run(
            "(() => { const p = state.pairs[state.at]; return find('picture-a').querySelector('img').src =="
            " payload.pictures[drawn[3][p.row][p.seed]].url })()"
        )
        sides.append(best_is_a)
        if number % 6 == 5:
            press(tab, " ")
        elif number % 6 == 4:  # against the best
            press(tab, "b" if best_is_a else "a")
        elif number % 6 == 3:
            tab.run(f"find('{'a' if best_is_a else 'b'}').click()")
        else:
            press(tab, "A" if best_is_a else "B")
    assert sum(sides) == 12  # as often on the one side as on the other
    assert tab.run("find('result').hidden") is False
    assert text(tab, "verdict") == "Of these votes more are for siglip + lora than for splice"
    saved = votes_of(tab)
    assert {key: saved["result"][key] for key in ("wins", "losses", "ties")} == {"wins": 16, "losses": 4, "ties": 4}
    assert (saved["one"], saved["other"], len(saved["votes"])) == ("siglip_lora", "splice", 24)
    by_hand = binomtest(18, 24).proportion_ci(method="wilson")  # 16 wins and 4 ties as half
    assert saved["result"]["rate"] == 0.75
    assert (saved["result"]["low"], saved["result"]["high"]) == pytest.approx((by_hand.low, by_hand.high), abs=1e-9)
    assert f"[{100 * by_hand.low:.1f} %, {100 * by_hand.high:.1f} %]" in text(tab, "rate")
    for entry in saved["votes"]:
        assert found.rows[entry["row"]].prompt == entry["prompt"] and entry["seed"] in found.rows[entry["row"]].seeds
    assert tab.run("document.querySelectorAll('.row').length") == 24 and tab.complaints() == []
    assert tab.run("document.documentElement.scrollWidth") == width
    tab.run("unsaved = false")


def test_a_vote_goes_on_from_its_file_and_refuses_others(
    browser: Browser, pages: dict[str, tuple[Path, Comparison]]
) -> None:
    tab = opened(browser, pages["blind"]).tab
    tab.choose("one", 0)
    tab.choose("other", 0)
    assert tab.run("find('begin').disabled") is True
    tab.choose("one", 2)
    tab.choose("seed", 77)
    tab.run("find('begin').click()")
    order = tab.run("state.pairs.map((pair) => [pair.row, pair.swapped])")
    assert sorted(row for row, _ in order) == list(range(12)) and order != sorted(order)
    for key in ("a", "b", " ", "b"):
        press(tab, key)
    press(tab, "ArrowLeft")
    press(tab, "a")  # thought better of
    tab.run("find('finish').click()")
    saved = votes_of(tab)
    assert [entry["row"] for entry in saved["votes"]] == [row for row, _ in order[:4]]
    won = ["one" if (key == "a") != swapped else "other" for key, (_, swapped) in zip("ab a", order, strict=False)]
    assert [entry["vote"] for entry in saved["votes"]] == [won[0], won[1], "tie", won[3]]
    assert text(tab, "verdict").startswith("Of these votes not clearly more are for either: ")
    assert "not asked8" in text(tab, "tally") and tab.run("find('on').hidden") is False
    tab.run("unsaved = false")
    again = opened(browser, pages["blind"]).tab
    for document, complaint in (
        ("{", "no JSON"),
        ("null", "no votes of a ztrain report"),
        (json.dumps(saved | {"version": 2}), "no votes of a ztrain report"),
        (json.dumps(saved | {"comparison": "0"}), "about another comparison"),
        (json.dumps(saved | {"seed": 78, "pairs": 5}), "do not fit"),
        (json.dumps(saved | {"votes": [saved["votes"][0] | {"vote": "<b>"}]}), "do not fit"),
        (json.dumps(saved | {"votes": [None, 1e308, "a\0b"]}), "do not fit"),
        (json.dumps(saved | {"seed": 1e308}), "do not fit"),
        (json.dumps(saved | {"one": saved["other"]}), "do not fit"),
    ):
        load(again, document)
        assert complaint in text(again, "trouble") and again.run("find('start').hidden") is False
    load(again, json.dumps(saved))
    assert again.run("find('ask').hidden") is False and text(again, "where") == "5 of 12"
    assert again.run("state.pairs.map((pair) => [pair.row, pair.swapped])") == order
    again.run("find('finish').click()")
    assert votes_of(again) == saved and again.complaints() == []


def load(tab: Tab, document: str) -> None:
    """As if a person had chosen this file."""
    tab.run(f"""new Promise((done) => {{
      const given = new DataTransfer();
      given.items.add(new File([{json.dumps(document)}], "votes.json"));
      find("load").files = given.files;
      find("load").dispatchEvent(new Event("change"));
      setTimeout(done, 60);
    }})""")


def test_wilson_is_scipys_and_ties_are_half(browser: Browser, pages: dict[str, tuple[Path, Comparison]]) -> None:
    tab = opened(browser, pages["blind"]).tab
    for votes in (1, 2, 7, 30, 400):
        for wins in {0, 1, votes // 3, votes}:
            ours = tab.run(f"wilson({wins}, 0, {votes})")
            theirs = binomtest(wins, votes).proportion_ci(method="wilson")
            assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert tab.run("wilson(3, 4, 11)") == tab.run("wilson(5, 0, 11)")
    half = tab.run("wilson(0, 5, 5)")
    assert half["rate"] == 0.5 and half["low"] == pytest.approx(1 - half["high"])


def test_a_thousand_pictures_open_at_once(browser: Browser, tmp_path: Path) -> None:
    found = make_comparison(tmp_path / "set", rows=62, seeds=2)
    page = make_report(tmp_path / "set", tmp_path / "page.html", max_rows=62)
    tab = Tab(browser, 1440, 900)
    start = time.monotonic()
    tab.open(page)
    assert text(tab, "count") == "62 of 62 rows"
    assert time.monotonic() - start < 10  # about 0.5 s
    tab.send("Page.bringToFront")
    assert tab.run("payload.drawn.flat(2).length + 2 * payload.rows.length") == 62 * (7 * 2 + 2) == 992
    assert tab.run("payload.pictures.length") > 950  # few are alike by chance
    assert tab.run("document.querySelectorAll('.row').length") < 40  # rows are made as one comes near them
    tab.run("document.querySelector('.shot').click()")
    for _ in range(40):
        press(tab, "ArrowDown")
    press(tab, "Escape")
    end = time.monotonic() + 10
    while tab.run("document.activeElement.dataset.at") != "0,40,0":  # the row is made when one goes there
        assert time.monotonic() < end, tab.run("document.activeElement.outerHTML")
    start = time.monotonic()
    tab.choose("order", "apart")
    assert len(tab.numbers("row")) == len(found.rows)
    assert time.monotonic() - start < 5  # about 0.2 s
    assert tab.complaints() == []


# --- the pictures of the documentation --------------------------------------------------------------------------------


def make_pictures(desktop: Path, phone: Path, place: Path | None) -> None:
    """The beginning of the page, 1440 and 390 pixels wide."""
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        if place is None:
            place = Path(scratch) / "set"
            make_comparison(place)
        page = make_report(place, Path(scratch) / "page.html")
        for out, width, height in ((desktop, 1440, 2000), (phone, 390, 1500)):
            tab = Tab(browser, width, height)
            tab.open(page)
            tab.send("Page.bringToFront")
            tab.run("new Promise((done) => setTimeout(done, 300))")
            Image.open(io.BytesIO(tab.screenshot())).convert("RGB").save(out, optimize=True)


if __name__ == "__main__":
    make_pictures(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
