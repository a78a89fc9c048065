"""Synthetic style folders: every style x every content is one picture of a diffusers text-to-image pipeline.

    python -m data_tools.render --pipeline Tongyi-MAI/Z-Image --styles styles.csv --contents contents.csv --out out/made

In: styles.csv (id, prompt with {content} in it, if wanted negative_prompt, lora and lora_scale), and contents.csv (id,
prompt, split). Out: `<out>/images/<style>/<content>.png` and `<out>/contents.csv` for data_tools.build, with
`<out>/render.json`: how they were made, how many are missing; `<out>/blank/`: why some came out blank. A rerun makes
what is missing: a picture is decided by style, content and settings alone. Delete `blank/` to try those again.
"""

import csv
import inspect
import io
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pydantic
import tyro
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from data_tools.output import digest_of, fingerprint
from ztrain.errors import InputError, sentence
from ztrain.models import Source, public_name
from ztrain.workspace import workspace
from ztrain.yamls import describe_errors

REPORT_NAME = "render.json"
_LORA_NAME = "pytorch_lora_weights.safetensors"  # diffusers' own
_ADAPTER = "style"  # what the pipeline calls the LoRA of the style in hand
_WEIGHT_KINDS = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja"})
_OURS = frozenset({"prompt", "generator", "output_type", "negative_prompt", "num_inference_steps", "guidance_scale",
                   "height", "width", "num_images_per_prompt", "return_dict"})  # fmt: skip
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
_Row: TypeAlias = Mapping[str, str]


class RenderSettings(pydantic.BaseModel):
    """What decides all pictures beside their style and content."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """One row of the styles."""

    id: str
    prompt: str
    """With {content} where the content's prompt goes."""
    negative_prompt: str
    """Empty for none."""
    lora: Path | None
    lora_name: str
    """Its file or Hub id, without the path of this machine; empty for none."""
    lora_digest: str
    lora_scale: float

    def about(self) -> dict[str, Any]:
        """All that decides its pictures."""
        lora = {"name": self.lora_name, "digest": self.lora_digest, "scale": self.lora_scale} if self.lora else None
        return {"prompt": self.prompt, "negative_prompt": self.negative_prompt, "lora": lora}


