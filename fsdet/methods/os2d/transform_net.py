"""The network that reads an affine alignment off the correlations around every anchor.

It is the regression network of Rocco et al., "End-to-end weakly-supervised semantic alignment" (CVPR 2018), run as a
convolution: zero padding keeps the size of the map, and its fully connected layer is a 5 x 5 convolution. The
parameters keep the names of the official checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdet.methods.os2d.geometry import SIDE

_IDENTITY = {4: (1.0, 0.0, 1.0, 0.0), 6: (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)}
_WIDTHS = (SIDE * SIDE, 128, 64)
LEAST_NORM = 1e-6  # added to the length of a cell's correlations; as in the official code
_WEAKALIGN = "FeatureRegression."


class TransformNet(nn.Module):
    """Correlations to the parameters of an affine matrix at every cell; the identity until it has learnt."""

    def __init__(self, parameters: int) -> None:
        """`parameters`: 4 (scale and shift) or 6 (any affine matrix).

        Raises:
            ValueError: for another number.
        """
        super().__init__()
        if parameters not in _IDENTITY:
            raise ValueError(
                f"a transform has 4 or 6 parameters, got {parameters}; set OS2D.PARAMETERS to one of them."
            )
        cells, wide, narrow = _WIDTHS
        self.conv = nn.Sequential(
            nn.Conv2d(cells, wide, 7, padding=3),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, narrow, 5, padding=2),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
        )
        self.linear = nn.Conv2d(narrow, parameters, 5, padding=2)
        nn.init.zeros_(self.linear.weight)
        with torch.no_grad():
            self.linear.bias.copy_(torch.tensor(_IDENTITY[parameters]))

    def forward(self, correlation: Tensor) -> Tensor:
        """Map correlations (M, 225, H, W) of M pairs of scene and class to parameters (M, P, H, W)."""
        positive = F.relu(correlation)
        length = torch.linalg.vector_norm(positive, dim=1, keepdim=True)
        return self.linear(self.conv(positive / (length + LEAST_NORM)))


def load_weakalign(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the affine part of a state dict of weakalign to one of a `TransformNet` with 6 parameters.

    The fully connected layer of 6 x 1600 becomes a convolution of 6 x 64 x 5 x 5. Other entries are left out.

    Args:
        state: tensors by names that begin with "FeatureRegression.", perhaps after "module.".

    Raises:
        ValueError: if an entry is missing or has another shape.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    converted = {}
    for name, expected in TransformNet(6).state_dict().items():
        value = plain.get(_WEAKALIGN + name)
        if value is None and name.endswith("num_batches_tracked"):  # unknown to older files, and unused
            value = expected
        if value is not None and name == "linear.weight" and value.numel() == expected.numel():
            value = value.reshape(expected.shape)
        if value is None or value.shape != expected.shape:
            found = "is missing" if value is None else f"has the shape {tuple(value.shape)}"
            raise ValueError(
                f"{_WEAKALIGN + name} {found}, expected {tuple(expected.shape)}; give the state dict of weakalign's "
                "affine network."
            )
        converted[name] = value.clone()
    return converted
