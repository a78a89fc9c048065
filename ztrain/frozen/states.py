"""The table of encoded states, and the one function that says which of them a triplet needs.

An encoded state is what a frozen model gives for a text, for pictures or for both: hidden states of a prompt, latents
of a target, the SigLIP grid of a reference. `STATES` says of each what it is computed with, how, and on which settings
it depends. A new encoder is one entry there and one field of `Encoded`, of the same name.

`assemble` says what a triplet needs. It asks a `States` for one state after the other, and a `States` is one function
from a `Request` to tensors. Each of these gives another function, and so none of them can forget a state:

- `Encoders.states` computes what is asked for: sampling.
- `cache.Cache.states` reads it from disk: training.
- `cache.Needs` only writes the request down: what the cache must hold before training starts.
- `token_counts` (cache/token_counts.py) answers with tensors of the right shape: how long a sample's sequence is.
- `requests_of` lists what one triplet asks for: which models must be loaded.

Legend: B batch, R references of a sample, L tokens, D text width, C latent channels, H and W latent sides, (h, w, S)
SigLIP grid and width.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from ztrain.conditioning import Encoded, StockOmni, TokenStates, weighted
from ztrain.config import Config, EncodersConfig
from ztrain.data.digests import Known, digest_json
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec, SiglipEncoder, TextEncoder, omni_crop, siglip_width
from ztrain.frozen.sources import Source, identity, places_of
from ztrain.frozen.vision_language import SplicedModel, weight_files
from ztrain.images import Bucket, fit_target

Reference = TypeVar("Reference")
"""What stands for a picture: itself where states are computed, what names it where they are read from a cache."""
Encoder = TypeVar("Encoder")
Parts = dict[str, Tensor]
"""The tensors of a state: `states`, and `kinds` of the tokens where State.has_kinds."""

NOTHING: Parts = {"states": torch.empty(0), "kinds": torch.empty(0)}
"""For what only notes requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Generic[Reference]):
    """One state: which one, and from what."""

    state: str
    text: str = ""
    pictures: tuple[Reference, ...] = ()
    bucket: Bucket | None = None

    @property
    def key(self: "Request[Known]") -> str:
        """Its name in the cache's store of that state."""
        size = None if self.bucket is None else [self.bucket.height, self.bucket.width]
        return digest_json([self.text, [known.identity for known in self.pictures], size])

    @property
    def label(self: "Request[Known]") -> str:
        """What messages call it, without the path of this machine."""
        names = [known.label for known in self.pictures]
        return f"{self.state} of {' + '.join([*names, *([repr(self.text[:60])] if self.text or not names else [])])}"


