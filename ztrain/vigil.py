"""Several processes that train together: when one hangs or is gone, all end, and a sentence names the one.

In: what each process says of itself as it goes, `vigil.at("reading data", step)`. Out, where nothing moves any more for
`timeout` seconds: one sentence on stderr with the ranks that are behind (host, step, what they were doing), and the end
of every process with `STATUS`; the launcher takes down what cannot end itself. Two threads do it, which run where the
main one is stuck in a collective: one tells the others through the process group's store where this process stands and
judges what it reads there, one watches whether the store still answers. One process alone has no thread.
"""

import json
import os
import resource
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import torch.distributed as dist

STATUS = 75
"""Exit status of a process that ends because the job hangs: EX_TEMPFAIL of sysexits.h, try again. `latest` goes on."""

ItemT = TypeVar("ItemT")

_SLOWEST, _FASTEST = 2.0, 0.05  # seconds between two looks
_SHOWN = 8  # ranks that a sentence names


class Steps(Protocol):
    """What knows the steps done: a Run."""

    step: int


class Wish(Protocol):
    """What knows of signals: an Interruption."""

    leaving: int

    def follow(self, number: int) -> None: ...

    def leave(self, number: int) -> NoReturn: ...


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a process stands, as it tells the others."""

    rank: int
    host: str
    moves: int
    """Calls of `at` so far; all processes make the same ones, so fewer is behind."""
    step: int | None
    doing: str
    idle: float
    """Seconds without progress when this was told."""
    frame: str
    """Innermost line of the main thread, "" while all is well."""
    beat: int
    """Counts up each time it is told."""
    gone: bool = False
    """Whether the process has left in good order."""
    leaving: int = 0
    """The signal by which it leaves before its first step, 0 for none."""

    @property
    def where(self) -> str:
        return self.doing if self.step is None else f"{self.doing} at step {self.step}"


class Vigil:
    """One process's part; see the module. `at` costs less than a microsecond and waits for nothing."""

    def __init__(self, store: Any, rank: int, count: int, timeout: float, wish: Wish | None = None) -> None:
        """`store`: a torch.distributed.Store of its own connection, or None for a process alone. `timeout`: seconds.
        `wish`: the signals that this process has got; it hears of those of the others."""
        self.last_words: Callable[[int], None] | None = None
        """Called with `STATUS` before the process ends by it."""
        self._wish, self._followed = wish, False
        self._heard_until = 0.0
        self.rank, self.count, self.timeout, self._store = rank, count, timeout, store
        self.interval = min(max(timeout / 20, _FASTEST), _SLOWEST)
        self._place: tuple[int, int | None, str, bool] = (0, None, "starting", True)
        self._moved = time.monotonic()
        self._seen: dict[int, tuple[Stand, float]] = {}  # with the time when its beat last changed
        self._answered = time.monotonic()  # by the store
        self._beat, self._gone = 0, False
        self._signs: tuple[Any, ...] = ()
        self._looks, self._traffic = threading.Lock(), _Traffic()
        self._over = threading.Event()
        self._main = threading.main_thread().ident
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._exchange, self._watch)]

    def at(self, doing: str, step: int | None = None, *, patient: bool = False) -> None:
        """Says what this process does from now on. All processes make the same calls in the same order.

        `patient`: a long task without steps (filling the cache, compiling, validating, saving): it counts as moving as
        long as the main thread is found at another line each time or the process reads or writes files, so a loop
        without end is not seen there, and a single write or flush must take less than `timeout`. Time on the processor
        does not count: whoever waits for a GPU's collective spends it too. Otherwise only the next `at` is progress.
        """
        self._place = (self._place[0] + 1, step, doing, patient)
        self._moved = time.monotonic()

    def reading(self, items: Iterable[ItemT], run: Steps) -> Iterator[ItemT]:
        """The loader's items; says that they are waited for, and then computed with. `run.step`: steps done so far."""
        source = iter(items)
        while True:
            self.at("reading data", run.step + 1)
            try:
                item = next(source)
            except StopIteration:
                return
            self.at("computing", run.step + 1)
            yield item

    def start(self) -> None:
        if self._store is not None:
            for thread in self._threads:
                thread.start()

    def close(self) -> None:
        """The end of the watch, in good order."""
        self._over.set()
        self._gone = True
        # The others must not take it for dead. Not waited for longer: the store may be gone as well.
        if self._threads[0].is_alive():
            self._threads[0].join(timeout=2 * self.interval)

    def lost(self) -> list[Stand]:
        """Processes that have stopped telling where they stand without having left; waits until that is known."""
        if self._store is None:
            return []
        silence = 4 * self.interval
        time.sleep(2 * silence)
        now = time.monotonic()
        if now - self._answered > silence:
            return []
        return [s for s, seen in self._seen.values() if not s.gone and s.rank != self.rank and now - seen > silence]

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Where a collective fails because another process has left by a signal before its first step, so does this one
        (`Wish.leave`): not every machine hears a signal at the same time."""
        try:
            yield
        except RuntimeError as error:
            if self._wish is not None and _of_collective(error) and (number := self._heard()):
                self._wish.leave(number)
            raise

    def _heard(self) -> int:
        """The signal by which another process has left; what it says as it leaves is read two looks later."""
        self._heard_until = self._heard_until or time.monotonic() + 2 * self.interval
        while not (number := self._left()) and time.monotonic() < self._heard_until:
            time.sleep(_FASTEST)
        return number

    def _left(self) -> int:
        return max((stand.leaving for stand, _ in list(self._seen.values())), default=0)

    def _idle(self) -> float:
        """Seconds since this process has moved; in a patient task, since its main thread or its files have."""
        with self._looks:
            if self._place[3] and (signs := (*self._traffic.of_others(), *_stack(self._main))) != self._signs:
                self._signs, self._moved = signs, time.monotonic()
            return time.monotonic() - self._moved

    def _exchange(self) -> None:
        """Tells and reads until the end; a store that fails is left alone, and `_watch` will see it."""
        keys, pause = [_key(rank) for rank in range(self.count)], 0.0
        try:
            while True:
                last, pause = self._over.wait(pause), self.interval
                self._store.set(_key(self.rank), json.dumps(asdict(self._stand())))
                if last:
                    return
                if self._store.check([_VERDICT]):
                    self._follow()
                present = [key for key in keys if self._store.check([key])] if len(self._seen) < self.count else keys
                now = time.monotonic()
                for text in self._store.multi_get(present):
                    stand = Stand(**json.loads(text))
                    known = self._seen.get(stand.rank)
                    if known is None or known[0].beat != stand.beat:
                        self._seen[stand.rank] = (stand, now)
                self._answered = now
                if self._wish is not None and not self._followed and (number := self._left()):
                    self._followed = True
                    if not self._wish.leaving:
                        self._wish.follow(number)
                if self._idle() >= self.timeout and (sentence := self._judge()):
                    mine = f"{self.rank} {uuid.uuid4().hex}"
                    if self._store.compare_set(_VERDICT, "", mine).decode() == mine:
                        _say(sentence)
                    self._follow()
        except RuntimeError:  # torch.distributed.DistError and its kind
            return

    def _follow(self) -> NoReturn:
        """Ends the process by the verdict; rank 0, who may keep the store, when the others have read it."""
        if self.last_words is not None:  # sooner than the main thread, in which a collective fails when the others go
            self.last_words(STATUS)
        if self.rank == 0:
            time.sleep(4 * self.interval)
        _end()

    def _stand(self) -> Stand:
        moves, step, doing, _ = self._place
        idle, self._beat = self._idle(), self._beat + 1
        frame = _frame(self._main) if idle > self.timeout / 2 else ""
        leaving = self._wish.leaving if self._wish is not None else 0
        return Stand(self.rank, socket.gethostname(), moves, step, doing, idle, frame, self._beat, self._gone, leaving)

    def _judge(self) -> str:
        """The sentence, where those who are furthest behind have not moved for `timeout`; "" while one of them moves:
        then the others only wait for it."""
        now = time.monotonic()
        stands = [stand for stand, _ in self._seen.values()]
        waited = {stand.rank: stand.idle + now - seen for stand, seen in self._seen.values()}
        if len(stands) < self.count:
            missing = sorted(set(range(self.count)) - waited.keys())
            return f"{_ranks(missing)} never told where it stands; the job ends"
        behind = [stand for stand in stands if stand.moves == min(s.moves for s in stands)]
        if any(waited[stand.rank] < self.timeout - 2 * self.interval for stand in behind):
            return ""
        silent = [s for s in stands if now - self._seen[s.rank][1] > max(self.timeout / 2, 4 * self.interval)]
        return describe(stands, behind, silent, waited)

    def _watch(self) -> None:
        """Ends the process where it has not moved and the store answers no more: who is behind cannot be read then."""
        while not self._over.wait(self.interval):
            silence = time.monotonic() - self._answered
            if self._idle() >= self.timeout + 4 * self.interval and silence > max(self.timeout / 2, 4 * self.interval):
                stand = self._stand()
                _say(
                    f"rank {stand.rank} ({stand.host}) has been {stand.where} for {stand.idle:.0f} s, and rank 0 or its"
                    f" launcher, which knows where all stand, has not answered for {silence:.0f} s: most likely that"
                    " machine or process is gone or hangs; the job ends"
                )
                if self.last_words is not None:
                    self.last_words(STATUS)
                _end()


def describe(
    stands: Sequence[Stand], behind: Sequence[Stand], silent: Sequence[Stand], waited: dict[int, float]
) -> str:
    """One sentence on who hangs. `behind`: of all `stands`, those with the fewest moves; `silent`: those that tell
    nothing any more; `waited`: seconds without progress by rank."""
    if silent:
        named = [f"rank {s.rank} ({s.host}), last told {s.where}" for s in silent[:_SHOWN]]
        longest = max(waited[s.rank] for s in silent)
        return f"no word for {longest:.0f} s from {'; '.join(named)}: stopped or gone; the job ends"
    seconds = min(waited[s.rank] for s in behind)
    if len(behind) < len(stands):
        steps = "" if behind[0].step is None else f"step {behind[0].step}: "
        named = [f"rank {s.rank} ({s.host}{_at(s)})" for s in behind[:_SHOWN]]
        more = f" and {len(behind) - _SHOWN} more" if len(behind) > _SHOWN else ""
        verb = "has" if len(behind) == 1 else "have"
        doing = f"{verb} been {behind[0].doing} for {seconds:.0f} s"
        return f"{steps}{', '.join(named)}{more} {doing} while the others wait; the job ends"
    lines = Counter(s.frame for s in stands)
    [(common, often), *_] = lines.most_common()
    odd = [s for s in stands if s.frame != common]
    if odd and often > len(stands) / 2:
        named = [f"rank {s.rank} ({s.host}{_at(s)})" for s in odd[:_SHOWN]]
        return (
            f"all {len(stands)} processes have been {stands[0].where} for {seconds:.0f} s; most stand in {common}, but"
            f" {', '.join(named)}: look there first; the job ends"
        )
    shown = "; ".join(f"rank {s.rank} ({s.host}{_at(s)})" for s in sorted(stands, key=lambda s: s.rank)[:_SHOWN])
    return (
        f"all {len(stands)} processes have been {stands[0].where} for {seconds:.0f} s, and which of them hangs cannot"
        f" be told: {shown}; the job ends"
    )


@contextmanager
def watched(rank: int, count: int, timeout: float, wish: Wish) -> Iterator[Vigil]:
    """The vigil of this process, once the process group is there. `timeout`: seconds.

    An error of a collective is no news but that somebody is gone: the sentence before it says who.
    """
    store = dist.distributed_c10d._get_default_store().clone() if count > 1 else None
    vigil = Vigil(store, rank, count, timeout, wish)
    vigil.start()
    try:
        with vigil.alike():
            yield vigil
    except RuntimeError as error:
        if _of_collective(error):
            for stand in vigil.lost():
                _say(f"no word from rank {stand.rank} ({stand.host}), last told {stand.where}: gone; the job ends")
        raise
    finally:
        vigil.close()


@contextmanager
def met(timeout: float) -> Iterator[None]:
    """Around the making of the process group, before there is a store: ends the process where not all come in time."""
    count = int(os.environ.get("WORLD_SIZE", "1"))

    def give_up() -> None:
        _say(
            f"rank {os.environ.get('RANK', '?')} has waited {timeout:.0f} s for all {count} processes to meet at"
            f" {os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}: one did not start, or cannot"
            " reach that address; the job ends"
        )
        _end()

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    if count > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _of_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


_VERDICT = "ztrain/vigil/verdict"


def _key(rank: int) -> str:
    return f"ztrain/vigil/{rank}"


def _at(stand: Stand) -> str:
    return f", in {stand.frame}" if stand.frame else ""


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks[:_SHOWN])


def _stack(thread: int | None) -> tuple[Any, ...]:
    """Every line that a thread is in, outermost last."""
    frame = sys._current_frames().get(thread or 0)
    found = []
    while frame is not None:
        found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


class _Traffic:
    """Counts what this process has read from and written to files: pictures, shards, weights, checkpoints."""

    def __init__(self) -> None:
        self._lookers: set[str] = set()

    def of_others(self) -> tuple[int, int]:
        """Bytes, by all but the threads that look (Linux; elsewhere 0), and pages of mapped files, which is how
        safetensors reads: ru_majflt of getrusage(2)."""
        self._lookers.add(str(threading.get_native_id()))
        counted = 0
        for thread in Path("/proc/self/task").glob("*"):
            try:
                name, words = (thread / "comm").read_bytes(), (thread / "io").read_bytes().split()
            except OSError:  # it has ended
                continue
            # Nor torch's own threads, such as pt_tcpstore_uv, which answers every vigil's look.
            if thread.name not in self._lookers and not name.startswith(b"pt_"):
                counted += int(words[1]) + int(words[3])  # rchar: 123 wchar: 45 ...; proc_pid_io(5)
        return counted, resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _frame(thread: int | None) -> str:
    """The innermost line of a thread as `function (file:line)`."""
    frame = sys._current_frames().get(thread or 0)
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})" if frame else ""


def _say(sentence: str) -> None:
    os.write(2, f"\nerror: {sentence}\n".encode())


def _end() -> NoReturn:
    """Without clean-up, which would wait for the others."""
    os._exit(STATUS)
