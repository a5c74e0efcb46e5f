"""The demo's pictures say which detections are right, which are wrong, and what is missed."""

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image

from fsdet.engine.demo import draw_judged
from fsdet.engine.detection import Detection
from fsdet.evaluation.report_gallery import COLOURS


def test_pictures_show_the_verdicts(tmp_path):
    """Picture 0: the five is found, and a six where nothing is; picture 1: the six is found, the five missed."""
    five, six, missed = (20, 30, 120, 130), (150, 40, 260, 150), (20, 180, 100, 260)
    records = []
    for index, objects in enumerate([[(five, 0)], [(six, 1), (missed, 0)]]):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (300, 280), (90, 90, 90)).save(path)
        annotations = [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": kind} for box, kind in objects]
        records.append(
            {"file_name": str(path), "image_id": index, "height": 280, "width": 300, "annotations": annotations}
        )
    found = [
        [Detection("five", 0.9, (22, 30, 120, 130), 0), Detection("six", 0.6, (180, 160, 280, 260), 1)],
        [Detection("six", 0.8, (152, 40, 260, 150), 1)],
    ]
    first, second = (np.asarray(image) for image in draw_judged(records, found, ["five", "six"]))
    assert first.shape == second.shape == (280, 300, 3)
    assert first[80, 22].tolist() == list(COLOURS["correct"])
    assert first[210, 180].tolist() == list(COLOURS["false"])
    assert second[90, 152].tolist() == list(COLOURS["correct"])
    assert second[220, 20].tolist() == list(COLOURS["missed"])
    assert not (first == COLOURS["missed"]).all(axis=-1).any()
    assert not (second == COLOURS["false"]).all(axis=-1).any()
