"""One HTML page to look at a data set with: its triplets, histograms, and what was refused and why.

    python -m data_tools.inspect --data out/emoji --out out/emoji.html

In: a folder of triplets in any layout of docs/data.md, and the manifest and the list of refused files that
data_tools.pack lays beside them, where there are some. Rows may carry `style`, `way` (how the pair was made) and
`copy_score` (0..1); none is computed here. Out: a page that opens from disk and asks the network for nothing. The same
data give the same bytes.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.charts import STYLES, aspect_chart, number_chart, score_chart, style_bars
from data_tools.likeness import COPY_SCORE
from data_tools.step import read_words
from data_tools.survey import (
    SUREST_SHARE,
    DataSet,
    Row,
    choose,
    look_for_copies,
    measure_targets,
    read_data_set,
    text_of,
)
from ztrain.errors import InputError
from ztrain.images import Picture
from ztrain.pages import Thumbnails, check_out, render, write_page
from ztrain.terminal import program

MAKER = "ztrain.data_tools.inspect"
"""Whose pages are replaced."""
_TEMPLATE = Path(__file__).with_name("inspect.html.jinja")
_LONG = 2000  # characters of a further column that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Make a page that shows a data set."""

    data: Path
    """Folder of triplets: metadata.jsonl, tars or Parquet files."""
    out: Path
    """Page to write. An earlier page is replaced, any other file is refused."""
    max_triplets: int = 500
    """Triplets with pictures, spread evenly over splits and styles. Histograms count all rows. One with two photographs
    weighs 20 KiB, one with two flat drawings 4."""
    text_only: bool = False
    """Show targets and prompts without references, as data.text_only_data_dir has them."""
    allow_reference_is_target: bool = False
    """Do not count triplets whose target is among their references, as for data.allow_reference_is_target."""
    max_refused: int = 5000
    """Refused files in the table; 0 shows their counts only."""
    thumbnail_side: int = 256
    """Longest side of a picture on the page, in pixels, 32 to 1024: 96 suits a page of 10,000 triplets."""


def _add(thumbnails: Thumbnails, data: DataSet, picture: Picture) -> int:
    """Its place on the page. One that cannot be read is counted with what is lost, once."""

    def lose(error: InputError) -> str:
        if data.shorten(picture.name) not in {fault.name for fault in data.unusable}:
            data.lose(picture.name, error)
        return data.shorten(str(error))

    return thumbnails.add(picture, lose)


def _card(row: Row, thumbnails: Thumbnails, data: DataSet) -> dict[str, Any]:
    """A row as the page's script reads it."""
    triplet, shorten = row.triplet, data.shorten
    shown = {"style", "way", "copy_score"}
    columns = [(name, text_of(value)) for name, value in triplet.columns.items() if name not in shown]
    cut = [(name, text if len(text) <= _LONG else f"{text[:_LONG]}… ({len(text):,} characters)")
           for name, text in columns if text is not None]  # fmt: skip
    return {
        "place": shorten(triplet.where),
        "prompt": triplet.prompt,
        "split": row.split,
        "style": row.style,
        "way": row.way,
        "score": row.score,
        "references": [_add(thumbnails, data, picture) for picture in triplet.references],
        "target": _add(thumbnails, data, triplet.target),
        "names": [shorten(picture.name) for picture in (*triplet.references, triplet.target)],
        "columns": cut,
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def make_page(command: Command) -> tuple[bytes, dict[str, int]]:
    """The page, and counts for people. Raises InputError."""
    data = read_data_set(command.data, text_only=command.text_only)
    splits = sorted({row.split for row in data.rows})
    sizes = measure_targets(data)
    if not command.allow_reference_is_target:
        look_for_copies(data)
    thumbnails = Thumbnails(command.thumbnail_side)
    chosen = choose(data.rows, command.max_triplets)
    cards = [_card(data.rows[i], thumbnails, data) for i in tqdm(chosen, desc="drawing", unit="triplet", disable=None)]
    lost = [*data.unusable, *data.refused]
    scores = [row.score for row in data.rows if row.score is not None]
    charts = [
        score_chart(scores, len(data.rows)),
        number_chart("size", "Target size", "short side, pixels", [min(size) for size in sizes]),
        aspect_chart(sizes),
        number_chart("prompt", "Prompt length", "characters", [len(row.triplet.prompt) for row in data.rows]),
    ]
    bars = style_bars(data.rows, splits)
    charted = [style for style, _ in bars[:STYLES]]
    listed_files = lost[: command.max_refused]
    payload = {
        "rows": cards,
        "pictures": thumbnails.made,
        "refused": [list(file.model_dump().values()) for file in listed_files],
        "copy": COPY_SCORE,
        "charted": charted,
    }
    licences = sorted(path.name for path in data.folder.glob("LICEN[CS]E*") if path.is_file())
    facts = {
        "name": data.folder.name,
        "manifest": data.manifest,
        "licences": licences if data.manifest is None or data.manifest.licences is None else data.manifest.licences,
        "warnings": _warnings(data, splits),
        "splits": [(split, sum(row.split == split for row in data.rows)) for split in splits],
        "styles": bars,
        "charted": charted,
        "num_styles": len({row.style for row in data.rows} - {None}),
        "ways": Counter(row.way for row in data.rows if row.way is not None).most_common(),
        "total": len(data.rows),
        "shown": len(cards),
        "surest": min(len(scores), int(command.max_triplets * SUREST_SHARE)) if len(cards) < len(data.rows) else 0,
        "charts": [asdict(chart) for chart in charts],
        "copy_score": COPY_SCORE,
        "stages": Counter(file.stage for file in lost).most_common(),
        "num_refused": len(lost),
        "refused_left_out": len(lost) - len(listed_files),
    }
    counts = {"rows": len(data.rows), "shown": len(cards), "refused": len(data.refused), "lost": len(data.unusable)}
    return render(_TEMPLATE, facts, payload), counts


def _warnings(data: DataSet, splits: Sequence[str]) -> list[str]:
    """What does not fit together, in sentences."""
    found = Counter(row.split for row in data.rows)
    told = data.manifest.triplets if data.manifest else {}
    wrong = [
        f"manifest.json counts {told.get(split, 0):,} triplets in {split}, but {found[split]:,} can be read."
        for split in sorted({*splits, *told})
        if told and told.get(split, 0) != found[split]
    ]
    if data.unusable:
        wrong.append(f"{len(data.unusable):,} rows or pictures cannot be read or used; the table below says why.")
    return wrong


@program
def main(arguments: Sequence[str] | None) -> str:
    """Exit status: 0 written, 2 something the user can mend."""
    options = read_words(Command, arguments, "inspect")
    if options.max_triplets < 1 or options.max_refused < 0 or not 32 <= options.thumbnail_side <= 1024:
        raise InputError("max_triplets must be at least 1, max_refused at least 0, thumbnail_side 32 to 1024")
    check_out(options.out, MAKER)
    page, counts = make_page(options)
    write_page(page, options.out)
    if counts["lost"]:
        print(f"note: {counts['lost']} rows or pictures cannot be read or used; the page says why", file=sys.stderr)
    return f"{options.out}: {counts['shown']} of {counts['rows']} triplets, {len(page) / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
