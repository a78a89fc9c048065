"""What building data costs and finds: planted copies, near-duplicates by embedding, and scanning beside a bare decode.

    python -m benchmarks.data_tools [PART ...] [--out DIR] [--smoke]

In: ../shared/data (photos, emoji_styles). Out: data_tools.json, {"command", "machine", "date", "planted_duplicates",
"semantic_dedup", "scan"}; parts that are not named stay. scan: seconds of data_tools.scan for photographs under many
names, hashes only and with all columns, in turns with as many plain Pillow decodes on the same number of processes;
and what a picture costs in a folder of 10,000 and in one of 100,000. `--smoke`: few pictures, a rehearsal.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import embeddings, planted_copies
from benchmarks.laboratory import machine
from data_tools.scan import ScanRules, check_refused, scan
from data_tools.sources import list_sources
from data_tools.stages import Run

RESULTS = Path(__file__).parent / "results"
PHOTOS = Path(__file__).parents[2] / "shared/data/photos"
WORKERS = 2
COMPARED = ("ztrain", "usearch_bf16")
"""Of benchmarks/embeddings.py: our comparison of all rows, and the fastest index that finds as much."""
_TURNS = 3
_PER_TASK = 256


def scanning(is_smoke: bool) -> dict[str, Any]:
    """Ratios are of medians over turns that follow each other."""
    count, sizes = (200, (50, 100, 200)) if is_smoke else (12_000, (1000, 10_000, 100_000))
    photos = sorted(PHOTOS.glob("*.jpg"))
    if not photos:
        raise SystemExit(f"{PHOTOS}: no photographs there")
    ways: dict[str, Callable[[Path], None]] = {
        "bare_decode": _decode_all,
        "scan_hashes": lambda folder: _scan(folder, []),
        "scan_all_columns": lambda folder: _scan(folder, ["quality", "likeness"]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = _names(photos, count, Path(scratch) / "pictures")
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(_TURNS):
            for name, way in ways.items():
                started = time.perf_counter()
                way(folder)
                seconds[name].append(time.perf_counter() - started)
                print(turn, name, f"{seconds[name][-1]:.1f} s", flush=True)
        middle = {name: statistics.median(each) for name, each in seconds.items()}
        taken = []
        for size in sizes:
            larger = _names(photos, size, Path(scratch) / f"names_{size}")
            started = time.perf_counter()
            _scan(larger, [])
            taken.append(time.perf_counter() - started)
            print(size, f"{taken[-1]:.1f} s", flush=True)
    # Of the pictures beyond the first so many: processes start once.
    more = [(value - taken[0]) * 1e3 / (size - sizes[0]) for value, size in zip(taken[1:], sizes[1:], strict=True)]
    return {
        "pictures": count,
        "workers": WORKERS,
        "seconds": {name: [round(value, 2) for value in each] for name, each in seconds.items()},
        "speed_over_bare_decode": {name: round(middle["bare_decode"] / value, 3) for name, value in middle.items()},
        "files": sizes,
        "files_seconds": [round(value, 2) for value in taken],
        "ms_per_picture_beyond_the_first_size": [round(value, 4) for value in more],
        "ms_growth": round(more[-1] / more[0], 3),
    }


def _names(photos: Sequence[Path], count: int, folder: Path) -> Path:
    """A folder with the photographs under so many names, a thousand in each folder below it."""
    for number in range(count):
        place = folder / f"{number // 1000:04}" / f"{number:07}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(photos[number % len(photos)].resolve())
    return folder


def _decode(paths: Sequence[str]) -> int:
    for path in paths:
        with Image.open(path) as image:
            image.convert("RGB")
    return len(paths)


def _decode_all(folder: Path) -> None:
    paths = [str(path) for path in sorted(folder.rglob("*.jpg"))]
    tasks = [paths[start : start + _PER_TASK] for start in range(0, len(paths), _PER_TASK)]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        assert sum(pool.map(_decode, tasks)) == len(paths)


def _scan(folder: Path, measures: list[Any]) -> None:
    out = folder.with_name(f"{folder.name}_scan")
    run, rules = Run(workers=WORKERS), ScanRules(measures=frozenset(measures))
    table = scan(list_sources([str(folder)], out / "listing", run.folder), rules, out, run)
    check_refused(table, 0.0)
    shutil.rmtree(out)


PARTS: dict[str, tuple[str, Callable[[bool], dict[str, Any]]]] = {
    "planted": (
        "planted_duplicates",
        lambda is_smoke: planted_copies.measure(per_style=2, windows=0) if is_smoke else planted_copies.measure(),
    ),
    "embeddings": (
        "semantic_dedup",
        lambda is_smoke: (
            embeddings.measure((2000,), ways=["ztrain"]) if is_smoke else embeddings.measure(ways=COMPARED)
        ),
    ),
    "scan": ("scan", scanning),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.data_tools", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.smoke and options.out == RESULTS:
        parser.error("--smoke needs --out: its figures are no results")
    path = options.out / "data_tools.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    document |= {
        "command": "python -m benchmarks.data_tools",
        "machine": {**machine(), "cores": os.cpu_count()},
        "date": datetime.now(UTC).date().isoformat(),
    }
    for part in options.parts or PARTS:
        key, measure = PARTS[part]
        document[key] = measure(options.smoke)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
