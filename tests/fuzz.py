"""Random faults in every kind of file that ztrain reads: nothing but an InputError may come of one, soon and in little
memory.

    python -m tests.fuzz --minutes 2 [--only tars yaml] [--seed 0] [--finds out/fuzz]
    python -m tests.fuzz --only tars --seed 0 --first 1234 --count 1          one input again

Each input is a golden file (tests/golden) or a small picture with a few faults, and follows from target, seed and
number. The reading is done in a process of its own: another exception, a crash, `--seconds` without an end and more
than `--memory-mib` are finds. Each kind of find is printed once and its first input kept in `--finds`. Exit status:
0 nothing was found, 1 something was.
"""

import argparse
import contextlib
import copy
import faulthandler
import hashlib
import importlib
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from tests.golden.write import transformer
from ztrain.errors import InputError

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "1"


# --- faults -----------------------------------------------------------------------------------------------------------

_BYTES = (0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x5C)
_INTEGERS = (0, 1, 2**7 - 1, 2**8 - 1, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_WORDS = (
    b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 5000, b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800",
    b"[" * 3000, b'{"a":' * 3000, b"{}", b"[]", b'""', b"../../etc/passwd", b"/dev/zero", b"\x1b[31m", b"\r", b"\t",
    b"&a [*a]", b"*a", b"!!python/object/apply:os.system [id]", b"? ", b"<<: ", b"2024-01-01", b"1:30", b"%s%n",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, -0.0, 1e308, -1e308, float("nan"), float("inf"), "", " ",
    "\x00", "\ud800", "\u202e", "..", "../x", "/dev/zero", "x" * 5000, "1", [], {}, [None], {"": None}, [[[[]]]],
    [1, "a"],
)  # fmt: skip


def faulty(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """The bytes with a few faults; `others`: what pieces may be taken of."""
    if draw.random() < 0.5 and (made := _faulty_json(data, draw)) is not None:
        return made
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        data = _faulty_bytes(bytearray(data), others, draw)
    return data


def _faulty_bytes(data: bytearray, others: Sequence[bytes], draw: random.Random) -> bytes:
    """One fault. Most lie at the start, where headers are."""
    at = min(int(draw.expovariate(1) * draw.choice((16, 256, len(data) / 2 + 1))), len(data))
    width = draw.choice((1, 2, 4, 8, 64, 1024))
    match draw.randrange(9):
        case 0 if data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        case 1 if data:
            data[at % len(data)] = draw.choice(_BYTES)
        case 2:
            size = draw.choice((2, 4, 8))
            number = draw.choice(_INTEGERS) & (1 << 8 * size) - 1
            data[at : at + size] = number.to_bytes(size, draw.choice(("big", "little")))
        case 3:
            del data[at : at + width]
        case 4:
            data[at:at] = data[at : at + width] * draw.choice((1, 2, 50))
        case 5:
            data[at:at] = draw.randbytes(width)
        case 6:
            del data[at:]
        case 7:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            data[at : at + width] = other[start : start + width]
        case _:
            if numbers := list(re.finditer(rb"\d+", data)):
                at = draw.choice(numbers).start()
            data[at:at] = draw.choice(_WORDS)
    return bytes(data)


def _faulty_json(data: bytes, draw: random.Random) -> bytes | None:
    """JSON, or one of several lines of it, with another value at one of its places; None for other bytes."""
    lines = data.splitlines(keepends=True)
    place = draw.randrange(len(lines) or 1)
    for start, end in ((0, len(lines)), (place, place + 1)):
        with contextlib.suppress(ValueError):
            document = [json.loads(b"".join(lines[start:end]))]
            for _ in range(draw.choice((1, 1, 2))):
                if places := list(_places(document)):
                    _change(*draw.choice(places), draw)
            written = json.dumps(document[0] if document else None).encode()
            return b"".join([*lines[:start], written, b"\n", *lines[end:]])
    return None


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or mapping inside, with each of its keys."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


def _change(holder: Any, key: Any, draw: random.Random) -> None:
    match draw.randrange(6):
        case 0:
            del holder[key]
        case 1:
            holder[key] = [holder[key]]
        case 2 if isinstance(holder, list):
            holder.append(holder[key])
        case 3 if isinstance(holder, dict):
            holder[draw.choice(("", "x", "\ud800", "__class__", "step", "kind"))] = holder.pop(key)
        case _:
            holder[key] = copy.deepcopy(draw.choice(_VALUES))


# --- what reads -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """An InputError is a right answer."""
    with contextlib.suppress(InputError):
        yield


@dataclass
class Target:
    """A folder of valid files, the ones that get faults, and what reads them. Subclasses are listed in TARGETS."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    valid: dict[Path, bytes] = field(default_factory=dict)
    patterns: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.fill()
        self.files = sorted(path for pattern in self.patterns for path in self.folder.glob(pattern) if path.is_file())
        self.valid = {path: path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}

    def fill(self) -> None:
        """Writes the valid files."""

    def read(self, path: Path) -> None:
        """Reads all that depends on `path`; raises InputError, or whatever is to be found."""

    def input(self, draw: random.Random) -> Path:
        """Writes the next input in the place of one of the valid files."""
        for path, data in self.valid.items():
            if not path.is_file() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        path = draw.choice(self.files)
        path.write_bytes(faulty(self.valid[path], [self.valid[each] for each in self.files], draw))
        return path


def _golden(names: Sequence[str], folder: Path) -> None:
    for name in names:
        shutil.copytree(GOLDEN / name, folder / name)


def _look(folder: Path) -> None:
    """At every row of a data set and all of its pictures."""
    from ztrain.data.reading import read_triplets
    from ztrain.images import decode_image, image_size, read_picture

    for split in ("train", "validation"):
        with refused():
            for triplet in read_triplets(str(folder), split, max_bad_share=1.0).triplets:
                for picture in (triplet.target, *triplet.references):
                    with refused():
                        data = read_picture(picture)
                        image_size(data, picture.name)
                        decode_image(data, picture.name)


class Manifests(Target):
    patterns = ("data/*/metadata.jsonl", "data/*.json*", "data/SHA256SUMS")

    def fill(self) -> None:
        _golden(["data"], self.folder)

    def read(self, path: Path) -> None:
        from data_tools.pack import from_folder

        _look(self.folder / "data")
        from_folder(self.folder / "data", text_only=False)


class Tars(Target):
    patterns = ("data_tars/*.tar", "data_tars/manifest.json")

    def fill(self) -> None:
        _golden(["data_tars"], self.folder)

    def read(self, path: Path) -> None:
        _look(self.folder / "data_tars")


class Parquet(Target):
    patterns = ("data_parquet/data/*.parquet", "cache/*/index/*.parquet")

    def fill(self) -> None:
        _golden(["data_parquet", "cache"], self.folder)
        import datasets

        datasets.config.HF_DATASETS_CACHE = self.folder / "of-datasets"

    def read(self, path: Path) -> None:
        from ztrain.io.store import Store

        if path.is_relative_to(self.folder / "data_parquet"):
            _look(self.folder / "data_parquet")
            shutil.rmtree(self.folder / "of-datasets", ignore_errors=True)
        else:
            store = Store(path.parent.parent)
            store.shapes("states", workers=1)
            store.shared("states")


class Yaml(Target):
    patterns = ("*/*.yaml",)

    def fill(self) -> None:
        for kind, files in (
            ("experiments", [GOLDEN / "config.yaml", *(ROOT / "configs").glob("*.yaml")]),
            ("builds", (ROOT / "configs" / "data").glob("*.yaml")),
        ):
            (self.folder / kind).mkdir()
            for path in files:
                shutil.copyfile(path, self.folder / kind / path.name)

    def read(self, path: Path) -> None:
        from data_tools.config import read_config
        from ztrain.config import load_config

        if path.parent.name == "builds":
            read_config(path)
        else:
            load_config([path])


class Records(Target):
    patterns = ("run/*.json*", "run/config.yaml", "run/samples/base/key.json", "comparison/comparison.json")

    def fill(self) -> None:
        from tests.comparisons import make_comparison, make_run

        make_run(self.folder / "run", steps=6, previews=(0, 6), rows=2)
        make_comparison(self.folder / "comparison", rows=2)

    def read(self, path: Path) -> None:
        from ztrain.compare.report.page import make_report

        make_report(self.folder / path.relative_to(self.folder).parts[0])


class Adapters(Target):
    patterns = ("export*/*.json", "export*/*.safetensors", "checkpoint/*", "cache/*/*")

    def fill(self) -> None:
        _golden(["export", "export_projector", "export_splice", "checkpoint", "cache"], self.folder)

    @staticmethod
    @cache
    def dit() -> Any:
        return transformer(GOLDEN / "models")

    def read(self, path: Path) -> None:
        from ztrain.io.store import Store
        from ztrain.weights import checkpoint
        from ztrain.weights.adapter_folder import CONFIG_FILE, adapt, read_adapter

        folder = path.parent
        if folder.name == "checkpoint":
            _name_again(folder / checkpoint.MANIFEST, path, lambda file: checkpoint.describe(file))
            checkpoint.read(folder)
        elif folder.parent.name == "cache":
            _index_again(folder, path)
            store = Store(folder)
            with refused():
                store.shapes("states", workers=1)
            store.shared("states")
        else:
            _name_again(folder / CONFIG_FILE, path, lambda file: hashlib.sha256(file.read_bytes()).hexdigest())
            adapt(copy.deepcopy(self.dit()), read_adapter(folder))


def _name_again(listing: Path, path: Path, describe: Callable[[Path], Any]) -> None:
    """Puts the digest of a file with faults where it is listed: else no reader would look into it."""
    if path != listing:
        document = json.loads(listing.read_bytes())
        if path.name in document["files"]:
            document["files"][path.name] = describe(path)
            listing.write_text(json.dumps(document))


def _index_again(folder: Path, shard: Path) -> None:
    """The same for the size of a cache's shard."""
    import pyarrow.parquet as pq

    for path in (folder / "index").iterdir():
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            if row["shard"] == shard.name:
                row["shard_bytes"] = shard.stat().st_size
        pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)


class Pictures(Target):
    patterns = ("*",)

    def fill(self) -> None:
        grid = np.random.default_rng(0).integers(0, 255, (24, 20, 4), dtype=np.uint8)
        rgba = Image.fromarray(grid)
        rgb, gray, deep = rgba.convert("RGB"), rgba.convert("L"), Image.fromarray(grid[..., 0].astype(np.uint16) * 257)
        exif = Image.Exif()
        exif[0x0112] = 6
        from PIL import ImageCms

        icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
            "rgba.png": (rgba, {"exif": exif}), "deep.png": (deep, {}),
            "palette.png": (rgb.convert("P"), {"icc_profile": icc}),
            "rgb.jpg": (rgb, {"exif": exif, "icc_profile": icc}), "cmyk.jpg": (rgb.convert("CMYK"), {}),
            "progressive.jpg": (gray, {"progressive": True}), "rgba.webp": (rgba, {"exif": exif}),
            "lossless.webp": (rgba, {"lossless": True, "icc_profile": icc}), "raw.tif": (rgb, {"exif": exif}),
            "lzw.tif": (rgba, {"compression": "tiff_lzw"}), "deflate.tif": (deep, {"compression": "tiff_deflate"}),
            "float.tif": (Image.fromarray(grid[..., 0] / np.float32(255)), {}),
            "bit.tif": (gray.convert("1"), {"compression": "group4"}),
            "rgb.bmp": (rgb, {}), "palette.gif": (rgb.convert("P"), {"save_all": True, "append_images": [rgb]}),
            "rgb.avif": (rgb, {"exif": exif}),
        }  # fmt: skip
        for name, (image, words) in made.items():
            image.save(self.folder / name, **words)

    def read(self, path: Path) -> None:
        from ztrain.images import Bucket, fit_target, image_size, open_image

        with refused():
            image_size(path.read_bytes(), path.name)
        fit_target(open_image(path), Bucket(16, 32))


