"""Images against the classes of a memory: pairs of an image and a class in bounded batches.

The exact way treats every pair apart, as the release does. The approximate one lets all classes of an image share its
best proposals, whose features are then computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor

from fsdet.methods.fewx.relation import MultiRelationHead, SupportParts
from fsdet.methods.fewx.roi_heads import RelationRes5ROIHeads
from fsdet.methods.fewx.rpn import AttentionRPN
from fsdet.modeling.class_memory import ClassMemory
from fsdet.modeling.class_memory_entry import ClassEntry

_CPU_ROWS = 100  # regions in res5 at once on a CPU: larger batches leave its caches and gain nothing
KERNEL, FEATURE = "kernel", "feature"  # tensors of a class: (C4,) on res4, (C5, P, P) behind res5

Pair = tuple[int, int]  # numbers of an image and of a class
# Number of an image, and of R pairs of one of its regions and a class: boxes (R, 4), scores (R,), class numbers (R,).
Scored = tuple[int, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Classes:
    """A class memory on a device: kernels (K, C4), and the supports' share of the relation heads."""

    kernels: Tensor
    parts: SupportParts

    def __len__(self) -> int:
        return len(self.kernels)


def prepare_classes(
    head: MultiRelationHead, memory: ClassMemory, device: torch.device, _entries: Sequence[ClassEntry] = ()
) -> Classes:
    """Compute once what every image needs of a memory with "kernel" (C4,) and "feature" (C5, P, P) for each class.

    The memory's entries are given as well, so that whoever keeps the result sees when the memory has been edited.
    """
    kernels, features = (memory.stack(key).to(device) for key in (KERNEL, FEATURE))
    with torch.autocast(device.type, enabled=False):
        return Classes(kernels, head.encode(features))


@dataclass(frozen=True)
class PairScorer:
    """Proposes and scores regions of images of one size.

    Attributes:
        rpn, heads: of the detector.
        rows_at_once: regions in res5 at once, at most.
        shared_proposals: 0, or how many proposals the classes of an image share.
    """

    rpn: AttentionRPN
    heads: RelationRes5ROIHeads
    rows_at_once: int
    shared_proposals: int = 0

    def detect(self, features: Tensor, sizes: Sequence[tuple[int, int]], classes: Classes) -> list[Instances]:
        """Detections of N images.

        Args:
            features: (N, C4, H, W).
            sizes: (H, W) of the images in pixels, without padding.
            classes: K classes.
        Returns: N Instances in the frame of the network input, best first.
        """
        found: list[list[tuple[Tensor, ...]]] = [[] for _ in sizes]
        score = self.score_shared if self.shared_proposals else self.score_exact
        for image, boxes, scores, numbers in score(features, sizes, classes):
            kept = scores > self.heads.score_thresh  # the others are not worth their memory
            found[image].append((boxes[kept], scores[kept], numbers[kept]))
        return [
            self.heads.detect(*map(torch.cat, zip(*rows, strict=True)), size)
            for rows, size in zip(found, sizes, strict=True)
        ]

    def _rows(self, features: Tensor) -> int:
        return min(self.rows_at_once, _CPU_ROWS) if features.device.type == "cpu" else self.rows_at_once

    def propose(
        self, features: Tensor, sizes: Sequence[tuple[int, int]], classes: Classes
    ) -> Iterator[tuple[list[Pair], list[Instances]]]:
        """All pairs of an image and a class with their proposals, as many at once as fit."""
        pairs = [(image, number) for image in range(len(sizes)) for number in range(len(classes))]
        step = max(1, self._rows(features) // self.rpn.post_nms_topk[False])
        for start in range(0, len(pairs), step):
            chunk = pairs[start : start + step]
            yield chunk, self.rpn.propose(features, sizes, classes.kernels, chunk)

    def score_exact(self, features: Tensor, sizes: Sequence[tuple[int, int]], classes: Classes) -> Iterator[Scored]:
        """Score every class on its own proposals; yields one item for each pair of an image and a class."""
        prepared = self.heads.prepare(features)
        for pairs, proposals in self.propose(features, sizes, classes):
            boxes = [found.proposal_boxes for found in proposals]
            first, last = pairs[0][0], pairs[-1][0]
            by_image: list[list[Boxes]] = [[] for _ in range(first, last + 1)]
            for (image, _), own in zip(pairs, boxes, strict=True):
                by_image[image - first].append(own)
            regions = self.heads.region_features(prepared[first : last + 1], [Boxes.cat(own) for own in by_image])
            counts = [len(own) for own in boxes]
            numbers = torch.tensor([number for _, number in pairs], device=features.device)
            index = numbers.repeat_interleave(torch.tensor(counts, device=features.device))
            embedded = self.heads.box_predictor.embed(regions)
            scores, moved = self.heads.score(embedded, classes.parts, index, Boxes.cat(boxes).tensor)
            columns = (moved.split(counts), scores.split(counts), index.split(counts))
            yield from zip((image for image, _ in pairs), *columns, strict=True)

    def score_shared(self, features: Tensor, sizes: Sequence[tuple[int, int]], classes: Classes) -> Iterator[Scored]:
        """Score every class on the same proposals of an image, the best ones of all classes."""
        found: list[list[Instances]] = [[] for _ in sizes]
        for pairs, proposals in self.propose(features, sizes, classes):
            for (image, _), own in zip(pairs, proposals, strict=True):
                found[image].append(own)
        prepared = self.heads.prepare(features)
        for image, instances in enumerate(found):
            for boxes in self._merge(instances).split(self._rows(features)):
                regions = self.heads.region_features(prepared[image : image + 1], [Boxes(boxes)])
                embedded = self.heads.box_predictor.embed(regions)
                for number in range(len(classes)):
                    index = torch.full((len(boxes),), number, device=boxes.device)
                    scores, moved = self.heads.score(embedded, classes.parts, index, boxes)
                    yield image, moved, scores, index

    def _merge(self, proposals: list[Instances]) -> Tensor:
        """The best proposals of one image (R, 4), whichever class proposed them; NMS leaves out what is there twice."""
        merged = Instances.cat(proposals)
        boxes, logits = merged.proposal_boxes.tensor, merged.objectness_logits
        best = batched_nms(boxes, logits, torch.zeros_like(logits), self.rpn.nms_thresh)
        return boxes[best[: self.shared_proposals]]
