import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou

from fsdet.modeling.ignore_regions import has_ignore_rows, may_be_sampled, split_ignore_rows

REGION = (60.0, 0, 96, 64)  # the right part of the 64 x 96 images
STOCK = {
    "fpn": {"MODEL.PROPOSAL_GENERATOR.NAME": "RPN", "MODEL.ROI_HEADS.NAME": "StandardROIHeads"},
    "c4": {"MODEL.PROPOSAL_GENERATOR.NAME": "RPN", "MODEL.ROI_HEADS.NAME": "Res5ROIHeads"},
}


def build(cfg, seed=0):
    torch.manual_seed(seed)
    return build_model(cfg).train()


def anchors_of(model, inputs):
    features = model.backbone(model.preprocess_image(inputs).tensor)
    return model.proposal_generator.anchor_generator([features[f] for f in model.proposal_generator.in_features])


def inside(boxes, region=REGION):
    return pairwise_ioa(Boxes(torch.tensor([region])), boxes)[0] >= 0.5


def proposals_for(inputs, generator):
    """200 random boxes an image, half of them within the region."""
    result = []
    for _ in inputs:
        corners = torch.rand(200, 2, generator=generator) * torch.tensor([70.0, 50])
        corners[100:, 0] = 62 + 20 * torch.rand(100, generator=generator)
        sizes = 6 + 14 * torch.rand(200, 2, generator=generator)
        result.append(
            Instances(
                (64, 96),
                proposal_boxes=Boxes(torch.cat([corners, corners + sizes], dim=1)),
                objectness_logits=torch.zeros(200),
            )
        )
    return result


def sample_anchors(model, inputs, seed=5):
    anchors = anchors_of(model, inputs)
    torch.manual_seed(seed)
    labels, boxes = model.proposal_generator.label_and_sample_anchors(anchors, [x["instances"] for x in inputs])
    return Boxes.cat(anchors), labels, boxes


def sample_proposals(model, inputs, seed=5):
    proposals = proposals_for(inputs, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    return model.roi_heads.label_and_sample_proposals(proposals, [x["instances"] for x in inputs])


def test_may_be_sampled_by_hand(tiny_cfg):
    matcher = build(tiny_cfg("fpn")).roi_heads.proposal_matcher
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [5.1, 0, 15.1, 10], [10, 0, 20, 10], [0, 0, 40, 40]]))
    regions = Boxes(torch.tensor([[0.0, 0, 10, 10]]))
    none = Boxes(torch.zeros(0, 4))
    # IoA with the region: 1, 0.5, 0.49, 0, 1/16. A large box around a region may be background.
    assert may_be_sampled(boxes, none, regions, matcher, 0.5).tolist() == [False, False, True, True, True]
    real = Boxes(torch.tensor([[0.0, 0, 10, 8]]))  # IoU with box 0: 0.8
    assert may_be_sampled(boxes, real, regions, matcher, 0.5).tolist() == [True, False, True, True, True]
    assert may_be_sampled(boxes, real, regions, matcher, 0.05).tolist() == [True, False, False, True, False]
    assert may_be_sampled(boxes, real, none, matcher, 0.5).all()


def test_split_of_the_rows(make_inputs):
    targets = make_inputs(ignore=[REGION])[0]["instances"]
    real, regions = split_ignore_rows(targets)
    assert real.gt_classes.tolist() == [0, 3] and regions.tensor.tolist() == [list(REGION)]
    assert has_ignore_rows([real, targets]) and not has_ignore_rows([real])


def test_no_negative_anchor_in_a_region(tiny_cfg, make_inputs):
    model = build(tiny_cfg("fpn"))
    counts = {}
    for name, region in (("background", []), ("ignore", [REGION])):
        inputs = make_inputs(ignore=region)
        anchors, labels, _ = sample_anchors(model, inputs)
        counts[name] = sum(int(((lab == 0) & inside(anchors)).sum()) for lab in labels)
        assert all(int((lab == 0).sum()) > 100 for lab in labels)  # the quota is filled from elsewhere
    assert counts["background"] > 0
    assert counts["ignore"] == 0


def test_positive_anchors_of_real_boxes_stay(tiny_cfg, make_inputs):
    """A region over a labelled object takes neither its positives nor the boxes that they regress to."""
    model = build(tiny_cfg("fpn"))
    _, labels, boxes = sample_anchors(model, make_inputs())
    _, ignored_labels, ignored_boxes = sample_anchors(model, make_inputs(ignore=[(0.0, 0, 96, 64)]))
    for before, after, wanted, got in zip(labels, ignored_labels, boxes, ignored_boxes, strict=True):
        assert (before == 1).sum() > 0
        assert torch.equal(before == 1, after == 1)
        assert torch.equal(wanted[before == 1], got[after == 1])
        assert before.shape == after.shape and wanted.shape == got.shape


