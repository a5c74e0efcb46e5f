"""DeFRCN through the whole engine: base stage, surgery, calibrated novel stage, in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fsdet.checkpoint.safe_io import load_weights
from fsdet.checkpoint.surgery import surgery_file
from fsdet.engine.run import run
from fsdet.evaluation.result import read_result
from fsdet.modeling.class_memory import ClassMemory
from fsdet.modeling.imagenet import NETWORKS

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("red", "green", "blue", "white")

DETECTOR = {
    "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 3},
    "RESNETS": {"NORM": "FrozenBN", "OUT_FEATURES": ["res4"]},
    "ANCHOR_GENERATOR": {"SIZES": [[8, 16, 32]]},
    "PROPOSAL_GENERATOR": {"NAME": "DecoupledRPN"},
    "RPN": {"IN_FEATURES": ["res4"], "ENABLE_DECOUPLE": True, "BACKWARD_SCALE": 0.0},
    "ROI_HEADS": {
        "NAME": "DecoupledRes5ROIHeads",
        "IN_FEATURES": ["res4"],
        "ENABLE_DECOUPLE": True,
        "BACKWARD_SCALE": 0.75,
    },
    "ROI_BOX_HEAD": {"NAME": "", "NUM_FC": 0, "POOLER_RESOLUTION": 7},
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """ResNet-50 with random weights, as overrides; a small last norm a block keeps them finite."""
    torch.manual_seed(0)
    network = NETWORKS["resnet50"].build()
    state = {
        name: value * 0.3 if name.endswith("bn3.weight") else value for name, value in network.state_dict().items()
    }
    path = tmp_path_factory.mktemp("weights") / "r50.safetensors"
    save_file({name: value.half() if value.is_floating_point() else value for name, value in state.items()}, path)
    return {"CALIBRATION": {"ENABLED": True, "NETWORK": "resnet50", "WEIGHTS": str(path)}}


@pytest.fixture
def base(write_config, calm_weights, tmp_path):
    """Checkpoint of a short base stage."""
    config = write_config("base.yaml", MODEL=DETECTOR, OUTPUT_DIR=str(tmp_path / "base"))
    run(config, calm_weights(config), quiet=True)
    return tmp_path / "base" / "model_final.pth"


@pytest.fixture
def write_novel(write_config, base, tmp_path, classifier):
    """Write the config of a novel stage, into a folder of its name."""
    surgered = tmp_path / "randinit.pth"
    surgery_file(base, surgered, "randinit", source_classes=CLASSES[:3], target_classes=CLASSES)

    def write(name, **solver):
        heads = {**DETECTOR["ROI_HEADS"], "BACKWARD_SCALE": 0.001, "FREEZE_FEAT": True, "OUTPUT_LAYER": "dropout"}
        return write_config(
            f"{name}.yaml",
            OUTPUT_DIR=str(tmp_path / name),
            FEWSHOT={"STAGE": "novel", "SHOT": 2},
            MODEL={**DETECTOR, "ROI_HEADS": heads, "WEIGHTS": str(surgered)},
            SOLVER={"BASE_LR": 1e-3, **solver},
            TEST={"CALIBRATION": classifier["CALIBRATION"], "EVAL_PERIOD": 0},
        )

    return write


def weights(path):
    return load_weights(path)["model"]


def test_stages_train_what_they_should(write_novel, base, tmp_path):
    run(write_novel("novel"), quiet=True)
    before, after = weights(tmp_path / "randinit.pth"), weights(tmp_path / "novel" / "model_final.pth")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {".".join(name.split(".")[:2]) for name in moved}
    assert parts == {
        "backbone.res4", "proposal_generator.decouple", "proposal_generator.rpn_head", "roi_heads.decouple",
        "roi_heads.box_predictor",
    }  # fmt: skip
    result = read_result(tmp_path / "novel" / "result.json")
    assert result.protocol.calibration.startswith("pcb resnet50:") and result.protocol.proposals == 30
    assert ClassMemory.load(tmp_path / "novel" / "class_memory").names == ("white",)
    assert not any("encoder" in name or "trunk" in name for name in after)


def test_two_processes_equal_two_accumulation_passes(write_novel, tmp_path):
    """Dropout included; both processes calibrate, and one class memory is written."""
    run(write_novel("one", ACCUMULATION_STEPS=2), quiet=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "tools" / "train_net.py"), "--config-file", write_novel("two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (
        json.loads((tmp_path / name / "metrics.json").read_text().splitlines()[0]) for name in ("one", "two")
    )
    for name in ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "total_loss"):
        assert first[name] == pytest.approx(second[name], rel=1e-4)
    one, two = weights(tmp_path / "one" / "model_final.pth"), weights(tmp_path / "two" / "model_final.pth")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)
    results = [read_result(tmp_path / name / "result.json") for name in ("one", "two")]
    assert results[0].metrics == pytest.approx(results[1].metrics, abs=1e-2, nan_ok=True)
    memories = [ClassMemory.load(tmp_path / name / "class_memory") for name in ("one", "two")]
    assert not memories[0].compare(memories[1]).changed
