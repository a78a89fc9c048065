"""One battery for every list of adapters: gradients, learning, saving, exports that others read."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import ztrain
from miniature.trials import WEIGHTS
from tests.test_parity import (
    ALL_READS,
    LORA,
    PROJECTOR,
    SETTINGS,
    SIGLIP,
    family_config,
    make_model,
    noise_like,
    picture,
    relative_error,
)
from ztrain.adapters import ADAPTERS
from ztrain.adapters.lora import COMFYUI_FILE, DIFFUSERS_FILE, LoraAdapterConfig
from ztrain.adapters.siglip import SiglipConfig
from ztrain.adapters.splice import STATISTICS_KINDS, SpliceConfig, match_statistics, read_statistics
from ztrain.cache.order import SampleKey
from ztrain.conditioning import Encoded, TokenStates
from ztrain.config import Config, ExportConfig
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec, TextEncoder
from ztrain.frozen.states import Encoders
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.fast.blocks import slow_because
from ztrain.model.flow import SigmaDensity, draw_noise, draw_sigma, loss
from ztrain.model.sampler import SampleSettings, sample
from ztrain.sampling.pipeline import identities, load_adapter, source_of
from ztrain.weights.adapter_folder import CONFIG_FILE, adapt, read_adapter, save_adapter

MINI_ADAPTERS = WEIGHTS.parent / "adapters"
SPLICE = SpliceConfig()
FUSED = SpliceConfig(states="fused", compose="replace", tokens="all")
LISTS = {
    "splice": [SPLICE],
    "projector": [PROJECTOR],
    "splice_lora": [SPLICE, LORA],
    "siglip": [SIGLIP],
    "siglip_lora": [SIGLIP, LORA],
    "lora": [LORA],
    "siglip_embedder": [SIGLIP.model_copy(update={"trains": "embedder"})],
    "fused_projector": [PROJECTOR.model_copy(update={"states": "fused", "compose": "replace", "tokens": "all"})],
}
TRAINABLE = [name for name in LISTS if name != "splice"]
READ_REFERENCE = [name for name in LISTS if name != "lora"]


@pytest.fixture(scope="module")
def encoded(encoders: Encoders) -> Encoded:
    # 3 x 5 patches of SigLIP: a grid that is no multiple of 32 tokens, so that its pad token is used.
    return encoders.encode(["a red fox"], [[picture(1, 96, 160)]], ALL_READS, SETTINGS)


def config_of(family: Path, adapters: list) -> Config:
    return family_config(family).model_copy(update={"adapters": adapters})


def loss_of(model: AdaptedDiT, encoded: Encoded, seed: int = 0) -> Tensor:
    """The objective on one fixed (triplet, noise, sigma)."""
    latents = noise_like((8, 8))
    key = [SampleKey(seed, 0, 0)]
    noise, sigma = draw_noise(key, latents), draw_sigma(key, SigmaDensity("uniform"))
    return loss(model, latents, noise, sigma, encoded).mean()


def trained(family: Path, adapters: list, encoded: Encoded, steps: int = 3, rate: float = 1e-2) -> AdaptedDiT:
    model = make_model(family, adapters).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0)
    for _ in range(steps):
        with torch.enable_grad():
            loss_of(model, encoded).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("name", TRAINABLE)
def test_only_adapter_weights_learn_and_all_of_them_do(family: Path, encoded: Encoded, name: str) -> None:
    model = make_model(family, LISTS[name]).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(weights) == set(model.trainable_state()) and weights
    assert all(p.dtype == torch.float32 for p in weights.values())
    optimizer = torch.optim.AdamW(list(weights.values()), 1e-3)
    moved: set[str] = set()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, encoded).backward()
        assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)
        if step == 0:
            assert [n for n, p in weights.items() if p.grad is None] == []
        moved |= {n for n, p in weights.items() if p.grad.abs().max() > 0}
        optimizer.step()
    # Zero-initialised layers hold their predecessors' gradients at zero for a step.
    assert moved == set(weights), sorted(set(weights) - moved)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@torch.no_grad()
@pytest.mark.parametrize("name", LISTS)
def test_perturbing_the_reference_changes_the_output_unless_nothing_reads_it(
    family: Path, encoders: Encoders, encoded: Encoded, name: str
) -> None:
    model = make_model(family, LISTS[name])
    other = encoders.encode(["a red fox"], [[picture(2, 96, 160)]], ALL_READS, SETTINGS)
    noisy, sigma = noise_like((8, 8)), torch.tensor([0.7])
    before, after = model(noisy, sigma, encoded)[0], model(noisy, sigma, other)[0]
    if name in READ_REFERENCE:
        assert relative_error(after, before) > 1e-3
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("name", [n for n in TRAINABLE if "lora" in n])
def test_lists_with_a_lora_halve_the_loss_on_one_triplet(family: Path, encoded: Encoded, name: str) -> None:
    model = make_model(family, LISTS[name])
    with torch.no_grad():
        first = float(loss_of(model, encoded))
        last = float(loss_of(trained(family, LISTS[name], encoded, steps=50, rate=3e-2), encoded))
    assert last < 0.5 * first, (first, last)


@pytest.mark.parametrize("name", [n for n in TRAINABLE if "lora" not in n])
def test_loss_falls_by_five_times_its_spread_over_seeds(family: Path, encoded: Encoded, name: str) -> None:
    """Three seeds of the new weights, on one fixed triplet, noise and sigma; the spread is the fall's deviation."""
    falls = []
    for seed in range(3):
        seeded = [a.model_copy(update={"init_seed": seed}) if a.kind == "siglip" else a for a in LISTS[name]]
        model = make_model(family, seeded, seed=seed).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0)
        losses = []
        for _ in range(35):
            loss = loss_of(model, encoded)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        falls.append(losses[0] - losses[-1])
    spread = float(torch.tensor(falls).std())
    assert min(falls) > 0 and sum(falls) / 3 > 5 * spread, (falls, spread)


