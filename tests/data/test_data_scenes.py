"""Scenes: patches and their objects, supports, flips, colours, mined patches, workers, ranks, resuming, faults.

Every object is a rectangle of one colour, which tells its class and its picture.
"""

import traceback
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fsdet.data import catalog
from fsdet.data.crops import tight_crop
from fsdet.data.loader import build_train_loader
from fsdet.data.mapper import ImageError
from fsdet.data.patches import FILTERS, MinedPatch, mined_file, save_mined
from fsdet.data.scenes import SceneKey, scene_records

NAME = "scenes_test_set"
CLASSES = ["ant", "bee", "cat", "dog"]
SIZE, AREA = 48, 24  # px, side of a patch and of a square support
# Picture -> its objects: (class id, XYXY). Class 2 is on picture 1 alone, class 3 on none.
OBJECTS = {
    0: [(0, (10, 20, 50, 50))],
    1: [(1, (60, 10, 90, 60)), (2, (10, 8, 40, 32))],
    2: [(1, (20, 30, 80, 60))],
    3: [(0, (5, 5, 45, 45)), (1, (62, 40, 94, 66))],
    4: [(0, (30, 10, 70, 30))],
}


def colour(class_id, picture):
    """BGR of an object; the green of the background is 0."""
    return 40 + 40 * class_id, 100 + 20 * picture, 0


def kind_of(pixel):
    """(class id, picture) of a colour."""
    return round((int(pixel[0]) - 40) / 40), round((int(pixel[1]) - 100) / 20)


