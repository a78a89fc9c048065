"""The fast forward of block.py put in the place of each block's own, over the same modules and weights.

Where it does not apply (LoRAs of other kinds, quantized layers), diffusers' forward runs, and `slow_because` says why.
Names, state dict and export stay diffusers'. Legend: B batch, N tokens, d model width.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ztrain.model.fast.block import (
    AttentionScope,
    Factors,
    Keep,
    Linears,
    Loras,
    Norm,
    Packing,
    Weights,
    complex_factors,
    compute_keeping,
    real_factors,
)
from ztrain.model.fast.loras import gathered, spread
from ztrain.model.fast.storage import share_storage, whole_of

_RECOMPILATIONS = 64
"""Of one compiled function at most: by kind of block, Keep, mask and gradients, each also for any number of tokens."""
_READ = 0.8
"""Share of the tokens, up to which the last block computes only those that are read: saving less would not pay for a
compiled function of its own."""
ROW_BLOCKS = 3
"""LoRAs of so many blocks are one row, made just before the first of them: backward, their gradients are all there
while earlier blocks are still to come, and processes sum them beside these."""


class BlockInputs(NamedTuple):
    """Inputs of one block that are computed for all blocks at once."""

    factors: Factors
    loras: tuple[Loras | None, ...]  # of q, k and v; of out; of w1 and w3; of w2
    products: torch.dtype


class DeferredBlockInputs(NamedTuple):
    """What a block computes its own BlockInputs from, while its parameters are gathered (FSDP2, ZeRO 3)."""

    modulation: Tensor | None
    products: torch.dtype


class FastForward:
    """The forward of one block: ours for BlockInputs or DeferredBlockInputs, diffusers' own for all else.

    is_alone: whether the block's weights are there only while it runs, as where processes share them.
    """

    def __init__(self, block: Any, compute: Callable[..., Tensor], is_compiled: bool, is_alone: bool) -> None:
        self.block, self.compute, self.is_compiled, self.is_alone = block, compute, is_compiled, is_alone

    def __call__(
        self,
        x: Tensor,
        mask: Tensor | None,
        freqs: Tensor,
        modulation: Any = None,
        *rest: Any,
        packing: Packing | None = None,
        read: int | None = None,
        keep: Keep = Keep.EVERYTHING,
    ) -> Tensor:
        """packing: of x, which has one row then; read, keep: of block.py's `compute_keeping`; read None: all tokens."""
        if isinstance(modulation, DeferredBlockInputs):
            modulation = next(_given([self.block], modulation.modulation, None, modulation.products))
        if not isinstance(modulation, BlockInputs):
            if not freqs.is_complex():
                freqs = complex_factors(freqs)
            return type(self.block).forward(self.block, x, mask, freqs, modulation, *rest)
        factors, loras, products = modulation
        x = x.to(factors.into_attention.dtype)
        lengths, samples = (None, None) if packing is None else (packing.lengths, packing.samples)
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None, :]
        # Without gradients, for previews and validation, other sizes come that are not worth a compilation.
        compute = self.compute if torch.is_grad_enabled() else compute_keeping
        if self.is_compiled:
            # Not one function for each size of picture and length of caption: the second would be compiled anew.
            for tensor, axis in ((x, 1), (freqs, 1), (mask, -1), (samples, 0)):
                if tensor is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, axis % tensor.ndim)
        weights, part = _weights_of(self.block, loras), x if read is None else x[:, :read]
        if not _needs_gradient(x, factors, weights):
            keep = Keep.EVERYTHING  # which is nothing
        with torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext():
            return compute(keep.name, weights, x, part, freqs, mask, lengths, samples, factors, products)


def use_fast_blocks(dit: Any, backend: str | None = None, *, alone: bool | None = None) -> None:
    """Installs FastForward in every block of a transformer, also again.

    backend: of torch.compile, one compiled function for all blocks; None runs them eagerly. alone: see FastForward;
    None: as it was.
    """
    if alone is None:
        alone = getattr(dit.layers[0].forward, "is_alone", False)
    compute: Callable[..., Tensor] = compute_keeping
    if backend is not None:
        # It warns of operations in place where a part is computed again; there are none in block.py.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILATIONS)
        compute = torch.compile(compute_keeping, backend=backend, fullgraph=True)
    for block in _blocks(dit):
        block.forward = FastForward(block, compute, backend is not None, alone)
    if not alone:
        _lay_side_by_side(dit, backend is not None)


def use_stock_blocks(dit: Any) -> None:
    """Takes it out again: every block runs as diffusers wrote it."""
    for block in _blocks(dit):
        block.__dict__.pop("forward", None)


