"""Which curves a report has: of a run's metrics, of a sweep's axes, of checkpoints; drawn by charts.

In: a `Run` or a `Comparison`. Out: charts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ztrain.compare.record import Comparison, Metric
from ztrain.compare.report.charts import Chart, Series, line_chart, smooth, thin_out
from ztrain.compare.report.runs import Run
from ztrain.compare.report.words import ordered_metrics, written
from ztrain.model.flow import SIGMA_BINS

_PHASES = 5  # of a run, whose losses by sigma are laid over each other
_SIGMA = "train/loss_sigma/"
_VARIANTS = (("val/loss", "own reference"), ("val/loss_shuffled", "another's"), ("val/loss_no_reference", "none"))
_STEP = "optimizer step"


@dataclass(frozen=True, slots=True)
class RunCharts:
    """All that is drawn of metrics.jsonl."""

    gap: list[Chart]
    curves: list[Chart]
    sigma: list[Chart]
    rest: list[str]
    """Names of the metrics that are not drawn."""


def run_charts(run: Run) -> RunCharts:
    drawn = set()
    gap, curves, sigma = [], [], []

    def known(name: str) -> bool:
        drawn.add(name)
        return len(run.series(name)[0]) > 0

    if known("train/loss"):
        curves.append(_smoothed(run, "train/loss", "Training loss"))
    if all([known(name) for name, _ in _VARIANTS]):
        series = [_series(run, name, words, f"c{i}") for i, (name, words) in enumerate(_VARIANTS)]
        note = "On held-out triplets, fixed noise. The lower with the own reference, the more the image is used."
        gap.append(line_chart("Validation loss by reference", series, x_title=_STEP, note=note))
    if known("val/image_use"):
        gap.append(_image_use(run))
    drawn |= {"val/image_use_low", "val/image_use_high", "val/other_style"}
    if any([known(f"{_SIGMA}{place}") for place in range(SIGMA_BINS)]):
        sigma.append(_loss_by_sigma(run))
    if fixed := sorted({name for name in run.names() if name.startswith("val/loss_sigma_")}):
        series = [
            _series(run, name, f"σ {name.rpartition('_')[2]}", f"q{_tone(i, fixed)}") for i, name in enumerate(fixed)
        ]
        sigma.append(line_chart("Validation loss at fixed σ", series, x_title=_STEP, note="With the own reference."))
    drawn |= {name for name in run.names() if name.startswith("val/loss_") and "_sigma_" in name}
    curves += _scores(run, drawn)
    plain = [
        ("train/lr", "Learning rate"),
        ("train/grad_norm", "Gradient norm"),
        ("perf/samples_per_second", "Samples a second"),
    ]
    for name, title in plain:
        if known(name):
            curves.append(_one(run, name, title) if name == "train/lr" else _smoothed(run, name, title))
    return RunCharts(gap, curves, sigma, sorted(set(run.names()) - drawn))


def _tone(place: int, of: Sequence[object]) -> int:
    """Of five tones in sequence."""
    return 4 if len(of) < 2 else round(4 * place / (len(of) - 1))


def _series(run: Run, name: str, words: str, tone: str) -> Series:
    x, y = thin_out(*run.series(name))
    return Series(name=words, x=x, y=y, tone=tone)


def _one(run: Run, name: str, title: str) -> Chart:
    return line_chart(
        title, [_series(run, name, title, "c0")], x_title=_STEP, note=f"last {run.series(name)[1][-1]:.4g}"
    )


def _smoothed(run: Run, name: str, title: str) -> Chart:
    """The raw values, thin, and their moving average."""
    x, y = run.series(name)
    window = max(len(y) // 40, 1)
    average = smooth(y, window)
    raw = thin_out(x, y)
    every = max(len(x) // 300, 1)
    places = sorted({*range(0, len(x), every), len(x) - 1})
    series = [
        Series(name="each step", x=raw[0], y=raw[1], tone="c0", shape="thin"),
        Series(name=f"average, half life {window} steps", x=[x[i] for i in places], y=[average[i] for i in places]),
    ]
    return line_chart(title, series, x_title=_STEP, note=f"last average {average[-1]:.4g}")


def _image_use(run: Run) -> Chart:
    """What another's reference costs, with its interval where each validation has one."""
    x, y = run.series("val/image_use")
    limits = [run.series(f"val/image_use_{end}") for end in ("low", "high")]
    whole = all(steps == x for steps, _ in limits)
    series = Series(
        name="image use", x=x, y=y, low=limits[0][1] if whole else None, high=limits[1][1] if whole else None
    )
    shares = run.series("val/other_style")[1]
    whose = "a reference of another style" if shares and min(shares) == 1.0 else "another's reference"
    note = f"Loss with {whose} minus loss with the own; 95 % interval over samples. Above 0: the image is used."
    if shares and max(shares) == 0.0:
        note += " The data names no two styles: the other reference may be of the same one, which makes this small."
    return line_chart("Image use", [series], x_title=_STEP, note=note, zero=True)


