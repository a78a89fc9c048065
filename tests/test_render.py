"""data_tools.render: what is drawn, and the way from a prompt to a trained adapter, on the shipped miniature; what a
picture depends on, runs that are killed, LoRAs, blank pictures and refusals on a tiny random pipeline."""

import csv
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from data_tools.diffusion import Batch
from data_tools.render import REPORT_NAME, Command, main, plan
from miniature.world import KIND_NAMES, name_content
from tests.forge import the_forge
from ztrain.io.yamls import dump_yaml
from ztrain.weights.adapter_folder import read_adapter

ROOT = Path(__file__).parents[1]
MINIATURE = ROOT / "miniature/weights/Z-Image"
STYLES = {
    "red": "{content} solid deep red thick dark outlines on a plain vivid pale blue background smooth",
    "hollow": "{content} hollow light yellow thick light outlines on a wide rising striped dull dark purple background",
    "green": "{content} glossy dark green no outlines on a fine straight dotted vivid pale orange background smooth",
}
CONTENTS = [(f"{KIND_NAMES[i]}-{i % 3 + 1}", name_content(i, i % 3, i % 5), "train" if i < 3 else "val")
            for i in range(5)]  # fmt: skip
SHORT = ("--call", "max_sequence_length", 64)  # of the prompt: the pipeline pads it to 512
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

pytestmark = pytest.mark.usefixtures("forge")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_tables(folder: Path, styles: dict[str, str] = STYLES, contents: Sequence[tuple] = CONTENTS) -> Path:
    write_csv(folder / "styles.csv", ("id", "prompt"), list(styles.items()))
    write_csv(folder / "contents.csv", ("id", "prompt", "split"), contents)
    return folder


def words(tables: Path, out: Path, pipeline: Path, *more: object) -> list[str]:
    places = ("--styles", tables / "styles.csv", "--contents", tables / "contents.csv", "--out", out)
    size = ("--height", 64, "--width", 64, "--steps", 1, "--guidance", 0.0)
    return [str(word) for word in ("--pipeline", pipeline, *places, *size, *more)]


def render(tables: Path, out: Path, pipeline: Path, *more: object, status: int = 0) -> Path:
    assert main(words(tables, out, pipeline, *SHORT, *more)) == status
    return out


def pictures(out: Path) -> dict[str, bytes]:
    """<style>/<content>.png -> its bytes."""
    return {str(path.relative_to(out / "images")): path.read_bytes() for path in (out / "images").rglob("*.png")}


def report(out: Path) -> dict:
    return json.loads((out / REPORT_NAME).read_text())


