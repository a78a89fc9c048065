"""Trains one adapter list on triplets: `accelerate launch -m ztrain.train --config FILE [--dotted.key value ...]`.

In: triplets and the released models, through the cache, which is filled first where something is missing. Out, in
`<output_dir>`: `config.yaml`, `env.json`, `metrics.jsonl`, `checkpoints/`, `samples/`, `export/`. Order, noise and
dropout are pure functions of (seed, step): the same for any number of processes or workers, and after any resume
(dropout inside LoRA layers depends on the number of processes).
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor
from tqdm.auto import tqdm

from ztrain.batches import Batch, Loader
from ztrain.config import Config, load_config
from ztrain.errors import InputError, sentence
from ztrain.flow import (
    draw_noise,
    draw_sigma,
    interpolate,
    keep_prior,
    seed_micro_step,
    velocity_losses,
)
from ztrain.interrupt import Interruption, end_with_launcher
from ztrain.memory import GIB, Budget, idle_bytes, use_growing_segments
from ztrain.meter import Meter
from ztrain.run import Run, after_step, build, enter_folder, export, recorded, save
from ztrain.sampler import MicroBatches, Mixture
from ztrain.samples import Samples
from ztrain.stats import check_statistics
from ztrain.together import MENDABLE

_COLLECTIVE_TIMEOUT = timedelta(hours=1)  # a process may fill its part of the cache while the others wait


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: exported, or stopped by a signal after its last whole checkpoint."""

    exported: Path | None = None
    signal: int = 0
    checkpoint: Path | None = None
    is_main_process: bool = True


def train(config: Config) -> Outcome:
    """Runs the experiment, from the start or from a checkpoint, to its last step or to a signal."""
    t = config.train
    check_statistics(config.adapters, config.encoders)
    # AdaptedDiT owns the precision; without the word here a user's accelerate config would add another one on top.
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT)],
    )
    with ExitStack() as held:
        resumed = enter_folder(config, accelerator, held)
        run = build(config, accelerator, resumed)
        order = MicroBatches(
            mixture=_mixture(config, run.samples),
            seed=config.seed,
            device_batch_size=t.train_batch_size,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            first=run.step * t.gradient_accumulation_steps,
            last=t.max_train_steps * t.gradient_accumulation_steps,
        )
        held.enter_context(recorded(run, resumed))
        interruption = Interruption()
        interruption.install()
        outcome = _loop(run, order, interruption)
    interruption.restore()
    # DDP first, its process group after: in another order, or left to Python's end, gloo now and then hangs or aborts.
    del run
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return replace(outcome, is_main_process=accelerator.is_main_process)


def _loop(run: Run, order: MicroBatches, interruption: Interruption) -> Outcome:
    config, accelerator, t = run.config, run.accelerator, run.config.train
    trained = list(run.trained.values())
    loader = Loader(config, run.cache, run.samples.trained, order)
    with Meter(run.step, t.max_train_steps, t.logging_steps, accelerator) as meter:
        if run.step == 0:
            after_step(run, {})
        begun: list[tuple[int, Batch]] = []  # micro-steps since the optimizer's last step
        for micro_step, batch in enumerate(meter.timed(loader), start=order.first):
            begun.append((micro_step, batch.to(accelerator.device)))
            with accelerator.accumulate(run.wrapped):
                _add_gradients(run, meter, begun)
                # Not sooner: the device computes these gradients while the step before them is looked at.
                if meter.asked is not None and (stop := _finish_step(run, meter)):
                    return Outcome(signal=stop, checkpoint=save(run))
                if accelerator.sync_gradients:
                    check_first_gradients(run)
                    grad_norm = accelerator.clip_grad_norm_(trained, t.max_grad_norm)
                run.optimizer.step()
                run.optimizer.zero_grad()
            if accelerator.sync_gradients:
                begun = []
                if run.ema is not None:
                    run.ema.step(trained)
                meter.ask(grad_norm, interruption.received, run.schedule.get_last_lr()[0])
                run.schedule.step()
                run.step += 1
                if run.is_looked_at():
                    stop = _finish_step(run, meter)
                    saved = save(run) if stop or run.is_saved() else None
                    if stop:
                        return Outcome(signal=stop, checkpoint=saved)
    return Outcome(exported=export(run))


def _finish_step(run: Run, meter: Meter) -> int:
    """What follows the step that the run stands at; the signal on which all stop, or 0."""
    values, stop = meter.read()
    if run.ema is not None:
        values["ema/decay"] = run.ema.get_decay(run.ema.optimization_step)
    after_step(run, values)
    return stop


