"""The floor plan, enforced: which room imports which, who owns a convention, what `import ztrain` may load.

A room is a folder or a module directly under ztrain/, or one of the sibling packages data_tools and miniature. A new
room or arrow is a change of the plan: add it to MAY_IMPORT on purpose, not to get past the test.
"""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ztrain.frozen.states import STATES

# fmt: off
MAY_IMPORT: dict[str, set[str]] = {  # from the ground up; everybody may import errors and io
    "errors": set(),
    "io": set(),
    "version": set(),
    "conditioning": set(),
    "interrupt": set(),
    "terminal": {"interrupt"},
    "images": set(),
    "pages": {"images"},
    "data": {"images"},
    "adapters": {"conditioning"},
    "config": {"adapters", "images"},
    "resolve": {"adapters", "config"},
    "frozen": {"adapters", "conditioning", "config", "data", "images"},
    "privacy": {"frozen"},
    "metrics": {"frozen"},
    "model": {"adapters", "conditioning", "config", "frozen"},
    "distributed": {"config", "interrupt", "model"},
    "plan": {"adapters", "config", "distributed", "frozen", "model"},
    "cache": {"adapters", "conditioning", "config", "data", "distributed", "frozen", "images", "model", "resolve"},
    "weights": {"adapters", "conditioning", "config", "frozen", "images", "model", "resolve", "version"},
    "sampling": {"adapters", "conditioning", "config", "frozen", "images", "model", "version", "weights"},
    "compare": {
        "adapters", "cache", "conditioning", "config", "data", "frozen", "images", "metrics", "model", "pages",
        "privacy", "sampling", "version", "weights",
    },
    "train": {
        "adapters", "cache", "compare", "conditioning", "config", "distributed", "frozen", "images", "interrupt",
        "data", "metrics", "miniature", "model", "privacy", "resolve", "sampling", "terminal", "version", "weights",
    },
    "data_tools": {"data", "frozen", "images", "interrupt", "metrics", "model", "pages", "terminal"},
    "miniature": {
        "adapters", "cache", "compare", "conditioning", "config", "data", "frozen", "images", "metrics", "model",
        "sampling", "terminal", "weights",
    },
    "cli": {
        "cache", "compare", "config", "frozen", "interrupt", "miniature", "plan", "sampling", "terminal", "train",
        "weights",
    },
    "demo": {"adapters", "config", "images", "interrupt", "miniature", "sampling", "terminal"},
    "ztrain/__init__": {"sampling", "version"},
}
# fmt: on
# The only modules with 1000 and 1 - sigma in them; metrics knows no sigma: its 1000s are of KID and CMMD.
OWNS_TIMESTEPS = {
    "ztrain/model/flow.py",
    "ztrain/model/dit.py",
    "ztrain/model/adapted_dit.py",
    "ztrain/metrics/scores.py",
}
OWNS_KINDS = {"ztrain/adapters/"}  # the only folder that asks an adapter for its kind
# The only ones that name an encoded state; the miniature trains their models.
OWNS_STATES = {"ztrain/adapters/", "ztrain/frozen/states.py", "miniature/"}
STATE_NAMES = {*STATES, "omni"}
SAME_WORDS = {  # and where the word is another's: a column or heading, a judge, a guidance, AdamW's kernel
    "reference": {
        "ztrain/compare/command.py", "ztrain/config.py", "ztrain/data/tables.py", "ztrain/demo.py",
        "ztrain/model/sampler.py", "ztrain/train/validate.py",
    },
    "siglip": {"ztrain/compare/judging.py", "ztrain/demo.py", "ztrain/metrics/towers.py"},
    "fused": {"ztrain/distributed/strategy.py"},
}  # fmt: skip
HEAVY = {"accelerate", "datasets", "diffusers", "peft", "transformers", "wandb", "webdataset"}

PACKAGES = ("ztrain", "data_tools", "miniature")
ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Of a module's syntax tree."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def room_of(parts: Sequence[str]) -> str:
    """Of a module's path or dotted name in parts: the package, or what lies directly under ztrain."""
    if parts[0] != "ztrain":
        return parts[0]
    return parts[1].removesuffix(".py") if len(parts) > 1 and parts[1] != "__init__.py" else "ztrain/__init__"