def _loss_by_sigma(run: Run) -> Chart:
    """Mean loss in each tenth of sigma, over equal parts of the run."""
    trained = [row for row in run.rows if "train/loss" in row]
    size = max(math.ceil(len(trained) / _PHASES), 1)
    parts = [trained[start : start + size] for start in range(0, len(trained), size)]
    series = []
    for place, part in enumerate(parts):
        x, y = [], []
        for tenth in range(SIGMA_BINS):
            values = [row[f"{_SIGMA}{tenth}"] for row in part if f"{_SIGMA}{tenth}" in row]
            if values:
                x.append((tenth + 0.5) / SIGMA_BINS)
                y.append(math.fsum(values) / len(values))
        if not x:
            continue
        words = f"steps {part[0]['step']:,} to {part[-1]['step']:,}"
        series.append(Series(name=words, x=x, y=y, tone=f"q{_tone(place, parts)}"))
    note = "Mean over the steps of each part of the run; σ 0 is the clean picture, 1 pure noise."
    return line_chart("Training loss by σ", series, x_title="σ", note=note)


def _scores(run: Run, drawn: set[str]) -> list[Chart]:
    """Of `score/*`: one chart each, with a band where `_low` and `_high` are beside it."""
    names = [name for name in run.names() if name.startswith("score/")]
    drawn |= set(names)
    charts = []
    for name in names:
        if name.endswith(("_low", "_high")):
            continue
        x, y = run.series(name)
        low, high = (run.series(f"{name}_{end}") for end in ("low", "high"))
        whole = low[0] == x == high[0]
        series = Series(name=name, x=x, y=y, low=low[1] if whole else None, high=high[1] if whole else None)
        title = f"Score: {name.removeprefix('score/').replace('_', ' ')}"
        charts.append(line_chart(title, [series], x_title=_STEP, note="95 % interval." if whole else ""))
    return charts


# --- of a comparison --------------------------------------------------------------------------------------------------


def axis_charts(found: Comparison) -> list[Chart]:
    """For each axis of a sweep, style and adherence along it where all other settings are those of the best."""
    centre = found.best.column if found.best.column is not None else found.baseline
    if not found.axes or centre is None:
        return []
    chosen, charts = found.columns[centre].settings, []
    metrics = [found.metric(name) for name in (found.style, found.adherence) if name is not None]
    for axis, values in found.axes.items():
        if len(values) < 2 or axis not in chosen:
            continue
        others = {key: value for key, value in chosen.items() if key != axis}
        cells = [
            next((i for i, c in enumerate(found.columns) if c.settings == {**others, axis: value}), None)
            for value in values
        ]
        for tone, metric in zip(("c0", "c2"), metrics, strict=False):
            chart = _along(metric, cells, [written(value) for value in values], axis, tone)
            charts += [chart] if chart else []
    return charts


def _along(metric: Metric, cells: Sequence[int | None], names: list[str], axis: str, tone: str) -> Chart | None:
    known = [(float(x), mean) for x, i in enumerate(cells) if i is not None and (mean := metric.means[i]) is not None]
    if len(known) < 2:
        return None
    series = Series(
        name=metric.title,
        x=[x for x, _ in known],
        y=[mean.mean for _, mean in known],
        low=[mean.mean if mean.low is None else mean.low for _, mean in known],
        high=[mean.mean if mean.high is None else mean.high for _, mean in known],
        tone=tone,
    )
    return line_chart(metric.title, [series], x_title=axis, names=names)


def step_charts(found: Comparison) -> list[Chart]:
    """Of checkpoints: every metric by step, the baseline dashed."""
    places = sorted(
        (i for i, c in enumerate(found.columns) if c.step is not None and c.role != "control"),
        key=lambda i: found.columns[i].step or 0,
    )
    if len({found.columns[i].step for i in places}) < 2 or not all(
        found.columns[i].role == "checkpoint" for i in places
    ):
        return []
    charts = []
    for metric in ordered_metrics(found):
        known = [(i, mean) for i in places if (mean := metric.means[i]) is not None]
        if len(known) < 2:
            continue
        steps = [float(found.columns[i].step or 0) for i, _ in known]
        series = [
            Series(
                name="checkpoints",
                x=steps,
                y=[mean.mean for _, mean in known],
                low=[mean.mean if mean.low is None else mean.low for _, mean in known],
                high=[mean.mean if mean.high is None else mean.high for _, mean in known],
            )
        ]
        base = None if found.baseline is None or found.baseline in places else metric.means[found.baseline]
        if base is not None and found.baseline is not None:
            name = found.columns[found.baseline].label
            ends = [steps[0], steps[-1]]
            series.append(Series(name=name, x=ends, y=[base.mean] * 2, tone="splice", shape="dashed"))
        charts.append(line_chart(metric.title, series, x_title=_STEP))
    return charts
