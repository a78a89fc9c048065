"""Which config for which card: docs/cards.md, and the same table in README where it has the marks for it.

    python -m benchmarks.cards [--readme README.md]

In: configs/*_24gb.yaml with configs/then_1024.yaml, ztrain's own plans (ztrain/plan/command.py), and what was measured:
train_real_size_nvidia_h200.json and, once it is there, launch_nvidia_h200.json of benchmarks/results. Out:
docs/cards.md between its marks; README between `<!-- cards -->` and `<!-- /cards -->`. Every cell says whether somebody
ran it. A config counts as fitting if what it takes with nothing kept leaves SPARE of the card.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.pages import ROOT, write_page
from ztrain.config import Config, load_config
from ztrain.errors import InputError
from ztrain.plan.cards import CARDS, Card
from ztrain.plan.command import Plan, plan
from ztrain.plan.expected import COLLECTIVES_GIB, OTHER_GIB
from ztrain.plan.footprint import Counted, Strategy, count

Row = dict[str, Any]

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
    ("rtx_5090", 1), ("a100_40", 8), ("a100_80", 8), ("h100", 8), ("h200", 1), ("h200", 2), ("h200", 8),
)  # fmt: skip
IN_README = (
    ("rtx_4070", 1), ("rtx_4070", 2), ("rtx_4080", 1), ("rtx_4080", 2), ("rtx_3090", 1), ("rtx_4090", 1),
    ("rtx_4090", 8), ("rtx_5090", 1), ("a100_80", 8), ("h200", 2),
)  # fmt: skip
SPARE = 0.02
"""Of a card: how far plans lie from what was measured with nothing kept (tests/test_plan.py)."""
MEASURED_GIB = 24.0  # memory.budget_gib of benchmarks/train_real_size.py
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings beside configs/<list>_24gb.yaml and configs/then_1024.yaml, in the order in which they are tried."""

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


@cache
def config_of(name: str) -> Config:
    """A list's recipe at 1024 px."""
    return load_config([ROOT / "configs" / file for file in (f"{name}_24gb.yaml", "then_1024.yaml")])


@cache
def counted_of(name: str) -> Counted:
    return count(config_of(name))


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


def table(configs: dict[str, Config], counted: dict[str, Counted], rows: Sequence[Row]) -> dict[tuple[str, int], str]:
    """Lines by card and number of cards; a cell for each list: what to set, peak, seconds a micro-step of one triplet
    a card. What somebody ran stands in place of what is computed."""
    known = {(row["gpus"], row["strategy"], list_name(row["list"])): row for row in compared(rows, keeps="off")}
    lines = {}
    for name, cards in MACHINES:
        card, cells = CARDS[name], []
        for each in LISTS:
            found = chosen(configs[each], counted[each], card, cards)
            row = known.get((cards, found[0].strategy, each)) if found and name == "h200" else None
            cells.append(_cell(found, row if row and "failed" not in row else None))
        lines[name, cards] = f"| {cards} x {card.name} | {' | '.join(cells)} |"
    return lines


def _cell(found: tuple[Choice, Plan] | None, row: Row | None) -> str:
    if found is None:
        return "does not fit, computed"
    choice, made = found
    if row is not None:
        return f"{choice.words}, {max(row['used_gib']):.1f} GiB, {row['ms'] / 1e3:.2f} s, **measured**"
    return f"{choice.words}, {made.peak_gib:.1f} GiB, {made.step:.2f} s, computed"


def joined(lines: Sequence[str], whole: dict[str, Any]) -> str:
    """A table of such lines, with its head and the runs within 24 GiB."""
    heads, rows = ["cards", *LISTS.values()], {row["list"]: row for row in whole["rows"]}
    cells = [f"as it is, {rows[n]['reserved_gib']:.1f} GiB, {rows[n]['ms'] / 1e3:.2f} s, **measured**" for n in LISTS]
    last = f"| 1 x H200, {MEASURED_GIB:g} GiB of it | {' | '.join(cells)} |"
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines, last])


