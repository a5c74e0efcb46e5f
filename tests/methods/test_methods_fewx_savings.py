"""Exact savings at inference on a CPU: the same numbers as the plain modules, and never those of former weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes
from test_methods_fewx_model import build, configure

from fsdet.methods.fewx import filtering, rpn
from fsdet.methods.fewx.filtering import FilteredConv, FilteredConv2d
from fsdet.methods.fewx.folded import FoldedStage, Projections, pointwise
from fsdet.methods.fewx.roi_heads import RelationRes5ROIHeads
from fsdet.modeling.derived import Derived, weights_key


def same(actual, expected, share=5e-6):
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= share * float(expected.abs().max())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TestFiltering:
    @pytest.mark.parametrize(
        ("height", "width", "padding"),
        [(7, 7, 1), (5, 5, 0), (4, 4, 1), (3, 3, 0), (1, 2, 1), (6, 9, 1), (9, 5, 1), (11, 13, 0), (10, 30, 1)],
    )
    def test_is_the_convolution(self, height, width, padding):
        """Maps of every kind of tile, as a whole and cut; double precision is the judge."""
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(*s, generator=generator) for s in ((3, 6, height, width), (4, 6, 3, 3), (4,)))
        expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding).relu()
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            result = FilteredConv(weight, bias, padding)(given)
            same(result, expected.float())
            assert result.is_contiguous(memory_format=torch.channels_last) or min(result.shape) == 1
        same(FilteredConv(weight, None, padding)(x), F.conv2d(x, weight, padding=padding).relu())

    def test_number_of_products(self):
        """A map of 7 x 7 costs 121 products of a channel pair instead of 441; large tiles 36 for 16 outputs."""
        assert filtering._transform(7, 7, 1).before.shape == (121, 49)
        assert filtering._transform(4, 4, 0).before.shape == (36, 36)

    def test_pieces_of_a_batch(self, monkeypatch):
        x, weight = torch.randn(5, 6, 7, 7), torch.randn(4, 6, 3, 3)
        monkeypatch.setattr(filtering, "_AT_ONCE", 121 * 6 * 2)
        same(FilteredConv(weight, None, 1)(x), F.conv2d(x, weight, padding=1).relu())
        assert FilteredConv(weight, None, 1)(x[:0]).shape == (0, 4, 7, 7)

    @torch.no_grad()
    def test_layer_takes_the_short_way_only_where_it_may(self, monkeypatch):
        calls = []
        way = FilteredConv.__call__
        monkeypatch.setattr(FilteredConv, "__call__", lambda self, x: calls.append(1) or way(self, x))
        layer, x = FilteredConv2d(128, 128, padding=1, bias=True).eval(), torch.randn(2, 128, 7, 7)
        expected = F.conv2d(x, layer.weight, layer.bias, padding=1).relu()
        same(layer(x), expected)
        assert len(calls) == 1 and list(layer.state_dict()) == ["weight", "bias"]
        layer.train()(x)
        layer.eval()
        with torch.enable_grad():
            assert layer(x).requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
        FilteredConv2d(64, 128, padding=1, bias=True).eval()(x[:, :64])
        assert len(calls) == 1

    @torch.no_grad()
    def test_new_weights_count_at_once(self):
        layer, x = FilteredConv2d(128, 128, padding=1, bias=False).eval(), torch.randn(1, 128, 4, 4)
        other = FilteredConv2d(128, 128, padding=1, bias=False)

        def plain():
            return F.conv2d(x, layer.weight, padding=1).relu()

        same(layer(x), plain())
        layer.load_state_dict(other.state_dict())
        same(layer(x), plain())
        layer.weight.mul_(2)
        same(layer(x), plain())
        layer.weight = torch.nn.Parameter(torch.randn(128, 128, 3, 3))
        same(layer(x), plain())

    def test_fused_steps_count_too(self):
        """The fused optimizer writes without telling PyTorch's counter; the switch of mode around it tells."""
        layer, x = FilteredConv2d(128, 128, padding=1, bias=False).eval(), torch.randn(1, 128, 4, 4)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3, fused=True)
        with torch.no_grad():
            before = layer(x)
        layer.train()(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            after = layer.eval()(x)
            same(after, F.conv2d(x, layer.weight, padding=1).relu())
        assert not torch.allclose(before, after)

    @torch.no_grad()
    def test_copies_do_not_share(self):
        layer, x = FilteredConv2d(128, 128, padding=1, bias=False).eval(), torch.randn(1, 128, 4, 4)
        before = layer(x)
        twin = copy.deepcopy(layer)
        twin.weight.zero_()
        assert not twin(x).any() and torch.equal(layer(x), before)


def test_derived_values_depend_on_more_than_weights():
    made = []
    derived = Derived(lambda module, *extra: made.append(extra) or len(made))
    module = torch.nn.BatchNorm1d(2)
    assert [derived(module, 1), derived(module, 1), derived(module, 2)] == [1, 1, 2]
    module.running_mean.add_(1)
    assert derived(module, 2) == 3
    derived.forget()
    assert derived(module, 2) == 4
    with torch.inference_mode():
        untracked = torch.nn.Linear(1, 1)
    assert weights_key(untracked) is None and derived(untracked) == 5 and derived(untracked) == 6


def wide_heads(*opts):
    """Heads with 256 and 512 channels, whose norms are not trivial."""
    cfg = configure("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.WIDTH_PER_GROUP", 16, *opts)
    torch.manual_seed(0)
    heads = RelationRes5ROIHeads(cfg, {"res4": ShapeSpec(channels=256, stride=16)}).eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in heads.res5.state_dict().items():
        if ".norm." in name:
            low, high = {"weight": (0.2, 0.6), "bias": (-0.3, 0.3), "running_mean": (-0.5, 0.5)}.get(
                name.rsplit(".", 1)[1], (0.5, 2.0)
            )
            value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)
    return heads


