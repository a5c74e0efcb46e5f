"""One object found in a picture: from a detector's output, and onto the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detectron2.structures import Instances
from PIL import Image

from fsdet.data.drawing import MIN_SIDE, RGB, Mark, draw_marks


@dataclass(frozen=True)
class Detection:
    """One object found.

    Attributes:
        class_name: name of its class.
        score: confidence in [0, 1]; a calibrated one (an average with a cosine) can be below 0.
        box: (x0, y0, x1, y1) in pixels of the picture as it is shown (after its EXIF rotation).
        class_id: position of the class in `Predictor.class_names`.
    """

    class_name: str
    score: float
    box: tuple[float, float, float, float]
    class_id: int


def detections_of(instances: Instances, class_names: Sequence[str], threshold: float) -> list[Detection]:
    """Detections with at least a score of `threshold`, best first.

    Args:
        instances: with pred_boxes in pixels of the picture, scores and pred_classes, on any device.
        class_names: names in predictor order.
    """
    instances = instances.to("cpu")
    boxes = instances.pred_boxes.tensor.float().tolist()
    rows = zip(boxes, instances.scores.tolist(), instances.pred_classes.tolist(), strict=True)
    found = [
        Detection(class_names[class_id], score, tuple(box), class_id)
        for box, score, class_id in rows
        if score >= threshold
    ]
    return sorted(found, key=lambda detection: -detection.score)


def draw_detections(
    picture: Image.Image,
    detections: Sequence[Detection],
    colours: Mapping[str, RGB],
    novel_names: Sequence[str] = (),
    *,
    min_side: int = MIN_SIDE,
) -> Image.Image:
    """Picture with boxes, names and scores, the best detections on top.

    Args:
        picture: it is not changed.
        detections: best first.
        colours: class name -> colour.
        novel_names: the other classes have thinner lines; empty = all lines are equal.
        min_side: a picture with a shorter side, in pixels, is enlarged (0: never).
    Returns: RGB picture.
    """
    marks = [
        Mark(
            detection.box,
            f"{detection.class_name} {detection.score:.0%}",
            colours[detection.class_name],
            is_thin=bool(novel_names) and detection.class_name not in novel_names,
        )
        for detection in reversed(detections)
    ]
    return draw_marks(picture, marks, min_side=min_side)
