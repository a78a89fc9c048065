"""Every command that is told to stop ends with 128 + the signal's number: no traceback, nothing half-written, and no
process left. What training does besides is in test_run.py and test_ends.py."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.forge import Forged, the_forge
from tests.test_run import ENVIRONMENT
from tests.triplets import ROOT, model_words, write_triplets
from ztrain.interrupt import SIGNALS, Interruption, interruption
from ztrain.io.files import whole_file
from ztrain.terminal import command


def by_name(number: int) -> str:
    return signal.Signals(number).name


@pytest.fixture(autouse=True)
def _handlers_are_given_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    signal.signal(signal.SIGXCPU, before[list(SIGNALS).index(signal.SIGXCPU)])  # which comes again: ignored at the end
    assert [signal.getsignal(number) for number in SIGNALS] == before and interruption() is None


@pytest.mark.parametrize("number", SIGNALS, ids=by_name)
def test_a_command_ends_with_the_documented_status_and_leaves_nothing_half_written(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with whole_file(tmp_path / "result.json") as building:
            building.write_text("{")
            signal.raise_signal(number)
            time.sleep(9)

    assert command(work) == 128 + number and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == f"{by_name(number)}: stopped; what is finished is kept\n"
    documented = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"| {by_name(number)} | {SIGNALS[number]} | {128 + number} |" in documented


def test_a_signal_whose_exception_python_drops_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    """As in a destructor, or in what logging does beside a fork."""

    class Deleted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def work() -> None:
        Deleted()
        time.sleep(9)

    began = time.monotonic()
    assert command(work) == 128 + signal.SIGTERM and time.monotonic() - began < 4
    assert capsys.readouterr().err == "SIGTERM: stopped; what is finished is kept\n"


def test_a_signal_that_was_ignored_stays_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert command(lambda: signal.raise_signal(signal.SIGHUP)) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert command(lambda: signal.raise_signal(signal.SIGTERM)) == 143
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "SIGTERM: stopped" in capsys.readouterr().err


def test_a_command_around_training_leaves_the_signals_to_it() -> None:
    """Training notes a signal, finishes its step and gives the signals back; one wish is not taken for two."""

    def training() -> int:
        inner = Interruption()
        inner.install()
        signal.raise_signal(signal.SIGUSR2)
        assert interruption() is inner and inner.received == signal.SIGUSR2  # nothing was raised
        inner.restore()
        signal.raise_signal(signal.SIGTERM)  # the launcher's death, which follows
        return 128 + inner.received

    assert command(training) == 128 + signal.SIGUSR2


def test_a_command_that_cannot_unwind_ends_all_the_same(tmp_path: Path) -> None:
    """Its main thread waits for a thread that does not end."""
    program = """if True:
        import sys, threading, time
        from concurrent.futures import ThreadPoolExecutor
        from ztrain import interrupt
        from ztrain.terminal import command
        interrupt.UNWIND_SECONDS = 0.3
        def work():
            with ThreadPoolExecutor(1) as pool:
                pool.submit(time.sleep, 60)
                print("waits", flush=True)
        sys.exit(command(work))"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"waits\n"
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 128 + signal.SIGHUP


def started(arguments: list[str], tmp_path: Path) -> tuple[Forged, Path]:
    log = tmp_path / "log"
    log.touch()
    return the_forge().start(arguments, ENVIRONMENT, log, log), log


def wait_for(what: Callable[[], object], process: Forged, log: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def end(process: Forged, number: signal.Signals, log: Path, *, to_all: bool = False) -> str:
    """Sends a signal, to the process or as a terminal does; what it said, once it and all that it started are gone."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.kill(process.pid, number) if not to_all else os.killpg(process.pid, number)
    assert process.wait(30) == 128 + number, log.read_text()
    _, alive = psutil.wait_procs(family, timeout=10)
    living = [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not living, [one.cmdline() for one in living]
    said = log.read_text()
    assert "Traceback" not in said and re.search(rf"^{by_name(number)}: stopped", said, re.MULTILINE), said
    return said


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith((".writing-", ".removing-"))]


@pytest.mark.usefixtures("forge")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=by_name)
def test_a_build_that_is_stopped_leaves_no_worker(tmp_path: Path, number: signal.Signals) -> None:
    """A terminal tells the workers as well: they leave the answer to the build."""
    write_pictures(tmp_path / "pictures")
    (tmp_path / "build.yaml").write_text(f"sources: [{tmp_path / 'pictures'}]\nlabel: {{styles: {{}}}}\n")
    words = ["--config", str(tmp_path / "build.yaml"), "--out", str(tmp_path / "out"), "--workers", "2",
             "--rows-per-shard", "100"]  # fmt: skip
    process, log = started(["data_tools.build", *words], tmp_path)
    wait_for(lambda: len(psutil.Process(process.pid).children(recursive=True)) >= 2, process, log)
    end(process, number, log, to_all=number == signal.SIGINT)
    assert not half_written(tmp_path / "out")


def write_pictures(folder: Path) -> None:
    for style in range(2):
        (folder / f"style{style}").mkdir(parents=True)
        for count in range(300):
            Image.new("RGB", (256, 256), (style, count % 256, 7)).save(folder / f"style{style}" / f"{count}.png")


@pytest.mark.usefixtures("forge")
def test_the_demo_passes_a_signal_on_and_waits(tmp_path: Path) -> None:
    process, log = started(["ztrain.demo", "--out", str(tmp_path / "demo"), "--smoke"], tmp_path)
    wait_for(lambda: "$ data_tools.build" in log.read_text(), process, log)
    wait_for(lambda: psutil.Process(process.pid).children(), process, log)
    end(process, signal.SIGTERM, log)
    assert not half_written(tmp_path / "demo")


@pytest.mark.usefixtures("forge")
def test_a_cache_that_is_stopped_keeps_what_is_whole(tmp_path: Path, family: Path) -> None:
    words = ["--config", "configs/siglip_lora.yaml", "configs/tiny.yaml", *model_words(family),
             "--data.train_data_dir", str(write_triplets(tmp_path / "data", count=40)), "--cache.dir",
             str(tmp_path / "cache"), "--cache.entries_per_shard", "1"]  # fmt: skip
    process, log = started(["ztrain.cli", "cache", *words], tmp_path)
    wait_for(lambda: len(list((tmp_path / "cache").glob("[a-z]*/*.safetensors"))) > 3, process, log)
    end(process, signal.SIGUSR2, log)
    assert not half_written(tmp_path / "cache")
