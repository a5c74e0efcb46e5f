"""Classes and targets of a training batch: joined, drawn, mined, labelled; inputs that are refused."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from fsdet.methods.os2d.targets import SceneTargets, assign, remap
from fsdet.methods.os2d.training import Labelling, check_items, join_classes, targets_of

CPU = torch.device("cpu")


def item(*class_ids, start=0, **entries):
    """An item whose supports are pictures full of one number."""
    pictures = [torch.full((3, 2, 2), start + place, dtype=torch.uint8) for place in range(len(class_ids))]
    return {
        "image": torch.zeros(3, 16, 16),
        "instances": Instances((16, 16)),
        "support_images": pictures,
        "support_classes": list(class_ids),
        **entries,
    }


def test_union_in_the_order_of_the_ids():
    """A class that two items bring has the support of the first."""
    class_ids, pictures = join_classes([item(8, 2), item(), item(5, 8, start=10)], limit=15)
    assert class_ids == [2, 5, 8]
    assert [int(picture[0, 0, 0]) for picture in pictures] == [1, 10, 0]


def test_no_class():
    assert join_classes([item(), item()], limit=15) == ([], [])


def test_more_classes_than_the_limit():
    """Drawn with PyTorch's generator, each class as often as any other; mined classes are always there."""
    items = [item(*range(10)), item(12, mined_class=12), item(3, mined_class=3)]
    torch.manual_seed(0)
    draws = [join_classes(items, limit=5)[0] for _ in range(60)]
    assert all(len(draw) == 5 and draw == sorted(draw) and {3, 12} <= set(draw) for draw in draws)
    assert {class_id for draw in draws for class_id in draw} == {*range(10), 12}
    torch.manual_seed(0)
    assert draws == [join_classes(items, limit=5)[0] for _ in range(60)]
    state = torch.get_rng_state()
    assert join_classes(items, limit=11)[0] == [*range(10), 12]
    assert torch.equal(state, torch.get_rng_state())  # nothing to draw
    assert join_classes(items, limit=1)[0] == [3, 12]


def test_targets():
    instances = Instances((16, 16))
    instances.gt_boxes = Boxes(torch.tensor([[-3.0, 0, 20, 9], [1, 1, 5, 5], [2, 2, 9, 9]]))
    instances.gt_classes = torch.tensor([8, 4, 2])
    targets = targets_of(instances, [2, 5, 8], CPU)
    assert targets.class_index.tolist() == [2, -1, 0] and targets.difficult.tolist() == [False] * 3
    assert torch.equal(targets.boxes, instances.gt_boxes.tensor)
    instances.gt_difficult = torch.tensor([True, False, True])
    assert targets_of(instances, [2, 5, 8], CPU).difficult.tolist() == [True, False, True]
    assert targets_of(instances, [], CPU).class_index.tolist() == [-1, -1, -1]
    assert targets_of(instances[:0], [2], CPU).boxes.shape == (0, 4)


@pytest.mark.parametrize("is_remapped", [True, False])
def test_labelling(is_remapped):
    """Scene by scene what `assign` and `remap` give, with their own limits; no gradient into the predicted boxes."""
    generator = torch.Generator().manual_seed(0)
    anchors = torch.tensor([[0.0, 0, 240, 240], [16, 0, 256, 240], [200, 0, 440, 240]])
    scenes = [
        SceneTargets(torch.tensor([[0.0, 0, 240, 230]]), torch.tensor([1]), torch.tensor([False])),
        SceneTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)),
    ]
    codes = torch.randn(2, 2, 3, 4, generator=generator, requires_grad=True)
    found = Labelling(0.9, 0.2, is_remapped, 0.7, 0.3)(anchors, scenes, codes)
    for number, scene in enumerate(scenes):
        labels, expected = assign(anchors, scene, 2, positive=0.9, negative=0.2)
        assert torch.equal(found["labels"][number], labels) and torch.equal(found["target_codes"][number], expected)
        if is_remapped:
            expected = remap(codes[number], anchors, scene, positive=0.7, negative=0.3)
            assert torch.equal(found["remapped"][number], expected)
    assert found["labels"][0].tolist() == [[0, 0, 0], [1, -1, 0]]
    assert is_remapped or found["remapped"] is None
    assert not any(value is not None and value.requires_grad for value in found.values())


def test_refused_inputs():
    with pytest.raises(ValueError, match=r"lacks \['support_images', 'support_classes'\].*INPUT.PATCH.ENABLED"):
        check_items([item(1), {"image": torch.zeros(3, 16, 16), "instances": Instances((16, 16))}])
    with pytest.raises(ValueError, match="2 supports of 1 classes"):
        check_items([{**item(1, 2), "support_classes": [1]}])
    with pytest.raises(ValueError, match="patches of one size"):
        check_items([item(1), {**item(1), "image": torch.zeros(3, 16, 32)}])
    check_items([item(1), item()])
