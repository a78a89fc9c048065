"""Stages that hold a model and show it pictures in batches, as data_tools.embed and data_tools.caption do.

In: rows of a table of data_tools.scan. Out: what the model makes of each picture, or what stands for it where a picture
is not shown. The model is loaded once by each worker.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.sources import Reader
from data_tools.stages import Row
from ztrain.images import decode_image


class ModelStage(ABC):
    """A stage without its model until that is asked."""

    def __init__(self, location: Path, roots: Mapping[str, Path], batch_size: int) -> None:
        """location: folder of the model; batch_size: pictures at a time, which changes rounding."""
        self.location, self.batch_size, self.reader = location, batch_size, Reader(roots)
        self._loaded: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}  # it travels without the model

    @property
    def model(self) -> Any:
        if self._loaded is None:
            self._loaded = self.load()
        return self._loaded

    @abstractmethod
    def load(self) -> Any:
        """The model."""

    @abstractmethod
    def shows(self, row: Row) -> bool:
        """Whether the model is asked about a row's picture."""

    @abstractmethod
    def without(self, row: Row) -> Row:
        """The columns of a row whose picture is not shown."""

    @abstractmethod
    def ask(self, images: Sequence[Image.Image]) -> Sequence[Row]:
        """The columns of each picture."""

    def __call__(self, rows: Sequence[Row]) -> Sequence[Row]:
        made = [self.without(row) for row in rows]
        shown = [place for place, row in enumerate(rows) if self.shows(row)]
        for start in range(0, len(shown), self.batch_size):
            places = shown[start : start + self.batch_size]
            images = [decode_image(self.reader.read_same(rows[i]), rows[i]["name"]) for i in places]
            for place, columns in zip(places, self.ask(images), strict=True):
                made[place] = columns
        return made
