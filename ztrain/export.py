"""Adapters on disk for others: written as safetensors with an identity, loaded onto a stock diffusers pipeline.

A folder holds adapter_config.json (the list, the encoder settings, the identity of base and encoders, file hashes),
adapter.safetensors and / or the LoRA files, and a model card. `load_adapter` is the way back.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ztrain.adapters import as_saved, build_adapters, describe_list
from ztrain.aspects import size_in
from ztrain.conditioning import Encoded
from ztrain.config import (
    Aspect,
    Config,
    DataConfig,
    EncodersConfig,
    ModelConfig,
    Negative,
    SampleConfig,
    list_reads,
)
from ztrain.encoders import LatentCodec, TextEncoder
from ztrain.errors import InputError
from ztrain.files import read_bytes, sha256_of, whole_folder
from ztrain.images import Bucket, as_rgb, fit_target
from ztrain.model import AdaptedDiT
from ztrain.models import QUANTISED, BaseDefaults, Source, defaults_for, identity, public_name, read_json
from ztrain.sample import Picture, released_or, sample_all
from ztrain.states import SIGLIP, VISION_LANGUAGE, Encoders, all_models, models_of
from ztrain.tensors import read_tensors
from ztrain.version import VERSION
from ztrain.yamls import Strict, parse

CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"
STATISTICS_FILE = "statistics.safetensors"
FORMAT_VERSION = 3
"""1 had no `seal`, 2 had keys of adapters fewer (`as_saved`); both are read as they were."""
_UNSHOWN = re.compile(r"[`\s\x00-\x1f\x7f-\x9f]+")  # would end the code span of a Markdown card

Identities = dict[str, dict[str, str]]
Weights = Mapping[str, Tensor]


def identities(dit: Any, encoders: Encoders) -> Identities:
    """Who base and encoders are, by role. Take it before adapters are attached."""
    return {"transformer": identity(dit)} | encoders.identities


def save_adapter(
    folder: Path,
    model: AdaptedDiT,
    config: Config,
    known: Identities,
    *,
    step: int,
    state: Weights | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Writes every file of the adapter list, in float32 also on a bf16 base: then a reload is bit-exact. state: the
    trained weights, where the model holds parts of them only; origin: what the run started from (`Origin.told`).

    The folder appears whole, in place of an older one. Raises InputError."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder}: holds something else than an adapter; remove it or choose another place")
    with whole_folder(folder, sync=True, replace=True) as building:
        _write_adapter(building, model, config, known, step, state, origin)
    return folder


def _write_adapter(
    folder: Path,
    model: AdaptedDiT,
    config: Config,
    known: Identities,
    step: int,
    state: Weights | None,
    origin: Mapping[str, Any] | None,
) -> None:
    tensors: dict[str, dict[str, Tensor]] = {}
    metadata: dict[str, dict[str, str]] = {}
    exported = []
    for index, adapter in enumerate(model.adapters):
        exported.append(adapter.exported_config())
        weights = model.adapter_weights(index, state)
        for name, file in (adapter.export(weights) if weights else {}).items():
            tensors.setdefault(name, {}).update(file.tensors)
            metadata.setdefault(name, {}).update(file.metadata)
    copied = {STATISTICS_FILE for entry in exported if entry.get("statistics_file")}
    for entry, adapter in zip(exported, model.adapters, strict=True):
        if statistics := adapter.config.statistics_path:
            (folder / STATISTICS_FILE).write_bytes(Path(statistics).read_bytes())
            entry["statistics_file"] = STATISTICS_FILE
    for name, content in tensors.items():
        kept = {key: _in_dtype(tensor.detach().cpu(), config.export.dtype) for key, tensor in content.items()}
        told = {"ztrain.version": VERSION, "ztrain.step": str(step)} | metadata[name]
        save_file(kept, folder / name, metadata=told)
        _sort_header(folder / name)
    models = config.models
    document = {
        "format_version": FORMAT_VERSION,
        "ztrain_version": VERSION,
        "adapters": exported,
        "encoders": config.encoders.model_dump(mode="json"),
        "models": {key: _public(getattr(models, key)) for key in dict.fromkeys(model.key for model in all_models())},
        "identity": known,
        "files": {name: sha256_of(folder / name) for name in sorted([*tensors, *copied])},
        "step": step,
        **({} if origin is None else {"init_from": dict(origin)}),
    }
    (folder / CARD_FILE).write_text(_model_card(config, document), encoding="utf-8")
    (folder / CONFIG_FILE).write_text(sealed(document), encoding="utf-8")


def sealed(document: dict[str, Any]) -> str:
    """The text of a document with the SHA-256 of all the rest in it."""
    text = json.dumps({**document, "seal": ""}, indent=2, sort_keys=True) + "\n"
    return text.replace(_SEAL % "", _SEAL % _seal(text), 1)


_SEAL = '\n  "seal": "%s"'


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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


def quoted(text: str) -> str:
    """A name as a literal of Python in one line: what is in it is no code."""
    return json.dumps(text, ensure_ascii=False)


def _model_card(config: Config, document: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    base = document["models"]["base"]["pretrained_model_name_or_path"]
    kinds = describe_list(config.adapters)
    data = ModelCardData(
        # A local folder's name is no Hub id, and the Hub refuses cards that point to none.
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base, re.ASCII) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["z-image", "ztrain", *(adapter.kind for adapter in config.adapters)],
    )
    lora = "Stock diffusers reads the LoRA alone with `pipe.load_lora_weights(folder)`.\n"
    example = (
        "```python\nimport torch\nimport ztrain\nfrom diffusers import ZImagePipeline\n\n"
        f'pipe = ZImagePipeline.from_pretrained({quoted(base)}, torch_dtype=torch.bfloat16).to("cuda")\n'
        "adapted = ztrain.load_adapter(pipe, folder)\nimages = adapted(prompt, reference)\n```\n\n"
    )
    began = ""
    if (origin := document.get("init_from")) is not None:
        began = (
            f" Its {', '.join(origin['adapters'])} began with the weights of `{_UNSHOWN.sub(' ', origin['name'])}` at"
            f" step {origin['step']}."
        )
    return (
        f"---\n{data.to_yaml()}\n---\n\n# ztrain adapter `{kinds}`\n\n"
        f"Reference-image adapter for `{_UNSHOWN.sub(' ', base)}`, trained for {document['step']} steps with ztrain"
        f" {document['ztrain_version']}.{began}\n\n{example}" + (lora if "lora" in kinds else "")
    )


class _Part(Strict, extra="allow"):
    """What a reader needs; a later version may write more."""


class _Hashes(_Part):
    config: str
    weights: str


class _Models(_Part):
    base: ModelConfig
    vision_language: ModelConfig
    siglip: ModelConfig


class _Document(_Part):
    """adapter_config.json. What `adapters` and `encoders` hold is checked as a config's."""

    adapters: list[dict[str, Any]]
    encoders: dict[str, Any]
    identity: dict[str, _Hashes]
    models: _Models
    files: dict[str, str]
    step: int


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
    """Reads a folder of `save_adapter`; its files must be the ones that were written.

    Raises InputError naming the file, and the key where there is one.
    """
    path = folder / CONFIG_FILE
    document = _read_document(path)
    for entry in document["adapters"]:
        if entry.get("init_file") is not None:
            raise InputError(f"{path}: init_file names weights from elsewhere, which no export does")
        if isinstance(statistics := entry.get("statistics_file"), str):  # else the adapter's settings refuse it
            _check_name(statistics, path)
            entry["statistics_file"] = str(folder / statistics)
    told = {"adapters": [as_saved(entry) for entry in document["adapters"]], "encoders": document["encoders"]}
    settings = parse(Config, told, str(path))
    files = {name: _read_tensors(folder, name, expected) for name, expected in document["files"].items()}
    known, models = document["identity"], document["models"]
    return ExportedAdapter(folder, settings.adapters, settings.encoders, known, models, files, document["step"])


