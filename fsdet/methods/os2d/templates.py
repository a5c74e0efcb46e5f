"""Templates: what OS2D keeps of a support, its feature map as 15 x 15 normalised cells.

A support is cut out tightly, brought to a fixed area with its ratio kept, and passed through the backbone at its own
size; the map is then resampled to 15 x 15 cells whatever its ratio is, which the alignment restores. Views are turned
and mirrored copies of the cut picture with templates of their own.

Source: OS2D (Osokin et al., ECCV 2020) and its release, class images and their augmentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fsdet.data.crops import tight_crop
from fsdet.data.support import Support, SupportSet
from fsdet.layers.correlation import column_major, normalize_cells
from fsdet.methods.os2d.geometry import SIDE

# Name -> views: how often a picture is turned by 90 degrees counter-clockwise, and whether it is mirrored after that.
VIEWS: dict[str, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "rotation90": tuple((turns, False) for turns in range(4)),
    "horflip": ((0, False), (0, True)),
    "horflip_rotation90": tuple((turns, is_mirrored) for is_mirrored in (False, True) for turns in range(4)),
}


def view_pictures(picture: np.ndarray, views: str) -> list[np.ndarray]:
    """The views of a picture (h, w, 3), V of them, the picture itself first; turned ones are (w, h, 3).

    Raises: ValueError for an unknown name.
    """
    if views not in VIEWS:
        raise ValueError(f"OS2D.VIEWS is {views!r}; expected {' | '.join(VIEWS)}")
    turned = (np.rot90(picture, turns)[:, :: -1 if is_mirrored else 1] for turns, is_mirrored in VIEWS[views])
    return [np.ascontiguousarray(view) for view in turned]


def template_of(features: Tensor) -> Tensor:
    """Template of a support.

    Args:
        features: (1, D, h, w), any size from one cell on.
    Returns: (225, D), cells of the 15 x 15 map column by column, each of length 1 (0 where the map is 0).
    """
    resampled = F.interpolate(features, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    return column_major(normalize_cells(resampled))[0]


def cut_pictures(
    support_set: SupportSet, supports: Sequence[Support], size: int, image_format: str
) -> Iterator[np.ndarray]:
    """The pictures of supports, one after the other.

    Args:
        support_set: which reads them.
        supports: S of them.
        size: pixels, root of the area that they are brought to.
        image_format: channel order that the detector reads, "BGR" or "RGB".
    Returns: arrays (h, w, 3) uint8, each of its own size.
    Raises: FileNotFoundError or ValueError naming a picture that is missing or cannot be decoded, or a box that leaves
        nothing of its picture.
    """
    tight = support_set.with_policy(partial(tight_crop, target=size))
    for support in supports:
        picture = tight.crop(support).image
        yield picture if support_set.image_format == image_format else picture[..., ::-1]
