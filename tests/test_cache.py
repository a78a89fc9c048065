"""The cache: what a change makes it compute again, what it refuses to read, and who may write it at the same time."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.forge import Forged, the_forge
from tests.triplets import ROOT, model_words, picture, tiny_config, write_triplets
from ztrain.cache.cache import Cache
from ztrain.cache.fill import FillCounts, _difference, fill, verify
from ztrain.cache.loader import Loader, read_batch
from ztrain.cache.order import CAPTION, VARIANT, SampleKey, turn
from ztrain.cache.prepare import cache_states
from ztrain.cache.samples import Samples, all_needs, drop_refused, needs_of, read_samples
from ztrain.config import Config, EncodersConfig
from ztrain.data import digests
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec, SiglipEncoder, TextEncoder
from ztrain.frozen.states import STATES, Encoders, Request, assemble
from ztrain.frozen.vision_language import SplicedModel
from ztrain.images import fit_target, open_image
from ztrain.io.files import workspace
from ztrain.io.store import Entry, Store


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_triplets(tmp_path_factory.mktemp("data") / "triplets")


def config_of(family: Path, data: Path, cache: Path, *words: str) -> Config:
    """Reads reference, fused, siglip; without validation, so that the counts below are those of six triplets."""
    base = tiny_config(family, data, cache, *words)
    adapters = [{"kind": "projector", "states": "fused", "hidden_dim": 64}, {"kind": "siglip"}]
    dumped = base.model_dump(mode="json") | {"adapters": adapters}
    dumped["validation"] |= {"validation_steps": 0, "preview_steps": 0}
    return Config.model_validate_json(json.dumps(dumped))


def filled(config: Config) -> FillCounts:
    cache = Cache(config)
    return fill(cache, all_needs(config, read_samples(config, cache)), "cpu", progress=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts what the encoders really do, by the kind of state that it is for."""
    counts: Counter = Counter()

    def counted(owner: type, name: str, kind: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def wrapper(self: object, *arguments: object, **named: object) -> object:
            counts[kind(*arguments)] += 1
            return original(self, *arguments, **named)

        monkeypatch.setattr(owner, name, wrapper)

    counted(TextEncoder, "encode", lambda prompt: "text")
    counted(TextEncoder, "encode_segment", lambda text: "segment")
    counted(LatentCodec, "encode", lambda image: "latents")
    counted(SiglipEncoder, "encode", lambda image: "siglip")
    counted(SplicedModel, "encode", lambda images, prompt, settings: "fused" if prompt else "reference")
    return counts


@dataclass
class Place:
    """A copy of family and data that a row of the table may spoil."""

    family: Path
    data: Path
    cache: Path
    words: tuple[str, ...] = ()


def set_to(key: str, value: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        place.words = (f"--{key}", value)

    return change


def other_weight(file: str, key: str) -> Callable[[Place], None]:
    """Changes one element of one tensor."""

    def change(place: Place) -> None:
        tensors = load_file(place.family / file)
        tensors[key].view(-1)[7] += 0.25
        save_file(tensors, place.family / file, metadata={"format": "pt"})

    return change


def other_text(file: str, before: str, after: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        text = (place.family / file).read_text()
        assert before in text
        (place.family / file).write_text(text.replace(before, after))

    return change


def other_pixel(name: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        image = open_image(place.data / "train" / name)
        image.putpixel((3, 3), (1, 2, 3))
        image.save(place.data / "train" / name)

    return change


def other_prompt(place: Place) -> None:
    manifest = place.data / "train" / "metadata.jsonl"
    manifest.write_text(manifest.read_text().replace("a boat and 2 pears", "a boat and two pears"))


def moved(place: Place) -> None:
    for name in ("family", "data"):
        target = place.cache.parent / f"moved-{name}"
        shutil.move(getattr(place, name), target)
        setattr(place, name, target)


ALL = {"latents": 6, "text": 7, "reference": 6, "fused": 6, "siglip": 7}  # 7 prompts with the empty one, 7 pictures
SPLICED = {"reference": 6, "fused": 6}
VL = "Qwen3-VL-4B-Instruct"
SIGLIP = "siglip2-so400m-patch16-naflex"
TURBO = "Z-Image-Turbo"
VAE = f"{TURBO}/vae/diffusion_pytorch_model.safetensors"
TEXT = f"{TURBO}/text_encoder/model.safetensors"
TABLE: list[tuple[str, Callable[[Place], None], dict[str, int]]] = [
    ("nothing", lambda place: None, {}),
    ("moved", moved, {}),
    ("learning rate", set_to("train.learning_rate", "0.5"), {}),
    ("shift", set_to("flow.shift", "2.0"), {}),
    ("hidden_index", set_to("encoders.hidden_index", "4"), SPLICED),
    ("text_hidden_index", set_to("encoders.text_hidden_index", "4"), SPLICED),
    ("rope_theta", set_to("encoders.rope_theta", "vl"), SPLICED),
    ("positions", set_to("encoders.positions", "1d"), SPLICED),
    ("marker_rows", set_to("encoders.marker_rows", "vl"), SPLICED),
    ("min_reference_pixels", set_to("encoders.min_reference_pixels", "5000"), SPLICED),
    ("max_reference_pixels", set_to("encoders.max_reference_pixels", "9000"), SPLICED),
    ("fused_order", set_to("encoders.fused_order", "prompt_first"), {"fused": 6}),
    ("max_sequence_length", set_to("encoders.max_sequence_length", "100"), {"text": 7}),
    ("resolution", set_to("data.resolution", "80"), {"latents": 6}),
    ("precision", set_to("train.mixed_precision", "bf16"), ALL),
    ("one pixel of a reference", other_pixel("ref-1-0.png"), {"reference": 1, "fused": 1, "siglip": 1}),
    ("one pixel of a target", other_pixel("target-1.png"), {"latents": 1}),
    ("one prompt", other_prompt, {"text": 1, "fused": 1}),
    ("VAE weight", other_weight(VAE, "encoder.conv_in.weight"), {"latents": 6}),
    ("VAE scale", other_text(f"{TURBO}/vae/config.json", "0.3611", "0.3612"), {"latents": 6}),
    ("text weight", other_weight(TEXT, "model.norm.weight"), SPLICED | {"text": 7}),
    ("template", other_text(f"{TURBO}/tokenizer/chat_template.jinja", "assistant", "helper"), SPLICED | {"text": 7}),
    ("visual weight", other_weight(f"{VL}/model.safetensors", "model.visual.pos_embed.weight"), SPLICED),
    ("VL processor", other_text(f"{VL}/preprocessor_config.json", "0.5", "0.4"), SPLICED),
    ("SigLIP processor", other_text(f"{SIGLIP}/preprocessor_config.json", "0.5", "0.4"), {"siglip": 7}),
    ("DiT weight", other_weight(f"{TURBO}/transformer/diffusion_pytorch_model.safetensors", "x_pad_token"), {}),
]  # fmt: skip


@pytest.fixture(scope="module")
def warm(family: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("warm") / "cache"
    assert filled(config_of(family, data, cache)).computed == ALL
    return cache


@pytest.mark.parametrize(("change", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_change_recomputes_what_depends_on_it(
    family: Path, data: Path, warm: Path, tmp_path: Path, calls: Counter, change: Callable, expected: dict[str, int]
) -> None:
    place = Place(tmp_path / "family", tmp_path / "data", tmp_path / "cache")
    shutil.copytree(family, place.family)
    shutil.copytree(data, place.data)
    shutil.copytree(warm, place.cache)
    change(place)
    result = filled(config_of(place.family, place.data, place.cache, *place.words))
    assert result.computed == expected and dict(calls) == expected
    calls.clear()
    assert filled(config_of(place.family, place.data, place.cache, *place.words)).computed == {} == dict(calls)
    # What was there before is still valid: going back costs nothing.
    assert filled(config_of(family, data, place.cache)).computed == {} == dict(calls)


def test_every_encoder_setting_has_its_place_in_a_fingerprint() -> None:
    placed = {name for state in STATES.values() for name in (*state.settings, *state.later_settings)}
    assert placed == set(EncodersConfig.model_fields)


@pytest.mark.parametrize(
    ("adapters", "base", "words"),
    [
        ([{"kind": "projector", "states": "fused", "hidden_dim": 64}, {"kind": "siglip"}], "Z-Image-Turbo", ()),
        ([{"kind": "siglip", "layout": "stock", "init": "checkpoint"}], "Z-Image-Omni-Base", ()),
        ([{"kind": "siglip"}], "Z-Image-Turbo", ("--train.mixed_precision", "bf16")),
    ],
    ids=["fused and siglip", "stock omni", "bf16"],
)
def test_cached_states_are_the_encoders_own(
    family: Path, data: Path, tmp_path: Path, adapters: list, base: str, words: tuple[str, ...]
) -> None:
    """Bit for bit, types included, for one and for two references, and through a new process's eyes (a new Cache)."""
    config = tiny_config(family, data, tmp_path, *words)
    dumped = config.model_dump(mode="json") | {"adapters": adapters}
    dumped["models"]["base"]["pretrained_model_name_or_path"] = str(family / base)
    config = Config.model_validate_json(json.dumps(dumped))
    cache = Cache(config)
    samples = read_samples(config, cache)
    fill(cache, all_needs(config, samples), "cpu", progress=False)
    cache, chosen = Cache(config), [samples.train.samples[0], samples.train.samples[-1]]
    dtype = torch.bfloat16 if words else torch.float32
    encoders = Encoders.load(config, config.reads, dtype, "cpu")
    prompts = [sample.prompt for sample in chosen]
    images = [[open_image(known.picture) for known in sample.references] for sample in chosen]
    live = encoders.encode(prompts, images, config.reads, config.encoders)
    read = assemble(cache.states(), prompts, [sample.references for sample in chosen], config.reads)
    ours, theirs = flat(read), flat(live)
    assert len(ours) == len(theirs) > 4
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    target = fit_target(open_image(chosen[0].target.picture), chosen[0].bucket)
    latents = cache.states().latents(chosen[0].target, chosen[0].bucket)
    assert torch.equal(latents, encoders.codec.encode(target))


def test_a_variant_is_the_picture_cropped_by_hand_and_each_visit_takes_its_own(family: Path, tmp_path: Path) -> None:
    """Its states are those of the part saved as a picture of its own, bit for bit; also of a picture that is larger
    than what the encoders read. Prompt and whole reference are what validation and earlier caches have."""
    data = write_triplets(tmp_path / "data", count=2, validation=2)
    picture(7, 640, 480).save(data / "train" / "ref-0-0.png")
    manifest = data / "train" / "metadata.jsonl"
    texts = [json.loads(line) for line in manifest.read_text().splitlines()]
    texts[0]["prompts"] = ["a boat", "pears"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in texts))
    plain = [word for name in ("text", "reference", "both") for word in (f"--train.dropout_{name}", "0")]
    words = ("--data.reference_variants", "3", "--data.reference_mirror", "true", *plain)
    config = config_of(family, data, tmp_path / "cache", *words)
    cache, samples = Cache(config), read_samples(config, Cache(config))
    assert samples.train.told.endswith("train: 2 triplets, 0 left out, 3 variants of each reference, 4 captions")
    needs = all_needs(config, samples)
    assert Counter(kind for kind, _ in needs.requests) == dict(latents=2, text=5, reference=6, fused=12, siglip=9)
    by_hand = tmp_path / "by_hand" / "train"
    by_hand.mkdir(parents=True)
    rows, forms = [], []
    for sample, caption, number in itertools.product(samples.train.samples, (0, 1, 2), (1, 2)):
        if caption >= sample.choices[0]:
            continue
        names = []
        for known in sample.form(caption, number).references:
            part, whole = known.part, open_image(known.picture)
            assert part is not None and (part.width, part.height) == (known.width, known.height)
            cut = whole.crop((part.left, part.top, part.left + part.width, part.top + part.height))
            names.append(f"{number}-{Path(known.picture.name).name}")
            (cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if part.mirrored else cut).save(by_hand / names[-1])
        target = Path(shutil.copy(sample.target.picture.name, by_hand)).name
        prompt = (sample.prompt, *sample.captions)[caption]
        rows.append({"reference_file_names": names, "target_file_name": target, "prompt": prompt})
        forms.append(sample.form(caption, number))
    (by_hand / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = config_of(family, by_hand.parent, tmp_path / "cache")
    cut_samples = read_samples(alone, Cache(alone)).train.samples
    needs_of(cut_samples, config.reads, needs)
    computed = fill(cache, needs, "cpu", progress=False).computed  # of both, under other names
    assert computed == {"latents": 2, "text": 5, "reference": 6 + 4, "fused": 12 + 8, "siglip": 9 + 6}
    for one, other in zip(forms, cut_samples, strict=True):
        found, expected = (
            flat(assemble(cache.states(), [form.prompt], [form.references], config.reads)) for form in (one, other)
        )
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    trained, keys = samples.train.samples, [SampleKey(3, epoch, index) for epoch in range(3) for index in range(2)]
    for key, batch in zip(keys, Loader(config, cache, trained, [[key] for key in keys]), strict=True):
        sample = trained[key.index]
        form = sample.form(turn(key, sample.choices[0], CAPTION), turn(key, 3, VARIANT))
        expected = flat(assemble(cache.states(), [form.prompt], [form.references], config.reads))
        assert all(map(torch.equal, flat(batch.encoded), expected))


def test_rows_that_balance_or_fused_states_cannot_take(family: Path, data: Path, tmp_path: Path) -> None:
    """One sentence that says which column, or how many states."""
    folder = shutil.copytree(data, tmp_path / "data")
    manifest = folder / "train" / "metadata.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]

    def attempt(changes: dict[int, dict[str, object]], *words: str) -> Samples:
        manifest.write_text("".join(json.dumps(row | changes.get(i, {})) + "\n" for i, row in enumerate(lines)))
        config = config_of(family, folder, tmp_path / "cache", *words)
        return read_samples(config, Cache(config))

    before = attempt({})
    assert before.styles is None
    styled: dict[int, dict[str, object]] = {i: {"style": ("ink", 7)[i > 3]} for i in range(6)}
    assert attempt(styled).digest == before.digest  # a column that nobody reads
    balanced = attempt(styled, "--data.balance", "style")
    assert balanced.styles is not None and balanced.styles.tolist() == [1, 1, 1, 1, 0, 0]
    assert balanced.digest != before.digest != attempt({0: {"prompts": ["other"]}}).digest
    for wrong in (None, " ", ["ink"]):
        with pytest.raises(InputError, match=r"metadata\.jsonl:3: data\.balance style needs .* a column 'style', not "):
            attempt(styled | {2: {"style": wrong}}, "--data.balance", "style")
    many: dict[int, dict[str, object]] = {4: {"prompts": [f"other {i}" for i in range(4)]}}
    attempt(many, "--data.reference_variants", "3")
    with pytest.raises(InputError, match=r"jsonl:5: 5 captions with 4 variants .* 20 sequences .*more than 16; lower"):
        attempt(many, "--data.reference_variants", "4")


def flat(value: object) -> list[torch.Tensor]:
    """Every tensor of a batch, in one order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list):
        return [tensor for entry in value for tensor in flat(entry)]
    if value is None:
        return []
    return [tensor for name in value.__dataclass_fields__ for tensor in flat(getattr(value, name))]


@pytest.mark.usefixtures("forge")
def test_training_on_a_warm_cache_constructs_no_encoder(family: Path, data: Path, tmp_path: Path) -> None:
    """In a process of its own where every way to build one, and every encoding, ends the program."""
    config = tiny_config(family, data, tmp_path / "cache")
    cache_states(config, check=False)
    program = f"""
import sys
def refuse(*arguments, **named): raise SystemExit("an encoder was built: " + repr(arguments)[:300])
import transformers, diffusers
transformers.PreTrainedModel.__init__ = refuse
diffusers.AutoencoderKL.encode = refuse
from ztrain.frozen import encoders
from ztrain.frozen import vision_language
for owner, name in ((encoders.TextEncoder, "__init__"), (encoders.SiglipEncoder, "__init__"),
                    (vision_language.SplicedModel, "__init__"), (encoders.LatentCodec, "encode")):
    setattr(owner, name, refuse)
from ztrain.train.loop import main
sys.exit(main({json.dumps(["--config", "configs/siglip_lora.yaml", "configs/tiny.yaml"])} + sys.argv[1:]))
"""
    words = [
        *("--data.train_data_dir", str(data), "--output_dir", str(tmp_path / "run"), "--train.max_train_steps", "2"),
        *("--validation.num_samples", "2", "--validation.num_previews", "2"),
    ]

    def attempt(cache: Path) -> subprocess.CompletedProcess[str]:
        arguments = [*model_words(family), *words, "--cache.dir", str(cache)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        return the_forge().run(["-c", program, *arguments], environment)

    cold = attempt(tmp_path / "other")
    assert cold.returncode == 1 and "an encoder was built" in cold.stderr  # the trap works
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    done = attempt(tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()


# ---- damage


@pytest.fixture(scope="module")
def latents(warm: Path) -> tuple[Path, bytes]:
    [shard] = next(warm.glob("latents-*")).glob("*.safetensors")
    return shard, shard.read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_and_named(
    latents: tuple[Path, bytes], tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    shard, whole = latents
    folder = tmp_path_factory.mktemp("flipped")
    shutil.copytree(shard.parent / "index", folder / "index")
    spoiled = bytearray(whole)
    spoiled[int(place * len(whole))] ^= 1 << bit
    (folder / shard.name).write_bytes(spoiled)
    store, original = Store(folder), Store(shard.parent)
    found = []
    for key in original._places:
        try:
            parts = store.read(key)
        except InputError as error:
            found.append(str(error))
        else:  # a flip in the header's padding, or in another entry, changes nothing that is read
            assert torch.equal(parts["states"], original.read(key)["states"])
    data_starts = 8 + int.from_bytes(whole[:8], "little")
    assert found or int(place * len(whole)) < data_starts
    assert all(shard.name in message and "run `ztrain cache`" in message for message in found)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_an_index_is_found_and_named(
    latents: tuple[Path, bytes], tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    original = Store(latents[0].parent)
    [index] = (original.folder / "index").iterdir()
    spoiled = bytearray(index.read_bytes())
    spoiled[int(place * len(spoiled))] ^= 1 << bit
    folder = tmp_path_factory.mktemp("flipped")
    (folder / "index").mkdir()
    (folder / "index" / index.name).write_bytes(spoiled)
    (folder / latents[0].name).hardlink_to(latents[0])
    try:
        store = Store(folder)
    except InputError as error:
        assert str(error).startswith(f"{folder}/index/{index.name}: damaged cache index (")
    else:  # a bit that says nothing
        assert {key: store._row(key) for key in store._places} == {key: original._row(key) for key in original._places}


def test_files_of_a_cache_cut_at_every_tenth_are_refused_by_name(
    family: Path, data: Path, warm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file, nothing at all of it included; and what else may stand in the place of a file. The memo of digests,
    which can be made again, is made again, and that is said."""
    shutil.copytree(warm, tmp_path / "cache")
    config = config_of(family, data, tmp_path / "cache")

    def attempt() -> None:
        cache = Cache(config)
        store = cache.store("siglip")
        assert len([store.read(key) for key in store._places]) == len(store.shapes("states", 1)) == 7
        cache.identities(["siglip"])

    def as_pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    cache = Cache(config)
    cache.store("siglip")
    cache.digests.save()
    attempt()
    files = [path for path in (tmp_path / "cache").glob("siglip-*/**/*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".json", ".parquet", ".safetensors"]
    for path in files:
        whole = path.read_bytes()
        for tenth in range(10):
            path.write_bytes(whole[: len(whole) * tenth // 10])
            with pytest.raises(InputError, match=f"^{re.escape(str(path))}: "):
                attempt()
        as_pipe(path)
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*is no regular file, but a named pipe"):
            attempt()
        path.unlink()
        path.write_bytes(whole)
    memo = tmp_path / "cache" / "digests.parquet"
    whole = memo.read_bytes()
    for tenth in range(10):
        memo.write_bytes(whole[: len(whole) * tenth // 10])
        capsys.readouterr()
        attempt()
        assert capsys.readouterr().err.startswith(f"{memo}: cannot be used (")
    as_pipe(memo)
    with pytest.raises(InputError, match="digests.parquet: is no regular file, but a named pipe"):
        attempt()


def test_damaged_shards_stop_training_and_are_named_by_verify(family: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(family, data, tmp_path)
    filled(config)
    assert "states are whole" in cache_states(config, check=True)
    [shard] = next(tmp_path.glob("siglip-*")).glob("*.safetensors")
    spoiled = bytearray(shard.read_bytes())
    spoiled[-3] ^= 4
    shard.write_bytes(spoiled)
    with pytest.raises(InputError, match=f"{shard.name}: damaged cache shard"):
        cache_states(config, check=True)
    cache = Cache(config)
    trained = read_samples(config, cache).trained
    with pytest.raises(InputError, match=f"{shard.name}: damaged cache shard: the bytes of siglip of ref-"):
        read_batch(cache, trained, [], config.reads)
    shard.write_bytes(spoiled[:-100])
    with pytest.raises(InputError, match=f"{shard.name}.* bytes instead of"):
        cache_states(config, check=True)
    shard.unlink()  # as the message says
    assert filled(config).computed == {"siglip": 7}
    assert "states are whole" in cache_states(config, check=True)
    index = next(next(tmp_path.glob("text-*")).glob("index/*.parquet"))
    index.write_bytes(index.read_bytes()[:-20])
    with pytest.raises(InputError, match="damaged cache index"):
        cache_states(config, check=True)


def test_verify_finds_an_encoder_that_gives_something_else(
    family: Path, data: Path, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(family, data, warm, "--cache.verify_share", "1")
    cache = Cache(config)
    needs = all_needs(config, read_samples(config, cache))
    assert "32 states are whole; 32 computed again, largest relative difference 0.0e+00" == verify(cache, needs, "cpu")
    original = SiglipEncoder.encode
    monkeypatch.setattr(SiglipEncoder, "encode", lambda self, image: original(self, image.rotate(90)))
    with pytest.raises(InputError, match=r"siglip of ref-\d-\d.png comes out .* away"):
        verify(cache, needs, "cpu")


def test_what_cannot_be_encoded_is_counted_and_left_out(family: Path, data: Path, tmp_path: Path) -> None:
    spoiled = shutil.copytree(data, tmp_path / "data")
    manifest = spoiled / "train" / "metadata.jsonl"
    manifest.write_text(manifest.read_text().replace("a boat and 2 pears", "word " * 600))
    whole = (spoiled / "train" / "target-4.png").read_bytes()
    (spoiled / "train" / "target-4.png").write_bytes(whole[: len(whole) * 2 // 3])  # its header is good

    def attempt(*words: str) -> tuple[Samples, Cache]:
        config = config_of(family, spoiled, tmp_path / "cache", *words)
        cache = Cache(config)
        samples = read_samples(config, cache)
        fill(cache, all_needs(config, samples), "cpu", progress=False)
        drop_refused(config, samples, cache)
        return samples, cache

    with pytest.raises(InputError) as error:
        attempt("--data.max_bad_share", "0.2")
    assert "2 of 6 triplets cannot be used" in str(error.value)
    assert "metadata.jsonl:3: " in str(error.value) and "max_sequence_length 512" in str(error.value)
    assert "metadata.jsonl:5: " in str(error.value) and "target-4.png: not a readable picture" in str(error.value)
    samples, cache = attempt("--data.max_bad_share", "0.4")
    assert [sample.prompt[-7:] for sample in samples.train.samples] == ["0 pears", "1 pears", "3 pears", "5 pears"]
    assert len(samples.train.rejected) == 2
    # Refusals are remembered, so that a warm start loads no encoder to be refused again; and hold no path.
    assert not cache.missing(all_needs(config_of(family, spoiled, tmp_path / "cache"), samples))
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in (tmp_path / "cache").rglob("*.parquet"))


# ---- somebody else's


WITHOUT_RIGHTS = """
import ctypes, os, sys
from ztrain import cli
from ztrain.train import loop as train
folder, *words = sys.argv[1:]
os.umask(0o022)
# What lets root pass over modes goes, for all threads to come; to another user a checkout may be closed.
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc = ctypes.CDLL(None)
assert libc.capget(header, sets) == 0
for place in (0, 1):  # effective, permitted; DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
    sets[place] &= ~0b1110
assert libc.capset(header, sets) == 0
def attempt(verb, cache, data):
    print(verb, cache, data, flush=True)
    more = [] if verb is cli else ["--output_dir", folder + "/run", "--train.max_train_steps", "1"]
    places = ["--cache.dir", f"{folder}/{cache}", "--data.train_data_dir", f"{folder}/{data}"]
    status = verb.main([*(["cache"] if verb is cli else []), *words, *places, *more])
    print("status", status, flush=True)
for cache, data in (("whole", "data"), ("whole", "copy"), ("part", "data"), ("new/one", "data"), ("locked", "data")):
    attempt(cli, cache, data)
attempt(train, "whole", "copy")
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can come to, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.usefixtures("forge")
def test_a_whole_cache_that_may_only_be_read_is_used_and_not_written(family: Path, data: Path, public: Path) -> None:
    """By a user who owns nothing there and finds the same data at another place as well; one that lacks something is
    refused."""
    for source, names in ((family, ["family"]), (data, ["data", "copy"])):
        for name in names:
            shutil.copytree(source, public / name)
    quiet = ("--validation.validation_steps", "0", "--validation.preview_steps", "0")
    config = tiny_config(public / "family", public / "data", public / "whole", *quiet)
    cache_states(config, check=False)
    for name in ("part", "locked"):
        shutil.copytree(public / "whole", public / name)
    [gone] = (public / "part").glob("siglip-*/*.safetensors")
    gone.unlink()
    (public / "run").mkdir()
    (public / "new").mkdir()
    for path in public.rglob("*"):
        path.chmod(0o777 if path.name == "run" else 0o555 if path.is_dir() else 0o444)
        if os.getuid() == 0:
            os.chown(path, 65534, 65534)
    [closed] = (public / "locked").glob("text-*/index/*")
    closed.chmod(0)

    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (public / "whole").rglob("*")}

    before = state()
    words = ["--config", str(ROOT / "configs/siglip_lora.yaml"), str(ROOT / "configs/tiny.yaml"), *quiet]
    words += [*model_words(public / "family"), "--data.dataloader_num_workers", "1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HOME": str(public / "run")}
    done = the_forge().run(["-c", WITHOUT_RIGHTS, str(public), *words], environment)
    assert re.findall(r"^status (\d)", done.stdout, re.MULTILINE) == list("002220"), done
    assert done.stdout.count("cache: nothing to compute, everything is there") == 2
    part, new, locked = re.findall("^error: (.*)$", done.stderr, re.MULTILINE)
    told = "this user may not write there, and {} states are not cached, first {}; run `ztrain cache` as a user who may"
    assert part.startswith(f"{public}/part: {told.format(7, 'siglip of ref-0-0.png')}")
    assert new.startswith(f"{public}/new/one: {told.format(20, 'latents of target-0.png')}")
    assert locked == f"{closed}: this user may not read it; its owner can change that (chmod a+r)"
    assert state() == before and not list((public / "new").iterdir())
    assert (public / "run" / "export" / "adapter_config.json").is_file()


def test_files_of_a_cache_have_the_modes_of_the_umask(family: Path, data: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        cache_states(tiny_config(family, data, tmp_path / "cache", name="siglip"), check=False)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".parquet", ".json"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_paths_that_are_no_utf8_work(family: Path, data: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    own = shutil.copytree(data, tmp_path / odd / "data")
    config = tiny_config(family, own, tmp_path / odd / "cache", name="siglip")
    assert cache_states(config, check=False).startswith("cache: computed ")
    assert "states are whole" in cache_states(config, check=True)
    assert Cache(config).store("siglip").shapes("states", 1)


def test_small_targets_are_refused_left_out_or_enlarged_and_said(family: Path, tmp_path: Path) -> None:
    """Buckets of about 256 x 256: pictures of 206 are enlarged 1.243 times, of 204 1.255 times."""
    folder = write_triplets(tmp_path / "data", count=5, validation=2)
    for place, side in enumerate((206, 204, 4, 300, 204)):
        picture(place, height=side, width=side).save(folder / "train" / f"target-{place}.png")

    def read(*words: str) -> Samples:
        config = config_of(family, folder, tmp_path / "cache", "--data.resolution", "256", *words)
        return read_samples(config, Cache(config))

    with pytest.raises(InputError) as error:
        read()
    said = str(error.value)
    assert "3 of 5 targets must be enlarged by more than data.max_upscale 1.25" in said and "target-0" not in said
    assert (
        "metadata.jsonl:2: " in said and "target-1.png, 204 x 204 (1.25 times)" in said and "4 x 4 (64 times)" in said
    )
    assert "set data.small_targets to leave_out or upscale" in said
    kept = read("--data.small_targets", "leave_out").train
    assert [Path(sample.target.picture.name).name for sample in kept.samples] == ["target-0.png", "target-3.png"]
    assert (
        kept.rejected == []
        and "3 of 5 targets" in kept.small
        and kept.small.endswith("they are left out, as data.small_targets says")
    )  # noqa: E501
    enlarged = read("--data.small_targets", "upscale").train
    assert len(enlarged.samples) == 5 and "they are enlarged" in enlarged.small
    assert len(read("--data.max_upscale", "64").train.samples) == 5 and not read("--data.max_upscale", "64").train.small
    with pytest.raises(InputError, match=r"train: 0 of 0 triplets cannot be used.*5 of 5 targets must be enlarged"):
        read("--data.small_targets", "leave_out", "--data.resolution", "1024")


def test_a_target_among_its_references_is_refused(family: Path, tmp_path: Path) -> None:
    """The same file, and another file of the same bytes."""
    folder = write_triplets(tmp_path / "data", count=4, validation=2)
    manifest = folder / "train" / "metadata.jsonl"
    manifest.write_text(manifest.read_text().replace("ref-1-0.png", "target-1.png"))
    shutil.copyfile(folder / "train" / "target-3.png", folder / "train" / "ref-3-1.png")  # of two references

    def read(*words: str) -> Samples:
        config = config_of(family, folder, tmp_path / "cache", *words)
        return read_samples(config, Cache(config))

    with pytest.raises(InputError, match=r"2 of 4 .*metadata\.jsonl:2: .*target-1\.png is a reference of itself"):
        read()
    rejected = read("--data.max_bad_share", "0.5").train.rejected
    assert [sentence.partition(": ")[0].rpartition(":")[2] for sentence in rejected] == ["2", "4"]
    assert len(read("--data.allow_reference_is_target").train.samples) == 4


# ---- several writers


FILL = """
import json, sys
from ztrain.cache.cache import Cache
from ztrain.config import Config
from ztrain.cache.fill import fill
from ztrain.cache.samples import all_needs, read_samples
config = Config.model_validate_json(sys.argv[1])
cache = Cache(config)
print(json.dumps(fill(cache, all_needs(config, read_samples(config, cache)), "cpu", progress=False).computed))
"""


def fill_elsewhere(config: Config, said: Path) -> Forged:
    """`filled` in a process of its own."""
    return the_forge().start(["-c", FILL, config.model_dump_json()], dict(os.environ), said, said.with_suffix(".err"))


def left_over(cache: Path) -> list[str]:
    """Temporary files, also those that safetensors makes by itself."""
    return [path.name for path in cache.rglob(".*")]


def contents(cache: Path) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in cache.glob("[a-z]*/*.safetensors")}


@pytest.mark.usefixtures("forge")
def test_four_writers_share_the_work_and_give_what_one_gives(family: Path, tmp_path: Path) -> None:
    many = write_triplets(tmp_path / "many", count=24)
    words = ("--cache.entries_per_shard", "4", "--data.dataloader_num_workers", "1")
    alone = filled(config_of(family, many, tmp_path / "one", *words))
    config = config_of(family, many, tmp_path / "four", *words)
    children = [fill_elsewhere(config, tmp_path / f"said-{number}") for number in range(4)]
    assert [child.wait(120) for child in children] == [0] * 4
    counts = [Counter(json.loads((tmp_path / f"said-{number}").read_text())) for number in range(4)]
    assert dict(sum(counts, Counter())) == alone.computed  # nothing twice
    assert contents(tmp_path / "four") == contents(tmp_path / "one")
    assert not left_over(tmp_path / "four")


@pytest.mark.usefixtures("forge")
def test_a_killed_writer_loses_no_published_shard(family: Path, tmp_path: Path) -> None:
    many = write_triplets(tmp_path / "many", count=40, validation=1)
    words = ("--cache.entries_per_shard", "2", "--data.dataloader_num_workers", "0")
    config = config_of(family, many, tmp_path / "cache", *words)
    whole = filled(config_of(family, many, tmp_path / "whole", *words)).computed
    for attempt in range(3):
        child = fill_elsewhere(config, tmp_path / "said")
        before = len(list((tmp_path / "cache").glob("[a-z]*/*.safetensors")))
        deadline = time.monotonic() + 60
        published = before
        while child.poll() is None and published < before + 5 + 3 * attempt:
            published = len(list((tmp_path / "cache").glob("[a-z]*/*.safetensors")))
            assert time.monotonic() < deadline
            time.sleep(0.002)
        child.kill()
        assert child.wait(60) == -signal.SIGKILL
    kept = sum(
        len(Store(folder)) for folder in (tmp_path / "cache").iterdir() if folder.is_dir() and folder.name[0] != "."
    )
    assert 0 < kept < sum(whole.values())
    rest = filled(config).computed
    assert sum(rest.values()) == sum(whole.values()) - kept
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert not left_over(tmp_path / "cache")


@pytest.mark.usefixtures("forge")
def test_a_full_disk_keeps_what_was_published(family: Path, data: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: the small shards fit, the first large one does not."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from ztrain.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [*model_words(family), "--data.train_data_dir", str(data), "--cache.dir", str(tmp_path / "cache")]
    command = ["-c", program, "cache", "--config", "configs/siglip.yaml", "configs/tiny.yaml"]
    failed = the_forge().run([*command, *words], dict(os.environ))
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 2 and len(errors) == 1 and "Traceback" not in failed.stderr, failed.stderr
    [place] = re.findall(
        rf"error: ({tmp_path}\S*\.safetensors): cannot write it, the disk or its quota is full", errors[0]
    )
    assert "what was finished before is kept" in errors[0] and not Path(place).exists()
    kept = contents(tmp_path / "cache")
    assert kept and not left_over(tmp_path / "cache")
    config = tiny_config(family, data, tmp_path / "cache", name="siglip")
    cache_states(config, check=False)
    assert kept.items() <= contents(tmp_path / "cache").items()
    assert "states are whole" in cache_states(config, check=True)


def test_a_picture_that_is_not_the_listed_one_makes_no_entry(family: Path, data: Path, tmp_path: Path) -> None:
    """Exchanged or gone between listing and encoding: no property of the entry, so it must not stay in the cache."""
    own = shutil.copytree(data, tmp_path / "data")
    config, path = config_of(family, own, tmp_path / "cache"), own / "train" / "ref-1-0.png"
    cache, whole = Cache(config), path.read_bytes()
    needs = all_needs(config, read_samples(config, cache))
    path.write_bytes((own / "train" / "ref-2-0.png").read_bytes())
    with pytest.raises(InputError, match="ref-1-0.png: the picture has changed since it was listed"):
        fill(cache, needs, "cpu", progress=False)
    path.unlink()
    with pytest.raises(InputError, match="ref-1-0.png: the picture does not exist"):
        fill(cache, needs, "cpu", progress=False)
    path.write_bytes(whole)
    filled(config)
    cache = Cache(config)
    assert not cache.missing(needs) and not cache.refusals(needs) and "states are whole" in verify(cache, needs, "cpu")


def test_a_second_start_reads_no_picture_and_no_weights(
    family: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(family, data, tmp_path)
    cache_states(config, check=False)
    read: list[int] = []
    monkeypatch.setattr(digests.xxhash, "xxh3_128", lambda: read.append(1))
    monkeypatch.setattr(digests, "digest_bytes", lambda data: read.append(1))
    assert cache_states(config, check=False) == "cache: nothing to compute, everything is there" and not read


@pytest.mark.usefixtures("forge")
@pytest.mark.parametrize("what", ["cache", "kind.json"])
def test_what_is_in_the_way_is_one_sentence(family: Path, data: Path, tmp_path: Path, what: str) -> None:
    config = config_of(family, data, tmp_path / "cache")
    if what == "cache":
        (tmp_path / "cache").write_text("a file")
        words = [*model_words(family), "--data.train_data_dir", str(data), "--cache.dir", str(tmp_path / "cache")]
        command = ["ztrain.cli", "cache", "--config", "configs/siglip.yaml", "configs/tiny.yaml"]
        failed = the_forge().run([*command, *words], dict(os.environ))
        assert failed.returncode == 2 and "Traceback" not in failed.stderr
        assert failed.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/cache: is no folder, and 32 states")
    else:
        filled(config)
        for path in (tmp_path / "cache").glob("text-*/kind.json"):
            path.unlink()
        with pytest.raises(InputError, match=r"kind.json: cannot read which encoders made"):
            Cache(config).identities(["latents", "text"])


def test_a_refused_state_of_no_single_sample_is_an_error(family: Path, data: Path, tmp_path: Path) -> None:
    """An exchanged reference with a prompt can be refused though both are fine on their own: nothing can be dropped."""
    config = config_of(family, data, tmp_path)
    dumped = config.model_dump(mode="json")
    dumped["validation"] |= {"validation_steps": 1, "num_samples": 2}
    config = Config.model_validate_json(json.dumps(dumped))
    cache = Cache(config)
    samples = read_samples(config, cache)
    others = samples.held_out_pairs(config).others
    request = Request(state="fused", pictures=others[0].references, text=others[0].prompt)
    with workspace(cache.folder) as scratch:
        cache.store("fused").write("x", [Entry(key=request.key, label="it", parts={}, refused="too odd")], scratch)
    with pytest.raises(InputError, match="states that validation needs cannot be made: too odd"):
        drop_refused(config, samples, cache)


def test_validation_needs_two_different_references(family: Path, data: Path, tmp_path: Path) -> None:
    own = shutil.copytree(data, tmp_path / "data")
    manifest = own / "validation" / "metadata.jsonl"
    manifest.write_text(re.sub(r"ref-\d-0", "ref-0-0", manifest.read_text()))
    config = tiny_config(family, own, tmp_path / "cache")
    cache = Cache(config)
    samples = read_samples(config, cache)
    with pytest.raises(InputError, match="all 4 validation triplets have the same references"):
        all_needs(config, samples)
    manifest.write_text(manifest.read_text().replace("ref-0-0", "ref-1-0", 1))
    samples = read_samples(config, cache)
    pairs = samples.held_out_pairs(config)
    assert (
        pairs.exchange is not None and "of the same style or of one that the data does not say" in pairs.exchange.words
    )
    for mine, theirs in zip(pairs.own, pairs.others, strict=True):
        assert mine.prompt == theirs.prompt and mine.references[0].digest != theirs.references[0].digest


def test_validation_exchanges_references_between_styles_where_rows_say_theirs(
    family: Path, data: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(data, tmp_path / "data")
    manifest = own / "validation" / "metadata.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines = [json.dumps({**row, "style": "ink" if i < 2 else "oil"}) for i, row in enumerate(rows)]
    manifest.write_text("\n".join(lines) + "\n")
    styles = {row["reference_file_names"][0]: i < 2 for i, row in enumerate(rows)}
    for seed in ("0", "1", "2", "3"):
        config = tiny_config(family, own, tmp_path / "cache", "--seed", seed)
        pairs = read_samples(config, Cache(config)).held_out_pairs(config)
        assert pairs.exchange is not None and pairs.exchange.share == 1 and not pairs.exchange.words
        for mine, theirs in zip(pairs.own, pairs.others, strict=True):
            names = [Path(sample.references[0].picture.name).name for sample in (mine, theirs)]
            assert styles[names[0]] != styles[names[1]] and mine.target == theirs.target


def test_a_difference_that_is_not_finite_is_one() -> None:
    ones, spoiled = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert _difference(ones, ones) == 0 and _difference(ones, spoiled) == _difference(spoiled, ones) == float("inf")


def entry(i: int, value: float) -> Entry:
    return Entry(key=f"k{i}", label=f"entry {i}", parts={"states": torch.full((2,), value)})


def test_a_shard_computed_again_after_a_merge_is_the_one_that_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with workspace(tmp_path) as scratch:
        for i in range(70):
            store.write(f"shard{i}", [entry(i, float(i))], scratch)
        store.compact(scratch)
        (tmp_path / "shard3.safetensors").unlink()
        assert "k3" not in Store(tmp_path)
        store.write("shard3", [entry(3, 3.25)], scratch)  # another GPU rounds otherwise
        for seen in (store, Store(tmp_path)):
            assert seen.read("k3")["states"][0] == 3.25 and len(seen) == 70
        for i in range(70, 140):
            store.write(f"shard{i}", [entry(i, float(i))], scratch)
        Store(tmp_path).compact(scratch)
    merged = Store(tmp_path)
    assert merged.read("k3")["states"][0] == 3.25 and len(merged) == 140


def test_threads_read_more_shards_than_stay_open(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with workspace(tmp_path) as scratch:
        for i in range(70):
            store.write(f"shard{i}", [entry(i, float(i))], scratch)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            order = [i * 37 % 70 for i in range(4000)]
            assert list(pool.map(lambda i: float(store.read(f"k{i}")["states"][0]), order)) == order
    finally:
        sys.setswitchinterval(interval)


def test_many_index_files_become_one(tmp_path: Path) -> None:
    store = Store(tmp_path)

    with workspace(tmp_path) as scratch:
        for i in range(70):
            store.write(f"shard{i}", [entry(i, float(i))], scratch)
        reader = Store(tmp_path)
        store.compact(scratch)
    assert len(list((tmp_path / "index").iterdir())) == 1
    for seen in (store, reader, Store(tmp_path)):
        seen.reload()
        assert len(seen) == 70 and all(seen.read(f"k{i}")["states"][0] == i for i in range(70))
