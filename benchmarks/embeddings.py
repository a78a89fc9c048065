"""What near-duplicates over embeddings cost on this machine, and how many of them are found.

`python -m benchmarks.embeddings --rows 10000 30000 100000 --threads 2` prints one JSON object. In: nothing, the
embeddings are made here (see `synthetic`). Every way runs in a process of its own, which reads them memory-mapped.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.communities import communities, neighbours

THRESHOLD = 0.9
SAMPLED = 2000
"""Rows whose edges are compared with all that they have in float32."""
LARGEST_CLUSTER = 30
QUERIED = 32
"""Neighbours that usearch is asked for: a row, the rest of its cluster and one more."""


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Embeddings with known near-duplicates."""

    embeddings: NDArray[np.float16]
    """(N, D) unit vectors, in random order."""
    planted: NDArray[np.int64]
    """(N,) cluster of each row; -1 of those that lie on a chain between two clusters."""


def synthetic(count: int, width: int = 768, seed: int = 0) -> Synthetic:
    """Seven tenths unrelated rows, three tenths in clusters of 2 to 30 near-duplicates, some chains between clusters.

    Unrelated rows share a direction and differ in some directions more than in others, so that their cosines are about
    0.45 +- 0.06, as those of a vision tower's embeddings are not near 0. A cluster's rows lie around an unrelated row:
    the cosine of two is 0.92 to 0.999, one value for each cluster. A chain has three rows, each with a cosine of about
    0.96 to the next, and joins one cluster to another; there is one for every 500 rows.
    """
    rng = np.random.default_rng(seed)
    chains = count // 500
    sizes: list[int] = []
    while sum(sizes) < 0.3 * count:
        sizes.append(2 + min(int(rng.pareto(1.2)), LARGEST_CLUSTER - 2))
    sizes += [1] * (count - 3 * chains - sum(sizes))
    deviations = (np.arange(width, dtype=np.float32) + 20) ** -0.75
    bases = _unit(rng.standard_normal((len(sizes), width), dtype=np.float32) * deviations)
    turned = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
    shared = _unit(rng.standard_normal(width, dtype=np.float32))
    bases = _unit(np.sqrt(np.float32(0.55)) * (bases @ turned) + np.sqrt(np.float32(0.45)) * shared)

    planted = np.repeat(np.arange(len(sizes)), sizes)
    closeness = rng.uniform(0.92, 0.999, len(sizes)).astype(np.float32)[planted][:, None]
    rows = _unit(rng.standard_normal((len(planted), width), dtype=np.float32))
    rows = _unit(np.sqrt(closeness) * bases[planted] + np.sqrt(1 - closeness) * rows)
    large = np.flatnonzero(np.array(sizes) >= 5)
    ends = rows[np.searchsorted(planted, rng.choice(large, (chains, 2)))]  # (chains, 2, D)
    steps = np.array([0.25, 0.5, 0.75], np.float32)[:, None]
    between = _unit(ends[:, :1] * (1 - steps) + ends[:, 1:] * steps)

    order = rng.permutation(count)
    planted = np.concatenate([planted, np.full(3 * chains, -1)])[order]
    return Synthetic(np.concatenate([rows, between.reshape(-1, width)])[order].astype(np.float16), planted)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def adjusted_rand(first: np.ndarray, second: np.ndarray) -> float:
    """Agreement of two partitions of the same rows: 1 where they are the same, 0 on average by chance.

    Hubert and Arabie, Comparing partitions, 1985, equation 5.
    """

    def pairs(counts: np.ndarray) -> float:
        return float((counts.astype(np.float64) * (counts - 1) / 2).sum())

    _, table = np.unique(np.stack([first, second]), axis=1, return_counts=True)
    rows, columns = (pairs(np.unique(labels, return_counts=True)[1]) for labels in (first, second))
    by_chance = rows * columns / pairs(np.array([len(first)]))
    most = (rows + columns) / 2
    return 1.0 if most == by_chance else (pairs(table) - by_chance) / (most - by_chance)


def exact(embeddings: np.ndarray, threads: int) -> NDArray[np.int64]:
    """What ztrain does."""
    return neighbours(embeddings, THRESHOLD).pairs


def plain(embeddings: np.ndarray, dtype: torch.dtype) -> NDArray[np.int64]:
    """Tiles of a product in this type, and nothing but: no check, no cap."""
    rows = torch.tensor(embeddings, dtype=dtype)
    found, size = [], 1024
    for top in range(0, len(rows), size):
        for left in range(top, len(rows), size):
            scores = rows[top : top + size] @ rows[left : left + size].T
            some = torch.nonzero(scores.amax(1) >= THRESHOLD)[:, 0]
            hits = torch.nonzero(scores[some] >= THRESHOLD)
            found.append(torch.stack([some[hits[:, 0]] + top, hits[:, 1] + left], dim=1))
    pairs = torch.cat(found).numpy()
    return pairs[pairs[:, 0] < pairs[:, 1]]


def usearch(embeddings: np.ndarray, threads: int, dtype: str) -> NDArray[np.int64]:
    """A graph index (HNSW) with usearch's default settings, asked for the nearest of every row."""
    from usearch.index import Index

    rows = np.asarray(embeddings)
    keys = np.arange(len(rows))
    index = Index(ndim=rows.shape[1], metric="cos", dtype=dtype)
    index.add(keys, rows, threads=threads)
    matches = index.search(rows, QUERIED, threads=threads)
    near = np.where(np.arange(QUERIED) < matches.counts[:, None], matches.distances, 2) <= 1 - THRESHOLD
    pairs = np.stack([np.repeat(keys, near.sum(1)), matches.keys[near].astype(np.int64)], axis=1)
    return np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)


