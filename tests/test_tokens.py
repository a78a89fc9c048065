"""Token counts out of the cache: those of the sequences that the transformer is given, for every kind of list."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_parity import make_model
from tests.triplets import picture, tiny_config, write_triplets
from ztrain.cache.cache import Cache
from ztrain.cache.loader import read_batch
from ztrain.cache.order import SampleKey
from ztrain.cache.prepare import cache_states
from ztrain.cache.samples import read_samples
from ztrain.cache.token_counts import token_counts
from ztrain.config import Config
from ztrain.errors import InputError

LISTS: dict[str, tuple[str, list[dict]]] = {
    "none": ("Z-Image-Turbo", [{"kind": "lora"}]),
    "splice": ("Z-Image-Turbo", [{"kind": "splice"}]),
    "all tokens": ("Z-Image-Turbo", [{"kind": "splice", "tokens": "all", "compose": "replace"}]),
    "blend": ("Z-Image-Turbo", [{"kind": "splice", "compose": "blend", "blend_length": "truncate"}]),
    "fused": ("Z-Image-Turbo", [{"kind": "projector", "states": "fused", "hidden_dim": 16}, {"kind": "siglip"}]),
    "siglip": ("Z-Image-Turbo", [{"kind": "siglip"}, {"kind": "lora"}]),
    "stock": ("Z-Image-Omni-Base", [{"kind": "siglip", "layout": "stock", "init": "checkpoint"}]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of two aspects, references of several sizes (the last sample has two), prompts of all lengths."""
    folder = write_triplets(tmp_path_factory.mktemp("data") / "triplets")
    for i, size in enumerate([(64, 64), (96, 64), (128, 128), (240, 256)]):
        picture(10 * i, *size).save(folder / "train" / f"ref-{i}-0.png")
    picture(25, 96, 48).save(folder / "train" / "target-2.png")
    manifest = folder / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[1]["prompt"] += " on a long table" * 12
    rows[2]["prompts"] = [rows[2]["prompt"], rows[2]["prompt"] + " in a small garden at noon", "y"]
    rows[3]["prompt"] = "x"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(family: Path, data: Path, cache: Path, base: str, adapters: list[dict], *more: str) -> Config:
    others = ("--data.text_only_data_dir", str(data), "--data.text_only_share", "0.5")
    # A place for every picture: a sequence of the tiny family is short.
    large = ("--encoders.max_reference_pixels", "65536", "--data.max_crop", "0.5")
    large += ("--encoders.min_reference_pixels", "1024")  # so that parts of a picture have fewer tokens
    dumped = tiny_config(family, data, cache, *others, *large, *more).model_dump(mode="json") | {"adapters": adapters}
    dumped["models"]["base"]["pretrained_model_name_or_path"] = str(family / base)
    dumped["validation"] |= {"validation_steps": 0, "preview_steps": 0}
    return Config.model_validate_json(json.dumps(dumped))


@pytest.mark.parametrize(("base", "adapters"), LISTS.values(), ids=LISTS)
def test_counts_are_those_of_the_transformers_own_sequence(
    family: Path, data: Path, tmp_path: Path, base: str, adapters: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every caption with every variant of its references."""
    config = config_of(family, data, tmp_path, base, adapters, "--data.reference_variants", "2")
    cache_states(config, check=False)
    assert "6 triplets, 0 left out, 2 variants of each reference, 8 captions\n" in capsys.readouterr().out
    cache = Cache(config)
    samples = read_samples(config, cache).trained
    counts = token_counts(config, cache, samples)
    forms = [(i, *form) for i, sample in enumerate(samples) for form in sample.forms()]
    width = 32 if "siglip" in config.reads else None
    model = make_model(family, [adapter.resolved(width) for adapter in config.adapters], base)
    seen: list[int] = []
    original = model.execution.run

    def run(layers: object, states: torch.Tensor, *arguments: object, **named: object) -> torch.Tensor:
        seen.append(states.shape[1])
        return original(layers, states, *arguments, **named)

    model.execution.run = run
    model.dit.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    for *_, form in forms:
        batch = read_batch(cache, [form], [SampleKey(0, 0, 0)], config.reads)
        model([torch.zeros_like(batch.latents[0])], torch.tensor([0.5]), batch.encoded)
    own = seen[:: len(seen) // len(forms)]  # the first layer may be called in both ways
    assert len(forms) == 12 + 6 + 2 * (2 + 1) and counts.shape == (12, 3, 2)
    assert [counts[*place] for *place, _ in forms] == own and np.count_nonzero(counts) == len(forms)
    assert len(set(own)) > (1 if config.reads else 0)
    if "reference" in config.reads and adapters[0].get("compose") != "blend":
        assert (counts[:6, 0, 0] != counts[:6, 0, 1]).any()


def test_a_damaged_or_missing_state_is_named(family: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(family, data, tmp_path, *LISTS["splice"])
    cache_states(config, check=False)
    cache = Cache(config)
    samples = read_samples(config, cache).trained
    whole = token_counts(config, cache, samples)
    assert whole.dtype == np.int32
    for kind in ("text", "reference"):
        [shard] = next(tmp_path.glob(f"{kind}-*")).glob("*.safetensors")
        content = shard.read_bytes()
        shard.write_bytes(content[:-200])
        with pytest.raises(InputError, match=f"{shard.name}: damaged cache shard"):
            token_counts(config, Cache(config), samples)
        shard.unlink()
        with pytest.raises(InputError, match=f"{kind} of .* is not cached; run `ztrain cache`"):
            token_counts(config, Cache(config), samples)
        shard.write_bytes(content)
    assert token_counts(config, Cache(config), samples).tolist() == whole.tolist()


def test_sequences_with_the_same_kinds_of_tokens_are_read_once(
    family: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(family, data, tmp_path, *LISTS["splice"])
    cache_states(config, check=False)
    store = Cache(config).store("reference")
    reads: list[str] = []
    original = type(store)._read
    monkeypatch.setattr(
        type(store), "_read", lambda self, row, only: (reads.append(only), original(self, row, only))[1]
    )
    kinds = store.shared("kinds")
    assert len(kinds) == 6 and reads == ["kinds"] * len({id(each) for each in kinds.values()})
    assert 1 < len(reads) < 6
    monkeypatch.undo()
    assert all(torch.equal(kinds[key], store.read(key)["kinds"]) for key in kinds)
    assert store.shapes("states", 2) == {key: tuple(store.read(key)["states"].shape) for key in kinds}
