"""The processes of one job, as a launcher would start them but through the forge: real gloo, and no import time.

For what the processes do together. What the launcher itself does is tested with it.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.forge import Forged, the_forge


def session_of(leader: int) -> list[int]:
    """Living processes of a session, by their process numbers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


class Ranks:
    """`python -m <arguments>` as `count` processes on this machine, or some of them; their logs lie in a folder.

    In a `with` none is left at its end.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: dict[str, str],
        count: int,
        folder: Path,
        only: Sequence[int] | None = None,
    ) -> None:
        self.started: list[Forged] = []
        self.logs = [folder / f"log-{rank}" for rank in range(count)]
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(the_forge().free_port())}
        for log in self.logs:
            log.write_text("")
        for rank in range(count) if only is None else only:
            own = environment | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.started.append(the_forge().start(arguments, own, self.logs[rank], self.logs[rank]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.statuses()

    def text(self) -> str:
        return "".join(log.read_text() for log in self.logs)

    def living(self) -> list[int]:
        return [pid for process in self.started for pid in session_of(process.pid)]

    def kill(self) -> None:
        """All at once, with what they started."""
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def statuses(self, seconds: float = 120) -> list[int]:
        """How they ended, each by itself: who still runs after so many seconds is killed."""
        deadline = time.monotonic() + seconds
        try:
            for process in self.started:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
        return [process.wait(10) for process in self.started]


def run(arguments: Sequence[str], environment: dict[str, str], count: int, status: int = 0) -> str:
    """What all said, rank by rank; each must end with that status."""
    with (
        tempfile.TemporaryDirectory(dir=the_forge().folder) as folder,
        Ranks(arguments, environment, count, Path(folder)) as ranks,
    ):
        assert ranks.statuses() == [status] * count, ranks.text()
        return ranks.text()
