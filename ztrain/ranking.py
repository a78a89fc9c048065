"""From scores to a verdict: means with intervals, differences to the baseline, and the best by a rule fixed before.

In: scores of judging.py, (C, R, S). Out: the metrics and choices of a comparison. Seeds of a row are averaged first;
intervals then draw prompts and references, for rows that share one are no independent draws. A column is called better
or worse only where its interval of the paired difference excludes zero.

Legend: C columns, R rows, S seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ztrain import intervals
from ztrain.comparison import Choice, Difference, Interval, Metric, Verdict
from ztrain.errors import InputError
from ztrain.judging import Score, Verdicts

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Groups:
    """Of R rows: equal numbers share a prompt, or references."""

    prompts: Sequence[int]
    references: Sequence[int]


def metric_of(score: Score, baseline: int | None, groups: Groups) -> Metric:
    """A score with its means, and its differences to the baseline's column."""
    described = {name: getattr(score, name) for name in ("name", "title", "definition", "low", "high", "direction")}
    described |= {"model": score.model, "chance": score.chance}
    if score.values is None:
        means = [None if v is None else Interval(mean=v, count=1) for v in score.of_columns]
        return Metric(**described, means=means, differences=[None] * len(means))
    rows = score.values.nanmean(2)  # (C, R), NaN where no seed can tell
    own = None if baseline is None else rows[baseline]
    return Metric(
        **described,
        values=[[[None if v != v else v for v in row] for row in column] for column in score.values.tolist()],
        means=[_within(_mean(column, groups), score) for column in rows],
        differences=[
            None if own is None or place == baseline else _difference(column, own, score, groups)
            for place, column in enumerate(rows)
        ],
    )


def _within(found: Interval | None, score: Score) -> Interval | None:
    """Without the parts of an interval that no score can have."""
    if found is None or found.low is None or found.high is None:
        return found
    low = found.low if score.low is None else max(found.low, score.low)
    high = found.high if score.high is None else min(found.high, score.high)
    return found.model_copy(update={"low": low, "high": high})


def _mean(values: Tensor, groups: Groups) -> Interval | None:
    """Without an interval where there are too few rows for one; None where no row can tell."""
    told = values[~values.isnan()]
    if not len(told):
        return None
    try:
        found = intervals.two_way(
            values, prompts=groups.prompts, references=groups.references, drop_nan=True, resamples=_RESAMPLES
        )
    except InputError:
        return Interval(mean=float(told.mean()), count=len(told))
    return Interval(mean=found.mean, low=found.low, high=found.high, count=found.count)


def _difference(ours: Tensor, theirs: Tensor, score: Score, groups: Groups) -> Difference | None:
    found = _mean(ours - theirs, groups)
    if found is None:
        return None
    return Difference(**found.model_dump(), verdict=_verdict(found, score))


def _verdict(found: Interval, score: Score) -> Verdict:
    if score.direction == "neither" or found.low is None or found.high is None:
        return "none"
    if found.low <= 0 <= found.high:
        return "undecided"
    return "better" if (found.low > 0) == (score.direction == "higher") else "worse"


@dataclass(frozen=True, slots=True)
class Standing:
    """What the rule looks at. styles: C, likeness to the reference; kept: C, the share of text alone's adherence above
    chance, or None where nothing judged it or prompts are not given; rule: a sentence without its end."""

    styles: list[float]
    kept: list[float] | None
    rule: str


def stand(verdicts: Verdicts, plain: int | None, keep: float, groups: Groups) -> Standing | Choice:
    """What a rule can go by, or the choice of nothing with its reason."""
    style, adherence = _row_means(verdicts, verdicts.style), _row_means(verdicts, verdicts.adherence)
    if style is None:
        return Choice(column=None, rule="None.", found="Nothing judged the likeness to the reference: set judges.*")
    rule = f"The largest {_title(verdicts, verdicts.style)}"
    if adherence is None or plain is None:
        return Standing(style, None, rule)
    score = next(score for score in verdicts.scores if score.name == verdicts.adherence)
    if score.chance is None or score.values is None:
        return Standing(style, None, f"{rule} ({score.title} is not looked at: its chance cannot be told)")
    of_text = _mean(score.values[plain].nanmean(1), groups)
    # Where the interval holds chance, a share of the rest would be noise.
    if of_text is None or (of_text.mean if of_text.low is None else of_text.low) <= score.chance:
        return Standing(style, None, f"{rule} ({score.title} is not looked at: that of text alone is near chance)")
    room, title = adherence[plain] - score.chance, score.title
    rule += (
        f" of those that keep {keep:.0%} of what text alone has of {title} above chance, or what keeps most where none"
        " does"
    )
    return Standing(style, [(value - score.chance) / room for value in adherence], rule)


def choose(
    verdicts: Verdicts,
    candidates: Sequence[int],
    plain: int | None,
    keep: float,
    labels: Sequence[str],
    groups: Groups,
) -> Choice:
    """The candidate with the largest likeness among those that keep the prompt's adherence, or the one that keeps most
    of it where none keeps enough."""
    standing = stand(verdicts, plain, keep, groups)
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


def _row_means(verdicts: Verdicts, name: str | None) -> list[float] | None:
    """Of each column."""
    score = next((score for score in verdicts.scores if score.name == name), None)
    return None if score is None or score.values is None else score.values.nanmean(2).nanmean(1).tolist()


def _title(verdicts: Verdicts, name: str | None) -> str:
    return next(score.title for score in verdicts.scores if score.name == name)


def grouped(names: Sequence[object]) -> list[int]:
    """Equal names as equal numbers, in order of first use."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]
