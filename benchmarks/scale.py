"""docs/scale.md: one epoch of 100 million triplets on 64 cards, from measured constants; what breaks first.

    python -m benchmarks.scale

In: ztrain/plan/expected.py (constants of an H200), and of benchmarks/results: scale_host.json, made by scale_host.py,
train_real_size_nvidia_h200.json and, once it is there, launch_nvidia_h200.json. Out: docs/scale.md between its marks.
Every figure is of a named constant, or stands under "assumed". Nobody has run 64 cards.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cards import LISTS, changed, compared, config_of, counted_of, launched, list_name
from benchmarks.pages import ROOT, write_page
from ztrain.config import Config
from ztrain.frozen.states import SIGLIP, VISION_LANGUAGE, models_of
from ztrain.model.fast.budget import BUCKET_MIB
from ztrain.plan.cards import CARDS
from ztrain.plan.command import Plan, plan
from ztrain.plan.expected import LINK_SHARE, PROMPT_TOKENS, WAITING, Tokens, Traffic, step_seconds, traffic
from ztrain.plan.footprint import Counted, Cut

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "scale.md"
TRIPLETS, NODES, CARDS_A_NODE = 100_000_000, 8, 8
ALL_CARDS = NODES * CARDS_A_NODE
SIDES = (512, 1024)
BATCHES = {512: 4, 1024: 1}
"""Of a card: about as many tokens at both sizes."""
ENCODER_SHARE = 0.3
"""Assumed: of the peak rate that encoders reach one picture at a time."""
NETWORKS = {"400 Gb/s a node": 50.0, "100 Gb/s a node": 12.5}  # 10^9 bytes/s, one direction
NODE_RAM_GB = 2_000.0
"""Assumed: of a node of eight H200, as a DGX H200 has."""
SHARED_STORE_GB_S = 2.0
"""Assumed: what one node reads from a shared file system, 10^9 bytes/s."""
LANGUAGE_NUMBERS, VISION_NUMBERS, SIGLIP_NUMBERS = 36 * 100.9e6, 415.3e6, 427.9e6
"""zimage_facts.md 1.1: 36 layers of Qwen3-4B, Qwen3-VL's visual part, SigLIP2."""


def gb(count: float) -> str:
    return f"{count / 1e12:.0f} TB" if count >= 1e13 else f"{count / 1e9:.2f} GB"


@dataclass(frozen=True, slots=True)
class Case:
    """One list at one size on 64 cards by DDP, a micro-step an optimizer step."""

    name: str
    config: Config
    counted: Counted

    @classmethod
    def of(cls, name: str, side: int) -> "Case":
        train = {"train_batch_size": BATCHES[side], "gradient_accumulation_steps": 1}
        config = changed(config_of(name), data={"resolution": side}, train=train)
        return cls(name, config, counted_of(name))

    def on(self, card: str) -> Plan:
        return plan(self.config, strategy="ddp", cards=ALL_CARDS, card=CARDS[card], counted=self.counted)

    def sent(self, steps: int = 1) -> Traffic:
        """In one micro-step of `steps` to an optimizer step."""
        config = changed(self.config, train={"gradient_accumulation_steps": steps})
        return traffic(self.counted, config, Cut(strategy="ddp", cards=ALL_CARDS))

    def efficiency(self, gb_s: float, steps: int = 1) -> float:
        """A ring over all cards passes each node's network once. DDP waits as long as on two cards."""
        computing = self.on("h200").computing
        return computing / step_seconds(computing, self.sent(steps), gb_s, WAITING["ddp"])


# --- the parts of the page --------------------------------------------------------------------------------------------


