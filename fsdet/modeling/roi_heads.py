"""ROI heads of the suite: Detectron2's, with a named box predictor and with ignore regions.

State-dict names are Detectron2's and those of the official few-shot code: `roi_heads.box_predictor.cls_score.*` and
`roi_heads.box_predictor.bbox_pred.*`.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from detectron2.utils.registry import Registry
from torch import nn

from fsdet.modeling.ignore_regions import IgnoreRegionsMixin

BOX_PREDICTOR_REGISTRY = Registry("BOX_PREDICTOR")
BOX_PREDICTOR_REGISTRY.__doc__ = """
Box predictors by the name that MODEL.ROI_HEADS.OUTPUT_LAYER gives. An entry is a function `name(cfg, input_shape)`
that returns a module with the interface of Detectron2's FastRCNNOutputLayers. Methods register theirs here.
"""


@BOX_PREDICTOR_REGISTRY.register()
def linear(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Detectron2's predictor: two linear layers with biases."""
    return FastRCNNOutputLayers(cfg, input_shape)


def build_box_predictor(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the predictor named by MODEL.ROI_HEADS.OUTPUT_LAYER.

    Raises:
        ValueError: for a name that nobody has registered.
    """
    name = cfg.MODEL.ROI_HEADS.OUTPUT_LAYER
    known = sorted(key for key, _ in BOX_PREDICTOR_REGISTRY)
    if name not in known:
        raise ValueError(
            f"MODEL.ROI_HEADS.OUTPUT_LAYER: got {name!r}, expected one of {known} (import fsdet.methods for them all)"
        )
    return BOX_PREDICTOR_REGISTRY.get(name)(cfg, input_shape)


def _few_shot_arguments(args: dict[str, Any], cfg: CfgNode, feature_shape: ShapeSpec) -> dict[str, Any]:
    """Complete the constructor arguments that Detectron2 derived from the config."""
    args["ignore_ioa_thresh"] = cfg.MODEL.IGNORE_REGIONS.IOA_THRESH
    # Detectron2 has made the linear predictor already; another one would only shift the random numbers.
    if cfg.MODEL.ROI_HEADS.OUTPUT_LAYER != "linear":
        args["box_predictor"] = build_box_predictor(cfg, feature_shape)
    return args


@ROI_HEADS_REGISTRY.register()
class FewShotROIHeads(IgnoreRegionsMixin, StandardROIHeads):
    """Heads on a feature pyramid; MODEL.ROI_HEADS.FREEZE_FEAT concerns `box_head`."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments from MODEL.ROI_HEADS.*, MODEL.ROI_BOX_HEAD.* and MODEL.IGNORE_REGIONS.*."""
        args = super().from_config(cfg, input_shape)
        return _few_shot_arguments(args, cfg, args["box_head"].output_shape)


@ROI_HEADS_REGISTRY.register()
class FewShotRes5ROIHeads(IgnoreRegionsMixin, Res5ROIHeads):
    """Heads on res4 with the fifth stage run per region (C4); MODEL.ROI_HEADS.FREEZE_FEAT concerns `res5`."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments from MODEL.ROI_HEADS.*, MODEL.RESNETS.* and MODEL.IGNORE_REGIONS.*."""
        args = super().from_config(cfg, input_shape)
        channels = args["box_predictor"].cls_score.in_features  # res5's, averaged over the region
        return _few_shot_arguments(args, cfg, ShapeSpec(channels=channels, height=1, width=1))
