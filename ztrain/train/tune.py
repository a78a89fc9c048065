"""What a run does with its device before its first step: compiles the blocks, and measures what it may keep.

Both on small batches of the run's own samples, through the run's own model and loss. Weights, random state and results
of the run are as if nothing had happened.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ztrain.cache.cache import Cache
from ztrain.cache.loader import Batch, read_batch
from ztrain.cache.order import SampleKey
from ztrain.cache.samples import Samples
from ztrain.config import Config
from ztrain.distributed.strategy import Strategy
from ztrain.errors import InputError
from ztrain.images import IMAGE_MULTIPLE
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import PATCH, Keeping
from ztrain.model.fast.block import Keep
from ztrain.model.fast.blocks import reads_real, slow_because
from ztrain.model.fast.budget import GIB, IDLE, MOMENTS_BYTES, REPLAYED_TOKENS, Budget, available_bytes, measure
from ztrain.model.fast.compiling import compile_blocks
from ztrain.model.fast.cuda_graphs import Replays
from ztrain.model.flow import loss

_SIDES = (1 / 4, 1 / 2)
"""Of the largest target's sides, for a batch of one; a larger batch has as many tokens in all."""
_TOKENS = 4096  # of a picture of 1024 x 1024


@dataclass(slots=True)
class Probe:
    """A small and a larger batch of a run, and its loss on them."""

    model: AdaptedDiT
    batch: Batch
    sides: tuple[tuple[int, int], tuple[int, int]]
    whole: Callable[[Any], Any]
    """Of a gradient that processes share."""

    @classmethod
    def of(
        cls,
        model: AdaptedDiT,
        config: Config,
        cache: Cache,
        samples: Samples,
        device: torch.device,
        whole: Callable[[Any], Any] = lambda gradient: gradient,
    ) -> "Probe":
        # With references, and from the longest prompt to the shortest: different lengths are computed in another way.
        known, count = samples.train.samples, config.train.train_batch_size
        by_length = sorted(range(len(known)), key=lambda place: -len(known[place].prompt))
        places = [by_length[round(i * (len(known) - 1) / max(1, count - 1))] for i in range(count)]
        keys = [SampleKey(config.seed, 0, place) for place in places]
        batch = read_batch(cache, [known[place] for place in places], keys, config.reads).to(device)
        largest = max((latents.shape[1:] for latents in batch.latents), key=math.prod)
        small, large = (
            tuple(max(1, round(side * share / PATCH / count**0.5)) * PATCH for side in largest) for share in _SIDES
        )
        return cls(model, batch, ((small[0], small[1]), (large[0], large[1])), whole)

    def loss(self, is_larger: bool) -> Tensor:
        shape = (len(self.batch.keys), len(self.batch.latents[0]), *self.sides[is_larger])
        device = self.batch.latents[0].device
        generator = torch.Generator().manual_seed(0)
        noise, latents = torch.randn((2, *shape), generator=generator).to(device)
        sigma = torch.full(shape[:1], 0.5, device=device)
        return loss(self.model, latents, noise, sigma, self.batch.encoded).mean()

    def keeping(self, keeping: Keeping, is_larger: bool) -> Tensor:
        self.model.execution.keeping = keeping
        return self.loss(is_larger)

    def gradients(self) -> dict[str, Tensor]:
        self.clear()
        self.loss(is_larger=False).backward()
        found = {name: self.whole(p.grad).clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.clear()
        return found

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)


def tune(
    model: AdaptedDiT,
    config: Config,
    cache: Cache,
    samples: Samples,
    say: Callable[[str], object],
    *,
    device: torch.device,
    strategy: Strategy,
) -> None:
    """Compiles a model's blocks and gives it its `keeping`, as the config says; on a CPU only if that insists. All
    processes call it."""
    num_processes = strategy.accelerator.num_processes
    t, is_cuda = config.train, device.type == "cuda"
    compiles = t.compile == "on" or (t.compile == "auto" and is_cuda)
    measures = t.gradient_checkpointing == "budget" and is_cuda
    if config.memory.budget_gib is not None and not measures:
        raise InputError(
            f"memory.budget_gib {config.memory.budget_gib:g} needs train.gradient_checkpointing budget and a CUDA GPU"
        )
    if not compiles and not measures:
        return
    with torch.random.fork_rng([device] if is_cuda else []):
        probe = Probe.of(model, config, cache, samples, device, strategy.number)
        if measures:  # so that every way of keeping is compared
            model.execution.keeping = lambda _, blocks: [Keep(i * len(Keep) // blocks) for i in range(blocks)]
        if compiles:
            done = compile_blocks(model.dit, probe.gradients, say)
            if t.compile == "on" and not done:
                raise InputError("train.compile on: the blocks could not be compiled; auto goes on without")
        if measures:
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            pending = trained * (4 + MOMENTS_BYTES[t.optimizer]) // (num_processes if strategy.shards_base else 1)
            available = available_bytes(device, config.memory.budget_gib, pending)
            try:
                sizes = measure(probe.keeping, len(model.dit.layers), device)
            except torch.OutOfMemoryError as error:
                limit = config.memory.budget_gib
                room = "what is free on the GPU" if limit is None else f"memory.budget_gib {limit:g}"
                raise InputError(
                    f"half of the largest target's sides is too much for {room}; make room, lower data.resolution or"
                    " train.train_batch_size, or take train.optimizer adamw_8bit"
                ) from error
            probe.clear()
            if num_processes > 1:
                available *= 1 - IDLE
            fast = reads_real(model.dit) and slow_because(model.dit) is None
            if (
                fast
                and num_processes == 1
                and not strategy.shards_base
                and t.train_batch_size * _image_tokens(samples) <= REPLAYED_TOKENS
            ):
                # Graphs keep their memory: beside it a batch of a new size must fit once more.
                available /= 2
                model.execution.run = Replays(REPLAYED_TOKENS)
            budget = Budget(sizes, available)
            model.execution.keeping = budget
            say(_describe(budget, len(model.dit.layers)))


def _image_tokens(samples: Samples) -> int:
    """Of the largest target."""
    return max(sample.bucket.height * sample.bucket.width for sample in samples.trained) // IMAGE_MULTIPLE**2


def _describe(budget: Budget, blocks: int) -> str:
    sizes = budget.sizes
    more = (f"{blocks * sizes.of_block(keep, _TOKENS) / GIB:.2f} with {keep.name.lower()}" for keep in list(Keep)[1:])
    return (
        f"activations may take {budget.available / GIB:.1f} GiB; a picture of 1024 x 1024 takes"
        f" {sizes.least(_TOKENS) / GIB:.2f} with nothing kept, more by {', by '.join(more)}"
    )
