"""One training step of the transformer, ours beside diffusers and peft in the same run: time, memory, FLOPs, ceilings.

    python -m benchmarks.step [CASE ...] [--ways WAY ...] [--profile] [--out DIR] [--tiny | --miniature]

Random bf16 weights of the real size on one GPU: forward, backward and an AdamW step of the trained weights. Every case
is run by each way of WAYS, one after the other on an empty card, with the same weights, noise and prompts. Rows of
other cases and ways stay in the file, if machine and versions are the same; its date and ceilings are the last call's.
Out: step_<gpu>.json, {"command", "machine", "versions", "date", "ceilings_tflops", "rows"}; a row: case, way, ms
(median of STEPS after WARM_UPS, from CUDA events between steps that follow each other without a pause), spread (their
range), peak_gib, mfu (FLOPs that a step needs), hfu (FLOPs with what is computed again; None where blocks keep a part),
and, for ours, kept (blocks by what they keep), kernels and load (with --profile: milliseconds of the card by kind; its
power and clock), reference (the fastest other way) and ratio (ours / reference). FLOPs are of matrix products and
attention, counted with diffusers' blocks, not estimated. `--tiny`: a small model in float32 on the CPU: does everything
run? `--miniature`: the shipped family's size.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kernels import ceilings, kernel_times, load
from benchmarks.laboratory import machine
from ztrain.adapters import build_adapters
from ztrain.adapters.base import AdapterConfig
from ztrain.adapters.lora import LoraAdapterConfig
from ztrain.adapters.projector import ProjectorConfig
from ztrain.adapters.siglip import SiglipConfig
from ztrain.adapters.splice import SpliceConfig
from ztrain.conditioning import IMAGE, Encoded, TokenStates
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import PATCH, REAL_CONFIG, Keeping
from ztrain.model.fast.block import Keep
from ztrain.model.fast.blocks import slow_because, use_fast_blocks, use_stock_blocks
from ztrain.model.fast.budget import REPLAYED_TOKENS, Budget, Sizes, available_bytes, measure, use_growing_segments
from ztrain.model.fast.cuda_graphs import Replays

_CARD_GIB = 24.0
RESULTS = Path(__file__).parent / "results"
WARM_UPS, STEPS = 3, 10
ATTENTION = r"^layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)$"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """config: of the transformer; siglip: width of its features and sides of a grid; latent: pixels for each latent."""

    config: dict[str, Any]
    siglip: tuple[int, int]
    dtype: torch.dtype
    latent: int


REAL = Size(config=REAL_CONFIG, siglip=(1152, 16), dtype=torch.bfloat16, latent=8)
TINY = Size(
    config={
        "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 48,
        "axes_dims": [8, 12, 12], "axes_lens": [1536, 64, 64],
    },
    siglip=(32, 16), dtype=torch.float32, latent=64,
)  # fmt: skip
MINIATURE = Size(
    config=TINY.config | {"dim": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "cap_feat_dim": 128},
    siglip=(128, 8), dtype=torch.float32, latent=4,
)  # fmt: skip
"""That of the shipped weights, which `make demo` trains on."""


def _lora(rank: int, **settings: Any) -> LoraAdapterConfig:
    return LoraAdapterConfig(rank=rank, **settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """adapters: of a feature width; side: pixels; captions: tokens of each sample, and so the batch; keeps: of each
    block, or what fits into so many GiB, or, None, into the card. diffusers computes every block again, or none where
    EVERYTHING is kept."""

    adapters: Callable[[int], Sequence[AdapterConfig]]
    side: int = 1024
    captions: tuple[int, ...] = (128,)
    keeps: Keep | float | None = _CARD_GIB


def _attention_lora(width: int) -> Sequence[AdapterConfig]:
    return [_lora(16, target_modules=ATTENTION)]


CASES = {
    "lora_1024_b1_full_recompute": Case(adapters=_attention_lora, keeps=Keep.NOTHING),
    "lora_1024_b1_costly_kept": Case(adapters=_attention_lora, keeps=Keep.COSTLY),
    "lora_1024_b1_24gib": Case(adapters=_attention_lora),
    "lora_1024_b1_no_recompute": Case(adapters=_attention_lora, keeps=Keep.EVERYTHING),
    "lora_512_b1": Case(adapters=_attention_lora, side=512, keeps=Keep.EVERYTHING),
    "lora_default_1024_b1_24gib": Case(adapters=lambda width: [SpliceConfig(), _lora(32)]),
    "siglip_1024_b1_24gib": Case(adapters=lambda width: [SiglipConfig(feature_dim=width)]),
    "siglip_lora_1024_b1_24gib": Case(adapters=lambda width: [SiglipConfig(feature_dim=width), _lora(32)]),
    "projector_1024_b1_24gib": Case(adapters=lambda width: [ProjectorConfig()]),
    "lora_1024_b4": Case(adapters=_attention_lora, captions=(128,) * 4, keeps=Keep.EVERYTHING),
    "mixed_captions_b4": Case(adapters=_attention_lora, captions=(32, 64, 128, 256), keeps=Keep.EVERYTHING),
}


def _of_miniature(adapters: Callable[[int], Sequence[AdapterConfig]]) -> Case:
    return Case(adapters=adapters, side=64, captions=(20, 25, 28, 31) * 4, keeps=Keep.EVERYTHING)


MINIATURE_CASES = {
    "siglip_miniature_b16": _of_miniature(lambda width: [SiglipConfig(feature_dim=width)]),
    "siglip_lora_miniature_b16": _of_miniature(lambda width: [SiglipConfig(feature_dim=width), _lora(8)]),
    "splice_lora_miniature_b16": _of_miniature(lambda width: [SpliceConfig(), _lora(8)]),
    "projector_miniature_b16": _of_miniature(lambda width: [ProjectorConfig()]),
}


def _compile_stock(model: AdaptedDiT) -> None:
    use_stock_blocks(model.dit)
    for block in model.dit.layers:
        block.compile()


WAYS: dict[str, Callable[[AdaptedDiT], None]] = {
    "diffusers": lambda model: use_stock_blocks(model.dit),
    "diffusers_compiled": _compile_stock,
    "ztrain_eager": lambda model: None,
    "ztrain": lambda model: use_fast_blocks(model.dit, backend="inductor"),
}
"""diffusers: its blocks, and its whole forward too where a case has no SigLIP tokens, which that cannot lay out as ours
does. compiled: each block on its own, inside its recomputation; of diffusers' the main ones."""
SHOWN = ("diffusers", "diffusers_compiled", "ztrain")


