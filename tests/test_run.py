"""Runs that are killed, told to stop, continued and spread over processes: real processes, losses compared as hex."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import ranks
from tests.forge import Forged, the_forge
from tests.test_parity import LORA, make_model
from tests.test_tracking import mirrored, transaction_log
from tests.triplets import model_words, tiny_config, write_triplets
from ztrain.cache.cache import Cache
from ztrain.cache.prepare import cache_states
from ztrain.cache.samples import all_needs, read_samples
from ztrain.cli import main as cli
from ztrain.interrupt import SIGNALS
from ztrain.io.files import workspace
from ztrain.io.store import Entry
from ztrain.train.tune import Probe
from ztrain.weights import checkpoint

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
ALONE = ("ztrain.train",)
LAUNCHED = ("accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "ztrain.train")  # fmt: skip
# accelerate starts several processes without a GPU only under this word; its processes find no GPU and use gloo.
PAIR = (LAUNCHED[0], "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", *LAUNCHED[3:])
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ztrain.train")
# As launch/train.sh sets it: what torch's launcher passes on, though nohup had it ignored.
PASSED_ON = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2,SIGXCPU", "PET_SHUTDOWN_TIMEOUT": "60"}

LATEST = ("--resume_from_checkpoint", "latest")
QUIET = ("--validation.validation_steps", "0", "--validation.preview_steps", "0")


class Place:
    """Data, a warm cache and the family; `words` is the command line of a run into `out`."""

    def __init__(self, family: Path, folder: Path) -> None:
        self.family, self.data, self.cache = family, write_triplets(folder / "data", count=11), folder / "cache"
        for name in ("siglip_lora", "projector"):
            cache_states(tiny_config(family, self.data, self.cache, name=name), check=False)

    def words(self, out: Path, *more: str, name: str = "siglip_lora") -> list[str]:
        return [
            "--config", f"configs/{name}.yaml", "configs/tiny.yaml", *model_words(self.family),
            "--data.train_data_dir", str(self.data), "--cache.dir", str(self.cache), "--output_dir", str(out), *more,
        ]  # fmt: skip


pytestmark = pytest.mark.usefixtures("forge")


STARTED: list[int] = []


@pytest.fixture(autouse=True)
def _no_process_is_left(tmp_path: Path) -> Iterator[None]:
    """A failed test must not leave a trainer behind, nor the ranks of a launcher."""
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop(), signal.SIGKILL)
    send(signal.SIGKILL, tmp_path)


def finish(command: tuple[str, ...], words: list[str], status: int = 0) -> subprocess.CompletedProcess[str]:
    done = the_forge().run([*command, *words], ENVIRONMENT)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def together(count: int, words: list[str]) -> str:
    """What as many processes said of a run that ended well."""
    return ranks.run([*ALONE, *words], ENVIRONMENT, count)


def start(command: tuple[str, ...], words: list[str], log: Path, ignored: Sequence[int] = (), **more: str) -> Forged:
    """In a session of its own; `more`: variables."""
    process = the_forge().start([*command, *words], ENVIRONMENT | more, log, log, ignored=ignored)
    STARTED.append(process.pid)
    return process


def rows(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def losses(out: Path) -> list[str]:
    """As hex, one for each step from 1 on; a step that stands twice or is missing fails here."""
    trained = [row for row in rows(out) if row["step"] > 0]
    assert [row["step"] for row in trained] == list(range(1, len(trained) + 1))
    return [float(row["train/loss"]).hex() for row in trained]


def exported(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "export").iterdir()}


def wait_for(what: Callable[[], bool], process: Forged, log: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def processes_of(folder: Path) -> dict[int, bool]:
    """Living processes whose command line names a folder or what lies in it, and whether each is a rank.

    Not by session: the launcher starts every rank in one of its own.
    """
    found, name = {}, str(folder)
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")  # empty of a zombie
            if words != [""]:
                words = the_forge().words_of(int(place.name)) or words
            if any(word == name or word.startswith(f"{name}/") for word in words):
                found[int(place.name)] = not {LAUNCHED[0], TORCHRUN[0]} & set(words)
    return found


def send(number: signal.Signals, folder: Path) -> None:
    """To all of `processes_of`."""
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.mark.parametrize(
    ("name", "kills", "steps"),
    [
        ("projector", 20, 100),
        pytest.param("siglip_lora", 100, 500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_killed_at_random_moments_the_run_is_the_undisturbed_one(
    place: Place, tmp_path: Path, name: str, kills: int, steps: int
) -> None:
    """SIGKILL while it starts, at a random step or inside a save, with another number of workers after each; beside it
    lie the stubs that a full disk leaves."""
    settings = ("--train.max_train_steps", str(steps), "--train.checkpointing_steps", "2", "--train.ema_decay", "0.9",
                "--validation.validation_steps", "20", "--validation.preview_steps", "0")  # fmt: skip
    finish(ALONE, place.words(tmp_path / "whole", *settings, "--data.dataloader_num_workers", "0", name=name))
    chance = random.Random()  # whatever it draws, the promise holds
    out, log = tmp_path / "killed", tmp_path / "log"
    folder = out / "checkpoints"

    def debris() -> bool:
        return folder.is_dir() and any(path.name.startswith(".writing-") for path in folder.iterdir())

    inside_saves = last = 0
    for attempt in range(kills):
        workers = ("--data.dataloader_num_workers", str(attempt % 3))
        process = start(ALONE, place.words(out, *settings, *workers, *LATEST, name=name), log)
        if attempt % 4 == 3:
            deadline = time.monotonic() + chance.uniform(0, 1.5)  # anywhere: it may not have begun
            while time.monotonic() < deadline and len(rows(out)) <= last + 3:
                time.sleep(0.01)
        else:
            target = last + chance.randint(1, 3)
            wait_for(lambda: len(rows(out)) > target, process, log)  # noqa: B023
            if attempt % 4 == 1:
                wait_for(debris, process, log)
        process.kill()
        process.wait()
        inside_saves += debris()
        (out / ".writing-best.json").touch()
        (out / ".writing-ended.json").touch()
        last = max((checkpoint_step(path) for path in checkpoint.checkpoints(folder)), default=0)
        assert last < steps
    assert inside_saves
    workers = ("--data.dataloader_num_workers", "0")
    done = finish(ALONE, place.words(out, *settings, *workers, *LATEST, name=name))
    assert f"resuming from {folder / checkpoint.folder_name(last)} at step {last}" in done.stdout
    assert losses(out) == losses(tmp_path / "whole") and len(losses(out)) == steps
    validated = ("val/loss", "val/loss_shuffled", "val/loss_no_reference")
    keep = ("step", *validated, "train/lr", "train/grad_norm", "ema/decay")
    curves = [[{key: row.get(key) for key in keep} for row in rows(run)] for run in (out, tmp_path / "whole")]
    assert curves[0] == curves[1]
    assert exported(out) == exported(tmp_path / "whole")
    names = {path.name for path in folder.iterdir()}
    assert len(names) == 3 and all(name.startswith("step-") for name in names)
    assert not [path.name for path in out.iterdir() if path.name.startswith((".writing-", ".removing-"))]


CLOCK = """
import os, random, sys, time
chance, real = random.Random(3), time.time
time.time = lambda: real() + chance.choice([-86400.0, 0.0, 86400.0])
from ztrain.train.loop import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_clock_that_moves_by_a_day_changes_nothing(place: Place, tmp_path: Path) -> None:
    """At each look, either way, with the dates of checkpoints in reverse: steps stay in order, seconds are seconds."""
    settings = (*QUIET, "--train.checkpointing_steps", "1", "--train.max_train_steps")
    out = tmp_path / "run"
    for steps in ("3", "6"):
        finish(("-c", CLOCK), place.words(out, *settings, steps, *LATEST, name="projector"))
        for path in checkpoint.checkpoints(out / "checkpoints"):
            date = 1e9 - checkpoint_step(path)
            os.utime(path, (date, date))
    finish(ALONE, place.words(tmp_path / "quiet", *settings, "6", name="projector"))
    assert losses(out) == losses(tmp_path / "quiet")
    assert [path.name[-1] for path in checkpoint.checkpoints(out / "checkpoints")] == ["4", "5", "6"]
    assert all(0 < row["perf/step_seconds"] < 60 and 0 <= row["perf/data_wait_share"] <= 1 for row in rows(out)[-6:])


