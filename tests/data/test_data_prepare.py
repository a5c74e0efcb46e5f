import json

import pytest
from data_trees import box_of, coco_json, edit_json, voc_object, write_image_set, write_voc_image

from fsdet.data.catalog import DatasetSources, DatasetSpec, load_records
from fsdet.data.prepare import (
    Recipe,
    check_coco_lists,
    check_voc_lists,
    draw_coco,
    draw_voc,
    missing_images,
    parse_seeds,
    split_coco,
)
from fsdet.data.seeds import check_manifest, count_warnings, read_voc_shots, voc_shot_path, write_files
from fsdet.data.splits import VOC_CLASSES


def toy_coco(tmp_path, sizes, **more):
    """Json with one class "cat" (id 3) and one image for each size; `more` alters every annotation."""
    boxes = [(image, j) for image, size in enumerate(sizes, start=1) for j in range(size)]
    annotations = [box_of(i, image, 3, [1 + j, 1, 9, 9], **more) for i, (image, j) in enumerate(boxes, start=1)]
    data = coco_json([(i, f"{i}.jpg") for i in range(1, len(sizes) + 1)], annotations, {3: "cat", 1: "dog"})
    path = tmp_path / "train.json"
    path.write_text(json.dumps(data))
    return path


def custom(shots=(1, 2), **more):
    return Recipe((0,), shots, dataset="custom", **more)


def test_seeds_from_text():
    assert parse_seeds("0-3") == (0, 1, 2, 3)
    assert parse_seeds("7, 2-3") == (7, 2, 3)
    for text in ("", "a", "1-", "-3", "1..3"):
        with pytest.raises(ValueError, match="write 0-9 or 0,1,4"):
            parse_seeds(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "Seeds must"),
        ({"seeds": (1, 1)}, "Seeds must"),
        ({"shots": (5, 1)}, "must be positive and rise"),
        ({"shots": (0, 1)}, "must be positive and rise"),
        ({"algorithm": "new"}, "Unknown algorithm"),
        ({"algorithm": "legacy", "unit": "instance"}, "legacy algorithm has no unit"),
    ],
)
def test_recipe_faults(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"seeds": (0,), "shots": (1, 2), **change})


def test_voc_draw_is_exact_for_the_loader(voc_tree):
    """Lists as drawn, read by the loader with and without difficult objects: exactly K records a class."""
    files = draw_voc(voc_tree, voc_tree / "drawn", Recipe((4,), (1, 2)))
    write_files(files)
    assert check_manifest(voc_tree / "drawn", 4)["difficult"] is False
    sources = DatasetSources(voc_tree, samples="drawn")
    for difficult in (True, False):
        for shot in (1, 2):
            spec = DatasetSpec("voc", "train", "all", shot=shot, seed=4, difficult=difficult)
            records = load_records(spec, sources)
            ids = [record["annotations"][0]["category_id"] for record in records]
            assert sorted(ids) == sorted(list(range(20)) * shot)


def test_voc_difficult_switch_changes_the_draw(voc_tree):
    # Every class has 4 objects, one of them difficult in the even classes, in an image with another object.
    with pytest.raises(ValueError, match=r'4 shots of "aeroplane" need 4 instances, .*VOC2012 has 2 .*--difficult'):
        draw_voc(voc_tree, voc_tree / "drawn", Recipe((0,), (2, 4)))
    files = draw_voc(voc_tree, voc_tree / "drawn", Recipe((0,), (2, 4), difficult=True))
    assert len(files) == 41


def test_voc_images_with_bad_boxes_are_never_drawn(tmp_path):
    folder = tmp_path / "VOC2007"
    write_voc_image(folder, "000001", [voc_object("cat", [50, 10, 50, 9])])
    write_voc_image(folder, "000002", [voc_object("cat", [5, 5, 20, 20])])
    write_image_set(folder, "trainval", ["000001", "000002"])
    sets = [("VOC2007", "trainval")]
    for seed in range(5):
        files = draw_voc(tmp_path, tmp_path / "o", Recipe((seed,), (1,)), image_sets=sets, classes=("cat",))
        path = voc_shot_path(tmp_path / "o", seed, 1, "cat")
        assert files[path] == "datasets/VOC2007/JPEGImages/000002.jpg\n"
    with pytest.raises(ValueError, match="more than once"):
        draw_voc(tmp_path, tmp_path / "o", Recipe((0,), (1,)), image_sets=sets * 2)


def test_voc_check_counts_and_names(voc_tree):
    # vocsplit and vocsplit/seed1 hold 1 of 2, 2 of ..., see voc_tree: 3 shots list an image twice and give 4 instances.
    reports = check_voc_lists(voc_tree, voc_tree / "vocsplit")
    assert len(reports) == 2 * 4 * 20
    counted = count_warnings(reports)
    assert counted["repeated_entries"] == 40
    # The 2007 image of the class before shows one object of this class, but no list names it for this class.
    assert counted["overfull_lists"] == 40 and counted["short_lists"] == 40
    with pytest.raises(FileNotFoundError, match="No K-shot list below"):
        check_voc_lists(voc_tree, voc_tree / "VOC2007")
    other = voc_shot_path(voc_tree / "vocsplit", 1, 1, "cat")
    other.write_text(voc_shot_path(voc_tree / "vocsplit", 1, 1, "bird").read_text())
    with pytest.raises(ValueError, match='shows no "cat"'):
        check_voc_lists(voc_tree, voc_tree / "vocsplit")


