"""Matrices side by side in one storage: the same parameters, and one product where nothing has moved them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.test_parity import LORA, make_model
from ztrain.model.fast.blocks import use_fast_blocks
from ztrain.model.fast.storage import share_storage, whole_of


def layers(*rows: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(6, count, bias=False) for count in rows).requires_grad_(False)


def test_parameters_stay_themselves_and_are_one_matrix(tmp_path: Path) -> None:
    linears = layers(4, 2, 3)
    weights, before = [linear.weight for linear in linears], {k: v.clone() for k, v in linears.state_dict().items()}
    assert whole_of(weights) is None
    share_storage(weights)
    assert [linear.weight for linear in linears] == weights
    assert all(torch.equal(value, before[key]) for key, value in linears.state_dict().items())
    whole = whole_of(weights)
    assert whole is not None and torch.equal(whole, torch.cat(list(before.values()))) and not whole.requires_grad
    storage = whole.untyped_storage().data_ptr()
    share_storage(weights)  # again: nothing moves
    assert weights[2].untyped_storage().data_ptr() == storage
    linears.load_state_dict({key: value + 1 for key, value in before.items()})
    assert torch.equal(whole, torch.cat(list(before.values())) + 1)
    save_file(linears.state_dict(), tmp_path / "weights.safetensors")
    assert all(torch.equal(v, before[k] + 1) for k, v in load_file(tmp_path / "weights.safetensors").items())


def test_what_has_moved_or_trains_is_not_one_matrix() -> None:
    moved, trained, other = layers(4, 2), layers(4, 2), layers(4, 2)
    share_storage([linear.weight for linear in moved])
    moved[1].weight.data = moved[1].weight.data.clone()
    trained[0].requires_grad_(True)
    other[1].double()
    for linears in (trained, other):
        weights = [linear.weight for linear in linears]
        kept = [weight.data_ptr() for weight in weights]
        share_storage(weights)
        assert [weight.data_ptr() for weight in weights] == kept
    for linears in (moved, trained, other):
        assert whole_of([linear.weight for linear in linears]) is None
    share_storage([])


def test_a_transformers_state_is_the_same_beside_itself(family: Path) -> None:
    model = make_model(family, [LORA])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    use_fast_blocks(model.dit, backend="eager")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    attention = model.dit.layers[0].attention
    assert whole_of([layer.base_layer.weight for layer in (attention.to_q, attention.to_k, attention.to_v)]) is not None
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(model.weights_of[0])
