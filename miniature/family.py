"""Builds a tiny random version of every model of the Z-Image family, in the folders of the real repositories.

In: an empty place on disk. Out: Z-Image/, Z-Image-Turbo/, Z-Image-Omni-Base/, Qwen3-VL-4B-Instruct/ and
siglip2-so400m-patch16-naflex/, which the loading code of the real weights reads unchanged. The weights are
random: this family is for testing plumbing, not for looking at pictures. Other families of the same parts are
written with the same functions.

    python -m miniature.family --out DIR
"""

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import Siglip2ImageProcessorPil
from transformers.utils import logging as transformers_logging

from miniature.parts import (
    VISION_LANGUAGE_PROCESSOR,
    FamilySizes,
    Parts,
    build_siglip,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    build_vision_language,
)
from ztrain.errors import InputError
from ztrain.io.files import given_path, whole_folder
from ztrain.terminal import program

Model = TypeVar("Model", bound=nn.Module)

FAMILY_VERSION = 1  # raise it when the same seed and sizes no longer give the same files
MARKER = "family.json"  # written last: a folder that holds it is complete

BASE, TURBO, OMNI = "Z-Image", "Z-Image-Turbo", "Z-Image-Omni-Base"
VISION_LANGUAGE, SIGLIP = "Qwen3-VL-4B-Instruct", "siglip2-so400m-patch16-naflex"

# The schedules that the two released checkpoints ship (zimage_facts.md 2); Omni-Base's is taken to be Base's.
SHIFTS = {BASE: 6.0, TURBO: 3.0, OMNI: 6.0}

TINY = FamilySizes()


def build_family(folder: Path, *, seed: int = 0, sizes: FamilySizes = TINY) -> Path:
    """Builds the family in `folder` and returns it; does nothing if exactly this family is there already.

    The folder appears complete or not at all, and the caller's random state is left as it was.
    """
    return write_whole(folder, partial(_write_random, seed=seed, sizes=sizes), _marker(seed, sizes))


def is_complete(folder: Path, *, seed: int = 0, sizes: FamilySizes = TINY) -> bool:
    """Tells whether `folder` holds all of the family that these arguments build."""
    return is_whole(folder, _marker(seed, sizes))


def write_whole(folder: Path, write: Callable[[Path], None], marker: str) -> Path:
    """Lets `write` fill a folder, and returns it; does nothing if it is there already with this marker.

    `marker` says what decides the content: folders with equal markers are taken to be equal. The folder appears
    complete or not at all. Raises InputError where something else is in its place.
    """
    folder = Path(folder).resolve()
    if is_whole(folder, marker):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is neither empty nor the family asked for: remove it or name another folder")
    try:
        with whole_folder(folder) as building:
            write(building)
            (building / MARKER).write_text(marker)
    except InputError:
        # Another process may have finished the same family first: then its files are as good as ours.
        if not is_whole(folder, marker):
            raise
    return folder


def is_whole(folder: Path, marker: str) -> bool:
    """Tells whether `folder` was written to its end with this marker."""
    path = Path(folder) / MARKER
    return path.is_file() and path.read_text() == marker


