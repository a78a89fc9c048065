"""Golden files: what an earlier commit wrote is still read as it was meant, or refused by one sentence.

tests/golden/1 was written by the code of commit b02b086 (tests/golden/write.py holds the command), 2/checkpoint and
3/export_projector by that which raised those numbers. The rules:

- Whoever changes what a file of one of the four kinds means raises the number of its format, FORMAT_VERSION in
  checkpoint.py (state.json), adapter_folder.py (adapter_config.json), cache.py (kind.json) or tars.py (manifest.json
  of a data set). A file without a number is of format 1. New golden files are then written beside these, which stay.
- Data sets and exports of every earlier format load as what they were.
- A checkpoint of an earlier format is read, or refused by one sentence.
- A cache of an earlier format is read, or computed again: raise `cache._RULES`, and its folders get other names. Its
  keys are made of the bytes of the encoders' files, the settings and the minor versions of the libraries that prepare
  their inputs; so a hit is promised for the same versions only, and the test looks under the recorded ones.
- Files of a later format are refused by one sentence.
"""

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ztrain.cache.cache
from tests.forge import the_forge
from tests.golden.write import DESTINATIONS, EXPORTS, TRAIN, exported, rows, states, transformer, velocities
from tests.triplets import ROOT
from ztrain.cache.cache import Cache
from ztrain.cache.samples import all_needs, read_samples
from ztrain.config import Config, load_config
from ztrain.data import tars
from ztrain.data.reading import read_triplets
from ztrain.errors import InputError
from ztrain.resolve import resolve
from ztrain.weights import adapter_folder, checkpoint
from ztrain.weights.adapter_folder import read_adapter

GOLDEN = ROOT / "tests" / "golden" / "1"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())

pytestmark = pytest.mark.usefixtures("forge")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the golden files with the transformer's weights."""
    folder = shutil.copytree(GOLDEN, tmp_path_factory.mktemp("golden") / "1")
    transformer(folder / "models").save_pretrained(folder / "models" / "Z-Image-Turbo" / "transformer")
    return folder


def config_in(folder: Path, *more: str) -> Config:
    words = [f"--models.base.pretrained_model_name_or_path={folder}/models/Z-Image-Turbo"]
    words += [f"--models.siglip.pretrained_model_name_or_path={folder}/models/siglip2"]
    words += [f"--data.train_data_dir={folder}/data", f"--cache.dir={folder}/cache", f"--output_dir={folder}/run"]
    return load_config([folder / "config.yaml"], [*words, *more])


class Then(Cache):
    """A cache as the libraries of its recorded versions name it."""

    def fingerprint(self, kind: str) -> dict[str, Any]:
        [path] = GOLDEN.glob(f"cache/{kind}-*/kind.json")
        return super().fingerprint(kind) | {"libraries": json.loads(path.read_text())["fingerprint"]["libraries"]}


@pytest.mark.parametrize("layout", DESTINATIONS)
def test_a_data_set_is_read_as_it_was_written(layout: str) -> None:
    assert rows(GOLDEN / DESTINATIONS[layout]) == EXPECTED["rows"]


def test_nothing_of_a_cache_is_computed_again(place: Path) -> None:
    config = config_in(place)
    cache = Then(config)
    assert not cache.missing(all_needs(config, read_samples(config, cache)))
    assert states(cache) == EXPECTED["states"]
    config = config_in(place, "--data.reference_variants=2")  # asks for the other variants alone
    samples = read_samples(config, cache)
    missing = cache.missing(all_needs(config, samples))
    assert missing and all(known.part for request in missing for known in request.pictures)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_gives_the_tensors_and_velocities_that_it_gave(name: str, place: Path) -> None:
    assert exported(GOLDEN / name) == EXPECTED["exports"][name]
    then = load_file(GOLDEN / "expected.safetensors")
    for i, velocity in enumerate(velocities(place / "models", GOLDEN / name)):
        torch.testing.assert_close(velocity, then[f"{name} {i}"], rtol=1e-5, atol=1e-5)


def test_an_export_of_format_2_is_sealed_and_holds_the_same() -> None:
    """Format 1 with the SHA-256 of the document in itself: the same run, with the code that began to write it."""
    folder = GOLDEN.parent / "2" / "export"
    assert exported(folder) == EXPECTED["exports"]["export"]
    assert "seal" in json.loads((folder / "adapter_config.json").read_text())