class TestFoldedStage:
    @pytest.mark.parametrize("opts", [(), ("MODEL.RESNETS.STRIDE_IN_1X1", False), ("MODEL.RESNETS.NUM_GROUPS", 2)])
    @torch.no_grad()
    def test_is_the_stage(self, opts):
        heads = wide_heads(*opts)
        x = torch.randn(4, 256, 14, 14) if opts else torch.randn(4, 256, 7, 7)
        expected = heads.res5(x)
        assert FoldedStage.fits(heads.res5)
        result = FoldedStage(heads.res5)(x.contiguous(memory_format=torch.channels_last))
        same(result, expected)
        same(heads._stage(x), expected)
        assert heads._stage(x[:0]).shape == (0, *expected.shape[1:])

    @torch.no_grad()
    def test_new_weights_count_at_once(self):
        heads, x = wide_heads(), torch.randn(2, 256, 7, 7)
        before, names = heads._stage(x), list(heads.state_dict())
        heads.res5[1].conv2.norm.bias.add_(1)
        after = heads._stage(x)
        same(after, heads.res5(x))
        assert not torch.allclose(before, after)
        assert list(heads.state_dict()) == names and not any("folded" in name for name in names)
        heads.train()
        heads.res5[0].conv1.weight.data.mul_(0.5)  # uncounted
        heads.eval()
        same(heads._stage(x), heads.res5(x))

    @torch.no_grad()
    def test_live_norms_are_left_alone(self):
        heads, x = wide_heads("MODEL.RESNETS.NORM", "BN"), torch.randn(2, 256, 7, 7)
        assert not FoldedStage.fits(heads.res5)
        same(heads._stage(x), heads.res5(x))

    @pytest.mark.parametrize("count", [1, 4, 6])
    def test_pointwise(self, count):
        """Batches whose cells fill maps of 14 x 14, and others."""
        x, weight, bias = torch.randn(count, 8, 7, 7), torch.randn(5, 8, 1, 1), torch.randn(5)
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            same(pointwise(given, weight, bias), F.conv2d(x, weight, bias))


