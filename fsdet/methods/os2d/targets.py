"""Which anchors a class should fire at, and the box codes that they should give.

Every class is compared with its own objects alone; the boxes of all classes are handled together, in blocks of anchors
of a bounded number of overlaps, so that nothing but the results grows with the number of classes.

Source: OS2D (Osokin et al., ECCV 2020), training; labels and remapping of labels in the form of the release.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

from fsdet.methods.os2d.geometry import decode_boxes, encode_boxes

# Overlaps computed at once: about 20 MB with all that is made on the way.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class SceneTargets:
    """Annotated objects of one picture.

    Attributes:
        boxes: (G, 4) float, XYXY, pixels in the frame of the anchors; may stick out of the picture.
        class_index: (G,) int64, place among the C classes of the batch; -1 for another class, -2 for an object that
            the crop has cut away. Both count for no class, so that an anchor on them is a negative.
        difficult: (G,) bool; a match with a difficult object is ignored.
    """

    boxes: Tensor
    class_index: Tensor
    difficult: Tensor

    def __post_init__(self) -> None:
        count = len(self.boxes)
        assert self.boxes.shape == (count, 4), f"boxes are (G, 4), not {tuple(self.boxes.shape)}"
        assert self.class_index.shape == self.difficult.shape == (count,), "one class and one flag for each box"


@dataclass(frozen=True)
class _Objects:
    """The G objects that count, and the P classes that have any.

    Attributes:
        boxes: (G, 4).
        difficult: (G,) bool.
        row: (G,) int64 in [0, P), place of the object's class in `present`.
        present: (P,) int64, ascending.
        first: (P,) int64, each class's first object.
    """

    boxes: Tensor
    difficult: Tensor
    row: Tensor
    present: Tensor
    first: Tensor

    @classmethod
    def of(cls, targets: SceneTargets, num_classes: int) -> _Objects:
        counted = targets.class_index >= 0
        present, row = targets.class_index[counted].unique(return_inverse=True)
        assert not len(present) or int(present[-1]) < num_classes, f"class {present[-1]} of {num_classes} in a batch"
        places = torch.arange(len(row), device=row.device)
        first = places.new_full(present.shape, len(row)).scatter_reduce(0, row, places, "amin")
        return cls(targets.boxes[counted], targets.difficult[counted], row, present, first)

    def blocks(self, anchors: int) -> Iterator[slice]:
        """Ranges of anchors with at most `_BLOCK` overlaps each; none without objects."""
        if len(self.row):
            step = max(1, _BLOCK // len(self.row))
            yield from (slice(start, start + step) for start in range(0, anchors, step))

    def match(self, overlaps: Tensor, positive: float, negative: float) -> tuple[Tensor, Tensor]:
        """Labels (P, n) int8 and numbers (P, n) of the matched objects, for overlaps (G, n) with n anchors.

        Of equal overlaps the first object's counts. Where the label is not positive, the number is that of the class's
        first object.
        """
        rows = self.row[:, None].expand_as(overlaps)
        best = overlaps.new_zeros(len(self.present), overlaps.shape[1]).scatter_reduce(0, rows, overlaps, "amax")
        places = torch.arange(len(self.row), device=rows.device)[:, None]
        places = torch.where((overlaps == best[self.row]) & (overlaps >= positive), places, len(self.row))
        nearest = places.new_full(best.shape, len(self.row)).scatter_reduce(0, rows, places, "amin")
        nearest = torch.where(best >= positive, nearest, self.first[:, None])
        is_positive = (best >= positive) & ~self.difficult[nearest]
        labels = torch.where(is_positive, 1, torch.where(best < negative, 0, -1))
        return labels.to(torch.int8), torch.where(is_positive, nearest, self.first[:, None])


@torch.no_grad()
def assign(
    anchors: Tensor, targets: SceneTargets, num_classes: int, *, positive: float = 0.5, negative: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Label the anchors of one picture for every class.

    Args:
        anchors: (N, 4) XYXY pixels, as they are: neither clipped nor dropped at the border. Of a level of a pyramid:
            taken to the frame of the annotation (`decoding.to_frame`).
        targets: objects in the same frame.
        num_classes: C.
        positive: overlap (IoU) from which on an anchor is positive for its class's nearest object.
        negative: overlap below which it is negative; between the two it is ignored.

    Returns:
        Labels (C, N) int8: 1 positive, 0 negative, -1 ignored (also matches with difficult objects). Codes
        (C, N, 4) of the positives' objects with respect to their anchors; elsewhere those of the class's first object,
        which nobody reads, or 0 for a class without objects.
    """
    objects = _Objects.of(targets, num_classes)
    labels = torch.zeros(num_classes, len(anchors), dtype=torch.int8, device=anchors.device)
    codes = anchors.new_zeros(num_classes, len(anchors), 4)
    for block in objects.blocks(len(anchors)):
        near = anchors[block]
        overlaps = pairwise_iou(Boxes(objects.boxes), Boxes(near))  # (G, n)
        labels[objects.present, block], matched = objects.match(overlaps, positive, negative)
        wanted = objects.boxes[matched]  # (P, n, 4)
        codes[objects.present, block] = encode_boxes(wanted, near)
    return labels, codes


@torch.no_grad()
def remap(
    codes: Tensor, anchors: Tensor, targets: SceneTargets, *, positive: float = 0.8, negative: float = 0.4
) -> Tensor:
    """Label the anchors of one picture by the boxes that were predicted there.

    Args:
        codes: (C, N, 4), predicted.
        anchors: (N, 4) XYXY pixels, which the codes refer to.
        targets: objects in the frame of the anchors.
        positive, negative: as for `assign`, of the predicted box.

    Returns:
        Labels (C, N) int8 for the class loss; the box loss keeps those of `assign`.
    """
    objects = _Objects.of(targets, len(codes))
    labels = torch.zeros(codes.shape[:2], dtype=torch.int8, device=codes.device)
    for block in objects.blocks(len(anchors)):
        found = codes[objects.present, block].float()  # (P, n, 4)
        found = decode_boxes(found, anchors[block])[objects.row]  # (G, n, 4)
        wanted = objects.boxes[:, None].expand_as(found)
        overlaps = matched_pairwise_iou(Boxes(wanted.reshape(-1, 4)), Boxes(found.reshape(-1, 4)))
        labels[objects.present, block], _ = objects.match(overlaps.view(found.shape[:2]), positive, negative)
    return labels
