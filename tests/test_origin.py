"""What a run may start from: every list, out of an export and out of a checkpoint, and all that is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.test_adapters import LISTS, TRAINABLE, config_of
from tests.test_parity import (
    ALL_READS,
    LORA,
    PROJECTOR,
    SETTINGS,
    SIGLIP,
    make_model,
    noise_like,
    picture,
)
from ztrain.adapters.splice import STATISTICS_KINDS, SpliceConfig
from ztrain.conditioning import Encoded
from ztrain.config import Config
from ztrain.errors import InputError
from ztrain.frozen.states import Encoders
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.sampling.pipeline import identities
from ztrain.weights import checkpoint
from ztrain.weights.adapter_folder import CARD_FILE, CONFIG_FILE, Identities, adapt, read_adapter, save_adapter
from ztrain.weights.init_from import Origin, read_origin


@pytest.fixture(scope="module")
def encoded(encoders: Encoders) -> Encoded:
    return encoders.encode(["a red fox"], [[picture(1, 96, 160)]], ALL_READS, SETTINGS)


@pytest.fixture(scope="module")
def known(family: Path, encoders: Encoders) -> Identities:
    return identities(make_model(family, []).dit, encoders)


@torch.no_grad()
def velocity(model: AdaptedDiT, encoded: Encoded) -> Tensor:
    return model(noise_like((8, 8)), torch.tensor([0.7]), encoded)[0]


@torch.no_grad()
def moved(model: AdaptedDiT, seed: int) -> AdaptedDiT:
    """Every weight of every adapter somewhere else, as after training."""
    torch.manual_seed(seed)
    for tensor in model.trainable_state().values():
        tensor.add_(0.05 * torch.randn_like(tensor))
    return model


def written(folder: Path, model: AdaptedDiT, config: Config, known: Identities, export: bool) -> Path:
    if export:
        return save_adapter(folder / "export", model, config, known, step=3)
    return saved(folder, model, config, known)


def saved(folder: Path, model: AdaptedDiT, config: Config, known: Identities, *, averaged: bool = False) -> Path:
    """A checkpoint of the model; averaged: beside other weights that had not been averaged yet."""
    weights = model.trainable_state()
    tensors = {"trainable.safetensors": {k: w + 1 for k, w in weights.items()} if averaged else weights}
    tensors |= {"ema.safetensors": weights} if averaged else {}
    state = {"config": config.model_dump(mode="json"), "identities": known}
    return checkpoint.publish(folder / "checkpoints", 7, tensors, state)


def started(family: Path, known: Identities, source: Path, adapters: list, **more: Any) -> tuple[AdaptedDiT, Origin]:
    """A new run's model of other fresh weights, from `source`."""
    config = config_of(family, adapters).model_copy(update={"init_from": str(source), **more})
    origin = read_origin(config)
    assert origin is not None
    model = make_model(family, list(origin.fitted(config).adapters), seed=99)
    origin.put_into(model, known)
    return model, origin


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_run_starts_where_the_export_or_the_average_of_a_checkpoint_stands(
    family: Path, encoded: Encoded, known: Identities, tmp_path: Path, name: str
) -> None:
    adapters, config = LISTS[name], config_of(family, LISTS[name])
    model = moved(make_model(family, adapters), 1)
    folder = save_adapter(tmp_path / "first" / "export", model, config, known, step=3)
    there = velocity(adapt(make_model(family, []).dit, read_adapter(folder)), encoded)
    assert not torch.equal(there, velocity(make_model(family, adapters, seed=99), encoded))
    kinds = [adapter.kind for adapter in adapters]
    for source, step in (folder, 3), (saved(tmp_path / "first", model, config, known, averaged=True), 7):
        new, origin = started(family, known, source, adapters)
        assert torch.equal(velocity(new, encoded), there)
        assert origin.told == {"name": "first", "step": step, "adapters": kinds, "sha256": origin.digest}
        shutil.rmtree(source)


