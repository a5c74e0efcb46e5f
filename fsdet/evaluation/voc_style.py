"""PASCAL VOC average precision at IoU 0.50:0.05:0.95, 11-point (VOC2007) or area under the curve (VOC2010 on).

Follows the VOC development kit: each detection looks only at the object of its class and image that it overlaps most;
the first one above the threshold is correct, later ones are duplicates, and those on "difficult" objects do not count.
All ten thresholds share one matching, since the best object of a detection does not depend on the threshold.

Source: Everingham et al., IJCV 2010, section 4.2; TFA (Wang et al., ICML 2020) for the range of thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .ground_truth import Detections, GroundTruth

THRESHOLDS = tuple(percent / 100.0 for percent in range(50, 100, 5))


def voc_average_precision(
    ground_truth: GroundTruth, detections: Detections, *, eleven_point: bool = True, legacy: bool = False
) -> np.ndarray:
    """Average precision of each class at each threshold.

    Args:
        ground_truth: K classes.
        detections: of the same images.
        eleven_point: VOC2007's mean of precisions at recall 0, 0.1, ... 1; False for the area under the curve.
        legacy: numbers of the official few-shot code: scores rounded to 3 and boxes to 1 decimal (as written to the
            development kit's text files), equal scores in the order of NumPy's unstable sort, and 0 instead of nan for
            a class without objects.
    Returns: (10, K) float64 in [0, 1]; rows as `THRESHOLDS`; nan for a class without counted objects.
    """
    boxes, scores = _one_based(detections, legacy)
    overlap, match = best_matches(ground_truth, detections, boxes)
    counted = ground_truth.counted_objects()
    result = np.full((len(THRESHOLDS), len(counted)), 0.0 if legacy else np.nan)
    for class_id in np.flatnonzero(counted):
        rows = np.flatnonzero(detections.class_ids == class_id)
        rows = rows[np.argsort(-scores[rows], kind=None if legacy else "stable")]
        for index, threshold in enumerate(THRESHOLDS):
            correct, counts = correct_ones(overlap[rows], match[rows], ground_truth.ignored, threshold)
            true = np.cumsum(correct)
            false = np.cumsum(counts & ~correct)
            recall = true / counted[class_id]
            precision = true / np.maximum(true + false, np.finfo(np.float64).eps)
            result[index, class_id] = (
                _eleven_point(recall, precision) if eleven_point else area_under_curve(recall, precision)
            )
    return result


def voc_metrics(average_precision: np.ndarray, classes: Sequence[int] | None = None) -> dict[str, float]:
    """AP, AP50, AP75 in percent, averaged over some classes.

    Args:
        average_precision: (10, K) from `voc_average_precision`.
        classes: class ids to average over; None for all. Classes with nan are left out of the means.
    Returns: nan where no class has an object.
    """
    part = average_precision if classes is None else average_precision[:, list(classes)]
    part = part[:, ~np.isnan(part).any(axis=0)] * 100
    if part.shape[1] == 0:
        return dict.fromkeys(("AP", "AP50", "AP75"), float("nan"))
    means = part.mean(axis=1)
    return {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[5])}


def _one_based(detections: Detections, legacy: bool) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in VOC's inclusive pixels counted from 1 (only the corner x1 y1 moves), and scores."""
    boxes = detections.boxes + np.array([1, 1, 0, 0], dtype=detections.boxes.dtype)
    if not legacy:
        return boxes.astype(np.float64), detections.scores
    # Text formatting rounds the exact binary value, which np.round does not; the difference decides ties.
    rounded = [[float(f"{value:.1f}") for value in box] for box in boxes.tolist()]
    scores = [float(f"{score:.3f}") for score in detections.scores.tolist()]
    return np.array(rounded, dtype=np.float64).reshape(-1, 4), np.array(scores, dtype=np.float64)


def best_matches(ground_truth: GroundTruth, detections: Detections, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU with, and index of, the object of the same class and image that each detection overlaps most.

    Returns: (D,) float64, -inf where there is no such object; (D,) int64, the first object among equals, or -1.
    """
    num_classes = len(ground_truth.class_names)
    truth_key = ground_truth.image_index * num_classes + ground_truth.class_ids
    order = np.argsort(truth_key, kind="stable")
    key = detections.image_index * num_classes + detections.class_ids
    first = np.searchsorted(truth_key[order], key, "left")
    count = np.searchsorted(truth_key[order], key, "right") - first
    overlap = np.full(len(detections), -np.inf)
    match = np.full(len(detections), -1, dtype=np.int64)
    rows = np.flatnonzero(count)
    if not len(rows):
        return overlap, match
    starts = np.cumsum(count[rows]) - count[rows]
    detection = np.repeat(rows, count[rows])  # (P,) one entry a pair of detection and object
    truth = order[np.repeat(first[rows] - starts, count[rows]) + np.arange(len(detection))]
    corners = ground_truth.boxes.copy()
    corners[:, 2:] += corners[:, :2]
    corners[:, :2] += 1
    iou = _pixel_iou(boxes[detection], corners[truth])
    overlap[rows] = np.maximum.reduceat(iou, starts)
    best = np.flatnonzero(iou == overlap[detection])
    _, earliest = np.unique(detection[best], return_index=True)
    match[rows] = truth[best[earliest]]
    return overlap, match


def _pixel_iou(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Row-wise IoU of (P, 4) boxes of inclusive pixels: a box from 3 to 3 is one pixel wide."""
    size = np.maximum(np.minimum(left[:, 2:], right[:, 2:]) - np.maximum(left[:, :2], right[:, :2]) + 1.0, 0.0)
    intersection = size[:, 0] * size[:, 1]
    areas = [(box[:, 2] - box[:, 0] + 1.0) * (box[:, 3] - box[:, 1] + 1.0) for box in (left, right)]
    union = areas[0] + areas[1] - intersection
    # A union of zero needs two empty boxes; their overlap is none, not undefined.
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def correct_ones(
    overlap: np.ndarray, match: np.ndarray, ignored: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """For detections in order of their scores: which are correct, and which count at all. (D,) bool each."""
    hit = overlap > threshold
    counts = np.ones(len(overlap), dtype=bool)
    counts[hit] = ~ignored[match[hit]]
    candidates = np.flatnonzero(hit & counts)
    _, earliest = np.unique(match[candidates], return_index=True)
    correct = np.zeros(len(overlap), dtype=bool)
    correct[candidates[earliest]] = True
    return correct, counts


def _eleven_point(recall: np.ndarray, precision: np.ndarray) -> float:
    # arange's levels carry rounding (0.30000000000000004), which a recall of 0.3 misses; the official numbers do too.
    points = [np.max(precision, where=recall >= level, initial=0.0) for level in np.arange(0.0, 1.1, 0.1)]
    return float(sum(point / 11.0 for point in points))


def area_under_curve(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the precision-recall curve (M,), precision made falling."""
    recall = np.concatenate(([0.0], recall, [1.0]))
    envelope = np.maximum.accumulate(np.concatenate(([0.0], precision, [0.0]))[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))
