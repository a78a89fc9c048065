"""The diversity study: attention that is the blocks' own, scores that tell alike from different, a page of a result."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import diversity
from benchmarks.attention_mass import (
    ABSENT,
    KINDS,
    PAD,
    REFERENCE_IMAGE,
    REFERENCE_TEXT,
    SIGLIP,
    attention_weights,
    by_kind,
    times_uniform,
)
from benchmarks.diversity_options import OPTIONS, attended, pads
from benchmarks.diversity_study import Study, distinct_share, pixel_distance, structure_diversity
from benchmarks.diversity_tables import BASES, ROWS, WATCHED, choose, table
from benchmarks.pages import MARKS, PAGES, RESULTS
from ztrain.adapters.splice import SpliceConfig
from ztrain.blocks import use_stock_blocks
from ztrain.conditioning import concatenate
from ztrain.errors import InputError
from ztrain.mini.trials import Method

PAIRS, STEPS = 3, 4


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = diversity.Kept(tmp_path_factory.mktemp("diversity"), PAIRS, 2).study
    study.subject = replace(study.subject, settings=replace(study.subject.settings, num_inference_steps=STEPS))
    return study


def _asked(study: Study, name: str) -> Any:
    return diversity.method_of(name, study.config)


@pytest.mark.parametrize("name, scale", [("siglip_lora", 1.0), ("splice", 1.0), ("splice", 0.5)])
def test_the_probe_is_the_blocks_own_attention(study: Study, name: str, scale: float) -> None:
    """Its weights times v are each block's output to 1e-5: with LoRAs, samples of several lengths, and a bias."""
    splice = Method(label=name, adapters=(SpliceConfig(tokens="all"),), encoders=study.config.encoders)
    method = replace(splice if name == "splice" else _asked(study, name), scale=scale)
    encoded, model = study.encode(method), study.model(method)
    encoded = concatenate([encoded.select([0]).without_reference(), encoded.select([1, 2])])
    noisy = [study._noise(0, row) for row in range(PAIRS)]
    model.requires_grad_(False)
    fast = model(noisy, torch.full((PAIRS,), 0.7), encoded)
    differences: list[float] = []

    def compare(attention: Any, arguments: tuple[Tensor], options: dict[str, Any], output: Tensor) -> None:
        mask = options["attention_mask"]
        assert mask is not None and mask.ndim == (2 if scale == 1 else 4)
        weights = attention_weights(attention, arguments[0], mask, options["freqs_cis"])
        value = attention.to_v(arguments[0]).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        ours = attention.to_out[0]((weights @ value).transpose(1, 2).flatten(2))
        differences.append(float((ours - output).abs().max() / output.abs().max()))

    use_stock_blocks(model.dit)
    for block in model.dit.layers:
        block.attention.register_forward_hook(compare, with_kwargs=True)
    stock = model(noisy, torch.full((PAIRS,), 0.7), encoded)
    assert len(differences) == len(model.dit.layers) and max(differences) < 1e-5
    torch.testing.assert_close(stock, fast, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["alone-5", "beside-5", "siglip_lora"])
def test_masses_are_shares_of_named_tokens(study: Study, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.diversity_study._CALLS", (0, 2))
    tokens, masses = study.watch(_asked(study, name))
    assert [(mass.layer, round(mass.sigma, 2)) for mass in masses] == [
        (layer, sigma) for sigma in (1.0, 0.75) for layer in range(1, 7)
    ]
    for mass in masses:
        for shares in (mass.from_picture, mass.from_all):
            torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:2]))
            assert not shares.transpose(0, 1)[:, tokens.kinds == ABSENT].any(), "nobody looks behind a sample's end"
        torch.testing.assert_close(by_kind(mass.from_picture, tokens).sum(1), torch.ones(PAIRS))
        assert (times_uniform(mass.from_picture, tokens).sum(1) / tokens.counts - 1).abs().max() < 1e-4
    counts = {kind: int((tokens.kinds[0] == place).sum()) for place, kind in enumerate(KINDS)}
    reads_siglip = name == "siglip_lora"
    assert counts[KINDS[SIGLIP]] == (64 if reads_siglip else 0)
    assert counts[KINDS[REFERENCE_TEXT]] == (0 if reads_siglip else 8), "of the turn around a picture"
    assert counts[KINDS[REFERENCE_IMAGE]] == (18 if name == "alone-5" else 0), "16 and the two markers"
    assert (tokens.counts % 32 == 0).all()


