"""Two-way contrastive training: which pairs of region and class enter the loss, and the losses of the detector.

An image meets its own class (positive pass) and one that it does not show (negative pass). Pairs come in the ratio
1:2:1: objects with their class, background with that class, anything with the other class; of the last two kinds those
that look most like a match.

Source: FewX (Fan et al., CVPR 2020), section 4.3, in the form of the release. Departure: the passes are separated at
their true boundary; the release separates at half of all rows, which is another place when the passes have different
numbers of regions (`legacy_boundary`).
"""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor

logger = logging.getLogger(__name__)

_BACKGROUND_SHARE = 0.25  # of all rows, at most, is background of the positive pass


def select_rows(logits: Tensor, classes: Tensor, positives: int, *, legacy_boundary: bool = False) -> Tensor:
    """Choose the rows of one image that enter the cross-entropy.

    Args:
        logits: (N, 2), column 0 = match; the positive pass first.
        classes: (N,) int64: 0 = match, 1 = no match; no match at all in the negative pass.
        positives: rows of the positive pass.
        legacy_boundary: separate the passes at N // 2 instead.
    Returns: row numbers, sorted: all f matches; the max(1, min(2 f, N // 4)) = n hardest other rows of the positive
        pass; the max(1, min(f, n)) hardest ones of the negative pass. Hardest = of highest match probability.
    """
    count = len(classes)
    boundary = count // 2 if legacy_boundary else positives
    hardness = logits.detach().float().softmax(dim=1)[:, 0]
    rows = torch.arange(count, device=classes.device)
    matches = rows[classes == 0]
    background = rows[(classes != 0) & (rows < boundary)]
    others = rows[(classes != 0) & (rows >= boundary)]
    from_background = max(1, min(2 * len(matches), int(_BACKGROUND_SHARE * count)))
    from_others = max(1, min(len(matches), from_background))
    chosen = [matches, _hardest(background, hardness, from_background), _hardest(others, hardness, from_others)]
    return torch.cat(chosen).sort().values


def _hardest(rows: Tensor, hardness: Tensor, count: int) -> Tensor:
    """The `count` rows of highest hardness, or all of them."""
    return rows[hardness[rows].topk(min(count, len(rows))).indices]


def image_losses(
    logits: Tensor,
    deltas: Tensor,
    classes: Tensor,
    proposals: Tensor,
    targets: Tensor,
    *,
    positives: int,
    transform: Box2BoxTransform,
    legacy_boundary: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of one image.

    Args:
        logits: (N, 2), the positive pass first.
        deltas: (N, 4).
        classes: (N,) int64, 0 or 1.
        proposals: (N, 4) XYXY, network input.
        targets: (N, 4), the object of each row; read where the class is 0.
        positives, legacy_boundary: see `select_rows`.
        transform: from boxes to deltas.
    Returns: "loss_cls", mean cross-entropy over the selected rows, and "loss_box_reg", the L1 norm over the matches by
        N (zero, with a gradient of zeros, where there is no row); and the selected rows.
    """
    if not len(classes):
        return {"loss_cls": logits.sum(), "loss_box_reg": deltas.sum()}, classes
    kept = select_rows(logits, classes, positives, legacy_boundary=legacy_boundary)
    matches = (classes == 0).nonzero()[:, 0]
    wanted = transform.get_deltas(proposals[matches], targets[matches])
    losses = {
        "loss_cls": F.cross_entropy(logits[kept].float(), classes[kept]),
        "loss_box_reg": F.l1_loss(deltas[matches].float(), wanted, reduction="sum") / len(classes),
    }
    return losses, kept


class PlateauWatch:
    """Warns once when the classification loss stays where a head that predicts a constant has it.

    With the ratio 1:2:1 that is 0.562, the entropy of a quarter of matches. A healthy run leaves it about when the
    warm-up ends; one with an unfit learning rate stays.
    """

    def __init__(self, *, after: int = 500, window: int = 200, margin: float = 0.01) -> None:
        """Judge windows of `window` steps that end after step `after`; `margin` is in units of the loss."""
        self.after, self.window, self.margin = after, window, margin
        self._steps, self._has_warned = 0, False
        self._loss: Tensor | float = 0.0
        self._share: Tensor | float = 0.0

    def update(self, loss: Tensor, share: Tensor) -> None:
        """Note one step.

        Args:
            loss: mean classification loss of the batch.
            share: mean over the images of the share of matches among the selected rows.
        """
        if self._has_warned:
            return
        self._steps += 1
        self._loss, self._share = self._loss + loss.detach().float(), self._share + share.detach().float()
        if self._steps % self.window:
            return
        mean, share_seen = float(self._loss) / self.window, float(self._share) / self.window
        self._loss = self._share = 0.0
        if self._steps > self.after and abs(mean - _entropy(share_seen)) < self.margin and share_seen > 0:
            self._has_warned = True
            logger.warning(
                "loss_cls was %.3f over the last %d steps: the relation heads predict a constant (%.3f) and have "
                "learned nothing in %d steps. If it stays there, start again with a lower SOLVER.BASE_LR or a longer "
                "SOLVER.WARMUP_ITERS, and check MODEL.WEIGHTS.",
                mean,
                self.window,
                _entropy(share_seen),
                self._steps,
            )


def _entropy(share: float) -> float:
    """Cross-entropy of the best constant prediction for this share of matches, in nats."""
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
