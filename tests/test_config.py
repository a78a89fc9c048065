"""The experiment file: what is refused and in which words, overrides, presets, and the command line."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml

from tests.test_parity import SETTINGS, family_config, picture
from ztrain.adapters import ADAPTERS
from ztrain.cli import main
from ztrain.config import Config, ModelConfig, load_config
from ztrain.errors import InputError
from ztrain.frozen.sources import Source, base_defaults, identity, public_name
from ztrain.frozen.states import VISION_LANGUAGE, Encoders
from ztrain.io.overrides import lay_over
from ztrain.io.yamls import enter, is_model, is_tagged, members, merge, parse, read_value
from ztrain.model.dit import load_transformer
from ztrain.train.run import sigma_density

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml")) + sorted((ROOT / "configs" / "presets").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {learning_rat: 3}", ["train.learning_rat", "unknown key", "3", "did you mean learning_rate"]),
        ("train: {learning_rate: fast}", ["train.learning_rate", "valid number", "fast"]),
        ("train: {learning_rate: true}", ["train.learning_rate", "valid number", "True"]),
        ("train: {max_train_steps: 0}", ["train.max_train_steps", "greater than or equal to 1", "0"]),
        ("train: {mixed_precision: fp16}", ["train.mixed_precision", "bf16", "fp16"]),
        ("data: {resolution: 100}", ["data", "resolution 100 is not a multiple of 16"]),
        ("sample: {height: 72}", ["sample", "height 72 is not a multiple of 16"]),
        ("sample: {guidance_window: [0.9, 0.1]}", ["guidance_window", "low <= high"]),
        ("encoders: {min_reference_pixels: 5000, max_reference_pixels: 4000}", ["min_reference_pixels is larger"]),
        ("adapters: [{kind: ip_adapter}]", ["adapters.0", "ip_adapter", "siglip"]),
        ("adapters: [{kind: lora, ranks: 3}]", ["adapters.0.ranks", "unknown key", "rank"]),
        ("adapters: [{kind: lora}, {kind: lora}]", ["lora stands twice"]),
        ("adapters: [{kind: splice}, {kind: projector}]", ["splice and projector both compose"]),
        ("adapters: [{kind: splice}, {kind: siglip, layout: stock}]", ["stock siglip layout"]),
        ("adapters: [{kind: lora}]\ntrain: {prior_weight: 0.5}", ["prior_weight 0.5", "[lora] reads no reference"]),
        ("train: {dropout_text: 0.5, dropout_both: 0.6}", ["dropout_text", "1.1, more than 1"]),
        ("validation: {sigmas: [0.5, 1.5]}", ["sigmas", "at most 1"]),
        ("train: {checkpoints_total_limit: 1}", ["train.checkpoints_total_limit", "2"]),
        ("flow: {shift: -1.0}", ["flow", "shift -1.0 must be above 0"]),
        ("flow: {shift: often}", ["flow.shift", "often"]),
        ("seed: 1\nseed: 2", ["experiment.yaml:2", "seed", "twice"]),
        ("seed: [", ["experiment.yaml"]),
        ("- 1", ["mapping"]),
    ],
)
def test_wrong_experiments_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load_config([write(tmp_path, text)])
    for word in words:
        assert word in str(error.value), str(error.value)


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    above = write(tmp_path, "train: {learning_rate: 5e-5}\nflow: {shift: 2}")
    files = [ROOT / "configs" / "siglip_lora.yaml", ROOT / "configs" / "tiny.yaml", above]
    config = load_config(
        files, ["--adapters.1.rank", "8", "--train.max_train_steps", "7", "--flow.shift", "resolution"]
    )
    assert config.train.learning_rate == 5e-5 and config.train.train_batch_size == 4
    assert config.adapters[1].rank == 8 and config.train.max_train_steps == 7 and config.flow.shift == "resolution"
    assert [adapter.kind for adapter in config.adapters] == ["siglip", "lora"]
    assert config.reads == {"siglip"}


def keys_of(kind: Any, adapter: str, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Every key of a model and of the models that may stand in it, with the types that it takes."""
    for name, field in kind.model_fields.items():
        kinds = list(members(field.annotation))
        yield prefix + name, kinds
        for inside in filter(is_model, kinds):
            yield from keys_of(inside, adapter, f"{prefix}{name}.")
        for inside in (
            each for kind in kinds for each in enter(kind, 0) if is_model(each) and is_tagged(each, adapter)
        ):
            yield from keys_of(inside, adapter, f"{prefix}{name}.0.")


