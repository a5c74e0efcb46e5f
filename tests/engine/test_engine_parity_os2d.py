"""Golden files of OS2D: fsdet passes, mutants and altered files fail."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fsdet.engine import parity, parity_defrcn, parity_fewx, parity_os2d
from fsdet.engine.parity import check_folder
from fsdet.engine.parity_os2d_detector import CONFIGS, VERSIONS, GoldenLedger, ranked_order, unfolded

COPIES = Path(__file__).resolve().parents[1] / "golden" / "os2d"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "os2d"
LARGE = ("head", "model", "train_step", "transform_net")
SMALL = ("box_coder", "evaluation", "objective", "resize")
ON_CPU = {"loss", "cls", "cls_neg"}  # what the release loses its negatives in


@pytest.fixture(scope="module")
def golden():
    """Folder of the whole set, whose larger files are not kept here."""
    if not all((SHARED / f"{name}.npz").is_file() for name in LARGE):
        pytest.skip(f"the golden files of the detector ({', '.join(LARGE)}) are not here")
    return SHARED


def failures(rows):
    return {row.name for row in rows if not row.passed and not row.optional}


def compared(results):
    return {stem: sum(row.note != "input" for row in rows) for stem, rows in results.items()}


def test_boxes_losses_sizes_and_metrics_equal_the_released_ones():
    results = check_folder(COPIES, SMALL)
    assert {stem: failures(rows) for stem, rows in results.items()} == {stem: set() for stem in SMALL}
    assert compared(results) == {"box_coder": 30, "evaluation": 14, "objective": 156, "resize": 4}


def test_detector_equals_the_released_one(golden):
    """As computed in training and, on this set without exception, as at inference and on pixels as trained."""
    results = check_folder(golden, LARGE)
    assert {stem: [row.name for row in rows if not row.passed] for stem, rows in results.items()} == {
        stem: [] for stem in LARGE
    }
    assert compared(results) == {"head": 50, "model": 268, "train_step": 47, "transform_net": 16}


def test_losses_on_a_cpu_are_told_apart_and_explained():
    rows = [row for row in check_folder(COPIES, ["objective"])["objective"] if "/on_cpu/" in row.name]
    assert len(rows) == 25 and all(row.optional and row.note.startswith("not to be matched: ") for row in rows)
    assert {row.name for row in rows if not row.passed} == {
        f"{case}/on_cpu/{name}"
        for case in ("rll", "rll_remap_forneg_v1", "rll_remap_forneg_v2", "rll_negweight0.5_ratio0.05")
        for name in ON_CPU
    }


def test_methods_are_told_apart_by_their_files():
    assert parity.find_family(COPIES, ["model"]) is parity.find_family(COPIES, ["head"]) is parity_os2d
    assert parity.find_family(COPIES, ["c_train_step"]) is parity_fewx
    assert parity.find_family(COPIES, ["c_surgery"]) is parity_defrcn
    schemas = [set(module.SCHEMA) for module in (parity_os2d, parity_fewx, parity_defrcn)]
    assert len(set.union(*schemas)) == sum(map(len, schemas))
    assert set(parity_os2d.CHECKERS) == set(parity_os2d.SCHEMA)


def test_every_version_has_a_configuration():
    assert all((CONFIGS / f"{version}.yaml").is_file() for version in VERSIONS)


# Changed files: the tool must notice whatever is lost, added or altered.


def edited(folder, tmp_path, stem, change):
    """Failures of a golden folder with one changed file."""
    for name in ("model", "transform_net"):  # the weights
        if (folder / f"{name}.npz").is_file():
            shutil.copyfile(folder / f"{name}.npz", tmp_path / f"{name}.npz")
    arrays = parity.read_npz(folder / f"{stem}.npz")
    change(arrays)
    np.savez(tmp_path / f"{stem}.npz", **arrays)
    return failures(check_folder(tmp_path, [stem])[stem])


def edit_json(arrays, name, **entries):
    arrays[name] = np.array(json.dumps({**json.loads(str(arrays[name])), **entries}))


@pytest.mark.parametrize(
    ("stem", "change", "failed"),
    [
        ("box_coder", lambda a: a.pop("decode_raw/boxes"), {"decode_raw/boxes"}),
        ("box_coder", lambda a: a.update(more=a["gt_boxes"]), {"more"}),
        ("box_coder", lambda a: a["encode/cls_targets"].__setitem__((0, 0), 1), {"encode/cls_targets"}),
        ("box_coder", lambda a: a["decode/default/boxes"].__iadd__(0.02), {"decode/default/boxes"}),
        ("box_coder", lambda a: a["decode/default/labels"].__setitem__(0, 9), {"decode/default/labels"}),
        ("box_coder", lambda a: a["remap/iou_predicted"].__iadd__(2e-5), {"remap/iou_predicted"}),
        ("box_coder", lambda a: a.pop("level1_size_wh"), {"(file)"}),
        ("evaluation", lambda a: a.update({"iou0.9/map": a["iou0.5/map"]}), {"iou0.9/map"}),
        ("evaluation", lambda a: a.pop("iou0.5/recall"), {"iou0.5/recall"}),
        ("evaluation", lambda a: a.update({"iou0.5/map": a["iou0.5/map"] + 1e-5}), {"iou0.5/map"}),
        ("evaluation", lambda a: a["image1/pred_boxes"].__iadd__(40), {"iou0.5/ap_per_class", "iou0.5/map"}),
        ("objective", lambda a: a.pop("rll/on_cpu/loss"), {"rll/on_cpu/loss"}),
        ("objective", lambda a: a.pop("rll/mining/pos_mask"), {"rll/mining/pos_mask"}),
        ("objective", lambda a: a.update({"rll/grad_loc_targets": a["cls_preds"]}), {"rll/grad_loc_targets"}),
        ("objective", lambda a: a["contrastive/grad_loc_preds"].__iadd__(2e-6), {"contrastive/grad_loc_preds"}),
        ("objective", lambda a: a.update({"rll/loc": a["rll/loc"] + np.float32(2e-5)}), {"rll/loc"}),
        ("resize", lambda a: a.pop("pyramid_level_hw"), {"pyramid_level_hw"}),
        ("resize", lambda a: a["class_image_hw_target240"].__iadd__(1), {"class_image_hw_target240"}),
    ],
)  # fmt: skip
def test_changed_arrays_fail(tmp_path, stem, change, failed):
    found = edited(COPIES, tmp_path, stem, change)
    assert failed <= found if stem == "evaluation" else failed == found


def test_case_that_the_settings_lack_fails(tmp_path):
    def drop(arrays):
        cases = json.loads(str(arrays["config_json"]))
        del cases["contrastive"]
        arrays["config_json"] = np.array(json.dumps(cases))

    found = edited(COPIES, tmp_path, "objective", drop)
    assert len(found) == 14 and all(name.startswith("contrastive/") for name in found)


def test_changed_head_fails(golden, tmp_path):
    def change(arrays):
        del arrays["v1/corners"]
        arrays["more"] = arrays["grad_probe"]
        arrays["v2/grad_query"] *= 1.0002
        arrays["v2_vanishing/recognition"] *= 1.0001

    assert edited(golden, tmp_path, "head", change) == {
        "v1/corners", "v1/corners (at inference)", "more", "v2/grad_query", "v2_vanishing/recognition",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (lambda a: a.update(more=a["conv.0.bias"]), {"more"}),
        (lambda a: a.pop("conv.3.bias"), {"(file)"}),
        (lambda a: a.update({"conv.6.bias": a["conv.0.bias"]}), {"(file)"}),
    ],
)
def test_changed_weights_fail(golden, tmp_path, change, failed):
    assert edited(golden, tmp_path, "transform_net", change) == failed


def test_changed_step_fails(golden, tmp_path):
    def change(arrays):
        del arrays["v2/grad_norms"]
        arrays["v1/grad_norms"][5] *= 1.01
        arrays["v1/step_conv1_weight"] *= 1.1
        arrays["v2/cls_targets"][0, 0, 0] = 1
        edit_json(arrays, "v1/losses_json", cls=0.5, more=0.5)
        names = json.loads(str(arrays["v2/grad_names_json"]))
        arrays["v2/grad_names_json"] = np.array(json.dumps(names[1:]))

    assert edited(golden, tmp_path, "train_step", change) == {
        "v2/grad_norms", "v1/grad_norms", "v1/step_conv1_weight", "v2/cls_targets", "v1/losses_json/cls",
        "v1/losses_json/more", "v2/grad_names_json",
    }  # fmt: skip


def test_changed_model_fails(golden, tmp_path):
    def change(arrays):
        arrays["v1/det_scores"][3] += 1e-4
        arrays["v2/det_boxes"] = arrays["v2/det_boxes"][:-1]
        arrays["more"] = arrays["class_ids"]
        del arrays["level1_image_uint8"]
        edit_json(arrays, "v2/metrics_json", **{"mAP@0.50": 0.9})

    assert edited(golden, tmp_path, "model", change) == {
        "v1/det_scores", "v2/det_boxes", "more", "level1_image_uint8", "v2/metrics_json/mAP@0.50",
    }  # fmt: skip


# Parts of the tool.


def test_neighbours_of_nearly_equal_scores_may_change_places():
    boxes = np.float32([[0, 0, 5, 5], [10, 10, 20, 20], [30, 30, 50, 40], [60, 0, 70, 9]])
    scores = np.float32([0.9, 0.5, 0.499995, 0.2])
    assert ranked_order(boxes, scores, boxes[[0, 2, 1, 3]] + 0.01).tolist() == [0, 2, 1, 3]
    assert ranked_order(boxes, scores, boxes[[1, 0, 2, 3]]).tolist() == [0, 1, 2, 3]  # of different scores: no pair
    assert ranked_order(boxes, scores, boxes[:2]).tolist() == [0, 1]
    assert ranked_order(None, scores, boxes).tolist() == ranked_order(boxes, None, boxes).tolist() == [0, 1, 2, 3]
    equal = np.float32([0.5, 0.5, 0.5, 0.5])
    assert ranked_order(boxes, equal, boxes[[2, 2, 3, 0]]).tolist() == [3, 0, 1, 2]  # each row once
    assert ranked_order(boxes[:0], equal[:0], boxes[:0]).tolist() == []


def test_ledger_knows_absolute_differences_directions_and_what_is_not_to_be_matched():
    values = {"big": np.float32([100.0]), "grad": np.float32([3.0, 4.0]), "odd": np.float32([1.0]), "lost": 1.0}
    ledger = GoldenLedger(values, expected=("big", "grad", "lost"), unmatched={"odd": "reason"})
    assert not ledger.within("big", [100.001], 1e-4).passed and ledger.within("big", [100.00005], 1e-4).passed
    assert ledger.direction("grad", np.float32([3.0, 4.004]), 1e-3).passed
    assert not ledger.direction("grad", np.float32([3.0, 4.006]), 1e-3).passed
    assert not ledger.direction("grad", np.float32([3.0]), 1e-3).passed
    assert not ledger.direction("grad", np.float32([3.0, np.nan]), 1e-3).passed
    row = ledger.within("odd", [2.0], 1e-4)
    assert row.optional and not row.passed and row.note == "not to be matched: reason"
    assert failures(ledger.rest()) == {"lost"}
    assert failures(GoldenLedger({}, unmatched={"odd": "reason"}).rest()) == {"odd"}


def test_further_ways_to_an_array_do_not_stand_for_it():
    ledger = GoldenLedger({"x": np.float32([1.0])}, expected=("x",))
    assert ledger.within("x", [1.0], 1e-5, " (again)").passed
    assert failures(ledger.rest()) == {"x"}


def test_texts_become_entries():
    values = {"a": np.array('{"x": 1.5, "y": {"z": 2}}'), "b": np.array('["p", "q"]'), "c": np.ones(2)}
    found = unfolded(values, "a", "b", "absent")
    assert set(found) == {"a/x", "a/y", "b", "c"}
    assert found["a/y"] == {"z": 2} and found["b"] == ["p", "q"]
