"""The strategies on one machine with several GPUs: step times, efficiency, memory, losses against one card.

    python -m benchmarks.launch --work out/launch --out benchmarks/results [--gpus 2] [--steps 50] [--parts PART ...]
        [--limit-seconds 570] [--smoke]

The transformer at its real size with random bf16 weights, tiny encoders that give what the real ones give, 1024 px,
batch 1 a card; a part is one run of the project's own command under `accelerate launch`. Out: launch_<gpu>.json,
written after each part; a part that is in it is not run again unless --parts names it, and none is begun that would not
be done within --limit-seconds: call it again for the rest. A run of one card runs on every card at the same time, since
cards differ by some percent and share a host: its row has the means of all (ms_of_cards: each); references run side by
side, one a card.
What failed is a row with "failed", the last lines of the error; logs of all stay in --work. --smoke: the tiny family on
CPUs.

A row: strategy, gpus, list, keeps (train.gradient_checkpointing), data (alike: squares and captions of one length, so
that cards differ in speed alone; mixed: aspects and captions of all lengths), accumulation, is_reference (one card, the
global batch of all), used_gib (each card, as its driver sees it every 5 s), checkpoint_bytes, said, run_seconds,
weights_of (random weights are others each time they are made: rows of one number are of one machine, too), and the
figures of launch_rows.py.

Takes 13 GiB of disk for the weights, and at most 12 more for two checkpoints and exports at a time.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from benchmarks.launch_rows import (
    LOSS_TOLERANCE,
    Row,
    compared,
    figures_of,
    last_lines,
    replaced,
    said_of,
    weights_of,
)
from benchmarks.pages import ROOT
from benchmarks.train_real_size import ASPECTS, build_shallow_family, places_of, run

STEPS = 50
NUM_TRIPLETS = 24
LONGEST_SECONDS = 300
"""Of one part; it failed if it takes longer."""
PREPARE_SECONDS = 100
ON_CPU = "skipped: accelerate cannot run it on CPUs, where it takes DDP in its place"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One run. seconds: about what it takes on H200s, with the start and compiling."""

    strategy: str
    list: str
    keeps: str = "off"
    data: str = "alike"
    is_reference: bool = False
    seconds: int = 92

    @property
    def is_alone(self) -> bool:
        return self.strategy == "one_gpu"

    @property
    def name(self) -> str:
        return "_".join([self.list, self.strategy, self.keeps, self.data] + ["reference"] * self.is_reference)


def _alone(name: str, keeps: str = "off", data: str = "alike", is_reference: bool = False) -> Part:
    return Part(strategy="one_gpu", list=name, keeps=keeps, data=data, is_reference=is_reference)


def _cut(strategy: str, name: str) -> Part:
    return Part(strategy=strategy, list=name, keeps="on", seconds=98)


def _ddp(name: str, keeps: str = "off", data: str = "alike") -> Part:
    return Part(strategy="ddp", list=name, keeps=keeps, data=data)


