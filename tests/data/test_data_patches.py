"""Parts of scenes: how they are drawn, what they keep of the objects, their pixels, colours, files of mined ones."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fsdet.data.patches import (
    FILTERS,
    MinedPatch,
    PatchRule,
    coverage,
    cut_patch,
    flip_boxes,
    jitter_colour,
    mined_file,
    read_mined,
    save_mined,
)

NO_BOXES = np.zeros((0, 4))


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_coverage_by_hand():
    boxes = np.array([[0, 0, 10, 10], [5, 5, 15, 25], [-10, 0, 10, 4], [30, 0, 40, 10.0]])
    assert coverage(boxes, (0, 0, 10, 10)).tolist() == [1, 0.125, 0.5, 0]
    assert coverage(NO_BOXES, (0, 0, 1, 1)).shape == (0,)


class TestDraws:
    """Patches of 60 px at a base scale of 0.5, from pictures of 400 x 300 (width x height)."""

    rule = PatchRule(size=60, scale_jitter=0.5, aspect_jitter=0.8, min_coverage=0.7)

    def windows(self, boxes, height=300, width=400, count=400):
        generator = np.random.default_rng(0)
        return np.array([self.rule.draw(boxes, height, width, base=0.5, generator=generator) for _ in range(count)])

    def test_sizes_and_places_fill_their_ranges(self):
        """Scale 0.25 to 1: widths 60 to 240; the height is the width over 0.8 to 1.25."""
        x0, y0, x1, y1 = self.windows(NO_BOXES).T
        width, height = x1 - x0, y1 - y0
        assert 60 <= width.min() < 63 and 230 < width.max() <= 240
        aspect = width / height
        assert 0.79 < aspect.min() < 0.82 and 1.22 < aspect.max() < 1.28
        assert 0 <= x0.min() < 5 and 0 <= y0.min() < 5 and 390 < x1.max() <= 400 and 290 < y1.max() <= 300
        # Scales are drawn evenly: the mean width is 60 times the mean of 1 / scale, ln(4) / 0.75.
        assert width.mean() == pytest.approx(60 * math.log(4) / 0.75, rel=0.05)

    def test_an_object_stays(self):
        boxes = np.array([[180, 130, 220, 170.0], [0, 0, 400, 300]])  # the second one never fits
        windows = self.windows(boxes, count=100)
        left = np.array([coverage(boxes, window)[0] for window in windows])
        assert left.min() >= 0.7 and (left < 1).any()  # 0.7 is enough

    def test_top_left_where_no_object_fits(self):
        """100 tries find no part with 70 % of the whole picture; 60 / 0.5 = 120 px from the corner."""
        boxes = np.array([[0, 0, 400, 300.0]])
        assert self.windows(boxes, count=2).tolist() == [[0, 0, 120, 120]] * 2

    def test_small_pictures_are_taken_whole(self):
        windows = self.windows(np.array([[0, 0, 40, 20.0]]), height=20, width=40, count=50)
        assert (windows == [0, 0, 40, 20]).all()
        assert (self.windows(np.array([[0, 0, 300, 20.0]]), height=20, width=300)[:, [1, 3]] == [0, 20]).all()
        never = PatchRule(size=60, min_coverage=1.1)  # no part keeps more than there is
        assert never.draw(np.array([[0, 0, 9, 9]]), 20, 40, base=0.5, generator=np.random.default_rng(0)) == (
            0, 0, 40, 20,
        )  # fmt: skip
        tiny = self.windows(NO_BOXES, height=1, width=1, count=3)
        assert (tiny == [0, 0, 1, 1]).all()

    def test_without_jitter_all_have_the_nominal_size(self):
        rule = PatchRule(size=60, scale_jitter=1.0, aspect_jitter=1.0)
        x0, y0, x1, y1 = rule.draw(NO_BOXES, 300, 400, base=0.5, generator=np.random.default_rng(0))
        assert (x1 - x0, y1 - y0) == (120, 120)


class TestPartsThatFitAnObject:
    """Objects that are to have 40 px in patches of 60 px, from pictures of 400 x 300, at scales up to 1."""

    rule = PatchRule(size=60, scale_jitter=0.8, aspect_jitter=1.0, object_size=40)
    picture = (300, 400)

    def sides(self, boxes, count=300):
        """Sides (count, objects) in the patches, root of the area; and the windows."""
        generator = np.random.default_rng(0)
        windows = [self.rule.draw(boxes, *self.picture, base=1.0, generator=generator) for _ in range(count)]
        placed = [self.rule.place_boxes(boxes, window)[0] for window in windows]
        return np.array([np.sqrt((b[:, 2:] - b[:, :2]).prod(1)) for b in placed]), windows

    def test_an_object_gets_the_wanted_side(self):
        boxes = np.array([[150, 100, 230, 180.0]])
        sides, windows = self.sides(boxes)
        assert 31.5 < sides.min() < 33.5 and 47.5 < sides.max() < 51
        assert all(coverage(boxes, window) == 1 for window in windows)
        assert np.ptp([x0 for x0, *_ in windows]) > 50  # anywhere in the part, not in its middle

    def test_any_object_that_reaches_the_side_is_chosen(self):
        """Objects of 50, 80 and 160 px take turns; one of 20 px would need twice the largest scale."""
        boxes = np.array([[10, 10, 60, 60], [100, 50, 180, 130], [200, 100, 360, 260], [300, 20, 320, 40.0]])
        sides, windows = self.sides(boxes)
        kept = np.array([coverage(boxes, window) for window in windows]) >= 0.7
        fit = kept & (sides > 31) & (sides < 51)
        assert fit[:, :3].any(axis=1).all() and (fit[:, :3].mean(axis=0) > 0.25).all() and not fit[:, 3].any()

    def test_without_one_the_biggest_is_shown_at_the_largest_scale(self):
        sides, _ = self.sides(np.array([[10, 10, 20, 20], [100, 50, 130, 80.0]]))
        assert 23.5 < sides[:, 1].min() < 25 and 35 < sides[:, 1].max() < 38.5

    def test_a_long_object_keeps_what_a_difficult_one_does_not(self):
        """160 x 40 px at the scale of its area: 80 px long in a patch of 60."""
        boxes = np.array([[100, 100, 260, 140.0]])
        _, windows = self.sides(boxes)
        assert min(coverage(boxes, window)[0] for window in windows) >= self.rule.min_coverage

    @pytest.mark.parametrize("long", [240, 380])
    def test_what_is_longer_than_a_patch_can_hold_fills_it(self, long):
        boxes = np.array([[5, 150, 5 + long, 150 + long // 10]], float)
        _, windows = self.sides(boxes, count=40)
        assert min(coverage(boxes, window)[0] for window in windows) > 0.25

    def test_at_the_border_of_a_picture_and_without_objects(self):
        sides, windows = self.sides(np.array([[360, 260, 400, 300.0]]))
        assert all(0 <= x0 < x1 <= 400 and 0 <= y0 < y1 <= 300 for x0, y0, x1, y1 in windows)
        assert sides.min() > 31.5 and sides.max() < 51
        generator = np.random.default_rng(0)
        assert len({self.rule.draw(NO_BOXES, *self.picture, base=0.5, generator=generator) for _ in range(9)}) > 5


def test_objects_of_a_patch_by_hand():
    """Window of 200 x 100 from (100, 50) in a patch of 50: x shrinks to a quarter, y to a half.

    The boxes keep everything; 70 %; 60 %; 30 %; 20 %; nothing.
    """
    boxes = np.array(
        [
            [120, 60, 160, 80],
            [272, 60, 312, 80],
            [92, 60, 112, 80],
            [291, 60, 321, 80],
            [110, 142, 130, 182],
            [0, 0, 90, 40],
        ],
        np.float64,
    )
    placed, is_left, is_cut = PatchRule(size=50).place_boxes(boxes, (100, 50, 300, 150))
    assert placed[0].tolist() == [5, 5, 15, 15] and placed[2].tolist() == [-2, 5, 3, 15]  # not clipped
    assert is_left.tolist() == [True, True, True, True, False, False]
    assert is_cut[:4].tolist() == [False, False, True, True]
    empty = PatchRule().place_boxes(NO_BOXES, (0, 0, 10, 10))
    assert [len(part) for part in empty] == [0, 0, 0]


class TestPixels:
    @pytest.mark.parametrize("resample", FILTERS)
    def test_a_part_alone_is_resized(self, resample):
        """Nothing around the part bleeds into the patch."""
        image = noise(40, 60)
        expected = Image.fromarray(image).crop((10, 5, 40, 30)).resize((16, 16), resample)
        patch = cut_patch(image, (10, 5, 40, 30), 16, resample)
        assert (patch == np.asarray(expected)).all() and patch.flags.writeable

    def test_six_filters(self):
        patches = [cut_patch(noise(40, 60), (10, 5, 40, 30), 16, f).tobytes() for f in FILTERS]
        assert len(set(patches)) == 6

    def test_beyond_the_picture_is_the_fill_and_nothing_is_changed(self):
        """A picture of 4 x 3 inside a window of 8 x 8 that begins 2 px left of it and 1 px above."""
        image = np.full((3, 4, 3), 200, np.uint8)
        image.flags.writeable = False
        nearest = Image.Resampling.NEAREST
        first = cut_patch(image, (-2, -1, 6, 7), 8, nearest, fill=(1, 2, 3))
        assert (first[1:4, 2:6] == 200).all()
        first[1:4, 2:6] = 1, 2, 3
        assert (first == [1, 2, 3]).all()
        again = cut_patch(image, (-2, -1, 6, 7), 8, nearest, fill=(1, 2, 3))
        assert (again[1:4, 2:6] == 200).all()
        assert (cut_patch(image, (10, 10, 12, 12), 2, nearest, fill=(1, 2, 3)) == [1, 2, 3]).all()
        assert (cut_patch(image, (-9, 0, -3, 3), 2, nearest, fill=(1, 2, 3)) == [1, 2, 3]).all()


def test_flipped_boxes_by_hand():
    box = np.array([[1.0, 2, 4, 8]])
    assert flip_boxes(box, 10, horizontal=False, vertical=False).tolist() == [[1, 2, 4, 8]]
    assert flip_boxes(box, 10, horizontal=True, vertical=False).tolist() == [[6, 2, 9, 8]]
    assert flip_boxes(box, 10, horizontal=False, vertical=True).tolist() == [[1, 2, 4, 8]]
    assert flip_boxes(box + [[0, 0, 0, 1]], 10, horizontal=True, vertical=True).tolist() == [[6, 1, 9, 8]]
    assert flip_boxes(NO_BOXES, 10, horizontal=True, vertical=True).shape == (0, 4)


class Fixed:
    """A generator whose coins fall as given, and whose numbers are the upper ends of their ranges."""

    def __init__(self, *happens):
        self.coins, self.drawn = [0.0 if h else 0.9 for h in happens], 0

    def random(self):
        return self.coins.pop(0)

    def uniform(self, low, high):
        assert low == -high
        self.drawn += 1
        return high


class TestColour:
    """One red pixel beside a grey one of 100, RGB."""

    image = torch.tensor([[[255, 100]], [[0, 100]], [[0, 100]]], dtype=torch.uint8)

    @pytest.mark.parametrize(
        ("happens", "expected"),
        [
            ((0, 0, 0, 0), [[255, 0, 0], [100, 100, 100]]),
            ((1, 0, 0, 0), [[255, 0, 0], [112, 112, 112]]),  # times 1 + 32 / 255
            # The mean grey is (76.2 + 100) / 2 = 88: away from it by half.
            ((0, 1, 0, 0), [[255, 0, 0], [106, 106, 106]]),
            ((0, 0, 1, 0), [[255, 0, 0], [100, 100, 100]]),
            ((0, 0, 0, 1), [[255, 153, 0], [100, 100, 100]]),  # 36 degrees of hue: 0.6 of green
        ],
    )
    def test_each_change_by_hand(self, happens, expected):
        generator = Fixed(*happens)
        found = jitter_colour(self.image, generator)[:, 0].T.tolist()
        assert np.abs(np.array(found) - expected).max() <= 1
        assert generator.drawn == 4 and not generator.coins  # the number of draws does not depend on the coins

    def test_saturation_moves_away_from_grey(self):
        pixel = torch.tensor([[[120]], [[100]], [[100]]], dtype=torch.uint8)  # grey 105.98
        assert jitter_colour(pixel, Fixed(0, 0, 1, 0)).flatten().tolist() == [127, 97, 97]

    def test_half_of_the_images_change_in_each_way(self):
        generator, image = np.random.default_rng(0), torch.from_numpy(noise(4, 4)).permute(2, 0, 1)
        same = sum(torch.equal(jitter_colour(image, generator), image) for _ in range(400))
        assert 10 < same < 45  # one in sixteen


class TestMinedFiles:
    def make(self):
        first = MinedPatch("neg", (0.0, 16.0, 600.4, 615.6), 1, 0.25)
        return {"7": [first, MinedPatch("pos_loc", (3.2, 0.0, 3.4, 9.0), 0, 1.5)], "a/b": []}

    def test_they_come_back_as_they_were(self, tmp_path):
        path = tmp_path / "mined.json"
        save_mined(path, self.make(), ["ant", "bee"])
        assert read_mined(path, ["ant", "bee"]) == self.make()
        # Classes go by name: another order is another id.
        assert read_mined(path, ["bee", "ant"])["7"][0].class_id == 0
        assert [p.name for p in tmp_path.iterdir()] == ["mined.json"]

    def test_windows_are_whole_pixels(self):
        first, second = self.make()["7"]
        assert first.window == (0, 16, 600, 616)
        assert second.window == (3, 0, 4, 9)  # at least one pixel

    @pytest.mark.parametrize(
        "change",
        [
            lambda rows: rows["7"][0].update({"class": "cat"}),
            lambda rows: rows["7"][0].update(kind="hard"),
            lambda rows: rows["7"][0].update(crop=[5, 5, 5, 9]),
            lambda rows: rows["7"][0].update(crop=[0, 0, float("inf"), 9]),
            lambda rows: rows["7"][0].pop("loss"),
            lambda rows: rows.update({"7": 3}),
        ],
    )
    def test_faulty_files_are_named(self, tmp_path, change):
        path = tmp_path / "mined.json"
        save_mined(path, self.make(), ["ant", "bee"])
        data = json.loads(path.read_text())
        change(data["patches"])
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"mined\.json: no list of mined patches .* Put the run's own file back"):
            read_mined(path, ["ant", "bee"])

    def test_torn_file(self, tmp_path):
        path = tmp_path / "mined.json"
        path.write_text('{"patches": {"7": [{"kind"')
        with pytest.raises(ValueError, match=r"mined\.json: no list"):
            read_mined(path, [])

    @pytest.mark.parametrize(
        ("iteration", "period", "name"),
        [
            (0, 5, None),
            (4, 5, None),
            (5, 5, "mined_patches_0000005.json"),
            (9, 5, "mined_patches_0000005.json"),
            (10, 5, "mined_patches_0000010.json"),
            (10, 0, None),
        ],
    )
    def test_which_file_an_iteration_trains_on(self, tmp_path, iteration, period, name):
        found = mined_file(tmp_path, iteration, period)
        assert found == (name and tmp_path / name)
