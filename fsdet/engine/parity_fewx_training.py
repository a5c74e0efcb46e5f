"""Golden training of FewX: the losses of given regions, and a whole forward and backward pass stage by stage.

Source: FewX (Fan et al., CVPR 2020), official release.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fsdet.engine.parity import Comparison, compare, golden_file, read_npz
from fsdet.engine.parity_fewx_detector import (
    GRADIENTS,
    LOSSES,
    PIXELS,
    Call,
    GoldenDetector,
    ScaledLedger,
    identity_permutations,
    order_of_the_release,
    recorded,
)
from fsdet.engine.setup import default_config
from fsdet.methods.fewx.contrastive import image_losses

# c: losses. The cases whose two passes have different numbers of rows show the release's boundary.
CASES = 9
SHORT = ("short_pos_branch", "short_neg_branch")
LOSS_INPUTS = ("logits", "deltas", "proposals", "gt_boxes", "gt_classes", "num_pos_branch", "num_neg_branch")
LOSS_OUTPUTS = ("selected_rows", "loss_cls", "loss_box_reg", "grad_logits", "grad_deltas")
# c: training step.
LEGACY, EVERY_CELL = ("FEWX.LEGACY_BOUNDARY", "True"), ("MODEL.ROI_HEADS.SKIP_UNREAD_CELLS", "False")
AS_TRAINED = " (as trained)"
RPN_LOSSES, ROI_LOSSES = ("loss_rpn_cls", "loss_rpn_loc"), ("loss_cls", "loss_box_reg")
STEP_INPUTS = ("num_shot", "support_images_hwc_uint8", "support_boxes")
IMAGE_INPUTS = ("hwc_uint8", "gt_boxes")
IMAGE_OUTPUTS = (
    "anchors", "rpn_logits", "rpn_deltas", "anchor_labels_sampled", "anchor_labels_in_loss", "anchor_matched_gt",
    "pos_num_rpn_proposals", "neg_num_rpn_proposals", "pos_sampled_boxes", "neg_sampled_boxes", "det_logits",
    "det_deltas", "det_gt_classes_in_loss", "det_gt_boxes", "det_boxes", *RPN_LOSSES, *ROI_LOSSES,
)  # fmt: skip
IN_PIXELS = ("anchors", "anchor_matched_gt", "pos_sampled_boxes", "neg_sampled_boxes", "det_gt_boxes", "det_boxes")
EXACT = (
    "anchor_labels_sampled", "anchor_labels_in_loss", "pos_num_rpn_proposals", "neg_num_rpn_proposals",
    "det_gt_classes_in_loss",
)  # fmt: skip
FULL_GRADIENTS = (
    *(f"roi_heads.box_predictor.{name}.weight" for name in ("cls_score_fc", "cls_score_cor", "cls_score_pr")),
    "roi_heads.box_predictor.bbox_pred_pr.weight", "proposal_generator.rpn_head.objectness_logits.weight",
    "proposal_generator.rpn_head.anchor_deltas.bias", "backbone.res4.0.conv1.weight",
)  # fmt: skip
FROZEN = -1.0  # norm of a parameter without gradient


def check_losses(folder: Path) -> Iterator[Comparison]:
    """c: rows of the ratio 1:2:1, losses and their gradients, with the release's boundary between the passes."""
    values = read_npz(golden_file(folder, "c_detector_loss"))
    cases = values["case_names"].tolist() if "case_names" in values else []
    ledger = ScaledLedger(
        values,
        inputs=["case_names", *(f"{case}.{name}" for case in cases for name in LOSS_INPUTS)],
        expected=[f"{case}.{name}" for case in cases for name in LOSS_OUTPUTS],
    )
    yield compare("case_names (number, passes of different length)", [CASES, []], [len(set(cases)), _lacking(cases)])
    for case in cases:
        yield from _compare_losses(ledger, case, legacy=True)
        if case not in SHORT:
            yield from _compare_losses(ledger, case, legacy=False)
    yield from ledger.rest()


def _lacking(cases: Sequence[str]) -> list[str]:
    return [case for case in SHORT if case not in cases]


