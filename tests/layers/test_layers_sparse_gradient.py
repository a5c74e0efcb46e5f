import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn

from fsdet.layers import sparse_gradient
from fsdet.layers.sparse_gradient import MOST_PLACES, SparseGradientConv2d

PLACES = {
    "none": [],
    "corners": [(0, 0, 0), (1, 4, 6), (1, 0, 6), (0, 4, 0)],
    "neighbours": [(0, 2, 2), (0, 2, 3), (0, 3, 3), (1, 1, 5)],
    "all": [(n, y, x) for n in range(2) for y in range(5) for x in range(7)],
}


def pair(size=3, **kwargs):
    """A plain and a sparse layer with the same weights, 3 to 4 channels."""
    torch.manual_seed(0)
    plain = Conv2d(3, 4, size, padding=size // 2, **kwargs).double()
    sparse = SparseGradientConv2d(3, 4, size, padding=size // 2, **kwargs).double()
    sparse.load_state_dict(plain.state_dict())
    return plain, sparse


def gradients(layer, x, gradient):
    """Output, and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(gradient)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def gradient_at(places):
    gradient = torch.zeros(2, 4, 5, 7, dtype=torch.float64)
    for n, y, x in places:
        gradient[n, :, y, x] = torch.randn(4, dtype=torch.float64)
    return gradient


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_gradients_are_those_of_the_plain_layer(places, size):
    plain, sparse = pair(size)
    x, gradient = torch.randn(2, 3, 5, 7, dtype=torch.float64), gradient_at(places)
    for a, b in zip(gradients(plain, x, gradient), gradients(sparse, x, gradient), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_activation_norm_and_bias_are_optional():
    for kwargs in ({"bias": False}, {"activation": nn.ReLU()}, {"norm": nn.BatchNorm2d(4)}):
        plain, sparse = pair(**kwargs)
        x, gradient = torch.randn(2, 3, 5, 7, dtype=torch.float64), gradient_at(PLACES["neighbours"])
        for a, b in zip(gradients(plain, x, gradient), gradients(sparse, x, gradient), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_only_the_wanted_gradients_are_made():
    plain, sparse = pair()
    x, gradient = torch.randn(2, 3, 5, 7, dtype=torch.float64), gradient_at(PLACES["corners"])
    expected = gradients(plain, x, gradient)
    sparse(x).backward(gradient)  # an input without gradient, as behind a frozen backbone
    torch.testing.assert_close(sparse.weight.grad, expected[2], rtol=1e-12, atol=1e-12)
    sparse.zero_grad()
    sparse.weight.requires_grad_(False)
    x.requires_grad_()
    sparse(x).backward(gradient)
    assert sparse.weight.grad is None
    torch.testing.assert_close(x.grad, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("share", "is_dense"), [(MOST_PLACES - 0.1, False), (MOST_PLACES + 0.1, True)])
def test_few_places_take_the_short_way(monkeypatch, share, is_dense):
    calls = []
    original = torch.nn.grad.conv2d_weight
    monkeypatch.setattr(torch.nn.grad, "conv2d_weight", lambda *a, **k: calls.append("dense") or original(*a, **k))
    rows = sparse_gradient._cells
    monkeypatch.setattr(sparse_gradient, "_cells", lambda places, *a: calls.append(len(places)) or rows(places, *a))
    count = int(share * 70)
    gradients(pair()[1], torch.randn(2, 3, 5, 7, dtype=torch.float64), gradient_at(PLACES["all"][:count]))
    assert calls == (["dense"] if is_dense else [count])


def test_mixed_precision():
    """The output has autocast's type, gradients the parameters'; both near those of the plain layer."""
    plain, sparse = (layer.float() for layer in pair())
    x, gradient = torch.randn(2, 3, 5, 7), gradient_at(PLACES["neighbours"]).bfloat16()
    results = []
    for layer in (plain, sparse):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(gradients(layer, x, gradient))
    assert [value.dtype for value in results[1]] == [torch.bfloat16, *[torch.float32] * 3]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 2, "padding": 1},
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": (3, 5), "padding": (1, 2)},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_layers_that_it_does_not_know(kwargs):
    with pytest.raises(ValueError, match="needs an odd square kernel, stride 1"):
        SparseGradientConv2d(4, 4, **kwargs)
