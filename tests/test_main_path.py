"""The main job through its own commands, in real processes: drawings -> triplets -> training -> export -> picture."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.test_parity import picture
from ztrain.cli import _VERBS, _parser
from ztrain.config import load_config
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


def shell(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Runs shell lines as a user would from the project's root, with what they write going to `folder` instead."""
    project = folder / "project"
    project.mkdir()
    for name in ("configs", "launch", ".venv"):
        (project / name).symlink_to(ROOT / name)
    (folder / "shared").symlink_to(ROOT.parent / "shared")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    finished = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, cwd=project, env=environment
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


@needs_emoji
@pytest.mark.timeout(900)
def test_emoji_drawings_train_every_list_and_meet_in_one_picture(tmp_path: Path) -> None:
    """launch/train_tiny.sh: emoji_styles' folders and splits, every trainable list through accelerate launch."""
    finished = shell(tmp_path, "launch/train_tiny.sh 50")
    project = tmp_path / "project"
    splits = json.loads((EMOJI / "splits.json").read_text())
    for split, contents in (("train", splits["train_contents"]), ("validation", splits["val_contents"])):
        rows = [
            json.loads(line) for line in (project / "out/emoji" / split / "metadata.jsonl").read_text().splitlines()
        ]
        assert len(rows) == 256 and {row["content"] for row in rows} <= set(contents)
        assert all(f"/{row['content']}." not in row["reference_file_name"] for row in rows)
    for name in LISTS:
        curve = losses(project / "runs/tiny" / name)
        assert len(curve) == 50 and sum(curve[-10:]) < sum(curve[:10]), (name, curve)
    assert finished.stdout.splitlines()[-1] == "out/compare/compare.png"
    result = json.loads((project / "out/compare/compare.json").read_text())
    labels = [column["label"] for column in result["columns"]]
    assert labels == ["no image", "splice", "[projector]", "[splice, lora]", "[siglip]", "[siglip, lora]", "[lora]"]
    assert result["num_inference_steps"] == 4 and result["shift"] == 3.0 and len(result["rows"]) == 6
    changed = {column["label"]: column["difference_to_no_image"] for column in result["columns"]}
    assert changed.pop("no image") == 0 and min(changed.values()) > 0.1, changed
    with Image.open(project / "out/compare/compare.png") as sheet:
        assert sheet.size == (8 + 200 * 9, 24 + 16 + 224 * 6)


@needs_emoji
def test_readme_block_on_real_drawings_runs_as_written(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## The same on real drawings")[1]
    block = re.findall(r"```bash\n(.*?)```", section, re.S)[0]
    activate, commands = block.split("\n", 1)
    assert activate == "source .venv/bin/activate"
    assert shell(tmp_path, commands).stdout.splitlines()[-1] == "out/compare/compare.png"


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
    again = run("ztrain.train", "--config", str(tmp_path / "first" / "config.yaml"), status=2)
    assert "already holds a run" in again.stderr
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
    run("ztrain.cli", "stats", "--config", "configs/splice.yaml", "configs/tiny.yaml", *common, "--out", str(stats),
        "--encoders.hidden_index", "4")  # fmt: skip
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
    other = ("--compare.presets", str(preset), "--encoders.hidden_index", "5")
    preset.write_text(preset.read_text().replace("hidden_index: 4", "hidden_index: 5"))
    failed = run(
        "ztrain.cli", "compare", "--config", "configs/splice.yaml", "configs/tiny.yaml", *common, *other, status=2
    )
    assert "was measured with encoders.hidden_index 4, this run has 5" in failed.stderr
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
        (("--prompt", "x", "--config", "configs/siglip.yaml", "configs/tiny.yaml"), "are untrained"),
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
    workers = "1" if message == "broken.png" else "0"  # a worker's error must arrive as the same sentence
    failed = run(
        "ztrain.train", "--config", "configs/splice_lora.yaml", "configs/tiny.yaml", *models(family),
        "--data.train_data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"),
        "--data.dataloader_num_workers", workers, status=2,
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


def test_commands_in_readme_name_what_exists() -> None:
    """Programs, verbs, files and options of every shell line; the block on real drawings also runs as it stands."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    assert len(commands) >= 8
    targets = (ROOT / "Makefile").read_text()
    for words in commands:
        assert words[0] in {"make", "source", "python", "accelerate", "ztrain"}, words
        if words[0] == "make":
            assert re.search(rf"^(?:.* )?{words[1]}:", targets, re.M), words
        missing = [w for w in words if w.startswith(("configs/", "launch/")) and not (ROOT / w).is_file()]
        assert not missing, words
        if words[0] == "ztrain" or "ztrain.train" in words:
            verb = (
                "train"
                if words[0] != "ztrain"
                else next(v for v in _VERBS if words[1 : 1 + len(v.split())] == v.split())
            )
            start = words.index("--config")
            options, overrides = _parser(verb).parse_known_args(words[start:])
            assert load_config([ROOT / file for file in options.config], overrides)
