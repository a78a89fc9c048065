"""Signals: a run that is told to stop finishes its step, saves and exits; every other command stops where it is, with
nothing half-written. No process outlives the one that it works for. The checkpoint is saved by `_finish_step` in
train/loop.py.

Exit status of what was stopped: 128 + the signal's number, as shells have it. Launchers make 1 of it, so `ended.json`
in a run's folder holds it as well.

    python -m ztrain.interrupt MODULE WORD...     a command that ends with the process that started it
"""

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ztrain.errors import InputError
from ztrain.io.files import write_json

SIGNALS: Mapping[int, str] = {
    signal.SIGTERM: "kill, a launcher, preemption",
    signal.SIGINT: "Ctrl-C",
    signal.SIGHUP: "a terminal or ssh session that closes",
    signal.SIGUSR1: "SLURM before its time limit (sbatch --signal)",
    signal.SIGUSR2: "submitit, LSF, Grid Engine",
    signal.SIGXCPU: "a soft limit of processor time",
}
"""What is caught, and who sends it. One that was ignored when the process began, as nohup does, stays ignored."""

ENDED = "ended.json"
"""Of a run's folder: {"status": exit status of its last start}; not there while it runs, or when rank 0 was killed."""

_ECHO_SECONDS = 3.0
_AGAIN_SECONDS = 0.05
UNWIND_SECONDS = 5.0  # for a main thread that may be stuck in a collective
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
        while the main thread is stuck: the watchdog tells the others."""
        self.on_abort: Callable[[int], object] = int
        """Called with the exit status where the main thread cannot unwind."""
        self._when = 0.0
        self._raises = self._agrees = self._waits = False
        self._before: dict[int, Any] = {}  # handlers
        self._outer: Interruption | None = None

    def install(self) -> None:
        global current
        self._outer, current = current, self
        for number in SIGNALS:
            if (before := signal.getsignal(number)) != signal.SIG_IGN:
                self._before[number] = signal.SIG_DFL if before is None else before  # None: of a library's own code
                signal.signal(number, self._note)

    def restore(self) -> None:
        """Gives the signals the effect back that they had: nothing is left to save, and whoever hangs must be
        stoppable. An interruption that was installed before this one knows what this one has heard."""
        global current
        current = self._outer
        if current is not None and self.received:
            current.received, current._when = self.received, self._when
        for number, before in self._before.items():
            # Above a soft limit of processor time the signal comes again every second.
            signal.signal(number, signal.SIG_IGN if self.received == number == signal.SIGXCPU else before)

    @contextmanager
    def at_once(self, ending: Callable[[], int] = int) -> Iterator[None]:
        """Around what comes before the first step: a signal raises Stopped in this process, whatever the others do.
        They `follow` when they hear of it. `ending`: the exit status of a process that has left, 0 for none.

        Python runs no handler while the main thread waits in a collective: there a thread ends the process. And it
        drops what is raised in a destructor or beside a fork: there the signal comes again.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._raises = True
        dropped = sys.unraisablehook

        def again(unraisable: Any) -> None:
            if not (isinstance(unraisable.exc_value, Stopped) and self._raises_here()):
                dropped(unraisable)
                return
            self.received = 0
            threading.Timer(_AGAIN_SECONDS, self.follow, (unraisable.exc_value.number,)).start()

        sys.unraisablehook = again
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._end_if_stuck, args=(reading,), daemon=True).start()
        try:
            if self.received:
                self._leave(self.received)
            yield
        except Exception:  # of a collective that others have left by a signal, which need not come here at that time
            if number := self.received or max(ending() - 128, 0):
                self._leave(number)
            raise
        finally:
            self._raises = False
            sys.unraisablehook = dropped
            signal.set_wakeup_fd(before)
            os.close(writing)  # which ends the thread

    def follow(self, number: int) -> None:
        """Another process leaves by this signal before its first step: as if it had come here too. From any thread."""
        if self._raises:
            signal.pthread_kill(threading.main_thread().ident or 0, number)  # which also wakes it

    def _leave(self, number: int) -> NoReturn:
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

    @contextmanager
    def later(self) -> Iterator[None]:
        """Around what must not be left half-done: within `at_once` a signal raises Stopped at its end."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self._raises and self.received:
            self._leave(self.received)

    @property
    def asks(self) -> int:
        """The signal for which `agree` stops all now, 0 for none."""
        return self.received if self._agrees else 0

    def _end_if_stuck(self, reading: int) -> None:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in SIGNALS or not self._raises_here():
                    continue
                self.leaving = number[0]
                time.sleep(UNWIND_SECONDS)
                if self._raises_here():
                    name = signal.Signals(number[0]).name
                    os.write(2, f"\n{name}: ended without waiting any longer\n".encode())
                    self.on_abort(128 + number[0])
                    os._exit(128 + number[0])

    def _raises_here(self) -> bool:
        return self._raises and current is self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self._when > _ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.received, self._when = number, time.monotonic()
        if self._raises:
            if not self._waits:
                self._leave(number)
            return
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing this step, then saving; Ctrl-C after some seconds stops at once\n".encode())


current: Interruption | None = None


def interruption() -> Interruption | None:
    """The one that is installed in this process."""
    return current


@contextmanager
def stoppable() -> Iterator[None]:
    """Around a whole command that has no step to finish: the first of `SIGNALS` raises Stopped in the main thread,
    which removes what is half-written; if it cannot for 5 s, the process ends all the same, with 128 + the number."""
    interruption = Interruption()
    interruption.install()
    try:
        with interruption.at_once():
            yield
    finally:
        interruption.restore()


@dataclass(slots=True)
class Ending:
    """How a start of a run ended."""

    status: int = 1
    folder: Path | None = None
    """Where to write it, once; None: nowhere, or it is written."""

    def write(self, status: int) -> None:
        folder, self.folder = self.folder, None
        if folder is not None:
            write_json(folder / ENDED, {"status": status}, sync=True)

    def write_at_last(self, status: int) -> None:
        """For a process whose main thread hangs: in 2 s or not at all, as the disk may be what hangs."""

        def write() -> None:
            with suppress(InputError):  # the process ends anyway, with its own last words
                self.write(status)

        writer = threading.Thread(target=write, daemon=True)
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
        try:
            ended.write(ended.status)
        except InputError as unwritten:  # which must not hide what ended the run: most likely it is the same disk
            print(unwritten, file=sys.stderr)
        raise
    ended.write(ended.status)


def end_with_launcher() -> None:
    """Asks the kernel for a SIGTERM when the launcher that started this process dies.

    `accelerate launch` with one process does not forward SIGTERM: it would leave the trainer running alone. Only under
    a launcher, which tells by its environment: a shell that started the trainer may well end before it.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent(parent: int | None = None) -> None:
    """Asks the kernel for a SIGTERM when the process that started this one dies, or sends it where that is no longer
    `parent`; on Linux only."""
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)


def leave_group(status: int) -> int:
    """`status`, for the end of a process that was stopped. One of several ends here by it: taking their group down
    would wait for the others, who may be gone."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


@contextmanager
def unheard_by_children() -> Iterator[None]:
    """Around the start of worker processes, which call `work_for_parent`: a signal of a terminal, or of a batch system
    to all of a job, is this process's to answer, which then ends them. It hears of one when all are started."""
    with current.later() if current is not None else nullcontext():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # which children inherit
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work_for_parent() -> None:
    """The first call of a worker process of multiprocessing: it ends when its parent does."""
    parent = multiprocessing.parent_process()
    end_with_parent(None if parent is None else parent.pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def run_module(module: str, *words: str, environment: Mapping[str, str]) -> int:
    """`python -m MODULE WORD...` as a child that ends when this process does, however it ends; its exit status. A
    signal that stops this process goes on to the child, which is waited for."""
    command = [sys.executable, "-m", __name__, module, *words]
    with subprocess.Popen(command, env={**os.environ, **environment}) as child:
        try:
            return child.wait()
        except Stopped as stopped:
            child.send_signal(stopped.number)
            raise


if __name__ == "__main__":
    end_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
