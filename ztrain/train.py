"""Trains one adapter list on triplets: `accelerate launch -m ztrain.train --config FILE [--dotted.key value ...]`.

In: triplets and the released models, through the cache, which is filled first where something is missing. Out, in
`<output_dir>`: `config.yaml`, `env.json`, `metrics.jsonl`, `checkpoints/`, `samples/`, `export/`. Order, noise and
dropout are pure functions of (seed, step): the same for any number of processes or workers, and after any resume
(dropout inside LoRA layers depends on the number of processes).
"""

import argparse
import os
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
from ztrain.conditioning import moved
from ztrain.config import Config, load_config
from ztrain.entering import enter_folder
from ztrain.errors import MENDABLE, InputError
from ztrain.files import given_path
from ztrain.flow import (
    draw_noise,
    draw_sigma,
    interpolate,
    keep_prior,
    seed_micro_step,
    velocity_losses,
)
from ztrain.interrupt import Interruption, Stopped, end_with_launcher, ending, leave_group
from ztrain.launched import check_environment, start_accelerator
from ztrain.memory import GIB, Budget, idle_bytes, use_growing_segments
from ztrain.meter import Meter
from ztrain.resolve import given
from ztrain.run import Run, advised, after_step, build, export, recorded, save
from ztrain.sampler import MicroBatches, Mixture
from ztrain.stats import check_statistics
from ztrain.strategy import KWARGS
from ztrain.terminal import command
from ztrain.together import together
from ztrain.tokens import token_counts
from ztrain.vigil import Watchdog