WAYS: dict[str, Callable[[np.ndarray, int], NDArray[np.int64]]] = {
    "ztrain": exact,
    "torch_float32": lambda rows, threads: plain(rows, torch.float32),
    "torch_bfloat16": lambda rows, threads: plain(rows, torch.bfloat16),
    "usearch_f16": lambda rows, threads: usearch(rows, threads, "f16"),
    "usearch_bf16": lambda rows, threads: usearch(rows, threads, "bf16"),
    "usearch_i8": lambda rows, threads: usearch(rows, threads, "i8"),
}


def _run(way: str, folder: Path, threads: int) -> dict[str, float]:
    """In a fresh process: seconds and peak memory; the pairs go into `folder`, and of ztrain's way the labels."""
    torch.set_num_threads(threads)
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    before, spent = _peak_mib(), time.process_time()
    start = time.perf_counter()
    pairs = WAYS[way](embeddings, threads)
    told = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - spent}
    told |= {"peak_mib": _peak_mib(), "peak_mib_before": before, "load": os.getloadavg()[0]}
    np.save(folder / f"{way}.npy", pairs)
    return told


def _cluster(folder: Path, threads: int) -> dict[str, float]:
    """Both steps in a fresh process, as a caller takes them."""
    torch.set_num_threads(threads)
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    start = time.perf_counter()
    edges = neighbours(embeddings, THRESHOLD)
    middle = time.perf_counter()
    labels = communities(len(embeddings), edges)
    told = {"communities_seconds": time.perf_counter() - middle, "both_seconds": time.perf_counter() - start}
    np.save(folder / "labels.npy", labels)
    return told | {"both_peak_mib": _peak_mib()}


def _peak_mib() -> float:
    """Of this process. ru_maxrss would count the parent that it was forked from."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, "Linux tells the peak of resident memory"
    return int(match[1]) / 1024


def _alone(task: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task, arguments)


def true_edges(embeddings: np.ndarray, sample: np.ndarray) -> NDArray[np.int64]:
    """(M, 2) pairs (sampled row, other row) by a float32 product with everything; those of two sampled rows twice."""
    rows = _unit(np.asarray(embeddings, np.float32))
    found = []
    for start in range(0, len(sample), 500):
        some = sample[start : start + 500]
        hits = np.argwhere(rows[some] @ rows.T >= np.float32(THRESHOLD))
        found.append(np.stack([some[hits[:, 0]], hits[:, 1]], axis=1))
    pairs = np.concatenate(found)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _at(count: int, width: int, sampled: int, ways: Sequence[str], threads: int) -> dict[str, Any]:
    data = synthetic(count, width)
    sample = np.random.default_rng(1).choice(count, min(sampled, count), replace=False)
    some = _unit(data.embeddings[sample[:1000]].astype(np.float32))
    background = (some @ some.T)[np.triu_indices(len(some), 1)]
    truth = np.sort(true_edges(data.embeddings, sample), axis=1) @ [count, 1]
    told: dict[str, Any] = {
        "background_cosine": {
            "mean": round(float(background.mean()), 3),
            "standard_deviation": round(float(background.std()), 3),
        },
        "sampled_rows": len(sample),
        "true_edges_of_the_sample": len(truth),
        "planted_clusters": len(np.unique(data.planted)) - 1,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "embeddings.npy", data.embeddings)
        for way in ways:
            row = _alone(_run, way, folder, threads)
            pairs = np.load(folder / f"{way}.npy", allow_pickle=False)
            row["edges"] = len(pairs)
            row["recall"] = float(np.isin(truth, pairs @ [count, 1]).mean()) if len(truth) else 1.0
            if not way.startswith("usearch"):
                row["gflops_per_second"] = count * count * width / row["seconds"] / 1e9
            told[way] = {key: round(value, 4) for key, value in row.items()}
        row = _alone(_cluster, folder, threads)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        known = data.planted >= 0
        row["clusters"] = int(labels.max()) + 1
        row["adjusted_rand_index"] = adjusted_rand(labels[known], data.planted[known])
        told["clusters"] = {key: round(value, 4) for key, value in row.items()}
    return told


def measure(
    sizes: Sequence[int] = (10_000, 30_000, 100_000),
    *,
    width: int = 768,
    sampled: int = SAMPLED,
    ways: Sequence[str] = tuple(WAYS),
    threads: int = 2,
) -> dict[str, Any]:
    """By number of rows: seconds, peak resident MiB, edges and recall of each way, and ztrain's clusters.

    cpu_seconds are those of all threads: what others do on the machine changes them less. load is the machine's average
    of one minute, this run included.
    gflops_per_second counts each pair once, 2 * width operations, over all the seconds of a way.
    """
    return {
        "width": width,
        "threshold": THRESHOLD,
        "threads": threads,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "rows": {str(count): _at(count, width, sampled, ways, threads) for count in sizes},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=list(WAYS))
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    print(json.dumps(measure(given.rows, ways=given.ways, threads=given.threads), indent=2))


if __name__ == "__main__":
    main()
