"""TFA, the two-phase fine-tuning baseline: train on base classes, then fine-tune the box predictor on K shots.

Paper: "Frustratingly Simple Few-Shot Object Detection", Wang, Huang, Darrell, Gonzalez, Yu, ICML 2020, arXiv
2003.06957. Official code: https://github.com/ucbdrive/few-shot-object-detection (Apache-2.0).

TFA w/ fc and w/ cos differ in MODEL.ROI_HEADS.OUTPUT_LAYER, FRCN+ft-full leaves the three FREEZE switches off. The rest
of the method is data (K-shot lists), surgery of the predictor and schedules, which all methods share. Departures: the
cosine rows are normalised inside the graph by default (COSINE_IN_PLACE gives the official variant), scores are computed
in single precision under mixed precision, and nothing of Detectron2 is forked.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers

from fsdet.layers.cosine import DEFAULT_SCALE, CosineClassifier
from fsdet.modeling.roi_heads import BOX_PREDICTOR_REGISTRY

# (official prefix, name here) of parameters whose names differ. Only the learnable scale moved, from the predictor
# into its classifier.
RENAMES = (("roi_heads.box_predictor.scale", "roi_heads.box_predictor.cls_score.scale"),)


def add_config(cfg: CfgNode) -> None:
    """Declare TFA's keys."""
    # Factor on the cosine of a region and a class row, no unit; -1: learnable, starting at 20. Below 10 the softmax
    # over 20 classes cannot become confident. Official key of the same name.
    cfg.MODEL.ROI_HEADS.COSINE_SCALE = DEFAULT_SCALE
    # True: overwrite the rows by their normalised copy before each training step, as the official code does; its
    # gradient has a radial part. False: normalise inside the graph. Inference is the same.
    cfg.MODEL.ROI_HEADS.COSINE_IN_PLACE = False


class CosineOutputLayers(FastRCNNOutputLayers):
    """Box predictor with cosine class scores; box deltas stay a biased linear map of the raw feature.

    One row per foreground class and one for the background, no bias: `cls_score.weight` is (K + 1, D).

    Source: TFA section 3.2; official class CosineSimOutputLayers.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        cosine_scale: float = DEFAULT_SCALE,
        cosine_in_place: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.cls_score = CosineClassifier(
            self.cls_score.in_features, self.num_classes + 1, scale=cosine_scale, in_place=cosine_in_place
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Constructor arguments from MODEL.ROI_HEADS.* and MODEL.ROI_BOX_HEAD.*."""
        return {
            **super().from_config(cfg, input_shape),
            "cosine_scale": cfg.MODEL.ROI_HEADS.COSINE_SCALE,
            "cosine_in_place": cfg.MODEL.ROI_HEADS.COSINE_IN_PLACE,
        }


@BOX_PREDICTOR_REGISTRY.register()
def cosine(cfg: CfgNode, input_shape: ShapeSpec) -> CosineOutputLayers:
    """TFA's predictor."""
    return CosineOutputLayers(cfg, input_shape)
