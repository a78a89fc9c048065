"""Synthetic style folders: every style x every content is one picture of a diffusers text-to-image pipeline.

    python -m data_tools.render --pipeline Tongyi-MAI/Z-Image --styles styles.csv --contents contents.csv --out out/made

In: styles and contents (data_tools.style_tables), and a pipeline (data_tools.diffusion). Out:
`<out>/images/<style>/<content>.png` and `<out>/contents.csv` for data_tools.build, with `<out>/render.json`: how they
were made, how many are missing; `<out>/blank/`: why some came out blank. A rerun makes what is missing: a picture is
decided by style, content and settings alone. Delete `blank/` to try those again.
"""

import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from data_tools.diffusion import Batch, Pipeline, RenderSettings
from data_tools.output import check_share
from data_tools.step import read_words
from data_tools.style_tables import Content, Style, as_csv, read_contents, read_styles
from ztrain.errors import InputError
from ztrain.io.files import read_bytes, whole_file, workspace
from ztrain.io.yamls import describe_errors
from ztrain.terminal import program

REPORT_NAME = "render.json"
_OURS = frozenset({"prompt", "generator", "output_type", "negative_prompt", "num_inference_steps", "guidance_scale",
                   "height", "width", "num_images_per_prompt", "return_dict"})  # fmt: skip


@dataclass(frozen=True, slots=True)
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
            store(self.out / REPORT_NAME, text.encode(), scratch)
            store(self.out / "contents.csv", as_csv(self.contents).encode(), scratch)
        return report

    def _known(self) -> dict[str, Any]:
        """The report of an earlier run with these settings; styles and contents may have been added since."""
        path = self.out / REPORT_NAME
        if not path.exists():
            if any(not entry.name.startswith(".") for entry in self.out.iterdir()):
                raise InputError(f"{self.out}: holds something else than rendered pictures; choose another --out")
            return {}
        try:
            known: dict[str, Any] = json.loads(read_bytes(path, "record"))
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


def store(path: Path, data: bytes, scratch: Path) -> None:
    """Whole or not at all. Raises InputError."""
    with whole_file(path, sync=True, scratch=scratch) as building:
        building.write_bytes(data)


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
    pipeline = Pipeline(command.pipeline, command.revision, offload=command.offload)
    pipeline.check(["prompt", "generator", "output_type", "height", "width"], command.pipeline)
    pipeline.check(list(command.call), "--call")
    if reserved := sorted(_OURS & set(command.call)):
        raise InputError(f"--call {reserved[0]}: is set by an option of its own or by the tables")
    settings = RenderSettings(
        pipeline=pipeline.name,
        revision=pipeline.revision,
        weights=pipeline.weights(),
        num_inference_steps=pipeline.take("num_inference_steps", command.steps, "--steps"),
        guidance_scale=pipeline.take("guidance_scale", command.guidance, "--guidance"),
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
    shard = parse_shard(command.shard)
    if command.batch_size < 1 or not 0 <= command.max_blank_share <= 1:
        raise InputError("--batch-size must be at least 1, and --max-blank-share from 0 to 1")
    job, pipeline = plan(command)
    max_blank = command.max_blank_share * len(job.styles) * len(job.contents)
    with workspace(command.out) as scratch:
        batches = job.missing(command.batch_size, shard)
        made_with = {"batch_size": command.batch_size, "device": pipeline.device,
                     **{name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}}  # fmt: skip
        num_blank = job.record(scratch, made_with if batches else None)["counts"]["blank"]
        number = sum(len(batch.contents) for batch in batches)
        with tqdm(total=number, desc="render", unit="picture", disable=None) as bar:
            for is_blank in draw_batches(batches, job, pipeline, scratch):
                bar.update()
                num_blank += is_blank
                if num_blank > max_blank:  # more pictures cannot mend that
                    break
        report = job.record(scratch)
    blank, limit = [f"{name}: {why}" for name, why in report["blank"].items()], command.max_blank_share
    total, what = len(job.styles) * len(job.contents), "pictures {} came out blank"
    check_share(blank, total, ("--max-blank-share", limit), what, "change prompts or settings")
    return report


def parse_shard(text: str) -> tuple[int, int]:
    """Raises InputError."""
    if (match := re.fullmatch(r"(\d+)/(\d+)", text)) and int(match[1]) < int(match[2]):
        return int(match[1]), int(match[2])
    raise InputError(f"--shard {text!r} must be I/N with I from 0 to N - 1: 0/4 to 3/4 for four processes")


def draw_batches(batches: Sequence[Batch], job: Job, pipeline: Pipeline, scratch: Path) -> Iterator[bool]:
    """Makes the missing pictures of batches, style by style; for each picture whether it was found blank now."""
    for style, of_style in groupby(batches, key=lambda batch: batch.style):
        with pipeline.wearing(style.lora, f"style {style.id!r}"):
            for batch in of_style:
                images = pipeline.draw(batch, job.settings)
                for content, image in zip(batch.contents, images, strict=True):
                    yield keep(image, style.id, content.id, job, scratch)


def keep(image: np.ndarray, style: str, content: str, job: Job, scratch: Path) -> bool:
    """Stores a picture (H, W, 3) of floats, or why it is none, unless it is there; whether it is blank and new."""
    if not job.is_missing(style, content):  # it was drawn to keep its neighbours company
        return False
    if fault := fault_of(image):
        store(job.blank(style, content), fault.encode(), scratch)
        return True
    data = io.BytesIO()
    Image.fromarray(to_pixels(image)).save(data, "png")
    store(job.picture(style, content), data.getvalue(), scratch)
    return False


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


@program
def main(arguments: Sequence[str] | None) -> str:
    """Exit status: 0 done, 2 something the user can mend."""
    options = read_words(Command, arguments, "render")
    try:
        counts = render(options)["counts"]
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error, source="command line", model=RenderSettings)) from error
    return f"{options.out}: " + ", ".join(f"{number} {name}" for name, number in counts.items())


if __name__ == "__main__":
    sys.exit(main())
