"""Classes learnt from examples alone, with a detector that finds patches of the examples' mean colour."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.data.mapper import ImageError
from fsdet.data.support import Support, SupportSet
from fsdet.engine import open_classes
from fsdet.engine import predictor as predictor_module
from fsdet.engine.predictor import Predictor
from fsdet.engine.run import prepare
from fsdet.engine.setup import load_config
from fsdet.engine.trainer import build_detector
from fsdet.modeling.base import RecallableMemory
from fsdet.modeling.class_memory import ClassEntry, ClassMemory, digest_supports, module_digest

OPEN = {"META_ARCHITECTURE": "ColourMatcher", "DEVICE": "cpu"}
RED, GREEN, BLUE, WHITE = (0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 255, 255)  # BGR


@META_ARCH_REGISTRY.register()
class ColourMatcher(RecallableMemory, GeneralizedRCNN):
    """One box around all pixels within `reach` of a class's colour; the score is the share of them in the box."""

    memory_kind = "colours"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.reach = nn.Parameter(torch.tensor(60.0))
        self.roi_heads.box_predictor = nn.Identity()  # no weights of any class

    @property
    def memory_encoder(self):
        return module_digest(self)

    def encode_support(self, support_set):
        assert not self.training and not torch.is_grad_enabled()
        memory = ClassMemory(kind=self.memory_kind, encoder=self.memory_encoder)
        for name, shots in support_set:
            colours = []
            for crop in support_set.crops(name):
                x0, y0, x1, y1 = crop.box.astype(int)
                colours.append(torch.tensor(crop.image[y0:y1, x0:x1].reshape(-1, 3).mean(0)))
            memory.add(name, ClassEntry({"colour": torch.stack(colours).mean(0)}, digest_supports(shots)))
        return memory

    def stale_classes(self, memory, support_set):
        return []

    def inference(self, batched_inputs, *args, **kwargs):
        colours = self.class_memory.stack("colour")  # (K, 3)
        outputs = []
        for entry in batched_inputs:
            image = torch.as_tensor(entry["original_image"].astype(float))
            boxes, scores, classes = [], [], []
            for class_id, colour in enumerate(colours):
                ys, xs = torch.nonzero((image - colour).abs().amax(2) < self.reach, as_tuple=True)
                if len(ys):
                    boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                    area = (boxes[-1][2] - boxes[-1][0]) * (boxes[-1][3] - boxes[-1][1])
                    scores.append(len(ys) / area)
                    classes.append(class_id)
            instances = Instances((entry["height"], entry["width"]))
            instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
            instances.scores, instances.pred_classes = torch.tensor(scores), torch.tensor(classes)
            outputs.append({"instances": instances})
        return outputs


@pytest.fixture
def make_run(write_config, tmp_path):
    """Make the folder of a finished run of a base model, or of another one."""

    def make(name="run", **sections):
        model = {**OPEN, **sections.pop("MODEL", {})}
        fewshot = {"SURGERY": "none", **sections.pop("FEWSHOT", {})}
        config = write_config(OUTPUT_DIR=str(tmp_path / name), MODEL=model, FEWSHOT=fewshot, **sections)
        cfg = prepare(load_config(config), quiet=True)
        torch.manual_seed(0)
        model = build_detector(cfg)
        for key, value in model.state_dict().items():
            if key.endswith(("conv3.norm.weight", "stem.conv1.norm.weight")):
                value.fill_(0.2 if "conv3" in key else 0.01)  # random weights would let activations grow
        FewShotCheckpointer(model, cfg.OUTPUT_DIR).save("model_final")
        return tmp_path / name

    return make


@pytest.fixture
def run_folder(make_run):
    return make_run()


@pytest.fixture
def photo(tmp_path):
    """A green 20 x 10 and a white 8 x 30 patch (width x height) on black, 100 x 60."""
    picture = np.zeros((60, 100, 3), np.uint8)
    picture[5:15, 10:30], picture[20:50, 70:78] = GREEN, WHITE
    cv2.imwrite(str(tmp_path / "photo.png"), picture)
    return tmp_path / "photo.png"


@pytest.fixture
def supports(tmp_path):
    """Class "leaf" is a green picture, class "snow" has a white box in a red picture."""
    for name in ("leaf", "snow"):
        (tmp_path / "supports" / name).mkdir(parents=True)
    Image.new("RGB", (30, 20), (0, 255, 0)).save(tmp_path / "supports/leaf/1.png")
    picture = np.full((40, 40, 3), RED, np.uint8)
    picture[10:30, 5:25] = WHITE
    cv2.imwrite(str(tmp_path / "supports/snow/1.png"), picture)
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [5, 10, 20, 20]}],
        "categories": [{"id": 7, "name": "snow"}],
    }
    (tmp_path / "supports/snow/boxes.json").write_text(json.dumps(content))
    return tmp_path / "supports"


