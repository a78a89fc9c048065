"""data_tools.filter and data_tools.dedup on tables of real and painted pictures; order and engines change nothing."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from data_tools import dedup, embed, filter, likeness, scan
from data_tools.stages import Table, attach
from miniature.style_folders import paint_style_folders
from miniature.trials import WEIGHTS
from tests.test_main_path import ROOT, shell
from tests.test_scan import PHOTOS, needs_photos, paint


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in Table.open(folder).read().to_pylist()}


def run(stage: Any, *words: object, status: int = 0) -> None:
    assert stage.main([str(word) for word in words]) == status


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs, copies of them, and the awkward files."""
    folder = tmp_path_factory.mktemp("dedup")
    (folder / "in").mkdir()
    for name in ("coffee", "chelsea", "rocket"):
        with Image.open(PHOTOS / f"{name}.jpg") as image:
            image.save(folder / "in" / f"{name}.png")
            width, height = image.size
            image.resize((width * 2 // 3, height * 2 // 3)).save(folder / "in" / f"{name}_small.jpg", quality=60)
            ImageEnhance.Brightness(image).enhance(1.1).save(folder / "in" / f"{name}_bright.webp")
            ImageOps.mirror(image).save(folder / "in" / f"{name}_mirrored.jpg", quality=95)
        shutil.copyfile(folder / "in" / f"{name}.png", folder / "in" / f"{name}_again.png")
    shutil.copytree(PHOTOS / "awkward", folder / "in/awkward")
    run(scan, "--sources", folder / "in", "--out", folder / "scan", "--rows-per-shard", 9, "--max-refused-share", 1,
        "--workers", 1)  # fmt: skip
    return folder


@needs_photos
def test_filter_says_which_limit_and_changes_nothing_without_one(scanned: Path) -> None:
    run(filter, "--table", scanned / "scan", "--out", scanned / "all", "--workers", 1)
    before, same = rows_of(scanned / "scan"), rows_of(scanned / "all")
    assert before == same
    words = ("--min-sharpness", 1, "--min-entropy", 1, "--min-pixels", 20_000, "--max-border-share", 0.9)
    run(filter, "--table", scanned / "scan", "--out", scanned / "few", "--workers", 1, *words)
    after = rows_of(scanned / "few")
    changed = {name: row["refused"] for name, row in after.items() if row["refused"] != before[name]["refused"]}
    assert changed["awkward/blank_white.png"] == "sharpness 0 is below min_sharpness 1"
    assert all(before[name]["refused"] is None for name in changed) and "coffee.png" not in changed
    assert {name for name, row in after.items() if row["width"] and row["width"] * row["height"] < 20_000} <= {
        name for name, row in after.items() if row["refused"]
    }


@needs_photos
@pytest.mark.parametrize("mirrored", [False, True])
def test_copies_have_one_representative_by_rule(scanned: Path, mirrored: bool) -> None:
    out = scanned / f"dedup_{mirrored}"
    run(dedup, "--table", scanned / "scan", "--out", out, *(["--mirrored"] if mirrored else []))
    rows, before = rows_of(out), rows_of(scanned / "scan")
    assert {name: {k: row[k] for k in before[name]} for name, row in rows.items()} == before
    assert all((row["cluster"] is None) == (row["refused"] is not None) for row in rows.values())
    copies = {name: (row["copy_of"], row["copy_by"]) for name, row in rows.items() if row["copy_of"]}
    # Equal pixels: the larger file stands for both, and of equal files the first name.
    assert copies["coffee_again.png"] == ("in/coffee.png", "bytes") and "coffee.png" not in copies
    assert copies["awkward/dup_b.jpg"] == ("in/awkward/dup_a.jpg", "bytes")
    largest = max(("awkward/dup_pixels_a.png", "awkward/dup_pixels_b.png"), key=lambda name: rows[name]["bytes"])
    other = "awkward/dup_pixels_b.png" if largest.endswith("a.png") else "awkward/dup_pixels_a.png"
    assert copies[other] == (f"in/{largest}", "pixels")
    for name in ("coffee", "chelsea", "rocket"):
        for copy in (f"{name}_small.jpg", f"{name}_bright.webp"):
            assert copies[copy] == (f"in/{name}.png", "likeness") and rows[copy]["copy_score"] > 0.5
        assert (rows[f"{name}_mirrored.jpg"]["cluster"] == f"in/{name}.png") is mirrored
    assert rows["awkward/near_b.jpg"]["cluster"] == rows["awkward/near_a.jpg"]["cluster"]
    assert (rows["awkward/near_mirrored.jpg"]["cluster"] == rows["awkward/near_a.jpg"]["cluster"]) is mirrored
    for row in rows.values():
        if row["copy_of"]:
            first = rows[row["copy_of"].removeprefix("in/")]
            assert first["cluster"] == row["cluster"] and first["copy_of"] is None
            assert first["width"] * first["height"] >= row["width"] * row["height"]
    assert rows["coffee.png"]["cluster"] != rows["chelsea.png"]["cluster"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from("abc")] * 3), min_size=1, max_size=14))
