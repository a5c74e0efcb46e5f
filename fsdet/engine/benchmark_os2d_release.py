"""What OS2D's head is compared with: the release's way to the same scores and boxes, and whether they are the same.

Written from the description of the method, see `ReleasedWay`.

Source: OS2D (Osokin et al., ECCV 2020) and its release.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdet.layers.correlation import normalize_cells
from fsdet.methods.os2d.decoding import Found, clip, exact_nms, has_area
from fsdet.methods.os2d.geometry import ANCHOR, SIDE, STRIDE, anchor_boxes, anchor_centers, encode_boxes

OVERLAP, LIMIT = 0.3, 100  # of non-maximum suppression, and the detections of a picture
# Differences allowed between the two ways: pixels, cosines; scores closer than the last may change places.
BOX, SCORE, TIE = 0.02, 2e-5, 1e-5
MOST_INVERTED = 65_535  # matrices that the release inverts at once

Matches = tuple[Tensor, Tensor]  # scores (C, N) and boxes (C, N, 4) in pixels of the scene, or codes of boxes


class ReleasedWay:
    """The same scores and boxes as the release computes them.

    One class a call, and for each the scene is normalised again. All 225 points of a template are made and sampled, in
    double precision from one tall map of all channels, though 121 of them count; boxes are read off all of them, and
    maps are inverted as 3 x 3 matrices. The network runs module by module.
    """

    def __init__(self, transform_net: nn.Module, *, inverse: bool) -> None:
        """`transform_net`, `inverse`: those of the head that is compared."""
        self.transform_net, self.inverse = transform_net, inverse
        weights = F.pad(torch.ones(SIDE - 4, SIDE - 4), (2, 2, 2, 2))
        self.weights = (weights / weights.sum()).flatten()

    @torch.no_grad()
    def __call__(self, scene: Tensor, templates: Tensor) -> Matches:
        """Match a scene with classes.

        Args:
            scene: (D, H, W) features as the backbone gives them.
            templates: (C, 225, D) normalised, columns first.

        Returns:
            scores (C, N) and codes (C, N, 4), see `encode_boxes`.
        """
        found = [self._match(scene, template) for template in templates]
        scores, codes = (torch.stack(column) for column in zip(*found, strict=True))
        return scores, codes

    def _match(self, scene: Tensor, template: Tensor) -> Matches:
        """Scores (N,) and codes (N, 4) of a template (225, D)."""
        height, width = scene.shape[1:]
        rows = template.unflatten(0, (SIDE, SIDE)).transpose(0, 1).flatten(0, 1)
        correlation = (rows @ normalize_cells(scene).flatten(1)).view(SIDE, SIDE, height, width)
        correlation = correlation.transpose(0, 1).reshape(1, SIDE * SIDE, height, width)  # columns first
        matrices = self._matrices(self.transform_net(correlation)[0].flatten(1).T)
        points = F.affine_grid(matrices, [len(matrices), 1, SIDE, SIDE], align_corners=True)  # (N, row, column, 2)
        centers = anchor_centers(height, width, scene.device)[:, None, None]
        places = SIDE / 2 * points + centers
        scores = self._sampled(correlation[0], places.transpose(1, 2).flatten(1, 2))
        pixels = (ANCHOR / 2 * points + STRIDE * centers).flatten(1, 2)
        boxes = torch.cat([pixels.amin(dim=1), pixels.amax(dim=1)], dim=1)
        return scores, encode_boxes(boxes, anchor_boxes(height, width, scene.device))

    def _matrices(self, parameters: Tensor) -> Tensor:
        """(N, 4) or (N, 6) parameters to (N, 2, 3) matrices."""
        if parameters.shape[1] == 4:
            nothing = torch.zeros_like(parameters[:, 0])
            scale_x, shift_x, scale_y, shift_y = parameters.unbind(1)
            parameters = torch.stack([scale_x, nothing, shift_x, nothing, scale_y, shift_y], dim=1)
        matrices = parameters.view(-1, 2, 3)
        if not self.inverse:
            return matrices
        last = matrices.new_tensor([[[0.0, 0.0, 1.0]]]).expand(len(matrices), -1, -1)
        parts = torch.cat([matrices, last], dim=1).split(MOST_INVERTED)
        return torch.cat([torch.linalg.inv(part) for part in parts])[:, :2]

    def _sampled(self, correlation: Tensor, places: Tensor) -> Tensor:
        """Scores (N,): weighted means of (225, H, W), read at (N, 225, 2) x and y in cells."""
        channels, height, width = correlation.shape
        limits = places.new_tensor([max(width - 1, 1), max(height - 1, 1)])
        unit = (2 * places / limits - 1).clamp(-1, 1).double()
        x, y = unit.unbind(-1)
        row = (y + 1) / 2 * (height - 1) + height * torch.arange(channels, device=places.device)
        grid = torch.stack([x, 2 * row / (channels * height - 1) - 1], dim=-1)
        tall = correlation.double().view(1, 1, channels * height, width)
        samples = F.grid_sample(tall, grid[None], mode="bilinear", padding_mode="border", align_corners=True)
        return (samples[0, 0] * self.weights.to(samples)).sum(dim=1).to(correlation.dtype)


def check_same(ours: Matches, released: Matches, size: tuple[int, int]) -> None:
    """Compare what two ways found in a picture of `size` (H, W): every score and box, and the detections.

    Scores may differ by 2e-5 and boxes by 0.02 pixels. Detections have the same number, classes and order, in which
    those whose scores are less than 1e-5 apart may change places.

    Raises: RuntimeError with the difference.
    """
    distances = [(one - other).abs().max().item() for one, other in zip(ours, released, strict=True)]
    found = f"scores {distances[0]:.1e} and boxes {distances[1]:.1e} pixels apart"
    same = distances[0] <= SCORE and distances[1] <= BOX
    if same:
        first, second = detections(*ours, size), detections(*released, size)
        found += f", {len(first)} and {len(second)} detections"
        same = len(first) == len(second) > 0 and _is_same_order(first, second)
    if not same:
        raise RuntimeError(f"fsdet and the released way find different things with the same weights: {found}")


def detections(scores: Tensor, boxes: Tensor, size: tuple[int, int]) -> Found:
    """The 100 best detections of scores (C, N) and boxes (C, N, 4) in a picture of `size` (H, W), best first."""
    parts = []
    for number, own in enumerate(clip(boxes, size)):
        places = has_area(own).nonzero()[:, 0]
        places = places[exact_nms(own[places], scores[number, places], OVERLAP, LIMIT)]
        parts.append(Found(own[places], scores[number, places], torch.full_like(places, number)))
    return Found.join(parts).best(LIMIT)


def _is_same_order(first: Found, second: Found) -> bool:
    """Whether every detection has one of the same class and box on the other side, in the same order but for ties."""
    distance = (first.boxes[:, None] - second.boxes).abs().amax(dim=2)
    distance[first.classes[:, None] != second.classes] = torch.inf
    nearest, partners = distance.min(dim=1)
    rises = second.scores[partners].diff()
    return bool(nearest.max() <= BOX and (rises < TIE).all() and len(partners.unique()) == len(partners))
