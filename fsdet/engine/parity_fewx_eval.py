"""Golden evaluation of FewX stage by stage: supports, attention maps, proposals, relation heads, detections.

Source: FewX (Fan et al., CVPR 2020), official release.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fsdet.engine.parity import Comparison, compare, golden_file, read_npz
from fsdet.engine.parity_fewx_detector import (
    PIXELS,
    SCORES,
    WAYS,
    GoldenDetector,
    ScaledLedger,
    matching_order,
    recorded,
)
from fsdet.modeling.class_memory import ClassEntry, ClassMemory

INPUTS = (
    "image_chw_uint8", "output_height", "output_width", "support_images_hwc_uint8", "support_boxes",
    "support_coco_category_id", "support_class", "class_order",
)  # fmt: skip
FEATURE_ARRAYS = (
    "normalised_image", "query_res4", "support_res4_avg", "support_res5_avg", "attention_map",
    "proposal_objectness", "query_roi_res5_first4", "class_logits", "box_deltas",
)  # fmt: skip
BOXES = ("proposal_boxes", "final_boxes_network", "final_boxes")
BY_REGION = ("proposal_boxes", "proposal_objectness", "query_roi_res5", "class_logits", "box_deltas")
OUTPUTS = (*FEATURE_ARRAYS, *BOXES, "final_scores", "final_classes")
PIXEL_STEP, FIRST_REGIONS = 16, 4  # the file has every 16th pixel, and a class's first 4 regions


def check_evaluation(folder: Path) -> Iterator[Comparison]:
    """d: one picture and the classes of the file, from the crops of the supports to detections."""
    golden, values = GoldenDetector(folder), read_npz(golden_file(folder, "d_eval"))
    ledger = ScaledLedger(values, inputs=INPUTS, expected=OUTPUTS)
    for label, way in WAYS:
        with way():
            yield from _compare_evaluation(ledger, golden, values, label)
    yield from ledger.rest()


@torch.no_grad()
def _compare_evaluation(
    ledger: ScaledLedger, golden: GoldenDetector, values: Mapping[str, np.ndarray], label: str
) -> Iterator[Comparison]:
    # The limit of the file is reached, so it is the number of its detections.
    model, _ = golden.load("base", "TEST.DETECTIONS_PER_IMAGE", str(len(values["final_boxes"])))
    memory = _encode(model.eval(), values)
    found = {
        "support_res4_avg": memory.stack("kernel")[..., None, None],
        "support_res5_avg": memory.stack("feature"),
        **_detect(model, memory, values),
    }
    order = _proposal_order(values, found["proposal_boxes"])
    for name in BY_REGION:  # near ties within a class may have changed places
        found[name] = torch.stack([rows[places] for rows, places in zip(found[name], order, strict=True)])
    found["query_roi_res5_first4"] = found.pop("query_roi_res5")[:, :FIRST_REGIONS]
    for name in FEATURE_ARRAYS:
        yield ledger.scaled(name, found[name], label=label)
    for name in BOXES:
        yield ledger.within(name, found[name], PIXELS, label)
    yield ledger.within("final_scores", found["final_scores"], SCORES, label)
    classes = values["class_order"][found["final_classes"]]
    if label:
        yield compare(f"final_classes{label}", values["final_classes"], classes, optional=True)
    else:
        yield ledger.compare("final_classes", classes)


def _encode(model: nn.Module, values: Mapping[str, np.ndarray]) -> ClassMemory:
    """Memory of the classes, in their order; the crops of the file are ready-made."""
    memory = ClassMemory(kind=model.memory_kind, encoder=model.memory_encoder)
    crops = torch.from_numpy(values["support_images_hwc_uint8"]).permute(0, 3, 1, 2)
    boxes = torch.from_numpy(values["support_boxes"])
    for class_id in values["class_order"].tolist():
        mine = torch.from_numpy(values["support_class"] == class_id)
        (kernel,), (feature,) = model.encode_crops(crops[mine], boxes[mine], int(mine.sum()))
        memory.add(str(class_id), ClassEntry({"kernel": kernel, "feature": feature}))
    return memory


def _detect(model: nn.Module, memory: ClassMemory, values: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Detections, and what the layers on the way to them gave: class by class, a class's regions best first."""
    model.keep_class_memory(memory)
    rpn, heads = model.proposal_generator, model.roi_heads
    watched = {
        "backbone": (model.backbone, "forward"),
        "rpn_head": (rpn.rpn_head, "forward"),
        "proposals": (rpn, "propose"),
        "regions": (heads, "region_features"),
        "relations": (heads.box_predictor, "relate"),
    }
    entry = {"image": torch.from_numpy(values["image_chw_uint8"])}
    entry |= {side: int(values[f"output_{side}"]) for side in ("height", "width")}
    with recorded(**watched) as calls:
        (network,) = model.inference([entry], do_postprocess=False)
    final = model([entry])[0]["instances"]
    proposals = [found for call in calls["proposals"] for found in call.result]
    counts = [len(found) for found in proposals]
    logits, deltas = (torch.cat([call.result[i] for call in calls["relations"]]) for i in (0, 1))
    regions = torch.cat([call.result for call in calls["regions"]])
    (backbone,) = calls["backbone"]
    network_boxes = network.pred_boxes.tensor
    if np.array_equal(values["final_boxes_network"], values["final_boxes"]):
        # The release rescales its boxes in place, so that a file can have them at this scale under both names.
        network_boxes = network_boxes * network_boxes.new_tensor(_scale(entry))
    return {
        "normalised_image": backbone.args[0][0, :, ::PIXEL_STEP, ::PIXEL_STEP],
        "query_res4": backbone.result["res4"],
        "attention_map": torch.cat([call.args[0][0] for call in calls["rpn_head"]]),
        "proposal_boxes": torch.stack([found.proposal_boxes.tensor for found in proposals]),
        "proposal_objectness": torch.stack([found.objectness_logits for found in proposals]),
        "query_roi_res5": torch.stack(regions.split(counts)),
        "class_logits": torch.stack(logits.split(counts)),
        "box_deltas": torch.stack(deltas.split(counts)),
        "final_boxes_network": network_boxes,
        "final_boxes": final.pred_boxes.tensor,
        "final_scores": final.scores,
        "final_classes": final.pred_classes,
    }


def _scale(entry: Mapping[str, Any]) -> list[float]:
    """Factors from the frame of the network input to that of the output, for a box XYXY."""
    height, width = entry["image"].shape[1:]
    return [entry["width"] / width, entry["height"] / height] * 2


def _proposal_order(values: Mapping[str, np.ndarray], boxes: Tensor) -> list[Tensor]:
    """For each class the order of its proposals in which they are those of the file."""
    expected = values["proposal_boxes"]
    in_file = expected if len(expected) == len(boxes) else boxes.numpy()
    return [torch.from_numpy(matching_order(e, b.numpy())) for e, b in zip(in_file, boxes, strict=True)]
