"""What each strategy cannot carry out of a config: read by training (strategy.py) and by planning (plan/command.py)."""

from ztrain.config import Config

_SHARED = frozenset({"fsdp2", "zero2", "zero3"})
"""Where gradients and moments, or the base as well, are cut over the processes."""


def refusal(strategy: str, config: Config) -> str | None:
    """The sentence that refuses a config under a strategy (one_gpu, ddp, fsdp2, zero2 or zero3); None where all works.

    The stock layout calls the transformer once for each number of references in a batch, so that processes would call
    it unequally often; 8-bit moments cannot be cut; under ZeRO 3 nothing but DeepSpeed's own step gives gradients.
    """
    t = config.train
    refused = {
        "adapters siglip: layout stock": (any(each.has_stock_layout for each in config.adapters), _SHARED),
        "train.optimizer adamw_8bit": (t.optimizer == "adamw_8bit", _SHARED),
        "train.compile on": (t.compile == "on", {"zero3"}),
        "train.gradient_checkpointing budget": (t.gradient_checkpointing == "budget", {"zero3"}),
        f"train.ema_decay {t.ema_decay:g}": (t.ema_decay > 0, {"zero3"}),
    }
    for setting, (is_set, strategies) in refused.items():
        if is_set and strategy in strategies:
            return f"{setting} does not work under {strategy}; change it, or launch with ddp"
    return None
