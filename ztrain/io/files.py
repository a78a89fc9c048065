"""Files, both ways: what this project writes appears whole or not at all, and foreign files are opened in one place.

Writing: `whole_file` and `whole_folder` hand out a temporary path in the same folder and rename it at the end; what a
killed process leaves there, the next writer removes. Libraries write to the temporary path that they are given.
Modes follow the umask, whatever a library chose. Append-only records (metrics.jsonl) are the exception.
Reading: a foreign file must be a regular one, not larger than the limit of its kind; nothing here waits for a pipe.
"""

import hashlib
import json
import os
import shutil
import stat
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Literal

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ztrain.errors import FULL, InputError

Kind = Literal["picture", "config", "json", "caption", "table", "record"]

MIB = 1 << 20

LIMITS: dict[Kind, int] = {
    "picture": 512 * MIB,
    "config": MIB,  # YAML that people write
    "caption": MIB,
    "json": 64 * MIB,  # beside a picture, of an adapter or a model
    "table": 1024 * MIB,  # CSV, JSONL: all of it is in memory
    "record": 1024 * MIB,  # what a run or a comparison has written
}
"""Bytes of a foreign file that is read whole, by what it is."""

MAX_LINE = 16 * MIB
"""Bytes of one line of a JSONL file."""

_SCRATCH, _CONDEMNED = ".writing-", ".removing-"
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A scratch folder inside `folder` for as long as this process works, after sweeping those of dead processes.

    Its lock is held from before it appears until after it is gone: one without a lock that is held is a left-over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    place = folder / f"{_SCRATCH}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with FileLock(f"{place}.lock"):
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            Path(f"{place}.lock").unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Removes the temporary files and folders of dead processes; those of living ones stay."""
    for path in folder.glob(f"{_CONDEMNED}*"):
        remove(path)
    for path in folder.glob(f"{_SCRATCH}*"):
        lock = path if path.suffix == ".lock" else path.with_name(f"{path.name}.lock")
        if path != lock and lock.exists():
            continue  # comes with its lock
        try:
            with FileLock(lock, timeout=0):
                remove(lock.with_suffix(""))
                lock.unlink(missing_ok=True)
        except (Timeout, PermissionError):
            continue  # its process is alive, or another user's


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path, *, sync: bool = False, scratch: Path | None = None) -> Iterator[Path]:
    """A temporary path that takes the place of `path` at the end; `sync`: after it has reached the disk.

    scratch: a `workspace` on the same disk, for many files; None: one beside the file. On an error nothing appears and
    what was there stays. Raises InputError where the file cannot be written.
    """
    with writing(path), nullcontext(scratch) if scratch else workspace(path.parent) as place:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield place / path.name
        publish(place / path.name, path, sync=sync)


@contextmanager
def whole_folder(path: Path, *, sync: bool = False, replace: bool = False) -> Iterator[Path]:
    """As `whole_file`, for a folder, which must be free or empty. `sync`: each of its files has reached the disk.

    replace: it takes the place of what is there, which is removed after that.
    """
    with writing(path), workspace(path.parent) as scratch:
        building = scratch / path.name
        building.mkdir()
        yield building
        publish(building, path, sync=sync, replace=replace)


def condemn(path: Path) -> Path:
    """Renames a folder, if it is there, to one that counts for nothing: what is half removed must not have its name."""
    condemned = path.with_name(f"{_CONDEMNED}{path.name}")
    remove(condemned)  # of a process that was killed here
    if path.exists():
        os.rename(path, condemned)
    return condemned


def publish(building: Path, path: Path, *, sync: bool = False, replace: bool = False) -> None:
    """Gives a finished file or folder its final name, with the modes that the umask gives. replace: of `whole_folder`.
    Raises OSError."""
    mode = _file_mode(building.parent)
    for found in (*building.rglob("*"), building):
        if found.is_file() and stat.S_IMODE(found.stat().st_mode) != mode:
            found.chmod(mode)
        if sync:
            sync_to_disk(found)
    condemned = condemn(path) if replace else None  # after all that a disk may refuse
    os.replace(building, path)
    if sync:
        sync_to_disk(path.parent)
    if condemned is not None:
        remove(condemned)


def _file_mode(scratch: Path) -> int:
    """Of a new file. os.umask tells only by changing it, for all threads."""
    probe = scratch / f".mode-{uuid.uuid4().hex[:8]}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def may_write(folder: Path) -> bool:
    """Whether this process may make files in a folder, or the folder itself: of somebody else's, to read only, say."""
    place = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    return os.access(place, os.W_OK | os.X_OK)


