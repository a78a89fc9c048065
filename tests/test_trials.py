"""Methods on trial: the same noise and triplets for all, judged by what is known, compared in pairs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_tools.build import main as build
from ztrain.adapters.projector import ProjectorConfig
from ztrain.adapters.splice import SpliceConfig
from ztrain.config import Config, load_config
from ztrain.data import read_triplets
from ztrain.errors import InputError
from ztrain.export import ExportedAdapter
from ztrain.mini.style_folders import paint_many_styles
from ztrain.mini.subject import Subject
from ztrain.mini.trials import WEIGHTS, Method, Trials, find_best_splice, markdown_table, splice_settings
from ztrain.models import identity
from ztrain.rows import Triplet

STYLES, PICTURES = 10, 3


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config([Path("configs/projector.yaml"), Path("configs/miniature.yaml")])


@pytest.fixture(scope="module")
def triplets(tmp_path_factory: pytest.TempPathFactory) -> list[Triplet]:
    folder = tmp_path_factory.mktemp("trials")
    paint_many_styles(folder, {"train": (2, 2), "test": (STYLES, PICTURES)})
    styles = "{styles: {contents: contents.csv, splits: {train: train, test: test}}}"
    pair = "pair: {triplets_per_target: 1}"
    (folder / "build.yaml").write_text(f"sources: [images]\ndedup: null\nlabel: {styles}\n{pair}\n")
    assert build(["--config", str(folder / "build.yaml"), "--out", str(folder / "triplets")]) == 0
    return read_triplets(str(folder / "triplets"), "test").triplets


@pytest.fixture(scope="module")
def trials(config: Config, triplets: list[Triplet]) -> Trials:
    subject = Subject.load(WEIGHTS, 64, 0, torch.device("cpu"), num_inference_steps=6)
    return Trials(subject, config, triplets)


def test_triplets_come_in_rounds_of_different_styles(trials: Trials) -> None:
    assert trials.rounds == [STYLES] * PICTURES and len(trials) == STYLES * PICTURES
    for start in range(0, len(trials), STYLES):
        assert len(set(trials.styles[start : start + STYLES])) == STYLES
    assert sorted(trials._shuffled) == list(range(len(trials)))
    assert all(trials.styles[row] != style for row, style in zip(trials._shuffled, trials.styles, strict=True))


def test_true_pictures_have_the_best_scores(trials: Trials) -> None:
    scores = trials.score(trials.targets)
    assert scores["style_cosine"].min() > 0.999 and scores["style_retrieval"].mean() == 1
    assert scores["prompt_content"].mean() > 0.9 and scores["leak"].mean() < 0.1
    kinds = [triplet.prompt for triplet in trials.triplets]
    assert len(set(kinds)) > 5 and not (trials.asked["kind"] == trials.shown["kind"]).any()


@pytest.mark.slow
def test_the_splice_is_chosen_by_its_rule_and_needs_its_own_reference(trials: Trials, config: Config) -> None:
    text = trials.run(Method(label="text only"))
    settings = splice_settings(config, [5], [0.0, 1.0])
    found = find_best_splice(trials, settings)
    assert found.most_style.method == settings[1], "tokens=text at strength 1"
    for outcome in found.tried:
        if outcome.method.scale == 0:
            assert torch.equal(outcome.images, text.images), "strength 0 is text-only, from the same noise"
    assert found.keeping_content is not None
    assert found.keeping_content.mean("prompt_content") >= text.mean("prompt_content") - 0.05
    shuffled = trials.run(found.most_style.method.shuffled)
    assert trials.difference("style_cosine", found.most_style, shuffled)["low"] > 0.1
    again = trials.difference("style_cosine", found.most_style, found.most_style)
    assert (again["mean"], again["low"], again["high"], again["groups"]) == (0, 0, 0, STYLES)
    assert trials.leak_above_chance(text)["groups_of"] == "styles"
    table = markdown_table(trials, [text, shuffled]).splitlines()
    assert len(table) == 4 and "R@1 of 10" in table[0] and table[3].count("|") == table[0].count("|")
    assert table[3].startswith("| splice layer 5 tokens=text strength=1, shuffled reference | ")


@pytest.mark.slow
def test_a_method_may_lack_its_reference_or_its_prompt(trials: Trials, config: Config) -> None:
    splice = splice_settings(config, [5], [1.0])[0]
    text, plain = trials.run(Method(label="text only")), trials.run(splice)
    blind = trials.run(replace(splice, sees="none"))
    assert torch.equal(blind.images, text.images)
    alone = trials.run(replace(splice, has_prompt=False))
    assert alone.mean("prompt_kind") < 0.5 < plain.mean("prompt_kind")
    assert trials.leak_above_chance(alone)["low"] > 0.1, "the image alone brings its own content"
    guided = trials.run(replace(splice, image_guidance_scale=1.0))
    assert not torch.equal(guided.images, plain.images)
    unmoved = trials.run(replace(splice, sees="none", image_guidance_scale=1.0))
    assert torch.equal(unmoved.images, text.images), "nothing to be guided away from"


def test_what_cannot_be_tried_is_said(trials: Trials, config: Config, triplets: list[Triplet], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"new \[projector\] is untrained; export it first"):
        trials.run(Method(label="new", adapters=(ProjectorConfig(hidden_dim=8),)))
    with pytest.raises(InputError, match="nothing is no exported adapter"):
        Method.of_folder("x", tmp_path / "nothing")
    one = [triplet for triplet in triplets if triplet.columns["style"] == triplets[0].columns["style"]]
    with pytest.raises(InputError, match="all triplets are in one style"):
        Trials(trials.subject, config, one)
    with pytest.raises(InputError, match="a target of 64 x 64 pixels: trials are of 32 x 32"):
        Trials(replace(trials.subject, size=32), config, triplets)
    with pytest.raises(InputError, match="no style; trials are of triplets of style folders"):
        Trials(trials.subject, config, [replace(triplets[0], columns={}), *triplets[1:]])
    others = [triplet for triplet in triplets if triplet not in one]
    with pytest.raises(InputError, match="its style has more triplets than any other"):
        Trials(trials.subject, config, [*one, others[0]])
    known = identity(trials.subject.dit) | {"weights": "of another"}
    foreign = ExportedAdapter(tmp_path, [SpliceConfig()], config.encoders, {"transformer": known}, {}, {}, 1)
    with pytest.raises(InputError, match="made for another transformer: its weights hash is of another"):
        trials.run(Method(label="foreign", exported=foreign))
    stranger = replace(triplets[0], columns=triplets[0].columns | {"content": "portrait"})
    with pytest.raises(InputError, match="'portrait' is no content of the painted world"):
        Trials(trials.subject, config, [*triplets[1:], stranger])
