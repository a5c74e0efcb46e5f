"""Every protocol switch, set in the configuration, changes a number that training sees.

The readers below (tests/data/test_data_{voc,coco,custom}.py) are tested switch by switch; here the values travel from
the command line through loader and detector.
"""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, pairwise_ioa
from detectron2.utils.events import EventStorage

from fsdet.data.fake_tree import voc_xml
from fsdet.data.loader import build_train_loader
from fsdet.data.mapper import IGNORE_CLASS
from fsdet.data.seeds import coco_shot_path, write_coco_shots
from fsdet.engine.run import run
from fsdet.engine.setup import load_config, on_this_machine, register_datasets
from fsdet.engine.trainer import build_detector
from fsdet.evaluation.result import read_result

PURE = 4  # images that show no novel object
LEAKING = 6


def load(config, *opts):
    """Resolved config with its data registered."""
    cfg = on_this_machine(load_config(config, opts))
    register_datasets(cfg)
    return cfg


def train_records(cfg):
    return DatasetCatalog.get(cfg.DATASETS.TRAIN[0])


@pytest.fixture
def leaking(write_config, squares, tmp_path):
    """Config of a base stage on 10 images of which 6 show one object of the novel class."""
    data = json.loads((squares / "train.json").read_text())
    novel = next(c["id"] for c in data["categories"] if c["name"] == "white")
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] != novel or a["image_id"] <= LEAKING]
    path = tmp_path / "leaking.json"
    path.write_text(json.dumps(data))
    rpn = {"RPN": {"BATCH_SIZE_PER_IMAGE": 512}, "ROI_HEADS": {"BATCH_SIZE_PER_IMAGE": 128}}
    return write_config("leaking.yaml", FEWSHOT={"TRAIN_JSON": str(path)}, MODEL=rpn)


@pytest.mark.parametrize(
    ("leak", "images", "regions"),
    [("background", PURE + LEAKING, 0), ("drop", PURE, 0), ("ignore", PURE + LEAKING, LEAKING)],
)
def test_leak_policy_reaches_the_batches(leaking, leak, images, regions):
    cfg = load(leaking, "FEWSHOT.LEAK", leak, "DATALOADER.ASPECT_RATIO_GROUPING", "False", "SOLVER.IMS_PER_BATCH", "2")
    assert len(train_records(cfg)) == images
    epoch = [item for batch in islice(iter(build_train_loader(cfg, seed=1)), images // 2) for item in batch]
    assert len({item["image_id"] for item in epoch}) == images
    classes = [item["instances"].gt_classes for item in epoch]
    assert sum(int((c == IGNORE_CLASS).sum()) for c in classes) == regions
    assert all(int((c >= 0).sum()) == 3 for c in classes)  # red, green and blue
    assert {len(c) for c in classes} <= {3, 4}


def spy(detector):
    """Record what anchors and regions the detector samples, as (boxes of negatives) per image and kind."""
    seen = {"anchors": [], "regions": []}
    rpn, heads = detector.proposal_generator, detector.roi_heads
    sample_anchors, sample_regions = rpn.label_and_sample_anchors, heads.label_and_sample_proposals

    def anchors(anchors, targets):
        labels, boxes = sample_anchors(anchors, targets)
        every = Boxes.cat(anchors)
        seen["anchors"] += [every[label == 0] for label in labels]
        return labels, boxes

    def regions(proposals, targets):
        sampled = sample_regions(proposals, targets)
        seen["regions"] += [s.proposal_boxes[s.gt_classes == heads.num_classes] for s in sampled]
        return sampled

    rpn.label_and_sample_anchors, heads.label_and_sample_proposals = anchors, regions
    return seen


def count_inside(negatives, boxes):
    """Negatives that lie with half of their area or more in one of the boxes of their image."""
    inside = [(pairwise_ioa(b, n) >= 0.5).any(dim=0).sum() for n, b in zip(negatives, boxes, strict=True) if len(b)]
    return int(sum(inside))


def test_no_negative_anchor_or_region_where_a_novel_object_is(leaking):
    """The tiny detector on five augmented batches; where the novel objects are is read from the "ignore" twin."""
    configs = {leak: load(leaking, "FEWSHOT.LEAK", leak) for leak in ("background", "ignore")}
    batches = {leak: list(islice(iter(build_train_loader(cfg, seed=3)), 5)) for leak, cfg in configs.items()}
    for one, other in zip(*batches.values(), strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a["image"], b["image"])  # same order, same augmentation
    instances = [item["instances"] for batch in batches["ignore"] for item in batch]
    novel = [i.gt_boxes[i.gt_classes == IGNORE_CLASS] for i in instances]
    assert sum(map(len, novel)) >= 10
    inside, negatives = {}, {}
    for leak, cfg in configs.items():
        torch.manual_seed(0)
        detector = build_detector(cfg).train()
        seen = spy(detector)
        with EventStorage():
            for batch in batches[leak]:
                assert all(torch.isfinite(loss) for loss in detector(batch).values())
        inside[leak] = {kind: count_inside(boxes, novel) for kind, boxes in seen.items()}
        negatives[leak] = {kind: sum(map(len, boxes)) for kind, boxes in seen.items()}
    assert inside["ignore"] == {"anchors": 0, "regions": 0}
    assert min(inside["background"].values()) > 0
    for kind, inside_there in inside["background"].items():  # elsewhere nothing is lost
        assert negatives["ignore"][kind] > 0.5 * (negatives["background"][kind] - inside_there)


def test_leak_policy_is_recorded(leaking, tmp_path):
    short = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "OUTPUT_DIR"]
    for leak, images in (("drop", PURE), ("ignore", PURE + LEAKING)):
        run(leaking, ["FEWSHOT.LEAK", leak, *short, str(tmp_path / leak)])
        result = read_result(tmp_path / leak / "result.json")
        assert (result.protocol.leak, result.train_images) == (leak, images)
        assert (tmp_path / leak / "model_final.pth").exists()


def test_records_switch(write_config):
    """Two shots of four classes in two images: eight records of one instance, or two of four."""
    config = write_config(FEWSHOT={"STAGE": "novel", "SHOT": 2})
    each, merged = train_records(load(config)), train_records(load(config, "FEWSHOT.RECORDS", "image"))
    assert [len(r["annotations"]) for r in each] == [1] * 8
    assert [len(r["annotations"]) for r in merged] == [4, 4]


def test_choice_switch(write_config, squares, tmp_path):
    """One of the ten whites of a longer list: always the same, or whichever NumPy's global generator draws."""
    data = json.loads((squares / "train.json").read_text())
    whites = [a for a in data["annotations"] if a["category_id"] == 4]
    shutil.copytree(squares / "samples", tmp_path / "samples")
    write_coco_shots(coco_shot_path(tmp_path / "samples", 0, 1, "white"), {**data, "annotations": whites}, force=True)
    config = write_config(
        FEWSHOT={"STAGE": "novel", "SETTING": "fsod", "SHOT": 1, "SAMPLES": str(tmp_path / "samples")}
    )

    def chosen(choice):
        cfg, found = load(config, "FEWSHOT.CHOICE", choice), set()
        for seed in range(8):
            np.random.seed(seed)
            (record,) = train_records(cfg)
            found.add(record["annotations"][0]["id"])
        return found

    assert len(chosen("seeded")) == 1
    assert len(chosen("official")) > 3


def test_difficult_switch(write_config, tmp_path):
    objects = [{"name": "cat", "bbox": [1, 1, 20, 20]}, {"name": "cat", "bbox": [30, 5, 60, 40], "difficult": 1}]
    folder = tmp_path / "VOC2007"
    content = {"folder": "VOC2007", "filename": "000001.jpg", "width": 100, "height": 80, "objects": objects}
    for name, text in (("Annotations/000001.xml", voc_xml(content)), ("ImageSets/Main/trainval.txt", "000001\n")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    voc = {"LAYOUT": "voc", "DATASET": "voc", "ROOT": str(tmp_path), "VOC_TRAIN": ["VOC2007:trainval"]}
    empty = {"NOVEL_CLASSES": [], "TRAIN_JSON": "", "TRAIN_IMAGES": "", "TEST_JSON": "", "TEST_IMAGES": ""}
    config = write_config(FEWSHOT={**voc, **empty})
    for difficult, count in (("True", 2), ("False", 1)):
        (record,) = train_records(load(config, "FEWSHOT.DIFFICULT", difficult))
        assert len(record["annotations"]) == count
