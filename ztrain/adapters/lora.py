"""LoRA on the DiT through peft, exported in the two layouts that others load.

`pytorch_lora_weights.safetensors`: diffusers' layout, `transformer.` keys, with peft's config in the header so that
alpha and options survive. `lora_comfyui.safetensors`: `diffusion_model.` keys with an `.alpha` for each module, which
ComfyUI's key map and diffusers read alike (zimage_facts.md section 5).
"""

import json
import re
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ztrain.adapters.base import MAX_WIDTH, Adapter, AdapterConfig, AdapterFile, TrainedConfig
from ztrain.errors import InputError

MAIN_LAYERS = r"^layers\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123])$"
"""Attention and feed-forward of the 30 main layers: 210 modules, 70.0 M parameters at rank 32."""

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "lora_comfyui.safetensors"

_PEFT_NAME = "ztrain"
_MAGNITUDE = "lora_magnitude_vector"
_OWN_FIELDS = {"r", "lora_alpha", "target_modules", "init_lora_weights", "lora_dropout"}
# These start from the base's own weights and change them; the export undoes that by a LoRA of twice the rank.
_BASE_CHANGING = ("pissa", "olora")


class LoraAdapterConfig(TrainedConfig):
    acts_without_reference: ClassVar[bool] = True
    beginnings: ClassVar[frozenset[str]] = frozenset({"init", "dropout"})

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=32, ge=1, le=MAX_WIDTH)
    alpha: float | None = Field(default=None, gt=0)
    """Numerator of the scale alpha / rank; rank when left out, so that the scale is 1 for every reader."""
    target_modules: str = MAIN_LAYERS
    """Regular expression that module names of the transformer must match in full."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    init: bool | str = True
    """peft's init_lora_weights: true (B = 0), gaussian, pissa, pissa_niter_N, olora, orthogonal. pissa and olora move a
    part of the base into the LoRA: a bf16 base then rounds what is left and training starts that far from the base."""
    peft: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further options of peft.LoraConfig as they are called there, such as use_dora or use_rslora."""

    @property
    def changes_base(self) -> bool:
        return str(self.init).split("_")[0] in _BASE_CHANGING

    def meaning(self) -> dict[str, Any]:
        return super().meaning() | {"alpha": float(self.rank) if self.alpha is None else self.alpha}

    def unlike(self, there: AdapterConfig) -> list[str]:
        assert isinstance(there, LoraAdapterConfig)
        if there.changes_base:
            return [
                f"weights of init {there.init} belong to a base that it changed; start from the export instead, a LoRA"
                f" of rank {2 * there.rank}"
            ]
        told = super().unlike(there)
        if self.changes_base:
            told.append(f"init {self.init} changes the base, and these weights belong to it as it is; leave init out")
        return told

    @model_validator(mode="after")
    def _plain_expression(self) -> "LoraAdapterConfig":
        try:
            re.compile(self.target_modules)
        except re.error as error:
            raise ValueError(f"target_modules is not a regular expression: {error}") from error
        if taken := _OWN_FIELDS & set(self.peft):
            raise ValueError(f"set {sorted(taken)} by the fields rank, alpha, target_modules, init and dropout")
        if self.peft.get("lora_bias") or self.peft.get("bias", "none") != "none":
            raise ValueError("peft bias and lora_bias are no part of the exported layouts; leave them out")
        if self.peft.get("use_dora") and self.changes_base:
            raise ValueError(f"init {self.init} with use_dora cannot be exported against the original base; choose one")
        return self


