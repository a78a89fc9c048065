"""Where the released models come from: a local folder or a Hub id, in the layout of the real repositories.

Also what a checkpoint says about itself: the sampling defaults of Base and Turbo, and an identity that an exported
adapter records and a load compares.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ztrain.config import ModelConfig, ModelsConfig
from ztrain.errors import InputError
from ztrain.files import as_text
from ztrain.quantised import is_quantised


@dataclass(frozen=True, slots=True)
class Source:
    """A model repository: `location` is a folder or a Hub id, `revision` a branch, tag or commit of the latter."""

    location: str
    revision: str | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> "Source":
        return cls(config.pretrained_model_name_or_path, config.revision)

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a Hub id."""
        path = Path(self.location)
        named_as_path = path.is_absolute() or self.location.startswith(".") or self.location.count("/") != 1
        return path if os.path.exists(path) or named_as_path else None  # unlike Path.exists, also for names too long

    def require(self, file: str, *, what: str) -> None:
        """Refuses a local folder that lacks the file that makes it such a model."""
        if self.folder is None:
            return
        if not self.folder.is_dir():
            raise InputError(f"{self.location} is no folder; give a folder or a Hub id of {what}")
        if not (self.folder / file).is_file():
            raise InputError(f"{self.location} is not {what}: {file} is missing")

    def file(self, name: str) -> Path:
        """The local path of one file of the repository, downloaded if need be."""
        if self.folder is not None:
            return self.folder / name
        with self.explained():
            return self._download(name)

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.location, name, revision=self.revision))

    def files(self, *patterns: str) -> list[Path]:
        """Local paths of all files that match glob patterns below the repository's root, downloaded if need be."""
        root = self.local(*patterns)
        return sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})

    def local(self, *patterns: str) -> Path:
        """The repository's folder on this machine, with the files that match glob patterns downloaded if need be."""
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        with self.explained():
            return Path(snapshot_download(self.location, revision=self.revision, allow_patterns=list(patterns)))

    def has(self, name: str) -> bool:
        """Whether the repository holds the file; offline, whether it was downloaded."""
        if self.folder is not None:
            return (self.folder / name).is_file()
        from huggingface_hub.errors import EntryNotFoundError

        with self.explained():
            try:
                return self._download(name).is_file()
            except EntryNotFoundError:
                return False

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turns what loaders raise about a broken or unreachable repository into one sentence."""
        try:
            yield
        except (OSError, KeyError, json.JSONDecodeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"cannot load {self.location}: {reason}") from error


def require_loaded(info: dict[str, Any], where: str) -> None:
    """Compares the key sets after a load: a loader fills missing weights with random ones and only logs it."""
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(key):
            raise InputError(f"{where}: {len(info[key])} {key.replace('_', ' ')}, for example {sorted(info[key])[0]}")


def load_part(kind: Any, source: Source, subfolder: str, device: torch.device | str, **precision: torch.dtype) -> Any:
    """One frozen model of a Z-Image repository, in eval mode, every weight accounted for.

    `kind`: the diffusers or transformers class; `precision`: its own word for the dtype, torch_dtype or dtype.
    """
    source.require(f"{subfolder}/config.json", what="a Z-Image model")
    with source.explained():
        part, info = kind.from_pretrained(
            source.location,
            subfolder=subfolder,
            revision=source.revision,
            output_loading_info=True,
            use_safetensors=True,
            **precision,
        )
    require_loaded(info, f"{source.location}/{subfolder}")
    return part.to(device).eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class BaseDefaults:
    """How a checkpoint was released to be sampled: `guidance_scale` in diffusers' convention, 0 = off."""

    variant: str
    shift: float
    num_inference_steps: int
    guidance_scale: float


# Steps and guidance of the released model cards (Tongyi-MAI/Z-Image-Turbo, Tongyi-MAI/Z-Image); the scheduler
# config only says the shift.
_STEPS_AND_GUIDANCE = {"turbo": (8, 0.0), "base": (50, 4.0)}
_VARIANT_OF_SHIFT = {3.0: "turbo", 6.0: "base"}


