"""Suppression of more candidates than are held at once: they come in parts, and come again where that is needed.

The result is that of `decoding.py` on all candidates together. Suppression part by part would not do: a box falls to a
better one of its part, which may fall to a still better one of a later part and should have taken nothing along. For
the same reason the best boxes that stay so far tell nothing about worse candidates before the last part has come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torchvision.ops import box_iou

from fsdet.methods.os2d.decoding import REFERENCE_CHUNK, Found, exact_nms, reference_nms

# Best candidates of a round. Up to twice as many are held: some 250 MB, with geometry 650 MB, and twice that for a
# moment when they are joined.
_POOL = 2**22
_BLOCK = 4096  # candidates that are compared with each other at once
_PAIRS = 2**16  # overlaps that are computed at once, as many as a processor's cache takes

# Gives the candidates of a class, the same ones in the same order at every call; one part or more.
Candidates = Callable[[], Iterable[Found]]
# (candidates, threshold, limit) -> boxes that stay, best first; `limit` of them at most.
StreamedSuppression = Callable[[Candidates, float, int], Found]


def exact_in_rounds(read: Candidates, threshold: float, limit: int = -1) -> Found:
    """`exact_nms` of all candidates, in rounds of the best ones that are left.

    Whether a box stays depends on better boxes only. So what stays of the best candidates of all parts stays for good;
    and of the others, those that it overlaps have fallen. The next round takes the best of what is left then, until
    `limit` boxes stay or nothing is left. Few boxes overlap most candidates of a picture, so two rounds are the rule.
    What is held grows with the boxes that stay, not with the candidates.

    Args:
        read: the candidates; called once a round.
        threshold: of the overlap.
        limit: boxes wanted, at most; -1: all.
    Returns: the boxes that stay, best first; equal scores in their order.
    """
    # No box overlaps another by more than 1, nor itself: all of them stay, and are held.
    pool = _POOL if threshold < 1 else math.inf
    kept: Found | None = None
    while True:
        best = _Best(pool)
        for part in read():
            best.add(part, kept, threshold)
        kept = _suppress(best.take(), kept, threshold, limit)
        if best.is_all or 0 <= limit <= len(kept):
            return kept[:limit] if limit >= 0 else kept


def reference_in_chunks(read: Candidates, threshold: float, limit: int = -1, chunk: int = REFERENCE_CHUNK) -> Found:
    """`reference_nms` of all candidates, whose first chunks are suppressed as they come.

    What is held is a part of the candidates and what the first chunks leave.

    Args, Returns: as `exact_in_rounds`; `chunk` as `reference_nms`.
    """
    left: list[Found] = []
    rest: Found | None = None
    for part in read():
        rest = part if rest is None else Found.join([rest, part])
        while len(rest) >= chunk:
            left.append(_after_exact(rest[:chunk], threshold))
            rest = rest[chunk:]
    found = Found.join([*left, _after_exact(rest, threshold)])
    return found[reference_nms(found.boxes, found.scores, threshold, limit, chunk)]


STREAMED_SUPPRESSIONS: dict[str, StreamedSuppression] = {"exact": exact_in_rounds, "reference": reference_in_chunks}


class _Best:
    """The best candidates of the parts that were added, `size` to twice as many; equal scores in their order.

    Attributes:
        is_all: whether these are all that were added.
    """

    def __init__(self, size: float) -> None:
        self.is_all = True
        self._size = size
        self._parts: list[Found] = []
        self._least = -math.inf  # score of the last one that was kept when others were dropped

    def add(self, part: Found, kept: Found | None, threshold: float) -> None:
        """Add candidates, without those that a box of `kept` overlaps by more than `threshold`."""
        part = part[part.scores > self._least]
        if kept is not None:
            part = part[_uncovered(part.boxes, kept.boxes, threshold)]
        self._parts.append(part)
        if sum(map(len, self._parts)) > 2 * self._size:
            best = self.take().best(self._size)
            self.is_all, self._parts, self._least = False, [best], float(best.scores[-1])

    def take(self) -> Found:
        """Hand over what is there."""
        parts, self._parts = self._parts, []
        return Found.join(parts)


def _suppress(candidates: Found, kept: Found | None, threshold: float, limit: int) -> Found:
    """`kept`, and behind it the candidates that stay beside it; `limit` boxes or few more are enough.

    Memory of the suppression on a GPU grows with the square of what is compared at once, hence the blocks.
    """
    if kept is None:
        kept = candidates[:0]
    order = candidates.scores.argsort(descending=True, stable=True)
    for places in order.split(_BLOCK):
        if 0 <= limit <= len(kept):
            break
        block = candidates[places]
        block = block[_uncovered(block.boxes, kept.boxes, threshold)]
        kept = Found.join([kept, _after_exact(block, threshold)])
    return kept


def _after_exact(found: Found, threshold: float) -> Found:
    return found[exact_nms(found.boxes, found.scores, threshold)]


def _uncovered(boxes: Tensor, kept: Tensor, threshold: float) -> Tensor:
    """Places of the boxes (M, 4) that none of `kept` (K, 4) overlaps by more than `threshold`."""
    left = torch.arange(len(boxes), device=boxes.device)
    boxes, kept = boxes.float(), kept.float()
    first = 0
    while first < len(kept) and len(left):
        some = kept[first : first + max(1, _PAIRS // len(left))]
        # In double precision as `nms` compares. An area too small to be measured gives nan: it counts as overlapped,
        # so that every box overlaps itself and no round brings it again.
        fits = (box_iou(some, boxes).double() <= threshold).all(dim=0)
        boxes, left = boxes[fits], left[fits]
        first += len(some)
    return left
