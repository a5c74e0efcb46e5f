"""What training minimises: hinge losses on the matching scores, smooth L1 on the codes of the matched boxes.

A positive with score s below its margin m+ costs (m+ - s) / 2, a negative above its margin m- costs (s - m-) / 2; all
other anchors cost nothing. Three ways to put these terms together, each divided by the number of positives:

- `contrastive`: the squared terms, and of the negatives the hardest of the whole batch, a few for each positive;
- `hinge`: the same without the square (ours, for comparison);
- `rll`, the ranked list loss: the mean over the positives that cost something, and the mean over the classes of a
  weighted mean of the negatives that cost something, the harder the heavier.

Source: OS2D (Osokin et al., ECCV 2020), training objective, in the form of the release; `rll` after Ranked List Loss
(Wang et al., CVPR 2019). As in the release the terms are halved and a batch without positives has no class loss.
Departure: `rll` keeps its negatives on every device; the release loses all of them on a CPU.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

KINDS = ("rll", "contrastive", "hinge")
_SMALLEST_HARDEST = 1e-5  # a class whose hardest negative costs no more has learned its negatives (release)
_SMALLEST_WEIGHT = 1e-8  # lighter negatives are left out (release)


@dataclass(frozen=True)
class AnchorLosses:
    """Losses before any mean, one for each (class, anchor); leading dimensions as in the scores.

    Attributes:
        class_loss: (..., C, N) float, 0 where neither positive nor negative; not weighted.
        box_loss: (..., C, N) float, sum over the four numbers of the code; 0 where not `box_positive`.
        positive, negative: (..., C, N) bool, of the class loss.
        box_positive: (..., C, N) bool, of the box loss.
    """

    class_loss: Tensor
    box_loss: Tensor
    positive: Tensor
    negative: Tensor
    box_positive: Tensor


@dataclass(frozen=True)
class Objective:
    """Margins and weights of the losses; called with what the head found and what it should have found.

    Attributes:
        kind: "rll", "contrastive" or "hinge".
        positive_margin: m+, a score that a positive should reach; scores are cosines.
        negative_margin: m-, a score that a negative should stay below. Release: 0.6 and 0.5 for rll, 1.0 and 0.5 for
            contrastive.
        negative_ratio: negatives kept for each positive; None keeps all. Not read by rll.
        rll_ratio: weight of the easiest negative that costs something, relative to the hardest, in (0, 1).
        box_weight: of the box loss. Release: 0.2 for V1, 0 for V2.
        negative_weight: of the negatives' part of the class loss.

    Raises:
        ValueError: for an unknown kind or numbers out of range.
    """

    kind: str = "rll"
    positive_margin: float = 0.6
    negative_margin: float = 0.5
    negative_ratio: float | None = 3
    rll_ratio: float = 0.001
    box_weight: float = 0.2
    negative_weight: float = 1.0
    _warned: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"OS2D.OBJECTIVE is {self.kind!r}; expected {' | '.join(KINDS)}")
        if not 0 < self.rll_ratio < 1:
            raise ValueError(f"OS2D.RLL_RATIO is {self.rll_ratio}; expected a number between 0 and 1")
        if self.negative_ratio is not None and self.negative_ratio < 0:
            raise ValueError(f"OS2D.NEGATIVE_RATIO is {self.negative_ratio}; expected 0 or more negatives a positive")

    def __call__(
        self,
        scores: Tensor,
        codes: Tensor,
        labels: Tensor,
        target_codes: Tensor,
        *,
        remapped: Tensor | None = None,
        negative_scores: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch of B pictures, C classes and N anchors; their sum is the total.

        Args:
            scores: (B, C, N), cosines.
            codes: (B, C, N, 4), predicted box codes.
            labels: (B, C, N) integers, 1 positive, 0 negative, -1 ignored; by the anchors' overlap.
            target_codes: (B, C, N, 4), read at the positives of `labels`.
            remapped: (B, C, N) integers, labels for the class loss by the predicted boxes' overlap; None: `labels`.
            negative_scores: (B, C, N), scores without a way back into the transform, which the negatives take;
                None: `scores`.

        Returns:
            Scalars "loss_cls_pos", "loss_cls_neg" and "loss_box", weighted, float32. The first two are exactly 0 if the
            batch has no positive, the third if `labels` has none.
        """
        losses = self.per_anchor(
            scores, codes, labels, target_codes, remapped=remapped, negative_scores=negative_scores
        )
        positives, boxes = int(losses.positive.sum()), int(losses.box_positive.sum())
        if not positives:
            self._warn_once()
        class_loss = self.weighted(losses)
        negatives = self._keep(class_loss[losses.negative], positives)
        return {
            "loss_cls_pos": class_loss[losses.positive].sum() / max(1, positives),
            "loss_cls_neg": self.negative_weight * negatives.sum() / max(1, positives),
            "loss_box": self.box_weight * losses.box_loss.sum() / max(1, boxes),
        }

    def per_anchor(
        self,
        scores: Tensor,
        codes: Tensor,
        labels: Tensor,
        target_codes: Tensor,
        *,
        remapped: Tensor | None = None,
        negative_scores: Tensor | None = None,
    ) -> AnchorLosses:
        """Losses of every anchor, neither weighted nor selected, as patch mining compares them.

        Args: those of a call, of shape (..., C, N) and (..., C, N, 4).
        """
        negative_scores = scores if negative_scores is None else negative_scores
        class_labels = labels if remapped is None else remapped
        assert scores.shape == negative_scores.shape == labels.shape == class_labels.shape, "one label for each score"
        assert codes.shape == target_codes.shape == (*scores.shape, 4), "one code for each score"
        positive, negative, box_positive = class_labels == 1, class_labels == 0, labels == 1
        missed = torch.where(positive, F.relu(self.positive_margin - scores.float()), 0.0)
        excess = torch.where(negative, F.relu(negative_scores.float() - self.negative_margin), 0.0)
        class_loss = (missed + excess) / 2
        if self.kind == "contrastive":
            class_loss = class_loss.square()
        found, wanted = codes[box_positive].float(), target_codes[box_positive].float()
        box_loss = torch.zeros_like(class_loss)
        box_loss[box_positive] = F.smooth_l1_loss(found, wanted, reduction="none").sum(dim=1)
        return AnchorLosses(class_loss, box_loss, positive, negative, box_positive)

    def weighted(self, losses: AnchorLosses) -> Tensor:
        """Class losses (..., C, N) as a call adds them up before it divides by the number of positives.

        Those of `rll` are weighted, over all leading dimensions together; the others' are the ones of `losses`.
        """
        if self.kind != "rll":
            return losses.class_loss
        class_loss, positives = losses.class_loss, losses.positive.sum()
        costly = (losses.positive & (class_loss > 0)).sum()
        weights = torch.where(losses.positive, positives / costly.clamp(min=1), self._ranked(losses))
        return class_loss * weights

    def _ranked(self, losses: AnchorLosses) -> Tensor:
        """Weights (..., C, N) of the negatives: number of positives (1 if none) in all, the same for every class.

        Within a class the weights fall exponentially from the hardest negative to `rll_ratio` of that at no cost.
        """
        costs = torch.where(losses.negative, losses.class_loss, 0.0).detach().movedim(-2, 0)  # (C, ..., N)
        by_class = costs.flatten(1)
        if not by_class.numel():
            return torch.zeros_like(losses.class_loss)
        hardest = by_class.amax(dim=1, keepdim=True)  # (C, 1)
        active = hardest > _SMALLEST_HARDEST
        steepness = -math.log(self.rll_ratio) / hardest.clamp(min=_SMALLEST_HARDEST)
        weights = ((by_class - hardest) * steepness).exp() * ((by_class > 0) & active)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)  # the hardest one has 1
        weights = weights * losses.positive.sum().clamp(min=1) / active.sum().clamp(min=1)
        weights = torch.where(weights > _SMALLEST_WEIGHT, weights, 0.0)
        return weights.view(costs.shape).movedim(0, -2)

    def _keep(self, negatives: Tensor, positives: int) -> Tensor:
        """Those of the losses (M,) that count: none without positives, then all, or the hardest."""
        if not positives:
            return negatives[:0]
        if self.kind == "rll" or self.negative_ratio is None:
            return negatives
        return negatives.topk(min(len(negatives), int(self.negative_ratio * positives))).values

    def _warn_once(self) -> None:
        if self._warned:
            return
        self._warned.append("no positives")
        logger.warning(
            "A batch has no positive anchor, so its class loss is 0. Now and then that is normal. If the loss stays 0, "
            "the objects do not fit the anchors of 240 px: check INPUT.PATCH.SCALE and OS2D.EVAL_SCALE, and "
            "OS2D.POSITIVE_IOU and OS2D.REMAP_POSITIVE_IOU. This is said once a training."
        )
