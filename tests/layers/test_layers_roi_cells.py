"""Cells pooled one by one against torchvision's RoIAlign of the whole grid."""

import pytest
import torch
from torchvision.ops import roi_align

from fsdet.layers.roi_cells import pool_cells

STRIDE = 16
HEIGHT, WIDTH = 15, 20  # features of two pictures of 240 x 320


def boxes_inside(count, generator):
    """Boxes of all sizes, cut at the borders of the picture."""
    size = torch.tensor([WIDTH, HEIGHT]) * STRIDE
    centre = torch.rand(count, 2, generator=generator) * size
    half = torch.rand(count, 2, generator=generator) ** 2 * size / 2
    corners = torch.stack([centre - half, centre + half], dim=1).clamp(min=0)
    return torch.minimum(corners, size.float()).flatten(1)


SPECIAL = torch.tensor(
    [
        [0, 0, WIDTH * STRIDE, HEIGHT * STRIDE],  # the whole picture
        [16, 16, 128, 240],  # cells of exactly one and two pixels
        [8, 8, 120, 120],  # the same, centred on pixels
        [5, 5, 5, 5],  # empty
        [5, 5, 5.001, 5.01],  # tiny
        [300, 220, 400, 300],  # over the border
        [-24, -8, 88, 104],  # over the other border, on its limit
        [-500, -500, -300, -300],  # far outside
        [5000, 1, 5200, 20],
        [50, 50, 20, 20],  # inverted
    ]
)


def rois_of(boxes, generator):
    return torch.cat([torch.randint(0, 2, (len(boxes), 1), generator=generator).float(), boxes], dim=1)


def both(features, rois, size, step, ratio):
    whole = roi_align(features, rois, (size, size), 1 / STRIDE, ratio, True)
    cells = pool_cells(features, rois, size=size, step=step, scale=1 / STRIDE, sampling_ratio=ratio)
    return whole[:, :, ::step, ::step], cells


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize(("size", "step", "read"), [(7, 2, 4), (14, 2, 7), (4, 2, 2), (7, 1, 7), (7, 3, 3)])
def test_equals_pooling_everything(size, step, read, ratio):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, HEIGHT, WIDTH, generator=generator, requires_grad=True)
    rois = rois_of(torch.cat([SPECIAL, boxes_inside(50, generator)]), generator)
    expected, got = both(features, rois, size, step, ratio)
    assert got.shape == (len(rois), 6, read, read)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    grad = torch.randn(expected.shape, generator=generator)
    (wanted,), (found,) = (torch.autograd.grad(out, features, grad) for out in (expected, got))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_number_of_sampling_points_where_a_cell_is_whole_pixels_wide():
    """Widths of n * 7 * 16 pixels at odd places: a rounding error would add a row of points, an error of percents."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 1, 60, 60, generator=generator)
    count = torch.randint(1, 6, (3000, 2), generator=generator)
    corner = torch.rand(3000, 2, generator=generator) * 300
    rois = rois_of(torch.cat([corner, corner + count * 7 * STRIDE], dim=1), generator)
    bins = (rois[:, 3] / STRIDE - rois[:, 1] / STRIDE) / 7
    assert 0.1 < (bins != bins.round()).float().mean() < 0.9  # some sizes are rounded, some are not
    expected, got = both(features, rois, 7, 2, 0)
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)


def test_ramp_by_hand():
    """On features f(x, y) = x a cell has the value of its centre; here a cell is one pixel wide, from the first on."""
    ramp = torch.arange(20.0).expand(1, 1, 15, 20)
    cells = pool_cells(ramp, torch.tensor([[0, 16.0, 16, 128, 128]]), size=7, step=2, scale=1 / STRIDE)
    assert cells[0, 0].tolist() == [[1.0, 3.0, 5.0, 7.0]] * 4


def test_no_regions():
    features = torch.randn(1, 3, 4, 5, requires_grad=True)
    cells = pool_cells(features, torch.zeros(0, 5), size=7, step=2, scale=1 / STRIDE)
    assert cells.shape == (0, 3, 4, 4)
    cells.sum().backward()
    assert not features.grad.any()


def test_boxes_keep_single_precision():
    """Under mixed precision the features are rounded, the boxes are not."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 4, HEIGHT, WIDTH, generator=generator).bfloat16()
    rois = rois_of(boxes_inside(20, generator), generator)
    expected, _ = both(features.float(), rois, 7, 2, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cells = pool_cells(features, rois, size=7, step=2, scale=1 / STRIDE)
    assert cells.dtype == torch.bfloat16
    torch.testing.assert_close(cells, expected.bfloat16(), atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_cpu():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, HEIGHT, WIDTH, generator=generator)
    rois = rois_of(torch.cat([SPECIAL, boxes_inside(50, generator)]), generator)
    grad = torch.randn(len(rois), 6, 4, 4, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        x = features.to(device).requires_grad_(True)
        cells = pool_cells(x, rois.to(device), size=7, step=2, scale=1 / STRIDE)
        (sent,) = torch.autograd.grad(cells, x, grad.to(device))
        found.append((cells.detach().cpu(), sent.cpu()))
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(cpu, gpu, atol=1e-4, rtol=1e-4)
