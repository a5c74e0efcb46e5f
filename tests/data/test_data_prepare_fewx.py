"""FewX's training files: golden choices of annotations and table, balance by hand, the script from its command line."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import cv2
import golden_fewx
import numpy as np
import pytest
from data_trees import box_of, coco_json, edit_json

from fsdet.data import prepare_fewx
from fsdet.data.catalog import DatasetSources, DatasetSpec, load_records
from fsdet.data.crops import fewx_support_crop
from fsdet.data.seeds import check_manifest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = golden_fewx.RULES


def ids(rows):
    return [row["id"] for row in rows]


@pytest.fixture(scope="module")
def data():
    return golden_fewx.coco()


@pytest.fixture(scope="module")
def novel(data):
    return prepare_fewx.novel_ids(data, Path("golden.json"))


def test_novel_classes_are_the_release_s(data, novel):
    assert sorted(novel) == sorted(GOLDEN["voc_category_ids"])
    assert {c["id"] for c in data["categories"]} - novel == set(GOLDEN["base_category_ids"])


def test_golden_base_filter(data, novel):
    kept = prepare_fewx.base_annotations(data, novel)
    assert ids(kept) == GOLDEN["base_split_annotation_ids_in_order"]
    assert any(row["iscrowd"] for row in kept)


def test_golden_novel_split(data, novel):
    assert ids(prepare_fewx.novel_annotations(data, novel)) == GOLDEN["voc_split_annotation_ids_in_order"]


def test_golden_ten_shot_pick_and_pool(data, novel):
    picked = prepare_fewx.pick_shots(data, novel)
    assert ids(picked) == GOLDEN["ten_shot_annotation_ids_in_order"]
    rows = prepare_fewx.support_rows({**data, "annotations": picked}, "10_shot_support")
    assert ids(rows) == GOLDEN["ten_shot_pool_ids_in_order"]
    assert rows[0]["file_path"].startswith("./10_shot_support/0000")
    fewer = Counter(row["category_id"] for row in prepare_fewx.pick_shots(data, novel, 2))
    assert max(fewer.values()) == 2


def test_golden_support_table(data, novel):
    rows = prepare_fewx.support_rows({**data, "annotations": prepare_fewx.base_annotations(data, novel)})
    pool = GOLDEN["support_pool"]
    for column in pool["columns"]:
        assert [row[column] for row in rows] == pool[column], column


def test_the_area_of_the_box_counts_not_that_of_the_segment():
    """32 x 32 stays and 31 x 33 (1023 px²) empties its image, whatever "area" says; novel boxes may be small."""
    boxes = [
        box_of(1, 1, 7, [0, 0, 32, 32], area=5),
        box_of(2, 1, 8, [0, 0, 3, 3]),
        box_of(3, 2, 7, [0, 0, 31, 33], area=9999),
        box_of(4, 2, 9, [0, 0, 60, 60]),
    ]
    made = coco_json([(1, "1.jpg"), (2, "2.jpg")], boxes, {7: "a", 8: "b", 9: "c"})
    assert ids(prepare_fewx.base_annotations(made, {8})) == [1]
    boxes[2]["bbox"] = [0, 0, 31, 33.1]
    assert ids(prepare_fewx.base_annotations(made, {8})) == [1, 3, 4]


def test_zero_boxes_are_skipped_and_crops_keep_their_numbers():
    boxes = [box_of(i, 1, 7, [5, 5, width, 20]) for i, width in ((1, 20), (2, 0), (3, 30))]
    rows = prepare_fewx.support_rows(coco_json([(1, "x/1.jpg")], boxes, {7: "a"}), "crops")
    assert [(row["id"], row["file_path"]) for row in rows] == [(1, "./crops/1/0000.jpg"), (3, "./crops/1/0002.jpg")]
    boxes[1]["bbox"] = [200, 5, 20, 20]
    with pytest.raises(ValueError, match=r"Annotation 2 of image 1: .* leaves nothing of its picture of 100 x 80"):
        prepare_fewx.support_rows(coco_json([(1, "1.jpg")], boxes, {7: "a"}))


def test_balance_by_hand():
    """Limit 2. Class a: images 1, 2, 3, 4; class b: images 1, 3, 4; c: image 3.

    Image 1 (a 4, b 3) goes, image 2 (a 3) goes, image 3 stays for c, image 4 (a 2, b 2) stays.
    """
    shown = {1: (7, 8, 7), 2: (7,), 3: (7, 8, 9), 4: (7, 8)}
    pairs = [(image, category) for image, found in shown.items() for category in found]
    boxes = [box_of(i, image, category, [0, 0, 9, 9]) for i, (image, category) in enumerate(pairs)]
    made = coco_json([(i, f"{i}.jpg") for i in shown], boxes, {7: "a", 8: "b", 9: "c"})
    assert [row["image_id"] for row in prepare_fewx.balanced_annotations(made, 2)] == [3, 3, 3, 4, 4]
    assert prepare_fewx.balanced_annotations(made, 4) == boxes


def run(*arguments):
    spec = importlib.util.spec_from_file_location("prepare_fewx_script", ROOT / "datasets" / "prepare_fewx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


@pytest.fixture
def own(tmp_path):
    """coco/annotations/own.json: classes a (2 objects to pick), b (3), base class c; pictures are ramps of grey."""
    boxes = [
        box_of(1, 1, 1, [10, 10, 50, 60], area=4096),
        box_of(2, 2, 1, [20, 5, 60, 70], area=4095),  # too small
        box_of(3, 3, 1, [20, 5, 60, 70], area=50176),
        box_of(4, 4, 1, [0, 0, 60, 70], area=5000),
        box_of(5, 4, 2, [0, 0, 60, 70], area=5000),  # not alone on its image
        *[box_of(i, i, 2, [0, 0, 60, 70], area=5000) for i in (6, 7, 8)],
        box_of(9, 1, 3, [0, 0, 40, 40]),
    ]
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "pictures").mkdir()
    images = [(i, f"{i}.png") for i in range(1, 9)]
    for i, name in images:
        ramp = np.tile(np.linspace(0, 25 * i, 100, dtype=np.uint8)[None, :, None], (80, 1, 3))
        assert cv2.imwrite(str(folder / "pictures" / name), ramp)
    path = folder / "annotations" / "own.json"
    path.write_text(json.dumps(coco_json(images, boxes, {1: "a", 2: "b", 3: "c"})))
    return path


def test_steps_from_the_command_line(own, capsys):
    made = own.parent.parent / "new_annotations"
    options = ("--json", own, "--novel", "a", "b")
    assert run("base", *options) == run("novel", *options) == run("shots", *options, "--shots", 2) == 0
    kept = {path.name: json.loads(path.read_text()) for path in made.iterdir()}
    assert {name: ids(part["annotations"]) for name, part in kept.items()} == {
        "final_split_non_voc_own.json": [9],
        "final_split_voc_own.json": [1, 2, 3, 4, 5, 6, 7, 8],
        "final_split_voc_2_shot_own.json": [1, 3, 6, 7],
    }
    assert [len(part["images"]) for part in kept.values()].count(8) == 2  # all images stay, but for the pick
    assert ids(kept["final_split_voc_2_shot_own.json"]["images"]) == [1, 3, 6, 7]
    assert "1 of 9 annotations, on 1 of 8 images" in capsys.readouterr().out
    assert run("balance", "--json", made / "final_split_voc_own.json", "--limit", 3) == 0
    balanced = json.loads((made / "final_split_voc_own_balanced.json").read_text())["annotations"]
    assert ids(balanced) == [2, 3, 4, 5, 7, 8]  # a and b on 4 images each: the first of each goes


def test_picked_lists_load_as_k_shot_samples(own):
    made = own.parent.parent / "new_annotations"
    assert run("shots", "--json", own, "--novel", "a", "b", "--shots", 2) == 0
    assert run("lists", "--json", made / "final_split_voc_2_shot_own.json") == 0
    sources = DatasetSources(
        own.parent.parent, train_json=own, train_images="pictures", samples=made / "samples", novel_classes=("a", "b")
    )
    records = load_records(DatasetSpec("custom", "train", "novel", shot=2, seed=0), sources)
    assert [r["annotations"][0]["id"] for r in records] == [1, 3, 6, 7]
    assert check_manifest(made / "samples", 0)["algorithm"] == "given"


def test_unequal_classes_make_no_lists(own, capsys):
    made = own.parent.parent / "new_annotations"
    assert run("shots", "--json", own, "--novel", "a", "b") == 0
    assert run("lists", "--json", made / "final_split_voc_10_shot_own.json") == 1
    assert "same number of annotations for every labelled class, found {'a': 2, 'b': 3}" in capsys.readouterr().err


def test_short_classes_are_named(own, caplog):
    assert run("shots", "--json", own, "--novel", "a", "b", "c", "--shots", 3) == 0
    assert "fewer than 3 suitable objects: {'a': 1, 'c': 0}" in caplog.text


def test_table_with_crops(own):
    """Crops as the training cuts them, but for JPEG; existing ones are kept, a second run changes nothing."""
    options = ("table", "--json", own, "--images", own.parent.parent / "pictures", "--crops", "cut", "--format")
    made = own.parent.parent / "new_annotations"
    assert run(*options, ".json") == run(*options, ".csv") == 0
    rows = json.loads((made / "own_supports.json").read_text())
    assert len(rows) == len(list((made / "cut").rglob("*.jpg"))) == 9
    picture = cv2.imread(str(own.parent.parent / "pictures" / "3.png"))
    crop, box = fewx_support_crop(picture, (20, 5, 80, 75))
    row = next(row for row in rows if row["id"] == 3)
    assert row["support_box"] == box.tolist() and row["file_path"] == "./cut/3/0000.jpg"
    written = cv2.imread(str(made / row["file_path"]))
    assert np.abs(written.astype(int) - crop).mean() < 1
    kept = made / "cut" / "3" / "0000.jpg"
    kept.write_bytes(b"mine")
    assert run(*options, ".json") == 0 and kept.read_bytes() == b"mine"
    assert not list(made.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (lambda p: p.unlink(), ("base",), "own.json"),
        (lambda p: p.write_text("{"), ("base",), "not a JSON file"),
        (lambda p: None, ("base",), "has no class ['person'"),
        (
            lambda p: edit_json(p, lambda d: d["annotations"][0].update(bbox=[1, 2, 3])),
            ("table",),
            "annotation 1 has the",
        ),
        (lambda p: edit_json(p, lambda d: d["annotations"][0].pop("area")), ("shots", "--novel", "a"), 'no "area"'),
        (lambda p: None, ("shots", "--novel", "c"), "no annotation is left"),
        (lambda p: None, ("shots", "--shots", "0"), "expected at least 1"),
        (lambda p: None, ("table", "--images", "nowhere"), "1.png: picture not found"),
    ],
)
def test_faults_are_one_line(own, capsys, damage, arguments, message):
    damage(own)
    assert run(arguments[0], "--json", own, *arguments[1:]) == 1
    error = capsys.readouterr().err
    assert error.startswith("prepare_fewx: ") and message in error


def test_nothing_is_overwritten_without_force(own, capsys):
    options = ("novel", "--json", own, "--novel", "a", "--output", own.parent / "out.json")
    assert run(*options) == run(*options) == 0  # the same content again
    (own.parent / "out.json").write_text("{}")
    assert run(*options) == 1 and "--force" in capsys.readouterr().err
    assert run(*options, "--force") == 0
