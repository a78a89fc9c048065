"""What names say: kinds, captions that lie beside pictures, and the same in letters that any table holds.

In: names of files, or of members of tars, and errors about them. Out: texts without folders of this machine.
"""

import os
from collections.abc import Iterable
from pathlib import Path

SIDECAR = ".txt"
"""Kind of a caption beside a picture."""


def kind_of(name: str) -> str:
    """Extension in small letters; empty where there is none."""
    return os.path.splitext(name)[1].lower()


def stem_of(name: str) -> str:
    """All but the extension, folders too."""
    return os.path.splitext(name)[0]


def texts_by_stem(names: Iterable[str]) -> dict[str, str]:
    """Stem -> name of a sidecar, in any case of its extension; of several the one in small letters, if there is."""
    return {stem_of(name): name for name in sorted(names) if kind_of(name) == SIDECAR}


def kind_said(name: str) -> str:
    """What counts of ignored files call a name's kind."""
    return printable(kind_of(name)) or "no extension"


def printable(name: str) -> str:
    """The name; with escapes where it is not UTF-8 or holds a NUL, so that no two of those come to be one."""
    if "\0" not in name and not any("\ud800" <= letter <= "\udfff" for letter in name):
        return name
    escaped = name.replace("\\", r"\\").replace("\0", r"\x00")
    return escaped.encode(errors="surrogateescape").decode(errors="backslashreplace")


def reason_of(error: Exception, path: Path) -> str:
    """What went wrong with a file, in one line without its folder."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (said.splitlines() or [type(error).__name__])[0].replace(str(path), path.name)
