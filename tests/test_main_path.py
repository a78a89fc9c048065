"""The main job through its own commands, in real processes: drawings -> triplets -> training -> export -> picture."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from tests.test_parity import picture
from ztrain.export import read_adapter

ROOT = Path(__file__).parents[1]
EMOJI = ROOT.parent / "shared" / "data" / "emoji_styles"
LISTS = ("projector", "splice_lora", "siglip", "siglip_lora", "lora")
LAUNCH = ("accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml")

needs_emoji = pytest.mark.skipif(not EMOJI.is_dir(), reason="../shared/data/emoji_styles is absent")


def run(*command: str, status: int = 0, cpu: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if cpu else {}
    finished = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert finished.returncode == status, finished.stdout + finished.stderr
    return finished


def models(family: Path) -> list[str]:
    places = {
        "base": "Z-Image-Turbo",
        "vision_language": "Qwen3-VL-4B-Instruct",
        "siglip": "siglip2-so400m-patch16-naflex",
    }
    return [word for role, name in places.items()
            for word in (f"--models.{role}.pretrained_model_name_or_path", str(family / name))]  # fmt: skip


@pytest.fixture(scope="module")
def paintings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triplets of painted drawings."""
    folder = tmp_path_factory.mktemp("paintings")
    run("ztrain.mini.painter", "--out", str(folder / "drawings"))
    config = {"images": "images", "contents": "contents.csv", "max_triplets_per_split": 24}
    (folder / "drawings" / "build.yaml").write_text(yaml.safe_dump(config))
    run("data_tools.build", "--config", str(folder / "drawings" / "build.yaml"), "--out", str(folder / "triplets"))
    return folder / "triplets"


def train(family: Path, data: Path, out: Path, name: str, *words: str, status: int = 0) -> subprocess.CompletedProcess:
    return run(
        *LAUNCH, "-m", "ztrain.train", "--config", f"configs/{name}.yaml", "configs/tiny.yaml", *models(family),
        "--data.train_data_dir", str(data), "--output_dir", str(out), *words, status=status,
    )  # fmt: skip


