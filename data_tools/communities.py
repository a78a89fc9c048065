"""Near-duplicates by meaning: pictures whose embeddings point almost the same way, and the groups that they form.

`neighbours` compares every row with every other one and keeps the pairs above a cosine; `communities` cuts the graph of
these pairs into clusters. In: unit vectors, one row per picture. Out: `Edges`, then one label per row. Z-Image's
authors do so with an index of nearest neighbours on GPUs (arXiv 2511.22699, data infrastructure).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ztrain.errors import InputError

Ints = NDArray[np.int64]

_HEIGHT, _WIDTH = 512, 4096
"""Rows and columns compared at once, the second a multiple of the first: their cosines (4 MiB) stay in a CPU's
third-level cache."""
_STRIP = 64
"""Rows whose candidates are computed again at once."""
_BUFFER = 1_000_000
"""Pairs to gather before those beyond the cap are dropped: about 200 MB while they are sorted."""
_MARGIN = 2.0**-7 + 2.0**-9 + 2.0**-10
"""How far a bfloat16 cosine can lie below the true one: each input is off by 2^-8 of itself at most, so a sum of
products of unit vectors by 2^-7 (Cauchy-Schwarz); the result, below 1, by 2^-9; the rest covers float32 sums and the
products of two errors. What passes is computed again, hence no pair is missed."""
_NORM_TOLERANCE = 0.01
"""Of a unit vector's length: float16 rounds to within 0.0005."""
_RESOLUTION = 0.5
"""Of modularity: a part leaves its cluster only where less than about a quarter to a half of its edges lead out."""
_ROUNDS = 8
"""Steps from a row within which the graph decides its place in the order of a component."""


@dataclass(frozen=True, slots=True)
class Edges:
    """Pairs of near-duplicates."""

    pairs: Ints
    """(M, 2) row numbers i < j, sorted."""
    similarities: NDArray[np.float32]
    """(M,) cosines."""


