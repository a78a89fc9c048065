"""What a new run starts from (`init_from`): an earlier run's adapters, out of its export or one of its checkpoints.

In: the folder, and the config of the new run. Out: weights in a fresh model, matched by kind; optimizer, schedule and
step are the new run's own. Whatever would give the same weights another meaning is refused by one sentence.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ztrain.adapters import as_before, build_adapters, unlike_lists
from ztrain.config import Config, EncodersConfig
from ztrain.errors import InputError
from ztrain.frozen.sources import public_name
from ztrain.io.files import sha256_of
from ztrain.io.yamls import parse
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.weights import checkpoint
from ztrain.weights.adapter_folder import CONFIG_FILE, Identities, another_model, read_adapter

_SIZES = {"min_reference_pixels", "max_reference_pixels", "max_sequence_length"}
"""Settings of the encoders that decide how much they read, not what it means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The adapters of an earlier run. `own`: each one's weights by their names in the adapter or the transformer;
    `shared`: those inside the transformer, where the folder does not say whose they are."""

    folder: Path
    adapters: list[Any]
    encoders: EncodersConfig
    identities: Identities
    step: int
    digest: str
    own: list[dict[str, Tensor]]
    shared: dict[str, Tensor]

    @property
    def told(self) -> dict[str, Any]:
        """What checkpoints and exports say of it: no path, and the SHA-256 of the file that lists all others."""
        place = self.folder.resolve()
        if place.parent.name == "checkpoints":
            place = place.parent
        run = place.parent if place.name in ("export", "checkpoints") else place
        kinds = [adapter.kind for adapter in self.adapters]
        return {"name": public_name(str(run)), "step": self.step, "adapters": kinds, "sha256": self.digest}

    def fitted(self, config: Config) -> Config:
        """The config with the keys of its adapters that are left out as they were there. Raises InputError for
        settings under which the weights would mean something else."""
        adapters = as_before(self.adapters, list(config.adapters))
        unlike = unlike_lists(self.adapters, adapters)
        if any(adapter.composes_reference for adapter in self.adapters):
            before, now = (each.model_dump(exclude=_SIZES) for each in (self.encoders, config.encoders))
            unlike += [
                f"encoders.{key} is {json.dumps(before[key])} there and {json.dumps(now[key])} here"
                for key in now
                if before[key] != now[key]
            ]
        if unlike:
            raise InputError(f"init_from {self.folder} does not fit this run: {'; '.join(unlike)}")
        return config.model_copy(update={"adapters": adapters})

    def put_into(self, model: AdaptedDiT, known: Identities) -> None:
        """Copies the weights into the adapters of the same kinds; all others stay fresh. `known`: the models of this
        run. Raises InputError for other models and other shapes."""
        for role in sorted(self.identities.keys() & known.keys()):
            if self.identities[role] != known[role]:
                raise another_model(self.folder, role, self.identities[role], known[role])
        kinds, shared = [adapter.config.kind for adapter in model.adapters], dict(self.shared)
        for there, own in zip(self.adapters, self.own, strict=True):
            index = kinds.index(there.kind)
            inside = {name: shared.pop(name) for name in model.adapter_weights(index) if name in shared}
            model.load_adapter_weights(index, own | inside, str(self.folder))
        if shared:
            raise InputError(f"{self.folder} has weights that no adapter of this run has, such as {sorted(shared)[0]}")


def read_origin(config: Config) -> Origin | None:
    """What a config says to start from, if anything. Raises InputError."""
    if config.init_from is None:
        return None
    folder = Path(config.init_from)
    if (folder / CONFIG_FILE).is_file():
        return _of_export(folder)
    if (folder / checkpoint.MANIFEST).is_file():
        return _of_checkpoint(folder)
    raise InputError(
        f"init_from {folder} is neither an exported adapter ({CONFIG_FILE} is missing) nor a checkpoint"
        f" ({checkpoint.MANIFEST} is missing); name a run's export folder or one of its checkpoints"
    )


def _of_export(folder: Path) -> Origin:
    exported = read_adapter(folder)
    return Origin(
        folder=folder,
        adapters=exported.adapters,
        encoders=exported.encoders,
        identities=exported.identity,
        step=exported.step,
        digest=sha256_of(folder / CONFIG_FILE),
        own=[adapter.read(exported.files) for adapter in build_adapters(exported.adapters)],
        shared={},
    )


def _of_checkpoint(folder: Path) -> Origin:
    """With the average of the weights where the run kept one."""
    found = checkpoint.read(folder)
    settings = parse(Config, {key: found.state["config"][key] for key in ("adapters", "encoders")}, str(folder))
    weights = found.tensors.get("ema.safetensors", found.tensors["trainable.safetensors"])
    prefixes = [f"adapters.{index}." for index in range(len(settings.adapters))]
    return Origin(
        folder=folder,
        adapters=settings.adapters,
        encoders=settings.encoders,
        identities=found.state["identities"],
        step=found.step,
        digest=sha256_of(folder / checkpoint.MANIFEST),
        own=[_below(prefix, weights) for prefix in prefixes],
        shared=_below("dit.", weights),
    )


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