def found(predictor, picture):
    return {d.class_name: d.box for d in predictor(picture)}


LEAF, SNOW = (10, 5, 30, 15), (70, 20, 78, 50)


def test_a_support_folder_names_the_classes(run_folder, supports, photo):
    """Two new classes for a base model of three others."""
    predictor = Predictor.from_run(run_folder, support=supports)
    assert predictor.class_names == ("leaf", "snow")
    detections = predictor(photo)
    assert {d.class_name: (d.class_id, d.box) for d in detections} == {"leaf": (0, LEAF), "snow": (1, SNOW)}
    assert predictor.draw(photo, detections).size[0] >= 100
    shots = [Support(str(photo), "p", 1, 0, tuple(map(float, SNOW)))]
    assert found(Predictor.from_run(run_folder, support=SupportSet(["it"], shots)), photo) == {"it": SNOW}


def test_classes_are_learnt_and_forgotten_without_loading_again(run_folder, supports, photo):
    predictor = Predictor.from_run(run_folder, support=supports)
    model, pixels, memory = predictor.model, cv2.imread(str(photo)), predictor.model.class_memory
    former = predictor(photo)
    predictor.learn({"sky": [np.full((4, 4, 3), BLUE, np.uint8)], "leaf": [(Image.open(photo), SNOW), (pixels, SNOW)]})
    assert predictor.class_names == ("leaf", "snow", "sky"), "an exchanged class keeps its place"
    assert found(predictor, photo) == {"leaf": SNOW, "snow": SNOW}
    assert memory.names == ("leaf", "snow") and memory["leaf"].tensors["colour"].tolist() == list(GREEN)
    predictor.forget("leaf")
    assert predictor.class_names == ("snow", "sky")
    assert [(d.class_name, d.class_id) for d in predictor(photo)] == [("snow", 0)]
    predictor.learn({"leaf": [(photo, LEAF)]})
    assert found(predictor, photo) == {"leaf": LEAF, "snow": SNOW} and predictor.class_names[2] == "leaf"
    assert predictor.model is model
    predictor.forget("leaf")
    predictor.draw(photo, former)


