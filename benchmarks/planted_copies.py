"""How surely data_tools.likeness finds copies: planted ones by transform, and pairs that are none, down to look-alikes.

    python -m benchmarks.planted_copies [--data ../shared/data] [--windows N]          (3 minutes on one core)

In: the drawings of emoji_styles and the photographs of photos, of which crops of one photograph count as one content.
Out: JSON on standard output. The figures are those of `find_copies`; of random pairs, those of `copy_score`.
"""

import argparse
import csv
import io
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from data_tools.likeness import BYTES, COPY_SCORE, Bytes, Copies, copy_score, find_copies, fingerprint
from ztrain.images import open_image

DATA = Path("../shared/data")
PHOTOGRAPH = "photograph"
THRESHOLDS = (0.82, 0.85, 0.88, 0.91, 0.94)
"""Of the copy score, that recall and look-alikes are reported at besides `COPY_SCORE`."""
NEAR = ("near_a.jpg", "near_b.jpg")
Change = Callable[[Image.Image, Random], Image.Image]


@dataclass(frozen=True)
class Original:
    """A picture of the shared data."""

    path: Path
    style: str
    """Its style folder, or PHOTOGRAPH."""
    content: str
    """Pictures of one content show the same thing: an emoji in any style, a photograph and its crops."""


def originals(data: Path) -> list[Original]:
    """All drawings, then all photographs."""
    drawings = sorted((data / "emoji_styles/images").glob("*/*.png"))
    with (data / "photos/captions.csv").open(encoding="utf-8", newline="") as file:
        photos = [(row["file"], Path(row["source_name"]).stem) for row in csv.DictReader(file)]
    return [Original(path, path.parent.name, path.stem) for path in drawings] + [
        Original(data / "photos" / name, PHOTOGRAPH, source) for name, source in photos
    ]


def _recompressed(image: Image.Image, random: Random) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=random.randint(40, 60))
    return Image.open(file).convert("RGB")


def _resized(low: float, high: float) -> Change:
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)

    def change(image: Image.Image, random: Random) -> Image.Image:
        scale = random.uniform(low, high)
        return image.resize((round(image.width * scale), round(image.height * scale)), random.choice(filters))

    return change


def _cropped(kept: float) -> Change:
    """Keeps this share of each side, anywhere."""

    def change(image: Image.Image, random: Random) -> Image.Image:
        width, height = round(image.width * kept), round(image.height * kept)
        left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
        return image.crop((left, top, left + width, top + height))

    return change


def _enhanced(*kinds: Callable[[Image.Image], ImageEnhance._Enhance]) -> Change:
    def change(image: Image.Image, random: Random) -> Image.Image:
        for kind in kinds:
            image = kind(image).enhance(random.uniform(0.8, 1.2))
        return image

    return change


def _cast(image: Image.Image, random: Random) -> Image.Image:
    gains = [random.uniform(0.8, 1.2) for _ in range(3)]
    return image.point([min(255, round(level * gain)) for gain in gains for level in range(256)])


def _turned(image: Image.Image, random: Random) -> Image.Image:
    """Hues turned by up to 18 degrees, a tenth of the way to the opposite colour."""
    hue, *rest = image.convert("HSV").split()
    turn = random.randint(-13, 13)
    return Image.merge("HSV", [hue.point([(level + turn) % 256 for level in range(256)]), *rest]).convert("RGB")


def _gray(image: Image.Image, random: Random) -> Image.Image:
    return image.convert("L").convert("RGB")


def _mirrored(image: Image.Image, random: Random) -> Image.Image:
    return ImageOps.mirror(image)


def _after_another(*changes: Change) -> Change:
    def change(image: Image.Image, random: Random) -> Image.Image:
        for step in changes:
            image = step(image, random)
        return image

    return change


_TONES = (ImageEnhance.Brightness, ImageEnhance.Contrast)
TRANSFORMS: Mapping[str, Change] = {
    "recompressed": _recompressed,
    "smaller": _resized(0.5, 0.75),
    "larger": _resized(1.5, 1.5),
    "cropped": _cropped(0.95),
    "brightness_contrast": _enhanced(*_TONES),
    "saturation": _enhanced(ImageEnhance.Color),
    "colour_cast": _cast,
    "hue": _turned,
    "gray": _gray,
    "combined": _after_another(_cropped(0.95), _enhanced(ImageEnhance.Brightness), _resized(0.5, 0.75), _recompressed),
    "mirrored": _mirrored,
}
"""What is called a copy; up to 20 percent of each tone and colour."""

