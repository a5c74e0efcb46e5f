"""Golden prototypical calibration: boxes, vectors, prototypes and scores of four scenarios.

A small network with random weights stands in for the ImageNet classifier; everything else is what an evaluation runs:
the mapper, the support set, `with_calibration` and its settings, with the official rounding of support boxes.

Source: DeFRCN (Qiao et al., ICCV 2021), official implementation.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn

from fsdet.data.mapper import FewShotMapper
from fsdet.data.splits import ClassSplit, coco_split, voc_split
from fsdet.data.support import SupportSet
from fsdet.engine.parity import Comparison, Ledger, failure, golden_file, read_npz
from fsdet.engine.setup import default_config
from fsdet.modeling.base import condition_on_support
from fsdet.modeling.calibration import CalibratedDetector, calibrated_names, with_calibration
from fsdet.modeling.imagenet import NETWORKS, ImageEncoder

SCENARIOS = ("fsod_voc", "gfsod_voc", "fsod_coco", "gfsod_coco")
PICTURES = 6
BOX_TOLERANCE = 1e-4  # pixels
_LAYERS = ("conv1", "conv2", "fc")
_INPUTS = (
    "support_rows", "box_is_xywh", "test_dataset", "resize_min_max", "det_boxes", "det_scores", "det_classes",
    "default_alpha_upper_lower", "alt_alpha_upper_lower",
)  # fmt: skip
_OUTPUTS = (
    "resized_hw", "boxes_per_record", "used_boxes", "used_features", "proto_classes", "prototypes", "excluded",
    "default_features", "default_scores_after", "alt_features", "alt_scores_after",
)  # fmt: skip


def check_pcb(folder: Path) -> Iterator[Comparison]:
    """d: prototypes from K-shot records, and the scores of a query picture's detections before and after."""
    values = read_npz(golden_file(folder, "d_pcb"))
    inputs = [f"net/{layer}.{kind}" for layer in _LAYERS for kind in ("weight", "bias")]
    inputs += ["query/image", *(f"support/img{number}" for number in range(PICTURES))]
    ledger = Ledger(
        values,
        inputs=[*inputs, *(f"{scenario}/{name}" for scenario in SCENARIOS for name in _INPUTS)],
        expected=["support/img0_feature_map", *(f"{s}/{name}" for s in SCENARIOS for name in _OUTPUTS)],
    )
    encoder = _stand_in(values)
    with tempfile.TemporaryDirectory() as pictures:
        for name in inputs:
            if values[name].dtype == np.uint8:
                cv2.imwrite(str(_file(pictures, name)), values[name])
        yield ledger.compare("support/img0_feature_map", encoder.feature_map(values["support/img0"]))
        for scenario in SCENARIOS:
            part = {name: values[f"{scenario}/{name}"] for name in (*_INPUTS, *_OUTPUTS)}
            yield from _check_scenario(ledger, scenario, part, encoder, Path(pictures))
    yield from ledger.rest()


def _file(folder: str | Path, name: str) -> Path:
    return Path(folder) / f"{name.replace('/', '_')}.png"  # lossless


def _stand_in(values: Mapping[str, np.ndarray]) -> ImageEncoder:
    """The golden network of stride 32, fed as torchvision's are."""
    first, second = nn.Conv2d(3, 12, 7, stride=4, padding=3), nn.Conv2d(12, 20, 3, stride=8, padding=1)
    classifier = nn.Linear(20, 16)
    for name, layer in zip(_LAYERS, (first, second, classifier), strict=True):
        layer.load_state_dict({kind: torch.tensor(values[f"net/{name}.{kind}"]) for kind in ("weight", "bias")})
    fed = NETWORKS["resnet101"]
    return ImageEncoder(
        nn.Sequential(first, nn.ReLU(), second, nn.ReLU()),
        classifier,
        stride=fed.stride,
        pixel_mean=fed.pixel_mean,
        pixel_std=fed.pixel_std,
        channel_order=fed.channel_order,
    )


class _Recorded(nn.Module):
    """A detector that finds the recorded detections."""

    def __init__(self, values: Mapping[str, np.ndarray], size: tuple[int, int]) -> None:
        super().__init__()
        self.values, self.size = values, size

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        found = Instances(
            self.size,
            pred_boxes=Boxes(torch.tensor(self.values["det_boxes"])),
            scores=torch.tensor(self.values["det_scores"]),
            pred_classes=torch.tensor(self.values["det_classes"]),
        )
        return [{"instances": found} for _ in batched_inputs]


def _settings(values: Mapping[str, np.ndarray], kind: str) -> CfgNode:
    """Configuration of a scenario; `kind` is "default" or "alt"."""
    cfg = default_config()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = values["resize_min_max"].tolist()
    node = cfg.TEST.CALIBRATION
    node.ENABLED, node.LEGACY_BOXES = True, True
    node.ALPHA, node.UPPER, node.LOWER = values[f"{kind}_alpha_upper_lower"].tolist()
    return cfg


