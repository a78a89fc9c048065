"""What is asked and measured of diversity: pairs of prompt and reference, pictures of several seeds, their scores.

Targets and references are painted: held-out contents, styles that no model has seen, each style once, so that an
interval over references is one over styles. The painter also says how different pictures of one content in one style
really are. Every score is one number for each pair: of likeness the mean over seeds, of diversity one of all seeds.

Legend: T pairs, S seeds, D width of an embedding, P pixels of a side.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.attention_mass import Mass, Tokens, Watched, tokens_of
from benchmarks.diversity_options import PLAIN, Option
from ztrain.adapters import build_adapters
from ztrain.conditioning import Encoded
from ztrain.config import Config, list_reads
from ztrain.encoders import Encoders
from ztrain.export import adapt, check_identity, encoder_identities
from ztrain.flow import sampler_noise
from ztrain.metrics import correct, cosine, diversity, high_frequency_energy
from ztrain.mini.exam import Judges, Scores
from ztrain.mini.painter import draw_poses, paint
from ztrain.mini.style_folders import Drawing, share_contents
from ztrain.mini.subject import Subject, to_bytes, to_pictures
from ztrain.mini.trials import Method
from ztrain.mini.world import CONTENT_CLASSES, Contents, Styles, contents_of, draw_styles, pick
from ztrain.model import AdaptedDiT
from ztrain.models import identity
from ztrain.sample import sample

_PAIRS_SEED = 4_000_000
"""Galleries of models, judges and scorecards have lower seeds (mini/exam.py)."""
_SPLIT_SEED = 1
"""Of the plan of the shipped adapters (benchmarks/shipped_adapters.py): its split test was not trained on."""
_STRIDE = 10_000  # more than pairs: picture t of seed s starts from noise s * _STRIDE + t
_CALLS = (0, 3, 6, 9, 11)  # of the sampler's twelve, at which attention is watched
_GRID, _LUMA = 16, (0.299, 0.587, 0.114)  # structure as metrics.copy_score sees it


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """What is asked: T contents to draw, in as many styles, of which the references show other contents."""

    styles: Styles
    asked: Contents
    shown: Contents
    prompts: list[str]

    @classmethod
    def draw(cls, count: int) -> "Pairs":
        chance = random.Random(_PAIRS_SEED)
        held_out = [d for d in share_contents(("train", "test"), _SPLIT_SEED) if d.split == "test"]
        asked = [chance.choice(held_out) for _ in range(count)]
        shown = [chance.choice([d for d in held_out if d.kind != own.kind]) for own in asked]
        return cls(
            styles=draw_styles(count, torch.Generator().manual_seed(_PAIRS_SEED)),
            asked=_contents(asked),
            shown=_contents(shown),
            prompts=[drawing.prompt for drawing in asked],
        )

    def __len__(self) -> int:
        return len(self.prompts)


def _contents(drawings: Sequence[Drawing]) -> Contents:
    return contents_of(torch.tensor([drawing.number for drawing in drawings]))


class Study:
    """A family, pairs, and the seeds from which each is drawn."""

    def __init__(self, subject: Subject, config: Config, count: int, seeds: Sequence[int]) -> None:
        if len(seeds) < 2:
            raise ValueError(f"diversity is of at least 2 seeds, not {len(seeds)}")
        self.subject, self.config, self.seeds = subject, config, list(seeds)
        self.pairs = Pairs.draw(count)
        self.judges = Judges(subject.folder / "judges", subject.device)
        self.targets = self._painted(self.pairs.asked, self.pairs.styles, 0)  # (T, 3, P, P)
        self.references = self._painted(self.pairs.shown, self.pairs.styles, 1)
        self._true = self.judges.look(self.targets)
        self._encoders = Encoders(subject.text, subject.codec)
        self._states: dict[tuple[Any, ...], Encoded] = {}

    @cached_property
    def _known(self) -> dict[str, dict[str, str]]:
        return {"transformer": identity(self.subject.dit, "transformer")}

    # --- pictures -----------------------------------------------------------------------------------------------------

    def _painted(self, contents: Contents, styles: Styles, turn: int) -> Tensor:
        """(T, 3, P, P) uint8 with poses, and grain, of their own for every turn."""
        poses = draw_poses(contents, torch.Generator().manual_seed(_PAIRS_SEED + turn))
        size, device = self.subject.size, self.subject.device
        return paint(contents, styles, poses, size, seed=_PAIRS_SEED + turn, device=device)

    def painted(self, *, in_one_style: bool) -> Tensor:
        """(S, T, 3, P, P): what was asked for as the painter draws it again and again, in its style or in any."""
        drawn = []
        for turn in range(2, 2 + len(self.seeds)):
            rows = torch.arange(len(self.pairs)) if in_one_style else (torch.arange(len(self.pairs)) + turn)
            styles = pick(self.pairs.styles, rows % len(self.pairs))
            drawn.append(self._painted(self.pairs.asked, styles, turn))
        return torch.stack(drawn)

    def encode(self, method: Method) -> Encoded:
        """All pairs as the method reads them."""
        reads = list_reads(method.adapters)
        key = (reads, method.encoders)
        if key not in self._states:
            self._encoders.add(self.config, reads, torch.float32, self.subject.device)
            references = [[picture] for picture in to_pictures(self.references)]
            states = self._encoders.encode(self.pairs.prompts, references, reads, method.encoders)
            self._states[key] = states.to(self.subject.device)
        encoded = self._states[key]
        encoded = encoded.without_reference() if method.sees == "none" else encoded
        return encoded if method.has_prompt else encoded.without_text()

    def model(self, method: Method) -> AdaptedDiT:
        """On a transformer of its own: adapters change it."""
        if method.exported is None:
            model = AdaptedDiT(copy.deepcopy(self.subject.dit), build_adapters(list(method.adapters))).eval()
        else:
            check_identity(method.exported, encoder_identities(self._encoders) | self._known)
            model = adapt(copy.deepcopy(self.subject.dit), method.exported)
        model.set_scales([method.scale] * len(method.adapters))
        return model

    def draw(self, method: Method, option: Option = PLAIN) -> Tensor:
        """(S, T, 3, P, P) uint8; picture t of seed s starts from the same noise for all methods and options."""
        encoded = self.encode(method)
        asked = self.model(replace(method, scale=method.scale * option.scale))
        generator = torch.Generator().manual_seed(_PAIRS_SEED)
        model = option.wrap(asked, generator)
        settings = replace(self.subject.settings, **option.settings)
        every = [(seed, row) for seed in self.seeds for row in range(len(self.pairs))]
        pictures = []
        for start in range(0, len(every), 4 * self.subject.batch):
            some = every[start : start + 4 * self.subject.batch]
            batch = option.prepare(encoded.select([row for _, row in some]), generator)
            latents = sample(model, batch, [self._noise(*each) for each in some], settings)
            pictures.append(to_bytes(self.subject.codec.decode_pixels(torch.stack(latents))))
        return torch.cat(pictures).unflatten(0, (len(self.seeds), len(self.pairs)))

    def _noise(self, seed: int, row: int) -> Tensor:
        shape = self.subject.codec.latent_shape(self.subject.size, self.subject.size)
        return sampler_noise(seed * _STRIDE + row, shape).to(self.subject.device)

    def watch(self, method: Method) -> tuple[Tokens, list[Mass]]:
        """What stands where, and what attention each token got while the first seed's pictures were drawn."""
        encoded, model = self.encode(method), self.model(method)
        prompts = self.pairs.prompts if method.has_prompt else [""] * len(self.pairs)
        side = self.subject.codec.latent_shape(self.subject.size, self.subject.size)[-1]
        tokens = tokens_of(model, encoded, prompts, self.subject.text.tokenizer, side)
        watched = Watched(model, tokens, _CALLS)
        sample(
            watched, encoded, [self._noise(self.seeds[0], row) for row in range(len(self.pairs))], self.subject.settings
        )
        return tokens, watched.masses

    # --- scores -------------------------------------------------------------------------------------------------------

    def score(self, images: Tensor) -> Scores:
        """Of pictures (S, T, 3, P, P) uint8, each (T,)."""
        count = len(images)
        seen = self.judges.look(images.flatten(0, 1))
        scores: Scores = {}
        for name, embeddings in seen.styles.items():
            true = self._true.styles[name].repeat(count, 1)
            scores[f"{name}_cosine"] = cosine(embeddings, true).unflatten(0, (count, -1)).mean(0)
            scores[f"{name}_diversity"] = diversity(embeddings.unflatten(0, (count, -1)).transpose(0, 1))
        judged = {name: seen.logits[name].argmax(1).unflatten(0, (count, -1)) for name in CONTENT_CLASSES}
        for whose, contents in (("prompt", self.pairs.asked), ("reference", self.pairs.shown)):
            right = [correct_share(judged[name], getattr(contents, name)) for name in CONTENT_CLASSES]
            scores[f"{whose}_kind"] = right[0]
            scores[f"{whose}_content"] = torch.stack(right).mean(0)
        for name, classes in judged.items():
            scores[f"distinct_{name}"] = distinct_share(classes.unsqueeze(-1))
        scores["distinct_contents"] = distinct_share(torch.stack(list(judged.values()), -1))
        scores["structure_diversity"] = structure_diversity(images)
        scores["pixel_distance"] = pixel_distance(images)
        energy = high_frequency_energy(images.flatten(0, 1).float() / 255)
        return scores | {"high_frequency": energy.unflatten(0, (count, -1)).mean(0)}


