"""A whole build: the same bytes however often it was killed, and on Ray; from files and tars, into every layout."""

import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
from PIL import Image

from data_tools import build, label, pack, pair, scan, split
from tests.forge import the_forge
from tests.test_build import ROOT, digests
from tests.triplets import picture
from ztrain.data.reading import read_triplets
from ztrain.io.yamls import dump_yaml

CONFIG = {
    "sources": ["in"],
    "filter": {"min_sharpness": 0.5},
    "label": {"styles": {}},
    "split": {"shares": {"train": 0.8, "validation": 0.2}},
    "pair": {"triplets_per_target": 2, "self_share": 0.1},
}


def paint(folder: Path, count: int) -> None:
    """Three styles of `count` pictures with captions, in which there are a copy and a broken file."""
    for style in range(3):
        (folder / f"in/style{style}").mkdir(parents=True)
        for number in range(count):
            path = folder / f"in/style{style}/{number:03d}.png"
            picture(1000 * style + number, 96, 96).save(path)
            path.with_suffix(".txt").write_text(f"blocks {number}")
    copy = Image.open(folder / "in/style0/000.png").resize((80, 80))
    copy.save(folder / "in/style0/001.png")
    (folder / "in/style1/002.png").write_bytes(b"no picture")
    (folder / "LICENSES.md").write_text("by nobody")
    (folder / "build.yaml").write_text(dump_yaml(CONFIG))


def words(folder: Path, out: Path, *more: object) -> list[str]:
    given = ["--config", folder / "build.yaml", "--out", out, "--rows-per-shard", 8, *more]
    return list(map(str, given))


def command(folder: Path, out: Path, *more: object) -> list[str]:
    return [sys.executable, "-m", "data_tools.build", *words(folder, out, *more)]


@pytest.mark.usefixtures("forge")
def test_killed_at_random_moments_it_gives_the_bytes_of_an_undisturbed_build(tmp_path: Path) -> None:
    paint(tmp_path, 40)
    environment = dict(os.environ)
    the_forge().run(["-c", ""], environment)  # its own start is no part of the time
    started = time.monotonic()
    whole = ["data_tools.build", *words(tmp_path, tmp_path / "whole", "--workers", 1)]
    assert the_forge().run(whole, environment).returncode == 0
    seconds, chance, out = time.monotonic() - started, random.Random(1), tmp_path / "killed"
    stages = set()
    for _ in range(4):
        begun = ["data_tools.build", *words(tmp_path, out, "--workers", 1)]
        process = the_forge().start(begun, environment, tmp_path / "said", tmp_path / "said")
        time.sleep(seconds * (0.3 + 0.5 * chance.random()))
        process.kill()
        process.wait()
        stages.add(len(list((tmp_path / "killed.work").glob("*/table.json"))))
        if out.exists():
            shutil.rmtree(out)  # it was too fast: what the steps have made stays
    # In a process of the ordinary kind, with hashes of its own.
    subprocess.run(command(tmp_path, out, "--workers", 1), cwd=ROOT, check=True, capture_output=True)
    assert digests(out) == digests(tmp_path / "whole")
    assert digests(tmp_path / "killed.work") == digests(tmp_path / "whole.work")
    assert not list(tmp_path.glob(".writing-*")) and not list((tmp_path / "killed.work").rglob(".writing-*"))
    print(f"tables that were finished when it was killed: {sorted(stages)}")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install 'ztrain[ray]')")
@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    paint(tmp_path, 30)
    for engine in ("local", "ray"):
        subprocess.run(command(tmp_path, tmp_path / engine, "--engine", engine, "--workers", 2), cwd=ROOT, check=True)
    assert digests(tmp_path / "local") == digests(tmp_path / "ray")


