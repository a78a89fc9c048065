"""The rows of benchmarks/launch.py: what a run's files say, and what follows from other rows.

In: metrics.jsonl, and what a run printed. Out: ms (median step after the first quarter), mean_ms, slowest_ms,
data_wait_ms (mean a step), peak_gib (of the first card, allocated), losses; and of several rows: efficiency (one card's
ms / ms; of a row that alternates, its own cards'), exposed_ms (ms - one card's), of_ddp (ms / DDP's), loss_difference
(largest relative difference of a step's loss to that of one card with the same global batch, or where those of the same
random weights are missing, to the row compared_with) and first_loss_difference. Rows that alternate steps which send
gradients with steps which do not, and all_reduce_ms, are kept as commit 8220e83 measured them.
"""

import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]

LOSS_TOLERANCE = 0.02
"""Largest relative difference of a step's loss to one card's that counts as the same: kernels and sums in bfloat16 go
in another order, which training carries on."""

_WEIGHTS = re.compile(r"training ([\d,]+) weights")
_LAUNCHER = re.compile(
    r"ChildFailedError|CalledProcessError|Sending process \d+ closing|failed \(exitcode|death signal"
)
_PROGRESS = re.compile(r"\w[\w ]*:\s+\d+%\|")


def weights_of(said: Sequence[str]) -> int:
    """How many weights a run trains, which it says."""
    return next(int(found[1].replace(",", "")) for found in map(_WEIGHTS.match, said) if found)


def said_of(out: str) -> list[str]:
    """What a run said of how it trains: its lines without those that name files."""
    lines = [line.strip()[:400] for line in out.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and "/" not in line))[:20]


def last_lines(text: str, known: Mapping[str, str], count: int = 12) -> str:
    """The end of an error without what the launcher adds to it, and without folders of this machine.

    known: folders, and what is said in their place.
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not _PROGRESS.match(line)]
    told = next((place for place, line in enumerate(lines) if _LAUNCHER.search(line)), len(lines))
    while told and re.match(r"Traceback|\s", lines[told - 1]) and told < len(lines):
        told -= 1  # the launcher's own frames above its error
    ended = "\n".join(lines[max(0, told - count) : told] or lines[-count:])
    for folder, word in sorted({sys.prefix: "PYTHON", **known}.items(), key=lambda pair: -len(pair[0])):
        ended = ended.replace(folder, word)
    return re.sub(r"(?<![\w.~])/(?:[\w.+-]+/)+", ".../", ended)[-3000:]


def figures_of(metrics: Sequence[Row]) -> Row:
    """Of a run's metrics.jsonl: times of the steps after the first quarter, losses of all."""
    trained = [row for row in metrics if "train/loss" in row]
    settled = trained[len(trained) // 4 :]
    seconds = [row["perf/step_seconds"] for row in settled]
    waited = [row["perf/step_seconds"] * row["perf/data_wait_share"] for row in settled]
    peaks = [row["mem/max_allocated_gib"] for row in trained if "mem/max_allocated_gib" in row]
    return {
        "ms": round(1e3 * statistics.median(seconds), 2),
        "mean_ms": round(1e3 * statistics.fmean(seconds), 2),
        "slowest_ms": round(1e3 * max(seconds), 2),
        "data_wait_ms": round(1e3 * statistics.fmean(waited), 3),
        "peak_gib": round(max(peaks), 2) if peaks else None,
        "losses": [row["train/loss"] for row in trained],
    }


def replaced(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """`rows` with the new ones in the place of earlier ones of the same parts. A reference stays beside a newer one
    while rows of its random weights are there: their losses are compared with no others."""
    parts = {row["part"] for row in new}
    weights = {row["weights_of"] for row in rows if row["part"] not in parts} - {row["weights_of"] for row in new}

    def stays(row: Row) -> bool:
        return row["part"] not in parts or (row["is_reference"] and row["weights_of"] in weights)

    return [*filter(stays, rows), *new]


_DERIVED = ("efficiency", "exposed_ms", "of_ddp", "all_reduce_ms", "loss_difference", "first_loss_difference",
            "compared_with")  # fmt: skip


def compared(rows: Sequence[Row], all_reduce: Mapping[str, float]) -> list[Row]:
    """The rows in their order, each with what follows from others that were trained alike.

    all_reduce: milliseconds, by number of weights. Times of mixed data are compared by their means: a median would be
    of other batches.
    """
    done = []
    for row in rows:
        row = {key: value for key, value in row.items() if key not in _DERIVED}
        done.append(row | {"efficiency": None} | (_derived(row, rows, all_reduce) if "ms" in row else {}))
    return done


def _sent(row: Row, all_reduce: Mapping[str, float]) -> Row:
    weights = str(row["weights"])
    return {"all_reduce_ms": round(all_reduce[weights], 2)} if weights in all_reduce else {}


def _derived(row: Row, rows: Sequence[Row], all_reduce: Mapping[str, float]) -> Row:
    found: Row = {}
    time_of = "mean_ms" if row["data"] == "mixed" else "ms"
    if row.get("alternates"):
        alone_ms = statistics.fmean(row["ms_of_cards"])
        return {
            "efficiency": round(alone_ms / row["ms"], 4),
            "exposed_ms": round(row["ms"] - alone_ms, 2),
            **_sent(row, all_reduce),
        }
    measured = [other for other in rows if "ms" in other and other["steps"] == row["steps"]]
    measured = [other for other in measured if not other.get("alternates")]
    alike = [o for o in measured if not o["is_reference"] and all(o[k] == row[k] for k in ("list", "keeps", "data"))]
    alone = next((other for other in alike if other["gpus"] == 1), None)
    ddp = next((other for other in alike if other["strategy"] == "ddp"), None)
    if alone and not row["is_reference"]:
        found["efficiency"] = round(alone[time_of] / row[time_of], 4)
    if row["strategy"] == "ddp":
        if alone:
            found["exposed_ms"] = round(row[time_of] - alone[time_of], 2)
        found |= _sent(row, all_reduce)
    elif ddp and row["gpus"] > 1:
        found["of_ddp"] = round(row[time_of] / ddp[time_of], 4)
    batch = row["gpus"] * row["accumulation"]
    others = [true for true in measured if true["gpus"] * true["accumulation"] == batch and true["part"] != row["part"]]
    others = [true for true in others if all(true.get(k) == row.get(k) for k in ("list", "data", "weights_of"))]
    references = [true for true in others if true["is_reference"] and true["keeps"] == "on"]
    earlier = [true["part"] for true in measured]
    earlier = earlier[: earlier.index(row["part"])]
    before = [true for true in others if true["part"] in earlier and true["keeps"] == row["keeps"] and true["gpus"] > 1]
    for true in (references or ([] if row["is_reference"] else before))[:1]:
        differences = [abs(a - b) / abs(b) for a, b in zip(row["losses"], true["losses"], strict=True)]
        found |= {"loss_difference": max(differences), "first_loss_difference": differences[0]}
        found |= {} if references else {"compared_with": true["part"]}
    return found
