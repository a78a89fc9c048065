"""AdaptedDiT: a frozen Z-Image with an ordered list of adapters, as one module and one call for training and sampling.

The only caller of the transformer, and the only place that knows its conventions: its time t = 1 - sigma and its sign
(it predicts latents - noise). Legend: B batch, C latent channels, H and W latent sides.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ztrain.adapters import Adapter, build_adapters, describe_list
from ztrain.conditioning import Conditioning, Encoded, StockOmni, concatenate, text_conditioning
from ztrain.config import Config
from ztrain.errors import InputError
from ztrain.frozen.states import siglip_dim
from ztrain.model import dit as transformer
from ztrain.model.fast.blocks import use_fast_blocks
from ztrain.model.layout import Layouts


class AdaptedDiT(nn.Module):
    """velocity = model(noisy, sigma, encoded). Only the adapters' parameters require gradients.

    `weights_of[i]`: names, in `named_parameters`, of the weights that adapter i brought or woke.
    `stand_in`: of one sample with references, or None. Where processes share the weights and must all run the same
    modules, a batch without any reference takes this one through what reads references, for nothing.
    """

    def __init__(self, dit: Any, adapters: Sequence[Adapter[Any]]) -> None:
        super().__init__()
        self.dit = dit.requires_grad_(False)
        # Of a norm: linear layers may hold quantised bytes.
        self.base_dtype = dit.layers[0].attention_norm1.weight.dtype
        self.adapters = nn.ModuleList(adapters)
        self.execution = transformer.Execution(Layouts(dit))
        self.stand_in: Encoded | None = None
        self.weights_of: list[list[str]] = []
        for index, adapter in enumerate(adapters):
            before = {name for name, p in dit.named_parameters() if p.requires_grad}
            adapter.attach(dit)
            woken = [n for n, p in dit.named_parameters() if p.requires_grad and n not in before]
            own = [f"adapters.{index}.{name}" for name, _ in adapter.named_parameters()]
            self.weights_of.append([f"dit.{name}" for name in woken] + own)
            adapter.to(dit.layers[0].attention_norm1.weight.device)
        use_fast_blocks(dit)

    def forward(self, noisy: transformer.Samples, sigma: Tensor, encoded: Encoded) -> Any:
        """Velocities, B x (C, H, W) in the base's dtype: a list for a list, one tensor for one tensor.

        noisy: B x (C, H, W), any dtype, sizes may differ in a list, sides even; sigma: (B,) in [0, 1], 1 = noise.
        Adapter weights are float32 on a bf16 base: their products run in the base's dtype by autocast.
        """
        with self.precision(noisy[0].device):
            conditioning, idle = self._conditioning_of_all(encoded)
            t = 1 - sigma.float().to(
                noisy[0].device, non_blocking=True
            )  # stays float32: bf16 would round 0.9013 to 0.904
            if conditioning.omni is None:
                output = transformer.forward(
                    self.dit,
                    noisy,
                    t,
                    conditioning.caption,
                    conditioning.siglip,
                    conditioning.caption_scale,
                    conditioning.siglip_scale,
                    self.execution,
                    idle,
                )
            else:
                output = transformer.stacks(self._stock_omni(list(noisy), t, conditioning, conditioning.omni))
            if torch.is_grad_enabled() and self.stand_in is None and not any(encoded.with_reference):
                output = [self._tied(output[0]), *output[1:]]
        if isinstance(noisy, Tensor):
            return -output[0]
        return [velocity for samples in output for velocity in (-samples).unbind()]

    def conditioning(self, encoded: Encoded) -> Conditioning:
        """What the transformer reads of a batch, after all adapters in their order."""
        conditioning = text_conditioning(encoded)
        for adapter in self.adapters:
            if adapter.scale != 0:
                conditioning = adapter(conditioning, encoded)
        return conditioning

    def _conditioning_of_all(self, encoded: Encoded) -> tuple[Conditioning, list[Tensor]]:
        """That of a batch, and the SigLIP grids of the stand-in, if it is needed: it goes with the batch, so that each
        adapter runs once, and leaves nothing behind but gradients of zero."""
        if self.stand_in is None or any(encoded.with_reference):
            return self.conditioning(encoded), []
        both = self.conditioning(concatenate([encoded, self.stand_in]))
        assert both.omni is None, "the stock layout takes no stand-in (limits.py)"
        own = {name: values[:-1] for name, values in vars(both).items() if values}
        own["caption"] = [own["caption"][0] + 0 * both.caption[-1].sum(), *own["caption"][1:]]
        return Conditioning(**own), both.siglip[-1]

    @functools.cached_property
    def _idle(self) -> list[nn.Parameter]:
        """Weights of adapters that read references, and others' in modules that only references pass."""
        parameters = dict(self.named_parameters())
        return [
            parameters[name]
            for adapter, names in zip(self.adapters, self.weights_of, strict=True)
            for name in names
            if adapter.config.reads or name.startswith("dit.siglip_")
        ]

    def _tied(self, output: Tensor) -> Tensor:
        """`output` with zero gradients to weights that nothing used: without a reference, what reads one is idle.

        Otherwise DDP waits for them forever, and the optimizer would treat their step differently for other numbers
        of processes.
        """
        idle = [parameter.flatten()[:1].sum() for parameter in self._idle]
        return output + (0 * torch.stack(idle).sum()).to(output.dtype) if idle else output

    @torch.no_grad()
    def base_velocity(self, noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]:
        """Velocities of the frozen base on the same inputs, as if there were no adapters."""
        scales = [adapter.scale for adapter in self.adapters]
        self.set_scales([0.0] * len(scales))
        try:
            return self(noisy, sigma, encoded)
        finally:
            self.set_scales(scales)

    @contextmanager
    def showing(self, adapters: Sequence[Adapter[Any]]) -> Iterator[None]:
        """The base with other adapters, which have no weights, in the place of its own; as if those were not there."""
        own, scales = self.adapters, [adapter.scale for adapter in self.adapters]
        self.set_scales([0.0] * len(scales))
        self.adapters = nn.ModuleList(adapters)
        for adapter in adapters:
            adapter.attach(self.dit)
            adapter.to(self.dit.x_pad_token.device)
        try:
            yield
        finally:
            self.adapters = own
            self.set_scales(scales)

    def precision(self, device: torch.device) -> AbstractContextManager:
        """The base's dtype for products of float32 adapter weights."""
        if self.base_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.base_dtype)

    def _stock_omni(
        self, noisy: Sequence[Tensor], t: Tensor, conditioning: Conditioning, omni: list[StockOmni]
    ) -> list[Tensor]:
        """diffusers' omni mode, called as ZImageOmniPipeline does.

        Samples with and without references never share a call: diffusers decides by the first sample for all.
        """
        if any(factor != 1.0 for factors in conditioning.siglip_scale for factor in factors):
            raise InputError("adapters siglip: layout stock only runs at scales and reference weights of 0 or 1")
        output: list[Tensor | None] = [None] * len(noisy)
        groups: dict[int, list[int]] = {}
        for i, sample in enumerate(omni):
            transformer.check_omni_room(self.dit, [len(s) for s in sample.segments], len(sample.latents))
            groups.setdefault(len(sample.latents), []).append(i)
        for count, places in groups.items():
            results = self.dit(
                [[x.unsqueeze(1).to(self.base_dtype) for x in (*omni[i].latents, noisy[i])] for i in places],
                t[places],
                [[segment.to(self.base_dtype) for segment in omni[i].segments] for i in places],
                siglip_feats=[
                    [*(grid.to(self.base_dtype) for grid in conditioning.siglip[i]), None] if count else None
                    for i in places
                ],
                image_noise_mask=[[0] * count + [1] for _ in places],
                return_dict=False,
            )[0]
            for i, result in zip(places, results, strict=True):
                output[i] = result.squeeze(1)
        return [sample for sample in output if sample is not None]

    def set_scales(self, scales: Sequence[float]) -> None:
        """One scale for each adapter: 1 = as trained, 0 = as if it were not in the list."""
        for adapter, scale in zip(self.adapters, scales, strict=True):
            adapter.set_scale(self.dit, scale)

    def trainable_state(self) -> dict[str, Tensor]:
        """Trained weights by parameter name: what a checkpoint needs."""
        return {name: p.detach() for name, p in self.named_parameters() if name in self._trainable_names()}

    def _trainable_names(self) -> set[str]:
        return {name for names in self.weights_of for name in names}

    def matrices(self) -> set[str]:
        """Names of the trained weights of linear layers; all others are norms, biases, magnitudes and pad tokens."""
        linear = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        return linear & self._trainable_names()

    @torch.no_grad()
    def load_trainable_state(self, state: dict[str, Tensor], source: str) -> None:
        """The inverse of `trainable_state`, after comparing keys and shapes."""
        _copy_into(self.trainable_state(), state, source)

    def adapter_weights(self, index: int, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Weights of one adapter by their names in the transformer or in the adapter itself; of `state`, a
        `trainable_state`, where one is given."""
        own = self.trainable_state() if state is None else state
        return {_short(name, index): own[name] for name in self.weights_of[index]}

    @torch.no_grad()
    def load_adapter_weights(self, index: int, weights: dict[str, Tensor], source: str) -> None:
        """Copies weights in, after comparing the key sets and shapes with what the adapter has."""
        _copy_into(self.adapter_weights(index), weights, source)


def _copy_into(own: dict[str, Tensor], weights: dict[str, Tensor], source: str) -> None:
    if missing := sorted(set(own) - set(weights)):
        raise InputError(f"{source} lacks {len(missing)} weights of the adapter, for example {missing[0]}")
    if unexpected := sorted(set(weights) - set(own)):
        raise InputError(f"{source} has {len(unexpected)} weights that the adapter lacks, for example {unexpected[0]}")
    for name, parameter in own.items():
        if parameter.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, expected {tuple(parameter.shape)}"
            raise InputError(f"{source}: {name} has shape {shapes}")
        parameter.copy_(weights[name])


def _short(name: str, index: int) -> str:
    return name.removeprefix("dit.").removeprefix(f"adapters.{index}.")


def make_model(config: Config, dit: Any) -> AdaptedDiT:
    """The frozen transformer with fresh adapters, the same on every process, ready to train."""
    torch.manual_seed(config.seed)
    model = AdaptedDiT(dit, build_adapters(config.adapters, siglip_dim(config))).to(dit.device).train()
    if not model.trainable_state():
        listed = describe_list(config.adapters)
        raise InputError(f"adapters {listed} has no weights to train; add projector, lora or siglip")
    checkpointing = config.train.gradient_checkpointing
    if checkpointing == "on" or (checkpointing == "budget" and dit.device.type == "cuda"):  # unless `tune` says more
        dit.enable_gradient_checkpointing()
    return model
