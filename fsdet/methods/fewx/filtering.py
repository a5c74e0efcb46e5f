"""3x3 convolutions with fewer multiplications, for inference on a CPU: equal to the plain ones up to rounding.

Minimal filtering F(m, 3) gives m neighbouring outputs of a filter of three taps by m + 2 products instead of 3 m, here
with m <= 4 and in both directions: 36 products for 4 x 4 outputs instead of 144. The products of a channel pair are
summed by matrix products, one for each pair of interpolation points. Maps of up to 9 cells a side are cut in tiles of 4
and what remains, so that no product is spent outside the map: a map of 7 x 7 costs 121 products instead of 441.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4. Shapes: N maps, C and
O channels, H and W cells, T tiles, M multiplications of a channel pair.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from fsdet.modeling.derived import Derived, is_cpu_inference

TILE = 4  # outputs of a tile a side
WHOLE = 9  # output cells a side up to which a map is transformed as a whole
# Interpolation points; the one at infinity comes first, and a tile of m outputs uses the first m + 2 of all. Their
# spacing keeps the powers near 1, which halves the rounding error of the usual 0, 1, -1, 2, -2.
POINTS = (0.0, 0.7, -0.7, 1.4, -1.4)
MIN_CHANNELS = 128  # below, the transforms cost more than they save
# Maps that go through together, by the size of their transform in numbers: what the caches of a core hold.
_AT_ONCE = 12_000_000


def _powers(count: int) -> Tensor:
    """(6, count): the powers 0 .. count-1 of every point; of infinity the highest alone."""
    rows = [[0.0] * (count - 1) + [1.0], *([point**power for power in range(count)] for point in POINTS)]
    return torch.tensor(rows, dtype=torch.double)


@dataclass(frozen=True)
class _Transform:
    """How maps of one size are computed.

    Attributes:
        before: (M, H * W), from the input cells to the factors of the products.
        after: (H' * W', M), from the products to the output cells.
        groups: (first, last) number of the point pairs, and T tiles that use each of them; M = sum of pairs x tiles.
    """

    before: Tensor
    after: Tensor
    groups: tuple[tuple[int, int, int], ...]


def _tiles(length: int) -> list[int]:
    """Cut a number of outputs in tiles of 4 and what remains."""
    return [TILE] * (length // TILE) + [length % TILE] * bool(length % TILE)


def _line(outputs: int, padding: int) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor]]:
    """One direction: (point, tile) -> weights of the inputs, and -> weights of the outputs."""
    inputs = outputs + 2
    before, after = {}, {}
    start = 0
    for tile, size in enumerate(_tiles(outputs)):
        taps = torch.linalg.inv(_powers(size + 2)[: size + 2]).T  # (points, inputs of the tile)
        values = _powers(size)[: size + 2]  # (points, outputs of the tile)
        for point in range(size + 2):
            row = torch.zeros(inputs, dtype=torch.double)
            row[start : start + size + 2] = taps[point]
            before[point, tile] = row[padding : inputs - padding]
            column = torch.zeros(outputs, dtype=torch.double)
            column[start : start + size] = values[point]
            after[point, tile] = column
        start += size
    return before, after


def _pairs() -> list[tuple[int, int]]:
    """Pairs of points (vertical, horizontal), ordered so that those of smaller tiles come first."""
    count = TILE + 2
    return sorted(((i, j) for i in range(count) for j in range(count)), key=lambda pair: (max(pair), min(pair), pair))


@lru_cache(maxsize=16)
def _transform(height: int, width: int, padding: int) -> _Transform:
    """Transform of maps with `height` x `width` output cells."""
    (rows_before, rows_after), (columns_before, columns_after) = _line(height, padding), _line(width, padding)
    tiles = defaultdict(list)
    for i, y in rows_before:
        for j, x in columns_before:
            tiles[i, j].append((y, x))
    before, after, groups = [], [], []
    for number, (i, j) in enumerate(_pairs()):
        used = sorted(tiles.get((i, j), ()))
        if not used:
            continue
        if groups and groups[-1][2] == len(used) and groups[-1][1] == number:
            groups[-1] = (groups[-1][0], number + 1, len(used))
        else:
            groups.append((number, number + 1, len(used)))
        before += [torch.outer(rows_before[i, y], columns_before[j, x]).flatten() for y, x in used]
        after += [torch.outer(rows_after[i, y], columns_after[j, x]).flatten() for y, x in used]
    return _Transform(torch.stack(before).float(), torch.stack(after, dim=1).float().contiguous(), tuple(groups))


class FilteredConv:
    """A 3x3 convolution of stride 1 and the ReLU behind it, with transformed weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None, padding: int) -> None:
        """`weight` (O, C, 3, 3) and `bias` (O,) in single precision; `padding` 0 or 1."""
        self.bias, self.padding = bias, padding
        taps = _powers(3)
        pairs = torch.stack([torch.outer(taps[i], taps[j]).flatten() for i, j in _pairs()]).to(weight)  # (36, 9)
        out_channels, in_channels = weight.shape[:2]
        self.weight = (pairs @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(-1, in_channels, out_channels)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, O, H', W') in channels-last memory format; without gradients."""
        height, width = (length + 2 * self.padding - 2 for length in x.shape[2:])
        cells = x.permute(0, 2, 3, 1)
        if max(height, width) <= WHOLE:
            maps = self._maps(cells, height, width, self.padding)
        else:
            maps = self._cut(cells, height, width)
        return maps.permute(0, 3, 1, 2)

    def _maps(self, cells: Tensor, height: int, width: int, padding: int) -> Tensor:
        """Small maps (N, H, W, C) as a whole; a few at once, which stay in the caches."""
        at_once = max(1, _AT_ONCE // (_transform(height, width, padding).before.shape[0] * cells.shape[3]))
        result = cells.new_empty(len(cells), height, width, self.weight.shape[2])
        for source, target in zip(cells.split(at_once), result.split(at_once), strict=True):
            target.copy_(self._products(source.permute(1, 2, 0, 3), height, width, padding).permute(2, 0, 1, 3))
        return result

    def _cut(self, cells: Tensor, height: int, width: int) -> Tensor:
        """Large maps (N, H, W, C) in tiles of 4 x 4 outputs."""
        rows, columns = -(-height // TILE), -(-width // TILE)
        below, right = rows * TILE - height, columns * TILE - width
        padded = F.pad(cells, (0, 0, self.padding, self.padding + right, self.padding, self.padding + below))
        windows = padded.unfold(1, TILE + 2, TILE).unfold(2, TILE + 2, TILE)  # (N, rows, columns, C, 6, 6)
        count, channels = len(cells), cells.shape[3]
        windows = windows.permute(4, 5, 0, 1, 2, 3).reshape(TILE + 2, TILE + 2, count * rows * columns, channels)
        tiles = self._products(windows, TILE, TILE, 0).unflatten(2, (count, rows, columns))
        maps = tiles.permute(2, 3, 0, 4, 1, 5).reshape(count, rows * TILE, columns * TILE, tiles.shape[-1])
        return maps[:, :height, :width].contiguous()

    def _products(self, cells: Tensor, height: int, width: int, padding: int) -> Tensor:
        """Cells in front, (H, W, N, C) -> (H', W', N, O)."""
        count, channels = cells.shape[2:]
        transform = _transform(height, width, padding)
        factors = transform.before @ cells.flatten(2).flatten(0, 1)  # (M, N * C)
        products = factors.new_empty(len(factors), count * self.weight.shape[2])
        start = 0
        for first, last, tiles in transform.groups:
            pairs, end = last - first, start + (last - first) * tiles
            torch.bmm(
                factors[start:end].view(pairs, tiles * count, channels),
                self.weight[first:last],
                out=products[start:end].view(pairs, tiles * count, self.weight.shape[2]),
            )
            start = end
        outputs = (transform.after @ products).view(height, width, count, self.weight.shape[2])
        return (outputs if self.bias is None else outputs.add_(self.bias)).relu_()


def _is_filterable(conv: nn.Conv2d) -> bool:
    """Whether a convolution has the form that `FilteredConv` computes, and is wide enough to gain by it."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding in ((0, 0), (1, 1))
        and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
    )


def _filtered(conv: nn.Conv2d) -> FilteredConv:
    return FilteredConv(conv.weight, conv.bias, conv.padding[0])


class FilteredConv2d(Conv2d):
    """Detectron2's 3x3 convolution with a ReLU; at inference on a CPU it takes the way with fewer multiplications."""

    def __init__(self, in_channels: int, out_channels: int, *, padding: int, bias: bool) -> None:
        """`padding`: 0 or 1."""
        super().__init__(in_channels, out_channels, kernel_size=3, padding=padding, bias=bias, activation=nn.ReLU())
        self._filtered = Derived(_filtered)

    def train(self, mode: bool = True) -> FilteredConv2d:
        """Switch the mode; transformed weights are made anew."""
        self._filtered.forget()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, O, H', W')."""
        if is_cpu_inference(self, x) and _is_filterable(self) and min(x.shape[2:]) + 2 * self.padding[0] > 2:
            return self._filtered(self)(x)
        return super().forward(x)
