"""Hard patches: recorded crops, crops by hand, the three lists against a naive selection."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from fsdet.data.patches import MinedPatch
from fsdet.methods.os2d.geometry import anchor_boxes
from fsdet.methods.os2d.mining import crop_for_anchors, hardest_crops, select_patches
from fsdet.methods.os2d.objective import AnchorLosses

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "os2d" / "box_coder.npz")
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["large", "small"])
def test_recorded_crops(name):
    width, height = GOLDEN[f"mining_crops/{name}_image_wh"].tolist()
    anchors = anchor_boxes(-(-height // 16), -(-width // 16), CPU)
    assert torch.equal(anchors, torch.from_numpy(GOLDEN[f"mining_crops/{name}_anchor_boxes"]))
    crops = crop_for_anchors(anchors, (height, width))
    assert torch.equal(crops, torch.from_numpy(GOLDEN[f"mining_crops/{name}_crop_boxes"]))


@pytest.mark.parametrize(
    ("centre", "size", "corner"),
    [
        ((1000, 900), (2000, 2000), (688, 592)),  # 700 and 600 down to the grid
        ((1990, 900), (2000, 2000), (1392, 592)),  # 1680 + 600 passes 2000 by 280: 288 to the left
        ((300, 316), (2000, 2000), (0, 16)),  # the first corner that is not 0
        ((500, 10), (640, 640), (32, 0)),  # 192 + 600 passes by 152: 160
        ((500, 400), (500, 600), (0, 0)),  # as high as the crop; and narrower than it
    ],
)
def test_crops_by_hand(centre, size, corner):
    x, y = centre
    crop = crop_for_anchors(torch.tensor([[x - 120.0, y - 120, x + 120, y + 120]]), size)[0].tolist()
    assert crop == [*corner, corner[0] + 600, corner[1] + 600]


def test_side_of_a_crop():
    crop = crop_for_anchors(torch.tensor([[300.0, 300, 540, 540]]), (900, 900), side=200)
    assert crop.tolist() == [[320, 320, 520, 520]]


def losses_of(class_loss, box_loss=None, labels=None, box_labels=None):
    """(C, N) numbers to losses of anchors; all negative where no label is given."""
    class_loss = torch.as_tensor(class_loss, dtype=torch.float32)
    labels = torch.zeros(class_loss.shape) if labels is None else torch.tensor(labels)
    box_labels = labels if box_labels is None else torch.tensor(box_labels)
    box_loss = torch.zeros_like(class_loss) if box_loss is None else torch.tensor(box_loss)
    return AnchorLosses(class_loss, box_loss, labels == 1, labels == 0, box_labels == 1)


CROPS = torch.tensor([[0.0, 0, 600, 600], [16, 0, 616, 600], [400, 0, 1000, 600], [0, 400, 600, 1000]])


def test_three_lists_by_hand():
    """Crops 0 and 1 overlap by 0.95, the others by at most 0.2."""
    losses = losses_of(
        [[0.1, 0.2, 0.3, 0.0], [0.5, 0.1, 0.4, 0.6]],
        box_loss=[[0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 7.0, 0.9]],
        labels=[[0, 0, 1, 0], [-1, 0, 1, 1]],
        box_labels=[[0, 0, 0, 0], [0, 1, -1, 1]],
    )
    patches = select_patches([hardest_crops(CROPS, losses, torch.tensor([17, 40]))])
    found = [(patch.kind, patch.crop, patch.class_id, round(patch.loss, 6)) for patch in patches]
    crop = [tuple(row) for row in CROPS.tolist()]
    assert found == [
        ("neg", crop[1], 17, 0.2),  # removes crop 0; crop 3 costs nothing
        ("pos", crop[3], 40, 0.6),
        ("pos", crop[2], 40, 0.4),  # of two classes the costlier
        ("pos_loc", crop[1], 40, 2.0),
        ("pos_loc", crop[3], 40, 0.9),
    ]


def naive(parts, kind, top):
    """Greedy selection over all classes and anchors, one crop after the other."""
    rows = []
    for crops, losses, class_ids in parts:
        costs, mask = {
            "neg": (losses.class_loss, losses.negative),
            "pos": (losses.class_loss, losses.positive),
            "pos_loc": (losses.box_loss, losses.box_positive),
        }[kind]
        for c, n in (mask & (costs > 0)).nonzero().tolist():
            rows.append((float(costs[c, n]), int(class_ids[c]), crops[n]))
    rows.sort(key=lambda row: -row[0])
    crops = torch.stack([crop for _, _, crop in rows])
    overlaps, kept = box_iou(crops, crops), []
    for place in range(len(rows)):
        if (overlaps[place, kept] <= 0.5).all():
            kept.append(place)
    chosen = [rows[place] for place in kept[:top]]
    return [MinedPatch(kind, tuple(crop.tolist()), class_id, loss) for loss, class_id, crop in chosen]


def test_lists_of_two_scales_equal_a_naive_selection():
    generator = torch.Generator().manual_seed(5)
    parts = []
    for height, width in ((40, 60), (70, 100)):  # cells
        anchors = anchor_boxes(height, width, CPU)[:: height // 3]
        crops = crop_for_anchors(anchors, (16 * height, 16 * width)) * (100 / width)
        labels = torch.randint(-1, 2, (3, len(crops)), generator=generator)
        costs = torch.rand(2, 3, len(crops), generator=generator)
        boxes = torch.where(labels == 1, costs[1], 0.0)
        losses = AnchorLosses(costs[0] * (labels >= 0), boxes, labels == 1, labels == 0, labels == 1)
        parts.append((crops, losses, torch.tensor([3, 90, 12])))
    patches = select_patches([hardest_crops(*part) for part in parts], top=4)
    assert patches == [patch for kind in ("neg", "pos", "pos_loc") for patch in naive(parts, kind, 4)]
    assert len(patches) == 12


def test_groups_of_classes_equal_all_at_once():
    generator = torch.Generator().manual_seed(6)
    crops = crop_for_anchors(anchor_boxes(60, 80, CPU), (960, 1280))
    costs = torch.rand(6, len(crops), generator=generator)
    ids = torch.arange(6) * 10

    def part(rows):
        return hardest_crops(crops, losses_of(costs[rows]), ids[rows])

    together, apart = select_patches([part(slice(0, 6))]), select_patches([part(slice(0, 2)), part(slice(2, 6))])
    assert together == apart and len({patch.class_id for patch in together}) > 1


def test_nothing_to_mine():
    assert select_patches([]) == []
    nothing = losses_of([[0.0] * 4])
    assert select_patches([hardest_crops(CROPS, nothing, torch.tensor([1]))]) == []
    no_class = losses_of(torch.zeros(0, 4))
    assert select_patches([hardest_crops(CROPS, no_class, torch.zeros(0, dtype=torch.int64))]) == []
    ignored = losses_of([[0.5] * 4], labels=[[-1] * 4])
    assert select_patches([hardest_crops(CROPS, ignored, torch.tensor([1]))]) == []