def _read_document(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path.parent} is no exported adapter: {CONFIG_FILE} is missing")
    document = read_json(path)
    if (version := document.get("format_version")) not in (1, 2, FORMAT_VERSION):
        raise InputError(f"{path}: format_version {version!r:.40} is not {FORMAT_VERSION}; update ztrain")
    seal = str(document.get("seal"))
    written = read_bytes(path, "json").decode(errors="replace")
    if version != 1 and _seal(written.replace(_SEAL % seal, _SEAL % "", 1)) != seal:
        raise InputError(f"{path} {_CHANGED}")
    parse(_Document, document, str(path))
    return document


_CHANGED = (
    "was changed after the export, or damaged; copy it again. If you changed it on purpose: set format_version to 1 in"
    f" {CONFIG_FILE}, and under files the SHA-256 of the file"
)


def _check_name(name: str, path: Path) -> None:
    """Refuses what a hostile document would read from elsewhere."""
    if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
        raise InputError(
            f"{path}: {name[:80]!r} is not the name of a safetensors file beside it; export the adapter again"
        )


def _read_tensors(folder: Path, name: str, expected: str) -> dict[str, Tensor]:
    """A file's tensors; `expected`: its SHA-256."""
    _check_name(name, folder / CONFIG_FILE)
    tensors = read_tensors(folder / name, "export the adapter again")
    if sha256_of(folder / name) != expected:
        raise InputError(f"{folder / name} {_CHANGED}")
    return tensors


