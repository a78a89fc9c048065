"""The page docs/findings/diversity.md as data: what it asks, by which rule an option wins, and its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.attention_mass import KINDS
from benchmarks.pages import cell, devices
from ztrain.mini.exam import CONTENT_LOSS

NAME = "diversity"
FIGURES = (
    "structure_diversity", "style_diversity", "style_second_diversity", "pixel_distance", "distinct_contents",
    "distinct_kind", "distinct_count", "distinct_place", "style_cosine", "style_second_cosine", "prompt_content",
    "reference_content", "high_frequency",
)  # fmt: skip
"""Of diversity_study.py's scores, of rows."""
OPTION_FIGURES = (
    "structure_diversity", "style_diversity", "style_second_diversity", "pixel_distance", "distinct_contents",
    "style_cosine", "prompt_content", "reference_content",
)  # fmt: skip
"""And of options."""
STYLE_LOSS = 0.05
"""How much style cosine an option may cost."""
_LAYERS = range(1, 7)

_ADAPTERS = {
    "siglip": "[siglip]",
    "siglip_lora": "[siglip, lora]",
    "projector": "[projector]",
    "splice_lora": "[splice, lora]",
    "lora": "[lora], sees no reference",
}
_ALONE = {f"alone-{layer}": f"splice, layer {layer}, image alone" for layer in _LAYERS}
_BESIDE = {f"beside-{layer}": f"splice, layer {layer}, beside the prompt" for layer in _LAYERS}
ROWS = (
    {
        "painter-any": "the painter: the content, any style",
        "painter-one": "the painter: the content, the reference's style",
        "text": "text only",
        "text-promptless": "neither prompt nor reference",
    }
    | _ALONE
    | _BESIDE
    | _ADAPTERS
    | {f"{name}-blind": f"{label}, no reference" for name, label in _ADAPTERS.items() if name != "lora"}
)
"""Label by name."""
_SHOWN_LISTS = ("text", "alone-1", "alone-3", "alone-5", "alone-6", "beside-5", "siglip", "siglip_lora", "projector")
_SHOWN_OPTIONS = (
    "plain", "late-0.98", "late-0.95", "late-0.92", "late-0.78", "late-1-guided-1", "late-0.78-guided-1",
    "late-1-guided-2", "late-0.92-guided-2", "late-0.88-guided-2", "late-0.78-guided-2", "early-0.7", "scale-0.5",
    "scale-0.25", "annealed-0.75", "noise-0.25", "tokens-0.75", "pads-0", "pads-4", "newline-0", "reply-0", "sinks-0",
    "sinks-4", "pads-0-0.92",
)  # fmt: skip
"""On the page; the others are in the result file."""
WATCHED = {"text": "text only"} | _ALONE | _BESIDE | _ADAPTERS


@dataclass(frozen=True, slots=True)
class Base:
    """What options are tried on. `content`: the figure of the content that must stay."""

    label: str
    content: str


BASES = {
    "alone-5": Base(label=ROWS["alone-5"], content="reference_content"),
    "beside-5": Base(label=ROWS["beside-5"], content="prompt_content"),
    "siglip_lora": Base(label=ROWS["siglip_lora"], content="prompt_content"),
}
RULE = (
    "The rule, stated before these pairs were drawn: an option is chosen on the first half of them, the one with the"
    f" largest gain in structure among those that lose at most {STYLE_LOSS:.2f} of style cosine and {CONTENT_LOSS:.2f}"
    " of content there; it wins if on the second half the gain's interval is above 0 and neither loss's interval goes"
    " further than that."
)


def choose(rows: Sequence[Mapping[str, Any]], content: str) -> dict[str, str | None]:
    """By RULE: the option that is `chosen` on the first half, and whether it is the `winner` on the second."""
    allowed = {"style_cosine": STYLE_LOSS, content: CONTENT_LOSS}
    fit = [row for row in rows if row["on_first_half"]["structure_diversity"] > 0]
    fit = [row for row in fit if all(row["on_first_half"][name] >= -loss for name, loss in allowed.items())]
    if not fit:
        return {"chosen": None, "winner": None}
    best = max(fit, key=lambda row: row["on_first_half"]["structure_diversity"])
    differences = best["above_plain"]
    holds = differences["structure_diversity"]["low"] > 0
    holds = holds and all(differences[name]["low"] >= -loss for name, loss in allowed.items())
    return {"chosen": best["name"], "winner": best["name"] if holds else None}