NUMBERS = ["7", "0.5", "64", "100000", "[0.25, 0.5]"]
TEXTS = ["true", "false", "null", *NUMBERS, "two words # and more", "[a, b]", "{a: 1}", "{a: [1]}", "[{kind: lora}]"]
TOGETHER = {  # with another key only
    *("compare.prompts", "compare.references", "data.reference_mirror", "data.text_only_share"),
    *("siglip.init_file", "siglip.init_key_map"),
    *("compare.splice.scaling", "projector.scaling", "splice.scaling"),
    *(f"judges.{judge}.revision" for judge in ("siglip", "dino", "style")),
    *(f"{section}.kind" for section in (*ADAPTERS, "compare.splice")),
}


def test_every_key_can_be_set_on_the_command_line_with_the_text_of_a_yaml() -> None:
    """Where a file is accepted, so is a command line, and means the same; beyond that only text may be bare."""
    every, settable = set(), set()
    for adapter in ADAPTERS:
        plain = parse(Config, {"adapters": [{"kind": adapter}]}, "plain")
        before = plain.model_dump(mode="json")
        for key, kinds in keys_of(Config, adapter):
            name = key.replace("adapters.0", adapter)
            if name in every:
                continue
            if not any(map(is_model, kinds)):
                every.add(name)
            words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
            for text in [*words, *TEXTS]:
                in_file = outcome(with_key(before, key.split("."), read_value(text)))
                given = outcome(before, f"--{key.replace('_', '-')}", text)
                if in_file is not None:
                    assert given == in_file or (str in kinds and "#" in text), (key, text)  # a comment in a file
                elif given is not None:
                    assert any(kind is str or get_origin(kind) in (list, tuple) for kind in kinds), (key, text)
                if given not in (None, plain):
                    settable.add(name)
    assert every - settable == TOGETHER


def with_key(document: Any, path: list[str], value: Any) -> Any:
    """A copy with this value at that place, sections over what is there."""
    if not path:
        return merge(document, value) if isinstance(document, dict) and isinstance(value, dict) else value
    if isinstance(document, list):
        return [with_key(document[0], path[1:], value), *document[1:]]
    return (document or {}) | {path[0]: with_key((document or {}).get(path[0]), path[1:], value)}


def outcome(document: dict[str, Any], *words: str) -> Config | None:
    try:
        return parse(Config, lay_over(Config, document, words), "here")
    except InputError:
        return None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    config = load_config([path])
    assert Config.model_validate_json(config.model_dump_json()) == config


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ztrain.cli", *arguments], capture_output=True, text=True, cwd=ROOT)


def test_config_show_prints_what_it_loaded() -> None:
    files = ["configs/lora.yaml", "configs/tiny.yaml"]
    shown = run("config", "show", "--config", *files, "--adapters.0.rank", "3")
    assert shown.returncode == 0, shown.stderr
    expected = load_config([ROOT / file for file in files], ["--adapters.0.rank", "3"])
    assert yaml.safe_load(shown.stdout) == expected.model_dump(mode="json")


