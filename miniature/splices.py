"""What comes through the zero-shot splice: a reference alone at every layer, spliced and raw, and beside a prompt.

In comes an exam; out come the scores of every setting (layer, tokens, way to compose, strength) on some triplets, and
of the chosen ones on others. A triplet is a target of content A in style S, a reference of content B in style S, and
the prompt A. Everything runs through the real SplicedModel, one reference at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from miniature import sheets
from miniature.exam import CONTENT_LOSS, Card, Clusters, Exam, Scores, most_style, score_pictures
from miniature.gallery import Gallery, Split
from miniature.subject import to_pictures
from ztrain.adapters import build_adapters
from ztrain.adapters.splice import SpliceConfig
from ztrain.conditioning import Encoded, TokenStates
from ztrain.config import EncodersConfig
from ztrain.frozen.vision_language import SplicedModel
from ztrain.io.drawn import save_picture
from ztrain.model.adapted_dit import AdaptedDiT

STRENGTHS = (0.1, 0.25, 0.5, 1.0)
"""Besides 0, which is text-only."""
ALPHAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
NEUTRAL = "a picture"
_SHOWN = 8  # rows of a sheet
_TOKENS: tuple[Literal["all"], Literal["image"], Literal["text"]] = ("all", "image", "text")
_PROMPTS: tuple[Literal["neutral"], Literal["content"]] = ("neutral", "content")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to read a reference. `strength`: the adapter's scale, or alpha of a blend; 0 = text-only."""

    model: Literal["text", "splice", "raw"]
    prompt: Literal["none", "neutral", "content"]
    states: Literal["reference", "fused"] = "reference"
    compose: Literal["replace", "concatenate", "blend"] = "concatenate"
    tokens: Literal["all", "image", "text"] = "image"
    hidden_index: int | None = None
    strength: float = 1.0

    def __str__(self) -> str:
        if self.model == "text":
            return f"text-only, {self.prompt} prompt"
        return (
            f"{self.model} {self.states} {self.compose} tokens={self.tokens} layer={self.hidden_index}"
            f" strength={self.strength:g}, {self.prompt} prompt"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A setting's scores over all triplets, and its first pictures."""

    setting: Setting
    scores: Scores
    shown: Tensor

    def mean(self, name: str) -> float:
        return float(self.scores[name].mean())


class Triplets:
    """Some triplets, and the settings that were measured on them."""

    def __init__(
        self, exam: Exam, models: dict[str, SplicedModel], targets: Gallery, references: Gallery, clusters: Clusters
    ) -> None:
        self.exam, self.models, self.targets, self.references = exam, models, targets, references
        self.clusters = clusters
        self.shown = Clusters.contents(references, exam.contents)
        """By what the references show."""
        self.rows: dict[Setting, Row] = {}
        self.pictures = to_pictures(references.images)
        """The references, as the spliced model takes them."""
        texts = {"none": [""], "neutral": [NEUTRAL], "content": targets.captions}
        count = len(targets)
        self._texts = {name: exam.subject.encode(said) * (count // len(said)) for name, said in texts.items()}
        self._null_text = exam.subject.text.encode("")
        self._true = exam.judges.look(targets.images)
        self._states: dict[tuple[str, str, int], list[TokenStates]] = {}

    def __len__(self) -> int:
        return len(self.targets)

    def run(self, setting: Setting) -> Row:
        """Renders and judges one setting, once."""
        if setting in self.rows:
            return self.rows[setting]
        absent: list[TokenStates | None] = [None] * len(self)
        read: list[TokenStates | None] = absent if setting.model == "text" else [*self._read(setting)]
        encoded = Encoded(
            text=self._texts[setting.prompt],
            null_text=self._null_text,
            reference=read if setting.states == "reference" else absent,
            fused=read if setting.states == "fused" else absent,
            siglip=[[] for _ in self.targets.captions],
        )
        blends = setting.compose == "blend"
        config = SpliceConfig(
            states=setting.states,
            compose=setting.compose,
            tokens=setting.tokens,
            alpha=setting.strength if blends else 0.3,
        )
        model = AdaptedDiT(self.exam.subject.dit, build_adapters([] if setting.model == "text" else [config]))
        if setting.model != "text":
            model.set_scales([1.0 if blends else setting.strength])
        images = self.exam.subject.render(model, encoded)
        self.rows[setting] = Row(setting, self._score(images), images[:_SHOWN].cpu())
        return self.rows[setting]

    def _read(self, setting: Setting) -> list[TokenStates]:
        """Every reference, or with its prompt in one sequence, at the setting's layer; encoded once."""
        assert setting.hidden_index is not None
        key = (setting.model, setting.states, setting.hidden_index)
        if key not in self._states:
            low, high = self.exam.subject.reference_pixels
            whose: Literal["vl", "text_encoder"] = "vl" if setting.model == "raw" else "text_encoder"
            settings = EncodersConfig(
                hidden_index=setting.hidden_index,
                rope_theta=whose,
                marker_rows=whose,
                min_reference_pixels=low,
                max_reference_pixels=high,
            )
            prompts = self.targets.captions if setting.states == "fused" else [""] * len(self)
            model, pairs = self.models[setting.model], zip(self.pictures, prompts, strict=True)
            self._states[key] = [model.encode([picture], prompt, settings) for picture, prompt in pairs]
        return self._states[key]

    def _score(self, images: Tensor) -> Scores:
        exam = self.exam
        seen = exam.judges.look(images)
        return score_pictures(images, seen, self._true, self.targets.labels, self.references.labels, exam.contents)

    def best(self, name: str, among: Callable[[Row], bool]) -> Setting:
        """The setting of those that has the largest mean."""
        return max(filter(among, self.rows.values()), key=lambda row: row.mean(name)).setting

    def report(self, setting: Setting) -> Card:
        """A chosen setting with its figures."""
        return {"setting": asdict(setting), "name": str(setting)} | self.figures(self.run(setting))

    def figures(self, row: Row) -> Card:
        found: Card = {}
        for name, values in row.scores.items():
            found |= self.exam.figures({name: values}, self._clusters(name))
        return found

    def difference(self, name: str, ours: Setting, theirs: Setting) -> Card:
        """Paired."""
        return self._clusters(name).figure(self.run(ours).scores[name], self.run(theirs).scores[name])

    def _clusters(self, name: str) -> Clusters:
        """What of a reference's content comes through depends on that content, all else on what is asked for."""
        return self.shown if name.startswith(("reference_", "leak")) else self.clusters

    def say(self, what: str, settings: Sequence[Setting]) -> None:
        """Measures some settings; one line about the one with most style, and the most of what else comes through."""
        rows = [self.run(setting) for setting in settings]
        best = max(rows, key=lambda row: row.mean("style_cosine"))
        names = ("style_cosine", f"reference_{self.exam.main}", "prompt_content")
        figures = ", ".join(f"{name} <= {max(row.mean(name) for row in rows):.3f}" for name in names)
        print(f"splice, {what}: {figures} (most style: {best.setting})", flush=True)


def draw_triplets(exam: Exam, table: int, count: int) -> tuple[Triplets, Triplets]:
    """Triplets to compare settings on, up to `table`, and others to measure the chosen ones, up to `count`.

    Both have as many from each split, mixed; `table` yields where there are few.
    """
    splits: tuple[Split, ...] = ("held", "unseen") if exam.is_composed else ("held",)
    available = min(len(exam.pairs[split].targets) for split in splits)
    first = min(table // len(splits), available // 2)
    last = min(first + count // len(splits), available)
    models = {"splice": exam.subject.spliced(), "raw": exam.subject.raw()}

    def take(rows: range) -> Triplets:
        device = exam.subject.device
        chosen = torch.tensor(rows, device=device)
        targets = [exam.targets(split).select(chosen) for split in splits]
        references = _joined([exam.references(split).select(chosen) for split in splits])
        clusters = _apart([exam.clusters(*pair) for pair in zip(splits, targets, strict=True)])
        generator = torch.Generator().manual_seed(exam.subject.seed)
        mixed = torch.randperm(len(references), generator=generator).to(device)
        return Triplets(exam, models, _joined(targets).select(mixed), references.select(mixed), clusters.select(mixed))

    return take(range(first)), take(range(first, last))


def _joined(galleries: list[Gallery]) -> Gallery:
    return Gallery(
        images=torch.cat([gallery.images for gallery in galleries]),
        captions=[caption for gallery in galleries for caption in gallery.captions],
        clauses=[said for gallery in galleries for said in gallery.clauses],
        replies=[pair for gallery in galleries for pair in gallery.replies],
        labels={name: torch.cat([gallery.labels[name] for gallery in galleries]) for name in galleries[0].labels},
        styles=torch.cat([gallery.styles for gallery in galleries]),
    )


def _apart(parts: list[Clusters]) -> Clusters:
    """Of several splits' pictures in a row: those of two splits share nothing."""
    numbers: list[Tensor] = []
    for part in parts:
        numbers.append(part.numbers + (1 + int(numbers[-1].max()) if numbers else 0))
    return Clusters(of=" and ".join(part.of for part in parts), numbers=torch.cat(numbers))


def measure_splice(exam: Exam, out: Path, table_count: int) -> Card:
    """The image alone at every layer, spliced and raw; layers x strengths beside a prompt; then the chosen settings."""
    table, again = draw_triplets(exam, table_count, exam.count)
    layers = range(1, exam.subject.num_layers + 1)
    table.say("text-only", [Setting(model="text", prompt=prompt) for prompt in ("none", *_PROMPTS)])
    # The adapter at scale 0, which is text-only whatever it would read.
    zeros = [Setting(model="splice", prompt=prompt, hidden_index=1, strength=0.0) for prompt in _PROMPTS]
    table.say("strength 0", zeros)
    for layer in layers:
        table.say(f"alone, layer {layer}", list(_alone("splice", layer)))
        table.say(f"beside a prompt, layer {layer}", list(_beside_prompts(layer)))
    for layer in layers:
        table.say(f"raw VL alone, layer {layer}", list(_alone("raw", layer)))
    for setting in _best_layers(table)[:2]:
        blends = [replace(setting, compose="blend", strength=alpha) for alpha in ALPHAS]
        table.say(f"blend, layer {setting.hidden_index}", blends)
    for layer in layers:
        fused = Setting(
            model="splice", prompt="content", states="fused", compose="replace", tokens="all", hidden_index=layer
        )
        table.say(f"fused, layer {layer}", [fused])
    card = {
        "table_count": len(table),
        "count": len(again),
        "rows": [asdict(row.setting) | {"figures": table.figures(row)} for row in table.rows.values()],
        "alone": (alone := _alone_card(table, again)),
        "alone_by_split": _alone_by_split(table, Setting(**alone["splice"]["setting"])),
        "entangled": _entangled_card(table, again),
        "best": _best_card(table, again),
    }
    _draw(table, card, out)
    return card


def _alone(model: Literal["splice", "raw"], layer: int) -> Iterator[Setting]:
    """The image without a prompt."""
    for tokens in _TOKENS:
        yield Setting(model=model, prompt="none", compose="replace", tokens=tokens, hidden_index=layer)


def _beside_prompts(layer: int) -> Iterator[Setting]:
    for tokens in _TOKENS:
        for prompt in _PROMPTS:
            for strength in STRENGTHS:
                yield Setting(model="splice", prompt=prompt, tokens=tokens, hidden_index=layer, strength=strength)


def _best_layers(table: Triplets) -> list[Setting]:
    """Of each layer the setting that carries most style beside the content's prompt, the best layer first."""
    rows = filter(_is_choice, table.rows.values())
    best: dict[int | None, Setting] = {}
    for row in sorted(rows, key=lambda row: row.mean("style_cosine"), reverse=True):
        best.setdefault(row.setting.hidden_index, row.setting)
    return list(best.values())


def _is_choice(row: Row) -> bool:
    """Whether a setting may be the best one: with the content's prompt, and not text-only."""
    return row.setting.model == "splice" and row.setting.prompt == "content" and row.setting.strength > 0


def _alone_card(table: Triplets, again: Triplets) -> Card:
    main = f"reference_{table.exam.main}"
    alone = table.best(main, lambda row: row.setting.model == "splice" and row.setting.prompt == "none")
    raw = table.best(main, lambda row: row.setting.model == "raw")
    same = replace(alone, model="raw")
    return {
        "splice": again.report(alone),
        "raw": again.report(raw),
        "raw_same_setting": again.report(same),
        "splice_minus_raw": again.difference(main, alone, raw),
        "splice_minus_raw_same_setting": again.difference(main, alone, same),
        "high_frequency_raw_minus_splice": again.difference("high_frequency", raw, alone),
        "high_frequency_raw_minus_splice_same_setting": again.difference("high_frequency", same, alone),
        "text_only": again.report(Setting(model="text", prompt="none")),
        "text_only_content": again.report(Setting(model="text", prompt="content")),
    }


def _alone_by_split(table: Triplets, alone: Setting) -> Card:
    """The chosen setting on references of known contents and of unseen ones, and raw VL in the same setting.

    Triplets' references show unseen contents, because a style holds out one or two kinds of objects.
    """
    exam, raw = table.exam, replace(alone, model="raw")
    found: Card = {}
    for split in exam.pairs:
        if split == "unseen" and not exam.is_composed:
            continue  # nobody has read the words of its contents
        rows = torch.arange(len(exam.pairs[split].targets), device=exam.subject.device)[: exam.count // 2]
        # The other way round than in triplets: what was asked for is shown.
        references, targets = exam.targets(split).select(rows), exam.references(split).select(rows)
        shown = Triplets(exam, table.models, targets, references, exam.clusters(split, references))
        main = f"reference_{exam.main}"
        found[split] = {
            "splice": shown.report(alone),
            "raw": shown.report(raw),
            "splice_minus_raw": shown.difference(main, alone, raw),
        }
    return found


def _entangled_card(table: Triplets, again: Triplets) -> Card:
    """Beside a neutral prompt: whether style and content come together."""
    text = Setting(model="text", prompt="neutral")
    best = table.best(
        "style_cosine",
        lambda row: row.setting.model == "splice" and row.setting.prompt == "neutral" and row.setting.strength > 0,
    )
    along = [text, *(replace(best, strength=strength) for strength in STRENGTHS)]
    return {
        "best": again.report(best),
        "text_only": again.report(text),
        "style_above_text_only": again.difference("style_cosine", best, text),
        "strengths": [0.0, *STRENGTHS],
        "style_cosine": [again.run(setting).mean("style_cosine") for setting in along],
        "leak": [again.run(setting).mean("leak") for setting in along],
        "style_rise": again.difference("style_cosine", along[-1], text),
        "leak_rise": again.difference("leak", along[-1], text),
    }


def _best_card(table: Triplets, again: Triplets) -> Card:
    """Beside the content's prompt: the setting with most style, with and without a condition."""
    text = Setting(model="text", prompt="content")
    rows = list(filter(_is_choice, table.rows.values()))
    most, keeping = most_style(rows, table.run(text))
    free, kept = most.setting, None if keeping is None else keeping.setting
    return {
        "rule": (
            f"largest style cosine on {len(table)} triplets among settings with the content's prompt whose content"
            f" accuracy is at most {CONTENT_LOSS} below text-only; figures are of {len(again)} others"
        ),
        "keeping_content": None if kept is None else again.report(kept),
        "any": again.report(free),
        "text_only": again.report(text),
        "style_above_text_only": None if kept is None else again.difference("style_cosine", kept, text),
        "any_above_text_only": again.difference("style_cosine", free, text),
    }


def _draw(table: Triplets, card: Card, out: Path) -> None:
    references, targets = table.pictures[:_SHOWN], to_pictures(table.targets.images[:_SHOWN])
    for prompt, best in (("neutral", card["entangled"]["best"]), ("content", card["best"]["any"])):
        setting = Setting(**best["setting"])
        steps = ALPHAS if setting.compose == "blend" else STRENGTHS
        along = [replace(setting, strength=step) for step in steps] if setting.states == "reference" else [setting]
        text = next(s for s in table.rows if s.model == "text" and s.prompt == prompt)
        labels = ["reference", "text-only", *(f"strength {step.strength:g}" for step in along), "target"]
        columns = [references, *(to_pictures(table.rows[step].shown) for step in (text, *along)), targets]
        said = table.targets.captions if prompt == "content" else [NEUTRAL] * len(references)
        captions = [f"{words}   ({setting})" for words in said[:_SHOWN]]
        save_picture(sheets.draw_columns(labels, columns, captions), out / f"splice_{prompt}.png")
    alone = [Setting(**card["alone"][name]["setting"]) for name in ("splice", "raw")]
    columns = [references, *(to_pictures(table.rows[setting].shown) for setting in alone)]
    alone_sheet = sheets.draw_columns(["reference", "splice alone", "raw VL alone"], columns)
    save_picture(alone_sheet, out / "splice_alone.png")
