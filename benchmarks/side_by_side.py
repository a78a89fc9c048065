"""Several of the project's own commands side by side, dealt to the GPUs there are, each with a log of its own."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ztrain.errors import InputError


def run_modules(
    commands: Sequence[tuple[str, ...]],
    logs: Sequence[Path],
    jobs: int,
    then: Callable[[int], None] = lambda place: None,
) -> None:
    """Runs `python -m <command>` for each, at most `jobs` at a time, each on the GPU with the fewest of them, and calls
    `then` with the place of each that is done. Raises InputError for the first that fails, with its log's name and last
    lines; those that are under way then are waited for."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    seats: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for job in range(jobs):
        seats.put(_gpu(job))

    ended = threading.Event()

    def run(place: int) -> None:
        if ended.is_set():  # this thread was given the next one before it could be cancelled
            return
        log, seat = logs[place], seats.get()
        with log.open("ab") as file:
            words, own = [sys.executable, "-m", *commands[place]], environment | seat
            done = subprocess.run(words, check=False, env=own, stdout=file, stderr=subprocess.STDOUT)
        seats.put(seat)
        if done.returncode:
            ended.set()
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise InputError(f"{' '.join(commands[place][:2])} failed, see {log}: {' | '.join(last)}")

    with ThreadPoolExecutor(jobs) as pool:
        places = {pool.submit(run, place): place for place in range(len(commands))}
        bar = tqdm(total=len(places), desc=commands[0][0] if commands else "", unit="process", disable=None)
        try:
            for future in as_completed(places):
                future.result()
                then(places[future])
                bar.update()
        finally:  # after a failure nothing new begins
            ended.set()
            pool.shutdown(cancel_futures=True)


def _gpu(job: int) -> dict[str, str]:
    """The environment that shows job number so many one of the GPUs; as it is where there are less than two."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": names[job % len(names)]} if len(names) > 1 else {}
