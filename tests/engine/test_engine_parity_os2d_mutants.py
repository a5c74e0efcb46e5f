"""Golden files of OS2D: what a wrong implementation would do makes the comparison fail."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fsdet.engine import parity_os2d_eval as evaluation_check
from fsdet.engine import parity_os2d_head as head_check
from fsdet.engine.parity_os2d_boxes import check_boxes
from fsdet.engine.parity_os2d_detector import VERSIONS
from fsdet.engine.parity_os2d_eval import check_metrics, check_sizes
from fsdet.engine.parity_os2d_head import check_head
from fsdet.engine.parity_os2d_losses import check_losses
from fsdet.engine.parity_os2d_model import check_model
from fsdet.engine.parity_os2d_training import check_step
from fsdet.evaluation import oneshot_style
from fsdet.layers import correlation
from fsdet.methods.os2d import decoding, detector, geometry, head, inference, mining, sampling, targets, templates
from fsdet.methods.os2d import transform_net as transform
from fsdet.methods.os2d.objective import AnchorLosses, Objective
from fsdet.methods.os2d.pyramid import Pyramid

COPIES = Path(__file__).resolve().parents[1] / "golden" / "os2d"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "os2d"
LARGE = ("head", "model", "train_step", "transform_net")


@pytest.fixture(scope="module")
def golden():
    """Folder of the whole set, whose larger files are not kept here."""
    if not all((SHARED / f"{name}.npz").is_file() for name in LARGE):
        pytest.skip(f"the golden files of the detector ({', '.join(LARGE)}) are not here")
    return SHARED


def all_fail(rows, names):
    """Whether all of these comparisons fail; looks no further than the last one."""
    left = set(names)
    for row in rows:
        left -= set() if row.passed or row.optional else {row.name}
        if not left:
            return True
    return False


# Each mutant takes monkeypatch and changes one thing; beside it stands what must fail.


def row_major(monkeypatch):
    monkeypatch.setattr(templates, "column_major", lambda cells: cells.permute(0, 2, 3, 1).flatten(1, 2))


def inversion_forgotten(monkeypatch):
    for module in (head, head_check):
        monkeypatch.setattr(module, "affine", lambda parameters, *, inverse: geometry.affine(parameters, inverse=False))


def feature_epsilon(monkeypatch):
    monkeypatch.setattr(correlation, "_LEAST_NORM", 1e-6)


def transform_epsilon(monkeypatch):
    monkeypatch.setattr(transform, "LEAST_NORM", 1e-5)


def relu_forgotten(monkeypatch):
    def forward(self, cells):
        return self.linear(self.conv(cells / (torch.linalg.vector_norm(cells, dim=1, keepdim=True) + 1e-6)))

    monkeypatch.setattr(transform.TransformNet, "forward", forward)


def half_cell_forgotten(monkeypatch):
    monkeypatch.setattr(head, "anchor_centers", lambda *size: geometry.anchor_centers(*size) - 0.5)


def half_extent_of_seven(monkeypatch):
    monkeypatch.setattr(
        head, "sampling_grid", lambda matrices, centers, size: sampling.sampling_grid(14 / 15 * matrices, centers, size)
    )


def zeros_beyond_the_border(monkeypatch):
    real = F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda *args, **keys: real(*args, **{**keys, "padding_mode": "zeros"}))


def all_points_count(monkeypatch):
    monkeypatch.setattr(sampling, "_INNER", slice(1, 14))
    monkeypatch.setattr(sampling, "_POINTS", 13 * 13)


def normalised_before_resampling(monkeypatch):
    real = templates.template_of
    monkeypatch.setattr(head_check, "template_of", lambda cells: real(correlation.normalize_cells(cells)))


def shear_ignored(monkeypatch):
    real = geometry.enclosing_boxes
    upright = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    monkeypatch.setattr(head, "enclosing_boxes", lambda matrices, anchors: real(matrices * upright, anchors))


def tiny_boxes(monkeypatch):
    monkeypatch.setattr(geometry, "_LEAST_SIZE", 0.0)


def negatives_reach_the_transform(monkeypatch):
    real = head.Matches
    monkeypatch.setattr(head, "Matches", lambda scores, codes, corners, _: real(scores, codes, corners, scores))


@pytest.mark.parametrize(
    ("mutate", "failed"),
    [
        (row_major, {"correlation_image0_class0", "v1/recognition", "v2/transform_raw"}),
        (inversion_forgotten, {"v2/theta", "v2/recognition", "v2/corners", "simple_inv/recognition"}),
        (feature_epsilon, {"v2_lownorm/recognition", "v2_lownorm_class/recognition"}),
        (transform_epsilon, {"v2_vanishing/localization"}),
        (relu_forgotten, {"v1/transform_raw", "v2/localization"}),
        (half_cell_forgotten, {"v1/recognition", "v2/grad_query", "v1_flip/recognition"}),
        (half_extent_of_seven, {"v1/recognition", "v2/recognition"}),
        (zeros_beyond_the_border, {"v1/recognition", "v2/recognition"}),
        (all_points_count, {"class_pool_mask", "v1/recognition"}),
        (normalised_before_resampling, {"class_maps_15x15_normalized", "correlation_image0_class0"}),
        (shear_ignored, {"v2/localization", "v2/grad_linear_bias_localization"}),
        (tiny_boxes, {"v1_tiny/localization"}),
        (negatives_reach_the_transform, {f"{v}/grad_query_transform_detached" for v in VERSIONS}),
    ],
)
def test_head_mutant_fails(golden, monkeypatch, mutate, failed):
    mutate(monkeypatch)
    assert all_fail(check_head(golden), failed)


def exact_suppression(monkeypatch):
    monkeypatch.setitem(decoding.SUPPRESSIONS, "reference", decoding.exact_nms)


def chunked_suppression_everywhere(monkeypatch):
    monkeypatch.setitem(decoding.SUPPRESSIONS, "exact", decoding.reference_nms)


def unbounded_sizes(monkeypatch):
    monkeypatch.setattr(geometry, "_MOST_LOG", np.inf)


def boxes_not_clipped(monkeypatch):
    monkeypatch.setattr(inference, "clip", lambda boxes, size: boxes)


def views_apart(monkeypatch):
    """Every view of a class is suppressed by itself."""
    real = inference.Search._search

    def each(self, picture, group, rows, floor):
        for place, own in group:
            single = [view[None, None] for view in own.flatten(0, 1)]
            found = [part for view in single for part in real(self, picture, [(place, view)], rows, floor)]
            yield inference.Found.join(found)

    monkeypatch.setattr(inference.Search, "_search", each)


def difficult_objects_count(monkeypatch):
    real = targets._Objects.of
    monkeypatch.setattr(
        targets._Objects, "of", lambda *args: replace(real(*args), difficult=torch.zeros_like(real(*args).difficult))
    )


def last_of_equal_overlaps(monkeypatch):
    real = targets.encode_boxes
    monkeypatch.setattr(targets, "encode_boxes", lambda boxes, anchors: real(boxes, anchors).flip(0))


def crops_off_the_grid(monkeypatch):
    monkeypatch.setattr(mining, "_grid", lambda lengths: lengths)


DECODED = {f"decode/{setting}/boxes" for setting in ("default", "score_above_0.25", "nms_across_classes")}


@pytest.mark.parametrize(
    ("mutate", "failed"),
    [
        (exact_suppression, {"nms_chunked/keep_sorted_by_score"}),
        (chunked_suppression_everywhere, {"nms_chunked/keep_exact_nms"}),
        (unbounded_sizes, {"decode_raw/boxes"}),
        (boxes_not_clipped, DECODED),
        (views_apart, {"decode/default/boxes"}),
        (difficult_objects_count, {"encode/cls_targets", "remap/cls_targets_remapped"}),
        (last_of_equal_overlaps, {"encode/loc_targets", "encode_pyramid/level1_loc_targets"}),
        (crops_off_the_grid, {"mining_crops/large_crop_boxes", "mining_crops/small_crop_boxes"}),
    ],
)
def test_box_mutant_fails(monkeypatch, mutate, failed):
    mutate(monkeypatch)
    assert all_fail(check_boxes(COPIES), failed)


def half_forgotten(monkeypatch):
    real = Objective.per_anchor

    def whole(self, *args, **keys):
        found = real(self, *args, **keys)
        return replace(found, class_loss=found.class_loss * (4 if self.kind == "contrastive" else 2))

    monkeypatch.setattr(Objective, "per_anchor", whole)


def weights_of_the_whole_batch(monkeypatch):
    real = Objective._ranked

    def ranked(self, losses):
        shape = losses.class_loss.shape
        joined = (getattr(losses, name).reshape(1, -1) for name in AnchorLosses.__dataclass_fields__)
        return real(self, AnchorLosses(*joined)).view(shape)

    monkeypatch.setattr(Objective, "_ranked", ranked)


def mean_over_all_positives(monkeypatch):
    def weighted(self, losses):
        weights = torch.where(losses.positive, 1.0, self._ranked(losses)) if self.kind == "rll" else 1.0
        return losses.class_loss * weights

    monkeypatch.setattr(Objective, "weighted", weighted)


def all_negatives_kept(monkeypatch):
    monkeypatch.setattr(Objective, "_keep", lambda self, negatives, positives: negatives)


def negatives_lost_as_on_a_cpu(monkeypatch):
    real = Objective._keep
    monkeypatch.setattr(
        Objective,
        "_keep",
        lambda self, negatives, positives: negatives[:0] if self.kind == "rll" else real(self, negatives, positives),
    )


@pytest.mark.parametrize(
    ("mutate", "failed"),
    [
        (half_forgotten, {"contrastive/cls_per_anchor", "rll/cls_pos", "rll/mining/cls_loss", "rll/grad_cls_preds"}),
        (
            weights_of_the_whole_batch,
            {"rll/cls_neg", "rll/cls_per_anchor", "rll_remap_forneg_v2/grad_cls_preds_for_neg"},
        ),
        (mean_over_all_positives, {"rll/cls_pos", "rll_remap_forneg_v1/loss"}),
        (all_negatives_kept, {"contrastive/cls_neg", "contrastive_no_positives/loss", "rll_no_positives/cls"}),
        (negatives_lost_as_on_a_cpu, {"rll/loss", "rll/cls_neg", "rll_negweight0.5_ratio0.05/grad_cls_preds"}),
    ],
)
def test_loss_mutant_fails(monkeypatch, mutate, failed):
    mutate(monkeypatch)
    assert all_fail(check_losses(COPIES), failed)


def test_what_the_release_does_on_a_cpu_equals_its_other_arrays(monkeypatch):
    negatives_lost_as_on_a_cpu(monkeypatch)
    assert all(row.passed for row in check_losses(COPIES) if "/on_cpu/" in row.name)


def plain_overlap(monkeypatch):
    real, pixel = oneshot_style.best_matches, np.array([0.0, 0.0, 1.0, 1.0])
    monkeypatch.setattr(
        oneshot_style,
        "best_matches",
        lambda truth, found, boxes: real(replace(truth, boxes=truth.boxes - pixel), found, boxes - pixel),
    )


def difficult_objects_evaluated(monkeypatch):
    real = oneshot_style.correct_ones
    monkeypatch.setattr(
        oneshot_style,
        "correct_ones",
        lambda overlap, match, ignored, limit: real(overlap, match, np.zeros_like(ignored), limit),
    )


def frames_mixed_up(monkeypatch):
    monkeypatch.setattr(evaluation_check, "to_frame", lambda boxes, level, frame: boxes)


@pytest.mark.parametrize(
    ("mutate", "failed"),
    [
        (plain_overlap, {"iou0.7/map"}),
        (difficult_objects_evaluated, {"iou0.5/map", "iou0.5/ap_joint_classes"}),
        (frames_mixed_up, {"iou0.5/recall", "iou0.7/ap_per_class"}),
    ],
)
def test_metric_mutant_fails(monkeypatch, mutate, failed):
    mutate(monkeypatch)
    assert all_fail(check_metrics(COPIES), failed)


def rounded_supports(monkeypatch):
    real = evaluation_check.area_size
    monkeypatch.setattr(
        evaluation_check, "area_size", lambda h, w, target=240: tuple(side + 1 for side in real(h, w, target))
    )


def rounded_levels(monkeypatch):
    def sizes(self, height, width):
        return [(round(height * s * self.base(1, 1)), round(width * s * self.base(1, 1))) for s in self.scales]

    monkeypatch.setattr(Pyramid, "sizes", sizes)


@pytest.mark.parametrize(
    ("mutate", "failed"),
    [(rounded_supports, {"class_image_hw_target240", "hw_target1500"}), (rounded_levels, {"pyramid_level_hw"})],
)
def test_size_mutant_fails(monkeypatch, mutate, failed):
    mutate(monkeypatch)
    assert all_fail(check_sizes(COPIES), failed)


def test_forgotten_views_fail(golden, monkeypatch):
    monkeypatch.setitem(templates.VIEWS, "rotation90", ((0, False), (2, False)))
    rows = [row for row in check_model(golden) if not row.passed]
    assert rows and all(row.name.startswith("v2_rotation90/") for row in rows)


def norms_of_the_batch(monkeypatch):
    monkeypatch.setattr(detector.OS2D, "train", torch.nn.Module.train)


def negatives_move_the_transform(monkeypatch):
    real = Objective.__call__
    monkeypatch.setattr(
        Objective, "__call__", lambda self, *args, **keys: real(self, *args, **{**keys, "negative_scores": None})
    )


def faster_steps(monkeypatch):
    real = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *args: (real(self), real(self))[0])


@pytest.mark.parametrize("mutate", [norms_of_the_batch, negatives_move_the_transform, faster_steps])
def test_training_mutant_fails(golden, monkeypatch, mutate):
    mutate(monkeypatch)
    assert any(not row.passed and not row.optional for row in check_step(golden))
