"""Paired bootstrap over test pictures: whether two evaluations differ by more than the choice of pictures explains.

An interval over seeds says how a method varies with its shots; few runs, or one, give none. Here the test pictures are
drawn again and again with replacement, the same draw for both sides, and the AP difference of every draw is kept.

Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .ground_truth import Detections, GroundTruth
from .matching import CORRECT, IGNORED, judge

DRAWS = 1000
LEVEL = 95  # percent of the draws that lie in the interval
MAX_DETECTIONS = 100  # of an image and class, as COCO's AP
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Ranking:
    """Detections of one class by falling score, without those that count neither way.

    Attributes:
        images: (D,) int64, place of the image in the ground truth.
        correct: (D,) bool.
        objects: (N,) float64, counted objects of each image.
    """

    images: np.ndarray
    correct: np.ndarray
    objects: np.ndarray

    def average_precision(self, weights: np.ndarray) -> float:
        """COCO's AP at one IoU, with every image as often as its weight says.

        Args:
            weights: (N,) float64, how often an image is there.
        Returns: in [0, 1]; nan without objects.
        """
        own, total = weights[self.images], float(self.objects @ weights)
        if not total:
            return float("nan")
        found = np.cumsum(self.correct * own)
        precision = found / np.maximum(np.cumsum(own), 1e-12)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(found / total, _RECALLS, side="left")
        return float(np.append(precision, 0.0)[np.minimum(places, len(precision))].mean())


@dataclass(frozen=True)
class Difference:
    """Two sides compared at one IoU, in AP points.

    Attributes:
        iou: least IoU of a correct detection.
        first, second: AP of the sides, mean over their evaluations.
        low, high: ends of the interval of first - second.
    """

    iou: float
    first: float
    second: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """First - second."""
        return self.first - self.second

    def line(self) -> str:
        """The comparison in words."""
        return (
            f"AP{100 * self.iou:g}: {self.first:.2f} and {self.second:.2f}, difference {self.difference:+.2f} "
            f"[{self.low:+.2f}, {self.high:+.2f}]"
        )


def rank_classes(
    truth: GroundTruth, detections: Detections, classes: Sequence[int], *, iou: float = 0.5
) -> list[Ranking]:
    """Judge the detections of some classes by COCO's rule at one IoU."""
    rankings = []
    for class_id in classes:
        judged = judge(truth, detections, class_id, min_iou=iou)
        images, verdicts = detections.image_index[judged.rows], np.array(judged.verdicts, dtype=object)
        counted = (_rank_in_image(images) < MAX_DETECTIONS) & (verdicts != IGNORED)
        own = truth.image_index[(truth.class_ids == class_id) & ~truth.ignored]
        objects = np.bincount(own, minlength=len(truth.image_ids)).astype(np.float64)
        rankings.append(Ranking(images[counted], (verdicts == CORRECT)[counted], objects))
    return rankings


def paired_bootstrap(
    truth: GroundTruth,
    first: Sequence[Detections],
    second: Sequence[Detections],
    *,
    classes: Sequence[int] | None = None,
    iou: float = 0.5,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Compare two methods on the same pictures.

    Args:
        truth: N images.
        first, second: their evaluations, one or more, e.g. one for each seed of the shots; AP is averaged over them.
        classes: class ids to average over; None for all.
        iou: least IoU of a correct detection, in (0, 1].
        draws: of N pictures with replacement.
        seed: of the draws.
    Raises: ValueError where nothing can be compared.
    """
    if not first or not second or draws < 1:
        raise ValueError("A bootstrap needs an evaluation on each side, and draws")
    wanted = range(len(truth.class_names)) if classes is None else classes
    if not truth.counted_objects()[list(wanted)].any():
        raise ValueError(f"{truth.source}: no object of the classes compared")
    sides = [[rank_classes(truth, own, wanted, iou=iou) for own in side] for side in (first, second)]
    images = len(truth.image_ids)
    generator = np.random.default_rng(seed)
    differences = []
    while len(differences) < draws:
        drawn = np.bincount(generator.integers(images, size=images), minlength=images).astype(np.float64)
        values = [_mean(side, drawn) for side in sides]
        if not np.isnan(values).any():  # else no object was drawn
            differences.append(values[0] - values[1])
    low, high = np.percentile(differences, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    whole = np.ones(images)
    return Difference(iou, _mean(sides[0], whole), _mean(sides[1], whole), float(low), float(high))


def _mean(side: Sequence[Sequence[Ranking]], weights: np.ndarray) -> float:
    """AP in percent over the classes with objects, and over the evaluations of a side."""
    values = np.array([[ranking.average_precision(weights) for ranking in own] for own in side])
    there = ~np.isnan(values[0])  # the same classes in all
    return float(100 * values[:, there].mean()) if there.any() else float("nan")


def _rank_in_image(images: np.ndarray) -> np.ndarray:
    """How many earlier entries name the same image, for each entry."""
    order = np.argsort(images, kind="stable")
    ordered = images[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    ranks = np.empty(len(images), np.int64)
    ranks[order] = np.arange(len(images)) - starts
    return ranks
