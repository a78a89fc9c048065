"""tests/fuzz.py: some of its inputs each time, and that it sees what it is there to see. `make test-all` runs more."""

import os
from pathlib import Path

import pytest

from tests.forge import the_forge

pytestmark = pytest.mark.usefixtures("forge")

# Reads as the fuzzer's own targets do, and goes wrong in each of the ways at a number of its own.
FAULTY = """
import os, random, sys, time
import tests.fuzz as fuzz
from ztrain.errors import InputError

class Faulty(fuzz.Target):
    patterns = ("*.bin",)
    number = 0
    def fill(self):
        (self.folder / "a.bin").write_bytes(b"0" * 64)
    def input(self, draw):  # counts its calls over the processes
        self.number = int(open(sys.argv[-1]).read())
        open(sys.argv[-1], "w").write(str(self.number + 1))
        return super().input(draw)
    def read(self, path):
        if self.number == 1: raise InputError("a right answer")
        if self.number == 2: raise KeyError("a traceback")
        if self.number == 3: self.held = bytearray(os.urandom(96 << 20))
        if self.number == 4: time.sleep(60)
        if self.number == 6: os.abort()

fuzz.TARGETS["tars"] = Faulty
open(sys.argv[-1], "w").write("0")
sys.exit(fuzz.main(sys.argv[1:-1]))
"""


def test_no_fault_of_a_file_ends_in_anything_but_a_sentence(tmp_path: Path) -> None:
    """A few inputs of each target, the same each time."""
    words = ["tests.fuzz", "--count", "4", "--minutes", "10", "--finds", str(tmp_path)]
    done = the_forge().run(words, dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("4 inputs, nothing found") == 7


def test_an_exception_a_hang_a_crash_and_too_much_memory_are_found(tmp_path: Path) -> None:
    limits = ["--count", "9", "--seconds", "2", "--memory-mib", "64"]
    words = ["--only", "tars", *limits, "--finds", str(tmp_path / "finds")]
    done = the_forge().run(["-c", FAULTY, *words, str(tmp_path / "number")], dict(os.environ))
    assert done.returncode == 1, done.stdout + done.stderr
    for told in ("KeyError at ", "memory while reading .bin", ".bin: hangs for 2 s", ".bin: the process ends with -6"):
        assert told in done.stdout, done.stdout
    assert "InputError" not in done.stdout
    kept = {path.name: (path / "told.txt").read_text() for path in (tmp_path / "finds").iterdir()}
    assert len(kept) == 4 and "KeyError: 'a traceback'" in kept["tars-0-2"]
    assert all((tmp_path / "finds" / name / "a.bin").is_file() for name in kept)
