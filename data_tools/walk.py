"""A folder and all below it, in the order of names: files to look into, with the texts beside them.

In: a folder. Out: pictures (by what is in them, where the name does not say), tars and Parquet files; and by name what
is passed by and may be a picture or a folder: links out of the sources, hidden folders, formats that are not read.
Everything else is counted by kind. Links inside the sources are followed; a folder is gone through once by its own name
and once by links, so that circles of links end.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from data_tools.captions import CaptionTable
from data_tools.names import CAPTION_TABLES, SIDECARS, in_letters, kind_of, kind_said, reason_of, texts_beside
from data_tools.output import CALLED_PICTURES, EXTENSIONS
from ztrain.errors import InputError
from ztrain.images import HEAD, READ, sniff
from ztrain.io.files import check_regular

Links: TypeAlias = Literal["inside", "all"]
CONTAINERS = (".tar", ".parquet")
_DEEPEST = 100  # folders in one another
_MACOS = "._"  # start of the name of a file in which macOS keeps what other file systems cannot: no picture


@dataclass(slots=True)
class Found:
    """What a listing counts while it goes on."""

    ignored: Counter[str] = field(default_factory=Counter)
    """Files, folders, members and columns that are no input, by kind: hidden, an extension, or what they are."""
    counts: Counter[str] = field(default_factory=Counter)
    """Captions."""


@dataclass(frozen=True, slots=True)
class File:
    """A file to look into."""

    path: Path
    name: str
    """In the place."""
    kind: str
    """Empty for a picture, or one of CONTAINERS."""
    texts: tuple[Path, ...] = ()
    """Beside it, in the order in which they count."""
    rows: tuple[tuple[str, str], ...] = ()
    """Of tables of captions: who says it, and what."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A picture or a folder that is passed by."""

    name: str
    """In the place, in letters."""
    reason: str


