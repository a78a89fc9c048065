"""Pretrains the VAE: pictures through 16 latent channels and back, with a touch of noise to keep latents smooth."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.fit import Draws, FitSettings, Fitted, fit, training
from miniature.gallery import Gallery

_KL_WEIGHT = 3e-4  # small: latents are scaled to unit variance afterwards, sharpness comes first
_STATISTICS_COUNT = 512


def train_vae(vae: Any, gallery: Gallery, plan: FitSettings, seed: int, augment: bool) -> Fitted:
    """Trains in place, then writes the latents' own mean and spread into the config, as shift and scaling factor.

    `augment` flips, turns by quarters and swaps colour channels at random: for galleries of few pictures.
    """
    draws = Draws(len(gallery), plan.batch_size, seed, gallery.device)
    vae.to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        pixels = gallery.pixels(draws.rows())
        if augment:
            pixels = _augmented(pixels, draws.generator)
        pixels = pixels.to(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draws.generator, device=pixels.device)
        latents = posterior.mean + posterior.std * noise
        decoded = vae.decode(latents.to(pixels.dtype), return_dict=False)[0].float()
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        return F.mse_loss(decoded, pixels) + 0.05 * F.l1_loss(decoded, pixels) + _KL_WEIGHT * divergence

    with training(vae):
        fitted = fit("vae", [vae], loss, plan, gallery.device)
    vae.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        # Drawn: the pictures of a folder lie style by style.
        some = torch.randperm(len(gallery), generator=draws.generator, device=gallery.device)[:_STATISTICS_COUNT]
        latents = torch.cat([vae.encode(gallery.pixels(rows)).latent_dist.mode() for rows in some.split(64)])
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4), scaling_factor=round(1 / float(latents.std()), 4)
    )
    return fitted


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """One of 48 versions of each picture's batch: 8 orientations times 6 orders of channels, drawn for the batch."""
    choice = torch.randint(48, (1,), generator=generator, device=pixels.device).item()
    turns, flip, order = choice % 4, choice // 4 % 2, choice // 8
    pixels = torch.rot90(pixels, int(turns), (2, 3))
    if flip:
        pixels = pixels.flip(3)
    return pixels[:, [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)][int(order)]]
