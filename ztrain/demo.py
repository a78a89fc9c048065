"""The main job in one command: painted drawings -> triplets -> a trained adapter -> one labelled picture.

`python -m ztrain.demo --out DIR [--adapters NAME]`: NAME is an experiment of configs/. The models are the pretrained
miniature that comes with ztrain; so few steps show that the path works, not how well an adapter learns.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ztrain.compare import compare
from ztrain.config import load_config
from ztrain.errors import InputError
from ztrain.mini.painter import paint_style_folders

EXPERIMENTS = ("projector", "splice_lora", "siglip", "siglip_lora", "lora")
CONFIGS = Path("configs")

BUILD_CONFIG = """\
images: images
contents: contents.csv
max_triplets_per_split: 64
"""


def run(*command: str) -> None:
    """One step as a user would type it; a failure ends the demo with its status."""
    print("$", " ".join(command), flush=True)
    finished = subprocess.run([sys.executable, "-m", *command], check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if finished.returncode:
        sys.exit(finished.returncode)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ztrain.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--adapters", choices=EXPERIMENTS, default="siglip_lora")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    try:
        demo(options.out, options.adapters, options.steps)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def demo(out: Path, adapters: str, steps: int) -> None:
    """All four steps; ends with the picture's path on the last line."""
    started = time.perf_counter()

    print("1/4 painting drawings", flush=True)
    if not (out / "paintings" / "contents.csv").is_file():
        paint_style_folders(out / "paintings")
    build_file = out / "paintings" / "build.yaml"
    build_file.write_text(BUILD_CONFIG, encoding="utf-8")

    print("2/4 pairing drawings into triplets", flush=True)
    run("data_tools.build", "--config", str(build_file), "--out", str(out / "triplets"))

    print(f"3/4 training {adapters} for {steps} steps", flush=True)
    experiment = [str(CONFIGS / f"{adapters}.yaml"), str(CONFIGS / "miniature.yaml")]
    overrides = [
        *("--data.train_data_dir", str(out / "triplets")),
        *("--cache.dir", str(out / "cache")),
        *("--output_dir", str(out / "run")),
        *("--train.max_train_steps", str(steps)),
    ]
    shutil.rmtree(out / "run", ignore_errors=True)  # the demo's own run of an earlier time
    launch = ("accelerate.commands.launch", "--config_file", str(CONFIGS / "accelerate" / "cpu.yaml"))
    run(*launch, "-m", "ztrain.train", "--config", *experiment, *overrides)

    print("4/4 comparing it with no image and the splice", flush=True)
    compared = ["--compare.adapters", str(out / "run" / "export"), "--compare.output_dir", str(out)]
    picture = compare(load_config([Path(file) for file in experiment], [*overrides, *compared]))
    print(f"done in {time.perf_counter() - started:.0f} s")
    print("The models are the miniature; the real weights take the same commands: README, 'Your own images'.")
    print(picture)


if __name__ == "__main__":
    sys.exit(main())
