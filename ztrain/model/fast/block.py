"""What one block of the transformer computes, in few kernels, and what of it is kept for its backward pass.

`compute` is ZImageTransformerBlock.forward in basic mode (transformer_z_image.py, diffusers 0.42.1) with less traffic:
RMSNorm is one kernel; a norm's weight and what modulates or gates it are one factor, made before the block; matrices
that share their input are one product where they lie side by side (storage.py), unless they are rounded differently;
LoRAs that share their input share one product with it. It takes tensors and numbers alone, so that one compiled
function serves all blocks.

Legend: B batch, N tokens, S tokens of all samples, d model width, r LoRA rank.
"""

import functools
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ztrain.model.fast.lora_product import product_and_loras


class Keep(IntEnum):
    """What a block keeps of its forward pass besides its input; the rest is computed again for the backward pass."""

    NOTHING = 0
    COSTLY = 1
    """What takes most FLOPs for its bytes: attention, and products that sum over more than the model's width."""
    PRODUCTS = 2
    """All products of the base, and attention; what lies between them is computed again."""
    EVERYTHING = 3
    """What the compiler wants, or autograd."""


class Packing(NamedTuple):
    """Samples of different lengths one after the other, in one row."""

    lengths: tuple[int, ...]  # of each sample
    places: Tensor  # (S,), of each token in the rows as they lie one after the other
    samples: Tensor  # (S,), whose token it is


class AttentionScope(NamedTuple):
    """Two equal descriptions of rows that samples fill to different lengths. A mask turns fast kernels off, and padding
    is computed; packing puts samples one after the other, with one call of attention for each."""

    mask: Tensor  # (B, N) bool, or a bias that broadcasts to (B, heads, N, N)
    packing: Packing | None
    """None where the mask says more, or there are many samples."""


class Factors(NamedTuple):
    """What the four norms' outputs are multiplied with, (B or 1, 1, d): weight times modulation or gate."""

    into_attention: Tensor
    out_of_attention: Tensor
    into_feed_forward: Tensor
    out_of_feed_forward: Tensor


class Loras(NamedTuple):
    """Of layers that read the same, in the dtype of the products."""

    a: Tensor  # (sum of their r, inputs)
    bs: tuple[Tensor | None, ...]
    """Of each layer, (outputs, r), times its scale; None where it has no LoRA."""


class Linears(NamedTuple):
    """Layers that read the same: each one's matrix (outputs, inputs), or one matrix of all; their LoRAs."""

    weights: tuple[Tensor, ...]
    loras: Loras | None
    layers: int


class Norm(NamedTuple):
    weight: Tensor
    eps: float


class Weights(NamedTuple):
    """Of one block."""

    qkv: Linears
    out: Linears
    w1_w3: Linears
    w2: Linears
    norm_q: Norm
    norm_k: Norm
    heads: int
    eps: tuple[float, float, float, float]
    """Of the norms before and after attention, before and after the feed-forward."""


