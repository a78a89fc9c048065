"""Quantised transformers: a GGUF beside the base's folder, with and without adapters on top."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear
from gguf import GGMLQuantizationType as Q
from torch import Tensor

from miniature.trials import WEIGHTS
from tests.test_parity import noise_like, picture, relative_error
from ztrain.adapters import build_adapters
from ztrain.adapters.siglip import SiglipConfig
from ztrain.cli import main
from ztrain.conditioning import Encoded
from ztrain.config import Config, list_reads, load_config
from ztrain.errors import InputError
from ztrain.frozen.sources import QUANTISED, Source, check_trainable, identity
from ztrain.frozen.states import Encoders
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import load_transformer
from ztrain.model.fast.blocks import slow_because
from ztrain.model.sampler import SampleSettings, sample
from ztrain.weights.adapter_folder import adapt, check_identity, read_adapter

ROOT = Path(__file__).parents[1]
BASE = Source(str(WEIGHTS / "Z-Image"))
ADAPTERS = WEIGHTS.parent / "adapters"
TYPES = (Q.Q8_0, Q.Q4_0, Q.Q5_1, Q.BF16)


def q4_k(weight: np.ndarray) -> np.ndarray:
    """Bytes of Q4_K blocks of 256: two half-precision scales, 12 bytes of smaller ones, 128 of numbers. The package
    reads this type and does not write it, so the numbers are drawn, about as large as the weights."""
    rows = weight.shape[0] * weight.shape[1] // 256
    draw = np.random.default_rng(0)
    scales = np.array([[np.abs(weight).mean() / 250, np.abs(weight).mean() / 60]], np.float16).repeat(rows, 0)
    numbers = draw.integers(0, 256, (rows, 12 + 128), dtype=np.uint8)
    return np.concatenate([scales.view(np.uint8), numbers], axis=1).reshape(weight.shape[0], -1)


def packed(name: str, tensor: Tensor, place: int) -> tuple[np.ndarray, Q]:
    """A tensor as a mixed file holds it."""
    array = tensor.numpy()
    if name == "t_embedder.mlp.0.weight":  # the only one of the miniature with rows of 256
        return q4_k(array), Q.Q4_K
    kinds = TYPES if array.ndim == 2 and array.shape[0] > 1 else (Q.F32, Q.F16, Q.BF16)
    kind = kinds[place % len(kinds)]
    return gguf.quants.quantize(array, kind), kind


def comfyui(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of ComfyUI's files, q, k and v in one, pad tokens as vectors."""
    renamed = {}
    for name, tensor in state.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            tensor = torch.cat([state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
        for ours, theirs in (("to_q", "qkv"), ("to_out.0", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm"),
                             ("all_x_embedder.2-1", "x_embedder"), ("all_final_layer.2-1", "final_layer")):  # fmt: skip
            name = name.replace(ours, theirs)
        renamed[name] = tensor[0] if name.endswith("pad_token") else tensor  # as writers that drop axes of 1 do
    return renamed


def write(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Writes a GGUF and gives what its numbers stand for, by the gguf package's own reading."""
    writer, plain = gguf.GGUFWriter(str(path), "lumina2"), {}
    for place, (name, tensor) in enumerate(state.items()):
        array, kind = packed(name, tensor, place)
        writer.add_tensor(name, array, raw_dtype=kind)
        plain[name] = torch.from_numpy(gguf.quants.dequantize(array, kind).astype(np.float32).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain


@pytest.fixture(scope="module")
def base_state() -> dict[str, Tensor]:
    return load_transformer(BASE, torch.float32, "cpu").state_dict()


@pytest.fixture(scope="module")
def file(base_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    write(path, base_state)
    return path


def quantised(file: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load_transformer(BASE, dtype, "cpu", str(file))


def config_of(*words: str) -> Config:
    return load_config([ROOT / "configs/splice.yaml", ROOT / "configs/miniature.yaml"], words)


@pytest.fixture(scope="module")
def states() -> Callable[[list], Encoded]:
    """Encodes a prompt with a reference for an adapter list."""
    config = config_of()
    encoders = Encoders.load(config, frozenset({"reference", "fused", "siglip"}), torch.float32, "cpu")

    def encode(adapters: list) -> Encoded:
        return encoders.encode(["a star", "two moons"], [[picture(1)], []], list_reads(adapters), config.encoders)

    return encode


NOISY, SIGMA = noise_like((8, 8), (6, 10)), torch.tensor([0.8, 0.3])


@torch.no_grad()
@pytest.mark.parametrize("rename", [dict, comfyui], ids=["diffusers", "comfyui"])
def test_quantised_is_the_dequantised_base(
    base_state: dict[str, Tensor], tmp_path: Path, states: Callable, rename: Callable
) -> None:
    """Against plain layers with what the gguf package reads, whose numbers diffusers rounds to half precision."""
    meant = write(tmp_path / "t.gguf", rename(base_state))
    dit, plain = quantised(tmp_path / "t.gguf"), load_transformer(BASE, torch.float32, "cpu")
    by_ours = {name: _split(name, meant).view_as(whole) for name, whole in base_state.items()}
    plain.load_state_dict(by_ours)
    kept = [m for m in dit.modules() if isinstance(m, GGUFLinear)]
    assert len(kept) == 8 * 7 + 7 and all(m.weight.dtype == torch.uint8 for m in kept)
    assert (slow_because(dit) or "").endswith("GGUFLinear, not a plain Linear") and slow_because(plain) is None
    assert identity(dit) == {**identity(plain), "weights": QUANTISED}
    ours, theirs, base = (
        AdaptedDiT(each, [])(NOISY, SIGMA, states([]))
        for each in (dit, plain, load_transformer(BASE, torch.float32, "cpu"))
    )
    for mine, its, whole in zip(ours, theirs, base, strict=True):
        assert relative_error(mine, its) < 5e-3 < 5e-2 < relative_error(mine, whole)


def _split(name: str, meant: dict[str, Tensor]) -> Tensor:
    """A tensor by diffusers' name, of what was written under either."""
    if name in meant:
        return meant[name]
    for place, part in enumerate(("to_q", "to_k", "to_v")):
        if f".{part}." in name:
            return meant[name.replace(part, "qkv")].chunk(3)[place]
    [theirs] = comfyui({name: torch.empty(1, 1)})
    return meant[theirs]


@torch.no_grad()
@pytest.mark.parametrize("name", ["siglip_lora", "splice_lora", "projector"])
def test_adapters_on_top_are_those_of_the_same_numbers(
    file: Path, states: Callable, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compared with the layers unpacked by diffusers, which adds no rounding: the adapters run the same."""
    exported = read_adapter(ADAPTERS / name)
    dit, plain = quantised(file), quantised(file).dequantize()
    check_identity(exported, {"transformer": identity(dit)})
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "only its config was compared with that of" in said and name in said
    encoded = states(exported.adapters)
    ours, theirs = (adapt(each, exported) for each in (dit, plain))
    settings = SampleSettings(num_inference_steps=2, shift=3.0, guidance_scale=1.0, image_guidance_scale=1.0)
    for mine, its in zip(*(sample(each, encoded, NOISY, settings) for each in (ours, theirs)), strict=True):
        assert relative_error(mine, its) < 1e-4
    alone = sample(AdaptedDiT(quantised(file), []), encoded, NOISY, settings)
    assert relative_error(alone[0], sample(ours, encoded, NOISY, settings)[0]) > 1e-2
    ours.set_scales([0.0] * len(exported.adapters))
    assert relative_error(sample(ours, encoded, NOISY, settings)[0], alone[0]) < 1e-5


def test_another_config_is_refused_though_the_weights_cannot_be_compared(file: Path) -> None:
    exported = read_adapter(ADAPTERS / "splice_lora")
    found = identity(quantised(file)) | {"config": "0" * 16}
    with pytest.raises(InputError, match="another transformer: its config hash"):
        check_identity(exported, {"transformer": found})


@torch.no_grad()
def test_fresh_siglip_parts_are_plain_and_products_run_in_bfloat16(file: Path, states: Callable) -> None:
    dit = quantised(file, torch.bfloat16)
    model = AdaptedDiT(dit, build_adapters([SiglipConfig(feature_dim=states([SiglipConfig()]).siglip[0][0].shape[-1])]))
    assert model.base_dtype == torch.bfloat16
    assert not any(isinstance(m, GGUFLinear) for m in dit.siglip_refiner.modules())
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n.startswith("dit.siglip_"))
    output = model(NOISY, SIGMA, states([SiglipConfig()]))
    exact = AdaptedDiT(quantised(file), model.adapters[:0])(NOISY, SIGMA, states([]))
    assert output[1].dtype == torch.bfloat16 and relative_error(output[1].float(), exact[1]) < 0.1


def test_sampling_with_a_gguf_says_what_it_does(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["sample", "--config", "configs/splice.yaml", "configs/miniature.yaml", "--prompt", "a star",
             "--sample.num_inference_steps", "2", "--out", str(tmp_path / "a.png"),
             "--adapter", str(ADAPTERS / "splice_lora")]  # fmt: skip
    assert main([*words, "--models.transformer_file", str(file)]) == 0
    said = capsys.readouterr().out
    assert "blocks: as diffusers wrote them, because" in said and "its weights are quantised" in said
    assert (tmp_path / "a.png").is_file()
    assert main([*words, "--models.transformer_file", str(tmp_path / "none.gguf")]) == 2
    assert "none.gguf does not exist; give a .gguf file" in capsys.readouterr().err
    check_trainable(config_of().models)
    with pytest.raises(InputError, match="transformer_file none.gguf is for sampling and comparing"):
        check_trainable(config_of("--models.transformer_file", str(tmp_path / "none.gguf")).models)


def test_damaged_and_foreign_files_are_refused(file: Path, base_state: dict[str, Tensor], tmp_path: Path) -> None:
    data, bad = file.read_bytes(), tmp_path / "bad.gguf"
    for content in (b"", b"no such thing" * 9, data[: len(data) // 2], data[:100], data[:-1],
                    data[:20] + b"\xff" * 40 + data[60:]):  # fmt: skip
        bad.write_bytes(content)
        with pytest.raises(InputError, match="bad.gguf(: is cut off: .* promises 5,| is no whole GGUF file that)"):
            quantised(bad)
    start, name = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1), struct.pack("<Q1s", 1, b"x")
    array, text, none = struct.Struct("<IIQ"), struct.pack("<IQ", 8, 2**63), struct.pack("<I", 99)
    deep, *wide = array.pack(9, 9, 1) * 9000, *(array.pack(9, kind, 2**60) for kind in (0, 8, 99))
    for setting in (text, none, deep, *wide):
        bad.write_bytes(start + name + setting + bytes(99))  # counts that nobody could walk through
        with pytest.raises(InputError, match="bad.gguf is no whole GGUF file that can be read"):
            quantised(bad)
    some = dict(list(base_state.items())[:-3])
    for state, said in (
        (some, "3 missing keys"),
        (base_state | {"blk.0.attn_q.weight": torch.zeros(32, 32)}, "1 unexpected keys, for example blk.0"),
        ({"blk.0.attn_q.weight": torch.zeros(32, 32)}, "missing keys"),
        (base_state | {"layers.0.attention.to_q.weight": torch.zeros(64, 64)}, "does not fit the transformer"),
    ):
        write(bad, state)
        with pytest.raises(InputError, match=said):
            quantised(bad)
