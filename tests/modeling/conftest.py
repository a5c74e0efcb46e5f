"""A Faster R-CNN of a few thousand parameters and images to feed it."""

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fsdet.methods import add_method_configs
from fsdet.modeling import add_modeling_config


def _tiny_cfg(kind: str = "fpn", **overrides) -> CfgNode:
    cfg = get_cfg()
    add_modeling_config(cfg)
    add_method_configs(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PIXEL_STD = [57.0, 57.0, 57.0]
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "FewShotRPN"
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 40
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8, 16, 32, 48, 64]]
    if kind == "fpn":
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 16
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [48], [64]]
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ROI_HEADS.NAME = "FewShotROIHeads"
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    else:
        cfg.MODEL.ROI_HEADS.NAME = "FewShotRes5ROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 4
    cfg.merge_from_list([part for pair in overrides.items() for part in pair])
    return cfg


@pytest.fixture
def tiny_cfg():
    """tiny_cfg("fpn" | "c4", **{"DOTTED.KEY": value}) -> CfgNode."""
    return _tiny_cfg


@pytest.fixture
def make_inputs():
    """make_inputs(ignore=[box, ...]) -> two training inputs of 64 x 96 with two labelled objects each."""

    def make(ignore=(), seed=0):
        generator = torch.Generator().manual_seed(seed)
        inputs = []
        for number in range(2):
            boxes = torch.tensor([[4.0, 4, 30, 30], [40, 20, 60, 50]])
            classes = torch.tensor([number, 3])
            if len(ignore):
                boxes = torch.cat([boxes, torch.tensor(ignore, dtype=torch.float32)])
                classes = torch.cat([classes, torch.full((len(ignore),), -1)])
            instances = Instances((64, 96), gt_boxes=Boxes(boxes), gt_classes=classes)
            image = torch.randint(0, 256, (3, 64, 96), generator=generator).to(torch.uint8)
            inputs.append({"image": image, "height": 64, "width": 96, "instances": instances})
        return inputs

    return make


@pytest.fixture
def storage():
    """Detectron2's models log into the current event storage."""
    with EventStorage() as events:
        yield events