TARGETS: dict[str, type[Target]] = {
    kind.__name__.lower(): kind for kind in (Manifests, Tars, Parquet, Yaml, Records, Adapters, Pictures)
}


# --- the process that reads -------------------------------------------------------------------------------------------


def _peak() -> int:
    """Largest resident memory of this process since `_forget_peak`, bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def attempt(target: Target, name: str, seed: int, number: int, most: int) -> dict[str, Any] | None:
    """One input: a find, or None. `most`: bytes by which memory may grow."""
    path = target.input(random.Random(f"{name} {seed} {number}"))
    _forget_peak()
    before = _peak()
    try:
        with refused():
            target.read(path)
    except Exception as error:  # the purpose of it all
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if str(ROOT) in f.filename and ".venv" not in f.filename]
        last = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "?"
        return {"kind": f"{type(error).__name__} at {last}", "told": traceback.format_exc(), "file": str(path)}
    if (grown := _peak() - before) > most:
        return {"kind": f"memory while reading {path.suffix}", "told": f"{grown / 2**20:,.0f} MiB", "file": str(path)}
    return None


def _read_on(name: str, options: argparse.Namespace, first: int, until: float, place: Path, pipe: int) -> None:
    """The life of the reading process: says the number of each input before it, and every find."""
    silent = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(silent, number)
    faulthandler.disable()

    def say(**words: Any) -> None:
        os.write(pipe, json.dumps(words).encode() + b"\n")

    target, number, kinds = TARGETS[name](place / name), first, set[str]()
    alike = {(path.relative_to(target.folder).parts[0], path.suffix): path for path in target.files}
    for path in alike.values():  # all is imported now, and none is refused
        try:
            target.read(path)
        except Exception:
            found = {"kind": "a valid file", "told": traceback.format_exc(), "file": str(path)}
            _keep(name, options, number, found)
            say(number=number, **found)
    while time.monotonic() < until and (options.count is None or number < options.first + options.count):
        say(begun=number)
        if found := attempt(target, name, options.seed, number, options.memory_mib << 20):
            if found["kind"] not in kinds:
                _keep(name, options, number, found)
            kinds.add(found["kind"])
            say(number=number, **found)
        number += 1
    say(end=number)


@dataclass
class Outcome:
    """Of one target."""

    inputs: int = 0
    finds: dict[str, list[int]] = field(default_factory=dict)
    """Kind -> numbers of its inputs."""


def fuzz(name: str, options: argparse.Namespace, until: float) -> Outcome:
    """Reads inputs of one target until a time of the monotonic clock, or `options.count` of them."""
    outcome, number = Outcome(), options.first
    while time.monotonic() < until and (options.count is None or number < options.first + options.count):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            number = _one_life(name, options, number, until, Path(folder), outcome)
    outcome.inputs = number - options.first
    return outcome


def _one_life(name: str, options: argparse.Namespace, first: int, until: float, place: Path, outcome: Outcome) -> int:
    """One reading process, to its end or its first hang or crash; gives the number of the next input."""
    source, sink = os.pipe()
    if not (child := os.fork()):
        status = 1
        try:
            os.close(source)
            _read_on(name, options, first, until, place, sink)
            status = 0
        finally:
            os._exit(status)
    os.close(sink)
    number, ended, why, rest = first, False, "", b""
    patience = 120.0  # it imports first
    while True:
        if not select.select([source], [], [], patience)[0]:
            why = f"hangs for {patience:g} s"
            os.kill(child, signal.SIGKILL)
        if not (piece := os.read(source, 1 << 16)):
            break
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            said = json.loads(line)
            number, patience = said.get("begun", number), options.seconds
            if "end" in said:
                number, ended = said["end"], True
            elif "kind" in said:
                _note(name, options, outcome, said)
    os.close(source)
    _, status = os.waitpid(child, 0)
    if ended:
        return number
    why = why or f"the process ends with {os.waitstatus_to_exitcode(status)}"
    target = TARGETS[name](place / "again")
    path = target.input(random.Random(f"{name} {options.seed} {number}"))
    found = {"kind": f"{path.suffix}: {why}", "number": number, "told": why, "file": str(path)}
    _keep(name, options, number, found)
    _note(name, options, outcome, found)
    return number + 1


def _keep(name: str, options: argparse.Namespace, number: int, found: dict[str, Any]) -> None:
    """The input and what was found, in a folder of `--finds`."""
    kept = options.finds / f"{name}-{options.seed}-{number}"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "told.txt").write_text(found["told"])
    shutil.copy(found["file"], kept)


def _note(name: str, options: argparse.Namespace, outcome: Outcome, found: dict[str, Any]) -> None:
    numbers = outcome.finds.setdefault(found["kind"], [])
    numbers.append(found["number"])
    if len(numbers) == 1:
        print(f"{name}: seed {options.seed} number {numbers[0]}: {found['kind']}\n{found['told']}", flush=True)


_READERS = (
    "data_tools.config",
    "data_tools.pack",
    "peft.tuners.lora",
    "tests.comparisons",
    "ztrain.weights.adapter_folder",
    "ztrain.compare.report.page",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="of all targets together")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, default=None, help="inputs of each target; left out: as time allows")
    parser.add_argument("--finds", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--seconds", type=float, default=10.0, help="that one input may take")
    parser.add_argument("--memory-mib", type=int, default=1024, help="by which one input may make memory grow")
    options = parser.parse_args(arguments)
    for name in _READERS:  # once for all processes
        importlib.import_module(name)
    found = 0
    for name in options.only:
        left = 60 * options.minutes / len(options.only)
        outcome = fuzz(name, options, time.monotonic() + left)
        found += len(outcome.finds)
        kinds = "; ".join(f"{kind}: {len(numbers)}" for kind, numbers in outcome.finds.items())
        print(f"{name}: {outcome.inputs} inputs, {kinds or 'nothing found'}", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
