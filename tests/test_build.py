"""Style folders and tables of pairs -> triplets as people build them, on painted and real pictures."""

import contextlib
import hashlib
import io
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from data_tools.build import main
from miniature.style_folders import STYLES, choose_contents, paint_style_folders
from ztrain.data.reading import read_triplets
from ztrain.data.rows import Triplet
from ztrain.images import Picture, open_image
from ztrain.io.yamls import dump_yaml

ROOT = Path(__file__).parents[1]
EMOJI = ROOT.parent / "shared/data/emoji_styles"
NUM_CONTENTS = 24
NUM_VAL = 4


@dataclass(frozen=True, slots=True)
class Done:
    """What a program leaves behind."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Done:
    """The program, in this process: a hundred of their own would take longer than all that they do."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(each) for each in arguments])
        except SystemExit as error:
            status = int(error.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Painted style folders that no test changes."""
    folder = tmp_path_factory.mktemp("painted")
    paint_style_folders(folder, size=32, num_contents=NUM_CONTENTS)
    return folder


@pytest.fixture
def source(painted: Path, tmp_path: Path) -> Path:
    """Painted style folders of one's own, with a config beside them."""
    folder = tmp_path / "source"
    shutil.copytree(painted, folder)
    write_config(folder)
    return folder


def write_config(folder: Path, pair: dict[str, Any] | None = None, **styles: object) -> Path:
    """Of style folders; what is painted is known, and alike in many ways, so that nothing counts as a copy by looks."""
    path = folder / "build.yaml"
    label = {"styles": {"contents": "contents.csv", **styles}}
    rules = {"max_refused_share": 0.0, "scan": {"min_side": 16}, "dedup": None}
    pair = {"triplets_per_target": 1, "max_copy_score": 1.0, **(pair or {})}
    path.write_text(dump_yaml({"sources": ["images"], **rules, "label": label, "pair": pair}))
    return path


def build(source: Path, out: Path, *options: object) -> dict[str, list[Triplet]]:
    """Build, expect success, and read all splits back."""
    done = run("--config", source / "build.yaml", "--out", out, *options)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [summary(out)]), done.stderr
    return {split: read_triplets(str(out), split).triplets for split in splits(out)}


def left_out(out: Path, stage: str) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


def splits(out: Path) -> list[str]:
    return [name for name in ("train", "validation", "held") if (out / name).is_dir()]


def path_of(picture: Picture) -> Path:
    return Path(picture.name)


def summary(out: Path) -> str:
    counts = (
        (f"{split} {len(read_triplets(str(out), split).triplets)}" for split in splits(out)) if out.is_dir() else ()
    )
    return f"{out}: " + ", ".join(counts)


