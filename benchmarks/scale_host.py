"""What a large data set takes on the host: time and memory before the first step, and of a build, measured on CPUs.

    python -m benchmarks.scale_host --work out/scale

For each of SIZES it makes as many triplets of tiny pictures, each with a prompt of its own, and with a target and a
reference of its own while there are no more than `--pictures`, and a full cache of the tiny family's states, which a
build alone does not ask for. Then, side by side, each in processes of its own and for `--minutes` at most: the stages
of a start (`stages`), `ztrain train` for two steps alone and as two ranks, `ztrain cache`, and `data_tools.build` of
the same triplets. Out: benchmarks/results/scale_host.json, {"command", "machine", "rows", "per_triplet", "order"},
written after each part; per_triplet is of `stages` of the data set with the most pictures.
"""

import argparse
import contextlib
import csv
import functools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.laboratory import machine
from benchmarks.step import RESULTS
from miniature.family import SIGLIP, TURBO, VISION_LANGUAGE, build_family
from ztrain.cache.cache import Cache, CacheRequest, Needs
from ztrain.cache.fill import fill
from ztrain.cache.order import Mixture
from ztrain.cache.samples import Sample, all_needs, needs_of, read_samples
from ztrain.cache.token_counts import token_counts
from ztrain.config import Config, load_config
from ztrain.data.digests import Digests, Known, digest_bytes
from ztrain.images import Bucket, PictureFile, stamp_of
from ztrain.io.files import workspace
from ztrain.io.store import Entry, Store

SIZES = (100_000, 1_000_000)
ORDERED = 4_000_000
"""Samples of the order that is timed."""
PROMPT = "a lighthouse on a cliff above a rough sea, seen from below, with gulls around its lantern, drawn with care, "
SIDE = 64  # pixels
_HASHED = 10_000  # triplets whose pictures are read, to say what that takes
_READS = 2_000
_PART = 4_096  # triplets that are made together, and entries of a shard


# --- triplets and a full cache ----------------------------------------------------------------------------------------


def words(work: Path) -> list[str]:
    """The command line of an experiment, [siglip], on the triplets and the cache in `work`."""
    family, off = work.parent / "family", ("validation_steps", "preview_steps", "score_steps")
    places = {"base": family / TURBO, "vision_language": family / VISION_LANGUAGE, "siglip": family / SIGLIP}
    return [
        "--config", "configs/siglip.yaml", "configs/tiny.yaml", *(f"--validation.{name}=0" for name in off),
        *(f"--models.{role}.pretrained_model_name_or_path={place}" for role, place in places.items()),
        f"--data.train_data_dir={work / 'triplets'}", f"--cache.dir={work / 'cache'}",
    ]  # fmt: skip


def settings(work: Path) -> Config:
    _, first, second, *rest = words(work)
    return load_config([Path(first), Path(second)], rest)


