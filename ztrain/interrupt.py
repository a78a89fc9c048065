"""Signals: a run that is told to stop finishes its step, saves and exits; no process outlives its launcher.

Exit status of a run that was stopped and saved: 128 + the signal's number, as shells have it (143 for SIGTERM, 130 for
SIGINT, 138 for SIGUSR1 on Linux).
"""

import ctypes
import os
import signal
import sys
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what SLURM sends before its time limit when asked to (sbatch --signal)."""

_ECHO_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Interruption:
    """Notes the first of `SIGNALS`. A later Ctrl-C ends the process at once; whatever else comes again does nothing.

    One wish to stop arrives several times: a terminal signals launcher and trainer, the launcher passes its own on, and
    its death is a SIGTERM (end_with_launcher). So what follows within `_ECHO_SECONDS` is the same wish.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal, 0 for none."""
        self._when = 0.0

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def restore(self) -> None:
        """Gives the signals their own effect back: nothing is left to save, and whoever hangs must be stoppable."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self._when > _ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.received, self._when = number, time.monotonic()
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing this step, then saving; Ctrl-C after some seconds stops at once\n".encode())


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
