"""What names say: kinds, texts that lie beside pictures, and the same in letters that any table holds.

In: names of files, or of members of tars, and errors about them. Out: texts without folders of this machine.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ztrain.io.forms import matched, one_form

SIDECARS = (".txt", ".caption", ".json")
"""Kinds of a caption beside a picture, in the order in which they count."""
CAPTION_TABLES = ("metadata.jsonl", "metadata.csv")
"""Tables of captions of a folder, in the same order."""
CAPTION_COLUMNS = ("caption", "text", "prompt")
"""What a table, a Parquet file or a .json may call a caption: the first that is there."""
_LONGEST_KIND = 12  # letters; what comes after the last dot of a name may be anything


def kind_of(name: str) -> str:
    """Extension in small letters; empty where there is none."""
    return os.path.splitext(name)[1].lower()


def stem_of(name: str) -> str:
    """All but the extension, folders too."""
    return os.path.splitext(name)[0]


def key_of(name: str) -> str:
    """Of the sample that WebDataset puts a member into: all before the first dot, folders too."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def texts_beside(pictures: Iterable[str], names: Iterable[str], *, keys: bool = False) -> dict[str, list[str]]:
    """Picture -> the texts beside it, in the order in which they count; extensions in any case.

    keys: where no text has a picture's stem, those of its WebDataset key are its own; JSON of a sample with several
    pictures is of none of them (in tars of data_tools.pack it is the target's prompt, and the reference shows another).
    """
    pictures = list(pictures)
    samples = Counter(map(key_of, pictures))
    stems = {stem_of(name) for name in pictures}
    beside: dict[str, list[str]] = {name: [] for name in pictures}
    every = sorted(name for name in names if kind_of(name) in SIDECARS)
    for kind in SIDECARS:
        # Sorted: of several that differ in the case of the extension the one in small letters counts.
        texts = {stem_of(name): name for name in every if kind_of(name) == kind}
        found = matched(stems, texts.keys()).found if texts else {}
        for name in pictures:
            if (stem := found.get(stem_of(name))) is not None:
                beside[name].append(texts[stem])
            elif keys and (key := key_of(name)) in texts and (kind != ".json" or samples[key] == 1):
                beside[name].append(texts[key])
    return {name: texts for name, texts in beside.items() if texts}


def style_of(source: str, name: str) -> str:
    """The folder that a picture lies in, in one Unicode form; the source where it lies in none. It may be its style."""
    folder = name.rpartition("/")[0]
    return one_form(folder or source)


def kind_said(name: str) -> str:
    """What counts of ignored files call a name's kind."""
    kind = in_letters(kind_of(name))
    return kind if 0 < len(kind) <= _LONGEST_KIND else "other extensions" if kind else "no extension"


_ESCAPE = re.compile(r"\\(\\|x[0-9a-f]{2})")


def in_letters(name: str) -> str:
    """The name in UTF-8, as `from_letters` takes it back: other bytes and NULs are escapes, as \\xff.

    A name that looks as if it had such escapes gets its backslashes doubled; all others stay as they are.
    """
    if not _ESCAPE.search(name) and "\0" not in name and not any("\ud800" <= letter <= "\udfff" for letter in name):
        return name
    escaped = name.replace("\\", r"\\").replace("\0", r"\x00")
    return escaped.encode(errors="surrogateescape").decode(errors="backslashreplace")


def from_letters(text: str) -> str:
    """The name that `in_letters` has written down."""
    if "\\" not in text:
        return text
    return _ESCAPE.sub(lambda found: "\\" if found[1] == "\\" else _byte(int(found[1][1:], 16)), text)


def _byte(value: int) -> str:
    return chr(value) if value < 0x80 else chr(0xDC00 + value)


def reason_of(error: Exception, path: Path) -> str:
    """What went wrong with a file, in one line without its folder."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    said = said.removeprefix(f"{path}: ").replace(str(path), path.name)
    return (said.splitlines() or [type(error).__name__])[0]
