"""One HTML page about a comparison or a run, to look at and to decide by; with `blind`, a page that asks people.

In: the folder or file of a comparison (compare/record.py), the folder of a run (train/run.py), or one that is both.
Out: a page that opens from disk and asks the network for nothing; equal input gives equal bytes. Nothing is
measured here: means, intervals and verdicts are those of the record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ztrain.cache.order import spread
from ztrain.compare.record import FILE_NAME, Comparison, Metric, read_comparison
from ztrain.compare.report.caveats import caveats_of
from ztrain.compare.report.charts import Chart, Dot, bar_chart, front_of, scatter
from ztrain.compare.report.curves import axis_charts, run_charts, step_charts
from ztrain.compare.report.runs import Run, as_comparison, is_run, read_run
from ztrain.compare.report.words import (
    answers_of,
    digits_of,
    interval,
    model_name,
    number,
    ordered_metrics,
    split_answers,
    table_of,
    tags_of,
    written,
)
from ztrain.errors import InputError
from ztrain.images import PictureFile
from ztrain.pages import Thumbnails, check_out, render, write_page

MAKER = "ztrain.report"
"""Whose pages are replaced."""
MAX_PICTURES = 1024
"""On a page, unless `max_rows` asks for more."""
_FLAT = 128  # pixels: pictures this small are the miniature's, and keep every pixel
_LABELLED = 12  # columns that all have a label in the front; of more only those that are talked about
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class _Place:
    """What was found: a comparison, a run, or both in one folder."""

    folder: Path
    found: Comparison
    run: Run | None
    warnings: list[str]


def make_report(
    place: Path,
    out: Path | None = None,
    *,
    blind: bool = False,
    max_rows: int | None = None,
    thumbnail_side: int = 256,
) -> Path:
    """Writes the page and gives its path. `place`: folder or file of a comparison, or folder of a run.

    `out`: None for report.html (or blind.html) in that folder; a page of ours is replaced, any other file refused.
    `max_rows`: rows with pictures, spread evenly; None for as many as `MAX_PICTURES` allows. `thumbnail_side`: longest
    side of a picture on the page, 32 to 1024 pixels. Raises InputError.
    """
    if (max_rows is not None and max_rows < 1) or not 32 <= thumbnail_side <= 1024:
        raise InputError("max_rows must be at least 1, and thumbnail_side 32 to 1024")
    read = _read(place)
    target = out or read.folder / ("blind.html" if blind else "report.html")
    check_out(target, MAKER)
    rows = _chosen_rows(read.found, max_rows)
    if blind and len(read.found.columns) < 2:
        raise InputError(f"{place}: a blind vote needs two columns of pictures; there are {len(read.found.columns)}")
    if blind and not rows:
        raise InputError(f"{place}: a blind vote needs pictures, and there are none")
    pictures = Thumbnails(thumbnail_side, lossless_up_to=_FLAT)
    payload = _payload(read, rows, pictures)
    if blind:
        facts: dict[str, Any] = {"title": read.found.title, "maker": MAKER, "total": len(rows)}
        page = render(_FOLDER / "blind.html.jinja", facts, payload)
    else:
        page = render(_FOLDER / "report.html.jinja", _facts(read, rows), payload)
    write_page(page, target)
    return target


def _read(place: Path) -> _Place:
    folder = place if place.is_dir() else place.parent
    run = read_run(folder) if place.is_dir() and is_run(folder) else None
    if not place.is_dir() or (folder / FILE_NAME).is_file():
        return _Place(folder, read_comparison(place), run, [] if run is None else run.warnings)
    if run is None:
        raise InputError(
            f"{place}: holds neither {FILE_NAME} of a comparison nor metrics.jsonl of a run; give one of those"
        )
    per_step = max(len(run.prompts), 1)
    kept = spread(run.steps, max(MAX_PICTURES // per_step - 4, 2))
    warnings = list(run.warnings)
    if len(kept) < len(run.steps):
        warnings.append(f"Previews of {len(kept)} of {len(run.steps)} steps are shown, spread evenly.")
    return _Place(folder, as_comparison(run, kept), run, warnings)


def _chosen_rows(found: Comparison, max_rows: int | None) -> list[int]:
    seeds = max((len(row.seeds) for row in found.rows), default=1)
    most_given = max((len(row.references) for row in found.rows), default=0) + 1
    fitting = max(MAX_PICTURES // (len(found.columns) * seeds + most_given), 1)
    return spread(range(len(found.rows)), fitting if max_rows is None else max_rows)


# --- for the page's script --------------------------------------------------------------------------------------------


def _payload(read: _Place, rows: Sequence[int], pictures: Thumbnails) -> dict[str, Any]:
    found = read.found

    def add(name: str) -> int:
        return pictures.add(PictureFile(read.folder / name))

    given = [
        {
            "prompt": found.rows[i].prompt,
            "style": found.rows[i].style,
            "where": found.rows[i].where,
            "seeds": found.rows[i].seeds,
            "references": [add(name) for name in found.rows[i].references],
            "target": None if (target := found.rows[i].target) is None else add(target),
            "number": i,
        }
        for i in rows
    ]
    drawn = [[[add(name) for name in of_column[i]] for i in rows] for of_column in found.pictures]
    columns = [
        column.model_dump(include={"name", "label", "role", "settings", "step"}) | {"tags": tags_of(found, place)}
        for place, column in enumerate(found.columns)
    ]
    metrics = ordered_metrics(found)
    names = [metric.name for metric in metrics]
    return {
        "pictures": pictures.made,
        "columns": columns,
        "rows": given,
        "drawn": drawn,
        "metrics": [_metric(metric, rows) for metric in metrics],
        "axes": found.axes,
        "baseline": found.baseline,
        "best": found.best.column,
        "style": None if found.style is None else names.index(found.style),
        "adherence": None if found.adherence is None else names.index(found.adherence),
        "title": found.title,
        "fingerprint": sha256(found.model_dump_json().encode()).hexdigest()[:16],
        "version": found.ztrain_version,
    }


def _metric(metric: Metric, rows: Sequence[int]) -> dict[str, Any]:
    values = metric.values
    return {
        "title": metric.title,
        "direction": metric.direction,
        "digits": digits_of(metric),
        "values": None if values is None else [[of_column[i] for i in rows] for of_column in values],
        "means": [None if mean is None else [mean.mean, mean.low, mean.high] for mean in metric.means],
    }


# --- for the template -------------------------------------------------------------------------------------------------


def _facts(read: _Place, rows: Sequence[int]) -> dict[str, Any]:
    found = read.found
    heads, lines = table_of(found)
    shown, more, tally = split_answers(found, answers := answers_of(found))
    judges = {model_name(metric.model) for metric in found.metrics if metric.model is not None}
    return {
        "maker": MAKER,
        "found": found,
        "is_scored": bool(found.metrics),
        "what": _what(read),
        "answers": shown,
        "more_answers": more,
        "tally": tally,
        "caveats": caveats_of(found, {answer.column for answer in answers}),
        "heads": heads,
        "lines": lines,
        "judges": sorted(judges),
        "front": _front(found),
        "gaps": _gaps(found),
        "run": read.run,
        "run_charts": run_charts(read.run) if read.run else None,
        "axis_charts": axis_charts(found),
        "step_charts": step_charts(found),
        "has_steps": sum(column.role == "checkpoint" for column in found.columns) > 1 and bool(rows),
        "axes": [name for name, values in found.axes.items() if len(values) > 1],
        "warnings": read.warnings,
        "shown_rows": len(rows),
        "conditions": _card(found.conditions),
        "data": _card(found.data),
    }


def _card(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), written(value)) for key, value in values.items()]


def _what(read: _Place) -> str:
    """The line above the title."""
    found = read.found
    if not found.metrics and read.run is not None:
        last = f"{read.run.rows[-1]['step']:,} steps" if read.run.rows else "no step yet"
        return f"Training run · {last} · {len(found.rows)} previewed rows"
    seeds = max((len(row.seeds) for row in found.rows), default=0)
    kind = "Sweep" if found.axes else "Checkpoints" if all(_of_step(found)) else "Comparison"
    parts = [kind, f"{len(found.columns)} columns", f"{len(found.rows)} rows", f"{seeds} seed{'s' * (seeds != 1)}"]
    return " · ".join([*parts, f"{found.seconds:,.0f} s"])


def _of_step(found: Comparison) -> list[bool]:
    judged = [column for column in found.columns if column.role in ("adapter", "checkpoint")]
    return [column.role == "checkpoint" for column in judged] or [False]


def _front(found: Comparison) -> dict[str, Any] | None:
    """The scatter of style against adherence in two widths, and who is on the front."""
    if found.style is None or found.adherence is None:
        return None
    style, prompt = found.metric(found.style), found.metric(found.adherence)
    known = [(i, x, y) for i in range(len(found.columns)) if (x := prompt.means[i]) and (y := style.means[i])]
    if len(known) < 2:
        return None
    talked_about = {found.best.column, found.best_splice.column, found.baseline}
    points = []
    for place, x, y in known:
        column = found.columns[place]
        tip = (
            f"{column.label}\n{style.title} {interval(y, digits_of(style))}\n"
            f"{prompt.title} {interval(x, digits_of(prompt))}"
        )
        labelled = len(known) <= _LABELLED or place in talked_about or column.role == "none"
        points.append(
            Dot(
                label=column.label, x=x.mean, y=y.mean, across=x.limits, down=y.limits, tone=column.role,
                hollow=column.role == "control", ringed=place == found.best.column, tip=tip, labelled=labelled,
            )
        )  # fmt: skip
    # Labels are placed in this order: those that are talked about have the first choice.
    order = sorted(range(len(known)), key=lambda i: known[i][0] not in talked_about)
    points = [points[i] for i in order]
    real = [point for point in points if not point.hollow]
    signs = (_sign(prompt), _sign(style))
    best = [real[i] for i in front_of([(point.x, point.y) for point in real], signs)]
    titles = {"x_title": f"{prompt.title} →", "y_title": f"{style.title} →"}
    charts = [scatter(points, [(p.x, p.y) for p in best], **titles, wide=wide) for wide in (True, False)]
    roles = list(dict.fromkeys(column.role for column in found.columns))
    return {"wide": charts[0], "narrow": charts[1], "names": [point.label for point in best], "roles": roles}


def _sign(metric: Metric) -> float:
    return -1.0 if metric.direction == "lower" else 1.0


def _gaps(found: Comparison) -> list[Chart]:
    """For each column with a control: style with its own references, another row's, none."""
    if found.style is None:
        return []
    style = found.metric(found.style)
    digits = digits_of(style)
    plain = next((i for i, column in enumerate(found.columns) if column.role == "none"), None)
    parents = list(dict.fromkeys(column.of for column in found.columns if column.of is not None))
    groups = []
    for parent in parents:
        ways: list[tuple[str, int | None, str]] = [("own reference", parent, found.columns[parent].role)]
        ways.append(("another row's reference", _control(found, parent, "shuffled"), "control"))
        without = _control(found, parent, "none")
        ways.append(("no reference", plain if without is None else without, "none"))
        bars = [
            (name, mean.mean, mean.limits, tone, number(mean.mean, digits))
            for name, place, tone in ways
            if place is not None and (mean := style.means[place]) is not None
        ]
        groups.append((found.columns[parent].label, bars))
    reach = [x for _, bars in groups for _, value, limits, _, _ in bars for x in (value, *(limits or ()))]
    return [bar_chart(label, bars, note=style.title, reach=reach) for label, bars in groups if bars]


def _control(found: Comparison, parent: int, sees: str) -> int | None:
    return next((i for i, c in enumerate(found.columns) if c.of == parent and c.sees == sees), None)
