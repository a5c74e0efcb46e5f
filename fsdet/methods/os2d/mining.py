"""Hard patches: where the detector goes wrong, as crops that training should see again.

Every anchor proposes the crop around it. Of each picture three lists are kept: crops with the costliest negatives
("neg"), with the costliest positives ("pos"), and with the worst boxes of positives ("pos_loc"). Crops of one list
overlap little. Equal crops suppress each other whatever their classes are, so only the costliest class of each anchor
needs to be kept, which bounds the memory by the number of anchors.

Source: OS2D (Osokin et al., ECCV 2020), hard patch mining in the form of the release. Departure: a crop without any
loss is no hard one and enters no list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import nms

from fsdet.data.patches import KINDS, MinedPatch
from fsdet.methods.os2d.geometry import STRIDE
from fsdet.methods.os2d.objective import AnchorLosses


@dataclass(frozen=True)
class Candidates:
    """Crops that compete for one list.

    Attributes:
        crops: (M, 4) XYXY, pixels of the stored picture.
        losses: (M,) float, above 0.
        class_ids: (M,) int64.
    """

    crops: Tensor
    losses: Tensor
    class_ids: Tensor


def crop_for_anchors(anchors: Tensor, scene_size: tuple[int, int], *, side: int = 600) -> Tensor:
    """The crop that each anchor proposes: centred as far as stride and border allow.

    Args:
        anchors: (N, 4) XYXY, pixels of the scene as the network sees it.
        scene_size: (height, width) of the scene.
        side: of a crop, pixels.

    Returns:
        (N, 4) XYXY in the scene, the upper left corner on the grid of the feature map. A crop lies in the scene; along
        a side that is shorter than the crop it begins at 0 and reaches beyond.
    """
    corners = []
    for axis, length in ((0, scene_size[1]), (1, scene_size[0])):
        centres = (anchors[:, axis] + anchors[:, axis + 2]) / 2
        start = _grid((centres - side / 2).clamp(min=0))
        overflow = (start + side - length).clamp(min=0)
        corners.append((start + _grid(-overflow)).clamp(min=0))
    start = torch.stack(corners, dim=1)
    return torch.cat([start, start + side], dim=1)


def _grid(lengths: Tensor) -> Tensor:
    """Round down to multiples of the stride."""
    return (lengths / STRIDE).floor() * STRIDE


@torch.no_grad()
def hardest_crops(crops: Tensor, losses: AnchorLosses, class_ids: Tensor) -> dict[str, Candidates]:
    """The costliest class of every anchor, for each of the three lists.

    Args:
        crops: (N, 4) XYXY, pixels of the stored picture (`decoding.to_frame` takes them there).
        losses: (C, N) each, of one picture at one scale.
        class_ids: (C,) int64.

    Returns:
        Candidates under "neg", "pos" and "pos_loc"; anchors without loss are left out.
    """
    choices = {
        "neg": (losses.class_loss, losses.negative),
        "pos": (losses.class_loss, losses.positive),
        "pos_loc": (losses.box_loss, losses.box_positive),
    }
    found = {}
    for kind, (costs, mask) in choices.items():
        costs = torch.where(mask, costs, 0.0)
        worst, row = costs.max(dim=0) if len(costs) else (costs.sum(dim=0), costs.new_zeros(len(crops)).long())
        places = (worst > 0).nonzero()[:, 0]
        found[kind] = Candidates(crops[places], worst[places], class_ids[row[places]])
    return found


def select_patches(
    candidates: Iterable[Mapping[str, Candidates]], *, top: int = 10, overlap: float = 0.5
) -> list[MinedPatch]:
    """The patches to keep of one picture.

    Args:
        candidates: what `hardest_crops` found in the picture, one for each scale or group of classes.
        top: patches of a list, at most.
        overlap: IoU above which the costlier of two crops of a list removes the other.

    Returns:
        Patches of the lists "neg", "pos" and "pos_loc", in this order, the costliest first.
    """
    candidates = list(candidates)
    patches: list[MinedPatch] = []
    for kind in KINDS if candidates else ():
        crops = torch.cat([found[kind].crops for found in candidates]).float()
        losses = torch.cat([found[kind].losses for found in candidates]).float()
        class_ids = torch.cat([found[kind].class_ids for found in candidates])
        kept = nms(crops, losses, overlap)[:top]
        rows = zip(crops[kept].tolist(), class_ids[kept].tolist(), losses[kept].tolist(), strict=True)
        patches += [MinedPatch(kind, tuple(crop), class_id, loss) for crop, class_id, loss in rows]
    return patches
