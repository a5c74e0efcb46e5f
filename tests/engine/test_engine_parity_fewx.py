"""Golden files of FewX: fsdet passes, mutants and altered files fail."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes

from fsdet.data import episode_draws, prepare_fewx
from fsdet.engine import parity, parity_defrcn, parity_fewx
from fsdet.engine import parity_fewx_detector as detector_parts
from fsdet.engine.parity import check_folder
from fsdet.engine.parity_fewx_data import check_rules
from fsdet.engine.parity_fewx_detector import STAGES, close, identity_permutations, matching_order, recorded
from fsdet.engine.parity_fewx_eval import check_evaluation
from fsdet.engine.parity_fewx_heads import check_attention, check_initialisation, check_relations
from fsdet.engine.parity_fewx_recipe import check_groups
from fsdet.engine.parity_fewx_training import SHORT, check_losses, check_step
from fsdet.methods.fewx import contrastive, detector, relation, roi_heads, rpn

COPIES = Path(__file__).resolve().parents[1] / "golden" / "fewx"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "fewx"
LARGE = ("tiny_weights", "a_attention_rpn", "b_relation_heads", "c_detector_loss", "c_train_step", "d_eval")


@pytest.fixture(scope="module")
def golden():
    """Folder of the whole set, whose larger files are not kept here."""
    if not all((SHARED / f"{name}.npz").is_file() for name in LARGE):
        pytest.skip(f"the golden files of the detector ({', '.join(LARGE)}) are not here")
    return SHARED


def failures(rows):
    return [row.name for row in rows if not row.passed and not row.optional]


def fails(rows):
    """Whether any comparison fails; stops at the first one."""
    return any(not row.passed and not row.optional for row in rows)


def test_data_and_optimizer_groups_equal_the_released_ones():
    results = check_folder(COPIES, ["e", "f", "g"])
    assert {stem: failures(rows) for stem, rows in results.items()} == {
        "e_support_crop": [], "f_data_rules": [], "g_optimizer_groups": [],
    }  # fmt: skip
    counts = {stem: sum(row.note != "input" for row in rows) for stem, rows in results.items()}
    assert counts == {"e_support_crop": 2, "f_data_rules": 15, "g_optimizer_groups": 8}


def test_detector_equals_the_released_one(golden):
    """In the narrow ways and, on this set without exception, in those of wide detectors and of training."""
    results = check_folder(golden, ["a", "b", "c", "d", "tiny"])
    assert {stem: [row.name for row in rows if not row.passed] for stem, rows in results.items()} == {
        stem: [] for stem in results
    }
    counts = {stem: sum(row.note != "input" and not row.optional for row in rows) for stem, rows in results.items()}
    assert counts == {
        "a_attention_rpn": 22, "b_full_size_init_stats": 16, "b_relation_heads": 13, "c_detector_loss": 53,
        "c_train_step": 52, "d_eval": 14, "tiny_weights": 289,
    }  # fmt: skip


def test_both_methods_are_told_apart_by_their_files():
    assert parity.find_family(COPIES, ["e_support_crop", "g_optimizer_groups"]) is parity_fewx
    assert parity.find_family(COPIES, ["c_surgery"]) is parity_defrcn
    assert set(parity_fewx.CHECKERS) == set(parity_fewx.SCHEMA)


# Mutants: what a wrong implementation would do. Each takes monkeypatch and changes one thing.


def first_shot_alone(monkeypatch):
    monkeypatch.setattr(
        rpn, "attention_kernels", lambda pooled, shots: pooled.unflatten(0, (-1, shots))[:, 0].mean(dim=(2, 3))
    )
    monkeypatch.setattr("fsdet.engine.parity_fewx_heads.attention_kernels", rpn.attention_kernels)
    monkeypatch.setattr(detector, "attention_kernels", rpn.attention_kernels)


def attention_added(monkeypatch):
    def propose(self, features, image_sizes, kernels, pairs):
        weighted = features + kernels[[number for _, number in pairs]][..., None, None]
        images = rpn.ImageList(weighted, [image_sizes[image] for image, _ in pairs])
        return rpn.FewShotRPN.forward(self, images, {"res4": weighted})[0]

    monkeypatch.setattr(rpn.AttentionRPN, "propose", propose)


def few_candidates_only(monkeypatch):
    """NMS stops at the first candidates even where too few survive."""
    real = rpn.AttentionRPN._best
    monkeypatch.setattr(rpn, "FIRST_CANDIDATES", 120)
    monkeypatch.setattr(
        rpn.AttentionRPN, "_best", lambda self, a, lo, d, o, count, s: real(self, a, lo, d, o, min(count, 120), s)
    )


@pytest.mark.parametrize("mutate", [first_shot_alone, attention_added, few_candidates_only])
def test_attention_mutant_fails(golden, monkeypatch, mutate):
    mutate(monkeypatch)
    assert fails(check_attention(golden))


def halves_swapped(monkeypatch):
    real = relation.MultiRelationHead._halves

    def swapped(self, feature, half, fc_bias):
        other = slice(None, self.channels) if half.start else slice(self.channels, None)
        return real(self, feature, other, fc_bias)

    monkeypatch.setattr(relation.MultiRelationHead, "_halves", swapped)


def bias_forgotten(monkeypatch):
    real = relation.MultiRelationHead._halves
    monkeypatch.setattr(
        relation.MultiRelationHead, "_halves", lambda self, feature, half, fc_bias: real(self, feature, half, None)
    )


def cosine_in_the_local_head(monkeypatch):
    monkeypatch.setattr(
        relation, "_correlation", lambda a, b: torch.nn.functional.cosine_similarity(a.flatten(2), b.flatten(2), dim=2)
    )


def columns_swapped(monkeypatch):
    monkeypatch.setattr(roi_heads, "MATCH", 1)


@pytest.mark.parametrize("mutate", [halves_swapped, bias_forgotten, cosine_in_the_local_head, columns_swapped])
def test_relation_mutant_fails(golden, monkeypatch, mutate):
    mutate(monkeypatch)
    assert fails(check_relations(golden))


@pytest.mark.parametrize(("name", "value"), [("_INIT_STD", 0.0101), ("_BOX_INIT_STD", 0.01)])
def test_other_initialisation_fails(golden, monkeypatch, name, value):
    monkeypatch.setattr(relation, name, value)
    assert fails(check_initialisation(golden))


def test_true_boundary_fails_in_the_two_short_cases_alone(golden, monkeypatch):
    real = contrastive.select_rows
    monkeypatch.setattr(contrastive, "select_rows", lambda *args, legacy_boundary: real(*args, legacy_boundary=False))
    assert {name.split(".")[0] for name in failures(check_losses(golden))} == set(SHORT)


def more_background(monkeypatch):
    monkeypatch.setattr(contrastive, "_BACKGROUND_SHARE", 0.5)


def least_likely_rows(monkeypatch):
    monkeypatch.setattr(contrastive, "_hardest", lambda rows, hardness, count: rows[(-hardness[rows]).topk(count)[1]])


@pytest.mark.parametrize("mutate", [more_background, least_likely_rows])
def test_loss_mutant_fails(golden, monkeypatch, mutate):
    mutate(monkeypatch)
    assert fails(check_losses(golden))


def negative_anchors_kept(monkeypatch):
    monkeypatch.setattr(rpn.AttentionRPN, "label_and_sample_anchors", rpn.FewShotRPN.label_and_sample_anchors)


def negative_regions_kept(monkeypatch):
    monkeypatch.setattr(roi_heads, "BACKGROUND", 0)


def supports_in_rgb(monkeypatch):
    real = detector.FewXRCNN.encode_crops
    monkeypatch.setattr(
        detector.FewXRCNN, "encode_crops", lambda self, crops, boxes, shots: real(self, crops.flip(1), boxes, shots)
    )


def supports_without_gradient(monkeypatch):
    real = detector.FewXRCNN.encode_crops

    def encode(self, crops, boxes, shots):
        kernels, features = real(self, crops, boxes, shots)
        return kernels.detach(), features

    monkeypatch.setattr(detector.FewXRCNN, "encode_crops", encode)


@pytest.mark.parametrize(
    "mutate", [negative_anchors_kept, negative_regions_kept, supports_in_rgb, supports_without_gradient]
)
def test_training_mutant_fails(golden, monkeypatch, mutate):
    mutate(monkeypatch)
    assert fails(check_step(golden))


def heads_read_the_attention_map(monkeypatch):
    real = rpn.AttentionRPN.propose
    kept = []

    def propose(self, features, image_sizes, kernels, pairs):
        kept.append(features * kernels[:1, :, None, None])
        return real(self, features, image_sizes, kernels, pairs)

    monkeypatch.setattr(rpn.AttentionRPN, "propose", propose)
    regions = roi_heads.RelationRes5ROIHeads.region_features
    monkeypatch.setattr(
        roi_heads.RelationRes5ROIHeads, "region_features", lambda self, features, boxes: regions(self, kept[-1], boxes)
    )


def shots_averaged_before_res5(monkeypatch):
    def support_features(self, features, boxes):
        pooled = self.support_pooler([features], [Boxes(box) for box in boxes.split(1)])
        mean = pooled.mean(dim=0, keepdim=True).expand_as(pooled)
        return pooled, self._stage(mean[:, :, :: self.pooler.step, :: self.pooler.step])

    monkeypatch.setattr(roi_heads.RelationRes5ROIHeads, "support_features", support_features)


def nms_over_all_classes(monkeypatch):
    real = roi_heads.batched_nms
    monkeypatch.setattr(
        roi_heads, "batched_nms", lambda boxes, scores, classes, iou: real(boxes, scores, classes * 0, iou)
    )


@pytest.mark.parametrize(
    "mutate",
    [
        supports_in_rgb, first_shot_alone, heads_read_the_attention_map, shots_averaged_before_res5,
        nms_over_all_classes,
    ],
)  # fmt: skip
def test_evaluation_mutant_fails(golden, monkeypatch, mutate):
    mutate(monkeypatch)
    assert fails(check_evaluation(golden))


def only_smaller_objects_spoil_an_image(monkeypatch):
    monkeypatch.setattr(prepare_fewx, "SMALLEST_BASE", 600)


def table_sorted_by_class(monkeypatch):
    real = prepare_fewx.support_rows
    monkeypatch.setattr(
        prepare_fewx, "support_rows", lambda data: sorted(real(data), key=lambda row: row["category_id"])
    )


def last_of_the_permutation(monkeypatch):
    monkeypatch.setattr(
        episode_draws,
        "_first_of_permutation",
        lambda size, seed: int(np.random.RandomState(seed).permutation(size)[-1]),
    )


@pytest.mark.parametrize(
    "mutate", [only_smaller_objects_spoil_an_image, table_sorted_by_class, last_of_the_permutation]
)
def test_data_mutant_fails(monkeypatch, mutate):
    mutate(monkeypatch)
    assert failures(check_rules(COPIES))


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("coco_base.yaml", "  HEAD_LR_FACTOR: 2.0\n", "", {"base/trainable", "finetune/trainable"}),
        ("coco_base.yaml", "FREEZE_AT: 3", "FREEZE_AT: 2", {"base/trainable", "base/frozen"}),
        ("coco_novel.yaml", "FREEZE_AT: 5", "FREEZE_AT: 3", {"finetune/trainable", "finetune/frozen"}),
        ("coco_novel.yaml", '"fsod", 10, 0.001', '"fsod", 10, 0.002', {"finetune/trainable"}),
        ("coco_base.yaml", "SOLVER:\n", "SOLVER:\n  NESTEROV: True\n", {"base/nesterov", "finetune/nesterov"}),
    ],
)
def test_changed_configuration_fails(tmp_path, monkeypatch, file, old, new, found):
    shutil.copytree(detector_parts.CONFIGS.parent, tmp_path / "configs")
    path = tmp_path / "configs" / "fewx" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    monkeypatch.setattr(detector_parts, "CONFIGS", path.parent)
    assert set(failures(check_groups(COPIES))) == found


# Changed files: the tool must notice whatever is lost, added or altered.


def edited(folder, tmp_path, stem, change):
    """A golden folder of one changed file, and the weights."""
    source = parity.golden_file(folder, stem)
    if (folder / "tiny_weights.npz").is_file():
        shutil.copyfile(folder / "tiny_weights.npz", tmp_path / "tiny_weights.npz")
    if source.suffix == ".json":
        content = parity.read_json(source)
        change(content)
        (tmp_path / source.name).write_text(json.dumps(content))
    else:
        arrays = parity.read_npz(source)
        change(arrays)
        np.savez(tmp_path / source.name, **arrays)
    return failures(check_folder(tmp_path, [stem])[stem])


@pytest.mark.parametrize(
    ("stem", "change", "failed"),
    [
        ("b_relation_heads", lambda a: a.pop("patch_vector"), "patch_vector"),
        ("b_relation_heads", lambda a: a.update(more=a["logits_sum"]), "more"),
        ("b_relation_heads", lambda a: a["box_deltas"].__iadd__(0.01), "box_deltas"),
        ("b_relation_heads", lambda a: a["global_input"].__imul__(1.01), "global_input"),
        ("a_attention_rpn", lambda a: a["test_proposals_neg"].__setitem__((7, 0), 3.0), "test_proposals_neg"),
        ("a_attention_rpn", lambda a: a.pop("train_proposal_logits_pos"), "train_proposal_logits_pos"),
        ("c_detector_loss", lambda a: a.pop("tiny.loss_cls"), "tiny.loss_cls"),
        ("c_detector_loss", lambda a: a["fg32.selected_rows"].__setitem__(0, 255), "fg32.selected_rows"),
        ("tiny_weights", lambda a: a.update(other=a["pixel_std"]), "(file)"),
        ("tiny_weights", lambda a: a.pop("roi_heads.box_predictor.fc_2.bias"), "(file)"),
        ("tiny_weights", lambda a: a["pixel_mean"].__iadd__(1), "pixel_mean"),
    ],
)
def test_changed_arrays_fail(golden, tmp_path, stem, change, failed):
    names = edited(golden, tmp_path, stem, change)
    assert names and all(name.startswith(failed) for name in names), names


def test_removed_case_fails(golden, tmp_path):
    def drop(arrays):
        arrays["case_names"] = arrays["case_names"][:-1]

    assert edited(golden, tmp_path, "c_detector_loss", drop)[0].startswith("case_names")


@pytest.mark.parametrize(
    ("stem", "change", "failed"),
    [
        ("f_data_rules", lambda d: d.pop("sampled_supports"), "(file)"),
        ("f_data_rules", lambda d: d["sampled_supports"][0]["support_ann_ids"].reverse(), "sampled_supports"),
        ("f_data_rules", lambda d: d["support_pool"].pop("id"), "support_pool/id"),
        ("f_data_rules", lambda d: d.update(more=1), "more"),
        ("f_data_rules", lambda d: d["ten_shot_annotation_ids_in_order"].pop(), "ten_shot_annotation_ids_in_order"),
        ("g_optimizer_groups", lambda d: d.pop("finetune"), "finetune/"),
        ("g_optimizer_groups", lambda d: d["base"].update(more=1), "base/more"),
        ("g_optimizer_groups", lambda d: d["base"]["frozen"].pop(), "base/frozen"),
    ],
)
def test_changed_json_fails(tmp_path, stem, change, failed):
    names = edited(COPIES, tmp_path, stem, change)
    assert names and all(name.startswith(failed) for name in names), names


# Parts of the tool.


def test_order_is_taken_from_the_boxes_where_neighbours_have_changed_places():
    boxes = np.float32([[0, 0, 5, 5], [10, 10, 20, 20], [30, 30, 50, 40]])
    assert matching_order(boxes, boxes[[0, 2, 1]]).tolist() == [0, 2, 1]
    assert matching_order(boxes, boxes + np.float32(0.01)).tolist() == [0, 1, 2]
    assert matching_order(boxes, boxes[[0, 0, 1]]).tolist() == [0, 1, 2]  # no pairs: nothing to set right
    assert matching_order(None, boxes).tolist() == matching_order(boxes[:2], boxes).tolist() == [0, 1, 2]


def test_swapped_boxes_pass_by_logits_that_nearly_tie_alone():
    boxes, logits = np.float32([[0, 0, 5, 5], [9, 9, 20, 20]]), np.float32([1.0, 0.99995])
    for second, passes in ((0.99995, True), (0.9, False)):
        logits[1] = second
        ledger = detector_parts.ScaledLedger({"boxes": boxes, "logits": logits}, expected=("boxes", "logits"))
        rows = [*ledger.ranked(("boxes", boxes[::-1]), ("logits", logits)), *ledger.rest()]
        assert fails(rows) is not passes


def test_differences_are_scaled_by_the_largest_number():
    ledger = detector_parts.ScaledLedger({"x": np.float32([100.0, 0.1])}, expected=("x",))
    assert ledger.scaled("x", np.float32([100.0, 0.109])).passed
    assert not ledger.scaled("x", np.float32([100.0, 0.2])).passed
    assert not close("x", [1.0], [np.nan], 1.0).passed and not close("x", [1.0], [1.0, 1.0], 1.0).passed
    assert close("x", [], [], 0.0).passed


def test_permutations_and_methods_are_as_before_afterwards():
    real = torch.randperm
    with pytest.raises(KeyError), identity_permutations():
        assert torch.randperm(3, device="cpu").tolist() == [0, 1, 2]
        raise KeyError
    assert torch.randperm is real
    head = torch.nn.Linear(2, 2)
    with recorded(head=(head, "forward")) as calls:
        result = head(torch.ones(1, 2))
        kept = result.detach().clone()
        result.detach().mul_(2)
    assert torch.equal(calls["head"][0].result, kept) and "forward" not in head.__dict__


def test_every_stage_has_a_configuration():
    assert all((detector_parts.CONFIGS / file).is_file() for file, _ in STAGES.values())
