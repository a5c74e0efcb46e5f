"""Classes against a pyramid: levels and supports joined, groups of classes, and what the limit leaves out."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from PIL import Image
from test_methods_os2d_detector import detector, picture, query
from torch import nn

from fsdet.data.support import Support, SupportSet
from fsdet.methods.os2d import inference, streamed_nms
from fsdet.methods.os2d.decoding import SUPPRESSIONS, exact_nms, reference_nms
from fsdet.methods.os2d.fusion import fuse_scores
from fsdet.methods.os2d.inference import Level, Search
from fsdet.methods.os2d.streamed_nms import STREAMED_SUPPRESSIONS, reference_in_chunks

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
    """So that scores and boxes of a group stay bounded; a class is cut between its supports, never one of these."""
    monkeypatch.setattr(inference, "_ANCHORS", 36)
    head = Head()
    SEARCH.find(head, [level(0, 9)], (48, 64), classes_of(1, 1, 4, 1, 1, 1))
    assert head.rows == [2, 3, 1, 3]
    head = Head()
    SEARCH.find(head, [level(0, 16)], (48, 64), classes_of(3, 1, views=4))
    assert head.rows == [4, 4, 4, 4]


LEVELS = (3, 4), (2, 3)


def levels_of(entries):
    return [level(0, entries, LEVELS[0]), level(1, entries, LEVELS[1], (32, 48))]


@pytest.mark.parametrize("has_geometry", [False, True])
@pytest.mark.parametrize(("nms", "limit"), [("exact", -1), ("exact", 3), ("exact", 400), ("reference", -1)])
@pytest.mark.parametrize("fusion", ["max", "mean", "agree"])
def test_a_cut_class_gives_the_same(fusion, nms, limit, has_geometry, monkeypatch):
    """A class of 30 supports in two views between smaller ones, whole and cut, its matches kept or made again."""
    levels, classes = levels_of(100), classes_of(2, 30, 1, 5, views=2)
    search = Search(fusion, 0.1, nms, 0.3, limit=limit, has_geometry=has_geometry)
    monkeypatch.setitem(SUPPRESSIONS, "reference", partial(reference_nms, chunk=50))
    monkeypatch.setitem(STREAMED_SUPPRESSIONS, "reference", partial(reference_in_chunks, chunk=50))
    whole = search.find(Head(), levels, (48, 64), classes)
    assert (whole.classes == 1).any() and (limit != 3 or len(whole) == 3)
    monkeypatch.setattr(inference, "_ROWS", 7)
    for kept, pool in ((10**6, 10**6), (0, 10**6), (10**6, 40), (0, 40)):
        monkeypatch.setattr(inference, "_KEPT_ANCHORS", kept)
        monkeypatch.setattr(streamed_nms, "_POOL", pool)
        head = Head()
        found = search.find(head, levels, (48, 64), classes)
        assert max(head.rows) <= 7
        assert found.fields().keys() == whole.fields().keys()
        for name, value in found.fields().items():
            tolerance = 1e-6 if name == "scores" and fusion == "agree" else 0
            torch.testing.assert_close(value, getattr(whole, name), rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(("fusion", "looks"), [("max", 1), ("mean", 1), ("agree", 1), ("agree", 2)])
def test_how_often_a_class_is_matched(fusion, looks, monkeypatch):
    """Once where it fits, also where "agree" reads all scores before any of them is fused; else once more."""
    levels, classes = levels_of(60), classes_of(30, views=2)
    rows = 2 * (2 if fusion == "mean" else 60)
    head = Head()
    replace(SEARCH, fusion=fusion).find(head, levels, (48, 64), classes)
    assert head.rows == [rows // 2] * 2
    monkeypatch.setattr(inference, "_ROWS", 20)
    monkeypatch.setattr(inference, "_KEPT_ANCHORS", 60 * 18 if looks == 1 else 60 * 18 - 1)
    head = Head()
    replace(SEARCH, fusion=fusion).find(head, levels, (48, 64), classes)
    assert sum(head.rows) == looks * rows and max(head.rows) <= 20


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


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A detector that keeps a class of 1,000 supports."""
    file_name = str(tmp_path_factory.mktemp("supports") / "0.png")
    Image.fromarray(picture(0)).save(file_name)
    boxes = [(x, y, x + 40, y + 32) for x in range(40) for y in range(25)]
    supports = SupportSet(("ant",), [Support(file_name, 0, number, 0, box) for number, box in enumerate(boxes)])
    model = detector(class_image_size=16, test_shots=1000, eval_scale=96)
    batches = []
    encode = model.encode_pictures
    model.encode_pictures = lambda pictures: batches.append(len(pictures)) or encode(pictures)
    model.keep_class_memory(model.encode_support(supports))
    assert len(batches) == 1000 and set(batches) == {1}
    assert next(model.known_templates()).shape == (1000, 1, 225, 64)
    return model


@pytest.mark.parametrize(("fusion", "limit"), [("max", -1), ("mean", -1), ("agree", 2)])
def test_a_class_of_a_thousand_supports(crowded, fusion, limit, monkeypatch):
    """At most 64 templates at once, and the detections of one look at all of them."""
    rows = []
    detect = crowded.head.detect
    monkeypatch.setattr(crowded.head, "detect", lambda scene, t, **k: rows.append(len(t)) or detect(scene, t, **k))
    monkeypatch.setattr(crowded, "search", Search(fusion, -2.0, "exact", 0.3, limit=limit))
    found = crowded([query()])[0]["instances"]
    assert sum(rows) == (1 if fusion == "mean" else 1000) and max(rows) <= 64
    monkeypatch.setattr(inference, "_ROWS", 1000)
    whole = crowded([query()])[0]["instances"]
    assert max(rows) == (1 if fusion == "mean" else 1000)
    assert 0 < len(found) == len(whole) <= (limit if limit > 0 else 100)
    torch.testing.assert_close(found.scores, whole.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pred_boxes.tensor, whole.pred_boxes.tensor, rtol=0, atol=1e-2)
