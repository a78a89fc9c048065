"""The record of a run: metrics.jsonl, and its mirror in W&B.

In: numbers, pictures and files of the main process. Out: `<folder>/metrics.jsonl`, one strict JSON object a step, and
if asked a W&B run in `<folder>/wandb`. This process only writes that folder; online, a second one uploads it while it
grows (`wandb beta sync --live`). So no server can hold training up, stop it or ask it for a key, an outage heals by
itself, and what was not uploaded waits for `wandb sync`.
"""

import contextlib
import json
import math
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import ValidationError

from ztrain.config import TrackingConfig
from ztrain.errors import InputError
from ztrain.files import write_bytes, write_json
from ztrain.privacy import public_config

# A server that was silent for so long is told about, and close() waits so long for the last rows to arrive.
_SILENT_SECONDS = 20.0
_CLOSE_SECONDS = 28.0
# An uploader gives up when it is refused, or after some 15 minutes without a server; so often a new one is started.
_RETRY_SECONDS = 600.0
# Writing the last records is local work of milliseconds; only a wandb-core that hangs takes longer, and is ended.
_LOCAL_SECONDS = 8.0
# How old the rows may be that the uploader finds; wandb's own default is 15.
_FLUSH_SECONDS = 2.0

# `wandb sync` would send its own path as the run's program.
_PRIVATE = {"WANDB_PROGRAM": "ztrain"}

# Arguments: the training process, the folder of this start, and those of earlier starts that are not uploaded yet.
# They go first, because rows are appended to the run. A live upload would wait forever for a training that was killed.
_UPLOADER = """
import os, signal, sys, threading, time

training, current, *earlier = sys.argv[1:]

def end_with_training():
    while os.getppid() == int(training):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=end_with_training, daemon=True).start()
from wandb.cli.cli import cli
from wandb.errors import Error

try:
    if earlier:
        cli(["beta", "sync", *earlier], standalone_mode=False)
    cli(["beta", "sync", "--live", current], standalone_mode=False)
except Error as error:
    print(f"wandb: ERROR {error}")
"""


class Record:
    """metrics.jsonl, and its mirror in W&B. For the main process only."""

    def __init__(
        self, folder: Path, tracking: TrackingConfig, config: dict[str, Any], *, resumed_step: int | None
    ) -> None:
        """`resumed_step` None: a fresh run, in a folder without metrics.jsonl. Otherwise rows after that step are
        dropped, as is a last line that was never finished; the rows that stay keep their bytes."""
        self._path = folder / "metrics.jsonl"
        with _explained(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            if resumed_step is None and self._path.exists():
                raise InputError(f"{self._path} already holds a run; name another folder or resume it")
            self._last_step = -1 if resumed_step is None else _cut(self._path, resumed_step)
        fresh = resumed_step is None
        self._mirror = _Mirror(folder, tracking, config, fresh=fresh) if tracking.report_to == "wandb" else None
        with _explained(self._path):
            self._file = open(self._path, "ab", buffering=0)

    def log(
        self,
        step: int,
        values: dict[str, float],
        *,
        grid: Path | None = None,
        table: Sequence[dict[str, str | Path]] | None = None,
    ) -> None:
        """Writes one row. `grid` and `table` go to W&B only; paths in the table's cells become pictures."""
        if step <= self._last_step:
            raise ValueError(f"step {step} is not after step {self._last_step}, the last one in {self._path.name}")
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"step {step}: {name} is {value}; only finite numbers are recorded")
        assert "step" not in values
        row = json.dumps({"step": step} | values, allow_nan=False).encode() + b"\n"
        with _explained(self._path):
            while row:  # a full disk may take a part before it refuses the rest
                row = row[self._file.write(row) :]
        self._last_step = step
        if self._mirror:
            self._mirror.log(step, values, grid, table)

    def rows(self) -> list[dict[str, float]]:
        """All that was recorded, one row a step with its `step`."""
        return [json.loads(line) for line in self._path.read_bytes().splitlines()]

    def log_folder(self, name: str, kind: Literal["model", "dataset"], files: Sequence[Path]) -> None:
        """Adds files to the W&B run as one artifact; `name` of letters, digits, dashes, underscores and dots."""
        if self._mirror:
            self._mirror.log_files(name, kind, files)

    def close(self, *, failed: bool) -> None:
        self._file.close()
        if self._mirror:
            self._mirror.close(failed)


