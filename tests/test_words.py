"""Names that look the same, names that are no UTF-8, text that says nothing, and tables as any program saves them."""

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.captions import caption_of
from data_tools.names import from_letters, in_letters, kind_said, texts_beside
from data_tools.style_tables import Content, as_csv, read_contents
from ztrain.data.csvs import read_rows, read_table
from ztrain.data.reading import read_triplets
from ztrain.data.rows import check_text, clean
from ztrain.errors import InputError
from ztrain.io.forms import folded, matched

C, D = "caf\u00e9", "cafe\u0301"


ODD = [b"\\xff", b"\xff", b"\\\\xff", b"\\\xff", b"a\0", b"a\\x00", b"\\", b"\\\\", b"\\x", b"C:\\new.png"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=12) | st.sampled_from(ODD), max_size=6))
def test_any_name_is_written_in_letters_and_read_back(raw: list[bytes]) -> None:
    names = {os.fsdecode(name) for name in raw}
    written = {in_letters(name): name for name in names}
    assert len(written) == len(names), "no two names are written alike"
    for letters, name in written.items():
        assert letters.encode() and "\0" not in letters and from_letters(letters) == name
    assert in_letters("C:\\new.png") == "C:\\new.png" and in_letters("ü \u202e.png") == "ü \u202e.png"
    assert kind_said("a.png") == ".png" and kind_said("a") == "no extension"
    assert kind_said("a." + "x" * 99) == kind_said("a.<script>alert(1)") == "other extensions"


@pytest.mark.parametrize(
    ("wanted", "offered", "found", "unclear"),
    [
        ({"a"}, {"a", "A"}, {"a": "a"}, {}),
        ({"a"}, {"A", "b"}, {"a": "A"}, {}),
        ({C}, {D}, {C: D}, {}),
        ({D}, {C.upper(), "x"}, {D: C.upper()}, {}),
        ({C, D}, {C, D}, {C: C, D: D}, {}),
        ({C.upper()}, {C, D}, {}, {C.upper(): (D, C)}),  # in two Unicode forms: none of them to the letter
        ({"Cat"}, {"cat", "CAT"}, {}, {"Cat": ("CAT", "cat")}),
        ({"cat", "Cat"}, {"cat"}, {"cat": "cat"}, {}),  # it is the other's
        ({"Cat", "CAT"}, {"cat"}, {}, {"Cat": ("cat",), "CAT": ("cat",)}),
        ({"stra\u00dfe"}, {"STRASSE"}, {"stra\u00dfe": "STRASSE"}, {}),
    ],
)
def test_what_belongs_together(wanted: set[str], offered: set[str], found: Any, unclear: Any) -> None:
    matches = matched(wanted, offered)
    assert (matches.found, matches.unclear) == (found, unclear)
    for name in unclear:
        assert "in capitals or in their Unicode form alone" in matches.why_not(name)


def test_a_table_may_name_a_picture_twice() -> None:
    assert matched({C, D, C.upper(), "x"}, {D}, shared=True).found == {C: D, D: D, C.upper(): D}
    assert folded("\u1e9e\u0130") == folded(unicodedata.normalize("NFD", "\u1e9e\u0130"))


def test_texts_lie_beside_pictures_in_any_form_and_case() -> None:
    names = [D + ".TXT", "b.txt", "b.Txt", "b.caption", "B.json", "key.json", "z.txt", "two.json"]
    pictures = [C + ".png", "b.png", "key.0.png", "two.reference.0.png", "two.target.png"]
    found = texts_beside(pictures, names, keys=True)
    assert found == {C + ".png": [D + ".TXT"], "b.png": ["b.txt", "b.caption", "B.json"], "key.0.png": ["key.json"]}


UNSEEN = ["", " \n\t", "\u200b", "\u200b\ufeff\n", "\u2060\u00ad", "\x08\x1b", "\ufe0f", "\u0301", "\u115f\u3164\u2800",
          "\u202e\u202c", "\u2028", "\U000e0041"]  # fmt: skip


@pytest.mark.parametrize("text", UNSEEN)
def test_text_of_which_nothing_can_be_seen_is_empty(text: str) -> None:
    assert clean(text) == ""
    with pytest.raises(InputError, match=r"^row 1: the prompt is empty"):
        check_text(text, "the prompt", where="row 1")
    assert check_text(text, "the prompt", where="row 1", optional=True) == ""


def test_text_that_can_be_seen_stays_as_it_is() -> None:
    for text in ("a", "é", "日本", "👩\u200d🚀\ufe0f", "می\u200cخواهم", "!", "\ue000 icon", "a\u200bb\u00adc"):
        assert clean(f"\ufeff\u200b {text}\u3000\u2060\n") == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_no_caption(encoding: str) -> None:
    raw = "a tall tower".encode(encoding)
    for whose in ("sidecar .txt", "sidecar .caption", "column text"):
        refused = caption_of([(whose, raw)], (), {})["refused"]  # type: ignore[arg-type]
        assert refused == f"its caption ({whose}) holds NULs, as text in UTF-16 does; save it as UTF-8, or remove it"
    with pytest.raises(InputError, match=r"^train:3: prompt holds NULs.*save it as UTF-8$"):
        check_text(raw.decode(), "prompt", where="train:3")


