"""The truth as a judge of comparisons: what a family's own judges know of triplets of its world.

In: a family folder, and rows of a data set of style folders, whose columns name `content` and `reference_content`.
Out: scores by figure, each (T,). They need no opinion: content and style of every picture are known. The style of a
picture is compared with its target's, content with what was asked for and what the reference shows.

Legend: T pictures, S pixels of a side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from miniature.exam import JudgeOutputs, Judges, Scores, score_pictures
from miniature.style_folders import read_name
from miniature.world import CONTENT_CLASSES, contents_of
from ztrain.data.exchange import Case
from ztrain.errors import InputError
from ztrain.images import Picture, open_image
from ztrain.metrics.scores import correct


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
class Figure:
    """A score of `exam.score_pictures` and what it means."""

    name: str
    figure: str
    title: str
    definition: str
    low: float = 0.0
    direction: Literal["higher", "lower", "neither"] = "higher"

    @property
    def of_prompt(self) -> bool:
        """Whether it needs a prompt to be about."""
        return self.figure.startswith("prompt_") or self.figure == "leak"


_ASKED = "Share of pictures in which the judge sees the {what} that the prompt asks for."
_SHOWN = "Share of pictures in which the judge sees the {what} that the REFERENCE shows."
FIGURES = (
    Figure(
        name="truth_style",
        figure="style_cosine",
        title="Style (truth)",
        definition="Cosine of the style judge's vector to that of the true picture: same content, same style.",
        low=-1.0,
    ),
    Figure(
        name="truth_content",
        figure="prompt_content",
        title="Content (truth)",
        definition="Mean of kind, count and place being what the prompt asks for, as the content judge sees them.",
    ),
    *(
        Figure(
            name=f"truth_{what}",
            figure=f"prompt_{what}",
            title=f"{what.capitalize()} asked for",
            definition=_ASKED.format(what=what),
        )
        for what in ("kind", "count", "place")
    ),
    *(
        Figure(
            name=f"truth_reference_{what}",
            figure=f"reference_{what}",
            title=f"{what.capitalize()} of the reference",
            definition=_SHOWN.format(what=what),
            direction="neither",
        )
        for what in ("kind", "count", "place")
    ),
    Figure(
        name="truth_leak",
        figure="leak",
        title="Leak (truth)",
        definition="Share of pictures that show the reference's kind of object and not the prompt's.",
        direction="lower",
    ),
)


_SIZES = "judges.truth: pictures and targets differ in size; set data.resolution to the targets'"


def opened(pictures: Sequence[Picture]) -> Tensor:
    """(T, 3, S, S) uint8. Raises InputError where sizes differ."""
    arrays = [np.array(open_image(picture)) for picture in pictures]
    if len({array.shape for array in arrays}) > 1:
        raise InputError(_SIZES)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


class PaintedTruth:
    """The judges of one family. `learn` the rows first, then `score` pictures in their order."""

    figures = FIGURES

    def __init__(self, folder: Path, device: torch.device, truth: Truth = PAINTED) -> None:
        judges = folder / "judges"
        if not judges.is_dir():
            raise InputError(f"judges.truth {folder} has no judges; give a miniature family, such as miniature/weights")
        self.judges, self.device, self.truth = Judges(judges, device), device, truth
        self.name = "the painter's judges"
        digest = xxhash.xxh3_128()
        for path in sorted(judges.glob("*.safetensors")):
            digest.update(path.read_bytes())
        self.weights = digest.hexdigest()[:16]
        self.asked: dict[str, Tensor] = {}
        self.shown: dict[str, Tensor] = {}
        self._styles: Tensor | None = None
        self._pools: Sequence[int] = ()
        self._size = torch.Size()
        self._true: JudgeOutputs | None = None

    def learn(self, cases: Sequence[Case], *, pools: Sequence[int] = ()) -> None:
        """pools: sizes of consecutive rows in each of which a style is searched for, for R@1. Raises InputError for
        rows of another kind."""
        self.asked, self.shown = (self._classes(cases, column) for column in ("content", "reference_content"))
        if known := self.truth.style_classes:
            styles = [str(case.columns["style"]) for case in cases]
            if unknown := sorted(set(styles) - set(known)):
                raise InputError(f"style {unknown[0]!r} is none that the judges know: {', '.join(known)}")
            self._styles = torch.tensor([known.index(style) for style in styles], device=self.device)
        targets = opened([case.target for case in cases if case.target is not None])
        self._pools, self._size = pools, targets.shape
        self._true = self.judges.look(targets.to(self.device))

    def check(self, cases: Sequence[Case]) -> None:
        """Raises InputError for rows of another kind."""
        if lost := next((case.where for case in cases if case.target is None), None):
            raise InputError(f"judges.truth: {lost} has no target; it judges triplets of painted style folders")
        for column in ("content", "reference_content"):
            self._classes(cases, column)

    def _classes(self, cases: Sequence[Case], column: str) -> dict[str, Tensor]:
        if lost := next((case.where for case in cases if column not in case.columns), None):
            raise InputError(f"judges.truth: {lost} has no {column}; it judges triplets of painted style folders")
        found = self.truth.classes([str(case.columns[column]) for case in cases])
        return {label: classes.to(self.device) for label, classes in found.items()}

    def _images(self, pictures: Sequence[Picture]) -> Tensor:
        """(T, 3, S, S) uint8."""
        images = opened(pictures)
        if images.shape != self._size:
            raise InputError(_SIZES)
        return images.to(self.device)

    def score(self, pictures: Sequence[Picture]) -> Scores:
        """By figure, each (T,), of one picture for each row."""
        assert self._true is not None, "learn the rows first"
        images = self._images(pictures)
        seen = self.judges.look(images)
        labels = (self.asked, self.shown, self.truth.contents)
        scores = score_pictures(images, seen, self._true, *labels, pools=self._pools)
        if self._styles is not None:
            scores["style_right"] = correct(seen.logits["style"].argmax(1), self._styles)
        return {name: values.cpu() for name, values in scores.items()}

    def content_by_chance(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> float | None:
        """How often a picture shows what another prompt asks for, over kind, count and place; None with one prompt."""
        logits = self.judges.look(self._images(pictures)).logits
        other = torch.tensor([[one != two for two in prompts] for one in prompts], device=self.device)
        if not bool(other.any()):
            return None
        judged = {name: logits[name].argmax(1)[:, None] for name in self.truth.contents}
        agree = [(classes == self.asked[name][None])[other].float().mean() for name, classes in judged.items()]
        return float(torch.stack(agree).mean())
