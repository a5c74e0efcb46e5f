"""Golden layers and box predictor of DeFRCN: gradient decoupling, affine layer, losses, dropout, detections.

Source: DeFRCN (Qiao et al., ICCV 2021), official implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fsdet.engine.parity import Comparison, Ledger, compare, golden_file, read_npz
from fsdet.engine.setup import default_config
from fsdet.layers.gradient import ChannelAffine, scale_gradient
from fsdet.modeling.roi_heads import build_box_predictor

# a: what every factor has.
GDL_OUTPUTS = (
    "y", "grad_x", "grad_weight", "grad_bias", "gdl_only_y", "gdl_only_grad_x", "nobias_y", "nobias_grad_weight",
)  # fmt: skip
GDL_INPUTS = ("x", "grad_out", "weight", "bias", "lambdas")
# b: the predictors, and what each of them has.
PREDICTORS = ("k5", "k20", "agnostic", "allbg")
PARAMETERS = ("cls_weight", "cls_bias", "box_weight", "box_bias")
PREDICTOR_INPUTS = (
    "features", *PARAMETERS, "image_sizes_hw", "rois_per_image", "proposal_boxes", "gt_boxes", "gt_classes",
    "infA_params", "infB_params", "dropout_seed", "dropout_mask",
)  # fmt: skip
PREDICTOR_OUTPUTS = (
    "logits", "deltas", "loss_cls", "loss_box_reg", "loss_box_reg_beta1", "pred_probs", "pred_boxes_all",
    "dropout_logits", "metric_cls_accuracy", "grad_features", *(f"grad_{name}" for name in PARAMETERS),
)  # fmt: skip
FOREGROUND_METRICS = ("metric_fg_cls_accuracy", "metric_false_negative")
DETECTION_FIELDS = ("boxes", "scores", "classes", "rows")


def check_gradient(folder: Path) -> Iterator[Comparison]:
    """a: gradient decoupled layer and affine layer, forward and backward, for every factor."""
    values = read_npz(golden_file(folder, "a_gdl_affine"))
    count = len(values["lambdas"])
    expected = [f"l{i}_{name}" for i in range(count) for name in GDL_OUTPUTS]
    ledger = Ledger(values, inputs=GDL_INPUTS, expected=["init_weight", "init_bias", *expected])
    fresh = ChannelAffine(values["x"].shape[1])
    yield ledger.compare("init_weight", fresh.weight.detach().numpy())
    yield ledger.compare("init_bias", fresh.bias.detach().numpy())
    for i, scale in enumerate(values["lambdas"].tolist()):
        computed = {
            **_backward(values, scale, "", _affine(values, bias=True)),
            **_backward(values, scale, "gdl_only_", nn.Identity()),
            **_backward(values, scale, "nobias_", _affine(values, bias=False)),
        }
        for name in GDL_OUTPUTS:
            yield ledger.compare(f"l{i}_{name}", computed[name])
    yield from ledger.rest()


def _affine(values: Mapping[str, np.ndarray], *, bias: bool) -> nn.Module:
    """The affine layer with the parameters of the file."""
    layer = ChannelAffine(values["x"].shape[1], bias=bias)
    names = ("weight", "bias") if bias else ("weight",)
    layer.load_state_dict({name: torch.from_numpy(values[name]) for name in names})
    return layer


def _backward(values: Mapping[str, np.ndarray], scale: float, prefix: str, layer: nn.Module) -> dict[str, np.ndarray]:
    """Output and gradients of `layer` behind a gradient decoupled layer."""
    x = torch.from_numpy(values["x"]).requires_grad_()
    y = layer(scale_gradient(x, scale))
    y.backward(torch.from_numpy(values["grad_out"]))
    tensors = {"y": y.detach(), "grad_x": x.grad, **{f"grad_{n}": p.grad for n, p in layer.named_parameters()}}
    return {prefix + name: tensor.numpy() for name, tensor in tensors.items()}


def check_predictor(folder: Path) -> Iterator[Comparison]:
    """b: linear heads, losses and their gradients, dropout, and the way from scores to detections."""
    values = read_npz(golden_file(folder, "b_fast_rcnn"))
    names = [(prefix, _part(values, prefix)) for prefix in PREDICTORS]
    ledger = Ledger(
        values,
        inputs=[f"{prefix}/{name}" for prefix in PREDICTORS for name in PREDICTOR_INPUTS],
        expected=[f"{prefix}/{name}" for prefix, part in names for name in _predictor_outputs(part)],
    )
    for prefix, part in names:
        computed = {**_losses(part), **_detections(part, "infA"), **_detections(part, "infB")}
        for name, value in computed.items():
            yield ledger.compare(f"{prefix}/{name}", value)
        yield from _compare_dropout(ledger, prefix, part)
    yield from ledger.rest()


def _part(values: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in values.items() if name.startswith(f"{prefix}/")}


def _predictor_outputs(part: Mapping[str, np.ndarray]) -> list[str]:
    """What one predictor of the file must have."""
    images = range(len(part["rois_per_image"]))
    found = [f"{run}_img{i}_{field}" for run in ("infA", "infB") for i in images for field in DETECTION_FIELDS]
    has_foreground = bool((part["gt_classes"] < len(part["cls_bias"]) - 1).any())
    return [*PREDICTOR_OUTPUTS, *found, *(FOREGROUND_METRICS if has_foreground else ())]


def _predictor(part: Mapping[str, np.ndarray], **keys: Any) -> nn.Module:
    """The predictor that a detector of this configuration has, with the weights of the file."""
    cfg: CfgNode = default_config()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(part["cls_bias"]) - 1
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = len(part["box_bias"]) == 4
    cfg.merge_from_list([word for pair in keys.items() for word in pair])
    predictor = build_box_predictor(cfg, ShapeSpec(channels=part["features"].shape[1]))
    names = {"cls": "cls_score", "box": "bbox_pred"}
    state = {f"{names[n.split('_')[0]]}.{n.split('_')[1]}": torch.from_numpy(part[n]) for n in PARAMETERS}
    predictor.load_state_dict(state)
    return predictor


def _proposals(part: Mapping[str, np.ndarray]) -> list[Instances]:
    """The regions of each image, matched to their ground truth."""
    ends = np.cumsum(part["rois_per_image"]).tolist()
    proposals = []
    for size, count, end in zip(part["image_sizes_hw"].tolist(), part["rois_per_image"].tolist(), ends, strict=True):
        rows = slice(end - count, end)
        proposals.append(
            Instances(
                tuple(size),
                proposal_boxes=Boxes(torch.from_numpy(part["proposal_boxes"][rows])),
                gt_boxes=Boxes(torch.from_numpy(part["gt_boxes"][rows])),
                gt_classes=torch.from_numpy(part["gt_classes"][rows]),
            )
        )
    return proposals


def _losses(part: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Scores, deltas, losses, their gradients and the logged metrics."""
    predictor, proposals = _predictor(part, **{"MODEL.ROI_HEADS.OUTPUT_LAYER": "linear"}), _proposals(part)
    features = torch.from_numpy(part["features"]).requires_grad_()
    with EventStorage() as storage:
        predictions = predictor(features)
        losses = predictor.losses(predictions, proposals)
        sum(losses.values()).backward()
        computed: dict[str, Any] = {f"metric_{n.split('/')[1]}": v for n, (v, _) in storage.latest().items()}
        smooth = _predictor(part, **{"MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 1.0})
        losses["loss_box_reg_beta1"] = smooth.losses(smooth(features), proposals)["loss_box_reg"]
    tensors = {
        "logits": predictions[0],
        "deltas": predictions[1],
        "pred_probs": torch.cat(predictor.predict_probs(predictions, proposals)),
        "pred_boxes_all": torch.cat(predictor.predict_boxes(predictions, proposals)),
        **losses,
        "grad_features": features.grad,
        "grad_cls_weight": predictor.cls_score.weight.grad,
        "grad_cls_bias": predictor.cls_score.bias.grad,
        "grad_box_weight": predictor.bbox_pred.weight.grad,
        "grad_box_bias": predictor.bbox_pred.bias.grad,
    }
    return computed | {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _detections(part: Mapping[str, np.ndarray], run: str) -> dict[str, np.ndarray]:
    """Detections of every image under one set of thresholds."""
    score, overlap, most = part[f"{run}_params"].tolist()
    predictor = _predictor(
        part,
        **{
            "MODEL.ROI_HEADS.OUTPUT_LAYER": "dropout",
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": score,
            "MODEL.ROI_HEADS.NMS_THRESH_TEST": overlap,
            "TEST.DETECTIONS_PER_IMAGE": round(most),
        },
    ).eval()
    with torch.no_grad():
        found, rows = predictor.inference(predictor(torch.from_numpy(part["features"])), _proposals(part))
    computed = {}
    for i, (instances, kept) in enumerate(zip(found, rows, strict=True)):
        fields = (instances.pred_boxes.tensor, instances.scores, instances.pred_classes, kept)
        computed |= {f"{run}_img{i}_{n}": v.numpy() for n, v in zip(DETECTION_FIELDS, fields, strict=True)}
    return computed


def _compare_dropout(ledger: Ledger, prefix: str, part: Mapping[str, np.ndarray]) -> Iterator[Comparison]:
    """Training with dropout: by the multipliers of the file, and by its seed where the generators agree."""
    features = torch.from_numpy(part["features"])
    predictor = _predictor(part, **{"MODEL.ROI_HEADS.OUTPUT_LAYER": "dropout"}).train()
    torch.manual_seed(int(part["dropout_seed"]))
    seeded = predictor(features)[0].detach().numpy()
    name = f"{prefix}/dropout_logits (by the seed)"
    yield compare(name, part["dropout_logits"], seeded, optional=True)
    predictor.dropout = _Multiply(torch.from_numpy(part["dropout_mask"]))
    logits, deltas = (tensor.detach().numpy() for tensor in predictor(features))
    yield ledger.compare(f"{prefix}/dropout_logits", logits)
    yield compare(f"{prefix}/deltas (with dropout)", part["deltas"], deltas)


class _Multiply(nn.Module):
    """Dropout with known multipliers."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask: Callable[[], Tensor] = lambda: mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask()
