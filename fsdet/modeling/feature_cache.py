"""Features of a frozen backbone, computed once per view of a training picture and kept in memory.

Fine-tuning shows the same few pictures hundreds of times. With resizing to S sizes and flips, a picture has 2 S views,
fewer with DATALOADER.VIEWS. Where the backbone gets no gradient, the features of a view never change: they are looked
up by the content of the input picture, so neither order nor augmentation nor resuming need to know of the cache.

Every view is encoded alone, as at test time, and the features of a batch are padded with zeros. A batch that goes
through the backbone together is padded before it, so that convolutions carry the padding into the border of the smaller
pictures and fill the padded area with something else than zeros: features differ there, and only there. With pictures
of one size both ways are equal up to rounding.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MIB = 2**20


@dataclass
class CachedView:
    """What is known of one view.

    Attributes:
        features: level -> (1, C, H, W), without gradient, in the type that the backbone gave.
        proposals: of a frozen RPN in training mode; None while unknown.
    """

    features: dict[str, Tensor]
    proposals: Instances | None = None

    def nbytes(self) -> int:
        """Memory of the features in bytes."""
        return sum(level.numel() * level.element_size() for level in self.features.values())


def view_key(image: Tensor) -> bytes:
    """Digest of an input picture (C, H, W): its shape, type and content."""
    digest = hashlib.blake2b(f"{tuple(image.shape)} {image.dtype}".encode(), digest_size=16)
    digest.update(image.contiguous().cpu().numpy())
    return digest.digest()


class FeatureCache:
    """Puts a memory in front of the backbone of a GeneralizedRCNN, in training alone.

    Where the RPN is frozen as well, its proposals are kept with the features and its losses, which train nothing, are
    left out. When the memory is full, the views that are not in it are computed every time. Each process keeps the
    views that it meets. One cache serves one precision.

    Attributes:
        used: bytes held.
        views: content digest -> view.
    """

    def __init__(self, model: nn.Module, capacity: int) -> None:
        """Take the place of `model.backbone.forward`, and of the RPN's where that is frozen.

        Args:
            model: a GeneralizedRCNN whose backbone is frozen.
            capacity: bytes.

        Raises:
            ValueError: when the backbone trains.
        """
        if any(p.requires_grad for p in model.backbone.parameters()):
            raise ValueError("a backbone that trains has nothing to cache; set MODEL.BACKBONE.FREEZE True")
        self.model, self.capacity, self.used = model, capacity, 0
        self.views: dict[bytes, CachedView] = {}
        self._is_full = False  # and has been said
        self._inputs: Sequence[dict[str, Any]] = ()
        self._batch: list[CachedView] = []
        model.register_forward_pre_hook(self._note_inputs)
        self._encode, model.backbone.forward = model.backbone.forward, self._features
        rpn = model.proposal_generator
        if rpn is not None and not any(p.requires_grad for p in rpn.parameters()):
            self._propose, rpn.forward = rpn.forward, self._proposals

    def _note_inputs(self, model: nn.Module, args: tuple[Sequence[dict[str, Any]]]) -> None:
        """Before every pass of the model: remember the pictures whose features will be asked for."""
        self._inputs = args[0] if model.training and args else ()

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        """Stand-in for the backbone: level -> (N, C, H, W) of the padded batch (N, 3, H, W)."""
        inputs, self._inputs = self._inputs, ()
        if not inputs:
            return self._encode(images)
        keys = [view_key(item["image"]) for item in inputs]
        get_event_storage().put_scalar("feature_cache/hits", sum(key in self.views for key in keys) / len(keys))
        self._batch = [
            self.views.get(key) or self._add(key, image, item["image"].shape[-2:])
            for key, image, item in zip(keys, images, inputs, strict=True)
        ]
        return {
            level: pad_together([view.features[level] for view in self._batch]) for level in self._batch[0].features
        }

    def _add(self, key: bytes, image: Tensor, size: Sequence[int]) -> CachedView:
        """Encode one picture of the padded batch without the padding that it owes to the others."""
        divisor = max(self.model.backbone.size_divisibility, 1)
        height, width = (-(-length // divisor) * divisor for length in size)
        with torch.no_grad():
            view = CachedView(self._encode(image[None, :, :height, :width]))
        if self.used + view.nbytes() <= self.capacity:
            self.views[key] = view
            self.used += view.nbytes()
        elif not self._is_full:
            self._is_full = True
            logger.warning(
                "The feature cache is full with %d views in %.0f MiB: further views are computed each time. Raise "
                "MODEL.BACKBONE.CACHE_MIB or lower DATALOADER.VIEWS.",
                len(self.views),
                self.used / MIB,
            )
        return view

    def _proposals(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Stand-in for a frozen RPN: proposals of each picture; no losses in training."""
        batch, self._batch = self._batch, []
        if not batch or not self.model.training:
            return self._propose(images, features, gt_instances)
        for number, view in enumerate(batch):
            if view.proposals is None:
                alone = ImageList(images.tensor[number : number + 1], [images.image_sizes[number]])
                # The anchors that it samples for its losses must not shift the numbers drawn after it: a resumed run
                # has other views in its memory.
                with torch.no_grad(), torch.random.fork_rng(self._devices()):
                    ((view.proposals,), _) = self._propose(alone, view.features, gt_instances[number : number + 1])
        return [view.proposals for view in batch], {}

    def _devices(self) -> list[torch.device]:
        """GPUs whose generators the model draws from, beside the CPU's."""
        device = self.model.pixel_mean.device
        return [device] if device.type == "cuda" else []


def pad_together(features: Sequence[Tensor]) -> Tensor:
    """Stack (1, C, H_i, W_i) features to (N, C, H, W) with zeros at the bottom and the right."""
    height, width = (max(level.shape[axis] for level in features) for axis in (2, 3))
    padded = [F.pad(level, (0, width - level.shape[3], 0, height - level.shape[2])) for level in features]
    return torch.cat(padded)
