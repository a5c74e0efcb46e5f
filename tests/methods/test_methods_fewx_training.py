"""Training of FewX: episodes in, losses out; images without objects, thin supports, and the warning of a plateau."""

import logging
import math

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from test_methods_fewx_model import build, episode, golden_model, losses_of

from fsdet.methods.fewx.contrastive import PlateauWatch, image_losses, select_rows
from fsdet.methods.fewx.roi_heads import widen

FEW = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 32)


class TestBatch:
    @pytest.fixture(scope="class")
    def model(self):
        return golden_model(*FEW)

    @pytest.fixture(autouse=True)
    def _first_candidates(self, monkeypatch):
        """No draw: the first candidates are sampled."""
        monkeypatch.setattr(torch, "randperm", lambda n, **kwargs: torch.arange(n, device=kwargs.get("device")))

    def test_losses_are_means_over_the_images(self, model):
        batch = [episode(0, size=(64, 96)), episode(3, size=(64, 96), boxes=((10.0, 10, 40, 50),), classes=(2,))]
        together = losses_of(model, batch)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        apart = [losses_of(model, [item]) for item in batch]
        for name, loss in together.items():
            torch.testing.assert_close(loss, (apart[0][name] + apart[1][name]) / 2, rtol=1e-4, atol=1e-6)
        assert any(name.startswith("backbone.res4") for name in grads)
        assert not any(name.startswith(("backbone.stem", "backbone.res2", "backbone.res3")) for name in grads)

    def test_class_ids_do_not_matter(self, model):
        first, second = losses_of(model, [episode(classes=(0, 0))]), losses_of(model, [episode(classes=(41, 41))])
        assert all(torch.equal(loss, second[name]) for name, loss in first.items())

    def test_positives_come_first(self, model):
        """Exchanged supports give other losses: the order in the item says which class the boxes belong to."""
        item = episode()
        order = torch.tensor([2, 3, 0, 1])
        swapped = {**item, "support_images": item["support_images"][order]}
        first, second = losses_of(model, [item]), losses_of(model, [swapped])
        assert abs(float((first["loss_cls"] - second["loss_cls"]).detach())) > 1e-4

    def test_image_without_object_is_all_background(self, model):
        item = episode(boxes=(), classes=())
        losses = losses_of(model, [item])
        assert losses["loss_box_reg"] == 0 and losses["loss_rpn_loc"] == 0
        assert losses["loss_cls"] > 0 and losses["loss_rpn_cls"] > 0
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
        mixed = losses_of(model, [item, episode()])
        assert mixed["loss_box_reg"] > 0

    def test_ignore_regions_stay(self, model):
        """Rows of class -1 are neither objects nor background."""
        seen = []
        sample = model.roi_heads.label_and_sample_proposals
        model.roi_heads.label_and_sample_proposals = lambda p, t: seen.extend(t) or sample(p, t)
        try:
            losses_of(model, [episode(classes=(3, -1))])
        finally:
            del model.roi_heads.label_and_sample_proposals
        assert [target.gt_classes.tolist() for target in seen] == [[0, -1], [0, -1]]

    def test_support_box_without_width(self, model):
        item = episode()
        item["support_boxes"][0] = torch.tensor([30.0, 4, 30, 60])
        losses = losses_of(model, [item])
        assert all(torch.isfinite(loss) for loss in losses.values())
        kernels, _ = model.encode_crops(item["support_images"][:1], item["support_boxes"][:1], 1)
        assert kernels.abs().max() > 0

    def test_mixed_precision(self, model):
        wanted = losses_of(model, [episode()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = losses_of(model, [episode()])
        for name, loss in losses.items():
            torch.testing.assert_close(loss.detach().float(), wanted[name].detach(), rtol=0.3, atol=0.05)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"support_images": None}, r"lacks \['support_images'\].*INPUT.FS.ENABLED"),
            ({"support_images": torch.zeros(3, 3, 64, 64, dtype=torch.uint8)}, "expected one even number"),
            ({"support_boxes": torch.zeros(2, 4)}, r"\[2, 4\] supports and boxes"),
        ],
    )
    def test_inputs_without_supports_are_refused(self, model, change, message):
        item = {key: value for key, value in {**episode(), **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message), EventStorage():
            model.train()([item])

    def test_no_candidate_at_all(self, model):
        """Neither a proposal nor an object: nothing to learn from, and no crash."""
        empty = Instances((64, 96), proposal_boxes=Boxes(torch.zeros(0, 4)), objectness_logits=torch.zeros(0))
        targets = Instances((64, 96), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))
        parts = model.roi_heads.box_predictor.encode(torch.rand(2, 128, 7, 7))
        with EventStorage():
            losses = model.train().roi_heads(torch.rand(1, 64, 4, 6), [empty, empty], [targets], parts)
        assert losses["loss_cls"] == 0 and losses["loss_box_reg"] == 0 and losses["loss_cls"].requires_grad


