"""Labels, splits and triplets: the rules that no data set may break, for every way of labelling."""

import json
import random
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools import dedup, likeness
from data_tools.build import main as build
from data_tools.groups import StyleFolders
from data_tools.inspect import main as inspect
from data_tools.label import LabelRules
from data_tools.label import label as label_table
from data_tools.pack import main as pack
from data_tools.pair import PairRules, TargetRules, make_pairings
from data_tools.pictures import Counts
from data_tools.sources import Reader
from data_tools.split import SplitRules, assign
from data_tools.stages import Run, Table, attach
from data_tools.triplets import Cut, Item, Pairing, Reference, Scanned, _Names, read_items
from miniature.style_folders import paint_style_folders
from miniature.trials import WEIGHTS
from tests.test_build import EMOJI, ROOT
from tests.triplets import picture
from ztrain.data.reading import read_triplets
from ztrain.errors import InputError
from ztrain.images import open_image
from ztrain.io.yamls import dump_yaml


def scanned(number: int, cluster: str | None = None, seed: int | None = None) -> Scanned:
    """A picture that nobody reads; equal seeds look alike."""
    name, noise = f"{number:04d}.png", np.random.default_rng(number if seed is None else seed)
    return Scanned("in", name, name, -1, 100, None, f"d{number}", f"p{number}", 64, 64,
                   noise.bytes(likeness.BYTES), cluster or f"pixels p{number}")  # fmt: skip


@st.composite
def item_lists(draw: st.DrawFn) -> list[Item]:
    items = []
    for number in range(draw(st.integers(6, 40))):
        style, content = draw(st.sampled_from("ABC")), f"c{draw(st.integers(0, 12))}"
        cluster = draw(st.one_of(st.none(), st.sampled_from(["x", "y"])))
        split = draw(st.one_of(st.none(), st.sampled_from(["train", "validation"])))
        one = scanned(number, cluster)
        if twin := draw(st.sampled_from(["", "", "", "a", "b"])):  # the same file, perhaps in another style
            one = replace(scanned(number, cluster, seed=ord(twin)), digest=twin, pixels=twin)
        items.append(Item(picture=one, way="styles", group=style, content=content, whole=content,
                          prompt=draw(st.one_of(st.none(), st.just("a cat"))), split=split,
                          more={"style": style, "content": content}))  # fmt: skip
    return items


@settings(max_examples=150, deadline=None)
@given(items=item_lists(), apart=st.sets(st.sampled_from(["copies", "content", "style"])), seed=st.integers(0, 3))
def test_splits_share_nothing_and_nothing_vanishes(items: list[Item], apart: set[Any], seed: int) -> None:
    rules, told = SplitRules(apart=frozenset(apart), seed=seed), Counts()
    try:
        kept = assign(items, rules, told)
    except InputError as error:
        assert "hang together" in str(error) or "shares all that it has" in str(error)
        return
    assert len(kept) + len(told.left_out) == len(items) and told.counts.total() == len(told.left_out)
    values = {"copies": lambda item: item.picture.cluster, "content": lambda item: item.whole,
              "style": lambda item: item.group, "pixels": lambda item: item.picture.pixels}  # fmt: skip
    for what in {*apart, "pixels"} if "copies" in apart else apart:
        value = values[what]
        places: dict[Any, set[Any]] = {}
        for item in kept:
            places.setdefault(value(item), set()).add(item.split)
        assert all(len(splits) == 1 for splits in places.values()), what
    given_splits = {item.picture.key: item.split for item in items}
    assert all(given_splits[item.picture.key] in (None, item.split) for item in kept)
    assert {item.split for item in kept} <= {"train", "validation"}


def test_shares_are_met_and_a_picture_more_moves_hardly_any() -> None:
    items = [Item(picture=scanned(number), way="alone", whole=f"c{number // 2}") for number in range(1000)]
    rules = SplitRules(shares={"train": 8, "validation": 1, "test": 1})
    before = {item.picture.key: item.split for item in assign(items, rules, Counts())}
    assert Counter(before.values()) == {"train": 800, "validation": 100, "test": 100}
    more = [*items, Item(picture=scanned(5000), way="alone", whole="new")]
    after = {item.picture.key: item.split for item in assign(more, rules, Counts())}
    assert sum(before[key] != after[key] for key in before) <= 4
    other = {item.picture.key: item.split for item in assign(items, SplitRules(seed=1, shares=rules.shares), Counts())}
    assert other != before


