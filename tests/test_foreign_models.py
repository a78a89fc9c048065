"""Model repositories as others leave them: with code of their own, cut off, hostile. One sentence, and nothing runs."""

import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_tools.asking import TransformersModel, VllmModel, load_processor
from data_tools.diffusion import Pipeline
from miniature.trials import WEIGHTS
from miniature.truth import PaintedTruth
from tests.test_features import tiny_siglip
from ztrain.config import ModelConfig, ModelsConfig
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec, SiglipEncoder, TextEncoder, siglip_width
from ztrain.frozen.sources import Source, base_defaults, check_weights, pretrained_tokenizer, public_name, read_json
from ztrain.frozen.vision_language import SplicedModel
from ztrain.io.tensors import read_tensors
from ztrain.metrics.towers import Tower, check_tower
from ztrain.model.dit import load_transformer

CPU = torch.device("cpu")
FAMILY = {
    "text_encoder": "Z-Image/text_encoder/model.safetensors",
    "transformer": "Z-Image/transformer/diffusion_pytorch_model.safetensors",
    "vae": "Z-Image/vae/diffusion_pytorch_model.safetensors",
    "vision_language": "Qwen3-VL-4B-Instruct/model.safetensors",
    "siglip": "siglip2-so400m-patch16-naflex/model.safetensors",
    "judge": "judges/content.safetensors",
}


def text_of(weights: Path) -> TextEncoder:
    return TextEncoder.load(Source(str(weights / "Z-Image")), 64, torch.float32, CPU)


def splice_of(weights: Path) -> SplicedModel:
    text = text_of(weights)
    return SplicedModel(Source(str(weights / "Qwen3-VL-4B-Instruct")), text.model, text.tokenizer)


def defaults_of(weights: Path) -> Any:
    return base_defaults(ModelsConfig(base=ModelConfig(pretrained_model_name_or_path=str(weights / "Z-Image"))))


def question_for(folder: Path) -> None:
    TransformersModel.check(folder, folder.name)
    load_processor(folder)


SIGLIP = "siglip2-so400m-patch16-naflex"
LOADERS: dict[str, list[Callable[[Path], Any]]] = {
    "text_encoder": [text_of],
    "transformer": [lambda place: load_transformer(Source(str(place / "Z-Image")), torch.float32, CPU),
                    lambda place: Pipeline(str(place / "Z-Image"), None, offload=False).loaded],
    "vae": [lambda place: LatentCodec.load(Source(str(place / "Z-Image")), torch.float32, CPU)],
    "vision_language": [splice_of, lambda place: question_for(place / "Qwen3-VL-4B-Instruct")],
    "siglip": [lambda place: SiglipEncoder(Source(str(place / SIGLIP)), torch.float32, CPU),
               lambda place: Tower.load(Source(str(place / SIGLIP)), torch.float32, CPU)],
    "judge": [lambda place: PaintedTruth(place, CPU)],
}  # fmt: skip


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The miniature family, by links: a file to be damaged is put in the place of its own."""
    for path in WEIGHTS.rglob("*"):
        if path.is_file():
            (place := tmp_path / "w" / path.relative_to(WEIGHTS)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, place)
    return tmp_path / "w"


def replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def change(path: Path, **keys: Any) -> None:
    replace(path, json.dumps(json.loads(path.read_bytes()) | keys).encode())


def refusal(load: Callable[[], Any]) -> str:
    """The one sentence."""
    with pytest.raises(InputError) as raised:
        load()
    assert "\n" not in (said := str(raised.value)) and len(said) < 700
    return said


# Code -----------------------------------------------------------------------------------------------------------------

EVIL = """import os
open(os.environ["CANARY"], "a").write("x")
from transformers import PretrainedConfig, PreTrainedModel
class C(PretrainedConfig): model_type = "evil"
class M(PreTrainedModel): config_class = C
class P: pass
"""
NAMES = {name: "evil.M" for name in ("AutoModel", "AutoModelForImageTextToText")} | {
    "AutoConfig": "evil.C", "AutoImageProcessor": "evil.P", "AutoProcessor": "evil.P",
}  # fmt: skip


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the code would write, and a person who says yes to everything."""
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    return tmp_path / "canary"


