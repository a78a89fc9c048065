"""Files of pictures: what kind one is by its first bytes, and its pixels by the decoder of that kind alone.

In: the bytes of a file. Out: a Pillow image with its header read; what decoders raise is one sentence. Metadata that do
not decide pixels are passed by, so that none of them makes a whole picture unreadable, and damaged ones are named. What
Pillow or libtiff would decode to other pixels is mended here, or refused.
"""

import io
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import ExifTags, Image, ImageCms, ImagePalette, TiffImagePlugin
from PIL.PngImagePlugin import PngImageFile
from PIL.TgaImagePlugin import TgaImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COLORMAP,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    TILELENGTH,
    TILEWIDTH,
    TiffImageFile,
)

from ztrain.errors import InputError

MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused from the header. Pillow's own limit (Image.MAX_IMAGE_PIXELS, 89.5
million unless the process changed it) is an error here too, so the lower of the two holds."""

MAX_METADATA = 32 << 20
"""Bytes, unpacked, of an ICC profile, EXIF or XMP: a larger one is left out."""

READ = frozenset({"JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF", "TGA"})
"""Formats, as `sniff` names them, that are read: HEIF (.heic) with the extra `heif`, TGA by its name only. Other
decoders of Pillow (PostScript, FITS, ...) never get untrusted bytes."""

HEAD = 1024
"""Bytes at the start of a file that `sniff` looks at; fewer name fewer kinds."""

GRAY_RANGE = "gray_range"
"""Key of Pillow's `info`: (black, white), of gray of more than 8 bits; the usual values where there is none."""

# In this order: the first that fits counts.
_SIGNATURES = {
    name: re.compile(signature, re.DOTALL)
    for name, signature in {
        "JPEG": rb"\xff\xd8\xff",
        "PNG": rb"\x89PNG\r\n\x1a\n",
        "GIF": rb"GIF8[79]a",
        "WEBP": rb"RIFF.{4}WEBP",
        "camera raw": rb"II\*\0.{4}CR|IIU\0|IIR[OS]|MMOR|FUJIFILMCCD-RAW|.{4}ftypcrx ",
        "TIFF": rb"II[*+]\0|MM\0[*+]",
        "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
        "AVIF": rb".{4}ftyp(?:avi[fs]|m[is]f1.{4}(?:.{4}){0,8}?avi[fs])",
        "HEIF": rb".{4}ftyp(?:he[iv][cxms]|m[is]f1)",
        "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
        "JPEG 2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n",
        "JPEG XR": rb"II\xbc[\0\x01]",
        "Photoshop": rb"8BPS",
        "GIMP": rb"gimp xcf ",
        "Krita": rb"PK\x03\x04.{26}mimetypeapplication/x-krita",
        "OpenRaster": rb"PK\x03\x04.{26}mimetypeimage/openraster",
        "CLIP STUDIO": rb"CSFCHUNK",
        "SVG": rb"(?:\xef\xbb\xbf)?\s*(?:<svg|<!DOCTYPE svg|<[?!].*?<svg)",
        "PDF": rb"%PDF-",
        "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
        "OpenEXR": rb"v/1\x01",
        "Radiance HDR": rb"#\?R(?:ADIANCE|GBE)",
        "PNM": rb"P[1-6]\s+(?:#|\d+\s+\d+\s)|P7\nWIDTH |P[Ff]\n",
        "icon": rb"\0\0[\x01\x02]\0[^\0]\0|icns",
        "DDS": rb"DDS \x7c\0\0\0",
        "QOI": rb"qoif",
        "FITS": rb"SIMPLE  =",
        "DICOM": rb".{128}DICM",
    }.items()
}
_RAW_NAMES = re.compile(r"\.(3fr|arw|cr2|dng|erf|iiq|kdc|mef|mos|nef|nrw|pef|raw|rwl|sr2|srw)", re.IGNORECASE)
_TGA_NAMES = re.compile(r"\.(tga|icb|vda|vst)", re.IGNORECASE)
_TGA_FOOTER = b"TRUEVISION-XFILE.\0"
# There is no signature, and not all have that footer.
_TGA_HEADER = re.compile(rb".[\0\x01][\x01-\x03\x09-\x0b].{13}[\x01\x08\x10\x18\x20].", re.DOTALL)

# What Pillow's decoders raise on damaged files, found by flipping bytes; a MemoryError stays a MemoryError.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    ImageCms.PyCMSError,
    Image.DecompressionBombError,
)


def sniff(head: bytes, name: str = "") -> str | None:
    """What kind of picture a file is by its first `HEAD` bytes: one of `READ`, a kind that is not read, or None.

    `name` decides where bytes alone cannot: TGA has no signature, and raw files of cameras have that of TIFF.
    """
    kind = next((kind for kind, signature in _SIGNATURES.items() if signature.match(head)), None)
    suffix = os.path.splitext(name)[1]
    if kind == "TIFF" and _RAW_NAMES.fullmatch(suffix):
        return "camera raw"
    if kind is None and _TGA_NAMES.fullmatch(suffix) and _TGA_HEADER.match(head):
        return "TGA"
    return kind


