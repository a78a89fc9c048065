"""The way back of an exported adapter: `load_adapter` puts it on a stock diffusers pipeline.

In: a ZImagePipeline and an adapter's folder. Out: a callable that takes prompts and reference images, with every
setting of a YAML's `sample` section.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ztrain.conditioning import Encoded
from ztrain.config import Aspect, DataConfig, EncodersConfig, Negative, SampleConfig, list_reads
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec, TextEncoder
from ztrain.frozen.sources import BaseDefaults, Source, defaults_for, identity
from ztrain.frozen.states import SIGLIP, VISION_LANGUAGE, Encoders, models_of
from ztrain.images import Bucket, as_rgb, fit_target
from ztrain.io.yamls import parse
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.sampler import Picture, released_or, sample_all
from ztrain.sampling.aspects import size_in
from ztrain.weights.adapter_folder import ExportedAdapter, Identities, adapt, check_identity, read_adapter


def identities(dit: Any, encoders: Encoders) -> Identities:
    """Who base and encoders are, by role. Take it before adapters are attached."""
    return {"transformer": identity(dit)} | encoders.identities


class AdaptedPipeline:
    """A stock pipeline's models with adapters: prompts and reference images in, pictures out."""

    def __init__(self, model: AdaptedDiT, encoders: Encoders, settings: EncodersConfig, defaults: BaseDefaults) -> None:
        self.model, self.encoders, self.settings, self.defaults = model, encoders, settings, defaults
        self.reads = list_reads([adapter.config for adapter in model.adapters])

    def encode(
        self,
        prompts: Sequence[str],
        references: Sequence[Sequence[Image.Image]],
        weights: Sequence[float] | None = None,
        negative_prompt: str = "",
    ) -> Encoded:
        """What the adapters read; `weights`: one for each reference, the same for all prompts."""
        of_each = None if weights is None else [weights] * len(prompts)
        return self.encoders.encode(prompts, references, self.reads, self.settings, of_each, negative_prompt)

    def __call__(
        self,
        prompt: str | Sequence[str],
        reference: Image.Image | Sequence[Image.Image] | None = None,
        *,
        reference_weights: Sequence[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect: Aspect | None = None,
        resolution: int = 1024,
        num_inference_steps: int | None = None,
        shift: float | None = None,
        guidance_scale: float | None = None,
        negative: Negative = "neither",
        negative_prompt: str = "",
        image_guidance_scale: float = 0.0,
        guidance_normalization: float = 0.0,
        guidance_window: tuple[float, float] = (0.0, 1.0),
        reference_window: tuple[float, float] = (0.0, 1.0),
        seed: int | Sequence[int] = 0,
        scales: Sequence[float] | None = None,
        start_image: Image.Image | None = None,
        strength: float = 1.0,
        batch_size: int | None = None,
    ) -> list[Image.Image]:
        """Pictures of each prompt, all with the same references, in the prompts' order.

        `seed`: one number gives prompt i one picture, from noise seed + i; several give each prompt one from each.
        `batch_size`: pictures sampled together, None = all. `reference_weights`: as for Encoders.encode. `start_image`
        is resized to cover the output and cut at its centre; `strength` is how far the picture goes from it, 1 = all
        the way. `scales`: one for each adapter. The rest is as in a YAML's `sample` section (config.SampleConfig):
        sides left out are those of the aspect, or of the square, at `resolution`; steps, shift and guidance left out
        are the base's own (8, 3 and 0 for Turbo, 50, 6 and 4 for Base), guidance is in diffusers' convention, 0 = off.
        """
        given = {
            "height": height, "width": width, "aspect": aspect, "strength": strength,
            "num_inference_steps": num_inference_steps, "shift": shift, "guidance_scale": guidance_scale,
            "negative": negative, "negative_prompt": negative_prompt,
            "image_guidance_scale": image_guidance_scale, "guidance_normalization": guidance_normalization,
            "guidance_window": guidance_window, "reference_window": reference_window,
            "batch_size": 1 if batch_size is None else batch_size,
        }  # fmt: skip
        wanted = parse(SampleConfig, given, "this call")
        settings = released_or(wanted, self.defaults)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        images = _references(reference)
        if not images and not all(text.strip() for text in prompts):
            raise InputError("the prompt is empty and there is no reference; give one of the two")
        if start_image is None and strength != 1.0:
            raise InputError(f"strength {strength:g} needs a start_image")
        if scales is not None:
            self.model.set_scales(scales)
        codec, sides = self.encoders.codec, size_in(wanted, resolution)
        shape = codec.latent_shape(*sides)
        start = None if start_image is None else codec.encode(fit_target(as_rgb(start_image), Bucket(*sides)))
        pictures = [
            Picture(row=i, seed=each, shape=shape, start=start)
            for i in range(len(prompts))
            for each in ([seed + i] if isinstance(seed, int) else seed)
        ]
        encoded = self.encode(prompts, [images] * len(prompts), reference_weights, negative_prompt)
        together, device = wanted.batch_size if batch_size else max(1, len(pictures)), codec.vae.device
        latents = sample_all(self.model, encoded, pictures, settings, batch_size=together, device=device)
        return [codec.decode(each) for each in latents]


def _references(given: Image.Image | Sequence[Image.Image] | None) -> list[Image.Image]:
    """Pictures in memory as training prepares those of files."""
    images = [as_rgb(image) for image in ([given] if isinstance(given, Image.Image) else given or [])]
    for image in images:
        DataConfig().check_reference(image.size, "the given reference")
    return images


def load_adapter(
    pipeline: Any,
    path: str | Path,
    *,
    vision_language: str | None = None,
    siglip: str | None = None,
    variant: str = "auto",
) -> AdaptedPipeline:
    """Puts an exported adapter list on a diffusers ZImagePipeline and gives the callable that takes references.

    The pipeline's transformer is changed in place. `vision_language`, `siglip`: folder or Hub id of the encoders, by
    default the names that were recorded; `variant`: auto, base or turbo, for default steps and guidance. Raises
    InputError for a base or encoder that does not match, before anything is changed.
    """
    exported = read_adapter(Path(path))
    # Identities ignore LoRA layers, so a second load onto the same transformer must be refused here.
    if any(".lora_" in name for name, _ in pipeline.transformer.named_parameters()):
        raise InputError("this pipeline's transformer already has a LoRA; load the adapter onto a fresh pipeline")
    if any("_hf_hook" in vars(part) for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae)):
        raise InputError(
            "this pipeline moves its models in and out (CPU offload); load the adapter onto one without it"
        )
    dtype, device = pipeline.vae.dtype, pipeline.vae.device
    text = TextEncoder(pipeline.text_encoder, pipeline.tokenizer, exported.encoders.max_sequence_length)
    encoders = Encoders(text, LatentCodec(pipeline.vae))
    check_identity(exported, identities(pipeline.transformer, encoders))
    given = {VISION_LANGUAGE.key: vision_language, SIGLIP.key: siglip}
    needed = models_of(list_reads(exported.adapters))
    encoders.add(needed, lambda key: source_of(exported, key, given.get(key)), exported.encoders, dtype, device)
    check_identity(exported, identities(pipeline.transformer, encoders))
    model = adapt(pipeline.transformer, exported)
    shift = float(pipeline.scheduler.config.shift)
    return AdaptedPipeline(model, encoders, exported.encoders, defaults_for(shift, variant, "this pipeline"))


def source_of(exported: ExportedAdapter, key: str, given: str | None) -> Source:
    recorded = exported.models[key]
    name = given or str(recorded["pretrained_model_name_or_path"])
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    if given is None and not is_id and not (re.fullmatch(r"[\w-][\w.-]*", name) and Path(name).exists()):
        raise InputError(f"{exported.folder} was made with a local {key} named {name}; give its folder as {key}=...")
    return Source(name, None if given else recorded["revision"])
