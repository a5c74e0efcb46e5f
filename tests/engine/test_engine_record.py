"""What result.json says about where a run started and what it trained on."""

import shutil

import pytest
import torch

from fsdet.checkpoint.safe_io import save_atomic, sha256_of
from fsdet.checkpoint.surgery import surgery_file
from fsdet.engine.preflight import check_weights
from fsdet.engine.record import base_model_digest, pretraining_label
from fsdet.engine.run import run
from fsdet.engine.setup import load_config
from fsdet.evaluation.result import read_result


def test_base_model_is_the_one_that_surgery_read(write_config, tmp_path):
    """Training the base again does not change what earlier surgered files came from."""
    novel = {"STAGE": "novel", "SHOT": 1, "BASE_RUN": str(tmp_path)}
    cfg = load_config(write_config(FEWSHOT=novel))
    head = "roi_heads.box_predictor."
    sizes = {"cls_score": 4, "bbox_pred": 12}
    state = {f"{head}{part}.weight": torch.zeros(rows, 2) for part, rows in sizes.items()}
    base = tmp_path / "model_final.pth"
    save_atomic({"model": state}, base)
    first = sha256_of(base)[:12]
    classes = ["red", "green", "blue"]
    surgery_file(base, cfg.MODEL.WEIGHTS, "randinit", source_classes=classes, target_classes=[*classes, "white"])
    assert base_model_digest(cfg) == first
    check_weights(cfg)
    save_atomic({"model": {name: value + 1 for name, value in state.items()}}, base)
    assert sha256_of(base)[:12] != first == base_model_digest(cfg)
    with pytest.raises(ValueError, match=r"made from another checkpoint(.|\n)*surgery.py randinit"):
        check_weights(cfg)
    check_weights(cfg, training=False)
    plain = load_config(write_config(FEWSHOT=novel), ["MODEL.WEIGHTS", str(base)])  # a file without a record
    assert base_model_digest(plain) == sha256_of(base)[:12]


def test_pretraining_names_what_fills_the_backbone(write_config):
    assert pretraining_label(load_config(write_config(MODEL={"WEIGHTS": "weights/R-50.pkl"}))) == "R-50.pkl"
    assert pretraining_label(load_config(write_config())) == ""
    packaged = {"BACKBONE": {"NAME": "TimmFPNBackbone"}, "TIMM": {"WEIGHTS": "efficientnet-lite0-package"}}
    assert pretraining_label(load_config(write_config(MODEL=packaged))) == "efficientnet-lite0-package"


def test_evaluation_needs_no_training_data(write_config, tmp_path, squares, calm_weights):
    """Without the K-shot lists a result lacks their digest, nothing else."""
    novel = {"STAGE": "novel", "SHOT": 1}
    started = write_config(FEWSHOT=novel)
    metrics = run(started, calm_weights(started))
    trained = read_result(tmp_path / "run" / "result.json")
    assert trained.protocol.samples_digest and trained.train_images == 1
    alone = tmp_path / "alone"
    shutil.copytree(squares, alone, ignore=shutil.ignore_patterns("samples", "train"))
    config = write_config("alone.yaml", OUTPUT_DIR=str(tmp_path / "evaluated"), FEWSHOT={**novel, "ROOT": str(alone)})
    again = run(config, ["MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth")], eval_only=True)
    assert again == pytest.approx(metrics, nan_ok=True)
    result = read_result(tmp_path / "evaluated" / "result.json")
    assert result.protocol.samples_digest is None and result.train_images == 0
    assert result.protocol.group() == trained.protocol.group()
