"""The Z-Image transformer: loading it, its room, and one forward over its own modules for every layout of ours.

The forward calls the same modules with the same weights as diffusers' ZImageTransformer2DModel.forward, so LoRA names,
state dict and export stay diffusers'. On captions alone it computes diffusers' basic mode. With SigLIP grids it appends
their tokens in row order, at the target's grid, after one caption segment: the layout that diffusers' omni mode misses
(zimage_facts.md 3.4, 3.5). Samples may differ in size, caption length and number of references; they are laid into rows
of one length first, so a big batch of equal samples launches no more kernels than one sample.

Legend: B batch, C latent channels, H and W latent sides, L caption tokens, S SigLIP width, d model width, N tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ztrain.errors import InputError
from ztrain.frozen.sources import Source, check_weights, explained, load_part, read_json, require_loaded
from ztrain.io.gguf import read_gguf, unpack_rest, unpacked
from ztrain.io.tensors import read_tensors
from ztrain.model.fast.block import AttentionScope, Keep
from ztrain.model.fast.blocks import run
from ztrain.model.layout import MULTIPLE, Grid, Layouts, Rows, Sequencing, padded

PATCH = 2  # all_patch_size of the released transformer/config.json

REAL_CONFIG: dict[str, Any] = {"axes_lens": [1536, 512, 512]}
"""Constructor arguments of the released transformer that differ from diffusers' defaults (Z-Image/src/config)."""

BLOCK = "ZImageTransformerBlock"
"""The class of all its blocks, which FSDP2 gathers one by one (configs/accelerate/fsdp2.yaml)."""

Samples: TypeAlias = Sequence[Tensor] | Tensor
"""B x (C, H, W): a list, whose sizes may differ, or one tensor (B, C, H, W)."""


Keeping: TypeAlias = Callable[[int, int], Sequence[Keep]]
"""What each main block keeps of its activations, from the tokens of a batch and the number of these blocks."""


def everything(_: int, blocks: int) -> Sequence[Keep]:
    return [Keep.EVERYTHING] * blocks


def nothing(_: int, blocks: int) -> Sequence[Keep]:
    """What diffusers calls gradient checkpointing."""
    return [Keep.NOTHING] * blocks


@dataclass(slots=True)
class Execution:
    """How forward passes are carried out; no number depends on it but for rounding.

    keeping: of activations for the backward pass; None: as the transformer's `gradient_checkpointing` says; run: of the
    main blocks.
    """

    layouts: Layouts
    keeping: Keeping | None = None
    run: Callable[..., Tensor] = run


def empty_transformer(settings: dict[str, Any], name: str) -> Any:
    """A transformer of these settings on the meta device: names and shapes. Raises InputError, starting with `name`."""
    from diffusers import ZImageTransformer2DModel

    with explained(name), torch.device("meta"):
        return ZImageTransformer2DModel.from_config(settings)


def mapped_transformer(source: Source) -> Any:
    """The transformer of a Z-Image repository on its files, of which nothing is read before it is looked at."""
    source.require("transformer/config.json", what="a Z-Image model")
    dit = empty_transformer(read_json(source.file("transformer/config.json")), source.location)
    stored: dict[str, Tensor] = {}
    for path in check_weights(source.part("transformer", what="a Z-Image model")):
        stored |= read_tensors(path)
    with explained(source.location):
        keys = dit.load_state_dict(stored, strict=False, assign=True)
    require_loaded(keys._asdict(), f"{source.location}/transformer")
    return dit


def load_transformer(source: Source, dtype: torch.dtype, device: torch.device | str, file: str | None = None) -> Any:
    """The frozen transformer of a Z-Image repository, in eval mode; with `file` its weights are those of a GGUF."""
    from diffusers import ZImageTransformer2DModel

    if file is not None:
        return _load_quantised(source, Path(file), dtype, device)
    return load_part(ZImageTransformer2DModel, source, "transformer", device, torch_dtype=dtype)


