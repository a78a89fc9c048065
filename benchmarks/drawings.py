"""What a laboratory works on: how much of everything, and drawings with the family that was pretrained on such."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from miniature.style_folders import paint_many_styles
from miniature.truth import PAINTED, Truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to train. `experiment`: its file in configs/; `options`: overrides; `seeded`: options whose value is
    the run's seed; `share`: of the plan's steps."""

    label: str
    experiment: str
    options: tuple[str, ...] = ()
    seeded: tuple[str, ...] = ()
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """How much of everything. `counts`: of each split, styles and drawings of each."""

    counts: Mapping[str, tuple[int, int]]
    steps: int
    batch: int
    seed: int = 0

    def steps_of(self, variant: Variant) -> int:
        return max(1, round(self.steps * variant.share))


class Drawings(Protocol):
    """What a laboratory works on: drawings, and the family that was pretrained on such."""

    @property
    def options(self) -> tuple[str, ...]:
        """Overrides of configs/miniature.yaml that every run on this family needs."""

    @property
    def truth(self) -> Truth:
        """What its judges may be asked."""

    def lay_out(self, folder: Path, plan: StudySettings) -> None:
        """Writes pictures and build.yaml, from which data_tools.build makes the triplets of train and test."""


class Paintings:
    """Painted style folders, and the shipped family."""

    options, truth = (), PAINTED

    def lay_out(self, folder: Path, plan: StudySettings) -> None:
        paint_many_styles(folder, plan.counts, seed=plan.seed)
        splits = ", ".join(f"{split}: {split}" for split in plan.counts)
        styles = f"label: {{styles: {{contents: contents.csv, splits: {{{splits}}}}}}}\n"
        pairs = "pair: {triplets_per_target: 2, max_copy_score: 1.0}\n"
        (folder / "build.yaml").write_text(f"sources: [images]\ndedup: null\n{styles}{pairs}", encoding="utf-8")
