"""The one exception for what a user can mend: a file, a key, a value.

Command-line programs print its sentence and exit with status 2; anything else is a defect and keeps its traceback.
"""


class InputError(ValueError):
    """A sentence that names the file, key or value at fault and what to do about it."""


def sentence(error: Exception) -> str:
    """What a person can do about an error of the file system, or of a library that reports one."""
    if isinstance(error, InputError):
        return str(error)
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"cannot read or write a file: {reason}; free some space or mend the folder, then run again"
