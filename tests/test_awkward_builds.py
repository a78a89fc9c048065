"""Whole builds from folders as people have them: odd names, links, tables of other programs, words of others."""

import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_tools import inspect, pack
from data_tools.build import main as build
from data_tools.groups import StyleFolders
from data_tools.label import LabelRules, label
from data_tools.stages import Run, Table, attach
from tests.triplets import picture
from ztrain.data.reading import read_triplets
from ztrain.images import open_image
from ztrain.io.yamls import dump_yaml

WORDS = ("café", "naïve", "über", "piñata")
ALL_IN_TRAIN = {"shares": {"train": 1}}


def form(text: str, name: str) -> str:
    return unicodedata.normalize(name, text)


def save(path: Path, seed: int, caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, "PNG")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def run(folder: Path, out: Path, *, status: int = 0, **config: Any) -> dict[str, Any]:
    """The manifest of a build."""
    config = {"sources": ["in"], "dedup": None, "pair": {"triplets_per_target": 1}, **config}
    (folder / "build.yaml").write_text(dump_yaml(config))
    words = ["--config", str(folder / "build.yaml"), "--out", str(out), "--workers", "1"]
    assert build(words) == status
    return json.loads((out / "manifest.json").read_text(encoding="utf-8")) if status == 0 else {}


