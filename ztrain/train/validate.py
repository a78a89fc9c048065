"""What a run shows of itself: losses on held-out triplets and a grid of previews, both from the cache.

The losses are taken at fixed sigmas with fixed noise, three ways: with the right reference, with another sample's, with
none. Right lower than another's means that the image is used. Nothing here draws from a generator that training uses.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from ztrain.adapters import build_adapters, describe_list
from ztrain.cache.cache import Cache
from ztrain.cache.loader import read_batch
from ztrain.cache.order import SampleKey
from ztrain.cache.samples import Sample, Samples
from ztrain.conditioning import concatenate
from ztrain.config import Config
from ztrain.distributed.agreement import together
from ztrain.distributed.strategy import Strategy, turns
from ztrain.frozen.encoders import LatentCodec
from ztrain.frozen.sources import base_defaults
from ztrain.images import open_image
from ztrain.io.drawn import save_picture, still_to_draw
from ztrain.io.files import read_bytes, whole_folder
from ztrain.metrics.intervals import interval
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.flow import SigmaDensity, draw_noise, loss, quantiles
from ztrain.model.sampler import Picture, SampleSettings, released_or, sample_all
from ztrain.sampling.sheet import draw_grid

_EPOCH = 2**32 - 1  # of validation's noise: an epoch that no training reaches

_RESAMPLES = 2000
_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
_LARGEST = 1024  # pixels of a side of the originals that are kept beside the previews
_KEY = "key.json"

_BASE = ("no_image", "splice", "reference", "target")
"""Columns that training does not change."""

VARIANTS = ("loss", "loss_shuffled", "loss_no_reference")
"""Metrics under val/: with the right reference, with another sample's, with none."""


@torch.no_grad()
def validation_losses(
    model: AdaptedDiT,
    accelerator: Accelerator,
    config: Config,
    cache: Cache,
    samples: Samples,
    density: SigmaDensity,
    *,
    equally_often: bool = False,
) -> dict[str, float]:
    """`val/loss`, `val/loss_shuffled`, `val/loss_no_reference`, each also `_sigma_<s>`, and `val/image_use`: shuffled
    minus right, with its paired 95 % interval `_low` and `_high` over samples (none for a single one, or where
    a loss is no number); `val/other_style`: the share of samples whose shuffled reference is known to be of another
    style, where the list reads any. Means over the held-out samples, the same for any number of processes. density:
    what the run draws its sigmas from. equally_often: see strategy.turns."""
    pairs = samples.held_out_pairs(config)
    held_out, others = pairs.own, pairs.others
    sigmas = fixed_sigmas(config, density)
    table = torch.zeros((len(VARIANTS), len(held_out), len(sigmas)), dtype=torch.float64, device=accelerator.device)
    model.eval()
    with together(accelerator):
        for i, counts in turns(len(held_out), accelerator, equally_often=equally_often):
            key, pair = SampleKey(config.seed, _EPOCH, i), (held_out[i], others[i])
            right, other = (read_batch(cache, [s], [key], config.reads).to(accelerator.device) for s in pair)
            encoded = concatenate([right.encoded, other.encoded, right.encoded.without_reference()])
            latents, noise = right.latents * 3, draw_noise([key], right.latents) * 3
            for place, sigma in enumerate(sigmas):
                # In float32, 1 - 0.8 would be rounded twice.
                losses = loss(model, latents, noise, torch.full((3,), sigma, dtype=torch.float64), encoded)
                if counts:
                    table[:, i, place] = losses.double()
    model.train()
    table = accelerator.reduce(table, reduction="sum").cpu()  # every place was filled by one process
    values = {f"val/{name}": float(table[v].mean()) for v, name in enumerate(VARIANTS)}
    for place, sigma in enumerate(sigmas):
        values |= {f"val/{name}_sigma_{sigma:g}": float(table[v, :, place].mean()) for v, name in enumerate(VARIANTS)}
    right, shuffled = (table[VARIANTS.index(name)].mean(1) for name in ("loss", "loss_shuffled"))
    if len(held_out) > 1 and bool(table.isfinite().all()):
        if limits := interval(shuffled - right, resamples=_RESAMPLES).limits:
            values |= {"val/image_use_low": limits[0], "val/image_use_high": limits[1]}
    if pairs.exchange is not None:
        values["val/other_style"] = pairs.exchange.share
    return values | {"val/image_use": values["val/loss_shuffled"] - values["val/loss"]}


