"""Which states training needs, what each depends on, and reading them back.

A store for each kind of state lies in a folder named by a fingerprint of all that changes what its encoder gives;
entries are named by prompt, picture bytes and size. So another encoder, setting, picture or prompt is another name: a
stale entry cannot be found, and only what changed is computed again (fill.py). Nothing here loads an encoder.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from ztrain.conditioning import TokenStates
from ztrain.config import Config
from ztrain.digests import Digests, Known
from ztrain.errors import InputError
from ztrain.files import read_text
from ztrain.images import Bucket
from ztrain.models import Source
from ztrain.store import Store
from ztrain.vision_language import weight_files

StateName = Literal["latents", "clean_latents", "siglip", "text", "segment", "reference", "fused"]

FORMAT_VERSION = 1
"""Of a folder of states, in its kind.json; one that says none is of format 1. Raise it when what a folder holds is
written otherwise: tests/test_golden.py."""

_RULES = 1  # part of every fingerprint: raise it when this package comes to prepare inputs or read states otherwise

# Encoder settings that a kind depends on; the others leave it valid.
_SPLICE_SETTINGS = (
    "hidden_index rope_theta positions deepstack marker_rows min_reference_pixels max_reference_pixels".split()
)
_SETTINGS: dict[StateName, list[str]] = {
    "latents": [],
    "clean_latents": [],
    "siglip": [],
    "text": ["max_sequence_length"],
    "segment": ["max_sequence_length"],
    "reference": _SPLICE_SETTINGS,
    "fused": [*_SPLICE_SETTINGS, "fused_order"],
}
_OPTIONAL: dict[StateName, list[str]] = {"reference": ["text_hidden_index"], "fused": ["text_hidden_index"]}
# Models that a kind is computed with, by role, and the libraries whose preprocessing it goes through.
ROLES: dict[StateName, list[str]] = {
    "latents": ["vae"],
    "clean_latents": ["vae"],
    "siglip": ["siglip"],
    "text": ["text_encoder"],
    "segment": ["text_encoder"],
    "reference": ["text_encoder", "vision_language"],
    "fused": ["text_encoder", "vision_language"],
}
_LIBRARIES = {"vae": ["diffusers", "pillow"], "siglip": ["transformers", "pillow"], "text_encoder": ["transformers"]}
_LIBRARIES["vision_language"] = ["transformers", "pillow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One state: of which kind, and from what."""

    state: StateName
    text: str = ""
    pictures: tuple[Known, ...] = ()
    bucket: Bucket | None = None

    @property
    def key(self) -> str:
        size = None if self.bucket is None else [self.bucket.height, self.bucket.width]
        return digest_json([self.text, [known.identity for known in self.pictures], size])

    @property
    def label(self) -> str:
        """What messages call it, without the path of this machine."""
        names = [known.label for known in self.pictures]
        return f"{self.state} of {' + '.join([*names, *([repr(self.text[:60])] if self.text or not names else [])])}"


class RequestedStates:
    """encoders.States over requests: `get` answers them, from a cache or by writing them down."""

    def __init__(self, get: Callable[[Request], dict[str, Tensor]]) -> None:
        self._get = get

    def latents(self, target: Known, bucket: Bucket) -> Tensor:
        """(C, H, W) of a target, in the VAE's precision."""
        return self._get(Request(state="latents", pictures=(target,), bucket=bucket))["states"]

    def text(self, prompt: str) -> Tensor:
        return self._get(Request(state="text", text=prompt))["states"]

    def segment(self, text: str) -> Tensor:
        return self._get(Request(state="segment", text=text))["states"]

    def reference(self, references: Sequence[Known]) -> TokenStates:
        parts = self._get(Request(state="reference", pictures=tuple(references)))
        return TokenStates(parts["states"], parts["kinds"])

    def fused(self, references: Sequence[Known], prompt: str) -> TokenStates:
        parts = self._get(Request(state="fused", pictures=tuple(references), text=prompt))
        return TokenStates(parts["states"], parts["kinds"])

    def siglip(self, reference: Known) -> Tensor:
        return self._get(Request(state="siglip", pictures=(reference,)))["states"]

    def clean_latents(self, reference: Known) -> Tensor:
        return self._get(Request(state="clean_latents", pictures=(reference,)))["states"]


