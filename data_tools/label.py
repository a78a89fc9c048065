"""What a picture is there for: its style, its content, its prompt, or the references that somebody has named for it.

    python -m data_tools.label --config configs/data/emoji_styles.yaml --table work/dedup --out work/label

In: a table of data_tools.dedup or of any stage before it, and the section `label` of a config. Out: a table of items,
for data_tools.split. Copies (`copy_of`) are left out of groups; pictures that somebody has named, and frames, are used.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Protocol

import pydantic

from data_tools.captions import GIVEN
from data_tools.given import BeforeAfter, PairTable
from data_tools.groups import Alone, Clips, StyleClusters, StyleFolders
from data_tools.output import digest_of
from data_tools.pictures import Counts, Lines, Pictures
from data_tools.stages import Run, Table
from data_tools.step import main_of_section
from data_tools.triplets import PROMPTS, Item, write_rows
from ztrain.errors import InputError
from ztrain.io.yamls import Strict

_RULES = 2
_NO_WAYS = ("keep_copies", "captions", "further_captions")


class Way(Protocol):
    """A way of labelling; its config is all of it."""

    def tables(self, folder: Path) -> list[Path]:
        """Files that decide it, checked; `folder`: what their paths are relative to. Raises InputError."""

    def items(self, pictures: Pictures, folder: Path, told: Counts) -> Iterator[Item]:
        """Raises InputError."""


class LabelRules(Strict):
    """Ways of labelling; each that is given adds its items."""

    styles: StyleFolders | None = None
    clusters: StyleClusters | None = None
    clips: Clips | None = None
    pairs: PairTable | None = None
    before_after: BeforeAfter | None = None
    alone: Alone | None = None
    keep_copies: bool = False
    """Whether groups get copies too, and not only the picture that stands for them."""
    captions: Lines | None = None
    """What the lines of a caption are. None: one caption. first: the first alone counts. all: each is a caption, the
    first the prompt, the others in the row's `prompts`, of all of which training takes one at a time."""
    further_captions: Annotated[list[str], pydantic.Field(min_length=1)] | None = None
    """Columns of the pictures' table whose texts are further captions, as data_tools.caption gives them."""

    @pydantic.model_validator(mode="after")
    def _some(self) -> "LabelRules":
        if not self.ways():
            names = [name for name in type(self).model_fields if name not in _NO_WAYS]
            raise ValueError(f"needs at least one of {', '.join(names)}; `styles: {{}}` takes folders as styles")
        told = [self.styles is not None and self.styles.contents is None, self.clusters, self.clips, self.alone,
                self.before_after is not None and self.before_after.prompt is None]  # fmt: skip
        if (self.captions or self.further_captions) and not any(told):
            raise ValueError("captions and further_captions are those of pictures, but here a table or the config has"
                             " all prompts; leave them out")  # fmt: skip
        return self

    def ways(self) -> list[Way]:
        """Those that are given."""
        given = (self.styles, self.clusters, self.clips, self.pairs, self.before_after, self.alone)
        return [way for way in given if way is not None]

    def tables(self, folder: Path) -> list[Path]:
        """Files that decide the labels, checked. Raises InputError."""
        return [path for way in self.ways() for path in way.tables(folder)]


def label(source: Table, rules: LabelRules, out: Path, run: Run) -> Table:
    """Say what each picture is there for. Raises InputError."""
    digests = [digest_of(path) for path in rules.tables(run.folder)]
    pictures = Pictures.read(source, rules.keep_copies, rules.captions, rules.further_captions or ())
    told = Counts()
    for what, lost in (("passed_by", pictures.passed_by), ("pictures_refused", pictures.refused)):
        for key, (stage, reason) in lost.items():
            told.leave_out(what, key, stage, reason)
    if not pictures.usable:
        raise InputError(f"{source.folder}: no picture is left; lower the limits before it")
    items = [item for way in rules.ways() for item in way.items(pictures, run.folder, told)]
    if not items:
        raise InputError(f"{source.folder}: no picture fits the section label; look at its folders and names")
    told.counts["further_captions"] = sum(len(item.more.get(PROMPTS, ())) for item in items)
    met = {each.key for item in items for each in (item.picture, *(item.references or ()))}
    met |= {each.name for each in told.left_out}
    for picture in pictures.usable:
        if picture.key not in met:
            told.leave_out("pictures_not_asked_for", picture.key, "label", "no way of labelling takes it")
    count = len(pictures.usable) + len(pictures.refused)
    authors = pictures.column("caption_from") if "caption_from" in source.columns else []
    by_model = sum(author is not None and not author.startswith(GIVEN) for author in authors)
    counts = {"pictures": count, **source.facts.get("counts", {}), "captions_by_a_model": by_model, **told.counts}
    about = "label", (_RULES, rules.model_dump(mode="json"), digests)
    return write_rows(Item, items, out, source, about, told.left_out, counts)


def _say(table: Table) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in table.facts["counts"].items())


main = main_of_section(label, LabelRules, _say)

if __name__ == "__main__":
    sys.exit(main())
