"""COCO style against pycocotools, Detectron2's evaluator and by hand."""

import contextlib
import io
import json
import logging
import math
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from evaluation_cases import CLASSES, NOVEL, make_toy, to_batches
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fsdet.evaluation.coco_style import coco_precision
from fsdet.evaluation.evaluator import build_evaluator

BASE = tuple(name for name in CLASSES if name not in NOVEL)
KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def evaluate(name, detections, classes=CLASSES, **options):
    evaluator = build_evaluator(name, **options)
    evaluator.reset()
    evaluator.process(*to_batches(detections, classes))
    return evaluator.evaluate()["bbox"]


def official_stats(toy, class_names):
    """Six AP numbers of pycocotools, restricted to some classes the official way: by setting the category ids."""
    rows = []
    for inputs, outputs in zip(*to_batches(toy.detections), strict=True):
        instances = outputs["instances"]
        boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
        triples = zip(boxes, instances.scores.tolist(), instances.pred_classes.tolist(), strict=True)
        rows += [
            {"image_id": inputs["image_id"], "category_id": toy.dataset_ids[c], "bbox": box, "score": score}
            for box, score, c in triples
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(toy.path))
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.params.catIds = [toy.dataset_ids[CLASSES.index(name)] for name in class_names]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [value * 100 if value > -1 else float("nan") for value in evaluation.stats[:6].tolist()]
    return dict(zip(KEYS, stats, strict=True))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equals_three_passes_of_pycocotools(tmp_path, seed, ties):
    toy = make_toy(tmp_path, seed=seed, ties=ties)
    fast = evaluate(toy.register(), toy.detections, fast=True)
    slow = evaluate(toy.register(), toy.detections, fast=False)
    np.testing.assert_equal(fast, slow)  # bit for bit
    for prefix, names in (("", CLASSES), ("b", BASE), ("n", NOVEL)):
        expected = {prefix + key: value for key, value in official_stats(toy, names).items()}
        assert {key: fast[key] for key in expected} == pytest.approx(expected, abs=1e-10, nan_ok=True)
        assert [f"{fast[key]:.6f}" for key in expected] == [f"{value:.6f}" for value in expected.values()]
    assert 5 < fast["AP50"] < 95  # the comparison is about something


def test_equals_detectron2_evaluator_per_class(toy, tmp_path):
    # Detectron2 labels classes rightly only where class ids follow the order of the dataset ids.
    classes = tuple(sorted(CLASSES, key=lambda name: toy.dataset_ids[CLASSES.index(name)]))
    name = toy.register(classes)
    ours = evaluate(name, toy.detections, classes)
    stock = COCOEvaluator(name, tasks=("bbox",), distributed=False, output_dir=str(tmp_path), use_fast_impl=False)
    stock.reset()
    stock.process(*to_batches(toy.detections, classes))
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = stock.evaluate()["bbox"]
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs, abs=1e-10, nan_ok=True)
    assert "AP-hand-saw" in theirs


def test_records_give_the_numbers_of_the_file(toy):
    from_file = evaluate(toy.register(), toy.detections)
    from_records = evaluate(toy.register(records=True), toy.detections)
    assert from_records == pytest.approx(from_file, abs=1e-10, nan_ok=True)


def test_a_subset_of_the_files_classes(toy):
    """A novel-only test set: other classes of the file vanish, AP is nAP, and ids go through the metadata's map."""
    full = evaluate(toy.register(), toy.detections)
    for with_map in (True, False):
        novel = evaluate(toy.register(classes=NOVEL, with_map=with_map), toy.detections, NOVEL)
        assert novel["AP"] == novel["nAP"] == pytest.approx(full["nAP"], abs=1e-10)
        assert novel["AP50-owl"] == full["AP50-owl"]
        assert "bAP" not in novel
        assert "AP-cup" not in novel


def test_max_detections_is_the_limit_per_image_and_class(tmp_path):
    toy = make_toy(tmp_path, seed=5)
    metrics = {limit: evaluate(toy.register(), toy.detections, max_detections=limit) for limit in (1, 100)}
    for limit, ours in metrics.items():
        slow = evaluate(toy.register(), toy.detections, max_detections=limit, fast=False)
        np.testing.assert_equal(ours, slow)
    assert metrics[1]["AP"] != metrics[100]["AP"]


def register_boxes(objects, classes=("a", "b", "c"), **extra):
    """Records of one 100 x 100 image per list of (class id, XYXY, flags)."""
    name = f"boxes_{np.random.default_rng().integers(1 << 60)}"
    records = [
        {
            "image_id": f"{i:03d}",
            "height": 100,
            "width": 100,
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": c, **flags} for c, box, flags in items
            ],
        }
        for i, items in enumerate(objects)
    ]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=list(classes), **extra)
    return name


def found(boxes, scores, class_ids):
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4).float())
    instances.scores = torch.tensor(scores).float()
    instances.pred_classes = torch.tensor(class_ids, dtype=torch.int64)
    return {"instances": instances}


