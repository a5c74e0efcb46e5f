"""A picture against all classes of a memory, with memory that does not grow with the number of classes.

The levels of the pyramid are prepared once; then the classes come in groups, whose templates are moved to the device,
matched at every level and reduced to detections before the next group comes. Where only the best detections of a
picture are wanted, what cannot be among them any more is left out before suppression, which changes nothing.

Source: OS2D (Osokin et al., ECCV 2020) and its release, evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdet.methods.os2d.decoding import SUPPRESSIONS, Found, clip, has_area, to_frame
from fsdet.methods.os2d.fusion import fuse_scores, fuse_templates
from fsdet.methods.os2d.head import OS2DHead, PreparedScene

_ANCHORS = 2**21  # anchors of a group of classes over all levels: some 100 MB of scores and boxes
_ROWS = 64  # templates of a group
_HELD = 4  # detections that are held, as a multiple of those wanted


@dataclass(frozen=True)
class Level:
    """A picture at one scale.

    Attributes:
        scene: its features, prepared by the head.
        cells: (H, W) of the feature map.
        size: (h, w) of the picture at this scale, pixels.
    """

    scene: PreparedScene
    cells: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class _Matches:
    """What R templates found on the n anchors of one level, in the frame of the picture.

    Attributes:
        scores: (R, n).
        boxes: (R, n, 4), clipped at the border of the picture.
        anchors, corners: (n, 4) and (R, n, 4, 2), or None.
    """

    scores: Tensor
    boxes: Tensor
    anchors: Tensor | None = None
    corners: Tensor | None = None


@dataclass(frozen=True)
class Search:
    """How classes are searched for.

    Attributes:
        fusion: see `fusion.py`.
        score_threshold: detections lie above it; below -1: all.
        nms: "exact" or "reference", see `decoding.py`.
        nms_threshold: of the overlap.
        is_across: a second suppression over all classes together.
        limit: detections of a picture, at most; -1: all.
        has_geometry: whether detections tell their anchors and corners.
    """

    fusion: str
    score_threshold: float
    nms: str
    nms_threshold: float
    is_across: bool = False
    limit: int = -1
    has_geometry: bool = False

    @torch.no_grad()
    def find(self, head: OS2DHead, levels: list[Level], frame: tuple[int, int], classes: Iterable[Tensor]) -> Found:
        """Detections of one picture.

        Args:
            head: of the detector.
            levels: the picture at one scale or more.
            frame: (H, W) of the picture, in which the boxes are given.
            classes: templates (S, V, 225, D) of S supports in V views for each class, on any device.
        Returns: best first.
        """
        cells = sum(math.prod(level.cells) for level in levels)
        held: list[Found] = []
        floor = self.score_threshold
        for group in _groups(classes, self.fusion, max(1, min(_ROWS, _ANCHORS // cells))):
            matches = self._match(head, levels, frame, [templates for _, templates in group])
            first = 0
            for place, templates in group:
                supports, views = templates.shape[:2]
                rows = slice(first, first := first + supports * views)
                held.append(self._detections(matches, rows, (supports, views), place, floor))
            if self._is_limited and sum(map(len, held)) > _HELD * self.limit:
                held = [Found.join(held).best(self.limit)]
                floor = max(floor, float(held[0].scores[-1]))
        if not held:
            return Found.nothing(next(head.parameters()).device)
        found = Found.join(held)
        if self.is_across:
            found = found[SUPPRESSIONS[self.nms](found.boxes, found.scores, self.nms_threshold, -1)]
        return found.best(self.limit)

    @property
    def _is_limited(self) -> bool:
        """Whether a class's detections below the best ones of all classes are of no use."""
        return self.limit > 0 and self.nms == "exact" and not self.is_across

    def _match(
        self, head: OS2DHead, levels: list[Level], frame: tuple[int, int], group: list[Tensor]
    ) -> list[_Matches]:
        """Match the templates of classes, each (S, V, 225, D), at every level."""
        templates = torch.cat([own.flatten(0, 1) for own in group]).to(next(head.parameters()).device)
        result = []
        for level in levels:
            scores, boxes, corners = head.detect(level.scene, templates, corners=self.has_geometry)
            boxes = to_frame(clip(boxes, level.size), level.size, frame)
            anchors = None
            if corners is not None:
                anchors = to_frame(level.scene.anchors, level.size, frame)
                corners = to_frame(corners, level.size, frame)
            result.append(_Matches(scores, boxes, anchors, corners))
        return result

    def _detections(
        self, matches: list[_Matches], rows: slice, shape: tuple[int, int], place: int, floor: float
    ) -> Found:
        """Detections of one class above `floor`.

        Args:
            matches: of its group, level by level.
            rows: its templates in them.
            shape: (S, V) of these.
            place: of the class in the memory.
        """
        # Template by template, and level by level within one.
        scores = torch.cat([level.scores[rows] for level in matches], dim=1)  # (R, N)
        boxes = torch.cat([level.boxes[rows] for level in matches], dim=1)
        scores = fuse_scores(scores.unflatten(0, shape), self.fusion).flatten(0, 1)
        above = (scores > floor) & has_area(boxes)
        scores, fields = scores[above], {"boxes": boxes[above]}
        if self.has_geometry:
            anchors = torch.cat([level.anchors for level in matches])
            fields["anchors"] = anchors.expand(len(above), *anchors.shape)[above]
            fields["corners"] = torch.cat([level.corners[rows] for level in matches], dim=1)[above]
        classes = torch.full(scores.shape, place, dtype=torch.int64, device=scores.device)
        found = Found(scores=scores, classes=classes, **fields)
        limit = self.limit if self._is_limited else -1
        return found[SUPPRESSIONS[self.nms](found.boxes, found.scores, self.nms_threshold, limit)]


def _groups(classes: Iterable[Tensor], fusion: str, rows: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Places and fused templates of successive classes, about `rows` templates at a time, one class at least."""
    group: list[tuple[int, Tensor]] = []
    count = 0
    for place, templates in enumerate(classes):
        templates = fuse_templates(templates, fusion)
        size = templates.shape[0] * templates.shape[1]
        if group and count + size > rows:
            yield group
            group, count = [], 0
        group.append((place, templates))
        count += size
    if group:
        yield group
