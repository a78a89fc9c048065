"""benchmarks/cost.py at its tiny size: rows, model and plot; a GPU says whether they hold."""

import json
from pathlib import Path

import pytest

from benchmarks import cost


def test_the_table_has_its_model_and_all_parts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "SIDES", (512, 1024))
    monkeypatch.setattr(cost, "BATCHES", (1, 2))
    monkeypatch.setattr(cost, "RANKS", (2, 32))
    monkeypatch.setattr(cost, "DRAWS", 2)
    monkeypatch.setitem(cost.DRAWN, "draws", ("ztrain_eager", (8, cost.RANK)))
    path = tmp_path / "cost_cpu.json"
    for part in ("sweep", "draws", "draws_compiled"):
        assert cost.main(["--tiny", "--only", part, "--out", str(tmp_path)]) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    rows = document["sweep"]
    assert [(row["side"], row["batch"], row["rank"]) for row in rows] == [
        (512, 1, 32), (1024, 1, 32), (1024, 2, 32), (1024, 1, 2)
    ]  # fmt: skip
    assert rows[0]["tflop"] < rows[1]["tflop"] < rows[2]["tflop"] and rows[1]["tokens"] * 2 == rows[2]["tokens"]
    assert all(row["over_model"] == pytest.approx(document["rate_tflops"] / row["tflops"], rel=1e-3) for row in rows)
    assert len(document["draws"]) == 4 and len(document["draws_compiled"]) == 2
    assert all(sum(row["kept"].values()) == 2 for part in cost.DRAWN for row in document[part])
    assert "512 px" in (tmp_path / "cost_cpu.svg").read_text(encoding="utf-8")

    # Cut off after three, of which one would be drawn otherwise today.
    cut = [row | {"peak_gib": 1.0} for row in document["draws"][:3]]
    cut[1]["budget_gib"] += 1
    path.write_text(json.dumps(document | {"draws": cut}), encoding="utf-8")
    assert cost.main(["--tiny", "--only", "draws", "--out", str(tmp_path)]) == 0
    again = json.loads(path.read_text(encoding="utf-8"))["draws"]
    known = [row["peak_gib"] is not None for row in again]
    assert known == [True, False, True, False]
    assert [row | {"peak_gib": None} for row in again] == document["draws"]
    with pytest.raises(SystemExit):
        cost.main(["--tiny"])
