"""Ways of labelling whose references come from a group: folders of a style, clusters of look-alikes, frames of a clip.

In: the pictures of a table. Out: items; which of a group meet is data_tools.pair's to say.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
import pydantic

from data_tools.names import style_of
from data_tools.output import fingerprint
from data_tools.pictures import Captions, Counts, Pictures
from data_tools.triplets import Item, Scanned
from ztrain.data.csvs import cell, read_rows
from ztrain.errors import InputError
from ztrain.io.forms import matched, one_form
from ztrain.io.yamls import PathText, Strict


class _Way(Strict):
    def tables(self, folder: Path) -> list[Path]:
        """Files that say more than the pictures, read and checked. Raises InputError."""
        return []


class StyleFolders(_Way):
    """One folder of pictures for each style. With a table of contents, file names without extension are its ids."""

    contents: PathText | None = None
    """CSV table with one row per content, relative to the config file. None: prompts are captions, and pictures of
    one name in several folders show one content."""
    id_column: str = "id"
    """Column with the file name (without extension) that a content has in every style folder."""
    prompt_column: str = "prompt"
    """Column with the text that says what is drawn, without its style."""
    split_column: str | None = "split"
    """Column that says which split a content belongs to; None leaves that to data_tools.split."""
    splits: Annotated[dict[str, str], pydantic.Field(min_length=1)] = {"train": "train", "val": "validation"}
    """Split in the table -> folder in the output; contents of other splits are left out."""
    caption_column: str = "caption"
    """Column of the pictures' table with prompts, where there is no table of contents."""
    styles: Annotated[list[str], pydantic.Field(min_length=1)] | None = None
    """Style folders to use; None takes all."""

    @pydantic.field_validator("splits")
    @classmethod
    def _folders_are_names(cls, splits: dict[str, str]) -> dict[str, str]:
        check_splits(list(splits.values()))
        return splits

    def tables(self, folder: Path) -> list[Path]:
        if self.contents is None:
            return []
        self._read(folder, Counts())
        return [folder / self.contents]

    def items(self, pictures: Pictures, folder: Path, told: Counts) -> Iterator[Item]:
        """Raises InputError."""
        contents = None if self.contents is None else self._read(folder, told)
        captions = pictures.captions(self.caption_column)
        styles = {style: self._with_content(style, of_style, contents, told)
                  for style, of_style in self._styles(pictures.usable).items()}  # fmt: skip
        if contents is not None:
            met = {content for of_style in styles.values() for content in of_style}
            told.counts["contents_without_picture"] = sum(split != "" for content, (_, split) in contents.items()
                                                          if content not in met)  # fmt: skip
        groups = [list(of_style.values()) for of_style in styles.values()]
        if pictures.has_clusters:  # data_tools.dedup knows whether those of other styles are copies; here they are none
            groups = [[picture for group in groups for picture in group]]
        kept = {picture for group in groups for picture in pictures.single(group, told)}
        for style, of_style in styles.items():
            for content, picture in of_style.items():
                if picture in kept:
                    said, split = captions[picture], None
                    if contents is not None:
                        prompt, split = contents[content]
                        said = Captions((prompt,))
                    yield Item(picture=picture, way="styles", group=style, content=content, whole=content,
                               prompt=said.prompt, split=split,
                               more={"style": style, "content": content, **said.columns})  # fmt: skip

    def _with_content(
        self,
        style: str,
        pictures: Sequence[Scanned],
        contents: Mapping[str, tuple[str, str | None]] | None,
        told: Counts,
    ) -> dict[str, Scanned]:
        """Content -> its picture in this style. Raises InputError."""
        own = {picture: one_form(PurePosixPath(picture.name).stem) for picture in pictures}
        matches = matched(set(own.values()), contents.keys() if contents is not None else set(own.values()))
        named: dict[str, Scanned] = {}
        for picture in pictures:
            content = matches.found.get(own[picture])
            if content is None or contents is not None and contents[content][1] == "":
                missing = f"no id {own[picture]!r} in the table{matches.why_not(own[picture])}"
                why = missing if content is None else "its content is of another split"
                told.leave_out("pictures_without_content", picture.key, "label", why)
                continue
            if content in named:
                raise InputError(f"{picture.key}: the same content as {named[content].key}; keep one")
            named[content] = picture
        if not named:
            raise InputError(f"{style}: no picture of a content in the table; check ids and splits")
        return named

    def _styles(self, usable: Sequence[Scanned]) -> dict[str, list[Scanned]]:
        """Raises InputError for styles that are not there."""
        present: dict[str, list[Scanned]] = defaultdict(list)
        for picture in usable:
            present[style_of(picture.source, picture.name)].append(picture)
        styles = dict.fromkeys(map(one_form, self.styles or sorted(present)))  # named twice is no more than once
        if missing := [style for style in styles if style not in present]:
            raise InputError(f"no style folder {', '.join(missing)}; found: {', '.join(sorted(present)) or 'none'}")
        return {style: sorted(present[style], key=lambda each: each.name) for style in styles}

    def _read(self, folder: Path, told: Counts) -> dict[str, tuple[str, str | None]]:
        """Content id -> prompt and split, "" for one that is left out. Raises InputError."""
        path = folder / str(self.contents)
        columns = [name for name in (self.id_column, self.prompt_column, self.split_column) if name is not None]
        contents: dict[str, tuple[str, str | None]] = {}
        for where, row in read_rows(path, columns):
            content = one_form(cell(row, self.id_column, where=where))
            prompt = cell(row, self.prompt_column, where=where)
            named = self.split_column and cell(row, self.split_column, where=where, optional=True)
            if content in contents:
                raise InputError(f"{where}: the {self.id_column} {content!r} stands twice; keep one")
            contents[content] = (prompt, None if named is None else self.splits.get(named, ""))
        told.counts["contents_of_other_splits"] = sum(split == "" for _, split in contents.values())
        empty = sorted(set(self.splits.values()) - {folder for _, folder in contents.values() if folder is not None})
        if empty and self.split_column is not None:
            raise InputError(f"{path}: split {empty[0]!r} gets no content; check splits and {self.split_column}")
        return contents


