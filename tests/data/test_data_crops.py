"""Context squares of other sizes and outside the picture, boxes that leave nothing, the bounded cache.

`test_data_support.py` compares the crops with golden ones.
"""

import numpy as np
import pytest

from fsdet.data.crops import CropCache, context_square, fewx_support_crop, has_area_inside


def test_context_square_by_hand():
    """A box of 40 x 20 at (10, 50) on 100 x 80 pixels (width x height), in crops of 66 pixels.

    Along x from 0 (16 px would begin at -6) to 66; along y 66 px around 60, cut to 27..80: 6 black rows before. The box
    then is 10 px from the left and 23 - 0 + 6 px from the top, at scale 1.
    """
    square = context_square((10, 50, 50, 70), 80, 100, 66)
    assert square.rows == (27, 80) and square.columns == (0, 66)
    assert square.corner == (6, 0) and square.length == 66
    assert square.box == (10, 29, 50, 49)
    image = np.zeros((80, 100, 3), np.uint8)
    image[50:70, 10:50] = 200
    crop, box = fewx_support_crop(image, (10, 50, 50, 70), size=66)
    assert crop.shape == (66, 66, 3) and box.tolist() == list(square.box)
    assert (crop[29:49, 10:50] == 200).all() and crop.sum() == 3 * 200 * 20 * 40
    half, box = fewx_support_crop(image, (10, 50, 50, 70), size=33)
    assert half.shape == (33, 33, 3) and box.tolist() == [5, 14, 25, 24]


@pytest.mark.parametrize("box", [(80, 10, 120, 20), (-60, 10, -20, 30), (5, -70, 9, -20), (5, 70, 9, 90)])
def test_boxes_outside_are_refused_by_the_geometry(box):
    with pytest.raises(ValueError, match=r"leaves nothing of its picture of 50 x 40"):
        fewx_support_crop(np.zeros((40, 50, 3), np.uint8), box)
    assert not has_area_inside(box, 40, 50)


def test_what_has_area_can_be_cut():
    rng = np.random.default_rng(0)
    cut = 0
    for _ in range(3000):
        height, width = rng.integers(1, 30, 2)
        x0, y0 = rng.uniform(-20, 40, 2)
        box = (x0, y0, x0 + rng.uniform(0, 40) ** rng.integers(0, 2), y0 + rng.uniform(0, 40))
        if has_area_inside(box, height, width):
            cut += 1
            fewx_support_crop(np.zeros((height, width, 3), np.uint8), box, size=8)
    assert cut > 500


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((49.5, 39.5, 50.5, 40.5), True),
        ((0, 0, 0.2, 0.2), True),
        ((50, 0, 60, 10), False),
        ((0, 40, 10, 50), False),
        ((3, 3, 3, 9), False),
        ((0, 0, float("nan"), 9), False),
        ((0, 0, float("inf"), 9), False),
    ],
)
def test_area_inside(box, inside):
    assert has_area_inside(box, 40, 50) is inside


class TestCache:
    """Crops of 12 pixel bytes and 16 of the box: 28 together."""

    def make(self, value):
        self.cuts.append(value)
        return np.full((2, 2, 3), value, np.uint8), np.full(4, value, np.float32)

    def ask(self, cache, value):
        image, box = cache.get(("file", value), lambda: self.make(value))
        assert (image == value).all() and (box == value).all()

    def test_least_recently_used_go_first(self):
        self.cuts, cache = [], CropCache(2 * 28)
        for value in (1, 2, 1, 3, 1, 2, 3):  # 3 drives out 2, which then drives out 3, which drives out 1
            self.ask(cache, value)
        assert self.cuts == [1, 2, 3, 2, 3]
        assert (cache.hits, cache.misses, cache.bytes) == (2, 5, 56)
        self.ask(cache, 2)
        assert cache.hits == 3

    def test_what_does_not_fit_is_not_kept(self):
        for capacity, kept in ((0, 0), (27, 0), (28, 28), (55, 28)):
            self.cuts, cache = [], CropCache(capacity)
            for value in (1, 2, 2):
                self.ask(cache, value)
            assert cache.bytes == kept and cache.hits == (kept > 0)

    def test_kept_crops_cannot_be_written_to(self):
        self.cuts, cache = [], CropCache(100)
        image, _ = cache.get("key", lambda: self.make(1))
        with pytest.raises(ValueError, match="read-only"):
            image[0] = 9