def neighbours(embeddings: np.ndarray, threshold: float, *, max_neighbours: int = 100) -> Edges:
    """All pairs of rows with at least this cosine, of each row its nearest.

    Every pair is compared: in bfloat16 first, where nothing within its error is lost, then those few in float64. The
    result is that of a comparison in float32, up to pairs within 1e-6 of the threshold.

    embeddings: (N, D) float16 or float32 unit vectors, in memory or memory-mapped; a bfloat16 copy of them is held.
    threshold: cosine, above 0 and at most 1.
    max_neighbours: at least 1. A pair stays if it is among that many nearest of either row; of equally near ones the
    first rows count as nearer. It bounds memory by N * max_neighbours pairs where thousands of rows are alike.
    Raises InputError where the numbers cannot be such.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"threshold {threshold:g} is no cosine of near-duplicates; give one above 0 and at most 1")
    if max_neighbours < 1:
        raise InputError(f"max_neighbours {max_neighbours} keeps no pair; give at least 1")
    coarse = _coarse(embeddings)
    threads = torch.get_num_threads()
    # Each thread has tiles of its own: those that share one wait for each other, for long where others work here too.
    torch.set_num_threads(1)
    try:
        return _compare(embeddings, coarse, threshold, max_neighbours, threads)
    finally:
        torch.set_num_threads(threads)


def _compare(embeddings: np.ndarray, coarse: torch.Tensor, threshold: float, most: int, threads: int) -> Edges:
    """What `neighbours` returns, for checked input."""
    found = Edges(np.empty((0, 2), np.int64), np.empty(0, np.float32))
    waiting: list[tuple[Ints, Ints]] = []
    for candidates in _candidates(coarse, threshold - _MARGIN, threads):
        waiting.append(candidates)
        # As many as are held already, so that sorting these again and again does not add up.
        if sum(len(rows) for rows, _ in waiting) > max(_BUFFER, len(found.pairs)):
            found = _nearest([found, *_exact(embeddings, waiting, threshold)], len(embeddings), most)
    found = _nearest([found, *_exact(embeddings, waiting, threshold)], len(embeddings), most)
    order = np.lexsort((found.pairs[:, 1], found.pairs[:, 0]))
    return Edges(found.pairs[order], found.similarities[order])


def _coarse(embeddings: np.ndarray) -> torch.Tensor:
    """(N, D) bfloat16, normalised. Raises InputError for what is no table of unit vectors."""
    if embeddings.ndim != 2 or not embeddings.shape[1] or embeddings.dtype not in (np.float16, np.float32):
        raise InputError(
            f"embeddings of shape {embeddings.shape} and type {embeddings.dtype} cannot be compared; give a table "
            "(rows, dimensions) of float16 or float32"
        )
    coarse = torch.empty(embeddings.shape, dtype=torch.bfloat16)
    for start in range(0, len(embeddings), _HEIGHT):
        block, lengths = _unit(embeddings[start : start + _HEIGHT], np.float32)
        # The comparison is false of NaN too.
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _NORM_TOLERANCE))
        if len(wrong):
            raise InputError(
                f"row {start + wrong[0]} of the embeddings has length {lengths[wrong[0]]:g}, not 1; divide each row by "
                "its length and leave out rows that are zero or not finite"
            )
        coarse[start : start + _HEIGHT] = torch.from_numpy(block)
    return coarse


def _unit(rows: np.ndarray, dtype: type[np.floating]) -> tuple[np.ndarray, np.ndarray]:
    """(n, D) rows divided by their lengths, and these (n,)."""
    rows = rows.astype(dtype)
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    with np.errstate(invalid="ignore", divide="ignore"):  # the caller looks at the lengths
        rows /= lengths[:, None]
    return rows, lengths


def _candidates(coarse: torch.Tensor, threshold: float, threads: int) -> Iterator[tuple[Ints, Ints]]:
    """Tile by tile of the upper triangle: rows i and columns j > i with about this cosine, sorted by i, then j."""
    earlier = torch.ones(_HEIGHT, _HEIGHT, dtype=torch.bool).tril()

    def tile(top: int, left: int) -> tuple[Ints, Ints]:
        scores = coarse[top : top + _HEIGHT] @ coarse[left : left + _WIDTH].T
        if left == top:
            size = len(scores)
            scores[:, :size].masked_fill_(earlier[:size, : scores.shape[1]], -1)
        # The largest of each row first: most rows have nothing here, and a mask of all takes six times as long.
        rows = torch.nonzero(scores.amax(1) >= threshold)[:, 0]
        hits = torch.nonzero(scores[rows] >= threshold)
        return (rows[hits[:, 0]] + top).numpy(), (hits[:, 1] + left).numpy()

    running: deque[Future[tuple[Ints, Ints]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for top in range(0, len(coarse), _HEIGHT):
            for left in range(top, len(coarse), _WIDTH):
                running.append(pool.submit(tile, top, left))
                if len(running) > 2 * threads:
                    yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _exact(embeddings: np.ndarray, waiting: list[tuple[Ints, Ints]], threshold: float) -> Iterator[Edges]:
    """Of these candidates those that reach the threshold, sorted by row; each row's columns stay in their order.
    Empties `waiting`.

    A cosine in float64, rounded, does not depend on where in which product it stood, so neither does it on the order
    of the rows.
    """
    if not waiting:
        return
    rows, columns = (np.concatenate(numbers) for numbers in zip(*waiting, strict=True))
    waiting.clear()
    order = np.argsort(rows, kind="stable")
    rows, columns = rows[order], columns[order]
    different, starts = np.unique(rows, return_index=True)
    seen, place = np.zeros(len(embeddings), bool), np.empty(len(embeddings), np.int64)
    for first in range(0, len(different), _STRIP):
        strip = different[first : first + _STRIP]
        here = slice(starts[first], starts[first + _STRIP] if first + _STRIP < len(starts) else len(rows))
        # As np.unique with its inverse does, which sorts.
        seen[columns[here]] = True
        others = np.flatnonzero(seen)
        seen[others] = False
        place[others] = np.arange(len(others))
        # By torch, which has one thread here.
        left = torch.from_numpy(_unit(embeddings[strip], np.float64)[0])
        right = (others[start : start + _WIDTH] for start in range(0, len(others), _WIDTH))
        table = torch.cat([left @ torch.from_numpy(_unit(embeddings[some], np.float64)[0]).T for some in right], dim=1)
        cosines = table.numpy()[np.searchsorted(strip, rows[here]), place[columns[here]]].astype(np.float32)
        keep = cosines >= np.float32(threshold)
        yield Edges(np.stack([rows[here][keep], columns[here][keep]], axis=1), cosines[keep])


def _nearest(parts: list[Edges], count: int, most: int) -> Edges:
    """The edges among the `most` nearest of either end, in their order.

    In: sorted in so far as those of a row come with the other end rising, which a stable sort keeps where cosines tie.
    What is dropped here could not return with more edges, so it does not matter when this is called.
    """
    pairs, similarities = (np.concatenate([getattr(part, name) for part in parts]) for name in Edges.__slots__)
    edges = Edges(pairs, similarities)
    # A row's edges to earlier rows come before those to later ones.
    ends = np.concatenate([edges.pairs[:, 1], edges.pairs[:, 0]])
    degrees = np.bincount(ends, minlength=count)
    if not len(ends) or degrees.max() <= most:
        return edges
    # Positive floats sort as their bits do: one sort by row, then by falling cosine. numpy's takes four times as long.
    falling = ~np.tile(edges.similarities.view(np.uint32), 2)
    order = torch.sort(torch.from_numpy(ends << 32 | falling), stable=True)[1].numpy()
    starts = np.cumsum(degrees) - degrees
    near = np.empty(len(ends), bool)
    near[order] = np.arange(len(ends)) - np.repeat(starts, degrees) < most
    keep = near[: len(edges.pairs)] | near[len(edges.pairs) :]
    return Edges(edges.pairs[keep], edges.similarities[keep])


def communities(count: int, edges: Edges, *, seed: int = 0) -> Ints:
    """(count,) labels: rows of one label are near-duplicates of each other, or of others that are.

    Each connected component is cut by Louvain (networkx), and what comes out again, until no cut raises the modularity
    at resolution 1/2 above that of the uncut part. A part so leaves only where less than a quarter (of halves) to a
    half (of a small one) of its edges lead out: two groups joined by a chain or by a few pairs are two clusters.
    Groups of up to four rows stay whole, and those of which each row has an edge to three quarters of the others. A row
    that hangs on a group by one edge goes with it.

    Labels count up from 0 in the order of each cluster's first row. A cluster depends on its own component only, and
    not on the order of the rows, except where the graph looks the same from two of them (equal rows, equal cosines).
    """
    if not count:
        return np.empty(0, np.int64)
    first, second = edges.pairs.T
    links = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    labels = connected_components(links, directed=False)[1].astype(np.int64)
    sizes, degrees = np.bincount(labels), np.bincount(edges.pairs.ravel(), minlength=count)
    loose = np.zeros(len(sizes), bool)
    loose[labels[4 * degrees < 3 * (sizes[labels] - 1)]] = True
    loose &= sizes > 4
    # Louvain depends on the order of its nodes, so it gets one that only the graph decides.
    rows = np.lexsort((np.arange(count), _colours(count, edges)))
    rank = np.argsort(rows)
    chosen = np.flatnonzero(loose[labels[first]])
    chosen = chosen[np.argsort(labels[first[chosen]], kind="stable")]
    fresh = len(sizes)
    for part in np.split(chosen, np.flatnonzero(np.diff(labels[first[chosen]])) + 1):
        # Numbered from 0, since sets of other numbers come in other orders.
        places, ends = np.unique(rank[edges.pairs[part]], return_inverse=True)
        ends = np.sort(ends.reshape(-1, 2), axis=1)
        order = np.lexsort((ends[:, 1], ends[:, 0]))
        weights = edges.similarities[part[order]]
        for members in _cut(zip(*ends[order].T.tolist(), weights.tolist(), strict=True), seed):
            labels[rows[places[list(members)]]] = fresh
            fresh += 1
    _, starts, clusters = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(starts))[clusters]


def _cut(edges: Iterable[tuple[int, int, float]], seed: int) -> Iterator[set[int]]:
    """The clusters of one component's weighted edges."""
    graph = nx.Graph()
    graph.add_weighted_edges_from(edges)
    waiting = [graph] if graph else []
    while waiting:
        part = waiting.pop()
        found = nx.community.louvain_communities(part, resolution=_RESOLUTION, seed=seed)
        # Of the uncut part it is 1 - resolution; Louvain, which starts from single nodes, can end below.
        if nx.community.modularity(part, found, resolution=_RESOLUTION) <= 1 - _RESOLUTION + 1e-9:
            yield set(part)
            continue
        # Also where Louvain left a part without a path inside (Traag et al., arXiv 1810.08473): its cut raises it.
        waiting.extend(part.subgraph(members).copy() for members in found)


def _colours(count: int, edges: Edges) -> NDArray[np.uint64]:
    """(count,) hashes of what the graph looks like from each row, whatever the numbers of the rows.

    Weisfeiler and Lehman's refinement: in each round a row takes in its neighbours' colours and the cosines to them.
    """
    colours = np.zeros(count, np.uint64)
    cosines = edges.similarities.view(np.uint32).astype(np.uint64) << np.uint64(32)
    for _ in range(_ROUNDS):
        taken = np.zeros(count, np.uint64)
        for here, there in (edges.pairs.T, edges.pairs.T[::-1]):
            np.add.at(taken, here, _mix(_mix(cosines) + colours[there]))
        colours = _mix(colours + _mix(taken))
    return colours


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): each bit of the input changes half of those out."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
