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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what SLURM sends before its time limit when asked to (sbatch --signal)."""

ENDED = "ended.json"
"""Of a run's folder: {"status": exit status of its last start}; not there while it runs, or when it was killed."""

_ECHO_SECONDS = 3.0
_UNWIND_SECONDS = 5.0  # for a main thread that may be stuck in a collective
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
                time.sleep(_UNWIND_SECONDS)
                if self._raises:
                    name = signal.Signals(number[0]).name
                    os.write(2, f"\n{name}: ended while waiting for another process\n".encode())
                    os._exit(128 + number[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self._when > _ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.received, self._when = number, time.monotonic()
        if self._raises:
            raise Stopped(number)
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


@contextmanager
def ending(folder: Path, mendable: tuple[type[Exception], ...], *, writes: bool) -> Iterator[Ending]:
    """Around a start that holds the run's folder: `ended.json` goes first and says afterwards how it ended.

    `writes`: on the main process. What was raised decides: Stopped 128 + signal, `mendable` 2, anything else 1;
    without, what the block has noted.
    """
    if writes:
        (folder / ENDED).unlink(missing_ok=True)
    ended = Ending()
    try:
        yield ended
    except BaseException as error:
        ended.status = 128 + error.number if isinstance(error, Stopped) else 2 if isinstance(error, mendable) else 1
        raise
    finally:
        if writes:
            writing = folder / f".writing-{ENDED}"
            writing.write_text(json.dumps({"status": ended.status}) + "\n", encoding="utf-8")
            os.replace(writing, folder / ENDED)


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
