"""Gallery of a report: each novel class with its K supports, and its detections on test pictures chosen by rule.

Takes pictures, boxes and names; what gathers them from a run's folder is `fsdet.engine.gallery`. Pictures become JPEG
thumbnails inside the page, whose total size is bounded.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from fsdet.data.drawing import RGB, XYXY, Mark, crop_around, draw_marks

from .ground_truth import Detections, GroundTruth
from .matching import CORRECT, FALSE, Judged, judge, overlap
from .report_choice import Example, why_false

BUDGET = 6 * 2**20  # bytes of all pictures of a page, as text
SIDE, SUPPORT_SIDE = 320, 144  # px, longer side of a picture; larger ones would only make its labels smaller
LADDER = ((1.0, 82), (0.8, 76), (0.64, 70), (0.5, 62))  # (scale, JPEG quality), taken in turn until the budget holds
OTHERS = 5  # further detections of the class that a picture shows

# Okabe and Ito's palette: told apart with any colour vision, on dark and bright pictures.
COLOURS: dict[str, RGB] = {
    CORRECT: (0, 158, 115),
    FALSE: (213, 94, 0),
    "missed": (240, 228, 66),
    "truth": (255, 255, 255),
    "ignored": (150, 150, 150),
}
SIGNS = {CORRECT: "✓ ", FALSE: "✗ "}
KINDS = {"best": CORRECT, "median": CORRECT, "false": FALSE, "missed": "missed"}


@dataclass(frozen=True)
class Picture:
    """A picture with what is written below it; `kind` is "correct", "false", "missed" or "support"."""

    image: Image.Image
    caption: str
    kind: str


@dataclass(frozen=True)
class GalleryRow:
    """A class: some figures in words, supports (of `shots` in all) and examples."""

    name: str
    facts: str
    shots: int
    supports: tuple[Picture, ...]
    examples: tuple[Picture, ...]


@dataclass(frozen=True)
class Gallery:
    """The novel classes of one run."""

    title: str
    notes: tuple[str, ...]
    rows: tuple[GalleryRow, ...]


def draw_support(image: np.ndarray, box: Sequence[float], caption: str = "") -> Picture:
    """The object of a support with some context, square.

    Args:
        image: (H, W, 3) uint8, RGB.
        box: (x0, y0, x1, y1) in its pixels.
        caption: e.g. the file's name.
    """
    height, width = image.shape[:2]
    longer = max(box[2] - box[0], box[3] - box[1], 1.0)
    margin = min(0.3, max(0.0, (min(height, width) / longer - 1) / 2))  # as much as the picture has around it
    crop = crop_around(Image.fromarray(image), tuple(box), margin=margin)
    scale = SUPPORT_SIDE / crop.width
    crop = crop.resize(
        (SUPPORT_SIDE, SUPPORT_SIDE), Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    )
    return Picture(crop, caption, "support")


def draw_example(
    image: np.ndarray, truth: GroundTruth, detections: Detections, judged: Judged, example: Example
) -> Picture:
    """A test picture with one detection or missed object, the objects of its class, and detections above it.

    Args:
        image: (H, W, 3) uint8, RGB; of the example's image.
        truth, detections, judged: of the whole test set.
        example: what to show.
    """
    own = np.flatnonzero((truth.image_index == example.image) & (truth.class_ids == judged.class_id))
    marks = [
        Mark(_corners(truth, item), "", COLOURS["ignored" if truth.ignored[item] else "truth"], True) for item in own
    ]
    here = np.flatnonzero(detections.image_index[judged.rows] == example.image)
    above = here[here < example.rank] if example.rank >= 0 else here
    for rank in above[:OTHERS][::-1]:
        verdict = judged.verdicts[rank]
        marks.append(Mark(tuple(detections.boxes[judged.rows[rank]]), "", COLOURS[verdict], True))
    if example.role == "missed":
        marks.append(Mark(_corners(truth, example.object), "missed", COLOURS["missed"]))
        caption = _missed_caption(truth, detections, judged, example)
    else:
        row = judged.rows[example.rank]
        verdict, score = judged.verdicts[example.rank], detections.scores[row]
        caption, cause = _caption(truth, detections, judged, example)
        if cause >= 0 and truth.class_ids[cause] != judged.class_id:
            marks.append(
                Mark(_corners(truth, cause), truth.class_names[truth.class_ids[cause]], COLOURS["truth"], True)
            )
        marks.append(Mark(tuple(detections.boxes[row]), f"{SIGNS[verdict]}{score:.2f}", COLOURS[verdict]))
    return Picture(_draw(Image.fromarray(image), marks), caption, KINDS[example.role])


def verdict_marks(truth: GroundTruth, detections: Detections) -> list[list[Mark]]:
    """Every detection and every missed object of some test images, in the colours of the gallery.

    Returns: a list for each image: the missed objects, then the detections by rising score, so that the best are drawn
        on top.
    """
    marks: list[list[Mark]] = [[] for _ in truth.image_ids]
    verdicts = np.empty(len(detections), dtype=object)
    for class_id, name in enumerate(truth.class_names):
        judged = judge(truth, detections, class_id)
        verdicts[judged.rows] = judged.verdicts
        for item in judged.missed:
            marks[truth.image_index[item]].append(Mark(_corners(truth, item), f"{name} missed", COLOURS["missed"]))
    for row in np.argsort(detections.scores, kind="stable"):
        verdict, name = verdicts[row], truth.class_names[detections.class_ids[row]]
        label = f"{SIGNS.get(verdict, '')}{name} {detections.scores[row]:.2f}"
        marks[detections.image_index[row]].append(Mark(tuple(detections.boxes[row]), label, COLOURS[verdict]))
    return marks


def render_galleries(galleries: Sequence[Gallery], budget: int = BUDGET) -> list[str]:
    """HTML of each gallery, all pictures embedded.

    Raises: ValueError where the pictures exceed `budget` bytes even at their smallest.
    """
    pictures = [picture for gallery in galleries for picture in _pictures(gallery)]
    sources = iter(_encode_all([picture.image for picture in pictures], budget))
    return [_gallery(gallery, sources) for gallery in galleries]


def _corners(truth: GroundTruth, item: int) -> XYXY:
    x, y, width, height = truth.boxes[item].tolist()
    return x, y, x + width, y + height


def _caption(truth: GroundTruth, detections: Detections, judged: Judged, example: Example) -> tuple[str, int]:
    """What is written below a detection, and the object that explains a false one (-1: none)."""
    score = detections.scores[judged.rows[example.rank]]
    place = f"score {score:.2f}, {_ordinal(example.rank + 1)} of {len(judged.rows)}"
    if example.role == "false":
        reason, cause = why_false(truth, detections, judged, example.rank)
        return f"{place}; {reason}", cause
    taken = judged.objects[[example.rank]]
    iou = overlap(truth, detections, judged.rows[[example.rank]], taken)[0, 0]
    kind = "the median of the correct ones; " if example.role == "median" else ""
    return f"{place}; {kind}IoU {iou:.2f}", -1


def _missed_caption(truth: GroundTruth, detections: Detections, judged: Judged, example: Example) -> str:
    width, height = truth.boxes[example.object][2:]
    here = judged.rows[detections.image_index[judged.rows] == example.image]
    best = overlap(truth, detections, here, np.array([example.object]))
    near = f"best IoU of a detection {best.max():.2f}" if len(here) else "no detection of the class in the picture"
    return f"{width:.0f} × {height:.0f} pixels; {near}"


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _draw(image: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """Scaled first and drawn on afterwards, so that lines and text keep their size."""
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    scaled = [Mark(tuple(value * scale for value in m.box), m.label, m.colour, m.is_thin) for m in marks]
    return draw_marks(small, scaled, min_side=0)


def _pictures(gallery: Gallery) -> Iterator[Picture]:
    for row in gallery.rows:
        yield from row.supports
        yield from row.examples


def _encode_all(images: Sequence[Image.Image], budget: int) -> list[str]:
    for scale, quality in LADDER:
        encoded = [_encode(image, scale, quality) for image in images]
        total = sum(map(len, encoded))
        if total <= budget:
            return encoded
    raise ValueError(
        f"The gallery's {len(images)} pictures take {total / 2**20:.1f} MiB at their smallest, more than "
        f"{budget / 2**20:.1f} MiB; show fewer runs, classes or pictures of a class"
    )


def _encode(image: Image.Image, scale: float, quality: int) -> str:
    if scale != 1.0:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True, progressive=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _gallery(gallery: Gallery, sources: Iterator[str]) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in gallery.notes)
    key = "".join(
        f'<li><i style="background:rgb{COLOURS[kind]}"></i>{text}</li>'
        for kind, text in (
            (CORRECT, "correct"),
            (FALSE, "false"),
            ("missed", "missed object"),
            ("truth", "thin: annotated object"),
            ("ignored", "counts neither way"),
        )
    )
    rows = "".join(_row(row, sources) for row in gallery.rows)
    return f'<ul class="notes">{notes}</ul><ul class="legend boxes">{key}</ul>{rows}'


def _row(row: GalleryRow, sources: Iterator[str]) -> str:
    name = escape(row.name, quote=True)
    supports = "".join(
        f'<img src="{next(sources)}" alt="support of {name}" title="{escape(support.caption, quote=True)}">'
        for support in row.supports
    )
    more = f"<p>and {row.shots - len(row.supports)} more</p>" if row.shots > len(row.supports) else ""
    count = f"{row.shots} support{'' if row.shots == 1 else 's'}"
    examples = "".join(_figure(picture, row.name, next(sources)) for picture in row.examples)
    return (
        f'<article class="card"><h3>{escape(row.name)}</h3><p class="facts">{escape(row.facts)}</p>'
        f'<div class="beside"><div class="supports"><h4>{count}</h4><div>{supports}</div>{more}</div>'
        f'<div class="examples">{examples or "<p>no detection, no object</p>"}</div></div></article>'
    )


def _figure(picture: Picture, name: str, source: str) -> str:
    alt = escape(f"{picture.kind}: {name}, {picture.caption}", quote=True)
    return (
        f'<figure class="{picture.kind}"><img src="{source}" alt="{alt}" '
        f'width="{picture.image.width}" height="{picture.image.height}">'
        f"<figcaption><b>{picture.kind}</b> {escape(picture.caption)}</figcaption></figure>"
    )
