"""From a config to a full cache: reads the triplets, computes what is missing. `ztrain cache`, and training's start.

In a run of several processes each does its part of the filling; the main one reads the data first, so that the others
find the digests of all pictures in the memo.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object

from ztrain.cache.cache import Cache, Needs
from ztrain.config import Config
from ztrain.errors import MENDABLE, InputError
from ztrain.cache.fill import FillCounts, fill, verify
from ztrain.distributed.launched import start_accelerator
from ztrain.cache.samples import Samples, all_needs, drop_refused, needs_of, read_samples
from ztrain.distributed.agreement import together

_PATIENCE = timedelta(hours=12)  # the others wait while the main process reads every picture of a data set


def prepare(
    config: Config, device: torch.device | str, accelerator: Accelerator
) -> tuple[Cache, Samples, Sequence[str]]:
    """A cache that holds all that training reads, the usable samples, and the kinds of states that adapters read."""
    cache, samples = _read_together(config, accelerator)
    filled = _fill_and_drop(config, cache, samples, device, accelerator)
    if filled.computed:
        accelerator.print(describe(filled))
    for split in samples.splits:
        if split.rejected:
            accelerator.print(f"{split.name}: left out {len(split.rejected)}, first: {split.rejected[0]}")
        if split.small:
            accelerator.print(f"{split.name}: {split.small}")
    own = Needs()
    needs_of(samples.trained[:1], config.reads, own)
    return cache, samples, [kind for kind, _ in own.requests]


def _read_together(config: Config, accelerator: Accelerator) -> tuple[Cache, Samples]:
    found: tuple[Cache, Samples] | None = None
    for main_turn in (True, False):  # the others find in the memo what the main process has read
        with together(accelerator):
            if accelerator.is_main_process == main_turn:
                found = _read(config)
    assert found is not None
    return found


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
) -> FillCounts:
    """Fills until nothing that is needed is missing: other held-out samples may take the place of refused ones.

    What all processes did; a failure of one is raised on all, after the shards that the others are at work on.
    """
    own = FillCounts()
    while True:
        with _failing_together(cache.folder, accelerator) as has_failed:
            own.add(
                fill(
                    cache,
                    all_needs(config, samples),
                    device,
                    progress=accelerator.is_main_process,
                    is_over=has_failed,
                )
            )
        with together(accelerator):  # after everybody's part is there
            for kind in {kind for kind, _ in all_needs(config, samples).requests}:
                cache.store(kind).reload()
            dropped = drop_refused(config, samples, cache)
        if not dropped:
            return FillCounts.of_all(gather_object([own]))


@contextlib.contextmanager
def _failing_together(folder: Path, accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """`together` for work of hours: gives what tells whether another process has failed meanwhile.

    By a file, as a process at work takes part in no collective; one on a file system of its own learns of it later.
    """
    [name] = broadcast_object_list([uuid.uuid4().hex])
    flag = folder / f".failed-{name}"
    try:
        with together(accelerator):
            try:
                yield flag.exists
            except MENDABLE:
                if accelerator.num_processes > 1:
                    with contextlib.suppress(OSError):
                        flag.touch()
                raise
    finally:
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):
                flag.unlink(missing_ok=True)


def cache_states(config: Config, *, check: bool) -> str:
    """`ztrain cache`: fills the cache of a config, or with `check` verifies it; says what was done.

    Under a launcher every process fills its part on a card of its own, and the main one alone verifies. The words are
    the main process's; empty on the others. Raises InputError on all of them if one fails.
    """
    accelerator = start_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
    try:
        said = _cache_states(config, accelerator, check=check)
    except InputError:
        _leave(accelerator)
        raise
    _leave(accelerator)
    return said


def _cache_states(config: Config, accelerator: Accelerator, *, check: bool) -> str:
    """Every InputError is one of `together`, and so of all processes."""
    cache, samples = _read_together(config, accelerator)
    said = ""
    if check:
        with together(accelerator):
            if accelerator.is_main_process:
                drop_refused(config, samples, cache)
                said = verify(cache, all_needs(config, samples), accelerator.device)
        return said
    filled = _fill_and_drop(config, cache, samples, accelerator.device, accelerator)
    for split in samples.splits:
        accelerator.print(split.told)
        if split.small:
            accelerator.print(f"{split.name}: {split.small}")
    return describe(filled) if accelerator.is_main_process else ""


def _leave(accelerator: Accelerator) -> None:
    """The process group, where there is one, after a collective that holds no Python object: gloo aborts now and then
    where its threads let go of one while Python ends."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


def describe(filled: FillCounts) -> str:
    """One line: what was computed, how fast, how busy the encoders were, and how several processes shared the work."""
    if not filled.computed:
        return "cache: nothing to compute, everything is there"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(filled.computed.items()))
    refused = f", {len(filled.refused)} refused" if filled.refused else ""
    each = ", ".join(map(str, filled.by_process))
    shared = f" by {len(filled.by_process)} processes ({each})" if len(filled.by_process) > 1 else ""
    return f"cache: computed {kinds}{refused}{shared} in {filled.seconds:.1f} s, encoders busy {filled.busy_share:.0%}"
