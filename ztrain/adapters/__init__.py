"""The kinds of adapters: one file each, one line each in the table."""

from typing import Annotated, Any

from pydantic import Field

from ztrain.adapters.base import Adapter, AdapterConfig, AdapterFile
from ztrain.adapters.lora import Lora, LoraAdapterConfig
from ztrain.adapters.projector import Projector, ProjectorConfig
from ztrain.adapters.siglip import Siglip, SiglipConfig
from ztrain.adapters.splice import Splice, SpliceConfig

ADAPTERS: dict[str, type[Adapter[Any]]] = {
    "splice": Splice,
    "projector": Projector,
    "lora": Lora,
    "siglip": Siglip,
}

AnyAdapterConfig = Annotated[
    SpliceConfig | ProjectorConfig | LoraAdapterConfig | SiglipConfig, Field(discriminator="kind")
]


_CONFIGS: tuple[type[AdapterConfig], ...] = (SpliceConfig, ProjectorConfig, LoraAdapterConfig, SiglipConfig)
_MEANT_BEFORE = {config.model_fields["kind"].default: config.meant_before for config in _CONFIGS}


def as_saved(settings: Any) -> Any:
    """An adapter's settings out of an export or a checkpoint, with the keys that its version did not have."""
    return {**_MEANT_BEFORE.get(settings.get("kind"), {}), **settings} if isinstance(settings, dict) else settings


def build_adapters(configs: list[Any], siglip_dim: int | None = None) -> list[Adapter[Any]]:
    """Modules for an ordered list of settings; `siglip_dim`: width of the loaded SigLIP model's features, if any."""
    return [ADAPTERS[config.kind](config.resolved(siglip_dim)) for config in configs]


def as_before(there: list[Any], here: list[Any]) -> list[Any]:
    """The list `here`, its keys that a run decides when it starts as the adapter of the same kind has them `there`."""
    told = {config.kind: config.decided({}).model_dump() for config in there}
    return [config.decided(told.get(config.kind, {})) for config in here]


def unlike_lists(there: list[Any], here: list[Any]) -> list[str]:
    """What keeps weights that were trained as the list `there` from a list that has each of its kinds, and perhaps
    others; empty: nothing."""
    own, unlike = {config.kind: config for config in here}, []
    for config in there:
        if config.kind in own:
            words_of = own[config.kind].unlike(config.decided({}))
            unlike += [f"adapters {config.kind}: {words}" for words in words_of]
        else:
            unlike.append(f"{config.kind} is not in adapters {describe_list(here)}")
    return unlike


def describe_list(configs: list[Any]) -> str:
    """The list as people write it: `[siglip, lora]`."""
    return "[" + ", ".join(config.kind for config in configs) + "]"


__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterConfig",
    "AdapterFile",
    "AnyAdapterConfig",
    "as_before",
    "as_saved",
    "build_adapters",
    "describe_list",
    "unlike_lists",
]
