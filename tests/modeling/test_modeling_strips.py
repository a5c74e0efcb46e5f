"""Feature maps in strips: equal to the whole pass for both layouts, whatever the size; what cannot be cut; memory."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn

from fsdet.modeling import strips
from fsdet.modeling.strips import Window, blocks_of, feature_map
from fsdet.modeling.torchvision_resnet import TorchvisionC4Backbone


def detectron2_resnet(stride_in_1x1, norm="BN", depth=50):
    cfg = get_cfg()
    for key, value in {"STEM_OUT_CHANNELS": 8, "WIDTH_PER_GROUP": 8, "RES2_OUT_CHANNELS": 32, "DEPTH": depth}.items():
        cfg.MODEL.RESNETS[key] = value
    cfg.MODEL.RESNETS.STRIDE_IN_1X1, cfg.MODEL.RESNETS.NORM = stride_in_1x1, norm
    return build_backbone(cfg)


BACKBONES = {
    "torchvision": lambda: TorchvisionC4Backbone(50, width=8),
    "3x3": lambda: detectron2_resnet(False, "FrozenBN"),
    "1x1": lambda: detectron2_resnet(True),
}


def random_network(name):
    torch.manual_seed(0)
    backbone = BACKBONES[name]().eval()
    for key, buffer in backbone.named_buffers():
        if "running_mean" in key:  # so that zero padding is not the same as zeros behind a norm
            buffer.uniform_(-1, 1)
    return backbone


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [(337, 45), (272, 32)])
def test_same_as_the_whole(name, size):
    backbone = random_network(name)
    picture = torch.randn(1, 3, *size)
    read = []

    def rows(first, end):
        read.append(end - first)
        return picture[:, :, first:end]

    whole = feature_map(backbone, "res4", rows, size)
    assert read == [size[0]]
    parts = feature_map(backbone, "res4", rows, size, max_pixels=1)  # four rows of the map at a time
    assert len(read) == 1 + -(-size[0] // 64) and max(read[1:]) <= 131 + 3 * 16 + 15 < 197
    assert whole.shape == parts.shape == (128, -(-size[0] // 16), -(-size[1] // 16))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def test_rows_by_hand():
    """A 3x3 convolution with stride 2 behind one with stride 1, on 10 rows."""
    second, first = Window(3, 2, 1), Window(3, 1, 1)
    assert (first.size(10), second.size(10), second.size(9)) == (10, 5, 5)
    assert second.needed(1, 3, 10) == (1, 6) and first.needed(1, 6, 10) == (0, 7)
    assert second.needed(0, 5, 10) == (0, 10)


def test_strips_have_as_many_rows_as_fit():
    """One cell depends on 107 rows of a ResNet-50 down to its last stride, each further row of cells on 16 more."""
    head, *others = strips._grouped(blocks_of(random_network("torchvision")))
    assert head.stride == 16 and len(others) == 5
    assert strips._strip_rows(head, 2048, 2**22) == (2048 - 107) // 16
    assert strips._strip_rows(head, 100_000, 2**22) == 4  # however wide
    assert strips._strip_rows(others[0], 128, 2**14) == 128 - 3


def test_group_norm_cannot_be_cut():
    """Its statistics are those of the whole picture, which then passes at once."""
    backbone = TorchvisionC4Backbone(50, width=32, norm="GN").eval()
    assert blocks_of(backbone) is None
    read = []
    feature_map(backbone, "res4", lambda a, b: read.append((a, b)) or torch.zeros(1, 3, b - a, 16), (70, 16), 1)
    assert read == [(0, 70)]


@pytest.mark.parametrize("backbone", [nn.Identity(), detectron2_resnet(False, depth=101).res4])
def test_unknown_networks_are_not_cut(backbone):
    assert blocks_of(backbone) is None
