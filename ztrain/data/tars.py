"""WebDataset tars as rows, with random access to their pictures.

A plain tar is indexed once from its headers; a picture is then a range of bytes. Nothing is extracted, unpickled or
run, which the library of that name would do unless told otherwise. What a damaged archive has lost is counted.
"""

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ztrain.data.rows import (
    RowReader,
    Triplet,
    check_size,
    listed,
    one_line,
    other_captions,
    parse_object,
    refuse,
    take_text,
)
from ztrain.errors import InputError
from ztrain.images import Picture, stamp_of
from ztrain.io.files import check_regular, read_bytes, read_text

PACK_MANIFEST_NAME = "manifest.json"
"""Lies beside shards of data_tools.pack and says how many samples each of them had: what a damaged one has lost."""

FORMAT_VERSION = 1
"""Of a data set of data_tools.pack, in its manifest; one that says none is of format 1. Raise it when what is written
comes to mean something else: tests/test_golden.py."""

_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # key and field of a member, as WebDataset splits its name
META_MEMBER = re.compile(r"__[^/]*__(/|$)")
"""Start of the name of a member that is no part of a sample to WebDataset."""
_TARGET = re.compile(r"target\.[^.]+")
_REFERENCE = re.compile(r"reference(?:\.(\d+))?\.[^.]+")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_BLOCK = 512  # bytes, of a tar
_MAX_HEADER = 1 << 20  # bytes of a long name or of extended attributes
_MAX_SAMPLES = 10_000_000  # of a shard: each that is lost is a sentence
_MAX_PADDING = 1 << 26  # bytes of zeros behind the last member; tar itself writes at most some MiB
# What tarfile raises on odd headers, found by flipping bytes.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class TarPicture:
    """A picture inside a plain tar."""

    path: Path
    offset: int
    """Of its first byte in the archive."""
    size: int
    """In bytes."""
    member: str
    state: str
    """Stamp of the archive when it was listed; another archive under this name is not read."""

    @property
    def name(self) -> str:
        return f"{self.path}: {self.member}"

    @property
    def stamp(self) -> str:
        return f"{self.state}-{self.offset}-{self.size}"

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            if stamp_of(os.fstat(file.fileno())) != self.state:
                raise OSError("the archive has changed since it was listed; start again")
            file.seek(self.offset)
            return file.read(self.size)


