"""Cached samples as batches: the data set, dropout of prompt and reference, and the loader of one process.

Every item is a function of its key, so workers and processes may come and go. Order: sampler.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ztrain.cache import Cache
from ztrain.conditioning import Dropout, Encoded, concatenate
from ztrain.config import Config
from ztrain.encoders import assemble
from ztrain.errors import InputError
from ztrain.flow import draw_dropout
from ztrain.interrupt import ignore_signals
from ztrain.sampler import MicroBatches, SampleKey
from ztrain.samples import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples of one process and micro-step. latents: B x (C, H, W) float32."""

    keys: list[SampleKey]
    latents: list[Tensor]
    encoded: Encoded

    def to(self, device: torch.device) -> "Batch":
        latents = [sample.to(device, non_blocking=True) for sample in self.latents]
        return Batch(keys=self.keys, latents=latents, encoded=self.encoded.to(device))


def read_batch(cache: Cache, samples: Sequence[Sample], keys: Sequence[SampleKey], reads: frozenset[str]) -> Batch:
    """`samples` with their cached states. Raises InputError for a state that is missing or damaged."""
    states = cache.states()
    return Batch(
        keys=list(keys),
        latents=[states.latents(sample.target, sample.bucket).float() for sample in samples],
        encoded=assemble(states, [sample.prompt for sample in samples], [s.references for s in samples], reads),
    )


class CachedSamples(Dataset):
    """SampleKey -> Batch of one, with what dropout leaves of it. Indexed by keys, which the sampler gives."""

    def __init__(self, config: Config, cache: Cache, samples: Sequence[Sample]) -> None:
        train = config.train
        self.cache, self.samples, self.reads = cache, samples, config.reads
        self.dropout = Dropout(text=train.dropout_text, reference=train.dropout_reference, both=train.dropout_both)

    def __getitem__(self, key: SampleKey) -> Batch | InputError:
        """A damaged entry comes back as its error: raised in a worker it would arrive wrapped in a traceback."""
        try:
            batch = read_batch(self.cache, [self.samples[key.index]], [key], self.reads)
        except InputError as error:
            return error
        return Batch(
            keys=batch.keys, latents=batch.latents, encoded=self.dropout.apply(batch.encoded, draw_dropout(key))
        )


def _together(items: list[Batch | InputError]) -> Batch | InputError:
    """The micro-batch, or the first thing that is wrong with it."""
    batches = []
    for item in items:
        if isinstance(item, InputError):
            return item
        batches.append(item)
    return Batch(
        keys=[key for batch in batches for key in batch.keys],
        latents=[sample for batch in batches for sample in batch.latents],
        encoded=concatenate([batch.encoded for batch in batches]),
    )


def make_loader(config: Config, cache: Cache, samples: Sequence[Sample], order: MicroBatches) -> DataLoader:
    """One process's batches in the order's order."""
    return DataLoader(
        CachedSamples(config, cache, samples),
        batch_sampler=order,  # type: ignore[arg-type]  # gives keys, not numbers
        num_workers=config.data.dataloader_num_workers,
        collate_fn=_together,
        worker_init_fn=ignore_signals,
    )
