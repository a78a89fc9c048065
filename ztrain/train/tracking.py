"""The record of a run: metrics.jsonl, one strict JSON object a step, whole after any end; and its mirror, if asked.

In: numbers, pictures and files of the main process. Out: `<folder>/metrics.jsonl`; what else wandb_mirror.py makes.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ztrain.config import TrackingConfig
from ztrain.errors import InputError
from ztrain.io.files import write_bytes
from ztrain.train.wandb_mirror import Mirror


class Record:
    """For the main process only."""

    def __init__(
        self, folder: Path, tracking: TrackingConfig, config: dict[str, Any], *, resumed_step: int | None
    ) -> None:
        """`resumed_step` None: a fresh run, in a folder without metrics.jsonl. Otherwise rows after that step are
        dropped, as is a last line that was never finished; the rows that stay keep their bytes."""
        self._path = folder / "metrics.jsonl"
        with _explained(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            if resumed_step is None and self._path.exists():
                raise InputError(f"{self._path} already holds a run; name another folder or resume it")
            self._last_step = -1 if resumed_step is None else _cut(self._path, resumed_step)
        fresh = resumed_step is None
        self.mirror = Mirror(folder, tracking, config, fresh=fresh) if tracking.report_to == "wandb" else None
        with _explained(self._path):
            self._file = open(self._path, "ab", buffering=0)

    def log(
        self,
        step: int,
        values: dict[str, float],
        *,
        grid: Path | None = None,
        table: Sequence[dict[str, str | Path]] | None = None,
    ) -> None:
        """Writes one row. `grid` and `table` go to W&B only; paths in the table's cells become pictures."""
        if step <= self._last_step:
            raise ValueError(f"step {step} is not after step {self._last_step}, the last one in {self._path.name}")
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"step {step}: {name} is {value}; only finite numbers are recorded")
        assert "step" not in values
        row = json.dumps({"step": step} | values, allow_nan=False).encode() + b"\n"
        with _explained(self._path):
            while row:  # a full disk may take a part before it refuses the rest
                row = row[self._file.write(row) :]
        self._last_step = step
        if self.mirror:
            self.mirror.log(step, values, grid, table)

    def rows(self) -> list[dict[str, float]]:
        """All that was recorded, one row a step with its `step`."""
        return [json.loads(line) for line in self._path.read_bytes().splitlines()]

    def log_folder(self, name: str, kind: Literal["model", "dataset"], files: Sequence[Path]) -> None:
        """Adds files to the W&B run as one artifact; `name` of letters, digits, dashes, underscores and dots."""
        if self.mirror:
            self.mirror.log_files(name, kind, files)

    def close(self, *, failed: bool) -> None:
        self._file.close()
        if self.mirror:
            self.mirror.close(failed)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot keep the record in {path}: {reason}; make room there, then resume from the last checkpoint"
        ) from error


def _cut(path: Path, step: int) -> int:
    """Keeps the rows up to `step` and gives the last of their steps."""
    content = path.read_bytes() if path.exists() else b""
    lines = content.split(b"\n")[:-1]  # what has no line end was never finished
    steps = [_step_of(line) for line in lines]
    # A machine that lost power may leave anything at the end of a file, but not in its middle.
    readable = next((number for number, found in enumerate(steps) if found is None), len(lines))
    if any(found is not None for found in steps[readable:]):
        raise InputError(f"{path}:{readable + 1} is no row of metrics; restore it or remove the line")
    kept = [(found, line) for found, line in zip(steps, lines, strict=True) if found is not None and found <= step]
    if content != (rows := b"".join(line + b"\n" for _, line in kept)):
        write_bytes(path, rows, sync=True)
    return kept[-1][0] if kept else -1


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
