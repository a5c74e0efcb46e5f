"""res5 at inference on a CPU: frozen norms folded into the convolutions, and these in their fastest form.

Equal to the modules up to rounding. The folded weights are copies; they enter no state dict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from fsdet.methods.fewx.filtering import MIN_CHANNELS, FilteredConv

_CELLS = 14  # side of the maps on which a CPU computes 1x1 convolutions fastest


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution of (N, C, H, W) in channels-last memory format, without gradients; returns (N, O, H, W).

    It treats every cell alike, so the cells are laid out as the maps that suit the library best.
    """
    cells = x.permute(0, 2, 3, 1)
    if x.numel() and cells.is_contiguous() and cells[..., 0].numel() % _CELLS**2 == 0:
        maps = cells.reshape(-1, _CELLS, _CELLS, x.shape[1]).permute(0, 3, 1, 2)
        result = F.conv2d(maps, weight, bias).permute(0, 2, 3, 1)
        return result.reshape(*cells.shape[:3], -1).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias)


@dataclass(frozen=True)
class _FoldedConv:
    """A convolution and its frozen norm as one convolution."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> _FoldedConv:
        norm = conv.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = conv.weight * scale[:, None, None, None]
        bias = norm.bias - norm.running_mean * scale
        return cls(weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the weight and the padding tells what it does."""
        return {*self.stride, *self.dilation, self.groups} == {1}

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_plain and self.weight.shape[2:] == (1, 1):
            return pointwise(x, self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def with_relu(self, x: Tensor) -> Tensor:
        """The convolution and a ReLU."""
        return self(x).relu_()


class _FoldedBlock:
    """A bottleneck block."""

    def __init__(self, block: BottleneckBlock) -> None:
        self.conv1, middle, self.conv3 = (_FoldedConv.of(conv) for conv in (block.conv1, block.conv2, block.conv3))
        self.shortcut = None if block.shortcut is None else _FoldedConv.of(block.shortcut)
        is_filterable = middle.is_plain and middle.weight.shape[2:] == (3, 3) and middle.padding == (1, 1)
        self.conv2 = (
            FilteredConv(middle.weight, middle.bias, 1)
            if is_filterable and min(middle.weight.shape[:2]) >= MIN_CHANNELS
            else middle.with_relu
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self.behind(self.conv1.with_relu(x), x if self.shortcut is None else self.shortcut(x))

    def behind(self, inner: Tensor, outer: Tensor) -> Tensor:
        """What follows the first convolution and its ReLU, (N, B, H, W), and the shortcut, (N, O, H, W)."""
        return self.conv3(self.conv2(inner)).add_(outer).relu_()


@dataclass(frozen=True)
class Projections:
    """Maps behind the first convolution of a stage and behind its shortcut, both without bias: (N, ., H, W)."""

    inner: Tensor
    outer: Tensor

    def __getitem__(self, images: slice) -> Projections:
        """Those of some images."""
        return Projections(self.inner[images], self.outer[images])


class FoldedStage:
    """A stage of bottleneck blocks; call it with (N, C, H, W) in channels-last memory format, without gradients."""

    def __init__(self, stage: nn.Sequential) -> None:
        """`stage`: one that `fits`."""
        self.blocks = [_FoldedBlock(block) for block in stage]

    @staticmethod
    def fits(stage: nn.Module) -> bool:
        """Whether a stage consists of bottleneck blocks with frozen norms."""
        if not isinstance(stage, nn.Sequential) or any(type(block) is not BottleneckBlock for block in stage):
            return False
        layers = [conv for block in stage for conv in (block.conv1, block.conv2, block.conv3, block.shortcut)]
        return all(isinstance(conv.norm, FrozenBatchNorm2d) for conv in layers if conv is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, O, H', W')."""
        for block in self.blocks:
            x = block(x)
        return x

    @property
    def is_projectable(self) -> bool:
        """Whether the stage begins with two 1x1 convolutions that read every cell, see `project`."""
        first = self.blocks[0]
        layers = (first.conv1, first.shortcut)
        return all(layer is not None and layer.is_plain and layer.weight.shape[2:] == (1, 1) for layer in layers)

    def project(self, features: Tensor) -> Projections:
        """The first convolution and the shortcut, without their biases, of whole maps (N, C, H, W) instead of regions.

        Pooling averages cells and a 1x1 convolution weights channels, so they may change places. Many regions overlap
        on a map that has fewer cells than all of them together.
        """
        first = self.blocks[0]
        cells = features.contiguous(memory_format=torch.channels_last)
        inner, outer = (F.conv2d(cells, layer.weight) for layer in (first.conv1, first.shortcut))
        return Projections(inner, outer)

    def from_projections(self, pooled: Projections) -> Tensor:
        """The stage for regions (R, ., P, P) that were pooled from the maps of `project`; overwrites them."""
        first = self.blocks[0]
        inner = pooled.inner.add_(first.conv1.bias[:, None, None]).relu_()
        x = first.behind(inner, pooled.outer.add_(first.shortcut.bias[:, None, None]))
        for block in self.blocks[1:]:
            x = block(x)
        return x
