"""From the items of a training batch to its classes and targets.

Every scene of a batch is searched for the classes of all its scenes, so that a class meets scenes without it.

Source: OS2D (Osokin et al., ECCV 2020) and its release, training batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor

from fsdet.methods.os2d.targets import SceneTargets, assign, remap

_KEYS = ("image", "instances", "support_images", "support_classes")
OTHER_CLASS = -1  # class_index of an object whose class the batch does not search for


@dataclass(frozen=True)
class Labelling:
    """Overlaps that decide what an anchor is.

    Attributes:
        positive, negative: of the anchor itself.
        is_remapped: whether the predicted box decides for the class loss instead.
        remap_positive, remap_negative: of the predicted box.
    """

    positive: float = 0.5
    negative: float = 0.1
    is_remapped: bool = True
    remap_positive: float = 0.8
    remap_negative: float = 0.4

    def __call__(self, anchors: Tensor, targets: Sequence[SceneTargets], codes: Tensor) -> dict[str, Tensor | None]:
        """What `Objective` compares a batch with.

        Args:
            anchors: (N, 4) XYXY, pixels.
            targets: of the B scenes, in the frame of the anchors.
            codes: (B, C, N, 4), predicted; no gradient comes back.
        Returns: "labels" (B, C, N), "target_codes" (B, C, N, 4), and "remapped" (B, C, N) or None.
        """
        limits = {"positive": self.positive, "negative": self.negative}
        labels, target_codes = zip(*(assign(anchors, own, codes.shape[1], **limits) for own in targets), strict=True)
        remapped = None
        if self.is_remapped:
            limits = {"positive": self.remap_positive, "negative": self.remap_negative}
            pairs = zip(codes.detach(), targets, strict=True)
            remapped = torch.stack([remap(found, anchors, own, **limits) for found, own in pairs])
        return {"labels": torch.stack(labels), "target_codes": torch.stack(target_codes), "remapped": remapped}


def check_items(batched_inputs: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for training inputs without supports, with too few of them, or of different sizes."""
    for item in batched_inputs:
        if missing := [key for key in _KEYS if key not in item]:
            raise ValueError(
                f"A training input of OS2D lacks {missing}; it has {sorted(item)}. Set INPUT.PATCH.ENABLED True, which "
                "cuts patches of one size and adds supports"
            )
        counts = len(item["support_images"]), len(item["support_classes"])
        if counts[0] != counts[1]:
            raise ValueError(
                f"A training input of OS2D has {counts[0]} supports of {counts[1]} classes; expected one each"
            )
    sizes = {tuple(item["image"].shape) for item in batched_inputs}
    if len(sizes) > 1:
        raise ValueError(f"Training inputs of OS2D have the sizes {sorted(sizes)}; expected patches of one size")


def join_classes(batched_inputs: Sequence[dict[str, Any]], limit: int) -> tuple[list[int], list[Tensor]]:
    """The classes that a batch is searched for, and a support of each.

    Args:
        batched_inputs: items with "support_images" and "support_classes"; the first item that brings a class gives its
            support. "mined_class" is the class of a mined patch, which is always among those searched for.
        limit: classes, at most (mined ones may be more). Which ones of more is drawn with PyTorch's generator.
    Returns: C class ids, rising, and pictures (3, h, w).
    """
    supports: dict[int, Tensor] = {}
    for item in batched_inputs:
        for class_id, picture in zip(item["support_classes"], item["support_images"], strict=True):
            supports.setdefault(int(class_id), picture)
    wanted = {int(item["mined_class"]) for item in batched_inputs if "mined_class" in item}
    chosen = sorted(wanted & supports.keys())
    others = sorted(supports.keys() - wanted)
    room = max(0, limit - len(chosen))
    if len(others) > room:
        others = [others[place] for place in torch.randperm(len(others))[:room].tolist()]
    class_ids = sorted(chosen + others)
    return class_ids, [supports[class_id] for class_id in class_ids]


def targets_of(instances: Instances, class_ids: Sequence[int], device: torch.device) -> SceneTargets:
    """Ground truth of a patch for the classes of its batch.

    Args:
        instances: `gt_boxes`, `gt_classes` and, where there are difficult objects, `gt_difficult`.
        class_ids: the C classes of the batch, rising.
    """
    boxes = instances.gt_boxes.tensor.to(device)
    found = instances.gt_classes.to(device)
    known = torch.tensor(list(class_ids), dtype=torch.int64, device=device)
    matches = found[:, None] == known
    index = torch.where(matches.any(dim=1), matches.long().argmax(dim=1), OTHER_CLASS) if len(known) else found * 0 - 1
    difficult = instances.gt_difficult.to(device) if instances.has("gt_difficult") else torch.zeros_like(index).bool()
    return SceneTargets(boxes, index, difficult)
