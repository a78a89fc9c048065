"""Compiled blocks, if what the compiler makes computes the right gradients: checked before the first step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ztrain.model.fast.blocks import use_fast_blocks

_CHECKS = 3  # wrong gradients differ from call to call
_TOLERANCE = 0.05  # bfloat16 alone makes 0.012 to 0.016


def compile_blocks(
    dit: Any, gradients: Callable[[], dict[str, Tensor]], say: Callable[[str], object], backend: str = "inductor"
) -> bool:
    """Compiles the blocks if their gradients are those of the blocks as they are, and says so; else leaves them.

    gradients: of one batch, by parameter. Checked because inductor of torch 2.10 and 2.11 computes some reductions of
    these blocks silently wrong, by factors of 1e4, whether it may mix their orders (pytorch/pytorch#193061) or not:
    measured on an H200 at batch 512, while 64 was right. With real rotary products and its own options it was right.
    """
    true = gradients()
    use_fast_blocks(dit, backend)
    try:
        errors = [relative_error(gradients(), true) for _ in range(_CHECKS)]
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        why = " ".join(str(error).split())[:300]
    else:
        found = ", ".join(f"{error:.2g}" for error in errors)
        if all(error < _TOLERANCE for error in errors):  # which no NaN is
            say(f"blocks compiled by {backend}: gradients differ by {found} from those before")
            return True
        why = f"its gradients differ by {found}"
    torch.compiler.reset()
    use_fast_blocks(dit)
    say(f"blocks are not compiled, and slower: {backend}: {why}")
    return False


def relative_error(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of the true gradients, over all parameters at once."""
    squares = [((found[name] - value).square().sum(), value.square().sum()) for name, value in true.items()]
    difference, whole = torch.tensor(squares).sum(0).tolist()
    return (difference / whole) ** 0.5
