"""Recipes for one 24 GB card: each key of them has its reason and differs from the default, and both stages run."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from benchmarks import recipes
from benchmarks.cards import LISTS
from tests.triplets import ROOT, model_words, write_triplets
from ztrain.config import load_config
from ztrain.train.loop import train
from ztrain.train.validate import _QUANTILES

STEPS = 20
TINY = (
    "--encoders.min_reference_pixels", "4096", "--encoders.max_reference_pixels", "4096",
    "--train.gradient_accumulation_steps", "1", "--train.max_train_steps", str(STEPS), "--train.lr_warmup_steps", "2",
    "--train.mixed_precision", "no", "--validation.validation_steps", str(STEPS), "--validation.num_samples", "2",
    "--validation.sigmas", "0.9", "--validation.preview_steps", "0", "--data.dataloader_num_workers", "0",
)  # fmt: skip
"""What a recipe is at tiny size; all else is the recipe's."""


def test_each_key_has_its_reason_and_is_not_the_default() -> None:
    files = {name: recipes.keys_of(recipes.CONFIGS / f"{name}_24gb.yaml") for name in LISTS}
    assert set().union(*files.values()) == set(recipes.STAGE_ONE)
    then = recipes.keys_of(recipes.THEN)
    assert list(then) == list(recipes.STAGE_TWO)
    for name, keys in files.items():
        idle = [key for key, value in keys.items() if value == recipes.default_of(key)]
        assert not idle, f"{name}_24gb.yaml repeats the defaults of {idle}"
    assert all(any(keys.get(key) != value for keys in files.values()) for key, value in then.items())
    assert not set(recipes.LEFT) & (set(recipes.STAGE_ONE)), "a key that a recipe sets is not left at its default"
    assert all(recipes.default_of(key) is not ... for key in recipes.LEFT)
    assert {path.name for path in recipes.CONFIGS.glob("*_24gb.yaml")} == {f"{name}_24gb.yaml" for name in LISTS}


def test_each_reason_leads_somewhere() -> None:
    """Files are there, peers at a commit; what leads nowhere is computed or says that nobody has measured it."""
    page = recipes.PAGE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", page):
        if target.startswith("https://github.com"):
            assert re.search(r"/blob/[0-9a-f]{40}/", target), target
        elif not target.startswith("https://"):
            assert (recipes.PAGE.parent / target.split("#")[0]).is_file(), target
    assert "](docs/recipes.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_hours_are_steps_times_what_was_measured() -> None:
    document = json.loads((recipes.RESULTS / "train_real_size_nvidia_h200.json").read_text(encoding="utf-8"))
    [row] = [row for row in document["rows"] if row["list"] == "siglip"]
    stage = next(stage for stage in recipes.Stage.all() if (stage.name, stage.side) == ("siglip", 1024))
    seconds = row["ms"] / 1e3 * stage.batch
    told = f"{seconds * stage.config.train.max_train_steps / 3600:.1f} h ({seconds:.1f} s, **measured**)"
    line = next(line for line in recipes.hours([stage]).splitlines() if line.startswith("| `[siglip]`, 1024"))
    assert told in line and line.count("measured") == 1
    assert len(_QUANTILES) + 1 == recipes.SIGMAS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triplets, and room for a cache that all lists share."""
    folder = tmp_path_factory.mktemp("recipes")
    write_triplets(folder / "data", count=3, validation=2)
    return folder


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # whatever another test has asked for
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", LISTS)
def test_both_stages_run(name: str, family: Path, place: Path, tmp_path: Path) -> None:
    """At a half and the whole of the pictures' size, on Base, in place of 512 and 1024 px."""
    words = [*model_words(family, "Z-Image"), *TINY]
    words += ["--data.train_data_dir", str(place / "data"), "--cache.dir", str(place / "cache")]
    stages = {"one": ([], 32, []), "two": ([recipes.THEN], 64, ["--init_from", str(tmp_path / "one/export")])}
    for stage, (overlay, side, more) in stages.items():
        out = tmp_path / stage
        files = [recipes.CONFIGS / f"{name}_24gb.yaml", *overlay]
        train(load_config(files, [*words, "--data.resolution", str(side), "--output_dir", str(out), *more]))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        trained = [row for row in rows if row["step"]]
        assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
        assert all(math.isfinite(row["train/loss"]) for row in trained)
        rates = [row["train/lr"] for row in trained]
        assert max(rates) == pytest.approx(1e-4) and (rates[-1] < 1e-5 if overlay else rates[-1] == rates[STEPS // 2])

    began = json.loads((tmp_path / "two/export/adapter_config.json").read_text())["init_from"]
    first = (tmp_path / "one/export/adapter_config.json").read_bytes()
    assert (began["step"], began["sha256"]) == (STEPS, hashlib.sha256(first).hexdigest())
