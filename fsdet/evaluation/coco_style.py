"""COCO-style average precision, computed once per class and averaged over all, base and novel classes.

Classes are matched independently in COCO's protocol, so the three passes of the official few-shot evaluators (all, base
and novel classes over the same detections) differ only in which columns of one precision table are averaged; a test
compares with three separate passes. The table comes from hotcoco, which a test holds equal to pycocotools bit for bit,
or from pycocotools itself.

Source: TFA (Wang et al., ICML 2020) section 4.1; COCO detection evaluation, http://cocodataset.org/#detection-eval.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from .ground_truth import Detections, GroundTruth

logger = logging.getLogger(__name__)

# COCO's areas, in the order of the precision table's fourth axis, with the suffix of the metric's name.
AREAS = {"all": "", "small": "s", "medium": "m", "large": "l"}


def coco_precision(
    ground_truth: GroundTruth, detections: Detections, *, fast: bool = True, max_detections: int = 100
) -> np.ndarray:
    """Precision at COCO's ten IoUs and 101 recalls.

    Args:
        ground_truth: K classes, N images.
        detections: of the same images.
        fast: hotcoco instead of pycocotools.
        max_detections: highest-scoring detections used per image and class (COCO: 100).
    Returns: (10, 101, K, 4) float64 in [0, 1]; last axis as `AREAS`; -1 where a class has no object of that area.
    """
    # Own ids from 1: COCO's tools take a ground truth of id 0 for "no match", and hotcoco wants integer image ids.
    # They sort images by id, which decides the order of equal scores, so our numbers follow the sorted ids.
    by_id = sorted(range(len(ground_truth.image_ids)), key=lambda i: ground_truth.image_ids[i])
    number = np.empty(len(by_id), dtype=np.int64)
    number[by_id] = np.arange(1, len(by_id) + 1)
    common = {
        "info": {},
        "images": [
            {"id": int(number[i]), "height": int(h), "width": int(w)}
            for i, (h, w) in enumerate(ground_truth.image_sizes)
        ],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(ground_truth.class_names)],
    }
    truth = _annotations(
        number[ground_truth.image_index],
        ground_truth.class_ids,
        ground_truth.boxes,
        ground_truth.areas,
        iscrowd=ground_truth.ignored,
    )
    boxes = xywh(detections.boxes)
    found = _annotations(
        number[detections.image_index],
        detections.class_ids,
        boxes,
        boxes[:, 2] * boxes[:, 3],
        score=detections.scores,
    )
    coco, coco_eval = _engine(fast)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = coco_eval(
            _indexed(coco, {**common, "annotations": truth}), _indexed(coco, {**common, "annotations": found}), "bbox"
        )
        evaluation.params.imgIds = [image["id"] for image in common["images"]]
        evaluation.params.catIds = [category["id"] for category in common["categories"]]
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[..., 0]


def coco_metrics(precision: np.ndarray, classes: Sequence[int] | None = None) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl in percent, averaged over some classes.

    Args:
        precision: (10, 101, K, 4) from `coco_precision`.
        classes: class ids to average over; None for all.
    Returns: nan where none of the classes has an object (of that area).
    """
    part = precision if classes is None else precision[:, :, list(classes)]
    metrics = {"AP": _mean(part[..., 0]), "AP50": _mean(part[0, ..., 0]), "AP75": _mean(part[5, ..., 0])}
    metrics.update({f"AP{suffix}": _mean(part[..., i]) for i, suffix in enumerate(AREAS.values()) if suffix})
    return metrics


def xywh(boxes: np.ndarray) -> np.ndarray:
    """(D, 4) XYXY to x y width height, subtracting in the boxes' own precision as Detectron2's evaluator does."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(np.mean(valid) * 100) if valid.size else float("nan")


def _annotations(
    images: np.ndarray, class_ids: np.ndarray, boxes: np.ndarray, areas: np.ndarray, **extra: np.ndarray
) -> list[dict[str, Any]]:
    columns = [images.tolist(), (class_ids + 1).tolist(), boxes.tolist(), areas.tolist()]
    columns.extend(
        values.astype(np.int64 if values.dtype == bool else np.float64).tolist() for values in extra.values()
    )
    keys = ("image_id", "category_id", "bbox", "area", *extra)
    rows = zip(*columns, strict=True)
    return [{"id": i, "iscrowd": 0, **dict(zip(keys, row, strict=True))} for i, row in enumerate(rows, start=1)]


def _engine(fast: bool) -> tuple[type, type]:
    """(COCO, COCOeval) of hotcoco or pycocotools, which share their interface."""
    if fast:
        try:
            from hotcoco import COCO, COCOeval

            return COCO, COCOeval
        except ImportError:
            logger.info("hotcoco is not installed; evaluating with pycocotools, which gives the same numbers slowly")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _indexed(coco: type, dataset: dict[str, Any]) -> Any:
    instance = coco()
    instance.dataset = dataset
    instance.createIndex()
    return instance
