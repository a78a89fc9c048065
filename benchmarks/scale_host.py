"""What ztrain keeps in memory, and takes in time, for each triplet before the first step: measured on a CPU.

    python -m benchmarks.scale_host --work out/scale

Makes SIZES[-1] triplets of tiny pictures, each with a prompt, a reference and a target of its own, and a cache of tiny
tensors under the names that training asks for; then, in a process of its own for each of SIZES, does what every process
of a run does when it starts. Out: benchmarks/results/scale_host.json, {"command", "machine", "rows", "per_triplet",
"order"}; per_triplet is the slope between the two sizes. No encoder runs, nothing is trained.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.laboratory import machine
from benchmarks.step import RESULTS
from ztrain.cache import Cache, Needs
from ztrain.config import Config, load_config
from ztrain.files import workspace
from ztrain.sampler import Mixture
from ztrain.samples import all_needs, read_samples
from ztrain.store import Entry
from ztrain.tokens import token_counts

SIZES = (10_000, 40_000)
ORDERED = 4_000_000
"""Samples of the order that is timed."""
PROMPT = "a lighthouse on a cliff above a rough sea, seen from below, with gulls around its lantern, drawn with care, "
_RANKS = {"latents": (16, 8, 8), "siglip": (2, 2, 1), "text": (64, 1)}
_READS = 2_000


def make(work: Path, count: int) -> None:
    """Triplets as an image folder, whole or not there."""
    folder = work / "triplets" / "train"
    if (folder / "metadata.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        for kind, salt in (("target", 0), ("reference", 1)):
            colour = tuple((2 * i + salt).to_bytes(3, "big"))
            Image.new("RGB", (64, 64), colour).save(folder / f"{kind}-{i:08d}.png")
        names = {"reference_file_name": f"reference-{i:08d}.png", "target_file_name": f"target-{i:08d}.png"}
        rows.append(json.dumps({"prompt": PROMPT + str(i), **names}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def settings(work: Path, count: int) -> Config:
    """[siglip] on the first `count` triplets, of which a folder of links to them tells."""
    folder = work / f"first-{count}" / "train"
    if not (folder / "metadata.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        whole = work / "triplets" / "train"
        for i in range(count):
            for kind in ("target", "reference"):
                (folder / f"{kind}-{i:08d}.png").hardlink_to(whole / f"{kind}-{i:08d}.png")
        lines = (whole / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    off = {"validation_steps": 0, "preview_steps": 0}
    words = [f"--validation.{name}={value}" for name, value in off.items()]
    words += [f"--data.train_data_dir={folder.parent}", f"--cache.dir={work / f'cache-{count}'}"]
    return load_config([Path("configs/siglip.yaml"), Path("configs/miniature.yaml")], words)


def fill_with_nothing(cache: Cache, needs: Needs) -> None:
    """Entries of tiny tensors under the names that are asked for, in shards as fill.py cuts them."""
    with workspace(cache.folder) as scratch:
        for kind in sorted({kind for kind, _ in needs.requests}):
            asked = [request for (of, _), request in needs.requests.items() if of == kind]
            store, size = cache.store(kind), cache.config.cache.entries_per_shard
            for start in range(0, len(asked), size):
                piece = asked[start : start + size]
                entries = [Entry(key=r.key, label=r.label, parts={"states": torch.zeros(_RANKS[kind])}) for r in piece]
                store.write(f"{start:012d}", entries, scratch)
            store.compact(scratch)


def one(work: Path, count: int) -> dict[str, float]:
    """What a process of a run does before its first step: seconds of each stage, and the bytes by which it grew."""
    process = psutil.Process()
    row: dict[str, float] = {"triplets": count}
    config = settings(work, count)

    def stage(name: str, work_of: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        made = work_of()
        row[f"{name}_seconds"] = round(time.perf_counter() - started, 3)
        return made

    filler = Cache(config)
    if not filler.digests.path.exists():
        first = time.perf_counter()
        samples = read_samples(config, filler)
        row["hash_seconds"] = round(time.perf_counter() - first, 3)
        fill_with_nothing(filler, all_needs(config, samples))
        filler.digests.save()
        return row
    before = process.memory_info().rss
    cache = stage("digests", lambda: Cache(config))
    samples = stage("samples", lambda: read_samples(config, cache))
    needs = stage("needs", lambda: all_needs(config, samples))
    stage("index", lambda: cache.missing(needs))
    assert not cache.missing(needs)
    stage("tokens", lambda: token_counts(config, cache, samples.trained))
    row["process_bytes"] = process.memory_info().rss - before
    requests = random.Random(0).sample(list(needs.requests.values()), _READS)
    stage("reads", lambda: [cache.store(request.state).read(request.key) for request in requests])
    row["read_seconds_each"] = round(row.pop("reads_seconds") / _READS, 6)
    row["index_files_bytes"] = sum(path.stat().st_size for path in cache.folder.glob("*/index/*.parquet"))
    return row


def order() -> dict[str, Any]:
    """Seconds until the first keys of an epoch of ORDERED samples are there, with counts of tokens that differ."""
    tokens = np.random.default_rng(0).choice(np.arange(4192, 4640, 32, dtype=np.int32), ORDERED)
    found: dict[str, Any] = {"samples": ORDERED}
    for name, given in (("plain", None), ("by_tokens", tokens)):
        started = time.perf_counter()
        mixture = Mixture(ORDERED, tokens=given)
        mixture.keys(0, global_batch_size=64, seed=0)
        found[f"{name}_seconds"] = round(time.perf_counter() - started, 3)
    found["bytes_each"] = next(iter(mixture._orders.values())).itemsize
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.scale_host", description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--one", type=int, default=None, help="one size, as a process of its own")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(one(options.work, options.one)))
        return
    make(options.work, SIZES[-1])
    rows = []
    for count in SIZES:
        row: dict[str, Any] = {}
        for _ in range(2):  # the first makes the cache
            words = [sys.executable, "-m", "benchmarks.scale_host", "--work", str(options.work), "--one", str(count)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(json.dumps(row), flush=True)
    few, many = rows
    slope = {
        name: (many[name] - few[name]) / (many["triplets"] - few["triplets"])
        for name in many
        if name.endswith(("_seconds", "_bytes"))
    }
    document = {
        "command": "python -m benchmarks.scale_host --work out/scale",
        "what": "[siglip], every triplet with a prompt, a reference and a target of its own; prompts of"
        f" {len(PROMPT) + 5} characters; tiny pictures, so that hash_seconds knows no bandwidth",
        "machine": machine(),
        "rows": rows,
        "per_triplet": {name: float(f"{value:.4g}") for name, value in slope.items()},
        "order": order(),
    }
    path = RESULTS / "scale_host.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
