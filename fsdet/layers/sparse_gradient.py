"""A 3x3 convolution whose backward pass visits only the places that a gradient has reached.

Behind the hidden convolution of an RPN lies a loss over a few hundred sampled anchors. At all other places its gradient
is exactly zero, and a dense backward pass multiplies these zeros by the kernel. Here the places with a gradient are
gathered as rows of one matrix product; the result is the same up to rounding.

Shapes: N images, C input and O output channels, H and W of the features, M places with a gradient, k*k kernel cells.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor

# Share of places with a gradient up to which gathering them pays; above, the dense pass is faster.
MOST_PLACES = 0.5


class _SparseGradient(torch.autograd.Function):
    """`conv2d` of stride 1 with zero padding of half an odd kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.permute(0, 2, 3, 1)  # (N, H, W, O)
        places = (rows != 0).any(dim=3).nonzero()  # (M, 3)
        if len(places) > MOST_PLACES * grad[:, 0].numel():
            padding = weight.shape[2] // 2
            grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad, padding=padding) if needs_x else None
            grad_weight = torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=padding) if needs_weight else None
        else:
            values = rows[places.unbind(1)]  # (M, O)
            cells = _cells(places, x, weight.shape[2])
            grad_x = _input_gradient(values, weight, cells, x) if needs_x else None
            grad_weight = _weight_gradient(values, weight, cells, x) if needs_weight else None
        return grad_x, grad_weight, grad.sum(dim=(0, 2, 3)) if needs_bias else None


def _cells(places: Tensor, x: Tensor, size: int) -> Tensor:
    """Rows of the padded input, one pixel a row, under the kernel at each of the (M, 3) places: (M, k*k)."""
    height, width = x.shape[2] + size - 1, x.shape[3] + size - 1
    reach = torch.arange(size, device=x.device)
    corner = (places[:, 0] * height + places[:, 1]) * width + places[:, 2]
    return corner[:, None] + (reach[:, None] * width + reach).flatten()


def _weight_gradient(values: Tensor, weight: Tensor, cells: Tensor, x: Tensor) -> Tensor:
    """(O, C, k, k): every place's gradient times the input under its kernel."""
    out_channels, channels, size, _ = weight.shape
    pad = size // 2
    table = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1).reshape(-1, channels)
    patches = table[cells].flatten(1)  # (M, k*k*C)
    return (values.t() @ patches).view(out_channels, size, size, channels).permute(0, 3, 1, 2)


def _input_gradient(values: Tensor, weight: Tensor, cells: Tensor, x: Tensor) -> Tensor:
    """(N, C, H, W): what every place sends to the input under its kernel, summed in single precision or wider."""
    images, channels, height, width = x.shape
    pad = weight.shape[2] // 2
    sent = (values @ weight.permute(0, 2, 3, 1).flatten(1)).view(-1, channels)  # (M*k*k, C)
    dtype = torch.promote_types(sent.dtype, torch.float32)
    table = sent.new_zeros(images * (height + 2 * pad) * (width + 2 * pad), channels, dtype=dtype)
    table.index_add_(0, cells.flatten(), sent.to(dtype))
    table = table.view(images, height + 2 * pad, width + 2 * pad, channels)
    return table[:, pad : pad + height, pad : pad + width].permute(0, 3, 1, 2).to(x.dtype)


class SparseGradientConv2d(Conv2d):
    """Detectron2's Conv2d (norm and activation behind it), with stride 1, an odd kernel and a sparse backward pass.

    Args:
        args, kwargs: Detectron2's.

    Raises:
        ValueError: for strides, dilations, groups or paddings that the backward pass does not know.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        half = (self.kernel_size[0] // 2,) * 2
        is_plain = self.stride == self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        if not is_plain or self.kernel_size[0] % 2 == 0 or len(set(self.kernel_size)) > 1 or self.padding != half:
            raise ValueError(
                f"a sparse backward pass needs an odd square kernel, stride 1 and its half as padding: {self}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C, H, W) to (N, O, H, W), in the precision that autocast asks for."""
        operands: tuple[Tensor | None, ...] = (x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            operands = tuple(None if operand is None else operand.to(dtype) for operand in operands)
        x = _SparseGradient.apply(*operands)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)