def test_within_folders_copies_are_found_as_if_each_were_alone(given_rows: list[tuple[str, str, str]]) -> None:
    """(folder, looks, pixels): of one folder those are one that share either, over any number of others."""
    prints = {letter: np.random.default_rng(ord(letter)).bytes(likeness.BYTES) for letter in "abc"}
    rows = [
        {"source": "in", "name": f"{folder}/{number}.png", "digest": str(number), "pixels": pixels, "width": 9,
         "height": 9, "bytes": 9, "caption": None, "likeness": prints[looks]}
        for number, (folder, looks, pixels) in enumerate(given_rows)
    ]  # fmt: skip
    keys = [row["name"] for row in rows]
    first, everywhere = dedup._within_folders(rows, keys, False), dedup._representatives(rows, keys, False)
    graph = nx.Graph()
    for number, (folder, looks, pixels) in enumerate(given_rows):
        graph.add_edges_from([(number, (folder, "looks", looks)), (number, (folder, "pixels", pixels))])
    pieces = [{node for node in piece if isinstance(node, int)} for piece in nx.connected_components(graph)]
    assert all(len({int(first[number]) for number in piece}) == 1 for piece in pieces)
    assert len(set(first.tolist())) == len(pieces) and (first[first] == first).all()
    kept = sorted(set(first.tolist()))
    told = dedup._alike(rows, first, everywhere)
    assert told[dedup.EQUAL_KEPT] == len(kept) - len({given_rows[number][2] for number in kept})
    assert sum(told.values()) == len(kept) - len(set(everywhere.tolist())) and min(told.values()) >= 0


