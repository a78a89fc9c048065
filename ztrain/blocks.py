"""A block of the transformer in fewer kernels, over the same modules and weights as diffusers' own.

`use_fast_blocks` puts this forward in the place of each block's. It computes what ZImageTransformerBlock.forward does
in basic mode (transformer_z_image.py, diffusers 0.42.1) with less traffic: RMSNorm is one kernel; a norm's weight and
what modulates or gates it are one factor, made before the block and so never recomputed; LoRAs that share their input
share one product with it, and each adds itself to its base's output inside its second product. Where that does not
apply, diffusers' forward runs, and `slow_because` says why. Names, state dict and export stay diffusers'.

Legend: B batch, N tokens, d model width, r LoRA rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Factors(NamedTuple):
    """What the four norms' outputs are multiplied with, (B or 1, 1, d): weight times modulation or gate."""

    into_attention: Tensor
    out_of_attention: Tensor
    into_feed_forward: Tensor
    out_of_feed_forward: Tensor
    kept: int | None = None
    """Tokens whose new states anybody reads, from the first on: the others are attended to and go no further."""


class _Lora(NamedTuple):
    a: Tensor  # (r, inputs)
    b: Tensor  # (outputs, r)
    scale: float


class _Linear(NamedTuple):
    weight: Tensor  # (outputs, inputs)
    lora: _Lora | None


class _Norm(NamedTuple):
    weight: Tensor
    eps: float


class _Weights(NamedTuple):
    """What a block computes with: tensors and numbers alone, so that one compiled function serves all blocks."""

    qkv: tuple[_Linear, _Linear, _Linear]
    out: _Linear
    w1_w3: tuple[_Linear, _Linear]
    w2: _Linear
    norm_q: _Norm
    norm_k: _Norm
    heads: int
    eps: tuple[float, float, float, float]
    """Of the norms before and after attention, before and after the feed-forward."""


class FastForward:
    """The forward of one block: ours for `Factors`, diffusers' for whatever diffusers gives it."""

    def __init__(self, block: Any, compute: Callable[..., Tensor], is_compiled: bool) -> None:
        self.block, self.compute, self.is_compiled = block, compute, is_compiled

    def __call__(self, x: Tensor, mask: Tensor | None, freqs: Tensor, modulation: Any = None, *rest: Any) -> Tensor:
        if isinstance(modulation, Factors):
            x = x.to(modulation.into_attention.dtype)
            if mask is not None and mask.ndim == 2:
                mask = mask[:, None, None, :]
            kind = x.device.type
            if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
                return self.compute(_weights_of(self.block), x, mask, freqs, modulation, x.dtype)
            products = torch.get_autocast_dtype(kind)
            with torch.autocast(kind, enabled=False):
                return self.compute(_weights_of(self.block), x, mask, freqs, modulation, products)
        if not freqs.is_complex():
            freqs = torch.view_as_complex(freqs)
        return type(self.block).forward(self.block, x, mask, freqs, modulation, *rest)


def use_fast_blocks(dit: Any, backend: str | None = None) -> None:
    """Installs FastForward in every block of a transformer, also again.

    backend: of torch.compile, one compiled function for all blocks; None runs them eagerly.
    """
    compute = _compute if backend is None else torch.compile(_compute, backend=backend, fullgraph=True)
    for block in _blocks(dit):
        block.forward = FastForward(block, compute, backend is not None)


def use_stock_blocks(dit: Any) -> None:
    """Takes it out again: every block runs as diffusers wrote it."""
    for block in _blocks(dit):
        block.__dict__.pop("forward", None)


def rotary_factors(dit: Any, positions: Tensor) -> Tensor:
    """Of positions (N, 3), as the blocks read them: (N, d_head / 2) complex, or (N, d_head / 2, 2), cosine and sine."""
    factors = dit.rope_embedder(positions)
    forward = dit.layers[0].forward
    # Inductor leaves complex products to eager kernels; eagerly, they are fewer kernels than real ones.
    is_real = isinstance(forward, FastForward) and forward.is_compiled
    return torch.view_as_real(factors) if is_real else factors


def slow_because(dit: Any) -> str | None:
    """Why some blocks run as diffusers wrote them, in words that begin with a module; None where all are fast."""
    for name in ("layers", "noise_refiner", "context_refiner", "siglip_refiner"):
        for place, block in enumerate(getattr(dit, name) or ()):
            if reason := _objection(block):
                return f"{name}.{place}.{reason}"
    return None


def prepare(block: Any, modulation: Tensor | None, kept: int | None = None) -> Any:
    """What a block is handed beside its tokens: factors where the fast forward applies, else `modulation`, (B, 256).

    kept: tokens that the block may return alone, because the rest of its output is not read.
    """
    if not isinstance(block.forward, FastForward) or _objection(block) is not None:
        return modulation
    norms = (block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2)
    factors = [norm.weight[None, None] for norm in norms]
    if block.modulation:
        scale_a, gate_a, scale_f, gate_f = block.adaLN_modulation(modulation).unsqueeze(1).chunk(4, dim=2)  # (B, 1, d)
        modulations = (1.0 + scale_a, gate_a.tanh(), 1.0 + scale_f, gate_f.tanh())
        factors = [weight * factor for weight, factor in zip(factors, modulations, strict=True)]
    before, after, before_feed_forward, after_feed_forward = factors
    return Factors(before, after, before_feed_forward, after_feed_forward, kept)


