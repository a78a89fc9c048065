"""When to stop: what a run's validations say of it, in a few sentences at its end (docs/training.md, "When to stop").

In: the rows of metrics.jsonl, and the step that best.json names. Out: words. Validations of a run share samples and
noise, so their differences come from the weights alone.
"""

from collections.abc import Mapping, Sequence

RECENT = 3
"""Validations at the end that are compared with all before them."""
RISE = 1.05
"""How many times the largest image use before them one of them must reach to count as a rise."""

Row = Mapping[str, float]


def advice(rows: Sequence[Row], best_step: int | None, *, reads: bool) -> str:
    """`reads`: whether the list reads references. Empty where nothing was validated."""
    seen = _alike([row for row in rows if "val/loss" in row])
    if not seen:
        return ""
    said = [_use(seen[-1])] if reads else []
    if len(seen) <= RECENT:
        many = f"{len(seen)} validation{'' if len(seen) == 1 else 's'}"
        said.append(f"After {many} nothing can be said of a trend: {RECENT + 1} are needed")
    else:
        said.append(_trend(seen, reads))
    key, what = ("val/image_use", "most image use") if reads else ("val/loss", "least validation loss")
    if best_step is not None:
        said.append(f"The best step is {best_step} (best.json)")
    else:
        step = (max if reads else min)(seen, key=lambda row: row[key])["step"]
        said.append(f"The {what} was at step {step}")
    return f"{'. '.join(said)}."


def _alike(rows: list[Row]) -> list[Row]:
    """Those that were measured at the sigmas of the last one."""
    return [row for row in rows if _measured(row) == _measured(rows[-1])]


def _measured(row: Row) -> set[str]:
    return {name for name in row if name.startswith("val/loss_sigma_") or name == "val/other_style"}


def _use(last: Row) -> str:
    low, high = (last.get(f"val/image_use_{end}") for end in ("low", "high"))
    interval = "" if low is None or high is None else f" [{low:+.5f}, {high:+.5f}]"
    told = "" if low is None or low > 0 else ", not surely above 0: the image is hardly used"
    return f"Image use at the end: {last['val/image_use']:+.5f}{interval}{told}"


def _trend(seen: Sequence[Row], reads: bool) -> str:
    """Whether the last validations are better than all before, and what follows from it."""
    before, recent = seen[:-RECENT], seen[-RECENT:]
    least, now = (min(row["val/loss"] for row in part) for part in (before, recent))
    falls = now < least
    if not reads:
        return "Validation loss still fell: train longer" if falls else _past(seen, "Validation loss no longer fell")
    most, latest = (max(row["val/image_use"] for row in part) for part in (before, recent))
    if latest > max(most, 0.0) * RISE:
        least_at = f", though validation loss was least at step {_least(seen)}: see whether prompts are kept"
        return f"It still rose over the last {RECENT} validations: train longer" + ("" if falls else least_at)
    if not falls:
        return _past(seen, "It no longer rose, and validation loss no longer fell")
    return "It no longer rose, while validation loss still fell: longer training gains what no reference shows"


def _past(seen: Sequence[Row], fact: str) -> str:
    return f"{fact} over the last {RECENT} validations (least at step {_least(seen)}): longer training gains nothing"


def _least(seen: Sequence[Row]) -> float:
    return min(seen, key=lambda row: row["val/loss"])["step"]
