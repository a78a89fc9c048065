"""The publish/verify protocol: whatever happens while a checkpoint is written, the newest whole one is found."""

import copy
import json
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from tests.forge import the_forge
from tests.triplets import ROOT
from ztrain.config import Config, load_config
from ztrain.errors import InputError
from ztrain.io import files
from ztrain.io.yamls import enter, is_model, members
from ztrain.weights import checkpoint
from ztrain.weights.checkpoint import MANIFEST, check, find, frozen_differences, prune, publish, run_lock


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "trainable.safetensors": {"a": torch.full((40, 3), value), "b": torch.full((2,), value, dtype=torch.bfloat16)},
        "optimizer.safetensors": {"exp_avg.a": torch.full((40, 3), -value)},
    }


def test_what_was_published_is_read_back_exactly(tmp_path: Path) -> None:
    for step in (5, 10):
        path = publish(tmp_path, step, tensors(step / 3), {"note": "x", "schedule": {"last_epoch": step}})
        assert path == tmp_path / f"step-{step:08d}"
    found, passed = find("latest", tmp_path)
    assert found is not None and not passed
    assert (found.step, found.state["note"], found.state["schedule"]) == (10, "x", {"last_epoch": 10})
    for name, content in tensors(10 / 3).items():
        assert content.keys() == found.tensors[name].keys()
        assert all(torch.equal(content[k], found.tensors[name][k]) for k in content)
    older, _ = find(str(tmp_path / "step-00000005"), tmp_path)
    assert older is not None and older.step == 5
    assert find("none", tmp_path) == (None, []) and find("latest", tmp_path / "empty") == (None, [])


KILLER = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from ztrain.weights import checkpoint

def make(value):
    a = torch.full((4,), float(value))
    return {"trainable.safetensors": {"a": a}, "optimizer.safetensors": {"m.a": -a}}

def save(folder, after):
    '''Saves step 3 over 1 and 2, and dies at point `after`: there is one before and one after each file operation.'''
    count, armed = 0, False
    def point():
        nonlocal count
        if armed and count == after:
            os.kill(os.getpid(), signal.SIGKILL)
        count += armed
    def fatal(owner, name):
        original = getattr(owner, name)
        def wrapper(*arguments, **named):
            point()
            result = original(*arguments, **named)
            point()
            return result
        setattr(owner, name, wrapper)
    for owner, name in ((checkpoint, "save_file"), (checkpoint, "_write"), (os, "fsync"), (os, "rename"),
                        (os, "replace"), (os, "mkdir"), (shutil, "rmtree"), (os, "unlink"), (os, "rmdir")):
        fatal(owner, name)
    for step in (1, 2):
        checkpoint.publish(folder, step, make(step), {"value": step})
    armed = True
    checkpoint.publish(folder, 3, make(3), {"value": 3})
    checkpoint.prune(folder, 2)

after, status = 0, None
while status != 0:  # a child for each point, until one gets through
    child = os.fork()
    if not child:
        save(Path(sys.argv[1]) / str(after), after)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(after, status)
    after += 1
