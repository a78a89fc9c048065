"""What counts as an answer about a picture: a caption, or the reason why there is none.

In: what a model said. Out: its caption or its fault. Only what a model puts around an answer is taken off, by the rules
below; words of the answer are never changed.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said."""

    text: str
    is_whole: bool
    """Whether it ended by itself, before it was cut off."""


_PICTURE = r"(?:image|picture|photo|photograph|drawing|illustration|painting|artwork|scene)"
_PREAMBLES = re.compile(
    "|".join(
        (
            r"(?s:.*?)</think>",  # what reasoning models think aloud
            r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok)\s*[!,.](?!\S)",
            r"here(?:'s|’s| is| are)\b[^:\n]{0,80}:",
            r"\**(?:caption|description|prompt|answer|response|assistant)\s*:\**",
            rf"th(?:e|is) {_PICTURE} (?:shows|depicts|features|displays|contains|portrays|presents|captures"
            r"|illustrates)\b",
            rf"in th(?:e|is) {_PICTURE},? (?:there (?:is|are)|(?:we|you|one) (?:can )?sees?)\b",
        )
    ),
    re.IGNORECASE,
)
_QUOTES = (('"', '"'), ("“", "”"), ("'", "'"))

# Captions quote what is written in a picture: that is not the model speaking.
_QUOTED = re.compile(r'"[^"]*"|“[^”]*”')
_REFUSALS = re.compile(
    r"\bas an? (?:\w+ )?(?:ai|artificial intelligence|language model|assistant)\b"
    r"|\bI(?:['’]m| am) (?:\w+ )?(?:sorry|unable|not able|afraid)\b"
    r"|^(?:sorry|apologies|unfortunately)\b[^.]*\b(?:I|we)\b"
    r"|\bI apologi[sz]e\b"
    r"|\bI (?:cannot|can['’]t|can not|could ?n['’o]t|won['’]t|will not|do not|don['’]t)"
    r" (?:\w+ )?(?:help|assist|see|view|describe|identify|provide|access|process|determine|recogni[sz]e|fulfil|comply"
    r"|discuss|open|display|have|feel comfortable)",
    re.IGNORECASE,
)
_TALK = re.compile(
    r"\b(?:let me know|feel free to|would you like me|I hope this helps|is there anything else|please (?:provide|upload"
    r"|share) (?:the|an|a|your) )",
    re.IGNORECASE,
)
# Scripts without spaces: every character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_LONGEST_PHRASE = 16  # words that are looked for in a row
_IN_A_ROW = (4, 3)  # times that one word, and several, may not stand one after the other
_SPREAD = (5, 4)  # words of a phrase that may not stand so many times anywhere


def strip_preamble(text: str) -> str:
    """The answer alone: white space made one space, then whatever _PREAMBLES and quotation marks around all of it, as
    often as there are any. Doing it again changes nothing."""
    text = " ".join(text.split())
    while True:
        rest = text
        if found := _PREAMBLES.match(rest):
            rest = rest[found.end() :].strip()
        for start, end in _QUOTES:
            inside = rest[1:-1]
            if len(rest) > 1 and rest[0] == start and rest[-1] == end and start not in inside and end not in inside:
                rest = inside.strip()
        if rest == text:
            return text
        text = rest


def words_of(text: str) -> list[str]:
    """Its words in small letters; of Chinese and Japanese its characters."""
    return _WORD.findall(text.casefold())


def find_repetition(text: str) -> str:
    """A phrase that is said again and again, or "".

    That is one word 4 times in a row, 2 to 16 words 3 times in a row, or 5 words that stand 4 times anywhere.
    """
    words = words_of(text)
    for length in range(1, _LONGEST_PHRASE + 1):
        times = _IN_A_ROW[length > 1]
        same = 0  # words in a row that are equal to the one a phrase before
        for i in range(length, len(words)):
            same = same + 1 if words[i] == words[i - length] else 0
            if same == length * (times - 1):
                return f"{' '.join(words[i - length + 1 : i + 1])!r} {times} times in a row"
    length, times = _SPREAD
    counts: dict[tuple[str, ...], int] = {}
    for i in range(len(words) - length + 1):
        phrase = tuple(words[i : i + length])
        counts[phrase] = counts.get(phrase, 0) + 1
        if counts[phrase] == times:
            return f"{' '.join(phrase)!r} {times} times"
    return ""


def judge(reply: Reply, max_words: int) -> tuple[str | None, str | None]:
    """The caption, and why there is none: one of the two is None. A reason begins with its kind and a colon."""
    text = strip_preamble(reply.text)
    spoken = _QUOTED.sub("", text)
    count = len(words_of(text))
    if found := _REFUSALS.search(spoken):
        fault = f"refusal: {_around(spoken, found)}"
    elif found := _TALK.search(spoken):
        fault = f"chatter: {_around(spoken, found)}"
    elif phrase := find_repetition(text):
        fault = f"repetition: {phrase}"
    elif not reply.is_whole:
        fault = f"unfinished: it has not ended within max_new_tokens: ...{text[-40:]}"
    elif not count or "\0" in text:
        fault = f"empty: {'it holds NULs' if count else 'no word in it'}"
    elif count > max_words:
        fault = f"too long: {count} words, more than max_words {max_words}"
    else:
        return text, None
    return None, fault


def _around(text: str, found: re.Match[str]) -> str:
    """Enough of the text to see what was found."""
    return repr(text[found.start() : found.start() + 60])