def _compare_losses(ledger: ScaledLedger, case: str, *, legacy: bool) -> Iterator[Comparison]:
    """One case; passes of equal length have the true boundary at half of all rows, so both ways must agree."""
    logits, deltas, proposals, targets, classes, positives = (
        torch.from_numpy(ledger.values[f"{case}.{name}"]) for name in LOSS_INPUTS[:-1]
    )
    for tensor in (logits, deltas):
        tensor.grad = None
        tensor.requires_grad_()
    losses, rows = image_losses(
        logits,
        deltas,
        classes,
        proposals,
        targets,
        positives=int(positives),
        transform=Box2BoxTransform(weights=default_config().MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS),
        legacy_boundary=legacy,
    )
    sum(losses.values()).backward()
    name = f"{case}.selected_rows"
    if not legacy:
        if name in ledger.values:
            yield compare(f"{name} (true boundary)", ledger.values[name], rows.numpy())
        return
    yield ledger.compare(name, rows.numpy())
    for key, loss in losses.items():
        yield ledger.scaled(f"{case}.{key}", loss.detach(), LOSSES)
    for key, tensor in (("grad_logits", logits), ("grad_deltas", deltas)):
        yield ledger.scaled(f"{case}.{key}", tensor.grad, GRADIENTS)


@dataclass(frozen=True)
class Step:
    """What happened in one pass: the calls on the way, the losses, and the model with its gradients."""

    calls: Mapping[str, list[Call]]
    losses: Mapping[str, Tensor]
    model: nn.Module


def check_step(folder: Path) -> Iterator[Comparison]:
    """c: training forward and backward with sampling by identity permutations; every stage, and all gradients."""
    values = read_npz(golden_file(folder, "c_train_step"))
    images = range(len(values["support_images_hwc_uint8"]))
    expected = [*(f"image{i}_{name}" for i in images for name in IMAGE_OUTPUTS), *RPN_LOSSES, *ROI_LOSSES]
    ledger = ScaledLedger(
        values,
        inputs=[*STEP_INPUTS, *(f"image{i}_{name}" for i in images for name in IMAGE_INPUTS)],
        expected=[*expected, "grad_names", "grad_norms", *(f"grad.{name}" for name in FULL_GRADIENTS)],
    )
    golden = GoldenDetector(folder)
    model, _ = golden.load("base", *LEGACY, *EVERY_CELL)
    with order_of_the_release(model):
        step = take_step(model, values)
    for i in images:
        for name, value in {**_rpn_stage(step, i), **_roi_stage(step, i)}.items():
            yield _compare_stage(ledger, f"image{i}_{name}", name, value)
    for name, loss in step.losses.items():
        yield ledger.scaled(name, loss, LOSSES)
    yield from _compare_gradients(ledger, step.model)
    yield from _compare_as_trained(ledger, take_step(golden.load("base", *LEGACY)[0], values))
    yield from ledger.rest()


def take_step(model: nn.Module, values: Mapping[str, np.ndarray]) -> Step:
    """One forward and backward pass on the pictures of the file."""
    rpn, heads = model.train().proposal_generator, model.roi_heads
    watched = {
        "sampled_anchors": (rpn, "_subsample_labels"),
        "rpn_losses": (rpn, "losses"),
        "sampled_regions": (heads, "label_and_sample_proposals"),
        "predictor": (heads.box_predictor, "forward"),
    }
    with recorded(**watched) as calls, identity_permutations(), EventStorage():
        losses = model(_batch(values))
        sum(losses.values()).backward()
    return Step(calls, {name: loss.detach() for name, loss in losses.items()}, model)


