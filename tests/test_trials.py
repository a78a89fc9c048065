"""Methods on trial: the same noise and triplets for all, judged by what is known, compared in pairs."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miniature.trials import (
    ADAPTERS,
    Trials,
    cases_of,
    exported_entry,
    find_best_splice,
    markdown_table,
    splices,
    text_only,
)
from miniature.truth import opened
from tests.triplets import painted_experiment
from ztrain.adapters.projector import ProjectorConfig
from ztrain.config import Config, JudgesConfig
from ztrain.data.exchange import Case
from ztrain.errors import InputError
from ztrain.weights.adapter_folder import CONFIG_FILE, sealed

STYLES, PICTURES = 10, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return painted_experiment(tmp_path_factory.mktemp("trials"), "projector", (STYLES, PICTURES))


@pytest.fixture(scope="module")
def trials(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials.of(config, "test", tmp_path_factory.mktemp("drawn"))


def test_triplets_come_in_rounds_of_different_styles(trials: Trials) -> None:
    assert trials.rounds == [STYLES] * PICTURES and len(trials) == STYLES * PICTURES
    for start in range(0, len(trials), STYLES):
        assert len(set(trials.styles[start : start + STYLES])) == STYLES
    shuffled = splices(trials.config, [5], [1.0])[0].shuffled
    own = [case.look for case in trials.cases]
    shown = [tuple(known.digest for known in trials.studio.references(shuffled, row)) for row in range(len(trials))]
    assert Counter(shown) == Counter(own), "each is given away once"
    style_of = dict(zip(own, trials.styles, strict=True))
    assert all(style_of[look] != style for look, style in zip(shown, trials.styles, strict=True))


def test_true_pictures_have_the_best_scores(trials: Trials) -> None:
    scores = trials.score(trials.targets)
    assert scores["style_cosine"].min() > 0.999 and scores["style_retrieval"].mean() == 1
    assert scores["prompt_content"].mean() > 0.9 and scores["leak"].mean() < 0.1
    kinds = [case.prompt for case in trials.cases]
    assert len(set(kinds)) > 5 and not (trials.truth.asked["kind"] == trials.truth.shown["kind"]).any()


@pytest.mark.slow
def test_the_splice_is_chosen_by_its_rule_and_needs_its_own_reference(trials: Trials, config: Config) -> None:
    settings = splices(config, [5], [0.0, 1.0])
    most, keeping = find_best_splice(trials, settings)
    assert most.entry == settings[1], "tokens=text at strength 1"
    text, zero, zero_of_all, shuffled = trials.run(text_only(config), settings[0], settings[2], most.entry.shuffled)
    for outcome in (zero, zero_of_all):
        assert torch.equal(opened(outcome.pictures), opened(text.pictures)), (
            "strength 0 is text-only, from the same noise"
        )
    assert keeping is not None and keeping.mean("prompt_content") >= text.mean("prompt_content") - 0.05
    assert trials.difference("style_cosine", most, shuffled)["low"] > 0.1
    again = trials.difference("style_cosine", most, most)
    assert (again["mean"], again["low"], again["high"], again["groups"]) == (0, 0, 0, STYLES)
    assert trials.figures(text)["leak_above_chance"]["groups_of"] == "styles"
    table = markdown_table(trials, [text, shuffled]).splitlines()
    assert len(table) == 4 and "R@1 of 10" in table[0] and table[3].count("|") == table[0].count("|")
    assert table[3].startswith("| splice layer 5 tokens=text strength=1, shuffled | ")


@pytest.mark.slow
def test_a_method_may_lack_its_reference_or_its_prompt(trials: Trials, config: Config) -> None:
    splice = splices(config, [5], [1.0])[0]
    strong = splice.sample.model_copy(update={"image_guidance_scale": 1.0})
    text, plain, blind, alone, guided, unmoved = trials.run(
        text_only(config),
        splice,
        replace(splice, has_reference=False),
        replace(splice, has_prompt=False),
        replace(splice, sample=strong),
        replace(splice, sample=strong, has_reference=False),
    )
    assert torch.equal(opened(blind.pictures), opened(text.pictures))
    assert alone.mean("prompt_kind") < 0.5 < plain.mean("prompt_kind")
    assert trials.figures(alone)["leak_above_chance"]["low"] > 0.1, "the image alone brings its own content"
    assert not torch.equal(opened(guided.pictures), opened(plain.pictures))
    assert torch.equal(opened(unmoved.pictures), opened(text.pictures)), "nothing to be guided away from"


def test_what_cannot_be_tried_is_said(trials: Trials, config: Config, tmp_path: Path) -> None:
    def tried(cases: Sequence[Case], config: Config = config) -> Trials:
        return Trials(config, cases, tmp_path)

    text, cases = text_only(config), cases_of(config, "test")
    with pytest.raises(InputError, match=r"new \[projector\] is untrained; export it first"):
        trials.run(replace(text, label="new", adapters=(ProjectorConfig(hidden_dim=8),)))
    with pytest.raises(InputError, match="nothing is no exported adapter"):
        exported_entry("x", tmp_path / "nothing", config)
    one = [case for case in cases if case.columns["style"] == cases[0].columns["style"]]
    with pytest.raises(InputError, match="all triplets are in one style"):
        tried(one)
    with pytest.raises(InputError, match="a target of 64 x 64 pixels: trials are of 32 x 32"):
        tried(cases, config.model_copy(update={"data": config.data.model_copy(update={"resolution": 32})}))
    with pytest.raises(InputError, match="no style; trials are of triplets of style folders"):
        tried([replace(cases[0], columns={}), *cases[1:]])
    with pytest.raises(InputError, match="its style has more triplets than any other"):
        tried([*one, next(case for case in cases if case not in one)])
    with pytest.raises(InputError, match="judges.truth is not set"):
        tried(cases, config.model_copy(update={"judges": JudgesConfig()}))
    foreign = shutil.copytree(ADAPTERS / "lora", tmp_path / "foreign")
    document = json.loads((foreign / CONFIG_FILE).read_text())
    document["identity"]["transformer"]["weights"] = "of another"
    (foreign / CONFIG_FILE).write_text(sealed(document))
    with pytest.raises(InputError, match="made for another transformer: its weights hash is of another"):
        trials.run(exported_entry("foreign", foreign, config))
    stranger = replace(cases[0], columns={**cases[0].columns, "content": "portrait"})
    with pytest.raises(InputError, match="'portrait' is no content of the painted world"):
        tried([*cases[1:], stranger])
