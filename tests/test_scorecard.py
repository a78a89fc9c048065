"""A family is measured from its folder: what the scorecard holds, and what must be equal in it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from miniature.exam import Clusters, Exam, Judges, draw_pairs
from miniature.gallery import Gallery, Split
from miniature.painter import PaintedWorld
from miniature.pretrain import PAINTED, STAGES, Pretraining, smoke
from miniature.scorecard import PARTS, family_figures, measure, names
from miniature.splices import ALPHAS, STRENGTHS, Setting, draw_triplets
from miniature.subject import Subject, to_bytes
from miniature.world import Contents, is_unseen
from ztrain.errors import InputError
from ztrain.metrics.scores import cosine

COUNT = 8
WORLD = PaintedWorld(size=64)
LABELS = {*WORLD.content_classes, *WORLD.style_classes}
SPLITS: tuple[Split, ...] = ("train", "held", "unseen", "all")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def smoked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    making = Pretraining(tmp_path_factory.mktemp("smoke"), WORLD, smoke(PAINTED), 0, CPU)
    making.run(STAGES)
    return making.finish()


@pytest.fixture(scope="module")
def folder(smoked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("measured") / "new"
    path = measure(smoked, out, WORLD, count=COUNT, seed=0, num_inference_steps=2, parts=PARTS)
    assert path == out / "scorecard.json"
    return out


@pytest.fixture(scope="module")
def card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scorecard.json").read_text())


@pytest.fixture(scope="module")
def exam(smoked: Path) -> Exam:
    return Exam(Subject.load(smoked, 64, 0, CPU, num_inference_steps=2), WORLD, COUNT)


def hashes(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def contents_in(gallery: Gallery) -> Contents:
    return Contents(**{name: gallery.labels[name] for name in WORLD.content_classes})


def figures_in(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value] if "mean" in value else [figure for part in value.values() for figure in figures_in(part)]
    return [figure for part in value for figure in figures_in(part)] if isinstance(value, list) else []


def test_the_card_says_what_was_measured(card: dict[str, Any], smoked: Path) -> None:
    assert card["family"] == json.loads((smoked / "family.json").read_text())
    assert (card["world"], card["size"], card["count"], card["seed"]) == (WORLD.name, 64, COUNT, 0)
    assert (card["num_inference_steps"], card["shift"], card["guidance_scale"]) == (2, PAINTED.shift, 0)
    assert {"torch", "diffusers", "transformers"} <= card["versions"].keys()
    assert set(card["seconds"]) == {"loading", "judges", *PARTS, "all"}
    assert card["machine"]


def test_every_figure_has_its_interval(card: dict[str, Any]) -> None:
    figures = figures_in(card)
    assert len(figures) > 500
    for figure in figures:
        assert figure["low"] <= figure["mean"] + 1e-9
        assert figure["mean"] <= figure["high"] + 1e-9
        assert 2 <= figure["groups"] <= figure["count"]


def test_every_part_has_its_figures(card: dict[str, Any]) -> None:
    for split in ("held", "unseen"):
        assert card["judges"][split].keys() >= LABELS | {"style_retrieval", "style_second_cosine"}
        assert card["vae"][split].keys() >= LABELS | {"psnr"}
        assert card["vl"][split].keys() >= LABELS | {"examples"}
        for label in LABELS:
            truth = card["vae"][split][label]["true_pictures"]
            assert truth == pytest.approx(sum(card["judges"][s][label]["mean"] for s in ("held", "unseen")) / 2)
        assert card["text"][split]["plain"].keys() >= {"kind", "count", "place", "style_cosine"}
        assert card["text"][split]["detailed"].keys() >= {"style_cosine", "style_retrieval", "style_second_retrieval"}
        assert card["vl"][split]["kind"]["count"] == card["text"][split]["plain"]["kind"]["count"] == COUNT


def test_few_unseen_contents_are_few_draws(card: dict[str, Any]) -> None:
    """Pictures of one unseen content go together into an interval, which is wider for it."""
    for figure in (
        card["vae"]["unseen"]["kind"],
        card["text"]["unseen"]["plain"]["kind"],
        card["vl"]["unseen"]["kind"],
    ):
        assert figure["groups_of"] == "contents"
        assert figure["groups"] < figure["count"], "no two of the pictures show the same content: draw more"
    assert card["vae"]["held"]["kind"]["groups"] == COUNT, "held pictures are of distinct styles"
    right = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    pairs = Clusters(of="contents", numbers=torch.arange(8) // 2)
    wide, narrow = pairs.figure(right), Clusters(of="styles", numbers=torch.arange(8)).figure(right)
    assert wide["high"] - wide["low"] > narrow["high"] - narrow["low"]
    assert (wide["mean"], wide["count"], wide["groups"]) == (0.5, 8, 4)
    [only] = {Clusters(of="styles", numbers=torch.zeros(8)).figure(right)["groups_of"]}
    assert only == "pictures", "of one group alone no interval can be told"


def settings_of(card: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in card["splice"]["rows"] if all(row[key] == value for key, value in wanted.items())]


def test_the_splice_is_measured_over_layers_and_strengths(card: dict[str, Any]) -> None:
    layers = set(range(1, 7))
    for model in ("splice", "raw"):
        alone = settings_of(card, model=model, prompt="none", compose="replace")
        assert {(row["hidden_index"], row["tokens"]) for row in alone} == {
            (k, t) for k in layers for t in ("all", "image", "text")
        }
    for prompt in ("neutral", "content"):
        beside = settings_of(card, model="splice", prompt=prompt, compose="concatenate")
        seen = {(row["hidden_index"], row["tokens"], row["strength"]) for row in beside if row["strength"]}
        assert seen == {(k, t, s) for k in layers for t in ("all", "image", "text") for s in STRENGTHS}
    blends = settings_of(card, compose="blend")
    assert len({row["hidden_index"] for row in blends}) == 2
    assert len(blends) == 2 * len(ALPHAS)
    assert {row["hidden_index"] for row in settings_of(card, states="fused")} == layers


@pytest.mark.parametrize("prompt", ["neutral", "content"])
def test_strength_zero_is_text_only(card: dict[str, Any], prompt: str) -> None:
    [text] = settings_of(card, model="text", prompt=prompt)
    [zero] = settings_of(card, model="splice", prompt=prompt, strength=0.0)
    assert zero["figures"] == text["figures"]
    ones = settings_of(card, model="splice", prompt=prompt, strength=1.0)
    assert any(row["figures"] != text["figures"] for row in ones), "no setting changes anything"


def test_splice_and_raw_differ(card: dict[str, Any]) -> None:
    spliced, raw = (settings_of(card, model=model, prompt="none") for model in ("splice", "raw"))
    assert [row["figures"] for row in spliced] != [row["figures"] for row in raw]


def test_chosen_settings_are_judged_on_other_triplets(card: dict[str, Any], exam: Exam) -> None:
    splice = card["splice"]
    assert (splice["table_count"], splice["count"]) == (COUNT, COUNT)
    for choice in (splice["best"]["any"], splice["alone"]["splice"], splice["entangled"]["best"]):
        Setting(**choice["setting"])
        assert choice["style_cosine"]["count"] == COUNT
    assert splice["alone_by_split"].keys() == {"held", "unseen"}
    for split, alone in splice["alone_by_split"].items():
        assert alone["splice"]["setting"] == splice["alone"]["splice"]["setting"]
        assert alone["raw"]["setting"] == splice["alone"]["splice"]["setting"] | {"model": "raw"}
        assert alone["splice"]["reference_kind"]["count"] == COUNT // 2
        decided = card["figures"][f"splice alone, reference_kind, {split}"]
        assert decided["mean"] == alone["splice"]["reference_kind"]["mean"]
    assert len(splice["entangled"]["style_cosine"]) == len(splice["entangled"]["strengths"]) == len(STRENGTHS) + 1
    table, again = draw_triplets(exam, COUNT, COUNT)
    assert not hashes(table.targets.images) & hashes(again.targets.images)


def test_intervals_of_the_splice_go_by_what_a_figure_is_about(exam: Exam) -> None:
    table, _ = draw_triplets(exam, COUNT, COUNT)
    scores = table.run(Setting(model="text", prompt="content")).scores
    kinds = len(table.references.labels["kind"].unique())
    figures = table.figures(table.rows[Setting(model="text", prompt="content")])
    assert figures.keys() == scores.keys()
    assert figures["reference_kind"]["groups"] == figures["leak"]["groups"] == kinds, "unseen: one content of each kind"
    unseen = table.targets.labels["kind"][is_unseen(contents_in(table.targets))]
    assert figures["prompt_kind"]["groups_of"] == "styles and contents"
    assert figures["prompt_kind"]["groups"] == COUNT // 2 + len(unseen.unique())


def test_the_deciding_figures_are_compared_with_their_thresholds(card: dict[str, Any]) -> None:
    assert card["figures"] == family_figures(card)
    for split in ("held", "unseen"):
        asked = {
            f"text-only {name}, {split}": limit for name, limit in (("kind", 0.90), ("count", 0.95), ("place", 0.95))
        }
        asked |= {f"VL names {name}, {split}": 0.90 for name in ("kind", "background")}
        asked |= {f"VAE PSNR, {split}": 30.0}
        for name, threshold in asked.items():
            figure = card["figures"][name]
            assert figure["threshold"] == threshold
            assert figure["reached"] is (figure["mean"] >= threshold)
    good = {"text": {"held": {"plain": {"kind": dict(mean=0.9, low=0.85, high=0.95, count=8)}}}}
    assert family_figures(good)["text-only kind, held"]["reached"] is True
    assert family_figures({}) == {}


def test_no_picture_of_the_training_comes_up(exam: Exam) -> None:
    """What models and judges are trained on, of families of this seed and the next, in galleries of the same size."""
    galleries = [*exam.galleries.values(), *exam.others.values()]
    shown = set().union(*(hashes(gallery.images) for gallery in galleries))
    assert len(shown) >= 2 * COUNT
    for seed in (0, 1):
        for split in SPLITS:
            trained = WORLD.gallery(split, len(galleries[0]), seed, "cpu")
            assert not shown & hashes(trained.images), f"{split}, seed {seed}"


def test_pictures_and_table_lie_beside_it(folder: Path) -> None:
    texts = [f"text_{split}_{name}" for split in ("held", "unseen") for name in ("plain", "detailed")]
    for name in (*texts, "vae", "splice_alone", "splice_neutral", "splice_content"):
        with Image.open(folder / f"{name}.png") as sheet:
            assert min(sheet.size) > 64
            assert len(sheet.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 50, f"{name} is empty"
    table = (folder / "scorecard.md").read_text()
    assert "| text, unseen, plain | kind |" in table
    assert "judge on true pictures" in table
    assert " contents) |" in table
    widths = {line.count("|") for line in table.split("All settings")[1].splitlines() if line.startswith("|")}
    assert len(widths) == 1, "a row of the table of settings has lost a cell"


def test_true_pictures_score_as_their_own_targets(smoked: Path) -> None:
    subject = Subject.load(smoked, 64, 0, CPU, num_inference_steps=2)
    judges = Judges(smoked / "judges", CPU)
    gallery = WORLD.gallery("held", 16, 0, "cpu")
    seen = judges.look(gallery.images)
    assert torch.allclose(cosine(seen.styles["style"], seen.styles["style"]), torch.ones(16))
    assert not torch.allclose(seen.styles["style"], seen.styles["style_second"])
    assert torch.equal(to_bytes(gallery.pixels(torch.arange(16))), gallery.images)
    assert subject.through_codec(gallery.images).shape == gallery.images.shape


@pytest.mark.parametrize(("split", "other"), [("held", "unseen"), ("unseen", "unseen")])
def test_pairs_share_the_style_and_not_the_kind(split: Split, other: Split) -> None:
    gallery, others = WORLD.gallery(split, 64, 3, "cpu"), WORLD.gallery(other, 64, 3, "cpu")
    pairs = draw_pairs(gallery, others, "kind", 8, seed=0)
    targets, references = gallery.select(pairs.targets), others.select(pairs.references)
    for label in WORLD.style_classes:  # the splits of one seed must go on having the same styles
        assert torch.equal(targets.labels[label], references.labels[label])
    assert torch.equal(targets.styles, references.styles)
    assert (targets.labels["kind"] != references.labels["kind"]).all()
    assert len(targets.styles.unique()) == 8, "as many styles as there are come first"
    assert pairs.rounds == [8]
    assert draw_pairs(gallery, others, "kind", 20, seed=0).rounds == [8, 8, 4]
    alike = replace(others, labels={"kind": targets.labels["kind"][:1].expand(64)})
    same = replace(gallery, labels=alike.labels)
    with pytest.raises(InputError, match="no two pictures"):
        draw_pairs(same, alike, "kind", 8, seed=0)


def test_words_are_found_where_the_world_puts_them() -> None:
    """On the world's own captions: the true class is named wherever a class of that label is, and no other is."""
    gallery = WORLD.gallery("held", 200, 0, "cpu")
    for label, classes in (WORLD.content_classes | WORLD.style_classes).items():
        found = 0
        for text, true in zip(gallery.detailed, gallery.labels[label].tolist(), strict=True):
            said = [name for name in classes if names(text, label, name)]
            assert said in ([], [classes[true]]), f"{label}: {said} in {text!r}"
            found += bool(said)
        assert found == 200 if label in WORLD.content_classes else found > 120


def test_what_cannot_be_measured_is_refused(smoked: Path, tmp_path: Path) -> None:
    def start(family: Path, count: int = 8, parts: tuple[str, ...] = ("vae",)) -> None:
        measure(family, tmp_path / "out", WORLD, count=count, seed=0, num_inference_steps=2, parts=parts)

    with pytest.raises(InputError, match="family.json is missing"):
        start(tmp_path)
    with pytest.raises(InputError, match="parts audio: not known"):
        start(smoked, parts=("audio",))
    with pytest.raises(InputError, match="seed -1 must not be negative"):
        measure(smoked, tmp_path / "out", WORLD, count=8, seed=-1, num_inference_steps=2, parts=("vae",))
    with pytest.raises(InputError, match="count 4 must be at least 8"):
        start(smoked, count=4)
    assert not (tmp_path / "out").exists()
