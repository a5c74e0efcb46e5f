"""Where on its picture a support box is pooled: exactly, or as the official code of DeFRCN rounds it.

Source: DeFRCN (Qiao et al., ICCV 2021), official implementation, for `LegacyBoxes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import transform_instance_annotations
from detectron2.structures import BoxMode
from torch import Tensor


class LegacyBoxes:
    """Support boxes as the official code rounds them: through the test resize, and back by the height's ratio alone."""

    def __init__(self, min_size: int, max_size: int) -> None:
        """`min_size`, `max_size`: INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST, in pixels."""
        self.sizes = (min_size, max_size)
        self._resize = T.ResizeShortestEdge([min_size, min_size], max_size)

    def resized(self, picture: np.ndarray) -> tuple[int, int]:
        """(H, W) of a picture (H, W, 3) after the test resize."""
        return self._resize.get_transform(picture).apply_image(picture).shape[:2]

    def __call__(self, picture: np.ndarray, boxes: Sequence[Sequence[float]]) -> Tensor:
        """Boxes as they are pooled: (M, 4) float32, XYXY in pixels of the picture (H, W, 3)."""
        transforms, size = [self._resize.get_transform(picture)], self.resized(picture)
        # Floats, since Detectron2 scales a box of integers to integers.
        annotations = [{"bbox": [float(v) for v in box], "bbox_mode": BoxMode.XYXY_ABS} for box in boxes]
        rounded = [transform_instance_annotations(annotation, transforms, size)["bbox"] for annotation in annotations]
        return torch.tensor(np.array(rounded), dtype=torch.float32) * (picture.shape[0] / size[0])


def exact_boxes(picture: np.ndarray, boxes: Sequence[Sequence[float]]) -> Tensor:
    """Boxes cut at the border of the picture (H, W, 3): (M, 4) float32, XYXY in its pixels."""
    height, width = picture.shape[:2]
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    return torch.minimum(torch.tensor(boxes, dtype=torch.float32).clamp(min=0), limits)
