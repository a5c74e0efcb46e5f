"""Golden detector of DeFRCN layer by layer: evaluation, losses and gradients of both stages, switches and scales.

Sampling is exhaustive, so that no random choice matters. Gradients are compared twice: element by element with
MODEL.ROI_HEADS.SKIP_UNREAD_CELLS off, and by their norm with it on, since another order of summation moves a few
activations over the kink of a ReLU.

Source: DeFRCN (Qiao et al., ICCV 2021), official implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fsdet.engine.parity import Comparison, Ledger, compare
from fsdet.engine.parity_detector import (
    EXHAUSTIVE,
    HEADS,
    LOSSES,
    NO_DROPOUT,
    PREDICTOR,
    STAGES,
    GoldenDetector,
    build_small,
    gradients,
    official_name,
    train_once,
)

SAMPLED = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64")
EVERY_CELL = ("MODEL.ROI_HEADS.SKIP_UNREAD_CELLS", "False")
NO_DECOUPLING = ("MODEL.RPN.ENABLE_DECOUPLE", "False", "MODEL.ROI_HEADS.ENABLE_DECOUPLE", "False")
METRICS = (
    "rpn/num_pos_anchors", "rpn/num_neg_anchors", "roi_head/num_fg_samples", "roi_head/num_bg_samples",
    "fast_rcnn/cls_accuracy", "fast_rcnn/fg_cls_accuracy", "fast_rcnn/false_negative",
)  # fmt: skip
SHARED_EVAL = (
    "rpn_logits", "rpn_deltas", "res4", "affine_rpn_out", "affine_rcnn_out", "pooled_first4", "res5_first4",
)  # fmt: skip
EVAL = ("cls_logits", "box_deltas", "roi_mean_features")
FOUND = ("boxes", "scores", "classes")
# The two branches' scales, as in the names of the file, and the gradients that are stored for them.
SWEEP = (("1", "1"), ("0", "0"), ("0.1", "0.01"))
RES4, AFFINE = "backbone.res4.0.conv1.weight", "affine_rpn.weight"
FEATURE_TOLERANCE, BOX_TOLERANCE = 1e-4, 2e-3
# Norm of the difference over the norm of the gradient, where unread cells are skipped.
NORM_TOLERANCE = 1e-3


def detect(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Detections of a batch, and what the layers on the way to them gave."""
    kept: dict[str, Any] = {}
    heads, rpn = model.roi_heads, model.proposal_generator
    watched = {
        "res4": model.backbone, "rpn": rpn.rpn_head, "affine_rpn": rpn.decouple, "affine_rcnn": heads.decouple,
        "proposals": rpn, "pooled": heads.pooler, "res5": heads.res5, "predictor": heads.box_predictor,
    }  # fmt: skip
    with ExitStack() as stack, torch.no_grad():
        for name, module in watched.items():
            hook = module.register_forward_hook(lambda _, args, out, name=name: kept.update({name: (args, out)}))
            stack.callback(hook.remove)
        found = [output["instances"] for output in model.eval()(batch)]
    tensors = {
        "rpn_logits": kept["rpn"][1][0][0],
        "rpn_deltas": kept["rpn"][1][1][0],
        "res4": kept["res4"][1]["res4"],
        "affine_rpn_out": kept["affine_rpn"][1]["res4"],
        "affine_rcnn_out": kept["affine_rcnn"][1]["res4"],
        "pooled_first4": kept["pooled"][1][:4],
        "res5_first4": kept["res5"][1][:4],
        "roi_mean_features": kept["predictor"][0][0],
        "cls_logits": kept["predictor"][1][0],
        "box_deltas": kept["predictor"][1][1],
    }
    for i, (proposals, instances) in enumerate(zip(kept["proposals"][1][0], found, strict=True)):
        tensors |= {f"proposal_boxes{i}": proposals.proposal_boxes.tensor}
        tensors |= {f"proposal_logits{i}": proposals.objectness_logits}
        fields = (instances.pred_boxes.tensor, instances.scores, instances.pred_classes)
        tensors |= {f"{name}{i}": value for name, value in zip(FOUND, fields, strict=True)}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def check_detector(folder: Path) -> Iterator[Comparison]:
    """d_model: evaluation and training of both stages, switches and scales of the decoupling."""
    golden = GoldenDetector(folder)
    model, _ = golden.load("base")
    official = [official_name(name) for name in model.state_dict()]
    trained = {stage: _trained(stage) for stage in STAGES}
    ledger = Ledger(
        golden.values,
        inputs=_detector_inputs(official),
        expected=_detector_outputs(trained),
        optional=[f"novel_seeded/{name}" for name in ("seed", *LOSSES)],
    )
    for stage in STAGES:
        yield from _compare_eval(ledger, golden, stage)
        yield from _compare_training(ledger, golden, stage)
    yield from _compare_seeded(ledger, golden)
    yield from _compare_switches(ledger, golden)
    yield from ledger.rest()


