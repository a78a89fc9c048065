"""Who is in which split, so that nothing of one is known from another.

    python -m data_tools.split --config my_data.yaml --table work/label --out work/split

In: a table of data_tools.label, and the section `split` of a config. Out: the same items, each with its split. What
hangs together (copies of one picture, pictures of one content, of one style if asked, a target and its named
references) goes to one split. Where somebody has given splits, what would be in two of them is left out of the larger.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_tools.groups import check_splits
from data_tools.output import SortedSet, fingerprint
from data_tools.pictures import Counts
from data_tools.stages import Run, Table
from data_tools.step import count_splits, main_of_section
from data_tools.triplets import Item, Pairing, read_items, read_left_out, write_rows
from ztrain.errors import InputError
from ztrain.io.forms import folded
from ztrain.io.yamls import Strict

_RULES = 1
Tie = Literal["copies", "content", "style"]


class SplitRules(Strict):
    """How large splits are, and what no two of them share."""

    shares: dict[str, float] = {"train": 0.95, "validation": 0.05}
    """Split -> share of the items that have none yet; they are divided by the shares' sum."""
    apart: SortedSet[Tie] = frozenset({"copies", "content"})
    """copies: of one picture, itself among them. content: what is drawn, or the clip. style: for a validation of styles
    that training has never seen. Empty: nothing is kept apart, and the report says what is shared."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Decides who goes where."""

    @pydantic.field_validator("shares")
    @classmethod
    def _possible(cls, shares: dict[str, float]) -> dict[str, float]:
        check_splits(list(shares))
        for name, share in shares.items():
            if not share > 0:
                raise ValueError(f"the share of {name} must be above 0; leave the split out instead")
        if not shares:
            raise ValueError("needs at least one split")
        return shares


def split(source: Table, rules: SplitRules, out: Path, run: Run) -> Table:
    """Give each item its split. Raises InputError where no split can be made."""
    told = Counts(left_out=read_left_out(source))
    items = assign(read_items(source), rules, told)
    about = "split", (_RULES, rules.model_dump(mode="json"))
    return write_rows(Item, items, out, source, about, told.left_out, {**source.facts["counts"], **told.counts})


def assign(items: Sequence[Item], rules: SplitRules, told: Counts) -> list[Item]:
    """Items with their splits; those that cannot be in any are left out and counted. Raises InputError."""
    ties = [list(_ties(item, rules.apart)) for item in items]
    pieces = _pieces(ties)
    given: dict[int, Counter[str]] = defaultdict(Counter)
    for item, piece in zip(items, pieces, strict=True):
        if item.split is not None:
            given[piece][item.split] += 1
    free = Counter(piece for piece in pieces if piece not in given)
    places = _shares(free, items, pieces, rules, is_all=not given) if free else {}
    # What hangs together with given items goes where most of them are; of equals, the later in the alphabet.
    places |= {piece: max(counts, key=lambda name: (counts[name], name)) for piece, counts in given.items()}
    placed = [replace(item, split=item.split or places[piece]) for item, piece in zip(items, pieces, strict=True)]
    kept = list(_without_leaks(placed, ties, _order(placed), told))
    if lost := sorted({str(item.split) for item in placed} - {item.split for item in kept}):
        raise InputError(
            f"split {lost[0]!r} shares all that it has with others; change the splits that are given, or split.apart"
        )
    return kept


def _ties(item: Item, apart: Iterable[Tie]) -> Iterator[tuple[str, str]]:
    """What an item shares with all that must be in its split."""
    if "copies" in apart:
        for picture in (item.picture, *(item.references or ())):
            yield "copies", picture.cluster
            yield "pixels", picture.pixels  # also of another style, whose pictures are no copies
    if "content" in apart and item.whole is not None:
        yield "content", folded(item.whole)
    if "style" in apart and item.group is not None:
        yield "style", folded(item.group)


def _pieces(ties: Sequence[Sequence[tuple[str, str]]]) -> list[int]:
    """For each item the number of the piece of all that hangs together with it."""
    numbers: dict[tuple[str, str], int] = {}
    ends = [(place, numbers.setdefault(tie, len(numbers))) for place, each in enumerate(ties) for tie in each]
    size = len(ties) + len(numbers)
    rows = np.array([end for end, _ in ends], np.int64)
    columns = np.array([len(ties) + end for _, end in ends], np.int64)
    links = coo_array((np.ones(len(ends), np.int8), (rows, columns)), shape=(size, size))
    labels: list[int] = connected_components(links, directed=False)[1][: len(ties)].tolist()
    return labels


