"""The narrow FewX detector of the golden files: how it is built, its names, and what a configuration may ask of it.

The other test files of FewX build theirs with the functions here.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fsdet.checkpoint.rename import TABLES, rename
from fsdet.engine.setup import default_config
from fsdet.methods import METHODS, fewx
from fsdet.methods.fewx.detector import FewXRCNN
from fsdet.methods.fewx.roi_heads import RelationRes5ROIHeads
from fsdet.methods.fewx.rpn import AttentionRPN

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "fewx"
DETECTOR = (
    "MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "FewXRCNN", "MODEL.PROPOSAL_GENERATOR.NAME", "AttentionRPN",
    "MODEL.ROI_HEADS.NAME", "RelationRes5ROIHeads", "MODEL.RESNETS.OUT_FEATURES", "['res4']", "MODEL.RESNETS.DEPTH",
    "50", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "14", "MODEL.BACKBONE.FREEZE_AT", "3", "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
    "12000", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "2000", "MODEL.RPN.PRE_NMS_TOPK_TEST", "6000",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "100", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "128",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.5",
)  # fmt: skip
NARROW = (
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.WIDTH_PER_GROUP",
    "4",
)  # fmt: skip


def read(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def tensors(name):
    """Arrays of a golden file that are numbers."""
    return {key: torch.from_numpy(value) for key, value in read(name).items() if value.dtype.kind != "U"}


def configure(*opts):
    cfg = default_config()
    cfg.merge_from_list([*DETECTOR, *NARROW, *(str(opt) for opt in opts)])
    return cfg


def build(*opts):
    """Narrow detector with random weights that stay finite."""
    torch.manual_seed(0)
    model = build_model(configure(*opts)).eval()
    for name, value in model.state_dict().items():
        if name.endswith("conv3.norm.weight"):
            value.fill_(0.3)
    return model


def golden_state():
    return {name: torch.from_numpy(value) for name, value in read("tiny_weights").items()}


def golden_model(*opts):
    """Narrow detector with the weights of the golden files."""
    model = build(*opts)
    state, report = rename(golden_state(), TABLES["fewx"], model.state_dict())
    assert report.is_full, report.describe()
    model.load_state_dict(state)
    return model


def query(seed=0, size=(64, 96), boxes=((4.0, 4, 60, 60), (50, 20, 90, 62)), classes=(7, 7)):
    """Input of one image without supports."""
    generator = torch.Generator().manual_seed(seed)
    instances = Instances(size, gt_boxes=Boxes(torch.tensor(boxes).view(-1, 4)), gt_classes=torch.tensor(classes))
    instances.gt_classes = instances.gt_classes.long()
    image = torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8)
    return {"image": image, "height": size[0], "width": size[1], "instances": instances}


def episode(seed=0, shots=2, crop=64, **kwargs):
    """Input of one image with its supports."""
    generator = torch.Generator().manual_seed(seed + 100)
    crops = torch.randint(0, 256, (2 * shots, 3, crop, crop), generator=generator).to(torch.uint8)
    boxes = torch.tensor([[8.0, 4, 50, 60]]).repeat(2 * shots, 1) + torch.rand(2 * shots, 4, generator=generator)
    return {**query(seed, **kwargs), "support_images": crops, "support_boxes": boxes, "support_classes": ("a", "b")}


def losses_of(model, batch, seed=1):
    """Losses of one training pass, with the gradients left in the model."""
    torch.manual_seed(seed)
    with EventStorage():
        losses = model.train()(batch)
    model.zero_grad()
    sum(losses.values()).backward()
    return losses


def close(actual, expected, share=1e-4):
    """The golden tolerance: largest difference at most `share` of the largest value."""
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    difference = float((actual.detach() - expected).abs().max())
    assert difference <= share * float(expected.abs().max()), difference


def released_names():
    """State dict names of a released R-50 checkpoint, written down from its layout."""
    norm = [f"norm.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")]
    names = [f"backbone.stem.conv1.{leaf}" for leaf in ["weight", *norm]]
    stages = [("backbone.res2", 3), ("backbone.res3", 4), ("backbone.res4", 6), ("roi_heads.res5", 3)]
    for stage, blocks in stages:
        for block in range(blocks):
            layers = ["conv1", "conv2", "conv3"] + (["shortcut"] if block == 0 else [])
            names += [f"{stage}.{block}.{layer}.{leaf}" for layer in layers for leaf in ["weight", *norm]]
    rpn = [f"proposal_generator.rpn_head.{layer}" for layer in ("conv", "objectness_logits", "anchor_deltas")]
    head = "roi_heads.box_predictor"
    linear = ["cls_score_pr", "bbox_pred_pr", "cls_score_cor", "fc_1", "fc_2", "cls_score_fc"]
    names += [f"{module}.{leaf}" for module in [*rpn, *(f"{head}.{n}" for n in linear)] for leaf in ("weight", "bias")]
    return names + [f"{head}.{layer}.weight" for layer in ("conv_1", "conv_2", "conv_3", "conv_cor")]


class TestNames:
    def test_released_checkpoint_fits_with_nothing_unmatched(self):
        model = build()
        assert sorted(released_names()) == sorted(model.state_dict())
        old = {**golden_state(), "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(15, 4)}
        state, report = rename(old, TABLES["fewx"], model.state_dict())
        assert report.is_full, report.describe()
        assert set(report.dropped) == {
            "pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors.0",
        }  # fmt: skip
        assert model.load_state_dict(state).missing_keys == []

    def test_classes_are_registered_and_listed(self):
        model = build()
        assert fewx in METHODS and fewx.RENAMES == ()
        assert type(model) is FewXRCNN and type(model.proposal_generator) is AttentionRPN
        assert type(model.roi_heads) is RelationRes5ROIHeads

    @pytest.mark.parametrize("classes", [1, 80])
    def test_one_class_inside_whatever_the_data_has(self, classes):
        model = build("MODEL.ROI_HEADS.NUM_CLASSES", classes)
        assert model.roi_heads.num_classes == 1
        same = build("MODEL.ROI_HEADS.NUM_CLASSES", 5).state_dict()
        assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())

    def test_parameters_of_the_full_detector(self):
        """55.28 million in all, 8.51, 9.52, 14.94 and 22.31 in its parts (specification of the release)."""
        wide = ("MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
        with torch.device("meta"):
            model = build_model(configure(*wide, "MODEL.RESNETS.WIDTH_PER_GROUP", 64, "MODEL.DEVICE", "meta"))
        parts = (model.backbone, model.proposal_generator, model.roi_heads.res5, model.roi_heads.box_predictor)
        counts = [round(sum(p.numel() for p in part.parameters()) / 1e6, 2) for part in parts]
        assert counts == [8.51, 9.52, 14.94, 22.31]


class TestNetworks:
    """Channel counts come from the network."""

    @pytest.mark.parametrize(
        ("opts", "channels"),
        [
            (("MODEL.RESNETS.DEPTH", 101), (64, 128)),
            (("MODEL.RESNETS.RES2_OUT_CHANNELS", 24, "MODEL.RESNETS.WIDTH_PER_GROUP", 6), (96, 192)),
            (("MODEL.RESNETS.STRIDE_IN_1X1", False), (64, 128)),
            (("MODEL.ROI_HEADS.SKIP_UNREAD_CELLS", False), (64, 128)),
            (("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 10), (64, 128)),
        ],
    )
    def test_trains_and_detects(self, opts, channels):
        model = build(*opts)
        assert model.roi_heads.box_predictor.channels == channels[1]
        losses = losses_of(model, [episode()])
        assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(grad is not None and torch.isfinite(grad).all() for grad in grads.values())
        with torch.no_grad():
            item = episode()
            kernels, features = model.eval().encode_crops(item["support_images"], item["support_boxes"], 2)
        assert kernels.shape == (2, channels[0]) and features.shape[:2] == (2, channels[1])

    def test_shallow_network_of_bottlenecks_or_none(self):
        """Res5 of a C4 head is made of bottlenecks; Detectron2 gives depth 18 other channels, which must not fit."""
        model = build("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
        assert model.roi_heads.box_predictor.channels == 512
        assert torch.isfinite(sum(losses_of(model, [episode()]).values()))

    def test_too_few_cells_are_refused(self):
        with pytest.raises(ValueError, match="POOLER_RESOLUTION to 9 or more"):
            build("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7)

    @pytest.mark.parametrize(
        ("opts", "message"),
        [
            (("MODEL.RPN.IN_FEATURES", ("res3", "res4")), 'expected ."res4". in both'),
            (("MODEL.RPN.IN_FEATURES", ("res3",)), 'expected ."res4". in both'),
            (("INPUT.FS.SUPPORT_WAY", 3), "SUPPORT_WAY is 3; two-way"),
            (("FEWX.TEST_SHOTS", 0), "FEWX.TEST_SHOTS is 0; expected 1 or more"),
            (("FEWX.ROWS_AT_ONCE", 0), "FEWX.ROWS_AT_ONCE is 0"),
            (("FEWX.RELATIONS", ()), "FEWX.RELATIONS: got"),
            (("FEWX.RELATIONS", ("global", "text")), "FEWX.RELATIONS: got"),
            (("MODEL.ROI_HEADS.NAME", "FewShotRes5ROIHeads"), "expected RelationRes5ROIHeads"),
            (("MODEL.ROI_HEADS.BACKGROUND_KEPT", 8), "BACKGROUND_KEPT"),
            (("MODEL.PROPOSAL_GENERATOR.FREEZE", True, "MODEL.BACKBONE.CACHE_MIB", 8), "CACHE_MIB"),
        ],
    )
    def test_contradictions_are_refused(self, opts, message):
        with pytest.raises(ValueError, match=message):
            build(*opts)