def _detector_inputs(official: Sequence[str]) -> list[str]:
    names = [f"weights/{name}" for name in official if name not in PREDICTOR]
    names += [f"{prefix}/{name}" for prefix in HEADS.values() for name in PREDICTOR]
    names += ["torch_version", "input/output_hw", *(f"input/image{i}_bgr_uint8" for i in (0, 1))]
    return names + [f"{stage}/gt_{field}{i}" for stage in STAGES for field in ("boxes", "classes") for i in (0, 1)]


def _trained(stage: str) -> list[str]:
    return [official_name(name) for name, p in build_small(stage)[0].named_parameters() if p.requires_grad]


def _detector_outputs(trained: Mapping[str, Sequence[str]]) -> list[str]:
    names = []
    for stage in STAGES:
        found = [f"{field}{i}" for field in (*FOUND, "proposal_boxes", "proposal_logits") for i in (0, 1)]
        names += [f"{stage}/eval/{name}" for name in (*(SHARED_EVAL if stage == "base" else ()), *EVAL, *found)]
        names += [f"{stage}/eval_single1/{name}" for name in FOUND]
        names += [f"{stage}/train/{name}" for name in (*LOSSES, "trainable", "frozen")]
        names += [f"{stage}/train/metric/{name}" for name in METRICS]
        names += [f"{stage}/train/grad/{name}" for name in trained[stage]]
    names += [f"base_nodecouple/train/{name}" for name in (*LOSSES, f"grad/{RES4}")]
    return names + [f"scale_sweep/rpn{a}_rcnn{b}/grad/{name}" for a, b in SWEEP for name in (RES4, AFFINE)]


def _eval_tolerance(name: str) -> dict[str, float]:
    """By the kind of array: boxes in pixels, scores, and features or logits."""
    if "boxes" in name:
        return {"tolerance": BOX_TOLERANCE}
    return {} if name.startswith(("scores", "classes")) else {"tolerance": FEATURE_TOLERANCE}


