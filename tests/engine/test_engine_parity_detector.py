"""Golden layers, detector, optimizer and configurations of DeFRCN: fsdet passes, mutants and altered files fail."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fsdet.checkpoint import rename
from fsdet.engine import parity, parity_detector, parity_heads, parity_model, parity_recipe
from fsdet.engine.parity import all_passed, check_folder
from fsdet.layers import gradient
from fsdet.methods.defrcn import decoupled
from fsdet.modeling import freeze, roi_heads

FILES = ("a_gdl_affine.npz", "b_fast_rcnn.npz", "configs_effective.json", "d_solver.json")
DETECTOR = ("d_model_r50w16.npz", "d_train3.npz")
COPIES = Path(__file__).resolve().parents[1] / "golden" / "defrcn"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "defrcn"


@pytest.fixture(scope="module")
def golden():
    return COPIES


@pytest.fixture(scope="module")
def detector():
    """Folder of the detector's files, which are too large to be kept here."""
    if not all((SHARED / name).is_file() for name in DETECTOR):
        pytest.skip(f"the detector's golden files ({', '.join(DETECTOR)}) are not here")
    return SHARED


def failures(rows):
    return [row.name for row in rows if not row.passed and not row.optional]


def fails(rows):
    """Whether any comparison fails; stops at the first one."""
    return any(not row.passed and not row.optional for row in rows)


def test_layers_configurations_and_solver_equal_the_official_ones(golden):
    results = check_folder(golden, [name.split(".")[0] for name in FILES])
    assert {stem: failures(rows) for stem, rows in results.items()} == {name.split(".")[0]: [] for name in FILES}
    assert all_passed(results)
    counts = {stem: sum(row.note != "input" for row in rows) for stem, rows in results.items()}
    assert counts == {"a_gdl_affine": 42, "b_fast_rcnn": 118, "configs_effective": 713, "d_solver": 22}


def test_detector_equals_the_official_one(detector):
    results = check_folder(detector, ["d_model_r50w16", "d_train3"])
    assert {stem: failures(rows) for stem, rows in results.items()} == {"d_model_r50w16": [], "d_train3": []}


def test_all_26_official_configurations_are_walked(golden):
    content = parity.read_json(golden / "configs_effective.json")
    assert set(content["stages"]) == set(parity_recipe.FILES) and len(parity_recipe.FILES) == 26
    keys = {key for stage in content["stages"].values() for key in stage} | set(content["added_or_changed_defaults"])
    assert keys == set(parity_recipe.OFFICIAL_KEYS)


# Mutants: what a wrong implementation would do. Each takes monkeypatch and changes one thing.