def test_styles_come_into_a_small_split_in_pairs() -> None:
    """Three of sixty pictures: of one style two or three, or none, for one alone would have no reference."""
    for seed in range(20):
        items = [Item(picture=scanned(number), way="styles", group=f"style{number % 6}") for number in range(60)]
        placed = assign(items, SplitRules(shares={"train": 0.95, "validation": 0.05}, seed=seed), Counts())
        counts = Counter(item.group for item in placed if item.split == "validation")
        assert min(counts.values()) >= 2 and sum(counts.values()) in (3, 4)


@settings(max_examples=100, deadline=None)
@given(items=item_lists(), references=st.integers(1, 3), per_target=st.integers(1, 4), seed=st.integers(0, 2),
       most=st.sampled_from([likeness.COPY_SCORE, 1.0]))  # fmt: skip
def test_references_are_never_the_target(
    items: list[Item], references: int, per_target: int, seed: int, most: float
) -> None:
    try:
        kept = assign(items, SplitRules(), Counts())
    except InputError:
        return  # no splits: the test above
    rules = PairRules(references_per_triplet=references, triplets_per_target=per_target, max_copy_score=most, seed=seed)
    told, known = Counts(), {item.picture.key: item for item in kept}
    try:
        splits = make_pairings(kept, rules, told)
    except InputError as error:
        assert "gets no triplet" in str(error)
        return
    made = [pairing for of_split in splits.values() for pairing in of_split]
    wanted = sum(item.prompt is not None for item in kept) * per_target
    lost = told.counts["further_triplets_without_reference"] + told.counts["pairs_too_alike"]
    lost += told.counts["triplets_without_reference"] * per_target
    assert len(made) + lost == wanted
    assert told.counts["targets_without_prompt"] == sum(item.prompt is None for item in kept)
    met: Counter[tuple[str, str]] = Counter()
    for pairing in made:
        target = known[pairing.target.key]
        assert len(pairing.references) == references and pairing.columns["copy_score"] <= most
        pixels = {pairing.target.pixels, *(each.picture.pixels for each in pairing.references)}
        assert len(pixels) == 1 + references, "two of them are one picture"
        for reference in pairing.references:
            other = known[reference.picture.key]
            assert (other.group, other.split) == (target.group, pairing.split)
            assert other.content != target.content and other.picture.cluster != target.picture.cluster
            met[target.picture.key, other.picture.key] += 1
    assert set(met.values()) <= {1}
    # As many as there are references for: no target that has less than it may could have had one more.
    turns = Counter(pairing.target.key for pairing in made)
    for item in kept if most == 1 and references == 1 else ():
        others = {other.picture.pixels for other in kept
                  if (other.group, other.split) == (item.group, item.split) and other.content != item.content
                  and other.picture.cluster != item.picture.cluster} - {item.picture.pixels}  # fmt: skip
        assert item.prompt is None or turns[item.picture.key] == min(per_target, len(others))
    assert splits == make_pairings(kept, rules, Counts())


def test_what_looks_like_the_target_is_no_reference_for_it() -> None:
    """Three pictures with equal fingerprints, two others: dedup has not run, and clusters say nothing."""
    items = [
        Item(picture=scanned(number, seed=min(number, 2)), way="styles", group="A", content=f"c{number}", prompt="p")
        for number in (2, 3, 4, 0, 1)
    ]
    items = [Item(picture=each.picture, way="styles", group="A", content=each.content, prompt="p", split="train")
             for each in items]  # fmt: skip
    made = make_pairings(items, PairRules(triplets_per_target=2), Counts())["train"]
    alike = {scanned(number).key for number in (2, 3, 4)}
    pairs = [(each.target.key, each.references[0].picture.key) for each in made]
    assert len(made) == 10 and not any(one in alike and other in alike for one, other in pairs)
    loose = make_pairings(items, PairRules(triplets_per_target=4, max_copy_score=1.0), Counts())["train"]
    assert len(loose) == 20


