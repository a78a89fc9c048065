"""The miniature family is what it claims to be: complete, reproducible, and read by the real loading code."""

import importlib.util
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLForConditionalGeneration,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2VisionModel,
)

from miniature import family as mini
from miniature import parts
from ztrain.errors import InputError

PIPELINES = (mini.BASE, mini.TURBO, mini.OMNI)
TEXT = "Ein röter circle, 東京 <|vision_start|><|image_pad|><|vision_end|><think>\n\n</think>  it's 42!\n"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def picture(pipeline: DiffusionPipeline, prompt: str, *, seed: int = 0, **inputs: object) -> np.ndarray:
    """Renders one 64 px picture in two steps, (64, 64, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=prompt,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=inputs.pop("guidance_scale", 0.0),
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **inputs,
    ).images[0]


def test_build_is_fast_reproducible_and_keeps_the_callers_random_state(family: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)

    start = time.perf_counter()
    again = mini.build_family(tmp_path / "again")
    seconds = time.perf_counter() - start
    print(f"built the family in {seconds:.2f} s")

    assert seconds < 10
    assert torch.equal(torch.rand(4), expected)
    assert files_of(again) == files_of(family)
    assert [path.name for path in tmp_path.iterdir()] == ["again"], "temporary folder left behind"


def test_another_seed_changes_every_weight_file_and_nothing_else(family: Path, tmp_path: Path) -> None:
    first, second = files_of(family), files_of(mini.build_family(tmp_path / "other", seed=1))
    assert first.keys() == second.keys()
    changed = {name for name in first if first[name] != second[name]}
    weights = {name for name in first if name.endswith(".safetensors")}
    assert len(weights) == 12
    assert changed == weights | {mini.MARKER}


def test_command_line_builds_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "family"
    assert mini.main(["--out", str(out)]) == 0
    assert "built" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert mini.main(["--out", str(out)]) == 0
    assert "already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    (out / mini.MARKER).unlink()
    assert mini.main(["--out", str(out)]) == 2
    assert str(out) in capsys.readouterr().err


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(sizes: parts.FamilySizes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mini, "build_vae", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mini.build_family(tmp_path / "family")
    assert list(tmp_path.iterdir()) == []


def test_build_into_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="remove it or name another folder"):
        mini.build_family(tmp_path)
    assert files_of(tmp_path) == {"mine.txt": b"keep me"}


def test_another_size_is_another_family(family: Path) -> None:
    wider = replace(mini.TINY, dit_layers=3, lm_layers=7, siglip_layers=3, vl_depth=5)
    tokenizer = parts.build_tokenizer(wider)
    assert len(parts.build_transformer(wider, siglip=False).layers) == 3
    assert len(parts.build_text_encoder(wider, tokenizer).model.layers) == 7
    vision_language = parts.build_vision_language(wider, tokenizer).model
    assert (len(vision_language.language_model.layers), len(vision_language.visual.blocks)) == (7, 5)
    assert len(parts.build_siglip(wider).vision_model.encoder.layers) == 3
    assert mini.is_complete(family)
    assert not mini.is_complete(family, sizes=wider)


def test_any_repositories_are_written_in_the_dtype_that_the_models_have(tmp_path: Path) -> None:
    """What a pretrained miniature asks for: some repositories, half precision, its own processors."""
    sizes = replace(mini.TINY, siglip_patches=16)
    tokenizer = parts.build_tokenizer(sizes, ["qqqqqqqq qqqqqqqq"])
    assert tokenizer.tokenize("qqqqqqqq") == ["qqqqqqqq"]
    family = parts.Parts(
        tokenizer=tokenizer,
        text_encoder=parts.build_text_encoder(sizes, tokenizer).bfloat16(),
        vision_language=parts.build_vision_language(sizes, tokenizer).bfloat16(),
        siglip=parts.build_siglip(sizes, text_vocab=99).bfloat16(),
        vae=parts.build_vae(sizes),
        transformers={mini.OMNI: parts.build_transformer(sizes, siglip=True).bfloat16()},
        shifts={mini.OMNI: 2.0},
        siglip_patches=16,
        vision_language_pixels=(64, 4096),
    )
    mini.write_repositories(tmp_path, family)

    assert {path.name for path in tmp_path.iterdir()} == {mini.OMNI, mini.VISION_LANGUAGE, mini.SIGLIP}
    dtypes = {
        path.relative_to(tmp_path).parts[-2]: {weight.dtype for weight in load_file(path).values()}
        for path in tmp_path.rglob("*.safetensors")
    }
    assert dtypes.pop("vae") == {torch.float32}
    assert all(dtype == {torch.bfloat16} for dtype in dtypes.values()) and len(dtypes) == 5
    assert Qwen3Model.from_pretrained(tmp_path / mini.OMNI / "text_encoder").dtype == torch.bfloat16
    assert Siglip2Model.from_pretrained(tmp_path / mini.SIGLIP).config.text_config.vocab_size == 99
    assert Siglip2ImageProcessorPil.from_pretrained(tmp_path / mini.OMNI / "siglip_processor").max_num_patches == 16
    size = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / mini.VISION_LANGUAGE).size
    assert (size["shortest_edge"], size["longest_edge"]) == (64, 4096)
    shift = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / mini.OMNI / "scheduler").config.shift
    assert shift == 2.0


def test_builders_leave_the_models_as_their_libraries_start_them() -> None:
    dit = parts.build_transformer(mini.TINY, siglip=True)
    assert dit.training and not dit.siglip_pad_token.any()
    for final_layer in dit.all_final_layer.values():
        assert final_layer.linear.weight.abs().max() <= mini.TINY.dit_dim**-0.5, "torch's uniform start"


@pytest.mark.parametrize(
    ("loader", "folder"),
    [
        *((ZImageTransformer2DModel, f"{name}/transformer") for name in PIPELINES),
        *((AutoencoderKL, f"{name}/vae") for name in PIPELINES),
        *((Qwen3Model, f"{name}/text_encoder") for name in PIPELINES),
        (Qwen3ForCausalLM, f"{mini.TURBO}/text_encoder"),
        (Siglip2VisionModel, f"{mini.OMNI}/siglip"),
        (Siglip2VisionModel, mini.SIGLIP),
        (Siglip2Model, mini.SIGLIP),
        (Qwen3VLForConditionalGeneration, mini.VISION_LANGUAGE),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_loaders_find_exactly_their_keys(family: Path, loader: Any, folder: str) -> None:
    model, report = loader.from_pretrained(family / folder, output_loading_info=True)
    assert model.num_parameters() > 0
    # A tower taken out of the whole model leaves the other tower's keys over, in the real repository too.
    others = {"text_model.", "logit_"} if (loader, folder) == (Siglip2VisionModel, mini.SIGLIP) else set()
    unexpected = [key for key in report["unexpected_keys"] if not key.startswith(tuple(others))]
    assert (list(report["missing_keys"]), unexpected, list(report["mismatched_keys"])) == ([], [], [])


def test_weights_on_disk_have_the_real_names(family: Path) -> None:
    vision_language = load_file(family / mini.VISION_LANGUAGE / "model.safetensors")
    text_encoder = load_file(family / mini.TURBO / "text_encoder" / "model.safetensors")
    assert {key.rsplit(".", 1)[0].split(".")[1] for key in vision_language} == {"visual", "language_model"}
    language = "model.language_model."
    spliced = {key.replace(language, "model."): v for key, v in vision_language.items() if language in key}
    assert spliced.keys() == text_encoder.keys(), "the splice needs equal names"
    for name, weight in text_encoder.items():
        assert spliced[name].shape == weight.shape, name
        assert not torch.equal(spliced[name], weight), f"{name} is the same in both models"


def test_checkpoints_differ_where_the_real_ones_do(family: Path) -> None:
    weights = "transformer/diffusion_pytorch_model.safetensors"
    base, turbo, omni = (load_file(family / name / weights) for name in PIPELINES)
    assert base.keys() == turbo.keys()
    assert {key.split(".")[0] for key in omni.keys() - base.keys()} == {
        "siglip_embedder",
        "siglip_refiner",
        "siglip_pad_token",
    }
    for name in base:
        assert not torch.equal(base[name], turbo[name]), name
        assert not torch.equal(base[name], omni[name]), name
    shifts = {
        name: FlowMatchEulerDiscreteScheduler.from_pretrained(family / name / "scheduler").config.shift
        for name in PIPELINES
    }
    assert shifts == {mini.BASE: 6.0, mini.TURBO: 3.0, mini.OMNI: 6.0}


def test_no_parameter_is_constant_or_without_effect(family: Path) -> None:
    """A zero pad token or a dead layer would let a test pass that forgets it."""
    dit = ZImageTransformer2DModel.from_pretrained(family / mini.OMNI / "transformer")
    for name, parameter in dit.named_parameters():
        assert parameter.std() > 1e-3, name
    torch.manual_seed(0)
    latents = [torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 6)]  # a clean reference and the target
    (output,) = dit(
        [latents],
        torch.tensor([0.3]),
        [[torch.randn(5, 48), torch.randn(7, 48), torch.randn(2, 48)]],
        siglip_feats=[[torch.randn(3, 4, 32), None]],
        image_noise_mask=[[0, 1]],
        return_dict=False,
    )[0]
    assert output.shape == (16, 1, 8, 6)
    output.square().sum().backward()
    for name, parameter in dit.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name


def test_both_tokenizers_give_the_same_ids(family: Path) -> None:
    folders = [family / name / "tokenizer" for name in PIPELINES] + [family / mini.VISION_LANGUAGE]
    first, *others = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    ids = first(TEXT).input_ids
    assert first.decode(ids) == TEXT
    for other in others:
        assert type(other).__name__ == "Qwen2Tokenizer"
        assert other.get_vocab() == first.get_vocab()
        assert other(TEXT).input_ids == ids
    assert (first.pad_token, first.eos_token) == ("<|endoftext|>", "<|im_end|>")
    for token in parts.SPECIAL_TOKENS + parts.THINKING_TOKENS:
        assert first(token).input_ids == [first.get_vocab()[token]], token
    # Merges were learned: a known word is one token, an unknown one falls to pieces that spell it.
    assert first.tokenize(" and the") == ["Ġand", "Ġthe"]
    assert len(first.tokenize("xylophone")) > 3
    assert len(first) <= 512


def test_ids_in_model_configs_come_from_the_tokenizer(family: Path) -> None:
    vocabulary = AutoTokenizer.from_pretrained(family / mini.VISION_LANGUAGE).get_vocab()
    text = Qwen3Model.from_pretrained(family / mini.TURBO / "text_encoder")
    whole = Qwen3VLForConditionalGeneration.from_pretrained(family / mini.VISION_LANGUAGE)
    assert whole.config.image_token_id == vocabulary["<|image_pad|>"]
    assert whole.config.video_token_id == vocabulary["<|video_pad|>"]
    assert whole.config.vision_start_token_id == vocabulary["<|vision_start|>"]
    assert whole.config.vision_end_token_id == vocabulary["<|vision_end|>"]
    assert text.config.eos_token_id == vocabulary["<|im_end|>"]
    for embedding in (text.embed_tokens, whole.model.language_model.embed_tokens):
        assert embedding.num_embeddings % 8 == 0
        assert 0 <= embedding.num_embeddings - len(vocabulary) < 8
    assert whole.lm_head.weight.data_ptr() == whole.model.language_model.embed_tokens.weight.data_ptr()
    assert text.config.rope_parameters["rope_theta"] == 1e6
    rope = whole.config.text_config.rope_parameters
    assert (rope["rope_theta"], rope["mrope_section"], rope["mrope_interleaved"]) == (5e6, [4, 2, 2], True)


def test_chat_template_has_qwens_meaning_of_thinking(family: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family / mini.TURBO / "tokenizer")
    turn = [{"role": "user", "content": "a cat"}]
    asked = "<|im_start|>user\na cat<|im_end|>\n"
    answer = "<|im_start|>assistant\n"

    def written(**options: bool) -> str:
        return tokenizer.apply_chat_template(turn, tokenize=False, **options)

    assert written() == asked
    assert written(add_generation_prompt=True) == asked + answer
    assert written(add_generation_prompt=True, enable_thinking=True) == asked + answer
    silent = written(add_generation_prompt=True, enable_thinking=False)
    assert silent == asked + answer + "<think>\n\n</think>\n\n"


def test_vision_language_model_sees_the_image(family: Path) -> None:
    folder = family / mini.VISION_LANGUAGE
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    assert len(whole.model.visual.deepstack_merger_list) == 3
    states = []
    for colour in ((255, 255, 255), (0, 128, 0)):
        image = processor(images=[Image.new("RGB", (100, 40), colour)], return_tensors="pt")
        if colour == (255, 255, 255):
            assert torch.equal(image.pixel_values, torch.ones_like(image.pixel_values)), "mean and std of 0.5"
        count = int(image.image_grid_thw.prod()) // 4
        assert count == 78  # enlarged to 65536 square pixels, then 32 px a token
        prompt = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>hi<|im_end|>\n"
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            output = whole.model(
                input_ids=ids,
                mm_token_type_ids=(ids == whole.config.image_token_id).int(),
                use_cache=False,
                **image,
            )
        states.append(output.last_hidden_state[0, -1])
    assert not torch.allclose(states[0], states[1], rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("folder", "processor"),
    [
        (mini.VISION_LANGUAGE, Qwen2VLImageProcessorPil),
        (mini.SIGLIP, Siglip2ImageProcessorPil),
        (f"{mini.OMNI}/siglip_processor", Siglip2ImageProcessorPil),
    ],
)
def test_processors_load_by_class_and_by_name(family: Path, folder: str, processor: Any) -> None:
    by_class = processor.from_pretrained(family / folder)
    by_name = AutoImageProcessor.from_pretrained(family / folder, backend="pil")
    assert type(by_name) is processor
    assert by_name.to_dict() == by_class.to_dict()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    first, second = (each(images=[picture], return_tensors="pt") for each in (by_class, by_name))
    assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_siglip_tower_is_the_same_in_both_places(family: Path) -> None:
    own = Siglip2VisionModel.from_pretrained(family / mini.OMNI / "siglip").state_dict()
    whole = Siglip2Model.from_pretrained(family / mini.SIGLIP).vision_model.state_dict()
    assert own.keys() == whole.keys()
    assert all(torch.equal(own[name], whole[name]) for name in own)
    processor = Siglip2ImageProcessorPil.from_pretrained(family / mini.SIGLIP)
    inputs = processor(images=[Image.new("RGB", (768, 1344))], return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 256, 768)  # 16 x 16 patches of 16 px and 3 channels
    assert inputs.spatial_shapes.tolist() == [[21, 12]]


def test_base_and_turbo_render(family: Path) -> None:
    turbo = ZImagePipeline.from_pretrained(family / mini.TURBO)
    base = ZImagePipeline.from_pretrained(family / mini.BASE)
    first = picture(turbo, "a red circle")
    assert first.shape == (64, 64, 3)
    assert np.isfinite(first).all()
    assert 0.01 < first.std() < 0.5
    assert np.array_equal(picture(turbo, "a red circle"), first)
    assert np.abs(picture(turbo, "two blue squares") - first).max() > 0.01
    assert np.abs(picture(turbo, "a red circle", seed=1) - first).max() > 0.01
    base_picture = picture(base, "a red circle", guidance_scale=4.0)
    assert np.isfinite(base_picture).all()
    assert np.abs(base_picture - picture(base, "a red circle")).max() > 0.01, "guidance has no effect"


def test_omni_renders_from_a_reference(family: Path) -> None:
    omni = ZImageOmniPipeline.from_pretrained(family / mini.OMNI)
    omni.vae.to(torch.bfloat16)  # the pipeline encodes references in bfloat16 whatever the VAE holds
    pictures = [picture(omni, "a red circle", image=Image.new("RGB", (64, 64), colour)) for colour in ("white", "navy")]
    assert pictures[0].shape == (64, 64, 3)
    assert all(np.isfinite(each).all() and each.std() > 0.01 for each in pictures)
    assert np.abs(pictures[0] - pictures[1]).max() > 0.01, "the reference has no effect"


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="transformers imports it if it can")
def test_nothing_needed_torchvision(family: Path) -> None:
    ZImageOmniPipeline.from_pretrained(family / mini.OMNI)
    assert not [name for name in sys.modules if name.split(".")[0] == "torchvision"]
