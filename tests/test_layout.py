"""The floor plan, enforced: which room imports which, who owns a convention, what `import ztrain` may load.

A room is a module or package directly under ztrain/ (adapters/ and mini/ are one room each), its __init__.py,
or data_tools.
A new room or arrow is a change of the plan: add it to MAY_IMPORT on purpose, not to get past the test.
"""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ztrain.states import STATES

# fmt: off
MAY_IMPORT: dict[str, set[str]] = {  # and everybody may import errors and files
    "errors": set(),
    "files": set(),
    "interrupt": set(),
    "launched": {"config"},
    "terminal": {"interrupt"},
    "yamls": set(),
    "overrides": {"yamls"},
    "formats": set(),
    "images": {"formats"},
    "rows": {"images"},
    "forms": set(),
    "csvs": {"forms", "rows"},
    "tars": {"images", "rows"},
    "tables": {"images", "rows", "tars"},
    "data": {"rows", "tables", "tars"},
    "sampler": set(),
    "flow": {"conditioning"},
    "conditioning": set(),
    "adapters": {"conditioning", "quantised", "tensors", "yamls"},
    "config": {"adapters", "images", "overrides", "yamls"},
    "aspects": {"config", "images"},
    "quantised": set(),
    "tensors": set(),
    "models": {"config", "quantised", "tensors"},
    "vision_language": {"config", "models", "conditioning", "tensors"},
    "encoders": {"models", "vision_language"},
    "states": {"conditioning", "config", "digests", "encoders", "images", "models", "vision_language"},
    "storage": set(),
    "loras": {"block"},
    "product": set(),
    "block": {"product"},
    "blocks": {"block", "loras", "storage"},
    "compiling": {"blocks"},
    "graphs": {"block", "blocks"},
    "memory": {"block"},
    "layout": {"block", "blocks", "conditioning"},
    "dit": {"block", "blocks", "layout", "models", "quantised", "tensors"},
    "model": {"conditioning", "adapters", "blocks", "dit", "layout"},
    "sample": {"flow", "conditioning", "config", "models"},
    "export": {
        "config", "models", "conditioning", "adapters", "model", "encoders", "states", "sample", "flow",
        "tensors", "version", "images", "aspects", "yamls",
    },
    "privacy": {"models"},
    "tracking": {"config", "wandb_mirror"},
    "wandb_mirror": {"config", "privacy"},
    "store": set(),
    "digests": {"images", "store"},
    "cache": {"config", "digests", "models", "states", "store"},
    "fill": {"cache", "config", "digests", "images", "models", "states", "store"},
    "exchange": {"digests", "images"},
    "stopping": set(),
    "samples": {"cache", "config", "data", "digests", "exchange", "images", "layout", "rows", "sampler", "states"},
    "vigil": {"interrupt"},
    "together": {"interrupt"},
    "tokens": {
        "adapters", "cache", "conditioning", "config", "dit", "images", "layout", "samples", "states",
    },
    "limits": {"config"},
    "strategy": {"blocks", "config", "dit", "limits", "memory", "meter", "model", "together"},
    "cards": set(),
    "footprint": {"adapters", "config", "dit", "memory", "model", "models", "states"},
    "expected": {"block", "cards", "config", "footprint", "layout", "memory", "states"},
    "plan": {"adapters", "block", "cards", "config", "expected", "footprint", "limits", "memory"},
    "prepare": {"cache", "config", "fill", "launched", "samples", "together"},
    "resolve": {"adapters", "config", "yamls"},
    "optimizer": {"config", "model"},
    "batches": {"cache", "conditioning", "config", "flow", "resolve", "sampler", "samples", "states"},
    "checkpoint": {"adapters", "comparison", "config", "tensors", "yamls"},
    "meter": {"interrupt", "sampler", "version"},
    "validate": {
        "adapters", "batches", "cache", "conditioning", "config", "encoders", "flow", "grid", "images",
        "intervals", "model", "models", "sample", "sampler", "samples", "strategy",
        "drawn", "together",
    },
    "tune": {
        "batches", "block", "blocks", "cache", "compiling", "config", "dit", "flow", "graphs", "images", "memory",
        "model", "sampler", "samples", "strategy",
    },
    "run": {
        "adapters", "blocks", "cache", "checkpoint", "config", "dit", "encoders", "export", "meter", "model", "models",
        "batches", "flow", "optimizer", "origin", "prepare", "privacy", "resolve", "sample", "sampler", "samples",
        "scoring", "states", "stopping", "strategy", "together", "tracking", "tune", "validate", "yamls",
    },
    "train": {
        "batches", "config", "flow", "interrupt", "launched", "memory", "meter", "resolve", "run", "sampler", "stats",
        "supervise", "terminal", "together", "tokens",
    },
    "supervise": {"config", "interrupt", "launched", "strategy", "vigil"},
    "from_checkpoint": {"checkpoint", "config", "dit", "export", "models", "resolve", "run"},
    "origin": {"adapters", "checkpoint", "config", "export", "model", "models", "yamls"},
    "grid": set(),
    "intervals": {"yamls"},
    "features": {"encoders", "models", "tensors"},
    "comparison": {"intervals", "rows", "yamls"},
    "lineup": {
        "adapters", "comparison", "config", "data", "digests", "exchange", "export", "images", "rows", "sampler",
        "stats", "yamls",
    },
    "studio": {
        "adapters", "aspects", "cache", "conditioning", "config", "digests", "dit", "encoders", "exchange", "export",
        "drawn", "images", "lineup", "model", "models", "sample", "states",
    },
    "judging": {"comparison", "config", "exchange", "features", "images", "intervals", "metrics", "mini", "models"},
    "ranking": {"comparison", "intervals", "judging"},
    "scoring": {
        "comparison", "config", "digests", "images", "judging", "model", "ranking", "together", "validate",
    },
    "compare": {
        "aspects", "cache", "checkpoint", "comparison", "config", "digests", "export", "from_checkpoint", "grid",
        "drawn", "exchange", "images", "intervals", "judging", "lineup", "models", "privacy", "ranking", "rows",
        "studio", "tars", "version", "yamls",
    },
    "sweep": {"compare", "comparison", "config", "lineup", "privacy", "yamls"},
    "pages": {"images"},
    "drawn": set(),
    "report": {
        "comparison", "drawn", "images", "intervals", "pages", "privacy", "rows", "sampler", "version", "yamls",
    },
    "render": {
        "adapters", "aspects", "blocks", "conditioning", "config", "dit", "drawn", "encoders", "export", "grid",
        "images", "model", "models", "sample", "states", "stats", "version",
    },
    "stats": {"config", "models", "data", "images", "states", "adapters", "tensors"},
    "cli": {
        "cards", "compare", "config", "from_checkpoint", "interrupt", "mini", "plan", "prepare", "render",
        "report", "stats", "sweep", "terminal", "train", "yamls",
    },
    "demo": {"adapters", "config", "drawn", "grid", "images", "interrupt", "mini", "terminal"},
    "mini": {
        "adapters", "cache", "compiling", "conditioning", "config", "csvs", "dit", "drawn", "encoders", "exchange",
        "flow", "forms", "grid", "images", "intervals", "lineup", "metrics", "model", "models", "rows", "sample",
        "studio", "tensors", "terminal", "vision_language",
    },
    "data_tools": {
        "csvs", "data", "encoders", "features", "forms", "images", "interrupt", "models", "pages", "rows", "tars",
        "layout", "overrides", "tensors", "terminal", "yamls",
    },
    "ztrain/__init__": {"export", "version"},
    "metrics": set(),
    "version": set(),
}
# fmt: on
# The only rooms with 1000 and 1 - sigma in them; metrics knows no sigma, its 1000s are KID's subsets and CMMD's scale.
OWNS_TIMESTEPS = {"flow", "dit", "model", "metrics"}
OWNS_KINDS = {"adapters"}  # the only room that asks an adapter for its kind
OWNS_STATES = {"adapters", "states", "mini"}  # the only rooms that name an encoded state; mini trains their models
STATE_NAMES = {*STATES, "omni"}
SAME_WORDS = {  # and rooms where the word is another's: a column or heading, a judge, a guidance, AdamW's kernel
    "reference": {"compare", "config", "demo", "sample", "tables", "validate"},
    "siglip": {"demo", "features", "judging"},
    "fused": {"train"},
}
HEAVY = {"accelerate", "datasets", "diffusers", "peft", "transformers", "wandb", "webdataset"}

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Of a module's syntax tree."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def sources(root: Path) -> Iterator[tuple[str, str, tuple[ast.AST, ...]]]:
    """Yields (room, path relative to root, nodes of the syntax tree) of every module of both packages."""
    for package in ("ztrain", "data_tools"):
        for path in sorted((root / package).rglob("*.py")):
            inside = path.relative_to(root / package)
            if package == "data_tools":
                room = "data_tools"
            elif inside == Path("__init__.py"):
                room = "ztrain/__init__"
            else:
                room = inside.parts[0].removesuffix(".py")
            yield room, path.relative_to(root).as_posix(), nodes(path)