def test_a_second_trainer_is_refused_and_the_first_goes_on(place: Place, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    words = place.words(out, *ENDLESS, *LATEST, name="projector")
    process = start(ALONE, words, log)
    wait_for(lambda: len(rows(out)) > 1, process, log)
    refused = finish(ALONE, words, status=2)
    assert f"{out}: process {process.pid} on {os.uname().nodename} is training into this folder" in refused.stderr
    before = len(rows(out))
    wait_for(lambda: len(rows(out)) > before + 1, process, log)
    process.kill()
    process.wait()


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def test_processes_are_one_and_a_resume_may_change_their_number(place: Place, tmp_path: Path) -> None:
    """Equal global batch: 1 x 4, 2 x 2, 4 x 1 with dropout of everything, and 2 -> 1 -> 2 with accumulation between; of
    two styles of unequal size, with several captions and variants of each reference."""
    data = shutil.copytree(place.data, tmp_path / "data")
    manifest = data / "train" / "metadata.jsonl"
    triplets = [json.loads(line) for line in manifest.read_text().splitlines()]
    for i, row in enumerate(triplets):
        row |= {"style": "ink" if i < 2 else "oil", "prompts": [f"{i} pears"]}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in triplets))
    forms = ("--data.train_data_dir", str(data), "--data.balance", "style", "--data.reference_variants", "2")
    shares = ("--train.dropout_text", "0.2", "--train.dropout_reference", "0.3", "--train.prior_weight", "0.5")
    common = (*QUIET, *forms, *shares)
    to = "--train.max_train_steps"
    finish(ALONE, place.words(tmp_path / "one", *common, to, "6"))
    half = ("--train.train_batch_size", "2")
    together(2, place.words(tmp_path / "two", *common, *half, to, "6"))
    said = together(4, place.words(tmp_path / "four", *common, "--train.train_batch_size", "1", to, "6"))
    assert "4 processes share the work by ddp" in said
    one, *more = ([float.fromhex(loss) for loss in losses(tmp_path / name)] for name in ("one", "two", "four"))
    assert all(other == pytest.approx(one, rel=1e-5) for other in more) and len(set(one)) == 6
    changing = tmp_path / "changing"
    together(2, place.words(changing, *common, *half, to, "2"))
    finish(ALONE, place.words(changing, *common, *half, *LATEST, to, "4", "--train.gradient_accumulation_steps", "2"))
    together(2, place.words(changing, *common, *half, *LATEST, to, "6"))
    assert [float.fromhex(loss) for loss in losses(changing)] == pytest.approx(one, rel=1e-5)
    refused = finish(ALONE, place.words(changing, *common, *half, *LATEST, to, "15"), status=2)
    assert "the global batch size: 4 -> 2" in refused.stderr
    other = ("--data.reference_variants", "1", "--data.balance", "none", "--train.train_batch_size", "4")
    refused = finish(ALONE, place.words(changing, *common, *other, *LATEST, to, "15"), status=2)
    assert 'data.balance: "style" -> "none"; data.reference_variants: 2 -> 1' in refused.stderr


