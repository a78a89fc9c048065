"""The activation budget: as much of a step's activations is kept as its memory allows, the rest is computed again.

What a step takes is measured before the first one, on two small batches for each way of keeping. It grows linearly with
the tokens of a batch, so that the two say what any batch takes. `Budget` then gives each block of a batch what it may
keep: first what costs most to compute again for its bytes, in all blocks, then more of it, from the last block on. A
batch that does not fit with nothing kept is refused by name; no batch is ever made smaller.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ztrain.errors import InputError
from ztrain.model.fast.block import Keep

ItemT = TypeVar("ItemT")

GIB = 2**30
RESERVE = 0.015
"""Share of the budget that is never planned with: what the allocator cannot use between tensors of mixed sizes."""
IDLE = 0.15
"""Of what activations may take, where a step cannot be computed again with less kept, because other processes would
wait: memory that lies idle between tensors. An H200 lost 0.125 of it where a run of mixed sizes had 9.9 GiB."""
REPLAYED_TOKENS = 2560
"""Of a batch: about where an H200 takes as long for a step as its host. One of fewer runs as a CUDA graph on one card,
which takes its memory twice."""
MOMENTS_BYTES = {"adamw": 8, "adamw_8bit": 2}
"""Of each trained number, by optimizer."""
BUCKET_MIB = 50
"""Of gradients that DDP sums at a time."""
_MEASURED = 6
"""Blocks that keep more than nothing while it is measured what they keep."""
_WITHHELD = 0.04
"""Share of a budget that is withheld at a time where memory was short all the same, and little lay idle."""


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes of a batch: fixed + per_token x its tokens."""

    fixed: float
    per_token: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> "Line":
        """Through two measurements (tokens, bytes). Of tiny pictures the second may have no more tokens: then all bytes
        are taken to grow with them."""
        if second[0] <= first[0]:
            return cls(0.0, second[1] / second[0])
        slope = max(0.0, (second[1] - first[1]) / (second[0] - first[0]))
        return cls(max(0.0, second[1] - slope * second[0]), slope)

    def at(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a step takes above what is there between steps.

    kept: after the forward pass, where the last `blocks` keep as much, and those before them nothing; working: beyond
    that, while one block is computed.
    """

    kept: Mapping[Keep, Line]
    working: Line
    blocks: int

    def of_block(self, keep: Keep, tokens: int) -> float:
        """Bytes that one block keeps beyond its input."""
        return max(0.0, self.kept[keep].at(tokens) - self.kept[Keep.NOTHING].at(tokens)) / self.blocks

    def least(self, tokens: int) -> float:
        """Bytes of a step in which nothing is kept."""
        return self.kept[Keep.NOTHING].at(tokens) + self.working.at(tokens)


@dataclass(slots=True)
class Budget:
    """What each main block keeps, of a batch's tokens and the number of blocks: a `Keeping` of dit.py.

    available: bytes for what a step takes above what is there between steps; withheld: of these, what is not planned
    with, because it was short all the same; last: the batch that was asked for last.
    """

    sizes: Sizes
    available: float
    withheld: float = 0.0
    last: tuple[int, int] | None = None

    def __call__(self, tokens: int, blocks: int) -> Sequence[Keep]:
        self.last = (tokens, blocks)
        return self.plan(tokens, blocks)

    def keep_less(self, idle: float) -> bool:
        """Withholds what lay idle, and more, until the last batch keeps less; False where it keeps nothing already."""
        if self.last is None or max(before := self.plan(*self.last)) == Keep.NOTHING:
            return False
        self.withheld = max(self.withheld, idle)
        while self.plan(*self.last) == before:
            self.withheld += _WITHHELD * self.available
        return True

    def plan(self, tokens: int, blocks: int) -> Sequence[Keep]:
        """Raises InputError where a batch does not fit with nothing kept."""
        free = self.available - self.sizes.least(tokens)
        if free < 0:
            raise InputError(
                f"a batch of {tokens:,} tokens takes {self.sizes.least(tokens) / GIB:.1f} GiB above the weights with"
                f" nothing kept, and {self.available / GIB:.1f} GiB are there; lower train.train_batch_size or"
                " data.resolution, or raise memory.budget_gib"
            )
        free = max(0.0, free - self.withheld)
        kept, below = [Keep.NOTHING] * blocks, 0.0
        for keep in (Keep.COSTLY, Keep.PRODUCTS, Keep.EVERYTHING):
            bytes_more = max(self.sizes.of_block(keep, tokens) - below, 1.0)
            count = min(blocks, int(free / bytes_more))
            # The last blocks' activations are gone when the first blocks are computed again.
            kept[blocks - count :] = [keep] * count
            if count < blocks:
                break
            free, below = free - count * bytes_more, below + bytes_more
        return kept


@dataclass(slots=True)
class Retries:
    """Computes a whole optimizer step again, with less kept, where memory is short in one of its micro-steps.

    Nothing that is drawn changes by it. How much memory lies idle between tensors, no measurement could tell before.
    model: an AdaptedDiT; is_alone: else the other processes would wait; advice: what to change where nothing helps.
    """

    model: Any
    device: torch.device
    is_alone: bool
    advice: str
    step: int = 0
    is_short: bool = False

    def of(self, begun: Sequence[ItemT], step: int) -> Iterator[ItemT]:
        """The last of the micro-steps that optimizer step `step` has begun with; all of them after one in which memory
        was short. Each is to be computed within `with` of this object."""
        self.step, waiting = step, [*begun[-1:]]
        while waiting:
            yield waiting.pop(0)
            if self.is_short:  # here, not in `__exit__`, where the traceback keeps the micro-step's tensors alive
                self.is_short, waiting = False, [*begun]
                self.model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        budget = self.model.execution.keeping
        if not (isinstance(budget, Budget) and self.is_alone and budget.keep_less(idle_bytes(self.device))):
            raise InputError(f"step {self.step}: {self.advice}") from error
        planned = f"activations may take {(budget.available - budget.withheld) / GIB:.2f} GiB from step {self.step} on"
        tqdm.write(f"{planned}: memory was short, and the step is computed again")
        self.is_short = True
        return True


def use_growing_segments() -> None:
    """Before a process first uses CUDA: its allocator's segments can then grow, and less memory is lost between tensors
    of mixed sizes. What the user has set stands."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


Probe: TypeAlias = Callable[[Callable[[int, int], Sequence[Keep]], bool], Tensor]
"""Runs the forward pass of a small or a larger batch (False, True), with this keeping; returns its loss, a scalar."""


def measure(forward: Probe, blocks: int, device: torch.device) -> Sizes:
    """Of two blocks or more, on a CUDA device. The gradients that it leaves are the caller's to clear.

    Only a few blocks, the last, keep more than nothing: all might not fit. Never the first, before which nothing may
    have a gradient: a compiler would make functions of their own for it.
    """
    few = min(_MEASURED, blocks - 1)
    kept: dict[Keep, Line] = {}
    working = []
    for keep in Keep:
        points, excess = [], []
        for is_larger in (False, True):
            tokens: list[int] = []

            def keeping(count: int, blocks: int, keep: Keep = keep, tokens: list[int] = tokens) -> Sequence[Keep]:
                tokens.append(count)
                return [Keep.NOTHING] * (blocks - few) + [keep] * few

            forward(keeping, is_larger).backward()  # compiles, and makes gradients
            _settle(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            loss = forward(keeping, is_larger)
            after = torch.cuda.memory_allocated(device)
            loss.backward()
            peak = torch.cuda.max_memory_allocated(device)
            del loss
            points.append((tokens[0], float(after - before)))
            excess.append((tokens[0], float(peak - after)))
        kept[keep] = Line.through(*points)
        working.append(Line.through(*excess))
    most = Line(max(line.fixed for line in working), max(line.per_token for line in working))
    return Sizes(kept, most, few)


def available_bytes(device: torch.device, budget_gib: float | None, pending: int) -> float:
    """Bytes for the activations of a step.

    budget_gib: what the whole process may take of the card, its CUDA context too; None: what is free now. pending:
    bytes that will be allocated later and stay, as an optimizer's moments.
    """
    _settle(device)
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    if budget_gib is None:
        whole = free + reserved
    else:
        context = min(total - free - reserved, GIB)  # other processes' memory is not ours
        whole = budget_gib * GIB - context
        if whole > free + reserved:
            raise InputError(
                f"memory.budget_gib {budget_gib:g} is more than the {(free + reserved + context) / GIB:.1f} GiB that"
                f" are free on {device}; lower it, or leave it out to take what is there"
            )
        torch.cuda.set_per_process_memory_fraction(whole / total, device.index or torch.cuda.current_device())
    return whole * (1 - RESERVE) - allocated - pending


def idle_bytes(device: torch.device) -> float:
    """That lie between tensors when there are most, by the peaks so far. Between kept tensors of mixed sizes the
    allocator cannot give back parts of its pages of 20 MiB."""
    if device.type != "cuda":
        return 0.0
    return float(torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device))


def _settle(device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
