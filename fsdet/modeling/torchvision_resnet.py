"""ResNet-50 and ResNet-101 up to their third stage, in torchvision's layout: stride 16, one feature map.

Made of torchvision's own blocks and named as there (conv1, bn1, layer1 to layer3), so that its checkpoints, and those
of OS2D's release, load as they are. The stride of a block lies in its 3x3 convolution. Detectron2's ResNets need
nothing from here.

Source: He et al., CVPR 2016; OS2D (Osokin et al., ECCV 2020), feature extractor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from fsdet.modeling.freeze import freeze_module

BLOCKS = {50: (3, 4, 6), 101: (3, 4, 23)}  # depth -> blocks of layer1, layer2 and layer3
NORMS = ("BN", "GN", "SyncBN", "FrozenBN")
FEATURE = "res4"  # Detectron2's name of the map with stride 16


@BACKBONE_REGISTRY.register()
class TorchvisionC4Backbone(Backbone):
    """The first three stages of a torchvision ResNet; its only feature is "res4" (stride 16).

    Feature maps have ceil(side / 16) cells a side, whatever the size of the image.
    """

    @configurable
    def __init__(
        self, depth: int, *, width: int = 64, norm: str = "BN", freeze_at: int = 0, in_channels: int = 3
    ) -> None:
        """Build the network with torchvision's initial weights.

        Args:
            depth: 50 or 101.
            width: channels of the stem and of layer1's bottlenecks; the map has 16 times as many.
            norm: one of `NORMS`; "GN" has 32 groups.
            freeze_at: n > 0 freezes the stem (1) and the stages up to layer n - 1, as in Detectron2's ResNets.
            in_channels: of the images.
        Raises: ValueError for another depth or norm.
        """
        super().__init__()
        if depth not in BLOCKS or norm not in NORMS:
            raise ValueError(
                f"MODEL.RESNETS.DEPTH is {depth} and NORM {norm!r}; expected one of {tuple(BLOCKS)} and one of {NORMS}"
            )
        make_norm = partial(get_norm, norm)
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(width)
        channels = width
        for stage, blocks in enumerate(BLOCKS[depth]):
            planes, stride = width * 2**stage, 1 if stage == 0 else 2
            self.add_module(f"layer{stage + 1}", _make_stage(channels, planes, blocks, stride, make_norm))
            channels = planes * Bottleneck.expansion
        self._out_features = [FEATURE]
        self._out_feature_strides, self._out_feature_channels = {FEATURE: 16}, {FEATURE: channels}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in (self.conv1, self.bn1) if freeze_at >= 1 else ():
            freeze_module(module)
        for stage in self.stages[: max(0, freeze_at - 1)]:
            freeze_module(stage)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Constructor arguments from MODEL.RESNETS.* and MODEL.BACKBONE.FREEZE_AT.

        Raises: ValueError for what torchvision's layout does not have.
        """
        node = cfg.MODEL.RESNETS
        width = node.WIDTH_PER_GROUP
        expected = {
            "NUM_GROUPS": 1,
            "STEM_OUT_CHANNELS": width,
            "RES2_OUT_CHANNELS": width * Bottleneck.expansion,
            "STRIDE_IN_1X1": False,
            "OUT_FEATURES": [FEATURE],
        }
        found = {key: list(node[key]) if key == "OUT_FEATURES" else node[key] for key in expected}
        if faults := [
            f"MODEL.RESNETS.{key} is {found[key]}; expected {expected[key]}"
            for key in expected
            if found[key] != expected[key]
        ]:
            raise ValueError("TorchvisionC4Backbone cannot be built:\n  " + "\n  ".join(faults))
        return {
            "depth": node.DEPTH,
            "width": width,
            "norm": node.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "in_channels": input_shape.channels,
        }

    @property
    def stages(self) -> tuple[nn.Sequential, ...]:
        """layer1, layer2 and layer3."""
        return self.layer1, self.layer2, self.layer3

    def stem(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, width, ceil(H / 4), ceil(W / 4))."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to {"res4": (N, 16 * width, ceil(H / 16), ceil(W / 16))}."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return {FEATURE: x}


def _make_stage(channels: int, planes: int, blocks: int, stride: int, make_norm: Any) -> nn.Sequential:
    """Bottlenecks, of which the first changes stride and channels."""
    width = planes * Bottleneck.expansion
    shortcut = nn.Sequential(nn.Conv2d(channels, width, kernel_size=1, stride=stride, bias=False), make_norm(width))
    first = Bottleneck(channels, planes, stride, shortcut, norm_layer=make_norm)
    return nn.Sequential(first, *(Bottleneck(width, planes, norm_layer=make_norm) for _ in range(blocks - 1)))
