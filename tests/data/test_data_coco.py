"""COCO: full sets, K-shot records, folders of 2014 and 2017, odd annotation files."""

import json
import shutil
from pathlib import Path

import pytest
from data_trees import box_of, edit_json

from fsdet.data.catalog import DatasetSources, DatasetSpec, check_sources, load_records, new_report
from fsdet.data.coco import ImageFinder, annotation_file, guess_image_folder, read_coco
from fsdet.data.splits import COCO_CLASSES, COCO_NOVEL_IDS, coco_split

TRAIN = "cocosplit/datasplit/trainvalno5k.json"
DOG = 18
DOG_LIST = "cocosplit/full_box_2shot_dog_trainval.json"


def load(root, subset="all", part="train", **options):
    spec = DatasetSpec("coco", part, subset, **options)
    report = new_report(spec)
    return load_records(spec, DatasetSources(root=root), report), report


def boxes(records):
    return sum(len(record["annotations"]) for record in records)


def test_full_set(coco_tree):
    records, report = load(coco_tree)
    assert len(records) == 80 and boxes(records) == 320 and not report.counts
    assert [r["image_id"] for r in records] == sorted(r["image_id"] for r in records)
    record = records[1]
    assert Path(record["file_name"]) == coco_tree / "coco/trainval2014/COCO_val2014_000000001002.jpg"
    assert record["annotations"][0] == {
        "id": 21,
        "category_id": 1,
        "bbox": [10.5, 5, 20, 30.25],
        "bbox_mode": 1,
        "iscrowd": 0,
        "area": 605.0,
    }
    crowds = sum(a["iscrowd"] for r in records for a in r["annotations"])
    assert crowds == sum(c % 2 for c in COCO_CLASSES)


def test_subsets(coco_tree):
    base, _ = load(coco_tree, "base")
    novel, _ = load(coco_tree, "novel")
    assert len(base) == len(novel) == 80
    assert boxes(base) == 60 * 3 and boxes(novel) == 20 * 3 + 80
    split = coco_split()
    by_image = {r["image_id"]: r for r in novel}
    assert split.novel[by_image[1000 + DOG]["annotations"][0]["category_id"]] == "dog"
    test, _ = load(coco_tree, "novel", "test")
    assert len(test) == 80 and boxes(test) == 20
    assert "coco/val2014/" in test[0]["file_name"]


@pytest.mark.parametrize(("leak", "images", "regions"), [("background", 80, 0), ("drop", 0, 0), ("ignore", 80, 140)])
def test_leak_policies(coco_tree, leak, images, regions):
    """Every training image shows a person, which is a novel class."""
    records, report = load(coco_tree, "base", leak=leak)
    assert len(records) == images
    assert sum(len(r.get("ignore_regions", ())) for r in records) == regions
    if leak == "ignore":
        truck = next(r for r in records if r["image_id"] == 1008)
        assert truck["ignore_regions"] == [[60.0, 40.0, 90.0, 70.0]] and len(truck["annotations"]) == 3
        assert report.counts == {"leak_regions_ignored": 140}
    elif leak == "drop":
        assert report.counts == {"leak_images_dropped": 80}


def test_bad_leaked_box_is_no_region(coco_tree):
    edit_json(coco_tree / TRAIN, lambda data: data["annotations"].append(box_of(9001, 1008, 1, [5, 5, 0, 10])))
    records, _ = load(coco_tree, "base", leak="ignore")
    assert sum(len(r.get("ignore_regions", ())) for r in records) == 140


@pytest.mark.parametrize(("records", "count"), [("instance", 40), ("image", 20)])
def test_shot_records(coco_tree, records, count):
    got, report = load(coco_tree, "novel", shot=2, records=records)
    assert len(got) == count and boxes(got) == 40 and not report.counts
    assert all(len(r["annotations"]) == (1 if records == "instance" else 2) for r in got)
    assert [r["annotations"][0]["category_id"] for r in got] == sorted(r["annotations"][0]["category_id"] for r in got)


def test_merging_joins_classes_that_share_an_image(coco_tree):
    """The dog's list is made to show an instance in the cat's image."""

    def to_cat(data):
        data["images"][0].update(id=1017, file_name=f"COCO_train2014_{1017:012d}.jpg")
        for row in data["annotations"]:
            row["image_id"] = 1017

    edit_json(coco_tree / DOG_LIST, to_cat)
    merged, _ = load(coco_tree, "novel", shot=2, records="image")
    assert len(merged) == 19 and boxes(merged) == 40
    shared = next(r for r in merged if r["image_id"] == 1017)
    assert [coco_split().novel[a["category_id"]] for a in shared["annotations"]] == ["cat", "cat", "dog", "dog"]
    assert [a["id"] for a in shared["annotations"]] == [171, 172, 181, 182]