@needs_photos
def test_embeddings_give_meaning(scanned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Table.open(scanned / "scan")
    rows = source.read(["name", "refused"]).to_pylist()
    chance = np.random.default_rng(0)
    centres = chance.normal(size=(len(rows), 32))
    told = [row["name"].partition("_")[0] for row in rows]
    vectors = np.stack([centres[told.index(name)] + 0.02 * chance.normal(size=32) for name in told])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    column = pa.array([None if row["refused"] else v.astype(np.float32) for row, v in zip(rows, vectors, strict=True)],
                      pa.list_(pa.float32()))  # fmt: skip
    attach(source, scanned / "embedded", pa.table({"siglip": column}), name="test", about=0)
    words = ("--table", scanned / "embedded", "--out", scanned / "meaning", "--embedding-column", "siglip")
    run(dedup, *words)
    meaning = {name: row["meaning"] for name, row in rows_of(scanned / "meaning").items() if row["refused"] is None}
    groups = {name.partition("_")[0] for name in meaning}
    assert len(set(meaning.values())) == len(groups)
    assert all(len({m for n, m in meaning.items() if n.partition("_")[0] == group}) == 1 for group in groups)
    run(dedup, "--table", scanned / "scan", "--out", scanned / "none", "--embedding-column", "siglip", status=2)
    assert "has no column siglip; run the stage" in capsys.readouterr().err


@pytest.mark.timeout(200)
def test_the_miniatures_tower_puts_equal_drawings_together(tmp_path: Path) -> None:
    """Painted drawings of one content and style beside others: what the tower finds alike are clusters."""
    paint_style_folders(tmp_path / "in", size=64, num_contents=6)
    for path in sorted((tmp_path / "in/images").glob("*/*.png"))[::3]:
        with Image.open(path) as image:
            ImageEnhance.Contrast(image.convert("RGB")).enhance(1.05).save(path.with_stem(f"{path.stem}_again"))
    run(scan, "--sources", tmp_path / "in/images", "--out", tmp_path / "scan", "--workers", 1)
    tower = WEIGHTS / "siglip2-so400m-patch16-naflex"
    run(embed, "--table", tmp_path / "scan", "--out", tmp_path / "embed", "--model", tower)
    rows = Table.open(tmp_path / "embed").read().to_pylist()
    vectors = np.array([row["embedding"] for row in rows], np.float32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    words = ("--embedding-column", "embedding", "--min-similarity", 0.995)
    run(dedup, "--table", tmp_path / "embed", "--out", tmp_path / "dedup", *words)
    meaning = {name: row["meaning"] for name, row in rows_of(tmp_path / "dedup").items()}
    again = [name for name in meaning if "_again" in name]
    together = [meaning[name] == meaning[name.replace("_again", "")] for name in again]
    assert len(again) >= 8 and np.mean(together) >= 0.9
    assert len(set(meaning.values())) > 0.5 * (len(meaning) - len(again)), "nearly all drawings are one"


def test_a_table_that_is_not_there_or_damaged_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(dedup, "--table", tmp_path / "none", "--out", tmp_path / "out", status=2)
    assert "holds no finished table" in capsys.readouterr().err
    (tmp_path / "table.json").write_text(json.dumps({"shards": ["a"], "sources": {}, "facts": {}}))
    run(filter, "--table", tmp_path, "--out", tmp_path / "out", status=2)
    assert "a.parquet: is missing" in capsys.readouterr().err
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    run(dedup, "--table", tmp_path, "--out", tmp_path / "out", status=2)
    assert "a.parquet: damaged" in capsys.readouterr().err


def tiny_clip(folder: Path) -> Path:
    """Both towers of a CLIP of random weights, with a vocabulary of a few words."""
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "vocab_size": 8, "max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    words = {
        word: number for number, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "a", "blurry", "photo", "cat", "?"])
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A [EOS]", special_tokens=[("[EOS]", 2)])
    named = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "?"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessorPil(**sizes).save_pretrained(folder)
    return folder


def test_a_text_gives_scores_and_filter_goes_by_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(tmp_path / "in", 12)
    model = tiny_clip(tmp_path / "clip")
    run(scan, "--sources", tmp_path / "in", "--out", tmp_path / "scan", "--workers", 1)
    embeds = ("--table", tmp_path / "scan", "--model", model, "--batch-size", 5)
    run(embed, *embeds, "--out", tmp_path / "vectors")
    run(embed, *embeds, "--out", tmp_path / "scores", "--column", "blurry", "--text", "a blurry photo")
    rows = Table.open(tmp_path / "scores").read().to_pylist()
    clip = transformers.CLIPModel.from_pretrained(model).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(model)(["a blurry photo"], return_tensors="pt")
    processor = transformers.CLIPImageProcessorPil.from_pretrained(model)
    with torch.no_grad():  # as the model itself scores, without any of ours
        for row in rows:
            pixels = processor(images=Image.open(tmp_path / "in" / row["name"]).convert("RGB"), return_tensors="pt")
            found = clip(**tokens, **pixels)
            truth = (found.logits_per_image / clip.logit_scale.exp()).item()
            assert row["blurry"] == pytest.approx(truth, abs=1e-5)
    vectors = [row["embedding"] for row in Table.open(tmp_path / "vectors").read().to_pylist()]
    assert len(vectors[0]) == 8 and np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-2)
    limit = sorted(row["blurry"] for row in rows)[5]
    limits = ("--table", tmp_path / "scores", "--max-scores", "blurry", limit + 1e-7)
    run(filter, *limits, "--out", tmp_path / "few", "--workers", 1)
    left = Table.open(tmp_path / "few").read().to_pylist()
    assert sum(row["refused"] is None for row in left) == 6
    assert {row["refused_by"] for row in left} == {None, "filter"}
    words = ("--table", tmp_path / "scan", "--max-scores", "blurry", 1, "--out", tmp_path / "x", "--workers", 1)
    run(filter, *words, status=2)
    assert "has no number 'blurry'" in capsys.readouterr().err