def table(result: Mapping[str, Any]) -> str:
    """The page's tables."""
    plan, count = result["plan"], result["plan"]["pairs"]
    shown = [row for row in result["attention"] if row["name"] in _SHOWN_LISTS]
    parts = [
        _rows_table(result["rows"]),
        f"{count} held-out pairs of prompt and reference, each in a style of its own, {plan['seeds']} seeds, 12 steps"
        f" without guidance; {plan['pictures']:,} pictures in all. 95 % intervals over styles. Drawn on"
        f" {devices(result['machines'])}.",
        "What the picture's tokens give to the caption's and SigLIP's pads, in percent of their attention, by layer:",
        _attention_table(shown, ("pads",)),
        "The same in layer 1, by sigma:",
        _sigma_table(shown),
        "And to the reference's own tokens, text + image where there are both:",
        _attention_table(
            [row for row in shown if row["name"] != "text"],
            ("reference: text", "reference: image", "reference: SigLIP"),
        ),
        "Single tokens that get most, in multiples of what each would get if all were alike:",
        _sinks_table(shown),
        *(part for told in result["options"] for part in _options_parts(told, count)),
        RULE,
        f"The result file has all {len(result['attention'])} lists that were watched and all"
        f" {len(result['options'][0]['rows']) - 1} options, attention from all tokens instead of the picture's alone,"
        " and by sigma.",
    ]
    return "\n\n".join(parts)


def _lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "structure": "structure_diversity",
        "style": "style_diversity",
        "other style judge": "style_second_diversity",
        "pixels": "pixel_distance",
        "distinct contents": "distinct_contents",
        "style cosine": "style_cosine",
        "prompt's content": "prompt_content",
        "reference's content": "reference_content",
    }
    told = [[row["label"], *(cell(row["figures"][name]) for name in columns.values())] for row in rows]
    return _lines(["diversity over seeds", *columns], told)


def _attention_table(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    told = []
    for row in rows:
        shares = [[layer["from_picture"][kind] for kind in kinds] for layer in row["layers"]]
        present = [[share for share in of_layer if share["high"] > 0] or of_layer[:1] for of_layer in shares]
        told.append([row["label"], *(" + ".join(_percent(share) for share in of_layer) for of_layer in present)])
    return _lines(["", *(f"layer {layer}" for layer in _LAYERS)], told)


def _sigma_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means alone; the intervals over sigma are in the table before."""
    sigmas = list(rows[0]["layers"][0]["by_sigma"])
    place = KINDS.index("pads")
    told = [[row["label"], *(f"{100 * row['layers'][0]['by_sigma'][s][place]:.0f}" for s in sigmas)] for row in rows]
    return _lines(["", *(f"sigma {float(sigma):.2f}" for sigma in sigmas)], told)


def _percent(share: Mapping[str, float]) -> str:
    mean, low, high = (f"{100 * share[key]:.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _sinks_table(rows: Sequence[Mapping[str, Any]]) -> str:
    told = []
    for row in rows:
        place, layer = max(enumerate(row["layers"], 1), key=lambda each: each[1]["largest"]["times"]["mean"])
        largest = layer["largest"]
        heads = [
            (head, f"{number}.{which}")
            for number, of in enumerate(row["layers"], 1)
            for which, head in enumerate(of["heads"], 1)
        ]
        sinks = sorted((each for each in heads if each[0]["sink"]), key=lambda each: -each[0]["times"])
        said = ", ".join(f"{where} {_token(head['name'])} {head['times']:.0f}" for head, where in sinks[:3])
        times = {key: largest["times"][key] for key in ("mean", "low", "high")}
        told.append(
            [
                row["label"],
                f"{_token(largest['name'])}, layer {place}",
                cell(times),
                f"{len(sinks)} of {len(heads)}",
                said,
            ]
        )
    return _lines(
        ["", "token, mean of heads", "times", "heads with one above 10", "the largest: layer.head, token, times"], told
    )


def _token(name: str) -> str:
    """A bar would end its cell, even in code."""
    return "`" + name.replace("|", "\\|") + "`"


def _options_parts(told: Mapping[str, Any], count: int) -> list[str]:
    content = BASES[told["name"]].content
    columns = {"structure": "structure_diversity", "style diversity": "style_diversity", "style cosine": "style_cosine"}
    columns |= {"content": content}
    rows = []
    shown = {*_SHOWN_OPTIONS, told["chosen"]}
    for row in told["rows"]:
        if row["name"] not in shown:
            continue
        is_plain = row["name"] == "plain"
        label = f"**{row['label']}**" if row["name"] == told["chosen"] else row["label"]
        cells = [cell(row["figures" if is_plain else "above_plain"][name]) for name in columns.values()]
        rows.append([label, *cells])
    found = "nothing is chosen"
    if told["chosen"]:
        found = "the chosen one, bold, " + ("wins" if told["winner"] else "does not hold on these pairs")
    whose = "the reference's" if content == "reference_content" else "the prompt's"
    head = (
        f"Options on **{told['label']}**, on the second {count - count // 2} pairs: the first row is it as it is, all"
        f" others are differences to that; content is {whose}; {found}."
    )
    return [head, _lines(["", *columns], rows)]
