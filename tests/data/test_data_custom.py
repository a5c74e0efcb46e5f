"""Own data in COCO format: classes by name, consistency, fatal faults."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from data_trees import edit_json

from fsdet.data import custom
from fsdet.data.catalog import DatasetSources, DatasetSpec, check_sources, class_names, load_records

ROOT = Path(__file__).resolve().parents[2]


def sources_of(root, **more):
    options = {"train_json": "train.json", "test_json": "test.json", "novel_classes": ["gizmo"], **more}
    return DatasetSources(root=root, **options)


def load(root, subset="all", part="train", sources=None, **options):
    return load_records(DatasetSpec("custom", part, subset, **options), sources or sources_of(root))


def test_classes_follow_the_ids_of_the_training_file(own_tree):
    sources = sources_of(own_tree)
    by_subset = {
        subset: class_names(DatasetSpec("custom", "train", subset), sources) for subset in ("all", "base", "novel")
    }
    assert by_subset == {"all": ("widget", "gadget", "gizmo"), "base": ("widget", "gadget"), "novel": ("gizmo",)}


def test_full_set(own_tree):
    records = load(own_tree)
    assert [r["image_id"] for r in records] == [1, 2, 3, 4]
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [[0, 1], [0, 2], [2], [0]]
    assert Path(records[0]["file_name"]) == own_tree / "train" / "1.jpg"  # the folder beside the json, by its name
    assert [len(r["annotations"]) for r in load(own_tree, "base")] == [2, 1, 0, 1]


def test_test_file_may_number_the_classes_otherwise(own_tree):
    records = load(own_tree, part="test")
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [[1], [0]]  # gadget, widget
    assert Path(records[0]["file_name"]) == own_tree / "test" / "1.jpg"


@pytest.mark.parametrize(("leak", "images", "regions"), [("background", 4, 0), ("drop", 2, 0), ("ignore", 4, 2)])
def test_leak_policies(own_tree, leak, images, regions):
    records = load(own_tree, "base", leak=leak)
    assert (len(records), sum(len(r.get("ignore_regions", ())) for r in records)) == (images, regions)


def test_shots_of_novel_classes_alone(own_tree):
    """Novel-only data: no base stage, every class is novel."""
    sources = sources_of(own_tree, novel_classes=["widget", "gadget", "gizmo"])
    spec = DatasetSpec("custom", "train", "novel", shot=1)
    check_sources(spec, sources)
    records = load_records(spec, sources)
    assert [r["annotations"][0]["id"] for r in records] == [1, 2, 5]
    with pytest.raises(ValueError, match=r"train.json: no base class is left"):
        load(own_tree, "base", sources=sources)


def test_no_novel_class_named(own_tree):
    with pytest.raises(ValueError, match=r"no novel class is left.*FEWSHOT.NOVEL_CLASSES"):
        load(own_tree, "novel", sources=sources_of(own_tree, novel_classes=()))


def test_unknown_novel_class(own_tree):
    with pytest.raises(ValueError, match=r"train.json.*\['unicorn'\].*widget.*FEWSHOT.NOVEL_CLASSES"):
        load(own_tree, "novel", sources=sources_of(own_tree, novel_classes=["unicorn"]))


def test_no_json_configured(tmp_path):
    with pytest.raises(ValueError, match=r"FEWSHOT.TRAIN_JSON"):
        load(tmp_path, sources=DatasetSources(root=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"gone.json.*FEWSHOT.TRAIN_JSON.*DETECTRON2_DATASETS"):
        load(tmp_path, sources=DatasetSources(root=tmp_path, train_json=Path("gone.json")))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_command_in_the_message_draws_the_lists(own_tree, tmp_path, monkeypatch, elsewhere):
    """Beside the 1-shot lists that are there, of the novel class alone: the others have too few objects."""
    sources = sources_of(own_tree, samples=tmp_path / "my lists") if elsewhere else sources_of(own_tree)
    (own_tree / "samples" / "seed0").mkdir()
    for path in (own_tree / "samples").glob("*.json"):
        path.rename(path.parent / "seed0" / path.name)
    with pytest.raises(FileNotFoundError, match=r"full_box_2shot_gizmo.*FEWSHOT.SAMPLES.*DETECTRON2_DATASETS") as error:
        load(own_tree, "novel", sources=sources, shot=2)
    words = shlex.split(re.search("`(.*)`", str(error.value))[1])
    assert words[:2] == ["python", "datasets/prepare_custom.py"]
    assert ("1" in words, "--force" in words, "--output" in words) == (not elsewhere, not elsewhere, elsewhere)
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    assert stop.value.code == 0
    assert len(load(own_tree, "novel", sources=sources, shot=2)) == 2
    if not elsewhere:
        assert len(load(own_tree, "novel", shot=1)) == 1


def test_test_json_missing(own_tree):
    sources = sources_of(own_tree, test_json=None)
    with pytest.raises(ValueError, match=r"FEWSHOT.TEST_JSON"):
        load(own_tree, part="test", sources=sources)


def test_evaluation_alone_takes_the_classes_of_the_test_file(own_tree):
    sources = sources_of(own_tree, train_json=None)
    assert class_names(DatasetSpec("custom", "test", "all"), sources) == ("gadget", "gizmo", "widget")


def test_class_that_training_does_not_have(own_tree):
    edit_json(own_tree / "test.json", lambda data: data["categories"].append({"id": 8, "name": "unicorn"}))
    spec, sources = DatasetSpec("custom", "test", "all"), sources_of(own_tree)
    for check in (check_sources, load_records):
        with pytest.raises(ValueError, match=r"test.json: unknown classes \['unicorn'\]; .*train.json"):
            check(spec, sources)


@pytest.mark.parametrize("box", [[1, 1, 0, 5], [90, 10, 30, 5]])
@pytest.mark.parametrize("part", ["train", "test"])
def test_bad_box_is_fatal_in_own_data(own_tree, part, box):
    edit_json(own_tree / f"{part}.json", lambda data: data["annotations"][1].update(bbox=box))
    with pytest.raises(ValueError) as error:
        load(own_tree, part=part)
    for word in (f"{part}.json", "annotation 2", "100 x 80", "Correct or remove"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["annotations"][0].pop("id"), r'"annotations" entry 0 lacks \[\'id\'\]'),
        (lambda data: data["images"][2].pop("height"), r'"images" entry 2 lacks \[\'height\'\]'),
        (lambda data: data["annotations"][1].update(image_id=99), "annotation 2 of image 99: unknown image 99"),
        (lambda data: data["annotations"][1].update(category_id=99), "annotation 2 of image 1: unknown class id 99"),
        (lambda data: data["annotations"][1].update(id=1), '"annotations": 1 ids occur more than once'),
        (lambda data: data["images"][1].update(id=4), '"images": 1 ids occur more than once'),
        (lambda data: data["categories"][1].update(name="gizmo"), r"the names \['gizmo'\]"),
        (lambda data: data["categories"][1].pop("name"), r'"categories" entry 1 lacks'),
        (lambda data: data["categories"][1].update(name=7), r'"categories": the name 7 is no text'),
        (lambda data: data.pop("categories"), r"\['categories'\] are missing"),
    ],
)
def test_inconsistent_file(own_tree, change, message):
    edit_json(own_tree / "train.json", change)
    with pytest.raises(ValueError, match=f"(?s)train.json.*{message}"):
        load(own_tree)


def test_a_long_list_of_faults_is_cut(own_tree):
    def break_all(data):
        data["annotations"] = [{**data["annotations"][0], "id": i, "image_id": 50 + i} for i in range(30)]

    edit_json(own_tree / "train.json", break_all)
    with pytest.raises(ValueError, match=r"and 20 more\nCorrect the file"):
        load(own_tree)


class TestCategories:
    def test_cut_out_without_parsing_the_rest(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text('{"annotations": [broken, "categories": [{"id": 2, "name": "b"}, {"id": 1, "name": "a, [c]"}]')
        assert list(custom.read_categories(path).items()) == [(1, "a, [c]"), (2, "b")]

    def test_key_in_another_place_forces_a_full_parse(self, tmp_path):
        path = tmp_path / "a.json"
        data = {"info": {"categories": [{"id": 1, "name": "not this"}]}, "images": [], "annotations": []}
        path.write_text(json.dumps({**data, "categories": [{"id": 3, "name": "this"}]}))
        assert custom.read_categories(path) == {3: "this"}

    def test_changed_file_is_read_again(self, own_tree):
        path = own_tree / "train.json"
        assert 9 in custom.read_categories(path)
        edit_json(path, lambda data: data["categories"].pop())
        stat = path.stat()
        import os

        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10))
        assert len(custom.read_categories(path)) == 2
