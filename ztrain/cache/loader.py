"""Cached samples as batches, read some way ahead of training; and dropout of prompt and reference.

Every batch is a function of its keys (order: order.py), so the number of workers changes nothing. Workers are
threads: reading a memory-mapped file and hashing it leaves Python's lock free; processes would copy every tensor.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ztrain.cache.cache import Cache
from ztrain.conditioning import Dropout, Encoded, concatenate, moved
from ztrain.config import Config
from ztrain.model.flow import draw_dropout
from ztrain.resolve import given
from ztrain.cache.order import SampleKey
from ztrain.cache.samples import Sample
from ztrain.frozen.states import assemble

_AHEAD = 2  # batches that wait in memory for each worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples of one process and micro-step. latents: B x (C, H, W) float32."""

    keys: list[SampleKey]
    latents: list[Tensor]
    encoded: Encoded

    def to(self, device: torch.device) -> "Batch":
        latents = [moved(sample, device) for sample in self.latents]
        return Batch(keys=self.keys, latents=latents, encoded=self.encoded.to(device))


def read_batch(
    cache: Cache,
    samples: Sequence[Sample],
    keys: Sequence[SampleKey],
    reads: frozenset[str],
    negative_prompt: str = "",
) -> Batch:
    """`samples` with their cached states. Raises InputError for a state that is missing or damaged."""
    states = cache.states()
    prompts, references = [sample.prompt for sample in samples], [sample.references for sample in samples]
    return Batch(
        keys=list(keys),
        latents=[states.latents(sample.target, sample.bucket).float() for sample in samples],
        encoded=assemble(states, prompts, references, reads, negative_prompt=negative_prompt),
    )


@dataclass(frozen=True, slots=True)
class Loader:
    """Iterates over one process's batches in the order's order. Errors of a worker are raised as they are."""

    config: Config
    cache: Cache
    samples: Sequence[Sample]
    order: Iterable[list[SampleKey]]

    def __iter__(self) -> Iterator[Batch]:
        workers = self.config.data.dataloader_num_workers
        if not workers:
            yield from map(self.read, self.order)
            return
        waiting: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        try:
            for keys in self.order:
                waiting.append(pool.submit(self.read, keys))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def read(self, keys: Sequence[SampleKey]) -> Batch:
        """The batch of these keys, with what dropout leaves of each sample."""
        t = self.config.train
        text, reference, both = given(t.dropout_text), given(t.dropout_reference), given(t.dropout_both)
        dropout = Dropout(text=text, reference=reference, both=both)
        samples = [self.samples[key.index].visited(key) for key in keys]
        batch = read_batch(self.cache, samples, keys, self.config.reads)
        kept = [dropout.apply(batch.encoded.select([i]), draw_dropout(key)) for i, key in enumerate(keys)]
        return Batch(keys=batch.keys, latents=batch.latents, encoded=concatenate(kept))