def write_repositories(folder: Path, family: Parts) -> None:
    """Writes the models into the folders of the real repositories.

    The pipelines share everything but the transformer and the shift, as the released ones do.
    """
    with _quiet_progress_bars():
        family.vision_language.save_pretrained(folder / VISION_LANGUAGE)
        family.tokenizer.save_pretrained(folder / VISION_LANGUAGE)
        # Despite their names the two edges are pixel AREAS.
        shortest, longest = family.vision_language_pixels
        size = {"longest_edge": longest, "shortest_edge": shortest}
        described = json.dumps({"size": size} | VISION_LANGUAGE_PROCESSOR, indent=2) + "\n"
        (folder / VISION_LANGUAGE / "preprocessor_config.json").write_text(described)
        # Before the pipelines: saving Omni's copy of the vision tower writes into the configuration both share.
        family.siglip.save_pretrained(folder / SIGLIP)
        siglip_processor = Siglip2ImageProcessorPil(max_num_patches=family.siglip_patches)
        siglip_processor.save_pretrained(folder / SIGLIP)

        for name, transformer in family.transformers.items():
            parts = {
                "scheduler": FlowMatchEulerDiscreteScheduler(shift=family.shifts[name]),
                "vae": family.vae,
                "text_encoder": family.text_encoder.model,
                "tokenizer": family.tokenizer,
                "transformer": transformer,
            }
            if name == OMNI:
                parts |= {"siglip": family.siglip.vision_model, "siglip_processor": siglip_processor}
                pipeline = ZImageOmniPipeline(**parts)
            else:
                pipeline = ZImagePipeline(**parts)
            pipeline.save_pretrained(folder / name)
            # The index names Qwen3Model, the class that is loaded; the folder holds Qwen3ForCausalLM.
            shutil.rmtree(folder / name / "text_encoder")
            family.text_encoder.save_pretrained(folder / name / "text_encoder")


def _write_random(folder: Path, seed: int, sizes: FamilySizes) -> None:
    tokenizer = build_tokenizer(sizes)
    with _seeded(seed, "text encoder"):
        text_encoder = _finished(build_text_encoder(sizes, tokenizer))
    with _seeded(seed, "vision-language"):
        vision_language = _finished(build_vision_language(sizes, tokenizer))
    with _seeded(seed, "siglip"):
        siglip = _finished(build_siglip(sizes))
    with _seeded(seed, "vae"):
        vae = _finished(build_vae(sizes))
    transformers = {}
    for name in SHIFTS:
        with _seeded(seed, name):
            transformers[name] = _random_transformer(sizes, siglip=name == OMNI)
    family = Parts(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vision_language=vision_language,
        siglip=siglip,
        vae=vae,
        transformers=transformers,
        shifts=SHIFTS,
        siglip_patches=sizes.siglip_patches,
    )
    write_repositories(folder, family)


def _random_transformer(sizes: FamilySizes, siglip: bool) -> ZImageTransformer2DModel:
    transformer = build_transformer(sizes, siglip)
    for final_layer in transformer.all_final_layer.values():
        # Tokens arrive with unit variance, and a velocity (noise - latents) has variance 2: torch's own start could
        # not reach a target's spread, so no adapter before this frozen layer could learn one.
        nn.init.normal_(final_layer.linear.weight, std=(2 / sizes.dit_dim) ** 0.5)
    return _finished(transformer)


@torch.no_grad()
def _finished(model: Model) -> Model:
    """Makes every parameter random that its library starts as a constant, and switches to evaluation.

    Zero pad tokens and biases and norm weights of one would hide that a piece of code forgets them.
    """
    for parameter in model.parameters():
        if (parameter == parameter.flatten()[0]).all():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Gives each model its own random stream, so that changing one leaves the others' weights alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        yield


@contextmanager
def _quiet_progress_bars() -> Iterator[None]:
    """Stops transformers from drawing a bar for every small file, only here."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _marker(seed: int, sizes: FamilySizes) -> str:
    return json.dumps({"version": FAMILY_VERSION, "seed": seed, "sizes": asdict(sizes)}, indent=2) + "\n"


@program
def main(arguments: Sequence[str] | None) -> str:
    """Builds the family where the command line says."""
    parser = argparse.ArgumentParser(description="Build the tiny random Z-Image family.")
    parser.add_argument("--out", type=given_path, required=True, help="folder to create; left alone if complete")
    out = parser.parse_args(arguments).out
    if is_complete(out):
        return f"{out} holds a complete family of version {FAMILY_VERSION} already"
    build_family(out)
    return f"built the Z-Image family in {out}"


if __name__ == "__main__":
    sys.exit(main())
