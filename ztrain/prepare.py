"""From a config to a full cache: reads the triplets, computes what is missing. `ztrain cache`, and training's start.

In a run of several processes each does its part of the filling; the main one reads the data first, so that the others
find the digests of all pictures in the memo.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ztrain.cache import Cache, Needs, StateName
from ztrain.config import Config
from ztrain.fill import Filled, fill, verify
from ztrain.samples import Samples, all_needs, drop_refused, needs_of, read_samples
from ztrain.together import together


def prepare(
    config: Config, device: torch.device | str, accelerator: Accelerator
) -> tuple[Cache, Samples, Sequence[StateName]]:
    """A cache that holds all that training reads, the usable samples, and the kinds of states that adapters read."""
    found: tuple[Cache, Samples] | None = None
    for main_turn in (True, False):  # the others find in the memo what the main process has read
        with together(accelerator):
            if accelerator.is_main_process == main_turn:
                found = _read(config)
    assert found is not None
    cache, samples = found
    for filled in _fill_and_drop(config, cache, samples, device, accelerator):
        if filled.computed:
            accelerator.print(describe(filled))
    for split in samples.splits:
        if split.rejected:
            accelerator.print(f"{split.name}: left out {len(split.rejected)}, first: {split.rejected[0]}")
    own = Needs()
    needs_of(samples.trained[:1], config.reads, own)
    return cache, samples, [kind for kind, _ in own.requests]


def _read(config: Config) -> tuple[Cache, Samples]:
    """Cache and samples, with the digests of all pictures and encoder files in the memo for the next one who asks."""
    cache = Cache(config)
    try:
        samples = read_samples(config, cache)
        cache.missing(all_needs(config, samples))  # asks for every fingerprint
    finally:
        cache.digests.save()
    return cache, samples


def _fill_and_drop(
    config: Config, cache: Cache, samples: Samples, device: torch.device | str, accelerator: Accelerator
) -> list[Filled]:
    """Fills until nothing that is needed is missing: other held-out samples may take the place of refused ones."""
    done = []
    while True:
        with together(accelerator):
            done.append(fill(cache, all_needs(config, samples), device, progress=accelerator.is_main_process))
        with together(accelerator):  # after everybody's part is there
            for kind in {kind for kind, _ in all_needs(config, samples).requests}:
                cache.store(kind).reload()
            dropped = drop_refused(config, samples, cache)
        if not dropped:
            return done


def cache_states(config: Config, *, check: bool) -> str:
    """`ztrain cache`: fills the cache of a config, or with `check` verifies it; says what was done."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache, samples = _read(config)
    if check:
        drop_refused(config, samples, cache)
        return verify(cache, all_needs(config, samples), device)
    done = [fill(cache, all_needs(config, samples), device)]
    while drop_refused(config, samples, cache):
        done.append(fill(cache, all_needs(config, samples), device))
    for split in samples.splits:
        tqdm.write(f"{split.name}: {len(split.samples)} triplets, {len(split.rejected)} left out")
    return describe(done[0])


def describe(filled: Filled) -> str:
    """One line: what was computed, how fast, and how busy the encoders were."""
    if not filled.computed:
        return "cache: nothing to compute, everything is there"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(filled.computed.items()))
    refused = f", {len(filled.refused)} refused" if filled.refused else ""
    return f"cache: computed {kinds}{refused} in {filled.seconds:.1f} s, encoders busy {filled.busy_share:.0%}"