"""


@pytest.mark.usefixtures("forge")
def test_killed_at_every_point_of_a_save_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    """SIGKILL before and after every file operation of a save and of the removal that follows it: the newest whole
    checkpoint is found, nothing half done has a final name, and what was left behind is swept."""
    done = the_forge().run(["-c", KILLER, str(tmp_path)], dict(os.environ))
    assert done.returncode == 0, done.stderr
    *killed, last = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert set(killed) == {9} and last == 0 and len(killed) > 50
    steps = []
    for after in range(len(killed) + 1):
        folder = tmp_path / str(after)
        files.sweep(folder)
        assert all(path.name.startswith("step-") for path in folder.iterdir())  # no debris
        for path in checkpoint.checkpoints(folder):
            check(path)  # nothing half done carries a final name
        found, passed = find("latest", folder)
        assert found is not None and not passed and len(checkpoint.checkpoints(folder)) >= 2
        assert found.state["value"] == found.step == found.tensors["trainable.safetensors"]["a"][0]
        steps.append(found.step)
    assert steps == sorted(steps) and set(steps) == {2, 3}


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_found_and_the_older_one_is_taken(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    for step in (1, 2):
        publish(folder, step, tensors(step), {})
    newest = folder / "step-00000002"
    victim = data.draw(st.sampled_from(sorted(newest.iterdir())))
    content = bytearray(victim.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    victim.write_bytes(content)
    try:
        check(newest)
    except InputError as error:
        assert str(newest) in str(error)
        found, passed = find("latest", folder)
        assert found is not None and found.step == 1 and passed == [str(error)]
        with pytest.raises(InputError):
            find(str(newest), folder)
    else:  # only white space of the manifest can change without being noticed
        assert victim.name == MANIFEST
        assert json.loads(content) == json.loads((folder / "step-00000002" / MANIFEST).read_text())
    for path in folder.iterdir():
        (path / "state.json").write_text("{}")
    with pytest.raises(InputError, match="no checkpoint is whole: .*step-00000002.*step-00000001"):
        find("latest", folder)


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json", MANIFEST])
def test_a_file_cut_at_any_tenth_is_named_and_the_older_checkpoint_taken(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        publish(tmp_path, step, tensors(step), {"pad": "x" * 99})
    victim = tmp_path / "step-00000002" / name
    whole = victim.read_bytes()
    for tenth in range(10):
        victim.write_bytes(whole[: len(whole) * tenth // 10])
        found, passed = find("latest", tmp_path)
        assert found is not None and found.step == 1 and len(passed) == 1 and name in passed[0]
    victim.unlink()
    os.mkfifo(victim)  # nobody waits for it
    found, passed = find("latest", tmp_path)
    assert found is not None and found.step == 1 and name in passed[0]


def test_left_overs_of_killed_writers_never_block_a_run(tmp_path: Path) -> None:
    """Of any kind: files, empty or not, folders, their locks, what was being removed; those of the living stay."""
    publish(tmp_path, 1, tensors(1), {})
    with files.workspace(tmp_path) as living:
        (living / "file").touch()
        for name in (".writing-best.json", ".writing-ended.json", ".writing-77-abc.lock", ".removing-export"):
            (tmp_path / name).touch()
        for name in (".writing-export", ".writing-step-00000002-77", ".removing-step-00000001"):
            (tmp_path / name / "inside").mkdir(parents=True)
            (tmp_path / name / ".tmpAbC").touch()
        files.sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", living.name, f"{living.name}.lock"}
        assert (living / "file").is_file()
    files.sweep(tmp_path / "not there")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@contextmanager
def limit_of_files(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the kernel answers as a quota does (EFBIG; Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Retention(RuleBasedStateMachine):
    """Saves that succeed or meet a full disk, best steps, runs that go back, killed removals; the model is the set of
    steps that must be there, whole, after each."""

    def __init__(self) -> None:
        super().__init__()
        self.run = Path(tempfile.mkdtemp())
        self.folder = self.run / "checkpoints"
        self.steps: list[int] = []
        self.best: int | None = None
        self.last = 0

    def teardown(self) -> None:
        shutil.rmtree(self.run)

    @rule(gap=st.integers(1, 3), keep=st.integers(2, 3))
    def saves(self, gap: int, keep: int) -> None:
        self.last += gap
        publish(self.folder, self.last, tensors(self.last), {})
        prune(self.folder, keep)
        steps = [*self.steps, self.last]
        self.steps = sorted({*steps[-keep:], *({self.best} & set(steps) if self.best else set())})

    @rule(size=st.sampled_from([50, 200, 400]))
    def meets_a_full_disk(self, size: int) -> None:
        with limit_of_files(size), pytest.raises(InputError, match="cannot write the checkpoint"):
            publish(self.folder, self.last + 1, tensors(1), {})

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def marks_the_best(self, data: st.DataObject) -> None:
        self.best = data.draw(st.sampled_from([*self.steps, None]))
        files.write_json(self.run / "best.json", {"step": self.best})

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def goes_back(self, data: st.DataObject) -> None:
        self.last = data.draw(st.sampled_from(self.steps))
        checkpoint.set_aside(self.folder, above=self.last)
        self.steps = [step for step in self.steps if step <= self.last]

    @precondition(lambda self: self.folder.is_dir())
    @rule()
    def is_killed_while_it_removes(self) -> None:
        (self.folder / f".removing-{checkpoint.folder_name(self.last)}").mkdir(exist_ok=True)
        (self.folder / ".writing-step-00000009").touch()
        files.sweep(self.folder)

    @invariant()
    def all_that_must_be_there_is_there_and_whole(self) -> None:
        present = checkpoint.checkpoints(self.folder)
        assert [int(path.name[-8:]) for path in present] == self.steps
        for path in present:
            check(path)
        found, passed = find("latest", self.folder)
        assert not passed and (found.step if found else None) == (self.steps[-1] if self.steps else None)


TestRetention = Retention.TestCase
TestRetention.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)


def test_retention_keeps_the_newest_and_never_looks_at_clocks(tmp_path: Path) -> None:
    for step in (3, 20, 100):
        os.utime(publish(tmp_path, step, tensors(step), {}), (1e9 - step, 1e9 - step))  # dates in reverse
    prune(tmp_path, 2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000020", "step-00000100"]
    publish(tmp_path, 100, tensors(7), {"again": True})  # a step that a resumed run reaches again
    found, _ = find("latest", tmp_path)
    assert found is not None and found.state["again"]


def test_retention_keeps_the_best_step_beside_the_newest(tmp_path: Path) -> None:
    """As long as best.json names it; a file that cannot be read, or names none, protects nothing."""
    folder, best = tmp_path / "checkpoints", tmp_path / "best.json"

    def left() -> list[int]:
        prune(folder, 2)
        return [int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(folder)]

    for step in (1, 2, 3, 4, 5):
        publish(folder, step, tensors(step), {})
    best.write_text('{"step": 2}')
    assert left() == [2, 4, 5] == left()
    best.write_text('{"step": 4}')
    assert left() == [4, 5]
    publish(folder, 6, tensors(6), {})
    assert left() == [4, 5, 6]
    for damaged in (b'{"step": 4', b"[4]", b'{"step": null}', b'{"step": "4"}', b'{"rule": ""}', b"\xff", b"4"):
        publish(folder, 4, tensors(4), {})
        best.write_bytes(damaged)
        assert left() == [5, 6], damaged


def test_a_run_that_goes_back_keeps_what_it_went_back_to(tmp_path: Path) -> None:
    """The abandoned branch must not outlive, in the place of, what is saved after the step that was gone back to."""
    for step in (100, 200, 300):
        publish(tmp_path, step, tensors(float(step)), {})
    moved = checkpoint.set_aside(tmp_path, above=100)
    assert [path.relative_to(tmp_path).as_posix() for path in moved] == [
        "abandoned/step-00000200",
        "abandoned/step-00000300",
    ]
    for step in (120, 150):
        publish(tmp_path, step, tensors(float(step)), {})
        prune(tmp_path, 2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000120", "step-00000150"]
    publish(tmp_path, 200, tensors(1.0), {})
    checkpoint.set_aside(tmp_path, above=150)  # the same step abandoned twice
    found, _ = find("latest", tmp_path)
    assert found is not None and found.step == 150


def test_a_new_folder_takes_the_place_of_an_older_one_and_survives_leftovers(tmp_path: Path) -> None:
    for name in ("export", ".removing-export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with files.whole_folder(tmp_path / "export", replace=True) as writing:
        (writing / "file").write_text("new")
        assert (tmp_path / "export" / "file").read_text() == "export"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export" / "file").read_text() == "new"


@pytest.mark.parametrize("full_at", ["trainable.safetensors", "optimizer.safetensors", "state.json", MANIFEST])
def test_a_disk_that_fills_at_any_file_of_a_save_leaves_the_earlier_checkpoint(tmp_path: Path, full_at: str) -> None:
    """The largest file is the one that no longer fits."""
    publish(tmp_path, 1, tensors(1), {})
    sizes = {"trainable.safetensors": 1, "optimizer.safetensors": 1, "state.json": 0} | {full_at: 3000}
    content = {name: {"a": torch.zeros(count)} for name, count in sizes.items() if name.endswith(".safetensors")}
    limit = 350 if full_at == MANIFEST else 5000
    with limit_of_files(limit), pytest.raises(InputError) as caught:
        publish(tmp_path, 2, content, {"pad": "x" * 3 * sizes["state.json"]})
    said = f"step-00000002: cannot write the checkpoint .*it needs [0-9,]+ bytes.*{checkpoint.KEPT}"
    assert re.search(said, str(caught.value)), str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    check(tmp_path / "step-00000001")


def test_no_room_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, 1, tensors(1), {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(InputError, match=r"a checkpoint needs 66,500 bytes and 1,000 are free; .* are untouched"):
        publish(tmp_path, 2, tensors(2.0), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.usefixtures("forge")
def test_a_second_trainer_is_refused_by_name(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        program = (
            "import sys; from pathlib import Path; from ztrain.weights.checkpoint import run_lock\n"
            "with run_lock(Path(sys.argv[1])): pass"
        )
        failed = the_forge().run(["-c", program, str(tmp_path)], dict(os.environ))
        assert failed.returncode == 1
        assert f"process {os.getpid()} on {os.uname().nodename} is training into this folder" in failed.stderr
    with run_lock(tmp_path):
        pass


# ---- what may change on resume


CONFIG = load_config([ROOT / "configs" / "siglip_lora.yaml", ROOT / "configs" / "tiny.yaml"])
LISTS = [["siglip", "lora"], ["splice", "lora"], ["projector"]]
EACH_LIST = [Config.model_validate(CONFIG.model_dump() | {"adapters": [{"kind": k} for k in kinds]}) for kinds in LISTS]


def leaves(config: Config = CONFIG) -> list[str]:
    return sorted(checkpoint.leaves_of(config.model_dump(mode="json")))


def set_leaf(document: Any, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        document = document[int(name)] if isinstance(document, list) else document[name]
    document[int(last) if isinstance(document, list) else last] = value


def is_free(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in checkpoint.FREE_ON_RESUME)


def fields_of(kind: Any, prefix: str) -> list[str]:
    """Every key of a model and of what is inside it; of a list of adapters those of all kinds."""
    keys = []
    for name, field in kind.model_fields.items():
        inside = [each for member in members(field.annotation) for each in (member, *enter(member, 0))]
        keys += [key for each in inside if is_model(each) for key in fields_of(each, f"{prefix}{name}.")] or [
            prefix + name
        ]
    return keys


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_changes_on_resume_is_either_free_or_refused_with_a_diff(data: st.DataObject) -> None:
    """Any of the settings of any list, to anything else."""
    config = data.draw(st.sampled_from(EACH_LIST))
    changed = data.draw(st.sets(st.sampled_from(leaves(config)), min_size=1))
    now, before, told = checkpoint.leaves_of(config.model_dump(mode="json")), config.model_dump(mode="json"), []
    for key in sorted(changed):
        was = data.draw(st.none() | st.booleans() | st.integers(2, 9) | st.sampled_from(["on", "another value"]))
        set_leaf(before, key, was)
        if not is_free(key) and was != now[key]:
            told.append(f"{key}: {json.dumps(was)} -> {json.dumps(now[key])}")
    assert frozen_differences(before, config) == told


def test_no_key_is_forgotten_on_resume() -> None:
    """Each key of each section and of each kind of adapter, alone, is refused unless it is free."""
    seen = set()
    for config in EACH_LIST:
        document = config.model_dump(mode="json")
        for key in leaves(config):
            before = copy.deepcopy(document)
            set_leaf(before, key, "another value")
            assert bool(frozen_differences(before, config)) == (not is_free(key)), key
            seen.add(re.sub(r"^adapters\.\d+", "adapters", key))
    assert {key for key in fields_of(Config, "") if not is_free(key)} <= seen


def test_the_home_folder_of_an_earlier_run_is_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    splice = {"kind": "splice", "statistics_file": "~/stats.safetensors", "scaling": "global"}
    config = Config.model_validate(CONFIG.model_dump() | {"adapters": [splice]})
    before = config.model_dump(mode="json")
    assert before["adapters"][0]["statistics_file"] == "~/stats.safetensors"
    before["adapters"][0]["statistics_file"] = "/home/somebody/stats.safetensors"  # as it was written before
    assert frozen_differences(before, config) == []


def test_free_settings_exist_and_the_end_is_frozen_where_the_schedule_needs_it() -> None:
    assert all(any(key == name or key.startswith(f"{name}.") for key in leaves()) for name in checkpoint.FREE_ON_RESUME)
    cosine = {"lr_scheduler": "cosine"}
    longer = Config.model_validate(
        CONFIG.model_dump() | {"train": CONFIG.train.model_dump() | cosine | {"max_train_steps": 9}}
    )
    before = Config.model_validate(CONFIG.model_dump() | {"train": CONFIG.train.model_dump() | cosine})
    assert frozen_differences(before.model_dump(mode="json"), longer) == ["train.max_train_steps: 50 -> 9"]


def test_a_key_that_a_run_began_without_counts_as_its_default() -> None:
    """Earlier runs go on; a value other than the default is still a difference, and so is a default that would change
    what they did."""
    before = CONFIG.model_dump(mode="json")
    for section in ("judges", "sweep"):
        del before[section]
    del before["encoders"]["text_hidden_index"], before["models"]["transformer_file"], before["sample"]["scales"]
    del before["train"]["ema_decay"], before["adapters"][1]["dropout"], before["flow"]
    assert CONFIG.adapters[1].kind == "lora" and frozen_differences(before, CONFIG) == []
    now = CONFIG.model_dump()
    now["encoders"]["text_hidden_index"], now["train"]["ema_decay"], now["flow"]["loss_weight"] = 3, 0.5, "bump"
    now["adapters"][1]["dropout"], now["judges"]["truth"] = 0.25, "somewhere"
    assert frozen_differences(before, Config.model_validate(now)) == [
        "adapters.1.dropout: 0.0 -> 0.25",
        "encoders.text_hidden_index: null -> 3",
        'flow.loss_weight: "none" -> "bump"',
        "train.ema_decay: 0.0 -> 0.5",
    ]
    del before["train"]["group_by_tokens"]
    assert frozen_differences(before, CONFIG) == ["train.group_by_tokens: false -> true"]
    now = CONFIG.model_dump()
    now["train"]["group_by_tokens"] = False
    assert frozen_differences(before, Config.model_validate(now)) == []
    del before["adapters"][1]["kind"], before["adapters"][0]
    assert any(words.startswith("adapters.1.kind: null") for words in frozen_differences(before, CONFIG))


# ---- the optimizer


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_an_optimizer_goes_on_exactly_where_it_was(tmp_path: Path, name: str) -> None:
    if name == "adamw_8bit":
        kind = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").optim.AdamW8bit
    else:
        kind = torch.optim.AdamW
    start = [torch.randn(80, 80), torch.randn(7)]  # 8-bit states begin at 4096 elements

    def fresh() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        parameters = [nn.Parameter(tensor.clone()) for tensor in start]
        return parameters, kind(parameters, lr=1e-2, betas=(0.8, 0.95))

    whole, optimizer = fresh()
    steps(optimizer, whole, 3, seed=1)
    kept, rest = checkpoint.optimizer_tensors(optimizer.state_dict()["state"], ["x.weight", "y"])
    publish(tmp_path, 3, {"optimizer.safetensors": kept}, {"optimizer": rest})
    resumed, other = fresh()
    with torch.no_grad():
        for mine, theirs in zip(resumed, whole, strict=True):
            mine.copy_(theirs)
    found, _ = find("latest", tmp_path)
    assert found is not None
    kept = found.tensors["optimizer.safetensors"]
    stored = checkpoint.optimizer_state(["x.weight", "y"], kept, found.state["optimizer"])
    other.load_state_dict({"state": stored, "param_groups": other.state_dict()["param_groups"]})
    steps(optimizer, whole, 3, seed=2)
    steps(other, resumed, 3, seed=2)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed, whole, strict=True))
    with pytest.raises(InputError, match="knows a weight"):
        checkpoint.optimizer_state(["x.weight", "z"], kept, found.state["optimizer"])
