"""Pretrains the diffusion transformer as text-to-image, through the objective and the model of the main path.

Latents and caption states of the whole gallery are computed once; a step then only draws from them. Half of the
captions name the style. Some prompts are dropped, so that guidance has something to subtract. Of others only the turn's
own tokens are shown, in which the language model has gathered the words, and after some the own tokens of a second turn
about the same picture: so the transformer learns to read what a picture leaves there, alone and beside a prompt.

Legend: N pictures, B samples of a batch, L tokens, D text width, (C, H, W) latents.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miniature.fit import Draws, FitSettings, Fitted, Partial, fit, mixed_precision, training
from miniature.gallery import Gallery
from miniature.turns import turn_tokens
from ztrain.conditioning import Encoded
from ztrain.frozen.encoders import LatentCodec, TextEncoder
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.fast.compiling import compile_blocks
from ztrain.model.flow import SigmaDensity, draw_sigmas, loss

_CHUNK = 512
_TEXT_DROPOUT = 0.1
_SHARES = np.array([[0.4], [0.25]])  # of prompts without their words, and of plain or empty ones with a second turn


@dataclass(frozen=True, slots=True)
class States:
    """Caption states of many prompts one after the other: (tokens, D), where each begins and how long it is; `around`:
    of its tokens those before and after the words."""

    states: Tensor
    starts: np.ndarray
    lengths: np.ndarray
    around: tuple[int, int]

    def take(
        self, rows: np.ndarray, without_words: np.ndarray | None = None, followed_by: np.ndarray | None = None
    ) -> list[Tensor]:
        """The states of these prompts, B x (L, D), gathered at once.

        `without_words`: (B,) bool, of which only the states of the turn's own tokens are wanted. `followed_by`: (B,)
        prompts whose turn's own tokens come after, -1 = none.
        """
        samples = np.arange(len(rows))
        bare = np.zeros(len(rows), dtype=bool) if without_words is None else without_words
        if followed_by is not None:
            order = np.argsort(np.concatenate([samples, samples[followed_by >= 0]]), kind="stable")
            rows = np.concatenate([rows, followed_by[followed_by >= 0]])[order]
            bare = np.concatenate([bare, np.ones(len(rows) - len(samples), dtype=bool)])[order]
            samples = np.concatenate([samples, samples[followed_by >= 0]])[order]
        skipped = bare * (self.lengths[rows] - sum(self.around))
        lengths = self.lengths[rows] - skipped
        before = np.cumsum(lengths) - lengths
        within = np.arange(lengths.sum()) - np.repeat(before, lengths)  # of each prompt
        within += np.where(within >= self.around[0], np.repeat(skipped, lengths), 0)
        places = within + np.repeat(self.starts[rows], lengths)
        gathered = self.states[torch.from_numpy(places).to(self.states.device, non_blocking=True)]
        return list(gathered.split(np.bincount(samples, lengths).astype(int).tolist()))


def encode_captions(encoder: TextEncoder, captions: Sequence[str]) -> States:
    """Every caption as the prompt of a turn, in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if encoder.model.device.type == "cuda" else torch.float32
    states, lengths = [], []
    distinct = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}  # captions without style repeat
    texts = list(distinct)
    for start in range(0, len(texts), _CHUNK):
        rows = encoder.encode_all(texts[start : start + _CHUNK])
        states.append(torch.cat(rows).to(dtype))
        lengths += [len(row) for row in rows]
    counts = np.array(lengths)
    which = np.array([distinct[caption] for caption in captions])
    starts = np.cumsum(counts) - counts
    return States(torch.cat(states), starts[which], counts[which], turn_tokens(encoder.tokenizer))


def train_denoiser(
    dit: Any,
    encoder: TextEncoder,
    codec: LatentCodec,
    gallery: Gallery,
    plan: FitSettings,
    density: SigmaDensity,
    seed: int,
    partial: Partial | None = None,
) -> Fitted:
    """Trains the transformer in place, in float32 weights with bfloat16 products on a GPU; `partial` as in `fit`."""
    model = AdaptedDiT(dit, [])
    device, count = gallery.device, len(gallery)
    rows = torch.arange(count, device=device)
    latents = torch.cat([codec.encode_pixels(gallery.pixels(part)).half() for part in rows.split(_CHUNK)])
    # Rows 0 .. N - 1 are the plain captions, N .. 2 N - 1 the detailed ones, 2 N the empty prompt.
    prompts = encode_captions(encoder, [*gallery.captions, *gallery.detailed, ""])
    null_text = prompts.take(np.array([2 * count]))[0]
    draws = Draws(count, plan.batch_size, seed, "cpu")
    noise_generator = torch.Generator(device)

    def loss_of(step: int) -> Tensor:
        draws.at(step)
        noise_generator.manual_seed(draws.seed_at(step))
        chosen = draws.rows()
        uniform = torch.rand(plan.batch_size, generator=draws.generator).numpy()
        with_style = uniform < 0.5 * (1 - _TEXT_DROPOUT)
        dropped = uniform >= 1 - _TEXT_DROPOUT
        is_wordless, is_followed = torch.rand(2, plan.batch_size, generator=draws.generator).numpy() < _SHARES
        rows = np.where(dropped, 2 * count, chosen.numpy() + np.where(with_style, count, 0))
        second = np.where(is_followed & ~with_style, chosen.numpy() + count, -1)
        text = prompts.take(rows, is_wordless, second)
        clean = latents[chosen.to(device)].float()  # (B, C, H, W)
        noise = torch.randn(clean.shape, generator=noise_generator, device=device)
        sigma = draw_sigmas(plan.batch_size, density, noise_generator)  # (B,)
        return loss(model, clean, noise, sigma, Encoded.of_prompts(text, null_text)).mean()

    def gradients() -> dict[str, Tensor]:
        with mixed_precision(device):
            loss_of(0).backward()
        found = {name: p.grad for name, p in dit.named_parameters() if p.grad is not None}
        dit.zero_grad()
        return found

    with training(dit):
        if device.type == "cuda":
            compile_blocks(dit, gradients, functools.partial(print, flush=True))
        return fit("transformer", [dit], loss_of, plan, device, partial)
