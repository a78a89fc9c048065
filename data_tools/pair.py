"""Items -> triplets: each target with references that show its style, and never itself.

    python -m data_tools.pair --config my_data.yaml --table work/split --out work/pair

In: a table of data_tools.split, and the section `pair` of a config. Out: a table of triplets, for data_tools.pack.
References come from the target's own group and split and show another content; a copy of the target is none, by
clusters, by pixels and by `copy_score`, which each triplet carries. All are references about equally often.
"""

import heapq
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic

from data_tools import likeness
from data_tools.pictures import Counts
from data_tools.stages import Run, Table
from data_tools.step import count_splits, main_of_section
from data_tools.triplets import Cut, Item, Pairing, Reference, Scanned, read_items, read_left_out, write_rows
from ztrain.errors import InputError
from ztrain.images import (
    IMAGE_MULTIPLE,
    SmallTargets,
    describe_small,
    enlargement,
    pick_bucket,
    target_buckets,
)
from ztrain.io.yamls import Strict

_RULES = 2
_AT_A_TIME = 1024
_Found = tuple[Item, Sequence[Scanned], dict[str, Any]]
"""A target, its references, and columns that these add."""


class TargetRules(Strict):
    """What training will ask of targets, by the keys that the section `data` of its config has."""

    resolution: int = pydantic.Field(ge=32, multiple_of=IMAGE_MULTIPLE)
    """Side in pixels of a square target."""
    max_target_aspect: float = pydantic.Field(default=2.0, ge=1)
    """Longest side over shortest side of a target's size."""
    small_targets: SmallTargets = "refuse"
    """What becomes of targets that would be enlarged by more than max_upscale. refuse: one is an error that names them;
    leave_out: they are no targets, but may be references; upscale: they are targets, to be enlarged by training."""
    max_upscale: float = pydantic.Field(default=1.25, ge=1)
    """How many times its own width and height a target may be enlarged."""


class PairRules(Strict):
    """How many triplets, and of what."""

    references_per_triplet: int = pydantic.Field(default=1, ge=1)
    """Reference pictures in each triplet of a group, all of them different. A target whose group has fewer is left out
    and named."""
    triplets_per_target: int = pydantic.Field(default=4, ge=1)
    """Most triplets made for each target of a group, each with other references: a target that always comes with one
    reference lets a model know it by that one. Of a small group there are as many as it has references for, and the
    others are counted. What they cost is rows: a picture's states are computed once."""
    max_triplets_per_split: Annotated[int, pydantic.Field(ge=1)] | None = None
    """Cut each split to this many triplets, the groups evenly; None keeps all."""
    max_triplets_per_group: Annotated[int, pydantic.Field(ge=1)] | None = None
    """Cut large styles to this many in each split; None keeps all."""
    max_copy_score: float = pydantic.Field(default=likeness.COPY_SCORE, ge=0.8, le=1)
    """A picture of a group that is more like the target is no reference for it (data_tools.likeness); 1: all but those
    with equal pixels may be. Below 0.8 pictures of one style are not told apart."""
    self_share: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Share of targets with a further triplet whose reference is a part of the target itself, marked way: itself."""
    self_sides: tuple[float, float] = (0.5, 0.8)
    """Smallest and largest share of each side that such a part keeps."""
    self_mirrored: bool = False
    """Whether half of those parts are mirrored."""
    targets: TargetRules | None = None
    """Sizes that training will have; None: they are not known yet, and training looks by itself."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Decides references and row order."""

    @pydantic.field_validator("self_sides", mode="before")
    @classmethod
    def _from_list(cls, sides: object) -> object:
        return tuple(sides) if isinstance(sides, list) else sides

    @pydantic.field_validator("self_sides")
    @classmethod
    def _ordered(cls, sides: tuple[float, float]) -> tuple[float, float]:
        if not 0.1 <= sides[0] <= sides[1] < 1:
            raise ValueError("must be two shares, 0.1 <= smallest <= largest < 1")
        return sides


