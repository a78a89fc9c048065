"""What a step costs: time over pixels, batch and rank beside its FLOPs; and whether steps stay inside their budgets.

    python -m benchmarks.cost [--out DIR] [--tiny] [--only sweep | draws | draws_compiled]

One GPU, random bf16 weights of the real size, the default LoRA ([splice, lora], every linear layer of the main blocks).
sweep: steps with everything kept, of SIDES at batch 1, BATCHES at 1024 pixels, RANKS at 1024 pixels, batch 1; the model
has one number, the rate in FLOP/s, which is the median over all rows of a megapixel and more. draws: batches of random
size, captions, rank and number, each with a random budget, DRAWS of each rank of DRAWN: what two steps reserved, the
CUDA context counted, and how often memory was short, so that less was kept, as in a run. Batches of several captions
make a compiler write many functions, minutes of it, so that the compiled ones have a part of their own. Draws whose
rows are in the file are not drawn again: a call that was cut off is gone on with.
Out: cost_<gpu>.json, {"command", "machine", "versions", "date", "rate_tflops", "sweep", "draws", "draws_compiled"}, and
a plot beside it.
"""

import argparse
import gc
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch

from benchmarks import cost_plot
from benchmarks.cost_plot import RANK
from benchmarks.laboratory import machine
from benchmarks.step import REAL, RESULTS, TINY, Case, Size, Step, count_flops
from ztrain.adapters.lora import LoraAdapterConfig
from ztrain.adapters.splice import SpliceConfig
from ztrain.errors import InputError
from ztrain.model.fast.block import Keep
from ztrain.model.fast.blocks import run
from ztrain.model.fast.budget import GIB, Budget, Sizes, available_bytes, idle_bytes, use_growing_segments

SIDES = (512, 640, 768, 896, 1024, 1280, 1536)
BATCHES = (1, 2, 4)
RANKS = (RANK, 128, 8)
DRAWN = {"draws": ("ztrain_eager", (8, 128, RANK)), "draws_compiled": ("ztrain", (RANK,))}
DRAWS = 17
CAPTIONS = (8, 399)
"""Tokens of the shortest and the longest."""
_MEGAPIXEL = 1024
_SEED = 0


def case_of(side: int, captions: Sequence[int], rank: int, keeps: Keep | float | None = Keep.EVERYTHING) -> Case:
    adapters = [SpliceConfig(), LoraAdapterConfig(rank=rank)]
    return Case(adapters=lambda width: adapters, side=side, captions=tuple(captions), keeps=keeps)


