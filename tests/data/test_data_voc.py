"""PASCAL VOC: full sets, K-shot records, and every switch that changes a record."""

from pathlib import Path

import numpy as np
import pytest
from data_trees import voc_object, write_image_set, write_voc_image

from fsdet.data.catalog import DatasetSources, DatasetSpec, load_records, new_report
from fsdet.data.splits import VOC_CLASSES, voc_split
from fsdet.data.voc import folder_of, read_voc_image

NOVEL_1 = voc_split(1).novel


def load(root, subset="all", part="train", report=None, sources=None, **options):
    spec = DatasetSpec("voc", part, subset, **options)
    report = new_report(spec) if report is None else report
    return load_records(spec, sources or DatasetSources(root=root), report), report


def boxes(records):
    return sum(len(record["annotations"]) for record in records)


def test_full_set_of_both_years(voc_tree):
    records, report = load(voc_tree)
    assert len(records) == 40 and boxes(records) == 80  # 20 x (3 + 1) objects
    assert not report.counts
    record = records[0]
    assert Path(record["file_name"]) == voc_tree / "VOC2007" / "JPEGImages" / "000100.jpg"
    assert (record["image_id"], record["height"], record["width"]) == ("000100", 80, 100)
    names = voc_split(1).all
    assert [names[a["category_id"]] for a in record["annotations"]] == ["aeroplane", "aeroplane", "bicycle"]
    assert record["annotations"][0] == {
        "id": "000100/0",
        "category_id": names.index("aeroplane"),
        "bbox": [0.0, 0.0, 20.0, 30.0],  # 1 taken from xmin and ymin alone
        "bbox_mode": 0,
        "difficult": 1,
    }
    assert Path(records[20]["file_name"]) == voc_tree / "VOC2012" / "JPEGImages" / "2008_000100.jpg"


def test_subsets_keep_their_classes_and_number_them(voc_tree):
    base, _ = load(voc_tree, "base")
    novel, _ = load(voc_tree, "novel")
    assert boxes(base) == 60 and boxes(novel) == 20
    assert len(base) == len(novel) == 40  # images without an object of the subset stay
    assert {a["category_id"] for r in novel for a in r["annotations"]} == set(range(5))
    assert {a["category_id"] for r in base for a in r["annotations"]} == set(range(15))


def test_difficult_switch(voc_tree):
    kept, _ = load(voc_tree)
    dropped, report = load(voc_tree, difficult=False)
    assert boxes(kept) - boxes(dropped) == 10  # every second class has one difficult training object
    assert report.counts["difficult_dropped"] == 10
    shots, _ = load(voc_tree, shot=2, difficult=False)
    assert len(shots) == 30  # of 40
    test, _ = load(voc_tree, part="test", difficult=False)
    assert sum(a["difficult"] for r in test for a in r["annotations"]) == 20  # evaluation must see them


# 2007: images of the five novel classes and of the classes before them in the alphabet; 2012: the five novel classes.
# bird bus cow motorbike sofa, preceded by bicycle bottle chair horse sheep.
def test_leak_background_keeps_images_and_says_nothing(voc_tree):
    records, report = load(voc_tree, "base", leak="background")
    assert len(records) == 40 and not report.counts
    assert all("ignore_regions" not in record for record in records)


def test_leak_drop_removes_images_with_novel_objects(voc_tree):
    records, report = load(voc_tree, "base", leak="drop")
    assert len(records) == 40 - 15 and report.counts["leak_images_dropped"] == 15
    left = {record["image_id"] for record in records}
    bird, bicycle = VOC_CLASSES.index("bird"), VOC_CLASSES.index("bicycle")
    assert not left & {f"0001{bird:02d}", f"2008_0001{bird:02d}", f"0001{bicycle:02d}"}
    assert f"2008_0001{bicycle:02d}" in left


def test_leak_ignore_marks_regions(voc_tree):
    records, report = load(voc_tree, "base", leak="ignore")
    assert len(records) == 40 and boxes(records) == 60
    marked = {r["image_id"]: r["ignore_regions"] for r in records if "ignore_regions" in r}
    assert len(marked) == 15 and report.counts["leak_regions_ignored"] == 20
    bird = VOC_CLASSES.index("bird")
    assert marked[f"0001{bird:02d}"] == [[0.0, 0.0, 20.0, 30.0], [29.0, 9.0, 60.0, 50.0]]
    assert marked[f"2008_0001{bird:02d}"] == [[10.0, 20.0, 40.0, 60.0]]