@contextmanager
def opened(data: bytes, name: str, left_out: list[str]) -> Iterator[Image.Image]:
    """The picture with its header read, its size checked; `left_out` gets what metadata are passed by as damaged.

    Raises InputError starting with `name`; what decoders raise inside becomes one too.
    """
    kind = sniff(data[:HEAD], "a.tga" if data.endswith(_TGA_FOOTER) else name)
    if kind not in READ:
        found = f"it is a {kind} file" if kind else "its bytes are of no known format" if data else "the file is empty"
        raise InputError(f"{name}: not a readable picture ({found}); save it as PNG or JPEG, or remove it")
    try:
        opener = _OPENERS.get(kind)
        with opener(data, name, left_out) if opener else _open_plain(data, kind) as image:
            most = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
            if image.width * image.height > most:
                found = f"{image.width} x {image.height}; at most {most:,} are read"
                raise InputError(f"{name}: too many pixels ({found}); shrink the picture")
            yield image
    except InputError:
        raise
    except DECODER_ERRORS as error:
        found = f"{kind}: {' '.join(str(error).split()) or type(error).__name__}"
        raise InputError(
            f"{name}: not a readable picture ({found}); replace it with a whole file, or save it as PNG"
        ) from error


def orientation_of(image: Image.Image, left_out: list[str]) -> int:
    """EXIF or XMP's orientation, 1 to 8 if they are right, 0 without; damaged ones are named in `left_out`."""
    try:
        bare = image if isinstance(image, TiffImageFile) else Image.Image()
        bare.info = image.info  # the file's own getexif decodes all of a PNG, and hides what of a JPEG was damaged
        found = bare.getexif().get(ExifTags.Base.Orientation)
    except DECODER_ERRORS as error:
        left_out.append(f"its EXIF or XMP are left out ({error})")
        return 0
    return found if isinstance(found, int) else 0


def _open_plain(data: bytes, kind: str) -> Image.Image:
    if kind not in Image.OPEN:
        Image.init()
    # Not Image.open: that warns of sizes, which are checked here, and keeps the decoder's reason to itself.
    return Image.OPEN[kind][0](io.BytesIO(data), "")


# ---- PNG


def _open_png(data: bytes, name: str, left_out: list[str]) -> Image.Image:
    """Without its texts: Pillow refuses long ones, and takes a text called `transparency` for the transparency."""
    file, found = _without_metadata(data, left_out)
    image = PngImageFile(file)
    image.info |= found
    bits, colour = data[24], data[25]
    if isinstance(gray := image.info.get("transparency"), int) and image.mode == "L":
        image.info["transparency"] = gray * 255 // (2**bits - 1)  # Pillow spreads the pixels over 0..255, but not this
    if "transparency" in image.info and (bits, colour) == (16, 2):
        raise InputError(
            f"{name}: 16-bit colour with one transparent colour is not read; save it with an alpha channel"
        )
    return image


def _without_metadata(data: bytes, left_out: list[str]) -> tuple[io.BytesIO, dict[str | tuple[int, int], Any]]:
    """The chunks that decide pixels as a file, and profile, EXIF and XMP as Pillow's `info` holds them."""
    view, file, at = memoryview(data), io.BytesIO(data[:8]), 8
    found: dict[str | tuple[int, int], Any] = {}
    seen: set[bytes] = set()  # one of a kind is enough: thousands of packed ones would take hours
    file.seek(8)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data) or kind == b"IEND":
            break
        if kind[0] < ord("a") or kind == b"tRNS":
            file.write(view[at:end])
        elif kind not in seen:
            try:
                known = _metadata(kind, data[at + 8 : min(end - 4, at + 8 + MAX_METADATA)])
                if known and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
                    raise ValueError("its checksum is wrong")
                if known:
                    found[known[0]] = known[1]
                    seen.add(kind)
            except (ValueError, LookupError, zlib.error) as error:
                left_out.append(f"its {'ICC profile is' if kind == b'iCCP' else 'EXIF or XMP are'} left out ({error})")
                seen.add(kind)
        at = end
    file.write(view[at:])  # the end, or what is left of a file that was cut short: Pillow says so
    file.seek(0)
    return file, found


