"""The fast forward of a block against diffusers' own on the same modules: numbers, work, and when it steps back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step
from tests.test_batched import Dispatched, gradients, mixed, uniform
from tests.test_parity import LORA, PROJECTOR, SIGLIP, make_model, noise_like
from ztrain.adapters.lora import LoraAdapterConfig
from ztrain.adapters.splice import SpliceConfig
from ztrain.conditioning import IMAGE, TEXT, Encoded, TokenStates
from ztrain.model import layout
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.fast import block, blocks
from ztrain.model.fast.block import Factors, Keep, Linears, Loras, Packing
from ztrain.model.fast.blocks import BlockInputs, lora_row, slow_because, use_fast_blocks, use_stock_blocks
from ztrain.model.fast.loras import spread

SIGMA = torch.tensor([0.9, 0.4, 0.65, 0.2, 0.5])
SIZES = ((8, 8), (8, 8), (12, 6), (4, 10), (8, 8))
EVERYWHERE = LoraAdapterConfig(rank=3, alpha=6.0, target_modules=r".*\.(to_[qkv]|to_out\.0|w[123])")
LISTS = {
    "lora": [SpliceConfig(), LORA],
    "everywhere": [EVERYWHERE],
    "projector": [PROJECTOR],
    "siglip": [SIGLIP],
    "siglip_lora": [SIGLIP, EVERYWHERE],
}


FLOPS, MATMULS, OPERATIONS = 187_165_440, 244, 1376
"""Of a step on the CPU, where an RMSNorm is many operations; a product and its LoRAs are one."""


def with_references(states: Encoded) -> Encoded:
    """References for the splice too: nine states, a third of them text's."""
    kinds = torch.tensor([TEXT, IMAGE, IMAGE] * 3)
    read = [None if i == 1 else TokenStates(x.flip(0)[:7].repeat(2, 1)[:9], kinds) for i, x in enumerate(states.text)]
    return replace(states, reference=read, fused=read)


def make(family: Path, adapters: list[Any]) -> AdaptedDiT:
    """With adapter weights that are not zero."""
    model = make_model(family, adapters).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def stock(model: AdaptedDiT) -> AdaptedDiT:
    use_stock_blocks(model.dit)
    return model


def distance(found: list[Tensor], true: list[Tensor]) -> float:
    """Norm of the difference over the norm of the true one, over all tensors at once."""
    ours, theirs = (torch.cat([tensor.detach().double().flatten() for tensor in each]) for each in (found, true))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("keep", [*Keep, None], ids=["nothing", "costly", "products", "everything", "mixed"])
@pytest.mark.parametrize("name", LISTS)
def test_outputs_and_gradients_are_diffusers_own(family: Path, name: str, keep: Keep | None) -> None:
    """Mixed sizes, captions and numbers of references; every trained weight, and the base's when all of it trains."""
    noisy, states = noise_like(*SIZES), with_references(mixed())
    models = [make(family, LISTS[name]), stock(make(family, LISTS[name]))]
    assert slow_because(models[0].dit) is None
    found, true = [], []
    for model, kept in zip(models, (found, true), strict=True):
        model.execution.keeping = lambda tokens, blocks: [Keep(i % 4) if keep is None else keep for i in range(blocks)]
        kept += [torch.cat([v.flatten() for v in model(noisy, SIGMA, states)]).detach()]
        kept += [gradients(model, noisy, SIGMA, states)]
    assert distance(found[:1], true[:1]) <= 1e-5
    trained = {key for key, p in models[0].named_parameters() if p.requires_grad}
    assert trained
    for key in trained:
        assert distance([found[1][key]], [true[1][key]]) <= 1e-4, key