def pair(source: Table, rules: PairRules, out: Path, run: Run) -> Table:
    """Find references for each target. Raises InputError for a split that comes out empty."""
    told = Counts(left_out=read_left_out(source))
    items = read_items(source)
    splits = make_pairings(items, rules, told)
    pairings = [each for of_split in splits.values() for each in of_split]
    met = {each.target.key for each in pairings} | {one.picture.key for each in pairings for one in each.references}
    met |= {each.name for each in told.left_out}
    ways = {item.way for item in items if item.group is not None}
    targets = Counter((each.target.key, each.columns["way"]) for each in pairings if each.columns["way"] in ways)
    told.counts["further_triplets_of_a_target"] = targets.total() - len(targets)
    for picture in {one.key: one for item in items for one in (item.picture, *(item.references or ()))}.values():
        if picture.key not in met:
            told.leave_out("pictures_in_no_triplet", picture.key, "pair", "neither target nor reference of any triplet")
    about = "pair", (_RULES, rules.model_dump(mode="json"))
    return write_rows(Pairing, pairings, out, source, about, told.left_out, {**source.facts["counts"], **told.counts})


def make_pairings(items: Sequence[Item], rules: PairRules, told: Counts) -> dict[str, list[Pairing]]:
    """Split -> triplets in the order of the seed; what has no reference is left out and counted."""
    groups: dict[str, dict[tuple[str, str | None], list[Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        if item.split is None:
            raise InputError("the items have no splits; run data_tools.split first")
        groups[item.split][item.way, item.group].append(item)
    small = frozenset() if rules.targets is None else _small(items, rules.targets, told)
    splits: dict[str, list[Pairing]] = {}
    for split, of_split in sorted(groups.items(), key=_largest_first):
        streams = [_limited(_Group(members, rules, told, small), rules, told) for members in of_split.values()]
        rows = _in_turn(streams, rules.max_triplets_per_split, told)
        if not rows and not any(item.prompt for members in of_split.values() for item in members):
            raise InputError(
                f"split {split!r} gets no triplet, for no picture has a prompt: write .txt files beside them, add the"
                " section caption, or a table of contents"
            )
        if not rows:
            raise InputError(
                f"split {split!r} gets no triplet: a group needs {rules.references_per_triplet + 1} different pictures "
                "in it, or pair.self_share above 0; check label, split.shares and the table's splits"
            )
        if any(item.references is None for members in of_split.values() for item in members):
            random.Random(f"rows {rules.seed} {split}").shuffle(rows)  # rows of a table keep its order
        splits[split] = rows
    return splits


def _small(items: Sequence[Item], rules: TargetRules, told: Counts) -> frozenset[str]:
    """Keys of pictures that are too small to be targets. Raises InputError where the rules refuse them."""
    from ztrain.model.layout import padded  # here, for it brings torch

    buckets = target_buckets(rules.resolution, rules.max_target_aspect, padded)
    sizes = {item.picture.key: (item.picture.width, item.picture.height) for item in items}
    times = {key: enlargement(size, pick_bucket(size, buckets, 1.0, key)) for key, size in sizes.items()}
    small = {key: each for key, each in times.items() if each > rules.max_upscale}
    if said := describe_small(small, len(times), rules.small_targets, rules.max_upscale, "pair.targets"):
        print(f"note: {said}", file=sys.stderr)
    if rules.small_targets != "leave_out":
        return frozenset()
    for key, each in small.items():
        told.leave_out("targets_too_small", key, "pair", f"would be enlarged {each:.3g} times as a target")
    return frozenset(small)


def _largest_first(split: tuple[str, Mapping[tuple[str, str | None], Sequence[Item]]]) -> tuple[int, str]:
    return -sum(map(len, split[1].values())), split[0]


def _limited(group: "_Group", rules: PairRules, told: Counts) -> Iterator[Pairing]:
    for number, pairing in enumerate(group.pairings()):
        if rules.max_triplets_per_group is None or number < rules.max_triplets_per_group:
            yield pairing
        else:
            told.counts["triplets_cut"] += 1


def _in_turn(streams: list[Iterator[Pairing]], limit: int | None, told: Counts) -> list[Pairing]:
    """One of each stream after the other, so that a cut stays even."""
    rows: list[Pairing] = []
    while streams:
        taken = [(stream, next(stream, None)) for stream in streams]
        streams = [stream for stream, row in taken if row]
        rows += [row for _, row in taken if row]
    told.counts["triplets_cut"] += len(rows) - len(rows[:limit])
    return rows[:limit]


@dataclass(slots=True)
class _Group:
    """Items of one split that may be references for one another, or that name theirs."""

    items: list[Item]
    rules: PairRules
    told: Counts
    small: frozenset[str] = frozenset()
    """Keys of pictures that are no targets."""
    name: str = ""

    def __post_init__(self) -> None:
        first = self.items[0]
        self.name = f"{first.split}/{first.group or first.way}"

    def pairings(self) -> Iterator[Pairing]:
        chance = random.Random(f"itself {self.rules.seed} {self.name}")
        for item in self.items:
            if item.prompt is None:
                self._leave_out("targets_without_prompt", item, "has no prompt; caption it, or give a table")
        yield from self._given()
        yield from self._scored(self._with(target, others) for target, others in self._grouped())
        for item in self.items:
            chosen = item.prompt is not None and chance.random() < self.rules.self_share
            if chosen and item.picture.key not in self.small:
                yield self._itself(item, chance)

    def _given(self) -> Iterator[Pairing]:
        named = [item for item in self.items if item.references is not None and item.prompt is not None]
        named = [item for item in named if item.picture.key not in self.small]
        yield from self._scored([(item, item.references or (), {}) for item in named])

    def _grouped(self) -> Iterator[tuple[Item, list[Item]]]:
        """Every target with its references once, then every target again, in random order."""
        members = [item for item in self.items if item.group is not None]
        alike = self._alike(members)
        chance = random.Random(f"references {self.rules.seed} {self.name}")
        least_used = _LeastUsed(members, chance)
        seen = [{item.picture.pixels} for item in members]  # what a target has met, first of all itself
        wanted, without = self.rules.references_per_triplet, set()
        for turn in range(self.rules.triplets_per_target):
            for target in chance.sample(range(len(members)), len(members)):
                item = members[target]
                if item.prompt is None or item.picture.key in self.small or target in without:
                    continue
                chosen: list[int] = []
                for position in least_used.of(item):
                    other = members[position]
                    if other.picture.pixels not in seen[target] and self._may_meet(item, other, alike):
                        chosen.append(position)
                        seen[target].add(other.picture.pixels)
                    if len(chosen) == wanted:
                        break
                complete = len(chosen) == wanted
                least_used.give_back(chosen, used=complete)
                if complete:
                    yield item, [members[position] for position in chosen]
                elif turn:  # the target has its triplets
                    self.told.counts["further_triplets_without_reference"] += 1
                else:
                    without.add(target)
                    few = f"{len(chosen)} of {wanted} references" if chosen else "no reference"
                    self._leave_out("triplets_without_reference", item, f"{few} in {self.name}")

    def _alike(self, members: Sequence[Item]) -> set[frozenset[bytes]]:
        """Pairs of fingerprints that are too much alike to meet, though they differ."""
        prints = sorted({item.picture.likeness for item in members if item.picture.likeness is not None})
        most = max([self._most(item) for item in members], default=1.0)
        if len(prints) < 2 or most >= 1:
            return set()
        rows = np.frombuffer(b"".join(prints), np.uint8).reshape(len(prints), -1)
        pairs = likeness.find_copies(rows, least_score=most).pairs.tolist()
        return {frozenset((prints[one], prints[other])) for one, other in pairs}

    def _most(self, item: Item) -> float:
        return self.rules.max_copy_score if item.max_copy_score is None else item.max_copy_score

    def _may_meet(self, target: Item, other: Item, alike: set[frozenset[bytes]]) -> bool:
        if target.content == other.content:
            return False
        if target.picture.cluster == other.picture.cluster and target.gap is None:
            return False  # frames are alike by nature, and have a limit of their own
        one, two = target.picture.likeness, other.picture.likeness
        if one is None or two is None or self._most(target) >= 1:
            return True
        return one != two and frozenset((one, two)) not in alike

    def _with(self, target: Item, others: Sequence[Item]) -> _Found:
        return target, [other.picture for other in others], self._contents(target, others)

    def _contents(self, target: Item, others: Sequence[Item]) -> dict[str, Any]:
        """The column that says what references show, of groups that know; one name for all rows."""
        contents = [other.content for other in others]
        if "content" not in target.more:
            return {}
        is_one = self.rules.references_per_triplet == 1
        return {"reference_content": contents[0]} if is_one else {"reference_contents": contents}

    def _scored(self, found: Iterable[_Found]) -> Iterator[Pairing]:
        """With the score of the reference that is most like the target; without those that are too much so."""
        every = iter(found)
        while several := list(islice(every, _AT_A_TIME)):
            pairs = [(item.picture.likeness, each.likeness) for item, references, _ in several for each in references]
            known = [(one, other) for one, other in pairs if one is not None and other is not None]
            scores = iter(likeness.copy_scores(known).tolist() if len(known) == len(pairs) else [])
            for item, references, columns in several:
                score = max(islice(scores, len(references)), default=None)
                same = item.picture.pixels in {each.pixels for each in references}
                if self._most(item) < 1 and item.gap is None:
                    same |= item.picture.cluster in {each.cluster for each in references}
                if same or (score is not None and score > self._most(item)):
                    reason = f"is a copy of its reference (copy_score {1.0 if same else score:.3f})"
                    self._leave_out("pairs_too_alike", item, reason)
                    continue
                told = {"way": item.way, "copy_score": None if score is None else round(score, 4)}
                yield Pairing(
                    split=str(item.split),
                    target=item.picture,
                    references=tuple(Reference(each) for each in references),
                    prompt=str(item.prompt),
                    columns={**item.more, **columns, **told},
                )

    def _itself(self, item: Item, chance: random.Random) -> Pairing:
        """A triplet of a picture and a part of itself, which no copy score is asked of."""
        picture, (least, most) = item.picture, self.rules.self_sides
        share = least + (most - least) * chance.random()
        # One pixel less at the least, or it would be the target itself.
        width, height = (max(1, min(side - 1, round(side * share))) for side in (picture.width, picture.height))
        left, top = chance.randint(0, picture.width - width), chance.randint(0, picture.height - height)
        mirrored = self.rules.self_mirrored and chance.random() < 0.5
        cut = Cut(left, top, left + width, top + height, mirrored)
        return Pairing(
            split=str(item.split),
            target=picture,
            references=(Reference(picture, cut),),
            prompt=str(item.prompt),
            columns={**item.more, **self._contents(item, [item]), "way": "itself", "copy_score": 1.0},
        )

    def _leave_out(self, what: str, item: Item, reason: str) -> None:
        self.told.leave_out(what, item.picture.key, "pair", reason)


class _LeastUsed:
    """Hands out members by how often they were references, so that all are about equally often."""

    def __init__(self, members: Sequence[Item], chance: random.Random) -> None:
        self._chance = chance
        self._heap = sorted((0, chance.random(), position) for position in range(len(members)))
        self._taken: list[tuple[int, float, int]] = []
        # Of frames only those so many places away, or a long clip would be gone through for each of its frames.
        self._places = {item.order: position for position, item in enumerate(members) if item.gap is not None}
        self._keys = {position: (0, order) for _, order, position in self._heap}

    def of(self, target: Item) -> Iterator[int]:
        """Positions for a target, the least used first; to be given back."""
        if target.gap is not None:
            near, far = target.gap
            orders = [target.order + sign * gap for gap in range(near, far + 1) for sign in (-1, 1)]
            found = [self._places[order] for order in orders if order in self._places]
            yield from sorted(found, key=self._keys.__getitem__)
            return
        while self._heap:
            self._taken.append(heapq.heappop(self._heap))
            yield self._taken[-1][2]

    def give_back(self, chosen: Sequence[int], *, used: bool) -> None:
        for entry in self._taken:
            if entry[2] not in chosen:
                heapq.heappush(self._heap, entry)
        uses = {position: count for count, _, position in self._taken}
        for position in chosen:
            count = uses.get(position, self._keys[position][0]) + used
            self._keys[position] = (count, self._chance.random())
            if position in uses:
                heapq.heappush(self._heap, (*self._keys[position], position))
        self._taken = []


main = main_of_section(pair, PairRules, count_splits)

if __name__ == "__main__":
    sys.exit(main())