def test_small_pictures_are_no_targets_where_the_resolution_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """The rule of training: 50 pixels are enlarged 1.28 times to 64, 64 not at all."""
    sizes = [64, 50, 64, 50, 64]
    items = [
        Item(picture=replace(scanned(number), width=side, height=side), way="styles", group="A", content=f"c{number}",
             prompt="p", split="train")
        for number, side in enumerate(sizes)
    ]  # fmt: skip

    def paired(told: Counts, **rules: Any) -> list[Pairing]:
        targets = TargetRules(resolution=64, **rules)
        return make_pairings(items, PairRules(targets=targets, triplets_per_target=1, self_share=1.0), told)["train"]

    with pytest.raises(InputError, match=r"2 of 5 targets must be enlarged by more than pair\.targets\.max_upscale"):
        paired(Counts())
    told = Counts()
    made = paired(told, small_targets="leave_out")
    assert {each.target.width for each in made} == {64} and len(made) == 6
    assert told.counts["targets_too_small"] == 2 and [left.stage for left in told.left_out] == ["pair"] * 2
    assert {each.references[0].picture.width for each in made} == {50, 64}  # but references they may be
    assert "they are left out, as pair.targets.small_targets says" in capsys.readouterr().err
    assert len(paired(Counts(), small_targets="upscale")) == 10 == len(paired(Counts(), max_upscale=1.3))


# ---- every way, from files to files


