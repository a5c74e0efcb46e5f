"""Batch plans, seeded augmentation, ignore regions and broken pictures on the way to the model."""

import random
import traceback
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from fsdet.data.loader import BatchPlan, PlannedDataset, build_test_loader, build_train_loader
from fsdet.data.mapper import IGNORE_CLASS, FewShotMapper, ImageError, seeded_numpy

WIDTH, HEIGHT = 60, 40
NAME = "loader_test_set"


def first(plan, count):
    return list(islice(iter(plan), count))


# Batch plan


def test_plan_is_a_function_of_the_seed():
    def make(seed):
        return first(BatchPlan(10, 4, seed=seed), 12)

    assert make(3) == make(3)
    assert make(3) != make(4)


def test_every_record_once_per_epoch_without_grouping():
    keys = [key for batch in first(BatchPlan(7, 2, seed=0), 14) for key in batch]  # 28 keys: four epochs
    for epoch in range(4):
        part = keys[7 * epoch : 7 * (epoch + 1)]
        assert {e for e, _ in part} == {epoch} and sorted(i for _, i in part) == list(range(7))
    orders = {tuple(i for _, i in keys[7 * epoch : 7 * (epoch + 1)]) for epoch in range(4)}
    assert len(orders) == 4  # another order every epoch


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("wide", [None, [i % 3 > 0 for i in range(11)]], ids=["plain", "grouped"])
def test_ranks_share_the_batches_of_one_process(world_size, wide):
    options = {"seed": 1, "wide": wide, "group_size": 4}
    whole = first(BatchPlan(11, 8, **options), 9)
    pieces = [first(BatchPlan(11, 8, rank=r, world_size=world_size, **options), 9) for r in range(world_size)]
    assert [sum(parts, []) for parts in zip(*pieces, strict=True)] == whole
    assert {len(batch) for piece in pieces for batch in piece} == {8 // world_size}


@pytest.mark.parametrize("wide", [None, [i % 2 > 0 for i in range(5)]], ids=["plain", "grouped"])
def test_start_skips_the_first_iterations(wide):
    whole = first(BatchPlan(5, 4, seed=2, wide=wide, group_size=2), 20)
    for start in (1, 7):
        assert first(BatchPlan(5, 4, seed=2, wide=wide, group_size=2, start=start), 20 - start) == whole[start:]


@pytest.mark.parametrize(("batch_size", "group_size"), [(4, 0), (4, 2), (8, 4)])
def test_images_of_a_group_share_their_orientation(batch_size, group_size):
    wide = [i % 3 > 0 for i in range(13)]
    batches = first(BatchPlan(13, batch_size, seed=0, wide=wide, group_size=group_size), 40)
    step = group_size or batch_size
    for batch in batches:
        assert len(batch) == batch_size
        for place in range(0, batch_size, step):
            assert len({wide[index] for _, index in batch[place : place + step]}) == 1
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys)  # no record twice in an epoch
    complete = min(epoch for epoch, _ in batches[-1]) - 4  # those that wait arrive within a few epochs
    assert complete > 2
    assert {(epoch, index) for epoch in range(complete) for index in range(13)} <= set(keys)


def test_small_groups_keep_a_lone_tall_image_from_filling_a_batch():
    """K-shot sets: with one group per batch, the only tall image would be a whole batch, as large as the rest."""
    wide = [True] * 9 + [False]
    by_batch = first(BatchPlan(10, 4, seed=0, wide=wide), 30)
    by_pair = first(BatchPlan(10, 4, seed=0, wide=wide, group_size=2), 30)
    assert max(sum(index == 9 for _, index in batch) for batch in by_batch) == 4
    tall = [sum(index == 9 for _, index in batch) for batch in by_pair]
    assert max(tall) == 2 and sum(tall) == pytest.approx(0.1 * 120, abs=2)


def test_plans_that_cannot_work():
    with pytest.raises(ValueError, match="no training record"):
        BatchPlan(0, 4, seed=0)
    with pytest.raises(ValueError, match="4, which 3 processes cannot share"):
        BatchPlan(5, 4, seed=0, world_size=3)
    with pytest.raises(ValueError, match="GROUP_SIZE is 3, which does not divide SOLVER.IMS_PER_BATCH 4"):
        BatchPlan(5, 4, seed=0, wide=[True] * 5, group_size=3)


# Mapper


def test_seeded_numpy_restores_the_generators():
    np.random.seed(5)
    random.seed(5)
    expected = np.random.rand(), random.random()
    np.random.seed(5)
    random.seed(5)

    def draw(*numbers):
        with seeded_numpy(*numbers):
            return np.random.rand(), random.random()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(1, 3, 2), draw(2, 2, 3), draw(12, 3)}) == 4
    with pytest.raises(RuntimeError), seeded_numpy(1):
        np.random.rand()
        raise RuntimeError
    assert (np.random.rand(), random.random()) == expected