def test_a_projector_of_format_3_says_what_its_correction_is_measured_in(place: Path) -> None:
    """The same weights as those of format 1, which were in the states' own units, and other velocities."""
    then, now = (read_adapter(GOLDEN.parent / number / "export_projector") for number in ("1", "3"))
    assert [each.adapters[0].correction for each in (then, now)] == ["absolute", "rms"]
    assert exported(now.folder) == EXPECTED["exports"]["export_projector"]
    old, new = (velocities(place / "models", each.folder)[0] for each in (then, now))
    assert (old - new).abs().max() > 1e-3


@pytest.mark.parametrize(("number", "loss"), [(1, EXPECTED["losses"][-1]), (2, 1.0699365519576531)])
def test_a_checkpoint_goes_on_as_its_run_did(number: int, loss: float, place: Path, tmp_path: Path) -> None:
    """Also one of format 1, whose weights all decay, with the dropouts that it began with."""
    place = shutil.copytree(place, tmp_path / "1")
    shutil.copytree(GOLDEN.parent / str(number) / "checkpoint", place / "checkpoint", dirs_exist_ok=True)
    found = checkpoint.read(place / "checkpoint")
    config = resolve(config_in(place), found.state["config"])
    assert found.step == 2 and checkpoint.frozen_differences(found.state["config"], config) == []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    words = ["ztrain.train", *TRAIN, "--resume_from_checkpoint", "checkpoint"]
    done = the_forge().run(words, environment, folder=place)
    assert done.returncode == 0, done.stderr
    assert "resuming from checkpoint at step 2" in done.stdout
    libraries = [json.loads(path.read_text())["fingerprint"]["libraries"] for path in GOLDEN.glob("cache/*/kind.json")]
    if all(version(name).startswith(f"{wanted}.") for each in libraries for name, wanted in each.items()):
        assert "cache: computed" not in done.stdout
    [row] = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["step"] == 3 and row["train/loss"] == pytest.approx(loss, rel=1e-5)
    state = checkpoint.read(place / "run" / "checkpoints" / "step-00000003").state
    assert (state["format_version"], state["began"]) == (checkpoint.FORMAT_VERSION, number)
    assert len(state["schedule"]["base_lrs"]) == (1 if number == 1 else 3)
    if number == 2:
        return  # what it exported is not kept
    now, then = read_adapter(place / "run" / "export"), read_adapter(GOLDEN / "export")
    assert now.identity == then.identity and now.step == then.step
    for name, tensors in then.files.items():
        torch.testing.assert_close(now.files[name], tensors, rtol=1e-4, atol=1e-6)


# --- a later version's files ------------------------------------------------------------------------------------------


def _raise_format(path: Path, known: int) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": known + 1}))


def _later_checkpoint(folder: Path) -> None:
    state, manifest = folder / "checkpoint" / "state.json", folder / "checkpoint" / "MANIFEST.json"
    _raise_format(state, checkpoint.FORMAT_VERSION)
    files = json.loads(manifest.read_text())["files"]
    files["state.json"] = {"bytes": state.stat().st_size, "sha256": hashlib.sha256(state.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps({"files": files}))
    checkpoint.read(folder / "checkpoint")


def _later_export(folder: Path) -> None:
    _raise_format(folder / "export" / "adapter_config.json", adapter_folder.FORMAT_VERSION)
    read_adapter(folder / "export")


def _later_cache(folder: Path) -> None:
    for path in folder.glob("cache/*/kind.json"):
        _raise_format(path, ztrain.cache.cache.FORMAT_VERSION)
    config = config_in(folder)
    cache = Then(config)
    cache.missing(all_needs(config, read_samples(config, cache)))


def _later_data(layout: str) -> Any:
    def later(folder: Path) -> None:
        _raise_format(folder / DESTINATIONS[layout] / "manifest.json", tars.FORMAT_VERSION)
        read_triplets(str(folder / DESTINATIONS[layout]), "train")

    return later


@pytest.mark.parametrize(
    "later",
    [_later_checkpoint, _later_export, _later_cache, *map(_later_data, DESTINATIONS)],
    ids=["checkpoint", "export", "cache", *DESTINATIONS],
)
def test_files_of_a_later_format_are_refused_by_one_sentence(later: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN, tmp_path / "1")
    with pytest.raises(InputError, match=r"format(_version)? \d+ is not \d+; update ztrain") as refused:
        later(folder)
    assert "\n" not in str(refused.value)


def test_golden_files_are_small_and_tell_nothing_of_the_machine_that_wrote_them() -> None:
    files = [path for path in (ROOT / "tests" / "golden").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 420 * 1024
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".safetensors":  # numbers may be any two letters
            content = content[: 8 + int.from_bytes(content[:8], "little")]
        assert b"/tmp" not in content and b"/home/" not in content and str(ROOT).encode() not in content, path
        assert os.uname().nodename.encode() not in content, path
