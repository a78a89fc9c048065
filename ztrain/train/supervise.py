"""What watches over a training run, from before its process group to after it: signals and the watchdog.

A signal before the first step ends this process at once, and the others follow; later it ends all after the same step,
which is saved. A process that hangs or is gone ends all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

from accelerate import Accelerator, InitProcessGroupKwargs

from ztrain.config import TrainConfig
from ztrain.distributed.launched import start_accelerator
from ztrain.distributed.strategy import KWARGS
from ztrain.distributed.watchdog import Watchdog
from ztrain.interrupt import Interruption

_COLLECTIVE_TIMEOUT = timedelta(days=30)  # watchdog.py ends what hangs, and knows whether anybody still moves


class Supervisor(NamedTuple):
    """Of one process."""

    accelerator: Accelerator
    interruption: Interruption
    watchdog: Watchdog


@contextmanager
def supervised(train: TrainConfig) -> Iterator[Supervisor]:
    """Around all that a process does of a run; makes its Accelerator, and takes its process group down."""
    interruption = Interruption()
    watchdog = Watchdog(60 * train.hang_timeout_minutes, interruption)
    interruption.install()
    try:
        with watchdog.watching():
            with interruption.at_once():
                accelerator = start_accelerator(
                    gradient_accumulation_steps=train.gradient_accumulation_steps,
                    kwargs_handlers=[KWARGS, InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT)],
                )
            watchdog.join(accelerator.process_index, accelerator.num_processes)
            yield Supervisor(accelerator, interruption, watchdog)
            interruption.restore()
            watchdog.mark("ending")
            # DDP first, its process group after: in another order, or left to Python's end, gloo now and then hangs or
            # aborts.
            accelerator.free_memory()
            accelerator.wait_for_everyone()
        accelerator.end_training()
    finally:
        interruption.restore()
