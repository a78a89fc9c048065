"""docs/scale.md, cards.md and recipes.md: of the code and the committed results; bytes are those that encoders give."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from benchmarks import cards, recipes, scale
from benchmarks.pages import MARKS
from ztrain.config import load_config
from ztrain.errors import InputError
from ztrain.frozen.states import Encoders
from ztrain.images import Bucket
from ztrain.plan.expected import WAITING

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", [scale, recipes], ids=["scale", "recipes"])
def test_the_page_is_of_the_code_and_the_committed_results(module: ModuleType) -> None:
    page = module.PAGE.read_text(encoding="utf-8")
    between = page.split(MARKS[0])[1].split(MARKS[1])[0].strip()
    assert between == module.text(), f"run: python -m {module.__name__}"


def test_bytes_of_an_entry_are_those_of_what_encoders_give_in_bf16(tmp_path: Path) -> None:
    """The miniature's encoders: other widths, the same shapes and types. A small target: processors without products in
    bf16 take minutes for a large one."""
    path, target = tmp_path / "picture.png", tmp_path / "target.png"
    for place, side in ((path, 512), (target, 64)):
        Image.effect_noise((side, side), 60).convert("RGB").save(place)
    mini = [ROOT / "configs" / "miniature.yaml"]
    config = load_config(mini, ["--train.mixed_precision", "bf16", "--data.resolution", "64"])
    encoders = Encoders.load(config, frozenset({"siglip", "reference"}), torch.bfloat16, "cpu").states(config.encoders)
    with Image.open(path) as image, Image.open(target) as little:
        states = {"latents": encoders.latents(little, Bucket(64, 64)), "text": encoders.text("a red boat")}
        states["siglip"] = encoders.tensor("siglip", pictures=[image])
        reference = encoders.sequence("reference", [image], "")
    states["reference"], kinds = reference.states, reference.kinds
    wanted = {name: scale.entry_bytes(cards.config_of(name)) for name in ("siglip", "projector")}

    # (C, H, W) float32: 16 channels, an eighth of each side; here other channels, a quarter.
    assert states["latents"].dtype == torch.float32 and states["latents"].shape[1:] == (16, 16)
    assert wanted["siglip"]["latents"] == 16 * (1024 // 8) ** 2 * states["latents"].element_size()
    # (h, w, S) and (L, D) in bf16, a byte for the kind of each token.
    assert {states[name].dtype for name in ("siglip", "text", "reference")} == {torch.bfloat16}
    grid = states["siglip"].shape[0] * states["siglip"].shape[1]
    assert 0 < grid <= 256 and wanted["siglip"]["siglip"] == 256 * 1152 * 2
    assert kinds.shape == states["reference"].shape[:1] and kinds.element_size() == 1
    tokens = config.encoders.max_reference_pixels // 1024
    assert len(kinds) == tokens + 2 + 8  # its markers, and an empty turn around them
    assert wanted["projector"]["reference"] == (256 + 2 + 8) * (2560 * 2 + 1)
    assert set(wanted["projector"]) == {"latents", "text", "reference"}


def test_a_sum_over_64_cards() -> None:
    """358,358,144 float32 gradients, 126/64 of them through 50 GB/s at 57 %, none of it hidden; of a LoRA's, all but
    the last 50 MiB."""
    case = scale.Case.of("siglip", 1024)
    seconds = 126 / 64 * 4 * 358_358_144 / (50e9 * 0.57)
    computing = case.on("h200").computing
    waiting = WAITING["ddp"]
    assert case.efficiency(50.0) == pytest.approx(computing / (computing + seconds + waiting))
    assert case.efficiency(50.0, steps=4) == pytest.approx(computing / (computing + seconds / 4 + waiting))
    lora = scale.Case.of("lora", 1024)
    computing, seconds = lora.on("h200").computing, 126 / 64 * 50 * 2**20 / (50e9 * 0.57)
    assert lora.efficiency(50.0) == pytest.approx(computing / (computing + seconds + waiting))


def test_what_one_process_takes_grows_with_the_triplets() -> None:
    each = {"process_bytes": 5000.0, "hash_seconds": 1e-3, "digests_seconds": -1e-9, "samples_seconds": 1e-4,
            "needs_seconds": 1e-5, "index_seconds": 1e-5, "tokens_seconds": 1e-5}  # fmt: skip
    order = {"samples": 1_000_000, "by_tokens_seconds": 0.5, "bytes_each": 8}
    rows = [
        {"triplets": 1_100_000, "train": {"ready_seconds": 110.0}, "train_of_two": {"ready_seconds": 165.0}},
        {"triplets": 100_000, "train": {"ready_seconds": 10.0}},
        {"triplets": 2_000_000, "train": {"failed": "not done after 90 seconds"}},
    ]
    host = scale.Host.of({"per_triplet": each, "order": order, "rows": rows})
    assert (host.ram_gb, host.order_gb, host.order_seconds) == pytest.approx((500.0, 1.6, 50.0))
    assert (host.hours, host.turn_hours) == pytest.approx((10_000 / 3600, 5_000 / 3600))
    assert host.hashing_hours == pytest.approx(100_000 / 3600)


def test_builds_are_told_for_each_triplet_and_one_that_was_stopped_is_said_so() -> None:
    took = {"workers": 16, "seconds": 120.0, "peak_bytes": [1_500_000_000, 1]}
    elsewhere = {"workers": 2, "seconds": 6000.0, "peak_bytes": [6_000_000_000, 1], "where": "2 cores, beside tests"}
    stopped = {"failed": "not done after 90 seconds", "seconds": 90.0, "peak_bytes": [3_250_000_000, 1]}
    rows = [
        {"triplets": 100_000, "pictures": 100_000, "build": took},
        {"triplets": 1_000_000, "pictures": 2_000, "build": stopped},
        {"triplets": 1_000_000, "pictures": 1_000_000, "build": elsewhere},
    ]
    document = {"machine": {"cpu_cores": 16, "torch": "2"}, "what": "of it", "rows": rows}
    said = scale.builds(document)
    assert "1.20 ms and 15.0 KB of the largest process at 100,000 (16 workers)" in said
    assert said.endswith("6.00 ms and 6.0 KB of the largest process at 1,000,000 (2 cores, beside tests).")
    lines = [line for line in scale.starts(document).splitlines() if line.startswith("|")]
    assert lines[-2].endswith("| not done after 90 seconds, 3.25 GB by then |")


def test_the_vae_takes_four_times_as_much_for_four_times_the_pixels_and_some_attention() -> None:
    config = cards.config_of("lora")
    small, large = (scale.encoder_flops(side, config)["latents"] for side in (512, 1024))
    assert 4.0 < large / small < 4.6 and set(scale.encoder_flops(512, config)) == {"latents", "text"}


def test_rows_of_several_cards_are_shown_as_measured() -> None:
    row = {"strategy": "ddp", "gpus": 2, "list": "siglip", "ms": 320.4, "efficiency": 0.981, "peak_gib": 30.1,
           "keeps": "off", "data": "alike", "accumulation": 1, "is_reference": False}  # fmt: skip
    others = [row | {"data": "mixed"}, row | {"is_reference": True}, row | {"strategy": "fsdp2"}]
    failed = {key: value for key, value in row.items() if key != "ms"} | {"list": "lora", "failed": "why"}
    shown = scale.measured([row | {"all_reduce_ms": 5.25}, failed, *others]).splitlines()[2:]
    assert shown == [
        "| `[siglip]`, ddp | none | 2 | 320 | 0.981 | 5.2 |  |",
        "| `[lora]`, ddp | none | 2 | failed | | | |",
    ]
    assert "not measured" in scale.measured([])


# --- docs/cards.md ----------------------------------------------------------------------------------------------------


def test_the_page_of_cards_is_of_the_code_and_the_committed_results(tmp_path: Path) -> None:
    text = cards.PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    (tmp_path / "cards.md").write_text(before + MARKS[0] + "\n" + MARKS[1] + rest.split(MARKS[1])[1], "utf-8")
    (tmp_path / "README.md").write_text("a\n<!-- cards -->\nold\n<!-- /cards -->\nb\n", "utf-8")
    cards.main(tmp_path / "cards.md", tmp_path / "README.md")
    assert (tmp_path / "cards.md").read_text("utf-8") == text, "run: python -m benchmarks.cards"
    filled = (tmp_path / "README.md").read_text("utf-8")
    assert filled.startswith("a\n<!-- cards -->\n| cards |") and filled.endswith("<!-- /cards -->\nb\n")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if cards.README_MARKS[0] in readme:
        between = filled.split(cards.README_MARKS[0])[1].split(cards.README_MARKS[1])[0]
        assert between in readme, "run: python -m benchmarks.cards --readme README.md"
    cells = re.findall(r"^\| \d+ x .*$", filled, flags=re.MULTILINE)
    assert all(cell.count("computed") + cell.count("**measured**") == len(cards.LISTS) for cell in cells)
    (tmp_path / "README.md").write_text("none", "utf-8")
    with pytest.raises(InputError, match="must hold <!-- cards -->"):
        cards.fill_readme(tmp_path / "README.md", "")


def test_measured_figures_stand_beside_computed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "LISTS", {"siglip": "`[siglip]`"})
    config, counted = {"siglip": cards.config_of("siglip")}, {"siglip": cards.counted_of("siglip")}
    monkeypatch.setattr(cards, "MACHINES", (("h200", 2), ("h100", 2)))
    row = {"strategy": "fsdp2", "gpus": 2, "list": "siglip", "ms": 401.2, "peak_gib": 15.43, "used_gib": [17.1, 17.24],
           "keeps": "on", "data": "alike", "accumulation": 1, "is_reference": False}  # fmt: skip
    failed = {key: value for key, value in row.items() if key not in ("ms", "peak_gib")}
    failed |= {"strategy": "zero3", "failed": "why"}
    others = [
        row | {"strategy": "zero2", "keeps": "off"},
        row | {"strategy": "zero2", "data": "mixed"},
        row | {"strategy": "zero2", "is_reference": True},
        row | {"strategy": "zero2", "accumulation": 2},
    ]
    lines = cards.strategies(config, counted, [row, failed, *others]).splitlines()
    of = {way: next(line for line in lines if f"| {way} |" in line) for way in cards.STRATEGIES}
    assert all(f"| {told} |" in of["fsdp2"] for told in ("15.4", "17.2", "401"))
    assert of["zero3"].count("failed") == 3 and of["zero2"].count("not measured") == 3

    # A machine that somebody ran: its cell, and that of no other card.
    ran = row | {"strategy": "ddp", "keeps": "off", "ms": 254.2}
    table = cards.table(config, counted, [ran, row | {"strategy": "ddp"}])
    assert table["h200", 2] == "| 2 x H200 141 GB | ddp, 17.2 GiB, 0.25 s, **measured** |"
    assert "computed" in table["h100", 2]
