"""YAML for people: one strict reader, its writer, and the words for what pydantic finds wrong.

In: a YAML file, or a pydantic ValidationError of what it held. Out: a plain dict, or sentences that name
file, line and key. Differs from yaml.safe_load in two ways: a key that stands twice is an error (the last one
does not win), and 1e-4 is a number (as in YAML 1.2), not text.
"""

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
import yaml

from ztrain.errors import InputError
from ztrain.files import as_text

# YAML 1.1 wants a dot and a signed exponent before it believes in a float; YAML 1.2 does not.
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_FLOAT_STARTS = list("-+.0123456789")
_SUGGESTION_CUTOFF = 0.35  # low: lrr should still find learning_rate
_MAX_VALUE_LENGTH = 80


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a float and refuses a key that stands twice in one mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked here and not when values are built: by then `<<` has mixed inherited keys, which may be
        # overridden, with the mapping's own.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands twice; keep one", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper whose text `_Loader` reads back: 1e4 in quotes, and the rarer line ends as escapes.

    Plain or single-quoted, U+0085 would come back as a line feed.
    """

    def represent_str(self, data: str) -> yaml.ScalarNode:
        data = as_text(data)  # of half surrogates no reader makes a text again
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _FLOAT_STARTS)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _FLOAT_STARTS)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, of plain dicts, lists and scalars.

    Raises InputError naming the file, and the line where there is one: a file that cannot be read, bad
    syntax, a key that stands twice, a tag that asks for Python objects, or a document that is not a mapping.
    """
    try:
        # Bytes, so that yaml finds the encoding itself. Safe: _Loader adds no constructors to SafeLoader's.
        document = yaml.load(path.read_bytes(), Loader=_Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror}); correct the path") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{path}{line}: {problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # odd bytes, a 13th month, absurd nesting
        raise InputError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(document, dict):
        found = "nothing" if document is None else f"a {type(document).__name__}"
        raise InputError(f"{path}: must hold a mapping of keys to values, but holds {found}")
    return document


def dump_yaml(document: dict[str, Any]) -> str:
    """The mapping as YAML text that `load_yaml` reads back as the same values; keys keep their order."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def describe_errors(
    error: pydantic.ValidationError, *, source: str, model: type[pydantic.BaseModel] | None = None
) -> str:
    """One line per problem: `<source>: train.lrr: unknown key (got 3); did you mean learning_rate?`

    `source` names the file (or "command line"). With `model`, the class that was being built, unknown keys
    come with the nearest known key, or with all of them where none is near, and paths leave out the tags of
    unions.
    """
    lines = []
    for problem in error.errors(include_url=False):
        unknown = problem["type"] == "extra_forbidden"
        path, siblings = _walk(model, problem["loc"], last_is_unknown=unknown)
        if unknown:
            rule = "unknown key"
        elif problem["type"] == "missing":
            rule = "is missing; give it a value"
        else:
            rule = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        line = ": ".join(part for part in (source, path, rule) if part)
        # For a missing key or a rule over a whole section the input is all of the section: noise.
        if problem["type"] != "missing" and not isinstance(problem["input"], dict | pydantic.BaseModel):
            line += f" (got {_shorten(problem['input'])})"
        if unknown:
            line += _suggest(str(problem["loc"][-1]), siblings)
        lines.append(line)
    return "\n".join(lines)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else text[: _MAX_VALUE_LENGTH - 3] + "..."


def _suggest(key: str, known: Sequence[str]) -> str:
    """The end of an unknown-key line: the nearest known key, else all of them, else nothing."""
    if not known:
        return ""
    near = difflib.get_close_matches(key, known, n=1, cutoff=_SUGGESTION_CUTOFF)
    return f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"


def _walk(
    model: type[pydantic.BaseModel] | None, location: Sequence[int | str], *, last_is_unknown: bool
) -> tuple[str, list[str]]:
    """The dotted key path of a pydantic location, and the known keys next to its last element.

    pydantic puts the tag of the chosen union member into its locations; a user never wrote it as a key, so
    elements that only choose a member are left out of the path.
    """
    kinds: list[Any] = list(_members(model)) if model else []
    parts: list[str] = []
    for position, element in enumerate(location):
        last = position == len(location) - 1
        if last and last_is_unknown:
            parts.append(str(element))
            break
        entered = [member for kind in kinds for member in _enter(kind, element)]
        chosen = [kind for kind in kinds if isinstance(element, str) and _is_tagged(kind, element)]
        if not entered and chosen:
            kinds = chosen
            continue
        parts.append(str(element))
        kinds = entered
    return ".".join(parts), sorted({key for kind in kinds for key in _keys(kind)})


def _members(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows, with Annotated unwrapped and unions taken apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _enter(kind: Any, element: int | str) -> list[Any]:
    """The types one step inside `kind`: of a model's field, a list's or tuple's item, a dict's value."""
    if _is_model(kind):
        return [
            member
            for name, field in kind.model_fields.items()
            if element in (name, field.alias)
            for member in _members(field.annotation)
        ]
    arguments = get_args(kind)
    origin = get_origin(kind)
    if origin is dict and len(arguments) == 2:
        return list(_members(arguments[1]))
    if origin in (list, tuple, set, frozenset) and isinstance(element, int):
        return [member for argument in arguments if argument is not ... for member in _members(argument)]
    return []


def _is_tagged(kind: Any, tag: str) -> bool:
    """Whether a union would call this member `tag`: by a model's Literal field, or by the type's own name."""
    if _is_model(kind):
        return kind.__name__ == tag or any(
            get_origin(field.annotation) is Literal and tag in get_args(field.annotation)
            for field in kind.model_fields.values()
        )
    return getattr(kind, "__name__", str(kind)) == tag or str(kind) == tag


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def _keys(kind: Any) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()] if _is_model(kind) else []
