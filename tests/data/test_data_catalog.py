"""Specs, sources, registration and the checks before training."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from fsdet.data import seeds
from fsdet.data.catalog import DatasetSources, DatasetSpec, check_sources, load_records, register, sample_files
from fsdet.data.splits import VOC_CLASSES, voc_split
from fsdet.data.support import Support, SupportSet
from fsdet.evaluation.ground_truth import load_ground_truth

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def test_names_are_readable():
    assert DatasetSpec("voc", "train", "all", shot=5).name == "voc_train_all1_5shot_seed0"
    assert DatasetSpec("voc", "test", "novel", split=3).name == "voc_test_novel3"
    assert DatasetSpec("coco", "train", "base", leak="drop").name == "coco_train_base_leak-drop"
    assert DatasetSpec("voc", "train", "base", difficult=False).name == "voc_train_base1_no-difficult"


def test_name_tells_every_switch_that_changes_records():
    train = [
        DatasetSpec("voc", "train", subset, split, shot, seed, records, choice, difficult=difficult)
        for subset, split, shot, seed, records, choice, difficult in product(
            ("base", "all"), (1, 2), (1, 5), (0, 1), ("instance", "image"), ("seeded", "official"), (True, False)
        )
    ]
    full = [
        DatasetSpec(benchmark, "train", "base", leak=leak)
        for benchmark, leak in product(("voc", "coco", "custom"), ("background", "drop", "ignore"))
    ]
    names = [spec.name for spec in train + full]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "change",
    [
        {"benchmark": "lvis"},
        {"part": "val"},
        {"subset": "rare"},
        {"split": 4},
        {"shot": -1},
        {"seed": -1},
        {"records": "box"},
        {"choice": "random"},
        {"leak": "keep"},
        {"part": "test", "shot": 1},
    ],
)
def test_values_that_make_no_sense(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        DatasetSpec(**{"benchmark": "voc", "part": "train", "subset": "all", **change})


def test_sources_keep_meaning_when_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = DatasetSources(root="data", samples="lists", train_json=str(tmp_path / "x.json"), novel_classes=["a"])
    assert sources.samples == tmp_path / "data" / "lists" and sources.train_json == tmp_path / "x.json"
    copy = replace(sources, novel_classes=("b",))
    assert copy.samples == sources.samples and hash(copy) != hash(sources)


def test_default_sample_folders(tmp_path):
    sources = DatasetSources(root=tmp_path, train_json="own/train.json")
    found = [sources.samples_of(benchmark).relative_to(tmp_path).as_posix() for benchmark in ("voc", "coco", "custom")]
    assert found == ["vocsplit", "cocosplit", "own/samples"]


def test_sample_files_follow_the_class_order(voc_tree):
    files = sample_files(DatasetSpec("voc", "train", "novel", shot=2, seed=1), DatasetSources(root=voc_tree))
    assert [path.name for path in files] == [f"box_2shot_{name}_train.txt" for name in voc_split(1).novel]
    assert {path.parent.name for path in files} == {"seed1"} and all(path.is_file() for path in files)
    assert sample_files(DatasetSpec("voc", "train", "base"), DatasetSources(root=voc_tree)) == []


def test_list_keeps_some_test_images(voc_tree, tmp_path):
    """In the order of the set; training sets pay no attention."""
    path = tmp_path / "two.txt"
    path.write_text("000203\n000201\n")
    sources, test = DatasetSources(root=voc_tree, test_list=path), DatasetSpec("voc", "test", "all")
    assert [record["image_id"] for record in load_records(test, sources)] == ["000201", "000203"]
    assert len(load_records(DatasetSpec("voc", "train", "all"), sources)) == 2 * len(VOC_CLASSES)
    for text, message in (("000201\n000999", "000999"), ("", "empty"), ("000201\n000201", "repeats")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_records(test, sources)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"two.txt.*FEWSHOT.TEST_LIST"):
        check_sources(test, sources)


def test_committed_list_of_voc_small():
    """160 images of its test set, with at least a dozen objects of every class."""
    folder = Path(__file__).resolve().parents[2] / "datasets" / "voc_small_ids"
    some = (folder / "test160.txt").read_text().split()
    assert len(some) == len(set(some)) == 160 and set(some) < set((folder / "test.txt").read_text().split())


class TestRegister:
    def test_reads_no_annotation(self, tmp_path, clean_catalogs):
        """Nothing exists below the root, so any reading would fail."""
        for benchmark, part in product(("voc", "coco"), ("train", "test")):
            name = register(DatasetSpec(benchmark, part, "base"), DatasetSources(root=tmp_path / "nothing"))
            assert name in DatasetCatalog
            with pytest.raises(FileNotFoundError):
                DatasetCatalog.get(name)

    def test_a_list_of_test_images_bounds_the_ground_truth(self, coco_tree, voc_tree, tmp_path, clean_catalogs):
        """What was not looked at counts neither way, whether the truth is a COCO file or the records."""
        for benchmark, root in (("coco", coco_tree), ("voc", voc_tree)):
            spec, whole = DatasetSpec(benchmark, "test", "all"), DatasetSources(root=root)
            ids = [record["image_id"] for record in load_records(spec, whole)]
            assert len(ids) > 1 and set(load_ground_truth(register(spec, whole)).image_ids) == set(ids)
            path = tmp_path / "one.txt"
            path.write_text(f"{ids[-1]}\n")
            name = register(spec, replace(whole, test_list=path))
            truth = load_ground_truth(name)
            assert truth.image_ids == (ids[-1],) == tuple(r["image_id"] for r in DatasetCatalog.get(name))
            assert len(truth.boxes) > 0

    def test_metadata(self, voc_tree, coco_tree, own_tree, clean_catalogs):
        metadata = MetadataCatalog.get(register(DatasetSpec("voc", "test", "all", 2), DatasetSources(root=voc_tree)))
        split = voc_split(2)
        assert metadata.thing_classes == list(split.all)
        assert (metadata.base_classes, metadata.novel_classes) == (list(split.base), list(split.novel))
        assert metadata.evaluator_type == "voc" and metadata.spec.split == 2 and metadata.sources.root == voc_tree
        assert (metadata.dirname, metadata.split, metadata.year) == (str(voc_tree / "VOC2007"), "test", 2007)

        metadata = MetadataCatalog.get(register(DatasetSpec("coco", "test", "novel"), DatasetSources(root=coco_tree)))
        assert metadata.thing_dataset_id_to_contiguous_id[18] == metadata.thing_classes.index("dog") == 10
        assert len(metadata.thing_dataset_id_to_contiguous_id) == len(metadata.thing_classes) == 20
        assert metadata.json_file == str(coco_tree / "cocosplit/datasplit/5k.json")
        assert metadata.image_root == str(coco_tree / "coco" / "val2014") and metadata.evaluator_type == "coco"

        sources = DatasetSources(own_tree, train_json="train.json", test_json="test.json", novel_classes=("gizmo",))
        metadata = MetadataCatalog.get(register(DatasetSpec("custom", "test", "all"), sources))
        assert metadata.thing_classes == ["widget", "gadget", "gizmo"]
        assert metadata.thing_dataset_id_to_contiguous_id == {1: 1, 2: 2, 3: 0}  # ids of the test file
        assert metadata.json_file == str(own_tree / "test.json") and metadata.image_root == str(own_tree / "test")

    def test_is_idempotent_and_replaces_other_sources(self, voc_tree, tmp_path, clean_catalogs):
        spec, sources = DatasetSpec("voc", "train", "base"), DatasetSources(root=voc_tree)
        name = register(spec, sources)
        metadata = MetadataCatalog.get(name)
        assert register(spec, DatasetSources(root=voc_tree)) == name and MetadataCatalog.get(name) is metadata
        assert len(DatasetCatalog.get(name)) == 40
        assert register(spec, replace(sources, voc_train=(("VOC2007", "trainval"),))) == name
        assert len(DatasetCatalog.get(name)) == 20
        assert len(MetadataCatalog.get(name).sources.voc_train) == 1

    def test_a_failed_registration_leaves_nothing(self, own_tree, clean_catalogs):
        spec = DatasetSpec("custom", "train", "novel")
        with pytest.raises(ValueError, match="unicorn"):
            register(spec, DatasetSources(own_tree, train_json="train.json", novel_classes=("unicorn",)))
        assert spec.name not in DatasetCatalog and spec.name not in MetadataCatalog

    def test_report_reaches_metadata_and_log(self, voc_tree, clean_catalogs, caplog):
        name = register(DatasetSpec("voc", "train", "novel", shot=3), DatasetSources(root=voc_tree))
        metadata = MetadataCatalog.get(name)
        assert metadata.load_report == {} and metadata.chosen_annotations == {}
        with caplog.at_level(logging.INFO, logger="fsdet.data"):
            DatasetCatalog.get(name)
            DatasetCatalog.get(name)  # a second load may not trip over the metadata of the first
        assert metadata.load_report == {"overfull_lists": 5, "repeated_entries": 5}
        assert len(metadata.load_details) == 10
        assert set(metadata.chosen_annotations) == set(voc_split(1).novel)
        warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 2 and "overfull_lists 5, repeated_entries 5" in warnings[0]


EPISODE = """
shots = [Support("f", f"i{i}", 10 * c + i, c, (0, 0, 1, 1)) for c in range(6) for i in range(5)]
supports = SupportSet("abcdef", shots)
episode = supports.episode(3, 2, seed=1, epoch=2, image="i0")
episode = [(name, [shot.annotation_id for shot in shots]) for name, shots in episode.items()]
"""


def test_another_process_imports_without_registering_and_draws_the_same(voc_tree):
    """Processes differ in Python's hash seed and in NumPy's generator, as the ranks of a training do."""
    code = f"""
