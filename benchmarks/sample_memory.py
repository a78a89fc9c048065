"""What `ztrain sample` takes of a GPU's memory at the real size, stage by stage, with random weights.

    python -m benchmarks.sample_memory --work out/real --out benchmarks/results [--gguf] [--smoke]
    python -m benchmarks.sample_memory --page

Builds Z-Image, Qwen3-VL's front-end and SigLIP2 at their released sizes as train_real_size does (22 GB of random bf16;
a family that is in --work already is used), and runs the project's own command for a splice at 1024 px: with the VAE
beside the transformer, with `--offload`, a batch of two with guidance, and with --gguf from a Q8_0 file of the same
transformer (some minutes to write, 6.5 GB). Writes sample_memory_<gpu>.json: GiB reserved at most in each stage, and
seconds. --smoke: the tiny family on a CPU, a rehearsal.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import ROOT, write_page
from benchmarks.train_real_size import build_real_family, run

PROMPT = "a lighthouse on a cliff at dusk, the sea below it, drawn in ink with a wide brush"
PLAIN, GUIDED = ("--sample.guidance_scale", "0"), ("--sample.guidance_scale", "4")
CASES = {
    "VAE beside the transformer": PLAIN,
    "--offload": ("--offload", *PLAIN),
    "--offload, two at a time, guidance 4": ("--offload", "--num-images", "2", "--sample.batch_size", "2", *GUIDED),
}
_STAGE = re.compile(r"^(encoders|transformer and VAE|transformer|VAE): .*?at most ([\d.]+) GiB", re.M)


def prepared(work: Path, is_real: bool) -> Path:
    """The family's folder, built where `work` lacks it."""
    work.mkdir(parents=True, exist_ok=True)
    tiny, family, half = work / "tiny", work / "family", work / "family.half"
    run("miniature.family", "--out", str(tiny))
    if not is_real:
        return tiny
    if not family.exists():
        shutil.rmtree(half, ignore_errors=True)
        build_real_family(tiny, half)
        half.rename(family)
        torch.cuda.empty_cache()
    return family


def write_gguf(transformer: Path, path: Path) -> None:
    """Q8_0 of every matrix whose rows are whole blocks of 32, float32 of the rest."""
    import gguf
    from safetensors import safe_open

    writer = gguf.GGUFWriter(str(path), "lumina2", use_temp_file=True)
    kind = gguf.GGMLQuantizationType.Q8_0
    for file in sorted(transformer.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                array = tensors.get_tensor(name).float().numpy()
                if array.ndim == 2 and array.shape[0] > 1 and array.shape[1] % 32 == 0:
                    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
                else:
                    writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/real"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--gguf", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--page", action="store_true", help="write docs/sampling.md's table from --out only")
    options = parser.parse_args()
    if options.page:
        [result] = options.out.glob("sample_memory_nvidia*.json")
        write_page(ROOT / "docs/sampling.md", table(json.loads(result.read_text(encoding="utf-8"))))
        return
    work: Path = options.work
    family = prepared(work, is_real=not options.smoke)
    folders = {"base": "Z-Image", "vision_language": "Qwen3-VL-4B-Instruct"}
    models = [
        word
        for role, name in folders.items()
        for word in (f"--models.{role}.pretrained_model_name_or_path", str(family / name))
    ]
    cases, file = dict(CASES), work / "transformer-q8_0.gguf"
    if options.gguf:
        cases["--offload, GGUF Q8_0"] = ("--offload", "--models.transformer_file", str(file), *PLAIN)
    from PIL import Image

    Image.linear_gradient("L").convert("RGB").resize((512, 512)).save(work / "reference.png")
    rows: list[dict[str, object]] = []
    for name, words in cases.items():
        if str(file) in words and not file.exists():
            write_gguf(family / "Z-Image/transformer", file)
        several, tiny = "--num-images" in words, ["configs/tiny.yaml"] if options.smoke else []
        said, seconds = run(
            "ztrain.cli", "sample", "--config", "configs/splice.yaml", *tiny, *models,
            "--prompt", PROMPT, "--reference", str(work / "reference.png"),
            "--sample.num_inference_steps", "4",
            "--out", str(work / ("drawn" if several else "drawn.png")), *words,
        )  # fmt: skip
        row = {
            "case": name,
            "gib": {stage: float(gib) for stage, gib in _STAGE.findall(said)},
            "seconds": round(seconds),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
        write(options.out, rows, "cpu" if options.smoke else torch.cuda.get_device_name())


def write(out: Path, rows: list[dict[str, object]], gpu: str) -> None:
    """After each case: who stops it keeps what was measured."""
    document = {
        "command": "python -m benchmarks.sample_memory --work out/real --out benchmarks/results --gguf",
        "what": "ztrain sample, [splice], 1024 px, bfloat16, random weights, one reference, 4 steps; gib: reserved at"
        " most in each stage",
        "machine": {"gpu": gpu, "torch": torch.__version__},
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"sample_memory_{re.sub(r'[^a-z0-9]+', '_', gpu.lower())}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """For docs/sampling.md."""
    stages = ("encoders", "transformer", "VAE")
    lines = ["| | encoders | transformer | VAE |", "|---|---|---|---|"]
    for row in result["rows"]:
        gib = dict(row["gib"])
        gib["transformer"] = gib.pop("transformer and VAE", gib.get("transformer"))
        cells = " | ".join(f"{gib[stage]:.1f}" if stage in gib else "with it" for stage in stages)
        lines.append(f"| {row['case']} | {cells} |")
    machine = result["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"GiB reserved at most on {machine['gpu']}, torch {machine['torch']}: {result['what'].split(';')[0]}.",
        ]
    )


if __name__ == "__main__":
    main()
