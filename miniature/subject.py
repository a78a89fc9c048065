"""A family as the scorecard judges it: read by the loaders of the real weights, in float32, and asked for pictures.

In come prompts, states and pictures; out come states and pictures as uint8. The sampler is the real one.

Legend: T pictures, S pixels of a side.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from miniature.family import BASE, MARKER, VISION_LANGUAGE
from ztrain.conditioning import Encoded
from ztrain.config import EncodersConfig, ModelConfig, ModelsConfig
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec, TextEncoder
from ztrain.frozen.sources import Source, base_defaults, pretrained_model, read_json
from ztrain.frozen.vision_language import SplicedModel
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import load_transformer
from ztrain.model.sampler import Picture, SampleSettings, sample_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A loaded family. `about` is what its pretraining noted of each stage: world, seed and recipe."""

    folder: Path
    about: dict[str, Any]
    text: TextEncoder
    codec: LatentCodec
    dit: Any
    settings: SampleSettings
    size: int
    seed: int
    device: torch.device

    @classmethod
    def load(
        cls,
        folder: Path,
        size: int,
        seed: int,
        device: torch.device,
        *,
        num_inference_steps: int,
        guidance_scale: float = 0.0,
    ) -> "Subject":
        if not (folder / MARKER).is_file():
            raise InputError(
                f"{folder} is no family: {MARKER} is missing; give the folder that `ztrain mini pretrain` names"
            )
        source, dtype = Source(str(folder / BASE)), torch.float32
        # The shift is the checkpoint's own; steps and guidance are given, so the variant does not matter.
        models = ModelsConfig(base=ModelConfig(pretrained_model_name_or_path=source.location), variant="base")
        return cls(
            folder=folder,
            about=read_json(folder / MARKER),
            text=TextEncoder.load(source, EncodersConfig().max_sequence_length, dtype, device),
            codec=LatentCodec.load(source, dtype, device),
            dit=load_transformer(source, dtype, device),
            settings=SampleSettings(
                num_inference_steps=num_inference_steps,
                shift=base_defaults(models).shift,
                guidance_scale=guidance_scale,
            ),
            size=size,
            seed=seed,
            device=device,
        )

    @property
    def batch(self) -> int:
        return 256 if self.device.type == "cuda" else 64

    @property
    def training_seeds(self) -> list[int]:
        """Of the galleries that its models and judges were trained on."""
        return sorted({stage["seed"] for stage in self.about.values()})

    @property
    def num_layers(self) -> int:
        """Of the text encoder."""
        return self.text.model.config.num_hidden_layers

    @property
    def reference_pixels(self) -> tuple[int, int]:
        """Smallest and largest area at which this family's Qwen3-VL looks at a picture."""
        processor = read_json(self.folder / VISION_LANGUAGE / "preprocessor_config.json")
        return processor["size"]["shortest_edge"], processor["size"]["longest_edge"]

    def vision_language(self) -> Qwen3VLForConditionalGeneration:
        folder = self.folder / VISION_LANGUAGE
        model, _ = pretrained_model(Qwen3VLForConditionalGeneration, folder, dtype=torch.float32)
        return model.to(self.device).eval()

    def spliced(self) -> SplicedModel:
        return SplicedModel(Source(str(self.folder / VISION_LANGUAGE)), self.text.model, self.text.tokenizer)

    def raw(self) -> SplicedModel:
        """Qwen3-VL as it is, read where the splice is read: its own language model in the text encoder's place."""
        language_model = copy.deepcopy(self.text.model)
        language_model.load_state_dict(self.vision_language().model.language_model.state_dict(), strict=True)
        return SplicedModel(Source(str(self.folder / VISION_LANGUAGE)), language_model, self.text.tokenizer)

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        chunks = [prompts[start : start + self.batch] for start in range(0, len(prompts), self.batch)]
        return [states for chunk in chunks for states in self.text.encode_all(chunk)]

    def draw(self, prompts: Sequence[str]) -> Tensor:
        """(T, 3, S, S) uint8 of prompts without references."""
        encoded = Encoded.of_prompts(self.encode(prompts), self.text.encode(""))
        return self.render(AdaptedDiT(self.dit, []), encoded)

    def render(self, model: AdaptedDiT, encoded: Encoded) -> Tensor:
        """(T, 3, S, S) uint8; picture i starts from the same noise whatever the model and the states."""
        shape = self.codec.latent_shape(self.size, self.size)
        pictures = [Picture(row=row, seed=self.seed + row, shape=shape) for row in range(len(encoded))]
        latents = sample_all(model, encoded, pictures, self.settings, batch_size=self.batch, device=self.device)
        batches = torch.stack(list(latents)).split(self.batch)
        return torch.cat([to_bytes(self.codec.decode_pixels(batch)) for batch in batches])

    def through_codec(self, images: Tensor) -> Tensor:
        """Pictures as the VAE gives them back, (T, 3, S, S) uint8."""
        parts = [self.codec.encode_pixels(part.float() / 127.5 - 1) for part in images.split(self.batch)]
        return torch.cat([to_bytes(self.codec.decode_pixels(part)) for part in parts])


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as uint8."""
    return ((pixels / 2 + 0.5) * 255).round().to(torch.uint8)


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(T, 3, S, S) uint8 as RGB pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.cpu()]