def sources(root: Path) -> Iterator[tuple[str, str, tuple[ast.AST, ...]]]:
    """Yields (room, path relative to root, nodes of the syntax tree) of every module of the packages."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            inside = path.relative_to(root)
            yield room_of(inside.parts), inside.as_posix(), nodes(path)


def imported_rooms(node: ast.AST) -> set[str]:
    """The rooms that one statement or call imports; `from ztrain import model` imports the room model."""
    names: list[str] = []
    match node:
        case ast.Import(names=aliases):
            names = [alias.name for alias in aliases]
        case ast.ImportFrom(module="ztrain", level=0, names=aliases):
            names = [f"ztrain.{alias.name}" if alias.name in MAY_IMPORT else "ztrain" for alias in aliases]
        case ast.ImportFrom(module=str(module), level=0):
            names = [module]
        case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
            if re.search(r"\b(import_module|__import__)$", ast.unparse(function)):
                names = [name]
    return {room_of(name.split(".")) for name in names if name.split(".")[0] in PACKAGES}


def illegal_arrows(root: Path) -> list[str]:
    """One sentence with file and line for every import that the plan does not know."""
    wrong = []
    for room, path, tree in sources(root):
        if room not in MAY_IMPORT:
            wrong.append(f"{path}: the room {room!r} is not in MAY_IMPORT; add it to the plan")
            continue
        allowed = MAY_IMPORT[room] | {room, "errors", "io"}
        for node in tree:
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                wrong.append(f"{path}:{node.lineno}: relative import; write it from the package")
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
            if room == "data_tools" or path.startswith(tuple(owners)):  # data_tools knows neither sigma nor adapters
                continue
            for node in tree:
                if breaks(node) and path not in SAME_WORDS.get(getattr(node, "value", ""), ()):
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
    """`path: call` of whatever gives a file or folder its final name outside of io/files.py."""
    found = []
    for _, path, tree in sources(root):
        for node in tree if path != "ztrain/io/files.py" else ():
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
        ("ztrain/model/flow.py", "import torch\nimport ztrain.train.run", "ztrain/model/flow.py:2: model -> train"),
        ("ztrain/model/flow.py", "import ztrain.io, ztrain.train as m", "ztrain/model/flow.py:1: model -> train"),
        ("ztrain/data/rows.py", "def f():\n    from ztrain.train import main", "ztrain/data/rows.py:2: data -> train"),
        ("ztrain/config.py", "from ztrain import adapters, train", "ztrain/config.py:1: config -> train"),
        ("ztrain/config.py", "from ztrain import load", "ztrain/config.py:1: config -> ztrain/__init__"),
        ("ztrain/config.py", "from ztrain import adapters, load", "config -> ztrain/__init__"),
        (
            "ztrain/adapters/lora.py",
            "from ztrain.config import C",
            "ztrain/adapters/lora.py:1: adapters -> config",
        ),
        ("miniature/a/b.py", "import ztrain.train", "miniature/a/b.py:1: miniature -> train"),
        ("ztrain/train/loop.py", "import data_tools.scan", "ztrain/train/loop.py:1: train -> data_tools"),
        ("ztrain/model/dit.py", "import importlib\nimportlib.import_module('ztrain.cli')", "dit.py:2: model -> cli"),
        (
            "data_tools/scan.py",
            "from ztrain.cache.fill import fill",
            "data_tools/scan.py:1: data_tools -> cache",
        ),
        ("ztrain/__init__.py", "import ztrain.train", "ztrain/__init__.py:1: ztrain/__init__ -> train"),
        ("ztrain/model/flow.py", "from . import errors", "ztrain/model/flow.py:1: relative import"),
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
        "ztrain/__init__.py": "def __getattr__(name):\n    from ztrain.sampling.pipeline import load_adapter",
        "ztrain/model/adapted_dit.py": "import torch, ztrain.model.dit\nfrom ztrain import adapters, errors",
        "ztrain/adapters/lora.py": "from ztrain.adapters.base import A\nfrom ztrain.errors import InputError",
        "data_tools/scan.py": "from data_tools import pair\nfrom ztrain.data.reading import Triplet",
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
        "ztrain/weights/checkpoint.py: os.rename(path, place)",  # a whole checkpoint is set aside
    ]


@pytest.mark.parametrize("call", ["os.replace(a, b)", "a.rename(b)", "scratch.replace(b)", "shutil.move(a, b)"])
def test_the_guard_finds_a_rename(tmp_path: Path, call: str) -> None:
    files = {"ztrain/train/run.py": f"text.replace('a', 'b')\n{call}", "ztrain/io/files.py": call}
    assert renames(tree_with(tmp_path, files)) == [f"ztrain/train/run.py: {call}"]


@pytest.mark.parametrize("caught", ["", " Exception", " (OSError, Exception) as error", " BaseException"])
def test_the_guard_finds_a_broad_except(tmp_path: Path, caught: str) -> None:
    text = f"try:\n    pass\nexcept{caught}:\n    pass\ntry:\n    pass\nexcept OSError:\n    pass\n"
    assert len(broad_excepts(tree_with(tmp_path, {"data_tools/scan.py": text}))) == 1


@pytest.mark.parametrize(
    ("owner", "text"),
    [
        *[("model/flow.py", f"t = {text}") for text in ("1000 * s", "1e3", "1 - sigma", "1.0 - self.sigmas[:, None]")],
        ("adapters/lora.py", "isinstance(adapter, Lora)"),
        ("adapters/lora.py", "isinstance(self.adapters[0], (A, B))"),
        ("adapters/lora.py", "x.kind == 'lora'"),
        ("adapters/lora.py", "'lora' != config.adapter.kind"),
        ("adapters/lora.py", "match x.kind:\n    case 'lora': pass"),
        *[("frozen/states.py", text) for text in ("'siglip' in reads", "reads & {'reference'}", "x = ['fused']")],
    ],
)
def test_the_guard_finds_a_convention_outside_its_owners(tmp_path: Path, owner: str, text: str) -> None:
    others = '"""Never 0..1000, never 1 - sigma, siglip."""\nx = 1 - beta\nisinstance(path, str)\n'
    files = {"ztrain/train/run.py": others + text, f"ztrain/{owner}": text, "data_tools/pack.py": text}
    [wrong] = trespasses(tree_with(tmp_path, files))
    assert wrong.startswith("ztrain/train/run.py:4: ") and owner.removesuffix("lora.py") in wrong


@pytest.mark.parametrize("module", ["ztrain", "ztrain.config"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    if module != "ztrain" and not (ROOT / module.replace(".", "/")).with_suffix(".py").exists():
        pytest.skip(f"{module} is not written yet")
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (loaded := HEAVY & set(done.stdout.split())), f"import {module} loads {', '.join(sorted(loaded))}"