def _picture(number: int) -> bytes:
    """A PNG of one colour, another for each number."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + number.to_bytes(3, "big") * SIDE) * SIDE, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@functools.lru_cache(maxsize=2 * _PART)
def _known(path: Path, number: int) -> Known:
    return Known(PictureFile(path), digest_bytes(_picture(number)), SIDE, SIDE)


def _triplet(work: Path, i: int, each: int) -> Sample:
    """`each`: targets and references that there are of each; every pair of them comes once before one comes again."""
    folder = work / "triplets" / "train"
    target, reference = i % each, i if i < each else (i + i // each) % each
    known = _known(folder / f"target-{target:08d}.png", 2 * target)
    seen = _known(folder / f"reference-{reference:08d}.png", 2 * reference + 1)
    return Sample(prompt=f"{PROMPT}{i:08d}", references=(seen,), target=known, bucket=Bucket(SIDE, SIDE), where=str(i))


class _Writer(Store):
    """One that does not look at what the others have written."""

    def reload(self) -> None: ...


def _make_rows(work: Path, start: int, end: int, each: int) -> None:
    """Pictures and rows of some triplets."""
    lines = []
    for i in range(start, end):
        sample = _triplet(work, i, each)
        paths = [Path(known.picture.name) for known in (sample.target, *sample.references)]
        names = {"target_file_name": paths[0].name, "reference_file_name": paths[1].name}
        lines.append(json.dumps({"prompt": sample.prompt, **names}) + "\n")
        for salt, path in enumerate(paths if i < each else ()):  # beyond, the pictures are another's
            path.write_bytes(_picture(2 * i + salt))
    (work / "parts" / f"{start:08d}.jsonl").write_text("".join(lines), encoding="utf-8")


def _make_states(work: Path, start: int, end: int, each: int) -> None:
    """Memo and cache of some triplets, whose pictures are there; the states are those of triplet 0, which are there."""
    memo = []
    config = settings(work)
    cache, needs = Cache(config), Needs()
    for i in range(start, end):
        sample = _triplet(work, i, each)
        if i >= each:
            needs.text(sample.prompt)
            continue
        needs_of([sample], config.reads, needs)
        for known in (sample.target, *sample.references):
            memo.append((stamp_of(Path(known.picture.name).stat()), known.digest, SIDE, SIDE))
    columns = [[row[k] for row in memo] for k in range(4)]
    table = pa.table(
        [pa.array(c, t) for c, t in zip(columns, Digests._SCHEMA.types, strict=True)], Digests._SCHEMA.names
    )
    pq.write_table(table, work / "parts" / f"{start:08d}.parquet")
    first = Needs()
    needs_of([_triplet(work, 0, 1)], config.reads, first)
    of_first = {kind: key for kind, key in first.requests}
    by_kind: dict[str, list[CacheRequest]] = {}
    for place, request in needs.requests.items():
        if place not in first.requests:
            by_kind.setdefault(request.state, []).append(request)
    with workspace(work / "parts") as scratch:
        for kind, requests in by_kind.items():
            folder = cache.store(kind).folder
            states = cache.store(kind).read(of_first[kind])
            copies = [{part: tensor.clone() for part, tensor in states.items()} for _ in requests]
            entries = [Entry(key=r.key, label=r.label, parts=c) for r, c in zip(requests, copies, strict=True)]
            _Writer(folder).write(f"{start:012d}", entries, scratch)


def make(work: Path, count: int, each: int, cached: bool) -> float:
    """All of it, whole or not there, with a full cache where `cached`; seconds."""
    folder, started = work / "triplets" / "train", time.perf_counter()
    if (folder / "metadata.jsonl").exists():
        return 0.0
    folder.mkdir(parents=True, exist_ok=True)
    (work / "parts").mkdir(exist_ok=True)

    def by_parts(part: Callable[[Path, int, int, int], None]) -> None:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            for done in [pool.submit(part, work, i, min(count, i + _PART), each) for i in range(0, count, _PART)]:
                done.result()

    by_parts(_make_rows)
    if cached:
        build_family(work.parent / "family")
        needs, config = Needs(), settings(work)
        needs_of([_triplet(work, 0, 1)], config.reads, needs)
        fill(Cache(config), needs, "cpu", progress=False)
        by_parts(_make_states)
        memo = [pq.read_table(path) for path in sorted((work / "parts").glob("*.parquet"))]
        pq.write_table(pa.concat_tables(memo), work / "cache" / "digests.parquet")
    rows = [path.read_text(encoding="utf-8") for path in sorted((work / "parts").glob("*.jsonl"))]
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return round(time.perf_counter() - started, 1)


# --- what is measured -------------------------------------------------------------------------------------------------


def stages(work: Path) -> dict[str, float]:
    """What a process of a run does before its first step: seconds of each stage, and the bytes by which it grew."""
    process = psutil.Process()
    row: dict[str, float] = {}
    config = settings(work)

    def stage(name: str, work_of: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        made = work_of()
        row[f"{name}_seconds"] = round(time.perf_counter() - started, 3)
        print(json.dumps(row), flush=True)
        return made

    pictures = [PictureFile(path) for path in sorted((work / "triplets" / "train").glob("*.png"))[: 2 * _HASHED]]
    stage("hash", lambda: Digests(work / "none").of_pictures(pictures, config.data.dataloader_num_workers))
    before = process.memory_info().rss
    cache = stage("digests", lambda: Cache(config))
    samples = stage("samples", lambda: read_samples(config, cache))
    needs = stage("needs", lambda: all_needs(config, samples))
    assert not stage("index", lambda: cache.missing(needs))
    stage("tokens", lambda: token_counts(config, cache, samples.trained))
    row["process_bytes"] = process.memory_info().rss - before
    requests = random.Random(0).sample(list(needs.requests.values()), _READS)
    stage("reads", lambda: [cache.store(request.state).read(request.key) for request in requests])
    row["hash_seconds"] = round(row["hash_seconds"] / len(pictures) * 2, 6)
    row["read_seconds_each"] = round(row.pop("reads_seconds") / _READS, 6)
    row["index_files_bytes"] = sum(path.stat().st_size for path in cache.folder.glob("*/index/*.parquet"))
    return row


def started(command: list[str], minutes: float, ready: Path | None = None) -> dict[str, Any]:
    """Seconds of a command, until `ready` has content too, the peak of each of its largest processes in bytes, and what
    all of them held at once, shared pages counted once and those of files left out."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        with ThreadPoolExecutor(1) as reader:
            said = reader.submit(process.stdout.read)  # type: ignore[union-attr]
            row: dict[str, Any] = {}
            peaks: dict[int, int] = {}
            together = 0
            while process.poll() is None:
                time.sleep(0.1)
                now = time.perf_counter() - begun
                held = 0
                with contextlib.suppress(psutil.Error):
                    for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                        with contextlib.suppress(OSError, psutil.Error, KeyError):
                            status = _status(each.pid)
                            peaks[each.pid] = status["VmHWM"]
                            held += status["RssAnon"]
                together = max(together, held)
                if ready is not None and "ready_seconds" not in row and ready.is_file() and ready.stat().st_size:
                    row["ready_seconds"] = round(now, 1)
                if now > 60 * minutes:
                    os.killpg(process.pid, signal.SIGKILL)
                    row["failed"] = f"not done after {now:.0f} seconds"
            row["seconds"] = round(time.perf_counter() - begun, 1)
            if process.returncode and "failed" not in row:
                row["failed"] = said.result().decode(errors="replace")[-600:]
    largest = sorted(peaks.values(), reverse=True)
    return row | {"peak_bytes": largest[:2], "together_bytes": together}


