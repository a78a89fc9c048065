"""What a config will need in memory and time, before anything is loaded: `ztrain plan --config FILE ...`.

In: a config, a strategy of configs/accelerate, a number of cards of a kind. Out: a `Plan`, as text or as JSON. Weights
and states are counted to the byte; activations and times come from constants that were measured on an H200
(expected.py); nobody has run what is only computed, and the text says which is which.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ztrain.adapters import describe_list
from ztrain.config import Config
from ztrain.distributed.limits import refusal
from ztrain.errors import InputError
from ztrain.model.fast.block import Keep
from ztrain.model.fast.budget import GIB
from ztrain.plan.cards import CARDS, Card
from ztrain.plan.expected import (
    COLLECTIVES_GIB,
    OTHER_GIB,
    STRATEGIES,
    WAITING,
    Tokens,
    available_bytes,
    computing_seconds,
    keeping,
    step_seconds,
    traffic,
)
from ztrain.plan.footprint import Counted, Cut, Part, Strategy, count, standing


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One card of a run. list: of adapters; origin: whose sizes; tokens: of one sample; parts: GiB by name and how each
    is known; peak_gib: their sum, all that the process takes of the card; gib: of the card, or what memory.budget_gib
    leaves of it; keeps: main blocks by what they keep; computing, step: seconds of a micro-step, alone and with what is
    sent; sent_gb: 10^9 bytes a card sends for it; triplets: a second, of all cards; advice: what fits where this does
    not, most like it first."""

    list: str
    origin: str
    strategy: Strategy
    cards: int
    card: str
    gib: float
    resolution: int
    batch: int
    tokens: int
    frozen: int
    trained: int
    parts: tuple[tuple[str, float, str], ...]
    peak_gib: float
    keeps: dict[str, int]
    computing: float
    step: float
    sent_gb: float
    triplets: float
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.gib

    @property
    def efficiency(self) -> float:
        """Of the cards, against one that sends nothing, 0..1."""
        return self.computing / self.step


def plan(
    config: Config,
    *,
    strategy: Strategy = "one_gpu",
    cards: int = 1,
    card: Card = CARDS["rtx_4090"],
    memory_gib: float | None = None,
    counted: Counted | None = None,
) -> Plan:
    """memory_gib: of each card, in place of the card's own; counted: of the same adapters, to count them once.

    Raises InputError for what the strategy cannot carry out, and for a list that trains nothing.
    """
    check(config, strategy, cards, memory_gib)
    counted = counted or count(config)
    gib = card.gib if memory_gib is None else memory_gib
    gib = gib if config.memory.budget_gib is None else min(gib, config.memory.budget_gib)
    made = _planned(config, counted, Cut(strategy=strategy, cards=cards), card, gib)
    return made if made.fits else replace(made, advice=tuple(_advice(config, counted, made, card, gib)))


def check(config: Config, strategy: Strategy, cards: int, memory_gib: float | None) -> None:
    """Whether there is anything to plan. memory_gib: of each card, above 0 and finite, None for the card's own.

    Raises InputError for a number of cards that the strategy does not have, for what training refuses under it
    (limits.py), and for layouts of siglip whose tokens nobody has counted or measured here.
    """
    if cards < 1 or (strategy == "one_gpu") != (cards == 1):
        raise InputError(
            f"--strategy {strategy} with --cards {cards}: one_gpu has one card, all others have two or more"
        )
    if memory_gib is not None and not (math.isfinite(memory_gib) and memory_gib > 0):
        raise InputError(f"--memory_gib {memory_gib:g} must be a number of GiB above 0")
    if refused := refusal(strategy, config):
        raise InputError(refused)
    if any(adapter.has_stock_layout for adapter in config.adapters):
        raise InputError(
            "adapters siglip: layout stock and stock_without_latents are not counted by ztrain plan; take one_segment"
        )


def _planned(config: Config, counted: Counted, cut: Cut, card: Card, gib: float) -> Plan:
    tokens, t = Tokens.of(config), config.train
    there = standing(counted, config, cut)
    if cut.cards > 1:
        there.append(Part("NCCL", COLLECTIVES_GIB * GIB, "from measured constants"))
    room = available_bytes(gib, sum(part.bytes for part in there))
    try:
        keeps, activations = keeping(counted, config, room, cut.cards)
    except InputError:  # no room with nothing kept: how much is missing is what the plan is to say
        keeps, activations = _with_nothing_kept(config, counted, cut.cards)
    parts = [*there, Part("activations", activations, "from measured constants")]
    told = [(part.name, part.bytes / GIB, part.known) for part in parts]
    told.append(("CUDA, libraries, preview decoder", OTHER_GIB, "from measured constants"))
    states = sum(cut.states(w) for w in counted.weights if w.is_trained)
    computing = computing_seconds(counted, config, keeps, card, states)
    sent = traffic(counted, config, cut)
    step = step_seconds(computing, sent, card.link_gb_s, WAITING[cut.strategy])
    return Plan(
        list=describe_list(config.adapters),
        origin=counted.origin,
        strategy=cut.strategy,
        cards=cut.cards,
        card=card.name,
        gib=gib,
        resolution=config.data.resolution,
        batch=t.train_batch_size,
        tokens=tokens.all,
        frozen=counted.frozen,
        trained=counted.trained,
        parts=tuple(told),
        peak_gib=sum(gib for _, gib, _ in told),
        keeps={keep.name.lower(): n for keep in Keep if (n := list(keeps).count(keep))},
        computing=computing,
        step=step,
        sent_gb=sent.bytes / 1e9,
        triplets=t.train_batch_size * cut.cards / step,
    )