class StyleClusters(_Way):
    """Pictures whose embeddings lie close together are one style: for works that nobody has sorted."""

    column: str = "embedding"
    """Column of data_tools.embed; a model of style finds styles, SigLIP rather what is shown."""
    min_similarity: float = pydantic.Field(default=0.8, gt=0, le=1)
    """Cosine from which two pictures are neighbours; communities of neighbours are styles."""
    min_pictures: int = pydantic.Field(default=4, ge=2)
    """Smaller communities are left out."""
    caption_column: str = "caption"
    """Column with prompts."""

    def items(self, pictures: Pictures, folder: Path, told: Counts) -> Iterator[Item]:
        """Raises InputError where there are no embeddings."""
        from data_tools import communities

        vectors = pictures.column(self.column)
        if not vectors or any(vector is None for vector in vectors):
            raise InputError(f"not all pictures have {self.column!r}; embed them first")
        known = dict(zip(pictures.usable, vectors, strict=True))
        captions = pictures.captions(self.caption_column)
        single = pictures.single(pictures.usable, told)
        embeddings = np.array([known[picture] for picture in single], np.float16)  # (N, D)
        labels = communities.communities(len(single), communities.neighbours(embeddings, self.min_similarity))
        members: dict[int, list[Scanned]] = defaultdict(list)
        for picture, label in zip(single, labels.tolist(), strict=True):
            members[label].append(picture)
        for of_style in members.values():
            if len(of_style) < self.min_pictures:
                reason = f"its cluster has {len(of_style)} pictures, fewer than min_pictures {self.min_pictures}"
                for picture in of_style:
                    told.leave_out("pictures_without_style", picture.key, "label", reason)
                continue
            style = f"cluster-{fingerprint(of_style[0].key)[:8]}"
            for picture in of_style:
                yield Item(picture=picture, way="clusters", group=style, content=picture.cluster, whole=picture.cluster,
                           prompt=captions[picture].prompt,
                           more={"style": style, **captions[picture].columns})  # fmt: skip


class Clips(_Way):
    """Folders of frames, in the order of the numbers in their names: a reference shows the same things at another time.
    Copies count as frames too; how alike two may be is `max_copy_score`'s to say."""

    min_gap: int = pydantic.Field(default=1, ge=1)
    """Fewest frames between target and reference."""
    max_gap: Annotated[int, pydantic.Field(ge=1)] | None = None
    """Most; None: the whole clip."""
    caption_column: str = "caption"
    """Column with prompts."""
    max_copy_score: float = pydantic.Field(default=0.97, ge=0.8, le=1)
    """Frames that are more alike than this do not meet: nothing has happened between them."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> "Clips":
        if self.max_gap is not None and self.max_gap < self.min_gap:
            raise ValueError(f"max_gap {self.max_gap} must be at least min_gap {self.min_gap}")
        return self

    def items(self, pictures: Pictures, folder: Path, told: Counts) -> Iterator[Item]:
        captions = pictures.captions(self.caption_column)
        known = {picture.key: picture for picture in pictures.usable}
        clips: dict[str, list[str]] = defaultdict(list)
        for key in sorted([*known, *pictures.refused], key=_by_numbers):  # a refused frame is a frame all the same
            clips[str(PurePosixPath(key).parent)].append(key)
        for clip, frames in clips.items():
            for order, key in enumerate(frames):
                if (picture := known.get(key)) is not None:
                    yield Item(picture=picture, way="clips", group=clip, content=key, whole=clip, order=order,
                               gap=(self.min_gap, self.max_gap or len(frames)), prompt=captions[picture].prompt,
                               max_copy_score=self.max_copy_score,
                               more={"clip": clip, **captions[picture].columns})  # fmt: skip


class Alone(_Way):
    """Every picture for itself: its only reference is a part of itself (pair.self_share)."""

    caption_column: str = "caption"
    """Column with prompts."""

    def items(self, pictures: Pictures, folder: Path, told: Counts) -> Iterator[Item]:
        captions = pictures.captions(self.caption_column)
        for picture in pictures.single(pictures.usable, told):
            yield Item(picture=picture, way="alone", content=picture.key, whole=picture.cluster,
                       prompt=captions[picture].prompt, more=captions[picture].columns)  # fmt: skip


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def check_split(name: str) -> None:
    """Raises ValueError unless `datasets` and every file system take it for the name of a split."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name == "all":
        raise ValueError(f"{name!r} cannot be a split: letters, digits and _, and not all")


def check_splits(names: Sequence[str]) -> None:
    """The same of several, which no file system may take for one another."""
    for name in names:
        check_split(name)
    if len({name.casefold() for name in names}) < len(set(names)):
        raise ValueError(f"{', '.join(names)}: differ in capitals alone; rename one")
