"""Bad input: one clear message that names the file and the remedy, and nothing is trained.

Further faults are tested beside what finds them: unknown keys and contradictory values in test_engine_setup.py, a
novel stage without surgery in test_engine_sweep.py, the readers' messages in tests/data.
"""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from fsdet.data.seeds import MANIFEST, digest_of
from fsdet.data.splits import COCO_CLASSES
from fsdet.engine.run import run
from fsdet.engine.setup import load_config, on_this_machine
from fsdet.engine.trainer import build_detector
from fsdet.evaluation.result import read_result

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "train_net.py"
ONE_SHOT = {"STAGE": "novel", "SHOT": 1}


@pytest.fixture
def train_net(monkeypatch, tmp_path):
    """Run tools/train_net.py in this process; returns its one error message, and makes sure that nothing trained."""

    def call(config, *opts):
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--num-gpus", "0", "--config-file", config, *opts])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name="__main__")
        assert isinstance(stop.value.code, str)
        assert stop.value.code.startswith("error: ")
        assert not list(tmp_path.rglob("run/**/*.pth")), "something was trained"
        assert not list(tmp_path.rglob("result.json"))
        return stop.value.code

    return call


@pytest.fixture
def copy(squares, tmp_path):
    """A copy of the tiny set that a test may damage."""
    return Path(shutil.copytree(squares, tmp_path / "copy"))


def edit(path, change):
    """Load a json, let `change` alter it, write it back."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def shot_list(folder, shot=1, name="white"):
    return folder / "samples" / "seed0" / f"full_box_{shot}shot_{name}_trainval.json"


# Missing data


def test_missing_data_set_folder(train_net, write_config, tmp_path):
    message = train_net(write_config(FEWSHOT={"ROOT": str(tmp_path / "nowhere")}))
    assert "nowhere" in message and "FEWSHOT.ROOT" in message and "prepare_" not in message


@pytest.mark.parametrize(
    ("gone", "remedy"),
    [
        ("train.json", "FEWSHOT.TRAIN_JSON"),
        ("test.json", "TEST_JSON"),
        ("train", "FEWSHOT.TRAIN_IMAGES"),
        ("test", "FEWSHOT.TEST_IMAGES"),
        ("test/1.png", "FEWSHOT.TEST_IMAGES"),
        ("train/7.png", "7.png"),
    ],
)
def test_missing_file_of_own_data(train_net, write_config, copy, gone, remedy):
    path = copy / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = train_net(write_config(FEWSHOT={"ROOT": str(copy)}))
    assert str(path) in message and remedy in message


@pytest.mark.parametrize("stage", ["base", "novel"])
@pytest.mark.parametrize("recipe", ["voc", "coco"])
def test_missing_benchmark(train_net, tmp_path, recipe, stage):
    opts = ["FEWSHOT.ROOT", str(tmp_path), "OUTPUT_DIR", str(tmp_path / "run")]
    novel = ["FEWSHOT.SHOT", "1"] if stage == "novel" else []
    config = ROOT / "configs" / "tfa" / f"{recipe}_{'cos' if novel else 'base'}.yaml"
    message = train_net(str(config), *opts, *novel)
    place = {"voc": "VOC2007", "coco": "cocosplit/datasplit/5k.json"}[recipe]
    assert str(tmp_path / place) in message
    assert "datasets/README.md says where to get it" in message and "DETECTRON2_DATASETS" in message
    assert "prepare_" not in message  # which makes lists, not the data


def test_missing_shot_list(train_net, write_config, copy):
    shot_list(copy).unlink()
    message = train_net(write_config(FEWSHOT={**ONE_SHOT, "ROOT": str(copy)}))
    assert str(shot_list(copy)) in message and "prepare_custom.py" in message and "FEWSHOT.SAMPLES" in message


def test_missing_seed(train_net, write_config):
    message = train_net(write_config(FEWSHOT=ONE_SHOT), "FEWSHOT.SEED", "7")
    assert "seed7" in message and "prepare_custom.py" in message


# K larger than available


def test_more_shots_than_there_are_lists_for(train_net, write_config):
    message = train_net(write_config(FEWSHOT=ONE_SHOT), "FEWSHOT.SHOT", "5")
    assert "full_box_5shot_red" in message and "lists there: 1, 2 shot" in message


def test_more_shots_than_an_exact_list_holds(train_net, write_config, copy):
    """Lists that say of themselves that they hold exactly K."""
    edit(shot_list(copy, 2), lambda data: data["annotations"].pop())
    folder = copy / "samples" / "seed0"
    files = sorted(folder.glob("*.json"))
    manifest = {"algorithm": "strict", "digest": digest_of(files), "files": [p.name for p in files]}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    message = train_net(write_config(FEWSHOT={**ONE_SHOT, "SHOT": 2, "ROOT": str(copy)}))
    assert '2 instances of "white" needed, 1 found' in message and "Draw the samples again" in message


# Classes


def test_unknown_novel_class(train_net, write_config, squares):
    message = train_net(write_config(), "FEWSHOT.NOVEL_CLASSES", "('whyte',)")
    assert str(squares / "train.json") in message and "whyte" in message
    assert "white" in message and "Correct FEWSHOT.NOVEL_CLASSES" in message


def test_no_novel_class(train_net, write_config):
    message = train_net(write_config(FEWSHOT={**ONE_SHOT, "SETTING": "fsod", "NOVEL_CLASSES": []}))
    assert "FEWSHOT.LAYOUT custom needs FEWSHOT.NOVEL_CLASSES: " in message


def test_class_that_training_does_not_know(train_net, write_config, copy):
    edit(copy / "test.json", lambda data: data["categories"][0].update(name="crimson"))
    message = train_net(write_config(FEWSHOT={"ROOT": str(copy)}))
    assert str(copy / "test.json") in message and "unknown classes ['crimson']" in message


def test_no_training_image_is_left(train_net, write_config, squares):
    """Every image of the set shows the novel class."""
    message = train_net(write_config(), "FEWSHOT.LEAK", "drop")
    assert str(squares / "train.json") in message and "FEWSHOT.LEAK" in message


# Pictures


@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["fresh", "resume"])
def test_truncated_jpeg_of_a_shot(train_net, write_config, copy, resume):
    from PIL import Image

    picture = copy / "train" / "1.png"
    with Image.open(picture) as image:
        image.convert("RGB").save(picture, format="JPEG", quality=95)
    picture.write_bytes(picture.read_bytes()[:-400])
    message = train_net(write_config(FEWSHOT={**ONE_SHOT, "ROOT": str(copy)}), *resume)
    assert str(picture) in message and "truncated" in message and "replace them or remove them" in message


# Weights


def write_checkpoint(path, config, *opts):
    """Random weights of a configuration's detector."""
    model = build_detector(on_this_machine(load_config(config, opts)))
    path.parent.mkdir(exist_ok=True)
    torch.save({"model": model.state_dict()}, path)