def test_what_a_command_line_says_beyond_a_file(tmp_path: Path) -> None:
    base = write(tmp_path, "adapters: [{kind: splice}, {kind: lora}]\nsweep: {axes: {splice.alpha: [0.1]}}")
    words = [
        *("--train.group_by_tokens", "false", "--compare.shuffled", "--compare.no-drift", "--tracking.tags"),
        *("--judges.siglip.pretrained_model_name_or_path", "x/y", "--judges.truth", "None", "--tracking.name", "12"),
        *("--validation.sigmas", "0.1", "0.5", "--sample.scales", "0", "1", "--compare.adapters", "a", "2024"),
        *("--sweep.axes.splice.tokens", "text", "image", "--adapters.1.peft.use_dora", "true", "--seed=5"),
        *("--adapters.1.alpha", "null", "--models.base.revision", "null", "--tracking.notes", "run #1", "--seed", "6"),
    ]
    config = load_config([base], words)
    assert (config.train.group_by_tokens, config.compare.shuffled, config.compare.drift) == (False, True, False)
    assert config.judges.siglip == ModelConfig(pretrained_model_name_or_path="x/y") and config.judges.truth is None
    assert (config.tracking.name, config.tracking.notes, config.tracking.tags) == ("12", "run #1", [])
    assert config.validation.sigmas == (0.1, 0.5) and config.sample.scales == [0, 1] and config.seed == 6
    assert config.compare.adapters == ["a", "2024"] and config.models.base.revision is None
    assert config.sweep.axes == {"splice.alpha": [0.1], "splice.tokens": ["text", "image"]}
    assert config.adapters[1].kind == "lora" and config.adapters[1].peft == {"use_dora": True}
    assert load_config([base], ["--adapters.2.kind", "siglip"]).reads == {"reference", "siglip"}
    for wrong, said in (
        (["--judges.siglip.revision", "main"], "judges.siglip.pretrained_model_name_or_path: is missing"),
        (["--adapters.1.rnk", "3"], "--adapters.1.rnk: unknown key; did you mean rank?"),
        (["--adapters.3.rank", "3"], "--adapters.3.rank: there are 2 entries, counted from 0, and no 3"),
        (["--train.learning_rate"], "--train.learning_rate takes a value"),
        (["--seed", "1", "2"], "--seed takes one value, not 2"),
        (
            ["--train.learning_rate", "fast"],
            "command line: train.learning_rate: Input should be a valid number (got 'fast')",
        ),
        (
            ["--train.group_by_tokens", "yes"],
            "train.group_by_tokens: Input should be a valid boolean; write true or false",
        ),
        (["--sed", "1"], "--sed: neither an option here nor a key of the config; did you mean seed?"),
        (["stray"], "'stray' belongs to no option"),
        (["--tracking.name", "c\udcff"], "--tracking.name c\\udcff: is not UTF-8; type it anew"),
        (["--seed.x", "1"], "--seed.x: unknown key"),
        (["--seed", "99999999999999999999"], "seed"),
    ):
        with pytest.raises(InputError) as caught:
            load_config([base], wrong)
        assert said in str(caught.value), str(caught.value)


def test_no_path_of_a_config_is_left_to_a_shell() -> None:
    """Keys whose names say that they hold a path are of the type that knows ~; of adapters and presets the lists."""
    names = r"(_or_path|(^|_|\.)(dir|file|truth|prompts|references)|from_checkpoint|compare\.(adapters|presets))$"
    found = set()
    for adapter in ADAPTERS:
        plain = parse(Config, {"adapters": [{"kind": adapter}]}, "plain").model_dump(mode="json")
        for key, kinds in keys_of(Config, adapter):
            if re.search(names, key) and not any(map(is_model, kinds)):
                text: Any = ["~nobody_at_all/a"] if list in map(get_origin, kinds) else "~nobody_at_all/a"
                with pytest.raises(InputError, match=rf"{re.escape(key)}.*no such user or variable"):
                    parse(Config, with_key(plain, key.split("."), text), "here")
                found.add(key)
    assert len(found) == 22, found


def test_help_lists_options_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "--reference-weights" in said and "--train.learning-rate" in said


