"""What all tests share: no network, one thread, deterministic kernels and one miniature family on disk."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from tests.chromium import Browser, chromium, find_chromium
from tests.forge import RUNNING, Forge

if TYPE_CHECKING:
    from ztrain.frozen.states import Encoders

# Read once when transformers is imported, which no line above does.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A background job of a shell ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


gc.disable()  # nothing of what is imported goes again


def pytest_collection_finish() -> None:
    gc.freeze()  # else every collection goes through all that the libraries hold
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):  # on a machine with a torch of its own, whose warnings are not ours to mend
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """Starts our own commands in processes of their own, without waiting for their imports."""
    server = Forge(tmp_path_factory.mktemp("forge"))
    RUNNING.append(server)
    yield server
    RUNNING.clear()
    server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with chromium() as started:
        yield started


@pytest.fixture(scope="session")
def paintings(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triplets of painted drawings; runs share the cache beside them."""
    folder = tmp_path_factory.mktemp("paintings")
    label = {"styles": {"contents": "contents.csv"}}
    config = {"sources": ["images"], "label": label, "pair": {"triplets_per_target": 1, "max_triplets_per_split": 24}}
    build_file = folder / "drawings/build.yaml"
    for words in (
        ("miniature.style_folders", "--out", str(folder / "drawings")),
        ("data_tools.build", "--config", str(build_file), "--out", str(folder / "triplets")),
    ):
        done = forge.run(words, dict(os.environ))
        assert done.returncode == 0, done.stderr
        build_file.write_text(yaml.safe_dump(config))
    return folder / "triplets"


@pytest.fixture(scope="session")
def place(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Triplets and a full cache for runs of the tiny family; who changes the triplets changes them back."""
    from tests.test_run import Place

    return Place(family, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny random family: read it, never write into it."""
    # Imported here, so that tests without models do not wait for transformers.
    from miniature.family import build_family

    return build_family(tmp_path_factory.mktemp("zimage") / "family")


@pytest.fixture(scope="session")
def encoders(family: Path) -> "Encoders":
    """All of the family's."""
    from tests.test_parity import ALL_READS, family_config
    from ztrain.frozen.states import Encoders

    return Encoders.load(family_config(family), ALL_READS, torch.float32, "cpu")