@pytest.mark.parametrize("name", LISTS)
def test_export_and_load_are_bit_exact(family: Path, encoded: Encoded, tmp_path: Path, name: str) -> None:
    model = trained(family, LISTS[name], encoded) if name in TRAINABLE else make_model(family, LISTS[name])
    save_adapter(tmp_path / "a", model, config_of(family, LISTS[name]), {}, step=3)
    loaded = adapt(make_model(family, []).dit, read_adapter(tmp_path / "a"))
    with torch.no_grad():
        noisy, sigma = noise_like((8, 8)), torch.tensor([0.7])
        assert torch.equal(model(noisy, sigma, encoded)[0], loaded(noisy, sigma, encoded)[0])
    assert loaded.trainable_state().keys() == model.trainable_state().keys()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "z-image" in card and "ztrain" in card
    for file in (tmp_path / "a").iterdir():
        assert str(family).encode() not in file.read_bytes(), f"{file.name} holds a path of this machine"


@pytest.mark.parametrize("name", TRAINABLE)
def test_export_in_bfloat16_is_half_as_large_and_rounds_once(
    family: Path, encoded: Encoded, tmp_path: Path, name: str
) -> None:
    model, config = trained(family, LISTS[name], encoded), config_of(family, LISTS[name])
    half = config.model_copy(update={"export": ExportConfig(dtype="bfloat16")})
    for folder, settings in (("whole", config), ("half", half)):
        save_adapter(tmp_path / folder, model, settings, {}, step=3)
    loaded = adapt(make_model(family, []).dit, read_adapter(tmp_path / "half")).trainable_state()
    for key, weights in model.trainable_state().items():
        assert loaded[key].dtype == torch.float32 and torch.equal(loaded[key], weights.bfloat16().float()), key
    for path in (tmp_path / "half").glob("*.safetensors"):
        whole, halved = (safe_open(tmp_path / folder / path.name, framework="pt") for folder in ("whole", "half"))
        for key in halved.keys():
            assert key.endswith(".alpha") or halved.get_tensor(key).dtype == torch.bfloat16, key
            assert not key.endswith(".alpha") or torch.equal(halved.get_tensor(key), whole.get_tensor(key)), key


