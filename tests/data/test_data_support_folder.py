"""Folders of examples: classes, boxes or whole pictures, and one clear error for each fault."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from fsdet.data.mapper import ImageError
from fsdet.data.support_folder import read_support_folder

SIZES = {"mug/1.png": (60, 40), "mug/2.jpg": (50, 50), "plate/1.png": (80, 30)}  # (width, height)


@pytest.fixture
def folder(tmp_path):
    """Two classes, three pictures, and what must not count: hidden files and folders, and notes."""
    root = tmp_path / "supports"
    for name, size in SIZES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 30, 30)).save(root / name)
    (root / ".cache").mkdir()
    (root / "mug" / "._1.png").write_bytes(b"what macOS leaves")
    (root / "mug" / "notes.txt").write_text("no picture")
    return root


def coco(*boxes, names=("mug", "plate"), sizes=None, drop=()):
    """COCO content; a box is (file name, class name, [x, y, width, height], further keys)."""
    sizes = sizes or {}
    files = list(dict.fromkeys([box[0] for box in boxes]))
    images = [
        {"id": i, "file_name": f, "width": sizes.get(f, SIZES.get(f, (60, 40)))[0],
         "height": sizes.get(f, SIZES.get(f, (60, 40)))[1]}
        for i, f in enumerate(files)
    ]  # fmt: skip
    annotations = [
        {"id": i, "image_id": files.index(file), "category_id": [*names].index(name), "bbox": box, **dict(*more)}
        for i, (file, name, box, *more) in enumerate(boxes)
    ]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names)]
    return {key: value for key, value in content.items() if key not in drop}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def boxes_of(support_set):
    return {
        name: [(support.file_name.rsplit("supports/", 1)[1], support.box) for support in shots]
        for name, shots in support_set
    }


MUG, PLATE = ("mug/1.png", "mug", [5, 6, 20, 10]), ("plate/1.png", "plate", [0, 0, 80, 30])


def test_without_json_a_picture_is_an_example_as_a_whole(folder):
    support_set = read_support_folder(folder, image_format="RGB")
    assert support_set.classes == ("mug", "plate")
    assert boxes_of(support_set) == {
        "mug": [("mug/1.png", (0, 0, 60, 40)), ("mug/2.jpg", (0, 0, 50, 50))],
        "plate": [("plate/1.png", (0, 0, 80, 30))],
    }
    crop = next(iter(support_set.crops("plate")))
    assert crop.image.shape == (30, 80, 3) and (crop.image[0, 0] == (200, 30, 30)).all(), "RGB, uncut"


def test_a_json_at_the_top_serves_all_classes(folder, caplog):
    """Boxes of another class, crowds and pictures of no class folder are no examples."""
    other, crowd = ("mug/2.jpg", "plate", [1, 1, 9, 9]), ("mug/2.jpg", "mug", [1, 1, 9, 9], {"iscrowd": 1})
    (folder / "0.png").write_bytes((folder / "mug/1.png").read_bytes())
    second = ("mug/1.png", "mug", [30, 0, 30, 40])
    write(folder / "boxes.json", coco(MUG, other, crowd, ("0.png", "mug", [1, 1, 9, 9]), PLATE, second))
    with caplog.at_level(logging.WARNING):
        found = read_support_folder(folder)
    assert boxes_of(found) == {
        "mug": [("mug/1.png", (5, 6, 25, 16)), ("mug/1.png", (30, 0, 60, 40))],
        "plate": [("plate/1.png", (0, 0, 80, 30))],
    }
    (warning,) = caplog.messages
    assert warning.startswith("1 picture(s) without a box in") and warning.endswith("supports/mug/2.jpg")


def test_a_json_in_a_class_folder_serves_that_class_alone(folder):
    """The other class takes whole pictures, or the json at the top, which does not count for the first."""
    write(folder / "mug" / "own.json", coco(("2.jpg", "mug", [1, 2, 3, 4]), sizes={"2.jpg": (50, 50)}))
    (folder / "mug" / "1.png").unlink()
    assert boxes_of(read_support_folder(folder)) == {
        "mug": [("mug/2.jpg", (1, 2, 4, 6))],
        "plate": [("plate/1.png", (0, 0, 80, 30))],
    }
    half = ("plate/1.png", "plate", [0, 0, 40, 30])
    write(folder / "boxes.json", coco(("mug/2.jpg", "mug", [9, 9, 9, 9]), half))
    assert boxes_of(read_support_folder(folder)) == {
        "mug": [("mug/2.jpg", (1, 2, 4, 6))],
        "plate": [("plate/1.png", (0, 0, 40, 30))],
    }


def test_several_json_files_of_a_folder_count_together(folder):
    """One for each class, with the same ids."""
    write(folder / "mugs.json", coco(MUG, names=("mug",)))
    write(folder / "plates.json", coco(PLATE, names=("plate",)))
    found = read_support_folder(folder)
    assert {name: len(shots) for name, shots in found} == {"mug": 1, "plate": 1}
    assert len({support.image_id for _, shots in found for support in shots}) == 2


def test_boxes_belong_to_the_picture_as_it_is_shown(folder):
    """A picture that its EXIF data turns: whole, with boxes in the turned frame, and with boxes in the stored one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(folder / "mug/1.png", exif=exif)
    assert boxes_of(read_support_folder(folder))["mug"][0] == ("mug/1.png", (0, 0, 40, 60))
    tall = ("mug/1.png", "mug", [0, 0, 40, 60])
    write(folder / "boxes.json", coco(tall, PLATE, sizes={"mug/1.png": (40, 60)}))
    assert boxes_of(read_support_folder(folder))["mug"] == [("mug/1.png", (0, 0, 40, 60))]
    write(folder / "boxes.json", coco(MUG, PLATE))
    with pytest.raises(
        ValueError, match=r"mug/1\.png: this picture is shown with 40 x 60 .*boxes\.json says 60 x 40; .*Export"
    ):
        read_support_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("boxes.json", "{", ValueError, r"boxes\.json: not a JSON file .*\nEvery \.json in a support folder is read"),
        ("boxes.json", [], ValueError, r"boxes\.json: the lists .* are missing.*\nEvery \.json"),
        ("mug/labels.json", coco(MUG, drop=["categories"]), ValueError, r"labels\.json: .*'categories'\] are missing"),
        ("boxes.json", {**coco(MUG), "images": 3}, ValueError, r'boxes\.json: "images" is no list of objects'),
        ("boxes.json", {**coco(MUG), "categories": [{"id": [1], "name": "mug"}]}, ValueError,
         r"boxes\.json: unhashable.*\nEvery"),
        ("boxes.json", coco(MUG, PLATE, names=("Mug", "mug2", "mug", "plate"))
         | {"categories": [{"id": 2, "name": "Mug"}, {"id": 3, "name": "plate"}]}, ValueError,
         r"boxes\.json: no category \['mug'\], .*there are \['Mug', 'plate'\]\. Rename"),
        ("boxes.json", {**coco(MUG, PLATE), "categories": [{"id": 0, "name": "mug"}]}, ValueError,
         r"annotation 1 of image 1: unknown class id 1"),
        ("boxes.json", coco(MUG, PLATE, ("mug/7.png", "mug", [1, 1, 2, 2])), FileNotFoundError,
         r"boxes\.json names pictures that are not there: mug/7\.png\. File names are relative to .*supports; correct"),
        ("boxes.json", coco(("mug/1.png", "mug", [50, 10, 20, 10]), PLATE), ValueError,
         r"1 unusable box\(es\):\n.*boxes\.json: image 0, annotation 0: .* lies outside the image of 60 x 40"),
        ("boxes.json", coco(("mug/1.png", "mug", [5, 5, 0, 9]), PLATE), ValueError, r"has no area.*\n.*Correct or"),
        ("boxes.json", coco(("mug/1.png", "mug", [5, 5]), PLATE), ValueError, r"has the bbox \[5, 5\]; expected four"),
        ("boxes.json", coco(("mug/1.png", "plate", [5, 5, 9, 9]), PLATE), ValueError,
         r"boxes\.json: no box of the classes \['mug'\] on a picture of the folder of that name"),
    ],
)  # fmt: skip
def test_faults_of_a_json_are_named(folder, name, content, error, message):
    write(folder / name, content)
    with pytest.raises(error, match=message):
        read_support_folder(folder)


def test_faults_of_the_folder_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder of supports.*such as DIR/mug/1\.jpg"):
        read_support_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"supports/mug: no class folder in it"):
        read_support_folder(folder / "mug")
    (folder / "spoon").mkdir()
    (folder / "spoon" / "deep").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No picture in .*supports/spoon; looked for \.jpg"):
        read_support_folder(folder)


@pytest.mark.parametrize("with_json", [False, True])
@pytest.mark.parametrize("content", [b"no picture", "torn"])
def test_a_broken_picture_is_named_before_anything_is_encoded(folder, content, with_json):
    picture = folder / "mug/1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(picture)
    picture.write_bytes(picture.read_bytes()[:2000] if content == "torn" else content)
    if with_json:
        write(folder / "boxes.json", coco(MUG, PLATE))
    with pytest.raises(ImageError, match=r"mug/1\.png: this image cannot be read .*Replace or remove"):
        read_support_folder(folder)
