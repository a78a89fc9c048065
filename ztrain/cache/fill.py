"""Fills a cache: loads the encoders, one group at a time, and computes the states that are missing.

In: a `Cache` and what is needed of it. Out: published shards. Any number of processes may fill one cache; each shard is
written by one. Interrupted, it goes on where it was. Pictures are decoded and shards written by threads meanwhile.
"""

import gc
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ztrain.cache.cache import FORMAT_VERSION, Cache, CacheRequest, Needs
from ztrain.config import Config
from ztrain.data.digests import Known, digest_bytes, digest_json
from ztrain.errors import InputError
from ztrain.io.files import may_write, workspace, write_json
from ztrain.images import decode_image, read_picture
from ztrain.frozen.sources import base_dtype, places_of
from ztrain.frozen.states import STATES, Encoders
from ztrain.io.store import Entry

TOLERANCE = 1e-2
"""Largest relative difference that verify puts up with: another GPU or library build rounds differently."""

_AHEAD = 4  # decoded pictures that wait for the encoder, for each worker


@dataclass(slots=True)
class FillCounts:
    """What a process did, or several: states computed by kind, sentences for those that could not be, seconds in all,
    seconds in which there was something to encode, and of those the encoders' own, summed over processes."""

    computed: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    seconds: float = 0.0
    encoding_seconds: float = 0.0
    busy_seconds: float = 0.0
    by_process: list[int] = field(default_factory=list)
    """States that each computed, where there are several."""

    @classmethod
    def of_all(cls, parts: Sequence["FillCounts"]) -> "FillCounts":
        """What several processes did at the same time."""
        return cls(
            computed=sum((part.computed for part in parts), Counter()),
            refused=[sentence for part in parts for sentence in part.refused],
            seconds=max(part.seconds for part in parts),
            encoding_seconds=sum(part.encoding_seconds for part in parts),
            busy_seconds=sum(part.busy_seconds for part in parts),
            by_process=[sum(part.computed.values()) for part in parts],
        )

    def add(self, later: "FillCounts") -> None:
        """What the same process did after this."""
        self.computed += later.computed
        self.refused += later.refused
        self.seconds += later.seconds
        self.encoding_seconds += later.encoding_seconds
        self.busy_seconds += later.busy_seconds

    @property
    def busy_share(self) -> float:
        """Share of the encoding time in which an encoder, its own preprocessing included, was at work, 0..1: the rest
        is waiting for pictures and for shards to be written."""
        return self.busy_seconds / self.encoding_seconds if self.encoding_seconds else 1.0


def _together() -> list[list[str]]:
    """States whose models are in memory together: those with the same first one."""
    firsts = dict.fromkeys(state.models[:1] for state in STATES.values())
    return [[kind for kind, state in STATES.items() if state.models[:1] == first] for first in firsts]


def _load(config: Config, requests: Iterable[CacheRequest], device: torch.device | str) -> Encoders:
    models = {model for request in requests for model in STATES[request.state].models}
    dtype = base_dtype(config.train.mixed_precision)
    return Encoders().add(models, places_of(config.models), config.encoders, dtype, device)


def fill(
    cache: Cache,
    needs: Needs,
    device: torch.device | str,
    *,
    progress: bool = True,
    is_over: Callable[[], bool] = lambda: False,
) -> FillCounts:
    """Computes what is missing of `needs`, in this process, and waits for what others are at work on.

    is_over: asked before each shard; where it is true, for instance as another process has failed, nothing more is
    begun. A prompt or picture that cannot be encoded is written down as refused and counted; raises InputError for what
    makes further work pointless: a model that does not load, a full disk.
    """
    filled, started = FillCounts(), time.perf_counter()
    missing = cache.missing(needs)
    if missing:
        _require_writable(cache, missing)
        with workspace(cache.folder) as scratch:
            for kinds in _together():
                if todo := [request for request in missing if request.state in kinds]:
                    _Filling(cache, needs, scratch, filled, is_over).run(todo, device, progress)
        gc.collect()  # the encoders' modules refer to each other: without this they stay until Python feels like it
    filled.seconds = time.perf_counter() - started
    return filled


def _require_writable(cache: Cache, missing: Sequence[CacheRequest]) -> None:
    """Raises InputError where somebody else's cache lacks something: before an encoder is loaded for it."""
    stores = [cache.store(kind).folder for kind in dict.fromkeys(request.state for request in missing)]
    for folder in (cache.folder, *(folder / name for folder in stores for name in (".", "index", "claims"))):
        if not may_write(folder):
            fault = "this user may not write there" if folder.is_dir() or not folder.exists() else "is no folder"
            raise InputError(
                f"{folder}: {fault}, and {len(missing)} states are not cached, first {missing[0].label}; run "
                "`ztrain cache` as a user who may, or set another cache.dir"
            )


