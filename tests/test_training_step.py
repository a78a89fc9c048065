"""What whole-run tests cannot tell apart in a training step: dropout, the prior, idle weights, schedules."""

import functools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from tests.test_parity import LORA, PROJECTOR, SIGLIP, SIGMA, encoded, make_model, noise_like
from tests.triplets import ROOT, tiny_config, write_triplets
from ztrain.adapters.splice import SpliceConfig
from ztrain.cache.order import SampleKey
from ztrain.conditioning import Dropout, Encoded
from ztrain.config import TrainConfig, load_config
from ztrain.interrupt import Interruption
from ztrain.model.flow import draw_dropout
from ztrain.train.meter import Meter
from ztrain.train.optimizer import make_optimizer, make_schedule
from ztrain.train.run import build

__all__ = ["encoded"]  # fixtures
LISTS = [[PROJECTOR], [SpliceConfig(), LORA], [SIGLIP], [SIGLIP, LORA], [LORA]]
NAMES = ["projector", "splice_lora", "siglip", "siglip_lora", "lora"]


def test_dropout_takes_one_thing_at_a_time(encoded: Encoded) -> None:
    sample = encoded.select([0])
    dropout = Dropout(text=0.1, reference=0.2, both=0.3)
    counts: Counter = Counter()
    for i in range(3000):
        kept = dropout.apply(sample, draw_dropout(SampleKey(0, 0, i)))
        counts[torch.equal(kept.text[0], sample.null_text), kept.with_reference[0]] += 1
    expected = {(True, True): 0.1, (False, False): 0.2, (True, False): 0.3, (False, True): 0.4}
    assert set(counts) == set(expected)
    assert all(counts[what] / 3000 == pytest.approx(share, abs=0.03) for what, share in expected.items())
    assert Dropout().apply(sample, 0.0) is sample and encoded.with_reference == [True, True, False]


@pytest.mark.parametrize("adapters", LISTS, ids=NAMES)
def test_base_velocity_is_the_base_and_leaves_no_trace(family: Path, encoded: Encoded, adapters: list) -> None:
    """Also with weights that have moved, and between forward passes that train."""
    noisy = noise_like((8, 8), (12, 6), (4, 10))
    with torch.no_grad():
        plain = make_model(family, [])(noisy, SIGMA, encoded)
    model = make_model(family, adapters).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    reference = [v.detach() for v in model(noisy, SIGMA, encoded)]
    base = model.base_velocity(noisy, SIGMA, encoded)
    assert all(torch.equal(mine, theirs) and not mine.requires_grad for mine, theirs in zip(base, plain, strict=True))
    again = model(noisy, SIGMA, encoded)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, reference, strict=True))
    assert [p for p in model.parameters() if p.requires_grad] == trained
    sum(v.square().mean() for v in again).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("adapters", LISTS, ids=NAMES)
