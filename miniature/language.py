"""Pretrains the language model on turns about captions, then the vision-language model on top of it.

The language model learns to say a caption again, in full or without its style: for that it has to look words up in the
user's turn, which is what the visual front-end must then imitate when it is trained on the frozen language model. In a
second stage both are tuned together, so that the vision-language model's own language model drifts away from the text
encoder, as Qwen3-VL's has from Qwen3. The pictures' captions name their style in about half of the cases.

Legend: B rows, L tokens, D text width, V visual tokens of a picture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Qwen2Tokenizer, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

from miniature.fit import Draws, FitSettings, Fitted, Partial, fit, training
from miniature.gallery import Gallery
from miniature.turns import ASSISTANT, IGNORED, TURN_KINDS, USER, Turns, picture_turns, text_turns
from ztrain.frozen.vision_language import IMAGE_PAD, VISION_END, VISION_START

_ALIKE = 2.0  # weight of the distance between what a picture and its caption leave in the turn's own tokens
_WORDLIKE = 1.0  # weight of the distance between states of a picture and the words of its caption
_READ = slice(-3, -1)  # of all hidden states: the second to last, which a transformer reads, and the one before
_VISION_SHARE = 0.1  # of the learning rate, for the visual part once the language model is tuned too
_BLIND = 0.5  # share of the turns whose reply does not see what the user says
_PATCH, _TEMPORAL, _MERGE = 16, 2, 2  # preprocessor_config.json of Qwen3-VL


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each next token; logits (B, L, vocabulary), targets (B, L)."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)


def train_language(
    model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, gallery: Gallery, plan: FitSettings, seed: int
) -> Fitted:
    """Trains the text encoder in place, every token of every turn."""
    turns = text_turns(gallery, tokenizer, seed)
    draws = Draws(len(gallery), plan.batch_size, seed, gallery.device)

    def loss(step: int) -> Tensor:
        rows = draws.rows()
        sight = turns.sight(rows, draws.uniform() < _BLIND)
        logits = model(input_ids=turns.ids[rows], attention_mask=sight, use_cache=False).logits
        return next_token_loss(logits, turns.targets[rows])

    with training(model):
        return fit("language", [model], loss, plan, gallery.device)


def visual_side(size: int, min_pixels: int) -> int:
    """The side to which Qwen3-VL's processor brings a square picture of `size` pixels: multiples of 32."""
    step = _PATCH * _MERGE
    return max(round(size / step), round(min_pixels**0.5 / step), 1) * step


def visual_patches(pixels: Tensor, side: int) -> Tensor:
    """What Qwen2VLImageProcessor makes of B square pictures, (B * patches, 3 * 2 * 16 * 16).

    pixels: (B, 3, S, S) in [-1, 1]. Patches come in blocks of 2 x 2, a still picture is both frames of a pair.
    """
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    count, cells = len(pixels), side // _PATCH // _MERGE
    blocks = pixels.view(count, 3, cells, _MERGE, _PATCH, cells, _MERGE, _PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    frames = blocks.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, _TEMPORAL, -1, -1)
    return frames.reshape(-1, 3 * _TEMPORAL * _PATCH * _PATCH)


def relative_distance(found: Tensor, wanted: Tensor, kinds: Tensor) -> Tensor:
    """Of states (layers, B, tokens, D): mean squared distance over the variance of what is wanted among the batch, by
    layer and token, then the mean. 1 = no better than the mean of each of the `kinds`, (B,) int64.

    For most of a state is the same for all turns, and most of the rest for all that ask the same.
    """
    is_kind = F.one_hot(kinds, TURN_KINDS).to(wanted.dtype)  # (B, K)
    means = torch.einsum("bk,lbtd->lktd", is_kind / is_kind.sum(0).clamp_min(1), wanted)
    centred = wanted - torch.einsum("bk,lktd->lbtd", is_kind, means)
    variance = centred.square().mean((1, 3))  # (layers, tokens)
    enough = wanted.square().mean((1, 3)) * 1e-4
    return ((found - wanted).square().mean((1, 3)) / variance.maximum(enough).clamp_min(1e-9)).mean()


