"""SupportSet: crop policies against golden numbers, grouping, lazy reading, episodes."""

import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from fsdet.data.catalog import DatasetSources, DatasetSpec, load_records
from fsdet.data.splits import voc_split
from fsdet.data.support import Support, SupportSet, area_size, fewx_support_crop, tight_crop

GOLDEN = np.load(Path(__file__).resolve().parents[1] / "golden" / "fewx" / "e_support_crop.npz")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "os2d"


@pytest.mark.parametrize("row", range(len(GOLDEN["boxes_xyxy"])))
def test_context_square_equals_fewx(row):
    crop, box = fewx_support_crop(GOLDEN["image_hwc_uint8"], GOLDEN["boxes_xyxy"][row])
    assert crop.dtype == np.uint8 and box.dtype == np.float32
    assert np.abs(crop.astype(int) - GOLDEN["crops_hwc_uint8"][row]).max() <= 1
    assert box.tolist() == GOLDEN["crop_boxes"][row].tolist()


def test_golden_file_is_complete():
    assert len(GOLDEN["boxes_xyxy"]) == len(GOLDEN["crops_hwc_uint8"]) == len(GOLDEN["crop_boxes"]) == 15


def test_context_square_by_hand():
    """A box of 40 x 20 at (30, 30): 72 pixels long with context, scaled by 320 / 72."""
    image = np.zeros((100, 100, 3), np.uint8)
    image[30:50, 30:70] = 200
    crop, box = fewx_support_crop(image, (30, 30, 70, 50))
    assert box.tolist() == [int(16 * 320 / 72), int(26 * 320 / 72), int(56 * 320 / 72), int(46 * 320 / 72)]
    inside = crop[int(box[1]) + 4 : int(box[3]) - 4, int(box[0]) + 4 : int(box[2]) - 4]
    assert (inside == 200).all() and crop[:, :60].max() == 0


def test_context_square_without_picture():
    with pytest.raises(ValueError, match=r"leaves nothing of its picture of 50 x 40"):
        fewx_support_crop(np.zeros((40, 50, 3), np.uint8), (80, 10, 120, 20))


def test_area_size_of_os2d():
    assert area_size(240, 240) == (240, 240)
    assert area_size(100, 400) == (120, 480)
    assert area_size(1, 100000) == (1, 75894)  # never below one pixel; 240 · sqrt(100000) cut to an integer
    if not SHARED.is_dir():
        pytest.skip("the golden sizes of OS2D are not beside the checkout")
    golden = np.load(SHARED / "resize.npz")
    sizes = golden["input_hw"].tolist()
    assert [list(area_size(*size)) for size in sizes] == golden["class_image_hw_target240"].tolist()
    assert [list(area_size(*size, 1500)) for size in sizes] == golden["hw_target1500"].tolist()


def test_tight_crop_keeps_the_ratio_and_only_the_object():
    image = np.zeros((80, 100, 3), np.uint8)
    image[10:30, 20:60] = (10, 20, 30)
    crop, box = tight_crop(image, (20.4, 10.2, 59.5, 29.9))
    assert crop.shape == (169, 339, 3) and box.tolist() == [0, 0, 339, 169]  # 240² pixels, 1 : 2
    assert (crop == (10, 20, 30)).all()
    with pytest.raises(ValueError, match="leaves nothing"):
        tight_crop(image, (200, 10, 220, 20))


def record(name, image_id, *rows):
    annotations = [
        {"id": i, "category_id": c, "bbox": box, "bbox_mode": 1, "iscrowd": crowd} for i, c, box, crowd in rows
    ]
    return {"file_name": str(name), "image_id": image_id, "height": 80, "width": 100, "annotations": annotations}


