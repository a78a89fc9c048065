"""What goes wrong on one process ends all of them, with its sentence, instead of leaving the others in a collective."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from ztrain.errors import InputError, sentence

MENDABLE = (InputError, OSError, SafetensorError)
"""What a user can mend: wrong input, and files that cannot be read or written."""


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Runs a block on every process; if it fails on any, all raise InputError with the first one's sentence.

    Inside there must be no collective call: a process that failed would not take part in it.
    """
    message = ""
    try:
        yield
    except MENDABLE as error:
        message = sentence(error)
    reasons = [reason for reason in gather_object([message]) if reason]
    if reasons:
        raise InputError(reasons[0])
