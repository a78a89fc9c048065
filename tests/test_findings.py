"""What findings and shipped adapters rest on: variants that can be, means over seeds, paired differences."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import findings, findings_book, shipped_adapters
from benchmarks.drawings import StudySettings, Variant
from benchmarks.laboratory import Laboratory
from benchmarks.pages import MARKS
from miniature.trials import text_only
from ztrain.errors import InputError
from ztrain.weights.adapter_folder import read_adapter

PLAN = StudySettings(counts={"train": (3, 3), "test": (4, 2)}, steps=2, batch=2)
EVERY = findings_book.VARIANTS | {f"shipped_{name}": variant for name, variant in shipped_adapters.VARIANTS.items()}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    laboratory = Laboratory(tmp_path_factory.mktemp("laboratory"), PLAN, 1, findings_book.WAYS)
    laboratory.prepare()
    laboratory.keep_truth()
    return laboratory


def test_every_variant_is_an_experiment_of_its_own(tmp_path: Path) -> None:
    laboratory = Laboratory(tmp_path, PLAN)
    configs = {name: laboratory.config_of(variant, seed=1) for name, variant in EVERY.items()}
    assert all(config.seed == 1 and config.train.max_train_steps == 2 for config in configs.values())
    for name, variant in findings_book.VARIANTS.items():
        siglip = [a for a in configs[name].adapters if a.kind == "siglip"]
        assert all(adapter.init_seed == 1 for adapter in siglip), f"{name}: each seed starts from other weights"
        assert laboratory.config_of(variant).adapters != configs[name].adapters or not siglip
    said = [json.dumps([c.model_dump(mode="json")[k] for k in ("adapters", "train")]) for c in configs.values()]
    distinct = {text for name, text in zip(configs, said, strict=True) if not name.startswith("shipped")}
    assert len(distinct) == len(findings_book.VARIANTS), "two variants train the same"
    rows = {row.removesuffix("_seconds") for page in findings_book.BOOK.values() for row in page.rows}
    assert rows <= set(findings_book.VARIANTS) | set(findings_book.UNTRAINED)
    shown = {name for page in findings_book.BOOK.values() for name in page.variants}
    assert {name.removesuffix("_seconds") for name in shown} == set(findings_book.VARIANTS), "trained and shown nowhere"


def test_few_caches_cover_every_variant(tmp_path: Path) -> None:
    laboratory = Laboratory(tmp_path, PLAN)
    chosen = laboratory._reading_most(EVERY.values())
    assert len(chosen) == 2
    for name, variant in EVERY.items():
        reads = laboratory.config_of(variant).reads
        assert any(reads <= laboratory.config_of(most).reads for most in chosen), name


def test_rows_are_means_over_seeds_and_differences_are_paired(laboratory: Laboratory, tmp_path: Path) -> None:
    """Untrained methods stand for trained ones: what is asked is the arithmetic."""
    text = text_only(laboratory.config)
    splice = findings_book.UNTRAINED["splice-5-text-1"](laboratory.config)
    for run, entry in {"siglip-0": text, "siglip-1": splice, "stock_order-0": splice, "stock_order-1": splice}.items():
        laboratory.judge(run, entry)
    result = findings.result_of(laboratory, "token_order", (0, 1), {})
    ours, theirs = result["rows"]
    low, high = ours["style_cosine_by_seed"]
    cosine, above = result["columns"].index("style cosine"), result["columns"].index("above the first row")
    assert low < high == pytest.approx(theirs["style_cosine_by_seed"][0])
    assert ours["cells"][cosine]["mean"] == pytest.approx((low + high) / 2, abs=1e-4)
    assert theirs["cells"][above]["mean"] == pytest.approx((high - low) / 2, abs=1e-4)
    assert ours["cells"][above]["low"] == ours["cells"][above]["high"] == 0
    assert (result["triplets"], ours["cells"][cosine]["groups"], result["plan"]["seeds"]) == (8, 4, [0, 1])

    page = tmp_path / "token_order.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    findings.write(laboratory, "token_order", (0, 1), {}, tmp_path, tmp_path)
    assert findings.table(json.loads((tmp_path / "token_order.json").read_text())) in page.read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    assert (tmp_path / "token_order.webp").is_file() and "old" not in page.read_text()
    with pytest.raises(InputError, match=r"siglip-2.json is missing: siglip-2 is not judged yet"):
        findings.result_of(laboratory, "token_order", (0, 1, 2), {})


def test_ways_of_asking_are_kept_apart_and_nothing_is_judged_twice(laboratory: Laboratory) -> None:
    splice = findings_book.UNTRAINED["splice-5-text-1"](laboratory.config)
    laboratory.judge("asked", splice, ("own", "blind"))
    laboratory.judge("text", text_only(laboratory.config))
    blind, text = laboratory.scores(["asked"], "blind"), laboratory.scores(["text"])
    assert torch.equal(blind["style_cosine"], text["style_cosine"])
    assert not torch.equal(laboratory.scores(["asked"])["style_cosine"], text["style_cosine"])
    laboratory.judge("asked", replace(splice, label="another"))
    assert laboratory.read("asked")["label"] == splice.label
    longer = replace(laboratory, plan=replace(PLAN, steps=3))
    with pytest.raises(InputError, match=r"asked.json was made under another plan; choose another --out"):
        longer.read("asked")


def test_a_process_that_fails_names_its_log(tmp_path: Path) -> None:
    laboratory = Laboratory(tmp_path, PLAN)
    with pytest.raises(InputError, match=r"ztrain.cli cache failed, see .*cache-0.log: .*triplets"):
        laboratory.carry_out([("siglip", Variant(label="x", experiment="siglip"), 0)], {})


@pytest.mark.slow
def test_the_commands_run_from_paintings_to_pages(tmp_path: Path) -> None:
    assert findings.main(["token_order", "--smoke", "--seeds", "1", "--out", str(tmp_path / "f")]) == 0
    assert shipped_adapters.main(["--smoke", "--out", str(tmp_path / "s")]) == 0
    for name in shipped_adapters.VARIANTS:
        exported = read_adapter(tmp_path / "s" / "adapters" / name)
        assert "lora_comfyui.safetensors" not in exported.files
    result = json.loads((tmp_path / "s" / "shipped_adapters.json").read_text())
    assert result["rows"]["siglip"]["style_above"].keys() == {"shuffled", "lora", "splice"}