ENDLESS = (*QUIET, "--train.max_train_steps", "100000", "--train.checkpointing_steps", "100000")


def assert_all_end(out: Path, log: Path, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(out):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def assert_saved(out: Path, log: Path, heard: signal.Signals) -> None:
    """One whole checkpoint, of the last step that was written down."""
    found, passed = checkpoint.find("latest", out / "checkpoints")
    assert found is not None and not passed and found.step == len(losses(out)), log.read_text()
    assert len(checkpoint.checkpoints(out / "checkpoints")) == 1
    assert f"{heard.name}: finishing this step" in log.read_text() and "stopped, saved" in log.read_text()
    assert "ztrain/train/loop.py" not in log.read_text()  # no traceback but the launcher's own
    assert json.loads((out / "ended.json").read_text()) == {"status": 128 + heard}


@pytest.mark.parametrize(
    ("command", "sent", "heard"),
    [
        pytest.param(LAUNCHED, signal.SIGTERM, signal.SIGTERM, id="accelerate, one, SIGTERM"),
        pytest.param(LAUNCHED, signal.SIGUSR2, signal.SIGTERM, id="accelerate, one, SIGUSR2"),  # which ends accelerate
        pytest.param(PAIR, signal.SIGTERM, signal.SIGTERM, id="accelerate, two, SIGTERM"),
        pytest.param(TORCHRUN, signal.SIGXCPU, signal.SIGXCPU, id="torchrun, two, SIGXCPU"),
    ],
)
def test_a_launcher_that_is_told_to_stop_leaves_a_checkpoint_and_no_process(
    place: Place, tmp_path: Path, command: tuple[str, ...], sent: signal.Signals, heard: signal.Signals
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(command, place.words(out, *ENDLESS, name="projector"), log, **PASSED_ON)
    wait_for(lambda: len(rows(out)) > 3, process, log)
    os.kill(process.pid, sent)
    status = process.wait(timeout=40)
    assert_all_end(out, log)
    # docs/training.md: the launcher's own status; with one process it does not wait for the trainer.
    assert status == (-sent if command is LAUNCHED else 1), log.read_text()
    assert_saved(out, log, heard)


def test_a_signal_to_one_rank_saves_and_ends_all(place: Place, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(TORCHRUN, place.words(out, *ENDLESS, name="projector"), log)
    wait_for(lambda: len(rows(out)) > 3, process, log)
    ranks_of_run = sorted(pid for pid, is_rank in processes_of(out).items() if is_rank)
    assert len(ranks_of_run) == 2
    os.kill(ranks_of_run[1], signal.SIGUSR2)
    assert process.wait(timeout=40) == 1
    assert_all_end(out, log)
    assert_saved(out, log, signal.SIGUSR2)


def test_under_nohup_a_run_goes_on_or_saves(place: Place, tmp_path: Path) -> None:
    """SIGHUP stays ignored by a lone trainer; torch's launcher takes it back, passes it on and ends: then all save."""
    out, log = tmp_path / "alone", tmp_path / "log"
    process = start(LAUNCHED, place.words(out, *ENDLESS, name="projector"), log, ignored=[signal.SIGHUP])
    wait_for(lambda: len(rows(out)) > 2, process, log)
    send(signal.SIGHUP, out)
    before = len(rows(out))
    wait_for(lambda: len(rows(out)) > before + 3, process, log)
    send(signal.SIGTERM, out)
    process.wait(40)
    assert_all_end(out, log)
    assert_saved(out, log, signal.SIGTERM)
    out, log = tmp_path / "two", tmp_path / "other-log"
    words = place.words(out, *ENDLESS, name="projector")
    process = start(TORCHRUN, words, log, ignored=[signal.SIGHUP], **PASSED_ON)
    wait_for(lambda: len(rows(out)) > 3, process, log)
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(40) == 1
    assert_all_end(out, log)
    assert_saved(out, log, signal.SIGHUP)


@pytest.mark.parametrize(
    ("command", "number"),
    [
        pytest.param(LAUNCHED, signal.SIGINT, id="one process, SIGINT"),
        pytest.param(PAIR, signal.SIGTERM, id="two processes, SIGTERM"),
        pytest.param(LAUNCHED, signal.SIGTERM, id="one process, SIGTERM", marks=pytest.mark.slow),
        pytest.param(PAIR, signal.SIGINT, id="two processes, SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_launcher_and_trainers_at_once_is_one_wish(
    place: Place, tmp_path: Path, command: tuple[str, ...], number: signal.Signals
) -> None:
    """Ctrl-C in a terminal, or SLURM: the trainer also gets what the launcher passes on, or that it died."""
    out, log = tmp_path / "run", tmp_path / "log"
    slow = ("--train.gradient_accumulation_steps", "10", "--train.train_batch_size", "8")
    process = start(command, place.words(out, *QUIET, *slow), log)
    wait_for(lambda: len(rows(out)) > 0, process, log)
    time.sleep(0.3)  # inside a step of a second
    assert sum(processes_of(out).values()) == (1 if command is LAUNCHED else 2)
    send(number, out)
    process.wait(timeout=60)
    assert_all_end(out, log, 40)
    found, _ = checkpoint.find("latest", out / "checkpoints")
    assert found is not None and found.step == len(losses(out)) >= 2, log.read_text()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_to_the_trainer_ends_it_with_its_documented_status(
    place: Place, tmp_path: Path, number: signal.Signals
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    words = place.words(out, *QUIET, "--train.max_train_steps", "100000", name="projector")
    process = start(ALONE, words, log)
    wait_for(lambda: len(rows(out)) > 2, process, log)
    os.killpg(process.pid, number)  # as a terminal does with Ctrl-C
    assert process.wait(timeout=30) == 128 + number, log.read_text()
    found, _ = checkpoint.find("latest", out / "checkpoints")
    assert found is not None and found.step == len(rows(out))
    assert not (out / "export").exists() and "Traceback" not in log.read_text()
    if number == signal.SIGUSR1:  # and goes on from there
        last = str(found.step + 2)
        done = finish(
            ALONE,
            place.words(
                out, *QUIET, "--resume_from_checkpoint", "latest", "--train.max_train_steps", last, name="projector"
            ),
        )
        assert f"at step {found.step}" in done.stdout
        quiet = place.words(tmp_path / "quiet", *QUIET, "--train.max_train_steps", last, name="projector")
        finish(ALONE, quiet)
        assert losses(out) == losses(tmp_path / "quiet")  # what had begun when it stopped left no trace


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_it_is_saved(place: Place, tmp_path: Path) -> None:
    """One target's latents are not a number; only one of two processes sees them."""
    config = tiny_config(place.family, place.data, tmp_path / "cache", *QUIET)
    cache_states(config, check=False)
    cache = Cache(config)
    sample = read_samples(config, cache).train.samples[0]
    needs = all_needs(config, read_samples(config, cache))
    request = next(r for r in needs.requests.values() if r.state == "latents" and r.pictures[0] == sample.target)
    store = cache.store("latents")
    poisoned = {key: store.read(key) for key in store._places}
    poisoned[request.key]["states"].fill_(float("nan"))
    with workspace(cache.folder) as scratch:
        for path in store.folder.glob("*.safetensors"):
            path.unlink()
        entries = [Entry(key=key, label=key, parts=parts) for key, parts in poisoned.items()]
        store.write("poisoned", entries, scratch)
    out = tmp_path / "run"
    words = place.words(out, *QUIET, "--cache.dir", str(tmp_path / "cache"), "--train.train_batch_size", "1",
                        "--train.max_train_steps", "11", "--train.checkpointing_steps", "2")  # fmt: skip
    with ranks.Ranks([*ALONE, *words], ENVIRONMENT, 2, tmp_path) as both:
        assert both.statuses() == [1, 1] and not both.living(), both.text()
        failed = both.text()
    step = len(losses(out)) + 1
    assert 1 <= step <= 6  # two of eleven samples a step: each comes in the first six
    assert failed.count(f"RuntimeError: step {step}: the loss of samples [0]") >= 2  # on both ranks
    found, _ = checkpoint.find("latest", out / "checkpoints")
    assert (found.step if found else 0) == (step - 1) // 2 * 2
    assert found is None or all(t.isfinite().all() for t in found.tensors["trainable.safetensors"].values())


def test_validation_and_previews_change_nothing_and_show_what_is_trained(place: Place, tmp_path: Path) -> None:
    steps = ("--train.max_train_steps", "4")
    dropout = ("--adapters.1.dropout", "0.3")  # torch's own generator takes part
    finish(ALONE, place.words(tmp_path / "quiet", *QUIET, *steps, *dropout))
    shown = ("--validation.validation_steps", "2", "--validation.preview_steps", "2", "--validation.num_previews", "3",
             "--validation.sigmas", "0.1", "0.5", "0.9")  # fmt: skip
    done = finish(ALONE, place.words(tmp_path / "shown", *shown, *steps, *dropout))
    assert losses(tmp_path / "quiet") == losses(tmp_path / "shown")
    assert done.stdout.count(": validation loss") == 3
    assert done.stdout.count("val/image_use: the references that are exchanged are of the same style or of one") == 1
    assert "After 3 validations nothing can be said of a trend" in done.stdout.splitlines()[-1]
    validated = [row for row in rows(tmp_path / "shown") if "val/loss" in row]
    assert [row["step"] for row in validated] == [0, 2, 4]
    for row in validated:
        assert row["val/image_use"] == row["val/loss_shuffled"] - row["val/loss"] != 0
        assert row["val/image_use_low"] <= row["val/image_use"] <= row["val/image_use_high"]
        sigmas = [row[f"val/loss_sigma_{s:g}"] for s in (0.1, 0.5, 0.9)]
        assert sum(sigmas) / 3 == pytest.approx(row["val/loss"], rel=1e-6)
        assert len({row["val/loss"], row["val/loss_shuffled"], row["val/loss_no_reference"]}) == 3
    samples = tmp_path / "shown" / "samples"
    assert sorted(path.name for path in samples.glob("*.png")) == [f"step-{s:08d}.png" for s in (0, 2, 4)]
    own = [[(samples / f"step-{s:08d}" / f"{i}.png").read_bytes() for i in range(3)] for s in (0, 2, 4)]
    assert own[0] != own[2] and len({len(row) for row in own}) == 1
    # The columns of the frozen base are what `ztrain compare` would show: rendered before anything was attached.
    base = {path.name: path.read_bytes() for path in (samples / "base").glob("*.png")}
    assert len(base) == 12 and base["no_image-0.png"] != base["splice-0.png"]
    # What lies between two steps is no part of either: a validated step is not slow, nor the one after it.
    slowest = max(row["perf/step_seconds"] for row in rows(tmp_path / "shown") if row["step"] > 1)
    assert slowest < 5 * min(row["perf/step_seconds"] for row in rows(tmp_path / "quiet"))
    # Resumed with other rows or another sampler, the columns of the base are rendered again.
    few = ("--validation.preview_steps", "2", "--validation.num_previews", "2", "--sample.num_inference_steps", "3")
    finish(ALONE, place.words(tmp_path / "shown", *few, *LATEST, *dropout, "--train.max_train_steps", "5"))
    again = {path.name: path.read_bytes() for path in (samples / "base").glob("*.png")}
    assert again["target-1.png"] == base["target-2.png"] and again["no_image-0.png"] != base["no_image-0.png"]


def test_pictures_without_references_join_in_their_share(place: Place, tmp_path: Path) -> None:
    """The same pictures as text-only samples; half of the order is theirs, and they are validated like any other."""
    others = ("--data.text_only_data_dir", str(place.data), "--data.text_only_share", "0.5")
    words = (
        *QUIET,
        *others,
        "--train.max_train_steps",
        "4",
        "--train.prior_weight",
        "1",
        "--tracking.log_data_manifest",
    )
    finish(ALONE, place.words(tmp_path / "run", *words))
    listed = [json.loads(line) for line in (tmp_path / "run" / "triplets.jsonl").read_text().splitlines()]
    assert len(listed) == 22 and [bool(row["references"]) for row in listed] == [True] * 11 + [False] * 11
    assert str(place.data) not in (tmp_path / "run" / "triplets.jsonl").read_text()
    finish(
        ALONE, place.words(tmp_path / "without", *QUIET, "--train.max_train_steps", "4", "--train.prior_weight", "1")
    )
    # A text-only sample is held at the base, where everything still is at step 0 but the tokens of the references: its
    # loss is exactly 0 there, and the mean of the first step falls with each of them.
    with_them, without = (float.fromhex(losses(tmp_path / name)[0]) for name in ("run", "without"))
    assert 0 < with_them < 0.75 * without
    refused = finish(ALONE, place.words(tmp_path / "other", "--data.text_only_share", "0.5"), status=2)
    assert "text_only_share 0.5 needs text_only_data_dir" in refused.stderr


def test_a_probe_has_references_and_prompts_of_all_lengths(place: Place, tmp_path: Path) -> None:
    """What is compiled and measured before the first step must be as most steps are, also beside text-only samples."""
    others = ("--data.text_only_data_dir", str(place.data), "--data.text_only_share", "0.5")
    config = tiny_config(place.family, place.data, tmp_path / "cache", *QUIET, *others)
    cache_states(config, check=False)
    cache, model = Cache(config), make_model(place.family, [LORA])
    samples = read_samples(config, cache)
    lengths = sorted(len(sample.prompt) for sample in samples.train.samples)
    for count in (1, 3):
        sized = config.model_copy(update={"train": config.train.model_copy(update={"train_batch_size": count})})
        batch = Probe.of(model, sized, cache, samples, torch.device("cpu")).batch
        assert batch.encoded.with_reference == [True] * count
        found = [len(samples.trained[key.index].prompt) for key in batch.keys]
        assert found[0] == lengths[-1] and (count == 1 or found[-1] == lengths[0])


def test_a_run_is_mirrored_whole_and_continues_its_id(place: Place, tmp_path: Path) -> None:
    """W&B offline through the trainer: all of metrics.jsonl once a step, grids, tables; a resume adds to it."""
    out = tmp_path / "run"
    shown = ("--validation.preview_steps", "2", "--validation.num_previews", "2", "--validation.validation_steps", "2")
    tracked = ("--tracking.report_to", "wandb", "--tracking.mode", "offline", "--tracking.log_adapter")
    words = (*shown, *tracked, "--train.max_train_steps")
    finish(ALONE, place.words(out, *words, "3"))
    finish(ALONE, place.words(out, *words, "5", *LATEST))
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # named by the run's id
    history = []
    for file in files:
        records = [r for r in transaction_log(file) if r.WhichOneof("record_type") == "history"]
        of_start = [
            {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in records
        ]
        assert all(str(tmp_path) not in json.dumps(row) for row in of_start)
        history.append(mirrored(of_start))
        grids = [row["trainer/global_step"] for row in of_start if any(key.startswith("val/grid") for key in row)]
        assert grids == [row["trainer/global_step"] for row in of_start if any(k.startswith("val/table") for k in row)]
        assert grids == ([0, 2, 3] if file == files[0] else [4, 5])
    told = {step: values for (attempt, step), values in (history[0] | history[1]).items()}
    assert [attempt for attempt, _ in (*history[0], *history[1])] == [1] * 4 + [2] * 2
    assert told == {row.pop("step"): row for row in rows(out)} and sorted(told) == [0, 1, 2, 3, 4, 5]


def test_refusals_of_a_resume_and_a_used_folder(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = ("--train.max_train_steps", "2", "--train.checkpointing_steps", "1")
    fresh = finish(ALONE, place.words(out, *QUIET, *steps, *LATEST))
    assert "no checkpoint in" in fresh.stdout and "starting at step 0" in fresh.stdout
    used = finish(ALONE, place.words(out, *QUIET, *steps), status=2)
    assert "already holds a run; continue it with --resume_from_checkpoint latest" in used.stderr
    changed = finish(
        ALONE, place.words(out, *QUIET, *steps, *LATEST, "--train.learning_rate", "1e-5", "--seed", "3"), status=2
    )
    assert "seed: 0 -> 3; train.learning_rate: 0.003 -> 1e-05" in changed.stderr
    newest = out / "checkpoints" / "step-00000002"
    back = ("--resume_from_checkpoint", str(newest.with_name("step-00000001")), "--seed", "3")
    finish(ALONE, place.words(out, *QUIET, *steps, *back), status=2)
    assert newest.is_dir()  # a refused resume moves nothing
    weights = load_file(newest / "trainable.safetensors")
    save_file(weights, newest / "trainable.safetensors", metadata={"other": "bytes"})
    fallen = finish(ALONE, place.words(out, *QUIET, "--train.max_train_steps", "3", *LATEST))
    assert f"passed over: {newest / 'trainable.safetensors'} is missing or damaged" in fallen.stdout
    assert f"resuming from {out / 'checkpoints' / 'step-00000001'} at step 1" in fallen.stdout
    assert len(losses(out)) == 3
    assert f"step-00000002 is beyond the step that the run goes on from: moved to {newest.parent}" in fallen.stdout
    assert [path.name for path in checkpoint.checkpoints(newest.parent)] == ["step-00000001", "step-00000003"]
    schedule = place.family / "Z-Image-Turbo" / "scheduler" / "scheduler_config.json"
    text = schedule.read_text()
    try:
        schedule.write_text(text.replace('"shift": 3.0', '"shift": 6.0'))
        words = ("--models.variant", "turbo", "--train.max_train_steps", "4")
        other_path = finish(ALONE, place.words(out, *QUIET, *words, *LATEST), status=2)
        assert "the density of sigma: " in other_path.stderr and '"shift": 6.0' in other_path.stderr
    finally:
        schedule.write_text(text)
    for path in checkpoint.checkpoints(out / "checkpoints"):
        (path / "MANIFEST.json").unlink()
    lost = finish(ALONE, place.words(out, *QUIET, *steps, *LATEST), status=2)
    assert "no checkpoint is whole" in lost.stderr
    manifest = place.data / "train" / "metadata.jsonl"
    text = manifest.read_text()
    finish(ALONE, place.words(tmp_path / "other", *QUIET, *steps, name="projector"))
    try:
        manifest.write_text("".join(reversed(text.splitlines(keepends=True))))
        moved = finish(
            ALONE,
            place.words(tmp_path / "other", *QUIET, *LATEST, "--train.max_train_steps", "4", name="projector"),
            status=2,
        )
        assert "the triplets: " in moved.stderr
    finally:
        manifest.write_text(text)


def test_averaged_weights_are_what_is_exported(place: Place, tmp_path: Path) -> None:
    words = place.words(tmp_path / "run", *QUIET, "--train.max_train_steps", "3", "--train.ema_decay", "0.5",
                        "--train.checkpointing_steps", "1", name="projector")  # fmt: skip
    finish(ALONE, words)
    files = [
        load_file(path / "trainable.safetensors") for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    ]
    # diffusers' EMAModel: decay min(0.5, (1 + n) / (10 + n)), n = updates so far, and 0 at the first update.
    average = {name: tensor.clone() for name, tensor in files[0].items()}
    for n, file in enumerate(files[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * file[name] for name in average}
    exported_weights = load_file(tmp_path / "run" / "export" / "adapter.safetensors")
    assert len(exported_weights) == len(average) > 0
    for name, tensor in average.items():
        assert torch.allclose(exported_weights[name.replace("adapters.0.", "projector.")], tensor, atol=1e-6)
        assert not torch.equal(files[-1][name], tensor)


def test_a_run_that_starts_from_another_goes_on_without_it(place: Place, tmp_path: Path) -> None:
    """A fresh run with the weights of another; its resume does not read them again, and says where it began."""
    first, whole, cut = (tmp_path / name for name in ("first", "whole", "cut"))
    finish(ALONE, place.words(first, *QUIET, "--train.max_train_steps", "2", name="siglip"))
    more = (*QUIET, "--init_from", str(first / "export"), "--train.checkpointing_steps", "2", "--train.max_train_steps")
    said = finish(ALONE, place.words(whole, *more, "3")).stdout
    assert f"[siglip] starts from {first / 'export'}, step 2" in said and len(losses(whole)) == 3
    finish(ALONE, place.words(cut, *more, "2"))
    shutil.rmtree(first)
    refused = finish(ALONE, place.words(cut, *QUIET, *LATEST, "--train.max_train_steps", "3"), 2).stderr
    assert f'may not change on resume: init_from: "{first / "export"}" -> null' in refused
    finish(ALONE, place.words(cut, *more, "3", *LATEST))
    assert losses(cut) == losses(whole) and exported(cut) == exported(whole)
    origin = json.loads(exported(cut)["adapter_config.json"])["init_from"]
    assert origin["name"] == "first" and origin["step"] == 2 and origin["adapters"] == ["siglip"]
    shutil.rmtree(cut)
    refused = finish(ALONE, place.words(cut, *more, "3", *LATEST), 2).stderr
    assert "is neither an exported adapter" in refused and not (cut / "metrics.jsonl").exists()


def test_the_adapter_of_a_checkpoint_is_what_the_run_exports(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = ("--train.max_train_steps", "2", "--train.checkpointing_steps", "1", "--train.ema_decay", "0.5")
    pissa = ("--adapters.1.init", "pissa")  # its export needs the base's own weights
    words = place.words(run, *QUIET, *more, *pissa)
    finish(ALONE, words)
    first, last = checkpoint.checkpoints(run / "checkpoints")

    def export(path: Path, out: Path, words: list[str]) -> int:
        return cli(["export", *words, "--checkpoint", str(path), "--out", str(out)])

    assert export(last, tmp_path / "last" / "export", words) == 0
    assert exported(tmp_path / "last") == exported(run)
    assert export(first, tmp_path / "first" / "export", words) == 0
    earlier = exported(tmp_path / "first")
    assert json.loads(earlier["adapter_config.json"])["step"] == 1
    assert (
        earlier.keys() == exported(run).keys()
        and earlier["adapter.safetensors"] != exported(run)["adapter.safetensors"]
    )
    capsys.readouterr()
    assert export(first, tmp_path / "last" / "export", words) == 2
    assert "exists already; remove it or choose another --out" in capsys.readouterr().err
    assert export(first, tmp_path / "other", [*words, "--adapters.1.rank", "3", "--train.learning_rate", "1"]) == 2
    complaint = capsys.readouterr().err
    assert "not the configuration of its run: adapters" in complaint and "rank" in complaint
    assert "learning_rate" not in complaint and not (tmp_path / "other").exists()
    assert (
        export(
            first,
            tmp_path / "other",
            place.words(run, *pissa, "--models.base.pretrained_model_name_or_path", str(place.family / "Z-Image")),
        )
        == 2
    )
    assert "the transformer: " in capsys.readouterr().err
    (first / "trainable.safetensors").write_bytes(b"torn")
    assert export(first, tmp_path / "other", words) == 2
    assert "is missing or damaged" in capsys.readouterr().err