@pytest.fixture
def records(tmp_path):
    """Five noise pictures, the odd ones tall, each with one box; the last one shows an unlabelled object."""
    rng, result = np.random.default_rng(0), []
    for i in range(5):
        height, width = (WIDTH, HEIGHT) if i % 2 else (HEIGHT, WIDTH)
        path = tmp_path / f"{i}.jpg"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        box = {"bbox": [4 + i, 5, 20, 25], "bbox_mode": BoxMode.XYXY_ABS, "category_id": i % 3, "iscrowd": 0}
        record = {"file_name": str(path), "image_id": i, "height": height, "width": width, "annotations": [box]}
        result.append(record)
    result[-1]["ignore_regions"] = [[30, 2, 50, 22], [0, 30, 10, 40]]
    return result


@pytest.fixture
def make_cfg(records, clean_catalogs):
    DatasetCatalog.register(NAME, lambda: records)

    def make(*opts):
        cfg = get_cfg()
        cfg.DATALOADER.GROUP_SIZE = cfg.DATALOADER.VIEWS = 0
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (NAME,), (NAME,)
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (32, 40, 48, 56, 64), 40
        cfg.SOLVER.IMS_PER_BATCH = 4
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.merge_from_list(list(opts))
        return cfg

    return make


def test_ignore_regions_follow_the_real_boxes_and_the_flip(make_cfg, records):
    def boxes(*augmentations):
        mapper = FewShotMapper(make_cfg(), True, augmentations=list(augmentations))
        instances = mapper(records[-1])["instances"]
        return instances.gt_classes.tolist(), instances.gt_boxes.tensor.tolist()

    assert IGNORE_CLASS == -1
    assert boxes() == ([1, -1, -1], [[8, 5, 20, 25], [30, 2, 50, 22], [0, 30, 10, 40]])
    assert boxes(T.RandomFlip(prob=1.0)) == ([1, -1, -1], [[40, 5, 52, 25], [10, 2, 30, 22], [50, 30, 60, 40]])
    larger = boxes(T.Resize((HEIGHT * 2, WIDTH * 2)))
    assert larger == ([1, -1, -1], [[16, 10, 40, 50], [60, 4, 100, 44], [0, 60, 20, 80]])
    assert "ignore_regions" in records[-1] and len(records[-1]["annotations"]) == 1  # the record is left alone


def test_ignore_regions_are_no_ground_truth_of_a_test(make_cfg, records):
    mapped = FewShotMapper(make_cfg(), False)(records[-1])
    assert "instances" not in mapped and "ignore_regions" not in mapped


def test_augmentation_depends_on_seed_epoch_and_record_alone(make_cfg, records):
    cfg = make_cfg()

    def image(seed, epoch, index):
        return PlannedDataset(records, FewShotMapper(cfg, True), seed)[epoch, index]["image"]

    def draws(seed, epochs):
        """Size and flip of one record in several epochs."""
        return [(tuple(x.shape), float(x[:, :, 0].float().mean())) for x in (image(seed, e, 0) for e in epochs)]

    np.random.seed(0)
    one = image(1, 0, 0)
    np.random.seed(1)  # whatever was drawn before
    assert torch.equal(one, image(1, 0, 0))
    assert len(set(draws(1, range(10)))) > 5  # five sizes, flipped or not
    assert draws(1, range(10)) != draws(2, range(10))
    assert draws(1, range(10)) == draws(1, range(10))


def test_without_a_seed_the_global_generator_decides(make_cfg, records):
    mapper = FewShotMapper(make_cfg(), True)
    np.random.seed(0)
    shapes = {tuple(mapper(records[0])["image"].shape) for _ in range(12)}
    assert len(shapes) > 2


def truncate(path):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lambda path: Path(path).write_bytes(b"no picture"),
        lambda path: Path(path).unlink(),
        lambda path: Image.new("RGB", (WIDTH, HEIGHT + 1)).save(path),
    ],
    ids=["truncated", "no picture", "missing", "other size"],
)
def test_broken_picture_is_named(make_cfg, records, damage):
    damage(records[2]["file_name"])
    for training in (True, False):
        with pytest.raises(
            ImageError, match=r"2\.jpg: this image cannot be used .*Replace the file, or remove image 2"
        ):
            FewShotMapper(make_cfg(), training)(records[2])


# Loaders


