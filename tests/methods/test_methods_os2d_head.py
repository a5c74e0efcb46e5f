"""The head: recorded outputs and gradients, scores by hand, and the inference path against the one with gradients."""

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fsdet.layers.correlation import column_major, correlate, normalize_cells
from fsdet.methods.os2d import head as module
from fsdet.methods.os2d.geometry import affine, anchor_boxes, anchor_centers, decode_boxes, encode_boxes
from fsdet.methods.os2d.head import OS2DHead
from fsdet.methods.os2d.sampling import pool_samples, sampling_grid

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "os2d"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data in {GOLDEN}")
OUTPUT, GRADIENT, CORNER = 2e-5, 1e-4, 5e-3


@cache
def golden(name="head"):
    """Arrays of a golden file as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file}


def close(actual, expected, tolerance):
    """Largest absolute difference."""
    assert actual.shape == expected.shape
    assert not actual.numel() or float((actual - expected).detach().abs().max()) <= tolerance


def golden_head(count, inverse):
    """A head with the recorded network."""
    head, output = OS2DHead(count, inverse).eval(), {4: "linear_simple", 6: "linear_affine"}[count]
    state = {key.replace(output, "linear"): value for key, value in golden("transform_net").items()}
    names = head.transform_net.state_dict()
    assert set(names) - set(state) == {"conv.1.num_batches_tracked", "conv.4.num_batches_tracked"}
    head.transform_net.load_state_dict({key: state.get(key, names[key]) for key in names})
    return head


def template(maps):
    """(1, D, H, W) features of a support, of any size, to templates (1, 225, D)."""
    return column_major(normalize_cells(F.interpolate(maps, size=(15, 15), mode="bilinear", align_corners=True)))


def golden_templates():
    return torch.cat([template(golden()[f"class_feature_map_{number}"]) for number in range(3)])


def golden_pairs():
    """Correlations (6, 225, 11, 14) of two scenes with three classes."""
    return correlate(golden_templates(), normalize_cells(golden()["query_feature_map"])).flatten(0, 1)


def rows(recorded):
    """(..., K, H, W) to (..., N, K)."""
    return recorded.flatten(-2).transpose(-1, -2)


@needs_golden
class TestRecorded:
    @torch.no_grad()
    def test_templates_and_correlation(self):
        close(golden_templates(), column_major(golden()["class_maps_15x15_normalized"]), OUTPUT)
        close(golden_pairs()[0], golden()["correlation_image0_class0"], OUTPUT)

    @pytest.mark.parametrize(
        ("name", "count", "inverse"),
        [("v1", 4, False), ("v2", 6, True), ("full_noinv", 6, False), ("simple_inv", 4, True)],
    )
    @torch.no_grad()
    def test_outputs_of_both_ways(self, name, count, inverse):
        head, templates, scenes = golden_head(count, inverse), golden_templates(), golden()["query_feature_map"]
        recorded = {
            key.removeprefix(f"{name}/"): value for key, value in golden().items() if key.startswith(f"{name}/")
        }
        matches = head(scenes, templates, corners=True)
        found = [head.detect(scene, templates, corners=True) for scene in scenes]
        scores, boxes, corners = (torch.stack(parts) for parts in zip(*found, strict=True))
        for result in (matches.scores, matches.detached_scores, scores):
            close(result, recorded["recognition"].flatten(2), OUTPUT)
        if "localization" in recorded:
            for result in (matches.codes, encode_boxes(boxes, anchor_boxes(11, 14))):
                close(result, rows(recorded["localization"]), OUTPUT)
            for result in (matches.corners, corners):
                close(result.flatten(3), rows(recorded["corners"]), CORNER)
            parameters = head.transform_net(golden_pairs()).flatten(2).transpose(1, 2)
            close(affine(parameters, inverse=inverse), recorded["theta"].flatten(1, 2), OUTPUT)

    def test_norm_in_training_mode(self):
        head = golden_head(4, False).train()
        matches = head(golden()["query_feature_map"], golden_templates())
        close(matches.scores, golden()["v1_trainbn/recognition"].flatten(2), OUTPUT)
        close(matches.codes, rows(golden()["v1_trainbn/localization"]), OUTPUT)
        close(head.transform_net.conv[1].running_mean, golden()["v1_trainbn/conv1_running_mean_after"], OUTPUT)
        close(head.transform_net.conv[4].running_var, golden()["v1_trainbn/conv4_running_var_after"], OUTPUT)

    @pytest.mark.parametrize("name", ["v1_tiny", "v1_flip"])
    @torch.no_grad()
    def test_boxes_below_a_pixel_and_mirrored(self, name):
        head = golden_head(4, False)
        head.transform_net.linear.weight.zero_()
        head.transform_net.linear.bias.copy_(golden()[f"{name}/bias"])
        scene, templates = golden()["query_feature_map"][:1], golden_templates()[:1]
        matches = head(scene, templates, corners=True)
        scores, boxes, corners = head.detect(scene[0], templates, corners=True)
        for result in (matches.scores, scores[None]):
            close(result, golden()[f"{name}/recognition"].flatten(2), OUTPUT)
        for result in (matches.codes, encode_boxes(boxes, anchor_boxes(11, 14))[None]):
            close(result, rows(golden()[f"{name}/localization"]), 5e-5 if name == "v1_tiny" else OUTPUT)
        for result in (matches.corners, corners[None]):
            close(result.flatten(3), rows(golden()[f"{name}/corners"]), CORNER)

    @pytest.mark.parametrize("name", ["v2_lownorm", "v2_vanishing", "v2_lownorm_class"])
    @torch.no_grad()
    def test_what_is_added_to_lengths(self, name):
        """Weak features; scores relative to the largest one."""
        scale = {key: golden().get(f"{name}/{key}_scale", torch.tensor(1.0)).float() for key in ("query", "class")}
        scene = golden()["query_feature_map"][:1] * scale["query"]
        templates = template(golden()["class_feature_map_0"] * scale["class"])
        head, recorded = golden_head(6, True), golden()[f"{name}/recognition"].flatten(2)
        matches, (scores, boxes, _) = head(scene, templates), head.detect(scene[0], templates)
        for result in (matches.scores, scores[None]):
            close(result / recorded.abs().max(), recorded / recorded.abs().max(), OUTPUT)
        if f"{name}/localization" in golden():
            for result in (matches.codes, encode_boxes(boxes, anchor_boxes(11, 14))[None]):
                close(result, rows(golden()[f"{name}/localization"]), OUTPUT)

    @pytest.mark.parametrize(("name", "count", "inverse"), [("v1", 4, False), ("v2", 6, True)])
    def test_gradients(self, name, count, inverse):
        head, probe = golden_head(count, inverse), golden()["grad_probe"].flatten(2)
        scene, support = (
            golden()[key].clone().requires_grad_() for key in ("query_feature_map", "class_feature_map_0")
        )
        matches = head(scene[:1], template(support))
        net = head.transform_net
        sources = (scene, support, net.linear.weight, net.linear.bias, net.conv[0].bias)

        def compare(value, sources, names):
            gradients = torch.autograd.grad(value, sources, retain_graph=True)
            for gradient, key in zip(gradients, names, strict=True):
                expected = golden()[f"{name}/grad_{key}"]
                gradient = gradient[:1] if gradient is gradients[0] and sources[0] is scene else gradient
                assert float((gradient - expected).norm() / expected.norm()) <= GRADIENT, key

        names = ("query", "class_0", "linear_weight", "linear_bias", "conv0_bias")
        compare((matches.scores * probe).sum(), sources, names)
        compare((matches.detached_scores * probe).sum(), (scene,), ("query_transform_detached",))
        compare((matches.codes * probe[..., None]).sum(), (net.linear.bias,), ("linear_bias_localization",))


def pooled(correlation, matrices):
    """Scores (H, W) of one pair whose anchors all have the same matrix."""
    size = tuple(correlation.shape[1:])
    grid = sampling_grid(torch.tensor(matrices).expand(1, size[0] * size[1], 2, 3), anchor_centers(*size), size)
    return pool_samples(correlation[None], grid).view(size)


IDENTITY = [[1.0, 0, 0], [0, 1, 0]]


class TestScore:
    def test_half_a_cell_beyond_and_clamped(self):
        """On a ramp the score is the mean place of the points: half a cell to the right of the cell, inside the map."""
        ramp = torch.arange(40.0).expand(225, 3, 40)
        scores = pooled(ramp, IDENTITY)
        assert torch.allclose(scores[1, 10:25], torch.arange(10.0, 25) + 0.5, atol=1e-4)
        columns = 7.5 * np.linspace(-1, 1, 15)[2:13]
        for column in (0, 38, 39):
            expected = np.clip(columns + column + 0.5, 0, 39).mean()
            assert float(scores[1, column]) == pytest.approx(expected, abs=1e-4)
        assert torch.allclose(scores[0], scores[2])  # three rows: all points above and below read border rows

    def test_points_are_15_fourteenths_apart_and_columns_come_first(self):
        """Only the template's cell in row 3, column 5 answers, with the place at which it was read."""
        along_x, along_y = torch.zeros(225, 40, 40), torch.zeros(225, 40, 40)
        along_x[5 * 15 + 3], along_y[5 * 15 + 3] = torch.arange(40.0), torch.arange(40.0)[:, None]
        # Two columns left of the middle and four rows above it; a place of the map's centre (20, 20) counts from 20.5.
        x, y = -2 * 15 / 14, -4 * 15 / 14
        assert float(pooled(along_x, IDENTITY)[20, 20]) * 121 == pytest.approx(20.5 + x, abs=1e-4)
        assert float(pooled(along_y, IDENTITY)[20, 20]) * 121 == pytest.approx(20.5 + y, abs=1e-4)
        moved = [[0.5, 0.25, 0.1], [-0.3, 2.0, -0.2]]
        assert float(pooled(along_x, moved)[20, 20]) * 121 == pytest.approx(20.5 + x / 2 + y / 4 + 0.75, abs=1e-4)
        assert float(pooled(along_y, moved)[20, 20]) * 121 == pytest.approx(20.5 - 0.3 * x + 2 * y - 1.5, abs=1e-4)

    def test_outer_rings_do_not_count(self):
        weights = torch.zeros(15, 15)
        for row in range(15):
            for column in range(15):
                one = torch.zeros(225, 1, 1)
                one[column * 15 + row] = 121
                weights[row, column] = pooled(one, IDENTITY)
        expected = F.pad(torch.ones(11, 11), (2, 2, 2, 2))
        assert torch.allclose(weights, expected, atol=1e-5)

    def test_a_template_finds_itself(self):
        """The identity at the one anchor that sees the whole support: close to 1, and least at the far corner."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(1, 8, 4, 4, generator=generator)
        features = F.interpolate(coarse, size=(31, 31), mode="bicubic", align_corners=True)
        head = OS2DHead(4, False).eval()
        scores, boxes, _ = head.detect(features[0], template(features[..., 8:23, 8:23]))
        row, column = divmod(int(scores.argmax()), 31)
        assert abs(row - 15) <= 1 and abs(column - 15) <= 1 and float(scores.max()) > 0.95
        assert torch.allclose(boxes[0], anchor_boxes(31, 31), atol=1e-3)


def learnt_head(count=6, inverse=True, **options):
    """A head whose transforms are not the identity, with scenes (2, 8, 23, 31) and templates (5, 225, 8)."""
    torch.manual_seed(0)
    head = OS2DHead(count, inverse, **options).eval()
    torch.nn.init.normal_(head.transform_net.linear.weight, std=0.05)
    templates = normalize_cells(torch.randn(5, 8, 15, 15))
    return head, torch.randn(2, 8, 23, 31), column_major(templates)


class TestDetect:
    @pytest.mark.parametrize("cells", [1, 1500, 10**6])
    @pytest.mark.parametrize(("count", "inverse"), [(4, False), (6, True)])
    @torch.no_grad()
    def test_is_forward_whatever_the_chunk(self, cells, count, inverse, monkeypatch):
        head, scenes, templates = learnt_head(count, inverse)
        monkeypatch.setitem(module._CELLS_AT_ONCE, "cpu", cells)
        pieces, way = [], correlate
        monkeypatch.setattr(module, "correlate", lambda *x, **more: pieces.append(len(x[0])) or way(*x, **more))
        scores, boxes, corners = head.detect(scenes[1], templates, corners=True)
        assert pieces == {1: [1] * 5, 1500: [2, 2, 1], 10**6: [5]}[cells]
        monkeypatch.undo()
        matches, anchors = head(scenes, templates, corners=True), anchor_boxes(23, 31)
        close(scores, matches.scores[1], 1e-6)
        close(boxes, decode_boxes(matches.codes[1], anchors), 2e-3)
        close(corners, matches.corners[1], 2e-3)
        assert head.detect(head.prepare(scenes[1]), templates)[2] is None
        close(head.detect(head.prepare(scenes[1]), templates)[0], scores, 1e-7)

    @pytest.mark.parametrize("size", [(1, 1), (1, 9), (12, 1)])
    @torch.no_grad()
    def test_maps_of_one_cell(self, size):
        head, scenes, templates = learnt_head()
        scene = scenes[:1, :, : size[0], : size[1]]
        scores, boxes, _ = head.detect(scene[0], templates)
        assert scores.shape == (5, size[0] * size[1]) and torch.isfinite(boxes).all()
        close(scores, head(scene, templates).scores[0], 1e-6)
        if size == (1, 1):  # all 121 points read the one cell
            expected = correlate(templates, normalize_cells(scene[0])).unflatten(1, (15, 15))[:, 2:13, 2:13]
            close(scores[:, 0], expected.mean(dim=(1, 2, 3, 4)), 1e-6)

    @torch.no_grad()
    def test_no_class_and_no_scene(self):
        head, scenes, templates = learnt_head()
        scores, boxes, corners = head.detect(scenes[0], templates[:0], corners=True)
        assert scores.shape == (0, 713) and boxes.shape == (0, 713, 4) and corners.shape == (0, 713, 4, 2)
        assert head(scenes, templates[:0]).scores.shape == (2, 0, 713)

    def test_new_weights_count_at_once(self):
        head, scenes, templates = learnt_head()
        head.detect(scenes[0], templates)
        with torch.no_grad():
            for value in (head.transform_net.conv[0].weight, head.transform_net.conv[4].running_var):
                value.mul_(1.5)
            expected = head(scenes, templates)
        close(head.detect(scenes[0], templates)[0], expected.scores[0], 1e-6)
        other = copy.deepcopy(head)
        assert other._fast_transform._value is None and head._fast_transform._value is not None
        head.train()
        assert head._fast_transform._value is None and "scratch" not in str(list(head.state_dict()))
        with pytest.raises(AssertionError, match="call eval"):
            head.detect(scenes[0], templates)

    def test_single_precision_under_autocast(self):
        head, scenes, templates = learnt_head()
        expected, (scores, boxes, _) = head(scenes, templates), head.detect(scenes[0], templates)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            matches, found = head(scenes, templates), head.detect(scenes[0], templates)
        assert torch.equal(matches.scores, expected.scores) and torch.equal(matches.codes, expected.codes)
        assert torch.equal(found[0], scores) and torch.equal(found[1], boxes) and not scores.requires_grad
        assert head(scenes.bfloat16(), templates).scores.dtype == torch.float32

    def test_results_are_nobodys_memory(self):
        """A later call does not change what an earlier one returned; neither does inference mode."""
        head, scenes, templates = learnt_head()
        with torch.inference_mode():
            first = head.detect(scenes[0], templates)
            kept = [value.clone() for value in first[:2]]
            head.detect(scenes[1], templates)
        assert all(torch.equal(*pair) for pair in zip(first[:2], kept, strict=True))
        close(head.detect(scenes[0], templates)[0], kept[0], 1e-7)

    @torch.no_grad()
    def test_without_gradient_into_the_transform_there_is_one_score(self):
        head, scenes, templates = learnt_head()
        matches = head(scenes, templates)
        assert matches.detached_scores is matches.scores and matches.corners is None
        with torch.enable_grad():
            matches = head(scenes, templates)
            assert torch.equal(matches.detached_scores, matches.scores)
            with pytest.raises(RuntimeError, match="does not require grad|not have been used"):
                torch.autograd.grad(matches.detached_scores.sum(), head.transform_net.linear.bias)

    @pytest.mark.gpu
    def test_on_a_gpu(self):
        head, scenes, templates = learnt_head()
        expected = head.detect(scenes[0], templates, corners=True)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = head.cuda().detect(scenes[0].cuda(), templates.cuda(), corners=True)
        for value, plain, tolerance in zip(found, expected, (1e-5, 1e-1, 1e-1), strict=True):
            close(value.cpu(), plain, tolerance)


class TestApproximate:
    @pytest.mark.parametrize("share", [0.1, 0.4])
    @torch.no_grad()
    def test_best_blocks_are_aligned_the_rest_keeps_the_first_score(self, share):
        exact, scenes, templates = learnt_head()
        head = learnt_head(aligned_share=share)[0]
        first = learnt_head()[0]
        torch.nn.init.zeros_(first.transform_net.linear.weight)
        unaligned = first.detect(scenes[0], templates, corners=True)
        full = exact.detect(scenes[0], templates, corners=True)
        scores, boxes, corners = head.detect(scenes[0], templates, corners=True)
        is_aligned = boxes[..., 2] > boxes[..., 0]
        assert is_aligned.any(dim=1).all() and 0.5 * share < float(is_aligned.float().mean()) < share + 0.1
        for found, same, tolerance in zip((scores, boxes, corners), full, (1e-6, 2e-3, 2e-3), strict=True):
            close(found[is_aligned], same[is_aligned], tolerance)
        close(scores[~is_aligned], unaligned[0][~is_aligned], 1e-6)
        close(corners[~is_aligned], unaligned[2][~is_aligned], 1e-3)
        centers = (anchor_centers(23, 31) * 16).repeat(1, 2).expand(5, -1, -1)
        assert torch.equal(boxes[~is_aligned], centers[~is_aligned])
        for row in range(5):  # the best unaligned score stands in an aligned block
            assert is_aligned[row, unaligned[0][row].argmax()]

    @torch.no_grad()
    def test_all_blocks_are_the_exact_result(self):
        exact, scenes, templates = learnt_head()
        head = learnt_head(aligned_share=0.999)[0]
        for found, same in zip(head.detect(scenes[0], templates)[:2], exact.detect(scenes[0], templates), strict=False):
            close(found, same, 2e-3 if found.dim() == 3 else 1e-6)

    @pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
    def test_range(self, share):
        with pytest.raises(ValueError, match="OS2D.ALIGNED_SHARE is .* above 0 and at most 1"):
            OS2DHead(4, False, aligned_share=share)
