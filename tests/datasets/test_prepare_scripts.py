"""The scripts of datasets/ from their command lines: golden lists, faults before anything is written, voc_small."""

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fsdet.data.catalog import DatasetSources, DatasetSpec, check_sources, load_records
from fsdet.data.fake_tree import voc_xml, write_fake_tree
from fsdet.data.seeds import check_manifest
from fsdet.data.splits import COCO_CLASSES, VOC_CLASSES

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "defrcn"
VOC_SMALL = ROOT.parent / "shared" / "data" / "voc_small"
COCO_SMALL = ROOT.parent / "shared" / "data" / "coco_small"
SCRIPTS = ("prepare_voc", "prepare_coco", "prepare_custom", "prepare_fewx", "prepare_oneshot", "prepare_voc_small")


def run(script, *arguments):
    """Exit status of a script run in this process."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "datasets" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def golden(name):
    return json.loads(gzip.decompress((GOLDEN / name).read_bytes()))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """VOC and COCO trees of the golden data, without lists."""
    root = tmp_path_factory.mktemp("golden_tree")
    write_fake_tree(root, golden("e_fake_datasets.json.gz"), {"voc": {}, "coco": {}})
    return root


def own_json(tmp_path, sizes=(1, 1, 2, 1)):
    """COCO json of one class "cup", an image for each size."""
    path = tmp_path / "own" / "train.json"
    path.parent.mkdir(exist_ok=True)
    boxes = [(image, [5 + 9 * j, 5, 8, 8]) for image, size in enumerate(sizes, start=1) for j in range(size)]
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 50, "width": 60} for i in range(1, len(sizes) + 1)],
        "annotations": [{"id": i, "image_id": at, "category_id": 1, "bbox": box} for i, (at, box) in enumerate(boxes)],
        "categories": [{"id": 1, "name": "cup"}],
    }
    path.write_text(json.dumps(data))
    return path


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as status:
        run(script, "--help")
    text = capsys.readouterr().out
    assert status.value.code == 0 and f"python datasets/{script}.py" in text and "--force" in text


def test_script_in_a_process_of_its_own(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "datasets" / "prepare_custom.py"),
        "--json",
        str(own_json(tmp_path)),
        "--shots",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, "1", "9"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith('prepare_custom: 9 shots of "cup" need 9 instances') and done.stderr.count("\n") == 1


def test_legacy_voc_lists_equal_golden(tree, tmp_path):
    arguments = ("--root", tree, "--algorithm", "legacy", "--seeds", "0-2", "--output", tmp_path)
    assert run("prepare_voc", *arguments) == 0
    written = {name: text.decode() for name, text in files_of(tmp_path).items() if name.endswith(".txt")}
    assert written == golden("e_fewshot_sampling.json.gz")["voc"]


def test_legacy_coco_lists_equal_golden(tree, tmp_path):
    assert run("prepare_coco", "--root", tree, "--algorithm", "legacy", "--seeds", "0-2", "--output", tmp_path) == 0
    written = {}
    for name, text in files_of(tmp_path).items():
        if "shot_" in name:
            data = json.loads(text)
            image_ids, ann_ids = ([row["id"] for row in data[key]] for key in ("images", "annotations"))
            written[name] = {"image_ids": image_ids, "ann_ids": ann_ids}
    assert written == golden("e_fewshot_sampling.json.gz")["coco"]


def test_strict_coco_lists_hold_exactly_k(tree, tmp_path, capsys):
    assert run("prepare_coco", "--root", tree, "--seeds", "3", "--shots", 1, 10, 30, "--output", tmp_path) == 0
    assert "drawn pictures are not below" in capsys.readouterr().err  # the golden tree has no pictures
    sources = DatasetSources(tree, samples=tmp_path)
    records = load_records(DatasetSpec("coco", "train", "all", shot=10, seed=3), sources)
    classes = [record["annotations"][0]["category_id"] for record in records]
    assert all(classes.count(i) == 10 for i in range(len(COCO_CLASSES))) and len(classes) == 800
    manifest = check_manifest(tmp_path, 3)
    assert (manifest["algorithm"], manifest["shots"], manifest["unit"]) == ("strict", [1, 10, 30], "image")
    assert run("prepare_coco", "--check", tmp_path) == 0
    assert capsys.readouterr().out == "240 lists, with nothing to report\n"


def test_strict_voc_lists_and_check(tree, tmp_path, capsys):
    arguments = ("--root", tree, "--seeds", "0,5", "--shots", 1, 2, 3)
    assert run("prepare_voc", *arguments, "--output", tmp_path / "strict") == 0
    assert run("prepare_voc", "--root", tree, "--check", tmp_path / "strict") == 0
    assert capsys.readouterr().out.endswith("120 lists, with nothing to report\n")
    assert run("prepare_voc", *arguments, "--algorithm", "legacy", "--output", tmp_path / "legacy") == 0
    assert run("prepare_voc", "--root", tree, "--check", tmp_path / "legacy") == 0
    *lines, last = capsys.readouterr().out.splitlines()[1:]
    assert "overfull_lists" in last and "repeated_entries" in last and len(lines) > 10
    text = (tmp_path / "strict" / "seed5" / "box_2shot_cow_train.txt").read_text()
    (tmp_path / "strict" / "seed5" / "box_2shot_cow_train.txt").write_text(text[: text.index("\n") + 1])
    assert run("prepare_voc", "--root", tree, "--check", tmp_path / "strict") == 1
    assert "does not fit its K-shot lists" in capsys.readouterr().err


def test_too_many_shots_write_nothing(tree, tmp_path, capsys):
    assert run("prepare_voc", "--root", tree, "--shots", 1, 500, "--output", tmp_path / "o") == 1
    message = capsys.readouterr().err
    assert '500 shots of "aeroplane" need 500 instances' in message and "K up to 1 (--shots)" in message
    assert message.count("need 500 instances") == 10 and "and 10 more classes" in message
    assert not (tmp_path / "o").exists()


def test_missing_input_is_named(tmp_path, capsys):
    for script, arguments, name in (
        ("prepare_voc", ("--root", tmp_path), "VOC2007/ImageSets/Main/trainval.txt"),
        ("prepare_voc", ("--root", tmp_path, "--image-sets", "VOC2007"), "FOLDER:SET"),
        ("prepare_coco", ("--root", tmp_path), "cocosplit/datasplit/trainvalno5k.json"),
        ("prepare_coco", ("--root", tmp_path, "--json", tmp_path / "a.json"), "a.json"),
        ("prepare_custom", ("--json", tmp_path / "b.json"), "b.json"),
        ("prepare_voc_small", ("--source", tmp_path / "VOC2007"), "000023.xml"),
    ):
        assert run(script, *arguments) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"{script}: ") and name in message
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_without_force(tmp_path, capsys):
    path = own_json(tmp_path)
    arguments = ("--json", path, "--shots", 1, 2, "--seeds", "0-1")
    assert run("prepare_custom", *arguments) == 0
    first = files_of(path.parent / "samples")
    assert len(first) == 6
    assert run("prepare_custom", *arguments) == 0  # the same content again
    assert run("prepare_custom", *arguments, "--name", "other") == 1
    assert "exists with other content" in capsys.readouterr().err
    assert files_of(path.parent / "samples") == first
    assert run("prepare_custom", *arguments, "--name", "other", "--force") == 0
    assert files_of(path.parent / "samples") != first
    assert check_manifest(path.parent / "samples", 0)["dataset"] == "other"


def test_own_lists_train_as_drawn(tmp_path, capsys):
    path = own_json(tmp_path)
    assert run("prepare_custom", "--json", path, "--shots", 1, 3, "--seeds", "2") == 0
    sources = DatasetSources(path.parent, train_json=path, novel_classes=("cup",))
    records = load_records(DatasetSpec("custom", "train", "novel", shot=3, seed=2), sources)
    assert len(records) == 3
    with pytest.raises(FileNotFoundError, match="5-shot list"):
        check_sources(DatasetSpec("custom", "train", "novel", shot=5, seed=2), sources)
    for shots, wanted in (((6,), "need 6 instances"), ((0,), "must be positive"), ((2, 1), "must be positive")):
        assert run("prepare_custom", "--json", path, "--shots", *shots) == 1
        assert wanted in capsys.readouterr().err
    assert run("prepare_custom", "--json", path, "--name", "coco") == 1


def test_coco_parts_and_draw_from_them(tmp_path, capsys):
    path = own_json(tmp_path, sizes=[1] * 6)
    (tmp_path / "ids.txt").write_text("2\n5\n")
    arguments = ("--root", tmp_path, "--json", path, "--val-ids", tmp_path / "ids.txt")
    assert run("prepare_coco", *arguments) == 0
    folder = tmp_path / "cocosplit" / "datasplit"
    ids = {
        name: [i["id"] for i in json.loads((folder / name).read_text())["images"]]
        for name in ("trainvalno5k.json", "5k.json")
    }
    assert ids == {"trainvalno5k.json": [1, 3, 4, 6], "5k.json": [2, 5]}
    (tmp_path / "ids.txt").write_text("2\n")
    assert run("prepare_coco", *arguments) == 1
    assert "trainvalno5k.json exists with other content (2" in capsys.readouterr().err
    assert run("prepare_coco", "--root", tmp_path, "--shots", 4, "--seeds", "0") == 0  # found without --json
    drawn = json.loads((tmp_path / "cocosplit_strict" / "seed0" / "full_box_4shot_cup_trainval.json").read_text())
    assert sorted(image["id"] for image in drawn["images"]) == [1, 3, 4, 6]
    assert run("prepare_coco", "--root", tmp_path, "--json", path, path) == 1


@pytest.fixture
def small_voc(tmp_path):
    """VOC2007 of 22 images of 500 x 300 pixels with one object of each class, and id lists like the committed ones."""
    source, ids = tmp_path / "VOC2007", tmp_path / "ids"
    for folder in (source / "Annotations", source / "JPEGImages", ids):
        folder.mkdir(parents=True)
    names = [f"{i:06d}" for i in range(22)]
    for i, name in enumerate(names):
        labelled = {"name": VOC_CLASSES[i % 20], "bbox": [1, 11, 250, 300], "difficult": int(i == 21)}
        text = voc_xml(
            {"folder": "VOC2007", "filename": f"{name}.jpg", "width": 500, "height": 300, "objects": [labelled]}
        )
        text = text.replace("<size>", "<source /><size>").replace("</size>", "</size><segmented>0</segmented>")
        (source / "Annotations" / f"{name}.xml").write_text(text.replace("<truncated>", "<pose>Left</pose><truncated>"))
        Image.new("RGB", (500, 300), (i * 10, 90, 200)).save(source / "JPEGImages" / f"{name}.jpg")
    (ids / "trainval.txt").write_text("".join(f"{name}\n" for name in names[:20]))
    (ids / "test.txt").write_text("".join(f"{name}\n" for name in names[20:]))
    orders = {name: [names[i]] for i, name in enumerate(VOC_CLASSES)}
    (ids / "shots.json").write_text(json.dumps({"shots": [1], "seeds": {"0": orders}}))
    (ids / "SHA256SUMS").write_text("")
    return source, ids


def test_voc_small_is_made_and_loads(small_voc, tmp_path, capsys):
    source, ids = small_voc
    arguments = ("--source", source, "--output", tmp_path / "voc_small", "--ids", ids)
    assert run("prepare_voc_small", *arguments) == 0
    made = tmp_path / "voc_small"
    assert Image.open(made / "JPEGImages" / "000003.jpg").size == (400, 240)
    sources = DatasetSources(tmp_path, samples="voc_small/vocsplit_small", voc_train=(("voc_small", "trainval"),))
    spec = DatasetSpec("voc", "train", "all", shot=1)
    check_sources(spec, sources)
    records = load_records(spec, sources)
    assert len(records) == 20
    assert all(record["annotations"][0]["bbox"] == [0, 8, 200, 240] for record in records)
    test = json.loads((made / "coco_test.json").read_text())
    assert [row["id"] for row in test["annotations"]] == [21, 22]
    assert [row["iscrowd"] for row in test["annotations"]] == [0, 1]
    assert test["annotations"][0]["bbox"] == [0, 8, 200, 232] and test["annotations"][0]["area"] == 200 * 232
    assert (made / "class_counts.tsv").read_text().splitlines()[2] == "bicycle\t1\t1\t0\t0\t0\t1"
    (ids / "SHA256SUMS").write_text(f"{'0' * 64}  coco_all.json\n")
    assert run("prepare_voc_small", *arguments) == 2
    assert "Not as published: ['coco_all.json']" in capsys.readouterr().err


def test_voc_small_writes_nothing_when_a_picture_is_faulty(small_voc, tmp_path, capsys):
    source, ids = small_voc
    picture = source / "JPEGImages" / "000021.jpg"
    arguments = ("--source", source, "--output", tmp_path / "voc_small", "--ids", ids)
    content = picture.read_bytes()
    for fault in (content[:400], None):
        picture.unlink()
        if fault is not None:
            picture.write_bytes(fault)
        else:
            assert not picture.exists()
        assert run("prepare_voc_small", *arguments) == 1
        assert "000021.jpg" in capsys.readouterr().err
        assert not (tmp_path / "voc_small").exists()
        picture.write_bytes(content)
    assert run("prepare_voc_small", "--source", source, "--output", source, "--ids", ids) == 1


@pytest.mark.skipif(not VOC_SMALL.exists(), reason="data pack voc_small is not there")
def test_voc_small_texts_equal_the_pack(tmp_path):
    """The pack as source: nothing is shrunk, so every text file must come out as it is there, byte for byte."""
    from fsdet.data.shrink_voc import differing_files, voc_small_texts

    ids = ROOT / "datasets" / "voc_small_ids"
    files = voc_small_texts(VOC_SMALL, tmp_path, ids)
    expected = {name: text for name, text in files_of(VOC_SMALL).items() if not name.endswith(".jpg")}
    assert {str(path.relative_to(tmp_path)): text.encode() for path, text in files.items()} == expected
    assert len(files) == 1966 and differing_files(files, ids / "SHA256SUMS") == []


@pytest.mark.skipif(not COCO_SMALL.exists(), reason="data pack coco_small is not there")
def test_ten_lines_with_coco_small(tmp_path):
    shutil.copy(COCO_SMALL / "instances_train2017.json", tmp_path / "train.json")
    arguments = ("--json", tmp_path / "train.json", "--shots", 1, 2, "--seeds", "0", "--classes", "cup", "dog", "pizza")
    assert run("prepare_custom", *arguments) == 0
    assert len(list((tmp_path / "samples" / "seed0").glob("full_box_*.json"))) == 6
