"""What an export writes: a folder that is whole or not there, and a card that any name of a base leaves a card."""

import ast
import os
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.test_inspect import HOSTILE
from tests.test_parity import family_config, make_model
from tests.triplets import full_disk
from ztrain.adapters.projector import ProjectorConfig
from ztrain.config import Config
from ztrain.errors import InputError
from ztrain.weights.adapter_folder import _model_card, read_adapter, save_adapter

_CONFIG = Config.model_validate({"adapters": [{"kind": "projector"}]})
_NAMES = st.text(min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(_NAMES, _NAMES)
@example("a", "b\n---\n# owned\n")
@example("a", '") or __import__("os").system("x\n```\n<script>')
@example(HOSTILE[0], HOSTILE[5])
def test_any_name_of_a_base_leaves_the_card_a_card(owner: str, name: str) -> None:
    base = f"{owner}/{name}"
    models = {"base": {"pretrained_model_name_or_path": base, "revision": None}}
    text = _model_card(_CONFIG, {"models": models, "step": 3, "ztrain_version": "0"})
    card = ModelCard(text)
    known = re.fullmatch(r"[\w.-]+/[\w.-]+", base, re.ASCII)
    assert card.data.base_model == (base if known else None) and card.data.tags == ["z-image", "ztrain", "projector"]
    lines = card.text.split("\n")
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) == 2 and [line for line in lines if line.startswith("#")] == ["# ztrain adapter `[projector]`"]
    code = ast.parse("\n".join(lines[fences[0] + 1 : fences[1]]))
    calls = {ast.unparse(node.func).rpartition(".")[2]: node for node in ast.walk(code) if isinstance(node, ast.Call)}
    assert calls.keys() == {"from_pretrained", "to", "load_adapter", "adapted"}
    loaded = calls["from_pretrained"].args[0]
    assert isinstance(loaded, ast.Constant) and loaded.value == base
    (said,) = [line for line in lines if line.startswith("Reference-image adapter for ")]
    assert said.count("`") == 2


def test_an_export_is_whole_or_not_there_and_removes_nothing_else(family: Path, tmp_path: Path) -> None:
    adapters = [ProjectorConfig()]
    model, config = make_model(family, adapters), family_config(family).model_copy(update={"adapters": adapters})
    os.umask(before := os.umask(0o027))
    save_adapter(out := tmp_path / "out", model, config, {}, step=1)
    older = {path.name: path.read_bytes() for path in out.iterdir()}
    with full_disk(len(older["adapter.safetensors"]) - 1):
        for place in (out, tmp_path / "new"):
            with pytest.raises(InputError, match="the disk .* is full") as told:
                save_adapter(place, model, config, {}, step=2)
            assert str(told.value).startswith(f"{place}: cannot write it")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == older and os.listdir(tmp_path) == ["out"]
    save_adapter(out, model, config, {}, step=2)
    assert read_adapter(out).step == 2 and {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~before}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="mine: holds something else than an adapter"):
        save_adapter(tmp_path / "mine", model, config, {}, step=2)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
