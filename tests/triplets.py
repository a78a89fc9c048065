"""A small folder of triplets for tests, and configs over it; every picture differs from every other."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.build import main as build
from miniature.style_folders import paint_many_styles
from ztrain.config import Config, load_config

ROOT = Path(__file__).parents[1]
PLACES = {
    "base": "Z-Image-Turbo",
    "vision_language": "Qwen3-VL-4B-Instruct",
    "siglip": "siglip2-so400m-patch16-naflex",
}


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file of this process grows beyond `limit` bytes: it is told what a full disk tells."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Four blocks of colour with some noise: compresses, and no two seeds look alike."""
    generator = np.random.default_rng(seed)
    blocks = np.kron(generator.integers(0, 230, (2, 2, 3)), np.ones((height // 2, width // 2, 1)))
    return Image.fromarray((blocks + generator.integers(0, 25, (height, width, 3))).astype(np.uint8))


def write_triplets(folder: Path, count: int = 6, validation: int = 4) -> Path:
    """`<folder>/{train,validation}/metadata.jsonl`: one reference each, the last row of train has two."""
    for split, rows, first in (("train", count, 0), ("validation", validation, 1000)):
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(rows):
            names = [f"ref-{i}-{k}.png" for k in range(2 if i == rows - 1 and split == "train" else 1)]
            for k, name in enumerate(names):
                picture(first + 10 * i + k).save(folder / split / name)
            picture(first + 10 * i + 5).save(folder / split / f"target-{i}.png")
            row = {
                "reference_file_names": names,
                "target_file_name": f"target-{i}.png",
                "prompt": f"a boat and {i} pears",
            }
            lines.append(json.dumps(row) + "\n")
        (folder / split / "metadata.jsonl").write_text("".join(lines))
    return folder


def model_words(family: Path, base: str = "Z-Image-Turbo") -> list[str]:
    """Command-line words that name the tiny family's models."""
    return [word for role, name in (PLACES | {"base": base}).items()
            for word in (f"--models.{role}.pretrained_model_name_or_path", str(family / name))]  # fmt: skip


def tiny_config(family: Path, data: Path, cache: Path, *words: str, name: str = "siglip_lora") -> Config:
    """An experiment of configs/ on the tiny family with this data and cache."""
    files = [ROOT / "configs" / f"{name}.yaml", ROOT / "configs" / "tiny.yaml"]
    places = ["--data.train_data_dir", str(data), "--cache.dir", str(cache)]
    return load_config(files, [*model_words(family), *places, *words])


def painted_experiment(folder: Path, name: str, test: tuple[int, int], *more: str, seed: int = 0) -> Config:
    """configs/NAME.yaml of six steps on the miniature, and triplets of so many painted styles and pictures of each."""
    paint_many_styles(folder, {"train": (2, 2), "test": test}, seed=seed)
    styles = "{styles: {contents: contents.csv, splits: {train: train, test: test}}}"
    pair = "pair: {triplets_per_target: 1}"
    (folder / "build.yaml").write_text(f"sources: [images]\ndedup: null\nlabel: {styles}\n{pair}\n")
    assert build(["--config", str(folder / "build.yaml"), "--out", str(folder / "triplets")]) == 0
    words = ("--data.train_data_dir", str(folder / "triplets"), "--cache.dir", str(folder / "cache"))
    files = [ROOT / f"configs/{name}.yaml", ROOT / "configs/miniature.yaml"]
    return load_config(files, [*words, "--sample.num_inference_steps", "6", *more])
