"""A trainer with faults, for tests: `python -m tests.faults FAULT[,FAULT] RANK WORD ...` runs ztrain.train WORD ...

The process of that rank goes wrong by itself, so that no test has to catch the moment. A rank of -1 is every one.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import ztrain.cache.prepare
import ztrain.train.loop
import ztrain.train.run
import ztrain.train.validate

STEP = 3
"""Step, from 1, in which a fault in the loop comes."""


def forever() -> None:
    while True:
        time.sleep(1)


def spin() -> None:
    """As a loop that does not end."""
    while True:
        pass


def raise_plainly() -> None:
    raise RuntimeError("a fault of this rank alone")


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory, says a fault of this rank alone")


def full_disk() -> None:
    """From here on no file may grow beyond 20 kB, as with a quota: the record still fits, a checkpoint does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def at_step(act: Callable[[], None]) -> None:
    """In the computing of `STEP`, of one micro-step."""
    plain = ztrain.train.loop.seed_micro_step

    def faulty(seed: int, micro_step: int, rank: int) -> None:
        if micro_step + 1 == STEP:
            act()
        plain(seed, micro_step, rank)

    ztrain.train.loop.seed_micro_step = faulty


def reading() -> None:
    """No data for `STEP`."""
    plain = ztrain.train.loop.Loader

    class Faulty(plain):
        def __iter__(self) -> Iterator[Any]:
            for number, batch in enumerate(super().__iter__(), start=1):
                if number == STEP:
                    forever()
                yield batch

    ztrain.train.loop.Loader = Faulty


def stuck_save() -> None:
    """The save of `STEP` does not end."""
    plain = ztrain.train.run.checkpoint.publish

    def faulty(folder: Path, step: int, *rest: Any) -> Any:
        if step == STEP:
            forever()
        return plain(folder, step, *rest)

    ztrain.train.run.checkpoint.publish = faulty


def slow(module: Any, name: str, seconds: float) -> None:
    """A function that takes its time, in many short pieces."""
    plain = getattr(module, name)

    def faulty(*words: Any, **more: Any) -> Any:
        print(f"slow {name}", file=sys.stderr, flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            Path(__file__).read_bytes()  # as one that reads pictures
            time.sleep(0.01)
        return plain(*words, **more)

    setattr(module, name, faulty)


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "reading": reading,
    "stuck_save": stuck_save,
    "spin": lambda: at_step(spin),
    "raises": lambda: at_step(raise_plainly),
    "no_memory": lambda: at_step(no_memory),
    "full_disk": lambda: at_step(full_disk),
    "killed": lambda: at_step(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "halted": lambda: at_step(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "slow_fill": lambda: slow(ztrain.cache.prepare, "fill", 8),
    "long_fill": lambda: slow(ztrain.cache.prepare, "fill", 100),
    "slow_validation": lambda: slow(ztrain.train.validate, "read_batch", 0.4),
}

if __name__ == "__main__":
    fault, rank, *words = sys.argv[1:]
    if int(rank) in (-1, int(os.environ["RANK"])):
        for name in fault.split(","):
            FAULTS[name]()
    sys.exit(ztrain.train.loop.main(words))
