"""The adapter protocol: how a frozen Z-Image is made to look at a reference image, in four verbs.

An experiment is an ordered list of adapters; conditioning flows through it as through a pipe. A new kind is one file
with a config class (what the YAML says) and an Adapter class, and its lines in adapters/__init__.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import Field
from torch import Tensor, nn

from ztrain.conditioning import Conditioning, Encoded
from ztrain.io.yamls import Strict

Reads = frozenset[str]
"""Names of the `Encoded` states that an adapter reads besides the text: reference, fused, siglip, omni."""


MAX_WIDTH = 65_536
"""Of any matrix that settings ask for: a number from a hostile file must not take all memory."""


class AdapterConfig(Strict):
    """Settings of one adapter. `composes_reference`: it decides how text and reference states become one caption."""

    composes_reference: ClassVar[bool] = False
    acts_without_reference: ClassVar[bool] = False
    """Whether it changes what the DiT does with a sample that has no reference; else such a sample is the base."""
    for_training: ClassVar[frozenset[str]] = frozenset()
    """Keys that only training reads: no part of what an export means."""
    meant_before: ClassVar[Mapping[str, Any]] = {}
    """Keys that exports and checkpoints of earlier versions lack, with what those did."""
    beginnings: ClassVar[frozenset[str]] = frozenset()
    """Keys that only decide how fresh weights begin or how they are trained, not what trained ones mean."""

    kind: str

    @property
    def reads(self) -> Reads:
        return frozenset()

    @property
    def has_stock_layout(self) -> bool:
        """Whether prompt and references are laid out as ZImageOmniPipeline does, in place of one caption."""
        return False

    @property
    def needs_training(self) -> bool:
        """Whether the list shows nothing before it is trained: its weights start fresh."""
        return True

    @property
    def changes_base(self) -> bool:
        """Whether fresh weights take something out of the base's: then only an export that has those undoes it."""
        return False

    @property
    def statistics_path(self) -> str | None:
        """The statistics file that the settings name, if any."""
        return None

    def meaning(self) -> dict[str, Any]:
        """The settings under which trained weights mean what they do; file names stand for what is in the files."""
        told = {**self.meant_before, **self.at_work()}
        return {key: value for key, value in told.items() if key not in self.beginnings}

    def unlike(self, there: "AdapterConfig") -> list[str]:
        """What keeps weights that were trained under the settings `there`, of the same kind, from these."""
        before, now = there.meaning(), self.meaning()
        return [
            f"{key} is {json.dumps(before[key])} there and {json.dumps(now[key])} here"
            for key in now
            if before[key] != now[key]
        ]

    def resolved(self, siglip_dim: int | None) -> "AdapterConfig":
        """With what only the loaded models know filled in: the width of the SigLIP features."""
        return self

    def decided(self, saved: Mapping[str, Any]) -> Self:
        """With the keys that a run decides when it starts; `saved`: the settings of the adapter in a checkpoint that
        it goes on from, which then say."""
        return self

    def at_work(self) -> dict[str, Any]:
        """What decides the pictures of given weights; without keys that are as they were before there were any."""
        told = self.model_dump(mode="json", exclude=set(self.for_training))
        return {key: value for key, value in told.items() if (key, value) not in self.meant_before.items()}


class TrainedConfig(AdapterConfig):
    """Settings of an adapter that has weights."""

    for_training: ClassVar[frozenset[str]] = frozenset({"learning_rate", "weight_decay"})

    learning_rate: float | None = Field(default=None, gt=0.0)
    """Of this adapter's weights; None: train.learning_rate. What is trained from scratch takes more than a LoRA."""
    weight_decay: float | None = Field(default=None, ge=0.0)
    """Of its matrices; None: train.adam_weight_decay."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """One safetensors file of an exported adapter: tensors by key, and the header's metadata (strings only)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


ConfigT = TypeVar("ConfigT", bound=AdapterConfig)


class Adapter(nn.Module, Generic[ConfigT]):
    """How a frozen Z-Image is made to look at a reference image.

    `scale`: 1 = as trained, 0 = exactly as if the adapter were not in the list; values between weaken it (inference).
    Parameters that `attach` wakes inside the DiT and those of the module itself are the adapter's weights.
    """

    file_name = "adapter.safetensors"

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config
        self.scale = 1.0

    def attach(self, dit: nn.Module) -> None:
        """Creates or unfreezes weights inside the frozen DiT; nothing by default."""

    def forward(self, conditioning: Conditioning, encoded: Encoded) -> Conditioning:
        """What the DiT reads so far -> what it reads now; unchanged by default."""
        return conditioning

    def set_scale(self, dit: nn.Module, scale: float) -> None:
        """Makes `scale` take effect inside the DiT too, for adapters that live there."""
        self.scale = scale

    def export(self, weights: dict[str, Tensor]) -> dict[str, AdapterFile]:
        """Files for other tools, by name. `weights`: the adapter's weights by their names in the transformer, or in
        the adapter itself. By default one file with the names as trained, after the kind."""
        prefix = f"{self.config.kind}."
        return {self.file_name: AdapterFile({prefix + name: tensor for name, tensor in weights.items()})}

    def exported_config(self) -> dict[str, Any]:
        """The settings under which the exported files load again; as trained by default."""
        return self.config.model_dump(mode="json", exclude=set(self.config.for_training))

    def read(self, files: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Weights out of exported files (tensors by file name): the inverse of `export`."""
        prefix = f"{self.config.kind}."
        tensors = files.get(self.file_name, {})
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
