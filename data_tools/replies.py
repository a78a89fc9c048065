"""What a model is asked about a picture, in the form that it was taught, and what counts as an answer.

In: a question's name or file, the folder of a model, and what the model said. Out: its processor and the whole prompt,
and a caption or the reason why there is none. Only what a model puts around an answer is taken off, by the rules below;
words of the answer are never changed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ztrain.errors import InputError

# The prompt of a triplet must not tell how the target is drawn, or nothing is left for the reference to tell; so the
# words for styles are named, which models otherwise begin with. Places and counts are asked for, since pictures with
# the same caption are to show the same. One sentence: longer replies list guesses.
CONTENT = (
    "Describe what this picture shows in one sentence of at most 40 words, as if telling somebody what to draw: the"
    " subjects, how many there are, what they do, where they are, and any text that can be read. Say nothing about how"
    " it is drawn: no medium, technique, style, mood, lighting or quality, and colours only where they belong to the"
    " thing itself. Name only what can be seen. Do not begin with 'the image' or 'a picture of'. Answer with the"
    " sentence alone."
)
# The counterpart: it is compared between pictures of different things, so that any word for a thing would mislead.
# The headings are those by which styles differ most often, named so that replies about two pictures can be compared.
STYLE = (
    "Describe how this picture is made in one sentence of at most 40 words, so that somebody could draw something else"
    " in the same way: the medium and technique, lines and outlines, colours, shading and light, texture, amount of"
    " detail, and the kind of background. Do not name or hint at what is shown: no subjects, objects, places or text."
    " Answer with the sentence alone."
)
TEMPLATES = {"content": CONTENT, "style": STYLE}


def read_template(given: str) -> tuple[str, str]:
    """Name and text of a question: one of TEMPLATES, or a text file. Raises InputError."""
    if given in TEMPLATES:
        return given, TEMPLATES[given]
    path = Path(given)
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"--template {given}: is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        known = " or ".join(TEMPLATES)
        raise InputError(
            f"--template {given}: cannot be read ({error.strerror}); give {known}, or a text file"
        ) from error
    if not text:
        raise InputError(f"--template {given}: is empty; write into it what the model is to be asked")
    return path.name, text


# --- asking ----------------------------------------------------------------------------------------------------------


def load_processor(folder: Path) -> Any:
    """What AutoProcessor would load, with Pillow's image processor and without the part for videos.

    That part wants torchvision, which nothing else here does; and Pillow's pixels are the same everywhere. Raises what
    transformers raises.
    """
    from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    config, named = AutoConfig.from_pretrained(folder), _named_class(folder)
    kind: Any = (named and processor_class_from_name(named)) or PROCESSOR_MAPPING.get(type(config), None)
    if kind is None:
        raise ValueError(f"transformers has no processor for {config.model_type}")

    class Stills(kind):
        """The same, content without a part for videos."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    loaders = {
        "image_processor": lambda: AutoImageProcessor.from_pretrained(folder, backend="pil"),
        "tokenizer": lambda: AutoTokenizer.from_pretrained(folder),
        "feature_extractor": lambda: AutoFeatureExtractor.from_pretrained(folder),  # of models that hear, too
        "video_processor": lambda: None,
    }
    wanted = kind.get_attributes()
    if unknown := [part for part in wanted if part not in loaders]:
        raise ValueError(f"its {kind.__name__} needs a {', '.join(unknown)} too")
    settings, rest = Stills.get_processor_dict(folder)
    return Stills.from_args_and_dict([loaders[part]() for part in wanted], settings, **rest)


def _named_class(folder: Path) -> str | None:
    """The processor that a repository names, which may be another than its model's usual one."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("processor_class")
            if named:
                return str(named)
    return None


def lay_out(processor: Any, question: str) -> str:
    """One user turn about one picture, by the repository's chat template; without one, the question alone.

    A template that knows no parts (text only), and no template, get the processor's own picture token right before the
    question. Raises InputError where the picture would have no place of its own.
    """
    token = getattr(processor, "image_token", None) or ""  # models of before chats place the picture by themselves
    prompt = plain = f"{token}{question}"
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):  # for tools and the like, by name
        template = template.get("default")
    if template:
        prompt = _render_parts(processor.tokenizer, template, question)
        if not prompt or token not in prompt:
            prompt = _render(processor.tokenizer, template, plain)
    if token and prompt.count(token) != 1:
        raise InputError(f"the question {question[:60]!r} holds the model's mark for a picture, {token}; remove it")
    return prompt


def _render_parts(tokenizer: Any, template: str, question: str) -> str:
    """The turn, or "" where the template does not take parts."""
    from jinja2 import TemplateError

    try:
        return _render(tokenizer, template, [{"type": "image"}, {"type": "text", "text": question}])
    except (TypeError, TemplateError):  # it adds the content to a text, or refuses parts in its own words
        return ""


def _render(tokenizer: Any, template: str, content: Any) -> str:
    # By the tokenizer: processors of models that see videos would look for their part for videos.
    turn = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(turn, chat_template=template, add_generation_prompt=True, tokenize=False))


# --- answers ---------------------------------------------------------------------------------------------------------


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
    elif not count:
        fault = "empty: no word in it"
    elif count > max_words:
        fault = f"too long: {count} words, more than max_words {max_words}"
    else:
        return text, None
    return None, fault


def _around(text: str, found: re.Match[str]) -> str:
    """Enough of the text to see what was found."""
    return repr(text[found.start() : found.start() + 60])
