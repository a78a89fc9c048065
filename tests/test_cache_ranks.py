"""`ztrain cache` over several processes with gloo: killed, told to stop, failing, and continued.

Started by the launcher where it matters how that ends; else as ranks.py does.
"""

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import ranks
from tests.forge import Forged, the_forge
from tests.ranks import Ranks
from tests.test_cache import contents
from tests.test_run import ENVIRONMENT, processes_of, send
from tests.triplets import model_words, tiny_config, write_triplets
from ztrain.cache.cache import Cache
from ztrain.cache.prepare import cache_states
from ztrain.cache.samples import all_needs, read_samples
from ztrain.io.store import Store

pytestmark = pytest.mark.usefixtures("forge")

DDP = ("accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml",
       "--main_process_port", "0", "--num_processes")  # fmt: skip
# The tiny encoders are done with everything before a second process has imported its libraries. So here each waits for
# the others once its encoders are loaded, and a state takes as long as it may for real ones.
SLOWED = """
import os, sys, time
from pathlib import Path
from ztrain.frozen.states import Encoders
load, compute, place = Encoders.add, Encoders.compute, Path(os.environ["MEETING"])
met = []
def loaded(self, *arguments):
    load(self, *arguments)
    met.append(0)
    (place / f"{len(met)}-{os.environ['RANK']}").touch()
    for _ in range(400):
        if len(list(place.glob(f"{len(met)}-*"))) >= int(os.environ["WORLD_SIZE"]):
            break
        time.sleep(0.05)
    return self
def computed(self, *arguments):
    time.sleep(0.03)
    return compute(self, *arguments)
Encoders.add, Encoders.compute = loaded, computed
from ztrain.cli import main
sys.exit(main(["cache", *sys.argv[1:]]))
"""


class Place:
    """Data, and the cache of one process without a launcher."""

    def __init__(self, family: Path, folder: Path) -> None:
        self.family, self.data = family, write_triplets(folder / "data", count=40)
        config = tiny_config(family, self.data, folder / "one", "--cache.entries_per_shard", "2")
        self.said = cache_states(config, check=False)
        self.whole = contents(folder / "one")
        needs = all_needs(config, read_samples(config, Cache(config)))
        self.computed = len(needs.requests)

    def words(self, cache: Path, *more: str) -> list[str]:
        return [
            "--config", "configs/siglip_lora.yaml", "configs/tiny.yaml", *model_words(self.family),
            "--data.train_data_dir", str(self.data), "--cache.dir", str(cache),
            "--cache.entries_per_shard", "2", "--data.dataloader_num_workers", "1", *more,
        ]  # fmt: skip

    def fill(self, cache: Path, processes: int, status: int = 0, program: str = "") -> str:
        """The output of processes that end by themselves; `program` in place of the command."""
        return ranks.run([*of(program), *self.words(cache)], _meeting(cache), processes, status)

    def launch(self, cache: Path, processes: int, log: Path) -> Forged:
        """By the launcher, with time to be killed."""
        file = cache.with_name("program.py")
        file.write_text(SLOWED)
        return the_forge().start([*DDP, str(processes), str(file), *self.words(cache)], _meeting(cache), log, log)

    def start(self, cache: Path, processes: int) -> Ranks:
        """Without a launcher, with time to be killed."""
        return Ranks([*of(SLOWED), *self.words(cache)], _meeting(cache), processes, cache.parent)


def of(program: str) -> list[str]:
    return ["-c", program] if program else ["ztrain.cli", "cache"]


def _meeting(cache: Path) -> dict[str, str]:
    """The environment of one launch, whose processes meet in an empty folder."""
    return ENVIRONMENT | {"MEETING": tempfile.mkdtemp(dir=cache.parent)}


