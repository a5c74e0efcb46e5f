"""Golden model of OS2D: a narrow network on a picture in two levels, from pixels to detections and their metrics.

The class images go through files and the class memory, the picture through the detector, as in an evaluation.

Source: OS2D (Osokin et al., ECCV 2020), official release.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fsdet.data.support import Support, SupportSet
from fsdet.engine.parity import Comparison
from fsdet.engine.parity_os2d_boxes import compare_found
from fsdet.engine.parity_os2d_detector import VERSIONS, GoldenDetector, GoldenLedger, unfolded
from fsdet.engine.parity_os2d_eval import EvaluatedImage, rank_images
from fsdet.evaluation.oneshot_style import METRICS, THRESHOLD, oneshot_metrics
from fsdet.methods.os2d.decoding import Found
from fsdet.methods.os2d.pyramid import Pyramid, resize
from fsdet.methods.os2d.settings import NO_THRESHOLD
from fsdet.methods.os2d.templates import cut_pictures
from fsdet.modeling.base import condition_on_support

FEATURES, SCORES, CODES, CORNERS, PIXELS, METRIC = 1e-4, 2e-5, 1e-4, 2e-2, 2e-2, 1e-6
# Prefix of the detections in the file -> version and views of the supports.
RUNS = {"v1": ("v1", "none"), "v2": ("v2", "none"), "v2_rotation90": ("v2", "rotation90")}
SUPPORT = "class_image_"
TEXTS = ("config_json", *(f"{run}/metrics_json" for run in RUNS))
INPUTS = ("image", "class_ids", "gt_boxes_relative", "gt_class_ids", "gt_difficult")
NAMES = dict(zip(("mAP", "mAPw", "recall", "AP_joint_classes"), METRICS, strict=True))  # theirs -> ours
MATCHES = {"recognition": SCORES, "localization": CODES, "corners": CORNERS}
INFERENCE = " (at inference)"


def check_model(folder: Path) -> Iterator[Comparison]:
    """model: weights, sizes, features, matches of both versions at every level, detections and their metrics."""
    golden = GoldenDetector(folder)
    ledger = _ledger(golden)
    runs = {name: _Run(golden, *how) for name, how in RUNS.items()}
    first = runs["v1"]
    yield from _compare_weights(ledger, golden, runs)
    yield ledger.exact("class_ids_processing_order", golden.values["class_ids"][first.order])
    yield from _compare_pictures(ledger, first)
    for name in VERSIONS:
        yield from _compare_matches(ledger, name, runs[name])
    for name, run in runs.items():
        yield from _compare_detections(ledger, name, run)
    yield from ledger.rest()


def _ledger(golden: GoldenDetector) -> GoldenLedger:
    """With the JSON texts unfolded."""
    values = unfolded(golden.values, *TEXTS)
    settings = [name for name in values if name.startswith("config_json/")]
    supports = range(len(golden.values["class_ids"]))
    levels = range(len(golden.settings["scales_of_image_pyramid"]))
    outputs = [f"{output}.{part}" for output, _ in VERSIONS.values() for part in ("weight", "bias")]
    expected = [
        *(golden.prefix + name for name in golden.backbone),
        *outputs,
        "class_ids_processing_order",
        "level0_feature_map",
        *(f"level{level}_image_uint8" for level in levels),
        *(f"{SUPPORT}{number}_resized_uint8" for number in supports),
        *(f"class_feature_map_{number}" for number in supports),
        *(f"{name}/level{level}_{kind}" for name in VERSIONS for level in levels for kind in MATCHES),
        *(f"{run}/det_{kind}" for run in RUNS for kind in ("boxes", "labels", "scores")),
        *(f"{run}/metrics_json/{name}@{THRESHOLD:.2f}" for run in RUNS for name in NAMES),
    ]
    inputs = [*INPUTS, *settings, *(f"{SUPPORT}{number}" for number in supports)]
    return GoldenLedger(values, inputs=inputs, expected=expected)


@dataclass(frozen=True)
class _Run:
    """A detector of the set with its class memory, and what it makes of the picture.

    Attributes:
        golden: the set.
        version: "v1" or "v2".
        views: of the supports.
    """

    golden: GoldenDetector
    version: str
    views: str

    @cached_property
    def order(self) -> np.ndarray:
        """Places of the class images, in the order of their classes."""
        return self.golden.values["class_ids"].argsort(kind="stable")

    @cached_property
    def class_ids(self) -> np.ndarray:
        """Of the classes, rising: the order of the class memory."""
        return np.unique(self.golden.values["class_ids"])

    @cached_property
    def model(self) -> nn.Module:
        """The detector in evaluation mode, with its class memory and the scales of the file."""
        settings = self.golden.settings
        opts = {
            "OS2D.VIEWS": self.views,
            "OS2D.CLASS_IMAGE_SIZE": settings["class_image_size"],
            "OS2D.NMS": "reference",
            "OS2D.NMS_THRESH_TEST": settings["nms_iou"],
            "OS2D.SCORE_THRESH_TEST": max(float(settings["nms_score"]), NO_THRESHOLD),
            "TEST.DETECTIONS_PER_IMAGE": -1,
        }
        words = [str(word) for pair in opts.items() for word in pair]
        model = self.golden.load(self.version, *words).eval()
        # Past the configuration, whose sizes are whole numbers.
        model.pyramid = Pyramid(settings["scales_of_image_pyramid"], settings["eval_scale"], settings["image_size"])
        with self._support_set() as support_set:
            condition_on_support(model, lambda: support_set)
        return model

    @cached_property
    def supports(self) -> list[np.ndarray]:
        """The class images as the network sees them, in the order of the file."""
        with self._support_set() as found:
            size = self.golden.settings["class_image_size"]
            cut = {name: list(cut_pictures(found, shots, size, found.image_format)) for name, shots in found}
        pictures = [picture for name in found.classes for picture in cut[name]]
        return [picture for _, picture in sorted(zip(self.order.tolist(), pictures, strict=True))]

    @contextmanager
    def _support_set(self) -> Iterator[SupportSet]:
        """The class images as files, each of them a support as a whole."""
        with tempfile.TemporaryDirectory() as folder:
            supports = []
            for number, class_id in enumerate(self.golden.values["class_ids"].tolist()):
                pixels, path = self.golden.values[f"{SUPPORT}{number}"], str(Path(folder, f"{number}.png"))
                Image.fromarray(pixels).save(path)
                box = (0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[0]))
                supports.append(Support(path, number, number, self.class_ids.tolist().index(class_id), box))
            yield SupportSet([str(class_id) for class_id in self.class_ids], supports, image_format="RGB")

    def picture(self, level: int) -> np.ndarray:
        """The picture at a level."""
        image = self.golden.values["image"]
        return resize(image, self.model.pyramid.sizes(*image.shape[:2])[level])

    def detect(self) -> Found:
        """Detections, class by class, the best one of each first."""
        instances = self.model([{"original_image": self.golden.values["image"]}])[0]["instances"]
        found = Found(instances.pred_boxes.tensor, instances.scores, instances.pred_classes)
        return found[found.classes.argsort(stable=True)]

    def metrics(self, found: Found) -> dict[str, float]:
        """Metrics of detections from 0 to 1, by the names of the file."""
        values = self.golden.values
        height, width = values["image"].shape[:2]
        boxes, ids = values["gt_boxes_relative"] * np.array([width, height, width, height]), values["gt_class_ids"]
        known = np.union1d(self.class_ids, ids)
        found_labels = np.searchsorted(known, self.class_ids[found.classes.numpy()])
        detections = found.boxes.numpy(), found_labels, found.scores.numpy()
        image = EvaluatedImage(*detections, boxes, np.searchsorted(known, ids), values["gt_difficult"])
        metrics = oneshot_metrics(rank_images([image], len(known), THRESHOLD))
        return {f"{name}@{THRESHOLD:.2f}": metrics[f"{ours}{100 * THRESHOLD:g}"] / 100 for name, ours in NAMES.items()}


def _compare_weights(ledger: GoldenLedger, golden: GoldenDetector, runs: Mapping[str, _Run]) -> Iterator[Comparison]:
    """What arrived in the models under the released names."""
    for name, value in runs["v1"].model.backbone.state_dict().items():
        if "num_batches" not in name:
            yield ledger.exact(golden.prefix + name, value)
    for version, (output, _) in VERSIONS.items():
        for part, value in runs[version].model.head.transform_net.linear.state_dict().items():
            yield ledger.exact(f"{output}.{part}", value)


def _compare_pictures(ledger: GoldenLedger, run: _Run) -> Iterator[Comparison]:
    """Resized pictures, and the first channels of their features, as many as the file has."""
    features = {}
    for number, picture in enumerate(run.supports):
        yield ledger.exact(f"{SUPPORT}{number}_resized_uint8", picture)
        features[f"class_feature_map_{number}"] = picture
    for level in range(len(run.golden.settings["scales_of_image_pyramid"])):
        yield ledger.exact(f"level{level}_image_uint8", run.picture(level))
    features["level0_feature_map"] = run.picture(0)
    for name, picture in features.items():
        found = run.model.scene_features(picture)
        yield ledger.within(name, found[: len(ledger.values.get(name, found))], FEATURES)


@torch.no_grad()
def _compare_matches(ledger: GoldenLedger, name: str, run: _Run) -> Iterator[Comparison]:
    """Scores, codes and corners of all class images at every level; scores and corners at inference as well."""
    templates = torch.cat([own.flatten(0, 1) for own in run.model.known_templates()])
    for level in range(len(run.golden.settings["scales_of_image_pyramid"])):
        scene = run.model.scene_features(run.picture(level))
        found = run.model.head(scene[None], templates, corners=True)
        columns = found.scores[0], found.codes[0].mT, found.corners[0].flatten(2).mT
        for (kind, allowed), value in zip(MATCHES.items(), columns, strict=True):
            yield ledger.within(f"{name}/level{level}_{kind}", value, allowed)
        scores, _, corners = run.model.head.detect(scene, templates, corners=True)
        yield ledger.within(f"{name}/level{level}_recognition", scores, SCORES, INFERENCE)
        yield ledger.within(f"{name}/level{level}_corners", corners.flatten(2).mT, CORNERS, INFERENCE)


def _compare_detections(ledger: GoldenLedger, name: str, run: _Run) -> Iterator[Comparison]:
    """Detections of the picture, and their metrics."""
    found = run.detect()
    yield from compare_found(ledger, f"{name}/det_", found, run.class_ids, scores=SCORES, pixels=PIXELS)
    for metric, value in run.metrics(found).items():
        yield ledger.within(f"{name}/metrics_json/{metric}", value, METRIC)