def left_out(out: Path) -> dict[str, str]:
    lines = (out / "left_out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return {row["name"]: row["reason"] for row in map(json.loads, lines)}


def test_what_is_passed_by_is_said_everywhere_and_decides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        save(tmp_path / f"in/ink/{number}.png", number, "blocks")
    save(tmp_path / "else/9.png", 9)
    (tmp_path / "in/oil").symlink_to("../else")
    (tmp_path / "in/ink/real.jxl").write_bytes(b"\xff\x0a" + bytes(20))
    (tmp_path / "in/film.mov").touch()
    manifest = run(tmp_path, tmp_path / "out", label={"styles": {}}, split=ALL_IN_TRAIN)
    said = capsys.readouterr().err
    assert manifest["triplets"] == {"train": 3} and manifest["counts"]["pictures"] == 3
    assert manifest["ignored"] == {".mov": 1, "JPEG XL pictures": 1, "links out of the sources": 1}
    assert manifest["counts"]["passed_by"] == 2 and list(manifest["passed_by"]) == ["in/ink/real.jxl", "in/oil"]
    reasons = left_out(tmp_path / "out")
    assert reasons == manifest["passed_by"] and "out of the sources" in reasons["in/oil"]
    assert inspect.main(["--data", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 0
    page, card = (tmp_path / "page.html").read_text(), (tmp_path / "out/README.md").read_text()
    for text in (said, page, card):
        assert all(word in text for word in (".mov", "JPEG XL pictures", "links out of the sources", "oil", "real.jxl"))
    assert str(tmp_path) not in card + page + json.dumps(manifest)
    (tmp_path / "in/.DS_Store").touch()
    (tmp_path / "in/.hidden").mkdir()
    assert run(tmp_path, tmp_path / "out", label={"styles": {}}, split=ALL_IN_TRAIN) == manifest
    assert "is up to date" in capsys.readouterr().out
    packed = tmp_path / "packed"
    assert pack.main(["--data", str(tmp_path / "out"), "--out", str(packed), "--format", "webdataset"]) == 0
    assert json.loads((packed / "manifest.json").read_text())["passed_by"] == manifest["passed_by"]


def test_formats_that_fill_a_folder_and_are_not_read_are_named_where_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jxl").write_bytes(b"\xff\x0a" + bytes(20))
    run(tmp_path, tmp_path / "out", status=2, label={"styles": {}})
    said = capsys.readouterr().err
    assert "error: in: no picture there; these are read: AVIF, BMP," in said and "ignored: 1 JPEG XL pictures" in said


@pytest.mark.parametrize("change", [lambda word: form(word, "NFC"), str.title], ids=["form", "capitals"])
def test_names_that_look_the_same_belong_together(tmp_path: Path, change: Any) -> None:
    for number, word in enumerate(WORDS):
        other = change(word)
        own = form(word, "NFD")
        save(tmp_path / f"side/in/ink/{own}.png", number)
        (tmp_path / f"side/in/ink/{other}.txt").write_text(f"a {number}")
        for start, style, name in ((30, "ink", own), (40, "oil", other)):
            save(tmp_path / f"table/in/{style}/{name}.png", start + number)
        save(tmp_path / f"ba/in/before/{own}.png", number + 60)
        save(tmp_path / f"ba/in/after/{other}.png", number + 70)
    table = tmp_path / "table"
    rows = [f"{form(word, 'NFC')},a {word},{split}\n" for word, split in zip(WORDS, ("train", "val") * 2, strict=True)]
    (table / "contents.csv").write_text("id,prompt,split\n" + "".join(rows))
    pairs = [f"ink\\{change(WORDS[0])}.png;ink\\{change(WORDS[1])}.png;a thing\n"]
    (table / "pairs.csv").write_text("Reference;Target;Prompt\n" + "".join(pairs))
    side = run(tmp_path / "side", tmp_path / "1", label={"styles": {}}, split=ALL_IN_TRAIN)
    styles = run(table, tmp_path / "2", label={"styles": {"contents": "contents.csv"}})
    given = run(table, tmp_path / "3", label={"pairs": {"table": "pairs.csv"}}, split=ALL_IN_TRAIN)
    both = run(tmp_path / "ba", tmp_path / "4", label={"before_after": {"prompt": "change it"}}, split=ALL_IN_TRAIN)
    found = [each["triplets"] for each in (side, styles, given, both)]
    assert found == [{"train": 4}, {"train": 4, "validation": 4}, {"train": 1}, {"train": 4}]
    assert not any(left_out(tmp_path / str(number)) for number in (1, 2, 4))
    contents = {row.columns["content"] for row in read_triplets(str(tmp_path / "2"), "train").triplets}
    assert contents == {form(WORDS[0], "NFC"), form(WORDS[2], "NFC")}
    [row] = read_triplets(str(tmp_path / "3"), "train").triplets
    assert form(WORDS[0], "NFD") in row.references[0].name, "files keep their own names"


def test_a_name_that_may_mean_two_is_none_and_the_reason_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("cat", "CAT", "dog", "bird")):
        save(tmp_path / f"in/{name}.png", number, "x")
    (tmp_path / "pairs.csv").write_text("reference,target,prompt\nDog.png,bird.png,p\nCat.png,dog.png,p\n")
    run(tmp_path, tmp_path / "out", status=2, label={"pairs": {"table": "pairs.csv"}}, split=ALL_IN_TRAIN)
    said = "'Cat.png' is not in the sources ('CAT.png' and 'cat.png' differ from it in capitals"
    assert said in (told := capsys.readouterr().err) and "1 of 2 rows" in told


def test_contents_that_look_the_same_are_kept_apart_or_counted(tmp_path: Path) -> None:
    for start, style, spelled in ((0, "ink", "NFD"), (50, "oil", "NFC"), (90, "pen", "NFC")):
        for number, word in enumerate((*WORDS, "crème", "façade", "Zoë", "señor")):
            name = form(word.swapcase() if style == "pen" else word, spelled)
            save(tmp_path / f"in/{style}/{name}.png", start + number, "a thing")
    split: dict[str, Any] = {"shares": {"train": 1, "validation": 1}}

    def folded(out: Path, name: str) -> set[str]:
        rows = read_triplets(str(out), name).triplets
        return {form(str(row.columns["content"]), "NFC").casefold() for row in rows}

    for apart in (["content"], []):
        out = tmp_path / f"out{len(apart)}"
        manifest = run(tmp_path, out, label={"styles": {}}, split={**split, "apart": apart})
        shared = folded(out, "train") & folded(out, "validation")
        assert manifest["shared"]["train and validation"]["contents"] == len(shared)
        assert (not shared) is bool(apart)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file systems elsewhere refuse such names")
@pytest.mark.parametrize("layout", ["imagefolder", "webdataset", "parquet"])
def test_paths_that_are_no_utf8_and_hostile_names(
    tmp_path: Path, layout: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b]0;PWN\x07\x1b[31m\u202egnp"
    folder, out = (Path(os.fsdecode(os.fsencode(tmp_path) + raw)) for raw in (b"/in\xff", b"/out\xff"))
    names = ["\udcfe.png", f"{hostile}.png", "plain.png", "=1+1.png"]
    for number, name in enumerate(names):
        save(folder / f"{hostile}style" / name, number, "blocks")
    (folder / f"{hostile}.jxl").write_bytes(b"\xff\x0a" + bytes(20))
    (folder / "broken\udcfa.png").write_bytes(b"none")
    config = {"label": {"styles": {}}, "split": ALL_IN_TRAIN, "max_refused_share": 0.5, "pack": {"format": layout}}
    (tmp_path / "link").symlink_to(folder)  # for no config holds such a name
    manifest = run(tmp_path, out, sources=["link"], **config)
    assert manifest["triplets"] == {"train": 4} and manifest["config"]["sources"] == ["link"]
    assert set(left_out(out)) == {f"in\\xff/{hostile}.jxl", "in\\xff/broken\\xfa.png"}
    rows = {row.index: row for row in read_triplets(str(out), "train").triplets} if layout != "parquet" else {}
    pixels = {picture(number).tobytes() for number in range(4)}
    assert layout == "parquet" or {open_image(row.target).tobytes() for row in rows.values()} == pixels
    card = (out / "README.md").read_text(encoding="utf-8")
    printed = capfd.readouterr()
    assert not set(card + printed.out + printed.err) & {"\x1b", "\x07", "\u202e"}
    assert "style" in card and r"\x1b]0;PWN\x07\x1b[31m\u202egnp.jxl: is a picture" in printed.err
    run(tmp_path, out, sources=["link"], **config)
    assert "is up to date" in capfd.readouterr().out


def test_home_stands_for_itself_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        save(tmp_path / f"home/in/{number}.png", number, "blocks")
    (tmp_path / "home/pairs.csv").write_text("reference,target,prompt\n0.png,1.png,p\n")
    config = {"sources": ["~/in"], "label": {"pairs": {"table": "$HOME/pairs.csv"}}, "split": ALL_IN_TRAIN}
    (tmp_path / "build.yaml").write_text(dump_yaml(config))
    assert build(["--config", "build.yaml", "--out=~/out", "--workers", "1"]) == 0
    assert (tmp_path / "home/out/train/metadata.jsonl").is_file() and not (tmp_path / "~").exists()
    told = json.loads((tmp_path / "home/out/manifest.json").read_text())["config"]
    assert (told["sources"], told["label"]["pairs"]["table"]) == (["in"], "pairs.csv")


def test_words_that_are_given_and_words_of_a_model_are_counted(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / f"in/{number}.png", number, "by hand" if number < 2 else None)
    run(tmp_path, tmp_path / "out", label={"styles": {}}, split=ALL_IN_TRAIN)
    scanned = Table.open(tmp_path / "out.work/scan")
    columns = scanned.read(["caption", "caption_from"]).to_pylist()
    for row in columns[2:3]:
        row |= {"caption": "by a model", "caption_from": "Some-VL@main, template content 12345678"}
    told = attach(scanned, tmp_path / "captioned", pa.Table.from_pylist(columns), name="caption", about=1)
    counts = label(told, LabelRules(styles=StyleFolders()), tmp_path / "labels", Run()).facts["counts"]
    assert (counts["captions_given"], counts["captions_by_a_model"]) == (2, 1)