LEGEND = (
    "Each cell: what to set beside `configs/<list>_24gb.yaml configs/then_1024.yaml` (strategy = the file of"
    " `configs/accelerate`; adamw_8bit = `--train.optimizer`; px = `--data.resolution`), what a card is then full with"
    " (`budget` keeps what fits), seconds of a micro-step of one triplet a card. *Computed*: nobody has run it; H200"
    " constants scaled by the card's sheet. *Measured*: a whole run; within 24 GiB what torch reserved, else what the"
    " driver saw taken, torch's unused cache included. `ztrain plan` says the same of any config."
)
MORE = "More cards, and each strategy computed and measured: [docs/cards.md](docs/cards.md)."


STRATEGIES_LEGEND = (
    "One triplet a card, 1024 px, every main block computed again. *torch*: the most that torch had allocated;"
    " *card*: with CUDA, NCCL and libraries by computation, all that the driver saw by measurement, in which torch's"
    " unused cache is, too. The computed ms hold what the strategies took beyond computing (`WAITING` of"
    " `ztrain/plan/expected.py`), the mean of `[lora]` and `[siglip]` on these two cards (ZeRO-3: of"
    " `[siglip]` alone): a forecast only for other lists."
)


def strategies(configs: dict[str, Config], counted: dict[str, Counted], rows: Sequence[Row]) -> str:
    """Two H200, every block computed again: computed peaks and times beside measured ones, where there are any."""
    lines = [
        "| list | strategy | torch GiB, computed | measured | card GiB, computed | measured | ms, computed | measured |"
        " GB sent, computed |",
        "|---" * 9 + "|",
    ]
    known = {(row["strategy"], row["gpus"], list_name(row["list"])): row for row in compared(rows, keeps="on")}
    for name, label in LISTS.items():
        on = changed(configs[name], train={"gradient_checkpointing": "on", "gradient_accumulation_steps": 1})
        for strategy in STRATEGIES:
            made = plan(on, strategy=strategy, cards=2, card=CARDS["h200"], counted=counted[name])
            peak, used, ms = _measured(known.get((strategy, 2, name)))
            cells = f"{made.peak_gib - OTHER_GIB - COLLECTIVES_GIB:.1f} | {peak} | {made.peak_gib:.1f} | {used}"
            lines.append(f"| {label} | {strategy} | {cells} | {made.step * 1e3:.0f} | {ms} | {made.sent_gb:.2f} |")
    return "\n".join(lines)


def _measured(row: Row | None) -> tuple[str, str, str]:
    """Peak of torch, peak of the card, ms."""
    if row is None:
        return ("not measured",) * 3
    if "failed" in row:
        return ("failed",) * 3
    return f"{row['peak_gib']:.1f}", f"{max(row['used_gib']):.1f}", f"{row['ms']:.0f}"


def compared(rows: Sequence[Row], *, keeps: str) -> list[Row]:
    """Those that differ in strategy, cards and list alone: one triplet a card, all of one size, no reference for
    losses, sending in all steps; what failed is among them."""
    same = {"keeps": keeps, "data": "alike", "accumulation": 1, "is_reference": False, "alternates": False}
    return [row for row in rows if all(row.get(key, False) == value for key, value in same.items())]


def list_name(told: str) -> str:
    """`[siglip, lora]` and siglip_lora are one list."""
    return re.sub(r"[^a-z]+", "_", told.lower()).strip("_")


def launched(results: Path) -> list[Row]:
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
    configs, counted = {name: config_of(name) for name in LISTS}, {name: counted_of(name) for name in LISTS}
    whole = json.loads((results / "train_real_size_nvidia_h200.json").read_text(encoding="utf-8"))
    rows = launched(results)
    lines, ways = table(configs, counted, rows), strategies(configs, counted, rows)
    which = f"### Which config for which card\n\n{joined(list(lines.values()), whole)}\n\n{LEGEND}"
    write_page(page, f"{which}\n\n### Strategies on two H200\n\n{ways}\n\n{STRATEGIES_LEGEND}")
    if readme is not None:
        fill_readme(readme, f"{joined([lines[machine] for machine in IN_README], whole)}\n\n{LEGEND} {MORE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.cards", description=__doc__)
    parser.add_argument("--readme", type=Path, default=None)
    main(readme=parser.parse_args().readme)