def _shares(
    free: Mapping[int, int], items: Sequence[Item], pieces: Sequence[int], rules: SplitRules, *, is_all: bool
) -> dict[int, str]:
    """Piece -> split. In an order by hash, so that a picture more moves hardly any other. Raises InputError where there
    are too few; is_all: no split has any item yet."""
    names = list(rules.shares)
    first: dict[int, str] = {}
    groups: dict[int, Counter[str]] = defaultdict(Counter)
    for item, piece in zip(items, pieces, strict=True):
        if piece in free:
            first[piece] = min(first.get(piece, item.picture.digest), item.picture.digest)
            groups[piece].update([item.group] if item.group is not None else [])
    if is_all and len(free) < len(names):
        by = f" by {', '.join(sorted(rules.apart))}" if rules.apart else ""
        raise InputError(
            f"all {sum(free.values())} pictures hang together in {len(free)} pieces{by}, too few for the splits"
            f" {', '.join(names)}; change split.apart or split.shares"
        )
    waiting = _Waiting(sorted(free, key=lambda piece: fingerprint("split", rules.seed, first[piece])), groups)
    total, share_sum = sum(free.values()), sum(rules.shares.values())
    places: dict[int, str] = {}
    for later, name in reversed(list(enumerate(names))):  # the first split gets what the others leave
        wanted, filled = total * rules.shares[name] / share_sum, 0
        waiting.begin()
        while len(waiting) > (later if is_all else 0):
            piece = waiting.next()
            if later and filled and filled + free[piece] / 2 > wanted and not waiting.lonely:
                break
            waiting.take(piece)
            places[piece] = name
            filled += free[piece]
    return places


class _Waiting:
    """Pieces in order, until they are taken; first those that give a reference to what has come without one."""

    def __init__(self, order: Sequence[int], groups: Mapping[int, Counter[str]]) -> None:
        self._left, self._groups = dict.fromkeys(order), groups
        self._of_group: dict[str, list[int]] = defaultdict(list)
        self.begin()
        for piece in reversed(order):
            for group in groups[piece]:
                self._of_group[group].append(piece)

    def __len__(self) -> int:
        return len(self._left)

    def begin(self) -> None:
        """Of the next split."""
        self._members: Counter[str] = Counter()
        self.lonely: dict[str, None] = {}
        """Groups with a single picture in this split, of which there are more."""

    def next(self) -> int:
        while self.lonely:
            pieces = self._of_group[group := next(iter(self.lonely))]
            while pieces and pieces[-1] not in self._left:
                pieces.pop()
            if pieces:
                return pieces[-1]
            del self.lonely[group]
        return next(iter(self._left))

    def take(self, piece: int) -> None:
        del self._left[piece]
        self._members.update(self._groups[piece])
        for group in self._groups[piece]:
            if self._members[group] == 1:
                self.lonely[group] = None
            else:
                self.lonely.pop(group, None)


def _order(items: Sequence[Item]) -> dict[str, int]:
    """Split -> rank; the largest first: what leaks is left out of it, and small splits stay whole."""
    counts = Counter(str(item.split) for item in items)
    return {name: rank for rank, name in enumerate(sorted(counts, key=lambda name: (-counts[name], name)))}


def _without_leaks(
    items: Sequence[Item], ties: Sequence[Sequence[tuple[str, str]]], order: Mapping[str, int], told: Counts
) -> Iterator[Item]:
    latest: dict[tuple[str, str], str] = {}
    for item, each in zip(items, ties, strict=True):
        for tie in each:
            latest[tie] = max(latest.get(tie, str(item.split)), str(item.split), key=order.__getitem__)
    for item, each in zip(items, ties, strict=True):
        leaks = [(what, latest[what, value]) for what, value in each if latest[what, value] != item.split]
        if leaks:
            what, where = leaks[0]
            reason = f"shares its {what} with {where}; left out of {item.split}"
            told.leave_out("left_out_of_a_split_for_another", item.picture.key, "split", reason)
        else:
            yield item


def shared(splits: Mapping[str, Sequence[Pairing]]) -> dict[str, dict[str, int]]:
    """ "train and validation" -> what both have, counted over targets and references: pictures, copies, and values of
    the columns style and content, whatever their capitals."""
    seen: dict[str, dict[str, set[object]]] = {}
    for name, of_split in splits.items():
        pictures = {each for one in of_split for each in (one.target, *(known.picture for known in one.references))}
        seen[name] = {
            "pictures": {picture.pixels for picture in pictures},
            "copies": {picture.cluster for picture in pictures},
            "contents": {_same(value) for one in of_split for value in _contents(one.columns)},
            "styles": {_same(one.columns["style"]) for one in of_split if "style" in one.columns},
        }
    names = list(splits)
    return {
        f"{one} and {other}": {what: len(seen[one][what] & seen[other][what]) for what in seen[one]}
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    }


def _same(value: object) -> str:
    """Equal for names that differ in their Unicode form or in capitals alone."""
    return folded(json.dumps(value, ensure_ascii=False))


def _contents(columns: Mapping[str, object]) -> Iterator[object]:
    for name in ("content", "reference_content"):
        if name in columns:
            yield columns[name]
    several = columns.get("reference_contents")
    yield from several if isinstance(several, list) else ()


main = main_of_section(split, SplitRules, count_splits)

if __name__ == "__main__":
    sys.exit(main())
