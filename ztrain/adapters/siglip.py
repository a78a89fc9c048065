"""The unreleased components: siglip_embedder, siglip_refiner and siglip_pad_token, built on a DiT that lacks them.

Modules, names and shapes are diffusers' (ZImageTransformer2DModel with siglip_feat_dim), so a trained set loads as the
Omni layout does. They are constructed here with real initialisations, because loading a checkpoint without them into a
config with siglip_feat_dim leaves uninitialised memory (zimage_facts.md 0.3).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ztrain.adapters.base import MAX_WIDTH, Adapter, Reads, TrainedConfig
from ztrain.conditioning import Conditioning, Encoded
from ztrain.errors import InputError
from ztrain.io.gguf import plain_copy
from ztrain.io.tensors import open_tensors
from ztrain.io.yamls import PathText

Initialisation = Literal["context_refiner", "random", "statistics_matched", "cap_embedder_slice", "file", "checkpoint"]


class SiglipConfig(TrainedConfig):
    # The width is in the weights' shapes.
    beginnings: ClassVar[frozenset[str]] = frozenset({"feature_dim", "init", "init_seed", "init_file", "init_key_map"})

    kind: Literal["siglip"] = "siglip"
    feature_dim: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """Width of the SigLIP features: 1152 for siglip2-so400m. None: that of models.siglip."""
    trains: Literal["embedder", "embedder_and_refiner"] = "embedder_and_refiner"
    """embedder: 4.4 M parameters, the refiner stays a frozen copy of context_refiner; both: 358.4 M."""
    init: Initialisation = "context_refiner"
    """context_refiner: refiner copied from it, embedder of unit output variance; random: both random;
    statistics_matched: embedder with the spread and bias of cap_embedder's output; cap_embedder_slice: its first
    columns (the last three copy the refiner too); file: from init_file; checkpoint: the base already has them."""
    init_seed: int = 0
    init_file: PathText | None = None
    """A safetensors file, for init: file."""
    init_key_map: dict[str, str] = Field(default_factory=dict)
    """Our key -> the file's key, for example siglip_embedder.1.weight: connector.fc1.weight. Smaller tensors are
    padded with zeros; keys left out keep the context_refiner initialisation."""
    layout: Literal["one_segment", "stock_without_latents", "stock"] = "one_segment"
    """one_segment: beside the prompt's one caption segment, at the target's grid; stock: ZImageOmniPipeline's, with
    three caption segments and the reference's clean latents, for official Omni weights; stock_without_latents: the
    same with blank latents, so that a reference is seen through SigLIP alone."""
    token_order: Literal["rows", "stock"] | None = None
    """rows: token i is patch i of the grid in row order; stock: diffusers', which scrambles patches and channels
    (zimage_facts.md 3.4); None: as the layout was released, rows with one_segment and stock otherwise."""

    @property
    def reads(self) -> Reads:
        return frozenset({"siglip", "omni"} if self.has_stock_layout else {"siglip"})

    @property
    def has_stock_layout(self) -> bool:
        return self.layout != "one_segment"

    @property
    def needs_training(self) -> bool:
        return self.init != "checkpoint"

    def meaning(self) -> dict[str, Any]:
        released = "rows" if self.layout == "one_segment" else "stock"
        return super().meaning() | {"token_order": self.token_order or released}

    def resolved(self, siglip_dim: int | None) -> "SiglipConfig":
        if siglip_dim is None or self.feature_dim == siglip_dim:
            return self
        if self.feature_dim is not None:
            raise InputError(
                f"adapters siglip: feature_dim is {self.feature_dim}, but models.siglip gives {siglip_dim}"
            )
        return self.model_copy(update={"feature_dim": siglip_dim})

    @model_validator(mode="after")
    def _consistent(self) -> "SiglipConfig":
        if (self.init == "file") != (self.init_file is not None):
            raise ValueError("init_file goes with init: file, and only with it")
        if self.init == "file" and not self.init_key_map:
            raise ValueError("init: file needs init_key_map, our key: the file's key")
        if self.trains == "embedder" and self.init == "random":
            raise ValueError("trains: embedder freezes the refiner, so it cannot be random; use another init")
        if self.trains == "embedder" and any(key.startswith("siglip_refiner") for key in self.init_key_map):
            raise ValueError("trains: embedder exports no refiner, so init_key_map cannot name siglip_refiner keys")
        return self


class Siglip(Adapter[SiglipConfig]):
    """Weights live inside the DiT under diffusers' own names."""

    def attach(self, dit: Any) -> None:
        config = self.config
        assert config.feature_dim is not None, "resolve the config with the SigLIP model's width first"
        present = getattr(dit, "siglip_embedder", None) is not None
        if present != (config.init == "checkpoint"):
            fact = "already has" if present else "lacks"
            raise InputError(
                f"adapters siglip: the base {fact} siglip components, which does not go with init: {config.init}"
            )
        if not present:
            _build(dit, config, config.feature_dim)
        elif dit.siglip_embedder[1].in_features != config.feature_dim:
            width = dit.siglip_embedder[1].in_features
            raise InputError(f"adapters siglip: feature_dim is {config.feature_dim}, but the base was made for {width}")
        dit.siglip_embedder.float().requires_grad_(True)
        dit.siglip_pad_token.data = dit.siglip_pad_token.data.float()
        dit.siglip_pad_token.requires_grad_(True)
        if config.trains == "embedder_and_refiner":
            dit.siglip_refiner.float().requires_grad_(True)

    def forward(self, conditioning: Conditioning, encoded: Encoded) -> Conditioning:
        layout, order = self.config.layout, self.config.token_order
        siglip, omni = encoded.siglip, None
        if layout == "one_segment":
            siglip = _each(siglip, scramble) if order == "stock" else siglip
        else:
            omni = encoded.omni
            # diffusers' forward scrambles what it is given.
            siglip = _each(siglip, unscramble) if order == "rows" else siglip
            if layout == "stock_without_latents":
                omni = [replace(sample, latents=[torch.zeros_like(x) for x in sample.latents]) for sample in omni]
        factors = [[self.scale * factor for factor in references] for references in encoded.siglip_factors]
        return replace(conditioning, siglip=siglip, siglip_scale=factors, omni=omni)

    def exported_config(self) -> dict[str, Any]:
        config = super().exported_config()
        if self.config.init != "checkpoint":
            # The exported weights replace what an initialisation made; what stays frozen is context_refiner's copy.
            config |= {"init": "context_refiner", "init_file": None, "init_key_map": {}}
        return config


