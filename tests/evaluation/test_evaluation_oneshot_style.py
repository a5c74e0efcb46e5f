"""OS2D's metrics against golden numbers of its authors' code, hand-made cases and a naive loop."""

import math
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from evaluation_cases import CLASSES, make_toy, to_batches

from fsdet.data.spec import DatasetSpec
from fsdet.evaluation.evaluator import build_evaluator
from fsdet.evaluation.ground_truth import Detections, GroundTruth, load_ground_truth
from fsdet.evaluation.oneshot_style import oneshot_metrics, rank_detections
from fsdet.evaluation.result import split_metrics

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "os2d" / "evaluation.npz"
IMAGES = 5


def truth_of(image_index, boxes, labels, difficult=None, names=None):
    """Ground truth from XYXY boxes and class ids from 0."""
    boxes, labels = np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64)
    names = tuple(names or map(str, range(labels.max(initial=-1) + 1)))
    size = boxes[:, 2:] - boxes[:, :2]
    return GroundTruth(
        source="case",
        image_ids=tuple(range(IMAGES)),
        image_sizes=np.full((IMAGES, 2), 500),
        class_names=names,
        dataset_ids=tuple(range(len(names))),
        image_index=np.array(image_index, np.int64),
        boxes=np.concatenate([boxes[:, :2], size], axis=1),
        class_ids=labels,
        areas=size.prod(axis=1),
        ignored=np.zeros(len(boxes), bool) if difficult is None else np.array(difficult, bool),
    )


def found(image_index, boxes, labels, scores):
    return Detections(
        np.array(image_index, np.int64),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float64),
        np.array(labels, np.int64),
    )


