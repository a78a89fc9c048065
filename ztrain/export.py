"""Adapters on disk for others: written as safetensors with an identity, loaded onto a stock diffusers pipeline.

A folder holds adapter_config.json (the list, the encoder settings, the identity of base and encoders, file hashes),
adapter.safetensors and / or the LoRA files, and a model card. `load_adapter` is the way back.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ztrain.adapters import build_adapters, describe_list
from ztrain.conditioning import Encoded
from ztrain.config import Config, DataConfig, EncodersConfig, ModelConfig, list_reads, parse
from ztrain.encoders import Encoders, LatentCodec, SiglipEncoder, TextEncoder
from ztrain.errors import InputError
from ztrain.flow import sampler_noise
from ztrain.images import as_rgb, check_reference
from ztrain.model import AdaptedDiT
from ztrain.models import BaseDefaults, Source, defaults_for, identity, public_name
from ztrain.sample import SampleSettings, sample
from ztrain.version import VERSION
from ztrain.vision_language import SplicedModel

CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"
STATISTICS_FILE = "statistics.safetensors"
FORMAT_VERSION = 1

Identities = dict[str, dict[str, str]]


def identities(dit: Any, encoders: Encoders) -> Identities:
    """Who base and encoders are, by role. Take it before adapters are attached."""
    return {"transformer": identity(dit, "transformer")} | encoder_identities(encoders)


def encoder_identities(encoders: Encoders) -> Identities:
    """The same of the loaded encoders alone."""
    parts = {"vae": encoders.codec.vae, "text_encoder": encoders.text.model}
    if encoders.spliced is not None:
        parts["vision_language"] = encoders.spliced.model.visual
    if encoders.siglip is not None:
        parts["siglip"] = encoders.siglip.model
    return {role: identity(module, role) for role, module in parts.items()}


def save_adapter(folder: Path, model: AdaptedDiT, config: Config, known: Identities, *, step: int) -> Path:
    """Writes every file of the adapter list. Weights are float32, also on a bf16 base: in that dtype a reload is
    bit-exact."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, dict[str, Tensor]] = {}
    metadata: dict[str, dict[str, str]] = {}
    exported = []
    for index, adapter in enumerate(model.adapters):
        exported.append(adapter.exported_config())
        weights = model.adapter_weights(index)
        for name, file in (adapter.export(weights) if weights else {}).items():
            tensors.setdefault(name, {}).update(file.tensors)
            metadata.setdefault(name, {}).update(file.metadata)
    copied = {STATISTICS_FILE for entry in exported if entry.get("statistics_file")}
    for entry in exported:
        if statistics := entry.get("statistics_file"):
            (folder / STATISTICS_FILE).write_bytes(Path(statistics).read_bytes())
            entry["statistics_file"] = STATISTICS_FILE
    for name, content in tensors.items():
        kept = {key: _in_dtype(tensor.detach().cpu(), config.export.dtype) for key, tensor in content.items()}
        save_file(
            kept,
            folder / name,
            metadata={"ztrain.version": VERSION, "ztrain.step": str(step)} | metadata[name],
        )
        _sort_header(folder / name)
    models = config.models
    document = {
        "format_version": FORMAT_VERSION,
        "ztrain_version": VERSION,
        "adapters": exported,
        "encoders": config.encoders.model_dump(mode="json"),
        "models": {role: _public(getattr(models, role)) for role in ("base", "vision_language", "siglip")},
        "identity": known,
        "files": {name: _sha256(folder / name) for name in sorted([*tensors, *copied])},
        "step": step,
    }
    (folder / CARD_FILE).write_text(_model_card(config, document), encoding="utf-8")
    # Last: a folder without it is no adapter, so an interrupted export is never half-loaded.
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _in_dtype(tensor: Tensor, dtype: str) -> Tensor:
    """Weights in the exported dtype; a single number, a LoRA's alpha, stays exact."""
    return (tensor.to(getattr(torch, dtype)) if tensor.ndim else tensor).contiguous()


