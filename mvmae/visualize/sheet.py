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
    marks: Sequence[Sequence[bool] | None] = (),
    bars: Sequence[tuple[str, str] | None] = (),
    legend: Sequence[tuple[str, tuple[int, int, int]]] = (),
) -> Image.Image:
    """Put images into a grid with a title over each column, and colour bars, a legend and a note below.

    Text is broken into lines where it is wider than its column or the sheet.

    Args:
        columns: images (C, H, W) in [0, 1], as many in each column; those of a row may differ in size.
        titles: one for each column.
        note: text at the bottom.
        min_width: small images are enlarged by a whole number until they are this wide, in pixels.
        marks: for each column None, or for each image whether it is right: a tick and a green frame, a cross and a red one.
        bars: for each column None, or what the darkest and the lightest colour of `heat_colours` stand for.
        legend: names and the colours, red, green and blue in [0, 255], that stand for them.
    """
    nearest = Image.Resampling.NEAREST
    tiles = [
        [ImageOps.scale(tile, max(-(-min_width // tile.width), 1), nearest) for tile in map(to_pillow, column)]
        for column in columns
    ]
    widths = [max(tile.width for tile in column) for column in tiles]
    lefts = _starts(widths, GAP)
    font: Any = ImageFont.load_default(size=max(MIN_TEXT, lefts[-1] // LETTERS))
    headings = [_wrapped(title, font, width) for title, width in zip(titles, widths, strict=True)]
    above = _words(headings, lefts, lefts[-1], font)
    tops = _starts([max(tile.height for tile in row) for row in zip(*tiles, strict=True)], above.height)
    below = [_bars(bars, lefts, widths, font), _legend(legend, lefts[-1], font)]
    below += [_words([_wrapped(note, font, lefts[-1] - 2 * GAP)], [GAP], lefts[-1], font)] if note else []
    ends = list(accumulate((part.height for part in below), initial=tops[-1]))
    sheet = Image.new("RGB", (lefts[-1], ends[-1]), "white")
    for part, top in zip([above, *below], [0, *ends], strict=False):
        sheet.paste(part, (0, top))
    for left, column, marked in zip_longest(lefts[:-1], tiles, marks):
        for top, tile, right in zip_longest(tops[:-1], column, marked or ()):
            sheet.paste(tile, (left, top))
            if right is not None:
                _mark(ImageDraw.Draw(sheet), (left, top, left + tile.width - 1, top + tile.height - 1), right, font.size)
    return sheet


def heat_colours(heat: Tensor) -> Tensor:
    """Colour heat (..., H, W) in [0, 1] from black over red and yellow to white: (..., 3, H, W)."""
    return torch.stack([(3 * heat - step).clamp(0, 1) for step in range(3)], dim=-3)


def to_pillow(image: Tensor) -> Image.Image:
    """Turn one image (C, H, W) in [0, 1] into a Pillow one: RGB from three or more channels, grey from fewer."""
    channels = image[:3] if len(image) >= 3 else image[:1]
    pixels = channels.mul(255).round().byte().permute(1, 2, 0).contiguous().cpu()
    mode = "RGB" if pixels.shape[2] == 3 else "L"
    return Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist())).convert("RGB")


def _starts(sizes: Sequence[int], first: int) -> list[int]:
    """Return where things of these sizes start, one after the other, and where the next would."""
    return list(accumulate((size + GAP for size in sizes), initial=first))


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


def _line(font: Any) -> int:
    return int(sum(font.getmetrics())) + 1


def _words(texts: Sequence[Sequence[str]], lefts: Sequence[int], width: int, font: Any) -> Image.Image:
    """Write texts side by side."""
    strip = Image.new("RGB", (width, GAP + _line(font) * max(map(len, texts))), "white")
    draw = ImageDraw.Draw(strip)
    for left, lines in zip(lefts, texts, strict=False):
        for number, line in enumerate(lines):
            draw.text((left, GAP // 2 + number * _line(font)), line, fill="black", font=font)
    return strip


def _bars(bars: Sequence[tuple[str, str] | None], lefts: Sequence[int], widths: Sequence[int], font: Any) -> Image.Image:
    """Draw the colours of `heat_colours` below columns, dark at the left, with what both ends stand for."""
    strip = Image.new("RGB", (lefts[-1], font.size + _line(font) + GAP if any(bars) else 0), "white")
    draw = ImageDraw.Draw(strip)
    for bar, left, width in zip(bars, lefts, widths, strict=False):
        if bar:
            colours = heat_colours(torch.linspace(0, 1, width).expand(font.size, -1))
            strip.paste(to_pillow(colours), (left, 0))
            draw.rectangle((left, 0, left + width - 1, font.size - 1), outline="black")
            draw.text((left, font.size), bar[0], fill="black", font=font)
            draw.text((left + width, font.size), bar[1], fill="black", font=font, anchor="ra")
    return strip


def _legend(legend: Sequence[tuple[str, tuple[int, int, int]]], width: int, font: Any) -> Image.Image:
    """Draw a square of each colour with its name, in as many lines as it takes."""
    places, left, top = [], GAP, 0
    for name, _ in legend:
        taken = round(1.5 * font.size + font.getlength(name)) + font.size
        left, top = (GAP, top + _line(font)) if left > GAP and left + taken > width else (left, top)
        places.append((left, top))
        left += taken
    strip = Image.new("RGB", (width, top + _line(font) + GAP if legend else 0), "white")
    draw = ImageDraw.Draw(strip)
    for (name, colour), (left, top) in zip(legend, places, strict=True):
        draw.rectangle((left, top + 3, left + font.size, top + 3 + font.size), fill=colour, outline="black")
        draw.text((left + 1.5 * font.size, top), name, fill="black", font=font)
    return strip


def _mark(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], right: bool, side: int) -> None:
    """Frame a tile, and put a tick or a cross, which need no colour, into its corner."""
    colour, (x, y) = RIGHT if right else WRONG, box[:2]
    draw.rectangle(box, outline=colour, width=GAP)
    draw.rectangle((x, y, x + side + 4, y + side + 4), fill=colour)
    strokes = [((0.2, 0.6), (0.4, 0.8), (0.85, 0.25))] if right else [((0.2, 0.2), (0.8, 0.8)), ((0.8, 0.2), (0.2, 0.8))]
    for stroke in strokes:
        draw.line([(x + 2 + a * side, y + 2 + b * side) for a, b in stroke], fill="white", width=max(side // 7, 2))
