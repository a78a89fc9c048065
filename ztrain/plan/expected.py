"""What a step takes in activations, FLOPs and time, from constants that were measured on one H200.

Every constant names the committed result that it comes from; tests/test_plan.py works each out again from there. Time
on another card is computed: what matrices and attention take by the ratio of peak rates, the rest by that of memory
bandwidths, as if a card came as near to its sheet as the H200 did.

Legend: N tokens of a sample, d model width. A width: d numbers for a token and a main block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ztrain.config import Config
from ztrain.frozen.states import SIGLIP, models_of
from ztrain.model.fast.block import Keep
from ztrain.model.fast.budget import BUCKET_MIB, GIB, IDLE, REPLAYED_TOKENS, RESERVE, Budget, Line, Sizes
from ztrain.model.layout import padded
from ztrain.plan.cards import CARDS, Card
from ztrain.plan.footprint import REDUCE_BUCKET, Counted, Cut, Strategy, Weight, base_bytes, in_main

RATE = 487.5382e12
"""FLOP/s of a step with everything kept: rate_tflops of cost_nvidia_h200.json."""
RATE_AGAIN = 598e12
"""FLOP/s of what is computed again: step_nvidia_h200.json, forward FLOPs of the main blocks over ms of
lora_1024_b1_full_recompute less lora_1024_b1_no_recompute."""
BOUND_BY_MEMORY = 0.127
"""Share of a step that is neither products, attention nor idle: step_nvidia_h200.json, kernels of
lora_1024_b1_no_recompute."""
OPTIMIZER = 21.7e-12
"""Seconds for each trained number: step_nvidia_h200.json, kernels.optimizer of siglip_1024_b1_24gib."""
WIDTHS = {Keep.NOTHING: 1.79, Keep.COSTLY: 2.04, Keep.PRODUCTS: 11.36, Keep.EVERYTHING: 14.19}
"""Widths that a step takes with nothing kept; more than that, where all blocks keep so much: the lines "activations may
take" in train_real_size_nvidia_h200.json, of lists without a LoRA for EVERYTHING."""
WIDTHS_OF_LORA = 4.9
"""Further widths of EVERYTHING where the main blocks have the default LoRA, whose products need their inputs: the same
lines, lists with a LoRA less those without. For one on fewer layers, by the width of what these read."""
BYTES_OF_LORA = 3.5
"""Bytes for each trained number of the main blocks, made again in each pass: the same lines, with nothing kept."""
_INPUTS_OF_LORA = 33_280 / 3_840  # widths that the seven layers of a block read, d = 3840
OTHER_GIB = 1.19
"""CUDA's context, workspaces of libraries and the decoder of previews: 24 GiB less base, states and what activations
may take, in the same lines."""
COLLECTIVES_GIB = 0.82
"""NCCL's buffers, for several cards: launch_nvidia_h200.json, used_gib less peak_gib of ddp, less the same of one_gpu,
mean of [lora] and [siglip] with everything kept."""
WAITING: dict[Strategy, float] = {"one_gpu": 0.0, "ddp": 0.003, "fsdp2": 0.044, "zero2": 0.006, "zero3": 0.284}
"""Seconds of a micro-step beyond computing and what is sent beside nothing: launch_nvidia_h200.json, two H200. ddp: its
exposed_ms in the rows that send by turns, less the sums that nothing hides; the others: ms with nothing kept less what
is computed here; means of [lora] and [siglip]. zero3, whose blocks are not compiled, waits for its host: of [siglip],
since [lora]'s steps took 666 to 973 ms in three calls. On all other cards, and on more of them, as much: assumed."""
PROMPT_TOKENS = 128
"""Of a prompt with its chat turn: assumed, as in benchmarks/step.py; the most is encoders.max_sequence_length."""
SIGLIP_TOKENS = 256
"""SigLIP2's max_num_patches (zimage_facts.md 3.1)."""
LINK_SHARE = 0.57
"""Of a link's sheet that collectives reach: launch_nvidia_h200.json, all_reduce_ms of [siglip] over NVLink; assumed of
other links."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of one sample, each part padded as the transformer pads it."""

    image: int
    caption: int
    siglip: int

    @property
    def all(self) -> int:
        return self.image + self.caption + self.siglip

    @classmethod
    def of(cls, config: Config) -> "Tokens":
        """A square target, a prompt of PROMPT_TOKENS, one reference of the largest size where the list reads it."""
        composes = any(adapter.composes_reference for adapter in config.adapters)
        reference = config.encoders.max_reference_pixels // 1024 + 2 if composes else 0
        siglip = SIGLIP_TOKENS if SIGLIP in models_of(config.reads) else 0
        return cls(padded(config.data.square_tokens), padded(PROMPT_TOKENS + reference), siglip)