def _batch(values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Training inputs: a query each, with the supports of its class and of another one."""
    batch = []
    for i, crops in enumerate(values["support_images_hwc_uint8"]):
        picture, boxes = values[f"image{i}_hwc_uint8"], torch.from_numpy(values[f"image{i}_gt_boxes"])
        classes = torch.full((len(boxes),), i + 1)  # the detector takes every class for a match
        batch.append(
            {
                "image": torch.from_numpy(picture).permute(2, 0, 1),
                "instances": Instances(picture.shape[:2], gt_boxes=Boxes(boxes), gt_classes=classes),
                "support_images": torch.from_numpy(crops).permute(0, 3, 1, 2),
                "support_boxes": torch.from_numpy(values["support_boxes"][i]),
            }
        )
    return batch


def _rpn_stage(step: Step, image: int) -> dict[str, Any]:
    """Arrays of the RPN for one image; row 0 is the positive pass."""
    ((anchors, logits, labels, deltas, boxes),) = (call.args for call in step.calls["rpn_losses"])
    rows = slice(2 * image, 2 * image + 2)
    part = (anchors, [logits[0][rows]], labels[rows], [deltas[0][rows]], boxes[rows])
    with EventStorage(), torch.no_grad():
        losses = type(step.model.proposal_generator).losses(step.model.proposal_generator, *part)
    return {
        "anchors": Boxes.cat(anchors).tensor,
        "rpn_logits": logits[0][rows],
        "rpn_deltas": deltas[0][rows],
        "anchor_labels_sampled": torch.stack([call.result for call in step.calls["sampled_anchors"][rows]]),
        "anchor_labels_in_loss": torch.stack(labels[rows]),
        "anchor_matched_gt": torch.stack(boxes[rows]),
        **losses,
    }


def _roi_stage(step: Step, image: int) -> dict[str, Any]:
    """Arrays of the heads for one image; rows of the positive pass come first."""
    (regions,), (predictor,) = step.calls["sampled_regions"], step.calls["predictor"]
    passes = regions.result[2 * image : 2 * image + 2]
    sizes = [len(found) for found in regions.result]
    rows = slice(sum(sizes[: 2 * image]), sum(sizes[: 2 * image + 2]))
    logits, deltas = (tensor[rows] for tensor in predictor.result)
    classes = torch.cat([found.gt_classes for found in passes])
    boxes, targets = (Boxes.cat([f.get(key) for f in passes]).tensor for key in ("proposal_boxes", "gt_boxes"))
    heads = step.model.roi_heads
    arguments = {"positives": len(passes[0]), "transform": heads.box2box_transform, "legacy_boundary": True}
    losses, _ = image_losses(logits, deltas, classes, boxes, targets, **arguments)
    computed = {
        "det_logits": logits,
        "det_deltas": deltas,
        "det_gt_classes_in_loss": classes,
        "det_gt_boxes": targets,
        "det_boxes": boxes,
        **losses,
    }
    for which, found, proposals in zip(("pos", "neg"), passes, regions.args[0][2 * image :], strict=False):
        computed[f"{which}_num_rpn_proposals"] = torch.tensor(len(proposals))
        computed[f"{which}_sampled_boxes"] = found.proposal_boxes.tensor
    return computed


def _compare_stage(ledger: ScaledLedger, name: str, kind: str, value: Tensor) -> Comparison:
    """By the kind of array: exact, in pixels, losses, or features."""
    value = value.detach().numpy()
    if kind in EXACT:
        return ledger.compare(name, value)
    if kind in IN_PIXELS:
        return ledger.within(name, value, PIXELS)
    return ledger.scaled(name, value, **({"tolerance": LOSSES} if kind in RPN_LOSSES + ROI_LOSSES else {}))


def _compare_gradients(ledger: ScaledLedger, model: nn.Module) -> Iterator[Comparison]:
    """Names, norms (which parameters have none is exact), and the gradients that the file has in full."""
    gradients, norms = _gradients(model)
    in_file = [name for name in ledger.values.get("grad_names", np.array([])).tolist() if name in norms]
    in_file += sorted(norms.keys() - set(in_file))  # their order is the file's
    yield ledger.compare("grad_names", np.array(in_file))
    found = np.array([norms[name] for name in in_file])
    yield ledger.scaled("grad_norms", found, GRADIENTS)
    if "grad_norms" in ledger.values:
        yield compare("grad_norms (none)", ledger.values["grad_norms"] == FROZEN, found == FROZEN)
    for name in FULL_GRADIENTS:
        gradient = gradients.get(name)
        yield ledger.scaled(f"grad.{name}", np.array(np.nan) if gradient is None else gradient, GRADIENTS)


def _gradients(model: nn.Module) -> tuple[dict[str, Tensor | None], dict[str, float]]:
    """Gradient and its norm by parameter."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients, {name: FROZEN if g is None else float(g.double().norm()) for name, g in gradients.items()}


def _compare_as_trained(ledger: ScaledLedger, step: Step) -> Iterator[Comparison]:
    """The same pass in the order of training: all passes and images at once, without the cells that res5 skips."""
    for name, loss in step.losses.items():
        yield ledger.scaled(name, loss, LOSSES, AS_TRAINED)
    _, norms = _gradients(step.model)
    in_file = ledger.values.get("grad_names", np.array([])).tolist()
    yield ledger.scaled("grad_norms", np.array([norms.get(name, np.nan) for name in in_file]), GRADIENTS, AS_TRAINED)
