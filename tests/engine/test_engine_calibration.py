"""Calibration from a configuration: evaluation, Python API, the class memory between them, and what is refused."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, detection_utils
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.data import support
from fsdet.data.mapper import FewShotMapper
from fsdet.engine import calibrated, memories
from fsdet.engine.calibrated import calibrate
from fsdet.engine.predictor import Predictor
from fsdet.engine.run import Evaluation, make_evaluator, prepare, run
from fsdet.engine.setup import load_config, on_this_machine, register_datasets
from fsdet.engine.trainer import build_detector
from fsdet.evaluation.result import read_result
from fsdet.modeling import calibration
from fsdet.modeling.class_memory import ClassMemory
from fsdet.modeling.imagenet import NETWORKS, Network

NOVEL = {"STAGE": "novel", "SHOT": 2}
CLASSES = ["red", "green", "blue", "white"]


class Tiny(nn.Module):
    """A classifier of stride 8."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 9, stride=8, padding=4)
        self.bn = nn.BatchNorm2d(6)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 7)


@pytest.fixture(autouse=True)
def tiny_classifier(monkeypatch):
    fed = {"pixel_mean": (90, 90, 90), "pixel_std": (60, 60, 60), "channel_order": "RGB", "stride": 8}
    monkeypatch.setitem(NETWORKS, "tiny", Network(Tiny, **fed, origin="a file of the test"))


@pytest.fixture
def classifier(tmp_path):
    """Overrides that calibrate with a tiny classifier."""
    torch.manual_seed(3)
    torch.save(Tiny().state_dict(), tmp_path / "tiny.pth")
    node = {"ENABLED": "True", "NETWORK": "tiny", "WEIGHTS": str(tmp_path / "tiny.pth")}
    return [word for key, value in node.items() for word in (f"TEST.CALIBRATION.{key}", value)]


@pytest.fixture
def novel_run(write_config, tmp_path):
    """Config and folder of a finished novel run with random weights; all classes get scores around 0.2."""
    config = write_config(FEWSHOT=NOVEL, MODEL={"WEIGHTS": str(tmp_path / "run" / "model_final.pth")})
    cfg = prepare(on_this_machine(load_config(config)), quiet=True)
    torch.manual_seed(0)
    model = build_detector(cfg)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1e-4)
    FewShotCheckpointer(model, cfg.OUTPUT_DIR, metadata={"classes": CLASSES}).save("model_final")
    return config, tmp_path / "run"


@pytest.fixture
def evaluated(novel_run, classifier):
    """The same, with a calibrated evaluation."""
    config, folder = novel_run
    run(config, classifier, eval_only=True, quiet=True)
    return config, folder


def box_of(detection):
    return detection["image_id"], detection["category_id"], detection["bbox"]


def detections(folder):
    (path,) = (folder / "inference").glob("*.json")
    return json.loads(path.read_text())


def test_evaluation_calibrates_and_keeps_the_memory(novel_run, classifier, monkeypatch):
    config, folder = novel_run
    run(config, eval_only=True, quiet=True)
    plain = detections(folder)
    assert not (folder / "class_memory.json").exists()
    decoded, original = [], support.read_image
    for module in (detection_utils, support):  # the mapper's; the supports' and the calibration's own
        monkeypatch.setattr(module, "read_image", lambda f, format=None: decoded.append(f) or original(f, format))
    run(config, classifier, eval_only=True, quiet=True)
    found = detections(folder)
    memory = ClassMemory.load(folder / "class_memory")
    assert memory.names == ("white",) and len(memory["white"].supports) == 2
    assert len(found) == len(plain) > 20
    changed = set()
    for before, after in zip(sorted(plain, key=box_of), sorted(found, key=box_of), strict=True):
        assert box_of(before) == box_of(after)
        changed |= {after["category_id"]} if before["score"] != after["score"] else set()
    assert changed == {4}  # white alone is novel
    assert len(decoded) == len(set(decoded)) == 4 + 2, "a file was read twice"