@pytest.mark.parametrize("export", [True, False], ids=["export", "checkpoint"])
def test_a_part_of_a_list_starts_from_another_run_and_the_rest_fresh(
    family: Path, encoded: Encoded, known: Identities, tmp_path: Path, export: bool
) -> None:
    """A fresh LoRA adds nothing, so that the new list gives what the trained siglip alone gave; the list's order may
    be another; and what is written says where it began, without a path."""
    model, config = moved(make_model(family, [SIGLIP]), 1), config_of(family, [SIGLIP])
    source = written(tmp_path / "a", model, config, known, export)
    adapters = [LORA, SIGLIP]
    new, origin = started(family, known, source, adapters)
    assert torch.equal(velocity(new, encoded), velocity(model, encoded))
    fresh, now = make_model(family, adapters, seed=99).trainable_state(), new.trainable_state()
    loras = [name for name in fresh if "lora_" in name]
    assert loras and all(torch.equal(now[name], fresh[name]) for name in loras)
    out = save_adapter(tmp_path / "out", new, config_of(family, adapters), known, step=5, origin=origin.told)
    assert json.loads((out / CONFIG_FILE).read_text())["init_from"] == origin.told and read_adapter(out).step == 5
    assert f"Its siglip began with the weights of `{origin.told['name']}` at step" in (out / CARD_FILE).read_text()
    assert str(tmp_path) not in "".join(path.read_text() for path in (out / CARD_FILE, out / CONFIG_FILE))
    # A list of two goes on as two: which weights in the transformer are whose is told by the new run's own.
    both, config = moved(make_model(family, adapters), 2), config_of(family, adapters)
    source = written(tmp_path / "b", both, config, known, export)
    new, _ = started(family, known, source, [SIGLIP, LORA])
    assert torch.equal(velocity(new, encoded), velocity(both, encoded))


def test_settings_that_only_say_how_weights_begin_may_differ(family: Path, known: Identities, tmp_path: Path) -> None:
    before = [SIGLIP, LORA.model_copy(update={"init": "gaussian", "dropout": 0.1})]
    model = moved(make_model(family, before), 1)
    source = save_adapter(tmp_path / "a", model, config_of(family, before), known, step=3)
    siglip = SIGLIP.model_copy(update={"init": "statistics_matched", "init_seed": 4, "token_order": "rows"})
    wider = SETTINGS.model_copy(update={"max_reference_pixels": 2 * SETTINGS.max_reference_pixels})
    new, _ = started(family, known, source, [siglip, LORA.model_copy(update={"alpha": 4.0})], encoders=wider)
    theirs = model.trainable_state()
    assert all(torch.equal(weight, theirs[name]) for name, weight in new.trainable_state().items())


def test_a_correction_that_is_left_out_is_the_sources(
    family: Path, encoded: Encoded, known: Identities, tmp_path: Path
) -> None:
    absolute = change(PROJECTOR, correction="absolute")
    model = moved(make_model(family, absolute), 1)
    source = save_adapter(tmp_path / "a", model, config_of(family, absolute), known, step=3)
    new, _ = started(family, known, source, [PROJECTOR])
    assert torch.equal(velocity(new, encoded), velocity(model, encoded))


def statistics(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    names = [f"{kind}_{moment}" for kind in ("prompt", *STATISTICS_KINDS) for moment in ("mean", "std")]
    save_file({name: torch.rand(64) + 0.5 for name in names}, path)
    return str(path)


def test_statistics_are_compared_by_what_is_in_them(family: Path, known: Identities, tmp_path: Path) -> None:
    def scaled(name: str, seed: int) -> list:
        path = statistics(tmp_path / name, seed)
        return [SpliceConfig(scaling="global", statistics_file=path), LORA]

    before = scaled("one.safetensors", 1)
    model, config = make_model(family, before), config_of(family, before)
    source = save_adapter(tmp_path / "a", model, config, known, step=3)
    started(family, known, source, scaled("elsewhere.safetensors", 1))
    with pytest.raises(InputError, match='adapters splice: statistics_file is "[0-9a-f]{64}" there and'):
        started(family, known, source, scaled("two.safetensors", 2))


PISSA = LORA.model_copy(update={"init": "pissa"})


def change(config: Any, **values: Any) -> list:
    return [config.model_copy(update=values)]


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ([LORA], change(LORA, rank=8), "adapters lora: rank is 4 there and 8 here; adapters lora: alpha is 4.0"),
        ([LORA], change(LORA, alpha=8.0), "adapters lora: alpha is 4.0 there and 8.0 here"),
        ([LORA], change(LORA, target_modules=r"^layers\.0\.attention\.to_q$"), "lora: target_modules is "),
        ([LORA], change(LORA, peft={"use_rslora": True}), 'lora: peft is {} there and {"use_rslora": true} here'),
        ([LORA], [PISSA], "adapters lora: init pissa changes the base, and these weights belong to it as it is"),
        ([SIGLIP], change(SIGLIP, trains="embedder"), 'siglip: trains is "embedder_and_refiner" there and "embedder"'),
        ([SIGLIP], change(SIGLIP, token_order="stock"), 'siglip: token_order is "rows" there and "stock" here'),
        ([SIGLIP], change(SIGLIP, layout="stock"), 'siglip: layout is "one_segment" there and "stock" here'),
        ([PROJECTOR], change(PROJECTOR, compose="replace"), 'compose is "concatenate" there and "replace" here'),
        ([PROJECTOR], change(PROJECTOR, states="fused"), 'projector: states is "reference" there and "fused" here'),
        (change(PROJECTOR, correction="absolute"), change(PROJECTOR, correction="rms"), 'is "absolute" there'),
        ([PROJECTOR], change(PROJECTOR, hidden_dim=32), "projector: hidden_dim is 64 there and 32 here"),
        ([SIGLIP, LORA], [SIGLIP], "lora is not in adapters [siglip]"),
        ([SpliceConfig(), LORA], [LORA], "splice is not in adapters [lora]"),
    ],
)  # fmt: skip
def test_another_meaning_is_refused_by_name(family: Path, tmp_path: Path, before: list, now: list, told: str) -> None:
    """By the settings alone, before any model is loaded."""
    state = {"config": config_of(family, before).model_dump(mode="json"), "identities": {}}
    source = checkpoint.publish(tmp_path, 7, {"trainable.safetensors": {}}, state)
    fault = re.escape(f"init_from {source} does not fit this run: ")
    config = config_of(family, now).model_copy(update={"init_from": str(source)})
    origin = read_origin(config)
    assert origin is not None
    with pytest.raises(InputError, match=f"^{fault}.*{re.escape(told)}"):
        origin.fitted(config)