class _Headers(io.BufferedReader):
    """A tar as far as tarfile may read it: a header that claims to be gigabytes long is not fetched."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header claims {size or 0:,} bytes")
        return super().read(size)


@dataclass(slots=True)
class Archive:
    """What the headers of a tar say."""

    path: Path
    state: str
    samples: list[tuple[str, list[tarfile.TarInfo]]]
    """Key and members of each run of members with one key, which is a sample to WebDataset."""
    members: list[tarfile.TarInfo] = field(default_factory=list)
    """All but folders, also those that are part of no sample."""
    damage: str = ""
    """Why samples may be missing at the end; empty for a whole archive."""


def tar_rows(
    files: list[Path], root: Path, split: str, text_only: bool, packed: Mapping[Path, int]
) -> Iterator[RowReader]:
    """packed: how many samples an archive had, where that is known."""
    for path in files:
        archive = index_tar(path)
        times = Counter(key for key, _ in archive.samples)
        for key, members in archive.samples:
            if times[key] == 1:
                yield partial(_read_sample, archive, key, members, text_only)
            else:
                fault = f"the key stands {times[key]} times; the members of a sample must lie side by side, and once"
                yield partial(refuse, f"{path}: {_printable(key)}: {fault}")
        expected = packed.get(path)
        if expected is None and archive.damage:
            yield partial(refuse, f"{path}: {archive.damage}; how many samples it has lost is unknown; restore it")
        reason = archive.damage or "the archive ends before it"
        yield from lost(path, f"{reason}; restore the archive", expected or 0, len(archive.samples))


def check_format(root: Path) -> None:
    """Raises InputError for a data set of data_tools.pack that a later version wrote."""
    path = root / PACK_MANIFEST_NAME
    try:
        manifest = json.loads(read_bytes(path, "record"))
    except (OSError, ValueError, RecursionError):
        return  # none, or none of ours
    version = manifest.get("format_version", 1) if isinstance(manifest, dict) and "shards" in manifest else 1
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: data set format {version!r} is not {FORMAT_VERSION}; update ztrain")


def lost(path: Path, reason: str, expected: int, found: int = 0) -> Iterator[RowReader]:
    """A refusal for each sample that a shard is known to have had beyond those that were found."""
    for number in range(found, expected):
        yield partial(refuse, f"{path}: sample {number + 1} of {expected} is lost: {reason}")


def packed_samples(root: Path, split: str) -> dict[Path, int]:
    """Shard -> number of samples that data_tools.pack put there; nothing for those of others. Raises InputError."""
    path = root / PACK_MANIFEST_NAME
    if not path.exists():
        return {}
    try:
        manifest = json.loads(read_text(path, "json"))
        if isinstance(manifest, dict) and "shards" not in manifest:
            return {}  # somebody else's
        shards = manifest["shards"].get(split, {})
        counts = {root / name: int(shard["samples"]) for name, shard in shards.items()}
        if any(count > _MAX_SAMPLES for count in counts.values()):
            raise ValueError(f"a shard of more than {_MAX_SAMPLES:,} samples")
        return counts
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not a manifest of data_tools.pack ({error}); restore it or remove it") from error


def index_tar(path: Path) -> Archive:
    """Reads the headers of a tar, to its end or as far as they can be trusted. Raises InputError."""
    try:
        check_regular(path)
        with _Headers(path.open("rb", buffering=0)) as file:
            found = os.fstat(file.fileno())
            archive = Archive(path, stamp_of(found), [])
            head, end = file.read(6), 0
            file.seek(0)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        if member.size < 0 or not end < tar.offset <= found.st_size:
                            raise tarfile.ReadError("the next member reaches backwards or beyond the end of the file")
                        end = tar.offset
                        _add_member(archive, member)
                _check_end(file, end)
            except _TAR_ERRORS as error:
                if head.startswith(_COMPRESSED):
                    raise InputError(f"{path}: is compressed; random access needs a plain tar: unpack it") from error
                archive.damage = f"the archive is damaged at byte {end:,} ({error})"
                _drop_last(archive)  # its last members may have stood behind the damage
    except OSError as error:
        raise InputError(f"{path}: cannot read the archive ({error.strerror or error})") from error
    return archive


def _add_member(archive: Archive, member: tarfile.TarInfo) -> None:
    name, samples = _MEMBER.fullmatch(member.name), archive.samples
    if not member.isdir():
        archive.members.append(member)
    if member.isdir() or not name or META_MEMBER.match(member.name):  # WebDataset skips these too
        return
    if not samples or samples[-1][0] != name[1]:
        samples.append((name[1], []))
    samples[-1][1].append(member)


def _drop_last(archive: Archive) -> None:
    """Drops the last sample, and every member from its first on."""
    lost = archive.samples.pop()[1] if archive.samples else archive.members
    archive.members = [member for member in archive.members if member.offset < lost[0].offset]


def _check_end(file: BinaryIO, offset: int) -> None:
    """Raises ReadError unless zeros, at least one block of them, fill the archive from `offset` on."""
    padding = file.seek(0, os.SEEK_END) - offset
    if padding > _MAX_PADDING:
        raise tarfile.ReadError(f"{padding:,} bytes stand behind its last member")
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError("its end mark is missing, so it was cut short or never closed")
    while block:
        if block.count(0) < len(block):
            raise tarfile.ReadError("neither a member nor the end of the archive")
        block = file.read(1 << 20)


def _read_sample(archive: Archive, key: str, members: list[tarfile.TarInfo], text_only: bool, index: int) -> Triplet:
    where = f"{archive.path}: {_printable(key)}"
    fields: dict[str, TarPicture] = {}
    for member in members:
        name = member.name[len(key) + 1 :].lower()
        if name in fields:
            raise InputError(f"{where}: the member {name!r} stands twice; keep one")
        if not member.isreg() or member.issparse():
            raise InputError(f"{where}: the member {name!r} is a link or sparse; store it as a plain file")
        printable = _printable(member.name)
        check_size(member.size, "json" if name == "json" else "picture", where=f"{where}: the member {name!r}")
        fields[name] = TarPicture(archive.path, member.offset_data, member.size, printable, archive.state)
    targets = [picture for name, picture in fields.items() if _TARGET.fullmatch(name)]
    if "json" not in fields or len(targets) != 1:
        raise InputError(f"{where}: needs one member 'json' and one 'target.<ext>'; it has {listed(fields)}")
    try:
        row = parse_object(fields["json"].read(), where=where)
    except OSError as error:
        raise InputError(f"{where}: cannot read its JSON ({error.strerror or error})") from error
    prompt = take_text(row, "prompt", where=where)
    references = () if text_only else _tar_references(fields, where=where)
    captions = other_captions(row, prompt, where=where)
    return Triplet(
        index=index,
        where=where,
        prompt=prompt,
        captions=captions,
        references=references,
        target=targets[0],
        columns=row,
    )


def _tar_references(fields: dict[str, TarPicture], *, where: str) -> tuple[Picture, ...]:
    """`reference.<ext>`, or `reference.0.<ext>`, `reference.1.<ext>`, ... without a gap. Raises InputError."""
    matches = [(match, picture) for name, picture in fields.items() if (match := _REFERENCE.fullmatch(name))]
    numbered = sorted((int(match[1] or 0), picture.offset, picture) for match, picture in matches)
    if not numbered or [number for number, _, _ in numbered] != list(range(len(numbered))):
        raise InputError(
            f"{where}: needs one member 'reference.<ext>', or 'reference.0.<ext>', 'reference.1.<ext>' and so on; "
            f"it has {listed(fields)}"
        )
    return tuple(picture for _, _, picture in numbered)


def _printable(name: str) -> str:
    """A member's name with line feeds and bytes that are no UTF-8 written as escapes."""
    return one_line(name.encode(errors="backslashreplace").decode())
