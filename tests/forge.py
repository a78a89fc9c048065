"""Starts `python -m ...` in real processes without their import time: a server imports once and forks for each.

The children have their own process number, session, folder, environment and output files, and die like any other. What
must go through a launcher, or reads its environment at import, is started the ordinary way instead.

    python -m tests.forge SOCKET        the server; `Forge` is the client

`-c PROGRAM` in place of a module runs lines, as python does; but ztrain is imported already: who exchanges a name does
it where it is looked up. A launcher that is started here forks its ranks as well: real children, with the signals,
sessions and process groups that it gives them, but without another import.
"""

import contextlib
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import ztrain.interrupt

ROOT = Path(__file__).parents[1]


COMMAND = """#!{python} -IS
import json, os, signal, socket, sys
own = {{"ztrain": ["-m", "ztrain.cli"], "accelerate": ["-m", "accelerate.commands.launch"]}}
words = [*own.get("{name}", []), *sys.argv[2 if "{name}" == "accelerate" else 1:]]
if words[:1] != ["-m"] or words[1].split(".")[0] not in ("ztrain", "data_tools", "miniature", "accelerate"):
    os.execv("{python}", ["{python}", *words])
connection = socket.socket(socket.AF_UNIX)
connection.connect("{socket}")
request = dict(arguments=words[1:], environment=dict(os.environ), folder=os.getcwd())
request.update(out=f"/proc/{{os.getpid()}}/fd/1", err=f"/proc/{{os.getpid()}}/fd/2")
connection.sendall(json.dumps(request).encode() + b"\\n")
lines = connection.makefile("r")
pid = int(lines.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int(lines.readline())
sys.exit(status if status >= 0 else 128 - status)
"""


class Forged:
    """A running child, with the part of subprocess.Popen that tests use."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("r")
        self._connection = connection
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("forged process", timeout or 0)
            self.returncode = int(self._lines.readline())
            self._lines.close()
            self._connection.close()
        return self.returncode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Forge:
    """The server of one test session."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, folder / "forge"
        self.held: list[socket.socket] = []
        # Libraries read it when they are loaded: what a child is told of it comes too late.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.forge", str(self.place)], cwd=ROOT, env=environment
        )

    def wait_until_ready(self) -> None:
        while not self.place.exists():
            assert self.server.poll() is None, "the forge did not start"
            time.sleep(0.05)

    def start(
        self,
        arguments: Sequence[str],
        environment: dict[str, str],
        out: Path,
        err: Path,
        folder: Path = ROOT,
        ignored: Sequence[int] = (),
    ) -> Forged:
        """`python -m <arguments>` from the project's root, or another folder. `ignored`: signals, as nohup does it."""
        self.wait_until_ready()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.place))
        request = {"arguments": list(arguments), "environment": environment, "folder": str(folder)}
        request |= {"out": str(out), "err": str(err), "ignored": list(ignored)}
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Forged(connection)

    def run(
        self, arguments: Sequence[str], environment: dict[str, str], folder: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            out, err = Path(place) / "out", Path(place) / "err"
            status = self.start(arguments, environment, out, err, folder).wait()
            return subprocess.CompletedProcess(list(arguments), status, out.read_text(), err.read_text())

    def commands(self) -> Path:
        """A folder for the front of PATH, whose `python -m`, `ztrain` and `accelerate launch` start through the forge
        and pass signals on; all else that python is asked for is the ordinary one's."""
        self.wait_until_ready()
        folder = self.folder / "commands"
        if not folder.exists():
            folder.mkdir()
            for name in ("python", "ztrain", "accelerate"):
                place = folder / name
                place.write_text(COMMAND.format(python=sys.executable, socket=self.place, name=name))
                place.chmod(0o755)
        return folder

    def words_of(self, pid: int) -> list[str] | None:
        """What a process that was forked here runs; None of any other."""
        place = self.folder / "words" / str(pid)
        return place.read_text().split("\0") if place.exists() else None

    def free_port(self) -> int:
        """One that nobody else is given, another worker of pytest neither: a socket here stays bound to it, unheard."""
        self.held.append(socket.socket())
        self.held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so a store may listen there
        self.held[-1].bind(("127.0.0.1", 0))
        return self.held[-1].getsockname()[1]

    def close(self) -> None:
        for port in self.held:
            port.close()
        self.server.kill()
        self.server.wait()


WORDS: list[Path] = []
"""Of the server: the folder in which each child notes what it runs."""
RUNNING: list[Forge] = []
"""The session's server; conftest.py starts it for the test files that use `the_forge`."""


def the_forge() -> Forge:
    return RUNNING[0]


def preload() -> None:
    """What nearly every command imports. Nothing is run: threads of a pool would not survive the fork."""
    import datasets  # noqa: F401
    import peft.tuners.lora  # noqa: F401
    from diffusers import AutoencoderKL, ZImageTransformer2DModel  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModel,
        AutoTokenizer,
        Qwen2VLImageProcessorPil,
        Qwen3Model,
        Qwen3VLModel,
        Siglip2ImageProcessorPil,
        Siglip2VisionModel,
    )

    import ztrain.cache.prepare
    import ztrain.compare.command
    import ztrain.frozen.statistics
    import ztrain.sampling.command
    import ztrain.train.loop  # noqa: F401


