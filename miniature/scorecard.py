"""How good a miniature family is: every member judged on pictures that no model saw, into one scorecard.

    ztrain mini measure FAMILY --out DIR [--data DIR] [--count N] [--seed N] [--steps N] [--guidance X]
        [--parts vae text vl splice]

In: a family folder as pretrain.py writes it, and its world. Out: scorecard.json, scorecard.md and pictures (sheets.py).
Every figure is a mean with its 95 % interval beside what the judges score on true pictures; `held` is known contents in
known styles whose combination is new, `unseen` contents that no model saw drawn.

Legend: T pictures, S pixels of a side, D embedding width.
"""

import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from miniature import sheets
from miniature.exam import RETRIEVAL_POOL, Card, Clusters, Exam
from miniature.gallery import Gallery, Split, World
from miniature.language import describe
from miniature.splices import measure_splice
from miniature.subject import Subject, to_pictures
from miniature.turns import DETAIL
from miniature.world import FILL_NAMES, PLACES, PLURALS, TONE_NAMES
from ztrain.errors import InputError
from ztrain.io.drawn import save_picture
from ztrain.io.files import write_json, write_text
from ztrain.metrics.scores import high_frequency_energy, psnr, topk_correct

PARTS = ("vae", "text", "vl", "splice")

_SHOWN = 8  # rows of a sheet
_FOLDER_PROMPTS = 100
_TABLE_COUNT = 128  # triplets on which the splice's settings are compared, at most


# The parts


def measure_judges(exam: Exam) -> Card:
    """The judges on true pictures, split by split; every other figure stands beside these."""
    card: Card = {}
    pooled: dict[str, list[Tensor]] = {}
    for split, pairs in exam.pairs.items():
        targets, references = exam.targets(split), exam.references(split)
        seen = exam.judges.look(targets.images)
        scores = seen.is_right(targets.labels, exam.labels_for(split))
        scores |= exam.judges.look(references.images).likeness(seen, pools=pairs.pools)
        scores |= {"high_frequency": high_frequency_energy(targets.images.float() / 255)}
        card[split] = exam.figures(scores, exam.clusters(split, targets), truth=False)
        for name, values in scores.items():
            pooled.setdefault(name, []).append(values)
    exam.truth.update({name: float(torch.cat(values).mean()) for name, values in pooled.items()})
    if exam.is_composed:
        exam.truth["content"] = sum(exam.truth[name] for name in exam.contents) / len(exam.contents)
    return card


def measure_vae(exam: Exam, out: Path) -> Card:
    """How much of a picture the VAE gives back."""
    card: Card = {}
    shown: list[tuple[Tensor, Tensor]] = []
    for split in exam.pairs:
        targets = exam.targets(split)
        decoded = exam.subject.through_codec(targets.images)
        seen, true = exam.judges.look(decoded), exam.judges.look(targets.images)
        scores = {"psnr": psnr(decoded.float() / 255, targets.images.float() / 255)}
        scores |= seen.is_right(targets.labels, exam.labels_for(split)) | seen.likeness(true)
        scores |= {"high_frequency": high_frequency_energy(decoded.float() / 255)}
        card[split] = exam.figures(scores, exam.clusters(split, targets))
        shown.append((targets.images[:_SHOWN], decoded[:_SHOWN]))
    labels = [f"{split}: {what}" for split in card for what in ("true", "VAE")]
    columns = [to_pictures(images) for pair in shown for images in pair]
    save_picture(sheets.draw_columns(labels, columns), out / "vae.png")
    return card


def measure_text(exam: Exam, out: Path) -> Card:
    """What the transformer draws from text alone."""
    of_split = _composed_text if exam.is_composed else _folder_text
    return {split: of_split(exam, split, out) for split in exam.pairs}


def _composed_text(exam: Exam, split: Split, out: Path) -> Card:
    """Prompts without and with the words of a style."""
    subject, targets = exam.subject, exam.targets(split)
    clusters, pools = exam.clusters(split, targets), exam.pairs[split].pools
    true = exam.judges.look(targets.images)
    card: Card = {}
    for name, prompts in (("plain", targets.captions), ("detailed", targets.detailed)):
        rendered = subject.draw(prompts)
        seen = exam.judges.look(rendered)
        scores = seen.is_right(targets.labels, exam.contents) | seen.likeness(true, pools=pools)
        scores |= {"high_frequency": high_frequency_energy(rendered.float() / 255)}
        card[name] = exam.figures(scores, clusters)
        shown = sheets.draw_contact(to_pictures(rendered[: 4 * _SHOWN]), prompts)
        save_picture(shown, out / f"text_{split}_{name}.png")
    for label in exam.styles:  # only over the prompts that name them: some leave a clause out
        classes = [exam.world.style_classes[label][i] for i in targets.labels[label].tolist()]
        said = [names(text, label, true_name) for text, true_name in zip(targets.detailed, classes, strict=True)]
        rows = torch.tensor(said, device=subject.device).nonzero().squeeze(1)
        if len(rows) > 1:
            right = seen.is_right(targets.labels, [label])[label]
            card["detailed"] |= exam.figures({label: right[rows]}, clusters.select(rows))
    return card | {"prompts": targets.captions[: 4 * _SHOWN]}


