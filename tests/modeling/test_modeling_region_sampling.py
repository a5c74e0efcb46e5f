from copy import deepcopy
from itertools import permutations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from fsdet.modeling import region_sampling
from fsdet.modeling.region_sampling import apply_thinning, stand_ins, thin_background
from fsdet.modeling.roi_heads import BOX_PREDICTOR_REGISTRY

PREDICTORS = [name for name, _ in BOX_PREDICTOR_REGISTRY]
NO_DROPOUT = {"MODEL.ROI_HEADS.DROPOUT_RATIO": 0.0}


def build(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).train()
    apply_thinning(model, cfg)
    return model


def regions_of(classes):
    """One region for each class id, numbered by its left border."""
    count = len(classes)
    left = torch.arange(count, dtype=torch.float32)
    boxes = torch.stack([left, torch.zeros(count), left + 20, torch.full((count,), 30.0)], dim=1)
    return Instances(
        (64, 96), proposal_boxes=Boxes(boxes), gt_boxes=Boxes(boxes + 1.0), gt_classes=torch.tensor(classes)
    )


def every_order(monkeypatch, count):
    """Let torch.randperm(count) give every order in turn; yields once for each."""
    for order in permutations(range(count)):
        monkeypatch.setattr(region_sampling.torch, "randperm", lambda n, order=order, **_: torch.tensor(order[:n]))
        yield
    monkeypatch.undo()


# The draw


@pytest.mark.parametrize(("count", "kept"), [(10, 3), (9, 3), (7, 6), (5, 1)])
def test_stand_ins(count, kept):
    torch.manual_seed(0)
    chosen = stand_ins(count, kept)
    names, counts = chosen.unique(return_counts=True)
    assert len(chosen) == count and len(names) == kept
    assert set(counts.tolist()) <= {count // kept, -(-count // kept)} and counts.sum() == count
    assert torch.equal(chosen[names], names)  # who is kept stands in for itself


def test_every_example_has_the_same_chance(monkeypatch):
    """Over all orders each of five examples is counted equally often."""
    totals = torch.zeros(5)
    for _ in every_order(monkeypatch, 5):
        totals += stand_ins(5, 2).bincount(minlength=5)
    assert totals.tolist() == [120.0] * 5


def test_nothing_is_drawn_where_all_are_kept():
    torch.manual_seed(3)
    assert stand_ins(4, 4).tolist() == stand_ins(4, 9).tolist() == [0, 1, 2, 3] and stand_ins(0, 2).tolist() == []
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_thinned_regions_by_hand(monkeypatch):
    """Background 5: places 1, 3, 4. The order 2, 0, 1 keeps places 4 and 1; place 4 also stands for place 3."""
    monkeypatch.setattr(region_sampling.torch, "randperm", lambda n, **_: torch.tensor([2, 0, 1]))
    thinned = thin_background(regions_of([2, 5, 0, 5, 5]), background=5, kept=2)
    assert thinned.gt_classes.tolist() == [2, 5, 0, 5]
    assert thinned.proposal_boxes.tensor[:, 0].tolist() == [0, 1, 2, 4]
    assert thinned.stands_for.tolist() == [1, 1, 1, 2]
    whole = thin_background(regions_of([2, 5, 0, 5, 5]), background=5, kept=3)
    assert len(whole) == 5 and whole.stands_for.tolist() == [1] * 5
    assert len(thin_background(regions_of([5, 5])[:0], background=5, kept=3)) == 0


# ROI heads


def losses_and_gradients(model, inputs, seed=1):
    torch.manual_seed(seed)
    model.zero_grad()
    losses = model(inputs)
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["fpn", "c4"])
@pytest.mark.parametrize("name", PREDICTORS)
def test_keeping_all_changes_nothing(tiny_cfg, make_inputs, storage, kind, name):
    opts = {"MODEL.ROI_HEADS.OUTPUT_LAYER": name}
    all_kept = {"MODEL.ROI_HEADS.BACKGROUND_KEPT": 32, "MODEL.RPN.NEGATIVES_KEPT": 256}
    plain, thinned = build(tiny_cfg(kind, **opts)), build(tiny_cfg(kind, **opts, **all_kept))
    (losses, grads), (other_losses, other_grads) = (losses_and_gradients(m, make_inputs()) for m in (plain, thinned))
    assert all(torch.equal(losses[key], other_losses[key]) for key in losses)
    assert all(torch.equal(grads[key], other_grads[key]) for key in grads | other_grads)


@pytest.mark.parametrize("kind", ["fpn", "c4"])
@pytest.mark.parametrize("name", PREDICTORS)
def test_fewer_regions_are_computed_and_the_draw_is_the_seeds(tiny_cfg, make_inputs, storage, kind, name):
    cfg = tiny_cfg(kind, **{"MODEL.ROI_HEADS.OUTPUT_LAYER": name, "MODEL.ROI_HEADS.BACKGROUND_KEPT": 3})
    model, computed = build(cfg), []
    (model.roi_heads.res5 if kind == "c4" else model.roi_heads.box_head).register_forward_hook(
        lambda module, args, output: computed.append(len(output))
    )
    first, _ = losses_and_gradients(model, make_inputs())
    foreground = storage.history("roi_head/num_fg_samples").latest() * 2
    assert computed == [foreground + 2 * 3] and 0 < foreground < 32
    again, _ = losses_and_gradients(model, make_inputs())
    other, _ = losses_and_gradients(model, make_inputs(), seed=2)
    assert torch.equal(first["loss_cls"], again["loss_cls"]) and not torch.equal(first["loss_cls"], other["loss_cls"])