@pytest.fixture(scope="module")
def place(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(family, tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """An empty one. A failed test must not leave a process behind."""
    yield tmp_path / "cache"
    send(signal.SIGKILL, tmp_path / "cache")


def told(said: str) -> tuple[int, list[int]]:
    """How many states a summary counts, in all and by process."""
    [line] = re.findall(r"^cache: computed .*$", said, re.MULTILINE)
    shared = re.search(r"by (\d+) processes \(([\d, ]+)\)", line)
    each = [int(count) for count in shared[2].split(", ")] if shared else []
    assert not shared or len(each) == int(shared[1])
    return sum(map(int, re.findall(r"(\d+) (?:latents|reference|siglip|text|fused)", line))), each


def kept(cache: Path) -> int:
    """Published entries, each of which can be read."""
    stores = [Store(folder) for folder in cache.iterdir() if folder.is_dir() and folder.name[0] != "."]
    return sum(len([store.read(key) for key in store._places]) for store in stores)


def wait_until_gone(cache: Path, log: Path, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(cache):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def wait_for_shards(cache: Path, count: int, process: Forged, log: Path) -> None:
    deadline = time.monotonic() + 120
    while len(list(cache.glob("[a-z]*/*.safetensors"))) < count:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_share_the_work_and_give_what_one_gives(place: Place, tmp_path: Path, processes: int) -> None:
    said = place.fill(tmp_path / "cache", processes, program=SLOWED)
    count, each = told(said)
    assert count == place.computed == told(place.said)[0]  # nothing twice: each shard was computed by one
    assert len(each) == processes and min(each) > 0 and sum(each) == count, said
    assert contents(tmp_path / "cache") == place.whole
    for line in ("train: 40 triplets, 0 left out", "validation: 4 triplets, 0 left out"):
        assert said.count(line) == 1  # the main process alone speaks
    assert not [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]
    again = place.fill(tmp_path / "cache", 2)
    assert again.count("cache: nothing to compute, everything is there") == 1 and "encoding" not in again


def test_killed_ranks_lose_no_published_shard_and_any_number_goes_on(place: Place, cache: Path, tmp_path: Path) -> None:
    """First one rank of three is killed, and the launcher ends; then both of two; the rest is done by one."""
    log = tmp_path / "log"
    launcher = place.launch(cache, 3, log)
    wait_for_shards(cache, 3, launcher, log)
    ranks = [pid for pid, is_rank in processes_of(cache).items() if is_rank]
    assert len(ranks) == 3
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(timeout=60) == 1, log.read_text()  # the launcher's own status
    wait_until_gone(cache, log)
    first = kept(cache)
    assert 0 < first < place.computed
    with place.start(cache, 2) as both:
        wait_for_shards(cache, len(list(cache.glob("[a-z]*/*.safetensors"))) + 4, both.started[0], both.logs[0])
        both.kill()
        assert both.statuses() == [-signal.SIGKILL] * 2
    second = kept(cache)
    assert first < second < place.computed
    config = tiny_config(place.family, place.data, cache, "--cache.entries_per_shard", "2")
    assert told(cache_states(config, check=False)) == (place.computed - second, [])
    assert contents(cache) == place.whole
    assert not [path.name for path in cache.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_ends_leaves_whole_shards_and_no_process(
    place: Place, cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Told to stop, or gone: then the kernel tells the ranks."""
    log = tmp_path / "log"
    launcher = place.launch(cache, 2, log)
    wait_for_shards(cache, 3, launcher, log)
    assert sorted(processes_of(cache).values()) == [False, True, True]
    os.kill(launcher.pid, number)
    assert launcher.wait(timeout=60) != 0
    wait_until_gone(cache, log)
    assert 0 < kept(cache) < place.computed
    assert contents(cache).items() <= place.whole.items()  # no half shard


def test_a_failure_of_one_process_ends_all_with_its_sentence(place: Place, tmp_path: Path) -> None:
    """The second process can write no file of more than 6000 bytes, which stands for a full disk of its own."""
    program = (
        "import os, resource, signal, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "from ztrain.cli import main\n"
        "status = main(['cache', *sys.argv[1:]])\n"
        "print('status of rank', os.environ['RANK'], 'is', status, flush=True)\n"
        "sys.exit(status)\n"
    )
    said = place.fill(tmp_path / "cache", 2, status=2, program=program)
    errors = re.findall(r"^error: .*$", said, re.MULTILINE)
    assert len(errors) == 2 and len(set(errors)) == 1 and "Traceback (most recent call last):\n  File" not in errors[0]
    assert "cannot write it" in errors[0] and "what was finished before is kept" in errors[0]
    assert "status of rank 0 is 2" in said and "status of rank 1 is 2" in said
    # The other one began nothing more once it knew: there is work left, and what was done is whole.
    assert contents(tmp_path / "cache").items() < place.whole.items()
    assert kept(tmp_path / "cache") < place.computed // 2
    assert not [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]
    place.fill(tmp_path / "cache", 2)
    assert contents(tmp_path / "cache") == place.whole


def test_one_process_without_a_launcher_has_no_process_group(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("a process group was asked for")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    said = cache_states(tiny_config(place.family, place.data, tmp_path, "--cache.entries_per_shard", "2"), check=False)
    assert told(said) == (place.computed, []) and contents(tmp_path) == place.whole


def test_training_fills_a_cold_cache_with_all_its_processes(place: Place, tmp_path: Path) -> None:
    """The same path as `ztrain cache`, over the same shards."""
    quiet = ("--validation.validation_steps", "0", "--validation.preview_steps", "0", "--train.max_train_steps", "1")
    words = place.words(tmp_path / "cache", *quiet, "--output_dir", str(tmp_path / "run"))
    count, each = told(ranks.run(["ztrain.train", *words], ENVIRONMENT, 2))
    assert len(each) == 2 and sum(each) == count
    assert count == kept(tmp_path / "cache") > 100
