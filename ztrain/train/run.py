"""What one process of a training run consists of: built, restored, validated, saved and exported.

In: a config, and the checkpoint that it resumes from. Out: a `Run`, whose loop is loop.py. Whatever the main process
alone does (files, locks) fails on all processes together.
"""

import functools
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from ztrain.adapters import describe_list
from ztrain.cache.cache import Cache
from ztrain.cache.loader import read_batch
from ztrain.cache.order import SampleKey
from ztrain.cache.prepare import prepare
from ztrain.cache.samples import Samples, write_manifest
from ztrain.compare.judging import TruthLoader
from ztrain.config import Config
from ztrain.distributed.agreement import together
from ztrain.distributed.strategy import Strategy, strategy_of
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec
from ztrain.frozen.sources import Source, base_defaults, base_dtype, check_trainable, identity
from ztrain.io import files
from ztrain.io.files import write_json, write_text
from ztrain.io.yamls import dump_yaml
from ztrain.model.adapted_dit import AdaptedDiT, make_model
from ztrain.model.dit import load_transformer
from ztrain.model.fast.blocks import slow_because
from ztrain.model.flow import LossWeight, SigmaDensity, loss_weight, resolution_shift
from ztrain.model.sampler import released_or
from ztrain.privacy import own_config
from ztrain.resolve import describe_dropouts, resolve, shift_of
from ztrain.train.advice import advice
from ztrain.train.meter import environment
from ztrain.train.optimizer import Group, groups_of, make_optimizer, make_schedule, one_group
from ztrain.train.scoring import Scoring
from ztrain.train.tracking import Record
from ztrain.train.tune import tune
from ztrain.train.validate import Previews, describe_losses, validation_losses
from ztrain.weights import checkpoint
from ztrain.weights.adapter_folder import save_adapter
from ztrain.weights.init_from import read_origin


@dataclass(kw_only=True)
class Run:
    """What one process of a run consists of. `wrapped` is `model` as the strategy wants it called."""

    config: Config
    folder: Path
    accelerator: Accelerator
    strategy: Strategy
    cache: Cache
    samples: Samples
    model: AdaptedDiT
    wrapped: Any
    groups: list[Group]
    """Of the optimizer, in its order."""
    optimizer: Any
    schedule: Any
    ema: EMAModel | None
    identities: dict[str, dict[str, str]]
    density: SigmaDensity
    weight: LossWeight
    began: int
    """Format of the run's first checkpoint: what runs that began earlier do, they go on to do."""
    previews: Previews | None
    scoring: Scoring | None
    origin: dict[str, Any] | None = None
    """What its weights started from: `Origin.told`."""
    record: Record | None = None
    step: int = 0
    """Optimizer steps done."""

    @functools.cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """By name, in the optimizer's order."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for group in self.groups for name in group.names}

    @property
    def learning_rates(self) -> dict[str, float]:
        """Of the next step, by metric: of each adapter where they differ."""
        rates = self.schedule.get_last_lr()
        told = {f"train/lr/{group.adapter}": rate for group, rate in zip(self.groups, rates, strict=True)}
        return {"train/lr": rates[0]} | (told if len(set(rates)) > 1 else {})

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def due(self) -> set[str]:
        """What comes up at the step where it stands; anything but the next step that reads this step's weights."""
        t, v = self.config.train, self.config.validation
        every = {
            "validation": v.validation_steps,
            "previews": v.preview_steps,
            "scores": v.score_steps,
            "checkpoint": t.checkpointing_steps,
        }
        is_last = self.step == t.max_train_steps
        return {what for what, steps in every.items() if steps > 0 and (self.step % steps == 0 or is_last)}


def sigma_density(config: Config, scheduler_shift: float) -> SigmaDensity:
    """The configured density with its shift resolved to a number."""
    flow = config.flow
    match shift_of(flow):
        case "scheduler":
            shift = scheduler_shift
        case "resolution":
            shift = resolution_shift(config.data.square_tokens)
        case number:
            shift = float(number)
    return SigmaDensity(flow.sigma_sampling, shift, flow.logit_mean, flow.logit_std)


