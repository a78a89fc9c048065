"""How the processes of a run share model, gradients and optimizer: one card, DDP, FSDP2 or DeepSpeed's ZeRO.

accelerate decides, from the file of `configs/accelerate` that it was launched with; here is what follows for us. In: an
Accelerator. Out: a `Strategy`, which wraps model and optimizer and gives trained weights and moments back whole, on the
CPU of the main process, whichever way they were cut: so a checkpoint of any number of cards goes on with any other.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from ztrain.config import Config
from ztrain.distributed.agreement import agree
from ztrain.distributed.limits import refusal
from ztrain.errors import InputError
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import BLOCK
from ztrain.model.fast.blocks import use_fast_blocks
from ztrain.model.fast.budget import BUCKET_MIB

SIGNAL, NORM, SAMPLES = 0, 1, 2
"""Columns of a step's figures, (P, 2 + 3 n) of P processes with n samples each: the signal that a process has received,
0 for none; the norm of the gradients; then each sample's index, each one's sigma, each one's loss."""
KWARGS = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MIB)
"""For the Accelerator. Gradients are DDP's buckets: four bytes less for each trained number. Those of SigLIP modules
and projectors come at the end of the backward pass, all at once: few large buckets are sooner sent than many small
ones. A LoRA's come all along; nothing is left to hide its last bucket, which is to be small."""


class Strategy:
    """One process, or DDP: every process holds everything."""

    name: ClassVar[str] = "ddp"
    shards_base: ClassVar[bool] = False
    """Whether each process holds a part of the base only. Then all must run the same modules equally often."""
    needs_every_gradient: ClassVar[bool] = False
    """Whether all processes must give all gradients, in the same order: DeepSpeed adds them up by their place."""
    allows_plain_backward: ClassVar[bool] = True
    """Whether a plain backward pass gives gradients, outside of a step."""
    supports_foreach_ema: ClassVar[bool] = True
    """Whether one kernel may average many weights: DTensors have no such operation."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def base_device(self) -> torch.device:
        """Where the base is loaded: a base that is sharded comes to the card in parts."""
        return torch.device("cpu") if self.shards_base else self.accelerator.device

    def check(self, config: Config) -> None:
        """Raises InputError for what this strategy cannot carry out of a config, or of accelerate's own settings."""
        if sentence := refusal(self.name, config):
            raise InputError(sentence)

    def prepare(self, model: AdaptedDiT, optimizer: Any, config: Config) -> tuple[Any, Any]:
        """The model as it is called in training, and the optimizer as accelerate wants it stepped."""
        if self.accelerator.num_processes > 1:
            # All have read the same files: DDP would send the frozen base to every process once more.
            frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
            frozen += [name for name, _ in model.named_buffers()]
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
            # Blocks are compiled one by one: gradients go out between them as it is, and a compiled function is not
            # to be cut once more where DDP's buckets end.
            torch._dynamo.config.optimize_ddp = False
        return self.accelerator.prepare(model, optimizer)

    def backward(self, loss: Tensor) -> None:
        """The gradients of one micro-step; in the last one of an optimizer step, processes exchange theirs."""
        self.accelerator.backward(loss)

    def clip(self, trained: Mapping[str, nn.Parameter], max_norm: float) -> Tensor | float:
        """Scales gradients down to `max_norm` at most; returns their norm before, the same on all processes.

        Raises RuntimeError where a trained weight has no gradient: a silent None trains nothing."""
        if lost := [name for name, parameter in trained.items() if parameter.grad is None]:
            raise RuntimeError(f"{len(lost)} trained weights got no gradient, for example {lost[0]}")
        return self.number(self.accelerator.clip_grad_norm_(list(trained.values()), max_norm))

    def step(self, optimizer: Any, figures: Tensor) -> None:
        """The optimizer's step, on all processes or on none: where one of `figures` (meter.gather_step) is not finite,
        weights and moments stay as they are. Gradients are gone afterwards."""
        is_broken, inner = figures.isfinite().logical_not().any(), optimizer.optimizer
        if inner.defaults.get("fused"):
            # torch's kernel takes no step then; to read the figures would wait for the device.
            inner.found_inf = is_broken.float()
            optimizer.step()
        elif not bool(is_broken):
            optimizer.step()
        optimizer.zero_grad()

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Trained weights, their gradients or moments, as they are without any cut. All processes call it; for the main
        one alone it is worth something: the others get no tensors, where there is something to gather."""
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def weights_changed(self, model: AdaptedDiT) -> None:
        """To be called after trained weights were changed by anything but the optimizer."""

    def number(self, value: Any) -> Tensor | float:
        """A number that the library may have cut, like a gradient's norm."""
        return value

    def optimizer_state(self, optimizer: Any, trained: Mapping[str, nn.Parameter]) -> dict[int, Any]:
        """`state` of `torch.optim.Optimizer.state_dict`, whole; by place in `trained`. All processes call it."""
        return optimizer.optimizer.state_dict()["state"]

    def load_optimizer(self, optimizer: Any, stored: dict[int, Any], trained: Mapping[str, nn.Parameter]) -> None:
        """The inverse of `optimizer_state`."""
        inner = optimizer.optimizer
        inner.load_state_dict({"state": stored, "param_groups": inner.state_dict()["param_groups"]})

    def shard_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This process's part of a whole tensor, which all have read: placed and sharded as `like` is."""
        return tensor.to(like.device)


