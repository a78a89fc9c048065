"""How a run of several processes ends: ranks that hang, halt or die, and signals at any moment. Real processes, gloo.

Ranks are started as a launcher would, but through the forge; tests/faults.py makes one of them go wrong at step 3.
"""

import json
import mmap
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.ranks import Ranks
from tests.test_run import ENVIRONMENT, LATEST, QUIET, STARTED, Place, _no_process_is_left, losses, rows
from ztrain.distributed.watchdog import STATUS, Heartbeat, Watchdog, describe
from ztrain.interrupt import Interruption
from ztrain.weights import checkpoint

pytestmark = pytest.mark.usefixtures("forge", "_no_process_is_left")
__all__ = ["_no_process_is_left"]

TIMEOUT = 6.0  # seconds; no step takes as long, not on a busy machine either
EACH = ("--train.checkpointing_steps", "1", "--train.max_train_steps", "5")


class Faulty(Ranks):
    """The processes of one run into `out`, one of which goes wrong."""

    def __init__(
        self,
        place: Place,
        tmp_path: Path,
        count: int,
        fault: str,
        rank: int,
        *more: str,
        only: Sequence[int] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.out = tmp_path / "run"
        words = place.words(self.out, "--train.train_batch_size", str(4 // count), "--train.hang_timeout_minutes",
                            str(timeout / 60), *more, name="projector")  # fmt: skip
        super().__init__(["tests.faults", fault, str(rank), *words], ENVIRONMENT, count, tmp_path, only)
        STARTED.extend(process.pid for process in self.started)

    def wait_for_text(self, rank: int, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + 90
        while self.logs[rank].read_text().count(text) < times:
            assert self.started[rank].poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.02)


HANGS = [
    pytest.param(2, "reading", 1, r"step 3: rank 1 \(\S+, in forever \(faults.py:\d+\)\) has been reading data for "
                 r"\d+ s while the others wait; the job ends", id="no data, 2"),
    pytest.param(4, "spin", 2, r"all 4 processes have been computing at step 3 for \d+ s; most stand in .*, but rank 2 "
                 r"\(\S+, in spin \(faults.py:\d+\)\): look there first; the job ends", id="loop without end, 4",
                 marks=pytest.mark.slow),
    pytest.param(4, "halted", 3, r"no word for \d+ s from rank 3 \(\S+\), last told .*: stopped or gone",
                 id="halted, 4",
                 marks=pytest.mark.slow),
    pytest.param(2, "halted", 0, r"rank 1 \(\S+\) has been computing at step 3 for \d+ s, and rank 0 or its launcher, "
                 r"which knows where all stand, has not answered for \d+ s", id="halted with the store, 2",
                 marks=pytest.mark.slow),
    pytest.param(2, "stuck_save", 0, r"all 2 processes have been saving at step 3 for \d+ s, .* rank 0 \(\S+, in "
                 r"forever \(faults.py:\d+\)\)", id="saving, 2", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("count", "fault", "rank", "sentence"), HANGS)
def test_a_rank_that_hangs_ends_the_job_by_name(
    place: Place, tmp_path: Path, count: int, fault: str, rank: int, sentence: str
) -> None:
    ranks = Faulty(place, tmp_path, count, fault, rank, *QUIET, *EACH)
    waiting = [process for r, process in enumerate(ranks.started) if (fault, r) != ("halted", rank)]
    latest = ranks.out / "checkpoints" / checkpoint.folder_name(2)
    deadline = time.monotonic() + 90
    while not latest.exists():
        assert time.monotonic() < deadline, ranks.text()
        time.sleep(0.02)
    begun = time.monotonic()
    assert {process.wait(60) for process in waiting} == {STATUS}, ranks.text()
    assert TIMEOUT * 0.8 < time.monotonic() - begun < 2 * TIMEOUT + 3
    assert len(re.findall(sentence, ranks.text())) == 1 == ranks.text().count("; the job ends"), ranks.text()
    if fault == "halted":  # a launcher kills it 30 s after the first has ended
        assert ranks.living() == [ranks.started[rank].pid]
        os.kill(ranks.started[rank].pid, signal.SIGKILL)
        ranks.started[rank].wait(10)
    assert not ranks.living()
    found, passed = checkpoint.find("latest", ranks.out / "checkpoints")
    assert found is not None and not passed and found.step == 2
    ended = ranks.out / "ended.json"
    assert not ended.exists() if (fault, rank) == ("halted", 0) else json.loads(ended.read_text()) == {"status": STATUS}


@pytest.mark.parametrize(
    ("count", "rank"),
    [pytest.param(2, 1, id="2"), pytest.param(4, 0, id="4, with the store", marks=pytest.mark.slow)],
)
def test_a_rank_that_is_killed_ends_the_job(place: Place, tmp_path: Path, count: int, rank: int) -> None:
    """gloo says that somebody is gone, the watchdog who; not where the store went with it: then a launcher does."""
    ranks = Faulty(place, tmp_path, count, "killed", rank, *QUIET, *EACH)
    statuses = ranks.statuses()
    assert statuses.pop(rank) == -signal.SIGKILL and set(statuses) == {1}, ranks.text()
    assert not ranks.living() and "Connection" in ranks.text()
    assert len(re.findall(r"no word from rank 1 \(\S+\), last told .*: gone; the job ends", ranks.text())) == rank
    found, passed = checkpoint.find("latest", ranks.out / "checkpoints")
    assert found is not None and not passed and found.step == 2
    ended = ranks.out / "ended.json"
    assert ended.exists() == (rank != 0) and (rank == 0 or json.loads(ended.read_text()) == {"status": 1})


def test_a_rank_out_of_memory_ends_the_job_with_advice(place: Place, tmp_path: Path) -> None:
    """It says what to change; the other says who is gone. No batch is made smaller, and checkpoints stay."""
    ranks = Faulty(place, tmp_path, 2, "no_memory", 1, *QUIET, *EACH)
    assert ranks.statuses() == [1, 2] and not ranks.living(), ranks.text()
    assert "error: step 3: the GPU's memory is too small for a batch of 2; set train.gradient_" in ranks.text()
    assert "CUDA out of memory" not in ranks.logs[1].read_text()
    assert_at_step(ranks.out, 2)


def test_a_disk_that_fills_while_a_run_saves_ends_all_and_keeps_what_was_there(place: Place, tmp_path: Path) -> None:
    ranks = Faulty(place, tmp_path, 2, "full_disk", -1, *QUIET, *EACH, "--train.checkpoints_total_limit", "2")
    assert ranks.statuses() == [2, 2] and "Traceback" not in ranks.text(), ranks.text()
    assert len(set(re.findall("^error: .*step-00000003: cannot write the checkpoint .*", ranks.text(), re.M))) == 1
    assert [path.name for path in checkpoint.checkpoints(ranks.out / "checkpoints")] == [
        checkpoint.folder_name(step) for step in (1, 2)
    ]
    assert_at_step(ranks.out, 2)
    assert json.loads((ranks.out / "ended.json").read_text()) == {"status": 2}


def assert_at_step(out: Path, step: int) -> None:
    found, passed = checkpoint.find("latest", out / "checkpoints")
    assert found is not None and not passed and found.step == step


def test_who_never_comes_is_waited_for_no_longer(place: Place, tmp_path: Path) -> None:
    ranks = Faulty(place, tmp_path, 2, "none", 0, only=[0], timeout=2.0)
    assert ranks.started[0].wait(60) == STATUS
    assert re.search(r"rank 0 has waited 2 s for all 2 processes to meet at 127.0.0.1:\d+", ranks.text())


def test_long_work_is_no_hang_and_a_signal_ends_validation_on_all(place: Place, tmp_path: Path) -> None:
    """One process fills for longer than the timeout while the other waits. Later one alone is told to stop."""
    shown = ("--validation.validation_steps", "2", "--validation.preview_steps", "0", "--validation.num_samples", "4")
    ranks = Faulty(place, tmp_path, 2, "slow_fill,slow_validation", -1, *shown)
    ranks.wait_for_text(1, "slow read_batch", times=4 + 1)  # two samples, read twice, at step 0; then at step 2
    begun = time.monotonic()
    os.kill(ranks.started[1].pid, signal.SIGUSR1)
    assert ranks.statuses() == [128 + signal.SIGUSR1] * 2, ranks.text()
    assert time.monotonic() - begun < 10 and not ranks.living()
    found, passed = checkpoint.find("latest", ranks.out / "checkpoints")
    assert found is not None and not passed and found.step == 2 == len(losses(ranks.out))
    assert "val/loss" in rows(ranks.out)[0] and "val/loss" not in rows(ranks.out)[-1]  # it was cut short
    assert json.loads((ranks.out / "ended.json").read_text()) == {"status": 138}
    assert "slow fill" in ranks.text() and "the job ends" not in ranks.text() and "Traceback" not in ranks.text()


@pytest.mark.parametrize(
    ("filling", "told"),
    [
        pytest.param(0, [0, 1], id="all"),
        pytest.param(1, [1], id="the one that fills"),
        pytest.param(0, [1], id="the one that waits"),
    ],
)
def test_a_signal_before_the_first_step_ends_all_at_once(
    place: Place, tmp_path: Path, filling: int, told: list[int]
) -> None:
    """One process fills, the other is stuck in a collective, where Python hears no signal. Launchers tell all, but not
    those of other machines at the same time."""
    ranks = Faulty(place, tmp_path, 2, "long_fill", filling, *LATEST)
    ranks.wait_for_text(filling, "slow fill")
    time.sleep(1)
    for rank in told:
        os.kill(ranks.started[rank].pid, signal.SIGTERM)
    begun = time.monotonic()
    assert ranks.statuses() == [128 + signal.SIGTERM] * 2, ranks.text()
    assert time.monotonic() - begun < 9 and not ranks.living()
    assert "SIGTERM: stopped before the first step" in ranks.logs[0].read_text()
    assert json.loads((ranks.out / "ended.json").read_text()) == {"status": 143}
    assert not (ranks.out / "checkpoints").exists() and "Traceback" not in ranks.text()


def test_a_patient_task_moves_with_what_it_writes_or_maps(tmp_path: Path) -> None:
    """Else a save of many files, or weights that safetensors maps, would count as a hang."""
    watchdog, path = Watchdog(600.0, Interruption()), tmp_path / "file"
    path.write_bytes(bytes(2**16))
    written, mapped = os.open(path, os.O_RDWR), tmp_path / "mapped"
    mapped.write_bytes(bytes(2**24))
    os.sync()
    file = os.open(mapped, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    pages = mmap.mmap(file, 0, prot=mmap.PROT_READ)
    acts: dict[str, Callable[[], object]] = {
        "begins": lambda: None,
        "waits": lambda: None,
        "writes": lambda: os.write(written, b"x"),
        "waits again": lambda: None,
        "reads": lambda: os.pread(written, 1, 0),
        "works": lambda: sum(range(1000)),
        "maps": lambda: pages[2**23],
    }
    watchdog.mark("saving", patient=True)
    idle: list[float] = []

    def look() -> None:
        for _ in acts:
            asked.acquire()
            time.sleep(0.05)  # the main thread stands at the same line each time
            idle.append(watchdog.idle())

    asked = threading.Semaphore(0)
    looker = threading.Thread(target=look)
    looker.start()
    for act in acts.values():
        act()
        asked.release()
        time.sleep(0.15)
    looker.join()
    moved = [name for name, seconds in zip(acts, idle, strict=True) if seconds < 0.04]
    assert moved == ["begins", "writes", "reads", "maps"]


def beat(rank: int, marks: int, doing: str = "computing", line: str = "wait (a.py:1)") -> Heartbeat:
    return Heartbeat(rank, "node", 1.0, marks, doing, 7, line, idle=60.0)


def test_the_sentence_says_what_can_be_known() -> None:
    behind = [beat(3, 20, "reading data"), beat(9, 20, "reading data")]
    ahead = [beat(rank, 21) for rank in range(64) if rank not in (3, 9)]
    said = describe([*ahead, *behind], 60.0)
    assert said.startswith("step 7: rank 3 (node, in wait (a.py:1)), rank 9 (node, in wait (a.py:1)) have been reading")
    assert not describe([*ahead, *behind], 61.0)
    said = describe([beat(0, 20), beat(1, 20, line="read (b.py:2)")], 60.0)
    assert "hangs cannot be told: rank 0 (node, in wait (a.py:1)); rank 1 (node, in read (b.py:2))" in said
    assert len(describe(ahead[:60], 60.0)) < 600  # not all of them are listed
    assert "from rank 5 (?), last told starting: stopped or gone" in describe(
        [*ahead, Heartbeat(5, age=60, idle=60)], 60
    )


def test_to_say_where_one_stands_costs_next_to_nothing() -> None:
    watchdog, count = Watchdog(600.0, Interruption()), 20_000
    started = time.process_time()
    for step in range(count):
        watchdog.mark("computing", step)
    assert (time.process_time() - started) / count < 20e-6  # 0.2 us on a quiet machine
