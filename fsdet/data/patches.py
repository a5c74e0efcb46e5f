"""Training patches: a random part of a scene, resized to one size, with the objects that it keeps.

The part is drawn so that the patch shows the scene at a random scale and with a slightly wrong aspect; its ratio is not
preserved. Patches that were mined as hard ones (a part that is known, and the class that is hard there) are kept in a
file beside the run.

Source: OS2D (Osokin et al., ECCV 2020) and its release, training data. Unlike there, a mined part is never changed, and
what it shows beyond the border of its picture has the mean colour, which is what a network sees there. Parts that fit
an object (`PatchRule.object_size`) are ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from fsdet.data.files import save_text_atomic

# PIL's filters; a patch and each support take one of them at random.
FILTERS = (
    Image.Resampling.BOX,
    Image.Resampling.NEAREST,
    Image.Resampling.HAMMING,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
    Image.Resampling.BILINEAR,
)
TRIES = 100  # random parts that are looked at before the top-left one is taken
GONE = 0.3  # an object of which less than this share of its area is left is no object of the patch
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, 0.5, 0.5, 0.1  # largest change of a colour jitter
KINDS = ("neg", "pos", "pos_loc")  # what is hard in a mined patch: negatives, positives, the boxes of positives

Window = tuple[int, int, int, int]  # (x0, y0, x1, y1) in whole pixels of the picture; a mined one may reach beyond it


def coverage(boxes: np.ndarray, window: Window) -> np.ndarray:
    """Share of the area of each box that lies in a window.

    Args:
        boxes: (G, 4) XYXY in pixels of the picture, with area.
        window: in the same frame.
    Returns: (G,) in [0, 1].
    """
    low = np.maximum(boxes[:, :2], window[:2])
    high = np.minimum(boxes[:, 2:], window[2:])
    return (high - low).clip(min=0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)


@dataclass(frozen=True)
class PatchRule:
    """How parts of scenes are drawn.

    Attributes:
        size: side of a patch in pixels.
        scale_jitter: the scale is drawn from [base * jitter, base / jitter].
        aspect_jitter: width to height of the part is drawn from [jitter, 1 / jitter].
        min_coverage: a part must keep this share of some object's area; an object that keeps less is a difficult one.
        object_size: side in pixels (root of the area) that a random object gets before the jitter; its part is drawn
            round it. Where sizes vary much, a fixed scale leaves most patches without an object of the anchors' size.
            0 = the base scale whatever the objects.
    """

    size: int = 600
    scale_jitter: float = 0.7
    aspect_jitter: float = 0.9
    min_coverage: float = 0.7
    object_size: float = 0

    def draw(
        self, boxes: np.ndarray, height: int, width: int, *, base: float, generator: np.random.Generator
    ) -> Window:
        """A random part that keeps an object; never beyond the picture.

        After `TRIES` parts that do not: the last one, where they are drawn round an object (which is longer than a
        patch can hold), else the top-left one.

        Args:
            boxes: (G, 4) XYXY of all objects in pixels of the picture; without any, every part will do.
            height, width: of the picture; a side that is too small is taken whole.
            base: pixels of a scene at scale 1 for each pixel of the picture; with `object_size` the largest scale.
            generator: of the draws.
        """
        around = None
        if self.object_size and len(boxes):
            around, base = self._draw_object(boxes, base, generator)
            boxes = around[None]
        for _ in range(TRIES):
            window = self._draw_once(height, width, base, generator, around)
            if not len(boxes) or coverage(boxes, window).max() >= self.min_coverage:
                return window
        if around is not None:
            return window
        side = self.size / base
        return 0, 0, _whole(min(side, width)), _whole(min(side, height))

    def _draw_object(
        self, boxes: np.ndarray, largest: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """A random object (4,) that reaches its size at the largest scale, else the biggest one; and its scale."""
        sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))
        scales = np.minimum(self.object_size / sides, largest)
        fit = np.flatnonzero(scales < largest)
        chosen = fit[generator.integers(len(fit))] if len(fit) else int(sides.argmax())
        return boxes[chosen], float(scales[chosen])

    def _draw_once(
        self, height: int, width: int, base: float, generator: np.random.Generator, around: np.ndarray | None
    ) -> Window:
        scale = generator.uniform(base * self.scale_jitter, base / self.scale_jitter)
        aspect = generator.uniform(self.aspect_jitter, 1 / self.aspect_jitter)
        exact = min(self.size / scale, width)
        new_w, new_h = _whole(exact), _whole(min(exact / aspect, height))
        x_span, y_span = (None, None) if around is None else (around[::2], around[1::2])
        x0 = _draw_start(width, new_w, x_span, generator)
        y0 = _draw_start(height, new_h, y_span, generator)
        return x0, y0, x0 + new_w, y0 + new_h

    def place_boxes(self, boxes: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Objects of a picture as the patch of a window has them.

        Args:
            boxes: (G, 4) XYXY in pixels of the picture, with area.
            window: the part that becomes the patch.
        Returns: boxes (G, 4) in pixels of the patch, not clipped; which of them are there; which of them have lost too
            much to be targets, (G,) bool each.
        """
        x0, y0, x1, y1 = window
        zoom = self.size / np.array([x1 - x0, y1 - y0] * 2)
        left = coverage(boxes, window)
        return (boxes - np.array([x0, y0] * 2)) * zoom, left >= GONE, left < self.min_coverage


