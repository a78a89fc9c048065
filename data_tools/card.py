"""The data card that travels with a data set: what is in it, how it was made, what its splits share, whose it is.

In: a manifest. Out: README.md, with the header by which the Hub and `datasets` find the splits.
"""

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ztrain.io.yamls import dump_yaml
from ztrain.terminal import printable

_FILES = {"imagefolder": "{split}/**", "webdataset": "{split}-[0-9]*.tar", "parquet": "data/{split}-[0-9]*.parquet"}
_NAMED = 20  # pictures and folders that were passed by
_NOTES = {
    "webdataset": "`datasets` reads tars whose samples all have the same kinds of files, webdataset and ztrain any.\n"
}


def card(manifest: Mapping[str, Any]) -> str:
    """Markdown of a manifest of data_tools.pack."""
    paths = _FILES[manifest["format"]]
    files = [{"split": split, "path": paths.format(split=split)} for split in manifest["triplets"]]
    header = {
        "license": "other",
        "task_categories": ["text-to-image", "image-to-image"],
        "tags": ["reference-image", "triplets"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    parts = [
        f"---\n{dump_yaml(header)}---\n",
        "# Triplets: (references, prompt, target)\n",
        "Each row asks for the target by its prompt, in the look of its references. Made by ztrain's data_tools;"
        f" fingerprint `{manifest['fingerprint']}`. `sha256sum -c SHA256SUMS` checks the files.\n",
        _NOTES.get(manifest["format"], ""),
        _table(("split", "triplets"), manifest["triplets"].items()),
        _styles(manifest["styles"]),
        _shared(manifest["shared"]),
        "## What was counted\n\n" + _table(("", ""), _words(manifest["counts"])) if manifest["counts"] else "",
        _passed_by(manifest["ignored"], manifest["passed_by"]),
        "Every picture and row that was left out is in `left_out.jsonl`, with its reason, and every picture and folder"
        " that was passed by.\n",
        "## Licences\n\n" + _licences(manifest["licences"]),
        "## Made from\n\n" + _fenced(dump_yaml(manifest["config"])) if manifest["config"] else "",
    ]
    return "\n".join(part for part in parts if part)


def _fenced(text: str) -> str:
    """A block of code that no text in it ends."""
    fence = "`" * max([3, *(len(found) + 1 for found in re.findall("`+", text))])
    return f"{fence}yaml\n{printable(text)}{fence}\n"


def _table(head: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    # As text, whatever a style is called: neither HTML nor Markdown, nor what a terminal would obey.
    plain = " ".join(html.escape(printable(str(value)), quote=False).split())
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", plain)


def _words(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(name.replace("_", " "), count) for name, count in counts.items()]


def _styles(styles: Mapping[str, Mapping[str, int]]) -> str:
    if not styles:
        return ""
    splits = list(dict.fromkeys(split for counts in styles.values() for split in counts))
    rows = [(style, *(counts.get(split, 0) for split in splits)) for style, counts in styles.items()]
    return _table(("style", *splits), rows)


def _shared(shared: Mapping[str, Mapping[str, int]]) -> str:
    if not shared:
        return ""
    kinds = list(next(iter(shared.values())))
    rows = [(f"{names} share", *(counts[kind] for kind in kinds)) for names, counts in shared.items()]
    return "## What splits share\n\nTargets and references together; 0 is disjoint.\n\n" + _table(("", *kinds), rows)


def _passed_by(kinds: Mapping[str, int], names: Mapping[str, str]) -> str:
    if not kinds:
        return ""
    told = "## What was passed by\n\nFiles and folders of the sources that are no input.\n\n"
    told += _table(("", ""), kinds.items())
    named = list(names.items())[:_NAMED]
    return told + ("\n" + _table(("pictures and folders among them", "why"), named) if named else "")


def _licences(names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return "No licence file lay beside the pictures: find out whose they are before you pass them on.\n"
    told = ", ".join(f"[{name}]({name})" for name in names)
    return f"As stated in {told}, of the sources that came with one.\n"
