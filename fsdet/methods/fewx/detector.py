"""FewX detector: a C4 Faster R-CNN that compares what it sees with the supports of a class.

In training an image meets the class of its boxes and one other class; at inference (`inference.py`) every class of the
class memory, which is filled once and tied to the weights.

Source: FewX (Fan et al., CVPR 2020), in the form of the release.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from fsdet.data.mapper import IGNORE_CLASS
from fsdet.data.support import Support, SupportSet
from fsdet.methods.fewx.inference import FEATURE, KERNEL, Classes, PairScorer, prepare_classes
from fsdet.methods.fewx.rpn import attention_kernels
from fsdet.methods.fewx.settings import range_faults
from fsdet.methods.fewx.supports import cut_crops
from fsdet.modeling.class_memory import ClassMemory, module_digest
from fsdet.modeling.derived import Derived
from fsdet.modeling.drawn_memory import DrawnShotsMemory

logger = logging.getLogger(__name__)

KIND = "fewx"
_SUPPORT_KEYS = ("support_images", "support_boxes")


@META_ARCH_REGISTRY.register()
class FewXRCNN(DrawnShotsMemory, GeneralizedRCNN):
    """FewX: attention RPN and multi-relation head. Its classes are those of the class memory."""

    memory_kind = KIND
    memory_owner = "FewX"
    memory_basis = "weights, crop size or pooling"

    @configurable
    def __init__(
        self,
        *,
        crop_size: int,
        test_shots: int,
        rows_at_once: int,
        shared_proposals: int,
        seed: int,
        settings: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        """Make the detector; usually from a configuration.

        Args:
            crop_size: side of a support's crop in pixels.
            test_shots: supports of a class at inference, at most.
            rows_at_once: regions in res5 at once at inference.
            shared_proposals: 0, or how many proposals all classes share (approximate).
            seed: of the choice of supports.
            settings: plain values that change the class memory's tensors and stand in no weight.
            kwargs: of GeneralizedRCNN; `roi_heads` are RelationRes5ROIHeads.
        """
        super().__init__(**kwargs)
        self.crop_size, self.test_shots, self.seed = crop_size, test_shots, seed
        self.rows_at_once, self.shared_proposals = rows_at_once, shared_proposals
        self.settings = list(settings)
        self._classes = Derived(prepare_classes)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments from MODEL.*, INPUT.* and FEWX.*. Raises: ValueError for what does not go together."""
        _check_settings(cfg)
        box_head = cfg.MODEL.ROI_BOX_HEAD
        pooling = (box_head.POOLER_RESOLUTION, box_head.POOLER_SAMPLING_RATIO, box_head.POOLER_TYPE)
        return {
            **super().from_config(cfg),
            "crop_size": cfg.INPUT.FS.CROP_SIZE,
            "test_shots": cfg.FEWX.TEST_SHOTS,
            "rows_at_once": cfg.FEWX.ROWS_AT_ONCE,
            "shared_proposals": cfg.FEWX.SHARED_PROPOSALS,
            "seed": cfg.SEED,
            "settings": (cfg.INPUT.FORMAT, cfg.INPUT.FS.CROP_SIZE, *pooling),
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, detections otherwise.

        Args:
            batched_inputs: one dict for each query image: "image" (3, H, W); in training also "instances" with the
                boxes of one class (its id does not matter; rows with -1 are ignore regions), "support_images"
                (2 S, 3, C, C), S crops of that class and then S of a class that the image does not show, and
                "support_boxes" (2 S, 4) XYXY in their pixels. S is the same for all images.
        Returns: in training four losses, means over the images; else a list of {"instances": Instances} with
            pred_boxes, scores and pred_classes, the class's number in the class memory.
        Raises: ValueError for inputs without supports; RuntimeError at inference without a class memory.
        """
        if not self.training:
            return self.inference(batched_inputs)
        shots = _count_shots(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        targets = [_as_matches(item["instances"].to(self.device)) for item in batched_inputs]
        (level,) = self.roi_heads.in_features
        features = self.backbone(images.tensor)
        crops = torch.cat([item["support_images"] for item in batched_inputs])
        boxes = torch.cat([item["support_boxes"] for item in batched_inputs])
        kernels, support = self.encode_crops(crops, boxes, shots)
        kernels = kernels.unflatten(0, (-1, 2))
        proposals, losses = self.proposal_generator(images, features, targets, kernels)
        parts = self.roi_heads.box_predictor.encode(support)
        losses |= self.roi_heads(features[level], proposals, targets, parts)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals[::2])
        return losses

    def encode_crops(self, crops: Tensor, boxes: Tensor, shots: int) -> tuple[Tensor, Tensor]:
        """What the heads need of classes, from crops of their supports.

        Args:
            crops: (K * S, 3, H, W) pixels, class by class.
            boxes: (K * S, 4) XYXY in pixels of the crops.
            shots: S.
        Returns: kernels (K, C4) and mean features (K, C5, P, P).
        """
        (level,) = self.roi_heads.in_features
        images = self.preprocess_image([{"image": crop} for crop in crops])
        features = self.backbone(images.tensor)[level]
        pooled, behind = self.roi_heads.support_features(features, boxes.to(self.device))
        return attention_kernels(pooled, shots), behind.unflatten(0, (-1, shots)).mean(dim=1)

    @property
    def memory_modules(self) -> tuple[nn.Module, ...]:
        """Backbone and res5."""
        return self.backbone, self.roi_heads.res5

    @property
    def memory_encoder(self) -> str:
        """Digest of all that a class memory depends on beside the supports."""
        encoder = nn.ModuleDict(dict(zip(("backbone", "res5"), self.memory_modules, strict=True)))
        pixels = [self.pixel_mean.flatten().tolist(), self.pixel_std.flatten().tolist()]
        return module_digest(encoder, KIND, *pixels, *self.settings)

    def encode_shots(self, support_set: SupportSet, supports: Sequence[Support]) -> dict[str, Tensor]:
        """Kernel "kernel" (C4,) and feature "feature" (C5, P, P) of the supports of one class."""
        crops, boxes = cut_crops(support_set, supports, self.crop_size, self.input_format)
        with torch.autocast(self.device.type, enabled=False):
            (kernel,), (feature,) = self.encode_crops(crops, boxes, len(supports))
        return {KERNEL: kernel, FEATURE: feature}

    def keep_class_memory(self, memory: ClassMemory | None) -> None:
        """Take the classes for the inferences to come (None forgets them).

        Raises: ValueError for a memory of another kind or encoder.
        """
        super().keep_class_memory(memory)
        self._classes.forget()

    def train(self, mode: bool = True) -> FewXRCNN:
        """Switch the mode; behind a training nothing that was computed from the weights holds."""
        self._classes.forget()
        return super().train(mode)

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """Detect the classes of the class memory; images of different sizes do not touch each other.

        Args:
            batched_inputs: see `forward`; "height" and "width" give the frame of the result.
            detected_instances: not supported.
            do_postprocess: False returns Instances in the frame of the network input.
        Raises: RuntimeError without a class memory; ValueError for one that these weights have not made.
        """
        if detected_instances is not None:
            raise ValueError("FewX detects the classes of its class memory; it does not take boxes and classes")
        classes = self._known_classes()
        results: list[Any] = [None] * len(batched_inputs)
        for numbers, images, features in self._by_size(batched_inputs):
            for number, found in zip(
                numbers, self._scorer().detect(features, images.image_sizes, classes), strict=True
            ):
                results[number] = found
        if not do_postprocess:
            return results
        return GeneralizedRCNN._postprocess(results, batched_inputs, [found.image_size for found in results])

    @torch.no_grad()
    def propose_regions(self, batched_inputs: list[dict[str, Any]]) -> list[Instances]:
        """The proposals of all classes of the memory, for each image; class by class, so a place may come up again.

        Returns: Instances with proposal_boxes and objectness_logits in the frame of the network input.
        """
        found: list[list[Instances]] = [[] for _ in batched_inputs]
        for numbers, images, features in self._by_size(batched_inputs):
            for pairs, proposals in self._scorer().propose(features, images.image_sizes, self._known_classes()):
                for (image, _), own in zip(pairs, proposals, strict=True):
                    found[numbers[image]].append(own)
        return [Instances.cat(own) for own in found]

    def _known_classes(self) -> Classes:
        """The class memory, ready for the heads. Raises: as `inference`."""
        memory = self.checked_memory()
        entries = tuple(memory[name] for name in memory)
        return self._classes(self.roi_heads.box_predictor, memory, self.device, entries)

    def _scorer(self) -> PairScorer:
        return PairScorer(self.proposal_generator, self.roi_heads, self.rows_at_once, self.shared_proposals)

    def _by_size(self, batched_inputs: list[dict[str, Any]]) -> Iterator[tuple[list[int], ImageList, Tensor]]:
        """Numbers of the images of one size, those images, and their features (N, C4, H, W)."""
        (level,) = self.roi_heads.in_features
        by_size: dict[tuple[int, ...], list[int]] = {}
        for number, item in enumerate(batched_inputs):
            by_size.setdefault(tuple(item["image"].shape), []).append(number)
        for numbers in by_size.values():
            images = self.preprocess_image([batched_inputs[number] for number in numbers])
            yield numbers, images, self.backbone(images.tensor)[level]


def _check_settings(cfg: CfgNode) -> None:
    """Raise ValueError with one line per fault for settings that cannot be used together."""
    faults = range_faults(cfg)
    for component, expected in (("PROPOSAL_GENERATOR", "AttentionRPN"), ("ROI_HEADS", "RelationRes5ROIHeads")):
        if expected != cfg.MODEL[component].NAME:
            faults.append(f"MODEL.{component}.NAME is {cfg.MODEL[component].NAME}; expected {expected}")
    levels = (list(cfg.MODEL.RPN.IN_FEATURES), list(cfg.MODEL.ROI_HEADS.IN_FEATURES))
    if levels[0] != levels[1] or len(levels[0]) != 1:
        faults.append(f'MODEL.RPN.IN_FEATURES and MODEL.ROI_HEADS.IN_FEATURES are {levels}; expected ["res4"] in both')
    if cfg.MODEL.PROPOSAL_GENERATOR.FREEZE and cfg.MODEL.BACKBONE.CACHE_MIB:
        faults.append(
            "MODEL.BACKBONE.CACHE_MIB keeps the proposals of a frozen RPN, but here they depend on the supports"
        )
    if faults:
        raise ValueError("FewX cannot be built:\n  " + "\n  ".join(faults))


def _count_shots(batched_inputs: Sequence[dict[str, Any]]) -> int:
    """Supports of each class of an episode. Raises: ValueError for inputs without supports, or of different numbers."""
    for item in batched_inputs:
        if missing := [key for key in _SUPPORT_KEYS if key not in item]:
            raise ValueError(
                f"A training input of FewX lacks {missing}; it has {sorted(item)}. Set INPUT.FS.ENABLED True, which "
                "adds supports to every image"
            )
    counts = {len(item[key]) for item in batched_inputs for key in _SUPPORT_KEYS}
    count = counts.pop()
    if counts or count < 2 or count % 2:
        raise ValueError(
            f"Training inputs of FewX with {sorted({count, *counts})} supports and boxes; expected one even number: as "
            "many of the image's class as of another class"
        )
    return count // 2


def _as_matches(targets: Instances) -> Instances:
    """Ground truth in which every object has class 0, whatever its class; ignore regions stay."""
    classes = targets.gt_classes
    fields = {"gt_boxes": targets.gt_boxes, "gt_classes": torch.where(classes == IGNORE_CLASS, classes, 0)}
    return Instances(targets.image_size, **fields)
