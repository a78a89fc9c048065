"""Scores of generated pictures against their triplets (reference, prompt, target), each with its uncertainty.

In come pictures and what a judge said of them (classes, logits, embeddings); no model is loaded here. Every score is a
function to one number for each triplet, (T,) float32, in the triplets' order; NaN where a triplet cannot tell.
`bootstrap` turns them into a mean with its interval, `paired_bootstrap` compares two lists on the same triplets. A new
score is one more such function.

Legend: T triplets, K classes, D dimensions of an embedding, H and W a picture's height and width; RGB in [0, 1].
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ztrain.errors import InputError

Groups: TypeAlias = Tensor | Sequence[Hashable]
"""One name or number for each triplet; equal ones are resampled together."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's convert("L") uses
_STRUCTURE = 16  # copy_score compares pictures of 16 x 16
_DRAWS_AT_ONCE = 1 << 22  # resampled entries held at a time: 32 MiB of indices
_PICTURES_AT_ONCE = 16  # spectra held at a time
_TIE = 1e-9  # cosines this close are one: float64 sums over D differ by less, distinct pictures by more


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `count` triplets (those that could tell), and the interval around it."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def bootstrap(
    values: Tensor,
    *,
    groups: Groups | None = None,
    drop_nan: bool = False,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """The mean of `values`, (T,), and its percentile bootstrap interval.

    `groups` draws whole groups with replacement, for triplets that are not independent (they share a reference, or are
    seeds of one prompt); the mean stays the one over triplets. `drop_nan` leaves out the triplets that cannot tell and
    counts the rest; without it a NaN is an error, and an infinity always is. With few triplets or groups (under about
    20) the interval is somewhat too narrow, and where all values are equal it has no width.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    told = _vector("values", values)
    names = None if groups is None else _group_numbers(groups, len(told))
    if not drop_nan and np.isnan(told).any():
        raise ValueError(f"{np.isnan(told).sum()} of {len(told)} values are NaN; drop_nan=True leaves them out")
    if resamples < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(f"resamples {resamples} must be positive, confidence {confidence} above 0 and below 1")
    kept = ~np.isnan(told)
    if kept.sum() < 2:
        raise InputError(f"an interval needs at least 2 triplets that can tell, not {kept.sum()}; score more")
    told = told[kept]
    sums, sizes = told, np.ones_like(told)
    if names is not None:
        _, names = np.unique(names[kept], return_inverse=True)
        sums, sizes = (np.bincount(names, weights=each).astype(np.float64) for each in (told, sizes))
        if len(sums) < 2:
            raise InputError("an interval needs at least 2 groups of triplets, not 1; score more")
    means = _resampled_means(sums, sizes, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(told.mean()), float(low), float(high), len(told))


def paired_bootstrap(
    ours: Tensor,
    theirs: Tensor,
    *,
    groups: Groups | None = None,
    drop_nan: bool = False,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """The mean of `ours - theirs`, both (T,) over the same triplets in the same order; above 0 when ours is larger.

    What both find easy or hard cancels, so that an interval without 0 is a difference even where the two intervals of
    their own overlap. `drop_nan` leaves out triplets where either cannot tell.
    """
    mine, others = _vector("ours", ours), _vector("theirs", theirs)
    if len(mine) != len(others):
        raise ValueError(f"ours has {len(mine)} triplets and theirs {len(others)}; compare over the same triplets")
    return bootstrap(
        torch.from_numpy(mine - others),
        groups=groups,
        drop_nan=drop_nan,
        seed=seed,
        resamples=resamples,
        confidence=confidence,
    )


def correct(predicted: Tensor, true: Tensor) -> Tensor:
    """1 where the judged class is the true one, else 0, (T,); 1 is best."""
    _classes(predicted=predicted, true=true)
    return (predicted == true).float()


def topk_correct(logits: Tensor, true: Tensor, k: int) -> Tensor:
    """1 where fewer than `k` other classes have a logit as large as the true one's, else 0, (T,); 1 is best.

    `logits`: (T, K). A tie counts as a miss, so that equal logits do not hit.
    """
    _classes(true=true)
    _rows("logits", logits)
    if len(logits) != len(true) or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"logits {tuple(logits.shape)}, {len(true)} true classes and k {k} do not go together")
    own = logits.gather(1, true[:, None].long())
    return ((logits >= own).sum(dim=1) <= k).float()  # its own is one of them


def style_cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cosine of each output's style embedding to its target's, (T,) in [-1, 1]; 1 is best. Both (T, D)."""
    _embeddings(outputs, targets)
    return F.cosine_similarity(outputs.double(), targets.double(), dim=1).float()


