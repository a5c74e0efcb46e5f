"""Detectron2 evaluators that report all, base and novel classes of one set of detections, and every class by itself.

Metrics are in percent, in one flat dict under "bbox": AP, AP50, AP75 (COCO style also APs, APm, APl) over the classes
of the test set, the same with prefix b over its base and n over its novel classes, and "AP-name", "AP50-name",
"AP75-name" for each class. One-shot sets also have OS2D's metrics (`oneshot_style.py`): mAP50, mAPw50, recall50 and
jointAP50, with the same prefixes. A class with objects but no detection counts 0; one without objects is nan and left
out of every mean.

Source: TFA (Wang et al., ICML 2020) section 4.1 and its evaluation of "all" test sets; DeFRCN uses the same.
"""

from __future__ import annotations

import itertools
import json
import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from tabulate import tabulate

from fsdet.data.files import save_text_atomic

from .coco_style import coco_metrics, coco_precision, xywh
from .ground_truth import Detections, GroundTruth, load_ground_truth
from .oneshot_style import METRICS, oneshot_metrics, rank_detections
from .voc_style import voc_average_precision, voc_metrics

logger = logging.getLogger(__name__)

STYLES = ("coco", "voc")
DETECTIONS_FILE = "detections.json"


def build_evaluator(
    dataset_name: str,
    *,
    style: str = "coco",
    output_dir: str | Path | None = None,
    voc_11_point: bool = True,
    fast: bool = True,
    max_detections: int = 100,
    legacy: bool = False,
    oneshot_metric: bool = False,
) -> FewShotEvaluator:
    """Evaluator of a registered test set; works in one process or gathers from several.

    Args:
        dataset_name: registered name; its metadata needs thing_classes, and base_classes / novel_classes for the b and
            n metrics. Ground truth is the metadata's json_file, otherwise the registered records.
        style: "coco" or "voc".
        output_dir: where the detections are written in COCO's result format (`detections.json`); None writes nothing.
        voc_11_point: VOC style: 11-point metric of VOC2007; False for the area under the curve.
        fast: COCO style: hotcoco; False for pycocotools. The numbers are the same.
        max_detections: COCO style: detections used per image and class; -1 for all.
        legacy: VOC style: the rounding and ordering of the official few-shot code, for parity checks.
        oneshot_metric: also OS2D's metrics; data sets of the one-shot layout have them in any case.

    Raises:
        ValueError: unknown style or data set, or annotations that cannot be evaluated.
        FileNotFoundError: missing annotation file.
    """
    if style not in STYLES:
        raise ValueError(f'Unknown evaluation style "{style}"; expected one of {STYLES}')
    if style == "voc":
        evaluator = VocStyleEvaluator(dataset_name, output_dir, eleven_point=voc_11_point, legacy=legacy)
    elif legacy:
        raise ValueError("The legacy switch belongs to VOC style; COCO style has no rounding to reproduce")
    else:
        evaluator = CocoStyleEvaluator(dataset_name, output_dir, fast=fast, max_detections=max_detections)
    evaluator.oneshot_metric = evaluator.oneshot_metric or oneshot_metric
    return evaluator