# --- one step ---------------------------------------------------------------------------------------------------------


class Step:
    """A model and the inputs of a case, ready to be stepped."""

    def __init__(self, case: Case, way: str, size: Size, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "meta" else size.dtype  # meta has no autocast
        dit = _random_transformer(size.config, dtype, device)
        torch.manual_seed(1)
        self.model = AdaptedDiT(dit, build_adapters(list(case.adapters(size.siglip[0])))).to(device).train()
        if case.keeps != Keep.EVERYTHING:
            dit.enable_gradient_checkpointing()
        WAYS[way](self.model)
        self.kept: list[Keep] = []
        self.calls_dit = way.startswith("diffusers") and dit.siglip_refiner is None
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # Foreach is the default; a fused optimizer step would be the same for every way.
        self.optimizer = torch.optim.AdamW(self.trained, 1e-4)
        self.size, self.tokens = size, 0
        self.budget: Budget | None = None
        self.take(case, device)
        if way.startswith("ztrain"):
            self._keep(case.keeps, device)
        if way == "ztrain" and device.type == "cuda":
            self.model.execution.run = Replays(REPLAYED_TOKENS)

    def take(self, case: Case, device: torch.device) -> None:
        """Inputs of this case's size and captions, whatever its adapters."""
        (width, grid), side, batch = self.size.siglip, case.side // self.size.latent, len(case.captions)
        dit, dtype = self.model.dit, self.model.base_dtype
        features = dit.config.cap_feat_dim
        generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(2)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).to(device)

        text = [normal(length, features) for length in case.captions]
        reads_image = any(adapter.config.composes_reference for adapter in self.model.adapters)
        states = TokenStates(normal(64, features), torch.full((64,), IMAGE)) if reads_image else None
        siglip = [[normal(grid, grid, width)] if dit.siglip_refiner is not None else [] for _ in range(batch)]
        self.encoded = Encoded(
            text=text, null_text=text[0], reference=[states] * batch, fused=[states] * batch, siglip=siglip
        )
        self.noisy, self.target = normal(batch, 16, side, side), normal(batch, 16, side, side)
        self.sigma = torch.linspace(0.3, 0.7, batch, device=device)

    def _keep(self, keeps: Keep | float | None, device: torch.device) -> None:
        """As the case says, written down in `kept`."""
        if not isinstance(keeps, Keep) and device.type == "cuda":
            pending = 12 * sum(p.numel() for p in self.trained)  # gradients and moments
            available = available_bytes(device, keeps, pending)
            self.budget = Budget(self.sizes(device), available)

        def decide(tokens: int, blocks: int) -> Sequence[Keep]:
            if isinstance(keeps, Keep):
                return [keeps] * blocks
            # On a CPU nothing is measured: a bit of each, for the rehearsal.
            return self.budget(tokens, blocks) if self.budget else [Keep(i * 4 // blocks) for i in range(blocks)]

        def keeping(tokens: int, blocks: int) -> Sequence[Keep]:
            self.kept, self.tokens = list(decide(tokens, blocks)), tokens
            return self.kept

        self.model.execution.keeping = keeping

    def sizes(self, device: torch.device) -> Sizes:
        """What batches like the one it has take, measured on smaller ones."""
        before = self.model.execution.keeping
        found = measure(self._probe, len(self.model.dit.layers), device)
        self.model.zero_grad()
        self.model.execution.keeping = before
        return found

    def _probe(self, keeping: Keeping, is_larger: bool) -> Tensor:
        self.model.execution.keeping = keeping
        side = self.noisy.shape[-1] * (2 if is_larger else 1) // 8 * 2
        noisy, target = (each[..., :side, :side].contiguous() for each in (self.noisy, self.target))
        return F.mse_loss(self.model(noisy, self.sigma, self.encoded).float(), target.float())

    def velocity(self) -> Tensor:
        if not self.calls_dit:
            return self.model(self.noisy, self.sigma, self.encoded)
        # As ZImagePipeline calls it, with the captions that the adapters have made.
        conditioning = self.model.conditioning(self.encoded)
        with self.model.precision(self.noisy.device):
            output = self.model.dit(
                list(self.noisy.unsqueeze(2)), 1 - self.sigma, conditioning.caption, return_dict=False
            )[0]
        return -torch.stack([sample.squeeze(1) for sample in output])

    def run(self) -> None:
        F.mse_loss(self.velocity().float(), self.target.float()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self) -> list[float]:
        """Milliseconds of STEPS steps that follow each other."""
        for _ in range(WARM_UPS):
            self.run()
        marks: list[Any] = []
        for _ in range(STEPS + 1):
            if torch.cuda.is_available():
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(time.perf_counter())
            if len(marks) <= STEPS:
                self.run()
        _wait()
        if torch.cuda.is_available():
            return [start.elapsed_time(end) for start, end in pairwise(marks)]
        return [(end - start) * 1e3 for start, end in pairwise(marks)]


def _random_transformer(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            dit = diffusers.ZImageTransformer2DModel(**config)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in dit.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    return dit


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row_of(name: str, case: Case, way: str, size: Size, device: torch.device, profiles: bool) -> dict[str, Any]:
    """One row, without what needs the other ways."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    step = Step(case, way, size, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step.run()
    _wait()
    first = time.perf_counter() - start
    taken = step.timed()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    row: dict[str, Any] = {"case": name, "way": way, "ms": statistics.median(taken), "spread": max(taken) - min(taken)}
    row |= {"peak_gib": peak, "first_step_s": first}
    if way.startswith("ztrain"):
        row["slow_because"] = slow_because(step.model.dit)
        row["kept"] = {keep.name.lower(): step.kept.count(keep) for keep in Keep if keep in step.kept}
    if profiles:
        row["load"] = load(step.run, row["ms"])
        row["kernels"] = {kind: round(ms, 2) for kind, ms in kernel_times(step.run, steps=2).items()}
    return row


def count_flops(case: Case, size: Size) -> dict[str, int]:
    """FLOPs that a step of this case needs, and those that it launches, by diffusers' blocks without a compiler.

    On the meta device, where a step of the real size takes no memory and no time.
    """
    counted = {}
    step = Step(case, "diffusers", size, torch.device("meta"))
    step.calls_dit = False  # diffusers' forward asks tensors for their values
    for kind, again in (("needed", False), ("launched", case.keeps != Keep.EVERYTHING)):
        step.model.dit.gradient_checkpointing = again
        with FlopCounterMode(display=False) as flops:
            F.mse_loss(step.velocity().float(), step.target.float()).backward()
        counted[kind] = flops.get_total_flops()
    return counted


# --- all of them ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(SHOWN))
    parser.add_argument("--profile", action="store_true", help="kernels by kind, of every row of ours")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, a rehearsal; needs --out")
    parser.add_argument("--miniature", action="store_true", help="the shipped family's size on the CPU")
    options = parser.parse_args(arguments)
    use_growing_segments()
    is_real = not (options.tiny or options.miniature)
    size, cases = (MINIATURE, MINIATURE_CASES) if options.miniature else (TINY if options.tiny else REAL, CASES)
    if unknown := sorted(set(options.cases) - set(cases)):
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(cases)}")
    if options.tiny and options.out == RESULTS:
        parser.error("--tiny needs --out: its figures are no results")
    if is_real and not torch.cuda.is_available():
        parser.error("the real size needs a CUDA GPU; --tiny and --miniature run here")
    device = torch.device("cuda" if is_real else "cpu")
    dim, heads = (size.config.get(key, default) for key, default in (("dim", 3840), ("n_heads", 30)))
    tokens = 128 + (1024 // size.latent // PATCH) ** 2
    known = ceilings(tokens, dim, heads, size.dtype, device)
    document: dict[str, Any] = {
        "command": "python -m benchmarks.step" + (" --miniature --ways diffusers ztrain_eager" * options.miniature),
        "machine": machine(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "ceilings_tflops": {name: round(value, 3) for name, value in known.items()},
        "rows": [],
    }
    gpu = "miniature" if options.miniature else document["machine"]["device"].lower().replace(" ", "_")
    path = options.out / f"step_{gpu}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    order = list(cases)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if all(before[key] == document[key] for key in ("machine", "versions")):
            document["rows"] = [row for row in before["rows"] if row["case"] in cases]
    for name in options.cases or order:
        rows = compare(name, cases[name], options.ways, size, device, max(known.values()), options.profile)
        new = {(row["case"], row["way"]) for row in rows}
        document["rows"] = [row for row in document["rows"] if (row["case"], row["way"]) not in new] + rows
        document["rows"].sort(key=lambda row: order.index(row["case"]))
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


def compare(
    name: str, case: Case, ways: Sequence[str], size: Size, device: torch.device, ceiling: float, profiles: bool
) -> list[dict[str, Any]]:
    """The rows of one case, printed as they come. ceiling: TFLOP/s that count as the whole card."""
    flops = count_flops(case, size)
    rows: list[dict[str, Any]] = []
    for way in ways:
        row = row_of(name, case, way, size, device, profiles and way.startswith("ztrain"))
        seconds = row["ms"] / 1e3
        row |= {"mfu": flops["needed"] / seconds / 1e12 / ceiling, "hfu": flops["launched"] / seconds / 1e12 / ceiling}
        if list(row.get("kept", ())) not in ([], ["nothing"], ["everything"]):
            row["hfu"] = None
        row["tflop_needed"] = flops["needed"] / 1e12
        others = [other for other in rows if other["way"].startswith("diffusers")]
        if way.startswith("ztrain") and others:
            best = min(others, key=lambda other: other["ms"])
            row |= {"reference": best["way"], "ratio": row["ms"] / best["ms"]}
        rows.append({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