@dataclass(frozen=True, slots=True)
class Content:
    """One row of the contents."""

    id: str
    prompt: str
    split: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures of one style that are drawn together."""

    style: Style
    contents: Sequence[Content]


# --- tables -----------------------------------------------------------------------------------------------------------


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] | None) -> list[tuple[str, _Row]]:
    """(file:line, row) of every row, stripped; required columns are filled, ids are plain names and stand once.

    optional: None takes and leaves out any other column. Raises InputError.
    """
    rows: list[tuple[str, _Row]] = []
    seen: set[str] = set()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or ())
            _check_header(path, header, required, optional)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():  # DictReader's marks for a long and for a short row
                    raise InputError(f"{where}: must have {len(header)} fields, as many as the header")
                found = {name: value.strip() for name, value in row.items()}
                if empty := [name for name in required if not found[name]]:
                    raise InputError(f"{where}: {empty[0]} is empty; fill it in")
                _check_id(found["id"], where, seen)
                rows.append((where, found))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot read the table ({error}); it must be UTF-8 CSV") from error
    if not rows:
        raise InputError(f"{path}: has no rows; add one at least")
    return rows


def _check_header(path: Path, header: list[str], required: Sequence[str], optional: Sequence[str] | None) -> None:
    if missing := [name for name in required if name not in header]:
        raise InputError(f"{path}: no column {missing[0]!r}; its columns are: {', '.join(header)}")
    if twice := [name for name in header if header.count(name) > 1]:
        raise InputError(f"{path}: the column {twice[0]!r} stands twice; keep one")
    if unknown := [] if optional is None else [name for name in header if name not in (*required, *optional)]:
        known = ", ".join([*required, *(optional or [])])
        raise InputError(f"{path}: unknown column {unknown[0]!r}; a table of styles has: {known}")


def _check_id(name: str, where: str, seen: set[str]) -> None:
    if name[0] == "." or re.search(r"[\x00-\x1f/\\:]", name) or len(name.encode()) > 200:
        raise InputError(f"{where}: the id {name!r} names a file; give it without / \\ : and without a leading dot")
    if name.casefold() in seen:  # names that differ in case alone are one file on some disks
        raise InputError(f"{where}: the id {name!r} stands twice; keep one")
    seen.add(name.casefold())


def read_contents(path: Path) -> list[Content]:
    """Raises InputError."""
    rows = read_table(path, ("id", "prompt", "split"), None)
    return [Content(row["id"], row["prompt"], row["split"]) for _, row in rows]


def read_styles(path: Path) -> list[Style]:
    """With their LoRAs found, downloaded if need be, and hashed. Raises InputError."""
    rows = read_table(path, ("id", "prompt"), ("negative_prompt", "lora", "lora_scale"))
    return [_read_style(row, where, path.parent) for where, row in rows]


def _read_style(row: _Row, where: str, folder: Path) -> Style:
    if row["prompt"].count("{content}") != 1:
        raise InputError(f"{where}: the prompt {row['prompt']!r} must have {{content}} in it, once")
    place, scale = row.get("lora", ""), row.get("lora_scale", "")
    if scale and not place:
        raise InputError(f"{where}: lora_scale {scale} has no lora; give one, or leave it empty")
    try:
        strength = float(scale or 1)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise InputError(f"{where}: lora_scale {scale!r} is not a number; 1 is as trained, 0 is without it")
    lora = _find_lora(place, where, folder) if place else None
    public = (folder / place).resolve().name if (folder / place).exists() else place
    return Style(
        id=row["id"],
        prompt=row["prompt"],
        negative_prompt=row.get("negative_prompt", ""),
        lora=lora,
        lora_name=public if place else "",
        lora_digest=digest_of(lora) if lora else "",
        lora_scale=strength,
    )


def _find_lora(place: str, where: str, folder: Path) -> Path:
    """The safetensors file of a LoRA: a file, the one of a folder, or that of a Hub id. Raises InputError."""
    path = folder / place
    if not path.exists():
        if path.suffix == ".safetensors" or not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
            raise InputError(f"{where}: the lora {place!r} is neither there, relative to the table, nor a Hub id")
        path = Source(place).local("*.safetensors")
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        chosen = [file for file in files if file.name == _LORA_NAME] or files
        if len(chosen) != 1:
            raise InputError(f"{where}: the lora {place!r} has {len(files)} .safetensors files; name one")
        path = chosen[0]
    try:
        with safe_open(path, framework="np"):
            return path
    except (SafetensorError, OSError) as error:
        raise InputError(f"{where}: the lora {place!r} is no readable .safetensors file ({error})") from error


# --- the folder -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is to be in a folder, and what already is."""

    out: Path
    settings: RenderSettings
    styles: Sequence[Style]
    contents: Sequence[Content]

    def picture(self, style: str, content: str) -> Path:
        return self.out / "images" / style / f"{content}.png"

    def blank(self, style: str, content: str) -> Path:
        """A text file with the reason why there is no picture."""
        return self.out / "blank" / style / f"{content}.txt"

    def is_missing(self, style: str, content: str) -> bool:
        return not self.picture(style, content).exists() and not self.blank(style, content).exists()

    def missing(self, batch_size: int, shard: tuple[int, int]) -> list[Batch]:
        """The batches of a shard that lack a picture.

        They are cut from the whole tables: so a picture has the same neighbours, and the same rounding, in every run.
        """
        starts = range(0, len(self.contents), batch_size)
        batches = [Batch(style, self.contents[start : start + batch_size]) for style in self.styles for start in starts]
        return [batch for batch in batches[shard[0] :: shard[1]]
                if any(self.is_missing(batch.style.id, content.id) for content in batch.contents)]  # fmt: skip

    def store(self, path: Path, data: bytes, scratch: Path) -> None:
        """Whole or not at all. Raises InputError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (scratch / "file").open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch / "file", path)
        except OSError as error:
            raise InputError(f"{path}: cannot write it ({error.strerror}); make room and run again") from error

    def record(self, scratch: Path, made_with: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes contents.csv and render.json as things stand, and returns the latter.

        Under a lock, at the start and the end of each process: of several shards whoever ends last has seen all others'
        pictures. Raises InputError where the folder is that of other settings.
        """
        with FileLock(self.out / ".render.lock"):
            known = self._known()
            used = known.get("made_with", [])
            if made_with is not None and made_with not in used:
                used.append(made_with)
            pairs = [(style.id, content.id) for style in self.styles for content in self.contents]
            pictures = sum(self.picture(*pair).exists() for pair in pairs)
            blank = {"/".join(pair): self.blank(*pair).read_text() for pair in pairs if self.blank(*pair).exists()}
            counts = {"styles": len(self.styles), "contents": len(self.contents), "pictures": pictures,
                      "blank": len(blank), "missing": len(pairs) - pictures - len(blank)}  # fmt: skip
            about = {style.id: style.about() for style in self.styles}
            settings = self.settings.model_dump(mode="json")
            report = {"settings": settings, "styles": about, "made_with": used, "counts": counts, "blank": blank}
            text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
            self.store(self.out / REPORT_NAME, text.encode(), scratch)
            table = io.StringIO()
            lines = [("id", "prompt", "split"), *((each.id, each.prompt, each.split) for each in self.contents)]
            csv.writer(table, lineterminator="\n").writerows(lines)
            self.store(self.out / "contents.csv", table.getvalue().encode(), scratch)
        return report

    def _known(self) -> dict[str, Any]:
        """The report of an earlier run with these settings; styles and contents may have been added since."""
        path = self.out / REPORT_NAME
        if not path.exists():
            if any(not entry.name.startswith(".") for entry in self.out.iterdir()):
                raise InputError(f"{self.out}: holds something else than rendered pictures; choose another --out")
            return {}
        try:
            known: dict[str, Any] = json.loads(path.read_bytes())
            settings, styles, _ = dict(known["settings"]), dict(known["styles"]), list(known["made_with"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path}: not a report of data_tools.render; choose another --out") from error
        for key, value in self.settings.model_dump(mode="json").items():
            if settings.get(key) != value:
                was = f"has pictures with {key} {settings.get(key)}, not {value}"
                raise InputError(f"{self.out}: {was}; give the same again, or choose another --out")
        contents = self.out / "contents.csv"
        before = {each.id: each.prompt for each in read_contents(contents)} if contents.exists() else {}
        now = {each.id: each.prompt for each in self.contents}
        _check_kept(self.out, "style", styles, {style.id: style.about() for style in self.styles})
        _check_kept(self.out, "content", before, now)
        return known


def _check_kept(out: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises InputError where pictures of a style or content are no longer what the tables say."""
    for name, about in before.items():
        if now.get(name) != about:
            changed = "is another one now" if name in now else "is no longer in its table"
            raise InputError(f"{out}: has pictures of the {what} {name!r}, which {changed}; choose another --out")


# --- the pipeline -----------------------------------------------------------------------------------------------------


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """What loaders raise about broken files, in one sentence."""
    try:
        yield
    except _LOADING_ERRORS as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what}: cannot be loaded ({reason})") from error


class Pipeline:
    """A diffusers pipeline: known by its files at once, loaded when it first draws."""

    def __init__(self, location: str, revision: str | None) -> None:
        """Raises InputError for what is no pipeline of diffusers; code that comes with weights is never run."""
        import diffusers
        import torch

        self.name, source, loader = public_name(location), Source(location, revision), diffusers.DiffusionPipeline
        if revision is not None and source.folder is not None:
            raise InputError(f"--revision {revision} is for ids of the Hub, and {location} is a folder; leave it out")
        source.require("model_index.json", what="a diffusers pipeline")
        with _explained(location):
            self.folder = source.folder or Path(loader.download(location, revision=revision, use_safetensors=True))
            self.index: dict[str, Any] = json.loads((self.folder / "model_index.json").read_bytes())
        self.revision = None if source.folder else self.folder.name  # the cache's folder of a commit
        name = self.index.get("_class_name")
        self.kind: Any = getattr(diffusers, str(name), None)
        with _explained(location):  # of a class whose own libraries are absent, diffusers has only the name
            self.takes_loras = hasattr(self.kind, "load_lora_weights")
        if self.kind is None or loader not in getattr(self.kind, "__mro__", ()):
            raise InputError(f"{location}: its pipeline {name} is not one of diffusers {diffusers.__version__}'s")
        self.parts = {part: tuple(entry) for part, entry in self.index.items() if isinstance(entry, list)}
        self.signature = inspect.signature(self.kind.__call__).parameters
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.offload = False

    def default(self, argument: str) -> Any:
        """What its call takes where nothing is given; None where it does not know the argument."""
        return self.signature[argument].default if argument in self.signature else None

    def check(self, arguments: Sequence[str], what: str) -> None:
        """Raises InputError where its call does not take an argument."""
        for argument in arguments:
            if argument not in self.signature:
                known = ", ".join(name for name in self.signature if name != "self")
                raise InputError(f"{what}: {self.kind.__name__} takes no {argument}; it takes: {known}")

    def check_style(self, style: Style, settings: RenderSettings) -> None:
        """Raises InputError where the pipeline would not do what a style asks for."""
        where = f"style {style.id!r}"
        if style.negative_prompt:
            self.check(["negative_prompt"], where)
            # Where a pipeline has a true_cfg_scale, guidance_scale is a number that its model reads.
            name, off = ("true_cfg_scale", 1) if "true_cfg_scale" in self.signature else ("guidance_scale", 0)
            scale = {"guidance_scale": settings.guidance_scale, **settings.call}.get(name, self.default(name))
            if scale is not None and scale <= off:
                raise InputError(
                    f"{where}: a negative_prompt does nothing with {name} {scale:g}; raise it or remove this"
                )
        if style.lora and not self.takes_loras:
            raise InputError(f"{where}: {self.kind.__name__} cannot take a LoRA; remove it or take another pipeline")

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

        with _explained(str(self.folder)):
            models = {name: model for name in self.parts if (model := self._model(name)) is not None}
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                self.folder, dtype=self.dtype, use_safetensors=True, **models
            )
        pipe.set_progress_bar_config(disable=True)
        if self.offload:
            pipe.enable_model_cpu_offload()
            return pipe
        return pipe.to(self.device)

    def _model(self, name: str) -> Any:
        """A part with every weight accounted for: the pipeline's own loader makes up those that lack, and warns."""
        import diffusers
        import torch
        import transformers

        library, kind_name = self.parts[name]
        kind: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), str(kind_name), None)
        is_model = isinstance(kind, type) and issubclass(kind, torch.nn.Module)
        if not is_model:
            return None  # tokenizers, schedulers: nothing to make up
        part, info = kind.from_pretrained(
            self.folder, subfolder=name, dtype=self.dtype, use_safetensors=True, output_loading_info=True
        )
        if lacking := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise InputError(
                f"{self.folder}/{name}: lacks {len(lacking)} weights, for example {sorted(map(str, lacking))[0]}"
            )
        return part

    @contextmanager
    def wearing(self, style: Style) -> Iterator[None]:
        """With the style's LoRA for as long as the block lasts. Raises InputError for one that does not fit."""
        if style.lora is None:
            yield
            return
        pipe = self.loaded
        try:
            self._put_on(pipe, style, style.lora)
            yield
        finally:
            pipe.unload_lora_weights()

    def _put_on(self, pipe: Any, style: Style, lora: Path) -> None:
        where, said, logger = (
            f"style {style.id!r}: the lora {style.lora_name}",
            _Warnings(),
            logging.getLogger("diffusers"),
        )
        logger.addHandler(said)
        try:
            with _explained(where):
                pipe.load_lora_weights(
                    str(lora.parent), weight_name=lora.name, adapter_name=_ADAPTER, use_safetensors=True
                )
        finally:
            logger.removeHandler(said)
        if not any(_ADAPTER in names for names in pipe.get_list_adapters().values()) or said.about_keys:
            reason = (said.about_keys or ["it has no weights for it"])[0]
            raise InputError(f"{where} was made for another pipeline than {self.kind.__name__} ({reason[:200]})")
        pipe.set_adapters(_ADAPTER, adapter_weights=style.lora_scale)

    def draw(self, batch: Batch, settings: RenderSettings) -> np.ndarray:
        """(n, H, W, 3) floats, 0..1 where all is well. Raises InputError."""
        import torch

        style, contents = batch.style, batch.contents
        seeds = [seed_of(settings, style.id, content.id) for content in contents]
        arguments: dict[str, Any] = {
            **settings.call,
            **{name: getattr(settings, name) for name in ("num_inference_steps", "guidance_scale")},
            "height": settings.height,
            "width": settings.width,
            "prompt": [style.prompt.replace("{content}", content.prompt) for content in contents],
            "negative_prompt": [style.negative_prompt] * len(contents) if style.negative_prompt else None,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],  # of the CPU: the same on all devices
            "output_type": "np",
        }
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            images: np.ndarray = self.loaded(**given).images
        except torch.OutOfMemoryError as error:
            raise InputError("the GPU has too little memory; lower --batch-size, or give --offload") from error
        except ValueError as error:
            raise InputError(f"{self.kind.__name__} refuses the settings: {error}") from error
        if np.shape(images) != (len(contents), settings.height, settings.width, 3):
            found = f"gives {np.shape(images)} for {len(contents)} pictures of {settings.width} x {settings.height}"
            raise InputError(f"{self.name}: {found} in RGB; take a size and a pipeline that do")
        return images