def _classes(test_dataset: str) -> tuple[list[str], ClassSplit]:
    """Class names of the detector in order, and their split, of a test set under its official name."""
    subset, split = re.fullmatch(r"(?:voc|coco).*_test_(all|base|novel)(\d?)", test_dataset).groups()
    classes = voc_split(int(split)) if test_dataset.startswith("voc") else coco_split()
    return list(classes.of(subset)), classes


def _records(values: Mapping[str, np.ndarray], scenario: str, pictures: Path) -> list[dict[str, Any]]:
    """The K-shot records: one box each (VOC), or those of one picture together (COCO)."""
    mode = BoxMode.XYWH_ABS if values["box_is_xywh"] else BoxMode.XYXY_ABS
    records: dict[int, dict[str, Any]] = {}
    for row, (picture, class_id, crowd, *box) in enumerate(values["support_rows"].tolist()):
        number = row if scenario.endswith("voc") else int(picture)
        file_name = str(_file(pictures, f"support/img{int(picture)}"))
        record = records.setdefault(number, {"file_name": file_name, "image_id": number, "annotations": []})
        annotation = {"id": row, "category_id": int(class_id), "bbox": box, "bbox_mode": mode, "iscrowd": int(crowd)}
        record["annotations"].append(annotation)
    return list(records.values())


def _wrap(
    cfg: CfgNode, encoder: ImageEncoder, recorded: nn.Module, names: Sequence[str], calibrated: Sequence[str]
) -> nn.Module:
    return with_calibration(recorded, cfg, encoder=encoder, class_names=names, novel_names=calibrated)


def _check_scenario(
    ledger: Ledger, scenario: str, values: Mapping[str, np.ndarray], encoder: ImageEncoder, pictures: Path
) -> Iterator[Comparison]:
    names, split = _classes(str(values["test_dataset"]))
    records = _records(values, scenario, pictures)
    support_set = SupportSet.from_records(records, names, min_shots=0)
    with_shots = [name for name, shots in support_set if shots]
    cfg = _settings(values, "default")
    query = cv2.imread(str(_file(pictures, "query/image")))
    recorded = _Recorded(values, query.shape[:2]).eval()

    # The official code makes prototypes of all classes; a calibration of ours only of those that it needs.
    everything = _wrap(cfg, encoder, recorded, names, with_shots)
    yield from _compare_prototypes(ledger, scenario, everything, records, support_set)

    calibrated = calibrated_names(cfg, names, split.novel)
    excluded = np.array([i for i, name in enumerate(names) if name not in calibrated], np.int64)
    yield ledger.compare(f"{scenario}/excluded", excluded)
    record = {"file_name": str(_file(pictures, "query/image")), "image_id": 0}
    inputs = [FewShotMapper(cfg, False, keep_original=True)(record)]
    boxes, scores = torch.tensor(values["det_boxes"]), torch.tensor(values["det_scores"])
    for kind in ("default", "alt"):
        detector = _wrap(
            _settings(values, kind), encoder, recorded, names, [name for name in calibrated if name in with_shots]
        )
        if not isinstance(detector, CalibratedDetector):
            yield failure(f"{scenario}/{kind}_scores_after", "nothing is calibrated")
            continue
        condition_on_support(detector, lambda: support_set)
        (output,) = detector(inputs)
        touched = encoder(query, boxes[detector.in_range(scores)], cfg.INPUT.FORMAT)
        yield ledger.compare(f"{scenario}/{kind}_features", touched)
        yield ledger.compare(f"{scenario}/{kind}_scores_after", output["instances"].scores)


def _compare_prototypes(
    ledger: Ledger,
    scenario: str,
    detector: CalibratedDetector,
    records: Sequence[dict[str, Any]],
    support_set: SupportSet,
) -> Iterator[Comparison]:
    """What becomes of the supports, in the order of the records, and the prototypes of all classes that have any."""
    supports = sorted((s for _, shots in support_set for s in shots), key=lambda support: support.annotation_id)
    sizes = [detector.legacy_boxes.resized(cv2.imread(record["file_name"])) for record in records]
    counts = Counter(support.image_id for support in supports)
    boxes, features = detector.support_features(supports)
    memory = detector.encode_support(support_set)
    yield ledger.compare(f"{scenario}/resized_hw", np.array(sizes, np.int64))
    yield ledger.compare(f"{scenario}/boxes_per_record", np.array([counts[r["image_id"]] for r in records]))
    yield ledger.compare(f"{scenario}/used_boxes", boxes, BOX_TOLERANCE)
    yield ledger.compare(f"{scenario}/used_features", features)
    places = [support_set.classes.index(name) for name in memory.names]
    yield ledger.compare(f"{scenario}/proto_classes", np.array(places, np.int64))
    yield ledger.compare(f"{scenario}/prototypes", memory.stack("prototype"))
