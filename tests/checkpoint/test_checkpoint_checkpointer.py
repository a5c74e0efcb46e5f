"""Loading with a report, refusing what does not fit, resuming from the newest complete file."""

import logging
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet
from torch import nn

from fsdet.checkpoint import checkpointer as module
from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.checkpoint.safe_io import CheckpointFileError, save_atomic, save_safetensors
from fsdet.checkpoint.surgery import surgery_file

WEIGHTS = Path(__file__).resolve().parents[2].parent / "shared/data/weights/r50_msra_d2_fp16.safetensors"
CLASSES = ["cat", "dog", "cow", "bus", "car"]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_round_trip_and_resume(tmp_path, toy, counter):
    model = toy(5)
    saver = FewShotCheckpointer(model, tmp_path, metadata={"classes": CLASSES, "stage": "base"}, trainer=counter)
    counter.state = {"steps": np.int64(7), "noise": torch.ones(3)}
    saver.save("model_0000006", iteration=6)
    on_disk = torch.load(tmp_path / "model_0000006.pth", weights_only=True)
    assert on_disk["fsdet"] == {"classes": CLASSES, "stage": "base"}
    assert type(on_disk["trainer"]["steps"]) is int

    other = toy(5)
    assert not equal(model, other)
    counter.state = None
    loader = FewShotCheckpointer(other, tmp_path, metadata={"classes": CLASSES}, trainer=counter)
    rest = loader.resume_or_load("ignored.pth", resume=True)
    assert equal(model, other) and rest["iteration"] == 6 and counter.state["steps"] == 7
    assert loader.report.is_full and set(loader.report.matched) == set(model.state_dict())

    counter.state = "untouched"
    loader.resume_or_load(tmp_path / "model_0000006.pth", resume=False)
    assert counter.state == "untouched"


def test_detectron2_reads_what_is_saved(tmp_path, toy):
    model, other = toy(5), toy(5)
    FewShotCheckpointer(model, tmp_path).save("model_final")
    DetectionCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert equal(model, other)


def test_nothing_to_load(tmp_path, toy):
    checkpointer = FewShotCheckpointer(toy(5), tmp_path)
    assert checkpointer.resume_or_load("", resume=True) == {} and checkpointer.report is None
    with pytest.raises(FileNotFoundError, match=r"gone.pth not found"):
        checkpointer.load(tmp_path / "gone.pth")


def test_report_counts_every_kind(tmp_path, toy, caplog):
    model = toy(5)
    state = model.state_dict()
    state["backbone.new"] = torch.ones(1)
    state["backbone.norm.weight"] = torch.ones(9)
    del state["backbone.conv1.bias"]
    save_atomic({"model": state}, tmp_path / "a.pth")
    checkpointer = FewShotCheckpointer(model)
    with caplog.at_level(logging.INFO, logger="fsdet"):
        checkpointer.load(tmp_path / "a.pth")
    report = checkpointer.report
    assert report.missing == ("backbone.conv1.bias",) and report.unexpected == ("backbone.new",)
    assert report.mismatched == (("backbone.norm.weight", (9,), (4,)),)
    assert len(report.matched) == len(model.state_dict()) - 2 and not report.is_full
    assert "1 missing, 1 unexpected, 1 of another shape" in caplog.text
    with pytest.raises(ValueError, match=r"(?s)a.pth does not fit.*conv1.bias.*backbone.new.*\(9,\) in the file"):
        FewShotCheckpointer(model, require_full=True).load(tmp_path / "a.pth")


def test_long_reports_are_cut(tmp_path):
    save_atomic({"model": {f"name{i}": torch.ones(1) for i in range(30)}}, tmp_path / "a.pth")
    checkpointer = FewShotCheckpointer(nn.Linear(1, 1))
    checkpointer.load(tmp_path / "a.pth")
    assert "... and 18 more" in checkpointer.report.describe()


def test_other_class_count_is_an_error(tmp_path, toy, caplog):
    save_atomic({"model": toy(5).state_dict()}, tmp_path / "base.pth")
    model = toy(8)
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(ValueError, match=r"base.pth has a predictor of 5 classes, the model has 8.*tools/surgery.py"):
        FewShotCheckpointer(model).load(tmp_path / "base.pth")
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))

    DetectionCheckpointer(model).load(str(tmp_path / "base.pth"))  # stock Detectron2 skips the predictor and goes on
    lenient = FewShotCheckpointer(model, strict_heads=False)
    lenient.load(tmp_path / "base.pth")
    assert [name.split(".")[-2] for name, _, _ in lenient.report.mismatched] == 2 * ["cls_score"] + 2 * ["bbox_pred"]


