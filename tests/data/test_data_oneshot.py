"""One-shot sets: OS2D's CSV and COCO-format json, class pictures as supports, faults before training, real logos."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from data_trees import HEIGHT, WIDTH, box_of, coco_json, edit_json
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fsdet.data.catalog import (
    DatasetSources,
    DatasetSpec,
    check_sources,
    class_names,
    class_split,
    load_records,
    load_supports,
    new_report,
    register,
    sample_files,
)
from fsdet.data.mapper import ImageError
from fsdet.data.oneshot_files import read_annotation_file
from fsdet.data.prepare_oneshot import prepare_oneshot
from fsdet.data.support import SupportSet
from fsdet.evaluation.ground_truth import load_ground_truth

ROOT = Path(__file__).resolve().parents[2]
LOGOS = ROOT.parent / "shared" / "data" / "oneshot"
FILES = ["imageid", "imagefilename", "classid", "classfilename"]
HEADER = [*FILES, "gtbboxid", "difficult", "lx", "ty", "rx", "by", "split"]
# Scenes 1 and 2 train classes 7 and 1000000; 3 and 4 test them; 4 and 5 show the novel classes 9 and 12.
ROWS = [
    [1, "1.jpg", 7, "7.jpg", 1, 0, 0.1, 0.25, 0.5, 0.75, "train"],
    [1, "1.jpg", 1000000, "big.jpg", 2, 0, 0.5, 0.5, 1, 1, "train"],
    [2, "2.jpg", 7, "7.jpg", 3, 1, 0, 0, 0.2, 0.2, "train"],
    [3, "3.jpg", 7, "7.jpg", 4, 0, 0, 0, 0.3, 0.5, "old"],
    [4, "4.jpg", 1000000, "big.jpg", 5, 1, 0.2, 0.2, 0.4, 0.4, "old"],
    [4, "4.jpg", 9, "9.jpg", 6, 0, 0.6, 0.5, 0.9, 0.75, "new"],
    [5, "5.jpg", 12, "12.jpg", 7, 1, 0, 0, 0.5, 0.5, "new"],
]
CLASS_FILES = (
    "7.jpg",
    "7_b.jpg",
    "7_a.jpg",
    "7_c.png",
    "big.jpg",
    "9.jpg",
    "9_2.jpg",
    "9_2_x.jpg",
    "12.jpg",
    "77_b.jpg",
)


def write_csv(path, rows=ROWS, header=HEADER):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def tree(tmp_path, picture):
    """A set laid out as OS2D's: scenes of 100 x 80 pixels, scene 5 of 50 x 40; class pictures of 20 x 30."""
    root = tmp_path / "own"
    for folder in ("classes/images", "src"):
        (root / folder).mkdir(parents=True)
    for number in range(1, 5):
        shutil.copy(picture, root / "src" / f"{number}.jpg")
    Image.open(picture).resize((50, 40)).save(root / "src" / "5.jpg")
    for name in CLASS_FILES:
        Image.new("RGB", (20, 30), "red").save(root / "classes" / "images" / name)
    write_csv(root / "classes" / "own.csv")
    return root


def sources_of(root, **more):
    options = {"train_json": "classes/own.csv", "oneshot_sets": ("train", "old", "new"), **more}
    return DatasetSources(root=root, **options)


def spec_of(part="test", subset="all", **more):
    return DatasetSpec("oneshot", part, subset, **more)


def rows_of(records):
    """image id -> (annotation id, class id, difficult) of its boxes."""
    return {r["image_id"]: [(a["id"], a["category_id"], a["difficult"]) for a in r["annotations"]] for r in records}


def change_row(root, row, **values):
    rows = [list(r) for r in ROWS]
    for key, value in values.items():
        rows[row][HEADER.index(key)] = value
    write_csv(root / "classes" / "own.csv", rows)


def test_classes_of_training_are_base_and_others_novel(tree):
    split = class_split(spec_of(), sources_of(tree))
    assert split.base == ("own-7", "own-1000000")
    assert split.novel == ("own-9", "own-12")
    assert split.all == split.base + split.novel


