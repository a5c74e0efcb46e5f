"""Targets: recorded labels and codes, a naive loop over classes, ties, difficult objects, blocks, nothing there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from fsdet.methods.os2d import targets as module
from fsdet.methods.os2d.decoding import to_frame
from fsdet.methods.os2d.geometry import anchor_boxes, decode_boxes, encode_boxes
from fsdet.methods.os2d.targets import SceneTargets, assign, remap

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "os2d" / "box_coder.npz")
NUM_LABELS = int(GOLDEN["num_labels"])


def golden(name):
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def size_of(name):
    width, height = GOLDEN[name].tolist()
    return height, width


def anchors_of(name):
    height, width = size_of(name)
    return anchor_boxes(-(-height // 16), -(-width // 16), torch.device("cpu"))


def recorded(boxes="gt_boxes"):
    return SceneTargets(golden(boxes), golden("gt_labels"), golden("gt_difficult"))


def objects(boxes, classes, difficult=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    difficult = [False] * len(boxes) if difficult is None else difficult
    return SceneTargets(boxes, torch.tensor(classes, dtype=torch.int64), torch.tensor(difficult, dtype=torch.bool))


@pytest.mark.parametrize("block", [45, 1000, 1 << 18])
def test_recorded_assignment(monkeypatch, block):
    """Whatever the blocks: single anchors, several, all at once."""
    monkeypatch.setattr(module, "_BLOCK", block)
    anchors = anchors_of("level0_size_wh")
    torch.testing.assert_close(anchors, golden("default_boxes_level0"), rtol=0, atol=0)
    labels, codes = assign(anchors, recorded(), NUM_LABELS)
    assert labels.dtype == torch.int8
    assert torch.equal(labels.long(), golden("encode/cls_targets"))
    torch.testing.assert_close(codes, golden("encode/loc_targets").movedim(1, -1), rtol=0, atol=1e-5)


def test_recorded_assignment_in_the_frame_of_the_annotation():
    anchors = to_frame(anchors_of("level1_size_wh"), size_of("level1_size_wh"), size_of("original_size_wh"))
    labels, codes = assign(anchors, recorded("gt_boxes_original"), NUM_LABELS)
    assert torch.equal(labels.long(), golden("encode_pyramid/level1_cls_targets"))
    wanted = golden("encode_pyramid/level1_loc_targets").movedim(1, -1)
    torch.testing.assert_close(codes, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [1000, 1 << 18])
@pytest.mark.parametrize("image", [0, 1])
def test_recorded_remapping(monkeypatch, image, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    second = SceneTargets(*(golden(f"remap/image1_gt_{name}") for name in ("boxes", "labels", "difficult")))
    scene = (recorded(), second)[image]
    codes = golden("remap/loc_scores")[image].movedim(1, -1)
    labels = remap(codes, anchors_of("level0_size_wh"), scene)
    assert labels.dtype == torch.int8
    assert torch.equal(labels.long(), golden("remap/cls_targets_remapped")[image])


@pytest.mark.parametrize("image", [0, 1])
def test_recorded_overlaps(monkeypatch, image):
    """The best overlaps themselves, of anchors and of predicted boxes, with each class's objects."""
    second = SceneTargets(*(golden(f"remap/image1_gt_{name}") for name in ("boxes", "labels", "difficult")))
    scene, anchors = (recorded(), second)[image], anchors_of("level0_size_wh")
    codes = golden("remap/loc_scores")[image].movedim(1, -1)
    best = torch.zeros(2, NUM_LABELS, len(anchors))
    match, seen = module._Objects.match, []

    def watched(self, overlaps, *thresholds):
        for number, row in enumerate(self.row.tolist()):
            place = best[len(seen), self.present[row]]
            place.copy_(torch.maximum(place, overlaps[number]))
        seen.append(1)
        return match(self, overlaps, *thresholds)

    monkeypatch.setattr(module._Objects, "match", watched)
    assign(anchors, scene, NUM_LABELS)
    remap(codes, anchors, scene)
    torch.testing.assert_close(best[0], golden("remap/iou_anchor")[image], rtol=0, atol=1e-5)
    torch.testing.assert_close(best[1], golden("remap/iou_predicted")[image], rtol=0, atol=1e-5)


def naive(boxes_of, scene, num_classes, anchors, positive, negative):
    """One class and one anchor after the other."""
    labels = torch.zeros(num_classes, len(anchors), dtype=torch.int8)
    codes = torch.zeros(num_classes, len(anchors), 4)
    for class_index in range(num_classes):
        own = (scene.class_index == class_index).nonzero()[:, 0].tolist()
        if not own:
            continue
        overlaps = box_iou(scene.boxes[own], boxes_of(class_index))
        for n in range(len(anchors)):
            best = max(range(len(own)), key=lambda k: (float(overlaps[k, n]), -k))
            value = float(overlaps[best, n])
            is_positive = value >= positive and not scene.difficult[own[best]]
            labels[class_index, n] = 1 if is_positive else 0 if value < negative else -1
            best = best if is_positive else 0
            codes[class_index, n] = encode_boxes(scene.boxes[own[best]][None], anchors[n][None])[0]
    return labels, codes


def crowded(classes=7, count=40):
    generator = torch.Generator().manual_seed(3)
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([320.0, 256.0])
    sides = 120 + 240 * torch.rand(count, 2, generator=generator)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    boxes[20:] = boxes[:20]  # every box twice, mostly of another class
    index = torch.randint(-2, classes - 1, (count,), generator=generator)  # the last class has no object
    return SceneTargets(boxes, index, torch.rand(count, generator=generator) < 0.3)