def enter_folder(config: Config, accelerator: Accelerator, held: ExitStack) -> checkpoint.Checkpoint | None:
    """Takes the run's folder for this run, and finds where to go on: the main process decides, for all."""
    folder, found = Path(config.output_dir), None
    passed: list[str] = []
    with together(accelerator):
        if accelerator.is_main_process:
            held.enter_context(checkpoint.run_lock(folder))
            files.sweep(folder)
            files.sweep(folder / "checkpoints")
            used = (folder / "metrics.jsonl").exists() or (folder / "export").exists()
            if used and config.resume_from_checkpoint == "none":
                raise InputError(
                    f"output_dir {folder} already holds a run; continue it with --resume_from_checkpoint latest, name "
                    "another folder, or remove it"
                )
            found, passed = checkpoint.find(config.resume_from_checkpoint, folder / "checkpoints")
    [chosen] = broadcast_object_list([found and found.path])
    with together(accelerator):
        if chosen is not None and found is None:
            try:
                found = checkpoint.read(chosen)
            except InputError as error:
                raise InputError(f"{error} (output_dir must be on a file system that all processes share)") from error
    for reason in passed:
        accelerator.print(f"passed over: {reason}")
    if found is not None:
        accelerator.print(f"resuming from {found.path} at step {found.step}")
    elif config.resume_from_checkpoint == "latest":
        accelerator.print(f"no checkpoint in {folder / 'checkpoints'}: starting at step 0")
    return found


def build(
    config: Config,
    accelerator: Accelerator,
    resumed: checkpoint.Checkpoint | None,
    truth: TruthLoader | None = None,
) -> Run:
    """Everything loaded and, where there is a checkpoint, restored from it."""
    check_trainable(config.models)
    with together(accelerator):
        origin = read_origin(config) if resumed is None else None
        config = config if origin is None else origin.fitted(config)
    config = resolve(config, None if resumed is None else resumed.state["config"])
    run = _load(config, accelerator, resumed, truth)
    with together(accelerator):  # while every process holds everything
        if resumed is not None:
            _compare(run, resumed)
            run.model.load_trainable_state(resumed.tensors["trainable.safetensors"], str(resumed.path))
            run.origin = resumed.state.get("init_from")
        elif origin is not None:
            origin.put_into(run.model, run.identities)
            run.origin = origin.told
            accelerator.print(f"{describe_list(origin.adapters)} starts from {origin.folder}, step {origin.step}")
    _hand_over(run)
    with together(accelerator):
        if resumed is not None:
            _restore(run, resumed)
    for watching in (run.previews, None if run.scoring is None else run.scoring.previews):
        if watching is not None:
            watching.render_base(run.model, run.identities["transformer"])
    return run


def _load(
    config: Config, accelerator: Accelerator, resumed: checkpoint.Checkpoint | None, truth: TruthLoader | None
) -> Run:
    """What a run of a resolved config consists of, with fresh weights, before processes share any of it."""
    t, device, dtype = config.train, accelerator.device, base_dtype(config.train.mixed_precision)
    strategy, say = strategy_of(accelerator), accelerator.print
    strategy.check(config)
    if accelerator.num_processes > 1:
        say(f"{accelerator.num_processes} processes share the work by {strategy.name}")
    defaults = base_defaults(config.models)
    density = sigma_density(config, defaults.shift)
    if config.validation.preview_steps or config.validation.score_steps:
        released_or(config.sample, defaults)  # refused before the cache is filled for hours
    cache, samples, kinds = prepare(config, device, accelerator)
    if config.validation.validation_steps and (exchange := samples.held_out_pairs(config).exchange):
        if exchange.words:
            say(f"val/image_use: {exchange.words}")
    dit = load_transformer(Source.of(config.models.base), dtype, strategy.base_device)
    known = {"transformer": identity(dit), **cache.identities(kinds)}
    previews, scoring = _watchers(config, accelerator, cache, samples, strategy, truth)
    model = make_model(config, dit)
    parameters = dict(model.named_parameters())
    began = checkpoint.FORMAT_VERSION if resumed is None else resumed.state["began"]
    groups = one_group(model, t) if began == 1 else groups_of(model, t)
    optimizer = make_optimizer(t, [group.of(parameters) for group in groups], device)
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    say(f"training {trained:,} weights of {describe_list(config.adapters)}")
    say(describe_dropouts(config))
    if reason := slow_because(dit):
        say(f"blocks run as diffusers wrote them: {reason}")
    return Run(
        config=config,
        folder=Path(config.output_dir),
        accelerator=accelerator,
        strategy=strategy,
        cache=cache,
        samples=samples,
        model=model,
        wrapped=model,
        groups=groups,
        optimizer=optimizer,
        schedule=make_schedule(t, optimizer, from_zero=began == 1),
        ema=None,
        identities=known,
        density=density,
        weight=loss_weight(config.flow.loss_weight, None if began == 1 else density),
        began=began,
        previews=previews,
        scoring=scoring,
    )


