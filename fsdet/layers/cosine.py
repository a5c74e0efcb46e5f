"""Cosine classifier: logits that depend on directions only.

Source: TFA, "Frustratingly Simple Few-Shot Object Detection" (Wang et al., ICML 2020), section 3.2;
https://github.com/ucbdrive/few-shot-object-detection. Shapes: R regions, K rows (classes and background), D features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Added to every norm, so that a zero vector has a direction of length 0 instead of NaN (official value).
NORM_EPS = 1e-5
# Start value of a learnable scale and the published fixed one.
DEFAULT_SCALE = 20.0
# The value of `scale` that asks for a learnable one (official convention).
LEARNABLE = -1.0


def unit_rows(vectors: Tensor) -> Tensor:
    """Divide each row by its length + 1e-5: (R, D) -> (R, D), lengths in [0, 1)."""
    return vectors / (vectors.norm(dim=1, keepdim=True) + NORM_EPS)


def cosine_scores(features: Tensor, weight: Tensor, scale: float | Tensor = DEFAULT_SCALE) -> Tensor:
    """Scaled cosine similarity of every feature with every class row.

    Computed in the wider of the two types, also under mixed precision: the scale multiplies rounding errors by 20.

    Args:
        features: (R, D) float.
        weight: (K, D) float, one row per class.
        scale: factor on the cosines.

    Returns:
        (R, K) in [-scale, scale], type of the wider argument.

    Source: TFA section 3.2.
    """
    dtype = torch.promote_types(features.dtype, weight.dtype)
    with torch.autocast(features.device.type, enabled=False):
        return scale * (unit_rows(features.to(dtype)) @ unit_rows(weight.to(dtype)).t())  # (R, K)


class CosineClassifier(nn.Module):
    """Class scores s * cos(x, w_c) without a bias.

    Two ways of training that agree at inference:

    - differentiable (default): rows are normalised inside the graph, the gradient is tangential to the unit sphere;
    - in place (`in_place=True`, the official implementation): before each training step the rows are overwritten by
      their normalised copy outside autograd. The gradient is taken at the unit row and keeps its radial part, which
      the next normalisation mostly erases but which SGD's momentum has felt. Checkpoints then hold rows of length ~1.

    Args:
        in_features: D.
        num_rows: K, number of scores (foreground classes and background).
        scale: s > 0, or -1 for a learnable scale that starts at 20 (parameter `scale` of shape (1,)).
        in_place: see above.

    Raises:
        ValueError: if scale is neither positive nor -1.
    """

    def __init__(
        self, in_features: int, num_rows: int, *, scale: float = DEFAULT_SCALE, in_place: bool = False
    ) -> None:
        super().__init__()
        if scale != LEARNABLE and scale <= 0:
            raise ValueError(f"cosine scale: got {scale}, expected a positive number, or -1 for a learnable scale")
        self.in_features, self.num_rows, self.in_place = in_features, num_rows, in_place
        self.weight = nn.Parameter(torch.empty(num_rows, in_features))
        nn.init.normal_(self.weight, std=0.01)
        self.scale = nn.Parameter(torch.full((1,), DEFAULT_SCALE)) if scale == LEARNABLE else float(scale)

    def forward(self, features: Tensor) -> Tensor:
        """Score (R, D) features; returns (R, K) logits in [-s, s]."""
        if not (self.in_place and self.training):
            return cosine_scores(features, self.weight, self.scale)
        # Through .data: autograd must neither record the copy nor take the weight for changed when two forward
        # passes precede one backward pass (the second copy leaves the rows as they are).
        self.weight.data.copy_(unit_rows(self.weight.data))
        dtype = torch.promote_types(features.dtype, self.weight.dtype)
        with torch.autocast(features.device.type, enabled=False):
            return self.scale * (unit_rows(features.to(dtype)) @ self.weight.to(dtype).t())  # (R, K)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        scale = "learnable" if isinstance(self.scale, nn.Parameter) else self.scale
        return f"in_features={self.in_features}, num_rows={self.num_rows}, scale={scale}, in_place={self.in_place}"
