"""YAML for people: one strict reader, its writer, path-valued keys, and the words for what pydantic finds wrong.

In: a YAML file, or a pydantic ValidationError of what it held. Out: a plain dict, or sentences that name file, line and
key. Words are those of YAML 1.2's core schema: `no`, `off`, 16:9, 1_000 and 2026-01-01 are text, 0123 is 123 (as Python
and a command line read it; octal is 0o123) and 1e-4 is a number. Beyond it: keys are text, no key stands twice,
integers fit into 64 bits, and what aliases multiply is limited.
"""

import difflib
import json
import os
import re
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic
import yaml
from pydantic.fields import FieldInfo

from ztrain.errors import InputError
from ztrain.io import files
from ztrain.io.files import as_text

_MAX_DEPTH = 64
_MAX_NODES = 20_000
_MAX_LETTERS = 2 << 20
"""Of the whole document, with all that its aliases stand for: lists, mappings and scalars, and their characters."""

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_CORE: tuple[tuple[str, re.Pattern[str], Callable[[str], Any]], ...] = (
    (_TAG + "null", re.compile(r"~|null|Null|NULL|"), lambda text: None),
    (_TAG + "bool", re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text[0] in "tT"),
    (_TAG + "int", re.compile(r"[-+]?[0-9]+"), int),
    (_TAG + "int", re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+"), lambda text: int(text, 0)),
    (_TAG + "float", re.compile(_FLOAT), float),
    (_TAG + "float", re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
)
"""Tag, words and meaning of YAML 1.2's scalars that are not text; of an untagged one the first that fits."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_MERGE = "<<"
_SUGGESTION_CUTOFF = 0.35  # low: lrr should still find learning_rate
_MAX_VALUE_LENGTH = 80
ModelT = TypeVar("ModelT", bound=pydantic.BaseModel)


class Strict(pydantic.BaseModel):
    """Settings, or a document: keys are known, values have their fields' own types, and nothing changes later."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class _Document:
    """One document as plain values, made event by event, so that nothing is built beyond the limits.

    Raises yaml.YAMLError, and whatever yaml's scanner raises for odd escapes.
    """

    def __init__(self, text: bytes) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._anchors: dict[str, Any] = {}
        self._open: set[str] = set()  # anchors of what is still being read
        self._nodes = self._letters = 0

    def read(self) -> Any:
        next(self._events)  # the start of the stream
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._node(next(self._events), ())
        next(self._events)  # the end of the document
        if not isinstance(after := next(self._events), yaml.StreamEndEvent):
            raise _mistake(after, (), "a second document starts here; keep one")
        return value

    def _node(self, event: Any, path: tuple[str, ...]) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._again(event, path)
        if event.anchor is not None:
            self._open.add(event.anchor)
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
            self._count(value, event, path)
        else:
            self._count(None, event, path)
            value = self._list(path) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(path)
            if event.tag not in (None, "!", f"{_TAG}{'seq' if isinstance(value, list) else 'map'}"):
                raise _mistake(event, path, f"the tag {event.tag} is not read; leave it out")
        if event.anchor is not None:
            self._open.discard(event.anchor)
            self._anchors[event.anchor] = value
        return value

    def _again(self, event: Any, path: tuple[str, ...]) -> Any:
        """What an alias stands for, counted as if it were written out here."""
        name = event.anchor
        if name in self._open:
            raise _mistake(event, path, f"the alias *{name} is inside of what it stands for; write it out")
        if name not in self._anchors:
            raise _mistake(event, path, f"found undefined alias *{name}; define it above with &{name}")
        self._count(self._anchors[name], event, path)
        return self._anchors[name]

    def _count(self, value: Any, event: Any, path: tuple[str, ...]) -> None:
        """Adds a value with all inside it to what has been read. Raises beyond the limits."""
        self._nodes += 1
        self._letters += len(value) if isinstance(value, str) else 0
        if len(path) > _MAX_DEPTH:
            raise _mistake(event, path[:3], f"lists and mappings lie more than {_MAX_DEPTH} deep; write it flatter")
        if self._nodes > _MAX_NODES or self._letters > _MAX_LETTERS:
            raise _mistake(
                event,
                path,
                f"with all that aliases stand for, the file has more than {_MAX_NODES:,} values or {_MAX_LETTERS:,} "
                "characters up to here; shorten it",
            )
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in inside:
            self._count(entry, event, (*path, str(key)))

    def _list(self, path: tuple[str, ...]) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._node(event, (*path, str(len(values)))))
        return values

    def _mapping(self, path: tuple[str, ...]) -> dict[str, Any]:
        """Its own keys over those that `<<` takes from others, of which the first has the last word."""
        own: dict[str, Any] = {}
        inherited: list[Any] | None = None
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, path)
            merges = key == _MERGE and event.implicit[0]
            if key in own or (merges and inherited is not None):
                raise _mistake(event, path, f"the key {_shorten(key)} stands twice; keep one")
            value = self._node(next(self._events), (*path, key))
            if not merges:
                own[key] = value
                continue
            inherited = value if isinstance(value, list) else [value]
            if not all(isinstance(each, dict) for each in inherited):
                raise _mistake(event, path, "<< takes a mapping, or a list of mappings")
        taken: dict[str, Any] = {}
        for each in reversed(inherited or []):
            taken |= each
        return taken | own

    def _key(self, event: Any, path: tuple[str, ...]) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            raise _mistake(event, path, "a key must be text, not a list, a mapping or an alias")
        key = self._node(event, path)
        if not isinstance(key, str):
            kind = {bool: "a truth value", type(None): "nothing"}.get(type(key), "a number")
            raise _mistake(event, path, f"the key {_shorten(event.value)} is {kind}, not text; put it in quotes")
        return key

    def _scalar(self, event: Any, path: tuple[str, ...]) -> Any:
        """Its value by YAML 1.2's core schema."""
        text, tag = event.value, event.tag
        if _SURROGATE.search(text):
            raise _mistake(event, path, "an escape is half of a surrogate pair, which no file could hold; correct it")
        if tag in ("!", _TAG + "str") or (tag is None and not event.implicit[0]):
            return text
        for kind, pattern, make in _CORE:
            if tag in (None, kind) and pattern.fullmatch(text):
                if kind.endswith("int") and (len(text) > 64 or not -(1 << 63) <= make(text) < 1 << 63):
                    raise _mistake(event, path, f"the integer {_shorten(text)} is beyond 64 bits; write a smaller one")
                return make(text)
        if tag is None:
            return text
        raise _mistake(event, path, f"the tag {tag} of {_shorten(text)} is not read; leave it out")


