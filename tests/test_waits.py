"""The training loop never waits for a step that it has just asked for: on a GPU, by torch's own record of waits."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_main_path import QUIET, ROOT, paintings
from tests.triplets import model_words

__all__ = ["paintings"]  # a fixture
LOOP = """
import sys, traceback, warnings
import torch
from ztrain import train

waits = []
def note(message, *_, **__):
    if "synchroniz" in str(message):
        waits.append([f"{f.filename.rpartition('ztrain/')[2]}:{f.lineno}" for f in traceback.extract_stack()[:-1]])
warnings.showwarning = note
warnings.simplefilter("always")

def watched(run, meter, begun):
    # The figures of the step before are read in between: the one wait of a step, after all this.
    torch.cuda.set_sync_debug_mode("warn" if run.step > 1 else "default")  # layouts of each size are made once
    try:
        gradients(run, meter, begun)
    finally:
        torch.cuda.set_sync_debug_mode("default")

def asked(*arguments):
    torch.cuda.set_sync_debug_mode("warn")
    try:
        ask(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")

gradients, train._add_gradients = train._add_gradients, watched
ask, train.Meter.ask = train.Meter.ask, asked
status = train.main(sys.argv[1:])
waits = [frames for frames in waits if not any(frame.startswith("layout.py") for frame in frames)]
sys.exit(f"{len(waits)} waits, for example {waits[0]}" if waits else status)
"""


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
    assert done.returncode == 0, done.stdout + done.stderr