@pytest.mark.parametrize("name", LISTS)
def test_load_adapter_on_a_stock_pipeline(
    family: Path, encoders: Encoders, encoded: Encoded, tmp_path: Path, name: str
) -> None:
    model = trained(family, LISTS[name], encoded) if name in TRAINABLE else make_model(family, LISTS[name])
    known = identities(make_model(family, []).dit, encoders)
    save_adapter(tmp_path / "a", model, config_of(family, LISTS[name]), known, step=3)
    places = {
        "vision_language": str(family / "Qwen3-VL-4B-Instruct"),
        "siglip": str(family / "siglip2-so400m-patch16-naflex"),
    }
    pipeline = ZImagePipeline.from_pretrained(family / "Z-Image-Turbo")
    adapted = ztrain.load_adapter(pipeline, tmp_path / "a", **places)
    sizes = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0}
    with_reference = adapted("a red fox", picture(1, 96, 160), **sizes)[0]
    assert with_reference.size == (64, 64)
    if name in READ_REFERENCE:  # prepared as training prepares files: transparency on white
        clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        white = Image.new("RGB", (64, 64), "white")
        shown = [adapted("a red fox", image, **sizes)[0].tobytes() for image in (clear, white)]
        assert shown[0] == shown[1]
        with pytest.raises(InputError, match="the given reference"):
            adapted("a red fox", Image.new("RGB", (8, 8)), **sizes)
    with pytest.raises(InputError, match="the prompt is empty"):
        adapted(" ", **sizes)
    state = adapted.encode(["a red fox"], [[picture(1, 96, 160)]])
    with torch.no_grad():
        noisy, sigma = noise_like((8, 8)), torch.tensor([0.7])
        assert torch.equal(adapted.model(noisy, sigma, state)[0], model(noisy, sigma, encoded)[0])

    for repository, role in (("Z-Image", "transformer"),):
        with pytest.raises(InputError, match=f"another {role}.*hash"):
            load_adapter(ZImagePipeline.from_pretrained(family / repository), tmp_path / "a", **places)
    document = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for role in ("vision_language", "siglip"):
        changed = {
            **document,
            "format_version": 1,
            "identity": {**known, role: {"config": known[role]["config"], "weights": "0" * 16}},
        }
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(changed))
        reads = {"vision_language": "reference", "siglip": "siglip"}[role]
        if any(reads in adapter.reads for adapter in LISTS[name]):
            with pytest.raises(InputError, match=f"another {role}"):
                load_adapter(ZImagePipeline.from_pretrained(family / "Z-Image-Turbo"), tmp_path / "a", **places)
    with pytest.raises(InputError, match="is no exported adapter"):
        load_adapter(pipeline, tmp_path)


