"""Scores of a sheet by tiny real towers, against the towers asked one picture at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from miniature import truth_judge
from tests.test_features import TINY, csd, csd_weights, tiny_siglip
from ztrain.compare.judging import Judging, Sheet, Verdicts
from ztrain.config import JudgesConfig, ModelConfig
from ztrain.data.digests import Known
from ztrain.data.exchange import Case
from ztrain.errors import InputError
from ztrain.images import PictureFile, open_image

ROWS, SEEDS = 9, 2


def tiny_dino(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**{**TINY, "mlp_ratio": 2}, image_size=28, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    transformers.BitImageProcessorPil(**sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> JudgesConfig:
    folder = tmp_path_factory.mktemp("judges")
    made = {
        "siglip": tiny_siglip(folder / "siglip", "fixed"),
        "dino": tiny_dino(folder / "dino"),
        "style": csd(folder / "csd", csd_weights()),
    }
    places = {name: ModelConfig(pretrained_model_name_or_path=str(path)) for name, path in made.items()}
    return JudgesConfig(**places, batch_size=4)


def noise(path: Path, seed: int) -> PictureFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (48, 40, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).resize((80, 96), Image.Resampling.BICUBIC).save(path)
    return PictureFile(path)


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Sheet:
    """Text alone, and a list whose pictures are the references themselves, with two seeds."""
    folder = tmp_path_factory.mktemp("sheet")
    cases, plain, copies = [], [], []
    for row in range(ROWS):
        reference = noise(folder / f"reference-{row}.png", row)
        cases.append(
            Case(
                prompt=["a cat", "dog", "a dog"][row % 3],
                references=(Known(reference, f"{row}", 80, 96),),
                target=noise(folder / f"target-{row}.png", 100 + row),
                where=f"row {row}",
            )
        )
        plain.append([noise(folder / f"plain-{row}-{seed}.png", 200 + SEEDS * row + seed) for seed in range(SEEDS)])
        copies.append([reference] * SEEDS)
    bare = [noise(folder / f"bare-{row}.png", 200 + SEEDS * row) for row in range(ROWS)]  # as plain's first seed
    return Sheet(cases=cases, pictures=[plain, copies], plain=0, bare={1: bare})


@pytest.fixture(scope="module")
def judging(judges: JudgesConfig) -> Judging:
    return Judging(judges, "cpu")


@pytest.fixture(scope="module")
def verdicts(judging: Judging, sheet: Sheet) -> Verdicts:
    return judging.score(sheet)


def values(verdicts: Verdicts, name: str) -> torch.Tensor:
    [found] = [score.values for score in verdicts.scores if score.name == name]
    assert found is not None
    return torch.from_numpy(np.array(found, dtype=np.float32))  # None as NaN


def test_every_tower_gives_its_own_likeness(judging: Judging, verdicts: Verdicts, sheet: Sheet) -> None:
    for role, tower in judging.towers.items():
        found = values(verdicts, f"{role}_likeness")
        assert found.shape == (2, ROWS, SEEDS)
        for row in (0, 5):
            drawn, shown = (open_image(p) for p in (sheet.pictures[0][row][1], sheet.cases[row].references[0].picture))
            one, other = tower.images([drawn]), tower.images([shown])
            assert torch.allclose(found[0, row, 1], (one @ other.T)[0, 0], atol=1e-5)
        assert torch.allclose(found[1], torch.ones(ROWS, SEEDS), atol=1e-5)
    assert (verdicts.style, verdicts.adherence, verdicts.missing) == ("style_likeness", "adherence", [])
    models = {score.name: score.model.name if score.model else None for score in verdicts.scores}
    assert models["diversity"] == "dino" and models["kid"] == "dino" and models["cmmd"] == "siglip"
    assert models["copy"] is models["palette_error"] is models["drift"] is None


def test_adherence_is_to_the_own_prompt_and_chance_to_the_others(
    judging: Judging, verdicts: Verdicts, sheet: Sheet
) -> None:
    tower = judging.towers["siglip"]
    prompts = [case.prompt for case in sheet.cases]
    seen = torch.stack([tower.images([open_image(p) for p in row]) for row in sheet.pictures[0]])  # (R, S, D)
    cosines = seen @ tower.texts(prompts).T  # (R, S, R)
    own = torch.stack([cosines[row, :, row] for row in range(ROWS)])
    assert torch.allclose(values(verdicts, "adherence")[0], own, atol=1e-5)
    others = [cosines[i, :, j].mean() for i in range(ROWS) for j in range(ROWS) if prompts[i] != prompts[j]]
    [chance] = [score.chance for score in verdicts.scores if score.name == "adherence"]
    assert chance == pytest.approx(float(torch.stack(others).mean()), abs=1e-5)


def test_copies_seeds_and_drift(verdicts: Verdicts) -> None:
    copied = values(verdicts, "copy")
    assert copied[1].min() > 0.5 > copied[0].abs().max()
    diversity = values(verdicts, "diversity")
    assert diversity[1].abs().max() < 1e-5 < diversity[0].min()
    drift = values(verdicts, "drift")
    assert drift[0].isnan().all() and drift[1, :, 1].isnan().all()
    assert drift[1, :, 0].abs().max() == 0  # the bare pictures are text alone's
    assert values(verdicts, "change")[0].abs().max() == 0 < values(verdicts, "change")[1].min()
    assert values(verdicts, "palette_error")[1].abs().max() < 1e-5 < values(verdicts, "palette_error")[0].min()
    [kid] = [score.means for score in verdicts.scores if score.name == "kid"]
    assert len(kid) == 2 and all(mean is not None and mean.count == 1 for mean in kid)


def test_what_cannot_be_scored_is_said(judges: JudgesConfig, sheet: Sheet) -> None:
    pixels = Judging(JudgesConfig(), "cpu").score(sheet)
    assert pixels.style is None and pixels.adherence is None
    assert [sentence.split(":")[0] for sentence in pixels.missing] == [
        "adherence", "KID and CMMD", "likeness to the reference",
    ]  # fmt: skip
    one = Sheet(cases=sheet.cases[:1], pictures=[[row[:1] for row in of[:1]] for of in sheet.pictures], plain=0)
    dino = Judging(JudgesConfig(dino=judges.dino), "cpu").score(one)
    assert dino.style == "dino_likeness"
    assert [sentence.split(":")[0] for sentence in dino.missing] == [
        "adherence", "copy score", "diversity", "drift", "KID and CMMD",
    ]  # fmt: skip
    with pytest.raises(InputError, match="painted style folders"):
        Judging(JudgesConfig(truth="miniature/weights"), "cpu", truth_judge).score(sheet)


def test_no_picture_is_opened_twice(judges: JudgesConfig, sheet: Sheet, tmp_path: Path) -> None:
    """What was seen is kept: pictures that have gone are judged all the same."""
    judging = Judging(JudgesConfig(dino=judges.dino), "cpu")
    gone = noise(tmp_path / "gone.png", 7)
    judging.look([gone])
    gone.path.unlink()
    judging.look([gone])
    assert judging.vectors("dino", [gone]).shape == (1, 16)
