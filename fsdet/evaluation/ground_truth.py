"""Ground truth and detections of one test set as flat arrays, the common input of both evaluation styles.

The annotations come from the data set's own COCO file where the metadata names one (`json_file`), otherwise from its
Detectron2 records. Objects that evaluation must neither reward nor punish (COCO crowds, VOC "difficult") are `ignored`.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fsdet.data.files import listed_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroundTruth:
    """Annotated boxes of a test set; M boxes on N images of K classes, in the order of the source.

    Attributes:
        source: file or data set name, for messages.
        image_ids: N ids as the data set spells them (int or str), in its order.
        image_sizes: (N, 2) int64, height and width in pixels; zeros where unknown.
        class_names: K names; a box's class id is the position here.
        dataset_ids: K category ids of the data set, for result files.
        image_index: (M,) int64 in [0, N).
        boxes: (M, 4) float64, x y width height in absolute pixels, 0-based.
        class_ids: (M,) int64 in [0, K).
        areas: (M,) float64, square pixels, as annotated (a mask's area where the file has masks).
        ignored: (M,) bool.
    """

    source: str
    image_ids: tuple[int | str, ...]
    image_sizes: np.ndarray
    class_names: tuple[str, ...]
    dataset_ids: tuple[int, ...]
    image_index: np.ndarray
    boxes: np.ndarray
    class_ids: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray

    def counted_objects(self) -> np.ndarray:
        """(K,) int64: objects of each class that count, i.e. those not ignored."""
        return np.bincount(self.class_ids[~self.ignored], minlength=len(self.class_names))

    def restrict(self, image_ids: Sequence[int | str]) -> GroundTruth:
        """Keep these images only, in the data set's order.

        Raises: ValueError naming ids that the test set does not have.
        """
        wanted = set(image_ids)
        unknown = wanted - set(self.image_ids)
        if unknown:
            raise ValueError(f"{self.source} has no image {sorted(unknown, key=str)[:5]} ({len(unknown)} unknown ids)")
        keep = np.array([image_id in wanted for image_id in self.image_ids], dtype=bool)
        boxes = keep[self.image_index] if len(self.image_index) else np.zeros(0, bool)
        return GroundTruth(
            source=self.source,
            image_ids=tuple(i for i in self.image_ids if i in wanted),
            image_sizes=self.image_sizes[keep],
            class_names=self.class_names,
            dataset_ids=self.dataset_ids,
            image_index=(np.cumsum(keep) - 1)[self.image_index[boxes]],
            boxes=self.boxes[boxes],
            class_ids=self.class_ids[boxes],
            areas=self.areas[boxes],
            ignored=self.ignored[boxes],
        )


@dataclass(frozen=True)
class Detections:
    """D detections, grouped by image in the ground truth's image order, the model's order within an image.

    Attributes:
        image_index: (D,) int64, non-decreasing.
        boxes: (D, 4) float32 or float64, XYXY in absolute pixels of the original image.
        scores: (D,) float64 in [0, 1].
        class_ids: (D,) int64 in [0, K).
    """

    image_index: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


def load_ground_truth(dataset_name: str) -> GroundTruth:
    """Read the annotations of a registered test set; of the images that the metadata's `test_list` names, if it does.

    Raises:
        FileNotFoundError: the metadata names a COCO file that does not exist.
        ValueError: unknown data set, or annotations that cannot be evaluated (names the file or data set).
    """
    metadata = MetadataCatalog.get(dataset_name) if dataset_name in MetadataCatalog.list() else None
    names = metadata.get("thing_classes") if metadata is not None else None
    if not names:
        raise ValueError(
            f'Data set "{dataset_name}" has no thing_classes in its metadata; register it before evaluating'
        )
    json_file = metadata.get("json_file")
    if json_file:
        truth = _from_coco_file(
            Path(json_file), tuple(names), metadata.get("thing_dataset_id_to_contiguous_id"), dataset_name
        )
        if not (test_list := metadata.get("test_list")):
            return truth
        listed = set(listed_images(test_list))
        return truth.restrict([image_id for image_id in truth.image_ids if str(image_id) in listed])
    if dataset_name not in DatasetCatalog.list():
        raise ValueError(f'Data set "{dataset_name}" has neither a json_file nor registered records to evaluate with')
    return ground_truth_from_records(DatasetCatalog.get(dataset_name), names, source=dataset_name)


def ground_truth_from_records(
    records: Sequence[dict[str, Any]], class_names: Sequence[str], source: str = "records"
) -> GroundTruth:
    """Ground truth of Detectron2 records; `iscrowd` and `difficult` annotations are ignored ones.

    Args:
        records: dicts with image_id, height, width and annotations (bbox, bbox_mode, category_id in [0, K)).
        class_names: K names.
        source: name for messages.
    Raises: ValueError on repeated image ids or class ids out of range.
    """
    rows, sizes = [], []
    for index, record in enumerate(records):
        sizes.append((record.get("height", 0), record.get("width", 0)))
        for item in record.get("annotations", ()):
            box = BoxMode.convert(list(item["bbox"]), BoxMode(item["bbox_mode"]), BoxMode.XYWH_ABS)
            if not 0 <= item["category_id"] < len(class_names):
                raise ValueError(
                    f"{source}: image {record['image_id']} has an object of class id {item['category_id']}, "
                    f"but there are {len(class_names)} classes"
                )
            ignored = bool(item.get("iscrowd", 0) or item.get("difficult", 0))
            rows.append((index, item["category_id"], ignored, item.get("area", box[2] * box[3]), *box))
    return _assemble(source, [record["image_id"] for record in records], sizes, class_names, None, rows)


def _from_coco_file(
    path: Path, class_names: tuple[str, ...], id_map: dict[int, int] | None, dataset_name: str
) -> GroundTruth:
    if not path.is_file():
        raise FileNotFoundError(f'{path}: annotation file of the test set "{dataset_name}" not found')
    data = json.loads(path.read_text())
    missing = {"images", "annotations", "categories"} - set(data)
    if missing:
        raise ValueError(f"{path}: no {sorted(missing)}; evaluation needs a COCO detection file with annotations")
    to_class = id_map or _ids_by_name(path, data["categories"], class_names)
    dataset_ids = {class_id: dataset_id for dataset_id, class_id in to_class.items()}
    if sorted(dataset_ids) != list(range(len(class_names))):
        raise ValueError(
            f"{path}: the id map of {dataset_name} covers {sorted(dataset_ids)}, expected {len(class_names)} classes"
        )
    position = {image["id"]: index for index, image in enumerate(data["images"])}
    rows = []
    for item in data["annotations"]:
        class_id = to_class.get(item["category_id"])
        if class_id is None:  # a class that this test set leaves out
            continue
        if item["image_id"] not in position:
            raise ValueError(f"{path}: annotation {item.get('id')} is of image {item['image_id']}, which is not listed")
        box = item["bbox"]
        # COCO's own tool reads iscrowd alone and overwrites a field named "ignore"; so do we.
        ignored = bool(item.get("iscrowd", 0))
        rows.append((position[item["image_id"]], class_id, ignored, item.get("area", box[2] * box[3]), *box))
    sizes = [(image.get("height", 0), image.get("width", 0)) for image in data["images"]]
    ids = [image["id"] for image in data["images"]]
    return _assemble(str(path), ids, sizes, class_names, [dataset_ids[i] for i in range(len(class_names))], rows)


def _ids_by_name(path: Path, categories: Sequence[dict[str, Any]], class_names: Sequence[str]) -> dict[int, int]:
    by_name = {category["name"]: category["id"] for category in categories}
    unknown = [name for name in class_names if name not in by_name]
    if unknown:
        raise ValueError(f"{path}: classes {unknown} are not among its categories {sorted(by_name)}")
    return {by_name[name]: class_id for class_id, name in enumerate(class_names)}


def _assemble(
    source: str,
    image_ids: list[int | str],
    sizes: list[tuple[int, int]],
    class_names: Sequence[str],
    dataset_ids: Sequence[int] | None,
    rows: list[tuple],
) -> GroundTruth:
    repeated = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{source}: image ids {repeated[:5]} occur more than once; evaluate on a test set, not on K-shot records"
        )
    if len({isinstance(image_id, str) for image_id in image_ids}) > 1:
        raise ValueError(f"{source}: image ids must be all numbers or all text, they are mixed")
    table = np.array(rows, dtype=np.float64).reshape(-1, 8)
    if not np.isfinite(table).all():
        bad = image_ids[int(table[~np.isfinite(table).all(axis=1)][0, 0])]
        raise ValueError(f"{source}: image {bad} has a box that is not finite")
    return GroundTruth(
        source=source,
        image_ids=tuple(image_ids),
        image_sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        class_names=tuple(class_names),
        dataset_ids=tuple(dataset_ids if dataset_ids is not None else range(1, len(class_names) + 1)),
        image_index=table[:, 0].astype(np.int64),
        class_ids=table[:, 1].astype(np.int64),
        ignored=table[:, 2].astype(bool),
        areas=table[:, 3],
        boxes=table[:, 4:],
    )
