"""Episodic batches: what an item holds, workers, ranks, resuming, the cache, tables of ready-cut crops, faults."""

import json
import traceback
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from data_trees import box_of, coco_json
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fsdet.data import prepare_fewx
from fsdet.data.episode_draws import LegacyEpisodes
from fsdet.data.episodes import build_episodes, build_support_pool
from fsdet.data.loader import build_train_loader
from fsdet.data.mapper import ImageError
from fsdet.data.support import fewx_support_crop

NAME = "episodes_test_set"
CLASSES = ["ant", "bee", "cat"]
SIZE = 48  # px, side of a crop


@pytest.fixture
def records(tmp_path):
    """Six pictures, the odd ones tall: picture i shows class i % 3; 0 also class 1, 5 also a crowd of class 0.

    Pixels rise along x, so that a mirrored crop is another one, and a picture is known by its blue.
    """
    result = []
    for i in range(6):
        height, width = (90, 70) if i % 2 else (70, 90)
        picture = np.empty((height, width, 3), np.uint8)
        picture[:, :, 0] = 20 + 40 * i
        picture[:, :, 1] = np.linspace(0, 255, width, dtype=np.uint8)
        picture[:, :, 2] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
        path = tmp_path / "pictures" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        assert cv2.imwrite(str(path), picture)
        rows = [(i, i % 3, [10 + i, 12, 40, 30], 0)]
        rows += [(10, 1, [5, 6, 20, 25], 0)] if i == 0 else [(11, 0, [2, 2, 50, 50], 1)] if i == 5 else []
        objects = [
            {"id": n, "category_id": c, "bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": crowd}
            for n, c, box, crowd in rows
        ]
        record = {"file_name": str(path), "image_id": i, "height": height, "width": width, "annotations": objects}
        result.append(record)
    return result


@pytest.fixture
def make_cfg(records, clean_catalogs, tmp_path):
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(
        thing_classes=CLASSES,
        thing_dataset_id_to_contiguous_id={7: 0, 8: 1, 9: 2},
        sources=SimpleNamespace(root=tmp_path),
    )

    def make(**values):
        cfg = get_cfg()
        cfg.DATALOADER.GROUP_SIZE = cfg.DATALOADER.VIEWS = cfg.DATALOADER.NUM_WORKERS = 0
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
        cfg.DATASETS.TRAIN = (NAME,)
        cfg.INPUT.MIN_SIZE_TRAIN = (40, 60)
        cfg.SOLVER.IMS_PER_BATCH = 2
        cfg.INPUT.FS = CfgNode({"ENABLED": True, "SUPPORT_WAY": 2, "SUPPORT_SHOT": 2, "CROP_SIZE": SIZE})
        cfg.INPUT.FS.update({"SAMPLING": "fresh", "CACHE_MIB": 1, "TABLE": ""})
        cfg.INPUT.FS.update({key: value for key, value in values.items() if key.isupper()})
        cfg.DATALOADER.NUM_WORKERS = values.get("workers", 0)
        return cfg

    return make


def items(cfg, count, **options):
    batches = islice(iter(build_train_loader(cfg, seed=5, **options)), count)
    return [item for batch in batches for item in batch]


def content(found):
    """Everything that a model sees of some items."""
    return [
        (
            item["file_name"],
            item["image"].tolist(),
            item["instances"].gt_boxes.tensor.tolist(),
            item["instances"].gt_classes.tolist(),
            item["support_images"].tolist(),
            item["support_boxes"].tolist(),
            item["support_classes"],
        )
        for item in found
    ]


def crops_of(records):
    """(class id, image id) -> crops and boxes of that class's objects, cut from the files as they are."""
    cut = {}
    for record in records:
        picture = cv2.imread(record["file_name"])
        for row in record["annotations"]:
            x, y, w, h = row["bbox"]
            if not row["iscrowd"]:
                crop = fewx_support_crop(picture, (x, y, x + w, y + h), size=SIZE)
                cut[row["category_id"], record["image_id"]] = crop
    return cut


def source(item, place, cut):
    """(class id, image id) of one of an item's supports, found by its pixels and its box."""
    pixels, box = item["support_images"][place].numpy().transpose(1, 2, 0), item["support_boxes"][place].tolist()
    (found,) = [key for key, (crop, on_it) in cut.items() if (crop == pixels).all() and on_it.tolist() == box]
    return found


