"""Large convolutions at inference on a CPU, by small Fourier transforms: equal to the plain ones up to rounding.

The output is cut in tiles of 10 x 10 cells. A tile's window of the input is transformed in both directions, channels
are mixed frequency by frequency, and the transform back gives the tile: 382 products of a channel pair for 100 outputs
of a 7 x 7 kernel instead of 4,900, and 292 instead of 2,500 for a 5 x 5 one. Transforms are products with small
matrices over all tiles and channels together. A complex product is done by three real ones (Gauss), whose sums are
part of those matrices; so all that remains are products of real matrices, one for each of the 382 planes.

Frequencies are points on the unit circle, so that, unlike in Winograd's filtering with real points, rounding does not
grow with the size of a tile: against double precision the error is smaller than that of the plain convolution.

Source: Mathieu, Henaff, LeCun, "Fast Training of Convolutional Networks through FFTs" (ICLR 2014); tiles are
overlap-save. Letters: I and O channels of input and output, T tiles, W cells a side of a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fsdet.methods.os2d.scratch import Scratch

TILE = 10  # output cells a side of a tile
# Tiles that go through together: more read the transformed kernel less often, but fit the caches less well.
_AT_ONCE = 96


@dataclass(frozen=True)
class _Line:
    """What becomes of one frequency of the first direction.

    Attributes:
        planes: which planes of the first transform it has: 1 if it is real, real and imaginary part otherwise, each
            plane with its W positions in the second direction.
        before: (M, planes * W), to the factors of the M products.
        kernel: (M, I, O), their other factors.
        after: (planes * TILE, M), from the products back to positions in the second direction.
    """

    planes: slice
    before: Tensor
    kernel: Tensor
    after: Tensor


class FourierConv:
    """A convolution with zero padding that keeps the size of the map, its batch norm in evaluation mode, and a ReLU."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, scratch: Scratch) -> None:
        """Fold the norm into the convolution and transform the kernel; results lie in `scratch`."""
        self._scratch = scratch
        scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        weight = conv.weight.double() * scale[:, None, None, None]
        bias = (conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
        self.bias = bias.to(conv.weight.dtype)
        self.out_channels, self.in_channels, taps, _ = weight.shape
        self.padding = taps // 2
        self.window = TILE + taps - 1
        first, last = _first_direction(self.window)
        self._first, self._last = first.to(self.bias), last.to(self.bias)
        self._lines = _lines(weight, self.window)

    def __call__(self, rows: Tensor, windows: Tensor) -> Tensor:
        """Convolve.

        Args:
            rows: (R, I) cells of the input; row 0 stands for every cell outside the map and is 0.
            windows: (W * W, T) which rows the windows of the tiles hold.

        Returns:
            (1 + T * TILE * TILE, O): row 0 is 0 again, then tile by tile its cells. The next call overwrites it.
        """
        tiles = windows.shape[1]
        result = self._scratch.take(f"result {self.window}", 1 + tiles * TILE * TILE, self.out_channels)
        result[0] = 0
        end = 1
        for part in windows.tensor_split(max(1, -(-tiles // _AT_ONCE)), dim=1):
            size = part.shape[1]
            cells = self._transformed(self._gathered(rows, part), size).view(TILE * TILE, size, -1)
            target = result[end : (end := end + size * TILE * TILE)].view(size, TILE * TILE, -1)
            torch.add(cells.transpose(0, 1), self.bias, out=target)
        return result.relu_()

    def _gathered(self, rows: Tensor, windows: Tensor) -> Tensor:
        """(W, W * T * I): the rows that (W * W, T) names."""
        planes = self._scratch.take("windows", windows.numel(), self.in_channels)
        return torch.index_select(rows, 0, windows.flatten(), out=planes).view(self.window, -1)

    def _transformed(self, windows: Tensor, tiles: int) -> Tensor:
        """(W, W * T * I) to (TILE, TILE * T * O)."""
        take, width, wide = self._scratch.take, tiles * self.in_channels, tiles * self.out_channels
        planes = torch.mm(self._first, windows, out=take("planes", *windows.shape))
        planes = planes.view(self.window, self.window, width)
        lines = take("lines", self.window, TILE, wide)
        for line in self._lines:
            count = len(line.kernel)
            factors = torch.mm(line.before, planes[line.planes].view(-1, width), out=take("factors", count, width))
            products = take("products", count, tiles, self.out_channels)
            torch.bmm(factors.view(count, tiles, -1), line.kernel, out=products)
            torch.mm(line.after, products.view(count, wide), out=lines[line.planes].view(-1, wide))
        return torch.mm(self._last, lines.view(self.window, -1), out=take("cells", TILE, TILE * wide))


def _first_direction(window: int) -> tuple[Tensor, Tensor]:
    """The transform of W real numbers to W planes, (W, W), and from these to the tile, (TILE, W).

    Planes: frequency 0, frequency W / 2, then real and imaginary part of 1, 2, ... W / 2 - 1.
    """
    places = torch.arange(window, dtype=torch.double)
    forth, back = [], []
    for frequency in (0, window // 2, *range(1, window // 2)):
        angles = 2 * math.pi * frequency / window * places
        is_real = frequency in (0, window // 2)
        share = (1 if is_real else 2) / window  # a conjugate pair of frequencies counts twice
        forth += [angles.cos()] if is_real else [angles.cos(), -angles.sin()]
        back += [share * angles.cos()] if is_real else [share * angles.cos(), -share * angles.sin()]
    return torch.stack(forth), torch.stack(back, dim=1)[:TILE]


def _lines(weight: Tensor, window: int) -> list[_Line]:
    """All frequencies of the first direction for a kernel (O, I, taps, taps)."""
    half = window // 2
    lines = [_line(weight, window, frequency, slice(plane, plane + 1)) for plane, frequency in enumerate((0, half))]
    lines += [_line(weight, window, number, slice(2 * number, 2 * number + 2)) for number in range(1, half)]
    return lines


def _line(weight: Tensor, window: int, frequency: int, planes: slice) -> _Line:
    """One frequency of the first direction.

    For X = factor, K = kernel, the three products are (Xr + Xi) Kr, Xr (Ki - Kr) and Xi (Kr + Ki); the real part of
    X K is the first minus the third, the imaginary part the first plus the second.
    """
    is_real, half, step = planes.stop - planes.start == 1, window // 2, 2 * math.pi / window
    places = torch.arange(window, dtype=torch.double)
    taps = torch.arange(weight.shape[-1], dtype=torch.double)
    before, kernel, after = [], [], []
    for other in range(half + 1 if is_real else window):
        cos, sin = (step * other * places).cos(), (step * other * places).sin()
        # The conjugate kernel, since a convolution layer is a correlation.
        angles = step * (frequency * taps[:, None] + other * taps)
        if is_real and other in (0, half):
            before.append(cos)
            kernel.append(angles.cos())
            after.append(cos[:TILE] / window)
            continue
        real, imag = (cos, -sin) if is_real else (torch.cat([cos, sin]), torch.cat([-sin, cos]))
        before += [real + imag, real, imag]
        kernel += [angles.cos(), angles.sin() - angles.cos(), angles.cos() + angles.sin()]
        share = (2 if is_real else 1) / window  # a conjugate pair of frequencies counts twice
        cos, sin = share * cos[:TILE], share * sin[:TILE]
        # Back by (cos, -sin) to a real part and by (sin, cos) to an imaginary one.
        to_real, to_imag = (cos - sin, -sin, -cos), (sin + cos, cos, -sin)
        after += to_real if is_real else [torch.cat(pair) for pair in zip(to_real, to_imag, strict=True)]
    spectrum = torch.einsum("mpq,oipq->mio", torch.stack(kernel), weight)
    tensors = torch.stack(before), spectrum, torch.stack(after, dim=1)
    return _Line(planes, *(tensor.float().contiguous() for tensor in tensors))
