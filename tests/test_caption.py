"""data_tools.caption: what the miniature says of painted pictures, whose captions stay, what counts as a fault."""

import csv
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from data_tools import caption, dedup, replies, scan
from data_tools.asking import TransformersModel, lay_out, load_processor
from data_tools.replies import Reply, judge
from data_tools.stages import Table
from miniature.painter import PaintedWorld
from miniature.turns import CONTENT, DETAIL
from miniature.world import COUNT_NAMES, KIND_NAMES, PLACE_NAMES, name_content
from tests.forge import the_forge

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"
WEIGHTS = ROOT / "miniature/weights"
MODEL = WEIGHTS / "Qwen3-VL-4B-Instruct"
COUNT = 208


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """A folder of painted pictures, and of each the kind of object and the whole caption."""
    folder = tmp_path_factory.mktemp("painted")
    gallery = PaintedWorld().gallery("held", COUNT, 1, "cpu")
    for i, pixels in enumerate(gallery.images):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return folder, [KIND_NAMES[i] for i in gallery.labels["kind"].tolist()], [plain for plain, _ in gallery.replies]


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the miniature was taught to be asked, as a user's own template."""
    path = tmp_path_factory.mktemp("question") / "drawn.txt"
    path.write_text(f"\ufeff{CONTENT}\n", encoding="utf-8")
    return path


def some(pictures: Path, folder: Path, count: int) -> Path:
    """The first so many pictures in a folder of their own."""
    folder.mkdir(parents=True)
    for path in sorted(pictures.glob("*.png"))[:count]:
        shutil.copyfile(path, folder / path.name)
    return folder


def look(folder: Path, out: Path, *words: object) -> None:
    assert scan.main([str(w) for w in ("--sources", folder, "--out", out, "--workers", 1, *words)]) == 0


def words_for(table: Path, out: Path, template: object, *more: object) -> list[str]:
    fixed = ("--table", table, "--out", out, "--model", MODEL, "--template", template, "--precision", "float32")
    return [str(word) for word in (*fixed, *more)]


