"""Real drawings on trial: nobody is judged on what was trained on, and the left-out style is left out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import real_drawings
from benchmarks.drawings import StudySettings
from benchmarks.laboratory import Laboratory
from miniature.family import MARKER
from miniature.folders import FolderWorld
from miniature.style_folders import STYLES, paint_style_folders
from ztrain.data.reading import read_triplets
from ztrain.errors import InputError

PLAN = StudySettings(counts={"train": (6, 40), "validation": (6, 2), "test": (6, 3)}, steps=2, batch=2)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> real_drawings.RealDrawings:
    """Painted ones in the layout of real ones, and the mark of a family that was pretrained on them."""
    folder = tmp_path_factory.mktemp("drawings")
    paint_style_folders(folder / "data", size=32, num_contents=36)
    world = FolderWorld.read(folder / "data", real_drawings.SIZE)
    (folder / MARKER).write_text(json.dumps({"vae": {"world": world.name}}))
    return real_drawings.RealDrawings(folder, folder / "data", STYLES[2])


def test_splits_keep_apart_what_they_must(drawings: real_drawings.RealDrawings, tmp_path: Path) -> None:
    laboratory = Laboratory(tmp_path, PLAN, drawings=drawings)
    laboratory.prepare()
    pictures, splits = drawings.world.pictures, drawings.world.splits
    known = {split: set(rows.tolist()) for split, rows in splits.items()}
    from_to = {
        "train": ("train", "train"),
        "train_without": ("train", "train"),
        "validation": ("train", "unseen"),
        "test": ("held", "unseen"),
    }
    of_split = {split: read_triplets(str(tmp_path / "triplets"), split).triplets for split in from_to}
    for split, (targets, references) in from_to.items():
        for triplet in of_split[split]:
            [shown], target = triplet.references, triplet.target
            rows = int(Path(str(target.path)).stem), int(Path(str(shown.path)).stem)
            assert rows[0] in known[targets] and rows[1] in known[references], split
            assert len({int(pictures.styles[row]) for row in rows}) == 1
            assert pictures.captions[rows[0]] == triplet.prompt == triplet.columns["content"]
            assert pictures.captions[rows[1]] == triplet.columns["reference_content"] != triplet.prompt
            assert triplet.columns["style"] == drawings.styles[int(pictures.styles[rows[0]])]
    assert {t.columns["style"] for t in of_split["train"]} == set(STYLES)
    assert {t.columns["style"] for t in of_split["train_without"]} == set(STYLES) - {drawings.left_out}
    assert len(of_split["train"]) == 4 * len(splits["train"]), "every drawing, with four references"
    kept = [t.prompt for t in of_split["train"] if t.columns["style"] != drawings.left_out]
    assert sorted(kept) == sorted(t.prompt for t in of_split["train_without"])
    # In rounds, so that no style is behind another one.
    first = [t.columns["style"] for t in of_split["test"]][: len(STYLES)]
    assert len(set(first)) == len(STYLES) < len(of_split["test"]) <= 3 * len(STYLES)


def test_the_judges_are_asked_by_the_names_of_the_world(drawings: real_drawings.RealDrawings) -> None:
    captions = drawings.world.content_classes["content"]
    classes = drawings.truth.classes([captions[3], captions[0]])["content"]
    assert torch.equal(classes, torch.tensor([3, 0]))
    assert drawings.truth.style_classes == tuple(sorted(STYLES)) and drawings.truth.drawn_by == "content"


def test_what_does_not_belong_together_is_refused(drawings: real_drawings.RealDrawings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no style 'style9' in .*; there are style1, style2"):
        replace(drawings, left_out="style9")
    with pytest.raises(InputError, match="is no family: give the folder that `ztrain mini pretrain` names"):
        replace(drawings, family=tmp_path)
    (tmp_path / MARKER).write_text(json.dumps({"vae": {"world": "others 0123"}}))
    with pytest.raises(InputError, match="was pretrained on others 0123, .* is data "):
        replace(drawings, family=tmp_path)
