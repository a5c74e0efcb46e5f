"""Pictures for people: boxes with class names and scores, and contact sheets of captioned pictures.

Everything takes and gives `PIL.Image` in RGB. Text is set in DejaVu Sans, which matplotlib ships: anti-aliased and good
for Latin, Greek, Cyrillic and Arabic class names, which OpenCV's drawing would turn into question marks.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
XYXY = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the picture that is drawn on

MIN_SIDE = (
    400  # a picture with a shorter side is enlarged before it is drawn on, so that text does not hide its content
)
MAX_ENLARGEMENT = 8
MIN_FONT = 11  # pixels; smaller text cannot be read
INK, FAINT, PAPER, EMPTY = (32, 34, 38), (96, 100, 108), (255, 255, 255), (236, 238, 241)
GAP = 12  # pixels between the parts of a sheet


@dataclass(frozen=True)
class Mark:
    """A box to draw.

    Attributes:
        box: (x0, y0, x1, y1) in pixels of the original picture.
        label: text beside the box; "" draws the box alone.
        colour: of the line and the ground of the label, RGB 0-255.
        is_thin: half the line width, for what matters less.
    """

    box: XYXY
    label: str = ""
    colour: RGB = (230, 60, 60)
    is_thin: bool = False


@dataclass(frozen=True)
class Section:
    """Part of a contact sheet: pictures side by side in `columns` of equal width, each above its caption."""

    pictures: Sequence[Image.Image]
    captions: Sequence[str] = ()
    title: str = ""
    columns: int = 4


def class_colours(names: Sequence[str]) -> dict[str, RGB]:
    """A colour for each class, fixed by its position in the list.

    Neighbours lie a golden angle apart on the colour circle; lightness alternates, so that 80 classes stay apart.
    """
    colours = {}
    for index, name in enumerate(names):
        hue = (0.98 + index * 0.618034) % 1.0
        lightness = (0.50, 0.40, 0.60)[index % 3]
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
        colours[name] = (round(red * 255), round(green * 255), round(blue * 255))
    return colours


def draw_marks(image: Image.Image, marks: Sequence[Mark], *, min_side: int = MIN_SIDE) -> Image.Image:
    """Draw boxes and labels on a copy of a picture.

    Args:
        image: any mode; it is not changed.
        marks: drawn in this order, the most important ones last. Labels evade each other where they can.
        min_side: pixels; a picture with a shorter side is enlarged by a whole factor until it has this one (0: never).
    Returns: RGB picture, of the same size unless it was enlarged.
    """
    shorter = min(image.size)
    factor = min(MAX_ENLARGEMENT, max(1, -(-min_side // shorter)))
    drawn = image.convert("RGB")
    if factor > 1:
        drawn = drawn.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    shorter *= factor
    line = max(2, round(shorter * 0.006))
    font = load_font(max(MIN_FONT, round(shorter * 0.032)))
    pen = ImageDraw.Draw(drawn)
    boxes = [_pixels(mark.box, factor, drawn.size) for mark in marks]
    for mark, box in zip(marks, boxes, strict=True):
        width = max(2, line // 2) if mark.is_thin else line
        # A dark rim keeps a bright line visible on a bright picture.
        pen.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline=_darker(mark.colour), width=width + 2)
        pen.rectangle(box, outline=mark.colour, width=width)
    taken: list[tuple[int, int, int, int]] = []
    for mark, box in reversed(list(zip(marks, boxes, strict=True))):  # the last marks choose their place first
        if mark.label:
            taken.append(_draw_label(pen, mark, box, font, drawn.size, taken))
    return drawn


def crop_around(image: Image.Image, box: XYXY, *, margin: float = 0.25) -> Image.Image:
    """Square crop of a picture around a box.

    Args:
        image: picture of any mode.
        box: (x0, y0, x1, y1) in its pixels.
        margin: room on each side, as a fraction of the longer side of the box. At the border of the picture the crop
            moves inwards; only where it is larger than the picture there is grey.
    """
    size = max(1, round(max(box[2] - box[0], box[3] - box[1]) * (1 + 2 * margin)))
    corner = []
    for low, high, length in ((box[0], box[2], image.width), (box[1], box[3], image.height)):
        start = round((low + high - size) / 2)
        corner.append(min(max(start, 0), length - size) if size <= length else start)
    crop = Image.new("RGB", (size, size), EMPTY)
    crop.paste(image.convert("RGB"), (-corner[0], -corner[1]))
    return crop


def contact_sheet(sections: Sequence[Section], *, title: str = "", width: int = 1280) -> Image.Image:
    """Pictures of several sections on one white sheet, for instance the supports above the detections.

    Args:
        sections: from top to bottom; one without pictures shows its title only.
        title: heading of the sheet.
        width: of the sheet in pixels; the height follows.
    Returns: RGB picture of that width.
    Raises: ValueError for an unequal number of captions and for fewer than one column.
    """
    for section in sections:
        if section.columns < 1 or (section.captions and len(section.captions) != len(section.pictures)):
            raise ValueError(
                f'Section "{section.title}" has {len(section.pictures)} pictures, {len(section.captions)} captions and '
                f"{section.columns} columns; expected one caption per picture (or none) and at least one column"
            )
    heading, subheading, caption = (load_font(size, is_bold=size > 14) for size in (26, 18, 14))
    pieces: list[tuple[Image.Image | str, int, int]] = []  # what, x, y
    styles: dict[int, tuple[ImageFont.FreeTypeFont, RGB]] = {}
    y = GAP

    def add_text(text: str, x: int, font: ImageFont.FreeTypeFont, ink: RGB, room: int) -> int:
        styles[len(pieces)] = font, ink
        pieces.append((_shorten(text, font, room), x, y))
        return sum(font.getmetrics()) + GAP // 2

    if title:
        y += add_text(title, GAP, heading, INK, width - 2 * GAP)
    for section in sections:
        if section.title:
            y += add_text(section.title, GAP, subheading, INK, width - 2 * GAP)
        tile = (width - GAP * (section.columns + 1)) // section.columns
        for first in range(0, len(section.pictures), section.columns):
            row = [_fit(picture, tile) for picture in section.pictures[first : first + section.columns]]
            pieces += [(picture, GAP + column * (tile + GAP), y) for column, picture in enumerate(row)]
            y += max(picture.height for picture in row) + GAP // 3
            captions = section.captions[first : first + section.columns]
            lines = [
                add_text(text, GAP + column * (tile + GAP), caption, FAINT, tile)
                for column, text in enumerate(captions)
            ]
            y += max(lines, default=GAP)
        y += GAP // 2
    sheet = Image.new("RGB", (width, y + GAP // 2), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (what, left, top) in enumerate(pieces):
        if isinstance(what, str):
            font, ink = styles[index]
            pen.text((left, top), what, font=font, fill=ink)
        else:
            sheet.paste(what, (left, top))
    return sheet


@lru_cache(maxsize=64)
def load_font(size: int, *, is_bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans in pixels."""
    import matplotlib  # a moment to import: only for those who draw

    name = "DejaVuSans-Bold.ttf" if is_bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _pixels(box: XYXY, factor: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Box in whole pixels of the enlarged picture, inside it, at least one pixel large."""
    x0, y0, x1, y1 = (value * factor for value in box)
    left, top = min(max(round(x0), 0), size[0] - 1), min(max(round(y0), 0), size[1] - 1)
    return left, top, min(max(round(x1), left), size[0] - 1), min(max(round(y1), top), size[1] - 1)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    mark: Mark,
    box: tuple[int, int, int, int],
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Draw a label at the first free place: above the box, below it, inside at the top, inside at the bottom."""
    pad = max(2, round(font.size * 0.25))
    width = round(font.getlength(mark.label)) + 2 * pad
    ascent, descent = font.getmetrics()
    height = ascent + descent + pad // 2
    places = []
    for y in (box[1] - height, box[3] + 1, box[1], box[3] - height):
        for x in (box[0] - 1, box[2] - width + 1):
            x, inside = min(max(x, 0), max(size[0] - width, 0)), 0 <= y <= size[1] - height
            if inside:
                places.append((x, y, x + width, y + height))
    places = places or [(min(max(box[0], 0), max(size[0] - width, 0)), 0, width, height)]
    free = [place for place in places if not any(_touch(place, other) for other in taken)]
    place = (free or places)[0]
    pen.rectangle(place, fill=mark.colour)
    pen.text((place[0] + pad, place[1] + pad // 4), mark.label, font=font, fill=_readable_on(mark.colour))
    return place


def _touch(a: Sequence[int], b: Sequence[int]) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def _darker(colour: RGB) -> RGB:
    return tuple(value // 4 for value in colour)  # type: ignore[return-value]


def _readable_on(colour: RGB) -> RGB:
    """White where its contrast is 3.5 at least, else black (then 6 and more); contrast as in WCAG 2."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (255, 255, 255) if 1.05 / (luminance + 0.05) >= 3.5 else (0, 0, 0)


def _fit(picture: Image.Image, width: int) -> Image.Image:
    """Picture scaled to a width, at most as high as wide (a taller one is centred on grey)."""
    picture = picture.convert("RGB")
    scale = min(width / picture.width, width / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    scaled = picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    if scaled.width >= width - 1:
        return scaled
    tile = Image.new("RGB", (width, scaled.height), EMPTY)
    tile.paste(scaled, ((width - scaled.width) // 2, 0))
    return tile


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """Text cut to a width in pixels, with an ellipsis."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"
