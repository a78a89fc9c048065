"""`ztrain export`: the adapter as it stood at a checkpoint, for runs that were cut off or were better before their end.

In: the configuration of the run and one of its checkpoints. Out: what the run itself exports at its last step. The base
is only compared with the run's, unless an adapter took something out of it.
"""

import json
from pathlib import Path

import torch

from ztrain.config import Config
from ztrain.errors import InputError
from ztrain.frozen.sources import Source, base_dtype, check_trainable, identity
from ztrain.model.adapted_dit import make_model
from ztrain.model.dit import load_transformer, mapped_transformer
from ztrain.resolve import resolve
from ztrain.weights import checkpoint
from ztrain.weights.adapter_folder import save_adapter

_DECIDING = ("adapters", "encoders", "seed")
"""Of the configuration: what a list's weights mean. The models are compared by what they are, not where they lie."""


def export_checkpoint(config: Config, path: Path, out: Path) -> Path:
    """Writes `out`, which must not exist, with the averaged weights where the run keeps an average. Raises InputError,
    also where the configuration or the transformer is not the run's."""
    check_trainable(config.models)
    if out.exists():
        raise InputError(f"{out} exists already; remove it or choose another --out")
    found = checkpoint.read(path)
    config = resolve(config, found.state["config"])
    changed = [
        words
        for words in checkpoint.frozen_differences(found.state["config"], config)
        if words.startswith(tuple(f"{key}{end}" for key in _DECIDING for end in (".", ":")))
    ]
    base = Source.of(config.models.base)
    dit = mapped_transformer(base)
    known, here = found.state["identities"], identity(dit)
    if known["transformer"] != here:
        changed.append(f"the transformer: {json.dumps(known['transformer'])} -> {json.dumps(here)}")
    if changed:
        raise InputError(f"{path}: this is not the configuration of its run: {'; '.join(changed)}")
    if any(adapter.changes_base for adapter in config.adapters):
        dit = load_transformer(base, base_dtype(config.train.mixed_precision), "cpu")
    else:
        dit.to("meta")
    with torch.device(dit.device):
        model = make_model(config, dit)
    weights = found.tensors.get("ema.safetensors", found.tensors["trainable.safetensors"])
    model.load_trainable_state(weights, str(path))  # compares names and shapes
    origin = found.state.get("init_from")
    return save_adapter(out, model, config, known, step=found.step, state=weights, origin=origin)
