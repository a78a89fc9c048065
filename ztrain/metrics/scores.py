"""Scores of generated pictures against their triplets (reference, prompt, target).

In come pictures, vectors of them (towers.py) and what a judge said (classes, logits); no model is loaded here.
A score is a function to one number for each triplet, (T,) float32, in the triplets' order; NaN where a triplet cannot
tell. intervals.py turns them into means with their uncertainty. `kid` and `cmmd` compare whole sets of vectors.
docs/metrics.md says what each is good for.

Legend: T triplets, S seeds, K classes, D dimensions of an embedding, H and W a picture's height and width, P pixels;
RGB in [0, 1].
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ztrain.errors import InputError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's convert("L") uses
_STRUCTURE = 16  # copy_score compares pictures of 16 x 16
_PALETTE_DIRECTIONS, _PALETTE_LEVELS, _PALETTE_PIXELS = 64, 1024, 1 << 16
_XYZ_OF_RGB = (
    (506752 / 1228815, 87881 / 245763, 12673 / 70218),
    (87098 / 409605, 175762 / 245763, 12673 / 175545),
    (7918 / 409605, 87881 / 737289, 1001167 / 1053270),
)
_WHITE = (0.3127 / 0.3290, 1.0, (1 - 0.3127 - 0.3290) / 0.3290)  # D65
_PICTURES_AT_ONCE = 16  # spectra held at a time
_TIE = 1e-9  # cosines this close are one: float64 sums over D differ by less, distinct pictures by more


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


def cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cosine of each output's vector to its target's, (T,) in [-1, 1]; 1 is best. Both (T, D).

    Likeness of style where both are vectors of pictures, obedience to the prompt where targets are vectors of texts.
    What is good depends on the model; compare with what another triplet's target gets.
    """
    _embeddings(outputs, targets)
    return F.cosine_similarity(outputs.double(), targets.double(), dim=1).float()


def diversity(embeddings: Tensor) -> Tensor:
    """How different a triplet's pictures are over seeds, (T,) in [0, S / (S - 1)]: 1 - the mean cosine of two of them.

    0 where all are alike, 1 where they share nothing. More is better only among pictures that obey: noise is diverse.
    `embeddings`: (T, S, D), S at least 2.
    """
    if embeddings.ndim != 3:
        raise ValueError(f"embeddings must be (T, S, D), not {tuple(embeddings.shape)}")
    triplets, seeds, width = embeddings.shape
    _rows("embeddings", embeddings.reshape(triplets * seeds, width))
    if seeds < 2:
        raise InputError("diversity needs at least 2 seeds of each triplet, not 1; draw more")
    vectors = F.normalize(embeddings.double(), dim=2)
    together = vectors.sum(dim=1).square().sum(dim=1)  # (T,): every pair twice, and each with itself
    alone = vectors.square().sum(dim=(1, 2))
    return (1 - (together - alone) / (seeds * (seeds - 1))).float()


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
    its prompt asks. So `interval(difference(leak(...), leak_by_chance(...)), drop_nan=True)` is 0 in expectation for a
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
    `copy_score(targets, references)`, what the true pictures have (`difference`). Luminance, because hue is
    style that should be taken over while light and dark draw the objects; 16 x 16, because texture is style as well.

    It knows a copy that is recoloured, paler, darker, grainy or of another size. It does not know one that is
    mirrored, turned, inverted, moved by an eighth of a side or cut to two thirds (tests/test_metrics_truth.py).

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


def palette_error(outputs: Sequence[Tensor] | Tensor, references: Sequence[Tensor] | Tensor) -> Tensor:
    """How far apart the colours of two pictures are, whatever is where, (T,) in Delta E (CIE 1976); 0 is best.

    The least mean distance that one picture's colours must be moved to become the other's, sliced: twice the mean
    Wasserstein-1 distance of both along 64 directions through CIELAB. For pictures of one colour each that is their
    Delta E (within 2 %), about 2 is just noticed, black to white is 100. A patch of the right colour in the wrong place
    costs nothing, too large a patch does.

    `outputs`, `references`: T pictures (3, H, W) each, of any sizes. Of a picture of over 65,536 pixels as many are
    drawn, the same each time.

    Source: Bonneel et al., Sliced and Radon Wasserstein Barycenters of Measures, 2015.
    """
    if len(outputs) != len(references) or not len(outputs):
        raise ValueError(f"{len(outputs)} outputs and {len(references)} references")
    errors = []
    for output, reference in zip(outputs, references, strict=True):
        drawn, shown = (_palette(name, x) for name, x in (("outputs", output), ("references", reference)))
        errors.append(2 * (drawn - shown).abs().mean())
    return torch.stack(errors).to(outputs[0].device)


