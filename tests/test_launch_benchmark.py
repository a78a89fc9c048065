"""benchmarks/launch.py: a rehearsal with two real processes, the arithmetic of its rows, and the table on the page."""

import json
from pathlib import Path

import pytest

from benchmarks import launch, launch_page, launch_rows
from tests.triplets import ROOT

TURNS = "lora_ddp_off_alike_alternating"
ALONE, DDP, REFERENCE = "lora_one_gpu_off_alike", "lora_ddp_off_alike", "lora_one_gpu_on_alike_reference"


@pytest.mark.slow
def test_two_processes_are_measured_against_one(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny").symlink_to(family)
    parts = [ALONE, DDP, REFERENCE, "lora_fsdp2_on_alike"]
    words = ["--smoke", "--work", str(tmp_path), "--out", str(tmp_path / "out"), "--steps", "4"]
    assert launch.main([*words, "--parts", *parts]) == 0
    document = json.loads((tmp_path / "out" / "launch_cpu.json").read_text())
    rows = {row["part"]: row for row in document["rows"]}
    assert list(rows) == parts
    assert [rows[part]["strategy"] for part in parts] == ["cpu", "ddp", "cpu", "fsdp2"]
    alone, ddp, reference = (rows[part] for part in parts[:3])
    # Two processes saw what one did in twice as many steps, and each half of it.
    assert len(ddp["losses"]) == 4 and 0 <= ddp["loss_difference"] < 1e-5
    assert ddp["losses"] == pytest.approx(reference["losses"], rel=1e-5) and ddp["losses"] != alone["losses"]
    assert ddp["efficiency"] == pytest.approx(alone["ms"] / ddp["ms"], rel=1e-3)
    assert ddp["weights"] == alone["weights"] > 0
    assert ddp["checkpoint_bytes"] > 4 * 3 * ddp["weights"]  # weights and two moments
    assert rows["lora_fsdp2_on_alike"]["failed"] == launch.ON_CPU and "ms" not in rows["lora_fsdp2_on_alike"]
    assert alone["ms"] == pytest.approx(sum(alone["ms_of_cards"]) / 2, abs=0.02) and len(alone["ms_of_cards"]) == 2
    assert "ms_of_cards" not in reference and ddp["beside"] == []
    assert str(tmp_path) not in json.dumps(document)
    assert not list((tmp_path / "runs").iterdir())
    capsys.readouterr()
    # A second call goes on with what is not there yet; without any time left, with nothing.
    left = launch.chosen(launch.Results(tmp_path / "out", 2, 4), None)
    assert [part.name for parts in left for part in parts] == [name for name in launch.PARTS if name not in rows]


def metrics(times: list[float], waits: list[float]) -> list[dict]:
    rows = [{"step": 0, "val/loss": 1.0}]
    for step, (seconds, share) in enumerate(zip(times, waits, strict=True), start=1):
        rows.append({"step": step, "train/loss": 1.0 / step, "perf/step_seconds": seconds,
                     "perf/data_wait_share": share, "mem/max_allocated_gib": 10.0 + step})  # fmt: skip
    return rows


def test_figures_are_of_the_steps_after_the_first_quarter() -> None:
    found = launch_rows.figures_of(metrics([9.0, 9.0, 0.1, 0.2, 0.1, 0.1, 0.1, 0.6], [1.0, 1.0, 0.5] + [0.0] * 5))
    assert (found["ms"], found["mean_ms"], found["slowest_ms"]) == (100.0, 200.0, 600.0)
    assert found["data_wait_ms"] == round(50 / 6, 3) and found["peak_gib"] == 18.0
    assert len(found["losses"]) == 8


def row(part: str, ms: float, losses: list[float], gpus: int = 1, accumulation: int = 1, **more: object) -> dict:
    made = launch.PARTS[part.removesuffix("_alternating")]
    return {"part": part, "strategy": made.strategy, "list": made.list, "keeps": made.keeps, "data": made.data,
            "is_reference": made.is_reference, "alternates": part == TURNS, "gpus": gpus,
            "accumulation": accumulation, "steps": len(losses), "ms": ms,
            "mean_ms": 2 * ms, "weights": 7, "losses": losses} | more  # fmt: skip


def test_one_card_is_measured_on_every_card_and_a_reference_on_one() -> None:
    alone, reference = launch.PARTS[ALONE], launch.PARTS[REFERENCE]
    assert [(run.card, run.name) for run in launch.Run.all_of([alone], 2)] == [(0, f"{ALONE}_0"), (1, f"{ALONE}_1")]
    beside = launch.PARTS["siglip_one_gpu_on_alike_reference"]
    assert [run.card for run in launch.Run.all_of([reference, beside], 8)] == [0, 1]
    assert [run.card for run in launch.Run.all_of([launch.PARTS[DDP]], 8)] == [0]
    cards = [row(ALONE, ms, [first, 1.0], cards=[card]) for card, ms, first in ((1, 90.0, 3.0), (0, 100.0, 2.0))]
    found = launch.of_cards(cards)
    assert (found["ms"], found["mean_ms"], found["ms_of_cards"]) == (95.0, 190.0, [100.0, 90.0])
    assert found["losses"] == [2.0, 1.0] and found["cards"] == [0, 1]
    failed = {key: value for key, value in cards[0].items() if key != "ms"} | {"failed": "no"}
    assert launch.of_cards([cards[1], failed]) is failed


def test_rows_are_compared_with_what_was_trained_alike() -> None:
    rows = [
        row(ALONE, 97.0, [5.0, 5.0]),
        row(TURNS, 98.0, [7.0, 7.0], 2, ms_of_cards=[95.0, 97.0]),
        row(DDP, 100.0, [2.0, 4.04], 2),
        row(f"{ALONE}_reference", 300.0, [2.0, 4.4], 1, 2),
        row(REFERENCE, 400.0, [2.0, 4.0], 1, 2),
        row("siglip_one_gpu_on_alike_reference", 400.0, [9.0, 9.0], 1, 2),
        row("lora_fsdp2_on_alike", 150.0, [2.0, 3.8], 2),
        row("lora_ddp_on_alike", 120.0, [2.002, 4.0], 2),
        row("lora_one_gpu_on_alike", 114.0, [5.0, 5.0]),
        row("lora_one_gpu_off_mixed", 90.0, [5.0, 5.0]),
        row("lora_ddp_off_mixed", 100.0, [3.0, 3.0], 2, mean_ms=240.0),
        row("siglip_ddp_off_alike", 99.0, [2.0, 4.0], 2, weights=8),
        {key: value for key, value in row("lora_zero3_on_alike", 1.0, [], 2).items() if key != "ms"},
    ]
    found = {r["part"]: r for r in launch_rows.compared(rows, {"7": 3.0})}
    assert found[ALONE]["efficiency"] == 1.0 and "loss_difference" not in found[ALONE]
    ddp = found[DDP]
    assert (ddp["efficiency"], ddp["exposed_ms"], ddp["all_reduce_ms"]) == (0.97, 3.0, 3.0)
    assert ddp["loss_difference"] == pytest.approx(0.01) and ddp["first_loss_difference"] == 0.0
    assert found[REFERENCE]["efficiency"] is None and "loss_difference" not in found[REFERENCE]
    # One card twice, with other blocks kept: how far losses differ by rounding alone.
    assert found[f"{ALONE}_reference"]["loss_difference"] == pytest.approx(0.1)
    fsdp = found["lora_fsdp2_on_alike"]
    assert (fsdp["of_ddp"], fsdp["efficiency"], "exposed_ms" in fsdp) == (1.25, 0.76, False)
    assert fsdp["loss_difference"] == pytest.approx(0.05)
    assert found["lora_ddp_on_alike"]["first_loss_difference"] == pytest.approx(0.001)
    mixed = found["lora_ddp_off_mixed"]
    assert (mixed["efficiency"], mixed["exposed_ms"], "loss_difference" in mixed) == (0.75, 60.0, False)
    lonely = found["siglip_ddp_off_alike"]
    assert lonely["efficiency"] is None and not {"all_reduce_ms", "exposed_ms"} & set(lonely)
    assert lonely["loss_difference"] == pytest.approx(7 / 9)
    assert found["lora_zero3_on_alike"]["efficiency"] is None
    turns = found[TURNS]
    assert (turns["efficiency"], turns["exposed_ms"], turns["all_reduce_ms"]) == (0.9796, 2.0, 3.0)
    assert "loss_difference" not in turns
    # What a row was found to be before is forgotten with the row that it was compared with.
    [again] = launch_rows.compared([ddp], {})
    assert again["efficiency"] is None and "loss_difference" not in again and "all_reduce_ms" not in again


def test_an_error_is_told_without_the_launcher_and_without_folders() -> None:
    said = f"""training:  10%|#   | 1/10
Traceback (most recent call last):
  File "{ROOT}/ztrain/train/loop.py", line 3, in <module>
    raise RuntimeError("no")
  File "/opt/somewhere/torch/nn/modules/module.py", line 7, in call
RuntimeError: no room for 3/4 of it
"""
    launchers = {
        "several": "W1122 20:38 31674 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 3 closing",
        "one": "Traceback (most recent call last):\n  File x\n    raise subprocess.CalledProcessError(...)\n"
        "subprocess.CalledProcessError: Command",
    }
    for launcher in launchers.values():
        told = launch_rows.last_lines(f"{said}{launcher}\nmore\n", {str(ROOT): "."})
        assert told.endswith("RuntimeError: no room for 3/4 of it")
        assert 'File "./ztrain/train/loop.py"' in told and "/opt" not in told and '".../module.py"' in told
        assert told.startswith("Traceback")
    assert launch_rows.last_lines("one\ntwo\n", {}) == "one\ntwo"
    lines = launch_rows.said_of("training 1,234 weights of [lora]\nblocks compiled\nexported: /a/b\nblocks compiled\n")
    assert lines == ["training 1,234 weights of [lora]", "blocks compiled"] and launch_rows.weights_of(lines) == 1234


def test_a_reference_stays_while_rows_of_its_weights_do() -> None:
    old, fsdp, new = (
        row(part, 1.0, [loss], 2, weights_of=weights)
        for part, loss, weights in ((REFERENCE, 2.0, "a"), ("lora_fsdp2_on_alike", 2.2, "a"), (REFERENCE, 3.0, "b"))
    )
    both = launch_rows.replaced([old, fsdp], [new])
    assert both == [old, fsdp, new]
    assert launch_rows.compared(both, {})[1]["loss_difference"] == pytest.approx(0.1)
    again = row("lora_fsdp2_on_alike", 1.0, [3.3], 2, weights_of="b")
    assert launch_rows.replaced([fsdp], [again]) == [again]
    assert launch_rows.replaced([old], [new]) == [new]


def test_captions_of_alike_triplets_have_one_length(family: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family / "Z-Image" / "tokenizer")
    lengths = {}
    for name in ("alike", "mixed"):
        place = launch.write_triplets(tmp_path / name, is_mixed=name == "mixed") / "train" / "metadata.jsonl"
        prompts = [json.loads(line)["prompt"] for line in place.read_text().splitlines()]
        assert len(set(prompts)) == launch.NUM_TRIPLETS
        lengths[name] = {len(tokenizer(prompt)["input_ids"]) for prompt in prompts}
    assert len(lengths["alike"]) == 1 and len(lengths["mixed"]) == 7
    assert max(lengths["mixed"]) < 400  # of 512


def test_the_table_goes_between_its_marks_and_says_what_failed(tmp_path: Path) -> None:
    rows = [
        row(ALONE, 97.0, [5.0], peak_gib=30.0, data_wait_ms=0.1, checkpoint_bytes=2**30),
        row(DDP, 100.0, [2.0], 2, peak_gib=31.0, data_wait_ms=0.1, checkpoint_bytes=2**30, loss_difference=0.5),
        {"failed": "RuntimeError: no"} | {k: v for k, v in row("lora_zero3_on_alike", 1.0, [], 2).items() if k != "ms"},
    ]
    rows = [each | {"weights_of": "b" if each["part"] == DDP else "a"} for each in rows]
    document = {"machine": {"gpu": "X", "gpus": 2}, "versions": {"torch": "2"}, "date": "2026-11-22", "steps": 1,
                "loss_tolerance": 0.02, "rows": launch_rows.compared(rows[:1] + rows[2:], {}) + rows[1:2]}  # fmt: skip
    page, results = tmp_path / "launch.md", tmp_path / "results.json"
    results.write_text(json.dumps(document))
    page.write_text("# Launch\n")
    with pytest.raises(SystemExit, match="put <!-- strategies --> and, below it, <!-- to here --> there"):
        launch_page.main(page, results)
    page.write_text("# Launch\n<!-- strategies -->\nstale\n<!-- to here -->\nend\n<!-- to here -->\n")
    launch_page.main(page, results)
    text = page.read_text()
    assert text.startswith("# Launch\n<!-- strategies -->\n| strategy |") and "stale" not in text
    assert text.endswith("<!-- to here -->\nend\n<!-- to here -->\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 5
    assert "| one_gpu | 1 | `[lora]` | everything | alike | 97.0 | 1.000 |" in text
    assert "| **5.0e-01** | 1.00 |" in text and "RuntimeError: no" in text
    assert f"- `{ALONE}`, `lora_zero3_on_alike`\n- `{DDP}`\n" in text
    launch_page.main(page, results)
    assert page.read_text() == text


@pytest.mark.skipif(not launch_page.RESULTS.exists(), reason="launch.py has not been run on GPUs yet")
def test_the_table_is_of_the_committed_results(tmp_path: Path) -> None:
    page = tmp_path / "launch.md"
    text = launch_page.PAGE.read_text("utf-8")
    before, rest = text.split(launch_page.MARKS[0])
    after = rest.split(launch_page.MARKS[1], 1)[1]
    page.write_text(before + launch_page.MARKS[0] + "\n" + launch_page.MARKS[1] + after, "utf-8")
    launch_page.main(page)
    assert page.read_text("utf-8") == text, "run: python -m benchmarks.launch_page"
