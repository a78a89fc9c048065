"""Turns of a user and an assistant about captions and pictures, as tokens: what the language models are trained on.

A turn's own tokens, those that every turn has around what the user says, are where a prompt is gathered, be it words
or a picture: half of the replies see only them.

Legend: B rows, L tokens, N turns, D text width.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from miniature.gallery import Gallery
from ztrain.frozen.vision_language import IMAGE_PAD, VISION_END, VISION_START

ANY, CONTENT, DETAIL = "", "what is drawn?", "describe it in detail"
"""What a user asks about a caption or a picture: nothing, for the content alone, for content and style."""

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
IGNORED = -100
_FRAMED = 0.5  # share of the turns whose words stand between the tokens that stand around a picture
TURN_KINDS = 4  # of questions about a picture
_SMALL = 20_000  # pictures; more than these teach every kind of turn with one each


@dataclass(frozen=True, slots=True)
class Turns:
    """Tokenised turns: `ids` and `targets` (N, L) int64; a target of -100 asks for nothing. `reply`: (N,) where each
    reply begins; `around`: the turn's own tokens before and after what the user says; `kinds`: (N,) int64 numbers of
    what the turns ask, alike where it is the same."""

    ids: Tensor
    targets: Tensor
    reply: Tensor
    around: tuple[int, int]
    kinds: Tensor

    def sight(self, rows: Tensor, is_blind: Tensor) -> Tensor:
        """Who sees whom in these rows, (B, 1, L, L) bool: everyone who comes before; replies of `is_blind` (B,) rows
        see nothing of what the user says, only what the tokens between have gathered of it.

        So a prompt is gathered in tokens that every turn has (gist tokens, arXiv 2304.08467), be it words or a picture.
        """
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        is_reply = place >= self.reply[rows, None]  # (B, L)
        hidden = is_reply[:, :, None] & self.is_said(rows)[:, None, :] & is_blind[:, None, None]
        return ((place[:, None] >= place) & ~hidden).unsqueeze(1)

    def is_said(self, rows: Tensor) -> Tensor:
        """Which tokens of these rows are what the user says, (B, L) bool."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (place >= self.around[0]) & (place < self.reply[rows, None] - self.around[1])

    def gathered(self, states: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Of each layer's states (B, L, D) those of the tokens before the reply, (layers, B, tokens, D)."""
        places = self.reply[rows, None] + torch.arange(-self.around[1], 0, device=rows.device)  # (B, tokens)
        samples = torch.arange(len(rows), device=rows.device)[:, None]
        return torch.stack([layer.float()[samples, places] for layer in states])


def turn_tokens(tokenizer: Qwen2Tokenizer) -> tuple[int, int]:
    """How many tokens of every turn stand before and after what the user says: 3 and 5 where roles are tokens."""
    before, after = tokenizer([USER, ASSISTANT]).input_ids
    return len(before), len(after)


def tokenize(
    tokenizer: Qwen2Tokenizer,
    users: Sequence[str],
    replies: Sequence[str],
    *,
    learn_user: bool,
    device: torch.device,
    questions: Sequence[str] | None = None,
) -> Turns:
    """One row a turn; the loss is on the reply, and on the user's words too if `learn_user`.

    `questions`: what each turn asks, None = all the same.
    """
    starts = [f"{USER}{user}{ASSISTANT}" for user in users]
    whole = tokenizer([start + reply + END for start, reply in zip(starts, replies, strict=True)]).input_ids
    length = max(len(row) for row in whole)
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = torch.full((len(whole), length), pad, dtype=torch.int64)
    targets = torch.full((len(whole), length), IGNORED, dtype=torch.int64)
    replies_at = [len(row) for row in tokenizer(starts).input_ids]
    skipped = [1] * len(whole) if learn_user else replies_at
    for index, (row, skip) in enumerate(zip(whole, skipped, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        targets[index, skip : len(row)] = torch.tensor(row[skip:])
    asked = questions or [ANY] * len(whole)
    numbers = {question: number for number, question in enumerate(sorted(set(asked)))}
    return Turns(
        ids.to(device),
        targets.to(device),
        torch.tensor(replies_at, device=device),
        turn_tokens(tokenizer),
        torch.tensor([numbers[question] for question in asked], device=device),
    )


def text_turns(gallery: Gallery, tokenizer: Qwen2Tokenizer, seed: int) -> Turns:
    """Turns about captions: said again, in full or as content; one in sixteen starts from nothing.

    The user says the clauses in any order, and in half of the turns where a picture would be: what the turn gathers of
    a word must not depend on where it stood, or no picture could imitate it.
    """
    chance = random.Random(seed)
    users, replies = [], []
    for index, (plain, clauses) in enumerate(zip(gallery.captions, gallery.clauses, strict=True)):
        detailed, shuffled = " ".join(clauses), " ".join(chance.sample(clauses, len(clauses)))
        match index % 8:
            case 0 | 1:
                said, question, reply = plain, ANY, plain
            case 2 | 3:
                said, question, reply = shuffled, ANY, detailed
            case 4:
                said, question, reply = shuffled, CONTENT, plain
            case 5:
                said, question, reply = plain, CONTENT, plain
            case 6:
                said, question, reply = shuffled, DETAIL, detailed
            case _:
                said, question, reply = ("", ANY, detailed) if index % 16 == 7 else (plain, DETAIL, plain)
        is_framed = said and chance.random() < _FRAMED
        users.append(f"{VISION_START}{said}{VISION_END}{question}" if is_framed else f"{said} {question}".strip())
        replies.append(reply)
    return tokenize(tokenizer, users, replies, learn_user=True, device=gallery.device)


def picture_turns(gallery: Gallery, tokenizer: Qwen2Tokenizer, num_visual: int) -> tuple[Turns, Turns]:
    """Turns about pictures: asked for nothing, for content, for all; half of the replies name the style.

    Replies are complete and always in the same words: of what varies a picture could only show the mean. Beside them
    the same turns with the reply's words in the picture's place. Small galleries get every kind of turn about every
    picture: turn number n is about picture n modulo N.
    """
    picture = VISION_START + IMAGE_PAD * num_visual + VISION_END
    shown, told, replies, questions = [], [], [], []
    for variant in range(TURN_KINDS if len(gallery) < _SMALL else 1):
        for index, (plain, detailed) in enumerate(gallery.replies):
            question, reply = ((ANY, detailed), (CONTENT, plain), (DETAIL, detailed), (CONTENT, plain))[
                (index + variant) % TURN_KINDS
            ]
            shown.append(picture + question)
            told.append(f"{reply} {question}".strip())
            replies.append(reply)
            questions.append(question)
    settings = {"learn_user": False, "device": gallery.device, "questions": questions}
    return (
        tokenize(tokenizer, shown, replies, **settings),
        tokenize(tokenizer, told, [""] * len(told), **settings),
    )
