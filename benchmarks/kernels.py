"""Where the time of a step goes: what ran on its device, by category.

`kernel_times(run)` gives milliseconds per step of every category, launches per step and, on a GPU, the milliseconds in
which nothing ran there; `slowest(run)` names what took the most. `record(run)` is for who wants both of the same steps.
`ceilings` tells how fast the device is at a block's products alone, `load` whether it runs at its limits.
Without CUDA they tell of PyTorch's operators, each by its own time on the CPU.
"""

import math
import re
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_TABLE = (
    # Names that hold other categories' words: what inductor fused, and collectives.
    ("reductions", r"^triton_(red|per|spl|unk)_"),  # unk: cooperative ones, which inductor cannot name
    ("elementwise", r"^triton_(poi|for)_"),
    ("attention", r"^triton_tem_.*attention"),
    ("matrix products", r"^triton_(tem|\w*mm)_"),
    ("other", r"nccl"),
    # Kernels, and the operators that are named alike.
    ("optimizer", r"multi_tensor_apply|lpnorm_cleanup|fused_?adam|_foreach_|kOptimizer"),
    ("matrix products", r"implicit_gemm"),  # a convolution, also where cuDNN's
    ("attention", r"cudnn.*(sdpa|fprop|bprop)|cudnn::fusion::(compute_dot_do_o|convert_dq)"),
    ("attention", r"flash|fmha|\bmha|attention|attn"),
    ("matrix products", r"nvjet|gemm|gemv|xmma|cutlass|cublas|splitk"),
    ("copies", r"memcpy|memset|(?<!index_)copy_kernel|CatArrayBatchedCopy|chunk_cat|split_with_sizes_copy"),
    ("reductions", r"reduce_kernel|DeviceReduce|DeviceScan|norm(?!al)|GammaBeta|RowwiseMoments|softmax|welford"),
    ("elementwise", r"elementwise|index|gather|scatter|embedding|dropout|distribution|tri[ul]_"),
    # The other operators, of a CPU.
    ("matrix products", r"^aten::(_?(scaled_|grouped_)?(add|b|addb|badd)?mm|(add)?mv|dot|linear|matmul|einsum)\b"),
    ("matrix products", r"^aten::\w*conv(olution|[123]d)"),
    ("copies", r"^aten::(copy_|_to_copy|to|clone|contiguous|cat|stack)$"),
    ("reductions", r"^aten::(sum|mean|var|std|prod|cumsum|logsumexp|(arg|a)?(min|max))$"),
    ("elementwise", r"^aten::(add|sub|rsub|mul|div|neg|abs|pow|square|addcmul|addcdiv|lerp|clamp)_?$"),
    ("elementwise", r"^aten::(exp|log|sin|cos|r?sqrt|reciprocal|sigmoid|tanh|silu|gelu|relu|mse_loss)(_|_backward)?$"),
    ("elementwise", r"^aten::(where|masked_fill|fill|zero|normal|uniform|eq|ne|lt|le|gt|ge|logical_\w+)_?$"),
)
_PATTERNS = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in _TABLE]
CATEGORIES = ("matrix products", "attention", "optimizer", "copies", "reductions", "elementwise", "other")


def category(name: str) -> str:
    """Of CATEGORIES, that of a kernel or operator: the first of the table that fits."""
    return next((found for found, pattern in _PATTERNS if pattern.search(name)), "other")


@dataclass(frozen=True, slots=True)
class Recording:
    """What ran on the device in some steps."""

    ran: Sequence[tuple[str, float]]
    """Name and milliseconds of each launch."""
    steps: int
    idle: float | None
    """Milliseconds per step in which nothing ran there; unknown of a CPU."""

    def times(self) -> dict[str, float]:
        """Per step: milliseconds of every category, launches, and idle milliseconds where they are known."""
        times = dict.fromkeys(CATEGORIES, 0.0)
        for name, ms in self.ran:
            times[category(name)] += ms / self.steps
        times["launches"] = len(self.ran) / self.steps
        return times if self.idle is None else times | {"idle": self.idle}

    def slowest(self, count: int = 20) -> list[tuple[str, float, float]]:
        """Of the names with the most time: milliseconds and launches per step."""
        spent: defaultdict[str, list[float]] = defaultdict(list)
        for name, ms in self.ran:
            spent[name].append(ms)
        rows = [(name, sum(each) / self.steps, len(each) / self.steps) for name, each in spent.items()]
        return sorted(rows, key=lambda row: -row[1])[:count]


