"""Which weights learn how fast, and which of them decay: over all lists of adapters."""

from pathlib import Path

import pytest
import torch

from tests.test_adapters import LISTS, TRAINABLE
from tests.test_parity import make_model
from ztrain.adapters.lora import LoraAdapterConfig
from ztrain.config import TrainConfig
from ztrain.train.optimizer import groups_of, make_optimizer, one_group

DORA = LoraAdapterConfig(rank=4, peft={"use_dora": True})
OTHERS = ("norm", "siglip_embedder.0", "bias", "pad_token", "magnitude")
CASES = {name: LISTS[name] for name in TRAINABLE} | {"siglip_dora": [LISTS["siglip"][0], DORA]}


@pytest.mark.parametrize("name", CASES)
def test_matrices_decay_and_nothing_else_does(family: Path, name: str) -> None:
    """One step without a gradient, which decay alone moves: p -> p (1 - rate decay), with each adapter's own."""
    own = {"learning_rate": 0.25, "weight_decay": 0.5}
    adapters = [a.model_copy(update=own) if i == len(CASES[name]) - 1 else a for i, a in enumerate(CASES[name])]
    model, config = make_model(family, adapters), TrainConfig(learning_rate=0.5, adam_weight_decay=0.125)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = groups_of(model, config)
    assert sorted(name for group in groups for name in group.names) == sorted(trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    make_optimizer(config, [group.of(trained) for group in groups], torch.device("cpu")).step()
    last = set(model.weights_of[-1])
    for key, parameter in trained.items():
        matrix = parameter.ndim == 2 and min(parameter.shape) > 1
        assert matrix == (key in model.matrices()) != any(part in key for part in OTHERS), key
        expected = (1 - 0.25 * 0.5 if key in last else 1 - 0.5 * 0.125) if matrix else 1.0
        assert parameter.eq(expected).all(), key
    [everything] = one_group(model, config)
    assert everything.names == list(trained) and everything.weight_decay == 0.125
    assert everything.learning_rate == 0.5
