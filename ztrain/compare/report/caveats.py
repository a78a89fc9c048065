"""What makes an answer too sure, in sentences beside it: chosen on the rows that judge it, or drawn over the reference.

In: a `Comparison`. Out: plain sentences, none where nothing is to be said. The intervals of a record do not know that
a column was chosen for its score: the best of twelve equal ones is called better far more often than 2.5 % of the time.
"""

from collections.abc import Collection

from ztrain.compare.record import Column, Comparison

# What the best is chosen among, by kind of comparison: its name and its roles.
_CHOSEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "sweep": ("settings", ("splice", "setting")),
    "checkpoints": ("checkpoints", ("checkpoint",)),
}


def caveats_of(found: Comparison, answered: Collection[int]) -> list[str]:
    """Sentences that go beside the answers. `answered`: places of the columns whose own answer says how they start."""
    said = []
    what, roles = _CHOSEN.get(found.kind, ("", ()))
    count = len(_chosen_among(found, roles))
    if found.best.column is not None and count > 1:
        said.append(
            f"The best was chosen among {count} {what} on these same rows, which favours it: compare it on other"
            " rows before you trust \N{LEFT DOUBLE QUOTATION MARK}better\N{RIGHT DOUBLE QUOTATION MARK}."
        )
    splices = splices_of(found)
    if len(splices) > 1 and found.baseline in splices and found.best_splice.column == found.baseline:
        label = found.columns[found.baseline].label
        said.append(f"The baseline, {label}, is the best of {len(splices)} splices by the rule, on these same rows.")
    for place in dict.fromkeys([found.best.column, found.best_splice.column, found.baseline]):
        if place is not None and place not in answered and starts_at_reference(column := found.columns[place]):
            said.append(started(f"The pictures of {column.label}", column))
    if (
        any(column.sees == "shuffled" for column in found.columns)
        and len({row.style for row in found.rows} - {None}) < 2
    ):
        said.append(
            "No two styles are named: shuffled references may be of the same style as the own, and then show little."
        )
    return said


def splices_of(found: Comparison) -> list[int]:
    """Places of the splices that a baseline is chosen among."""
    return _chosen_among(found, ("splice",))


def _chosen_among(found: Comparison, roles: tuple[str, ...]) -> list[int]:
    """Places of those roles; what starts at its reference is no choice unless all do (ztrain/compare/command.py)."""
    places = [place for place, column in enumerate(found.columns) if column.role in roles]
    return [place for place in places if not starts_at_reference(found.columns[place])] or places


def starts_at_reference(column: Column) -> bool:
    """Whether its pictures begin as the reference with noise over it, and not as noise."""
    return column.sees != "none" and _strength(column) < 1.0


def started(whose: str, column: Column) -> str:
    """The sentence about it; `whose` pictures begins it."""
    strength = f"strength {_strength(column):g}"
    return f"{whose} start at the reference ({strength}), so their likeness to it is partly a copy."


def _strength(column: Column) -> float:
    """1, pure noise, unless the record says less."""
    strength = column.sampling.get("strength", 1.0)
    return float(strength) if isinstance(strength, int | float) else 1.0
