"""The real size: parameter counts on the meta device; one training step of each kind, and what bf16 takes away, on a
real GPU (-m gpu), the latter also on a CPU (-m slow)."""

import dataclasses
import gc
import json
import os
import time
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import nn

from benchmarks import step
from tests.test_blocks import distance
from ztrain.adapters import build_adapters
from ztrain.adapters.lora import LoraAdapterConfig
from ztrain.adapters.projector import ProjectorConfig
from ztrain.adapters.siglip import SiglipConfig
from ztrain.adapters.splice import SpliceConfig
from ztrain.conditioning import IMAGE, Encoded, TokenStates
from ztrain.config import load_config
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import REAL_CONFIG
from ztrain.model.fast.block import Keep
from ztrain.model.layout import padded

EVERYWHERE = (
    r"^(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123])$"
)
ATTENTION = EVERYWHERE.replace(r"|feed_forward\.w[123]", "")
WITH_MODULATION = EVERYWHERE.replace(r"|feed_forward", r"|adaLN_modulation\.0|feed_forward")

SIGLIP = SiglipConfig(feature_dim=1152)
ROOT = Path(__file__).parents[1]
WHOLE_RUNS = json.loads((ROOT / "benchmarks/results/train_real_size_nvidia_h200.json").read_text())
MEASURED = json.loads((ROOT / "benchmarks/results/first_step_nvidia_h200.json").read_text())


def lora(rank: int, **settings: str) -> LoraAdapterConfig:
    return LoraAdapterConfig(rank=rank, **settings)