def test_items_of_an_epoch(make_cfg, records):
    """Seven queries: one for each picture and class, picture 0 with two; the crowd makes none."""
    loader = build_train_loader(make_cfg(), seed=5)
    assert len(loader.dataset) == 7
    found = items(make_cfg(), 14)
    cut = crops_of(records)
    queries = [(item["image_id"], int(item["instances"].gt_classes[0])) for item in found]
    assert sorted(set(queries)) == [(0, 0), (0, 1), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2)]
    for item, (image, class_id) in zip(found, queries, strict=True):
        assert len(item["instances"]) == 1 and item["image"].dtype == torch.uint8
        assert item["support_images"].shape == (4, 3, SIZE, SIZE) and item["support_images"].dtype == torch.uint8
        assert item["support_boxes"].shape == (4, 4) and item["support_boxes"].dtype == torch.float32
        drawn = [source(item, place, cut) for place in range(4)]
        classes = [CLASSES.index(name) for name in item["support_classes"]]
        assert [c for c, _ in drawn] == [classes[0]] * 2 + [classes[1]] * 2 and classes[0] == class_id
        assert image not in {i for _, i in drawn}
        shown = {a["category_id"] for a in records[image]["annotations"]}
        assert class_id in shown and classes[1] not in shown  # the crowd of picture 5 counts
        assert not {"query", "annotations"} & set(item)
    supports = {str(item["support_images"].tolist()) for item in found if item["image_id"] == 3}
    assert len(supports) > 1  # fresh ones in another epoch


def test_workers_ranks_and_resuming_change_nothing(make_cfg):
    whole = content(items(make_cfg(), 6))
    assert content(items(make_cfg(workers=2), 6)) == whole
    assert content(items(make_cfg(workers=1), 2, start=4)) == whole[8:]
    ranks = [content(items(make_cfg(), 6, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [item for pair in zip(*ranks, strict=True) for item in pair] == whole
    assert content(items(make_cfg(SAMPLING="legacy", SUPPORT_SHOT=1), 6)) != whole


def test_the_cache_changes_nothing_but_the_reading(make_cfg):
    size = 3 * SIZE**2 + 16  # bytes of a crop and its box
    seen = {}
    for capacity in (0, size, 3 * size, 1 << 20):
        loader = build_train_loader(make_cfg(), seed=5)
        cache = loader.dataset.cache
        assert cache.capacity == 1 << 20
        cache.capacity = capacity
        seen[capacity] = content([item for batch in islice(iter(loader), 7) for item in batch])
        assert cache.hits + cache.misses == 7 * 2 * 4 and cache.bytes <= capacity
        if capacity == 1 << 20:
            assert cache.misses == 7 and cache.bytes == 7 * size  # seven objects that are no crowd
        if capacity == 0:
            assert cache.hits == 0
    assert all(batches == seen[0] for batches in seen.values())


def test_grouping_by_orientation_goes_by_query(make_cfg):
    cfg = make_cfg()
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    found = items(cfg, 12)
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert (first["width"] > first["height"]) == (second["width"] > second["height"])


def test_one_shot_supports_are_the_query_s_own_object(make_cfg, records):
    """Every class on one picture: its crop and the mirrored one, box and all, both within a few epochs."""
    records[:] = [records[1], records[2], records[3]]
    cut = crops_of(records)
    found = items(make_cfg(SUPPORT_SHOT=3), 20)
    seen = set()
    for item in found:
        class_id = int(item["instances"].gt_classes[0])
        crop, box = cut[class_id, item["image_id"]]
        for place in range(3):
            pixels = item["support_images"][place].numpy().transpose(1, 2, 0)
            mirrored = not (pixels == crop).all()
            seen.add(mirrored)
            assert (pixels == (crop[:, ::-1] if mirrored else crop)).all()
            expected = [SIZE - box[2], box[1], SIZE - box[0], box[3]] if mirrored else box.tolist()
            assert item["support_boxes"][place].tolist() == expected
        assert all(source(item, place, cut)[0] != class_id for place in (3, 4, 5))  # never mirrored
    assert seen == {True, False}


def test_views_of_the_query_return_and_supports_are_drawn_anew(make_cfg):
    cfg = make_cfg()
    cfg.DATALOADER.VIEWS = 1
    dataset = build_train_loader(cfg, seed=5).dataset
    first, later = dataset[0, 3], [dataset[epoch, 3] for epoch in range(1, 9)]
    assert all(torch.equal(first["image"], item["image"]) for item in later)
    assert any(not torch.equal(first["support_images"], item["support_images"]) for item in later)


def test_legacy_draws_of_a_record_never_change(make_cfg):
    dataset = build_train_loader(make_cfg(SAMPLING="legacy", SUPPORT_SHOT=1), seed=5).dataset
    assert isinstance(dataset.episodes, LegacyEpisodes)
    for index in range(7):
        assert torch.equal(dataset[0, index]["support_images"], dataset[5, index]["support_images"])


def test_plain_batches_have_no_supports(make_cfg):
    (item, _) = items(make_cfg(ENABLED=False), 1)
    assert not {"support_images", "support_boxes", "support_classes", "query"} & set(item)


def test_boxes_outside_their_picture_are_found_before_training(make_cfg, records, caplog):
    records[1]["annotations"][0]["bbox"] = [200, 5, 10, 10]
    queries, episodes = build_episodes(make_cfg(), records, seed=0)
    assert f"{NAME}: 1 object(s) without area inside their picture left out" in caplog.text
    assert caplog.text.count("without area") == 1
    assert len(queries) == 6 and len(episodes.pool) == 6


def test_unreadable_supports_are_named_in_one_line(make_cfg, records):
    """Picture 3 is the only other one with class 0; the query is picture 0."""
    dataset = build_train_loader(make_cfg(), seed=5).dataset
    content_of = Path(records[3]["file_name"]).read_bytes()
    for damage, message in ((content_of[:200], "cannot be decoded"), (None, "not found")):
        Path(records[3]["file_name"]).unlink()
        if damage:
            Path(records[3]["file_name"]).write_bytes(damage)
        with pytest.raises(ImageError, match=rf"3\.png: this support picture cannot be used \(.*{message}") as error:
            dataset[0, 0]
        assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match=r"3\.png: this ") as error:
        items(make_cfg(workers=1), 7)
    assert "\n" not in str(error.value)
    traceback.clear_frames(error.tb)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"SAMPLING": "often"}, 'SAMPLING is "often".*expected fresh'),
        ({"SUPPORT_SHOT": 0}, "SUPPORT_SHOT 0"),
        ({"SUPPORT_WAY": 1}, "SUPPORT_WAY 1"),
        ({"CROP_SIZE": 0}, "CROP_SIZE 0"),
        ({"SUPPORT_WAY": 3, "SAMPLING": "legacy"}, "legacy knows 2 only"),
        ({"SUPPORT_SHOT": 2, "SAMPLING": "legacy"}, r"of 7 queries cannot be drawn: Class \"\w+\": 2 supports"),
    ],
)
def test_values_that_cannot_be(make_cfg, values, message):
    with pytest.raises(ValueError, match=message):
        build_train_loader(make_cfg(**values), seed=0)


