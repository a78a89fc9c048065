"""Sampling for people: aspects, windows, weighted references, batches of any sizes, starts, and the command itself."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image
from torch import Tensor

import ztrain
from miniature.judges import load_content_judge, load_style_judge
from miniature.painter import PaintedWorld
from miniature.subject import Subject, to_bytes
from miniature.trials import WEIGHTS
from miniature.world import KIND_NAMES
from tests.test_parity import (
    ALL_READS,
    LORA,
    PROJECTOR,
    SETTINGS,
    SIGLIP,
    family_config,
    make_model,
    noise_like,
    picture,
    relative_error,
)
from tests.triplets import full_disk
from ztrain.adapters.siglip import SiglipConfig
from ztrain.adapters.splice import SpliceConfig
from ztrain.cache.cache import Cache
from ztrain.cli import main
from ztrain.conditioning import Encoded, concatenate
from ztrain.config import Config, SampleConfig
from ztrain.errors import InputError
from ztrain.frozen.states import Encoders
from ztrain.metrics.scores import high_frequency_energy
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.layout import padded
from ztrain.model.sampler import Picture, SampleSettings, sample, sample_all
from ztrain.sampling.aspects import ASPECTS, output_size, size_of
from ztrain.sampling.command import Order, plan

ROOT = Path(__file__).parents[1]
ADAPTERS = ROOT / "miniature/adapters"
MINIATURE = ["sample", "--config", "configs/splice.yaml", "configs/miniature.yaml"]
STEPS = SampleSettings(num_inference_steps=4, shift=3.0)
FUSED = SpliceConfig(states="fused", compose="replace", tokens="all")
LISTS = {
    "splice": [SpliceConfig()],
    "replace": [SpliceConfig(compose="replace", tokens="all")],
    "blend": [SpliceConfig(compose="blend")],
    "fused": [FUSED],
    "projector": [PROJECTOR],
    "splice_lora": [SpliceConfig(), LORA],
    "siglip": [SIGLIP],
    "siglip_lora": [SIGLIP, LORA],
}


def encode(encoders: Encoders, *references: Image.Image, weights: Sequence[float] | None = None) -> Encoded:
    """One sample with these references."""
    of_each = None if weights is None else [weights]
    return encoders.encode(["a red fox"], [references], ALL_READS - {"omni"}, SETTINGS, of_each)


class Counted:
    """A model that notes how many samples each call has."""

    def __init__(self, model: AdaptedDiT) -> None:
        self.model, self.sizes = model, []

    def __call__(self, noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]:
        self.sizes.append((len(noisy), sum(encoded.with_reference)))
        return self.model(noisy, sigma, encoded)


# --- aspects ----------------------------------------------------------------------------------------------------------

RELEASED = {"21:9": (1568, 672), "16:9": (1360, 768), "3:2": (1248, 832), "4:3": (1184, 880), "5:4": (1152, 912),
            "1:1": (1024, 1024), "4:5": (912, 1152), "3:4": (880, 1184), "2:3": (832, 1248), "9:16": (768, 1360),
            "9:21": (672, 1568)}  # fmt: skip
"""Width and height, as background text 002 lists them."""


def test_aspects_are_the_released_sizes_and_scale() -> None:
    assert {aspect: size_of(aspect, 1024)[::-1] for aspect in ASPECTS} == RELEASED
    for resolution in range(64, 2049, 16):
        for aspect in ASPECTS:
            height, width = size_of(aspect, resolution)
            assert height % 16 == width % 16 == 0 and min(height, width) >= 16
            scaled = [side * resolution / 1024 for side in RELEASED[aspect]]
            assert abs(width - scaled[0]) <= 8 and abs(height - scaled[1]) <= 8
            assert size_of(":".join(aspect.split(":")[::-1]), resolution) == (width, height)
            if resolution >= 256:
                assert abs(height * width / resolution**2 - 1) < 0.1, (aspect, resolution)
    assert size_of("9:21", 16) == (32, 16)


def test_output_size_is_the_aspects_the_sides_or_the_square() -> None:
    def size(**sample: object) -> tuple[int, int]:
        return output_size(Config(sample=SampleConfig(**sample)))

    assert size() == (1024, 1024) and size(aspect="16:9") == (768, 1360) and size(width=512) == (1024, 512)
    with pytest.raises(ValueError, match="aspect 1:1 decides height and width"):
        SampleConfig(aspect="1:1", height=512)


# --- references -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", LISTS)
def test_a_weight_of_zero_leaves_a_reference_out_bit_for_bit(family: Path, encoders: Encoders, name: str) -> None:
    model, noisy, sigma = make_model(family, LISTS[name]), noise_like((8, 8)), torch.tensor([0.7])
    first, second = picture(1), picture(2, 96, 160)

    def velocity(*references: Image.Image, weights: Sequence[float] | None = None) -> Tensor:
        return model(noisy, sigma, encode(encoders, *references, weights=weights))[0]

    alone, other = velocity(first), velocity(second)
    assert relative_error(alone, other) > 1e-3
    assert torch.equal(velocity(first, second, weights=(1, 0)), alone)
    assert torch.equal(velocity(first, second, weights=(0, 1)), other)
    assert torch.equal(velocity(first, second, weights=(0, 0)), velocity())
    assert torch.equal(velocity(first, weights=(1,)), alone)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in LISTS if name != "blend"])
def test_a_weight_on_the_only_reference_is_the_adapters_scale(family: Path, encoders: Encoders, name: str) -> None:
    model, noisy, sigma = make_model(family, LISTS[name]), noise_like((8, 8)), torch.tensor([0.7])
    half, whole = (model(noisy, sigma, encode(encoders, picture(1), weights=w))[0] for w in ((0.5,), None))
    model.set_scales([0.5, *[1.0] * (len(LISTS[name]) - 1)])
    scaled = model(noisy, sigma, encode(encoders, picture(1)))[0]
    assert relative_error(half, scaled) < 1e-5 < 1e-4 < relative_error(half, whole)


@torch.no_grad()
@pytest.mark.parametrize("name", ["splice", "projector", "replace", "fused", "siglip"])
def test_attention_to_each_reference_is_multiplied_by_its_weight(family: Path, encoders: Encoders, name: str) -> None:
    """What is added to the scores of the main layers, token by token: the logarithm of scale times weight."""
    model = make_model(family, LISTS[name])
    added: list[Tensor] = []
    run = model.execution.run
    model.execution.run = lambda layers, x, freqs, seen, *more, **named: (
        added.append(seen.mask[0, 0, 0].exp()), run(layers, x, freqs, seen, *more, **named))[1]  # fmt: skip
    images, weights = (picture(1), picture(2, 96, 160)), (4.0, 0.25)
    model.set_scales([0.5])
    encoded = encode(encoders, *images, weights=weights)
    model(noise_like((8, 8)), torch.tensor([0.7]), encoded)
    of_text = [1.0] * len(encoded.text[0])
    alone = [encode(encoders, image) for image in images]
    match name:
        case "splice" | "projector":
            counts = [int((one.reference[0].kinds != 0).sum()) for one in alone]
            expected = [*of_text, *[2.0] * counts[0], *[0.125] * counts[1]]
        case "replace" | "fused":
            counts = [len((one.reference if name == "replace" else one.fused)[0].kinds) for one in alone]
            expected = [*[2.0] * counts[0], *[0.125] * counts[1]]
        case _:
            counts = [one.siglip[0][0].shape[0] * one.siglip[0][0].shape[1] for one in alone]
            expected = [*[2.0] * padded(counts[0]), *[0.125] * padded(counts[1]), *of_text]
    assert counts[0] != counts[1]
    found = added[0][32:]  # after the image's 16 tokens and their padding
    expected = torch.tensor(expected + [1.0] * (len(found) - len(expected)))
    assert torch.allclose(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["splice", "siglip"])
def test_weighted_and_other_samples_share_a_batch(family: Path, encoders: Encoders, name: str) -> None:
    model = make_model(family, LISTS[name])
    samples = [
        encode(encoders, picture(1), picture(2), weights=(0.3, 2.0)),
        encode(encoders, picture(3, 96, 64)),
        encode(encoders),
        encode(encoders, picture(1), picture(2, 160, 96), weights=(1.0, 0.5)),
    ]
    noisy = noise_like((8, 8), (12, 6), (4, 10), (8, 8))
    sigma = torch.tensor([0.9, 0.4, 0.65, 0.2])
    joined = concatenate(samples)
    together = model(noisy, sigma, joined)
    again = model([noisy[i] for i in (3, 0)], sigma[[3, 0]], joined.select([3, 0]))
    for i, one in enumerate(samples):
        alone = model([noisy[i]], sigma[i : i + 1], one)[0]
        assert relative_error(together[i], alone) < 1e-5
    assert relative_error(again[1], together[0]) < 1e-5 and relative_error(again[0], together[3]) < 1e-5


@torch.no_grad()
def test_weights_that_cannot_be_are_refused(family: Path, encoders: Encoders) -> None:
    images = (picture(1), picture(2))
    for weights, said in (((1,), "1 reference weights for 2 references"), ((1, -1), "each must be 0 or more"),
                          ((1, float("nan")), "each must be 0 or more")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            encode(encoders, *images, weights=weights)
    halved = encode(encoders, *images, weights=(1, 0.5))
    with pytest.raises(InputError, match="references with weights cannot be blended"):
        make_model(family, LISTS["blend"])(noise_like((8, 8)), torch.tensor([0.7]), halved)
    stock = SiglipConfig(feature_dim=32, init="checkpoint", layout="stock")
    model = make_model(family, [stock], "Z-Image-Omni-Base")
    with pytest.raises(InputError, match="layout stock only runs at scales and reference weights of 0 or 1"):
        omni = encoders.encode(["a fox"], [images], stock.reads, SETTINGS, [(1, 0.5)])
        model(noise_like((8, 8)), torch.tensor([0.7]), omni)
    one, alone = (
        encoders.encode(["a fox"], [given], stock.reads, SETTINGS, weights)
        for given, weights in ((images, [(1, 0)]), (images[:1], None))
    )
    velocities = [model(noise_like((8, 8)), torch.tensor([0.7]), each)[0] for each in (one, alone)]
    assert torch.equal(*velocities)


# --- sizes ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["splice", "siglip"])
def test_one_reference_to_five_aspects_in_one_batch(family: Path, encoders: Encoders, name: str) -> None:
    """A reference of 512 x 512 beside outputs of 64 pixels; the same latents as one at a time, within 1e-4."""
    model = Counted(make_model(family, LISTS[name]))
    encoded = encode(encoders, picture(1, 512, 512))
    settings = replace(STEPS, guidance_scale=2.0, image_guidance_scale=1.0)
    sizes = [size_of(aspect, 64) for aspect in ("21:9", "5:4", "1:1", "2:3", "9:21")]
    pictures = [Picture(row=0, seed=i, shape=(16, height // 8, width // 8)) for i, (height, width) in enumerate(sizes)]
    assert len(set(sizes)) == 5

    def latents(batch_size: int) -> list[Tensor]:
        device = torch.device("cpu")
        return list(sample_all(model, encoded, pictures, settings, batch_size=batch_size, device=device))

    together = latents(5)
    assert {size for size, _ in model.sizes} == {15}
    assert [tuple(each.shape) for each in together] == [each.shape for each in pictures]
    for batch_size in (1, 2):
        for ours, theirs in zip(together, latents(batch_size), strict=True):
            assert relative_error(ours, theirs) < 1e-4


@torch.no_grad()
def test_latents_that_are_not_finite_are_refused_by_number(family: Path, encoders: Encoders) -> None:
    encoded, device = encode(encoders, picture(1)), torch.device("cpu")
    pictures = [Picture(row=0, seed=i, shape=(16, 8, 8)) for i in range(5)]
    pictures[3] = replace(pictures[3], start=torch.full((16, 8, 8), torch.inf))
    model = make_model(family, LISTS["splice"])
    settings = replace(STEPS, num_inference_steps=2, strength=0.5)
    pictures = [replace(each, start=torch.zeros(each.shape)) if each.start is None else each for each in pictures]
    for batch_size in (1, 2, 5):
        found = sample_all(model, encoded, pictures, settings, batch_size=batch_size, device=device)
        with pytest.raises(InputError, match="^sample 4: the latents are not finite: .* guidance is too strong$"):
            list(found)
    weights = make_model(family, LISTS["siglip"])
    with pytest.raises(InputError, match="^samples 1, 2: the latents are not finite"):
        weights.set_scales([float("nan")])
        sample(weights, concatenate([encoded, encoded]), [*noise_like((8, 8)), *noise_like((8, 8))], STEPS)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's root as the working folder; two references and a start in tmp_path."""
    monkeypatch.chdir(ROOT)
    for seed, (name, *size) in enumerate((("a", 96, 160), ("b", 64, 64))):
        picture(seed, *size).save(tmp_path / f"{name}.png")
    start = Image.new("RGB", (100, 60), "red")  # its edges are to be cut away
    start.paste("blue", (20, 0, 80, 60))
    start.paste("yellow", (30, 10, 50, 50))
    start.save(tmp_path / "start.png")
    return tmp_path


