"""The loop that every pretraining stage shares: AdamW or Muon, warm-up, cosine to zero, a printed line now and then."""

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from miniature.muon import StackedMuon
from ztrain.errors import InputError
from ztrain.io.files import whole_file
from ztrain.io.tensors import open_tensors

LINES = 40  # printed in a stage
_WARMUP_AGAIN = 100  # steps after which the moments of a resumed run mean something again
_BLOCK = re.compile(r"^\d+\.\w*(?:layers|refiner|blocks)\.\d+\.")  # in the names of `weights`: module, list, block


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How long and how fast one stage trains."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup_share: float = 0.05
    """Of all steps; the learning rate then falls to 0 on a cosine."""
    beta2: float = 0.98
    matrix_learning_rate: float | None = None
    """Muon's for the matrices of repeated blocks; None = AdamW for all."""
    max_grad_norm: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What a stage did: `loss` is the mean over its last printed line, `seconds` are those of all
    its runs, of which the last began at step `begun_at`."""

    steps: int
    samples: int
    begun_at: int
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """Where a run keeps its weights as it goes, and a text that says what decides them beside the plan."""

    path: Path
    made_from: str = ""


def fit(
    name: str,
    modules: Sequence[nn.Module],
    loss: Callable[[int], Tensor],
    plan: FitSettings,
    device: torch.device | str,
    partial: Partial | None = None,
    shares: Sequence[float] | None = None,
) -> Fitted:
    """Minimises `loss(step)`, a scalar of a freshly drawn batch, over the awake parameters of `modules`.

    `shares`: of the plan's learning rates that each module gets; None = all of them.
    `partial`: its file holds weights and step at every printed line; a run that finds it goes on from there, with a
    second warm-up because the optimizer's moments are not in it. Whoever has saved the modules removes the file. Raises
    RuntimeError if the loss stops being a number, and InputError for a file of another plan, model or `made_from`.
    """
    weights = {
        f"{index}.{key}": parameter
        for index, module in enumerate(modules)
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    about = {"plan": json.dumps(asdict(plan)), "made_from": "" if partial is None else partial.made_from}
    begin, before, mean = _resume(partial, about, weights)
    on_gpu = torch.device(device).type == "cuda"
    optimizers = [
        optimizer
        for index, share in enumerate(shares or [1.0] * len(modules))
        if (own := {key: weight for key, weight in weights.items() if key.startswith(f"{index}.")})
        for optimizer in make_optimizers(plan, share, own, on_gpu)
    ]
    schedules = [LambdaLR(optimizer, lambda step: _rate(begin + step, begin, plan)) for optimizer in optimizers]
    every = max(1, plan.steps // LINES)
    started, total, count = time.perf_counter(), torch.zeros((), device=device), 0
    for step in range(begin, plan.steps):
        with mixed_precision(device):
            value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(weights.values(), plan.max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        total += value.detach()
        count += 1
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            mean = float(total) / count
            total.zero_()
            count = 0
            if not math.isfinite(mean):
                raise RuntimeError(f"{name}: the loss is {mean} at step {step + 1}; lower its learning rate")
            seconds = time.perf_counter() - started
            print(f"{name}: step {step + 1} of {plan.steps}, loss {mean:.4f}, {seconds:.0f} s", flush=True)
            if partial is not None:
                seen = {"step": str(step + 1), "seconds": f"{before + seconds:.1f}", "loss": str(mean)}
                _keep(partial.path, about | seen, weights)
    seconds = round(before + time.perf_counter() - started, 1)
    return Fitted(steps=plan.steps, samples=plan.steps * plan.batch_size, begun_at=begin, seconds=seconds, loss=mean)


def make_optimizers(
    plan: FitSettings, share: float, weights: dict[str, nn.Parameter], on_gpu: bool
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices within numbered blocks (as layers.0) where the plan has a rate for them."""
    matrices: dict[str, nn.Parameter] = {}
    if plan.matrix_learning_rate is not None:
        matrices = {key: weight for key, weight in weights.items() if weight.ndim == 2 and _BLOCK.search(key)}
    others = [weight for key, weight in weights.items() if key not in matrices]
    rate, decay = share * plan.learning_rate, plan.weight_decay
    adamw = torch.optim.AdamW(others, rate, betas=(0.9, plan.beta2), weight_decay=decay, fused=on_gpu)
    if plan.matrix_learning_rate is None:
        return [adamw]
    return [adamw, StackedMuon(matrices.values(), share * plan.matrix_learning_rate, decay)]


