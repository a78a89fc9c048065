"""Pretraining from the command line to a family on disk; each stage against the libraries that it stands for."""

import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil, Siglip2ImageProcessorPil

from miniature import denoiser
from miniature.denoiser import encode_captions, train_denoiser
from miniature.fit import Draws, FitSettings, Fitted, Partial, fit, make_optimizers
from miniature.gallery import Gallery
from miniature.judges import (
    ContentJudge,
    StyleJudge,
    load_content_judge,
    load_style_judge,
    save_judge,
    train_content_judge,
    train_style_judge,
)
from miniature.language import (
    PictureReader,
    equal_lengths_attention,
    nearest_distance,
    relative_distance,
    visual_patches,
    visual_side,
)
from miniature.muon import StackedMuon
from miniature.painter import PaintedWorld
from miniature.parts import (
    VISION_LANGUAGE_PROCESSOR,
    FamilySizes,
    build_siglip,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    build_vision_language,
)
from miniature.pretrain import PAINTED, STAGES
from miniature.siglip import equal_shapes, siglip_patches
from miniature.style_folders import paint_style_folders
from miniature.turns import picture_turns, text_turns, tokenize
from tests.triplets import model_words, tiny_config
from ztrain.adapters import build_adapters
from ztrain.cli import main
from ztrain.conditioning import Encoded
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec, TextEncoder
from ztrain.frozen.sources import Source
from ztrain.frozen.states import Encoders
from ztrain.frozen.vision_language import VISION_END, VISION_START
from ztrain.model import flow
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import load_transformer
from ztrain.model.fast.compiling import compile_blocks, relative_error
from ztrain.model.flow import SigmaDensity, draw_sigmas

READS = frozenset({"reference", "fused", "siglip", "omni"})
SIZES = FamilySizes(vae_channels=(8, 8, 8))
LEVEL = 2 / 255
"""One step of an 8-bit picture in the range -1..1."""


