"""What goes wrong on one process ends all of them, with its sentence, instead of leaving the others in a collective.

So does a signal that one of them got, where `interrupt` says that they stop at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import gather_object

from ztrain.errors import MENDABLE, InputError, sentence
from ztrain.interrupt import Stopped, interruption


class _Agreed(InputError):
    """Raised on all processes alike: they have agreed on it."""


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Runs a block on every process; if it fails on any, all raise InputError with the first one's sentence.

    Inside there must be no collective call but `agree`: a process that failed would not take part in it.
    """
    message = ""
    try:
        yield
    except _Agreed:
        raise
    except MENDABLE as error:
        message = sentence(error)
    agree(accelerator, message)


def agree(accelerator: Accelerator, message: str = "") -> None:
    """A point that all processes reach, with what went wrong on this one, if anything: it ends the block on all.

    Within `Interruption.agreed` it also raises Stopped on all where any has got a signal. For long loops inside
    `together`: a process that failed meets the others here.
    """
    installed = interruption()
    told = gather_object([(message, installed.asks if installed else 0)])
    if reasons := [reason for reason, _ in told if reason]:
        raise _Agreed(reasons[0])
    if asked := max(number for _, number in told):
        raise Stopped(asked)
