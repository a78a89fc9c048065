"""Pretrains SigLIP2 on pictures and captions: sigmoid pairs between towers, and patches that remember their pixels.

SigLIP2 adds to the sigmoid loss objectives that make dense features local (arXiv 2502.14786, section 2). Here one
linear head asks every patch for a small copy of itself; it is thrown away afterwards.

Legend: B pictures, P patches, L tokens, W width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Siglip2Model

from miniature.fit import Draws, FitSettings, Fitted, fit, full_precision, training
from miniature.gallery import Gallery

_PATCH = 16
_COPY = 4  # side of the small copy that every patch's feature must give
_TEXT_TOKENS = 32
_LOCAL_WEIGHT = 1.0


def siglip_patches(pixels: Tensor, num_patches: int) -> Tensor:
    """What Siglip2ImageProcessor makes of B square pictures, (B, P, 16 * 16 * 3); pixels (B, 3, S, S) in [-1, 1]."""
    side = int(num_patches**0.5) * _PATCH
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True).clamp(-1, 1)
    cells = side // _PATCH
    blocks = pixels.view(len(pixels), 3, cells, _PATCH, cells, _PATCH).permute(0, 2, 4, 3, 5, 1)
    return blocks.reshape(len(pixels), cells * cells, -1)


def train_siglip(
    model: Siglip2Model, tokenizer: Qwen2Tokenizer, gallery: Gallery, plan: FitSettings, seed: int
) -> Fitted:
    """Trains both towers in place, on the detailed captions."""
    num_patches = model.config.vision_config.num_patches
    cells = int(num_patches**0.5)
    captions = gallery.detailed
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, max_length=_TEXT_TOKENS, return_tensors="pt"
    ).input_ids.to(gallery.device)
    draws = Draws(len(gallery), plan.batch_size, seed, gallery.device)
    local = nn.Linear(model.config.vision_config.hidden_size, 3 * _COPY * _COPY).to(gallery.device)
    shapes = torch.tensor([[cells, cells]], device=gallery.device).expand(plan.batch_size, -1)
    # Captions of several pictures may be equal: those pairs are as true as a picture's own.
    numbers = {caption: number for number, caption in enumerate(sorted(set(captions)))}
    caption_numbers = torch.tensor([numbers[caption] for caption in captions], device=gallery.device)

    def loss(step: int) -> Tensor:
        rows = draws.rows()
        patches = siglip_patches(gallery.pixels(rows), num_patches)
        seen = model.vision_model(patches, None, shapes)  # no mask: every patch is one
        image = F.normalize(seen.pooler_output.float(), dim=-1)
        text = F.normalize(model.text_model(input_ids=tokens[rows]).pooler_output.float(), dim=-1)
        with full_precision(gallery.device):
            logits = text @ image.T * model.logit_scale.exp() + model.logit_bias  # (B, B)
        same = caption_numbers[rows][:, None] == caption_numbers[rows]
        pairs = -F.logsigmoid(torch.where(same, logits, -logits)).sum(1).mean()
        small = F.avg_pool2d(_unfold(patches), _PATCH // _COPY).flatten(1)  # (B P, 3 * 4 * 4)
        return pairs + _LOCAL_WEIGHT * F.mse_loss(local(seen.last_hidden_state).flatten(0, 1).float(), small)

    with torch.no_grad():
        model.logit_scale.fill_(2.3)  # log 10 and -10: the start of SigLIP (arXiv 2303.15343, section 3.2)
        model.logit_bias.fill_(-10.0)
    with training(model, local), equal_shapes(model.vision_model.embeddings):
        return fit("siglip", [model, local], loss, plan, gallery.device)


@contextmanager
def equal_shapes(embeddings: Any) -> Iterator[None]:
    """Resizes the table of positions once for a batch of equal grids, where transformers does it for each picture."""
    resize = embeddings.resize_positional_embeddings
    embeddings.resize_positional_embeddings = lambda table, shapes, max_length: resize(table, shapes[:1], max_length)
    try:
        yield
    finally:
        del embeddings.resize_positional_embeddings


def _unfold(patches: Tensor) -> Tensor:
    """(B, P, 16 * 16 * 3) -> (B P, 3, 16, 16)."""
    return patches.view(-1, _PATCH, _PATCH, 3).permute(0, 3, 1, 2)
