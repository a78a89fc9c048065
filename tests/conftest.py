"""What all tests share: no network, one thread, deterministic kernels and one miniature family on disk."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.forge import RUNNING, Forge

# Read once when transformers is imported, which no line above does.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A background job of a shell ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


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


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny random family: read it, never write into it."""
    # Imported here, so that tests without models do not wait for transformers.
    from ztrain.mini.family import build_family

    return build_family(tmp_path_factory.mktemp("zimage") / "family")
