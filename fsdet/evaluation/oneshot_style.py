"""Metrics of one-shot detection as OS2D measures it: mAP, mAPw, recall and the AP of all classes in one ranking.

PASCAL VOC's rule with the area under the curve, at one IoU. It differs from `voc_style.py` in how boxes overlap: 1 is
added to the right and lower edge of both, whose coordinates are not moved, and an IoU equal to the threshold suffices.
Difficult objects are neither rewarded nor punished; classes without any other object have no AP.

Source: Osokin et al., ECCV 2020 (OS2D), section 6, and its evaluation; Everingham et al., IJCV 2010, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .ground_truth import Detections, GroundTruth
from .voc_style import area_under_curve, best_matches, correct_ones

THRESHOLD = 0.5
METRICS = ("mAP", "mAPw", "recall", "jointAP")  # in the results with the IoU in percent behind


@dataclass(frozen=True)
class RankedDetections:
    """What D detections of K classes are worth, in the order of their classes, the best first in each.

    Attributes:
        threshold: least IoU of a correct detection.
        scores: (D,) float64.
        correct: (D,) bool. counts: (D,) bool, False for those on difficult objects.
        first: (K + 1,) int64, where the detections of a class begin; the last one is D.
        objects: (K,) int64, objects of each class that are not difficult.
        average_precision: (K,) float64 in [0, 1], nan for a class without objects.
    """

    threshold: float
    scores: np.ndarray
    correct: np.ndarray
    counts: np.ndarray
    first: np.ndarray
    objects: np.ndarray
    average_precision: np.ndarray


def rank_detections(
    ground_truth: GroundTruth, detections: Detections, *, threshold: float = THRESHOLD
) -> RankedDetections:
    """Match detections and objects once, for the metrics of any classes.

    Args:
        ground_truth: K classes.
        detections: of the same images, boxes in pixels of the stored pictures.
        threshold: least IoU of a correct detection, in (0, 1].
    Raises: ValueError for another threshold.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"The IoU threshold is {threshold}; expected a number above 0 and up to 1")
    # `voc_style` counts pixels from 1: a box from 3 to 3 is one wide, and the left upper corner of objects moves by 1.
    # Here nothing moves, so that every box is a pixel larger; the objects' corners are moved the other way before.
    widened = replace(ground_truth, boxes=ground_truth.boxes + np.array([-1.0, -1.0, 1.0, 1.0]))
    overlap, match = best_matches(widened, detections, detections.boxes.astype(np.float64))
    order = np.lexsort((-detections.scores, detections.class_ids))  # stable
    # VOC's IoU has to be above the threshold, OS2D's only to reach it.
    below = float(np.nextafter(threshold, 0.0))
    correct, counts = correct_ones(overlap[order], match[order], ground_truth.ignored, below)
    objects = ground_truth.counted_objects()
    first = np.searchsorted(detections.class_ids[order], np.arange(len(objects) + 1))
    average_precision = np.full(len(objects), np.nan)
    for class_id in np.flatnonzero(objects):
        rows = slice(first[class_id], first[class_id + 1])
        average_precision[class_id] = _average_precision(correct[rows], counts[rows], objects[class_id])
    return RankedDetections(threshold, detections.scores[order], correct, counts, first, objects, average_precision)


def oneshot_metrics(ranked: RankedDetections, classes: Sequence[int] | None = None) -> dict[str, float]:
    """Metrics in percent over some classes.

    Args:
        ranked: from `rank_detections`.
        classes: class ids; None for all.
    Returns: "mAP50" (mean of the AP over classes with objects), "mAPw50" (weighted with their number of objects),
        "recall50" (share of all objects that are found) and "jointAP50" (all detections of these classes, also of those
        without objects, in one ranking), with the IoU in percent; nan where no class has an object.
    """
    classes = np.arange(len(ranked.objects)) if classes is None else np.asarray(classes, dtype=np.int64)
    objects, average_precision = ranked.objects[classes], ranked.average_precision[classes]
    names = [f"{name}{100 * ranked.threshold:g}" for name in METRICS]
    if not objects.sum():
        return dict.fromkeys(names, float("nan"))
    rows = np.concatenate([np.arange(ranked.first[i], ranked.first[i + 1]) for i in classes])
    rows = rows[np.argsort(-ranked.scores[rows], kind="stable")]
    values = (
        np.nanmean(average_precision),
        np.nansum(average_precision * objects) / objects.sum(),
        ranked.correct[rows].sum() / objects.sum(),
        _average_precision(ranked.correct[rows], ranked.counts[rows], objects.sum()),
    )
    return {name: 100 * float(value) for name, value in zip(names, values, strict=True)}


def _average_precision(correct: np.ndarray, counts: np.ndarray, objects: int) -> float:
    """Area under the curve of detections in order of their scores."""
    true, false = np.cumsum(correct), np.cumsum(counts & ~correct)
    return area_under_curve(true / objects, true / np.maximum(true + false, 1))
