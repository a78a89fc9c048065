"""Pretrains the diffusion transformer as text-to-image, through the objective and the model of the main path.

Latents and caption states of the whole gallery are computed once; a step then only draws from them. Half of the
captions name the style. Some prompts are dropped, so that guidance has something to subtract.

Legend: N pictures, B samples of a batch, L tokens, D text width, (C, H, W) latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ztrain.conditioning import Encoded
from ztrain.encoders import LatentCodec, TextEncoder
from ztrain.flow import SigmaDensity, draw_sigmas, interpolate, velocity_losses
from ztrain.mini.fit import Draws, Fitted, Plan, fit, training
from ztrain.mini.gallery import Gallery
from ztrain.model import AdaptedDiT

_CHUNK = 512
_TEXT_DROPOUT = 0.1


@dataclass(frozen=True, slots=True)
class States:
    """Caption states of many prompts one after the other: (tokens, D), and where each begins and how long it is."""

    states: Tensor
    starts: np.ndarray
    lengths: np.ndarray

    def take(self, rows: np.ndarray) -> list[Tensor]:
        """The states of these prompts, B x (L, D), gathered at once."""
        lengths = self.lengths[rows]
        before = np.cumsum(lengths) - lengths
        places = np.arange(lengths.sum()) + np.repeat(self.starts[rows] - before, lengths)
        gathered = self.states[torch.from_numpy(places).to(self.states.device, non_blocking=True)]
        return list(gathered.split(lengths.tolist()))


def encode_captions(encoder: TextEncoder, captions: Sequence[str]) -> States:
    """Every caption as the prompt of a turn, in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if encoder.model.device.type == "cuda" else torch.float32
    states, lengths = [], []
    for start in range(0, len(captions), _CHUNK):
        rows = encoder.encode_all(captions[start : start + _CHUNK])
        states.append(torch.cat(rows).to(dtype))
        lengths += [len(row) for row in rows]
    counts = np.array(lengths)
    return States(torch.cat(states), np.cumsum(counts) - counts, counts)


def prompts_only(text: list[Tensor], null_text: Tensor) -> Encoded:
    """A batch that has prompts and no reference."""
    absent: list[Any] = [None] * len(text)
    return Encoded(text=text, null_text=null_text, reference=absent, fused=absent, siglip=[[] for _ in text])


def compile_blocks(dit: Any) -> None:
    """Compiles every block on its own, without the fusion that gives wrong gradients of modulated norms.

    Torch 2.10 and 2.11 compute them silently wrong (pytorch/pytorch#193061); here training blew up at batch 256.
    """
    for block in (*dit.noise_refiner, *dit.context_refiner, *dit.layers):
        block.compile(options={"triton.mix_order_reduction": False})


def train_denoiser(
    dit: Any,
    encoder: TextEncoder,
    codec: LatentCodec,
    gallery: Gallery,
    plan: Plan,
    density: SigmaDensity,
    seed: int,
    partial: Path,
    made_from: str = "",
) -> Fitted:
    """Trains the transformer in place, in float32 weights with bfloat16 products on a GPU.

    `partial` and `made_from` as in `fit`.
    """
    model = AdaptedDiT(dit, [])
    device, count = gallery.device, len(gallery)
    rows = torch.arange(count, device=device)
    latents = torch.cat([codec.encode_pixels(gallery.pixels(part)).half() for part in rows.split(_CHUNK)])
    # Rows 0 .. N - 1 are the plain captions, N .. 2 N - 1 the detailed ones, 2 N the empty prompt.
    prompts = encode_captions(encoder, [*gallery.captions, *gallery.detailed, ""])
    null_text = prompts.take(np.array([2 * count]))[0]
    draws = Draws(count, plan.batch_size, seed, "cpu")
    noise_generator = torch.Generator(device)

    def loss(step: int) -> Tensor:
        draws.at(step)
        noise_generator.manual_seed(seed * 2**32 + step)
        chosen = draws.rows()
        uniform = torch.rand(plan.batch_size, generator=draws.generator).numpy()
        with_style = uniform < 0.5 * (1 - _TEXT_DROPOUT)
        dropped = uniform >= 1 - _TEXT_DROPOUT
        text = prompts.take(np.where(dropped, 2 * count, chosen.numpy() + np.where(with_style, count, 0)))
        clean = latents[chosen.to(device)].float()  # (B, C, H, W)
        noise = torch.randn(clean.shape, generator=noise_generator, device=device)
        sigma = draw_sigmas(plan.batch_size, density, noise_generator)  # (B,)
        noisy = interpolate(clean, noise, sigma[:, None, None, None])
        velocity = model(noisy, sigma, prompts_only(text, null_text))
        return velocity_losses(velocity, clean, noise, sigma).mean()

    if device.type == "cuda":
        compile_blocks(dit)
    with training(dit):
        return fit("transformer", [dit], loss, plan, device, partial, made_from)