class _Warnings(logging.Handler):
    """Collects what diffusers only warns about: weights of a LoRA that find no place."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.about_keys: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if re.search(r"(unexpected|missing) keys", text := record.getMessage()):
            self.about_keys.append(text)


def seed_of(settings: RenderSettings, style: str, content: str) -> int:
    """60 bits of what may decide a picture's noise, and of nothing around it."""
    return int(fingerprint(settings.seed, content, None if settings.same_noise else style)[:15], 16)


def fault_of(image: np.ndarray) -> str:
    """Why a picture (H, W, 3) of floats is none, or nothing."""
    if not np.isfinite(image).all():
        return "has values that are not numbers"
    pixels = to_pixels(image)
    return "all pixels are equal" if (pixels == pixels[0, 0]).all() else ""


def to_pixels(image: np.ndarray) -> np.ndarray:
    """Floats of 0..1 as uint8."""
    pixels: np.ndarray = np.round(image * 255).clip(0, 255).astype(np.uint8)
    return pixels


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Render style folders with a text-to-image pipeline."""

    pipeline: str
    """Folder or Hub id of a diffusers pipeline."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    styles: Path
    """CSV table: id, prompt with {content}; if wanted negative_prompt, lora (path from here, or Hub id), lora_scale."""
    contents: Path
    """CSV table: id, prompt, split."""
    out: Path
    """Folder to make. One that is there is gone on with, if it was begun with the same settings."""
    steps: int | None = None
    """num_inference_steps; None takes the pipeline's own number."""
    guidance: float | None = None
    """guidance_scale as the pipeline means it; None takes its own number."""
    height: int = 1024
    """Pixels."""
    width: int = 1024
    """Pixels."""
    call: dict[str, bool | int | float] = field(default_factory=dict)
    """Further numbers for the pipeline's call: --call true_cfg_scale 4 max_sequence_length 256."""
    batch_size: int = 1
    """Pictures of one style at a time; it changes rounding at most."""
    seed: int = 0
    """Decides the noise, together with style and content."""
    same_noise: bool = False
    """One noise for a content in all styles: their compositions are more alike."""
    offload: bool = False
    """Keep only the model in use on the GPU: slower, for small cards."""
    shard: str = "0/1"
    """I/N: make every N-th batch from the I-th on, counted from 0; N processes share the folder."""
    max_blank_share: float = 0.02
    """Fails where a larger share of all pictures comes out blank: 0 on the first, 1 never."""