class One(Strategy):
    name = "one_gpu"


class Fsdp2(Strategy):
    """torch's fully_shard: parameters are DTensors, put together block by block while they are computed."""

    name = "fsdp2"
    shards_base = needs_every_gradient = True
    supports_foreach_ema = False

    def check(self, config: Config) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy

        super().check(config)
        plugin = self.accelerator.state.fsdp_plugin
        wrong = {
            "fsdp_offload_params true": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "fsdp_activation_checkpointing true": plugin.activation_checkpointing,
            f"another fsdp_transformer_layer_cls_to_wrap than {BLOCK}": plugin.transformer_cls_names_to_wrap != [BLOCK],
        }
        for setting, is_set in wrong.items():
            if is_set:
                raise InputError(f"fsdp2 runs without {setting}; take configs/accelerate/fsdp2.yaml as it is")

    def prepare(self, model: AdaptedDiT, optimizer: Any, config: Config) -> tuple[Any, Any]:
        wrapped, optimizer = self.accelerator.prepare(model, optimizer)
        use_fast_blocks(model.dit, alone=True)
        return wrapped, optimizer

    def weights_changed(self, model: AdaptedDiT) -> None:
        # What belongs to no block stays put together after a pass without gradients, as it was then.
        wrapped: Any = model
        wrapped.reshard()

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in tensors.items():
            full = self.number(tensor.detach())
            if self.accelerator.is_main_process:
                kept[name] = full.cpu()
        return kept

    def number(self, value: Any) -> Any:
        from torch.distributed.tensor import DTensor

        return value.full_tensor() if isinstance(value, DTensor) else value

    def optimizer_state(self, optimizer: Any, trained: Mapping[str, nn.Parameter]) -> dict[int, Any]:
        return {place: self.whole(state) for place, state in super().optimizer_state(optimizer, trained).items()}

    def load_optimizer(self, optimizer: Any, stored: dict[int, Any], trained: Mapping[str, nn.Parameter]) -> None:
        parameters = list(trained.values())
        placed = {
            place: {what: self.shard_like(each, parameters[place]) for what, each in values.items()}
            for place, values in stored.items()
        }
        super().load_optimizer(optimizer, placed, trained)

    def shard_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return tensor.to(like.device)
        there = tensor.to(like.device)
        return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


