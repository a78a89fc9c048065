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
from pathlib import Path

from miniature import truth_judge
from ztrain.cache.loader import Batch, Loader
from ztrain.cache.order import MicroBatches, Mixture
from ztrain.cache.token_counts import token_counts
from ztrain.compare.judging import TruthLoader
from ztrain.config import Config, load_config
from ztrain.distributed.agreement import together
from ztrain.distributed.launched import check_environment
from ztrain.errors import MENDABLE
from ztrain.frozen.statistics import check_statistics
from ztrain.interrupt import Stopped, end_with_launcher, ending, leave_group
from ztrain.io.files import given_path
from ztrain.model.fast.budget import Retries, use_growing_segments
from ztrain.model.flow import Prior, draw_noise, draw_sigma, loss, seed_micro_step
from ztrain.resolve import given
from ztrain.terminal import command
from ztrain.train.meter import Meter
from ztrain.train.run import Evaluation, Run, advised, build, enter_folder, evaluate, export, recorded, save
from ztrain.train.supervise import Supervisor, supervised


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: exported, or stopped by a signal after its last whole checkpoint."""

    exported: Path | None = None
    advice: str = ""
    """Of an exported run, what its validations say of when to stop; on the main process."""
    signal: int = 0
    checkpoint: Path | None = None
    is_main_process: bool = True


def train(config: Config, truth: TruthLoader | None = None) -> Outcome:
    """Runs the experiment, from the start or from a checkpoint, to its last step or to a signal. `truth`: what loads
    judges.truth."""
    check_statistics(config.adapters, config.encoders)
    check_environment(config.train, os.environ)
    with supervised(config.train) as supervisor:
        outcome = _train(config, supervisor, truth)
    return replace(outcome, is_main_process=supervisor.accelerator.is_main_process)


def _train(config: Config, supervisor: Supervisor, truth: TruthLoader | None) -> Outcome:
    t, folder, (accelerator, interruption, watchdog) = config.train, Path(config.output_dir), supervisor
    with ExitStack() as held:
        with interruption.at_once(watchdog.ending):
            watchdog.mark("loading and filling the cache", patient=True)
            resumed = enter_folder(config, accelerator, held)
            ended = held.enter_context(ending(folder, MENDABLE, writes=accelerator.is_main_process))
            interruption.on_abort = ended.write_at_last
            run = build(config, accelerator, resumed, truth)
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
        outcome = _train_steps(run, order, supervisor)
        ended.status = 128 + outcome.signal if outcome.signal else 0
    return outcome


def _train_steps(run: Run, order: MicroBatches, supervisor: Supervisor) -> Outcome:
    """All steps that are left, in the order in which things happen; then the export."""
    config, t, accelerator, strategy = run.config, run.config.train, run.accelerator, run.strategy
    share, loader = given(t.prior_weight), Loader(config, run.cache, run.samples.trained, order)
    prior = Prior(run.model.base_velocity, share, on_all=strategy.shards_base) if share else None
    with Meter(run.step, t.max_train_steps, t.logging_steps, accelerator, supervisor.interruption) as meter:
        if run.step == 0 and (stopped := _finish_step(run, meter, supervisor)):
            return stopped
        retries = Retries(run.model, accelerator.device, accelerator.num_processes == 1, _memory_advice(run))
        begun: list[tuple[int, Batch]] = []  # micro-steps since the optimizer's last step
        batches = meter.timed(loader, lambda doing: supervisor.watchdog.mark(doing, run.step + 1))
        for number, batch in enumerate(batches, start=order.first):
            # Forward and backward. What is drawn depends on seed, epoch, sample and micro-step alone.
            begun.append((number, batch.to(accelerator.device)))
            with accelerator.accumulate(run.wrapped):
                for micro_step, batch in retries.of(begun, run.step + 1):
                    with retries:
                        seed_micro_step(config.seed, micro_step, accelerator.process_index)
                        noise = draw_noise(batch.keys, batch.latents)  # B x (C, H, W)
                        sigma = draw_sigma(batch.keys, run.density)  # (B,)
                        losses = loss(run.wrapped, batch.latents, noise, sigma, batch.encoded, run.weight, prior)
                        meter.add(micro_step, batch.keys, sigma, losses)
                        strategy.backward(losses.mean())
                    losses = None  # and the graph behind it, where memory was short

            # The figures of the step before: not sooner, as the device computes these gradients meanwhile.
            if meter.pending is not None and (stopped := _finish_step(run, meter, supervisor)):
                return stopped
            if not accelerator.sync_gradients:
                continue

            # The optimizer's step, unless a loss or gradient of any process is not finite: then the run ends.
            grad_norm = strategy.clip(run.trained, t.max_grad_norm)
            figures = meter.gather_step(grad_norm)
            strategy.step(run.optimizer, figures)
            if run.ema is not None:
                run.ema.step(run.trained.values())
            meter.copy_to_host(figures, run.learning_rates)
            run.schedule.step()
            run.step += 1
            begun.clear()

            # Every so many steps: validation, previews, a checkpoint. They are of these weights: no step is under way.
            if run.due and (stopped := _finish_step(run, meter, supervisor)):
                return stopped
    if run.step != t.max_train_steps:
        raise RuntimeError(f"the order ended at step {run.step} of {t.max_train_steps}; nothing is exported")
    supervisor.watchdog.mark("exporting", run.step, patient=True)
    return Outcome(exported=export(run), advice=advised(run))


def _finish_step(run: Run, meter: Meter, supervisor: Supervisor) -> Outcome | None:
    """Logs the step that the run stands at, with what is due there: validation, scores, previews, a checkpoint. An
    Outcome where all processes stop on a signal."""
    supervisor.watchdog.mark("finishing", run.step)
    figures, stop = meter.wait_for_step() if meter.pending else ({}, 0)  # none at step 0
    if run.ema is not None and figures:
        figures["ema/decay"] = run.ema.get_decay(run.ema.optimization_step)
    if run.due:
        supervisor.watchdog.mark("validating", run.step, patient=True)
    seen, saved = Evaluation(), None
    try:
        with supervisor.interruption.agreed():
            seen = evaluate(run)
    except Stopped as stopped:  # the step was taken, whatever is not known of it
        stop = stopped.number
    if run.record is not None and (figures := figures | seen.values):
        run.record.log(run.step, figures, grid=seen.sheet, table=seen.table)
    if run.step and (stop or "checkpoint" in run.due):
        supervisor.watchdog.mark("saving", run.step, patient=True)
        saved = save(run)
    return Outcome(signal=stop, checkpoint=saved) if stop else None


def _memory_advice(run: Run) -> str:
    t = run.config.train
    ways = "lower train.train_batch_size or data.resolution"
    if t.gradient_checkpointing == "off":
        ways = f"set train.gradient_checkpointing to budget, or {ways}"
    elif t.gradient_checkpointing == "budget" and run.accelerator.num_processes > 1:
        ways = f"set train.gradient_checkpointing to on, or {ways}"
    return f"the GPU's memory is too small for a batch of {t.train_batch_size}; {ways}"


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
            return report(train(load_config(known.config, overrides, "ztrain.train"), truth_judge))
        except Stopped as stopped:
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"{stopped}: stopped before the first step of this start; nothing to save", file=sys.stderr)
            return leave_group(128 + stopped.number)

    return command(work)


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
