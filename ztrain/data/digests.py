"""Digests of files and pictures, remembered by stamp so that their bytes are read once.

In: pictures wherever they lie, and files of models. Out: `Known` pictures, by what is in them. The memo is one Parquet
file without names or paths; losing it costs time only.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from tqdm.auto import tqdm

from ztrain.errors import InputError
from ztrain.images import Part, Picture, PictureFile, Variants, image_size, read_picture
from ztrain.io.files import check_regular, may_write, whole_file
from ztrain.io.store import read_parquet, write_parquet


@dataclass(frozen=True, slots=True)
class Known:
    """A picture with the digest of its bytes and its upright size in pixels; or a part of one, with the part's size.
    Itself an images.Picture: the whole one."""

    picture: Picture
    digest: str
    width: int
    height: int
    part: Part | None = None

    @property
    def name(self) -> str:
        return self.picture.name

    @property
    def stamp(self) -> str:
        return self.picture.stamp

    def read(self) -> bytes:
        return self.picture.read()

    @property
    def identity(self) -> str | list[str | int]:
        """JSON that differs for other bytes and for another part of them."""
        return self.digest if self.part is None else [self.digest, *astuple(self.part)]

    @property
    def label(self) -> str:
        """What messages call it, without the path of this machine."""
        name, part = Path(self.name).name, self.part
        if part is None:
            return name
        turned = ", mirrored" if part.mirrored else ""
        return f"{name} ({part.width} x {part.height} from {part.left}, {part.top}{turned})"

    def variant(self, rule: Variants, number: int) -> "Known":
        """Of the whole picture, the part that is this variant of it."""
        part = rule.part(self.digest, (self.width, self.height), number)
        return self if part is None else replace(self, width=part.width, height=part.height, part=part)


def digest_bytes(data: bytes) -> str:
    """128-bit digest, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_json(value: Any) -> str:
    """128-bit digest of JSON values, as 32 hex digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode(errors="surrogateescape"))


class Digests:
    """Digest and size of files and pictures, remembered by their stamp so that bytes are read once."""

    _SCHEMA = pa.schema(
        [("stamp", pa.string()), ("digest", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    )

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._load()
        self._saved = len(self._known)

    def _load(self) -> dict[str, tuple[str, int, int]]:
        if not self.path.exists():
            return {}
        check_regular(self.path)
        try:
            columns = read_parquet(self.path, self._SCHEMA).to_pydict()
        except (pa.ArrowException, OSError, ValueError) as error:  # only a memo
            reason = str(error).partition("\n")[0]
            print(f"{self.path}: cannot be used ({reason}); pictures and weights are read again", file=sys.stderr)
            return {}
        places = zip(columns["digest"], columns["width"], columns["height"], strict=True)
        return dict(zip(columns["stamp"], places, strict=True))

    def of_file(self, path: Path) -> str:
        """Digest of any file's bytes."""
        source = PictureFile(path)
        if source.stamp not in self._known:
            check_regular(path)
            with path.open("rb") as file:
                self._known[source.stamp] = (hashlib.file_digest(file, xxhash.xxh3_128).hexdigest(), 0, 0)
        return self._known[source.stamp][0]

    def of_pictures(self, pictures: Sequence[Picture], workers: int) -> list[Known | InputError]:
        """Each picture with digest and size, or what is wrong with it, from its bytes or its header."""
        with ThreadPoolExecutor(max(1, workers)) as pool:
            bar = tqdm(total=len(pictures), desc="reading pictures", unit="picture", disable=None, delay=2)
            with bar:
                found = []
                for known in pool.map(self._of_picture, pictures):
                    found.append(known)
                    bar.update()
        return found

    def _of_picture(self, picture: Picture) -> Known | InputError:
        try:
            stamp = picture.stamp
            if stamp not in self._known or not self._known[stamp][1]:
                data = read_picture(picture)
                width, height = image_size(data, picture.name)
                self._known[stamp] = (digest_bytes(data), width, height)
            return Known(picture, *self._known[stamp])
        except InputError as error:
            return error
        except OSError as error:
            return InputError(f"{picture.name}: cannot read the picture ({error.strerror or error})")

    def save(self) -> None:
        """Writes what is new, together with what other processes have written since; nothing into a folder that is
        only to be read."""
        if len(self._known) == self._saved or not may_write(self.path.parent):
            return
        merged = self._load() | self._known
        digests, widths, heights = zip(*merged.values(), strict=True)
        columns = {"stamp": list(merged), "digest": digests, "width": widths, "height": heights}
        with whole_file(self.path) as building:
            write_parquet(pa.table(columns, schema=self._SCHEMA), building)
        self._saved = len(merged)
