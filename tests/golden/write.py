"""Writes the golden files of tests/test_golden.py with the code of the checkout that it is started in:

    git worktree add ../b02b086 b02b086 && cd ../b02b086
    PYTHONPATH=. python ../project/tests/golden/write.py ../project/tests/golden/1

Tiny models, a data set of data_tools.build in each layout, a cache, a checkpoint at step 2 of 3, the run's export at
step 3, exports of the other kinds, and what they gave then: expected.json and expected.safetensors. Weights are made
of numpy's RandomState, whose numbers no version of it changes; the transformer's are made again by the test, as its
timestep embedder alone would take a megabyte.
"""

import csv
import hashlib
import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

DESTINATIONS = {"imagefolder": "data", "webdataset": "data_tars", "parquet": "data_parquet"}
"""Layout of a data set and its folder."""
EXPORTS = {
    "export": None,  # the run's
    "export_projector": [{"kind": "projector", "hidden_dim": 8}],
    "export_splice": [{"kind": "splice", "compose": "blend", "tokens": "all"}],
}
"""Folder and adapters."""
TRAIN = ["--config", "config.yaml", "--train.max_train_steps", "3"]
_ADAPTERS = "adapters:\n- {kind: siglip}\n- {kind: lora, rank: 2}\n"
_CONFIG = f"""\
seed: 7
output_dir: run
models:
  base: {{pretrained_model_name_or_path: models/Z-Image-Turbo}}
  siglip: {{pretrained_model_name_or_path: models/siglip2}}
{_ADAPTERS}data: {{train_data_dir: data, resolution: 64, dataloader_num_workers: 1}}
cache: {{dir: cache}}
train:
  learning_rate: 3e-3
  train_batch_size: 2
  gradient_accumulation_steps: 1
  max_train_steps: 3
  checkpointing_steps: 2
  gradient_checkpointing: off
  mixed_precision: "no"
  lr_scheduler: constant
  lr_warmup_steps: 0
  ema_decay: 0.9
validation: {{validation_steps: 0, preview_steps: 0, score_steps: 0}}
"""
_WORDS = ["a fox", "two pears", "a boat on a lake", "an old house"]


def numbers(name: str, shape: Any, spread: float = 1.0) -> torch.Tensor:
    """Even numbers of variance spread ** 2, by name; made of integers, so the same on every machine."""
    even = np.random.RandomState(zlib.crc32(name.encode())).random_sample(tuple(shape))
    return torch.from_numpy(((2 * even - 1) * 3**0.5 * spread).astype(np.float32))


def fill(module: torch.nn.Module, what: str) -> Any:
    """The module with weights by their names, in evaluation mode."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            is_matrix = weight.ndim > 1
            made = numbers(f"{what} {name}", weight.shape, weight[0].numel() ** -0.5 if is_matrix else 0.1)
            weight.copy_(made if is_matrix or name.endswith("bias") else 1 + made)
    return module.eval()


def transformer(models: Path) -> Any:
    """Of the committed config.json."""
    from diffusers import ZImageTransformer2DModel

    path = models / "Z-Image-Turbo" / "transformer" / "config.json"
    return fill(ZImageTransformer2DModel.from_config(json.loads(path.read_text())), "transformer")


def inputs() -> tuple[Any, ...]:
    """(noisy, sigma, encoded) of two samples, one of them without a reference."""
    from ztrain.conditioning import IMAGE, MARKER, TEXT, Encoded, TokenStates

    kinds = torch.tensor([TEXT, MARKER, IMAGE, IMAGE, MARKER, TEXT])
    reference = TokenStates(numbers("reference", (6, 8)), kinds)
    encoded = Encoded(
        text=[numbers("text 0", (5, 8)), numbers("text 1", (3, 8))],
        null_text=numbers("null", (2, 8)),
        reference=[reference, None],
        fused=[None, None],
        siglip=[[numbers("siglip", (2, 3, 4))], []],
    )
    noisy = [numbers("noisy 0", (16, 4, 4)), numbers("noisy 1", (16, 2, 4))]
    return noisy, torch.tensor([0.7, 0.4]), encoded


def velocities(models: Path, folder: Path) -> list[torch.Tensor]:
    """Of an exported adapter on `inputs()`."""
    from ztrain.weights.adapter_folder import adapt, read_adapter

    with torch.no_grad():
        return list(adapt(transformer(models), read_adapter(folder))(*inputs()))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def told(tensor: torch.Tensor) -> str:
    """Type, shape and digest of the bytes."""
    return f"{tensor.dtype} {list(tensor.shape)} {digest(tensor.contiguous().numpy().tobytes())}"


def rows(folder: Path) -> dict[str, list[Any]]:
    """Split -> rows of a data set, pictures by the digest of their bytes."""
    from ztrain.data.reading import read_triplets

    return {
        split: [
            [t.prompt, [digest(p.read()) for p in t.references], digest(t.target.read()), t.columns]
            for t in read_triplets(str(folder), split).triplets
        ]
        for split in ("train", "validation")
    }


def states(cache: Any) -> dict[str, str]:
    """What a run of the cache's config reads of it."""
    from ztrain.cache.samples import all_needs, read_samples

    needs = all_needs(cache.config, read_samples(cache.config, cache))
    return {
        f"{request.label}, {part}": told(tensor)
        for request in needs.requests.values()
        for part, tensor in cache.store(request.state).read(request.key).items()
    }


def exported(folder: Path) -> dict[str, str]:
    """A digest of the names and tensors of each file of an export."""
    from ztrain.weights.adapter_folder import read_adapter

    files = read_adapter(folder).files
    lines = {name: [f"{key} {told(tensor)}" for key, tensor in sorted(of.items())] for name, of in files.items()}
    return {name: digest("\n".join(of).encode()) for name, of in lines.items()}