def imported_rooms(node: ast.AST) -> set[str]:
    """The rooms that one statement or call imports; `from ztrain import flow` imports the room flow."""
    names: list[str] = []
    match node:
        case ast.Import(names=aliases):
            names = [alias.name for alias in aliases]
        case ast.ImportFrom(module=str(module), level=0, names=aliases):
            of_package = [alias.name for alias in aliases if module == "ztrain" and alias.name in MAY_IMPORT]
            names = [f"ztrain.{name}" for name in of_package] or [module]
            if 0 < len(of_package) < len(aliases):
                names.append(module)
        case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
            if re.search(r"\b(import_module|__import__)$", ast.unparse(function)):
                names = [name]
    rooms = set()
    for name in names:
        package, _, rest = name.partition(".")
        if package == "data_tools":
            rooms.add("data_tools")
        elif package == "ztrain":
            rooms.add(rest.partition(".")[0] or "ztrain/__init__")
    return rooms


def illegal_arrows(root: Path) -> list[str]:
    """One sentence with file and line for every import that the plan does not know."""
    wrong = []
    for room, path, tree in sources(root):
        if room not in MAY_IMPORT:
            wrong.append(f"{path}: the room {room!r} is not in MAY_IMPORT; add it to the plan")
            continue
        allowed = MAY_IMPORT[room] | {room, "errors", "files"}
        for node in tree:
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                wrong.append(f"{path}:{node.lineno}: relative import; write it from ztrain or data_tools")
            for target in sorted(imported_rooms(node) - allowed):
                wrong.append(f"{path}:{getattr(node, 'lineno', 0)}: {room} -> {target} is not in the plan")
    return wrong


