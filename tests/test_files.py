"""Files appear whole or not at all, with the modes of the umask; foreign ones are opened without waiting."""

import errno
import multiprocessing
import os
import signal
import socket
import stat
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ztrain.errors import InputError
from ztrain.io import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    files.write_text(path, "one", sync=True)
    with pytest.raises(RuntimeError), files.whole_file(path) as building:
        building.write_text("half")
        assert path.read_text() == "one"
        raise RuntimeError
    assert path.read_text() == "one" and names(path.parent) == ["b.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.whole_folder(tmp_path / "f") as building:
        (building / "half").touch()
        raise RuntimeError
    assert names(tmp_path) == []
    with files.whole_folder(tmp_path / "f", sync=True) as building:
        (building / "in").mkdir()
        (building / "in" / "side").write_text("x")
    assert names(tmp_path) == ["f"] and (tmp_path / "f" / "in" / "side").read_text() == "x"
    with pytest.raises(InputError, match="f: cannot write it"), files.whole_folder(tmp_path / "f"):
        pass
    assert (tmp_path / "f" / "in" / "side").exists()


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_modes_follow_the_umask_whatever_a_library_chose(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with files.whole_file(tmp_path / "a.safetensors") as building:
            save_file({"a": np.zeros(1)}, building)
        with files.whole_folder(tmp_path / "b") as building:
            save_file({"a": np.zeros(1)}, building / "c.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "a.safetensors", tmp_path / "b" / "c.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def _work_until_killed(folder: Path) -> None:
    with files.whole_file(folder / "out") as building:
        building.write_text("half")
        (folder / "started").touch()
        time.sleep(60)


def test_left_overs_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_work_until_killed, args=(tmp_path,))
    process.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    for stray in (".writing-best.json", ".writing-step-00000004-77"):  # of versions before, without a lock
        (tmp_path / stray).touch()
    files.write_text(tmp_path / "other", "x")
    assert len([name for name in names(tmp_path) if name.startswith(".writing-")]) == 2  # the living one's
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    files.write_text(tmp_path / "other", "y")
    assert names(tmp_path) == ["other", "started"]


def _limited(folder: Path, report: Path) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    said = []
    for write in (
        lambda: files.write_bytes(folder / "a", bytes(2000)),
        lambda: _write_tensors(folder / "b"),
    ):
        try:
            write()
        except InputError as error:
            said.append(str(error))
    report.write_text("\n".join(said))


def _write_tensors(path: Path) -> None:
    with files.whole_file(path) as building:
        save_file({"a": np.zeros(2000)}, building)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    folder, report = tmp_path / "full", tmp_path / "report"
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(target=_limited, args=(folder, report))
    process.start()
    process.join()
    said = report.read_text().splitlines()
    assert len(said) == 2 and all("is full" in line and "make room" in line for line in said)
    assert said[0].startswith(f"{folder / 'a'}: ") and said[1].startswith(f"{folder / 'b'}: ")
    assert names(folder) == []
    assert "is full" in files.cannot_write(folder, OSError(errno.ENOSPC, "No space left on device"))
    assert "is full" not in files.cannot_write(folder, OSError(errno.EACCES, "Permission denied"))


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, what in (("pipe", "a named pipe"), ("socket", "a socket"), ("device", "a device"), (".", "a folder")):
        for read in (files.check_regular, lambda path: files.read_bytes(path, "config"), files.check_safetensors):
            with pytest.raises(InputError, match=f"is no regular file, but {what}"):
                read(tmp_path / name)


def test_a_file_above_the_limit_of_its_kind_is_not_read(tmp_path: Path) -> None:
    for kind, limit in files.LIMITS.items():
        with (tmp_path / kind).open("wb") as file:
            file.truncate(limit + 1)
        with pytest.raises(InputError, match=f"{limit + 1:,} bytes, more than the {limit:,} that a {kind}"):
            files.read_bytes(tmp_path / kind, kind)


def test_text_is_utf8_with_or_without_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfred")
    assert files.read_text(path, "caption") == "red"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match="a.txt: is not UTF-8"):
        files.read_text(path, "caption")


def test_a_cut_tensor_file_says_how_many_bytes_it_promises(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": np.zeros(100), "b": np.ones(3)}, path)
    whole = path.read_bytes()
    files.check_safetensors(path)
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(InputError, match=r"(is cut off|is no safetensors file).*fetch it again"):
            files.check_safetensors(path)
    for odd in (whole + b"x", struct.pack("<Q", 10**10) + whole[8:], whole[:8] + b"[" * (len(whole) - 8)):
        path.write_bytes(odd)
        with pytest.raises(InputError, match="fetch it again"):
            files.check_safetensors(path)


def test_home_and_variables_are_expanded_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert files.expand("~/a") == "/h/a" and files.expand("$HOME/a") == "/h/a" and files.expand("a/~/$b") == "a/~/$b"
    for odd in ("~nobody-of-that-name/a", "$ZTRAIN_NO_SUCH/a"):
        with pytest.raises(InputError, match="no such user or variable"):
            files.expand(odd)
