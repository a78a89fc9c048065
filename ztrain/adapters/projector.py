"""The learned splice: a residual MLP that corrects reference states before they meet the prompt.

    r -> r + W2 silu(W1 norm(r) + b1) + b2,   W2 = b2 = 0 at the start

so that training begins exactly at the splice and any loss against it is visible from step 0. The input norm is needed
because stored states reach 1e4 in a few dimensions (zimage_facts.md 7, item 38).
"""

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ztrain.adapters.base import MAX_WIDTH
from ztrain.adapters.splice import ComposeConfig, ComposingAdapter


class ProjectorConfig(ComposeConfig):
    kind: Literal["projector"] = "projector"
    hidden_dim: int = Field(default=5120, ge=1, le=MAX_WIDTH)
    """Width of the hidden layer; 5120 gives 26.2 M parameters on Z-Image, whose caption features are 2560 wide."""


class Projector(ComposingAdapter):
    config: ProjectorConfig

    def attach(self, dit: Any) -> None:
        width = dit.config.cap_feat_dim
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, self.config.hidden_dim)
        self.down = nn.Linear(self.config.hidden_dim, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def correct(self, states: Tensor) -> Tensor:
        delta = self.down(F.silu(self.up(self.norm(states.to(self.norm.weight.dtype)))))  # (L, D)
        return states + delta.to(states.dtype)
