"""Pictures for people: prompts x aspects x seeds with any references: `ztrain sample`.

With `--adapter` an exported list, else the experiment's own adapters if they need no weights (the splice). Models are
in memory only while they are needed: the encoders leave before the transformer comes, and the VAE, 0.2 GB of weights,
stays beside it, so that a picture is written as soon as it is sampled. With `--offload` the VAE leaves with the
encoders and comes back when the transformer is gone; pictures are written then.
"""

import gc
import json
import math
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ztrain.adapters import build_adapters, describe_list
from ztrain.conditioning import Encoded
from ztrain.config import Aspect, Config, EncodersConfig, list_reads
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec
from ztrain.frozen.sources import Source, base_defaults, base_dtype, identity
from ztrain.frozen.states import Encoders, check_weights
from ztrain.frozen.statistics import check_statistics
from ztrain.images import Bucket, fit_target, open_image
from ztrain.io.drawn import save_picture
from ztrain.io.files import append_line, as_text
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import load_transformer
from ztrain.model.fast.blocks import slow_because
from ztrain.model.sampler import Picture, SampleSettings, released_or, sample_all
from ztrain.sampling.aspects import output_size, size_of
from ztrain.sampling.sheet import CELL, draw_grid
from ztrain.version import VERSION
from ztrain.weights.adapter_folder import ExportedAdapter, Identities, adapt, check_identity, read_adapter

