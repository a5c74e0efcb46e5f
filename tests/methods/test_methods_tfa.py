import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fsdet.layers.cosine import unit_rows
from fsdet.methods import METHODS, add_method_configs, tfa
from fsdet.modeling import add_modeling_config
from fsdet.modeling.roi_heads import build_box_predictor


def build(classes=20, features=16, **keys):
    cfg = get_cfg()
    add_modeling_config(cfg)
    add_method_configs(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.MODEL.ROI_HEADS.OUTPUT_LAYER = "cosine"
    cfg.merge_from_list([part for pair in keys.items() for part in pair])
    torch.manual_seed(0)
    return build_box_predictor(cfg, ShapeSpec(channels=features))


def test_methods_declare_their_keys_on_a_copy():
    before = get_cfg().dump()
    cfg = get_cfg()
    add_modeling_config(cfg)
    for method in METHODS:
        method.add_config(cfg)
    assert tfa in METHODS
    assert (cfg.MODEL.ROI_HEADS.COSINE_SCALE, cfg.MODEL.ROI_HEADS.COSINE_IN_PLACE) == (20.0, False)
    assert get_cfg().dump() == before


@pytest.mark.parametrize(("classes", "expected"), [(20, 103504), (80, 410944)])
def test_size_at_1024_features(classes, expected):
    assert sum(p.numel() for p in build(classes, 1024).parameters()) == expected


def test_scores_are_cosine_and_deltas_linear():
    predictor = build(classes=3)
    torch.nn.init.normal_(predictor.bbox_pred.bias)
    features = torch.randn(5, 16)
    scores, deltas = predictor(features)
    assert scores.shape == (5, 4) and deltas.shape == (5, 12)
    wanted = 20 * unit_rows(features) @ unit_rows(predictor.cls_score.weight).t()
    torch.testing.assert_close(scores, wanted)
    stretched_scores, stretched_deltas = predictor(7 * features)
    torch.testing.assert_close(stretched_scores, scores, atol=1e-3, rtol=0)
    bias = predictor.bbox_pred.bias
    torch.testing.assert_close(stretched_deltas - bias, 7 * (deltas - bias), atol=1e-5, rtol=1e-4)


def test_scale_from_the_config():
    assert build(**{"MODEL.ROI_HEADS.COSINE_SCALE": 5.0}).cls_score.scale == 5.0
    learnable = build(**{"MODEL.ROI_HEADS.COSINE_SCALE": -1.0})
    assert learnable.cls_score.scale.tolist() == [20.0]
    with pytest.raises(ValueError, match="cosine scale: got 0"):
        build(**{"MODEL.ROI_HEADS.COSINE_SCALE": 0.0})


def official_state_dict(predictor, learnable):
    """Names in a checkpoint of the official code, whose predictor owns the scale."""
    names = ["cls_score.weight", "bbox_pred.weight", "bbox_pred.bias"]
    state = {f"roi_heads.box_predictor.{n}": predictor.state_dict()[n] + 1 for n in names}
    return {**state, "roi_heads.box_predictor.scale": torch.tensor([13.0])} if learnable else state


@pytest.mark.parametrize("learnable", [False, True])
def test_official_names_load_through_the_renames(learnable):
    predictor = build(**{"MODEL.ROI_HEADS.COSINE_SCALE": -1.0 if learnable else 20.0})
    state = official_state_dict(predictor, learnable)
    for official, ours in tfa.RENAMES:
        state = {ours if key == official else key: value for key, value in state.items()}
    predictor.load_state_dict({key.removeprefix("roi_heads.box_predictor."): v for key, v in state.items()})
    assert not learnable or predictor.cls_score.scale.item() == 13.0


def train_step(predictor):
    """One SGD step on fixed regions; returns the loss before it."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(12, 16, generator=generator)
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 10]]).repeat(12, 1))
    regions = Instances((50, 50), proposal_boxes=boxes, gt_boxes=boxes, gt_classes=torch.arange(12) % 4)
    optimizer = torch.optim.SGD(predictor.parameters(), lr=0.05)
    with EventStorage():
        loss = sum(predictor.losses(predictor(features), [regions]).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("in_place", [False, True])
def test_both_ways_of_training_learn(in_place):
    predictor = build(classes=3, **{"MODEL.ROI_HEADS.COSINE_IN_PLACE": in_place}).train()
    losses = [train_step(predictor) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    lengths = predictor.cls_score.weight.norm(dim=1)
    assert bool((lengths > 0.5).all()) if in_place else lengths.shape == (4,)


def test_in_place_training_is_another_path():
    paths = []
    for in_place in (False, True):
        predictor = build(classes=3, **{"MODEL.ROI_HEADS.COSINE_IN_PLACE": in_place}).train()
        paths.append([train_step(predictor) for _ in range(3)])
    assert paths[0][0] == pytest.approx(paths[1][0], rel=1e-2)
    assert paths[0][2] != pytest.approx(paths[1][2], rel=1e-2)
