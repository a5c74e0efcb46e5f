"""DeFRCN, Decoupled Faster R-CNN: RPN and heads train behind gradient decoupled layers of their own.

Paper: "DeFRCN: Decoupled Faster R-CNN for Few-Shot Object Detection", Qiao, Zhao, Li, Qiu, Wu, Zhang, ICCV 2021, arXiv
2108.09017. Official code: https://github.com/er-muyue/DeFRCN (MIT).

Parts: the decoupled branches and the dropout predictor (`decoupled.py`), the names of the official configuration
(`official.py`), prototypical calibration at test time (`fsdet.modeling.calibration`, for every method), and data,
surgery, schedules and freezing, which all methods share. Departures: the affine layers belong to their branches, so
two parameter names differ (RENAMES); the K shots are chosen with a seed; a novel stage does all its iterations (the
official trainer starts at the second one); biases decay with 1e-4, as with the Detectron2 of the authors. The pyramid
variant and res5 without unread cells are ours.
"""

from __future__ import annotations

from detectron2.config import CfgNode

from fsdet.methods.defrcn.decoupled import DECOUPLED
from fsdet.methods.defrcn.official import OFFICIAL_KEYS

__all__ = ["OFFICIAL_KEYS", "RENAMES", "add_config", "complete_config"]

# (official prefix, name here) of parameters whose names differ: the official detector keeps the affine layers at its
# top level, here each belongs to the branch that reads through it.
RENAMES = (("affine_rpn", "proposal_generator.decouple.res4"), ("affine_rcnn", "roi_heads.decouple.res4"))


def add_config(cfg: CfgNode) -> None:
    """Declare DeFRCN's keys (official keys of the same names, except where said)."""
    for branch in (cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS):
        # True: the branch reads Affine(GDL(features)); False: the features. Needs the decoupled classes, see
        # `complete_config`.
        branch.ENABLE_DECOUPLE = False
        # Factor on the gradient that the branch sends into the backbone, >= 0. Published: RPN 0 in all stages; heads
        # 0.75 in the base stage, 0.001 (VOC; the paper: 0.01) and 0.01 (COCO) in the novel stage.
        branch.BACKWARD_SCALE = 1.0
    # Probability that OUTPUT_LAYER "dropout" (official: CLS_DROPOUT True) drops a component of the feature that the
    # class scores read, in training.
    cfg.MODEL.ROI_HEADS.DROPOUT_RATIO = 0.8


def complete_config(cfg: CfgNode) -> None:
    """Put the decoupled classes in place of those that a network file names, wherever ENABLE_DECOUPLE asks for them.

    So a DeFRCN recipe goes with every network of the suite.

    Raises:
        ValueError: when a class has no decoupled version.
    """
    components = {"RPN": cfg.MODEL.PROPOSAL_GENERATOR, "ROI_HEADS": cfg.MODEL.ROI_HEADS}
    wanted = [key for key in components if cfg.MODEL[key].ENABLE_DECOUPLE]
    for component in components.values() if wanted else ():
        component.NAME = DECOUPLED.get(component.NAME, component.NAME)
    for key in wanted:
        if components[key].NAME not in DECOUPLED.values():
            raise ValueError(
                f"MODEL.{key}.ENABLE_DECOUPLE is True, but {components[key].NAME} cannot be decoupled; expected one of "
                f"{', '.join(DECOUPLED)}, or set MODEL.{key}.ENABLE_DECOUPLE False"
            )
