"""Judges: small networks that know the truth about a world's pictures, for scores that need no opinion.

ContentJudge says which classes a picture shows. StyleJudge gives an embedding in which pictures of one style are near
each other whatever they show. Both are trained on true pictures only and never see a generated one; their accuracy on
held-out true pictures belongs beside every score they give.

Legend: B pictures, S pixels of a side, D embedding width.
"""

import json
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from miniature.fit import Draws, FitSettings, Fitted, fit, full_precision, training
from miniature.gallery import Gallery
from ztrain.frozen.sources import explained, read_json
from ztrain.io.tensors import read_tensors

STYLE_JUDGES = ("style", "style_second")
"""Names of two with seeds of their own, so that a ranking can be checked."""

_WIDTHS = (24, 48, 72, 96)
_TEMPERATURE = 0.1
_BATCH = 256


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norms[0](self.first(x)))
        return x + F.silu(self.norms[1](self.second(x)))


class Trunk(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> (B, features): four halvings, then a 4 x 4 grid that still knows where things are."""

    def __init__(self) -> None:
        super().__init__()
        pairs = zip((3, *_WIDTHS[:-1]), _WIDTHS, strict=True)
        self.blocks = nn.ModuleList([_Block(inputs, outputs) for inputs, outputs in pairs])
        self.features = _WIDTHS[-1] * 16

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels
        for block in self.blocks:
            x = block(x)
        return F.adaptive_avg_pool2d(x, 4).flatten(1)


class ContentJudge(nn.Module):
    """Logits of every label, each (B, classes)."""

    def __init__(self, classes: dict[str, int]) -> None:
        super().__init__()
        self.classes = dict(classes)
        self.trunk = Trunk()
        self.heads = nn.ModuleDict({name: nn.Linear(self.trunk.features, count) for name, count in classes.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.trunk(pixels)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def judge(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of each label for images (N, 3, S, S) uint8."""
        parts = [self(_pixels(chunk)) for chunk in images.split(_BATCH)]
        return {name: torch.cat([part[name].float() for part in parts]) for name in self.classes}


class StyleJudge(nn.Module):
    """Unit vectors (B, D); styles that look alike are near."""

    def __init__(self, dimensions: int = 48) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.trunk = Trunk()
        self.head = nn.Linear(self.trunk.features, dimensions)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.head(self.trunk(pixels)).float(), dim=-1)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(N, D) of images (N, 3, S, S) uint8."""
        return torch.cat([self(_pixels(chunk)) for chunk in images.split(_BATCH)])


def _pixels(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _shaken(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A little shift, zoom, brightness, noise and blur, so that a decoder's small errors do not fool a judge."""
    count = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device=pixels.device)

    zoom, shift = uniform(0.95, 1.05, 1, 1), uniform(-0.1, 0.1, 2, 1)  # in units of half a side
    moves = torch.cat([zoom * torch.eye(2, device=pixels.device), shift], dim=2)  # (B, 2, 3)
    with full_precision(pixels.device):
        grid = F.affine_grid(moves, list(pixels.shape), align_corners=False)
        pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
    soft = F.avg_pool2d(F.pad(pixels, [1] * 4, mode="replicate"), 3, stride=1)
    mixed = torch.lerp(pixels, soft, uniform(-0.3, 0.9, 1, 1, 1))
    return mixed + uniform(0.0, 0.08, 1, 1, 1) * noise + uniform(-0.05, 0.05, 3, 1, 1)


def train_content_judge(judge: ContentJudge, gallery: Gallery, plan: FitSettings, seed: int) -> Fitted:
    """Cross-entropy over all labels, in place."""
    draws = Draws(len(gallery), plan.batch_size, seed, gallery.device)

    def loss(step: int) -> Tensor:
        rows = draws.rows()
        logits = judge(_shaken(gallery.pixels(rows), draws.generator))
        return torch.stack([F.cross_entropy(logits[n].float(), gallery.labels[n][rows]) for n in judge.classes]).mean()

    with training(judge):
        return fit("content judge", [judge], loss, plan, gallery.device)


def train_style_judge(judge: StyleJudge, gallery: Gallery, plan: FitSettings, seed: int) -> Fitted:
    """Supervised contrastive loss over pairs of one style (arXiv 2004.11362, equation 2), in place.

    Raises ValueError if no style has two pictures.
    """
    order = gallery.styles.argsort(stable=True)  # pictures of one style side by side
    styles = gallery.styles[order]
    _, counts = styles.unique_consecutive(return_counts=True)
    if int(counts.max()) < 2:
        raise ValueError("no style has two pictures; a style judge learns from pairs")
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)  # where each picture's style begins
    many = torch.repeat_interleave(counts, counts)
    paired = (many > 1).nonzero().squeeze(1)
    draws = Draws(len(paired), plan.batch_size // 2, seed, gallery.device)

    def loss(step: int) -> Tensor:
        one = paired[draws.rows()]
        jump = torch.rand(len(one), generator=draws.generator, device=one.device)
        other = (one - first[one] + 1 + (jump * (many[one] - 1)).long()) % many[one] + first[one]
        both = torch.cat([one, other])
        vectors = judge(_shaken(gallery.pixels(order[both]), draws.generator))
        same = styles[both][:, None] == styles[both]
        with full_precision(gallery.device):
            logits = vectors @ vectors.T / _TEMPERATURE
        itself = torch.eye(len(both), dtype=torch.bool, device=both.device)
        log_share = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
        positives = same & ~itself
        return -(log_share * positives).sum(1).div(positives.sum(1)).mean()

    with training(judge):
        return fit("style judge", [judge], loss, plan, gallery.device)


def save_judge(judge: ContentJudge | StyleJudge, folder: Path, name: str) -> None:
    """Writes `<name>.safetensors` and `<name>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in judge.state_dict().items()}
    save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt"})
    shape = {"classes": judge.classes} if isinstance(judge, ContentJudge) else {"dimensions": judge.dimensions}
    (folder / f"{name}.json").write_text(json.dumps(shape, indent=2) + "\n", encoding="utf-8")


def load_content_judge(folder: Path, device: torch.device | str, name: str = "content") -> ContentJudge:
    return _loaded(ContentJudge, folder, device, name, "classes")


def load_style_judge(folder: Path, device: torch.device | str, name: str = "style") -> StyleJudge:
    return _loaded(StyleJudge, folder, device, name, "dimensions")


Judge = TypeVar("Judge", ContentJudge, StyleJudge)


def _loaded(kind: type[Judge], folder: Path, device: torch.device | str, name: str, key: str) -> Judge:
    """key: of the one setting. Raises InputError for damaged files."""
    with explained(f"{folder / name}"):
        judge = kind(read_json(folder / f"{name}.json")[key])
        judge.load_state_dict(read_tensors(folder / f"{name}.safetensors"))
    return judge.float().to(device).eval().requires_grad_(False)
