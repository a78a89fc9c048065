"""A text-to-image pipeline of diffusers that does what it is asked for, or says why it cannot.

In: a folder or Hub id, settings for all pictures, and batches of contents in one style. Out: arrays of pictures.
What can be checked without weights is checked before they are loaded; weights that are missing and LoRAs that do not
fit are refused, where diffusers draws on with a warning.
"""

import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pydantic

from data_tools.output import digest_of, fingerprint
from data_tools.style_tables import Content, Lora, Style
from ztrain.errors import InputError
from ztrain.frozen.sources import (
    Source,
    check_settings,
    explained,
    pretrained,
    pretrained_model,
    public_name,
    read_json,
    require_loaded,
)
from ztrain.io.yamls import Strict

_ADAPTER = "style"  # what the pipeline calls the LoRA of the style in hand
_WEIGHT_KINDS = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja"})
_Number = TypeVar("_Number", int, float)


class RenderSettings(Strict, allow_inf_nan=False):
    """What decides all pictures beside their style and content."""

    pipeline: str
    """Name, without the path of this machine."""
    revision: str | None
    """Commit of a Hub id."""
    weights: str
    """Hash of the pipeline's files."""
    num_inference_steps: int | None = pydantic.Field(ge=1)
    """Steps of the sampler; None where the pipeline has no such number."""
    guidance_scale: float | None = pydantic.Field(ge=0)
    """In the pipeline's own convention; 0 switches it off, None where it has none."""
    height: int = pydantic.Field(ge=16)
    """Pixels; the pipeline says which multiples it takes."""
    width: int = pydantic.Field(ge=16)
    """Pixels."""
    call: dict[str, bool | int | float]
    """Further arguments of the pipeline's call."""
    seed: int = pydantic.Field(ge=0)
    """Decides the noise."""
    same_noise: bool
    """Whether the styles of one content share their noise."""
    precision: str
    """Of the weights."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures of one style that are drawn together."""

    style: Style
    contents: Sequence[Content]


