"""Comparisons, sweeps and checkpoints on the shipped miniature: what is drawn, what is judged, what is chosen."""

import functools
import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tqdm.auto import tqdm

from data_tools.build import main as build
from miniature import truth_judge
from miniature.style_folders import paint_many_styles
from miniature.trials import ADAPTERS
from tests.triplets import full_disk
from ztrain.cache.cache import Cache
from ztrain.compare import command
from ztrain.compare import sweep as sweeping
from ztrain.compare.command import _keep_given
from ztrain.compare.judging import Verdicts
from ztrain.compare.lineup import entries_of, read_cases
from ztrain.compare.ranking import choose, ranked
from ztrain.compare.record import (
    FILE_NAME,
    Choice,
    Comparison,
    Difference,
    Metric,
    pictures_of,
    read_best,
    read_comparison,
)
from ztrain.compare.studio import Shot, Studio
from ztrain.compare.sweep import settings_of
from ztrain.config import Config, JudgesConfig, ModelConfig, load_config
from ztrain.data.digests import Known
from ztrain.data.exchange import Case, exchange
from ztrain.errors import InputError
from ztrain.frozen.encoders import TextEncoder
from ztrain.frozen.sources import Source
from ztrain.images import PictureFile
from ztrain.io.drawn import save_picture
from ztrain.metrics.intervals import interval
from ztrain.model.dit import load_transformer
from ztrain.train import loop

ROWS, SEEDS = 6, 2
# As the programs call them, with the judge of judges.truth.
compare = functools.partial(command.compare, truth=truth_judge)
compare_checkpoints = functools.partial(command.compare_checkpoints, truth=truth_judge)
sweep = functools.partial(sweeping.sweep, truth=truth_judge)
train = functools.partial(loop.train, truth=truth_judge)

