import pytest
import torch
from torch.nn import functional as F

from fsdet.layers.cosine import CosineClassifier, cosine_scores, unit_rows


@pytest.fixture
def features():
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).abs()


def classifier(in_place=False, scale=20.0, seed=0):
    torch.manual_seed(seed)
    layer = CosineClassifier(6, 4, scale=scale, in_place=in_place).double()
    with torch.no_grad():
        layer.weight.mul_(100)  # rows of length ~2.5, as 1024 features would give, so that 1e-5 is small beside them
    return layer


def test_scores_are_scaled_cosines(features):
    weight = torch.randn(4, 6, dtype=torch.float64)
    wanted = 20 * F.cosine_similarity(features[:, None], weight[None], dim=2)
    torch.testing.assert_close(cosine_scores(features, weight, 20.0), wanted, atol=1e-3, rtol=0)
    # the epsilon by hand: x = (3, 4), |x| = 5
    by_hand = 20 * (3 / 5.00001) * (2 / 2.00001)
    one = cosine_scores(torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[2.0, 0.0]]).double())
    assert one.item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("in_place", [False, True])
def test_length_of_features_does_not_matter(features, in_place):
    layer = classifier(in_place)
    layer(features)
    torch.testing.assert_close(layer(features), layer(7 * features), atol=1e-3, rtol=0)  # the epsilon in the norm


@pytest.mark.parametrize("in_place", [False, True])
def test_logits_are_bounded_by_the_scale(in_place):
    layer = CosineClassifier(6, 4, in_place=in_place)
    aligned = layer(layer.weight.detach() * 1e4)
    assert aligned.abs().max() <= 20
    assert aligned.diagonal().min() > 19.9
    assert torch.equal(layer(torch.zeros(2, 6)), torch.zeros(2, 4))


def test_initial_rows_are_small_random_numbers():
    torch.manual_seed(0)
    weight = CosineClassifier(1024, 21).weight
    assert weight.shape == (21, 1024)
    assert abs(weight.mean().item()) < 5e-4 and weight.std().item() == pytest.approx(0.01, rel=0.03)


def test_modes_agree_at_inference(features):
    plain, overwriting = classifier().eval(), classifier(in_place=True).eval()
    before = overwriting.weight.clone()
    assert torch.equal(plain(features), overwriting(features))
    assert torch.equal(before, overwriting.weight)  # evaluation leaves the parameters alone
    overwriting.train()(features)
    torch.testing.assert_close(overwriting.eval()(features), plain(features), atol=1e-3, rtol=0)


def test_in_place_rows_become_unit_rows(features):
    layer = classifier(in_place=True)
    layer(features)
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(4).double(), atol=1e-4, rtol=0)


def test_gradients_differ_by_their_radial_part_only(features):
    plain, overwriting = classifier(), classifier(in_place=True)
    with torch.no_grad():  # both at the same unit rows
        rows = unit_rows(plain.weight)
        plain.weight.copy_(rows)
        overwriting.weight.copy_(rows)
    labels = torch.arange(9) % 4
    for layer in (plain, overwriting):
        F.cross_entropy(layer(features), labels).backward()
    rows = overwriting.weight.detach()
    difference = overwriting.weight.grad - plain.weight.grad
    size = overwriting.weight.grad.norm()
    assert difference.norm() > 0.1 * size
    radial = (difference * rows).sum(dim=1, keepdim=True) * rows / rows.pow(2).sum(dim=1, keepdim=True)
    assert (difference - radial).norm() <= 5e-5 * size
    # the differentiable mode has no radial part at all
    assert (plain.weight.grad * rows).sum(dim=1).abs().max() <= 5e-5 * size


def test_in_place_allows_two_forward_passes_before_backward(features):
    layer = classifier(in_place=True)
    features = features.requires_grad_()
    (layer(features).sum() + layer(features).sum()).backward()
    assert torch.isfinite(layer.weight.grad).all() and features.grad is not None


def test_learnable_scale(features):
    layer = classifier(scale=-1)
    assert layer.state_dict()["scale"].tolist() == [20.0]
    layer(features).sum().backward()
    assert layer.scale.grad is not None
    assert "scale" not in classifier().state_dict()
    fixed = classifier()
    assert torch.equal(layer(features).detach(), fixed(features).detach())


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_scale_out_of_range(scale):
    with pytest.raises(ValueError, match=r"expected a positive number, or -1"):
        CosineClassifier(6, 4, scale=scale)


@pytest.mark.parametrize("in_place", [False, True])
def test_mixed_precision_keeps_single_precision_scores(features, in_place):
    layer = classifier(in_place).float()
    layer(features.float())  # rows of unit length from here on, if in place
    wanted = layer(features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = layer(features.float())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)
