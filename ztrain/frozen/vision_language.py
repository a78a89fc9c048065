"""The splice: Qwen3-VL's visual front-end on Z-Image's own Qwen3 weights, giving hidden states with token kinds.

The front-end (vision transformer, mergers, DeepStack) comes from the Qwen3-VL repository, the language model from the
text encoder: its parameters are shared, not copied, and Qwen3-VL's own language model is never read from disk. The
call is Qwen3VLModel.forward's, written out, because the splice needs to choose its parts: rotary base, positions,
DeepStack, marker rows, layer (zimage_facts.md section 4).

Legend: L tokens, D text width, k hidden index, V visual tokens.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ztrain.conditioning import IMAGE, MARKER, TEXT, TokenStates
from ztrain.config import EncodersConfig
from ztrain.errors import InputError
from ztrain.frozen.sources import Source, explained, pretrained, pretrained_processor, weight_map
from ztrain.io.tensors import open_tensors

VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"

_TURN = "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def check_hidden_index(index: int | None, num_layers: int, name: str = "hidden_index") -> int:
    """The index to read, 1 .. num_layers; None is the pipelines' own choice, the second to last state."""
    if index is None:
        return num_layers - 1
    if not 1 <= index <= num_layers:
        raise InputError(f"encoders.{name} is {index}; this language model has states 1 to {num_layers}")
    return index


@contextmanager
def first_layers(language_model: Any, k: int) -> Iterator[None]:
    """Cuts a decoder to its first k layers; the final norm only belongs to the last state, k = all layers.

    What remains gives hidden state k as last_hidden_state: the residual stream after k layers, DeepStack included,
    where transformers' own hidden_states[1..3] are taken before DeepStack is added.
    """
    layers, norm = language_model.layers, language_model.norm
    try:
        language_model.layers = layers[:k]
        if k < len(layers):
            language_model.norm = nn.Identity()
        yield
    finally:
        language_model.layers, language_model.norm = layers, norm


