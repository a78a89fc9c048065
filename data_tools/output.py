"""Triplet folders and packed shards as they come out: whole or not at all, with a report of what they were made from.

In: rows with the pictures that they need. Out: `<out>/<split>/metadata.jsonl` with those pictures under `images/`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ztrain.data import MANIFEST_NAME
from ztrain.errors import InputError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"})
"""Of files that count as pictures, in small letters."""


@dataclass(frozen=True, slots=True)
class Source:
    """A picture to copy."""

    path: Path
    file_name: str
    """Where it lies in its split folder."""
    digest: str
    """Hash of the file's bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A triplet to write."""

    target: Source
    references: tuple[Source, ...]
    """At least one."""
    prompt: str
    columns: dict[str, Any]
    """Further keys of the manifest row."""


def digest_of(path: Path) -> str:
    """Hash of a file's bytes; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def find_licences(*folders: Path) -> list[Path]:
    """The first LICENSES.md of these folders, which travels with the pictures; none or one."""
    return [path for folder in folders if (path := folder / "LICENSES.md").is_file()][:1]


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


def read_report(path: Path, expected: str) -> dict[str, Any] | None:
    """The report of an output with the fingerprint `expected`, None where its folder is free; else InputError."""
    out = path.parent
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError):  # none, or none of ours
        report = None
    if not isinstance(report, dict) or report.get("fingerprint") != expected:
        raise InputError(
            f"{out}: already holds something else than these options and inputs give; remove it or choose another --out"
        )
    return report


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, so that `out` is never seen half done.

    Raises InputError where it cannot be written; on any error nothing is left behind.
    """
    building = out.with_name(f".{out.name}.{os.getpid()}.building")
    shutil.rmtree(building, ignore_errors=True)  # of a killed process with the same number
    try:
        building.mkdir(parents=True)
        yield building
        building.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot write it ({error}); free space or choose another --out") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)  # after the rename there is nothing left to remove


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_triplets(folder: Path, rows: Mapping[str, list[Row]]) -> None:
    """Split -> rows as manifests and pictures below `folder`. OSError passes through."""
    # One key for all, since `datasets` cannot read a manifest with both.
    several = any(len(row.references) > 1 for of_split in rows.values() for row in of_split)
    for split, of_split in rows.items():
        sources = dict.fromkeys(source for row in of_split for source in (row.target, *row.references))
        for source in tqdm(sources, desc=f"writing {split}", unit="picture", disable=None):
            place = folder / split / source.file_name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.path.resolve(), place)  # resolved, for a link to a link would be no picture
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(source.path, place)
        lines = "".join(json.dumps(_manifest_row(row, several), ensure_ascii=False) + "\n" for row in of_split)
        (folder / split / MANIFEST_NAME).write_text(lines, encoding="utf-8")


def _manifest_row(row: Row, several: bool) -> dict[str, Any]:
    """The row as `ztrain.data.read_triplets` takes it."""
    names = [reference.file_name for reference in row.references]
    return {
        **({"reference_file_names": names} if several else {"reference_file_name": names[0]}),
        "target_file_name": row.target.file_name,
        "prompt": row.prompt,
        **row.columns,
    }
