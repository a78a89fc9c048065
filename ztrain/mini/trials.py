"""Methods on trial: lists of adapters on triplets of drawings, judged by those who know the truth.

In come a family, its config and triplets of `data_tools.build` whose styles and contents its judges know; out come each
method's pictures and scores for each triplet, with means, intervals and paired differences. A method is a list of
adapters with its encoder settings, exported or without weights; it may be fed another triplet's references instead
(shuffled).

Legend: T triplets, S pixels of a side.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ztrain.adapters import build_adapters, describe_list
from ztrain.adapters.splice import SpliceConfig
from ztrain.conditioning import Encoded
from ztrain.config import Config, EncodersConfig, list_reads
from ztrain.errors import InputError
from ztrain.export import ExportedAdapter, adapt, check_identity, read_adapter
from ztrain.images import open_image
from ztrain.metrics import copy_score, correct
from ztrain.mini.exam import CONTENT_LOSS, RETRIEVAL_POOL, Card, Clusters, Judges, Scores, score_pictures
from ztrain.mini.style_folders import read_name
from ztrain.mini.subject import Subject
from ztrain.mini.world import CONTENT_CLASSES, contents_of
from ztrain.model import AdaptedDiT
from ztrain.models import base_defaults, identity, places_of
from ztrain.rows import Triplet
from ztrain.sample import released_or
from ztrain.states import Encoders, models_of

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped family."""
ADAPTERS = Path(__file__).parent / "adapters"
"""Adapters of it that were trained for longer, by the name of their experiment in configs/."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What a family's judges may be asked of its triplets, whose columns name style, content and reference_content.

    contents: the judge's labels that say what is drawn, the one that tells of leaks first; `classes` gives theirs for
    names of contents, each (T,) int64. style_classes: the judge's names of styles; none where styles are no classes.
    drawn_by: the column whose equal values an interval draws together.
    """

    contents: tuple[str, ...]
    classes: Callable[[Sequence[str]], dict[str, Tensor]]
    style_classes: tuple[str, ...] = ()
    drawn_by: Literal["style", "content"] = "style"


def _painted_classes(names: Sequence[str]) -> dict[str, Tensor]:
    contents = contents_of(torch.tensor([read_name(name) for name in names]))
    return {name: getattr(contents, name) for name in CONTENT_CLASSES}