def called(node: ast.AST) -> str:
    """The last name of an expression: `adapter` for self.adapter, adapter[0] and adapter.to(x)."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(value=inner) | ast.Call(func=ast.Attribute(value=inner)):
            return called(inner)
    return ""


def breaks_timesteps(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value == 1000
        case ast.BinOp(left=ast.Constant(value=1), op=ast.Sub(), right=right):
            return "sigma" in called(right)
    return False


def breaks_kinds(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="isinstance"), args=[subject, _]):
            return re.search(r"(^|_)adapters?$", called(subject)) is not None
        case ast.Compare(left=left, comparators=comparators):
            return any(isinstance(side, ast.Attribute) and side.attr == "kind" for side in (left, *comparators))
        case ast.Match(subject=ast.Attribute(attr="kind")):
            return True
    return False


def breaks_states(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in STATE_NAMES


def trespasses(root: Path) -> list[str]:
    """One sentence with file and line for every convention found outside the rooms that own it."""
    wrong = []
    rules: list[tuple[set[str], Callable[[ast.AST], bool]]] = [
        (OWNS_TIMESTEPS, breaks_timesteps),
        (OWNS_KINDS, breaks_kinds),
        (OWNS_STATES, breaks_states),
    ]
    for room, path, tree in sources(root):
        for owners, breaks in rules:
            if room == "data_tools" or room in owners:  # data_tools knows neither sigma nor adapters
                continue
            for node in tree:
                if breaks(node) and room not in SAME_WORDS.get(getattr(node, "value", ""), ()):
                    where = f"{path}:{getattr(node, 'lineno', 0)}"
                    wrong.append(f"{where}: {ast.unparse(node)!r} belongs to {', '.join(sorted(owners))}")
    return wrong


def broad_excepts(root: Path) -> list[str]:
    """`path: what the handler says` of every handler that catches whatever comes."""
    return [
        f"{path}: {ast.unparse(node).splitlines()[0]}"
        for _, path, tree in sources(root)
        for node in tree
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or re.search(r"\b(Base)?Exception\b", ast.unparse(node.type)))
    ]


def renames(root: Path) -> list[str]:
    """`path: call` of whatever gives a file or folder its final name outside of files.py."""
    found = []
    for room, path, tree in sources(root):
        for node in tree if room != "files" else ():
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="rename" | "replace" | "link")):
                    pass
                case ast.Call(func=ast.Attribute(value=ast.Name(id="shutil"), attr="move" | "copytree" | "copy2")):
                    pass
                case ast.Call(func=ast.Attribute(attr="rename"), args=[_]):
                    pass
                case ast.Call(func=ast.Attribute(attr="replace"), args=[_]):  # of text, it takes two
                    pass
                case _:
                    continue
            found.append(f"{path}: {ast.unparse(node)}")
    return found


def tree_with(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_imports_go_one_way() -> None:
    assert list(sources(ROOT)), "no modules found: the test looks in the wrong place"
    assert not (wrong := illegal_arrows(ROOT)), "\n" + "\n".join(wrong)


def test_the_plan_has_no_cycles_and_no_dangling_rooms() -> None:
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()
    assert set().union(*MAY_IMPORT.values()) <= set(MAY_IMPORT)


def test_conventions_stay_with_their_owners() -> None:
    assert not (wrong := trespasses(ROOT)), "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("ztrain/flow.py", "import torch\nimport ztrain.model", "ztrain/flow.py:2: flow -> model"),
        ("ztrain/flow.py", "import ztrain.errors, ztrain.model as m", "ztrain/flow.py:1: flow -> model"),
        ("ztrain/data.py", "def f():\n    from ztrain.train import main", "ztrain/data.py:2: data -> train"),
        ("ztrain/config.py", "from ztrain import adapters, train", "ztrain/config.py:1: config -> train"),
        ("ztrain/config.py", "from ztrain import load", "ztrain/config.py:1: config -> ztrain/__init__"),
        ("ztrain/config.py", "from ztrain import adapters, load", "config -> ztrain/__init__"),
        (
            "ztrain/adapters/lora.py",
            "from ztrain.config import C",
            "ztrain/adapters/lora.py:1: adapters -> config",
        ),
        ("ztrain/mini/a/b.py", "import ztrain.train", "ztrain/mini/a/b.py:1: mini -> train"),
        ("ztrain/train.py", "import data_tools.scan", "ztrain/train.py:1: train -> data_tools"),
        ("ztrain/dit.py", "import importlib\nimportlib.import_module('ztrain.cli')", "dit.py:2: dit -> cli"),
        (
            "data_tools/scan.py",
            "from ztrain.flow import interpolate",
            "data_tools/scan.py:1: data_tools -> flow",
        ),
        ("ztrain/__init__.py", "import ztrain.train", "ztrain/__init__.py:1: ztrain/__init__ -> train"),
        ("ztrain/flow.py", "from . import errors", "ztrain/flow.py:1: relative import"),
        (
            "ztrain/adapters/lora.py",
            "from .base import Adapter",
            "ztrain/adapters/lora.py:1: relative import",
        ),
        ("ztrain/utils.py", "", "ztrain/utils.py: the room 'utils' is not in MAY_IMPORT; add it to the plan"),
    ],
)
def test_the_guard_names_an_illegal_arrow(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    [wrong] = illegal_arrows(tree_with(tmp_path, {name: text}))
    assert complaint in wrong


def test_the_guard_accepts_legal_arrows(tmp_path: Path) -> None:
    files = {
        "ztrain/__init__.py": "def __getattr__(name):\n    from ztrain.export import load_adapter",
        "ztrain/model.py": "import torch, ztrain.dit\nfrom ztrain import adapters, errors",
        "ztrain/adapters/lora.py": "from ztrain.adapters.base import A\nfrom ztrain.errors import InputError",
        "data_tools/scan.py": "from data_tools import pair\nfrom ztrain.data import Triplet",
    }
    assert illegal_arrows(tree_with(tmp_path, files)) == []


def test_nothing_is_mended_by_catching_whatever_comes() -> None:
    """The two: a signal's, behind a collective that others have left, and `ended.json`, which is written whatever
    comes and raises on."""
    assert sorted(broad_excepts(ROOT)) == [
        "ztrain/interrupt.py: except BaseException as error:",
        "ztrain/interrupt.py: except Exception:",
    ]


def test_files_get_their_final_names_in_one_module() -> None:
    assert sorted(renames(ROOT)) == [
        "data_tools/layouts.py: os.link(source.resolve(), place)",  # into a folder that is still built
        "ztrain/checkpoint.py: os.rename(path, place)",  # a whole checkpoint is set aside
    ]


@pytest.mark.parametrize("call", ["os.replace(a, b)", "a.rename(b)", "scratch.replace(b)", "shutil.move(a, b)"])
def test_the_guard_finds_a_rename(tmp_path: Path, call: str) -> None:
    files = {"ztrain/run.py": f"text.replace('a', 'b')\n{call}", "ztrain/files.py": call}
    assert renames(tree_with(tmp_path, files)) == [f"ztrain/run.py: {call}"]


@pytest.mark.parametrize("caught", ["", " Exception", " (OSError, Exception) as error", " BaseException"])
def test_the_guard_finds_a_broad_except(tmp_path: Path, caught: str) -> None:
    text = f"try:\n    pass\nexcept{caught}:\n    pass\ntry:\n    pass\nexcept OSError:\n    pass\n"
    assert len(broad_excepts(tree_with(tmp_path, {"data_tools/scan.py": text}))) == 1


@pytest.mark.parametrize(
    ("owner", "text"),
    [
        *[("flow", text) for text in ("t = 1000 * s", "t = 1e3", "t = 1 - sigma", "t = 1.0 - self.sigmas[:, None]")],
        ("adapters", "isinstance(adapter, Lora)"),
        ("adapters", "isinstance(self.adapters[0], (A, B))"),
        ("adapters", "x.kind == 'lora'"),
        ("adapters", "'lora' != config.adapter.kind"),
        ("adapters", "match x.kind:\n    case 'lora': pass"),
        *[("states", text) for text in ("'siglip' in reads", "reads & {'reference'}", "x = ['fused']")],
    ],
)
def test_the_guard_finds_a_convention_outside_its_owners(tmp_path: Path, owner: str, text: str) -> None:
    others = '"""Never 0..1000, never 1 - sigma, siglip."""\nx = 1 - beta\nisinstance(path, str)\n'
    files = {"ztrain/run.py": others + text, f"ztrain/{owner}.py": text, "data_tools/pack.py": text}
    [wrong] = trespasses(tree_with(tmp_path, files))
    assert wrong.startswith("ztrain/run.py:4: ") and owner in wrong


@pytest.mark.parametrize("module", ["ztrain", "ztrain.config"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    if module != "ztrain" and not (ROOT / module.replace(".", "/")).with_suffix(".py").exists():
        pytest.skip(f"{module} is not written yet")
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (loaded := HEAVY & set(done.stdout.split())), f"import {module} loads {', '.join(sorted(loaded))}"