def test_weights_that_a_batch_does_not_use_get_zero_gradients(family: Path, encoded: Encoded, adapters: list) -> None:
    model = make_model(family, adapters).train()
    noisy = noise_like((8, 8), (8, 8))
    bare = encoded.select([0, 1]).without_reference()
    output = model(noisy, SIGMA[:2], bare)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(output, model(noisy, SIGMA[:2], bare), strict=True))
    sum(v.square().mean() for v in output).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            if "siglip" in name or name.startswith("adapters."):  # what reads a reference is idle
                assert not parameter.grad.any(), name
    teaches = any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert teaches == any(adapter.acts_without_reference for adapter in adapters)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("constant_with_warmup", [0.1, 0.6, 1.0, 1.0]),
        ("linear", [0.1, 0.6, 1.0, 0.5]),
        ("cosine", [0.1, 0.6, 1.0, 0.5]),
        ("cosine_with_restarts", [0.1, 0.6, 1.0, 1.0]),
        ("polynomial", [0.1, 0.6, 1.0, 0.25]),
    ],
)
def test_schedules_warm_up_and_end_where_they_should(schedule: str, expected: list[float]) -> None:
    """At steps 0, 5, 10 (end of the warm-up) and 15 (half of what is left): closed forms of diffusers' schedules, whose
    warm-up would begin with a step at rate 0; a run that began so goes on so. Each group has its own rate."""
    config = TrainConfig(
        lr_scheduler=schedule, lr_warmup_steps=10, max_train_steps=20, learning_rate=2.0, lr_num_cycles=2, lr_power=2.0
    )
    for from_zero in (False, True):
        groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in (2.0, 6.0)]
        optimizer = make_optimizer(config, groups, torch.device("cpu"))
        scheduler = make_schedule(config, optimizer, from_zero=from_zero)
        rates = []
        for _ in range(16):
            rates.append(scheduler.get_last_lr()[0] / 2.0)
            assert scheduler.get_last_lr()[1] / 6.0 == pytest.approx(rates[-1])
            optimizer.step()
            scheduler.step()
        late = 0.1 if from_zero and schedule != "constant" else 0.0
        wanted = [expected[0] - late, expected[1] - late, *expected[2:]]
        assert [rates[i] for i in (0, 5, 10, 15)] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_configs_for_a_24gb_card_train_the_same_lists(name: str) -> None:
    plain, real = (load_config([ROOT / "configs" / f"{file}.yaml"]) for file in (name, f"{name}_24gb"))
    assert [a.meaning() for a in real.adapters] == [a.meaning() for a in plain.adapters]
    assert real.output_dir == plain.output_dir
    assert real.data.resolution == 512 and real.train.train_batch_size == 1
    assert real.train.mixed_precision == "bf16"
    # A budget where a whole run with one has been seen to end.
    rows = json.loads((ROOT / "benchmarks/results/train_real_size_nvidia_h200.json").read_text())["rows"]
    measured = {row["list"] for row in rows if "reserved_gib" in row}
    assert measured and real.train.gradient_checkpointing == ("budget" if name in measured else "on")


@pytest.mark.parametrize("way", ["asked", "fused", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bad", ["loss", "gradient", None])
def test_a_step_that_is_not_finite_is_not_taken(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str | None, way: str
) -> None:
    """Neither weights nor moments move, whether the optimizer is told on the device or the host asks; and the run ends
    with a sentence."""
    data = write_triplets(tmp_path / "data")
    words = ("--validation.validation_steps", "0", "--validation.preview_steps", "0", "--train.lr_warmup_steps", "0")
    config = tiny_config(family, data, tmp_path / "cache", *words, name="projector")
    if way == "fused":  # as on a GPU
        monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, fused=True))
    if way == "gpu":  # whatever another test has asked for
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=way != "gpu")
    run = build(config, accelerator, None)
    assert bool(run.optimizer.optimizer.defaults["fused"]) == (way != "asked")
    meter = Meter(0, 9, 1, accelerator, Interruption())

    def step(spoilt: str | None) -> None:
        for parameter in run.trained.values():
            parameter.grad = torch.full_like(parameter, 0.1)
        if spoilt == "gradient":
            next(iter(run.trained.values())).grad.view(-1)[0] = float("inf")
        loss = float("nan") if spoilt == "loss" else 1.0
        meter.add(0, [SampleKey(0, 0, 7)], torch.tensor([0.5]), torch.tensor([loss]).to(accelerator.device))
        figures = meter.gather_step(run.strategy.clip(run.trained, 1.0))
        run.strategy.step(run.optimizer, figures)
        meter.copy_to_host(figures, run.learning_rates)

    def everything() -> list[torch.Tensor]:
        state = run.optimizer.optimizer.state
        kept = [value for p in run.trained.values() for value in state[p].values()]
        return [tensor.detach().clone() for tensor in (*run.trained.values(), *kept)]

    step(None)
    before = everything()
    meter.wait_for_step()
    step(bad)
    moved = [not torch.equal(mine, theirs) for mine, theirs in zip(everything(), before, strict=True)]
    assert all(moved) if bad is None else not any(moved)
    if bad is None:
        assert meter.wait_for_step()[0]["train/loss"] == 1.0
        return
    named = r"the loss of samples \[7\]" if bad == "loss" else "the gradient norm"
    with pytest.raises(RuntimeError, match=f"step 2: {named}"):
        meter.wait_for_step()
