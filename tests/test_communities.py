"""Near-duplicates: every pair is found that a plain comparison finds, and chains between groups do not join them."""

import tracemalloc
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from benchmarks.embeddings import THRESHOLD, adjusted_rand, synthetic, true_edges
from data_tools import communities as room
from data_tools.communities import Edges, communities, neighbours
from ztrain.errors import InputError


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def clustered(rng: np.random.Generator, sizes: list[int], width: int, spread: float) -> np.ndarray:
    """Unit rows around random centres, one after the other: cosines inside a cluster are about 1 - spread**2."""
    centres = unit(rng.normal(size=(len(sizes), width)))
    noise = unit(rng.normal(size=(sum(sizes), width)))
    return unit(np.repeat(centres, sizes, axis=0) + spread * noise)


def compared(embeddings: np.ndarray, threshold: float, most: int) -> Edges:
    """What `neighbours` promises, from the table of all cosines."""
    rows = unit(embeddings.astype(np.float64))
    cosines = (rows @ rows.T).astype(np.float32)
    np.fill_diagonal(cosines, -1)
    near = cosines >= np.float32(threshold)
    if most < len(rows):
        places = np.argsort(np.argsort(-cosines, axis=1, kind="stable"), axis=1)
        near &= (places < most) | (places.T < most)
    pairs = np.argwhere(np.triu(near, 1))
    return Edges(pairs, cosines[pairs[:, 0], pairs[:, 1]])


def edges_of(pairs: list[tuple[int, int]]) -> Edges:
    return Edges(np.array(sorted(pairs), np.int64).reshape(-1, 2), np.full(len(pairs), 0.95, np.float32))


def clique(first: int, size: int) -> list[tuple[int, int]]:
    return list(combinations(range(first, first + size), 2))