class Lora(Adapter[LoraAdapterConfig]):
    """Weights live inside the DiT as peft layers under one adapter name."""

    def __init__(self, config: LoraAdapterConfig) -> None:
        super().__init__(config)
        self.start: dict[str, Tensor] = {}  # weights right after a base-changing initialisation
        self.scaling: dict[str, float] = {}  # module name -> peft's factor on B A

    def _peft_config(self) -> Any:
        from peft import LoraConfig

        config = self.config
        try:
            return LoraConfig(
                r=config.rank,
                lora_alpha=config.rank if config.alpha is None else config.alpha,
                target_modules=config.target_modules,
                lora_dropout=config.dropout,
                init_lora_weights=config.init,
                **config.peft,
            )
        except (TypeError, ValueError, ImportError) as error:
            raise InputError(f"adapters lora: peft refuses these options: {error}") from error

    def attach(self, dit: nn.Module) -> None:
        matched = [name for name, _ in dit.named_modules() if re.fullmatch(self.config.target_modules, name)]
        if not matched:
            raise InputError(
                f"adapters lora: target_modules {self.config.target_modules!r} matches no module of the DiT"
            )
        awake = [parameter for parameter in dit.parameters() if parameter.requires_grad]
        try:
            dit.add_adapter(self._peft_config(), adapter_name=_PEFT_NAME)
        except (TypeError, ValueError, ImportError) as error:
            raise InputError(f"adapters lora: peft cannot add this LoRA: {error}") from error
        # peft freezes whatever is not its own: an adapter attached before this one would silently stop training.
        for parameter in awake:
            parameter.requires_grad_(True)
        for name, module in _peft_layers(dit):
            self.scaling[name] = module.scaling[_PEFT_NAME]
        # A bf16 base makes bf16 LoRA weights; the optimizer needs float32 ones.
        for parameter in dit.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        names = [name for name, _ in dit.named_parameters() if f".{_PEFT_NAME}" in name]
        if lost := [n for n in names if _with_peft_name(next(iter(_without_peft_name({n: torch.empty(0)})))) != n]:
            raise InputError(f"adapters lora: these peft options make weights that no export holds, such as {lost[0]}")
        if self.config.changes_base:
            self.start = {n: p.detach().clone() for n, p in dit.named_parameters() if f".{_PEFT_NAME}." in n}

    def set_scale(self, dit: nn.Module, scale: float) -> None:
        super().set_scale(dit, scale)
        for _, module in _peft_layers(dit):
            # Disabled, not scaled by 0: with DoRA the magnitude would stay. Enabling makes the weights trainable again.
            module.enable_adapters(scale != 0)
            if scale != 0:
                module.set_scale(_PEFT_NAME, scale)

    def export(self, weights: dict[str, Tensor]) -> dict[str, AdapterFile]:
        plain = _without_peft_name(weights)
        scaling = dict(self.scaling)
        if self.start:
            plain = _against_original_base(plain, _without_peft_name(self.start))
        exported = self.exported_config()
        peft_config = Lora(LoraAdapterConfig.model_validate(exported))._peft_config().to_dict()
        header = {f"transformer.{key}": value for key, value in peft_config.items() if _is_json(value)}
        files = {
            DIFFUSERS_FILE: AdapterFile(
                {f"transformer.{name}": tensor for name, tensor in plain.items()},
                {"format": "pt", "lora_adapter_metadata": json.dumps(header, sort_keys=True)},
            )
        }
        # ComfyUI's form of DoRA is another one, so a DoRA is exported for diffusers only (README, "Exported files").
        if not self.config.peft.get("use_dora"):
            comfy = {f"diffusion_model.{name}": tensor for name, tensor in plain.items()}
            for name, factor in scaling.items():
                rank = plain[f"{name}.lora_A.weight"].shape[0]
                comfy[f"diffusion_model.{name}.alpha"] = torch.tensor(factor * rank)
            files[COMFYUI_FILE] = AdapterFile(comfy, {"format": "pt"})
        return files

    def exported_config(self) -> dict[str, Any]:
        config = super().exported_config()
        config["alpha"] = float(self.config.rank) if self.config.alpha is None else self.config.alpha
        if self.start:
            # Twice the rank at the same factor on B A: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA.
            growth = 2**0.5 if self.config.peft.get("use_rslora") else 2.0
            config |= {"rank": 2 * self.config.rank, "alpha": growth * config["alpha"], "init": True}
        return config

    def read(self, files: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        tensors = files.get(DIFFUSERS_FILE, {})
        return {_with_peft_name(name.removeprefix("transformer.")): tensor for name, tensor in tensors.items()}


def _peft_layers(dit: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    found = [(name, module) for name, module in dit.named_modules() if isinstance(module, LoraLayer)]
    return [(name, module) for name, module in found if _PEFT_NAME in module.scaling]


def _without_peft_name(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as peft saves them: without the adapter's name, and DoRA's magnitude without `.weight`."""
    plain = {name.replace(f".{_PEFT_NAME}.weight", ".weight"): tensor for name, tensor in weights.items()}
    return {name.replace(f"{_MAGNITUDE}.weight", _MAGNITUDE): tensor for name, tensor in plain.items()}


def _with_peft_name(name: str) -> str:
    name = name + ".weight" if name.endswith(_MAGNITUDE) else name
    return name.removesuffix(".weight") + f".{_PEFT_NAME}.weight"


def _against_original_base(plain: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A - B0 A0 as one LoRA of twice the rank: the difference to the base as it was before the initialisation."""
    joined = {}
    for name, tensor in plain.items():
        if name.endswith("lora_A.weight"):
            joined[name] = torch.cat([tensor, start[name].to(tensor)], dim=0)
        elif name.endswith("lora_B.weight"):
            joined[name] = torch.cat([tensor, -start[name].to(tensor)], dim=1)
        else:
            raise InputError(f"a LoRA that starts from the base's weights cannot be exported with {name}")
    return joined


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return value is not None
