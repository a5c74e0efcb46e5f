"""The alignment network: the identity at first, recorded outputs, weakalign's weights, the short way on a CPU."""

import threading

import pytest
import torch
import torch.nn.functional as F
from test_methods_os2d_head import GOLDEN, close, golden, golden_head, golden_pairs

from fsdet.methods.os2d import fourier, scratch
from fsdet.methods.os2d.fast_transform import FastTransform
from fsdet.methods.os2d.fourier import FourierConv
from fsdet.methods.os2d.scratch import Scratch
from fsdet.methods.os2d.tiles import all_tiles, best_blocks, places_in, tiles_near, window_rows
from fsdet.methods.os2d.transform_net import TransformNet, load_weakalign


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def learnt(parameters=6):
    """A network in evaluation mode whose weights and statistics are not those of the start."""
    net = TransformNet(parameters)
    torch.nn.init.normal_(net.linear.weight, std=0.01)
    for norm in (net.conv[1], net.conv[4]):
        for name, low in (("weight", 0.5), ("bias", -0.2), ("running_mean", -0.1), ("running_var", 0.1)):
            getattr(norm, name).data.uniform_(low, low + 0.5)
    return net.eval()


class TestTransformNet:
    @pytest.mark.parametrize(("count", "identity"), [(4, [1, 0, 1, 0]), (6, [1, 0, 0, 0, 1, 0])])
    @torch.no_grad()
    def test_identity_at_first(self, count, identity):
        parameters = TransformNet(count).eval()(torch.rand(2, 225, 3, 4))
        assert parameters.shape == (2, count, 3, 4)
        assert torch.equal(parameters, torch.tensor(identity).view(1, -1, 1, 1).expand_as(parameters).float())

    def test_names_are_the_official_ones(self):
        names = {name.rsplit(".", 1)[0] for name in TransformNet(6).state_dict()}
        assert names == {"conv.0", "conv.1", "conv.3", "conv.4", "linear"}

    def test_another_number_of_parameters(self):
        with pytest.raises(ValueError, match="got 5; set OS2D.PARAMETERS"):
            TransformNet(5)

    def test_scale_does_not_count_and_negative_correlations_neither(self):
        net, x = learnt(), torch.rand(1, 225, 2, 3) - 0.5
        with torch.no_grad():
            expected = net(x)
            close(net(100 * x), expected, 1e-4)
            close(net(x.clamp(min=0)), expected, 1e-6)

    def test_a_cell_like_nothing_has_a_finite_gradient(self):
        x = torch.full((1, 225, 2, 2), -1.0, requires_grad=True)
        learnt()(x).sum().backward()
        assert torch.isfinite(x.grad).all()

    @pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data in {GOLDEN}")
    @pytest.mark.parametrize(("name", "count", "inverse"), [("v1", 4, False), ("v2", 6, True)])
    @torch.no_grad()
    def test_recorded(self, name, count, inverse):
        net, correlation = golden_head(count, inverse).transform_net, golden_pairs()
        close(net(correlation), golden()[f"{name}/transform_raw"], 2e-5)
        close(FastTransform(net)(correlation), golden()[f"{name}/transform_raw"], 2e-5)


class TestWeakalign:
    @staticmethod
    def state():
        return {f"FeatureRegression.{name}": value for name, value in learnt().state_dict().items()}

    @torch.no_grad()
    def test_fully_connected_layer(self):
        """At the centre of a 15 x 15 map the network is weakalign's, which has no padding."""
        state = self.state()
        state["FeatureRegression.linear.weight"] = torch.randn(6, 1600) * 0.01
        state = {f"module.{name}": value for name, value in state.items() if "num_batches" not in name}
        net = TransformNet(6).eval()
        net.load_state_dict(load_weakalign(state | {"FeatureExtraction.model.0.weight": torch.rand(1)}))
        x = given = torch.rand(1, 225, 15, 15)
        x = F.normalize(x, dim=1)
        for layer in net.conv:
            x = F.conv2d(x, layer.weight, layer.bias) if isinstance(layer, torch.nn.Conv2d) else layer(x)
        expected = x.flatten() @ state["module.FeatureRegression.linear.weight"].T + net.linear.bias
        close(net(given)[0, :, 7, 7], expected, 1e-5)

    def test_what_is_missing_or_of_another_shape_is_named(self):
        state = self.state()
        del state["FeatureRegression.conv.3.bias"]
        with pytest.raises(ValueError, match=r"FeatureRegression.conv.3.bias is missing, expected \(64,\)"):
            load_weakalign(state)
        state = self.state() | {"FeatureRegression.linear.weight": torch.rand(18, 1600)}
        with pytest.raises(ValueError, match=r"linear.weight has the shape \(18, 1600\), expected \(6, 64, 5, 5\)"):
            load_weakalign(state)


