"""A picture against all classes of a memory, with memory that does not grow with the classes or their supports.

The levels of the pyramid are prepared once; then the classes come in groups, whose templates are moved to the device,
matched at every level and reduced to detections before the next group comes. Where only the best detections of a
picture are wanted, what cannot be among them any more is left out before suppression, which changes nothing. A class
that is too large for a group is cut: its supports come a few at a time, and again where the result asks for it, see
`streamed_nms.py`.

Source: OS2D (Osokin et al., ECCV 2020) and its release, evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdet.methods.os2d.decoding import SUPPRESSIONS, Found, clip, has_area, to_frame
from fsdet.methods.os2d.fusion import fuse_in_parts, fuse_scores, fuse_templates
from fsdet.methods.os2d.head import OS2DHead, PreparedScene
from fsdet.methods.os2d.streamed_nms import STREAMED_SUPPRESSIONS

_ANCHORS = 2**21  # anchors of a group of classes over all levels: some 100 MB of scores and boxes
_ROWS = 64  # templates of a group
_KEPT_ANCHORS = 2**23  # anchors of a cut class whose matches are kept to be read again, some 200 MB
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
    """What R templates found on n anchors, in the frame of the picture.

    Attributes:
        scores: (R, n).
        boxes: (R, n, 4), clipped at the border of the picture.
        anchors, corners: (n, 4) and (R, n, 4, 2), or None.
    """

    scores: Tensor
    boxes: Tensor
    anchors: Tensor | None = None
    corners: Tensor | None = None

    @classmethod
    def join(cls, levels: list[_Matches], rows: slice) -> _Matches:
        """Some rows of the matches of all levels, side by side."""
        scores, boxes = (torch.cat([getattr(own, name)[rows] for own in levels], dim=1) for name in ("scores", "boxes"))
        if levels[0].corners is None:
            return cls(scores, boxes)
        anchors = torch.cat([own.anchors for own in levels])
        return cls(scores, boxes, anchors, torch.cat([own.corners[rows] for own in levels], dim=1))


@dataclass(frozen=True)
class _Picture:
    """A picture that templates are matched with.

    Attributes:
        head: of the detector.
        levels: the picture at one scale or more.
        frame: (H, W) of the picture, in which boxes are given.
        has_geometry: whether anchors and corners are wanted.
    """

    head: OS2DHead
    levels: list[Level]
    frame: tuple[int, int]
    has_geometry: bool

    @property
    def cells(self) -> int:
        """N, the anchors of all levels."""
        return sum(math.prod(level.cells) for level in self.levels)

    def match(self, classes: list[Tensor]) -> list[_Matches]:
        """Match the templates of classes, each (S, V, 225, D), at every level."""
        templates = torch.cat([own.flatten(0, 1) for own in classes]).to(next(self.head.parameters()).device)
        result = []
        for level in self.levels:
            scores, boxes, corners = self.head.detect(level.scene, templates, corners=self.has_geometry)
            boxes = to_frame(clip(boxes, level.size), level.size, self.frame)
            anchors = None
            if corners is not None:
                anchors = to_frame(level.scene.anchors, level.size, self.frame)
                corners = to_frame(corners, level.size, self.frame)
            result.append(_Matches(scores, boxes, anchors, corners))
        return result


@dataclass(frozen=True)
class _Slices:
    """The matches of one class, some of its supports at a time; to read them again matches them again.

    Attributes:
        picture: to match with.
        templates: (S, V, 225, D).
        supports: in a slice.
    """

    picture: _Picture
    templates: Tensor
    supports: int

    def __iter__(self) -> Iterator[_Matches]:
        for some in self.templates.split(self.supports):
            yield _Matches.join(self.picture.match([some]), slice(None))


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
        picture = _Picture(head, levels, frame, self.has_geometry)
        rows = max(1, min(_ROWS, _ANCHORS // picture.cells))
        held: list[Found] = []
        floor = self.score_threshold
        for group in _groups(classes, self.fusion, rows):
            held += self._search(picture, group, rows, floor)
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

    @property
    def _class_limit(self) -> int:
        """Detections of a class that are wanted, at most; -1: all."""
        return self.limit if self._is_limited else -1

    def _search(self, picture: _Picture, group: list[tuple[int, Tensor]], rows: int, floor: float) -> Iterator[Found]:
        """Detections above `floor` of each class of a group, which has about `rows` templates or a single class."""
        place, templates = group[0]
        supports_at_once = max(1, rows // templates.shape[1])
        if len(templates) > supports_at_once:
            yield self._search_cut(picture, templates, supports_at_once, place, floor)
            return
        matches = picture.match([templates for _, templates in group])
        first = 0
        for place, templates in group:
            supports, views = templates.shape[:2]
            own = _Matches.join(matches, slice(first, first := first + supports * views))
            scores = fuse_scores(own.scores.unflatten(0, (supports, views)), self.fusion)
            found = self._candidates(own, scores, place, floor)
            places = SUPPRESSIONS[self.nms](found.boxes, found.scores, self.nms_threshold, self._class_limit)
            yield found[places]

    def _search_cut(
        self, picture: _Picture, templates: Tensor, supports_at_once: int, place: int, floor: float
    ) -> Found:
        """Detections above `floor` of one class, whose templates (S, V, 225, D) are matched some supports at a time."""
        views = templates.shape[1]
        slices: Iterable[_Matches] = _Slices(picture, templates, supports_at_once)
        if self.fusion == "agree" and len(templates) * views * picture.cells <= _KEPT_ANCHORS:
            slices = list(slices)  # they are read twice or more
        fuse = fuse_in_parts((own.scores.unflatten(0, (-1, views)) for own in slices), self.fusion)

        def candidates() -> Iterator[Found]:
            for own in slices:
                yield self._candidates(own, fuse(own.scores.unflatten(0, (-1, views))), place, floor)

        return STREAMED_SUPPRESSIONS[self.nms](candidates, self.nms_threshold, self._class_limit)

    def _candidates(self, matches: _Matches, scores: Tensor, place: int, floor: float) -> Found:
        """Boxes of one class that have an area and a score above `floor`, before suppression.

        Args:
            matches: of its R templates, with the N anchors of all levels.
            scores: (S, V, N) fused ones.
            place: of the class in the memory.
        """
        # Template by template, and level by level within one.
        scores = scores.flatten(0, 1)
        above = (scores > floor) & has_area(matches.boxes)
        scores, fields = scores[above], {"boxes": matches.boxes[above]}
        if self.has_geometry:
            fields["anchors"] = matches.anchors.expand(len(above), *matches.anchors.shape)[above]
            fields["corners"] = matches.corners[above]
        classes = torch.full(scores.shape, place, dtype=torch.int64, device=scores.device)
        return Found(scores=scores, classes=classes, **fields)


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