def check_identity(exported: ExportedAdapter, found: Identities) -> None:
    """Refuses a base or an encoder other than the one the adapter was trained with.

    Of a quantised base only the config can be compared; that is printed.
    """
    for role, expected in exported.identity.items():
        if role not in found or found[role] == expected:
            continue
        part = "config" if found[role]["config"] != expected["config"] else "weights"
        if part == "weights" and found[role][part] == QUANTISED:
            name = exported.models["base"]["pretrained_model_name_or_path"]
            print(
                f"{role}: its weights are quantised, so only its config was compared with that of {name}, which"
                f" {exported.folder.name} was trained on; make sure that the file was made from it",
                flush=True,
            )
            continue
        raise another_model(exported.folder, role, expected, found[role])


def another_model(folder: Path, role: str, expected: Mapping[str, str], found: Mapping[str, str]) -> InputError:
    """The sentence for weights that were trained beside another model than the one found."""
    part = "config" if found["config"] != expected["config"] else "weights"
    return InputError(
        f"{folder}: made for another {role}: its {part} hash is {expected[part]},"
        f" this one's is {found[part]}; load the model it was trained on"
    )


def adapt(dit: Any, exported: ExportedAdapter) -> AdaptedDiT:
    """The transformer with the exported adapters and their weights."""
    model = AdaptedDiT(dit, build_adapters(exported.adapters))
    load_weights(model, exported)
    return model.eval()


def load_weights(model: AdaptedDiT, exported: ExportedAdapter) -> None:
    """Into a model with the same list; every key on either side is used. Raises InputError."""
    for index, adapter in enumerate(model.adapters):
        model.load_adapter_weights(index, adapter.read(exported.files), str(exported.folder))


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
    encoders.add(needed, lambda key: _source(exported, key, given.get(key)), exported.encoders, dtype, device)
    check_identity(exported, identities(pipeline.transformer, encoders))
    model = adapt(pipeline.transformer, exported)
    shift = float(pipeline.scheduler.config.shift)
    return AdaptedPipeline(model, encoders, exported.encoders, defaults_for(shift, variant, "this pipeline"))


def _source(exported: ExportedAdapter, key: str, given: str | None) -> Source:
    recorded = exported.models[key]
    name = given or str(recorded["pretrained_model_name_or_path"])
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    if given is None and not is_id and not (re.fullmatch(r"[\w-][\w.-]*", name) and Path(name).exists()):
        raise InputError(f"{exported.folder} was made with a local {key} named {name}; give its folder as {key}=...")
    return Source(name, None if given else recorded["revision"])
