"""Where the released models come from: a local folder or a Hub id, in the layout of the real repositories.

Also the only place where a library loads what others made (`pretrained`): models, configs, tokenizers, processors and
pipelines, always from a folder on this machine whose files were looked at first. No code of a repository is run and
nobody is asked whether it may; weights are read from safetensors alone, since other formats can hold code.
And what a checkpoint says about itself: the sampling defaults of Base and Turbo, and an identity that an exported
adapter records and a load compares.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ztrain.config import ModelConfig, ModelsConfig
from ztrain.errors import InputError
from ztrain.io.files import as_text, check_regular, expand, read_bytes
from ztrain.io.gguf import is_quantised
from ztrain.io.tensors import check_whole

PARTS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""What is read of a repository: settings, weights, chat template, vocabulary in any of its forms."""


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
        path = Path(expand(self.location))
        named_as_path = path.is_absolute() or self.location.startswith(".") or self.location.count("/") != 1
        return path if os.path.exists(path) or named_as_path else None  # unlike Path.exists, also for names too long

    def require(self, file: str, *, what: str) -> None:
        """Refuses a local folder that lacks the file that makes it such a model."""
        if self.folder is None:
            return
        if not self.folder.is_dir():
            raise InputError(f"{self.location} is no folder; give a folder or a Hub id of {what}")
        if not (self.folder / file).exists():
            raise InputError(f"{self.location} is not {what}: {file} is missing")

    def file(self, name: str) -> Path:
        """The local path of one file of the repository, downloaded if need be."""
        if self.folder is not None:
            return self.folder / name
        with explained(self.location):
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

        with explained(self.location):
            return Path(snapshot_download(self.location, revision=self.revision, allow_patterns=list(patterns)))

    def part(self, subfolder: str, *, what: str) -> Path:
        """The folder of one part of the repository, downloaded if need be. Raises InputError where there is none."""
        folder = self.local(*(f"{subfolder}/{pattern}" for pattern in PARTS)) / subfolder
        if not folder.is_dir():
            raise InputError(f"{self.location} is not {what}: its folder {subfolder} is missing")
        return folder

    def pipeline(self) -> Path:
        """The folder of a diffusers pipeline with all its parts, downloaded if need be."""
        if self.folder is not None:
            return self.folder
        from diffusers import DiffusionPipeline

        with explained(self.location):
            return Path(
                DiffusionPipeline.download(
                    self.location, revision=self.revision, use_safetensors=True, trust_remote_code=False
                )
            )

    def has(self, name: str) -> bool:
        """Whether the repository holds the file; offline, whether it was downloaded."""
        if self.folder is not None:
            return (self.folder / name).is_file()
        from huggingface_hub.errors import EntryNotFoundError

        with explained(self.location):
            try:
                return self._download(name).is_file()
            except EntryNotFoundError:
                return False


# The one door ---------------------------------------------------------------------------------------------------------


def pretrained(kind: Any, folder: Path, **settings: Any) -> Any:
    """What `kind.from_pretrained` gives of a folder: the only call of it.

    Raises InputError for a damaged file, for settings that reach outside the folder, and for a model that only code of
    its own could make; one that brings code and whose class the library has is that class.
    """
    code = check_settings(folder)
    if kind.__module__.startswith("transformers.models.auto"):  # the classes that would ask
        settings["trust_remote_code"] = False
    with explained(str(folder), code), _without_questions():
        return kind.from_pretrained(folder, **settings)


