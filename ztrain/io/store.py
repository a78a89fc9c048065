"""Tensors on disk by key: safetensors shards with a Parquet index, written by any number of processes.

A store is one folder. `<shard>.safetensors` holds the tensors of some entries, `index/<shard>.parquet` says what they
are, with an xxh3 of each tensor's bytes. A shard counts once its index is there, so whatever an interrupted writer
leaves behind is not seen. Every read is checked against the index. Knows nothing of pictures or models.
"""

import contextlib
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ztrain.errors import InputError
from ztrain.io.files import as_text, cannot_write, check_regular, publish, readable

_INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),  # what messages call the entry; no path of this machine
        ("shard", pa.string()),  # file name, empty for a refused entry
        ("shard_bytes", pa.int64()),
        ("parts", pa.list_(pa.string())),  # names of the entry's tensors
        ("xxh3", pa.list_(pa.string())),  # of each
        ("refused", pa.string()),  # why there is no entry, empty where there is one
    ]
)
_COMPACT_FROM = 64  # index files; fewer are read in milliseconds
_MERGED = "0-merged-"  # sorts before every other name: a shard that was computed again since then wins
_OPEN_SHARDS = 64  # memory-mapped files that one process keeps open


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Tensors by part name, or the sentence that says why there are none."""

    key: str
    label: str
    parts: Mapping[str, Tensor]
    refused: str = ""


class Store:
    """One folder of entries. `reload` sees what other processes have published since."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: dict[str, pa.Table] = {}  # index file -> its rows
        self._places: dict[str, tuple[str, int]] = {}  # key -> index file and row
        self._read_files: dict[str, int] = {}
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()  # loader workers are threads
        self.reload()

    def reload(self) -> None:
        """Reads index files that are new. One that vanishes meanwhile was merged into another, so looks again."""
        while True:
            try:
                for path in sorted((self.folder / "index").glob("*.parquet")):
                    number = path.stat().st_ino  # a shard that is written again comes with a new index file
                    if self._read_files.get(path.name) != number:
                        self._add(path.name, path)
                        self._read_files[path.name] = number
            except FileNotFoundError:
                continue
            return

    def _add(self, name: str, path: Path) -> None:
        _check_access(path)
        try:
            table = read_parquet(path, _INDEX)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise InputError(
                f"{path}: damaged cache index ({str(error).splitlines()[0]}); delete it and run `ztrain cache` again"
            ) from error
        self._tables[name] = table
        with self._lock:
            self._open.clear()  # a shard that was written again must not be read through its old file
        shards = {shard for shard in table["shard"].unique().to_pylist() if shard}
        gone = {shard for shard in shards if not (self.folder / shard).exists()}
        merged = name.startswith(_MERGED)
        for row, (key, shard) in enumerate(zip(table["key"].to_pylist(), table["shard"].to_pylist(), strict=True)):
            if shard in gone or (merged and key in self._places):  # entries of a deleted shard are computed again
                continue
            self._places[key] = (name, row)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def _row(self, key: str) -> dict[str, Any]:
        name, row = self._places[key]
        return self._tables[name].slice(row, 1).to_pylist()[0]

    def refusals(self, keys: Sequence[str]) -> dict[str, str]:
        """Key -> reason of the entries that could not be made."""
        reasons = {name: table["refused"].to_pylist() for name, table in self._tables.items()}
        found = {key: reasons[self._places[key][0]][self._places[key][1]] for key in keys if key in self._places}
        return {key: reason for key, reason in found.items() if reason}

    def read(self, key: str) -> dict[str, Tensor]:
        """The entry's tensors, on the CPU. Raises InputError naming shard and entry where the bytes are not as
        written, KeyError for a key that is not there."""
        return self._read(self._row(key))

    def _read(self, row: Mapping[str, Any], only: str | None = None) -> dict[str, Tensor]:
        """The tensors of an index row, or one of them, after comparing their hashes."""
        path, parts = self.folder / row["shard"], {}
        try:
            file = self._shard(path, row["shard_bytes"])
            for part, expected in zip(row["parts"], row["xxh3"], strict=True):
                if only in (None, part):
                    parts[part] = file.get_tensor(_tensor_name(row["key"], part))
                    if _hash(parts[part]) != expected:
                        raise InputError(
                            _damaged(path, f"the bytes of {row['label']} are not the ones that were written")
                        )
        except (SafetensorError, OSError) as error:
            raise InputError(_damaged(path, str(error))) from error
        return parts

    def shapes(self, part: str, workers: int) -> dict[str, tuple[int, ...]]:
        """Shape of one part of every entry, by key, from the shards' headers alone. Raises InputError as `read`."""

        def look_into(shard: tuple[str, int]) -> list[tuple[str, tuple[int, ...]]]:
            path = self.folder / shard[0]
            try:
                with _open_shard(path, shard[1]) as file:
                    names = ((key, _tensor_name(key, part)) for key in shards[shard])
                    return [(key, tuple(file.get_slice(name).get_shape())) for key, name in names]
            except (SafetensorError, OSError) as error:
                raise InputError(_damaged(path, str(error))) from error

        shards: dict[tuple[str, int], list[str]] = {}  # by file name and bytes
        for key, shard, size, _ in self._entries(part):
            shards.setdefault((shard, size), []).append(key)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            return dict(entry for found in pool.map(look_into, shards) for entry in found)

    def shared(self, part: str) -> dict[str, Tensor]:
        """One part of every entry, by key. Entries with the same bytes, as their hashes say, share a tensor: it is
        read once. For small parts that differ little; raises InputError as `read`."""
        tensors: dict[str, Tensor] = {}
        found = {}
        for key, _, _, expected in self._entries(part):
            if expected not in tensors:
                tensors[expected] = self._read(self._row(key), part)[part]
            found[key] = tensors[expected]
        return found

    def _entries(self, part: str) -> Iterator[tuple[str, str, int, str]]:
        """Key, shard, its bytes and the hash of that part of every entry that was not refused."""
        for name, table in self._tables.items():
            columns = (table[column].to_pylist() for column in ("key", "shard", "shard_bytes", "parts", "xxh3"))
            for row, (key, shard, size, parts, hashes) in enumerate(zip(*columns, strict=True)):
                if shard and self._places.get(key) == (name, row):
                    yield key, shard, size, hashes[parts.index(part)]

    def _shard(self, path: Path, expected_bytes: int) -> Any:
        with self._lock:
            if path.name not in self._open:
                while len(self._open) >= _OPEN_SHARDS:
                    self._open.pop(next(iter(self._open)))
                self._open[path.name] = _open_shard(path, expected_bytes)
            return self._open[path.name]

    def write(self, name: str, entries: Sequence[Entry], workspace: Path) -> None:
        """Publishes one shard, whole or not at all. `workspace`: a folder of this process on the same file system."""
        tensors = {
            _tensor_name(entry.key, part): tensor.contiguous()
            for entry in entries
            for part, tensor in entry.parts.items()
        }
        shard, size = f"{name}.safetensors" if tensors else "", 0
        index = self.folder / "index" / f"{name}.parquet"
        try:
            if shard:
                save_file(tensors, workspace / shard)
                size = (workspace / shard).stat().st_size
            rows = [
                {
                    "key": entry.key,
                    "label": as_text(entry.label),
                    "shard": "" if entry.refused else shard,
                    "shard_bytes": size,
                    "parts": list(entry.parts),
                    "xxh3": [_hash(tensor.contiguous()) for tensor in entry.parts.values()],
                    "refused": as_text(entry.refused),
                }
                for entry in entries
            ]
            write_parquet(pa.Table.from_pylist(rows, schema=_INDEX), workspace / index.name)
            index.parent.mkdir(parents=True, exist_ok=True)
            if shard:
                publish(workspace / shard, self.folder / shard, sync=True)
            publish(workspace / index.name, index, sync=True)
        except (OSError, SafetensorError) as error:
            told = cannot_write(self.folder / (shard or index.name), error)
            raise InputError(f"{told}, what was finished before is kept") from error
        self.reload()

    @contextmanager
    def claim(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether this process may write the shard: one at a time does; a process that dies gives its claims back."""
        path = self.folder / "claims" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=-1 if wait else 0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            lock.release()

    def compact(self, workspace: Path) -> None:
        """Merges many small index files into one, so that opening a large store stays fast."""
        with self.claim("compact") as alone:
            self.reload()
            merged = dict(self._read_files)  # these files, as they are now; what comes later stays as it is
            if not alone or len(merged) < _COMPACT_FROM:
                return
            rows = [self._tables[name].slice(row, 1) for name, row in self._places.values()]
            place = f"{_MERGED}{uuid.uuid4().hex[:16]}.parquet"
            write_parquet(pa.concat_tables(rows).combine_chunks(), workspace / place)
            publish(workspace / place, self.folder / "index" / place, sync=True)  # before the ones that it replaces go
            for name, number in merged.items():
                path = self.folder / "index" / name
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_ino == number:
                        path.unlink()


def read_parquet(path: Path, schema: pa.Schema) -> pa.Table:
    """A table that `write_parquet` wrote. Raises ArrowException, OSError or ValueError where any bit has changed that
    matters: checksums of the pages tell, and what the footer says twice."""
    with path.open("rb") as file:  # pyarrow takes no path that is not UTF-8
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        table = parquet.read()
    if not table.schema.equals(schema) or table.num_rows != parquet.metadata.num_rows:
        raise pa.ArrowInvalid("its rows or columns are not the ones that were written")
    return table


def write_parquet(table: pa.Table, path: Path) -> None:
    """With checksums of its pages; raises OSError."""
    with path.open("wb") as file:
        pq.write_table(table, file, write_page_checksum=True)


def _open_shard(path: Path, expected_bytes: int) -> Any:
    """Raises InputError for a file of another size, SafetensorError for another header."""
    _check_access(path)
    if (found := path.stat().st_size) != expected_bytes:
        raise InputError(_damaged(path, f"it has {found} bytes instead of {expected_bytes}"))
    with readable(path) as place:
        return safe_open(place, framework="pt")


def _check_access(path: Path) -> None:
    """Raises InputError for what is no file, or not for this user: neither is damaged."""
    check_regular(path)
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: this user may not read it; its owner can change that (chmod a+r)")


def _tensor_name(key: str, part: str) -> str:
    return f"{key}.{part}"


def _hash(tensor: Tensor) -> str:
    """Of type, shape and bytes: a damaged header can change how the same bytes are read."""
    digest = xxhash.xxh3_64(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _damaged(path: Path, reason: str) -> str:
    return f"{path}: damaged cache shard: {reason}; delete the file and run `ztrain cache` to compute its entries again"
