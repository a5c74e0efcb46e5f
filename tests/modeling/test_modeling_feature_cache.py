import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances

from fsdet.modeling.feature_cache import FeatureCache, pad_together, view_key
from fsdet.modeling.freeze import apply_freeze

FROZEN = {"MODEL.BACKBONE.FREEZE": True}
TFA = {**FROZEN, "MODEL.PROPOSAL_GENERATOR.FREEZE": True, "MODEL.ROI_HEADS.FREEZE_FEAT": True}
PLENTY = 2**30


def build(cfg, capacity=None):
    """A model with moderate activations, and its cache."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for name, value in model.state_dict().items():
        if name.endswith("conv3.norm.weight"):
            value.fill_(0.3)
    apply_freeze(model, cfg)
    return model, None if capacity is None else FeatureCache(model, capacity)


def sized(inputs, *sizes):
    """The inputs cut to other sizes (height, width), their objects with them."""
    result = []
    for item, (height, width) in zip(inputs, sizes, strict=True):
        targets = item["instances"]
        boxes = targets.gt_boxes.clone()
        boxes.clip((height, width))
        kept = boxes.nonempty()
        targets = Instances((height, width), gt_boxes=boxes[kept], gt_classes=targets.gt_classes[kept])
        image = item["image"][:, :height, :width].contiguous()
        result.append({**item, "image": image, "instances": targets, "height": height, "width": width})
    return result


def step(model, inputs, seed=1):
    """Losses and gradients of one training pass."""
    torch.manual_seed(seed)
    model.zero_grad()
    losses = model(inputs)
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_passes(model):
    """Number of images of each pass through the first layer."""
    passes = []
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    backbone.stem.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    return passes


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_trains_as_without_a_cache(tiny_cfg, make_inputs, storage, kind):
    """Pictures of one size: same losses and gradients up to rounding, the second time without the backbone."""
    plain, _ = build(tiny_cfg(kind, **FROZEN))
    cached, cache = build(tiny_cfg(kind, **FROZEN), PLENTY)
    passes = count_passes(cached)
    losses, grads = step(plain, make_inputs())
    for expected_passes, hits in (([1, 1], 0), ([1, 1], 1)):
        other_losses, other_grads = step(cached, make_inputs())
        assert passes == expected_passes and storage.history("feature_cache/hits").latest() == hits
        for name, value in losses.items():
            torch.testing.assert_close(other_losses[name], value, rtol=1e-4, atol=1e-5)
        assert grads.keys() == other_grads.keys()
        for name, value in grads.items():
            torch.testing.assert_close(other_grads[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
    assert len(cache.views) == 2
    assert cache.used == sum(t.nbytes for view in cache.views.values() for t in view.features.values())


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_features_do_not_depend_on_the_batch(tiny_cfg, make_inputs, storage, kind):
    """A small picture met beside a large one has the features that it has alone, bit for bit; zeros pad them."""
    inputs = sized(make_inputs(), (64, 96), (30, 60))
    together, _ = build(tiny_cfg(kind, **FROZEN), PLENTY)
    seen = []
    together.proposal_generator.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    losses, _ = step(together, inputs)
    again, _ = step(together, inputs)
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    alone, cache = build(tiny_cfg(kind, **FROZEN), PLENTY)
    step(alone, inputs[1:])
    (view,) = cache.views.values()
    for level, features in view.features.items():
        batch = seen[0][level]
        height, width = features.shape[2:]
        assert torch.equal(batch[1:, :, :height, :width], features)
        assert not batch[1, :, height:].any() and not batch[1, :, :, width:].any()
        assert batch.shape == seen[1][level].shape and len(batch) == 2
    whole, _ = build(tiny_cfg(kind, **FROZEN))
    expected = whole.backbone(whole.preprocess_image(inputs).tensor)
    assert {k: v.shape for k, v in seen[0].items()} == {k: v.shape for k, v in expected.items()}


def test_what_does_not_fit_is_computed_each_time(tiny_cfg, make_inputs, storage, caplog):
    cfg = tiny_cfg("c4", **FROZEN)
    roomy, cache = build(cfg, PLENTY)
    expected = [step(roomy, make_inputs())[0] for _ in range(3)]
    one_view = cache.used // 2
    tight, small_cache = build(cfg, one_view)
    passes = count_passes(tight)
    with caplog.at_level(logging.WARNING):
        found = [step(tight, make_inputs())[0] for _ in range(3)]
    assert passes == [1, 1, 1, 1] and small_cache.used == one_view  # two, then the second picture each time
    assert all(torch.equal(a[name], b[name]) for a, b in zip(expected, found, strict=True) for name in a)
    assert caplog.text.count("feature cache is full with 1 views") == 1


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_proposals_of_a_frozen_rpn_are_kept(tiny_cfg, make_inputs, storage, kind):
    """No RPN pass the second time, and the heads sample as the first time: bit for bit equal losses."""
    plain, _ = build(tiny_cfg(kind, **TFA))
    cached, _ = build(tiny_cfg(kind, **TFA), PLENTY)
    heads = []
    cached.proposal_generator.rpn_head.register_forward_hook(lambda *args: heads.append(1))
    proposals = []
    for model in (plain, cached):
        model.roi_heads.register_forward_pre_hook(lambda module, args: proposals.append(args[2]))
    step(plain, make_inputs())
    first, _ = step(cached, make_inputs())
    second, _ = step(cached, make_inputs())
    assert len(heads) == 2 and set(first) == {"loss_cls", "loss_box_reg"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    for a, b in zip(proposals[0], proposals[1], strict=True):
        assert len(a) == len(b) > 0 and b.image_size == (64, 96)
        torch.testing.assert_close(b.objectness_logits, a.objectness_logits, rtol=1e-3, atol=1e-4)


def test_known_and_new_views_draw_the_same_numbers(tiny_cfg, make_inputs, storage):
    """What a resumed run has to compute again must not shift the sampling of regions."""
    filled, _ = build(tiny_cfg("fpn", **TFA), PLENTY)
    step(filled, make_inputs()[:1])
    fresh, _ = build(tiny_cfg("fpn", **TFA), PLENTY)
    (one, _), (other, _) = step(filled, make_inputs()), step(fresh, make_inputs())
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_rpn_that_trains_keeps_its_losses(tiny_cfg, make_inputs, storage):
    model, _ = build(tiny_cfg("c4", **FROZEN), PLENTY)
    step(model, make_inputs())
    losses, grads = step(model, make_inputs())
    assert losses["loss_rpn_cls"] > 0 and "proposal_generator.rpn_head.conv.weight" in grads


@pytest.mark.parametrize("opts", [FROZEN, TFA], ids=["trained rpn", "frozen rpn"])
def test_detection_goes_past_the_cache(tiny_cfg, make_inputs, storage, opts):
    """Also between training steps, and with the raw `inference`."""
    plain, _ = build(tiny_cfg("fpn", **opts))
    cached, cache = build(tiny_cfg("fpn", **opts), PLENTY)
    expected = plain.eval()(make_inputs())
    for method in (lambda m: m(make_inputs()), lambda m: m.inference(make_inputs())):
        step(cached.train(), make_inputs())
        cached.eval()
        with torch.no_grad():
            found = method(cached)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a["instances"].scores, b["instances"].scores)
            assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
    assert len(cache.views) == 2


def test_parameter_names_and_state_stay(tiny_cfg):
    plain, _ = build(tiny_cfg("fpn", **TFA))
    cached, _ = build(tiny_cfg("fpn", **TFA), PLENTY)
    assert plain.state_dict().keys() == cached.state_dict().keys()
    cached.load_state_dict(plain.state_dict())


def test_features_keep_the_precision_of_autocast(tiny_cfg, make_inputs, storage):
    model, cache = build(tiny_cfg("fpn", **FROZEN), PLENTY)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = model(make_inputs())
    assert all(torch.isfinite(value) for value in losses.values())
    kept = next(iter(cache.views.values())).features.values()
    assert {level.dtype for level in kept} == {torch.bfloat16} and not any(level.requires_grad for level in kept)


def test_a_backbone_that_trains_is_refused(tiny_cfg):
    with pytest.raises(ValueError, match=r"nothing to cache; set MODEL.BACKBONE.FREEZE True"):
        build(tiny_cfg("c4"), PLENTY)


def test_views_are_told_apart_by_content():
    image = torch.arange(24, dtype=torch.uint8).view(3, 2, 4)
    others = [image.flip(2), image.view(3, 4, 2), image.float(), image.clone().index_fill_(2, torch.tensor([3]), 9)]
    keys = {view_key(other) for other in (image, *others)}
    assert len(keys) == 5
    assert view_key(image.clone()) == view_key(image) == view_key(image.permute(1, 2, 0).contiguous().permute(2, 0, 1))


def test_padding_by_hand():
    one, two = torch.ones(1, 1, 1, 3), torch.full((1, 1, 2, 1), 2.0)
    assert pad_together([one, two])[:, 0].tolist() == [[[1, 1, 1], [0, 0, 0]], [[2, 0, 0], [2, 0, 0]]]