@pytest.fixture
def records(tmp_path, picture):
    """Three pictures, classes a (3 supports in two pictures), b (2 in two), c (1); one crowd of class c."""
    paths = [tmp_path / f"{i}.jpg" for i in range(3)]
    for path in paths:
        shutil.copy(picture, path)
    return [
        record(paths[0], 10, (1, 0, [0, 0, 20, 30], 0), (2, 0, [30, 10, 20, 20], 0), (3, 1, [50, 5, 30, 30], 0)),
        record(paths[1], 11, (4, 0, [5, 5, 20, 30], 0), (5, 2, [0, 0, 9, 9], 1), (6, 2, [40, 40, 20, 20], 0)),
        record(paths[2], 12, (7, 1, [1, 2, 3, 4], 0)),
    ]


class TestSupportSet:
    def test_groups_by_class(self, records):
        supports = SupportSet.from_records(records, ["a", "b", "c"])
        assert len(supports) == 6 and supports.classes == ("a", "b", "c")
        assert [(name, [s.annotation_id for s in shots]) for name, shots in supports] == [
            ("a", [1, 2, 4]),
            ("b", [3, 7]),
            ("c", [6]),
        ]
        first = supports.shots("a")[0]
        assert first == Support(records[0]["file_name"], 10, 1, 0, (0, 0, 20, 30))
        assert supports.shots("b")[1].box == (1, 2, 4, 6)  # XYWH -> XYXY

    def test_reads_pictures_when_cropping_only(self, records):
        supports = SupportSet.from_records(records, ["a", "b", "c"])
        for path in {Path(r["file_name"]) for r in records}:
            path.unlink()
        with pytest.raises(FileNotFoundError, match=r"0.jpg: picture of support 1 not found"):
            supports.crop(supports.shots("a")[0])

    def test_broken_picture(self, records):
        path = Path(records[0]["file_name"])
        path.write_bytes(path.read_bytes()[:300])
        supports = SupportSet.from_records(records, ["a", "b", "c"])
        with pytest.raises(ValueError, match=r"0.jpg: cannot be decoded"):
            supports.crop(supports.shots("a")[0])

    @pytest.mark.parametrize(
        ("policy", "shape", "box"),
        [
            ("whole", (80, 100, 3), [0, 0, 20, 30]),
            ("tight", (293, 195, 3), [0, 0, 195, 293]),
            # By hand: 46 px long at the border, the other side cut to 33 px and centred, scale 320 / 46.
            ("context_square", (320, 320, 3), [41, 0, 180, 208]),
        ],
    )
    def test_policies(self, records, policy, shape, box):
        supports = SupportSet.from_records(records, ["a", "b", "c"], policy)
        crop = supports.crop(supports.shots("a")[0])
        assert crop.image.shape == shape and crop.image.dtype == np.uint8
        assert crop.box.tolist() == box and crop.support.annotation_id == 1

    def test_own_policy_and_channel_order(self, records):
        def corner(image, box):
            return image[:1, :1], np.zeros(4, np.float32)

        pixels = {
            order: next(SupportSet.from_records(records, "abc", corner, image_format=order).crops("a")).image[0, 0]
            for order in ("BGR", "RGB")
        }
        bgr = cv2.imread(records[0]["file_name"])[0, 0]
        assert np.abs(pixels["BGR"].astype(int) - bgr).max() <= 3  # two JPEG decoders
        assert pixels["RGB"].tolist() == pixels["BGR"][::-1].tolist()

    def test_few_shot_dicts_of_the_catalog(self, voc_tree):
        spec = DatasetSpec("voc", "train", "novel", shot=2)
        supports = SupportSet.from_records(
            load_records(spec, DatasetSources(root=voc_tree)), voc_split(1).novel, "tight"
        )
        assert {name: len(shots) for name, shots in supports} == dict.fromkeys(voc_split(1).novel, 2)
        assert all(crop.image.size for name in supports.classes for crop in supports.crops(name))

    def test_faults(self, records):
        with pytest.raises(ValueError, match=r"2 needed, found \{'c': 1\}"):
            SupportSet.from_records(records, ["a", "b", "c"], min_shots=2)
        with pytest.raises(ValueError, match=r"1 needed, found \{'d': 0\}"):
            SupportSet.from_records(records, ["a", "b", "c", "d"])
        assert len(SupportSet.from_records(records, ["a", "b", "c", "d"], min_shots=0)) == 6
        with pytest.raises(ValueError, match=r"class id 2 of annotation 6 is not in \[0, 2\)"):
            SupportSet.from_records(records, ["a", "b"])
        with pytest.raises(ValueError, match='policy "square"; expected one of context_square, tight, whole'):
            SupportSet.from_records(records, ["a", "b", "c"], "square")
        with pytest.raises(ValueError, match="RGBA"):
            SupportSet.from_records(records, ["a", "b", "c"], image_format="RGBA")
        with pytest.raises(ValueError, match='No class "z"'):
            SupportSet.from_records(records, ["a", "b", "c"]).shots("z")


