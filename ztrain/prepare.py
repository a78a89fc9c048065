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


def prepare(
    config: Config, device: torch.device | str, accelerator: Accelerator
) -> tuple[Cache, Samples, Sequence[StateName]]:
    """A cache that holds all that training reads, the usable samples, and the kinds of states that adapters read."""
    with accelerator.main_process_first():
        cache = Cache(config)
        samples = read_samples(config, cache)
    for filled in _fill_and_drop(config, cache, samples, device, accelerator):
        if filled.computed:
            accelerator.print(describe(filled))
    for split in samples.splits:
        if split.rejected:
            accelerator.print(f"{split.name}: left out {len(split.rejected)}, first: {split.rejected[0]}")
    own = Needs()
    needs_of(samples.trained[:1], config.reads, own)
    return cache, samples, [kind for kind, _ in own.requests]


def _fill_and_drop(
    config: Config, cache: Cache, samples: Samples, device: torch.device | str, accelerator: Accelerator
) -> list[Filled]:
    """Fills until nothing that is needed is missing: other held-out samples may take the place of refused ones."""
    done = []
    while True:
        done.append(fill(cache, all_needs(config, samples), device, progress=accelerator.is_main_process))
        accelerator.wait_for_everyone()
        if not drop_refused(config, samples, cache):
            return done


def cache_states(config: Config, *, check: bool) -> str:
    """`ztrain cache`: fills the cache of a config, or with `check` verifies it; says what was done."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = Cache(config)
    samples = read_samples(config, cache)
    if check:
        drop_refused(config, samples, cache)
        return verify(cache, all_needs(config, samples), device)
    lines = []
    while True:
        filled = fill(cache, all_needs(config, samples), device)
        lines.append(describe(filled))
        if not drop_refused(config, samples, cache):
            break
    for split in samples.splits:
        tqdm.write(f"{split.name}: {len(split.samples)} triplets, {len(split.rejected)} left out")
    return lines[0]


def describe(filled: Filled) -> str:
    """One line: what was computed, how fast, and how busy the encoders were."""
    if not filled.computed:
        return "cache: nothing to compute, everything is there"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(filled.computed.items()))
    refused = f", {len(filled.refused)} refused" if filled.refused else ""
    return f"cache: computed {kinds}{refused} in {filled.seconds:.1f} s, encoders busy {filled.busy_share:.0%}"