_BLOCKS = ("layers", "noise_refiner", "context_refiner")  # where nearly all weights are


def _load_quantised(source: Source, file: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The transformer of the repository's config with the weights of a GGUF file; products run in `dtype`.

    Blocks keep their weights packed. Raises InputError where the file is damaged or another model's.
    """
    from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel

    source.require("transformer/config.json", what="a Z-Image model")
    weights = read_gguf(file)
    config = source.file("transformer/config.json")
    expected = empty_transformer(read_json(config), source.location).state_dict()
    for name in expected.keys() & weights.keys():
        if name.endswith("pad_token"):  # some writers drop their leading axis of 1
            weights[name] = unpacked(weights[name], dtype).view(-1, expected[name].shape[-1])
    differences = {"missing_keys": expected.keys() - weights, "unexpected_keys": weights.keys() - expected}
    require_loaded(differences, f"{file} beside the config of {source.location}")
    try:
        dit = ZImageTransformer2DModel.from_single_file(
            weights,
            config=str(config.parent),
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            torch_dtype=dtype,
        )
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} does not fit the transformer of {source.location}: {reason}") from error
    unpack_rest(dit, _BLOCKS, dtype)
    return dit.to(device).eval().requires_grad_(False)


def check_room(dit: Any, captions: Sequence[Tensor], siglip: Sequence[Sequence[Tensor]], noisy: Samples) -> None:
    """Refuses on the host what would be an index error, or a device-side assertion, inside the DiT."""
    rows, height, width = dit.config.axes_lens
    for caption, grids, sides in zip(captions, siglip, _sides(noisy), strict=True):
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
        if sides[0] % PATCH or sides[1] % PATCH:
            raise InputError(
                f"latents of {sides[0]} x {sides[1]} are no whole number of patches; use sides divisible by 16"
            )
        if sides[0] // PATCH > height or sides[1] // PATCH > width:
            raise InputError(f"latents of {sides[0]} x {sides[1]} exceed the DiT's grid of {height} x {width} patches")


def _sides(samples: Samples) -> list[tuple[int, int]]:
    """Height and width of each sample's latents."""
    if isinstance(samples, Tensor):
        return [(samples.shape[-2], samples.shape[-1])] * len(samples)
    return [(sample.shape[-2], sample.shape[-1]) for sample in samples]


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


def stacks(tensors: Samples) -> list[Tensor]:
    """Each run of neighbours of one shape as a batch: a single one where all are alike."""
    if isinstance(tensors, Tensor):
        return [tensors]
    return [torch.stack(list(run)) for _, run in groupby(tensors, key=lambda tensor: tensor.shape)]


def forward(
    dit: Any,
    noisy: Samples,
    t: Tensor,
    captions: Sequence[Tensor],
    siglip: Sequence[Sequence[Tensor]],
    caption_scale: Sequence[Tensor | None],
    siglip_scale: Sequence[Sequence[float]],
    execution: Execution,
    idle_siglip: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The transformer's raw output, B x (C, H, W) as one tensor for each run of neighbours of one shape (see `stacks`).

    noisy: B x (C, H, W), a list or one tensor; captions: B x (L, cap_feat_dim); siglip: B x R x (h, w, S); all three
    in any dtype. t: (B,) float32 in [0, 1], the transformer's own time; caption_scale: B x (L,) or None, siglip_scale:
    B x R: factors on the attention that these tokens get in the main layers. idle_siglip: grids that pass the SigLIP
    modules for nothing where `siglip` has none.
    """
    check_room(dit, captions, siglip, noisy)
    layouts, keeping = execution.layouts, execution.keeping or (nothing if dit.gradient_checkpointing else everything)
    dtype, device = dit.x_pad_token.dtype, t.device
    modulation = dit.t_embedder(t * dit.t_scale).to(dtype)  # (B, 256)
    sides = [(height // PATCH, width // PATCH) for height, width in _sides(noisy)]
    places = [padded(len(caption)) + 1 for caption in captions]  # of each image on the first axis
    image_rows = layouts.rows([[height * width] for height, width in sides], device)
    caption_rows = layouts.rows([[len(caption)] for caption in captions], device)
    laid = _laid(layouts, siglip, places, sides, device) if any(siglip) else None
    # Attention does not care about the order; captions are the parts that differ most, and so the last.
    parts = [image_rows, *([laid[0]] if laid else []), caption_rows]
    sequencing = layouts.sequence(parts, device)
    # Without gradients nothing is kept, and no budget is asked.
    keeps = (keeping if torch.is_grad_enabled() else everything)(image_rows.batch * sequencing.length, len(dit.layers))
    refined = Keep.EVERYTHING if min(keeps) == Keep.EVERYTHING else Keep.NOTHING  # as a budget has measured them

    stacked = stacks(noisy)
    patches = dit.all_x_embedder[f"{PATCH}-1"](torch.cat([_patchify(samples) for samples in stacked]).to(dtype))
    grids = [[(place, *side, *side)] for place, side in zip(places, sides, strict=True)]
    freqs = layouts.grids(grids, image_rows.length, device)
    image = _Block(image_rows.fill(patches, dit.x_pad_token), freqs, image_rows.seen)
    blocks = [_refined(dit.noise_refiner, image, modulation, refined)]

    if laid is not None:
        blocks.append(_siglip_block(dit, siglip, *laid, dtype, refined))
    elif idle_siglip:
        alone = _laid(layouts, [idle_siglip], places[:1], sides[:1], device)
        idle = _siglip_block(dit, [idle_siglip], *alone, dtype, refined)
        # Nothing is added, but every weight has a gradient, of zeros.
        blocks[0] = blocks[0]._replace(states=blocks[0].states + 0 * idle.states.sum())

    joined = torch.cat(list(captions))
    # Captions of float32 meet the embedder's norm as they are: rounded before it, small corrections would be lost.
    tokens = dit.cap_embedder(joined.to(torch.promote_types(joined.dtype, dtype)))
    freqs = layouts.line(caption_rows.length, device)
    caption = _Block(caption_rows.fill(tokens, dit.cap_pad_token), freqs, caption_rows.seen)
    blocks.append(_refined(dit.context_refiner, caption, None, refined))

    sequence = _join(blocks, sequencing)
    sequence = _with_scales(sequence, image_rows.ends, _Scales(caption_scale, siglip, siglip_scale))
    longest = max(height * width for height, width in sides)
    states = execution.run(dit.layers, *sequence, modulation, keeps, read=longest)
    output = dit.all_final_layer[f"{PATCH}-1"](states[:, :longest], c=modulation)  # (B, N, 4 C)
    of_samples = output.split([len(samples) for samples in stacked])
    return [_unpatchify(tokens, samples) for tokens, samples in zip(of_samples, stacked, strict=True)]


def _laid(
    layouts: Layouts,
    siglip: Sequence[Sequence[Tensor]],
    places: Sequence[int],
    sides: Sequence[tuple[int, int]],
    device: torch.device,
) -> tuple[Rows, Tensor]:
    """Rows and rotary factors of references: each is spread over its target's grid and has its own place on the first
    axis, after the target's."""
    grids: list[list[Grid]] = [
        [(place + 1 + r, *grid.shape[:2], *side) for r, grid in enumerate(each)]
        for place, each, side in zip(places, siglip, sides, strict=True)
    ]
    rows = layouts.rows([[height * width for _, height, width, *_ in each] for each in grids], device)
    return rows, layouts.grids(grids, rows.length, device)


class _Block(NamedTuple):
    """Tokens of one kind, or all: states (B, N, d); rotary factors as blocks.py gives them, one row if all share it;
    what of them is attended to."""

    states: Tensor
    freqs: Tensor
    seen: AttentionScope | None


def _refined(layers: nn.ModuleList, block: _Block, modulation: Tensor | None, keep: Keep) -> _Block:
    return block._replace(states=run(layers, *block, modulation, [keep] * len(layers)))


def _siglip_block(
    dit: Any, siglip: Sequence[Sequence[Tensor]], rows: Rows, freqs: Tensor, dtype: torch.dtype, keep: Keep
) -> _Block:
    """Refined SigLIP tokens of a batch in which any sample has a reference."""
    references = stacks([reference for sample in siglip for reference in sample])
    tokens = dit.siglip_embedder(torch.cat([batch.flatten(0, 2) for batch in references]).to(dtype))
    states = rows.fill(tokens, dit.siglip_pad_token)
    # A sample without references sees its own padding here; later nobody does.
    block = _refined(dit.siglip_refiner, _Block(states, freqs, rows.refined), None, keep)
    # Float32 weights in a bf16 base make float32 tokens, which would promote the whole sequence.
    return block._replace(states=block.states.to(dtype))


def _patchify(samples: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H/2 W/2, 4 C): row order, each patch as (row, column, channel)."""
    batch, channels, height, width = samples.shape
    blocks = samples.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(-1, PATCH * PATCH * channels)


def _unpatchify(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse for tokens (B, N, 4 C) whose rows may go on after the last patch, (B, C, H, W)."""
    batch, channels, height, width = like.shape
    rows, columns = height // PATCH, width // PATCH
    blocks = tokens[:, : rows * columns].view(batch, rows, columns, PATCH, PATCH, channels)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(like.shape)


def _join(blocks: Sequence[_Block], sequencing: Sequencing) -> _Block:
    """The blocks in one sequence."""
    rows = max(len(block.freqs) for block in blocks)
    freqs = torch.cat([block.freqs.expand(rows, *block.freqs.shape[1:]) for block in blocks], dim=1)
    states = torch.cat([block.states for block in blocks], dim=1)
    if (places := sequencing.places) is not None:
        freqs = freqs.expand(len(states), *freqs.shape[1:])
        first = torch.arange(len(states), device=places.device).unsqueeze(1) * states.shape[1]
        states, freqs = (_taken(tensor, places + first) for tensor in (states, freqs))
    return _Block(states, freqs, sequencing.seen)


def _taken(tensor: Tensor, places: Tensor) -> Tensor:
    """(B, N, ...) -> (B, M, ...): the tokens at `places`, (B, M), of all rows one after the other."""
    return tensor.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)


class _Scales(NamedTuple):
    """Factors on attention: of caption tokens B x (L,) or None, of all tokens of each reference B x R."""

    caption: Sequence[Tensor | None]
    references: Sequence[Sequence[Tensor]]
    siglip: Sequence[Sequence[float]]

    @property
    def are_ones(self) -> bool:
        return all(each is None for each in self.caption) and all(f == 1.0 for each in self.siglip for f in each)


def _with_scales(sequence: _Block, starts: Sequence[int], scales: _Scales) -> _Block:
    """What is attended to as an additive bias (B, 1, 1, N) of log factors, where any token has one.

    starts: of the tokens after each sample's image: those of its references, each with its padding, then its caption's.
    """
    if scales.are_ones:
        return sequence
    factors = torch.ones(sequence.states.shape[:2], device=sequence.states.device)
    for i, (place, caption) in enumerate(zip(starts, scales.caption, strict=True)):
        for grid, factor in zip(scales.references[i], scales.siglip[i], strict=True):
            end = place + padded(grid.shape[0] * grid.shape[1])
            factors[i, place:end] = factor
            place = end
        if caption is not None:
            factors[i, place : place + len(caption)] = caption
    bias = factors.log()
    if sequence.seen is not None:
        bias = bias.masked_fill(~sequence.seen.mask, -math.inf)
    return sequence._replace(seen=AttentionScope(bias.to(sequence.states.dtype)[:, None, None, :], None))
