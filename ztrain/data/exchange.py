"""Cases, and which of them is shown whose references, where validation and comparisons exchange the right ones.

In: cases, with their styles where the data says them. Out: for each another one, of another style wherever two styles
are known. A reference of the same style is nearly as good as the right one, so that an exchange
among rows of one style shows next to nothing.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ztrain.data.digests import Known
from ztrain.errors import InputError
from ztrain.images import Picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A prompt, and the references in whose style it is drawn."""

    prompt: str
    references: tuple[Known, ...]
    target: Picture | None = None
    where: str
    """What messages call it."""
    columns: Mapping[str, object] = field(default_factory=dict)
    """The row's further keys: style, content."""

    @property
    def look(self) -> tuple[str, ...]:
        """Equal for cases with the same references."""
        return tuple(known.digest for known in self.references)


@dataclass(frozen=True, slots=True)
class Exchange:
    """others: for each row the place of another; share: of the rows whose other is known to be of another style."""

    others: list[int]
    share: float

    @property
    def words(self) -> str:
        """What is to be said of it; empty where all are of other styles."""
        if self.share == 1.0:
            return ""
        told = "are" if self.share == 0.0 else f"are, but for {self.share:.0%} of the rows,"
        return (
            f"the references that are exchanged {told} of the same style or of one that the data does not say: what"
            " another costs is then less than the image's use; give a style column with two styles or more"
        )


def style_of(columns: Mapping[str, object]) -> str | None:
    """What a data set says of a row's style; None: nothing."""
    return None if (style := columns.get("style")) is None else str(style)


def exchange(cases: Sequence[Case], seed: int, what: str, mend: str) -> Exchange:
    """Another row for each, a function of styles, references and the seed alone.

    Of another style with other references; else with other references. All are given away once where every style is
    known and none (where fewer than two are known: no reference) has more than half of the rows. Raises InputError
    where all have the same references; `what` the rows are and how to `mend` it are its words.
    """
    styles, looks = [style_of(case.columns) for case in cases], [case.look for case in cases]
    if len(set(looks)) < 2:
        raise InputError(f"all {len(looks)} {what} have the same references, so none can be exchanged; {mend}")
    names = len({style for style in styles if style is not None}) > 1
    pairs = zip(styles, looks, strict=True)
    kinds = ["/".join(look) if style is None or not names else style for style, look in pairs]
    order = random.Random(f"shuffled references {seed}").sample(range(len(looks)), len(looks))
    # Rows of one kind stand together, so that a turn by the largest kind gives none its own.
    order.sort(key=kinds.__getitem__)
    turn = max(Counter(kinds).values())
    others, known = [0] * len(looks), 0
    for place, row in enumerate(order):

        def following(place: int = place, row: int = row) -> Iterator[int]:
            places = (order[(place + turn + step) % len(order)] for step in range(len(order)))
            return (other for other in places if looks[other] != looks[row])

        best = None
        if names and styles[row] is not None:
            best = next((other for other in following() if styles[other] not in (None, styles[row])), None)
        known += best is not None
        others[row] = next(following()) if best is None else best
    return Exchange(others, known / len(looks))