def verify(cache: Cache, needs: Needs, device: torch.device | str) -> str:
    """Checks every needed entry's bytes and computes a share of them again; says what was compared.

    Raises InputError that names every damaged shard, or a state that comes out otherwise now.
    """
    if missing := cache.missing(needs):
        raise InputError(
            f"{cache.folder}: {len(missing)} states are not cached, first {missing[0].label}; fill it first"
        )
    refused = cache.refusals(needs)
    present = [request for place, request in needs.requests.items() if place not in refused]
    damaged: dict[str, None] = {}
    for request in tqdm(present, desc="checking bytes", unit="state", disable=None):
        try:
            cache.store(request.state).read(request.key)
        except InputError as error:
            damaged[str(error)] = None
    if damaged:
        raise InputError("; ".join(damaged))
    worst, count = 0.0, 0
    for kinds in _together():
        chosen = [request for kind in kinds for request in _share(cache.config, present, kind)]
        encoders = _load(cache.config, chosen, device)
        for request, images in _decoded(chosen, cache.config.data.dataloader_num_workers):
            if isinstance(images, InputError):
                raise images
            parts = encoders.compute(request, images, cache.config.encoders)
            kept = cache.store(request.state).read(request.key)
            difference = max(_difference(tensor.cpu(), kept[part]) for part, tensor in parts.items())
            worst, count = max(worst, difference), count + 1
            if difference > TOLERANCE:
                raise InputError(
                    f"{cache.folder}: {request.label} comes out {difference:.1%} away from the cached one: its encoder"
                    f" or inputs changed unseen; delete {cache.store(request.state).folder.name} and fill it again"
                )
    return f"{len(present)} states are whole; {count} computed again, largest relative difference {worst:.1e}"


def _share(config: Config, requests: Sequence[CacheRequest], kind: str) -> list[CacheRequest]:
    of_kind = [request for request in requests if request.state == kind]
    return random.Random(config.seed).sample(of_kind, math.ceil(len(of_kind) * config.cache.verify_share))


def _difference(tensor: Tensor, kept: Tensor) -> float:
    """Norm of the difference over the norm of what was kept; infinite for another shape or precision."""
    if tensor.shape != kept.shape or tensor.dtype != kept.dtype or not (tensor.isfinite() & kept.isfinite()).all():
        return math.inf
    difference = (tensor.double() - kept.double()).norm()
    return float(difference / kept.double().norm().clamp_min(1e-30)) if difference > 0 else 0.0


Decoded = list[Image.Image] | InputError


def _decode(request: CacheRequest) -> Decoded:
    """The request's pictures as its encoder takes them, or what is wrong with what is in one.

    Raises InputError, which ends the filling, for a picture that cannot be read or is not the one that was listed: that
    is no property of the entry, which is named by the listed picture's bytes.
    """
    contents = [read_picture(known.picture) for known in request.pictures]
    for data, known in zip(contents, request.pictures, strict=True):
        if digest_bytes(data) != known.digest:
            raise InputError(f"{known.picture.name}: the picture has changed since it was listed; run again")
    try:
        images = [_shown(data, known) for data, known in zip(contents, request.pictures, strict=True)]
        return [STATES[request.state].prepare(image, request.bucket) for image in images]
    except InputError as error:
        return error


def _shown(data: bytes, known: Known) -> Image.Image:
    """The picture in its bytes, or the part of it that is meant. Raises InputError."""
    whole = decode_image(data, known.picture.name)
    return whole if known.part is None else known.part.of(whole)


def _decoded(requests: Iterable[CacheRequest], workers: int) -> Iterator[tuple[CacheRequest, Decoded]]:
    """Requests with their pictures, decoded by threads some way ahead of the consumer."""
    waiting: list[tuple[CacheRequest, Future[Decoded]]] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for request in requests:
            waiting.append((request, pool.submit(_decode, request)))
            if len(waiting) > _AHEAD * max(1, workers):
                done, future = waiting.pop(0)
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


@dataclass(slots=True)
class _Shard:
    """A shard that this process has claimed and is at work on."""

    state: str
    name: str
    claim: ExitStack
    size: int
    entries: list[Entry] = field(default_factory=list)