def run(
    layers: nn.ModuleList,
    x: Tensor,
    freqs: Tensor,
    seen: AttentionScope | None,
    modulation: Tensor | None,
    keeps: Sequence[Keep],
    read: int | None = None,
    row: Tensor | None = None,
) -> Tensor:
    """(B, N, d) -> (B, N, d) through blocks of one kind, or (B, read or N, d).

    modulation: (B, 256) or None; keeps: of each block; read: tokens of the result that are read, from the first on;
    row: of `lora_row`, if it has been made.
    """
    fast = _fast(layers)
    products = _products(layers, x)
    given: Iterator[BlockInputs | DeferredBlockInputs]
    if fast and fast[0].forward.is_alone:
        given = itertools.repeat(DeferredBlockInputs(modulation, products))
    else:
        given = _given(fast, modulation, row, products)
    takes = {id(block) for block in fast}
    mask, packing = (None, None) if seen is None else seen
    shape = x.shape
    if len(fast) < len(layers):
        packing = None  # diffusers' forward reads rows
    if packing is not None:
        mask, read = None, None
        x, freqs = _packed(x, packing), _packed(freqs, packing)
    elif read is not None and read > _READ * x.shape[1]:
        read = None
    for place, (layer, keep) in enumerate(zip(layers, keeps, strict=True), 1):
        if id(layer) in takes:
            last = place == len(layers)
            x = layer(x, mask, freqs, next(given), packing=packing, read=read if last else None, keep=keep)
        elif torch.is_grad_enabled() and keep != Keep.EVERYTHING:
            x = checkpoint(layer, x, mask, freqs, modulation, use_reentrant=False)
        else:
            x = layer(x, mask, freqs, modulation)
    if packing is None:
        return x
    return x.new_zeros(shape).flatten(0, 1).index_copy(0, packing.places, x[0]).view(shape)


def _packed(rows: Tensor, packing: Packing) -> Tensor:
    """(B, N, ...), or (1, N, ...) of which all samples have the same, -> (1, S, ...)."""
    places = packing.places % rows.shape[1] if len(rows) == 1 else packing.places
    return rows.flatten(0, 1)[places].unsqueeze(0)


def lora_row(layers: nn.ModuleList, x: Tensor) -> Tensor | None:
    """All LoRAs of the fast among these blocks, in one row; x: the states that they read."""
    return gathered([group for block in _fast(layers) for group in _groups(block)], _products(layers, x))


def rotary_factors(dit: Any, positions: Tensor) -> Tensor:
    """Of positions (N, 3), as the blocks read them: (N, d_head / 2) complex, or (N, 2, d_head)."""
    factors = dit.rope_embedder(positions)
    return real_factors(factors) if reads_real(dit) else factors


def reads_real(dit: Any) -> bool:
    """Inductor leaves complex products to eager kernels; eagerly, they are fewer kernels than real ones."""
    forward = dit.layers[0].forward
    return isinstance(forward, FastForward) and forward.is_compiled


def slow_because(dit: Any) -> str | None:
    """Why some blocks run as diffusers wrote them, in words that begin with a module; None where all are fast."""
    for name in ("layers", "noise_refiner", "context_refiner", "siglip_refiner"):
        for place, block in enumerate(getattr(dit, name) or ()):
            if reason := _objection(block):
                return f"{name}.{place}.{reason}"
    return None


def _blocks(dit: Any) -> list[Any]:
    return [*dit.noise_refiner, *dit.context_refiner, *(dit.siglip_refiner or ()), *dit.layers]


# --- weights ----------------------------------------------------------------------------------------------------------


def _lay_side_by_side(dit: Any, is_compiled: bool) -> None:
    """What one product can serve, where it is frozen: of all blocks of a kind their modulations, whatever adapters
    stand on them; of each block q, k and v, w1 and w3. This only for a compiler, which fuses what comes after: else
    results would lie apart or together with and without LoRAs, and differ in their last bits."""
    for layers in (dit.noise_refiner, dit.context_refiner, dit.siglip_refiner or (), dit.layers):
        for block in layers if is_compiled else ():
            attention, feed_forward = block.attention, block.feed_forward
            _share("weight", attention.to_q, attention.to_k, attention.to_v)
            _share("weight", feed_forward.w1, feed_forward.w3)
        share_storage([norm.weight for block in layers for norm in _norms(block)])
        modulations = [block.adaLN_modulation[0] for block in layers if block.modulation]
        _share("weight", *modulations)
        _share("bias", *modulations)


def _share(name: str, *layers: Any) -> None:
    if all(type(_base(layer)) is nn.Linear for layer in layers):
        share_storage([getattr(_base(layer), name) for layer in layers])


