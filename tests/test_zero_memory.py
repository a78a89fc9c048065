"""Under ZeRO-3 a process has its part of the base, and of the rest the few blocks that it computes and those that come.

`python -m tests.test_zero_memory`, which torchrun starts, is one process: a few steps of a LoRA on a transformer of
which nearly all are blocks, under configs/deepspeed/zero3.json with its numbers made as small as the blocks. What it
trains is tested by test_strategies.py, what it takes on GPUs is measured by benchmarks.launch.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from diffusers import ZImageTransformer2DModel
from torch import nn

from tests.test_strategies import ENVIRONMENT, NO_DEEPSPEED, of_zero
from tests.triplets import ROOT
from ztrain.adapters import build_adapters
from ztrain.adapters.lora import LoraAdapterConfig
from ztrain.conditioning import Encoded
from ztrain.config import load_config
from ztrain.distributed.strategy import KWARGS, strategy_of
from ztrain.model.adapted_dit import AdaptedDiT

REAL_BLOCK = 181_000_000  # numbers
DIM, LAYERS, REFINERS = 64, 8, 2
STEPS = 3  # DeepSpeed records the order in the first, and goes by it from the second on


@pytest.mark.skipif(find_spec("deepspeed") is None, reason=NO_DEEPSPEED)
def test_zero3_never_has_more_than_a_few_blocks_whole(tmp_path: Path) -> None:
    strategy = of_zero(3, tmp_path)
    path = Path(strategy["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    settings = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    zero, block = settings["zero_optimization"], make_transformer().layers[0]
    for key, value in zero.items():
        if key.startswith(("stage3_max", "stage3_prefetch")):
            zero[key] = value * numbers(block) // REAL_BLOCK
    zero["stage3_param_persistence_threshold"] = DIM**2 - 1
    path.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.test_zero_memory"], cwd=ROOT, env=ENVIRONMENT | strategy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [said] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert said["whole as the engine got it"] == 0
    assert said["looks"] == STEPS * (2 * LAYERS + 2 * REFINERS)  # the LoRA leaves refiners without a backward pass
    assert 0.9 < said["most blocks whole"] < 4 < LAYERS


def make_transformer() -> Any:
    return ZImageTransformer2DModel(
        dim=DIM,
        n_layers=LAYERS,
        n_refiner_layers=REFINERS,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 8, 16],
        axes_lens=[64, 16, 16],
    ).to(torch.bfloat16)


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[KWARGS])
    torch.manual_seed(0)
    dit = make_transformer()
    block, cut = numbers(dit.layers[0]), [p for p in dit.parameters() if p.numel() >= DIM**2]
    model = AdaptedDiT(dit, build_adapters([LoraAdapterConfig(rank=2)])).train()
    dit.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    words = ["--train.gradient_checkpointing", "on", "--train.gradient_accumulation_steps", "1"]
    config = load_config([Path("configs/lora.yaml")], words, "test")
    at_engine: list[int] = []
    looks: list[float] = []
    prepare = accelerator.prepare

    def counted(*given: Any) -> Any:
        at_engine.append(numbers(model))
        return prepare(*given)

    def look(*_: Any) -> None:
        """What is cut is empty while it is not put together."""
        looks.append(sum(p.numel() for p in cut) / block)

    def look_now_and_in_backward(_: Any, __: Any, output: torch.Tensor) -> None:
        look()
        if output.requires_grad:
            output.register_hook(look)

    accelerator.prepare = counted  # type: ignore[method-assign]
    wrapped, optimizer = strategy_of(accelerator).prepare(model, optimizer, config)
    for layers in (dit.noise_refiner, dit.context_refiner, dit.layers):
        for each in layers:
            each.register_forward_hook(look_now_and_in_backward)
    encoded = Encoded.of_prompts([torch.randn(5, 16)], torch.randn(3, 16))
    for _ in range(STEPS):
        velocity = wrapped(torch.randn(1, 16, 8, 8), torch.tensor([0.5]), encoded)
        accelerator.backward(velocity.float().square().mean())
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.is_main_process:
        said = {"whole as the engine got it": at_engine[0], "most blocks whole": max(looks), "looks": len(looks)}
        print("\n" + json.dumps(said), flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