def _hand_over(run: Run) -> None:
    """Model and optimizer as the strategy wants them, tuned to the device, and the average of the weights."""
    config, cache, samples, strategy = run.config, run.cache, run.samples, run.strategy
    device, say = run.accelerator.device, run.accelerator.print
    tuned = functools.partial(tune, run.model, config, cache, samples, say, device=device, strategy=strategy)
    if not strategy.shards_base:
        tuned()  # before DDP comes, which counts every backward pass
    if strategy.needs_every_gradient and config.reads:
        first = samples.train.samples[0]
        run.model.stand_in = read_batch(cache, [first], [SampleKey(0, 0, 0)], config.reads).to(device).encoded
    run.wrapped, run.optimizer = strategy.prepare(run.model, run.optimizer, config)
    if strategy.shards_base and strategy.allows_plain_backward:
        tuned()
    if config.train.ema_decay:
        decay = config.train.ema_decay
        run.ema = EMAModel(run.trained.values(), decay=decay, foreach=strategy.supports_foreach_ema)


def _watchers(
    config: Config,
    accelerator: Accelerator,
    cache: Cache,
    samples: Samples,
    strategy: Strategy,
    truth: TruthLoader | None,
) -> tuple[Previews | None, Scoring | None]:
    """What draws while the run goes on; None for what is off."""
    v = config.validation
    if not (v.preview_steps or v.score_steps):
        return None, None
    codec = LatentCodec.load(
        Source.of(config.models.base), base_dtype(config.train.mixed_precision), accelerator.device
    )

    def shown(count: int, name: str) -> Previews:
        folder = Path(config.output_dir) / name
        return Previews(config, cache, samples.held_out(count), accelerator, folder, codec, strategy)

    scoring = Scoring.of(config, shown(v.num_scored, "scored"), accelerator, truth) if v.score_steps else None
    return shown(v.num_previews, "samples") if v.preview_steps else None, scoring


@contextmanager
def recorded(run: Run, resumed: checkpoint.Checkpoint | None) -> Iterator[None]:
    """The run with its record, on the main process, and the files that a run writes once."""
    config, folder, failed = run.config, run.folder, True
    with together(run.accelerator):
        if run.accelerator.is_main_process:
            # Not before: a resume that is refused must leave everything as it was.
            for path in checkpoint.set_aside(run.checkpoints, above=-1 if resumed is None else run.step):
                print(f"{path.name} is beyond the step that the run goes on from: moved to {path.parent}")
            write_text(folder / "config.yaml", dump_yaml(own_config(config.model_dump(mode="json"))), sync=True)
            write_json(folder / "env.json", environment(run.accelerator), sync=True)
            started = (folder / "metrics.jsonl").exists()  # one that ended before its first checkpoint starts anew
            step = run.step if resumed is not None else -1 if started else None
            run.record = Record(folder, config.tracking, config.model_dump(mode="json"), resumed_step=step)
            if config.tracking.log_data_manifest:
                run.record.log_folder("triplets", "dataset", [write_manifest(run.samples, folder / "triplets.jsonl")])
    try:
        yield
        if run.record is not None and config.tracking.log_adapter and (folder / "export").is_dir():
            run.record.log_folder("adapter", "model", sorted((folder / "export").iterdir()))
        failed = False
    finally:
        if run.record is not None:
            run.record.close(failed=failed)


class Evaluation(NamedTuple):
    """What is seen of a step's weights: metrics, and a sheet of previews with its cells."""

    values: dict[str, float] = {}
    sheet: Path | None = None
    table: list[dict[str, str | Path]] | None = None