def test_legacy_voc_counts_difficult_objects(voc_tree):
    files = draw_voc(voc_tree, voc_tree / "o", Recipe(tuple(range(6)), (1, 3), "legacy"))
    write_files(files)
    name = VOC_CLASSES[0]
    drawn = [read_voc_shots(voc_shot_path(voc_tree / "o", seed, 3, name)) for seed in range(6)]
    assert any("000100" in ids for ids in drawn)  # this image has a difficult object of the class
    assert check_manifest(voc_tree / "o", 0)["algorithm"] == "legacy"


def test_coco_draw_takes_no_crowds_nor_bad_boxes(tmp_path):
    path = toy_coco(tmp_path, [1] * 6)
    edit_json(path, lambda d: d["annotations"][0].update(iscrowd=1))
    edit_json(path, lambda d: d["annotations"][1].update(bbox=[5, 5, 0, 9]))
    edit_json(path, lambda d: d["annotations"][2].update(bbox=[95, 5, 20, 9]))
    recipe = Recipe((0, 1, 2), (1, 3), dataset="coco")
    files = draw_coco(path, tmp_path / "o", recipe, classes=["cat"])
    drawn = {row["id"] for p, text in files.items() if "3shot" in p.name for row in json.loads(text)["annotations"]}
    assert drawn == {4, 5, 6}
    with pytest.raises(
        ValueError, match=r"2 unusable box(.|\n)*annotation 2: .*has no area(.|\n)*annotation 3: .*outside"
    ):
        draw_coco(path, tmp_path / "o", custom((1, 3)), classes=["cat"])


def test_coco_draw_faults_name_class_needed_found_and_file(tmp_path):
    path = toy_coco(tmp_path, [2, 2, 2])
    with pytest.raises(ValueError, match=r'(?s)"dog" need 2 instances, .*train.json has 0.*"cat".*--unit instance'):
        draw_coco(path, tmp_path / "o", custom())
    with pytest.raises(ValueError, match=r"train.json has no class \['cow'\]; it has \['dog', 'cat'\]"):
        draw_coco(path, tmp_path / "o", custom(), classes=["cow"])
    assert len(draw_coco(path, tmp_path / "o", custom(unit="instance"), classes=["cat"])) == 3
    edit_json(path, lambda d: d["annotations"][0].update(id=2))
    with pytest.raises(ValueError, match="occur more than once"):
        draw_coco(path, tmp_path / "o", custom(unit="instance"), classes=["cat"])
    assert not (tmp_path / "o").exists()


def test_coco_difficult_switch_changes_the_draw(tmp_path):
    path = toy_coco(tmp_path, [1, 1, 1], difficult=1)
    with pytest.raises(ValueError, match="--difficult"):
        draw_coco(path, tmp_path / "o", custom(), classes=["cat"])
    assert len(draw_coco(path, tmp_path / "o", custom(difficult=True), classes=["cat"])) == 3


def test_drawn_own_lists_load_to_exactly_k(own_tree):
    write_files(
        draw_coco(own_tree / "train.json", own_tree / "drawn", Recipe((1,), (1, 2), dataset="mine"), classes=["gizmo"])
    )
    assert {len(json.loads(p.read_text())["annotations"]) for p in (own_tree / "drawn" / "seed1").glob("full*")} == {
        1,
        2,
    }
    reports = check_coco_lists(own_tree / "drawn")
    assert [(report.requested, report.instances) for report in reports] == [(1, 1), (2, 2)]


def test_parting_coco(tmp_path):
    first, second = toy_coco(tmp_path, [1, 2]), tmp_path / "val.json"
    boxes = [box_of(10, 7, 3, [1, 1, 5, 5]), box_of(11, 8, 1, [1, 1, 5, 5])]
    names = [(7, "COCO_val2014_000000000007.jpg"), (8, "COCO_val2014_000000000008.jpg")]
    second.write_text(json.dumps(coco_json(names, boxes, {3: "cat", 1: "dog"})))
    ids = tmp_path / "ids.txt"
    ids.write_text("# held out\n2\nCOCO_val2014_000000000008.jpg\n")
    training, held_out = split_coco([first, second], ids)
    assert [[row["id"] for row in part["images"]] for part in (training, held_out)] == [[1, 7], [2, 8]]
    assert [[row["id"] for row in part["annotations"]] for part in (training, held_out)] == [[1, 10], [2, 3, 11]]
    for text, message in (("9\n", 'line 1: .*no image "9"'), ("\n", "names no image"), ("1\n2\n7\n8\n", "every image")):
        ids.write_text(text)
        with pytest.raises(ValueError, match=message):
            split_coco([first, second], ids)
    with pytest.raises(ValueError, match="share image ids"):
        split_coco([first, first], ids)
    edit_json(second, lambda d: d["categories"][0].update(name="cow"))
    with pytest.raises(ValueError, match="different categories"):
        split_coco([first, second], ids)


def test_missing_images_by_2014_prefix_and_2017_name(tmp_path):
    coco = tmp_path / "coco"
    names = ["COCO_train2014_000000000001.jpg", "COCO_val2014_000000000002.jpg", "000000000003.jpg"]
    for folder, name in (("train2014", names[0]), ("val2014", names[1]), ("train2017", names[2])):
        (coco / folder).mkdir(parents=True)
        (coco / folder / name).touch()
    absent = "COCO_val2014_000000000009.jpg"
    files = {
        tmp_path / "full_box_1shot_cat_trainval.json": json.dumps(
            {"images": [{"file_name": n} for n in (*names, absent)]}
        )
    }
    assert missing_images(coco, files) == [absent]