class TestTable:
    @pytest.fixture
    def table(self, tmp_path):
        """table.csv with crops of 320 pixels of the same six pictures and objects, the crowd included."""
        boxes = [box_of(i, i, 7 + i % 3, [10 + i, 12, 40, 30]) for i in range(6)]
        boxes += [box_of(10, 0, 8, [5, 6, 20, 25]), box_of(11, 5, 7, [2, 2, 50, 50], iscrowd=1)]
        data = coco_json([(i, f"{i}.png") for i in range(6)], boxes, {7: "ant", 8: "bee", 9: "cat"})
        for i, image in enumerate(data["images"]):
            image["height"], image["width"] = (90, 70) if i % 2 else (70, 90)
        path = tmp_path / "made" / "train.json"
        path.parent.mkdir()
        path.write_text(json.dumps(data))
        output = tmp_path / "made" / "table.csv"
        prepare_fewx.run_step("table", path, output, images=tmp_path / "pictures", folder="cut")
        return output

    def test_batches_equal_those_cut_on_the_fly_but_for_jpeg(self, make_cfg, table):
        """Negatives may differ: here class 0 is on picture 5 as a crowd."""
        cut = items(make_cfg(CROP_SIZE=320), 4)
        read = items(make_cfg(CROP_SIZE=320, TABLE="made/table.csv"), 4)
        same = 0
        for a, b in zip(cut, read, strict=True):
            assert torch.equal(a["image"], b["image"]) and b["support_images"].shape == (4, 3, 320, 320)
            if a["support_boxes"].tolist() == b["support_boxes"].tolist():
                same += 1
                assert (a["support_images"].float() - b["support_images"].float()).abs().mean() < 2
        assert same > 2

    def test_it_is_the_pool(self, make_cfg, records, table):
        pool = build_support_pool(make_cfg(CROP_SIZE=320, TABLE=str(table)), records)
        assert {name: [s.annotation_id for s in shots] for name, shots in pool} == {
            "ant": [0, 3, 11],
            "bee": [10, 1, 4],
            "cat": [2, 5],
        }
        assert pool.crop(pool.shots("cat")[1]).image.shape == (320, 320, 3)

    def test_other_crop_size(self, make_cfg, records, table):
        with pytest.raises(ValueError, match=r"0000\.jpg: this crop is 320 x 320 pixels, not 48 x 48"):
            build_train_loader(make_cfg(TABLE="made/table.csv"), seed=0)
        dataset = build_train_loader(make_cfg(CROP_SIZE=320, TABLE="made/table.csv"), seed=0).dataset
        for path in (table.parent / "cut").rglob("*.jpg"):
            cv2.imwrite(str(path), np.zeros((30, 40, 3), np.uint8))
        with pytest.raises(ImageError, match=r"\.jpg: this support is 40 x 30 pixels, not 320 x 320"):
            dataset[0, 0]

    def test_needs_category_ids(self, make_cfg, records, table):
        cfg = make_cfg(TABLE="made/table.csv")
        MetadataCatalog.pop(NAME)
        MetadataCatalog.get(NAME).set(thing_classes=CLASSES)
        with pytest.raises(
            ValueError, match=r"INPUT.FS.TABLE is made/table.csv, but episodes_test_set has no category ids"
        ):
            build_support_pool(cfg, records)
