"""The activation budget: what it gives never takes more than there is, and no more is computed again than must be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_main_path import QUIET, ROOT, losses
from tests.test_parity import LORA, SIGMA, encoded, make_model, noise_like
from tests.triplets import model_words
from ztrain.conditioning import Encoded
from ztrain.errors import InputError
from ztrain.model.fast.block import Keep
from ztrain.model.fast.budget import GIB, Budget, Line, Sizes

__all__ = ["encoded"]  # fixtures
pytestmark = pytest.mark.usefixtures("forge")
SIZES = Sizes(
    kept={
        Keep.NOTHING: Line(1e6, 30 * 7680.0),
        Keep.COSTLY: Line(2e6, 90 * 7680.0),
        Keep.PRODUCTS: Line(2e6, 370 * 7680.0),
        Keep.EVERYTHING: Line(5e6, 450 * 7680.0),
    },
    working=Line(3e7, 5e5),
    blocks=30,
)
"""About those of the real transformer in bfloat16, batch 1."""


def taken(keeps: list[Keep], tokens: int) -> float:
    return SIZES.least(tokens) + sum(SIZES.of_block(keep, tokens) for keep in keeps)


@given(tokens=st.integers(32, 40_000), gib=st.floats(0.1, 100.0))
def test_a_batch_stays_inside_and_leaves_no_room_for_one_more_block(tokens: int, gib: float) -> None:
    budget = Budget(SIZES, gib * GIB)
    if SIZES.least(tokens) > gib * GIB:
        with pytest.raises(InputError, match=f"{tokens:,} tokens takes .* lower train.train_batch_size or"):
            budget(tokens, 30)
        return
    keeps = list(budget(tokens, 30))
    assert len(keeps) == 30 and taken(keeps, tokens) <= gib * GIB * (1 + 1e-9)
    assert keeps == sorted(keeps)  # the last blocks keep most
    least = min(keeps)
    if least < Keep.EVERYTHING:
        more = [Keep(least + 1), *keeps[1:]]
        assert taken(more, tokens) > gib * GIB * (1 - 1e-9)
    assert max(keeps) - least <= 1  # what costs most to compute again comes first, everywhere


@given(tokens=st.integers(32, 20_000), gib=st.floats(1.0, 50.0), more=st.floats(0.0, 20.0))
def test_more_memory_or_fewer_tokens_never_keep_less(tokens: int, gib: float, more: float) -> None:
    try:
        keeps = Budget(SIZES, gib * GIB)(tokens, 30)
    except InputError:
        return
    for other in (Budget(SIZES, (gib + more) * GIB)(tokens, 30), Budget(SIZES, gib * GIB)(tokens // 2, 30)):
        assert all(a <= b for a, b in zip(keeps, other, strict=True))


@given(tokens=st.integers(32, 20_000), gib=st.floats(1.0, 50.0), idle=st.floats(0.0, 2.0))
def test_where_memory_is_short_each_time_less_is_kept_and_no_batch_is_refused_for_it(
    tokens: int, gib: float, idle: float
) -> None:
    budget = Budget(SIZES, gib * GIB)
    assert not budget.keep_less(0.0)  # nothing has been asked for
    try:
        plans = [budget(tokens, 30)]
    except InputError:
        return
    while budget.keep_less(idle * GIB):
        assert budget.withheld >= idle * GIB
        plans.append(budget(tokens, 30))
        assert plans[-1] != plans[-2] and all(a <= b for a, b in zip(plans[-1], plans[-2], strict=True))
    assert set(plans[-1]) == {Keep.NOTHING} and len(plans) < 40


def test_a_line_goes_through_its_measurements_and_never_falls() -> None:
    line = Line.through((576, 1352.0), (1600, 3400.0))
    assert line.per_token == 2.0 and line.at(576) == 1352.0 and line.at(4096) == 8392.0
    tiny = Line.through((96, 960.0), (96, 1920.0))  # both padded to the same number of tokens
    assert (tiny.fixed, tiny.per_token) == (0.0, 20.0)
    flat = Line.through((576, 1000.0), (1600, 900.0))
    assert flat.per_token == 0.0 and flat.at(5000) == 900.0


def test_a_budget_is_asked_only_for_what_is_kept(family: Path, encoded: Encoded) -> None:
    """Previews and validation keep nothing, and their batches are larger."""
    model = make_model(family, [LORA]).train()
    budget = Budget(SIZES, 0.0)
    model.execution.keeping = budget
    noisy = noise_like((8, 8), (8, 8), (8, 8))
    with torch.no_grad():
        model(noisy, SIGMA, encoded)
    assert budget.last is None
    with pytest.raises(InputError, match="lower train.train_batch_size"):
        model(noisy, SIGMA, encoded)


SHORT = """
import sys, torch
from ztrain.train import run
from ztrain.train import loop as train
from ztrain.model.fast.block import Keep
from ztrain.model.fast.budget import Budget, Line, Sizes

class Short(Budget):
    '''Of a card that has less than was measured: its fourth forward pass fails, and its eighth backward pass.'''
    passes, never_enough = 0, False
    def __call__(self, tokens, blocks):
        Short.passes += 1
        if Short.passes == 4 or Short.never_enough and Short.passes > 4:
            raise torch.OutOfMemoryError("forward")
        return super().__call__(tokens, blocks)

def fail(gradient):
    if Short.passes == 8:
        raise torch.OutOfMemoryError("backward")

def tune(model, *_, **__):
    kept = {keep: Line(gib * 2**30, 0) for keep, gib in zip(Keep, (0, 0.5, 0.75, 1), strict=True)}
    model.execution.keeping = Short(Sizes(kept, Line(0, 0), 1), 2.0 * 2**30)
    next(p for p in model.parameters() if p.requires_grad).register_hook(fail)

name = sys.argv.pop(1)
Short.never_enough = name == "never enough"
if name != "enough":
    run.tune = tune
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_where_memory_is_short_a_step_is_computed_again_with_less_kept(
    family: Path, paintings: Path, tmp_path: Path
) -> None:
    """In the second of two micro-steps: forward in step 2, backward in step 3. The losses are an undisturbed run's."""
    for name in ("short", "enough", "never enough"):
        words = ["--config", "configs/lora.yaml", "configs/tiny.yaml", *model_words(family), *QUIET]
        words += ["--data.train_data_dir", str(paintings), "--cache.dir", str(paintings.parent / "cache")]
        words += ["--train.gradient_accumulation_steps", "2", "--train.max_train_steps", "4"]
        done = subprocess.run(
            [sys.executable, "-c", SHORT, name, *words, "--output_dir", str(tmp_path / name)],
            capture_output=True, text=True, cwd=ROOT, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        if name == "never enough":
            assert done.returncode == 2 and len(losses(tmp_path / name)) == 1, done.stdout + done.stderr
            assert "error: step 2: the GPU's memory is too small for a batch of 4; set train.gradient" in done.stderr
            continue
        assert done.returncode == 0, done.stdout + done.stderr
        said = [line for line in done.stdout.splitlines() if line.startswith("activations may take")]
        assert [line[:52] for line in said] == [
            "activations may take 1.92 GiB from step 2 on: memory",
            "activations may take 1.68 GiB from step 3 on: memory",
        ] * (name == "short")
    assert losses(tmp_path / "short") == losses(tmp_path / "enough") and len(losses(tmp_path / "short")) == 4
