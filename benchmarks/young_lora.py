"""How much of a LoRA's first step the forward pass sees on a bfloat16 base: ours beside diffusers and peft.

    python -m benchmarks.young_lora [--out DIR] [--eager] [--tiny]

Random weights; [lora] of rank 32 takes one step of AdamW by the gradients of a float32 base. What the loss of the same
batch then falls by is what is to be seen; each way computes both losses with the base in bfloat16. A first step changes
a product by less than half of its last bit: where a rounded product and what a LoRA adds are rounded together, that is
lost. Ours also compiled by inductor, by what blocks keep, unless --eager. On a CUDA GPU the real size at 1024 px;
elsewhere a transformer of 30 layers, 1024 wide, at 256 px, a quarter of an hour.
Out: young_lora_<device>.json, {"command", "machine", "date", "size", "falls_by" (float32), "seen" (by way: share of
it)}. --tiny: does everything run?
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.laboratory import machine
from benchmarks.pages import ROOT
from benchmarks.step import REAL, TINY, Case, Size, Step
from ztrain.adapters.lora import LoraAdapterConfig
from ztrain.block import Keep
from ztrain.blocks import use_fast_blocks, use_stock_blocks

RATE = 1e-4
"""Of AdamW; its first step is this times the sign of each gradient."""
WAYS: dict[str, Callable[[Any], None]] = {
    "diffusers and peft": use_stock_blocks,
    "ztrain": use_fast_blocks,
}
SMALL = replace(REAL, config={**REAL.config, "dim": 1024, "n_heads": 8, "n_kv_heads": 8, "cap_feat_dim": 512})


class FirstStep:
    """A model before and after it."""

    def __init__(self, size: Size, side: int, device: torch.device) -> None:
        case = Case(adapters=lambda width: [LoraAdapterConfig(rank=32)], keeps=Keep.NOTHING, side=side, captions=(64,))
        self.step = Step(case, "ztrain_eager", replace(size, dtype=torch.float32), device)
        # The same numbers in both precisions.
        self._base(torch.bfloat16)
        self._base(torch.float32)
        self._loss().backward()
        self.before = [p.detach().clone() for p in self.step.trained]
        self.after = [p.detach() - RATE * _unit(p) for p in self.step.trained]
        self.step.model.zero_grad()
        self.falls_by = self.fall()
        self._base(torch.bfloat16)

    def fall(self) -> float:
        """Of the loss, with gradients as in training: some ways keep other tensors then."""
        losses = []
        for weights in (self.before, self.after):
            for parameter, weight in zip(self.step.trained, weights, strict=True):
                parameter.data.copy_(weight)
            losses.append(float(self._loss().detach()))
        return losses[0] - losses[1]

    def _base(self, dtype: torch.dtype) -> None:
        model = self.step.model
        for parameter in model.dit.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        model.base_dtype = dtype

    def _loss(self) -> Tensor:
        step, dtype = self.step, self.step.model.base_dtype
        text = [states.to(dtype) for states in step.encoded.text]  # as a cache holds them
        velocity = step.model(step.noisy.to(dtype), step.sigma, replace(step.encoded, text=text))
        return F.mse_loss(velocity.float(), step.target.float())


def _unit(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad / (parameter.grad.abs() + 1e-8)


def seen(first: FirstStep, compiles: bool) -> dict[str, float]:
    """By way, the share of `falls_by`."""
    found, model = {}, first.step.model
    for name, use in WAYS.items():
        use(model.dit)
        found[name] = first.fall() / first.falls_by
        print(f"{name}: {found[name]:.3f}", flush=True)
    for keep in Keep if compiles else ():
        use_fast_blocks(model.dit, backend="inductor")
        model.execution.keeping = lambda tokens, blocks, keep=keep: [keep] * blocks
        name = f"ztrain, compiled, {keep.name.lower()} kept"
        found[name] = first.fall() / first.falls_by
        print(f"{name}: {found[name]:.3f}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.young_lora", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--eager", action="store_true", help="nothing is compiled")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    is_real = torch.cuda.is_available() and not options.tiny
    size, side = (TINY, 1024) if options.tiny else (REAL, 1024) if is_real else (SMALL, 256)
    first = FirstStep(size, side, torch.device("cuda" if is_real else "cpu"))
    told = machine()
    document = {
        "command": "python -m benchmarks.young_lora",
        "machine": told,
        "date": datetime.now(UTC).date().isoformat(),
        "size": {"dim": size.config.get("dim", 3840), "layers": len(first.step.model.dit.layers), "side": side},
        "falls_by": round(first.falls_by, 5),
        "seen": {name: round(share, 3) for name, share in seen(first, not options.eager).items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"young_lora_{told['device'].lower().replace(' ', '_')}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