class _Filling:
    """One pass over the missing states of one group: claims shards, computes their entries, publishes them."""

    def __init__(self, cache: Cache, needs: Needs, scratch: Path, filled: FillCounts, is_over: Callable[[], bool]) -> None:
        self.cache, self.needs, self.scratch, self.filled, self.is_over = cache, needs, scratch, filled, is_over
        self.open: dict[tuple[str, str], _Shard] = {}  # by kind and key of each entry
        self.settled: set[tuple[str, str]] = set()  # kind and claim of shards that somebody has done, or this one

    def run(self, missing: Sequence[CacheRequest], device: torch.device | str, progress: bool) -> None:
        """Computes `missing`. Shards that another process is at work on are waited for at the end.

        The progress is that of all processes, as this one sees it when it comes to each shard.
        """
        kinds = {request.state for request in missing}
        encoders = _load(self.cache.config, missing, device)
        identities = encoders.identities
        for kind in sorted(kinds):
            self._describe(kind, identities)
        workers, started = self.cache.config.data.dataloader_num_workers, time.perf_counter()
        description = "encoding " + " + ".join(sorted(kinds))
        with (
            tqdm(total=len(missing), desc=description, unit="state", disable=None if progress else True) as bar,
            ThreadPoolExecutor(1) as writer,
            ExitStack() as cleanup,
        ):
            cleanup.callback(self._give_back)
            for wait in (False, True):
                written: list[Future[None]] = []
                for request, images in _decoded(self._claimed(missing, wait, bar), workers):
                    shard = self.open[request.state, request.key]
                    shard.entries.append(self._entry(encoders, request, images))
                    bar.update()
                    if len(shard.entries) == shard.size:
                        written.append(writer.submit(self._publish, shard))
                    while written and written[0].done():
                        written.pop(0).result()  # a full disk ends the work here, not after hours
                for future in written:
                    future.result()
        self.filled.encoding_seconds += time.perf_counter() - started
        for kind in kinds:
            self.cache.store(kind).compact(self.scratch)

    def _describe(self, kind: str, identities: dict[str, dict[str, str]]) -> None:
        """kind.json: what the fingerprint was made of, in words, and the identity of the encoders."""
        store = self.cache.store(kind)
        known = {model.role: identities[model.role] for model in STATES[kind].models}
        made_of = self.cache.fingerprint(kind)
        document = {"format_version": FORMAT_VERSION, "kind": kind, "fingerprint": made_of, "identities": known}
        write_json(store.folder / "kind.json", document | {"xxh3": digest_json(document)})

    def _claimed(self, missing: Sequence[CacheRequest], wait: bool, bar: tqdm) -> Iterator[CacheRequest]:
        """The requests of every shard that this process claims, shard after shard, less what has been done since.

        Shards are cut from all that is needed, not from what is missing: so processes that start at different times
        agree on their borders.
        """
        missing_keys = {(request.state, request.key) for request in missing}
        size = self.cache.config.cache.entries_per_shard
        for kind in sorted({request.state for request in missing}):
            of_kind = [request for (needed, _), request in self.needs.requests.items() if needed == kind]
            for start in range(0, len(of_kind), size):
                piece = of_kind[start : start + size]
                wanted = [request for request in piece if (kind, request.key) in missing_keys]
                name = digest_json([request.key for request in piece])
                if self.is_over():
                    return
                if not wanted or (kind, name) in self.settled:
                    continue
                todo = self._claim(kind, name, wanted, wait)
                if todo is not None:
                    self.settled.add((kind, name))
                    bar.update(len(wanted) - len(todo))
                    yield from todo

    def _claim(self, kind: str, name: str, wanted: list[CacheRequest], wait: bool) -> list[CacheRequest] | None:
        """What is left for this process to do of a shard; None where another one is at work on it."""
        store = self.cache.store(kind)
        if all(request.key in store for request in wanted):
            return []
        claim = ExitStack()
        if not claim.enter_context(store.claim(name, wait=wait)):
            claim.close()
            return None
        store.reload()
        todo = [request for request in wanted if request.key not in store]
        # The name says what is in the shard, so that a later one, with what was missing here, is another file.
        shard = _Shard(kind, digest_json([request.key for request in todo]), claim, len(todo))
        self.open |= {(kind, request.key): shard for request in todo}
        if not todo:
            claim.close()
        return todo

    def _entry(self, encoders: Encoders, request: CacheRequest, images: Decoded) -> Entry:
        started = time.perf_counter()
        try:
            if isinstance(images, InputError):
                raise images
            computed = encoders.compute(request, images, self.cache.config.encoders)
            parts, refused = {part: tensor.cpu() for part, tensor in computed.items()}, ""
            if not all(tensor.isfinite().all() for tensor in parts.values()):
                raise InputError(f"{request.label}: the encoder gives values that are not finite")
        except InputError as error:
            parts, refused = {}, str(error)
            for known in request.pictures:  # the index holds no path of this machine
                refused = refused.replace(known.picture.name, Path(known.picture.name).name)
            self.filled.refused.append(refused)
        self.filled.busy_seconds += time.perf_counter() - started
        self.filled.computed[request.state] += 1
        return Entry(key=request.key, label=request.label, parts=parts, refused=refused)

    def _publish(self, shard: _Shard) -> None:
        self.cache.store(shard.state).write(shard.name, shard.entries, self.scratch)
        shard.entries.clear()
        shard.claim.close()

    def _give_back(self) -> None:
        """Claims of shards that an error kept from being finished; closing one twice does nothing."""
        for shard in self.open.values():
            shard.claim.close()
