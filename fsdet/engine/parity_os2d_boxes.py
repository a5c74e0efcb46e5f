"""Golden boxes of OS2D: anchors, targets and their remapping, decoding of a pyramid, suppression, crops of mining.

Source: OS2D (Osokin et al., ECCV 2020), official release.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from fsdet.engine.parity import Comparison, golden_file, read_npz
from fsdet.engine.parity_os2d_detector import GoldenLedger, ranked_order
from fsdet.engine.setup import default_config
from fsdet.methods.os2d.decoding import SUPPRESSIONS, Found, to_frame
from fsdet.methods.os2d.geometry import STRIDE, anchor_boxes, decode_boxes
from fsdet.methods.os2d.head import OS2DHead
from fsdet.methods.os2d.inference import Level, Search
from fsdet.methods.os2d.mining import crop_for_anchors
from fsdet.methods.os2d.settings import NO_THRESHOLD
from fsdet.methods.os2d.targets import SceneTargets, assign, remap
from fsdet.methods.os2d.training import Labelling

CODES, PIXELS, RELATIVE, OVERLAPS = 1e-5, 1e-2, 1e-5, 1e-5
LEVELS = (0, 1)
CROPS = ("large", "small")
# Settings of decoding: what they change of the search.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "score_above_0.25": {"score_threshold": 0.25},
    "nms_across_classes": {"is_across": True},
}
RECORDED = ("loc_scores", "cls_scores", "corners")
OBJECTS = ("gt_boxes", "gt_labels", "gt_difficult")
INPUTS = (
    *(f"level{level}_size_wh" for level in LEVELS), "original_size_wh", *OBJECTS, "gt_boxes_original", "num_labels",
    "remap/loc_scores", *(f"remap/image1_{name}" for name in OBJECTS), "decode/class_ids",
    *(f"decode/level{level}_{name}" for level in LEVELS for name in RECORDED),
    "decode_raw/loc_scores", "decode_raw/default_boxes", "nms_chunked/boxes", "nms_chunked/scores",
    *(f"mining_crops/{name}_image_wh" for name in CROPS),
)  # fmt: skip
FIELDS = ("boxes", "scores", "labels", "default_boxes", "corners")
OUTPUTS = (
    "default_boxes_level0", "encode/loc_targets", "encode/cls_targets", "encode_pyramid/level1_loc_targets",
    "encode_pyramid/level1_cls_targets", "remap/cls_targets_remapped", "remap/iou_anchor", "remap/iou_predicted",
    *(f"decode/{setting}/{field}" for setting in SETTINGS for field in FIELDS),
    "nms_chunked/keep_sorted_by_score", "nms_chunked/keep_exact_nms", "decode_raw/boxes",
    *(f"mining_crops/{name}_{kind}_boxes" for name in CROPS for kind in ("crop", "anchor")),
)  # fmt: skip


def check_boxes(folder: Path) -> Iterator[Comparison]:
    """box_coder: everything about boxes, with the overlaps that the suite has by default."""
    values = read_npz(golden_file(folder, "box_coder"))
    ledger = GoldenLedger(values, inputs=INPUTS, expected=OUTPUTS)
    yield from _compare_targets(ledger, values)
    yield from _compare_remapping(ledger, values)
    for setting, changes in SETTINGS.items():
        yield from _compare_decoding(ledger, values, setting, changes)
    yield from _compare_suppression(ledger, values)
    raw = decode_boxes(_tensor(values, "decode_raw/loc_scores").T, _tensor(values, "decode_raw/default_boxes"))
    yield ledger.compare("decode_raw/boxes", raw, RELATIVE)
    yield from _compare_crops(ledger, values)
    yield from ledger.rest()


def _tensor(values: Mapping[str, np.ndarray], name: str) -> Tensor:
    return torch.from_numpy(values[name].copy())


def _size(values: Mapping[str, np.ndarray], name: str) -> tuple[int, int]:
    """(height, width) of an array (width, height)."""
    width, height = values[name].tolist()
    return height, width


def _cells(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of the feature map of a picture."""
    return math.ceil(size[0] / STRIDE), math.ceil(size[1] / STRIDE)


