"""Signals: a run that is told to stop finishes its step, saves and exits; no process outlives its launcher.

Exit status of a run that was stopped and saved: 128 + the signal's number, as shells have it (143 for SIGTERM, 130 for
SIGINT, 138 for SIGUSR1 on Linux).
"""

import ctypes
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what SLURM sends before its time limit when asked to (sbatch --signal)."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Interruption:
    """Notes the first of `SIGNALS`; the second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal, 0 for none."""

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing this step, then saving; a second signal stops at once\n".encode())


def end_with_launcher() -> None:
    """Asks the kernel for a SIGTERM when the launcher that started this process dies.

    `accelerate launch` with one process does not forward SIGTERM: it would leave the trainer running alone. Only under
    a launcher, which tells by its environment: a shell that started the trainer may well end before it.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if not launched or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)