def _draw_start(length: int, part: int, span: np.ndarray | None, generator: np.random.Generator) -> int:
    """First pixel of a part along a side of a picture; with a span (low, high) it holds as much of that as it can."""
    first, last = 0, length - part
    if span is not None:
        ends = sorted((math.ceil(span[1]) - part, math.floor(span[0])))
        first, last = np.clip(ends, first, last)
    return int(generator.integers(first, last + 1))


def _whole(length: float) -> int:
    """Whole pixels, at least one."""
    return max(1, int(length))


def cut_patch(
    image: np.ndarray, window: Window, size: int, resample: Image.Resampling, *, fill: Sequence[int] = (0, 0, 0)
) -> np.ndarray:
    """A part of a picture, resized to a square.

    Args:
        image: (H, W, 3) uint8.
        window: the part; it has at least one pixel.
        size: side of the patch in pixels.
        resample: PIL's filter.
        fill: colour of what lies beyond the picture.
    Returns: (size, size, 3) uint8.
    """
    x0, y0, x1, y1 = window
    top, left = max(y0, 0), max(x0, 0)
    part = image[top : max(y1, 0), left : max(x1, 0)]
    if part.shape[:2] != (y1 - y0, x1 - x0):
        inside, part = part, np.full((y1 - y0, x1 - x0, 3), fill, np.uint8)
        part[top - y0 : top - y0 + inside.shape[0], left - x0 : left - x0 + inside.shape[1]] = inside
    return np.array(Image.fromarray(np.ascontiguousarray(part)).resize((size, size), resample))


def flip_boxes(boxes: np.ndarray, size: int, *, horizontal: bool, vertical: bool) -> np.ndarray:
    """Boxes (G, 4) XYXY of a square of `size` pixels after flips of it."""
    x0, y0, x1, y1 = boxes.T
    if horizontal:
        x0, x1 = size - x1, size - x0
    if vertical:
        y0, y1 = size - y1, size - y0
    return np.stack([x0, y0, x1, y1], axis=1)


def jitter_colour(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue, each with probability one half.

    Args:
        image: (3, H, W) uint8, RGB.
        generator: of the draws, whose number is always the same.
    """
    changes = (
        (F.adjust_brightness, 1, BRIGHTNESS),
        (F.adjust_contrast, 1, CONTRAST),
        (F.adjust_saturation, 1, SATURATION),
        (F.adjust_hue, 0, HUE),
    )
    for change, neutral, largest in changes:
        happens, by = generator.random() < 0.5, generator.uniform(-largest, largest)
        image = change(image, neutral + by) if happens else image
    return image


@dataclass(frozen=True)
class MinedPatch:
    """A part of a scene to train on again.

    Attributes:
        kind: one of `KINDS`.
        crop: XYXY in pixels of the picture; may reach beyond its right and lower border.
        class_id: of the class that went wrong there; the scene need not show it.
        loss: what it cost.
    """

    kind: str
    crop: tuple[float, float, float, float]
    class_id: int
    loss: float

    @property
    def window(self) -> Window:
        """The crop in whole pixels, at least one along each side."""
        x0, y0, x1, y1 = map(round, self.crop)
        return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


MinedPatches = Mapping[str, Sequence[MinedPatch]]  # image id, as text -> its patches


def mined_file(output_dir: str | Path, iteration: int, period: int) -> Path | None:
    """File of the patches that an iteration trains on when they are mined every `period` iterations.

    Returns: None before the first mining, and for period 0.
    """
    mined = iteration // period * period if period else 0
    return Path(output_dir) / f"mined_patches_{mined:07d}.json" if mined else None


def save_mined(path: Path, patches: MinedPatches, classes: Sequence[str]) -> None:
    """Write mined patches whole or not at all; classes go by their names."""
    rows = {
        image: [{"kind": p.kind, "class": classes[p.class_id], "crop": p.crop, "loss": p.loss} for p in of_image]
        for image, of_image in patches.items()
    }
    save_text_atomic(json.dumps({"patches": rows}, indent=1), path)


def read_mined(path: Path, classes: Sequence[str]) -> MinedPatches:
    """Read what `save_mined` has written.

    Raises: ValueError naming the file when it holds something else or names a class that is not there.
    """
    class_ids = {name: place for place, name in enumerate(classes)}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["patches"]
        return {image: [_mined_patch(row, class_ids) for row in of_image] for image, of_image in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: no list of mined patches of the {len(classes)} classes of this run ({type(error).__name__}: "
            f"{error}). Put the run's own file back, or train from the start in another OUTPUT_DIR"
        ) from error


def _mined_patch(row: Mapping[str, Any], class_ids: Mapping[str, int]) -> MinedPatch:
    """A patch of a file. Raises: ValueError, KeyError or TypeError."""
    x0, y0, x1, y1 = crop = tuple(map(float, row["crop"]))
    if row["kind"] not in KINDS or not (np.isfinite(crop).all() and x0 < x1 and y0 < y1):
        raise ValueError(f"{row} is no patch")
    return MinedPatch(row["kind"], crop, class_ids[row["class"]], float(row["loss"]))