def gradient_not_scaled(monkeypatch):
    monkeypatch.setattr(gradient._ScaledGradient, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def gradient_scaled_twice(monkeypatch):
    monkeypatch.setattr(
        gradient._ScaledGradient, "backward", staticmethod(lambda ctx, grad: (grad * ctx.scale**2, None))
    )


def features_scaled_too(monkeypatch):
    monkeypatch.setattr(gradient._ScaledGradient, "forward", staticmethod(_scale_forward))


def _scale_forward(ctx, x, scale):
    ctx.scale = scale
    return x * scale


def affine_around_one(monkeypatch):
    monkeypatch.setattr(gradient.ChannelAffine, "forward", lambda self, x: x * (1 + self.weight) + self.bias)


@pytest.mark.parametrize("mutate", [gradient_not_scaled, gradient_scaled_twice, features_scaled_too, affine_around_one])
def test_layer_mutant_fails(golden, monkeypatch, mutate):
    mutate(monkeypatch)
    assert failures(check_folder(golden, ["a"])["a_gdl_affine"])


def dropout_on_both_heads(monkeypatch):
    def forward(self, x):
        x = self.dropout(x)
        return self.cls_score(x), self.bbox_pred(x)

    monkeypatch.setattr(decoupled.DropoutOutputLayers, "forward", forward)


def dropout_on_the_box_head(monkeypatch):
    def forward(self, x):
        return self.cls_score(x), self.bbox_pred(self.dropout(x))

    monkeypatch.setattr(decoupled.DropoutOutputLayers, "forward", forward)


def dropout_of_scores(monkeypatch):
    def forward(self, x):
        return torch.nn.functional.dropout(self.cls_score(x), 0.8, self.training), self.bbox_pred(x)

    monkeypatch.setattr(decoupled.DropoutOutputLayers, "forward", forward)


def dropout_at_inference(monkeypatch):
    def forward(self, x):
        return self.cls_score(torch.nn.functional.dropout(x, 0.8)), self.bbox_pred(x)

    monkeypatch.setattr(decoupled.DropoutOutputLayers, "forward", forward)


@pytest.mark.parametrize(
    "mutate", [dropout_on_both_heads, dropout_on_the_box_head, dropout_of_scores, dropout_at_inference]
)
def test_predictor_mutant_fails(golden, monkeypatch, mutate):
    mutate(monkeypatch)
    assert fails(parity_heads.check_predictor(golden))


def affine_before_the_scale(monkeypatch):
    def forward(self, features):
        changed = {
            level: gradient.scale_gradient(affine(features[level]), self.scale) for level, affine in self.items()
        }
        return features | (changed if self.enabled else {})

    monkeypatch.setattr(decoupled.Decoupling, "forward", forward)


def nothing_at_scale_zero(monkeypatch):
    monkeypatch.setattr(decoupled, "scale_gradient", lambda x, scale: x.detach() if scale == 0 else x * 1)


def affine_of_the_other_branch(monkeypatch):
    rows = tuple(
        (
            pattern.replace("rcnn", "x").replace("rpn\\.", "rcnn\\.").replace("x", "rpn")
            if "affine" in pattern
            else pattern,
            new,
        )
        for pattern, new in rename.OFFICIAL_DEFRCN
    )
    monkeypatch.setitem(rename.TABLES, "defrcn", rows)


def one_affine_for_both(monkeypatch):
    real = decoupled.Decoupling.forward
    seen = []

    def forward(self, features):
        seen.append(self)
        return real(seen[0], features)

    monkeypatch.setattr(decoupled.Decoupling, "forward", forward)


def always_decoupled(monkeypatch):
    real = decoupled.Decoupling.__init__
    monkeypatch.setattr(
        decoupled.Decoupling,
        "__init__",
        lambda self, channels, *, scale, enabled: real(self, channels, scale=scale, enabled=True),
    )


def affine_frozen(monkeypatch):
    monkeypatch.setattr(freeze, "ROI_FEATURE_PARTS", ("res5", "decouple"))


def other_cells(monkeypatch):
    real = roi_heads.pool_cells
    monkeypatch.setattr(
        roi_heads,
        "pool_cells",
        lambda *args, step, **keys: real(*args, step=1, **keys)[:, :, 1::2, 1::2].repeat(1, 1, 2, 2)[:, :, :4, :4],
    )


def part(name, *args):
    """One part of the detector's check."""

    def run(folder):
        golden = parity_detector.GoldenDetector(folder)
        ledger = parity.Ledger(golden.values)
        return getattr(parity_model, name)(ledger, golden, *args)

    return run


@pytest.mark.parametrize(
    ("mutate", "check"),
    [
        (gradient_not_scaled, part("_compare_training", "novel")),
        (affine_before_the_scale, part("_compare_training", "novel")),
        (affine_frozen, part("_compare_training", "novel")),
        (nothing_at_scale_zero, part("_compare_training", "novel")),
        (affine_of_the_other_branch, part("_compare_eval", "base")),
        (one_affine_for_both, part("_compare_eval", "base")),
        (other_cells, part("_compare_eval", "novel")),
        (always_decoupled, part("_compare_switches")),
        (affine_before_the_scale, parity_detector.check_steps),
    ],
)
def test_detector_mutant_fails(detector, monkeypatch, mutate, check):
    mutate(monkeypatch)
    assert fails(check(detector))


@pytest.fixture
def known_switches(golden, monkeypatch):
    """Spare the sixteen models that tell what trains; their answers come from the file."""
    answers = parity.read_json(golden / "d_solver.json")["trainable_prefixes"]
    monkeypatch.setattr(parity_recipe, "_trainable", answers.get)


# Recipes: what a wrong line in a configuration file would do.


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """edit(file, old, new) -> the shipped configurations with one text replaced, in place of the real ones."""
    shutil.copytree(parity_detector.CONFIGS.parent, tmp_path / "configs")
    folder = tmp_path / "configs" / "defrcn"

    def apply(file, old, new):
        path = folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    monkeypatch.setattr(parity_detector, "CONFIGS", folder)
    monkeypatch.setattr(parity_recipe, "CONFIGS", folder)
    return apply


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("voc_novel.yaml", "BACKWARD_SCALE: 0.001", "BACKWARD_SCALE: 0.01", "BACKWARD_SCALE"),  # the paper's
        ("coco_novel.yaml", "BACKWARD_SCALE: 0.01", "BACKWARD_SCALE: 0.001", "BACKWARD_SCALE"),
        ("voc_base.yaml", "BACKWARD_SCALE: 0.0\n", "BACKWARD_SCALE: 1.0\n", "RPN.BACKWARD_SCALE"),
        ("voc_novel.yaml", '"gfsod", 5, 0.01, [2000], 2500', '"gfsod", 5, 0.01, [1600], 2000', "SOLVER."),
        ("coco_novel.yaml", '"fsod", 10, 0.01, [2000]', '"fsod", 10, 0.01, [2400]', "SOLVER.STEPS"),
        ("voc_novel.yaml", "1000, 0]", "1000, 10]", "SOLVER.WARMUP_ITERS"),
        ("voc_base.yaml", "FREEZE_AT: 3", "FREEZE_AT: 2", "FREEZE_AT"),
        ("coco_novel.yaml", "FREEZE_FEAT: True", "FREEZE_FEAT: False", "FREEZE_FEAT"),
        ("voc_novel.yaml", '"dropout"', '"linear"', "CLS_DROPOUT"),
        ("coco_novel.yaml", 'RECORDS: "image"', 'RECORDS: "instance"', "DATASETS.TRAIN"),
        ("coco_base.yaml", "WEIGHT_DECAY: 0.00005", "WEIGHT_DECAY: 0.0001", "WEIGHT_DECAY"),
        ("voc_novel.yaml", "ENABLED: True", "ENABLED: False", "PCB_ENABLE"),
        ("../base/r101_c4_pool7.yaml", "RESOLUTION: 7", "RESOLUTION: 14", "POOLER_RESOLUTION"),
    ],
)  # fmt: skip
def test_changed_configuration_fails(golden, edit, file, old, new, found):
    edit(file, old, new)
    wrong = failures(check_folder(golden, ["configs"])["configs_effective"])
    assert wrong and all(found in name for name in wrong)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  WEIGHT_DECAY_BIAS: 0.0001\n", ""),
        ("WEIGHT_DECAY_BIAS: 0.0001", "WEIGHT_DECAY_BIAS: 0.00005"),
        ("STEPS: (10000, 13300)", "STEPS: (10000, 13299)"),
        ("WARMUP_ITERS: 100", "WARMUP_ITERS: 200"),
        ("  BASE_LR: 0.02\n", "  BASE_LR: 0.02\n  NESTEROV: True\n"),
    ],
)
def test_changed_solver_fails(golden, edit, known_switches, old, new):
    edit("voc_base.yaml", old, new)
    wrong = failures(check_folder(golden, ["d_solver"])["d_solver"])
    assert wrong and all(name.endswith("/param_groups") or name.startswith("lr_") for name in wrong)