@pytest.mark.parametrize("stage", ["base", "novel"])
def test_checkpoint_of_another_class_count(train_net, write_config, tmp_path, stage):
    """Seven classes, which fit neither the three of the base stage nor the four of the novel one."""
    weights = tmp_path / "weights" / "seven.pth"
    write_checkpoint(weights, write_config("seven.yaml"), "MODEL.ROI_HEADS.NUM_CLASSES", "7")
    fewshot = ONE_SHOT if stage == "novel" else {}
    message = train_net(write_config(FEWSHOT=fewshot), "MODEL.WEIGHTS", str(weights))
    assert str(weights) in message and "7 classes" in message and f"{4 if fewshot else 3}" in message
    assert "start with a fresh predictor: FEWSHOT.RESET_PREDICTOR True" in message
    assert ("tools/surgery.py randinit" in message and "red,green,blue,white" in message) == (stage == "novel")


@pytest.mark.parametrize("stage", ["base", "novel"])
def test_evaluation_of_a_checkpoint_of_another_class_count(train_net, write_config, tmp_path, stage):
    weights = tmp_path / "weights" / "seven.pth"
    write_checkpoint(weights, write_config("seven.yaml"), "MODEL.ROI_HEADS.NUM_CLASSES", "7")
    fewshot = ONE_SHOT if stage == "novel" else {}
    message = train_net(write_config(FEWSHOT=fewshot), "--eval-only", "MODEL.WEIGHTS", str(weights))
    assert str(weights) in message and "7 classes" in message and "config.yaml of the run that trained it" in message


def test_evaluation_without_a_detector(train_net, write_config, tmp_path):
    """Nothing would train the missing parts: the figures would be those of random weights."""
    assert "no weights to evaluate. Set MODEL.WEIGHTS" in train_net(write_config(), "--eval-only")
    assert "--resume" in train_net(write_config(), "--eval-only", "--resume")  # nothing to resume from
    weights = tmp_path / "weights" / "backbone.pth"
    write_checkpoint(weights, write_config())
    state = torch.load(weights)["model"]
    torch.save({"model": {n: v for n, v in state.items() if n.startswith("backbone")}}, weights)
    message = train_net(write_config(), "--eval-only", "MODEL.WEIGHTS", str(weights))
    assert str(weights) in message and "no complete detector" in message


