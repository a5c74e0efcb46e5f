"""Random boxes: inside the picture, reproducible, near zero."""

import torch

from fsdet.engine.chance import evaluate_chance, random_detections
from fsdet.evaluation.result import read_result


def draw(seed):
    return random_detections(40, 90, count=500, num_classes=3, generator=torch.Generator().manual_seed(seed))


def test_boxes_lie_inside_and_follow_the_seed():
    found = draw(0)
    x0, y0, x1, y1 = found.pred_boxes.tensor.unbind(1)
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= 90.001).all() and (y1 <= 40.001).all()
    assert ((x1 - x0) >= 8.99).all() and ((y1 - y0) >= 3.99).all()
    assert set(found.pred_classes.tolist()) == {0, 1, 2}
    assert found.scores.equal(draw(0).scores) and not found.scores.equal(draw(1).scores)


def test_result_is_recorded_as_its_own_method(write_config, tmp_path):
    path = evaluate_chance(write_config(FEWSHOT={"STAGE": "novel", "SHOT": 1}))
    result = read_result(path)
    assert result.protocol.method == "random_boxes" and result.iterations == 0
    assert 0 <= result.metrics["nAP50"] < 20 and {"bAP50", "AP50"} <= set(result.metrics)