def command(module: str, *more: object) -> None:
    """In a process of its own."""
    done = the_forge().run([module, *map(str, more)], ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def tiny(family: Path) -> Path:
    """A pipeline with random weights, for all that is not about what is drawn."""
    return family / "Z-Image"


@pytest.fixture(scope="module")
def drawn(tables: Path) -> Path:
    """All pictures, by the miniature."""
    return render(tables, tables / "drawn", MINIATURE, "--steps", 2, "--batch-size", 5)


@pytest.fixture(scope="module")
def singles(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of two styles, one by one."""
    folder = tmp_path_factory.mktemp("singles")
    return render(write_tables(folder, {name: STYLES[name] for name in ("red", "green")}), folder / "out", tiny)


@pytest.fixture(scope="module")
def threes(tables: Path, tiny: Path) -> Path:
    """All pictures, in batches of three and two."""
    return render(tables, tables / "threes", tiny, "--batch-size", 3)


@pytest.fixture(scope="module")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the pipeline with weights drawn at random."""
    transformer = ZImageTransformer2DModel.from_pretrained(tiny / "transformer")
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v"]
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    ZImagePipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline to break."""
    return shutil.copytree(tiny, tmp_path / "Broken-Image")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_every_style_draws_every_content(drawn: Path, tables: Path) -> None:
    found = pictures(drawn)
    assert set(found) == {f"{style}/{content}.png" for style in STYLES for content, *_ in CONTENTS}
    assert len(set(found.values())) == 15
    means = {style: np.mean([np.asarray(Image.open(drawn / "images" / style / f"{name}.png")) for name, *_ in CONTENTS],
                            (0, 1, 2)) for style in STYLES}  # fmt: skip
    assert means["red"][2] == max(means["red"]), "its background is blue"
    assert means["green"][0] == max(means["green"]), "its background is orange"
    assert means["hollow"].mean() < min(means["red"].mean(), means["green"].mean()), "its background is dark"
    assert (drawn / "contents.csv").read_text() == (tables / "contents.csv").read_text().replace("\r\n", "\n")
    about = report(drawn)
    assert about["counts"] == {"styles": 3, "contents": 5, "pictures": 15, "blank": 0, "missing": 0}
    assert about["settings"]["pipeline"] == "Z-Image" and about["settings"]["num_inference_steps"] == 2
    assert about["styles"]["red"] == {"prompt": STYLES["red"], "negative_prompt": "", "lora": None}
    assert about["made_with"][0]["torch"] == torch.__version__
    assert not re.search(r"/(root|home|tmp|work)/", (drawn / REPORT_NAME).read_text())
    assert not list(drawn.glob(".writing-*"))


def test_a_picture_depends_on_nothing_around_it(singles: Path, tiny: Path, tmp_path: Path) -> None:
    some = {name: STYLES[name] for name in ("hollow", "green")}
    alone = pictures(render(write_tables(tmp_path, some, CONTENTS[3:0:-2]), tmp_path / "some", tiny))
    assert len(alone) == 4 and len(alone.items() & pictures(singles).items()) == 2


def test_a_batch_changes_rounding_at_most(singles: Path, threes: Path) -> None:
    assert len(set(pictures(singles).values())) == 10 and len(pictures(threes)) == 15
    for name in pictures(singles):
        one, other = (np.asarray(Image.open(out / "images" / name), np.int16) for out in (singles, threes))
        assert np.abs(one - other).max() <= 1, name  # of 255 levels


def test_shards_share_a_folder(tables: Path, threes: Path, tiny: Path, tmp_path: Path) -> None:
    render(tables, tmp_path / "two", tiny, "--batch-size", 3, "--shard", "1/2")
    counts = report(tmp_path / "two")["counts"]
    assert (counts["pictures"], counts["missing"]) == (6, 9)  # of each style the second batch, of two
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*.png")}
    render(tables, tmp_path / "two", tiny, "--batch-size", 3, "--shard", "0/2")
    assert report(tmp_path / "two") == report(threes)
    assert pictures(tmp_path / "two") == pictures(threes)
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_killed_it_goes_on_and_gives_the_same_bytes(tables: Path, threes: Path, tiny: Path, tmp_path: Path) -> None:
    more, out = (*SHORT, "--batch-size", 3), tmp_path / "killed"
    process = the_forge().start(["data_tools.render", *words(tables, out, tiny, *more)], ENVIRONMENT,
                                tmp_path / "out.txt", tmp_path / "err.txt")  # fmt: skip
    while len(list((out / "images").rglob("*.png"))) < 4:  # a batch and more
        assert process.poll() is None, "it ended before it could be killed: " + (tmp_path / "err.txt").read_text()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 4 <= len(pictures(out)) < 15
    for path in (out / "images").rglob("*.png"):
        Image.open(path).load()
    assert list(out.glob(".writing-*")) and report(out)["counts"]["missing"] == 15, "it had counted before it began"
    (out / "images/red/star-1.png").unlink()
    job, _ = plan(tyro.cli(Command, args=words(tables, out, tiny, *more)))
    assert job.missing(3, (0, 1))[0].contents == job.contents[:3], "the other pictures of a batch decide its rounding"
    kept = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}
    render(tables, out, tiny, "--batch-size", 3)
    assert pictures(out) == pictures(threes) and report(out) == report(threes)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(out.glob(".writing-*"))


def test_a_folder_grows_but_never_changes(singles: Path, tiny: Path, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    few = {"red": STYLES["red"]}
    out = render(write_tables(tmp_path, few, CONTENTS[:2]), tmp_path / "out", tiny)
    before = (out / REPORT_NAME).read_bytes()
    changes = [
        ((few, CONTENTS[:2]), ("--steps", 2), "num_inference_steps 1, not 2"),
        ((few, CONTENTS[:2]), ("--same-noise",), "same_noise False, not True"),
        ((few, CONTENTS[:1]), (), "the content 'circle-2', which is no longer in its table"),
        (({"red": STYLES["red"] + " grainy"}, CONTENTS[:2]), (), "the style 'red', which is another one now"),
        (({"green": STYLES["green"]}, CONTENTS[:2]), (), "the style 'red', which is no longer in its table"),
        ((few, [CONTENTS[0], ("circle-2", "two circles", "train")]), (), "the content 'circle-2', which is another"),
    ]
    for (styles, contents), more, said in changes:
        render(write_tables(tmp_path, styles, contents), out, tiny, *more, status=2)
        assert f"has pictures {'with' if more else 'of'} {said}" in capsys.readouterr().err
    assert (out / REPORT_NAME).read_bytes() == before and len(pictures(out)) == 2
    (out / "images/red/star-1.png").unlink()
    more_of_both = {name: STYLES[name] for name in ("green", "red")}
    render(write_tables(tmp_path, more_of_both, CONTENTS[2::-1]), out, tiny)
    assert len(pictures(out)) == 6 and pictures(out).items() <= pictures(singles).items()
    (out / REPORT_NAME).write_text("[]")
    render(tmp_path, out, tiny, status=2)
    assert "not a report of data_tools.render" in capsys.readouterr().err
    shutil.rmtree(out / "images")
    (out / REPORT_NAME).unlink()
    render(tmp_path, out, tiny, status=2)
    assert "holds something else than rendered pictures" in capsys.readouterr().err


def test_every_setting_decides_the_picture(tiny: Path, tmp_path: Path) -> None:
    write_tables(tmp_path, {"red": STYLES["red"]}, CONTENTS[:1])
    bare = Command(pipeline=str(tiny), styles=tmp_path / "styles.csv", contents=tmp_path / "contents.csv",
                   out=tmp_path / "bare")  # fmt: skip
    job, pipeline = plan(bare)
    assert (job.settings.num_inference_steps, job.settings.guidance_scale) == (50, 5.0), "the pipeline's own"

    def draw(*more: object) -> bytes:
        given = words(tmp_path, tmp_path / "out", tiny, *SHORT, "--guidance", 2.0, "--steps", 2, *more)
        job, _ = plan(tyro.cli(Command, args=given))
        return pipeline.draw(Batch(job.styles[0], job.contents), job.settings).tobytes()

    found = {"plain": draw(), "seed": draw("--seed", 1), "steps": draw("--steps", 3), "guidance": draw("--guidance", 3)}
    assert draw() == found["plain"]
    found["call"] = draw(*SHORT, "cfg_truncation", 0.1)
    write_csv(tmp_path / "styles.csv", ("id", "prompt", "negative_prompt"), [("red", STYLES["red"], "three fish")])
    found["negative"] = draw()
    write_tables(tmp_path, {"red": STYLES["red"]}, [("star-1", "three fish at the top", "train")])
    found["prompt"] = draw()
    assert len(set(found.values())) == len(found), "a setting changes nothing"


def scale_lora(source: Path, place: Path, strength: float) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: strength * tensor for name, tensor in load_file(source).items()}, place)


def test_a_lora_is_worn_by_its_style_alone(lora: Path, tiny: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    scale_lora(lora, tmp_path / "loras/ink/pytorch_lora_weights.safetensors", 1.0)
    columns = ("id", "prompt", "lora", "lora_scale")
    rows = [(name, STYLES["red"], *more) for name, *more in (
        ("before", "", ""), ("worn", "loras/ink", ""), ("half", "loras/ink/pytorch_lora_weights.safetensors", "0.5"),
        ("off", "loras/ink", "0"), ("after", "", ""))]  # fmt: skip
    contents = [CONTENTS[0], ("twin", *CONTENTS[0][1:])]
    write_tables(tmp_path, contents=contents[:1])
    write_csv(tmp_path / "styles.csv", columns, rows)
    out = render(tmp_path, tmp_path / "out", tiny, "--same-noise")
    by_style = {name: pictures(out)[f"{name}/star-1.png"] for name, *_ in rows}
    assert by_style["before"] == by_style["after"] == by_style["off"], "same prompt, same noise, no LoRA"
    assert len({by_style[name] for name in ("before", "worn", "half")}) == 3
    about = report(out)["styles"]
    assert about["worn"]["lora"]["name"] == "ink" and about["half"]["lora"]["scale"] == 0.5
    assert about["worn"]["lora"]["digest"] == about["half"]["lora"]["digest"] and about["before"]["lora"] is None
    scale_lora(lora, tmp_path / "loras/ink/pytorch_lora_weights.safetensors", 0.5)
    render(tmp_path, out, tiny, "--same-noise", status=2)
    assert "the style 'worn', which is another one now" in capsys.readouterr().err
    write_tables(tmp_path, {"before": STYLES["red"], "after": STYLES["red"]}, contents)
    apart = pictures(render(tmp_path, tmp_path / "apart", tiny))  # each style with a noise of its own
    assert apart["before/star-1.png"] != apart["after/star-1.png"]
    assert apart["before/star-1.png"] != apart["before/twin.png"], "another content, another noise"


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [("layers.0.attention", "layers.77.attention", "led to unexpected keys"),
     ("transformer.", "unet.", "it has no weights for it")],
)  # fmt: skip
def test_a_lora_of_another_model_is_refused(lora: Path, tiny: Path, tmp_path: Path, ours: str, theirs: str, said: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """diffusers only warns of what finds no place, and draws without it."""
    tensors = load_file(lora)
    assert any(ours in key for key in tensors)
    (tmp_path / "ink").mkdir()
    save_file({key.replace(ours, theirs): tensor for key, tensor in tensors.items()}, tmp_path / "ink/a.safetensors")
    write_tables(tmp_path, contents=CONTENTS[:1])
    write_csv(tmp_path / "styles.csv", ("id", "prompt", "lora"), [("red", STYLES["red"], "ink")])
    render(tmp_path, tmp_path / "out", tiny, status=2)
    error = capsys.readouterr().err
    assert "style 'red': the lora ink was made for another pipeline than ZImagePipeline" in error and said in error
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize(("value", "why"), [(0.0, "all pixels are equal"), (torch.nan, "values that are not numbers")])
def test_blank_pictures_are_listed_and_fail(broken: Path, tmp_path: Path, value: float, why: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    change_weights(broken / "vae", lambda tensors: tensors["decoder.conv_out.weight"].fill_(value))
    out = render(write_tables(tmp_path, contents=CONTENTS[:1]), tmp_path / "out", broken, status=2)
    assert "1 of 3 pictures (33.33%) came out blank, more than --max-blank-share 0.02" in capsys.readouterr().err
    assert report(out)["counts"]["missing"] == 2, "it goes on though it cannot succeed"
    render(tmp_path, out, broken, "--max-blank-share", 1.0)
    about = report(out)
    assert about["counts"] == {"styles": 3, "contents": 1, "pictures": 0, "blank": 3, "missing": 0}
    assert len(about["blank"]) == 3 and why in about["blank"]["green/star-1"]
    assert not list(out.rglob("*.png"))


def refuse(said: str, *more: object, header: str = "id,prompt", styles: str = "a,{content}",
           contents: str = "x,a star,train", index: str | None = None) -> object:  # fmt: skip
    """Options, tables or the pipeline's class, and what the refusal must say."""
    return pytest.param(said, more, f"{header}\n{styles}\n", f"id,prompt,split\n{contents}\n", index, id=said)


@pytest.mark.parametrize(
    ("said", "more", "styles", "contents", "index"),
    [
        refuse("no column 'prompt'; its columns are: id", header="id", styles="a"),
        refuse("unknown column 'negative'", header="id,prompt,negative", styles="a,{content},b"),
        refuse("the column 'prompt' stands 2 times", header="id,prompt,prompt", styles="a,{content},b"),
        refuse("styles.csv:2: must have 2 fields", styles="a"),
        refuse("styles.csv:2: prompt is empty", styles="a,"),
        refuse("styles.csv:2: the prompt 'ink' must have {content}", styles="a,ink"),
        refuse("styles.csv:3: the id 'A' stands twice", styles="a,{content}\nA,{content}"),
        refuse("the id '../a' names a file", styles="../a,{content}"),
        refuse("contents.csv: has no rows", contents=""),
        refuse("contents.csv:2: split is empty", contents="x,a star,"),
        refuse("lora 'no.safetensors' is neither", header="id,prompt,lora", styles="a,{content},no.safetensors"),
        refuse("lora 'bad.bin' cannot be read: ", header="id,prompt,lora", styles="a,{content},bad.bin"),
        refuse("lora 'none' has 0 .safetensors files", header="id,prompt,lora", styles="a,{content},none"),
        refuse("lora_scale 'inf' is not a number", header="id,prompt,lora,lora_scale", styles="a,{content},ink,inf"),
        refuse("lora_scale 2 has no lora", header="id,prompt,lora,lora_scale", styles="a,{content},,2"),
        refuse("a negative_prompt does nothing with guidance_scale 0", header="id,prompt,negative_prompt",
               styles="a,{content},blurred"),
        refuse("--call: ZImagePipeline takes no eta; it takes: prompt, height", "--call", "eta", 1),
        refuse("--call height: is set by an option", "--call", "height", 64),
        refuse("--shard '2/2' must be I/N", "--shard", "2/2"),
        refuse("--batch-size must be at least 1", "--batch-size", 0),
        refuse("command line: num_inference_steps: Input should be greater", "--steps", 0),
        refuse("ZImagePipeline refuses the settings: Height must be divisible by", "--height", 67),
        refuse("--revision main is for ids of the Hub", "--revision", "main"),
        refuse("--offload moves models between GPU and memory", "--offload"),
        refuse("DiTPipeline takes no prompt", index="DiTPipeline"),
        refuse("style 'a': LuminaPipeline cannot take a LoRA", header="id,prompt,lora", styles="a,{content},ink",
               index="LuminaPipeline"),
        refuse("--call: LDMTextToImagePipeline takes no negative", "--call", "negative", 1,
               index="LDMTextToImagePipeline"),
        refuse("its pipeline NoSuchPipeline is not one of diffusers", index="NoSuchPipeline"),
        refuse("its pipeline AutoencoderKL is not one of diffusers", index="AutoencoderKL"),
        refuse("its pipeline ['pipeline', 'Own'] is not one of diffusers", index='["pipeline", "Own"]'),
    ],
)  # fmt: skip
def test_refusals(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], said: str, more: Sequence[object],
                  styles: str, contents: str, index: str | None) -> None:  # fmt: skip
    pipeline = tmp_path / "Some-Image"
    pipeline.mkdir()
    for path in tiny.iterdir():
        (pipeline / path.name).symlink_to(path)
    if index:
        text = (tiny / "model_index.json").read_text()
        (pipeline / "model_index.json").unlink()
        changed = text.replace('"ZImagePipeline"', index if index[0] == "[" else f'"{index}"')
        (pipeline / "model_index.json").write_text(changed)
    (pipeline / "pipeline.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "styles.csv").write_text(styles)
    (tmp_path / "contents.csv").write_text(contents)
    (tmp_path / "bad.bin").write_bytes(b"\x80\x04")
    (tmp_path / "none").mkdir()
    (tmp_path / "ink").mkdir()
    save_file({"transformer.a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "ink/ink.safetensors")
    assert main(words(tmp_path, tmp_path / "out", pipeline, *more)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("error: ") and said in line for line in lines), lines
    assert not list((tmp_path / "out").rglob("*.png")) and not (tmp_path / "ran").exists()


def test_weights_that_lack_are_not_made_up(tables: Path, broken: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """diffusers fills them in at random, with a warning."""
    change_weights(broken / "vae", lambda tensors: tensors.pop("decoder.conv_in.bias"))
    render(tables, tmp_path / "out", broken, status=2)
    error = capsys.readouterr().err
    assert f"error: {broken}/vae: 1 missing keys, for example decoder.conv_in.bias" in error


def build_config(rendered: Path) -> dict[str, object]:
    """For data_tools.build: rendered style folders as they are."""
    splits = {"train": "train", "val": "validation"}
    styles = {"contents": str(rendered / "contents.csv"), "splits": splits}
    return {"sources": [str(rendered / "images")], "label": {"styles": styles}, "pair": {"triplets_per_target": 1}}


def test_rendered_folders_train_an_adapter(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "build.yaml").write_text(dump_yaml(build_config(drawn)))
    command("data_tools.build", "--config", tmp_path / "build.yaml", "--out", tmp_path / "triplets")
    rows = [json.loads(line) for line in (tmp_path / "triplets/train/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and {row["style"] for row in rows} == set(STYLES)
    assert all(row["prompt"] == dict((name, prompt) for name, prompt, _ in CONTENTS)[row["content"]] for row in rows)
    command(
        "ztrain.train", "--config", "configs/splice_lora.yaml", "configs/miniature.yaml", "--data.train_data_dir",
        tmp_path / "triplets", "--cache.dir", tmp_path / "cache", "--output_dir", tmp_path / "run",
        "--train.max_train_steps", 2, "--train.train_batch_size", 3, "--train.lr_warmup_steps", 0,
        "--validation.validation_steps", 0, "--validation.preview_steps", 0,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if line["step"]]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    weights = read_adapter(tmp_path / "run/export").files["pytorch_lora_weights.safetensors"]
    assert max(float(tensor.abs().max()) for name, tensor in weights.items() if "lora_B" in name) > 0