def _compare_eval(ledger: Ledger, golden: GoldenDetector, stage: str) -> Iterator[Comparison]:
    """Two pictures in one batch, the second one alone, and both with the pooled cells that res5 does not read."""
    model, cfg = golden.load(stage)
    found = detect(model, golden.batch(stage))
    pooled = found.pop("pooled_first4")
    for name, value in found.items():
        if name not in SHARED_EVAL or stage == "base":
            yield ledger.compare(f"{stage}/eval/{name}", value, **_eval_tolerance(name))
    alone = detect(model, golden.batch(stage, only=(1,)))
    for name in FOUND:
        yield ledger.compare(f"{stage}/eval_single1/{name}", alone[f"{name}0"], **_eval_tolerance(name))
    if stage == "base":
        name, step = f"{stage}/eval/pooled_first4", -(-cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION // pooled.shape[2])
        read = golden.values[name][:, :, ::step, ::step]
        yield compare(f"{name} (cells that res5 reads)", read, pooled, tolerance=FEATURE_TOLERANCE)
        whole = detect(golden.load(stage, *EVERY_CELL)[0], golden.batch(stage))
        yield ledger.compare(name, whole["pooled_first4"], tolerance=FEATURE_TOLERANCE)


def _compare_training(ledger: Ledger, golden: GoldenDetector, stage: str) -> Iterator[Comparison]:
    """Losses, metrics and every gradient of one pass without dropout; which parameters train."""
    model, _ = golden.load(stage, *EXHAUSTIVE, *NO_DROPOUT, *EVERY_CELL)
    losses, metrics = train_once(model, golden.batch(stage))
    for name in LOSSES:
        yield ledger.compare(f"{stage}/train/{name}", losses[name])
    for name in METRICS:
        yield ledger.compare(f"{stage}/train/metric/{name}", np.array(metrics.get(name)))
    for name, gradient in gradients(model).items():
        yield ledger.compare(f"{stage}/train/grad/{name}", gradient)
    for kind, trains in (("trainable", True), ("frozen", False)):
        names = {official_name(name) for name, p in model.named_parameters() if p.requires_grad is trains}
        in_file = [name for name in ledger.values.get(f"{stage}/train/{kind}", np.array([])).tolist() if name in names]
        in_file += sorted(names - set(in_file))  # their order is the file's
        yield ledger.compare(f"{stage}/train/{kind}", np.array(in_file))
    yield from _compare_skipping(ledger, golden, stage)


def _compare_skipping(ledger: Ledger, golden: GoldenDetector, stage: str) -> Iterator[Comparison]:
    """The same pass as training does it, without the cells that res5 does not read."""
    model, _ = golden.load(stage, *EXHAUSTIVE, *NO_DROPOUT)
    losses, _ = train_once(model, golden.batch(stage))
    found = {name: losses[name] for name in LOSSES} | {f"grad/{n}": value for n, value in gradients(model).items()}
    for name, value in found.items():
        label, expected = f"{stage}/train/{name}", ledger.values.get(f"{stage}/train/{name}")
        if expected is None or expected.shape != value.shape:
            continue  # reported above
        if name in LOSSES:
            yield compare(f"{label} (unread cells skipped)", expected, value)
        else:
            difference = float(np.linalg.norm(value - expected))
            relative = difference / max(float(np.linalg.norm(expected)), np.finfo(np.float32).tiny)
            note = "unread cells skipped, by norm"
            yield Comparison(f"{label} (skipped)", difference, relative, relative <= NORM_TOLERANCE, note=note)


def _compare_seeded(ledger: Ledger, golden: GoldenDetector) -> Iterator[Comparison]:
    """Random sampling and dropout, where the generators agree."""
    if "novel_seeded/seed" not in ledger.values:
        return
    model, _ = golden.load("novel", *SAMPLED)
    torch.manual_seed(int(ledger.values["novel_seeded/seed"]))
    losses, _ = train_once(model, golden.batch("novel"))
    yield ledger.custom(Comparison("novel_seeded/seed", 0.0, 0.0, True, optional=True, note="input"))
    for name in LOSSES:
        yield ledger.compare(f"novel_seeded/{name}", losses[name])


def _compare_switches(ledger: Ledger, golden: GoldenDetector) -> Iterator[Comparison]:
    """The decoupling switched off, and other scales."""
    model, _ = golden.load("base", *EXHAUSTIVE, *NO_DECOUPLING, *EVERY_CELL)
    losses, _ = train_once(model, golden.batch("base"))
    found = {**losses, f"grad/{RES4}": gradients(model)[RES4]}
    for name, value in found.items():
        yield ledger.compare(f"base_nodecouple/train/{name}", value)
    for a, b in SWEEP:
        scales = ("MODEL.RPN.BACKWARD_SCALE", f"{float(a)}", "MODEL.ROI_HEADS.BACKWARD_SCALE", f"{float(b)}")
        model, _ = golden.load("base", *EXHAUSTIVE, *scales, *EVERY_CELL)
        train_once(model, golden.batch("base"))
        for name in (RES4, AFFINE):
            yield ledger.compare(f"scale_sweep/rpn{a}_rcnn{b}/grad/{name}", gradients(model)[name])