@pytest.mark.parametrize("setting", ["gfsod", "fsod"])
@pytest.mark.parametrize("surgery", ["randinit", "remove"])
def test_command_in_the_message_mends_the_run(train_net, write_config, tmp_path, monkeypatch, setting, surgery):
    """Novel stage from base weights: running what the message says makes the weights that the run then takes."""
    base = tmp_path / "weights" / "base.pth"
    write_checkpoint(base, write_config())
    saved = torch.load(base)
    torch.save({**saved, "fsdet": {"classes": ["red", "green", "blue"]}}, base)
    fewshot = {**ONE_SHOT, "SETTING": setting, "SURGERY": surgery, "BASE_RUN": str(tmp_path / "base")}
    config = write_config(FEWSHOT=fewshot, SOLVER={"MAX_ITER": 1, "STEPS": []})
    message = train_net(config, "MODEL.WEIGHTS", str(base))
    assert "base model that has had no surgery" in message
    (line,) = [line for line in message.splitlines() if "tools/surgery.py" in line]
    monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "surgery.py"), run_name="__main__")
    assert stop.value.code == 0
    assert "AP50" in run(config)


def test_missing_weights(train_net, write_config, tmp_path):
    message = train_net(write_config(), "MODEL.WEIGHTS", str(tmp_path / "R-50.pkl"))
    assert str(tmp_path / "R-50.pkl") in message and "MODEL.WEIGHTS" in message


def test_missing_weights_of_a_stage_without_surgery(train_net, write_config, tmp_path):
    """Surgery makes one file alone: a name that was mistyped, or a plain detector to start from, has another remedy."""
    for fewshot in (
        {**ONE_SHOT, "SETTING": "fsod", "RESET_PREDICTOR": True},
        ONE_SHOT,
        {**ONE_SHOT, "SURGERY": "none"},
    ):
        message = train_net(write_config(FEWSHOT=fewshot), "MODEL.WEIGHTS", str(tmp_path / "modle.pkl"))
        assert "modle.pkl: no such weights file; correct MODEL.WEIGHTS" in message
        assert "surgery" not in message and "base stage" not in message
    own = write_config(FEWSHOT={**ONE_SHOT, "BASE_RUN": str(tmp_path / "base")})
    assert "tools/surgery.py randinit" in train_net(own)


def test_weights_that_cannot_be_downloaded(train_net, write_config, monkeypatch):
    def offline(path):
        raise URLError("no network")

    monkeypatch.setattr(PathManager, "get_local_path", offline)
    message = train_net(write_config(), "MODEL.WEIGHTS", "detectron2://COCO-Detection/model.pkl")
    assert "detectron2://COCO-Detection/model.pkl cannot be downloaded" in message and "no network" in message
    assert "set MODEL.WEIGHTS to the file" in message


def test_downloaded_weights_of_other_classes(train_net, write_config, monkeypatch, tmp_path):
    weights = tmp_path / "weights" / "zoo.pth"
    write_checkpoint(weights, write_config("zoo.yaml"), "MODEL.ROI_HEADS.NUM_CLASSES", "80")
    monkeypatch.setattr(PathManager, "get_local_path", lambda path: str(weights))
    message = train_net(write_config(), "MODEL.WEIGHTS", "detectron2://COCO-Detection/model.pkl")
    assert "predicts 80 classes" in message and "FEWSHOT.RESET_PREDICTOR True" in message


def test_weights_of_another_network(train_net, write_config, tmp_path):
    weights = tmp_path / "weights" / "other.pth"
    weights.parent.mkdir()
    torch.save({"model": {"encoder.weight": torch.zeros(3)}}, weights)
    message = train_net(write_config(), "MODEL.WEIGHTS", str(weights))
    assert str(weights) in message and "none of its tensors has a name of this model" in message


def test_weights_that_are_no_checkpoint(train_net, write_config, tmp_path):
    weights = tmp_path / "weights" / "broken.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"not a checkpoint")
    assert str(weights) in train_net(write_config(), "MODEL.WEIGHTS", str(weights))


# Boxes


def no_area(annotation):
    annotation["bbox"][2] = 0


def outside(annotation):
    annotation["bbox"][0] = 300


BAD = pytest.mark.parametrize(
    ("spoil", "said", "key"),
    [(no_area, "has no area", "zero_area_boxes"), (outside, "lies outside the image", "outside_boxes")],
    ids=["no area", "outside"],
)


