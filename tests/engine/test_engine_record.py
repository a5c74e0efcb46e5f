"""What result.json says about where a run started and what it trained on."""

import shutil

import pytest
import torch

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.checkpoint.safe_io import load_weights, save_atomic
from fsdet.checkpoint.surgery import surgery_file
from fsdet.data.files import sha256_of
from fsdet.engine.preflight import check_weights
from fsdet.engine.record import Cost, base_model_digest, evaluated_cost, pretraining_label
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


def test_cost_is_that_of_the_loaded_checkpoint(tmp_path):
    """A checkpoint of Detectron2's own trainer has a "trainer" too, but no time."""
    model = torch.nn.Linear(2, 2)
    files = {
        "ours": {"trainer": {"seconds": 7.5, "iteration": 9}, "iteration": 9},
        "detectron2": {"trainer": {"iteration": 9, "_trainer": {}}, "iteration": 9},
        "weights": {},
    }
    costs = {}
    for name, rest in files.items():
        save_atomic({"model": model.state_dict(), **rest}, tmp_path / f"{name}.pth")
        checkpointer = FewShotCheckpointer(model)
        assert evaluated_cost(checkpointer) == Cost()
        checkpointer.load(tmp_path / f"{name}.pth")
        costs[name] = evaluated_cost(checkpointer)
    assert costs == {"ours": Cost(7.5, 10), "detectron2": Cost(), "weights": Cost()}


def test_evaluating_the_newest_checkpoint_records_its_own_cost(write_config, tmp_path, calm_weights):
    """Not that of MODEL.WEIGHTS, which the training only started from."""
    config = write_config()
    start = calm_weights(config)
    run(config, start)
    folder = tmp_path / "run"
    trained = read_result(folder / "result.json")
    (folder / "result.json").unlink()
    newest = load_weights(folder / "model_final.pth")
    save_atomic({**newest, "trainer": {**newest["trainer"], "seconds": 123.0}}, folder / "model_final.pth")
    run(config, start, eval_only=True, resume=True)
    result = read_result(folder / "result.json")
    assert (result.seconds["train"], result.iterations) == (123.0, trained.iterations)
    assert result.protocol.pretraining == trained.protocol.pretraining == "calm.pth"
