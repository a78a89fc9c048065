"""The mirror of a run in W&B: a run in `<folder>/wandb`, and if online a second process that uploads it while it grows.

In: the rows, pictures and files of a Record. This process only writes that folder; the other one runs `wandb beta sync
--live`. So no server can hold training up, stop it or ask it for a key, an outage heals by itself, and what was not
uploaded waits for `wandb sync`. Trouble is told, never raised.
"""

import contextlib
import json
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
from typing import Any

import psutil
from pydantic import ValidationError

from ztrain.config import TrackingConfig
from ztrain.errors import InputError
from ztrain.io.files import write_json
from ztrain.privacy import public_config

# A server that was silent for so long is told about, and close() waits so long for the last rows to arrive.
SILENT_SECONDS = 20.0
CLOSE_SECONDS = 28.0
# An uploader gives up when it is refused, or after some 15 minutes without a server; so often a new one is started.
RETRY_SECONDS = 600.0
# Writing the last records is local work of milliseconds; only a wandb-core that hangs takes longer, and is ended.
LOCAL_SECONDS = 8.0
# How old the rows may be that the uploader finds; wandb's own default is 15.
FLUSH_SECONDS = 2.0

# Quiet, and nothing about this machine: only what is logged.
_SETTINGS: dict[str, Any] = {
    **{"mode": "offline", "silent": True, "console": "off", "symlink": False, "host": "", "disable_code": True},
    **{"disable_git": True, "disable_job_creation": True, "x_disable_machine_info": True, "x_disable_meta": True},
    **{"x_disable_stats": True, "x_save_requirements": False},
}

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


class Mirror:
    """The W&B run: a folder that this process writes, and a process that uploads it. Trouble is told, never raised."""

    def __init__(self, folder: Path, tracking: TrackingConfig, config: dict[str, Any], *, fresh: bool) -> None:
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        self._wandb, self._folder, self._online = wandb, folder, tracking.mode == "online"
        self._deaths = (OSError, HandleAbandonedError, MailboxClosedError)
        words = public_config(tracking.model_dump())
        self._id, self._attempt = _start_of(folder / "wandb.json", tracking.project, fresh=fresh)
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
                settings=wandb.Settings(**_SETTINGS, x_transaction_log_flush_interval=FLUSH_SECONDS),
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
        logged: dict[str, Any] = values | {"trainer/global_step": step, "trainer/attempt": self._attempt}
        if grid is not None:
            logged["val/grid"] = self._wandb.Image(str(grid))
        if table:
            cells = [[self._wandb.Image(str(c)) if isinstance(c, Path) else c for c in row.values()] for row in table]
            logged["val/table"] = self._wandb.Table(columns=list(table[0]), data=cells)
        with self._survived():
            # Never with step=: W&B drops rows whose step goes back, as it does after a resume.
            self._run.log(logged)
        self.follow()

    def log_files(self, name: str, kind: str, files: Sequence[Path]) -> None:
        if not self._alive:
            return
        artifact = self._wandb.Artifact(name, type=kind)
        with self._survived():
            for file in files:
                artifact.add_file(str(file), name=file.name)
            self._run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
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
        watchdog = threading.Timer(LOCAL_SECONDS, self._kill_core)
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

    def follow(self) -> None:
        """Tells, once each, where the run can be seen and that the upload does not get on."""
        if self._uploader is None:
            return
        if self._uploader.poll() is not None:
            self._warn(f"the upload stopped{self._reason()}")
            if time.monotonic() > self._began + RETRY_SECONDS:
                self._uploader = self._start_uploader()
        elif not self._greeted:
            if address := self._address():
                self._greeted = True
                _say(address)
            elif time.monotonic() > self._began + SILENT_SECONDS:
                self._warn("the server does not answer; it is asked again until it does")

    def _warn(self, trouble: str) -> None:
        if not self._warned:
            self._warned = True
            _say(f"{trouble}; training goes on, and the run can be uploaded later with: {self._command()}")

    def _end_upload(self, deadline: float) -> bool:
        """Whether everything arrived. The uploader is gone afterwards."""
        assert self._uploader is not None
        alive = self._uploader.poll() is None
        if not (alive and (self._arrived(deadline) or self._uploader.returncode < 0)):
            # It gave up long ago, or ended now with an error as it was refused before: now may be better.
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


def _marker(folder: Path) -> list[Path]:
    """The file by which wandb marks a run folder as uploaded, if it is there."""
    return list(folder.glob("*.wandb.synced"))


def _start_of(path: Path, project: str, *, fresh: bool) -> tuple[str, int]:
    """The W&B id of the run and how often it was started, this time included, kept in wandb.json."""
    run, attempt = secrets.token_hex(4), 1
    if not fresh and path.exists():
        try:
            kept = json.loads(path.read_bytes())
            run, attempt = str(kept["id"]), int(kept["attempt"]) + 1
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged; remove it, and W&B gets a new run") from error
    write_json(path, {"id": run, "attempt": attempt, "project": project}, sync=True)
    return run, attempt


def _say(text: str) -> None:
    # Servers have their words in it: no escape sequence reaches the terminal.
    print("W&B: " + "".join(c for c in text if c.isprintable()), file=sys.stderr, flush=True)
