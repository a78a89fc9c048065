"""One picture from one prompt and any references: `ztrain sample`.

With `--adapter` an exported list, else the experiment's own adapters if they need no weights (the splice).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ztrain.adapters import build_adapters, describe_list
from ztrain.config import Config, list_reads
from ztrain.dit import load_transformer
from ztrain.encoders import Encoders
from ztrain.errors import InputError
from ztrain.export import adapt, check_identity, encoder_identities, read_adapter
from ztrain.flow import sampler_noise
from ztrain.images import check_reference, open_image
from ztrain.model import AdaptedDiT
from ztrain.models import Source, base_defaults, base_dtype, identity
from ztrain.sample import released_or, sample
from ztrain.stats import check_statistics


def render(
    config: Config,
    prompt: str,
    references: Sequence[Path],
    adapter: Path | None,
    out: Path,
    *,
    start_image: Path | None = None,
    strength: float | None = None,
    scales: Sequence[float] | None = None,
) -> Path:
    """Writes the picture to `out`. A start image is resized to the output; `strength` in (0, 1] is the way from it."""
    if not prompt.strip() and not references:
        raise InputError("the prompt is empty and there is no reference; give --prompt or --reference")
    if (start_image is None) != (strength is None):
        raise InputError("--start-image and --strength go together")
    if strength is not None and not 0.0 < strength <= 1.0:
        raise InputError(f"--strength {strength} must be above 0 and at most 1")
    images = [open_image(path) for path in references]
    for image, path in zip(images, references, strict=True):
        check_reference(
            image.size, str(path), min_side=config.data.reference_min_side, max_aspect=config.data.reference_max_aspect
        )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, base = base_dtype(config.train.mixed_precision), Source.of(config.models.base)
    settings = released_or(config.sample, base_defaults(config.models))
    exported = read_adapter(adapter) if adapter else None
    adapters = exported.adapters if exported else list(config.adapters)
    encoder_settings = exported.encoders if exported else config.encoders
    if exported is None and any(entry.needs_training for entry in adapters):
        raise InputError(f"adapters {describe_list(adapters)} are untrained; give the exported folder with --adapter")
    check_statistics(adapters, encoder_settings)
    reads = list_reads(adapters)
    encoders = Encoders.load(config, reads, dtype, device)
    encoded = encoders.encode([prompt], [images], reads, encoder_settings)
    known, codec, siglip_dim = encoder_identities(encoders), encoders.codec, encoders.siglip_dim
    del encoders  # before the transformer comes: the two do not fit beside each other on a 24 GB card
    dit = load_transformer(base, dtype, device)
    if exported:
        check_identity(exported, known | {"transformer": identity(dit, "transformer")})
        model = adapt(dit, exported)
    else:
        model = AdaptedDiT(dit, build_adapters(adapters, siglip_dim)).eval()
    if scales is not None:
        if len(scales) != len(adapters):
            raise InputError(
                f"--scales has {len(scales)} numbers for the {len(adapters)} adapters {describe_list(adapters)}"
            )
        model.set_scales(scales)

    height = config.sample.height or config.data.resolution
    width = config.sample.width or config.data.resolution
    noise = sampler_noise(config.seed, codec.latent_shape(height, width)).to(device)
    start = None
    if start_image is not None and strength is not None:
        settings = replace(settings, strength=strength)
        start = [codec.encode(open_image(start_image).resize((width, height)))]
    latents = sample(model, encoded, [noise], settings, start=start, progress=tqdm)[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    codec.decode(latents).save(out)
    return out