@pytest.fixture
def records(tmp_path):
    """Five pictures of 100 x 70 (width x height)."""
    result = []
    for number, objects in OBJECTS.items():
        picture = np.zeros((70, 100, 3), np.uint8)
        picture[:, :, 2] = np.linspace(20, 250, 100, dtype=np.uint8)  # so that a mirrored patch is another one
        rows = []
        for class_id, (x0, y0, x1, y1) in objects:
            picture[y0:y1, x0:x1] = colour(class_id, number)
            row = {"id": 10 * number + class_id, "category_id": class_id, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            rows.append({**row, "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0})
        path = tmp_path / f"{number}.png"
        assert cv2.imwrite(str(path), picture)
        record = {"file_name": str(path), "image_id": number, "height": 70, "width": 100, "annotations": rows}
        result.append(record)
    return result


@pytest.fixture
def make_cfg(records, clean_catalogs, tmp_path):
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(thing_classes=CLASSES)

    def make(**values):
        """Upper-case values are keys of INPUT.PATCH."""
        cfg = get_cfg()
        cfg.DATALOADER.VIEWS, cfg.DATALOADER.NUM_WORKERS = values.get("views", 0), values.get("workers", 0)
        cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR, cfg.SOLVER.IMS_PER_BATCH = (NAME,), str(tmp_path), 2
        cfg.MODEL.PIXEL_MEAN = [1.0, 2.0, 3.4]
        cfg.INPUT.FS = CfgNode({"ENABLED": False, "CACHE_MIB": 1})
        cfg.OS2D = CfgNode({"EVAL_SCALE": 100, "IMAGE_SIZE": 0, "CLASS_IMAGE_SIZE": AREA})
        patch = {"ENABLED": True, "SIZE": SIZE, "SCALE": 0.0, "SCALE_JITTER": 0.7, "ASPECT_JITTER": 0.9}
        patch |= {"MIN_COVERAGE": 0.7, "FLIP": False, "COLOUR": False, "EXTRA_NEGATIVES": 0, "OWN_OBJECTS": False}
        patch |= {"MINING_PERIOD": 0, "OBJECT_SIZE": 0}
        cfg.INPUT.PATCH = CfgNode(patch | {key: value for key, value in values.items() if key.isupper()})
        return cfg

    return make


@pytest.fixture
def make_dataset(make_cfg):
    return lambda **values: build_train_loader(make_cfg(**values), seed=5).dataset


def items(cfg, count, **options):
    batches = islice(iter(build_train_loader(cfg, seed=5, **options)), count)
    return [item for batch in batches for item in batch]


def content(found):
    """Everything that a model sees of some items."""
    return [
        (
            item["image_id"],
            item["image"].tolist(),
            item["instances"].gt_boxes.tensor.tolist(),
            item["instances"].gt_classes.tolist(),
            item["instances"].gt_difficult.tolist(),
            [crop.tolist() for crop in item["support_images"]],
            item["support_classes"],
            item.get("mined_class"),
        )
        for item in found
    ]


def supports_of(item):
    """(class id, picture) of an item's supports, by their colour."""
    return [kind_of(crop[:, crop.shape[1] // 2, crop.shape[2] // 2]) for crop in item["support_images"]]


def assert_boxes_fit(item):
    """The middle of every box that lies in the patch has the colour of its object; returns how many there are."""
    checked = 0
    for box, class_id in zip(item["instances"].gt_boxes.tensor, item["instances"].gt_classes.tolist(), strict=True):
        x, y = ((box[:2] + box[2:]) / 2).int().tolist()
        if 2 <= x < SIZE - 2 and 2 <= y < SIZE - 2:
            pixel = item["image"][:, y, x].numpy()
            assert np.abs(pixel.astype(int) - colour(class_id, item["image_id"])).max() < 12
            checked += 1
    return checked


def test_items_of_an_epoch(make_cfg):
    found = items(make_cfg(), 10)
    assert sorted(item["image_id"] for item in found[:5]) == [0, 1, 2, 3, 4]
    assert sum(map(assert_boxes_fit, found)) > 15
    for item in found:
        assert item["image"].shape == (3, SIZE, SIZE) and item["image"].dtype == torch.uint8
        assert item["instances"].image_size == (SIZE, SIZE)
        assert item["instances"].gt_classes.dtype == torch.int64 and item["instances"].gt_difficult.dtype == torch.bool
        # Classes are those of the whole picture, whatever the patch shows of it.
        assert item["support_classes"] == sorted(class_id for class_id, _ in OBJECTS[item["image_id"]])
        drawn = supports_of(item)
        assert [class_id for class_id, _ in drawn] == item["support_classes"]
        for class_id, picture in drawn:
            assert picture != item["image_id"] or class_id == 2  # which no other picture shows
        assert not {"annotations", "mined_class"} & set(item)
    assert len({str(row) for row in content([item for item in found if item["image_id"] == 1])}) == 4  # drawn anew
    dataset = build_train_loader(make_cfg(), seed=5).dataset
    assert {len(dataset[epoch, 3]["instances"]) for epoch in range(20)} == {1, 2}  # a patch may have one of two objects


def test_supports_are_tight_crops_of_one_area(make_dataset):
    """The object of picture 2 has 60 x 30 pixels: floor(24 * sqrt 2) x floor(24 / sqrt 2) = 33 x 16."""
    dataset, shapes = make_dataset(), set()
    for epoch in range(20):
        item = dataset[epoch, 1]
        for crop, kind in zip(item["support_images"], supports_of(item), strict=True):
            shapes.add((*kind, *crop.shape))
            assert (crop.flatten(1).float().std(dim=1) < 1).all()  # nothing but the object
    assert {(1, 2, 3, 16, 33)} == {shape for shape in shapes if shape[:2] == (1, 2)}


def test_a_support_is_resized_in_six_ways(make_dataset, records):
    """Class 2 has one support, here of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    cv2.imwrite(records[1]["file_name"], noise)
    dataset = make_dataset()
    looks = {dataset[epoch, 1]["support_images"][1].numpy().transpose(1, 2, 0).tobytes() for epoch in range(60)}
    assert looks == {tight_crop(noise, (10, 8, 40, 32), AREA, resample=way)[0].tobytes() for way in FILTERS}


def test_supports_are_drawn_evenly(make_dataset):
    """Class 0 on pictures 0, 3 and 4; a scene never meets its own object."""
    dataset = make_dataset()
    counts = Counter(supports_of(dataset[epoch, 3])[0][1] for epoch in range(200))
    assert set(counts) == {0, 4} and 70 < counts[0] < 130
    generator = np.random.default_rng(0)
    counts = Counter(Path(dataset.supports.draw(0, "other", generator).file_name).stem for _ in range(300))
    assert set(counts) == {"0", "3", "4"} and min(counts.values()) > 70


def test_workers_ranks_and_resuming_change_nothing(make_cfg):
    values = {"FLIP": True, "COLOUR": True, "EXTRA_NEGATIVES": 1}
    whole = content(items(make_cfg(**values), 6))
    assert content(items(make_cfg(**values, workers=2), 6)) == whole
    assert content(items(make_cfg(**values, workers=1), 2, start=4)) == whole[8:]
    ranks = [content(items(make_cfg(**values), 6, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [item for pair in zip(*ranks, strict=True) for item in pair] == whole


def test_the_cache_changes_nothing_but_the_reading(make_dataset):
    seen = []
    for capacity in (0, 1 << 20):
        dataset = make_dataset()
        dataset.supports.cache.capacity = capacity
        seen.append(content([dataset[epoch, index] for epoch in range(12) for index in range(5)]))
        cache = dataset.supports.cache
        assert cache.hits + cache.misses == 12 * 7 and (cache.hits > 30) == (capacity > 0)
    assert seen[0] == seen[1]


def test_views_return_and_supports_are_drawn_anew(make_dataset):
    dataset = make_dataset(views=2)
    found = [dataset[epoch, 3] for epoch in range(8)]
    assert all(torch.equal(found[e]["image"], found[e % 2]["image"]) for e in range(8))
    assert not torch.equal(found[0]["image"], found[1]["image"])
    assert len({str(supports_of(item)) for item in found[::2]}) > 1


def test_scale_of_a_scene(make_cfg, make_dataset, records):
    dataset = make_dataset()
    assert dataset.base_scale(records[0]) == 1  # 100 px wanted for 100
    assert make_dataset(SCALE=0.25).base_scale(records[0]) == 0.25
    cfg = make_cfg()
    cfg.OS2D.IMAGE_SIZE = 400
    assert build_train_loader(cfg, seed=0).dataset.base_scale(records[0]) == 0.25


def test_further_classes(make_dataset):
    """Class 3 has no support anywhere; picture 0 shows class 0."""
    dataset = make_dataset(EXTRA_NEGATIVES=1)
    seen = Counter()
    for epoch in range(60):
        item = dataset[epoch, 0]
        first, second = item["support_classes"]
        assert first == 0 and supports_of(item)[1][0] == second
        seen[second] += 1
    assert set(seen) == {1, 2} and min(seen.values()) > 15
    assert len(make_dataset(EXTRA_NEGATIVES=5)[0, 0]["support_classes"]) == 3  # as many as there are
    # The supports of the classes shown are those that the scene has without further ones.
    assert supports_of(dataset[7, 3])[:2] == supports_of(make_dataset()[7, 3])


def test_picture_without_objects(make_cfg, records):
    records[4]["annotations"] = []
    cfg = make_cfg()
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    item = build_train_loader(cfg, seed=5).dataset[0, 4]
    assert len(item["instances"]) == 0 and item["instances"].gt_boxes.tensor.shape == (0, 4)
    assert len(item["support_classes"]) == 1  # so that a batch of such pictures is searched for something


def test_difficult_objects_and_crowds(make_dataset, records):
    """Neither is a target, and supports only where a class has no other object; crowds never."""
    records[0]["annotations"][0]["difficult"] = 1
    records[1]["annotations"][1]["iscrowd"] = 1  # the only one of class 2
    records[2]["annotations"][0]["difficult"] = 1
    dataset = make_dataset()
    assert dataset.supports.class_ids == (0, 1)
    for epoch in range(30):
        assert dataset[epoch, 0]["instances"].gt_difficult.all()
        item = dataset[epoch, 1]
        assert item["support_classes"] == [1] and supports_of(item) == [(1, 3)]
        flags = dict(zip(item["instances"].gt_classes.tolist(), item["instances"].gt_difficult.tolist(), strict=True))
        assert flags.get(2, True)
        assert supports_of(dataset[epoch, 4]) == [(0, 3)]
    for record in records:
        for row in record["annotations"]:
            row["difficult"] = 1
    assert len(make_dataset().supports._shots[0]) == 3


def test_objects_that_a_patch_cuts(make_dataset, records):
    """A mined window of 40 px keeps 100 %, half and a quarter of three boxes of 20 px."""
    boxes = [(0, 0, 20, 20), (30, 0, 20, 20), (35, 20, 20, 20)]
    records[0]["annotations"] = [
        {"id": n, "category_id": 0, "bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
        for n, box in enumerate(boxes)
    ]
    dataset = make_dataset()
    dataset.mined = {"0": [MinedPatch("pos", (0.0, 0.0, 40.0, 40.0), 0, 1.0)]}
    found = dataset[0, 0]["instances"]
    assert torch.allclose(found.gt_boxes.tensor, torch.tensor([[0, 0, 24, 24], [36, 0, 60, 24.0]]))
    assert found.gt_difficult.tolist() == [False, True]


def test_k_shot_records_of_one_picture_are_joined(records, caplog):
    first, second = records[3]["annotations"]
    split = [{**records[3], "annotations": [row]} for row in (first, second, first)]
    empty = {**first, "id": 99, "bbox": [120, 5, 10, 10]}
    (scene,) = scene_records([*split, {**records[3], "annotations": [empty]}])
    assert [row["id"] for row in scene["annotations"]] == [30, 31]
    assert len(records[3]["annotations"]) == 2  # the records themselves stay
    assert "1 object(s) without area inside their picture left out" in caplog.text


class TestClassPictures:
    """Classes 0 to 2 have a picture of their own, in blue 255 and the green of picture number 7, which is not there."""

    @pytest.fixture(autouse=True)
    def pictures(self, make_cfg, tmp_path, monkeypatch):
        folder = tmp_path / "classes"
        folder.mkdir()
        self.found = []
        for class_id in range(3):
            path = folder / f"{class_id}.png"
            cv2.imwrite(str(path), np.full((30, 20, 3), colour(class_id, 7), np.uint8))
            whole = {"id": class_id, "category_id": class_id, "bbox": [0, 0, 20, 30], "bbox_mode": BoxMode.XYXY_ABS}
            record = {"file_name": str(path), "image_id": path.name, "annotations": [whole]}
            self.found.append(record)
        spec, sources = SimpleNamespace(benchmark="oneshot"), object()
        MetadataCatalog.get(NAME).set(spec=spec, sources=sources)

        def load(given, where):
            assert given is spec and where is sources
            return self.found

        monkeypatch.setattr(catalog, "load_supports", load)

    def test_they_are_the_supports(self, make_dataset):
        dataset = make_dataset()
        for epoch in range(5):
            assert supports_of(dataset[epoch, 1]) == [(1, 7), (2, 7)]
            assert dataset[epoch, 1]["support_images"][0].shape == (3, 29, 19)  # of 20 x 30

    def test_own_objects_are_as_likely_each(self, make_dataset):
        """Class 1: its picture, and objects of pictures 1, 2 and 3, of which the scene's own is left out."""
        dataset = make_dataset(OWN_OBJECTS=True)
        counts = Counter(supports_of(dataset[epoch, 2])[0][1] for epoch in range(300))
        assert set(counts) == {7, 1, 3} and min(counts.values()) > 70
        assert {supports_of(dataset[epoch, 1])[1] for epoch in range(20)} == {(2, 7)}

    def test_class_without_support(self, make_dataset):
        del self.found[1]
        with pytest.raises(
            ValueError, match=rf"{NAME}: no support of the classes \['bee'\].*CLASS_IMAGES.*OWN_OBJECTS"
        ):
            make_dataset()
        assert len(make_dataset(OWN_OBJECTS=True)) == 5


class TestFlips:
    def test_scene_boxes_and_supports_of_a_batch_are_flipped_alike(self, make_dataset):
        plain, flipped = make_dataset(), make_dataset(FLIP=True)
        seen = Counter()
        for iteration in range(60):
            pair = []
            for place, index in enumerate((1, 3)):
                key = SceneKey(0, index, iteration, place)
                a, b = plain[key], flipped[key]
                axes = [[], [2], [1], [1, 2]]
                (axis,) = [axis for axis in axes if torch.equal(a["image"].flip(axis), b["image"])]
                for crop, other in zip(a["support_images"], b["support_images"], strict=True):
                    assert torch.equal(crop.flip(axis), other)
                pair.append(tuple(axis))
                assert_boxes_fit(b)
            assert pair[0] == pair[1]
            seen[pair[0]] += 1
        assert len(seen) == 4 and min(seen.values()) > 5

    def test_flipped_boxes(self, make_dataset):
        dataset = make_dataset(FLIP=True)
        dataset._draw_flips = lambda iteration: (True, False)
        mirrored, plain = dataset[0, 3]["instances"], make_dataset()[0, 3]["instances"]
        x0, y0, x1, y1 = plain.gt_boxes.tensor.T
        expected = torch.stack([SIZE - x1, y0, SIZE - x0, y1], dim=1)
        assert torch.allclose(mirrored.gt_boxes.tensor, expected, atol=1e-4)


def test_colours_of_patches_alone_change(make_cfg, make_dataset):
    plain, changed = make_dataset(), make_dataset(COLOUR=True)
    different = 0
    for epoch in range(20):
        a, b = plain[epoch, 3], changed[epoch, 3]
        different += not torch.equal(a["image"], b["image"])
        b["image"] = a["image"]
        assert content([a]) == content([b])
    assert 14 < different < 21
    # The same picture in the other channel order changes in the same way.
    cfg = make_cfg(COLOUR=True)
    cfg.INPUT.FORMAT = "RGB"
    rgb = build_train_loader(cfg, seed=5).dataset
    for epoch in range(5):
        assert torch.equal(rgb[epoch, 3]["image"].flip(0), changed[epoch, 3]["image"])


class TestMined:
    crops = {"neg": (0.0, 0.0, 30.0, 30.0), "pos": (40.0, 0.0, 70.0, 30.0), "pos_loc": (60.0, 40.0, 100.0, 100.0)}

    def patches(self, *kinds, class_id=2):
        return [MinedPatch(kind, self.crops[kind], class_id, 1.0) for kind in kinds]

    def kinds(self, dataset, place):
        """Kinds of patches that scene 0 gets at a place of its batch, by the position of its only object."""
        lefts = set()
        for epoch in range(40):
            item = dataset[SceneKey(epoch, 0, epoch, place)]
            lefts.add(int(item["image"][2, 0, 0]) // 60)  # red rises from left to right
            assert item["mined_class"] == 2 and 2 in item["support_classes"]
            assert supports_of(item)[item["support_classes"].index(2)][0] == 2
        return {("neg", "pos", "pos_loc")[left] for left in lefts}

    def test_half_of_a_batch_takes_negatives(self, make_dataset):
        dataset = make_dataset()
        dataset.mined = {"0": self.patches("neg", "pos", "pos_loc")}
        assert self.kinds(dataset, 0) == self.kinds(dataset, 2) == {"pos", "pos_loc"}
        assert self.kinds(dataset, 1) == self.kinds(dataset, 3) == {"neg"}
        assert "mined_class" not in dataset[0, 1]  # a scene without mined patches has random ones

    def test_any_where_the_wanted_kind_is_missing(self, make_dataset):
        dataset = make_dataset()
        dataset.mined = {"0": self.patches("neg")}
        assert self.kinds(dataset, 0) == {"neg"}
        dataset.mined = {"0": self.patches("pos")}
        assert self.kinds(dataset, 1) == {"pos"}

    def test_its_class_is_there_once(self, make_dataset):
        dataset = make_dataset(EXTRA_NEGATIVES=3)
        dataset.mined = {"0": self.patches("neg"), "1": self.patches("neg")}
        assert dataset[0, 0]["support_classes"][:2] == [0, 2] and len(dataset[0, 0]["support_classes"]) == 3
        assert sorted(dataset[0, 1]["support_classes"]) == [0, 1, 2]

    def test_beyond_the_border_is_the_mean_colour_each_time(self, make_dataset):
        """The window of 40 x 60 from (60, 40) has 30 px below the picture: the lower half of the patch."""
        dataset = make_dataset()
        dataset.mined = {"0": self.patches("pos_loc")}
        for epoch in range(12):
            image = dataset[epoch, 0]["image"]
            assert (image[:, 28:] == torch.tensor([1, 2, 3])[:, None, None]).all()
            assert (image[2, :20] > 140).all()
            assert dataset.mined["0"] == self.patches("pos_loc")

    def test_a_loader_takes_the_patches_of_its_first_iteration(self, make_cfg, tmp_path):
        cfg = make_cfg(MINING_PERIOD=4)
        for iteration, kind in ((4, "neg"), (8, "pos")):
            found = {str(number): self.patches(kind) for number in range(5)}
            save_mined(mined_file(tmp_path, iteration, 4), found, CLASSES)
        for start, kind in ((0, None), (3, None), (4, "neg"), (7, "neg"), (8, "pos"), (11, "pos"), (12, None)):
            mined = build_train_loader(cfg, seed=5, start=start).dataset.mined
            assert [p.kind for p in mined.get("3", ())] == [kind] * (kind is not None)
        save_mined(mined_file(tmp_path, 4, 4), {"0": self.patches("neg", class_id=0)}, ["elk"])
        with pytest.raises(ValueError, match=r"mined_patches_0000004\.json: no list of mined patches of the 4 classes"):
            build_train_loader(cfg, seed=5, start=4)


class TestFaults:
    def test_unreadable_scene(self, make_cfg, records):
        path = Path(records[2]["file_name"])
        whole = path.read_bytes()
        dataset = build_train_loader(make_cfg(), seed=5).dataset
        for damage, message in ((whole[:100], "cannot be decoded"), (None, "not found")):
            path.unlink()
            if damage:
                path.write_bytes(damage)
            with pytest.raises(ImageError, match=rf"2\.png: this image cannot be used \(.*{message}.*remove image 2"):
                dataset[0, 2]
        with pytest.raises(ImageError, match=r"2\.png: this ") as error:
            items(make_cfg(workers=1), 5)
        assert "\n" not in str(error.value)
        traceback.clear_frames(error.tb)

    def test_scene_of_another_size(self, make_dataset, records):
        records[2]["height"] = 71
        with pytest.raises(ImageError, match=r"2\.png: this image cannot be used"):
            make_dataset()[0, 2]

    def test_unreadable_support(self, make_dataset, records):
        """Class 1 of picture 1 meets objects of pictures 2 and 3."""
        for number in (2, 3):
            Path(records[number]["file_name"]).write_bytes(b"no picture")
        with pytest.raises(ImageError, match=r"[23]\.png: this support picture cannot be used"):
            make_dataset()[0, 1]

    def test_no_support_at_all_is_no_endless_search(self, make_cfg, records):
        """Crowds alone: nothing to search for, and nothing to draw further classes from."""
        for record in records:
            for row in record["annotations"]:
                row["iscrowd"] = 1
        cfg = make_cfg()
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
        item = build_train_loader(cfg, seed=5).dataset[0, 1]
        assert item["support_images"] == [] and item["support_classes"] == []
        assert item["instances"].gt_difficult.all()