PAINTED = Truth(contents=tuple(CONTENT_CLASSES), classes=_painted_classes)
"""Of style_folders.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is on trial. `scale`: every adapter's; `sees`: the triplet's own reference, one of another style, or none;
    without `has_prompt` the empty prompt stands for the triplet's. `guidance_scale`: None = that of the config."""

    label: str
    adapters: tuple[Any, ...] = ()
    encoders: EncodersConfig = EncodersConfig()
    exported: ExportedAdapter | None = None
    scale: float = 1.0
    sees: Literal["own", "shuffled", "none"] = "own"
    has_prompt: bool = True
    guidance_scale: float | None = None
    negative: Literal["neither", "reference", "base"] = "neither"
    image_guidance_scale: float = 0.0

    @classmethod
    def of_folder(cls, label: str, folder: Path) -> "Method":
        """An exported adapter."""
        exported = read_adapter(folder)
        return cls(label=label, adapters=tuple(exported.adapters), encoders=exported.encoders, exported=exported)

    @property
    def shuffled(self) -> "Method":
        return replace(self, label=f"{self.label}, shuffled reference", sees="shuffled")


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Pictures (T, 3, S, S) uint8 and scores, each (T,), by figure."""

    method: Method
    images: Tensor
    scores: Scores

    def mean(self, name: str) -> float:
        return float(self.scores[name].nanmean())


class Trials:
    """Triplets of one split, and what was tried on them."""

    def __init__(self, subject: Subject, config: Config, triplets: Sequence[Triplet], truth: Truth = PAINTED) -> None:
        self.subject, self.config, self.triplets, self.truth = subject, config, list(triplets), truth
        self.guidance_scale = released_or(config.sample, base_defaults(config.models)).guidance_scale
        self.contents = truth.contents
        self.judges = Judges(subject.folder / "judges", subject.device)
        self._order([_column(triplet, "style") for triplet in triplets])
        self.styles = [_column(triplet, "style") for triplet in self.triplets]
        if len(set(self.styles)) < 2:
            raise InputError(f"{self.triplets[0].where}: all triplets are in one style; a trial needs several")
        if min(self.rounds) < 2:
            raise InputError(f"{self.triplets[-1].where}: its style has more triplets than any other; cut it")
        device = subject.device
        drawn = [_column(triplet, truth.drawn_by) for triplet in self.triplets]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(drawn))}
        of_triplets = torch.tensor([numbers[name] for name in drawn], device=device)
        self.clusters = Clusters(of=f"{truth.drawn_by}s", numbers=of_triplets)
        self.references = [open_image(triplet.references[0]) for triplet in self.triplets]
        self.targets = torch.stack([self._pixels(open_image(triplet.target)) for triplet in self.triplets]).to(device)
        self.asked, self.shown = (self._classes(column) for column in ("content", "reference_content"))
        if unknown := sorted(set(self.styles) - set(truth.style_classes)) if truth.style_classes else []:
            raise InputError(f"style {unknown[0]!r} is none that the judges know: {', '.join(truth.style_classes)}")
        self._true = self.judges.look(self.targets)
        self._encoders = Encoders(subject.text, subject.codec)
        self._states: dict[tuple[Any, ...], Encoded] = {}
        self._shuffled = self._other_styles()

    def __len__(self) -> int:
        return len(self.triplets)

    def _order(self, styles: Sequence[str]) -> None:
        """Sorts the triplets into rounds, in each of which a style occurs once: R@1 searches within a round."""
        met: Counter[str] = Counter()
        rounds = []
        for style in styles:
            rounds.append(met[style])
            met[style] += 1
        order = sorted(range(len(styles)), key=rounds.__getitem__)
        self.triplets = [self.triplets[row] for row in order]
        self.rounds = list(Counter(sorted(rounds)).values())

    def _classes(self, column: str) -> dict[str, Tensor]:
        """Of the contents that a column names, by label, each (T,)."""
        found = self.truth.classes([_column(triplet, column) for triplet in self.triplets])
        return {label: classes.to(self.subject.device) for label, classes in found.items()}

    def _pixels(self, image: Image.Image) -> Tensor:
        side = self.subject.size
        if image.size != (side, side):
            raise InputError(f"a target of {image.width} x {image.height} pixels: trials are of {side} x {side}")
        return _bytes(image)

    def _other_styles(self) -> list[int]:
        """For each triplet another one, of another style; every one is taken once."""
        count = len(self.styles)
        for shift in range(1, count):
            rows = [(row + shift) % count for row in range(count)]
            if all(self.styles[row] != style for row, style in zip(rows, self.styles, strict=True)):
                return rows
        raise InputError(f"{count} triplets cannot be dealt again so that none keeps its style; add styles")

    def run(self, method: Method) -> Outcome:
        """Renders and judges one method; picture i starts from the same noise for all."""
        encoded = self.encode(method)
        dit = copy.deepcopy(self.subject.dit)  # adapters change it
        if method.exported is None:
            model = AdaptedDiT(dit, build_adapters(list(method.adapters))).eval()
            if model.trainable_state():
                raise InputError(f"{method.label} {describe_list(list(method.adapters))} is untrained; export it first")
        else:
            known = self._encoders.identities | {"transformer": identity(dit)}
            check_identity(method.exported, known)
            model = adapt(dit, method.exported)
        model.set_scales([method.scale] * len(method.adapters))
        settings = replace(
            self.subject.settings,
            guidance_scale=self.guidance_scale if method.guidance_scale is None else method.guidance_scale,
            negative=method.negative,
            image_guidance_scale=method.image_guidance_scale,
        )
        images = replace(self.subject, settings=settings).render(model, encoded)
        return Outcome(method, images, self.score(images))

    def encode(self, method: Method) -> Encoded:
        """All triplets as the method reads them; each way to read them is encoded once."""
        reads = list_reads(method.adapters)
        is_shuffled = method.sees == "shuffled"
        key = (reads, method.encoders, is_shuffled)
        if key not in self._states:
            places, device = places_of(self.config.models), self.subject.device
            self._encoders.add(models_of(reads), places, self.config.encoders, torch.float32, device)
            rows = self._shuffled if is_shuffled else range(len(self))
            prompts = [triplet.prompt for triplet in self.triplets]
            states = self._encoders.encode(prompts, [[self.references[row]] for row in rows], reads, method.encoders)
            self._states[key] = states.to(self.subject.device)
        encoded = self._states[key]
        encoded = encoded.without_reference() if method.sees == "none" else encoded
        return encoded if method.has_prompt else encoded.without_text()

    def score(self, images: Tensor) -> Scores:
        """Of pictures (T, 3, S, S) uint8, one for each triplet."""
        seen = self.judges.look(images)
        scores = score_pictures(images, seen, self._true, self.asked, self.shown, self.contents, pools=self.rounds)
        references = torch.stack([_bytes(image) for image in self.references]).to(images.device)
        if known := self.truth.style_classes:
            classes = torch.tensor([known.index(style) for style in self.styles], device=images.device)
            scores["style_right"] = correct(seen.logits["style"].argmax(1), classes)
        clipped = ((images == 0) | (images == 255)).flatten(1).float().mean(1)  # share of values at an end
        return scores | {"copy": copy_score(images.float() / 255, references.float() / 255), "clipped": clipped}

    def figures(self, outcome: Outcome) -> Card:
        """Each score's mean with its interval over styles."""
        return {name: self.clusters.figure(values, drop_nan=True) for name, values in outcome.scores.items()}

    def difference(self, name: str, ours: Outcome, theirs: Outcome) -> Card:
        """Paired, ours - theirs."""
        return self.clusters.figure(ours.scores[name], theirs.scores[name], drop_nan=True)

    def leak_above_chance(self, outcome: Outcome) -> Card:
        """How much more often the reference's kind of object is drawn than if references were dealt again."""
        return self.clusters.figure(outcome.scores["leak"], outcome.scores["leak_by_chance"], drop_nan=True)


