"""Which config for which card: docs/cards.md, and the same table in README where it has the marks for it.

    python -m benchmarks.cards [--readme README.md]

In: configs/*_24gb.yaml, ztrain's own plans (ztrain/plan.py), and what was measured: train_real_size_nvidia_h200.json
and, once it is there, launch_nvidia_h200.json of benchmarks/results. Out: docs/cards.md between its marks; README
between `<!-- cards -->` and `<!-- /cards -->`. Every cell says whether somebody ran it. A config counts as fitting if
what it takes with nothing kept leaves SPARE of the card.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages import ROOT, write_page
from ztrain.cards import CARDS, Card
from ztrain.config import Config, load_config
from ztrain.errors import InputError
from ztrain.footprint import Counted, Strategy, count
from ztrain.plan import Plan, plan

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "cards.md"
README_MARKS = ("<!-- cards -->", "<!-- /cards -->")
LISTS = {
    "projector": "`[projector]`",
    "splice_lora": "`[splice, lora]`",
    "siglip": "`[siglip]`",
    "siglip_lora": "`[siglip, lora]`",
    "lora": "`[lora]`",
}
MACHINES = (
    ("rtx_4070", 1), ("rtx_4070", 2), ("rtx_4070", 4), ("rtx_4060_ti", 1), ("rtx_4060_ti", 2), ("rtx_4080", 1),
    ("rtx_4080", 2), ("rtx_3090", 1), ("rtx_4090", 1), ("rtx_4090", 2), ("rtx_4090", 4), ("rtx_4090", 8),
    ("rtx_5090", 1), ("a100_40", 8), ("a100_80", 8), ("h100", 8), ("h200", 1), ("h200", 8),
)  # fmt: skip
SPARE = 0.02
"""Of a card: how far plans lie from what was measured with nothing kept (tests/test_plan.py)."""
MEASURED_GIB = 24.0  # memory.budget_gib of benchmarks/train_real_size.py
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings beside configs/<list>_24gb.yaml, in the order in which they are tried."""

    strategy: Strategy
    optimizer: str
    resolution: int

    @property
    def words(self) -> str:
        changes: list[str] = [self.strategy] if self.strategy != "one_gpu" else []
        changes += ["adamw_8bit"] if self.optimizer != "adamw" else []
        changes += [f"{self.resolution} px"] if self.resolution != 1024 else []
        return " ".join(changes) or "as it is"


def choices(cards: int) -> Iterator[Choice]:
    """Full size before less, plain before 8 bits, a whole base before one that is cut."""
    ways: tuple[Strategy, ...] = ("one_gpu",) if cards == 1 else ("ddp", "fsdp2")
    for side in (1024, 768, 512):
        for optimizer in ("adamw", "adamw_8bit"):
            for way in ways:
                if optimizer == "adamw" or way != "fsdp2":
                    yield Choice(way, optimizer, side)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    updates = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=updates)


def chosen(config: Config, counted: Counted, card: Card, cards: int) -> tuple[Choice, Plan] | None:
    """The first choice that leaves SPARE, with its plan; None where none does."""
    for choice in choices(cards):
        tried = changed(
            config,
            data={"resolution": choice.resolution},
            train={"optimizer": choice.optimizer, "gradient_checkpointing": "on"},
        )
        least = plan(tried, strategy=choice.strategy, cards=cards, card=card, counted=counted)
        if least.peak_gib <= card.gib * (1 - SPARE):
            budget = changed(tried, train={"gradient_checkpointing": "budget"})
            return choice, plan(budget, strategy=choice.strategy, cards=cards, card=card, counted=counted)
    return None


