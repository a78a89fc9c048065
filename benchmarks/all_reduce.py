"""How long the gradients of a list take over the wire alone, with nothing beside them to hide behind.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.all_reduce COUNT [COUNT ...]

In: numbers of trained weights, in float32 as ztrain keeps them. Out, on standard output: one line of JSON, {COUNT: ms},
the slowest process's median of TIMES all-reduces of exactly these bytes, in buckets of DDP's sizes that are asked for
one after the other, as DDP does. NCCL on GPUs, gloo on CPUs.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ztrain.strategy import KWARGS

BUCKET = KWARGS.bucket_cap_mb * 2**20
"""Bytes, as ztrain tells DistributedDataParallel, whose buckets end with whole parameters: they are a little larger."""
WARM_UPS, TIMES = 5, 20


def buckets_of(weights: int) -> list[int]:
    """Sizes, in weights, of the buckets that hold so many float32 gradients; they add up to `weights`."""
    sizes: list[int] = []
    left = weights
    while left > 0:
        sizes.append(min(left, BUCKET // 4))
        left -= sizes[-1]
    return sizes


def measure(weights: int, device: torch.device) -> float:
    """Milliseconds, on this process."""
    buckets = [torch.zeros(size, device=device) for size in buckets_of(weights)]
    taken = [_once(buckets, device) for _ in range(WARM_UPS + TIMES)]
    return 1e3 * statistics.median(taken[WARM_UPS:])


def _once(buckets: Sequence[Tensor], device: torch.device) -> float:
    dist.barrier()
    _wait(device)
    started = time.perf_counter()
    handles = [dist.all_reduce(bucket, async_op=True) for bucket in buckets]
    for handle in handles:
        handle.wait()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str]) -> None:
    is_cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if is_cuda else "gloo")
    device = torch.device("cuda", dist.get_rank()) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    slowest = torch.tensor([measure(int(count), device) for count in arguments], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(json.dumps(dict(zip(arguments, slowest.tolist(), strict=True))), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