@pytest.mark.parametrize("style", ["coco", "voc"])
def test_no_detection_at_all(style, caplog):
    name = register_boxes([[(0, [10, 10, 50, 50], {})], []], base_classes=["a"], novel_classes=["b"])
    evaluator = build_evaluator(name, style=style)
    evaluator.process([{"image_id": "000"}, {"image_id": "001"}], [found([], [], []), found([], [], [])])
    with caplog.at_level(logging.WARNING):
        metrics = evaluator.evaluate()["bbox"]
    assert metrics["AP"] == metrics["bAP50"] == metrics["AP-a"] == 0.0
    assert math.isnan(metrics["nAP"])
    assert math.isnan(metrics["AP50-b"])
    assert "detected nothing" in caplog.text
    assert evaluator.highest_scores() == {}


@pytest.mark.parametrize("style", ["coco", "voc"])
def test_difficult_objects_neither_reward_nor_punish(style):
    one, two = [10.0, 10.0, 50.0, 50.0], [60.0, 60.0, 90.0, 90.0]
    plain = register_boxes([[(0, one, {}), (0, two, {})]])
    marked = register_boxes([[(0, one, {}), (0, two, {"difficult": 1})]])
    crowd = register_boxes([[(0, one, {}), (0, two, {"iscrowd": 1})]])
    results = []
    for name in (plain, marked, crowd):
        evaluator = build_evaluator(name, style=style)
        # The best detection lies on the difficult object: it must not count as a false one.
        evaluator.process([{"image_id": "000"}], [found([two, one], [0.9, 0.8], [0, 0])])
        results.append(evaluator.evaluate()["bbox"]["AP50"])
        evaluator.reset()
        evaluator.process([{"image_id": "000"}], [found([one], [0.8], [0])])
        results.append(evaluator.evaluate()["bbox"]["AP50"])
    assert results[0] == pytest.approx(100)
    assert results[1] < 60
    assert results[2:] == pytest.approx([100] * 4)


def test_annotation_ids_from_zero_and_repeated_do_not_matter(toy):
    """COCO's tool takes the object of id 0 for "no match" and loses it; ids are renumbered before."""
    expected = evaluate(toy.register(), toy.detections)
    for item in toy.data["annotations"]:
        item["id"] = 0
    toy.path.write_text(json.dumps(toy.data))
    np.testing.assert_equal(evaluate(toy.register(), toy.detections), expected)


def test_detections_file_loads_with_pycocotools(toy, tmp_path):
    name = toy.register()
    metrics = evaluate(name, toy.detections, output_dir=tmp_path / "inference")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(toy.path))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "inference" / "detections.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] * 100 == pytest.approx(metrics["AP"], abs=1e-10)
    assert [path.name for path in (tmp_path / "inference").iterdir()] == ["detections.json"]


def test_evaluate_some_images_only(toy):
    ids = [item["image_id"] for item in toy.detections[:7]]
    small = json.loads(toy.path.read_text())
    small["images"] = [image for image in small["images"] if image["id"] in ids]
    small["annotations"] = [item for item in small["annotations"] if item["image_id"] in ids]
    evaluator = build_evaluator(toy.register())
    evaluator.process(*to_batches(toy.detections))
    some = evaluator.evaluate(img_ids=ids)["bbox"]
    toy.path.write_text(json.dumps(small))
    expected = evaluate(toy.register(), toy.detections[:7])
    np.testing.assert_equal(some, expected)
    with pytest.raises(ValueError, match="no image"):
        evaluator.evaluate(img_ids=["nowhere"])


def test_images_seen_twice_or_never_are_reported(toy, caplog):
    evaluator = build_evaluator(toy.register())
    expected = evaluate(toy.register(), toy.detections)
    inputs, outputs = to_batches(toy.detections)
    evaluator.process([*inputs, inputs[0]], [*outputs, outputs[0]])
    np.testing.assert_equal(evaluator.evaluate()["bbox"], expected)
    assert "1 images were processed more than once" in caplog.text
    evaluator.reset()
    evaluator.process(inputs[1:], outputs[1:])
    evaluator.evaluate()
    assert "Only 19 of the 20 images" in caplog.text


def test_nan_detections_are_dropped_and_named(caplog):
    name = register_boxes([[(0, [10, 10, 50, 50], {})]])
    evaluator = build_evaluator(name)
    boxes = [[10, 10, 50, 50], [float("nan"), 0, 1, 1]]
    evaluator.process([{"image_id": "000"}], [found(boxes, [0.5, 0.9], [0, 0])])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    assert "Image 000: 1 detections" in caplog.text


def test_a_class_named_by_digits_is_no_number_in_the_table(caplog):
    name = register_boxes([[(0, [10, 10, 50, 50], {})]], classes=("007", "1e3"))
    evaluator = build_evaluator(name)
    evaluator.process([{"image_id": "000"}], [found([[10, 10, 50, 50]], [0.5], [0])])
    with caplog.at_level(logging.INFO):
        evaluator.evaluate()
    assert "| 007 " in caplog.text and "| 1e3 " in caplog.text


