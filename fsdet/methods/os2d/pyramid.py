"""The scales at which a picture is searched, and the pictures of those scales.

An anchor has 240 pixels, so the scales decide which objects are found: at level 1.0 the long side of a picture of the
nominal size is EVAL_SCALE, and objects should be about as large as an anchor there.

Source: OS2D (Osokin et al., ECCV 2020) and its release, image pyramid. Departure: without a nominal size every picture
has its own long side as one; the release first brings it to the nominal area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Pyramid:
    """The scales of the pictures of a data set.

    Attributes:
        scales: of the levels, relative to level 1.0.
        eval_scale: wanted long side at level 1.0, pixels.
        image_size: nominal long side of the data set's pictures, pixels; 0: that of each picture.
    """

    scales: Sequence[float]
    eval_scale: float
    image_size: float = 0

    def base(self, height: int, width: int) -> float:
        """Factor from a stored picture, in pixels, to level 1.0."""
        return self.eval_scale / (self.image_size or max(height, width))

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(H, W) of a picture at every level: floor(side * (scale * base)), at least 1."""
        # The factors are multiplied first: where a side comes out as a whole number, the order decides.
        factors = [scale * self.base(height, width) for scale in self.scales]
        return [(max(1, int(height * factor)), max(1, int(width * factor))) for factor in factors]


def resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, 3) uint8 at another size (h, w): bilinear, antialiased where it shrinks (Pillow)."""
    if picture.shape[:2] == tuple(size):
        return picture
    height, width = size
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), Image.Resampling.BILINEAR))
