"""RPN head whose backward pass visits only the places of sampled anchors."""

from __future__ import annotations

from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from torch import nn

from fsdet.layers.sparse_gradient import SparseGradientConv2d


@RPN_HEAD_REGISTRY.register()
class SparseGradientRPNHead(StandardRPNHead):
    """Detectron2's head, chosen by MODEL.RPN.HEAD_NAME: same parameters, same numbers up to rounding.

    A loss over 256 anchors an image leaves most places of large pictures without a gradient.
    """

    def _get_rpn_conv(self, in_channels: int, out_channels: int) -> nn.Module:
        """Hidden 3x3 convolution with ReLU; Detectron2 calls this for each of MODEL.RPN.CONV_DIMS."""
        return SparseGradientConv2d(in_channels, out_channels, kernel_size=3, padding=1, activation=nn.ReLU())
