"""launch/*.sh run as they stand, on gloo: a cache, one machine with a signal, and a SLURM job of two nodes that queues
again.

`srun` and `scontrol` are stand-ins of a few lines: they are the cluster, which a test machine has not.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ztrain.train.loop
from tests.forge import the_forge
from tests.test_run import ENVIRONMENT as PLAIN
from tests.test_run import QUIET, STARTED, Place, _no_process_is_left, losses, processes_of, rows
from tests.triplets import ROOT
from ztrain.config import Config
from ztrain.train.loop import Outcome
from ztrain.weights import checkpoint

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an active .venv
ENVIRONMENT = PLAIN | {"PATH": PATH}

pytestmark = pytest.mark.usefixtures("forge", "_no_process_is_left")
__all__ = ["_no_process_is_left"]

SRUN = """#!/usr/bin/env bash
# srun OPTION COMMAND...: the command once for each node; USR1 goes on to all of them, the worst status comes back.
shift
pids=()
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do  # on one host both would make the meeting point
  (sleep $((3 * node)); export SLURM_NODEID=$node; exec "$@") & pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
worst=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  wait "$pid" || worst=$?
done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case $1 in
  show) [[ $2 == hostnames ]] && printf '127.0.0.1\\n127.0.0.2\\n' || echo "JobId=$3 JobState=${STATE:-RUNNING}" ;;
esac
"""


def launch(command: list[str], log: Path, **more: str) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT | more, stdout=file, stderr=file, start_new_session=True
        )
    STARTED.append(process.pid)
    return process


def wait_for_rows(out: Path, count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while len(rows(out)) < count:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def nobody_left(out: Path) -> bool:
    deadline = time.monotonic() + 15
    while processes_of(out):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def words_of(place: Place, out: Path, *more: str) -> list[str]:
    """Without --output_dir where the recipe gives it."""
    return [*place.words(out, *QUIET, "--train.train_batch_size", "2", *more, name="projector")]


@pytest.mark.parametrize(
    ("number", "again"),
    [(signal.SIGUSR2, False), pytest.param(signal.SIGUSR1, True, marks=pytest.mark.slow)],
    ids=["USR2", "USR1, and goes on"],
)
def test_one_machine_saves_on_a_signal(place: Place, tmp_path: Path, number: signal.Signals, again: bool) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    command = ["launch/train.sh", "ddp", "2", *words_of(place, out, "--train.max_train_steps")]
    forged = {} if again else {"PATH": f"{the_forge().commands()}:{PATH}"}
    process = launch([*command, "100000"], log, **forged)
    wait_for_rows(out, 3, process, log)
    process.send_signal(number)
    assert process.wait(60) == 1 and nobody_left(out), log.read_text()
    assert json.loads((out / "ended.json").read_text()) == {"status": 128 + number}, log.read_text()
    found, _ = checkpoint.find("latest", out / "checkpoints")
    assert found is not None and found.step == len(losses(out))
    if not again:
        return
    process = launch([*command, str(found.step + 2)], log)
    assert process.wait(120) == 0 and nobody_left(out), log.read_text()
    assert len(losses(out)) == found.step + 2 and (out / "export").is_dir()


@pytest.mark.slow
def test_a_cache_is_filled_by_all_processes_of_its_recipe(place: Place, tmp_path: Path) -> None:
    out, log, cache = tmp_path / "run", tmp_path / "log", tmp_path / "cache"
    process = launch(["launch/cache.sh", "2", *words_of(place, out, "--cache.dir", str(cache))], log)
    assert process.wait(120) == 0 and nobody_left(out), log.read_text()
    [line] = [line for line in log.read_text().splitlines() if line.startswith("cache: computed")]
    assert "by 2 processes (" in line and list(cache.glob("[a-z]*/*.safetensors")) and not out.exists()


def recorded(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A recipe with an `accelerate` that prints its words, one a line."""
    (tmp_path / "accelerate").write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "accelerate").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{PATH}"}
    return subprocess.run([*command], cwd=ROOT, env=ENVIRONMENT | path, capture_output=True, text=True)


@pytest.mark.parametrize(
    "recipe", [("train.sh", "{}", "{cards}"), ("train_nodes.sh", "{}", "{cards}", "1", "0", "here")]
)
def test_words_of_a_recipe(tmp_path: Path, recipe: tuple[str, ...]) -> None:
    """The user's last word counts; a strategy of one process is no strategy for more."""

    def words(strategy: str, cards: int) -> list[str]:
        return [f"launch/{recipe[0]}", *(word.format(strategy, cards=cards) for word in recipe[1:])]

    for strategy in ("one_gpu", "cpu"):
        done = recorded(tmp_path, *words(strategy, 2), "--seed", "1")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert f"error: {strategy} is a strategy of one process" in done.stderr
        assert recorded(tmp_path, *words(strategy, 1)).returncode == 0
    files = ["--config", "configs/projector.yaml", "configs/tiny.yaml"]
    for said, meant in (([], "latest"), (["--resume_from_checkpoint", "none"], "none")):
        done = recorded(tmp_path, *words("ddp", 2), *files, "--data.train_data_dir", "x", "--output_dir", "y", *said)
        given = done.stdout.split("ztrain.train\n")[1].split("\n")[:-1]
        assert main_config(given).resume_from_checkpoint == meant


