"""Which detections are correct: by hand, and as pycocotools judges; detections read from files."""

import json

import numpy as np
import pytest
from evaluation_cases import CLASSES
from judged_cases import DETECTIONS, TRUTH
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fsdet.evaluation.ground_truth import load_ground_truth
from fsdet.evaluation.matching import judge, read_detections


def test_verdicts_by_hand():
    judged = judge(TRUTH, DETECTIONS, 0)
    assert judged.rows.tolist() == [1, 2, 0, 5, 6, 3, 4]
    assert judged.verdicts == ("correct", "false", "false", "ignored", "correct", "false", "false")
    assert judged.objects.tolist() == [0, -1, -1, -1, 2, -1, -1]
    assert judged.missed.tolist() == [4]
    dogs = judge(TRUTH, DETECTIONS, 1)
    assert (dogs.verdicts, dogs.missed.tolist()) == ((), [1])


def test_verdicts_are_those_of_pycocotools(toy, tmp_path):
    """On random objects and detections, crowds included."""
    truth = load_ground_truth(toy.register())
    rows = [
        {"image_id": item["image_id"], "category_id": toy.dataset_ids[c], "score": s,
         "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
        for item in toy.detections
        for b, s, c in zip(item["boxes"], item["scores"], item["classes"], strict=True)
    ]  # fmt: skip
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(rows))
    detections = read_detections(path, truth)
    reference = COCOeval(COCO(toy.path), COCO(toy.path).loadRes(str(path)), "bbox")
    reference.params.iouThrs = np.array([0.5])
    reference.evaluate()
    seen = set()
    for class_id in range(len(CLASSES)):
        judged = judge(truth, detections, class_id)
        ours = {
            (truth.image_ids[detections.image_index[row]], round(detections.scores[row], 6)): verdict
            for row, verdict in zip(judged.rows, judged.verdicts, strict=True)
        }
        for item in reference.evalImgs:
            if item is None or item["category_id"] != toy.dataset_ids[class_id] or item["aRng"] != [0, 1e10]:
                continue
            columns = (item["dtScores"], item["dtMatches"][0], item["dtIgnore"][0])
            for score, match, ignored in zip(*columns, strict=True):
                expected = "ignored" if ignored else "correct" if match else "false"
                assert ours.pop((item["image_id"], round(score, 6))) == expected
                seen.add(expected)
        assert not ours
    assert seen == {"correct", "false", "ignored"}


def test_reading_detections(tmp_path):
    path = tmp_path / "detections.json"
    with pytest.raises(FileNotFoundError, match=r"detections\.json: no such file"):
        read_detections(path, TRUTH)
    row = {"image_id": 11, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}
    path.write_text(json.dumps([row, {**row, "image_id": 10}]))
    read = read_detections(path, TRUTH)
    assert (read.image_index.tolist(), read.class_ids.tolist()) == ([0, 1], [1, 1])
    assert read.boxes[0].tolist() == [1, 2, 4, 6]
    for change, message in (({"image_id": 99}, "image 99 is not in toy"), ({"category_id": 1}, "category 1 is not in")):
        path.write_text(json.dumps([{**row, **change}]))
        with pytest.raises(ValueError, match=message):
            read_detections(path, TRUTH)
    path.write_text('[{"score": 1}]')
    with pytest.raises(ValueError, match="no COCO result file"):
        read_detections(path, TRUTH)
    path.write_text("[]")
    assert len(read_detections(path, TRUTH)) == 0