class States(Generic[Reference]):
    """Encoded states, one at a time. `get` answers a request."""

    def __init__(self, get: Callable[[Request[Reference]], Parts]) -> None:
        self._get = get

    def tensor(self, state: str, *, text: str = "", pictures: Sequence[Reference] = ()) -> Tensor:
        return self._get(Request(state=state, text=text, pictures=tuple(pictures)))["states"]

    def sequence(self, state: str, pictures: Sequence[Reference], text: str) -> TokenStates:
        parts = self._get(Request(state=state, text=text, pictures=tuple(pictures)))
        return TokenStates(parts["states"], parts["kinds"])

    def text(self, prompt: str) -> Tensor:
        return self.tensor("text", text=prompt)

    def latents(self, target: Reference, bucket: Bucket) -> Tensor:
        """(C, H, W) of a target at that size, in the VAE's precision."""
        return self._get(Request(state="latents", pictures=(target,), bucket=bucket))["states"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Triplets(Generic[Reference]):
    """Prompts and references that a batch is assembled from.

    weights: B x R factors > 0 on the attention to each reference, which is then read alone; empty: the references of a
    sample are read in one sequence.
    """

    states: States[Reference]
    prompts: Sequence[str]
    references: Sequence[Sequence[Reference]]
    weights: list[list[float]]
    negative_prompt: str

    def sequences(self, state: str, texts: Sequence[str]) -> list[TokenStates | None]:
        """Each sample's references with its text in one sequence; None without references."""
        return [self._sequence(state, i, text) if self.references[i] else None for i, text in enumerate(texts)]

    def _sequence(self, state: str, i: int, text: str) -> TokenStates:
        pictures = self.references[i]
        if not self.weights:
            return self.states.sequence(state, pictures, text)
        return weighted([self.states.sequence(state, [each], text) for each in pictures], self.weights[i])

    def each(self, state: str) -> list[list[Tensor]]:
        """B x R: every reference alone."""
        return [[self.states.tensor(state, pictures=[picture]) for picture in sample] for sample in self.references]

    def omni(self, prompts: Sequence[str], *, bare: bool = False) -> list[StockOmni]:
        """Each sample in the layout of diffusers' omni pipeline; bare: without its references."""
        return [
            StockOmni(
                segments=[self.states.tensor("segment", text=text) for text in _omni_segments(prompt, len(pictures))],
                latents=[self.states.tensor("clean_latents", pictures=[picture]) for picture in pictures],
            )
            for prompt, pictures in zip(prompts, [()] * len(prompts) if bare else self.references, strict=True)
        ]

    @property
    def null(self) -> list[str]:
        """What is read in place of each prompt where guidance or dropout takes it away."""
        return [self.negative_prompt] * len(self.prompts)


def _omni_segments(prompt: str, num_references: int) -> list[str]:
    """Caption segments as ZImageOmniPipeline.encode_prompt writes them."""
    if not num_references:
        return [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"]
    return [
        "<|im_start|>user\n<|vision_start|>",
        *["<|vision_end|><|vision_start|>"] * (num_references - 1),
        f"<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>",
        "<|vision_end|><|im_end|>",
    ]


@dataclass(frozen=True, eq=False)
class Model(Generic[Encoder]):
    """A frozen model that states are computed with.

    role: its name wherever models are compared; key: of config.models; libraries: those that prepare its inputs; files:
    all that it is made from; load: called with the encoders that are there already, its source, the most tokens of a
    prompt, dtype and device; module: the part that tells one checkpoint from another; settings: keys of the module's
    config that decide how its weights are used (libraries add others between versions).
    """

    role: str
    key: str
    libraries: tuple[str, ...]
    files: Callable[[Source], list[Path]]
    load: Callable[["Encoders", Source, int, torch.dtype, torch.device | str], Encoder]
    module: Callable[[Encoder], nn.Module]
    settings: str


def files_of(source: Source, *patterns: str) -> list[Path]:
    """Those that decide what a model computes."""
    suffixes = {".json", ".safetensors", ".txt", ".model", ".jinja"}
    return [path for path in source.files(*patterns) if path.suffix in suffixes]


@dataclass(frozen=True, kw_only=True)
class State:
    """An encoded state.

    encode: called with encoders, prepared pictures, text and settings; prepare: a picture as its encoder takes it, at
    the size asked for if there is one; settings: keys of `encoders` that it depends on; later_settings: the same, no
    part of the fingerprint where they are None, so that what was cached before they came is found; has_kinds: whether
    it is a sequence of the vision-language model, with what each token is; fields: those of `Encoded`, where adapters
    read it by its name.
    """

    models: tuple[Model[Any], ...]
    encode: Callable[["Encoders", Sequence[Image.Image], str, EncodersConfig], Tensor | TokenStates]
    prepare: Callable[[Image.Image, Bucket | None], Image.Image] = lambda image, bucket: image
    settings: tuple[str, ...] = ()
    later_settings: tuple[str, ...] = ()
    has_kinds: bool = False
    fields: Callable[[Triplets[Any]], dict[str, Any]] | None = None


def _fused(batch: Triplets[Any]) -> dict[str, Any]:
    fused = batch.sequences("fused", batch.prompts)
    return {"fused": fused, "null_fused": batch.sequences("fused", batch.null) if batch.negative_prompt else []}


def _omni(batch: Triplets[Any]) -> dict[str, Any]:
    shown = {"omni": batch.omni(batch.prompts), "null_omni": batch.omni(batch.null)}
    bare = {"bare_omni": batch.omni(batch.prompts, bare=True), "null_bare_omni": batch.omni(batch.null, bare=True)}
    return shown | bare


# fmt: off
VAE: Model[LatentCodec] = Model(
    "vae", "base", ("diffusers", "pillow"), lambda source: files_of(source, "vae/*"),
    load=lambda by, source, length, *to: LatentCodec.load(source, *to),
    module=lambda codec: codec.vae, settings="latent_channels block_out_channels scaling_factor shift_factor")
TEXT_ENCODER: Model[TextEncoder] = Model(
    "text_encoder", "base", ("transformers",), lambda source: files_of(source, "text_encoder/*", "tokenizer/*"),
    load=lambda by, source, length, *to: TextEncoder.load(source, length, *to),
    module=lambda text: text.model,
    settings="hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps rope_theta")
VISION_LANGUAGE: Model[SplicedModel] = Model(  # the vision part alone: the language model is the text encoder
    "vision_language", "vision_language", ("transformers", "pillow"),
    lambda source: files_of(source, "*.json") + weight_files(source),
    load=lambda by, source, length, *to: SplicedModel(source, by.text.model, by.text.tokenizer),
    module=lambda spliced: spliced.model.visual,
    settings="depth hidden_size out_hidden_size patch_size spatial_merge_size deepstack_visual_indexes")
SIGLIP: Model[SiglipEncoder] = Model(
    "siglip", "siglip", ("transformers", "pillow"), lambda source: files_of(source, "*"),
    load=lambda by, source, length, *to: SiglipEncoder(source, *to),
    module=lambda siglip: siglip.model, settings="hidden_size num_hidden_layers num_attention_heads patch_size")

_OF_SPLICE = ("hidden_index", "rope_theta", "positions", "deepstack", "marker_rows", "min_reference_pixels",
              "max_reference_pixels")
STATES: dict[str, State] = {
    "latents": State(  # of the target, (C, H, W)
        models=(VAE,), encode=lambda by, images, text, settings: by[VAE].encode(images[0]),
        prepare=lambda image, bucket: image if bucket is None else fit_target(image, bucket)),
    "reference": State(  # one or more images alone through the spliced model, (L, D)
        models=(TEXT_ENCODER, VISION_LANGUAGE), settings=_OF_SPLICE, later_settings=("text_hidden_index",),
        encode=lambda by, images, text, settings: by[VISION_LANGUAGE].encode(images, text, settings), has_kinds=True,
        fields=lambda batch: {"reference": batch.sequences("reference", [""] * len(batch.prompts))}),
    "fused": State(  # images and prompt in one sequence, (L, D)
        models=(TEXT_ENCODER, VISION_LANGUAGE), settings=(*_OF_SPLICE, "fused_order"),
        later_settings=("text_hidden_index",), has_kinds=True,
        encode=lambda by, images, text, settings: by[VISION_LANGUAGE].encode(images, text, settings), fields=_fused),
    "text": State(  # the prompt's chat turn, (L, D)
        models=(TEXT_ENCODER,), settings=("max_sequence_length",),
        encode=lambda by, images, text, settings: by[TEXT_ENCODER].encode(text),
        fields=lambda batch: {"text": [batch.states.text(prompt) for prompt in batch.prompts],
                              "null_text": batch.states.text(batch.negative_prompt)}),
    "siglip": State(  # of one reference, (h, w, S)
        models=(SIGLIP,), encode=lambda by, images, text, settings: by[SIGLIP].encode(images[0]),
        fields=lambda batch: {"siglip": batch.each("siglip"), "siglip_weights": batch.weights}),
    "segment": State(  # a text as it stands, (L, D)
        models=(TEXT_ENCODER,), settings=("max_sequence_length",),
        encode=lambda by, images, text, settings: by[TEXT_ENCODER].encode_segment(text)),
    "clean_latents": State(  # of one reference of the stock omni layout, (C, h, w)
        models=(VAE,), encode=lambda by, images, text, settings: by[VAE].encode(images[0]),
        prepare=lambda image, bucket: omni_crop(image)),
}
_LAYOUTS = {"omni": _omni}  # what adapters read that is made of several states
# fmt: on


def all_models() -> list[Model[Any]]:
    """Every model of the table, each once; one that another one is loaded with comes before it."""
    return list(dict.fromkeys(model for state in STATES.values() for model in state.models))


def assemble(
    states: States[Reference],
    prompts: Sequence[str],
    references: Sequence[Sequence[Reference]],
    reads: frozenset[str],
    weights: Sequence[Sequence[float]] | None = None,
    negative_prompt: str = "",
) -> Encoded:
    """The batch that `reads` asks for, out of single states: the one place that knows which ones a triplet needs.

    `weights`: B x R, see Encoders.encode; None: the references of a sample go into one sequence, as in training.
    `negative_prompt`: of Encoded's null states.
    """
    batch = Triplets(states=states, prompts=prompts, references=references, weights=[], negative_prompt=negative_prompt)
    if weights is not None:
        for images, each in zip(references, weights, strict=True):
            check_weights(each, len(images))
        batch = replace(  # those with a weight above 0
            batch,
            references=[list(compress(images, each)) for images, each in zip(references, weights, strict=True)],
            weights=[list(filter(None, each)) for each in weights],
        )
    fields = {name: state.fields for name, state in STATES.items() if state.fields} | _LAYOUTS
    found: dict[str, Any] = {}
    for name in fields:  # in the order of the table
        if name in reads | {"text"}:
            found |= fields[name](batch)
    return Encoded.of_prompts(**found)


def check_weights(weights: Sequence[float], num_references: int) -> None:
    """Refuses weights that are not one number of at least 0 for each reference."""
    if len(weights) != num_references:
        raise InputError(f"{len(weights)} reference weights for {num_references} references; give one for each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise InputError(f"reference weights {', '.join(f'{w:g}' for w in weights)}: each must be 0 or more")


def requests_of(reads: frozenset[str]) -> list[Request[None]]:
    """What a triplet with one reference asks for under `reads`, its target apart."""
    noted: list[Request[None]] = []

    def note(request: Request[None]) -> Parts:
        noted.append(request)
        return NOTHING

    assemble(States(note), ["prompt"], [[None]], reads)
    return noted


def models_of(reads: frozenset[str]) -> list[Model[Any]]:
    """The models that the states of such a triplet are computed with, in the order of the table."""
    needed = {model for request in requests_of(reads) for model in STATES[request.state].models}
    return [model for model in all_models() if model in needed]


def siglip_dim(config: Config) -> int | None:
    """Width of the SigLIP features that the adapters read, from the model's config alone."""
    return siglip_width(Source.of(config.models.siglip)) if SIGLIP in models_of(config.reads) else None


class Encoders:
    """The loaded models: only what an adapter list reads."""

    def __init__(self, text: TextEncoder | None = None, codec: LatentCodec | None = None) -> None:
        there: dict[Model[Any], Any] = {TEXT_ENCODER: text, VAE: codec}
        self._loaded = {model: encoder for model, encoder in there.items() if encoder is not None}

    @classmethod
    def load(cls, config: Config, reads: frozenset[str], dtype: torch.dtype, device: torch.device | str) -> "Encoders":
        """The VAE, the text encoder and what `reads` needs."""
        return cls().add([VAE, *models_of(reads)], places_of(config.models), config.encoders, dtype, device)

    def add(
        self,
        models: Iterable[Model[Any]],
        places: Callable[[str], Source],
        settings: EncodersConfig,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "Encoders":
        """Loads those that are not there yet. places: where each lies, by its key."""
        missing = {*models} - self._loaded.keys()
        for model in [model for model in all_models() if model in missing]:
            self._loaded[model] = model.load(self, places(model.key), settings.max_sequence_length, dtype, device)
        return self

    def __getitem__(self, model: Model[Encoder]) -> Encoder:
        assert model in self._loaded, f"{model.role} was not asked for when the encoders were loaded"
        encoder: Encoder = self._loaded[model]
        return encoder

    @property
    def text(self) -> TextEncoder:
        return self[TEXT_ENCODER]

    @property
    def codec(self) -> LatentCodec:
        return self[VAE]

    @property
    def siglip_dim(self) -> int | None:
        return int(self[SIGLIP].model.config.hidden_size) if SIGLIP in self._loaded else None

    @property
    def identities(self) -> dict[str, dict[str, str]]:
        """Who the loaded models are, by role."""
        there = [model for model in all_models() if model in self._loaded]
        return {model.role: identity(model.module(self[model]), keys=model.settings) for model in there}

    def compute(self, request: Request[Any], images: Sequence[Image.Image], settings: EncodersConfig) -> Parts:
        """The tensors of a request with prepared pictures. Raises InputError for a prompt or picture that the encoder
        refuses."""
        found = STATES[request.state].encode(self, images, request.text, settings)
        return {"states": found.states, "kinds": found.kinds} if isinstance(found, TokenStates) else {"states": found}

    def states(self, settings: EncodersConfig) -> States[Image.Image]:
        """States that are computed when asked for; a reference is a picture."""

        def get(request: Request[Image.Image]) -> Parts:
            prepare = STATES[request.state].prepare
            return self.compute(request, [prepare(image, request.bucket) for image in request.pictures], settings)

        return States(get)

    def encode(
        self,
        prompts: Sequence[str],
        references: Sequence[Sequence[Image.Image]],
        reads: frozenset[str],
        settings: EncodersConfig,
        weights: Sequence[Sequence[float]] | None = None,
        negative_prompt: str = "",
    ) -> Encoded:
        """Everything that `reads` names for each prompt and its references (any number, own sizes).

        `weights`: one number >= 0 for each reference of each sample. Each reference is then read alone, and attention
        to its tokens in the main layers is multiplied by its weight; 0 leaves it out, so that (1, 0) is the first one
        alone. None: the references of a sample are read in one sequence, as in training. `negative_prompt`: what
        guidance leads away from.
        """
        return assemble(self.states(settings), prompts, references, reads, weights, negative_prompt)