def rows_of(folder: Path, *names: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = Table.open(folder).read(names or None).to_pylist()
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- with a model -----------------------------------------------------------------------------------------------------


def test_the_miniature_names_what_is_drawn(
    pictures: tuple[Path, list[str], list[str]], question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, kinds, whole = pictures
    look(folder, tmp_path / "scan")
    assert caption.main(words_for(tmp_path / "scan", tmp_path / "out", question, "--batch-size", 52)) == 0
    rows = rows_of(tmp_path / "out")
    assert [row["name"] for row in rows] == [f"{i:03}.png" for i in range(COUNT)]
    right = [re.search(rf"\b{kind}(?:e?s)?\b", row["caption"] or "") for kind, row in zip(kinds, rows, strict=True)]
    share = sum(map(bool, right)) / COUNT
    exact = sum(row["caption"] == text for row, text in zip(rows, whole, strict=True)) / COUNT
    with capsys.disabled():
        print(f"\n{COUNT} painted pictures: the kind is right in {share:.1%} of the captions, all of it in {exact:.1%}")
    assert share >= 0.85 and exact >= 0.85
    assert {row["caption_fault"] for row in rows} == {None}
    [author] = {row["caption_from"] for row in rows}
    assert re.fullmatch(r"Qwen3-VL-4B-Instruct@[0-9a-f]{12}, template drawn.txt [0-9a-f]{8}", author)
    assert f"{COUNT} captioned, 0 kept, 0 left out, 0 at fault" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "out/table.json").read_text() and str(ROOT) not in author


@pytest.fixture(scope="module")
def mixed(pictures: tuple[Path, list[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of six pictures: 0 has a sidecar, 1 is broken, 5 is a copy of 4."""
    work = tmp_path_factory.mktemp("mixed")
    folder = some(pictures[0], work / "in", 5)
    (folder / "000.txt").write_text("my own words", encoding="utf-8")
    (folder / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n, or what is left of it")
    shutil.copyfile(folder / "004.png", folder / "005.png")
    look(folder, work / "scan", "--max-refused-share", 1)
    assert dedup.main([str(w) for w in ("--table", work / "scan", "--out", work / "dedup")]) == 0
    assert [row["name"] for row in rows_of(work / "dedup") if row["copy_of"]] == ["005.png"]
    return work / "dedup"


def test_captions_that_are_there_stay(
    mixed: Path, pictures: tuple[Path, list[str], list[str]], question: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, _, drawn = pictures
    assert caption.main(words_for(mixed, tmp_path / "out", question)) == 0
    rows = rows_of(tmp_path / "out")
    said = [row["caption"] for row in rows]
    assert said == ["my own words", None, drawn[2], drawn[3], drawn[4], None]
    assert rows[0]["caption_from"] == "sidecar .txt" and rows[1]["caption_from"] is rows[5]["caption_from"] is None
    assert "3 captioned, 1 kept, 2 left out, 0 at fault" in capsys.readouterr().out

    detail = tmp_path / "detail"
    detail.write_text(DETAIL)
    words = words_for(tmp_path / "out", tmp_path / "styled", detail, "--column", "style")
    assert caption.main(words) == 0
    rows = rows_of(tmp_path / "styled")
    assert [row["caption"] for row in rows] == said, "another column takes nothing from the first"
    assert [row["style"] is None for row in rows] == [False, True, False, False, False, True]
    assert all("background" in row["style"] for row in rows if row["style"])
    assert set(Table.open(tmp_path / "styled").facts["captions"]) == {"caption", "style"}

    assert caption.main(words_for(tmp_path / "styled", tmp_path / "again", question, "--replace")) == 0
    rows = rows_of(tmp_path / "again")
    assert [row["caption"] for row in rows] == [drawn[0], None, *drawn[2:5], None]
    assert "template" in rows[0]["caption_from"]


def test_faults_are_named_counted_and_stop_the_run(
    mixed: Path, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for(mixed, tmp_path / "out", question, "--max-new-tokens", 2)
    assert caption.main(words) == 2
    complaint = capsys.readouterr().err
    assert "3 of 3 replies are at fault, more than max_fault_share 0.05" in complaint and "002.png: unf" in complaint
    assert caption.main([*words, "--max-fault-share", "1"]) == 0
    assert "0 captioned, 1 kept, 2 left out, 3 at fault: 3 unfinished" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    assert [row["caption"] for row in rows] == ["my own words", *[None] * 5]
    assert [row["caption_from"] for row in rows] == ["sidecar .txt", *[None] * 5]
    assert [bool(row["caption_fault"]) for row in rows] == [False, False, True, True, True, False]
    words = words_for(mixed, tmp_path / "short", question, "--max-words", 3, "--max-fault-share", 1)
    assert caption.main(words) == 0
    assert "3 too long" in capsys.readouterr().out
    # What was at fault is asked about again by the next stage, with other limits.
    assert caption.main(words_for(tmp_path / "short", tmp_path / "mended", question)) == 0
    assert "3 captioned, 1 kept, 2 left out, 0 at fault" in capsys.readouterr().out


@pytest.mark.usefixtures("forge")
def test_killed_and_gone_on_with_it_gives_the_same_bytes(
    pictures: tuple[Path, list[str], list[str]], question: Path, tmp_path: Path
) -> None:
    look(some(pictures[0], tmp_path / "in", 9), tmp_path / "scan", "--rows-per-shard", 1)
    out = tmp_path / "killed"
    assert caption.main(words_for(tmp_path / "scan", tmp_path / "whole", question)) == 0
    words = words_for(tmp_path / "scan", out, question)
    process = the_forge().start(["data_tools.caption", *words], dict(os.environ), tmp_path / "said", tmp_path / "err")
    while not list(out.glob("*.parquet")):
        assert process.poll() is None, "it ended before it could be killed: " + (tmp_path / "err").read_text()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = list(out.glob("*.parquet"))
    assert len(made) < 9 and not (out / "table.json").exists()
    written = {path: path.stat().st_mtime_ns for path in made}
    assert caption.main(words) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert written == {path: path.stat().st_mtime_ns for path in made}, "what was finished was made again"
    other = tmp_path / "other"
    other.write_text(f"{CONTENT} ")
    assert caption.main(words_for(tmp_path / "scan", out, other)) == 0, "the same words under another name"
    assert not set(contents(out)) & {path.name for path in made}, "the question's name is in every row"


def test_a_stage_travels_without_its_model(mixed: Path) -> None:
    source = Table.open(mixed)
    rules = caption.CaptionRules(model="m", weights="w", template="t", question=CONTENT, precision="float32")
    stage = caption.Caption(rules, MODEL, source.roots, 2)
    rows = source.read().to_pylist()
    said = stage(rows)
    assert stage._loaded is not None
    assert len(packed := pickle.dumps(stage)) < 10_000 and pickle.loads(packed)(rows) == said


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("nowhere/at/all", "nowhere/at/all is no folder"),
        (WEIGHTS, "is not an image-text model: config.json is missing"),
        (WEIGHTS / "Z-Image/text_encoder", "a qwen3 model does not answer questions about pictures"),
        (WEIGHTS / "siglip2-so400m-patch16-naflex", "a siglip2 model does not answer"),
    ],
)
def test_a_wrong_model_is_one_sentence(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: object, complaint: str
) -> None:
    words = ["--table", str(mixed), "--out", str(tmp_path / "out"), "--model", str(model)]
    assert caption.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and complaint in error and error.count("\n") == 1


def test_a_damaged_model_is_one_sentence(
    mixed: Path, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(MODEL, broken)
    (broken / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:100_000])
    words = [*words_for(mixed, tmp_path / "out", question), "--model", str(broken)]
    assert caption.main(words) == 2
    assert "broken/model.safetensors: is cut off: 100,000 bytes are there, its header" in capsys.readouterr().err


def test_wrong_words_are_one_sentence(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes("drôle".encode("latin-1"))
    (tmp_path / "marked").write_text("<|image_pad|> what?")
    for more, complaint in (
        (["--template", "contents"], "give content or style, or a text file"),
        (["--template", str(tmp_path / "empty")], "is empty"),
        (["--template", str(tmp_path / "latin")], "is not UTF-8"),
        (["--template", str(tmp_path / "marked")], "the model's mark for a picture, <|image_pad|>; remove it"),
        (["--column", "name"], "has one of that name without captions"),
        (["--table", str(tmp_path)], "holds no finished table"),
    ):
        words = words_for(mixed, tmp_path / "out", "content")
        assert caption.main([*words, *more]) == 2, more
        assert complaint in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_its_extra_is_named(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert caption.main(words_for(mixed, tmp_path / "out", "content", "--backend", "vllm")) == 2
    assert "pip install 'ztrain[vllm]'" in capsys.readouterr().err


# --- other families, with random weights ------------------------------------------------------------------------------

PARTS = (
    "{% for turn in messages %}{{ turn.role }}: {% for part in turn.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
    "{{ '\nassistant: ' if add_generation_prompt }}"
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer_with(*tokens: str, template: str | None = None) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return tokenizer


def save_lively(model: Any, out: Path) -> None:
    """With larger weights: fresh ones say the same of every picture."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    model.save_pretrained(out)


def make_llava(out: Path) -> None:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = tokenizer_with("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=28, patch_size=14),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **SMALL),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save_lively(LlavaForConditionalGeneration(config), out)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, **settings, chat_template=PARTS).save_pretrained(out)


def make_idefics3(out: Path) -> None:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil

    marks = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    tokenizer = tokenizer_with(*marks, template=PARTS)
    config = Idefics3Config(
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        text_config={**SMALL, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    save_lively(Idefics3ForConditionalGeneration(config), out)
    tokenizer.save_pretrained(out)
    Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}).save_pretrained(out)
    named = {"processor_class": "Idefics3Processor", "image_seq_len": 4}
    (out / "processor_config.json").write_text(json.dumps(named))


def make_paligemma(out: Path) -> None:
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessorPil,
    )

    tokenizer = tokenizer_with("<image>")
    tokenizer.bos_token = "<|im_start|>"
    vision = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False}
    config = PaliGemmaConfig(
        vision_config={**SMALL, **vision},
        text_config={
            **SMALL,
            "model_type": "gemma",
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )
    save_lively(PaliGemmaForConditionalGeneration(config), out)
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    PaliGemmaProcessor(images, tokenizer).save_pretrained(out)


@pytest.mark.parametrize(
    ("make", "prompt"),
    [
        (make_llava, "user: <image>what?\nassistant: "),
        (make_idefics3, "user: <image>what?\nassistant: "),
        (make_paligemma, "<image>what?"),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of PaliGemma's processor
def test_other_families_answer_in_batches_as_alone(tmp_path: Path, make: Callable[[Path], None], prompt: str) -> None:
    torch.manual_seed(0)
    make(tmp_path / "model")
    model = TransformersModel(tmp_path / "model", "m", "what?", precision="float32", max_new_tokens=6)
    assert model.prompt == prompt and model.model.dtype == torch.float32
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    images = [noise, Image.new("RGB", (40, 80), "red"), noise.rotate(90, expand=True)]
    together = model.ask(images)
    assert together == [model.ask([image])[0] for image in images]
    assert together[0] != together[1] and not together[0].is_whole, "it looks at the picture"


def test_a_picture_has_its_place_in_every_kind_of_template() -> None:
    processor = load_processor(MODEL)
    plain = f"<|im_start|>user\n<|image_pad|>{CONTENT}<|im_end|>\n<|im_start|>assistant\n"
    assert lay_out(processor, CONTENT) == plain, "text only: the token stands before the question"
    processor.chat_template = processor.tokenizer.chat_template.replace("+ message.content +", "~ message.content ~")
    assert lay_out(processor, CONTENT) == plain, "parts are written out like any object"
    processor.chat_template = "{% if messages[0].content is not string %}{{ raise_exception('text!') }}{% endif %}" + (
        processor.tokenizer.chat_template
    )
    assert lay_out(processor, CONTENT) == plain, "parts are refused"
    own = PARTS.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    processor.chat_template = {"default": own, "tools": "no"}
    assert lay_out(processor, CONTENT) == (
        f"user: <|vision_start|><|image_pad|><|vision_end|>{CONTENT}\nassistant: "
    ), "the template's own marks"


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1024, 10**6))
@example(1, 1027, 1024)
@example(1500, 1, 1024)
def test_large_pictures_are_shrunk(width: int, height: int, limit: int) -> None:
    image = Image.new("1", (width, height))
    small = caption.shrink(image, limit)
    assert small is image if width * height <= limit else small.width * small.height <= limit
    if min(small.size) > 20:
        assert small.width / small.height == pytest.approx(width / height, rel=0.1)
        assert small is image or small.width * small.height > 0.85 * limit


# --- replies ----------------------------------------------------------------------------------------------------------


def ordinary() -> list[str]:
    """Captions that people have written, and some that look like faults."""
    found = [
        'a sign that says "I can\'t help you" and "Sorry, we are closed"',
        "OK hand", "a sure-footed goat", "okay", "here comes the sun", "a man is sorry for his dog",
        "the image on a stamp", "a scene from above, with a picture of a boat on the wall", "very, very big waves",
        "a cat, a dog, a cat and a dog", "an AI robot and an assistant", "a person looks at the drawing: a cat",
        "two cats on the left of a chair, two dogs on the left of a table, a bird on the left of a tree", "山の上の家",
    ]  # fmt: skip
    for name, column in (("photos/captions.csv", "caption"), ("emoji_styles/contents.csv", "prompt")):
        if (path := SHARED / name).is_file():
            found += [row[column] for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())]
    numbers = [
        (k, c, p) for k in range(len(KIND_NAMES)) for c in range(len(COUNT_NAMES)) for p in range(len(PLACE_NAMES))
    ]
    return found + [name_content(*each, phrasing=said) for each in numbers for said in range(4)]


ORDINARY = ordinary()
captions = st.sampled_from(ORDINARY)
PREAMBLES = (
    "Sure! ", "Certainly! Here is a description of the image: ", "Here's the caption:\n\n", "**Caption:** ",
    "The image shows ", "This photograph depicts ", "In this picture, we can see ", "In the image there is ",
    "Okay, here is what I see: ", "<think>A cat? No.\nA dog.</think>\n", "Of course. The drawing illustrates ",
)  # fmt: skip
REFUSALS = (
    "I'm sorry, but I can't help with that.", "I’m sorry, I can’t assist with identifying people.",
    "As an AI language model, I do not look at pictures.", "Sorry, I can't describe this.", "I am unable to see it.",
    "I apologize, there is nothing here.", "Unfortunately, I was given no picture.", "I cannot determine the content.",
    "As an assistant I see nothing.", "I don't have the ability to view images.",
)  # fmt: skip


@pytest.mark.parametrize("text", ["a\0b", "\u200b\ufeff", "\0"])
def test_a_reply_that_is_no_text_is_empty(text: str) -> None:
    caption, fault = judge(Reply(text, is_whole=True), 80)
    assert caption is None and fault is not None and fault.startswith("empty: ")


@pytest.mark.parametrize("text", [pytest.param(ORDINARY, id=f"{len(ORDINARY)} captions")])
def test_ordinary_captions_pass_untouched(text: list[str]) -> None:
    assert {each: judged for each in text if (judged := judge(Reply(each, True), 80)) != (each, None)} == {}


@given(captions, st.lists(st.sampled_from(PREAMBLES), max_size=3), st.sampled_from(["", '"', "'"]))
def test_preambles_are_taken_off(text: str, before: list[str], quote: str) -> None:
    quote = "" if quote and quote in text else quote
    assert judge(Reply(f"{''.join(before)}{quote}{text}{quote}\n", True), 80) == (text, None)


@given(captions, st.sampled_from(PREAMBLES[:4] + ("", "")), st.sampled_from(REFUSALS), st.booleans())
def test_refusals_are_found(text: str, before: str, refusal: str, is_first: bool) -> None:
    spoken = f"{refusal} {text}" if is_first or refusal.startswith(("Sorry", "Unf")) else f"{text}. {refusal}"
    found, fault = judge(Reply(before + spoken, True), 80)
    assert found is None and fault is not None and fault.startswith("refusal: ")


@given(captions, st.lists(st.sampled_from(["red", "a", "cat", "on", "the"]), min_size=1, max_size=16), st.booleans())
def test_repetition_is_found(text: str, phrase: list[str], is_whole: bool) -> None:
    said = " ".join([text, *phrase * 4])
    found, fault = judge(Reply(said, is_whole), 1000)
    assert found is None and fault is not None and fault.startswith("repetition: ")


def repeats(words: list[str]) -> bool:
    """The definition, word for word."""
    for length in range(1, 17):
        times = 4 if length == 1 else 3
        if any(words[i : i + length] * times == words[i : i + length * times] for i in range(len(words) - length + 1)):
            return True
    five = [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
    return any(five.count(each) >= 4 for each in five)


phrases = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=18)


@given(phrases, phrases, phrases, st.lists(st.integers(0, 2), max_size=9))
@example(list("abcdefghijklmnop"), [], [], [0, 0, 0])
@example(list("abcdefghijklmnopq"), [], [], [0, 0, 0])
def test_repetition_is_what_its_definition_says(a: list[str], b: list[str], c: list[str], order: list[int]) -> None:
    words = [word for i in order for word in (a, b, c)[i]]
    assert bool(replies.find_repetition(" ".join(words))) == repeats(words)


@given(st.text() | st.lists(st.sampled_from([*PREAMBLES, *REFUSALS, "a cat", '"', "'", "“", " "])).map("".join))
def test_any_reply_is_a_caption_or_a_fault(text: str) -> None:
    stripped = replies.strip_preamble(text)
    assert replies.strip_preamble(stripped) == stripped, "doing it again changes nothing"
    found, fault = judge(Reply(text, True), 20)
    assert (found is None) != (fault is None)
    if found is not None:
        assert found == stripped and 1 <= len(replies.words_of(found)) <= 20 and "\n" not in found


@pytest.mark.parametrize(
    ("text", "is_whole", "kind"),
    [
        ("", True, "empty"), (" \n", True, "empty"), ("Sure!", True, "empty"), ("...!", True, "empty"),
        ("a cat on", False, "unfinished"), ("one two three four five six", True, "too long"),
        ("a cat. Let me know if you need more!", True, "chatter"), ("猫犬鳥魚馬牛", True, "too long"),
        ("Please upload an image.", True, "chatter"), ("哈哈哈哈", True, "repetition"),
    ],
)  # fmt: skip
def test_other_faults(text: str, is_whole: bool, kind: str) -> None:
    found, fault = judge(Reply(text, is_whole), 5)
    assert found is None and fault is not None and fault.partition(":")[0] == kind