class TestEpisodes:
    @pytest.fixture
    def supports(self):
        """Ten classes with six shots, two of each class in every one of three images."""
        shots = [
            Support(f"{i}.jpg", f"image{i}", 100 * c + 10 * i + j, c, (0, 0, 5, 5))
            for c in range(10)
            for i in range(3)
            for j in range(2)
        ]
        return SupportSet([f"class{c}" for c in range(10)], shots)

    def draw(self, supports, seed=0, epoch=0, image="image0", **options):
        return supports.episode(3, 2, seed=seed, epoch=epoch, image=image, **options)

    def test_size_and_excluded_image(self, supports):
        for epoch in range(20):
            episode = self.draw(supports, epoch=epoch)
            assert len(episode) == 3 and all(len(set(shots)) == 2 for shots in episode.values())
            assert all(s.image_id != "image0" for shots in episode.values() for s in shots)
            assert all(supports.classes[s.class_id] == name for name, shots in episode.items() for s in shots)

    def test_depends_on_seed_epoch_and_image_alone(self, supports):
        first = self.draw(supports)
        np.random.seed(5)
        assert self.draw(supports) == first
        others = [{"seed": 1}, {"epoch": 1}, {"image": "image1"}]
        assert all(self.draw(supports, **change) != first for change in others)

    def test_include_and_exclude(self, supports):
        seen = set()
        for epoch in range(30):
            episode = self.draw(supports, epoch=epoch, include=["class7"], exclude=["class1", "class2"])
            assert next(iter(episode)) == "class7" and not {"class1", "class2"} & set(episode)
            seen |= set(episode)
        assert seen == {f"class{c}" for c in (0, 3, 4, 5, 6, 7, 8, 9)}

    def test_distinct_images(self, supports):
        episode = supports.episode(1, 2, seed=0, epoch=0, image="image0", distinct_images=True)
        (shots,) = episode.values()
        assert {s.image_id for s in shots} == {"image1", "image2"}
        with pytest.raises(ValueError, match=r"2 supports from different images needed, 0 found of 6"):
            supports.episode(2, 2, seed=0, epoch=0, image="image0", distinct_images=True)

    def test_too_few(self, supports):
        with pytest.raises(ValueError, match=r'Class "class\d": 5 supports from other images needed, 4 found of 6'):
            supports.episode(1, 5, seed=0, epoch=0, image="image0")
        with pytest.raises(ValueError, match=r"11 classes needed for an episode, found 0 to include and 10"):
            supports.episode(11, 1, seed=0, epoch=0, image="image0")
        with pytest.raises(ValueError, match=r"1 classes needed for an episode, found 2 to include"):
            supports.episode(1, 1, seed=0, epoch=0, image="image0", include=["class1", "class2"])
        with pytest.raises(ValueError, match=r"No classes \['x'\]"):
            supports.episode(1, 1, seed=0, epoch=0, image="image0", include=["x"])

    def test_every_shot_is_drawn_in_time(self, supports):
        seen = {
            s.annotation_id
            for epoch in range(60)
            for s in supports.episode(1, 2, seed=0, epoch=epoch, image=9, include=["class3"])["class3"]
        }
        assert seen == {300, 301, 310, 311, 320, 321}

    def test_repeat_fills_up(self, supports):
        """Class 0 has four supports on two other images: one of each image, the other two, then from the first on."""
        (shots,) = supports.episode(
            1, 6, seed=0, epoch=0, image="image0", include=["class0"], distinct_images=True, repeat=True
        ).values()
        assert {s.image_id for s in shots[:2]} == {"image1", "image2"} and len(set(shots[:4])) == 4
        assert shots[4:] == shots[:2]
        pair = supports.episode(2, 2, seed=0, epoch=0, image="image0", distinct_images=True, repeat=True)
        assert all(len(set(shots)) == 2 for shots in pair.values())
        lone = SupportSet("a", [Support("f", "image0", 1, 0, (0, 0, 1, 1))])
        with pytest.raises(ValueError, match="2 supports from other images needed, 0 found of 1"):
            lone.episode(1, 2, seed=0, epoch=0, image="image0", repeat=True)

    def test_queries_of_one_image_are_told_apart(self, supports):
        draws = [self.draw(supports, query=query) for query in ("", "class1", "class2")]
        assert draws[0] == self.draw(supports) and draws[0] != draws[1] != draws[2] != draws[0]


