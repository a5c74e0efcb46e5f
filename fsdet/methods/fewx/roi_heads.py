"""C4 heads of FewX: regions and supports through res5, pairs of them through the relation heads.

Source: FewX (Fan et al., CVPR 2020), in the form of the release. The regions are pooled from the plain res4 features,
not from the attention maps; supports pass res5 one by one and are averaged behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from fsdet.methods.fewx.contrastive import PlateauWatch, image_losses
from fsdet.methods.fewx.folded import FoldedStage, Projections
from fsdet.methods.fewx.relation import BACKGROUND, MATCH, MultiRelationHead, RegionParts, SupportParts
from fsdet.modeling.derived import Derived, is_cpu_inference
from fsdet.modeling.roi_heads import FewShotRes5ROIHeads, SinglePrecisionPooler

MIN_SUPPORT_SIDE = 1.0  # px; the crop of a very thin object can end with a box without width


def widen(boxes: Tensor) -> Tensor:
    """Boxes (M, 4) XYXY with sides of at least one pixel, about the same centre; others are unchanged.

    A box without area would pool nothing but zeros.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    missing = (MIN_SUPPORT_SIDE - sides).clamp(min=0) / 2
    return torch.cat([boxes[:, :2] - missing, boxes[:, 2:] + missing], dim=1)


