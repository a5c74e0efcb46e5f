import math

import pytest
import torch

from fsdet.layers.gradient import ChannelAffine, scale_gradient


@pytest.mark.parametrize("scale", [0.0, 0.001, 0.75, 1.0, 2.0])
def test_forward_is_the_identity_and_backward_is_scaled(scale):
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5]], requires_grad=True)
    y = scale_gradient(x, scale)
    assert torch.equal(y, x)
    y.backward(torch.tensor([[1.0, 2.0], [-4.0, 8.0]]))
    torch.testing.assert_close(x.grad, scale * torch.tensor([[1.0, 2.0], [-4.0, 8.0]]))


def test_scale_zero_gives_zeros_not_nothing():
    layer = torch.nn.Linear(2, 2)
    scale_gradient(layer(torch.ones(1, 2)), 0.0).sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_scale_zero_stops_an_overflow():
    x = torch.ones(2, requires_grad=True)
    scale_gradient(x, 0.0).backward(torch.tensor([math.inf, math.nan]))
    assert x.grad.tolist() == [0.0, 0.0]


def test_the_input_survives_layers_that_work_in_place():
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace"):
        scale_gradient(x, 0.5).relu_()


def test_affine_starts_as_the_identity():
    layer, x = ChannelAffine(3), torch.randn(2, 3, 4, 5)
    assert torch.equal(layer(x), x)
    assert [tuple(p.shape) for p in layer.parameters()] == [(1, 3, 1, 1), (1, 3, 1, 1)]
    assert list(ChannelAffine(3, bias=False).state_dict()) == ["weight"]


def test_affine_by_hand_behind_a_scaled_gradient():
    """y = w x + b per channel; w and b get the whole gradient, x the scaled one times w."""
    layer = ChannelAffine(2)
    layer.load_state_dict({"weight": torch.tensor([2.0, -3.0]).view(1, 2, 1, 1), "bias": torch.ones(1, 2, 1, 1)})
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]], requires_grad=True)  # (1, 2, 1, 2)
    y = layer(scale_gradient(x, 0.1))
    assert y.flatten().tolist() == [3.0, 5.0, -8.0, -11.0]
    y.backward(torch.tensor([[[[1.0, 10.0]], [[5.0, 0.5]]]]))
    assert layer.weight.grad.flatten().tolist() == [1 + 20, 15 + 2]
    assert layer.bias.grad.flatten().tolist() == [11.0, 5.5]
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([0.2, 2.0, -1.5, -0.15]))


def test_mixed_precision_keeps_small_changes_of_the_parameters():
    layer = ChannelAffine(1)
    torch.nn.init.constant_(layer.weight, 1.001)  # bfloat16 would round it to 1
    x = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(scale_gradient(x, 0.5))
    y.sum().backward()
    assert y.dtype == torch.float32 and y.item() == pytest.approx(1.001)
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.item() == 1.0
    assert x.grad.dtype == torch.bfloat16 and x.grad.item() == 0.5
