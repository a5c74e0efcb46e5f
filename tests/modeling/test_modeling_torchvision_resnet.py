"""The torchvision layout: the same numbers as torchvision's network, sizes, norms, freezing, and what is refused."""

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from fsdet.modeling.torchvision_resnet import TorchvisionC4Backbone


def config(*options):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "TorchvisionC4Backbone"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.merge_from_list(
        [
            "MODEL.RESNETS.STEM_OUT_CHANNELS",
            8,
            "MODEL.RESNETS.WIDTH_PER_GROUP",
            8,
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            32,
        ]
    )
    cfg.merge_from_list(["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0, *options])
    return cfg


def test_same_as_torchvision():
    """Its state dict loads without a name left over, and gives the output of its layer3."""
    original = torchvision.models.resnet50(weights=None).eval()
    generator = torch.Generator().manual_seed(0)
    for name, buffer in original.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    state = {k: v for k, v in original.state_dict().items() if not k.startswith(("layer4", "fc"))}
    ours = TorchvisionC4Backbone(50).eval()
    ours.load_state_dict(state)
    image = torch.randn(2, 3, 37, 50, generator=generator)
    with torch.no_grad():
        x = original.maxpool(original.relu(original.bn1(original.conv1(image))))
        expected = original.layer3(original.layer2(original.layer1(x)))
        torch.testing.assert_close(ours(image)["res4"], expected, rtol=0, atol=0)


@pytest.mark.parametrize(("depth", "count"), [(50, 8_543_296), (101, 27_535_424)])
def test_number_of_parameters(depth, count):
    """He et al.: the whole networks' 25,557,032 and 44,549,160 less layer4 and the classifier."""
    with torch.device("meta"):
        backbone = TorchvisionC4Backbone(depth)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == count
    assert backbone.output_shape() == {"res4": ShapeSpec(channels=1024, stride=16)}


@pytest.mark.parametrize("size", [(1, 1), (15, 17), (16, 33), (240, 31)])
def test_cells_of_a_picture(size):
    backbone = build_backbone(config()).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, *size))["res4"]
    assert features.shape == (1, 128, *(-(-side // 16) for side in size))


@pytest.mark.parametrize(("norm", "kind"), [("BN", nn.BatchNorm2d), ("FrozenBN", FrozenBatchNorm2d)])
def test_norms(norm, kind):
    backbone = build_backbone(config("MODEL.RESNETS.NORM", norm))
    norms = [module for module in backbone.modules() if isinstance(module, kind)]
    assert len(norms) == 1 + 3 * (3 + 4 + 6) + 3 and backbone.bn1 is norms[0]


def test_group_norm():
    backbone = TorchvisionC4Backbone(50, width=32, norm="GN")
    assert {m.num_groups for m in backbone.modules() if isinstance(m, nn.GroupNorm)} == {32}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


@pytest.mark.parametrize(
    ("freeze_at", "frozen"), [(0, set()), (1, {"conv1", "bn1"}), (3, {"conv1", "bn1", "layer1", "layer2"})]
)
def test_freezing(freeze_at, frozen):
    backbone = build_backbone(config("MODEL.BACKBONE.FREEZE_AT", freeze_at)).train()
    parts = {name.split(".")[0] for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert parts == frozen
    assert {name for name, child in backbone.named_children() if not child.training} == frozen


def test_what_the_layout_does_not_have():
    options = ("MODEL.RESNETS.STRIDE_IN_1X1", True, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    with pytest.raises(ValueError, match="(?s)RES2_OUT_CHANNELS is 256; expected 32.*STRIDE_IN_1X1 is True"):
        build_backbone(config(*options))
    with pytest.raises(ValueError, match="DEPTH is 18"):
        build_backbone(config("MODEL.RESNETS.DEPTH", 18))
    with pytest.raises(ValueError, match="NORM 'LN'"):
        TorchvisionC4Backbone(50, norm="LN")