def read_lora(path: Path) -> dict[str, Tensor]:
    """An independent small reader: weight difference of every linear, q, k and v fused as ComfyUI holds them."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    differences = {}
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        up = tensors[f"{module}.lora_B.weight"]
        alpha = tensors.get(f"{module}.alpha", torch.tensor(header.get("transformer.lora_alpha", down.shape[0])))
        rank = down.shape[0] ** 0.5 if header.get("transformer.use_rslora") else down.shape[0]
        differences[module.split(".", 1)[1]] = (up.double() @ down.double()) * (float(alpha) / rank)
    fused = {}
    for module, difference in differences.items():
        if module.endswith("to_q"):
            stem = module.removesuffix("to_q")
            fused[f"{stem}qkv"] = torch.cat([difference, differences[f"{stem}to_k"], differences[f"{stem}to_v"]])
        elif not module.endswith(("to_k", "to_v")):
            fused[module.replace("to_out.0", "out")] = difference
    return fused


@pytest.mark.parametrize(
    "change",
    [{}, {"alpha": 8.0}, {"alpha": 1.0}, {"peft": {"use_rslora": True}}, {"init": "pissa"},
     {"init": "pissa", "peft": {"use_rslora": True}}, {"init": "olora"}, {"init": "gaussian"}],
    ids=str,
)  # fmt: skip
def test_exported_lora_in_stock_diffusers_and_both_layouts(
    family: Path, encoded: Encoded, tmp_path: Path, change: dict
) -> None:
    adapters = [LORA.model_copy(update=change)]
    model = trained(family, adapters, encoded)
    save_adapter(tmp_path, model, config_of(family, adapters), {}, step=3)
    noisy, sigma = noise_like((8, 8)), torch.tensor([0.7])
    with torch.no_grad():
        ours = model(noisy, sigma, encoded)[0]
        again = adapt(make_model(family, []).dit, read_adapter(tmp_path))(noisy, sigma, encoded)[0]
        base = make_model(family, [])(noisy, sigma, encoded)[0]
    assert relative_error(again, ours) < 1e-5 and relative_error(base, ours) > 1e-2
    for name in (DIFFUSERS_FILE, COMFYUI_FILE):
        pipeline = ZImagePipeline.from_pretrained(family / "Z-Image-Turbo")
        pipeline.load_lora_weights(tmp_path, weight_name=name)
        with safe_open(tmp_path / name, framework="pt") as file:
            exported = {
                re.sub("^(transformer|diffusion_model).", "", k) for k in file.keys() if not k.endswith(".alpha")
            }
        loaded = {n.replace(".default_0", "") for n, _ in pipeline.transformer.named_parameters() if ".lora_" in n}
        assert loaded == exported
        with torch.no_grad():
            stock = pipeline.transformer([noisy[0].unsqueeze(1)], 1 - sigma, encoded.text, return_dict=False)[0][0]
        assert relative_error(-stock.squeeze(1), ours) < 1e-5, name
    diffusers, comfyui = read_lora(tmp_path / DIFFUSERS_FILE), read_lora(tmp_path / COMFYUI_FILE)
    assert diffusers.keys() == comfyui.keys() and len(diffusers) == 2 * 5
    assert all(relative_error(comfyui[k], diffusers[k]) < 1e-5 for k in diffusers)


@torch.no_grad()
@pytest.mark.parametrize("everywhere", [False, True], ids=["attention", "everywhere"])
def test_a_lora_paints_the_same_picture_in_the_stock_pipeline(
    family: Path, encoded: Encoded, tmp_path: Path, everywhere: bool
) -> None:
    """Trained through the fast blocks, exported, and loaded by diffusers: its own blocks, sampler and decoder."""
    targets = {"target_modules": r"^layers\..*\.(to_[qkv]|to_out\.0|w[123])$"} if everywhere else {}
    adapters = [LORA.model_copy(update=targets)]
    model = trained(family, adapters, encoded, steps=5)
    assert slow_because(model.dit) is None
    save_adapter(tmp_path, model, config_of(family, adapters), {}, step=5)
    pipeline = ZImagePipeline.from_pretrained(family / "Z-Image-Turbo")
    pipeline.set_progress_bar_config(disable=True)
    codec = LatentCodec(pipeline.vae)
    text = TextEncoder(pipeline.text_encoder, pipeline.tokenizer, 512)
    states = Encoders(text, codec).encode(["a boat"], [[]], frozenset(), config_of(family, adapters).encoders)
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    ours = codec.decode(sample(model, states, list(noise), SampleSettings(num_inference_steps=8, shift=3.0))[0])

    def theirs() -> Image.Image:
        return pipeline(
            prompt="a boat", height=64, width=64, num_inference_steps=8, guidance_scale=0.0, latents=noise.clone()
        ).images[0]

    before = theirs()
    pipeline.load_lora_weights(tmp_path, weight_name=DIFFUSERS_FILE)
    pictures = [np.asarray(picture, dtype=np.int16) for picture in (ours, theirs(), before)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 < np.abs(pictures[0] - pictures[2]).max()


def test_dora_is_exported_for_diffusers_only_and_reloads(family: Path, encoded: Encoded, tmp_path: Path) -> None:
    adapters = [LORA.model_copy(update={"peft": {"use_dora": True}})]
    model = trained(family, adapters, encoded)
    save_adapter(tmp_path, model, config_of(family, adapters), {}, step=3)
    assert not (tmp_path / COMFYUI_FILE).exists()
    noisy, sigma = noise_like((8, 8)), torch.tensor([0.7])
    pipeline = ZImagePipeline.from_pretrained(family / "Z-Image-Turbo")
    pipeline.load_lora_weights(tmp_path, weight_name=DIFFUSERS_FILE)
    with torch.no_grad():
        ours = model(noisy, sigma, encoded)[0]
        stock = pipeline.transformer([noisy[0].unsqueeze(1)], 1 - sigma, encoded.text, return_dict=False)[0][0]
        again = adapt(make_model(family, []).dit, read_adapter(tmp_path))(noisy, sigma, encoded)[0]
    assert torch.equal(again, ours) and relative_error(-stock.squeeze(1), ours) < 1e-5


def test_a_damaged_or_foreign_export_is_refused(family: Path, encoded: Encoded, tmp_path: Path) -> None:
    model = trained(family, [LORA], encoded, steps=1)
    save_adapter(tmp_path, model, config_of(family, [LORA]), {}, step=1)
    weights = model.adapter_weights(0)
    name = next(iter(weights))
    with pytest.raises(InputError, match="lacks 1 weights"):
        model.load_adapter_weights(0, {k: v for k, v in weights.items() if k != name}, "file")
    with pytest.raises(InputError, match="has 1 weights that the adapter lacks"):
        model.load_adapter_weights(0, {**weights, "more": torch.zeros(1)}, "file")
    with pytest.raises(InputError, match="has shape"):
        model.load_adapter_weights(0, {**weights, name: torch.zeros(1)}, "file")
    path = tmp_path / DIFFUSERS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{DIFFUSERS_FILE} was changed after the export, or damaged") as raised:
        read_adapter(tmp_path)
    # As the sentence says, what was changed on purpose can be used.
    assert "set format_version to 1 in adapter_config.json, and under files the SHA-256" in str(raised.value)
    document = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"format_version": 1}
    document["files"][DIFFUSERS_FILE] = hashlib.sha256(content).hexdigest()
    (tmp_path / CONFIG_FILE).write_text(json.dumps(document))
    assert read_adapter(tmp_path).step == 1


def without(document: dict, *path: str) -> bytes:
    """The document without one key, as the bytes of a file."""
    *above, last = path
    inside = document
    for key in above:
        inside = inside[key]
    del inside[last]
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        *(
            (lambda found, key=key: without(found, *key.split(".")), f": {key}: is missing; give it a value")
            for key in ("adapters", "encoders", "identity", "files", "models", "step", "identity.transformer.weights",
                        "models.base", "models.vision_language", "models.siglip.pretrained_model_name_or_path")
        ),
        (lambda found: json.dumps({**found, "adapters": [1]}).encode(), ": adapters.0: "),
        (lambda found: json.dumps({**found, "step": "7"}).encode(), ": step: "),
        (lambda found: json.dumps({**found, "adapters": [{"kind": "splice", "statistics_file": 5}]}).encode(),
         ": adapters.0.statistics_file: "),
        (lambda found: json.dumps([found]).encode(), " must hold a JSON object, not a list"),
        (lambda found: b"null", " must hold a JSON object, not a NoneType"),
        (lambda found: json.dumps(found).encode()[:-9], " is damaged: "),
        (lambda found: b"\xff" + json.dumps(found).encode(), " is damaged: "),
        (lambda found: b"[" * 100_000, " is damaged: "),
    ],
)  # fmt: skip
def test_a_damaged_document_is_one_sentence_that_names_file_and_key(tmp_path: Path, damage: Any, told: str) -> None:
    shutil.copytree(MINI_ADAPTERS / "siglip_lora", tmp_path / "a")
    path = tmp_path / "a" / CONFIG_FILE
    found = json.loads(path.read_text()) | {"format_version": 1}  # whose documents have no seal
    path.write_text(json.dumps({**found, "of_a_later_version": 1}))
    assert read_adapter(path.parent).step == found["step"]
    path.write_bytes(damage(found))
    with pytest.raises(InputError) as raised:
        read_adapter(path.parent)
    assert str(raised.value).startswith(f"{path}{told}") and "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def exported(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with every file that there is, the statistics too."""
    folder = tmp_path_factory.mktemp("exported")
    kinds = ("prompt", *STATISTICS_KINDS)
    rows = {f"{kind}_{moment}": torch.rand(48) for kind in kinds for moment in ("mean", "std")}
    save_file(rows, folder / "rows.safetensors")
    scaled = SpliceConfig(scaling="global", compose="blend", statistics_file=str(folder / "rows.safetensors"))
    adapters = [scaled, SIGLIP, LORA]
    return save_adapter(folder / "a", make_model(family, adapters), config_of(family, adapters), {}, step=3)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as raised:
        read_adapter(folder)
    assert "\n" not in (said := str(raised.value)) and len(said) < 600
    return said


