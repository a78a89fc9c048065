"""What the environment of a launcher says: taken as it is, or refused with both values; never followed in silence."""

import os
import re
import shlex
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from tests.forge import the_forge
from tests.triplets import ROOT
from ztrain.config import TrainConfig
from ztrain.distributed.launched import check_environment, check_processes, check_sharing
from ztrain.errors import InputError

OF_A_RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500",
             "ACCELERATE_USE_CPU": "true"}  # fmt: skip
DOCUMENTED = sorted(
    (path.name, line.strip())
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/accelerate/*.yaml"))
    for line in path.read_text(encoding="utf-8").splitlines()
    if re.match(r"(# )?accelerate launch .*-m ", line.strip())
)


def made_by(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """The variables that `accelerate launch` makes of its own words, by its own code."""
    monkeypatch.chdir(ROOT)
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*words, "-m", "ztrain.train"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = "deepspeed_config_file"
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args) if args.use_fsdp or args.multi_gpu else prepare_simple_launcher_cmd_env(args)[1]


def check(t: TrainConfig, environ: Mapping[str, str]) -> None:
    check_environment(t, environ)
    check_processes(environ)
    check_sharing(environ)


@pytest.mark.parametrize("strategy", [path.stem for path in sorted(ROOT.glob("configs/accelerate/*.yaml"))])
def test_every_file_of_configs_accelerate_runs(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_by(["--config_file", f"configs/accelerate/{strategy}.yaml", "--main_process_port", "0"], monkeypatch)
    assert ("ACCELERATE_USE_DEEPSPEED" in made) == strategy.startswith("zero")
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        with pytest.raises(InputError, match="DeepSpeed is not installed: pip install 'ztrain"):
            check(TrainConfig(), made)
        made = {key: value for key, value in made.items() if key != "ACCELERATE_USE_DEEPSPEED"}
    check(TrainConfig(mixed_precision="no", gradient_accumulation_steps=4), made)
    check(TrainConfig(mixed_precision="bf16"), made)


@pytest.mark.parametrize(("file", "line"), DOCUMENTED)
def test_every_documented_launch_runs(file: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(tmp_path / "none.yaml"))
    words = shlex.split(line.removeprefix("# ").removeprefix("accelerate launch ").split("-m ")[0])
    if "zero" not in line:
        check(TrainConfig(), made_by([*words, "--main_process_port", "0"], monkeypatch))
    assert words or file != "README.md" or "configs/accelerate" not in line


def test_what_says_the_same_is_no_contradiction() -> None:
    check(TrainConfig(gradient_accumulation_steps=4, mixed_precision="bf16", max_grad_norm=0.5), OF_A_RANK | {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_GRADIENT_CLIPPING": "7", "ACCELERATE_USE_FSDP": "false",
    })  # fmt: skip
    check(TrainConfig(), {"ACCELERATE_USE_CPU": "1", "WORLD_SIZE": "1", "ACCELERATE_TORCH_DEVICE": "cpu"})


REFUSED = [
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"},
     "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 8 .* train.gradient_accumulation_steps is 1: the experiment decides"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, "STEPS is auto .* train.gradient_accumulation_steps is 1"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ""}, "STEPS is empty .* train.gradient_accumulation_steps is 1"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "ACCELERATE_MIXED_PRECISION is fp16 .* train.mixed_precision is bf16"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND is INDUCTOR .* train.compile is auto"),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "0.5"},
     "ACCELERATE_GRADIENT_CLIPPING is 0.5 .* train.max_grad_norm is 1.0"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM is true, which ztrain does not know"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "USE_PARALLELISM_CONFIG is true, which ztrain does not know"),
    ({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true"}, "are both true, and a run can have one"),
    ({"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP is 1 in the environment, which accelerate takes for false"),
    ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU is maybe in the environment: write true or false"),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
     "RANK and WORLD_SIZE and LOCAL_RANK are set in the environment, without MASTER_ADDR and MASTER_PORT: left over of "
     "another job.* unset RANK WORLD_SIZE LOCAL_RANK"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set in the environment, without RANK and WORLD_SIZE and MASTER_ADDR and"),
    ({"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, "WORLD_SIZE is set in the environment, without RANK and"),
    (OF_A_RANK | {"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2: ranks are 0 to 1"),
    (OF_A_RANK | {"WORLD_SIZE": "two"}, "WORLD_SIZE is two in the environment, which is no number"),
    (OF_A_RANK | {"MASTER_PORT": "any"}, "MASTER_PORT is any in the environment, which is no number"),
    ({"ACCELERATE_TORCH_DEVICE": "cuda:99"}, r"ACCELERATE_TORCH_DEVICE is cuda:99, and torch finds \d+ GPUs here"),
    ({"ACCELERATE_TORCH_DEVICE": "gpu"}, "ACCELERATE_TORCH_DEVICE is gpu, which is no device"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "sentence"), REFUSED)
def test_what_contradicts_the_experiment_is_refused_with_both_values(said: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check(TrainConfig(), said)


def test_a_deepspeed_file_is_looked_at_before_its_library_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deepspeed.py").touch()  # as if it were installed; it is not imported
    path, asked = tmp_path / "zero.json", {"ACCELERATE_USE_DEEPSPEED": "true"}
    check_sharing(asked)
    check_sharing(asked | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "configs/deepspeed/zero2.json")})
    for text, sentence in ((None, "cannot read"), ("{", "cannot read"), ("[]", "has no zero_optimization")):
        if text is not None:
            path.write_text(text)
        with pytest.raises(InputError, match=f"ACCELERATE_DEEPSPEED_CONFIG_FILE: .*{sentence}"):
            check_sharing(asked | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})


@pytest.mark.usefixtures("forge")
def test_a_run_ends_with_one_sentence_where_its_launcher_asks_the_impossible(tmp_path: Path) -> None:
    """Whole programs: status 2, no traceback, and nothing written."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    plain |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    meeting = OF_A_RANK | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        asked: list[tuple[dict[str, str], str]] = [
            ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, "train.gradient_accumulation_steps is 1"),
            (meeting | {"MASTER_PORT": port}, f"the processes cannot meet at 127.0.0.1:{port}: .*in use"),
            ({"ACCELERATE_USE_FSDP": "true", "FSDP_AUTO_WRAP_POLICY": "NONE"}, "accelerate cannot start as its launch"),
            ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and accelerate runs 1 process on cpu"),
        ]
        for said, sentence in asked:
            words = ["--config", "configs/lora.yaml", "configs/tiny.yaml", "--output_dir", str(tmp_path / "run")]
            done = the_forge().run(["ztrain.train", *words], plain | said)
            last = done.stderr.splitlines()[-1]
            assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
            assert re.search(f"^error: .*{sentence}", last), last
    assert not (tmp_path / "run").exists()