def test_a_lora_that_changed_its_base_starts_another_one_by_its_export(
    family: Path, encoded: Encoded, known: Identities, tmp_path: Path
) -> None:
    """The export is a LoRA of twice the rank against the base as it was."""
    model, config = moved(make_model(family, [PISSA]), 1), config_of(family, [PISSA])
    source = save_adapter(tmp_path / "a", model, config, known, step=3)
    new, _ = started(family, known, source, change(LORA, rank=8))
    assert torch.allclose(velocity(new, encoded), velocity(model, encoded), atol=1e-4)
    with pytest.raises(InputError, match="rank is 8 there and 4 here"):
        started(family, known, source, [LORA])
    for adapters in ([PISSA], [LORA], change(LORA, rank=8)):
        with pytest.raises(InputError, match="init pissa belong to a base that it changed; start from the export"):
            started(family, known, saved(tmp_path, model, config, known), adapters)


def test_another_base_another_width_and_what_is_no_source_are_refused(
    family: Path, known: Identities, tmp_path: Path
) -> None:
    model, config = make_model(family, [SIGLIP, PROJECTOR]), config_of(family, [SIGLIP, PROJECTOR])
    source = save_adapter(tmp_path / "a" / "export", model, config, known, step=3)
    other = {**known, "transformer": {"config": known["transformer"]["config"], "weights": "another"}}
    with pytest.raises(InputError, match=r"another transformer: its weights hash is \w+, this one's is another"):
        started(family, other, source, [SIGLIP, PROJECTOR])
    with pytest.raises(InputError, match="encoders.deepstack is true there and false here"):
        started(family, known, source, [SIGLIP, PROJECTOR],
                encoders=SETTINGS.model_copy(update={"deepstack": False}))  # fmt: skip
    with pytest.raises(InputError, match=r"siglip_embedder\.0\.weight has shape \(32,\), expected \(48,\)"):
        started(family, {}, source, [SIGLIP.model_copy(update={"feature_dim": 48}), PROJECTOR])
    weights = model.trainable_state() | {"dit.layers.0.foreign": torch.zeros(1)}
    state = {"config": config.model_dump(mode="json"), "identities": known}
    foreign = checkpoint.publish(tmp_path / "checkpoints", 1, {"trainable.safetensors": weights}, state)
    with pytest.raises(InputError, match=r"has weights that no adapter of this run has, such as layers\.0\.foreign"):
        started(family, known, foreign, [SIGLIP, PROJECTOR])
    for place in (tmp_path / "a", tmp_path / "nowhere"):
        with pytest.raises(InputError, match="is neither an exported adapter .* nor a checkpoint .*; name a run"):
            started(family, known, place, [SIGLIP, PROJECTOR])
    assert read_origin(config) is None