class FewShotEvaluator(DatasetEvaluator, ABC):
    """Collects detections, gathers them on the main process and averages a style's per-class results."""

    def __init__(self, dataset_name: str, output_dir: str | Path | None) -> None:
        self.dataset_name = dataset_name
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.ground_truth = load_ground_truth(dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        self.base_classes = tuple(metadata.get("base_classes", ()))
        self.novel_classes = tuple(metadata.get("novel_classes", ()))
        self.oneshot_metric = getattr(metadata.get("spec"), "benchmark", "") == "oneshot"
        self._known_images = frozenset(self.ground_truth.image_ids)
        self._collected: list[tuple[Any, np.ndarray, np.ndarray, np.ndarray]] = []
        self.detections: Detections | None = None

    def reset(self) -> None:
        """Forget all detections."""
        self._collected = []
        self.detections = None

    def process(self, inputs: Iterable[dict[str, Any]], outputs: Iterable[dict[str, Instances]]) -> None:
        """Keep the detections of some images.

        Args:
            inputs: records with image_id.
            outputs: dicts whose "instances" have pred_boxes (XYXY, pixels of the original image), scores, pred_classes.
        Raises: ValueError on an image that the test set does not have or a class id beyond its classes.
        """
        for record, output in zip(inputs, outputs, strict=True):
            image_id, instances = record["image_id"], output["instances"]
            if image_id not in self._known_images:
                raise ValueError(
                    f"Image {image_id!r} is not in {self.ground_truth.source}; the loader reads another data set"
                )
            boxes = _to_numpy(instances.pred_boxes.tensor)
            scores = _to_numpy(instances.scores).astype(np.float64)
            class_ids = instances.pred_classes.cpu().numpy().astype(np.int64)
            self._check_class_ids(image_id, class_ids)
            finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
            if not finite.all():
                logger.warning(
                    "Image %s: %d detections with NaN or infinity are dropped", image_id, int((~finite).sum())
                )
            self._collected.append((image_id, boxes[finite], scores[finite], class_ids[finite]))

    def evaluate(self, img_ids: Sequence[int | str] | None = None) -> OrderedDict[str, dict[str, float]]:
        """Metrics of the collected detections, see the module's description; must be called on every process.

        Args:
            img_ids: evaluate on these images only.
        Returns: {"bbox": {...}} on the main process, an empty dict on the others.
        """
        comm.synchronize()
        gathered = comm.gather(self._collected, dst=0)
        if not comm.is_main_process():
            return OrderedDict()
        truth = self.ground_truth if img_ids is None else self.ground_truth.restrict(img_ids)
        self.detections = _arrange(itertools.chain.from_iterable(gathered), truth)
        if len(self.detections) == 0:
            logger.warning("%s: the model detected nothing; every class with objects counts 0", self.dataset_name)
        if self.output_dir is not None:
            _write_detections(self.output_dir / DETECTIONS_FILE, self.detections, truth)
        metrics = self._metrics(truth, self.detections)
        self._log(metrics, truth)
        return OrderedDict(bbox=metrics)

    def highest_scores(self) -> dict[str, float]:
        """Highest score of each detected class after `evaluate`; the diagnosis of a novel AP of 0 reads it."""
        if self.detections is None:
            raise RuntimeError("highest_scores() needs an evaluation first, on the main process")
        found = self.detections
        return {
            self.ground_truth.class_names[class_id]: float(found.scores[found.class_ids == class_id].max())
            for class_id in np.unique(found.class_ids).tolist()
        }

    @abstractmethod
    def _per_class(self, truth: GroundTruth, detections: Detections) -> np.ndarray:
        """The style's table of per-class results, averaged by `_average`."""

    @abstractmethod
    def _average(self, table: np.ndarray, classes: Sequence[int] | None) -> dict[str, float]:
        """Metrics in percent over some classes (None: all) of that table."""

    def _metrics(self, truth: GroundTruth, detections: Detections) -> dict[str, float]:
        table = self._per_class(truth, detections)
        metrics = self._by_group(partial(self._average, table), truth)
        if self.oneshot_metric:
            metrics |= self._by_group(partial(oneshot_metrics, rank_detections(truth, detections)), truth)
        for class_id, name in enumerate(truth.class_names):
            single = self._average(table, [class_id])
            metrics.update({f"{key}-{name}": single[key] for key in ("AP", "AP50", "AP75")})
        return metrics

    def _by_group(
        self, average: Callable[[Sequence[int] | None], dict[str, float]], truth: GroundTruth
    ) -> dict[str, float]:
        """Metrics over all classes, and with a prefix over the base and the novel ones, where there are any."""
        metrics = dict(average(None))
        for prefix, names in (("b", self.base_classes), ("n", self.novel_classes)):
            classes = [i for i, name in enumerate(truth.class_names) if name in names]
            if classes:
                metrics.update({prefix + key: value for key, value in average(classes).items()})
        return metrics

    def _check_class_ids(self, image_id: int | str, class_ids: np.ndarray) -> None:
        count = len(self.ground_truth.class_names)
        if len(class_ids) and not 0 <= class_ids.min() <= class_ids.max() < count:
            raise ValueError(
                f"Image {image_id!r}: detection of class id {class_ids.max()}, but {self.dataset_name} has {count} "
                "classes; head and test set disagree (check MODEL.ROI_HEADS.NUM_CLASSES and the subset tested)"
            )

    def _log(self, metrics: dict[str, float], truth: GroundTruth) -> None:
        objects = truth.counted_objects()
        groups = [("all", ""), ("base", "b"), ("novel", "n")]
        keys = [key for key in metrics if "-" not in key and key.startswith(("A", *METRICS))]
        rows = [
            [label, *(metrics.get(p + key, float("nan")) for key in keys)] for label, p in groups if p + "AP" in metrics
        ]
        logger.info(
            "%s, %d images, %d objects:\n%s",
            self.dataset_name,
            len(truth.image_ids),
            int(objects.sum()),
            tabulate(rows, ["classes", *keys], "pipe", floatfmt=".2f"),
        )
        per_class = [
            [name, int(count), *(metrics[f"{key}-{name}"] for key in ("AP", "AP50", "AP75"))]
            for name, count in zip(truth.class_names, objects, strict=True)
        ]
        columns = ["class", "objects", "AP", "AP50", "AP75"]
        table = tabulate(per_class, columns, "pipe", floatfmt=".2f", disable_numparse=[0])  # a class may be named 007
        logger.info("Per class:\n%s", table)
        empty = [name for name, count in zip(truth.class_names, objects, strict=True) if count == 0]
        if empty:
            logger.warning("Classes without an object in the test set count in no mean: %s", ", ".join(empty))


class CocoStyleEvaluator(FewShotEvaluator):
    """COCO's metric: mean over IoU 0.50:0.95 of the 101-point interpolated precision; VOC's difficult are crowds."""

    def __init__(
        self, dataset_name: str, output_dir: str | Path | None = None, *, fast: bool = True, max_detections: int = 100
    ) -> None:
        if max_detections < 1 and max_detections != -1:
            raise ValueError(f"max_detections must be at least 1, or -1 for all, got {max_detections}")
        super().__init__(dataset_name, output_dir)
        self.fast = fast
        self.max_detections = max_detections

    def _per_class(self, truth: GroundTruth, detections: Detections) -> np.ndarray:
        most = self.max_detections if self.max_detections > 0 else max(1, len(detections))
        return coco_precision(truth, detections, fast=self.fast, max_detections=most)

    def _average(self, table: np.ndarray, classes: Sequence[int] | None) -> dict[str, float]:
        return coco_metrics(table, classes)


class VocStyleEvaluator(FewShotEvaluator):
    """PASCAL VOC's metric at IoU 0.50:0.95; COCO's crowds are treated like difficult objects."""

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path | None = None,
        *,
        eleven_point: bool = True,
        legacy: bool = False,
    ) -> None:
        super().__init__(dataset_name, output_dir)
        self.eleven_point = eleven_point
        self.legacy = legacy

    def _per_class(self, truth: GroundTruth, detections: Detections) -> np.ndarray:
        return voc_average_precision(truth, detections, eleven_point=self.eleven_point, legacy=self.legacy)

    def _average(self, table: np.ndarray, classes: Sequence[int] | None) -> dict[str, float]:
        return voc_metrics(table, classes)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()