def table(configs: dict[str, Config], counted: dict[str, Counted], whole: dict[str, Any]) -> str:
    """Cards x lists -> what to set, peak, seconds a micro-step of one triplet a card."""
    heads = ["cards", *LISTS.values()]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, cards in MACHINES:
        card = CARDS[name]
        cells = [_cell(chosen(configs[each], counted[each], card, cards)) for each in LISTS]
        lines.append(f"| {cards} x {card.name} | {' | '.join(cells)} |")
    rows = {row["list"]: row for row in whole["rows"]}
    cells = [f"as it is, {rows[n]['reserved_gib']:.1f} GiB, {rows[n]['ms'] / 1e3:.2f} s, **measured**" for n in LISTS]
    lines.append(f"| 1 x H200, {MEASURED_GIB:g} GiB of it | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: tuple[Choice, Plan] | None) -> str:
    if found is None:
        return "does not fit, computed"
    choice, made = found
    return f"{choice.words}, {made.peak_gib:.1f} GiB, {made.step:.2f} s, computed"


LEGEND = (
    "Each cell: what to set beside `configs/<list>_24gb.yaml` (strategy = the file of `configs/accelerate`; adamw_8bit"
    " = `--train.optimizer`; px = `--data.resolution`), what a card is then full with (`budget` keeps what fits),"
    " seconds of a micro-step of one triplet a card. *Computed*: nobody has run it; H200 constants scaled by the card's"
    " sheet. *Measured*: a whole run, GiB that torch reserved. `ztrain plan` says the same of any config."
)


def strategies(configs: dict[str, Config], counted: dict[str, Counted], launched: Sequence[dict[str, Any]]) -> str:
    """Two H200, every block computed again: computed peaks and times beside measured ones, where there are any."""
    lines = [
        "| list | strategy | GiB a card, computed | GiB, measured | ms, computed | ms, measured | GB sent |",
        "|---|---|---|---|---|---|---|",
    ]
    known = {(row["strategy"], row["gpus"], list_name(row["list"])): row for row in launched}
    for name, label in LISTS.items():
        on = changed(configs[name], train={"gradient_checkpointing": "on", "gradient_accumulation_steps": 1})
        for strategy in STRATEGIES:
            made = plan(on, strategy=strategy, cards=2, card=CARDS["h200"], counted=counted[name])
            row = known.get((strategy, 2, name))
            peak, ms = (f"{row['peak_gib']:.1f}", f"{row['ms']:.0f}") if row else ("not measured yet",) * 2
            computed = f"{made.peak_gib:.1f} | {peak} | {made.step * 1e3:.0f} | {ms} | {made.sent_gb:.2f}"
            lines.append(f"| {label} | {strategy} | {computed} |")
    return "\n".join(lines)


def list_name(told: str) -> str:
    """`[siglip, lora]` and siglip_lora are one list."""
    return re.sub(r"[^a-z]+", "_", told.lower()).strip("_")


def launched(results: Path) -> list[dict[str, Any]]:
    """The rows of launch_nvidia_h200.json; none where nobody has measured yet."""
    path = results / "launch_nvidia_h200.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.exists() else []


def fill_readme(path: Path, text: str) -> None:
    """Raises InputError where the marks are not there, once each and in order."""
    page, (first, last) = path.read_text(encoding="utf-8"), README_MARKS
    if page.count(first) != 1 or page.count(last) != 1 or page.index(first) > page.index(last):
        raise InputError(f"{path} must hold {first} and, after it, {last}, once each")
    before, after = page.split(first)[0], page.split(last)[1]
    path.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")


def main(page: Path = PAGE, readme: Path | None = None, results: Path = RESULTS) -> None:
    configs = {name: load_config([ROOT / "configs" / f"{name}_24gb.yaml"]) for name in LISTS}
    counted = {name: count(config) for name, config in configs.items()}
    whole = json.loads((results / "train_real_size_nvidia_h200.json").read_text(encoding="utf-8"))
    which = table(configs, counted, whole)
    ways = strategies(configs, counted, launched(results))
    write_page(page, f"### Which config for which card\n\n{which}\n\n{LEGEND}\n\n### Strategies on two H200\n\n{ways}")
    if readme is not None:
        fill_readme(readme, f"{which}\n\n{LEGEND}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.cards", description=__doc__)
    parser.add_argument("--readme", type=Path, default=None)
    main(readme=parser.parse_args().readme)
