"""An embedding for every picture, by any vision model that transformers loads: SigLIP, CLIP, DINOv2 and their like.

    python -m data_tools.embed --table work/scan --out work/embed --model google/siglip2-so400m-patch16-naflex

In: a table of data_tools.scan. Out: the same rows with a column of unit vectors in float16, for data_tools.dedup and
for pairs by style; or, with --text, a column of scores: how near each picture is to that text, for data_tools.filter.
Refused pictures get none. The model is loaded once by each worker.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pydantic
import tyro

from data_tools.sources import Reader
from data_tools.stages import ENGINES, Batch, Engine, Table, run_here, run_stage
from data_tools.step import read_words
from ztrain.images import decode_image
from ztrain.terminal import command
from ztrain.yamls import PathText


class EmbedRules(pydantic.BaseModel):
    """Which numbers a picture gets."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str
    """Name, without the path of this machine."""
    weights: str
    """Hash of the model's files."""
    column: str = pydantic.Field(default="embedding", min_length=1)
    """Name of the column."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the model."""
    text: str | None = None
    """What pictures are compared with; None: they get their vectors."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model, and what pictures are compared with: (D,) unit vector in float32, or None."""

    tower: Any
    text: Any


class Embed:
    """Stage: holds a model, and embeds pictures in batches."""

    name: ClassVar[str] = "embed"
    rules: ClassVar[int] = 2

    def __init__(self, config: EmbedRules, location: Path, roots: Mapping[str, Path], batch_size: int) -> None:
        """location: folder of the model; batch_size: pictures at a time, which changes rounding at most."""
        self.config, self.location, self.batch_size = config, location, batch_size
        self.reader = Reader(roots)
        self.adds = pa.schema([(config.column, pa.float32() if config.text else pa.list_(pa.float16()))])
        self._loaded: _Loaded | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}  # it travels without the model

    def __call__(self, batch: Batch) -> dict[str, Sequence[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        usable = [i for i, row in enumerate(rows) if row["refused"] is None]
        vectors: list[Any] = [None] * len(rows)
        for start in range(0, len(usable), self.batch_size):
            places = usable[start : start + self.batch_size]
            for place, vector in zip(places, self._embed([rows[i] for i in places]), strict=True):
                vectors[place] = vector
        return {**batch, self.config.column: vectors}

    def _embed(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """(n, D) float16, of unit length; or (n,) float32, cosines with the text."""
        loaded = self._load()
        pictures = [decode_image(self.reader.read_same(row), row["name"]) for row in rows]
        vectors = loaded.tower.images(pictures, self.batch_size)
        found = vectors if loaded.text is None else vectors @ loaded.text
        values: np.ndarray = found.numpy()
        return values.astype(np.float16) if loaded.text is None else values

    def _load(self) -> _Loaded:
        if self._loaded is None:
            import torch

            from ztrain.features import Tower  # here: other steps need not wait for torch
            from ztrain.models import Source

            device = "cuda" if torch.cuda.is_available() else "cpu"
            dtype = getattr(torch, self.config.precision)
            tower = Tower.load(Source(str(self.location)), dtype, device, name=self.config.model)
            text = None if self.config.text is None else tower.texts([self.config.text])[0]
            self._loaded = _Loaded(tower, text)
        return self._loaded


class EmbedSettings(pydantic.BaseModel):
    """Which model, and what its column is called."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Give every picture of a table an embedding."""

    table: Path
    """Table of data_tools.scan, or of a stage behind it."""
    out: Path
    """Folder of the table to make. One that is there is gone on with."""
    settings: tyro.conf.OmitArgPrefixes[EmbedSettings]
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: Ray Data, with actors that hold the model."""
    workers: int = 1
    """Processes or actors, each with a model of its own."""


def embed(source: Table, settings: EmbedSettings, out: Path, *, engine: Engine = run_here, workers: int = 1) -> Table:
    """Raises InputError."""
    from ztrain.features import FILES, digest
    from ztrain.models import Source, public_name

    model = Source(settings.model, settings.revision)
    model.require("config.json", what="a vision model")
    kept = settings.model_dump(include={"column", "precision", "text"})
    rules = EmbedRules(model=public_name(settings.model), weights=digest(model), **kept)
    stage = Embed(rules, model.local(*FILES), source.roots, settings.batch_size)
    told = rules.model_dump() | {"revision": settings.revision}
    facts = {"embeddings": {**source.facts.get("embeddings", {}), settings.column: told}}
    return run_stage(stage, source, out, engine=engine, workers=workers, facts=facts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend."""

    def work() -> str:
        asked = read_words(Command, arguments, "embed")
        source, engine = Table.open(asked.table), ENGINES[asked.engine]
        table = embed(source, asked.settings, asked.out, engine=engine, workers=asked.workers)
        column = asked.settings.column
        values = table.read([column])[column]
        return f"{table.folder}: {len(values) - values.null_count} pictures have {column!r}"

    return command(work)


if __name__ == "__main__":
    sys.exit(main())