def test_assignment_equals_a_loop(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 400)
    scene, anchors = crowded(), anchor_boxes(8, 10, torch.device("cpu"))
    labels, codes = assign(anchors, scene, 7, positive=0.4, negative=0.3)
    wanted = naive(lambda _: anchors, scene, 7, anchors, 0.4, 0.3)
    assert torch.equal(labels, wanted[0]) and all((labels == label).sum() > 20 for label in (-1, 0, 1))
    torch.testing.assert_close(codes, wanted[1])


def test_remapping_equals_a_loop(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 400)
    scene, anchors = crowded(), anchor_boxes(8, 10, torch.device("cpu"))
    codes = torch.randn(7, 80, 4, generator=torch.Generator().manual_seed(4))
    labels = remap(codes, anchors, scene, positive=0.5, negative=0.4)
    wanted, _ = naive(lambda c: decode_boxes(codes[c], anchors), scene, 7, anchors, 0.5, 0.4)
    assert torch.equal(labels, wanted) and all((labels == label).sum() > 20 for label in (-1, 0, 1))


ANCHOR = torch.tensor([[0.0, 0.0, 240.0, 240.0]])


def test_thresholds_and_codes_by_hand():
    """Overlaps with one anchor: 120 / 240 counts, 119 / 240 is ignored, 24 / 240 too, 23 / 240 is a negative."""
    widths = [120, 119, 24, 23]
    scene = objects([[0, 0, width, 240] for width in widths], [0, 1, 2, 3])
    labels, codes = assign(ANCHOR, scene, 5)
    assert labels[:, 0].tolist() == [1, -1, -1, 0, 0]
    assert codes[0, 0].tolist() == pytest.approx([10 * (60 - 120) / 240, 0, 5 * np.log(0.5), 0])
    assert codes[4].abs().sum() == 0


def test_of_equal_overlaps_the_first_object_counts():
    twice = [[0, 0, 180, 240], [60, 0, 240, 240]]
    for order, sign in (((0, 1), -1), ((1, 0), 1)):
        labels, codes = assign(ANCHOR, objects([twice[k] for k in order], [1, 1]), 2)
        assert labels[:, 0].tolist() == [0, 1]
        assert float(codes[1, 0, 0]) == pytest.approx(sign * 10 * 30 / 240)
    assert assign(ANCHOR, objects(twice, [0, 0], [True, False]), 1)[0].tolist() == [[-1]]
    assert assign(ANCHOR, objects(twice, [0, 0], [False, True]), 1)[0].tolist() == [[1]]


def test_other_and_cut_objects_leave_negatives():
    labels, codes = assign(ANCHOR, objects([[0, 0, 240, 240]] * 2, [-1, -2]), 3)
    assert labels.tolist() == [[0]] * 3 and codes.abs().sum() == 0


def test_remapping_follows_the_prediction_alone():
    """The anchor misses the object, its prediction hits it; and the other way round. Then a box far off."""
    anchors = torch.tensor([[0.0, 0, 240, 240], [300, 0, 540, 240], [0, 0, 240, 240]])
    scene = objects([[300, 0, 540, 240]], [0])
    codes = torch.zeros(1, 3, 4)
    codes[0, :, 0] = torch.tensor([10 * 300 / 240, -10 * 300 / 240, 10 * 360 / 240])  # the last one: IoU 180 / 300
    assert assign(anchors, scene, 1)[0].tolist() == [[0, 1, 0]]
    assert remap(codes, anchors, scene).tolist() == [[1, 0, -1]]
    assert remap(codes, anchors, scene, positive=0.55).tolist() == [[1, 0, 1]]
    assert remap(codes, anchors, scene, negative=0.65).tolist() == [[1, 0, 0]]


def test_remapping_has_no_gradient_and_takes_half_precision():
    codes = torch.zeros(1, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    assert not remap(codes, ANCHOR, objects([[0, 0, 240, 240]], [0])).requires_grad


def test_prediction_that_is_no_number_is_ignored():
    codes = torch.full((1, 1, 4), float("nan"))
    assert remap(codes, ANCHOR, objects([[0, 0, 240, 240]] * 2, [0, 0])).tolist() == [[-1]]


@pytest.mark.parametrize(("classes", "anchors"), [(3, 5), (0, 5), (3, 0)])
def test_nothing_there(classes, anchors):
    empty = objects([], [])
    places = torch.zeros(anchors, 4)
    labels, codes = assign(places, empty, classes)
    assert labels.shape == (classes, anchors) and codes.shape == (classes, anchors, 4)
    assert not labels.any() and not codes.any()
    assert not remap(codes, places, empty).any()


def test_blocks_bound_the_overlaps():
    rows = module._Objects.of(objects([[0, 0, 9, 9]] * 500, [n % 200 for n in range(500)]), 200)
    blocks = list(rows.blocks(20_000))
    assert all((block.stop - block.start) * 500 <= module._BLOCK for block in blocks)
    covered = [n for block in blocks for n in range(*block.indices(20_000))]
    assert covered == list(range(20_000))


def test_class_beyond_the_batch():
    with pytest.raises(AssertionError, match="class 3 of 3"):
        assign(ANCHOR, objects([[0, 0, 240, 240]], [3]), 3)