def computing(cases: dict[tuple[str, int], Case]) -> str:
    heads = [f"{card}, {side} px" for card in ("h200", "h100", "a100_80") for side in SIDES]
    lines = [f"| GPU-hours (days on 64) | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, label in LISTS.items():
        cells = []
        for card in ("h200", "h100", "a100_80"):
            for side in SIDES:
                made = cases[name, side].on(card)
                hours = TRIPLETS * made.computing / made.batch / 3600
                cells.append(f"{hours:,.0f} ({hours / ALL_CARDS / 24:.1f})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    told = "H200: computed from `ztrain/plan/expected.py` (cost_nvidia_h200.json rate_tflops, and what blocks keep)"
    words = (
        "H100 and A100 by the ratio of their sheets. All cards computing all the time: no sum of gradients, no waits"
    )
    return "\n".join([*lines, "", f"{told}; {words}."])


def entry_bytes(config: Config) -> dict[str, int]:
    """Bytes of each state of one triplet, by the shapes and types that ztrain/cache/fill.py writes: latents float32
    (16, side / 8, side / 8), text and spliced states bf16 (tokens, 2560) with a byte of kind each, SigLIP bf16
    (16, 16, 1152)."""
    side = config.data.resolution // 8
    found = {"latents": 16 * side * side * 4, "text": PROMPT_TOKENS * 2560 * 2}
    if VISION_LANGUAGE in models_of(config.reads):
        found["reference"] = (config.encoders.max_reference_pixels // 1024 + 2 + 8) * (2560 * 2 + 1)
    if SIGLIP in models_of(config.reads):
        found["siglip"] = 256 * 1152 * 2
    return found


def encoder_flops(side: int, config: Config) -> dict[str, float]:
    """FLOPs of each state of one triplet. The VAE's are counted by operation on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            vae.encode(torch.empty(1, 3, side, side))
    found = {"latents": float(flops.get_total_flops()), "text": 2 * LANGUAGE_NUMBERS * PROMPT_TOKENS}
    if VISION_LANGUAGE in models_of(config.reads):
        tokens = config.encoders.max_reference_pixels // 1024
        found["reference"] = 2 * LANGUAGE_NUMBERS * (tokens + 10) + 2 * VISION_NUMBERS * 4 * tokens
    if SIGLIP in models_of(config.reads):
        found["siglip"] = 2 * SIGLIP_NUMBERS * 256
    return found


def caching(cases: dict[tuple[str, int], Case], whole: dict[str, Any]) -> str:
    lines = [
        "| list, px | KB of a triplet, by state | the cache | read a second: each node, all | days to fill, 64 H200 |",
        "|---|---|---|---|---|",
    ]
    for name in LISTS:
        for side in SIDES:
            case = cases[name, side]
            sizes, made = entry_bytes(case.config), case.on("h200")
            flops = sum(encoder_flops(side, case.config).values())
            days = TRIPLETS * flops / (CARDS["h200"].tflops * 1e12 * ENCODER_SHARE) / ALL_CARDS / 86400
            of_triplet, a_second = sum(sizes.values()), made.batch * ALL_CARDS / made.computing
            each = ", ".join(f"{state} {count / 1e3:.0f}" for state, count in sizes.items())
            read = f"{of_triplet * a_second / NODES / 1e9:.2f}, {of_triplet * a_second / 1e9:.2f} GB"
            lines.append(f"| {LISTS[name]}, {side} | {each} | {gb(of_triplet * TRIPLETS)} | {read} | {days:.1f} |")
    rows = {row["list"]: row["said"] for row in whole["caching"]}
    return "\n".join(
        [
            *lines,
            "",
            "Bytes: shapes and types of `ztrain/cache/fill.py`, every triplet with a prompt, reference and target of"
            " its own; a prompt or picture that stands in many is stored once. Days: FLOPs counted, at"
            f" {ENCODER_SHARE:.0%} of the peak (assumed). Measured is only a small set, loading counted:"
            f' "{rows["splice_lora"]}" (train_real_size_nvidia_h200.json, caching).',
        ]
    )


def sums(cases: dict[tuple[str, int], Case]) -> str:
    lines = [
        "| list | bytes of gradients | NVLink, ms | 400 Gb/s, ms | 100 Gb/s, ms | efficiency at 1024 px, 400 Gb/s |"
        " 100 Gb/s | 100 Gb/s, 4 micro-steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, label in LISTS.items():
        case = cases[name, 1024]
        sent = case.sent()
        rates = (CARDS["h200"].link_gb_s, *NETWORKS.values())
        times = " | ".join(f"{sent.bytes / (rate * 1e9 * LINK_SHARE) * 1e3:.0f}" for rate in rates)
        fast, slow = NETWORKS.values()
        shares = (case.efficiency(fast), case.efficiency(slow), case.efficiency(slow, 4))
        cells = " | ".join(f"{share:.2f}" for share in shares)
        lines.append(f"| {label} | {gb(4.0 * case.counted.trained)} | {times} | {cells} |")
    return "\n".join(
        [
            *lines,
            "",
            f"A ring over {ALL_CARDS} cards: each sends 2 (N - 1) / N of the gradients, float32, at {LINK_SHARE:.0%} of"
            " the sheet's rate (`LINK_SHARE`: measured on NVLink, assumed elsewhere); the ring passes each node's"
            " network once. Nothing hides the sums of `[siglip]` and `[projector]`, whose weights lie before the main"
            " blocks, so that their gradients come last; a LoRA's go beside the backward pass, but for the last"
            f" {BUCKET_MIB} MiB. Efficiency counts what is not hidden and the {WAITING['ddp'] * 1e3:g} ms a"
            " micro-step that DDP took besides on two H200 (`WAITING`): no stragglers, no waits for data.",
            "",
            measured(launched(RESULTS)),
        ]
    )


def measured(rows: Sequence[dict[str, Any]]) -> str:
    """What DDP did beside one card, as far as anybody has measured: within one run, and rows that differ in nothing
    else. The other strategies stand in docs/cards.md."""
    lines = [
        "| measured, H200 | blocks computed again | cards | ms a step | efficiency | sum of gradients, ms |"
        " waiting for data, ms |",
        "|---" * 7 + "|",
    ]
    shown = [row for row in rows if row.get("alternates")]
    shown += [row for keeps in ("off", "on") for row in compared(rows, keeps=keeps)]
    for row in [row for row in shown if row["strategy"] in ("one_gpu", "ddp")]:
        turns = " (beside steps that send nothing)" if row.get("alternates") else ""
        label = (
            f"| {LISTS[list_name(row['list'])]}, {row['strategy']}{turns} | {_AGAIN[row['keeps']]} | {row['gpus']} |"
        )
        rest = " | ".join(_told(row.get(key), digits) for key, digits in _COLUMNS)
        lines.append(f"{label} failed | | | |" if "failed" in row else f"{label} {rest} |")
    if len(lines) == 2:
        lines.append("| not measured (launch_nvidia_h200.json) | | | | | | |")
    return "\n".join(lines)


_AGAIN = {"off": "none", "on": "all"}


_COLUMNS = (("ms", 0), ("efficiency", 3), ("all_reduce_ms", 1), ("data_wait_ms", 2))


def _told(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


STAGES = ("digests_seconds", "samples_seconds", "needs_seconds", "index_seconds", "tokens_seconds")
"""Of a start, of scale_host.json."""


@dataclass(frozen=True, slots=True)
class Host:
    """What one process takes before its first step, for TRIPLETS."""

    ram_gb: float
    order_gb: float
    hours: float
    turn_hours: float
    hashing_hours: float
    order_seconds: float

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Host":
        """In proportion to the data set with the most pictures, the order to 4 million, and time to `ztrain train` on
        the two largest: all of it grows so, or faster."""
        each, order = document["per_triplet"], document["order"]
        trained = [row for row in document["rows"] if "ready_seconds" in row.get("train", {})]
        less, more = sorted(trained, key=lambda row: int(row["triplets"]))[-2:]
        grown = more["train"]["ready_seconds"] - less["train"]["ready_seconds"]
        turn = more["train_of_two"]["ready_seconds"] - more["train"]["ready_seconds"]
        return cls(
            ram_gb=each["process_bytes"] * TRIPLETS / 1e9,
            order_gb=2 * order["bytes_each"] * TRIPLETS / 1e9,
            hours=grown / (more["triplets"] - less["triplets"]) * TRIPLETS / 3600,
            turn_hours=turn / more["triplets"] * TRIPLETS / 3600,
            hashing_hours=each["hash_seconds"] * TRIPLETS / 3600,
            order_seconds=order["by_tokens_seconds"] / order["samples"] * TRIPLETS,
        )


def breaks(cases: dict[tuple[str, int], Case], host: Host, whole: dict[str, Any]) -> str:
    """What fails, worst first: by how many times it is too much."""
    sizes = {name: sum(entry_bytes(cases[name, 1024].config).values()) for name in LISTS}
    largest = max(sizes, key=lambda name: sizes[name])
    shards = TRIPLETS // cases[largest, 1024].config.cache.entries_per_shard
    slow = NETWORKS["100 Gb/s a node"]
    made = cases[largest, 1024].on("h200")
    read = sizes[largest] * CARDS_A_NODE / made.computing / 1e9
    part = 0.5 * NODE_RAM_GB / CARDS_A_NODE / host.ram_gb * TRIPLETS / 1e6
    rows = [
        (
            "RAM of a node: lists of samples, index, digests",
            f"{host.ram_gb:,.0f} GB a process, {host.ram_gb * CARDS_A_NODE / 1e3:.1f} TB for eight",
            f"{host.ram_gb * CARDS_A_NODE / NODE_RAM_GB:.1f} x the {NODE_RAM_GB / 1e3:g} TB of a node (assumed)",
            f"train on parts: data sets of {part:.0f} million triplets fit half of it; a reader that leaves rows on"
            " disk is not built",
        ),
        (
            "time before the first step",
            f"{host.hours:.1f} h once all is known, {host.turn_hours:.1f} h more as the others wait for the first"
            f" process; {host.hashing_hours:.0f} h more the first time, without the disk's own",
            f"{(host.hours + host.turn_hours + host.hashing_hours) * ALL_CARDS:,.0f} GPU-hours idle",
            "fill the cache first on CPU nodes; digests are kept beside it, so that only the shorter time comes back",
        ),
        (
            f"disk for the cache, {LISTS[largest]} at 1024 px",
            f"{gb(sizes[largest] * TRIPLETS)}, {3 * shards / 1e6:.1f} million shards",
            "a file system of its own, and one that bears the number of files",
            "cache.entries_per_shard 4096; 512 px, or fewer prompts and references, each stored once",
        ),
        (
            "the network: sum of `[siglip]`'s gradients",
            f"{cases['siglip', 1024].sent().exposed / (slow * 1e9 * LINK_SHARE) * 1e3:.0f} ms at 100 Gb/s, all exposed",
            f"efficiency {cases['siglip', 1024].efficiency(slow):.2f}",
            f"train.gradient_accumulation_steps 4: {cases['siglip', 1024].efficiency(slow, 4):.2f}; 400 Gb/s:"
            f" {cases['siglip', 1024].efficiency(NETWORKS['400 Gb/s a node']):.2f}",
        ),
        (
            "reading the cache",
            f"{read:.2f} GB/s a node",
            f"{read / SHARED_STORE_GB_S:.2f} of {SHARED_STORE_GB_S:g} GB/s (assumed)",
            f"nothing: a run waited {max(r['data_wait_share'] for r in whole['rows']):.2%} of its time for data"
            " (train_real_size_nvidia_h200.json data_wait_share, one card, a local disk)",
        ),
        (
            "the order of an epoch",
            f"{host.order_seconds:.0f} s, {host.order_gb:.1f} GB a process (two epochs at 8 bytes)",
            "once an epoch",
            "nothing",
        ),
    ]
    lines = ["| what | how much | too much by | what to do |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def starts(document: dict[str, Any]) -> str:
    """What was measured of data sets of several sizes, each part of it beside the others."""
    heads = (
        "triplets", "targets, references", "rows, digests, index, tokens", "`ztrain train` until step 1", "two ranks",
        "`ztrain cache`, full", "`data_tools.build`",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in document["rows"]:
        cells = [f"{row['triplets']:,}", f"{row['pictures']:,} each", "not measured"]
        if found := row.get("stages"):
            seconds = sum(found[name] for name in STAGES)
            cells[2] = f"{seconds:.0f} s, {found['process_bytes'] / 1e9:.2f} GB"
        for part in ("train", "train_of_two", "cache", "build"):
            cells.append(_part(row[part], 1 + (part == "train_of_two")) if part in row else "not measured")
        lines.append(f"| {' | '.join(cells)} |")
    told = document["machine"]
    where = (
        f"{told['cpu_cores']} cores, torch {told['torch']}; no card took part; parts ran side by side, also of several"
        " rows; peaks are of each process"
    )
    what = document["what"]
    return "\n".join([*lines, "", f"{where}. {what[0].upper()}{what[1:]}.", "", builds(document)])


def _part(found: dict[str, Any], processes: int) -> str:
    """Seconds, until step 1 where there is one, and the peaks of the largest processes."""
    peaks = " and ".join(f"{peak / 1e9:.2f}" for peak in found.get("peak_bytes", [])[:processes])
    if "failed" in found:
        return f"{found['failed']}, {peaks} GB by then" if found["failed"].startswith("not done") else "failed"
    return f"{found.get('ready_seconds', found['seconds']):.0f} s{f', {peaks} GB' if peaks else ''}"


def builds(document: dict[str, Any]) -> str:
    """What builds of triplets with pictures of their own took, for each triplet, and where."""
    done = [row for row in document["rows"] if row["pictures"] == row["triplets"] and "seconds" in row.get("build", {})]
    told = [
        f"{1e3 * row['build']['seconds'] / row['triplets']:.2f} ms and"
        f" {row['build']['peak_bytes'][0] / row['triplets'] / 1e3:.1f} KB of the largest process at {row['triplets']:,}"
        f" ({row['build'].get('where', str(row['build']['workers']) + ' workers')})"
        for row in done
        if "failed" not in row["build"]
    ]
    stopped = [
        f" One of {row['triplets']:,} was {row['build']['failed']} ({row['build']['where']})."
        for row in done
        if "failed" in row["build"]
    ]
    return f"A build of triplets with pictures of their own takes, for each: {'; '.join(told)}.{''.join(stopped)}"


def text() -> str:
    cases = {(name, side): Case.of(name, side) for name in LISTS for side in SIDES}
    read = {
        name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("scale_host", "train_real_size_nvidia_h200")
    }
    host, whole = Host.of(read["scale_host"]), read["train_real_size_nvidia_h200"]
    tokens = {side: Tokens.of(cases["siglip", side].config).all for side in SIDES}
    told = " and ".join(f"{side} px, batch {BATCHES[side]} a card ({tokens[side]} tokens each)" for side in SIDES)
    parts = (
        ("What breaks first", breaks(cases, host, whole)),
        ("Before the first step, measured", starts(read["scale_host"])),
        ("Computing, one epoch", computing(cases)),
        ("The cache", caching(cases, whole)),
        ("Sums of gradients", sums(cases)),
    )
    head = f"{TRIPLETS:,} triplets, {NODES} nodes of {CARDS_A_NODE} cards, DDP; {told}, of `[siglip]`."
    return "\n\n".join([head, *(f"### {title}\n\n{part}" for title, part in parts)])


if __name__ == "__main__":
    write_page(PAGE, text())
