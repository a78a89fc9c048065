"""Recorded main blocks against the same blocks as they are: velocities and gradients, also when these are summed up."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import step
from tests.test_blocks import distance
from ztrain.model.fast.block import Keep
from ztrain.model.fast.blocks import run, use_fast_blocks
from ztrain.model.fast.cuda_graphs import Replays

CASES = ["lora_512_b1", "mixed_captions_b4", "siglip_lora_1024_b1_24gib"]


def gradients(each: step.Step, scale: float) -> list[Tensor]:
    each.velocity().square().mean().mul(scale).backward()
    return [parameter.grad.clone() for parameter in each.trained if parameter.grad is not None]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("name", CASES)
def test_replayed_gradients_are_the_blocks_own_and_add_up(name: str, backend: str | None) -> None:
    torch.compiler.reset()
    case = replace(step.CASES[name], keeps=Keep.EVERYTHING)
    each = step.Step(case, "ztrain_eager", step.TINY, torch.device("cuda"))
    each.model.execution.keeping = None
    use_fast_blocks(each.model.dit, backend=backend)
    for i, parameter in enumerate(each.trained):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator("cuda").manual_seed(i))
    gradients(each, 1.0)
    each.optimizer.zero_grad()
    true = [*gradients(each, 1.0), *gradients(each, 2.0)]  # the second on top of the first
    replays = Replays(100_000)
    each.model.execution.run = replays
    for _ in range(4):  # as they are, recorded, replayed, replayed
        each.optimizer.zero_grad()
        found = [*gradients(each, 1.0), *gradients(each, 2.0)]
        assert distance(found, true) < 1e-5
    assert len(replays._graphs) == 1
    with torch.no_grad():  # weights that move are the graph's own
        for parameter in each.trained:
            parameter.mul_(1.5)
    each.optimizer.zero_grad()
    found = gradients(each, 1.0)
    each.model.execution.run = run
    each.optimizer.zero_grad()
    assert distance(found, gradients(each, 1.0)) < 1e-5
