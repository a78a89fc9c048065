"""Names that look the same: Unicode writes é in two ways, and some file systems know no capitals.

In: names of files, ids of tables. Out: one form to compare them in, and which of two lists belong together. Files on
disk, and what is written of them, keep their own names.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass


def one_form(name: str) -> str:
    """The name in NFC: equal for names that Unicode calls the same."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """Equal also for names that differ in capitals alone, as for some file systems."""
    return one_form(one_form(name).casefold())


@dataclass(frozen=True, slots=True)
class Matches:
    """Which names of one list mean which of another."""

    found: Mapping[str, str]
    """Wanted name -> the offered one."""
    unclear: Mapping[str, tuple[str, ...]]
    """Wanted name -> several offered ones, of which it is none to the letter."""

    def why_not(self, name: str) -> str:
        """What a message adds about a name that was not found; empty where nothing is like it."""
        several = " and ".join(map(repr, self.unclear.get(name, ())))
        return f" ({several} differ from it in capitals or in their Unicode form alone; use one of them)" * bool(
            several
        )


def matched(wanted: Set[str], offered: Set[str], *, shared: bool = False) -> Matches:
    """Names that are equal; for the others equal in NFC, then but for capitals, where that is one and no other's.

    shared: several wanted names may mean one offered one, as in a table that names a picture twice.
    """
    found = {name: name for name in wanted if name in offered}
    unclear: dict[str, tuple[str, ...]] = {}
    for form in (one_form, folded):
        if not (left := [name for name in wanted if name not in found and name not in unclear]):
            break
        taken = set() if shared else set(found.values())
        free, rivals = _by_form((name for name in offered if name not in taken), form), _by_form(left, form)
        for name in left:
            near = free.get(form(name), ())
            if len(near) == 1 and (shared or len(rivals[form(name)]) == 1):
                found[name] = near[0]
            elif near:
                unclear[name] = tuple(sorted(near))
    return Matches(found, unclear)


def _by_form(names: Iterable[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in names:
        grouped[form(name)].append(name)
    return dict(grouped)
