"""The head of OS2D: correlate, align, and read the score and the box off the same alignment.

Two ways lead to the same numbers: `forward`, with gradients, and `detect`, at inference, which holds a few classes at a
time and on a CPU computes the alignment by other algorithms (see `fast_transform.py`).

Source: Osokin et al., "OS2D" (ECCV 2020), sections 3 and 4. Letters: B scenes, C classes, D feature width, N = H * W
anchors row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fsdet.layers.correlation import correlate, normalize_cells
from fsdet.methods.os2d.fast_transform import FastTransform
from fsdet.methods.os2d.geometry import (
    STRIDE,
    affine,
    anchor_boxes,
    anchor_centers,
    decode_boxes,
    enclosing_boxes,
    encode_boxes,
)
from fsdet.methods.os2d.geometry import corners as corners_of
from fsdet.methods.os2d.sampling import pool_samples, sampling_grid
from fsdet.methods.os2d.tiles import best_blocks
from fsdet.methods.os2d.transform_net import TransformNet
from fsdet.modeling.derived import Derived

# Cells, over all classes, that are matched at once. On a CPU the fastest of 4,800 to 38,400, by 5 % (300 to 19,200 on
# small maps); a GPU wants larger pieces, here of 70 MB of correlations.
_CELLS_AT_ONCE = {"cpu": 19_200, "cuda": 76_800}


@dataclass(frozen=True)
class Matches:
    """What every anchor says about every class.

    Attributes:
        scores: (B, C, N) cosines in [-1, 1].
        codes: (B, C, N, 4) boxes relative to the anchors, see `encode_boxes`.
        corners: (B, C, N, 4, 2) corners of the aligned templates in pixels of the input, without gradient; or None.
        detached_scores: (B, C, N) the same scores, whose gradients do not reach the alignment; the same tensor where
            none would.
    """

    scores: Tensor
    codes: Tensor
    corners: Tensor | None
    detached_scores: Tensor


@dataclass(frozen=True)
class PreparedScene:
    """What the head needs of a scene, whatever the classes.

    Attributes:
        features: (D, H, W), normalised at every cell.
        centers: (N, 2) of the anchors, in cells.
        anchors: (N, 4) in pixels of the network input.
        unaligned_grid: (1, 121, N, 2) where the points of templates lie that are not aligned; None if all are.
    """

    features: Tensor
    centers: Tensor
    anchors: Tensor
    unaligned_grid: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.features.shape[1], self.features.shape[2]


class _Read(NamedTuple):
    """Scores (C, N), boxes (C, N, 4) and corners (C, N, 4, 2) or None, see `OS2DHead.detect`."""

    scores: Tensor
    boxes: Tensor
    corners: Tensor | None


class OS2DHead(nn.Module):
    """Correlation, alignment and matching."""

    def __init__(self, parameters: int, inverse: bool, *, aligned_share: float = 1.0) -> None:
        """Make the head.

        Args:
            parameters: of the alignment: 4 (V1) or 6 (V2).
            inverse: whether the network describes the way from the scene to the template (V2).
            aligned_share: in (0, 1]: share of the anchors that `detect` aligns, see there; 1 is exact.

        Raises:
            ValueError: for values out of these ranges.
        """
        super().__init__()
        if not 0 < aligned_share <= 1:
            raise ValueError(f"OS2D.ALIGNED_SHARE is {aligned_share}, expected a number above 0 and at most 1.")
        self.transform_net = TransformNet(parameters)
        self.inverse = inverse
        self.aligned_share = aligned_share
        self._fast_transform: Derived[FastTransform] = Derived(FastTransform)

    def train(self, mode: bool = True) -> OS2DHead:
        """Switch the mode; what was derived from the weights is forgotten."""
        self._fast_transform.forget()
        return super().train(mode)

    def forward(self, scenes: Tensor, templates: Tensor, *, corners: bool = False) -> Matches:
        """Match every scene with every class; in single precision, also under autocast.

        Args:
            scenes: (B, D, H, W) features as the backbone gives them.
            templates: (C, 225, D) normalised, columns first, see `layers.correlation.column_major`.
            corners: whether they are wanted.
        """
        with torch.autocast(scenes.device.type, enabled=False):
            correlation = correlate(templates.float(), normalize_cells(scenes.float()))
            pairs, size = correlation.shape[:2], correlation.shape[3:]
            centers, anchors = (make(*size, correlation.device) for make in (anchor_centers, anchor_boxes))
            correlation = correlation.flatten(0, 1)
            matrices = self._matrices(self.transform_net(correlation))
            scores = pool_samples(correlation, sampling_grid(matrices, centers, size)).unflatten(0, pairs)
            detached = scores
            if matrices.requires_grad:
                grid = sampling_grid(matrices.detach(), centers, size)
                detached = pool_samples(correlation, grid).unflatten(0, pairs)
            codes = encode_boxes(enclosing_boxes(matrices, anchors), anchors)
            found = corners_of(matrices.detach(), anchors).unflatten(0, pairs) if corners else None
        return Matches(scores, codes.unflatten(0, pairs), found, detached)

    @torch.no_grad()
    def prepare(self, scene: Tensor) -> PreparedScene:
        """Do once for a scene (D, H, W), features as the backbone gives them, what does not depend on the classes."""
        size = scene.shape[1], scene.shape[2]
        centers, anchors = (make(*size, scene.device) for make in (anchor_centers, anchor_boxes))
        with torch.autocast(scene.device.type, enabled=False):
            features = normalize_cells(scene.float()).contiguous()
            grid = sampling_grid(_identities(centers)[None], centers, size) if self.aligned_share < 1 else None
        return PreparedScene(features, centers, anchors, grid)

    @torch.no_grad()
    def detect(
        self, scene: Tensor | PreparedScene, templates: Tensor, *, corners: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Match one scene with every class, a few classes at a time; without gradients, in evaluation mode.

        With `aligned_share` below 1 the classes are first scored without alignment. For each class, that share of the
        blocks of 10 x 10 anchors is aligned that has the best of these scores. The anchors of all other blocks keep
        the first score and get a box without area, which decoding drops.

        Args:
            scene: (D, H, W) features as the backbone gives them, or what `prepare` made of them.
            templates: (C, 225, D), see `forward`.
            corners: whether they are wanted.

        Returns:
            scores (C, N) in [-1, 1], boxes (C, N, 4) and corners (C, N, 4, 2) or None, both in pixels of the network
            input.
        """
        assert not self.transform_net.training, "detect() reads kept statistics: call eval() first"
        if isinstance(scene, Tensor):
            scene = self.prepare(scene)
        count, cells, kind = len(templates), len(scene.anchors), scene.features.device.type
        fast = self._fast_transform(self.transform_net) if kind == "cpu" else None
        at_once = max(1, _CELLS_AT_ONCE.get(kind, _CELLS_AT_ONCE["cuda"]) // max(cells, 1))
        result = [scene.features.new_empty(count, cells, *shape) for shape in ((), (4,), (4, 2))[: 3 if corners else 2]]
        with torch.autocast(kind, enabled=False):
            for start in range(0, count, at_once):
                part = slice(start, start + at_once)
                correlation = _correlate(templates[part].float(), scene, fast)
                for whole, piece in zip(result, self._match(correlation, scene, fast, corners), strict=False):
                    whole[part] = piece
        return result[0], result[1], result[2] if corners else None

    def _match(self, correlation: Tensor, scene: PreparedScene, fast: FastTransform | None, has_corners: bool) -> _Read:
        """Align and score the correlations (C, 225, H, W) of a few classes."""
        if scene.unaligned_grid is None:
            matrices = self._matrices(fast(correlation) if fast else self.transform_net(correlation))
            return _read(correlation, matrices, scene.centers, scene.anchors, has_corners)
        first = pool_samples(correlation, scene.unaligned_grid)
        needed = best_blocks(first.unflatten(1, scene.size), self.aligned_share)
        matrices = self._matrices(fast(correlation, needed) if fast else self.transform_net(correlation))
        chosen = _marked(needed.flatten(1))  # (C, n)
        centers, anchors = scene.centers[chosen], scene.anchors[chosen]
        places = torch.arange(len(first), device=first.device)[:, None], chosen
        aligned = _read(correlation, matrices[places], centers, anchors, has_corners)
        boxes = (scene.centers * STRIDE).repeat(len(first), 1, 2)
        found = None
        if has_corners:
            found = corners_of(_identities(scene.centers), scene.anchors).repeat(len(first), 1, 1, 1)
            found[places] = aligned.corners
        first[places], boxes[places] = aligned.scores, aligned.boxes
        return _Read(first, boxes, found)

    def _matrices(self, parameters: Tensor) -> Tensor:
        """(M, P, H, W) parameters to (M, N, 2, 3) matrices."""
        return affine(parameters.flatten(2).transpose(1, 2), inverse=self.inverse)


def _correlate(templates: Tensor, scene: PreparedScene, fast: FastTransform | None) -> Tensor:
    """Correlations (C, 225, H, W), on a CPU in memory that the next ones take again."""
    shape = *templates.shape[:2], *scene.size
    return correlate(templates, scene.features, out=fast.scratch.take("correlation", *shape) if fast else None)


def _read(correlation: Tensor, matrices: Tensor, centers: Tensor, anchors: Tensor, has_corners: bool) -> _Read:
    """Score and box of aligned templates.

    Args:
        correlation: (C, 225, H, W).
        matrices: (C, n, 2, 3).
        centers, anchors: (n, 2) and (n, 4), or (C, n, 2) and (C, n, 4).
        has_corners: whether corners are wanted.
    """
    grid = sampling_grid(matrices, centers, (correlation.shape[2], correlation.shape[3]))
    # By the code, whose limits on sizes belong to the method.
    boxes = decode_boxes(encode_boxes(enclosing_boxes(matrices, anchors), anchors), anchors)
    return _Read(pool_samples(correlation, grid), boxes, corners_of(matrices, anchors) if has_corners else None)


def _identities(centers: Tensor) -> Tensor:
    """(N, 2, 3) matrices that align nothing."""
    return torch.eye(2, 3, device=centers.device).expand(len(centers), -1, -1)


def _marked(marks: Tensor) -> Tensor:
    """Columns (C, n) that are marked in each row of (C, N) bool; rows with fewer than others repeat their first one."""
    counts = marks.sum(dim=1, keepdim=True)
    order = marks.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    return torch.where(torch.arange(order.shape[1], device=marks.device) < counts, order, order[:, :1])
