import json
import lzma
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from fsdet.data.sampling import sample_strict
from fsdet.data.seeds import (
    MANIFEST,
    ClassImage,
    check_manifest,
    coco_shot_path,
    count_warnings,
    digest_of,
    list_files,
    parse_shot_name,
    read_coco_shots,
    read_voc_shots,
    report_coco_shots,
    report_voc_shots,
    voc_shot_path,
    write_coco_shots,
    write_files,
    write_voc_shots,
)
from fsdet.data.splits import VOC_CLASSES
from fsdet.data.voc import read_image_set, read_voc_image

PACKS = Path(__file__).resolve().parents[2].parent / "shared" / "data"
VOC_PACK = PACKS / "splits" / "vocsplit_tfa_seeds0-29.tar.xz"
COCO_PACK = PACKS / "splits" / "coco_fsrw_seed0_10_30shot_images.json.xz"


def needs(path):
    return pytest.mark.skipif(not path.exists(), reason=f"data pack {path.name} is not there")


def coco_list(name="hot dog", images=(1, 2), boxes=((1, 1), (2, 1), (3, 2))):
    """COCO json with annotations (id, image)."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 9, "width": 9} for i in images],
        "annotations": [{"id": i, "image_id": at, "category_id": 58, "bbox": [1, 1, 2, 2]} for i, at in boxes],
        "categories": [{"id": 58, "name": name}, {"id": 1, "name": "person"}],
    }


def test_paths_are_the_official_ones(tmp_path):
    voc = voc_shot_path(tmp_path, 3, 5, "sofa")
    assert voc == tmp_path / "seed3" / "box_5shot_sofa_train.txt"
    coco = coco_shot_path(tmp_path, 0, 30, "hot dog")
    assert coco == tmp_path / "seed0" / "full_box_30shot_hot dog_trainval.json"
    for path, named in ((voc, (5, "sofa")), (coco, (30, "hot dog"))):
        assert parse_shot_name(path) == named
    assert parse_shot_name(tmp_path / MANIFEST) is None
    odd = coco_shot_path(tmp_path, 1, 2, "a/b %2F_trainval")
    assert odd.parent == tmp_path / "seed1" and parse_shot_name(odd) == (2, "a/b %2F_trainval")


def test_seed_0_may_lie_at_the_root(tmp_path):
    at_root = tmp_path / "box_1shot_cat_train.txt"
    write_voc_shots(at_root, ["000123"])
    assert voc_shot_path(tmp_path, 0, 1, "cat") == at_root
    assert voc_shot_path(tmp_path, 1, 1, "cat") == tmp_path / "seed1" / at_root.name
    assert voc_shot_path(tmp_path, 0, 1, "dog") == tmp_path / "seed0" / "box_1shot_dog_train.txt"
    (tmp_path / "seed0").mkdir()
    assert voc_shot_path(tmp_path, 0, 1, "cat") == tmp_path / "seed0" / at_root.name


def test_voc_list_round_trip(tmp_path):
    path = tmp_path / "seed1" / "box_3shot_cat_train.txt"
    ids = ["000123", "2009_001208", "000123"]
    write_voc_shots(path, ids)
    assert path.read_text().splitlines()[:2] == [
        "datasets/VOC2007/JPEGImages/000123.jpg",
        "datasets/VOC2012/JPEGImages/2009_001208.jpg",
    ]
    assert read_voc_shots(path) == ids
    path.write_text("000123.jpg\r\n\r\nC:\\VOC2012\\JPEGImages\\2009_001208.JPG\r\nx/000123.jpeg")
    assert read_voc_shots(path) == ids


def test_voc_list_faults(tmp_path):
    path = tmp_path / "box_1shot_cat_train.txt"
    with pytest.raises(FileNotFoundError, match=r"box_1shot_cat_train.txt not found.*prepare_voc.py"):
        read_voc_shots(path)
    path.write_text("datasets/VOC2007/JPEGImages/000123.jpg\n000124 1\n")
    with pytest.raises(ValueError, match=r'train.txt, line 2: "000124 1" is no image path.*prepare_voc.py'):
        read_voc_shots(path)
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="is empty"):
        read_voc_shots(path)


def test_voc_list_of_another_class_or_data_set(tmp_path):
    path = tmp_path / "box_2shot_cat_train.txt"
    write_voc_shots(path, ["000123", "000124"])
    with pytest.raises(ValueError, match='image 000124 is not in the data set or shows no "cat"'):
        report_voc_shots(path, 2, "cat", {"000123": 1})


def test_voc_warnings_are_counted(tmp_path):
    counts = {"a": 1, "b": 3}
    reports = []
    for name, ids, shot, expected in (
        ("good", ["a"], 1, (1, 0, 1)),
        ("short", ["a"], 2, (1, 0, 1)),
        ("overfull", ["a", "b"], 3, (2, 0, 4)),
        ("repeated", ["a", "a", "a"], 3, (1, 2, 3)),
        ("both", ["b", "b"], 5, (1, 1, 6)),
    ):
        path = tmp_path / f"box_{shot}shot_{name}_train.txt"
        write_voc_shots(path, ids)
        report = report_voc_shots(path, shot, name, counts)
        assert (report.images, report.repeated, report.instances) == expected
        assert report_voc_shots(path, shot, name).instances is None
        reports.append(report)
    assert count_warnings(reports) == {"short_lists": 1, "overfull_lists": 2, "repeated_entries": 2}
    assert reports[1].warnings["short_lists"].endswith("box_2shot_short_train.txt: 1 of 2 instances")
    assert reports[0].warnings == {}


def test_coco_list_round_trip_and_report(tmp_path):
    path = coco_shot_path(tmp_path, 1, 3, "hot dog")
    write_coco_shots(path, coco_list())
    assert read_coco_shots(path) == coco_list()
    report = report_coco_shots(path, 3, "hot dog")
    assert (report.images, report.repeated, report.instances, report.warnings) == (2, 0, 3, {})
    write_coco_shots(path, coco_list(boxes=((1, 1), (2, 1), (2, 1), (3, 2))), force=True)
    assert set(report_coco_shots(path, 3, "hot dog").warnings) == {"overfull_lists", "repeated_entries"}
    assert set(report_coco_shots(path, 5, "hot dog").warnings) == {"short_lists", "repeated_entries"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"].clear(), "holds no annotation"),
        (lambda d: d["annotations"][1].update(category_id=1), r"must hold \"hot dog\".*\['hot dog', 'person'\]"),
        (lambda d: [a.update(category_id=1) for a in d["annotations"]], r"must hold \"hot dog\".*\['person'\]"),
        (lambda d: d["annotations"][0].update(category_id=7), "category 7"),
        (lambda d: d["annotations"][0].update(image_id=9), "image 9"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "3 box values"),
        (lambda d: d["annotations"][0].pop("bbox"), "'bbox' is missing"),
        (lambda d: d.pop("categories"), "'categories' is missing"),
        (lambda d: d.update(images=None), "no COCO detection file"),
    ],
)
def test_coco_list_faults(tmp_path, change, message):
    path = coco_shot_path(tmp_path, 1, 3, "hot dog")
    data = coco_list()
    change(data)
    write_coco_shots(path, data)
    with pytest.raises(ValueError, match=message) as fault:
        read_coco_shots(path)
    assert str(path) in str(fault.value) and "prepare_coco.py" in str(fault.value)


def test_coco_list_that_is_no_json(tmp_path):
    path = coco_shot_path(tmp_path, 1, 3, "hot dog")
    with pytest.raises(FileNotFoundError, match=r"hot dog_trainval.json not found"):
        read_coco_shots(path)
    path.parent.mkdir()
    for content in (b'{"images": [', b"\xff\xfe\xfa{"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no JSON file"):
            read_coco_shots(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="no COCO detection file"):
        read_coco_shots(path)


def test_coco_lists_keep_the_order_of_the_draw(tmp_path):
    full = coco_list(images=(1, 2, 3), boxes=((1, 1), (2, 1), (3, 2), (4, 3)))
    full["annotations"][1]["segmentation"] = [[1, 1, 3, 1, 3, 3]]
    draws = {"hot dog": {3: [ClassImage(3, (4,)), ClassImage(1, (2,)), ClassImage(1, (1,))]}}
    files = list_files(tmp_path, 0, draws, {}, full)
    data = json.loads(files[tmp_path / "seed0" / "full_box_3shot_hot dog_trainval.json"])
    assert list(data) == ["info", "licenses", "images", "annotations", "categories"]
    assert [image["id"] for image in data["images"]] == [3, 1]
    assert data["annotations"] == [full["annotations"][i - 1] for i in (4, 2, 1)]
    assert data["categories"] == full["categories"]


def drawn_lists(folder, seed=2):
    images = [ClassImage(f"{i:06d}", tuple(range(1 + i % 2))) for i in range(20)]
    draws = {name: sample_strict(images, (1, 3), seed=seed, class_name=name, dataset="toy") for name in ("cat", "dog")}
    write_files(list_files(folder, seed, draws, {"algorithm": "strict"}))
    return draws


def test_manifest_records_the_draw(tmp_path):
    draws = drawn_lists(tmp_path)
    manifest = check_manifest(tmp_path, 2)
    assert (manifest["algorithm"], manifest["seed"]) == ("strict", 2)
    for name, by_shot in draws.items():
        recorded = manifest["classes"][name]
        for shot, picks in by_shot.items():
            length = recorded["length"][str(shot)]
            assert recorded["draw"][:length] == [[pick.image, list(pick.objects)] for pick in picks]
            assert read_voc_shots(voc_shot_path(tmp_path, 2, shot, name)) == [pick.image for pick in picks]
    assert manifest["digest"] == digest_of((tmp_path / "seed2").glob("*.txt"))
    assert check_manifest(tmp_path, 3) is None


def test_manifest_refuses_changed_lists(tmp_path):
    drawn_lists(tmp_path)
    path = voc_shot_path(tmp_path, 2, 1, "cat")
    content = path.read_text()
    path.write_text(content + content)
    with pytest.raises(ValueError, match=r"manifest.json does not fit.*was changed.*--force"):
        check_manifest(tmp_path, 2)
    path.unlink()
    with pytest.raises(ValueError, match="box_1shot_cat_train.txt is missing"):
        check_manifest(tmp_path, 2)
    (path.parent / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="is no manifest"):
        check_manifest(tmp_path, 2)


def test_digest_sees_names_and_contents_alone(tmp_path):
    drawn_lists(tmp_path / "a")
    drawn_lists(tmp_path / "b")
    paths = {key: sorted((tmp_path / key / "seed2").glob("*.txt")) for key in "ab"}
    assert digest_of(paths["a"]) == digest_of(reversed(paths["b"]))
    first, second = paths["b"][0].read_bytes(), paths["b"][2].read_bytes()
    paths["b"][0].write_bytes(second), paths["b"][2].write_bytes(first)
    assert first != second and digest_of(paths["a"]) != digest_of(paths["b"])


def test_writing_never_overwrites_without_force(tmp_path):
    old, new = tmp_path / "a.txt", tmp_path / "x" / "b.txt"
    old.write_text("old")
    with pytest.raises(FileExistsError, match=r"a.txt exists with other content \(1 such.*--force"):
        write_files({new: "new", old: "new"})
    assert not new.parent.exists() and old.read_text() == "old"
    write_files({new: "new", old: "old"})  # the same content is fine
    write_files({new: b"newer"}, force=True)
    assert new.read_text() == "newer"
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.txt", "b.txt"]  # no temporary file is left


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    with tarfile.open(VOC_PACK) as archive:
        archive.extractall(folder, filter="data")
    return folder / "vocsplit"


@needs(VOC_PACK)
def test_official_voc_lists(official):
    few, repeating, nested = Counter(), Counter(), Counter()
    for seed in range(30):
        for name in VOC_CLASSES:
            before = []
            for shot in (1, 2, 3, 5, 10):
                path = voc_shot_path(official, seed, shot, name)
                report = report_voc_shots(path, shot, name)
                ids = read_voc_shots(path)
                few[min(seed, 1)] += len(ids) < shot
                repeating[min(seed, 1)] += bool(report.repeated)
                assert len(ids) <= shot and report.images + report.repeated == len(ids) and report.repeated <= 1
                nested[min(seed, 1)] += ids[: len(before)] == before
                before = ids
    assert few == {0: 40, 1: 618}
    assert repeating == {0: 0, 1: 20}
    assert nested == {0: 72, 1: 2900}  # seed 0 was drawn for each K anew


@needs(VOC_PACK)
@needs(PACKS / "voc_small")
def test_official_voc_lists_against_annotations(official):
    """Lists that lie completely in the part of VOC2007 at hand."""
    folder = PACKS / "voc_small"
    ids = [i for part in ("trainval", "test") for i in read_image_set(folder, part)]
    counts = {name: {} for name in VOC_CLASSES}
    for image_id in ids:
        for labelled in read_voc_image(folder, image_id).objects:
            counts[labelled.name][image_id] = counts[labelled.name].get(image_id, 0) + 1
    reports = []
    for path in sorted(official.rglob("*.txt")):
        shot, name = parse_shot_name(path)
        if set(read_voc_shots(path)) <= set(ids):
            reports.append(report_voc_shots(path, shot, name, counts[name]))
    assert (len(reports), count_warnings(reports)) == (150, {"overfull_lists": 50})


@needs(COCO_PACK)
def test_official_coco_image_lists():
    """Images of seed 0: with several objects an image, lists are shorter than K; none repeats one."""
    lists = json.loads(lzma.decompress(COCO_PACK.read_bytes()))["lists"]
    lengths = {10: [], 30: []}
    for key, names in lists.items():
        shot = int(key.split("shot/")[0])
        assert len(set(names)) == len(names) <= shot
        lengths[shot].append(len(names))
    assert {shot: (len(v), sum(v), sum(n < shot for n in v)) for shot, v in lengths.items()} == {
        10: (80, 605, 67),
        30: (80, 1793, 76),
    }