def losses(out: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@needs_emoji
@pytest.mark.timeout(600)
def test_emoji_drawings_train_every_list_and_meet_in_one_picture(family: Path, tmp_path: Path) -> None:
    """Done-when 5: style folders and splits of emoji_styles, every trainable list through accelerate launch."""
    run("data_tools.build", "--config", "configs/data/emoji_styles.yaml", "--out", str(tmp_path / "emoji"),
        "--max-triplets-per-split", "64")  # fmt: skip
    splits = json.loads((EMOJI / "splits.json").read_text())
    for split, contents in (("train", splits["train_contents"]), ("validation", splits["val_contents"])):
        rows = [json.loads(line) for line in (tmp_path / "emoji" / split / "metadata.jsonl").read_text().splitlines()]
        assert len(rows) == 64 and {row["content"] for row in rows} <= set(contents)
        assert all(row["content"] not in row["reference_file_name"] for row in rows)
    exports = []
    for name in LISTS:
        out = tmp_path / name
        finished = train(family, tmp_path / "emoji", out, name)
        assert finished.stdout.splitlines()[-1] == f"exported: {out / 'export'}"
        curve = losses(out)
        assert len(curve) == 50
        assert sum(curve[-10:]) < sum(curve[:10]), (name, curve)
        exports.append(str(out / "export"))
    compared = run(
        "ztrain.cli", "compare", "--config", "configs/splice.yaml", "configs/tiny.yaml", *models(family),
        "--data.train_data_dir", str(tmp_path / "emoji"), "--compare.adapters", *exports,
        "--compare.output_dir", str(tmp_path), "--compare.num_samples", "3",
    )  # fmt: skip
    assert compared.stdout.splitlines()[-1] == str(tmp_path / "compare.png")
    result = json.loads((tmp_path / "compare.json").read_text())
    labels = [column["label"] for column in result["columns"]]
    assert labels == ["no image", "splice", "[projector]", "[splice, lora]", "[siglip]", "[siglip, lora]", "[lora]"]
    assert result["num_inference_steps"] == 4 and result["shift"] == 3.0 and len(result["rows"]) == 3
    changed = {column["label"]: column["difference_to_no_image"] for column in result["columns"]}
    assert changed.pop("no image") == 0 and min(changed.values()) > 0.1, changed
    with Image.open(tmp_path / "compare.png") as sheet:
        assert sheet.size == (8 + 200 * 9, 24 + 16 + 224 * 3)


def test_two_processes_and_workers_change_nothing(family: Path, paintings: Path, tmp_path: Path) -> None:
    """The global batch of a step is the same for 1 x 4, 2 x 2 and with loader workers, so the losses are too."""
    words = ("--train.max_train_steps", "4")
    train(family, paintings, tmp_path / "one", "splice_lora", *words)
    train(family, paintings, tmp_path / "workers", "splice_lora", *words, "--data.dataloader_num_workers", "2")
    assert losses(tmp_path / "one") == losses(tmp_path / "workers")
    # accelerate starts several CPU processes through MPI only; torchrun's gloo processes are the same to the trainer.
    run(
        "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "localhost:0", "-m", "ztrain.train", "--config", "configs/splice_lora.yaml",
        "configs/tiny.yaml", *models(family), "--data.train_data_dir", str(paintings), "--output_dir",
        str(tmp_path / "two"), *words, "--train.train_batch_size", "2", cpu=True,
    )  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    train(family, paintings, tmp_path / "accumulated", "splice_lora", *words, "--train.train_batch_size", "2",
          "--train.gradient_accumulation_steps", "2")  # fmt: skip
    assert losses(tmp_path / "accumulated") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_run_folder_is_enough_to_repeat_it(family: Path, paintings: Path, tmp_path: Path) -> None:
    train(family, paintings, tmp_path / "first", "siglip", "--train.max_train_steps", "3", "--flow.loss_weight", "bump")
    run(*LAUNCH, "-m", "ztrain.train", "--config", str(tmp_path / "first" / "config.yaml"),
        "--output_dir", str(tmp_path / "second"))  # fmt: skip
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    first, second = (read_adapter(tmp_path / name / "export") for name in ("first", "second"))
    for key, tensor in first.files["adapter.safetensors"].items():
        assert torch.equal(tensor, second.files["adapter.safetensors"][key])


def test_bf16_base_trains_float32_weights(family: Path, paintings: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--train.max_train_steps", "3", "--train.mixed_precision", "bf16", "--train.gradient_checkpointing")
    train(family, paintings, out, "siglip_lora", *words)
    exported = read_adapter(out / "export")
    assert {t.dtype for file in exported.files.values() for t in file.values()} == {torch.float32}
    train(family, paintings, tmp_path / "full", "siglip_lora", "--train.max_train_steps", "3")
    assert losses(out) == pytest.approx(losses(tmp_path / "full"), rel=0.05)
    assert losses(out) != losses(tmp_path / "full")


def test_stats_feed_the_scaled_splice_and_presets_are_columns(family: Path, paintings: Path, tmp_path: Path) -> None:
    common = [*models(family), "--data.train_data_dir", str(paintings)]
    stats = tmp_path / "stats.safetensors"
    run("ztrain.cli", "stats", "--config", "configs/splice.yaml", "configs/tiny.yaml", *common, "--out", str(stats))
    with safe_open(stats, framework="pt") as file:
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys()) and len(file.keys()) == 8
    preset = tmp_path / "scaled.yaml"
    splice = {"kind": "splice", "compose": "blend", "scaling": "per_dimension", "statistics_file": str(stats)}
    small = {"min_reference_pixels": 4096, "max_reference_pixels": 16384}
    preset.write_text(yaml.safe_dump({"encoders": {"hidden_index": 4, **small}, "adapters": [splice]}))
    run(
        "ztrain.cli", "compare", "--config", "configs/splice.yaml", "configs/tiny.yaml", *common,
        "--compare.presets", str(preset), "--compare.output_dir", str(tmp_path), "--compare.num_samples", "2",
        "--sample.guidance_scale", "2", "--sample.image_guidance_scale", "1",
    )  # fmt: skip
    columns = {c["label"]: c for c in json.loads((tmp_path / "compare.json").read_text())["columns"]}
    assert columns["scaled"]["difference_to_no_image"] != columns["splice"]["difference_to_no_image"] > 0


def test_sample_with_strength_scales_and_odd_references(family: Path, paintings: Path, tmp_path: Path) -> None:
    train(family, paintings, tmp_path / "run", "siglip_lora", "--train.max_train_steps", "2")
    Image.new("RGBA", (90, 70), (255, 0, 0, 100)).save(tmp_path / "rgba.png")
    picture(3, 64, 64).save(tmp_path / "start.png")

    def render(name: str, *words: str, status: int = 0) -> subprocess.CompletedProcess:
        return run(
            "ztrain.cli", "sample", "--config", "configs/splice.yaml", "configs/tiny.yaml", *models(family),
            "--out", str(tmp_path / name), *words, status=status,
        )  # fmt: skip

    adapter = ("--adapter", str(tmp_path / "run" / "export"))
    both = ("--reference", str(tmp_path / "rgba.png"), str(tmp_path / "start.png"))
    render("a.png", "--prompt", "a boat", *both, *adapter, "--sample.width", "96")
    with Image.open(tmp_path / "a.png") as rendered:
        assert rendered.size == (96, 64)
    render("b.png", "--prompt", "a boat", *both, *adapter, "--sample.width", "96", "--scales", "0", "0")
    render("c.png", "--prompt", "a boat", "--sample.width", "96")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    render("d.png", "--prompt", "a boat", "--start-image", str(tmp_path / "start.png"), "--strength", "0.5")
    start = str(tmp_path / "start.png")
    other_base = ("--models.base.pretrained_model_name_or_path", str(family / "Z-Image"))
    for words, message in (
        ((), "the prompt is empty"),
        (("--prompt", "x", "--strength", "0.5"), "go together"),
        (("--prompt", "x", "--start-image", start, "--strength", "0"), "must be above 0"),
        (("--prompt", "x", "--sample.width", "50"), "multiple of 16"),
        (("--prompt", "x", "--scales", "1", "1"), "2 numbers for the 1 adapters"),
        (("--prompt", "x", "--reference", str(tmp_path / "absent.png")), "absent.png"),
        (("--prompt", "x", *adapter, *other_base), "another transformer"),
    ):  # fmt: skip
        failed = render("e.png", *words, status=2)
        assert message in failed.stderr + failed.stdout and "Traceback" not in failed.stderr, failed.stderr
        assert not (tmp_path / "e.png").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"prompt": "  "}, "empty"),
        ({"target_file_name": "images/none.png"}, "none.png"),
        ({"reference_file_name": "broken.png"}, "broken.png"),
        ({"reference_file_name": "thin.png"}, "thin.png"),
        ({"reference_file_name": "small.png"}, "small.png"),
        ({"prompt": "word " * 700}, "max_sequence_length"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_bad_triplets_stop_training_with_one_sentence(
    family: Path, paintings: Path, tmp_path: Path, spoil: dict, message: str
) -> None:
    split = tmp_path / "data" / "train"
    split.mkdir(parents=True)
    row = json.loads((paintings / "train" / "metadata.jsonl").read_text().splitlines()[0])
    picture(1).save(split / "fine.png")
    picture(1, 1600, 40).save(split / "thin.png")
    picture(1, 20, 20).save(split / "small.png")
    (split / "broken.png").write_bytes((split / "fine.png").read_bytes()[:2000])
    row |= {"reference_file_name": "fine.png", "target_file_name": "fine.png"} | spoil
    (split / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    failed = run(
        "ztrain.train", "--config", "configs/splice_lora.yaml", "configs/tiny.yaml", *models(family),
        "--data.train_data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"), status=2,
    )  # fmt: skip
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in failed.stderr, failed.stderr


def test_a_list_without_weights_cannot_train(family: Path, paintings: Path, tmp_path: Path) -> None:
    failed = run(
        "ztrain.train", "--config", "configs/splice.yaml", "configs/tiny.yaml", *models(family),
        "--data.train_data_dir", str(paintings), "--output_dir", str(tmp_path / "run"), status=2,
    )  # fmt: skip
    assert "[splice] has no weights to train" in failed.stderr


def test_a_loss_that_is_not_finite_stops_before_the_step(family: Path, paintings: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(family / "Z-Image-Turbo", tmp_path / "broken")
    weights = tmp_path / "broken" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["layers.1.feed_forward.w2.weight"].fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    failed = run(
        "ztrain.train", "--config", "configs/lora.yaml", "configs/tiny.yaml", *models(family),
        "--models.base.pretrained_model_name_or_path", str(tmp_path / "broken"),
        "--data.train_data_dir", str(paintings), "--output_dir", str(tmp_path / "run"), status=1,
    )  # fmt: skip
    assert "step 1: loss nan" in failed.stderr and "stopped before the step" in failed.stderr
    assert not (tmp_path / "run" / "export").exists() and losses(tmp_path / "run") == []


def test_the_demo_prints_its_picture_last_and_says_that_the_weights_are_random(tmp_path: Path) -> None:
    finished = run("ztrain.demo", "--out", str(tmp_path), "--adapters", "projector", "--steps", "3")
    lines = finished.stdout.splitlines()
    assert lines[-1] == str(tmp_path / "compare.png") and Path(lines[-1]).is_file()
    assert "weights are random" in finished.stdout


def test_commands_in_readme_are_the_tested_ones() -> None:
    """Every line of README's shell blocks names a program and options that exist."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if line and not line.startswith("#")]
    assert len(commands) >= 8
    makefile = (ROOT / "Makefile").read_text()
    for command in commands:
        words = [w for w in command.split() if "=" not in w or w.startswith("-")]
        if words[0] == "make":
            assert re.search(rf"^(?:.* )?{words[1]}:", makefile, re.M), command
            continue
        files = [w for w in words if w.startswith(("configs/", "launch/")) and "MY" not in w]
        assert all((ROOT / file).is_file() for file in files), command
        if "--config" in words and "configs/data/" not in command:
            start = words.index("--config") + 1
            end = next((i for i in range(start, len(words)) if words[i].startswith("--")), len(words))
            options = words[end:]
            own = {"--out", "--prompt", "--reference", "--adapter", "--start-image", "--strength", "--scales"}
            kept: list[str] = []
            for i, word in enumerate(options):
                if word.startswith("--") and word not in own:
                    values = next((j for j in range(i + 1, len(options)) if options[j].startswith("--")), len(options))
                    kept += options[i:values]
            run("ztrain.cli", "config", "show", "--config", *words[start:end], *kept)
