import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from torch import nn

from fsdet.modeling.freeze import apply_freeze, freeze_module

TFA_PHASE_2 = {
    "MODEL.BACKBONE.FREEZE": True,
    "MODEL.PROPOSAL_GENERATOR.FREEZE": True,
    "MODEL.ROI_HEADS.FREEZE_FEAT": True,
    "MODEL.ROI_HEADS.OUTPUT_LAYER": "cosine",
}


def build(cfg):
    torch.manual_seed(0)
    model = build_model(cfg)
    return model, apply_freeze(model, cfg)


@pytest.mark.parametrize(("classes", "scale", "expected"), [(20, 20.0, 103504), (80, 20.0, 410944), (20, -1.0, 103505)])
def test_size_of_tfa_phase_2(tiny_cfg, classes, scale, expected):
    cfg = tiny_cfg("fpn", **TFA_PHASE_2)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.COSINE_SCALE = classes, scale
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1024
    model, prefixes = build(cfg)
    assert prefixes == ["roi_heads.box_predictor"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


# Flags (backbone, RPN, features) and FREEZE_AT -> what trains in a C4 detector; see DeFRCN's released configs.
C4_CASES = [
    ((False, False, False), 2, {"backbone.res3", "backbone.res4", "proposal_generator.rpn_head", "roi_heads.res5"}),
    ((False, False, True), 3, {"backbone.res4", "proposal_generator.rpn_head"}),
    ((False, True, False), 3, {"backbone.res4", "roi_heads.res5"}),
    ((True, False, True), 2, {"proposal_generator.rpn_head"}),
    ((True, True, True), 2, set()),
]


@pytest.mark.parametrize(("flags", "freeze_at", "expected"), C4_CASES)
def test_what_trains_in_c4(tiny_cfg, flags, freeze_at, expected):
    cfg = tiny_cfg("c4", **{"MODEL.BACKBONE.FREEZE_AT": freeze_at})
    cfg.MODEL.BACKBONE.FREEZE, cfg.MODEL.PROPOSAL_GENERATOR.FREEZE, cfg.MODEL.ROI_HEADS.FREEZE_FEAT = flags
    _, prefixes = build(cfg)
    assert set(prefixes) == expected | {"roi_heads.box_predictor"}


def test_what_trains_in_fpn(tiny_cfg):
    _, prefixes = build(tiny_cfg("fpn", **{"MODEL.BACKBONE.FREEZE_AT": 2, "MODEL.ROI_HEADS.FREEZE_FEAT": True}))
    assert {"backbone.bottom_up.res3", "backbone.fpn_lateral2", "roi_heads.box_predictor"} <= set(prefixes)
    assert not [p for p in prefixes if "box_head" in p or "stem" in p or p == "backbone.bottom_up"]


def step(cfg, model, inputs):
    model.train()
    optimizer = build_optimizer(cfg, model)
    losses = model(inputs)
    sum(losses.values()).backward()
    optimizer.step()
    return losses


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_one_step_changes_the_predictor_only(tiny_cfg, make_inputs, storage, kind):
    """With live batch norm in the frozen parts: neither weights nor running statistics move."""
    cfg = tiny_cfg(kind, **TFA_PHASE_2, **{"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0})
    model, _ = build(cfg)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    before = copy.deepcopy(model.state_dict())
    step(cfg, model, make_inputs())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {
        f"roi_heads.box_predictor.{k}" for k in ("cls_score.weight", "bbox_pred.weight", "bbox_pred.bias")
    }


def test_without_freezing_the_statistics_do_move(tiny_cfg, make_inputs, storage):
    cfg = tiny_cfg("fpn", **{"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0})
    model, _ = build(cfg)
    before = copy.deepcopy(model.state_dict())
    step(cfg, model, make_inputs())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert "backbone.bottom_up.stem.conv1.norm.running_mean" in changed
    assert "roi_heads.box_head.fc1.weight" in changed


def test_modes(tiny_cfg):
    model, _ = build(tiny_cfg("fpn", **TFA_PHASE_2))
    for _ in range(2):
        model.train()
        assert not model.backbone.training and not model.backbone.bottom_up.stem.training
        assert not model.proposal_generator.rpn_head.training and not model.roi_heads.box_head.training
        # these choose losses and proposal counts by their flag, and must follow the detector
        assert model.proposal_generator.training and model.roi_heads.training
        assert model.roi_heads.box_predictor.training
        model.eval()
        assert not any(m.training for m in model.modules())
    copied = copy.deepcopy(model)
    copied.train()
    assert copied.training and not copied.backbone.training and not model.training


def test_frozen_parts_record_no_graph(tiny_cfg, make_inputs, storage):
    cfg = tiny_cfg("fpn", **TFA_PHASE_2)
    model, _ = build(cfg)
    seen = {}
    model.backbone.register_forward_hook(lambda m, i, out: seen.update(out))
    model.roi_heads.box_head.register_forward_hook(lambda m, i, out: seen.update(box=out))
    losses = step(cfg, model, make_inputs())
    assert len(seen) == 6 and all(tensor.grad_fn is None for tensor in seen.values())
    assert not losses["loss_rpn_cls"].requires_grad and not losses["loss_rpn_loc"].requires_grad
    assert losses["loss_cls"].requires_grad and losses["loss_box_reg"].requires_grad


def test_a_switch_without_anything_to_freeze(tiny_cfg):
    cfg = tiny_cfg("fpn", **TFA_PHASE_2)
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"MODEL.PROPOSAL_GENERATOR.FREEZE is True, but Module has no .*rpn_head"):
        apply_freeze(model, cfg)


def test_nothing_left_to_train(tiny_cfg):
    cfg = tiny_cfg("fpn", **{"MODEL.BACKBONE.FREEZE": True})
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="nothing is left to train"):
        apply_freeze(model, cfg)


def test_frozen_dropout_is_off():
    layer = nn.Sequential(nn.Dropout(0.9))
    freeze_module(layer)
    layer.train()
    assert torch.equal(layer(torch.ones(100)), torch.ones(100))
