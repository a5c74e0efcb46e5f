"""Tiny synthetic VOC, COCO and own data trees in tmp_path. All pictures are 100 x 80 pixels (width x height)."""

import json
import shutil

import cv2
import numpy as np
import pytest
from data_trees import HEIGHT, OWN_CLASSES, WIDTH, box_of, coco_json, voc_object, write_image_set, write_voc_image
from detectron2.data import DatasetCatalog, MetadataCatalog

from fsdet.data.splits import COCO_CLASSES, VOC_CLASSES


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """One JPEG file with noise, copied wherever a picture is needed."""
    path = tmp_path_factory.mktemp("picture") / "noise.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), noise)
    return path


@pytest.fixture
def clean_catalogs():
    """Forget what a test registers."""
    before = set(DatasetCatalog), set(MetadataCatalog)
    yield
    for catalog, names in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        for name in set(catalog) - names:
            catalog.pop(name)


@pytest.fixture
def voc_tree(tmp_path, picture):
    """VOC root. Class number i (alphabetical) has

    * VOC2007 trainval image 0001ii: two objects of class i, the first one difficult where i is even, and one object of
      class i + 1;
    * VOC2012 trainval image 2008_0001ii: one object of class i;
    * VOC2007 test image 0002ii: one plain and one difficult object of class i;
    * lists of seed 0 (in vocsplit itself) and seed 1: 1 shot = the 2012 image; 2 = the 2007 image; 3 = the 2012, the
      2007 and again the 2012 image (four instances); 5 = the 2012 and the 2007 image (three instances).
    """
    root = tmp_path / "voc_root"
    old, new = root / "VOC2007", root / "VOC2012"
    ids = {"trainval": [], "test": [], "2012": []}
    for i, name in enumerate(VOC_CLASSES):
        follower = VOC_CLASSES[(i + 1) % len(VOC_CLASSES)]
        first, second, test = f"0001{i:02d}", f"2008_0001{i:02d}", f"0002{i:02d}"
        pair = [voc_object(name, [1, 1, 20, 30], 1 - i % 2), voc_object(name, [30, 10, 60, 50])]
        write_voc_image(old, first, [*pair, voc_object(follower, [50, 40, 100, 80])], picture)
        write_voc_image(new, second, [voc_object(name, [11, 21, 40, 60])], picture)
        write_voc_image(old, test, [voc_object(name, [5, 6, 40, 50]), voc_object(name, [50, 6, 90, 50], 1)], picture)
        for key, image_id in (("trainval", first), ("2012", second), ("test", test)):
            ids[key].append(image_id)
        lists = {1: [second], 2: [first], 3: [second, first, second], 5: [second, first]}
        for folder in (root / "vocsplit", root / "vocsplit" / "seed1"):
            folder.mkdir(parents=True, exist_ok=True)
            for shot, images in lists.items():
                lines = [f"datasets/VOC{2012 if '_' in i else 2007}/JPEGImages/{i}.jpg\n" for i in images]
                (folder / f"box_{shot}shot_{name}_train.txt").write_text("".join(lines))
    write_image_set(old, "trainval", ids["trainval"])
    write_image_set(old, "test", ids["test"])
    write_image_set(new, "trainval", ids["2012"])
    return root


@pytest.fixture
def coco_tree(tmp_path, picture):
    """COCO root in the merged 2014 layout. Class with dataset id c has

    * training image 1000 + c with annotations 10c+1, 10c+2, 10c+3 of class c and 10c+4 of class "person" (a crowd for
      odd c); odd images carry the prefix of train2014, even ones that of val2014;
    * test image 2000 + c with annotation 5000+c of class c;
    * lists of seed 0: K annotations (K = 1, 2, 3), all in the training image of the class.
    Only the first two pictures of each part exist.
    """
    root = tmp_path / "coco_root"
    train, test, train_boxes, test_boxes = [], [], [], []
    for c in COCO_CLASSES:
        name = f"COCO_{'train' if c % 2 else 'val'}2014_{1000 + c:012d}.jpg"
        train.append((1000 + c, name))
        test.append((2000 + c, f"COCO_val2014_{2000 + c:012d}.jpg"))
        train_boxes += [box_of(10 * c + j, 1000 + c, c, [10.5 * j, 5, 20, 30.25]) for j in (1, 2, 3)]
        train_boxes.append(box_of(10 * c + 4, 1000 + c, 1, [60, 40, 30, 30], iscrowd=c % 2))
        test_boxes.append(box_of(5000 + c, 2000 + c, c, [1, 2, 30, 40]))
    folder = root / "cocosplit" / "datasplit"
    folder.mkdir(parents=True)
    full = coco_json(train, train_boxes, COCO_CLASSES)
    (folder / "trainvalno5k.json").write_text(json.dumps(full))
    (folder / "5k.json").write_text(json.dumps(coco_json(test, test_boxes, COCO_CLASSES)))
    for c, name in COCO_CLASSES.items():
        own = [box for box in train_boxes if box["image_id"] == 1000 + c and box["category_id"] == c]
        for shot in (1, 2, 3):
            sample = coco_json([train[list(COCO_CLASSES).index(c)]], own[:shot], COCO_CLASSES)
            (root / "cocosplit" / f"full_box_{shot}shot_{name}_trainval.json").write_text(json.dumps(sample))
    for where, images in (("trainval2014", train), ("val2014", test)):
        (root / "coco" / where).mkdir(parents=True)
        for _, name in images[:2]:
            shutil.copy(picture, root / "coco" / where / name)
    return root


@pytest.fixture
def own_tree(tmp_path, picture):
    """Own data set in COCO format: classes widget (5), gadget (7), gizmo (9), listed out of order.

    train.json has four pictures in train/ with 6 boxes, test.json two pictures in test/ with other class ids; samples/
    holds 1-shot lists of every class.
    """
    root = tmp_path / "own"
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        for i in range(1, 5):
            shutil.copy(picture, root / part / f"{i}.jpg")
    boxes = [
        box_of(1, 1, 5, [0, 0, 50, 40]),
        box_of(2, 1, 7, [50, 40, 50, 40]),
        box_of(3, 2, 5, [10, 10, 20, 20]),
        box_of(4, 2, 9, [40, 10, 20, 20]),
        box_of(5, 3, 9, [1, 1, 98, 78]),
        box_of(6, 4, 5, [3, 4, 5, 6]),
    ]
    images = [(i, f"{i}.jpg") for i in (4, 3, 2, 1)]
    (root / "train.json").write_text(json.dumps(coco_json(images, boxes, OWN_CLASSES)))
    other = {1: "gadget", 2: "gizmo", 3: "widget"}
    test = [box_of(1, 1, 1, [0, 0, 10, 10]), box_of(2, 2, 3, [5, 5, 10, 10])]
    (root / "test.json").write_text(json.dumps(coco_json([(1, "1.jpg"), (2, "2.jpg")], test, other)))
    (root / "samples").mkdir()
    for number, name in ((1, "widget"), (2, "gadget"), (5, "gizmo")):
        row = boxes[number - 1]
        sample = coco_json([(row["image_id"], f"{row['image_id']}.jpg")], [row], OWN_CLASSES)
        (root / "samples" / f"full_box_1shot_{name}_trainval.json").write_text(json.dumps(sample))
    return root