def sweep(size: Size, device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """Rows so far, each time one has come."""
    wanted = [(side, 1, RANK) for side in SIDES] + [(1024, batch, RANK) for batch in BATCHES]
    wanted += [(1024, 1, rank) for rank in RANKS]
    rows: list[dict[str, Any]] = []
    for rank in dict.fromkeys(rank for *_, rank in wanted):
        gc.collect()
        step = _step(case_of(1024, [128], rank), size, device, "ztrain")
        for side, batch in dict.fromkeys((side, batch) for side, batch, other in wanted if other == rank):
            case = case_of(side, [128] * batch, rank)
            step.take(case, device)
            step.run()
            ms = statistics.median(step.timed())
            flops = count_flops(case, size)["needed"]
            rows.append({"side": side, "batch": batch, "rank": rank, "tokens": step.tokens, "ms": round(ms, 2)})
            rows[-1] |= {"tflop": round(flops / 1e12, 6), "tflops": round(flops / ms / 1e9, 4)}
            yield rows
        del step


def judge(document: dict[str, Any]) -> None:
    """The rate in TFLOP/s that the model takes for all rows, and how much longer than by it each took."""
    rows = document["sweep"]
    large = [row["tflops"] for row in rows if row["side"] >= _MEGAPIXEL]
    document["rate_tflops"] = rate = statistics.median(large or [row["tflops"] for row in rows])
    for row in rows:
        row["over_model"] = round(rate / row["tflops"], 4)


def draws(
    part: str, size: Size, device: torch.device, known: Sequence[dict[str, Any]] = ()
) -> Iterator[list[dict[str, Any]]]:
    """Rows so far; each has a budget between what is there without activations and what all of them would take. What
    is known of the same draws is not drawn again."""
    rows: list[dict[str, Any]] = []
    way, ranks = DRAWN[part]
    chance = random.Random(f"{_SEED} {part}")
    for rank in ranks:
        gc.collect()
        step: Step | None = None
        sizes: dict[int, Sizes | None] = {}
        for _ in range(DRAWS):
            side, batch = chance.randrange(512, 1537, 128), chance.choice((1, 1, 2, 4))
            captions = [chance.randrange(CAPTIONS[0], CAPTIONS[1] + 1) for _ in range(batch)]
            budget_gib = round(chance.uniform(18.0, 60.0), 1)
            row: dict[str, Any] = {"side": side, "captions": captions, "rank": rank, "budget_gib": budget_gib}
            if len(rows) < len(known) and row.items() <= known[len(rows)].items():
                rows.append(known[len(rows)])
                continue
            if step is None:
                step = _step(case_of(1024, [CAPTIONS[1]], rank, keeps=None), size, device, way)
                step.model.execution.run = run  # no graphs, as in a run whose batches are not all small
                step.run()  # moments
            if batch not in sizes:
                sizes[batch] = _sizes(step, batch, rank, device)
            step.take(case_of(side, captions, rank), device)
            rows.append(row | _inside(step, sizes[batch], budget_gib, device))
            yield rows
        del step


def _sizes(step: Step, batch: int, rank: int, device: torch.device) -> Sizes | None:
    """Measured as before a run's first step: with as many samples as its batches have, of different lengths."""
    if device.type != "cuda":
        return None
    torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())
    shortest, longest = CAPTIONS
    captions = [longest - i * (longest - shortest) // max(1, batch - 1) for i in range(batch)]
    step.take(case_of(1024, captions, rank), device)
    return step.sizes(device)


def _inside(step: Step, sizes: Sizes | None, budget_gib: float, device: torch.device) -> dict[str, Any]:
    """Peak of two steps, the CUDA context counted; or the sentence that refuses the batch."""
    if sizes is None:
        step.run()
        return {"peak_gib": None, "kept": _counted(step)}
    torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())
    gradients = 4 * sum(p.numel() for p in step.trained)
    step.budget = Budget(sizes, available_bytes(device, budget_gib, gradients))
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)
    short, done = 0, 0
    while done < 2:
        try:
            step.run()
            done += 1
            continue
        except InputError as error:
            return {"refused": str(error)}
        except torch.OutOfMemoryError:
            if not step.budget.keep_less(idle_bytes(device)):
                return {"failed": "out of memory with nothing kept"}
            short += 1
        # Here, where the error no longer holds what it was about.
        step.optimizer.zero_grad()
        torch.cuda.empty_cache()
    peak = (torch.cuda.max_memory_reserved(device) + context) / GIB
    return {"peak_gib": round(peak, 2), "kept": _counted(step), "short": short, "is_inside": peak <= budget_gib}


def _counted(step: Step) -> dict[str, int]:
    return {keep.name.lower(): step.kept.count(keep) for keep in Keep if keep in step.kept}


def _step(case: Case, size: Size, device: torch.device, way: str) -> Step:
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())
    return Step(case, way if device.type == "cuda" else "ztrain_eager", size, device)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.cost", description=__doc__)
    parser.add_argument("--only", choices=("sweep", *DRAWN))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, a rehearsal; needs --out")
    options = parser.parse_args(arguments)
    use_growing_segments()
    if options.tiny and options.out == RESULTS:
        parser.error("--tiny needs --out: its figures are no results")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("the real size needs a CUDA GPU; --tiny runs here")
    device, size = (torch.device("cpu"), TINY) if options.tiny else (torch.device("cuda"), REAL)
    where = machine()
    path = options.out / f"cost_{where['device'].lower().replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    document |= {
        "command": "python -m benchmarks.cost",
        "machine": where,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }
    for part in [options.only] if options.only else ["sweep", *DRAWN]:
        known = document.get(part, [])
        for rows in sweep(size, device) if part == "sweep" else draws(part, size, device, known):
            print(json.dumps(rows[-1]), flush=True)
            document[part] = rows
            if part == "sweep":
                judge(document)
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if "sweep" in document:
        cost_plot.draw(path.with_suffix(".svg"), document)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
