"""Sizes of pyramid levels against recorded ones, and pictures of those sizes."""

from pathlib import Path

import numpy as np
import pytest

from fsdet.data.crops import area_size
from fsdet.methods.os2d.pyramid import Pyramid, resize

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "os2d" / "resize.npz")


@pytest.mark.parametrize("number", range(4))
def test_recorded_sizes(number):
    """Two of them come out otherwise when the factors are multiplied in another order."""
    base = float(GOLDEN["pyramid_base_scale"][number])
    pyramid = Pyramid(GOLDEN["pyramid_scales"].tolist(), eval_scale=base, image_size=1)
    sizes = pyramid.sizes(*GOLDEN["pyramid_input_hw"][number].tolist())
    assert sizes == [tuple(size) for size in GOLDEN["pyramid_level_hw"][number].tolist()]


def test_recorded_sizes_of_supports():
    """What `tight_crop` and the backbone make of them."""
    sizes = [area_size(*size) for size in GOLDEN["input_hw"].tolist()]
    assert sizes == [tuple(size) for size in GOLDEN["class_image_hw_target240"].tolist()]
    cells = [tuple(-(-side // 16) for side in size) for size in sizes]
    assert cells == [tuple(size) for size in GOLDEN["feature_map_hw_of_target240"].tolist()]


def test_nominal_size_or_own():
    """GroZi: 3264 px pictures are searched at 1280 px; without a nominal size, each picture is."""
    assert Pyramid((1.0, 0.5), 1280, 3264).sizes(2448, 3264) == [(960, 1280), (480, 640)]
    assert Pyramid((1.0,), 1280, 3264).sizes(300, 408) == [(117, 160)]
    assert Pyramid((1.0,), 1280).sizes(300, 400) == [(960, 1280)]


def test_a_level_has_a_pixel_at_least():
    assert Pyramid((0.001,), 400).sizes(300, 400) == [(1, 1)]


def test_pictures():
    """A constant stays what it is, and a picture at its own size itself."""
    picture = np.full((6, 8, 3), (10, 20, 30), np.uint8)
    assert (resize(picture, (3, 5)) == (10, 20, 30)).all() and resize(picture, (3, 5)).shape == (3, 5, 3)
    assert resize(picture, (6, 8)) is picture


def test_shrinking_is_antialiased():
    """A new pixel of half a picture is 1/8, 3/8, 3/8 and 1/8 of four old ones."""
    row = np.zeros((1, 8, 3), np.uint8)
    row[:, 4] = 160
    assert resize(row, (1, 4))[0, :, 0].tolist() == [0, 20, 60, 0]