def test_other_box_regressor_is_an_error(tmp_path, toy):
    save_atomic({"model": toy(5, agnostic=True).state_dict()}, tmp_path / "agnostic.pth")
    with pytest.raises(ValueError, match=r"(?s)agnostic.pth has a box predictor of another shape.*\(4, 6\)"):
        FewShotCheckpointer(toy(5)).load(tmp_path / "agnostic.pth")


def test_other_class_order_is_an_error(tmp_path, toy):
    FewShotCheckpointer(toy(5), tmp_path, metadata={"classes": CLASSES}).save("model_final")
    swapped = ["cat", "cow", "dog", "bus", "car"]
    with pytest.raises(ValueError, match=r'model_final.pth .*row 1 is "dog" in the file and "cow"'):
        FewShotCheckpointer(toy(5), metadata={"classes": swapped}).load(tmp_path / "model_final.pth")
    FewShotCheckpointer(toy(5), metadata={"classes": tuple(CLASSES)}).load(tmp_path / "model_final.pth")


def test_removed_predictor_loads_into_any_class_count(tmp_path, toy):
    FewShotCheckpointer(toy(5), tmp_path, metadata={"classes": CLASSES}).save("model_final")
    surgery_file(tmp_path / "model_final.pth", tmp_path / "removed.pth", "remove")
    checkpointer = FewShotCheckpointer(toy(2), metadata={"classes": ["a", "b"]})
    checkpointer.load(tmp_path / "removed.pth")
    assert (
        all("box_predictor" in name for name in checkpointer.report.missing) and len(checkpointer.report.missing) == 4
    )


@pytest.fixture
def run(tmp_path, toy, counter):
    """Three checkpoints of one run; the pointer names the last."""
    model = toy(5)
    saver = FewShotCheckpointer(model, tmp_path, trainer=counter)
    for iteration in (2, 5, 8):
        nn.init.constant_(model.backbone.conv1.bias, iteration)
        name = "model_final" if iteration == 5 else f"model_{iteration:07d}"
        saver.save(name, iteration=iteration)
    return tmp_path


@pytest.mark.parametrize("fault", ["truncated", "missing", "empty pointer", "no state"])
def test_torn_newest_falls_back_to_the_newest_complete(run, toy, counter, caplog, fault):
    newest = run / "model_0000008.pth"
    if fault == "truncated":
        newest.write_bytes(newest.read_bytes()[:900])
    elif fault == "missing":
        newest.unlink()
    elif fault == "empty pointer":
        newest.unlink()
        (run / "last_checkpoint").write_text("")
    else:
        save_atomic({"model": toy(5).state_dict(), "iteration": 99}, newest)
    model = toy(5)
    checkpointer = FewShotCheckpointer(model, run, trainer=counter)
    with caplog.at_level(logging.WARNING, logger="fsdet"):
        rest = checkpointer.resume_or_load("", resume=True)
    # By iteration, not by name: model_final comes from iteration 5 here, model_0000002 sorts before it.
    assert rest["iteration"] == 5 and model.backbone.conv1.bias[0] == 5
    assert "Resuming from" in caplog.text and "model_final.pth" in caplog.text


