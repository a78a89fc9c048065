"""Metrics against the painter, who knows which pictures share a style, what is drawn, and what was copied."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniature.gallery import Gallery
from miniature.judges import load_style_judge
from miniature.painter import PaintedWorld
from miniature.trials import WEIGHTS
from ztrain.frozen.sources import Source
from ztrain.metrics.intervals import difference, interval
from ztrain.metrics.scores import cmmd, copy_score, cosine, diversity, kid, palette_error
from ztrain.metrics.towers import Tower

STYLES, OF_A_STYLE = 32, 8
LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
JUDGES = ("judge", "siglip")


@dataclass(frozen=True)
class Looked:
    """Pictures of 32 styles, eight contents of each, side by side; and what models make of them."""

    gallery: Gallery
    pixels: Tensor
    vectors: dict[str, Tensor]
    tower: Tower

    @property
    def contents(self) -> list[int]:
        labels = self.gallery.labels
        return (labels["kind"] * 100 + labels["count"] * 10 + labels["place"]).tolist()


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Looked:
    """By the style judge, which was trained to see styles, and by the miniature's SigLIP2, which was not."""
    gallery = PaintedWorld().gallery("all", STYLES * OF_A_STYLE, 11, "cpu")
    folder = tmp_path_factory.mktemp("siglip2")
    for path in (WEIGHTS / "siglip2-so400m-patch16-naflex").iterdir():
        shutil.copy(path, folder)
    read = WEIGHTS / "Z-Image/tokenizer"  # what its text tower was trained with, 32 tokens at a time
    shutil.copy(read / "tokenizer.json", folder)
    config = json.loads((read / "tokenizer_config.json").read_text()) | {"model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tower = Tower.load(Source(str(folder)), torch.float32, "cpu")
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in gallery.images]
    judge = load_style_judge(WEIGHTS / "judges", "cpu")
    vectors = {"judge": judge.embed(gallery.images), "siglip": tower.images(pictures, 64)}
    return Looked(gallery, gallery.images.float() / 255, vectors, tower)


REFERENCES = torch.arange(STYLES) * OF_A_STYLE
SAME = REFERENCES + 3  # another content in the same style
OTHER = SAME.roll(1)  # of the next style


@pytest.mark.parametrize("judge", JUDGES)
def test_pictures_of_one_style_are_more_alike_than_of_two(looked: Looked, judge: str) -> None:
    vectors = looked.vectors[judge]
    same, other = (cosine(vectors[rows], vectors[REFERENCES]) for rows in (SAME, OTHER))
    assert (same > other).float().mean() >= 0.95
    contents = [looked.contents[i] for i in SAME.tolist()]
    assert interval(difference(same, other), [contents, list(range(STYLES))]).low > {"judge": 0.8, "siglip": 0.3}[judge]


def test_palettes_of_one_style_are_nearer_than_of_two(looked: Looked) -> None:
    same, other = (palette_error(looked.pixels[rows], looked.pixels[REFERENCES]) for rows in (SAME, OTHER))
    assert (same < other).float().mean() >= 0.95
    assert same.mean() < 6 < 30 < other.mean()


def test_pictures_obey_their_own_captions(looked: Looked) -> None:
    """Captions that name style and content, and those that name the content alone."""
    gallery, vectors = looked.gallery, looked.vectors["siglip"]
    for captions, share in ((gallery.detailed, 0.98), (gallery.captions, 0.9)):
        texts = looked.tower.texts(captions)
        own, others = cosine(vectors, texts), cosine(vectors, texts.roll(OF_A_STYLE + 1, dims=0))
        assert (own > others).float().mean() >= share
        assert interval(difference(own, others), [looked.contents, gallery.styles]).low > 0.2


