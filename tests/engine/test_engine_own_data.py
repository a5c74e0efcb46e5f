"""Photographs and shipped configs: the ten lines for own data in docs/datasets.md, and COCO 60/20, on a small set."""

import json
import os
import pickle
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from fsdet.checkpoint.safe_io import load_weights
from fsdet.data.seeds import coco_shot_path, write_coco_shots
from fsdet.data.splits import COCO_CLASSES, coco_split
from fsdet.engine.run import run
from fsdet.evaluation.result import read_result

ROOT = Path(__file__).resolve().parents[2]
COCO_SMALL = ROOT.parent / "shared" / "data" / "coco_small"

pytestmark = pytest.mark.skipif(not COCO_SMALL.exists(), reason="data pack coco_small is not there")


def call(monkeypatch, script, *arguments):
    """Run a script of tools/ or datasets/ in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def documented_commands(heading):
    """The commands of the first code block behind a line of docs/datasets.md, as lists of words."""
    text = (ROOT / "docs" / "datasets.md").read_text()
    block = re.search(r"^```\n(.*?)^```$", text.split(heading, 1)[1], re.M | re.S)[1]
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def cut(part, path, count):
    """The first `count` images of one half of coco_small, as a COCO file of its own."""
    data = json.loads((COCO_SMALL / f"instances_{part}.json").read_text())
    data["images"] = data["images"][:count]
    ids = {image["id"] for image in data["images"]}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in ids]
    path.write_text(json.dumps(data))


def write_ten_shots(folder):
    """10-shot lists as the official ones; 29 classes have fewer boxes and give all of them."""
    data = json.loads((COCO_SMALL / "instances_train2017.json").read_text())
    rng, short = np.random.default_rng(0), 0
    for number, name in COCO_CLASSES.items():
        boxes = [a for a in data["annotations"] if a["category_id"] == number and not a["iscrowd"]]
        chosen = [boxes[i] for i in rng.permutation(len(boxes))[:10]]
        short += len(chosen) < 10
        ids = {a["image_id"] for a in chosen}
        sample = {**data, "images": [i for i in data["images"] if i["id"] in ids], "annotations": chosen}
        write_coco_shots(coco_shot_path(folder, 0, 10, name), sample)
    return short


def test_coco_from_the_shipped_configs(tmp_path, monkeypatch, tiny_network):
    """60 base classes, surgery, 10-shot fine-tuning of all 80 and evaluation; only the command line differs."""
    cut("val2017", tmp_path / "test.json", 16)
    assert write_ten_shots(tmp_path / "samples") == 29
    data = {
        "ROOT": COCO_SMALL,
        "SAMPLES": tmp_path / "samples",
        "TRAIN_JSON": "instances_train2017.json",
        "TEST_JSON": tmp_path / "test.json",
        "TEST_IMAGES": "val2017",
        "OUTPUT": tmp_path / "output",
    }
    opts = [word for key, value in data.items() for word in (f"FEWSHOT.{key}", str(value))]
    opts += [*tiny_network, "SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "2"]
    run(str(ROOT / "configs" / "tfa" / "coco_base.yaml"), opts)
    base = tmp_path / "output" / "frcn" / "r101_fpn" / "coco" / "base"
    recorded = read_result(base / "result.json")
    assert recorded.classes["base"] == coco_split().base and len(recorded.per_class) == 60
    # 257 images, some of which show novel objects alone
    assert 200 < recorded.train_images <= 257 and recorded.protocol.test_images == 16

    split = ("--split", "coco", "--src", base / "model_final.pth", "--output", base / "model_randinit.pth")
    assert call(monkeypatch, "tools/surgery.py", "randinit", *split) == 0

    weights = opts.index("MODEL.WEIGHTS")  # the surgered file is found by its name
    opts = [*opts[:weights], *opts[weights + 2 :], "FEWSHOT.SURGERY", "randinit", "FEWSHOT.SHOT", "10"]
    metrics = run(str(ROOT / "configs" / "tfa" / "coco_cos.yaml"), opts)
    assert {"AP", "bAP", "nAP", "nAP75"} <= set(metrics)
    novel = tmp_path / "output" / "tfa_cos" / "r101_fpn" / "coco" / "gfsod" / "10shot_seed0"
    recorded = read_result(novel / "result.json")
    assert recorded.classes["novel"] == coco_split().novel and len(recorded.per_class) == 80
    assert recorded.protocol.shot == 10 and recorded.protocol.sampling == "unrecorded"
    assert MetadataCatalog.get("coco_train_all_10shot_seed0").load_report["short_lists"] == 29
    before, after = (load_weights(f / "model_final.pth")["model"] for f in (base, novel))
    head = "roi_heads.box_predictor.cls_score.weight"
    assert (len(before[head]), len(after[head])) == (61, 81)
    frozen = [n for n in before if n.startswith(("backbone", "proposal_generator", "roi_heads.box_head"))]
    changed = [n for n in frozen if not before[n].equal(after[n])]
    assert frozen and not changed


@pytest.fixture
def my_set(tmp_path, monkeypatch):
    """Working folder as the documents describe it: tools, configs, datasets/my_set and pictures/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))  # as VOC's lines in README.md set it
    folder = tmp_path / "datasets" / "my_set"
    folder.mkdir(parents=True)
    for name in ("configs", "tools"):
        os.symlink(ROOT / name, tmp_path / name)
    cut("train2017", folder / "train.json", None)
    cut("val2017", folder / "test.json", 16)
    for part, source in (("train", "train2017"), ("test", "val2017")):
        os.symlink(COCO_SMALL / source, folder / part)
        path = folder / f"{part}.json"  # two of COCO's classes play those of the documents
        path.write_text(path.read_text().replace('"name": "cup"', '"name": "pallet"').replace('"chair"', '"forklift"'))
    (tmp_path / "pictures").mkdir()
    os.symlink(next((COCO_SMALL / "val2017").iterdir()), tmp_path / "pictures" / "one.jpg")
    return folder