# The most important first; what stands together runs side by side.
ORDER: tuple[tuple[Part, ...], ...] = (
    (_alone("lora"),),
    (_ddp("lora"),),
    (_alone("siglip"),),
    (_ddp("siglip"),),
    (_alone("lora", "on", is_reference=True), _alone("siglip", "on", is_reference=True)),
    (_cut("fsdp2", "lora"),),
    (_cut("zero3", "lora"),),
    (_cut("zero2", "lora"),),
    (_ddp("lora", "on"),),
    (_cut("fsdp2", "siglip"),),
    (_ddp("siglip", "on"),),
    (_cut("zero2", "siglip"),),
    (_cut("zero3", "siglip"),),
    (_alone("lora", "on"),),
    (_alone("lora", data="mixed"),),
    (_ddp("lora", data="mixed"),),
    (_alone("siglip", "on"),),
    (_alone("lora", is_reference=True),),
)
PARTS = {part.name: part for parts in ORDER for part in parts}


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how all is run. deadline: of time.monotonic, after which nothing may go on."""

    work: Path
    family: Path
    gpus: int
    steps: int
    is_smoke: bool
    deadline: float

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


# --- what is trained --------------------------------------------------------------------------------------------------


def write_triplets(folder: Path, is_mixed: bool) -> Path:
    """Small pictures of coloured blocks, which loading enlarges, as `<folder>/train/metadata.jsonl` lists them.

    Alike: squares, and prompts that differ in three digits, which are a token each. Mixed: ASPECTS, and prompts of 1 to
    7 times that length.
    """
    import numpy as np
    from PIL import Image

    place = folder / "train"
    shutil.rmtree(folder, ignore_errors=True)
    place.mkdir(parents=True)
    generator, rows = np.random.default_rng(0), []
    for number in range(NUM_TRIPLETS):
        wide, high = ASPECTS[number % len(ASPECTS)] if is_mixed else (1, 1)
        for name, (width, height) in {"ref": (192, 192), "target": (64 * wide, 64 * high)}.items():
            colours = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(colours).resize((width, height)).save(place / f"{name}-{number}.png")
        prompt = f"picture {number:03d}: blocks of many colours, soft where they meet, drawn with care"
        prompt += ", and once more with care" * (number % 7 * 2 if is_mixed else 0)
        names = {"reference_file_names": [f"ref-{number}.png"], "target_file_name": f"target-{number}.png"}
        rows.append(json.dumps(names | {"prompt": prompt}) + "\n")
    (place / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def prepare(work: Path, kinds: set[str], is_smoke: bool) -> Path:
    """Builds in `work` what it lacks: models, whose folder this returns, triplets of these kinds, and their cache."""
    work.mkdir(parents=True, exist_ok=True)
    tiny, family, half = work / "tiny", work / "family", work / "family.half"
    run("miniature.family", "--out", str(tiny))  # which leaves a whole one as it is
    if is_smoke:
        family = tiny
    elif not family.exists():
        shutil.rmtree(half, ignore_errors=True)
        # In a process of its own, so that this one leaves no memory on the card.
        building = multiprocessing.get_context("spawn").Process(target=build_shallow_family, args=(tiny, half))
        building.start()
        building.join()
        if building.exitcode:
            raise SystemExit("the family could not be built; its error stands above")
        (half / "weights_of").write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        half.rename(family)

    def fill(data: str) -> None:
        write_triplets(work / data, is_mixed=data == "mixed")
        # [siglip] reads all that [lora] does.
        said, seconds = run("ztrain.cli", "cache", *words_of("siglip", data, work, family, is_smoke))
        print(data, said.strip().splitlines()[-1], f"({seconds:.0f} s)", flush=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, (data for data in sorted(kinds) if not (work / f"cache-{data}").exists())))
    return family


def words_of(name: str, data: str, work: Path, family: Path, is_smoke: bool) -> list[str]:
    """Of any run. Dropout would take tokens away from some samples, and what lies between steps is not measured."""
    return [
        *places_of(name, family, work / data, work / f"cache-{data}", is_smoke),
        "--train.train_batch_size", "1", "--train.lr_warmup_steps", "0", "--train.logging_steps", "1",
        "--train.dropout_text", "0", "--train.dropout_reference", "0", "--train.dropout_both", "0",
        "--validation.validation_steps", "0", "--validation.preview_steps", "0", "--data.max_crop", "0.3",
        "--data.small_targets", "upscale",
    ]  # fmt: skip


# --- one run ----------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A part on the cards that it has; `card` is the first of them."""

    part: Part
    card: int
    name: str

    @classmethod
    def all_of(cls, parts: Sequence[Part], gpus: int) -> "list[Run]":
        """What is started together for a group of ORDER."""
        [first, *others] = parts
        if first.is_alone and not first.is_reference and not others:
            return [cls(first, card, f"{first.name}_{card}") for card in range(gpus)]
        return [cls(part, card, part.name) for card, part in enumerate(parts)]


def command_of(run: Run, place: Place) -> list[str]:
    """As the documentation has it, with a port that is free."""
    part = run.part
    accumulation, steps = place.gpus if part.is_reference else 1, place.steps
    return [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", f"configs/accelerate/{_strategy(part, place)}.yaml",
        "--num_processes", str(1 if part.is_alone else place.gpus), "--main_process_port", "0",
        "-m", "ztrain.train",
        *words_of(part.list, part.data, place.work, place.family, place.is_smoke),
        "--train.gradient_accumulation_steps", str(accumulation), "--train.gradient_checkpointing", part.keeps,
        "--train.max_train_steps", str(steps), "--train.checkpointing_steps", str(steps),
        "--output_dir", str(place.work / "runs" / run.name),
    ]  # fmt: skip


