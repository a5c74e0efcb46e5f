"""Anchors, affine matrices, corners, boxes and box codes of OS2D.

One square anchor stands at every cell. Its local frame is [-1, 1] x [-1, 1]; an affine matrix moves the template's grid
within it. Boxes are XYXY in pixels of the network input; N = H * W anchors, row by row.

Source: Osokin et al., "OS2D" (ECCV 2020), section 4; the code of boxes is that of Faster R-CNN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRIDE = 16  # pixels of the network input per cell
SIDE = 15  # cells a side of a template and of an anchor
ANCHOR = 240  # pixels a side of an anchor: SIDE cells

_CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
_MOST_LOG = math.log(1000 / 16)  # of a size relative to the anchor's, so that exp() stays finite; as in Detectron2
_LEAST_SIZE = 1.0  # pixels
# Smallest determinant that is inverted, of matrices around the identity. Single precision knows none below.
_LEAST_DETERMINANT = 1e-8


def anchor_centers(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(N, 2): x and y of the anchors of an H x W map, in cells: column + 0.5 and row + 0.5."""
    columns = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    rows = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    return torch.stack([columns.repeat(height), rows.repeat_interleave(width)], dim=1)


def anchor_boxes(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(N, 4) boxes of the anchors of an H x W map; not clipped to the image."""
    centers = anchor_centers(height, width, device) * STRIDE
    return torch.cat([centers - ANCHOR / 2, centers + ANCHOR / 2], dim=1)


def affine(parameters: Tensor, *, inverse: bool) -> Tensor:
    """Build 2 x 3 matrices: x' = a x + b y + tx, y' = c x + d y + ty.

    Args:
        parameters: (..., P) with P = 6, (a, b, tx, c, d, ty), or P = 4, (a, tx, d, ty) and no shear.
        inverse: whether the matrices undo what the parameters describe. The determinant is kept 1e-8 from 0, so that
            the result is finite.

    Returns:
        (..., 2, 3).

    Raises:
        ValueError: for another number of parameters.
    """
    if parameters.shape[-1] == 6:
        a, b, tx, c, d, ty = parameters.unbind(-1)
    elif parameters.shape[-1] == 4:
        a, tx, d, ty = parameters.unbind(-1)
        b = c = torch.zeros_like(a)
    else:
        raise ValueError(f"an affine matrix takes 4 or 6 parameters, got {parameters.shape[-1]}.")
    if inverse:
        determinant = a * d - b * c
        least = torch.full_like(determinant, _LEAST_DETERMINANT).copysign(determinant.detach())
        scale = torch.where(determinant.abs() < _LEAST_DETERMINANT, least, determinant).reciprocal()
        a, b, c, d = d * scale, -b * scale, -c * scale, a * scale
        tx, ty = -(a * tx + b * ty), -(c * tx + d * ty)
    return torch.stack([a, b, tx, c, d, ty], dim=-1).unflatten(-1, (2, 3))


def corners(matrices: Tensor, anchors: Tensor) -> Tensor:
    """Where the corners of the template's grid come to lie.

    Args:
        matrices: (..., N, 2, 3) in the local frames of the anchors.
        anchors: (N, 4) or (..., N, 4).

    Returns:
        (..., N, 4, 2): x, y of the corners that were top left, top right, bottom left, bottom right.
    """
    grid = matrices.new_tensor([[-1, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]])
    centers, half = _centers_and_halves(anchors)
    return centers.unsqueeze(-2) + half.unsqueeze(-2) * (grid @ matrices.transpose(-1, -2))


def enclosing_boxes(matrices: Tensor, anchors: Tensor) -> Tensor:
    """Boxes around the transformed grids: the same as around their corners, or around all their points.

    Args:
        matrices: (..., N, 2, 3) in the local frames of the anchors.
        anchors: (N, 4) or (..., N, 4).

    Returns:
        (..., N, 4).
    """
    centers, half = _centers_and_halves(anchors)
    # Sides are put together in the small numbers of the local frame: boxes narrower than a pixel keep their width.
    shift, reach = matrices[..., 2], matrices[..., :2].abs().sum(dim=-1)
    return torch.cat([centers + half * (shift - reach), centers + half * (shift + reach)], dim=-1)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Code boxes relative to anchors, weights (10, 10, 5, 5).

    Boxes narrower or lower than 1 px are first made 1 px wide or high, to the right and down.

    Args:
        boxes, anchors: (..., 4), of shapes that broadcast.

    Returns:
        (..., 4): shift of the centre and logarithm of the size, both relative to the anchor's size.
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    high = torch.where(low + _LEAST_SIZE > high, low.detach() + _LEAST_SIZE, high)
    centers, half = _centers_and_halves(anchors)
    weights = boxes.new_tensor(_CODE_WEIGHTS)
    shift = ((low + high) / 2 - centers) / (2 * half)
    size = ((high - low) / (2 * half)).log()
    return torch.cat([shift, size], dim=-1) * weights


def decode_boxes(codes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes of codes, see `encode_boxes`; none is more than 62.5 times as large as its anchor.

    Args:
        codes, anchors: (..., 4), of shapes that broadcast.

    Returns:
        (..., 4).
    """
    centers, half = _centers_and_halves(anchors)
    shift, size = (codes / codes.new_tensor(_CODE_WEIGHTS)).split(2, dim=-1)
    centers = shift * (2 * half) + centers
    reach = size.clamp(max=_MOST_LOG).exp() * half
    return torch.cat([centers - reach, centers + reach], dim=-1)


def _centers_and_halves(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2) centres and (..., 2) half sizes of (..., 4) boxes."""
    low, high = boxes.split(2, dim=-1)
    return (low + high) / 2, (high - low) / 2