HARDER: Mapping[str, Change] = {
    "cropped_keeping_90_percent_of_sides": _cropped(0.9),
    "cropped_keeping_95_percent_of_area": _cropped(0.95**0.5),
    "all_colours_at_once": _after_another(_enhanced(*_TONES, ImageEnhance.Color), _cast),
    "all_at_once": _after_another(
        _enhanced(*_TONES, ImageEnhance.Color), _cast, _cropped(0.95), _resized(0.5, 0.75), _recompressed
    ),
}
"""Reported beside the recall, not in it."""


def fingerprints_of(images: Iterator[Image.Image]) -> Bytes:
    """(N, BYTES) uint8."""
    return np.frombuffer(b"".join(fingerprint(image) for image in images), np.uint8).reshape(-1, BYTES)


def planted(copied: Sequence[Original], data: Path) -> dict[str, Any]:
    """Every transform of every picture, all in one heap: recall by transform, and precision of what else was paired."""
    images = [open_image(original.path) for original in copied]
    changes = {**TRANSFORMS, **HARDER}
    heap = [fingerprints_of(iter(images))]
    for name, change in changes.items():
        heap.append(fingerprints_of(change(image, Random(f"{name} {i}")) for i, image in enumerate(images)))
    near = fingerprints_of(open_image(data / "photos/awkward" / name) for name in NEAR)
    count, together = len(images), np.concatenate([*heap, near])
    asked, unasked = (find_copies(together, mirrored=flip, least_score=THRESHOLDS[0]) for flip in (True, False))

    def hits(found: Copies, name: str, least: float = COPY_SCORE) -> np.ndarray[Any, Any]:
        """(count,) bool: whether each picture is paired with its copy."""
        own = found.pairs[found.scores >= least]
        own = own[(own[:, 0] < count) & (own[:, 1] - own[:, 0] == (list(changes).index(name) + 1) * count)]
        return np.isin(np.arange(count), own[:, 0])

    def recall(least: float) -> float:
        return float(np.mean([hits(asked, name, least).mean() for name in TRANSFORMS]))

    photos = np.array([original.style == PHOTOGRAPH for original in copied])
    lopsided = np.array([_lopsided(image) for image in images])
    plain = unasked.pairs[unasked.scores >= COPY_SCORE]
    inside = plain[(plain < count * (len(TRANSFORMS) + 1)).all(1)]
    contents = np.array([original.content for original in copied] * (len(changes) + 1))
    wrong = contents[inside[:, 0]] != contents[inside[:, 1]]
    by_transform = {name: hits(asked, name) for name in changes}
    return {
        "pairs": count * len(TRANSFORMS),
        "precision": round(1 - float(wrong.mean()), 4),
        "recall": round(recall(COPY_SCORE), 4),
        "by_transform": {name: round(float(by_transform[name].mean()), 4) for name in TRANSFORMS},
        "by_transform_of_photographs": {
            name: round(float(hit[photos].mean()), 4) for name, hit in by_transform.items()
        },
        "harder": {name: round(float(by_transform[name].mean()), 4) for name in HARDER},
        "recall_by_threshold": {str(least): round(recall(least), 4) for least in THRESHOLDS},
        "near_a_near_b": bool((plain == [len(together) - 2, len(together) - 1]).all(1).any()),
        "lopsided_pictures": int(lopsided.sum()),
        "lopsided_mirror_images_found_unasked_share": round(float(hits(unasked, "mirrored")[lopsided].mean()), 4),
    }


def _lopsided(image: Image.Image) -> bool:
    """Whether luminance and its mirror image differ: a correlation below 0.9, moved by up to 5 percent or not."""
    luma = np.asarray(image.convert("L").resize((64, 64)), np.float64)
    if luma.std() == 0:
        return False
    mirrors = [np.roll(luma[:, ::-1], shift, 1) for shift in range(-3, 4)]
    return max(float(np.corrcoef(luma.ravel(), mirror.ravel())[0, 1]) for mirror in mirrors) < 0.9


def random_pairs(found: Sequence[Original], prints: Bytes, count: int = 5000) -> dict[str, Any]:
    """Pairs of different contents, half of them of one style."""
    random, rows = Random(0), [row.tobytes() for row in prints]
    by_style: dict[str, list[int]] = {}
    for index, original in enumerate(found):
        by_style.setdefault(original.style, []).append(index)
    scores: list[float] = []
    while len(scores) < count:
        one = random.randrange(len(found))
        other = random.choice(by_style[found[one].style]) if len(scores) % 2 else random.randrange(len(found))
        if found[one].content != found[other].content:
            scores.append(copy_score(rows[one], rows[other]))
    called = sum(score >= COPY_SCORE for score in scores) / count
    return {"random_pairs": count, "random_called_duplicates_share": called, "random_highest_score": max(scores)}