def _add_gradients(run: Run, meter: Meter, begun: Sequence[tuple[int, Batch]]) -> None:
    """Those of the last micro-step that has begun; where memory is short, of all of them again, with less kept.

    Nothing that is drawn changes by it. How much memory lies idle between tensors, no measurement could tell before.
    """
    wanted = begun[-1:]
    while wanted:
        try:
            for micro_step, batch in wanted:
                _micro_step(run, meter, micro_step, batch)
            return
        except torch.OutOfMemoryError as error:
            budget, idle = run.model.execution.keeping, idle_bytes(run.accelerator.device)
            # Of several processes the others would wait.
            if not isinstance(budget, Budget) or run.accelerator.num_processes > 1 or not budget.keep_less(idle):
                raise InputError(_told_to_mend(run)) from error
            planned = (budget.available - budget.withheld) / GIB
        tqdm.write(
            f"activations may take {planned:.2f} GiB from step {run.step + 1} on: memory was short, and the step is"
            " computed again"
        )
        # Here, where the error no longer holds what it was about.
        run.model.zero_grad(set_to_none=True)
        meter.forget()
        torch.cuda.empty_cache()
        wanted = begun


def _told_to_mend(run: Run) -> str:
    t = run.config.train
    ways = ["lower train.train_batch_size or data.resolution"]
    if t.gradient_checkpointing == "off":
        ways = ["set train.gradient_checkpointing to budget", *ways]
    elif t.gradient_checkpointing == "budget" and run.accelerator.num_processes > 1:
        ways = ["set train.gradient_checkpointing to on", *ways]
    batch = f"a batch of {t.train_batch_size}"
    return f"step {run.step + 1}: the GPU's memory is too small for {batch}; {', or '.join(ways)}"


def _micro_step(run: Run, meter: Meter, micro_step: int, batch: Batch) -> None:
    config, model = run.config, run.model
    latents, encoded = batch.latents, batch.encoded  # B x (C, H, W)
    seed_micro_step(config.seed, micro_step, run.accelerator.process_index)
    noise, sigma = draw_noise(batch.keys, latents), draw_sigma(batch.keys, run.density)  # ..., (B,)
    noisy = [interpolate(x, n, float(s)) for x, n, s in zip(latents, noise, sigma, strict=True)]
    prior = _prior_shares(encoded.with_reference, config.train.prior_weight)  # (B,)
    base_velocity = model.base_velocity(noisy, sigma, encoded) if prior.any() else None
    velocity = run.wrapped(noisy, sigma, encoded)
    losses = velocity_losses(velocity, latents, noise, sigma, config.flow.loss_weight)  # (B,)
    if base_velocity is not None:
        losses = keep_prior(losses, velocity, base_velocity, sigma, prior, config.flow.loss_weight)
    run.accelerator.backward(losses.mean())
    meter.add(batch.keys, sigma, losses)


def _prior_shares(with_reference: Sequence[bool], prior_weight: float) -> Tensor:
    """How much of each sample's loss is the distance to the base, (B,)."""
    return torch.tensor([0.0 if reference else prior_weight for reference in with_reference])


def check_first_gradients(run: Run) -> None:
    """Every trained weight must have a gradient after the first backward: a silent None trains nothing."""
    if run.step:
        return
    lost = [name for name, p in run.trained.items() if p.grad is None]
    if lost:
        raise RuntimeError(f"{len(lost)} trained weights got no gradient in the first step, for example {lost[0]}")


def _mixture(config: Config, samples: Samples) -> Mixture:
    others = samples.text_only.samples if samples.text_only else []
    return Mixture(len(samples.train.samples), len(others), config.data.text_only_share if others else 0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend, 128 + signal stopped and saved (interrupt.py)."""
    parser = argparse.ArgumentParser(prog="ztrain.train", description=__doc__, add_help=False)
    parser.add_argument("--config", nargs="+", type=Path, required=True)
    known, overrides = parser.parse_known_args(arguments)
    end_with_launcher()
    use_growing_segments()
    try:
        return report(train(load_config(known.config, overrides, "ztrain.train")))
    except MENDABLE as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2


def report(outcome: Outcome) -> int:
    """Says how a run ended, once for all processes, and gives the exit status."""
    if outcome.signal:
        ended = f"stopped, saved {outcome.checkpoint}; continue with --resume_from_checkpoint latest"
        status = 128 + outcome.signal
    else:
        ended, status = f"exported: {outcome.exported}", 0
    if outcome.is_main_process:
        print(ended, file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