def _write_models(folder: Path) -> None:
    from miniature.family import TURBO, VISION_LANGUAGE, write_repositories
    from miniature.parts import (
        FamilySizes,
        Parts,
        build_siglip,
        build_text_encoder,
        build_tokenizer,
        build_transformer,
        build_vae,
        build_vision_language,
    )

    sizes = FamilySizes(
        bpe_tokens=264, lm_hidden=8, lm_mlp=8, lm_layers=3, lm_heads=1, lm_kv_heads=1, lm_head_dim=8,
        mrope_section=(2, 1, 1), vl_hidden=8, vl_mlp=8, vl_heads=1, siglip_hidden=4, siglip_mlp=8,
        siglip_layers=1, siglip_heads=1,
        siglip_patches=16, siglip_text_vocab=8, dit_dim=16, dit_layers=1, dit_refiner_layers=1, dit_heads=1,
        dit_axes_dims=(4, 6, 6), vae_channels=(2, 2, 2, 2), vae_norm_groups=1,
    )  # fmt: skip
    tokenizer = build_tokenizer(sizes, _WORDS)
    parts = Parts(
        tokenizer=tokenizer,
        text_encoder=fill(build_text_encoder(sizes, tokenizer), "text encoder"),
        vision_language=build_vision_language(sizes, tokenizer),
        siglip=fill(build_siglip(sizes), "siglip"),
        vae=fill(build_vae(sizes), "vae"),
        transformers={TURBO: fill(build_transformer(sizes, siglip=False), "transformer")},
        shifts={TURBO: 3.0},
        siglip_patches=sizes.siglip_patches,
    )
    write_repositories(folder, parts)
    shutil.rmtree(folder / VISION_LANGUAGE)  # nothing here reads it
    (folder / "siglip2-so400m-patch16-naflex").rename(folder / "siglip2")


def _write_data(folder: Path) -> None:
    from data_tools.build import main as build
    from data_tools.pack import main as pack

    scratch = folder / "scratch"
    pictures = scratch / "pictures"
    pictures.mkdir(parents=True)
    for place in range(9):
        blocks = 115 + 115 * np.kron(numbers(f"picture {place}", (4, 4, 3)) / 3**0.5, np.ones((16, 16, 1)))
        Image.fromarray(blocks.astype(np.uint8)).save(pictures / f"{place}.png")
    with (scratch / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["reference", "target", "prompt", "split", "theme"])
        given = (("0.png", "4.png"), ("1.png", "5.png"), ("7.png|8.png", "6.png"), ("2.png", "3.png"))
        for i, row in enumerate(given):
            table.writerow([*row, _WORDS[i], "train" if i < 3 else "validation", i])
    (pictures / "LICENSE.md").write_text("CC0\n")
    (scratch / "build.yaml").write_text("sources: [pictures]\nlabel: {pairs: {table: pairs.csv}}\nsplit: {apart: []}\n")
    assert build(["--config", str(scratch / "build.yaml"), "--out", str(folder / "data"), "--workers", "1"]) == 0
    for layout in ("webdataset", "parquet"):
        words = ["--data", str(folder / "data"), "--out", str(folder / DESTINATIONS[layout]), "--format", layout]
        assert pack(words) == 0
    shutil.rmtree(scratch)
    shutil.rmtree(folder / "data.work")


def _run(folder: Path) -> list[float]:
    """Trains in `folder`; keeps the checkpoint of step 2 and the export, gives the losses."""
    from ztrain.train.loop import main as train

    os.chdir(folder)  # so that no path of this machine is written down
    assert train(TRAIN) == 0
    losses = [json.loads(line)["train/loss"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    Path("run/checkpoints/step-00000002").rename("checkpoint")
    Path("run/export").rename("export")
    shutil.rmtree("run")
    Path("cache/digests.parquet").unlink()
    Path("models/Z-Image-Turbo/transformer/diffusion_pytorch_model.safetensors").unlink()
    for claims in Path("cache").glob("*/claims"):
        claims.rmdir()
    return losses


def main(folder: Path) -> None:
    from ztrain.adapters import build_adapters
    from ztrain.cache.cache import Cache
    from ztrain.config import load_config
    from ztrain.frozen.sources import identity
    from ztrain.model.adapted_dit import AdaptedDiT
    from ztrain.weights.adapter_folder import save_adapter

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    (folder / "config.yaml").write_text(_CONFIG)
    models = folder / "models"
    _write_models(models)
    _write_data(folder)
    losses = _run(folder)
    for name, adapters in EXPORTS.items():
        if adapters is not None:
            place = folder / "other.yaml"
            place.write_text(_CONFIG.replace(_ADAPTERS, f"adapters: {json.dumps(adapters)}\n"))
            config = load_config([place])
            place.unlink()
            dit = transformer(models)
            known = {"transformer": identity(dit)}
            torch.manual_seed(0)
            model = AdaptedDiT(dit, build_adapters(config.adapters))
            for weight in model.parameters():
                weight.requires_grad and weight.data.add_(numbers(f"{name}", weight.shape, 0.1))
            save_adapter(folder / name, model, config, known, step=5)
    given = {name: velocities(models, folder / name) for name in EXPORTS}
    tensors = {f"{name} {i}": each.contiguous() for name, found in given.items() for i, each in enumerate(found)}
    save_file(tensors, folder / "expected.safetensors")
    document = {
        "rows": rows(folder / "data"),
        "states": states(Cache(load_config([folder / "config.yaml"]))),
        "exports": {name: exported(folder / name) for name in EXPORTS},
        "losses": losses,
    }
    (folder / "cache" / "digests.parquet").unlink(missing_ok=True)
    (folder / "expected.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