def test_a_prompt_with_nuls_is_no_row_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name, prompt in (("a.png", "a\0b"), ("a.png", "\u200b"), ("a.png", "a box"), ("a\0.png", "a box")):
        row = {"reference_file_name": name, "target_file_name": "a.png", "prompt": prompt}
        with (tmp_path / "train/metadata.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    (tmp_path / "train/a.png").touch()
    listing = read_triplets(str(tmp_path), "train", max_bad_share=1)
    assert [row.prompt for row in listing.triplets] == ["a box"]
    reasons = [reason.rpartition("metadata.jsonl:")[2] for reason in listing.rejected]
    assert [reason.partition(";")[0] for reason in reasons] == [
        "1: prompt holds NULs, as text in UTF-16 does", "2: prompt is empty",
        "4: reference_file_name holds NULs, as text in UTF-16 does"]  # fmt: skip


TABLES = {
    "commas.csv": "\ufeffReference , TARGET,prompt,More\na.png,b.png,\"x, y\",1\n\n",
    "semicolons.csv": "reference;target;prompt;More\r\na.png;b.png;x, y;1\r\n",
    "quoted.csv": '"reference";"target";"prompt";"More"\n"a.png";"b.png";"x, y";"1"\n',
    "tabs.TSV": "reference\ttarget\tPrompt\tMore\na.png\tb.png\tx, y\t1\n",
    "lines.jsonl": '\ufeff{"Reference": "a.png", "target": "b.png", "prompt": "x, y", "More": "1"}\n\n',
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_reads_alike_whoever_saved_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TABLES[name].encode())
    [(where, row)] = read_rows(tmp_path / name, ["reference", "target", "prompt"])
    assert row == {"reference": "a.png", "target": "b.png", "prompt": "x, y", "More": "1"}
    assert where in (f"{tmp_path / name}:1", f"{tmp_path / name}:2")


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.csv", b"id,text\n1,a", "no column 'prompt'; its columns are: id, text"),
        ("a.csv", b"", "no column 'id'; its columns are: "),
        ("a.csv", b"id;prompt\n1;a;b", ":2: must have 2 fields, as many as the header, not 3"),
        ("a.csv", b"id,prompt,ID\n1,a,b", None),
        ("a.csv", b"Id,prompt,ID\n1,a,b", "the column 'id' stands 2 times; keep one"),
        ("a.csv", b'id,prompt\n"1"x,a', ":2: cannot read the table ("),
        ("a.csv", "id,prompt\n1,é".encode("utf-16"), "is not UTF-8 (byte 0); save it as UTF-8"),
        ("a.csv", b'id,prompt\n1,"a', "cannot read the table (unexpected end of data); mend its quotes"),
        ("a.jsonl", b'{"id": 1}', ":1: no column 'prompt'; it has 'id'"),
        ("a.jsonl", b"[1]", ":1: a row must be a JSON object, not list"),
        ("a.xlsx", b"", "a table must be one of .csv, .tsv, .jsonl"),
        ("none.csv", None, "cannot read the table (No such file or directory); correct its path"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_as_it_is(tmp_path: Path, name: str, raw: bytes | None, said: str) -> None:
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    if said is None:  # the exact name counts, and the other column is another one
        assert [row for _, row in read_rows(tmp_path / name, ["id", "prompt"])] == [
            {"id": "1", "prompt": "a", "ID": "b"}
        ]
        return
    with pytest.raises(InputError) as caught:
        list(read_rows(tmp_path / name, ["id", "prompt"]))
    assert str(caught.value).startswith(str(tmp_path / name)) and said in str(caught.value)


def test_a_table_in_the_place_of_which_is_a_pipe_or_too_long_a_line_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"a.csv: is no regular file, but a named pipe"):
        list(read_table(tmp_path / "a.csv", ["id"]))
    with (tmp_path / "b.jsonl").open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(InputError, match=r"b.jsonl: has 1,073,741,825 bytes, more than"):
        list(read_table(tmp_path / "b.jsonl", ["id"]))


def test_a_spreadsheet_takes_no_cell_for_a_formula(tmp_path: Path) -> None:
    contents = [
        Content("=a", '=HYPERLINK("http://x")', "train"),
        Content("b", "@c", "train"),
        Content("-c", "+1", "val"),
    ]
    (tmp_path / "contents.csv").write_text(text := as_csv(contents))
    assert read_contents(tmp_path / "contents.csv") == contents
    assert not any(cell.lstrip('"')[0] in "=+-@" for line in text.splitlines() for cell in line.split(","))
