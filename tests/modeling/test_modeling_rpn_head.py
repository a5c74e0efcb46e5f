import pytest
import torch
from detectron2.modeling import build_model

from fsdet.layers import sparse_gradient

SPARSE = {"MODEL.RPN.HEAD_NAME": "SparseGradientRPNHead", "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 4}
PLAIN = {"MODEL.RPN.BATCH_SIZE_PER_IMAGE": 4}


def build(cfg):
    torch.manual_seed(0)
    return build_model(cfg).train()


@pytest.mark.parametrize("kind", ["fpn", "c4"])
@pytest.mark.parametrize("dims", [[-1], [-1, 12]])
def test_trains_as_the_standard_head(tiny_cfg, make_inputs, storage, monkeypatch, kind, dims):
    """Same parameters and losses, gradients up to rounding, and the sparse way was taken."""
    counts = []
    cells = sparse_gradient._cells
    monkeypatch.setattr(sparse_gradient, "_cells", lambda p, *a: counts.append(len(p)) or cells(p, *a))
    plain, sparse = (build(tiny_cfg(kind, **{**opts, "MODEL.RPN.CONV_DIMS": dims})) for opts in (PLAIN, SPARSE))
    assert plain.state_dict().keys() == sparse.state_dict().keys()
    losses = []
    for model in (plain, sparse):
        torch.manual_seed(1)
        losses.append(model(make_inputs()))
        sum(losses[-1].values()).backward()
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    assert counts and max(counts) <= (2 * 4 if len(dims) == 1 else 2 * 4 * 9)  # two images, four anchors each
    for (name, a), b in zip(plain.named_parameters(), sparse.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6 * float(a.grad.abs().max()) + 1e-9)
