"""Attention RPN: proposals of one class, from features that the class's supports have weighted.

The mean of the supports' pooled res4 features is a 1x1 kernel; every channel of the query's features is multiplied by
its entry, and the usual RPN reads the result. Each pair of an image and a class is a virtual image of the RPN.

Source: FewX (Fan et al., CVPR 2020), section 4.2.1, in the form of the release. Departures, changing no number:
positive and negative passes of all images are one batch, and NMS looks at the best candidates first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from fsdet.methods.fewx.filtering import FilteredConv2d
from fsdet.modeling.ignore_regions import FewShotRPN

# Candidates that NMS sees first. Ten times the proposals that are kept at test time, as a rule enough.
FIRST_CANDIDATES = 1000


def attention_kernels(pooled: Tensor, shots: int) -> Tensor:
    """Mean over the shots, then over the grid: (K * S, C, P, P) pooled supports, class by class, to (K, C)."""
    return pooled.unflatten(0, (-1, shots)).mean(dim=1).mean(dim=(2, 3))


class AttentionRPNHead(StandardRPNHead):
    """Detectron2's head for one level, whose 3x3 convolution costs less at inference on a CPU."""

    def _get_rpn_conv(self, in_channels: int, out_channels: int) -> nn.Module:
        """Hidden convolution with ReLU; Detectron2 calls this for each of MODEL.RPN.CONV_DIMS."""
        return FilteredConv2d(in_channels, out_channels, padding=1, bias=True)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness (N, A, H, W) and deltas (N, 4 A, H, W) of one level (N, C, H, W)."""
        if not self.training or features[0].device.type != "cpu":
            return super().forward(features)
        # A CPU gains nothing by a batch, and alone an image is rounded in the same way whatever it shares a batch with.
        head = super().forward
        single = [head([feature]) for feature in features[0].split(1)]
        return [torch.cat([logits for (logits,), _ in single])], [torch.cat([deltas for _, (deltas,) in single])]


@PROPOSAL_GENERATOR_REGISTRY.register()
class AttentionRPN(FewShotRPN):
    """RPN on features of one level, weighted by the kernel of a class."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments from MODEL.RPN.* and MODEL.IGNORE_REGIONS.*."""
        args = super().from_config(cfg, input_shape)
        if StandardRPNHead.__name__ == cfg.MODEL.RPN.HEAD_NAME:
            args["head"] = AttentionRPNHead(cfg, [input_shape[level] for level in args["in_features"]])
        return args

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances] | None, kernels: Tensor
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Positive and negative pass of training; `propose` is for inference.

        Args:
            images: N images.
            features: the level (N, C, H, W) of them.
            gt_instances: of each image; all boxes count as the positive class.
            kernels: (N, 2, C), of the positive and the negative class of each image.
        Returns: proposals of 2 N virtual images, an image's positive pass before its negative one, and the losses:
            of an image the sum over both passes by twice the sampled anchors, averaged over the images.
        """
        (level,) = self.in_features
        weighted = (features[level][:, None] * kernels[..., None, None]).flatten(0, 1)
        virtual = ImageList(images.tensor, [size for size in images.image_sizes for _ in range(2)])
        targets = [target for target in gt_instances or () for _ in range(2)]
        return super().forward(virtual, {level: weighted}, targets)

    def propose(
        self,
        features: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        kernels: Tensor,
        pairs: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Proposals of pairs of an image and a class, best first.

        Args:
            features: (N, C, H, W) of N images.
            image_sizes: their (H, W) in pixels, without padding.
            kernels: (K, C).
            pairs: V times (number of the image, number of the class).
        Returns: V Instances with proposal_boxes and objectness_logits, at most MODEL.RPN.POST_NMS_TOPK_TEST each.
        """
        images, classes = (torch.tensor(column, device=features.device) for column in zip(*pairs, strict=True))
        weighted = features[images] * kernels[classes][..., None, None]
        sizes = [image_sizes[image] for image, _ in pairs]
        return super().forward(ImageList(weighted, sizes), {self.in_features[0]: weighted})[0]

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As in Detectron2, for 2 N virtual images; sampled positives of the negative passes then become negatives."""
        labels, boxes = super().label_and_sample_anchors(anchors, gt_instances)
        for label in labels[1::2]:
            label[label == 1] = 0
        return labels, boxes

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """As in Detectron2, see there; at inference without most of the work.

        Greedy NMS never lets a box influence a better one, so its first survivors are those among the best candidates,
        as soon as these are enough.
        """
        (logits,), (deltas,) = pred_objectness_logits, pred_anchor_deltas
        everything = min(self.pre_nms_topk[self.training], logits.shape[1])
        wanted = self.post_nms_topk[self.training]
        if self.training or everything <= FIRST_CANDIDATES or wanted >= FIRST_CANDIDATES:
            return super().predict_proposals(anchors, [logits], [deltas], image_sizes)
        with torch.no_grad():
            logits, order = logits.sort(descending=True, dim=1)
            proposals = self._best(anchors[0], logits, deltas, order, FIRST_CANDIDATES, image_sizes)
            short = [number for number, found in enumerate(proposals) if len(found) < wanted]
            if short:
                sizes = [image_sizes[number] for number in short]
                again = self._best(anchors[0], logits[short], deltas[short], order[short], everything, sizes)
                for number, found in zip(short, again, strict=True):
                    proposals[number] = found
        return proposals

    def _best(
        self, anchors: Boxes, logits: Tensor, deltas: Tensor, order: Tensor, count: int, image_sizes: list[Any]
    ) -> list[Instances]:
        """Decode the first `count` candidates and suppress among them.

        Args:
            anchors: A anchors.
            logits: (V, A), best first.
            deltas: (V, A, 4), in the order of the anchors.
            order: (V, A), the anchors in the order of the logits.
        """
        logits, order = logits[:, :count], order[:, :count]
        deltas = deltas.gather(1, order[..., None].expand(-1, -1, 4))
        boxes = self.box2box_transform.apply_deltas(deltas.flatten(0, 1), anchors.tensor[order].flatten(0, 1))
        return find_top_rpn_proposals(
            [boxes.unflatten(0, order.shape)],
            [logits],
            image_sizes,
            self.nms_thresh,
            count,
            self.post_nms_topk[False],
            self.min_box_size,
            training=False,
        )
