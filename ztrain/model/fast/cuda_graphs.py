"""The main blocks as CUDA graphs, for batches that a card computes faster than its host can ask for.

A step of 512 x 512 pixels is 2,000 kernels, which an H200 computes faster than its host asks for them one by one;
a graph asks for all at once. Graphs are recorded through torch.cuda.make_graphed_callables, one for each shape, when it
comes for the second time.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ztrain.model.fast.block import AttentionScope, Keep
from ztrain.model.fast.blocks import lora_row, run

_GRAPHS = 24
"""Shapes: captions of up to 768 tokens, padded to 32, beside one size of picture."""


class Replays:
    """`blocks.run` for blocks of which everything is kept, recorded where a batch has few tokens.

    most_tokens: of a batch, above which the card is busy anyway. Graphs share one pool of memory: only one is between
    its forward and its backward pass at any time.
    """

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._graphs: OrderedDict[tuple[Any, ...], Callable[..., Tensor]] = OrderedDict()
        self._pool: Any = None
        self._trained: int | None = None

    def __call__(
        self,
        layers: nn.ModuleList,
        x: Tensor,
        freqs: Tensor,
        seen: AttentionScope | None,
        modulation: Tensor | None,
        keeps: Sequence[Keep],
        read: int | None = None,
    ) -> Tensor:
        few = x.shape[0] * x.shape[1] <= self.most_tokens and min(keeps) == Keep.EVERYTHING
        if not few or not torch.is_grad_enabled() or not layers.training or modulation is None:
            return run(layers, x, freqs, seen, modulation, keeps, read)
        mask = None if seen is None else seen.mask
        seen = None if seen is None else AttentionScope(mask, None)  # no packing: hardly two batches have the same
        row = lora_row(layers, x)
        given = {"x": x, "freqs": freqs, "modulation": modulation, "row": row, "mask": mask}
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        key = (read, *((name, each.shape, each.dtype, each.requires_grad) for name, each in inputs.items()))
        self._seen[key] += 1
        if self._seen[key] == 1 or not self._gives_all_gradients(layers, row):
            return run(layers, x, freqs, seen, modulation, keeps, read, row)
        if key not in self._graphs:
            self._graphs[key] = self._recorded(_Blocks(layers, tuple(inputs), keeps, read), list(inputs.values()))
            if len(self._graphs) > _GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        if row is not None and row.dtype == torch.float32 and row.requires_grad:
            # A conversion copies. Without one the weights' gradients would be parts of the graph's own memory.
            row.register_hook(Tensor.clone)
        return self._graphs[key](*inputs.values())

    def _gives_all_gradients(self, layers: nn.ModuleList, row: Tensor | None) -> bool:
        """A graph's gradient of a weight would be the graph's own memory, which its next replay overwrites: it has only
        those of its inputs, among them the row of all LoRAs."""
        if self._trained is None:
            self._trained = sum(p.numel() for p in layers.parameters() if p.requires_grad)
        return self._trained == (0 if row is None else row.numel())

    def _recorded(self, blocks: "_Blocks", inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
        samples = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        kind = samples[0].device.type
        # What autocast keeps of weights would be memory of the graph.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            return torch.cuda.make_graphed_callables(blocks, samples, pool=self._pool, allow_unused_input=True)


class _Blocks(nn.Module):
    """As a function of tensors alone, those of `names`."""

    def __init__(self, layers: nn.ModuleList, names: Sequence[str], keeps: Sequence[Keep], read: int | None) -> None:
        super().__init__()
        self.layers, self.names, self.keeps, self.read = layers, names, list(keeps), read

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        seen = AttentionScope(given["mask"], None) if "mask" in given else None
        states, rest = (given["x"], given["freqs"], seen, given["modulation"]), (self.keeps, self.read)
        return run(self.layers, *states, *rest, given.get("row"))
