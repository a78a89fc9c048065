"""A caption for every picture, by any image-text model that transformers loads: Qwen-VL, LLaVA, SmolVLM and their like.

    python -m data_tools.caption --table work/dedup --out work/caption --model Qwen/Qwen3-VL-4B-Instruct

In: a table of data_tools.scan, or of a stage behind it. Out: the same rows with a column of captions, `<column>_from`
(who says so) and `<column>_fault` (why there is none, data_tools.replies). Refused pictures and copies are not asked
about, and captions that are there stay. The same command gives the same bytes; other batches round otherwise, which
now and then changes a word. The model is loaded once by each worker.
"""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as compute
import pydantic
from PIL import Image

from data_tools.asking import MODELS, Model, read_template
from data_tools.model_stage import ModelStage
from data_tools.output import check_share, digest_of, fingerprint
from data_tools.replies import Reply, judge
from data_tools.stages import Row, Run, Table, run_stage
from data_tools.step import main_of_options
from ztrain.errors import InputError
from ztrain.io.yamls import PathText, Strict


class Asking(Strict):
    """How pictures are asked about."""

    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    template: PathText = pydantic.Field(default="content", min_length=1)
    """What is asked. content: what is drawn, without its style. style: how, without what. Or a text file."""
    column: str = pydantic.Field(default="caption", min_length=1)
    """Name of the column: a table may have several, as one for styles."""
    replace: bool = False
    """Ask about pictures that have a caption too, and put the answer, or its lack, in its place."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What runs the model. vllm: for large jobs on a GPU; wants the extra of that name."""
    max_new_tokens: int = pydantic.Field(default=160, ge=1)
    """A reply that has not ended by then is at fault."""
    max_words: int = pydantic.Field(default=80, ge=1)
    """A reply with more is at fault. Chinese and Japanese characters count as words."""
    max_pixels: int = pydantic.Field(default=1024 * 1024, ge=1024)
    """Larger pictures are shrunk to this area; smaller ones are left to the model's own processor."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the model."""


class CaptionSettings(Asking):
    """Which model is asked, and how."""

    model: PathText
    """Folder or Hub id of an image-text model."""
    batch_size: int = pydantic.Field(default=16, ge=1)
    """Pictures at a time."""
    max_fault_share: float = pydantic.Field(default=0.05, ge=0, le=1)
    """Fails where a larger share of the replies is at fault: 0 on the first, 1 never."""


class CaptionRules(Asking):
    """Which words a picture gets."""

    model: str
    """Name, without the path of this machine."""
    weights: str
    """Hash of the model's files."""
    question: str = pydantic.Field(min_length=1)
    """What `template` says."""

    @property
    def author(self) -> str:
        """What `<column>_from` says of its captions."""
        hashed = fingerprint(self.question)[:8]
        return f"{self.model}@{self.revision or self.weights[:12]}, template {self.template} {hashed}"