_COLLECTIVE_TIMEOUT = timedelta(days=30)  # vigil.py ends what hangs, and knows whether anybody still moves


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: exported, or stopped by a signal after its last whole checkpoint."""

    exported: Path | None = None
    advice: str = ""
    """Of an exported run, what its validations say of when to stop; on the main process."""
    signal: int = 0
    checkpoint: Path | None = None
    is_main_process: bool = True


def train(config: Config) -> Outcome:
    """Runs the experiment, from the start or from a checkpoint, to its last step or to a signal."""
    t = config.train
    check_statistics(config.adapters, config.encoders)
    check_environment(t, os.environ)
    interruption = Interruption()
    watchdog = Watchdog(60 * t.hang_timeout_minutes, interruption)
    interruption.install()
    try:
        with watchdog.watching():
            with interruption.at_once():
                accelerator = start_accelerator(
                    gradient_accumulation_steps=t.gradient_accumulation_steps,
                    kwargs_handlers=[KWARGS, InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT)],
                )
            watchdog.join(accelerator.process_index, accelerator.num_processes)
            outcome = _train(config, accelerator, interruption, watchdog)
            interruption.restore()
            watchdog.mark("ending")
            # DDP first, its process group after: in another order, or left to Python's end, gloo now and then hangs or
            # aborts.
            accelerator.free_memory()
            accelerator.wait_for_everyone()
        accelerator.end_training()
        return replace(outcome, is_main_process=accelerator.is_main_process)
    finally:
        interruption.restore()


def _train(config: Config, accelerator: Accelerator, interruption: Interruption, watchdog: Watchdog) -> Outcome:
    t, folder = config.train, Path(config.output_dir)
    with ExitStack() as held:
        with interruption.at_once(watchdog.ending):
            watchdog.mark("loading and filling the cache", patient=True)
            resumed = enter_folder(config, accelerator, held)
            ended = held.enter_context(ending(folder, MENDABLE, writes=accelerator.is_main_process))
            interruption.on_abort = ended.write_at_last
            run = build(config, accelerator, resumed)
            order = MicroBatches(
                mixture=_mixture(run),
                seed=config.seed,
                device_batch_size=t.train_batch_size,
                accumulation=t.gradient_accumulation_steps,
                num_processes=accelerator.num_processes,
                process_index=accelerator.process_index,
                first=run.step * t.gradient_accumulation_steps,
                last=t.max_train_steps * t.gradient_accumulation_steps,
            )
            held.enter_context(recorded(run, resumed))
        outcome = _loop(run, order, interruption, watchdog)
        ended.status = 128 + outcome.signal if outcome.signal else 0
    return outcome


def _loop(run: Run, order: MicroBatches, interruption: Interruption, watchdog: Watchdog) -> Outcome:
    config, accelerator, t = run.config, run.accelerator, run.config.train
    loader = Loader(config, run.cache, run.samples.trained, order)
    with Meter(run.step, t.max_train_steps, t.logging_steps, accelerator, interruption) as meter:
        if run.step == 0 and (stop := _look(run, {}, interruption, watchdog)):
            return Outcome(signal=stop)
        begun: list[tuple[int, Batch]] = []  # micro-steps since the optimizer's last step
        watchdog.mark("reading data", run.step + 1)
        for micro_step, batch in enumerate(meter.timed(loader), start=order.first):
            watchdog.mark("computing", run.step + 1)
            begun.append((micro_step, batch.to(accelerator.device)))
            with accelerator.accumulate(run.wrapped):
                _add_gradients(run, meter, begun)
                # Not sooner: the device computes these gradients while the step before them is looked at.
                if meter.asked is not None and (stop := _finish_step(run, meter, interruption, watchdog)):
                    watchdog.mark("saving", run.step, patient=True)
                    return Outcome(signal=stop, checkpoint=save(run))
                if accelerator.sync_gradients:
                    _take_step(run, meter)
                    begun = []
            if accelerator.sync_gradients:
                run.step += 1
                if run.is_looked_at() or run.strategy.steps_in_backward:
                    stop = _finish_step(run, meter, interruption, watchdog)
                    watchdog.mark("saving", run.step, patient=True)
                    saved = save(run) if stop or run.is_saved() else None
                    if stop:
                        return Outcome(signal=stop, checkpoint=saved)
            watchdog.mark("reading data", run.step + 1)
    if run.step != t.max_train_steps:
        raise RuntimeError(f"the order ended at step {run.step} of {t.max_train_steps}; nothing is exported")
    watchdog.mark("exporting", run.step, patient=True)
    return Outcome(exported=export(run), advice=advised(run))


def _take_step(run: Run, meter: Meter) -> None:
    """The optimizer's step, of all processes or of none: where a loss or gradient of any is not finite, weights and
    moments stay as they are, and what `meter` reads ends the run."""
    trained = list(run.trained.values())
    if run.strategy.steps_in_backward:
        grad_norm = run.accelerator.clip_grad_norm_(trained, run.config.train.max_grad_norm)
        meter.ask(run.learning_rates, 0.0 if grad_norm is None else grad_norm)
    else:
        check_first_gradients(run)
        grad_norm = run.strategy.number(run.accelerator.clip_grad_norm_(trained, run.config.train.max_grad_norm))
        bad, optimizer = meter.judge(grad_norm), run.optimizer.optimizer
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = bad.float()  # the kernel's own word for: do nothing; asking would wait for the device
            run.optimizer.step()
        elif not bool(bad):
            run.optimizer.step()
        run.optimizer.zero_grad()
        meter.ask(run.learning_rates)
    if run.ema is not None:
        run.ema.step(trained)
    run.schedule.step()


def _finish_step(run: Run, meter: Meter, interruption: Interruption, watchdog: Watchdog) -> int:
    """What follows the step that the run stands at; the signal on which all stop, or 0."""
    watchdog.mark("finishing", run.step)
    values, stop = meter.read()
    if run.ema is not None:
        values["ema/decay"] = run.ema.get_decay(run.ema.optimization_step)
    return _look(run, values, interruption, watchdog) or stop


def _look(run: Run, values: dict[str, float], interruption: Interruption, watchdog: Watchdog) -> int:
    """`after_step`, which a signal cuts short on all processes; that signal, or 0."""
    if run.is_looked_at():
        watchdog.mark("validating", run.step, patient=True)
    try:
        with interruption.agreed():
            after_step(run, values)
    except Stopped as stopped:
        if run.record is not None and values:
            run.record.log(run.step, values)  # the step was taken, whatever is not known of it
        return stopped.number
    return 0


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
    weight = given(config.train.prior_weight)
    prior = _prior_shares(encoded.with_reference, weight)  # (B,)
    # Where processes share the base, all run it or none, on all samples.
    rows = [i for i, share in enumerate(prior.tolist()) if share or (weight and run.strategy.cuts_base)]
    base_velocity = model.base_velocity([noisy[i] for i in rows], sigma[rows], encoded.select(rows)) if rows else []
    # On the device already: DDP and FSDP2 would move it there, and wait for all the work that the device has got.
    velocity = run.wrapped(noisy, moved(sigma, run.accelerator.device), encoded)
    losses = velocity_losses(velocity, latents, noise, sigma, run.weight)  # (B,)
    if rows:
        at, theirs = moved(torch.tensor(rows), losses.device), [velocity[i] for i in rows]
        kept = keep_prior(losses[at], theirs, base_velocity, sigma[rows], prior[rows], run.weight)
        losses = losses.index_copy(0, at, kept)
    meter.add(batch.keys, sigma, losses)
    if run.strategy.steps_in_backward and run.accelerator.sync_gradients and bool(meter.judge(0.0)):
        meter.ask(run.learning_rates)
        meter.read()  # which raises
    run.accelerator.backward(losses.mean())


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


def _mixture(run: Run) -> Mixture:
    """The order of the run's samples, by their tokens if the config says so; a damaged cache ends all processes."""
    config, samples, tokens = run.config, run.samples, None
    others = samples.text_only.samples if samples.text_only else []
    if config.train.group_by_tokens:
        with together(run.accelerator):
            tokens = token_counts(config, run.cache, samples.trained)
    share = config.data.text_only_share if others else 0.0
    return Mixture(len(samples.train.samples), len(others), share, tokens, samples.styles)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend, 128 + signal stopped and saved (interrupt.py)."""
    parser = argparse.ArgumentParser(prog="ztrain.train", description=__doc__, add_help=False)
    parser.add_argument("--config", nargs="+", type=given_path, required=True)
    known, overrides = parser.parse_known_args(arguments)
    end_with_launcher()
    use_growing_segments()

    def work() -> int:
        try:
            return report(train(load_config(known.config, overrides, "ztrain.train")))
        except Stopped as stopped:
            return _leave(stopped)

    return command(work)


def _leave(stopped: Stopped) -> int:
    """The end by a signal before the first step."""
    status = 128 + stopped.number
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{stopped}: stopped before the first step of this start; nothing to save", file=sys.stderr)
    return leave_group(status)


def report(outcome: Outcome) -> int:
    """Says how a run ended, once for all processes, and gives the exit status."""
    if outcome.signal:
        saved = f"saved {outcome.checkpoint}" if outcome.checkpoint else "before the first step"
        ended = f"stopped, {saved}; continue with --resume_from_checkpoint latest"
        status = 128 + outcome.signal
    else:
        ended, status = "\n".join(filter(None, [f"exported: {outcome.exported}", outcome.advice])), 0
    if outcome.is_main_process:
        print(ended, file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