def test_training_set_in_pixels(tree):
    records = load_records(spec_of("train", "base"), sources_of(tree))
    assert rows_of(records) == {1: [(1, 0, 0), (2, 1, 0)], 2: [(3, 0, 1)]}
    assert (records[0]["height"], records[0]["width"]) == (HEIGHT, WIDTH)
    assert records[0]["file_name"] == str(tree / "src" / "1.jpg")
    assert records[0]["annotations"][0]["bbox"] == pytest.approx([10, 20, 50, 60])
    assert all(a["iscrowd"] == 0 for r in records for a in r["annotations"])


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        ("base", {3: [(4, 0, 0)], 4: [(5, 1, 1)], 5: []}),
        ("novel", {3: [], 4: [(6, 0, 0)], 5: [(7, 1, 1)]}),
        ("all", {3: [(4, 0, 0)], 4: [(5, 1, 1), (6, 2, 0)], 5: [(7, 3, 1)]}),
    ],
)
def test_every_validation_image_is_a_test_image(tree, subset, expected):
    assert rows_of(load_records(spec_of(subset=subset), sources_of(tree))) == expected


def test_boxes_follow_the_size_of_each_scene(tree):
    records = load_records(spec_of(subset="novel"), sources_of(tree))
    assert records[1]["annotations"][0]["bbox"] == pytest.approx([60, 40, 90, 60])
    assert records[2]["annotations"][0]["bbox"] == pytest.approx([0, 0, 25, 20])