def save(image: Image.Image, path: Path, caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def run(folder: Path, out: Path, **config: Any) -> dict[str, list[dict[str, Any]]]:
    """Builds from folder/in; split -> rows, each with its pictures opened."""
    (folder / "build.yaml").write_text(dump_yaml({"sources": ["in"], **config}))
    assert build(["--config", str(folder / "build.yaml"), "--out", str(out), "--workers", "1"]) == 0
    return {path.parent.name: list(rows(out, path.parent.name)) for path in out.glob("*/metadata.jsonl")}


def rows(out: Path, split: str) -> Iterator[dict[str, Any]]:
    for row in read_triplets(str(out), split).triplets:
        names = [Path(each.name).relative_to(out / split / "images").as_posix() for each in row.references]
        yield {"target": Path(row.target.name).relative_to(out / split / "images").as_posix(), "prompt": row.prompt,
               "references": names, "opened": [open_image(each) for each in (row.target, *row.references)],
               **row.columns}  # fmt: skip


def counts(out: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((out / "manifest.json").read_text())["counts"]
    return found


ALL_IN_TRAIN = {"shares": {"train": 1.0}}


def test_clips(tmp_path: Path) -> None:
    """A ball crosses: neighbours in time look the same and do not meet; clips stay whole."""
    for clip in range(6):
        ground = picture(clip, 96, 96)
        for frame in range(8):
            moved = ground.copy()
            moved.paste(picture(100 + clip, 40, 40), (7 * frame, 20))
            save(moved, tmp_path / f"in/clip{clip}/{frame:03d}.png", f"a ball, clip {clip}" if frame else None)
    found = run(tmp_path, tmp_path / "out", dedup=None, split={"shares": {"train": 2, "validation": 1}},
                label={"clips": {"min_gap": 2, "max_gap": 5}})  # fmt: skip
    clips = {split: {row["clip"] for row in of_split} for split, of_split in found.items()}
    assert len(clips["train"]) == 4 and len(clips["validation"]) == 2 and not clips["train"] & clips["validation"]
    for row in (row for of_split in found.values() for row in of_split):
        (clip, frame), (other, time) = (name.removesuffix(".png").split("/") for name in
                                        (row["target"], row["references"][0]))  # fmt: skip
        assert clip == other and 2 <= abs(int(frame) - int(time)) <= 5 and row["way"] == "clips"
        assert row["prompt"] == f"a ball, clip {clip[-1]}" and row["copy_score"] <= 0.97
    assert counts(tmp_path / "out")["targets_without_prompt"] == 6


def test_before_and_after(tmp_path: Path) -> None:
    for number in range(5):
        before = picture(number, 80, 80)
        save(before, tmp_path / f"in/raw/{number}.png")
        after = before.copy()
        after.paste((250, 0, 0), (0, 0, 12, 12))  # an edit leaves most as it was
        save(after if number else before, tmp_path / f"in/edited/{number}.{'jpg' if number else 'png'}")
    save(picture(9), tmp_path / "in/raw/alone.png")
    label = {"before_after": {"before": "raw", "after": "edited", "prompt": "a red stamp in the corner"}}
    found = run(tmp_path, tmp_path / "out", label=label, split=ALL_IN_TRAIN)["train"]
    assert {(row["target"], *row["references"]) for row in found} == {
        (f"edited/{number}.jpg", f"raw/{number}.png") for number in range(1, 5)
    }
    assert max(row["copy_score"] for row in found) > likeness.COPY_SCORE  # as a group they would not meet
    assert {row["way"] for row in found} == {"before_after"} and min(row["copy_score"] for row in found) > 0.6
    assert counts(tmp_path / "out") == {"pictures": 11, "pictures_without_partner": 1, "pairs_too_alike": 1,
                                        "pictures_in_no_triplet": 1}  # fmt: skip


def test_a_picture_alone_shows_a_part_of_itself(tmp_path: Path) -> None:
    for number in range(30):
        save(picture(number, 100, 70), tmp_path / f"in/{number}.png", "four colours" if number else None)
    pair = {"self_share": 1.0, "self_sides": [0.5, 0.7], "self_mirrored": True}
    found = run(tmp_path, tmp_path / "out", label={"alone": {}}, split=ALL_IN_TRAIN, pair=pair)["train"]
    assert len(found) == 29 and {row["way"] for row in found} == {"itself"}
    mirrored = 0
    for row in found:
        target, part = row["opened"]
        box = [int(side) for side in row["references"][0].removesuffix(".png").removesuffix("-mirrored").split("-")[1:]]
        is_mirrored = "mirrored" in row["references"][0]
        mirrored += is_mirrored
        seen = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else part
        assert seen.tobytes() == target.crop(box).tobytes() and 0.49 < part.width / 100 < 0.71
    assert 5 < mirrored < 25


def test_clusters_of_embeddings(tmp_path: Path) -> None:
    paint_style_folders(tmp_path / "painted", size=64, num_contents=12)
    for path in sorted((tmp_path / "painted/images").rglob("*.png")):
        save(Image.open(path), tmp_path / f"in/{path.parent.name}-{path.name}", path.stem)
    tower = WEIGHTS / "siglip2-so400m-patch16-naflex"
    found = run(tmp_path, tmp_path / "out", dedup=None, embed=[{"model": str(tower)}], split=ALL_IN_TRAIN,
                label={"clusters": {"min_similarity": 0.6}}, pair={"max_copy_score": 1.0})["train"]  # fmt: skip
    same = [row["target"].split("-")[0] == row["references"][0].split("-")[0] for row in found]
    print(f"references from the target's own style: {np.mean(same):.2f} of {len(same)}")
    assert len(found) >= 40 and np.mean(same) > 0.5  # by chance one in six
    text = (tmp_path / "out/manifest.json").read_text() + (tmp_path / "out/README.md").read_text()
    assert str(tmp_path) not in text and str(WEIGHTS) not in text


def test_copies_never_meet_and_never_cross_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = ["id,prompt,split"]
    for number in range(12):
        contents.append(f"{number},thing {number},{'val' if number > 8 else 'train'}")
        for style in range(2):
            save(picture(50 * style + number, 120, 120), tmp_path / f"in/style{style}/{number}.png")
    (tmp_path / "contents.csv").write_text("\n".join(contents) + "\n")
    # A smaller copy within a style, one in the other style, one in the other split.
    for source, copy in (("style0/0", "style0/1"), ("style0/2", "style1/2"), ("style1/3", "style1/11")):
        Image.open(tmp_path / f"in/{source}.png").resize((90, 90)).save(tmp_path / f"in/{copy}.png", quality=60)
    # The same bytes in the other style: of one content, and of a content of the other split.
    for source, copy in (("style0/4", "style1/4"), ("style0/5", "style1/10")):
        (tmp_path / f"in/{copy}.png").write_bytes((tmp_path / f"in/{source}.png").read_bytes())
    every = {f"style{style}/{number}.png" for style in range(2) for number in range(12)}
    label = {"styles": {"contents": "contents.csv"}}

    def build_it(name: str, **config: Any) -> tuple[list[dict[str, Any]], set[str], set[tuple[str, str]]]:
        found = run(tmp_path, tmp_path / name, label=label, **config)
        rows = [row for of_split in found.values() for row in of_split]
        shared = json.loads((tmp_path / name / "manifest.json").read_text())["shared"]
        assert [shared["train and validation"][what] for what in ("pictures", "copies", "contents")] == [0, 0, 0]
        left_out = [json.loads(line) for line in (tmp_path / name / "left_out.jsonl").read_text().splitlines()]
        used = {name for row in rows for name in (row["target"], *row["references"])}
        return rows, used, {(row["name"].removeprefix("in/"), row["stage"]) for row in left_out}

    _, used, left_out = build_it("out")
    assert left_out == {("style0/1.png", "dedup"), ("style1/11.png", "dedup"), ("style0/5.png", "split")}
    assert used == every - {name for name, _ in left_out}
    told = counts(tmp_path / "out")
    assert (told["near_copies_of_other_folders_kept"], told["equal_pictures_of_other_folders_kept"]) == (1, 2)
    assert told["copies_left_out"] == 2 and told["further_triplets_of_a_target"] > len(used)
    capsys.readouterr()
    assert inspect(["--data", str(tmp_path / "out"), "--out", str(tmp_path / "out.html")]) == 0
    for page in (tmp_path / "out.html", tmp_path / "out/README.md"):
        text = page.read_text()
        assert all(words in text for words in ("near copies of other folders kept", "further triplets of a target"))
    # Without dedup equal pixels are copies, but not of another style.
    assert build_it("plain", dedup=None)[2] == {("style0/5.png", "split")}
    _, used, left_out = build_it("across", dedup={"across_folders": True})
    assert {each for each in left_out if each[1] == "dedup"} == {(f"{name}.png", "dedup") for name in
                        ("style0/1", "style1/2", "style1/4", "style1/10", "style1/11")}  # fmt: skip
    assert used == every - {name for name, _ in left_out} and "near_copies_of_other_folders_kept" not in counts(
        tmp_path / "across"
    )
    label["keep_copies"] = True
    rows, _, left_out = build_it("kept", pair={"triplets_per_target": 1})
    # The small split keeps its copies, the large one loses the originals.
    assert left_out == {("style1/3.png", "split"), ("style0/5.png", "split")} and len(rows) == 22
    for row in rows:
        assert {row["target"], *row["references"]} != {"style0/0.png", "style0/1.png"}
        assert row["copy_score"] < likeness.COPY_SCORE


def test_real_drawings_leak_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not EMOJI.is_dir():
        pytest.skip(f"{EMOJI} is absent")
    out = tmp_path / "out"
    assert build(["--config", str(ROOT / "configs/data/emoji_styles.yaml"), "--out", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["shared"] == {"train and validation": {"pictures": 0, "copies": 0, "contents": 0, "styles": 5}}
    table = Table.open(Path(f"{out}.work/scan")).read(["name", "likeness"]).to_pylist()
    kept = {row["name"]: row["likeness"] for row in table}
    prints: dict[str, list[tuple[str, bytes]]] = {}
    for split in ("train", "validation"):
        found = read_triplets(str(out), split).triplets
        uses = Counter(each.name for row in found for each in row.references)
        assert max(uses.values()) <= 3 and {row.columns["way"] for row in found} == {"styles"}
        assert max(float(str(row.columns["copy_score"])) for row in found) < likeness.COPY_SCORE
        names = sorted({each.name for row in found for each in (row.target, *row.references)})
        prints[split] = [(name, kept[Path(name).relative_to(out / split / "images").as_posix()]) for name in names]
        assert all(each == likeness.fingerprint(open_image(Path(name))) for name, each in prints[split][::20])
    # Not by the clusters that the build has made: by the pictures themselves.
    both = [each for of_split in prints.values() for each in of_split]
    rows_of_bytes = np.frombuffer(b"".join(each for _, each in both), np.uint8).reshape(len(both), -1)
    pairs = likeness.find_copies(rows_of_bytes).pairs
    crossing = [pair for pair in pairs if (pair < len(prints["train"])).sum() == 1]
    assert not crossing, [(both[one][0], both[other][0]) for one, other in crossing]
    assert len(both) > 4500
    # The other shipped config, over the same pictures: what has been scanned is not scanned again.
    words = [
        "--config",
        str(ROOT / "configs/data/pairs.yaml"),
        "--out",
        str(tmp_path / "pairs"),
        "--work",
        f"{out}.work",
    ]
    capsys.readouterr()
    assert build(words) == 0 and capsys.readouterr().out == f"{tmp_path / 'pairs'}: train 5, validation 1\n"
    assert (tmp_path / "pairs/LICENSES.md").read_bytes() == (EMOJI / "LICENSES.md").read_bytes()


WISHES: dict[str, dict[str, Any]] = {
    "some styles": {"label": {"styles": {"styles": ["a", "c"]}}},
    "cut": {"label": {"styles": {}}, "pair": {"max_triplets_per_split": 3}},
    "cut groups": {"label": {"styles": {}}, "pair": {"max_triplets_per_group": 2}},
    "some alone": {"label": {"alone": {}}, "pair": {"self_share": 0.3}, "split": ALL_IN_TRAIN},
    "nobody alone": {"label": {"styles": {}, "alone": {}}},
    "clips": {"label": {"clips": {"min_gap": 3}}},
    "before and after": {"label": {"before_after": {"before": "a", "after": "b"}}, "split": ALL_IN_TRAIN},
    "a table": {"label": {"pairs": {"table": "pairs.csv"}}, "split": ALL_IN_TRAIN},
    "apart by nothing": {"label": {"styles": {}}, "split": {"apart": []}},
    "with contents": {"label": {"styles": {"contents": "contents.csv", "splits": {"train": "train"}}}},
    "limits": {"label": {"styles": {}}, "filter": {"min_pixels": 70 * 70}},
}


@pytest.mark.parametrize("wish", WISHES)
def test_every_picture_is_used_or_left_out_with_a_reason(tmp_path: Path, wish: str) -> None:
    for place, style in enumerate("abc"):
        for number in range(10):
            side = 64 if number == 5 else 80
            save(picture(20 * place + number, side, side), tmp_path / f"in/{style}/{number}.png", f"blocks {number}")
    Image.open(tmp_path / "in/a/1.png").resize((90, 90)).save(tmp_path / "in/b/2.png")  # a copy, larger
    (tmp_path / "in/c/3.png").write_bytes(b"none")
    (tmp_path / "pairs.csv").write_text("reference,target,prompt\na/4.png,b/4.png,p\na/1.png,b/2.png,p\n")
    rows = "".join(f"{number},p {number},{'train' if number < 7 else 'other'}\n" for number in range(9))
    (tmp_path / "contents.csv").write_text("id,prompt,split\n" + rows)
    config = {**WISHES[wish], "max_refused_share": 0.1}
    if "table" in wish:
        config["label"] = {"pairs": {"table": "pairs.csv", "max_reject_share": 0.5}}
    found = run(tmp_path, tmp_path / "out", **config)
    used = {f"in/{name.partition('.png')[0]}.png" for of_split in found.values() for row in of_split
            for name in (row["target"], *row["references"])}  # fmt: skip
    left_out = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    every = {f"in/{style}/{number}.png" for style in "abc" for number in range(10)}
    assert used | {row["name"] for row in left_out} >= every
    assert all(row["reason"] and str(tmp_path) not in row["reason"] for row in left_out)
    copies = [row["name"] for row in left_out if row["stage"] == "dedup"]
    assert len(copies) == len(set(copies))  # once, however many ways leave it out
    told = counts(tmp_path / "out")
    cut = told.pop("triplets_cut", 0)
    assert (cut > 0) == wish.startswith("cut")
    without = {"pictures", "contents_of_other_splits", "contents_without_picture", "captions_given",
               "further_triplets_of_a_target", "further_triplets_without_reference", dedup.EQUAL_KEPT,
               dedup.ALIKE_KEPT}  # fmt: skip
    assert sum(count for name, count in told.items() if name not in without) == len(left_out)
    if wish in ("some styles", "clips"):  # nothing is lost to a copy that is not itself used
        assert "in/a/1.png" in used


def test_frames_are_in_the_order_of_their_numbers_and_refused_ones_count(tmp_path: Path) -> None:
    for number in range(1, 13):
        save(picture(number, 80, 80), tmp_path / f"in/clip/frame{number}.png", "p")
    (tmp_path / "in/clip/frame5.png").write_bytes(b"none")
    found = run(tmp_path, tmp_path / "out", split=ALL_IN_TRAIN, max_refused_share=0.1,
                label={"clips": {"min_gap": 2, "max_gap": 3}}, pair={"triplets_per_target": 2})["train"]  # fmt: skip

    def number_of(name: str) -> int:
        return int(name.removesuffix(".png").partition("frame")[2])

    gaps = {abs(number_of(row["target"]) - number_of(row["references"][0])) for row in found}
    uses = Counter(row["references"][0] for row in found)
    assert gaps == {2, 3} and len(found) > 18 and max(uses.values()) <= 4


def test_a_mirror_image_is_no_reference_where_mirrors_are_copies(tmp_path: Path) -> None:
    save(picture(1, 80, 80), tmp_path / "in/0.png")
    save(picture(1, 80, 80).transpose(Image.Transpose.FLIP_LEFT_RIGHT), tmp_path / "in/1.png")
    save(picture(2, 80, 80), tmp_path / "in/2.png")
    (tmp_path / "pairs.csv").write_text("reference,target,prompt\n0.png,1.png,p\n2.png,1.png,q\n")
    for mirrored, prompts in ((True, ["q"]), (False, ["p", "q"])):
        found = run(tmp_path, tmp_path / str(mirrored), dedup={"mirrored": mirrored}, split=ALL_IN_TRAIN,
                    label={"pairs": {"table": "pairs.csv"}})  # fmt: skip
        assert [row["prompt"] for row in found["train"]] == prompts


def test_what_stands_for_copies_has_their_caption(tmp_path: Path) -> None:
    for number in range(3):
        save(picture(number, 96, 96), tmp_path / f"in/{number}.png", None if number == 0 else "blocks")
    save(picture(0, 96, 96).resize((80, 80)), tmp_path / "in/small.png", "blue blocks")
    found = run(tmp_path, tmp_path / "out", split=ALL_IN_TRAIN, label={"styles": {}})["train"]
    assert {row["target"]: row["prompt"] for row in found}["0.png"] == "blue blocks" and len(found) == 3 * 2


def test_lines_of_a_caption_are_one_prompt_or_several(tmp_path: Path) -> None:
    for number in range(3):
        save(picture(number, 80, 80), tmp_path / f"in/{number}.png", f"blocks {number}")
    (tmp_path / "in/0.txt").write_text("blue  blocks\r\n\n a wall \nblue blocks\n")
    (tmp_path / "in/1.txt").unlink()
    (tmp_path / "in/metadata.jsonl").write_text('{"file_name": "1.png", "text": "red\\nof clay"}\n')
    prompts: dict[str | None, tuple[str, list[str] | None]] = {
        None: ("blue blocks a wall blue blocks", None),
        "first": ("blue blocks", None),
        "all": ("blue blocks", ["a wall"]),
    }  # fmt: skip
    for lines, expected in prompts.items():
        label = {"styles": {}} if lines is None else {"styles": {}, "captions": lines}
        out = tmp_path / str(lines)
        found = {row["target"]: row for row in run(tmp_path, out, label=label, split=ALL_IN_TRAIN)["train"]}
        assert (found["0.png"]["prompt"], found["0.png"].get("prompts")) == expected
        assert found["1.png"]["prompt"] == ("red of clay" if lines is None else "red")
        assert counts(out).get("further_captions", 0) == (2 if lines == "all" else 0)
    for form in ("webdataset", "parquet"):
        packed = tmp_path / form
        assert pack(["--data", str(tmp_path / "all"), "--out", str(packed), "--format", form]) == 0
        kept = {row.prompt: row.columns.get("prompts") for row in read_triplets(str(packed), "train").triplets}
        assert kept == {"blue blocks": ["a wall"], "red": ["of clay"], "blocks 2": None}
    # What data_tools.caption has said in another column; a picture without a caption of its own has that as its prompt.
    table = Table.open(tmp_path / "all.work/scan")
    said = pa.table({"short": pa.array([None, "clay", "blocks 2"], pa.string())})
    table = attach(table, tmp_path / "captioned", said, name="test", about=0)
    rules = LabelRules(
        styles=StyleFolders(caption_column="none"), further_captions=["caption", "short"], captions="all"
    )
    items = read_items(label_table(table, rules, tmp_path / "label", Run(folder=tmp_path)))
    assert [(item.prompt, item.more.get("prompts")) for item in items] == [
        ("blue blocks", ["a wall"]), ("red", ["of clay", "clay"]), ("blocks 2", None)
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.text(max_size=120), min_size=1, max_size=12), several=st.booleans())
def test_names_are_portable_and_never_meet(names: list[str], several: bool) -> None:
    odd = ["a.png", "A.png", "a.png/b.png", "../x.png", "/etc/x.png", "x" * 300 + ".png", "山" * 90 + ".png", "l\n.png",
           "r\u2028.png", "c:\\x.png", "caf\u00e9.png", "cafe\u0301.png"]  # fmt: skip
    references = []
    for number, name in enumerate([*odd, *(f"x{name}x.png" for name in names)]):
        one = replace(scanned(number), name=name)
        references += [Reference(one), Reference(one, Cut(0, 0, 9, 9, mirrored=True))]
    given_names = _Names(Reader({}), several=several)
    made = [given_names.of(each) for each in references]
    folded = [unicodedata.normalize("NFC", name).casefold() for name in made]
    assert len(set(folded)) == len(folded)
    folders = {str(parent) for name in folded for parent in PurePosixPath(name).parents}
    assert not folders & set(folded)
    for name in made:
        assert name.startswith("images/") and ".." not in PurePosixPath(name).parts and name == name.strip("\n")
        assert max(len(part.encode()) for part in name.split("/")) <= 200 and name.endswith(".png")


def test_a_card_is_text_whatever_styles_are_called(tmp_path: Path) -> None:
    hostile = ["<img src=x onerror=alert(1)>", "a|b\\|c", "[l](javascript:x)", "`code`", "*bold*"]
    for place, style in enumerate(hostile):
        for number in range(3):
            save(picture(10 * place + number), tmp_path / f"in/{style}/{number}.png", "p")
    run(tmp_path, tmp_path / "out", split={"shares": {"train": 1}, "apart": []}, label={"styles": {}})
    card = (tmp_path / "out/README.md").read_text()
    assert "<img" not in card and "[l](java" not in card and "a\\|b\\\\\\|c" in card
    table = [line for line in card.splitlines() if line.startswith("| ") and "onerror" in line]
    assert len(table) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"label": {"alone": {}}}, "gets no triplet"),
        ({"label": {"pairs": {"table": "pairs.jsonl"}, "captions": "all"}}, "a table or the config has all prompts"),
        ({"label": {"pairs": {"table": "prompts.csv"}}}, "prompts must be a list of texts, as .jsonl has it"),
        ({"label": {"styles": {}, "further_captions": ["short"]}}, "has no column short; run the stage that makes it"),
        ({"label": {"clusters": {}}}, "has no column embedding"),
        ({"label": {"before_after": {}}}, "before/: no pictures below it"),
        ({"label": {"styles": {"styles": ["oil"]}}}, "no style folder oil; found: in"),
        ({"label": {"styles": {}}, "split": {"shares": {"a": 1, "b": 0}}}, "the share of b must be above 0"),
        ({"label": {"styles": {}}, "split": {"apart": ["style"]}}, "hang together in 1 pieces by style"),
        ({"label": {"clips": {"min_gap": 3, "max_gap": 2}}}, "max_gap 2 must be at least min_gap 3"),
        ({"label": {"styles": {}}, "pair": {"self_sides": [0.9, 0.2]}}, "must be two shares"),
        ({"label": {"styles": {}}, "filter": {"min_pixels": 10**6}}, "no picture is left"),
        ({"label": {"styles": {}}, "split": {"shares": {"train-val": 1}}}, "'train-val' cannot be a split"),
        ({"label": {"styles": {}}, "split": {"shares": {"train": 1, "Train": 1}}}, "differ in capitals alone"),
        ({"label": {"styles": {"caption_column": "nothing"}}}, "no picture has a prompt: write .txt files"),
        ({"label": {"pairs": {"table": "pairs.jsonl"}}}, "split must be text, not 5"),
        ({"label": {"pairs": {"table": "twice.csv"}}}, "twice.csv: the column 'prompt' stands 2 times"),
        ({"label": {"before_after": {"before": "in", "after": "out"}}}, "out/: no pictures below it"),
    ],
)
def test_impossible_wishes(tmp_path: Path, config: dict[str, Any], message: str, capsys: Any) -> None:
    for number in range(6):
        save(picture(number), tmp_path / f"in/{number}.png", random.Random(number).choice(["a", "b"]))
    (tmp_path / "pairs.jsonl").write_text('{"reference": "0.png", "target": "1.png", "prompt": "p", "split": 5}\n')
    (tmp_path / "prompts.csv").write_text("reference,target,prompt,prompts\n0.png,1.png,p,q\n")
    (tmp_path / "twice.csv").write_text("reference,target,prompt,prompt\n0.png,1.png,p,q\n")
    (tmp_path / "build.yaml").write_text(dump_yaml({"sources": ["in"], **config}))
    assert build(["--config", str(tmp_path / "build.yaml"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_places_that_cannot_be_are_refused_before_any_work(tmp_path: Path, capsys: Any) -> None:
    for number in range(4):
        save(picture(number), tmp_path / f"in/{number}.png", "blocks")
    (tmp_path / "build.yaml").write_text(dump_yaml({"sources": ["in"], "label": {"styles": {}}}))
    save(picture(9), tmp_path / "mine/photo.png")
    for out, message in (
        (tmp_path / "in/out", "lies inside"),
        (tmp_path / "in", "already holds something else"),
        (tmp_path / "mine", "already holds something else"),
        (tmp_path / "in/0.png", "already holds something else"),
        (Path("/"), "cannot be a data set"),
    ):
        words = ["--config", str(tmp_path / "build.yaml"), "--out", str(out), "--work", str(tmp_path / "work")]
        assert build(words) == 2
        assert message in capsys.readouterr().err, out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.yaml", "in", "mine"]
