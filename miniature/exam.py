"""What a scorecard's figures rest on: pictures that no model saw, who judges them, and how far a mean can be trusted.

In come a family and its world; out come pairs of true pictures in one style, what the judges see, and every score as a
mean with its 95 % interval.

Legend: T pictures, D embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from miniature.gallery import Gallery, Split, World
from miniature.judges import STYLE_JUDGES, load_content_judge, load_style_judge
from miniature.subject import Subject
from ztrain.errors import InputError
from ztrain.metrics.intervals import difference, interval
from ztrain.metrics.scores import correct, cosine, high_frequency_energy, leak, leak_by_chance, retrieval_at_1

RETRIEVAL_POOL = 256
CONTENT_LOSS = 0.05
"""How much content accuracy a method may lose against text-only and still be said to keep the content."""
EVALUATION_SEEDS = 1_000_000
"""Galleries of this seed and above are for scorecards; models and judges are trained on galleries below it."""

_PICTURES_OF_A_STYLE = 8  # asked of a world for each picture that is used, so that styles are distinct
_RESAMPLES = 2000
Scores = dict[str, Tensor]  # one number for each picture or triplet, by figure
Card = dict[str, Any]  # what goes into scorecard.json


# How far a mean can be trusted


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """What T pictures share, as numbers (T,): an interval draws those that share it together, as one."""

    of: str
    numbers: Tensor

    @classmethod
    def contents(cls, gallery: Gallery, labels: Sequence[str]) -> "Clusters":
        """By what is drawn."""
        classes = torch.stack([gallery.labels[label] for label in labels], 1)
        return cls(of="contents", numbers=classes.unique(dim=0, return_inverse=True)[1])

    def select(self, rows: Tensor) -> "Clusters":
        return Clusters(of=self.of, numbers=self.numbers[rows])

    @property
    def count(self) -> int:
        return len(self.numbers.unique())

    def figure(self, ours: Tensor, theirs: Tensor | None = None, *, drop_nan: bool = False) -> Card:
        """The mean of scores, or of their paired difference to others, with its interval; `count` counts pictures."""
        # Of one cluster alone no interval can be told: then it is one over pictures, and says so.
        alone = self.count < 2
        values = ours if theirs is None else difference(ours, theirs)
        found = interval(values, [] if alone else [self.numbers], drop_nan=drop_nan, resamples=_RESAMPLES)
        groups, of = (found.count, "pictures") if alone else (self.count, self.of)
        return {**found.model_dump(), "groups": groups, "groups_of": of}


# Who judges


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOutputs:
    """What the judges see in T pictures: logits by label, (T, classes), and embeddings by style judge, (T, D)."""

    logits: dict[str, Tensor]
    styles: dict[str, Tensor]

    def is_right(self, labels: dict[str, Tensor], names: Sequence[str]) -> Scores:
        return {name: correct(self.logits[name].argmax(1), labels[name]) for name in names}

    def likeness(self, targets: "JudgeOutputs", *, pools: Sequence[int] = ()) -> Scores:
        """Style cosine to the targets by both judges and, for the pool sizes of consecutive rows, R@1."""
        scores: Scores = {}
        for name, embedding in self.styles.items():
            scores[f"{name}_cosine"] = cosine(embedding, targets.styles[name])
            if pools:
                pairs = zip(embedding.split(list(pools)), targets.styles[name].split(list(pools)), strict=True)
                found = [retrieval_at_1(ours, theirs, min(RETRIEVAL_POOL, len(ours))) for ours, theirs in pairs]
                scores[f"{name}_retrieval"] = torch.cat(found)
        return scores


class Judges:
    """The three judges of a family."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.content = load_content_judge(folder, device)
        self.styles = {name: load_style_judge(folder, device, name) for name in STYLE_JUDGES}

    def look(self, images: Tensor) -> JudgeOutputs:
        styles = {name: judge.embed(images) for name, judge in self.styles.items()}
        return JudgeOutputs(logits=self.content.judge(images), styles=styles)


def score_pictures(
    images: Tensor,
    seen: JudgeOutputs,
    true: JudgeOutputs,
    asked: dict[str, Tensor],
    shown: dict[str, Tensor],
    contents: Sequence[str],
    *,
    pools: Sequence[int] = (),
) -> Scores:
    """Every score of T pictures, (T, 3, S, S) uint8, against their triplets: likeness to the target's style, what was
    asked for, what the reference shows. `contents`: the labels that say what is drawn; leak is of the first."""
    scores = dict(seen.likeness(true, pools=pools))
    scores |= {f"prompt_{name}": values for name, values in seen.is_right(asked, contents).items()}
    scores["prompt_content"] = torch.stack([scores[f"prompt_{name}"] for name in contents]).mean(0)
    scores |= {f"reference_{name}": values for name, values in seen.is_right(shown, contents).items()}
    judged = seen.logits[contents[0]].argmax(1)
    labels = (judged, shown[contents[0]], asked[contents[0]])
    scores |= {"leak": leak(*labels), "leak_by_chance": leak_by_chance(*labels)}
    return scores | {"high_frequency": high_frequency_energy(images.float() / 255)}


class Tried(Protocol):
    """What was scored: its figures' means."""

    def mean(self, name: str) -> float: ...


TriedT = TypeVar("TriedT", bound=Tried)


