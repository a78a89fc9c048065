"""Where the transformer looks: what share of its attention each kind of token gets, by main layer and step.

In come a model, a batch and its prompts; out come, while the sampler draws, each token's mass: its mean attention over
queries, which sum to 1 over tokens. It is computed from the q and k of the blocks themselves, with their norms, rotary
factors and masks, in softmax's own form, because fused attention never writes its weights down. Diffusers' forward of
the blocks runs meanwhile, over the same weights as the fast one.

Legend: B batch, N tokens of the joined sequence (picture, SigLIP, caption, each with its pads), d a head's width.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ztrain.adapters.splice import compose
from ztrain.blocks import use_fast_blocks, use_stock_blocks
from ztrain.conditioning import IMAGE, TEXT, Encoded, TokenStates
from ztrain.dit import PATCH
from ztrain.layout import padded
from ztrain.model import AdaptedDiT

KINDS = ("picture", "prompt", "reference: text", "reference: image", "reference: SigLIP", "pads")
"""What a token is: a patch of the picture that is drawn; of the prompt's turn; of the reference's turn a text token, an
image token or marker; of its SigLIP grid; padding of any part."""
PICTURE, PROMPT, REFERENCE_TEXT, REFERENCE_IMAGE, SIGLIP, PAD = range(len(KINDS))
ABSENT = -1
SINK = 10.0
"""A sink gets more than so many times the mass of a token of uniform attention, 1 / N."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What stands where: `kinds` (B, N) int64, places in KINDS or ABSENT behind a sample's end; `names` B x N."""

    kinds: Tensor
    names: list[list[str]]

    @property
    def counts(self) -> Tensor:
        """Tokens of each sample, (B,)."""
        return (self.kinds != ABSENT).sum(1)


def tokens_of(model: AdaptedDiT, encoded: Encoded, prompts: Sequence[str], tokenizer: Any, side: int) -> Tokens:
    """The joined sequence of dit.py, token by token; `side`: of the square latents."""
    conditioning = model.conditioning(encoded)
    length = (side // PATCH) ** 2
    rows = []
    for place, prompt in enumerate(prompts):
        row = _part([(PICTURE, f"patch {number}") for number in range(length)], "picture")
        for grid in conditioning.siglip[place]:
            row += _part([(SIGLIP, f"SigLIP {number}") for number in range(grid.shape[0] * grid.shape[1])], "SigLIP")
        caption = _caption(model, encoded, place, _words(tokenizer, prompt), _words(tokenizer, ""))
        assert len(caption) == len(conditioning.caption[place]), "a token of the caption has no name"
        rows.append(row + _part(caption, "caption"))
    longest = max(map(len, rows))
    kinds = [[kind for kind, _ in row] + [ABSENT] * (longest - len(row)) for row in rows]
    names = [[name for _, name in row] + [""] * (longest - len(row)) for row in rows]
    return Tokens(torch.tensor(kinds), names)


def _part(tokens: list[tuple[int, str]], whose: str) -> list[tuple[int, str]]:
    """With its pads."""
    pads = padded(len(tokens)) - len(tokens)
    return tokens + [(PAD, f"{whose} pad {number}") for number in range(1, pads + 1)]


def _words(tokenizer: Any, prompt: str) -> list[str]:
    """The tokens of a prompt's chat turn, as encoders.py writes it; the turn's own count from its end."""
    message = [{"role": "user", "content": prompt}]
    turn = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return [tokenizer.decode([token]).replace("\n", "\\n") for token in tokenizer(turn).input_ids]


def _caption(
    model: AdaptedDiT, encoded: Encoded, place: int, prompt: list[str], empty: list[str]
) -> list[tuple[int, str]]:
    """Kind and name of one sample's caption tokens: the adapters' own composition of numbers in place of states."""
    told = [(PROMPT, f"prompt {word} {_where(number, prompt)}") for number, word in enumerate(prompt)]
    caption = torch.arange(len(told)).unsqueeze(1)  # (L, 1), places in `told`
    for adapter in model.adapters:
        states = encoded.reference[place]
        if not adapter.config.composes_reference or adapter.scale == 0 or states is None:
            continue
        assert adapter.config.states == "reference" and adapter.config.compose != "blend", "a token must stay one"
        # The image alone stands in the empty prompt's turn, so that its text tokens are those.
        words, images = iter(empty), 0
        first = len(told)
        for number, kind in enumerate(states.kinds.tolist()):
            if kind == TEXT:
                told.append((REFERENCE_TEXT, f"reference {next(words)} {_where(number, states.kinds.tolist())}"))
            else:
                images += kind == IMAGE
                told.append((REFERENCE_IMAGE, f"image {images}" if kind == IMAGE else "marker"))
        numbers = torch.arange(first, len(told)).unsqueeze(1)
        caption, _ = compose(adapter.config, caption, TokenStates(numbers, states.kinds), 1.0)
    return [told[number] for number in caption.squeeze(1).tolist()]


def _where(number: int, of: Sequence[object]) -> str:
    """First half from the front, second from the end: prompts differ in length."""
    return f"#{number + 1}" if number < len(of) / 2 else f"#{number - len(of)}"


# --- attention --------------------------------------------------------------------------------------------------------


def attention_weights(attention: Any, states: Tensor, mask: Tensor | None, freqs: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d) + mask) of one attention module of diffusers, (B, heads, N, N) float32.

    As ZSingleStreamAttnProcessor (transformer_z_image.py, diffusers 0.42.1) hands q and k to the fused kernel.
    states: (B, N, width); mask: bool (B, N), or a bias that broadcasts; freqs: (B or 1, N, d / 2) complex.
    """

    def turned(x: Tensor, norm: Any) -> Tensor:
        pairs = norm(x.unflatten(-1, (attention.heads, -1))).float().unflatten(-1, (-1, 2))
        return torch.view_as_real(torch.view_as_complex(pairs) * freqs.unsqueeze(2)).flatten(-2).transpose(1, 2)

    query, key = (
        turned(attention.to_q(states), attention.norm_q),
        turned(attention.to_k(states), attention.norm_k),
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        bias = mask[:, None, None, :] if mask.ndim == 2 else mask
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias.float()
    return scores.softmax(-1)


@dataclass(frozen=True, slots=True)
class Mass:
    """Of one layer at one sigma: the attention that each token gets, (B, heads, N), which sums to 1 over N; from the
    picture's tokens, and from all."""

    layer: int
    sigma: float
    from_picture: Tensor
    from_all: Tensor


