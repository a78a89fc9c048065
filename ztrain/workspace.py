"""A scratch folder for one process: what it leaves behind when it is killed, the next one removes."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A scratch folder inside `folder` for as long as this process works, after removing those of dead processes."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(".writing-*.lock"):
        lock = FileLock(path, timeout=0)
        try:
            with lock:
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink(missing_ok=True)
        except Timeout:
            continue  # its process is alive
    place = folder / f".writing-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with FileLock(f"{place}.lock"):
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            Path(f"{place}.lock").unlink(missing_ok=True)