@needs_photos
@pytest.mark.usefixtures("forge")
def test_the_commands_of_the_page_run_as_written(tmp_path: Path) -> None:
    section = (ROOT / "docs/data.md").read_text(encoding="utf-8").split("## Look at your pictures first")[1]
    block = section.split("```bash\n")[1].split("```")[0]
    (tmp_path / "project/photos").mkdir(parents=True)
    for path in PHOTOS.glob("*.jpg"):
        shutil.copyfile(path, tmp_path / "project/photos" / path.name)
    paint(tmp_path / "drawings", 5)
    with tarfile.open(tmp_path / "project/drawings.tar", "w") as tar:
        for path in sorted((tmp_path / "drawings").iterdir()):
            tar.add(path, path.name)
    said = shell(tmp_path, block).stdout.splitlines()
    assert said[0] == "work/scan: 34 pictures, 0 refused; captions given: 2" and said[1].endswith(
        "of 34 pictures are left"
    )
    rows = Table.open(tmp_path / "project/work/dedup").read().to_pylist()
    assert {row["source"] for row in rows} == {"photos", "drawings.tar"}
    assert [row["caption"] for row in rows if row["caption"]] == ["picture\n0", "picture\n3"]
    assert not any(str(tmp_path) in json.dumps(row, default=str) for row in rows)


def test_nothing_that_is_there_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the table that is read, not somebody's own Parquet files; and changed pictures are not taken for scanned."""
    paint(tmp_path / "in", 3)
    mine = tmp_path / "scan" / "mine.parquet"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    run(scan, "--sources", tmp_path / "in", "--out", tmp_path / "scan", "--workers", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "scan").iterdir() if path.is_file()}
    assert before[mine] == b"mine"
    for stage in (filter, dedup):
        run(stage, "--table", tmp_path / "scan", "--out", tmp_path / "scan", status=2)
        assert "holds the table that is read" in capsys.readouterr().err
    run(scan, "--sources", tmp_path / "in", "--out", tmp_path / "in/scan", status=2)
    assert "lies inside" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(scan, "--sources", tmp_path / "in", "--out", tmp_path / "scan", "--min-side", 0)
    assert "min_side" in capsys.readouterr().err
    run(scan, "--sources", tmp_path / "in", "--out", tmp_path / "scan", "--workers", 0, status=2)
    assert "workers 0 must be" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    Image.new("RGB", (80, 80)).save(tmp_path / "in/001.png")
    tower = WEIGHTS / "siglip2-so400m-patch16-naflex"
    run(embed, "--table", tmp_path / "scan", "--out", tmp_path / "embed", "--model", tower, status=2)
    assert "001.png: has changed since it was scanned" in capsys.readouterr().err
    run(scan, "--sources", tmp_path / "in", "--out", tmp_path / "bare", "--measures", "likeness", "--workers", 1)
    run(filter, "--table", tmp_path / "bare", "--out", tmp_path / "out", "--workers", 1, status=2)
    assert "scan with --measures" in capsys.readouterr().err
    run(scan, "--sources", "hub:nobody/nothing", "--out", tmp_path / "hub", status=2)
    assert "hub:nobody/nothing: cannot be had" in capsys.readouterr().err