@pytest.mark.parametrize(
    ("adapters", "millions"),
    [  # zimage_facts.md 1.1
        ([SIGLIP], 358.358144),
        ([SiglipConfig(feature_dim=1152, trains="embedder")], 4.428672 + 0.003840),
        ([lora(32)], 70.0),
        ([lora(16)], 35.0),
        ([lora(16, target_modules=ATTENTION)], 16.7),
        ([lora(32, target_modules=ATTENTION)], 33.4),
        ([lora(16, target_modules=EVERYWHERE)], 39.7),
        ([lora(32, target_modules=EVERYWHERE)], 79.4),
        ([lora(16, target_modules=WITH_MODULATION)], 47.7),
        ([lora(32, target_modules=WITH_MODULATION)], 95.4),
        ([ProjectorConfig(hidden_dim=2560)], 13.1),
        ([ProjectorConfig()], 26.2),
        ([ProjectorConfig(hidden_dim=10240)], 52.4),
        ([SpliceConfig()], 0.0),
        ([SIGLIP, lora(32)], 358.358144 + 70.0),
    ],
    ids=str,
)
def test_parameter_counts(adapters: list, millions: float) -> None:
    with torch.device("meta"):
        dit = ZImageTransformer2DModel(**REAL_CONFIG)
        base = sum(p.numel() for p in dit.parameters())
        model = AdaptedDiT(dit, build_adapters(adapters))
    assert base == 6_154_908_736
    assert len([n for n, _ in dit.named_parameters() if "lora" not in n and "siglip" not in n]) == 521
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    if adapters == [SIGLIP]:
        assert count == 358_358_144 and len(model.trainable_state()) == 30


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*_24gb.yaml")), ids=lambda path: path.stem)
def test_24gb_configs_fit_by_computation(path: Path) -> None:
    """An upper bound for one card: weights, gradients and moments to the byte, activations by the largest of each kind.

    Checked against the measured peaks of the DiT's step (benchmarks/results): none may lie above its bound.
    """
    stages = [load_config([path, *overlay]) for overlay in ([], [path.with_name("then_1024.yaml")])]
    assert [config.data.resolution for config in stages] == [512, 1024]
    config = stages[1]
    with torch.device("meta"):
        dit = ZImageTransformer2DModel(**REAL_CONFIG)
        base = sum(p.numel() for p in dit.parameters())
        model = AdaptedDiT(dit, build_adapters(config.adapters, 1152))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dim, hidden, blocks = dit.dim, int(dit.dim / 3 * 8), 30 + 2 + 2 + 2
    for config in stages:
        moments = 2 if config.train.optimizer == "adamw_8bit" else 8
        average = 4 if config.train.ema_decay else 0
        static = 2 * base + trained * (4 + 4 + moments + average)
        # The longest sequence: a full prompt, the largest reference in the caption, SigLIP2's 256 patches, the target.
        caption = padded(config.encoders.max_sequence_length + config.encoders.max_reference_pixels // 1024 + 2)
        tokens = caption + (config.data.resolution // 16) ** 2 + 256
        inputs = blocks * tokens * dim * 2  # kept by checkpointing, bf16
        # Of the block that is recomputed: about 24 tensors of the model's width and 5 of the feed-forward's, half of
        # them with a gradient at the same time.
        recomputed = tokens * (24 * dim + 5 * hidden) * 2 * 1.5
        bound = (static + config.train.train_batch_size * (inputs + recomputed)) / 2**30
        assert bound < 22.5, bound  # leaves 1.5 GiB to CUDA itself and to fragmentation
    [row] = [row for row in MEASURED["rows"] if f"{row['list']}_24gb" == path.stem]
    assert row["trained"] == trained and row["peak_gib"] < bound
    # Whole runs, with what the bound leaves out: the VAE and its decoding of previews (benchmarks/train_real_size.py).
    [row] = [row for row in WHOLE_RUNS["rows"] if f"{row['list']}_24gb" == path.stem]
    assert row["peak_gib"] < 22.5


@pytest.mark.gpu
def test_one_training_step_of_each_kind_at_1024() -> None:
    """Random bf16 weights, 1024 x 1024, batch 1, gradient checkpointing, AdamW; writes benchmarks/results/."""
    device = torch.device("cuda")
    rows = []
    for name, adapters in {
        "projector": [ProjectorConfig()],
        "splice_lora": [SpliceConfig(), lora(32)],
        "siglip": [SIGLIP],
        "siglip_lora": [SIGLIP, lora(32)],
        "lora": [lora(32)],
    }.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with device:
            dit = ZImageTransformer2DModel(**REAL_CONFIG)
        torch.set_default_dtype(torch.float32)
        for parameter in dit.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.02)
        dit.enable_gradient_checkpointing()
        model = AdaptedDiT(dit, build_adapters(adapters)).to(device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4)
        encoded = Encoded(
            text=[torch.randn((96, 2560), device=device)],
            null_text=torch.randn((8, 2560), device=device),
            reference=[TokenStates(torch.randn((256, 2560), device=device), torch.full((256,), IMAGE))],
            fused=[None],
            siglip=[[torch.randn((16, 16, 1152), device=device)]],
        )
        latents, noise = torch.randn((2, 16, 128, 128), device=device)
        milliseconds = []
        for number in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            velocity = model([0.3 * latents + 0.7 * noise], torch.tensor([0.7]), encoded)[0]
            loss = (velocity.float() - (noise - latents)).square().mean()
            loss.backward()
            if number == 0:
                assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            milliseconds.append((time.perf_counter() - start) * 1e3)
            assert loss.isfinite()
        row = {
            "list": name,
            "trained": sum(p.numel() for p in trained),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "ms_of_steps": [round(value, 1) for value in milliseconds],
            "loss": round(loss.item(), 4),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
        del dit, model, optimizer, trained, velocity, loss, encoded
    gpu = torch.cuda.get_device_name()
    out = Path(os.environ.get("OUT", "benchmarks/results")) / f"first_step_{gpu.lower().replace(' ', '_')}.json"
    machine = {"gpu": gpu, "torch": torch.__version__, "diffusers": diffusers.__version__}
    command = "python -m pytest -m gpu tests/test_real_size.py"
    document = {"command": command, "what": "DiT alone, 1024 x 1024, batch 1", "machine": machine, "rows": rows}
    out.write_text(json.dumps(document, indent=1) + "\n")
    assert all(row["peak_gib"] < 24 for row in rows)


def bfloat16_distances(case: step.Case, size: step.Size, way: str, device: torch.device) -> dict[str, float]:
    """Of velocities and gradients to diffusers' in float32: ours and diffusers' own."""
    case, found = dataclasses.replace(case, keeps=Keep.EVERYTHING), {}
    for each_way in ("float32", "diffusers", way):
        gc.collect()
        each = step.Step(case, way if each_way == way else "diffusers", size, device)
        generator = torch.Generator(device).manual_seed(5)
        for parameter in each.trained:
            if not parameter.any():  # LoRAs start at zero, where most gradients are zero
                nn.init.normal_(parameter, std=0.02, generator=generator)
        if each_way == "float32":
            each.model.float().base_dtype = torch.float32
            each.model.dit.enable_gradient_checkpointing()
            each.noisy = each.noisy.float()
        velocity = each.velocity()
        F.mse_loss(velocity.float(), each.target.float()).backward()
        gradient = torch.cat([p.grad.flatten() for p in each.trained if p.grad is not None])
        assert len(gradient) == sum(p.numel() for p in each.trained)
        found[each_way] = [velocity.detach(), gradient]
        del each, velocity, gradient
    row = {}
    for i, what in enumerate(("velocity", "gradients")):
        ours, theirs = (distance([found[which][i]], [found["float32"][i]]) for which in (way, "diffusers"))
        row |= {f"{what}_ztrain": round(ours, 6), f"{what}_diffusers": round(theirs, 6)}
    print(json.dumps(row), flush=True)
    return row


def assert_as_near(row: dict[str, float]) -> None:
    for what in ("velocity", "gradients"):
        assert 1e-5 < row[f"{what}_ztrain"] <= 1.2 * row[f"{what}_diffusers"], row


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_bfloat16_is_as_near_on_a_cpu_too() -> None:
    """Eager, the real width, two of thirty main blocks, 256 x 256."""
    size = dataclasses.replace(step.REAL, config=step.REAL.config | {"n_layers": 2})
    case = dataclasses.replace(step.CASES["siglip_lora_1024_b1_24gib"], side=256)
    assert_as_near(bfloat16_distances(case, size, "ztrain_eager", torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lora_1024_b1_no_recompute", "siglip_lora_1024_b1_24gib"])
def test_bfloat16_is_as_near_to_diffusers_float32_as_diffusers_bfloat16(name: str) -> None:
    """Velocities and gradients at 1024 x 1024, ours compiled; adds the distances to benchmarks/results/."""
    row = {"case": name} | bfloat16_distances(step.CASES[name], step.REAL, "ztrain", torch.device("cuda"))
    gpu = torch.cuda.get_device_name()
    out = Path(os.environ.get("OUT", "benchmarks/results")) / f"bfloat16_{gpu.lower().replace(' ', '_')}.json"
    known = json.loads(out.read_text())["rows"] if out.exists() else []
    document = {
        "command": "python -m pytest -m gpu tests/test_real_size.py",
        "what": "relative distance to diffusers in float32, random weights",
        "machine": {"gpu": gpu, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "rows": [other for other in known if other["case"] != name] + [row],
    }
    out.write_text(json.dumps(document, indent=1) + "\n")
    assert_as_near(row)