def plan(command: Command) -> tuple[Job, Pipeline]:
    """Reads and checks all that can be checked before weights are loaded. Raises InputError."""
    styles, contents = read_styles(command.styles), read_contents(command.contents)
    pipeline = Pipeline(command.pipeline, command.revision)
    if command.offload and pipeline.device != "cuda":
        raise InputError("--offload moves models between GPU and memory, and there is no GPU; leave it out")
    pipeline.offload = command.offload
    pipeline.check(["prompt", "generator", "output_type", "height", "width"], command.pipeline)
    for option, argument, value in (("--steps", "num_inference_steps", command.steps),
                                    ("--guidance", "guidance_scale", command.guidance)):  # fmt: skip
        if value is not None:
            pipeline.check([argument], option)
    pipeline.check(list(command.call), "--call")
    if reserved := sorted(_OURS & set(command.call)):
        raise InputError(f"--call {reserved[0]}: is set by an option of its own or by the tables")
    settings = RenderSettings(
        pipeline=pipeline.name,
        revision=pipeline.revision,
        weights=pipeline.weights(),
        num_inference_steps=pipeline.default("num_inference_steps") if command.steps is None else command.steps,
        guidance_scale=pipeline.default("guidance_scale") if command.guidance is None else command.guidance,
        height=command.height,
        width=command.width,
        call=command.call,
        seed=command.seed,
        same_noise=command.same_noise,
        precision=str(pipeline.dtype).removeprefix("torch."),
    )
    for style in styles:
        pipeline.check_style(style, settings)
    return Job(command.out, settings, styles, contents), pipeline


