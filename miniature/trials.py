"""Lists of adapters on trial: a comparison's columns on triplets whose styles and contents the family's judges know.

In come an experiment, rows of one split and entries as `ztrain compare` has them; out come each entry's pictures, drawn
and kept by its studio, and scores for each row, with means, intervals and paired differences.

Legend: T rows, S pixels of a side.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from miniature.exam import RETRIEVAL_POOL, Card, Clusters, Scores, most_style
from miniature.truth import PAINTED, PaintedTruth, Truth, opened
from ztrain.adapters.splice import SpliceConfig
from ztrain.cache.cache import Cache
from ztrain.compare.lineup import Entry, check_entries, exported_entries, plain, read_cases
from ztrain.compare.studio import Studio
from ztrain.config import Config
from ztrain.data.exchange import Case
from ztrain.errors import InputError
from ztrain.images import Picture, PictureFile, open_image
from ztrain.metrics.scores import copy_score

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped family."""
ADAPTERS = Path(__file__).parent / "adapters"
"""Adapters of it that were trained for longer, by the name of their experiment in configs/."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """T pictures and scores, each (T,), by figure."""

    entry: Entry
    pictures: Sequence[Picture]
    scores: Scores

    def mean(self, name: str) -> float:
        return float(self.scores[name].nanmean())


def text_only(config: Config) -> Entry:
    return replace(plain(config), label="text only")


def exported_entry(label: str, folder: Path, config: Config) -> Entry:
    [entry] = exported_entries([folder], config)
    return replace(entry, label=label)


class Trials:
    """Rows in rounds, in each of which a style occurs once, and what was tried on them; row i starts from the same
    noise for all. Pictures are kept in `folder`. Raises InputError for rows that cannot be judged."""

    def __init__(self, config: Config, cases: Sequence[Case], folder: Path, truth: Truth = PAINTED) -> None:
        self.config = config.model_copy(update={"compare": config.compare.model_copy(update={"num_seeds": 1})})
        self.cases, self.rounds = _in_rounds(cases)
        self.styles = [_column(case, "style") for case in self.cases]
        self.studio = Studio(self.config, self.cases, folder, Cache(self.config))
        self.clusters = Clusters(
            of=f"{truth.drawn_by}s",
            numbers=_numbers([_column(case, truth.drawn_by) for case in self.cases]),
        )
        self.references = [case.references[0] for case in self.cases]
        self.targets = [case.target for case in self.cases if case.target is not None]
        self._check_size()
        if config.judges.truth is None:
            raise InputError("judges.truth is not set: give the family whose judges know these triplets")
        self.truth = PaintedTruth(Path(config.judges.truth), self.studio.device, truth)
        self.truth.learn(self.cases, pools=self.rounds)

    @classmethod
    def of(cls, config: Config, split: str, folder: Path, truth: Truth = PAINTED) -> "Trials":
        """On all triplets of one split."""
        return cls(config, cases_of(config, split), folder, truth)

    def __len__(self) -> int:
        return len(self.cases)

    def _check_size(self) -> None:
        height, width = self.studio.size(plain(self.config))
        for image in map(open_image, self.targets):
            if image.size != (width, height):
                raise InputError(f"a target of {image.width} x {image.height} pixels: trials are of {width} x {height}")

    def run(self, *entries: Entry) -> list[Outcome]:
        """Draws and judges these."""
        for entry in entries:
            check_entries([entry])
        outcomes = []
        for entry, rows in zip(entries, self.studio.draw(entries), strict=True):
            pictures = [PictureFile(path) for [path] in rows]
            outcomes.append(Outcome(entry, pictures, self.score(pictures)))
        return outcomes

    def score(self, pictures: Sequence[Picture]) -> Scores:
        """Of one picture for each row."""
        images, references = opened(pictures), opened(self.references)
        clipped = ((images == 0) | (images == 255)).flatten(1).float().mean(1)  # share of values at an end
        copied = copy_score(images.float() / 255, references.float() / 255)
        scores = self.truth.score(pictures)
        # How much more often the reference's kind of object is drawn than if references were dealt again.
        above = scores["leak"] - scores["leak_by_chance"]
        return scores | {"leak_above_chance": above, "copy": copied, "clipped": clipped}

    def figures(self, outcome: Outcome) -> Card:
        """Each score's mean with its interval over styles."""
        return {name: self.clusters.figure(values, drop_nan=True) for name, values in outcome.scores.items()}

    def difference(self, name: str, ours: Outcome, theirs: Outcome) -> Card:
        """Paired, ours - theirs."""
        return self.clusters.figure(ours.scores[name], theirs.scores[name], drop_nan=True)


