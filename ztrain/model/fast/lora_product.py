"""Products of matrices with LoRAs, rounded once.

In bfloat16 what a young LoRA adds is less than half of the last bit of what it is added to: where a rounded product and
it are rounded together, it is lost (docs/speed.md). So both are summed before any is: on a CPU the product
is accumulated onto what the LoRA adds; on a GPU it is taken in float32, since cuBLAS rounds a product before it adds
what lies in its place (seen on an H200, CUDA 13). An operator, because a compiler would copy what is added to.

Legend: N tokens, i inputs, o outputs, r rank of a LoRA, sums over layers that read the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("ztrain::product_and_loras", mutates_args=())
def product_and_loras(x: Tensor, weight: Tensor, narrow: Tensor, bs: Sequence[Tensor]) -> Tensor:
    """(..., N, i), (sum o, i), (..., N, sum r), each layer's (o, r) -> x weight^T + narrow bs^T, (..., N, sum o).

    narrow: what the LoRAs' first matrices made of x, layer by layer; a layer without a LoRA has rank 0. All of one
    dtype. Gradients as autograd's own of the sum.
    """
    product = x.new_empty(*x.shape[:-1], len(weight))
    rows, flat = x.flatten(0, -2), product.flatten(0, -2)
    parts, of_layers = _by_layer(flat, narrow.flatten(0, -2), bs)
    if not (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)):
        for part, of_layer, b in zip(parts, of_layers, bs, strict=True):
            torch.mm(of_layer, b.t(), out=part)
        flat.addmm_(rows, weight.t())
        return product
    matrices = weight.split([len(b) for b in bs])
    for part, of_layer, b, matrix in zip(parts, of_layers, bs, matrices, strict=True):  # float32 of one at a time
        torch.add(torch.mm(rows, matrix.t(), out_dtype=torch.float32), of_layer @ b.t(), out=part)
    return product


@product_and_loras.register_fake
def _(x: Tensor, weight: Tensor, narrow: Tensor, bs: Sequence[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Sequence[Tensor]], output: Tensor) -> None:
    x, weight, narrow, bs = inputs
    of_x, of_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if of_weight else None, weight if of_x else None, narrow, *bs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    x, weight, narrow, *bs = ctx.saved_tensors
    of_x, of_weight, of_narrow, of_bs = ctx.needs_input_grad
    tokens, flat = gradient.shape[:-1], gradient.flatten(0, -2)  # (N, sum o)
    parts, of_layers = _by_layer(flat, narrow.flatten(0, -2), bs)
    return (
        (flat @ weight).unflatten(0, tokens) if of_x else None,
        flat.t() @ x.flatten(0, -2) if of_weight else None,
        torch.cat([part @ b for part, b in zip(parts, bs, strict=True)], dim=-1).unflatten(0, tokens)
        if of_narrow
        else None,
        [part.t() @ own if of_b else None for part, own, of_b in zip(parts, of_layers, of_bs, strict=True)],
    )


product_and_loras.register_autograd(_gradients, setup_context=_remember)


@register_flop_formula(torch.ops.ztrain.product_and_loras)
def _flops(x: Any, weight: Any, narrow: Any, bs: Any, *_: Any, **__: Any) -> int:
    """2 for each number that is multiplied and added; arguments are shapes here."""
    *tokens, inputs = x
    return 2 * torch.Size(tokens).numel() * (weight[0] * inputs + sum(outputs * rank for outputs, rank in bs))


def _by_layer(wide: Tensor, narrow: Tensor, bs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Of (N, sum o) and (N, sum r), each layer's columns."""
    return wide.split([b.shape[0] for b in bs], dim=-1), narrow.split([b.shape[1] for b in bs], dim=-1)
