"""Dense correlation: lengths, the order of a template's cells, one product for all classes and scenes."""

import pytest
import torch

from fsdet.layers.correlation import column_major, correlate, normalize_cells


def test_length_of_a_cell_has_its_small_share_of_zero():
    features = torch.tensor([[3.0, 0.0, 3e-5], [4.0, 0.0, 4e-5]]).view(2, 1, 3)  # three cells of width 2
    expected = torch.tensor([[3 / (5 + 1e-5), 0.0, 0.5], [4 / (5 + 1e-5), 0.0, 4 / 6]])
    assert torch.allclose(normalize_cells(features)[:, 0], expected, atol=1e-7)
    batch = normalize_cells(features.expand(2, 3, 2, 1, 3))
    assert torch.allclose(batch[1, 2, :, 0], expected, atol=1e-7)


def test_a_cell_without_features_has_a_finite_gradient():
    features = torch.zeros(2, 1, 1, requires_grad=True)
    normalize_cells(features).sum().backward()
    assert torch.isfinite(features.grad).all()


def test_columns_come_first():
    template = torch.arange(6.0).view(1, 1, 2, 3)  # rows (0, 1, 2) and (3, 4, 5)
    assert column_major(template).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert column_major(torch.rand(4, 7, 15, 15)).shape == (4, 225, 7)


def test_is_the_scalar_product_of_all_pairs_of_cells():
    generator = torch.Generator().manual_seed(0)
    templates, scenes = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 5), (2, 5, 6, 7)))
    batch = correlate(templates, scenes)
    assert batch.shape == (2, 3, 4, 6, 7)
    for scene, image in zip(batch, scenes, strict=True):
        assert torch.allclose(scene[2, 1, 4, 3], templates[2, 1].dot(image[:, 4, 3]), atol=1e-6)
        assert torch.allclose(scene, torch.einsum("ckd,dhw->ckhw", templates, image), atol=1e-5)
        assert torch.allclose(scene, correlate(templates, image), atol=1e-6)


def test_memory_for_the_result():
    templates, scene, out = torch.rand(2, 4, 5), torch.rand(5, 2, 3), torch.empty(2, 4, 2, 3)
    result = correlate(templates, scene, out=out)
    assert result.data_ptr() == out.data_ptr() and torch.allclose(result, correlate(templates, scene), atol=1e-6)


def test_no_class():
    assert correlate(torch.rand(0, 225, 5), torch.rand(5, 2, 3)).shape == (0, 225, 2, 3)


def test_another_backbone_is_named():
    with pytest.raises(ValueError, match="width 6, the scene of width 5; encode both with the same backbone"):
        correlate(torch.rand(2, 225, 6), torch.rand(5, 2, 3))
