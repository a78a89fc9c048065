"""What all steps that write have in common: hashes, the share of faults to put up with, folders that appear whole."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ztrain.errors import InputError
from ztrain.workspace import workspace

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"})
"""Of files that count as pictures, in small letters."""


def digest_of(path: Path) -> str:
    """Hash of a file's bytes; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def fingerprint(*inputs: Any) -> str:
    """Hash of all that decides an output, given as values that JSON can hold."""
    return hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()


def check_share(rejected: Mapping[str, str], total: int, max_share: float, what: str) -> None:
    """Raises InputError with the first ten reasons where more than `max_share` (0..1) of `total` is rejected."""
    share = len(rejected) / total if total else 0.0
    if share > max_share:
        first = "".join(f"\n  {reason}" for reason in list(rejected.values())[:10])
        raise InputError(
            f"{len(rejected)} of {total} {what} ({share:.2%}) cannot be used, more than max_reject_share "
            f"{max_share:g} allows; mend or remove them, or raise it:{first}"
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` at the end, so that `out` is never seen half done.

    Raises InputError where it cannot be written; on any error nothing is left behind, and what a killed process has
    left is removed by the next one.
    """
    try:
        with workspace(out.parent) as scratch:
            building = scratch / out.name
            building.mkdir()
            yield building
            building.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot write it ({error}); free space or choose another --out") from error


def read_manifest(path: Path, expected: str) -> dict[str, Any] | None:
    """The manifest of an output with the fingerprint `expected`, None where its folder is free; else InputError."""
    out = path.parent
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError):  # none, or none of ours
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("fingerprint") != expected:
        raise InputError(
            f"{out}: already holds something else than these options and inputs give; remove it or choose another --out"
        )
    return manifest
