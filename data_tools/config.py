"""One file for a whole build: where pictures are, and what each step makes of them.

In: YAML with a section for each step, and options of the command line over it. Out: `BuildConfig`.
"""

from pathlib import Path
from typing import Annotated, Any

import pydantic

from data_tools.caption import CaptionSettings
from data_tools.dedup import DedupRules
from data_tools.embed import EmbedSettings
from data_tools.filter import FilterRules
from data_tools.label import LabelRules
from data_tools.names import in_letters
from data_tools.pack import PackRules
from data_tools.pair import PairRules
from data_tools.scan import ScanRules
from data_tools.split import SplitRules
from data_tools.walk import Links
from ztrain.io.yamls import PathText, Strict, load_yaml, parse


class BuildConfig(Strict):
    """What a build makes of which pictures. Paths are relative to the config file."""

    sources: Annotated[list[PathText], pydantic.Field(min_length=1)]
    """Folders, tars, Parquet files, hub:owner/name@revision."""
    links: Links = "inside"
    """Which links in them are followed: those that lead to something inside the sources, or all."""
    max_refused_share: float = pydantic.Field(default=0.05, ge=0, le=1)
    """Fails where a larger share of the pictures is refused by the scan: 0 on the first, 1 never."""
    scan: ScanRules = ScanRules()
    filter: FilterRules = FilterRules()
    embed: list[EmbedSettings] = []
    """Each adds a column: vectors, or with a text scores, which `filter` may then go by."""
    dedup: DedupRules | None = DedupRules()
    """None: equal pixels alone are copies."""
    caption: list[CaptionSettings] = []
    """Each fills a column: `caption`, where nobody has written one, or another."""
    label: LabelRules
    split: SplitRules = SplitRules()
    pair: PairRules = PairRules()
    pack: PackRules = PackRules()

    def at(self, folder: Path) -> "BuildConfig":
        """With models and questions that are files below `folder`, which relative paths are relative to."""

        def place(given: str) -> str:
            return str(folder / given) if (folder / given).exists() else given

        embed = [each.model_copy(update={"model": place(each.model)}) for each in self.embed]
        caption = [
            each.model_copy(update={"model": place(each.model), "template": place(each.template)})
            for each in self.caption
        ]
        return self.model_copy(update={"embed": embed, "caption": caption})

    def copies(self) -> DedupRules | None:
        """What counts as a copy, where folders may be styles."""
        if self.dedup is None or self.dedup.across_folders is not None:
            return self.dedup
        return self.dedup.model_copy(update={"across_folders": self.label.styles is None})

    def told(self) -> dict[str, Any]:
        """For the manifest: what decides the result, with names in the place of this machine's paths."""
        from ztrain.frozen.sources import public_name  # here, for it brings torch

        document: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        document["sources"] = [each if each.startswith("hub:") else in_letters(Path(each).name)
                               for each in self.sources]  # fmt: skip
        models = [each.model for each in self.caption] + [each.model for each in self.embed]
        for step, model in zip((*document["caption"], *document["embed"]), models, strict=True):
            step["model"] = public_name(model)
        for step in document["caption"]:
            step["template"] = Path(step["template"]).name
        for way, key in (("styles", "contents"), ("pairs", "table")):
            if path := document["label"].get(way, {}).get(key):
                document["label"][way][key] = Path(path).name
        return document


def read_config(path: Path) -> BuildConfig:
    """Raises InputError."""
    return parse(BuildConfig, load_yaml(path), str(path))
