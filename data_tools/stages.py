"""Steps of a build over tables of any length: the same stage alone, on all cores or on a cluster, with the same bytes.

A stage is a picklable callable: rows in, the columns that it adds to each of them out. A table is a folder of Parquet
shards and `table.json`. Each shard that comes out is named by the one that went in and by all that decides the stage,
and appears whole or not at all: what an interrupted run has made stays, and the next one makes only what is missing.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from tqdm import tqdm

from data_tools.output import arrow_file, fingerprint
from ztrain.errors import InputError
from ztrain.interrupt import Stopped, unheard_by_children, work_for_parent
from ztrain.io.files import read_bytes, whole_file, workspace, write_text, writing

TABLE_NAME = "table.json"
_SHARD = re.compile(r"[0-9a-f]{32}")
Row: TypeAlias = Mapping[str, Any]


class Stage(Protocol):
    """One step. Small before its first call: it travels to every worker, and loads models there."""

    name: ClassVar[str]
    rules: ClassVar[int]
    """Raised when the same rows and config come to give others."""

    @property
    def adds(self) -> pa.Schema:
        """Columns that it gives, in the place of those of the same name."""

    @property
    def about(self) -> Mapping[str, Any]:
        """All that decides what it makes of a row, as JSON holds it."""

    def __call__(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The columns that it adds, of each row."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table on disk."""

    folder: Path
    shards: tuple[str, ...]
    """Names without extension, in the order of their rows."""
    roots: Mapping[str, Path] = field(default_factory=dict)
    """Label -> folder or file that its pictures lie in."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the stages before have to say, as JSON holds it."""

    @classmethod
    def open(cls, folder: Path) -> "Table":
        """Raises InputError where there is none, or one that is not finished."""
        path = folder / TABLE_NAME
        try:
            found = json.loads(read_bytes(path, "record"))
            roots = {label: folder / place for label, place in found["sources"].items()}
            table = cls(folder, tuple(found["shards"]), roots, found["facts"])
        except FileNotFoundError as error:
            raise InputError(f"{folder}: holds no finished table; run the stage that makes it") from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not the list of a table ({error}); delete it and run its stage again") from error
        for shard in table.shards:
            if not table.path(shard).is_file():
                raise InputError(f"{table.path(shard)}: is missing; run the stage that makes it again")
        return table

    def path(self, shard: str) -> Path:
        return self.folder / f"{shard}.parquet"

    @property
    def columns(self) -> frozenset[str]:
        """Names; raises InputError for a damaged shard."""
        return frozenset(name for shard in self.shards[:1] for name in read_schema(self.path(shard)).names)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows in order, of these columns. Raises InputError for a damaged shard."""
        return pa.concat_tables([read_shard(self.path(shard), columns) for shard in self.shards])

    def lengths(self) -> list[int]:
        """Rows of each shard. Raises InputError for a damaged one."""
        return [read_metadata(self.path(shard)).num_rows for shard in self.shards]

    def derived(self, out: Path, shards: Iterable[str], facts: Mapping[str, Any]) -> "Table":
        """A table that is made of this one; facts: beside its own. Raises InputError where one would be written over
        the other."""
        if out.resolve() == self.folder.resolve():
            raise InputError(f"{out}: holds the table that is read; choose another --out")
        return Table(out, tuple(shards), self.roots, {**self.facts, **facts})

    def close(self) -> None:
        """Writes the list of shards, and removes those of earlier inputs, nothing else."""
        # Relative: no path of this machine, and folders that move together stay together.
        sources = {label: os.path.relpath(root, self.folder) for label, root in self.roots.items()}
        document = {"shards": self.shards, "sources": sources, "facts": self.facts}
        write_text(self.folder / TABLE_NAME, json.dumps(document, indent=1) + "\n")  # in ASCII: paths may be no UTF-8
        current = set(self.shards)
        for path in self.folder.glob("*.parquet"):
            if path.stem not in current and _SHARD.fullmatch(path.stem):
                path.unlink(missing_ok=True)


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Raises InputError for a damaged shard, and for columns that it does not have."""
    if lacking := [name for name in columns or () if name not in read_schema(path).names]:
        raise InputError(f"{path.parent}: has no column {', '.join(lacking)}; run the stage that makes it first")
    try:
        with arrow_file(path) as source:
            return pq.read_table(source, columns=None if columns is None else list(columns), partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from error


def read_schema(path: Path) -> pa.Schema:
    """Raises InputError for a damaged shard."""
    return read_metadata(path).schema.to_arrow_schema()


def read_metadata(path: Path) -> pq.FileMetaData:
    """Raises InputError for a damaged shard."""
    try:
        with arrow_file(path) as source:
            return pq.read_metadata(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: damaged ({str(error).splitlines()[0]}); delete it and run its stage again")


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A scratch folder inside the folder of a table, which is made where it is not there. Raises InputError, also for
    what cannot be written while it is there."""
    with writing(out), workspace(out) as scratch:
        yield scratch


def write_shard(rows: pa.Table, path: Path, scratch: Path) -> None:
    """Whole or not at all. `scratch`: a folder of this process on the same file system."""
    with whole_file(path, sync=True, scratch=scratch) as place, arrow_file(place, "w") as made:
        pq.write_table(rows, made, compression="zstd")


def identity(stage: Stage) -> str:
    """Hash of all that decides what a stage makes of a row."""
    return fingerprint(stage.name, stage.rules, stage.about)


# --- engines ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """A shard to make of another."""

    source: Path
    target: Path
    scratch: Path


Engine: TypeAlias = Callable[[Stage, Sequence[Task], int], Iterator[int]]
"""Makes shards, by so many workers, in any order; yields the rows of each as it is done."""


def make_shard(stage: Stage, task: Task) -> int:
    """Returns the number of rows that went in."""
    table = read_shard(task.source)
    schema = pa.schema([*(known for known in table.schema if known.name not in stage.adds.names), *stage.adds])
    rows = table.to_pylist()
    made = [row | dict(added) for row, added in zip(rows, stage(rows), strict=True)]
    write_shard(pa.Table.from_pylist(made, schema), task.target, task.scratch)
    return table.num_rows


_held: list[Stage] = []  # of a worker process: the stage with the models that it has loaded


def _hold(stage: Stage) -> None:
    work_for_parent()
    _held[:] = [stage]


def _make_held(task: Task) -> int:
    return make_shard(_held[0], task)


def run_here(stage: Stage, tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """On this machine, in `workers` processes; with one, in this one."""
    if workers == 1 or len(tasks) < 2:
        yield from (make_shard(stage, task) for task in tasks)
        return
    # Spawned: a fork would take the threads of libraries along in an unknown state.
    with ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=get_context("spawn"), initializer=_hold, initargs=(stage,)
    ) as pool:
        try:
            with unheard_by_children():
                futures = [pool.submit(_make_held, task) for task in tasks]
            for future in as_completed(futures):
                yield future.result()
        except Stopped:
            for worker in active_children():
                worker.kill()
            raise
        except BrokenProcessPool as error:
            raise InputError(
                f"{stage.name}: a worker was killed, perhaps for memory; lower --workers and run again, what was"
                " finished is kept"
            ) from error
        finally:  # where one has failed, the others are not begun
            pool.shutdown(cancel_futures=True)


class _RayWorker:
    """An actor: holds the stage, and so its models, and makes one shard after the other."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        import numpy as np

        paths = zip(batch["source"], batch["target"], batch["scratch"], strict=True)
        return {"rows": np.array([make_shard(self.stage, Task(*map(Path, each))) for each in paths])}


def run_on_ray(stage: Stage, tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """On Ray Data: the cluster that `ray` finds, or one that it starts here. Folders must be shared by its machines."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray: Ray is not installed; pip install 'ztrain[ray]'") from error
    if not tasks:
        return
    paths = [
        {"source": str(t.source.resolve()), "target": str(t.target.resolve()), "scratch": str(t.scratch.resolve())}
        for t in tasks
    ]
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one for all engines
    rows = ray.data.from_items(paths).map_batches(
        _RayWorker, fn_constructor_args=(stage,), batch_size=1, concurrency=min(workers, len(tasks))
    )
    for row in rows.iter_rows():
        yield int(row["rows"])


ENGINES: Mapping[str, Engine] = {"local": run_here, "ray": run_on_ray}


def default_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a step is run, which decides none of its rows."""

    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: Ray Data, on a cluster that shares the folders."""
    workers: int | None = None
    """Processes or actors; None takes as many as there are cores, and one where a model is held."""
    folder: tyro.conf.Suppress[Path] = Path(".")
    """What relative paths of the rules are relative to."""


def run_stage(
    stage: Stage, source: Table, out: Path, run: Run, *, workers: int | None = None, facts: Mapping[str, Any] = {}
) -> Table:
    """The table that a stage makes of `source`, in the folder `out`; shards that are there already are kept.

    workers: where `run` says nothing, None for the number of cores; facts: beside those of `source`. Raises InputError;
    what was finished before it stays.
    """
    if run.workers is not None and run.workers < 1:
        raise InputError(f"workers {run.workers} must be at least 1")
    names = _names(source, identity(stage))
    table = source.derived(out, names.values(), facts)
    with scratch_folder(out) as scratch:
        missing = [
            Task(source.path(shard), table.path(name), scratch)
            for shard, name in names.items()
            if not table.path(name).exists()
        ]
        rows = {task: read_metadata(task.source).num_rows for task in missing}
        missing.sort(key=lambda task: -rows[task])  # the largest first: at the end no worker waits long for another
        with tqdm(total=sum(rows.values()), desc=stage.name, unit="row", disable=None) as bar:
            for done in ENGINES[run.engine](stage, missing, run.workers or workers or default_workers()):
                bar.update(done)
    table.close()
    return table


def _names(source: Table, about: str) -> dict[str, str]:
    """Shard -> the one that is made of it; about: hash of all else that decides it."""
    return {shard: hashlib.blake2b(f"{shard} {about}".encode(), digest_size=16).hexdigest() for shard in source.shards}


def attach(
    source: Table, out: Path, columns: pa.Table, *, name: str, about: Any, facts: Mapping[str, Any] = {}
) -> Table:
    """The table `source` with further columns that all of its rows decide, as one table in the order of its rows;
    facts: beside those of `source`."""
    names, start = _names(source, fingerprint(name, about, source.shards)), 0
    table = source.derived(out, names.values(), facts)
    with scratch_folder(out) as scratch:
        for shard, made in names.items():
            rows = read_shard(source.path(shard))
            for added in columns.schema:
                values = columns[added.name].slice(start, rows.num_rows).combine_chunks()
                place = rows.schema.get_field_index(added.name)
                rows = rows.append_column(added, values) if place < 0 else rows.set_column(place, added, values)
            start += rows.num_rows
            if not table.path(made).exists():
                write_shard(rows, table.path(made), scratch)
    table.close()
    return table