def _objects(values: Mapping[str, np.ndarray], prefix: str = "", boxes: str = OBJECTS[0]) -> SceneTargets:
    return SceneTargets(*(_tensor(values, prefix + name) for name in (boxes, *OBJECTS[1:])))


def _compare_targets(ledger: GoldenLedger, values: Mapping[str, np.ndarray]) -> Iterator[Comparison]:
    """Labels and codes of the anchors of a level, in its frame and in that of the annotation."""
    anchors, count, limits = (
        anchor_boxes(*_cells(_size(values, "level0_size_wh"))),
        int(values["num_labels"]),
        _limits(),
    )
    yield ledger.exact("default_boxes_level0", anchors)
    labels, codes = assign(anchors, _objects(values), count, **limits["anchor"])
    yield ledger.exact("encode/cls_targets", labels)
    yield ledger.within("encode/loc_targets", codes.mT, CODES)
    level, original = _size(values, "level1_size_wh"), _size(values, "original_size_wh")
    moved = to_frame(anchor_boxes(*_cells(level)), level, original)
    labels, codes = assign(moved, _objects(values, boxes="gt_boxes_original"), count, **limits["anchor"])
    yield ledger.exact("encode_pyramid/level1_cls_targets", labels)
    yield ledger.within("encode_pyramid/level1_loc_targets", codes.mT, CODES)


def _limits() -> dict[str, dict[str, float]]:
    """Overlaps of positives and negatives, of anchors and of predictions."""
    default = Labelling()
    return {
        "anchor": {"positive": default.positive, "negative": default.negative},
        "prediction": {"positive": default.remap_positive, "negative": default.remap_negative},
    }


def _compare_remapping(ledger: GoldenLedger, values: Mapping[str, np.ndarray]) -> Iterator[Comparison]:
    """Labels by the predicted boxes of two pictures, and the best overlaps behind both kinds of labels."""
    anchors = anchor_boxes(*_cells(_size(values, "level0_size_wh")))
    codes = _tensor(values, "remap/loc_scores").mT
    scenes = (_objects(values), _objects(values, "remap/image1_"))
    pairs = list(zip(codes, scenes, strict=True))
    labels = [remap(found, anchors, scene, **_limits()["prediction"]) for found, scene in pairs]
    yield ledger.exact("remap/cls_targets_remapped", torch.stack(labels))
    overlaps = [_best_overlaps(anchors.expand_as(found), scene) for found, scene in pairs]
    yield ledger.within("remap/iou_anchor", torch.stack(overlaps), OVERLAPS)
    overlaps = [_best_overlaps(decode_boxes(found, anchors), scene) for found, scene in pairs]
    yield ledger.within("remap/iou_predicted", torch.stack(overlaps), OVERLAPS)


def _best_overlaps(boxes: Tensor, scene: SceneTargets) -> Tensor:
    """(C, N): largest overlap of the boxes (C, N, 4) of a class with its objects; 0 for a class without any."""
    best = boxes.new_zeros(boxes.shape[:2])
    for class_index in scene.class_index[scene.class_index >= 0].unique().tolist():
        own = Boxes(scene.boxes[scene.class_index == class_index])
        best[class_index] = pairwise_iou(own, Boxes(boxes[class_index])).amax(dim=0)
    return best


@dataclass(frozen=True)
class _RecordedScene:
    """What the head of the release said of one level: scores (E, N), codes (E, N, 4), corners (E, N, 4, 2)."""

    anchors: Tensor
    scores: Tensor
    codes: Tensor
    corners: Tensor


