"""Compiled blocks are used only if their gradients hold; a run with them trains what a run without them trains."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from tests.test_batched import gradients, uniform
from tests.test_blocks import EVERYWHERE, SIGMA, a_young_lora, distance, make, share_of
from tests.test_main_path import losses, train
from tests.test_parity import LORA, make_model, noise_like
from ztrain.model.fast import block
from ztrain.model.fast.block import Linears
from ztrain.model.fast.blocks import reads_real, use_fast_blocks
from ztrain.model.fast.compiling import compile_blocks

pytestmark = pytest.mark.usefixtures("forge")


@pytest.mark.parametrize("wrong", [None, 7.0, math.nan])
def test_compiled_gradients_that_differ_once_are_refused(family: Path, wrong: float | None) -> None:
    """Nothing is compiled before a block runs: only the check is looked at."""
    dit, said = make_model(family, [LORA]).dit, []
    values = iter([1.0, 1.0, wrong or 1.0, 1.0])
    done = compile_blocks(dit, lambda: {"weight": torch.full((3,), next(values))}, said.append)
    assert done == (wrong is None) == reads_real(dit)
    [line] = said
    assert ("blocks are not compiled, and slower" in line) == bool(wrong)


def test_a_compiler_that_fails_leaves_the_blocks_and_says_why(family: Path) -> None:
    dit, said = make_model(family, [LORA]).dit, []

    def gradients() -> dict[str, torch.Tensor]:
        if reads_real(dit):
            raise torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("no compiler here"), None)
        return {"weight": torch.ones(3)}

    assert not compile_blocks(dit, gradients, said.append) and not reads_real(dit)
    assert "no compiler here" in said[0]


def test_a_memory_budget_without_a_gpu_or_without_its_word_is_refused(
    family: Path, paintings: Path, tmp_path: Path
) -> None:
    words = ("--memory.budget_gib", "24", "--train.max_train_steps", "1")
    done = train(family, paintings, tmp_path / "run", "lora", *words, status=2)
    assert "memory.budget_gib 24 needs train.gradient_checkpointing budget and a CUDA GPU" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
def test_a_compiled_run_trains_as_an_eager_one(family: Path, paintings: Path, tmp_path: Path) -> None:
    words = ("--train.max_train_steps", "3", "--validation.validation_steps", "0")
    train(family, paintings, tmp_path / "eager", "lora", *words)
    done = train(family, paintings, tmp_path / "compiled", "lora", *words, "--train.compile", "on")
    assert "blocks compiled by inductor" in done.stdout
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, of its compiler
@pytest.mark.parametrize("have", [(0, 2), (0, 1), (2,)], ids=["query and value", "query and key", "value"])
@pytest.mark.parametrize("matrices", [1, 3], ids=["side by side", "apart"])
def test_compiled_what_a_young_lora_adds_is_not_rounded_away(matrices: int, have: tuple[int, ...]) -> None:
    """Queries and keys are read in float32, as the norms of heads do; values are stored."""
    torch.compiler.reset()
    linears, x, true = a_young_lora(matrices, torch.device("cpu"), have)

    def read(linears: Linears, x: Tensor) -> list[Tensor]:
        query, key, value = block._project(linears, x, stored=1)
        return [query.float(), key.float(), value]

    with_lora, without = (torch.compile(read)(each, x) for each in (linears, linears._replace(loras=None)))
    for more, less, added in zip(with_lora, without, true, strict=True):
        if added is None:
            assert torch.equal(more, less)
        else:
            assert 0.9 < share_of(added, more, less) < 1.1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, of its compiler
def test_compiled_loras_copy_no_outputs(family: Path) -> None:
    """Inductor makes addmm of a product and a sum of matrices, and copies what it adds to."""
    model, noisy, states = make(family, [EVERYWHERE]), noise_like((8, 8), (8, 8)), uniform(2, 0)
    eager = gradients(model, noisy, SIGMA[:2], states)
    use_fast_blocks(model.dit, backend="inductor")
    compiled, code = run_and_get_code(lambda: gradients(model, noisy, SIGMA[:2], states))
    assert code and not [each for each in code if "extern_kernels.addmm(" in each]
    for key, gradient in eager.items():
        if gradient is not None:
            assert distance([compiled[key]], [gradient]) <= 1e-4, key
