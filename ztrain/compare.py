"""Renders adapter lists side by side on the same prompts, references and seeds, into one labelled picture.

Columns: reference | no image | splice | presets ... | adapters ... | target. Out: `<output_dir>/compare.png` and
`compare.json`. The splice and plain text-to-image need no special case: they are lists without weights.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ztrain.adapters import build_adapters, describe_list
from ztrain.conditioning import Encoded
from ztrain.config import Config, EncodersConfig, list_reads, parse
from ztrain.data import read_triplets
from ztrain.dit import load_transformer
from ztrain.encoders import Encoders, LatentCodec
from ztrain.errors import InputError
from ztrain.export import ExportedAdapter, Identities, adapt, check_identity, encoder_identities, read_adapter
from ztrain.flow import sampler_noise
from ztrain.grid import draw_grid
from ztrain.images import check_reference, open_image
from ztrain.model import AdaptedDiT
from ztrain.models import Source, base_defaults, base_dtype, identity
from ztrain.rows import Triplet
from ztrain.sample import SampleSettings, released_or, sample
from ztrain.sampler import spread
from ztrain.stats import check_statistics
from ztrain.yamls import load_yaml


@dataclass(frozen=True, slots=True)
class Column:
    """One list of adapters to render: by its settings, or as exported with weights."""

    label: str
    adapters: list[Any]
    encoders: EncodersConfig
    exported: ExportedAdapter | None = None


def columns_of(config: Config) -> list[Column]:
    columns = [
        Column("no image", [], config.encoders),
        Column("splice", [config.compare.splice], config.encoders),
    ]
    for file in config.compare.presets:
        preset = parse(Config, load_yaml(Path(file)), file)
        columns.append(Column(Path(file).stem, list(preset.adapters), preset.encoders))
    for folder in config.compare.adapters:
        exported = read_adapter(Path(folder))
        columns.append(Column(describe_list(exported.adapters), exported.adapters, exported.encoders, exported))
    return columns


def compare(config: Config) -> Path:
    """Renders every column and gives the picture's path."""
    started, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    dtype, base = base_dtype(config.train.mixed_precision), Source.of(config.models.base)
    settings = released_or(config.sample, base_defaults(config.models))
    triplets = spread(
        read_triplets(config.data.train_data_dir, config.compare.split, config.data.revision).triplets,
        config.compare.num_samples,
    )
    references = [[open_image(picture) for picture in triplet.references] for triplet in triplets]
    for triplet, images in zip(triplets, references, strict=True):
        for picture, image in zip(triplet.references, images, strict=True):
            check_reference(
                image.size,
                picture.name,
                min_side=config.data.reference_min_side,
                max_aspect=config.data.reference_max_aspect,
            )
    columns = columns_of(config)
    for column in columns:
        check_statistics(column.adapters, column.encoders)
        if column.exported is None and any(adapter.needs_training for adapter in column.adapters):
            raise InputError(f"compare: {column.label} {describe_list(column.adapters)} is untrained; export it first")
    encoded, known, codec, siglip_dim = _encode(config, columns, triplets, references, dtype, device)
    rendered: list[list[Image.Image]] = []
    dit = model = None
    for column, states in zip(tqdm(columns, desc="columns", unit="list"), encoded, strict=True):
        # Weights change the transformer, so each trained list gets a fresh one, after the last one is gone.
        if column.exported:
            dit = model = None
        dit = load_transformer(base, dtype, device) if dit is None else dit
        if column.exported is None:
            model = AdaptedDiT(dit, build_adapters(column.adapters, siglip_dim)).eval()
        else:
            check_identity(column.exported, known | {"transformer": identity(dit, "transformer")})
            model = adapt(dit, column.exported)
        rendered.append(_render(config, model, codec, settings, states))
        if column.exported:
            dit = model = None
    return _write(config, columns, rendered, triplets, references, settings, time.perf_counter() - started)


def _encode(
    config: Config,
    columns: Sequence[Column],
    triplets: Sequence[Triplet],
    references: Sequence[Sequence[Image.Image]],
    dtype: torch.dtype,
    device: str,
) -> tuple[list[list[Encoded]], Identities, LatentCodec, int | None]:
    """Every column's states of every triplet, on the CPU: the encoders leave before the transformer comes."""
    encoders = Encoders.load(config, frozenset().union(*(list_reads(c.adapters) for c in columns)), dtype, device)
    encoded = []
    for column in columns:
        reads = list_reads(column.adapters)
        encoded.append(
            [
                encoders.encode([triplet.prompt], [pictures], reads, column.encoders).to(torch.device("cpu"))
                for triplet, pictures in zip(triplets, references, strict=True)
            ]
        )
    return encoded, encoder_identities(encoders), encoders.codec, encoders.siglip_dim


def _render(
    config: Config, model: AdaptedDiT, codec: LatentCodec, settings: SampleSettings, encoded: Sequence[Encoded]
) -> list[Image.Image]:
    height = config.sample.height or config.data.resolution
    width = config.sample.width or config.data.resolution
    shape, device = codec.latent_shape(height, width), codec.vae.device
    images = []
    for row, states in enumerate(encoded):
        noise = sampler_noise(config.seed + row, shape).to(device)
        images.append(codec.decode(sample(model, states.to(device), [noise], settings)[0]))
    return images


def _write(
    config: Config,
    columns: Sequence[Column],
    rendered: Sequence[Sequence[Image.Image]],
    triplets: Sequence[Triplet],
    references: Sequence[Sequence[Image.Image]],
    settings: SampleSettings,
    seconds: float,
) -> Path:
    folder = Path(config.compare.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    labels = ["reference", *(column.label for column in columns), "target"]
    targets = [open_image(triplet.target) for triplet in triplets]
    rows = [[references[i][0], *(images[i] for images in rendered), targets[i]] for i in range(len(triplets))]
    draw_grid(labels, [triplet.prompt for triplet in triplets], rows).save(folder / "compare.png")
    plain = np.stack([np.asarray(image, np.float32) for image in rendered[0]])
    document = {
        "columns": [
            {
                "label": column.label,
                "adapters": [adapter.model_dump(mode="json") for adapter in column.adapters],
                # Whether the reference does anything at all: mean absolute difference in 8-bit levels.
                "difference_to_no_image": float(
                    np.abs(np.stack([np.asarray(image, np.float32) for image in images]) - plain).mean()
                ),
            }
            for column, images in zip(columns, rendered, strict=True)
        ],
        "rows": [{"prompt": t.prompt, "index": t.index, "seed": config.seed + i} for i, t in enumerate(triplets)],
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "image_guidance_scale": settings.image_guidance_scale,
        "shift": settings.shift,
        "seconds": round(seconds, 1),
    }
    (folder / "compare.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return folder / "compare.png"
