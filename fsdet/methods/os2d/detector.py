"""OS2D detector: the feature map of a picture is matched densely with the templates of all classes of a memory.

There are no proposals and no weights of any class. In training, patches of scenes meet supports of the classes that
their pictures show; at inference, every picture meets the class memory, which is filled once and tied to the weights
of the backbone.

Source: OS2D (Osokin et al., ECCV 2020), in the form of the release.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fsdet.data.support import read_picture
from fsdet.methods.os2d.geometry import STRIDE, anchor_boxes
from fsdet.methods.os2d.head import OS2DHead
from fsdet.methods.os2d.inference import Level, Search
from fsdet.methods.os2d.memory import TemplateMemory
from fsdet.methods.os2d.objective import AnchorLosses, Objective
from fsdet.methods.os2d.pyramid import Pyramid, resize
from fsdet.methods.os2d.targets import SceneTargets
from fsdet.methods.os2d.templates import template_of
from fsdet.methods.os2d.training import Labelling, check_items, join_classes, targets_of
from fsdet.methods.os2d.transform_net import load_weakalign
from fsdet.modeling.freeze import freeze_module
from fsdet.modeling.strips import MAX_PIXELS, feature_map

FEATURE = "res4"
_MINED_CELLS = 2**16  # cells, over all classes, that mining matches at once; some 300 MB


@META_ARCH_REGISTRY.register()
class OS2D(TemplateMemory):
    """One-stage one-shot detector. Its classes are those of the class memory."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: OS2DHead,
        objective: Objective,
        labelling: Labelling,
        pyramid: Pyramid,
        search: Search,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        class_image_size: int = 240,
        views: str = "none",
        test_shots: int = 30,
        max_classes: int = 15,
        transform_on_negatives: bool = False,
        freeze_transform: bool = False,
        freeze_transform_norm: bool = False,
        seed: int = 0,
    ) -> None:
        """Make the detector; usually from a configuration.

        Args:
            backbone: with a feature map "res4" of stride 16. Its batch norm keeps its statistics in training, scale and
                shift are trained.
            head: alignment and matching.
            objective, labelling: of the training.
            pyramid, search: of the inference.
            pixel_mean, pixel_std: of each channel, in the order of `input_format`.
            input_format: channel order of pictures, "RGB" or "BGR".
            class_image_size: root of the area of a support, pixels.
            views: of a support at inference, see `templates.py`.
            test_shots: supports of a class at inference, at most.
            max_classes: classes of a training batch, at most.
            transform_on_negatives: whether negatives move the alignment in training.
            freeze_transform: keep the alignment network as it is.
            freeze_transform_norm: keep the statistics of its batch norm.
            seed: of the choice of supports.
        Raises: ValueError for a backbone without such a map.
        """
        super().__init__()
        shapes = backbone.output_shape()
        if FEATURE not in shapes or shapes[FEATURE].stride != STRIDE:
            raise ValueError(
                f'OS2D reads the feature map "{FEATURE}" of stride {STRIDE}; the backbone has '
                f"{ {name: shape.stride for name, shape in shapes.items()} }. Take a C4 network, e.g. --model r50_c4"
            )
        self.backbone, self.head = backbone, head
        self.objective, self.labelling, self.pyramid, self.search = objective, labelling, pyramid, search
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.input_format, self.class_image_size, self.views = input_format, class_image_size, views
        self.test_shots, self.max_classes, self.seed = test_shots, max_classes, seed
        self.transform_on_negatives = transform_on_negatives
        self._norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
        if freeze_transform:
            freeze_module(head.transform_net)
        elif freeze_transform_norm:
            self._norms += [module for module in head.transform_net.modules() if isinstance(module, _BatchNorm)]
        self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments from OS2D.*, MODEL.*, INPUT.FORMAT, TEST.DETECTIONS_PER_IMAGE and SEED.

        Raises: FileNotFoundError or ValueError for a file of weakalign's weights that is missing or is none.
        """
        node = cfg.OS2D
        head = OS2DHead(node.PARAMETERS, node.INVERSE, aligned_share=node.ALIGNED_SHARE)
        if node.WEAKALIGN:
            head.transform_net.load_state_dict(_read_weakalign(node.WEAKALIGN))
        return {
            "backbone": build_backbone(cfg),
            "head": head,
            "objective": Objective(
                kind=node.OBJECTIVE,
                positive_margin=node.POSITIVE_MARGIN,
                negative_margin=node.NEGATIVE_MARGIN,
                negative_ratio=node.NEGATIVE_RATIO or None,
                rll_ratio=node.RLL_RATIO,
                box_weight=node.BOX_WEIGHT,
                negative_weight=node.NEGATIVE_WEIGHT,
            ),
            "labelling": Labelling(
                node.POSITIVE_IOU, node.NEGATIVE_IOU, node.REMAP, node.REMAP_POSITIVE_IOU, node.REMAP_NEGATIVE_IOU
            ),
            "pyramid": Pyramid(tuple(node.PYRAMID), node.EVAL_SCALE, node.IMAGE_SIZE),
            "search": Search(
                fusion=node.FUSION,
                score_threshold=node.SCORE_THRESH_TEST,
                nms=node.NMS,
                nms_threshold=node.NMS_THRESH_TEST,
                is_across=node.NMS_ACROSS_CLASSES,
                limit=cfg.TEST.DETECTIONS_PER_IMAGE,
            ),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "class_image_size": node.CLASS_IMAGE_SIZE,
            "views": node.VIEWS,
            "test_shots": node.TEST_SHOTS,
            "max_classes": node.MAX_CLASSES,
            "transform_on_negatives": node.TRANSFORM_ON_NEGATIVES,
            "freeze_transform": node.FREEZE_TRANSFORM,
            "freeze_transform_norm": node.FREEZE_TRANSFORM_NORM,
            "seed": cfg.SEED,
        }

    @property
    def device(self) -> torch.device:
        """Where the detector computes."""
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> OS2D:
        """Switch the mode; norms with kept statistics stay in evaluation mode."""
        super().train(mode)
        for norm in self._norms:
            norm.eval()
        return self

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, detections otherwise.

        Args:
            batched_inputs: in training patches, see `training_losses`; otherwise pictures, see `inference`.
        Returns: a dict of losses, or a list of {"instances": Instances}.
        """
        return self.training_losses(batched_inputs) if self.training else self.inference(batched_inputs)

    def training_losses(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Losses of a batch of patches.

        Args:
            batched_inputs: one dict for each patch: "image" (3, h, w), the same size for all; "instances" with
                `gt_boxes` (not clipped), `gt_classes` and `gt_difficult`; "support_images", a list of (3, h_c, w_c),
                and "support_classes", their class ids; for a mined patch "mined_class".
        Returns: "loss_cls_pos", "loss_cls_neg" and "loss_box"; all 0 for a batch without any support.
        Raises: ValueError for inputs of another form.
        """
        check_items(batched_inputs)
        class_ids, pictures = join_classes(batched_inputs, self.max_classes)
        if not class_ids:
            nothing = sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad) * 0.0
            return {name: nothing for name in ("loss_cls_pos", "loss_cls_neg", "loss_box")}
        scenes = self._features(torch.stack([item["image"] for item in batched_inputs]))
        matches = self.head(scenes, self.encode_pictures(pictures))
        anchors = anchor_boxes(*scenes.shape[2:], device=self.device)
        targets = [targets_of(item["instances"], class_ids, self.device) for item in batched_inputs]
        return self.objective(
            matches.scores,
            matches.codes,
            negative_scores=None if self.transform_on_negatives else matches.detached_scores,
            **self.labelling(anchors, targets, matches.codes),
        )

    def encode_pictures(self, pictures: Sequence[Tensor]) -> Tensor:
        """Templates (C, 225, D) of pictures (3, h, w) of any sizes, each passed through the backbone alone."""
        return torch.stack([template_of(self._features(picture[None])) for picture in pictures])

    @torch.no_grad()
    def encode_picture(self, picture: np.ndarray) -> Tensor:
        """Template (225, D) of a picture (h, w, 3) uint8, without gradient and in single precision."""
        with torch.autocast(self.device.type, enabled=False):
            return self.encode_pictures([_to_tensor(picture)])[0]

    @torch.no_grad()
    def mining_losses(
        self, picture: np.ndarray, templates: Tensor, targets: SceneTargets
    ) -> tuple[AnchorLosses, Tensor]:
        """What every anchor of a scene at one scale costs; for the choice of hard patches, in evaluation mode.

        Args:
            picture: (h, w, 3) uint8 in `input_format` order, at the size that is searched.
            templates: (C, 225, D), one for each class, from `encode_pictures`, on any device.
            targets: of the scene, in pixels of `picture`; `class_index` is the place among the templates.
        Returns: losses (C, N), neither weighted nor selected, and the anchors (N, 4) XYXY in pixels of `picture`.
        """
        scene = self.scene_features(picture)[None]
        anchors = anchor_boxes(*scene.shape[2:], device=self.device)
        parts = templates.split(max(1, _MINED_CELLS // len(anchors)))
        matches = [self.head(scene, part.to(self.device)) for part in parts]
        scores, codes = (torch.cat([getattr(own, name) for own in matches], dim=1) for name in ("scores", "codes"))
        losses = self.objective.per_anchor(scores, codes, **self.labelling(anchors, [targets], codes))
        return AnchorLosses(**{name: value[0] for name, value in vars(losses).items()}), anchors

    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Detect the classes of the class memory, picture by picture.

        Args:
            batched_inputs: one dict for each picture: "original_image" (H, W, 3) uint8 in `input_format` order, or
                "file_name" to read it from; "height" and "width", if given, are the frame of the result.
        Returns: {"instances": Instances} each, with pred_boxes, scores (cosines, the best one first) and pred_classes,
            the class's number in the class memory.
        Raises: RuntimeError without a class memory; ValueError for one that these weights have not made, and for an
            input without picture.
        """
        return [{"instances": self._detect(item, self.known_templates())} for item in batched_inputs]

    @torch.no_grad()
    def _detect(self, item: dict[str, Any], classes: Iterator[Tensor]) -> Instances:
        """Detections of one input in the picture's frame; `classes` gives templates (S, V, 225, D)."""
        picture = self._picture(item)
        frame = int(item.get("height", picture.shape[0])), int(item.get("width", picture.shape[1]))
        levels = []
        for size in self.pyramid.sizes(*picture.shape[:2]):
            features = self.scene_features(resize(picture, size))
            levels.append(Level(self.head.prepare(features), tuple(features.shape[1:]), size))
        found = self.search.find(self.head, levels, frame, classes)
        instances = Instances(frame, pred_boxes=Boxes(found.boxes), scores=found.scores, pred_classes=found.classes)
        if found.anchors is not None:
            instances.anchor_boxes, instances.corners = Boxes(found.anchors), found.corners
        return instances

    def scene_features(self, picture: np.ndarray) -> Tensor:
        """Feature map (D, H, W) of a picture (h, w, 3) uint8 of any size, without gradient; large ones in strips."""

        def rows(first: int, end: int) -> Tensor:
            return self._normalise(_to_tensor(picture[first:end])[None])

        return feature_map(self.backbone, FEATURE, rows, picture.shape[:2], MAX_PIXELS).float()

    def _features(self, images: Tensor) -> Tensor:
        """Feature maps (B, D, H, W) of images (B, 3, h, w), pixels."""
        return self.backbone(self._normalise(images))[FEATURE].float()

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.to(self.device).float() - self.pixel_mean) / self.pixel_std

    def _picture(self, item: dict[str, Any]) -> np.ndarray:
        """The stored picture of an input, (H, W, 3) uint8."""
        if "original_image" in item:
            return np.asarray(item["original_image"])
        if "file_name" not in item:
            raise ValueError(
                f'An input with the keys {sorted(item)} has no picture for OS2D: give it as "original_image" (H, W, 3) '
                f'uint8 in {self.input_format} order, or its "file_name"; it is searched at scales of its own'
            )
        return read_picture(item["file_name"], self.input_format)


def _to_tensor(picture: np.ndarray) -> Tensor:
    """A copy of a picture (h, w, 3) as (3, h, w)."""
    return torch.from_numpy(picture.transpose(2, 0, 1).copy())


def _read_weakalign(file_name: str) -> dict[str, Tensor]:
    """The state of a transform network from weakalign's affine weights."""
    if not Path(file_name).is_file():
        raise FileNotFoundError(
            f'OS2D.WEAKALIGN: {file_name} is not a file; correct it, or "" to start from the identity'
        )
    try:
        with torch.serialization.safe_globals([Namespace]):  # training arguments beside the weights
            state = torch.load(file_name, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        return load_weakalign(state)
    except (UnpicklingError, RuntimeError, LookupError, EOFError, ValueError) as error:  # by what is wrong with it
        raise ValueError(
            f"OS2D.WEAKALIGN: {file_name} cannot be read ({str(error).splitlines()[0]}); give a file with the state "
            "dict of weakalign's affine network and nothing that would run code"
        ) from error