class _RecordedHead(OS2DHead):
    """A head that repeats recorded results; its templates are rows of them."""

    def __init__(self) -> None:
        super().__init__(4, False)

    def detect(
        self, scene: _RecordedScene, templates: Tensor, *, corners: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `OS2DHead.detect`."""
        rows = templates.flatten().long()
        boxes = decode_boxes(scene.codes[rows], scene.anchors)
        return scene.scores[rows], boxes, scene.corners[rows] if corners else None


def _compare_decoding(
    ledger: GoldenLedger, values: Mapping[str, np.ndarray], setting: str, changes: Mapping[str, Any]
) -> Iterator[Comparison]:
    """Detections of a pyramid, class by class and the best one of each first; across classes by score alone."""
    search = Search(**{**_search(), **changes})
    ids = values["decode/class_ids"]
    known = np.unique(ids)
    rows = [torch.from_numpy(np.flatnonzero(ids == class_id)).view(1, -1, 1, 1) for class_id in known]
    levels = [_recorded_level(values, level) for level in LEVELS]
    found = search.find(_RecordedHead(), levels, _size(values, "original_size_wh"), rows)
    if not search.is_across:
        found = found[found.classes.argsort(stable=True)]
    yield from compare_found(ledger, f"decode/{setting}/", found, known, scores=0.0, pixels=PIXELS)


def _search() -> dict[str, Any]:
    """The release's search with the suite's default threshold of suppression."""
    threshold = default_config().OS2D.NMS_THRESH_TEST
    fixed = {"fusion": "max", "score_threshold": NO_THRESHOLD, "nms": "reference", "has_geometry": True}
    return {**fixed, "nms_threshold": threshold}


def _recorded_level(values: Mapping[str, np.ndarray], number: int) -> Level:
    size = _size(values, f"level{number}_size_wh")
    codes, scores, corners = (_tensor(values, f"decode/level{number}_{name}") for name in RECORDED)
    corners = corners.mT.unflatten(2, (4, 2))
    return Level(_RecordedScene(anchor_boxes(*_cells(size)), scores, codes.mT, corners), _cells(size), size)


def compare_found(
    ledger: GoldenLedger, prefix: str, found: Found, class_ids: np.ndarray, *, scores: float, pixels: float
) -> Iterator[Comparison]:
    """Compare detections and what the file has beside them; rows whose scores nearly tie may change places.

    Args:
        prefix: of the names of the file.
        found: in the order of the file, with the places of classes in `class_ids`.
        class_ids: of the file.
        scores, pixels: accepted differences.
    """
    rows = {"boxes": found.boxes, "scores": found.scores, "labels": torch.from_numpy(class_ids)[found.classes]}
    if found.anchors is not None:
        rows |= {"default_boxes": found.anchors, "corners": found.corners.flatten(1)}
    order = ranked_order(*(ledger.values.get(prefix + name) for name in ("boxes", "scores")), found.boxes.numpy())
    for name, value in rows.items():
        value = value[order]
        if name == "labels":
            yield ledger.exact(prefix + name, value)
        else:
            yield ledger.within(prefix + name, value, scores if name == "scores" else pixels)


def _compare_suppression(ledger: GoldenLedger, values: Mapping[str, np.ndarray]) -> Iterator[Comparison]:
    """More boxes than the release compares at once."""
    boxes, scores = _tensor(values, "nms_chunked/boxes").float(), _tensor(values, "nms_chunked/scores")
    for name, kind in (("keep_sorted_by_score", "reference"), ("keep_exact_nms", "exact")):
        kept = SUPPRESSIONS[kind](boxes, scores, _search()["nms_threshold"], -1)
        yield ledger.exact(f"nms_chunked/{name}", kept)


def _compare_crops(ledger: GoldenLedger, values: Mapping[str, np.ndarray]) -> Iterator[Comparison]:
    """The crop that every anchor of a scene proposes."""
    for name in CROPS:
        size = _size(values, f"mining_crops/{name}_image_wh")
        anchors = anchor_boxes(*_cells(size))
        yield ledger.exact(f"mining_crops/{name}_anchor_boxes", anchors)
        yield ledger.exact(f"mining_crops/{name}_crop_boxes", crop_for_anchors(anchors, size))