def defaults_for(shift: float, variant: str, where: str) -> BaseDefaults:
    """Steps and guidance of a variant; auto tells it by the scheduler's shift."""
    if variant == "auto":
        if shift not in _VARIANT_OF_SHIFT:
            raise InputError(f"{where}: scheduler shift {shift} is neither Turbo's 3 nor Base's 6; set models.variant")
        variant = _VARIANT_OF_SHIFT[shift]
    steps, guidance = _STEPS_AND_GUIDANCE[variant]
    return BaseDefaults(variant, shift, steps, guidance)


def base_defaults(models: ModelsConfig) -> BaseDefaults:
    """Shift from scheduler_config.json; steps and guidance by models.variant."""
    source = Source.of(models.base)
    source.require("scheduler/scheduler_config.json", what="a Z-Image model")
    with source.explained():
        scheduler = json.loads(source.file("scheduler/scheduler_config.json").read_text())
    if scheduler.get("use_dynamic_shifting"):
        raise InputError(f"{source.location}: use_dynamic_shifting schedulers are not Z-Image's; set it to false")
    return defaults_for(float(scheduler.get("shift", 1.0)), models.variant, source.location)


# What decides how a model's weights are used, by role: named here because libraries add fields between versions.
_IDENTITY_KEYS = {
    "transformer": (
        "in_channels dim n_layers n_refiner_layers n_heads norm_eps cap_feat_dim siglip_feat_dim rope_theta t_scale"
        " axes_dims axes_lens"
    ),
    "vae": "latent_channels block_out_channels scaling_factor shift_factor",
    "text_encoder": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps",
    "vision_language": "depth hidden_size out_hidden_size patch_size spatial_merge_size deepstack_visual_indexes",
    "siglip": "hidden_size num_hidden_layers num_attention_heads patch_size",
}

_SAMPLED_ELEMENTS = 64

QUANTISED = "quantised"
"""In the place of the weights' hash where they are stored in fewer bits than they were trained in."""


def identity(module: nn.Module, role: str) -> dict[str, str]:
    """Hashes that tell checkpoints apart: `config` of the settings that matter, `weights` of the weights.

    The weights hash covers every tensor's name and shape and 64 of its elements rounded to bfloat16, so that it costs
    nothing, and a model has the same one whether it was loaded in float32 or bfloat16. Adapters inside are ignored.
    Quantised weights are others: their hash is QUANTISED.
    """
    stored = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    settings = {key: stored.get(key) for key in _IDENTITY_KEYS[role].split()}
    if role == "text_encoder":
        settings["rope_theta"] = stored["rope_parameters"]["rope_theta"]
    config_hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if is_quantised(module):
        return {"config": config_hash[:16], "weights": QUANTISED}
    digest = hashlib.sha256()
    for name, parameter in sorted(_base_parameters(module).items()):
        flat = parameter.detach().flatten()
        sampled = flat[:: max(1, len(flat) // _SAMPLED_ELEMENTS)][:_SAMPLED_ELEMENTS]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sampled.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return {"config": config_hash[:16], "weights": digest.hexdigest()[:16]}


def check_trainable(models: ModelsConfig) -> None:
    """Refuses to train on quantised weights."""
    if models.transformer_file is not None:
        raise InputError(
            f"models.transformer_file {public_name(models.transformer_file)} is for sampling and comparing; training "
            "needs the base's own weights: leave it out"
        )


def _base_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    parameters = {n.replace(".base_layer.", "."): p for n, p in module.named_parameters() if ".lora_" not in n}
    return parameters


def base_dtype(mixed_precision: str) -> torch.dtype:
    """The dtype of frozen models under `train.mixed_precision`."""
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def public_name(location: str) -> str:
    """A repository's name without the path of this machine: Hub ids as they are, folders by their last part."""
    path = location.replace("\0", "")
    return as_text(location if Source(location).folder is None else os.path.basename(os.path.realpath(path)))