def _with_nothing_kept(config: Config, counted: Counted, cards: int) -> tuple[Sequence[Keep], float]:
    on = config.train.model_copy(update={"gradient_checkpointing": "on"})
    return keeping(counted, config.model_copy(update={"train": on}), 0.0, cards)


# --- what to do where it does not fit ---------------------------------------------------------------------------------


def _advice(config: Config, counted: Counted, made: Plan, card: Card, gib: float) -> Iterator[str]:
    for words, other, cut in _others(config, made.cards):
        try:
            check(other, cut.strategy, cut.cards, gib)
        except InputError:
            continue
        found = _planned(other, counted, cut, card, gib)
        if found.fits:
            yield f"{words} ({found.peak_gib:.1f} GiB)"


def _others(config: Config, cards: int) -> Iterator[tuple[str, Config, Cut]]:
    """Other settings, then other strategies, then fewer pixels; in words, as a config, as a cut."""

    def changed(section: str, **values: Any) -> Config:
        return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})

    plain = Cut(strategy="one_gpu" if cards == 1 else "ddp", cards=cards)
    if config.train.gradient_checkpointing != "budget":
        yield "train.gradient_checkpointing budget", changed("train", gradient_checkpointing="budget"), plain
    if config.train.optimizer != "adamw_8bit":
        yield "train.optimizer adamw_8bit", changed("train", optimizer="adamw_8bit"), plain
    if config.train.train_batch_size > 1:
        yield "train.train_batch_size 1", changed("train", train_batch_size=1), plain
    plain_adamw = changed("train", optimizer="adamw")
    for number in sorted({max(2, cards), *(n for n in (2, 4, 8) if n > cards)}):
        yield f"fsdp2 on {number} cards", plain_adamw, Cut(strategy="fsdp2", cards=number)
    for side in (768, 512):
        if config.data.resolution > side:
            yield f"data.resolution {side}", changed("data", resolution=side), plain


# --- as text and as JSON ----------------------------------------------------------------------------------------------


def render(made: Plan) -> str:
    """A page of text: what fits or breaks first, where the memory goes, how long a step takes."""
    cards = f"{made.cards} x {made.card}" if made.cards > 1 else made.card
    kept = ", ".join(f"{name} {count}" for name, count in made.keeps.items())
    width = max(len(name) for name, _, _ in made.parts)
    measured = made.card == CARDS["h200"].name
    return "\n".join(
        [
            f"{made.list} on {cards}, {made.strategy}: {STRATEGIES[made.strategy]}",
            f"{made.resolution} px, batch {made.batch} a card, {made.tokens:,} tokens a sample; {made.frozen:,} frozen"
            f" and {made.trained:,} trained weights, of {made.origin}",
            verdict(made),
            "",
            *(f"  {name:<{width}} {gib:6.2f} GiB  {known}" for name, gib, known in made.parts),
            f"  {'together':<{width}} {made.peak_gib:6.2f} GiB  of {made.gib:.1f}; main blocks keep {kept}",
            "",
            f"a micro-step: {made.step:.3f} s, {made.triplets:.2f} triplets a second in all; computing alone"
            f" {made.computing:.3f} s, {made.sent_gb:.2f} GB sent by each card, efficiency {made.efficiency:.3f}",
            "time: computed from constants measured on an H200"
            + (", several cards by what two took besides" if made.cards > 1 else "")
            + ("" if measured else ", by peak rate and memory bandwidth of this card's sheet; nobody has run it"),
        ]
    )


def verdict(made: Plan) -> str:
    """One sentence: fits, or what breaks first and what to do about it."""
    if made.fits:
        return f"fits: {made.peak_gib:.1f} of {made.gib:.1f} GiB"
    name, gib, _ = max(made.parts, key=lambda part: part[1])
    todo = f"take {', or '.join(made.advice)}" if made.advice else "nothing that is known here makes it fit"
    return f"does not fit: {made.peak_gib:.1f} of {made.gib:.1f} GiB; the {name} alone takes {gib:.1f}; {todo}"


def as_json(made: Plan) -> str:
    """Every field of a plan by its name, with `fits` and `efficiency`; units as Plan says."""
    return json.dumps(asdict(made) | {"fits": made.fits, "efficiency": made.efficiency}, indent=1)
