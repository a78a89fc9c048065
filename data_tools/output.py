"""What all steps that write have in common: hashes, the share of faults to put up with, manifests."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import pyarrow as pa
from pydantic import BeforeValidator, PlainSerializer

from ztrain.errors import InputError
from ztrain.io.files import read_bytes

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"})
"""Of files that count as pictures whatever is in them, in small letters; others count where their bytes say so."""
CALLED_PICTURES = EXTENSIONS | {".heic", ".heif", ".hif", ".tga", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".exr"}
"""Of files that are named where they turn out to be none."""


Value = TypeVar("Value")
SortedSet: TypeAlias = Annotated[
    frozenset[Value],
    BeforeValidator(lambda given: frozenset(given) if isinstance(given, list | tuple) else given),
    PlainSerializer(sorted),
]
"""A set in a config: a list in YAML, and in order in what is written, so that equal ones have equal hashes."""


def arrow_file(path: Path, mode: Literal["r", "w"] = "r") -> pa.OSFile:
    """A file as Arrow reads and writes it, which takes paths that are not UTF-8 as bytes alone. Raises OSError."""
    return pa.OSFile(os.fsencode(path), mode)


def digest_of(path: Path) -> str:
    """Hash of a file's bytes; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def fingerprint(*inputs: Any) -> str:
    """Hash of all that decides an output, given as values that JSON can hold."""
    return hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()


def check_share(lost: Sequence[str], total: int, limit: tuple[str, float], what: str, advice: str) -> None:
    """Raises InputError with the first ten reasons where more of `total` is lost than a share allows.

    lost: reasons; limit: name and value (0..1) of the share; what: is lost, with {} for the share itself.
    """
    if len(lost) > limit[1] * total:
        share, first = f"({len(lost) / total:.2%})", "".join(f"\n  {reason}" for reason in lost[:10])
        raise InputError(
            f"{len(lost)} of {total} {what.format(share)}, more than {limit[0]} {limit[1]:g} allows; {advice}, or raise"
            f" it:{first}"
        )


def read_manifest(path: Path, expected: str) -> dict[str, Any] | None:
    """The manifest of an output with the fingerprint `expected`, None where its folder is free; else InputError."""
    out = path.parent
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = json.loads(read_bytes(path, "record"))
    except (OSError, ValueError):  # none, or none of ours
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("fingerprint") != expected:
        raise InputError(
            f"{out}: already holds something else than these options and inputs give; remove it or choose another --out"
        )
    return manifest