def _mistake(event: Any, path: Sequence[str], problem: str) -> yaml.MarkedYAMLError:
    place = ".".join(path)[:_MAX_VALUE_LENGTH]
    return yaml.MarkedYAMLError(problem=f"{place}: {problem}" if place else problem, problem_mark=event.start_mark)


class _Dumper(yaml.SafeDumper):
    """SafeDumper whose text YAML 1.2 and 1.1 read back alike: what either takes for a number is in quotes.

    The rarer line ends are escapes, as plain or single-quoted U+0085 would come back as a line feed; what stands twice
    is written twice, without aliases.
    """

    def represent_str(self, data: str) -> yaml.ScalarNode:
        data = as_text(data)  # of half surrogates no reader makes a text again
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar(_TAG + "str", data, style=style)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_str)
for _tag, _pattern, _ in _CORE[2:]:
    _Dumper.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern.pattern})$"), list("-+.0123456789"))


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, of plain dicts, lists and scalars.

    Raises InputError naming the file, and line and key where there are some: a file that cannot be read or is too
    large, bad syntax, a key that stands twice or is no text, a tag, too much of anything, or a document that is not a
    mapping.
    """
    try:
        document = _Document(files.read_bytes(path, "config")).read()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror}); correct the path") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{path}{line}: {problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # odd bytes, an escape beyond Unicode
        raise InputError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(document, dict):
        found = "nothing" if document is None else f"a {type(document).__name__}"
        raise InputError(f"{path}: must hold a mapping of keys to values, but holds {found}")
    return document


def read_value(text: str) -> Any:
    """A single value as it would stand in a YAML file; the text itself where it is not YAML."""
    try:
        return _Document(text.encode()).read()
    except (yaml.YAMLError, ValueError, OverflowError):
        return text


def dump_yaml(document: dict[str, Any]) -> str:
    """The mapping as YAML text that `load_yaml` reads back as the same values; keys keep their order."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse(model: type[ModelT], values: dict[str, Any], source: str) -> ModelT:
    """`values` of YAML as a checked model; lists become the tuples that fields ask for. Raises InputError."""
    try:
        # pydantic's JSON mode is as strict about types, but knows that JSON has no tuples.
        return model.model_validate_json(json.dumps(values))
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error, source=source, model=model)) from error


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, key by key; lists are replaced."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


