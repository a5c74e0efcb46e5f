"""Dense correlation: how much every cell of a scene looks like every cell of a class's template.

Source: Osokin, Sumin, Lomakin, "OS2D: One-Stage One-Shot Object Detection by Matching Anchor Features" (ECCV 2020),
section 3. The order of a template's cells, columns first, is that of Rocco, Arandjelovic, Sivic, "End-to-end
weakly-supervised semantic alignment" (CVPR 2018), whose weights OS2D starts from. Letters: C classes, D feature width,
S cells a side of a template, H and W cells of a scene.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_NORM = 1e-5  # added to the length of a cell's features; as in the official code


def normalize_cells(features: Tensor) -> Tensor:
    """Divide every cell's features by their length, v / (|v| + 1e-5); (..., D, H, W) to the same shape."""
    return features / (torch.linalg.vector_norm(features, dim=-3, keepdim=True) + _LEAST_NORM)


def column_major(templates: Tensor) -> Tensor:
    """Lay the cells of (C, D, S, S) templates under each other, columns first: (C, S * S, D), row = column * S + row.

    The order is that of all channels of a correlation.
    """
    return templates.permute(0, 3, 2, 1).flatten(1, 2)


def correlate(templates: Tensor, scene: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Scalar products of all cells of all templates with all cells of a scene, as one matrix product.

    Args:
        templates: (C, K, D), cells of normalised templates, see `column_major`.
        scene: (D, H, W) or (B, D, H, W) normalised features.
        out: memory for the result of one scene, (C, K, H, W); no gradients then.

    Returns:
        (C, K, H, W) or (B, C, K, H, W) cosines in [-1, 1].

    Raises:
        ValueError: if templates and scene have features of different width.
    """
    classes, cells, width = templates.shape
    height_width = scene.shape[-2:]
    if scene.shape[-3] != width:
        raise ValueError(
            f"templates have features of width {width}, the scene of width {scene.shape[-3]}; encode both with the "
            "same backbone."
        )
    rows = templates.reshape(-1, width)
    if scene.dim() == 3:
        product = torch.mm(rows, scene.flatten(1), out=None if out is None else out.flatten(2).flatten(0, 1))
    else:
        product = torch.bmm(rows.expand(len(scene), -1, -1), scene.flatten(2))
    return product.view(*scene.shape[:-3], classes, cells, *height_width)
