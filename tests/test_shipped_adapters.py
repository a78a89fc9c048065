"""The adapters that come with ztrain: they are what their figures are of, and good enough to be shown."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import shipped_adapters
from miniature.exam import CONTENT_LOSS
from miniature.trials import ADAPTERS, Trials, exported_entry
from tests.triplets import painted_experiment
from ztrain.cli import main as cli
from ztrain.images import open_image
from ztrain.weights.adapter_folder import read_adapter

RESULT = json.loads(shipped_adapters.RESULT.read_text(encoding="utf-8"))
ROWS = RESULT["rows"]
SEEING = ("siglip", "siglip_lora", "projector", "splice_lora")


def figure(name: str, figure: str, way: str = "own") -> dict[str, float]:
    return ROWS[name]["figures"][way][figure]


def test_they_are_good_enough() -> None:
    assert RESULT["triplets"] >= 1024
    assert figure("siglip", "style_cosine")["mean"] >= 0.65
    assert figure("siglip", "style_retrieval")["mean"] >= 0.60
    for name in ("projector", "splice_lora"):
        assert figure(name, "style_cosine")["mean"] >= 0.40
    for name in SEEING:
        for label in ("prompt_content", "prompt_kind", "prompt_count", "prompt_place"):
            assert figure(name, label)["mean"] >= figure("text", label)["mean"] - CONTENT_LOSS, (name, label)
        assert abs(figure(name, "leak_above_chance")["mean"]) <= 0.03
        for other in ("shuffled", "lora"):
            assert ROWS[name]["style_above"][other]["low"] > 0, (name, other)
    means = {judge: [figure(name, f"{judge}_cosine")["mean"] for name in ROWS] for judge in ("style", "style_second")}
    ranks = {judge: sorted(ROWS, key=dict(zip(ROWS, of_judge, strict=True)).get) for judge, of_judge in means.items()}
    clear = [name for name in ROWS if name not in ("text", "lora")]  # those two see nothing: their order is noise
    assert [n for n in ranks["style"] if n in clear] == [n for n in ranks["style_second"] if n in clear]
    for judge in ranks:
        assert set(ranks[judge][:2]) == {"text", "lora"}, "who sees nothing is behind all others"


def test_they_are_the_ones_that_were_measured_and_small() -> None:
    files = [path for path in ADAPTERS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir()) == sorted(shipped_adapters.VARIANTS)
    for name in shipped_adapters.VARIANTS:
        exported = read_adapter(ADAPTERS / name)
        assert exported.step == ROWS[name]["steps"]
        weights = sum(tensor.numel() for tensors in exported.files.values() for tensor in tensors.values())
        assert weights == ROWS[name]["weights"]
    assert (ADAPTERS / "README.md").read_text(encoding="utf-8") == shipped_adapters.card(RESULT)


@pytest.mark.parametrize("name", SEEING)
def test_they_draw_in_the_style_of_their_reference(name: str, trials: Trials) -> None:
    entry = exported_entry(name, ADAPTERS / name, trials.config)
    own, shuffled = trials.run(entry, entry.shuffled)
    assert trials.difference("style_cosine", own, shuffled)["low"] > 0.1
    assert own.mean("prompt_content") > 0.8


@pytest.mark.parametrize("name", SEEING)
def test_the_command_of_their_card_draws(name: str, trials: Trials, tmp_path: Path) -> None:
    [block] = re.findall(r"```bash\n(.*?)```", (ADAPTERS / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    open_image(trials.references[0]).save(tmp_path / "reference.png")
    named = {"<list>": name, "reference.png": str(tmp_path / "reference.png"), "drawing.png": str(tmp_path / "new.png")}
    for word, value in named.items():
        block = block.replace(word, value)
    program, *words = shlex.split(block.replace("\\\n", " "))
    few = ("--sample.num_inference_steps", "2", "--sample.guidance_scale", "0")
    assert program == "ztrain" and cli([*words, *few]) == 0
    with Image.open(tmp_path / "new.png") as drawn:
        assert drawn.size == (64, 64)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    folder = tmp_path_factory.mktemp("shipped")
    config = painted_experiment(folder, "siglip_lora", (8, 2), "--sample.guidance_scale", "0", seed=5)
    return Trials.of(config, "test", folder)
