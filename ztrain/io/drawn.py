"""Pictures that this project draws: each appears under its name whole, and is looked at before a later run trusts it.

In: pictures in memory, or paths where some may be. Out: files, and which of them are still to be drawn.
"""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from ztrain.io.files import check_regular, whole_file

# What Pillow raises on a file that is no picture, or only a part of one.
_DAMAGE = (OSError, SyntaxError, ValueError)


def save_picture(image: Image.Image, path: Path) -> None:
    """In the format of its name, in place of an older one. Raises InputError."""
    with whole_file(path) as building:
        image.save(building)


def is_whole(path: Path) -> bool:
    """Whether a PNG is there, and not cut short or damaged since: all its bytes are compared with their checksums."""
    try:
        check_regular(path)
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except _DAMAGE:  # InputError is a ValueError
        return False
    return True


def still_to_draw(paths: Iterable[Path]) -> list[Path]:
    """Those that are not there, or not whole, which is said: they are to be made again."""
    lost = [path for path in paths if not is_whole(path)]
    if damaged := [path for path in lost if path.exists()]:
        count = "1 picture" if len(damaged) == 1 else f"{len(damaged)} pictures"
        tqdm.write(f"{damaged[0].parent}: {count} cannot be read, so made again; the first is {damaged[0].name}")
    return lost
