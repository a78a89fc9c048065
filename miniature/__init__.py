"""The miniature Z-Image family: tiny models in the real folder layout and painted images."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from miniature.truth import PaintedTruth


def truth_judge(family: Path, device: "torch.device") -> "PaintedTruth":
    """The judge that `judges.truth` names; importing the package alone loads no library."""
    from miniature.truth import PaintedTruth

    return PaintedTruth(family, device)
