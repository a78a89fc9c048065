"""What a comparison says, in sentences and in a table: who is better than the free splice, at what, at what price.

In: a `Comparison`. Out: plain text and numbers between 0 and 100 for the template. Nothing is judged here: verdicts are
those of the record, and where an interval holds 0 the words are "undecided".
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ztrain.compare.record import Column, Comparison, Difference, Metric, Model
from ztrain.compare.report.caveats import splices_of, started, starts_at_reference
from ztrain.metrics.intervals import Interval

ARROWS = {"higher": "↑", "lower": "↓", "neither": "·"}
MARKS = {"better": "▲", "worse": "▼", "undecided": "≈", "none": "·"}
_JUDGED = ("adapter", "checkpoint", "setting")  # roles that an answer is given about
_SENTENCES = 6  # answers that a page begins with; beyond them the best is told and the others are counted
_DIGITS = 3  # behind the point, at most; two more where all means are below 0.1

Verdict = Literal["better", "worse", "undecided", "trade", "none"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said about one column."""

    column: int
    label: str
    verdict: Verdict
    """Of style, where adherence says the opposite: trade."""
    sentence: str
    """Goes on after the label."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A column's mean by one metric."""

    mean: str
    interval: str
    difference: str
    """Signed, to the baseline; empty without one."""
    verdict: str
    bar: tuple[float, float, float] | None
    """Low, mean and high in percent of what all columns reach together."""
    tip: str


@dataclass(frozen=True, slots=True)
class Head:
    """A metric as the table is headed."""

    title: str
    arrow: str
    direction: str
    model: str
    base: float | None
    """The baseline's mean in percent of the bars."""
    tip: str


@dataclass(frozen=True, slots=True)
class Line:
    """A column as a row of the table."""

    label: str
    role: str
    tags: list[str]
    tip: str
    cells: list[Cell | None]


# --- numbers ----------------------------------------------------------------------------------------------------------


def digits_of(metric: Metric) -> int:
    """Digits behind the point: two significant ones of the usual interval's half width, else of the means."""
    known = [mean for mean in metric.means if mean is not None]
    widths = [limits[1] - limits[0] for mean in known if (limits := mean.limits)]
    scale = statistics.median(widths) / 2 if widths else max((abs(mean.mean) for mean in known), default=1.0) / 10
    if scale <= 0:
        return _DIGITS
    most = _DIGITS if any(abs(mean.mean) >= 0.1 for mean in known) else _DIGITS + 2
    return min(max(1 - math.floor(math.log10(scale)), 0), most)


def number(value: float, digits: int, *, signed: bool = False) -> str:
    """For people: a true minus, no negative zero, thousands apart."""
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    if not any(figure in "123456789" for figure in text):
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def interval(found: Interval, digits: int, *, signed: bool = False) -> str:
    """`0.57 [0.53, 0.62]`, or the mean alone where there is no interval."""
    mean = number(found.mean, digits, signed=signed)
    limits = limits_of(found, digits, signed=signed)
    return f"{mean} {limits}" if limits else mean


def limits_of(found: Interval, digits: int, *, signed: bool = False) -> str:
    limits = [number(limit, digits, signed=signed) for limit in found.limits or ()]
    return f"[{limits[0]},\N{NO-BREAK SPACE}{limits[1]}]" if limits else ""