def command(*words: object) -> tuple[int, str, str]:
    """Status, standard output and standard error of `ztrain mini pretrain --smoke ...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["mini", "pretrain", "--smoke", *map(str, words)])
    return status, out.getvalue(), err.getvalue()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def random_pixels(count: int, side: int, seed: int = 0) -> Tensor:
    """(B, 3, side, side) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def as_pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def in_range(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


# ---- from the command line to a family that the main path reads


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """--out of a smoke run and what it printed; nobody changes the folder."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    status, printed, complaints = command("--out", out)
    assert (status, complaints) == (0, "")
    return out, printed


def test_every_stage_says_how_it_goes_and_leaves_a_report(made: tuple[Path, str]) -> None:
    out, printed = made
    for name in ("vae", "language", "vision", "vision and language", "siglip", "content judge", "transformer"):
        assert f"{name}: step 3 of 3, loss " in printed
    assert printed.count("style judge: step 3 of 3, loss ") == 2
    assert printed.splitlines()[-1] == str((out / "family").resolve())
    reports = json.loads((out / "family/recipe.json").read_text())
    assert tuple(reports) == STAGES
    for report in reports.values():
        assert report["fits"] and all(math.isfinite(entry["loss"]) and entry["steps"] == 3 for entry in report["fits"])
    facts = reports["vae"]["facts"]
    config = json.loads((out / "family/Z-Image/vae/config.json").read_text())
    assert {key: config[key] for key in facts} == facts and facts["scaling_factor"] not in (0.3611, 1.0)


def test_files_are_those_of_the_real_repositories(made: tuple[Path, str], family: Path) -> None:
    ours = made[0] / "family"
    for name in ("Z-Image", "Qwen3-VL-4B-Instruct", "siglip2-so400m-patch16-naflex"):
        assert files_of(ours / name).keys() == files_of(family / name).keys()
    assert {path.name for path in ours.iterdir()} == {
        *("Z-Image", "Qwen3-VL-4B-Instruct", "siglip2-so400m-patch16-naflex", "judges", "family.json", "recipe.json")
    }
    weights = sorted(ours.rglob("*.safetensors"))
    assert len(weights) == 8
    for path in weights:
        tensors = load_file(path)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}, path
        assert all(tensor.isfinite().all() for tensor in tensors.values()), path
        twin = family / path.relative_to(ours)
        if twin.is_file() and "vae" not in path.parts:  # its levels are fewer here
            with safe_open(twin, framework="pt") as file:
                assert set(file.keys()) == set(tensors), path
    for part, name in (("vae", "Z-Image/vae/diffusion_pytorch_model"), ("vision_language", f"{VL}/model")):
        trained, stored = load_file(made[0] / f"parts/{part}.safetensors"), load_file(ours / f"{name}.safetensors")
        assert all(torch.equal(stored[key], trained[key].bfloat16()) for key in stored), part


VL = "Qwen3-VL-4B-Instruct"


def test_main_path_reads_the_family_with_no_special_case(made: tuple[Path, str], tmp_path: Path) -> None:
    config = tiny_config(made[0] / "family", tmp_path, tmp_path, *model_words(made[0] / "family", base="Z-Image"))
    assert config.models.base.pretrained_model_name_or_path.endswith("Z-Image")
    encoders = Encoders.load(config, READS, torch.float32, "cpu")
    pictures = as_pictures(random_pixels(2, 64))
    encoded = encoders.encode(["two stars on the left", ""], [[pictures[0]], [pictures[1]]], READS, config.encoders)
    dit = load_transformer(Source.of(config.models.base), torch.float32, "cpu")
    model = AdaptedDiT(dit, build_adapters(list(config.adapters), encoders.siglip_dim)).eval()
    shape = encoders.codec.latent_shape(64, 64)
    assert shape == (16, 16, 16), "three levels: factor 4"
    with torch.no_grad():
        velocity = model([torch.ones(shape), torch.ones(shape)], torch.tensor([0.3, 0.9]), encoded)
    assert all(v.shape == shape and v.isfinite().all() for v in velocity)
    assert not torch.equal(velocity[0], velocity[1])

    pipeline = ZImagePipeline.from_pretrained(made[0] / "family/Z-Image", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(prompt="one heart", height=64, width=64, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all() and image.std() > 0
    assert pipeline.scheduler.config.shift == 3.0


def test_a_second_call_changes_nothing_and_another_seed_is_refused(made: tuple[Path, str]) -> None:
    out, _ = made
    before = files_of(out)
    status, printed, _ = command("--out", out)
    lines = printed.splitlines()
    assert status == 0 and lines[:-1] == [f"{stage}: done already" for stage in STAGES]
    status, printed, complaints = command("--out", out, "--seed", 1)
    assert (status, printed, len(complaints.splitlines())) == (2, "", 1)
    assert complaints.startswith("error: ") and "another" in complaints and "--out" in complaints
    assert files_of(out) == before


def test_stages_apart_give_the_same_family(made: tuple[Path, str], tmp_path: Path) -> None:
    status, printed, complaints = command("--out", tmp_path / "run", "--stages", "transformer")
    assert (status, printed, len(complaints.splitlines())) == (2, "", 1)
    assert "needs the stage language, which is not done" in complaints
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    for stages in (["judges", "vae"], ["language"], ["siglip"]):
        status, printed, _ = command("--out", tmp_path / "run", "--stages", *stages)
        assert (status, printed.splitlines()[-1]) == (0, "some stages are still to be run")
    assert not (tmp_path / "run/family").exists()
    status, printed, _ = command("--out", tmp_path / "run")
    done = [line.partition(":")[0] for line in printed.splitlines() if line.endswith("done already")]
    assert (status, done) == (0, ["vae", "language", "siglip", "judges"])
    ours, whole = files_of(tmp_path / "run/family"), files_of(made[0] / "family")
    assert ours.keys() == whole.keys()
    assert [name for name in ours if ours[name] != whole[name]] == ["recipe.json"], "it tells the seconds"


def test_a_folder_of_pictures_is_a_world_too(tmp_path: Path) -> None:
    paint_style_folders(tmp_path / "drawings", size=64, num_contents=24)
    status, _, complaints = command("--out", tmp_path / "run", "--data", tmp_path / "drawings", "--size", 64)
    assert (status, complaints) == (0, "")
    family = tmp_path / "run/family"
    judge = load_content_judge(family / "judges", "cpu")
    assert judge.classes == {"content": 24, "style": 6}
    assert len(json.loads((family / "Z-Image/vae/config.json").read_text())["block_out_channels"]) == 4
    status, _, complaints = command("--out", tmp_path / "run", "--data", tmp_path / "nowhere")
    assert status == 2 and "nowhere: no such folder" in complaints


# ---- fit


@pytest.fixture
def every_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line, and with it a partial file, every second of 40 steps."""
    monkeypatch.setattr("miniature.fit.LINES", 20)


class Line(nn.Module):
    """y = x w + b."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 3, generator=generator)
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.7 + torch.randn(64, 1, generator=generator)

    def loss(self, step: int) -> Tensor:
        return (self.linear(self.x) - self.y).square().mean()


def test_fit_finds_the_least_squares() -> None:
    model = Line()
    with torch.no_grad():
        model.linear.weight.fill_(3.0)
    plan = FitSettings(steps=400, batch_size=64, learning_rate=0.1, weight_decay=0.0, max_grad_norm=100.0)
    fitted = fit("line", [model], model.loss, plan, "cpu")
    design = torch.cat([model.x, torch.ones(64, 1)], 1)
    exact = torch.linalg.lstsq(design, model.y).solution.flatten()
    found = torch.cat([model.linear.weight.flatten(), model.linear.bias])
    assert torch.allclose(found, exact, atol=1e-4)
    residual = float((design @ exact[:, None] - model.y).square().mean())
    assert residual > 0.5, "the noise is in it"
    assert fitted == Fitted(
        steps=400, samples=400 * 64, begun_at=0, seconds=fitted.seconds, loss=pytest.approx(residual, abs=1e-4)
    )


def test_stacked_muon_is_torchs() -> None:
    torch.manual_seed(0)
    shapes = [(6, 6), (6, 6), (12, 6), (6, 12), (12, 6), (24, 6)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    torchs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    optimizer = StackedMuon(ours, 0.02, 0.1)
    reference = torch.optim.Muon(torchs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before = [weight.detach().clone() for weight in ours]
    for _ in range(5):
        for one, other in zip(ours, torchs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for start, one, other in zip(before, ours, torchs, strict=True):
        moved = (other - start).norm()
        assert moved > 0.05 and (one - other).norm() < 0.01 * moved  # both iterate in bfloat16
    with pytest.raises(ValueError, match="not for shape"):
        StackedMuon([nn.Parameter(torch.ones(3))], 0.1, 0.0)


def test_a_plan_with_a_rate_for_matrices_trains_everything() -> None:
    """Matrices in blocks by Muon, the rest by AdamW: each weight by exactly one."""
    dit = transformer().requires_grad_(True)
    weights = {f"0.{name}": parameter for name, parameter in dit.named_parameters()}
    plan = FitSettings(steps=10, batch_size=4, learning_rate=2e-3, matrix_learning_rate=3e-3)
    adamw, muon = make_optimizers(plan, 0.5, weights, False)
    held = [[parameter for group in o.param_groups for parameter in group["params"]] for o in (adamw, muon)]
    assert sorted(map(id, [*held[0], *held[1]])) == sorted(map(id, weights.values()))
    assert all(parameter.ndim == 2 for parameter in held[1])
    in_blocks = [p for name, p in dit.named_parameters() if "layers." in name or "refiner." in name]
    assert {id(p) for p in held[1]} == {id(p) for p in in_blocks if p.ndim == 2}
    assert {group["lr"] for group in muon.param_groups} == {1.5e-3}
    assert {group["lr"] for group in adamw.param_groups} == {1e-3}


@pytest.mark.usefixtures("every_other")
def test_fit_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plan = tmp_path / "deep/line.safetensors", FitSettings(steps=40, batch_size=64, learning_rate=0.01)
    partial = Partial(path=path)
    model, asleep = Line(), nn.Linear(2, 2).requires_grad_(False)
    before = asleep.weight.clone()
    history = []

    def failing(step: int) -> Tensor:
        history.append(model.linear.weight.detach().clone())
        if step == 11:
            raise KeyboardInterrupt
        return model.loss(step)

    with pytest.raises(KeyboardInterrupt):
        fit("line", [model, asleep], failing, plan, "cpu", partial)
    assert "line: step 10 of 40" in capsys.readouterr().out
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    kept = path.read_bytes()

    for wrong in (replace(plan, learning_rate=0.02), replace(plan, steps=41)):
        with pytest.raises(InputError, match="another plan"):
            fit("line", [Line()], model.loss, wrong, "cpu", partial)
    with pytest.raises(InputError, match="another plan or model"):
        fit("line", [nn.Linear(3, 1)], model.loss, plan, "cpu", partial)
    assert path.read_bytes() == kept

    fresh, seen = Line(), []

    def going_on(step: int) -> Tensor:
        seen.append((step, fresh.linear.weight.detach().clone()))
        return fresh.loss(step)

    fitted = fit("line", [fresh, asleep], going_on, plan, "cpu", partial)
    assert [step for step, _ in seen] == list(range(10, 40))
    assert torch.equal(seen[0][1], history[10]) and not torch.equal(history[10], history[11])
    assert fitted.begun_at == 10 and fitted.steps == 40
    assert torch.equal(asleep.weight, before)
    assert "going on at step 10 of 40" in capsys.readouterr().out
    # It stays until its weights are saved: whoever comes back before that gets them at once.
    again = Line()
    once_more = fit("line", [again, asleep], failing, plan, "cpu", partial)
    assert replace(once_more, begun_at=10, seconds=fitted.seconds) == fitted
    assert torch.equal(again.linear.weight, fresh.linear.weight)


@pytest.mark.usefixtures("every_other")
def test_fit_refuses_a_loss_that_is_no_number(tmp_path: Path) -> None:
    model, partial = Line(), Partial(path=tmp_path / "line.safetensors")
    plan = FitSettings(steps=40, batch_size=64, learning_rate=0.01)
    with pytest.raises(RuntimeError, match="^line: the loss is nan at step 6"):
        fit("line", [model], lambda step: model.loss(step) * (math.nan if step == 4 else 1), plan, "cpu", partial)
    assert all(tensor.isfinite().all() for tensor in load_file(partial.path).values()), "of step 4, before it"


# ---- what the image processors do


def qwen_processor() -> Qwen2VLImageProcessorPil:
    options = {key: VISION_LANGUAGE_PROCESSOR[key] for key in ("patch_size", "temporal_patch_size", "merge_size")}
    means = {key: VISION_LANGUAGE_PROCESSOR[key] for key in ("image_mean", "image_std")}
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 128 * 128, "longest_edge": 256 * 256}, **options, **means)


@pytest.mark.parametrize("size", [128, 64])
def test_visual_patches_are_the_processors(size: int) -> None:
    images = random_pixels(3, size)
    theirs = qwen_processor()(images=as_pictures(images), return_tensors="pt")
    ours = visual_patches(in_range(images), visual_side(size, 128 * 128))
    assert theirs["image_grid_thw"].tolist() == [[1, 8, 8]] * 3
    assert ours.shape == theirs["pixel_values"].shape == (3 * 64, 3 * 2 * 16 * 16)
    error = (ours - theirs["pixel_values"]).abs()
    if size == 128:
        assert error.max() < 1e-6
    else:  # PIL rounds to 8 bits; neighbours of noise are farther apart than 0.1
        assert error.mean() < LEVEL and (ours - theirs["pixel_values"].roll(1, 0)).abs().mean() > 0.1


@pytest.mark.parametrize("size", [16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 208, 240, 256])
def test_visual_side_is_the_processors(size: int) -> None:
    grid = qwen_processor()(images=as_pictures(random_pixels(1, size)), return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, *[visual_side(size, 128 * 128) // 16] * 2]]


@pytest.mark.parametrize("size", [128, 64])
def test_siglip_patches_are_the_processors(size: int) -> None:
    images = random_pixels(3, size)
    theirs = Siglip2ImageProcessorPil(max_num_patches=64)(images=as_pictures(images), return_tensors="pt")
    ours = siglip_patches(in_range(images), 64)
    assert theirs["spatial_shapes"].tolist() == [[8, 8]] * 3 and theirs["pixel_attention_mask"].all()
    assert ours.shape == theirs["pixel_values"].shape == (3, 64, 16 * 16 * 3)
    error = (ours - theirs["pixel_values"]).abs()
    if size == 128:
        assert error.max() < 1e-6
    else:
        assert error.mean() < LEVEL and (ours - theirs["pixel_values"].roll(1, 1)).abs().mean() > 0.1


# ---- towers, against the classes that they stand for


@torch.no_grad()
def test_reading_a_batch_of_pictures_is_reading_each() -> None:
    tokenizer = build_tokenizer(SIZES)
    torch.manual_seed(0)
    model = build_vision_language(SIZES, tokenizer).eval()
    images = random_pixels(3, 128)
    reader = PictureReader(model, tokenizer, 128)
    gallery = Gallery(
        images=images,
        captions=["one red circle", "three small pink arrows at the bottom", "a tree"],
        clauses=[("one red circle",), ("three small pink arrows", "at the bottom"), ("a tree",)],
        replies=[("one circle", "one red circle"), ("three arrows at the bottom",) * 2, ("a tree", "a tree")],
        labels={},
        styles=torch.arange(3),
    )
    turns, told = picture_turns(gallery, tokenizer, reader.num_visual)
    assert len({tuple(row) for row in turns.ids[1::3].tolist()}) == 3, "one picture, every kind of turn"
    assert reader.pad not in told.ids and tokenizer.decode(told.ids[0, : told.reply[0]]).count("one red circle") == 1
    first = turns.ids[:3]
    together = reader.logits(reader.look(in_range(images)), first)
    with equal_lengths_attention(model.model.visual):
        faster = reader.logits(reader.look(in_range(images)), first)
    assert model.model.visual.config._attn_implementation == "sdpa"
    assert torch.allclose(faster, together, atol=1e-4)
    for row, picture in enumerate(as_pictures(images)):
        inputs = qwen_processor()(images=[picture], return_tensors="pt")
        ids = first[row : row + 1]
        kinds = (ids == reader.pad).int()
        alone = model(input_ids=ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids), **inputs).logits[0]
        assert torch.allclose(together[row], alone, atol=1e-4), (together[row] - alone).abs().max()
    other = reader.logits(reader.look(in_range(images.flip(0))), first)
    assert (other - together)[0].abs().max() > 0.01, "the picture is looked at"


@torch.no_grad()
def test_equal_shapes_are_the_models_own_output() -> None:
    torch.manual_seed(0)
    model = build_siglip(replace(SIZES, siglip_patches=64)).eval().vision_model
    inputs = Siglip2ImageProcessorPil(max_num_patches=64)(
        images=as_pictures(random_pixels(3, 128)), return_tensors="pt"
    )
    shapes = torch.tensor([[8, 8]]).expand(3, -1)
    alone = model(inputs["pixel_values"], None, shapes)
    with equal_shapes(model.embeddings):
        equal = model(inputs["pixel_values"], None, shapes)
        assert "resize_positional_embeddings" in vars(model.embeddings)
    assert "resize_positional_embeddings" not in vars(model.embeddings)
    assert torch.equal(equal.last_hidden_state, alone.last_hidden_state)
    assert torch.equal(equal.pooler_output, alone.pooler_output)
    masked = model(**inputs)  # as SiglipEncoder calls it
    assert torch.allclose(masked.last_hidden_state, alone.last_hidden_state, atol=1e-5)


# ---- denoiser


def text_encoder() -> TextEncoder:
    tokenizer = build_tokenizer(SIZES)
    torch.manual_seed(0)
    return TextEncoder(build_text_encoder(SIZES, tokenizer).model, tokenizer, 512)


def codec() -> LatentCodec:
    torch.manual_seed(1)
    vae = build_vae(SIZES).eval()
    with torch.no_grad():  # what train_vae does at its end
        latents = vae.encode(in_range(random_pixels(8, 32))).latent_dist.mode()
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return LatentCodec(vae)


def transformer() -> nn.Module:
    torch.manual_seed(2)
    return build_transformer(SIZES, siglip=False)


def test_states_of_many_prompts_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = text_encoder()
    monkeypatch.setattr(denoiser, "_CHUNK", 2)
    captions = ["one star", "three fish at the bottom with thick outlines", "", "a boat", "two moons on the left"]
    states = encode_captions(encoder, captions)
    rows = np.array([4, 0, 2, 2, 1, 3, 4])
    taken = states.take(rows)
    assert len({len(state) for state in taken}) > 3
    for row, state in zip(rows, taken, strict=True):
        alone = encoder.encode(captions[row])
        assert state.shape == alone.shape and torch.allclose(state, alone, atol=1e-5)


def test_blind_replies_see_only_what_the_turn_has_gathered() -> None:
    tokenizer = build_tokenizer(SIZES, ["user", "assistant", "one red circle a tree"] * 300)
    device = torch.device("cpu")
    turns = tokenize(tokenizer, ["one red circle", "a tree"], ["red", "a tree"], learn_user=False, device=device)
    assert turns.around == (3, 5) and turns.reply.tolist() == [11, 10]
    seen = turns.sight(torch.tensor([0, 1]), torch.tensor([True, False]))
    length = turns.ids.shape[1]
    for row, blind in ((0, True), (1, False)):
        reply = int(turns.reply[row])
        for place in range(length):
            hidden = set(range(3, reply - 5)) if blind and place >= reply else set()
            assert set(seen[row, 0, place].nonzero().flatten().tolist()) == set(range(place + 1)) - hidden
    states = torch.randn(2, 2, length, 4)
    gathered = turns.gathered(list(states), torch.tensor([1, 0]))
    assert torch.equal(gathered[:, 0], states[:, 0, 5:10]) and torch.equal(gathered[:, 1], states[:, 1, 6:11])
    # A model that looks at nothing else gives the same replies to other words of the same effect on those tokens.
    model = build_text_encoder(SIZES, tokenizer).eval()
    ids = turns.ids[:1].clone()
    with torch.no_grad():
        states = model.model(input_ids=ids, attention_mask=seen[:1], use_cache=False, output_hidden_states=True)
        plain = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    for one, other in zip(states.hidden_states, plain.hidden_states, strict=True):
        assert torch.allclose(one[:, :11], other[:, :11], atol=1e-5), "before the reply all is as ever"
    assert not torch.allclose(states.hidden_states[-1][:, 11:], plain.hidden_states[-1][:, 11:], atol=1e-3)


def test_a_user_says_clauses_in_any_order_and_where_a_picture_would_be() -> None:
    tokenizer = build_tokenizer(SIZES)
    gallery = PaintedWorld(size=16).gallery("train", 400, 0, "cpu")
    turns = text_turns(gallery, tokenizer, 0)
    framed = shuffled = 0
    for row, clauses in enumerate(gallery.clauses):
        if row % 8 not in (2, 3):  # all clauses are said again
            continue
        turn = tokenizer.decode(turns.ids[row]).replace("<|endoftext|>", "")
        said, reply = turn.split("<|im_end|>\n<|im_start|>assistant\n")
        assert reply == " ".join(clauses) + "<|im_end|>\n", "in the order of the caption"
        words = said.removeprefix("<|im_start|>user\n")
        if words.startswith(VISION_START):
            framed += 1
            words = words.removeprefix(VISION_START).removesuffix(VISION_END)
        assert sorted(words.split()) == sorted(" ".join(clauses).split())
        shuffled += words != " ".join(clauses)
    assert 30 < framed < 70 and shuffled > 60


def test_nearest_distance_counts_both_ways() -> None:
    found = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [9.0, 0.0]]])
    wanted = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [50.0, 50.0]]])
    is_wanted = torch.tensor([[True, True, False]])
    to_found, to_wanted = (1 + 4) / 2, (1 + 4 + 40) / 3
    expected = (to_found + to_wanted) / (2 * (1 + 13) / 2)
    assert float(nearest_distance(found, wanted, is_wanted)) == pytest.approx(expected)
    assert float(nearest_distance(wanted[:, :2], wanted, is_wanted)) == pytest.approx(0, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    wanted = 7 + torch.randn(2, 400, 3, 8, generator=generator) * torch.tensor([0.5, 1.0, 4.0])[:, None]
    kinds = torch.arange(400) % 3
    wanted += 20 * kinds[:, None, None]
    mean = torch.stack([wanted[:, kinds == kind].mean(1) for kind in range(3)], 1)[:, kinds]
    assert float(relative_distance(mean, wanted, kinds)) == pytest.approx(1, abs=1e-4)
    assert float(relative_distance((mean + wanted) / 2, wanted, kinds)) == pytest.approx(0.25, abs=1e-4)
    assert float(relative_distance(mean, wanted, torch.zeros_like(kinds))) < 0.1, "what kinds differ in hides the rest"


def test_prompts_without_words_are_the_turns_own_tokens() -> None:
    encoder = text_encoder()
    states = encode_captions(encoder, ["two stars on the left", "a", ""])
    before, after = states.around
    rows = np.array([1, 0, 2, 0])
    whole = states.take(rows)
    taken = states.take(rows, np.array([True, True, True, False]))
    for state, true in zip(taken[:3], whole[:3], strict=True):
        assert torch.equal(state, torch.cat([true[:before], true[-after:]]))
    assert torch.equal(taken[3], whole[3])
    second = states.take(rows, np.array([True, False, False, False]), np.array([0, -1, 1, -1]))
    own = [torch.cat([state[:before], state[-after:]]) for state in whole]
    expected = [torch.cat([own[0], own[1]]), whole[1], torch.cat([whole[2], own[0]]), whole[3]]
    assert all(torch.equal(state, true) for state, true in zip(second, expected, strict=True))


def test_loss_of_a_model_that_predicts_nothing() -> None:
    """velocity = 0 costs mean (noise - latents)^2, whatever sigma and caption."""
    dit, latent_codec = transformer(), codec()
    for layer in dit.all_final_layer.values():
        nn.init.zeros_(layer.linear.weight)
        nn.init.zeros_(layer.linear.bias)
    gallery = PaintedWorld(size=32).gallery("train", 6, 0, "cpu")
    plan = FitSettings(steps=1, batch_size=5, learning_rate=0.0)
    density = SigmaDensity(sampling="logit_normal", shift=2.0)
    fitted = train_denoiser(dit, text_encoder(), latent_codec, gallery, plan, density, 3)

    draws = Draws(6, 5, 3, "cpu")
    draws.at(0)
    latents = latent_codec.encode_pixels(gallery.pixels(draws.rows()))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3 * 2**32))
    assert fitted.loss == pytest.approx(float((noise - latents).square().mean()), rel=1e-3)  # latents wait in float16
    assert not dit.training and not any(parameter.requires_grad for parameter in dit.parameters())


def test_draws_are_a_function_of_the_step() -> None:
    """A resumed run draws what the undisturbed one would have, and no step draws what another did."""
    draws = Draws(1 << 40, 4, 3, "cpu")
    drawn = []
    for step in (0, 1, 2, 1):
        draws.at(step)
        drawn.append(draws.rows().tolist())
    assert drawn[1] == drawn[3]
    assert len({tuple(rows) for rows in drawn}) == 3


def test_a_state_made_from_other_parts_is_refused(tmp_path: Path) -> None:
    layer, plan = nn.Linear(2, 1), FitSettings(steps=80, batch_size=1, learning_rate=0.0)

    def loss(step: int) -> Tensor:
        if step == 5:
            raise KeyboardInterrupt
        return layer(torch.ones(1, 2)).sum()

    with pytest.raises(KeyboardInterrupt):
        fit("line", [layer], loss, plan, "cpu", Partial(path=tmp_path / "partial", made_from="one text encoder"))
    with pytest.raises(InputError, match="another plan or model"):
        fit("line", [layer], loss, plan, "cpu", Partial(path=tmp_path / "partial", made_from="another"))


def test_denoiser_overfits_four_pictures() -> None:
    dit, encoder, latent_codec = transformer(), text_encoder(), codec()
    gallery = PaintedWorld(size=32).gallery("train", 4, 0, "cpu")
    density = SigmaDensity(sampling="logit_normal", shift=2.0)
    latents = latent_codec.encode_pixels(gallery.pixels(torch.arange(4)))
    generator = torch.Generator().manual_seed(9)
    noise, sigma = torch.randn(latents.shape, generator=generator), draw_sigmas(4, density, generator)
    encoded = Encoded.of_prompts([encoder.encode(text) for text in gallery.captions], encoder.encode(""))

    @torch.no_grad()
    def error() -> float:
        return float(flow.loss(AdaptedDiT(dit, []).eval(), latents, noise, sigma, encoded).mean())

    before = error()
    plan = FitSettings(steps=90, batch_size=16, learning_rate=5e-3)
    fitted = train_denoiser(dit, encoder, latent_codec, gallery, plan, density, 0)
    assert fitted.loss < before / 2 and error() < before / 2, (before, fitted.loss, error())


# ---- judges


@pytest.fixture(scope="module")
def pictures() -> tuple[Gallery, Gallery]:
    """To learn from, and to be asked about."""
    world = PaintedWorld(size=32)
    return world.gallery("train", 1600, 0, "cpu"), world.gallery("held", 400, 1, "cpu")


@pytest.fixture(scope="module")
def content_judge(pictures: tuple[Gallery, Gallery]) -> ContentJudge:
    torch.manual_seed(0)
    judge = ContentJudge({"place": 5, "count": 3})
    train_content_judge(judge, pictures[0], FitSettings(steps=110, batch_size=64, learning_rate=2e-3), 0)
    return judge


@pytest.fixture(scope="module")
def style_judge(pictures: tuple[Gallery, Gallery]) -> StyleJudge:
    torch.manual_seed(0)
    judge = StyleJudge()
    train_style_judge(judge, pictures[0], FitSettings(steps=60, batch_size=96, learning_rate=2e-3), 0)
    return judge


def test_content_judge_beats_chance(pictures: tuple[Gallery, Gallery], content_judge: ContentJudge) -> None:
    held = pictures[1]
    right = {
        name: float((logits.argmax(1) == held.labels[name]).float().mean())
        for name, logits in content_judge.judge(held.images).items()
    }
    assert right["place"] > 0.6 and right["count"] > 0.5, right


def test_style_judge_separates(pictures: tuple[Gallery, Gallery], style_judge: StyleJudge) -> None:
    held = pictures[1]
    vectors = style_judge.embed(held.images)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(held)), atol=1e-5)
    cosines = vectors @ vectors.T
    same = held.styles[:, None] == held.styles
    itself = torch.eye(len(held), dtype=torch.bool)
    near, far = cosines[same & ~itself], cosines[~same]
    assert near.mean() > far.mean() + 0.3, (near.mean(), far.mean())
    nearest = held.styles[cosines.masked_fill(itself, -2).argmax(1)]
    assert (nearest == held.styles).float().mean() > 0.3, "of fifty styles"


def test_judges_are_what_they_were_after_a_round_trip(
    pictures: tuple[Gallery, Gallery], content_judge: ContentJudge, style_judge: StyleJudge, tmp_path: Path
) -> None:
    images = pictures[1].images[:300]  # more than one chunk
    save_judge(content_judge, tmp_path, "content")
    save_judge(style_judge, tmp_path, "style_second")
    content, style = load_content_judge(tmp_path, "cpu"), load_style_judge(tmp_path, "cpu", "style_second")
    before, after = content_judge.judge(images), content.judge(images)
    assert after.keys() == before.keys() == {"place", "count"}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(style.embed(images), style_judge.embed(images))
    assert not any(p.requires_grad for judge in (content, style) for p in judge.parameters())


def test_style_judge_needs_pairs(pictures: tuple[Gallery, Gallery]) -> None:
    alone = replace(pictures[0], styles=torch.arange(len(pictures[0])))
    with pytest.raises(ValueError, match="no style has two pictures"):
        train_style_judge(StyleJudge(), alone, FitSettings(steps=1, batch_size=8, learning_rate=1e-3), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [64, 256, 512])
def test_compiled_blocks_have_the_gradients_of_eager_ones(batch: int) -> None:
    """torch 2.10 and 2.11 fuse some reductions wrongly (pytorch/pytorch#193061), and say nothing."""
    torch.manual_seed(0)
    sizes = PAINTED.sizes
    dit = build_transformer(sizes, siglip=False).cuda().requires_grad_(True)
    model = AdaptedDiT(dit, [])
    dit.requires_grad_(True)
    text = list(torch.randn((batch, 24, sizes.lm_hidden), device="cuda"))
    clean, noise = torch.randn((2, batch, 16, 16, 16), device="cuda")
    sigma = torch.rand(batch, device="cuda")

    def gradients() -> dict[str, torch.Tensor]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            flow.loss(model, clean, noise, sigma, Encoded.of_prompts(text, text[0])).mean().backward()
        found = {name: p.grad for name, p in dit.named_parameters() if p.grad is not None}
        dit.zero_grad()
        return found

    eager = gradients()
    assert compile_blocks(dit, gradients, print)
    for _ in range(10):  # what inductor computes wrong differs from call to call
        assert relative_error(gradients(), eager) < 0.05  # bfloat16 rounds differently where kernels are fused