def test_overfull_list_under_each_choice(coco_tree):
    shutil.copy(coco_tree / DOG_LIST.replace("2shot", "3shot"), coco_tree / DOG_LIST)
    seeded, report = load(coco_tree, "novel", shot=2)
    assert boxes(seeded) == 40 and report.counts == {"overfull_lists": 1}
    assert len(report.chosen["dog"]) == 2 and set(report.chosen["dog"]) < {181, 182, 183}
    assert boxes(load(coco_tree, "novel", shot=2, records="image")[0]) == 40
    assert boxes(load(coco_tree, "novel", shot=2, choice="official")[0]) == 40  # TFA cuts to K
    assert boxes(load(coco_tree, "novel", shot=2, choice="official", records="image")[0]) == 41  # DeFRCN does not


def test_short_repeated_and_crowd_entries_are_counted(coco_tree):
    edit_json(coco_tree / DOG_LIST, lambda data: data["annotations"][1].update(iscrowd=1))
    records, report = load(coco_tree, "novel", shot=2)
    assert len(records) == 39 and report.counts == {"crowds_in_samples": 1, "short_lists": 1}
    edit_json(coco_tree / DOG_LIST, lambda data: data["annotations"].__setitem__(1, data["annotations"][0]))
    records, report = load(coco_tree, "novel", shot=2)
    assert len(records) == 40 and report.counts == {"repeated_entries": 1}
    merged, report = load(coco_tree, "novel", shot=2, records="image")
    assert boxes(merged) == 39 and report.counts == {"repeated_entries": 1, "repeated_instances": 1}


@pytest.mark.parametrize("change", [{"category_id": 17}, {"category_id": 18, "image_id": 5}])
def test_foreign_annotation_in_a_list(coco_tree, change):
    edit_json(coco_tree / DOG_LIST, lambda data: data["annotations"][0].update(change))
    with pytest.raises(ValueError, match="full_box_2shot_dog_trainval.json"):
        load(coco_tree, "novel", shot=2)


def test_missing_list(coco_tree):
    with pytest.raises(FileNotFoundError) as error:
        load(coco_tree, "novel", shot=10)
    text = str(error.value)
    for word in ("full_box_10shot_person_trainval.json", "1, 2, 3 shot", "DETECTRON2_DATASETS", "prepare_coco.py"):
        assert word in text


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ([10, 10, 0, 5], "zero_area_boxes"),
        ([10, 10, 5, -1], "zero_area_boxes"),
        ([90, 10, 30, 5], "outside_boxes"),
        ([-9, 10, 30, 5], "outside_boxes"),
        ([100.5, 10, 0.4, 5], "outside_boxes"),
        ([10, float("nan"), 30, 5], "outside_boxes"),
        ([0, 0, 100.4, 80.3], None),  # rounding, as in the official files
    ],
)
def test_bad_box(coco_tree, box, fault):
    edit_json(coco_tree / TRAIN, lambda data: data["annotations"].append(box_of(9001, 1008, 8, box)))
    records, report = load(coco_tree)
    assert boxes(records) == 320 + (fault is None) and report.counts == ({fault: 1} if fault else {})
    if fault:
        assert "trainvalno5k.json: image 1008, annotation 9001" in report.details[0]
    edit_json(coco_tree / DOG_LIST, lambda data: data["annotations"][1].update(bbox=box))
    if fault is None:
        assert len(load(coco_tree, "novel", shot=2)[0]) == 40
        return
    with pytest.raises(ValueError) as error:
        load(coco_tree, "novel", shot=2)
    for word in ("full_box_2shot_dog_trainval.json", "image 1018", "annotation 182", "100 x 80", "prepare_coco.py"):
        assert word in str(error.value)


def test_several_bad_boxes_are_one_error(coco_tree):
    for row in (0, 1):
        edit_json(coco_tree / DOG_LIST, lambda data, row=row: data["annotations"][row].update(bbox=[1, 1, 0, 0]))
    with pytest.raises(ValueError, match=r"coco_train_novel_2shot_seed0: 2 unusable"):
        load(coco_tree, "novel", shot=2)


def test_ignore_field_counts_as_crowd(coco_tree):
    """Detectron2's own loader refuses such a file."""
    edit_json(coco_tree / TRAIN, lambda data: data["annotations"][0].update(ignore=1))
    edit_json(coco_tree / TRAIN, lambda data: data["annotations"][1].update(ignore=0))
    records, report = load(coco_tree)
    assert report.counts == {"ignore_taken_as_crowd": 1}
    assert [a["iscrowd"] for a in records[0]["annotations"]] == [1, 0, 0, 1]


def test_unknown_class_in_file(coco_tree):
    edit_json(coco_tree / TRAIN, lambda data: data["categories"][0].update(name="unicorn"))
    with pytest.raises(ValueError, match=r'trainvalno5k.json: unknown class "unicorn" with id 1; COCO has "person"'):
        load(coco_tree)


