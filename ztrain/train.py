"""Trains one adapter list on triplets: `accelerate launch -m ztrain.train --config FILE [--dotted.key value ...]`.

In: a folder of triplets and the released models. Out: `<output_dir>/config.yaml`, `metrics.jsonl` and `export/`.
References, prompts and targets are encoded on the fly. Order and noise are pure functions of (seed, step), so they do
not depend on the number of processes or workers.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ztrain.adapters import build_adapters, describe_list
from ztrain.config import Config, TrainConfig, load_config
from ztrain.data import SampleKey, Triplet, batch_keys, check_reference, fit_target, open_image, read_manifest
from ztrain.dit import load_transformer
from ztrain.encoders import Encoders
from ztrain.errors import InputError
from ztrain.export import identities, save_adapter
from ztrain.flow import SigmaDensity, draw_noise, draw_sigma, interpolate, resolution_shift, velocity_losses
from ztrain.model import AdaptedDiT
from ztrain.models import Source, base_defaults, base_dtype
from ztrain.stats import check_statistics
from ztrain.yamls import dump_yaml


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One triplet with its pictures, ready to encode."""

    key: SampleKey
    prompt: str
    references: list[Image.Image]
    target: Image.Image


class TripletPictures(Dataset):
    """SampleKey -> Loaded. Indexed by keys, which the batch sampler gives, not by numbers."""

    def __init__(self, triplets: Sequence[Triplet], config: Config) -> None:
        self.triplets, self.data = triplets, config.data

    def __getitem__(self, key: SampleKey) -> Loaded | InputError:
        """A bad picture comes back as its error: raised in a worker it would arrive wrapped in a traceback."""
        try:
            return self._load(key)
        except InputError as error:
            return error

    def _load(self, key: SampleKey) -> Loaded:
        triplet, data = self.triplets[key.index], self.data
        references = [open_image(path) for path in triplet.references]
        for image, path in zip(references, triplet.references, strict=True):
            check_reference(image, path, min_side=data.reference_min_side, max_aspect=data.reference_max_aspect)
        target = open_image(triplet.target)
        target = fit_target(target, triplet.target, resolution=data.resolution, max_crop=data.max_crop)
        return Loaded(key=key, prompt=triplet.prompt, references=references, target=target)


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """This process's keys of every micro-step, in order; the global batch is the same for any number of processes."""

    num_samples: int
    seed: int
    device_batch_size: int
    num_processes: int
    process_index: int
    num_micro_steps: int

    def __iter__(self) -> Iterator[list[SampleKey]]:
        size = self.device_batch_size * self.num_processes
        first = self.process_index * self.device_batch_size
        for step in range(self.num_micro_steps):
            keys = batch_keys(step, global_batch_size=size, num_samples=self.num_samples, seed=self.seed)
            yield keys[first : first + self.device_batch_size]

    def __len__(self) -> int:
        return self.num_micro_steps


def _whole(items: list[Loaded | InputError]) -> list[Loaded] | InputError:
    """The micro-batch, or the first thing that is wrong with it."""
    return next((item for item in items if isinstance(item, InputError)), None) or items  # type: ignore[return-value]


def make_loader(config: Config, accelerator: Accelerator) -> DataLoader:
    triplets = read_manifest(Path(config.data.train_data_dir), config.data.train_split)
    micro_steps = config.train.max_train_steps * config.train.gradient_accumulation_steps
    batches = MicroBatches(
        len(triplets),
        config.seed,
        config.train.train_batch_size,
        accelerator.num_processes,
        accelerator.process_index,
        micro_steps,
    )
    return DataLoader(
        TripletPictures(triplets, config),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=config.data.dataloader_num_workers,
        collate_fn=_whole,
    )


