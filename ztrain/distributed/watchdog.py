"""The watchdog of processes that train together: when one hangs or is gone, all end, and a sentence names the one.

In: what each process does as it goes, `watchdog.mark("reading data", step)`. Out, where nothing moves for `timeout`
seconds: one sentence on stderr with the ranks that are behind, and the end of every process with `STATUS`. A timeout of
the process group would know neither who is behind nor whether the others only wait for one that fills the cache for
hours. Two threads do it, which run where the main one is stuck in a collective: one exchanges heartbeats through the
group's store and judges them, one watches whether the store answers.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any, NoReturn

import torch.distributed as dist

from ztrain.interrupt import Interruption

STATUS = 75
"""Exit status of a process that ends because the job hangs: EX_TEMPFAIL of sysexits.h, try again. `latest` goes on."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a process says of itself; the defaults are of one that has said nothing yet."""

    rank: int
    host: str = "?"
    sent: float = 0.0  # by its own clock: another one each time
    marks: int = 0  # calls of `mark` so far; all processes make the same ones, so fewer is behind
    doing: str = "starting"
    step: int | None = None
    line: str = ""  # innermost one of the main thread, as `function (file:line)`; "" while all is well
    idle: float = 0.0  # seconds without progress
    age: float = 0.0  # seconds since it came, where it is read

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}{self.line and f', in {self.line}'})"

    @property
    def where(self) -> str:
        return self.doing if self.step is None else f"{self.doing} at step {self.step}"


