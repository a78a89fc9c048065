"""metrics.jsonl is the record and W&B its mirror: whole after any end, silent about this machine, never in the way.

W&B runs in child processes against a server of a few lines that keeps what it is sent, and that can hang, fail and
come back; `wandb sync` is the real one, run as the printed command says.
"""

import http.server
import json
import math
import os
import pty
import re
import signal as signals
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.forge import the_forge
from ztrain.config import Config, TrackingConfig
from ztrain.errors import InputError
from ztrain.privacy import public_config, public_text
from ztrain.train import wandb_mirror
from ztrain.train.tracking import Record

pytestmark = pytest.mark.usefixtures("forge")
ROOT = Path(__file__).resolve().parent.parent
WANDB_KEY = "c0ffee0123456789" * 2 + "deadbeef"
SECRETS = {"hub_token": "CANARY-in-config", "HF_TOKEN": "hf_CANARYcanaryCANARY", "WANDB_API_KEY": WANDB_KEY}
PROMPT = '<script>alert(1)</script> =cmd() "x", 猫'


# --- a W&B server -----------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Keeps runs, history by offset as the real one does, and every body; `mode` is how it behaves right now."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, mode: str = "well") -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.mode = mode
        self.bodies: list[tuple[str, bytes]] = []
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.exit_codes: list[int] = []
        self.artifacts: list[dict[str, Any]] = []
        self.released = threading.Event()  # ends requests that hang
        self.held = threading.Event()  # a request came that will be refused after the mode has changed
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None: ...  # clients are killed here

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.mode = "dead"
        self.released.set()
        self.shutdown()
        self.server_close()

    def stream(self, run: str, sent: dict[str, Any]) -> None:
        if chunk := sent.get("files", {}).get("wandb-history.jsonl"):
            rows = [json.loads(row) for row in chunk["content"]]
            self.history[run][chunk["offset"] : chunk["offset"] + len(rows)] = rows
        if sent.get("complete"):
            self.exit_codes.append(sent["exitcode"])

    def query(self, name: str, sent: dict[str, Any]) -> dict[str, Any]:
        def upload(file: str) -> dict[str, Any]:
            return {"uploadUrl": f"{self.url}/upload/{file}", "uploadHeaders": []}

        match name:
            case "RunResumeStatus":
                bucket = self._bucket(sent["name"]) if sent["name"] in self.history else None
                entity = {"id": "e", "name": "me"}
                return {"model": {"id": "m", "name": sent["project"], "entity": entity, "bucket": bucket}}
            case "UpsertBucket":
                run = sent["name"] or next(iter(self.history))
                self.history.setdefault(run, [])
                project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
                return {"upsertBucket": {"bucket": {"id": "b", "name": run, "displayName": run, "project": project}}}
            case "CreateRunFiles":
                files = [{"name": file, **upload(file)} for file in sent["files"]]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                self.artifacts.append(sent["input"])
                sequence = {"latestArtifact": None}
                return {"createArtifact": {"artifact": {"id": "a", "state": "PENDING", "artifactSequence": sequence}}}
            case "CreateArtifactManifest":
                manifest = {"id": "m", "file": {"id": "f", **upload("manifest")}}
                return {"createArtifactManifest": {"artifactManifest": manifest}}
            case "CreateArtifactFiles":
                nodes = [upload(file["name"]) | {"artifact": {"id": "a"}} for file in sent["input"]["artifactFiles"]]
                return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}}
            case "ClientIDMapping":
                return {"clientIDMapping": {"serverID": "a"}}
        return {}

    def _bucket(self, run: str) -> dict[str, Any]:
        rows = self.history[run]
        return {
            **{"id": "b", "name": run, "displayName": run, "config": "{}", "tags": [], "notes": None},
            **{"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "historyLineCount": len(rows)},
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "summaryMetrics": json.dumps(rows[-1] if rows else {}),
            "wandbConfig": json.dumps({"t": {}}),
        }


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.bodies.append((self.path, body))
        if self.server.mode == "hang":
            self.server.released.wait()
        if late := (self.server.mode == "late 401" and b"RunResumeStatus" in body):
            self.server.held.set()
            while self.server.mode == "late 401":
                time.sleep(0.1)
            time.sleep(3)
        if late:
            self._reply(401, {"errors": []})
        elif self.server.mode in ("hang", "dead"):
            self.close_connection = True
        elif self.server.mode.isdigit():
            self._reply(int(self.server.mode), {"errors": [{"message": "no \x1b[31mway"}]})
        elif self.server.mode == "no rows" and self.path.endswith("file_stream"):
            self._reply(403, {})
        elif self.path == "/graphql":
            sent = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", sent["query"])
            assert name is not None
            self._reply(200, {"data": self.server.query(name[1], sent.get("variables") or {})})
        else:
            if run := re.fullmatch(r"/files/.*/(\w+)/file_stream", self.path):
                self.server.stream(run[1], json.loads(body))
            self._reply(200 if run or self.path.startswith("/upload/") else 404, {})

    do_GET = do_POST = do_PUT = _answer

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        out = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(mode: str = "well") -> Server:
        servers.append(Server(mode))
        return servers[-1]

    yield start
    for server in servers:
        if server.mode != "dead":
            server.stop()


SLACK = 15.0
"""Seconds in which a process must have ended, on a busy machine too; one that hangs never ends."""

# --- a training process -----------------------------------------------------------------------------------------------

CHILD = """
import atexit, json, os, sys, threading, time
from pathlib import Path
from ztrain.train import wandb_mirror
from ztrain.config import TrackingConfig
from ztrain.errors import InputError
from ztrain.train.tracking import Record
scope = dict(globals(), folder=Path("run"))
wandb_mirror.FLUSH_SECONDS = 0.2
for line in open("statements"):
    began = time.monotonic()
    exec(json.loads(line), scope)
    print(time.monotonic() - began, flush=True)
threading._shutdown()  # as at the end of every program but those of the forge
atexit._run_exitfuncs()
"""


def environment_in(cwd: Path, server: str, key: str = WANDB_KEY) -> dict[str, str]:
    """Of a user with secrets whose home is below `cwd`."""
    home = cwd / "home-of-alice"
    home.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return inherited | {
        **{"HOME": str(home), "USER": "alice-canary", "LOGNAME": "alice-canary", "HF_TOKEN": SECRETS["HF_TOKEN"]},
        **{"WANDB_BASE_URL": server, "WANDB_API_KEY": key},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


class Training:
    """A process in `cwd` that runs the statements it is sent; `run/` is its folder."""

    def __init__(self, cwd: Path, server: str) -> None:
        self.cwd, self.folder, self.environment = cwd, cwd / "run", environment_in(cwd, server)
        for pipe in ("statements", "answers"):
            (cwd / pipe).unlink(missing_ok=True)
            os.mkfifo(cwd / pipe)
        self.process = the_forge().start(["-c", CHILD], self.environment, cwd / "answers", cwd / "stderr", cwd)
        self.answers = open(cwd / "answers")
        self.statements = os.fdopen(os.open(cwd / "statements", os.O_RDWR), "w")  # which waits for no reader

    def tell(self, statements: str) -> None:
        self.statements.write(json.dumps(statements) + "\n")
        self.statements.flush()

    def answer(self) -> float:
        """Seconds that the statements took."""
        seconds = self.answers.readline()
        assert seconds, self.said
        return float(seconds)

    def do(self, statements: str) -> float:
        self.tell(statements)
        return self.answer()

    def start(self, *, resumed_step: int | None = None, config: str = "{}", **tracking: Any) -> float:
        tracking = {"report_to": "wandb"} | tracking
        self.do("import wandb")  # measured apart: it is the same for all
        self.tell(f"record = Record(folder, TrackingConfig(**{tracking!r}), {config}, resumed_step={resumed_step})")
        return self.answer()

    @property
    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> float:
        """Seconds until the process was gone, after close()."""
        began = time.monotonic()
        self.statements.close()
        assert self.process.wait(60) == 0, self.said
        self.answers.close()
        return time.monotonic() - began

    @property
    def said(self) -> str:
        return (self.cwd / "stderr").read_text()

    @property
    def rows(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def sync(self, server: str) -> str:
        """Runs the command that was printed last."""
        command = re.findall(r"with: (\(cd run && .*wandb sync wandb\))$", self.said, re.MULTILINE)[-1]
        done = subprocess.run(
            command,
            shell=True,
            cwd=self.cwd,
            env=self.environment | {"WANDB_BASE_URL": server},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr


def wait_for(happened: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all have ended; a zombie only waits for a parent that is not ours."""
    wait_for(lambda: all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes), seconds)
    return True


def mirrored(history: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, float]]:
    """(attempt, step) -> what was logged. Rows that were sent twice have the same W&B step and are one."""
    by_wandb_step = {row["_step"]: row for row in history}
    rows = {}
    for row in by_wandb_step.values():
        key = row["trainer/attempt"], row["trainer/global_step"]
        assert key not in rows, f"{key} has two W&B steps"
        rows[key] = {name: value for name, value in row.items() if not re.match(r"_|trainer/|val/(grid|table)", name)}
    return rows


def recorded(rows: list[dict[str, float]], attempt: int = 1) -> dict[tuple[int, int], dict[str, float]]:
    return {(attempt, int(row["step"])): {k: v for k, v in row.items() if k != "step"} for row in rows}


def transaction_log(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after 7 bytes of its own, uncompressed."""
    from wandb.proto import wandb_internal_pb2

    content, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left_of_block = 32768 - position % 32768
        if left_of_block < 7:
            position += left_of_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def leaks(content: bytes, cwd: Path) -> list[str]:
    """What of this machine and its secrets is in there."""
    private = [*SECRETS.values(), str(cwd), cwd.name, "alice-canary", "home-of-alice", str(ROOT), sys.prefix]
    return [word for word in private if word.encode() in content]


def leaks_of(training: Training, server: Server) -> list[str]:
    """In every byte below wandb/, in file names, and in all that the server was sent."""
    kept = [file for file in (training.folder / "wandb").rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in kept)
    contents = [file.read_bytes() for file in (*kept, training.folder / "wandb.json")]
    names = [str(file.relative_to(training.folder)).encode() for file in kept]
    sent = [path.encode() + body for path, body in server.bodies]
    return [word for content in (*contents, *names, *sent) for word in leaks(content, training.cwd)]


# --- what W&B gets ----------------------------------------------------------------------------------------------------


def test_an_offline_run_holds_the_record_and_can_be_synced(tmp_path: Path, serve: Any) -> None:
    server = serve()
    training = Training(tmp_path, server.url)
    for name, color in (("grid", "red"), ("cell", "blue")):
        Image.new("RGB", (24, 16), color).save(tmp_path / f"{name}.png")
    (tmp_path / "adapter.safetensors").write_bytes(b"weights")
    config = {
        "output_dir": str(tmp_path / "run"),
        "models": {"base": {"pretrained_model_name_or_path": f"{tmp_path}/model", "hub_token": SECRETS["hub_token"]}},
        "remark": f"after {tmp_path}/other with {SECRETS['HF_TOKEN']}",
    }
    seconds = training.start(mode="offline", config=repr(config), notes=f"see {tmp_path}/notes.txt", tags=["t"])
    seconds += training.do("for step in range(30): record.log(step, {'train/loss': 1 / (step + 1), 'n': step})")
    table = f"[{{'prompt': {PROMPT!r}, 'image': Path('cell.png')}}]"
    training.do(f"record.log(30, {{'val/loss': 0.25}}, grid=Path('grid.png'), table={table})")
    training.do("record.log_folder('adapter', 'model', [Path('adapter.safetensors')])")
    seconds += training.do("record.close(failed=False)") + training.end()
    assert seconds < 10, "nothing offline waits"

    [file] = training.folder.glob("wandb/offline-run-*/*.wandb")
    records = list(transaction_log(file))
    metrics = {
        r.metric.name or r.metric.glob_name: r.metric for r in records if r.WhichOneof("record_type") == "metric"
    }
    assert set(metrics) == {"trainer/global_step", "*"}
    assert metrics["*"].step_metric == "trainer/global_step"
    history = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [row["trainer/global_step"] for row in history] == list(range(31)) == [row["step"] for row in training.rows]
    assert mirrored(history) == recorded(training.rows)

    media = file.parent / "files"
    assert (media / history[30]["val/grid/path"]).read_bytes() == (tmp_path / "grid.png").read_bytes()
    artifacts = {r.artifact.type: r.artifact for r in records if r.WhichOneof("record_type") == "artifact"}
    staged = {
        kind: {entry.path: training.folder / entry.local_path for entry in artifact.manifest.contents}
        for kind, artifact in artifacts.items()
    }
    assert {path: file.read_bytes() for path, file in staged["model"].items()} == {"adapter.safetensors": b"weights"}
    shown = json.loads(staged["run_table"]["val/table.table.json"].read_text())
    [[prompt, picture]] = shown["data"]
    assert shown["columns"] == ["prompt", "image"] and prompt == PROMPT, "a prompt is text, whatever it says"
    assert staged["run_table"][picture["path"]].read_bytes() == (tmp_path / "cell.png").read_bytes()

    [run] = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert not run.host
    told = {entry.key: json.loads(entry.value_json) for entry in run.config.update}
    assert told["output_dir"] == "run" and told["remark"] == "after other with ***"
    assert told["models"] == {"base": {"pretrained_model_name_or_path": "model", "hub_token": "***"}}

    assert not server.bodies and not leaks_of(training, server)
    training.sync(server.url)
    [(name, arrived)] = server.history.items()
    assert name == run.run_id == json.loads((training.folder / "wandb.json").read_text())["id"]
    assert mirrored(arrived) == recorded(training.rows)
    assert {artifact["artifactTypeName"] for artifact in server.artifacts} == {"model", "run_table"}
    manifests = [body for path, body in server.bodies if path == "/upload/manifest"]
    assert len(manifests) == 2 and not [word for _, body in server.bodies for word in leaks(body, tmp_path)]


def test_online_it_follows_while_training_and_a_resume_continues_it(tmp_path: Path, serve: Any) -> None:
    server = serve()
    first = Training(tmp_path, server.url)
    first.start()
    first.do("for step in range(10): record.log(step, {'loss': step / 8})")
    wait_for(lambda: any(server.history.values()), 30)
    wait_for(lambda: "View run" in (first.folder / "wandb" / "upload.log").read_text(), 5)
    first.do("record.log(10, {'loss': 10 / 8})")
    assert f"W&B: {server.url}/me/p/runs/" in first.said
    time.sleep(1)  # until wandb has written its file
    family = first.family
    assert len(family) == 3, "wandb-core, and the uploader with its own"
    first.process.kill()
    first.process.wait()
    first.answers.close()
    first.statements.close()
    assert gone(family, 10), "a killed training leaves nobody behind"

    with open(first.folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 11, "lo')
    before = (first.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    second = Training(tmp_path, server.url)
    second.start(resumed_step=6)
    second.do("for step in range(7, 13): record.log(step, {'loss': -step})")
    assert second.do("record.close(failed=True)") < 30
    assert second.end() < SLACK
    assert f"W&B: the upload is complete: {server.url}/me/p/runs/" in second.said
    assert (second.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:7] == before[:7]
    assert [row["step"] for row in second.rows] == list(range(13))

    [(run, history)] = server.history.items()
    assert json.loads((second.folder / "wandb.json").read_text()) == {"id": run, "project": "ztrain", "attempt": 2}
    earlier = {(1, step): {"loss": step / 8} for step in range(11)}
    assert mirrored(history) == earlier | recorded(second.rows[7:], attempt=2)
    steps = {
        row["trainer/attempt"]: [r["_step"] for r in history if r["trainer/attempt"] == row["trainer/attempt"]]
        for row in history
    }
    assert min(steps[2]) > max(steps[1]), "W&B drops rows whose own step goes back"
    assert server.exit_codes[-1] == 1
    assert not leaks_of(second, server)


# --- trouble ----------------------------------------------------------------------------------------------------------


# mode of the server at the start -> from the middle of training on -> when close() is called
OUTAGES = {
    "down at the start": ("dead", "dead", "dead"),
    "dies in the middle": ("well", "dead", "dead"),
    "dies at the end": ("well", "well", "dead"),
    "hangs": ("hang", "hang", "hang"),
    "comes back": ("500", "500", "well"),
}
RARER = {
    "fails": ("500", "500", "500"),
    "refuses": ("401", "401", "401"),
    "refuses rows": ("no rows", "no rows", "no rows"),
    "falls silent": ("well", "hang", "hang"),
    "lets in": ("401", "well", "well"),
    "lets in late": ("401", "401", "well"),
    "refuses while closing": ("401", "late 401", "well"),
}
LET_IN = ("comes back", "lets in", "lets in late", "refuses while closing")
PATIENT = (*LET_IN, "refuses")
CLOSING = 4  # seconds that close() waits for servers that take nothing


@pytest.mark.parametrize("plans", [OUTAGES, pytest.param(RARER, marks=pytest.mark.slow)], ids=["down", "rarer"])
def test_no_outage_holds_up_or_loses_anything(
    tmp_path: Path, serve: Any, plans: dict[str, tuple[str, str, str]]
) -> None:
    """All at once, because each may take the time of close(): 28 s, and here less where nothing can arrive."""
    assert wandb_mirror.CLOSE_SECONDS == 28
    servers = {name: serve(plan[0] if plan[0] != "dead" else "well") for name, plan in plans.items()}
    runs = {name: Training(tmp_path / name, server.url) for name, server in servers.items()}

    def switch(moment: int) -> None:
        for name, server in servers.items():
            if plans[name][moment] != "dead":
                server.mode = plans[name][moment]
            elif server.mode != "dead":
                server.stop()

    switch(0)
    for run in runs.values():
        run.do("import wandb")
    for name, run in runs.items():
        changed = ["SILENT_SECONDS = 1"] if name == "hangs" else []
        changed += ["RETRY_SECONDS = 0"] if name in ("lets in", "refuses while closing") else []
        changed += [f"CLOSE_SECONDS = {CLOSING}"] if name not in PATIENT else []
        run.do("; ".join(f"wandb_mirror.{what}" for what in changed) or "pass")
    started = {name: run.start() for name, run in runs.items()}
    for run in runs.values():
        run.do("record.log(0, {'loss': 1.0})")
    wait_for(lambda: all(servers[name].history for name, plan in plans.items() if plan[0] == "well"), 20)
    switch(1)
    many = "for step in range(1, 199): record.log(step, {'loss': 1 / step})"
    spent = {name: run.do(many) for name, run in runs.items()}
    for name, happened in (
        ("lets in", lambda server: server.history),
        ("refuses while closing", lambda s: s.held.is_set()),
    ):
        if name in plans:
            wait_for(lambda: runs[name].do("record.mirror.follow()") and happened(servers[name]), 30)  # noqa: B023
    for run in runs.values():
        run.do("record.log(199, {'loss': 0.0})")
    switch(2)
    families = {name: run.family for name, run in runs.items()}
    for run in runs.values():
        run.tell("record.close(failed=False)")
    closed = {name: run.answer() for name, run in runs.items()}
    ended = {name: run.end() for name, run in runs.items()}

    assert max(started.values()) < 20 and max(spent.values()) < 5
    limits = {name: wandb_mirror.CLOSE_SECONDS if name in PATIENT else CLOSING for name in plans}
    assert all(closed[name] < limit + 2 for name, limit in limits.items()), closed
    assert max(ended.values()) < SLACK, ended
    assert not [path for server in servers.values() for path, _ in server.bodies if "otel" in path], "telemetry"
    for name, run in runs.items():
        assert gone(families[name], 5), name
        assert [row["step"] for row in run.rows] == list(range(200)), name
        complete = name in LET_IN
        assert f"the upload is {'' if complete else 'not '}complete" in run.said, name
    if refused := runs.get("refuses"):
        assert closed["refuses"] < wandb_mirror.CLOSE_SECONDS - 10, "what is refused is not waited for"
        assert "returned error 401" in refused.said and "\x1b" not in refused.said
    if silent := runs.get("hangs"):
        assert silent.said.count("W&B: the server does not answer; ") == 1
    for name in plans.keys() & set(LET_IN):
        assert mirrored(*servers[name].history.values()) == recorded(runs[name].rows), name

    # What the server never got, or got in part, is there for the printed command.
    for name in plans.keys() & {"hangs", "dies in the middle", "refuses rows"}:
        later = serve()
        later.history |= {run: rows[:1] for run, rows in servers[name].history.items()}
        runs[name].sync(later.url)
        assert mirrored(*later.history.values()) == recorded(runs[name].rows), name


def test_without_a_key_nobody_is_asked_for_one(tmp_path: Path, serve: Any) -> None:
    """On a terminal, where wandb would ask."""
    server, (terminal, inside) = serve(), pty.openpty()
    script = """if True:
        import os, psutil, time
        from pathlib import Path
        from ztrain.config import TrackingConfig
        from ztrain.train.tracking import Record
        os.dup2(os.open(os.ttyname(1), os.O_RDWR), 0)
        record = Record(Path("run"), TrackingConfig(report_to="wandb"), {}, resumed_step=None)
        while any("python" in child.name() and child.status() != "zombie" for child in psutil.Process().children()):
            time.sleep(0.1)  # the uploader
        for step in range(3):
            record.log(step, {"loss": 1.0})
        record.close(failed=False)"""
    tty = Path(os.ttyname(inside))
    environment = environment_in(tmp_path, server.url, key="")
    assert the_forge().start(["-c", script], environment, tty, tty, tmp_path).wait(60) == 0
    said = os.read(terminal, 65536).decode()
    os.close(terminal)
    os.close(inside)
    assert said.count("W&B: the upload stopped (No API key configured. Use `wandb login` to log in.)") == 1
    assert "W&B: the upload is not complete (No API key" in said and len(said.splitlines()) == 2
    assert not server.bodies


def test_a_wandb_that_dies_or_hangs_takes_only_the_mirror_along(tmp_path: Path, serve: Any) -> None:
    server = {signal: serve() for signal in (signals.SIGKILL, signals.SIGSTOP)}
    runs = {signal: Training(tmp_path / signal.name, server[signal].url) for signal in server}
    for run in runs.values():
        run.do("wandb_mirror.LOCAL_SECONDS = 2")
        run.start()
        run.do("for step in range(10): record.log(step, {'loss': 1.0})")
    time.sleep(1)  # until wandb has written its file
    families = {signal: run.family for signal, run in runs.items()}
    for signal, run in runs.items():
        [core] = [p for p in psutil.Process(run.process.pid).children() if p.name() == "wandb-core"]
        core.send_signal(signal)
        assert run.do("for step in range(10, 100): record.log(step, {'loss': 1.0})") < 5
        run.tell("record.close(failed=False)")
    for signal, run in runs.items():
        assert run.answer() < 25 and run.end() < SLACK and gone(families[signal], 5)
        assert [row["step"] for row in run.rows] == list(range(100))
        assert run.said.count("wandb failed") == 1 and "the upload is not complete" in run.said
        run.sync(server[signal].url)
        assert recorded(run.rows[:10]).items() <= mirrored(*server[signal].history.values()).items()


def test_what_wandb_refuses_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    training = Training(tmp_path, "http://127.0.0.1:9")
    training.do("config = lambda **given: TrackingConfig(report_to='wandb', **given)")
    for bad in ("project='a/b'", "tags=['']"):
        training.do(f"""if True:
            try:
                Record(folder, config({bad}), {{}}, resumed_step=None)
            except InputError as error:
                print(error, file=sys.stderr)""")
    training.end()
    project, tags = training.said.splitlines()
    assert project.startswith("tracking: W&B cannot start: Invalid project name 'a/b'")
    assert tags.startswith("tracking: W&B cannot start: Value error, Tag at index 0 is empty")
    assert not (training.folder / "metrics.jsonl").exists(), "the same folder can be used once it is mended"


# --- the record -------------------------------------------------------------------------------------------------------


def record_in(folder: Path, resumed_step: int | None = None) -> Record:
    return Record(folder, TrackingConfig(), {}, resumed_step=resumed_step)


def test_without_wandb_it_is_not_even_imported(tmp_path: Path) -> None:
    training = Training(tmp_path, "http://127.0.0.1:9")
    training.do("record = Record(folder, TrackingConfig(), {}, resumed_step=None)")
    training.do("record.log(0, {'loss': 1.0}, grid=Path('none.png')); record.log_folder('a', 'model', [])")
    training.do("record.close(failed=False); assert 'wandb' not in sys.modules")
    training.end()
    assert training.rows == [{"step": 0, "loss": 1.0}] and not (training.folder / "wandb").exists()


def test_only_finite_numbers_in_order_are_recorded(tmp_path: Path) -> None:
    record = record_in(tmp_path / "run")
    record.log(0, {"loss": 0.1})
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="step 1: loss is"):
            record.log(1, {"lr": 1.0, "loss": wrong})
    with pytest.raises(ValueError, match="step 0 is not after step 0"):
        record.log(0, {"loss": 0.1})
    record.log(5, {"loss": 1e-300})
    record.close(failed=False)
    assert (
        tmp_path / "run" / "metrics.jsonl"
    ).read_bytes() == b'{"step": 0, "loss": 0.1}\n{"step": 5, "loss": 1e-300}\n'
    with pytest.raises(InputError, match="already holds a run"):
        record_in(tmp_path / "run")
    resumed = record_in(tmp_path / "run", resumed_step=5)
    with pytest.raises(ValueError, match="not after step 5"):
        resumed.log(5, {"loss": 0.1})
    resumed.close(failed=False)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), steps=st.lists(st.integers(0, 50), unique=True).map(sorted), resumed=st.integers(0, 50))
def test_a_resume_keeps_whole_rows_up_to_its_step_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, steps: list[int], resumed: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    rows = [b'{"step":%d,  "loss": 1.50}\n' % step for step in steps]  # not as json.dumps would write it
    # Killed while it wrote, even when only the line end was missing; or the machine lost power, and anything is there.
    last = rows[-1] if rows else b"\n"
    cut = data.draw(st.just(len(last) - 1) | st.integers(0, len(last) - 1))
    tail = data.draw(st.just(last[:cut]) | st.binary(max_size=40))
    path.write_bytes(b"".join(rows) + tail)
    record = record_in(path.parent, resumed_step=resumed)
    kept = b"".join(row for row, step in zip(rows, steps, strict=True) if step <= resumed)
    assert path.read_bytes() == kept
    record.log(51, {"loss": 2.0})
    record.close(failed=False)
    assert path.read_bytes() == kept + b'{"step": 51, "loss": 2.0}\n'
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_damage_before_the_end_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2 is no row"):
        record_in(tmp_path, resumed_step=2)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot keep the record in .*metrics.jsonl: Is a directory"):
        record_in(tmp_path, resumed_step=2)
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "wandb.json").write_text('{"id": "abc", "att')
    with pytest.raises(InputError, match=r"wandb.json is damaged; remove it"):
        Record(tmp_path, TrackingConfig(report_to="wandb"), {}, resumed_step=2)


def test_a_full_disk_is_one_sentence_and_never_half_a_row(tmp_path: Path) -> None:
    training = Training(tmp_path, "http://127.0.0.1:9")
    training.do("""if True:
        import resource
        record = Record(folder, TrackingConfig(), {}, resumed_step=None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (110, -1))
        try:
            for step in range(100):
                record.log(step, {"loss": 1.0})
        except InputError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            record.close(failed=True)
            print(step, error, file=sys.stderr)""")
    training.end()
    step, _, sentence = training.said.strip().partition(" ")
    assert sentence == (
        "cannot keep the record in run/metrics.jsonl: File too large; make room there, then resume from the last"
        " checkpoint"
    )
    path = tmp_path / "run" / "metrics.jsonl"
    assert path.stat().st_size == 110 and not path.read_bytes().endswith(b"\n"), "the disk took half a row"
    record_in(tmp_path / "run", resumed_step=100).close(failed=False)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(int(step)))


# --- what may be public -----------------------------------------------------------------------------------------------


def test_settings_lose_their_paths_and_secrets_and_nothing_else() -> None:
    config = Config().model_dump()
    assert public_config(config)["models"] == config["models"], "names of the Hub stay"
    key_map = {"siglip_pad_token": "their.token", "siglip_embedder.1.weight": "fc1.weight"}
    sha = "0123456789abcdef0123456789abcdef01234567"
    shown = public_config(
        {
            "data": {"train_data_dir": "/data/alice/pictures", "revision": sha},
            "cache": {"dir": "../of/alice/cache"},
            "resume_from_checkpoint": "~/runs/of alice/checkpoint-50",
            "adapters": [{"kind": "siglip", "init_file": "/home/alice/w.safetensors", "init_key_map": key_map}],
            "compare": {"adapters": ["/home/alice/a b/export"], "presets": ("/x/y.yaml",)},
            "target_modules": r"layers\.\d+\.(a|b)\.to_(q|k)",
            "tracking": {
                "notes": "from /home/alice/x, see https://me:pw@site/a/b and file:///home/alice/y",
                "tags": [],
            },
            "api_key": "abc",
            "db_passwords": 3,
            "hubToken": ["abc"],
            "a": sha,
            "b": "wandb_v1_abcDEF",
            "c": Path("/home/alice/z"),
            "d": 0.5,
            "e": None,
        }
    )
    assert shown == {
        "data": {"train_data_dir": "pictures", "revision": sha},
        "cache": {"dir": "cache"},
        "resume_from_checkpoint": "checkpoint-50",
        "adapters": [{"kind": "siglip", "init_file": "w.safetensors", "init_key_map": key_map}],
        "compare": {"adapters": ["export"], "presets": ["y.yaml"]},
        "target_modules": r"layers\.\d+\.(a|b)\.to_(q|k)",
        "tracking": {"notes": "from x, see https://***@site/a/b and y", "tags": []},
        "api_key": "***",
        "db_passwords": 3,
        "hubToken": "***",
        "a": "***",
        "b": "***",
        "c": "z",
        "d": 0.5,
        "e": None,
    }


words = st.text("abcdefgh-_. ", min_size=1, max_size=8)


@given(before=words, after=words, key=words | st.sampled_from(sorted(Config.model_fields)), deep=st.booleans())
def test_no_text_around_it_hides_a_path_or_a_token(before: str, after: str, key: str, deep: bool) -> None:
    for private, canary in (("/srv/of-alice/secret/x", "of-alice"), (SECRETS["HF_TOKEN"], SECRETS["HF_TOKEN"])):
        text = f"{before} {private} {after}"
        shown = public_config({key: {"inner": [text]} if deep else text})
        assert canary not in json.dumps(shown)
        assert canary not in public_text(text)
