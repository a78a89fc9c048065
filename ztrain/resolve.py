"""Keys that may be left out and that a run decides when it starts: its config.yaml and checkpoints hold what it took.

In: a config, and the settings of the checkpoint that the run goes on from, if any: then those count, and the run goes
on as it began. Out: the same config with every such key set.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ztrain.adapters import describe_list
from ztrain.config import Config, FlowConfig, TrainConfig
from ztrain.io.yamls import parse

T = TypeVar("T")

_NONE = {"dropout_text": 0.0, "dropout_reference": 0.0, "dropout_both": 0.0, "prior_weight": 0.0}
_WITHOUT_REFERENCES = _NONE | {"dropout_both": 0.05}
_WITH_REFERENCES = _NONE | {"dropout_reference": 0.05, "dropout_both": 0.05, "prior_weight": 1.0}
"""What guidance leans on: text guidance asks for neither prompt nor reference, image guidance for the prompt alone. The
prior keeps the base there, so that a list that acts without a reference does not drift."""


def resolve(config: Config, saved: Mapping[str, Any] | None) -> Config:
    """`saved`: the settings of a checkpoint. Raises InputError where the shares of dropout are more than 1 together."""
    before = saved or {}
    source = f"train, with what is left out as {describe_list(list(config.adapters))} wants it"
    train = _filled(config.train, before.get("train", {}), dropouts_of(config))
    dropped, share = train["dropout_reference"] + train["dropout_both"], config.data.text_only_share
    if config.train.prior_weight is None and saved is None and (share or not dropped):
        # Pictures without references are there to be learned; and with none dropped the base would run for nothing.
        train["prior_weight"] = 0.0
    flow = _filled(config.flow, before.get("flow", {}), {"shift": shift_of(config.flow)})
    earlier = before.get("adapters", [])
    adapters = [
        adapter.decided(earlier[place] if place < len(earlier) else {}) for place, adapter in enumerate(config.adapters)
    ]
    return config.model_copy(
        update={
            "train": parse(TrainConfig, train, source),
            "flow": parse(FlowConfig, flow, "flow"),
            "adapters": adapters,
        }
    )


def _filled(section: TrainConfig | FlowConfig, before: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    told = section.model_dump(mode="json")
    return told | {key: before.get(key, value) for key, value in chosen.items() if told[key] is None}


def dropouts_of(config: Config) -> dict[str, float]:
    """Shares that a fresh run takes, by key of `train`, and its prior_weight.

    A sample without a reference is the frozen base where no adapter acts without one: it would teach nothing.
    """
    if not any(adapter.acts_without_reference for adapter in config.adapters):
        return _NONE
    return _WITH_REFERENCES if config.reads else _WITHOUT_REFERENCES


def shift_of(flow: FlowConfig) -> float | Literal["scheduler", "resolution"]:
    """As it is set. Left out: a logit-normal density is meant as it is, the others are the scheduler's."""
    if flow.shift is not None:
        return flow.shift
    return 1.0 if flow.sigma_sampling == "logit_normal" else "scheduler"


def given(value: T | None) -> T:
    """A key of a config that was resolved."""
    assert value is not None, "resolve the config first"
    return value


def idle_share(config: Config) -> float:
    """Share of a resolved config's samples that teach nothing, because no adapter acts without a reference."""
    if any(adapter.acts_without_reference for adapter in config.adapters):
        return 0.0
    dropped = given(config.train.dropout_reference) + given(config.train.dropout_both)
    return 1 - (1 - config.data.text_only_share) * (1 - dropped)


def describe_dropouts(config: Config) -> str:
    """The sentence of a resolved config for those who start a run."""
    t = config.train
    text, reference, both = given(t.dropout_text), given(t.dropout_reference), given(t.dropout_both)
    told = f"dropouts: text {text:g}, reference {reference:g}, both {both:g}; prior_weight {given(t.prior_weight):g}"
    if idle := idle_share(config):
        listed = describe_list(list(config.adapters))
        told += f"; {idle:.1%} of the samples teach nothing: {listed} does not act without a reference"
    return told
