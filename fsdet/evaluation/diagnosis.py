"""Why novel AP is 0: the known causes, checked one by one, with what to do about each.

Almost always it is one of these: base weights that were not loaded, classes in another order than the predictor's rows,
a predictor that was never trained, a score threshold above what a briefly trained head reaches, or novel objects that a
frozen RPN never proposes (reports in TFA's tracker). Everything is passed as plain values; what the caller does not
know is reported as not checked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from detectron2.structures import pairwise_iou
from torch import nn

logger = logging.getLogger(__name__)

# Below this share of proposed novel objects the heads have nothing to work with; a healthy RPN of a base model reaches
# well above it at 1000 proposals.
LOW_RECALL = 0.5


class Loaded(Protocol):
    """What a checkpoint's load report says: names of tensors."""

    matched: Sequence[Any]
    missing: Sequence[Any]
    mismatched: Sequence[Any]


@dataclass(frozen=True)
class ProposalRecall:
    """Share of novel objects that the RPN proposes.

    Attributes:
        recall: in [0, 1]; nan without objects.
        objects: novel objects looked at.
        images: images looked at.
        top: proposals used per image.
        iou: overlap that counts as found.
        per_class: class id -> (found, objects).
    """

    recall: float
    objects: int
    images: int
    top: int
    iou: float
    per_class: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Finding:
    """One check: `state` is "ok", "fault" or "unknown"; a fault has a remedy."""

    check: str
    state: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Findings in the order of the causes' likelihood."""

    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        """Findings that explain the zero."""
        return tuple(finding for finding in self.findings if finding.state == "fault")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"findings": [asdict(finding) for finding in self.findings]}

    def text(self) -> str:
        """Readable explanation, one line a check and one a remedy."""
        marks = {"ok": "[  ok ]", "fault": "[FAULT]", "unknown": "[  ?  ]"}
        lines = ["Novel AP is 0. Checked, the likeliest causes first:"]
        for finding in self.findings:
            lines.append(f"  {marks[finding.state]} {finding.check}: {finding.detail}")
            if finding.remedy:
                lines.append(f"          -> {finding.remedy}")
        if not self.faults:
            lines.append(
                "  No known cause applies. Draw detections at a low score threshold, and check the learning rate and "
                "the number of iterations of the novel stage."
            )
        return "\n".join(lines)


def is_novel_zero(metrics: Mapping[str, float]) -> bool:
    """True where the metrics have a novel AP and it is 0."""
    return metrics.get("nAP", math.nan) == 0.0


def diagnose(
    *,
    novel_classes: Sequence[str],
    test_classes: Sequence[str],
    load_report: Loaded | None = None,
    head_classes: int | None = None,
    checkpoint_classes: Sequence[str] | None = None,
    trainable: Sequence[str] | None = None,
    score_threshold: float | None = None,
    highest_scores: Mapping[str, float] | None = None,
    recall: ProposalRecall | None = None,
) -> Diagnosis:
    """Explain a novel AP of 0.

    Args:
        novel_classes: names of the novel classes tested.
        test_classes: names of all classes tested, in the order of the class ids.
        load_report: of the checkpoint that was evaluated (or fine-tuned from).
        head_classes: foreground classes of the model's predictor.
        checkpoint_classes: ordered names that the checkpoint records for its predictor.
        trainable: prefixes of the parameters that the novel stage trained; empty for none.
        score_threshold: MODEL.ROI_HEADS.SCORE_THRESH_TEST.
        highest_scores: class name -> highest score, from `FewShotEvaluator.highest_scores`.
        recall: from `proposal_recall`.
    """
    return Diagnosis(
        (
            _weights(load_report),
            _head(head_classes, test_classes),
            _class_order(checkpoint_classes, test_classes),
            _training(trainable),
            _scores(score_threshold, highest_scores, novel_classes),
            _proposals(recall, trainable),
        )
    )


@torch.no_grad()
def proposal_recall(
    model: nn.Module,
    data_loader: Iterable[Sequence[dict[str, Any]]],
    novel_class_ids: Sequence[int],
    *,
    top: int = 1000,
    iou: float = 0.5,
    max_images: int | None = None,
) -> ProposalRecall:
    """Recall of the RPN's best proposals on novel boxes.

    Args:
        model: detector with Detectron2's preprocess_image, backbone and proposal_generator, or with `propose_regions`
            (batch -> proposals of each image); its mode is restored.
        data_loader: batches of dicts with "image" and "instances" (gt_boxes in the frame of "image", gt_classes).
        novel_class_ids: class ids to look at.
        top: proposals per image, by objectness.
        iou: overlap that counts as found, at least.
        max_images: stop after as many images; None for all.
    Raises: ValueError where the data have no instances.
    """
    counts = {int(class_id): [0, 0] for class_id in novel_class_ids}
    images = 0
    with _evaluating(model):
        for batch in data_loader:
            if "instances" not in batch[0]:
                raise ValueError(
                    "proposal_recall needs batches with instances; build the loader with a mapper for training"
                )
            for item, proposals in zip(batch, _propose(model, batch, top), strict=True):
                truth = item["instances"]
                overlap = pairwise_iou(truth.gt_boxes.to(proposals.device), proposals)  # (M, R)
                found = (overlap >= iou).any(dim=1).tolist()
                for class_id, hit in zip(truth.gt_classes.tolist(), found, strict=True):
                    if class_id in counts:
                        counts[class_id][0] += hit
                        counts[class_id][1] += 1
            images += len(batch)
            if max_images is not None and images >= max_images:
                break
    found, objects = (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0)
    recall = found / objects if objects else math.nan
    return ProposalRecall(recall, objects, images, top, iou, {key: tuple(value) for key, value in counts.items()})


