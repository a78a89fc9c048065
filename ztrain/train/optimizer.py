"""The optimizer and its schedule: which weights are treated alike, how fast they learn, and which of them decay.

In: a model with its adapters, and `train` of a config. Out: torch's optimizer over groups of weights, and a schedule
that counts optimizer steps and moves all groups alike.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ztrain.config import TrainConfig
from ztrain.errors import InputError
from ztrain.model.adapted_dit import AdaptedDiT


@dataclass(frozen=True, slots=True)
class Group:
    """Weights that are treated alike, by their names in the model; `adapter`: its kind."""

    adapter: str
    learning_rate: float
    weight_decay: float
    names: list[str]

    def of(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """As torch's optimizers take it."""
        chosen = [parameters[name] for name in self.names]
        return {"params": chosen, "lr": self.learning_rate, "weight_decay": self.weight_decay}


def groups_of(model: AdaptedDiT, config: TrainConfig) -> list[Group]:
    """By adapter, and matrices apart from what does not decay: norms, biases and pad tokens, which are no sums of many
    products that a smaller weight would keep small."""
    matrices = model.matrices()
    found = []
    for adapter, names in zip(model.adapters, model.weights_of, strict=True):
        for decays in (True, False):
            if chosen := [name for name in names if (name in matrices) == decays]:
                own = adapter.config
                rate = config.learning_rate if own.learning_rate is None else own.learning_rate
                decay = config.adam_weight_decay if own.weight_decay is None else own.weight_decay
                found.append(Group(own.kind, rate, decay if decays else 0.0, chosen))
    return found


def one_group(model: AdaptedDiT, config: TrainConfig) -> list[Group]:
    """As runs had it whose first checkpoint is of format 1: everything decays."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return [Group("all", config.learning_rate, config.adam_weight_decay, names)]


def make_optimizer(config: TrainConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW over torch's groups. On a GPU it is one kernel, which can be told on the device not to take a step."""
    kind: Any = functools.partial(torch.optim.AdamW, fused=True) if device.type == "cuda" else torch.optim.AdamW
    if config.optimizer == "adamw_8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise InputError(
                "train.optimizer adamw_8bit needs bitsandbytes: pip install 'ztrain[bitsandbytes]'"
            ) from error
        kind = bitsandbytes.optim.AdamW8bit
    betas = (config.adam_beta1, config.adam_beta2)
    return kind(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, *, from_zero: bool = False) -> LambdaLR:
    """diffusers' schedule of that name, a factor on each group's own rate.

    Its warm-up would begin with a step at rate 0, which moves nothing; here step s of w has (s + 1) / w of the rate.
    `from_zero`: as diffusers has it, for runs that began so."""
    alone = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    plain = get_scheduler(
        config.lr_scheduler,
        alone,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    ).lr_lambdas[0]
    warmup = 0 if from_zero or config.lr_scheduler == "constant" else config.lr_warmup_steps

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else plain(step)

    return LambdaLR(optimizer, factor)
