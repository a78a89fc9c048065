"""The one exception for what a user can mend: a file, a key, a value.

Command-line programs print its sentence and exit with status 2; anything else is a defect and keeps its traceback.
"""

import errno

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a full disk, a used-up quota and a limit on files answer."""


class InputError(ValueError):
    """A sentence that names the file, key or value at fault and what to do about it."""


MENDABLE = (InputError, OSError, SafetensorError)
"""What ends a program with one sentence and status 2."""


def sentence(error: Exception) -> str:
    """What a person can do about an error of the file system, or of a library that reports one."""
    if isinstance(error, InputError):
        return str(error)
    reason = " ".join(str(error).split()) or type(error).__name__
    full = getattr(error, "errno", None) in FULL
    advice = "make room" if full else "mend what it names"
    return f"cannot read or write a file: {reason}; {advice}, then run again"