def test_an_image_without_real_boxes(tiny_cfg, make_inputs, storage):
    model = build(tiny_cfg("fpn"))
    inputs = make_inputs(ignore=[(0.0, 0, 96, 64)])
    for x in inputs:
        x["instances"] = x["instances"][x["instances"].gt_classes < 0]
    anchors, labels, _ = sample_anchors(model, inputs)
    everywhere = inside(anchors, (0.0, 0, 96, 64))
    assert all(not ((lab >= 0) & everywhere).any() for lab in labels)
    sampled = sample_proposals(model, inputs)
    assert [len(s) for s in sampled] == [0, 0]
    losses = model(inputs)
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()


def test_no_background_region_in_a_region(tiny_cfg, make_inputs, storage):
    model = build(tiny_cfg("fpn"))
    counts = {}
    for name, region in (("background", []), ("ignore", [REGION])):
        sampled = sample_proposals(model, make_inputs(ignore=region))
        counts[name] = sum(int(((s.gt_classes == 5) & inside(s.proposal_boxes)).sum()) for s in sampled)
        assert all(int((s.gt_classes >= 0).all()) and len(s) == 32 for s in sampled)
        assert all({0, 1, 2, 3, 4, 5} >= set(s.gt_classes.tolist()) for s in sampled)
    assert counts["background"] > 0
    assert counts["ignore"] == 0


def test_matched_proposals_within_a_region_stay(tiny_cfg, make_inputs, storage):
    model = build(tiny_cfg("fpn"))
    inputs = make_inputs(ignore=[(0.0, 0, 96, 64)])
    sampled = sample_proposals(model, inputs)
    for s, x in zip(sampled, inputs, strict=True):
        real, _ = split_ignore_rows(x["instances"])
        assert len(s) > 0 and (s.gt_classes < 5).all()
        iou = pairwise_iou(real.gt_boxes, s.proposal_boxes)
        assert (iou.max(dim=0).values >= 0.5).all()
        assert torch.equal(real.gt_classes[iou.argmax(dim=0)], s.gt_classes)


def test_a_real_object_wins_over_a_better_matching_region(tiny_cfg, make_inputs, storage):
    model = build(tiny_cfg("fpn"))
    region = (4.0, 4, 31, 31)  # IoU 0.93 with the first object
    (targets,) = [make_inputs(ignore=[region])[0]["instances"]]
    proposals = Instances((64, 96), proposal_boxes=Boxes(torch.tensor([region])), objectness_logits=torch.zeros(1))
    (sampled,) = model.roi_heads.label_and_sample_proposals([proposals], [targets])
    assert sorted(sampled.gt_classes.tolist()) == [0, 0, 3]  # the proposal and the two labelled objects themselves
    matched = sampled[sampled.gt_classes == 0]
    assert matched.gt_boxes.tensor.tolist() == [[4, 4, 30, 30]] * 2


def test_the_threshold_is_a_config_key(tiny_cfg, make_inputs):
    strict = build(tiny_cfg("fpn", **{"MODEL.IGNORE_REGIONS.IOA_THRESH": 0.1}))
    assert strict.roi_heads.ignore_ioa_thresh == strict.proposal_generator.ignore_ioa_thresh == 0.1
    anchors, labels, _ = sample_anchors(strict, make_inputs(ignore=[REGION]))
    touched = pairwise_ioa(Boxes(torch.tensor([REGION])), anchors)[0] >= 0.1
    assert all(not ((lab == 0) & touched).any() for lab in labels)


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_without_ignore_rows_all_is_stock(tiny_cfg, make_inputs, storage, kind):
    """Same initial weights, same random numbers, same losses and gradients as Detectron2's classes."""
    plain = {"MODEL.ROI_HEADS.SKIP_UNREAD_CELLS": False}  # the same cells in another order of summation
    ours, stock = build(tiny_cfg(kind, **plain)), build(tiny_cfg(kind, **STOCK[kind]))
    assert type(stock.proposal_generator) is RPN and type(stock.roi_heads) in (StandardROIHeads, Res5ROIHeads)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), stock.state_dict().values(), strict=True))
    losses = []
    for model in (ours, stock):
        torch.manual_seed(3)
        losses.append(model(make_inputs()))
        sum(losses[-1].values()).backward()
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[0])
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_one_image_with_a_region_leaves_the_other_alone(tiny_cfg, make_inputs):
    """Batches may mix: an image without regions, sampled first, gets the very anchors of the stock RPN."""
    ours, stock = build(tiny_cfg("fpn")), build(tiny_cfg("fpn", **STOCK["fpn"]))
    mixed = [make_inputs()[0], make_inputs(ignore=[REGION])[1]]
    _, labels, _ = sample_anchors(ours, mixed)
    _, wanted, _ = sample_anchors(stock, make_inputs())
    assert torch.equal(labels[0], wanted[0])
    assert not torch.equal(labels[1], wanted[1])


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_a_training_step_with_regions(tiny_cfg, make_inputs, storage, kind):
    model = build(tiny_cfg(kind))
    losses = model(make_inputs(ignore=[REGION]))
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