def cases_of(config: Config, split: str) -> list[Case]:
    """All triplets of a split as rows of a comparison."""
    every = {"split": split, "num_samples": sys.maxsize, "prompts": None, "references": None, "prompt": "own"}
    config = config.model_copy(update={"compare": config.compare.model_copy(update=every)})
    cases, _ = read_cases(config, Cache(config).digests)
    return cases


def _in_rounds(cases: Sequence[Case]) -> tuple[list[Case], list[int]]:
    """In rounds, in each of which a style occurs once, and how long these are: R@1 searches within a round."""
    met: Counter[str] = Counter()
    rounds = []
    for case in cases:
        style = _column(case, "style")
        rounds.append(met[style])
        met[style] += 1
    order = sorted(range(len(cases)), key=rounds.__getitem__)
    lengths = list(Counter(sorted(rounds)).values())
    if len(met) < 2:
        raise InputError(f"{cases[0].where}: all triplets are in one style; a trial needs several")
    if min(lengths) < 2:
        raise InputError(f"{cases[order[-1]].where}: its style has more triplets than any other; cut it")
    return [cases[row] for row in order], lengths


def markdown_table(trials: Trials, outcomes: Sequence[Outcome]) -> str:
    """A row for each entry, with 95 % intervals over styles."""
    columns = {
        "style cosine": "style_cosine",
        f"style R@1 of {min(RETRIEVAL_POOL, *trials.rounds)}": "style_retrieval",
        **{name: f"prompt_{name}" for name in ("content", *trials.truth.truth.contents)},
        "leak above chance": "leak_above_chance",
    }
    lines = [f"| | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for outcome in outcomes:
        figures = trials.figures(outcome)
        cells = [figures[name] for name in columns.values()]
        told = [f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" for cell in cells]
        lines.append(f"| {outcome.entry.label} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def splice(config: Config, layer: int, tokens: Literal["text", "all"], strength: float = 1.0) -> Entry:
    """One way to read a reference through the splice, beside the prompt."""
    return Entry(
        label=f"splice layer {layer} tokens={tokens} strength={strength:g}",
        role="setting",
        adapters=(SpliceConfig(tokens=tokens),),
        encoders=config.encoders.model_copy(update={"hidden_index": layer}),
        sample=config.sample.model_copy(update={"scales": strength}),
    )


def splices(config: Config, layers: Sequence[int], strengths: Sequence[float]) -> list[Entry]:
    """Layers x tokens x strengths."""
    tokens: tuple[Literal["text", "all"], ...] = ("text", "all")
    return [splice(config, *setting) for setting in product(layers, tokens, strengths)]


def find_best_splice(trials: Trials, settings: Sequence[Entry]) -> tuple[Outcome, Outcome | None]:
    """Of all settings the one with most style, and the one with most of those that keep the content, if any does."""
    text, *tried = trials.run(text_only(trials.config), *settings)
    return most_style(tried, text)


def as_found(config: Config, best: Entry) -> list[str]:
    """Overrides by which a list that starts from the splice starts from its best setting."""
    [splice] = best.adapters
    composing = [place for place, adapter in enumerate(config.adapters) if adapter.composes_reference]
    tokens = [word for place in composing for word in (f"--adapters.{place}.tokens", splice.tokens)]
    return [*tokens, "--encoders.hidden_index", str(best.encoders.hidden_index)] if composing else []


def _numbers(names: Sequence[str]) -> Tensor:
    """(T,): equal names as equal numbers."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def _column(case: Case, name: str) -> str:
    if name not in case.columns:
        raise InputError(f"{case.where}: no {name}; trials are of triplets of style folders")
    return str(case.columns[name])
