"""benchmarks/step.py at its tiny size: every way computes the same velocities, and a whole run writes its rows."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import step
from tests.test_blocks import distance
from ztrain.model.flow import velocity_losses

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", step.CASES)
def test_all_ways_of_a_case_compute_the_same(name: str) -> None:
    with torch.no_grad():
        theirs, ours = (
            step.Step(step.CASES[name], way, step.TINY, CPU).velocity() for way in ("diffusers", "ztrain_eager")
        )
    assert distance([ours], [theirs]) < 1e-5


@pytest.mark.parametrize("name", step.CASES)
def test_no_step_waits_for_its_device(name: str) -> None:
    """On the meta device a tensor has nothing but its shape: what would wait for a GPU is an error there."""
    meta, each = torch.device("meta"), step.Step(step.CASES[name], "ztrain_eager", step.TINY, CPU)
    each.model.to(meta)
    velocity = each.model(each.noisy.to(meta), each.sigma.to(meta), each.encoded.to(meta))
    velocity_losses(velocity, each.noisy.to(meta), each.target.to(meta), each.sigma.to(meta)).mean().backward()
    trained = [parameter for parameter in each.model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None and parameter.grad.is_meta for parameter in trained)


def test_rows_have_their_reference_and_figures_are_not_taken_for_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tiny", "--ways", "diffusers", "ztrain_eager"]
    for case in ("mixed_captions_b4", "siglip_1024_b1_24gib"):  # the second joins the first, in the order of CASES
        assert step.main([case, *words, "--out", str(tmp_path)]) == 0
    [path] = tmp_path.iterdir()
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["case"], row["way"]) for row in rows] == [
        (case, way) for case in ("siglip_1024_b1_24gib", "mixed_captions_b4") for way in ("diffusers", "ztrain_eager")
    ]
    for row in rows:
        assert 0 < row["mfu"] and row.get("slow_because") is None
        keeps_parts = row["case"].endswith("24gib")
        if keeps_parts and row["way"] == "ztrain_eager":
            assert row["hfu"] is None
        else:
            assert (row["mfu"] < row["hfu"]) == keeps_parts
        assert ("ratio" in row) == (row["way"] == "ztrain_eager")
    with pytest.raises(SystemExit):
        step.main(words)
    assert "no results" in capsys.readouterr().err


def test_the_results_say_who_sees_a_young_lora() -> None:
    for name in ("young_lora_cpu.json", "young_lora_nvidia_h200.json"):
        committed = json.loads((step.RESULTS / name).read_text())["seen"]
        stock, stored = committed.pop("diffusers and peft"), committed.pop("ztrain, compiled, everything kept")
        assert len(committed) == 4 and all(abs(share - 1) < 0.01 for share in committed.values()), name
        assert stock + 0.2 < stored, name
