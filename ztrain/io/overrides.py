"""Dotted words of a command line, `--train.learning_rate 3e-4`, laid over what YAML files say.

In: a model, its settings and words. Out: the settings, to be checked as a file's are. Each key of the model can be
given, with the text that it has in YAML; what the key takes decides between readings, so that `--tracking.name 12` is a
name. Lists take several words (`--validation.sigmas 0.1 0.5`), a bool needs none, `-` and `_` are alike in keys.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

import pydantic

from ztrain.errors import InputError
from ztrain.io.files import as_text
from ztrain.io.yamls import carried, enter, is_model, is_tagged, members, merge, read_value, suggest, takes_paths

_NULLS = ("null", "Null", "NULL", "None")


def lay_over(
    model: type[pydantic.BaseModel], settings: dict[str, Any], words: Sequence[str], also: Sequence[str] = ()
) -> dict[str, Any]:
    """`settings` with what the words say; of equal options the last counts.

    `also`: options that the program has besides, for the sentence about an unknown one. Raises InputError for words
    that belong to no key; values are checked with the whole.
    """
    for option, values in _options(words):
        name = option[2:]
        if name.partition(".")[0].replace("-", "_") not in model.model_fields:
            near = suggest(name, [*also, *model.model_fields])
            raise InputError(f"command line: {option}: neither an option here nor a key of the config{near}")
        settings = merge(settings, _setting([model], name.split("."), values, settings, option))
    return settings


def _options(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Options with the words after each; one after `=` is a value too."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            found.append((option, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise InputError(f"command line: {word!r} belongs to no option; options start with --")
    return found


def _setting(kinds: Sequence[Any], parts: Sequence[str], words: list[str], at: Any, option: str) -> Any:
    """The value as it stands in a mapping or list of mappings; `at`: the settings that stand there now."""
    if not parts:
        return _value(kinds, words, option)
    if isinstance(at, list):
        return _in_list(kinds, parts, words, at, option)
    part, rest = parts[0], parts[1:]
    if mapping := [kind for kind in kinds if get_origin(kind) is dict]:
        key = ".".join(parts)  # its keys are names, which may have dots
        return {key: _setting([inner for kind in mapping for inner in enter(kind, key)], (), words, None, option)}
    models = [kind for kind in kinds if is_model(kind)]
    if isinstance(at, dict) and (tag := at.get("kind")) is not None:
        models = [kind for kind in models if is_tagged(kind, tag)]
    known = {name for kind in models for name in kind.model_fields}
    key = part if part in known else part.replace("-", "_")
    inner = [kind for each in models for kind in enter(each, key)]
    negated = key.removeprefix("no_")
    if not rest and not words and key not in known and negated in known:
        return {negated: False}
    if not inner:
        raise InputError(f"command line: {option}: unknown key{suggest(part, sorted(known))}")
    if not rest and not _are_utf8(words) and any(takes_paths(each.model_fields[key]) for each in models):
        paths = [carried(word) for word in words]
        return {key: paths[0] if str in inner and len(paths) == 1 else paths}
    return {key: _setting(inner, rest, words, at.get(key) if isinstance(at, dict) else None, option)}


def _in_list(kinds: Sequence[Any], parts: Sequence[str], words: list[str], at: list[Any], option: str) -> list[Any]:
    """The whole list with the entry that `parts` name changed, or added behind the last."""
    place = int(parts[0]) if parts[0].isdecimal() else len(at) + 1
    if place > len(at):
        raise InputError(f"command line: {option}: there are {len(at)} entries, counted from 0, and no {parts[0]}")
    inner = [member for kind in kinds for member in enter(kind, 0)]
    before = at[place] if place < len(at) else None
    entry = _setting(inner, parts[1:], words, before, option)
    if isinstance(before, dict) and isinstance(entry, dict):
        entry = merge(before, entry)
    return [*at[:place], entry, *at[place + 1 :]]


def _value(kinds: Sequence[Any], words: list[str], option: str) -> Any:
    """The first reading of the words that the key takes; where it takes none, the first, for the sentence about it."""
    if not _are_utf8(words):
        raise InputError(f"command line: {option} {as_text(' '.join(words))}: is not UTF-8; type it anew")
    readings = list(_readings(kinds, words))
    if not readings:
        number = f"one value, not {len(words)}" if words else "a value"
        raise InputError(f"command line: {option} takes {number}; give it after the option")
    return next((reading for reading in readings if any(_fits(kind, reading) for kind in kinds)), readings[0])


def _are_utf8(words: Sequence[str]) -> bool:
    return all(word == as_text(word) for word in words)


def _readings(kinds: Sequence[Any], words: list[str]) -> Iterator[Any]:
    if not words and bool in kinds:
        yield True
    if len(words) == 1:
        [word] = words
        value = None if word in _NULLS else read_value(word)
        if word in _NULLS or not (value is None or isinstance(value, str)):
            yield value
        yield word  # as it stands: a # in it is no comment
        yield value
    for kind in kinds:
        if get_origin(kind) in (list, tuple):
            inner = [member for argument in get_args(kind) if argument is not ... for member in members(argument)]
            yield [_value(inner, [word], "") for word in words]


def _fits(kind: Any, value: Any) -> bool:
    try:
        pydantic.TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError:
        return False
    return True