def _strategy(part: Part, place: Place) -> str:
    return "cpu" if part.is_alone and place.is_smoke else part.strategy


def start(run: Run, place: Place) -> "subprocess.Popen[bytes]":
    """The run's command; one of one card sees that card alone. Its words go to two logs."""
    shutil.rmtree(place.work / "runs" / run.name, ignore_errors=True)
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "8", **os.environ}
    if place.is_smoke:
        environment["ACCELERATE_USE_CPU"] = "true"
    elif run.part.is_alone:
        environment["CUDA_VISIBLE_DEVICES"] = str(run.card)
    out, err = _logs(run, place)
    out.parent.mkdir(exist_ok=True)
    with out.open("wb") as said, err.open("wb") as failed:
        return subprocess.Popen(
            command_of(run, place), cwd=ROOT, env=environment, stdout=said, stderr=failed, start_new_session=True
        )


def _logs(run: Run, place: Place) -> tuple[Path, Path]:
    return place.work / "logs" / f"{run.name}.out", place.work / "logs" / f"{run.name}.err"


def end(process: "subprocess.Popen[bytes]") -> None:
    """Asks a launcher to stop, and ends all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)


def measure(parts: Sequence[Part], place: Place) -> list[Row]:
    """Runs them side by side; a row each, none for what the deadline cut off."""
    used: list[list[float]] = []
    started = {run: (start(run, place), time.monotonic()) for run in Run.all_of(parts, place.gpus)}
    rows: dict[str, list[Row]] = {}
    looked = time.monotonic()
    try:
        while started:
            time.sleep(0.2)
            for run, (process, since) in list(started.items()):
                seconds = time.monotonic() - since
                if process.poll() is None and place.left > 0 and seconds < LONGEST_SECONDS:
                    continue
                is_over = process.poll() is None
                end(process)
                del started[run]
                if not is_over or place.left > 0:
                    why = f"ran past {LONGEST_SECONDS} s; " if is_over else ""
                    row = _finished(run, place, seconds, process.returncode, why)
                    cards = [run.card] if run.part.is_alone else list(range(place.gpus))
                    rows.setdefault(run.part.name, []).append(row | {"cards": cards})
            if time.monotonic() - looked > 5:
                looked = time.monotonic()
                used.append([float(mib) / 1024 for mib in nvidia("memory.used")])
    finally:
        for process, _ in started.values():
            end(process)
    found = [of_cards(each) for each in rows.values()]
    for row in found:
        row["beside"] = [part.name for part in parts if part.name != row["part"]]
        row["used_gib"] = [round(max(at[i] for at in used), 2) for i in row.pop("cards") if used and i < len(used[0])]
    return found


def of_cards(rows: Sequence[Row]) -> Row:
    """One row of those of the same run, each on a card of its own: means of their times; of all else, the first card's,
    or what failed."""
    rows = sorted(rows, key=lambda row: ("failed" not in row, row["cards"]))
    if len(rows) == 1 or "failed" in rows[0]:
        return rows[0]
    times = {key: round(statistics.fmean(row[key] for row in rows), 2) for key in ("ms", "mean_ms")}
    cards = [card for row in rows for card in row["cards"]]
    return rows[0] | times | {"ms_of_cards": [row["ms"] for row in rows], "cards": cards}


def _finished(run: Run, place: Place, seconds: float, status: int, why: str) -> Row:
    """The row of a run that has ended. Its folder is removed."""
    out, err = (path.read_text(encoding="utf-8", errors="replace") for path in _logs(run, place))
    row = _head(run.part, place) | {"run_seconds": round(seconds, 1), "said": said_of(out)}
    folder = place.work / "runs" / run.name
    if status or why:
        row["failed"] = why + last_lines(out + err, {str(place.work): "WORK", str(ROOT): "."})
    else:
        row |= figures_of([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        files = (folder / "checkpoints").rglob("*")
        row["checkpoint_bytes"] = sum(path.stat().st_size for path in files if path.is_file())
        row["weights"] = weights_of(row["said"])
    shutil.rmtree(folder, ignore_errors=True)
    return row


def _head(part: Part, place: Place) -> Row:
    gpus = 1 if part.is_alone else place.gpus
    accumulation = place.gpus if part.is_reference else 1
    told = {key: value for key, value in asdict(part).items() if key != "seconds"}
    told["strategy"] = _strategy(part, place)
    made = place.family / "weights_of"
    told["weights_of"] = made.read_text(encoding="utf-8") if made.is_file() else "tiny"
    return {"part": part.name, **told, "gpus": gpus, "accumulation": accumulation, "steps": place.steps}


# --- all of them ------------------------------------------------------------------------------------------------------


def nvidia(what: str) -> list[str]:
    """What nvidia-smi says of each card; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()


