"""The whole training path at the real size on one GPU, with random weights: cache, steps, validation, previews, resume.

    python -m benchmarks.train_real_size --work out/real --out benchmarks/results [--side 512] [--lists LIST ...]
        [--again LIST ...] [--smoke]

Builds Z-Image, Qwen3-VL's front-end and SigLIP2 at their released sizes (22 GB of random bf16), paints triplets of
mixed aspects and captions, and runs the project's own commands on configs/*_24gb.yaml and configs/then_1024.yaml
(--side 512: without the latter): STEPS steps with averaged weights, validation and previews before, in the middle and
at the end, inside 24 GiB, all counted. Writes train_real_size_<gpu>.json (train_real_size_512_<gpu>.json): peak memory
of whole runs, what was kept, share of step time spent waiting for data, how busy the encoders were; rows of lists that
are not named stay. What --work has from an earlier call is used again.
--again: lists whose second half is run once more, from the checkpoint in the middle, to compare losses. --smoke: the
tiny family on a CPU, a rehearsal.
"""

import argparse
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

LISTS = ("siglip_lora", "siglip", "projector", "splice_lora", "lora")
STEPS = 200
BUDGET_GIB = 24.0
ASPECTS = ((1, 1), (3, 4), (4, 3), (2, 3), (3, 2))


TEXT_SIZES = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}  # fmt: skip
SIGLIP_SIZES = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                "num_patches": 256, "patch_size": 16}  # fmt: skip


def build_real_family(tiny: Path, folder: Path) -> None:
    """The tiny family's folders with models of the released sizes in them; configs as in zimage_facts.md section 1."""
    from diffusers import AutoencoderKL

    shutil.copytree(tiny, folder)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        build_transformer(folder)
        place = folder / "Z-Image" / "vae"
        vae = json.loads((place / "config.json").read_text())
        vae |= {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
        _save(AutoencoderKL.from_config(vae), place)
        build_text_and_siglip(folder, TEXT_SIZES, SIGLIP_SIZES)
        _build_vision_language(folder / "Qwen3-VL-4B-Instruct")
    torch.set_default_dtype(torch.float32)


def build_shallow_family(tiny: Path, folder: Path) -> None:
    """The tiny family's folders with the transformer at its released size, and in front of it encoders of two layers
    that give captions and SigLIP features of the released widths, by a tiny VAE: for runs of [lora] and [siglip], whose
    steps cannot tell. Needs a GPU; 12.3 GB."""
    shutil.copytree(tiny, folder)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        words = json.loads((folder / "Z-Image" / "text_encoder" / "config.json").read_text())["vocab_size"]
        shallow = {"num_hidden_layers": 2}
        build_text_and_siglip(folder, TEXT_SIZES | shallow | {"vocab_size": words}, SIGLIP_SIZES | shallow)
        build_transformer(folder)
    torch.set_default_dtype(torch.float32)


def build_transformer(folder: Path) -> None:
    """Of the released size."""
    from diffusers import ZImageTransformer2DModel

    from ztrain.model.dit import REAL_CONFIG

    _save(ZImageTransformer2DModel(**REAL_CONFIG), folder / "Z-Image" / "transformer")


def build_text_and_siglip(folder: Path, text_sizes: dict[str, int], siglip_sizes: dict[str, int]) -> None:
    """The text encoder and SigLIP2's vision tower of these sizes, in the place of tiny ones."""
    from transformers import Qwen3Config, Qwen3Model, Siglip2VisionConfig, Siglip2VisionModel

    place = folder / "Z-Image" / "text_encoder"
    text = json.loads((place / "config.json").read_text()) | text_sizes
    wide = {k: v for k, v in text.items() if k not in ("layer_types", "architectures", "dtype")}
    _save(Qwen3Model(Qwen3Config(**wide)), place)
    place = folder / "siglip2-so400m-patch16-naflex"
    preprocessor = (place / "preprocessor_config.json").read_bytes()
    _save(Siglip2VisionModel(Siglip2VisionConfig(**siglip_sizes)), place)
    (place / "preprocessor_config.json").write_bytes(preprocessor)


def _build_vision_language(place: Path) -> None:
    """The parts of it that are read: the visual one, and embeddings."""
    from safetensors.torch import save_file
    from transformers.models.qwen3_vl import Qwen3VLConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    whole = json.loads((place / "config.json").read_text())
    whole["text_config"] |= TEXT_SIZES | {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default",
                                          "mrope_section": [24, 20, 20], "mrope_interleaved": True}}  # fmt: skip
    whole["text_config"].pop("layer_types", None)
    whole["vision_config"] |= {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16,
                               "out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17],
                               "num_position_embeddings": 2304}  # fmt: skip
    config = Qwen3VLConfig(**whole)
    visual = Qwen3VLVisionModel(config.vision_config)
    _randomise(visual)
    tensors = {f"model.visual.{k}": v.cpu().contiguous() for k, v in visual.state_dict().items()}
    tensors["model.language_model.embed_tokens.weight"] = torch.zeros((151936, 2560), device="cpu")
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(place)


