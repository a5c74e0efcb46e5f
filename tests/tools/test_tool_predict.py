"""The command from a run folder to drawn pictures and JSON."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.engine.run import prepare
from fsdet.engine.setup import load_config
from fsdet.engine.trainer import build_detector

TOOL = Path(__file__).resolve().parents[2] / "tools" / "predict.py"
NAMES = ("cup", "pen")
CONFIG = {
    "VERSION": 2,
    "FEWSHOT": {"METHOD": "tiny", "DATASET": "desk", "LAYOUT": "custom", "TRAIN_JSON": "train.json"},
    "MODEL": {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "DEVICE": "cpu",
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {"OUT_FEATURES": ["res2", "res3", "res4", "res5"], "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4,
                    "STEM_OUT_CHANNELS": 8, "NORM": "BN"},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 8},
        "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32], [64], [128]], "ASPECT_RATIOS": [[1.0]]},
        "PROPOSAL_GENERATOR": {"NAME": "FewShotRPN"},
        "RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "POST_NMS_TOPK_TEST": 20},
        "ROI_HEADS": {"NAME": "FewShotROIHeads", "IN_FEATURES": ["p2", "p3", "p4", "p5"]},
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 16, "POOLER_RESOLUTION": 3},
    },
    "INPUT": {"MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 96},
}  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two base classes and one novel class with random weights."""
    root = tmp_path_factory.mktemp("desk")
    categories = [{"id": i, "name": name} for i, name in enumerate((*NAMES, "key"), 1)]
    (root / "train.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    fewshot = {**CONFIG["FEWSHOT"], "ROOT": str(root), "TEST_JSON": "train.json", "NOVEL_CLASSES": ["key"]}
    fewshot |= {"TRAIN_IMAGES": ".", "TEST_IMAGES": "."}
    (root / "tiny.yaml").write_text(yaml.safe_dump({**CONFIG, "FEWSHOT": fewshot, "OUTPUT_DIR": str(root / "run")}))
    cfg = prepare(load_config(str(root / "tiny.yaml")))
    torch.manual_seed(0)
    FewShotCheckpointer(build_detector(cfg), cfg.OUTPUT_DIR, metadata={"classes": list(NAMES)}).save("model_final")
    return root / "run"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        noise = rng.integers(0, 256, (60 + 10 * number, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def predict():
    spec = importlib.util.spec_from_file_location("tool_predict", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_command_draws_and_writes_json(run_folder, photos, tmp_path):
    (photos / "torn.jpg").write_bytes((photos / "0.jpg").read_bytes()[:400])
    command = [sys.executable, str(TOOL), str(photos), "--run", str(run_folder), "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, "--threshold", "0.2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert f"{len(content['detections'])} objects in 3 images: {tmp_path}/out/detections.json" in done.stdout
    assert "1 image(s) could not be read" in done.stderr and "torn.jpg" in done.stderr
    assert [row["name"] for row in content["categories"]] == list(NAMES) and content["threshold"] == 0.2
    assert len(content["images"]) == 3 and len(content["failed"]) == 1
    assert content["detections"] and all(row["score"] >= 0.2 for row in content["detections"])
    for number in range(3):
        with Image.open(tmp_path / "out" / "pictures" / f"{number}.jpg") as picture:
            assert min(picture.size) >= 400, "small pictures are drawn enlarged"


def test_a_threshold_of_one_finds_nothing(run_folder, photos, tmp_path, predict, capsys):
    arguments = [str(photos / "0.jpg"), "--run", str(run_folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert predict([*arguments, "--threshold", "1"]) == 0
    assert "0 objects in 1 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--run", "nowhere"], "nowhere/config.yaml not found. Name the folder of a finished training"),
        (["--weights", "other.pth"], "other.pth not found"),
        (["--threshold", "50"], "between 0 and 1, got 50"),
        (["--device", "gpu"], '"gpu" is no device'),
        (["--batch-size", "0"], "from 1 up, got 0"),
        (["absent.jpg"], "absent.jpg: no such image or folder"),
    ],
)
def test_faults_are_one_line(run_folder, photos, tmp_path, predict, capsys, change, message):
    arguments = [str(photos), "--run", str(run_folder), "--output", str(tmp_path / "out")]
    assert predict([*arguments, *change] if change[0].startswith("--") else [*change, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


class Recorder:
    """Stands for the predictor: notes what it is made of, and writes an empty memory."""

    class_names = ("mug", "plate")

    def __init__(self):
        self.calls = []

    def from_run(self, run, **given):
        self.calls.append({key: given[key] for key in ("support", "memory")})
        return self

    def save_memory(self, path):
        self.calls.append(path)


def test_examples_and_memories_are_handed_on(tmp_path, predict, monkeypatch, capsys):
    """A memory can be made without any picture to look at."""
    recorder = Recorder()
    monkeypatch.setitem(predict.__globals__, "Predictor", recorder)
    folder, file = tmp_path / "supports", tmp_path / "kept"
    assert predict(["--run", "run", "--support", str(folder), "--save-memory", str(file)]) == 0
    assert capsys.readouterr().out == f"2 classes written: {file}.json and .safetensors\n"
    assert predict(["--run", "run", "--memory", str(file), "--save-memory", str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().out == f"2 classes written: {tmp_path}/b.json and .safetensors\n"
    assert recorder.calls == [
        {"support": folder, "memory": ""}, file, {"support": None, "memory": file}, tmp_path / "b.json",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        predict(["--run", "run", "--support", str(folder)])
    assert "name images or folders to look into, or --save-memory" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--support", "--memory"])
def test_a_detector_that_reads_no_examples_says_so(run_folder, photos, tmp_path, predict, capsys, option):
    arguments = [str(photos), "--run", str(run_folder), "--output", str(tmp_path / "out")]
    assert predict([*arguments, option, str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: The classes of this detector ("tiny", MODEL.META_ARCHITECTURE GeneralizedRCNN')
    assert not (tmp_path / "out").exists()


def test_a_memory_needs_a_file_name(tmp_path, predict, capsys):
    assert predict(["--run", "nowhere", "--save-memory", str(tmp_path)]) == 1
    assert "is a folder; name the memory in it" in capsys.readouterr().err