STEPS = ("--sample.num_inference_steps", "2", "--sample.guidance_scale", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triplets of painted drawings, two for each of six styles in the validation split."""
    folder = tmp_path_factory.mktemp("painted")
    paint_many_styles(folder / "paintings", {"train": (4, 3), "validation": (ROWS, 2)}, seed=1)
    label = {"styles": {"contents": "contents.csv", "splits": {"train": "train", "validation": "validation"}}}
    rules = {
        "sources": ["images"],
        "dedup": None,
        "label": label,
        "pair": {"triplets_per_target": 1, "max_copy_score": 1.0},
    }
    (folder / "paintings/build.yaml").write_text(yaml.safe_dump(rules))
    assert build(["--config", str(folder / "paintings/build.yaml"), "--out", str(folder / "data")]) == 0
    return folder / "data"


def settings(data: Path, out: Path, *words: str, experiment: str = "splice") -> Config:
    files = [Path(f"configs/{experiment}.yaml"), Path("configs/miniature.yaml")]
    common = [
        *("--data.train_data_dir", str(data), "--cache.dir", str(data.parent / "cache")),
        *("--compare.output_dir", str(out), "--compare.num_samples", str(ROWS), *STEPS),
    ]
    return load_config(files, [*common, *words])


def two_lists(data: Path, out: Path, *words: str) -> Config:
    lists = ("--compare.adapters", str(ADAPTERS / "projector"), str(ADAPTERS / "lora"))
    return settings(data, out, *lists, "--compare.num_seeds", str(SEEDS), "--compare.shuffled", *words)


@pytest.fixture(scope="module")
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compared")
    return out, compare(two_lists(data, out))


def column(found: Comparison, label: str) -> int:
    return next(place for place, column in enumerate(found.columns) if column.label == label)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


# What is drawn


def test_every_column_is_on_the_same_rows_and_seeds(compared: tuple[Path, Comparison]) -> None:
    out, found = compared
    roles = {column.label: (column.role, column.sees) for column in found.columns}
    assert roles == {
        "no image": ("none", "none"),
        "splice": ("splice", "own"),
        "[projector]": ("adapter", "own"),
        "[lora]": ("control", "none"),  # it reads no reference
        "splice, shuffled": ("control", "shuffled"),
        "[projector], shuffled": ("control", "shuffled"),
    }
    assert found.columns[column(found, "splice, shuffled")].of == column(found, "splice")
    assert [len(of_row) for of_column in found.pictures for of_row in of_column] == [SEEDS] * ROWS * 6
    seeds = [seed for row in found.rows for seed in row.seeds]
    assert len(set(seeds)) == len(seeds) == ROWS * SEEDS
    assert all((out / name).is_file() for name in pictures_of(found))
    assert read_comparison(out) == found
    assert str(out.parent) not in (out / FILE_NAME).read_text()


def test_a_picture_is_the_one_that_sample_draws(data: Path, compared: tuple[Path, Comparison], tmp_path: Path) -> None:
    """Same prompt, reference, list and seed: what a comparison shows is what people get."""
    from ztrain.cli import main

    guidance = ("--sample.guidance_scale", "4")
    one = ("--compare.num_samples", "1", "--compare.adapters", str(ADAPTERS / "projector"), *guidance)
    guided = compare(settings(data, tmp_path, *one))
    for out, found, place, more in ((*compared, (3, 1), ()), (tmp_path, guided, (0, 0), guidance)):
        row = found.rows[place[0]]
        words = [
            *("sample", "--config", "configs/splice.yaml", "configs/miniature.yaml", "--prompt", row.prompt),
            *("--reference", str(out / row.references[0]), "--adapter", str(ADAPTERS / "projector"), *STEPS, *more),
            *("--seed", str(row.seeds[place[1]]), "--out", str(tmp_path / "one.png"), "--sample.batch_size", "1"),
        ]
        assert main(words) == 0
        ours = pixels(out / found.pictures[column(found, "[projector]")][place[0]][place[1]])
        theirs = pixels(tmp_path / "one.png")
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1  # batched sums round otherwise


def test_what_is_drawn_is_kept_and_only_what_is_missing_is_drawn(
    data: Path, compared: tuple[Path, Comparison], tmp_path: Path
) -> None:
    out, first = compared
    drawn = sorted((out / "pictures").iterdir())
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in drawn}
    lost = [out / first.pictures[2][0][0], out / first.pictures[4][5][1]]
    for path in lost:
        path.unlink()
    again = compare(two_lists(data, out))
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted((out / "pictures").iterdir())}
    assert after.keys() == before.keys()
    assert {path for path in after if after[path][0] != before[path][0]} == set(lost)
    assert again.pictures == first.pictures and again.metrics == first.metrics
    # One seed more adds its own; other steps are other pictures.
    more = compare(settings(data, out, "--compare.num_seeds", "3"))
    assert [[row[:SEEDS] for row in of_column] for of_column in more.pictures] == first.pictures[:2]
    other = compare(settings(data, out, "--sample.num_inference_steps", "1"))
    assert not set(pictures_of(other)) & {name for of in first.pictures for row in of for name in row}


def test_shuffled_references_are_of_another_style_each_once(
    data: Path, compared: tuple[Path, Comparison], tmp_path: Path
) -> None:
    config = two_lists(data, compared[0])
    cases, lost = read_cases(config, Cache(config).digests)
    assert lost == 0
    given = [cases[other].references for other in exchange(cases, config.seed, "rows", "").others]
    of = {case.look: case.columns["style"] for case in cases}
    looks = [tuple(known.digest for known in references) for references in given]
    assert all(of[look] != case.columns["style"] for look, case in zip(looks, cases, strict=True))
    assert sorted(looks) == sorted(case.look for case in cases)
    for style in ("one", None):
        alike = [replace(case, columns={"style": style}) for case in cases]
        found = exchange(alike, 0, "rows", "")
        assert all(cases[other].look != case.look for other, case in zip(found.others, cases, strict=True))
        assert found.share == 0 and "are of the same style or of one that the data does not say" in found.words
    one_look = [replace(case, references=cases[0].references) for case in cases]
    studio = Studio(config, one_look, tmp_path, Cache(config))
    with pytest.raises(InputError, match="all .* rows have the same references, so none can be .*; compare more"):
        studio.references(replace(entries_of(config)[1], is_shuffled=True), 0)


def test_prompts_are_crossed_with_pictures(data: Path, tmp_path: Path) -> None:
    lines = "\ufefftwo stars on the left\r\n\r\none fish in the middle\ntwo stars on the left\n"
    (tmp_path / "prompts.txt").write_text(lines, encoding="utf-8")
    (tmp_path / "looks").mkdir()
    (tmp_path / "looks/._0.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")  # what macOS lays beside a picture
    for number, path in enumerate(sorted((data.parent / "paintings/images").rglob("*.png"))[:3]):
        (tmp_path / f"looks/{number}.png").write_bytes(path.read_bytes())
    words = ("--compare.prompts", str(tmp_path / "prompts.txt"), "--compare.references", str(tmp_path / "looks"))
    found = compare(settings(data, tmp_path / "out", *words, "--judges.truth", "None"))
    groups = [(row.prompt_group, row.reference_group) for row in found.rows]
    assert groups == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert all(row.target is None for row in found.rows)
    assert {row.prompt for row in found.rows} == {"two stars on the left", "one fish in the middle"}
    # Nobody judges: that is said, and nothing is called the best.
    assert found.best.column is None and "judges" in found.best.found
    assert "likeness" in str(found.conditions["not scored"]) and "adherence" in str(found.conditions["not scored"])
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(InputError, match="no line has a prompt"):
        compare(settings(data, tmp_path / "out", *words))
    (tmp_path / "prompts.txt").unlink()
    os.mkfifo(tmp_path / "prompts.txt")
    with pytest.raises(InputError, match="named pipe"):
        compare(settings(data, tmp_path / "out", *words))


def test_plain_pictures_of_two_shapes_are_two(tmp_path: Path) -> None:
    """Their bytes are the same."""
    known = []
    for name, size in (("wide", (96, 64)), ("tall", (64, 96))):
        Image.new("RGB", size, "white").save(tmp_path / f"{name}.png")
        known.append(Known(PictureFile(tmp_path / f"{name}.png"), name, *size))
    kept = _keep_given([Case(prompt="a", references=tuple(known), where="")], tmp_path)
    assert len(set(kept.values())) == 2 and all((tmp_path / name).is_file() for name in kept.values())


# What is judged


def test_scores_say_what_the_columns_are(compared: tuple[Path, Comparison]) -> None:
    _, found = compared
    plain, projector, lora = (column(found, name) for name in ("no image", "[projector]", "[lora]"))
    change, drift = found.metric("change"), found.metric("drift")
    assert change.values is not None and drift.values is not None
    assert {value for row in change.values[plain] for value in row} == {0.0}
    assert all(value > 0 for row in change.values[projector] for value in row if value is not None)
    # The projector without a reference is the base; the LoRA is not. Drift is of the first seed.
    assert [row[0] for row in drift.values[projector]] == [0.0] * ROWS
    assert all((row[0] or 0) > 0 and row[1] is None for row in drift.values[lora])
    assert drift.means[plain] is None
    assert found.metric("diversity").means[plain] is not None


def test_differences_are_paired_to_the_best_splice(compared: tuple[Path, Comparison]) -> None:
    _, found = compared
    splice, projector = column(found, "splice"), column(found, "[projector]")
    assert found.baseline == splice
    metric = found.metric("truth_style")
    assert metric.values is not None and metric.differences[splice] is None
    values = torch.tensor(metric.values, dtype=torch.float64).mean(2)
    groups = [row.prompt_group for row in found.rows], [row.reference_group for row in found.rows]
    expected = interval(values[projector] - values[splice], groups, resamples=2000)
    told = metric.differences[projector]
    assert told is not None and (told.mean, told.low, told.high) == (expected.mean, expected.low, expected.high)


def metric_of(values: torch.Tensor, direction: str = "higher", name: str = "x", **more: float | None) -> Metric:
    told = {"low": None, "high": None} | more
    return Metric(name=name, title=name, definition="", direction=direction, values=values.tolist(), **told)


def sheet_of(styles: list[float], kept: list[float] | None, chance: float = 0.2) -> Verdicts:
    """Scores of four rows and two seeds: column 0 is text alone."""

    def score(name: str, values: list[float]) -> Metric:
        table = torch.tensor(values, dtype=torch.float64)[:, None, None].expand(-1, 4, 2)
        return metric_of(table, name=name, low=-1.0, high=1.0, chance=chance)

    scores = [score("style", styles)] + ([] if kept is None else [score("prompt", kept)])
    return Verdicts(scores, "style", None if kept is None else "prompt", [])


def test_the_best_has_most_style_among_those_that_keep_the_prompt() -> None:
    labels, groups = ["none", "a", "b", "c"], (range(4), range(4))

    def best(verdicts: Verdicts, candidates: list[int], keep: float = 0.95) -> Choice:
        return choose(verdicts, candidates, 0, keep, labels, groups)

    # b has most style, and keeps (0.6 - 0.2) / (1.0 - 0.2) = half of the prompt.
    verdicts = sheet_of([0.0, 0.5, 0.9, 0.7], [1.0, 1.0, 0.6, 0.97])
    assert best(verdicts, [1, 2, 3]).column == 3
    assert best(verdicts, [1, 2, 3], 0.49).column == 2
    assert best(verdicts, [1, 2]).column == 1
    none = best(verdicts, [2])
    assert none.column == 2 and "None keeps 95%; b keeps 50%" in none.found
    assert best(verdicts, [2, 3], 1.0).column == 3  # it keeps most
    assert best(sheet_of([0.0, 0.5, 0.9, 0.7], None), [1, 2, 3]).column == 2
    assert "keeping 100%" in best(sheet_of([0, 0.5], [0.6, 0.9]), [1]).found  # more than all
    for near in ([0.2, 0.2, 0.1], [0.1, 0.2, 0.1]):
        blind = best(sheet_of([0, 0.4, 0.5], near), [1, 2])
        assert blind.column == 2 and "near chance" in blind.rule
    unsure = sheet_of([0, 0.4, 0.5], [0.25, 0.25, 0.1])
    apart = torch.tensor(unsure.scores[1].values) + torch.tensor([-0.2, 0.2, -0.1, 0.1])[:, None]
    unsure.scores[1] = unsure.scores[1].model_copy(update={"values": apart.tolist()})
    assert "near chance" in best(unsure, [1, 2]).rule  # above it by less than the interval
    unknown = sheet_of([0, 0.4, 0.5], [0.9, 0.9, 0.9])
    unknown.scores[1] = unknown.scores[1].model_copy(update={"chance": None})
    assert "cannot be told" in best(unknown, [1, 2]).rule


def test_verdicts_need_an_interval_without_zero_and_a_direction() -> None:
    noise = torch.randn(3, 12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = 0.1 * noise
    values[1] += 1.0
    values[2] = values[0] + 0.001 * noise[2] * noise[1]
    values[1, 5] = torch.nan

    def verdicts(direction: str) -> list[Difference | None]:
        return ranked(metric_of(values, direction), 0, (range(12), range(12))).differences

    assert [d and d.verdict for d in verdicts("higher")] == [None, "better", "undecided"]
    assert [d and d.verdict for d in verdicts("lower")] == [None, "worse", "undecided"]
    assert [d and d.verdict for d in verdicts("neither")] == [None, "none", "none"]
    assert verdicts("higher")[1].count == 11
    alone = ranked(metric_of(values[:, :1]), 0, ([0], [0])).differences[1]
    assert alone is not None and (alone.low, alone.verdict) == (None, "none")


# Sweeps


def test_a_sweep_draws_every_combination_and_its_best_is_a_preset(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    axes = {"encoders.hidden_index": [2, 5], "splice.tokens": ["text", "all"], "sample.strength": [1.0, 0.5]}
    file = tmp_path / "axes.yaml"
    file.write_text(yaml.safe_dump({"sweep": {"axes": axes, "output_dir": str(out)}}, sort_keys=False))
    config = settings(data, out, "--compare.num_samples", "3")
    swept = config.model_copy(update={"sweep": load_config([file]).sweep})
    found = sweep(swept)
    assert [c.label for c in found.columns[:4]] == [
        "no image", "splice", "layer 2 · tokens text · strength 1", "layer 2 · tokens text · strength 0.5",
    ]  # fmt: skip
    assert [tuple(c.settings.values()) for c in found.columns[2:]] == [
        (layer, tokens, strength) for layer in (2, 5) for tokens in ("text", "all") for strength in (1.0, 0.5)
    ]
    change = found.metric("change")
    assert change.values is not None
    assert len({str(change.values[place]) for place in range(2, 10)}) == 8
    best = found.best.column
    assert best is not None
    preset = settings(data, out, "--compare.num_samples", "3", "--compare.presets", str(out / "best_splice.yaml"))
    again = compare(preset)
    assert again.pictures[column(again, "best splice")] == found.pictures[best]


def test_a_sweep_takes_what_guidance_leads_away_from(data: Path, tmp_path: Path) -> None:
    """Each setting draws pictures of its own with guidance, and without it none reads the negative."""
    config = settings(data, tmp_path, "--sample.shift", "2")
    cache = Cache(config)
    studio = Studio(config, read_cases(config, cache.digests)[0], tmp_path, cache)

    def shots(axes: dict) -> list[Shot]:
        swept = config.model_copy(update={"sweep": config.sweep.model_copy(update={"axes": axes})})
        return [studio._shots(entry, 0)[0] for entry in settings_of(swept)][1:]

    of_each = shots({"sample.guidance_scale": [0.0, 2.0], "sample.negative": ["neither", "reference", "base"]})
    assert [s.entry.label for s in of_each[1:3]] == ["guidance 0 · negative reference", "guidance 0 · negative base"]
    names = [shot.path for shot in of_each]
    assert len(set(names)) == 4 and len(set(names[:3])) == 1
    assert {studio.settings(shot.entry).shift for shot in of_each} == {2.0}
    prompts = ["", "a star", "two moons"]
    of_each = shots({"sample.guidance_scale": [2.0], "sample.negative_prompt": prompts})
    assert len({shot.path for shot in of_each}) == 3
    encoded = studio._encode(of_each, tqdm(disable=True))[0]
    text = TextEncoder.load(Source.of(config.models.base), 512, torch.float32, studio.device)
    for shot, prompt in zip(of_each, prompts, strict=True):
        assert torch.equal(encoded[studio._state_key(shot)].null_text, text.encode(prompt).cpu())


def test_axes_that_do_not_exist_are_named(data: Path, tmp_path: Path) -> None:
    for axes, complaint in (
        ({}, "sweep.axes is empty"),
        ({"encoders.layer": [1]}, "'encoders.layer' is no such key"),
        ({"train.learning_rate": [1]}, "'train.learning_rate' is no such key"),
        ({"sample.scales": []}, "sample.scales has no values"),
        ({"splice.tokens": ["image", "words"]}, "splice.tokens words"),
    ):
        config = settings(data, tmp_path)
        swept = config.model_copy(update={"sweep": config.sweep.model_copy(update={"axes": axes})})
        with pytest.raises(InputError, match=complaint):
            sweep(swept)


# Runs


def test_checkpoints_are_compared_and_the_run_marks_its_best_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = (
        *("--output_dir", str(run), "--train.max_train_steps", "4", "--train.checkpointing_steps", "2"),
        *("--validation.validation_steps", "0", "--validation.preview_steps", "0", "--validation.score_steps", "2"),
        *("--validation.num_scored", "4", "--adapters.0.rank", "4", "--compare.num_samples", "3"),
    )
    config = settings(data, tmp_path / "out", *words, experiment="lora")
    assert train(config).exported is not None
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = {row["step"]: row for row in metrics if "score/truth_style" in row}
    assert list(scored) == [0, 2, 4]
    assert scored[0]["score/change"] == 0.0 < scored[4]["score/change"]  # a fresh LoRA is the base
    assert "score/truth_style_above_splice_low" in scored[4]
    best = json.loads((run / "best.json").read_text())
    assert list(best["steps"]) == ["2", "4"] and "largest" in best["rule"]  # nothing is trained at step 0
    assert best["step"] == int(max(best["steps"], key=lambda step: best["steps"][step][0]))

    more = ("--init_from", str(run / "export"), "--output_dir", str(tmp_path / "next"), "--train.max_train_steps", "1")
    assert train(settings(data, tmp_path / "out", *words, *more, experiment="lora")).exported is not None
    following = json.loads((tmp_path / "next" / "best.json").read_text())["steps"]
    assert list(following) == ["0", "1"] and following["0"] == best["steps"]["4"]  # where the source stood

    bases = [load_transformer(Source.of(config.models.base), torch.float32, "cpu") for _ in range(2)]
    monkeypatch.setattr("ztrain.weights.from_checkpoint.load_transformer", None)  # no export loads the base
    monkeypatch.setattr("ztrain.compare.studio.load_transformer", lambda *_: bases.pop())  # all columns, drift
    found = compare_checkpoints(config, run)
    assert [c.label for c in found.columns] == ["no image", "splice", "step 2", "step 4"]
    exported = compare(settings(data, tmp_path / "out", "--compare.num_samples", "3", "--compare.adapters", str(run)))
    assert exported.pictures[2] == found.pictures[3], "the last checkpoint is what was exported"
    marked = json.loads((run / "best.json").read_text())
    assert found.best.column is not None
    assert marked["step"] == found.columns[found.best.column].step and list(marked["steps"]) == ["2", "4"]
    with pytest.raises(InputError, match="no checkpoints there"):
        compare_checkpoints(config, tmp_path)
    # Other rows and settings marked it, so the run goes on without their figures; a damaged file ends nothing.
    assert read_best(run / "best.json", marked["by"]) and not read_best(run / "best.json", best["by"])
    (run / "best.json").write_text("[]")
    assert read_best(run / "best.json", best["by"]) == {}


def test_scores_while_training_need_a_judge(data: Path, tmp_path: Path) -> None:
    words = ("--output_dir", str(tmp_path / "run"), "--validation.score_steps", "1", "--judges.truth", "None")
    with pytest.raises(InputError, match="needs someone who judges"):
        train(settings(data, tmp_path, *words, experiment="lora"))


# What is wrong


def test_what_cannot_be_compared_is_refused_in_one_sentence(data: Path, tmp_path: Path) -> None:
    projector = str(ADAPTERS / "projector")
    presets = {"empty": {"seed": 7}, "plain": {"adapters": []}, "sized": {"adapters": [{"kind": "splice"}],
               "sample": {"height": 96}}}  # fmt: skip
    for name, document in presets.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document))
    for words, complaint in (
        (("--compare.adapters", str(data)), "is no exported adapter"),
        (("--compare.adapters", projector, f"{projector}/../projector"), "twice"),
        (("--compare.adapters", projector, "--sample.scales", "1.0", "0.5"), "sample.scales has 2 numbers for the 1"),
        (("--compare.num_samples", "1", "--compare.shuffled"), "none can be exchanged"),
        (("--judges.truth", str(tmp_path)), "has no judges"),
        (("--compare.presets", str(tmp_path / "empty.yaml")), "seed has no place in it"),
        (("--compare.presets", str(tmp_path / "plain.yaml")), "read no reference"),
        (("--compare.presets", str(tmp_path / "sized.yaml"), "--sample.aspect", "1:1"), "decides height and width"),
    ):
        with pytest.raises(InputError, match=complaint):
            compare(settings(data, tmp_path / "out", *words))
        assert not list((tmp_path / "out").rglob("pictures/*.png")), "drawn before it was looked at"
    absent = JudgesConfig(siglip=ModelConfig(pretrained_model_name_or_path=str(tmp_path / "none")))
    with pytest.raises(InputError, match="give a folder or a Hub id"):
        compare(settings(data, tmp_path / "out").model_copy(update={"judges": absent}))
    assert not list((tmp_path / "out").rglob("pictures/*.png")), "drawn before it was looked at"
    with pytest.raises(InputError, match="sample.scales: Input should be a valid number"):  # not a number is none
        compare(settings(data, tmp_path / "out", "--sample.scales", "nan"))
    with pytest.raises(InputError, match="differ in size"):
        compare(settings(data, tmp_path / "sizes", "--sample.height", "96"))


def test_presets_of_one_name_are_told_apart_and_lists_of_scales_go_where_they_fit(data: Path, tmp_path: Path) -> None:
    for name, tokens in (("a", "text"), ("b", "all")):
        (tmp_path / name).mkdir()
        adapters = [{"kind": "splice", "tokens": tokens}]
        (tmp_path / name / "best_splice.yaml").write_text(yaml.safe_dump({"adapters": adapters}))
    config = settings(
        data, tmp_path, "--compare.presets", str(tmp_path / "a/best_splice.yaml"), str(tmp_path / "b/best_splice.yaml"),
        "--compare.adapters", str(ADAPTERS / "siglip_lora"), "--sample.scales", "1.0", "0.5",
    )  # fmt: skip
    found = {entry.label: entry.sample.scales for entry in entries_of(config)}
    assert found == {"no image": 1.0, "splice": 1.0, "best splice a": 1.0, "best splice b": 1.0,
                     "[siglip, lora]": [1.0, 0.5]}  # fmt: skip


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a comparison by name; of its record all but how long it took."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return found | {FILE_NAME: re.sub(rb'"seconds": [\d.]+', b"", found[FILE_NAME])}


@pytest.mark.parametrize("verb", ["compare", "sweep"])
def test_cut_off_anywhere_and_run_again_it_is_the_undisturbed_one(
    data: Path, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at a random picture in the middle of a batch, met by a full disk, damaged afterwards."""

    def run(out: Path) -> None:
        config = settings(data, out, "--compare.num_samples", "4", "--sample.batch_size", "3")
        axes = config.sweep.model_copy(update={"axes": {"splice.tokens": ["text"]}, "output_dir": str(out)})
        if verb == "sweep":
            sweep(config.model_copy(update={"sweep": axes}))
        else:
            compare(config)

    run(out := tmp_path / "out")
    whole, draw = everything(out), random.Random(verb)
    shutil.rmtree(out)
    names = [name for name in whole if name.startswith("pictures/")]
    left = draw.randint(2, len(names) // 2)

    def save(image: Image.Image, path: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        save_picture(image, path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ztrain.compare.studio.save_picture", save)
        run(out)
    sizes = {name: len(whole[name]) for name in names if not (out / name).exists()}
    with (
        full_disk(max(sizes.values()) - 1),
        pytest.raises(InputError, match="the disk .* is full") as told,
    ):
        run(out)
    assert str(told.value).startswith(str(out / "pictures")) and not list(out.rglob(".writing-*"))
    kept = sorted(name for name in names if (out / name).exists())
    assert 1 < len(kept) < len(names) and all((out / name).read_bytes() == whole[name] for name in kept)
    # What cannot be read is made again, which is said.
    given = next(name for name in whole if name.startswith("given/"))
    for name in (kept[0], given):
        (out / name).write_bytes(whole[name][: len(whole[name]) // 2])
    (out / kept[1]).unlink()
    os.mkfifo(out / kept[1])
    capsys.readouterr()
    run(out)
    assert everything(out) == whole
    said = capsys.readouterr().out
    assert f"given: 1 picture cannot be read, so made again; the first is {Path(given).name}" in said
    assert "pictures: 2 pictures cannot be read, so made again; the first is " in said


def test_cells_that_start_at_the_reference_are_chosen_among_each_other_only(data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path, "--compare.num_samples", "3")
    for values, expected in (([0.3, 1.0], {1.0}), ([0.3, 0.5], {1.0})):  # the splice itself starts from noise
        axes = config.sweep.model_copy(update={"axes": {"sample.strength": values}, "output_dir": str(tmp_path)})
        found = sweep(config.model_copy(update={"sweep": axes}))
        assert found.best.column is not None
        assert found.columns[found.best.column].sampling["strength"] in expected


def test_a_damaged_record_is_refused(compared: tuple[Path, Comparison], tmp_path: Path) -> None:
    out, found = compared
    text = (out / FILE_NAME).read_text()
    file = tmp_path / FILE_NAME
    document = json.loads(text)
    for change, complaint in (
        (lambda d: d.update(format_version=2), "format_version"),
        (lambda d: d["pictures"].pop(), "columns x rows x seeds"),
        (lambda d: d["metrics"][0]["means"].pop(), "one mean and difference for each column"),
        (lambda d: d.update(baseline=99), "out of range"),
        (lambda d: d.update(style="beauty"), "no metric"),
        (lambda d: d["pictures"][0][0].__setitem__(0, "../../etc/passwd"), "outside of its folder"),
    ):
        damaged = json.loads(json.dumps(document))
        change(damaged)
        file.write_text(json.dumps(damaged))
        with pytest.raises(InputError, match=complaint):
            read_comparison(tmp_path)
    file.write_text(text[:-10])
    with pytest.raises(InputError, match=FILE_NAME):
        read_comparison(tmp_path)