class TestFourierConv:
    @pytest.mark.parametrize("taps", [7, 5])
    @pytest.mark.parametrize(("classes", "height", "width"), [(1, 10, 20), (3, 1, 1), (2, 11, 23), (1, 29, 8)])
    def test_is_the_convolution(self, taps, classes, height, width):
        """Double precision is the judge, and the plain convolution in single precision is not nearer to it."""
        conv, norm = torch.nn.Conv2d(6, 4, taps, padding=taps // 2), torch.nn.BatchNorm2d(4).eval()
        for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            value.uniform_(0.5, 1)
        x = torch.randn(classes, 6, height, width)
        expected = norm.double()(conv.double()(x.double())).relu().detach()
        plain = norm.float()(conv.float()(x)).relu().detach()
        size = (classes, height, width)
        tiles = all_tiles(*size)
        short = FourierConv(conv, norm, Scratch())
        rows = torch.cat([torch.zeros(1, 6), x.permute(0, 2, 3, 1).reshape(-1, 6)])
        places = torch.arange(1, len(rows)).view(size)
        with torch.no_grad():
            result = short(rows, window_rows(places, tiles, short.window, short.padding))
        assert result[0].abs().max() == 0
        result = result[places_in(tiles, size)].permute(0, 3, 1, 2)
        error, of_plain = ((value - expected).abs().max() for value in (result, plain))
        assert error <= max(2 * of_plain, 1e-6)

    def test_number_of_products(self):
        conv, norm = torch.nn.Conv2d(2, 3, 7, padding=3), torch.nn.BatchNorm2d(3)
        lines = FourierConv(conv, norm, Scratch())._lines
        assert sum(len(line.kernel) for line in lines) == 382  # 126 complex ones by 3 each, and 4 real ones


class TestTiles:
    def test_rows_of_a_window(self):
        """A map of 2 x 11 cells in two tiles; windows of 12 cells begin one cell above and to the left."""
        places = torch.arange(1, 23).view(1, 2, 11)
        tiles = all_tiles(1, 2, 11)
        assert tiles.tolist() == [[0, 0, 0], [0, 0, 1]]
        windows = window_rows(places, tiles, 12, 1).view(12, 12, 2)
        assert windows[:, :, 0][1:3].tolist() == [[0, *range(1, 12)], [0, *range(12, 23)]]
        assert windows[1, :, 1].tolist() == [10, 11] + [0] * 10
        assert windows[0].max() == 0 and windows[3:].max() == 0

    def test_places_in_tiles(self):
        """Only the second tile is there: its cells come row by row behind row 0."""
        places = places_in(torch.tensor([[0, 0, 1]]), (1, 2, 12))
        assert places[0, :, 10:].tolist() == [[1, 2], [11, 12]] and places[0, :, :10].max() == 0

    def test_tiles_near_a_cell(self):
        needed = torch.zeros(2, 25, 12, dtype=torch.bool)
        needed[1, 8, 3] = True
        assert tiles_near(needed, 1).tolist() == [[1, 0, 0]]
        assert tiles_near(needed, 2).tolist() == [[1, 0, 0], [1, 1, 0]]  # row 10 is two cells away

    def test_best_blocks(self):
        """Blocks stand 5 cells off: rows 0-4 and 5-13, columns 0-4, 5-14 and 15-19."""
        scores = torch.zeros(2, 14, 20)
        scores[0, 4, 4], scores[0, 5, 14], scores[1, 13, 15] = 1, 2, 3
        blocks = best_blocks(scores, 1 / 6)
        assert blocks[0].nonzero().amin(0).tolist() == [5, 5] and blocks[0].nonzero().amax(0).tolist() == [13, 14]
        assert blocks[1].sum() == 9 * 5 and blocks[1, 5:, 15:].all()
        assert best_blocks(scores, 0.2)[0, :5, :5].all()  # two blocks, rounded up
        assert best_blocks(scores, 1.0).all()


class TestFastTransform:
    @pytest.mark.parametrize("size", [(3, 1, 1), (1, 21, 33), (2, 12, 9)])
    @torch.no_grad()
    def test_is_the_network(self, size, monkeypatch):
        net, x = learnt(), torch.rand(size[0], 225, *size[1:]) - 0.2
        expected, fast = net(x), FastTransform(net)
        close(fast(x), expected, 2e-6)
        close(fast(x), expected, 2e-6)  # in used memory
        monkeypatch.setattr(fourier, "_AT_ONCE", 2)
        close(fast(x), expected, 2e-6)

    @torch.no_grad()
    def test_only_what_is_needed(self, monkeypatch):
        net, x = learnt(), torch.rand(2, 225, 35, 42)
        needed = torch.zeros(2, 35, 42, dtype=torch.bool)
        needed[0, 5:15, 15:25] = needed[1, 27, 0] = True
        counts = []
        way = FourierConv.__call__
        monkeypatch.setattr(FourierConv, "__call__", lambda *given: counts.append(given[2].shape[1]) or way(*given))
        result = FastTransform(net)(x, needed)
        close(result.permute(0, 2, 3, 1)[needed], net(x).permute(0, 2, 3, 1)[needed], 2e-6)
        assert torch.isfinite(result).all()
        # Of 40. The lone cell stands three rows above the next tile: near enough for the first convolution alone.
        assert counts == [4 + 2, 4 + 1]


class TestScratch:
    def test_the_same_memory_again(self, monkeypatch):
        held = Scratch()
        first = held.take("a", 4, 6)
        assert held.take("a", 3, 2).data_ptr() == first.data_ptr() != held.take("b", 3).data_ptr()
        assert held.take("a", 5, 6).shape == (5, 6)
        monkeypatch.setattr(scratch, "_MOST_HELD", 10)
        held.take("c", 11)
        assert set(held._held) == {"a", "b"}

    def test_every_thread_has_its_own(self):
        held = Scratch()
        mine, theirs = held.take("a", 4), []
        thread = threading.Thread(target=lambda: theirs.append(held.take("a", 4)))
        thread.start()
        thread.join()
        assert theirs[0].data_ptr() != mine.data_ptr()
