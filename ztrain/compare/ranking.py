"""From scores to a verdict: means with intervals, differences to the baseline, and the best by a rule fixed before.

In: metrics as judging.py makes them, with values alone. Out: the same with means and differences, and the choices of a
comparison. Seeds of a row are averaged first; intervals then draw prompts and references, for rows that share one are
no independent draws. A column is called better or worse only where its interval of the paired difference excludes zero.

Legend: C columns, R rows, S seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ztrain.compare.judging import Verdicts
from ztrain.compare.record import Choice, Difference, Metric, Verdict
from ztrain.errors import InputError
from ztrain.metrics.intervals import Groups, Interval, interval

_RESAMPLES = 2000


def ranked(metric: Metric, baseline: int | None, clusters: Sequence[Groups]) -> Metric:
    """The metric with its means, and its differences to the baseline's column. `clusters`: prompts and references of
    the rows, each (R,)."""
    if metric.values is None:
        return metric.model_copy(update={"differences": [None] * len(metric.means)})
    rows = _rows(metric)
    own = None if baseline is None else rows[baseline]
    means = [_within(_mean(column, clusters), metric) for column in rows]
    differences = [
        None if own is None or place == baseline else _difference(column, own, metric, clusters)
        for place, column in enumerate(rows)
    ]
    return metric.model_copy(update={"means": means, "differences": differences})


def _rows(metric: Metric) -> Tensor:
    """Means over seeds, (C, R), NaN where no seed can tell."""
    assert metric.values is not None
    return torch.from_numpy(np.array(metric.values, dtype=np.float64)).nanmean(2)  # None is NaN


def _within(found: Interval | None, metric: Metric) -> Interval | None:
    """Without the parts of an interval that no value can have."""
    if found is None or found.low is None or found.high is None:
        return found
    low = found.low if metric.low is None else max(found.low, metric.low)
    high = found.high if metric.high is None else min(found.high, metric.high)
    return found.model_copy(update={"low": low, "high": high})


def _mean(values: Tensor, clusters: Sequence[Groups]) -> Interval | None:
    """Without an interval where there are too few rows for one; None where no row can tell."""
    told = values[~values.isnan()]
    if not len(told):
        return None
    try:
        return interval(values, clusters, drop_nan=True, resamples=_RESAMPLES)
    except InputError:
        return Interval(mean=float(told.mean()), count=len(told))


def _difference(ours: Tensor, theirs: Tensor, metric: Metric, clusters: Sequence[Groups]) -> Difference | None:
    found = _mean(ours - theirs, clusters)
    return None if found is None else Difference(**found.model_dump(), verdict=_verdict(found, metric))


def _verdict(found: Interval, metric: Metric) -> Verdict:
    if metric.direction == "neither" or found.low is None or found.high is None:
        return "none"
    if found.low <= 0 <= found.high:
        return "undecided"
    return "better" if (found.low > 0) == (metric.direction == "higher") else "worse"


@dataclass(frozen=True, slots=True)
class Standing:
    """What the rule looks at. styles: C, likeness to the reference; kept: C, the share of text alone's adherence above
    chance, or None where nothing judged it or prompts are not given; rule: a sentence without its end."""

    styles: list[float]
    kept: list[float] | None
    rule: str


def stand(verdicts: Verdicts, plain: int | None, keep: float, clusters: Sequence[Groups]) -> Standing | Choice:
    """What a rule can go by, or the choice of nothing with its reason."""
    likeness, obedience = verdicts.metric(verdicts.style), verdicts.metric(verdicts.adherence)
    if likeness is None:
        return Choice(column=None, rule="None.", found="Nothing judged the likeness to the reference: set judges.*")
    style, rule = _rows(likeness).nanmean(1).tolist(), f"The largest {likeness.title}"
    if obedience is None or plain is None:
        return Standing(style, None, rule)
    title, chance = obedience.title, obedience.chance
    if chance is None:
        return Standing(style, None, f"{rule} ({title} is not looked at: its chance cannot be told)")
    rows = _rows(obedience)
    of_text = _mean(rows[plain], clusters)
    # Where the interval holds chance, a share of the rest would be noise.
    if of_text is None or (of_text.mean if of_text.low is None else of_text.low) <= chance:
        return Standing(style, None, f"{rule} ({title} is not looked at: that of text alone is near chance)")
    adherence = rows.nanmean(1).tolist()
    room = adherence[plain] - chance
    rule += (
        f" of those that keep {keep:.0%} of what text alone has of {title} above chance, or what keeps most where none"
        " does"
    )
    return Standing(style, [(value - chance) / room for value in adherence], rule)


def choose(
    verdicts: Verdicts,
    candidates: Sequence[int],
    plain: int | None,
    keep: float,
    labels: Sequence[str],
    clusters: Sequence[Groups],
) -> Choice:
    """The candidate with the largest likeness among those that keep the prompt's adherence, or the one that keeps most
    of it where none keeps enough."""
    standing = stand(verdicts, plain, keep, clusters)
    return standing if isinstance(standing, Choice) else pick(standing, candidates, keep, labels)


def pick(standing: Standing, candidates: Sequence[int], keep: float, labels: Sequence[str]) -> Choice:
    rule, kept = f"{standing.rule}.", standing.kept
    if not candidates:
        return Choice(column=None, rule=rule, found="No column can be chosen.")
    fit = [place for place in candidates if kept is None or kept[place] >= keep]
    if kept is not None and not fit:
        most = max(candidates, key=kept.__getitem__)
        return Choice(
            column=most, rule=rule, found=f"None keeps {keep:.0%}; {labels[most]} keeps {_share(kept[most])}."
        )
    best = max(fit, key=standing.styles.__getitem__)
    found = f"{labels[best]}: {standing.styles[best]:.3f}" + ("" if kept is None else f", keeping {_share(kept[best])}")
    return Choice(column=best, rule=rule, found=f"{found}.")


def _share(kept: float) -> str:
    """In percent; more than all is all."""
    return f"{min(kept, 1.0):.0%}"