def retrieval_at_1(outputs: Tensor, targets: Tensor, pool: int = 256) -> Tensor:
    """How surely each output finds its own target among `pool` targets, its own and random others, (T,) in [0, 1].

    The share of all such pools in which its own is the nearest by cosine, in closed form: where r of the T - 1 others
    are as near, C(T-1-r, pool-1) / C(T-1, pool-1). With pool == T that is plain retrieval at 1. 1 is best, 1 / pool is
    chance; ties count as nearer, so a collapsed embedding scores 0. Targets of one style compete with each other: give
    targets of distinct styles, or compare with what the targets' own second renderings reach.

    `outputs`, `targets`: style embeddings, (T, D).
    """
    _embeddings(outputs, targets)
    others, drawn = len(outputs) - 1, pool - 1
    if not 2 <= pool <= len(outputs):
        raise InputError(f"a pool of {pool} targets needs as many triplets, here are {len(outputs)}; choose 2 to that")
    found, sought = F.normalize(outputs.double(), dim=1), F.normalize(targets.double(), dim=1)
    as_near = []
    for start in range(0, len(found), 1024):
        cosine = found[start : start + 1024] @ sought.T
        rows = torch.arange(len(cosine), device=cosine.device)
        own = cosine[rows, rows + start]
        as_near.append((cosine >= own[:, None] - _TIE).sum(dim=1) - 1)
    farther = (others - torch.cat(as_near)).double()
    possible = farther.clamp(min=drawn)  # keeps lgamma's argument positive where the chance is 0 anyway
    total = torch.full_like(farther, others)
    log_chance = torch.lgamma(possible + 1) - torch.lgamma(total + 1)
    log_chance -= torch.lgamma(possible - drawn + 1) - torch.lgamma(total - drawn + 1)
    return torch.where(farther >= drawn, log_chance.exp(), 0.0).float()


def leak(judged: Tensor, reference: Tensor, prompt: Tensor) -> Tensor:
    """1 where the output shows the reference's class and not the prompt's, (T,): the reference's content leaked.

    `judged`: the class a judge sees in the output (the kind of object, say), `reference`: the class the reference
    shows, `prompt`: the class the prompt asks for. 0 where the judged class is any other one, NaN where reference and
    prompt agree (`drop_nan`). 0 is best, 1 is a perfect copier; a model that ignores the reference still scores
    `leak_by_chance`, by its own and the judge's mistakes.
    """
    _classes(judged=judged, reference=reference, prompt=prompt)
    return torch.where(reference == prompt, torch.nan, (judged == reference).float())


def leak_by_chance(judged: Tensor, reference: Tensor, prompt: Tensor) -> Tensor:
    """The leak to expect if references were dealt again at random, (T,) in [0, 1], NaN where `leak` is.

    For each triplet: the share of its judged class among the references of all triplets that show another class than
    its prompt asks. So `paired_bootstrap(leak(...), leak_by_chance(...), drop_nan=True)` is 0 in expectation for a
    model that ignores the reference, and above 0 where content leaks; it assumes that references were paired with
    prompts independently of their classes.
    """
    _classes(judged=judged, reference=reference, prompt=prompt)
    _, numbers = torch.stack([judged, reference, prompt]).unique(return_inverse=True)
    seen, shown, asked = numbers  # the classes as 0, 1, 2, ...
    frequency = torch.zeros(int(numbers.max()) + 1, device=numbers.device).index_add_(
        0, shown, torch.ones_like(shown, dtype=torch.float32)
    )
    chance = torch.where(seen == asked, 0.0, frequency[seen]) / (len(shown) - frequency[asked])
    return torch.where(reference == prompt, torch.nan, chance)


