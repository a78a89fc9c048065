"""The learned splice: a residual MLP that corrects reference states before they meet the prompt.

    r -> r + rms(r) (W2 silu(W1 norm(r) + b1) + b2),   W2 = b2 = 0 at the start

so that training begins exactly at the splice and any loss against it is visible from step 0. The input norm is needed
because stored states reach 1e4 in a few dimensions (zimage_facts.md 7, item 38). The caption embedder reads each token
through an RMSNorm: in units of the token's own rms a learning rate means the same for states of any size.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ztrain.adapters.base import MAX_WIDTH, TrainedConfig
from ztrain.adapters.splice import ComposeConfig, ComposingAdapter


class ProjectorConfig(ComposeConfig, TrainedConfig):
    meant_before: ClassVar[Mapping[str, Any]] = {"correction": "absolute"}

    kind: Literal["projector"] = "projector"
    hidden_dim: int = Field(default=5120, ge=1, le=MAX_WIDTH)
    """Width of the hidden layer; 5120 gives 26.2 M parameters on Z-Image, whose caption features are 2560 wide."""
    correction: Literal["absolute", "rms"] | None = None
    """What the MLP's output is measured in. rms: the token's own root mean square; absolute: units of the states, of
    which Z-Image's are about 60, so that a learning rate moves them sixty times less. None: rms, or as the checkpoint
    has it that a run goes on from. What earlier versions trained is absolute."""

    def resolved(self, siglip_dim: int | None) -> Self:
        return self.decided({})

    def decided(self, saved: Mapping[str, Any]) -> Self:
        return self.model_copy(update={"correction": self.correction or saved.get("correction") or "rms"})


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
        if self.config.correction == "absolute":
            return states + delta.to(states.dtype)
        # In float32: a bf16 state has 8 bits, which a correction of a hundredth of it would not reach.
        exact = states.float()
        rms = exact.square().mean(dim=-1, keepdim=True).sqrt()  # (L, 1)
        return exact + rms * delta.float()
