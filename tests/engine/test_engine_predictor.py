"""The Python API against Detectron2's own predictor, and what it does with bad pictures and bad runs."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from PIL import Image

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.data.mapper import ImageError
from fsdet.engine.predictor import Detection, Predictor
from fsdet.engine.run import prepare
from fsdet.engine.setup import load_config
from fsdet.engine.trainer import build_detector

NOVEL = {"STAGE": "novel", "SHOT": 1}


@pytest.fixture
def run_folder(write_config, tmp_path):
    """Folder such as a finished training leaves (on a GPU), with random weights that find something everywhere."""
    config = write_config(FEWSHOT=NOVEL, MODEL={"WEIGHTS": "unused.pth", "DEVICE": "cuda"})
    cfg = prepare(load_config(config))
    torch.manual_seed(0)
    model = build_detector(cfg)
    FewShotCheckpointer(model, cfg.OUTPUT_DIR, metadata={"classes": ["red", "green", "blue", "white"]}).save(
        "model_final"
    )
    return tmp_path / "run"


@pytest.fixture
def predictor(run_folder):
    return Predictor.from_run(run_folder, threshold=0.1)


@pytest.fixture
def pictures(squares):
    return sorted((squares / "test").glob("*.png"))


def test_detections_equal_detectron2s(predictor, run_folder, pictures):
    cfg = load_config(str(run_folder / "config.yaml")).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", str(run_folder / "model_final.pth")
    stock = DefaultPredictor(cfg)
    found = predictor(pictures)
    assert len(found) == 4 and sum(len(f) for f in found) > 20
    for path, detections in zip(pictures, found, strict=True):
        instances = stock(cv2.imread(str(path)))["instances"]
        kept = instances[instances.scores >= 0.1]
        assert [d.score for d in detections] == pytest.approx(kept.scores.tolist(), abs=1e-5)
        assert [d.class_id for d in detections] == kept.pred_classes.tolist()
        np.testing.assert_allclose([d.box for d in detections], kept.pred_boxes.tensor, atol=1e-2)
        assert [d.class_name for d in detections] == [predictor.class_names[d.class_id] for d in detections]


@pytest.mark.gpu
def test_the_gpu_finds_the_same(run_folder, pictures):
    on_gpu = Predictor.from_run(run_folder, threshold=0.1, device="cuda")
    assert next(on_gpu.model.parameters()).is_cuda
    on_cpu = Predictor.from_run(run_folder, threshold=0.1, device="cpu")
    for a, b in zip(on_gpu(pictures), on_cpu(pictures), strict=True):
        assert a[0].score == pytest.approx(b[0].score, abs=0.02)


def test_kinds_of_input_are_equal(predictor, pictures):
    path = pictures[0]
    expected = predictor(str(path))
    assert expected and isinstance(expected[0], Detection)
    with Image.open(path) as image:
        as_image = predictor(image)
    assert predictor(path) == as_image == predictor(cv2.imread(str(path))) == expected


def test_a_batch_changes_nothing(predictor, pictures):
    """Wide and tall pictures mixed: each is found as if it were alone."""
    together = predictor(pictures * 2, batch_size=3)
    alone = [predictor(path) for path in pictures] * 2
    assert len(together) == 8
    for batch, single in zip(together, alone, strict=True):
        assert [d.class_id for d in batch] == [d.class_id for d in single]
        np.testing.assert_allclose([d.box for d in batch], [d.box for d in single], atol=1e-2)
    assert predictor([]) == []


def test_the_threshold_cuts_and_may_be_changed(run_folder, pictures):
    low = Predictor.from_run(run_folder, threshold=0.0)  # below the 0.05 of the config
    everything = low(pictures[0])
    low.threshold = 0.2
    assert low(pictures[0]) == [d for d in everything if d.score >= 0.2]
    assert len(everything) > len(low(pictures[0])) > 0
    assert min(d.score for d in everything) < 0.05
    with pytest.raises(ValueError, match="between 0 and 1, got 50"):
        Predictor.from_run(run_folder, threshold=50)


def test_names_come_from_the_run(predictor, run_folder):
    assert predictor.class_names == ("red", "green", "blue", "white") and predictor.novel_names == ("white",)
    by_config = Predictor.from_config(load_config(str(run_folder / "config.yaml")), run_folder / "model_final.pth")
    assert by_config.class_names == predictor.class_names


def test_exif_rotation_is_applied(predictor, pictures, tmp_path):
    upright = Image.open(pictures[0]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to show"
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert predictor(tmp_path / "turned.png") == predictor(pictures[0])
    with Image.open(tmp_path / "turned.png") as image:
        assert predictor(image) == predictor(pictures[0])


def test_channel_order_follows_the_config(write_config, pictures, tmp_path):
    cfg = load_config(write_config(INPUT={"FORMAT": "RGB"}, MODEL={"DEVICE": "cpu"}))
    model = build_detector(cfg)
    predictor = Predictor(model, cfg, ["red", "green", "blue"])
    blue_first = cv2.imread(str(pictures[0]))
    assert (predictor.read(pictures[0]) == blue_first[:, :, ::-1]).all()
    assert (predictor.read(blue_first) == blue_first[:, :, ::-1]).all()
    drawn = predictor.draw(pictures[0], [], min_side=0)
    assert (np.asarray(drawn) == blue_first[:, :, ::-1]).all()


def test_drawing_shows_novel_classes_with_thicker_lines(predictor):
    image = np.zeros((450, 450, 3), np.uint8)
    thickness = {}
    for class_id, name in ((0, "red"), (3, "white")):
        drawn = np.asarray(predictor.draw(image, [Detection(name, 0.9, (100, 100, 300, 300), class_id)]))
        row = (drawn[200] == predictor._colours[name]).all(axis=1)
        thickness[name] = row.sum()
    assert thickness["white"] > thickness["red"] > 0
    assert (image == 0).all()


@pytest.mark.parametrize("content", [b"", b"no image at all", "torn"])
def test_a_broken_picture_is_named(predictor, pictures, tmp_path, content):
    path = tmp_path / "street.jpg"
    Image.open(pictures[0]).convert("RGB").resize((300, 300)).save(path)
    path.write_bytes(path.read_bytes()[:3000] if content == "torn" else content)
    with pytest.raises(ImageError, match=r"street.jpg: this image cannot be read .*Replace or remove the file"):
        predictor([pictures[0], path])


def test_arrays_of_another_kind_are_refused(predictor):
    for array in (np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3), np.float32), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(ImageError, match=r"expected \(H, W, 3\) uint8 in BGR order"):
            predictor(array)


def test_missing_files_of_a_run_are_named(run_folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere/config.yaml not found. Name the folder of a finished training"
    ):
        Predictor.from_run(tmp_path / "nowhere")
    (run_folder / "model_final.pth").unlink()
    with pytest.raises(FileNotFoundError, match="model_final.pth not found"):
        Predictor.from_run(run_folder)
    with pytest.raises(FileNotFoundError, match="other.pth not found"):
        Predictor.from_run(run_folder, weights=run_folder / "other.pth")


def test_weights_and_classes_must_fit(run_folder):
    cfg, weights = load_config(str(run_folder / "config.yaml")), run_folder / "model_final.pth"
    with pytest.raises(ValueError, match="2 class names for a detector of 4 classes"):
        Predictor.from_config(cfg, weights, ["red", "green"])
    with pytest.raises(ValueError, match="another order"):
        Predictor.from_config(cfg, weights, ["green", "red", "blue", "white"])
    state = torch.load(weights, weights_only=True)
    del state["model"]["backbone.fpn_output2.weight"]
    torch.save(state, run_folder / "short.pth")
    with pytest.raises(ValueError, match="missing: backbone.fpn_output2.weight"):
        Predictor.from_run(run_folder, weights=run_folder / "short.pth")
    (run_folder / "classes.json").write_text('{"detector": ["red"]}')
    with pytest.raises(ValueError, match='classes.json must hold the lists "detector" and "novel"'):
        Predictor.from_run(run_folder)
    with pytest.raises(ValueError, match='"gpu" is no device'):
        Predictor.from_config(cfg, weights, ["red", "green", "blue", "white"], device="gpu")
