"""The LoRA weights of many layers in one row, in the dtype of the products, made once for a forward pass.

peft trains float32 weights on a bfloat16 base. To convert each one where it is used takes two kernels and, backward,
two more, of hundreds of small matrices; together they take a handful. A row is also what a CUDA graph can read: its
gradient goes on to the weights outside of the graph.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ztrain.model.fast.block import Loras

Groups: TypeAlias = Sequence[Sequence[Any]]
"""Layers that read the same, together."""


class _Lora(NamedTuple):
    a: Tensor  # (r, inputs)
    b: Tensor  # (outputs, r)
    scale: float


def gathered(groups: Groups, dtype: torch.dtype) -> Tensor | None:
    """All LoRAs that are switched on, in one row; None where there are none."""
    found = [[lora for lora in map(_lora_of, layers) if lora is not None] for layers in groups]
    scales = [lora.scale for loras in found for lora in loras]
    if not scales:
        return None
    wide = [lora.b for loras in found for lora in loras]
    if any(scale != 1 for scale in scales):
        wide = list(torch._foreach_mul(wide, scales))
    rest = iter(wide)
    parts = [part for loras in found for part in [*(lora.a for lora in loras), *(next(rest) for _ in loras)]]
    return torch.cat([part.flatten() for part in parts]).to(dtype)


def spread(row: Tensor | None, groups: Groups) -> list[Loras | None]:
    """What each group has of a row that was gathered of the same."""
    if row is None:
        return [None] * len(groups)
    found = [[_lora_of(layer) for layer in layers] for layers in groups]
    shapes = [shape for loras in found for shape in _shapes([lora for lora in loras if lora is not None])]
    parts = row.split([shape.numel() for shape in shapes])
    rest = iter([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
    return [
        Loras(next(rest), tuple(None if lora is None else next(rest) for lora in loras)) if any(loras) else None
        for loras in found
    ]


def _shapes(loras: Sequence[_Lora]) -> list[torch.Size]:
    """Of the first matrices as one, and of each second."""
    if not loras:
        return []
    return [torch.Size((sum(len(lora.a) for lora in loras), loras[0].a.shape[1])), *(lora.b.shape for lora in loras)]


def _lora_of(layer: Any) -> _Lora | None:
    """The one LoRA that peft has put on a layer and that is switched on."""
    if type(layer) is nn.Linear or layer.disable_adapters:
        return None
    (name,) = layer.active_adapters
    return _Lora(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
