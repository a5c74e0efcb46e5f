"""Small models and checkpoints in the real names."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn


def _head(classes: int, width: int, *, cosine: bool, agnostic: bool) -> nn.Module:
    head = nn.Module()
    head.cls_score = nn.Linear(width, classes + 1, bias=not cosine)
    head.bbox_pred = nn.Linear(width, 4 if agnostic else 4 * classes)
    return head


@pytest.fixture
def toy():
    """toy(5) -> a module with the parameter names of a detector: a backbone layer and a predictor of 5 classes."""

    def build(classes: int, *, width: int = 6, cosine: bool = False, agnostic: bool = False, cascade: int = 0):
        model = nn.Module()
        model.backbone = nn.Module()
        model.backbone.conv1 = nn.Conv2d(3, 4, 3)
        model.backbone.norm = nn.BatchNorm2d(4)
        model.roi_heads = nn.Module()
        if cascade:
            heads = [_head(classes, width, cosine=cosine, agnostic=agnostic) for _ in range(cascade)]
            model.roi_heads.box_predictor = nn.ModuleList(heads)
        else:
            model.roi_heads.box_predictor = _head(classes, width, cosine=cosine, agnostic=agnostic)
        return model

    return build


@pytest.fixture(scope="session")
def tiny_detector():
    """tiny_detector("fpn" | "c4") -> stock Faster R-CNN, R-50 of a few channels, 15 classes."""

    def build(kind: str, classes: int = 15) -> nn.Module:
        cfg = get_cfg()
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.WEIGHTS = ""
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 4
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
        if kind == "fpn":
            cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
            cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
            cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
            cfg.MODEL.FPN.OUT_CHANNELS = 8
            cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
            cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
            cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
            cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
            cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
            cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
            cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
            cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 2
        return build_model(cfg)

    return build


class Counter:
    """Something to checkpoint beside the model."""

    def __init__(self):
        self.state = {"steps": 0, "noise": torch.zeros(3)}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.fixture
def counter():
    return Counter()