def _metadata(kind: bytes, body: bytes) -> tuple[str, bytes | str] | None:
    """What a chunk adds to Pillow's `info`; None where that decides no pixel. Raises what damaged ones give."""
    key, _, rest = body.partition(b"\0")
    match kind, key:
        case b"iCCP", _:
            return "icc_profile", _inflated(rest[1:])
        case b"eXIf", _:
            return "exif", b"Exif\0\0" + body
        case b"iTXt", b"XML:com.adobe.xmp":
            text = rest[2:].split(b"\0", 2)[2]
            return "xmp", _inflated(text) if rest[0] else text
        case b"zTXt", b"Raw profile type exif":
            return key.decode(), _inflated(rest[1:]).decode("latin-1")
        case b"tEXt", b"Raw profile type exif":
            return key.decode(), rest.decode("latin-1")
    return None


def _inflated(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    found = inflater.decompress(data, MAX_METADATA)
    if not inflater.eof:
        raise ValueError(f"it is cut short, or larger than {MAX_METADATA:,} bytes")
    return found


# ---- TIFF

_TIFF_LOCK = threading.Lock()
_NATIVE = {
    **dict.fromkeys(("I;16S", "I;16BS"), "I;16NS"),
    **dict.fromkeys(("I;32S", "I;32BS"), "I;32NS"),
    **dict.fromkeys(("F;32F", "F;32BF"), "F;32NF"),
}
_SUBFILE, _INK_SET, _DNG = 254, 332, 50706  # tags
_SMALL_TILE = 1 << 24  # pixels; a file may have them larger than its picture


def _open_tiff(data: bytes, name: str, left_out: list[str]) -> Image.Image:
    """Everything through libtiff: Pillow's own reading of uncompressed files takes planes of 16 bits for 8."""
    try:
        if data.startswith(b"MM\0+"):
            raise SyntaxError("a BigTIFF with the high byte first")
        with _TIFF_LOCK:  # the switch is one for the process, and is looked at while the header is read
            before, TiffImagePlugin.READ_LIBTIFF = TiffImagePlugin.READ_LIBTIFF, True
            try:
                image = TiffImageFile(io.BytesIO(data))
            finally:
                TiffImagePlugin.READ_LIBTIFF = before
        fault = _tiff_fault(image)
    except SyntaxError as error:  # of a number without words
        fault = f"its tag or compression {error} is not known" if str(error).isdigit() else str(error)
    if fault:
        raise InputError(f"{name}: not a readable picture (TIFF: {fault}); save it as RGB with 8 bits per channel")
    (tile,) = image.tile
    assert isinstance(tile.args, tuple)
    rawmode, *rest = tile.args  # libtiff gives values in this machine's byte order, which Pillow forgets for some
    image.tile = [tile._replace(args=(_NATIVE.get(rawmode, rawmode), *rest))]
    if image.mode == "P" and max(image.tag_v2[COLORMAP]) < 256:  # of 8 bits, which Pillow takes for 16
        image.palette = ImagePalette.raw("RGB;L", image.tag_v2[COLORMAP])
    if image.mode.startswith(("I", "F")):
        top = 1 if image.mode == "F" else 4095 if image.tag_v2.get(BITSPERSAMPLE) == (12,) else 65535
        is_white = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION, 0) == 0
        image.info[GRAY_RANGE] = (top, 0) if is_white else (0, top)
    return image


def _tiff_fault(image: TiffImageFile) -> str:
    """Why it would come out as other pixels, or take more memory than the picture; empty where it would not."""
    tags = image.tag_v2
    if tags.get(_SUBFILE, 0) & 1 or _DNG in tags:
        return "the first picture in it is a preview of another"
    if image.mode in ("LA", "La", "PA") and tags.get(PLANAR_CONFIGURATION) == 2:
        return "gray with transparency in separate planes"
    if image.mode in ("L", "LA", "La") and 2 in tags.get(SAMPLEFORMAT, ()):
        return "signed values of 8 bits"
    if image.mode == "CMYK" and tags.get(_INK_SET, 1) != 1:
        return "inks that are not CMYK"
    if tags.get(TILEWIDTH, 0) * tags.get(TILELENGTH, 0) > max(_SMALL_TILE, image.width * image.height):
        return "its tiles are larger than the picture"
    return ""


# ---- TGA, HEIF


class _Tga(TgaImageFile):
    def load_end(self) -> None:
        """Four bytes a pixel are no transparency where the header gives it no bits."""
        super().load_end()
        assert self.fp is not None
        self.fp.seek(17)
        if self.mode == "RGBA" and not self.fp.read(1)[0] & 15:
            self.im.fillband(3, 255)


def _open_tga(data: bytes, name: str, left_out: list[str]) -> Image.Image:
    return _Tga(io.BytesIO(data))


def _open_heif(data: bytes, name: str, left_out: list[str]) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise InputError(f"{name}: a HEIC picture is read with the extra heif: pip install 'ztrain[heif]'") from error
    return HeifImageFile(io.BytesIO(data))


_OPENERS = {"PNG": _open_png, "TIFF": _open_tiff, "TGA": _open_tga, "HEIF": _open_heif}