def look_alikes(found: Sequence[Original], prints: Bytes) -> dict[str, Any]:
    """Of all pairs of different contents in one style, the share called copies; and one content in two kin styles."""
    by_style: dict[str, dict[str, Any]] = {}
    for style in dict.fromkeys(original.style for original in found):
        mine = [index for index, original in enumerate(found) if original.style == style]
        contents = [found[index].content for index in mine]
        copies = find_copies(prints[mine], least_score=THRESHOLDS[0])
        names = np.array(contents)[copies.pairs]
        scores, names = copies.scores[names[:, 0] != names[:, 1]], names[names[:, 0] != names[:, 1]]
        pairs = sum(a != b for k, a in enumerate(contents) for b in contents[:k])
        wrong = int((scores >= COPY_SCORE).sum())
        by_style[style] = {
            "pairs": pairs,
            "called_duplicates": wrong,
            "share": round(wrong / pairs, 6),
            "pictures_in_them": len(set(names[scores >= COPY_SCORE].ravel())),
            "called_by_threshold": {str(least): int((scores >= least).sum()) for least in THRESHOLDS},
        }
    noto, blob = (
        {original.content: prints[index].tobytes() for index, original in enumerate(found) if original.style == style}
        for style in ("noto", "blob")
    )
    kin = [copy_score(noto[content], blob[content]) >= COPY_SCORE for content in sorted(set(noto) & set(blob))]
    return {
        "within_style": by_style,
        "noto_blob_same_content": {"pairs": len(kin), "paired_share": round(float(np.mean(kin)), 4)},
    }


def search(found: Sequence[Original], count: int) -> dict[str, Any]:
    """Time and memory of `count` fingerprints: windows of the pictures, one in twenty followed by a copy of it."""
    random, images = Random(0), [open_image(original.path) for original in found]
    photos = [image for image, original in zip(images, found, strict=True) if original.style == PHOTOGRAPH]
    changes = [change for name, change in TRANSFORMS.items() if name != "mirrored"]
    rows: list[bytes] = []
    while len(rows) < count:
        image = random.choice(photos if random.random() < 0.2 else images)
        width, height = (round(side * random.uniform(0.25, 0.7)) for side in image.size)
        left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
        window = image.crop((left, top, left + width, top + height))
        rows.append(fingerprint(window))
        if random.random() < 0.05:
            rows.append(fingerprint(random.choice(changes)(window, random)))
    prints = np.frombuffer(b"".join(rows[:count]), np.uint8).reshape(-1, BYTES)
    start, started = time.perf_counter(), time.process_time()
    copies = find_copies(prints)
    seconds, busy = time.perf_counter() - start, time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "fingerprints": count,
        "seconds": round(seconds, 1),
        "processor_seconds": round(busy, 1),
        "pairs_found": len(copies.pairs),
        "peak_gib_of_the_whole_program": round(peak, 2),
    }


def cost(found: Sequence[Original]) -> dict[str, float]:
    """Milliseconds to open a photograph, and to take its fingerprint: medians over photographs of the best of ten."""

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times) * 1000

    opening, taking = [], []
    for original in found:
        if original.style == PHOTOGRAPH:
            image = open_image(original.path)
            opening.append(best(lambda path=original.path: open_image(path)))  # type: ignore[misc]
            taking.append(best(lambda image=image: fingerprint(image)))  # type: ignore[misc]
    return {
        "open_image_ms": round(float(np.median(opening)), 3),
        "fingerprint_ms": round(float(np.median(taking)), 3),
    }


def measure(data: Path = DATA, *, per_style: int = 60, windows: int = 100_000) -> dict[str, Any]:
    """All figures. `per_style`: drawings of each style that are copied, beside all photographs; `windows`: 0 = no
    measurement of the search's time."""
    found = originals(data)
    styles = dict.fromkeys(original.style for original in found)
    copied: list[Original] = []
    for style in styles:
        mine = [original for original in found if original.style == style]
        copied += mine if style == PHOTOGRAPH else Random(0).sample(mine, min(per_style, len(mine)))
    prints = fingerprints_of(open_image(original.path) for original in found)
    return {
        **planted(copied, data),
        **random_pairs(found, prints),
        **look_alikes(found, prints),
        "copy_score": COPY_SCORE,
        "fingerprint_bytes": BYTES,
        **cost(found),
        **({"search": search(found, windows)} if windows else {}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder with emoji_styles and photos")
    parser.add_argument("--windows", type=int, default=100_000, help="fingerprints that the search is timed on")
    given = parser.parse_args()
    print(json.dumps(measure(given.data, windows=given.windows), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
