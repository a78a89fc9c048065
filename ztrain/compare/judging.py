"""What the judges say of pictures: every score of every picture of a comparison, with its meaning.

In: rows, the pictures of each column, and the models of `judges`. Out: `Metric`s with their tables of columns x rows
x seeds, without means over them. A score whose judge is missing is left out; which ones and why is said in `missing`.
Each picture is opened once, and only what the scores need of it is kept.

Legend: C columns, R rows, S seeds, D dimensions of an embedding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ztrain.compare.record import Metric, Model
from ztrain.config import JudgesConfig
from ztrain.data.exchange import Case
from ztrain.errors import InputError
from ztrain.frozen.sources import Source
from ztrain.images import Picture, open_image
from ztrain.metrics.intervals import Interval
from ztrain.metrics.scores import cmmd, copy_score, diversity, high_frequency_energy, kid, palette_error
from ztrain.metrics.towers import Tower, check_tower

_SIDE = 64
"""Pixels to which pictures are brought for the scores that need no model: enough for structure and colours, and many
pictures fit into memory. Detail is measured at full size."""
_TITLES = {"style": "Style descriptor", "siglip": "SigLIP", "dino": "DINOv2"}
Table = list[list[list[float | None]]]
_LEAST_FOR_SETS = 8  # pictures on each side below which a distance of distributions says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """What is judged.

    pictures: C x R x S. plain: place of the column without images. bare: by place of a column, R pictures that its list
    draws without references, each from the noise of the first seed.
    """

    cases: Sequence[Case]
    pictures: Sequence[Sequence[Sequence[Picture]]]
    plain: int | None
    bare: dict[int, Sequence[Picture]] = field(default_factory=dict)

    @property
    def has_prompts(self) -> bool:
        return all(case.prompt for case in self.cases)

    @property
    def drawn(self) -> list[Picture]:
        return [picture for column in self.pictures for row in column for picture in row]

    @property
    def every(self) -> list[Picture]:
        given = [p for case in self.cases for p in (*case.references, case.target) if p]
        return [*given, *self.drawn, *(picture for of_column in self.bare.values() for picture in of_column)]


@dataclass(slots=True)
class Verdicts:
    """All scores of a sheet. style, adherence: names of the two that stand for likeness and for obedience."""

    scores: list[Metric]
    style: str | None
    adherence: str | None
    missing: list[str]
    """Sentences: what was not scored, and what it needs."""

    def metric(self, name: str | None) -> Metric | None:
        return next((metric for metric in self.scores if metric.name == name), None)


class TruthJudge(Protocol):
    """A judge that knows what is true of these rows: `learn` the rows first, then `score` pictures in their order."""

    name: str
    weights: str

    @property
    def figures(self) -> Sequence[Any]: ...
    def check(self, cases: Sequence[Case]) -> None: ...
    def learn(self, cases: Sequence[Case]) -> None: ...
    def score(self, pictures: Sequence[Picture]) -> Mapping[str, Tensor]: ...
    def content_by_chance(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> float | None: ...


TruthLoader = Callable[[Path, torch.device], TruthJudge]
"""Called with a family's folder: the programs give the miniature's."""


def _truth(config: JudgesConfig, device: torch.device | str, load: TruthLoader | None) -> TruthJudge | None:
    if config.truth is None:
        return None
    if load is None:
        raise InputError("judges.truth: only ztrain's commands know this judge; leave it out, or pass truth=")
    return load(Path(config.truth), torch.device(device))


def check_judges(config: JudgesConfig, cases: Sequence[Case], truth: TruthLoader | None = None) -> None:
    """Raises InputError for judges that are not there or cannot judge these rows, before anything is drawn."""
    for place in (config.style, config.siglip, config.dino):
        if place is not None:
            check_tower(Source.of(place))
    if judge := _truth(config, "cpu", truth):
        judge.check(cases)


class Judging:
    """The loaded judges, and what they have seen of each picture so far."""

    def __init__(self, config: JudgesConfig, device: torch.device | str, truth: TruthLoader | None = None) -> None:
        self.config = config
        places = {"style": config.style, "siglip": config.siglip, "dino": config.dino}
        self.towers = {
            name: Tower.load(Source.of(place), torch.float32, device) for name, place in places.items() if place
        }
        self.truth = _truth(config, device, truth)
        self._vectors: dict[str, dict[str, Tensor]] = {name: {} for name in self.towers}
        self._small: dict[str, Tensor] = {}
        self._spots: dict[str, Tensor] = {}
        self._detail: dict[str, float] = {}

    def __bool__(self) -> bool:
        """Whether anything but pixels judges."""
        return bool(self.towers) or self.truth is not None

    # Looking

    def look(self, pictures: Sequence[Picture]) -> None:
        """Opens the pictures that are new."""
        new = {picture.name: picture for picture in pictures if picture.name not in self._small}
        names, size = list(new), self.config.batch_size
        with tqdm(total=len(names), desc="judging", unit="picture", disable=None, leave=False) as bar:
            for start in range(0, len(names), size):
                some = names[start : start + size]
                self._look(some, [open_image(new[name]) for name in some])
                bar.update(len(some))

    def _look(self, names: Sequence[str], images: Sequence[Image.Image]) -> None:
        for name, image in zip(names, images, strict=True):
            # Averages keep structure, single pixels keep the palette.
            self._small[name] = _pixels(image.resize((_SIDE, _SIDE), Image.Resampling.BOX))
            self._spots[name] = _pixels(image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST))
            self._detail[name] = float(high_frequency_energy(_pixels(image).unsqueeze(0))[0])
        for role, tower in self.towers.items():
            for name, vector in zip(names, tower.images(images), strict=True):
                self._vectors[role][name] = vector

    def small(self, pictures: Sequence[Picture]) -> Tensor:
        """(N, 3, 64, 64) in [0, 1]."""
        return torch.stack([self._small[picture.name] for picture in pictures])

    def spots(self, pictures: Sequence[Picture]) -> Tensor:
        return torch.stack([self._spots[picture.name] for picture in pictures])

    def detail(self, pictures: Sequence[Picture]) -> Tensor:
        """(N,)"""
        return torch.tensor([self._detail[picture.name] for picture in pictures])

    def vectors(self, role: str, pictures: Sequence[Picture]) -> Tensor:
        """(N, D) unit vectors."""
        return torch.stack([self._vectors[role][picture.name] for picture in pictures])

    def model(self, role: str) -> Model:
        tower = self.towers[role]
        return Model(name=tower.name, revision=tower.revision, weights=tower.weights)

    def first_of(self, *roles: str) -> str | None:
        """The first role that is there."""
        return next((role for role in roles if role in self.towers), None)

    # Scoring

    def score(self, sheet: Sheet) -> Verdicts:
        """Every score that can be given."""
        self.look(sheet.every)
        found = Verdicts([], None, None, [])
        if self.truth is not None:
            found.scores += self._truth_scores(sheet)
            found.style, found.adherence = "truth_style", "truth_content" if sheet.has_prompts else None
        for role in self.towers:
            found.scores.append(self._likeness(sheet, role))
            found.style = found.style or f"{role}_likeness"
        for give in (self._adherence, self._copies, self._diversity, self._drift, self._change):
            score = give(sheet)
            if isinstance(score, str):
                found.missing.append(score)
            else:
                found.scores.append(score)
        if found.adherence is None and any(score.name == "adherence" for score in found.scores):
            found.adherence = "adherence"
        found.scores += [self._palette(sheet), self._details(sheet)]
        found.scores += self._sets(sheet, found.missing)
        if found.style is None:
            found.missing.append("likeness to the reference: needs judges.style, judges.siglip or judges.dino")
        return found

    def _table(self, sheet: Sheet, of_column: Callable[[Sequence[Sequence[Picture]]], Tensor]) -> Table:
        """C x R x S of a function that gives (R, S) of a column."""
        return _listed(torch.stack([of_column(column) for column in sheet.pictures]))

    def _of_seeds(self, sheet: Sheet, of_pictures: Callable[[list[Picture]], Tensor]) -> Table:
        """C x R x S of a function that gives (R,) of one picture for each row."""

        def of_column(column: Sequence[Sequence[Picture]]) -> Tensor:
            return torch.stack([of_pictures(list(seed)) for seed in zip(*column, strict=True)], dim=1)

        return self._table(sheet, of_column)

    def _likeness(self, sheet: Sheet, role: str) -> Metric:
        wanted = [self.vectors(role, case.references) for case in sheet.cases]

        def likeness(pictures: list[Picture]) -> Tensor:
            seen = self.vectors(role, pictures)  # (R, D)
            return torch.stack([(own @ vector).mean() for own, vector in zip(wanted, seen, strict=True)])

        what = "style" if role == "style" else "look and content together"
        return Metric(
            name=f"{role}_likeness",
            title=f"{_TITLES[role]} likeness",
            definition=f"Cosine of the picture's vector to its reference's (mean over several): {what}.",
            low=-1.0,
            high=1.0,
            direction="higher",
            model=self.model(role),
            values=self._of_seeds(sheet, likeness),
        )

    def _adherence(self, sheet: Sheet) -> Metric | str:
        tower = self.towers.get("siglip")
        if tower is None or not tower.reads_text:
            return "adherence: needs judges.siglip with a text tower"
        if not sheet.has_prompts:
            return "adherence: the rows are drawn without prompts"
        texts = tower.texts([case.prompt for case in sheet.cases])  # (R, D)
        chance = None
        if sheet.plain is not None:
            chance = _chance(self._cosines(sheet.pictures[sheet.plain], texts), [c.prompt for c in sheet.cases])
        return Metric(
            name="adherence",
            title="Prompt adherence",
            definition="Cosine of the picture's vector to its prompt's.",
            low=-1.0,
            high=1.0,
            direction="higher",
            model=self.model("siglip"),
            chance=chance,
            values=self._of_seeds(sheet, lambda pictures: (self.vectors("siglip", pictures) * texts).sum(1)),
        )

    def _cosines(self, column: Sequence[Sequence[Picture]], texts: Tensor) -> Tensor:
        """(R, R), of each row's pictures, averaged over seeds, and each prompt."""
        return torch.stack([self.vectors("siglip", row).mean(0) for row in column]) @ texts.T

    def _copies(self, sheet: Sheet) -> Metric | str:
        if len({case.look for case in sheet.cases}) < 2:
            return "copy score: needs rows with different references"
        most = max(len(case.references) for case in sheet.cases)
        shown = [
            self.small([case.references[min(k, len(case.references) - 1)] for case in sheet.cases]) for k in range(most)
        ]

        def copied(pictures: list[Picture]) -> Tensor:
            drawn = self.small(pictures)
            return torch.stack([copy_score(drawn, references) for references in shown]).amax(0)

        targets = [case.target for case in sheet.cases if case.target is not None]
        has_targets = len(targets) == len(sheet.cases)
        shared = copied(targets) if has_targets else torch.zeros(len(sheet.cases))
        than = ", minus what the true picture shares with it: 0 = as the target" if has_targets else ": 0 = not at all"
        return Metric(
            name="copy",
            title="Copy score",
            definition=(
                "How much more a picture's structure (luminance at 16 x 16) correlates with its own reference than"
                f" with others'{than}, about 1 = a copy."
            ),
            low=-4.0 if has_targets else -2.0,
            high=4.0 if has_targets else 2.0,
            direction="neither",  # below what the true picture shares is no merit
            values=self._of_seeds(sheet, lambda pictures: copied(pictures) - shared),
        )

    def _diversity(self, sheet: Sheet) -> Metric | str:
        seeds = len(sheet.pictures[0][0])
        role = self.first_of("dino", "siglip", "style")
        if seeds < 2:
            return "diversity: needs compare.num_seeds 2 or more"

        def spread(column: Sequence[Sequence[Picture]]) -> Tensor:
            if role is not None:
                vectors = torch.stack([self.vectors(role, row) for row in column])
            else:
                light = torch.stack([self.small(row).flatten(1) for row in column])  # (R, S, pixels)
                vectors = F.normalize(light - light.mean(2, keepdim=True), dim=2)
            return diversity(vectors)[:, None].expand(-1, seeds)

        what = "vectors" if role else "pixels, at 64 x 64 and without their mean,"
        return Metric(
            name="diversity",
            title="Diversity over seeds",
            definition=f"1 - mean cosine between the {what} of a row's seeds: 0 = all alike.",
            low=0.0,
            high=2.0,
            direction="neither",
            model=self.model(role) if role else None,
            values=self._table(sheet, spread),
        )

    def _drift(self, sheet: Sheet) -> Metric | str:
        if not sheet.bare or sheet.plain is None:
            return "drift: needs a trained list, and compare.drift"
        base = self.small([row[0] for row in sheet.pictures[sheet.plain]])
        values = torch.full((len(sheet.pictures), len(sheet.cases), len(sheet.pictures[0][0])), torch.nan).double()
        for place, pictures in sheet.bare.items():
            values[place, :, 0] = (self.small(pictures) - base).abs().mean((1, 2, 3)).double() * 255
        return Metric(
            name="drift",
            title="Drift without reference",
            definition=(
                "Mean difference, in 8-bit levels at 64 x 64, between what the list draws without a reference and what"
                " the base draws from the same noise: 0 = plain text-to-image is untouched."
            ),
            low=0.0,
            high=255.0,
            direction="lower",
            values=_listed(values),
        )

    def _change(self, sheet: Sheet) -> Metric | str:
        if sheet.plain is None:
            return "change: needs the column without image"
        base = [self.small(list(seed)) for seed in zip(*sheet.pictures[sheet.plain], strict=True)]

        def changed(column: Sequence[Sequence[Picture]]) -> Tensor:
            drawn = [self.small(list(seed)) for seed in zip(*column, strict=True)]
            return torch.stack([(a - b).abs().mean((1, 2, 3)) * 255 for a, b in zip(drawn, base, strict=True)], dim=1)

        return Metric(
            name="change",
            title="Change by the image",
            definition=(
                "Mean difference to the picture without image, drawn as the experiment's own `sample` says, in 8-bit"
                " levels at 64 x 64: 0 = the image is not used."
            ),
            low=0.0,
            high=255.0,
            direction="neither",
            values=self._table(sheet, changed),
        )

    def _palette(self, sheet: Sheet) -> Metric:
        shown = self.spots([case.references[0] for case in sheet.cases])
        return Metric(
            name="palette_error",
            title="Palette error",
            definition="Sliced Wasserstein distance of the colours to the first reference's in CIELAB, in Delta E.",
            low=0.0,
            high=None,
            direction="lower",
            values=self._of_seeds(sheet, lambda pictures: palette_error(self.spots(pictures), shown)),
        )

    def _details(self, sheet: Sheet) -> Metric:
        targets = [case.target for case in sheet.cases if case.target is not None]
        return Metric(
            name="artefacts",
            title="Artefact energy",
            definition=(
                "Share of spectral energy above half the Nyquist frequency: more than true pictures have"
                + (f" (the targets: {float(self.detail(targets).mean()):.4f})" if targets else "")
                + " is grain, ringing or a grid, less is blur."
            ),
            low=0.0,
            high=1.0,
            direction="neither",
            values=self._of_seeds(sheet, self.detail),
        )

    def _sets(self, sheet: Sheet, missing: list[str]) -> Iterator[Metric]:
        """Distances between what a column draws and the targets, as distributions."""
        targets = list({case.target.name: case.target for case in sheet.cases if case.target is not None}.values())
        role_of_kid, role_of_cmmd = self.first_of("dino", "siglip", "style"), self.first_of("siglip", "dino", "style")
        if len(targets) < _LEAST_FOR_SETS or role_of_kid is None or role_of_cmmd is None:
            missing.append(f"KID and CMMD: need a judge, and targets of at least {_LEAST_FOR_SETS} rows")
            return
        for name, role, measure, about in (
            ("kid", role_of_kid, _kid, "Kernel distance (unbiased; polynomial kernel) of all pictures to the targets."),
            ("cmmd", role_of_cmmd, cmmd, "Maximum mean discrepancy (Gaussian kernel, x 1000) to the targets."),
        ):
            true = self.vectors(role, targets)
            drawn = [self.vectors(role, [p for row in column for p in row]) for column in sheet.pictures]
            yield Metric(
                name=name,
                title=name.upper(),
                definition=f"{about} 0 = one distribution; compare only over as many pictures.",
                low=None,
                high=None,
                direction="lower",
                model=self.model(role),
                means=[Interval(mean=float(measure(vectors, true)), count=1) for vectors in drawn],
            )

    def _truth_scores(self, sheet: Sheet) -> Iterator[Metric]:
        """What the judges of a painted world know."""
        assert self.truth is not None
        self.truth.learn(sheet.cases)
        seeds = [list(zip(*column, strict=True)) for column in sheet.pictures]  # C x S x R
        scored = [[self.truth.score(seed) for seed in column] for column in seeds]
        chance = None
        if sheet.plain is not None:
            plain = [row[0] for row in sheet.pictures[sheet.plain]]
            chance = self.truth.content_by_chance(plain, [case.prompt for case in sheet.cases])
        for told in self.truth.figures:
            if told.of_prompt and not sheet.has_prompts:
                continue
            values = torch.stack([torch.stack([one[told.figure] for one in column], 1) for column in scored])
            yield Metric(
                name=told.name,
                title=told.title,
                definition=told.definition,
                low=told.low,
                high=1.0,
                direction=told.direction,
                model=Model(name=self.truth.name, weights=self.truth.weights),
                chance=chance if told.name == "truth_content" else None,
                values=_listed(values),
            )


def _listed(values: Tensor) -> Table:
    """Of (C, R, S), with NaN where a picture cannot tell."""
    return [[[None if v != v else v for v in row] for row in column] for column in values.double().tolist()]


def _kid(drawn: Tensor, true: Tensor) -> float:
    """Of unit vectors (N, D), at the length that the kernel x.y / D was made for."""
    length = true.shape[1] ** 0.5
    return float(kid(drawn * length, true * length))


def _chance(cosines: Tensor, prompts: Sequence[str]) -> float | None:
    """Mean over pairs of a row and another row's prompt, where it is another prompt."""
    other = torch.tensor([[one != two for two in prompts] for one in prompts])
    return float(cosines[other].mean()) if bool(other.any()) else None


def _pixels(image: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255)
