"""What a config's weights are, counted without loading any, and the bytes that each strategy keeps of them on one card.

In: a config. Out: `Counted`, every parameter of the transformer with its adapters by shape, built on the meta device;
and of that, a strategy and a number of cards the `Part`s of one card's memory that do not depend on the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ztrain.adapters import build_adapters, describe_list
from ztrain.config import Config
from ztrain.errors import InputError
from ztrain.frozen.sources import Source, read_json
from ztrain.frozen.states import siglip_dim
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import BLOCK, REAL_CONFIG, empty_transformer
from ztrain.model.fast.budget import MOMENTS_BYTES

Strategy = Literal["one_gpu", "ddp", "fsdp2", "zero2", "zero3"]
Known = Literal["counted", "from measured constants", "by the library's rule"]

SIGLIP_WIDTH = 1152
"""Of google/siglip2-so400m-patch16-naflex (zimage_facts.md 1.1), where models.siglip is not a folder here."""
REDUCE_BUCKET = 20_000_000
"""Numbers; reduce_bucket_size of configs/deepspeed/*.json. ZeRO makes it whole, however little is trained, and with
overlap_comm ZeRO-2 makes two (deepspeed/runtime/zero/stage_1_and_2.py, backward: ipg_buffer)."""
PERSISTENCE = 14_000_000
"""Numbers; stage3_param_persistence_threshold of configs/deepspeed/zero3.json: smaller parameters are never cut."""
LIVE = 400_000_000
"""Numbers that ZeRO-3 may hold put together at a time: stage3_max_live_parameters of configs/deepspeed/zero3.json. A
block has 181 million: one is computed while the next comes."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter. block: the name of the wrapped block that holds it, empty for what lies outside of all."""

    name: str
    shape: tuple[int, ...]
    is_trained: bool
    block: str

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def is_product(self) -> bool:
        """Whether every token is multiplied with it."""
        return len(self.shape) == 2 and "adaLN" not in self.name and "pad_token" not in self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """origin: whose config it is; dim and layers: width of the model and its main blocks."""

    origin: str
    weights: tuple[Weight, ...]
    dim: int
    layers: int

    def total(self, *, trained: bool, where: Callable[[Weight], bool] = lambda weight: True) -> int:
        return sum(w.numbers for w in self.weights if w.is_trained == trained and where(w))

    @property
    def frozen(self) -> int:
        return self.total(trained=False)

    @property
    def trained(self) -> int:
        return self.total(trained=True)

    @property
    def trained_in_main(self) -> int:
        """In the main blocks: their gradients come while the backward pass goes on, those of the others at its end."""
        return self.total(trained=True, where=in_main)


def in_main(weight: Weight) -> bool:
    """Whether it belongs to the main blocks, before which lie the refiners and what an adapter embeds."""
    return weight.block.startswith("dit.layers.")


def count(config: Config) -> Counted:
    """The real size, or that of models.base where its folder is here. Raises InputError for a list that trains
    nothing."""
    source, origin, settings = Source.of(config.models.base), "the released Z-Image", dict(REAL_CONFIG)
    if source.folder is not None:
        source.require("transformer/config.json", what="a Z-Image model")
        origin = source.location
        settings = read_json(source.folder / "transformer/config.json")
    width = None if Source.of(config.models.siglip).folder is None else siglip_dim(config)
    with torch.device("meta"):
        model = AdaptedDiT(empty_transformer(settings, origin), build_adapters(config.adapters, width or SIGLIP_WIDTH))
    weights = tuple(_weights(model))
    if not any(weight.is_trained for weight in weights):
        raise InputError(
            f"adapters {describe_list(config.adapters)} has no weights to train; add projector, lora or siglip"
        )
    return Counted(origin=origin, weights=weights, dim=model.dit.config.dim, layers=len(model.dit.layers))


def _weights(model: AdaptedDiT) -> Sequence[Weight]:
    blocks = [name for name, module in model.named_modules() if type(module).__name__ == BLOCK]

    def holder(name: str) -> str:
        return next((block for block in blocks if name.startswith(f"{block}.")), "")

    return [Weight(n, tuple(p.shape), p.requires_grad, holder(n)) for n, p in model.named_parameters()]


@dataclass(frozen=True, slots=True)
class Part:
    """bytes: on one card; known: how."""

    name: str
    bytes: float
    known: Known


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What one of `cards` cards holds of a parameter: numbers of the rows or of the row of numbers that it has."""

    strategy: Strategy
    cards: int

    def base(self, weight: Weight) -> int:
        """Numbers of a parameter, trained or not, as the model has it between steps."""
        match self.strategy:
            case "fsdp2":  # rows, as DTensor's Shard(0) gives them to the first card
                rows = weight.shape[0] if weight.shape else 1
                return -(-rows // self.cards) * (weight.numbers // max(1, rows))
            case "zero3" if weight.numbers > PERSISTENCE:
                return -(-weight.numbers // self.cards)
        return weight.numbers

    def states(self, weight: Weight) -> int:
        """Numbers of its gradient, moments and, under ZeRO, of the copy that the optimizer steps."""
        match self.strategy:
            case "one_gpu" | "ddp":
                return weight.numbers
            case "fsdp2":
                return self.base(weight)
        return -(-weight.numbers // self.cards)


def standing(counted: Counted, config: Config, cut: Cut) -> list[Part]:
    """The parts of a card's memory that are there whatever the batch, largest kinds first."""
    frozen = [w for w in counted.weights if not w.is_trained]
    trained = [w for w in counted.weights if w.is_trained]
    of_base = base_bytes(config)
    states = sum(cut.states(w) for w in trained)
    held = 4 * sum(cut.base(w) for w in trained)
    is_zero = cut.strategy in ("zero2", "zero3")
    parts = [
        Part("frozen base", of_base * sum(cut.base(w) for w in frozen), "counted"),
        Part("trained weights", held + (4 * states if is_zero else 0), "counted"),
        Part("gradients", 4 * states, "counted"),
        Part("optimizer moments", MOMENTS_BYTES[config.train.optimizer] * states, "counted"),
        Part("moving average", held if config.train.ema_decay else 0, "counted"),
        Part("put together or on the way", _working(counted, cut, of_base), "by the library's rule"),
    ]
    return [part for part in parts if part.bytes]


def base_bytes(config: Config) -> int:
    """For each number of the frozen base."""
    return 2 if config.train.mixed_precision == "bf16" else 4


def _working(counted: Counted, cut: Cut, of_base: int) -> float:
    """Bytes that a strategy needs besides: parameters while they are whole, buckets of gradients."""

    def size(weight: Weight) -> int:
        return weight.numbers * (4 if weight.is_trained else of_base)

    match cut.strategy:
        case "fsdp2":
            # One block is computed while the next comes; a block's gradients are whole, and once more as they leave.
            # What no block holds stays whole from the first use to the end of the step.
            blocks: dict[str, int] = {}
            leaving: dict[str, int] = {}
            for weight in counted.weights:
                blocks[weight.block] = blocks.get(weight.block, 0) + size(weight)
                leaving[weight.block] = leaving.get(weight.block, 0) + 8 * weight.numbers * weight.is_trained
            root = blocks.pop("", 0)
            return root + 2 * max(blocks.values(), default=0) + max(leaving.values())
        case "zero2":
            return 2 * 4 * REDUCE_BUCKET
        case "zero3":
            largest = sorted((size(w) for w in counted.weights if w.numbers > PERSISTENCE), reverse=True)
            return min(of_base * LIVE, sum(largest)) + 4 * REDUCE_BUCKET
    return 0.0  # DDP's buckets are the gradients (gradient_as_bucket_view)