class Walk:
    """Goes through the places of one listing."""

    def __init__(self, roots: Iterable[Path], found: Found, links: Links) -> None:
        """links: which are followed; inside: those that lead to a file or folder of the sources."""
        self._found, self._links = found, links
        self._linked: set[str] = set()  # real folders that links have led to
        real = [Path(os.path.realpath(root)) for root in roots]
        # A snapshot of the Hub's cache is links to blobs that lie beside it.
        self._inside = [str(root.parents[1] if root.parent.name == "snapshots" else root) for root in real]

    def files(self, root: Path) -> Iterator[File | Passed]:
        """Of a place. Raises InputError where it cannot be read."""
        if root.is_dir():
            yield from self._folder(root, "", (os.path.realpath(root),), {}, by_link=False)
            return
        texts = texts_beside([root.name], [entry.name for entry in _entries(root.parent) if entry.is_file()])
        beside = tuple(root.with_name(text) for text in texts.get(root.name, ()))
        yield File(root, root.name, kind if (kind := kind_of(root.name)) in CONTAINERS else "", beside)

    def _folder(
        self, folder: Path, prefix: str, above: tuple[str, ...], tables: Mapping[str, CaptionTable], *, by_link: bool
    ) -> Iterator[File | Passed]:
        """above: the real folder and those that led to it; tables: prefix and name -> captions of folders above."""
        try:
            entries = _entries(folder)
        except OSError as error:
            if not prefix:
                raise InputError(f"{folder}: cannot read the folder ({error.strerror}); give access to it") from error
            yield self._pass(prefix[:-1], "folders that cannot be read", f"cannot be read ({error.strerror})")
            return
        seen = {entry.name: self._look(entry, prefix) for entry in entries}
        own = {f"{prefix}{name}": CaptionTable(folder / name) for name in CAPTION_TABLES if seen.get(name) == "table"}
        for table in own.values():
            for place, reason in table.faults:
                yield self._pass(prefix + place, "rows and tables of captions that cannot be read", reason)
        tables = {**own, **tables}  # the nearest first
        pictures = [name for name, what in seen.items() if what == "picture"]
        texts = texts_beside(pictures, [name for name, what in seen.items() if what == "text"])
        rows = _rows_of(pictures, prefix, tables)
        used = {text for beside in texts.values() for text in beside}
        for entry in entries:
            name, what = entry.name, seen[entry.name]
            if isinstance(what, Passed):
                yield what
            elif what == "folder":
                yield from self._enter(entry, f"{prefix}{name}/", above, tables, by_link or entry.is_symlink())
            elif what == "picture" or what in CONTAINERS:
                beside = tuple(folder / text for text in texts.get(name, ()))
                yield File(folder / name, prefix + name, what.removeprefix("picture"), beside, rows.get(name, ()))
            elif what == "text" and name not in used:
                self._found.ignored[kind_said(name)] += 1
        self._found.counts["captions_without_picture"] += sum(table.without_picture for table in own.values())

    def _enter(
        self, entry: os.DirEntry[str], prefix: str, above: tuple[str, ...], tables: Mapping[str, CaptionTable],
        by_link: bool,
    ) -> Iterator[File | Passed]:  # fmt: skip
        real = os.path.realpath(entry.path) if entry.is_symlink() else f"{above[-1]}/{entry.name}"
        if len(above) > _DEEPEST:
            yield self._pass(prefix[:-1], "folders too deep", f"lies more than {_DEEPEST} folders deep; move it up")
        elif by_link and real in above:
            yield self._pass(prefix[:-1], "links in a circle", "is a link to a folder that it lies in")
        elif by_link and real in self._linked:
            yield self._pass(prefix[:-1], "folders linked again", "links have led to this folder before; once counts")
        else:
            if by_link:
                self._linked.add(real)
            yield from self._folder(Path(entry.path), prefix, (*above, real), tables, by_link=by_link)

    def _look(self, entry: os.DirEntry[str], prefix: str) -> str | Passed:
        """folder, picture, text, table, one of CONTAINERS, or why it is passed by; "": counted, and no more."""
        name, kind, is_link = entry.name, kind_of(entry.name), entry.is_symlink()
        if name.startswith("."):
            return self._hidden(Path(entry.path), prefix)
        if is_link and self._links == "inside" and not self._is_inside(os.path.realpath(entry.path)):
            reason = "is a link out of the sources; add what it leads to to the sources, or set links: all"
            return self._pass(prefix + name, "links out of the sources", reason)
        if os.path.isdir(entry.path) if is_link else entry.is_dir():  # the latter raises for a link to itself
            return "folder"
        if kind in CONTAINERS:
            return kind
        if kind in EXTENSIONS:
            return "picture"
        if is_link and not os.path.exists(entry.path):
            return self._pass(prefix + name, "links to nothing", "is a link to nothing")
        if kind in SIDECARS:
            return "text" if entry.is_file() else self._count(kind_said(name))
        if name in CAPTION_TABLES:
            return "table"
        return self._by_content(Path(entry.path), prefix)

    def _is_inside(self, real: str) -> bool:
        return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in self._inside)

    def _hidden(self, path: Path, prefix: str) -> str | Passed:
        reason = "is hidden: its name begins with a dot; rename it to have it read"
        if path.is_dir():
            return self._pass(prefix + path.name, "hidden folders", reason)
        if path.name.startswith(_MACOS):
            return self._count("._ files of macOS")
        try:
            is_picture = kind_of(path.name) in CALLED_PICTURES or sniff(_head(path), path.name) is not None
        except (OSError, InputError):
            is_picture = False
        return self._pass(prefix + path.name, "hidden", reason) if is_picture else self._count("hidden")

    def _by_content(self, path: Path, prefix: str) -> str | Passed:
        try:
            format = sniff(_head(path), path.name)
        except OSError as error:
            reason = f"cannot be read ({reason_of(error, path)})"
            return self._pass(prefix + path.name, "files that cannot be read", reason)
        except InputError:
            return self._count("pipes, sockets and devices")
        if format in READ:
            return "picture"
        if format is None and kind_of(path.name) not in CALLED_PICTURES:
            return self._count(kind_said(path.name))
        return self._pass(prefix + path.name, f"{format or 'unknown'} pictures", not_read(format))

    def _count(self, kind: str) -> str:
        self._found.ignored[kind] += 1
        return ""

    def _pass(self, name: str, kind: str, reason: str) -> Passed:
        self._count(kind)
        return Passed(in_letters(name), reason)


def not_read(format: str | None) -> str:
    """Why a picture is passed by; format: as `sniff` names it, None where only its name is one of a picture."""
    what = f"is a picture of a format that is not read ({format})" if format else "is called a picture, and is none"
    return f"{what}; save it as PNG or JPEG"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _head(path: Path) -> bytes:
    """Raises InputError for what is no file, and OSError."""
    check_regular(path)  # a pipe would be waited for
    with path.open("rb") as file:
        return file.read(HEAD)


def _rows_of(
    pictures: list[str], prefix: str, tables: Mapping[str, CaptionTable]
) -> dict[str, tuple[tuple[str, str], ...]]:
    """Picture -> what tables say of it, the nearest first."""
    said: dict[str, tuple[tuple[str, str], ...]] = {}
    for place, table in tables.items():
        folder = prefix.removeprefix(place.removesuffix(table.name)).rstrip("/")
        for name, caption in table.of(folder, pictures).items():
            said[name] = (*said.get(name, ()), (table.name, caption))
    return said