def evil(folder: Path) -> Path:
    folder.mkdir(parents=True)
    config = {"model_type": "evil", "architectures": ["M"], "auto_map": NAMES}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "P", "auto_map": NAMES}))
    tokenizer = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["evil.P", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "evil.py").write_text(EVIL)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_code_of_a_repository_never_runs_and_nobody_is_asked(canary: Path, tmp_path: Path) -> None:
    folder = evil(tmp_path / "evil")
    loads = [
        lambda: Tower.load(Source(str(folder)), torch.float32, CPU),
        lambda: check_tower(Source(str(folder))),
        lambda: TransformersModel.check(folder, "evil"),
        lambda: load_processor(folder),
        lambda: pretrained_tokenizer(folder),
    ]
    for load in loads:
        said = refusal(load)
        assert "evil: config.json names code of its own, which is never run" in said, said
    # What is asked for by class has no need of their code; it is the wrong model for other reasons.
    refusal(lambda: SiglipEncoder(Source(str(folder)), torch.float32, CPU))
    for subfolder in ("text_encoder", "tokenizer", "transformer", "vae"):
        shutil.copytree(folder, tmp_path / "base" / subfolder)
    refusal(lambda: TextEncoder.load(Source(str(tmp_path / "base")), 64, torch.float32, CPU))
    refusal(lambda: load_transformer(Source(str(tmp_path / "base")), torch.float32, CPU))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"_class_name": ["evil", "M"]}, "is not one of diffusers"),
        ({"_class_name": "ZImagePipeline", "vae": ["evil", "M"]}, "its vae is made by code of its own, evil, which is"),
        ({"_class_name": "ZImagePipeline", "../vae": ["diffusers", "AutoencoderKL"]}, "'../vae' is no part of a pipe"),
        ({"_class_name": "ZImagePipeline", "vae": []}, "'vae' is no part of a pipeline"),
        ({"_class_name": "ZImagePipeline", "vae": ["os", "path"]}, "its vae is made by code of its own, os"),
    ],
)
def test_a_pipelines_own_code_never_runs(canary: Path, tmp_path: Path, index: dict, told: str) -> None:
    folder = evil(tmp_path / "pipe")
    evil(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps(index))
    assert told in refusal(lambda: Pipeline(str(folder), None, offload=False).loaded)
    assert not canary.exists()


def test_a_model_that_the_library_knows_is_the_librarys_though_it_brings_code(canary: Path, tmp_path: Path) -> None:
    folder = tiny_siglip(tmp_path / "known", "fixed")
    own = Tower.load(Source(str(folder)), torch.float32, CPU)
    (folder / "evil.py").write_text(EVIL)
    for name in ("config.json", "preprocessor_config.json"):
        change(folder / name, auto_map=NAMES)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.P", "evil.P"]})
    tower = Tower.load(Source(str(folder)), torch.float32, CPU)
    assert type(tower._model) is type(own._model) and torch.equal(tower.texts(["a cat"]), own.texts(["a cat"]))
    assert not canary.exists()


def test_settings_that_reach_outside_the_folder_are_refused(weights: Path) -> None:
    folder = weights / SIGLIP
    load = LOADERS["siglip"][0]
    for keys, told in (
        ({"vision_config": {"attn_implementation": "someone/kernel"}}, "is code to be fetched; remove the key"),
        ({"_attn_implementation": {"": "someone/kernel"}}, "is code to be fetched"),
        ({"transformers_weights": "adapter_model.bin"}, "names other weights; remove the key"),
    ):
        kept = (folder / "config.json").read_bytes()
        change(folder / "config.json", **keys)
        assert told in refusal(lambda: load(weights))
        replace(folder / "config.json", kept)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/model"}))
    assert "holds an adapter_config.json, which names another model" in refusal(lambda: load(weights))


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", LOADERS)
def test_a_cut_off_model_is_named_with_its_bytes(weights: Path, part: str) -> None:
    path = weights / FAMILY[part]
    size = path.stat().st_size
    replace(path, path.read_bytes()[:20_000])
    for load in LOADERS[part]:
        said = refusal(lambda load=load: load(weights))
        assert said.startswith(f"{path}: is cut off: 20,000 bytes are there, its header promises {size:,}; fetch"), said


def test_in_the_hubs_cache_the_file_to_remove_is_named(tmp_path: Path) -> None:
    """There a model's files are links, and what a link points to is not fetched again."""
    save_file({"a": torch.zeros(64)}, tmp_path / "blob")
    replace(tmp_path / "blob", (tmp_path / "blob").read_bytes()[:-9])
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    assert f"fetch it again after removing {tmp_path / 'blob'}" in refusal(lambda: check_weights(tmp_path))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model-2.safetensors", "model-2.safetensors: is missing; fetch it again"),
        ("../model.safetensors", "'../model.safetensors' is no safetensors file beside it"),
        ("/etc/hostname", "is no safetensors file beside it"),
        ("model.bin", "'model.bin' is no safetensors file beside it"),
        (7, "weight_map must name a file for each tensor"),
    ],
)
def test_an_index_names_whole_files_beside_it(weights: Path, name: Any, told: str) -> None:
    folder = weights / "Z-Image/text_encoder"
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"norm.weight": "model-1.safetensors", "embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert told in refusal(lambda: text_of(weights))


