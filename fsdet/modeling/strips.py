"""The feature map of a picture of any size in bounded memory: a ResNet computed in strips of rows.

The result is that of the whole picture, because every strip is computed with all rows that its result depends on. The
memory of a whole pass is that of its first layers, some 200 bytes a pixel for a ResNet-50; in strips it is that of the
feature map (16 bytes a pixel with 1024 channels and stride 16), twice, and a constant.

The receptive field decides how. That of a ResNet-50 up to res4 reaches 133 pixels beyond a cell, of a ResNet-101 405,
so that tiles through the whole network would compute much twice. Here only the blocks down to the last stride, which
reach 53 pixels, run as one; each later block goes over the whole map before the next, and reaches one row.

Group norm has statistics over the whole picture, so that a network with it cannot be cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from fsdet.modeling.torchvision_resnet import TorchvisionC4Backbone

MAX_PIXELS = 2**21  # of the network input in one pass; 0.4 GB of features in a ResNet-50
_MIN_ROWS = 4  # rows of the feature map in a strip, however wide the picture is

Rows = Callable[[int, int], Tensor]  # (first row, row behind the last) -> (1, C, rows, W)


@dataclass(frozen=True)
class Window:
    """Rows that one row of a layer's result depends on: row i on [i * stride - padding, ... + kernel)."""

    kernel: int
    stride: int
    padding: int

    def size(self, size: int) -> int:
        """Rows of the result."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    def needed(self, first: int, end: int, size: int) -> tuple[int, int]:
        """Rows of the input, out of `size`, that the rows [first, end) of the result depend on."""
        start = first * self.stride - self.padding
        return max(0, start), min(size, (end - 1) * self.stride - self.padding + self.kernel)


@dataclass(frozen=True)
class Block:
    """A part of a network and the windows of its layers, in order."""

    run: Callable[[Tensor], Tensor]
    windows: tuple[Window, ...]

    @property
    def stride(self) -> int:
        """Of the part as a whole."""
        return reduce(lambda product, window: product * window.stride, self.windows, 1)


_STEM = (Window(7, 2, 3), Window(3, 2, 1))


def blocks_of(backbone: nn.Module) -> list[Block] | None:
    """The parts of a backbone, or None for one that cannot be cut into strips."""
    if any(isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d) for module in backbone.modules()):
        return None
    if isinstance(backbone, ResNet):
        if not isinstance(backbone.stem, BasicStem):
            return None
        stem, bottlenecks = backbone.stem, [block for stage in backbone.stages for block in stage]
    elif isinstance(backbone, TorchvisionC4Backbone):
        stem, bottlenecks = backbone.stem, [block for stage in backbone.stages for block in stage]
    else:
        return None
    if not all(isinstance(block, Bottleneck | BottleneckBlock) for block in bottlenecks):
        return None
    if any(block.conv2.dilation != (1, 1) for block in bottlenecks):
        return None
    return [Block(stem, _STEM), *(Block(block, (_bottleneck_window(block),)) for block in bottlenecks)]


def _bottleneck_window(block: Bottleneck | BottleneckBlock) -> Window:
    """Of the 3x3 convolution, which may come behind a 1x1 convolution with the stride."""
    reach = block.conv1.stride[0]
    return Window(2 * reach + 1, block.stride, reach)


def _grouped(blocks: list[Block]) -> list[Block]:
    """All blocks down to the last one with a stride as one, the others as they are."""
    last = max(number for number, block in enumerate(blocks) if block.stride > 1)
    head = blocks[: last + 1]
    windows = tuple(window for block in head for window in block.windows)
    return [Block(lambda x: reduce(lambda y, block: block.run(y), head, x), windows), *blocks[last + 1 :]]


@torch.no_grad()
def feature_map(
    backbone: nn.Module, feature: str, rows: Rows, size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> Tensor:
    """The feature map of one picture, in strips where it has more than `max_pixels` and the backbone allows it.

    Args:
        backbone: images (1, 3, H, W) -> {feature: (1, D, h, w)}, in evaluation mode.
        feature: which of its maps; the last one, for strips.
        rows: gives rows of the normalised picture.
        size: (H, W) of the picture.
        max_pixels: pixels of the picture in one pass, as far as four rows of the map allow.
    Returns: (D, h, w), equal to that of a whole pass but for the order in which sums are taken.
    """
    height, width = size
    blocks = blocks_of(backbone) if height * width > max_pixels else None
    if blocks is None:
        return backbone(rows(0, height))[feature][0]
    for block in _grouped(blocks):
        result = _run_in_strips(block, rows, height, _strip_rows(block, width, max_pixels))
        rows, height, width = (lambda first, end, x=result: x[:, :, first:end]), *result.shape[2:]
        max_pixels = max(1, max_pixels // block.stride**2)
    return result[0]


def _strip_rows(block: Block, width: int, max_pixels: int) -> int:
    """Rows of the result in one strip."""
    first, end = 0, 1
    for window in reversed(block.windows):
        first, end = first * window.stride - window.padding, (end - 1) * window.stride - window.padding + window.kernel
    return max(_MIN_ROWS, (max_pixels // width - (end - first)) // block.stride)


def _run_in_strips(block: Block, rows: Rows, height: int, strip: int) -> Tensor:
    """The block's result for a map of which `rows` gives the rows, `strip` rows of the result at a time."""
    heights = [height]
    for window in block.windows:
        heights.append(window.size(heights[-1]))
    result = None
    for first in range(0, heights[-1], strip):
        end = min(first + strip, heights[-1])
        start, stop = first, end
        for window, size in zip(reversed(block.windows), reversed(heights[:-1]), strict=True):
            start, stop = window.needed(start, stop, size)
        start -= start % block.stride  # so that the rows of all layers fall where they fall in the whole
        part = block.run(rows(start, stop))[:, :, first - start // block.stride :][:, :, : end - first]
        if result is None:
            result = part.new_empty((*part.shape[:2], heights[-1], part.shape[3]))
        result[:, :, first:end] = part
    return result