def kernel_times(run: Callable[[], object], steps: int = 3) -> dict[str, float]:
    return record(run, steps).times()


def slowest(run: Callable[[], object], count: int = 20, steps: int = 3) -> list[tuple[str, float, float]]:
    return record(run, steps).slowest(count)


def record(run: Callable[[], object], steps: int = 3) -> Recording:
    """Runs it 2 * steps + 1 times: to warm up, for the wall time without a profiler, which makes launches slow, and
    under the profiler."""
    assert steps > 0
    on_gpu = torch.cuda.is_available()
    run()
    wall = _wall(run, steps) if on_gpu else None
    # Of a GPU's step no operators: they are not asked for, and reading them back takes longer than all steps.
    activity, device = (ProfilerActivity.CUDA, DeviceType.CUDA) if on_gpu else (ProfilerActivity.CPU, DeviceType.CPU)
    with profile(activities=[activity], acc_events=True) as profiler:
        _wall(run, steps)
    # Annotations span what others did.
    events = [event for event in profiler.events() if event.device_type == device and not event.is_user_annotation]
    if wall is None:
        return Recording([(event.name, event.self_cpu_time_total / 1e3) for event in events], steps, None)
    if not events:
        raise RuntimeError("the profiler saw nothing run on the GPU: is the model there, and may CUPTI be used?")
    spans = [(event.time_range.start / 1e3, event.time_range.end / 1e3) for event in events]
    ran = [(event.name, end - start) for event, (start, end) in zip(events, spans, strict=True)]
    return Recording(ran, steps, max(0.0, (wall - covered(spans)) / steps))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line these spans, (start, end), cover; where they overlap, once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def ceilings(tokens: int, dim: int, heads: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """TFLOP/s of a device's matrix products and attention at the shapes of a Z-Image block, each by itself."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, qkv, w13 = normal(tokens, dim), normal(3 * dim, dim), normal(int(dim / 3 * 8) * 2, dim)
    query = normal(1, heads, tokens, dim // heads)
    work: dict[str, tuple[Callable[[], object], int]] = {
        "one_projection": (lambda: F.linear(x, qkv[:dim]), 2 * tokens * dim * dim),
        "fused_qkv": (lambda: F.linear(x, qkv), 2 * tokens * dim * 3 * dim),
        "fused_w1_w3": (lambda: F.linear(x, w13), 2 * tokens * dim * len(w13)),
        "attention": (lambda: F.scaled_dot_product_attention(query, query, query), 4 * tokens * tokens * dim),
    }
    found = {}
    for name, (run, flops) in work.items():
        _wall(run, 3)
        found[name] = flops * 10 / _wall(run, 10) / 1e9  # of milliseconds
    return found


def _wall(run: Callable[[], object], steps: int) -> float:
    """Milliseconds of all steps."""
    _wait()
    start = time.perf_counter()
    for _ in range(steps):
        run()
    _wait()
    return (time.perf_counter() - start) * 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


_ASKED = {"watts": "power.draw.instant", "watts_limit": "power.limit", "mhz": "clocks.sm", "mhz_limit": "clocks.max.sm"}
LOAD_SECONDS = 2.0


def load(run: Callable[[], object], ms: float) -> dict[str, float] | None:
    """Power and clock of the GPU beside steps of so many milliseconds, medians, and what they are limited to; None
    where no nvidia-smi tells."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    card = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    words = [f"--query-gpu={','.join(_ASKED.values())}", "--format=csv,noheader,nounits", "--loop-ms=100"]
    asking = subprocess.Popen(["nvidia-smi", f"--id={card}", *words], stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(math.ceil(1e3 * LOAD_SECONDS / ms)):
            run()
        torch.cuda.synchronize()
    finally:
        asking.terminate()
        said = asking.communicate()[0]
    told = [figures for line in said.splitlines() if len(figures := re.findall(r"[\d.]+", line)) == len(_ASKED)]
    if not told:
        return None
    late = zip(*told[len(told) // 2 :], strict=True)  # power needs a while to rise
    return {name: statistics.median(map(float, column)) for name, column in zip(_ASKED, late, strict=True)}