def _base(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _norms(block: Any) -> tuple[Any, Any, Any, Any]:
    return block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2


def _fast(layers: nn.ModuleList) -> list[Any]:
    """Those of the blocks whose forward is ours."""
    return [block for block in layers if isinstance(block.forward, FastForward) and _objection(block) is None]


def _given(
    fast: Sequence[Any], modulation: Tensor | None, row: Tensor | None, products: torch.dtype
) -> Iterator[BlockInputs]:
    """Of one block after the other. row: of all of them; None: one of `ROW_BLOCKS` at a time, when it is their turn."""
    factors = iter(_factors_together(fast, modulation) or [_factors_of(block, modulation) for block in fast])
    count = ROW_BLOCKS if row is None else max(len(fast), 1)
    for first in range(0, len(fast), count):
        some = fast[first : first + count]
        groups = [group for block in some for group in _groups(block)]
        loras = iter(spread(gathered(groups, products) if row is None else row, groups))
        for block in some:
            yield BlockInputs(next(factors), tuple(next(loras) for _ in _groups(block)), products)


def _products(layers: nn.ModuleList, x: Tensor) -> torch.dtype:
    """Of matrix products and attention."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else layers[0].attention_norm1.weight.dtype


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _factors_together(layers: Sequence[Any], modulation: Tensor | None) -> list[Factors] | None:
    """With one product for all blocks, where their weights lie side by side."""
    norms = whole_of([norm.weight for block in layers for norm in _norms(block)]) if layers else None
    if norms is None:
        return None
    norms = norms.unflatten(0, (len(layers), 4, -1)).unsqueeze(0)  # (1, blocks, 4, d)
    if not any(block.modulation for block in layers):
        return [Factors(*four.unbind(1)) for four in norms.unbind(1)]
    linears = [block.adaLN_modulation[0] for block in layers]
    if not all(type(linear) is nn.Linear for linear in linears):
        return None
    weight, bias = whole_of([linear.weight for linear in linears]), whole_of([linear.bias for linear in linears])
    if weight is None or bias is None or modulation is None:
        return None
    factors = nn.functional.linear(modulation, weight, bias).unflatten(1, (len(layers), 4, -1))
    scales = norms[:, :, 0::2] * (1.0 + factors[:, :, 0::2])  # (B, blocks, 2, d), into attention and feed-forward
    gates = norms[:, :, 1::2] * factors[:, :, 1::2].tanh()
    return [Factors(*(each[:, i, j : j + 1] for j in range(2) for each in (scales, gates))) for i in range(len(layers))]


def _factors_of(block: Any, modulation: Tensor | None) -> Factors:
    factors = [norm.weight[None, None] for norm in _norms(block)]
    if block.modulation:
        scale_a, gate_a, scale_f, gate_f = block.adaLN_modulation(modulation).unsqueeze(1).chunk(4, dim=2)  # (B, 1, d)
        modulations = (1.0 + scale_a, gate_a.tanh(), 1.0 + scale_f, gate_f.tanh())
        factors = [weight * factor for weight, factor in zip(factors, modulations, strict=True)]
    return Factors(*factors)


def _groups(block: Any) -> tuple[tuple[Any, ...], ...]:
    """Layers that read the same, together."""
    attention, feed_forward = block.attention, block.feed_forward
    reads_states = (attention.to_q, attention.to_k, attention.to_v)
    return reads_states, (attention.to_out[0],), (feed_forward.w1, feed_forward.w3), (feed_forward.w2,)


_LINEARS = (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
    "feed_forward.w1", "feed_forward.w3", "feed_forward.w2",
)  # fmt: skip
"""As `_groups` gives them."""


def _weights_of(block: Any, loras: Sequence[Loras | None]) -> Weights:
    attention, norms = block.attention, _norms(block)
    reads_states, reads_attention, reads_normed, reads_gated = (
        _linears_of(group, each) for group, each in zip(_groups(block), loras, strict=True)
    )
    return Weights(
        reads_states,
        reads_attention,
        reads_normed,
        reads_gated,
        Norm(attention.norm_q.weight, attention.norm_q.eps),
        Norm(attention.norm_k.weight, attention.norm_k.eps),
        attention.heads,
        (norms[0].eps, norms[1].eps, norms[2].eps, norms[3].eps),
    )


def _linears_of(layers: Sequence[Any], loras: Loras | None) -> Linears:
    weights = [_base(layer).weight for layer in layers]
    whole = whole_of(weights) if len(weights) > 1 else None
    return Linears(tuple(weights) if whole is None else (whole,), loras, len(layers))


def _needs_gradient(*values: Any) -> bool:
    return any(
        value.requires_grad if isinstance(value, Tensor) else isinstance(value, tuple) and _needs_gradient(*value)
        for value in values
    )


# --- where it does not apply ------------------------------------------------------------------------------------------


def _objection(block: Any) -> str | None:
    """What is in the way of the fast forward, or None."""
    attention = block.attention
    if attention.norm_q is None:
        return "attention has no norms of query and key"
    if getattr(attention.processor, "_attention_backend", None) is not None:
        return "attention has a backend of its own"
    for name, layer in zip(_LINEARS, itertools.chain(*_groups(block)), strict=True):
        if reason := _objection_to_linear(layer):
            return f"{name} {reason}"
    return None


def _objection_to_linear(layer: Any) -> str | None:
    base: Any = layer if type(layer) is nn.Linear else getattr(layer, "base_layer", None)
    if type(base) is not nn.Linear:
        return f"is {type(base or layer).__name__}, not a plain Linear"
    if base.bias is not None or not base.weight.is_floating_point():
        return f"has a bias or weights of {base.weight.dtype}"
    if base is layer:
        return None
    if layer.merged:
        return "has a merged LoRA"
    if layer.disable_adapters:
        return None
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A:
        return "has several LoRAs"
    [name] = layer.active_adapters
    if name in layer.lora_variant:
        return f"has a LoRA of another kind ({type(layer.lora_variant[name]).__name__})"
    if layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0:
        return "drops out inputs of its LoRA"
    return None
