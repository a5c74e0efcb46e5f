import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNOutputLayers

from fsdet.methods.tfa import CosineOutputLayers
from fsdet.modeling.roi_heads import BOX_PREDICTOR_REGISTRY, build_box_predictor

PREDICTORS = [name for name, _ in BOX_PREDICTOR_REGISTRY]


def test_known_predictors(tiny_cfg):
    assert {"linear", "cosine"} <= set(PREDICTORS)
    cfg = tiny_cfg("fpn", **{"MODEL.ROI_HEADS.OUTPUT_LAYER": "linear"})
    assert type(build_box_predictor(cfg, ShapeSpec(channels=8))) is FastRCNNOutputLayers
    cfg.MODEL.ROI_HEADS.OUTPUT_LAYER = "cosin"
    with pytest.raises(ValueError, match=r"OUTPUT_LAYER: got 'cosin', expected one of \['cosine', 'dropout', 'linear'"):
        build_model(cfg)


@pytest.mark.parametrize("kind", ["fpn", "c4"])
@pytest.mark.parametrize("name", PREDICTORS)
def test_every_predictor_trains_and_detects(tiny_cfg, make_inputs, storage, kind, name):
    """Finite losses and gradients, ordered scores, boxes inside the image, official names, empty ground truth."""
    torch.manual_seed(0)
    cfg = tiny_cfg(kind, **{"MODEL.ROI_HEADS.OUTPUT_LAYER": name, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0})
    model = build_model(cfg).train()
    head = "roi_heads.box_predictor."
    names = {key.removeprefix(head) for key in model.state_dict() if key.startswith(head)}
    assert {"cls_score.weight", "bbox_pred.weight", "bbox_pred.bias"} <= names
    losses = model(make_inputs())
    sum(losses.values()).backward()
    predictor = model.roi_heads.box_predictor
    assert predictor.cls_score.weight.shape[0] == 6 and predictor.bbox_pred.weight.shape[0] == 20
    assert all(torch.isfinite(p.grad).all() for p in predictor.parameters())
    empty = make_inputs()
    for x in empty:
        x["instances"] = x["instances"][:0]
    assert all(torch.isfinite(v) for v in model(empty).values())

    model.eval()
    with torch.no_grad():
        found = [output["instances"] for output in model(make_inputs())]
    assert sum(len(f) for f in found) > 0
    for f in found:
        assert torch.equal(f.scores, f.scores.sort(descending=True).values)
        boxes = f.pred_boxes.tensor
        assert boxes.min() >= 0 and boxes[:, 0::2].max() <= 96 and boxes[:, 1::2].max() <= 64
        assert f.pred_classes.max() < 5


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_the_cosine_predictor_sees_the_head_features(tiny_cfg, kind):
    model = build_model(tiny_cfg(kind, **{"MODEL.ROI_HEADS.OUTPUT_LAYER": "cosine"}))
    predictor = model.roi_heads.box_predictor
    assert type(predictor) is CosineOutputLayers
    width = {"fpn": 32, "c4": 128}[kind]
    assert predictor.cls_score.in_features == predictor.bbox_pred.in_features == width
    assert predictor.test_score_thresh == 0.05 and predictor.num_classes == 5


def test_linear_weights_move_to_the_cosine_head(tiny_cfg):
    """Phase 1 is linear and phase 2 cosine in the published recipes: only the bias has no place."""
    linear = build_model(tiny_cfg("fpn"))
    cosine = build_model(tiny_cfg("fpn", **{"MODEL.ROI_HEADS.OUTPUT_LAYER": "cosine"}))
    result = cosine.load_state_dict(linear.state_dict(), strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == ["roi_heads.box_predictor.cls_score.bias"]