def _sort_header(path: Path) -> None:
    """Orders the keys of a safetensors header in place: safetensors writes its metadata in random order, so that the
    same weights would give other bytes every time. Layout: 8 bytes of length, JSON padded with spaces, tensors."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(ordered) <= length, "the header was not written as compact JSON"
        file.seek(8)
        file.write(ordered.ljust(length))


def _public(model: ModelConfig) -> dict[str, str | None]:
    return {
        "pretrained_model_name_or_path": public_name(model.pretrained_model_name_or_path),
        "revision": model.revision,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model_card(config: Config, document: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    base = document["models"]["base"]["pretrained_model_name_or_path"]
    kinds = describe_list(config.adapters)
    data = ModelCardData(
        # A local folder's name is no Hub id, and the Hub refuses cards that point to none.
        base_model=base if "/" in base else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["z-image", "ztrain", *(adapter.kind for adapter in config.adapters)],
    )
    lora = "Stock diffusers reads the LoRA alone with `pipe.load_lora_weights(folder)`.\n"
    example = (
        "```python\nimport torch\nimport ztrain\nfrom diffusers import ZImagePipeline\n\n"
        f'pipe = ZImagePipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")\n'
        "adapted = ztrain.load_adapter(pipe, folder)\nimages = adapted(prompt, reference)\n```\n\n"
    )
    return (
        f"---\n{data.to_yaml()}\n---\n\n# ztrain adapter `{kinds}`\n\n"
        f"Reference-image adapter for `{base}`, trained for {document['step']} steps with ztrain"
        f" {document['ztrain_version']}.\n\n{example}" + (lora if "lora" in kinds else "")
    )


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """A read adapter folder."""

    folder: Path
    adapters: list[Any]
    encoders: EncodersConfig
    identity: Identities
    models: dict[str, dict[str, str | None]]
    files: dict[str, dict[str, Tensor]]
    step: int
    """Optimizer steps that it was trained for."""


def read_adapter(folder: Path) -> ExportedAdapter:
    """Reads a folder of `save_adapter`; its files must be the ones that were written."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{folder} is no exported adapter: {CONFIG_FILE} is missing")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if document.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {document.get('format_version')} is not {FORMAT_VERSION}; update ztrain"
        )
    for entry in document["adapters"]:
        if statistics := entry.get("statistics_file"):
            entry["statistics_file"] = str(folder / statistics)
    settings = parse(Config, {key: document[key] for key in ("adapters", "encoders")}, str(path))
    files = {}
    for name, expected in document["files"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != expected:
            raise InputError(f"{folder / name} is missing or is not the file that was exported")
        with safe_open(folder / name, framework="pt") as file:
            files[name] = {key: file.get_tensor(key) for key in file.keys()}
    return ExportedAdapter(
        folder,
        settings.adapters,
        settings.encoders,
        document["identity"],
        document["models"],
        files,
        document["step"],
    )


def check_identity(exported: ExportedAdapter, found: Identities) -> None:
    """Refuses a base or an encoder other than the one the adapter was trained with."""
    for role, expected in exported.identity.items():
        if role in found and found[role] != expected:
            part = "config" if found[role]["config"] != expected["config"] else "weights"
            raise InputError(
                f"{exported.folder}: made for another {role}: its {part} hash is {expected[part]},"
                f" this one's is {found[role][part]}; load the model it was trained on"
            )


def adapt(dit: Any, exported: ExportedAdapter) -> AdaptedDiT:
    """The transformer with the exported adapters and their weights; every key on either side is used."""
    model = AdaptedDiT(dit, build_adapters(exported.adapters))
    for index, adapter in enumerate(model.adapters):
        model.load_adapter_weights(index, adapter.read(exported.files), str(exported.folder))
    return model.eval()


class AdaptedPipeline:
    """A stock pipeline's models with adapters: prompts and reference images in, pictures out."""

    def __init__(self, model: AdaptedDiT, encoders: Encoders, settings: EncodersConfig, defaults: BaseDefaults) -> None:
        self.model, self.encoders, self.settings, self.defaults = model, encoders, settings, defaults
        self.reads = list_reads([adapter.config for adapter in model.adapters])

    def encode(self, prompts: Sequence[str], references: Sequence[Sequence[Image.Image]]) -> Encoded:
        return self.encoders.encode(prompts, references, self.reads, self.settings)

    def __call__(
        self,
        prompt: str | Sequence[str],
        reference: Image.Image | Sequence[Image.Image] | None = None,
        *,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float = 0.0,
        seed: int = 0,
        scales: Sequence[float] | None = None,
    ) -> list[Image.Image]:
        """One image for each prompt, all with the same references; sides in multiples of 16.

        Steps and guidance left out are the base's own (8 and 0 for Turbo, 50 and 4 for Base). Guidance is in diffusers'
        convention, 0 = off; `scales`: one for each adapter.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        given = [reference] if isinstance(reference, Image.Image) else list(reference or [])
        images = [as_rgb(image) for image in given]
        limits = DataConfig()
        for image in images:
            check_reference(
                image.size,
                "the given reference",
                min_side=limits.reference_min_side,
                max_aspect=limits.reference_max_aspect,
            )
        if not images and not all(text.strip() for text in prompts):
            raise InputError("the prompt is empty and there is no reference; give one of the two")
        if scales is not None:
            self.model.set_scales(scales)
        shape = self.encoders.codec.latent_shape(height, width)
        device = self.encoders.codec.vae.device
        noise = [sampler_noise(seed + i, shape).to(device) for i in range(len(prompts))]
        settings = SampleSettings(
            num_inference_steps=self.defaults.num_inference_steps
            if num_inference_steps is None
            else num_inference_steps,
            shift=self.defaults.shift,
            guidance_scale=self.defaults.guidance_scale if guidance_scale is None else guidance_scale,
            image_guidance_scale=image_guidance_scale,
        )
        encoded = self.encode(prompts, [images] * len(prompts))
        return [self.encoders.codec.decode(x) for x in sample(self.model, encoded, noise, settings)]


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
    reads = list_reads(exported.adapters)
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
    if reads & {"reference", "fused"}:
        encoders.spliced = SplicedModel(
            _source(exported, "vision_language", vision_language), text.model, text.tokenizer
        )
    if "siglip" in reads:
        encoders.siglip = SiglipEncoder(_source(exported, "siglip", siglip), dtype, device)
    check_identity(exported, identities(pipeline.transformer, encoders))
    model = adapt(pipeline.transformer, exported)
    shift = float(pipeline.scheduler.config.shift)
    return AdaptedPipeline(model, encoders, exported.encoders, defaults_for(shift, variant, "this pipeline"))


def _source(exported: ExportedAdapter, role: str, given: str | None) -> Source:
    recorded = exported.models[role]
    name = given or str(recorded["pretrained_model_name_or_path"])
    if "/" not in name and not Path(name).exists():
        raise InputError(f"{exported.folder} was made with a local {role} named {name}; give its folder as {role}=...")
    return Source(name, None if given else recorded["revision"])
