"""RoIAlign of every n-th cell: what a strided 1x1 convolution reads of a pooled region.

A C4 head pools P x P cells per region, and the first convolutions of res5 read only every second one of them in either
direction: 16 of 49 for P = 7, 49 of 196 for P = 14. Here only those are pooled, at the sampling points of the whole
grid, so the result is that of pooling everything and throwing the rest away.

Bilinear sampling is separable, and so is the mean over a cell's sampling points: a cell is a weighted sum of a few rows
and columns of the features. Each pixel of that patch is read once, with all its channels together.

Source: He et al., "Mask R-CNN" (ICCV 2017), section 3 (RoIAlign); the conventions are those of torchvision's
`roi_align` with `aligned=True`. Shapes: N images, R regions, C channels, P cells and Q read cells a side, S sampling
points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_cells(
    features: Tensor, rois: Tensor, *, size: int, step: int, scale: float, sampling_ratio: int = 0
) -> Tensor:
    """Pool the cells [::step, ::step] of RoIAlign's size x size grid.

    Computed in single precision, boxes included; the result has the type of the features.

    Args:
        features: (N, C, H, W).
        rois: (R, 5) image index in [0, N) and box XYXY in pixels of the network input; no gradient flows into them.
        size: cells a side of the whole grid.
        step: every how many cells one is read.
        scale: pixels of the features per pixel of the input, a power of two.
        sampling_ratio: sampling points a side of a cell; 0: as many as the cell is pixels wide, rounded up.

    Returns:
        (R, C, Q, Q) with Q = ceil(size / step), in channels-last memory format.
    """
    _, channels, height, width = features.shape
    rois = rois.detach().float()
    y_index, y_weight = _read_lines(rois[:, 2], rois[:, 4], height, size, step, scale, sampling_ratio)
    x_index, x_weight = _read_lines(rois[:, 1], rois[:, 3], width, size, step, scale, sampling_ratio)
    weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]  # (R, Q, Q, Sy, Sx)
    rows = rois[:, 0].long().view(-1, 1, 1) * height + y_index  # (R, Q, Sy): lines of all images under each other
    pixels = rows[:, :, None, :, None] * width + x_index[:, None, :, None, :]
    used = weights > 0
    counts = used.flatten(3).sum(dim=3).flatten()  # pixels per cell
    table = features.permute(0, 2, 3, 1).reshape(-1, channels).float()  # a pixel a row; free when channels-last
    with torch.autocast(features.device.type, enabled=False):
        cells = F.embedding_bag(
            pixels[used], table, counts.cumsum(0) - counts, mode="sum", per_sample_weights=weights[used]
        )  # (R * Q * Q, C)
    side = y_weight.shape[1]
    return cells.to(features.dtype).view(-1, side, side, channels).permute(0, 3, 1, 2)


def _read_lines(
    start: Tensor, end: Tensor, length: int, size: int, step: int, scale: float, sampling_ratio: int
) -> tuple[Tensor, Tensor]:
    """Lines of the features that each read cell covers in one direction, and their weights.

    The sampling points are computed in the order of torchvision's kernel, operation by operation: a rounding error
    would give a cell that is exactly n pixels wide n + 1 points.

    Args:
        start, end: (R,) borders of the regions in pixels of the input.
        length: lines of the features in this direction.

    Returns:
        index (R, Q, L) in [0, length) and weight (R, Q, L) >= 0, summing to the share of points within the features.
    """
    start, end = start * scale - 0.5, end * scale - 0.5
    # By a tensor, since dividing by a number may multiply by its reciprocal.
    bins = (end - start) / start.new_tensor(float(size))
    points = torch.full_like(bins, sampling_ratio) if sampling_ratio > 0 else bins.ceil().clamp(min=0)
    points = points[:, None]  # (R, 1)
    most = max(int(points.max()), 1) if len(points) else 1
    cells = torch.arange(0, size, step, device=start.device, dtype=start.dtype)  # (Q,)
    numbers = torch.arange(most, device=start.device, dtype=start.dtype)  # (S,)
    is_point = (numbers < points)[:, None]  # (R, 1, S): the others repeat a region's last point
    offsets = (numbers.minimum(points - 1) + 0.5) * bins[:, None] / points.clamp(min=1)  # (R, S)
    places = (start[:, None] + cells * bins[:, None])[:, :, None] + offsets[:, None]  # (R, Q, S)
    share = (is_point & (places >= -1) & (places <= length)) / points.clamp(min=1)[:, None]
    places = places.clamp(0, length - 1)
    lower = places.floor()
    upper_weight = (places - lower) * share
    lower, upper = lower.long(), (lower.long() + 1).clamp(max=length - 1)
    first = lower.amin(dim=2, keepdim=True)
    lines = int((upper - first).max()) + 1 if len(points) else 1
    weight = share.new_zeros(*lower.shape[:2], lines)
    weight.scatter_add_(2, lower - first, share - upper_weight)
    weight.scatter_add_(2, upper - first, upper_weight)
    index = (first + torch.arange(lines, device=start.device)).clamp(max=length - 1)
    return index, weight