@ROI_HEADS_REGISTRY.register()
class RelationRes5ROIHeads(FewShotRes5ROIHeads):
    """Heads that tell whether a region shows a class's supports. Inside there is one class, whatever the data has.

    `box_predictor` is the multi-relation head.
    """

    @configurable
    def __init__(
        self,
        *,
        support_pooler: nn.Module,
        box2box_transform: Box2BoxTransform,
        score_thresh: float,
        nms_thresh: float,
        detections_per_image: int,
        legacy_boundary: bool = False,
        plateau_after: int = 500,
        **kwargs: Any,
    ) -> None:
        """Make the heads; usually from a configuration.

        Args:
            support_pooler: pools all cells of a support, also those that res5 does not read: the kernel has them.
            box2box_transform: of the box deltas.
            score_thresh: smallest score of a detection, in [0, 1].
            nms_thresh: IoU from which on detections of one class exclude each other.
            detections_per_image: over all classes.
            legacy_boundary: see `contrastive.select_rows`.
            plateau_after: training steps before a constant `loss_cls` is warned of.
            kwargs: of FewShotRes5ROIHeads.
        """
        super().__init__(**kwargs)
        self.support_pooler = support_pooler
        self.box2box_transform = box2box_transform
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.detections_per_image, self.legacy_boundary = detections_per_image, legacy_boundary
        self.plateau = PlateauWatch(after=plateau_after)
        self._folded = Derived(FoldedStage)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments from MODEL.ROI_HEADS.*, MODEL.ROI_BOX_HEAD.*, MODEL.RESNETS.* and FEWX.*.

        Raises: ValueError for BACKGROUND_KEPT, whose way of sampling contradicts the ratio of the pairs.
        """
        if cfg.MODEL.ROI_HEADS.BACKGROUND_KEPT:
            raise ValueError("MODEL.ROI_HEADS.BACKGROUND_KEPT: FewX chooses its background itself; set it to 0")
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.OUTPUT_LAYER = 1, "linear"
        args = super().from_config(cfg, input_shape)
        heads, box_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
        support_pooler = ROIPooler(
            output_size=box_head.POOLER_RESOLUTION,
            scales=(1.0 / input_shape[args["in_features"][0]].stride,),
            sampling_ratio=box_head.POOLER_SAMPLING_RATIO,
            pooler_type=box_head.POOLER_TYPE,
        )
        args["box_predictor"] = MultiRelationHead(
            args["box_predictor"].cls_score.in_features,
            -(-box_head.POOLER_RESOLUTION // 2),
            cfg.FEWX.RELATIONS,
            mean_correlation=cfg.FEWX.CORRELATION == "mean",
        )
        return {
            **args,
            "support_pooler": SinglePrecisionPooler(support_pooler),
            "box2box_transform": Box2BoxTransform(weights=box_head.BBOX_REG_WEIGHTS),
            "score_thresh": heads.SCORE_THRESH_TEST,
            "nms_thresh": heads.NMS_THRESH_TEST,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "legacy_boundary": cfg.FEWX.LEGACY_BOUNDARY,
            # The release's recipe leaves the plateau about when its warm-up ends.
            "plateau_after": max(500, 2 * cfg.SOLVER.WARMUP_ITERS) * cfg.SOLVER.ACCUMULATION_STEPS,
        }

    def train(self, mode: bool = True) -> RelationRes5ROIHeads:
        """Switch the mode; folded weights are made anew."""
        self._folded.forget()
        return super().train(mode)

    def _stage(self, pooled: Tensor) -> Tensor:
        """res5 of pooled cells, in channels-last memory format: faster, and the same numbers."""
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        if len(pooled) and is_cpu_inference(self, pooled) and FoldedStage.fits(self.res5):
            return self._folded(self.res5)(pooled)
        return self.res5(pooled)

    def support_features(self, features: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Features of supports, one box each.

        Args:
            features: (M, C4, H, W) res4 features of the crops.
            boxes: (M, 4) XYXY in pixels of the crops.
        Returns: pooled res4 features (M, C4, P4, P4), and what res5 makes of them, (M, C5, P, P).
        """
        pooled = self.support_pooler([features], [Boxes(box) for box in widen(boxes).split(1)])
        step = getattr(self.pooler, "step", 1)
        return pooled, self._stage(pooled[:, :, ::step, ::step])

    def prepare(self, features: Tensor) -> Tensor | Projections:
        """What `region_features` reads fastest when it is called often on the same images (N, C4, H, W)."""
        if is_cpu_inference(self, features) and FoldedStage.fits(self.res5):
            stage = self._folded(self.res5)
            if stage.is_projectable:
                return stage.project(features)
        return features

    def region_features(self, features: Tensor | Projections, boxes: list[Boxes]) -> Tensor:
        """Features (R, C5, P, P) behind res5 of the boxes of N images.

        Args:
            features: (N, C4, H, W) on res4, or what `prepare` has made of them.
            boxes: of each image, XYXY in pixels of the network input.
        """
        if isinstance(features, Projections):
            pooled = (self.pooler([level], boxes) for level in (features.inner, features.outer))
            maps = (level.contiguous(memory_format=torch.channels_last) for level in pooled)
            return self._folded(self.res5).from_projections(Projections(*maps))
        return self._stage(self.pooler([features], boxes))

    def forward(
        self,
        features: Tensor,
        proposals: list[Instances],
        targets: list[Instances],
        parts: SupportParts,
    ) -> dict[str, Tensor]:
        """Losses of the positive and the negative pass of N images.

        Args:
            features: (N, C4, H, W), plain res4 features.
            proposals: of 2 N virtual images, an image's positive pass before its negative one.
            targets: of the N images; `gt_classes` 0 for every object of the positive class.
            parts: of 2 N classes, in the order of the proposals.
        Returns: "loss_cls" and "loss_box_reg", means over the images.
        """
        twice = [target for target in targets for _ in range(2)]
        sampled = self.label_and_sample_proposals(proposals, twice)
        for negative in sampled[1::2]:
            negative.gt_classes = torch.full_like(negative.gt_classes, BACKGROUND)
        boxes = [Boxes.cat([p.proposal_boxes, n.proposal_boxes]) for p, n in _passes(sampled)]
        counts = torch.tensor([len(regions) for regions in sampled], device=features.device)
        index = torch.arange(len(sampled), device=features.device).repeat_interleave(counts)
        logits, deltas = self.box_predictor(self.region_features(features, boxes), parts, index)
        return self._losses(logits, deltas, sampled)

    def _losses(self, logits: Tensor, deltas: Tensor, sampled: list[Instances]) -> dict[str, Tensor]:
        """Split the rows by image and average."""
        sizes = [len(positive) + len(negative) for positive, negative in _passes(sampled)]
        losses, shares = [], []
        for rows, boxes, (positive, negative) in zip(
            logits.split(sizes), deltas.split(sizes), _passes(sampled), strict=True
        ):
            classes = torch.cat([positive.gt_classes, negative.gt_classes])
            proposals = Boxes.cat([positive.proposal_boxes, negative.proposal_boxes]).tensor
            # Without an object there are no targets; nothing is regressed then.
            has_targets = positive.has("gt_boxes")
            targets = Boxes.cat([positive.gt_boxes, negative.gt_boxes]).tensor if has_targets else proposals
            image, kept = image_losses(
                rows,
                boxes,
                classes,
                proposals,
                targets,
                positives=len(positive),
                transform=self.box2box_transform,
                legacy_boundary=self.legacy_boundary,
            )
            losses.append(image)
            shares.append((classes[kept] == MATCH).float().sum() / max(len(kept), 1))
        means = {name: torch.stack([image[name] for image in losses]).mean() for name in losses[0]}
        self.plateau.update(means["loss_cls"], torch.stack(shares).mean())
        return means

    def score(self, regions: RegionParts, parts: SupportParts, index: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Compare regions with classes, at inference.

        Args:
            regions: R regions.
            parts: K classes.
            index: (R,) the class of each region.
            boxes: (R, 4) XYXY of the regions, network input.
        Returns: match probabilities (R,) and regressed boxes (R, 4), not clipped.
        """
        logits, deltas = self.box_predictor.relate(regions, parts, index)
        scores = logits.float().softmax(dim=1)[:, MATCH]
        return scores, self.box2box_transform.apply_deltas(deltas.float(), boxes)

    def detect(self, boxes: Tensor, scores: Tensor, classes: Tensor, image_size: tuple[int, int]) -> Instances:
        """Detections of one image: NMS within each class, then the best of all classes.

        Args:
            boxes: (R, 4) XYXY, network input.
            scores: (R,).
            classes: (R,) int64.
            image_size: (H, W) in pixels.
        Returns: Instances with pred_boxes, scores and pred_classes, best first.
        """
        kept = torch.isfinite(boxes).all(dim=1) & (scores > self.score_thresh)  # no NaN is larger
        boxes, scores, classes = Boxes(boxes[kept]), scores[kept], classes[kept]
        boxes.clip(image_size)
        best = batched_nms(boxes.tensor, scores, classes, self.nms_thresh)
        best = best[: self.detections_per_image] if self.detections_per_image >= 0 else best
        return Instances(image_size, pred_boxes=boxes[best], scores=scores[best], pred_classes=classes[best])


def _passes(sampled: Sequence[Instances]) -> list[tuple[Instances, Instances]]:
    """Positive and negative pass of each image."""
    return list(zip(sampled[::2], sampled[1::2], strict=True))