class TestBestCandidatesFirst:
    """Proposals are Detectron2's, whichever way NMS goes."""

    def run(self, monkeypatch, first, spread):
        monkeypatch.setattr(rpn, "FIRST_CANDIDATES", first)
        generator = torch.Generator().manual_seed(0)
        model = build("MODEL.RPN.POST_NMS_TOPK_TEST", 20).proposal_generator
        features = torch.zeros(2, 64, 20, 30)
        anchors = model.anchor_generator([features])
        count = len(anchors[0])
        logits = torch.randn(2, count, generator=generator)
        logits[0, :300] += 10  # the best of the first image overlap
        deltas = torch.randn(2, count, 4, generator=generator) * spread
        sizes = [(320, 480), (300, 470)]
        calls = []
        way = model._best
        monkeypatch.setattr(model, "_best", lambda *args: calls.append(args[4]) or way(*args))
        found = model.predict_proposals(anchors, [logits], [deltas], sizes)
        decoded = model._decode_proposals(anchors, [deltas])
        expected = find_top_rpn_proposals(decoded, [logits], sizes, 0.7, 6000, 20, 0.0, False)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.objectness_logits, theirs.objectness_logits)
            torch.testing.assert_close(ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor)
        return calls

    def test_first_candidates_suffice(self, monkeypatch):
        assert self.run(monkeypatch, 1000, 0.1) == [1000]

    def test_all_candidates_where_they_do_not(self, monkeypatch):
        assert self.run(monkeypatch, 21, 0.1) == [21, 6000]

    def test_few_anchors(self, monkeypatch):
        assert self.run(monkeypatch, 100_000, 0.1) == []


@torch.no_grad()
def test_whole_detector_is_the_same_without_the_savings(monkeypatch):
    """A detector wide enough for all of them."""
    model = build("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.WIDTH_PER_GROUP", 32)
    features, boxes = torch.rand(1, 256, 12, 16), [Boxes(torch.tensor([[0.0, 0, 100, 120], [30, 20, 90, 180]]))]
    kernels = torch.rand(2, 256)

    def numbers():
        regions = model.roi_heads.region_features(features, boxes)
        parts = model.roi_heads.box_predictor.encode(regions)
        logits, deltas = model.roi_heads.box_predictor(regions, parts, torch.tensor([0, 1]))
        found = model.proposal_generator.propose(features, [(192, 256)], kernels, [(0, 0), (0, 1)])
        return [regions, logits, deltas, *(instances.objectness_logits for instances in found)]

    short = numbers()
    for module in (filtering, rpn, __import__("fsdet.methods.fewx.folded", fromlist=["folded"])):
        monkeypatch.setattr(module, "is_cpu_inference", lambda *args: False, raising=False)
    for name in ("relation", "roi_heads"):
        module = __import__(f"fsdet.methods.fewx.{name}", fromlist=[name])
        monkeypatch.setattr(module, "is_cpu_inference", lambda *args: False)
    for ours, plain in zip(short, numbers(), strict=True):
        same(ours, plain, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("skip", [True, False])
def test_regions_of_projected_maps(skip):
    """Pooling and the first 1x1 convolutions change places; also for boxes that reach beyond the image."""
    heads = build("MODEL.ROI_HEADS.SKIP_UNREAD_CELLS", skip).roi_heads
    features = torch.rand(2, 64, 12, 16)
    boxes = [Boxes(torch.tensor([[-40.0, -8, 90, 120], [30, 20, 300, 250]])), Boxes(torch.tensor([[5.0, 9, 21, 14]]))]
    prepared = heads.prepare(features)
    # Where res5 strides itself, its first convolutions do not read every cell and are left where they are.
    assert isinstance(prepared, Projections) == skip
    same(heads.region_features(prepared, boxes), heads.region_features(features, boxes))
    same(heads.region_features(prepared[1:], boxes[1:]), heads.region_features(features[1:], boxes[1:]))
    heads.train()
    assert heads.prepare(features) is features
