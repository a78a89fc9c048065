"""Pictures side by side in one labelled sheet: what comparisons and previews show."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

_MARGIN, _LABEL, CELL = 8, 24, 192


def draw_grid(labels: Sequence[str], prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in equal cells, column labels on top and each row's prompt above it."""
    font = ImageFont.load_default(size=14)
    stride_x, stride_y = CELL + _MARGIN, CELL + _LABEL + _MARGIN
    size = (_MARGIN + stride_x * len(labels), _LABEL + 2 * _MARGIN + stride_y * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        draw.text((_MARGIN + column * stride_x + CELL / 2, _MARGIN), label, fill="black", font=font, anchor="ma")
    for row, pictures in enumerate(rows):
        top = _LABEL + _MARGIN + row * stride_y
        draw.text((_MARGIN, top), prompts[row], fill="#666666", font=font)
        for column, picture in enumerate(pictures):
            fitted = ImageOps.pad(picture, (CELL, CELL), Image.Resampling.LANCZOS, color="white")
            sheet.paste(fitted, (_MARGIN + column * stride_x, top + _LABEL))
    return sheet