def child(request: dict) -> NoReturn:
    """Becomes the process that was asked for."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no child outlives the tests
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), number)
    os.chdir(request["folder"])
    for number in request.get("ignored", ()):
        signal.signal(number, signal.SIG_IGN)
    subprocess.Popen._execute_child = fork_or_execute
    become(request["arguments"], request["environment"])


execute = subprocess.Popen._execute_child


def fork_or_execute(process: subprocess.Popen, words: Sequence[str], *more: Any) -> None:
    """`python [-u] [-m] ...` in the place of `subprocess.Popen._execute_child`, whose arguments these are."""
    program, *arguments = [word for word in words if word != "-u"]
    if program != sys.executable or arguments[0].startswith("-") and arguments[0] != "-m":
        return execute(process, words, *more)
    environment, new_session = more[5], more[-2]
    process.pid = os.fork()
    if process.pid:
        process._child_created = True
        return None
    if new_session:
        os.setsid()
    for number in signal.valid_signals():  # as exec does
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{handle}").startswith("socket:"):
                os.close(int(handle))
    if arguments[0] != "-m":
        arguments = ["-c", Path(arguments[0]).read_text(), *arguments[1:]]
    become(arguments[arguments[0] == "-m" :], dict(os.environ if environment is None else environment))


def become(arguments: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """`python -m <arguments>`, in a process that was forked for it."""
    status = 1
    try:
        (WORDS[0] / str(os.getpid())).write_text("\0".join(arguments))
        os.environ.clear()
        os.environ.update(environment)
        if hub := environment.get("HF_HOME"):  # read when it was imported
            from huggingface_hub import constants

            constants.HF_HOME, constants.HF_HUB_CACHE = hub, f"{hub}/hub"
        signal.set_wakeup_fd(-1)
        module, *words = arguments
        ztrain.interrupt.current = None  # of a parent that was stopped by signals itself
        if module == "ztrain.interrupt":  # as a program it would be a second one of the module
            ztrain.interrupt.end_with_parent()
            module, *words = words
        if module == "-c":
            program, sys.argv = words[0], ["-c", *words[1:]]
            sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            sys.argv = [module, *words]
            for name in (module, "ztrain.train", "ztrain.cli"):  # runpy warns of a module that is already there
                sys.modules.pop(name, None)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def serve(place: str) -> None:
    gc.disable()
    preload()
    others = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    names = {(task / "comm").read_text().strip() for task in others}
    # A thread would be missing in every child, and its locks held. But the first of these knows of forks, and the
    # driver's, where there is a GPU, is nothing to children that run on the CPU.
    assert all(name == "jemalloc_bg_thd" or name.startswith("cuda") for name in names), names
    WORDS.append(Path(place).parent / "words")
    WORDS[0].mkdir()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place + ".new")
    listening.listen()
    os.rename(place + ".new", place)
    gc.freeze()  # else each child goes through all of the libraries' objects whenever it collects its own
    gc.enable()
    waiting: dict[int, socket.socket] = {}
    parent = os.getppid()
    while os.getppid() == parent:
        if select.select([listening], [], [], 0.02)[0]:
            connection, _ = listening.accept()
            request = json.loads(connection.makefile("r").readline())
            pid = os.fork()
            if not pid:
                listening.close()
                child(request)
            connection.sendall(f"{pid}\n".encode())
            waiting[pid] = connection
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                with contextlib.suppress(OSError):
                    waiting.pop(pid).sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    serve(sys.argv[1])
