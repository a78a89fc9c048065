"""The terminal: the one runner of every program here, and the one place where foreign text becomes terminal text.

Names of files, keys of tables, members of tars and words of models come with foreign data. A terminal would obey the
control characters in them; what a program prints shows them as escapes instead.
"""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from ztrain.errors import MENDABLE, sentence
from ztrain.interrupt import Stopped, leave_group, stoppable

_CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
_DIRECTION = "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # and the two rare line ends
_INVISIBLE = "\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff"
_OBEYED = re.compile(f"[{_CONTROL}{_DIRECTION}{_INVISIBLE}]")
_OF_PROGRAMS = re.compile("(\x1b\\[[0-9;]*[mA])")
"""Colours, and the line up of a progress bar: what programs write to a terminal themselves."""


def printable(text: str) -> str:
    """Foreign text as a terminal may have it: control characters, text-direction marks and half surrogates as escapes.

    Line feeds and tabs stay; a carriage return, which would overwrite the line, does not.
    """
    return _OBEYED.sub(_escaped, text.replace("\r", "\\r"))


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("ascii", "backslashreplace").decode() if ord(found[0]) > 0x7F else f"\\x{ord(found[0]):02x}"


class _Guard:
    """A stream that shows what a terminal would obey, and what its encoding lacks, as escapes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream.isatty():
            parts = _OF_PROGRAMS.split(text)
            parts[::2] = [_OBEYED.sub(_escaped, part) for part in parts[::2]]
            shown = "".join(parts)
        else:
            shown = _OBEYED.sub(_escaped, text)
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Around all that a program does: whatever is printed, also by libraries, is terminal text."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Guard(before[0]), _Guard(before[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def command(work: Callable[[], object]) -> int:
    """Runs a program and gives its exit status: what `work` returns is printed (an int is the status itself), what
    a user can mend is one sentence and status 2, and a signal 128 + its number (interrupt.py)."""
    with guarded():
        try:
            with stoppable():
                outcome = work()
            if outcome is not None and not isinstance(outcome, int):
                print(outcome, flush=True)
        except BrokenPipeError:  # `| head`: nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Stopped as stopped:
            print(f"{stopped}: stopped; what is finished is kept", file=sys.stderr)
            return leave_group(128 + stopped.number)
        except MENDABLE as error:
            print(f"error: {printable(sentence(error))}", file=sys.stderr)
            return 2
    return outcome if isinstance(outcome, int) else 0


def program(work: Callable[[Sequence[str] | None], object]) -> Callable[..., int]:
    """`work`, which takes the words of a command line (None: those of this process), as a program's main: it runs by
    `command` and returns the exit status."""

    @functools.wraps(work)
    def main(arguments: Sequence[str] | None = None) -> int:
        return command(lambda: work(arguments))

    return main
