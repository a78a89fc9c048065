"""Puts what was measured of the strategies into docs/launch.md, between its marks.

    python -m benchmarks.launch_page

In: benchmarks/results/launch_nvidia_h200.json (benchmarks/launch.py). Out: a table and, under it, the errors of what
failed.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.pages import ROOT, write_page

RESULTS = ROOT / "benchmarks" / "results" / "launch_nvidia_h200.json"
PAGE = ROOT / "docs" / "launch.md"
MARKS = ("<!-- strategies -->", "<!-- to here -->")
_HEADS = ("strategy", "cards", "list", "blocks keep", "batches", "ms a step", "efficiency", "of DDP's time",
          "all-reduce alone, ms", "more than one card, ms", "waits for data, ms", "peak, GiB", "losses differ by",
          "checkpoint, GiB")  # fmt: skip
_KEEPS = {"off": "everything", "on": "nothing"}


def table(document: dict[str, Any]) -> str:
    """Of all rows; one that failed says so in the place of its time."""
    lines = [f"| {' | '.join(_HEADS)} |", "|---" * len(_HEADS) + "|"]
    shown = {row["part"]: row for row in document["rows"]}  # of two references of one part, the newer
    lines += [f"| {' | '.join(_cells(row, document['loss_tolerance']))} |" for row in shown.values()]
    machine, versions = document["machine"], document["versions"]
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines += [
        "",
        f"{machine['gpus']} x {machine['gpu']}, {named}, {document['date']}; {document['steps']} steps each, medians"
        " after the first quarter (means for mixed batches). Losses: the largest relative difference of a step to one"
        f" card with the same global batch and the same random weights, or to the row that is named;"
        f" {document['loss_tolerance']:.0%} is the tolerance, what is beyond is bold.",
    ]
    calls: dict[str, list[str]] = {}
    for row in shown.values():
        calls.setdefault(row["weights_of"], []).append(f"`{row['part']}`")
    if len(calls) > 1:
        lines += ["", "Not all rows are of one machine and the same random weights; those that are:", ""]
        lines += [f"- {', '.join(parts)}" for parts in calls.values()]
    for row in document["rows"]:
        if "failed" in row:
            lines += ["", f"`{row['part']}`:", "", "```", row["failed"], "```"]
    return "\n".join(lines)


def _cells(row: dict[str, Any], tolerance: float) -> list[str]:
    batches = "mixed" if row["data"] == "mixed" else f"{row['accumulation']} a step" if row["is_reference"] else "alike"
    batches = "alike, sending by turns" if row.get("alternates") else batches
    head = [row["strategy"], str(row["gpus"]), f"`[{row['list']}]`", _KEEPS[row["keeps"]], batches]
    if "failed" in row:
        return [*head, "failed", *[""] * (len(_HEADS) - len(head) - 1)]
    time = row["mean_ms"] if row["data"] == "mixed" else row["ms"]

    def told(name: str, form: str) -> str:
        return format(row[name], form) if row.get(name) is not None else ""

    figures = [f"{time:.1f}", told("efficiency", ".3f"), told("of_ddp", ".2f"), told("all_reduce_ms", ".1f")]
    figures += [told("exposed_ms", ".1f"), told("data_wait_ms", ".2f"), told("peak_gib", ".1f")]
    return [*head, *figures, _difference(row, tolerance), f"{row['checkpoint_bytes'] / 2**30:.2f}"]


def _difference(row: dict[str, Any], tolerance: float) -> str:
    if "loss_difference" not in row:
        return ""
    found = f"{row['loss_difference']:.1e}"
    found += f" (to `{row['compared_with']}`)" if "compared_with" in row else ""
    return found if row["loss_difference"] <= tolerance else f"**{found}**"


def main(page: Path = PAGE, results: Path = RESULTS) -> None:
    for path in (page, results):
        if not path.is_file():
            raise SystemExit(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name} is not there")
    write_page(page, table(json.loads(results.read_text(encoding="utf-8"))), MARKS)


if __name__ == "__main__":
    main()
