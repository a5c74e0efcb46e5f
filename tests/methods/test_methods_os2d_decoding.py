"""From boxes of levels to detections: recorded results, both kinds of suppression, and what is left out before it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, nms

from fsdet.methods.os2d import decoding
from fsdet.methods.os2d.decoding import Found, clip, exact_nms, has_area, reference_nms, to_frame

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "os2d" / "box_coder.npz")


def golden(name):
    array = np.asarray(GOLDEN[name])
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.int16 else array)


def crowd(count, seed=0):
    """Overlapping boxes of about 40 px on 300 px, with scores of their own."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 300
    boxes = torch.cat([corner, corner + 20 + torch.rand(count, 2, generator=generator) * 40], dim=1)
    return boxes, torch.rand(count, generator=generator)


class TestFrames:
    def test_each_axis_has_its_factor(self):
        """From 294 x 392 (height x width) to 420 x 588: y grows by 10 / 7, x by 3 / 2."""
        box = torch.tensor([[14.0, 14.0, 28.0, 140.0]])
        torch.testing.assert_close(to_frame(box, (294, 392), (420, 588)), torch.tensor([[21.0, 20.0, 42.0, 200.0]]))
        torch.testing.assert_close(to_frame(box[0, 2:], (294, 392), (420, 588)), torch.tensor([42.0, 200.0]))

    def test_clipping_and_boxes_without_area(self):
        boxes = torch.tensor(
            [[-5.0, -5, 5, 5], [95, 40, 200, 60], [-9, 0, 0, 9], [101, 0, 120, 9], [3, 50, 9, 80], [4, 4, 4, 9]]
        )
        clipped = clip(boxes, (50, 100))
        assert clipped[:2].tolist() == [[0, 0, 5, 5], [95, 40, 100, 50]]
        assert has_area(clipped).tolist() == [True, True, False, False, False, False]


class TestSuppression:
    def test_recorded_chunks(self):
        """12,500 boxes: what the release keeps, and what exact suppression keeps."""
        boxes, scores = golden("nms_chunked/boxes"), golden("nms_chunked/scores")
        assert torch.equal(reference_nms(boxes, scores, 0.3), golden("nms_chunked/keep_sorted_by_score"))
        assert torch.equal(exact_nms(boxes, scores, 0.3), golden("nms_chunked/keep_exact_nms"))

    def test_exact_by_a_naive_loop(self):
        boxes, scores = crowd(200)
        overlaps, kept = box_iou(boxes, boxes), []
        for place in scores.argsort(descending=True).tolist():
            if all(overlaps[place, other] <= 0.3 for other in kept):
                kept.append(place)
        assert exact_nms(boxes, scores, 0.3).tolist() == kept

    def test_by_hand(self):
        """The second box falls to the first; the third overlaps the second alone and stays."""
        boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])  # overlaps 3/7, 3/7, 1/9
        for suppress in decoding.SUPPRESSIONS.values():
            assert suppress(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.3, -1).tolist() == [0, 2]
            assert suppress(boxes, torch.tensor([0.7, 0.8, 0.9]), 0.3, -1).tolist() == [2, 0]
            assert suppress(boxes, torch.tensor([0.7, 0.8, 0.6]), 0.3, -1).tolist() == [1]
            assert suppress(boxes, torch.tensor([0.7, 0.8, 0.6]), 3 / 7 + 1e-4, -1).tolist() == [1, 0, 2]
            assert suppress(boxes[:0], torch.zeros(0), 0.3, -1).tolist() == []

    def test_a_box_falls_to_one_that_falls_later(self):
        """In chunks of two: 1 falls to 0's neighbour 2 only when that is not gone yet."""
        boxes = torch.tensor([[8.0, 0, 18, 10], [4, 0, 14, 10], [0, 0, 10, 10]])
        scores = torch.tensor([0.7, 0.8, 0.9])
        assert reference_nms(boxes, scores, 0.3).tolist() == [2, 0]
        assert reference_nms(boxes, scores, 0.3, chunk=2).tolist() == [2]  # 0 fell to 1 in the first chunk

    def test_overlaps_across_chunks_stay(self):
        """Chunks of two boxes far apart lose none, so that the loop ends; equal boxes in different chunks stay."""
        far = torch.tensor([[0.0, 0, 10, 10], [50, 0, 60, 10]])
        boxes, scores = far.repeat(2, 1), torch.tensor([0.5, 0.6, 0.7, 0.8])
        assert reference_nms(boxes, scores, 0.3, chunk=2).tolist() == [3, 2, 1, 0]

    @pytest.mark.parametrize("limit", [1, 7, 60, 10_000])
    def test_the_best_that_stay(self, limit, monkeypatch):
        """Comparing the best boxes alone gives what comparing all gives."""
        boxes, scores = crowd(3000)
        scores = (scores * 100).round() / 100  # many equal ones
        monkeypatch.setattr(decoding, "_FIRST", 64)
        sizes = []
        monkeypatch.setattr(decoding, "nms", lambda b, s, t: sizes.append(len(b)) or nms(b, s, t))
        expected = nms(boxes, scores, 0.3)
        assert torch.equal(exact_nms(boxes, scores, 0.3, limit), expected[:limit])
        assert sizes[0] == 64 and (sizes[-1] < 3000) == (limit < 10_000)


class TestFound:
    def test_fields(self):
        boxes, scores = crowd(5)
        classes = torch.arange(5)
        found = Found(boxes, scores, classes, corners=torch.zeros(5, 4, 2))
        assert set(found.fields()) == {"boxes", "scores", "classes", "corners"}
        part = found[torch.tensor([3, 1])]
        assert len(part) == 2 and part.classes.tolist() == [3, 1] and part.anchors is None
        joined = Found.join([part, found[:1]])
        assert joined.classes.tolist() == [3, 1, 0] and torch.equal(joined.boxes[0], boxes[3])

    def test_best(self):
        found = Found(torch.zeros(4, 4), torch.tensor([0.2, 0.5, 0.2, 0.9]), torch.arange(4))
        assert found.best().classes.tolist() == [3, 1, 0, 2]
        assert found.best(3).classes.tolist() == [3, 1, 0] and found.best(0).classes.tolist() == []

    def test_nothing(self):
        found = Found.nothing(torch.device("cpu"))
        assert len(found) == 0 and found.boxes.shape == (0, 4) and found.classes.dtype == torch.int64
        assert len(found.best(5)) == 0
