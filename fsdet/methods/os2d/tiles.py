"""Which rows of a table of cells the windows of tiles hold, for maps that are computed tile by tile.

A stack of C maps of H x W cells is cut in tiles of 10 x 10 cells. A map's cells are rows of a table, and a place map
(C, H, W) says which; row 0 stands for cells that are not there. Only the tiles that someone needs are computed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fsdet.methods.os2d.fourier import TILE


def all_tiles(classes: int, height: int, width: int) -> Tensor:
    """(T, 3) class, row and column of all tiles of C maps."""
    shape = classes, -(-height // TILE), -(-width // TILE)
    return torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), dim=-1).flatten(0, 2)


def tiles_near(needed: Tensor, reach: int) -> Tensor:
    """(T, 3) tiles that hold cells no farther than `reach` cells (a side of a square) from a needed one.

    Args:
        needed: (C, H, W) bool.
        reach: cells.
    """
    height, width = needed.shape[1:]
    near = F.max_pool2d(needed.float(), 2 * reach + 1, stride=1, padding=reach)
    near = F.pad(near, (0, -width % TILE, 0, -height % TILE))
    return F.max_pool2d(near, TILE).nonzero()


def window_rows(places: Tensor, tiles: Tensor, window: int, padding: int) -> Tensor:
    """Rows that the windows of tiles hold.

    Args:
        places: (C, H, W) int64, the row of every cell; 0 for none.
        tiles: (T, 3).
        window: W cells a side, the tile and what lies around it.
        padding: cells of it above and to the left of the tile.

    Returns:
        (W * W, T) int64.
    """
    height, width = places.shape[1:]
    beyond = window - padding - TILE
    places = F.pad(places, (padding, -width % TILE + beyond, padding, -height % TILE + beyond))
    stride = places.stride()
    corners = (tiles * tiles.new_tensor([stride[0], TILE * stride[1], TILE])).sum(dim=1)
    steps = torch.arange(window, device=places.device)
    offsets = (steps[:, None] * stride[1] + steps).flatten()
    return places.flatten()[offsets[:, None] + corners]


def places_in(tiles: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Rows of the cells of C maps in a table of tiles: row 0 for nothing, then tile by tile its cells.

    Args:
        tiles: (T, 3).
        size: (C, H, W).

    Returns:
        (C, H, W) int64.
    """
    classes, height, width = size
    rows, columns = -(-height // TILE), -(-width // TILE)
    places = tiles.new_zeros(classes, rows, columns, TILE * TILE)
    cells = torch.arange(len(tiles) * TILE * TILE, device=tiles.device).view(-1, TILE * TILE)
    places[tuple(tiles.T)] = cells + 1
    places = places.view(classes, rows, columns, TILE, TILE).transpose(2, 3)
    return places.reshape(classes, rows * TILE, columns * TILE)[:, :height, :width]


def best_blocks(scores: Tensor, share: float) -> Tensor:
    """Mark, for each class, the blocks of 10 x 10 cells that hold its best scores.

    Blocks stand half a tile off the tiles, so that a block and the cells around it lie in four tiles.

    Args:
        scores: (C, H, W).
        share: of the blocks, in (0, 1], rounded up.

    Returns:
        (C, H, W) bool.
    """
    height, width = scores.shape[1:]
    shift = TILE // 2
    padding = (shift, -(width + shift) % TILE, shift, -(height + shift) % TILE)
    best = F.max_pool2d(F.pad(scores, padding, value=-math.inf), TILE)  # (C, rows, columns) of blocks
    count = math.ceil(share * best[0].numel())
    chosen = torch.zeros_like(best, dtype=torch.bool).flatten(1)
    chosen.scatter_(1, best.flatten(1).topk(count, dim=1).indices, True)
    cells = chosen.view_as(best).repeat_interleave(TILE, dim=1).repeat_interleave(TILE, dim=2)
    return cells[:, shift : shift + height, shift : shift + width]
