"""What may leave this machine: settings and texts without secrets and without its paths, as text that JSON can hold.

All that a run, an export, a comparison, a cache or a page writes goes through here, but for what is read back as
settings: a run's config.yaml, its checkpoints and a sweep's preset keep paths as they were typed, and no secrets.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ztrain.frozen.sources import public_name
from ztrain.io.files import as_text

_SECRET_KEY = re.compile(r"(token|key|secret|password|passwd|credentials?)$", re.IGNORECASE)
# Keys whose text is a folder, a file or a Hub id; compare's adapters and presets are lists of folders and files.
_PATH_KEY = re.compile(
    r"(_or_path|(^|_)(path|dir|file|folder)|resume_from_checkpoint|init_from|adapters|presets|prompts|references|truth)$"
)
_SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}"  # Hugging Face
    r"|\bwandb_v\d+_\w+|\b[0-9a-f]{40}\b"  # W&B
    r"|(?<=://)[^/@\s]+(?=@)"  # the user in a URL
)
_COMMIT_KEY = "revision"  # a commit of the Hub has 40 hexadecimal digits as well
_ABSOLUTE_PATH = re.compile(r"(?:file://|(?<![\w.:/~]))~?/(?:[^\s/'\"]+/)*([^\s/'\"]+)/?")
_REDACTED = "***"


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without secrets and without paths of this machine, of which the last part stays."""
    return {key: _public(value, str(key), _public_setting) for key, value in config.items()}


def own_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a run keeps them for itself, to be read again: without secrets, with paths as they were typed."""
    return {key: _public(value, str(key), _own_setting) for key, value in config.items()}


def _public(value: Any, key: str, setting: Callable[[str, str], str]) -> Any:
    match value:
        case None | bool() | int() | float():
            return value
        case dict() if key.endswith("_map"):  # its keys are names, not settings
            return {inner: _public(entry, "", setting) for inner, entry in value.items()}
        case _ if _SECRET_KEY.search(key):
            return _REDACTED
        case dict():
            return {inner: _public(entry, str(inner), setting) for inner, entry in value.items()}
        case list() | tuple():
            return [_public(entry, key, setting) for entry in value]
        case str() if key == _COMMIT_KEY:
            return value
    return setting(str(value), key)


def _public_setting(text: str, key: str) -> str:
    if Path(text).is_absolute() or text.startswith("~/"):
        return public_text(Path(text).name)
    return public_text(public_name(text) if _PATH_KEY.search(key) else text)


def _own_setting(text: str, key: str) -> str:
    return text if _PATH_KEY.search(key) else _SECRET_TEXT.sub(_REDACTED, text)


def public_text(text: str) -> str:
    """Text with secrets blackened and absolute paths cut to their last part."""
    return as_text(_ABSOLUTE_PATH.sub(r"\1", _SECRET_TEXT.sub(_REDACTED, text)))
