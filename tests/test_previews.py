"""Sets of preview pictures: each is of one life of a run with one group of settings, whatever cut the drawing short."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.triplets import tiny_config, write_triplets
from ztrain.adapters.splice import SpliceConfig
from ztrain.cache.loader import Loader
from ztrain.cache.order import SampleKey
from ztrain.compare.report.runs import read_run
from ztrain.config import Config, SampleConfig
from ztrain.data.digests import digest_json
from ztrain.images import open_image
from ztrain.train.run import Run, build
from ztrain.train.scoring import Scoring
from ztrain.train.validate import Previews

_GUIDED = {"num_inference_steps": 1, "guidance_scale": 4.0, "negative": "reference"}
_QUIET = {"validation_steps": 0, "preview_steps": 1, "num_previews": 2}


def settings(family: Path, folder: Path, negative_prompt: str) -> Config:
    config = tiny_config(family, folder / "data", folder / "cache", name="projector")
    changed = {
        "output_dir": str(folder / "run"),
        "validation": config.validation.model_copy(update=_QUIET),
        # Read from the cache as well: the negative prompt alone, and in one sequence with the splice's image.
        "sample": config.sample.model_copy(update={"negative_prompt": negative_prompt, **_GUIDED}),
        "compare": config.compare.model_copy(
            update={"splice": SpliceConfig(states="fused", compose="replace", tokens="all")}
        ),
        "train": config.train.model_copy(update={"compile": "off"}),
    }
    return config.model_copy(update=changed)


def begin(config: Config) -> Run:
    return build(config, Accelerator(cpu=True), None)


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_columns_of_other_settings_are_never_mixed(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_triplets(tmp_path / "data", count=3)
    samples = tmp_path / "run/samples"
    ours, theirs = (settings(family, tmp_path, negative) for negative in ("blurred", "two moons"))
    run = begin(ours)
    assert run.previews is not None
    run.previews.grid(run.model, 0)
    first = pictures(samples / "base")
    assert sorted(first) == [
        "key.json", *(f"{name}-{i}.png" for name in ("no_image", "reference", "splice", "target") for i in range(2))
    ]  # fmt: skip
    # Killed when the columns of other settings are drawn, and gone on with the first: nothing of the others is there.
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        opened = 0

        def cut(picture: object) -> object:
            nonlocal opened
            opened += 1
            if opened > 1:
                raise KeyboardInterrupt
            return open_image(picture)  # type: ignore[arg-type]

        patched.setattr("ztrain.train.validate.open_image", cut)
        begin(theirs)
    begin(ours)
    assert pictures(samples / "base") == first
    assert not list(samples.glob(".writing-*"))
    # A picture that was cut by an older version, or by the disk.
    capsys.readouterr()
    (samples / "base/splice-1.png").write_bytes(first["splice-1.png"][:100])
    begin(ours)
    assert pictures(samples / "base") == first
    assert "samples/base: 1 picture cannot be read, so made again; the first is splice-1.png" in capsys.readouterr().out
    # A report shows a step beside a base of other settings as little.
    for name, text in (("config.yaml", "{}"), ("env.json", "{}"), ("metrics.jsonl", "")):
        (tmp_path / "run" / name).write_text(text)
    assert read_run(tmp_path / "run").steps == [0]
    begin(theirs)
    others = pictures(samples / "base")
    changed = {name for name in first if others[name] != first[name]}
    assert others.keys() == first.keys()
    assert changed == {"key.json", *(f"{name}-{i}.png" for name in ("no_image", "splice") for i in range(2))}
    found = read_run(tmp_path / "run")
    assert found.steps == [] and "step-00000000: drawn for other rows or with other settings" in str(found.warnings)
    of_step, of_base = (
        json.loads(text) for text in ((samples / "step-00000000/key.json").read_text(), first["key.json"])
    )
    assert of_base.pop("splice") and of_step == of_base
    told = _GUIDED | {"negative_prompt": "blurred"}
    assert {name: of_step["sampling"][name] for name in told} == told
    # Training's dropout leaves the empty prompt.
    trained = Loader(run.config, run.cache, run.samples.trained, []).read([SampleKey(0, 0, 0)])
    assert torch.equal(trained.encoded.null_text, run.cache.states().text(""))


def test_the_best_step_is_forgotten_where_pictures_change_and_only_there(family: Path, tmp_path: Path) -> None:
    """best.json's figures are of one way to sample; its digest is as ever where keys that came later change nothing."""
    config = settings(family, tmp_path, "")

    def by(**sample: object) -> str:
        changed = config.model_copy(update={"sample": SampleConfig.model_validate(sample)})
        accelerator = Accelerator(cpu=True)
        previews = Previews(changed, None, [], accelerator, tmp_path, None, None)  # type: ignore[arg-type]
        return Scoring(changed, previews, accelerator, None)._by

    old = SampleConfig().model_dump(mode="json", exclude={"negative", "negative_prompt", "shift"})
    parts = (config.judges.model_dump(mode="json"), old, config.compare.model_dump(mode="json"))
    assert by() == by(negative="base") == digest_json([[], *parts])
    changes = [{"shift": 2.0}, {"reference_window": (0.0, 0.5)}, {"guidance_scale": 1.0}]
    changes += [{"guidance_scale": 1.0, "negative": "base"}, {"guidance_scale": 1.0, "negative_prompt": "blurred"}]
    found = [by(**change) for change in changes]
    assert len({by(), *found}) == len(changes) + 1
    for change, each in zip(changes[1:3], found[1:3], strict=True):
        told = SampleConfig.model_validate(change).model_dump(mode="json", include=set(old))
        assert each != digest_json([[], parts[0], told, parts[2]]), "the digest of before, of other pictures"