def test_samples_by_themselves_or_with_a_mask_are_attended_to_alike(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy, states = noise_like(*SIZES), with_references(mixed())
    apart = gradients(make(family, LISTS["siglip_lora"]), noisy, SIGMA, states)
    monkeypatch.setattr(layout, "_PACKED", 0)
    masked = gradients(make(family, LISTS["siglip_lora"]), noisy, SIGMA, states)
    for key, gradient in masked.items():
        if gradient is not None:
            assert distance([apart[key]], [gradient]) <= 1e-5, key


def test_gradients_of_the_base_are_diffusers_own(family: Path) -> None:
    """The miniature's transformer is trained whole, through the same blocks."""
    noisy, states = noise_like(*SIZES), mixed()
    models = [make_model(family, [SIGLIP]).requires_grad_(True) for _ in range(2)]
    found, true = (gradients(model, noisy, SIGMA, states) for model in (models[0], stock(models[1])))
    for key, gradient in true.items():
        assert gradient is not None and distance([found[key]], [gradient]) <= 1e-4, key


@pytest.mark.parametrize("name", ["everywhere", "siglip_lora"])
def test_bfloat16_is_as_near_to_float32_as_diffusers_bfloat16(family: Path, name: str) -> None:
    noisy, states = noise_like(*SIZES), with_references(mixed())
    with torch.no_grad():
        true = stock(make(family, LISTS[name]))(noisy, SIGMA, states)
        errors = []
        for model in (make(family, LISTS[name]), stock(make(family, LISTS[name]))):
            trained = {id(p) for p in model.parameters() if p.requires_grad}
            for parameter in model.dit.parameters():
                if id(parameter) not in trained:
                    parameter.data = parameter.data.bfloat16()
            model.base_dtype = torch.bfloat16
            found = model(noisy, SIGMA, states)
            assert found[0].dtype == torch.bfloat16
            errors.append(distance(found, true))
    assert 1e-4 < errors[0] <= 1.2 * errors[1], errors


def a_young_lora(
    matrices: int, device: torch.device, have: tuple[int, ...] = (0, 2)
) -> tuple[Linears, Tensor, list[Tensor | None]]:
    """Three layers in bfloat16, what they read, and what the LoRAs of some add: a tenth of the last bit."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(device, torch.bfloat16)

    x, whole = normal(1, 1024, 256, std=1), normal(3 * 256, 256, std=1 / 16)
    a_of = {layer: normal(8, 256, std=1 / 16) for layer in have}
    b_of = {layer: normal(256, 8, std=1e-4) for layer in have}
    true = {layer: x.double() @ (b_of[layer].double() @ a_of[layer].double()).t() for layer in have}
    loras = Loras(torch.cat([a_of[layer] for layer in have]), tuple(b_of.get(layer) for layer in range(3)))
    weights = (whole,) if matrices == 1 else whole.chunk(3)
    return Linears(weights, loras, 3), x, [true.get(layer) for layer in range(3)]


def share_of(added: Tensor, more: Tensor, less: Tensor) -> float:
    """How much of it is in more - less."""
    assert 3 * added.std() < 2.0**-8 * less.double().std()  # the last bit of most
    return float(((more.double() - less.double()) * added).sum() / added.square().sum())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("matrices", [1, 3], ids=["side by side", "apart"])
def test_what_a_young_lora_adds_is_not_rounded_away(matrices: int, device: str) -> None:
    linears, x, true = a_young_lora(matrices, torch.device(device))
    with_lora, without = (block._project(each, x) for each in (linears, linears._replace(loras=None)))
    for more, less, added in zip(with_lora, without, true, strict=True):
        if added is None:
            torch.testing.assert_close(more, less, rtol=0 if device == "cpu" else 2**-7, atol=0)
        else:
            assert 0.9 < share_of(added, more, less) < 1.1


@pytest.mark.parametrize(("share", "keeps"), [(1.0, ["down"]), (1 / 8, ["up", "down"])], ids=["costly", "products"])
def test_of_products_with_loras_those_are_kept_that_would_be_without(share: float, keeps: list[str]) -> None:
    """Wide and narrow ones, as both operators are asked: x W^T, and W as it lies."""
    weights, x = {"up": torch.empty(12, 4), "down": torch.empty(4, 12)}, {4: torch.empty(5, 4), 12: torch.empty(5, 12)}
    for name, weight in weights.items():
        rows = x[weight.shape[1]]
        asked = {
            torch.ops.aten.mm.default: (rows, weight.t()),
            torch.ops.ztrain.product_and_loras.default: (rows, weight, rows[:, :1], [weight[:, :1]]),
        }
        for operation, arguments in asked.items():
            is_kept = block._policy(share, None, operation, *arguments) == CheckpointPolicy.MUST_SAVE
            assert is_kept == (name in keeps), (name, operation)


def _work(model: AdaptedDiT, states: Encoded) -> tuple[int, int, int]:
    """Matmul FLOPs, matmuls and all operations of a step."""
    noisy = noise_like(*[(8, 8)] * 4)
    with FlopCounterMode(display=False) as flops, Dispatched() as operations:
        gradients(model, noisy, SIGMA[:4], states)
    products = ("aten.mm", "aten.addmm", "aten.bmm", "ztrain.product_and_loras")
    matmuls = sum(operations.counts[f"{name}.default"] for name in products)
    return flops.get_total_flops(), matmuls, operations.counts.total()


def test_a_step_does_no_more_work_than_is_written_here(family: Path) -> None:
    """The tiny model, batch 4, LoRA everywhere. Smaller figures are welcome: write them above."""
    models = [make(family, [EVERYWHERE]), stock(make(family, [EVERYWHERE]))]
    (flops, matmuls, operations), (flops_before, matmuls_before, operations_before) = (
        _work(model, uniform(4, 0)) for model in models
    )
    assert flops < flops_before and matmuls < matmuls_before and operations < operations_before
    assert flops <= FLOPS and matmuls <= MATMULS and operations <= OPERATIONS, (flops, matmuls, operations)


@pytest.mark.parametrize("name", ["lora", "siglip"])
def test_what_needs_no_gradient_is_computed_once(family: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With recomputation: the frozen refiners in front of what is trained once, everything after it twice."""
    computed: list[int] = []
    plain = block.compute
    monkeypatch.setattr(block, "compute", lambda weights, *rest: computed.append(0) or plain(weights, *rest))
    model = make(family, LISTS[name])
    model.dit.enable_gradient_checkpointing()
    gradients(model, noise_like(*SIZES), SIGMA, with_references(mixed()))
    dit = model.dit
    once = len(dit.noise_refiner) + len(dit.context_refiner)
    assert len(computed) == once + 2 * (len(dit.layers) + len(dit.siglip_refiner or ()))


@pytest.mark.parametrize("of_a_row", [1, 2])
def test_gradients_of_loras_come_while_earlier_blocks_are_still_to_come(
    family: Path, of_a_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What DDP hides its sums behind; and they are those of one row of all, bit for bit."""
    noisy, states = noise_like(*SIZES), mixed()
    monkeypatch.setattr(blocks, "ROW_BLOCKS", 30)
    true = gradients(make(family, [EVERYWHERE]), noisy, SIGMA, states)
    monkeypatch.setattr(blocks, "ROW_BLOCKS", of_a_row)
    model = make(family, [EVERYWHERE])
    events: list[tuple[str, int]] = []
    layers = model.dit.layers
    for place, layer in enumerate(layers):
        layer.register_full_backward_pre_hook(lambda *_, place=place: events.append(("runs", place)))
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, place=place: events.append(("has", place)))
    found = gradients(model, noisy, SIGMA, states)
    assert found.keys() == true.keys()
    for key, gradient in true.items():
        assert gradient is None or torch.equal(found[key], gradient), key
    for place in range(len(layers)):
        first = place // of_a_row * of_a_row  # of the row's blocks
        complete = [i for i, event in enumerate(events) if event == ("has", place)]
        assert len(complete) == 14  # A and B of seven layers
        assert complete[0] > events.index(("runs", first))
        assert first == 0 or complete[-1] < events.index(("runs", first - 1))


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ([LoraAdapterConfig(rank=2, peft={"use_dora": True})], "another kind"),
        ([LoraAdapterConfig(rank=2, dropout=0.5)], "drops out"),
    ],
    ids=["dora", "dropout"],
)
def test_what_it_does_not_compute_runs_as_diffusers_wrote_it_and_is_named(
    family: Path, adapters: list[Any], said: str
) -> None:
    model, other = make(family, adapters), stock(make(family, adapters))
    reason = slow_because(model.dit)
    assert reason is not None and said in reason and reason.startswith("layers.0.attention.to_q ")
    noisy, states = noise_like(*SIZES), mixed()
    results = []
    for each in (model, other):
        torch.manual_seed(0)  # of dropout
        results.append(torch.cat([v.flatten() for v in each(noisy, SIGMA, states)]))
    assert distance(results[:1], results[1:]) < 1e-6  # the refiners have no LoRA and are fast
    assert slow_because(model.eval().dit) is None or said == "another kind"


def test_a_chosen_attention_backend_and_foreign_layers_are_named(family: Path) -> None:
    class Other(torch.nn.Linear):
        pass

    dit = make_model(family, []).dit
    assert slow_because(dit) is None
    dit.layers[1].feed_forward.w2 = Other(8, 8)
    assert slow_because(dit) == "layers.1.feed_forward.w2 is Other, not a plain Linear"
    dit.noise_refiner[0].attention.processor._attention_backend = "native"
    dit.layers[1].feed_forward.w2 = torch.nn.Linear(8, 8, bias=False)
    assert slow_because(dit) == "noise_refiner.0.attention has a backend of its own"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, of its compiler
@pytest.mark.parametrize("lengths", [None, (33, 63)], ids=["rows", "packed"])
def test_one_compiled_block_keeps_what_it_is_told(family: Path, lengths: tuple[int, ...] | None) -> None:
    """In tensors of the tokens' states: the input; attention and one product more; all products (q, k, v, out and w2:
    5, w1 and w3: 2.67 each); what the partitioner wants. One function for all, as in a run whose batches differ.
    Modulations are of samples, not of tokens, also where samples of different lengths lie in one row."""
    torch.compiler.reset()
    model = make(family, LISTS["lora"])
    use_fast_blocks(model.dit, backend="aot_eager_decomp_partition")
    layer, dim = model.dit.layers[0], model.dit.config.dim
    samples = torch.arange(len(lengths or (1,))).repeat_interleave(torch.tensor(lengths or (96,)))
    packing = Packing(lengths, torch.arange(96), samples) if lengths else None
    factors = Factors(*(torch.ones((len(lengths or (1,)), 1, dim)) for _ in range(4)))
    freqs = torch.randn((1, 96, 2, dim // model.dit.config.n_heads))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *factors, freqs, samples)}
    kept = {}
    for keep in (Keep.EVERYTHING, Keep.NOTHING, Keep.COSTLY, Keep.PRODUCTS):
        found: dict[int, int] = {}
        row = lora_row(model.dit.layers[:1], freqs)
        given = BlockInputs(factors, tuple(spread(row, blocks._groups(layer))), torch.float32)

        def pack(tensor: Tensor, found: dict[int, int] = found) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and {96, *(lengths or ())} & {*tensor.shape}:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn((1, 96, dim), requires_grad=True) * 1
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = layer(x, None, freqs, given, packing=packing, keep=keep)
        kept[keep] = sum(found.values()) / (96 * dim * 4)
        output.sum().backward()
    assert kept[Keep.NOTHING] < 1.1, kept
    assert 2.9 < kept[Keep.COSTLY] < 3.6, kept
    assert 11.3 < kept[Keep.PRODUCTS] < 13, kept
    assert kept[Keep.EVERYTHING] > kept[Keep.PRODUCTS] + 1, kept


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
def test_one_compiled_function_serves_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five graphs for six blocks: caption and image refiner, the first main block, whose input needs no gradient, the
    last, and all between. A break in one would be an error."""
    monkeypatch.setitem(step.TINY.config, "n_layers", 4)
    torch.compiler.reset()
    case, cpu = step.CASES["lora_1024_b1_full_recompute"], torch.device("cpu")
    steps = [step.Step(case, "ztrain_eager", step.TINY, cpu) for _ in range(2)]
    use_fast_blocks(steps[1].model.dit, backend="eager")
    counters.clear()
    true, found = [], []
    for each, kept in zip(steps, (true, found), strict=True):
        for parameter in each.trained:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        each.velocity().square().mean().backward()
        kept += [parameter.grad for parameter in each.trained]
    assert counters["stats"]["unique_graphs"] == 5
    assert distance(found, true) <= 1e-4
