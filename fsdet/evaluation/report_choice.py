"""Why a detection is not correct, and which pictures of a class a gallery shows.

Source: kinds of false positives after Hoiem et al., "Diagnosing Error in Object Detectors", ECCV 2012, section 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .ground_truth import Detections, GroundTruth
from .matching import CORRECT, FALSE, MIN_IOU, Judged, overlap

TOUCHING = 0.1  # IoU from which a false detection is badly placed and not simply in the wrong place (Hoiem et al.)
ROLES = ("best", "median", "false", "missed")  # in the order shown
# Whose turn it is to give the next picture of a class.
TURNS = ("best", "false", "missed", "median", "best", "false", "missed", "best", "false")


@dataclass(frozen=True)
class Example:
    """One picture of a gallery.

    Attributes:
        role: "best", "median" (correct detections), "false" or "missed".
        image: place of the image in the ground truth.
        rank: of the detection among those of its class, from 0; -1 for a missed object.
        object: place of the missed object; -1 otherwise.
    """

    role: str
    image: int
    rank: int = -1
    object: int = -1


def why_false(truth: GroundTruth, detections: Detections, judged: Judged, rank: int) -> tuple[str, int]:
    """Why a detection is false, in words, and the object that explains it (-1: none)."""
    row = judged.rows[[rank]]
    near = np.flatnonzero((truth.image_index == detections.image_index[row[0]]) & ~truth.ignored)
    overlaps = overlap(truth, detections, row, near)[0]
    own = truth.class_ids[near] == judged.class_id

    def best(group: np.ndarray, least: float) -> int:
        values = np.where(group, overlaps, -1.0)
        return int(np.argmax(values)) if len(values) and values.max() >= least else -1

    if (place := best(own, MIN_IOU)) >= 0:
        return "a second box on an object that is found already", int(near[place])
    if (place := best(~own, MIN_IOU)) >= 0:
        return f"on an object of another class: {truth.class_names[truth.class_ids[near[place]]]}", int(near[place])
    if (place := best(own, TOUCHING)) >= 0:
        return f"badly placed, IoU {_below(overlaps[place])}", int(near[place])
    if (place := best(~own, TOUCHING)) >= 0:
        name = truth.class_names[truth.class_ids[near[place]]]
        return f"near an object of another class: {name}, IoU {_below(overlaps[place])}", int(near[place])
    return "on nothing annotated", -1


def choose(truth: GroundTruth, detections: Detections, judged: Judged, count: int) -> list[Example]:
    """Pictures of one class, by rule: no picture is picked for its looks, and each image is shown once.

    In turns the correct detection of the highest score ("best"), the false one of the highest score, the largest missed
    object and, once, the correct detection at the median score. A kind that has none left passes its turn on.

    Returns: at most `count`, correct ones first, then false ones and missed objects.
    """
    images = detections.image_index[judged.rows]
    correct = [rank for rank, verdict in enumerate(judged.verdicts) if verdict == CORRECT]
    false = [rank for rank, verdict in enumerate(judged.verdicts) if verdict == FALSE]
    sources: dict[str, Iterator[Example]] = {
        "best": (Example("best", int(images[rank]), rank) for rank in correct),
        "median": (Example("median", int(images[rank]), rank) for rank in correct[(len(correct) - 1) // 2 :][:1]),
        "false": (Example("false", int(images[rank]), rank) for rank in false),
        "missed": (Example("missed", int(truth.image_index[item]), object=int(item)) for item in judged.missed),
    }
    chosen: list[Example] = []
    used: set[int] = set()
    for role in itertools.cycle(TURNS):
        if len(chosen) == count or not sources:
            break
        example = next((item for item in sources.get(role, ()) if item.image not in used), None)
        if example is None:
            sources.pop(role, None)
        else:
            chosen.append(example)
            used.add(example.image)
    return sorted(chosen, key=lambda item: (ROLES.index(item.role), item.rank))


def _below(value: float) -> str:
    """Two digits, cut and not rounded: 0.498 is below 0.5."""
    return f"{int(value * 100) / 100:.2f}"