def fixed_sigmas(config: Config, density: SigmaDensity) -> list[float]:
    """Where the losses are measured, rising under auto; rounded there, as metrics are named after them."""
    given = config.validation.sigmas
    if given != "auto":
        return list(given)
    found = quantiles(density, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
    return sorted({*(max(round(sigma, 3), 0.001) for sigma in found), 1.0})


@dataclass(slots=True)
class Previews:
    """Rows of held-out samples in columns: reference, no image, splice, this adapter list, target.

    The columns of the frozen base are rendered once, before the first step, and kept in `folder`. Each set of pictures
    is a folder that appears whole, with all that decided it in `key.json`: nothing of other settings is mixed in.
    """

    config: Config
    cache: Cache
    rows: list[Sample]
    accelerator: Accelerator
    folder: Path
    codec: LatentCodec
    strategy: Strategy
    decided: dict[str, Any] = field(default_factory=dict)
    """What decides every picture but the step, the list and the splice; known once the base is."""

    def render_base(self, model: AdaptedDiT, base: Mapping[str, str]) -> None:
        """The columns that training does not change; kept from an earlier life of the run that had the same ones.

        base: the identity of the transformer, as it is without adapters."""
        self.decided = self._decided(base)
        key = self.decided | {"splice": self.config.compare.splice.model_dump(mode="json")}
        known = [False]
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                known = [self._is_kept(key)]
        # As the main process sees it: others may have no such folder, and all must render together.
        if broadcast_object_list(known)[0]:
            return
        pictures: dict[str, bytes] = {}
        for name, adapters in {"no_image": [], "splice": [self.config.compare.splice]}.items():
            reads = frozenset().union(*(adapter.reads for adapter in adapters))
            with model.showing(build_adapters(adapters)):
                drawn = self._render(model.eval(), reads)
            pictures |= {f"{name}-{i}.png": picture for i, picture in drawn.items()}
        model.train()
        self._publish("base", pictures, key, self._given)

    def _is_kept(self, key: Mapping[str, Any]) -> bool:
        """Whether the columns of the base are there as `key` has them, whole."""
        try:
            told = read_bytes(self.folder / "base" / _KEY, "json")
        except OSError:
            return False
        return told == _as_json(key) and not still_to_draw([path for name in _BASE for path in self.base(name)])

    def _given(self) -> dict[str, bytes]:
        """References and targets."""
        found = {}
        for i, row in enumerate(self.rows):
            for name, known in (("reference", row.references[0]), ("target", row.target)):
                image = open_image(known.picture)
                image.thumbnail((_LARGEST, _LARGEST))
                found[f"{name}-{i}.png"] = _as_png(image)
        return found

    @property
    def settings(self) -> SampleSettings:
        """As configured, from noise alone."""
        return replace(released_or(self.config.sample, base_defaults(self.config.models)), strength=1.0)

    def _decided(self, base: Mapping[str, str]) -> dict[str, Any]:
        rows = [
            [row.prompt, *(k.digest for k in row.references), row.target.digest, asdict(row.bucket)]
            for row in self.rows
        ]
        return {
            "rows": rows,
            "seed": self.config.seed,
            "sampling": self.settings.decided,
            "encoders": self.config.encoders.model_dump(mode="json"),
            "precision": self.config.train.mixed_precision,
            "transformer": base,
        }

    def base(self, name: str) -> list[Path]:
        """Pictures of a column that training does not change: no_image, splice, reference or target."""
        return [self.folder / "base" / f"{name}-{i}.png" for i in range(len(self.rows))]

    def draw(self, model: AdaptedDiT, step: int) -> list[Path]:
        """What the list draws at a step. Every process calls it; the main one writes."""
        model.eval()
        images = self._render(model, self.config.reads)
        model.train()
        name = f"step-{step:08d}"
        self._publish(name, {f"{i}.png": image for i, image in images.items()}, self.decided)
        return [self.folder / name / f"{i}.png" for i in range(len(self.rows))]

    def grid(self, model: AdaptedDiT, step: int) -> tuple[Path, list[dict[str, str | Path]]]:
        """The sheet of a step, and its cells as rows of a table. Every process calls it; the main one writes."""
        drawn = self.draw(model, step)
        columns = {
            "reference": self.base("reference"),
            "no image": self.base("no_image"),
            "splice": self.base("splice"),
            describe_list(self.config.adapters): drawn,
            "target": self.base("target"),
        }
        places = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        sheet = self.folder / f"step-{step:08d}.png"
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                cells = [[Image.open(path) for path in row.values()] for row in places]
                save_picture(draw_grid(list(columns), [row.prompt for row in self.rows], cells), sheet)
        table: list[dict[str, str | Path]] = [
            {"prompt": row.prompt, **cells} for row, cells in zip(self.rows, places, strict=True)
        ]
        return sheet, table

    def _render(self, model: AdaptedDiT, reads: frozenset[str]) -> dict[int, bytes]:
        """Each row's image as PNG, on the main process; rows are divided among all."""
        settings, device, mine = self.settings, self.accelerator.device, []
        with together(self.accelerator):
            for i, counts in turns(len(self.rows), self.accelerator, equally_often=self.strategy.shards_base):
                row = self.rows[i]
                key = SampleKey(self.config.seed, 0, i)
                encoded = read_batch(self.cache, [row], [key], reads, settings.negative_prompt).encoded
                shape = self.codec.latent_shape(row.bucket.height, row.bucket.width)
                picture = Picture(row=0, seed=self.config.seed + i, shape=shape)
                [latents] = sample_all(model, encoded, [picture], settings, batch_size=1, device=device)
                png = _as_png(self.codec.decode(latents))
                if counts:
                    mine.append((i, png))
        return dict(gather_object(mine))

    def _publish(
        self,
        name: str,
        pictures: Mapping[str, bytes],
        key: Mapping[str, Any],
        more: Callable[[], Mapping[str, bytes]] = dict,
    ) -> None:
        """A folder of the main process's pictures, in place of an older one."""
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                with whole_folder(self.folder / name, replace=True) as building:
                    for file, picture in {**pictures, **more()}.items():
                        (building / file).write_bytes(picture)
                    (building / _KEY).write_bytes(_as_json(key))


def _as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()


def _as_json(key: Mapping[str, Any]) -> bytes:
    return json.dumps(key, indent=1, sort_keys=True).encode()


def describe_losses(values: Mapping[str, float]) -> str:
    """One line for people."""
    right, other, none = (values[f"val/{name}"] for name in VARIANTS)
    use = f"{values['val/image_use']:+.5f}"
    if "val/image_use_low" in values:
        use += f" [{values['val/image_use_low']:+.5f}, {values['val/image_use_high']:+.5f}]"
    return f"validation loss {right:.5f}, with another's reference {other:.5f} ({use}), with none {none:.5f}"
