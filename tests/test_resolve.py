"""Keys that a run decides when it starts: what each list gets, and what a resumed run goes on with."""

from pathlib import Path

import pytest

from ztrain.config import Config
from ztrain.errors import InputError
from ztrain.resolve import describe_dropouts, resolve
from ztrain.weights import checkpoint
from ztrain.weights.checkpoint import frozen_differences

SIGLIP, LORA, PROJECTOR = {"kind": "siglip"}, {"kind": "lora"}, {"kind": "projector"}
DROPOUTS = ("dropout_text", "dropout_reference", "dropout_both", "prior_weight")


def config_of(*adapters: dict, **sections: dict) -> Config:
    return Config.model_validate({"adapters": list(adapters), **sections})


def dropouts(config: Config) -> dict[str, float | None]:
    return {key: getattr(config.train, key) for key in DROPOUTS}


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        ([SIGLIP], (0, 0, 0, 0)),
        ([PROJECTOR], (0, 0, 0, 0)),
        ([LORA], (0, 0, 0.05, 0)),
        ([SIGLIP, LORA], (0, 0.05, 0.05, 1)),
        ([{"kind": "splice"}, LORA], (0, 0.05, 0.05, 1)),
    ],
)
def test_dropouts_are_what_guidance_needs_and_a_list_can_learn_from(adapters: list, expected: tuple) -> None:
    fresh = resolve(config_of(*adapters), None)
    assert tuple(dropouts(fresh).values()) == expected
    assert resolve(fresh, None) == fresh and "teach nothing" not in describe_dropouts(fresh)
    chosen = resolve(config_of(*adapters, train={"dropout_text": 0.25}), None)
    assert dropouts(chosen) == dropouts(fresh) | {"dropout_text": 0.25}
    bare = {"dropout_reference": 0.0, "dropout_both": 0.0}
    assert resolve(config_of(*adapters, train=bare), None).train.prior_weight == 0


def test_samples_that_teach_nothing_are_told() -> None:
    train = {"dropout_text": 0.5, "dropout_reference": 0.1, "dropout_both": 0.1}
    config = config_of(SIGLIP, train=train, data={"text_only_share": 0.5, "text_only_data_dir": "others"})
    told = describe_dropouts(resolve(config, None))
    assert told.endswith("60.0% of the samples teach nothing: [siglip] does not act without a reference")
    assert "teach nothing" not in describe_dropouts(resolve(config_of(SIGLIP, LORA, train=train), None))
    with pytest.raises(InputError, match=r"\[siglip, lora\] wants it: .* is 1.05, more than 1"):
        resolve(config_of(SIGLIP, LORA, train={"dropout_text": 0.95}), None)


def test_a_run_goes_on_as_it_began(tmp_path: Path) -> None:
    """Keys left out are the checkpoint's, also one of an earlier version, which had other defaults and fewer keys;
    keys that are set are compared."""
    began = config_of(
        PROJECTOR,
        train=dict.fromkeys(DROPOUTS[:3], 0.05) | {"prior_weight": 0.0},
        flow={"sigma_sampling": "logit_normal", "shift": "scheduler"},
    ).model_dump(mode="json")
    del began["adapters"][0]["correction"]
    checkpoint.publish(tmp_path, 1, {}, {"config": began})
    saved = checkpoint.read(tmp_path / "step-00000001").state["config"]
    left_out = config_of(PROJECTOR, flow={"sigma_sampling": "logit_normal"})
    goes_on, fresh = resolve(left_out, saved), resolve(left_out, None)
    assert frozen_differences(saved, goes_on) == []
    assert goes_on.adapters[0].correction == "absolute" and goes_on.flow.shift == "scheduler"
    assert fresh.adapters[0].correction == "rms" and fresh.flow.shift == 1.0
    assert resolve(left_out, fresh.model_dump(mode="json")) == fresh
    others = config_of(PROJECTOR | {"correction": "rms"}, train={"prior_weight": 0.5}, flow={"shift": 1.0})
    assert frozen_differences(saved, resolve(others, saved)) == [
        'adapters.0.correction: "absolute" -> "rms"',
        'flow.shift: "scheduler" -> 1.0',
        'flow.sigma_sampling: "logit_normal" -> "uniform"',
        "train.prior_weight: 0.0 -> 0.5",
    ]
