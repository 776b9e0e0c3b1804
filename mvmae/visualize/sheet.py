"""Images in a grid, with what a reader must know written on it.

Shapes: C channels, H x W pixels.
"""

from collections.abc import Sequence
from itertools import accumulate, zip_longest
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

GAP = 4
"""Pixels between tiles."""
RIGHT, WRONG = "#1a7f37", "#cf222e"
"""Colours of the marks: green, with a tick, and red, with a cross."""
MIN_TEXT, LETTERS = 16, 64
"""Smallest height of text in pixels; on wide sheets it is the width divided by LETTERS, since a browser shrinks the sheet."""


def contact_sheet(
    columns: Sequence[Sequence[Tensor] | Tensor],
    titles: Sequence[str],
    note: str = "",
    *,
    min_width: int = 160,
    captions: Sequence[Sequence[str]] = (),
    marks: Sequence[Sequence[bool] | None] = (),
    bar: tuple[str, str] | None = None,
    legend: Sequence[tuple[str, tuple[int, int, int]]] = (),
) -> Image.Image:
    """Put images into a grid with a title over each column, and a colour bar, a legend and a note below.

    Titles and note are broken into lines where they are wider than their place.

    Args:
        columns: images (C, H, W) in [0, 1]; those of a row may differ in size.
        titles: one for each column; it may reach over those after it whose own is empty.
        note: text at the bottom.
        min_width: small images are enlarged by a whole number until they are this wide, in pixels.
        captions: for each column one line below each image.
        marks: for each column None, or for each image whether it is right: a tick and a green frame, a cross and a red one.
        bar: what the darkest and the lightest colour of `heat_colours` stand for.
        legend: names and the colours, red, green and blue in [0, 255], that stand for them.
    """
    tiles = [[_enlarged(to_pillow(image), min_width) for image in column] for column in columns]
    widths = [max(tile.width for tile in column) for column in tiles]
    lefts = list(accumulate((width + GAP for width in widths), initial=GAP))
    font: Any = ImageFont.load_default(size=max(MIN_TEXT, lefts[-1] // LETTERS))
    line = int(sum(font.getmetrics())) + 1
    rows = [max(tile.height for tile in row if tile) for row in zip_longest(*tiles)]

    ends = [
        next((left for left, title in zip(lefts[n:], titles[n:], strict=False) if title), lefts[-1])
        for n in range(1, len(tiles) + 1)
    ]
    headings = [_wrapped(title, font, end - left - GAP) for title, left, end in zip(titles, lefts[:-1], ends, strict=True)]
    below = [_bar(*bar, lefts[-1], font)] if bar else []
    below += [_legend(legend, lefts[-1], font)] if legend else []
    below += [_written(_wrapped(note, font, lefts[-1] - 2 * GAP), lefts[-1], font)] if note else []
    top = GAP + line * max(map(len, headings))
    tops = list(accumulate((height + line * bool(captions) + GAP for height in rows), initial=top))
    sheet = Image.new("RGB", (lefts[-1], tops[-1] + sum(part.height for part in below)), "white")
    draw = ImageDraw.Draw(sheet)
    for left, lines, column, said, marked in zip_longest(lefts[:-1], headings, tiles, captions, marks):
        for number, text in enumerate(lines):
            draw.text((left, GAP // 2 + number * line), text, fill="black", font=font)
        for y, tile, text, right in zip_longest(tops[: len(column)], column, said or (), marked or ()):
            sheet.paste(tile, (left, y))
            if text:
                draw.text((left, y + tile.height), text, fill="black", font=font)
            if right is not None:
                _mark(draw, (left, y, left + tile.width - 1, y + tile.height - 1), right, font.size)
    for part, y in zip(below, accumulate((part.height for part in below), initial=tops[-1]), strict=False):
        sheet.paste(part, (0, y))
    return sheet


def heat_colours(heat: Tensor) -> Tensor:
    """Colour heat (..., H, W) in [0, 1] from black over red and yellow to white: (..., 3, H, W)."""
    return torch.stack([(3 * heat - step).clamp(0, 1) for step in range(3)], dim=-3)


def to_pillow(image: Tensor) -> Image.Image:
    """Turn one image (C, H, W) in [0, 1] into a Pillow one: RGB from three or more channels, grey from fewer."""
    channels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    pixels = channels.mul(255).round().byte().permute(1, 2, 0).contiguous().cpu()
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist()))


def _enlarged(tile: Image.Image, min_width: int) -> Image.Image:
    return ImageOps.scale(tile, max(-(-min_width // tile.width), 1), Image.Resampling.NEAREST)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Break text into lines at its line ends, between words, behind `:-_/`, or else inside a word wider than ``width``."""
    lines = []
    for line in text.split("\n"):
        while font.getlength(line) > width and len(line) > 1:
            fits = max((n for n in range(1, len(line)) if font.getlength(line[:n]) <= width), default=1)
            cut = max(line.rfind(" ", 0, fits + 1), *(line.rfind(mark, 0, fits) for mark in ":-_/")) + 1 or fits
            lines.append(line[:cut].rstrip())
            line = line[cut:].lstrip()
        lines.append(line)
    return lines


def _strip(width: int, lines: int, font: Any) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """Return white paper for lines of text, what draws on it, and the height of a line."""
    line = int(sum(font.getmetrics())) + 1
    strip = Image.new("RGB", (width, lines * line + GAP), "white")
    return strip, ImageDraw.Draw(strip), line


def _written(lines: Sequence[str], width: int, font: Any) -> Image.Image:
    strip, draw, line = _strip(width, len(lines), font)
    for number, text in enumerate(lines):
        draw.text((GAP, GAP // 2 + number * line), text, fill="black", font=font)
    return strip


def _bar(low: str, high: str, width: int, font: Any) -> Image.Image:
    """Draw the colours of `heat_colours`, dark at the left, between what both ends stand for."""
    strip, draw, line = _strip(width, 1, font)
    left, right = round(font.getlength(low)) + 2 * GAP, width - round(font.getlength(high)) - 2 * GAP
    colours = heat_colours(torch.linspace(0, 1, max(right - left, 1)).expand(line, -1))
    strip.paste(to_pillow(colours), (left, 0))
    draw.rectangle((left, 0, right - 1, line - 1), outline="black")
    draw.text((GAP, 0), low, fill="black", font=font)
    draw.text((width - GAP, 0), high, fill="black", font=font, anchor="ra")
    return strip


def _legend(legend: Sequence[tuple[str, tuple[int, int, int]]], width: int, font: Any) -> Image.Image:
    """Draw a square of each colour with its name, in columns of the width of the longest name."""
    wide = round(2 * font.size + max(font.getlength(name) for name, _ in legend)) + GAP
    across = max((width - GAP) // wide, 1)
    strip, draw, line = _strip(width, -(-len(legend) // across), font)
    for number, (name, colour) in enumerate(legend):
        x, y = GAP + number % across * wide, number // across * line
        draw.rectangle((x, y + 3, x + font.size, y + 3 + font.size), fill=colour, outline="black")
        draw.text((x + 1.5 * font.size, y), name, fill="black", font=font)
    return strip


def _mark(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], right: bool, side: int) -> None:
    """Frame a tile, and put a tick or a cross, which need no colour, into its corner."""
    colour, (x, y) = RIGHT if right else WRONG, box[:2]
    draw.rectangle(box, outline=colour, width=GAP)
    draw.rectangle((x, y, x + side + 4, y + side + 4), fill=colour)
    strokes = [((0.2, 0.6), (0.4, 0.8), (0.85, 0.25))] if right else [((0.2, 0.2), (0.8, 0.8)), ((0.8, 0.2), (0.2, 0.8))]
    for stroke in strokes:
        draw.line([(x + 2 + a * side, y + 2 + b * side) for a, b in stroke], fill="white", width=max(side // 7, 2))