def groups(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 9), max_size=12),
    repeated=st.integers(0, 6),
    spread=st.sampled_from([0.05, 0.3, 0.6]),
    width=st.sampled_from([1, 3, 16, 100]),
    threshold=st.one_of(st.floats(0.05, 1), st.none()),
    half=st.booleans(),
    most=st.sampled_from([1, 3, 100]),
    height=st.integers(1, 20),
    times=st.integers(1, 3),
    strip=st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_the_pairs_are_those_of_a_plain_comparison(
    seed: int, sizes: list[int], repeated: int, spread: float, width: int, threshold: float | None, half: bool,
    most: int, height: int, times: int, strip: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    rows = clustered(rng, sizes, width, spread)
    if len(rows):
        rows = rng.permutation(np.concatenate([rows, np.repeat(rows[:1], repeated, axis=0)]))
    rows = rows.astype(np.float16 if half else np.float32)
    if threshold is None:  # that of a pair, which the error of bfloat16 moves across it
        reached = compared(rows, 0.05, 100).similarities
        threshold = float(reached[seed % len(reached)]) if len(reached) else 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_HEIGHT", height)
        patch.setattr(room, "_WIDTH", height * times)
        patch.setattr(room, "_STRIP", strip)
        patch.setattr(room, "_BUFFER", 10)
        found = neighbours(rows, threshold, max_neighbours=most)
    expected = compared(rows, threshold, most)
    np.testing.assert_array_equal(found.pairs, expected.pairs)
    np.testing.assert_array_equal(found.similarities, expected.similarities)
    assert found.pairs.dtype == np.int64 and found.similarities.dtype == np.float32
    single = unit(rows.astype(np.float32))
    np.testing.assert_allclose((single @ single.T)[*found.pairs.T], found.similarities, atol=1e-6)


def test_tiles_of_the_real_size_and_a_memory_map(tmp_path: Path) -> None:
    rows = clustered(np.random.default_rng(0), [2] * 1900 + [900], 32, 0.3).astype(np.float16)
    assert room._WIDTH < len(rows) < room._WIDTH + room._HEIGHT * 3
    mapped = np.memmap(tmp_path / "rows", np.float16, "w+", shape=rows.shape)
    mapped[:] = rows
    expected = compared(rows, 0.9, 5000)
    for given_rows, threads in ((rows, 1), (mapped, 3)):
        torch.set_num_threads(threads)
        try:
            found = neighbours(given_rows, 0.9, max_neighbours=5000)
            assert torch.get_num_threads() == threads, "it is the caller's"
        finally:
            torch.set_num_threads(1)
        np.testing.assert_array_equal(found.pairs, expected.pairs)
        np.testing.assert_array_equal(found.similarities, expected.similarities)


def test_planted_clusters_come_out_exactly_though_chains_join_some() -> None:
    rng = np.random.default_rng(1)
    sizes = [1] * 150 + [2, 3, 5, 8, 13, 30] * 15 + [150]
    rows = clustered(rng, sizes, 128, 0.2)
    planted = np.repeat(np.arange(len(sizes)), sizes)
    firsts = np.cumsum([0, *sizes[:-1]])[np.array(sizes) >= 5]
    # From one cluster to the next in steps of a sixth of the way: neighbours on it are near-duplicates.
    chains = [unit(rows[a] * (1 - t) + rows[b] * t) for a, b in zip(firsts, firsts[1:], strict=False)
              for t in np.linspace(0, 1, 7)[1:-1]]  # fmt: skip
    order = rng.permutation(len(rows) + len(chains))
    place = np.argsort(order)[: len(rows)]
    found = neighbours(np.concatenate([rows, chains])[order].astype(np.float16), 0.9)
    ones = np.ones(len(found.pairs))
    graph = coo_array((ones, (found.pairs[:, 0], found.pairs[:, 1])), shape=(len(order), len(order)))
    joined = connected_components(graph, directed=False)[1][place]
    assert len({int(joined[first]) for first in firsts}) == 1  # a walk along edges would take them for one
    assert groups(communities(len(order), found)[place]) == groups(planted)


@pytest.mark.parametrize("sizes", [(3, 3), (5, 5), (5, 60), (60, 60)])
@pytest.mark.parametrize("bridge", ["edge", "row", "chain"])
def test_two_groups_stay_two_where_a_few_edges_join_them(sizes: tuple[int, int], bridge: str) -> None:
    first, second = sizes
    start, free = first, sum(sizes)
    pairs = clique(0, first) + clique(start, second)
    between = {"edge": [], "row": [free], "chain": [free, free + 1, free + 2]}[bridge]
    way = [first - 1, *between, start]
    pairs += [(min(a, b), max(a, b)) for a, b in zip(way, way[1:], strict=False)]
    labels = communities(free + len(between), edges_of(pairs))
    assert groups(labels[:free]) == {frozenset(range(first)), frozenset(range(first, free))}


def test_a_row_alike_to_all_of_two_groups_does_not_join_them() -> None:
    pairs = clique(0, 8) + clique(8, 8) + [(row, 16) for row in range(16)]
    labels = communities(17, edges_of(pairs))
    assert groups(labels[:16]) == {frozenset(range(8)), frozenset(range(8, 16))}


def test_one_group_stays_one_where_edges_are_missing_or_a_row_hangs_on() -> None:
    rng = np.random.default_rng(2)
    for size in (6, 12, 40):
        pairs = [pair for pair in clique(0, size) if rng.random() < 0.7] + [(0, size), (1, size + 1)]
        assert set(communities(size + 2, edges_of(pairs))) == {0}
    # More rows than each may have neighbours: the graph is far from complete.
    rows = clustered(rng, [600], 128, 0.2).astype(np.float16)
    assert set(communities(600, neighbours(rows, 0.9, max_neighbours=20))) == {0}


def test_a_long_chain_is_cut_into_short_pieces() -> None:
    labels = communities(300, edges_of([(row, row + 1) for row in range(299)]))
    assert (np.diff(labels) >= 0).all() and np.bincount(labels).max() <= 6


def test_where_a_cut_is_as_good_as_none_the_rows_stay_together() -> None:
    # Three ways to cut this ring into threes, each with the modularity of no cut; Louvain takes one by its seed.
    ring = [(0, 2), (0, 8), (1, 2), (2, 3), (3, 5), (4, 5), (5, 6), (6, 8), (7, 8)]
    assert set(communities(9, edges_of(ring)).tolist()) == {0}


@given(seed=st.integers(0, 2**32 - 1), most=st.sampled_from([4, 100]))
@settings(max_examples=15, deadline=None)
def test_clusters_depend_neither_on_the_order_of_the_rows_nor_on_other_components(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    rows = unit(rng.normal(size=(120, 5))).astype(np.float32)  # so few dimensions that all hang together
    labels = communities(120, neighbours(rows, 0.8, max_neighbours=most))
    assert len(set(labels)) > 3
    assert list(dict.fromkeys(labels.tolist())) == list(range(labels.max() + 1))
    order = rng.permutation(120)
    again = communities(120, neighbours(rows[order], 0.8, max_neighbours=most))
    assert groups(again[np.argsort(order)]) == groups(labels)
    beside = np.zeros((150, 7), np.float32)
    beside[:120, :5] = rows
    beside[120:, 5:] = unit(rng.normal(size=(30, 2)))
    assert (communities(150, neighbours(beside, 0.8, max_neighbours=most))[:120] == labels).all()


def test_thousands_of_equal_rows_are_one_cluster_within_the_cap() -> None:
    count, most = 5000, 20
    rows = np.repeat(unit(np.random.default_rng(3).normal(size=(1, 16))), count, axis=0).astype(np.float16)
    tracemalloc.start()
    found = neighbours(rows, 0.9, max_neighbours=most)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    first, second = found.pairs.T
    # Of equals the first count as nearest; the nearest of row 0 are 1 to 20, of row 100 they are 0 to 19.
    assert ((first < most) | (second <= most)).all() and (found.similarities == 1).all()
    assert len(found.pairs) == sum(count - 1 - row for row in range(most))
    assert peak < 250e6, "all pairs take more"
    assert set(communities(count, found)) == {0}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_rows(count: int) -> None:
    rows = np.eye(count, 4, dtype=np.float16)
    found = neighbours(rows, 0.9)
    assert found.pairs.shape == (0, 2) and found.similarities.shape == (0,)
    assert communities(count, found).tolist() == list(range(count))


def test_the_benchmark_knows_its_clusters_and_when_they_are_found() -> None:
    assert adjusted_rand(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1])) == pytest.approx(4 / 7)
    assert adjusted_rand(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == pytest.approx(-0.5)
    data = synthetic(2000, width=256)
    labels = communities(2000, neighbours(data.embeddings, THRESHOLD))
    known = data.planted >= 0
    assert adjusted_rand(labels[known], data.planted[known]) == 1 and (~known).sum() == 12
    sample = np.arange(0, 2000, 10)
    expected = compared(data.embeddings, THRESHOLD, 2000).pairs
    found = true_edges(data.embeddings, sample)
    both = np.concatenate([expected, expected[:, ::-1]])
    assert {tuple(pair) for pair in found} == {tuple(pair) for pair in both if pair[0] % 10 == 0}
    background = [row @ other for row, other in zip(*np.split(data.embeddings.astype(np.float32), 2), strict=True)]
    assert 0.3 < np.mean(background) < 0.6


GOOD = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize(
    "embeddings, threshold, most, said",
    [
        (
            GOOD * np.array([[1], [1], [2]], np.float32),
            0.9,
            9,
            "row 2 .* length 2, not 1; divide each row by its length",
        ),
        (GOOD * np.array([[1], [0], [1]], np.float32), 0.9, 9, "row 1 .* length 0, not 1; .* leave out rows"),
        (np.where(GOOD == 1, np.float32("nan"), GOOD), 0.9, 9, "row 0 .* length nan, not 1; .* not finite"),
        (np.where(GOOD == 1, np.float32("inf"), GOOD), 0.9, 9, "row 0 .* length inf, not 1; .* not finite"),
        (GOOD[0], 0.9, 9, r"shape \(3,\) and type float32 .*; give a table"),
        (np.empty((3, 0), np.float32), 0.9, 9, r"shape \(3, 0\) .*; give a table"),
        (np.eye(3), 0.9, 9, "type float64 .*; give a table .* of float16 or float32"),
        (GOOD, 0.0, 9, "threshold 0 .*; give one above 0 and at most 1"),
        (GOOD, 1.5, 9, "threshold 1.5 .*; give one above 0 and at most 1"),
        (GOOD, float("nan"), 9, "threshold nan .*; give one above 0 and at most 1"),
        (GOOD, 0.9, 0, "max_neighbours 0 keeps no pair; give at least 1"),
    ],
)
def test_what_cannot_be_compared_is_told_plainly(
    embeddings: np.ndarray, threshold: float, most: int, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        neighbours(embeddings, threshold, max_neighbours=most)