def copy_score(outputs: Tensor, references: Tensor) -> Tensor:
    """How much more an output looks like its own reference than like others', in structure, (T,) in [-2, 2].

    Pearson correlation over the pixels of the luminance, averaged down to 16 x 16, of the output and its own
    reference, minus the mean of its correlations with all references that are another picture. About 0 where nothing
    is copied, about 1 for a copy; a flat picture correlates with nothing. 0 is not always best: what style says about
    light (a dark background, a vignette, stripes) is shared with the reference on purpose, so subtract
    `copy_score(targets, references)`, what the true pictures have (`paired_bootstrap`). Luminance, because hue is
    style that should be taken over while light and dark draw the objects; 16 x 16, because texture is style as well.

    `outputs`, `references`: (T, 3, H, W), at least 16 pixels wide and high; their sizes may differ.
    """
    if len(outputs) != len(references):
        raise ValueError(f"{len(outputs)} outputs and {len(references)} references")
    drawn, shown = _structure("outputs", outputs), _structure("references", references)
    _, picture = shown.unique(dim=0, return_inverse=True)  # one number for each distinct reference
    same = torch.zeros(int(picture.max()) + 1, shown.shape[1], dtype=shown.dtype, device=shown.device)
    same.index_add_(0, picture, shown)
    others = len(shown) - picture.bincount()[picture]
    if (others == 0).any():
        raise InputError("copy_score needs at least 2 different references; score more triplets")
    by_chance = (drawn * (shown.sum(dim=0) - same[picture])).sum(dim=1) / others
    return ((drawn * shown).sum(dim=1) - by_chance).float()