def content(batch):
    """Everything that the model sees of a batch."""
    return [
        (
            item["file_name"],
            item["image"].tolist(),
            item["instances"].gt_boxes.tensor.tolist(),
            item["instances"].gt_classes.tolist(),
        )
        for item in batch
    ]


def test_workers_do_not_change_the_batches(make_cfg):
    def batches(workers, start=0, count=6):
        cfg = make_cfg("DATALOADER.NUM_WORKERS", workers, "DATALOADER.GROUP_SIZE", 2)
        return [content(batch) for batch in islice(iter(build_train_loader(cfg, seed=7, start=start)), count)]

    alone = batches(0)
    assert batches(2) == alone
    assert batches(2, start=4, count=2) == alone[4:]
    assert any(-1 in classes for batch in alone for *_, classes in batch)


def test_views_return_in_turn(make_cfg, records):
    """Epoch e shows view e mod 3 of a record, in every order and with every number of workers."""
    mapper = FewShotMapper(make_cfg(), True)
    limited, free = (PlannedDataset(records, mapper, 1, views=views) for views in (3, 0))
    for index in range(5):
        images = [limited[epoch, index]["image"] for epoch in range(9)]
        assert all(torch.equal(images[epoch], images[epoch % 3]) for epoch in range(9))
        assert all(torch.equal(images[epoch], free[epoch, index]["image"]) for epoch in range(3))
    assert (
        len({content([limited[e, i]])[0][0] + str(limited[e, i]["image"].shape) for e in range(3) for i in range(5)})
        > 5
    )

    def batches(workers, start=0, count=9):
        cfg = make_cfg("DATALOADER.NUM_WORKERS", workers, "DATALOADER.VIEWS", 2)
        return [content(batch) for batch in islice(iter(build_train_loader(cfg, seed=7, start=start)), count)]

    alone = batches(0)
    assert batches(2, start=6, count=3) == alone[6:]
    assert max(len({str(item) for b in alone for item in b if item[0] == r["file_name"]}) for r in records) == 2


def test_two_ranks_load_the_batch_of_one(make_cfg):
    cfg = make_cfg()
    whole = content(next(iter(build_train_loader(cfg, seed=7))))
    halves = [content(next(iter(build_train_loader(cfg, seed=7, rank=r, world_size=2)))) for r in (0, 1)]
    assert halves[0] + halves[1] == whole


def test_grouping_follows_the_pictures(make_cfg):
    for batch in islice(iter(build_train_loader(make_cfg(), seed=0)), 6):
        assert len({item["width"] > item["height"] for item in batch}) == 1
    mixed = build_train_loader(make_cfg("DATALOADER.ASPECT_RATIO_GROUPING", False), seed=0)
    assert any(len({i["width"] > i["height"] for i in batch}) == 2 for batch in islice(iter(mixed), 6))


def test_images_without_a_label_are_left_out(make_cfg, records):
    """An image that shows unlabelled objects alone is one of them."""
    records[-1]["annotations"] = []
    files = {Path(i["file_name"]).name for b in islice(iter(build_train_loader(make_cfg(), seed=0)), 8) for i in b}
    assert files == {"0.jpg", "1.jpg", "2.jpg", "3.jpg"}


def test_broken_picture_in_a_worker_is_named(make_cfg, records):
    truncate(records[2]["file_name"])
    loader = build_train_loader(make_cfg("DATALOADER.NUM_WORKERS", 1), seed=0)
    with pytest.raises(ImageError, match=r"2\.jpg: this image cannot be used") as error:
        list(islice(iter(loader), 4))
    assert "\n" not in str(error.value)  # one line, without the worker's traceback
    traceback.clear_frames(error.tb)  # else the garbage collector ends the worker, after waiting five seconds for it


def test_other_samplers_are_refused(make_cfg):
    with pytest.raises(ValueError, match="only TrainingSampler resumes exactly"):
        build_train_loader(make_cfg("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"), seed=0)


def test_test_loader_gives_every_image_once(make_cfg):
    loaded = [item for batch in build_test_loader(make_cfg(), NAME) for item in batch]
    assert [item["image_id"] for item in loaded] == [0, 1, 2, 3, 4]
    assert all(min(item["image"].shape[1:]) == 40 for item in loaded)


def test_empty_training_set_is_one_clear_error():
    from detectron2.data import DatasetCatalog

    from fsdet.engine.setup import default_config

    DatasetCatalog.register("emptied", lambda: [{"file_name": "a.jpg", "width": 4, "height": 4, "annotations": []}])
    try:
        cfg = default_config()
        cfg.DATASETS.TRAIN = ("emptied",)
        with pytest.raises(ValueError, match="emptied: no image with an object"):
            build_train_loader(cfg, seed=0)
    finally:
        DatasetCatalog.remove("emptied")