def sigma_density(config: Config, scheduler_shift: float) -> SigmaDensity:
    """The configured density with its shift resolved to a number."""
    flow = config.flow
    match flow.shift:
        case "scheduler":
            shift = scheduler_shift
        case "resolution":
            shift = resolution_shift((config.data.resolution // 16) ** 2)
        case number:
            shift = float(number)
    return SigmaDensity(flow.sigma_sampling, shift, flow.logit_mean, flow.logit_std)


def check_first_gradients(model: AdaptedDiT, steps_done: int) -> None:
    """Every trained weight must have a gradient after the first backward: a silent None trains nothing."""
    if steps_done:
        return
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if lost:
        raise RuntimeError(f"{len(lost)} trained weights got no gradient in the first step, for example {lost[0]}")


def refuse_used_folder(folder: Path) -> None:
    """A second run into a folder would leave files of two runs side by side."""
    if (folder / "metrics.jsonl").exists() or (folder / "export").exists():
        raise InputError(f"output_dir {folder} already holds a run; name another folder or remove it")


def make_model(config: Config, dit: Any, siglip_dim: int | None) -> AdaptedDiT:
    """The frozen transformer with fresh adapters, the same on every process, ready to train."""
    torch.manual_seed(config.seed)
    model = AdaptedDiT(dit, build_adapters(config.adapters, siglip_dim)).to(dit.device).train()
    if not model.trainable_state():
        listed = describe_list(config.adapters)
        raise InputError(f"adapters {listed} has no weights to train; add projector, lora or siglip")
    if config.train.gradient_checkpointing:
        dit.enable_gradient_checkpointing()
    return model


def make_optimizer(config: TrainConfig, trained: list[torch.nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and its learning-rate schedule, which counts optimizer steps."""
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        trained, config.learning_rate, betas, config.adam_epsilon, weight_decay=config.adam_weight_decay
    )
    return optimizer, get_scheduler(config.lr_scheduler, optimizer, config.lr_warmup_steps, config.max_train_steps)


def train(config: Config) -> Path:
    """Runs the experiment and gives the folder of the exported adapter."""
    folder, t = Path(config.output_dir), config.train
    refuse_used_folder(folder)
    # AdaptedDiT owns the precision; without the word here a user's accelerate config would add another one on top.
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=t.gradient_accumulation_steps)
    accelerator.wait_for_everyone()  # every process has seen the empty folder before one writes into it
    dtype, device = base_dtype(t.mixed_precision), accelerator.device
    density = sigma_density(config, base_defaults(config.models).shift)
    check_statistics(config.adapters, config.encoders)
    loader = make_loader(config, accelerator)
    dit = load_transformer(Source.of(config.models.base), dtype, device)
    encoders = Encoders.load(config, config.reads, dtype, device)
    known = identities(dit, encoders)
    model = make_model(config, dit, encoders.siglip_dim)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = make_optimizer(t, trained)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_yaml(config.model_dump(mode="json")), encoding="utf-8")
        accelerator.print(f"training {sum(p.numel() for p in trained):,} weights of {describe_list(config.adapters)}")

    # close() ends the progress line, so that an error starts on a line of its own.
    with closing(Record(folder / "metrics.jsonl", config, accelerator)) as record:
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            # --- one micro-step --------------------------------------------------------------------------------
            latents = [encoders.codec.encode(item.target) for item in batch]  # B x (C, H, W)
            encoded = encoders.encode(
                [item.prompt for item in batch], [item.references for item in batch], config.reads, config.encoders
            )
            with accelerator.accumulate(wrapped):
                keys = [item.key for item in batch]
                noise, sigma = draw_noise(keys, latents), draw_sigma(keys, density)  # B x (C, H, W), (B,)
                noisy = [interpolate(x, n, float(s)) for x, n, s in zip(latents, noise, sigma, strict=True)]
                velocity = wrapped(noisy, sigma, encoded)
                loss = velocity_losses(velocity, latents, noise, sigma, config.flow.loss_weight).mean()
                accelerator.backward(loss)
                record.add_micro_step(accelerator.gather(loss.detach()).mean().item())
                if accelerator.sync_gradients:
                    check_first_gradients(model, record.step)
                    grad_norm = accelerator.clip_grad_norm_(trained, t.max_grad_norm)
                    record.finish_step(float(grad_norm), schedule.get_last_lr()[0])
                optimizer.step()
                if accelerator.sync_gradients:
                    schedule.step()
                optimizer.zero_grad()
            # ---------------------------------------------------------------------------------------------------

    exported = folder / "export"
    if accelerator.is_main_process:
        save_adapter(exported, model, config, known, step=t.max_train_steps)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return exported


class Record:
    """metrics.jsonl and the progress line; stops the run before a step on a loss or gradient that is not finite."""

    def __init__(self, path: Path, config: Config, accelerator: Accelerator) -> None:
        self.step, self.logging_steps = 0, config.train.logging_steps
        self.main, self.started = accelerator.is_main_process, time.perf_counter()
        self.losses: list[float] = []
        self.file = path.open("w", encoding="utf-8") if self.main else None
        self.bar = tqdm(total=config.train.max_train_steps, disable=not self.main, unit="step", mininterval=1.0)

    def add_micro_step(self, loss: float) -> None:
        self.losses.append(loss)

    def finish_step(self, grad_norm: float, learning_rate: float) -> None:
        loss = sum(self.losses) / len(self.losses)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise RuntimeError(f"step {self.step + 1}: loss {loss}, gradient norm {grad_norm}; stopped before the step")
        self.step, self.losses = self.step + 1, []
        if self.file is not None:
            row: dict[str, Any] = {"step": self.step, "train/loss": loss, "train/grad_norm": grad_norm}
            row |= {"train/lr": learning_rate, "seconds": round(time.perf_counter() - self.started, 3)}
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        self.bar.update()
        if self.step % self.logging_steps == 0:
            self.bar.set_postfix(loss=f"{loss:.4f}", grad_norm=f"{grad_norm:.3f}")

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ztrain.train", description=__doc__, add_help=False)
    parser.add_argument("--config", nargs="+", type=Path, required=True)
    known, overrides = parser.parse_known_args(arguments)
    try:
        exported = train(load_config(known.config, overrides, "ztrain.train"))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"exported: {exported}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