def test_unknown_class_id_and_missing_image(coco_tree):
    edit_json(coco_tree / TRAIN, lambda data: data["annotations"][0].update(image_id=77))
    assert load(coco_tree)[1].counts == {"annotations_without_image": 1}
    edit_json(coco_tree / TRAIN, lambda data: data["annotations"][5].update(category_id=91))
    with pytest.raises(ValueError, match=r"annotation 22 of image 1002 has the unknown class id 91"):
        load(coco_tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("annotations"), r"the lists \['annotations'\] are missing"),
        (lambda data: data["images"].append(data["images"][0]), "1 image id.* more than once"),
        (lambda data: data["images"][3].pop("width"), "lacks 'width'"),
        (lambda data: data["annotations"][0].update(bbox=[1, 2, 3]), "annotation 11 of image 1001 has the bbox"),
        (lambda data: data["annotations"][0].pop("bbox"), "annotation 11 of image 1001 has the bbox None"),
    ],
)
def test_broken_file(coco_tree, change, message):
    edit_json(coco_tree / TRAIN, change)
    with pytest.raises(ValueError, match=f"trainvalno5k.json.*{message}"):
        load(coco_tree)


def test_no_json(tmp_path):
    (tmp_path / "a.json").write_text("{nonsense")
    with pytest.raises(ValueError, match="a.json: not a JSON file"):
        read_coco(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"trainvalno5k.json.*DETECTRON2_DATASETS.*where to get it"):
        annotation_file(tmp_path, "train")


class TestFolders:
    def find(self, root, part, name):
        return Path(ImageFinder(root, part).resolver()(name)).relative_to(root).as_posix()

    def test_merged_folder_is_for_training_and_wins(self, tmp_path):
        for folder in ("trainval2014", "train2014", "val2014", "train2017"):
            (tmp_path / folder).mkdir()
        name = "COCO_val2014_000000000009.jpg"
        assert self.find(tmp_path, "train", name) == f"trainval2014/{name}"
        assert self.find(tmp_path, "test", name) == f"val2014/{name}"
        assert self.find(tmp_path, "train", "000000000009.jpg") == "train2017/000000000009.jpg"

    def test_prefix_decides_without_the_merged_folder(self, tmp_path):
        for folder in ("train2014", "val2014"):
            (tmp_path / folder).mkdir()
        for part in ("train", "val"):
            name = f"COCO_{part}2014_000000000009.jpg"
            assert self.find(tmp_path, "train", name) == f"{part}2014/{name}"

    def test_2017_folders_serve_2014_lists(self, tmp_path):
        (tmp_path / "train2017").mkdir()
        (tmp_path / "val2017").mkdir()
        name = "COCO_val2014_000000000009.jpg"
        assert self.find(tmp_path, "train", name) == "train2017/000000000009.jpg"
        assert self.find(tmp_path, "test", name) == "val2017/000000000009.jpg"

    def test_official_place_when_nothing_exists(self, tmp_path):
        name = "COCO_val2014_000000000009.jpg"
        assert self.find(tmp_path, "train", name) == f"trainval2014/{name}"

    @pytest.mark.parametrize("layout", ["set.json set", "instances_a.json a", "annotations/instances_a.json a"])
    def test_guess(self, tmp_path, layout):
        json_file, folder = layout.split()
        (tmp_path / folder).mkdir()
        assert guess_image_folder(tmp_path / json_file) == tmp_path / folder
        assert guess_image_folder(tmp_path / "elsewhere" / "other" / "x.json") is None


def test_layout_of_2017(coco_tree, picture):
    """The official 2017 names are found when there is no 2014 list; K-shot lists of 2014 use the same pictures."""
    coco = coco_tree / "coco"
    shutil.rmtree(coco)
    for part, old in (("train", "trainvalno5k"), ("val", "5k")):
        path = coco / "annotations" / f"instances_{part}2017.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = json.loads((coco_tree / f"cocosplit/datasplit/{old}.json").read_text())
        (coco / f"{part}2017").mkdir()
        for image in data["images"]:
            image["file_name"] = image["file_name"].rsplit("_", 1)[1]
            shutil.copy(picture, coco / f"{part}2017" / image["file_name"])
        path.write_text(json.dumps(data))
    shutil.rmtree(coco_tree / "cocosplit" / "datasplit")
    sources = DatasetSources(root=coco_tree)
    for spec, count in (
        (DatasetSpec("coco", "train", "base"), 80),
        (DatasetSpec("coco", "test", "all"), 80),
        (DatasetSpec("coco", "train", "novel", shot=3, records="image"), 20),
    ):
        check_sources(spec, sources)
        records = load_records(spec, sources)
        assert len(records) == count and all(Path(r["file_name"]).is_file() for r in records)


def test_novel_classes_are_the_official_twenty(coco_tree):
    records, _ = load(coco_tree, "novel", shot=1)
    names = coco_split().novel
    assert [names[r["annotations"][0]["category_id"]] for r in records] == [COCO_CLASSES[i] for i in COCO_NOVEL_IDS]
