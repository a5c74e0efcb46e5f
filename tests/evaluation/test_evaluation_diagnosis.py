"""Each known cause of a novel AP of 0 is found, named, and answered with a remedy."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import nn

from fsdet.evaluation.diagnosis import ProposalRecall, diagnose, is_novel_zero, proposal_recall

CLASSES = ("dog", "person", "bird", "cow")
NOVEL = ("bird", "cow")


@dataclass
class Report:
    matched: tuple = tuple(f"layer{i}" for i in range(300))
    missing: tuple = ()
    unexpected: tuple = ()
    mismatched: tuple = ()


def healthy(**changes):
    facts = {
        "novel_classes": NOVEL,
        "test_classes": CLASSES,
        "load_report": Report(),
        "head_classes": 4,
        "checkpoint_classes": CLASSES,
        "trainable": ["roi_heads.box_predictor"],
        "score_threshold": 0.05,
        "highest_scores": {"dog": 0.99, "bird": 0.6},
        "recall": ProposalRecall(0.9, 50, 30, 1000, 0.5, {2: (20, 25), 3: (25, 25)}),
    }
    return diagnose(**(facts | changes))


def test_healthy_facts_have_no_fault():
    diagnosis = healthy()
    assert diagnosis.faults == ()
    assert {finding.state for finding in diagnosis.findings} == {"ok"}
    assert "No known cause applies" in diagnosis.text()
    assert "90.0 % of 50 novel objects on 30 images" in diagnosis.text()


@pytest.mark.parametrize(
    ("change", "check", "detail", "remedy"),
    [
        ({"load_report": Report(matched=())}, "weights", "0 tensors matched", "MODEL.WEIGHTS"),
        ({"load_report": Report(missing=("roi_heads.x",))}, "weights", "1 missing, .*roi_heads.x", "surgery"),
        (
            {"load_report": Report(mismatched=(("cls.weight", (16, 8), (21, 8)),))},
            "weights",
            "1 of another shape, .*cls.weight",
            "random",
        ),
        ({"head_classes": 2}, "predictor size", "2 classes in the predictor, 4 in the test set", "NUM_CLASSES"),
        (
            {"checkpoint_classes": ("bird", "cow", "dog", "person")},
            "class order",
            'row 0 is "bird" in the checkpoint and "dog" in the test set',
            "surgery again",
        ),
        ({"checkpoint_classes": ("dog", "person")}, "class order", r"lacks \['bird', 'cow'\]", "made for"),
        ({"checkpoint_classes": (*CLASSES, "cat")}, "class order", "classes beyond", "made for"),
        ({"trainable": []}, "trained parts", "no parameter was trained", "fine-tune"),
        ({"trainable": ["backbone.res4"]}, "trained parts", "only backbone.res4", "box predictor must train"),
        ({"highest_scores": {"dog": 0.9}}, "scores", "no novel detection above the score threshold 0.05", "lower"),
        ({"highest_scores": {"cow": 0.07}}, "scores", "highest novel score 0.070", "cut off"),
        (
            {"recall": ProposalRecall(0.1, 50, 30, 1000, 0.5, {2: (5, 50)})},
            "proposals, recall@1000 at IoU 0.5",
            "10.0 % of 50",
            "MODEL.PROPOSAL_GENERATOR.FREEZE False",
        ),
    ],
)
def test_each_cause(change, check, detail, remedy):
    diagnosis = healthy(**change)
    (fault,) = diagnosis.faults
    assert fault.check == check
    assert re.search(detail, fault.detail)
    assert remedy in fault.remedy
    text = diagnosis.text()
    assert f"[FAULT] {check}: " in text
    assert f"-> {fault.remedy}" in text
    assert "No known cause" not in text


def test_an_unfrozen_rpn_is_not_asked_to_thaw():
    low = ProposalRecall(0.1, 50, 30, 1000, 0.5, {})
    (fault,) = healthy(recall=low, trainable=["proposal_generator.rpn_head", "roi_heads"]).faults
    assert "FREEZE" not in fault.remedy


def test_unknown_facts_say_so_and_accuse_nobody():
    diagnosis = diagnose(novel_classes=NOVEL, test_classes=CLASSES)
    assert {finding.state for finding in diagnosis.findings} == {"unknown"}
    assert diagnosis.faults == ()
    assert json.loads(json.dumps(diagnosis.to_dict()))["findings"][0]["check"] == "weights"


def test_when_to_diagnose():
    assert is_novel_zero({"nAP": 0.0, "AP": 30.0})
    assert not is_novel_zero({"nAP": 0.1})
    assert not is_novel_zero({"AP": 0.0})
    assert not is_novel_zero({"nAP": float("nan")})


class FixedProposals(nn.Module):
    """Proposes the same boxes on every image, worst first, so that `top` must sort."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def preprocess_image(self, batch):
        return ImageList.from_tensors([item["image"].float() for item in batch])

    def backbone(self, images):
        self.modes.append(self.training)
        return {}

    def proposal_generator(self, images, features, instances):
        assert instances is None
        proposals = []
        for size in images.image_sizes:
            item = Instances(size)
            item.proposal_boxes = Boxes(torch.tensor([[60.0, 60, 90, 90], [0, 0, 10, 10], [20, 20, 40, 40]]))
            item.objectness_logits = torch.tensor([-1.0, 0.5, 2.0])
            proposals.append(item)
        return proposals, {}


