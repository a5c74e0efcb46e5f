"""The crops of a FewX class's supports at test time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fsdet.data.support import Support, SupportSet, fewx_support_crop


def cut_crops(
    support_set: SupportSet, supports: Sequence[Support], size: int, image_format: str
) -> tuple[Tensor, Tensor]:
    """The context squares of supports.

    Args:
        support_set: which reads the pictures.
        supports: S of them.
        size: side of a crop in pixels.
        image_format: channel order that the detector reads, "BGR" or "RGB".
    Returns: crops (S, 3, size, size) uint8 and boxes (S, 4) XYXY in their pixels.
    Raises: FileNotFoundError or ValueError naming a picture that is missing or cannot be decoded, or a box that leaves
        nothing of its picture.
    """
    squares = support_set.with_policy(partial(fewx_support_crop, size=size))
    images, boxes = [], []
    for support in supports:
        crop = squares.crop(support)
        images.append(crop.image if support_set.image_format == image_format else crop.image[..., ::-1])
        boxes.append(crop.box)
    stacked = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
    return torch.from_numpy(stacked), torch.from_numpy(np.stack(boxes))