def nearest_distance(found: Tensor, wanted: Tensor, is_wanted: Tensor) -> Tensor:
    """Mean squared distance of each wanted state to the nearest found one and the other way round, halved (Chamfer), as
    a share of the wanted ones' mean square norm. found (B, V, D), wanted (B, L, D), is_wanted (B, L) bool."""
    squares = torch.cdist(wanted, found).square()  # (B, L, V)
    to_found = squares.amin(2)[is_wanted].mean()
    to_wanted = squares.masked_fill(~is_wanted[:, :, None], torch.inf).amin(1).mean()
    return (to_found + to_wanted) / (2 * wanted[is_wanted].square().sum(-1).mean())


class PictureReader:
    """A batch of equal squares through Qwen3-VL: its visual part once for all, then its language model.

    Qwen3-VL sees B pictures as the frames of one film, which it treats one by one in space and whose positions repeat:
    the same numbers as B calls, without a loop over them.
    """

    def __init__(self, model: Qwen3VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, side: int) -> None:
        self.model, self.side = model, side
        self.pad = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self.num_visual = (side // _PATCH // _MERGE) ** 2

    def look(self, pixels: Tensor) -> Any:
        """What the visual part makes of (B, 3, S, S) in [-1, 1]: pooler_output and deepstack_features."""
        grid = torch.tensor([[len(pixels), self.side // _PATCH, self.side // _PATCH]], device=pixels.device)
        return self.model.model.visual(visual_patches(pixels, self.side), grid_thw=grid, return_dict=True)

    def logits(self, seen: Any, ids: Tensor) -> Tensor:
        """(B, L, vocabulary) of rows that all begin with one picture, of which `seen` is what `look` gave."""
        return self.model.lm_head(self.read(seen, ids).last_hidden_state)

    def read(self, seen: Any, ids: Tensor, sight: Tensor | None = None, **settings: Any) -> Any:
        """The language model's output for the same; `sight` as of Turns.sight, None = all that comes before."""
        inner = self.model.model
        embeds = inner.language_model.embed_tokens(ids)
        first = int((ids[0] == self.pad).int().argmax())  # all rows begin alike
        span = slice(first, first + self.num_visual)
        features = seen.pooler_output.view(len(ids), self.num_visual, -1).to(embeds.dtype)
        embeds = torch.cat([embeds[:, : span.start], features, embeds[:, span.stop :]], dim=1)
        is_image = torch.zeros_like(ids, dtype=torch.bool)
        is_image[:, span] = True
        one = torch.tensor([[1, self.side // _PATCH, self.side // _PATCH]], device=ids.device)
        positions, _ = inner.get_rope_index(ids[:1], is_image[:1].int(), image_grid_thw=one)
        return inner.language_model(
            inputs_embeds=embeds,
            attention_mask=sight,
            position_ids=positions.expand(-1, len(ids), -1),
            visual_pos_masks=is_image,
            deepstack_visual_embeds=[feature.to(embeds.dtype) for feature in seen.deepstack_features],
            use_cache=False,
            **settings,
        )


def train_vision_language(
    model: Qwen3VLForConditionalGeneration,
    text_encoder: Qwen3ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    gallery: Gallery,
    front_end: FitSettings,
    together: FitSettings,
    seed: int,
    min_pixels: int,
    partials: tuple[Partial, Partial] | None = None,
) -> list[Fitted]:
    """Trains in place: the visual part on the frozen language model of `text_encoder`, then both.

    `partials`: as in `fit`, one for each half.
    """
    inner = model.model
    inner.language_model.load_state_dict(text_encoder.model.state_dict(), strict=True)
    reader = PictureReader(model, tokenizer, visual_side(gallery.images.shape[-1], min_pixels))
    lessons = _Lessons(reader, text_encoder, gallery, *picture_turns(gallery, tokenizer, reader.num_visual))
    fitted = []
    with equal_lengths_attention(inner.visual):
        for name, plan, parts, shares, phase in (
            ("vision", front_end, [inner.visual], [1.0], 0),
            ("vision and language", together, [inner.visual, inner.language_model], [_VISION_SHARE, 1.0], 1),
        ):
            draws = Draws(len(lessons.shown.ids), plan.batch_size, 2 * seed + phase, gallery.device)

            def loss(step: int, draws: Draws = draws, is_alike: bool = phase == 0) -> Tensor:
                draws.at(step)
                return lessons.loss(draws.rows(), draws.uniform() < _BLIND, is_alike)

            model.requires_grad_(False)
            with training(*parts):
                fitted.append(fit(name, parts, loss, plan, gallery.device, partials and partials[phase], shares))
    return fitted


@dataclass(frozen=True, slots=True)
class _Lessons:
    """Turns about a gallery's pictures, and the same with the words of the reply in the picture's place."""

    reader: PictureReader
    text_encoder: Qwen3ForCausalLM
    gallery: Gallery
    shown: Turns
    told: Turns

    def loss(self, rows: Tensor, is_blind: Tensor, is_alike: bool) -> Tensor:
        """Of the replies; if `is_alike`, also of how far a picture's states are from those that the reply's words have,
        at the layers that a transformer may read: in the turn's own tokens, and in its place."""
        seen = self.reader.look(self.gallery.pixels(rows % len(self.gallery)))
        sight = self.shown.sight(rows, is_blind)
        output = self.reader.read(seen, self.shown.ids[rows], sight, output_hidden_states=True)
        logits = self.reader.model.lm_head(output.last_hidden_state)
        replies = next_token_loss(logits, self.shown.targets[rows])
        if not is_alike:
            return replies
        with torch.no_grad():
            language_model = self.text_encoder.model
            words = language_model(input_ids=self.told.ids[rows], use_cache=False, output_hidden_states=True)
        found = self.shown.gathered(output.hidden_states[_READ], rows)
        wanted = self.told.gathered(words.hidden_states[_READ], rows)
        gathered = relative_distance(found, wanted, self.shown.kinds[rows])
        is_image, is_said = self.shown.ids[rows] == self.reader.pad, self.told.is_said(rows)
        likeness = [
            nearest_distance(image[is_image].unflatten(0, (len(rows), -1)).float(), word.float(), is_said)
            for image, word in zip(output.hidden_states[_READ], words.hidden_states[_READ], strict=True)
        ]
        return replies + _ALIKE * gathered + _WORDLIKE * torch.stack(likeness).mean()


@torch.no_grad()
def describe(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    gallery: Gallery,
    question: str,
    min_pixels: int,
    max_new_tokens: int = 40,
) -> list[str]:
    """What the vision-language model says about every picture, the likeliest word each time."""
    reader = PictureReader(model, tokenizer, visual_side(gallery.images.shape[-1], min_pixels))
    picture = VISION_START + IMAGE_PAD * reader.num_visual + VISION_END
    start = tokenizer(f"{USER}{picture}{question}{ASSISTANT}", return_tensors="pt").input_ids.to(gallery.device)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said: list[str] = []
    for rows in torch.arange(len(gallery), device=gallery.device).split(512):
        with equal_lengths_attention(model.model.visual):
            seen = reader.look(gallery.pixels(rows))
        ids = start.expand(len(rows), -1)
        for _ in range(max_new_tokens):
            following = reader.logits(seen, ids)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            if (ids[:, start.shape[1] :] == end).any(1).all():
                break
        for row in ids[:, start.shape[1] :].tolist():
            said.append(tokenizer.decode(row[: row.index(end)] if end in row else row))
    return said


@contextmanager
def equal_lengths_attention(visual: Any) -> Iterator[None]:
    """Attention over pictures of equal size as one batch, where transformers would call it once for each picture."""
    # Only names that contain flash are handed the lengths instead of being looped.
    AttentionInterface.register("ztrain_equal_lengths_flash", _attend_equal_lengths)
    before = visual.config._attn_implementation
    visual.config._attn_implementation = "ztrain_equal_lengths_flash"
    try:
        yield
    finally:
        visual.config._attn_implementation = before


def _attend_equal_lengths(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **settings: Any
) -> tuple[Tensor, None]:
    """(1, heads, total, d) as batches of cu_seq_lens_q's equal lengths; gives (1, total, heads, d)."""
    count = len(settings["cu_seq_lens_q"]) - 1
    heads, total, width = query.shape[1:]
    q, k, v = (x.view(heads, count, total // count, width).transpose(0, 1) for x in (query[0], key[0], value[0]))
    attended = F.scaled_dot_product_attention(q, k, v, scale=settings["scaling"])  # (count, heads, length, d)
    return attended.permute(0, 2, 1, 3).reshape(1, total, heads, width), None
