"""Pictures that are copies of one another -> clusters with one representative each; nothing is deleted.

    python -m data_tools.dedup --table work/scan --out work/dedup

In: a table of data_tools.scan or data_tools.filter. Out: the same rows with `cluster` (the representative's key),
`copy_of` (empty for a representative), `copy_by` (bytes, pixels, or likeness) and `copy_score`. With a column of
embeddings also `meaning`: the community of pictures that show nearly the same (data_tools.communities). Where folders
are styles, those of other folders are no copies: one drawing in two styles is what training learns most from.

Of a cluster the picture with the most pixels represents, then the most bytes, then a caption, then the first name. One
without a caption takes over that of its first copy with one (`caption_from`).
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pydantic
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_tools import likeness
from data_tools.names import style_of
from data_tools.stages import Run, Table, attach
from data_tools.step import main_of_options
from ztrain.errors import InputError
from ztrain.io.yamls import Strict


class DedupRules(Strict):
    """What counts as a copy."""

    mirrored: bool = False
    """Whether a picture's mirror image is a copy of it."""
    across_folders: bool | None = None
    """Whether pictures of different folders are copies of one another. If not, those that are alike stay and are
    counted. None: they are, but in a build whose folders are styles (label.styles)."""
    embedding_column: str | None = None
    """Column with an embedding of each picture, for `meaning`; None leaves it out."""
    min_similarity: float = pydantic.Field(default=0.95, gt=0, le=1)
    """Cosine from which two embeddings are neighbours."""


ADDS = pa.schema(
    [
        ("cluster", pa.string()),
        ("copy_of", pa.string()),
        ("copy_by", pa.string()),
        ("copy_score", pa.float32()),  # to the representative, 0..1; of chains it may be low
        ("caption", pa.string()),
        ("caption_from", pa.string()),
    ]
)
EQUAL_KEPT, ALIKE_KEPT = "equal_pictures_of_other_folders_kept", "near_copies_of_other_folders_kept"
"""Counts of pictures beyond the first in a cluster over folders."""
_RULES = 3


def dedup(source: Table, rules: DedupRules, out: Path, run: Run) -> Table:
    """Find copies and say which picture stands for each cluster of them. Raises InputError."""
    columns = ["source", "name", "refused", "digest", "pixels", "width", "height", "bytes", "likeness"]
    rows = source.read([*columns, "caption", "caption_from"])
    usable = np.flatnonzero(rows["refused"].is_null().to_numpy())
    if not len(usable):
        raise InputError(f"{source.folder}: no picture is left that could be a copy; lower the limits before it")
    kept = rows.take(pa.array(usable)).to_pylist()
    if any(row["likeness"] is None for row in kept):
        raise InputError(f"{source.folder}: has no fingerprints; scan with --measures quality likeness")
    keys = [f"{row['source']}/{row['name']}" for row in kept]
    first, counts = _representatives(kept, keys, rules.mirrored), {}
    if rules.across_folders is False:
        everywhere, first = first, _within_folders(kept, keys, rules.mirrored)
        counts = _alike(kept, first, everywhere)
    captions = rows.select(["caption", "caption_from"]).to_pylist()
    found: list[dict[str, Any]] = [dict.fromkeys(ADDS.names) | captions[row] for row in range(rows.num_rows)]
    for place, row in enumerate(usable):
        found[row] |= {"cluster": keys[first[place]]}
        if first[place] != place:
            found[row] |= _copy(kept[place], kept[first[place]], rules.mirrored) | {"copy_of": keys[first[place]]}
    for place in sorted(range(len(kept)), key=lambda place: keys[place]):  # the first by name
        first_row, row = usable[first[place]], kept[place]
        if found[first_row]["caption"] is None and row["caption"] is not None:
            author = f"{row['caption_from']} of its copy {keys[place]}"
            found[first_row] |= {"caption": row["caption"], "caption_from": author}
    added = pa.Table.from_pylist(found, ADDS)
    if rules.embedding_column is not None:
        meaning = pa.array(_meaning(source, rules, usable, keys, rows.num_rows), pa.string())
        added = added.append_column("meaning", meaning)
    facts = {"counts": {**source.facts.get("counts", {}), **counts}}
    return attach(source, out, added, name="dedup", about=(_RULES, rules.model_dump(mode="json")), facts=facts)