def compute_keeping(keep: str, weights: Weights, x: Tensor, read: Tensor, *rest: Any) -> Tensor:
    """`compute`, of which no more is kept for the backward pass than `keep` says.

    keep: the name of a `Keep`. Of a number the compiler would make a symbol, which is equal to none of them.
    """
    if keep == "EVERYTHING" or not torch.is_grad_enabled():
        return compute(weights, x, read, *rest)

    def again(x: Tensor, read: Tensor) -> Tensor:
        return compute(weights, x, read, *rest)

    if keep == "NOTHING":
        return checkpoint(again, x, read, use_reentrant=False, preserve_rng_state=False)
    contexts = _keeping_costly if keep == "COSTLY" else _keeping_products
    return checkpoint(again, x, read, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def compute(
    weights: Weights,
    x: Tensor,
    read: Tensor,
    freqs: Tensor,
    mask: Tensor | None,
    lengths: tuple[int, ...] | None,
    samples: Tensor | None,
    factors: Factors,
    products: torch.dtype,
) -> Tensor:
    """(B, N, d) -> (B, M, d) in the dtype of x; or (1, S, d), of samples one after the other.

    read: the first M tokens of x, whose new states anybody reads: the others are attended to and go no further;
    freqs: as `_turned` reads them; mask: what is attended to, or a bias, as it broadcasts to (B, heads, N, N);
    lengths, samples: of a `Packing`; products: dtype of the matrix products and of attention.
    """
    whose = (lengths, samples)
    states = _scaled(_normalised(x, weights.eps[0]), factors.into_attention, *whose).to(products)
    count = read.shape[1]
    if count == x.shape[1]:
        query, key, value = _project(weights.qkv, states, stored=1)
    else:
        queries, others = _apart(weights.qkv, 1)
        (query,), (key, value) = _project(queries, states[:, :count]), _project(others, states, stored=1)
    query, key, value = (projected.unflatten(-1, (weights.heads, -1)) for projected in (query, key, value))
    query = _turned(_normed_heads(query, weights.norm_q), freqs[:, :count]).to(products)
    key = _turned(_normed_heads(key, weights.norm_k), freqs).to(products)
    query, key, value = (projected.transpose(1, 2) for projected in (query, key, value))
    if lengths is None:
        states = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    else:
        apart = zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
        states = torch.cat([F.scaled_dot_product_attention(*sample).transpose(1, 2) for sample in apart], dim=1)
    (states,) = _project(weights.out, states.flatten(2))
    x = _added(read, _normalised(states.to(x.dtype), weights.eps[1]), factors.out_of_attention, *whose)

    states = _scaled(_normalised(x, weights.eps[2]), factors.into_feed_forward, *whose).to(products)
    gate, up = _project(weights.w1_w3, states)
    (states,) = _project(weights.w2, F.silu(gate) * up)
    return _added(x, _normalised(states.to(x.dtype), weights.eps[3]), factors.out_of_feed_forward, *whose)


def _scaled(x: Tensor, factor: Tensor, lengths: tuple[int, ...] | None, samples: Tensor | None) -> Tensor:
    """Each token of x, (B, N, d) or packed (1, S, d), times its sample's factor, (B, 1, d), or the one of all."""
    if lengths is None or samples is None or len(factor) == 1:
        return x * factor
    if torch.compiler.is_compiling():
        return x * factor.squeeze(1)[samples].unsqueeze(0)  # read where it is needed, never written
    return torch.cat([part * own for part, own in zip(x.split(lengths, dim=1), factor, strict=True)], dim=1)


def _added(x: Tensor, more: Tensor, factor: Tensor, lengths: tuple[int, ...] | None, samples: Tensor | None) -> Tensor:
    """x and what is `_scaled` of more."""
    if samples is None or len(factor) == 1:
        return torch.addcmul(x, factor, more)
    return x + _scaled(more, factor, lengths, samples)


def _normalised(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def _normed_heads(x: Tensor, norm: Norm) -> Tensor:
    """(B, N, heads, d_head) in the dtype of the norm's weight."""
    return F.rms_norm(x.to(norm.weight.dtype), x.shape[-1:], norm.weight, norm.eps)


def _turned(x: Tensor, freqs: Tensor) -> Tensor:
    """Pairs of neighbours of (B, N, heads, d_head) turned in float32 by (B or 1, N, d_head / 2), complex, or
    (B or 1, N, 2, d_head): for each number a factor of its own and one of its neighbour's."""
    pairs, freqs = x.float().unflatten(-1, (-1, 2)), freqs.unsqueeze(2)
    if freqs.is_complex():
        return torch.view_as_real(torch.view_as_complex(pairs) * freqs).flatten(-2).type_as(x)
    own, neighbours = freqs.unbind(-2)
    return (pairs.flatten(-2) * own + pairs.flip(-1).flatten(-2) * neighbours).type_as(x)


def real_factors(freqs: Tensor) -> Tensor:
    """Complex (..., d_head / 2) -> (..., 2, d_head), as `_turned` reads them."""
    own = freqs.real.repeat_interleave(2, dim=-1)
    neighbours = torch.stack([-freqs.imag, freqs.imag], dim=-1).flatten(-2)
    return torch.stack([own, neighbours], dim=-2)


def complex_factors(factors: Tensor) -> Tensor:
    """The inverse of `real_factors`."""
    own, neighbours = factors.unbind(-2)
    return torch.complex(own[..., ::2], neighbours[..., 1::2])


def _apart(linears: Linears, count: int) -> tuple[Linears, Linears]:
    """The first `count` layers, and the others."""
    (whole, *more), loras, layers = linears.weights, linears.loras, linears.layers
    rows = len(whole) // layers * count
    first, others = (linears.weights[:count], linears.weights[count:]) if more else ((whole[:rows],), (whole[rows:],))
    if loras is None:
        return Linears(first, None, count), Linears(others, None, layers - count)
    rank = sum(b.shape[1] for b in loras.bs[:count] if b is not None)
    apart = (Loras(loras.a[:rank], loras.bs[:count]), Loras(loras.a[rank:], loras.bs[count:]))
    return Linears(first, apart[0], count), Linears(others, apart[1], layers - count)


def _project(linears: Linears, x: Tensor, stored: int = 0) -> list[Tensor]:
    """Each layer's output for the same x, (B, N, inputs) -> (B, N, outputs).

    stored: of how many of the last layers the output is read from memory as it is; those are rounded once. What reads
    the others is elementwise or a norm: a compiler makes the sum of a product and its LoRA there, and does not round
    it, unless it keeps it: where everything is kept, some are read as they were stored.
    """
    loras = linears.loras
    if loras is None or all(b is None for b in loras.bs):
        return _products(linears, x)
    narrow, bs = F.linear(x, loras.a), loras.bs
    if not torch.compiler.is_compiling() or stored == linears.layers:
        return _rounded_once(linears, bs, x, narrow)
    if not stored or all(b is None for b in bs[-stored:]):
        return _summed(linears, bs, x, narrow)
    count = linears.layers - stored
    first, last = _apart(linears, count)
    rank = sum(b.shape[1] for b in bs[:count] if b is not None)
    summed = _summed(first, bs[:count], x, narrow[..., :rank])
    return [*summed, *_rounded_once(last, bs[count:], x, narrow[..., rank:])]


def _products(linears: Linears, x: Tensor) -> list[Tensor]:
    """Of the matrices alone."""
    return _of_layers([F.linear(x, weight.to(x.dtype)) for weight in linears.weights], linears.layers)


def _summed(linears: Linears, bs: Sequence[Tensor | None], x: Tensor, narrow: Tensor) -> list[Tensor]:
    """For a compiler, which fuses the sum with what reads it: of two matrices it would make one product that first
    copies what it adds to, of three-dimensional tensors it does not."""
    parts = iter(narrow.split([b.shape[1] for b in bs if b is not None], dim=-1))
    return [y if b is None else y + F.linear(next(parts), b) for y, b in zip(_products(linears, x), bs, strict=True)]


def _rounded_once(linears: Linears, bs: Sequence[Tensor | None], x: Tensor, narrow: Tensor) -> list[Tensor]:
    of_matrices = [bs] if len(linears.weights) == 1 else [(b,) for b in bs]
    ranks = [sum(b.shape[1] for b in own if b is not None) for own in of_matrices]
    parts, weights = narrow.split(ranks, dim=-1), [weight.to(x.dtype) for weight in linears.weights]
    products = [
        product_and_loras(x, weight, part, [x.new_empty(len(weight) // len(own), 0) if b is None else b for b in own])
        if rank
        else F.linear(x, weight)
        for weight, part, own, rank in zip(weights, parts, of_matrices, ranks, strict=True)
    ]
    return _of_layers(products, linears.layers)


def _of_layers(products: list[Tensor], layers: int) -> list[Tensor]:
    return products if len(products) == layers else list(products[0].chunk(layers, dim=-1))


# --- what is kept -----------------------------------------------------------------------------------------------------

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _policy(share: float, _: Any, operation: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    """Keeps attention, and products whose inner length is more than this share of their outputs: each number of a
    result takes as many FLOPs as the inner length."""
    if operation in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if operation in (torch.ops.aten.mm.default, torch.ops.ztrain.product_and_loras.default):
        is_operator = operation is not torch.ops.aten.mm.default  # which takes its matrix as it lies
        inner, outputs = reversed(arguments[1].shape) if is_operator else arguments[1].shape
        if inner > share * outputs:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# Of the base products only the last of the feed-forward has more inputs than outputs; the widest, w1 and w3 as one, has
# 5.3 times as many outputs as inputs. A LoRA's second product of rank 256 has 15 times as many, and is not kept.
_keeping_costly = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, 1.0))
_keeping_products = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, 1 / 8))