def test_a_second_evaluation_takes_up_the_prototypes(evaluated, classifier, squares, tmp_path, monkeypatch):
    """Only changed supports are encoded again; a damaged memory is replaced."""
    config, folder = evaluated
    before, encoded = detections(folder), []
    original = calibration.CalibratedDetector.support_features
    monkeypatch.setattr(
        calibration.CalibratedDetector,
        "support_features",
        lambda self, supports: encoded.append(len(supports)) or original(self, supports),
    )
    run(config, classifier, eval_only=True, quiet=True)
    assert encoded == [0] and detections(folder) == before
    shutil.copytree(squares / "samples" / "seed1", tmp_path / "drawn" / "seed0")
    run(config, [*classifier, "FEWSHOT.SAMPLES", str(tmp_path / "drawn")], eval_only=True, quiet=True)
    assert encoded == [0, 2]
    (folder / "class_memory.safetensors").write_bytes(b"torn")
    run(config, classifier, eval_only=True, quiet=True)
    assert encoded == [0, 2, 2] and detections(folder) == before


def test_the_label_tells_the_weights(novel_run, classifier):
    config, folder = novel_run
    labels = set()
    for seed in (3, 4):
        torch.manual_seed(seed)
        torch.save(Tiny().state_dict(), classifier[classifier.index("TEST.CALIBRATION.WEIGHTS") + 1])
        run(config, classifier, eval_only=True, quiet=True)
        labels.add(read_result(folder / "result.json").protocol.calibration)
    assert len(labels) == 2 and all(label.startswith("pcb tiny:") for label in labels)


def test_python_api_finds_what_the_evaluation_found(evaluated, classifier, squares):
    _, folder = evaluated
    predictor = Predictor.from_run(folder, threshold=0.05, opts=classifier)
    images = {image["file_name"]: image["id"] for image in json.loads((squares / "test.json").read_text())["images"]}
    expected = detections(folder)
    for name, image_id in images.items():
        found = predictor(squares / "test" / name)
        scores = [d.score for d in found]
        assert scores == sorted(scores, reverse=True) and {d.class_name for d in found} >= {"white"}
        wanted = [d["score"] for d in expected if d["image_id"] == image_id and d["score"] >= 0.05]
        assert scores == pytest.approx(sorted(wanted, reverse=True), abs=2e-5)
    plain = Predictor.from_run(folder, threshold=0.05)(squares / "test" / name)
    assert [d.score for d in plain] != pytest.approx(scores, abs=1e-3)


def without_data(tmp_path):
    (tmp_path / "empty").mkdir(exist_ok=True)
    return ["FEWSHOT.TRAIN_JSON", str(tmp_path / "empty" / "none.json"), "FEWSHOT.SAMPLES", str(tmp_path / "empty")]


def test_python_api_needs_no_support_data_once_evaluated(evaluated, classifier, squares, tmp_path):
    _, folder = evaluated
    picture = sorted((squares / "test").glob("*.png"))[0]
    here = Predictor.from_run(folder, threshold=0.05, opts=classifier)(picture)
    opts = [*classifier, *without_data(tmp_path)]
    assert Predictor.from_run(folder, threshold=0.05, opts=opts)(picture) == here
    (folder / "calibrated").mkdir()
    for file in folder.glob("class_memory.*"):
        shutil.move(file, folder / "calibrated" / file.name)
    assert Predictor.from_run(folder, threshold=0.05, opts=opts)(picture) == here
    shutil.rmtree(folder / "calibrated")
    assert Predictor.from_run(folder, threshold=0.05, opts=classifier)(picture) == here  # encoded from the data
    with pytest.raises(FileNotFoundError, match=r"class_memory\.json not found, and the supports .* are absent"):
        Predictor.from_run(folder, opts=opts)


