"""Classes against a pyramid: levels and supports joined, groups of classes, and what the limit leaves out."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fsdet.methods.os2d import inference
from fsdet.methods.os2d.decoding import exact_nms
from fsdet.methods.os2d.fusion import fuse_scores
from fsdet.methods.os2d.inference import Level, Search

SEARCH = Search("max", -2.0, "exact", 0.3)


@dataclass
class Recorded:
    """Scores (E, n) and boxes (E, n, 4) of every template on a level; a template is its row."""

    scores: torch.Tensor
    boxes: torch.Tensor

    @property
    def anchors(self):
        return self.boxes[0] + 1


class Head(nn.Linear):
    """Repeats what is recorded."""

    def __init__(self):
        super().__init__(1, 1)
        self.rows = []

    def detect(self, scene, templates, *, corners=False):
        rows = templates.flatten().long()
        self.rows.append(len(rows))
        found = scene.boxes[rows]
        return scene.scores[rows], found, found.unflatten(2, (2, 2)).repeat(1, 1, 2, 1) if corners else None


def level(seed, entries, cells=(3, 4), size=(48, 64)):
    """Random boxes around a level's picture."""
    generator = torch.Generator().manual_seed(seed)
    count = cells[0] * cells[1]
    corner = torch.rand(entries, count, 2, generator=generator) * 60 - 8
    boxes = torch.cat([corner, corner + torch.rand(entries, count, 2, generator=generator) * 40], dim=2)
    return Level(Recorded(torch.rand(entries, count, generator=generator), boxes), cells, size)


def classes_of(*counts, views=1):
    """Templates (S, V, 1, 1) that are rows, for classes of S supports."""
    rows = iter(range(1000))
    return [
        torch.tensor([[float(next(rows)) for _ in range(views)] for _ in range(s)])[..., None, None] for s in counts
    ]


def test_by_hand():
    """Two levels, one at half the size: boxes are clipped on their level and doubled; the best of a place stays."""
    full = Recorded(torch.tensor([[0.5, 0.9]]), torch.tensor([[[-4.0, 2, 20, 22], [30, 30, 40, 99]]]))
    half = Recorded(torch.tensor([[0.7, 0.8]]), torch.tensor([[[0.0, 1, 10, 11], [33, 5, 40, 9]]]))  # the last: beyond
    levels = [Level(full, (1, 2), (48, 64)), Level(half, (1, 2), (24, 32))]
    found = SEARCH.find(Head(), levels, (48, 64), classes_of(1))
    assert found.boxes.tolist() == [[30, 30, 40, 48], [0, 2, 20, 22]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7]) and found.classes.tolist() == [0, 0]
    assert found.anchors is None and found.corners is None
    found = SEARCH.find(Head(), levels, (96, 32), classes_of(1))  # another frame
    assert found.boxes.tolist() == [[15, 60, 20, 96], [0, 4, 10, 44]]


def test_threshold_is_exceeded():
    scene = Recorded(torch.tensor([[0.5, 0.25]]), torch.tensor([[[0.0, 0, 9, 9], [20, 20, 30, 30]]]))
    levels = [Level(scene, (1, 2), (48, 64))]
    assert len(replace(SEARCH, score_threshold=0.25).find(Head(), levels, (48, 64), classes_of(1))) == 1
    empty = replace(SEARCH, score_threshold=0.5).find(Head(), levels, (48, 64), classes_of(1))
    assert len(empty) == 0 and empty.boxes.shape == (0, 4) and empty.classes.dtype == torch.int64


def test_no_class():
    found = SEARCH.find(Head(), [level(0, 1)], (48, 64), [])
    assert len(found) == 0 and found.boxes.shape == (0, 4)