def sync_to_disk(path: Path) -> None:
    """Waits until a file or a folder's list of names has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Raises InputError."""
    with whole_file(path, sync=sync) as building:
        building.write_bytes(data)


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """As UTF-8. Raises InputError."""
    write_bytes(path, as_text(text).encode(), sync=sync)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a record, all of it or nothing. Raises InputError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            before, rest = file.tell(), f"{as_text(line)}\n".encode()
            try:
                while rest:  # a full disk may take a part before it refuses the rest
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(before)
                raise


def as_text(name: str) -> str:
    """A name as it is written into records: bytes of it that are no UTF-8, which Python keeps as half surrogates and
    JSON refuses, as escapes."""
    return name.encode(errors="backslashreplace").decode()


def write_json(path: Path, document: Any, *, sync: bool = False) -> None:
    """Raises InputError."""
    write_text(path, json.dumps(document, indent=2) + "\n", sync=sync)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises InputError about `path` where the operating system or safetensors refuses to write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(cannot_write(path, error)) from error


def cannot_write(path: Path, error: Exception) -> str:
    """One sentence; safetensors and pyarrow report a full disk in words of their own."""
    said = " ".join(str(error).split())
    number = getattr(error, "errno", None)
    if number in FULL or "No space left" in said or "File too large" in said or "os error 27" in said:
        return f"{path}: cannot write it, the disk or its quota is full ({said}); make room and run again"
    reason = getattr(error, "strerror", None) or said
    return f"{path}: cannot write it ({reason}); mend the folder or choose another place, then run again"


def open_regular(path: Path, kind: Kind) -> BinaryIO:
    """A foreign file, open for reading. Raises InputError as `check_regular`, and for one above the limit of its kind;
    FileNotFoundError where it is not there."""
    _check_mode(path, os.stat(path).st_mode)  # opening some devices has effects
    # Without waiting: between the two calls somebody may have put a pipe there.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC))
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size <= LIMITS[kind]:
        return file
    file.close()
    _check_mode(path, found.st_mode)
    raise InputError(
        f"{path}: has {found.st_size:,} bytes, more than the {LIMITS[kind]:,} that a {kind} may have; is it the right"
        " file?"
    )


def read_bytes(path: Path, kind: Kind) -> bytes:
    """All of a foreign file. Raises InputError; FileNotFoundError where it is not there."""
    with open_regular(path, kind) as file:
        return file.read(LIMITS[kind] + 1)


def read_text(path: Path, kind: Kind) -> str:
    """All of a foreign text: UTF-8, with or without a byte order mark. Raises InputError; FileNotFoundError."""
    try:
        return read_bytes(path, kind).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def sha256_of(path: Path) -> str:
    """Of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_regular(path: Path) -> None:
    """For what a library opens by itself. Raises InputError for a pipe, a socket, a device or a folder;
    FileNotFoundError."""
    _check_mode(path, os.stat(path).st_mode)


def _check_mode(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        found = what.get(stat.S_IFMT(mode), "a device")
        raise InputError(f"{path}: is no regular file, but {found}; give a file")


def check_safetensors(path: Path) -> None:
    """Compares the header with the file's size. Raises InputError for a file that is cut off or no safetensors file."""
    check_regular(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if first == b"version ":
            raise InputError(f"{path}: is what Git LFS left in the file's place; run `git lfs pull` in its folder")
        if not 2 <= length <= _MAX_HEADER:
            raise InputError(f"{path}: is no safetensors file (it has {size:,} bytes); fetch it again")
        if size < 8 + length:
            raise InputError(_cut_off(path, size, f"more than {8 + length:,}"))
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            promised = 8 + length + int(max(ends, default=0))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InputError(f"{path}: its header is damaged; fetch it again") from error
    if size < promised:
        raise InputError(_cut_off(path, size, f"{promised:,}"))
    if size > promised:
        raise InputError(f"{path}: has {size:,} bytes where its header promises {promised:,}; fetch it again")


def _cut_off(path: Path, size: int, promised: str) -> str:
    return f"{path}: is cut off: {size:,} bytes are there, its header promises {promised}; fetch it again"


@contextmanager
def readable(path: Path) -> Iterator[Path]:
    """A path under which a library that takes UTF-8 alone, as safetensors does, can open a file whose path is none."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield Path(f"/proc/self/fd/{file.fileno()}")
    else:
        yield path


def given_path(word: str) -> Path:
    """A path of a command line: no shell has expanded the ~ of `--out=~/x`. Raises InputError."""
    return Path(expand(word))


def expand(path: str) -> str:
    """A leading ~ or ~user and variables as $HOME, which no shell has seen where they come from a file.

    Raises InputError for a user or variable that does not exist: a folder called ~ is a dangerous thing to remove.
    """
    if not path.startswith(("~", "$")):
        return path
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith(("~", "$")):
        raise InputError(f"{path}: no such user or variable; write the path out (./{path} for a folder of that name)")
    return expanded