def _blocks(dit: Any) -> list[Any]:
    return [*dit.noise_refiner, *dit.context_refiner, *(dit.siglip_refiner or ()), *dit.layers]


def _weights_of(block: Any) -> _Weights:
    attention, feed_forward = block.attention, block.feed_forward
    norms = (block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2)
    return _Weights(
        (_linear_of(attention.to_q), _linear_of(attention.to_k), _linear_of(attention.to_v)),
        _linear_of(attention.to_out[0]),
        (_linear_of(feed_forward.w1), _linear_of(feed_forward.w3)),
        _linear_of(feed_forward.w2),
        _Norm(attention.norm_q.weight, attention.norm_q.eps),
        _Norm(attention.norm_k.weight, attention.norm_k.eps),
        attention.heads,
        (norms[0].eps, norms[1].eps, norms[2].eps, norms[3].eps),
    )


def _linear_of(layer: Any) -> _Linear:
    """A layer's weight, and the one LoRA that peft has put on it and that is switched on."""
    if type(layer) is nn.Linear:
        return _Linear(layer.weight, None)
    if layer.disable_adapters:
        return _Linear(layer.base_layer.weight, None)
    (name,) = layer.active_adapters
    lora = _Lora(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    return _Linear(layer.base_layer.weight, lora)


# --- what a block computes --------------------------------------------------------------------------------------------


def _compute(
    weights: _Weights, x: Tensor, mask: Tensor | None, freqs: Tensor, factors: Factors, products: torch.dtype
) -> Tensor:
    """(B, N, d) -> (B, kept or N, d) in the dtype of x. mask: what is attended to, or a bias, as it broadcasts to
    (B, heads, N, N); products: dtype of the matrix products and of attention."""
    states = (_normalised(x, weights.eps[0]) * factors.into_attention).to(products)
    if factors.kept is None:
        query, key, value = _project(weights.qkv, states)
    else:
        x = x[:, : factors.kept]
        (query,) = _project(weights.qkv[:1], states[:, : factors.kept])
        key, value = _project(weights.qkv[1:], states)
    query, key, value = (projected.unflatten(-1, (weights.heads, -1)) for projected in (query, key, value))
    query = _turned(_normed_heads(query, weights.norm_q), freqs[:, : factors.kept]).to(products)
    key = _turned(_normed_heads(key, weights.norm_k), freqs).to(products)
    states = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    (states,) = _project((weights.out,), states.transpose(1, 2).flatten(2))
    x = torch.addcmul(x, factors.out_of_attention, _normalised(states.to(x.dtype), weights.eps[1]))

    states = (_normalised(x, weights.eps[2]) * factors.into_feed_forward).to(products)
    gate, up = _project(weights.w1_w3, states)
    (states,) = _project((weights.w2,), F.silu(gate) * up)
    return torch.addcmul(x, factors.out_of_feed_forward, _normalised(states.to(x.dtype), weights.eps[3]))


def _normalised(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def _normed_heads(x: Tensor, norm: _Norm) -> Tensor:
    """(B, N, heads, d_head) in the dtype of the norm's weight."""
    return F.rms_norm(x.to(norm.weight.dtype), x.shape[-1:], norm.weight, norm.eps)


def _turned(x: Tensor, freqs: Tensor) -> Tensor:
    """Pairs of neighbours of (B, N, heads, d_head) turned in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    freqs = freqs.unsqueeze(2)
    if freqs.is_complex():
        return torch.view_as_real(torch.view_as_complex(pairs) * freqs).flatten(-2).type_as(x)
    (first, second), (cos, sin) = pairs.unbind(-1), freqs.unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).type_as(x)


def _project(layers: Sequence[_Linear], x: Tensor) -> list[Tensor]:
    """Each layer's output for the same x, (B, N, inputs) -> (B, N, outputs)."""
    outputs = [F.linear(x, layer.weight.to(x.dtype)) for layer in layers]
    loras = [(place, layer.lora) for place, layer in enumerate(layers) if layer.lora is not None]
    if not loras:
        return outputs
    # peft trains float32 weights on a bfloat16 base.
    narrow = F.linear(x, torch.cat([lora.a for _, lora in loras]).to(x.dtype)).flatten(0, 1)
    parts = narrow.split([len(lora.a) for _, lora in loras], dim=1)
    for (place, lora), part in zip(loras, parts, strict=True):
        output = outputs[place]
        added = torch.addmm(output.flatten(0, 1), part, lora.b.to(x.dtype).t(), alpha=lora.scale)
        outputs[place] = added.view_as(output)
    return outputs


# --- where it does not apply ------------------------------------------------------------------------------------------


def _objection(block: Any) -> str | None:
    """What is in the way of the fast forward, or None."""
    attention, feed_forward = block.attention, block.feed_forward
    if attention.norm_q is None:
        return "attention has no norms of query and key"
    if getattr(attention.processor, "_attention_backend", None) is not None:
        return "attention has a backend of its own"
    layers = {
        **{f"attention.{name}": getattr(attention, name) for name in ("to_q", "to_k", "to_v")},
        "attention.to_out.0": attention.to_out[0],
        **{f"feed_forward.{name}": getattr(feed_forward, name) for name in ("w1", "w2", "w3")},
    }
    for name, layer in layers.items():
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
