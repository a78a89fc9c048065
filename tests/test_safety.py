"""Nothing that comes with foreign data runs: the doors to loaders are few, and behind them no repository's code is.

The walk over the syntax trees finds what the other tests would have to be lucky to try.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layout import nodes, tree_with

ROOT = Path(__file__).resolve().parent.parent

# fmt: off
DOORS = {  # who may call what loads foreign files
    "from_pretrained": {"ztrain/frozen/sources.py"},
    "from_single_file": {"ztrain/model/dit.py"},  # weights in memory, beside a config that was read
    "load_config": set(),  # of diffusers; ztrain.config's is a function
    "download": {"ztrain/frozen/sources.py"},
    "hf_hub_download": {"ztrain/frozen/sources.py"},
    "snapshot_download": {"ztrain/frozen/sources.py", "data_tools/sources.py"},
    "load_dataset": {"ztrain/data/tables.py"}, "load_dataset_builder": set(), "load_from_disk": set(),
    "load_lora_weights": {"data_tools/diffusion.py"},  # with use_safetensors=True, see below
    "get_class_from_dynamic_module": set(), "load_state_dict_from_url": set(), "load_ip_adapter": set(),
    "load_textual_inversion": set(), "extractall": set(), "read_pickle": set(), "system": set(), "popen": set(),
    "unsafe_load": set(), "full_load": set(), "unpack_archive": set(), "get_kernel": set(),
}
OF_MODULES = {  # the same, where only the module makes the name a door
    "torch.load": set(), "torch.jit.load": set(), "torch.hub.load": set(), "torch.package": set(),
    "yaml.load": {"ztrain/io/yamls.py"}, "yaml.load_all": set(), "joblib.load": set(),
}
LAST = {name.rsplit(".")[-1] for name in OF_MODULES}
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "code", "runpy"}
RUNS_OUR_OWN = ("ztrain/interrupt.py", "runpy")  # a module of ours, in a child that ends with its parent
BUILTINS = {"eval", "exec", "compile", "__import__"}
MUST_BE = {  # keywords that have one right value
    "trust_remote_code": False, "use_safetensors": True, "weights_only": True, "allow_pickle": False, "shell": False,
}
NEEDS = {  # calls that must say so: whose, and which keyword
    "load_lora_weights": (".*", "use_safetensors"), "load": ("np|numpy", "allow_pickle"),
    "from_config": (r"(.*\.)?Auto(?!encoder)\w+", "trust_remote_code"),
}
# fmt: on


def doors(root: Path) -> Iterator[str]:
    """A sentence with file and line for everything that could run what foreign files hold."""
    for package in ("ztrain", "data_tools", "miniature", "benchmarks"):
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            for node in nodes(path):
                for said in complaints(node, name):
                    yield f"{name}:{getattr(node, 'lineno', 0)}: {said}"


def complaints(node: ast.AST, file: str) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            found = [each.name for each in names if each.name.split(".")[0] in MODULES]
            yield from (f"imports {name}" for name in found if (file, name) != RUNS_OUR_OWN)
        case ast.ImportFrom(module=str(module), names=names):
            if module.split(".")[0] in MODULES:
                yield f"imports {module}"
            yield from (f"{each.name} under another name" for each in names if each.asname and each.name in DOORS)
        case ast.Constant(value=str(text)) if "_" in text:  # for getattr or a dictionary of keywords
            if file not in DOORS.get(text, {"ztrain/frozen/sources.py"} if text in MUST_BE else {file}):
                yield f"{text!r} as a text"
        case ast.Name(id=name, ctx=ast.Load()) if name in BUILTINS:
            yield name
        case ast.Attribute(attr=name) if name in DOORS or name in LAST:
            text = ast.unparse(node)
            if file not in DOORS.get(name, {file}) or file not in OF_MODULES.get(text, {file}):
                yield text
        case ast.Call(func=ast.Name(id=name)) if name != "load_config" and file not in DOORS.get(name, {file}):
            yield name
        case ast.Call(func=ast.Attribute(value=owner, attr=name), keywords=keywords) if name in NEEDS:
            of, key = NEEDS[name]
            if re.fullmatch(of, ast.unparse(owner)) and key not in [each.arg for each in keywords]:
                yield f"{ast.unparse(owner)}.{name} without {key}={MUST_BE[key]}"
        case ast.keyword(arg=str(key), value=value) if key in MUST_BE and ast.unparse(value) != str(MUST_BE[key]):
            yield f"{key}={ast.unparse(value)}"


def test_no_other_door_leads_to_foreign_files() -> None:
    assert not (wrong := list(doors(ROOT))), "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("AutoModel.from_pretrained(place)", "AutoModel.from_pretrained"),
        ("load = diffusers.DiffusionPipeline.from_pretrained", "DiffusionPipeline.from_pretrained"),
        ("getattr(kind, 'from_pretrained')(place)", "'from_pretrained' as a text"),
        ("from huggingface_hub import snapshot_download\nsnapshot_download(x)", "snapshot_download"),
        ("from huggingface_hub import snapshot_download as get", "snapshot_download under another name"),
        ("datasets.load_dataset(name)", "datasets.load_dataset"),
        ("pretrained(kind, place, trust_remote_code=True)", "trust_remote_code=True"),
        ("pretrained(kind, place, trust_remote_code=asked)", "trust_remote_code=asked"),
        ("pretrained(kind, place, **{'trust_remote_code': True})", "'trust_remote_code' as a text"),
        ("pretrained(kind, place, use_safetensors=False)", "use_safetensors=False"),
        ("AutoModel.from_config(config)", "without trust_remote_code=False"),
        ("import pickle", "imports pickle"),
        ("from pickle import loads", "imports pickle"),
        ("torch.load(path)", "torch.load"),
        ("np.load(path)", "np.load without allow_pickle=False"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load"),
        ("eval(text)", "eval"),
        ("os.system(text)", "os.system"),
        ("subprocess.run(text, shell=True)", "shell=True"),
        ("tar.extractall(place)", "tar.extractall"),
        ("pipe.load_lora_weights(place)", "pipe.load_lora_weights"),
    ],
)
def test_the_walk_finds_a_planted_door(tmp_path: Path, text: str, complaint: str) -> None:
    found = list(doors(tree_with(tmp_path, {"data_tools/new.py": f"x = 1\n{text}"})))
    assert found and found[-1].startswith("data_tools/new.py:") and any(complaint in each for each in found), found


def test_the_walk_accepts_what_is_safe(tmp_path: Path) -> None:
    safe = ["model.eval()", "load_config(files)", "np.load(p, allow_pickle=False)", "LLM(trust_remote_code=False)",
            "re.compile(x)", "compile: bool = True", "DiT.from_config(s)", "AutoencoderKL.from_config(s)"]  # fmt: skip
    assert not list(doors(tree_with(tmp_path, {"ztrain/new.py": "\n".join(safe)})))
