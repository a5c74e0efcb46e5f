"""Layers that change what a branch sends back into a shared backbone, and how it reads it.

Source: DeFRCN, "DeFRCN: Decoupled Faster R-CNN for Few-Shot Object Detection" (Qiao et al., ICCV 2021), gradient
decoupled layer; https://github.com/er-muyue/DeFRCN. Shapes: N images, C channels, H and W of the features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _ScaledGradient(torch.autograd.Function):
    """Identity whose backward pass multiplies by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Not grad * 0: an overflow under loss scaling would pass as NaN.
        return (torch.zeros_like(grad) if ctx.scale == 0 else grad * ctx.scale), None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return `x` unchanged; its gradient is multiplied by `scale`.

    With scale 0 the gradient is a tensor of zeros, so that whatever lies before still counts as trained: weight decay
    and momentum go on, and no parameter is left without a gradient.

    Args:
        x: any shape, floating point.
        scale: finite number >= 0, no unit.

    Source: DeFRCN, gradient decoupled layer.
    """
    return x if scale == 1 else _ScaledGradient.apply(x, scale)


class ChannelAffine(nn.Module):
    """One trainable factor and offset per channel: y_c = w_c * x_c + b_c, at first the identity.

    Under mixed precision the result has the parameters' precision.

    Args:
        channels: C.
        bias: whether there is an offset.

    Source: DeFRCN, the affine layer behind the gradient decoupled layer.
    """

    def __init__(self, channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) features to the same shape."""
        y = x * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"channels={self.weight.shape[1]}, bias={self.bias is not None}"