def test_frozen_backbone_trains_the_rest():
    model = build(*FEW, "MODEL.BACKBONE.FREEZE_AT", 5)
    losses_of(model, [episode()])
    trained = {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"proposal_generator.rpn_head", "roi_heads.res5", "roi_heads.box_predictor"}


def test_widen():
    boxes = torch.tensor([[3.0, 4, 3, 9], [3, 4, 3.5, 4], [0, 0, 5, 6]])
    expected = torch.tensor([[2.5, 4, 3.5, 9], [2.75, 3.5, 3.75, 4.5], [0, 0, 5, 6]])
    torch.testing.assert_close(widen(boxes), expected)


def test_selection_by_hand():
    """12 rows, 6 of each pass, 2 matches: n = max(1, min(4, 3)) = 3 of the background, min(2, 3) = 2 of the others."""
    match = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.5, 0.4, 0.6, 0.1, 0.2, 0.8, 0.3, 0.7])
    logits = torch.stack([match.log(), (1 - match).log()], dim=1)
    classes = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    assert select_rows(logits, classes, 6).tolist() == [0, 1, 2, 4, 5, 9, 11]
    # With 4 rows of the positive pass the true boundary is 4; the release would take 6.
    assert select_rows(logits, classes, 4).tolist() == [0, 1, 2, 3, 9, 11]
    assert select_rows(logits, classes, 4, legacy_boundary=True).tolist() == [0, 1, 2, 4, 5, 9, 11]


def test_losses_by_hand():
    """Two rows, one match with deltas off by (1, 0, 0, -2) from its targets of zero."""
    from detectron2.modeling.box_regression import Box2BoxTransform

    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20]])
    losses, kept = image_losses(
        torch.zeros(2, 2),
        torch.tensor([[1.0, 0, 0, -2], [9, 9, 9, 9]]),
        torch.tensor([0, 1]),
        boxes,
        boxes,
        positives=1,
        transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
    )
    assert kept.tolist() == [0, 1]
    assert losses["loss_cls"].item() == pytest.approx(math.log(2)) and losses["loss_box_reg"].item() == 1.5


class TestPlateau:
    def watch(self, caplog, loss, share=0.25, steps=1000):
        watch = PlateauWatch()
        with caplog.at_level(logging.WARNING, logger="fsdet.methods.fewx.contrastive"):
            for number in range(steps):
                watch.update(torch.tensor(loss + 0.02 * (-1) ** number), torch.tensor(share))
        return [record.getMessage() for record in caplog.records]

    def test_warns_once_with_a_remedy(self, caplog):
        (message,) = self.watch(caplog, 0.566)
        assert "loss_cls was 0.566" in message and "SOLVER.BASE_LR" in message and "600 steps" in message

    @pytest.mark.parametrize(("loss", "share", "steps"), [(0.545, 0.25, 1000), (0.566, 0.25, 500), (0.0, 0.0, 1000)])
    def test_is_silent_otherwise(self, caplog, loss, share, steps):
        assert self.watch(caplog, loss, share, steps) == []

    def test_knows_the_constant_of_other_ratios(self, caplog):
        """With a third of matches the constant predictor has 0.637."""
        assert len(self.watch(caplog, 0.637, share=1 / 3)) == 1

    def test_training_reports_to_it(self):
        model = build(*FEW)
        noted = []
        model.roi_heads.plateau.update = lambda loss, share: noted.append((float(loss.detach()), float(share)))
        losses = losses_of(model, [episode()])
        assert noted[0][0] == float(losses["loss_cls"].detach()) and 0.2 < noted[0][1] <= 0.5