def test_leak_concerns_base_training_only(voc_tree):
    for part, subset in (("train", "all"), ("test", "base")):
        plain, _ = load(voc_tree, subset, part)
        assert load(voc_tree, subset, part, leak="drop")[0] == plain


def test_shots_are_one_instance_per_record_in_class_order(voc_tree):
    records, report = load(voc_tree, "novel", shot=2)
    assert len(records) == 10 and boxes(records) == 10
    assert [record["annotations"][0]["category_id"] for record in records] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    bird = VOC_CLASSES.index("bird")
    # Both instances of the list's only image; its third object, of another class, is background.
    assert [r["annotations"][0]["id"] for r in records[:2]] == [f"0001{bird:02d}/0", f"0001{bird:02d}/1"]
    assert not report.counts


def test_records_image_merges(voc_tree):
    merged, _ = load(voc_tree, "novel", shot=2, records="image")
    assert len(merged) == 5 and boxes(merged) == 10
    # In the "all" set the follower's list shows the same image only for its own class: 20 images, 40 boxes.
    merged_all, _ = load(voc_tree, "all", shot=2, records="image")
    assert len(merged_all) == 20 and boxes(merged_all) == 40


def test_longer_and_repeating_lists(voc_tree):
    """The 3-shot lists offer four instances in three lines, two of them the same."""
    records, report = load(voc_tree, "novel", shot=3)
    assert len(records) == 15
    assert report.counts["overfull_lists"] == 5 and report.counts["repeated_entries"] == 5
    assert {name: len(ids) for name, ids in report.chosen.items()} == dict.fromkeys(NOVEL_1, 3)
    again, _ = load(voc_tree, "novel", shot=3)
    assert again == records
    other, _ = load(voc_tree, "novel", shot=3, seed=1)  # the same lists, another seed: another choice
    assert other != records
    merged, merged_report = load(voc_tree, "novel", shot=3, records="image")
    repeats = merged_report.counts["repeated_instances"]
    assert boxes(merged) + repeats == 15 and repeats > 0


def test_official_choice_follows_numpys_global_generator(voc_tree):
    def chosen(seed, choice):
        np.random.seed(seed)
        _, report = load(voc_tree, "novel", shot=3, choice=choice)
        return report.chosen

    assert chosen(0, "official") == chosen(0, "official")
    assert len({str(chosen(seed, "official")) for seed in range(5)}) > 1
    assert len({str(chosen(seed, "seeded")) for seed in range(5)}) == 1


def test_short_lists_are_counted(voc_tree):
    records, report = load(voc_tree, "novel", shot=5)
    assert len(records) == 15 and report.counts == {"short_lists": 5}
    assert "3 of 5 instances" in report.details[0]


def test_listed_image_without_the_class_is_counted_and_an_empty_class_fatal(voc_tree):
    path = voc_tree / "vocsplit" / "box_2shot_bird_train.txt"
    path.write_text(path.read_text() + "datasets/VOC2007/JPEGImages/000100.jpg\n")
    records, report = load(voc_tree, "novel", shot=2)
    assert len(records) == 10 and report.counts == {"listed_without_object": 1}
    path.write_text("datasets/VOC2007/JPEGImages/000100.jpg\n")
    with pytest.raises(ValueError, match=r'box_2shot_bird_train.txt: 2 instances of "bird" needed, 0 found'):
        load(voc_tree, "novel", shot=2)


def test_missing_list_names_file_and_remedy(voc_tree):
    with pytest.raises(FileNotFoundError) as error:
        load(voc_tree, "novel", shot=30)
    text = str(error.value)
    assert "box_30shot_bird_train.txt" in text and "1, 2, 3, 5 shot" in text
    assert "DETECTRON2_DATASETS" in text and "prepare_voc.py" in text


