"""Ignore regions: places where an unlabelled object must not be taught as background.

Base training images also show novel objects, which carry no label. The usual protocol (TFA, DeFRCN) teaches them as
background; with the leak policy "ignore" their boxes come along as ignore regions instead. In the ground truth these
are the rows with `gt_classes == -1`, behind all real rows. An anchor or proposal that lies in a region to a large part
(intersection over its own area) is then never a negative example; one that matches a real box stays a positive.
Without such a row every class here acts, and draws random numbers, exactly as Detectron2's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou
from torch import Tensor

from fsdet.data.mapper import IGNORE_CLASS


def has_ignore_rows(targets: Sequence[Instances]) -> bool:
    """Whether any image of the batch has an ignore region."""
    return any(t.has("gt_classes") and bool((t.gt_classes == IGNORE_CLASS).any()) for t in targets)


def split_ignore_rows(targets: Instances) -> tuple[Instances, Boxes]:
    """Part the ground truth of one image into its real rows and the boxes of its ignore regions."""
    ignored = targets.gt_classes == IGNORE_CLASS
    return targets[~ignored], targets.gt_boxes[ignored]


def may_be_sampled(boxes: Boxes, real: Boxes, regions: Boxes, matcher: Matcher, ioa_thresh: float) -> Tensor:
    """Tell which boxes may become training examples.

    Args:
        boxes: R anchors or proposals.
        real: M boxes of labelled objects.
        regions: I ignore regions. All boxes XYXY, absolute pixels of the network input.
        matcher: gives a box the label 1 when it matches a real object.
        ioa_thresh: share of its own area, in (0, 1], from which on a box lies in a region.

    Returns:
        (R,) bool: outside every region, or a positive of a real object.
    """
    if len(regions) == 0:
        return torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    inside = (pairwise_ioa(regions, boxes) >= ioa_thresh).any(dim=0)  # (R,)
    if len(real) == 0:
        return ~inside
    _, labels = matcher(pairwise_iou(real, boxes))
    return ~inside | (labels == 1)


@PROPOSAL_GENERATOR_REGISTRY.register()
class FewShotRPN(RPN):
    """Detectron2's RPN, with no negative anchors in ignore regions."""

    @configurable
    def __init__(self, *, ignore_ioa_thresh: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_ioa_thresh = ignore_ioa_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments from MODEL.RPN.* and MODEL.IGNORE_REGIONS.*."""
        return {**super().from_config(cfg, input_shape), "ignore_ioa_thresh": cfg.MODEL.IGNORE_REGIONS.IOA_THRESH}

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label anchors 1 (object), 0 (background) or -1 (unused), as Detectron2 does; see there for shapes.

        Anchors in ignore regions are taken out before the sampling, so that their number does not bias it.
        """
        if not has_ignore_rows(gt_instances):
            return super().label_and_sample_anchors(anchors, gt_instances)
        every = Boxes.cat(anchors)
        all_labels, all_boxes = [], []
        for targets in gt_instances:
            real, regions = split_ignore_rows(targets)
            kept = may_be_sampled(every, real.gt_boxes, regions, self.anchor_matcher, self.ignore_ioa_thresh)
            labels, boxes = super().label_and_sample_anchors([every[kept]], [real])
            full_labels = labels[0].new_full((len(every),), -1)
            full_labels[kept] = labels[0]
            full_boxes = torch.zeros_like(every.tensor)
            full_boxes[kept] = boxes[0]
            all_labels.append(full_labels)
            all_boxes.append(full_boxes)
        return all_labels, all_boxes


class IgnoreRegionsMixin:
    """For ROI heads, put before the Detectron2 class: no background regions sampled in ignore regions."""

    def __init__(self, *, ignore_ioa_thresh: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_ioa_thresh = ignore_ioa_thresh

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """Match and sample proposals as Detectron2 does, those in ignore regions and the ignore rows left out."""
        if has_ignore_rows(targets):
            kept = [self._without_ignored(p, t) for p, t in zip(proposals, targets, strict=True)]
            proposals, targets = [p for p, _ in kept], [t for _, t in kept]
        return super().label_and_sample_proposals(proposals, targets)

    def _without_ignored(self, proposals: Instances, targets: Instances) -> tuple[Instances, Instances]:
        real, regions = split_ignore_rows(targets)
        kept = may_be_sampled(
            proposals.proposal_boxes, real.gt_boxes, regions, self.proposal_matcher, self.ignore_ioa_thresh
        )
        return proposals[kept], real