def _rate(step: int, begin: int, plan: FitSettings) -> float:
    """Share of the learning rate at a step of a run that began at step `begin`."""
    warmup = max(1, round(plan.warmup_share * plan.steps))
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, plan.steps - warmup)))
    again = min(warmup, _WARMUP_AGAIN) if begin else warmup
    return min(1.0, (step + 1) / warmup, (step - begin + 1) / again) * cosine


def _keep(path: Path, about: dict[str, str], weights: dict[str, nn.Parameter]) -> None:
    with whole_file(path) as building:
        save_file({key: weight.detach().cpu() for key, weight in weights.items()}, building, metadata=about)


@torch.no_grad()
def _resume(
    partial: Partial | None, about: dict[str, str], weights: dict[str, nn.Parameter]
) -> tuple[int, float, float]:
    """The step to begin at, with the weights of that step; the seconds spent before it and its loss."""
    if partial is None or not partial.path.is_file():
        return 0, 0.0, math.nan
    with open_tensors(partial.path, "remove it to begin anew") as file:
        found, shapes = file.metadata() or {}, {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        same = all(found.get(key) == value for key, value in about.items())
        if not same or shapes != {key: tuple(weight.shape) for key, weight in weights.items()}:
            raise InputError(f"{partial.path} belongs to another plan or model; remove it to begin anew")
        for key, weight in weights.items():
            weight.copy_(file.get_tensor(key))
    steps = json.loads(found["plan"])["steps"]
    print(f"going on at step {found['step']} of {steps}", flush=True)
    return int(found["step"]), float(found["seconds"]), float(found["loss"])


def mixed_precision(device: torch.device | str) -> AbstractContextManager:
    """bfloat16 products on a GPU, float32 on a CPU."""
    kind = torch.device(device).type
    return torch.autocast("cuda", dtype=torch.bfloat16) if kind == "cuda" else nullcontext()


def full_precision(device: torch.device | str) -> AbstractContextManager:
    """float32 products within `mixed_precision`: for similarities, whose small differences bfloat16 would blur."""
    return torch.autocast(torch.device(device).type, enabled=False)


@contextmanager
def training(*modules: nn.Module) -> Iterator[None]:
    """Wakes every parameter for a while; afterwards the modules are frozen and in evaluation mode."""
    for module in modules:
        module.train().requires_grad_(True)
    try:
        yield
    finally:
        for module in modules:
            module.eval().requires_grad_(False)


class Draws:
    """Random rows of a gallery of `count` pictures, from one generator on `device`."""

    def __init__(self, count: int, batch_size: int, seed: int, device: torch.device | str) -> None:
        self.count, self.batch_size, self.seed, self.device = count, batch_size, seed, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def at(self, step: int) -> None:
        """Makes what follows a function of seed and step, so that a resumed run repeats no draw."""
        self.generator.manual_seed(self.seed_at(step))

    def seed_at(self, step: int) -> int:
        """Of this generator and of any other that must start anew at a step."""
        return self.seed * 2**32 + step

    def rows(self) -> Tensor:
        """(batch_size,) int64."""
        return torch.randint(self.count, (self.batch_size,), generator=self.generator, device=self.device)

    def uniform(self) -> Tensor:
        """(batch_size,) in [0, 1)."""
        return torch.rand(self.batch_size, generator=self.generator, device=self.device)