def test_list_with_an_unknown_image_names_both_files(voc_tree):
    path = voc_tree / "vocsplit" / "box_1shot_bird_train.txt"
    path.write_text("datasets/VOC2012/JPEGImages/2012_999999.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"box_1shot_bird_train.txt lists image 2012_999999.*2012_999999.xml"):
        load(voc_tree, "novel", shot=1)


@pytest.mark.parametrize(
    ("box", "fault", "said"),
    [
        ([30, 10, 29, 40], "zero_area_boxes", "has no area"),
        ([30, 10, 120, 40], "outside_boxes", "lies outside"),
        ([120, 10, 140, 40], "outside_boxes", "lies outside"),
        ([0, 10, 20, 40], None, ""),  # some VOC files count from 0: within the tolerance of one pixel
    ],
)
def test_bad_box(voc_tree, box, fault, said):
    bird = VOC_CLASSES.index("bird")
    image_id = f"0001{bird:02d}"
    write_voc_image(voc_tree / "VOC2007", image_id, [voc_object("bird", box), voc_object("bird", [1, 1, 9, 9])])
    full, report = load(voc_tree)  # official training set: counted, listed, dropped
    expected = {fault: 1} if fault else {}
    assert report.counts == expected and boxes(full) == 79 - bool(fault)
    test, test_report = load(
        voc_tree, part="test", sources=DatasetSources(root=voc_tree, voc_test=(("VOC2007", "trainval"),))
    )
    assert test_report.counts == expected and boxes(test) == 59  # ground truth stays
    if not fault:
        assert len(load(voc_tree, "novel", shot=2)[0]) == 10
        return
    assert f"{image_id}.xml" in report.details[0]
    with pytest.raises(ValueError) as error:  # K-shot sample: fatal
        load(voc_tree, "novel", shot=2)
    text = str(error.value)
    for word in (
        f"{image_id}.xml",
        f"image {image_id}",
        f"annotation {image_id}/0",
        said,
        "100 x 80",
        "prepare_voc.py",
    ):
        assert word in text
    assert "1 unusable" in text


def test_own_folder_in_voc_layout(tmp_path):
    """One folder of any name: ids with an underscore belong to it as well."""
    folder = tmp_path / "my_voc"
    for i, name in enumerate(VOC_CLASSES):
        write_voc_image(folder, f"a_{i}", [voc_object(name, [1, 1, 20, 30])])
        (folder / "lists" / "seed3").mkdir(parents=True, exist_ok=True)
        (folder / "lists" / "seed3" / f"box_1shot_{name}_train.txt").write_text(f"x/a_{i}.jpg\n")
    write_image_set(folder, "trainval", [f"a_{i}" for i in range(20)])
    sources = DatasetSources(root=tmp_path, samples=Path("my_voc/lists"), voc_train=(("my_voc", "trainval"),))
    records, _ = load(tmp_path, "all", sources=sources, shot=1, seed=3, split=2)
    assert len(records) == 20 and {Path(r["file_name"]).parent for r in records} == {folder / "JPEGImages"}
    assert len(load(tmp_path, "base", sources=sources)[0]) == 20


def test_folder_of_several(voc_tree, tmp_path):
    folders = [voc_tree / "VOC2007", voc_tree / "VOC2012"]
    assert folder_of("2008_000100", folders) == folders[1] and folder_of("000100", folders) == folders[0]
    write_voc_image(tmp_path / "one", "x_1", [])
    write_voc_image(tmp_path / "two", "x_2", [])
    own = [tmp_path / "one", tmp_path / "two"]
    assert [folder_of(i, own).name for i in ("x_1", "x_2", "x_3")] == ["one", "two", "one"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><size>", "not a VOC annotation file"),
        ("<annotation></annotation>", "not a VOC annotation file"),
        (
            "<annotation><size><width>5</width><height>5</height></size><object><name>bird</name></object></annotation>",
            "not a VOC annotation file",
        ),
    ],
)
def test_broken_annotation_file(voc_tree, text, message):
    (voc_tree / "VOC2007" / "Annotations" / "000100.xml").write_text(text)
    with pytest.raises(ValueError, match=f"000100.xml: {message}"):
        load(voc_tree)


def test_unknown_class_in_annotation(voc_tree):
    write_voc_image(voc_tree / "VOC2007", "000100", [voc_object("unicorn", [1, 1, 9, 9])])
    with pytest.raises(ValueError, match=r'000100.xml: unknown class "unicorn".*aeroplane.*custom'):
        load(voc_tree)


def test_missing_image_set(voc_tree):
    sources = DatasetSources(root=voc_tree, voc_test=(("VOC2012", "test"),))
    with pytest.raises(
        FileNotFoundError, match=r"VOC2012/ImageSets/Main/test.txt.*DETECTRON2_DATASETS.*where to get it"
    ):
        load(voc_tree, part="test", sources=sources)
    write_image_set(voc_tree / "VOC2012", "test", [])
    with pytest.raises(ValueError, match="the list is empty"):
        load(voc_tree, part="test", sources=sources)


def test_object_ids_are_places_in_the_file(voc_tree):
    image = read_voc_image(voc_tree / "VOC2007", "000100")
    assert [o.id for o in image.objects] == ["000100/0", "000100/1", "000100/2"]