def _propose(model: nn.Module, batch: Sequence[dict[str, Any]], top: int) -> list:
    """The best proposals of each image, as Boxes in the frame of the network's input."""
    if hasattr(model, "propose_regions"):  # a detector that proposes for each class of its memory
        proposals = model.propose_regions(batch)
    else:
        images = model.preprocess_image(batch)
        proposals, _ = model.proposal_generator(images, model.backbone(images.tensor), None)
    best = [item.objectness_logits.argsort(descending=True)[:top] for item in proposals]
    return [item.proposal_boxes[order] for item, order in zip(proposals, best, strict=True)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _weights(report: Loaded | None) -> Finding:
    name = "weights"
    if report is None:
        return Finding(name, "unknown", "no load report was given")
    matched, missing, mismatched = (len(getattr(report, key)) for key in ("matched", "missing", "mismatched"))
    detail = f"{matched} tensors matched, {missing} missing, {mismatched} of another shape"
    if matched == 0:
        return Finding(
            name, "fault", detail, "nothing was loaded: check MODEL.WEIGHTS and the names of the tensors in the file"
        )
    if missing or mismatched:
        names = [str(item) for item in (*report.missing, *report.mismatched)][:3]
        return Finding(
            name, "fault", f"{detail}, e.g. {', '.join(names)}", "these parts are random: use the surgery's output"
        )
    return Finding(name, "ok", detail)


def _head(head_classes: int | None, test_classes: Sequence[str]) -> Finding:
    name = "predictor size"
    if head_classes is None:
        return Finding(name, "unknown", "the size of the predictor was not given")
    detail = f"{head_classes} classes in the predictor, {len(test_classes)} in the test set"
    if head_classes != len(test_classes):
        remedy = "set MODEL.ROI_HEADS.NUM_CLASSES to the test set's count and run the surgery for these classes"
        return Finding(name, "fault", detail, remedy)
    return Finding(name, "ok", detail)


def _class_order(checkpoint_classes: Sequence[str] | None, test_classes: Sequence[str]) -> Finding:
    name = "class order"
    if checkpoint_classes is None:
        return Finding(name, "unknown", "the checkpoint records no class names")
    recorded, tested = list(checkpoint_classes), list(test_classes)
    if recorded == tested:
        return Finding(name, "ok", f"the checkpoint's {len(recorded)} classes stand in the test set's order")
    if sorted(recorded) == sorted(tested):
        row = next(i for i, pair in enumerate(zip(recorded, tested, strict=True)) if pair[0] != pair[1])
        detail = f'row {row} is "{recorded[row]}" in the checkpoint and "{tested[row]}" in the test set'
        return Finding(name, "fault", detail, "run the surgery again with the test set's class names in their order")
    only = sorted(set(tested) - set(recorded))[:5]
    detail = f"the checkpoint has other classes; it lacks {only}" if only else "the checkpoint has classes beyond these"
    return Finding(name, "fault", detail, "evaluate on the data set that the checkpoint was made for")


def _training(trainable: Sequence[str] | None) -> Finding:
    name = "trained parts"
    if trainable is None:
        return Finding(name, "unknown", "the trained parts were not given")
    if not trainable:
        remedy = "fine-tune first; random novel rows detect nothing"
        return Finding(name, "fault", "no parameter was trained in the novel stage", remedy)
    detail = ", ".join(trainable)
    if not any(part == "roi_heads" or "box_predictor" in part for part in trainable):
        return Finding(
            name, "fault", f"only {detail}", "the box predictor must train: check the FREEZE switches of the config"
        )
    return Finding(name, "ok", detail)


def _scores(
    threshold: float | None, highest_scores: Mapping[str, float] | None, novel_classes: Sequence[str]
) -> Finding:
    name = "scores"
    if highest_scores is None:
        return Finding(name, "unknown", "the detections' scores were not given")
    novel = {key: value for key, value in highest_scores.items() if key in novel_classes}
    limit = "the score threshold" if threshold is None else f"the score threshold {threshold:g}"
    if not novel:
        detail = f"no novel detection above {limit}, {len(highest_scores)} other classes were detected"
        remedy = (
            "lower the score threshold (SCORE_THRESH_TEST) to see whether scores are low or absent; train longer if low"
        )
        return Finding(name, "fault", detail, remedy)
    best = max(novel, key=novel.get)
    detail = f'highest novel score {novel[best]:.3f} ("{best}"), {limit} is below it'
    if threshold is not None and novel[best] < 2 * threshold:
        remedy = "most novel detections are cut off: lower the score threshold (SCORE_THRESH_TEST) or train longer"
        return Finding(name, "fault", detail, remedy)
    return Finding(name, "ok", detail + "; so boxes are found and miss the objects or carry the wrong class")


def _proposals(recall: ProposalRecall | None, trainable: Sequence[str] | None) -> Finding:
    if recall is None:
        return Finding("proposals", "unknown", "no recall of proposals on novel boxes was measured")
    name = f"proposals, recall@{recall.top} at IoU {recall.iou:g}"
    if recall.objects == 0:
        return Finding(name, "unknown", f"no novel object on the {recall.images} images looked at")
    detail = f"{100 * recall.recall:.1f} % of {recall.objects} novel objects on {recall.images} images"
    if recall.recall >= LOW_RECALL:
        return Finding(name, "ok", detail)
    frozen = trainable is not None and not any(part.startswith("proposal_generator") for part in trainable)
    remedy = "compare object sizes with the anchors and the input size, and check that the base weights were loaded"
    if frozen:
        remedy += "; the RPN is frozen: let it train (MODEL.PROPOSAL_GENERATOR.FREEZE False)"
    return Finding(name, "fault", detail, remedy)
