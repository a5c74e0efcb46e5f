"""The objective: every recorded case with its gradients, hand-computed losses, batches that lack something."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fsdet.methods.os2d.objective import Objective

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "os2d" / "objective.npz")
CASES = json.loads(str(GOLDEN["config_json"]))
KINDS = {"ContrastiveLoss": "contrastive", "RLL": "rll"}


def golden(name):
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def objective_of(case):
    return Objective(
        kind=KINDS[case["class_objective"]],
        positive_margin=case["pos_margin"],
        negative_margin=case["neg_margin"],
        negative_ratio=case["neg_to_pos_ratio"],
        rll_ratio=case["rll_neg_weight_ratio"] or 0.001,
        box_weight=case["loc_weight"],
        negative_weight=case["class_neg_weight"],
    )


def arguments_of(case):
    """Arguments of a call, and its leaves under the names of the recorded gradients."""
    leaves = {name: golden(name).requires_grad_() for name in ("cls_preds", "cls_preds_for_neg", "loc_preds")}
    remapped = case["remap_classification_targets"] and case["remapped_targets_passed"]
    positional = (
        leaves["cls_preds"],
        leaves["loc_preds"].movedim(2, -1),
        golden(case["targets"]),
        golden("loc_targets").movedim(2, -1),
    )
    named = {
        "remapped": golden("cls_targets_remapped") if remapped else None,
        "negative_scores": leaves["cls_preds_for_neg"] if case["separate_scores_for_negatives"] else None,
    }
    return positional, named, leaves


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(actual).detach(), torch.as_tensor(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_recorded_losses_and_gradients(name):
    case = CASES[name]
    objective, (positional, named, leaves) = objective_of(case), arguments_of(case)
    losses = objective(*positional, **named)
    total = sum(losses.values())
    close(total, golden(f"{name}/loss"))
    close(losses["loss_box"], case["loc_weight"] * golden(f"{name}/loc"))
    close(losses["loss_cls_pos"], golden(f"{name}/cls_pos"))
    close(losses["loss_cls_neg"], case["class_neg_weight"] * golden(f"{name}/cls_neg"))
    close(losses["loss_cls_pos"] + losses["loss_cls_neg"], golden(f"{name}/cls"))
    close(objective.weighted(objective.per_anchor(*positional, **named)), golden(f"{name}/cls_per_anchor"))
    total.backward()
    for leaf, tensor in leaves.items():
        if f"{name}/grad_{leaf}" in GOLDEN:
            close(tensor.grad, golden(f"{name}/grad_{leaf}"), atol=1e-6)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("name", [name for name in CASES if f"{name}/mining/loss" in GOLDEN])
def test_recorded_losses_of_single_anchors(name):
    case = CASES[name]
    positional, named, _ = arguments_of(case)
    found = objective_of(case).per_anchor(*positional, **named)
    close(found.class_loss, golden(f"{name}/mining/cls_loss"))
    close(found.box_loss, golden(f"{name}/mining/loc_loss"))
    assert torch.equal(found.positive, golden(f"{name}/mining/pos_mask"))
    assert torch.equal(found.negative, golden(f"{name}/mining/neg_mask"))
    assert torch.equal(found.box_positive, golden(f"{name}/mining/pos_for_regression"))
    positives = found.class_loss[found.positive].sum()
    negatives = case["class_neg_weight"] * found.class_loss[found.negative].sum()
    total = (positives + negatives) / found.positive.sum()
    total = total + case["loc_weight"] * found.box_loss.sum() / found.box_positive.sum()
    close(total, golden(f"{name}/mining/loss"))


def test_every_recorded_array_is_read():
    """What is left out: the losses of the release on a CPU, which drop the negatives of rll."""
    inputs = {"config_json", "cls_preds", "cls_preds_for_neg", "cls_targets", "cls_targets_remapped"}
    inputs |= {"loc_preds", "loc_targets", "cls_targets_no_positives"}
    results = ("loss", "loc", "cls", "cls_pos", "cls_neg", "cls_per_anchor", "grad_cls_preds", "grad_loc_preds")
    results += ("grad_cls_preds_for_neg", *(f"mining/{k}" for k in ("cls_loss", "loc_loss", "pos_mask", "neg_mask")))
    results += ("mining/pos_for_regression", "mining/loss")
    read = inputs | {f"{name}/{result}" for name in CASES for result in results}
    assert {name for name in GOLDEN.files if "/on_cpu/" not in name} <= read


# One picture, two classes, four anchors. Margins 0.6 and 0.5.
SCORES = torch.tensor([[[0.4, 0.9, 0.7, 0.1], [0.8, 0.6, 0.55, 0.3]]])
LABELS = torch.tensor([[[1, -1, 0, 0], [0, 0, 0, -1]]], dtype=torch.int8)


def call(objective, scores=SCORES, labels=LABELS, **named):
    codes = torch.zeros(*scores.shape, 4)
    wanted = torch.tensor([0.5, 0.0, 0.0, 3.0]).expand_as(codes)
    return {name: float(loss) for name, loss in objective(scores, codes, labels, wanted, **named).items()}


def test_by_hand():
    """One positive that costs 0.1; negatives that cost 0.1 in class 0, and 0.15, 0.05, 0.025 in class 1."""
    box = 0.2 * (0.5**2 / 2 + 2.5)
    losses = call(Objective("hinge", negative_ratio=2))
    assert losses == pytest.approx({"loss_cls_pos": 0.1, "loss_cls_neg": 0.15 + 0.1, "loss_box": box})
    losses = call(Objective("hinge", negative_ratio=None, box_weight=0))
    assert losses == pytest.approx({"loss_cls_pos": 0.1, "loss_cls_neg": 0.325, "loss_box": 0})
    losses = call(Objective("contrastive", negative_ratio=3, negative_weight=0.5))
    squares = 0.15**2 + 0.1**2 + 0.05**2
    assert losses == pytest.approx({"loss_cls_pos": 0.01, "loss_cls_neg": 0.5 * squares, "loss_box": box})
    weights = [math.exp((cost - 0.15) / 0.15 * math.log(100)) for cost in (0.15, 0.05, 0.025)]
    second = (0.15 * weights[0] + 0.05 * weights[1] + 0.025 * weights[2]) / sum(weights)
    losses = call(Objective("rll", rll_ratio=0.01, negative_ratio=0))
    assert losses == pytest.approx({"loss_cls_pos": 0.1, "loss_cls_neg": (0.1 + second) / 2, "loss_box": box})


def test_rll_averages_over_what_costs():
    """A positive beyond its margin and a class without costly negatives change no mean."""
    labels = torch.tensor([[[1, 1, 0, 0], [-1, -1, -1, 0]]])
    losses = call(Objective("rll", box_weight=0), labels=labels)
    assert losses == pytest.approx({"loss_cls_pos": 0.1, "loss_cls_neg": 0.1, "loss_box": 0})
    assert call(Objective("hinge"), labels=labels)["loss_cls_pos"] == pytest.approx(0.05)


def test_ratio_counts_over_the_whole_batch():
    """The only positive lies in the first picture, the negative that it brings in the second."""
    scores = torch.tensor([[[0.4, 0.55]], [[0.9, 0.6]]])
    labels = torch.tensor([[[1, 0]], [[0, 0]]])
    assert call(Objective("hinge", negative_ratio=1), scores, labels)["loss_cls_neg"] == pytest.approx(0.2)


def test_fraction_of_a_negative_is_none():
    assert call(Objective("hinge", negative_ratio=0.5))["loss_cls_neg"] == 0


@pytest.mark.parametrize("kind", ["rll", "contrastive", "hinge"])
def test_no_positive_is_no_class_loss_and_one_warning(kind, caplog):
    """Also where remapping leaves no positive, and where nothing is kept back by a ratio."""
    scores = SCORES.clone().requires_grad_()
    objective = Objective(kind, negative_ratio=None, box_weight=1.0)
    remapped = torch.where(LABELS == 1, -1, LABELS)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            losses = objective(scores, torch.zeros(1, 2, 4, 4), LABELS, torch.ones(1, 2, 4, 4), remapped=remapped)
    assert losses["loss_cls_pos"] == 0 and losses["loss_cls_neg"] == 0 and losses["loss_box"] == 2.0
    sum(losses.values()).backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores))
    assert len(caplog.records) == 1 and "INPUT.PATCH.SCALE" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        call(Objective(kind), labels=remapped)  # another training
        call(Objective(kind))
    assert len(caplog.records) == 1


def test_all_negatives_learned():
    scores = torch.tensor([[[0.4, 0.5, 0.3]]], requires_grad=True)
    codes = torch.zeros(1, 1, 3, 4)
    losses = Objective("rll")(scores, codes, torch.tensor([[[1, 0, 0]]]), codes)
    sum(losses.values()).backward()
    assert losses["loss_cls_neg"] == 0
    assert torch.equal(scores.grad, torch.tensor([[[-0.5, 0.0, 0.0]]]))


def test_negatives_leave_the_scores_of_positives_alone():
    scores, separate = SCORES.clone().requires_grad_(), SCORES.clone().requires_grad_()
    codes = torch.zeros(1, 2, 4, 4)
    sum(Objective("rll")(scores, codes, LABELS, codes, negative_scores=separate).values()).backward()
    assert torch.equal(scores.grad != 0, LABELS == 1)
    assert torch.equal(separate.grad != 0, (LABELS == 0) & (SCORES > 0.5))


def test_targets_of_other_anchors_are_not_read():
    wanted = torch.full((1, 2, 4, 4), float("nan"))
    wanted[LABELS == 1] = 0.0
    losses = Objective("rll")(SCORES, torch.zeros(1, 2, 4, 4), LABELS, wanted)
    assert losses["loss_box"] == 0


def test_half_precision_gives_single():
    losses = Objective("rll")(SCORES.bfloat16(), torch.zeros(1, 2, 4, 4).bfloat16(), LABELS, torch.ones(1, 2, 4, 4))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert losses["loss_box"] == pytest.approx(0.2 * 2)


@pytest.mark.parametrize("shape", [(1, 0, 4), (1, 2, 0), (0, 2, 4)])
def test_nothing_to_judge(shape):
    labels = torch.zeros(shape, dtype=torch.int8)
    assert set(call(Objective("rll"), torch.zeros(shape), labels).values()) == {0.0}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"kind": "bce"}, "OS2D.OBJECTIVE"),
        ({"rll_ratio": 0.0}, "OS2D.RLL_RATIO"),
        ({"rll_ratio": 1.0}, "OS2D.RLL_RATIO"),
        ({"negative_ratio": -1}, "OS2D.NEGATIVE_RATIO"),
    ],
)
def test_settings_out_of_range(settings, key):
    with pytest.raises(ValueError, match=key):
        Objective(**settings)
