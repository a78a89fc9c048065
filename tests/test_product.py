"""Products with LoRAs: the operator keeps torch's rules, and its gradients are those of the plain sum."""

import pytest
import torch
from torch import Tensor

from ztrain.model.fast.lora_product import product_and_loras

TRAINED = ["nothing", "x", "weight", "loras", "everything"]


def given(trained: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Three layers of 4, 5 and 3 outputs; the second has no LoRA."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, of: str) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(trained in ("everything", of))

    bs = [normal(4, 2, of="loras"), normal(5, 0, of="loras"), normal(3, 1, of="loras")]
    return normal(2, 6, 8, of="x"), normal(12, 8, of="weight"), normal(2, 6, 3, of="loras"), bs


def plain(x: Tensor, weight: Tensor, narrow: Tensor, bs: list[Tensor]) -> Tensor:
    parts = narrow.split([b.shape[1] for b in bs], dim=-1)
    return x @ weight.t() + torch.cat([part @ b.t() for part, b in zip(parts, bs, strict=True)], dim=-1)


@pytest.mark.parametrize("trained", TRAINED)
def test_it_is_the_plain_sum_and_its_gradients(trained: str) -> None:
    x, weight, narrow, bs = given(trained, torch.float64)
    found, true = (function(x, weight, narrow, bs) for function in (product_and_loras, plain))
    assert torch.allclose(found, true, rtol=1e-12, atol=1e-12)
    learn = [tensor for tensor in (x, weight, narrow, *bs) if tensor.requires_grad]
    if learn:
        seed = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
        for ours, theirs in zip(*(torch.autograd.grad(y, learn, seed) for y in (found, true)), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", TRAINED)
def test_it_keeps_the_rules_that_compilers_rely_on(trained: str) -> None:
    """Nothing given is written to or returned, shapes are as said, gradients are traced."""
    checks = torch.library.opcheck(product_and_loras, given(trained, torch.float32))
    assert len(checks) >= 4 and set(checks.values()) == {"SUCCESS"}
