"""Detections as an evaluation has written them, and which are correct: for the gallery and the bootstrap.

A detection is correct when its IoU with an object of its class is at least 0.5 and no detection of a higher score has
taken that object: COCO's rule. VOC's differs from it only where objects of one class overlap.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from .coco_style import xywh
from .ground_truth import Detections, GroundTruth

MIN_IOU = 0.5  # of a correct detection
CORRECT, FALSE, IGNORED = "correct", "false", "ignored"


@dataclass(frozen=True)
class Judged:
    """The detections of one class over a test set, by falling score.

    Attributes:
        class_id: in [0, K).
        rows: (D,) int64, places in the detections.
        verdicts: D of "correct", "false" and "ignored" (on an object that counts neither way).
        objects: (D,) int64, the object that a correct detection takes; -1 elsewhere.
        missed: (M,) int64, counted objects that no detection takes, by falling area.
    """

    class_id: int
    rows: np.ndarray
    verdicts: tuple[str, ...]
    objects: np.ndarray
    missed: np.ndarray


def read_detections(path: str | Path, truth: GroundTruth) -> Detections:
    """Read detections in COCO's result format, as an evaluation writes them.

    Raises: FileNotFoundError for a missing file; ValueError where it is none, or names an image or class that the
        ground truth lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of detections; an evaluation writes it")
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        columns = [(item["image_id"], item["category_id"], item["bbox"], item["score"]) for item in items]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no COCO result file ({error!r}); evaluate again") from error
    images = {image_id: index for index, image_id in enumerate(truth.image_ids)}
    classes = {dataset_id: index for index, dataset_id in enumerate(truth.dataset_ids)}
    for image_id, category_id, *_ in columns:
        if image_id not in images or category_id not in classes:
            fault = f"image {image_id!r}" if image_id not in images else f"category {category_id!r}"
            raise ValueError(f"{path}: {fault} is not in {truth.source}; these detections are of another test set")
    boxes = np.array([box for _, _, box, _ in columns], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    index = np.array([images[image_id] for image_id, *_ in columns], dtype=np.int64)
    order = np.argsort(index, kind="stable")
    return Detections(
        image_index=index[order],
        boxes=boxes[order],
        scores=np.array([score for *_, score in columns], dtype=np.float64)[order],
        class_ids=np.array([classes[category] for _, category, *_ in columns], dtype=np.int64)[order],
    )


def judge(truth: GroundTruth, detections: Detections, class_id: int, *, min_iou: float = MIN_IOU) -> Judged:
    """Match the detections of one class with its objects, image by image and by falling score."""
    rows = np.flatnonzero(detections.class_ids == class_id)
    rows = rows[np.argsort(-detections.scores[rows], kind="stable")]
    verdicts, taken = np.full(len(rows), FALSE, dtype=object), np.full(len(rows), -1, dtype=np.int64)
    images = detections.image_index[rows]
    own = np.flatnonzero(truth.class_ids == class_id)
    for image in np.intersect1d(images, truth.image_index[own]):
        places = np.flatnonzero(images == image)
        objects = own[truth.image_index[own] == image]
        free = ~truth.ignored[objects]
        for place, overlaps in zip(places, overlap(truth, detections, rows[places], objects), strict=True):
            good = overlaps >= min_iou
            if (good & free).any():
                best = np.argmax(np.where(good & free, overlaps, -1.0))
                verdicts[place], taken[place], free[best] = CORRECT, objects[best], False
            elif (good & truth.ignored[objects]).any():
                verdicts[place] = IGNORED
    missed = own[~truth.ignored[own] & ~np.isin(own, taken)]
    missed = missed[np.argsort(-truth.areas[missed], kind="stable")]
    return Judged(class_id, rows, tuple(verdicts.tolist()), taken, missed)


def overlap(truth: GroundTruth, detections: Detections, rows: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(D, M) IoU of some detections with some objects; with an ignored object the share of the detection inside it."""
    if not len(rows) or not len(objects):
        return np.zeros((len(rows), len(objects)))
    boxes = xywh(detections.boxes[rows].astype(np.float64))
    return coco_mask.iou(boxes, truth.boxes[objects], truth.ignored[objects].astype(np.uint8).tolist())