def test_pictures_in_memory_are_learnt_as_they_are(run_folder, photo, monkeypatch):
    """An array is BGR, a PIL picture RGB, and what the detector reads has the channel order of its configuration."""
    seen = []
    monkeypatch.setattr(
        ColourMatcher,
        "encode_support",
        lambda self, s: seen.extend(c.image for name, _ in s for c in s.crops(name)) or ClassMemory(
            kind="colours", encoder="e", entries={n: ClassEntry({"colour": torch.zeros(3)}) for n, _ in s}
        ),
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Predictor.from_run(run_folder, support={"it": [pixels, Image.fromarray(pixels[:, :, ::-1].copy())]})
    assert len(seen) == 2 and all((image == pixels).all() for image in seen)
    seen.clear()
    Predictor.from_run(run_folder, opts=["INPUT.FORMAT", "RGB"], support={"it": [pixels]})
    assert (seen[0] == pixels[:, :, ::-1]).all()


def test_a_saved_memory_needs_no_examples(run_folder, supports, photo, tmp_path, monkeypatch):
    first = Predictor.from_run(run_folder, support=supports)
    first.save_memory(tmp_path / "kept")
    expected = first(photo)
    shutil.rmtree(supports)
    with monkeypatch.context() as patch:
        patch.setattr(ColourMatcher, "encode_support", None)  # never called
        again = Predictor.from_run(run_folder, memory=tmp_path / "kept.json")
        assert again(photo) == expected and again.class_names == ("leaf", "snow")
    both = Predictor.from_run(run_folder, memory=tmp_path / "kept", support={"snow": [(photo, LEAF)], "a": [photo]})
    assert both.class_names == ("leaf", "snow", "a") and found(both, photo)["snow"] == LEAF


def test_a_memory_of_other_weights_is_refused(make_run, supports, tmp_path):
    run = make_run()
    Predictor.from_run(run, support=supports).save_memory(tmp_path / "kept")
    state = torch.load(run / "model_final.pth", weights_only=True)
    state["model"]["reach"] += 1
    torch.save(state, run / "model_final.pth")
    with pytest.raises(
        ValueError, match=r"kept: this memory \(colours, .*its weights or settings differ\. Name the run"
    ):
        Predictor.from_run(run, memory=tmp_path / "kept")
    model = Predictor.from_run(run, support=supports).model
    words = ClassMemory(kind="words", encoder=model.memory_encoder)
    with pytest.raises(ValueError, match=r"this memory \(words, .*than this one \(colours"):
        open_classes.check_memory(model, words, "words")
    words.kind = "colours"
    with pytest.raises(ValueError, match="words: this memory has no class"):
        open_classes.check_memory(model, words, "words")
    with pytest.raises(FileNotFoundError, match=r"absent\.json not found"):
        Predictor.from_run(run, memory=tmp_path / "absent")


def test_a_run_without_examples_detects_its_own_classes(make_run, squares, tmp_path):
    """From its K shots or the memory beside it, in whose order the class ids are; further classes are novel too."""
    run = make_run(FEWSHOT={"STAGE": "novel", "SHOT": 1}, MODEL={"WEIGHTS": "unused.pth"})
    predictor = Predictor.from_run(run, threshold=0)
    assert predictor.class_names == ("red", "green", "blue", "white") and predictor.novel_names == ("white",)
    boxes = found(predictor, squares / "test" / "1.png")
    test = json.loads((squares / "test.json").read_text())
    for annotation in (a for a in test["annotations"] if a["image_id"] == 1):
        x, y, width, height = annotation["bbox"]
        assert boxes[predictor.class_names[annotation["category_id"] - 1]] == (x, y, x + width, y + height)
    predictor.learn({"black": [np.zeros((4, 4, 3), np.uint8)], "red": [np.full((4, 4, 3), RED, np.uint8)]})
    assert predictor.class_names[4] == "black" and predictor.novel_names == ("white", "black")
    predictor.forget("white")
    assert predictor.novel_names == ("black",)
    predictor.save_memory(run / "class_memory_colours")
    again = Predictor.from_run(run, threshold=0)
    assert again.class_names == ("red", "green", "blue", "black")
    assert found(again, squares / "test" / "1.png").keys() == {"red", "green", "blue", "black"}


def test_an_evaluation_without_fine_tuning_has_the_weights_of_its_base_run(make_run, supports, photo, tmp_path):
    base = make_run("base")
    novel = {"FEWSHOT": {"STAGE": "novel", "SHOT": 1, "BASE_RUN": str(base)}, "SOLVER": {"MAX_ITER": 0, "STEPS": []}}
    run = make_run("novel", **novel)
    (run / "model_final.pth").unlink()
    assert found(Predictor.from_run(run, support=supports), photo) == {"leaf": LEAF, "snow": SNOW}
    (base / "model_final.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"base/model_final\.pth not found\. .*novel/config\.yaml evaluates"):
        Predictor.from_run(run, support=supports)


def test_a_detector_with_classes_in_its_weights_is_refused(make_run, supports, tmp_path):
    closed = make_run(MODEL={"META_ARCHITECTURE": "GeneralizedRCNN"}, FEWSHOT={"SURGERY": "randinit"})
    message = (
        r'classes of this detector \("tiny", MODEL\.META_ARCHITECTURE GeneralizedRCNN.*fine-tune.*: .*ColourMatcher'
    )
    with pytest.raises(ValueError, match=message):
        Predictor.from_run(closed, support=supports)
    with pytest.raises(ValueError, match=message):
        Predictor.from_run(closed, memory=tmp_path / "absent")
    predictor = Predictor.from_run(closed)
    for call in (lambda: predictor.learn({}), lambda: predictor.forget("red"), lambda: predictor.save_memory("m")):
        with pytest.raises(ValueError, match=message):
            call()


def test_examples_that_cannot_be_learnt_change_nothing(run_folder, supports, photo, tmp_path):
    predictor = Predictor.from_run(run_folder, support=supports)
    memory = predictor.model.class_memory
    cases = [
        ({}, ValueError, "No class to learn"),
        ({"new": []}, ValueError, r'"new" needs a list of examples.*got \[\]'),
        ({"new": photo}, ValueError, r'"new" needs a list of examples, .*photo\.png'),
        ({"new": np.zeros((4, 4, 3), np.uint8)}, ValueError, r"array of shape \(4, 4, 3\)"),
        ({"new": [(photo, (90, 10, 120, 20))]}, ValueError, r"box \(90.*photo\.png'?\)? of 100 x 60 pixels"),
        ({"new": [(photo, (5, 5, 5, 9))]}, ValueError, "has no area inside"),
        ({"new": [(photo, (5, 5, 9))]}, ValueError, r"expected \(x0, y0, x1, y1\)"),
        ({"new": [tmp_path / "absent.png"]}, ImageError, r"absent\.png: this image cannot be read"),
        ({"new": [np.zeros((4, 4), np.uint8)]}, ImageError, r"expected \(H, W, 3\) uint8"),
        (tmp_path / "nowhere", FileNotFoundError, "nowhere: no such folder of supports"),
    ]
    for examples, error, message in cases:
        with pytest.raises(error, match=message):
            predictor.learn(examples)
    with pytest.raises(ValueError, match="No class 'new'"):
        predictor.forget("new")
    predictor.forget("leaf")
    with pytest.raises(ValueError, match="'snow' is the only class"):
        predictor.forget("snow")
    assert predictor.class_names == ("snow",) and memory.names == ("leaf", "snow")


def test_calibration_is_of_the_run_alone(make_run, supports, photo, monkeypatch):
    """With examples it is left out, aloud; where it is on, classes cannot be exchanged."""
    run = make_run(FEWSHOT={"STAGE": "novel", "SHOT": 1}, MODEL={"WEIGHTS": "unused.pth"})
    warnings = []
    monkeypatch.setattr(predictor_module.logger, "warning", warnings.append)
    predictor = Predictor.from_run(run, support=supports, opts=["TEST.CALIBRATION.ENABLED", "True"])
    assert found(predictor, photo) == {"leaf": LEAF, "snow": SNOW}
    assert [text.split(":")[0] for text in warnings] == ["TEST.CALIBRATION is left out"]
    monkeypatch.setattr(open_classes, "CalibratedDetector", ColourMatcher)
    with pytest.raises(ValueError, match=r"load it with TEST\.CALIBRATION\.ENABLED False"):
        predictor.learn(supports)


@pytest.fixture
def fewx_run(make_run):
    """A narrow FewX base model with random weights, which finds a little of everything everywhere."""
    model = {
        "META_ARCHITECTURE": "FewXRCNN",
        "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
        "RESNETS": {"OUT_FEATURES": ["res4"], "NORM": "FrozenBN"},
        "ANCHOR_GENERATOR": {"SIZES": [[16, 32]], "ASPECT_RATIOS": [[1.0]]},
        "PROPOSAL_GENERATOR": {"NAME": "AttentionRPN"},
        "RPN": {"IN_FEATURES": ["res4"], "POST_NMS_TOPK_TEST": 10},
        "ROI_HEADS": {"NAME": "RelationRes5ROIHeads", "IN_FEATURES": ["res4"]},
        "ROI_BOX_HEAD": {"NAME": "", "NUM_FC": 0, "POOLER_RESOLUTION": 14},
    }
    return make_run(MODEL=model, INPUT={"FS": {"CROP_SIZE": 64}})


def test_fewx_learns_classes_from_a_folder(fewx_run, supports, photo, tmp_path):
    """As the detector itself detects with these supports; each class as if it were alone, and again from a memory."""
    predictor = Predictor.from_run(fewx_run, support=supports, threshold=0)
    model, pixels = predictor.model, cv2.imread(str(photo))
    both = predictor(photo)
    assert {d.class_name for d in both} == {"leaf", "snow"}
    assert 0.1 < min(d.score for d in both) < max(d.score for d in both) < 0.9
    model.keep_class_memory(None)
    leaf = Support(str(supports / "leaf/1.png"), "l", None, 0, (0, 0, 30, 20))
    snow = Support(str(supports / "snow/1.png"), "s", None, 1, (5, 10, 25, 30))
    with torch.no_grad():
        model.keep_class_memory(model.encode_support(SupportSet(["leaf", "snow"], [leaf, snow])))
        image = predictor.resize.get_transform(pixels).apply_image(pixels)
        tensor = torch.as_tensor(image.transpose(2, 0, 1).copy())
        (output,) = model([{"image": tensor, "height": 60, "width": 100}])
    for class_id in (0, 1):
        direct = output["instances"][output["instances"].pred_classes == class_id].scores.tolist()
        assert [d.score for d in both if d.class_id == class_id] == pytest.approx(sorted(direct)[::-1], abs=1e-6)

    predictor.save_memory(tmp_path / "kept")
    assert predictor(photo) == both == Predictor.from_run(fewx_run, memory=tmp_path / "kept", threshold=0)(photo)
    predictor.forget("leaf")
    alone = predictor(photo)
    for detection, other in zip(alone, (d for d in both if d.class_name == "snow"), strict=True):
        assert detection.class_id == 0 and detection.box == pytest.approx(other.box, abs=1e-2)
        assert detection.score == pytest.approx(other.score, abs=1e-5)
    predictor.learn({f"class {number}": [(pixels, LEAF)] for number in range(200)})
    assert len(predictor.class_names) == 201
    assert len(predictor(photo)) == predictor.cfg.TEST.DETECTIONS_PER_IMAGE


def test_fewx_refuses_a_memory_of_other_weights(fewx_run, supports, tmp_path):
    Predictor.from_run(fewx_run, support=supports).save_memory(tmp_path / "kept")
    state = torch.load(fewx_run / "model_final.pth", weights_only=True)
    state["model"]["roi_heads.res5.0.conv1.weight"] += 1
    torch.save(state, fewx_run / "model_final.pth")
    with pytest.raises(ValueError, match=r"kept: this memory \(fewx, .*its weights or settings differ\. Name the run"):
        Predictor.from_run(fewx_run, memory=tmp_path / "kept")