def test_a_flipped_bit_anywhere_in_an_export_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    """Any bit of what is read; the model card is for people, who may write into it."""
    folder = Path(shutil.copytree(exported, tmp_path / "a"))
    assert {path.name for path in folder.iterdir()} == {
        CONFIG_FILE, DIFFUSERS_FILE, COMFYUI_FILE, "adapter.safetensors", "statistics.safetensors", "README.md",
    }  # fmt: skip
    draw = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        whole = path.name == CONFIG_FILE
        places = range(0, len(data), 3) if whole else [*range(0, 300, 60), *draw.integers(0, len(data), 6)]
        for place in () if path.name == "README.md" else places:
            flipped = bytearray(data)
            flipped[place] ^= 1 << draw.integers(8)
            path.write_bytes(flipped)
            said = refusal(folder)
            assert path.name in said, (place, said)
        path.write_bytes(data)
    (folder / "README.md").write_text("my own words")
    assert read_adapter(folder).step == 3


def test_an_export_cut_at_any_tenth_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "a"))
    for path in (path for path in sorted(folder.iterdir()) if path.name != "README.md"):
        data = path.read_bytes()
        for tenth in range(10):
            path.write_bytes(data[: len(data) * tenth // 10])
            assert str(path) in refusal(folder)
        path.unlink()
        assert path.name in refusal(folder)
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "a/b.safetensors", "a\n.safetensors", "a.bin", ""])
def test_a_hostile_document_reads_nothing_from_elsewhere(exported: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "a"))
    found = json.loads((folder / CONFIG_FILE).read_text()) | {"format_version": 1}
    of_lists = [{**found["adapters"][0], "statistics_file": name}, *found["adapters"][1:]]
    for changed in ({"files": {name: "0" * 64}}, {"adapters": of_lists}):
        (folder / CONFIG_FILE).write_text(json.dumps(found | changed))
        assert "is not the name of a safetensors file beside it" in refusal(folder)
    siglip = {**found["adapters"][1], "init": "file", "init_file": name, "init_key_map": {"siglip_pad_token": "x"}}
    (folder / CONFIG_FILE).write_text(json.dumps(found | {"adapters": [siglip]}))
    assert "init_file names weights from elsewhere" in refusal(folder)


