"""The Z-Image transformer: loading it, its room, and one forward over its own modules for every layout of ours.

The forward calls the same modules with the same weights as diffusers' ZImageTransformer2DModel.forward, so LoRA names,
state dict and export stay diffusers'. On captions alone it computes diffusers' basic mode. With SigLIP grids it appends
their tokens in row order, at the target's grid, after one caption segment: the layout that diffusers' omni mode misses
(zimage_facts.md 3.4, 3.5). Samples may differ in size, caption length and number of references.

Legend: B batch, C latent channels, H and W latent sides, L caption tokens, S SigLIP width, d model width, N tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ztrain.errors import InputError
from ztrain.models import Source, load_part

PATCH = 2  # all_patch_size of the released transformer/config.json
MULTIPLE = 32  # SEQ_MULTI_OF in diffusers' transformer_z_image.py: every part is padded to this many tokens

REAL_CONFIG: dict[str, Any] = {"axes_lens": [1536, 512, 512]}
"""Constructor arguments of the released transformer that differ from diffusers' defaults (Z-Image/src/config)."""


def load_transformer(source: Source, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The frozen transformer of a Z-Image repository, in eval mode."""
    from diffusers import ZImageTransformer2DModel

    return load_part(ZImageTransformer2DModel, source, "transformer", device, torch_dtype=dtype)


def padded(length: int) -> int:
    return length + (-length) % MULTIPLE


def check_room(
    dit: Any, captions: Sequence[Tensor], siglip: Sequence[Sequence[Tensor]], noisy: Sequence[Tensor]
) -> None:
    """Refuses on the host what would be an index error, or a device-side assertion, inside the DiT."""
    rows, height, width = dit.config.axes_lens
    for caption, grids, sample in zip(captions, siglip, noisy, strict=True):
        # Captions take positions 1 .. padded length on the first axis, the image the next one, then each reference.
        room = (rows - 2 - len(grids)) // MULTIPLE * MULTIPLE
        if len(caption) > room:
            raise InputError(
                f"a caption of {len(caption)} tokens does not fit: the DiT has room for {room}; shorten the prompt or"
                " lower encoders.max_reference_pixels"
            )
        if len(caption) == 0:
            raise InputError(
                "a caption without tokens: the selected tokens of the reference are none; see adapters tokens"
            )
        sides = sample.shape[-2:]
        if sides[0] % PATCH or sides[1] % PATCH:
            raise InputError(
                f"latents of {sides[0]} x {sides[1]} are no whole number of patches; use sides divisible by 16"
            )
        if sides[0] // PATCH > height or sides[1] // PATCH > width:
            raise InputError(f"latents of {sides[0]} x {sides[1]} exceed the DiT's grid of {height} x {width} patches")


def check_omni_room(dit: Any, segment_lengths: Sequence[int], num_references: int) -> None:
    """The same for the stock omni layout, whose segments start where the unpadded ones before them end."""
    rows, start = dit.config.axes_lens[0], 1
    for length in segment_lengths:
        # Two places after each segment are for its image and its SigLIP tokens.
        if max(start + padded(length), start + length + 2) > rows:
            raise InputError(
                f"caption segments of {list(segment_lengths)} tokens with {num_references} references do not fit the"
                f" DiT's {rows} positions; shorten the prompt"
            )
        start += length + 2


def forward(
    dit: Any,
    noisy: Sequence[Tensor],
    t: Tensor,
    captions: Sequence[Tensor],
    siglip: Sequence[Sequence[Tensor]],
    caption_scale: Sequence[Tensor | None],
    siglip_scale: float = 1.0,
) -> list[Tensor]:
    """The transformer's raw output for each sample, B x (C, H, W).

    noisy: B x (C, H, W) in the weights' dtype; t: (B,) float32 in [0, 1], the transformer's own time; captions:
    B x (L, cap_feat_dim); siglip: B x R x (h, w, S); caption_scale: B x (L,) or None, siglip_scale: factors on the
    attention that these tokens get in the main layers.
    """
    check_room(dit, captions, siglip, noisy)
    device = noisy[0].device
    modulation = dit.t_embedder(t * dit.t_scale).type_as(noisy[0])  # (B, 256)
    caption_lengths = [padded(len(caption)) for caption in captions]

    patches = [_patchify(sample) for sample in noisy]
    embedded = dit.all_x_embedder[f"{PATCH}-1"](torch.cat(patches)).split([len(p) for p in patches])
    positions = [
        _grid(length + 1, sample.shape[-2] // PATCH, sample.shape[-1] // PATCH, device)
        for sample, length in zip(noisy, caption_lengths, strict=True)
    ]
    image = _refine(dit, dit.noise_refiner, _pad(embedded, positions, dit.x_pad_token), modulation)

    embedded = dit.cap_embedder(torch.cat(list(captions))).split([len(caption) for caption in captions])
    # Pads of a caption count on in position; those of image and SigLIP tokens sit at the origin.
    positions = [_line(length, device) for length in caption_lengths]
    caption = _refine(dit, dit.context_refiner, _pad(embedded, positions, dit.cap_pad_token), None)

    parts = [[x, c] for x, c in zip(image, caption, strict=True)]
    scales = [
        None if s is None else [torch.ones(len(x[0]), device=device), _fill(s, len(c[0]))]
        for s, x, c in zip(caption_scale, image, caption, strict=True)
    ]
    for index, tokens in _siglip_tokens(dit, siglip, noisy, caption_lengths).items():
        # Float32 weights in a bf16 base make float32 tokens, which would promote the whole sequence.
        tokens = (tokens[0].to(image[index][0].dtype), tokens[1])
        parts[index].append(tokens)
        if siglip_scale != 1.0 and scales[index] is None:
            scales[index] = [torch.ones(len(part[0]), device=device) for part in parts[index][:2]]
        if (known := scales[index]) is not None:
            known.append(torch.full((len(tokens[0]),), siglip_scale, device=device))

    sequences = [(torch.cat([p[0] for p in part]), torch.cat([p[1] for p in part])) for part in parts]
    states, freqs, mask = _batch(sequences)
    mask = _with_scales(mask, scales, states)
    for layer in dit.layers:
        states = _run(dit, layer, states, mask, freqs, modulation)

    longest = max(len(p) for p in patches)
    output = dit.all_final_layer[f"{PATCH}-1"](states[:, :longest], c=modulation)  # (B, N, 4 C)
    return [_unpatchify(tokens[: len(p)], x) for tokens, p, x in zip(output, patches, noisy, strict=True)]


Tokens = tuple[Tensor, Tensor]  # states (N, d) and rotary factors (N, d_head / 2), complex


def _siglip_tokens(
    dit: Any, siglip: Sequence[Sequence[Tensor]], noisy: Sequence[Tensor], caption_lengths: Sequence[int]
) -> dict[int, Tokens]:
    """Refined SigLIP tokens of every sample that has references, by its place in the batch."""
    present = [i for i, grids in enumerate(siglip) if grids]
    if not present:
        return {}
    grids = [grid for i in present for grid in siglip[i]]
    embedded = dit.siglip_embedder(torch.cat([grid.flatten(0, 1) for grid in grids]))
    tokens = iter(embedded.split([grid.shape[0] * grid.shape[1] for grid in grids]))
    sequences = []
    for i in present:
        height, width = noisy[i].shape[-2] // PATCH, noisy[i].shape[-1] // PATCH
        parts = []
        for r, grid in enumerate(siglip[i]):
            positions = _grid(caption_lengths[i] + 2 + r, grid.shape[0], grid.shape[1], noisy[i].device, height, width)
            parts.append(_pad_one(next(tokens), positions, dit.siglip_pad_token))
        sequences.append((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])))
    return dict(zip(present, _refine(dit, dit.siglip_refiner, sequences, None), strict=True))


def _patchify(sample: Tensor) -> Tensor:
    """(C, H, W) -> (H/2 W/2, 4 C): row order, each patch as (row, column, channel)."""
    channels, height, width = sample.shape
    blocks = sample.view(channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return blocks.permute(1, 3, 2, 4, 0).reshape(-1, PATCH * PATCH * channels)


def _unpatchify(tokens: Tensor, like: Tensor) -> Tensor:
    channels, height, width = like.shape
    blocks = tokens.view(height // PATCH, width // PATCH, PATCH, PATCH, channels)
    return blocks.permute(4, 0, 2, 1, 3).reshape(channels, height, width)


def _line(length: int, device: torch.device) -> Tensor:
    """Caption positions 1 .. length on the first axis, (length, 3)."""
    positions = torch.zeros((length, 3), dtype=torch.int64, device=device)
    positions[:, 0] = torch.arange(1, length + 1, device=device)
    return positions


def _grid(
    first: int,
    height: int,
    width: int,
    device: torch.device,
    to_height: int | None = None,
    to_width: int | None = None,
) -> Tensor:
    """Positions of a grid in row order, (height width, 3), optionally spread over a grid of another size."""

    def axis(length: int, target: int | None) -> Tensor:
        steps = torch.arange(length, device=device)
        if target is None or length == 1:
            return steps
        return (steps * (target - 1) / (length - 1)).round().long()

    rows, columns = torch.meshgrid(axis(height, to_height), axis(width, to_width), indexing="ij")
    return torch.stack([torch.full_like(rows, first), rows, columns], dim=-1).flatten(0, 1)


def _pad_one(tokens: Tensor, positions: Tensor, pad_token: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (N, d) and positions padded to a multiple of 32; padding is attended to, as in the released model."""
    missing = padded(len(tokens)) - len(tokens)
    # An empty expansion still puts the pad token into the graph, so that its gradient exists.
    states = torch.cat([tokens, pad_token.to(tokens.dtype).expand(missing, -1)])
    origin = positions.new_zeros((len(states) - len(positions), 3))
    return states, torch.cat([positions, origin])


def _pad(tokens: Sequence[Tensor], positions: Sequence[Tensor], pad_token: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [_pad_one(t, p, pad_token) for t, p in zip(tokens, positions, strict=True)]


def _refine(
    dit: Any, layers: nn.ModuleList, sequences: Sequence[tuple[Tensor, Tensor]], modulation: Tensor | None
) -> list[Tokens]:
    """Runs refiner blocks over sequences of states and positions; gives states and rotary factors."""
    lengths = [len(states) for states, _ in sequences]
    freqs = dit.rope_embedder(torch.cat([positions for _, positions in sequences])).split(lengths)
    states, batch_freqs, mask = _batch(list(zip([s for s, _ in sequences], freqs, strict=True)))
    for layer in layers:
        states = _run(dit, layer, states, mask, batch_freqs, modulation)
    return [(states[i, :length], freqs[i]) for i, length in enumerate(lengths)]


def _batch(sequences: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, N, d), (B, N, d_head / 2), and a mask (B, N) only where lengths differ: masks turn fast kernels off."""
    states = pad_sequence([s for s, _ in sequences], batch_first=True)
    freqs = pad_sequence([f for _, f in sequences], batch_first=True)
    lengths = [len(s) for s, _ in sequences]
    if len(set(lengths)) == 1:
        return states, freqs, None
    places = torch.arange(states.shape[1], device=states.device)
    return states, freqs, places < torch.tensor(lengths, device=states.device).unsqueeze(1)


def _fill(scale: Tensor, length: int) -> Tensor:
    """Attention scales of a caption's tokens; its padding keeps 1."""
    return torch.cat([scale, scale.new_ones(length - len(scale))])


def _with_scales(mask: Tensor | None, scales: Sequence[list[Tensor] | None], states: Tensor) -> Tensor | None:
    """The mask as an additive bias (B, 1, 1, N) of log scales, where any sample has scales."""
    if all(scale is None for scale in scales):
        return mask
    batch, length = states.shape[:2]
    factors = torch.ones((batch, length), device=states.device)
    for i, scale in enumerate(scales):
        if scale is not None:
            joined = torch.cat(scale)
            factors[i, : len(joined)] = joined
    bias = factors.log()
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf)
    return bias.to(states.dtype)[:, None, None, :]


def _run(
    dit: Any, layer: nn.Module, states: Tensor, mask: Tensor | None, freqs: Tensor, modulation: Tensor | None
) -> Tensor:
    if torch.is_grad_enabled() and dit.gradient_checkpointing:
        return dit._gradient_checkpointing_func(layer, states, mask, freqs, modulation)
    return layer(states, mask, freqs, modulation)