def batch_of(boxes, classes):
    instances = Instances((100, 100))
    instances.gt_boxes = Boxes(torch.tensor(boxes))
    instances.gt_classes = torch.tensor(classes)
    return [{"image": torch.zeros(3, 100, 100, dtype=torch.uint8), "instances": instances}]


def test_recall_counts_novel_objects_only():
    model = FixedProposals()
    batches = [
        batch_of([[20.0, 20, 40, 40], [0.0, 0, 10, 10], [70.0, 0, 90, 20]], [2, 0, 3]),  # found, base, missed
        batch_of([[60.0, 60, 90, 90], [1.0, 1, 11, 11], [0.0, 0, 10, 10]], [3, 2, -1]),  # found, found, ignore region
    ]
    recall = proposal_recall(model, batches, [2, 3])
    assert (recall.recall, recall.objects, recall.images) == (0.75, 4, 2)
    assert recall.per_class == {2: (2, 2), 3: (1, 2)}
    assert model.modes == [False, False]
    assert model.training  # the mode it had
    best_two = proposal_recall(model, batches, [2, 3], top=2)
    assert best_two.per_class == {2: (2, 2), 3: (0, 2)}
    assert proposal_recall(model, batches, [2, 3], iou=0.9).per_class == {2: (1, 2), 3: (1, 2)}
    assert proposal_recall(model, batches, [2, 3], max_images=1).images == 1
    nothing = proposal_recall(model, batches, [7])
    assert nothing.objects == 0
    assert healthy(recall=nothing).findings[-1].state == "unknown"


def test_recall_needs_instances():
    with pytest.raises(ValueError, match="needs batches with instances"):
        proposal_recall(FixedProposals(), [[{"image": torch.zeros(3, 9, 9)}]], [0])


def test_recall_of_a_real_detector():
    torch.manual_seed(0)
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.DEPTH = "cpu", "", 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.FPN.OUT_CHANNELS = 64, 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    model = build_model(cfg).eval()
    batch = [*batch_of([[10.0, 10, 50, 60], [30.0, 30, 95, 95]], [2, 3]), *batch_of([[5.0, 5, 90, 90]], [2])]
    recall = proposal_recall(model, [batch], [2, 3], top=1000)
    assert not model.training
    with torch.no_grad():
        images = model.preprocess_image(batch)
        proposals, _ = model.proposal_generator(images, model.backbone(images.tensor))
    expected = [
        (pairwise_iou(item["instances"].gt_boxes, p.proposal_boxes).max(dim=1).values >= 0.5).sum().item()
        for item, p in zip(batch, proposals, strict=True)
    ]
    assert recall.objects == 3
    assert recall.recall == pytest.approx(sum(expected) / 3)
    assert recall.recall > 0
    few = proposal_recall(model, [batch], [2, 3], top=1)
    assert few.recall <= recall.recall