class Zero(Strategy):
    """DeepSpeed's ZeRO 2: gradients and moments are sharded; its engine clips as it steps, and knows the norm then."""

    name = "zero2"
    needs_every_gradient = True

    def check(self, config: Config) -> None:
        super().check(config)
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        zero = settings.get("zero_optimization", {})
        wrong = [key for key in ("bf16", "fp16", "amp", "torch_autocast") if settings.get(key, {}).get("enabled")]
        wrong += [key for key in ("optimizer", "scheduler") if key in settings]
        for key in ("offload_optimizer", "offload_param"):
            wrong += [key] if zero.get(key, {}).get("device", "none") != "none" else []
        if wrong:
            raise InputError(
                f"the DeepSpeed file sets {', '.join(wrong)}: precision, optimizer and schedule are the experiment's"
                " (train.*), and nothing is offloaded; leave it out"
            )

    def prepare(self, model: AdaptedDiT, optimizer: Any, config: Config) -> tuple[Any, Any]:
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        # accelerate asks a DataLoader for the first, which we do not have; the others belong to the experiment.
        settings["train_micro_batch_size_per_gpu"] = config.train.train_batch_size
        settings["gradient_accumulation_steps"] = config.train.gradient_accumulation_steps
        settings["gradient_clipping"] = config.train.max_grad_norm
        return self.accelerator.prepare(model, optimizer)

    @property
    def _engine(self) -> Any:
        return self.accelerator.deepspeed_engine_wrapped.engine

    def backward(self, loss: Tensor) -> None:
        # Not by accelerate, which steps within the last backward pass, before anybody has seen the losses.
        self._engine.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self._engine.backward(loss)

    def clip(self, trained: Mapping[str, nn.Parameter], max_norm: float) -> Tensor | float:
        """0: what `step` does, and writes into the figures."""
        return 0.0

    def step(self, optimizer: Any, figures: Tensor) -> None:
        """Writes the norm into `figures` after the step: one that is not finite has spoilt the weights."""
        if bool(figures.isfinite().all()):
            self._engine.step()
            figures[:, NORM] = float(self._engine.get_global_grad_norm() or 0.0)

    def optimizer_state(self, optimizer: Any, trained: Mapping[str, nn.Parameter]) -> dict[int, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = _inner(optimizer)
        steps = [state["step"] for state in inner.state.values() if "step" in state]
        if steps:
            self._link(optimizer)
        state: dict[int, dict[str, Tensor]] = {}
        for place, parameter in enumerate(trained.values() if steps else ()):
            whole = {what: safe_get_full_optimizer_state(parameter, what) for what in _MOMENTS}
            if self.accelerator.is_main_process:
                state[place] = {"step": steps[0].cpu(), **{what: each.cpu() for what, each in whole.items()}}
        return state

    def load_optimizer(self, optimizer: Any, stored: dict[int, Any], trained: Mapping[str, nn.Parameter]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        inner = _inner(optimizer)
        if not stored:
            return
        for flat in self._flat(optimizer):
            step = stored[0]["step"].clone()
            inner.state[flat] = {"step": step, **{what: torch.zeros_like(flat) for what in _MOMENTS}}
        self._link(optimizer)
        for place, parameter in enumerate(trained.values()):
            for what in _MOMENTS:
                safe_set_full_optimizer_state(parameter, stored[place][what].to(parameter.device), what)

    def _flat(self, optimizer: Any) -> list[Tensor]:
        """The weights as torch's optimizer has them: this process's part, in one row."""
        return [p for group in _inner(optimizer).param_groups for p in group["params"]]

    def _link(self, optimizer: Any) -> None:
        """Makes DeepSpeed find the moments of each parameter: it looks for all when its first group has been stepped,
        and those of the others are not there yet."""
        optimizer.optimizer._hp_optimizer_states_linked = False
        optimizer.optimizer._lazy_init_hp_params_optimizer_state()


class Zero3(Zero):
    """ZeRO 3: the base is cut, too."""

    name = "zero3"
    shards_base = True
    allows_plain_backward = False

    def prepare(self, model: AdaptedDiT, optimizer: Any, config: Config) -> tuple[Any, Any]:
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        kept = settings.get("stage3_param_persistence_threshold", _KEPT_WHOLE)
        largest = max((p.numel() for adapter in model.adapters for p in adapter.parameters()), default=0)
        if largest > kept:
            # Its modules run as often as a batch has references: in parts, processes would wait for each other forever.
            raise InputError(
                f"an adapter has a matrix of {largest:,} numbers, which zero3 must leave whole: raise "
                f"stage3_param_persistence_threshold of its DeepSpeed file from {kept:,} to at least that"
            )
        # Our forward reads a block's weights without calling its modules: it is put together as one.
        set_z3_leaf_modules(model, [type(model.dit.layers[0])])
        blocks = [module for module in model.modules() if type(module) is type(model.dit.layers[0])]
        for block in blocks:
            if any(p.requires_grad for p in block.parameters()):
                block.register_forward_pre_hook(_with_gradient)
        # Parameter by parameter, from the CPU: DeepSpeed's engine would first take the whole base to the card.
        deepspeed.zero.Init(module=model, dtype=model.base_dtype)
        model.to(self.accelerator.device)  # of an initialised model the engine would leave buffers where they are
        prepared = super().prepare(model, optimizer, config)
        inner = [module for block in blocks for module in block.modules()]
        model.register_forward_pre_hook(lambda *_: _read_without_gathering(inner))
        use_fast_blocks(model.dit, alone=True)
        return prepared

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import deepspeed

        kept = {}
        for name, parameter in tensors.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.accelerator.is_main_process:
                    kept[name] = parameter.detach().cpu().clone()
        return kept

    def _flat(self, optimizer: Any) -> list[Tensor]:
        return list(optimizer.optimizer.fp32_partitioned_groups_flat)

    def _link(self, optimizer: Any) -> None:
        """It finds them by itself."""


_KEPT_WHOLE = 100_000  # DeepSpeed's default
_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's


def _with_gradient(block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Makes a block's input ask for its gradient. DeepSpeed collects a leaf module's gradients when that is there; if
    none is asked for, as in the first block of a LoRA, it would collect before there are any."""
    x, *rest = given
    return (x.detach().requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x, *rest)


def _read_without_gathering(modules: Sequence[Any]) -> None:
    """Lets blocks be asked what they are made of before they run. While the model runs, DeepSpeed puts every parameter
    together that is asked for, and from then on with the model itself, for as long as that runs: the whole base."""
    for module in modules:
        module._parameters._in_forward = False


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside of accelerate's wrapper of DeepSpeed's."""
    return optimizer.optimizer.optimizer


def strategy_of(accelerator: Accelerator) -> Strategy:
    """The one that accelerate really carries out.

    Raises InputError for one that we do not know, and where accelerate was asked for one and runs another, as it does
    with FSDP where there is no GPU.
    """
    asked = {
        "fsdp2": os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
        "zero": os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true",
    }
    kind, state = accelerator.distributed_type, accelerator.state
    found: type[Strategy] | None = None
    if kind == DistributedType.FSDP and accelerator.is_fsdp2:
        found = Fsdp2
    elif kind == DistributedType.DEEPSPEED:
        found = {2: Zero, 3: Zero3}.get(state.deepspeed_plugin.zero_stage)
    elif kind in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        if wanted := [name for name, is_asked in asked.items() if is_asked]:
            raise InputError(
                f"accelerate was asked for {wanted[0]} and runs {kind.value} on {accelerator.device.type}: it needs"
                " GPUs and several processes; launch with configs/accelerate/ddp.yaml or cpu.yaml"
            )
        found = Strategy if accelerator.num_processes > 1 else One
    if found is None:
        raise InputError(
            f"accelerate runs {kind.value}, which ztrain does not know in this form; take one_gpu, ddp, fsdp2, zero2 or"
            " zero3 of configs/accelerate"
        )
    return found(accelerator)


def turns(count: int, accelerator: Accelerator, *, equally_often: bool) -> Iterator[tuple[int, bool]]:
    """This process's `seats`; before each turn all processes stop together, where any has got a signal."""
    for place, counts in seats(count, accelerator.process_index, accelerator.num_processes):
        agree(accelerator)
        if counts or equally_often:
            yield place, counts


def seats(count: int, rank: int, processes: int) -> Iterator[tuple[int, bool]]:
    """A process's places in range(count), as often on each: those who have fewer get the last again, which does not
    count."""
    for first in range(0, count, processes):
        yield min(first + rank, count - 1), first + rank < count