def test_words_of_the_recipe_for_a_cache(tmp_path: Path) -> None:
    said = recorded(tmp_path, "launch/cache.sh", "3", "--config", "my.yaml").stdout.split()
    assert said == ["launch", "--config_file", "configs/accelerate/ddp.yaml", "--num_processes", "3",
                    "--main_process_port", "0", "-m", "ztrain.cli", "cache", "--config", "my.yaml"]  # fmt: skip


def main_config(words: list[str]) -> Config:
    """What ztrain.train makes of its words."""
    made: list[Config] = []

    def stop(config: Config, truth: object) -> Outcome:
        made.append(config)
        return Outcome(exported=Path("none"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ztrain.train.loop, "train", stop)
        assert ztrain.train.loop.main(words) == 0
    return made[0]


@pytest.mark.parametrize(
    ("ended", "saves", "told", "cancelled", "again"),
    [
        (0, True, True, False, False),
        (1, True, True, False, False),
        (2, True, False, False, False),
        (138, True, True, False, True),
        (138, True, True, True, False),
        (138, True, False, False, False),  # somebody told the trainer to stop, not the job
        (75, True, False, False, True),
        (75, False, False, False, False),
        (75, True, False, True, False),
        (None, True, False, False, True),
        (None, False, False, False, False),
        (None, False, True, False, True),
    ],
)
def test_what_queues_a_slurm_job_again(
    tmp_path: Path, ended: int | None, saves: bool, told: bool, cancelled: bool, again: bool
) -> None:
    """By what a start leaves: `srun` is one that writes it."""
    run, calls = tmp_path / "run", tmp_path / "calls"
    (run / "checkpoints" / "step-00000008").mkdir(parents=True)
    lines = ["#!/usr/bin/env bash"]
    lines += [f"mkdir {run}/checkpoints/step-00000012"] * saves
    lines += [f"echo '{{\"status\": {ended}}}' > {run}/ended.json"] * (ended is not None)
    lines += ["kill -USR1 $PPID; sleep 0.2"] * told + [f"exit {int(ended != 0)}"]
    for name, text in (("srun", "\n".join(lines)), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text + "\n")
        (tmp_path / name).chmod(0o755)
    cluster = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[a-b]",
               "SLURM_GPUS_ON_NODE": "1", "CALLS": str(calls), "PATH": f"{tmp_path}:{PATH}",
               "STATE": "COMPLETING" if cancelled else "RUNNING"}  # fmt: skip
    done = subprocess.run(["launch/slurm.sh", "ddp", str(run)], cwd=ROOT, env=ENVIRONMENT | cluster)
    assert done.returncode != 0 or ended == 0
    assert calls.read_text().count("requeue 7") == again


@pytest.mark.slow
def test_a_slurm_job_queues_again_until_it_is_done(place: Place, tmp_path: Path) -> None:
    """Two nodes of one process. Told to stop: queued again; done, failed by itself or cancelled: not."""
    bin_, run, log, calls = tmp_path / "bin", tmp_path / "run", tmp_path / "log", tmp_path / "calls"
    bin_.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    calls.touch()
    cluster = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[a-b]",
               "SLURM_GPUS_ON_NODE": "1", "CALLS": str(calls), "PATH": f"{bin_}:{PATH}"}  # fmt: skip

    def job(last: int, *more: str) -> list[str]:
        words = words_of(place, run, "--train.max_train_steps", str(last), *more)
        place_of = words.index("--output_dir")
        return ["launch/slurm.sh", "ddp", str(run), *words[:place_of], *words[place_of + 2 :]]

    requeue = f"requeue {os.getpid()}"
    process = launch(job(100000), log, **cluster)
    wait_for_rows(run, 3, process, log)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) != 0 and nobody_left(run), log.read_text()
    assert json.loads((run / "ended.json").read_text()) == {"status": 138}, log.read_text()
    assert calls.read_text().count(requeue) == 1
    found, _ = checkpoint.find("latest", run / "checkpoints")
    assert found is not None and found.step == len(losses(run))
    process = launch(job(found.step + 2), log, **cluster)  # as SLURM starts it again
    assert process.wait(120) == 0 and nobody_left(run), log.read_text()
    assert f"resuming from {found.path} at step {found.step}" in log.read_text()
    assert len(losses(run)) == found.step + 2 and calls.read_text().count(requeue) == 1
    process = launch(job(found.step + 4, "--seed", "3"), log, **cluster)  # refused: fails by itself
    assert process.wait(60) != 0 and nobody_left(run), log.read_text()
    assert json.loads((run / "ended.json").read_text()) == {"status": 2}
    assert calls.read_text().count(requeue) == 1