@BAD
def test_bad_box_in_own_data_is_fatal(train_net, write_config, copy, spoil, said, key):
    for part in ("train", "test"):
        path = copy / f"{part}.json"
        good = path.read_text()
        edit(path, lambda data: spoil(data["annotations"][5]))
        message = train_net(write_config(FEWSHOT={"ROOT": str(copy)}))
        assert f"{path}: image 2, annotation 6" in message and said in message and "Correct or remove" in message
        path.write_text(good)


@BAD
@pytest.mark.parametrize("layout", ["custom", "coco"])
def test_bad_box_in_a_shot_is_fatal(train_net, write_config, copy, coco_squares, layout, spoil, said, key):
    if layout == "custom":
        path, fewshot = shot_list(copy), {"ROOT": str(copy)}
    else:
        path = coco_squares / "cocosplit" / "full_box_1shot_person_trainval.json"
        fewshot = {**COCO, "ROOT": str(coco_squares)}
    edit(path, lambda data: spoil(data["annotations"][0]))
    message = train_net(write_config(FEWSHOT={**fewshot, **ONE_SHOT, "SETTING": "fsod"}))
    assert str(path) in message and said in message and f"prepare_{layout}.py" in message or layout == "custom"


# Keys of the tiny config that the official layout does not take.
COCO = {
    "LAYOUT": "coco",
    "NOVEL_CLASSES": [],
    **dict.fromkeys(("TRAIN_JSON", "TRAIN_IMAGES", "TEST_JSON", "TEST_IMAGES"), ""),
}


@pytest.fixture
def coco_squares(squares, tmp_path):
    """The tiny set as a COCO tree: truck, traffic light and fire hydrant are base classes, person is novel."""
    root, ids = tmp_path / "coco_squares", {1: 8, 2: 10, 3: 11, 4: 1}
    parts = {"train": ("trainvalno5k.json", "trainval2014"), "test": ("5k.json", "val2014")}
    for part, (name, folder) in parts.items():
        data = json.loads((squares / f"{part}.json").read_text())
        (root / "coco" / folder).mkdir(parents=True)
        for image in data["images"]:
            new = f"COCO_val2014_{image['id']:012d}.png"
            shutil.copy(squares / part / image["file_name"], root / "coco" / folder / new)
            image["file_name"] = new
        for annotation in data["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]
        data["categories"] = [{"id": i, "name": class_name} for i, class_name in COCO_CLASSES.items()]
        path = root / "cocosplit" / "datasplit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
        if part == "train":
            for number, class_name in COCO_CLASSES.items():
                row = {**data["annotations"][0], "category_id": number}
                sample = {**data, "images": data["images"][:1], "annotations": [row]}
                file = root / "cocosplit" / f"full_box_1shot_{class_name}_trainval.json"
                file.write_text(json.dumps(sample))
    return root


def test_bad_boxes_in_an_official_base_set_are_counted_listed_and_dropped(write_config, coco_squares, tmp_path):
    path = coco_squares / "cocosplit" / "datasplit" / "trainvalno5k.json"
    edit(path, lambda data: (no_area(data["annotations"][4]), outside(data["annotations"][9])))
    short = {"MAX_ITER": 2, "STEPS": []}
    run(write_config(FEWSHOT={**COCO, "ROOT": str(coco_squares)}, SOLVER=short))
    metadata = MetadataCatalog.get("coco_train_base")
    assert metadata.load_report == {"zero_area_boxes": 1, "outside_boxes": 1}
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "coco_train_base: outside_boxes 1, zero_area_boxes 1" in log
    assert log.count("No GPU found: running on the CPU") == 1
    for number, image in ((5, 2), (10, 3)):
        assert f"image {image}, annotation {number}" in log
    result = read_result(tmp_path / "run" / "result.json")
    assert result.train_images == 10 and result.iterations == 2


# The command itself


def test_command_prints_one_line_and_exits_with_1(write_config, tmp_path):
    config = write_config(FEWSHOT={**ONE_SHOT, "SHOT": 5})
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TOOL), "--config-file", config]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "full_box_5shot_red" in errors[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()  # an output folder that is there keeps its config and log


def test_novel_stage_from_nothing(train_net, write_config, tmp_path):
    message = train_net(write_config(FEWSHOT={"STAGE": "novel", "SHOT": 1}), "MODEL.WEIGHTS", "")
    assert "novel stage needs MODEL.WEIGHTS" in message and not list(tmp_path.rglob("model_*.pth"))
