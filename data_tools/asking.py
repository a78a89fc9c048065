"""How an image-text model is asked about pictures: the question, the form that the model was taught, what runs it.

In: a question's name or file, the folder of a model, and pictures. Out: what the model says of each, always its
likeliest words.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from data_tools.replies import Reply
from ztrain.errors import InputError
from ztrain.io.files import read_text

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
        text = read_text(path, "caption").strip()
    except OSError as error:
        known = " or ".join(TEMPLATES)
        raise InputError(
            f"--template {given}: cannot be read ({error.strerror}); give {known}, or a text file"
        ) from error
    if not text:
        raise InputError(f"--template {given}: is empty; write into it what the model is to be asked")
    return path.name, text


# --- the form that a model was taught ---------------------------------------------------------------------------------


def load_processor(folder: Path) -> Any:
    """What AutoProcessor would load, with Pillow's image processor and without the part for videos.

    That part wants torchvision, which nothing else here does; and Pillow's pixels are the same everywhere. Raises
    InputError.
    """
    from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    from ztrain.frozen.sources import check_settings, explained, pretrained, pretrained_tokenizer

    config, named = pretrained(AutoConfig, folder), _named_class(folder)
    kind: Any = (named and processor_class_from_name(named)) or PROCESSOR_MAPPING.get(type(config), None)
    if kind is None:
        raise InputError(f"{folder}: transformers has no processor for {config.model_type}; give another --model")

    class Stills(kind):
        """The same, content without a part for videos."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    loaders = {
        "image_processor": lambda: pretrained(AutoImageProcessor, folder, backend="pil"),
        "tokenizer": lambda: pretrained_tokenizer(folder),
        "feature_extractor": lambda: pretrained(AutoFeatureExtractor, folder),  # of models that hear, too
        "video_processor": lambda: None,
    }
    wanted = kind.get_attributes()
    if unknown := [part for part in wanted if part not in loaders]:
        raise InputError(f"{folder}: its {kind.__name__} needs a {', '.join(unknown)} too; give another --model")
    parts = [loaders[part]() for part in wanted]
    with explained(str(folder), check_settings(folder)):
        settings, rest = Stills.get_processor_dict(folder)
        return Stills.from_args_and_dict(parts, settings, **rest)


def _named_class(folder: Path) -> str | None:
    """The processor that a repository names, which may be another than its model's usual one."""
    from ztrain.frozen.sources import read_json

    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (named := read_json(folder / name).get("processor_class")):
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


# --- what runs it -----------------------------------------------------------------------------------------------------


class Model(Protocol):
    """Answers one question about pictures."""

    def ask(self, images: Sequence[Image.Image]) -> list[Reply]:
        """One reply for each picture, by greedy choice of every token."""


class TransformersModel:
    """By transformers, in one padded batch."""

    @staticmethod
    def check(location: Path, name: str) -> None:
        """Raises InputError where it cannot be one, before anything large is read."""
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        from ztrain.frozen.sources import check_weights, pretrained

        config = pretrained(AutoConfig, location)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise InputError(
                f"{name}: a {config.model_type} model does not answer questions about pictures; give another --model"
            )
        check_weights(location)

    def __init__(self, location: Path, name: str, question: str, *, precision: str, max_new_tokens: int) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, GenerationConfig

        from ztrain.frozen.encoders import quiet_loading  # here, as below: other steps need not wait for torch
        from ztrain.frozen.sources import pretrained_model, require_loaded

        device = "cuda" if torch.cuda.is_available() else "cpu"
        with quiet_loading():
            self.processor = load_processor(location)
            model, info = pretrained_model(AutoModelForImageTextToText, location, dtype=getattr(torch, precision))
        require_loaded({"missing_keys": info["missing_keys"]}, name)
        self.model = model.to(device).eval().requires_grad_(False)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # so that all replies begin at the same place
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # masked, so any token will do
        own = model.generation_config
        ends = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else list(ends)
        # Of the repository's settings only the ids: sampling and penalties would change what is said.
        self.model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=self.ends,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=own.bos_token_id,
            decoder_start_token_id=own.decoder_start_token_id,
        )  # fmt: skip
        self.prompt = lay_out(self.processor, question)

    def ask(self, images: Sequence[Image.Image]) -> list[Reply]:
        import torch

        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=[self.prompt] * len(images),
            images=[[image] for image in images],  # of each prompt: the one form that all processors read
            padding=True,
            add_special_tokens=not (bos and self.prompt.startswith(bos)),
            return_tensors="pt",
        ).to(self.model.device, dtype=self.model.dtype)
        with torch.no_grad():
            ids = self.model.generate(**inputs)  # (B, L)
        said = ids if self.model.config.is_encoder_decoder else ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
        ended = torch.isin(said, torch.tensor(self.ends, device=said.device)).any(1).tolist()
        return [Reply(*each) for each in zip(texts, ended, strict=True)]


class VllmModel:
    """By vLLM, which schedules on its own and is many times faster on a GPU.

    Written from vLLM's published interface and never run by us: it wants a GPU. It makes its own batches, so that
    another run may round, and say, something else.
    """

    @staticmethod
    def check(location: Path, name: str) -> None:
        """Raises InputError where vLLM is not installed, or files are damaged; what it can load it says itself."""
        from ztrain.frozen.sources import check_settings, check_weights

        if importlib.util.find_spec("vllm") is None:
            raise InputError("--backend vllm: vLLM is not installed; pip install 'ztrain[vllm]'")
        check_settings(location)
        check_weights(location)

    def __init__(self, location: Path, name: str, question: str, *, precision: str, max_new_tokens: int) -> None:
        from vllm import LLM, SamplingParams

        self.model = LLM(
            model=str(location),
            dtype=precision,
            seed=0,
            limit_mm_per_prompt={"image": 1},
            trust_remote_code=False,
            load_format="safetensors",
        )
        self.sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        self.question = question

    def ask(self, images: Sequence[Image.Image]) -> list[Reply]:
        turns = [[{"role": "user", "content": [{"type": "image_pil", "image_pil": image},
                                               {"type": "text", "text": self.question}]}]
                 for image in images]  # fmt: skip
        found = [output.outputs[0] for output in self.model.chat(turns, self.sampling, use_tqdm=False)]
        return [Reply(each.text, each.finish_reason == "stop") for each in found]


MODELS: Mapping[str, type[TransformersModel] | type[VllmModel]] = {
    "transformers": TransformersModel,
    "vllm": VllmModel,
}