def sizes(counted: Counted, config: Config) -> Sizes:
    """Activations, in the form that ztrain.model.fast.budget measures them in before a run."""
    width = counted.dim * counted.layers * base_bytes(config)  # bytes; the inputs of the main blocks are one width
    widths = dict(WIDTHS)
    widths[Keep.EVERYTHING] += WIDTHS_OF_LORA * min(1.0, _read_by_lora(counted) / _INPUTS_OF_LORA)
    kept = {keep: Line(0.0, width + (widths[keep] * width if keep else 0.0)) for keep in Keep}
    working = Line(BYTES_OF_LORA * counted.trained_in_main, (widths[Keep.NOTHING] - 1) * width)
    return Sizes(kept, working, counted.layers)


def _read_by_lora(counted: Counted) -> float:
    """Widths that trained products of a main block read, each counted; the narrow ones after them not."""
    reading = [w.shape[1] for w in counted.weights if w.is_trained and in_main(w) and w.is_product and _is_wide(w)]
    return sum(reading) / counted.dim / counted.layers


def _is_wide(weight: Weight) -> bool:
    return weight.shape[0] < weight.shape[1]


def keeping(counted: Counted, config: Config, available: float, cards: int) -> tuple[Sequence[Keep], float]:
    """What each main block keeps within so many bytes, and the bytes of a step. Raises InputError where budget finds no
    room with nothing kept; on and off do what they say, room or not."""
    found, tokens = sizes(counted, config), config.train.train_batch_size * Tokens.of(config).all
    is_replayed = cards == 1 and config.train.train_batch_size * Tokens.of(config).image <= REPLAYED_TOKENS
    match config.train.gradient_checkpointing:
        case "on":
            keeps: Sequence[Keep] = [Keep.NOTHING] * counted.layers
        case "off":
            keeps = [Keep.EVERYTHING] * counted.layers
        case _:
            available = available * (1 - IDLE) if cards > 1 else available
            keeps = Budget(found, available / (2 if is_replayed else 1)).plan(tokens, counted.layers)
            needed = found.least(tokens) + sum(found.of_block(keep, tokens) for keep in keeps)
            return keeps, needed * (2 if is_replayed else 1)
    return keeps, found.least(tokens) + sum(found.of_block(keep, tokens) for keep in keeps)


def flops(counted: Counted, tokens: Tokens) -> float:
    """That a step of one sample needs, forward and backward: products and attention.

    A frozen product takes 2 FLOPs for each number and token forward, 2 backward where something before it is trained;
    a trained one 6. Attention takes 4 N^2 d forward and 8 N^2 d backward. As benchmarks.step counts them by operation.
    """

    def products(name: str, *, trained: bool) -> int:
        return counted.total(trained=trained, where=lambda w: w.is_product and w.block.startswith(f"dit.{name}."))

    main = tokens.all * (4 * products("layers", trained=False) + 6 * products("layers", trained=True))
    main += 12 * tokens.all**2 * counted.dim * counted.layers
    sides = 0.0
    for name, count in (("noise_refiner", tokens.image), ("context_refiner", tokens.caption)):
        depth = len({w.block for w in counted.weights if w.block.startswith(f"dit.{name}.")})
        sides += 2 * products(name, trained=False) * count + 4 * count**2 * counted.dim * depth
    sides += tokens.siglip * 6 * products("siglip_refiner", trained=True)
    return main + sides


