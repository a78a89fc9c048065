"""Pictures in plain tars: which members are one, what they are called, where their bytes lie, and their captions.

In: a tar. Out: for each picture a name, a range of bytes or the reason why there is none, and the caption of a member
beside it: `<stem>.txt`, or else `<key>.txt` as WebDataset names the members of a sample.

Names are unique in the archive. Of members with one name the last is the picture, as it is when the tar is unpacked;
an earlier one is `<name>#1`, `<name>#2`, ... and refused. A hard link is the file that it names.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_tools.names import kind_of, kind_said, printable, stem_of, texts_by_stem
from data_tools.output import EXTENSIONS
from ztrain.errors import InputError
from ztrain.tars import META_MEMBER, Archive, index_tar


@dataclass(frozen=True, slots=True)
class Member:
    """A picture of an archive, or what is called like one."""

    name: str
    offset: int
    """Of its first byte in the archive."""
    size: int
    """In bytes."""
    fault: str
    """Why it cannot be used; empty where it can."""
    caption: bytes | None
    """UTF-8, if the archive is right."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A member that is a file, or should be."""

    name: str
    """As it is unpacked: `./a` is `a`."""
    offset: int
    size: int
    fault: str


def list_members(path: Path, ignored: Counter[str]) -> Iterator[Member]:
    """In order; `ignored` counts what is no picture, by kind. Raises InputError, also at the end of a damaged tar."""
    archive = index_tar(path)
    entries = _entries(archive, ignored)
    last = {entry.name: entry for entry in entries}
    captions = _captions(last)
    used = {id(text) for text in captions.values()}
    again: Counter[str] = Counter()
    with path.open("rb") as file:
        for entry in entries:
            if kind_of(entry.name) not in EXTENSIONS:
                if id(entry) not in used:
                    ignored[kind_said(entry.name)] += 1
                continue
            name, is_last, fault = printable(entry.name), last[entry.name] is entry, entry.fault
            if not is_last or (name != entry.name and name in last):
                again[name] += 1
                name = f"{name}#{again[name]}"
            if not is_last:
                fault = "stands again later in the archive, and unpacking it gives what stands last"
            caption = None
            if not fault and (text := captions.get(entry.name)):
                file.seek(text.offset)
                caption = file.read(text.size)
            yield Member(name, entry.offset, entry.size, fault, caption)
    if archive.damage:
        raise InputError(f"{path}: {archive.damage}; what stands behind is lost")


def _entries(archive: Archive, ignored: Counter[str]) -> list[_Entry]:
    """In order, without hidden ones; hard links lie where the file lies that they name."""
    entries: list[_Entry] = []
    so_far: dict[str, _Entry] = {}
    for member in archive.members:
        name, offset, size, fault = _plain(member.name), member.offset_data, member.size, ""
        if member.islnk() and (meant := so_far.get(_plain(member.linkname))):
            offset, size, fault = meant.offset, meant.size, meant.fault
        elif member.islnk() or member.issym():
            fault = "is a link in the archive; pack the file itself"
        elif member.issparse():
            fault = "is stored with holes (sparse) in the archive; pack it as a plain file"
        elif not member.isreg():
            fault = "is no file in the archive; pack the picture itself"
        so_far[name] = _Entry(name, offset, size, fault)
        if META_MEMBER.match(name):
            ignored["__NAME__, no sample to WebDataset"] += 1
        elif any(part.startswith(".") and part != ".." for part in name.split("/")):
            ignored["hidden"] += 1
        else:
            entries.append(so_far[name])
    return entries


def _plain(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _captions(last: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """Name of a picture -> its text."""
    texts = texts_by_stem(name for name, entry in last.items() if not entry.fault)
    pictures = (name for name in last if kind_of(name) in EXTENSIONS)
    found = ((name, texts.get(stem_of(name)) or texts.get(_key(name))) for name in pictures)
    return {name: last[text] for name, text in found if text}


def _key(name: str) -> str:
    """Of the sample that WebDataset puts a member into."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