def markdown_table(trials: Trials, outcomes: Sequence[Outcome]) -> str:
    """A row for each method, with 95 % intervals over styles."""
    pool = min(RETRIEVAL_POOL, *trials.rounds)
    lines = [
        f"| | style cosine | style R@1 of {pool} | content | kind | count | place | leak above chance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = ("style_cosine", "style_retrieval", "prompt_content", "prompt_kind", "prompt_count", "prompt_place")
    for outcome in outcomes:
        figures = trials.figures(outcome)
        cells = [figures[name] for name in names] + [trials.leak_above_chance(outcome)]
        told = [f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" for cell in cells]
        lines.append(f"| {outcome.method.label} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def splice_settings(config: Config, layers: Sequence[int], strengths: Sequence[float]) -> list[Method]:
    """Ways to read a reference through the splice: layers x tokens x strengths, beside the prompt."""
    return [
        Method(
            label=f"splice layer {layer} tokens={tokens} strength={strength:g}",
            adapters=(SpliceConfig(tokens=tokens),),
            encoders=config.encoders.model_copy(update={"hidden_index": layer}),
            scale=strength,
        )
        for layer in layers
        for tokens in ("text", "all")
        for strength in strengths
    ]


def as_found(config: Config, best: Method) -> list[str]:
    """Overrides by which a list that starts from the splice starts from its best setting."""
    [splice] = best.adapters
    composing = [place for place, adapter in enumerate(config.adapters) if adapter.composes_reference]
    tokens = [word for place in composing for word in (f"--adapters.{place}.tokens", splice.tokens)]
    return [*tokens, "--encoders.hidden_index", str(best.encoders.hidden_index)] if composing else []


@dataclass(frozen=True, slots=True, kw_only=True)
class BestSplice:
    """The settings chosen on some triplets: the one with the largest style cosine, and the one with the largest of
    those whose content accuracy is within CONTENT_LOSS of text-only; None where no setting is."""

    most_style: Outcome
    keeping_content: Outcome | None
    tried: list[Outcome]


def find_best_splice(trials: Trials, settings: Sequence[Method]) -> BestSplice:
    """Tries every setting, with progress."""
    text = trials.run(Method(label="text only"))
    bar = tqdm(settings, desc="splice settings", unit="setting")
    tried = [trials.run(setting) for setting in bar]
    keeping = [o for o in tried if o.mean("prompt_content") >= text.mean("prompt_content") - CONTENT_LOSS]

    def best(outcomes: list[Outcome]) -> Outcome:
        return max(outcomes, key=lambda outcome: outcome.mean("style_cosine"))

    return BestSplice(most_style=best(tried), keeping_content=best(keeping) if keeping else None, tried=tried)


def _column(triplet: Triplet, name: str) -> str:
    if name not in triplet.columns:
        raise InputError(f"{triplet.where}: no {name}; trials are of triplets of style folders")
    return str(triplet.columns[name])


def _bytes(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