def run(*words: object, status: int = 0) -> None:
    few = ["--sample.num_inference_steps", "2"]
    few += [] if "--sample.guidance_scale" in words else ["--sample.guidance_scale", "0"]
    assert main([*MINIATURE, *few, *map(str, words)]) == status


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def test_prompts_aspects_and_seeds_become_a_folder(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ("--prompt", "a star", "two moons on the left", "--aspect", "16:9", "1:1", "5:4", "--num-images", 2)
    run(*wanted, "--reference", project / "a.png", "--seed", 7, "--sample.batch_size", 5, "--out", project / "all")
    names = [f"prompt{p}-{a}-seed{s}.png" for p in (1, 2) for a in ("16x9", "1x1", "5x4") for s in (7, 8)]
    assert {path.name for path in (project / "all").iterdir()} == {*names, "sheet.png", "pictures.jsonl"}
    shown = [pixels(project / "all" / name) for name in names]
    assert [each.shape[:2] for each in shown] == [(48, 80)] * 2 + [(64, 64)] * 2 + [(64, 80)] * 2 + [
        (48, 80)] * 2 + [(64, 64)] * 2 + [(64, 80)] * 2  # fmt: skip
    assert len({each.tobytes() for each in shown}) == len(shown), (
        "every prompt, aspect and seed is a picture of its own"
    )
    with Image.open(project / "all/sheet.png") as sheet:
        assert sheet.size == (8 + 200 * 2, 24 + 16 + 224 * 6)
    said = capsys.readouterr().out
    assert "encoders: the process had at most" in said and said.splitlines()[-1] == str(project / "all")
    notes = [json.loads(line) for line in (project / "all/pictures.jsonl").read_text().splitlines()]
    assert [note["file"] for note in notes] == names and notes[-1]["prompt"] == "two moons on the left"
    assert notes[-1]["seed"] == 8 and notes[0]["references"] == ["a.png"] and str(project) not in json.dumps(notes)
    # The VAE apart from the transformer, and one at a time, come to the same.
    run(*wanted, "--reference", project / "a.png", "--seed", 7, "--offload", "--out", project / "apart")
    for name, each in zip(names, shown, strict=True):
        assert np.abs(pixels(project / "apart" / name) - each).max() <= 1
    assert "VAE: the process had at most" in capsys.readouterr().out
    run("--prompt", "a star", "--reference", project / "a.png", "--sample.aspect", "16:9", "--seed", 8,
        "--out", project / "one.jpg")  # fmt: skip
    one = pixels(project / "one.jpg")
    assert np.abs(one - shown[1]).mean() < 4 < np.abs(one - shown[0]).mean()


def test_what_is_sampled_is_written_though_it_ends_early(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after the third picture; with the VAE apart it comes back for them."""
    for words in ((), ("--offload",)):
        out = project / f"cut{len(words)}"
        calls = 0

        def cut(*given: object, out: Path = out) -> list[Tensor]:
            nonlocal calls
            calls += 1
            if calls > 3:
                raise KeyboardInterrupt
            return sample(*given[:4])

        monkeypatch.setattr("ztrain.model.sampler.sample", lambda *given, **more: cut(*given))
        with pytest.raises(KeyboardInterrupt):
            run("--prompt", "a star", "--num-images", 5, "--sample.batch_size", 1, "--out", out, *words)
        assert {path.name for path in out.glob("*.png")} == {f"prompt1-64x64-seed{seed}.png" for seed in range(3)}
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    # A disk that takes all but the largest: what is drawn before it stays, with its note.
    sizes = [(project / f"cut0/prompt1-64x64-seed{seed}.png").stat().st_size for seed in range(3)]
    with full_disk(max(sizes) - 1):
        run("--prompt", "a star", "--num-images", 3, "--sample.batch_size", 1, "--out", project / "full", status=2)
    kept = [f"prompt1-64x64-seed{seed}.png" for seed in range(sizes.index(max(sizes)))]
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {project}/full/prompt1-64x64-seed{len(kept)}.png: cannot write it, the disk")
    assert sorted(os.listdir(project / "full")) == sorted([*kept, *(["pictures.jsonl"] if kept else [])])
    notes = (project / "full/pictures.jsonl").read_text() if kept else ""
    assert [json.loads(line)["file"] for line in notes.splitlines()] == kept


def test_a_start_is_cropped_to_the_output_and_left_by_strength(project: Path) -> None:
    def draw(name: str, *words: object) -> np.ndarray:
        run("--prompt", "a star", "--out", project / f"{name}.png", *words)
        return pixels(project / f"{name}.png")

    start = ("--start-image", project / "start.png")
    plain, all_the_way = draw("plain"), draw("1", *start, "--strength", 1)
    assert np.array_equal(plain, all_the_way)
    with Image.open(project / "start.png") as image:
        image.crop((20, 0, 80, 60)).resize((64, 64), Image.Resampling.LANCZOS).save(project / "square.png")
    half = draw("half", *start, "--strength", 0.5)
    square = draw("drawn", "--start-image", project / "square.png", "--strength", 0.5)
    assert np.abs(half - square).mean() < 10 < 40 < np.abs(half - plain).mean()
    both = ("--num-images", 2, "--aspect", "1:1", "16:9", "--sample.batch_size", 4, "--out", project / "many")
    run("--prompt", "a star", *start, "--sample.strength", 0.5, *both)
    assert np.abs(pixels(project / "many/prompt1-1x1-seed0.png") - half).max() <= 1


def test_the_loaded_adapter_draws_what_the_command_draws(project: Path) -> None:
    """All powers at once, through load_adapter on a stock pipeline."""
    for name in ("siglip_lora", "projector"):
        run("--adapter", ADAPTERS / name, "--prompt", "a star", "two moons", "--reference", project / "a.png",
            project / "b.png", "--reference-weights", 1, 0.5, "--start-image", project / "start.png", "--strength", 0.6,
            "--aspect", "3:2", "--num-images", 2, "--sample.guidance_scale", 1, "--sample.image_guidance_scale", 0.5,
            "--sample.guidance_window", 0.1, 1, "--sample.reference_window", 0, 0.7, "--sample.batch_size", 3,
            "--sample.shift", 2, "--sample.negative", "base", "--sample.negative_prompt", "a square",
            "--sample.num_inference_steps", 2, "--out", project / name)  # fmt: skip
        pipeline = ZImagePipeline.from_pretrained(WEIGHTS / "Z-Image", dtype=torch.float32)
        adapted = ztrain.load_adapter(pipeline, ADAPTERS / name, **PLACES)
        images = adapted(
            ["a star", "two moons"], [Image.open(project / f"{each}.png") for each in "ab"], reference_weights=(1, 0.5),
            start_image=Image.open(project / "start.png"), strength=0.6, aspect="3:2", resolution=64, seed=(0, 1),
            guidance_scale=1.0, image_guidance_scale=0.5, guidance_window=(0.1, 1.0), reference_window=(0.0, 0.7),
            num_inference_steps=2, batch_size=3, shift=2.0, negative="base", negative_prompt="a square",
        )  # fmt: skip
        files = [project / name / f"prompt{p}-3x2-seed{s}.png" for p in (1, 2) for s in (0, 1)]
        for image, file in zip(images, files, strict=True):
            assert np.array_equal(np.asarray(image), pixels(file))
        assert np.abs(pixels(files[0]) - pixels(files[1])).mean() > 1
        with pytest.raises(InputError, match="this call: aspect"):
            adapted("a star", aspect="7:5")
        with pytest.raises(InputError, match="this call: batch_size"):
            adapted("a star", batch_size=-1)
        with pytest.raises(InputError, match="strength 0.5 needs a start_image"):
            adapted("a star", strength=0.5)


PLACES = {
    "vision_language": str(WEIGHTS / "Qwen3-VL-4B-Instruct"),
    "siglip": str(WEIGHTS / "siglip2-so400m-patch16-naflex"),
}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt", "a\udcff", "--out", "x.png"), r"--prompt 'a\udcff' is not UTF-8"),
        (("--prompt", "a", "b", "--out", "x.png"), "--out x.png: give a folder for several pictures"),
        (("--prompt", "a", "--out", "x"), "--out x: give a file for one picture, named .png or"),
        (("--prompt", "a", "", "--out", "x"), "the prompt is empty and there is no reference"),
        (("--prompt", "a", "--num-images", 0, "--out", "x"), "--num-images 1"),
        (("--prompt", "a", "--aspect", "1:1", "--sample.width", 64, "--out", "x.png"), "leave out sample.height"),
        (("--prompt", "a", "--scales", 1, 1, "--out", "x.png"), "2 numbers for the 1 adapters [splice]"),
        (("--prompt", "a", "--reference-weights", 1, "--out", "x.png"), "1 reference weights for 0 references"),
        (("--prompt", "a", "--start-image", "s.png", "--out", "x.png"), "--start-image and --strength go together"),
        (("--prompt", "a", "--strength", 0.5, "--out", "x.png"), "--start-image and --strength go together"),
        (("--prompt", "a", "--strength", 0, "--start-image", "s.png", "--out", "x.png"), "above 0 and at most 1"),
        (("--prompt", "a", "--sample.negative_prompt", "b", "--out", "x.png"), "and guidance_scale is 0; set"),
        (("--prompt", "a", "--scales", "nan", "--out", "x.png"), "--scales nan: each must be a finite number"),
        (("--prompt", "a", "--reference", ADAPTERS / "x.png", "--reference-weights", "nan", "--out", "x.png"),
         "reference weights nan: each must be"),
        (("--prompt", "a", "--strength", "nan", "--start-image", "s.png", "--out", "x.png"), "above 0 and at most 1"),
        (("--prompt", "a", "--strength", 2, "--start-image", "s.png", "--out", "x.png"), "above 0 and at most 1"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    project: Path, capsys: pytest.CaptureFixture[str], words: tuple, said: str
) -> None:
    run(*words, status=2)
    assert said in capsys.readouterr().err


def test_every_file_of_an_order_has_a_name_of_its_own() -> None:
    """Also where aspects meet at one size."""
    config = Config.model_validate({"data": {"resolution": 64}, "seed": 3})
    order = Order(prompts=["a", "b"], out=Path("x"), aspects=ASPECTS, num_images=3)
    planned = plan(config, order)
    assert len({each.path for each in planned}) == len(planned) == 2 * 11 * 3
    assert [each.seed for each in planned[:4]] == [3, 4, 5, 3]


# --- a rough collage in, a coherent picture out -----------------------------------------------------------------------


@torch.no_grad()
def test_a_collage_becomes_one_picture_and_keeps_its_layout() -> None:
    """Halves of two painted pictures of different styles, an object on one of them; the prompt does not say where.

    Judged: the step of brightness at the seam; whether the halves are in one style (cosine of the style judge's
    embeddings, each half beside its mirror image); the share of high frequencies; the place that the content judge
    sees.
    """
    subject = Subject.load(WEIGHTS, 64, 0, torch.device("cpu"), num_inference_steps=8)
    gallery = PaintedWorld(size=64).gallery("held", 120, 1_000_003, "cpu")
    content = load_content_judge(WEIGHTS / "judges", "cpu")
    style = load_style_judge(WEIGHTS / "judges", "cpu")
    rows, collages = [], []
    for place, halves in ((1, slice(32, 64)), (2, slice(0, 32))):  # the object stands left, then right
        of_place = [i for i in range(len(gallery)) if int(gallery.labels["place"][i]) == place][:14]
        for i, other in zip(of_place, [*of_place[7:], *of_place[:7]], strict=True):
            pasted = gallery.images[i].clone()
            pasted[:, :, halves] = gallery.images[other][:, :, halves]
            rows.append(i)
            collages.append(pasted)

    def judged(images: Tensor) -> dict[str, float]:
        pixels = images.float() / 255
        steps = (pixels[..., 1:] - pixels[..., :-1]).abs().mean((1, 2))  # (N, 63)
        left, right = images[..., :32], images[..., 32:]
        doubled = (torch.cat([left, left.flip(-1)], -1), torch.cat([right.flip(-1), right], -1))
        alike = (style.embed(doubled[0]) * style.embed(doubled[1])).sum(-1)
        places = content.judge(images)["place"].argmax(1) == gallery.labels["place"][rows]
        return {
            "seam": float((steps[:, 31] - (steps[:, 29] + steps[:, 33]) / 2).mean()),
            "one style": float(alike.mean()),
            "high frequencies": float(high_frequency_energy(pixels).mean()),
            "place": float(places.float().mean()),
        }

    counts = [("one", "two", "three")[int(gallery.labels["count"][i])] for i in rows]
    kinds = [
        KIND_NAMES[int(gallery.labels["kind"][i])] + ("" if n == "one" else "s")
        for i, n in zip(rows, counts, strict=True)
    ]
    prompts = [f"a picture of {count} {kind}" for count, kind in zip(counts, kinds, strict=True)]
    encoded = Encoded.of_prompts(subject.encode(prompts), subject.text.encode(""))
    starts = subject.codec.encode_pixels(torch.stack(collages).float() / 127.5 - 1)
    pictures = [Picture(row=i, seed=i, shape=tuple(start.shape), start=start) for i, start in enumerate(starts)]

    def drawn(strength: float) -> dict[str, float]:
        settings, model = replace(subject.settings, strength=strength), AdaptedDiT(subject.dit, [])
        latents = list(sample_all(model, encoded, pictures, settings, batch_size=40, device=torch.device("cpu")))
        return judged(to_bytes(subject.codec.decode_pixels(torch.stack(latents))))

    true = judged(subject.through_codec(gallery.images[rows]))
    collage = judged(subject.through_codec(torch.stack(collages)))
    found = {"true": true, "collage": collage} | {f"{s:g}": drawn(s) for s in (0.3, 0.5, 1.0)}
    for name, scores in found.items():
        print(name, {key: round(value, 3) for key, value in scores.items()})
    assert collage["seam"] > 0.1 and true["seam"] < 0.01 and collage["one style"] < true["one style"] - 0.3
    # Little strength keeps the layout and heals the seam; more makes it one style.
    assert found["0.3"]["place"] > 0.75 > 0.6 > found["1"]["place"], "without a start the place is the seed's choice"
    assert found["0.3"]["seam"] < 0.25 * collage["seam"] and found["0.5"]["seam"] < 0.1 * collage["seam"]
    rises = [found[name]["one style"] for name in ("collage", "0.3", "0.5", "1")]
    assert rises == sorted(rises) and rises[1] > rises[0] + 0.1
    distances = {name: abs(found[name]["high frequencies"] - true["high frequencies"]) for name in ("collage", "0.5")}
    assert distances["0.5"] < 0.7 * distances["collage"]


# --- layers of their own ----------------------------------------------------------------------------------------------


def test_the_cache_knows_of_a_text_layer_only_where_there_is_one(family: Path, tmp_path: Path) -> None:
    def fingerprint(kind: str, **encoders: int) -> dict:
        config = family_config(family)
        changed = config.encoders.model_copy(update=encoders)
        cache = config.cache.model_copy(update={"dir": str(tmp_path)})
        return Cache(config.model_copy(update={"encoders": changed, "cache": cache})).fingerprint(kind)

    for kind in ("reference", "fused"):
        assert "text_hidden_index" not in fingerprint(kind)["settings"]
        assert fingerprint(kind, text_hidden_index=3) != fingerprint(kind, text_hidden_index=4) != fingerprint(kind)
    assert fingerprint("text", text_hidden_index=3) == fingerprint("text")
    assert fingerprint("siglip", text_hidden_index=3) == fingerprint("siglip")
