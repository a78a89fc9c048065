"""The one exception for what a user can mend: a file, a key, a value.

Command-line programs print its sentence and exit with status 2; anything else is a defect and keeps its traceback.
"""


class InputError(ValueError):
    """A sentence that names the file, key or value at fault and what to do about it."""