class _Mirror:
    """The W&B run: a folder that this process writes, and a process that uploads it. Trouble is told, never raised."""

    def __init__(self, folder: Path, tracking: TrackingConfig, config: dict[str, Any], *, fresh: bool) -> None:
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        self._wandb, self._folder, self._online = wandb, folder, tracking.mode == "online"
        self._deaths = (OSError, HandleAbandonedError, MailboxClosedError)
        words = public_config(tracking.model_dump())
        started = _start_of(folder / "wandb.json", tracking.project, fresh=fresh)
        self._id, self._attempt = started["id"], started["attempt"]
        # Files of artifacts and tables are staged beside the run, so that they are there when it is synced later.
        os.environ["WANDB_DATA_DIR"] = str((folder / "wandb").resolve())
        # wandb sends tracebacks, and so paths, of what fails in its own code, and delays the exit for it.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            wandb.setup(wandb.Settings(mode="offline", silent=True))
            self._run = wandb.init(
                dir=folder,
                id=self._id,
                resume="allow",
                name=words["name"] or folder.resolve().name,
                config=public_config(config),
                settings=_mirror_settings(wandb),
                **{word: words[word] for word in ("project", "entity", "group", "tags", "notes")},
            )
        except (wandb.errors.Error, ValidationError, OSError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise InputError(f"tracking: W&B cannot start: {reason}; mend it or set tracking.report_to none") from error
        self._core = [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]
        self._run_folder = Path(self._run.dir).parent
        self._keep_paths_private()
        self._run.define_metric("trainer/global_step")
        self._run.define_metric("*", step_metric="trainer/global_step")
        self._alive, self._greeted, self._warned = True, False, False
        self._uploader = self._start_uploader() if self._online else None

    def _keep_paths_private(self) -> None:
        """W&B uploads where each file of an artifact was staged: relative to the run's folder says nothing."""
        log_artifact: Callable[..., Any] = self._run.log_artifact

        def log_relative(artifact: Any, *args: Any, **kwargs: Any) -> Any:
            for entry in artifact.manifest.entries.values():
                entry.local_path = os.path.relpath(entry.local_path, self._folder)
            return log_artifact(artifact, *args, **kwargs)

        # Replaced on the object because tables are logged as artifacts inside wandb.
        self._run.log_artifact = log_relative

    def log(
        self,
        step: int,
        values: dict[str, float],
        grid: Path | None,
        table: Sequence[dict[str, str | Path]] | None,
    ) -> None:
        if not self._alive:
            return
        row: dict[str, Any] = values | {"trainer/global_step": step, "trainer/attempt": self._attempt}
        if grid is not None:
            row["val/grid"] = self._wandb.Image(str(grid))
        if table:
            columns = list(table[0])
            cells = [[self._cell(line[column]) for column in columns] for line in table]
            row["val/table"] = self._wandb.Table(columns=columns, data=cells)
        with self._survived():
            # Never with step=: W&B drops rows whose step goes back, as it does after a resume.
            self._run.log(row)
        self._follow()

    def _cell(self, value: str | Path) -> Any:
        return self._wandb.Image(str(value)) if isinstance(value, Path) else value

    def log_files(self, name: str, kind: str, files: Sequence[Path]) -> None:
        if not self._alive:
            return
        artifact = self._wandb.Artifact(name, type=kind)
        with self._survived():
            for file in files:
                artifact.add_file(str(file), name=file.name)
            self._run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        deadline = time.monotonic() + _CLOSE_SECONDS
        self._end_run(failed)
        if not self._alive:
            deadline = time.monotonic()  # the uploader would wait for an end that was never written
        uploaded = self._uploader is not None and self._end_upload(deadline)
        self._sweep(uploaded)
        if uploaded:
            _say(f"the upload is complete: {self._address()}")
        else:
            unfinished = f"the upload is not complete{self._reason()}" if self._online else "the run was kept offline"
            kept = "all of it is kept" if self._alive else "a part of it is kept"
            _say(f"{unfinished}; {kept}, upload it with: {self._command()}")

    def _sweep(self, uploaded: bool) -> None:
        """Removes logs of wandb, which name paths of this machine, and copies of files that the server has."""
        folder = self._folder / "wandb"
        useless = [folder / "logs", *folder.glob("offline-run-*/logs"), *([folder / "artifacts"] if uploaded else [])]
        for each in useless:
            shutil.rmtree(each, ignore_errors=True)
        for log in folder.glob("debug-cli.*.log"):
            log.unlink()

    def _end_run(self, failed: bool) -> None:
        """Writes what is left and ends wandb-core, one way or the other."""
        watchdog = threading.Timer(_LOCAL_SECONDS, self._kill_core)
        watchdog.start()
        with self._survived():
            self._run.finish(exit_code=int(failed))
        with self._survived():
            self._wandb.teardown()
        watchdog.cancel()

    def _kill_core(self) -> None:
        for core in self._core:
            with contextlib.suppress(psutil.NoSuchProcess):
                core.kill()

    @contextlib.contextmanager
    def _survived(self) -> Iterator[None]:
        """A wandb-core that died, or a disk too full for pictures, ends the mirror and not the training."""
        try:
            yield
        except self._deaths as error:
            if self._alive:
                _say(f"wandb failed ({str(error) or type(error).__name__}); from here on only metrics.jsonl is written")
            self._alive = False

    # --- uploading --------------------------------------------------------------------------------------------------

    def _start_uploader(self) -> subprocess.Popen:
        current = self._run_folder
        waiting = sorted(run.parent for run in (self._folder / "wandb").glob(f"offline-run-*-{self._id}*/*.wandb"))
        earlier = [folder for folder in waiting if folder.name != current.name and not _marker(folder)]
        self._uploading, self._began = [*earlier, current], time.monotonic()
        inherited = {name: value for name, value in os.environ.items() if name not in ("WANDB_SERVICE", "WANDB_DIR")}
        spoken = {"WANDB_MODE": "online", "WANDB_SILENT": "false", "WANDB_QUIET": "false"}
        folders = [f"wandb/{folder.name}" for folder in (current, *earlier)]
        with open(self._folder / "wandb" / "upload.log", "wb") as log:
            return subprocess.Popen(
                # -P: the folder it runs in has a wandb/ that is no package.
                [sys.executable, "-P", "-c", _UPLOADER, str(os.getpid()), *folders],
                cwd=self._folder,
                env=inherited | spoken | _PRIVATE,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the training's to answer
            )

    def _follow(self) -> None:
        """Tells, once each, where the run can be seen and that the upload does not get on."""
        if self._uploader is None:
            return
        if self._uploader.poll() is not None:
            self._warn(f"the upload stopped{self._reason()}")
            if time.monotonic() > self._began + _RETRY_SECONDS:
                self._uploader = self._start_uploader()
        elif not self._greeted:
            if address := self._address():
                self._greeted = True
                _say(address)
            elif time.monotonic() > self._began + _SILENT_SECONDS:
                self._warn("the server does not answer; it is asked again until it does")

    def _warn(self, trouble: str) -> None:
        if not self._warned:
            self._warned = True
            _say(f"{trouble}; training goes on, and the run can be uploaded later with: {self._command()}")

    def _end_upload(self, deadline: float) -> bool:
        """Whether everything arrived. The uploader is gone afterwards."""
        assert self._uploader is not None
        asked_before = self._uploader.poll() is None
        if not asked_before:
            # It gave up long ago, or was killed: now may be better.
            self._uploader = self._start_uploader()
        if not self._arrived(deadline) and asked_before and self._uploader.returncode >= 0:
            # What ended now with an error may have been refused before, and be let in now.
            self._uploader = self._start_uploader()
            self._arrived(deadline)
        return bool(_marker(self._run_folder))

    def _arrived(self, deadline: float) -> bool:
        """Waits for the uploader, which is gone afterwards: killed, with a negative return code, at the deadline."""
        assert self._uploader is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._uploader.wait(deadline - time.monotonic())
        self._uploader.kill()
        self._uploader.wait()
        # wandb marks a run as uploaded even after an error that lost rows, and leaves with status 0.
        if self._errors():
            for folder in self._uploading:
                for marker in _marker(folder):
                    marker.unlink()
        return bool(_marker(self._run_folder))

    def _upload_log(self) -> str:
        return (self._folder / "wandb" / "upload.log").read_text(encoding="utf-8", errors="replace")

    def _address(self) -> str:
        seen = re.search(r"View run .* at (\S+)", self._upload_log())
        return seen[1] if seen else ""

    def _errors(self) -> list[str]:
        return re.findall(r"^wandb: ERROR (.*)", self._upload_log(), re.MULTILINE)

    def _reason(self) -> str:
        errors = self._errors()
        return f" ({errors[-1].strip()})" if errors else ""

    def _command(self) -> str:
        """Uploads every start of the run that is not uploaded yet, in order."""
        private = " ".join(f"{name}={value}" for name, value in _PRIVATE.items())
        return f"(cd {shlex.quote(os.path.relpath(self._folder))} && {private} wandb sync wandb)"


def _mirror_settings(wandb: Any) -> Any:
    """Quiet, and nothing about this machine: only what is logged."""
    return wandb.Settings(
        mode="offline",
        silent=True,
        console="off",
        symlink=False,
        host="",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=_FLUSH_SECONDS,
    )


def _marker(folder: Path) -> list[Path]:
    """The file by which wandb marks a run folder as uploaded, if it is there."""
    return list(folder.glob("*.wandb.synced"))


def _start_of(path: Path, project: str, *, fresh: bool) -> dict[str, Any]:
    """The W&B id of the run and how often it was started, this time included, kept in wandb.json."""
    with _explained(path):
        started: dict[str, Any] = {"id": secrets.token_hex(4), "attempt": 0}
        if not fresh and path.exists():
            try:
                kept = json.loads(path.read_bytes())
                started = {"id": str(kept["id"]), "attempt": int(kept["attempt"])}
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is damaged; remove it, and W&B gets a new run") from error
        started |= {"project": project, "attempt": started["attempt"] + 1}
        write_json(path, started, sync=True)
    return started


def _say(text: str) -> None:
    # Servers have their words in it: no escape sequence reaches the terminal.
    print("W&B: " + "".join(c for c in text if c.isprintable()), file=sys.stderr, flush=True)


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot keep the record in {path}: {reason}; make room there, then resume from the last checkpoint"
        ) from error


def _cut(path: Path, step: int) -> int:
    """Keeps the rows up to `step` and gives the last of their steps."""
    content = path.read_bytes() if path.exists() else b""
    lines = content.split(b"\n")[:-1]  # what has no line end was never finished
    steps = [_step_of(line) for line in lines]
    # A machine that lost power may leave anything at the end of a file, but not in its middle.
    readable = next((number for number, found in enumerate(steps) if found is None), len(lines))
    if any(found is not None for found in steps[readable:]):
        raise InputError(f"{path}:{readable + 1} is no row of metrics; restore it or remove the line")
    kept = [(found, line) for found, line in zip(steps, lines, strict=True) if found is not None and found <= step]
    if content != (rows := b"".join(line + b"\n" for _, line in kept)):
        write_bytes(path, rows, sync=True)
    return kept[-1][0] if kept else -1


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
