"""What people look at: labelled sheets of pictures, and a scorecard as a Markdown table."""

from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ztrain.sampling.sheet import draw_grid

_CELL, _LABEL, _MARGIN = 128, 32, 8


def draw_columns(
    labels: Sequence[str], columns: Sequence[Sequence[Image.Image]], prompts: Sequence[str] | None = None
) -> Image.Image:
    """Columns of pictures under their labels; as many rows as the shortest column has."""
    rows = list(zip(*columns, strict=False))
    return draw_grid(labels, [""] * len(rows) if prompts is None else list(prompts)[: len(rows)], rows)


def draw_contact(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 8) -> Image.Image:
    """A contact sheet: every picture above its own caption, which is cut after two lines."""
    font = ImageFont.load_default(size=11)
    rows = -(-len(pictures) // columns)
    stride_x, stride_y = _CELL + _MARGIN, _CELL + _LABEL + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + stride_x * min(columns, len(pictures)), _MARGIN + stride_y * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=False)):
        row, column = divmod(number, columns)
        left, top = _MARGIN + column * stride_x, _MARGIN + row * stride_y
        sheet.paste(ImageOps.pad(picture, (_CELL, _CELL), Image.Resampling.LANCZOS, color="white"), (left, top))
        draw.multiline_text(
            (left, top + _CELL + 2), _two_lines(caption, draw, font), fill="#444444", font=font, spacing=1
        )
    return sheet


def _two_lines(text: str, draw: ImageDraw.ImageDraw, font: Any) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= _CELL:
            lines[-1] = longer
        elif len(lines) == 2:
            lines[-1] = lines[-1][:-1] + "…"
            break
        else:
            lines.append(word)
    return "\n".join(lines)


def figure_line(name: str, figure: dict[str, Any]) -> str:
    """One of the deciding figures as a sentence."""
    verdict = "reached" if figure["reached"] else "NOT reached"
    return f"{name}: {_interval(figure)}, n {_count(figure)}, threshold {figure['threshold']:g}: {verdict}"


def part_lines(name: str, card: dict[str, Any]) -> Iterator[str]:
    """The means of a part, a line for each of its splits."""
    for path, figures in _tables(name, card):
        means = ", ".join(f"{key} {figure['mean']:.3f}" for key, figure in figures.items())
        yield f"{path}: {means}"


def write_table(card: dict[str, Any]) -> str:
    """A scorecard as Markdown."""
    return "\n".join(_lines(card)) + "\n"


def _lines(card: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {number}" for name, number in card["versions"].items())
    yield f"# Scorecard: {card['world']}, family of seed {' and '.join(map(str, card['training_seeds']))}"
    yield ""
    yield (
        f"count {card['count']}, seed {card['seed']}, {card['num_inference_steps']} steps, shift {card['shift']:g},"
        f" guidance {card['guidance_scale']:g}; {card['machine']}, {versions}; {card['seconds']['all']:g} s."
        " Means over n pictures with 95 % bootstrap intervals; in brackets what is drawn anew where pictures share it."
    )
    yield from ["", "| deciding figure | value | n | threshold | reached |", "|---|---|---|---|---|"]
    for name, figure in card["figures"].items():
        reached = "yes" if figure["reached"] else "no"
        yield f"| {name} | {_interval(figure)} | {_count(figure)} | {figure['threshold']:g} | {reached} |"
    yield from ["", "| part | figure | value | n | judge on true pictures |", "|---|---|---|---|---|"]
    for part in ("judges", "vae", "text", "vl"):
        for path, figures in _tables(part, card.get(part, {})):
            yield from _figure_rows(path, figures)
    if "splice" in card:
        yield from _splice_lines(card["splice"])


def _tables(path: str, card: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every set of figures inside a part, with its place there."""
    if figures := _figures(card):
        yield path, figures
    for name, value in card.items():
        if isinstance(value, dict) and "mean" not in value:
            yield from _tables(f"{path}, {name}", value)


def _figures(card: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in card.items() if isinstance(value, dict) and "mean" in value}


def _figure_rows(part: str, figures: dict[str, Any]) -> Iterator[str]:
    for name, figure in figures.items():
        yield f"| {part} | {name} | {_interval(figure)} | {_count(figure)} | {_beside(figure)} |"


def _splice_lines(splice: dict[str, Any]) -> Iterator[str]:
    yield from ["", "## The splice", ""]
    yield f"Settings are compared on {splice['table_count']} triplets, the chosen measured on {splice['count']} others."
    yield from ["", "| choice | setting | figure | value | n | judge on true pictures |", "|---|---|---|---|---|---|"]
    for group, choices in (
        ("alone", splice["alone"]),
        ("neutral prompt", splice["entangled"]),
        ("best", splice["best"]),
        *((f"alone, {split}", choices) for split, choices in splice["alone_by_split"].items()),
    ):
        for name, choice in choices.items():
            if isinstance(choice, dict) and "setting" in choice:
                yield from _figure_rows(f"{group}: {name} | {choice['name']}", _figures(choice))
            elif isinstance(choice, dict):
                yield f"| {group}: {name} | | paired difference | {_interval(choice)} | {_count(choice)} | |"
    yield from ["", f"Rule of the best setting: {splice['best']['rule']}.", ""]
    names = list(splice["rows"][0]["figures"])
    yield f"All settings, on {splice['table_count']} triplets; the last row is the judges on true pictures."
    yield ""
    yield "| model | prompt | states | compose | tokens | layer | strength | " + " | ".join(names) + " |"
    yield "|---" * (7 + len(names)) + "|"
    for row in splice["rows"]:
        keys = ("model", "prompt", "states", "compose", "tokens", "hidden_index", "strength")
        words = [str(row[key]) for key in keys] if row["model"] != "text" else ["text", row["prompt"], *[""] * 4, "0"]
        yield "| " + " | ".join([*words, *(_short(row["figures"][name]) for name in names)]) + " |"
    beside = [_beside(splice["rows"][0]["figures"][name]) for name in names]
    yield "| " + " | ".join(["true pictures", *[""] * 6, *beside]) + " |"


def _interval(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _count(figure: dict[str, Any]) -> str:
    """Pictures, and the groups of them that an interval draws together."""
    shared = figure["groups"] < figure["count"]
    return f"{figure['count']} ({figure['groups']} {figure['groups_of']})" if shared else str(figure["count"])


def _short(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:.2f} ±{(figure['high'] - figure['low']) / 2:.2f}"


def _beside(figure: dict[str, Any]) -> str:
    return "" if figure.get("true_pictures") is None else f"{figure['true_pictures']:.3f}"