def shrink(image: Image.Image, max_pixels: int) -> Image.Image:
    """At most so many pixels, with the same aspect."""
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale >= 1:
        return image
    width = min(max(1, int(image.width * scale)), max_pixels)
    height = min(max(1, int(image.height * scale)), max_pixels // width)
    return image.resize((width, height), Image.Resampling.LANCZOS)


class Caption(ModelStage):
    """Stage: captions of pictures."""

    name: ClassVar[str] = "caption"
    rules: ClassVar[int] = 1

    def __init__(self, config: CaptionRules, location: Path, roots: Mapping[str, Path], batch_size: int) -> None:
        super().__init__(location, roots, batch_size)
        self.config, self.about = config, config.model_dump(mode="json")
        self.adds = pa.schema([(name, pa.string()) for name in column_names(config.column)])

    def load(self) -> Model:
        config, kind = self.config, MODELS[self.config.backend]
        return kind(self.location, config.model, config.question, precision=config.precision,
                    max_new_tokens=config.max_new_tokens)  # fmt: skip

    def shows(self, row: Row) -> bool:
        if row["refused"] is not None or row.get("copy_of") is not None:
            return False
        return self.config.replace or not row.get(self.config.column)

    def without(self, row: Row) -> Row:
        return {name: row.get(name) for name in self.adds.names}

    def ask(self, images: Sequence[Image.Image]) -> list[Row]:
        replies: list[Reply] = self.model.ask([shrink(image, self.config.max_pixels) for image in images])
        judged = [judge(reply, self.config.max_words) for reply in replies]
        cells = [(text, None if text is None else self.config.author, fault) for text, fault in judged]
        return [dict(zip(self.adds.names, each, strict=True)) for each in cells]


def column_names(column: str) -> tuple[str, str, str]:
    """Caption, who says so, and why there is none."""
    return column, f"{column}_from", f"{column}_fault"


def caption(source: Table, settings: CaptionSettings, out: Path, run: Run) -> Table:
    """Caption every picture of a table that has no caption yet. Raises InputError, also where too many replies are at
    fault; the table is whole then too."""
    from ztrain.frozen.sources import PARTS, Source, public_name

    column = settings.column
    if column in source.columns and column_names(column)[1] not in source.columns:
        raise InputError(f"--column {column}: the table has one of that name without captions; choose another")
    template, question = read_template(settings.template)
    model = Source(settings.model, settings.revision)
    model.require("config.json", what="an image-text model")
    location, name = model.local(*PARTS), public_name(settings.model)
    MODELS[settings.backend].check(location, name)
    weights = fingerprint([(path.name, digest_of(path)) for path in model.files(*PARTS)])
    shared = settings.model_dump(include=set(Asking.model_fields) - {"template"})
    rules = CaptionRules(**shared, template=template, question=question, model=name, weights=weights)
    stage = Caption(rules, location, source.roots, settings.batch_size)
    facts = {"captions": {**source.facts.get("captions", {}), column: rules.model_dump()}}
    table = run_stage(stage, source, out, run, workers=1, facts=facts)
    check_faults(table, column, settings.max_fault_share)
    return table


def check_faults(table: Table, column: str, max_share: float) -> None:
    """Raises InputError where more than `max_share` (0..1) of the replies is at fault."""
    why = column_names(column)[2]
    faults = [f"{row['name']}: {row[why]}" for row in table.read(["name", why]).to_pylist() if row[why] is not None]
    limit, total = ("max_fault_share", max_share), len(faults) + count(table, column).captioned
    advice = "look at them, change --template, --model or a limit"
    check_share(faults, total, limit, "replies are at fault", advice)


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of a captioned table."""

    captioned: int
    """By the model, as this run asked it."""
    kept: int
    """With a caption from elsewhere."""
    faults: Counter[str]
    """Replies at fault, by kind."""
    left_out: int
    """Without caption and not asked about: refused, or a copy."""


def count(table: Table, column: str) -> Counts:
    """What became of the rows of a table that this stage has made."""
    rows = table.read(column_names(column))
    author = CaptionRules(**table.facts["captions"][column]).author
    texts, authors, faults = (rows[name] for name in rows.column_names)
    kinds = Counter(str(fault).partition(":")[0] for fault in faults.drop_null().to_pylist())
    captioned = compute.sum(compute.equal(authors, author)).as_py() or 0
    with_text = len(texts) - texts.null_count
    return Counts(captioned, with_text - captioned, kinds, len(texts) - with_text - kinds.total())


def _say(table: Table, settings: CaptionSettings, source: Table) -> str:
    found = count(table, settings.column)
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(found.faults.items()))
    faults = f"{found.faults.total()} at fault" + (f": {kinds}" if kinds else "")
    return f"{found.captioned} captioned, {found.kept} kept, {found.left_out} left out, {faults}"


main = main_of_options(caption, CaptionSettings, _say)

if __name__ == "__main__":
    sys.exit(main())
