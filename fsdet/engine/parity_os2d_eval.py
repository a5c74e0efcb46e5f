"""Golden sizes and metrics of OS2D: supports, feature maps and levels of a pyramid; average precision and recall.

Source: OS2D (Osokin et al., ECCV 2020), official release.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode

from fsdet.data.crops import area_size
from fsdet.engine.parity import Comparison, golden_file, read_npz
from fsdet.engine.parity_os2d_detector import GoldenLedger
from fsdet.evaluation.ground_truth import Detections, ground_truth_from_records
from fsdet.evaluation.oneshot_style import METRICS, RankedDetections, oneshot_metrics, rank_detections
from fsdet.methods.os2d.decoding import to_frame
from fsdet.methods.os2d.pyramid import Pyramid
from fsdet.modeling.torchvision_resnet import FEATURE, TorchvisionC4Backbone

AREAS = {"class_image_hw_target240": 240, "hw_target1500": 1500}  # root of the area, pixels
CELLS, LEVELS = "feature_map_hw_of_target240", "pyramid_level_hw"
SIZE_INPUTS = ("input_hw", "pyramid_input_hw", "pyramid_base_scale", "pyramid_scales")
METRIC = 1e-6
THRESHOLDS = {"iou0.5": 0.5, "iou0.7": 0.7}
PREDICTIONS, OBJECTS = ("boxes", "labels", "scores", "size_wh"), ("boxes", "labels", "difficult", "size_wh")
TOTALS = dict(zip(("map", "map_weighted", "recall", "ap_joint_classes"), METRICS, strict=True))
BY_CLASS = ("ap_per_class", "recall_per_class", "n_pos")


def check_sizes(folder: Path) -> Iterator[Comparison]:
    """resize: supports, their feature maps, and the levels of pyramids."""
    values = read_npz(golden_file(folder, "resize"))
    ledger = GoldenLedger(values, inputs=SIZE_INPUTS, expected=(*AREAS, CELLS, LEVELS))
    for name, target in AREAS.items():
        yield ledger.exact(name, [area_size(*size, target) for size in values["input_hw"].tolist()])
    supports = [area_size(*size) for size in values["input_hw"].tolist()]
    yield ledger.exact(CELLS, _map_sizes(supports))
    bases = values["pyramid_base_scale"].tolist()
    pyramids = [Pyramid(values["pyramid_scales"].tolist(), eval_scale=base, image_size=1) for base in bases]
    sizes = zip(pyramids, values["pyramid_input_hw"].tolist(), strict=True)
    yield ledger.exact(LEVELS, [pyramid.sizes(*size) for pyramid, size in sizes])
    yield from ledger.rest()


@torch.no_grad()
def _map_sizes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(H, W) of the backbone's map of pictures (h, w)."""
    with torch.random.fork_rng():
        backbone = TorchvisionC4Backbone(50, width=1).eval()  # sizes do not depend on the width
    return [tuple(backbone(torch.zeros(1, 3, *size))[FEATURE].shape[2:]) for size in sizes]


@dataclass(frozen=True)
class EvaluatedImage:
    """Detections and objects of one picture, in its frame.

    Attributes:
        boxes, labels, scores: of the M detections; (M, 4) XYXY, class ids, (M,).
        gt_boxes, gt_labels, gt_difficult: of the G objects.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    gt_boxes: np.ndarray
    gt_labels: np.ndarray
    gt_difficult: np.ndarray


def rank_images(images: Sequence[EvaluatedImage], num_classes: int, threshold: float) -> RankedDetections:
    """Match detections and objects as an evaluation does; class ids are those below `num_classes`."""
    records = [{"image_id": place, "annotations": _annotations(image)} for place, image in enumerate(images)]
    truth = ground_truth_from_records(records, [str(class_id) for class_id in range(num_classes)])
    counts = [len(image.scores) for image in images]
    boxes, scores, labels = (
        np.concatenate([getattr(image, name) for image in images]) for name in ("boxes", "scores", "labels")
    )
    detections = Detections(np.repeat(np.arange(len(images)), counts), boxes, scores.astype(np.float64), labels)
    return rank_detections(truth, detections, threshold=threshold)


def _annotations(image: EvaluatedImage) -> list[dict[str, Any]]:
    rows = zip(image.gt_boxes.tolist(), image.gt_labels.tolist(), image.gt_difficult.tolist(), strict=True)
    return [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "difficult": int(is_difficult)}
        for box, label, is_difficult in rows
    ]


def check_metrics(folder: Path) -> Iterator[Comparison]:
    """evaluation: metrics at two overlaps, from predictions in frames of their own."""
    values = read_npz(golden_file(folder, "evaluation"))
    count = len({name.split("/")[0] for name in values if name.startswith("image")})
    names = [f"pred_{name}" for name in PREDICTIONS] + [f"gt_{name}" for name in OBJECTS]
    ledger = GoldenLedger(
        values,
        inputs=[f"image{number}/{name}" for number in range(count) for name in names],
        expected=[f"{prefix}/{name}" for prefix in THRESHOLDS for name in (*BY_CLASS, *TOTALS)],
    )
    images = [_image(values, f"image{number}/") for number in range(count)]
    for prefix, threshold in THRESHOLDS.items():
        for name, value in _metrics(images, threshold, len(values[f"{prefix}/{BY_CLASS[0]}"])).items():
            yield ledger.compare(f"{prefix}/{name}", value, METRIC)
    yield from ledger.rest()


def _image(values: Mapping[str, np.ndarray], prefix: str) -> EvaluatedImage:
    frames = [tuple(values[f"{prefix}{kind}_size_wh"].tolist()[::-1]) for kind in ("pred", "gt")]
    return EvaluatedImage(
        to_frame(torch.from_numpy(values[f"{prefix}pred_boxes"]), *frames).numpy(),
        *(values[prefix + name] for name in ("pred_labels", "pred_scores", "gt_boxes", "gt_labels", "gt_difficult")),
    )


def _metrics(images: Sequence[EvaluatedImage], threshold: float, num_classes: int) -> dict[str, Any]:
    """Metrics from 0 to 1 by the names of the file; those by class for the first `num_classes` ids."""
    known = 1 + max(int(labels.max(initial=0)) for image in images for labels in (image.labels, image.gt_labels))
    ranked = rank_images(images, max(known, num_classes), threshold)
    totals = oneshot_metrics(ranked)
    recall = METRICS.index("recall")
    recalls = [list(oneshot_metrics(ranked, [class_id]).values())[recall] / 100 for class_id in range(num_classes)]
    return {
        "ap_per_class": ranked.average_precision[:num_classes],
        "recall_per_class": np.array(recalls),
        "n_pos": ranked.objects[:num_classes],
        **{name: totals[f"{ours}{100 * threshold:g}"] / 100 for name, ours in TOTALS.items()},
    }