import sys
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
before = set(DatasetCatalog), set(MetadataCatalog)
import fsdet.data.fake_tree
from fsdet.data.catalog import DatasetSources, DatasetSpec, load_records
from fsdet.data.support import Support, SupportSet
assert before == (set(DatasetCatalog), set(MetadataCatalog))
np.random.seed(77)
records = load_records(DatasetSpec("voc", "train", "all", shot=3), DatasetSources(root=sys.argv[1]))
{EPISODE}
sys.stdout.write(str([[r["annotations"][0]["id"] for r in records], episode]))
"""
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    there = subprocess.run(
        [sys.executable, "-c", code, str(voc_tree)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    records = load_records(DatasetSpec("voc", "train", "all", shot=3), DatasetSources(root=voc_tree))
    here = {"Support": Support, "SupportSet": SupportSet}
    exec(EPISODE, here)
    assert there == str([[r["annotations"][0]["id"] for r in records], here["episode"]])
    assert len(records) == 60 and len(here["episode"]) == 3


class TestCheck:
    def test_complete_trees_pass(self, voc_tree, coco_tree, own_tree):
        own = DatasetSources(own_tree, train_json="train.json", test_json="test.json", novel_classes=("gizmo",))
        for benchmark, sources in (
            ("voc", DatasetSources(root=voc_tree)),
            ("coco", DatasetSources(root=coco_tree)),
            ("custom", own),
        ):
            for part, subset in product(("train", "test"), ("base", "novel", "all")):
                check_sources(DatasetSpec(benchmark, part, subset), sources)
        check_sources(DatasetSpec("voc", "train", "all", shot=5, choice="official"), DatasetSources(root=voc_tree))
        check_sources(DatasetSpec("custom", "train", "all", shot=1), own)

    def test_leaves_numpys_generator_and_the_log_alone(self, voc_tree, caplog):
        np.random.seed(3)
        check_sources(DatasetSpec("voc", "train", "all", shot=3, choice="official"), DatasetSources(root=voc_tree))
        assert np.random.rand() == np.random.RandomState(3).rand()
        assert not caplog.records

    @pytest.mark.parametrize("benchmark", ["voc", "coco", "custom"])
    def test_missing_root(self, tmp_path, benchmark):
        sources = DatasetSources(root=tmp_path / "gone", train_json="a.json")
        with pytest.raises(FileNotFoundError, match=r"gone. Correct FEWSHOT.ROOT or .*DETECTRON2_DATASETS"):
            check_sources(DatasetSpec(benchmark, "train", "base"), sources)

    @pytest.mark.parametrize("gone", ["ImageSets/Main/test.txt", "Annotations/000200.xml", "JPEGImages/000200.jpg"])
    def test_missing_voc_file(self, voc_tree, gone):
        (voc_tree / "VOC2007" / gone).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{gone}.*DETECTRON2_DATASETS.*README.md says where to get it"):
            check_sources(DatasetSpec("voc", "test", "all"), DatasetSources(root=voc_tree))

    def test_missing_picture_of_a_shot(self, voc_tree):
        bird = VOC_CLASSES.index("bird")
        (voc_tree / "VOC2012" / "JPEGImages" / f"2008_0001{bird:02d}.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=rf"2008_0001{bird:02d}.jpg.*FEWSHOT.VOC_TRAIN"):
            check_sources(DatasetSpec("voc", "train", "novel", shot=1), DatasetSources(root=voc_tree))

    def test_missing_coco_files(self, coco_tree):
        sources = DatasetSources(root=coco_tree)
        spec = DatasetSpec("coco", "train", "base")
        for path in (coco_tree / "coco" / "trainval2014").iterdir():
            path.unlink()
        with pytest.raises(FileNotFoundError, match=r"COCO_train2014_000000001001.jpg.*where to get it") as error:
            check_sources(spec, sources)
        assert "prepare_coco.py" not in str(error.value)  # it makes lists, no pictures
        (coco_tree / "coco" / "trainval2014").rmdir()
        with pytest.raises(FileNotFoundError, match=r"Picture folder.*coco/"):
            check_sources(spec, replace(sources, train_images="coco/nowhere"))
        (coco_tree / "cocosplit/datasplit/trainvalno5k.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"trainvalno5k.json.*DETECTRON2_DATASETS.*where to get it"):
            check_sources(spec, sources)

    def test_does_not_parse_the_large_file(self, coco_tree):
        path = coco_tree / "cocosplit/datasplit/trainvalno5k.json"
        path.write_text(path.read_text()[:-20])
        check_sources(DatasetSpec("coco", "train", "base"), DatasetSources(root=coco_tree))
        with pytest.raises(ValueError, match="trainvalno5k.json: not a JSON file"):
            load_records(DatasetSpec("coco", "train", "base"), DatasetSources(root=coco_tree))

    def test_strict_lists_must_offer_exactly_k(self, voc_tree):
        """The same lists are a counted warning when they do not claim to be strict."""
        spec, sources = DatasetSpec("voc", "train", "novel", shot=5, seed=1), DatasetSources(root=voc_tree)
        check_sources(spec, sources)
        folder = voc_tree / "vocsplit" / "seed1"
        files = sorted(path.name for path in folder.iterdir())
        digest = seeds.digest_of(folder / name for name in files)
        manifest = {"algorithm": "strict", "seed": 1, "files": files, "digest": digest, "classes": {}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        for check in (check_sources, load_records):
            with pytest.raises(ValueError, match=r'box_5shot_bird_train.txt: 5 instances of "bird" needed, 3 found'):
                check(spec, sources)
        with pytest.raises(ValueError, match=r'3 instances of "bird" needed, 4 found'):
            check_sources(replace(spec, shot=3), sources)
        check_sources(replace(spec, shot=2), sources)
        (folder / files[0]).write_text("x/000100.jpg\n")
        with pytest.raises(ValueError, match="changed after the draw"):
            check_sources(replace(spec, shot=2), sources)


# The real packs, where they lie beside the checkout.


def table_of(title):
    """Rows of the class table of a pack in the manifest: class -> numbers."""
    lines = (SHARED / "MANIFEST.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[0], {row[0]: list(map(int, row[1:])) for row in rows[2:]}


@pytest.fixture
def voc_small():
    if not (SHARED / "voc_small").is_dir():
        pytest.skip("needs the data pack voc_small beside the checkout")
    return DatasetSources(
        root=SHARED,
        samples="voc_small/vocsplit_small",
        voc_train=(("voc_small", "trainval"),),
        voc_test=(("voc_small", "test"),),
    )


def test_voc_small_has_the_numbers_of_its_manifest(voc_small):
    header, rows = table_of("voc_small")
    assert header[1:4] == ["trainval_images", "trainval_boxes", "trainval_difficult"] and len(rows) == 20
    names = voc_split(1).all
    for part, images, first in (("train", 980, 0), ("test", 480, 3)):
        spec = DatasetSpec("voc", part, "all")
        check_sources(spec, voc_small)
        records = load_records(spec, voc_small)
        assert len(records) == images
        found = {name: [0, 0, 0] for name in names}
        for record in records:
            labelled = [(names[a["category_id"]], a["difficult"]) for a in record["annotations"]]
            for name, difficult in labelled:
                found[name][1 + difficult] += 1
            for name in {name for name, difficult in labelled if not difficult}:
                found[name][0] += 1
        assert found == {name: numbers[first : first + 3] for name, numbers in rows.items()}


def test_voc_small_shots(voc_small):
    for seed, shot, split in ((0, 1, 1), (4, 10, 3)):
        spec = DatasetSpec("voc", "train", "all", split=split, shot=shot, seed=seed)
        check_sources(spec, voc_small)
        records = load_records(spec, voc_small)
        per_class = np.bincount([record["annotations"][0]["category_id"] for record in records])
        assert per_class.tolist() == [shot] * 20


def test_coco_small_has_the_numbers_of_its_manifest():
    if not (SHARED / "coco_small").is_dir():
        pytest.skip("needs the data pack coco_small beside the checkout")
    sources = DatasetSources(
        root=SHARED / "coco_small",
        train_json="instances_train2017.json",
        test_json="instances_val2017.json",
    )
    for part, images, boxes, crowds in (("train", 257, 2099, 20), ("test", 254, 2074, 16)):
        spec = DatasetSpec("coco", part, "all")
        check_sources(spec, sources)
        records = load_records(spec, sources)
        annotations = [a for record in records for a in record["annotations"]]
        assert (len(records), len(annotations), sum(a["iscrowd"] for a in annotations)) == (images, boxes, crowds)
        assert {a["category_id"] for a in annotations} == set(range(80))
        assert all(Path(record["file_name"]).is_file() for record in records)
