"""Strategies that share one model: what is trained, saved and exported is what one process trains, saves and exports.

FSDP2 runs here on CPUs (sharded.py). So does DeepSpeed where it is installed (docs/launch.md); elsewhere its cases are
skipped. What only GPUs can show is measured by benchmarks.launch.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from safetensors.torch import load_file

from tests import ranks
from tests.forge import the_forge
from tests.test_adapters import LISTS, READ_REFERENCE, TRAINABLE
from tests.test_parity import make_model
from tests.triplets import ROOT, model_words, tiny_config, write_triplets
from ztrain.cache.cache import Cache
from ztrain.cache.loader import read_batch
from ztrain.cache.order import SampleKey
from ztrain.cache.prepare import cache_states
from ztrain.cache.samples import read_samples
from ztrain.conditioning import Dropout, concatenate
from ztrain.config import load_config
from ztrain.distributed import limits
from ztrain.distributed.strategy import Fsdp2, One, Strategy, Zero3, seats, strategy_of
from ztrain.errors import InputError
from ztrain.io.yamls import load_yaml

pytestmark = pytest.mark.usefixtures("forge")

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ALONE = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
NO_DEEPSPEED = "deepspeed is not installed: pip install 'ztrain[deepspeed]'"
COMMON = (
    "--train.dropout_text", "0.2", "--train.dropout_reference", "0.4", "--train.prior_weight", "0.5",
    "--train.adam_epsilon", "1e-2",  # else rounding decides where weights go whose gradients are nearly 0
    "--validation.validation_steps", "4", "--validation.num_samples", "3",
)  # fmt: skip


ASKED = """
import sys
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from ztrain.config import load_config
from ztrain.errors import InputError
from ztrain.distributed.strategy import strategy_of
from pathlib import Path
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
try:
    strategy_of(Accelerator(mixed_precision="no")).check(load_config([Path("configs/lora.yaml")], [], "test"))
except InputError as error:
    sys.exit(None if sys.argv[1] in str(error) else str(error))
sys.exit("it was not refused")
"""


def of_fsdp2() -> dict[str, str]:
    """The variables that accelerate makes of configs/accelerate/fsdp2.yaml."""
    settings = load_yaml(ROOT / "configs/accelerate/fsdp2.yaml")["fsdp_config"]
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    given = {names.get(key, key.upper()): str(value).lower() for key, value in settings.items()}
    given["FSDP_TRANSFORMER_CLS_TO_WRAP"] = settings["fsdp_transformer_layer_cls_to_wrap"]
    given["FSDP_AUTO_WRAP_POLICY"] = settings["fsdp_auto_wrap_policy"]
    return {"ACCELERATE_USE_FSDP": "true", **given}


def of_zero(stage: int, folder: Path) -> dict[str, str]:
    """Those of zero2.yaml or zero3.yaml; matrices of a tiny model are cut, too, but for the adapters'."""
    settings = json.loads((ROOT / f"configs/deepspeed/zero{stage}.json").read_text())
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 3000
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(settings))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path), "DS_ACCELERATOR": "cpu",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}  # fmt: skip


class Place:
    """Data and a full cache; `words` is the command line of a run into `out`."""

    def __init__(self, family: Path, folder: Path) -> None:
        self.family, self.data, self.cache = family, write_triplets(folder / "data", count=11), folder / "cache"
        for name in ("siglip_lora", "projector"):
            cache_states(tiny_config(family, self.data, self.cache, *COMMON, name=name), check=False)

    def words(self, out: Path, *more: str, name: str = "siglip_lora") -> list[str]:
        return [
            "--config", f"configs/{name}.yaml", "configs/tiny.yaml", *model_words(self.family),
            "--data.train_data_dir", str(self.data), "--cache.dir", str(self.cache), "--output_dir", str(out),
            *COMMON, "--validation.preview_steps", "0", *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def place(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield Place(family, tmp_path_factory.mktemp("strategies"))


def alone(words: list[str]) -> None:
    done = the_forge().run(["ztrain.train", *words], ALONE)
    assert done.returncode == 0, done.stdout + done.stderr


def shared(strategy: dict[str, str], processes: int, words: list[str], status: int = 0) -> str:
    """What the processes of a run say. DeepSpeed reads its environment at import: its ranks are launched."""
    if "ACCELERATE_USE_DEEPSPEED" not in strategy:
        return ranks.run(["tests.sharded", *words], ENVIRONMENT | strategy, processes, status)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, "-m", "tests.sharded", *words], cwd=ROOT, env=ENVIRONMENT | strategy, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows(out) if key in row}


