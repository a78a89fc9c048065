"""Towers of tiny real models against the models themselves; a style descriptor against its forward pass written out."""

import json
import math
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from miniature.trials import WEIGHTS
from tests.test_dedup import tiny_clip
from ztrain.errors import InputError
from ztrain.frozen.encoders import quiet_loading
from ztrain.frozen.sources import Source
from ztrain.metrics.towers import Tower, digest

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Tower:
    return Tower.load(Source(str(folder)), dtype, "cpu")


def pictures(count: int = 5) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(40, 32), (32, 32), (64, 48), (33, 50), (100, 20)]
    drawn = [torch.randint(256, (h, w, 3), generator=generator, dtype=torch.uint8) for w, h in sizes[:count]]
    return [Image.fromarray(pixels.numpy()) for pixels in drawn]


def tiny_siglip(folder: Path, kind: str) -> Path:
    """SigLIP2 fixed (its config says siglip) or NaFlex, with a tokenizer that tells upper from lower case."""
    torch.manual_seed(0)
    text = {**TINY, "vocab_size": 8, "max_position_embeddings": 6, "projection_size": 16}
    if kind == "naflex":
        vision = {**TINY, "num_patches": 16, "patch_size": 8}
        model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
        processor = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    else:
        vision = {**TINY, "image_size": 32, "patch_size": 8}
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        processor = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "?", "a", "cat", "Cat", "dog"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "?", "padding_side": "left"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["naflex", "fixed"])
def test_siglip_reads_lower_case_padded_on_the_right_without_a_mask(tmp_path: Path, kind: str) -> None:
    tower = load(tiny_siglip(tmp_path / kind, kind))
    assert tower.reads_text
    found = tower.texts(["a Cat", "dog", "a cat a cat a cat a dog"])
    ids = torch.tensor([[3, 4, 1, 0, 0, 0], [6, 1, 0, 0, 0, 0], [3, 4, 3, 4, 3, 1]])
    with torch.no_grad(), quiet_loading():
        model = transformers.AutoModel.from_pretrained(tmp_path / kind).eval()
        expected = F.normalize(model.text_model(input_ids=ids).pooler_output, dim=1)
        seen = []
        for picture in pictures():  # one by one: nothing of a batch is in a vector
            processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / kind, backend="pil")
            seen.append(model.vision_model(**processor(images=[picture], return_tensors="pt")).pooler_output)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(tower.images(pictures(), batch_size=2), F.normalize(torch.cat(seen), dim=1), atol=1e-5)


def test_clip_gives_the_same_vectors_whole_or_as_a_tower_with_projection(tmp_path: Path) -> None:
    whole = load(tiny_clip(tmp_path / "clip"))
    with quiet_loading():
        clip = transformers.CLIPModel.from_pretrained(tmp_path / "clip").eval()
        clip.config.vision_config.projection_dim = 8
        vision = transformers.CLIPVisionModelWithProjection(clip.config.vision_config)
        vision.load_state_dict({name: clip.state_dict()[name] for name in vision.state_dict()})
    vision.save_pretrained(tmp_path / "vision")
    transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "clip").save_pretrained(tmp_path / "vision")
    projected = load(tmp_path / "vision")
    found = whole.images(pictures())
    assert found.dtype == torch.float32 and found.shape == (5, 8)
    assert torch.allclose(projected.images(pictures()), found, atol=1e-6)
    assert whole.reads_text and not projected.reads_text
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "clip")(["a photo"], return_tensors="pt")
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "clip")(pictures(), return_tensors="pt")
    with torch.no_grad():  # as the model itself scores
        likeness = clip(**tokens, **pixels).logits_per_image / clip.logit_scale.exp()
    assert torch.allclose(found @ whole.texts(["a photo"]).T, likeness, atol=1e-6)
    with pytest.raises(InputError, match="vision: reads no text"):
        projected.texts(["a photo"])


def test_dino_gives_its_pooled_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**{**TINY, "mlp_ratio": 2}, image_size=28, patch_size=14)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, do_center_crop=True
    )
    processor.save_pretrained(tmp_path)
    tower = load(tmp_path)
    with torch.no_grad():
        expected = model(processor(images=pictures(), return_tensors="pt").pixel_values).last_hidden_state[:, 0]
    assert torch.allclose(tower.images(pictures()), F.normalize(expected, dim=1), atol=1e-5)
    assert not tower.reads_text
    halved = load(tmp_path, torch.bfloat16).images(pictures())
    assert halved.dtype == torch.float32 and 0 < (halved - tower.images(pictures())).abs().max() < 0.05


# A style descriptor