def most_style(tried: Sequence[TriedT], text: TriedT) -> tuple[TriedT, TriedT | None]:
    """The one with the largest style cosine, and the one with the largest of those whose content accuracy is within
    CONTENT_LOSS of text-only's; None where none is."""
    enough = text.mean("prompt_content") - CONTENT_LOSS
    keeping = [each for each in tried if each.mean("prompt_content") >= enough]

    def style(each: TriedT) -> float:
        return each.mean("style_cosine")

    return max(tried, key=style), max(keeping, key=style, default=None)


# On what


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """T pictures, each with another one of the same style and of another content: positions in their galleries.

    They come in rounds, in each of which every style occurs once at most: `rounds` says how long these are.
    """

    targets: Tensor
    references: Tensor
    rounds: list[int]

    @property
    def pools(self) -> list[int]:
        """The rounds, if one can search in them."""
        return self.rounds if min(self.rounds, default=0) >= 2 else []


def draw_pairs(gallery: Gallery, others: Gallery, label: str, count: int, seed: int) -> Pairs:
    """Up to `count` pictures of a gallery, of as many styles as there are, each with one of `others` of its style that
    differs in `label`."""
    of_style, in_style = _by_style(gallery, seed), _by_style(others, seed)
    classes, shown = gallery.labels[label].tolist(), others.labels[label].tolist()
    targets: list[int] = []
    references: list[int] = []
    rounds: list[int] = []
    for turn in range(max((len(rows) for rows in of_style.values()), default=0)):
        before = len(targets)
        for style, rows in of_style.items():
            if turn >= len(rows) or len(targets) == count:
                continue
            known = in_style.get(style, [])
            start = turn % max(1, len(known))  # another one in each round
            choices = (row for row in known[start:] + known[:start] if shown[row] != classes[rows[turn]])
            if (other := next(choices, None)) is not None:
                targets.append(rows[turn])
                references.append(other)
        if len(targets) > before:
            rounds.append(len(targets) - before)
    if len(targets) < 2:
        raise InputError(f"no two pictures of one style differ in {label}; a style cannot be judged there")
    return Pairs(
        targets=torch.tensor(targets, device=gallery.device),
        references=torch.tensor(references, device=gallery.device),
        rounds=rounds,
    )


def _by_style(gallery: Gallery, seed: int) -> dict[int, list[int]]:
    """The pictures of each style, shuffled."""
    of_style: dict[int, list[int]] = {}
    styles = gallery.styles.tolist()
    for row in torch.randperm(len(gallery), generator=torch.Generator().manual_seed(seed)).tolist():
        of_style.setdefault(styles[row], []).append(row)
    return of_style


class Exam:
    """A family, its judges, and the pictures that none of its models has seen.

    Of a painted world the judges have not seen these pictures either. Of a folder they were trained on the pictures
    of unseen contents, because they must know them; the held ones are new to everybody.
    """

    def __init__(self, subject: Subject, world: World, count: int) -> None:
        if subject.seed < 0 or max(subject.training_seeds) >= EVALUATION_SEEDS:
            raise InputError(
                f"seed {subject.seed} must not be negative, and the family's, {max(subject.training_seeds)}, must be"
                f" below {EVALUATION_SEEDS}: else pictures of the training come up again"
            )
        self.subject, self.world, self.count = subject, world, count
        self.judges = Judges(subject.folder / "judges", subject.device)
        self.contents = tuple(world.content_classes)
        self.styles = tuple(world.style_classes)
        self.main = self.contents[0]
        """The label that triplets differ in: the kind of object, or the whole content."""
        self.is_composed = self.contents != ("content",)
        """Whether contents are made of known parts, so that unseen ones can be named."""
        total = count * _PICTURES_OF_A_STYLE if self.is_composed else None
        # Splits of one seed have the same styles: targets of the two splits get different ones.
        first = EVALUATION_SEEDS + 2 * subject.seed
        seeds: dict[Split, int] = {"held": first, "unseen": first + 1}
        self.galleries = {split: world.gallery(split, total, seed, subject.device) for split, seed in seeds.items()}
        self.others = dict(self.galleries)
        if self.is_composed:
            # A style holds out one or two kinds of objects: the other picture is of an unseen content, in that style.
            self.others["held"] = world.gallery("unseen", total, seeds["held"], subject.device)
        self.pairs = {
            split: draw_pairs(gallery, self.others[split], self.main, count, subject.seed)
            for split, gallery in self.galleries.items()
            if len(gallery)
        }
        self.truth: dict[str, float] = {}
        """What the judges score on true pictures, by figure."""

    def targets(self, split: Split) -> Gallery:
        return self.galleries[split].select(self.pairs[split].targets)

    def references(self, split: Split) -> Gallery:
        return self.others[split].select(self.pairs[split].references)

    def clusters(self, split: Split, gallery: Gallery) -> Clusters:
        """Few contents are unseen, so that their pictures are no independent draws; the held ones share styles."""
        if split == "unseen":
            return Clusters.contents(gallery, self.contents)
        return Clusters(of="styles", numbers=gallery.styles)

    def labels_for(self, split: Split) -> tuple[str, ...]:
        """What the content judge is asked of this split's true pictures; a folder's unseen ones taught it content."""
        return (*self.contents, *self.styles) if split == "held" or self.is_composed else self.styles

    def figures(self, scores: Scores, clusters: Clusters, truth: bool = True) -> Card:
        """Each score's mean and interval, with the judges' own on true pictures."""
        found: Card = {}
        for name, values in scores.items():
            found[name] = clusters.figure(values)
            if truth:
                known = name.removeprefix("prompt_").removeprefix("reference_")
                found[name]["true_pictures"] = self.truth.get(known)
        return found