class Needs(RequestedStates):
    """Writes down what is asked for, each state once, in order of first use."""

    def __init__(self) -> None:
        self.requests: dict[tuple[StateName, str], Request] = {}
        super().__init__(self._note)

    def _note(self, request: Request) -> dict[str, Tensor]:
        self.requests.setdefault((request.state, request.key), request)
        nothing = torch.empty(0)
        return {"states": nothing, "kinds": nothing}


class Cache:
    """The stores of one experiment. Building it hashes the encoders' files, and loads none of them."""

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, Path(config.cache.dir)
        self.digests = Digests(self.folder / "digests.parquet")
        self._stores: dict[StateName, Store] = {}
        self._files: dict[str, str] = {}

    def states(self) -> RequestedStates:
        """The cached states; a missing one is an InputError."""
        return RequestedStates(self._read)

    def _read(self, request: Request) -> dict[str, Tensor]:
        try:
            return self.store(request.state).read(request.key)
        except KeyError as error:
            raise self.absent(request) from error

    def absent(self, request: Request) -> InputError:
        """What is raised for a state that is not there."""
        return InputError(f"{self.folder}: {request.label} is not cached; run `ztrain cache`")

    def store(self, kind: StateName) -> Store:
        if kind not in self._stores:
            folder = self.folder / f"{kind}-{digest_json(self.fingerprint(kind))[:16]}"
            _check_format(folder / "kind.json")
            self._stores[kind] = Store(folder)
        return self._stores[kind]

    def fingerprint(self, kind: StateName) -> dict[str, Any]:
        """All that decides what the kind's encoder gives for a prompt or picture; docs/training.md, "The cache"."""
        encoders = self.config.encoders.model_dump(mode="json")
        settings = {name: encoders[name] for name in _SETTINGS[kind]}
        # Left out where it is not set, so that what was cached before there was such a setting is found.
        settings |= {name: encoders[name] for name in _OPTIONAL.get(kind, ()) if encoders[name] is not None}
        libraries = sorted({name for role in ROLES[kind] for name in _LIBRARIES[role]})
        return {
            "rules": _RULES,
            "precision": self.config.train.mixed_precision,
            "settings": settings,
            "models": {role: self.model_files(role) for role in ROLES[kind]},
            "libraries": {name: ".".join(version(name).split(".")[:2]) for name in libraries},
        }

    def model_files(self, role: str) -> str:
        """Digest of the names and bytes of every file that a model is made from; `transformer` is a role too."""
        if role not in self._files:
            models = self.config.models
            match role:
                case "vae":
                    source, files = _files(Source.of(models.base), "vae/*")
                case "transformer" if models.transformer_file is not None:
                    source, files = Source.of(models.base), [Path(models.transformer_file)]
                case "transformer":
                    source, files = _files(Source.of(models.base), "transformer/*")
                case "text_encoder":
                    source, files = _files(Source.of(models.base), "text_encoder/*", "tokenizer/*")
                case "siglip":
                    source, files = _files(Source.of(models.siglip), "*")
                case _:
                    source, files = _files(Source.of(models.vision_language), "*.json")
                    files += weight_files(source)
            digests = [[path.name, path.parent.name, self.digests.of_file(path)] for path in files]
            # The name of the repository's own folder is no part of it.
            top = {path.parent.name for path in files} if role in ("siglip", "vision_language") else set()
            self._files[role] = digest_json(sorted([n, "" if p in top else p, d] for n, p, d in digests))
        return self._files[role]

    def missing(self, needs: Needs) -> list[Request]:
        return [request for (kind, key), request in needs.requests.items() if key not in self.store(kind)]

    def refusals(self, needs: Needs) -> dict[tuple[StateName, str], str]:
        """The needed states that cannot be made, with the reason."""
        found: dict[tuple[StateName, str], str] = {}
        for kind in dict.fromkeys(kind for kind, _ in needs.requests):
            keys = [key for of_kind, key in needs.requests if of_kind == kind]
            found |= {(kind, key): reason for key, reason in self.store(kind).refusals(keys).items()}
        return found

    def identities(self, kinds: Sequence[StateName]) -> dict[str, dict[str, str]]:
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


def _files(source: Source, *patterns: str) -> tuple[Source, list[Path]]:
    suffixes = {".json", ".safetensors", ".txt", ".model", ".jinja"}
    return source, [path for path in source.files(*patterns) if path.suffix in suffixes]


def digest_json(value: Any) -> str:
    """128-bit digest of JSON values, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode(errors="surrogateescape")
    )