def render(command: Command) -> dict[str, Any]:
    """Makes what is missing of a shard; returns the report. Raises InputError, what was finished before it stays."""
    shard = read_shard(command.shard)
    if command.batch_size < 1 or not 0 <= command.max_blank_share <= 1:
        raise InputError("batch_size must be at least 1, and max_blank_share from 0 to 1")
    job, pipeline = plan(command)
    total = len(job.styles) * len(job.contents)
    with workspace(command.out) as scratch:
        batches = job.missing(command.batch_size, shard)
        made_with = {"batch_size": command.batch_size, "device": pipeline.device,
                     **{name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}}  # fmt: skip
        blank = job.record(scratch, made_with if batches else None)["counts"]["blank"]
        number = sum(len(batch.contents) for batch in batches)
        with tqdm(total=number, desc="render", unit="picture", disable=None) as bar:
            for is_blank in draw_batches(batches, job, pipeline, scratch):
                bar.update()
                blank += is_blank
                if blank > command.max_blank_share * total:  # more pictures cannot mend that
                    break
        report = job.record(scratch)
    check_blank(report, total, command)
    return report


def draw_batches(batches: Sequence[Batch], job: Job, pipeline: Pipeline, scratch: Path) -> Iterator[bool]:
    """Makes the missing pictures of batches, style by style; for each picture whether it was found blank now."""
    for _, of_style in groupby(batches, key=lambda batch: batch.style.id):
        together = list(of_style)
        with pipeline.wearing(together[0].style):
            for batch in together:
                images = pipeline.draw(batch, job.settings)
                for content, image in zip(batch.contents, images, strict=True):
                    yield _store(batch.style.id, content.id, image, job, scratch)


