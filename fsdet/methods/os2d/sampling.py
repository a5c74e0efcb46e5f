"""The matching score: correlations read where the aligned template lies, and averaged.

Point (row, column) of a template's grid reads the channel of that cell of the template. Two oddities of the official
code are kept, since published weights have learnt with them: an anchor's centre lies half a cell beyond the cell that
it belongs to, and the 15 points of a line span 15 cells, so that they stand 15/14 cells apart. The outer two rings of
points have no weight and are not computed.

Source: Osokin et al., "OS2D" (ECCV 2020), section 4. Letters: M pairs of scene and class, N anchors, H and W cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fsdet.methods.os2d.geometry import SIDE

_RING = 2  # points next to the border of the template that do not count
_INNER = slice(_RING, SIDE - _RING)
_POINTS = (SIDE - 2 * _RING) ** 2  # 121


def sampling_grid(matrices: Tensor, centers: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the points of the aligned templates lie on the map.

    All points of an anchor are one affine function of their place in the template, so they are one small product.

    Args:
        matrices: (M, N, 2, 3), or M = 1 for all pairs alike.
        centers: (N, 2) or (M, N, 2) x and y of the anchors in cells, see `anchor_centers`.
        size: (H, W).

    Returns:
        (M, 121, N, 2) x and y of the points, columns of the template first, from -1 at the centre of the first cell of
        the map to 1 at the centre of the last one; not clamped.
    """
    height, width = size
    # A map of one cell has no extent: every place on it reads this cell.
    scale = matrices.new_tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)])
    shift = F.pad((centers * scale - 1).unsqueeze(-3), (0, 0, 0, 0, 2, 0))  # (..., 3, N, 2): of x, of y, constant
    factors = matrices.permute(0, 3, 1, 2) * (SIDE / 2 * scale) + shift  # (M, 3, N, 2)
    grid = torch.bmm(_points(matrices).expand(len(matrices), -1, -1), factors.flatten(2))
    return grid.unflatten(2, (-1, 2))


def pool_samples(correlation: Tensor, grid: Tensor) -> Tensor:
    """Mean over the points of the correlations, read bilinearly; points beyond the map read its border.

    Args:
        correlation: (M, 225, H, W), columns of the template first.
        grid: (M, 121, N, 2), see `sampling_grid`; or (1, 121, N, 2).

    Returns:
        (M, N) scores in [-1, 1].
    """
    pairs = len(correlation)
    maps = correlation.unflatten(1, (SIDE, SIDE))[:, _INNER, _INNER].reshape(pairs * _POINTS, 1, *correlation.shape[2:])
    places = grid.expand(pairs, -1, -1, -1).reshape(pairs * _POINTS, 1, *grid.shape[2:])
    samples = F.grid_sample(maps, places, mode="bilinear", padding_mode="border", align_corners=True)
    return samples.view(pairs, _POINTS, grid.shape[2]).mean(dim=1)


def _points(like: Tensor) -> Tensor:
    """(121, 3): x, y and 1 of the points that count, x being constant down a column of the template."""
    line = torch.linspace(-1, 1, SIDE, dtype=like.dtype, device=like.device)[_INNER]
    x, y = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], dim=-1).flatten(0, 1)