def test_each_step_alone_makes_the_tables_of_the_build_and_every_layout_the_same_triplets(tmp_path: Path) -> None:
    paint(tmp_path, 20)
    assert build.main(words(tmp_path, tmp_path / "out", "--workers", 2)) == 0
    work = tmp_path / "out.work"
    for number, (step, before) in enumerate(((label, "dedup"), (split, "label"), (pair, "split"))):
        name = step.__name__.rpartition(".")[2]
        source = work / before if number == 0 else tmp_path / before
        given = ["--config", tmp_path / "build.yaml", "--table", source, "--out", tmp_path / name]
        assert step.main([str(each) for each in given]) == 0
        assert [path.name for path in sorted((tmp_path / name).glob("*.parquet"))] == [
            path.name for path in sorted((work / name).glob("*.parquet"))
        ]
    for form in ("imagefolder", "webdataset", "parquet"):
        given = ["--data", tmp_path / "pair", "--out", tmp_path / form, "--format", form]
        assert pack.main([str(each) for each in given]) == 0
        check_manifest(tmp_path / form)
    for name in ("train", "validation"):
        folders = [read_triplets(str(tmp_path / place), name).triplets for place in
                   ("out", "imagefolder", "webdataset", "parquet")]  # fmt: skip
        told = [[(row.prompt, row.columns, row.target.read(), [each.read() for each in row.references]) for row in rows]
                for rows in folders]  # fmt: skip
        assert told[0] == told[1] == told[2] == told[3] and len(told[0]) > 10
    loaded = datasets.load_dataset(str(tmp_path / "imagefolder"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in loaded.items()} == {
        name: len(read_triplets(str(tmp_path / "out"), name).triplets) for name in ("train", "validation")
    }


def check_manifest(folder: Path) -> None:
    """Hashes, counts and licences are those of what lies there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    sums = (folder / "SHA256SUMS").read_bytes()
    assert hashlib.sha256(sums).hexdigest() == manifest["sha256"]
    listed = dict(reversed(line.split("  ", 1)) for line in sums.decode().splitlines())
    assert listed == {name: digest for name, digest in digests(folder).items()
                      if name not in ("SHA256SUMS", "manifest.json")}  # fmt: skip
    assert len(listed) == manifest["files"] and manifest["licences"] == ["LICENSES.md"]
    assert manifest["counts"]["pictures"] == 60 and manifest["counts"]["pictures_refused"] == 1
    assert manifest["counts"]["copies_left_out"] == 1
    assert {name: len(read_triplets(str(folder), name).triplets) for name in ("train", "validation")} == manifest[
        "triplets"
    ]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n") and "[LICENSES.md](LICENSES.md)" in card and "| style0 |" in card


def test_pictures_of_tars_and_several_places(tmp_path: Path) -> None:
    """Style folders in a tar, with members that would lie outside, and one in a plain folder."""
    paint(tmp_path, 8)
    with tarfile.open(tmp_path / "pack.tar", "w") as tar:
        for path in sorted((tmp_path / "in/style1").iterdir()):
            tar.add(path, f"../evil/{path.name}")
        for path in sorted((tmp_path / "in/style2").iterdir()):
            tar.add(path, f"style2/{path.name}")
    shutil.rmtree(tmp_path / "in/style1")
    shutil.rmtree(tmp_path / "in/style2")
    config = {
        **CONFIG,
        "sources": ["in", "pack.tar"],
        "split": {"shares": {"train": 1, "validation": 1}},
        "pair": {"triplets_per_target": 1},
        "max_refused_share": 0.1,
    }
    (tmp_path / "build.yaml").write_text(dump_yaml(config))
    before = {path for path in tmp_path.parent.rglob("*") if tmp_path not in path.parents}
    assert build.main(words(tmp_path, tmp_path / "out", "--workers", 1)) == 0
    assert {path for path in tmp_path.parent.rglob("*") if tmp_path not in path.parents} == before
    found = [row for name in ("train", "validation") for row in read_triplets(str(tmp_path / "out"), name).triplets]
    styles = Counter(row.columns["style"] for row in found)
    assert styles == {"style0": 7, "pack.tar/../evil": 7, "pack.tar/style2": 8}  # less a copy, less a broken one
    assert {len(each.read()) > 100 for row in found for each in (row.target, *row.references)} == {True}


def test_a_step_that_reads_something_else_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(tmp_path, 8)
    assert scan.main(["--sources", str(tmp_path / "in"), "--out", str(tmp_path / "scan")]) == 0
    for step in (split, pair):
        given = ["--config", tmp_path / "build.yaml", "--table", tmp_path / "scan", "--out", tmp_path / "out"]
        assert step.main([str(each) for each in given]) == 2
        assert "has no column" in capsys.readouterr().err
    assert pack.main(["--data", str(tmp_path / "scan"), "--out", str(tmp_path / "out")]) == 2
    assert "has no column" in capsys.readouterr().err