def test_what_a_folder_lacks_is_named_and_never_looked_for_on_the_hub(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = weights / "Z-Image"
    monkeypatch.chdir(weights.parent)  # w/Z-Image is written as an id of the Hub is
    relative = Source("w/Z-Image")
    (base / "tokenizer/tokenizer.json").unlink()
    said = refusal(lambda: TextEncoder.load(relative, 64, torch.float32, CPU))
    assert "tokenizer: has no tokenizer.json, nor vocab.json with merges.txt" in said
    for left in (base / "tokenizer").iterdir():
        left.unlink()
    (base / "tokenizer").rmdir()
    said = refusal(lambda: TextEncoder.load(relative, 64, torch.float32, CPU))
    assert said == "w/Z-Image is not a Z-Image model: its folder tokenizer is missing"
    (base / "vae/config.json").unlink()
    said = refusal(lambda: LatentCodec.load(relative, torch.float32, CPU))
    assert said == "w/Z-Image is not a Z-Image model: vae/config.json is missing"
    (weights / SIGLIP / "preprocessor_config.json").unlink()
    for load in LOADERS["siglip"]:
        assert f"{SIGLIP}: has no preprocessor_config.json" in refusal(lambda load=load: load(weights))
    monkeypatch.setenv("HERE", str(weights))
    assert public_name("$HERE/Z-Image") == "Z-Image" and Source("$HERE/Z-Image").folder == base


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{", b'{"a": ' * 5_000, b'{"a": ' * 100 + b"1" + b"}" * 100,
     b'{"hidden_size": ' + b"9" * 5_000 + b"}", b'{"hidden_size": "wide"}',
     b'{"model_type": "siglip2", "vision_config": {"hidden_size": -1}}',
     b'{"model_type": "siglip2", "vision_config": {"num_attention_heads": 0}}', b'{"vision_config": 7}'],
)  # fmt: skip
def test_settings_that_are_damaged_or_hostile_are_one_sentence(weights: Path, data: bytes) -> None:
    replace(weights / SIGLIP / "config.json", data)
    for load in LOADERS["siglip"]:
        refusal(lambda load=load: load(weights))


def test_every_settings_file_of_the_family_may_be_cut_anywhere(weights: Path) -> None:
    for path in (path for path in WEIGHTS.rglob("*.json") if path.parent != WEIGHTS):
        data, place = path.read_bytes(), weights / path.relative_to(WEIGHTS)
        for tenth in range(10):
            replace(place, data[: len(data) * tenth // 10])
            assert f"{place} is damaged" in refusal(lambda place=place: read_json(place))
        parts = {"vae": "vae", "text_encoder": "text_encoder", "tokenizer": "text_encoder", "scheduler": "scheduler",
                 "transformer": "transformer", SIGLIP: "siglip", "Qwen3-VL-4B-Instruct": "vision_language",
                 "judges": "judge"}  # fmt: skip
        part = parts.get(path.parent.name)
        if part and path.name not in ("style.json", "style_second.json"):
            load = defaults_of if part == "scheduler" else LOADERS[part][-1]
            assert path.name in refusal(lambda load=load: load(weights))
        replace(place, data)


def test_a_pipe_in_a_models_place_is_refused_and_not_waited_for(weights: Path) -> None:
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        path = weights / SIGLIP / name
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        for load in (*LOADERS["siglip"], lambda place: siglip_width(Source(str(place / SIGLIP)))):
            if name == "config.json" or load in LOADERS["siglip"]:
                assert f"{path}: is no regular file, but a named pipe" in refusal(lambda load=load: load(weights))
        path.unlink()
        path.write_bytes(kept)


def test_without_safetensors_there_are_no_weights(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights / FAMILY["text_encoder"]
    torch.save({}, path.with_name("pytorch_model.bin"))
    path.unlink()
    assert "has no safetensors; convert its weights" in refusal(lambda: text_of(weights))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "has no safetensors" in refusal(lambda: VllmModel.check(path.parent, "text"))


# Headers --------------------------------------------------------------------------------------------------------------


def tensors_file(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(*offsets: Any, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        b"version https://git-lfs.github.com/spec/v1",
        tensors_file({}, length=10 * 2**30), tensors_file({}, length=2**63), tensors_file(b"{" * 1000),
        tensors_file([1]), tensors_file({"a": 1}), tensors_file({"a": entry(0)}), tensors_file({"a": entry(8, 0)}),
        tensors_file({"a": entry(0, 8), "b": entry(4, 16, shape=(3,))}), tensors_file({"a": entry(-8, 16)}),
        tensors_file({"a": entry(0, 16, dtype="F99")}), tensors_file({"a": entry(0, 16, dtype=7)}),
        tensors_file({"a": entry(0, 16, shape=(2**62, 2**62))}), tensors_file({"a": entry(0, 16, shape="x")}),
        tensors_file(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1e999]}}'),
        tensors_file(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, ' + b"9" * 5000 + b"]}}"),
        tensors_file(b'{"a": ' * 2000 + b"1" + b"}" * 2000),
        tensors_file({"a": entry(0, 16, shape=(4,)), "__metadata__": {"x": 1}}),
    ],
)  # fmt: skip
def test_hostile_headers_are_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    assert str(tmp_path / "model.safetensors") in refusal(lambda: read_tensors(tmp_path / "model.safetensors"))


def test_cut_at_any_tenth_a_tensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(64), "b": torch.ones(3)}, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for tenth in range(10):
        (tmp_path / "cut").write_bytes(data[: len(data) * tenth // 10])
        assert f"{tmp_path / 'cut'}: is " in refusal(lambda: read_tensors(tmp_path / "cut"))
    (tmp_path / "cut").write_bytes(data + b"0")
    assert "where its header promises" in refusal(lambda: read_tensors(tmp_path / "cut"))