class Pipeline:
    """A diffusers pipeline: known by its files at once, loaded when it first draws."""

    def __init__(self, location: str, revision: str | None, *, offload: bool) -> None:
        """offload: only the model in use stays on the GPU. Code that comes with weights is never run.

        Raises InputError for what is no pipeline of diffusers.
        """
        import diffusers
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.offload = offload
        if offload and self.device != "cuda":
            raise InputError("--offload moves models between GPU and memory, and there is no GPU; leave it out")
        self.name, source, loader = public_name(location), Source(location, revision), diffusers.DiffusionPipeline
        if revision is not None and source.folder is not None:
            raise InputError(f"--revision {revision} is for ids of the Hub, and {location} is a folder; leave it out")
        source.require("model_index.json", what="a diffusers pipeline")
        self.folder = source.pipeline()
        self.index = read_json(self.folder / "model_index.json")
        self.revision = None if source.folder else self.folder.name  # the cache's folder of a commit
        self.parts = {part: entry for part, entry in self.index.items() if isinstance(entry, list)}
        name = self.index.get("_class_name")
        self.kind: Any = getattr(diffusers, str(name), None)
        with explained(location):  # of a class whose own libraries are absent, diffusers has only the name
            self.takes_loras = hasattr(self.kind, "load_lora_weights")
        if self.kind is None or loader not in getattr(self.kind, "__mro__", ()):
            raise InputError(f"{location}: its pipeline {name} is not one of diffusers {diffusers.__version__}'s")
        for part, entry in self.parts.items():
            if not part.isidentifier() or len(entry) != 2:
                raise InputError(f"{location}: model_index.json: {part[:80]!r} is no part of a pipeline")
            if entry[0] and _library(entry[0]) is None:
                raise InputError(
                    f"{location}: model_index.json says that its {part} is made by code of its own, {entry[0]}, which"
                    " is never run; take a pipeline whose parts are diffusers' and transformers'"
                )
        self.signature = inspect.signature(self.kind.__call__).parameters

    def check(self, arguments: Sequence[str], what: str) -> None:
        """Raises InputError where its call does not take an argument."""
        for argument in arguments:
            if argument not in self.signature:
                known = ", ".join(name for name in self.signature if name != "self")
                raise InputError(f"{what}: {self.kind.__name__} takes no {argument}; it takes: {known}")

    def take(self, argument: str, value: _Number | None, option: str) -> _Number | None:
        """A number for its call, its own where none is given; None where it has no such argument, else InputError."""
        if value is None:
            return self._default(argument)
        self.check([argument], option)
        return value

    def _default(self, argument: str) -> Any:
        return self.signature[argument].default if argument in self.signature else None

    def check_style(self, style: Style, settings: RenderSettings) -> None:
        """Raises InputError where it would not do what a style asks for."""
        where = f"style {style.id!r}"
        if style.lora and not self.takes_loras:
            raise InputError(f"{where}: {self.kind.__name__} cannot take a LoRA; remove it or take another pipeline")
        if not style.negative_prompt:
            return
        self.check(["negative_prompt"], where)
        # Where a pipeline has a true_cfg_scale, guidance_scale is a number that its model reads.
        name, off = ("true_cfg_scale", 1) if "true_cfg_scale" in self.signature else ("guidance_scale", 0)
        scale = {"guidance_scale": settings.guidance_scale, **settings.call}.get(name, self._default(name))
        if scale is not None and scale <= off:
            raise InputError(f"{where}: a negative_prompt does nothing with {name} {scale:g}; raise it or remove this")

    def weights(self) -> str:
        """Hash of the files of its parts, without other precisions (name.fp16.safetensors)."""
        files = sorted(
            path
            for part in self.parts
            for path in (self.folder / part).glob("*")
            if path.suffix in _WEIGHT_KINDS and (path.name.count(".") == 1 or path.name.endswith("tensors.index.json"))
        )
        return fingerprint(self.index, [(f"{path.parent.name}/{path.name}", digest_of(path)) for path in files])

    @cached_property
    def loaded(self) -> Any:
        import diffusers

        models = {name: model for name in self.parts if (model := self._model(name)) is not None}
        pipe = pretrained(diffusers.DiffusionPipeline, self.folder, dtype=self.dtype, use_safetensors=True, **models)
        pipe.set_progress_bar_config(disable=True)
        if self.offload:
            pipe.enable_model_cpu_offload()
            return pipe
        return pipe.to(self.device)

    def _model(self, name: str) -> Any:
        """A part with every weight accounted for: the pipeline's own loader makes up those that lack, and warns."""
        import torch

        library, kind_name = self.parts[name]
        kind: Any = getattr(_library(library), str(kind_name), None)
        is_model = isinstance(kind, type) and issubclass(kind, torch.nn.Module)
        if not is_model:  # tokenizers, schedulers: nothing to make up
            if (self.folder / name).is_dir():
                check_settings(self.folder / name)
            return None
        part, info = pretrained_model(kind, self.folder / name, dtype=self.dtype)
        require_loaded({key: info[key] for key in ("missing_keys", "mismatched_keys")}, f"{self.folder}/{name}")
        return part

    @contextmanager
    def wearing(self, lora: Lora | None, where: str) -> Iterator[None]:
        """With a LoRA for as long as the block lasts. Raises InputError, beginning with `where`, if it does not fit."""
        if lora is None:
            yield
            return
        pipe = self.loaded
        try:
            self._put_on(pipe, lora, f"{where}: the lora {lora.name}")
            yield
        finally:
            pipe.unload_lora_weights()

    def _put_on(self, pipe: Any, lora: Lora, where: str) -> None:
        said, logger = _KeyWarnings(), logging.getLogger("diffusers")
        logger.addHandler(said)
        try:
            with explained(where):
                pipe.load_lora_weights(
                    str(lora.file.parent), weight_name=lora.file.name, adapter_name=_ADAPTER, use_safetensors=True
                )
        finally:
            logger.removeHandler(said)
        if said.found or not any(_ADAPTER in names for names in pipe.get_list_adapters().values()):
            reason = (said.found or ["it has no weights for it"])[0]
            raise InputError(f"{where} was made for another pipeline than {self.kind.__name__} ({reason[:200]})")
        pipe.set_adapters(_ADAPTER, adapter_weights=lora.scale)

    def draw(self, batch: Batch, settings: RenderSettings) -> np.ndarray:
        """(n, H, W, 3) floats, 0..1 where all is well. Raises InputError."""
        import torch

        style, contents = batch.style, batch.contents
        seeds = [seed_of(settings, style.id, content.id) for content in contents]
        arguments: dict[str, Any] = {
            **settings.call,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "height": settings.height,
            "width": settings.width,
            "prompt": [style.prompt.replace("{content}", content.prompt) for content in contents],
            "negative_prompt": [style.negative_prompt] * len(contents) if style.negative_prompt else None,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],  # of the CPU: the same on all devices
            "output_type": "np",
        }
        given = {name: value for name, value in arguments.items() if value is not None}
        pipe = self.loaded
        try:
            images: np.ndarray = pipe(**given).images
        except torch.OutOfMemoryError as error:
            raise InputError("the GPU has too little memory; lower --batch-size, or give --offload") from error
        except ValueError as error:
            raise InputError(f"{self.kind.__name__} refuses the settings: {error}") from error
        if np.shape(images) != (len(contents), settings.height, settings.width, 3):
            found = f"gives {np.shape(images)} for {len(contents)} pictures of {settings.width} x {settings.height}"
            raise InputError(f"{self.name}: {found} in RGB; take a size and a pipeline that do")
        return images


def seed_of(settings: RenderSettings, style: str, content: str) -> int:
    """60 bits of what may decide a picture's noise, and of nothing around it."""
    return int(fingerprint(settings.seed, content, None if settings.same_noise else style)[:15], 16)


def _library(name: object) -> Any:
    """The module that diffusers would take a part's class from; None for code of the repository's own."""
    import diffusers
    import transformers

    if name in ("diffusers", "transformers"):
        return {"diffusers": diffusers, "transformers": transformers}[str(name)]
    return getattr(diffusers.pipelines, str(name), None)


class _KeyWarnings(logging.Handler):
    """Collects what diffusers only warns about: weights of a LoRA that find no place."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if re.search(r"(unexpected|missing) keys", text := record.getMessage()):
            self.found.append(text)
