"""Crop policies: what of a support's picture a method sees, and a bounded cache for what they cut.

DeFRCN takes the whole picture and pools the box ("whole"), FewX a square with context ("context_square"), OS2D the
object alone at a fixed area ("tight").

Source: DeFRCN (Qiao et al., ICCV 2021); FewX (Fan et al., CVPR 2020) and its release; OS2D (Osokin et al., ECCV 2020).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from PIL import Image

CONTEXT = 16  # px of the source picture on both ends of the long side (FewX)
CROP_SIZE = 320  # px, side of a context square (FewX)
CLASS_IMAGE_SIZE = 240  # px, root of the area of a tight crop (OS2D)


class CropPolicy(Protocol):
    """(picture (H, W, 3) uint8, box XYXY in its pixels) -> (crop (h, w, 3) uint8, box (4,) float32 on the crop)."""

    def __call__(self, image: np.ndarray, box: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Cut the crop of one support."""
        ...


class ContextSquare(NamedTuple):
    """Where a context square lies.

    Attributes:
        rows, columns: (start, end) of the part of the picture that it shows.
        corner: (y, x) of that part in the square; the rest is black.
        length: side of the square in pixels of the picture.
        box: (x0, y0, x1, y1) of the object in pixels of the resized crop, whole numbers.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    corner: tuple[int, int]
    length: int
    box: tuple[int, int, int, int]


def _long_side(low: int, high: int, limit: int) -> tuple[int, int, int]:
    """Cut on the long side: (start, end, place of the box in it), context on both ends, ended by the border."""
    start, end, place = low - CONTEXT, min(high + CONTEXT, limit), CONTEXT
    if start < 0:
        start, place = 0, place + start
    return start, end, place


def _short_side(low: int, high: int, limit: int, length: int) -> tuple[int, int, int, int]:
    """Cut on the short side, centred on the box: (start, end, black pixels before it, place of the box)."""
    centre = int((low + high) / 2)
    start, end = int(centre - length / 2), min(int(centre + length / 2), limit)
    place = math.ceil((length - (high - low)) / 2)
    if start < 0:
        start, place = 0, place + start
    before = int((length - (end - start)) / 2)
    return start, end, before, place + before


def context_square(box: Sequence[float], height: int, width: int, size: int = CROP_SIZE) -> ContextSquare:
    """Geometry of `fewx_support_crop`, which needs no pixels.

    Args:
        box: (x0, y0, x1, y1) in pixels of the picture.
        height, width: of the picture.
        size: side of the resized crop in pixels.
    Raises: ValueError for a box that leaves nothing of the picture.
    Source: FewX release, support preparation script.
    """
    x0, y0, x1, y1 = (int(value) for value in box)
    if x1 - x0 >= y1 - y0:
        left, right, place_x = _long_side(x0, x1, width)
        length = right - left
        top, bottom, black, place_y = _short_side(y0, y1, height, length)
        corner = (black, 0)
    else:
        top, bottom, place_y = _long_side(y0, y1, height)
        length = bottom - top
        left, right, black, place_x = _short_side(x0, x1, width, length)
        corner = (0, black)
    if right <= left or bottom <= top:
        raise ValueError(
            f"The support box {tuple(box)} leaves nothing of its picture of {width} x {height} pixels (width x height)"
        )
    scale = size / length
    corners = (place_x, place_y, place_x + x1 - x0, place_y + y1 - y0)
    return ContextSquare((top, bottom), (left, right), corner, length, tuple(int(v * scale) for v in corners))


def fewx_support_crop(
    image: np.ndarray, box: Sequence[float], *, size: int = CROP_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Square crop with 16 pixels of context along the long side of the box, black beyond the border, resized.

    All numbers are cut to integers as in the release; a very thin box can end without width.

    Args:
        image: (H, W, 3) uint8, channel order kept.
        box: (x0, y0, x1, y1) in pixels of the picture.
        size: side of the crop in pixels.
    Returns: crop (size, size, 3) uint8 and box (4,) float32, XYXY in pixels of the crop.
    Raises: ValueError for a box that leaves nothing of the picture.
    Source: FewX release, support preparation script.
    """
    rows, columns, (y, x), length, corners = context_square(box, *image.shape[:2], size)
    cut = image[slice(*rows), slice(*columns)]
    square = np.zeros((length, length, 3), np.float32)
    square[y : y + cut.shape[0], x : x + cut.shape[1]] = cut
    crop = cv2.resize(square, (size, size), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    return crop, np.array(corners, np.float32)


def has_area_inside(box: Sequence[float], height: int, width: int) -> bool:
    """Whether a box covers something of its picture, so that every policy can cut it.

    Args:
        box: (x0, y0, x1, y1) in pixels of the picture; may hold NaN.
        height, width: of the picture.
    """
    x0, y0, x1, y1 = box
    if not (all(map(math.isfinite, box)) and min(x1, width) > max(x0, 0) and min(y1, height) > max(y0, 0)):
        return False
    try:
        context_square(box, height, width)
    except ValueError:  # pictures a pixel high or wide, which the cut to integers can miss
        return False
    return True


def area_size(height: int, width: int, target: int = CLASS_IMAGE_SIZE) -> tuple[int, int]:
    """(H, W) with the given ratio and about target² pixels, cut to integers, at least 1.

    Source: OS2D release, resizing of class images.
    """
    ratio = math.sqrt(height / width)
    return max(1, int(target * ratio)), max(1, int(target / ratio))


def tight_crop(
    image: np.ndarray,
    box: Sequence[float],
    target: int = CLASS_IMAGE_SIZE,
    *,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> tuple[np.ndarray, np.ndarray]:
    """The object alone, resized to about target² pixels with its ratio kept.

    Args:
        image: (H, W, 3) uint8.
        box: (x0, y0, x1, y1) in pixels of the picture; widened to whole pixels and cut at the border.
        target: side in pixels of a square of the wanted area.
        resample: PIL's filter; OS2D evaluates with the antialiased bilinear one.
    Returns: crop (h, w, 3) uint8 and its own extent (0, 0, w, h) as float32.
    Raises: ValueError for a box outside the picture.
    """
    height, width = image.shape[:2]
    x0, y0 = max(math.floor(box[0]), 0), max(math.floor(box[1]), 0)
    x1, y1 = min(math.ceil(box[2]), width), min(math.ceil(box[3]), height)
    if x1 <= x0 or y1 <= y0:
        raise ValueError(
            f"The support box {tuple(box)} leaves nothing of its picture of {width} x {height} pixels (width x height)"
        )
    new_h, new_w = area_size(y1 - y0, x1 - x0, target)
    cut = Image.fromarray(np.ascontiguousarray(image[y0:y1, x0:x1]))
    crop = np.asarray(cut.resize((new_w, new_h), resample))
    return crop, np.array([0, 0, new_w, new_h], np.float32)


def whole_image(image: np.ndarray, box: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The picture as it is, with the box in its pixels."""
    return image, np.asarray(box, np.float32)


CROP_POLICIES: dict[str, CropPolicy] = {
    "context_square": fewx_support_crop,
    "tight": tight_crop,
    "whole": whole_image,
}


class CropCache:
    """Crops that were asked for lately; the least recently used ones go when all together exceed the capacity.

    A cache belongs to one process: loader workers fill their own. `hits` and `misses` count the lookups, `bytes` is
    what is kept now.
    """

    def __init__(self, capacity: int) -> None:
        """Start empty.

        Args:
            capacity: bytes of pixels and boxes, at most; 0 keeps nothing.
        """
        self.capacity = capacity
        self.bytes = self.hits = self.misses = 0
        self._kept: OrderedDict[Hashable, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def get(self, key: Hashable, cut: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """The crop and box of a key, from `cut` when they are not kept; to be read only.

        Args:
            key: all that decides about the crop.
            cut: makes it.
        """
        found = self._kept.get(key)
        if found is not None:
            self.hits += 1
            self._kept.move_to_end(key)
            return found
        self.misses += 1
        crop = cut()
        if (size := _size(crop)) <= self.capacity:
            for array in crop:
                array.flags.writeable = False  # the next asker gets the same array
            self._kept[key] = crop
            self.bytes += size
        while self.bytes > self.capacity:
            self.bytes -= _size(self._kept.popitem(last=False)[1])
        return crop


def _size(crop: tuple[np.ndarray, np.ndarray]) -> int:
    return sum(array.nbytes for array in crop)