def test_scene_turned_by_its_exif_data(tree, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(picture).save(tree / "src" / "4.jpg", exif=exif)
    record = load_records(spec_of(subset="novel"), sources_of(tree))[1]
    assert (record["height"], record["width"]) == (WIDTH, HEIGHT)
    assert record["annotations"][0]["bbox"] == pytest.approx([48, 50, 72, 75])


def test_difficult_objects(tree):
    """Dropped from training on demand, plain ones where the flags are cleared, ignored in a test."""
    sources = sources_of(tree)
    assert rows_of(load_records(spec_of("train", "base", difficult=False), sources))[2] == []
    cleared = spec_of(clear_difficult=True)
    assert all(not d for row in rows_of(load_records(cleared, sources)).values() for _, _, d in row)
    assert spec_of("train", "base", difficult=False).name == "oneshot_train_base_no-difficult"
    assert cleared.name == "oneshot_test_all_clear-difficult"


def test_registered_set_and_its_ground_truth(tree, clean_catalogs):
    name = register(spec_of(), sources_of(tree))
    metadata = MetadataCatalog.get(name)
    assert name == "oneshot_test_all"
    assert (metadata.base_classes, metadata.novel_classes) == (["own-7", "own-1000000"], ["own-9", "own-12"])
    truth = load_ground_truth(name)
    assert truth.counted_objects().tolist() == [1, 0, 1, 0]
    assert len(truth.image_ids) == len(DatasetCatalog.get(name)) == 3


def test_two_files_without_the_column(tree):
    """A set of its own tested after another training: equal ids are other classes, "" takes all rows."""
    header = [name for name in HEADER if name != "split"]
    write_csv(tree / "classes" / "dairy.csv", [row[:-1] for row in ROWS[3:]], header)
    sources = sources_of(tree, test_json="classes/dairy.csv", oneshot_sets=("train", "", ""))
    split = class_split(spec_of(), sources)
    assert split.base == ("own-7", "own-1000000")
    assert split.novel == ("dairy-7", "dairy-9", "dairy-12", "dairy-1000000")
    assert rows_of(load_records(spec_of(subset="novel"), sources)) == {
        3: [(4, 0, 0)], 4: [(5, 3, 1), (6, 1, 0)], 5: [(7, 2, 1)],
    }  # fmt: skip
    alone = DatasetSources(root=tree, test_json="classes/dairy.csv", oneshot_sets=("train", "", ""))
    assert class_split(spec_of(), alone).all == split.novel
    report = new_report(spec_of(subset="base"))
    load_records(spec_of(subset="base"), sources, report)
    assert report.counts["tests_without_objects"] == 1


def test_names_of_classes_and_defaults_of_files(tree):
    """A column "classname" names classes in all files alike; without file names ids with .jpg are meant."""
    header = ["imageid", "classid", "classname", "gtbboxid", "difficult", "lx", "ty", "rx", "by"]
    rows = [["3", "7", "mug", 1, 0, 0, 0, 1, 1], ["4", "12", "plate", 2, 0, 0, 0, 1, 1]]
    write_csv(tree / "classes" / "own.csv", rows[:1], header)
    write_csv(tree / "classes" / "other.csv", rows, header)
    sources = sources_of(tree, test_json="classes/other.csv", oneshot_sets=("", "", ""))
    split = class_split(spec_of(), sources)
    assert (split.base, split.novel) == (("mug",), ("plate",))
    assert [Path(r["file_name"]).name for r in load_records(spec_of(), sources)] == ["3.jpg", "4.jpg"]
    assert [p.name for p in sample_files(spec_of("train", "all", shot=1), sources)] == ["7.jpg", "12.jpg"]


def test_text_ids_stay_text(tree):
    rows = [[f"0{row[0]}", *row[1:]] for row in ROWS]
    write_csv(tree / "classes" / "own.csv", rows)
    assert list(rows_of(load_records(spec_of(), sources_of(tree)))) == ["03", "04", "05"]


def test_test_list(tree):
    (tree / "list.txt").write_text("5\n3\n")
    sources = sources_of(tree, test_list=tree / "list.txt")
    assert list(rows_of(load_records(spec_of(), sources))) == [3, 5]


def test_rows_that_no_set_uses_are_counted(tree):
    sources = sources_of(tree, oneshot_sets=("train", "new", "train"))  # class 9 of "new" is neither
    report = new_report(spec_of(subset="base"))
    load_records(spec_of(subset="base"), sources, report)
    assert report.counts["boxes_of_neither_base_nor_novel_classes"] == 2
    assert report.counts["test_images_of_the_training_set"] == 2


# --- class pictures ---


def test_first_pictures_of_each_class(tree):
    """Its own picture, then those of its stem, sorted; "9_2_x" is none of a class "9_2" as long as there is none."""
    shots = {name: [] for name in ("own-7", "own-1000000", "own-9", "own-12")}
    for record in load_supports(spec_of("train", "all"), sources_of(tree)):
        shots[tuple(shots)[record["annotations"][0]["category_id"]]].append(Path(record["file_name"]).name)
    assert shots == {
        "own-7": ["7.jpg", "7_a.jpg", "7_b.jpg", "7_c.png"],
        "own-1000000": ["big.jpg"],
        "own-9": ["9.jpg", "9_2.jpg", "9_2_x.jpg"],
        "own-12": ["12.jpg"],
    }


def test_pictures_of_a_class_with_a_longer_name(tree):
    rows = [[*row[:2], "9_2", "9_2.jpg", *row[4:]] if row[2] == 12 else row for row in ROWS]
    write_csv(tree / "classes" / "own.csv", rows)
    found = load_supports(spec_of("train", "novel"), sources_of(tree))
    assert [(r["annotations"][0]["category_id"], Path(r["file_name"]).name) for r in found] == [
        (0, "9.jpg"), (1, "9_2.jpg"), (1, "9_2_x.jpg"),
    ]  # fmt: skip


def test_shots_are_whole_class_pictures(tree):
    """Seed 0 takes the first K; the records are supports as they are."""
    spec, sources = spec_of("train", "base", shot=1), sources_of(tree)
    check_sources(spec, sources)
    records = load_records(spec, sources)
    assert [Path(r["file_name"]).name for r in records] == ["7.jpg", "big.jpg"]
    assert records[0]["annotations"][0]["bbox"] == [0, 0, 20, 30]
    support_set = SupportSet.from_records(load_supports(spec, sources), class_names(spec, sources))
    assert [s.box for s in support_set.shots("own-7")] == [(0, 0, 20, 30)]
    assert sample_files(spec, sources) == [Path(r["file_name"]) for r in records]


def test_other_seeds_draw(tree):
    write_csv(tree / "classes" / "own.csv", [row for row in ROWS if row[2] == 7])
    sources = sources_of(tree, oneshot_sets=("train", "old", "train"))
    drawn = {
        seed: tuple(p.stem for p in sample_files(spec_of("train", "base", shot=2, seed=seed), sources))
        for seed in range(6)
    }
    assert drawn[0] == ("7", "7_a")
    assert len(set(drawn.values())) > 2
    assert all(len(set(names)) == 2 for names in drawn.values())
    report = new_report(spec_of("train", "base", shot=2, seed=3))
    load_records(spec_of("train", "base", shot=2, seed=3), sources, report)
    assert [Path(name).stem for name in report.chosen["own-7"]] == list(drawn[3])


def test_more_shots_than_pictures(tree):
    with pytest.raises(
        ValueError, match=r"SHOT is 3, but 2 class\(es\).*'own-1000000': 1.*'own-12': 1.*classes/images"
    ):
        load_records(spec_of("train", "all", shot=3), sources_of(tree))


def test_supports_of_other_benchmarks_are_their_shots(own_tree):
    sources = DatasetSources(root=own_tree, train_json="train.json", novel_classes=["gizmo"])
    spec = DatasetSpec("custom", "train", "novel", shot=1)
    assert load_supports(spec, sources) == load_records(spec, sources)


# --- COCO-format json ---


@pytest.fixture
def json_tree(tree):
    """The same scenes as two json files; class 7 has its picture under its id, "big" under its name."""
    names = {7: "seven", 8: "big", 9: "nine"}
    scenes = {number: (number, f"{number}.jpg") for number in range(1, 5)}
    train = [box_of(1, 1, 7, [10, 20, 40, 40], difficult=1, iscrowd=1), box_of(2, 2, 8, [0, 0, 9, 9], iscrowd=1)]
    test = [box_of(1, 3, 9, [0, 0, 30, 40], area=7.5), box_of(2, 3, 7, [5, 5, 5, 5])]
    (tree / "train.json").write_text(json.dumps(coco_json([scenes[1], scenes[2]], train, names)))
    (tree / "test.json").write_text(json.dumps(coco_json([scenes[4], scenes[3]], test, names)))
    return tree


def json_sources(root):
    return DatasetSources(root=root, train_json="train.json", test_json="test.json")


def test_json_files(json_tree):
    sources = json_sources(json_tree)
    split = class_split(spec_of(), sources)
    assert (split.base, split.novel) == (("seven", "big"), ("nine",))  # categories without a box are not there
    check_sources(spec_of(), sources)
    train = load_records(spec_of("train", "base"), sources)
    first, crowd = (record["annotations"][0] for record in train)
    assert (first["bbox"], first["difficult"], first["iscrowd"]) == ([10, 20, 50, 60], 1, 0)
    assert (crowd["difficult"], crowd["iscrowd"]) == (0, 1)
    test = load_records(spec_of(subset="novel"), sources)
    assert rows_of(test) == {3: [(1, 0, 0)], 4: []}
    assert test[0]["annotations"][0]["area"] == 7.5
    assert Path(test[0]["file_name"]) == json_tree / "src" / "3.jpg"


def test_class_pictures_of_json_files(json_tree):
    """By the name, by the id, or as the category says."""
    sources = json_sources(json_tree)
    spec = spec_of("train", "all", shot=1)
    assert [p.name for p in sample_files(spec, sources)] == ["7.jpg", "big.jpg", "9.jpg"]
    edit_json(json_tree / "test.json", lambda data: data["categories"][2].update(class_image="12.jpg"))
    assert sample_files(spec_of("train", "novel", shot=1), sources)[0].name == "12.jpg"


def test_json_box_of_text(json_tree):
    edit_json(json_tree / "test.json", lambda data: data["annotations"][1].update(bbox=[1, 2, "wide", 4]))
    with pytest.raises(ValueError, match=r"test.json: 1 fault.*\n.*annotation 2: bbox .*x, y, width, height"):
        load_records(spec_of(), json_sources(json_tree))


def test_scene_of_a_json_is_missing(json_tree):
    (json_tree / "src" / "4.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"test.json names 1 scene\(s\).*src: 4.jpg.*TEST_IMAGES"):
        check_sources(spec_of(), json_sources(json_tree))


# --- faults ---


@pytest.mark.parametrize(
    ("row", "values", "message"),
    [
        (3, {"lx": 0.3}, r"image 3, annotation row 5: box .* has no area of 100 x 80"),
        (
            3,
            {"rx": 1.02},
            r"image 3, annotation row 5: box .*102, 40\) lies outside .*\n.*fractions of width and height",
        ),
        (3, {"ty": "nan"}, r"annotation row 5: box"),
        (3, {"by": ""}, r"row 5: by empty"),
        (3, {"by": "half"}, r"row 5: could not convert string to float: 'half'"),
        (3, {"difficult": "maybe"}, r'row 5: difficult is "maybe"; expected 1 or 0'),
        (
            3,
            {"classfilename": "8.jpg"},
            r'rows 2 and 5 give the class "7" two values of classfilename: "7.jpg" and "8.jpg"',
        ),
        (5, {"imagefilename": "9.jpg"}, r'rows 6 and 7 give the image "4" two values of imagefilename'),
    ],
)
def test_faulty_rows(tree, row, values, message):
    change_row(tree, row, **values)
    for check in (check_sources, load_records):
        with pytest.raises(ValueError, match=message) as error:
            check(spec_of(), sources_of(tree))
        assert "own.csv" in str(error.value)
        assert "Correct" in str(error.value)


def test_box_may_miss_the_border_by_rounding(tree):
    change_row(tree, 3, rx=1.0001)
    load_records(spec_of(), sources_of(tree))


def test_missing_columns(tree):
    write_csv(tree / "classes" / "own.csv", [row[:6] for row in ROWS], HEADER[:6])
    with pytest.raises(
        ValueError, match=r"own.csv: the columns \['lx', 'ty', 'rx', 'by'\] are missing, found \['imageid'"
    ):
        check_sources(spec_of(), sources_of(tree))


def test_empty_and_unreadable_csv(tree):
    path = write_csv(tree / "classes" / "own.csv", [])
    with pytest.raises(ValueError, match="own.csv: no row below the header"):
        check_sources(spec_of(), sources_of(tree))
    path.write_bytes(b"imageid\xff\xfe")
    with pytest.raises(ValueError, match="own.csv: not a CSV file"):
        check_sources(spec_of(), sources_of(tree))
    with pytest.raises(FileNotFoundError, match=r"gone.csv: no such annotation file; .*FEWSHOT.TRAIN_JSON"):
        check_sources(spec_of(), sources_of(tree, train_json="gone.csv"))


def test_csv_that_changes_is_read_again(tree):
    path = tree / "classes" / "own.csv"
    assert len(read_annotation_file(path).boxes) == 7
    assert read_annotation_file(path) is read_annotation_file(path)
    write_csv(path, ROWS[:3])
    assert len(read_annotation_file(path).boxes) == 3


def test_unknown_set_names(tree):
    with pytest.raises(
        ValueError, match=r'"val" in the column "split"; it has \[\'train\', \'old\', \'new\'\].*ONESHOT_SETS'
    ):
        check_sources(spec_of(), sources_of(tree, oneshot_sets=("train", "val", "new")))
    write_csv(tree / "classes" / "own.csv", [row[:-1] for row in ROWS], HEADER[:-1])
    with pytest.raises(ValueError, match=r"it has no such column.*ONESHOT_SETS"):
        check_sources(spec_of(), sources_of(tree))
    with pytest.raises(ValueError, match=r"ONESHOT_SETS is \('train', 'new'\); expected three"):
        sources_of(tree, oneshot_sets=("train", "new"))


def test_no_class_of_a_subset(tree):
    sources = sources_of(tree, oneshot_sets=("", "", ""))  # everything is trained on
    with pytest.raises(ValueError, match=r"own.csv: no novel class with the sets .*ONESHOT_SETS"):
        check_sources(spec_of(subset="novel"), sources)
    with pytest.raises(ValueError, match=r"train part of a one-shot set needs FEWSHOT.TRAIN_JSON"):
        load_records(
            spec_of("train", "all"), DatasetSources(root=tree, test_json="classes/own.csv", oneshot_sets=[""] * 3)
        )
    with pytest.raises(ValueError, match=r"test part of a one-shot set needs FEWSHOT.TEST_JSON"):
        class_names(spec_of(), DatasetSources(root=tree))


def test_missing_and_broken_scenes(tree):
    (tree / "src" / "4.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"4.jpg: this image cannot be read .*Replace or remove"):
        check_sources(spec_of(), sources_of(tree))
    for name in ("3.jpg", "4.jpg"):
        (tree / "src" / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"own.csv names 2 scene\(s\) .*src: 3.jpg, 4.jpg. .*FEWSHOT.TRAIN_IMAGES"
    ):
        check_sources(spec_of(), sources_of(tree))
    check_sources(spec_of("train", "base"), sources_of(tree))  # which needs neither


@pytest.mark.parametrize("shot", [0, 1])
def test_missing_and_broken_class_pictures(tree, shot):
    spec = spec_of("train", "base", shot=shot)
    picture = tree / "classes" / "images" / "big.jpg"
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"big.jpg: this image cannot be read"):
        check_sources(spec, sources_of(tree))
    picture.unlink()
    with pytest.raises(FileNotFoundError, match=r"images/big.jpg \(own-1000000\).*FEWSHOT.CLASS_IMAGES"):
        check_sources(spec, sources_of(tree))
    with pytest.raises(FileNotFoundError, match=r"2 class\(es\) without a picture: .*gone/7.jpg"):
        check_sources(spec, sources_of(tree, class_images="gone"))


# --- CSV to json ---


def run_script(*arguments):
    spec = importlib.util.spec_from_file_location("prepare_oneshot", ROOT / "datasets" / "prepare_oneshot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def test_json_beside_the_csv_gives_the_same_records(tree, capsys):
    path = tree / "classes" / "own.csv"
    assert run_script("--csv", path) == 0
    assert "own_new.json: new: 2 images, 2 boxes (1 difficult), 2 classes" in capsys.readouterr().out
    written = json.loads((path.parent / "own_new.json").read_text())
    assert [(a["bbox"], a["iscrowd"], a["difficult"]) for a in written["annotations"]] == [
        ([60, 40, 30, 20], 0, 0), ([0, 0, 25, 20], 1, 1),
    ]  # fmt: skip
    sources = DatasetSources(root=path.parent, train_json="own_train.json", test_json="own_new.json")
    assert class_split(spec_of(), sources) == class_split(spec_of(), sources_of(tree))
    check_sources(spec_of(), sources)
    same = load_records(spec_of("train", "base"), sources)
    for ours, theirs in zip(load_records(spec_of("train", "base"), sources_of(tree)), same, strict=True):
        assert rows_of([ours]) == rows_of([theirs])
        assert ours["file_name"] == theirs["file_name"]
    supports = spec_of("train", "all", shot=1)
    assert sample_files(supports, sources) == sample_files(supports, sources_of(tree))


def test_check_of_the_script_writes_nothing(tree, capsys):
    path = tree / "classes" / "own.csv"
    assert run_script("--csv", path, "--check") == 0
    assert "old: 2 images, 2 boxes (1 difficult), 2 classes" in capsys.readouterr().out
    change_row(tree, 2, lx=0.9)
    assert run_script("--csv", path) == 1
    assert "row 4" in capsys.readouterr().err
    assert run_script("--csv", tree / "train.json") == 1
    assert not list(tree.rglob("*.json"))


def test_text_ids_become_numbers_in_json(tree):
    rows = [[f"s{row[0]}", *row[1:4], 1, *row[5:]] for row in ROWS]  # annotation ids repeat
    write_csv(tree / "classes" / "own.csv", rows)
    files, _ = prepare_oneshot(tree / "classes" / "own.csv")
    data = json.loads(files[tree / "classes" / "own_train.json"])
    assert [image["id"] for image in data["images"]] == [1, 2]
    assert [(a["id"], a["image_id"], a["category_id"]) for a in data["annotations"]] == [
        (1, 1, 7), (2, 1, 1000000), (3, 2, 7),
    ]  # fmt: skip


# --- the logos ---


@pytest.mark.skipif(not LOGOS.is_dir(), reason="the logos are not here")
@pytest.mark.parametrize("form", ["csv", "json"])
def test_numbers_of_the_logos(form):
    """As published with the pack; a CSV's tests have the images of both, a json its own."""
    if form == "csv":
        sets = {part: DatasetSources(root=LOGOS, train_json="classes/logos.csv") for part in ("train", "base", "novel")}
    else:
        files = {"train": "coco_val-new-cl.json", "base": "coco_val-old-cl.json", "novel": "coco_val-new-cl.json"}
        sets = {k: DatasetSources(root=LOGOS, train_json="coco_train.json", test_json=v) for k, v in files.items()}
    expected = {"train": (360, 533, 20), "base": (160, 217, 20), "novel": (182, 371, 7)}
    for key, (images, boxes, classes) in expected.items():
        spec = spec_of("train", "base") if key == "train" else spec_of(subset=key)
        records = load_records(spec, sets[key])
        shown = {a["category_id"] for r in records for a in r["annotations"]}
        assert sum(bool(r["annotations"]) for r in records) == images
        assert len(records) == (342 if form == "csv" and key != "train" else images)
        assert sum(len(r["annotations"]) for r in records) == boxes
        assert len(shown) == len(class_names(spec, sets[key])) == classes
    supports = load_supports(spec_of("train", "novel", shot=2), sets["novel"])
    assert [Path(r["file_name"]).name for r in supports][:4] == ["3.jpg", "3_b.jpg", "4.jpg", "4_b.jpg"]
    assert len(load_supports(spec_of("train", "base"), sets["train"])) == 40