def test_evaluation_recalls_where_the_supports_are_absent(evaluated, classifier, tmp_path):
    config, folder = evaluated
    before = detections(folder)
    opts = [*classifier, "FEWSHOT.SAMPLES", str(tmp_path / "nowhere")]
    run(config, opts, eval_only=True, quiet=True)
    assert detections(folder) == before
    (folder / "class_memory.json").unlink()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(config, opts, eval_only=True, quiet=True)


def test_every_process_waits_whether_or_not_it_has_the_supports(evaluated, classifier, tmp_path, monkeypatch):
    """A machine without the pictures would else leave the others waiting."""
    config, folder = evaluated
    before = (folder / "class_memory.json").read_bytes()
    waits = []
    monkeypatch.setattr(memories.comm, "synchronize", lambda: waits.append(1))
    for samples in ([], ["FEWSHOT.SAMPLES", str(tmp_path / "nowhere")]):
        cfg = on_this_machine(load_config(config, [*classifier, *samples]))
        model = calibrate(build_detector(cfg), cfg)
        waits.clear()
        memories.encode_or_recall(model, lambda cfg=cfg: memories.read_supports(cfg), folder)
        assert len(waits) == 1 and model.class_memory.names == ("white",)
    assert (folder / "class_memory.json").read_bytes() == before


def test_a_memory_of_other_weights_is_stale(evaluated, classifier, tmp_path):
    _, folder = evaluated
    torch.manual_seed(4)
    torch.save(Tiny().state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"class_memory\.json is no class memory of this detector.*Evaluate the run"):
        Predictor.from_run(folder, opts=classifier)
    with pytest.raises(ValueError, match="is no class memory of this detector"):
        Predictor.from_run(folder, opts=[*classifier, *without_data(tmp_path)])


def test_a_memory_of_other_supports_is_stale(evaluated, classifier, squares, tmp_path):
    _, folder = evaluated
    shutil.copytree(squares / "samples" / "seed1", tmp_path / "drawn" / "seed0")  # another draw under the same name
    opts = [*classifier, "FEWSHOT.SAMPLES", str(tmp_path / "drawn")]
    with pytest.raises(ValueError, match=r"class_memory\.json was made of other pictures .* gives for \['white'\]"):
        Predictor.from_run(folder, opts=opts)


def test_network_and_prototypes_are_made_once_per_run(novel_run, classifier, monkeypatch):
    config, _ = novel_run
    cfg = on_this_machine(load_config(config, classifier))
    register_datasets(cfg)
    calls = []
    original = calibrated.build_encoder
    monkeypatch.setattr(calibrated, "build_encoder", lambda *a: calls.append("network") or original(*a))
    model = build_detector(cfg)
    FewShotCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    evaluation = Evaluation(cfg, model)
    evaluation()
    seen = []
    evaluation.model.encoder.trunk.register_forward_hook(lambda *_: seen.append(1))
    first = evaluation.evaluator
    evaluation()
    assert evaluation.evaluator is not first and calls == ["network"]
    assert len(seen) == 4, "more than one pass for each test picture"


@pytest.mark.parametrize("style", [("coco", "True"), ("coco", "False"), ("voc", "True")], ids=["fast", "slow", "voc"])
def test_negative_scores_rank_last_and_are_not_dropped(novel_run, style):
    """Only the order counts: the metrics of scores in [0, 1] and of the same scores less 1 are equal."""
    config, _ = novel_run
    cfg = load_config(config, ["TEST.STYLE", style[0], "TEST.FAST", style[1]])
    register_datasets(cfg)
    metrics = []
    for shift in (0.0, 1.0):
        evaluator = make_evaluator(cfg)
        rng = np.random.default_rng(0)
        for record in DatasetCatalog.get(cfg.DATASETS.TEST[0]):
            boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in record["annotations"]]
            boxes = torch.tensor(boxes * 2, dtype=torch.float32)
            found = Instances(
                (record["height"], record["width"]),
                pred_boxes=Boxes(boxes + torch.tensor(rng.uniform(-3, 3, boxes.shape), dtype=torch.float32)),
                scores=torch.tensor(rng.permutation(len(boxes)) / 8.0 - shift),
                pred_classes=torch.tensor([a["category_id"] for a in record["annotations"]] * 2),
            )
            evaluator.process([record], [{"instances": found}])
        metrics.append(evaluator.evaluate()["bbox"])
    assert 10 < metrics[0]["AP50"] < 100 and metrics[0] == pytest.approx(metrics[1], nan_ok=True)