def test_half_precision_outputs():
    name = register_boxes([[(0, [10, 10, 50, 50], {})]])
    evaluator = build_evaluator(name)
    output = found([[10, 10, 50, 50]], [0.5], [0])
    output["instances"].pred_boxes.tensor = output["instances"].pred_boxes.tensor.bfloat16()
    output["instances"].scores = output["instances"].scores.bfloat16()
    evaluator.process([{"image_id": "000"}], [output])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_faults_are_named(toy, tmp_path):
    with pytest.raises(ValueError, match="Unknown evaluation style"):
        build_evaluator(toy.register(), style="lvis")
    with pytest.raises(ValueError, match="register it before"):
        build_evaluator("never_registered")
    with pytest.raises(ValueError, match="legacy"):
        build_evaluator(toy.register(), style="coco", legacy=True)
    with pytest.raises(ValueError, match="max_detections"):
        build_evaluator(toy.register(), max_detections=0)
    evaluator = build_evaluator(toy.register())
    with pytest.raises(ValueError, match=r"class id 9, but .* has 5 classes.*NUM_CLASSES"):
        evaluator.process([{"image_id": toy.detections[0]["image_id"]}], [found([[0, 0, 1, 1]], [0.5], [9])])
    with pytest.raises(ValueError, match="Image 'x' is not in"):
        evaluator.process([{"image_id": "x"}], [found([], [], [])])
    with pytest.raises(RuntimeError, match="needs an evaluation first"):
        evaluator.highest_scores()
    with pytest.raises(ValueError, match="are not among its categories"):
        build_evaluator(_renamed(toy))


def test_missing_annotation_file(toy):
    toy.path.unlink()
    with pytest.raises(FileNotFoundError, match="toy_0.json: annotation file of the test set"):
        build_evaluator(toy.register())


def _renamed(toy):
    name = toy.register(with_map=False)
    toy.data["categories"][0]["name"] = "mug"
    toy.path.write_text(json.dumps(toy.data))
    return name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("annotations"), "needs a COCO detection file with annotations"),
        (lambda data: data["images"].append(dict(data["images"][0])), "occur more than once"),
        (lambda data: data["annotations"][0].update(image_id=99999), "of image 99999, which is not listed"),
        (lambda data: data["annotations"][0].update(bbox=[0, 0, float("nan"), 5]), "not finite"),
    ],
)
def test_bad_annotation_files(toy, change, message):
    change(toy.data)
    toy.path.write_text(json.dumps(toy.data))
    with pytest.raises(ValueError, match=message) as error:
        build_evaluator(toy.register())
    assert "toy_0.json" in str(error.value)


def test_without_hotcoco_pycocotools_answers(toy, monkeypatch, caplog):
    expected = evaluate(toy.register(), toy.detections)
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with caplog.at_level(logging.INFO):
        np.testing.assert_equal(evaluate(toy.register(), toy.detections), expected)
    assert "hotcoco is not installed" in caplog.text


def test_the_precision_table_marks_absent_areas(toy):
    evaluator = build_evaluator(toy.register())
    evaluator.process(*to_batches(toy.detections))
    evaluator.evaluate()
    table = coco_precision(evaluator.ground_truth, evaluator.detections)
    assert table.shape == (10, 101, 5, 4)
    small = evaluator.ground_truth.areas < 32**2
    for class_id in range(5):
        has_small = (small & ~evaluator.ground_truth.ignored & (evaluator.ground_truth.class_ids == class_id)).any()
        assert (table[0, 0, class_id, 1] > -1) == has_small


def _evaluate_half(rank, folder, out):
    """Both styles on one process of two; rank 1 holds the first images, so that they are not gathered in order."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        toy = make_toy(folder / str(rank), seed=3, ties=True)
        inputs, outputs = to_batches(toy.detections)
        half = slice(0, 8) if rank == 1 else slice(8, None)
        results = []
        for style in ("coco", "voc"):
            evaluator = build_evaluator(toy.register(), style=style, output_dir=folder)
            evaluator.reset()
            evaluator.process(inputs[half], outputs[half])
            results.append(evaluator.evaluate())
        out.put(results)
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    context = multiprocessing.get_context("spawn")
    queues = [context.SimpleQueue() for _ in range(2)]
    other = context.Process(target=_evaluate_half, args=(1, tmp_path, queues[1]))
    other.start()
    _evaluate_half(0, tmp_path, queues[0])  # this process is the other half, which saves the imports of a second child
    gathered, elsewhere = (queue.get() for queue in queues)
    other.join()
    toy = make_toy(tmp_path, seed=3, ties=True)
    for style, result in zip(("coco", "voc"), gathered, strict=True):
        np.testing.assert_equal(result["bbox"], evaluate(toy.register(), toy.detections, style=style))
    assert elsewhere == [{}, {}]
