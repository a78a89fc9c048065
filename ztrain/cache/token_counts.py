"""How many tokens the transformer reads of each sample, from the shapes of what is cached for it.

In: samples and their filled cache. Out: a number for each sample, the same on every process that reads the same cache.
No state is read but the kinds of tokens in the spliced model's sequences, which say how many of them a caption takes.
"""

import itertools
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from ztrain.adapters.splice import ComposeConfig, ComposingAdapter
from ztrain.cache.cache import Cache, CacheRequest
from ztrain.conditioning import Encoded, text_conditioning
from ztrain.config import Config
from ztrain.model.dit import PATCH
from ztrain.images import IMAGE_MULTIPLE, Bucket
from ztrain.model.layout import MULTIPLE, padded
from ztrain.cache.samples import Sample
from ztrain.frozen.states import STATES, Parts, States, assemble

_CHUNK = 256  # forms of samples that are assembled together


def token_counts(config: Config, cache: Cache, samples: Sequence[Sample]) -> NDArray[np.int32]:
    """Tokens of each sample's sequence in the main blocks, before dropout takes any away: (len(samples), C, V), with
    each of its captions and variants of its references, 0 where others have more of them.

    Each part is padded to a multiple of 32, as layout.py and diffusers' omni mode do. Raises InputError for a shard
    that is damaged or a state that is not there.
    """
    # Without statistics: they change states and never how many there are.
    plain = {"scaling": "none", "statistics_file": None}
    composing = [
        ComposingAdapter(cast(ComposeConfig, adapter.model_copy(update=plain)))
        for adapter in config.adapters
        if adapter.composes_reference
    ]
    shapes = _Shapes(cache, config.data.dataloader_num_workers)
    captions: dict[tuple[object, ...], int] = {}
    most = np.array([sample.choices for sample in samples]).max(0)
    counts = np.zeros((len(samples), *most), dtype=np.int32)
    forms = ((place, *form) for place, sample in enumerate(samples) for form in sample.forms())
    while chunk := list(itertools.islice(forms, _CHUNK)):
        prompts, references = [form.prompt for *_, form in chunk], [form.references for *_, form in chunk]
        encoded = assemble(States(shapes.get), prompts, references, config.reads)
        for i, (*place, form) in enumerate(chunk):
            # The sequences of one kind of tokens are one tensor: see _Shapes.
            sequences = (each and id(each.kinds) for each in (encoded.reference[i], encoded.fused[i]))
            segments = [len(segment) for segment in encoded.omni[i].segments] if encoded.omni else []
            alike = (len(encoded.text[i]), *sequences, *segments)
            if alike not in captions:
                captions[alike] = _of_caption(composing, encoded.select([i]))
            counts[*place] = _of_pictures(encoded, i, form.bucket) + captions[alike]
    return counts


class _Shapes:
    """Cached states without their values: one tensor for all of a shape, and one for all sequences with the same kinds
    of tokens. Of states (L, D) there is one column."""

    def __init__(self, cache: Cache, workers: int) -> None:
        self._cache, self._workers = cache, workers
        self._found: dict[str, dict[str, Parts]] = {}  # by kind and key

    def get(self, request: CacheRequest) -> Parts:
        kind = request.state
        if kind not in self._found:
            self._found[kind] = self._sequences(kind) if STATES[kind].has_kinds else self._shapes(kind)
        try:
            return self._found[kind][request.key]
        except KeyError as error:
            raise self._cache.absent(request) from error

    def _shapes(self, kind: str) -> dict[str, Parts]:
        shapes = self._cache.store(kind).shapes("states", self._workers)
        columns = {shape: (*shape[:-1], 1) if len(shape) == 2 else shape for shape in set(shapes.values())}
        made = {shape: {"states": torch.zeros(()).expand(column)} for shape, column in columns.items()}
        return {key: made[shape] for key, shape in shapes.items()}

    def _sequences(self, kind: str) -> dict[str, Parts]:
        kinds = self._cache.store(kind).shared("kinds")
        distinct = {id(each): each for each in kinds.values()}
        made = {place: {"states": torch.zeros((len(each), 1)), "kinds": each} for place, each in distinct.items()}
        return {key: made[id(each)] for key, each in kinds.items()}


def _of_pictures(encoded: Encoded, i: int, bucket: Bucket) -> int:
    """Of sample i: target, SigLIP grids and clean latents."""
    target = padded(bucket.height // IMAGE_MULTIPLE * (bucket.width // IMAGE_MULTIPLE))
    siglip = sum(padded(grid.shape[0] * grid.shape[1]) for grid in encoded.siglip[i])
    if not encoded.omni or not encoded.omni[i].latents:
        return target + siglip
    clean = sum(padded(x.shape[-2] // PATCH * (x.shape[-1] // PATCH)) for x in encoded.omni[i].latents)
    # The target has no SigLIP tokens, and padding in their place.
    return target + siglip + clean + MULTIPLE


def _of_caption(composing: Sequence[ComposingAdapter], encoded: Encoded) -> int:
    """Of one sample. What adapters have learned changes states and never how many there are: it is left out."""
    if encoded.omni:
        return sum(padded(len(segment)) for segment in encoded.omni[0].segments)
    conditioning = text_conditioning(encoded)
    for adapter in composing:
        conditioning = adapter(conditioning, encoded)
    return padded(len(conditioning.caption[0]))