def affine_frozen_with_the_rpn(monkeypatch):
    monkeypatch.setattr(freeze, "RPN_PARTS", ("rpn_head", "decouple"))


def test_frozen_affine_fails(golden, monkeypatch):
    affine_frozen_with_the_rpn(monkeypatch)
    wrong = failures(check_folder(golden, ["d_solver"])["d_solver"])
    assert len(wrong) == 8 and all("RPN.FREEZE=True" in name for name in wrong)


# Changed files: the tool must notice whatever is lost, added or altered.


@pytest.fixture
def copy(golden, tmp_path):
    folder = tmp_path / "golden"
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(golden / name, folder / name)
    return folder


def edit_npz(path, change):
    arrays = parity.read_npz(path)
    change(arrays)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("file", "change", "failed"),
    [
        ("a_gdl_affine.npz", lambda a: a.pop("l2_nobias_y"), "l2_nobias_y"),
        ("a_gdl_affine.npz", lambda a: a.update(l9_y=a["x"]), "l9_y"),
        ("a_gdl_affine.npz", lambda a: a["l3_grad_x"].__iadd__(3e-5), "l3_grad_x"),
        ("b_fast_rcnn.npz", lambda a: a.pop("k20/infB_img0_rows"), "k20/infB_img0_rows"),
        ("b_fast_rcnn.npz", lambda a: a.update({"k5/new": np.zeros(2)}), "k5/new"),
        ("b_fast_rcnn.npz", lambda a: a.pop("k5/metric_fg_cls_accuracy"), "k5/metric_fg_cls_accuracy"),
    ],
)
def test_changed_arrays_fail(copy, file, change, failed):
    edit_npz(copy / file, change)
    assert set(failures(check_folder(copy, [file.split(".")[0]])[file.split(".")[0]])) == {failed}


@pytest.mark.parametrize(
    ("file", "change", "failed"),
    [
        ("configs_effective.json", lambda d: d["stages"].pop("voc/defrcn_det_r101_base2.yaml"), "det_r101_base2"),
        ("configs_effective.json", lambda d: d["stages"].update({"voc/new.yaml": {"A": 1}}), "voc/new.yaml/A"),
        ("configs_effective.json", lambda d: d["stages"]["coco/defrcn_det_r101_base.yaml"].update(A=1), "base.yaml/A"),
        (
            "configs_effective.json",
            lambda d: d["stages"]["coco/defrcn_det_r101_base.yaml"].pop("MODEL.RPN.FREEZE"),
            "MODEL.RPN.FREEZE",
        ),
        ("configs_effective.json", lambda d: d["added_or_changed_defaults"].update(A={"x": 1}), "defaults/A"),
        ("configs_effective.json", lambda d: d.update(more=1), "more"),
        ("d_solver.json", lambda d: d.pop("lr_defrcn_det_r101_base_coco"), "lr_defrcn_det_r101_base_coco"),
        ("d_solver.json", lambda d: d["base"].update(more=1), "base/more"),
        ("d_solver.json", lambda d: d["base"]["param_groups"].pop("affine_rpn.bias"), "base/param_groups"),
        ("d_solver.json", lambda d: d["trainable_prefixes"].update(new=[]), "trainable_prefixes/new"),
    ],
)
def test_changed_json_fails(copy, known_switches, file, change, failed):
    content = parity.read_json(copy / file)
    change(content)
    (copy / file).write_text(json.dumps(content))
    found = failures(check_folder(copy, [file.split(".")[0]])[file.split(".")[0]])
    assert found and all(failed in name for name in found), found