class SplicedModel:
    """Encodes images with or without a prompt through the spliced model."""

    def __init__(self, source: Source, text_encoder: Any, tokenizer: Any) -> None:
        from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLModel

        source.require("config.json", what="a Qwen3-VL model")
        folder = source.local("*.json")
        config = pretrained(Qwen3VLConfig, folder)
        self.processor = pretrained_processor(folder, Qwen2VLImageProcessorPil)
        self.tokenizer = tokenizer
        self.ids = {token: _token_id(tokenizer, token) for token in (VISION_START, VISION_END, IMAGE_PAD)}
        embedding = text_encoder.embed_tokens.weight
        with explained(source.location), torch.device("meta"):
            self.theta = {
                "text_encoder": text_encoder.config.rope_parameters["rope_theta"],
                "vl": config.text_config.rope_parameters["rope_theta"],
            }
            self.model = Qwen3VLModel(config).eval()
        self.model.visual, self.marker_rows = _front_end(source, config, self.ids, embedding)
        self._share(text_encoder, source)
        self.model.requires_grad_(False)

    def _share(self, text_encoder: Any, source: Source) -> None:
        """Puts the text encoder's parameters into the vision-language decoder: same names, shapes and objects."""
        language_model = self.model.language_model
        try:
            language_model.load_state_dict(text_encoder.state_dict(keep_vars=True), strict=True, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{source.location} is no sibling of this text encoder: {reason}") from error
        # The rotary buffers are not in a state dict, so they are built anew, off the meta device.
        device = text_encoder.embed_tokens.weight.device
        language_model.rotary_emb = type(language_model.rotary_emb)(language_model.config).to(device)

    def _set_theta(self, theta: float) -> None:
        rotary = self.model.language_model.rotary_emb
        half = rotary.inv_freq.shape[0]
        exponents = torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half)
        rotary.inv_freq = (1.0 / (theta**exponents)).to(rotary.inv_freq.device)

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], prompt: str, settings: EncodersConfig) -> TokenStates:
        """Hidden states of one user turn with images and prompt, (L, D), with each token's kind.

        Tokens of the image and its markers are read at `hidden_index`, the others at `text_hidden_index` if it is set.
        """
        device = self.model.language_model.embed_tokens.weight.device
        pixels, grid = self._pixels(images, settings)
        # The visual part itself: what Qwen3VLModel.get_image_features splits by image differs between versions.
        visual = self.model.visual
        features = visual(pixels.to(device, visual.dtype), grid_thw=grid.to(device), return_dict=True)
        counts = (grid.prod(-1) // visual.spatial_merge_size**2).tolist()
        ids = self._ids(counts, prompt, settings).to(device)  # (1, L)
        is_image = ids == self.ids[IMAGE_PAD]

        embeds = self.model.language_model.embed_tokens(ids)  # (1, L, D)
        if settings.marker_rows == "vl":
            for token, row in self.marker_rows.items():
                embeds[ids == self.ids[token]] = row.to(embeds)
        embeds[is_image] = features.pooler_output.to(embeds)
        positions = None
        if settings.positions == "mrope":
            positions, _ = self.model.get_rope_index(ids, is_image.int(), image_grid_thw=grid.to(device))
        deepstack = features.deepstack_features if settings.deepstack else None  # 3 x (V, D)
        inputs: dict[str, Any] = {"positions": positions, "is_image": is_image, "deepstack": deepstack}
        image_layer, text_layer = self._layers(settings)
        states = self.decode(embeds, settings, **inputs)
        kinds = torch.full_like(ids[0], TEXT, dtype=torch.uint8)
        kinds[is_image[0]] = IMAGE
        kinds[(ids[0] == self.ids[VISION_START]) | (ids[0] == self.ids[VISION_END])] = MARKER
        if text_layer != image_layer:
            # A second pass: what hooks see in one is not the residual stream where DeepStack adds to it.
            of_text = self.decode(embeds, settings.model_copy(update={"hidden_index": text_layer}), **inputs)
            states = torch.where((kinds == TEXT).unsqueeze(1), of_text, states)
        return TokenStates(states, kinds.cpu())

    def _layers(self, settings: EncodersConfig) -> tuple[int, int]:
        """Hidden index of the image's tokens and of the others."""
        num_layers = len(self.model.language_model.layers)
        of_image = check_hidden_index(settings.hidden_index, num_layers)
        if settings.text_hidden_index is None:
            return of_image, of_image
        return of_image, check_hidden_index(settings.text_hidden_index, num_layers, "text_hidden_index")

    def decode(
        self,
        embeds: Tensor,
        settings: EncodersConfig,
        *,
        positions: Tensor | None = None,
        is_image: Tensor | None = None,
        deepstack: list[Tensor] | None = None,
    ) -> Tensor:
        """The language model on embeddings (1, L, D), giving hidden state k, (L, D).

        `positions` (3, 1, L) for MRoPE, None for 0 .. L - 1 on all three axes, which is plain RoPE.
        """
        language_model = self.model.language_model
        self._set_theta(self.theta[settings.rope_theta])
        with first_layers(language_model, check_hidden_index(settings.hidden_index, len(language_model.layers))):
            output = language_model(
                inputs_embeds=embeds,
                position_ids=positions,
                visual_pos_masks=is_image,
                deepstack_visual_embeds=deepstack,
                use_cache=False,
            )
        return output.last_hidden_state[0]

    def _pixels(self, images: Sequence[Image.Image], settings: EncodersConfig) -> tuple[Tensor, Tensor]:
        # Despite their names the processor's edges are pixel areas.
        size = {"shortest_edge": settings.min_reference_pixels, "longest_edge": settings.max_reference_pixels}
        inputs = self.processor(images=list(images), size=size, return_tensors="pt")
        return inputs["pixel_values"], inputs["image_grid_thw"]

    def _ids(self, counts: Sequence[int], prompt: str, settings: EncodersConfig) -> Tensor:
        pictures = "".join(VISION_START + IMAGE_PAD * count + VISION_END for count in counts)
        content = pictures + prompt if settings.fused_order == "reference_first" else prompt + pictures
        ids = self.tokenizer(_TURN.format(content=content), return_tensors="pt").input_ids
        if int((ids == self.ids[IMAGE_PAD]).sum()) != sum(counts):
            raise InputError(f"the prompt {prompt!r} contains the special token {IMAGE_PAD}; remove it")
        return ids


def _token_id(tokenizer: Any, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise InputError(f"the text encoder's tokenizer has no {token}; it is not Z-Image's")
    return int(found)


def _front_end(
    source: Source, config: Any, ids: dict[str, int], embedding: Tensor
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The visual part in the embedding's dtype and place, and Qwen3-VL's own embeddings of the marker tokens."""
    from transformers import AutoModel

    with explained(source.location):
        visual = AutoModel.from_config(config.vision_config, trust_remote_code=False)
    weights, rows = {}, {}
    for path in weight_files(source):
        with open_tensors(path) as file:
            for key in file.keys():
                if matched := re.fullmatch(r"(?:model\.)?visual\.(.+)", key):
                    weights[matched.group(1)] = file.get_tensor(key)
                elif key.endswith("embed_tokens.weight"):
                    table = file.get_slice(key)
                    rows = {token: table[ids[token] : ids[token] + 1][0] for token in (VISION_START, VISION_END)}
    if not weights or not rows:
        raise InputError(f"{source.location} is not a Qwen3-VL model: it has no visual.* or no embed_tokens weights")
    try:
        visual.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise InputError(f"{source.location}: its visual weights do not fit its config: {str(error)[:200]}") from error
    return visual.to(embedding.device, embedding.dtype).eval(), {
        token: row.to(embedding.device) for token, row in rows.items()
    }


def weight_files(source: Source) -> list[Path]:
    """The weight files that hold the visual part and the embeddings; nothing else of the repository is read."""
    if not source.has("model.safetensors.index.json"):
        source.require("model.safetensors", what="a Qwen3-VL model")
        return [source.file("model.safetensors")]
    index = weight_map(source.file("model.safetensors.index.json"))
    wanted = {file for key, file in index.items() if "visual." in key or key.endswith("embed_tokens.weight")}
    return [source.file(name) for name in sorted(wanted)]