def kid(x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Kernel distance of two sets of features, (N, D) and (M, D): 0 in expectation where both are of one kind.

    The unbiased squared MMD with the kernel (a . b / D + 1)^3, mean over `subsets` draws of `size` from each; where
    neither set has more, over all at once. It may come out below 0. The kernel wants entries of about 1, as Inception's
    are: give vectors of unit length times sqrt(D).

    Source: Binkowski et al., Demystifying MMD GANs, 2018 (arXiv 1801.01401), section 4.
    """
    _sets(x, y)
    if subsets < 1 or size < 2:
        raise ValueError(f"subsets {subsets} must be positive, size {size} at least 2")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    first, second = x.double(), y.double()
    if max(len(first), len(second)) <= size:
        return _squared_mmd(first, second, kernel)
    generator = torch.Generator().manual_seed(seed)
    found = 0.0
    for _ in range(subsets):
        some = [rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)] for rows in (first, second)]
        found += _squared_mmd(some[0], some[1], kernel)
    return found / subsets


def cmmd(x: Tensor, y: Tensor) -> float:
    """Kernel distance of two sets of unit vectors, (N, D) and (M, D), times 1000: 0 in expectation for one kind.

    The unbiased squared MMD with a Gaussian kernel of sigma 10, so it may come out below 0. The authors' program keeps
    each vector's likeness to itself in the means, which for few pictures gives more than 0 for equal kinds.

    Source: Jayasumana et al., Rethinking FID, 2024 (arXiv 2401.09603), section 4.1.
    """
    _sets(x, y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * 10.0**2))

    return 1000 * _squared_mmd(x.double(), y.double(), kernel)


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

    Infinite for equal pictures, which ztrain.metrics.intervals refuses. `images`, `originals`: (T, 3, H, W).
    """
    _images("images", images)
    _images("originals", originals)
    if images.shape != originals.shape:
        raise ValueError(f"images are {tuple(images.shape)} and originals {tuple(originals.shape)}")
    error = (images.double() - originals.double()).square().mean(dim=(1, 2, 3))
    return (-10 * error.log10()).float()


def _squared_mmd(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Unbiased, of (N, D) and (M, D): Gretton et al., A Kernel Two-Sample Test, JMLR 13, 2012, equation 3."""
    within = 0.0
    for rows in (x, y):
        likeness = kernel(rows, rows)
        within += float(likeness.sum() - likeness.diagonal().sum()) / (len(rows) * (len(rows) - 1))
    return within - 2 * float(kernel(x, y).mean())


def _palette(name: str, picture: Tensor) -> Tensor:
    """Quantiles of a picture's colours along each direction, (directions, levels)."""
    _images(name, picture[None])
    pixels = picture.flatten(1).T  # (P, 3)
    if len(pixels) > _PALETTE_PIXELS:
        drawn = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:_PALETTE_PIXELS]
        pixels = pixels[drawn.to(pixels.device)]
    along = _directions() @ _lab(pixels.double()).T.cpu()  # (directions, P)
    ordered = torch.from_numpy(np.sort(along.float().numpy(), axis=1))  # five times as fast as torch's
    levels = (torch.arange(_PALETTE_LEVELS) + 0.5) / _PALETTE_LEVELS
    return ordered[:, (levels * len(pixels)).long()]


def _directions() -> Tensor:
    """Even over a half sphere, (directions, 3): a Fibonacci spiral (Swinbank and Purser, 2006)."""
    number = torch.arange(_PALETTE_DIRECTIONS, dtype=torch.float64)
    height = (number + 0.5) / _PALETTE_DIRECTIONS
    turn = number * math.pi * (3 - math.sqrt(5))
    radius = (1 - height.square()).sqrt()
    return torch.stack([height, radius * turn.cos(), radius * turn.sin()], dim=1)


def _lab(rgb: Tensor) -> Tensor:
    """CIELAB under D65, (P, 3), of sRGB (P, 3).

    Transfer function, matrix and white of CSS Color Module Level 4, sections 10.2 and 18; the rest CIE 15:2004.
    """
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ torch.tensor(_XYZ_OF_RGB, dtype=rgb.dtype, device=rgb.device).T
    relative = xyz / torch.tensor(_WHITE, dtype=rgb.dtype, device=rgb.device)
    bent = torch.where(relative > 216 / 24389, relative.clamp(min=0) ** (1 / 3), (24389 / 27 * relative + 16) / 116)
    x, y, z = bent.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


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


def _sets(x: Tensor, y: Tensor) -> None:
    _rows("x", x)
    _rows("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} features and y {y.shape[1]}; need the same model's")
    if min(len(x), len(y)) < 2:
        raise InputError(f"a distance of sets needs at least 2 pictures of each, not {len(x)} and {len(y)}; draw more")


def _images(name: str, images: Tensor) -> None:
    """Raises unless images are (T, 3, H, W) floats in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(f"{name} must be floats of shape (T, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    if not (images.min() >= 0 and images.max() <= 1):  # NaN fails as well
        raise ValueError(f"{name} must lie in [0, 1], not [{images.min():.3g}, {images.max():.3g}]")