def _each(siglip: list[list[Tensor]], change: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    return [[change(grid) for grid in references] for references in siglip]


def scramble(grid: Tensor) -> Tensor:
    """(h, w, S) as diffusers' omni forward reads it: row i holds S neighbours of the channel-major (S, h w) buffer."""
    return grid.permute(2, 0, 1).reshape(grid.shape)


def unscramble(grid: Tensor) -> Tensor:
    """The inverse of `scramble`, (h, w, S)."""
    height, width, channels = grid.shape
    return grid.reshape(channels, height, width).permute(1, 2, 0)


def _build(dit: Any, config: SiglipConfig, width: int) -> None:
    from diffusers.models.normalization import RMSNorm

    source = dit.cap_embedder[1].weight
    embedder = nn.Sequential(RMSNorm(width, eps=dit.config.norm_eps), nn.Linear(width, dit.dim))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.init_seed)
        refiner = plain_copy(dit.context_refiner).requires_grad_(False)
        if config.init == "random":
            for module in refiner.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
        _init_embedder(embedder[1], dit.cap_embedder, config)
    dit.siglip_embedder = embedder.to(source.device, source.dtype).requires_grad_(False)
    dit.siglip_refiner = refiner
    dit.siglip_pad_token = nn.Parameter(dit.cap_pad_token.detach().clone(), requires_grad=False)
    dit.register_to_config(siglip_feat_dim=width)
    if config.init == "file":
        _load_file(dit, config)


@torch.no_grad()
def _init_embedder(linear: nn.Linear, cap_embedder: nn.Sequential, config: SiglipConfig) -> None:
    gain, weight, bias = (
        cap_embedder[0].weight.float(),
        cap_embedder[1].weight.float(),
        cap_embedder[1].bias.float(),
    )
    nn.init.zeros_(linear.bias)
    match config.init:
        case "statistics_matched":
            # For inputs of unit RMS, output i of cap_embedder has variance sum_j (W_ij g_j)^2; match its mean over i.
            spread = (weight * gain).square().sum(dim=1).mean().sqrt()
            noise = torch.randn(linear.weight.shape).to(linear.weight.device)
            linear.weight.copy_(noise * (spread.to(noise.device) / math.sqrt(linear.in_features)))
            linear.bias.copy_(bias)
        case "cap_embedder_slice":
            columns = min(linear.in_features, weight.shape[1])
            linear.weight.zero_()
            linear.weight[:, :columns] = weight[:, :columns].to(linear.weight.device)
            linear.bias.copy_(bias)
        case _:
            nn.init.normal_(linear.weight, std=1.0 / math.sqrt(linear.in_features))


@torch.no_grad()
def _load_file(dit: nn.Module, config: SiglipConfig) -> None:
    path = Path(str(config.init_file))
    if not path.is_file():
        raise InputError(f"adapters siglip: init_file {path} does not exist")
    ours = {name: p for name, p in dit.named_parameters() if name.startswith("siglip_")}
    with open_tensors(path) as file:
        available = set(file.keys())
        for key, theirs in config.init_key_map.items():
            if key not in ours:
                raise InputError(f"adapters siglip: init_key_map names {key}, which is none of {sorted(ours)}")
            if theirs not in available:
                raise InputError(f"adapters siglip: {path} has no tensor {theirs}; it has {sorted(available)[:8]} ...")
            _copy_padded(ours[key], file.get_tensor(theirs), key)


def _copy_padded(target: Tensor, source: Tensor, key: str) -> None:
    fits = source.ndim == target.ndim and all(s <= t for s, t in zip(source.shape, target.shape, strict=True))
    if not fits:
        raise InputError(
            f"adapters siglip: {key} is {tuple(target.shape)}; a {tuple(source.shape)} tensor does not fit in"
        )
    target.zero_()
    target[tuple(slice(0, size) for size in source.shape)] = source.to(target)