def written(value: object) -> str:
    """A value of a setting or a condition."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case int():
            return f"{value:,}" if abs(value) > 9999 else str(value)
    return str(value)


# --- answers ----------------------------------------------------------------------------------------------------------


def answers_of(found: Comparison) -> list[Answer]:
    """One for each adapter, checkpoint or setting, the best first; none where there is no baseline."""
    if found.baseline is None or found.style is None:
        return []
    judged = [place for place, column in enumerate(found.columns) if column.role in _JUDGED and place != found.baseline]
    judged.sort(key=lambda place: place != found.best.column)
    return [_answer(found, place) for place in judged]


def split_answers(found: Comparison, answers: Sequence[Answer]) -> tuple[list[Answer], list[Answer], str]:
    """Those that the page begins with, the others, and a sentence that counts the verdicts of all."""
    if len(answers) <= _SENTENCES:
        return list(answers), [], ""
    shown = 1 if answers[0].column == found.best.column else 0
    counts = Counter[str](answer.verdict for answer in answers)
    words = {
        "better": "better than the baseline at style and not worse at the prompt",
        "trade": "better at one of the two and worse at the other",
        "worse": "worse at style",
        "undecided": "undecided at style",
        "none": "not judged",
    }
    said = ", ".join(f"{counts[verdict]} {text}" for verdict, text in words.items() if counts[verdict])
    return list(answers[:shown]), list(answers[shown:]), f"Of {len(answers)} columns: {said}."


def _answer(found: Comparison, place: int) -> Answer:
    assert found.style is not None
    style = found.metric(found.style)
    adherence = None if found.adherence is None else found.metric(found.adherence)
    against, gain = baseline_name(found), style.differences[place]
    price = None if adherence is None else adherence.differences[place]
    said = _at(style, gain)
    match gain.verdict if gain else "none":
        case "better":
            first = f"is better than {against} at {said}"
        case "worse":
            first = f"is worse than {against} at {said}"
        case "undecided":
            first = f"may be better or worse than {against} at {said}: undecided, the interval holds 0"
        case _:
            first = f"cannot be told from {against} at {style.title}: there is no interval"
    column = found.columns[place]
    begun = started(" Its pictures", column) if starts_at_reference(column) else ""
    sentence = f"{first}; {_price(adherence, price, gain)}.{_others(found, place)}{_free_style(found, place)}{begun}"
    return Answer(place, column.label, _verdict(gain, price), sentence)


def baseline_name(found: Comparison) -> str:
    assert found.baseline is not None
    column = found.columns[found.baseline]
    return f"the free splice ({column.label})" if column.role in ("splice", "setting") else column.label


def _at(metric: Metric, difference: Difference | None) -> str:
    if difference is None:
        return metric.title
    return f"{metric.title}, {interval(difference, digits_of(metric), signed=True)}"


def _price(metric: Metric | None, difference: Difference | None, gain: Difference | None) -> str:
    if metric is None or difference is None or difference.verdict == "none":
        return "nothing here tells what that costs in obedience to the prompt"
    said = _at(metric, difference)
    match difference.verdict:
        case "better":
            return f"it also gains in {said}" if gain and gain.verdict == "better" else f"it gains in {said}"
        case "worse":
            return f"it pays in {said}"
    return f"no price in {metric.title} can be told, {interval(difference, digits_of(metric), signed=True)}"


def _others(found: Comparison, place: int) -> str:
    """What else is decided about the column."""
    told = {found.style, found.adherence}
    rest = [(metric, metric.differences[place]) for metric in found.metrics if metric.name not in told]
    parts = []
    for verdict in ("better", "worse"):
        decided = [
            _at(metric, difference) for metric, difference in rest if difference and difference.verdict == verdict
        ]
        if decided:
            parts.append(f" Also {verdict}: {'; '.join(decided)}.")
    return "".join(parts)


def _verdict(gain: Difference | None, price: Difference | None) -> Verdict:
    style = gain.verdict if gain else "none"
    prompt = price.verdict if price else "none"
    return "trade" if {style, prompt} == {"better", "worse"} else style


def _free_style(found: Comparison, place: int) -> str:
    """Means beside those of the splice with most style, where that is not the baseline: a rule that keeps the prompt
    may leave a baseline with little style, against which much is gained cheaply."""
    assert found.style is not None
    style = found.metric(found.style)
    splices = splices_of(found)
    known = {i: mean.mean for i in splices if (mean := style.means[i]) is not None}
    own = style.means[place]
    if len(splices) < 2 or not known or own is None:
        return ""
    most = max(known, key=known.__getitem__)
    if most == found.baseline:
        return ""
    digits = digits_of(style)
    mine, theirs = number(own.mean, digits), number(known[most], digits)
    told = f" The splice with most style, {found.columns[most].label}, has {style.title} {theirs}, this has {mine}"
    if found.adherence is None:
        return f"{told}."
    adherence = found.metric(found.adherence)
    obeys, free = adherence.means[place], adherence.means[most]
    if obeys is None or free is None:
        return f"{told}."
    digits = digits_of(adherence)
    return f"{told}; {adherence.title} {number(free.mean, digits)} and {number(obeys.mean, digits)}."


# --- the table --------------------------------------------------------------------------------------------------------


def ordered_metrics(found: Comparison) -> list[Metric]:
    """Style and adherence first."""
    first = {found.style: 0, found.adherence: 1}
    return sorted(found.metrics, key=lambda metric: first.get(metric.name, 2))


def table_of(found: Comparison) -> tuple[list[Head], list[Line]]:
    metrics = ordered_metrics(found)
    spans = [_span(metric) for metric in metrics]
    heads = [_head(found, metric, span) for metric, span in zip(metrics, spans, strict=True)]
    lines = []
    for place in _table_order(found):
        column = found.columns[place]
        cells = [_cell(found, metric, place, span) for metric, span in zip(metrics, spans, strict=True)]
        lines.append(Line(column.label, column.role, tags_of(found, place), column_note(column), cells))
    return heads, lines


def _table_order(found: Comparison) -> list[int]:
    """As in the file; of a sweep, what it is measured by comes first and then the settings by their mean of style."""
    places = list(range(len(found.columns)))
    if not found.axes or found.style is None:
        return places
    style = found.metric(found.style)
    sign = 1.0 if style.direction == "lower" else -1.0
    marked = {found.best.column, found.best_splice.column, found.baseline}

    def rank(place: int) -> tuple[bool, bool, float]:
        mean = style.means[place]
        is_setting = found.columns[place].role == "setting" and place not in marked
        return is_setting, mean is None, 0.0 if mean is None else sign * mean.mean

    return sorted(places, key=rank)


def tags_of(found: Comparison, place: int) -> list[str]:
    column = found.columns[place]
    marks = [("best", found.best.column), ("best splice", found.best_splice.column), ("baseline", found.baseline)]
    tags = [text for text, at in marks if at == place]
    if column.role == "control":
        tags.append(f"saw {_SEES[column.sees]}")
    return [*tags, "starts at the reference"] if starts_at_reference(column) else tags


_SEES = {"own": "its own references", "shuffled": "another row's references", "none": "no reference"}


def _span(metric: Metric) -> tuple[float, float]:
    known = [mean for mean in metric.means if mean is not None]
    values = [value for mean in known for value in (mean.mean, mean.low, mean.high) if value is not None]
    return (min(values), max(values)) if values else (0.0, 0.0)


def _percent(value: float, span: tuple[float, float]) -> float:
    low, high = span
    return 50.0 if high == low else round(100 * (value - low) / (high - low), 2)


def _head(found: Comparison, metric: Metric, span: tuple[float, float]) -> Head:
    words = {"higher": "higher is better", "lower": "lower is better", "neither": "neither direction is better"}
    base = None if found.baseline is None else metric.means[found.baseline]
    return Head(
        title=metric.title,
        arrow=ARROWS[metric.direction],
        direction=words[metric.direction],
        model=model_name(metric.model),
        base=None if base is None else _percent(base.mean, span),
        tip=definition_of(metric),
    )


def definition_of(metric: Metric) -> str:
    """What a metric means, for a tip: definition, range, direction, chance, judge."""
    low, high = ("unbounded" if limit is None else f"{limit:g}" for limit in (metric.low, metric.high))
    words = {"higher": "Higher is better", "lower": "Lower is better", "neither": "Neither direction is better"}
    lines = [metric.definition, f"{words[metric.direction]}; range {low} to {high}."]
    if metric.chance is not None:
        lines.append(f"By chance (another row's prompt or reference): {number(metric.chance, digits_of(metric))}.")
    if metric.model is not None:
        lines.append(f"Judge: {model_name(metric.model)}, weights {metric.model.weights}.")
    return "\n".join(lines)


def model_name(model: Model | None) -> str:
    if model is None:
        return "pixels alone"
    return model.name if model.revision is None else f"{model.name} @ {model.revision[:12]}"


def _cell(found: Comparison, metric: Metric, place: int, span: tuple[float, float]) -> Cell | None:
    mean, difference = metric.means[place], metric.differences[place]
    if mean is None:
        return None
    digits = digits_of(metric)
    bar = None
    if limits := mean.limits:
        bar = (_percent(limits[0], span), _percent(mean.mean, span), _percent(limits[1], span))
    # A score of a whole column counts no rows.
    over = "" if metric.values is None else f", over {_rows(mean.count)}"
    tip = [f"{found.columns[place].label}, {metric.title}: {interval(mean, digits)}{over}"]
    if difference is not None:
        assert found.baseline is not None
        compared = found.columns[found.baseline].label
        tip.append(f"Minus {compared}: {interval(difference, digits, signed=True)}, over {_rows(difference.count)}")
        tip.append({"none": "No verdict: no direction or no interval"}.get(difference.verdict, difference.verdict))
    return Cell(
        mean=number(mean.mean, digits),
        interval=limits_of(mean, digits),
        difference="" if difference is None else number(difference.mean, digits, signed=True),
        verdict="" if difference is None else difference.verdict,
        bar=bar,
        tip="\n".join(tip),
    )


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def column_note(column: Column) -> str:
    """What is known about a column besides its scores, for a tip."""
    parts = [column.name, f"{column.num_weights:,} trained weights" if column.num_weights else "nothing trained"]
    if column.step is not None:
        parts.append(f"step {column.step:,}")
    parts += [f"{key} {written(value)}" for key, value in column.settings.items()]
    return "\n".join(parts)
