"""The frozen encoders: prompts, references and targets in, `Encoded` states and latents out; latents back to images.

Only what an adapter list reads is loaded. Everything runs without gradients. The conventions that live here: the chat
template, the latents' shift and scale, SigLIP grids in row order.

Legend: L tokens, D text width, C latent channels, H and W latent sides, (h, w, S) SigLIP grid and width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ztrain.errors import InputError
from ztrain.frozen.sources import (
    PARTS,
    Source,
    load_part,
    pretrained,
    pretrained_model,
    pretrained_processor,
    pretrained_tokenizer,
    require_loaded,
)
from ztrain.frozen.vision_language import first_layers

_OMNI_PIXELS = 1024 * 1024  # ZImageOmniPipeline shrinks larger references to this area
_OMNI_MULTIPLE = 16


class TextEncoder:
    """Z-Image's own prompt encoding: the chat turn's second to last hidden state, without padding."""

    def __init__(self, model: Any, tokenizer: Any, max_sequence_length: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.max_sequence_length = tokenizer, max_sequence_length

    @classmethod
    def load(
        cls, source: Source, max_sequence_length: int, dtype: torch.dtype, device: torch.device | str
    ) -> "TextEncoder":
        from transformers import Qwen3Model

        tokenizer = pretrained_tokenizer(source.part("tokenizer", what="a Z-Image model"))
        model = load_part(Qwen3Model, source, "text_encoder", device, dtype=dtype)
        return cls(model, tokenizer, max_sequence_length)

    def encode(self, prompt: str) -> Tensor:
        """(L, D) of one prompt, at most max_sequence_length tokens."""
        return self.encode_all([prompt])[0]

    def encode_all(self, prompts: Sequence[str]) -> list[Tensor]:
        """B x (L, D) of many prompts in one forward: views of one padded batch."""
        # enable_thinking=True leaves the think block out (zimage_facts.md section 4).
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for prompt in prompts
        ]
        return self._states(texts, prompts)

    def encode_segment(self, text: str) -> Tensor:
        """(L, D) of a text as it stands, without the chat turn."""
        return self._states([text], [text])[0]

    @torch.no_grad()
    def _states(self, texts: Sequence[str], prompts: Sequence[str]) -> list[Tensor]:
        rows = [torch.tensor(self.tokenizer(text).input_ids) for text in texts]  # B x (L,)
        for ids, prompt in zip(rows, prompts, strict=True):
            if len(ids) > self.max_sequence_length:
                raise InputError(
                    f"the prompt {prompt[:60]!r} has {len(ids)} tokens, more than encoders.max_sequence_length"
                    f" {self.max_sequence_length}; shorten it"
                )
        # The model is causal: no token sees the padding on its right, whatever that is, so there is no mask.
        ids = pad_sequence(rows, batch_first=True).to(self.model.device)
        with first_layers(self.model, len(self.model.layers) - 1):
            states = self.model(input_ids=ids, use_cache=False).last_hidden_state
        return [state[: len(row)] for state, row in zip(states, rows, strict=True)]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' table of unused weights: a vision tower out of a whole model leaves many, and what is
    missing is an error of ours."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class LatentCodec:
    """The VAE with Z-Image's shift and scale: images <-> latents."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae.eval().requires_grad_(False)

    @classmethod
    def load(cls, source: Source, dtype: torch.dtype, device: torch.device | str) -> "LatentCodec":
        from diffusers import AutoencoderKL

        return cls(load_part(AutoencoderKL, source, "vae", device, torch_dtype=dtype))

    @property
    def factor(self) -> int:
        """Pixels of a latent's side: 8."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of an image of so many pixels, which must be divisible by 16."""
        step = 2 * self.factor
        if height % step or width % step or min(height, width) < step:
            raise InputError(f"an image of {width} x {height} pixels: both sides must be multiples of {step}")
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

    def encode(self, image: Image.Image) -> Tensor:
        """(C, H, W) float32 latents of an RGB image."""
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1  # (3, 8 H, 8 W)
        return self.encode_pixels(pixels.unsqueeze(0))[0]

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) float32 latents of (B, 3, 8 H, 8 W) in [-1, 1]: the posterior's mode, shifted and scaled."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        config = self.vae.config
        return ((posterior.mode() - config.shift_factor) * config.scaling_factor).float()

    def decode(self, latents: Tensor) -> Image.Image:
        """The 8-bit RGB image of (C, H, W) latents."""
        pixels = self.decode_pixels(latents.unsqueeze(0))[0]
        return Image.fromarray(((pixels / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).cpu().numpy())

    @torch.no_grad()
    def decode_pixels(self, latents: Tensor) -> Tensor:
        """(B, 3, 8 H, 8 W) float32 pixels in [-1, 1] of latents (B, C, H, W)."""
        config = self.vae.config
        scaled = latents / config.scaling_factor + config.shift_factor
        pixels = self.vae.decode(scaled.to(self.vae.device, self.vae.dtype), return_dict=False)[0]
        return pixels.float().clamp(-1, 1)


class SiglipEncoder:
    """SigLIP2 NaFlex features as grids."""

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device | str) -> None:
        from transformers import Siglip2ImageProcessorPil, Siglip2VisionModel

        source.require("config.json", what="a SigLIP2 model")
        folder = source.local(*PARTS)
        with quiet_loading():
            self.processor = pretrained_processor(folder, Siglip2ImageProcessorPil)
            model, info = pretrained_model(Siglip2VisionModel, folder, dtype=dtype)
        if info["missing_keys"]:
            require_loaded({"missing_keys": info["missing_keys"]}, source.location)
        self.model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, image: Image.Image) -> Tensor:
        """(h, w, S): last hidden state after the final norm, as ZImageOmniPipeline.prepare_siglip_embeds."""
        inputs = self.processor(images=[image], return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        height, width = (int(side) for side in inputs["spatial_shapes"][0])
        hidden = self.model(**inputs).last_hidden_state[0]
        return hidden[: height * width].view(height, width, -1)


def siglip_width(source: Source) -> int:
    """Width of a SigLIP2 model's features, from its config alone."""
    from transformers import Siglip2VisionConfig

    source.require("config.json", what="a SigLIP2 model")
    return int(pretrained(Siglip2VisionConfig, source.local("*.json")).hidden_size)


def omni_crop(image: Image.Image) -> Image.Image:
    """A reference as the stock omni layout feeds it to the VAE: at most 1 MP, centre-cropped to multiples of 16."""
    if image.width * image.height > _OMNI_PIXELS:
        factor = (_OMNI_PIXELS / (image.width * image.height)) ** 0.5
        image = image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.LANCZOS)
    width, height = (side // _OMNI_MULTIPLE * _OMNI_MULTIPLE for side in image.size)
    if not width or not height:
        raise InputError(f"a reference of {image.width} x {image.height} pixels is smaller than one patch of 16 x 16")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