@pytest.mark.parametrize("name", PREDICTORS)
def test_loss_and_gradient_are_unbiased(tiny_cfg, storage, monkeypatch, name):
    """The mean over all 24 draws of three of four background regions is the loss of the whole sample."""
    cfg = tiny_cfg("fpn", **NO_DROPOUT, **{"MODEL.ROI_HEADS.OUTPUT_LAYER": name})
    predictor = build(cfg).roi_heads.box_predictor.double()
    sampled = [regions_of([5, 2, 5, 5, 0, 5]), regions_of([3, 5])]
    features = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def total(regions, losses):
        predictor.zero_grad()
        rows = torch.cat([r.proposal_boxes.tensor[:, 0].long() + 6 * n for n, r in enumerate(regions)])
        parts = losses(predictor(features[rows]), regions)
        sum(parts.values()).backward()
        return [*parts.values(), *(p.grad.clone() for p in predictor.parameters())]

    expected = total(sampled, predictor.losses)
    sums = [torch.zeros_like(value) for value in expected]
    seen = set()
    for _ in every_order(monkeypatch, 4):
        thinned = [thin_background(regions, 5, 3) for regions in sampled]
        assert [len(regions) for regions in thinned] == [5, 2]
        values = total(thinned, lambda *args: region_sampling._region_losses(predictor.losses, *args))
        seen.add(round(values[0].item(), 9))
        sums = [s + v for s, v in zip(sums, values, strict=True)]
    assert len(seen) > 3  # single draws differ
    for value, s in zip(expected, sums, strict=True):
        torch.testing.assert_close(s / 24, value, rtol=1e-10, atol=1e-12)


def test_dropout_sees_every_kept_region_once(tiny_cfg, make_inputs, storage):
    """With dropout the rows that stand for several regions share their mask; the loss stays finite and seeded."""
    cfg = tiny_cfg("c4", **{"MODEL.ROI_HEADS.OUTPUT_LAYER": "dropout", "MODEL.ROI_HEADS.BACKGROUND_KEPT": 2})
    model = build(cfg)
    rows = []
    model.roi_heads.box_predictor.dropout.register_forward_hook(lambda m, args, output: rows.append(len(output)))
    losses, _ = losses_and_gradients(model, make_inputs())
    assert rows == [storage.history("roi_head/num_fg_samples").latest() * 2 + 4]
    assert all(torch.isfinite(value) for value in losses.values())


def test_images_without_objects(tiny_cfg, make_inputs, storage):
    model = build(tiny_cfg("c4", **{"MODEL.ROI_HEADS.BACKGROUND_KEPT": 3, "MODEL.RPN.NEGATIVES_KEPT": 4}))
    inputs = make_inputs()
    for item in inputs:
        item["instances"] = item["instances"][:0]
    losses, _ = losses_and_gradients(model, inputs)
    assert all(torch.isfinite(value) for value in losses.values()) and losses["loss_box_reg"] == 0


def test_detections_are_those_of_the_plain_model(tiny_cfg, make_inputs):
    opts = {"MODEL.ROI_HEADS.BACKGROUND_KEPT": 1, "MODEL.RPN.NEGATIVES_KEPT": 1}
    plain, thinned = build(tiny_cfg("c4")).eval(), build(tiny_cfg("c4", **opts)).eval()
    with torch.no_grad():
        for a, b in zip(plain(make_inputs()), thinned(make_inputs()), strict=True):
            assert torch.equal(a["instances"].scores, b["instances"].scores)


def test_a_copy_trains_by_itself(tiny_cfg, make_inputs, storage):
    model = build(tiny_cfg("c4", **{"MODEL.ROI_HEADS.BACKGROUND_KEPT": 3}))
    twin = deepcopy(model)
    losses_and_gradients(twin, make_inputs())
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in twin.roi_heads.parameters())


# RPN


def test_anchors_are_unbiased(tiny_cfg, make_inputs, storage, monkeypatch):
    """The mean over all 24 draws of three of four negatives; positives and box deltas are untouched."""
    model = build(tiny_cfg("c4"))
    rpn = model.proposal_generator
    features = model.backbone(model.preprocess_image(make_inputs()[:1]).tensor)
    anchors = rpn.anchor_generator([features["res4"]])
    count = len(anchors[0])
    logits = torch.randn(1, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    deltas = torch.zeros(1, count, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.full((count,), -1)
    labels[[3, 8, 20, 21]], labels[[5, 9]] = 0, 1
    boxes = anchors[0].tensor + 2

    def total(losses):
        parts = losses(anchors, [logits], [labels], [deltas], [boxes])
        return [*parts.values(), *torch.autograd.grad(sum(parts.values()), [logits, deltas])]

    expected = total(rpn.losses)
    sums = [torch.zeros_like(value) for value in expected]
    for _ in every_order(monkeypatch, 4):
        values = total(lambda *args: region_sampling._anchor_losses(rpn.losses, 3, *args))
        assert values[2].count_nonzero() == 5  # two positives and three negatives have a gradient
        sums = [s + v for s, v in zip(sums, values, strict=True)]
    for value, s in zip(expected, sums, strict=True):
        torch.testing.assert_close(s / 24, value, rtol=1e-6, atol=1e-9)  # Detectron2 sums in single precision


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_few_anchors_have_a_gradient(tiny_cfg, make_inputs, storage, kind):
    model = build(tiny_cfg(kind, **{"MODEL.RPN.NEGATIVES_KEPT": 4}))
    found = []
    model.proposal_generator.rpn_head.objectness_logits.register_full_backward_hook(
        lambda module, grad_in, grad_out: found.append(int(grad_out[0].count_nonzero()))
    )
    losses_and_gradients(model, make_inputs())
    positives = storage.history("rpn/num_pos_anchors").latest() * 2
    assert sum(found) == positives + 2 * 4
    assert storage.history("rpn/num_neg_anchors").latest() > 50  # what the sample holds is logged as before
