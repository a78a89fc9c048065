"""An embedding for every picture, by any vision model that transformers loads: SigLIP, CLIP, DINOv2 and their like.

    python -m data_tools.embed --table work/scan --out work/embed --model google/siglip2-so400m-patch16-naflex

In: a table of data_tools.scan. Out: the same rows with a column of unit vectors in float16, for data_tools.dedup and
for pairs by style; or, with --text, a column of scores: how near each picture is to that text, for data_tools.filter.
Refused pictures get none. The model is loaded once by each worker.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pydantic
from PIL import Image

from data_tools.model_stage import ModelStage
from data_tools.stages import Row, Run, Table, run_stage
from data_tools.step import main_of_options
from ztrain.io.yamls import PathText, Strict


class EmbedSettings(Strict):
    """Which model, and what its column is called."""

    model: PathText
    """Folder or Hub id of a vision model with its image processor."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    column: str = pydantic.Field(default="embedding", min_length=1)
    """Name of the column: a table may have several."""
    batch_size: int = pydantic.Field(default=32, ge=1)
    """Pictures at a time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the model."""
    text: Annotated[str, pydantic.Field(min_length=1)] | None = None
    """For models that read text too: the column is the cosine of picture and text, -1 to 1, instead of the vector."""


class Embed(ModelStage):
    """Stage: vectors of pictures, or how near they are to a text."""

    name: ClassVar[str] = "embed"
    rules: ClassVar[int] = 2

    def __init__(
        self, settings: EmbedSettings, model: str, weights: str, location: Path, roots: Mapping[str, Path]
    ) -> None:
        """model: its name, without the path of this machine; weights: hash of its files."""
        super().__init__(location, roots, settings.batch_size)
        self.column, self.precision, self.text = settings.column, settings.precision, settings.text
        kept = settings.model_dump(include={"column", "precision", "text"})
        self.about: dict[str, Any] = {"model": model, "weights": weights, **kept}
        self.adds = pa.schema([(self.column, pa.float32() if self.text else pa.list_(pa.float16()))])

    def load(self) -> tuple[Any, Any]:
        """The model, and what pictures are compared with: (D,) unit vector in float32, or None."""
        import torch

        from ztrain.frozen.sources import Source
        from ztrain.metrics.towers import Tower  # here: other steps need not wait for torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, self.precision)
        tower = Tower.load(Source(str(self.location)), dtype, device, name=self.about["model"])
        return tower, None if self.text is None else tower.texts([self.text])[0]

    def shows(self, row: Row) -> bool:
        return row["refused"] is None

    def without(self, row: Row) -> Row:
        return {self.column: None}

    def ask(self, images: Sequence[Image.Image]) -> list[Row]:
        """float16 vectors of unit length; or float32 cosines with the text."""
        tower, text = self.model
        vectors = tower.images(images, self.batch_size)
        values = vectors.numpy().astype(np.float16) if text is None else (vectors @ text).numpy()
        return [{self.column: value} for value in values]


def embed(source: Table, settings: EmbedSettings, out: Path, run: Run) -> Table:
    """Give every picture of a table an embedding. Raises InputError."""
    from ztrain.frozen.sources import Source, public_name
    from ztrain.metrics.towers import FILES, digest

    model = Source(settings.model, settings.revision)
    model.require("config.json", what="a vision model")
    stage = Embed(settings, public_name(settings.model), digest(model), model.local(*FILES), source.roots)
    made = stage.about | {"revision": settings.revision}
    facts = {"embeddings": {**source.facts.get("embeddings", {}), settings.column: made}}
    return run_stage(stage, source, out, run, workers=1, facts=facts)


def _say(table: Table, settings: EmbedSettings, source: Table) -> str:
    values = table.read([settings.column])[settings.column]
    return f"{len(values) - values.null_count} pictures have {settings.column!r}"


main = main_of_options(embed, EmbedSettings, _say)

if __name__ == "__main__":
    sys.exit(main())
