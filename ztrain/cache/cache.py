"""The cached states of an experiment: what they are named by, which are there, and reading them back.

A store for each state of the table (states.py) lies in a folder named by a fingerprint of all that changes what its
encoder gives; entries are named by prompt, picture bytes and size. So another encoder, setting, picture or prompt is
another name: a stale entry cannot be found, and only what changed is computed again (fill.py). Nothing here loads an
encoder.
"""

import json
from collections.abc import Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ztrain.config import Config
from ztrain.data.digests import Digests, Known, digest_json
from ztrain.errors import InputError
from ztrain.io.files import read_text
from ztrain.frozen.sources import Source, places_of
from ztrain.frozen.states import NOTHING, STATES, Model, Parts, Request, States, files_of
from ztrain.io.store import Store

CacheRequest = Request[Known]

FORMAT_VERSION = 1
"""Of a folder of states, in its kind.json; one that says none is of format 1. Raise it when what a folder holds is
written otherwise: tests/test_golden.py."""

_RULES = 1  # part of every fingerprint: raise it when this package comes to prepare inputs or read states otherwise


class Needs(States[Known]):
    """Writes down what is asked for, each state once, in order of first use."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str], CacheRequest] = {}
        super().__init__(self._note)

    def _note(self, request: CacheRequest) -> Parts:
        self.requests.setdefault((request.state, request.key), request)
        return NOTHING


class Cache:
    """The stores of one experiment. Building it hashes the encoders' files, and loads none of them."""

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, Path(config.cache.dir)
        self.digests = Digests(self.folder / "digests.parquet")
        self._stores: dict[str, Store] = {}
        self._files: dict[str, str] = {}

    def states(self) -> States[Known]:
        """The cached states; a missing one is an InputError."""
        return States(self._read)

    def _read(self, request: CacheRequest) -> Parts:
        try:
            return self.store(request.state).read(request.key)
        except KeyError as error:
            raise self.absent(request) from error

    def absent(self, request: CacheRequest) -> InputError:
        """What is raised for a state that is not there."""
        return InputError(f"{self.folder}: {request.label} is not cached; run `ztrain cache`")

    def store(self, kind: str) -> Store:
        if kind not in self._stores:
            folder = self.folder / f"{kind}-{digest_json(self.fingerprint(kind))[:16]}"
            _check_format(folder / "kind.json")
            self._stores[kind] = Store(folder)
        return self._stores[kind]

    def fingerprint(self, kind: str) -> dict[str, Any]:
        """All that decides what the kind's encoder gives for a prompt or picture; docs/training.md, "The cache"."""
        state, encoders = STATES[kind], self.config.encoders.model_dump(mode="json")
        settings = {name: encoders[name] for name in state.settings}
        settings |= {name: encoders[name] for name in state.later_settings if encoders[name] is not None}
        libraries = sorted({name for model in state.models for name in model.libraries})
        return {
            "rules": _RULES,
            "precision": self.config.train.mixed_precision,
            "settings": settings,
            "models": {model.role: self.model_files(model) for model in state.models},
            "libraries": {name: ".".join(version(name).split(".")[:2]) for name in libraries},
        }

    def model_files(self, model: Model[Any]) -> str:
        """Digest of the names and bytes of every file that a model is made from."""
        if model.role not in self._files:
            files = model.files(places_of(self.config.models)(model.key))
            # The name of the repository's own folder is no part of it.
            top = set() if model.key == "base" else {path.parent.name for path in files}
            self._files[model.role] = self._digest(files, top)
        return self._files[model.role]

    def transformer_files(self) -> str:
        """The same of the transformer."""
        if "transformer" not in self._files:
            models = self.config.models
            whole = None if models.transformer_file is None else [Path(models.transformer_file)]
            self._files["transformer"] = self._digest(whole or files_of(Source.of(models.base), "transformer/*"))
        return self._files["transformer"]

    def _digest(self, files: Sequence[Path], top: Set[str] = frozenset()) -> str:
        digests = [[path.name, path.parent.name, self.digests.of_file(path)] for path in files]
        return digest_json(sorted([name, "" if folder in top else folder, d] for name, folder, d in digests))

    def missing(self, needs: Needs) -> list[CacheRequest]:
        return [request for (kind, key), request in needs.requests.items() if key not in self.store(kind)]

    def refusals(self, needs: Needs) -> dict[tuple[str, str], str]:
        """The needed states that cannot be made, with the reason."""
        found: dict[tuple[str, str], str] = {}
        for kind in dict.fromkeys(kind for kind, _ in needs.requests):
            keys = [key for of_kind, key in needs.requests if of_kind == kind]
            found |= {(kind, key): reason for key, reason in self.store(kind).refusals(keys).items()}
        return found

    def identities(self, kinds: Sequence[str]) -> dict[str, dict[str, str]]:
        """The identity of every encoder behind these kinds, as it was when their entries were computed."""
        found: dict[str, dict[str, str]] = {}
        for kind in kinds:
            path = self.store(kind).folder / "kind.json"
            try:
                document = json.loads(read_text(path, "json"))
                if document.pop("xxh3", None) not in (None, digest_json(document)):  # None: of an earlier version
                    raise ValueError("its bytes are not the ones that were written")
                found |= document["identities"]
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{path}: cannot read which encoders made this part of the cache ({error}); delete "
                    f"{path.parent.name} and run `ztrain cache` again"
                ) from error
        return found


def _check_format(path: Path) -> None:
    """Raises InputError for a folder of states that a later version wrote."""
    try:
        version = json.loads(read_text(path, "record")).get("format_version", 1)
    except (OSError, ValueError, AttributeError):
        return  # `identities` says so where it is missed
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: cache format {version!r} is not {FORMAT_VERSION}; update ztrain or name another cache.dir"
        )
