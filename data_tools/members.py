"""Pictures in plain tars: which members are one, what they are called, where their bytes lie, and their captions.

In: a tar. Out: for each picture (by what is in it, where its name does not say) a name, a range of bytes or the reason
why there is none, and the texts of members beside it: `<stem>.txt`, or else `<key>.txt` as WebDataset names the members
of a sample, and so `.caption` and `.json`.

Names are in letters, and unique in the archive. Of members with one name the last is the picture, as it is when the tar
is unpacked; an earlier one is `<name>#1`, `<name>#2`, ... and refused. A hard link is the file that it names.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from data_tools.names import SIDECARS, in_letters, kind_of, kind_said, texts_beside
from data_tools.output import CALLED_PICTURES, EXTENSIONS
from data_tools.walk import not_read
from ztrain.data.tars import META_MEMBER, Archive, index_tar
from ztrain.errors import InputError
from ztrain.images import HEAD, READ, sniff
from ztrain.io.files import LIMITS

_BY_NAME = "by its name"
_READ = READ | {_BY_NAME}


@dataclass(frozen=True, slots=True)
class Member:
    """A file of an archive, or what should be one."""

    name: str
    """As it is unpacked: `./a` is `a`."""
    offset: int
    """Of its first byte in the archive."""
    size: int
    """In bytes."""
    fault: str = ""
    """Why it cannot be used; empty where it can."""
    is_passed: bool = False
    """Whether it is of a format that is not read, and counts as no picture."""
    texts: tuple[tuple[str, bytes | InputError], ...] = ()
    """As data_tools.captions takes them."""


def list_members(path: Path, ignored: Counter[str]) -> Iterator[Member]:
    """Pictures and what is called like one, in order, each by a name of its own.

    `ignored` counts what is no picture, by kind. Raises InputError, also at the end of a damaged tar.
    """
    archive = index_tar(path)
    entries = _entries(archive, ignored)
    last = {entry.name: entry for entry in entries}
    again: Counter[str] = Counter()
    with path.open("rb") as file:
        formats = {id(entry): _format(file, entry) for entry in entries}
        pictures = [entry.name for entry in last.values() if formats[id(entry)] in _READ]
        texts = texts_beside(pictures, (name for name, entry in last.items() if not entry.fault), keys=True)
        used = {id(last[name]) for beside in texts.values() for name in beside}
        for entry in entries:
            format, name, fault = formats[id(entry)], in_letters(entry.name), entry.fault
            if format is None:
                ignored[kind_said(entry.name)] += id(entry) not in used
                continue
            if last[entry.name] is not entry:
                again[name] += 1
                name = f"{name}#{again[name]}"
                fault = "stands again later in the archive, and unpacking it gives what stands last"
            if format not in _READ:
                ignored[f"{format or 'unknown'} pictures"] += 1
                yield replace(entry, name=name, fault=not_read(format), is_passed=True)
                continue
            beside = () if fault else tuple(_text(file, last[text]) for text in texts.get(entry.name, ()))
            yield replace(entry, name=name, fault=fault, texts=beside)
    if archive.damage:
        raise InputError(f"{path}: {archive.damage}; what stands behind is lost")


def _format(file: BinaryIO, entry: Member) -> str | None:
    """As `sniff` names it, _BY_NAME where the name is enough, "" for what is called a picture and is none; None for
    what is no picture."""
    kind = kind_of(entry.name)
    if kind in EXTENSIONS:
        return _BY_NAME
    if kind in SIDECARS or entry.fault:
        return None
    file.seek(entry.offset)
    format = sniff(file.read(min(entry.size, HEAD)), entry.name)
    return "" if format is None and kind in CALLED_PICTURES else format


def _text(file: BinaryIO, entry: Member) -> tuple[str, bytes | InputError]:
    whose, limit = f"sidecar {kind_of(entry.name)}", LIMITS["json" if kind_of(entry.name) == ".json" else "caption"]
    if entry.size > limit:
        return whose, InputError(f"has {entry.size:,} bytes, more than the {limit:,} of a caption; shorten it")
    file.seek(entry.offset)
    return whose, file.read(entry.size)


def _entries(archive: Archive, ignored: Counter[str]) -> list[Member]:
    """In order, without hidden ones; hard links lie where the file lies that they name."""
    entries: list[Member] = []
    so_far: dict[str, Member] = {}
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
        so_far[name] = Member(name, offset, size, fault)
        if META_MEMBER.match(name):
            ignored["__NAME__, no sample to WebDataset"] += 1
        elif any(part.startswith(".") and part != ".." for part in name.split("/")):
            ignored["hidden"] += 1
        else:
            entries.append(so_far[name])
    return entries


def _plain(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))