def _representatives(rows: Sequence[dict[str, Any]], keys: Sequence[str], mirrored: bool) -> np.ndarray:
    """For each row the place of the one that represents its cluster."""
    prints = np.frombuffer(b"".join(row["likeness"] for row in rows), np.uint8).reshape(len(rows), likeness.BYTES)
    pairs = [tuple(pair) for pair in likeness.find_copies(prints, mirrored=mirrored).pairs]
    for column in ("digest", "pixels"):
        pairs += _equal([row[column] for row in rows])
    ends = np.array(pairs, np.int64).reshape(-1, 2).T
    links = coo_array((np.ones(ends.shape[1], np.int8), (ends[0], ends[1])), shape=(len(rows), len(rows)))
    labels = connected_components(links, directed=False)[1]

    def rank(place: int) -> tuple[Any, ...]:
        row = rows[place]
        return -row["width"] * row["height"], -row["bytes"], row["caption"] is None, keys[place]

    first: dict[int, int] = {}
    for place in sorted(range(len(rows)), key=rank):
        first.setdefault(int(labels[place]), place)
    return np.array([first[int(label)] for label in labels])


def _within_folders(rows: Sequence[dict[str, Any]], keys: Sequence[str], mirrored: bool) -> np.ndarray:
    """As `_representatives`, of each folder alone."""
    folders: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        folders[style_of(row["source"], row["name"])].append(place)
    first = np.arange(len(rows))
    for places in map(np.array, folders.values()):
        own = _representatives([rows[place] for place in places], [keys[place] for place in places], mirrored)
        first[places] = places[own]
    return first


def _alike(rows: Sequence[dict[str, Any]], first: np.ndarray, everywhere: np.ndarray) -> dict[str, int]:
    """How many pictures stay that would be copies if folders counted for nothing, by how they are alike; `first` and
    `everywhere`: what stands for each picture in its folder, and in all."""
    staying = [place for place in range(len(rows)) if first[place] == place]
    equal = len(staying) - len({rows[place]["pixels"] for place in staying})
    every = sum(int(everywhere[place] != place) for place in staying)
    return {EQUAL_KEPT: equal, ALIKE_KEPT: every - equal}


def _copy(row: dict[str, Any], first: dict[str, Any], mirrored: bool) -> dict[str, Any]:
    score = likeness.copy_score(row["likeness"], first["likeness"], mirrored=mirrored)
    ways = [way for way, column in (("bytes", "digest"), ("pixels", "pixels")) if row[column] == first[column]]
    return {"copy_by": [*ways, "likeness"][0], "copy_score": float(score)}


def _equal(values: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of a value's first place and its others."""
    first: dict[str, int] = {}
    for place, value in enumerate(values):
        if (known := first.setdefault(value, place)) != place:
            yield known, place


def _meaning(source: Table, rules: DedupRules, usable: np.ndarray, keys: Sequence[str], count: int) -> list[str | None]:
    from data_tools import communities  # torch, which the rest does without

    column = rules.embedding_column
    assert column is not None
    values = source.read([column])[column].combine_chunks().take(pa.array(usable))
    if values.null_count:
        raise InputError(f"{source.folder}: {values.null_count} pictures have no {column!r}; embed them first")
    embeddings = np.stack(values.to_numpy(zero_copy_only=False))
    edges = communities.neighbours(embeddings, rules.min_similarity)
    labels = communities.communities(len(usable), edges)
    first = np.unique(labels, return_index=True)[1]
    meaning: list[str | None] = [None] * count
    for place, row in enumerate(usable):
        meaning[row] = keys[first[labels[place]]]
    return meaning


def _say(table: Table, rules: DedupRules, source: Table) -> str:
    copies = [way for way in table.read(["copy_by"])["copy_by"].to_pylist() if way]
    ways = ", ".join(f"{copies.count(way)} by {way}" for way in ("bytes", "pixels", "likeness"))
    counts = table.facts["counts"]
    kept = [f"; {name.replace('_', ' ')}: {counts[name]}" for name in (EQUAL_KEPT, ALIKE_KEPT) if name in counts]
    return f"{len(copies)} copies ({ways}){''.join(kept)}"


main = main_of_options(dedup, DedupRules, _say, is_stage=False)

if __name__ == "__main__":
    sys.exit(main())