class Counted(tuple):
    """Supports that count how many of them are looked at, and cannot be walked through."""

    seen = 0

    def __getitem__(self, place):
        Counted.seen += 1
        return super().__getitem__(place)

    def __iter__(self):
        raise AssertionError("a draw walks through all supports of a class")


def test_an_episode_visits_only_a_few_supports():
    """The size of FewX's pool: 141,000 supports of 60 classes on 60,000 images, 20 supports a draw."""
    rng = np.random.default_rng(0)
    images, classes = rng.integers(0, 60000, 141000).tolist(), rng.integers(0, 60, 141000).tolist()
    shots = [Support("f", i, n, c, (0, 0, 1, 1)) for n, (i, c) in enumerate(zip(images, classes, strict=True))]
    pool = SupportSet([f"class{c}" for c in range(60)], shots)
    assert pool.count_images("class7", without=shots[0].image_id) > 2000  # builds the index
    pool._shots = [Counted(of_class) for of_class in pool._shots]
    for number in range(50):
        include = [f"class{classes[number]}"]
        drawn = pool.episode(
            2, 10, seed=0, epoch=number, image=images[number], include=include, distinct_images=True, repeat=True
        )
        assert sum(map(len, drawn.values())) == 20
        assert images[number] not in {s.image_id for shots in drawn.values() for s in tuple.__iter__(shots)}
    assert 50 * 20 <= Counted.seen < 50 * 21  # hardly a support is drawn in vain


def test_lists_of_a_set():
    shots = [Support("f", image, n, c, (0, 0, 1, 1)) for n, (c, image) in enumerate([(2, 5), (0, 5), (2, 6), (2, 5)])]
    pool = SupportSet("abc", shots)
    assert pool.appearance == ("c", "a")  # classes as the supports bring them up
    assert list(pool.places("c", 5)) == [0, 2] and list(pool.places("b", 5)) == []
    assert [pool.count_images("c", without=image) for image in (None, 5, 9)] == [2, 1, 2]
    with pytest.raises(ValueError, match='No class "z"'):
        pool.places("z", 5)


def test_with_policy_changes_the_crop_alone(records):
    supports = SupportSet.from_records(records, ["a", "b", "c"])
    small = supports.with_policy(partial(fewx_support_crop, size=64))
    shot = small.shots("a")[0]
    assert small.shots("a") == supports.shots("a")
    assert small.crop(shot).image.shape == (64, 64, 3) and supports.crop(shot).image.shape == (80, 100, 3)
    assert small.with_policy("tight").crop(shot).image.shape == (293, 195, 3)
    with pytest.raises(ValueError, match='policy "square"'):
        supports.with_policy("square")