def test_surgery_results_are_not_resumed_from(run, toy, counter):
    surgery_file(run / "model_final.pth", run / "model_surgery.pth", "remove")
    for name in ("model_final", "model_0000002", "model_0000008"):
        (run / f"{name}.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointFileError, match=r"No complete checkpoint.*model_0000008.pth.*without --resume"):
        FewShotCheckpointer(toy(5), run, trainer=counter).resume_or_load("", resume=True)


def test_resume_needs_the_same_model(run, toy, counter):
    checkpointer = FewShotCheckpointer(toy(5, cosine=True), run, trainer=counter)
    with pytest.raises(ValueError, match=r"(?s)does not fit the model exactly.*cls_score.bias"):
        checkpointer.resume_or_load("", resume=True)
    assert checkpointer.require_full is False


def test_failing_save_keeps_pointer_and_file(run, toy, counter, monkeypatch):
    model = toy(5)

    def disk_full(data, path):
        Path(path).write_bytes(b"PK")
        raise OSError("No space left on device")

    monkeypatch.setattr("fsdet.checkpoint.safe_io.torch.save", disk_full)
    with pytest.raises(OSError, match="No space"):
        FewShotCheckpointer(model, run, trainer=counter).save("model_0000011", iteration=11)
    assert (run / "last_checkpoint").read_text() == "model_0000008.pth"
    assert not (run / "model_0000011.pth").exists()


def test_pointer_is_written_after_the_checkpoint(run, toy, counter, monkeypatch):
    order = []
    monkeypatch.setattr(module, "save_atomic", lambda data, path: order.append(path.name))
    monkeypatch.setattr(module, "save_text_atomic", lambda text, path: order.append(path.name))
    FewShotCheckpointer(toy(5), run, trainer=counter).save("model_0000011")
    assert order == ["model_0000011.pth", "last_checkpoint"]


KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from pathlib import Path
from torch import nn
from fsdet.checkpoint.checkpointer import FewShotCheckpointer

model = nn.Linear(2, 2)
saver = FewShotCheckpointer(model, sys.argv[1])
nn.init.constant_(model.weight, 1)
saver.save("model_final", iteration=1)
write = torch.save

def killed(data, path):
    write(data, path)
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = killed
nn.init.constant_(model.weight, 2)
saver.save("model_final", iteration=2)
"""


def test_killed_while_saving_leaves_the_previous_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (torn,) = tmp_path.glob(".*.tmp")
    model = nn.Linear(2, 2)
    checkpointer = FewShotCheckpointer(model, tmp_path)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    assert torch.all(model.weight == 1)
    checkpointer.save("model_0000003")
    assert not torn.exists()  # the next save clears what the killed one left


def test_periodic_checkpointer_of_detectron2(tmp_path, toy):
    periodic = PeriodicCheckpointer(FewShotCheckpointer(toy(5), tmp_path), 2, max_iter=7, max_to_keep=2)
    for iteration in range(7):
        periodic.step(iteration)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last_checkpoint", "model_0000003.pth", "model_0000005.pth", "model_final.pth"]


def test_other_processes_do_not_save(tmp_path, toy):
    FewShotCheckpointer(toy(5), tmp_path, save_to_disk=False).save("model_final")
    assert list(tmp_path.iterdir()) == []


def backbone_of(detector: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of the ResNet under bare names, with res5 wherever the model keeps it."""
    state = detector.state_dict()
    prefixes = ("backbone.bottom_up.",) if kind == "fpn" else ("backbone.", "roi_heads.")
    bare = {k.removeprefix(p): v for p in prefixes for k, v in state.items() if k.startswith(p)}
    return {k: v.clone() for k, v in bare.items() if k.startswith(("stem", "res"))}


@pytest.mark.parametrize("kind", ["fpn", "c4"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_bare_backbone_finds_its_place(tmp_path, tiny_detector, kind, suffix):
    source, target = tiny_detector(kind), tiny_detector(kind)
    bare = backbone_of(source, kind)
    assert sum("res5" in name for name in bare) > 10
    file = tmp_path / f"backbone{suffix}"
    if suffix == ".pth":
        save_atomic(bare | {"linear.weight": torch.ones(3, 8)}, file)
    else:
        save_safetensors(bare | {"linear.weight": torch.ones(3, 8)}, file)
    checkpointer = FewShotCheckpointer(target)
    checkpointer.load(file)
    loaded = backbone_of(target, kind)
    assert all(torch.equal(loaded[name], bare[name]) for name in bare)
    assert len(checkpointer.report.matched) == len(bare)
    assert checkpointer.report.unexpected == ("linear.weight",)


def test_classifier_of_a_backbone_file_is_not_taken_for_a_layer_of_its_name(tmp_path, tiny_detector, caplog):
    source, target = tiny_detector("c4"), tiny_detector("c4")
    target.head = nn.ModuleDict({"linear": nn.Linear(4, 2)})
    bare = backbone_of(source, "c4")
    classifier = {"linear.weight": torch.ones(3, 8), "linear.bias": torch.ones(3)}
    save_atomic(bare | classifier, tmp_path / "backbone.pth")
    checkpointer = FewShotCheckpointer(target)
    checkpointer.load(tmp_path / "backbone.pth")
    assert checkpointer.report.unexpected == tuple(classifier) and not checkpointer.report.mismatched
    assert len(checkpointer.report.matched) == len(bare)
    assert not any("linear" in record.getMessage() and "hape" in record.getMessage() for record in caplog.records)


def test_last_layer_of_a_backbone_file_loads_where_it_fits(tmp_path, tiny_detector):
    source, target = tiny_detector("c4"), tiny_detector("c4")
    target.head = nn.ModuleDict({"linear": nn.Linear(8, 3)})
    layer = {"linear.weight": torch.ones(3, 8), "linear.bias": torch.ones(4)}
    save_atomic(backbone_of(source, "c4") | layer, tmp_path / "backbone.pth")
    checkpointer = FewShotCheckpointer(target)
    checkpointer.load(tmp_path / "backbone.pth")
    assert torch.equal(target.head["linear"].weight, layer["linear.weight"])
    assert checkpointer.report.unexpected == ("linear.bias",)


def test_caffe2_pickle_is_matched_by_name(tmp_path, tiny_detector):
    detector = tiny_detector("fpn")
    state = detector.state_dict()
    place = "backbone.bottom_up."
    names = {
        "conv1_w": "stem.conv1.weight",
        "res_conv1_bn_s": "stem.conv1.norm.weight",
        "res2_0_branch1_w": "res2.0.shortcut.weight",
        "res4_3_branch2b_bn_b": "res4.3.conv2.norm.bias",
    }
    zoo = {old: np.full(tuple(state[place + new].shape), 3.0, "f4") for old, new in names.items()}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(zoo | {"conv1_w_momentum": zoo["conv1_w"]}, 2))
    checkpointer = FewShotCheckpointer(detector)
    checkpointer.load(tmp_path / "R-50.pkl")
    assert set(checkpointer.report.matched) == {place + name for name in names.values()}
    assert torch.all(detector.state_dict()[place + "res2.0.shortcut.weight"] == 3)


def test_zoo_pickle_of_a_detector(tmp_path, tiny_detector):
    source, target = tiny_detector("fpn"), tiny_detector("fpn")
    arrays = {name: value.numpy() for name, value in source.state_dict().items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, 2))
    checkpointer = FewShotCheckpointer(target, require_full=True)
    checkpointer.load(tmp_path / "zoo.pkl")
    assert equal(source, target) and checkpointer.report.is_full


def test_heuristics_switch_in_the_path(tmp_path, toy):
    state = {"conv1.weight": torch.ones(4, 3, 3, 3), "backbone.norm.weight": torch.ones(4)}
    save_atomic({"model": state}, tmp_path / "mixed.pth")
    checkpointer = FewShotCheckpointer(toy(5))
    checkpointer.load(tmp_path / "mixed.pth")
    assert checkpointer.report.matched == ("backbone.norm.weight",)
    checkpointer.load(f"{tmp_path}/mixed.pth?matching_heuristics=True")
    assert set(checkpointer.report.matched) == {"backbone.conv1.weight", "backbone.norm.weight"}


def test_failed_load_does_not_block_the_next_one(tmp_path, toy):
    (tmp_path / "bad.pth").write_bytes(b"PK")
    model = toy(5)
    save_atomic({"model": model.state_dict()}, tmp_path / "good.pth")

    class Newer(FewShotCheckpointer):
        """Newer releases of Detectron2 keep the parsed address while they load, also when that fails."""

        def _load_file(self, filename):
            self._parsed_url_during_load = "an address"
            return super()._load_file(filename)

    checkpointer = Newer(model)
    with pytest.raises(CheckpointFileError, match=r"bad.pth"):
        checkpointer.load(tmp_path / "bad.pth")
    assert checkpointer._parsed_url_during_load is None
    checkpointer.load(tmp_path / "good.pth")
    assert checkpointer.report.is_full


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the ImageNet ResNet-50 of the data pack is not here")
def test_imagenet_resnet50_of_the_pack():
    stages = ResNet.make_default_stages(50, stride_in_1x1=True, norm="FrozenBN")
    from detectron2.modeling.backbone.resnet import BasicStem

    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.bottom_up = ResNet(BasicStem(ShapeSpec(channels=3).channels, 64, "FrozenBN"), stages)
    checkpointer = FewShotCheckpointer(model)
    checkpointer.load(WEIGHTS)
    report = checkpointer.report
    assert not report.missing and not report.mismatched and set(report.unexpected) == {"linear.weight", "linear.bias"}
    half = safetensors.torch.load_file(WEIGHTS)["res4.3.conv2.weight"]
    assert half.dtype == torch.float16
    assert torch.equal(model.state_dict()["backbone.bottom_up.res4.3.conv2.weight"], half.float())