def test_command_line_mistakes_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["config", "show", "--config", str(write(tmp_path, "trian: {}"))], ["trian", "unknown key", "train"]),
        (["config", "show", "--train.learning_rate", "-1"], ["learning_rate"]),
        (["config", "show", "--train.lr", "1"], ["--train.lr"]),
        (["config", "show", "--config", "absent.yaml"], ["absent.yaml"]),
        (["fly"], ["ztrain VERB"]),
    ):
        try:
            status = main(arguments)
        except SystemExit as stop:  # of the parser
            status = stop.code
        said = "".join(capsys.readouterr())
        assert status == 2 and all(word in said for word in words), said


def test_base_and_turbo_keep_their_own_defaults(family: Path) -> None:
    turbo, base = (base_defaults(family_config(family, name).models) for name in ("Z-Image-Turbo", "Z-Image"))
    assert (turbo.variant, turbo.shift, turbo.num_inference_steps, turbo.guidance_scale) == ("turbo", 3.0, 8, 0.0)
    assert (base.variant, base.shift, base.num_inference_steps, base.guidance_scale) == ("base", 6.0, 50, 4.0)
    config = family_config(family)
    assert sigma_density(config, turbo.shift).shift == 3.0
    by_number = config.model_copy(update={"flow": config.flow.model_copy(update={"shift": 2.5})})
    assert sigma_density(by_number, turbo.shift).shift == 2.5
    by_size = config.model_copy(update={"flow": config.flow.model_copy(update={"shift": "resolution"})})
    assert sigma_density(by_size, turbo.shift).shift == pytest.approx(3.158, abs=1e-3)  # exp(1.15) at 1024 px


def test_folders_that_are_no_models_are_named(family: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty is not a Z-Image model: transformer/config.json is missing"):
        load_transformer(Source(str(tmp_path / "empty")), torch.float32, "cpu")
    with pytest.raises(InputError, match="absent is no folder; give a folder or a Hub id"):
        load_transformer(Source(str(tmp_path / "absent")), torch.float32, "cpu")
    with pytest.raises(InputError, match="cannot load nobody/nothing"):
        load_transformer(Source("nobody/nothing"), torch.float32, "cpu")
    swapped = family_config(family)
    wrong = ModelConfig(pretrained_model_name_or_path=str(family / "siglip2-so400m-patch16-naflex"))
    models = swapped.models.model_copy(update={"vision_language": wrong})
    with pytest.raises(InputError, match="siglip2-so400m-patch16-naflex"):
        Encoders.load(swapped.model_copy(update={"models": models}), frozenset({"reference"}), torch.float32, "cpu")


def test_identity_tells_checkpoints_apart_but_not_precisions(family: Path) -> None:
    turbo = load_transformer(Source(str(family / "Z-Image-Turbo")), torch.float32, "cpu")
    halved = load_transformer(Source(str(family / "Z-Image-Turbo")), torch.bfloat16, "cpu")
    base = load_transformer(Source(str(family / "Z-Image")), torch.float32, "cpu")
    known = identity(turbo)
    assert identity(halved) == known
    assert identity(base)["weights"] != known["weights"]
    with torch.no_grad():
        turbo.layers[1].feed_forward.w2.weight.mul_(1.05)
    assert identity(turbo)["weights"] != known["weights"]
    assert public_name(str(family)) == "family" and public_name("Tongyi-MAI/Z-Image") == "Tongyi-MAI/Z-Image"


def test_prompts_that_do_not_fit_are_refused(family: Path) -> None:
    encoders = Encoders.load(family_config(family), frozenset({"reference", "fused"}), torch.float32, "cpu")
    with pytest.raises(InputError, match="more than encoders.max_sequence_length 512"):
        encoders.text.encode("word " * 700)
    with pytest.raises(InputError, match="contains the special token"):
        encoders[VISION_LANGUAGE].encode([picture(1)], "a <|image_pad|> b", SETTINGS)
    with pytest.raises(InputError, match="hidden_index is 7; this language model has states 1 to 6"):
        encoders[VISION_LANGUAGE].encode([picture(1)], "", SETTINGS.model_copy(update={"hidden_index": 7}))
    with pytest.raises(InputError, match="multiples of 16"):
        encoders.codec.latent_shape(64, 72)
