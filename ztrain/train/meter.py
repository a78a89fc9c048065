"""What one run measures of its steps: loss, loss by sigma, gradient norm, seconds; agreed on by all processes.

One collective a step, between its gradients and the optimizer, carries every sample's loss and every process's wish to
stop: so all processes see the same numbers, take no step where one of them is not finite, and save at the same step
where one was told to. What it says is read when the next step's first gradients have been asked for: until then the
device would only wait.
"""

import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ztrain.cache.order import SampleKey
from ztrain.distributed.strategy import NORM, SAMPLES, SIGNAL
from ztrain.interrupt import Interruption
from ztrain.model.flow import SIGMA_BINS
from ztrain.version import VERSION

ItemT = TypeVar("ItemT")


class PendingStep(NamedTuple):
    """Figures of a step on their way to the CPU."""

    figures: Tensor
    ended: Any
    """The step; as `_mark` gives it."""
    learning_rates: dict[str, float]
    data_wait: float
    """Seconds."""


class Meter:
    """Collects the losses of a step's micro-steps, and turns them into its metrics; also the progress line."""

    def __init__(
        self, step: int, last: int, logging_steps: int, accelerator: Accelerator, interruption: Interruption
    ) -> None:
        self.accelerator, self.step, self.logging_steps = accelerator, step, logging_steps
        self.interruption = interruption
        self.added: dict[int, tuple[list[tuple[int, float]], Tensor]] = {}
        """By micro-step of this process: (index, sigma) of each sample, and their losses, (B,), on the device."""
        self.pending: PendingStep | None = None
        self.data_wait = 0.0
        self.started = self._mark()
        main = accelerator.is_main_process
        self.bar = tqdm(total=last, initial=step, disable=not main, unit="step", mininterval=1.0, desc="training")

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()  # ends the progress line, so that an error starts on a line of its own

    def timed(self, loader: Iterable[ItemT], mark: Callable[[str], None]) -> Iterator[ItemT]:
        """The loader's items, with the seconds that were spent waiting for them; marks that, and what comes after."""
        items = iter(loader)
        while True:
            # A step begins here, and none is under way: validation and saving, which came before, are no part of it.
            if not self.added and self.pending is None:
                self.started, self.data_wait = self._mark(), 0.0
            mark("reading data")
            started = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self.data_wait += time.perf_counter() - started
            mark("computing")
            yield item

    def add(self, micro_step: int, keys: Sequence[SampleKey], sigma: Tensor, losses: Tensor) -> None:
        """Notes one micro-step of this process, in place of one that is computed again: (B,) each, sigma on the CPU.
        Does not wait for the device."""
        self.added[micro_step] = [(key.index, float(s)) for key, s in zip(keys, sigma, strict=True)], losses.detach()

    def gather_step(self, grad_norm: Tensor | float) -> Tensor:
        """The step's figures of all processes (`SAMPLES`), float64 on the device, the same on all. Does not wait: where
        one of them is not finite, no process may take the optimizer's step, and `wait_for_step` ends the run."""
        added, self.added = self.added.values(), {}
        losses = torch.cat([losses for _, losses in added]).double()  # (n,)
        samples = [sample for samples, _ in added for sample in samples]
        of_samples = torch.tensor(list(zip(*samples, strict=True)), dtype=torch.float64)  # (2, n)
        norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=losses.device)
        head = torch.stack([torch.full_like(norm, float(self.interruption.received)), norm])
        own = torch.cat([head, of_samples.to(losses.device, non_blocking=True).flatten(), losses])
        return self.accelerator.gather(own.unsqueeze(0))

    def copy_to_host(self, figures: Tensor, learning_rates: dict[str, float]) -> None:
        """After the optimizer's step: sends its figures to the CPU, for `wait_for_step`. Does not wait."""
        if figures.is_cuda:
            figures = torch.empty_like(figures, device="cpu", pin_memory=True).copy_(figures, non_blocking=True)
        self.pending = PendingStep(figures, self._mark(), learning_rates, self.data_wait)
        self.data_wait = 0.0

    def wait_for_step(self) -> tuple[dict[str, float], int]:
        """The pending step's metrics, by the names that W&B shows and the same on every process but for the seconds;
        and the signal that any process had received, 0 for none. Waits for the device. Of the seconds that the process
        waited for data its device may have been busy.

        Raises RuntimeError on every process where a loss or the gradient norm of any is not finite. The weights have
        not taken that step (under ZeRO they have where the losses were finite), and nothing is saved of it.
        """
        if self.pending is None:
            raise RuntimeError("no step is pending")
        (figures, ended, learning_rates, data_wait), self.pending = self.pending, None
        seconds, self.started = _seconds(self.started, ended), ended
        self.step += 1
        samples = figures[:, SAMPLES:].view(len(figures), 3, -1)
        bad = [int(index) for index in samples[:, 0][~samples[:, 2].isfinite()]]
        if bad or not figures[:, NORM].isfinite().all():
            named = f"the loss of samples {bad[:8]} (from 0, in the order of the data)" if bad else "the gradient norm"
            raise RuntimeError(f"step {self.step}: {named} is not finite; stopped, and nothing of that step is saved")
        losses = list(zip(samples[:, 1].flatten().tolist(), samples[:, 2].flatten().tolist(), strict=True))
        # fsum rounds once, whatever the order: the number of processes does not show.
        loss, grad_norm = math.fsum(loss for _, loss in losses) / len(losses), float(figures[0, NORM])
        values = {"train/loss": loss, "train/grad_norm": grad_norm, **learning_rates}
        bins: dict[int, list[float]] = {}
        for sigma, of_sample in losses:
            bins.setdefault(min(int(sigma * SIGMA_BINS), SIGMA_BINS - 1), []).append(of_sample)
        values |= {f"train/loss_sigma/{place}": math.fsum(found) / len(found) for place, found in sorted(bins.items())}
        values |= {
            "perf/step_seconds": seconds,
            "perf/data_wait_share": min(data_wait / seconds, 1.0),
            "perf/samples_per_second": len(losses) / seconds,
        }
        if torch.cuda.is_available():
            values["mem/max_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
            values["mem/max_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        self.bar.update()
        if self.step % self.logging_steps == 0:
            self.bar.set_postfix(loss=f"{loss:.4f}", grad_norm=f"{grad_norm:.3f}")
        return values, int(figures[:, SIGNAL].max())

    def _mark(self) -> Any:
        """Now, in seconds; or when the device will have done all that it was asked for."""
        if self.accelerator.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.accelerator.device))
        return event


def _seconds(start: Any, end: Any) -> float:
    """Between two marks; waits for the second."""
    if isinstance(end, float):
        return end - float(start)
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What may be said about where a run took place: versions and hardware, no names, paths or variables."""
    libraries = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
    return {
        "ztrain": VERSION,
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: version(name) for name in libraries},
        "platform": platform.platform(terse=True),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "num_processes": accelerator.num_processes,
    }