@pytest.fixture(scope="module")
def golden():
    """The golden images with class ids in the millions, and the classes in the order of these ids."""
    data = dict(np.load(GOLDEN))
    for key in data:
        if key.endswith("_labels"):
            data[key] = 7_000_000 + 1_000_003 * data[key]

    def joined(name):
        return np.concatenate([data[f"image{i}/{name}"] for i in range(IMAGES)])

    def images(name):
        return np.repeat(np.arange(IMAGES), [len(data[f"image{i}/{name}"]) for i in range(IMAGES)])

    ids = np.unique(np.concatenate([joined("gt_labels"), joined("pred_labels")]))
    scale = [data[f"image{i}/gt_size_wh"] / data[f"image{i}/pred_size_wh"] for i in range(IMAGES)]
    boxes = np.concatenate([data[f"image{i}/pred_boxes"] * np.tile(scale[i], 2) for i in range(IMAGES)])
    truth = truth_of(
        images("gt_labels"), joined("gt_boxes"), np.searchsorted(ids, joined("gt_labels")), joined("gt_difficult"),
        names=map(str, ids),
    )  # fmt: skip
    detections = found(images("pred_labels"), boxes, np.searchsorted(ids, joined("pred_labels")), joined("pred_scores"))
    return data, truth, detections, ((ids - 7_000_000) // 1_000_003)


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_golden_numbers(golden, threshold):
    data, truth, detections, classes = golden
    expected = {k.split("/")[1]: v for k, v in data.items() if k.startswith(f"iou{threshold}/")}
    ranked = rank_detections(truth, detections, threshold=threshold)
    np.testing.assert_allclose(ranked.average_precision, expected["ap_per_class"][classes], atol=1e-6)
    np.testing.assert_array_equal(ranked.objects, expected["n_pos"][classes])
    end = f"{100 * threshold:g}"
    names = {"map": "mAP", "map_weighted": "mAPw", "recall": "recall", "ap_joint_classes": "jointAP"}
    metrics = oneshot_metrics(ranked)
    assert set(metrics) == {name + end for name in names.values()}
    for theirs, ours in names.items():
        assert metrics[ours + end] == pytest.approx(100 * float(expected[theirs]), abs=1e-4), ours


def test_subset_of_classes(golden):
    """One class by itself: all four say what it says; its recall is golden too."""
    data, truth, detections, classes = golden
    ranked = rank_detections(truth, detections)
    place = list(classes).index(3)
    metrics = oneshot_metrics(ranked, [place])
    ap = 100 * float(data["iou0.5/ap_per_class"][3])
    assert metrics["mAP50"] == metrics["mAPw50"] == metrics["jointAP50"] == pytest.approx(ap, abs=1e-4)
    assert metrics["recall50"] == pytest.approx(100 * float(data["iou0.5/recall_per_class"][3]))


def test_boxes_are_a_pixel_larger_and_the_threshold_is_reached():
    """9 x 9 in 9 x 19 pixels: 81/171 plain, 100/200 when each box is a pixel wider and higher."""
    truth = truth_of([0], [[10, 10, 19, 29]], [0])
    detections = found([0], [[10, 10, 19, 19]], [0], [0.9])
    assert oneshot_metrics(rank_detections(truth, detections))["mAP50"] == 100.0
    assert oneshot_metrics(rank_detections(truth, detections, threshold=0.51))["mAP51"] == 0.0


def test_weights_difficult_and_classes_without_objects():
    """Class 0: three objects, one found first, a false one, one found: AP = 1/3 + 2/3 * 1/3 = 5/9. Class 1: one object,
    found behind a detection of a difficult one. Class 2: a difficult object alone. Class 3: no object."""
    far = [[0, 0, 20, 20], [100, 0, 120, 20], [200, 0, 220, 20], [300, 0, 320, 20], [400, 0, 420, 20]]
    truth = truth_of(
        [0, 0, 1, 0, 0, 1], [far[0], far[1], far[0], far[3], far[4], far[2]], [0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1],
        names="abcd",
    )  # fmt: skip
    detections = found(
        [0, 0, 0, 0, 1, 1, 2], [far[0], far[2], far[4], far[3], far[0], far[2], far[0]], [0, 0, 1, 1, 0, 2, 3],
        [0.9, 0.8, 0.95, 0.5, 0.7, 0.6, 0.1],
    )  # fmt: skip
    ranked = rank_detections(truth, detections)
    np.testing.assert_allclose(ranked.average_precision, [5 / 9, 1, math.nan, math.nan])
    metrics = oneshot_metrics(ranked)
    assert metrics["mAP50"] == pytest.approx(100 * (5 / 9 + 1) / 2)
    assert metrics["mAPw50"] == pytest.approx(100 * (3 * 5 / 9 + 1) / 4)
    assert metrics["recall50"] == 75.0
    # In one ranking: right, wrong, right, right, wrong (class 3). Precision 1, then 3/4 twice; 4 objects.
    assert metrics["jointAP50"] == 62.5
    assert all(math.isnan(value) for value in oneshot_metrics(ranked, [2, 3]).values())


def test_second_detection_of_an_object_is_wrong_and_nothing_found_is_zero():
    truth = truth_of([0, 1], [[0, 0, 20, 20], [0, 0, 20, 20]], [0, 0])
    twice = found([0, 0, 1], [[0, 0, 20, 20], [0, 0, 20, 21], [0, 0, 20, 20]], [0, 0, 0], [0.9, 0.8, 0.7])
    assert oneshot_metrics(rank_detections(truth, twice))["mAP50"] == pytest.approx(100 * (1 / 2 + 1 / 2 * 2 / 3))
    nothing = oneshot_metrics(rank_detections(truth, found([], [], [], [])))
    assert nothing == {"mAP50": 0.0, "mAPw50": 0.0, "recall50": 0.0, "jointAP50": 0.0}


def test_threshold_out_of_range():
    with pytest.raises(ValueError, match="IoU threshold is 50"):
        rank_detections(truth_of([], [], []), found([], [], [], []), threshold=50)


def naive(truth, detections, classes):
    """Mean AP and recall, one detection after the other."""
    precisions, hits, total = [], 0, 0
    for class_id in classes:
        objects = [row for row in np.flatnonzero(truth.class_ids == class_id)]
        count = sum(not truth.ignored[row] for row in objects)
        taken, outcome = set(), []
        rows = sorted(np.flatnonzero(detections.class_ids == class_id), key=lambda row: -detections.scores[row])
        for row in rows:
            x0, y0, x1, y1 = detections.boxes[row].astype(float)
            best, place = -1.0, None
            for other in objects:
                if truth.image_index[other] != detections.image_index[row]:
                    continue
                a, b, w, h = truth.boxes[other]
                width = min(x1, a + w) + 1 - max(x0, a)
                height = min(y1, b + h) + 1 - max(y0, b)
                common = max(width, 0) * max(height, 0)
                iou = common / ((x1 + 1 - x0) * (y1 + 1 - y0) + (w + 1) * (h + 1) - common)
                if iou > best:
                    best, place = iou, other
            if best >= 0.5 and truth.ignored[place]:
                continue
            outcome.append(best >= 0.5 and place not in taken)
            taken.add(place if best >= 0.5 else None)
        if not count:
            continue
        true = [sum(outcome[: i + 1]) for i in range(len(outcome))]
        curve = [n / (i + 1) for i, n in enumerate(true)]
        steps = [max(curve[i:]) for i, right in enumerate(outcome) if right]
        precisions.append(sum(steps) / count)
        hits, total = hits + sum(outcome), total + count
    return 100 * np.mean(precisions), 100 * hits / total


def test_evaluator_has_both_kinds_of_metrics(tmp_path):
    """A one-shot set has OS2D's metrics beside those of its style, for all, base and novel classes."""
    toy = make_toy(tmp_path, seed=3)
    name = toy.register(novel=("dog", "owl"))
    MetadataCatalog.get(name).set(spec=DatasetSpec("oneshot", "test", "all"))
    evaluator = build_evaluator(name, style="coco", max_detections=-1)
    evaluator.process(*to_batches(toy.detections))
    metrics = evaluator.evaluate()["bbox"]
    truth = load_ground_truth(name)
    for prefix, classes in (("", CLASSES), ("b", ("cup", "hand-saw", "pen")), ("n", ("dog", "owl"))):
        expected = naive(truth, evaluator.detections, [CLASSES.index(c) for c in classes])
        assert (metrics[f"{prefix}mAP50"], metrics[f"{prefix}recall50"]) == pytest.approx(expected), prefix
    overall, per_class = split_metrics(metrics)
    assert {"mAP50", "nmAPw50", "nrecall50", "bjointAP50", "nAP50"} <= set(overall)
    assert set(per_class["owl"]) == {"AP", "AP50", "AP75"}


def test_switch_of_other_data_sets(toy):
    plain = build_evaluator(toy.register(), style="voc")
    asked = build_evaluator(toy.register(), style="voc", oneshot_metric=True)
    results = []
    for evaluator in (plain, asked):
        evaluator.process(*to_batches(toy.detections))
        results.append(evaluator.evaluate()["bbox"])
    assert "mAP50" not in results[0]
    assert {key: results[1][key] for key in results[0]} == pytest.approx(results[0], nan_ok=True)
    assert results[1]["nmAP50"] > 0


def test_all_detections_count_in_coco_style_when_asked(toy):
    name = toy.register()
    values = []
    for most in (-1, 100, 1):
        evaluator = build_evaluator(name, max_detections=most)
        evaluator.process(*to_batches(toy.detections))
        values.append(evaluator.evaluate()["bbox"]["AP50"])
    assert values[0] == values[1] > values[2]
    with pytest.raises(ValueError, match="-1 for all, got 0"):
        build_evaluator(name, max_detections=0)
