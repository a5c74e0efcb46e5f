"""From the boxes of pyramid levels to detections: clipping, the frame of the picture, non-maximum suppression.

Source: OS2D (Osokin et al., ECCV 2020) and its release. Departure: suppression is exact as a rule; the release's, in
chunks of 10,000 boxes, is `reference_nms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import nms

REFERENCE_CHUNK = 10_000  # boxes that the release's suppression compares at once
_FIRST = 4096  # best boxes that are compared first where only the best that stay are wanted

# (boxes (M, 4), scores (M,), threshold, limit) -> places of the boxes that stay, best first; `limit` of them at most.
Suppression = Callable[[Tensor, Tensor, float, int], Tensor]


@dataclass(frozen=True)
class Found:
    """M boxes that were found.

    Attributes:
        boxes: (M, 4) XYXY in the frame of the picture.
        scores: (M,), cosines.
        classes: (M,) int64, places in the class memory.
        anchors: (M, 4) XYXY, the anchors that they come from, or None.
        corners: (M, 4, 2) x and y of the corners of the aligned template, or None: (left, top), (right, top), (left,
            bottom), (right, bottom) of the support.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    anchors: Tensor | None = None
    corners: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, places: Tensor) -> Found:
        """Boxes by place or mask."""
        return replace(self, **{name: value[places] for name, value in self.fields().items()})

    def fields(self) -> dict[str, Tensor]:
        """The attributes that are there."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def nothing(cls, device: torch.device) -> Found:
        """No box."""
        return cls(
            *(torch.zeros(0, *shape, device=device) for shape in ((4,), ())), torch.zeros(0, device=device).long()
        )

    @classmethod
    def join(cls, parts: Sequence[Found]) -> Found:
        """All boxes, in order; of one part or more, with the same fields."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].fields()})

    def best(self, limit: int = -1) -> Found:
        """Sorted by score, the best `limit` of them at most (-1: all); equal scores keep their order."""
        return self[_cut(self.scores.argsort(descending=True, stable=True), limit)]


def to_frame(points: Tensor, level: tuple[int, int], frame: tuple[int, int]) -> Tensor:
    """Coordinates of a pyramid level in another frame, each axis with its own factor.

    Args:
        points: (..., 2 n), x and y in turn, in pixels of the level.
        level, frame: (H, W) of both.
    """
    factors = points.new_tensor([frame[1] / level[1], frame[0] / level[0]])
    return points * factors.repeat(points.shape[-1] // 2)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) XYXY cut at the border of a picture of `size` (H, W)."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def has_area(boxes: Tensor) -> Tensor:
    """(...) bool for boxes (..., 4): wider and higher than nothing."""
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def exact_nms(boxes: Tensor, scores: Tensor, threshold: float, limit: int = -1) -> Tensor:
    """Places of the boxes that stay: those that no better one that stays overlaps by more than `threshold` (IoU).

    Whether a box stays follows from better boxes alone. So where few are wanted, few have to be compared.

    Args:
        boxes, scores: (M, 4) XYXY and (M,).
        threshold: of the overlap.
        limit: places wanted, at most; -1: all.
    Returns: places, best first; equal scores in their order.
    """
    boxes, scores = boxes.float(), scores.float()
    if limit < 0 or len(scores) <= _FIRST:
        return _cut(nms(boxes, scores, threshold), limit)
    order, count = scores.argsort(descending=True, stable=True), _FIRST
    while True:
        first = order[:count]
        kept = first[nms(boxes[first], scores[first], threshold)]
        if len(kept) >= limit or count >= len(order):
            return kept[:limit]
        count *= 4


def reference_nms(
    boxes: Tensor, scores: Tensor, threshold: float, limit: int = -1, chunk: int = REFERENCE_CHUNK
) -> Tensor:
    """The release's suppression, which is exact up to `chunk` boxes.

    More of them are cut into chunks as they come, and what each chunk leaves is joined and cut again, until one chunk
    is left or none loses a box. So a box can fall to one that falls later, and overlaps across chunks can stay.

    Args, Returns: as `exact_nms`.
    """
    places = torch.arange(len(scores), device=scores.device)
    while len(places) > chunk:
        kept = torch.cat([own[exact_nms(boxes[own], scores[own], threshold)] for own in places.split(chunk)])
        if len(kept) == len(places):
            return _cut(kept[scores[kept].argsort(descending=True, stable=True)], limit)
        places = kept
    return places[exact_nms(boxes[places], scores[places], threshold, limit)]


SUPPRESSIONS: dict[str, Suppression] = {"exact": exact_nms, "reference": reference_nms}


def _cut(places: Tensor, limit: int) -> Tensor:
    return places if limit < 0 else places[:limit]