class Results:
    """The result file, as it is on disk."""

    def __init__(self, folder: Path, gpus: int, steps: int) -> None:
        cards = nvidia("name")
        card = re.sub(r"\W+", "_", cards[0].strip().lower()) if cards else "cpu"
        self.path = folder / f"launch_{card}.json"
        self.head = {
            "command": "python -m benchmarks.launch --work out/launch --out benchmarks/results",
            "machine": {"gpu": cards[0] if cards else "cpu", "gpus": gpus, "cpus": os.cpu_count()},
            "versions": {name: version(name) for name in ("torch", "accelerate", "diffusers", "peft")},
            "date": datetime.now(UTC).date().isoformat(),
            "steps": steps,
            "loss_tolerance": LOSS_TOLERANCE,
        }
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.rows: list[Row] = known.get("rows", [])
        self.all_reduce: dict[str, float] = known.get("all_reduce_ms", {})

    def add(self, rows: Sequence[Row]) -> None:
        """In the place of earlier rows of the same parts; writes the file, and prints what is new."""
        new = {(row["part"], row["weights_of"]) for row in rows}
        rows = replaced(self.rows, rows)
        order = list(PARTS)  # before them what is no longer measured
        places = {row["part"]: order.index(row["part"]) if row["part"] in PARTS else -1 for row in rows}
        self.rows = compared(sorted(rows, key=lambda row: places[row["part"]]), self.all_reduce)
        document = self.head | {"all_reduce_ms": self.all_reduce, "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        for row in self.rows:
            if (row["part"], row["weights_of"]) in new:
                print(json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True)


def chosen(results: Results, named: Sequence[str] | None) -> Iterator[list[Part]]:
    """What is still to be measured, of each group of ORDER."""
    known = {row["part"] for row in results.rows}
    for parts in ORDER:
        wanted = [part for part in parts if (part.name in named if named else part.name not in known)]
        if wanted:
            yield wanted


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.launch", description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="these alone, also where the result file has them")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--limit-seconds", type=float, default=570.0)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if options.gpus < 2 or options.steps < 4:
        parser.error("--gpus must be 2 or more, and --steps 4 or more")
    started = time.monotonic()
    work = options.work.resolve()
    results = Results(options.out, options.gpus, options.steps)
    wanted = list(chosen(results, options.parts))
    family = prepare(work, {part.data for parts in wanted for part in parts}, options.smoke)
    place = Place(work, family, options.gpus, options.steps, options.smoke, started + options.limit_seconds)
    left = []
    for parts in wanted:
        print(f"{time.monotonic() - started:.0f} s: {', '.join(part.name for part in parts)}", flush=True)
        if options.smoke and parts[0].strategy not in ("one_gpu", "ddp"):
            results.add([_head(part, place) | {"failed": ON_CPU} for part in parts])
        elif not options.smoke and place.left < max(part.seconds for part in parts):
            left += [part.name for part in parts]
        else:
            rows = measure(parts, place)
            results.add(rows)
            left += sorted({part.name for part in parts} - {row["part"] for row in rows})
    print(f"{time.monotonic() - started:.0f} s: {results.path.name} written; not measured: {', '.join(left) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
