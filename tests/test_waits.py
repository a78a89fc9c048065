"""The training loop never waits for a step that it has just asked for: by the order of what it does, and on a GPU by
torch's own record of waits (of which copies from memory that is not pinned are no part)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forge import the_forge
from tests.test_main_path import QUIET, ROOT
from tests.triplets import model_words

ORDER = """
import sys
from ztrain.train import loop as train

done = []
def noted(name, function, step):
    def call(*arguments):
        done.append(f"{name} {step(*arguments)}")
        return function(*arguments)
    return call

train.seed_micro_step = noted("gradients", train.seed_micro_step, lambda seed, micro_step, *_: micro_step // 2 + 1)
train.Meter.wait_for_step = noted("figures", train.Meter.wait_for_step, lambda meter: meter.step + 1)
train.save = noted("save", train.save, lambda run: run.step)
status = train.main(sys.argv[1:])
print(*done, sep=", ")
sys.exit(status)
"""
LOOP = """
import sys, traceback, warnings
import torch
from ztrain.train import loop as train

waits = []
def note(message, *_, **__):
    if "called a synchronizing" in str(message):  # not: that the mode is a prototype, which is said once
        waits.append([f"{f.filename.rpartition('ztrain/')[2]}:{f.lineno}" for f in traceback.extract_stack()[:-1]])
warnings.showwarning = note
warnings.simplefilter("always")

def around(owner, name, mode):
    function = getattr(owner, name)
    def call(*arguments):
        before = torch.cuda.get_sync_debug_mode()
        during, after = mode(before, *arguments)
        torch.cuda.set_sync_debug_mode(during)
        result = function(*arguments)
        torch.cuda.set_sync_debug_mode(after)
        return result
    setattr(owner, name, call)

# From a step's first draw to its figures on their way, but for the wait in between. What stays goes to the card first.
around(train, "seed_micro_step", lambda _, seed, micro_step, rank: ("default", "warn" if micro_step > 1 else "default"))
around(train.Meter, "wait_for_step", lambda before, *_: ("default", before))
around(train.Meter, "copy_to_host", lambda before, *_: (before, "default"))
status = train.main(sys.argv[1:])
sys.exit(f"{len(waits)} waits, for example {waits[0]}" if waits else status)
"""


@pytest.mark.usefixtures("forge")
def test_figures_are_read_when_the_next_gradients_are_asked_for(family: Path, paintings: Path, tmp_path: Path) -> None:
    """But at once where a step is saved; with two micro-steps, after the first."""
    words = ["--config", "configs/lora.yaml", "configs/tiny.yaml", *model_words(family), *QUIET]
    words += ["--data.train_data_dir", str(paintings), "--cache.dir", str(paintings.parent / "cache")]
    words += ["--train.max_train_steps", "4", "--train.checkpointing_steps", "3"]
    words += ["--train.gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "run")]
    done = the_forge().run(["-c", ORDER, *words], {**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", ".join((
        "gradients 1, gradients 1",
        "gradients 2, figures 1, gradients 2",
        "gradients 3, figures 2, gradients 3, figures 3, save 3",
        "gradients 4, gradients 4, figures 4, save 4",
    )) in done.stdout.splitlines()  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("forge")
@pytest.mark.parametrize("name", ["splice_lora", "siglip", "projector"])
def test_a_step_is_asked_for_without_waiting(family: Path, paintings: Path, tmp_path: Path, name: str) -> None:
    words = ["--config", f"configs/{name}.yaml", "configs/tiny.yaml", *model_words(family), *QUIET]
    words += ["--data.train_data_dir", str(paintings), "--cache.dir", str(tmp_path / "cache")]
    words += ["--train.max_train_steps", "6", "--train.ema_decay", "0.9", "--train.compile", "off"]
    done = subprocess.run(
        [sys.executable, "-c", LOOP, *words, "--output_dir", str(tmp_path / "run")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0 and "exported:" in done.stdout, done.stdout + done.stderr