def refused(config, opts):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run(config, opts, quiet=True)
    return str(error.value)


@pytest.fixture
def fresh(write_config, calm_weights, tmp_path):
    """A novel run that could start; nothing may be trained."""
    config = write_config(FEWSHOT=NOVEL, MODEL={"WEIGHTS": str(tmp_path / "calm.pth")})
    calm_weights(config)
    yield config
    assert not (tmp_path / "run").exists(), "work was done"


def test_missing_weights_are_found_before_training(fresh, classifier, tmp_path):
    enabled = classifier[:4]
    assert 'needs the ImageNet classifier "tiny", and no file is named' in refused(fresh, enabled)
    gone = refused(fresh, [*enabled, "TEST.CALIBRATION.WEIGHTS", "gone.pth"])
    assert gone.startswith("gone.pth: no such file") and "TEST.CALIBRATION.WEIGHTS" in gone


def test_weights_of_another_network_are_found_before_training(fresh, classifier, tmp_path):
    torch.save({"conv.weight": torch.zeros(6, 3, 9, 9)}, tmp_path / "tiny.pth")
    text = refused(fresh, classifier)
    assert str(tmp_path / "tiny.pth") in text and "missing (bn.bias, bn.running_mean, bn.running_var, ...)" in text
    (tmp_path / "tiny.pth").write_bytes(b"torn")
    assert "truncated or no .pth file" in refused(fresh, classifier)


def test_settings_are_checked_before_training(fresh, classifier):
    assert "ALPHA is 2.0" in refused(fresh, [*classifier, "TEST.CALIBRATION.ALPHA", "2.0"])


def test_a_class_without_support_box_is_found_before_training(fresh, classifier, squares, tmp_path):
    shutil.copytree(squares / "samples", tmp_path / "samples")
    for path in (tmp_path / "samples" / "seed0").glob("*2shot_white*"):
        data = json.loads(path.read_text())
        for annotation in data["annotations"]:
            annotation["iscrowd"] = 1
        path.write_text(json.dumps(data))
    text = refused(fresh, [*classifier, "FEWSHOT.SAMPLES", str(tmp_path / "samples")])
    assert 'full_box_2shot_white_trainval.json: 2 instances of "white" needed, 0 found' in text


def test_a_base_stage_is_not_calibrated(write_config, classifier):
    cfg = on_this_machine(load_config(write_config(), classifier))
    model = build_detector(cfg)
    assert calibrate(model, cfg) is model


def test_the_mapper_keeps_the_picture(novel_run, squares):
    config, _ = novel_run
    cfg = load_config(config, ["INPUT.MIN_SIZE_TEST", "32"])
    path = sorted((squares / "test").glob("*.png"))[0]
    record = {"file_name": str(path), "image_id": 1}
    kept = FewShotMapper(cfg, False, keep_original=True)(record)
    assert np.array_equal(kept["original_image"], cv2.imread(str(path))) and kept["original_image"].dtype == torch.uint8
    plain = FewShotMapper(cfg, False)(record)
    assert "original_image" not in plain and torch.equal(kept["image"], plain["image"])
    assert min(kept["image"].shape[1:]) == 32 and min(kept["original_image"].shape[:2]) == 48
    assert Path(kept["file_name"]) == path