def _folder_text(exam: Exam, split: Split, out: Path) -> Card:
    """One prompt of each content, held: known ones, those of held-out pictures first."""
    subject, [label] = exam.subject, exam.contents
    galleries = [exam.galleries[split]]
    if split == "held":
        galleries.append(exam.world.gallery("train", None, subject.seed, subject.device))
    rows: dict[int, tuple[Gallery, int]] = {}
    for gallery in galleries:
        for row, content in enumerate(gallery.labels[label].tolist()):
            rows.setdefault(content, (gallery, row))
    chosen = dict(list(rows.items())[: min(_FOLDER_PROMPTS, exam.count)])
    prompts = [gallery.captions[row] for gallery, row in chosen.values()]
    images = torch.stack([gallery.images[row] for gallery, row in chosen.values()])
    rendered = subject.draw(prompts)
    seen, true = exam.judges.look(rendered), exam.judges.look(images)
    wanted = torch.tensor(list(chosen), device=subject.device)
    scores, best = (
        {f"top{k}": topk_correct(looked.logits[label], wanted, k) for k in (1, 5)}
        | {f"{name}_spread": spread(embedding) for name, embedding in looked.styles.items()}
        for looked in (seen, true)
    )
    scores |= {"high_frequency": high_frequency_energy(rendered.float() / 255)}
    exam.truth |= {name: float(values.mean()) for name, values in best.items()}
    save_picture(sheets.draw_contact(to_pictures(rendered), prompts), out / f"text_{split}_plain.png")
    return {"plain": exam.figures(scores, Clusters(of="contents", numbers=wanted)), "prompts": prompts}


def spread(embeddings: Tensor) -> Tensor:
    """How far each picture's style is from the others', 1 - mean cosine, (T,): 0 = all are in one style."""
    cosine = embeddings @ embeddings.T
    return 1 - (cosine.sum(1) - cosine.diagonal()) / (len(cosine) - 1)


def names(text: str, label: str, name: str) -> bool:
    """Whether a text in the words of world.py says that a label has the class `name`."""
    word = re.escape(name)
    match label:
        case "kind":
            pattern = rf"\b(?:{word}|{re.escape(PLURALS.get(name, name + 's'))})\b"
        case "place":
            pattern = rf"\b{re.escape(PLACES[name][0])}\b"
        case "background" | "background_hue":
            pattern = rf"\bon an? (?:(?!background)\w+ )*?{word}\b"
        case "fill_hue":
            pattern = rf"\b(?:{'|'.join(FILL_NAMES)}) (?:{'|'.join(TONE_NAMES)}) {word}\b"
        case "outline":
            pattern = rf"\b{word}(?: (?:dark|light))? outlines\b"
        case _:
            pattern = rf"\b{word}\b"
    return re.search(pattern, text) is not None


def measure_vl(exam: Exam) -> Card:
    """What Qwen3-VL answers about pictures, by the words of the true classes; of a folder, by the whole caption."""
    subject, model = exam.subject, exam.subject.vision_language()
    card: Card = {}
    for split in exam.pairs:
        targets = exam.targets(split)
        said = describe(model, subject.text.tokenizer, targets, DETAIL, subject.reference_pixels[0])
        right: dict[str, list[bool]] = {}
        if exam.is_composed:
            for label, classes in (exam.world.content_classes | exam.world.style_classes).items():
                true = [classes[i] for i in targets.labels[label].tolist()]
                right[label] = [names(answer, label, name) for answer, name in zip(said, true, strict=True)]
        else:
            right["content"] = [caption in answer for answer, caption in zip(said, targets.captions, strict=True)]
        scores = {name: torch.tensor(values).float() for name, values in right.items()}
        examples = list(zip(said, targets.detailed, strict=True))[:_SHOWN]
        card[split] = exam.figures(scores, exam.clusters(split, targets)) | {"examples": examples}
    return card


# All together