def structure_diversity(images: Tensor) -> Tensor:
    """1 - the mean Pearson correlation of two seeds' pictures, of their luminance at 16 x 16, (T,); 0 = all alike.

    NaN where a picture is flat, which correlates with nothing. images: (S, T, 3, P, P) uint8.
    """
    small = F.adaptive_avg_pool2d(images.flatten(0, 1).double() / 255, _GRID).flatten(2)
    light = (small * torch.tensor(_LUMA, dtype=torch.float64, device=images.device)[:, None]).sum(1)
    centred = (light - light.mean(1, keepdim=True)).unflatten(0, images.shape[:2]).transpose(0, 1)  # (T, S, 256)
    is_flat = (centred.norm(dim=2) < 1e-6).any(1)
    return diversity(centred).masked_fill(is_flat, torch.nan)


def pixel_distance(images: Tensor) -> Tensor:
    """Mean absolute difference of pixels over all pairs of seeds, (T,) in [0, 1]. images: (S, T, 3, P, P) uint8."""
    pixels, count = images.float().flatten(2) / 255, len(images)
    distances = [
        (pixels[first] - pixels[second]).abs().mean(-1) for first in range(count) for second in range(first + 1, count)
    ]
    return torch.stack(distances).mean(0)


def distinct_share(classes: Tensor) -> Tensor:
    """Share of the S pictures' classes (S, T, labels) that are distinct, (T,) in [1 / S, 1]; 1 / S = all alike."""
    found = [len(row.unique(dim=0)) / len(classes) for row in classes.transpose(0, 1).cpu()]
    return torch.tensor(found)


def correct_share(judged: Tensor, true: Tensor) -> Tensor:
    """Share of the S pictures that show the true class, (T,). judged: (S, T); true: (T,)."""
    there = true.to(judged.device)
    return torch.stack([correct(row, there) for row in judged]).mean(0)


def strip(images: Tensor, shown: int) -> Image.Image:
    """The first pairs' pictures (S, T, 3, P, P): a row for each pair, a column for each seed."""
    rows = images[:, :shown].permute(1, 3, 0, 4, 2).flatten(0, 1).flatten(1, 2)  # (shown P, S P, 3)
    return Image.fromarray(rows.contiguous().cpu().numpy())
