"""Paired bootstrap: AP as COCO's, weights as repeated pictures, intervals of sides that differ and that do not."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation_cases import make_toy, to_batches

from fsdet.evaluation.bootstrap import Difference, paired_bootstrap, rank_classes
from fsdet.evaluation.coco_style import coco_metrics, coco_precision
from fsdet.evaluation.evaluator import build_evaluator
from fsdet.evaluation.ground_truth import Detections, load_ground_truth
from fsdet.evaluation.matching import read_detections


@pytest.fixture
def case(tmp_path):
    return case_of(tmp_path, 0)


def case_of(folder, seed):
    """Ground truth with ignored objects, and detections, of 20 images and 5 classes."""
    toy = make_toy(folder, seed=seed)
    name = toy.register()
    evaluator = build_evaluator(name, output_dir=folder)
    evaluator.reset()
    evaluator.process(*to_batches(toy.detections))
    evaluator.evaluate()
    truth = load_ground_truth(name)
    assert truth.ignored.any()
    return truth, read_detections(folder / "detections.json", truth)


def repeated(truth, detections, times):
    """The images as often as `times` says, as a new set."""
    copies = [(image, copy) for image, count in enumerate(times) for copy in range(count)]
    objects = [np.flatnonzero(truth.image_index == image) for image, _ in copies]
    found = [np.flatnonzero(detections.image_index == image) for image, _ in copies]
    rows, picked = np.concatenate(objects), np.concatenate(found)
    new_truth = replace(
        truth,
        image_ids=tuple(range(len(copies))),
        image_sizes=truth.image_sizes[[image for image, _ in copies]],
        image_index=np.repeat(np.arange(len(copies)), [len(own) for own in objects]),
        **{key: getattr(truth, key)[rows] for key in ("boxes", "class_ids", "areas", "ignored")},
    )
    index = np.repeat(np.arange(len(copies)), [len(own) for own in found])
    return new_truth, Detections(index, *(getattr(detections, key)[picked] for key in ("boxes", "scores", "class_ids")))


@pytest.mark.parametrize("seed", range(3))
def test_ap_equals_cocos(tmp_path, seed):
    truth, detections = case_of(tmp_path, seed)
    precision = coco_precision(truth, detections)
    for iou, key in ((0.5, "AP50"), (0.75, "AP75")):
        found = paired_bootstrap(truth, [detections], [detections], iou=iou, draws=1)
        assert found.first == found.second == pytest.approx(coco_metrics(precision)[key], abs=1e-9)
        some = paired_bootstrap(truth, [detections], [detections], iou=iou, draws=1, classes=[1, 3])
        assert some.first == pytest.approx(coco_metrics(precision, [1, 3])[key], abs=1e-9) != found.first


def test_weights_are_repeated_pictures(case):
    """Equal scores of copies come in another order there, which moves AP a little."""
    truth, detections = case
    times = np.random.default_rng(1).integers(0, 3, len(truth.image_ids))
    rankings = rank_classes(truth, detections, range(len(truth.class_names)))
    ours = 100 * np.mean([ranking.average_precision(times.astype(float)) for ranking in rankings])
    expected = coco_metrics(coco_precision(*repeated(truth, detections, times)))["AP50"]
    once = coco_metrics(coco_precision(truth, detections))["AP50"]
    assert ours == pytest.approx(expected, abs=0.5) and abs(expected - once) > 1


def test_a_hundred_boxes_of_a_picture_count(case):
    """The 101st of an image and class would be the only correct one."""
    truth, _ = case
    place = int(np.flatnonzero(~truth.ignored)[0])
    x, y, w, h = truth.boxes[place]
    boxes = np.tile([-50.0, -50, -40, -40], (101, 1))
    boxes[100] = x, y, x + w, y + h
    scores, index = np.linspace(1, 0.5, 101), np.full(101, truth.image_index[place])
    labels = np.full(101, truth.class_ids[place])
    (late,) = rank_classes(truth, Detections(index, boxes, scores, labels), [int(labels[0])])
    (early,) = rank_classes(truth, Detections(index, boxes, scores[::-1].copy(), labels), [int(labels[0])])
    assert len(late.correct) == len(early.correct) == 100 and not late.correct.any() and early.correct.sum() == 1


def test_a_side_against_itself_and_against_a_worse_one(case):
    truth, detections = case
    same = paired_bootstrap(truth, [detections], [detections], draws=50)
    assert same.difference == same.low == same.high == 0
    few = np.arange(len(detections)) % 6 == 0
    worse = Detections(*(getattr(detections, key)[few] for key in ("image_index", "boxes", "scores", "class_ids")))
    found = paired_bootstrap(truth, [detections], [worse], draws=200)
    assert 0 < found.low < found.difference < found.high
    turned = paired_bootstrap(truth, [worse], [detections], draws=200)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))  # the same draws
    assert found == paired_bootstrap(truth, [detections], [worse], draws=200)
    assert found.low != paired_bootstrap(truth, [detections], [worse], draws=200, seed=1).low
    mixed = paired_bootstrap(truth, [detections, worse], [worse, worse], draws=200)
    assert mixed.difference == pytest.approx(found.difference / 2)


def test_the_interval_is_that_of_the_pictures(case):
    """Two classes of luck: with the pictures ten times over, the interval is about 1 / sqrt(10) as wide."""
    truth, detections = case
    half = np.arange(len(detections)) % 2 == 0
    worse = Detections(*(getattr(detections, key)[half] for key in ("image_index", "boxes", "scores", "class_ids")))
    once = paired_bootstrap(truth, [detections], [worse], draws=300)
    times = [10] * len(truth.image_ids)
    more, better = repeated(truth, detections, times)
    _, less = repeated(truth, worse, times)
    tenfold = paired_bootstrap(more, [better], [less], draws=100)
    ratio = (tenfold.high - tenfold.low) / (once.high - once.low)
    assert 0.2 < ratio < 0.45


def test_nothing_to_compare(case):
    truth, detections = case
    with pytest.raises(ValueError, match="on each side"):
        paired_bootstrap(truth, [detections], [])
    empty = replace(truth, ignored=np.ones_like(truth.ignored))
    with pytest.raises(ValueError, match="no object of the classes"):
        paired_bootstrap(empty, [detections], [detections])


def test_line():
    line = Difference(0.5, 53.234, 54.41, -3.4, 1.1).line()
    assert line == "AP50: 53.23 and 54.41, difference -1.18 [-3.40, +1.10]"
