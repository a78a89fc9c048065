"""Adapters on disk for others: written as safetensors with an identity, read back whole or refused by a sentence.

A folder holds adapter_config.json (the list, the encoder settings, the identity of base and encoders, file hashes),
adapter.safetensors and / or the LoRA files, and a model card. `load_adapter` (sampling/pipeline.py) is the way back.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ztrain.adapters import as_saved, build_adapters, describe_list
from ztrain.config import (
    Config,
    EncodersConfig,
    ModelConfig,
)
from ztrain.errors import InputError
from ztrain.frozen.sources import QUANTISED, public_name, read_json
from ztrain.frozen.states import all_models
from ztrain.io.files import read_bytes, sha256_of, whole_folder
from ztrain.io.tensors import read_tensors
from ztrain.io.yamls import Strict, parse
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.version import VERSION

CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"
STATISTICS_FILE = "statistics.safetensors"
FORMAT_VERSION = 3
"""1 had no `seal`, 2 had keys of adapters fewer (`as_saved`); both are read as they were."""
_UNSHOWN = re.compile(r"[`\s\x00-\x1f\x7f-\x9f]+")  # would end the code span of a Markdown card

Identities = dict[str, dict[str, str]]
Weights = Mapping[str, Tensor]


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