def _save(model: Any, place: Path) -> None:
    _randomise(model)
    shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(place)
    count = sum(p.numel() for p in model.parameters())
    print(f"built {place.parent.name}/{place.name} {count / 1e9:.2f} B", flush=True)


def _randomise(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.02)


def vary(drawings: Path) -> None:
    """Crops drawings to mixed aspects, each content in all styles alike, and makes some captions long."""
    contents = drawings / "contents.csv"
    with contents.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for place, row in enumerate(rows):
        wide, high = ASPECTS[place % len(ASPECTS)]
        row["prompt"] += ", drawn with care" * (place % 7 * 4)
        for picture in (drawings / "images").glob(f"*/{row['id']}.png"):
            with Image.open(picture) as image:
                side = min(image.size)
                width, height = side * wide // max(wide, high), side * high // max(wide, high)
                left, top = (image.width - width) // 2, (image.height - height) // 2
                cropped = image.crop((left, top, left + width, top + height))
            cropped.save(picture)
    with contents.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run(*words: str) -> tuple[str, float]:
    """One command; its output and seconds."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done.stdout, seconds


def prepare(work: Path, is_real: bool) -> Path:
    """Builds in `work` what it lacks of the family, whose folder this returns, and the triplets."""
    work.mkdir(parents=True, exist_ok=True)
    tiny, family, half = work / "tiny", work / "family", work / "family.half"
    run("miniature.family", "--out", str(tiny))  # which leaves a whole one as it is
    if is_real and not family.exists():
        shutil.rmtree(half, ignore_errors=True)
        build_real_family(tiny, half)
        half.rename(family)
        torch.cuda.empty_cache()
    if not (work / "triplets").exists():
        for name in ("drawings", "triplets.half"):
            shutil.rmtree(work / name, ignore_errors=True)
        run("miniature.style_folders", "--out", str(work / "drawings"))
        vary(work / "drawings")
        (work / "build.yaml").write_text(
            "sources: [drawings/images]\ndedup: null\nlabel: {styles: {contents: drawings/contents.csv}}\n"
            "pair: {max_triplets_per_split: 48, max_copy_score: 1.0}\n"
        )
        run("data_tools.build", "--config", str(work / "build.yaml"), "--out", str(work / "triplets.half"))
        (work / "triplets.half").rename(work / "triplets")
    return family if is_real else tiny


def places_of(name: str, family: Path, data: Path, cache: Path, is_smoke: bool, side: int = 1024) -> list[str]:
    """The arguments that say what is trained on what: a list of configs/*_24gb.yaml, models, triplets and cache."""
    overlays = ["configs/then_1024.yaml"] if side == 1024 else []
    overlays += ["configs/tiny.yaml"] if is_smoke else []
    folders = ("Z-Image", "Qwen3-VL-4B-Instruct", "siglip2-so400m-patch16-naflex")
    places = {role: str(family / f) for role, f in zip(("base", "vision_language", "siglip"), folders, strict=True)}
    return [
        "--config", f"configs/{name}_24gb.yaml", *overlays,
        *(w for role, place in places.items() for w in (f"--models.{role}.pretrained_model_name_or_path", place)),
        "--data.train_data_dir", str(data), "--cache.dir", str(cache),
    ]  # fmt: skip


def words_of(name: str, family: Path, work: Path, steps: int, is_smoke: bool, side: int) -> list[str]:
    """The arguments that training a list and filling its cache have in common."""
    return [
        *places_of(name, family, work / "triplets", work / "cache", is_smoke, side),
        "--train.gradient_accumulation_steps", "1", "--train.lr_warmup_steps", "0", "--train.logging_steps", "1",
        "--train.ema_decay", "0.999", "--validation.num_samples", "4", "--validation.num_previews", "2",
        "--validation.validation_steps", str(steps // 2), "--validation.preview_steps", str(steps // 2),
        "--sample.num_inference_steps", "2", "--data.max_crop", "0.3", "--data.small_targets", "upscale",
        "--train.gradient_checkpointing", "budget",
        *([] if is_smoke else ["--memory.budget_gib", str(BUDGET_GIB)]),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=LISTS)
    parser.add_argument("--again", nargs="*", choices=LISTS, default=("siglip_lora", "projector"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--side", type=int, choices=(512, 1024), default=1024)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    started = time.perf_counter()
    steps: int = options.steps
    work, gpu = options.work, "cpu" if options.smoke else torch.cuda.get_device_name()
    family = prepare(work, is_real=not options.smoke)
    print(f"prepared after {time.perf_counter() - started:.0f} s", flush=True)

    for name in options.lists:
        words = words_of(name, family, work, steps, options.smoke, options.side)
        said, seconds = run("ztrain.cli", "cache", *words)
        print(name, said.strip().splitlines()[-1], f"{seconds:.0f} s", flush=True)
        caching = {"list": name, "said": said.strip().splitlines()[-1], "seconds": round(seconds, 1)}
        out = work / "runs" / name
        shutil.rmtree(out, ignore_errors=True)
        train = ["ztrain.train", *words, "--output_dir", str(out), "--train.max_train_steps", str(steps)]
        said, seconds = run(*train, "--train.checkpointing_steps", str(steps // 2))
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        plain = [row for row in metrics if row["step"] > steps // 4 and "val/loss" not in row]
        total = sum(row["perf/step_seconds"] for row in plain)
        row = {
            "list": name,
            "peak_gib": round(max(row.get("mem/max_allocated_gib", 0.0) for row in metrics), 2),
            "reserved_gib": round(max(row.get("mem/max_reserved_gib", 0.0) for row in metrics), 2),
            "said": [line for line in said.splitlines() if re.match("blocks|activations", line)],
            "steps": steps,
            "ms": round(1e3 * statistics.median(row["perf/step_seconds"] for row in plain), 1),
            "data_wait_share": sum(r["perf/step_seconds"] * r["perf/data_wait_share"] for r in plain) / total,
            "loss": [metrics[1]["train/loss"], metrics[-1]["train/loss"]],
            "run_seconds": round(seconds, 1),
        }
        if name in options.again:
            again = work / "runs" / f"{name}_again"
            shutil.rmtree(again, ignore_errors=True)
            middle = out / "checkpoints" / f"step-{steps // 2:08d}"
            run(*train[:-3], str(again), "--train.max_train_steps", str(steps), "--resume_from_checkpoint", str(middle))
            resumed = [json.loads(line)["train/loss"] for line in (again / "metrics.jsonl").read_text().splitlines()]
            whole = [row["train/loss"] for row in metrics if row["step"] > steps // 2]
            row["resume_largest_relative_difference"] = max(abs(a - b) / b for a, b in zip(resumed, whole, strict=True))
        print(json.dumps(row), flush=True)
        write(options.out, gpu, row, caching, options.side)
    print(f"done after {time.perf_counter() - started:.0f} s")


def write(out: Path, gpu: str, row: dict[str, Any], caching: dict[str, Any], side: int) -> None:
    """Puts a list's rows into the file, in the place of earlier ones."""
    out.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"\W+", "_", gpu.lower())
    size, option = ("", "") if side == 1024 else (f"_{side}", f" --side {side}")
    path = out / f"train_real_size{size}_{card}.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": [], "caching": []}
    document = {
        "command": f"python -m benchmarks.train_real_size --work out/real --out benchmarks/results{option}",
        "what": f"configs/*_24gb.yaml at {side} px in {BUDGET_GIB:g} GiB, random weights; peak_gib: of whole runs,"
        " validation and previews in; rows without reserved_gib are older, with every block computed again",
        "machine": {"gpu": gpu, "torch": torch.__version__, "cpus": os.cpu_count()},
        "rows": [other for other in known["rows"] if other["list"] != row["list"]] + [row],
        "caching": [other for other in known["caching"] if other["list"] != row["list"]] + [caching],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
