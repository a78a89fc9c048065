"""Vectors of pictures and texts by a frozen model in the user's folder or on the Hub, for scores and for dedup.

In: a repository of a vision model that transformers knows (SigLIP, SigLIP2 fixed or NaFlex, CLIP, DINOv2, CLIP's vision
tower with its projection), or of a style descriptor as CSD is published. Out: unit vectors on the CPU. Weights are read
from safetensors alone, and no code of a repository is run.

Legend: N pictures or texts, D width of a vector.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ztrain.errors import InputError
from ztrain.frozen.encoders import quiet_loading
from ztrain.frozen.sources import (
    Source,
    check_settings,
    explained,
    has_vocabulary,
    pretrained_model,
    pretrained_processor,
    pretrained_tokenizer,
    public_name,
    read_json,
    require_loaded,
)
from ztrain.io.tensors import check_whole, open_tensors

FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""Of a repository: weights, settings, vocabulary in any of its forms."""

_STYLE_HEAD = "last_layer_style"
_HEAD_WIDTH = 64  # of every CLIP that OpenAI published: github.com/openai/CLIP, clip/model.py, vision_width // 64


class Tower:
    """A loaded model: pictures, and texts where it reads them, to unit vectors."""

    def __init__(self, source: Source, name: str, processor: Any, model: nn.Module) -> None:
        self.name = name
        """What people call it; no path of this machine."""
        self.revision = source.revision
        """Branch, tag or commit of a Hub id, as it was asked for."""
        self._source, self._processor, self._model = source, processor, model

    @classmethod
    def load(
        cls, source: Source, dtype: torch.dtype, device: torch.device | str, *, name: str | None = None
    ) -> "Tower":
        """Raises InputError where the repository is none of those, or where a weight is missing or would be left over.

        `name`: what messages and records call the model; None: the source's own public name.
        """
        name = name or public_name(source.location)
        check_tower(source)
        folder = source.local(*FILES)
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"{name}: has no safetensors; convert its weights, other formats can hold code")
        with quiet_loading(), explained(name):
            head = _style_weights(folder)
            processor, model = _pretrained(folder, dtype, name) if head is None else _descriptor(folder, head, name)
        return cls(source, name, processor, model.to(device, dtype).eval().requires_grad_(False))

    @cached_property
    def weights(self) -> str:
        """Hash of all its files: weights, settings and vocabulary."""
        return digest(self._source)

    @cached_property
    def reads_text(self) -> bool:
        """Whether it has a text tower, and the vocabulary that this one was trained with."""
        return hasattr(self._model, "get_text_features") and self._has_vocabulary

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """(N, D) float32 unit vectors of RGB pictures of any sizes, which the model's own processor resizes and crops.

        `batch_size` changes rounding at most.
        """
        if not pictures or batch_size < 1:
            raise ValueError(f"{len(pictures)} pictures in batches of {batch_size}; give at least one")
        if odd := {picture.mode for picture in pictures} - {"RGB"}:
            raise ValueError(f"pictures of modes {sorted(odd)}; open them with ztrain.images")
        parts = []
        for start in range(0, len(pictures), batch_size):
            some = list(pictures[start : start + batch_size])
            inputs = self._processor(images=some, return_tensors="pt").to(self._device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
            of_pictures = getattr(self._model, "get_image_features", self._model)  # of models with a text tower too
            parts.append(self._unit(of_pictures(**inputs)))
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 unit vectors in the pictures' space. What exceeds the model's length is cut off.

        Padded as long as the model reads. SigLIP was trained on lower case and attends to the padding (arXiv
        2303.15343 and 2502.14786; google-research/big_vision, pp/ops_text.py), so it gets both; CLIP hides padding.
        """
        if not texts:
            raise ValueError("no texts; give at least one")
        config, tokenizer = self._model.config, self._tokenizer
        siglip = config.model_type.startswith("siglip")
        longest = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
        tokens = tokenizer(
            [text.lower() for text in texts] if siglip else list(texts),
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        ).to(self._device)
        kept = ("input_ids",) if siglip else ("input_ids", "attention_mask")
        return self._unit(self._model.get_text_features(**{key: tokens[key] for key in kept}))

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        if not hasattr(self._model, "get_text_features"):
            raise InputError(f"{self.name}: reads no text; take a model like CLIP or SigLIP")
        if not self._has_vocabulary:
            raise InputError(f"{self.name}: has no tokenizer; put the files of the one it was trained with beside it")
        folder = self._source.local(*FILES)
        # tokenizer.json is the whole tokenizer; by a model's type transformers would build another around its words.
        return pretrained_tokenizer(folder, PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else None)

    @cached_property
    def _has_vocabulary(self) -> bool:
        return has_vocabulary(self._source.local(*FILES))

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._model.parameters()).dtype

    def _unit(self, found: Any) -> Tensor:
        """(N, D) of what a model returns."""
        vectors = found if isinstance(found, Tensor) else found.get("image_embeds", found.get("pooler_output"))
        if vectors is None:
            raise InputError(f"{self.name}: has no vector for a whole picture; take a model that pools")
        return F.normalize(vectors.float(), dim=-1).cpu()


def check_tower(source: Source) -> None:
    """What a folder's files tell before its weights are read. Raises InputError as Tower.load."""
    from transformers import AutoImageProcessor

    source.require("config.json", what="a vision model")
    if (folder := source.folder) is None:
        return
    check_settings(folder)
    for path in folder.glob("*.safetensors"):
        check_whole(path)
    if (folder / "preprocessor_config.json").exists():
        pretrained_processor(folder, AutoImageProcessor, backend="pil")


def digest(source: Source) -> str:
    """Hash of the names and bytes of all files of `FILES` in a repository: what decides its vectors."""
    told = []
    for path in source.files(*FILES):
        with path.open("rb") as file:
            told.append((path.name, hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()))
    return hashlib.blake2b(json.dumps([told]).encode(), digest_size=16).hexdigest()


def _pretrained(folder: Path, dtype: torch.dtype, name: str) -> tuple[Any, nn.Module]:
    import transformers

    # The one class that AutoModel does not give: it would leave the projection out.
    architectures = read_json(folder / "config.json").get("architectures")
    projected = architectures == ["CLIPVisionModelWithProjection"]
    kind = transformers.CLIPVisionModelWithProjection if projected else transformers.AutoModel
    processor = pretrained_processor(folder, transformers.AutoImageProcessor, backend="pil")
    model, info = pretrained_model(kind, folder, dtype=dtype, ignore_mismatched_sizes=True)
    require_loaded(info, name)  # mismatched sizes as well
    return processor, model


@dataclass(frozen=True, slots=True)
class _StyleWeights:
    """Those of a style descriptor: OpenAI's names of a CLIP's vision tower, and the head (W, D)."""

    backbone: dict[str, Tensor]
    head: Tensor


def _style_weights(folder: Path) -> _StyleWeights | None:
    """Read where a repository holds a style descriptor in the layout of github.com/learn2phoenix/CSD, CSD/model.py."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_tensors(path) as file:
            names = {name.removeprefix("module.").removeprefix("model."): name for name in file.keys()}  # noqa: SIM118
            if _STYLE_HEAD in names:
                weights = {short: file.get_tensor(long) for short, long in names.items()}
    if not weights:
        return None
    prefix = "backbone."
    backbone = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    # The other head, for content, is what the training turned style away from.
    known = {_STYLE_HEAD, "last_layer_content", *(prefix + name for name in backbone)}
    require_loaded({"unexpected_keys": sorted(weights.keys() - known)}, public_name(str(folder)))
    return _StyleWeights(backbone, weights[_STYLE_HEAD])


class _StyleDescriptor(nn.Module):
    """Contrastive Style Descriptor (Somepalli et al., arXiv 2404.01292): a CLIP's pooled features through a head."""

    def __init__(self, vision: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.vision = vision
        self.head = nn.Parameter(head)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, D) of (N, 3, S, S)."""
        return self.vision(pixel_values).pooler_output @ self.head


def _descriptor(folder: Path, found: _StyleWeights, name: str) -> tuple[Any, nn.Module]:
    from transformers import AutoImageProcessor, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    weights = found.backbone
    width, _, patch, _ = weights["conv1.weight"].shape
    cells = round((len(weights["positional_embedding"]) - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["transformer.resblocks.0.mlp.c_fc.weight"]),
        num_hidden_layers=1 + max(int(key.split(".")[2]) for key in weights if key.startswith("transformer.")),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=cells * patch,
        patch_size=patch,
    )
    vision, renamed = CLIPVisionModel(config), _renamed(weights)
    wanted = {key: value.shape for key, value in vision.state_dict().items()}
    keys = {
        "missing_keys": wanted.keys() - renamed.keys(),
        "unexpected_keys": renamed.keys() - wanted.keys(),
        "mismatched_keys": [key for key, value in renamed.items() if wanted.get(key, value.shape) != value.shape],
    }
    require_loaded(keys, name)
    if found.head.ndim != 2 or len(found.head) != width:
        raise InputError(
            f"{name}: {_STYLE_HEAD} is {tuple(found.head.shape)} over features of {width}; take whole weights"
        )
    vision.load_state_dict(renamed)
    if (folder / "preprocessor_config.json").is_file():
        processor = pretrained_processor(folder, AutoImageProcessor, backend="pil")
    else:
        side = config.image_size
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return processor, _StyleDescriptor(vision, found.head)


_RENAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "transformer.resblocks": "encoder.layers",
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""From github.com/openai/CLIP, clip/model.py, VisionTransformer, to transformers' CLIPVisionModel."""


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under transformers' names; queries, keys and values apart."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        if "attn.in_proj_" in name:
            layer, _, kind = name.partition(".attn.in_proj_")
            layer = layer.replace("transformer.resblocks", "encoder.layers")
            for role, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{role}_proj.{kind}"] = part
            continue
        for theirs, ours in _RENAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed
