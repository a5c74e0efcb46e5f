"""Both styles against metrics that the official few-shot evaluators computed on the same detections (golden f)."""

import gzip
import json
import math
import uuid
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from fsdet.data.splits import coco_split, voc_split
from fsdet.evaluation.evaluator import build_evaluator

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "defrcn"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "defrcn"
CASES = json.loads(gzip.decompress((GOLDEN / "f_evaluators.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def fake_datasets():
    for folder in (GOLDEN, SHARED):
        path = folder / "e_fake_datasets.json.gz"
        if path.is_file():
            return json.loads(gzip.decompress(path.read_bytes()))
    pytest.skip("the annotation trees of golden e are not here")


def voc_records(tree, classes):
    records = []
    for image_id in tree["imagesets"]["2007/test"]:
        image = tree["annotations"][image_id]
        annotations = []
        for item in image["objects"]:
            x1, y1, x2, y2 = item["bbox"]
            if item["name"] in classes:
                annotations.append(
                    {
                        "bbox": [x1 - 1, y1 - 1, x2, y2],
                        "bbox_mode": BoxMode.XYXY_ABS,
                        "category_id": classes.index(item["name"]),
                        "difficult": item["difficult"],
                    }
                )
        records.append(
            {"image_id": image_id, "height": image["height"], "width": image["width"], "annotations": annotations}
        )
    return records


def register(case, tree, tmp_path):
    """Register the test set that an official name stands for; returns our name and the style."""
    name = f"golden_{case}_{uuid.uuid4().hex}"
    subset = next(subset for subset in ("base", "novel", "all") if f"_{subset}" in case)
    if case.startswith("voc"):
        split = voc_split(int(case[-1]))
        classes = split.of(subset)
        DatasetCatalog.register(name, lambda: voc_records(tree["voc"], classes))
        MetadataCatalog.get(name).set(thing_classes=list(classes))
    else:
        split = coco_split()
        classes = split.of(subset)
        path = tmp_path / "5k.json"
        path.write_text(json.dumps(tree["coco"]["5k"]))
        ids = {c["name"]: c["id"] for c in tree["coco"]["5k"]["categories"]}
        mapping = {ids[name]: i for i, name in enumerate(classes)}
        MetadataCatalog.get(name).set(
            thing_classes=list(classes), json_file=str(path), thing_dataset_id_to_contiguous_id=mapping
        )
    MetadataCatalog.get(name).set(base_classes=list(split.base), novel_classes=list(split.novel))
    return name, "voc" if case.startswith("voc") else "coco"


def to_outputs(detections):
    for item in detections:
        instances = Instances((500, 500))
        instances.pred_boxes = Boxes(torch.tensor(item["boxes"], dtype=torch.float32).reshape(-1, 4))
        instances.scores = torch.tensor(item["scores"], dtype=torch.float32)
        instances.pred_classes = torch.tensor(item["classes"], dtype=torch.int64)
        yield {"image_id": item["image_id"]}, {"instances": instances}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", sorted(CASES))
def test_official_numbers(case, fast, fake_datasets, tmp_path):
    name, style = register(case, fake_datasets, tmp_path)
    evaluator = build_evaluator(name, style=style, fast=fast, legacy=style == "voc")
    evaluator.reset()
    inputs, outputs = zip(*to_outputs(CASES[case]["detections"]), strict=True)
    evaluator.process(inputs, outputs)
    ours = evaluator.evaluate()["bbox"]
    expected = CASES[case]["results"]["bbox"]
    assert {key: ours[key] for key in expected} == pytest.approx(expected, abs=1e-6 if style == "voc" else 1e-9)


def test_what_the_legacy_switch_changes(fake_datasets, tmp_path):
    """Unrounded scores have no ties, so classes move a little; one without objects is nan instead of a counted 0."""
    case = "voc_2007_test_all1"
    name, _ = register(case, fake_datasets, tmp_path)
    inputs, outputs = zip(*to_outputs(CASES[case]["detections"]), strict=True)
    ours, official = [], []
    for legacy, keep in ((False, ours), (True, official)):
        evaluator = build_evaluator(name, style="voc", legacy=legacy)
        evaluator.process(inputs, outputs)
        keep.append(evaluator.evaluate()["bbox"])
    per_class = [key for key in ours[0] if key.startswith("AP50-") and key != "AP50-bottle"]
    assert [ours[0][key] for key in per_class] == pytest.approx([official[0][key] for key in per_class], abs=2.0)
    assert math.isnan(ours[0]["AP50-bottle"])
    assert official[0]["AP50-bottle"] == 0.0
    assert ours[0]["bAP50"] == pytest.approx(official[0]["bAP50"] * 15 / 14, abs=2.0)
