"""Signals: a run that is told to stop finishes its step, saves and exits; no process outlives its launcher.

Exit status of a run that was stopped: 128 + the signal's number, as shells have it (143 for SIGTERM, 130 for SIGINT,
138 for SIGUSR1 on Linux). Launchers make 1 of it, so `ended.json` in the run's folder holds it as well.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what SLURM sends before its time limit when asked to (sbatch --signal)."""

ENDED = "ended.json"
"""Of a run's folder: {"status": exit status of its last start}; not there while it runs, or when rank 0 was killed."""

_ECHO_SECONDS = 3.0
_UNWIND_SECONDS = 5.0  # for a main thread that may be stuck in a collective
_WRITE_SECONDS = 2.0  # for last words on a disk that may hang
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(BaseException):
    """A signal where there is nothing to finish; like KeyboardInterrupt, no error that somebody may handle."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interruption:
    """Notes the first of `SIGNALS`. A later Ctrl-C ends the process at once; whatever else comes again does nothing.

    One wish to stop arrives several times: a terminal signals launcher and trainer, the launcher passes its own on, and
    its death is a SIGTERM (end_with_launcher). So what follows within `_ECHO_SECONDS` is the same wish.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal, 0 for none."""
        self.leaving = 0
        """The signal by which this process leaves before its first step, 0 for none. Known as soon as it comes, also
        while the main thread is stuck: the vigil tells the others."""
        self.last_words: Callable[[int], None] | None = None
        """Called with the exit status where the main thread cannot unwind."""
        self._when = 0.0
        self._raises = self._agrees = False

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def restore(self) -> None:
        """Gives the signals their own effect back: nothing is left to save, and whoever hangs must be stoppable."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Around what comes before the first step: a signal raises Stopped in this process, whatever the others do.
        They `follow` when they hear of it.

        Python runs no handler while the main thread waits in a collective: there a thread ends the process.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._raises = True
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._end_if_stuck, args=(reading,), daemon=True).start()
        try:
            if self.received:
                raise Stopped(self.received)
            yield
        except Exception:  # of a collective that the others, who were told as well, have left
            if self.received:
                raise Stopped(self.received) from None
            raise
        finally:
            self._raises = False
            signal.set_wakeup_fd(before)
            os.close(writing)  # which ends the thread

    def follow(self, number: int) -> None:
        """Another process leaves by this signal before its first step: as if it had come here too. From any thread."""
        main = threading.main_thread().ident
        if self._raises and main is not None:
            signal.pthread_kill(main, number)  # which also wakes it

    def leave(self, number: int) -> NoReturn:
        """The main thread's end by a signal that another process left by."""
        self.leaving = number
        raise Stopped(number)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Around long work between two steps: where any process has got a signal, `together` and `agree` raise Stopped
        on all of them."""
        self._agrees = True
        try:
            yield
        finally:
            self._agrees = False

    @property
    def asks(self) -> int:
        """The signal for which `agree` stops all now, 0 for none."""
        return self.received if self._agrees else 0

    def _end_if_stuck(self, reading: int) -> None:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in SIGNALS:
                    continue
                if self._raises:
                    self.leaving = number[0]
                time.sleep(_UNWIND_SECONDS)
                if self._raises:
                    name = signal.Signals(number[0]).name
                    os.write(2, f"\n{name}: ended while waiting for another process\n".encode())
                    if self.last_words is not None:
                        self.last_words(128 + number[0])
                    os._exit(128 + number[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self._when > _ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.received, self._when = number, time.monotonic()
        if self._raises:
            self.leave(number)
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing this step, then saving; Ctrl-C after some seconds stops at once\n".encode())


def interruption() -> Interruption | None:
    """The one that is installed in this process."""
    owner: Any = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, Interruption) else None


@dataclass(slots=True)
class Ending:
    """How a start of a run ended."""

    status: int = 1
    folder: Path | None = None
    """Where to write it, once; None: nowhere, or it is written."""

    def write(self, status: int) -> None:
        folder, self.folder = self.folder, None
        if folder is not None:
            writing = folder / f".writing-{ENDED}"
            writing.write_text(json.dumps({"status": status}) + "\n", encoding="utf-8")
            os.replace(writing, folder / ENDED)

    def write_at_last(self, status: int) -> None:
        """For a process whose main thread hangs: in 2 s or not at all, as the disk may be what hangs."""
        writer = threading.Thread(target=self.write, args=(status,), daemon=True)
        writer.start()
        writer.join(_WRITE_SECONDS)


@contextmanager
def ending(folder: Path, mendable: tuple[type[Exception], ...], *, writes: bool) -> Iterator[Ending]:
    """Around a start that holds the run's folder: `ended.json` goes first and says afterwards how it ended.

    `writes`: on the main process. What was raised decides: Stopped 128 + signal, `mendable` 2, anything else 1;
    without, what the block has noted.
    """
    if writes:
        (folder / ENDED).unlink(missing_ok=True)
    ended = Ending(folder=folder if writes else None)
    try:
        yield ended
    except BaseException as error:
        ended.status = 128 + error.number if isinstance(error, Stopped) else 2 if isinstance(error, mendable) else 1
        raise
    finally:
        ended.write(ended.status)


def end_with_launcher() -> None:
    """Asks the kernel for a SIGTERM when the launcher that started this process dies.

    `accelerate launch` with one process does not forward SIGTERM: it would leave the trainer running alone. Only under
    a launcher, which tells by its environment: a shell that started the trainer may well end before it.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Asks the kernel for a SIGTERM when the process that started this one dies; on Linux only."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)
