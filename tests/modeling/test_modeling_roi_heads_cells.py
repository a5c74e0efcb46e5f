"""C4 heads without the cells that res5 does not read: the same detector for less work."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler

from fsdet.modeling.roi_heads import ReadCellPooler


def build(tiny_cfg, *, skip, size=7, **keys):
    heads = {"MODEL.ROI_HEADS.SKIP_UNREAD_CELLS": skip, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}
    cfg = tiny_cfg("c4", **{"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": size, **heads, **keys})
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, buffer in model.named_buffers():  # random weights stay finite behind frozen norms
        if name.endswith("conv3.norm.weight"):
            buffer.fill_(0.3)
    return model


def train(model, inputs):
    torch.manual_seed(1)
    losses = model.train()(inputs)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("size", "read"), [(7, 4), (14, 7), (4, 2)])
def test_same_detector(tiny_cfg, make_inputs, storage, size, read):
    plain, quick = (build(tiny_cfg, skip=skip, size=size) for skip in (False, True))
    assert type(plain.roi_heads.pooler) is ROIPooler and type(quick.roi_heads.pooler) is ReadCellPooler
    plain.load_state_dict(quick.state_dict())  # names and shapes are the same
    seen = {}
    for label, model in (("plain", plain), ("quick", quick)):
        model.roi_heads.res5.register_forward_hook(
            lambda _, args, out, label=label: seen.update({label: (args[0].shape[2:], out.shape[2:])})
        )
    (expected, wanted), (losses, found) = (train(model, make_inputs()) for model in (plain, quick))
    assert seen == {"plain": ((size, size), (read, read)), "quick": ((read, read), (read, read))}
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, atol=1e-5, rtol=1e-5)
    assert set(found) == set(wanted)
    for name, grad in wanted.items():
        # An activation beside the kink of a ReLU may change sides, so not element by element.
        assert torch.linalg.norm(found[name] - grad) <= 1e-3 * torch.linalg.norm(grad), name
    with torch.no_grad():
        detections = [[x["instances"] for x in model.eval()(make_inputs())] for model in (plain, quick)]
    for left, right in zip(*detections, strict=True):
        assert len(left) > 0 and torch.equal(left.pred_classes, right.pred_classes)
        torch.testing.assert_close(right.scores, left.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(right.pred_boxes.tensor, left.pred_boxes.tensor, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "keys",
    [
        {"MODEL.RESNETS.STRIDE_IN_1X1": False},  # the 3x3 convolution reads every cell
        {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool"},
        {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign"},  # half a pixel beside, and at least one pixel large
    ],
    ids=lambda keys: "-".join(str(v) for v in keys.values()),
)
def test_not_applied_where_it_does_not_hold(tiny_cfg, make_inputs, storage, keys):
    model = build(tiny_cfg, skip=True, **keys)
    assert type(model.roi_heads.pooler) is ROIPooler
    assert model.roi_heads.res5[0].shortcut.stride == (2, 2)
    assert all(torch.isfinite(loss) for loss in train(model, make_inputs())[0].values())


def test_on_by_default(tiny_cfg):
    heads = build_model(tiny_cfg("c4")).roi_heads
    assert type(heads.pooler) is ReadCellPooler
    assert heads.res5[0].conv1.stride == heads.res5[0].shortcut.stride == (1, 1)


def test_survives_copies_and_mixed_precision(tiny_cfg, make_inputs, storage):
    model = copy.deepcopy(build(tiny_cfg, skip=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, grads = train(model, make_inputs())
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads.values())


def test_image_without_proposals(tiny_cfg, make_inputs):
    model = build(tiny_cfg, skip=True).eval()
    model.proposal_generator.pre_nms_topk[False] = 0
    with torch.no_grad():
        assert [len(x["instances"]) for x in model(make_inputs())] == [0, 0]
