"""Fewer negative examples at the same expected loss: a few of the sampled negatives stand in for all of them.

Detectron2 samples, say, 512 regions an image, at most a quarter of them foreground, and computes every one of them.
Background regions are alike, and most of them teach nothing. Here all foreground regions are kept, and of the n
background regions a random k; each kept one enters the loss floor(n / k) or ceil(n / k) times, once for itself and
once for each region that it stands in for. Every region has the same chance to be kept and to stand in, so that loss
and gradient have the expectation (over the draw) of those of the whole sample; their variance is larger. Anchors of an
RPN likewise: there the backward pass becomes cheaper, see `fsdet.layers.sparse_gradient`.

Ours; the common alternative of a smaller sample changes the balance of foreground and background.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

Losses = Callable[..., dict[str, Tensor]]


def stand_ins(count: int, kept: int, device: torch.device | None = None) -> Tensor:
    """For each of `count` examples the number of the one that stands in for it, drawn at random.

    Args:
        count: n, examples that there are.
        kept: k, examples to keep; all of them where k >= n.
        device: of the result; its generator is drawn from only where k < n.

    Returns:
        (n,) numbers in [0, n), k different ones; each of those is its own stand-in and that of floor or ceil(n/k)
        examples in all.
    """
    if kept >= count:
        return torch.arange(count, device=device)
    order = torch.randperm(count, device=device)
    result = torch.empty_like(order)
    result[order] = order[torch.arange(count, device=device) % kept]
    return result


def thin_background(regions: Instances, background: int, kept: int) -> Instances:
    """Keep all foreground and at most `kept` background regions of one image, in their order.

    Args:
        regions: sampled regions with `gt_classes`.
        background: class id of the background.
        kept: background regions to keep, at least 1.

    Returns:
        The kept regions with `stands_for` (int64): how many of the sampled regions each one stands for.
    """
    counts = torch.ones_like(regions.gt_classes)
    places = (regions.gt_classes == background).nonzero()[:, 0]
    chosen = places[stand_ins(len(places), kept, places.device)]
    counts[places] = 0
    counts.index_add_(0, chosen, torch.ones_like(chosen))
    thinned = regions[counts > 0]
    thinned.stands_for = counts[counts > 0]
    return thinned


def _region_losses(losses: Losses, predictions: tuple[Tensor, ...], regions: list[Instances]) -> dict[str, Tensor]:
    """Losses of a box predictor over the whole sample: every row as often as it stands for a region."""
    if not regions or not all(r.has("stands_for") for r in regions):
        return losses(predictions, regions)
    rows = [torch.arange(len(r), device=r.stands_for.device).repeat_interleave(r.stands_for) for r in regions]
    firsts = torch.tensor([0, *(len(r) for r in regions)]).cumsum(0).tolist()
    every = torch.cat([row + first for row, first in zip(rows, firsts, strict=False)])
    if len(every) != firsts[-1]:
        predictions = tuple(prediction[every] for prediction in predictions)
        regions = [r[row] for r, row in zip(regions, rows, strict=True)]
    return losses(predictions, regions)


def _thinned_sample(sample: Callable[..., list[Instances]], background: int, kept: int, *args: Any) -> list[Instances]:
    return [thin_background(regions, background, kept) for regions in sample(*args)]


def _anchor_losses(
    losses: Losses,
    kept: int,
    anchors: list[Boxes],
    logits: list[Tensor],
    labels: list[Tensor],
    deltas: list[Tensor],
    boxes: list[Tensor],
) -> dict[str, Tensor]:
    """Losses of an RPN in which the objectness of a few negative anchors of each image stands in for all of them."""
    every = torch.cat(logits, dim=1)  # (N, anchors of all levels)
    source = torch.arange(every.shape[1], device=every.device).repeat(len(labels), 1)
    for row, label in zip(source, labels, strict=True):
        places = (label == 0).nonzero()[:, 0]
        row[places] = places[stand_ins(len(places), kept, places.device)]
    split = every.gather(1, source).split([level.shape[1] for level in logits], dim=1)
    return losses(anchors, list(split), labels, deltas, boxes)


def apply_thinning(model: nn.Module, cfg: CfgNode) -> None:
    """Thin the negatives of a GeneralizedRCNN as MODEL.ROI_HEADS.BACKGROUND_KEPT and MODEL.RPN.NEGATIVES_KEPT ask for.

    Call it once, after `build_model`. It wraps methods of the instances, so that every class of RPN, heads and box
    predictor will do.
    """
    if kept := cfg.MODEL.ROI_HEADS.BACKGROUND_KEPT:
        heads = model.roi_heads
        heads.label_and_sample_proposals = partial(
            _thinned_sample, heads.label_and_sample_proposals, heads.num_classes, kept
        )
        heads.box_predictor.losses = partial(_region_losses, heads.box_predictor.losses)
    if kept := cfg.MODEL.RPN.NEGATIVES_KEPT:
        rpn = model.proposal_generator
        rpn.losses = partial(_anchor_losses, rpn.losses, kept)