@pytest.mark.parametrize("role", ["../..", "/etc", "a/../../b", ".", "", "a/b/c"])
def test_the_encoders_that_an_export_names_are_no_paths(
    family: Path, exported: Path, tmp_path: Path, role: str
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "a"))
    found = json.loads((folder / CONFIG_FILE).read_text()) | {"format_version": 1}
    found["models"]["vision_language"]["pretrained_model_name_or_path"] = role
    (folder / CONFIG_FILE).write_text(json.dumps(found))
    with pytest.raises(InputError, match="give its folder as vision_language="):
        source_of(read_adapter(folder), "vision_language", None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"adapters": [{"kind": "projector", "hidden_dim": 10**12}]}, "adapters.0.hidden_dim"),
        ({"adapters": [{"kind": "lora", "rank": 10**9}]}, "adapters.0.rank"),
        ({"adapters": [{"kind": "siglip", "feature_dim": 10**9}]}, "adapters.0.feature_dim"),
        ({"adapters": [{"kind": "lora", "rank": 10**4000}]}, "adapters.0.rank"),
        ({"adapters": {"kind": "lora"}}, "adapters"),
        ({"format_version": 4}, "format_version 4 is not 3; update ztrain"),
        ({"format_version": [1]}, "format_version [1] is not 3"),
        ({"format_version": 3}, "was changed after the export"),
        ({"format_version": 2, "seal": {}}, "was changed after the export"),
        ({"step": 1e400}, "step"),
        ({"files": {"adapter.safetensors": 7}}, "files"),
        ({"more": json.loads("[" * 90 + "]" * 90)}, "nested more than"),
    ],
)  # fmt: skip
def test_a_hostile_document_is_one_sentence(exported: Path, tmp_path: Path, change: dict, told: str) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "a"))
    found = json.loads((folder / CONFIG_FILE).read_text()) | {"format_version": 1} | change
    (folder / CONFIG_FILE).write_text(json.dumps(found))
    said = refusal(folder)
    assert said.startswith(f"{folder / CONFIG_FILE}") and told in said