def csd_weights(width: int = 128, layers: int = 2, patch: int = 7, cells: int = 4, out: int = 24) -> dict[str, Tensor]:
    """Random, under the names of github.com/learn2phoenix/CSD over github.com/openai/CLIP."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    weights = {
        "class_embedding": drawn(width),
        "positional_embedding": drawn(cells**2 + 1, width),
        "conv1.weight": drawn(width, 3, patch, patch),
    }
    for name in ("ln_pre", "ln_post", *(f"transformer.resblocks.{i}.ln_{j}" for i in range(layers) for j in (1, 2))):
        weights |= {f"{name}.weight": 1 + drawn(width), f"{name}.bias": drawn(width)}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        weights |= {
            f"{block}.attn.in_proj_weight": drawn(3 * width, width),
            f"{block}.attn.in_proj_bias": drawn(3 * width),
        }
        for name, rows, columns in (("attn.out_proj", width, width), ("mlp.c_fc", 4 * width, width)):
            weights |= {f"{block}.{name}.weight": drawn(rows, columns), f"{block}.{name}.bias": drawn(rows)}
        weights |= {f"{block}.mlp.c_proj.weight": drawn(width, 4 * width), f"{block}.mlp.c_proj.bias": drawn(width)}
    heads = {"last_layer_style": drawn(width, out), "last_layer_content": drawn(width, out)}
    return {f"backbone.{name}": value for name, value in weights.items()} | heads


def csd_forward(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Style vectors, written out; two heads of 64."""
    w = {name.removeprefix("backbone."): value for name, value in weights.items()}
    width = len(w["class_embedding"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = F.conv2d(pixels, w["conv1.weight"], stride=w["conv1.weight"].shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, width), x], dim=1) + w["positional_embedding"]
    x = norm(x, "ln_pre")
    for i in range(2):
        block = f"transformer.resblocks.{i}"
        inner = norm(x, f"{block}.ln_1") @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        query, key, value = (part.unflatten(2, (2, 64)).transpose(1, 2) for part in inner.chunk(3, dim=2))
        attended = ((query @ key.transpose(2, 3)) / 8).softmax(dim=3) @ value
        x = x + linear(attended.transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        inner = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(inner * torch.sigmoid(1.702 * inner), f"{block}.mlp.c_proj")
    return F.normalize(norm(x[:, 0], "ln_post") @ w["last_layer_style"], dim=1)


def csd(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "csd_clip", "name": "csd_large"}))
    return folder


def test_a_style_descriptor_as_published_gives_its_style_vectors(tmp_path: Path) -> None:
    weights = csd_weights()
    tower = load(csd(tmp_path / "csd", weights))
    given = [picture.resize((28, 28)) for picture in pictures()]  # no resizing by the processor
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(28, 28, 3) for p in given])
    expected = csd_forward(weights, (pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    assert expected.shape == (5, 24) and (expected @ expected.T).max(dim=1).values.min() > 0.99
    assert torch.allclose(tower.images(given), expected, atol=1e-4)
    assert (tower.name, tower.reads_text) == ("csd", False)
    parallel = {f"module.{name}": value for name, value in weights.items()}
    assert torch.equal(load(csd(tmp_path / "parallel", parallel)).images(given), tower.images(given))
    wide = tower.images(pictures())  # the shorter side resized, the middle cut out, as CLIP does
    assert not torch.allclose(wide, tower.images(given), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.pop("backbone.transformer.resblocks.1.ln_2.bias"), "1 missing keys, for example encoder.layers.1"),
        (lambda w: w.update({"backbone.proj": torch.ones(2)}), "1 unexpected keys, for example proj"),
        (lambda w: w.update({"other": torch.ones(2)}), "1 unexpected keys, for example other"),
        (lambda w: w.pop("backbone.conv1.weight"), "cannot load"),
    ],
)
def test_a_style_descriptor_of_other_weights_is_refused(tmp_path: Path, change, complaint: str) -> None:
    weights = csd_weights()
    change(weights)
    with pytest.raises(InputError, match=complaint):
        load(csd(tmp_path / "csd", weights))


# Refusals and identity


def test_weights_must_be_whole_and_safe(tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "visual_projection.weight"}, folder / "model.safetensors")
    with pytest.raises(InputError, match="clip: 1 missing keys, for example visual_projection"):
        load(folder)
    save_file(weights | {"style_head.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="clip: 1 unexpected keys, for example style_head"):
        load(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="clip: has no safetensors"):
        load(folder)
    with pytest.raises(InputError, match="is no folder"):
        load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a vision model: config.json is missing"):
        load(tmp_path / "empty")


def test_a_tower_says_who_it_is(tmp_path: Path) -> None:
    folder = WEIGHTS / "siglip2-so400m-patch16-naflex"
    tower = load(folder)
    assert tower.name == "siglip2-so400m-patch16-naflex" and tower.revision is None
    assert not tower.reads_text  # the family's vocabulary lies elsewhere
    with pytest.raises(InputError, match="has no tokenizer"):
        tower.texts(["a heart"])
    assert tower.weights == digest(Source(str(folder))) and len(tower.weights) == 32
    copied = tmp_path / "copy"
    copied.mkdir()
    for path in folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    assert digest(Source(str(copied))) == tower.weights
    config = copied / "preprocessor_config.json"
    config.write_text(config.read_text().replace("64", "36"))  # fewer patches are other vectors
    assert digest(Source(str(copied))) != tower.weights


def test_pictures_are_rgb_and_some() -> None:
    tower = load(WEIGHTS / "siglip2-so400m-patch16-naflex")
    with pytest.raises(ValueError, match=r"modes \['L', 'RGBA'\]"):
        tower.images([Image.new("RGBA", (32, 32)), Image.new("RGB", (32, 32)), Image.new("L", (32, 32))])
    with pytest.raises(ValueError, match="0 pictures"):
        tower.images([])
    with pytest.raises(ValueError, match="batches of 0"):
        tower.images(pictures(), batch_size=0)
    with pytest.raises(ValueError, match="no texts"):
        tower.texts([])