def _status(pid: int) -> dict[str, int]:
    """Figures of /proc/<pid>/status in bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def parts(work: Path, minutes: float, beside: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured on one data set; a build leaves `beside` cores to other parts."""
    python = [sys.executable, "-m"]
    pair = [*python, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]

    def train(launcher: list[str], out: Path) -> dict[str, Any]:
        end = ["--train.max_train_steps=2", f"--output_dir={out}"]
        return started([*launcher, "ztrain.train", *words(work), *end], minutes, ready=out / "metrics.jsonl")

    def build() -> dict[str, Any]:
        with (work / "pairs.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["reference", "target", "prompt", "split"])
            for line in (work / "triplets" / "train" / "metadata.jsonl").open():
                row = json.loads(line)
                table.writerow([row["reference_file_name"], row["target_file_name"], row["prompt"], "train"])
        (work / "build.yaml").write_text(
            "sources: [triplets/train]\nlabel: {pairs: {table: pairs.csv}}\nsplit: {apart: []}\ndedup: null\n"
            "scan: {measures: []}\n"
        )
        workers = max(1, (os.cpu_count() or 1) - beside)
        out = ["--out", str(work / "built"), "--rows_per_shard", "10000", "--workers", str(workers)]
        command = [*python, "data_tools.build", "--config", str(work / "build.yaml"), *out]
        return {"workers": workers} | started(command, minutes)

    def told() -> dict[str, Any]:
        command = [*python, "benchmarks.scale_host", "--work", str(work), "--stages"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes, check=True)
        row: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
        return row

    return {
        "stages": told,
        "train": lambda: train(python, work / "run"),
        "train_of_two": lambda: train(pair, work / "run-of-two"),
        "cache": lambda: started([*python, "ztrain.cli", "cache", *words(work)], minutes),
        "build": build,
    }


def order() -> dict[str, Any]:
    """Seconds until the first keys of an epoch of ORDERED samples are there, with counts of tokens that differ."""
    tokens = np.random.default_rng(0).choice(np.arange(4192, 4640, 32, dtype=np.int32), ORDERED)
    found: dict[str, Any] = {"samples": ORDERED}
    for name, given in (("plain", None), ("by_tokens", tokens)):
        begun = time.perf_counter()
        mixture = Mixture(ORDERED, tokens=given)
        mixture.keys(0, global_batch_size=64, seed=0)
        found[f"{name}_seconds"] = round(time.perf_counter() - begun, 3)
    found["bytes_each"] = next(iter(mixture._orders.values())).indices.itemsize
    return found


def per_triplet(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What `stages` took for each triplet of the data set with the most pictures."""
    row = max((row for row in rows if "process_bytes" in row.get("stages", {})), key=lambda row: row["pictures"])
    names = [name for name in row["stages"] if name.endswith(("_seconds", "_bytes"))]
    found = {name: row["stages"][name] / row["triplets"] for name in names}
    found["hash_seconds"] = row["stages"]["hash_seconds"]  # of the two pictures of one
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.scale_host", description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--parts", nargs="+", default=None, help="of those that are measured")
    parser.add_argument("--pictures", type=int, default=max(SIZES), help="targets, and references, that there are")
    parser.add_argument("--at-once", type=int, default=5, help="parts")
    parser.add_argument("--minutes", type=float, default=15.0, help="that one part may take")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale_host.json")
    parser.add_argument("--stages", action="store_true", help="the stages of a start, as a process of its own")
    options = parser.parse_args()
    if options.stages:
        print(json.dumps(stages(options.work)))
        return
    document: dict[str, Any] = {
        "command": "python -m benchmarks.scale_host --work out/scale",
        "what": f"[siglip] of the tiny family; every triplet has a prompt of {len(PROMPT) + 8} characters of its own,"
        " and shares the targets and references with others where there are fewer of them; pictures are tiny, so that"
        " hash_seconds knows no bandwidth",
        "at_once": options.at_once,
        "machine": machine() | {"device": "cpu"},
        "order": order(),
        "rows": [],
    }
    for count in options.sizes:
        work = options.work.resolve() / str(count)
        row: dict[str, Any] = {"triplets": count, "pictures": min(count, options.pictures)}
        every = parts(work, options.minutes, beside=0 if options.parts == ["build"] else 5)
        chosen = {n: part for n, part in every.items() if n in (options.parts or [n])}
        row["made_seconds"] = make(work, count, row["pictures"], cached=chosen.keys() != {"build"})
        print(json.dumps(row), flush=True)
        document["rows"].append(row)
        with ThreadPoolExecutor(options.at_once) as pool:
            running = {pool.submit(part): name for name, part in chosen.items()}
            for done in as_completed(running):
                try:
                    row[running[done]] = done.result()
                except (subprocess.SubprocessError, OSError) as error:
                    row[running[done]] = {"failed": str(error)[-600:]}
                print(json.dumps({running[done]: row[running[done]]}), flush=True)
                options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(work)
    if any("process_bytes" in row.get("stages", {}) for row in document["rows"]):
        document["per_triplet"] = per_triplet(document["rows"])
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