def evaluate(run: Run) -> Evaluation:
    """Validates, scores and renders what is due at this step. Every process calls it."""
    due = run.due
    if not due - {"checkpoint"}:
        return Evaluation()
    values: dict[str, float] = {}
    say = tqdm.write if run.accelerator.is_main_process else lambda _: None
    with _averaged(run):
        if "validation" in due:
            shared = run.strategy.shards_base
            data = (run.config, run.cache, run.samples, run.density)
            values = validation_losses(run.model, run.accelerator, *data, equally_often=shared)
            if not all(map(math.isfinite, values.values())):
                raise RuntimeError(f"step {run.step}: the validation loss is not finite")
            say(f"step {run.step}: {describe_losses(values)}")
        if run.scoring is not None and "scores" in due:
            scores = run.scoring.score(run.model, run.step)
            say(f"step {run.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            values |= scores
        if run.previews is not None and "previews" in due:
            return Evaluation(values, *run.previews.grid(run.model, run.step))
    return Evaluation(values)


@contextmanager
def _averaged(run: Run) -> Iterator[None]:
    """The model with its averaged weights, where there is an average."""
    if run.ema is None:
        yield
        return
    trained = list(run.trained.values())
    run.ema.store(trained)
    run.ema.copy_to(trained)
    run.strategy.weights_changed(run.model)
    try:
        yield
    finally:
        run.ema.restore(trained)
        run.strategy.weights_changed(run.model)


def save(run: Run) -> Path:
    """Publishes a checkpoint of this step and removes old ones; a failure is raised on every process."""
    path, names = run.checkpoints / checkpoint.folder_name(run.step), list(run.trained)
    tensors = {"trainable.safetensors": run.strategy.whole(run.trained)}
    if run.ema is not None:
        tensors["ema.safetensors"] = run.strategy.whole(dict(zip(names, run.ema.shadow_params, strict=True)))
    stored = run.strategy.optimizer_state(run.optimizer, run.trained)
    with together(run.accelerator):
        if run.accelerator.is_main_process:
            tensors["optimizer.safetensors"], rest = checkpoint.optimizer_tensors(stored, names)
            checkpoint.publish(run.checkpoints, run.step, tensors, _state(run) | {"optimizer": rest})
            checkpoint.prune(run.checkpoints, run.config.train.checkpoints_total_limit)
    return path


def _state(run: Run) -> dict[str, Any]:
    """What a checkpoint says besides its tensors, and what a resumed run is compared with."""
    return {
        "config": own_config(run.config.model_dump(mode="json")),
        "identities": run.identities,
        "samples": run.samples.digest,
        "global_batch_size": _global_batch_size(run),
        "began": run.began,
        "sigma_density": asdict(run.density),
        "schedule": run.schedule.state_dict(),
        "ema_steps": run.ema.optimization_step if run.ema is not None else 0,
        **({} if run.origin is None else {"init_from": run.origin}),
    }


def _global_batch_size(run: Run) -> int:
    t = run.config.train
    return t.train_batch_size * t.gradient_accumulation_steps * run.accelerator.num_processes


def _compare(run: Run, found: checkpoint.Checkpoint) -> None:
    """Raises InputError for what must not have changed since the checkpoint."""
    changed = checkpoint.frozen_differences(found.state["config"], run.config)
    now = _state(run)
    same = {"identities": "the models", "samples": "the triplets", "global_batch_size": "the global batch size",
            "sigma_density": "the density of sigma"}  # fmt: skip
    for key, words in same.items():
        if found.state[key] != now[key]:
            was, is_now = (json.dumps(value[key], sort_keys=True) for value in (found.state, now))
            changed.append(f"{words}: {was} -> {is_now}")
    if changed:
        raise InputError(
            f"{found.path}: this run differs from the one that was saved in what may not change on resume: "
            + "; ".join(changed)
        )
    if found.step > run.config.train.max_train_steps:
        raise InputError(f"{found.path} is beyond train.max_train_steps {run.config.train.max_train_steps}; raise it")


def _restore(run: Run, found: checkpoint.Checkpoint) -> None:
    """Puts what a checkpoint holds besides the weights into a freshly built run."""
    stored = checkpoint.optimizer_state(
        list(run.trained), found.tensors["optimizer.safetensors"], found.state["optimizer"]
    )
    run.strategy.load_optimizer(run.optimizer, stored, run.trained)
    run.schedule.load_state_dict(found.state["schedule"])
    for group, rate in zip(run.schedule.optimizer.param_groups, run.schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    if run.ema is not None:
        averaged = found.tensors["ema.safetensors"]
        run.ema.shadow_params = [run.strategy.shard_like(averaged[name], p) for name, p in run.trained.items()]
        run.ema.optimization_step = found.state["ema_steps"]
    run.step = found.step
    if run.schedule.last_epoch != run.step:
        raise InputError(f"{found.path}: its schedule stands at step {run.schedule.last_epoch}, not {run.step}")


def advised(run: Run) -> str:
    """What the validations say of when to stop, on the main process; else empty."""
    if run.record is None:
        return ""
    return advice(run.record.rows(), checkpoint.best_step(run.folder), reads=bool(run.config.reads))


def export(run: Run) -> Path:
    """The adapter for others, with averaged weights where there is an average."""
    exported = run.folder / "export"
    with _averaged(run):
        state = run.strategy.whole(run.trained)
        with together(run.accelerator):
            if run.accelerator.is_main_process:
                known, origin = run.identities, run.origin
                save_adapter(exported, run.model, run.config, known, step=run.step, state=state, origin=origin)
    return exported
