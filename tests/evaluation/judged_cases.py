"""Ground truth and detections of three pictures, small enough to judge by hand."""

import numpy as np

from fsdet.evaluation.ground_truth import Detections, GroundTruth


def truth_of(objects, images=3):
    """Ground truth of (image, class, box XYWH, ignored) rows; classes cat and dog."""
    columns = list(zip(*objects, strict=True))
    boxes = np.array(columns[2], np.float64)
    return GroundTruth(
        source="toy",
        image_ids=tuple(range(10, 10 + images)),
        image_sizes=np.full((images, 2), 100),
        class_names=("cat", "dog"),
        dataset_ids=(5, 7),
        image_index=np.array(columns[0]),
        boxes=boxes,
        class_ids=np.array(columns[1]),
        areas=boxes[:, 2] * boxes[:, 3],
        ignored=np.array(columns[3], bool),
    )


def found(rows):
    """Detections of (image, class, box XYXY, score) rows."""
    image, class_id, box, score = zip(*rows, strict=True)
    return Detections(np.array(image), np.array(box, np.float64), np.array(score), np.array(class_id))


TRUTH = truth_of(
    [
        (0, 0, (10, 10, 40, 40), False),
        (0, 1, (60, 60, 30, 30), False),
        (1, 0, (20, 20, 20, 20), False),
        (1, 0, (50, 50, 40, 40), True),
        (2, 0, (5, 5, 50, 20), False),
    ]
)
# In the order of the images; by score: 1, 2, 0, 5, 6, 3, 4.
DETECTIONS = found(
    [
        (0, 0, (12, 12, 50, 50), 0.70),  # on cat 0, but a better one has taken it
        (0, 0, (10, 10, 50, 50), 0.90),  # cat 0
        (0, 0, (60, 60, 90, 90), 0.80),  # the dog
        (0, 0, (30, 30, 70, 50), 0.30),  # IoU 400 / 2000 with cat 0
        (0, 0, (0, 80, 20, 99), 0.20),  # on nothing
        (1, 0, (55, 55, 85, 85), 0.60),  # inside the ignored cat
        (1, 0, (20, 20, 40, 38), 0.40),  # cat 2
    ]
)