def _arrange(collected: Iterable[tuple[Any, np.ndarray, np.ndarray, np.ndarray]], truth: GroundTruth) -> Detections:
    """Order detections by image, so that the result does not depend on how images were spread over processes."""
    position = {image_id: index for index, image_id in enumerate(truth.image_ids)}
    by_image: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    repeated = 0
    for image_id, *arrays in collected:
        index = position.get(image_id)
        if index is None:  # outside the images asked for
            continue
        repeated += index in by_image
        by_image.setdefault(index, tuple(arrays))
    if repeated:
        logger.warning("%d images were processed more than once; only the first time counts", repeated)
    if len(by_image) < len(position):
        logger.warning(
            "Only %d of the %d images of %s were processed; objects on the others count as missed",
            len(by_image),
            len(position),
            truth.source,
        )
    order = sorted(by_image)
    counts = [len(by_image[index][1]) for index in order]
    empty = (np.zeros((0, 4), np.float32), np.zeros(0, np.float64), np.zeros(0, np.int64))
    boxes, scores, class_ids = (
        np.concatenate([default, *(by_image[index][column] for index in order)]) for column, default in enumerate(empty)
    )
    return Detections(np.repeat(np.array(order, dtype=np.int64), counts), boxes, scores, class_ids)


def _write_detections(path: Path, detections: Detections, truth: GroundTruth) -> None:
    """Write COCO's result format with the data set's own image and category ids, all at once or not at all."""
    columns = (
        detections.image_index.tolist(),
        detections.class_ids.tolist(),
        xywh(detections.boxes).tolist(),
        detections.scores.tolist(),
    )
    rows = [
        {"image_id": truth.image_ids[i], "category_id": truth.dataset_ids[c], "bbox": box, "score": score}
        for i, c, box, score in zip(*columns, strict=True)
    ]
    save_text_atomic(json.dumps(rows), path)