_BYTES = range(0xDC80, 0xDD00)  # where Python keeps the bytes of a path that are no UTF-8: half surrogates
_PRIVATE = 0x100000  # added, they are letters that nobody uses


def carried(path: str) -> str:
    """A path of a command line as JSON can carry it to `PathText`, which takes it back."""
    return path.translate({byte: byte + _PRIVATE for byte in _BYTES})


def _expanded(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path cannot hold a NUL character; correct it")
    return files.expand(path.translate({byte + _PRIVATE: byte for byte in _BYTES}))


def shorten_home(path: str) -> str:
    """With ~ in the place of the home folder, as paths of this machine stand in what is written."""
    home = os.path.expanduser("~").rstrip("/")
    return f"~{path[len(home) :]}" if home and f"{path}/".startswith(f"{home}/") else path


_PATH = pydantic.AfterValidator(_expanded)
PathText = Annotated[str, _PATH, pydantic.PlainSerializer(shorten_home, return_type=str, when_used="json")]
"""A file, folder or Hub id of a config: ~ and $HOME stand for the home folder, and are written again in its place."""


def takes_paths(field: FieldInfo) -> bool:
    """Whether a key is a `PathText`, or may be, or is a list of them."""

    def within(annotation: Any) -> bool:
        return _PATH in getattr(annotation, "__metadata__", ()) or any(map(within, get_args(annotation)))

    return _PATH in field.metadata or within(field.annotation)


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
            rule += "; write true or false" if problem["type"] == "bool_type" else ""
        line = ": ".join(part for part in (source, path, rule) if part)
        # For a missing key or a rule over a whole section the input is all of the section: noise.
        if problem["type"] != "missing" and not isinstance(problem["input"], dict | pydantic.BaseModel):
            line += f" (got {_shorten(problem['input'])})"
        if unknown:
            line += suggest(str(problem["loc"][-1]), siblings)
        lines.append(line)
    return "\n".join(lines)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else text[: _MAX_VALUE_LENGTH - 3] + "..."


def suggest(key: str, known: Sequence[str]) -> str:
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
    kinds: list[Any] = list(members(model)) if model else []
    parts: list[str] = []
    for position, element in enumerate(location):
        last = position == len(location) - 1
        if last and last_is_unknown:
            parts.append(str(element))
            break
        entered = [member for kind in kinds for member in enter(kind, element)]
        chosen = [kind for kind in kinds if isinstance(element, str) and is_tagged(kind, element)]
        if not entered and chosen:
            kinds = chosen
            continue
        parts.append(str(element))
        kinds = entered
    return ".".join(parts), sorted({key for kind in kinds for key in _keys(kind)})


def members(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows, with Annotated unwrapped and unions taken apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from members(member)
    else:
        yield annotation


def enter(kind: Any, element: int | str) -> list[Any]:
    """The types one step inside `kind`: of a model's field, a list's or tuple's item, a dict's value."""
    if is_model(kind):
        return [
            member
            for name, field in kind.model_fields.items()
            if element in (name, field.alias)
            for member in members(field.annotation)
        ]
    arguments = get_args(kind)
    origin = get_origin(kind)
    if origin is dict and len(arguments) == 2:
        return list(members(arguments[1]))
    if origin in (list, tuple, set, frozenset) and isinstance(element, int):
        return [member for argument in arguments if argument is not ... for member in members(argument)]
    return []


def is_tagged(kind: Any, tag: str) -> bool:
    """Whether a union would call this member `tag`: by a model's Literal field, or by the type's own name."""
    if is_model(kind):
        return kind.__name__ == tag or any(
            get_origin(field.annotation) is Literal and tag in get_args(field.annotation)
            for field in kind.model_fields.values()
        )
    return getattr(kind, "__name__", str(kind)) == tag or str(kind) == tag


def is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def _keys(kind: Any) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()] if is_model(kind) else []
