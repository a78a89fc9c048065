"""What a run and all that follows it write: no token, no password, no path of this machine, in no byte of it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.test_report import page_of
from tests.triplets import ROOT, model_words, write_triplets
from ztrain.cli import main

TOKEN, KEY, PASSWORD = "hf_CANARYabcdefghijklmnopqrstuvwxyz01", "0123456789abcdef" * 2 + "01234567", "canary-pass"
NOTES = f"from ~/canary-home/x and /srv/canary-home/x, with {TOKEN}, {KEY}, https://me:{PASSWORD}@host/y"
READ_BACK = re.compile(r"(config\.yaml|state\.json)$")
"""Files that keep paths as they were typed, because the settings are read from them again."""


def written(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_written_names_a_secret_or_a_path(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    home, out = tmp_path / "canary home\udcff", tmp_path / "out"  # a space ends no path; a byte is no UTF-8
    home.mkdir()
    for name, value in {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY, "HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    data = write_triplets(home / "data", count=3)
    (home / "looks").mkdir()
    (home / "looks/a.png").write_bytes((data / "train/ref-0-0.png").read_bytes())
    (home / "prompts.txt").write_text("a boat\n")
    (home / "preset.yaml").write_text(yaml.safe_dump({"adapters": [{"kind": "splice", "tokens": "text"}]}))
    words = [
        "--config", "configs/projector.yaml", "configs/tiny.yaml", *model_words(family),
        "--data.train_data_dir", f"{data}/../data", "--cache.dir", str(out / "cache"), "--output_dir", str(out / "run"),
        "--compare.output_dir", str(out / "set\udcff"), "--tracking.notes", NOTES, "--train.max_train_steps", "1",
        "--validation.num_previews", "1", "--validation.num_samples", "2", "--sample.num_inference_steps", "1",
    ]  # fmt: skip
    assert main(["cache", *words]) == 0
    assert main(["train", *words]) == 0
    last = str(out / "run/checkpoints/step-00000001")
    assert main(["export", *words, "--checkpoint", last, "--out", str(out / "ex")]) == 0
    lists = ("--compare.adapters", str(out / "run"), "--compare.presets", str(home / "preset.yaml"))
    assert main(["compare", *words, *lists, "--compare.num_samples", "2"]) == 0
    crossed = ("--compare.prompts", str(home / "prompts.txt"), "--compare.references", str(home / "looks"))
    assert main(["compare", *words, *crossed, "--compare.output_dir", str(out / "crossed\udcff")]) == 0
    for place in ("run", "set\udcff"):
        assert main(["report", str(out / place), "--blind"]) == 0
        assert main(["report", str(out / place)]) == 0
    drawn = ("--adapter", str(out / "ex"), "--reference", str(home / "looks/a.png"), "--num-images", "2")
    assert main(["sample", *words, "--prompt", "a boat", *drawn, "--out", str(out / "drawn\udcff")]) == 0

    found = written(out)
    for name in ("ex/README.md", "run/export/README.md", "set\udcff/report.html", "drawn\udcff/sheet.png"):
        assert name in found, name
    for secret in (TOKEN, KEY, PASSWORD):
        assert [name for name, content in found.items() if secret.encode() in content] == [], secret
    for path in (str(tmp_path), "canary home", "canary-home", str(ROOT)):
        named = [name for name, content in found.items() if path.encode() in content and not READ_BACK.search(name)]
        assert named == [], path
    settings = yaml.safe_load(found["run/config.yaml"])
    assert settings["data"]["train_data_dir"] == "~/data/../data" and settings["tracking"]["notes"].count("***") == 3
    rows = json.loads(found["set\udcff/comparison.json"])["rows"]
    assert all(row["where"].startswith("validation/metadata.jsonl:") for row in rows), rows
    assert page_of(out / "run", out / "page.html").payload["title"] == "run"
    said = capsys.readouterr()
    assert not [secret for secret in (TOKEN, KEY, PASSWORD) if secret in said.out + said.err]
