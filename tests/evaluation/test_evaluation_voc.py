"""VOC style against a plain loop over detections, and by hand."""

import math

import numpy as np
import pytest
from evaluation_cases import CLASSES, NOVEL, make_toy, to_batches
from test_evaluation_coco import found, register_boxes

from fsdet.evaluation.evaluator import build_evaluator
from fsdet.evaluation.voc_style import THRESHOLDS, voc_average_precision


def run(name, detections, **options):
    evaluator = build_evaluator(name, style="voc", **options)
    evaluator.process(*to_batches(detections))
    return evaluator, evaluator.evaluate()["bbox"]


def slow_average_precision(truth, found_boxes, class_id, threshold, eleven_point):
    """The development kit's procedure, one detection after the other, with plain continuous IoU."""
    rows = [i for i in range(len(found_boxes)) if found_boxes.class_ids[i] == class_id]
    rows.sort(key=lambda i: -found_boxes.scores[i])
    taken, outcomes = set(), []
    for i in rows:
        x1, y1, x2, y2 = (float(value) for value in found_boxes.boxes[i])
        best, best_object = -1.0, None
        for j in range(len(truth.class_ids)):
            if truth.class_ids[j] != class_id or truth.image_index[j] != found_boxes.image_index[i]:
                continue
            gx, gy, gw, gh = truth.boxes[j]
            width = max(0.0, min(x2, gx + gw) - max(x1, gx))
            height = max(0.0, min(y2, gy + gh) - max(y1, gy))
            overlap = width * height / ((x2 - x1) * (y2 - y1) + gw * gh - width * height)
            if overlap > best:
                best, best_object = overlap, j
        if best > threshold and truth.ignored[best_object]:
            continue
        outcomes.append(best > threshold and best_object not in taken)
        if outcomes[-1]:
            taken.add(best_object)
    total = int(truth.counted_objects()[class_id])
    precisions, recalls, hits = [], [], 0
    for count, outcome in enumerate(outcomes, start=1):
        hits += outcome
        precisions.append(hits / count)
        recalls.append(hits / total)
    if eleven_point:
        levels = np.arange(0.0, 1.1, 0.1)  # 0.30000000000000004: a recall of exactly 0.3 does not reach it, officially
        best = [max([p for p, r in zip(precisions, recalls, strict=True) if r >= t], default=0) for t in levels]
        return sum(best) / 11
    area, previous = 0.0, 0.0
    for k, recall in enumerate(recalls):
        area += (recall - previous) * max(precisions[k:])
        previous = recall
    return area


@pytest.mark.parametrize("eleven_point", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_plain_loop(tmp_path, seed, eleven_point):
    toy = make_toy(tmp_path, seed=seed)
    evaluator, metrics = run(toy.register(), toy.detections, voc_11_point=eleven_point)
    table = voc_average_precision(evaluator.ground_truth, evaluator.detections, eleven_point=eleven_point)
    expected = [
        [
            slow_average_precision(evaluator.ground_truth, evaluator.detections, c, threshold, eleven_point)
            for c in range(len(CLASSES))
        ]
        for threshold in THRESHOLDS
    ]
    np.testing.assert_allclose(table, expected, atol=1e-9)
    novel = [CLASSES.index(name) for name in NOVEL]
    assert metrics["nAP50"] == pytest.approx(100 * np.mean([expected[0][c] for c in novel]))
    assert metrics["nAP"] == pytest.approx(100 * np.mean([[row[c] for c in novel] for row in expected]))
    assert metrics["AP75-owl"] == pytest.approx(100 * expected[5][CLASSES.index("owl")])
    assert 5 < metrics["AP50"] < 95


def single(boxes, scores, objects, **options):
    name = register_boxes([[(0, box, flags) for box, flags in objects]], classes=("a",))
    evaluator = build_evaluator(name, style="voc", **options)
    evaluator.process([{"image_id": "000"}], [found(boxes, scores, [0] * len(boxes))])
    return evaluator.evaluate()["bbox"]


def test_by_hand():
    """Two objects; a hit, a duplicate of it, a miss, a hit: precision 1, 1/2, 1/3, 2/4 at recall 1/2, ..., 1."""
    one, two, away = [0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]
    boxes, scores = [one, one, away, two], [0.9, 0.8, 0.7, 0.6]
    objects = [(one, {}), (two, {})]
    eleven = single(boxes, scores, objects)
    assert eleven["AP50"] == pytest.approx(100 * (6 * 1.0 + 5 * 0.5) / 11)
    area = single(boxes, scores, objects, voc_11_point=False)
    assert area["AP50"] == pytest.approx(100 * (0.5 * 1.0 + 0.5 * 0.5))


def test_overlap_must_exceed_the_threshold():
    """Boxes 10 x 10 against 20 x 10: IoU exactly 0.5, which VOC does not accept."""
    assert single([[0, 0, 10, 10]], [0.9], [([0, 0, 20, 10], {})])["AP50"] == 0.0
    assert single([[0, 0, 10.1, 10]], [0.9], [([0, 0, 20, 10], {})])["AP50"] == pytest.approx(100)


def test_a_taken_object_is_not_passed_on():
    """The second detection overlaps both objects enough; VOC only looks at its best object, which is taken."""
    objects = [([0, 0, 10, 10], {}), ([0, 4, 10, 14], {})]
    metrics = single([[0, 0, 10, 10], [0, 1, 10, 11]], [0.9, 0.8], objects)
    assert metrics["AP50"] == pytest.approx(100 * 6 / 11)


def test_legacy_rounds_scores():
    """0.5004 and 0.5001 become equal; the box order decides then, not the score."""
    good, bad = [0, 0, 10, 10], [50, 50, 60, 60]
    objects = [(good, {})]
    assert single([bad, good], [0.5001, 0.5004], objects)["AP50"] == pytest.approx(100)
    assert single([bad, good], [0.5001, 0.5004], objects, legacy=True)["AP50"] == pytest.approx(50)


def test_legacy_rounds_boxes():
    """Width 10.04 is written as 10.0, which leaves an IoU of exactly 0.5."""
    objects = [([0, 0, 20, 10], {})]
    assert single([[0, 0, 10.04, 10]], [0.9], objects)["AP50"] == pytest.approx(100)
    assert single([[0, 0, 10.04, 10]], [0.9], objects, legacy=True)["AP50"] == 0.0


def test_class_without_objects_is_left_out():
    name = register_boxes([[(0, [0, 0, 10, 10], {}), (1, [20, 20, 30, 30], {"difficult": 1})]], classes=("a", "b"))
    results = []
    for legacy in (False, True):
        evaluator = build_evaluator(name, style="voc", legacy=legacy)
        evaluator.process([{"image_id": "000"}], [found([[0, 0, 10, 10]], [0.9], [0])])
        results.append(evaluator.evaluate()["bbox"])
    assert results[0]["AP50"] == pytest.approx(100)
    assert math.isnan(results[0]["AP50-b"])
    assert results[1]["AP50"] == pytest.approx(50)
    assert results[1]["AP50-b"] == 0.0


def test_highest_scores(toy):
    evaluator, _ = run(toy.register(), toy.detections)
    best = {}
    for item in toy.detections:
        for class_id, score in zip(item["classes"], item["scores"], strict=True):
            best[CLASSES[class_id]] = max(score, best.get(CLASSES[class_id], 0))
    assert evaluator.highest_scores() == pytest.approx(best, abs=1e-6)