@pytest.mark.parametrize("judge", [*JUDGES, "palette"])
def test_shuffled_pairs_show_no_difference(looked: Looked, judge: str) -> None:
    """Who ignores the reference is as near to another's; who reads it is not. Shuffled in 200 ways."""
    outputs, references = SAME.repeat_interleave(STYLES), REFERENCES.repeat(STYLES)
    if judge == "palette":
        some = looked.pixels[..., ::2, ::2]  # a quarter of the pixels has the palette too
        found = -palette_error(some[outputs], some[references])
    else:
        found = cosine(looked.vectors[judge][outputs], looked.vectors[judge][references])
    table = found.view(STYLES, STYLES)  # of each output to each reference
    contents = [looked.contents[i] for i in SAME.tolist()]
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        ignorant, given, shuffled = (torch.randperm(STYLES, generator=generator) for _ in range(3))
        own, others = table[ignorant, given], table[ignorant, shuffled]
        prompts = [contents[i] for i in ignorant.tolist()]
        found = interval(difference(own, others), [prompts, given], resamples=400)
        held += found.low <= 0 <= found.high
    assert 0.91 <= held / 200 <= 0.99
    styles = torch.arange(STYLES)
    assert interval(difference(table.diagonal(), table[styles, styles.roll(5)]), [contents, styles]).low > 0


def zoomed(pictures: Tensor, cut: int) -> Tensor:
    side = pictures.shape[-1]
    middle = pictures[:, :, cut : side - cut, cut : side - cut]
    return F.interpolate(middle, size=(side, side), mode="bilinear")


def caught(looked: Looked, copies: Tensor) -> float:
    """Share of planted copies that score above 95 % of honest pictures of the reference's style."""
    references = looked.pixels[REFERENCES]
    honest = copy_score(looked.pixels[SAME], references).quantile(0.95)
    return float((copy_score(copies, references) > honest).float().mean())


def test_planted_copies_are_caught(looked: Looked) -> None:
    shown = looked.pixels[REFERENCES]
    noise = torch.randn(shown.shape, generator=torch.Generator().manual_seed(0))
    plants = {
        "itself": shown,
        "grainy": (shown + 0.05 * noise).clamp(0, 1),
        "grey": (shown * LUMA).sum(dim=1, keepdim=True).expand_as(shown),
        "paler": 0.5 + 0.4 * (shown - 0.5),
        "darker": 0.6 * shown,
        "smaller": F.interpolate(shown, size=(48, 48), mode="area"),
    }
    assert {name: caught(looked, copies) for name, copies in plants.items()} == dict.fromkeys(plants, 1.0)
    assert caught(looked, shown[:, [1, 2, 0]]) >= 0.9  # other hues, and with them other lightness
    assert caught(looked, zoomed(shown, 3)) >= 0.6  # nine tenths of it
    honest = copy_score(looked.pixels[SAME], shown)
    assert (copy_score(shown, shown) > honest).all() and (honest < 0.95).all()


def test_what_copy_score_does_not_catch_is_as_its_docstring_says(looked: Looked) -> None:
    shown = looked.pixels[REFERENCES]
    missed = {
        "mirrored": shown.flip(3),
        "upside down": shown.flip(2),
        "turned": shown.rot90(1, (2, 3)),
        "moved": shown.roll((8, 8), (2, 3)),
        "a cutting": zoomed(shown, 10),
        "negative": 1 - shown,
    }
    assert max(caught(looked, copies) for copies in missed.values()) <= 0.3
    said = " ".join(copy_score.__doc__.split())
    assert "mirrored, turned, inverted, moved by an eighth of a side or cut to two thirds" in said


@pytest.mark.parametrize("judge", JUDGES)
def test_distances_of_sets_know_styles(looked: Looked, judge: str) -> None:
    vectors = looked.vectors[judge].view(STYLES, OF_A_STYLE, -1)
    for distance in (lambda x, y: kid(x * x.shape[1] ** 0.5, y * x.shape[1] ** 0.5), cmmd):
        halves = torch.tensor([distance(rows[:4], rows[4:]) for rows in vectors])
        styles = torch.tensor([distance(vectors[i, :4], vectors[i - 1, 4:]) for i in range(STYLES)])
        assert abs(halves.mean()) < 0.05 * styles.mean() and styles.min() > halves.max() > 0


@pytest.mark.parametrize("judge", JUDGES)
def test_diversity_rises_with_the_number_of_styles(looked: Looked, judge: str) -> None:
    vectors = looked.vectors[judge].view(STYLES, OF_A_STYLE, -1)
    found = []
    for styles in (1, 2, 4, 8):
        drawn = vectors.unflatten(0, (STYLES // styles, styles))[:, :, : OF_A_STYLE // styles]
        found.append(float(diversity(drawn.flatten(1, 2)).mean()))
    assert found == sorted(found) and found[-1] > 2 * found[0]
    assert float(diversity(vectors[:, :1].repeat(1, 4, 1)).max()) < 1e-6