def test_a_statistics_file_that_is_junk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"junk\.safetensors: is no safetensors file .*, or write it anew"):
        read_statistics(str(tmp_path / "junk.safetensors"))


INITS = ["context_refiner", "random", "statistics_matched", "cap_embedder_slice"]


@torch.no_grad()
@pytest.mark.parametrize("init", INITS)
def test_siglip_initialisations(family: Path, init: str) -> None:
    dit = make_model(family, [SIGLIP.model_copy(update={"init": init})]).dit
    copied = all(
        torch.equal(a, b)
        for a, b in zip(dit.siglip_refiner.parameters(), dit.context_refiner.parameters(), strict=True)
    )
    assert copied == (init != "random")
    assert all(p.isfinite().all() for n, p in dit.named_parameters() if n.startswith("siglip_"))
    unit = torch.randn((4096, 48), generator=torch.Generator().manual_seed(0))
    target, output = dit.cap_embedder(unit), dit.siglip_embedder(unit[:, :32])
    if init == "statistics_matched":
        ratio = (output - dit.siglip_embedder[1].bias).std() / (target - dit.cap_embedder[1].bias).std()
        assert 0.85 < float(ratio) < 1.15
    if init == "cap_embedder_slice":
        assert torch.equal(dit.siglip_embedder[1].weight, dit.cap_embedder[1].weight[:, :32])


def test_siglip_initialisation_from_a_file_with_padding(family: Path, tmp_path: Path) -> None:
    source = torch.randn((40, 32), generator=torch.Generator().manual_seed(0))
    save_file({"connector.fc1.weight": source, "large": torch.zeros((99, 32))}, tmp_path / "bagel.safetensors")
    key = "siglip_embedder.1.weight"
    change = {"init": "file", "init_file": str(tmp_path / "bagel.safetensors")}
    config = {"kind": "siglip", "feature_dim": 32, **change}
    adapter = SiglipConfig.model_validate({**config, "init_key_map": {key: "connector.fc1.weight"}})
    weight = make_model(family, [adapter]).dit.siglip_embedder[1].weight
    assert torch.equal(weight[:40], source) and weight[40:].eq(0).all()
    for mapping, message in (
        ({key: "absent"}, "no tensor absent"),
        ({"other": "large"}, "none of"),
        ({key: "large"}, "does not fit"),
    ):
        with pytest.raises(InputError, match=message):
            make_model(family, [SiglipConfig.model_validate({**config, "init_key_map": mapping})])
    with pytest.raises(InputError, match="lacks siglip components"):
        make_model(family, [SIGLIP.model_copy(update={"init": "checkpoint"})])
    with pytest.raises(InputError, match="already has siglip components"):
        make_model(family, [SIGLIP], "Z-Image-Omni-Base")


def test_statistics_below_the_home_folder_travel_with_the_export(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings are written with ~, which only a config knows."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [f"{kind}_{moment}" for kind in ("prompt", "text", "image", "marker") for moment in ("mean", "std")]
    save_file({name: torch.ones(64) for name in names}, tmp_path / "statistics.safetensors")
    adapters = [SpliceConfig(scaling="global", statistics_file="~/statistics.safetensors")]
    assert adapters[0].statistics_file == str(tmp_path / "statistics.safetensors")
    assert adapters[0].model_dump(mode="json")["statistics_file"] == "~/statistics.safetensors"
    save_adapter(tmp_path / "a", make_model(family, adapters), config_of(family, adapters), {}, step=0)
    found = read_adapter(tmp_path / "a").adapters[0].statistics_path
    assert Path(str(found)).read_bytes() == (tmp_path / "statistics.safetensors").read_bytes()


@pytest.mark.parametrize("scaling", ["global", "per_dimension"])
def test_scaling_matches_the_prompts_spread(scaling: str) -> None:
    generator = torch.Generator().manual_seed(0)
    table = {
        f"{kind}_{m}": torch.rand(8, generator=generator) + 0.5
        for kind in ("prompt", "text", "image", "marker")
        for m in ("mean", "std")
    }
    states = torch.randn((6000, 8), generator=generator) * table["image_std"] + table["image_mean"]
    matched = match_statistics(TokenStates(states, torch.ones(6000, dtype=torch.uint8)), table, scaling).states
    if scaling == "per_dimension":
        assert torch.allclose(matched.mean(0), table["prompt_mean"], atol=0.05)
        assert torch.allclose(matched.std(0), table["prompt_std"], rtol=0.05)
        far = TokenStates(states[:1] + 1e6, torch.ones(1, dtype=torch.uint8))
        assert torch.allclose(
            match_statistics(far, table, scaling).states[0], table["prompt_mean"] + 3 * table["prompt_std"]
        )
    else:
        factor = (table["prompt_std"].square().mean() / table["image_std"].square().mean()).sqrt()
        assert torch.allclose(matched, states * factor)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [{"states": "fused", "tokens": "text"}, {"compose": "replace"}, {"compose": "blend"}, {"order": "reference_first"},
     {"tokens": "all"}, {"tokens": "image_no_markers"}, {"tokens": "text"}],
    ids=str,
)  # fmt: skip
def test_every_composition_setting_changes_the_output(family: Path, encoded: Encoded, change: dict) -> None:
    noisy, sigma = noise_like((8, 8)), torch.tensor([0.7])
    before = make_model(family, [SPLICE])(noisy, sigma, encoded)[0]
    after = make_model(family, [SPLICE.model_copy(update=change)])(noisy, sigma, encoded)[0]
    assert relative_error(after, before) > 1e-4


