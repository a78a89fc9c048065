"""What every page of ours shares: one file that opens from disk, runs nothing but its own script, asks for nothing.

In: a Jinja template with the blocks `style` and `script`, facts for its text, data for its script, and pictures. Out:
the bytes of a page, and the file. Text is escaped, data travel as JSON, pictures as data: URLs, and a
Content-Security-Policy names the hashes of the one style and the one script. Equal input gives equal bytes.
"""

import base64
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from PIL import Image

from ztrain.errors import InputError
from ztrain.images import Picture, decode_image, read_picture
from ztrain.io.files import write_bytes

SHARED = Path(__file__).parent
"""Where page.css and page.js are."""
_QUALITY = 75  # of WEBP, 0 to 100


class Thumbnails:
    """Pictures of a page, each made once, however many rows and files hold it."""

    def __init__(self, side: int, lossless_up_to: int = 0) -> None:
        """`side`: longest side on the page, in pixels; originals whose sides are at most `lossless_up_to` keep every
        pixel: drawings of a miniature are smeared otherwise."""
        self.side, self.lossless_up_to = side, lossless_up_to
        self.made: list[dict[str, Any]] = []
        """For the page's script: url, and width and height of the original; or the fault of one that cannot be read."""
        self._places: dict[str, int] = {}  # name, or hash of bytes -> place in `made`

    def add(self, picture: Picture, on_fault: Callable[[InputError], str] | None = None) -> int:
        """Its place in `made`. One that cannot be read raises InputError, or has what `on_fault` says in its place."""
        if picture.name not in self._places:
            self._places[picture.name] = self._add(picture, on_fault)
        return self._places[picture.name]

    def _add(self, picture: Picture, on_fault: Callable[[InputError], str] | None) -> int:
        try:
            raw = read_picture(picture)
            digest = xxhash.xxh3_128_hexdigest(raw)
            if digest in self._places:
                return self._places[digest]
            self._places[digest] = len(self.made)
            self.made.append(self._thumbnail(decode_image(raw, picture.name)))
        except InputError as error:
            if on_fault is None:
                raise
            self.made.append({"fault": on_fault(error)})
        return len(self.made) - 1

    def _thumbnail(self, image: Image.Image) -> dict[str, Any]:
        width, height = image.size
        image.thumbnail((self.side, self.side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        file = io.BytesIO()
        if max(width, height) <= self.lossless_up_to:
            image.save(file, "WEBP", lossless=True, method=2)  # a quarter of the usual time, 2 % larger
        else:
            image.save(file, "WEBP", quality=_QUALITY)
        url = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
        return {"url": url, "width": width, "height": height}


def as_json(payload: Any) -> str:
    """JSON that may stand inside a script element: nothing in it ends the element or begins a comment.

    Raises ValueError where a number is not finite.
    """
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


@functools.cache
def _environment(folder: Path) -> Any:
    """jinja2's, with the templates of a folder as they are read: compiling one takes longer than filling it."""
    import jinja2
    from markupsafe import Markup

    folders = [folder, SHARED]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def text_of(name: str) -> Markup:
        found = next(folder / name for folder in folders if (folder / name).is_file())
        return Markup(found.read_text(encoding="utf-8"))

    environment.globals["text_of"] = text_of
    return environment


def render(template: Path, facts: Mapping[str, Any], payload: Any) -> bytes:
    """The page. The template sees `facts`, `policy`, `payload` (JSON) and `text_of(name)`, the unchanged text of a file
    beside it or here; its blocks `style` and `script` see `text_of` alone, because the policy holds their hashes."""
    from markupsafe import Markup

    page = _environment(template.parent).get_template(template.name)
    policy = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for block in ("style", "script"):
        text = "".join(page.blocks[block](page.new_context()))
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy.append(f"{block}-src 'sha256-{digest}'")
    # Names of files may hold bytes that are no UTF-8: written as escapes, in JSON and in text.
    written = page.render(facts, policy=Markup("; ".join(policy)), payload=Markup(as_json(payload)))
    return written.encode(errors="backslashreplace")


def mark(maker: str) -> bytes:
    """How a page of ours begins: only such a file is replaced."""
    return f"<!doctype html>\n<html lang=en data-made-by={maker}>".encode()


def check_out(out: Path, maker: str) -> None:
    """Raises InputError where something is there that is no page of `maker`, for example `ztrain.report`."""
    if not out.exists():
        return
    begins = mark(maker)
    try:
        with out.open("rb") as file:
            ours = file.read(len(begins)) == begins
    except OSError as error:
        raise InputError(f"{out}: cannot be replaced ({error.strerror}); choose another --out") from error
    if not ours:
        raise InputError(f"{out}: holds something else than a page of {maker}; choose another --out")


def write_page(page: bytes, out: Path) -> None:
    """Whole or not at all. Raises InputError."""
    write_bytes(out, page, sync=True)