@pytest.mark.parametrize("fusion", ["max", "agree"])
def test_supports_of_a_class_by_a_loop(fusion):
    """Class 1 has three supports in two views, which lie between those of other classes."""
    levels, classes = [level(0, 14), level(1, 14, (2, 3), (32, 48))], classes_of(2, 3, 2, views=2)
    found = replace(SEARCH, fusion=fusion).find(Head(), levels, (48, 64), classes)
    own = found[found.classes == 1]
    rows = slice(4, 10)
    scores = torch.cat([each.scene.scores[rows] for each in levels], dim=1)
    scores = fuse_scores(scores.view(3, 2, -1), fusion).flatten()
    boxes = []
    for row in range(4, 10):
        for each in levels:
            height, width = each.size
            for x0, y0, x1, y1 in each.scene.boxes[row].tolist():
                clipped = [
                    max(min(x0, width), 0),
                    max(min(y0, height), 0),
                    max(min(x1, width), 0),
                    max(min(y1, height), 0),
                ]
                boxes.append(
                    [
                        clipped[0] * 64 / width,
                        clipped[1] * 48 / height,
                        clipped[2] * 64 / width,
                        clipped[3] * 48 / height,
                    ]
                )
    boxes = torch.tensor(boxes)
    fit = ((boxes[:, 2:] > boxes[:, :2]).all(dim=1)).nonzero()[:, 0]
    kept = fit[exact_nms(boxes[fit], scores[fit], 0.3)]
    torch.testing.assert_close(own.scores, scores[kept])
    torch.testing.assert_close(own.boxes, boxes[kept], rtol=0, atol=1e-4)


@pytest.mark.parametrize("limit", [-1, 3, 25])
def test_groups_and_limit_change_nothing(limit, monkeypatch):
    """40 classes of 1 to 3 supports: whatever group they come in, the best detections are the same."""
    counts = [1 + number % 3 for number in range(40)]
    levels, classes = [level(0, 100), level(1, 100, (2, 3), (32, 48))], classes_of(*counts)
    head = Head()
    everything = SEARCH.find(head, levels, (48, 64), classes)
    assert max(head.rows) == 63 and len(everything) > 200
    monkeypatch.setattr(inference, "_ROWS", 5)
    monkeypatch.setattr(inference, "_HELD", 1)
    head = Head()
    found = replace(SEARCH, limit=limit).find(head, levels, (48, 64), classes)
    assert max(head.rows) <= 5 and sum(head.rows) == 2 * sum(counts)
    expected = everything.best(limit)
    for name, value in found.fields().items():
        assert torch.equal(value, getattr(expected, name)), name


def test_groups_shrink_with_the_scene(monkeypatch):
    """So that scores and boxes of a group stay bounded; a class is never cut."""
    monkeypatch.setattr(inference, "_ANCHORS", 36)
    head = Head()
    SEARCH.find(head, [level(0, 9)], (48, 64), classes_of(1, 1, 4, 1, 1, 1))
    assert head.rows == [2, 4, 3]


def test_across_classes():
    """Two classes see the same place; the second suppression keeps the better one alone. The limit comes last."""
    boxes = torch.tensor([[[0.0, 0, 20, 20], [30, 30, 40, 40]], [[1.0, 0, 20, 20], [40, 0, 50, 9]]])
    levels = [Level(Recorded(torch.tensor([[0.5, 0.9], [0.6, 0.2]]), boxes), (1, 2), (48, 64))]
    apart = SEARCH.find(Head(), levels, (48, 64), classes_of(1, 1))
    assert apart.classes.tolist() == [0, 1, 0, 1]
    across = replace(SEARCH, is_across=True)
    assert across.find(Head(), levels, (48, 64), classes_of(1, 1)).scores.tolist() == pytest.approx([0.9, 0.6, 0.2])
    assert replace(across, limit=2).find(Head(), levels, (48, 64), classes_of(1, 1)).classes.tolist() == [0, 1]


def test_geometry():
    """Anchors and corners in the frame of the picture, row by row beside the boxes."""
    levels = [level(0, 2), level(1, 2, (2, 3), (24, 32))]
    search = replace(SEARCH, has_geometry=True)
    found = search.find(Head(), levels, (48, 64), classes_of(1, 1))
    plain = SEARCH.find(Head(), levels, (48, 64), classes_of(1, 1))
    assert torch.equal(found.boxes, plain.boxes) and torch.equal(found.scores, plain.scores)
    assert found.anchors.shape == found.boxes.shape and found.corners.shape == (len(found), 4, 2)
    clipped = torch.cat([found.corners[:, 0], found.corners[:, 1]], dim=1)
    limits = torch.tensor([64.0, 48, 64, 48])
    torch.testing.assert_close(torch.minimum(clipped.clamp(min=0), limits), found.boxes, rtol=0, atol=1e-4)
    inside = ((clipped > 0) & (clipped < limits)).all(dim=1) & (found.classes == 0)
    gaps = found.anchors[inside] - found.boxes[inside]  # 1 px of the level that they come from
    assert inside.any() and set(gaps.round(decimals=3).flatten().tolist()) <= {1.0, 2.0}