@torch.no_grad()
def test_blending_ends_are_the_prompt_and_the_reference(family: Path, encoded: Encoded) -> None:
    noisy, sigma = noise_like((8, 8)), torch.tensor([0.7])

    def output(**change: object) -> Tensor:
        splice = SPLICE.model_copy(update={"compose": "blend", "tokens": "image", **change})
        return make_model(family, [splice])(noisy, sigma, encoded)[0]

    plain = make_model(family, [])(noisy, sigma, encoded)[0]
    assert torch.equal(output(alpha=0.0), plain)
    states = encoded.reference[0]
    assert states is not None
    cut = states.select((1, 2)).states[: len(encoded.text[0])]
    pure = make_model(family, [])(noisy, sigma, replace(encoded, text=[cut]))[0]
    assert relative_error(output(alpha=1.0, blend_length="truncate"), pure) < 1e-6
    assert relative_error(output(alpha=0.5), plain) > 1e-3
    assert relative_error(output(alpha=0.5), output(alpha=0.5, blend_length="truncate")) > 1e-4


@torch.no_grad()
def test_captions_beyond_the_room_are_refused_on_the_host(family: Path, encoded: Encoded) -> None:
    model = make_model(family, [])
    noisy, sigma = noise_like((8, 8)), torch.tensor([0.7])
    fits = replace(encoded, text=[torch.zeros((1504, 48))])
    assert model(noisy, sigma, fits)[0].isfinite().all()
    with pytest.raises(InputError, match="1505 tokens does not fit: the DiT has room for 1504"):
        model(noisy, sigma, replace(encoded, text=[torch.zeros((1505, 48))]))
    with pytest.raises(InputError, match="divisible by 16"):
        model(noise_like((7, 8)), sigma, encoded)


def test_adapter_settings_are_checked(family: Path) -> None:
    with pytest.raises(ValidationError, match="needs statistics_file"):
        SpliceConfig(scaling="global")
    with pytest.raises(ValidationError, match="regular expression"):
        LoraAdapterConfig(target_modules="(")
    with pytest.raises(ValidationError, match="by the fields"):
        LoraAdapterConfig(peft={"r": 4})
    for peft, init, words in (({"lora_bias": True}, True, "lora_bias"), ({"use_dora": True}, "pissa", "choose one")):
        with pytest.raises(ValidationError, match=words):
            LoraAdapterConfig(peft=peft, init=init)
    with pytest.raises(InputError, match="adapters lora: peft"):
        make_model(family, [LoraAdapterConfig(init="loftq")])
    with pytest.raises(InputError, match="peft refuses"):
        make_model(family, [LoraAdapterConfig(peft={"no_such_option": 1})])
    with pytest.raises(InputError, match="matches no module"):
        make_model(family, [LoraAdapterConfig(target_modules="nothing")])
    with pytest.raises(ValidationError, match="cannot be random"):
        SiglipConfig(trains="embedder", init="random")
    assert set(ADAPTERS) == {"splice", "projector", "lora", "siglip"}