@pytest.fixture
def plain_checkpoint(tmp_path, tiny_network):
    """Detectron2's own Faster R-CNN with 80 classes and random weights, in the format of its model zoo."""
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml")
    cfg.merge_from_list([*tiny_network, "MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    state = {name: value.numpy() for name, value in build_model(cfg).state_dict().items()}
    assert state["roi_heads.box_predictor.cls_score.weight"].shape[0] == 81
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))
    return path


def test_ten_lines_for_own_data(my_set, plain_checkpoint, tmp_path, monkeypatch, tiny_network):
    """The documented commands as they stand, with a tiny network and two iterations behind them."""
    weights = tiny_network.index("MODEL.WEIGHTS")
    tiny = [*tiny_network[:weights], *tiny_network[weights + 2 :], "MODEL.WEIGHTS", str(plain_checkpoint)]
    tiny += ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "2"]
    commands = documented_commands("<!-- own data: ten lines -->")
    assert [words[1] for words in commands] == ["datasets/prepare_custom.py", "tools/train_net.py", "tools/predict.py"]
    for python, script, *words in commands:
        assert python == "python"
        assert call(monkeypatch, script, *words, *(tiny if "train_net" in script else ())) == 0

    samples = my_set / "samples"
    assert len(list(samples.glob("seed[012]/full_box_10shot_*_trainval.json"))) == 6
    folder = tmp_path / "output" / "frcn_novel_only" / "r50_fpn" / "my_set" / "fsod" / "10shot_seed0"
    result = read_result(folder / "result.json")
    assert result.classes == {"base": (), "novel": ("pallet", "forklift")} and result.iterations == 2
    assert result.protocol.sampling == "strict" and result.protocol.setting == "fsod"
    assert {"AP", "AP50", "nAP50"} <= set(result.metrics)
    trained = load_weights(folder / "model_final.pth")["model"]
    plain = load_weights(plain_checkpoint)["model"]
    assert len(trained["roi_heads.box_predictor.cls_score.weight"]) == 3  # fresh: two classes and background
    assert all(np.array_equal(trained[n], plain[n]) for n in plain if "box_predictor" not in n)  # the rest is frozen
    found = json.loads((tmp_path / "output" / "predictions" / "detections.json").read_text())
    assert [Path(image["file_name"]).name for image in found["images"]] == ["one.jpg"]

    # Evaluating the finished run again takes the predictor that it has trained, not a fresh one.
    before = (folder / "inference" / "detections.json").read_text()
    again = ["--eval-only", "--config-file", folder / "config.yaml", "MODEL.WEIGHTS", folder / "model_final.pth"]
    assert call(monkeypatch, "tools/train_net.py", *again, "OUTPUT_DIR", tmp_path / "again") == 0
    assert (tmp_path / "again" / "inference" / "detections.json").read_text() == before

    # The same for several seeds, with a report; the finished seed is skipped.
    written = (folder / "result.json").stat().st_mtime_ns
    ((_, script, *words),) = documented_commands("Several seeds and a report")
    assert call(monkeypatch, script, *words, *tiny) == 0
    assert (folder / "result.json").stat().st_mtime_ns == written
    assert len(list(folder.parent.glob("10shot_seed[012]/result.json"))) == 3
    assert "my_set" in (tmp_path / "output" / "my_set.html").read_text()