SHEET, NOTES = "sheet.png", "pictures.jsonl"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What `ztrain sample` is asked for, besides the experiment.

    `out`: a file for one picture, a folder for several; `weights`: one >= 0 for each reference, or None; `scales`: one
    for each adapter, None = sample.scales; `start_image` is resized to cover the output and cut at its centre, and
    `strength` in (0, 1] is the way from it, None = sample.strength; `aspects`: none = sample.aspect, or its height and
    width; `num_images` of each prompt and aspect, from seeds that count up from the experiment's.
    """

    prompts: Sequence[str]
    out: Path
    references: Sequence[Path] = ()
    weights: Sequence[float] | None = None
    adapter: Path | None = None
    scales: Sequence[float] | None = None
    start_image: Path | None = None
    strength: float | None = None
    aspects: Sequence[Aspect] = ()
    num_images: int = 1
    offload: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One picture of an order: which prompt, what seed, how large (height, width), what it is called, where it goes."""

    prompt: int
    seed: int
    size: tuple[int, int]
    shape: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What is left of the encoders: states of each prompt, latents' shape and start of each size; the VAE if it
    stays."""

    encoded: Encoded
    shapes: dict[tuple[int, int], tuple[int, int, int]]
    starts: dict[tuple[int, int], Tensor]
    known: Identities
    siglip_dim: int | None
    codec: LatentCodec | None


def render(config: Config, order: Order) -> Path:
    """Writes all pictures of an order, and of several a sheet. Gives `out`."""
    planned = plan(config, order)
    settings = _settings(config, order)
    exported = read_adapter(order.adapter) if order.adapter else None
    adapters = exported.adapters if exported else list(config.adapters)
    if exported is None and any(entry.needs_training for entry in adapters):
        raise InputError(f"adapters {describe_list(adapters)} are untrained; give the exported folder with --adapter")
    scales = _scales(config, order, adapters)
    images = _references(config, order, adapters)
    encoder_settings = exported.encoders if exported else config.encoders
    check_statistics(adapters, encoder_settings)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _stage("encoders", device):
        prepared = _prepare(config, order, planned, images, adapters, encoder_settings, settings, device)
    note = _note(order, adapters, settings, scales)
    finished: list[tuple[Planned, Tensor]] = []
    try:
        with _stage("transformer" if order.offload else "transformer and VAE", device):
            model = _model(config, exported, adapters, prepared, device)
            model.set_scales(scales)
            for each, latents in _sampled(model, config, planned, prepared, settings, device):
                if prepared.codec is None:
                    finished.append((each, latents.cpu()))
                else:
                    _write(prepared.codec, each, latents, note, order)
            del model
    finally:  # also where it was cut off: what is sampled is shown
        if finished:
            with _stage("VAE", device):
                codec = _codec(config, device)
                for each, latents in finished:
                    _write(codec, each, latents.to(device), note, order)
                del codec
    if len(planned) > 1:
        _draw_sheet(order, planned)
    return order.out


def plan(config: Config, order: Order) -> list[Planned]:
    """The pictures of an order: prompt by prompt, aspect by aspect, seed by seed."""
    if not order.prompts or order.num_images < 1:
        raise InputError("nothing to draw: give at least one --prompt and --num-images 1")
    if unreadable := next((prompt for prompt in order.prompts if as_text(prompt) != prompt), None):
        raise InputError(f"--prompt '{as_text(unreadable)}' is not UTF-8; type it again")
    if not order.references and not all(prompt.strip() for prompt in order.prompts):
        raise InputError("the prompt is empty and there is no reference; give --prompt or --reference")
    resolution, sample = config.data.resolution, config.sample
    if order.aspects and (sample.height, sample.width) != (None, None):
        raise InputError("--aspect decides height and width; leave out sample.height and sample.width")
    sizes = {aspect.replace(":", "x"): size_of(aspect, resolution) for aspect in order.aspects}
    if not sizes:
        height, width = output_size(config)
        sizes = {sample.aspect.replace(":", "x") if sample.aspect else f"{width}x{height}": (height, width)}
    many = len(order.prompts) * len(sizes) * order.num_images > 1
    if many == (order.out.suffix.lower() in _SUFFIXES):
        wanted = "a folder for several pictures" if many else f"a file for one picture, named {' or '.join(_SUFFIXES)}"
        raise InputError(f"--out {order.out}: give {wanted}")
    return [
        Planned(
            prompt=i,
            seed=seed,
            size=size,
            shape=shape,
            path=order.out / f"prompt{i + 1}-{shape}-seed{seed}.png" if many else order.out,
        )
        for i in range(len(order.prompts))
        for shape, size in sizes.items()
        for seed in range(config.seed, config.seed + order.num_images)
    ]


def _settings(config: Config, order: Order) -> SampleSettings:
    settings = released_or(config.sample, base_defaults(config.models))
    if order.strength is not None:
        settings = replace(settings, strength=order.strength)
    if not 0.0 < settings.strength <= 1.0:
        raise InputError(f"--strength {settings.strength:g} must be above 0 and at most 1")
    given = order.strength is not None or config.sample.strength < 1.0
    if (order.start_image is None) == given:
        raise InputError("--start-image and --strength go together: what to start from, and how far to go from it")
    return settings


def _scales(config: Config, order: Order, adapters: Sequence[Any]) -> list[float]:
    given = config.sample.scales if order.scales is None else list(order.scales)
    scales = given if isinstance(given, list) else [given] * len(adapters)
    if len(scales) != len(adapters):
        raise InputError(
            f"--scales has {len(scales)} numbers for the {len(adapters)} adapters {describe_list(list(adapters))}"
        )
    if not all(math.isfinite(scale) for scale in scales):
        raise InputError(f"--scales {' '.join(f'{scale:g}' for scale in scales)}: each must be a finite number")
    return scales


def _references(config: Config, order: Order, adapters: Sequence[Any]) -> list[Image.Image]:
    if order.weights is not None:
        check_weights(order.weights, len(order.references))
    images = [open_image(path) for path in order.references]
    for image, path in zip(images, order.references, strict=True):
        config.data.check_reference(image.size, str(path))
    if images and not list_reads(adapters):
        print(f"{describe_list(list(adapters))} reads no reference: --reference changes nothing", flush=True)
    return images


def _prepare(
    config: Config,
    order: Order,
    planned: Sequence[Planned],
    images: Sequence[Image.Image],
    adapters: Sequence[Any],
    encoder_settings: EncodersConfig,
    settings: SampleSettings,
    device: torch.device,
) -> _Prepared:
    reads, count = list_reads(adapters), len(order.prompts)
    encoders = Encoders.load(config, reads, base_dtype(config.train.mixed_precision), device)
    weights = None if order.weights is None else [order.weights] * count
    codec, sizes = encoders.codec, {each.size for each in planned}
    start = None if order.start_image is None else open_image(order.start_image)
    return _Prepared(
        encoded=encoders.encode(
            order.prompts, [images] * count, reads, encoder_settings, weights, settings.negative_prompt
        ),
        shapes={size: codec.latent_shape(*size) for size in sizes},
        starts={} if start is None else {size: codec.encode(fit_target(start, Bucket(*size))) for size in sizes},
        known=encoders.identities,
        siglip_dim=encoders.siglip_dim,
        codec=None if order.offload else codec,
    )


def _model(
    config: Config,
    exported: ExportedAdapter | None,
    adapters: Sequence[Any],
    prepared: _Prepared,
    device: torch.device,
) -> AdaptedDiT:
    models, dtype = config.models, base_dtype(config.train.mixed_precision)
    dit = load_transformer(Source.of(models.base), dtype, device, models.transformer_file)
    if exported is not None:
        check_identity(exported, prepared.known | {"transformer": identity(dit)})
        model = adapt(dit, exported)
    else:
        model = AdaptedDiT(dit, build_adapters(list(adapters), prepared.siglip_dim)).eval()
    if reason := slow_because(dit):
        print(f"blocks: as diffusers wrote them, because {reason}", flush=True)
    return model


def _sampled(
    model: AdaptedDiT,
    config: Config,
    planned: Sequence[Planned],
    prepared: _Prepared,
    settings: SampleSettings,
    device: torch.device,
) -> Iterator[tuple[Planned, Tensor]]:
    """Each picture with its latents, as soon as they are there."""
    pictures = [
        Picture(row=p.prompt, seed=p.seed, shape=prepared.shapes[p.size], start=prepared.starts.get(p.size))
        for p in planned
    ]
    with tqdm(total=len(planned), unit="picture") as bar:
        latents = sample_all(
            model,
            prepared.encoded,
            pictures,
            settings,
            batch_size=config.sample.batch_size,
            device=device,
            progress=_told(bar),
        )
        for each, found in zip(planned, latents, strict=True):
            yield each, found
            bar.update()


def _told(bar: Any) -> Callable[[Iterable[int]], Iterable[int]]:
    """Says at which step a batch is, beside the number of finished pictures."""

    def steps(numbers: Iterable[int]) -> Iterator[int]:
        for number in numbers:
            bar.set_postfix_str(f"step {number + 1}")
            yield number

    return steps


def _codec(config: Config, device: torch.device) -> LatentCodec:
    return LatentCodec.load(Source.of(config.models.base), base_dtype(config.train.mixed_precision), device)


def _note(order: Order, adapters: Sequence[Any], settings: SampleSettings, scales: Sequence[float]) -> dict[str, Any]:
    """How the pictures were made, without paths of this machine."""
    return {
        "ztrain": VERSION,
        "adapters": describe_list(list(adapters)),
        "adapter": as_text(order.adapter.name) if order.adapter else None,
        "scales": list(scales),
        "references": [as_text(path.name) for path in order.references],
        "reference_weights": None if order.weights is None else list(order.weights),
        "start_image": as_text(order.start_image.name) if order.start_image else None,
        **asdict(settings),
    }


def _write(codec: LatentCodec, planned: Planned, latents: Tensor, note: dict[str, Any], order: Order) -> None:
    """The picture, and of several a line that says how it was made, the last one for a file being the one that counts;
    in a file of its own, so that equal pictures are equal files."""
    save_picture(codec.decode(latents), planned.path)
    if planned.path == order.out:
        return
    about = {"file": planned.path.name, "prompt": order.prompts[planned.prompt], "seed": planned.seed, **note}
    append_line(order.out / NOTES, json.dumps(about, ensure_ascii=False))


def _draw_sheet(order: Order, planned: Sequence[Planned]) -> None:
    """A row for each prompt and aspect, a column for each seed."""
    rows: dict[tuple[int, str], list[Image.Image]] = {}
    for each in planned:
        with Image.open(each.path) as picture:
            picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            rows.setdefault((each.prompt, each.shape), []).append(picture.copy())
    labels = [f"seed {seed}" for seed in dict.fromkeys(each.seed for each in planned)]
    captions = [f"{shape.replace('x', ':')}  {order.prompts[prompt]}" for prompt, shape in rows]
    save_picture(draw_grid(labels, captions, list(rows.values())), order.out / SHEET)


@contextmanager
def _stage(name: str, device: torch.device) -> Iterator[None]:
    """Says how much memory its models took at most, after they have gone."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield
    if device.type == "cuda":
        print(f"{name}: at most {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB on the GPU", flush=True)
    else:
        # Linux counts KiB, macOS bytes; there is no peak of a part of a process.
        unit = 1 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        print(f"{name}: the process had at most {peak:.1f} GiB so far", flush=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