@contextmanager
def _without_questions() -> Iterator[None]:
    """Where a library's class loads another one, which is not told that code is not trusted, nobody is asked either."""
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds; at 0 it raises
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def pretrained_model(kind: Any, folder: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A model of a folder and what its loader says of its keys (see `require_loaded`). Raises InputError."""
    check_weights(folder)
    found: tuple[Any, dict[str, Any]] = pretrained(
        kind, folder, use_safetensors=True, output_loading_info=True, **settings
    )
    return found


def pretrained_tokenizer(folder: Path, kind: Any = None) -> Any:
    """A folder's tokenizer, of the class that it names unless one is given. Raises InputError.

    Without a vocabulary some classes make an empty one, and every word becomes unknown.
    """
    from transformers import AutoTokenizer

    if not has_vocabulary(folder):
        raise InputError(f"{folder}: has no tokenizer.json, nor vocab.json with merges.txt; fetch the tokenizer again")
    return pretrained(kind or AutoTokenizer, folder)


def pretrained_processor(folder: Path, kind: Any, **settings: Any) -> Any:
    """What makes a model's inputs out of pictures. Raises InputError."""
    if not any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        raise InputError(f"{folder}: has no preprocessor_config.json; fetch it again")
    return pretrained(kind, folder, **settings)


_VOCABULARIES = (
    ("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",), ("spiece.model",), ("vocab.txt",)
)  # fmt: skip


def has_vocabulary(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model or an adapter. Raises InputError."""
    try:
        document = json.loads(read_bytes(path, "json"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; fetch it again") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # bad JSON or UTF-8, numbers of thousands of digits, absurd nesting
        raise InputError(f"{path} is damaged: {str(error)[:100]}; fetch it again") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(document).__name__}; fetch it again")
    level: list[Any] = [document]
    for _ in range(_DEEPEST):
        values = (value for each in level for value in (each.values() if isinstance(each, dict) else each))
        level = [value for value in values if isinstance(value, (dict, list))]
    if level:
        raise InputError(f"{path} is damaged: it is nested more than {_DEEPEST} deep; fetch it again")
    return document


_DEEPEST = 64


_READ = ("config.json", "tokenizer.json", "index.json", "vocab.json", "tokens.json", "tokens_map.json", "template.json")
_ATTENTION = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_settings(folder: Path) -> str | None:
    """Looks at the files that a library would read of a folder, weights apart.

    Gives the name of the first that names code of the repository's own. Raises InputError for a damaged one, and for
    settings by which a library would fetch code or weights from elsewhere.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: holds an adapter_config.json, which names another model; merge the adapter into this model, or"
            " remove that file"
        )
    code = None
    for path in sorted(path for path in folder.iterdir() if path.name.endswith(_READ)):
        document = read_json(path)
        if document.get("auto_map") or "custom_pipeline" in document:
            code = code or path.name
        if "transformers_weights" in document:
            raise InputError(f"{path}: transformers_weights names other weights; remove the key")
        for name, value in _inside(document):
            if name in _ATTENTION and "/" in str(value):
                raise InputError(f"{path}: {name} {str(value)[:80]!r} is code to be fetched; remove the key")
    for path in folder.iterdir():
        if path.suffix in (".jinja", ".txt", ".model"):
            check_regular(path)
    return code


def _inside(document: Any) -> Iterator[tuple[str, Any]]:
    """All pairs of a JSON document. Vocabularies are left out: their pairs are words and numbers."""
    waiting = [document]
    while waiting:
        for name, value in waiting.pop().items():
            yield name, value
            if isinstance(value, dict) and name not in ("vocab", "model", "weight_map"):
                waiting.append(value)


def check_weights(folder: Path) -> list[Path]:
    """The safetensors files that a library reads of a folder: each is there and whole. Raises InputError."""
    found: list[Path] = []
    for stem in ("model", "diffusion_pytorch_model"):
        if (whole := folder / f"{stem}.safetensors").exists():
            found.append(whole)
        if (index := folder / f"{stem}.safetensors.index.json").exists():
            found += sorted({folder / name for name in weight_map(index).values()})
    if not found:
        raise InputError(f"{folder.name}: has no safetensors; convert its weights, other formats can hold code")
    for path in found:
        check_whole(path)
    return found


def weight_map(index: Path) -> dict[str, str]:
    """File name by tensor, of a model whose weights are in several files. Raises InputError."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: weight_map must name a file for each tensor; fetch it again")
    for name in set(names.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: {name[:80]!r} is no safetensors file beside it; fetch the model again")
    return names


class explained:
    """Turns what loaders raise about a broken or unreachable repository into one sentence.

    code: the file that names code of the repository's own, if any.
    """

    def __init__(self, name: str, code: str | None = None) -> None:
        self.name, self.code = name, code

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        from huggingface_hub.errors import StrictDataclassError

        broken = (
            OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError, ImportError,
            RuntimeError, SafetensorError, StrictDataclassError,
        )  # fmt: skip
        if isinstance(error, (InputError, torch.OutOfMemoryError)):
            return
        if self.code and isinstance(error, ValueError) and re.search("custom code|recognize|nrecognized", str(error)):
            raise InputError(
                f"{self.name}: {self.code} names code of its own, which is never run, and the library has no class for"
                " such a model; give one that has"
            ) from error
        if isinstance(error, broken) or kind is Exception:  # the tokenizers library raises Exception itself
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"cannot load {self.name}: {reason[:300]}") from error


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
    part, info = pretrained_model(kind, source.part(subfolder, what="a Z-Image model"), **precision)
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
    scheduler = read_json(source.file("scheduler/scheduler_config.json"))
    if scheduler.get("use_dynamic_shifting"):
        raise InputError(f"{source.location}: use_dynamic_shifting schedulers are not Z-Image's; set it to false")
    with explained(f"{source.location}/scheduler"):
        shift = float(scheduler.get("shift", 1.0))
    return defaults_for(shift, models.variant, source.location)


TRANSFORMER_KEYS = (
    "in_channels dim n_layers n_refiner_layers n_heads norm_eps cap_feat_dim siglip_feat_dim rope_theta t_scale"
    " axes_dims axes_lens"
)
"""Settings that decide how its weights are used: named because libraries add fields between versions."""

_SAMPLED_ELEMENTS = 64

QUANTISED = "quantised"
"""In the place of the weights' hash where they are stored in fewer bits than they were trained in."""


def identity(module: nn.Module, *, keys: str = TRANSFORMER_KEYS) -> dict[str, str]:
    """Hashes that tell checkpoints apart: `config` of the settings that matter (`keys`), `weights` of the weights.

    The weights hash covers every tensor's name and shape and 64 of its elements rounded to bfloat16, so that it costs
    nothing, and a model has the same one whether it was loaded in float32 or bfloat16. Adapters inside are ignored.
    Quantised weights are others: their hash is QUANTISED.
    """
    stored = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    stored |= stored.get("rope_parameters") or {}
    settings = {key: stored.get(key) for key in keys.split()}
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


def places_of(models: ModelsConfig) -> Callable[[str], Source]:
    """Where each model lies, by its key."""
    return lambda key: Source.of(getattr(models, key))


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
