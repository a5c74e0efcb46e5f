"""Golden attention RPN and relation heads of FewX, layer by layer.

Everything is computed twice: as the narrow golden detector computes it, and, labelled, in the ways that wide ones take
at inference on a CPU.

Source: FewX (Fan et al., CVPR 2020), official release.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fsdet.engine.parity import Comparison, Ledger, failure, golden_file, read_json, read_npz
from fsdet.engine.parity_fewx_detector import (
    FEATURES,
    SCORES,
    WAYS,
    GoldenDetector,
    ScaledLedger,
    close,
    recorded,
)
from fsdet.methods.fewx.relation import MATCH, MultiRelationHead
from fsdet.methods.fewx.rpn import attention_kernels

PASSES = ("pos", "neg")
ATTENTION_INPUTS = ("query_res4", "support_res4", "support_boxes", "image_size_hw", "gt_boxes", "num_shot")
MAPS = ("kernel", "attention", "objectness_map", "delta_map", "objectness_flat", "deltas_flat")
PROPOSALS = ("train_proposals", "train_proposal_logits", "test_proposals", "test_proposal_logits")
RELATION_INPUTS = ("query_roi_res5", "support_res5")
HEADS = ("global", "local", "patch")
RELATIONS = (
    "global_input", "local_support_embedded", "patch_after_first_pool", *(f"{name}_vector" for name in HEADS),
    *(f"logits_{name}" for name in HEADS), "logits_sum", "box_deltas", "probabilities",
)  # fmt: skip
CELLS = 7  # of a region behind res5, a side
SIGMAS, ROUNDING = 6.0, 1e-6  # two draws of random numbers differ by fewer standard errors


def check_attention(folder: Path) -> Iterator[Comparison]:
    """a: pooled supports, kernels, attention maps, RPN outputs, and proposals in training and test."""
    golden, values = GoldenDetector(folder), read_npz(golden_file(folder, "a_attention_rpn"))
    names = [f"{name}_{which}" for name in (*MAPS, *PROPOSALS) for which in PASSES]
    ledger = ScaledLedger(values, inputs=ATTENTION_INPUTS, expected=["support_roi14", "anchors", *names])
    for label, way in WAYS:
        with way():
            yield from _compare_attention(ledger, golden, values, label)
    yield from ledger.rest()


def _compare_attention(
    ledger: ScaledLedger, golden: GoldenDetector, values: Mapping[str, np.ndarray], label: str
) -> Iterator[Comparison]:
    model, _ = golden.load("base")
    pooled, kernels = _kernels(model, values)
    yield ledger.scaled("support_roi14", pooled, label=label)
    tested = _propose(model, values, kernels, training=False)
    for name in ("anchors", *(f"{name}_{which}" for name in MAPS for which in PASSES)):
        yield ledger.scaled(name, tested[name], label=label)
    found = {"test": tested, "train": _propose(model, values, kernels, training=True)}
    for stage, computed in found.items():
        for which in PASSES:
            boxes, logits = computed[f"proposals_{which}"]
            pair = (f"{stage}_proposals_{which}", boxes), (f"{stage}_proposal_logits_{which}", logits)
            yield from ledger.ranked(*pair, label=label)


@torch.no_grad()
def _kernels(model: nn.Module, values: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pooled supports (2 S, C, P, P), and the kernels (2, C) of the positive and the negative class."""
    features, boxes = (torch.from_numpy(values[name]) for name in ("support_res4", "support_boxes"))
    pooled, _ = model.eval().roi_heads.support_features(features, boxes)
    return pooled, attention_kernels(pooled, int(values["num_shot"]))


@torch.no_grad()
def _propose(model: nn.Module, values: Mapping[str, np.ndarray], kernels: Tensor, *, training: bool) -> dict[str, Any]:
    """What the RPN computes of both passes, named as in the file but for "proposals_*": boxes and logits."""
    rpn, res4 = model.proposal_generator, torch.from_numpy(values["query_res4"])
    size = tuple(values["image_size_hw"].tolist())
    with recorded(head=(rpn.rpn_head, "forward"), decode=(rpn, "predict_proposals")) as calls, EventStorage():
        if training:
            boxes = Boxes(torch.from_numpy(values["gt_boxes"]))
            targets = Instances(size, gt_boxes=boxes, gt_classes=torch.zeros(len(boxes), dtype=torch.int64))
            images = ImageList(res4.new_zeros(1, 3, *size), [size])
            found, _ = rpn.train()(images, {"res4": res4}, [targets], kernels[None])
        else:
            found = rpn.eval().propose(res4, [size], kernels, [(0, 0), (0, 1)])
    (head,), (decode,) = calls["head"], calls["decode"]
    ((attention,),), ((objectness,), (deltas,)) = head.args, head.result
    anchors, (flat_objectness,), (flat_deltas,) = decode.args[:3]
    columns = (kernels[..., None, None], attention, objectness, deltas, flat_objectness, flat_deltas)
    computed = {"anchors": Boxes.cat(anchors).tensor}
    for row, which in enumerate(PASSES):
        computed |= {f"{name}_{which}": value[row : row + 1] for name, value in zip(MAPS, columns, strict=True)}
        computed[f"proposals_{which}"] = found[row].proposal_boxes.tensor, found[row].objectness_logits
    return computed