def refuse(source: Path, out: Path, *options: object) -> str:
    """Build, expect a refusal that leaves nothing behind, and return its one message."""
    before = found(out.parent)
    done = run("--config", source / "build.yaml", "--out", out, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert found(out.parent) == before
    assert "Traceback" not in done.stderr
    return done.stderr[done.stderr.index("error: ") :]


def found(folder: Path) -> list[Path]:
    """All but the tables of steps, which a build that is refused keeps for the next one."""
    return sorted(path for path in folder.rglob("*") if not any(part.endswith(".work") for part in path.parts))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- what a build holds


def test_triplets_keep_the_rules(source: Path, tmp_path: Path) -> None:
    (source / "LICENSES.md").write_text("by nobody")
    built = build(source, tmp_path / "deep/er/out")
    contents = {each.name: (each.prompt, each.split) for each in choose_contents(NUM_CONTENTS, 0)}
    assert {split: len(rows) for split, rows in built.items()} == {
        "train": (NUM_CONTENTS - NUM_VAL) * len(STYLES),
        "validation": NUM_VAL * len(STYLES),
    }
    for split, rows in built.items():
        targets = Counter((row.columns["style"], row.columns["content"]) for row in rows)
        assert set(targets.values()) == {1}
        for row in rows:
            style, content, other = (row.columns[key] for key in ("style", "content", "reference_content"))
            assert contents[str(content)] == (row.prompt, "val" if split == "validation" else "train")
            assert content != other and contents[str(other)][1] == contents[str(content)][1]
            target, reference = path_of(row.target), path_of(row.references[0])
            assert target.name == f"{content}.png" and reference.name == f"{other}.png"
            assert target.parent.name == reference.parent.name == style
            assert row.target.read() == (source / "images" / str(style) / target.name).read_bytes()
        styles = [row.columns["style"] for row in rows]
        assert styles != styles[: len(STYLES)] * (len(rows) // len(STYLES))  # not dealt out in turn: shuffled
    assert (tmp_path / "deep/er/out/LICENSES.md").read_text() == "by nobody"


@pytest.mark.parametrize(("references", "per_target"), [(1, 1), (1, 3), (2, 2)])
def test_references_are_balanced_and_never_repeat(
    source: Path, tmp_path: Path, references: int, per_target: int
) -> None:
    options = ("--pair.references-per-triplet", references, "--pair.triplets-per-target", per_target)
    built = build(source, tmp_path / "out", *options)
    assert len(built["train"]) == (NUM_CONTENTS - NUM_VAL) * len(STYLES) * per_target
    uses: dict[object, Counter[Picture]] = defaultdict(Counter)
    met: dict[Picture, list[Picture]] = defaultdict(list)
    for row in built["train"]:
        assert len(row.references) == references
        uses[row.columns["style"]].update(row.references)
        met[row.target] += row.references
    for counter in uses.values():
        assert len(counter) == NUM_CONTENTS - NUM_VAL
        assert max(counter.values()) - min(counter.values()) <= 2
    for target, seen in met.items():
        assert len({target, *seen}) == 1 + references * per_target


def test_equal_bytes_are_no_reference(source: Path, tmp_path: Path) -> None:
    ink = source / "images/style1"
    train = [each.name for each in choose_contents(NUM_CONTENTS, 0) if each.split == "train"]
    for name in train[2:]:
        (ink / f"{name}.png").unlink()
    shutil.copyfile(ink / f"{train[0]}.png", ink / f"{train[1]}.png")  # the two that are left are one
    built = build(source, tmp_path / "out")
    assert "style1" not in {row.columns["style"] for row in built["train"]}
    report = json.loads((tmp_path / "out/manifest.json").read_text())
    assert report["counts"]["copies_left_out"] == report["counts"]["triplets_without_reference"] == 1
    assert [row["reason"] for row in left_out(tmp_path / "out", "pair")] == ["no reference in train/style1"]


def test_style_without_reference_is_counted_and_said(source: Path, tmp_path: Path) -> None:
    val = [each.name for each in choose_contents(NUM_CONTENTS, 0) if each.split == "val"]
    for name in val[1:]:
        (source / f"images/style2/{name}.png").unlink()
    done = run("--config", source / "build.yaml", "--out", tmp_path / "out")
    assert done.returncode == 0
    assert "note: triplets without reference: 1\n" in done.stderr
    report = json.loads((tmp_path / "out/manifest.json").read_text())
    assert left_out(tmp_path / "out", "pair") == [
        {"name": f"images/style2/{val[0]}.png", "stage": "pair", "reason": "no reference in validation/style2"}
    ]
    assert report["triplets"]["validation"] == NUM_VAL * (len(STYLES) - 1)


def test_cut_keeps_styles_even(source: Path, tmp_path: Path) -> None:
    for path in sorted((source / "images/style2").iterdir())[3:]:
        path.unlink()  # a small style gives what it has, the others share the rest
    cut = 40
    built = build(source, tmp_path / "out", "--pair.max-triplets-per-split", cut)
    counts = Counter(row.columns["style"] for row in built["train"])
    assert sum(counts.values()) == cut
    assert counts.pop("style2") <= 3
    assert max(counts.values()) - min(counts.values()) <= 1
    named = {path_of(each) for rows in built.values() for row in rows for each in (row.target, *row.references)}
    assert named == set((tmp_path / "out").rglob("images/*/*"))  # no picture that no row names


def test_seed_decides_everything(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        build(source, tmp_path / name, *(("--pair.seed", 1) if name == "c" else ()))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a")["train/metadata.jsonl"] != digests(tmp_path / "c")["train/metadata.jsonl"]


def test_options_from_file_and_command_line(source: Path, tmp_path: Path) -> None:
    table = source / "contents.csv"
    table.write_text(table.read_text().replace("id,prompt,split", "key,text,part"))
    columns = {"id_column": "key", "prompt_column": "text", "split_column": "part"}
    options = {"splits": {"train": "x", "val": "held"}, "styles": ["style1", "style2"]}
    write_config(source, pair={"seed": 5}, **columns, **options)
    chosen = ("--label.styles.splits.train", "train", "--label.styles.styles", "style1", "style3")
    built = build(source, tmp_path / "out", *chosen)
    assert {row.columns["style"] for rows in built.values() for row in rows} == {"style1", "style3"}
    assert set(built) == {"train", "held"}
    report = json.loads((tmp_path / "out/manifest.json").read_text())
    assert report["config"]["pair"]["seed"] == 5


def test_contents_of_other_splits_are_left_out(source: Path, tmp_path: Path) -> None:
    write_config(source, splits={"val": "validation"})
    built = build(source, tmp_path / "out")
    assert set(built) == {"validation"}
    report = json.loads((tmp_path / "out/manifest.json").read_text())
    assert report["counts"]["contents_of_other_splits"] == NUM_CONTENTS - NUM_VAL


# ---- again, and over something else


def test_rerun_is_up_to_date_and_anything_else_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is free
    build(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = run("--config", source / "build.yaml", "--out", out)
    assert (again.returncode, again.stdout) == (0, f"{out} is up to date\n{summary(out)}\n")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "already holds something else" in refuse(source, out, "--pair.seed", 1)
    painting = source / "images/style1" / next((out / "train/images/style1").iterdir()).name
    painting.unlink()  # out holds a hard link to it
    Image.new("RGB", (32, 32)).save(painting)
    assert "already holds something else" in refuse(source, out)


def test_foreign_and_damaged_folders_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, out)
    victim = path_of(read_triplets(str(out), "train").triplets[0].target)
    victim.unlink()
    assert victim.name in refuse(source, out)
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "already holds something else" in refuse(source, out)
    shutil.rmtree(out)
    out.write_text("a file")
    assert "already holds something else" in refuse(source, out)


# ---- what cannot be built


def test_unreadable_pictures_are_rejected_up_to_the_share(source: Path, tmp_path: Path) -> None:
    bad = sorted((source / "images/style1").iterdir())[:2]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bad[1].read_bytes()[:150])
    message = refuse(source, tmp_path / "out")
    assert "2 of 144 pictures (1.39%) are refused, more than max_refused_share 0 " in message
    assert all(str(path.name) in message for path in bad)
    refuse(source, tmp_path / "out", "--max-refused-share", 0.013)
    built = build(source, tmp_path / "out", "--max-refused-share", 0.014)
    named = {
        path_of(each).name for row in built["train"] for each in row.references if row.columns["style"] == "style1"
    }
    assert named and not named & {path.name for path in bad}
    report = json.loads((tmp_path / "out/manifest.json").read_text())
    reasons = {row["name"]: row["reason"] for row in left_out(tmp_path / "out", "scan")}
    assert set(reasons) == {f"images/style1/{path.name}" for path in bad}
    assert "the file is empty" in reasons[f"images/style1/{bad[0].name}"]
    assert report["counts"]["pictures_refused"] == 2


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def rename_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.rename(path.with_stem(f"other-{path.stem}"))


MISTAKES = {
    "no images": (lambda folder: shutil.rmtree(folder / "images"), "images: no such folder"),
    "no table": (lambda folder: (folder / "contents.csv").unlink(), "contents.csv: cannot read"),
    "no column": (
        lambda folder: write_config(folder, id_column="x"),
        "no column 'x'; its columns are: id, prompt",
    ),
    "foreign style": (lambda folder: rename_all(folder / "images/style2"), "style2: no picture of a content"),
    "no style": (
        lambda folder: write_config(folder, styles=["oil"]),
        "no style folder oil; found: style1, style2",
    ),
    "empty split": (lambda folder: write_config(folder, splits={"test": "x"}), "split 'x' gets no content"),
    "one empty split": (
        lambda folder: write_config(folder, splits={"train": "a", "dev": "b"}),
        "split 'b' gets no content",
    ),
    "id twice": (
        lambda folder: append(folder / "contents.csv", "cat,a cat,train\ncat,b,val\n"),
        "csv:27: the id 'cat'",
    ),
    "empty prompt": (
        lambda folder: append(folder / "contents.csv", "cat, ,train\n"),
        "csv:26: prompt is empty",
    ),
    "empty id": (lambda folder: append(folder / "contents.csv", ",a cat,train\n"), "csv:26: id is empty"),
    "short row": (lambda folder: append(folder / "contents.csv", "cat\n"), "csv:26: must have 3 fields"),
    "long row": (
        lambda folder: append(folder / "contents.csv", "cat,a,train,x\n"),
        "csv:26: must have 3 fields",
    ),
    "two files": (
        lambda folder: (
            Image.open(next((folder / "images/style1").iterdir()))
            .convert("RGB")
            .save(next((folder / "images/style1").iterdir()).with_suffix(".bmp"))
        ),
        "the same content as",
    ),
    "unknown key": (
        lambda folder: write_config(folder, style=["style1"]),
        "build.yaml: label.styles.style: unknown key (got ['style1'])",
    ),
    "wrong type": (
        lambda folder: write_config(folder, pair={"seed": "x"}),
        "build.yaml: pair.seed: Input should be a valid integer",
    ),
    "bad split": (
        lambda folder: write_config(folder, splits={"val": "../x"}),
        "'../x' cannot be a split",
    ),
    "key twice": (
        lambda folder: append(folder / "build.yaml", "sources: [x]\n"),
        "the key 'sources' stands twice",
    ),
    "no config": (lambda folder: (folder / "build.yaml").unlink(), "build.yaml: cannot read the file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_leave_nothing(
    source: Path, tmp_path: Path, mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = MISTAKES[mistake]
    make(source)
    before = found(tmp_path)
    # In this process: twenty of their own would take longer than all other tests here.
    assert main(["--config", f"{source}/build.yaml", "--out", f"{tmp_path}/out"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "error: " in printed.err and message in printed.err
    assert found(tmp_path) == before


def test_command_line_mistakes(source: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([], "--config"),
        (["--config", source / "build.yaml"], "--out"),
        (["--config", source / "build.yaml", "--out", tmp_path / "out", "--pair.sed", 3], "--pair.sed"),
        (
            ["--config", source / "build.yaml", "--out", tmp_path / "out", "--pair.seed", -1],
            "greater than or equal to 0",
        ),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "") and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_unwritable_place(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write it" in refuse(source, tmp_path / "file/out")
    too_long = "x" * 300  # fails after the first split has been written
    assert "cannot write it" in refuse(source, tmp_path / "out", "--label.styles.splits.val", too_long)


# ---- other people's loaders, real pictures


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, list[dict[str, Any]]]]:
    """What `datasets` makes of a folder, by split."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def load_folder(folder: Path) -> dict[str, list[dict[str, Any]]]:
        loaded = datasets.load_dataset("imagefolder", data_dir=str(folder))
        return {split: list(loaded[split]) for split in loaded}

    return load_folder


Load = Callable[[Path], dict[str, list[dict[str, Any]]]]


@pytest.mark.parametrize("references", [1, 2])
def test_datasets_loads_both_splits(source: Path, tmp_path: Path, load: Load, references: int) -> None:
    options = ("--pair.max-triplets-per-split", 12, "--pair.references-per-triplet", references)
    built = build(source, tmp_path / "out", *options)
    loaded = load(tmp_path / "out")
    assert {split: len(rows) for split, rows in loaded.items()} == {split: len(rows) for split, rows in built.items()}
    for split, rows in loaded.items():
        for row, triplet in zip(rows, built[split], strict=True):
            seen = row["reference"] if references > 1 else [row["reference"]]
            assert [row["prompt"], row["style"]] == [triplet.prompt, triplet.columns["style"]]
            for image, picture in zip([row["target"], *seen], [triplet.target, *triplet.references], strict=True):
                assert image.convert("RGB").tobytes() == open_image(picture).tobytes()


def test_shipped_config_on_real_pictures(tmp_path: Path) -> None:
    if not EMOJI.is_dir():
        pytest.skip(f"{EMOJI} is absent")
    config = ROOT / "configs/data/emoji_styles.yaml"
    styles = ("breeze", "breeze_mono", "oxygen")
    options = ("--sources", *(EMOJI / "images" / style for style in styles), "--label.styles.styles", *styles)
    done = run("--config", config, "--out", tmp_path / "out", *options, "--pair.max-triplets-per-split", "30")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}: train 30, validation 17\n"
    train, val = (read_triplets(str(tmp_path / "out"), split).triplets for split in ("train", "validation"))
    assert not {row.columns["content"] for row in train} & {row.columns["content"] for row in val}
    assert Counter(row.columns["style"] for row in train) == {"breeze": 10, "breeze_mono": 10, "oxygen": 10}
    assert {open_image(each).size for row in train for each in (row.target, *row.references)} == {(128, 128)}
    assert (tmp_path / "out/LICENSES.md").read_bytes() == (EMOJI / "LICENSES.md").read_bytes()


# ---- tables of pairs


@pytest.fixture
def pairs(source: Path) -> Path:
    """A folder with painted pictures, two of them of equal name, and a config for pairs.csv."""
    write_config_of_pairs(source)
    return source


def drawing(number: int, style: str = "style1") -> str:
    return f"{style}/{sorted(each.name for each in choose_contents(NUM_CONTENTS, 0))[number]}.png"


def write_pairs(folder: Path, *rows: str, header: str = "reference,target,prompt,split,theme") -> Path:
    path = folder / "pairs.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_pairs_become_triplets(pairs: Path, tmp_path: Path, load: Load) -> None:
    a, b, c, other = drawing(0), drawing(1), drawing(2), drawing(0, "style2")
    same_place = f"style1//./{Path(a).name}"
    write_pairs(
        pairs,
        f"{a},{b}, two things ,train,x",
        f'{a}|{other},{c},"a, quoted",,y',
        f"{same_place},{other},日本 \u2028,validation,z",
    )
    (pairs / "LICENSES.md").write_text("by nobody")
    built = build(pairs, tmp_path / "out")
    rows = {
        split: [
            (row.prompt, [path_of(each).relative_to(tmp_path / "out" / split) for each in row.references], own(row))
            for row in rows
        ]
        for split, rows in built.items()
    }
    assert rows == {  # two of one name lie apart, one of two names lies there once
        "train": [
            ("two things", [Path("images", a)], {"theme": "x"}),
            ("a, quoted", [Path("images", a), Path("images", other)], {"theme": "y"}),
        ],
        "validation": [("日本", [Path("images", a)], {"theme": "z"})],
    }
    for of_split in built.values():
        for row in of_split:
            for picture in (row.target, *row.references):
                relative = path_of(picture).relative_to(tmp_path / "out").parts[2:]
                assert picture.read() == (pairs / "images" / Path(*relative)).read_bytes()
    names = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.suffix != ".png")
    assert [name for name in names if "." in name] == [
        *("LICENSES.md", "README.md", "left_out.jsonl", "manifest.json", "metadata.jsonl", "metadata.jsonl")
    ]
    assert len(list((tmp_path / "out").rglob("*.png"))) == 6
    loaded = load(tmp_path / "out")  # rows of one and of several references in one manifest
    assert [len(row["reference"]) for row in loaded["train"]] == [1, 2]
    assert loaded["validation"][0]["target"].size == (32, 32)
    again = run("--config", pairs / "build.yaml", "--out", tmp_path / "out")
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, f"{tmp_path / 'out'} is up to date")
    append(pairs / "pairs.csv", f"{b},{a},p,train,x\n")
    assert "already holds something else" in refuse(pairs, tmp_path / "out")


def test_pairs_as_json_lines(pairs: Path, tmp_path: Path) -> None:
    a, b, c = drawing(0), drawing(1), drawing(2)
    lines = [{"reference": a, "target": b, "prompt": "p", "n": 1}, {"reference": [a, c], "target": b, "prompt": "q"}]
    (pairs / "pairs.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    built = build(pairs, tmp_path / "out", "--label.pairs.table", "pairs.jsonl")
    assert [(row.prompt, len(row.references), own(row)) for row in built["train"]] == [
        ("p", 1, {"n": 1}),
        ("q", 2, {}),
    ]


def own(row: Triplet) -> dict[str, object]:
    """Columns that the table has given."""
    return {name: value for name, value in row.columns.items() if name not in ("way", "copy_score")}


def test_unusable_pairs_are_rejected_up_to_the_share(pairs: Path, tmp_path: Path) -> None:
    a, b, c = drawing(0), drawing(1), drawing(2)
    (pairs / "images/style1/broken.png").write_bytes((pairs / "images" / a).read_bytes()[:150])
    shutil.copyfile(pairs / "images" / a, pairs / "images/style1/copy.png")
    bad = {
        f"style1/copy.png,{a},p,train,x": "same pixels as the target",
        f"{a},{a},p,train,x": "same pixels as the target",
        f"{b}|{c}|style1/copy.png,{a},p,train,x": "same pixels as the target",
        f"style1/none.png,{a},p,train,x": "the picture 'style1/none.png' is not in",
        f"{b},../images/{a},p,train,x": "is not in the sources",
        f"{b},/etc/hostname,p,train,x": "is not in the sources",
        f"{b},{a}, ,train,x": "prompt is empty",
        f",{a},p,train,x": "reference is empty",
        f"{b}|,{a},p,train,x": "reference is empty",
        f"{b},,p,train,x": "target is empty",
        f"{b},{a},p,../x,y": "'../x' cannot be a split",
        f"{b},{a},p": "fields, as many as the header",
        f"{b},{a},p,train,x,y": "fields, as many as the header",
        f"{b},style1/broken.png,p,train,x": "not a readable picture",
    }
    write_pairs(pairs, f"{b},{a},good,train,x", *bad, f"{a},{b},good,train,x")
    message = refuse(pairs, tmp_path / "out")
    assert "14 of 16 rows (87.50%) cannot be used, more than max_reject_share 0 allows" in message
    refuse(pairs, tmp_path / "out", "--label.pairs.max-reject-share", 0.87)
    built = build(pairs, tmp_path / "out", "--label.pairs.max-reject-share", 0.875)
    assert [row.prompt for row in built["train"]] == ["good", "good"]
    report = json.loads((tmp_path / "out/manifest.json").read_text())
    reasons = {row["name"]: row["reason"] for row in left_out(tmp_path / "out", "label")}
    for number, expected in enumerate(bad.values(), start=3):
        assert expected in reasons[f"pairs.csv:{number}"] and str(tmp_path) not in reasons[f"pairs.csv:{number}"]
    assert report["counts"]["rows_rejected"] == 14 and report["triplets"] == {"train": 2}


PAIR_MISTAKES = {
    "no table": (lambda folder: None, "pairs.csv: cannot read the table (No such file"),
    "no column": (lambda folder: write_pairs(folder, header="reference,target,text"), "no column 'prompt'"),
    "no rows": (lambda folder: write_pairs(folder), "no row is left"),
    "odd quotes": (lambda folder: write_pairs(folder, '"a"b,c,d,e,f'), "pairs.csv:2: cannot read the table ("),
    "no text": (
        lambda folder: (folder / "pairs.csv").write_bytes(b"reference,target,prompt\n\xe9,b,c"),
        "pairs.csv: is not UTF-8 (byte 24)",
    ),
    "odd table": (lambda folder: write_config_of_pairs(folder, table="pairs.xlsx"), "a table must be one of .csv"),
    "unknown key": (lambda folder: write_config_of_pairs(folder, seed=1), "build.yaml: label.pairs.seed: unknown key"),
    "nothing to do": (
        lambda folder: (folder / "build.yaml").write_text("{sources: [images], label: {}}"),
        "label: needs at least one of styles, clusters",
    ),
    "our column": (
        lambda folder: write_pairs(folder, f"{drawing(0)},{drawing(1)},p,x", header="reference,target,prompt,way"),
        "the column 'way' is written by data_tools itself",
    ),
    "picture column": (
        lambda folder: write_pairs(
            folder, f"{drawing(0)},{drawing(1)},p,x", header="reference,target,prompt,mask_file_name"
        ),
        "would take column 'mask_file_name' for pictures",
    ),
}


def write_config_of_pairs(folder: Path, **options: object) -> None:
    rules = {"scan": {"min_side": 16}, "dedup": None, "split": {"apart": [], "shares": {"train": 1.0}}}
    label = {"pairs": {"table": "pairs.csv", "max_copy_score": 1.0, **options}}
    (folder / "build.yaml").write_text(dump_yaml({"sources": ["images"], **rules, "label": label}))


@pytest.mark.parametrize("mistake", PAIR_MISTAKES)
def test_mistakes_in_pairs_are_named(
    pairs: Path, tmp_path: Path, mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = PAIR_MISTAKES[mistake]
    make(pairs)
    assert main(["--config", f"{pairs}/build.yaml", "--out", f"{tmp_path}/out"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "error: " in printed.err and message in printed.err
    assert not (tmp_path / "out").exists()
