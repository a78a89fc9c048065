"""What every pretraining stage reads: captioned pictures of one size, with all that is known about them.

A world makes galleries: painter.PaintedWorld paints them, folders.FolderWorld reads them from disk.

Legend: N pictures, S pixels of a side.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

Split = Literal["train", "held", "unseen", "all"]
"""train: what models may see; held: pictures of known contents and known styles whose combination no model may see;
unseen: contents that no model may see; all: every content, for judges, who must know what they are to recognise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Captioned pictures on one device.

    images: (N, 3, S, S) uint8. captions: N texts that name the content and never the style. clauses: N times what a
    caption that names the style too is made of, the content first; alone where a style has no words. replies: N pairs,
    all that there is to say about a content, and about content and style; always in the same words, where captions and
    clauses vary. labels: what a judge can be asked, by name, each (N,) int64 classes. styles: (N,) int64; pictures with
    equal numbers are in the same style.
    """

    images: Tensor
    captions: list[str]
    clauses: list[tuple[str, ...]]
    replies: list[tuple[str, str]]
    labels: dict[str, Tensor]
    styles: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def detailed(self) -> list[str]:
        """N texts that name content and style."""
        return [" ".join(said) for said in self.clauses]

    @property
    def device(self) -> torch.device:
        return self.images.device

    def pixels(self, indices: Tensor) -> Tensor:
        """Pictures as (B, 3, S, S) float32 in [-1, 1]."""
        return self.images[indices].float() / 127.5 - 1

    def to(self, device: torch.device | str) -> "Gallery":
        return replace(
            self,
            images=self.images.to(device),
            labels={name: label.to(device) for name, label in self.labels.items()},
            styles=self.styles.to(device),
        )

    def select(self, indices: Tensor) -> "Gallery":
        """The pictures at these positions, in this order."""
        rows = indices.tolist()
        return Gallery(
            images=self.images[indices],
            captions=[self.captions[i] for i in rows],
            clauses=[self.clauses[i] for i in rows],
            replies=[self.replies[i] for i in rows],
            labels={name: label[indices] for name, label in self.labels.items()},
            styles=self.styles[indices],
        )


class World(Protocol):
    """Where galleries come from, and what the labels mean."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """S, pixels of a side."""

    @property
    def content_classes(self) -> dict[str, tuple[str, ...]]:
        """Names of the classes of every label that says what is drawn."""

    @property
    def style_classes(self) -> dict[str, tuple[str, ...]]:
        """Names of the classes of every label that says how it is drawn; may be empty."""

    def gallery(self, split: Split, count: int | None, seed: int, device: torch.device | str) -> Gallery:
        """`count` pictures of a split, None for all there are (or as many as a painted world is made of); the same
        arguments give the same pictures."""