def _store(style: str, content: str, image: np.ndarray, job: Job, scratch: Path) -> bool:
    if not job.is_missing(style, content):  # it was drawn to keep its neighbours company
        return False
    if fault := fault_of(image):
        job.store(job.blank(style, content), fault.encode(), scratch)
        return True
    data = io.BytesIO()
    Image.fromarray(to_pixels(image)).save(data, "png")
    job.store(job.picture(style, content), data.getvalue(), scratch)
    return False


def read_shard(text: str) -> tuple[int, int]:
    """Raises InputError."""
    if (match := re.fullmatch(r"(\d+)/(\d+)", text)) and int(match[1]) < int(match[2]):
        return int(match[1]), int(match[2])
    raise InputError(f"--shard {text!r} must be I/N with I from 0 to N - 1: 0/4 to 3/4 for four processes")


def check_blank(report: Mapping[str, Any], total: int, command: Command) -> None:
    """Raises InputError where more is blank than is put up with."""
    blank = report["blank"]
    if len(blank) > command.max_blank_share * total:
        first = "".join(f"\n  {name}: {why}" for name, why in list(blank.items())[:10])
        raise InputError(
            f"{len(blank)} of {total} pictures ({len(blank) / total:.2%}) came out blank, more than --max-blank-share"
            f" {command.max_blank_share:g} allows; change prompts or settings, or raise it:{first}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend."""
    try:
        command = tyro.cli(Command, args=arguments, prog="data_tools.render")
        counts = render(command)["counts"]
    except pydantic.ValidationError as error:
        print(f"error: {describe_errors(error, source='command line', model=RenderSettings)}", file=sys.stderr)
        return 2
    except (InputError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    print(f"{command.out}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
