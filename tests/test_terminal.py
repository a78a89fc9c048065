"""What a program prints: foreign text as escapes, in any encoding; one sentence for what a user can mend."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztrain.errors import InputError
from ztrain.terminal import command, guarded, printable, program

HOSTILE = "\x1b]0;PWN\x07\x1b[2J\x1b[31m\u202egnp\r\x9b1m\ud800\u2066"


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str, *, tty: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="\n")
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty

    def said(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


@given(st.text(st.characters(exclude_categories=())))
def test_printable_text_holds_nothing_that_a_terminal_obeys(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert all(letter in "\n\t" or letter >= " " for letter in shown)
    assert not set(shown) & set("\x7f\x9b\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")
    assert printable(shown) == shown


def test_ordinary_text_stays() -> None:
    for text in ("café 日本 ✓", "a\tb\nc", "👩\u200d🎨"):
        assert printable(text) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_everything_printed_is_shown_as_escapes(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out, err = Terminal(encoding), Terminal(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def work() -> str:
        print(f"a note: {HOSTILE}")
        raise InputError(f"café 日本 {HOSTILE}: no such thing")

    assert command(work) == 2
    assert sys.stdout is out
    for said in (out.said(), err.said()):
        assert "\x1b" not in said and "\u202e" not in said and "\\x1b[31m\\u202egnp" in said
    assert err.said().startswith("error: caf") and err.said().count("\n") == 1


def test_a_terminal_keeps_the_colours_and_bars_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal("utf-8", tty=True)
    monkeypatch.setattr(sys, "stdout", out)
    with guarded():
        sys.stdout.write("\r 50%\x1b[A\x1b[1mbold\x1b[0m\x1b]0;title\x07")
    assert out.said() == "\r 50%\x1b[A\x1b[1mbold\x1b[0m\\x1b]0;title\\x07"


def test_exit_status_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(lambda: "done") == 0 and capsys.readouterr().out == "done\n"
    assert command(lambda: 3) == 3 and command(lambda: None) == 0 and program(len)(["a", "b"]) == 2
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        command(lambda: 1 // 0)