class Watched:
    """A model for the sampler that also keeps masses, at those of its calls that are asked for."""

    def __init__(self, model: AdaptedDiT, tokens: Tokens, calls: Sequence[int]) -> None:
        self.model, self.tokens, self.calls = model, tokens, set(calls)
        self.masses: list[Mass] = []
        self._call = 0
        self._sigma = 1.0

    def __call__(self, noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]:
        self._sigma = float(sigma[0])
        if self._call in self.calls:
            with self._watching():
                velocities = self.model(noisy, sigma, encoded)
        else:
            velocities = self.model(noisy, sigma, encoded)
        self._call += 1
        return velocities

    def base_velocity(self, noisy: Sequence[Tensor], sigma: Tensor, encoded: Encoded) -> list[Tensor]:
        return self.model.base_velocity(noisy, sigma, encoded)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Hooks on the attention of every main block; removed again."""
        use_stock_blocks(self.model.dit)
        hooks = [
            block.attention.register_forward_hook(self._keep(layer), with_kwargs=True)
            for layer, block in enumerate(self.model.dit.layers, 1)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            use_fast_blocks(self.model.dit)

    def _keep(self, layer: int) -> Any:
        @torch.no_grad()
        def keep(attention: Any, arguments: tuple[Tensor, ...], options: dict[str, Any], _: Tensor) -> None:
            mask, freqs = options["attention_mask"], options["freqs_cis"]
            weights = attention_weights(attention, arguments[0], mask, freqs)  # (B, heads, N, N)
            kinds = self.tokens.kinds.to(weights.device)
            shares = [
                (weights * rows[:, None, :, None]).sum(2) / rows.sum(1)[:, None, None]
                for rows in ((kinds == PICTURE).float(), (kinds != ABSENT).float())
            ]
            self.masses.append(Mass(layer, self._sigma, shares[0].cpu(), shares[1].cpu()))

        return keep


def by_kind(mass: Tensor, tokens: Tokens) -> Tensor:
    """Masses of tokens (B, heads, N) as shares of kinds, (B, KINDS): mean over heads."""
    of_kind = torch.stack([tokens.kinds == kind for kind in range(len(KINDS))]).to(mass)  # (KINDS, B, N)
    return torch.einsum("bhn,kbn->bk", mass, of_kind) / mass.shape[1]


def times_uniform(mass: Tensor, tokens: Tokens) -> Tensor:
    """Each token's mass over that of uniform attention, (B, N): mean over heads; 1 everywhere where all are alike."""
    return mass.mean(1) * tokens.counts[:, None]