def assert_same_run(one: Path, other: Path) -> None:
    """A run that ended in between has validated once more."""
    for key in ("train/loss", "train/grad_norm", "val/loss", "val/loss_no_reference"):
        whole, shared_by_two = curve(one, key), curve(other, key)
        assert whole.keys() <= shared_by_two.keys()
        assert [shared_by_two[step] for step in whole] == pytest.approx(list(whole.values()), rel=1e-5)
    assert_same_export(one, other, 1e-6)


def assert_same_export(one: Path, other: Path, tolerance: float) -> None:
    files = sorted(path.name for path in (one / "export").glob("*.safetensors"))
    assert files == sorted(path.name for path in (other / "export").glob("*.safetensors")) and files
    for name in files:
        first, second = load_file(one / "export" / name), load_file(other / "export" / name)
        assert first.keys() == second.keys()
        assert max(float((first[key] - second[key]).abs().max()) for key in first) <= tolerance


@pytest.mark.parametrize("kind", ["fsdp2", "zero2", "zero3"])
def test_a_shared_model_is_trained_saved_and_exported_like_a_whole_one(place: Place, tmp_path: Path, kind: str) -> None:
    """Batches without references on some processes only, averages (not under zero3), previews, and one checkpoint that
    goes from one process to two and back."""
    if kind != "fsdp2" and find_spec("deepspeed") is None:
        pytest.skip(NO_DEEPSPEED)
    strategy = of_fsdp2() if kind == "fsdp2" else of_zero(int(kind[-1]), tmp_path)
    more = ("--train.checkpointing_steps", "4", "--validation.preview_steps", "4", "--validation.num_previews", "3")
    more += ("--sample.num_inference_steps", "2", *(() if kind == "zero3" else ("--train.ema_decay", "0.5")))
    more += ("--adapters.1.learning_rate", "1e-3", "--adapters.0.weight_decay", "0.1")
    half, to = ("--train.train_batch_size", "2"), "--train.max_train_steps"
    alone(place.words(tmp_path / "one", *more, to, "4"))
    said = shared(strategy, 2, place.words(tmp_path / "two", *more, *half, to, "4"))
    assert f"processes share the work by {kind}" in said
    assert_same_run(tmp_path / "one", tmp_path / "two")
    for name in ("base/no_image-2.png", "base/splice-2.png", "step-00000004/2.png"):
        one, two = (np.asarray(Image.open(tmp_path / run / "samples" / name), np.int16) for run in ("one", "two"))
        assert one.std() > 1 and np.abs(one - two).max() <= 2  # levels of 255

    latest = ("--resume_from_checkpoint", "latest")
    alone(place.words(tmp_path / "two", *more, *half, "--train.gradient_accumulation_steps", "2", *latest, to, "5"))
    shared(strategy, 2, place.words(tmp_path / "two", *more, *half, *latest, to, "6"))
    alone(place.words(tmp_path / "one", *more, *latest, to, "6"))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    for row in rows(tmp_path / "two")[1:]:
        assert (row["train/lr"], row["train/lr/siglip"], row["train/lr/lora"]) == (3e-3, 3e-3, 1e-3)


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_a_lora_whose_first_block_reads_what_nobody_trains(place: Place, tmp_path: Path, kind: str) -> None:
    """No input of that block has a gradient by itself."""
    if kind != "fsdp2" and find_spec("deepspeed") is None:
        pytest.skip(NO_DEEPSPEED)
    more = ("--train.max_train_steps", "3", "--train.gradient_checkpointing", "on", "--train.prior_weight", "0")
    alone(place.words(tmp_path / "one", *more, name="lora"))
    strategy = of_fsdp2() if kind == "fsdp2" else of_zero(3, tmp_path)
    shared(strategy, 2, place.words(tmp_path / "two", *more, "--train.train_batch_size", "2", name="lora"))
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_projector_and_accumulation_under_fsdp2(place: Place, tmp_path: Path) -> None:
    """From the weights of another run."""
    alone(place.words(tmp_path / "first", "--train.max_train_steps", "1", name="projector"))
    more = ("--train.max_train_steps", "4", "--init_from", str(tmp_path / "first" / "export"))
    alone(place.words(tmp_path / "one", *more, name="projector"))
    two = ("--train.train_batch_size", "1", "--train.gradient_accumulation_steps", "2")
    shared(of_fsdp2(), 2, place.words(tmp_path / "two", *more, *two, name="projector"))
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_strategy_that_cannot_run_is_refused_and_never_exchanged(place: Place, tmp_path: Path) -> None:
    """accelerate itself runs plain DDP on a CPU where FSDP was asked for, and says nothing."""
    asked = {**ALONE, **of_fsdp2()}
    done = the_forge().run(["ztrain.train", *place.words(tmp_path / "run")], asked)
    assert done.returncode == 2 and "accelerate was asked for fsdp2 and runs NO on cpu: it needs GPUs" in done.stderr
    accelerator = Accelerator(cpu=True)
    assert type(strategy_of(accelerator)) is One and accelerator.distributed_type == DistributedType.NO
    words = place.words(tmp_path / "run", "--train.optimizer", "adamw_8bit", "--train.ema_decay", "0.9")
    config = load_config([ROOT / name for name in words[1:3]], words[3:], "test")
    for strategy in (One, Strategy):
        strategy(accelerator).check(config)
    for shared_by, sentence in ((Fsdp2, "adamw_8bit does not work under fsdp2"), (Zero3, "adamw_8bit .* zero3")):
        with pytest.raises(InputError, match=sentence):
            shared_by(accelerator).check(config)
    stock = [adapter.model_copy(update={"layout": "stock"}) for adapter in config.adapters[:1]]
    plain = config.train.model_copy(update={"optimizer": "adamw"})
    averaged = config.model_copy(update={"train": plain})
    assert limits.refusal("zero3", averaged) == (
        "train.ema_decay 0.9 does not work under zero3; change it, or launch with ddp"
    )
    for name in ("fsdp2", "zero2", "zero3"):
        # Batches without references would silently be computed in another layout.
        sentence = limits.refusal(name, averaged.model_copy(update={"adapters": stock}))
        assert sentence is not None and sentence.startswith(f"adapters siglip: layout stock does not work under {name}")
    assert limits.refusal("ddp", averaged.model_copy(update={"adapters": stock})) is None


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp2 runs without fsdp_offload_params true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp2 runs without fsdp_activation_checkpointing true"),
        ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP", "fsdp2 runs without another fsdp_transformer_layer_cls_to_wrap than"),
        ("FSDP_VERSION", "1", "accelerate runs FSDP, which ztrain does not know in this form; take one_gpu, ddp,"),
    ],
)
def test_other_settings_of_fsdp_are_refused(variable: str, value: str, sentence: str) -> None:
    """Each would end in a traceback of a library, or save no memory."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = the_forge().run(["-c", ASKED, sentence], ENVIRONMENT | of_fsdp2() | rank | {variable: value})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(find_spec("deepspeed") is None, reason=NO_DEEPSPEED)
@pytest.mark.parametrize("key", ["bf16", "offload_optimizer"])
def test_a_deepspeed_file_that_would_train_something_else_is_refused(place: Place, tmp_path: Path, key: str) -> None:
    strategy = of_zero(2, tmp_path)
    path = Path(strategy["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    settings = json.loads(path.read_text())
    inside = settings if key == "bf16" else settings["zero_optimization"]
    inside[key] = {"enabled": True} if key == "bf16" else {"device": "cpu"}
    path.write_text(json.dumps(settings))
    said = shared(strategy, 1, place.words(tmp_path / "run"), status=1)
    assert f"error: the DeepSpeed file sets {key}: precision, optimizer and schedule are the experiment's" in said


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_seats_cover_every_place_once_and_are_as_many_for_all(count: int) -> None:
    told = [list(seats(count, rank, 3)) for rank in range(3)]
    assert sorted(place for each in told for place, counts in each if counts) == list(range(count))
    assert {len(each) for each in told} == {-(-count // 3)}


@pytest.mark.parametrize("name", [name for name in TRAINABLE if name in READ_REFERENCE])
def test_a_stand_in_changes_nothing_and_gives_every_weight_a_gradient(place: Place, name: str) -> None:
    """Of a batch without references: the same velocities, and every weight has a gradient, be it zero."""
    model = make_model(place.family, LISTS[name])
    reads = frozenset().union(*(adapter.reads for adapter in LISTS[name]))
    config = tiny_config(place.family, place.data, place.cache, *COMMON, name="siglip_lora")
    config = config.model_copy(update={"adapters": LISTS[name]})
    cache_states(config, check=False)
    cache = Cache(config)
    samples = read_samples(config, cache).train.samples
    batch = read_batch(cache, samples[:2], [SampleKey(0, 0, 0), SampleKey(0, 0, 1)], reads)
    bare = concatenate([Dropout(reference=1.0).apply(batch.encoded.select([i]), 0.5) for i in range(2)])
    sigma = torch.tensor([0.3, 0.8])
    plain = model(batch.latents, sigma, bare)
    model.stand_in = batch.encoded.select([0])
    stood = model(batch.latents, sigma, bare)
    assert all(torch.equal(one, other) for one, other in zip(plain, stood, strict=True))
    sum(velocity.square().mean() for velocity in stood).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    assert any(p.grad.any() for p in trained.values()) == any(".lora_" in key for key in trained)
    with_reference = model(batch.latents, sigma, batch.encoded)
    model.stand_in = None
    again = model(batch.latents, sigma, batch.encoded)
    assert all(torch.equal(one, other) for one, other in zip(with_reference, again, strict=True))