@pytest.mark.parametrize(
    "option, unseen", [("pads-0", "caption pad 1"), ("newline-0", r"\n #3"), ("reply-0", "<|im_start|> #-3")]
)
def test_an_option_takes_attention_from_the_tokens_that_it_names(
    study: Study, option: str, unseen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probe, names of tokens and places of options agree about which token is which."""
    asked = study.model

    def changed(method: Any) -> Any:
        model = asked(method)
        OPTIONS[option].wrap(model, torch.Generator())
        return model

    monkeypatch.setattr(study, "model", changed)
    monkeypatch.setattr("benchmarks.diversity_study._CALLS", (1,))
    tokens, masses = study.watch(_asked(study, "beside-5"))
    for mass in masses:
        gone = [name for row, names in zip(mass.from_all, tokens.names, strict=True) for name in _unseen(row, names)]
        assert gone and all(unseen.removesuffix("1") in name for name in gone)
        assert sum(name.endswith(unseen) for name in gone) == PAIRS
        assert (by_kind(mass.from_all, tokens)[:, PAD].max() == 0) == (option == "pads-0")


def _unseen(row: Tensor, names: list[str]) -> Iterator[str]:
    for share, name in zip(row.sum(0).tolist(), names, strict=True):
        if name and share == 0:
            yield name


def test_alike_is_0_and_different_is_more(study: Study) -> None:
    twice = Study(study.subject, study.config, PAIRS, [5, 5])
    scores = twice.score(twice.draw(_asked(study, "siglip_lora")))
    others = study.score(study.draw(_asked(study, "siglip_lora")))
    for name in ("style_diversity", "style_second_diversity", "structure_diversity", "pixel_distance"):
        assert scores[name].abs().max() < 1e-4 < others[name].min(), name
    assert (scores["distinct_contents"] == 0.5).all()
    one, many = (study.score(study.painted(in_one_style=within)) for within in (True, False))
    assert (one["structure_diversity"] < many["structure_diversity"]).all() and one["style_cosine"].min() > 0.9
    assert one["prompt_content"].mean() > 0.9 > one["reference_content"].mean()
    with pytest.raises(ValueError, match="at least 2 seeds"):
        Study(study.subject, study.config, PAIRS, [1])


def test_scores_of_known_pictures() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).repeat(3, 32, 1) * 8
    flat = torch.full_like(ramp, 255)
    images = torch.stack([torch.stack([ramp, ramp, ramp]), torch.stack([ramp, 255 - ramp, flat])])
    structure = structure_diversity(images)
    assert structure[:2].tolist() == pytest.approx([0, 2], abs=1e-6), "the same, and its negative"
    assert structure[2].isnan(), "a flat picture correlates with nothing"
    assert pixel_distance(images)[0] == 0 and pixel_distance(images)[2] == pytest.approx(131 / 255, abs=1e-6)
    classes = torch.tensor([[[1, 2], [1, 2]], [[1, 2], [1, 3]], [[1, 2], [4, 3]], [[1, 2], [1, 2]]])
    assert distinct_share(classes).tolist() == [0.25, 0.75]


@pytest.mark.parametrize("name", ["late-0.92-guided-1", "annealed-0.75", "noise-0.25", "tokens-0.5", "scale-0.5"])
def test_options_change_what_is_read_of_the_reference_and_nothing_else(study: Study, name: str) -> None:
    option = OPTIONS[name]
    for asked in ("alone-5", "siglip_lora"):
        plain, other = study.draw(_asked(study, asked)), study.draw(_asked(study, asked), option)
        assert (plain != other).flatten(2).any(2).all(), "every picture"
        assert torch.equal(other, study.draw(_asked(study, asked), option)), "the same again"
    text = _asked(study, "text")
    assert torch.equal(study.draw(text), study.draw(text, option))


def test_attention_is_changed_at_the_steps_that_are_named(study: Study) -> None:
    asked = _asked(study, "beside-5")
    plain, early, always = (study.draw(asked, OPTIONS[name]) for name in ("plain", "pads-0-0.92", "pads-0"))
    never = replace(OPTIONS["plain"], wrap=attended(0.0, pads, low=1.1))
    assert torch.equal(study.draw(asked, never), plain)
    assert not torch.equal(early, plain) and not torch.equal(early, always)


def test_noise_keeps_mean_and_spread(study: Study) -> None:
    encoded = study.encode(_asked(study, "alone-5"))
    changed = OPTIONS["noise-0.25"].prepare(encoded, torch.Generator().manual_seed(0))
    before, after = (
        torch.cat([states.states for states in each.reference if states is not None]) for each in (encoded, changed)
    )
    assert ((after.mean(0) - before.mean(0)).abs() / before.std(0)).mean() < 0.1
    assert (after.std(0) / before.std(0) - 1).abs().mean() < 0.1
    scores = [(each - before.mean(0)) / before.std(0) for each in (before, after)]
    kept = (scores[0] * scores[1]).mean() / scores[0].square().mean()
    assert kept == pytest.approx((1 + 1 / 16) ** -0.5, abs=0.01), "a quarter of noise"


def _row(name: str, on_first: tuple[float, float, float], lows: tuple[float, float, float]) -> dict[str, Any]:
    figures = ("structure_diversity", "style_cosine", "prompt_content")
    return {
        "name": name,
        "on_first_half": dict(zip(figures, on_first, strict=True)),
        "above_plain": {figure: {"low": low} for figure, low in zip(figures, lows, strict=True)},
    }


def test_the_rule() -> None:
    plain = _row("plain", (0, 0, 0), (0, 0, 0))
    costly = _row("costly", (0.9, -0.06, 0), (0.8, -0.01, 0))
    wordless = _row("wordless", (0.8, 0, -0.06), (0.7, 0, 0))
    good = _row("good", (0.2, -0.05, -0.05), (0.1, -0.05, -0.05))
    small = _row("small", (0.1, 0, 0), (0.1, 0, 0))
    rows = [plain, costly, wordless, good, small]
    assert choose(rows, "prompt_content") == {"chosen": "good", "winner": "good"}
    for lows in ((0, 0, 0), (0.1, -0.051, 0), (0.1, 0, -0.051)):
        unsure = _row("good", (0.2, 0, 0), lows)
        assert choose([plain, unsure, small], "prompt_content") == {"chosen": "good", "winner": None}, lows
    assert choose([plain, costly], "prompt_content") == {"chosen": None, "winner": None}


def test_the_page_is_of_the_committed_result(tmp_path: Path) -> None:
    result = json.loads((RESULTS / "diversity.json").read_text(encoding="utf-8"))
    assert result["plan"]["pairs"] >= 96 and result["plan"]["seeds"] >= 8
    assert [row["name"] for row in result["rows"]] == list(ROWS)
    assert [row["name"] for row in result["attention"]] == list(WATCHED)
    for told in result["options"]:
        assert [row["name"] for row in told["rows"]] == list(OPTIONS)
        found = choose(told["rows"], BASES[told["name"]].content)
        assert found == {name: told[name] for name in found}
    page = (PAGES / "diversity.md").read_text(encoding="utf-8")
    assert page.split(MARKS[0])[1].split(MARKS[1])[0].strip() == table(result)
    copyfile(PAGES / "diversity.md", tmp_path / "diversity.md")
    diversity.write(result, tmp_path)
    assert (tmp_path / "diversity.md").read_text(encoding="utf-8") == page
    assert (tmp_path / "diversity.png").stat().st_size > 10_000
    assert json.loads(diversity.lines_of(result)) == result
    assert diversity.lines_of(result) == (RESULTS / "diversity.json").read_text(encoding="utf-8")


def test_what_was_not_measured_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diversity.main(["--pages", "--smoke", "--out", str(tmp_path)]) == 2
    assert "diversity.json is missing" in capsys.readouterr().err
    kept = diversity.Kept(tmp_path, 4, 2)
    kept.keep("text", {"scores": {}})
    with pytest.raises(InputError, match="another plan"):
        diversity.Kept(tmp_path, 5, 2).read("text")
    with pytest.raises(InputError, match="alone-5 is not measured yet"):
        kept.read("alone-5")
