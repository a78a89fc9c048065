"""The painter's truth as a judge of comparisons: what a family's own judges know of painted triplets.

In: a family folder, and rows of a data set of painted style folders, whose columns name `content` and
`reference_content`. Out: scores by figure, each (T,). They need no opinion: content and style of every picture are
known. The style of a picture is compared with its target's, content with what was asked for and what the reference
shows.

Legend: T pictures, S pixels of a side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import xxhash
from torch import Tensor

from ztrain.errors import InputError
from ztrain.mini.exam import Judges, Scores, Seen, score_pictures
from ztrain.mini.trials import PAINTED


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


class PaintedTruth:
    """The judges of one family. `learn` the rows first, then `score` pictures in their order."""

    figures = FIGURES

    def __init__(self, folder: Path, device: torch.device) -> None:
        judges = folder / "judges"
        if not judges.is_dir():
            raise InputError(
                f"judges.truth {folder} has no judges; give a miniature family, such as ztrain/mini/weights"
            )
        self.judges, self.device = Judges(judges, device), device
        self.name = "the painter's judges"
        digest = xxhash.xxh3_128()
        for path in sorted(judges.glob("*.safetensors")):
            digest.update(path.read_bytes())
        self.weights = digest.hexdigest()[:16]
        self._asked: dict[str, Tensor] = {}
        self._shown: dict[str, Tensor] = {}
        self._size = torch.Size()
        self._true: Seen | None = None

    def learn(self, rows: Sequence[tuple[str, Mapping[str, object]]], targets: Sequence[Tensor]) -> None:
        """rows: place and columns of each; targets: (3, S, S) uint8. Raises InputError for rows of another kind."""
        self._asked, self._shown = (self._classes(rows, column) for column in ("content", "reference_content"))
        self._size = targets[0].shape
        self._true = self.judges.look(self._stacked(targets))

    def check(self, rows: Sequence[tuple[str, Mapping[str, object]]]) -> None:
        """Raises InputError for rows of another kind."""
        for column in ("content", "reference_content"):
            self._classes(rows, column)

    def _classes(self, rows: Sequence[tuple[str, Mapping[str, object]]], column: str) -> dict[str, Tensor]:
        if lost := next((where for where, columns in rows if column not in columns), None):
            raise InputError(f"judges.truth: {lost} has no {column}; it judges triplets of painted style folders")
        found = PAINTED.classes([str(columns[column]) for _, columns in rows])
        return {label: classes.to(self.device) for label, classes in found.items()}

    def _stacked(self, pictures: Sequence[Tensor]) -> Tensor:
        """(T, 3, S, S) uint8."""
        if {picture.shape for picture in pictures} != {self._size}:
            raise InputError("judges.truth: pictures and targets differ in size; set data.resolution to the targets'")
        return torch.stack(list(pictures)).to(self.device)

    def score(self, pictures: Sequence[Tensor]) -> Scores:
        """By figure, each (T,), of one picture (3, S, S) uint8 for each row."""
        assert self._true is not None, "learn the rows first"
        images = self._stacked(pictures)
        seen = self.judges.look(images)
        scores = score_pictures(images, seen, self._true, self._asked, self._shown, PAINTED.contents)
        return {name: values.cpu() for name, values in scores.items()}

    def content_by_chance(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> float | None:
        """How often a picture shows what another prompt asks for, over kind, count and place; None with one prompt."""
        logits = self.judges.look(self._stacked(pictures)).logits
        other = torch.tensor([[one != two for two in prompts] for one in prompts], device=self.device)
        if not bool(other.any()):
            return None
        agree = [(logits[n].argmax(1)[:, None] == self._asked[n][None])[other].float().mean() for n in PAINTED.contents]
        return float(torch.stack(agree).mean())
