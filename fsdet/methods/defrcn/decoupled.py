"""Decoupled branches of Faster R-CNN: what RPN and heads send back into the backbone, and how they read it.

Source: DeFRCN (Qiao et al., ICCV 2021), gradient decoupled layer. Each branch reads Affine(GDL(F)): GDL passes the
features F on and scales the gradient on its way back, and the affine layer, which lies on the branch's side, gets the
whole gradient.

The official detector has one feature level (res4). On a pyramid every level has an affine layer of its own and all
share the branch's scale; this is ours, not the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, FastRCNNOutputLayers
from detectron2.structures import ImageList
from torch import Tensor, nn

from fsdet.layers.gradient import ChannelAffine, scale_gradient
from fsdet.modeling.ignore_regions import FewShotRPN
from fsdet.modeling.roi_heads import BOX_PREDICTOR_REGISTRY, FewShotRes5ROIHeads, FewShotROIHeads


class Decoupling(nn.ModuleDict):
    """Gradient decoupled layer and affine layer in front of a branch; one affine per feature level.

    Args:
        channels: C of every level that the branch reads.
        scale: factor on the gradient that goes back into the backbone, finite and >= 0, no unit.
        enabled: False hands the features on as they are. The affine parameters then exist, so that a checkpoint of
            either kind fits, but are frozen.

    Raises:
        ValueError: for a scale that is negative or not finite.
    """

    def __init__(self, channels: Mapping[str, int], *, scale: float, enabled: bool) -> None:
        super().__init__({level: ChannelAffine(count) for level, count in channels.items()})
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"BACKWARD_SCALE: got {scale}, expected a factor >= 0 (1: the whole gradient, 0: none)")
        self.scale, self.enabled = scale, enabled
        if not enabled:
            self.requires_grad_(False)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace the branch's levels, (N, C, H, W) each; the others stay."""
        if not self.enabled:
            return features
        return features | {level: affine(scale_gradient(features[level], self.scale)) for level, affine in self.items()}

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"scale={self.scale}, enabled={self.enabled}"


class DecoupledBranch:
    """For RPN and ROI heads, put before the Detectron2 class: the branch reads the features through `decouple`.

    MODEL.RPN or MODEL.ROI_HEADS (`KEYS`) says which levels it reads, with which scale, and whether at all.
    """

    KEYS: str

    def __init__(self, *, decouple: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.decouple = decouple

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments of the Detectron2 class, and the decoupling."""
        keys = cfg.MODEL[cls.KEYS]
        channels = {level: input_shape[level].channels for level in keys.IN_FEATURES}
        decouple = Decoupling(channels, scale=keys.BACKWARD_SCALE, enabled=keys.ENABLE_DECOUPLE)
        return {**super().from_config(cfg, input_shape), "decouple": decouple}

    def forward(self, images: ImageList, features: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """As the Detectron2 class, on the branch's own reading of the features."""
        return super().forward(images, self.decouple(features), *args, **kwargs)


@PROPOSAL_GENERATOR_REGISTRY.register()
class DecoupledRPN(DecoupledBranch, FewShotRPN):
    """RPN behind a gradient decoupled layer and an affine layer."""

    KEYS = "RPN"

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@ROI_HEADS_REGISTRY.register()
class DecoupledRes5ROIHeads(DecoupledBranch, FewShotRes5ROIHeads):
    """C4 heads behind a gradient decoupled layer and an affine layer."""

    KEYS = "ROI_HEADS"

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@ROI_HEADS_REGISTRY.register()
class DecoupledROIHeads(DecoupledBranch, FewShotROIHeads):
    """Pyramid heads behind a gradient decoupled layer and one affine layer per level; ours, not the paper's."""

    KEYS = "ROI_HEADS"

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


# The class that a network file names -> its decoupled version.
DECOUPLED = {
    "FewShotRPN": "DecoupledRPN",
    "FewShotRes5ROIHeads": "DecoupledRes5ROIHeads",
    "FewShotROIHeads": "DecoupledROIHeads",
}


class DropoutOutputLayers(FastRCNNOutputLayers):
    """Linear box predictor whose class scores read a dropped-out feature in training; box deltas the whole one.

    Args:
        dropout_ratio: probability in [0, 1) that a component of the feature is dropped.

    Source: DeFRCN's released configurations (CLS_DROPOUT).
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, dropout_ratio: float, **kwargs: Any) -> None:
        super().__init__(input_shape, **kwargs)
        if not 0 <= dropout_ratio < 1:
            raise ValueError(f"MODEL.ROI_HEADS.DROPOUT_RATIO: got {dropout_ratio}, expected a probability in [0, 1)")
        self.dropout = nn.Dropout(dropout_ratio)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Constructor arguments from MODEL.ROI_HEADS.* and MODEL.ROI_BOX_HEAD.*."""
        return {**super().from_config(cfg, input_shape), "dropout_ratio": cfg.MODEL.ROI_HEADS.DROPOUT_RATIO}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class scores (R, K + 1) and box deltas (R, 4K), or (R, 4) when class-agnostic, of (R, D) features."""
        x = x.flatten(start_dim=1)
        return self.cls_score(self.dropout(x)), self.bbox_pred(x)


@BOX_PREDICTOR_REGISTRY.register()
def dropout(cfg: CfgNode, input_shape: ShapeSpec) -> DropoutOutputLayers:
    """DeFRCN's predictor of the novel stage."""
    return DropoutOutputLayers(cfg, input_shape)
