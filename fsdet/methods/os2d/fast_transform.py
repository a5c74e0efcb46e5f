"""The alignment network at inference on a CPU: the numbers of `TransformNet` in a third of the time.

Batch norms are folded into the convolutions and these go through Fourier transforms, tile by tile. Cells lie under each
other as rows of channels, so that a window is gathered row by row and the output of one convolution is read by the next
where it lies. Where only some anchors are needed, only the tiles that they depend on are computed.

What one class costs on 60 x 80 cells, in ms of one core (EPYC, AVX-512), by the plain modules and here: 7 x 7
convolution 125 and 28, 5 x 5 convolution 18 and 9. Around them: correlations 25, reading 121 points 4, boxes 2. Tried
and left: channels-last layouts (no gain, 140 for the 7 x 7 convolution), correlations as a 1 x 1 convolution of 8 x 8
maps (3 gained, 3 lost by reordering for the sampler), complex products (as fast as three real ones, with more to
transform), windows of 12, 14, 18 and 20 cells (40, 33, 29 and 34 for 7 x 7), the last 5 x 5 layer by transforms (3.5
against 2.7), gathering by hand instead of `grid_sample` (30 against 4).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fsdet.methods.os2d.fourier import FourierConv
from fsdet.methods.os2d.scratch import Scratch
from fsdet.methods.os2d.tiles import all_tiles, places_in, tiles_near, window_rows
from fsdet.methods.os2d.transform_net import LEAST_NORM, TransformNet


class _Plan(NamedTuple):
    """Rows that every step reads.

    Attributes:
        wide, narrow: (W * W, T) windows of the two convolutions.
        cells: (C, H, W) of the last map.
    """

    wide: Tensor
    narrow: Tensor
    cells: Tensor


class FastTransform:
    """Correlations to affine parameters, without gradients."""

    def __init__(self, net: TransformNet) -> None:
        """`net`: whose weights are taken over as they are now, norms in evaluation mode."""
        self.scratch = Scratch()
        self._wide = FourierConv(net.conv[0], net.conv[1], self.scratch)
        self._narrow = FourierConv(net.conv[3], net.conv[4], self.scratch)
        self._linear = net.linear
        self._whole: tuple[tuple[int, ...], _Plan] | None = None  # the last plan for all cells, and its size

    def __call__(self, correlation: Tensor, needed: Tensor | None = None) -> Tensor:
        """Map correlations to parameters.

        Args:
            correlation: (C, 225, H, W).
            needed: (C, H, W) bool, cells whose parameters are wanted; None: all.

        Returns:
            (C, P, H, W); cells that are not needed hold anything finite.
        """
        wide, narrow, cells = self._plan((len(correlation), *correlation.shape[2:]), needed)
        rows = self._narrow(self._wide(self._normalized_rows(correlation), wide), narrow)
        maps = rows.index_select(0, cells.flatten()).view(*cells.shape, -1)
        return self._linear(maps.permute(0, 3, 1, 2))

    def _normalized_rows(self, correlation: Tensor) -> Tensor:
        """The network's first step, and cells as rows: (C, K, H, W) to (1 + C * H * W, K), row 0 being 0."""
        classes, channels, height, width = correlation.shape
        rows = self.scratch.take("rows", 1 + classes * height * width, channels)
        rows[0] = 0
        cells = rows[1:].view(classes, height * width, channels)
        torch.clamp(correlation.flatten(2).transpose(1, 2), min=0, out=cells)
        cells.div_(torch.linalg.vector_norm(cells, dim=2, keepdim=True).add_(LEAST_NORM))
        return rows

    def _plan(self, size: tuple[int, ...], needed: Tensor | None) -> _Plan:
        """The plan for C maps of H x W cells."""
        if needed is None:
            if self._whole is None or self._whole[0] != size:
                wide = all_tiles(*size)
                self._whole = size, self._rows(size, wide, wide)
            return self._whole[1]
        reach = self._linear.padding[0]
        return self._rows(size, tiles_near(needed, reach + self._narrow.padding), tiles_near(needed, reach))

    def _rows(self, size: tuple[int, ...], wide: Tensor, narrow: Tensor) -> _Plan:
        """The plan that computes these tiles (T, 3) of the two convolutions."""
        cells = torch.arange(1, math.prod(size) + 1).view(size)
        first = window_rows(cells, wide, self._wide.window, self._wide.padding)
        cells = places_in(wide, size)
        second = window_rows(cells, narrow, self._narrow.window, self._narrow.padding)
        return _Plan(first, second, places_in(narrow, size))
