"""Whose reference a row is shown in the place of its own: of another style wherever there is one."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztrain.data.digests import Known
from ztrain.data.exchange import Case, Exchange, exchange
from ztrain.errors import InputError
from ztrain.images import PictureFile

Rows = list[tuple[str | None, tuple[str, ...]]]


def exchanged(rows: Rows, seed: int = 0) -> Exchange:
    looks = [tuple(Known(PictureFile(Path("a.png")), digest, 1, 1) for digest in look) for _, look in rows]
    styles = [{"style": style} for style, _ in rows]
    cases = [Case(prompt="", references=r, where="", columns=c) for r, c in zip(looks, styles, strict=True)]
    return exchange(cases, seed, "rows", "add some")


@st.composite
def styled(draw: st.DrawFn) -> Rows:
    """Groups of any sizes, each row with a picture of its own, in any order."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=2, max_size=6))
    rows: Rows = [(f"s{group}", (f"{group}-{i}",)) for group, size in enumerate(sizes) for i in range(size)]
    return draw(st.permutations(rows))


@settings(max_examples=150, deadline=None)
@given(styled(), st.integers(0, 9))
def test_no_row_gets_its_own_style_and_each_gives_once_where_that_can_be(rows: Rows, seed: int) -> None:
    found = exchanged(rows, seed)
    assert found.share == 1.0 and found.words == ""
    assert all(rows[other][0] != style for other, (style, _) in zip(found.others, rows, strict=True))
    assert found == exchanged(rows, seed)
    largest = max(Counter(style for style, _ in rows).values())
    if 2 * largest <= len(rows):
        assert sorted(found.others) == list(range(len(rows)))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.tuples(st.sampled_from("uvwxyz"))), min_size=2),
    st.integers(0, 9),
)
def test_any_rows_get_other_references_and_of_another_style_where_one_is_known(rows: Rows, seed: int) -> None:
    """Also where styles are said of some rows only, and where rows share their references."""
    if len({look for _, look in rows}) < 2:
        with pytest.raises(InputError, match=f"all {len(rows)} rows have the same references, .*; add some"):
            exchanged(rows, seed)
        return
    found = exchanged(rows, seed)
    better = []
    for (style, look), other in zip(rows, found.others, strict=True):
        assert rows[other][1] != look
        exists = any(s not in (None, style) and other_look != look for s, other_look in rows) and style is not None
        assert (style is not None and rows[other][0] not in (None, style)) == exists
        better.append(exists)
    assert found.share == sum(better) / len(rows) and (found.words == "") == all(better)


def test_other_seeds_give_other_pairs() -> None:
    rows: Rows = [(f"s{i % 4}", (str(i),)) for i in range(32)]
    assert len({tuple(exchanged(rows, seed).others) for seed in range(8)}) == 8
