"""Anchors, matrices, corners, codes: numbers by hand and recorded ones, tiny boxes, matrices without inverse."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fsdet.methods.os2d import geometry
from fsdet.methods.os2d.geometry import (
    affine,
    anchor_boxes,
    anchor_centers,
    corners,
    decode_boxes,
    enclosing_boxes,
    encode_boxes,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "os2d" / "box_coder.npz")


def close(actual, expected, share=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=share, atol=share)


class TestAnchors:
    def test_one_square_a_cell_half_a_cell_in(self):
        boxes = anchor_boxes(2, 3)
        assert boxes[0].tolist() == [-112, -112, 128, 128]  # around (8, 8)
        assert boxes[4].tolist() == [-96, -96, 144, 144]  # second row, second column: (24, 24)
        assert boxes[2].tolist() == [-80, -112, 160, 128]  # columns are fastest
        assert anchor_centers(2, 3)[5].tolist() == [2.5, 1.5]

    def test_recorded(self):
        width, height = GOLDEN["level0_size_wh"]
        recorded = torch.from_numpy(GOLDEN["default_boxes_level0"])
        assert torch.equal(anchor_boxes(-(-int(height) // 16), -(-int(width) // 16)), recorded)


class TestAffine:
    def test_parameters_of_both_kinds(self):
        assert affine(torch.tensor([1.0, 2, 3, 4, 5, 6]), inverse=False).tolist() == [[1, 2, 3], [4, 5, 6]]
        assert affine(torch.tensor([1.0, 2, 3, 4]), inverse=False).tolist() == [[1, 0, 2], [0, 3, 4]]
        with pytest.raises(ValueError, match="4 or 6 parameters, got 5"):
            affine(torch.rand(2, 5), inverse=False)

    def test_inverse_by_hand(self):
        # x' = 2 x + 1, y' = 4 y - 2, so x = x' / 2 - 1 / 2 and y = y' / 4 + 1 / 2.
        close(affine(torch.tensor([2.0, 1, 4, -2]), inverse=True), [[0.5, 0, -0.5], [0, 0.25, 0.5]])

    @pytest.mark.parametrize("count", [4, 6])
    def test_inverse_of_many(self, count):
        parameters = torch.randn(50, count, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        whole = torch.cat([affine(parameters, inverse=False), torch.eye(3)[2].expand(50, 1, 3)], dim=1)
        close(affine(parameters, inverse=True), torch.linalg.inv(whole)[:, :2])

    def test_without_inverse(self):
        """Singular matrices, and one that is nearly so, give finite numbers and finite gradients; signs are kept."""
        rows = [[0.0, 0, 0, 0, 0, 0], [1, 2, 0.5, 2, 4, 0.5], [1e-5, 0, 0, 0, -1e-5, 0]]
        parameters = torch.tensor(rows, requires_grad=True)
        matrices = affine(parameters, inverse=True)
        matrices.sum().backward()
        assert torch.isfinite(matrices).all() and torch.isfinite(parameters.grad).all()
        close(matrices[1].detach(), torch.tensor([[4, -2, -1], [-2, 1, 0.5]]) * 1e8)
        assert matrices[2, 0, 0] > 0 > matrices[2, 1, 1] or matrices[2, 0, 0] < 0 < matrices[2, 1, 1]
        codes = encode_boxes(enclosing_boxes(matrices.detach(), anchor_boxes(1, 3)), anchor_boxes(1, 3))
        assert torch.isfinite(decode_boxes(codes, anchor_boxes(1, 3))).all()


class TestCorners:
    def test_identity_is_the_anchor(self):
        anchors = anchor_boxes(1, 2)
        matrices = torch.eye(2, 3).expand(2, -1, -1)
        assert torch.equal(enclosing_boxes(matrices, anchors), anchors)
        assert corners(matrices, anchors)[1].tolist() == [[-96, -112], [144, -112], [-96, 128], [144, 128]]

    def test_mirrored_and_turned(self):
        """A mirrored template has its left corners on the right; a quarter turn moves the top right to the bottom."""
        anchor = anchor_boxes(1, 1)
        mirrored = torch.tensor([[[-0.5, 0.0, 0.0], [0.0, 1.0, 0.0]]])
        assert corners(mirrored, anchor)[0].tolist() == [[68, -112], [-52, -112], [68, 128], [-52, 128]]
        assert enclosing_boxes(mirrored, anchor)[0].tolist() == [-52, -112, 68, 128]
        turned = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
        assert corners(turned, anchor)[0].tolist() == [[128, -112], [128, 128], [-112, -112], [-112, 128]]

    def test_encloses_all_225_points(self):
        generator = torch.Generator().manual_seed(0)
        matrices, anchors = torch.randn(3, 6, 2, 3, generator=generator), anchor_boxes(2, 3)
        line = torch.linspace(-1, 1, 15)
        points = torch.stack([*torch.meshgrid(line, line, indexing="xy"), torch.ones(15, 15)]).flatten(1)
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        moved = centers[:, None] + 120 * (matrices @ points).transpose(-1, -2)  # (3, 6, 225, 2)
        close(enclosing_boxes(matrices, anchors), torch.cat([moved.amin(2), moved.amax(2)], dim=-1), 1e-4)
        found = corners(matrices, anchors)
        close(found, moved[:, :, [0, 14, 210, 224]], 1e-4)


class TestCode:
    def test_by_hand(self):
        anchor = anchor_boxes(1, 1)  # around (8, 8)
        box = torch.tensor([[20.0, 2.0, 140.0, 14.0]])  # centre (80, 8), 120 x 12
        close(encode_boxes(box, anchor), [[3.0, 0.0, 5 * math.log(0.5), 5 * math.log(0.05)]])
        close(decode_boxes(encode_boxes(box, anchor), anchor), box, 1e-5)

    def test_boxes_below_a_pixel_grow_to_the_right_and_down(self):
        anchor = anchor_boxes(1, 1)
        boxes = torch.tensor(
            [[8.0, 8.0, 8.0, 8.25], [8.0, 8.0, 3.0, 20.0]], requires_grad=True
        )  # the last is inside out
        codes = encode_boxes(boxes, anchor)
        close(decode_boxes(codes.detach(), anchor), [[8, 8, 9, 9], [8, 8, 9, 20]], 1e-5)
        codes[0, 2:].sum().backward()  # of sizes that are 1 px whatever the box
        assert boxes.grad[0, 2:].tolist() == [0, 0] and boxes.grad[0, :2].abs().max() > 0

    def test_recorded(self):
        """Codes beyond the largest size among them."""
        codes, anchors, boxes = (
            torch.from_numpy(GOLDEN[f"decode_raw/{name}"]) for name in ("loc_scores", "default_boxes", "boxes")
        )
        close(decode_boxes(codes.T, anchors), boxes, 1e-5)
        assert (codes[2:].max() / 5) > geometry._MOST_LOG
