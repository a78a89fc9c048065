"""What may leave this machine: settings and texts without secrets and without its paths."""

import re
from pathlib import Path
from typing import Any

from ztrain.models import public_name

_SECRET_KEY = re.compile(r"(token|key|secret|password|passwd|credentials?)$", re.IGNORECASE)
# Keys whose text is a folder, a file or a Hub id; compare's adapters and presets are lists of folders and files.
_PATH_KEY = re.compile(r"(_or_path|(^|_)(path|dir|file|folder)|resume_from_checkpoint|adapters|presets)$")
_SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}"  # Hugging Face
    r"|\bwandb_v\d+_\w+|\b[0-9a-f]{40}\b"  # W&B
    r"|(?<=://)[^/@\s]+(?=@)"  # the user in a URL
)
_COMMIT_KEY = "revision"  # a commit of the Hub has 40 hexadecimal digits as well
_ABSOLUTE_PATH = re.compile(r"(?:file://|(?<![\w.:/~]))~?/(?:[^\s/'\"]+/)*([^\s/'\"]+)/?")
_REDACTED = "***"


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """The settings without secrets and without paths of this machine, of which the last part stays."""
    return {key: _public(value, key) for key, value in config.items()}


def _public(value: Any, key: str) -> Any:
    match value:
        case None | bool() | int() | float():
            return value
        case dict() if key.endswith("_map"):  # its keys are names, not settings
            return {inner: _public(entry, "") for inner, entry in value.items()}
        case _ if _SECRET_KEY.search(key):
            return _REDACTED
        case dict():
            return public_config(value)
        case list() | tuple():
            return [_public(entry, key) for entry in value]
        case str() if key == _COMMIT_KEY:
            return value
    text = str(value)
    if Path(text).is_absolute() or text.startswith("~/"):
        return public_text(Path(text).name)
    return public_text(public_name(text) if _PATH_KEY.search(key) else text)


def public_text(text: str) -> str:
    """Text with secrets blackened and absolute paths cut to their last part."""
    return _ABSOLUTE_PATH.sub(r"\1", _SECRET_TEXT.sub(_REDACTED, text))