class Watchdog:
    """One process's part; see the module. `mark` costs less than a microsecond and waits for nothing."""

    def __init__(self, timeout: float, interruption: Interruption) -> None:
        """`timeout`: seconds. `interruption`: told of the signal by which another process leaves before its steps."""
        self.timeout, self.interval = timeout, min(timeout / 20, 2.0)
        self._interruption, self._rank = interruption, int(os.environ.get("RANK", "0"))
        self._place: tuple[int, str, int | None, bool] = (0, "starting", None, True)
        self._signs: tuple[Any, ...] = ()
        self._moved = self._answered = time.monotonic()  # the main thread, the store
        self._store: Any = dist.HashStore()
        self._heard: dict[int, tuple[Heartbeat, float]] = {}  # by rank, with the time when it came
        self._over, self._main = threading.Event(), threading.main_thread().ident or 0

    def mark(self, doing: str, step: int | None = None, *, patient: bool = False) -> None:
        """Says what this process does from now on. All processes make the same calls in the same order.

        `patient`: a long task (filling, compiling, validating, saving), which moves as long as the main thread is found
        at another line each time or files are read or written; so a loop without end is not seen there. Time on the
        processor does not count: whoever waits for a GPU's collective spends it too. Else only the next call counts.
        """
        self._place, self._moved = (self._place[0] + 1, doing, step, patient), time.monotonic()

    def idle(self) -> float:
        """Seconds since this process has moved; in a patient task, since its main thread or its files have."""
        if self._place[3]:
            lines = [(f.f_code, f.f_lasti) for f, _ in traceback.walk_stack(sys._current_frames()[self._main])]
            usage, files = getrusage(RUSAGE_SELF), b""
            with suppress(OSError):  # on Linux also what the main thread reads from memory
                files = Path(f"/proc/self/task/{os.getpid()}/io").read_bytes()
            if (signs := (*lines, files, usage.ru_majflt, usage.ru_inblock, usage.ru_oublock)) != self._signs:
                self._signs, self._moved = signs, time.monotonic()
        return time.monotonic() - self._moved

    def ending(self, status: int = 0) -> int:
        """The first exit status by which any process had to end, which all end by; 0: none so far. Tells the others
        `status`, or the signal by which this process leaves before its first step."""
        leaving = self._interruption.leaving
        with suppress(RuntimeError):  # of a store that is gone
            return int(self._store.compare_set("ending", "", str(status or (leaving and 128 + leaving) or "")) or 0)
        return 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around all that a process does. An error of a collective is no news but that somebody is gone: the sentence
        before it says who, once it is known."""
        if os.environ.get("WORLD_SIZE", "1") != "1":
            threading.Thread(target=self._watch, daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            if self._heard and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
                time.sleep(8 * self.interval)
                silent = [beat for beat in self._beats() if beat.age > 4 * self.interval]
                for beat in silent if time.monotonic() - self._answered < 4 * self.interval else ():
                    os.write(2, f"\nerror: no word from {beat}, last told {beat.where}: gone; the job ends\n".encode())
            raise
        finally:
            self.ending()
            self._over.set()

    def join(self, rank: int, count: int) -> None:
        """Once the process group is there: from here on processes hear of each other."""
        if count > 1:
            self._store = dist.PrefixStore("ztrain/watchdog", dist.distributed_c10d._get_default_store().clone())
            for other in range(count):
                self._heard[other] = (Heartbeat(other), time.monotonic())
                self._store.compare_set(str(other), "", json.dumps(asdict(Heartbeat(other))))
            self._rank, self._answered = rank, time.monotonic()
            threading.Thread(target=self._exchange, daemon=True).start()

    def _exchange(self) -> None:
        """Sends and reads heartbeats until the end; a store that fails is left alone, and `_watch` will see it."""
        with suppress(RuntimeError):  # torch.distributed.DistError and its kind
            while not self._over.wait(self.interval):
                self._store.set(str(self._rank), json.dumps(asdict(self._beat())))
                for beat in (Heartbeat(**json.loads(t)) for t in self._store.multi_get([*map(str, self._heard)])):
                    if beat.sent != self._heard[beat.rank][0].sent:
                        self._heard[beat.rank] = (beat, time.monotonic())
                self._answered = time.monotonic()
                if (ending := self.ending()) == STATUS:
                    self._abort()
                if ending and not self._interruption.leaving:
                    self._interruption.follow(ending - 128)
                if self.idle() >= self.timeout and (sentence := describe(self._beats(), self.timeout)):
                    self._abort(sentence if self._store.add("told", 1) == 1 and self.ending(STATUS) else "")

    def _watch(self) -> None:
        """Ends the process where it has not moved and the store does not answer: who is behind cannot be read then."""
        while not self._over.wait(self.interval):
            idle, silence = self.idle(), time.monotonic() - self._answered
            if idle < self.timeout + 4 * self.interval or silence < self.timeout / 2:
                continue
            beat, count, *address = self._beat(), *map(os.environ.get, ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
            self._abort(
                f"rank {beat.rank} ({beat.host}) has been {beat.where} for {idle:.0f} s, and rank 0 or its launcher,"
                f" which knows where all stand, has not answered for {silence:.0f} s: most likely that machine or"
                " process is gone or hangs; the job ends"
                if self._heard else
                f"rank {beat.rank} has waited {self.timeout:.0f} s for all {count} processes to meet at"
                f" {':'.join(map(str, address))}: one did not start, or cannot reach that address; the job ends"
            )  # fmt: skip

    def _abort(self, sentence: str = "") -> NoReturn:
        """Ends the process without clean-up, and not before others have read why: their collectives fail with it."""
        os.write(2, f"\nerror: {sentence}\n".encode() if sentence else b"")
        self._interruption.on_abort(STATUS)
        time.sleep(4 * self.interval if self._heard else 0)
        os._exit(STATUS)

    def _beat(self) -> Heartbeat:
        (marks, doing, step, _), idle, line = self._place, self.idle(), ""
        if idle > self.timeout / 2:
            [at] = traceback.extract_stack(sys._current_frames()[self._main], limit=1)
            line = f"{at.name} ({Path(at.filename).name}:{at.lineno})"
        return Heartbeat(self._rank, socket.gethostname(), time.monotonic(), marks, doing, step, line, idle)

    def _beats(self) -> list[Heartbeat]:
        now = time.monotonic()
        return [replace(beat, idle=beat.idle + now - at, age=now - at) for beat, at in list(self._heard.values())]


def describe(beats: Sequence[Heartbeat], timeout: float) -> str:
    """The sentence on who hangs, where those furthest behind have not moved for `timeout` seconds; "" while one of them
    moves: then the others only wait for it."""
    behind = [beat for beat in beats if beat.marks == min(other.marks for other in beats)]
    seconds, first = min(beat.idle for beat in behind), behind[0]
    if seconds < timeout:
        return ""
    if silent := [beat for beat in beats if beat.age > timeout / 2]:
        named = _listed([f"{beat}, last told {beat.where}" for beat in silent], "; ")
        return f"no word for {max(b.idle for b in silent):.0f} s from {named}: stopped or gone; the job ends"
    if len(behind) < len(beats):
        step = "" if first.step is None else f"step {first.step}: "
        doing = f"{'has' if len(behind) == 1 else 'have'} been {first.doing} for {seconds:.0f} s"
        return f"{step}{_listed(behind)} {doing} while the others wait; the job ends"
    alike = f"all {len(beats)} processes have been {first.where} for {seconds:.0f} s"
    [(common, often), *_] = Counter(beat.line for beat in beats).most_common()
    if len(beats) / 2 < often < len(beats):
        odd = _listed([beat for beat in beats if beat.line != common])
        return f"{alike}; most stand in {common}, but {odd}: look there first; the job ends"
    return f"{alike}, and which of them hangs cannot be told: {_listed(beats, '; ')}; the job ends"


def _listed(named: Sequence[object], between: str = ", ") -> str:
    return between.join(map(str, named[:8])) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
