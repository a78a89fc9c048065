"""What sending gradients takes of a DDP step: by turns, windows of steps in which processes send and do not send.

    accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2 -m benchmarks.alternating WORD ...

Cards drift by a percent or two within minutes, which is as much as what is sought: two runs, one after the other, do
not tell it. WORD: as for ztrain.train, whose loop this is; one micro-step to an optimizer step, and
--train.max_train_steps of `steps_of`. Out: `<output_dir>/alternating.json`, {"ms": of a step that sends, "ms_of_cards":
of one that does not, on each card by itself, "windows": of each kind}; medians. The weights are worth nothing: those of
processes that do not send go apart.
"""

import json
import statistics
import sys
from typing import Any

from accelerate.utils import gather_object

from ztrain import train
from ztrain.meter import Meter
from ztrain.run import Run

FIRST, WINDOW, SETTLING = 12, 14, 4
"""Steps before the first window, since DDP looks at itself in its first ten; of a window; of these the first, which are
not counted: who went on alone waits for the others there."""


def steps_of(windows: int) -> int:
    """Of a run with so many windows of each kind."""
    return FIRST + 2 * windows * WINDOW


def sends(step: int) -> bool:
    """In a step, counted from 1. The first window is one without."""
    return step <= FIRST or (step - FIRST - 1) // WINDOW % 2 == 1


def is_counted(step: int) -> bool:
    return step > FIRST and (step - FIRST - 1) % WINDOW >= SETTLING


class Turns:
    """Around `_take_step` and `Meter.read` of the loop: what ends a step, and what its figures are."""

    def __init__(self) -> None:
        self.take, self.read = train._take_step, Meter.read
        self.seconds: dict[bool, list[float]] = {True: [], False: []}  # by whether a step sends
        self.gather: Any = None
        self.run: Any = None

    def take_step(self, run: Run, meter: Meter) -> None:
        self.take(run, meter)
        accelerator, following = run.accelerator, sends(run.step + 2)
        self.run, self.gather = run, self.gather or accelerator.gather
        run.wrapped.require_backward_grad_sync = following
        # The meter's figures go the same way.
        accelerator.gather = self.gather if following else lambda own: own.repeat(accelerator.num_processes, 1)

    def read_figures(self, meter: Meter) -> tuple[dict[str, float], int]:
        values, stop = self.read(meter)
        if is_counted(meter.step):
            self.seconds[sends(meter.step)].append(values["perf/step_seconds"])
        if meter.step == self.run.config.train.max_train_steps:
            self.write()
        return values, stop

    def write(self) -> None:
        medians = {way: round(1e3 * statistics.median(seconds), 2) for way, seconds in self.seconds.items()}
        alone, together = (gather_object([medians[way]]) for way in (False, True))
        if self.run.accelerator.is_main_process:
            windows = len(self.seconds[True]) // (WINDOW - SETTLING)
            found = {"ms": together[0], "ms_of_cards": alone, "windows": windows}
            (self.run.folder / "alternating.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


def main() -> int:
    turns: Any = Turns()
    train._take_step = turns.take_step
    patched: Any = Meter
    patched.read = lambda meter: turns.read_figures(meter)
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