def high_frequency_energy(images: Tensor) -> Tensor:
    """Share of a picture's spectral energy above half the Nyquist frequency, (T,) in [0, 1].

    Radial, over all channels, after removing each channel's mean: 0 for a flat or smooth picture, 1 for a
    checkerboard of single pixels, 1 - pi / 16 = 0.80 for white noise. Neither end is best: more than the targets' own
    is grain, ringing or a grid, less is blur. It counts pixels, so compare pictures of one size only.

    `images`: (T, 3, H, W).
    """
    _images("images", images)
    down = torch.fft.fftfreq(images.shape[2], device=images.device)  # cycles for each pixel, Nyquist is 1/2
    across = torch.fft.fftfreq(images.shape[3], device=images.device)
    high = torch.hypot(down[:, None], across[None, :]) > 0.25
    shares = []
    for some in images.split(_PICTURES_AT_ONCE):
        pixels = some.double()
        centred = pixels - pixels.mean(dim=(2, 3), keepdim=True)
        energy = torch.fft.fft2(centred, norm="ortho").abs().square()  # (t, 3, H, W)
        total = energy.sum(dim=(1, 2, 3))
        flat = total < 1e-12  # rounding of the mean is all that is left
        shares.append(torch.where(flat, 0.0, (energy * high).sum(dim=(1, 2, 3)) / total.clamp(min=1e-12)))
    return torch.cat(shares).float()


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (T,): -10 log10 of the mean squared error; larger is better.

    Infinite for equal pictures, which `bootstrap` refuses. `images`, `originals`: (T, 3, H, W).
    """
    _images("images", images)
    _images("originals", originals)
    if images.shape != originals.shape:
        raise ValueError(f"images are {tuple(images.shape)} and originals {tuple(originals.shape)}")
    error = (images.double() - originals.double()).square().mean(dim=(1, 2, 3))
    return (-10 * error.log10()).float()


def _resampled_means(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Means over triplets of `resamples` draws of as many groups, (resamples,); given each group's sum and size."""
    drawn_at_once = max(1, _DRAWS_AT_ONCE // len(sums))
    means = []
    for start in range(0, resamples, drawn_at_once):
        rows = min(drawn_at_once, resamples - start)
        drawn = generator.integers(len(sums), size=(rows, len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)


def _structure(name: str, images: Tensor) -> Tensor:
    """Luminance at 16 x 16, without its mean and of length 1 (0 where the picture is flat), (T, 256) float64."""
    _images(name, images)
    if min(images.shape[2:]) < _STRUCTURE:
        raise ValueError(f"{name} are {tuple(images.shape)}; need at least {_STRUCTURE} pixels each way")
    weights = torch.tensor(_LUMA, dtype=torch.float64, device=images.device)
    small = torch.cat(
        [F.adaptive_avg_pool2d(some.double(), _STRUCTURE).flatten(2) for some in images.split(_PICTURES_AT_ONCE)]
    )
    light = (small * weights[:, None]).sum(dim=1)
    centred = light - light.mean(dim=1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(length < 1e-6, 0.0, centred / length.clamp(min=1e-6))


def _vector(name: str, values: Tensor) -> NDArray[np.float64]:
    """One number for each triplet, as numpy; NaN passes."""
    if values.ndim != 1:
        raise ValueError(f"{name} must be (T,), one number for each triplet, not {tuple(values.shape)}")
    numbers: NDArray[np.float64] = values.detach().double().cpu().numpy()
    if np.isinf(numbers).any():
        raise ValueError(f"{np.isinf(numbers).sum()} of {len(numbers)} {name} are infinite; their mean says nothing")
    return numbers


def _group_numbers(groups: Groups, count: int) -> NDArray[np.int64]:
    """Each triplet's group as a number, (T,)."""
    if isinstance(groups, Tensor) and groups.ndim != 1:
        raise ValueError(f"groups must be (T,), one for each triplet, not {tuple(groups.shape)}")
    names: list[Hashable] = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(names) != count:
        raise ValueError(f"{len(names)} groups for {count} triplets; give one for each")
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], dtype=np.int64)


def _classes(**tensors: Tensor) -> None:
    """Raises unless all are class numbers, (T,), of the same triplets."""
    shapes = {name: tuple(classes.shape) for name, classes in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 or shape[0] == 0 for shape in shapes.values()):
        raise ValueError(f"classes must be (T,) of the same triplets, not {shapes}")
    if any(classes.is_floating_point() for classes in tensors.values()):
        raise ValueError(f"classes must be whole numbers, not { {name: c.dtype for name, c in tensors.items()} }")


def _rows(name: str, rows: Tensor) -> None:
    """Raises unless rows are (T, D) numbers, none NaN: a comparison with NaN is never true and would count as found."""
    if rows.ndim != 2 or 0 in rows.shape or not rows.is_floating_point():
        raise ValueError(f"{name} must be floats, one row for each triplet, not {rows.dtype} {tuple(rows.shape)}")
    if rows.isnan().any():
        raise ValueError(f"{name} of {int(rows.isnan().any(dim=1).sum())} of {len(rows)} triplets are NaN")


def _embeddings(outputs: Tensor, targets: Tensor) -> None:
    _rows("outputs", outputs)
    _rows("targets", targets)
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs are {tuple(outputs.shape)} and targets {tuple(targets.shape)}; need the same")


def _images(name: str, images: Tensor) -> None:
    """Raises unless images are (T, 3, H, W) floats in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(f"{name} must be floats of shape (T, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    if not (images.min() >= 0 and images.max() <= 1):  # NaN fails as well
        raise ValueError(f"{name} must lie in [0, 1], not [{images.min():.3g}, {images.max():.3g}]")