def check_relations(folder: Path) -> Iterator[Comparison]:
    """b: the three relation heads layer by layer, their sum, box deltas and probabilities."""
    golden, values = GoldenDetector(folder), read_npz(golden_file(folder, "b_relation_heads"))
    ledger = ScaledLedger(values, inputs=RELATION_INPUTS, expected=RELATIONS)
    for label, way in WAYS:
        with way():
            yield from _compare_relations(ledger, golden, values, label)
    yield from ledger.rest()


@torch.no_grad()
def _compare_relations(
    ledger: ScaledLedger, golden: GoldenDetector, values: Mapping[str, np.ndarray], label: str
) -> Iterator[Comparison]:
    heads = golden.load("base")[0].eval().roi_heads
    head: MultiRelationHead = heads.box_predictor
    query, support = (torch.from_numpy(values[name]) for name in RELATION_INPUTS)
    index = torch.zeros(len(query), dtype=torch.int64)
    parts, regions = head.encode(support), head.embed(query)
    with recorded(conv_2=(head.conv_2, "forward")) as calls:
        vectors = head.vectors(regions, parts, index)
    logits, deltas = head(query, parts, index)
    computed = {
        "local_support_embedded": parts.embedded,
        "patch_after_first_pool": calls["conv_2"][0].args[0],
        **{f"{name}_vector": vectors[name] for name in HEADS},
        **{f"logits_{name}": value for name, value in head.scores_by_head(query, parts, index).items()},
        "logits_sum": logits,
        "box_deltas": deltas,
    }
    for name, value in computed.items():
        yield ledger.scaled(name, value, label=label)
    yield _compare_global_input(ledger, head, regions.pooled + parts.pooled, label)
    yield ledger.within("probabilities", logits.softmax(dim=1), SCORES, label)
    scores, _ = heads.score(regions, parts, index, torch.tensor([[0.0, 0.0, 9.0, 9.0]]).expand(len(query), -1))
    if not label:
        yield close("probabilities (of a match)", values["probabilities"][:, MATCH], scores, SCORES)


def _compare_global_input(ledger: ScaledLedger, head: nn.Module, halves: Tensor, label: str) -> Comparison:
    """The concatenation is never made here; compared is what the first layer makes of it."""
    name = "global_input"
    if name not in ledger.values:
        return failure(name + label, "missing in the file")
    wanted = head.fc_1(torch.from_numpy(ledger.values[name]))
    row = close(name + label, wanted, halves, FEATURES * float(wanted.abs().max()))
    row = replace(row, note="what fc_1 makes of it", optional=bool(label))
    return row if label else ledger.custom(row)


def check_initialisation(folder: Path) -> Iterator[Comparison]:
    """b: shape, mean and standard deviation of every tensor of a fresh head of full size."""
    golden = read_json(golden_file(folder, "b_full_size_init_stats"))
    channels = golden["conv_1.weight"]["shape"][1] // 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = MultiRelationHead(channels, CELLS)
    fresh = {name: parameter.detach() for name, parameter in head.named_parameters()}
    ledger = Ledger(golden, expected=fresh)
    for name, tensor in fresh.items():
        if name in golden:
            yield ledger.custom(_compare_draws(name, golden[name], tensor))
    yield from ledger.rest()


def _compare_draws(name: str, expected: Mapping[str, Any], tensor: Tensor) -> Comparison:
    """Whether two tensors of random numbers can be of the same distribution."""
    if set(expected) != {"shape", "mean", "std"} or expected["shape"] != list(tensor.shape):
        return failure(name, f"expected {dict(expected)}, got the shape {list(tensor.shape)}")
    mean, std = float(tensor.double().mean()), float(tensor.double().std())
    # Standard errors of the difference of two means, and of two standard deviations; ROUNDING is the file's.
    error = std * math.sqrt(2 / tensor.numel())
    differences = abs(mean - expected["mean"]), abs(std - expected["std"])
    allowed = SIGMAS * error + ROUNDING, SIGMAS * error / math.sqrt(2) + ROUNDING
    passed = all(difference <= limit for difference, limit in zip(differences, allowed, strict=True))
    worst = max(differences)
    return Comparison(name, worst, worst / (std or 1.0), passed, note="statistics")
