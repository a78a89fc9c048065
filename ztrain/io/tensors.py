"""Safetensors files that others made: whole, or one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ztrain.errors import InputError
from ztrain.io.files import check_safetensors, readable


def check_whole(path: Path, advice: str = "") -> None:
    """Raises InputError for a file that is missing, cut off or no safetensors file.

    advice: what may be done beside fetching it again.
    """
    or_else = f", or {advice}" if advice else ""
    try:
        check_safetensors(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: is missing; fetch it again{or_else}") from error
    except InputError as error:
        # The Hub's cache holds links, and fetches nothing that it has under the name a link points to.
        first = f" after removing {path.resolve()}" if path.is_symlink() else ""
        raise InputError(f"{error}{first}{or_else}") from error


@contextmanager
def open_tensors(path: Path, advice: str = "") -> Iterator[Any]:
    """safetensors' own reader. Raises InputError as `check_whole`."""
    check_whole(path, advice)
    with readable(path) as place:
        try:
            opened = safe_open(place, framework="pt")
        except SafetensorError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: is no safetensors file that can be read ({reason}); fetch it again") from error
        with opened as file:
            yield file


def read_tensors(path: Path, advice: str = "") -> dict[str, Tensor]:
    """All of a file. Raises InputError as `check_whole`."""
    with open_tensors(path, advice) as file:
        return {name: file.get_tensor(name) for name in file.keys()}