def flops_again(counted: Counted, tokens: Tokens, keeps: Sequence[Keep]) -> float:
    """Of one sample, computed a second time in the backward pass."""
    frozen = [w for w in counted.weights if in_main(w) and not w.is_trained and w.is_product]
    whole = 2 * sum(w.numbers for w in frozen) * tokens.all / counted.layers
    last = 2 * sum(w.numbers for w in frozen if _is_wide(w)) * tokens.all / counted.layers  # w2, which COSTLY keeps
    attention = 4 * tokens.all**2 * counted.dim
    of_block = {Keep.NOTHING: whole + attention, Keep.COSTLY: whole - last}
    return sum(of_block.get(keep, 0.0) for keep in keeps)


def computing_seconds(counted: Counted, config: Config, keeps: Sequence[Keep], card: Card, states: int) -> float:
    """Of one micro-step and the optimizer's part of it. states: trained numbers that this card steps."""
    tokens, batch = Tokens.of(config), config.train.train_batch_size
    needed = flops(counted, tokens) / RATE + flops_again(counted, tokens, keeps) / RATE_AGAIN
    stepping = OPTIMIZER * states / config.train.gradient_accumulation_steps
    h200 = CARDS["h200"]
    products = (1 - BOUND_BY_MEMORY) * h200.tflops / card.tflops
    rest = BOUND_BY_MEMORY * h200.gb_s / card.gb_s
    return batch * needed * (products + rest) + stepping * h200.gb_s / card.gb_s


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one card sends for one micro-step, and of these what nothing is computed beside."""

    bytes: float
    exposed: float


def traffic(counted: Counted, config: Config, cut: Cut) -> Traffic:
    """By the rules of ring collectives: (n - 1) / n of what is gathered or scattered, twice that for a sum on all.

    DDP and ZeRO-2 sum gradients in buckets, DDP once an optimizer step: those of the main blocks go beside what is left
    of the backward pass, except the last bucket; the others' weights lie before the main blocks. FSDP2 and ZeRO-3 send
    those of each block beside the next one, and gather what is cut twice a micro-step; ZeRO-2 and -3 gather trained
    weights after the optimizer's step.
    """
    share, steps = (cut.cards - 1) / cut.cards, config.train.gradient_accumulation_steps
    trained, in_main = 4.0 * counted.trained, 4.0 * counted.trained_in_main
    outside = trained - in_main

    match cut.strategy:
        case "one_gpu":
            return Traffic(0.0, 0.0)
        case "ddp":
            return Traffic(
                2 * share * trained / steps, 2 * share * (outside + min(in_main, 2**20 * BUCKET_MIB)) / steps
            )
        case "zero2":
            gathered = share * trained / steps
            return Traffic(share * trained + gathered, share * (outside + min(in_main, 4 * REDUCE_BUCKET)) + gathered)
    gathered = share * (base_bytes(config) * counted.frozen + trained)
    after = share * trained / steps if cut.strategy == "zero3" else 0.0
    return Traffic(2 * gathered + share * trained + after, share * outside + after)


def step_seconds(computing: float, sent: Traffic, link_gb_s: float, waiting: float) -> float:
    """Of a micro-step: what is hidden costs nothing until it takes longer than computing. waiting: of WAITING."""
    rate = link_gb_s * 1e9 * LINK_SHARE
    return max(computing, (sent.bytes - sent.exposed) / rate) + sent.exposed / rate + waiting


def available_bytes(gib: float, standing: float) -> float:
    """For activations, on a card of so many GiB with so many bytes standing on it."""
    return gib * GIB * (1 - RESERVE) - OTHER_GIB * GIB - standing


STRATEGIES: dict[Strategy, str] = {
    "one_gpu": "one card holds everything",
    "ddp": "each card holds everything; gradients are summed",
    "fsdp2": "base, gradients and moments are cut over the cards; each block is put together while it is computed",
    "zero2": "each card holds the base; gradients and moments are cut",
    "zero3": "base, gradients and moments are cut by DeepSpeed",
}
