"""The embedded data set: deterministic, whole, disjoint between train and test, readable as any own COCO-format set."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fsdet.data import quickstart
from fsdet.data.quickstart import BASE_CLASSES, CLASSES, NOVEL_CLASSES, content_digest, make_quickstart
from fsdet.data.seeds import check_manifest, coco_shot_path, read_coco_shots

SMALL = {"train_images": 80, "test_images": 6, "size": (96, 112), "shots": (1, 2), "seeds": (0, 1)}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_quickstart(tmp_path_factory.mktemp("quickstart") / "set", **SMALL)


@pytest.fixture(scope="module")
def annotations(small):
    return {part: json.loads(getattr(small, f"{part}_json").read_text()) for part in ("train", "test")}


def test_a_second_process_makes_the_same_bytes(small, tmp_path):
    code = (
        "import sys; from pathlib import Path; from fsdet.data.quickstart import *\n"
        f"print(content_digest(make_quickstart(Path(sys.argv[1]), **{SMALL!r}).root))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "again")]
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == content_digest(small.root)


def test_another_seed_makes_other_pictures_and_more_pictures_keep_the_first(small, tmp_path):
    options = {**SMALL, "shots": (1,), "seeds": (0,)}
    more = make_quickstart(tmp_path / "more", **{**options, "train_images": 82})
    other = make_quickstart(tmp_path / "other", **options, seed=1)
    first = (small.train_images / "train_00001.png").read_bytes()
    assert (more.train_images / "train_00001.png").read_bytes() == first
    assert (other.train_images / "train_00001.png").read_bytes() != first


def test_pictures_and_boxes_fit(small, annotations):
    for part, data in annotations.items():
        folder = getattr(small, f"{part}_images")
        sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
        assert len(sizes) == SMALL[f"{part}_images"] == len(list(folder.iterdir()))
        for image in data["images"]:
            with Image.open(folder / image["file_name"]) as picture:
                assert (picture.height, picture.width) == sizes[image["id"]] == SMALL["size"]
                assert picture.mode == "RGB"
        assert [category["name"] for category in data["categories"]] == list(CLASSES)
        assert len({row["id"] for row in data["annotations"]}) == len(data["annotations"])
        for row in data["annotations"]:
            x, y, width, height = row["bbox"]
            assert x >= 0 and y >= 0 and x + width <= 112 and y + height <= 96
            assert width >= 4 and 10 <= height <= 110 and row["area"] == width * height


def test_digits_overlap_only_a_little(annotations):
    for data in annotations.values():
        by_image = {}
        for row in data["annotations"]:
            by_image.setdefault(row["image_id"], []).append(row["bbox"])
        for boxes in by_image.values():
            for i, (x0, y0, w0, h0) in enumerate(boxes):
                for x1, y1, w1, h1 in boxes[:i]:
                    w = min(x0 + w0, x1 + w1) - max(x0, x1)
                    h = min(y0 + h0, y1 + h1) - max(y0, y1)
                    assert max(w, 0) * max(h, 0) <= quickstart.MAX_OVERLAP * min(w0 * h0, w1 * h1)


def test_a_box_is_tight_around_its_digit(monkeypatch):
    """On an even scene, without other shapes, exactly the pixels in the box differ from the background."""
    monkeypatch.setattr(quickstart, "OBJECTS", (1, 1))
    monkeypatch.setattr(quickstart, "DISTRACTORS", (0, 0))
    monkeypatch.setattr(quickstart, "_background", lambda generator, photographs, size: np.full((*size, 3), 120.0))
    glyphs = quickstart.load_glyphs("train")
    for number in range(20):
        pixels, objects = quickstart.make_scene(np.random.default_rng(number), glyphs, [], (128, 160))
        ((_, (x0, y0, x1, y1)),) = objects
        changed = (np.abs(pixels.astype(int) - 120) > 3).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == pytest.approx((x0, y0, x1, y1), abs=1)


def test_train_and_test_share_no_handwriting_and_no_scene():
    train, test = (quickstart.load_glyphs(part) for part in ("train", "test"))
    assert sum(len(samples) for samples in train.values()) + sum(len(samples) for samples in test.values()) == 1797
    for name in CLASSES:
        seen = {sample.tobytes() for sample in train[name]}
        assert len(test[name]) > 40 and not any(sample.tobytes() in seen for sample in test[name])
    for a, b in zip(*(quickstart.load_photographs(part) for part in ("train", "test")), strict=True):
        assert a.shape[1] + b.shape[1] == 640 and a.shape[0] == b.shape[0]


def test_novel_digits_are_rare_in_training_and_even_in_the_test():
    assert set(BASE_CLASSES) | set(NOVEL_CLASSES) == set(CLASSES) and not set(BASE_CLASSES) & set(NOVEL_CLASSES)
    glyphs, scenes = quickstart.load_glyphs("train"), quickstart.load_photographs("train")
    names = [
        name
        for number in range(60)
        for name, _ in quickstart.make_scene(np.random.default_rng(number), glyphs, scenes, (96, 96))[1]
    ]
    assert all(names.count(name) > 3 for name in CLASSES)


def test_k_shot_lists_hold_k_objects_and_are_nested(small, annotations):
    known = {row["id"]: row for row in annotations["train"]["annotations"]}
    for seed in SMALL["seeds"]:
        assert check_manifest(small.samples, seed)["algorithm"] == "strict"
        for name in CLASSES:
            lists = {k: read_coco_shots(coco_shot_path(small.samples, seed, k, name)) for k in SMALL["shots"]}
            ids = {k: [row["id"] for row in data["annotations"]] for k, data in lists.items()}
            assert {k: len(set(found)) for k, found in ids.items()} == {1: 1, 2: 2}
            assert ids[2][:1] == ids[1]
            assert all(row == known[row["id"]] for row in lists[2]["annotations"])


def test_an_equal_copy_is_kept_a_changed_one_is_made_anew(small):
    before = (small.root / quickstart.MARKER).stat().st_mtime_ns
    make_quickstart(small.root, **SMALL)
    assert (small.root / quickstart.MARKER).stat().st_mtime_ns == before
    digest = content_digest(small.root)
    picture = small.test_images / "test_00003.png"
    picture.write_bytes(picture.read_bytes()[:-100])
    assert content_digest(small.root) != digest
    make_quickstart(small.root, **SMALL)
    assert content_digest(small.root) == digest
    assert [path.name for path in small.root.parent.iterdir()] == ["set"]


def test_a_new_version_replaces_the_copy(tmp_path, monkeypatch):
    size = {"train_images": 60, "test_images": 1, "shots": (1,), "seeds": (0,)}
    root = make_quickstart(tmp_path / "set", **size).root
    monkeypatch.setattr(quickstart, "VERSION", quickstart.VERSION + 1)
    make_quickstart(root, **size)
    assert json.loads((root / quickstart.MARKER).read_text())["version"] == quickstart.VERSION
    assert json.loads((root / "test.json").read_text())["info"]["version"] == str(quickstart.VERSION)


def test_a_failed_attempt_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "draw_coco", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_quickstart(tmp_path / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_foreign_folders_and_bad_values_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="photos holds other files"):
        make_quickstart(tmp_path / "photos", **SMALL)
    assert (tmp_path / "photos" / "mine.jpg").read_bytes() == b"x"
    with pytest.raises(ValueError, match="sides of 64-256 pixels; got 80 training"):
        make_quickstart(tmp_path / "set", **{**SMALL, "size": (32, 160)})
    with pytest.raises(ValueError, match="at least one picture"):
        make_quickstart(tmp_path / "set", **{**SMALL, "test_images": 0})
    with pytest.raises(ValueError, match='60 shots of "zero" need 60 instances'):
        make_quickstart(tmp_path / "set", **{**SMALL, "shots": (60,)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
