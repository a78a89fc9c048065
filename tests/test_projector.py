"""The projector's correction: in units of the states that it is added to, and not lost in a bf16 sum."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.test_parity import SIGMA, encoded, noise_like
from ztrain.adapters import build_adapters
from ztrain.adapters.projector import ProjectorConfig
from ztrain.adapters.splice import SpliceConfig
from ztrain.conditioning import Encoded
from ztrain.frozen.sources import Source
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import load_transformer

__all__ = ["encoded"]  # fixtures


def adapted(family: Path, config: ProjectorConfig | SpliceConfig, dtype: torch.dtype) -> AdaptedDiT:
    torch.manual_seed(0)
    return AdaptedDiT(load_transformer(Source(str(family / "Z-Image-Turbo")), dtype, "cpu"), build_adapters([config]))


def in_dtype(encoded: Encoded, dtype: torch.dtype) -> Encoded:
    reference = [each and replace(each, states=each.states.to(dtype)) for each in encoded.reference]
    return replace(encoded, text=[each.to(dtype) for each in encoded.text], reference=reference)


def states(size: float) -> Tensor:
    """(L, D): tokens whose sizes differ by 100, with an outlier as Z-Image's have."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn((24, 48), generator=generator) * torch.logspace(-1, 1, 24).unsqueeze(1)
    drawn[:, 5] *= 30
    return size * drawn


def moved_by_one_step(family: Path, correction: str, size: float) -> float:
    """RMS of how far AdamW's first step moves what the caption embedder's norm makes of states of a size."""
    model = adapted(family, ProjectorConfig(hidden_dim=64, correction=correction), torch.float32)
    [projector], norm = model.adapters, model.dit.cap_embedder[0]
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-4, weight_decay=0)
    before, wanted = norm(states(size)), torch.randn((24, 48), generator=torch.Generator().manual_seed(2))
    (norm(projector.correct(states(size))) * wanted).sum().backward()
    optimizer.step()
    with torch.no_grad():
        return (norm(projector.correct(states(size))) - before).square().mean().sqrt().item()


def test_a_learning_rate_means_the_same_for_states_of_any_size(family: Path) -> None:
    rms = [moved_by_one_step(family, "rms", size) for size in (1.0, 10.0, 60.0)]
    assert rms == pytest.approx([rms[0]] * 3, rel=1e-2) and rms[0] > 1e-4
    absolute = [moved_by_one_step(family, "absolute", size) for size in (1.0, 10.0, 60.0)]
    assert absolute[0] > 5 * absolute[1] > 20 * absolute[2]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compose", ["concatenate", "blend"])
def test_it_starts_exactly_at_the_splice(family: Path, encoded: Encoded, dtype: torch.dtype, compose: str) -> None:
    noisy = noise_like((8, 8), (12, 6), (4, 10))
    given = in_dtype(encoded.select([0, 2]), dtype)
    splice, projector = (
        adapted(family, config, dtype)(noisy[:2], SIGMA[:2], given)
        for config in (SpliceConfig(compose=compose), ProjectorConfig(hidden_dim=64, compose=compose))
    )
    assert all(torch.equal(ours, plain) for ours, plain in zip(projector, splice, strict=True))


@torch.no_grad()
def test_a_bf16_base_sees_all_of_a_small_correction(family: Path, encoded: Encoded) -> None:
    """A constant one of 0.001 rms, which is a quarter of the last bit of most bf16 states, in the mean over all."""
    config = ProjectorConfig(hidden_dim=8, compose="replace", tokens="all", correction="rms")
    model = adapted(family, config, torch.bfloat16)
    one = in_dtype(encoded.select([0]), torch.bfloat16)
    seen: list[Tensor] = []
    model.dit.cap_embedder[0].register_forward_hook(lambda norm, given, made: seen.append(made.float() / norm.weight))
    for correction in (0.0, 1e-3):
        model.adapters[0].down.bias.fill_(correction)
        model(noise_like((8, 8)), SIGMA[:1], one)
    assert (seen[1] - seen[0]).mean().item() == pytest.approx(1e-3, rel=0.1)