def measure(
    family: Path,
    out: Path,
    world: World,
    *,
    count: int,
    seed: int,
    num_inference_steps: int,
    parts: tuple[str, ...],
    guidance_scale: float = 0.0,
) -> Path:
    """Judges the family and writes the scorecard into `out`; gives its path. Raises InputError.

    Figures are over up to `count` pictures of each split, those of the splice over up to `count` triplets of both; its
    settings are compared on other triplets, at most 128, and on a CPU a quarter of `count`.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise InputError(f"parts {', '.join(unknown)}: not known; choose from {', '.join(PARTS)}")
    if count < 8 or num_inference_steps < 1 or guidance_scale < 0:
        raise InputError(
            f"count {count} must be at least 8, steps {num_inference_steps} at least 1, guidance {guidance_scale} not"
            " negative"
        )
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = Subject.load(
        Path(family), world.size, seed, device, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
    )
    exam = Exam(subject, world, count)
    table_count = min(_TABLE_COUNT, count if device.type == "cuda" else max(8, count // 4))
    card = _conditions(exam)
    work: dict[str, Callable[[], Card]] = {
        "judges": lambda: measure_judges(exam),
        "vae": lambda: measure_vae(exam, out),
        "text": lambda: measure_text(exam, out),
        "vl": lambda: measure_vl(exam),
        "splice": lambda: measure_splice(exam, out, table_count),
    }
    card["seconds"]["loading"] = round(time.perf_counter() - started, 1)
    for name, do in work.items():
        if name != "judges" and name not in parts:
            continue
        begun = time.perf_counter()
        with torch.no_grad():
            card[name] = do()
        card["seconds"][name] = round(time.perf_counter() - begun, 1)
        for line in sheets.part_lines(name, card[name]):
            print(line, flush=True)
        print(f"{name}: {card['seconds'][name]:.0f} s", flush=True)
        card["figures"] = family_figures(card)
        card["seconds"]["all"] = round(time.perf_counter() - started, 1)
        # After every part: who stops it keeps what was measured.
        write_json(out / "scorecard.json", card)
        write_text(out / "scorecard.md", sheets.write_table(card))
    for name, figure in card["figures"].items():
        print(sheets.figure_line(name, figure), flush=True)
    return out / "scorecard.json"


def _conditions(exam: Exam) -> Card:
    """Under which a family is measured."""
    subject = exam.subject
    return {
        "family": subject.about,
        "training_seeds": subject.training_seeds,
        "world": exam.world.name,
        "size": subject.size,
        "count": exam.count,
        "retrieval_pool": min(RETRIEVAL_POOL, exam.count),
        "seed": subject.seed,
        "num_inference_steps": subject.settings.num_inference_steps,
        "shift": subject.settings.shift,
        "guidance_scale": subject.settings.guidance_scale,
        "machine": torch.cuda.get_device_name() if subject.device.type == "cuda" else platform.machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "seconds": {},
    }


def family_figures(scorecard: Card) -> Card:
    """The figures that decide whether a family is good, of the parts that were measured: value, threshold, reached."""
    found: Card = {}
    for split in ("held", "unseen"):
        plain = scorecard.get("text", {}).get(split, {}).get("plain", {})
        # A folder's unseen contents have names that no model has read.
        known = (("top5", 0.5),) if split == "held" else ()
        for name, threshold in (("kind", 0.90), ("count", 0.95), ("place", 0.95), *known):
            if name in plain:
                found[f"text-only {name}, {split}"] = _decides(plain[name], threshold)
    for split, figures in scorecard.get("vae", {}).items():
        found[f"VAE PSNR, {split}"] = _decides(figures["psnr"], 30.0)
    for split, figures in scorecard.get("vl", {}).items():
        for name in ("kind", "background"):
            if name in figures:
                found[f"VL names {name}, {split}"] = _decides(figures[name], 0.90)
    return found | (_splice_figures(scorecard["splice"]) if "splice" in scorecard else {})


def _splice_figures(splice: Card) -> Card:
    alone, entangled = splice["alone"], splice["entangled"]
    main = next(name for name in alone["splice"] if name.startswith("reference_"))
    # Raw VL where it looks best: its own best of the table is noise where all of them are near chance.
    same = min(("", "_same_setting"), key=lambda name: alone[f"splice_minus_raw{name}"]["mean"])
    less, noise = alone[f"splice_minus_raw{same}"], alone[f"high_frequency_raw_minus_splice{same}"]
    # Clearly more: the interval is above 0, and a tenth of what the splice's pictures have.
    is_noisy = noise["low"] > 0 and noise["mean"] >= 0.1 * alone["splice"]["high_frequency"]["mean"]
    style, leak = entangled["style_rise"], entangled["leak_rise"]
    by_split = {
        f"splice alone, {main}, {split}": _decides(card["splice"][main], 0.5)
        for split, card in splice["alone_by_split"].items()
    }
    return by_split | {
        f"splice alone, {main}, triplets": _decides(alone["splice"][main], 0.5),
        f"raw VL below the splice, {main}, or clearly noisier": _decides(less, 0.15, less["mean"] >= 0.15 or is_noisy),
        "raw VL's high-frequency share above the splice's": _decides(noise, 0.0, is_noisy),
        "splice with a neutral prompt, style cosine above text-only": _decides(entangled["style_above_text_only"], 0.2),
        "style rises along the strength": _decides(style, 0.0, style["low"] > 0),
        "leak rises along the strength": _decides(leak, 0.0, leak["low"] > 0),
    }


def _decides(figure: Card, threshold: float, reached: bool | None = None) -> Card:
    known = {key: value for key, value in figure.items() if key != "true_pictures"}
    return known | {"threshold": threshold, "reached": figure["mean"] >= threshold if reached is None else reached}
