"""Pictures and folders in, drawn pictures and one JSON file out; the detector marks a corner of every picture."""

import json

import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from fsdet.data.mapper import ImageError
from fsdet.engine.predict_files import find_images, predict_files
from fsdet.engine.predictor import Predictor
from fsdet.engine.setup import default_config


class Corners(nn.Module):
    """Finds "cup" in the left upper half of a picture, and "pen" in all of it with a score below every threshold."""

    def forward(self, inputs):
        outputs = []
        for entry in inputs:
            height, width = entry["height"], entry["width"]
            instances = Instances((height, width))
            instances.pred_boxes = Boxes(torch.tensor([[0, 0, width, height], [0, 0, width / 2, height / 2]]))
            instances.scores, instances.pred_classes = torch.tensor([0.1, 0.75]), torch.tensor([1, 0])
            outputs.append({"instances": instances})
        return outputs


@pytest.fixture
def predictor():
    return Predictor(Corners(), default_config(), ["cup", "pen"])


@pytest.fixture
def pictures(squares):
    return sorted((squares / "test").glob("*.png"))


def test_folders_are_searched_and_results_keep_their_structure(predictor, pictures, tmp_path):
    source = tmp_path / "photos"
    (source / "deep").mkdir(parents=True)
    (source / "notes.txt").write_text("no picture")
    (source / "._a.png").write_bytes(b"what macOS leaves")
    for name in ("a.png", "deep/b.JPG", "deep/b.png"):
        Image.open(pictures[0]).convert("RGB").save(source / name)
    (source / "deep" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    content = predict_files(predictor, [source, pictures[1]], tmp_path / "out", batch_size=2)
    assert content == json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [row["file_name"].rsplit("/", 1)[1] for row in content["images"]] == [
        "a.png",
        "b.JPG",
        "b.png",
        pictures[1].name,
    ]
    (failed,) = content["failed"]
    assert failed["file_name"].endswith("deep/torn.jpg") and "cannot be read" in failed["error"]
    written = sorted(
        str(p.relative_to(tmp_path / "out" / "pictures")) for p in (tmp_path / "out" / "pictures").rglob("*.*")
    )
    assert written == sorted(["a.png.jpg", "deep/b.JPG", "deep/b.png.jpg", f"{pictures[1].name}.jpg"])
    assert content["categories"] == [{"id": 0, "name": "cup"}, {"id": 1, "name": "pen"}]
    for image, row in zip(content["images"], content["detections"], strict=True):
        assert row["image_id"] == image["id"] and (row["category_id"], row["category_name"]) == (0, "cup")
        assert row["bbox"] == [0, 0, image["width"] / 2, image["height"] / 2] and row["score"] == 0.75


def test_faults_of_the_input_are_named(predictor, pictures, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such image or folder"):
        predict_files(predictor, [pictures[0], tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="No image in .*empty; looked for .jpg"):
        predict_files(predictor, [tmp_path / "empty"], tmp_path / "out")
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"None of the 1 image\(s\) can be read; the first: .*broken.png"):
        predict_files(predictor, [tmp_path / "broken.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_equal_names_from_two_folders_stay_apart(pictures, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(pictures[0].read_bytes())
    names = [str(name) for _, name in find_images([tmp_path / "x", tmp_path / "y", pictures[0]])]
    assert names == ["1.png", "1_2.png", "1_3.png"]
